"""Picks, without a GPU, the tiles of the whole-network kernels: writes kernels/tuned/mlp_tiles.json.

For each chip generation, op, kind of product and chain of padded widths, candidates are compiled in order of preference
until one needs no stack and fits in shared memory in every variant that a plan may launch: exact and ragged widths,
both heads. Chains without such a tile are left out, and plan.py cuts networks into shorter segments.

A tile must be clean on every triton that the project supports. With --resume the search for a chain starts at the tile
that the table has, and chains that it has not stay out: run once, then with --resume under the other version.

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

from perceptriton.kernels.gpu import aot, network
from perceptriton.kernels.records import MlpPlan, MlpSegment, MlpTile
from perceptriton.kernels.tables import TABLES

KINDS = {"half": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "ieee": (torch.float32, "ieee")}
ARCHS = (80, 90)


def _uniform(width: int, *depths: int):
    return [(width,) * (layers + 1) for layers in depths]


# A network takes the tile of the first chain in the list that is as wide everywhere, so a few stand for all: lightest
# first. Layouts: which of its two ends a segment shares with a network whose rows cannot be read in pieces of 16 bytes,
# or that ends in a loss. "mlp_infer" stores nothing but the output and falls back on the tiles of "mlp_fwd", which are
# clean with every activation stored.
CHAINS = {
    ("mlp_infer", "exact"): [*_uniform(128, 4)],
    ("mlp_fwd", "exact"): [*_uniform(16, 8), *_uniform(32, 8), *_uniform(64, 4, 8), *_uniform(128, 2)],
    ("mlp_fwd", "in"): [(32, 128, 128)],
    ("mlp_fwd", "out"): [(128, 128, 16)],
    ("mlp_fwd", "both"): [
        *_uniform(16, 8),
        *_uniform(32, 8),
        (32, 64, 64, 16),
        (32, 64, 64, 64, 64, 16),
        *_uniform(64, 4, 8),
        *_uniform(128, 2),
    ],
    ("mlp_bwd", "exact"): [
        *_uniform(16, 2, 4, 8),
        *_uniform(32, 1, 2, 4),
        *_uniform(64, 1, 2),
        (64, 128),
        (128, 64),
        (128, 128),
    ],
    ("mlp_bwd", "in"): [(32, 64, 64), (32, 128)],
    ("mlp_bwd", "out"): [(64, 16), (64, 64, 16), (128, 16)],
    ("mlp_bwd", "both"): [
        *_uniform(16, 4, 8),
        *_uniform(32, 2, 4),
        (64, 64),
        (64, 64, 16, 16),
        (64, 64, 64),
        (128, 128),
    ],
}
# What has to compile clean for a layout: (input ragged, widths in between ragged, output ragged, loss), each without a
# loss for both activations that have long code. Which of two is harder on the register allocator nobody can tell.
VARIANTS = {
    "exact": ((False, False, False, False), (False, True, False, False)),
    "in": ((True, True, False, False),),
    "out": ((False, True, True, False), (False, True, True, True)),
    "both": ((True, True, True, False), (True, True, True, True), (False, False, False, False)),
}
ACTIVATIONS = ("tanh", "sigmoid")
UNBOUNDED = "relu"  # short, but the forward kernel clears what padded neurons put out

# (block_m, num_warps) in order of preference, by estimated cycles per row: the stalls that the machine code of a trip
# around the loop declares, divided by the programs that fit, against issue slots and special function units. Narrow
# backward kernels wait on shared memory and barriers most of the time; one warp needs no barrier, and more programs
# fit. 8 warps at a width of 64 repeat each other's products.
PREFERENCES = {
    ("fwd", "half", 16): ((128, 4), (64, 4), (64, 2), (32, 1)),
    ("fwd", "half", 32): ((128, 4), (64, 4), (64, 2), (32, 1)),
    ("fwd", "half", 64): ((64, 4), (128, 8), (32, 4), (32, 8)),
    ("fwd", "half", 128): ((64, 4), (128, 8), (32, 4), (64, 8), (32, 8)),
    ("fwd", "tf32", 16): ((64, 4), (128, 4), (64, 2), (32, 2)),
    ("fwd", "tf32", 32): ((64, 4), (64, 2), (32, 2), (32, 1)),
    ("fwd", "tf32", 64): ((64, 4), (32, 4), (32, 8)),
    ("fwd", "tf32", 128): ((64, 8), (32, 4), (32, 8), (16, 8)),
    ("fwd", "ieee", 16): ((64, 4), (32, 4), (16, 1)),
    ("fwd", "ieee", 32): ((64, 4), (32, 4), (16, 2)),
    ("fwd", "ieee", 64): ((32, 8), (16, 4), (16, 8)),
    ("fwd", "ieee", 128): ((16, 8),),
    ("bwd", "half", 16): ((32, 1), (16, 1), (32, 2), (64, 4), (32, 4)),
    ("bwd", "half", 32): ((64, 4), (32, 2), (64, 8), (32, 4), (16, 2), (16, 4)),
    ("bwd", "half", 64): ((64, 4), (32, 4), (32, 8), (16, 4)),
    ("bwd", "half", 128): ((128, 8), (64, 4), (64, 8), (32, 4), (32, 8), (16, 8)),
    ("bwd", "tf32", 16): ((32, 1), (16, 1), (32, 2), (64, 4), (32, 4)),
    ("bwd", "tf32", 32): ((32, 2), (64, 4), (16, 1), (16, 2), (32, 4), (16, 4)),
    ("bwd", "tf32", 64): ((64, 4), (32, 4), (16, 4), (32, 8), (16, 8)),
    ("bwd", "tf32", 128): ((32, 8), (16, 8)),
    ("bwd", "ieee", 16): ((64, 4), (16, 1), (32, 4), (16, 4)),
    ("bwd", "ieee", 32): ((32, 4), (16, 4), (16, 2), (16, 8)),
    ("bwd", "ieee", 64): ((32, 8), (16, 8), (16, 4)),
    ("bwd", "ieee", 128): (),
}


def candidates(op: str, kind: str, chain: tuple[int, ...]) -> list[MlpTile]:
    backward = op == "mlp_bwd"
    tiles: list[MlpTile] = []
    for block_m, num_warps in PREFERENCES["bwd" if backward else "fwd", kind, max(chain)]:
        # A second stage loads the next rows during the products of these; the backward kernel has no register for it.
        tiles += [MlpTile(block_m, num_warps, stages) for stages in ((1, 2) if backward else (2, 1))]
    if op == "mlp_infer":
        # Four weights of 128 x 128 leave room for one program; loaded in the loop, where more stages would multiply
        # them in shared memory, for two. But wgmma, which 32 rows are too few for, counts for more.
        loaded = [MlpTile(tile.block_m, tile.num_warps, 1, False) for tile in tiles if tile.num_stages == 1]
        tiles = sorted(loaded + tiles, key=lambda tile: tile.block_m < 64)
    return tiles


def launch(
    op: str, kind: str, chain: tuple[int, ...], tile: MlpTile, act: str, variant: tuple[bool, bool, bool, bool]
) -> aot.Launch:
    """The kernel of one segment, which is a whole network here."""
    ragged_in, ragged_inner, ragged_out, loss = variant
    dtype, precision = KINDS[kind]
    inner = (width - 3 * ragged_inner for width in chain[1:-1])
    widths = (chain[0] - 3 * ragged_in, *inner, chain[-1] - 3 * ragged_out)
    rows = 65531 if ragged_in or ragged_out else 65536

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = tuple(empty(n, k) for k, n in itertools.pairwise(widths))
    biases = tuple(empty(n) for n in widths[1:])
    layers = len(weights)
    plan = MlpPlan("fused", "", (MlpSegment(0, layers, tile, 2),), precision)
    x, y, pos_weight = empty(rows, widths[0]), empty(rows, widths[-1]), empty(widths[-1])
    wanted = (True, (True,) * layers, (True,) * layers)
    save = tuple(range(1, layers)) if op == "mlp_fwd" else ()
    if op == "mlp_bwd":
        if loss:
            arguments = (empty(), x, (), weights, biases, act, y, pos_weight, "mean", wanted, plan)
            return aot.launches(network.mlp_bce_bwd, *arguments)[0]
        return aot.launches(network.mlp_bwd, y, x, (), weights, biases, act, act, wanted, plan)[0]
    if loss:
        arguments = (x, weights, biases, act, y, pos_weight, "mean", dtype, plan, save)
        return aot.launches(network.mlp_bce_fwd, *arguments)[0]
    return aot.launches(network.mlp_fwd, x, weights, biases, act, act, plan, save)[0]


def pick(task) -> list[int] | None:
    """[block_m, num_warps, num_stages, weights resident, programs per SM] of the first clean candidate, or None."""
    arch, op, kind, layout, chain, start = task
    tiles = candidates(op, kind, chain)
    if start:
        tiles = tiles[[[t.block_m, t.num_warps, t.num_stages, int(t.resident)] for t in tiles].index(start[:4]) :]
    for tile in tiles:
        fits = []
        for variant, act in itertools.product(VARIANTS[layout], (*ACTIVATIONS, UNBOUNDED)):
            if act == UNBOUNDED and op == "mlp_bwd":
                continue
            if (variant[-1] and act != "sigmoid") or (variant[1] and len(chain) == 2 and not any(variant[::2])):
                continue  # the loss belongs to the sigmoid; a single layer has no widths in between
            try:
                resources = aot.compile_for(arch, launch(op, kind, chain, tile, act, variant))
            except Exception as error:  # a tile that the compiler refuses is not a candidate
                print(f"{arch} {op} {kind} {chain} {tile}: {type(error).__name__}", file=sys.stderr)
                break
            if resources.stack or resources.shared > aot.SHARED_LIMIT[arch]:
                print(
                    f"{arch} {op} {kind} {chain} {tile} {variant}: {resources.stack} {resources.shared}",
                    file=sys.stderr,
                )
                break
            fits.append(resources.programs_per_sm(arch))
        else:
            return [tile.block_m, tile.num_warps, tile.num_stages, int(tile.resident), min(fits)]
    return None


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
    for arch, (op, layout), kind in itertools.product(ARCHS, CHAINS, KINDS):
        cell = old["tiles"].get(f"sm_{arch}", {}).get(op, {}).get(kind, {}).get(layout, {})
        kept = tiles.setdefault(f"sm_{arch}", {}).setdefault(op, {}).setdefault(kind, {}).setdefault(layout, {})
        for chain in CHAINS[op, layout]:
            name = "-".join(map(str, chain))
            if options.only not in f"sm_{arch}/{op}/{kind}/{layout}/{name}":
                kept.update({name: cell[name]} if name in cell else {})
            elif name in cell or not options.resume:
                tasks.append((arch, op, kind, layout, chain, cell[name] if options.resume else None))
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for done, (task, row) in enumerate(zip(tasks, pool.imap(pick, tasks), strict=True), 1):
            arch, op, kind, layout, chain, start = task
            if row:
                if start and row[:4] == start[:4]:
                    row[4] = min(row[4], start[4])
                tiles[f"sm_{arch}"][op][kind][layout]["-".join(map(str, chain))] = row
            print(f"{done}/{len(tasks)} {task[:5]} {start or ''} -> {row}", file=sys.stderr, flush=True)
    table = {
        "about": "padded widths: [block_m, num_warps, num_stages, weights resident, programs per SM]; "
        "written by benches/tune_mlp_tiles.py",
        "triton": sorted({triton.__version__, *(old["triton"] if options.resume or options.only else [])}),
        "tiles": tiles,
    }
    with tempfile.NamedTemporaryFile("w", dir=options.out.parent, delete=False) as file:
        file.write(text(table) + "\n")
    os.replace(file.name, options.out)


def text(value, indent: int = 0) -> str:
    """JSON with a row per line: a table to read and to diff."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    pad = " " * (indent + 1)
    rows = ",\n".join(f"{pad}{json.dumps(key)}: {text(item, indent + 1)}" for key, item in value.items())
    return "{\n" + rows + "\n" + " " * indent + "}"


if __name__ == "__main__":
    main()
