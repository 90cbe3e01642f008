# SPDX-License-Identifier: Apache-2.0
"""One layer: whole weight on chip, tiles of the output, or the library."""

import functools

from ..records import Device, Plan, Tile
from ..tables import LAYER_TILES, tile_rows
from .chips import cdiv, device_refusal, generation, next_power_of_2, product_kind
from .cpu import cpu_bwd, cpu_fwd
from .wide import TILED_MAX_K, wide_fwd

# Output tiles of the general kernel by kind of product, and those of a chip of their own: largest first.
# The first whose tile count fills the chip is taken.
TILED = {
    "half": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4)),
    "half on sm_90": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    "ieee": (Tile(64, 64, 16, 8, 2), Tile(32, 32, 16, 4, 2)),
}

# fp32 products on the FMA units make the one-kernel backward compute-bound beyond this width.
IEEE_BACKWARD_MAX = 64 * 64

# Of the pass that computes dz. While all programs wait for dy and y, 64 KB (16-bit) or 128 KB (fp32) are on their way
# to each multiprocessor; 4.8 TB/s over 132 of them and 700 ns of latency ask for 25 KB.
PASS_TILE, PASS_PROGRAMS_PER_SM = Tile(32, 128, 0, 4, 1), 4


@functools.lru_cache(maxsize=4096)
def linear_act_fwd(
    m: int,
    k: int,
    n: int,
    dtype: str,
    precision: str,
    device: Device,
    impl: str | None = None,
    split: str | None = None,
    readable: bool = True,
) -> Plan:
    """The plan for act(x @ weight.T + bias) with x (m, k) and weight (n, k).

    split: the one of SPLITS that fp32 products of wide layers may use, or None. readable: TMA can read x and weight as
    they lie in memory.
    """
    if reason := device_refusal(m, k, n, dtype, device):
        return Plan("aten", reason)
    if device.kind == "cpu" and not device.triton:
        return cpu_fwd(m, k, n, dtype, device)
    if impl == "torch":
        return Plan("library", 'impl="torch": library GEMM, activation in place')
    kind = product_kind(dtype, precision)
    if found := _rows_tile("linear_act_fwd", k, n, kind, device.arch):
        tile, per_sm = found
        programs = min(cdiv(m, tile.block_m), device.units * per_sm)
        return Plan("rows", f"{k}x{n} weight stays on chip; x is read once, y written once", tile, programs, precision)
    if readable and (plan := wide_fwd(m, k, n, dtype, split or precision, device, impl)):
        return plan
    if impl is None and k > TILED_MAX_K[kind]:
        return Plan("library", f"{k} in_features: bound by arithmetic, where the library GEMM is faster")
    tiles = TILED.get(f"{kind} on {generation(device.arch)}", TILED[kind])
    counts = [cdiv(m, t.block_m) * cdiv(n, t.block_n) for t in tiles]
    pick = next((i for i, count in enumerate(counts) if count >= device.units), len(tiles) - 1)
    reason = "bias and activation in the epilogue of the product"
    return Plan("tiled", reason, tiles[pick], counts[pick], precision)


@functools.lru_cache(maxsize=4096)
def linear_act_bwd(m: int, k: int, n: int, dtype: str, precision: str, device: Device, impl: str | None = None) -> Plan:
    """The plan for (dx, dweight, dbias) of the same layer from dy, y, x and weight."""
    if reason := device_refusal(m, k, n, dtype, device):
        return Plan("aten", reason)
    if device.kind == "cpu" and not device.triton:
        return cpu_bwd(m, k, n, dtype, device)
    if impl == "torch":
        return Plan("library", 'impl="torch": activation gradient, then library GEMMs')
    kind = product_kind(dtype, precision)
    found = _rows_tile("linear_act_bwd", k, n, kind, device.arch)
    if found and not (kind == "ieee" and k * n > IEEE_BACKWARD_MAX):
        tile, per_sm = found
        tiles = cdiv(m, tile.block_m)
        # A few row tiles are walked by one program, which writes the gradients itself: one launch, no reduction.
        # Beyond that a second program per SM must earn its slot: eight tiles of reading for one slot of writing.
        programs = 1 if tiles <= 4 else min(tiles, device.units * per_sm, max(device.units, tiles // 8))
        return Plan("rows", "dx, dweight and dbias from one read of dy, y and x", tile, programs, precision)
    reason = f"{k}x{n}: no register tile for dweight; dz and dbias in one pass, then library GEMMs"
    # dbias takes a slot per program and column block, which the chip bounds: 1M x 256 bf16 on an H200 has 264 of them,
    # summed by one launch in 5 rounds of 0.8 us (a model), where the pass itself takes 336 us.
    columns = cdiv(n, PASS_TILE.block_n)
    walkers = min(cdiv(m, PASS_TILE.block_m), max(1, device.units * PASS_PROGRAMS_PER_SM // columns))
    return Plan("passes", reason, PASS_TILE, walkers * columns, precision)


def _rows_tile(op: str, k: int, n: int, kind: str, arch: int) -> tuple[Tile, int] | None:
    """The clean tile of a one-tile-wide kernel and how many programs fit on an SM, or None."""
    block_k, block_n = max(next_power_of_2(k), 16), max(next_power_of_2(n), 16)
    # Widths that are no multiple of 16 are loaded element by element, which takes registers from the tile.
    layout = "ragged" if k % 16 or n % 16 else "aligned"
    rows = tile_rows(LAYER_TILES, generation(arch), op, kind, layout)
    return next(((row.layer_tile, row.programs_per_sm) for row in rows if row.widths == (block_k, block_n)), None)
