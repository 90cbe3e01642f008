"""Picks, without a GPU, the tiles of the TMA kernels for wide layers: writes the candidates of kernels/tuned/wide.json.

Every tile of TRIED is compiled for its chip as each kind of product that it is tried for: forward with the longest
epilogue; where plans may cut its sums, as a part of one; the gradient of a layer's input with either derivative. It is
a candidate where nothing spills, shared memory suffices and the products run on tensor cores; the table says how many
programs of it fit on an SM. Which candidate a plan takes is then measured on a chip, by benches/tune.py.

A tile must be clean on every triton that the project supports: run once, then with --resume under the other version,
which keeps of the table's candidates those that are clean there too. Measurements in the table stay as they are.

usage: python benches/tune_wide_tiles.py [--resume] [--out FILE] [--processes N]
"""

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from tune import KINDS, write

from perceptriton.kernels import plan as planning
from perceptriton.kernels import tables
from perceptriton.kernels.gpu import aot, wide
from perceptriton.kernels.records import Plan, WideTile
from perceptriton.kernels.tables import TABLES

SHAPE = (8192, 4096, 4096)
# Largest first; of one size, the preferred one first. Columns as in the table: blocks of M, N and K, warps, stages,
# row tiles in a group, pieces of the epilogue, flatten, specialize.
TRIED = {
    (90, "half"): [
        *([128, 256, 64, 8, stages, 8, 2, flatten, 0] for stages in (3, 4) for flatten in (0, 1)),
        *([128, 256, 64, 8, stages, 8, 1, 0, 0] for stages in (3, 4)),
        *([256, 128, 64, 8, stages, 8, 2, 0, 0] for stages in (3, 4)),
        *([128, 128, 64, 8, 4, 8, 1, flatten, 0] for flatten in (0, 1)),
        [128, 128, 64, 8, 5, 8, 2, 0, 0],
        *([128, 128, 64, 4, 4, 8, 2, flatten, 0] for flatten in (0, 1)),
        [128, 128, 128, 8, 3, 8, 2, 0, 0],
        [64, 256, 64, 4, 4, 8, 2, 0, 0],
        *([64, 128, 64, 4, 4, 8, 1, flatten, 0] for flatten in (0, 1)),
        [128, 64, 64, 4, 4, 8, 1, 0, 0],
        [64, 64, 64, 4, 5, 8, 1, 0, 0],
        [64, 64, 128, 4, 4, 8, 1, 0, 0],
    ],
    (90, "fp32"): [
        [128, 256, 32, 8, 3, 8, 2, 0, 0],
        *([128, 128, 32, 8, stages, 8, 2, 0, 0] for stages in (3, 4)),
        [128, 128, 32, 8, 3, 8, 2, 1, 0],
        [128, 64, 32, 8, 4, 8, 1, 0, 0],
        [64, 128, 32, 4, 3, 8, 2, 0, 0],
        [64, 64, 32, 4, 4, 8, 1, 0, 0],
    ],
    (100, "half"): [
        *([128, 256, 64, 8, stages, 8, 2, 0, 0] for stages in (3, 4)),
        [128, 128, 64, 8, 4, 8, 2, 0, 0],
        [128, 64, 64, 8, 4, 8, 1, 0, 0],
        [64, 64, 64, 4, 5, 8, 1, 0, 0],
    ],
    (100, "fp32"): [
        [128, 128, 32, 8, 3, 8, 2, 0, 0],
        [128, 64, 32, 8, 3, 8, 2, 0, 0],
        [64, 64, 32, 4, 3, 8, 2, 0, 0],
        [128, 32, 32, 8, 4, 8, 1, 0, 0],
    ],
}


def launch(kind: str, tile: WideTile, activation: str, splits: int = 1) -> aot.Launch:
    of, product = kind.rpartition("-")[::2]
    dtype, precision = (torch.bfloat16, "ieee") if product == "half" else (torch.float32, product)
    m, k, n = SHAPE
    plan = Plan("tma", "", tile, 132, precision, splits=splits)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if of == "wgrad":
        return aot.launches(wide.linear_act_wgrad, empty(k, m), empty(k, n), plan)[0]
    if of == "dgrad":
        return aot.launches(wide.linear_act_dgrad, empty(m, k), empty(k, n), empty(m, n), activation, True, plan)[0]
    return aot.launches(wide.linear_act_fwd, empty(m, k), empty(n, k), empty(n), activation, plan)[0]


def programs_per_sm(task: tuple[int, str, list[int]]) -> int | None:
    """How many programs of a clean tile fit on an SM, or None."""
    arch, kind, row = task
    tile = tables.wide_tile(row)
    dgrad = kind.startswith("dgrad")
    launches = [(kind, tile, activation) for activation in (("sigmoid", "tanh") if dgrad else ("tanh",))]
    if not dgrad and planning.wide_splits(1, 1 << 20, 1, tile, 132) > 1:
        launches.append((kind, tile, "identity", 2))
    found = []
    for arguments in launches:
        try:
            resources = aot.compile_for(arch, launch(*arguments))
        except Exception as error:  # a tile that the compiler refuses is not a candidate
            print(f"{task}: {type(error).__name__}", file=sys.stderr)
            return None
        # Some that the compiler cannot place come out as kernels which compute nothing, without a word.
        products = resources.products and not resources.opcodes["HMMA"]
        if resources.spills or not products or resources.shared > aot.SHARED_LIMIT[arch]:
            return None
        found.append(resources.programs_per_sm(arch))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=TABLES / "wide.json")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    document = json.loads((options.out if options.out.exists() else TABLES / "wide.json").read_text())
    old = {
        (int(generation.removeprefix("sm_")), kind, tuple(row[:9])): row[9]
        for generation, kinds in document["candidates"].items()
        for kind, rows in kinds.items()
        for row in rows
    }
    tasks = [
        (arch, kind, row)
        for (arch, size), rows in TRIED.items()
        for kind in KINDS
        if kind.endswith("half") == (size == "half")
        for row in rows
        if not options.resume or (arch, kind, tuple(row)) in old
    ]
    candidates: dict[str, dict[str, list]] = {}
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for done, (task, count) in enumerate(zip(tasks, pool.map(programs_per_sm, tasks), strict=True), 1):
            arch, kind, row = task
            if count is not None:
                if options.resume:
                    count = min(count, old[arch, kind, tuple(row)])
                candidates.setdefault(f"sm_{arch}", {}).setdefault(kind, []).append([*row, count])
            print(f"{done}/{len(tasks)} sm_{arch} {kind} {row} -> {count}", file=sys.stderr)
    versions = {triton.__version__, *(document["triton"] if options.resume else [])}
    document |= {"triton": sorted(versions), "candidates": candidates}
    write(options.out, document)


if __name__ == "__main__":
    main()
