# SPDX-License-Identifier: Apache-2.0
"""Picks the tiles of the whole-network kernels, for kernels/tuned/mlp_tiles.json.

For each chip, op, kind of product and chain of padded widths, a tile has to be clean in every variant that a plan may
launch: exact and ragged widths, both heads. Chains without such a tile are left out, and plans cut networks into
shorter segments.
"""

import functools
import itertools
from collections.abc import Iterator

import torch

from perceptriton.kernels.gpu import aot, network
from perceptriton.kernels.plan.chips import LAYER_CHIPS
from perceptriton.kernels.records import MlpPlan, MlpSegment
from perceptriton.kernels.tables import LAYOUTS, MLP_TILES, TileRow

from . import common


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
# What has to compile clean for a layout: (what the input lacks of its padded width, the widths in between, the output,
# loss), each without a loss for both activations that have long code. Which of two is harder on the register allocator
# nobody can tell: of 16 wide networks the last variant of "both" is 2-10-10-10-1.
VARIANTS = {
    "exact": ((0, 0, 0, False), (0, 3, 0, False)),
    "in": ((3, 3, 0, False),),
    "out": ((0, 3, 3, False), (0, 3, 3, True), (0, 0, 11, False)),
    "both": ((3, 3, 3, False), (3, 3, 3, True), (0, 0, 0, False), (14, 6, 15, False)),
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
    ("bwd", "tf32", 16): ((32, 1), (16, 1), (32, 2), (64, 4), (32, 4), (32, 8)),
    ("bwd", "tf32", 32): ((32, 2), (64, 4), (16, 1), (16, 2), (32, 4), (16, 4)),
    ("bwd", "tf32", 64): ((64, 4), (32, 4), (16, 4), (32, 8), (16, 8)),
    ("bwd", "tf32", 128): ((32, 8), (16, 8)),
    ("bwd", "ieee", 16): ((64, 4), (16, 1), (32, 4), (16, 4)),
    ("bwd", "ieee", 32): ((32, 4), (16, 4), (16, 2), (16, 8)),
    ("bwd", "ieee", 64): ((32, 8), (16, 8), (16, 4)),
    ("bwd", "ieee", 128): (),
}


def cells() -> Iterator[list[TileRow]]:
    for chip, op, product in itertools.product(LAYER_CHIPS[::-1], ("mlp_infer", "mlp_fwd", "mlp_bwd"), common.PRODUCTS):
        for layout in LAYOUTS[op]:
            for chain in CHAINS[op, layout]:
                tiles = candidates(op, product, max(chain))
                yield [TileRow(chip, op, product, layout, chain, *tile, 1, resident) for *tile, resident in tiles]


def candidates(op: str, product: str, width: int) -> list[tuple[int, int, int, bool]]:
    """(block_m, num_warps, num_stages, weights resident), the preferred first."""
    # A second stage loads the next rows during the products of these; the backward kernel has no register for it.
    stages = (1, 2) if op == "mlp_bwd" else (2, 1)
    preferred = PREFERENCES["bwd" if op == "mlp_bwd" else "fwd", product, width]
    tiles = [(*sizes, num_stages, True) for sizes in preferred for num_stages in stages]
    if op == "mlp_infer":
        # Four weights of 128 x 128 leave room for one program; loaded in the loop, where more stages would multiply
        # them in shared memory, for two. But wgmma, which 32 rows are too few for, counts for more.
        loaded = [(*sizes, 1, False) for *sizes, num_stages, _ in tiles if num_stages == 1]
        tiles = sorted(loaded + tiles, key=lambda tile: tile[0] < 64)
    return tiles


def launches(row: TileRow) -> Iterator[aot.Launch]:
    for variant, act in itertools.product(VARIANTS[row.layout], (*ACTIVATIONS, UNBOUNDED)):
        if act == UNBOUNDED and row.op == "mlp_bwd":
            continue
        if (variant[-1] and act != "sigmoid") or (variant[1] and len(row.widths) == 2 and not any(variant[::2])):
            continue  # the loss belongs to the sigmoid; a single layer has no widths in between
        yield launch(row, act, variant)


def launch(row: TileRow, act: str, variant: tuple[int, int, int, bool]) -> aot.Launch:
    """The kernel of one segment, which is a whole network here."""
    ragged_in, ragged_inner, ragged_out, loss = variant
    dtype, precision = common.PRODUCTS[row.product]
    op, chain = row.op, row.widths
    widths = (chain[0] - ragged_in, *(width - ragged_inner for width in chain[1:-1]), chain[-1] - ragged_out)
    rows = 65531 if ragged_in or ragged_out else 65536
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    weights = tuple(empty(n, k) for k, n in itertools.pairwise(widths))
    biases = tuple(empty(n) for n in widths[1:])
    layers = len(weights)
    plan = MlpPlan("fused", "", (MlpSegment(0, layers, row.network_tile, 2),), precision)
    x, y, pos_weight = empty(rows, widths[0]), empty(rows, widths[-1]), empty(widths[-1])
    wanted = (True, (True,) * layers, (True,) * layers)
    save = tuple(range(1, layers)) if op == "mlp_fwd" else ()
    if op == "mlp_bwd":
        dy, output, head = (empty(()), "identity", (y, pos_weight, "mean")) if loss else (y, act, None)
        return aot.launches(network.mlp_bwd, dy, x, (), weights, biases, act, output, wanted, plan, head)[0]
    output, head = ("identity", (y, pos_weight, "mean", dtype)) if loss else (act, None)
    return aot.launches(network.mlp_fwd, x, weights, biases, act, output, plan, save, head)[0]


def clean(resources: aot.Resources) -> bool:
    return resources.stack == 0


def main(arguments: list[str]) -> None:
    common.main(__name__, __doc__ or "", MLP_TILES, cells(), arguments)
