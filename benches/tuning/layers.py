# SPDX-License-Identifier: Apache-2.0
"""Picks the tiles of the kernels that hold a layer's whole weight on chip, for kernels/tuned/gpu_tiles.json.

For each chip, op, kind of product, alignment and padded weight size, candidates go from most rows to fewest: fewer
trips around the loop and larger loads. Widths that are no multiple of 16 ("ragged") are loaded element by element,
which takes more registers, so they have tiles of their own. Plans send sizes without a clean tile elsewhere.
"""

import functools
import itertools
from collections.abc import Iterator

import torch

from perceptriton.kernels.gpu import aot, layer
from perceptriton.kernels.plan.chips import LAYER_CHIPS
from perceptriton.kernels.records import Plan
from perceptriton.kernels.tables import LAYER_TILES, TileRow

from . import common

WIDTHS = (16, 32, 64, 128, 256)
# Elements of the padded weight beyond which no tile was ever clean.
LARGEST = {"half": 128 * 256, "tf32": 128 * 128, "ieee": 128 * 128}
OPS = ("linear_act_fwd", "linear_act_bwd")
ROWS = (128, 64, 32, 16)


def cells() -> Iterator[list[TileRow]]:
    for chip, op, product, layout in itertools.product(LAYER_CHIPS, OPS, common.PRODUCTS, ("aligned", "ragged")):
        for block_k, block_n in itertools.product(WIDTHS, WIDTHS):
            if block_k * block_n <= LARGEST[product]:
                tiles = candidates(op, product, block_k, block_n)
                yield [TileRow(chip, op, product, layout, (block_k, block_n), *tile, 1) for tile in tiles]


def candidates(op: str, product: str, block_k: int, block_n: int) -> Iterator[tuple[int, int, int]]:
    """(block_m, num_warps, num_stages), the preferred first."""
    # A backward pass waits for more between two loads: two warps to each scheduler, or one of two programs.
    wide = max(block_k, block_n) >= (64 if op == "linear_act_bwd" else 128)
    # fp32 dots on the FMA units unroll fully: more rows than 32 only lengthen the code.
    rows = [r for r in ROWS if not (product == "ieee" and r > 32)]
    for block_m, num_warps in itertools.product(rows, (8, 4) if wide else (4, 8)):
        # What a thread must hold at least: its share of the sums and of the row tiles. Beyond 160 nothing was clean.
        held = block_m * (block_k + 2 * block_n) + (block_k * block_n if op == "linear_act_bwd" else 0)
        if held <= 160 * 32 * num_warps:
            yield from ((block_m, num_warps, num_stages) for num_stages in (2, 1))


def launches(row: TileRow) -> list[aot.Launch]:
    dtype, precision = common.PRODUCTS[row.product]
    plan = Plan("rows", "", row.layer_tile, programs=2, precision=precision)
    block_k, block_n = row.widths
    m, k, n = (4096, block_k, block_n) if row.layout == "aligned" else (4099, block_k - 3, block_n - 1)
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    if row.op == "linear_act_fwd":
        # tanh has the longest epilogue
        return aot.launches(layer.linear_act_fwd, empty(m, k), empty(n, k), empty(n), "tanh", plan)[:1]
    tensors = (empty(m, n), empty(m, n), empty(m, k), empty(n, k))
    return aot.launches(layer.linear_act_bwd, *tensors, "sigmoid", (True, True, True), plan)[:1]


def clean(resources: aot.Resources) -> bool:
    return resources.stack == 0


def main(arguments: list[str]) -> None:
    common.main(__name__, __doc__ or "", LAYER_TILES, cells(), arguments)
