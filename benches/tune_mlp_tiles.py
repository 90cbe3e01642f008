"""Picks, without a GPU, the tiles of the whole-network kernels: writes kernels/tuned/mlp_tiles.json.

For each chip generation, direction, kind of product and chain of padded widths, candidates are compiled; those that
need no stack and fit in shared memory are ranked by an estimate of cycles per row, read from the machine code, and
kept if they stay clean in the variants that a plan may launch: ragged widths, other activations, the cross-entropy
head. A chain without such a tile is left out, and plan.py cuts the network into shorter segments.

A tile must be clean on every triton that the project supports: run once, which keeps up to three tiles per chain, then
with --resume under the other version, which keeps the first that is clean there as well.

usage: python benches/tune_mlp_tiles.py [--resume] [--only TEXT] [--out FILE] [--processes N]
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import torch
import triton

from perceptriton.kernels import aot, mlp
from perceptriton.kernels.plan import TABLES, MlpPlan, MlpSegment, MlpTile

KINDS = {"half": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "ieee": (torch.float32, "ieee")}
ARCHS = (80, 90)
KEEP = 3  # tiles per chain after the first run

# A network takes the tile of the narrowest chain that covers it, so a few stand for all.
CHAINS = {
    "mlp_fwd": [(width,) * (layers + 1) for width in (16, 32, 64, 128) for layers in (2, 4, 8)],
    "mlp_bwd": [
        *((16,) * (layers + 1) for layers in (1, 2, 4, 8)),
        *((32,) * (layers + 1) for layers in (1, 2, 4)),
        (64, 16),
        (64, 64),
        (64, 64, 64),
        (64, 64, 16, 16),
        (128, 16),
        (64, 128),
        (128, 64),
        (128, 128),
    ],
}

# fp32 products on the FMA units unroll fully; beyond this many multiply-adds per thread and layer ptxas gives up.
MOST_FMA = 1100


def candidates(op: str, kind: str, chain: tuple[int, ...]) -> list[MlpTile]:
    widest = max(chain)
    largest = max(k * n for k, n in itertools.pairwise(chain))
    warps = {16: (1, 2, 4), 32: (1, 2, 4, 8), 64: (4, 8), 128: (4, 8)}[widest]
    tiles = []
    for num_warps, block_m, num_stages, resident in itertools.product(
        warps, (16, 32, 64, 128), (1, 2), (True, False) if op == "mlp_fwd" and widest >= 64 else (True,)
    ):
        per_warp = block_m / num_warps
        if kind == "ieee" and block_m * largest > MOST_FMA * 32 * num_warps:
            continue
        # Below 16 rows per warp the tensor cores repeat work, above 64 the registers are gone.
        if kind != "ieee" and widest <= 32 and not 16 <= per_warp <= 64:
            continue
        if widest >= 64 and (per_warp > 32 or (kind != "ieee" and block_m < 32)):
            continue
        # Weights loaded in the loop would be multi-buffered in shared memory.
        if not resident and num_stages > 1:
            continue
        tiles.append(MlpTile(block_m, num_warps, num_stages, resident))
    return tiles


def launches(op: str, kind: str, chain: tuple[int, ...], tile: MlpTile, variant: str):
    """The launches of one segment. Variants: "plain", "ragged", "head"."""
    dtype, precision = KINDS[kind]
    rows = 65536 if variant == "plain" else 65531
    # tanh has the longest code, forward and backward.
    act = "sigmoid" if variant == "head" else "tanh"
    widths = chain if variant != "ragged" else tuple(width - 3 for width in chain)

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = tuple(empty(n, k) for k, n in itertools.pairwise(widths))
    biases = tuple(empty(n) for n in widths[1:])
    layers = len(weights)
    plan = MlpPlan("fused", "", (MlpSegment(0, layers, tile, 2),), precision)
    x, y = empty(rows, widths[0]), empty(rows, widths[-1])
    pos_weight = empty(widths[-1])
    if op == "mlp_fwd":
        # A training step stores an activation in between.
        save = (layers // 2,) if layers > 1 else ()
        if variant == "head":
            arguments = (x, weights, biases, act, y, pos_weight, "mean", dtype, plan, save)
            return aot.launches(mlp.mlp_bce_fwd, *arguments)[:1]
        return aot.launches(mlp.mlp_fwd, x, weights, biases, act, act, plan, save)
    wanted = (True, (True,) * layers, (True,) * layers)
    if variant == "head":
        arguments = (empty(), x, (), weights, biases, act, y, pos_weight, "mean", wanted, plan)
        return aot.launches(mlp.mlp_bce_bwd, *arguments)[:1]
    return aot.launches(mlp.mlp_bwd, y, x, (), weights, biases, act, act, wanted, plan)[:1]


def clean(arch: int, op: str, kind: str, chain: tuple[int, ...], tile: MlpTile, variant: str) -> aot.Resources | None:
    try:
        resources = aot.compile_for(arch, launches(op, kind, chain, tile, variant)[0])
    except Exception as error:  # a tile that the compiler refuses is not a candidate
        print(f"{arch} {op} {kind} {chain} {tile}: {type(error).__name__}", file=sys.stderr)
        return None
    return None if resources.stack or resources.shared > aot.SHARED_LIMIT[arch] else resources


def cycles_per_row(arch: int, tile: MlpTile, resources: aot.Resources) -> float:
    """Estimated cycles of a streaming multiprocessor per row, whichever of three limits is the tightest."""
    cost = aot.loop_cost(resources)
    assert cost is not None
    warps = tile.num_warps
    issue = cost.instructions * warps / 4
    special = cost.special * warps * 32 / 16
    # Memory answers after some 600 cycles; with a second stage most of that passes during the trip before.
    wait = 600 if tile.num_stages == 1 else 300
    latency = (cost.cycles + wait) / resources.programs_per_sm(arch)
    return max(issue, special, latency) / tile.block_m


def pick(task) -> list[list]:
    """[block_m, num_warps, num_stages, resident, programs per SM, cycles per row] of the best clean tiles."""
    arch, op, kind, chain, rows = task
    if rows is not None:
        ranked = [(row[5], MlpTile(*row[:3], bool(row[3])), row[4]) for row in rows]
    else:
        ranked = []
        for tile in candidates(op, kind, chain):
            if resources := clean(arch, op, kind, chain, tile, "plain"):
                ranked.append((cycles_per_row(arch, tile, resources), tile, resources.programs_per_sm(arch)))
        ranked.sort(key=lambda entry: entry[0])
    kept = []
    for cycles, tile, per_sm in ranked:
        results = [clean(arch, op, kind, chain, tile, variant) for variant in ("ragged", "head", "plain")]
        if all(results):
            fits = min(per_sm, *(resources.programs_per_sm(arch) for resources in results if resources))
            kept.append([tile.block_m, tile.num_warps, tile.num_stages, int(tile.resident), fits, round(cycles, 1)])
        if len(kept) == (KEEP if rows is None else 1):
            break
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=TABLES / "mlp_tiles.json")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--only", default="", help="tune what this is part of, as in sm_90/mlp_bwd/half; keep the rest")
    options = parser.parse_args()
    old = json.loads(options.out.read_text()) if options.out.exists() else {"tiles": {}, "triton": []}
    tiles: dict = {}
    tasks = []
    for arch, op, kind in itertools.product(ARCHS, CHAINS, KINDS):
        cell = old["tiles"].get(f"sm_{arch}", {}).get(op, {}).get(kind, {})
        names = tiles.setdefault(f"sm_{arch}", {}).setdefault(op, {}).setdefault(kind, {})
        for chain in CHAINS[op]:
            name = "-".join(map(str, chain))
            rows = cell.get(name)
            if options.only not in f"sm_{arch}/{op}/{kind}/{name}":
                names.update({name: rows} if rows else {})
            elif rows or not options.resume:
                tasks.append((arch, op, kind, chain, rows if options.resume else None))
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for done, (task, rows) in enumerate(zip(tasks, pool.imap(pick, tasks), strict=True), 1):
            arch, op, kind, chain, _ = task
            if rows:
                tiles[f"sm_{arch}"][op][kind]["-".join(map(str, chain))] = rows
            print(f"{done}/{len(tasks)} sm_{arch} {op} {kind} {chain} -> {rows}", file=sys.stderr, flush=True)
    table = {
        "about": "padded widths: [block_m, num_warps, num_stages, weights resident, programs per SM, estimated cycles "
        "per row] of the clean tiles, best first; written by benches/tune_mlp_tiles.py",
        "triton": sorted({triton.__version__, *(old["triton"] if options.resume else [])}),
        "tiles": tiles,
    }
    with tempfile.NamedTemporaryFile("w", dir=options.out.parent, delete=False) as file:
        file.write(compact(table) + "\n")
    os.replace(file.name, options.out)


def compact(table: dict) -> str:
    """JSON with one line per list."""

    def lines(value, indent):
        if not isinstance(value, dict) or not value:
            return json.dumps(value)
        inner = ",\n".join(f"{' ' * (indent + 1)}{json.dumps(key)}: {lines(v, indent + 1)}" for key, v in value.items())
        return "{\n" + inner + "\n" + " " * indent + "}"

    return lines(table, 0)


if __name__ == "__main__":
    main()
