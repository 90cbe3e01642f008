"""Picks, without a GPU, the tiles of the kernels that hold a whole weight on chip: writes kernels/tuned/gpu_tiles.json.

For each chip generation, op, kind of product, alignment and padded weight size, candidates are compiled in order of
preference (most rows first: fewer trips around the loop and larger loads) until one needs no stack and its shared
memory fits. Widths that are no multiple of 16 ("ragged") are loaded element by element, which takes more registers, so
they have tiles of their own. Sizes without a clean tile are left out, and plan.py sends them elsewhere.

A tile must be clean on every triton that the project supports. With --resume the search for a size starts at the
tile that the table has, and sizes that it has not stay out: run once, then with --resume under the other version.

usage: python benches/tune_tiles.py [--resume] [--only TEXT] [--out FILE] [--processes N]
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import atomic
import torch
import triton

from perceptriton.kernels.gpu import aot, layer
from perceptriton.kernels.records import Plan, Tile
from perceptriton.kernels.tables import TABLES

WIDTHS = (16, 32, 64, 128, 256)
KINDS = {"half": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "ieee": (torch.float32, "ieee")}
ARCHS = (90, 80)
# Elements of the padded weight beyond which no tile was ever clean.
LARGEST = {"half": 128 * 256, "tf32": 128 * 128, "ieee": 128 * 128}
OPS = ("linear_act_fwd", "linear_act_bwd")
LAYOUTS = ("aligned", "ragged")
ROWS = (128, 64, 32, 16)


def candidates(op: str, kind: str, block_k: int, block_n: int):
    wide = max(block_k, block_n) >= 128
    # fp32 dots on the FMA units unroll fully: more rows than 32 only lengthen the code.
    rows = [r for r in ROWS if not (kind == "ieee" and r > 32)]
    for block_m, num_warps in itertools.product(rows, (8, 4) if wide else (4, 8)):
        # What a thread must hold at least: its share of the sums and of the row tiles. Beyond 160 nothing was clean.
        held = block_m * (block_k + 2 * block_n) + (block_k * block_n if op == "linear_act_bwd" else 0)
        if held <= 160 * 32 * num_warps:
            for num_stages in (2, 1):
                yield Tile(block_m, block_n, block_k, num_warps, num_stages)


def launch(op: str, dtype: torch.dtype, precision: str, m: int, k: int, n: int, tile: Tile) -> aot.Launch:
    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    plan = Plan("rows", "", tile, programs=2, precision=precision)
    if op == "linear_act_fwd":
        # tanh has the longest epilogue
        return aot.launches(layer.linear_act_fwd, empty(m, k), empty(n, k), empty(n), "tanh", plan)[0]
    wanted = (True, True, True)
    arguments = (empty(m, n), empty(m, n), empty(m, k), empty(n, k), "sigmoid", wanted, plan)
    return aot.launches(layer.linear_act_bwd, *arguments)[0]


def pick(task: tuple[int, str, str, str, int, int], start: list[int] | None = None) -> list[int] | None:
    """[block_m, num_warps, num_stages, programs per SM] of the first clean candidate, from `start` on, or None."""
    arch, op, kind, layout, block_k, block_n = task
    dtype, precision = KINDS[kind]
    shape = (4096, block_k, block_n) if layout == "aligned" else (4099, block_k - 3, block_n - 1)
    tiles = list(candidates(op, kind, block_k, block_n))
    if start:
        tiles = tiles[[[t.block_m, t.num_warps, t.num_stages] for t in tiles].index(start[:3]) :]
    for tile in tiles:
        try:
            resources = aot.compile_for(arch, launch(op, dtype, precision, *shape, tile))
        except Exception as error:  # a tile that the compiler refuses is not a candidate
            print(f"{task} {tile}: {type(error).__name__}", file=sys.stderr)
            continue
        if resources.stack == 0 and resources.shared <= aot.SHARED_LIMIT[arch]:
            return [tile.block_m, tile.num_warps, tile.num_stages, resources.programs_per_sm(arch)]
    return None


def _pick(task):
    return pick(*task)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=TABLES / "gpu_tiles.json")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--resume", action="store_true")
    parser.add_argument(
        "--only", default="", help="tune what this is part of, as in sm_90/linear_act_bwd/tf32; keep the rest"
    )
    options = parser.parse_args()
    old = json.loads(options.out.read_text()) if options.out.exists() else {"tiles": {}, "triton": []}
    tasks = []
    tiles: dict = {}
    for arch, op, kind, layout in itertools.product(ARCHS, OPS, KINDS, LAYOUTS):
        cell = old["tiles"].get(f"sm_{arch}", {}).get(op, {}).get(kind, {}).get(layout, {})
        kept = tiles.setdefault(f"sm_{arch}", {}).setdefault(op, {}).setdefault(kind, {}).setdefault(layout, {})
        for block_k, block_n in itertools.product(WIDTHS, WIDTHS):
            name = f"{block_k}x{block_n}"
            if options.only not in f"sm_{arch}/{op}/{kind}/{layout}/{name}":
                kept.update({name: cell[name]} if name in cell else {})
            elif block_k * block_n <= LARGEST[kind] and (name in cell or not options.resume):
                tasks.append(((arch, op, kind, layout, block_k, block_n), cell[name] if options.resume else None))
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for done, (task, row) in enumerate(zip(tasks, pool.map(_pick, tasks), strict=True), 1):
            (arch, op, kind, layout, block_k, block_n), start = task
            if row:
                if start and row[:3] == start[:3]:
                    row[3] = min(row[3], start[3])
                tiles[f"sm_{arch}"][op][kind][layout][f"{block_k}x{block_n}"] = row
            print(f"{done}/{len(tasks)} {task[0]} {start or ''} -> {row}", file=sys.stderr)
    table = {
        "about": "block_k x block_n: [block_m, num_warps, num_stages, programs per SM]; from benches/tune_tiles.py",
        "triton": sorted({triton.__version__, *(old["triton"] if options.resume or options.only else [])}),
        "tiles": tiles,
    }
    # A row per line: a table to read and to diff.
    text = json.dumps(table, indent=1)
    text = re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda row: "[" + " ".join(row[1].split()) + "]", text)
    atomic.write(options.out, text + "\n")


if __name__ == "__main__":
    main()
