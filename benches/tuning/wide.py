# SPDX-License-Identifier: Apache-2.0
"""Picks the candidates among the tiles of the TMA kernels for wide layers, for kernels/tuned/wide.json.

Every tile of TRIED is compiled for its chip as each kind of product that it is tried for: forward with the longest
epilogue; where plans may cut its sums, as a part of one; the gradient of a layer's input with either derivative. It is
a candidate where all of that is clean, and the products run on tensor cores. Which candidate a plan takes is then
measured on a chip, by `tune.py measure`; measurements in the table stay as they are.
"""

import functools
from collections.abc import Iterator

import torch

from perceptriton.kernels import plan as planning
from perceptriton.kernels import tables
from perceptriton.kernels.gpu import aot, wide
from perceptriton.kernels.records import Plan
from perceptriton.kernels.tables import TileRow

from . import common
from .measured import KINDS

SHAPE = (8192, 4096, 4096)
# Largest first; of one size, the preferred one first: blocks of M, N and K, warps, stages, pieces of the epilogue,
# flatten.
TRIED = {
    (90, "half"): [
        *([128, 256, 64, 8, stages, 2, flatten] for stages in (3, 4) for flatten in (0, 1)),
        *([128, 256, 64, 8, stages, 1, 0] for stages in (3, 4)),
        *([256, 128, 64, 8, stages, 2, 0] for stages in (3, 4)),
        *([128, 128, 64, 8, 4, 1, flatten] for flatten in (0, 1)),
        [128, 128, 64, 8, 5, 2, 0],
        *([128, 128, 64, 4, 4, 2, flatten] for flatten in (0, 1)),
        [128, 128, 128, 8, 3, 2, 0],
        [64, 256, 64, 4, 4, 2, 0],
        *([64, 128, 64, 4, 4, 1, flatten] for flatten in (0, 1)),
        [128, 64, 64, 4, 4, 1, 0],
        [64, 64, 64, 4, 5, 1, 0],
        [64, 64, 128, 4, 4, 1, 0],
    ],
    (90, "fp32"): [
        [128, 256, 32, 8, 3, 2, 0],
        *([128, 128, 32, 8, stages, 2, 0] for stages in (3, 4)),
        [128, 128, 32, 8, 3, 2, 1],
        [128, 64, 32, 8, 4, 1, 0],
        [64, 128, 32, 4, 3, 2, 0],
        [64, 64, 32, 4, 4, 1, 0],
    ],
    (100, "half"): [
        *([128, 256, 64, 8, stages, 2, 0] for stages in (3, 4)),
        [128, 128, 64, 8, 4, 2, 0],
        [128, 64, 64, 8, 4, 1, 0],
        [64, 64, 64, 4, 5, 1, 0],
    ],
    (100, "fp32"): [
        [128, 128, 32, 8, 3, 2, 0],
        [128, 64, 32, 8, 3, 2, 0],
        [64, 64, 32, 4, 3, 2, 0],
        [128, 32, 32, 8, 4, 1, 0],
    ],
}


def cells() -> Iterator[list[TileRow]]:
    for (arch, size), tiles in TRIED.items():
        for kind in KINDS:
            if kind.endswith("half") == (size == "half"):
                for m, n, k, num_warps, num_stages, subtiles, flatten in tiles:
                    sizes = ((k, n), m, num_warps, num_stages, 1)
                    own = {"subtiles": subtiles, "flatten": bool(flatten)}
                    yield [TileRow(f"sm_{arch}", *tables.wide_key(kind), *sizes, **own)]


def launches(row: TileRow) -> Iterator[aot.Launch]:
    dgrad = row.op == "linear_act_dgrad"
    for activation in ("sigmoid", "tanh") if dgrad else ("tanh",):
        yield launch(row, activation)
    if not dgrad and planning.wide_splits(1, 1 << 20, 1, row.wide_tile, 132) > 1:
        yield launch(row, "identity", 2)


def launch(row: TileRow, activation: str, splits: int = 1) -> aot.Launch:
    dtype, precision = common.PRODUCTS.get(row.product, (torch.float32, row.product))
    m, k, n = SHAPE
    plan = Plan("tma", "", row.wide_tile, 132, precision, splits=splits)
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    if row.op == "linear_act_wgrad":
        return aot.launches(wide.linear_act_wgrad, empty(k, m), empty(k, n), plan)[0]
    if row.op == "linear_act_dgrad":
        return aot.launches(wide.linear_act_dgrad, empty(m, k), empty(k, n), empty(m, n), activation, True, plan)[0]
    return aot.launches(wide.linear_act_fwd, empty(m, k), empty(n, k), empty(n), activation, plan)[0]


def clean(resources: aot.Resources) -> bool:
    # Some tiles that the compiler cannot place come out as kernels which compute nothing, without a word.
    return not resources.spills and bool(resources.products) and not resources.opcodes["HMMA"]


def main(arguments: list[str]) -> None:
    common.main(__name__, __doc__ or "", tables.WIDE_TILES, cells(), arguments)
