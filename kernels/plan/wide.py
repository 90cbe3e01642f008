# SPDX-License-Identifier: Apache-2.0
"""Products of wide layers, whose tiles travel by TMA: measured tiles where there are some, likely ones elsewhere."""

import fnmatch
import functools
import math
from collections.abc import Container

from ..records import SPLITS, Device, Plan, Tile, WideTile
from ..tables import WIDE_TILES, read_table, tile_rows, wide_key
from .chips import cdiv, device_refusal, itemsize, product_kind, wide_generation

# Up to this many in_features a layer is bound by memory, and writing y once beats a library GEMM followed by a
# pass over its output. Derived from peak rates, 2 K flops against 2 passes saved per output; not yet measured.
TILED_MAX_K = {"half": 256, "tf32": 128, "ieee": 32}

# A measured shape speaks for others whose every size is at most this many times larger or smaller.
WIDE_REACH = 2.0

# Without a measurement the largest tile is taken that computes at most this many times more beyond the edges and in
# idle multiprocessors than the best: it reads least per product. An estimate.
WIDE_WASTE = 1.15


def wave_waste(m: int, n: int, tile: Tile, units: int, splits: int = 1) -> float:
    """Outputs that whole waves of whole tiles compute, for each output that is wanted."""
    waves = cdiv(cdiv(m, tile.block_m) * cdiv(n, tile.block_n) * splits, units)
    return waves * units * tile.block_m * tile.block_n / (splits * m * n)


# Parts into which a sum is cut must be this long, or writing and reading them costs more than what idle
# multiprocessors would have saved. An estimate.
SPLIT_MIN_K = 1024


def wide_fwd(m: int, k: int, n: int, dtype: str, precision: str, device: Device, impl: str | None) -> Plan | None:
    """The plan for a forward product by the TMA kernel, or None where it cannot run or nobody asked for it."""
    kind = product_kind(dtype, precision)
    asked = (impl == "triton" or kind in SPLITS) and k > TILED_MAX_K["ieee" if kind in SPLITS else kind]
    # TMA writes only rows that start at multiples of 16 bytes.
    if n * itemsize(dtype) % 16:
        return None
    return _wide_product(m, k, n, kind, precision, device, impl, asked, ", bias and activation in the epilogue")


@functools.lru_cache(maxsize=4096)
def linear_act_dgrad(
    m: int,
    k: int,
    n: int,
    dtype: str,
    precision: str,
    device: Device,
    impl: str | None = None,
    split: str | None = None,
) -> Plan | None:
    """The plan for (dz @ weight) * act'(h) with dz (m, k), weight (k, n) and h (m, n); None: no such kernel here.

    split: as for `linear_act_fwd`.
    """
    if device_refusal(m, k, n, dtype, device) or any(size * itemsize(dtype) % 16 for size in (k, n)):
        return None
    precision = split or precision
    kind = product_kind(dtype, precision)
    # For fp32 the weight is copied, transposed. Unmeasured, that is done where a pass over dz would move more.
    asked = impl == "triton" or (kind in SPLITS and m >= k)
    epilogue = ", the derivative of the layer below in the epilogue"
    return _wide_product(m, k, n, f"dgrad-{kind}", precision, device, impl, asked, epilogue)


def linear_act_wgrad(m: int, k: int, n: int, precision: str, device: Device, impl: str | None = None) -> Plan | None:
    """The plan for dz.T @ h in fp32, with dz (k, m) and h (k, n), as a split product; None: torch's own is as good."""
    kind = product_kind("float32", precision)
    if kind not in SPLITS or m % 4 or n % 4:
        return None
    return _wide_product(m, k, n, f"wgrad-{kind}", precision, device, impl, True)


def _wide_product(
    m: int, k: int, n: int, kind: str, precision: str, device: Device, impl: str | None, asked: bool, epilogue: str = ""
) -> Plan | None:
    """The plan for a product that travels by TMA, or None. asked: it may run where nobody has timed it."""
    tiles = wide_candidates(kind, device.arch)
    tile, splits, reason = _measured_tile(m, k, n, kind, tiles, device)
    # Where products on the FMA units spill there are no tiles, and other chips have none.
    if tile is None and tiles and asked and (impl == "triton" or not reason):
        cuts = [1 if kind.startswith("dgrad") else wide_splits(m, k, n, own, device.units) for own in tiles]
        waste = [wave_waste(m, n, own, device.units, cut) for own, cut in zip(tiles, cuts, strict=True)]
        likely = zip(tiles, cuts, waste, strict=True)
        tile, splits = next((own, cut) for own, cut, wasted in likely if wasted <= WIDE_WASTE * min(waste))
        cut = f", {splits} programs to a tile" if splits > 1 else ""
        reason = f"tiles travel by TMA{cut}{epilogue}; not measured on this device"
    if tile is None:
        return None
    programs = min(cdiv(m, tile.block_m) * cdiv(n, tile.block_n) * splits, device.units * tiles[tile])
    return Plan("tma", reason, tile, programs, precision, splits=splits)


def wide_splits(m: int, k: int, n: int, tile: Tile, units: int) -> int:
    """Parts, a power of 2, into which few tiles' sums over a long k are cut so that they keep a chip busy."""
    if tile.block_m * tile.block_n > 128 * 128:
        return 1  # such tiles leave no shared memory for parts in fp32
    count = cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    splits = 1
    while 2 * splits * count <= units and k >= 2 * splits * SPLIT_MIN_K and splits < 16:
        splits *= 2
    return splits


def wide_candidates(kind: str, arch: int) -> dict[WideTile, int]:
    """Tiles of the TMA kernels that compile clean for this chip, and how many programs of each fit on an SM.

    Largest first; of one size, the preferred one first. kind: of product, after "dgrad-" or "wgrad-" for the gradient
    of a layer's input or weight.
    """
    rows = tile_rows(WIDE_TILES, wide_generation(arch), *wide_key(kind))
    return {row.wide_tile: row.programs_per_sm for row in rows}


def _measured_tile(
    m: int, k: int, n: int, kind: str, tiles: Container[WideTile], device: Device
) -> tuple[WideTile | None, int, str]:
    """(tile, splits, reason) of the nearest shape measured on this device, no tile for the library; no reason if none.

    A pattern may match a chip of another generation, for which its tiles were not compiled: only `tiles` count.
    """
    names = (device.name, wide_generation(device.arch))
    for pattern, measured in read_table(WIDE_TILES)["devices"].items():
        if any(name and fnmatch.fnmatchcase(name, pattern) for name in names):
            rows = [row for row in measured["rows"].get(kind, ()) if row.tile is None or row.tile in tiles]
            far = [[abs(math.log2(a / b)) for a, b in zip((m, k, n), row.shape, strict=True)] for row in rows]
            near = [(sum(f), i) for i, f in enumerate(far) if max(f) <= math.log2(WIDE_REACH)]
            if near:
                row = rows[min(near)[1]]
                shape = "x".join(map(str, row.shape))
                ratio = row.library_us / row.us
                reason = f"measured at {shape} on {pattern}: {ratio:.2f}x the library and a pass"
                return row.tile, row.splits, reason
    return None, 1, ""
