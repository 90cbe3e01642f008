"""Which implementation an op takes for given shapes, dtype and device, with which tile, and why.

Pure functions of numbers and names: no torch, no triton, no device is touched. The tables under `tuned/` are
data: `gpu_tiles.json` lists the tiles that compile without register spills for each chip generation
(`benches/tune_tiles.py` writes it), `wide.json` the same for the product that travels by TMA, and which of them beat
the library on devices that were measured (`benches/tune.py` writes that part), `cpu.json` the measured crossovers
between torch's two CPU matrix libraries (`benches/tune_cpu.py` writes it). A table that no plan could use is ignored
with a warning: `read_...` says what it has to hold.
"""

import fnmatch
import functools
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from pathlib import Path

TABLES = Path(__file__).parent / "tuned"

DTYPES = ("float32", "bfloat16", "float16")
EMPTY = "nothing to compute"


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device."""

    kind: str  # "cpu", "cuda", "ROCm", or any other torch device type
    arch: int = 0  # CUDA compute capability, as 10 * major + minor
    units: int = 1  # CUDA streaming multiprocessors
    vendor: str = ""  # CPU: what `ops.cpu_kind` says
    triton: bool = False  # kernels can be launched here
    name: str = ""  # CUDA: as the driver tells it; tables of measurements go by it


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class WideTile(Tile):
    """A tile of the product that travels by TMA."""

    group_m: int = 8  # row tiles that are walked together, column by column
    subtiles: int = 1  # 1 or 2: pieces in which a tile is finished and stored
    flatten: bool = False  # both loops as one, so that loads run ahead into the next tile
    specialize: bool = False  # a warp of its own for the loads


@dataclass(frozen=True)
class Plan:
    """One choice. `impl` names it, `reason` says why, the rest is what that implementation needs.

    On a GPU: "rows" (whole weight on chip, programs walk rows), "tiled" (output tiles, loop over K), "tma" (the same
    for wide layers: tiles travel by TMA, programs walk them), "passes" (one pass for dz and dbias, then library GEMMs),
    "library" (library GEMM, activation in place). On a CPU: "aten" (plain torch under autograd) and "explicit"
    (forward and backward written out in `reference.py`).
    """

    impl: str
    reason: str
    tile: Tile = Tile(0, 0, 0, 0, 0)
    programs: int = 1
    precision: str = "ieee"  # of fp32 products in the kernels: "ieee", "tf32" or one of SPLITS
    forward_gemm: str = "mm"  # "mm" (the BLAS behind torch.mm) or "onednn"
    dx_gemm: str = "mm"
    dweight_gemm: str = "mm"
    split_rows: int = 0  # dweight: each thread takes its own rows where that many come to each; 0: never
    chunk: int = 0  # rows of dz that exist at a time; 0: all of them
    splits: int = 1  # "tma": parts of the sum over in_features that different programs take
    prediction: "Prediction | None" = field(default=None, compare=False)  # `explain` adds it for GPUs

    @property
    def triton(self) -> bool:
        return self.impl in ("rows", "tiled", "tma", "passes")


class NotCompiledError(RuntimeError):
    """A kernel would have had to be compiled while a CUDA graph is captured."""


# Bytes of x and y, per layer, below which a GPU is done before the host has asked for more: without gradients, with
# them. An eager call of ours takes the host 15 to 25 us per layer, and 115 to 270 with its backward pass; torch's own 8
# and 75 to 180 (measured with a driver that does nothing). Its kernels for as many bytes as these take a GPU about as
# long as ours takes the host. Estimates.
LAUNCH_BOUND_BYTES = (32 << 20, 128 << 20)


def launch_note(nbytes: float, backward: bool) -> str:
    """What is to be said beside the reason of a plan for so many bytes, if eager calls do not follow it."""
    if nbytes >= LAUNCH_BOUND_BYTES[True]:
        return ""
    when = " with gradients" if not backward and nbytes >= LAUNCH_BOUND_BYTES[False] else ""
    return f"; eager calls{when} on the default stream take plain torch: launch-bound"


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _generation(arch: int) -> str:
    # Tiles are chosen per chip: one that is clean on sm_90 may spill on sm_80. Chips between or beyond the
    # generations of the table take the next one below.
    return "sm_90" if arch >= 90 else "sm_80"


def _kind(dtype: str, precision: str) -> str:
    return precision if dtype == "float32" else "half"


def _rows_tile(op: str, k: int, n: int, kind: str, arch: int) -> tuple[Tile, int] | None:
    """The clean tile of a one-tile-wide kernel and how many programs fit on an SM, or None."""
    block_k, block_n = max(_next_power_of_2(k), 16), max(_next_power_of_2(n), 16)
    # Widths that are no multiple of 16 are loaded element by element, which takes registers from the tile.
    layout = "ragged" if k % 16 or n % 16 else "aligned"
    row = _table("gpu_tiles.json")["tiles"][_generation(arch)][op][kind][layout].get(f"{block_k}x{block_n}")
    if row is None:
        return None
    block_m, num_warps, num_stages, per_sm = row
    return Tile(block_m, block_n, block_k, num_warps, num_stages), per_sm


# Output tiles of the general kernel, by product kind and chip generation: (block_m, block_n, block_k, warps, stages),
# largest first. The first whose tile count fills the chip is taken.
TILED = {
    ("half", "sm_90"): (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
    ("half", "sm_80"): (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4)),
    ("tf32", "sm_90"): (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    ("tf32", "sm_80"): (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    ("ieee", "sm_90"): (Tile(64, 64, 16, 8, 2), Tile(32, 32, 16, 4, 2)),
    ("ieee", "sm_80"): (Tile(64, 64, 16, 8, 2), Tile(32, 32, 16, 4, 2)),
}

# Up to this many in_features a layer is bound by memory, and writing y once beats a library GEMM followed by a
# pass over its output. Derived from peak rates, 2 K flops against 2 passes saved per output; not yet measured.
TILED_MAX_K = {"half": 256, "tf32": 128, "ieee": 32}

# fp32 products on the FMA units make the one-kernel backward compute-bound beyond this width.
IEEE_BACKWARD_MAX = 64 * 64


# fp32 products as several products of tensor cores, each operand a sum of two or three short numbers.
SPLITS = ("tf32x3", "bf16x6", "bf16x3")


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
    if reason := refusal(m, k, n, dtype, device):
        return Plan("aten", reason)
    if device.kind == "cpu" and not device.triton:
        return _cpu_fwd(m, k, n, dtype, device)
    if impl == "torch":
        return Plan("library", 'impl="torch": library GEMM, activation in place')
    kind = _kind(dtype, precision)
    if found := _rows_tile("linear_act_fwd", k, n, kind, device.arch):
        tile, per_sm = found
        programs = min(_cdiv(m, tile.block_m), device.units * per_sm)
        return Plan("rows", f"{k}x{n} weight stays on chip; x is read once, y written once", tile, programs, precision)
    if readable and (plan := _wide(m, k, n, dtype, split or precision, device, impl)):
        return plan
    if impl is None and k > TILED_MAX_K[kind]:
        return Plan("library", f"{k} in_features: bound by arithmetic, where the library GEMM is faster")
    tiles = TILED[kind, _generation(device.arch)]
    counts = [_cdiv(m, t.block_m) * _cdiv(n, t.block_n) for t in tiles]
    pick = next((i for i, count in enumerate(counts) if count >= device.units), len(tiles) - 1)
    reason = "bias and activation in the epilogue of the product"
    return Plan("tiled", reason, tiles[pick], counts[pick], precision)


# A measured shape speaks for others whose every size is at most this many times larger or smaller.
WIDE_REACH = 2.0

# Without a measurement the largest tile is taken that computes at most this many times more beyond the edges and in
# idle multiprocessors than the best: it reads least per product. An estimate.
WIDE_WASTE = 1.15


def _waste(m: int, n: int, tile: Tile, units: int, splits: int = 1) -> float:
    """Outputs that whole waves of whole tiles compute, for each output that is wanted."""
    waves = _cdiv(_cdiv(m, tile.block_m) * _cdiv(n, tile.block_n) * splits, units)
    return waves * units * tile.block_m * tile.block_n / (splits * m * n)


# Parts into which a sum is cut must be this long, or writing and reading them costs more than what idle
# multiprocessors would have saved. An estimate.
SPLIT_MIN_K = 1024


def _wide(m: int, k: int, n: int, dtype: str, precision: str, device: Device, impl: str | None) -> Plan | None:
    """The plan for a forward product by the TMA kernel, or None where it cannot run or nobody asked for it."""
    kind = _kind(dtype, precision)
    asked = impl == "triton" or kind in SPLITS
    if k <= TILED_MAX_K["ieee" if kind in SPLITS else kind]:
        asked = False
    # Rows of y start at multiples of 16 bytes, or TMA cannot write them.
    if n * _itemsize(dtype) % 16:
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
    if refusal(m, k, n, dtype, device) or any(size * _itemsize(dtype) % 16 for size in (k, n)):
        return None
    precision = split or precision
    kind = _kind(dtype, precision)
    # For fp32 the weight is copied, transposed. Unmeasured, that must cost less than the pass over dz that it saves.
    asked = impl == "triton" or (kind in SPLITS and m >= k)
    epilogue = ", the derivative of the layer below in the epilogue"
    return _wide_product(m, k, n, f"dgrad-{kind}", precision, device, impl, asked, epilogue)


def linear_act_wgrad(m: int, k: int, n: int, precision: str, device: Device, impl: str | None = None) -> Plan | None:
    """The plan for dz.T @ h in fp32, with dz (k, m) and h (k, n), as a split product; None: torch's own is as good."""
    kind = _kind("float32", precision)
    if kind not in SPLITS or m % 4 or n % 4:
        return None
    return _wide_product(m, k, n, f"wgrad-{kind}", precision, device, impl, True)


def _wide_product(
    m: int,
    k: int,
    n: int,
    kind: str,
    precision: str,
    device: Device,
    impl: str | None,
    asked: bool,
    epilogue: str = "",
) -> Plan | None:
    """The plan for a product that travels by TMA, or None. asked: it may run where nobody has timed it."""
    tiles = wide_candidates(kind, device.arch)
    tile, splits, reason = _measured_tile(m, k, n, kind, device) or (None, 1, "")
    if tile is None and asked and (impl == "triton" or not reason):
        tile, splits, reason = _likely_tile(m, k, n, kind, tuple(tiles), device, epilogue)
    if tile is None:
        return None
    programs = min(_cdiv(m, tile.block_m) * _cdiv(n, tile.block_n) * splits, device.units * tiles[tile])
    return Plan("tma", reason, tile, programs, precision, splits=splits)


def _likely_tile(
    m: int, k: int, n: int, kind: str, tiles: tuple[WideTile, ...], device: Device, epilogue: str
) -> tuple[WideTile | None, int, str]:
    """(tile, splits, reason), unmeasured."""
    if not tiles:
        return None, 1, ""  # products on the FMA units, which spill here, and chips that nothing was compiled for
    cuts = [1 if kind.startswith("dgrad") else wide_splits(m, k, n, tile, device.units) for tile in tiles]
    waste = [_waste(m, n, tile, device.units, splits) for tile, splits in zip(tiles, cuts, strict=True)]
    pick = next(i for i, own in enumerate(waste) if own <= WIDE_WASTE * min(waste))
    tile, splits = tiles[pick], cuts[pick]
    cut = f", {splits} programs to a tile" if splits > 1 else ""
    return tile, splits, f"tiles travel by TMA{cut}{epilogue}; not measured on this device"


def wide_splits(m: int, k: int, n: int, tile: Tile, units: int) -> int:
    """Parts, a power of 2, into which few tiles' sums over a long k are cut so that they keep a chip busy."""
    if tile.block_m * tile.block_n > 128 * 128:
        return 1  # parts are stored in fp32, and such tiles leave no shared memory for that
    count = _cdiv(m, tile.block_m) * _cdiv(n, tile.block_n)
    splits = 1
    while 2 * splits * count <= units and k >= 2 * splits * SPLIT_MIN_K and splits < 16:
        splits *= 2
    return splits


def wide_candidates(kind: str, arch: int) -> dict[WideTile, int]:
    """Tiles of the TMA kernels that compile clean for this chip, and how many programs of each fit on an SM.

    Largest first; of one size, the preferred one first. kind: of product, after "dgrad-" or "wgrad-" for the gradient
    of a layer's input or weight.
    """
    return _wide_table()["candidates"].get(_wide_generation(arch), {}).get(kind, {})


def _wide_generation(arch: int) -> str:
    # Neither registers nor shared memory carry over: sm_120 has TMA too, and less than half the shared memory.
    return f"sm_{arch // 10}0"


def _measured_tile(m: int, k: int, n: int, kind: str, device: Device) -> tuple[WideTile | None, int, str] | None:
    """What the nearest shape measured on this device says: tile and splits, no tile for the library; None if none."""
    names = (device.name, _wide_generation(device.arch))
    for pattern, measured in _wide_table()["devices"].items():
        if any(name and fnmatch.fnmatchcase(name, pattern) for name in names):
            tiles, rows = wide_candidates(kind, device.arch), measured["rows"].get(kind, ())
            # A pattern may match a chip of another generation, for which its tiles were not compiled.
            rows = [row for row in rows if row["tile"] is None or row["tile"] in tiles]
            far = [[abs(math.log2(a / b)) for a, b in zip((m, k, n), row["shape"], strict=True)] for row in rows]
            near = [(sum(f), i) for i, f in enumerate(far) if max(f) <= math.log2(WIDE_REACH)]
            if near:
                row = rows[min(near)[1]]
                ratio = row["library_us"] / row["us"]
                shape = "x".join(map(str, row["shape"]))
                return (
                    row["tile"],
                    row["splits"],
                    f"measured at {shape} on {pattern}: {ratio:.2f}x the library and a pass",
                )
    return None


def _wide_table() -> dict:
    return _table("wide.json")


def read_wide(document: dict) -> dict:
    """The content of `wide.json` with its rows as tiles. Raises ValueError at what a plan could not use.

    `candidates`: generation, kind of product, list of tiles, each with its programs per SM. `devices`: a device's name
    (or a pattern of names, or a generation), what measured it, and per kind rows of shape (m, k, n), the fastest tile
    or null where the library was faster than all, its `splits` (1 where none are named), and the times of the fastest
    tile and of the library.
    """

    def tile(where: str, row: object, more: int = 0) -> WideTile:
        if not isinstance(row, list) or len(row) != 9 + more or not all(type(v) is int for v in row):
            raise ValueError(f"wide.json, {where}: {row} is not a list of {9 + more} integers")
        row, rest = row[:9], row[9:]
        if rest and not 1 <= rest[0] <= 32:
            raise ValueError(f"wide.json, {where}: {rest[0]} programs per SM")
        found = wide_tile(row)
        blocks = (found.block_m, found.block_n, found.block_k)
        if any(b < 16 or b & (b - 1) for b in blocks) or max(blocks) > 256:
            raise ValueError(f"wide.json, {where}: blocks {blocks} are not powers of 2 from 16 to 256")
        counts = (found.num_stages, found.group_m)
        if found.num_warps not in (4, 8) or found.subtiles not in (1, 2) or min(counts) < 1 or max(counts) > 64:
            raise ValueError(f"wide.json, {where}: {row} is no tile")
        return found

    candidates = {
        generation: {
            kind: {tile(f"{generation}, {kind}", row, 1): row[9] for row in rows} for kind, rows in kinds.items()
        }
        for generation, kinds in document["candidates"].items()
    }
    known: dict[str, set[WideTile]] = {}
    for kinds in candidates.values():
        for kind, tiles in kinds.items():
            known.setdefault(kind, set()).update(tiles)
    devices = {}
    for name, measured in document["devices"].items():
        if missing := {"torch", "triton", "date", "rows"} - measured.keys():
            raise ValueError(f"wide.json, {name}: without {', '.join(sorted(missing))}")
        read: dict[str, list[dict]] = {}
        for kind, rows in measured["rows"].items():
            for row in rows:
                where = f"{name}, {kind}, {row.get('shape')}"
                if kind not in known or len(row["shape"]) != 3 or min(row["shape"]) < 1:
                    raise ValueError(f"wide.json, {where}: not three sizes of one of {', '.join(known)}")
                found = None if row["tile"] is None else tile(where, row["tile"])
                if found is not None and found not in known[kind]:
                    raise ValueError(f"wide.json, {where}: {row['tile']} is none of the candidates")
                if row.get("splits", 1) not in ((1,) if kind.startswith("dgrad") else (1, 2, 4, 8, 16)):
                    raise ValueError(f"wide.json, {where}: {row['splits']} splits")
                if not (row["us"] > 0 and row["library_us"] > 0):
                    raise ValueError(f"wide.json, {where}: times {row['us']} and {row['library_us']}")
                read.setdefault(kind, []).append({"splits": 1} | row | {"tile": found})
        devices[name] = measured | {"rows": read}
    return {"candidates": candidates, "devices": devices}


def wide_tile(row: list[int]) -> WideTile:
    """The tile that `wide_row` wrote."""
    *sizes, flatten, specialize = row
    return WideTile(*sizes, flatten=bool(flatten), specialize=bool(specialize))


def wide_row(tile: WideTile) -> list[int]:
    """A tile as `wide.json` writes it."""
    return [int(value) for value in astuple(tile)]


@functools.lru_cache(maxsize=4096)
def linear_act_bwd(m: int, k: int, n: int, dtype: str, precision: str, device: Device, impl: str | None = None) -> Plan:
    """The plan for (dx, dweight, dbias) of the same layer from dy, y, x and weight."""
    if reason := refusal(m, k, n, dtype, device):
        return Plan("aten", reason)
    if device.kind == "cpu" and not device.triton:
        return _cpu_bwd(m, k, n, dtype, device)
    if impl == "torch":
        return Plan("library", 'impl="torch": activation gradient, then library GEMMs')
    found = _rows_tile("linear_act_bwd", k, n, _kind(dtype, precision), device.arch)
    if found and not (_kind(dtype, precision) == "ieee" and k * n > IEEE_BACKWARD_MAX):
        tile, per_sm = found
        tiles = _cdiv(m, tile.block_m)
        # A few row tiles are walked by one program, which writes the gradients itself: one launch, no reduction.
        # Beyond that a second program per SM must earn its slot: eight tiles of reading for one slot of writing.
        programs = 1 if tiles <= 4 else min(tiles, device.units * per_sm, max(device.units, tiles // 8))
        return Plan("rows", "dx, dweight and dbias from one read of dy, y and x", tile, programs, precision)
    tile = Tile(32, 128, 0, 4, 1)
    reason = f"{k}x{n}: no register tile for dweight; dz and dbias in one pass, then library GEMMs"
    return Plan("passes", reason, tile, _cdiv(m, tile.block_m) * _cdiv(n, tile.block_n), precision)


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


# --- what a plan can reach at best --------------------------------------------------------------------------


@dataclass(frozen=True)
class Chip:
    """Peak rates, from the vendor's data sheet."""

    units: int
    bandwidth: float  # bytes per second
    flops: dict[str, float]  # dense, per second, by product: "half", "tf32", "ieee"
    special: float  # special functions (exp2, rsqrt) per second: 16 per clock and multiprocessor


H200 = Chip(132, 4.8e12, {"half": 989.4e12, "tf32": 494.7e12, "ieee": 66.9e12}, 132 * 16 * 1.83e9)

# Products of tensor cores that one fp32 product of each kind takes, and of which kind they are.
PRODUCTS = {"tf32x3": (3, "tf32"), "bf16x6": (6, "half"), "bf16x3": (3, "half")}


@dataclass(frozen=True)
class Prediction:
    """What one call takes, the limit that peak rates set, and what a plan's own way adds to that."""

    flops: int  # on the units that do them, every product of a split counted
    bytes: int  # between chip and memory, each operand once
    special: int  # exp2 and rsqrt, two for each sigmoid
    limit_us: float  # the slowest of the three alone
    plan_us: float

    def __str__(self) -> str:
        functions = f", {_digits(self.special / 1e6)} M exp2 and rsqrt" if self.special else ""
        if self.plan_us < 1:
            times = "under 1 us, where launches decide"
        else:
            times = f"{_digits(self.plan_us)} us, limit {_digits(self.limit_us)} us"
        work = f"{_digits(self.flops / 1e9)} Gflop, {_digits(self.bytes / 1e6)} MB{functions}"
        return f"H200 at peak rates (a model): {times}; {work}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _product(macs: int, dtype: str, precision: str, chip: Chip) -> tuple[int, float]:
    """Operations and seconds of a product."""
    count, unit = PRODUCTS.get(precision, (1, _kind(dtype, precision)))
    return 2 * macs * count, 2 * macs * count / chip.flops[unit]


def predict(m: int, k: int, n: int, dtype: str, plan: Plan, chip: Chip = H200) -> Prediction:
    """A model of act(x @ weight.T + bias) by this plan, at the peak rates of `chip`.

    The library's product writes z, and a pass over it reads z and writes y. A kernel with output tiles computes whole
    tiles in whole waves, and its multiprocessors do special functions after the products, not beside them. What an
    implementation loses against peak rates is not in it.
    """
    size = _itemsize(dtype)
    flops, products = _product(m * k * n, dtype, plan.precision, chip)
    moved, special = size * (m * k + n * k + n + m * n), 2 * m * n
    memory, functions = moved / chip.bandwidth, special / chip.special
    if plan.impl in ("tiled", "tma"):
        waste = _waste(m, n, plan.tile, chip.units, plan.splits)
        took = max(memory, waste * (products + functions))
        if plan.splits > 1:  # parts are written and read once, in fp32
            took += 8 * plan.splits * m * n / chip.bandwidth
    elif plan.impl == "library":
        took = max(memory, products) + max(2 * size * m * n / chip.bandwidth, functions)
    else:
        took = max(memory, products, functions)
    return Prediction(flops, moved, special, 1e6 * max(memory, products, functions), 1e6 * took)


def predict_bwd(
    m: int,
    k: int,
    n: int,
    dtype: str,
    plan: Plan,
    chip: Chip = H200,
    dz_at_hand: bool = False,
    dgrad: Plan | None = None,
    wgrad: Plan | None = None,
) -> Prediction:
    """The same of (dx, dweight, dbias) from dy, y, x and weight: two products, each as large as the forward one.

    "rows" reads each operand once; if there are several programs, each writes a slot of fp32 sums, which is read once.
    Otherwise a pass over dy and y writes dz ("library": a second one reads it for dbias), and both products read that.
    dz_at_hand: it came out of the product of the layer above, which read y for that. dgrad, wgrad: how dx and dweight
    are computed, if not as `plan` has it; for fp32 dgrad reads the weight and writes its transpose first.
    """
    size = _itemsize(dtype)
    each = [_product(m * k * n, dtype, own.precision, chip) for own in (dgrad or plan, wgrad or plan)]
    flops, products = sum(count for count, _ in each), sum(seconds for _, seconds in each)
    moved = size * (2 * (m * n + m * k + n * k) + n)
    memory = moved / chip.bandwidth
    if plan.impl == "rows":
        slots = 8 * plan.programs * n * (k + 1) if plan.programs > 1 else 0
        took = max(products, memory + slots / chip.bandwidth)
    else:
        passes = 1 if dz_at_hand else 3 + (plan.impl == "library")
        took = passes * size * m * n / chip.bandwidth
        took += sum(max(seconds, size * (m * n + n * k + m * k) / chip.bandwidth) for _, seconds in each)
        if dgrad and dtype == "float32":
            took += 2 * size * n * k / chip.bandwidth
    return Prediction(flops, moved, 0, 1e6 * max(memory, products), 1e6 * took)


def predict_mlp(
    m: int,
    widths: tuple[int, ...],
    dtype: str,
    plan: "MlpPlan",
    layers: tuple[Plan, ...] = (),
    backward: bool = False,
    boundaries: tuple[int, ...] = (),
    chip: Chip = H200,
) -> Prediction:
    """The same of a whole network in one direction.

    "fused" moves what `mlp_bytes` counts, and back it computes the forward pass once more. Any other plan is the sum of
    its `layers`, and back reads the activations that the forward pass has kept. boundaries: of the backward plan, for
    a forward pass that stores the activations there.
    """
    pairs, size, fused = list(itertools.pairwise(widths)), _itemsize(dtype), plan.impl == "fused"
    macs, outputs = [m * k * n for k, n in pairs], sum(m * n for _, n in pairs)
    dgrads, wgrads = (found or (None,) * len(pairs) for found in (plan.dgrads, plan.wgrads))
    if backward:
        gradients = zip(layers, dgrads, wgrads, strict=True)
        computed = [own for layer, dgrad, wgrad in gradients for own in (dgrad or layer, wgrad or layer)]
        computed = [plan] * 3 * len(pairs) if fused else computed
        special = 2 * outputs if fused else 0
        ends = 2 * widths[0] + widths[-1] + (0 if fused else sum(widths[1:]))
        moved = size * (m * ends + 2 * _parameters(widths))
    else:
        computed = layers or [plan] * len(pairs)
        special = 2 * outputs
        moved = size * (m * (widths[0] + widths[-1]) + _parameters(widths))
    repeated = [own for own in macs for _ in range(len(computed) // len(macs))]
    each = [_product(own, dtype, by.precision, chip) for own, by in zip(repeated, computed, strict=True)]
    flops, products = sum(count for count, _ in each), sum(seconds for _, seconds in each)
    memory, functions = moved / chip.bandwidth, special / chip.special
    if fused:
        own = _bwd_bytes(m, widths, size, plan) if backward else _fwd_bytes(m, widths, size, plan, boundaries)
        took = 1e6 * max(own / chip.bandwidth, products, functions)
    elif backward:
        above = (*(dgrad is not None for dgrad in dgrads[1:]), False)
        took = sum(
            predict_bwd(m, k, n, dtype, layer, chip, dz_at_hand, dgrad, wgrad).plan_us
            for (k, n), layer, dz_at_hand, dgrad, wgrad in zip(pairs, layers, above, dgrads, wgrads, strict=True)
        )
    else:
        took = sum(predict(m, k, n, dtype, layer, chip).plan_us for (k, n), layer in zip(pairs, layers, strict=True))
    return Prediction(flops, moved, special, 1e6 * max(memory, products, functions), took)


# Chips on which one program may use 99 KB of shared memory, as it may from 12.0 on; tiles were picked for 163 and 227.
SMALL_SHARED = (86, 89)


def refusal(m: int, k: int, n: int, dtype: str, device: Device) -> str | None:
    """Why plain torch has to do it, or None."""
    if 0 in (m, k, n):
        return EMPTY
    if dtype not in DTYPES:
        return f"{dtype}: the kernels take {', '.join(DTYPES)}"
    if device.kind not in ("cpu", "cuda"):
        return f"no kernels for {device.kind} devices"
    if device.kind == "cuda" and device.arch < 80:
        return f"compute capability {device.arch // 10}.{device.arch % 10}: the kernels need 8.0"
    if device.kind == "cuda" and (device.arch in SMALL_SHARED or device.arch >= 120):
        return f"compute capability {device.arch // 10}.{device.arch % 10}: no tiles yet for its 99 KB of shared memory"
    if device.kind == "cuda" and not device.triton:
        return "triton is not installed"
    return None


# --- CPU ---------------------------------------------------------------------------------------------------


def cpu_small(dtype: str, vendor: str) -> int:
    """Products of fewer than this many multiply-adds cost less as plain torch operations than any plan for them."""
    return _cpu_table(dtype, vendor)["small"]


def cpu_few_outputs(dtype: str, vendor: str) -> tuple[int, int]:
    """Layers of fewer outputs than these, all together, cost less as plain torch operations: (without, with) gradients.

    What the explicit path gains is in memory above all: fresh tensors, which the system maps page by page.
    """
    forward, training = _cpu_table(dtype, vendor).get("few_outputs", (0, 0))
    return forward, training


def _cpu_table(dtype: str, vendor: str) -> dict:
    table = _table("cpu.json")["thresholds"]
    return table.get(vendor, table["any"]).get(dtype, table["any"]["float16"])


def _within(rule: dict | None, m: int, k: int, n: int) -> bool:
    """Whether a rule's bounds, min_ and max_ of rows, macs, width, in and outputs, hold for a product; None: never."""
    sizes = {"rows": m, "macs": m * k * n, "width": min(k, n), "in": k, "outputs": k * n}
    return rule is not None and all(
        sizes[name[4:]] >= bound if name.startswith("min_") else sizes[name[4:]] <= bound
        for name, bound in rule.items()
        if name != "rows"
    )


def _cpu_fwd(m: int, k: int, n: int, dtype: str, device: Device) -> Plan:
    table = _cpu_table(dtype, device.vendor)
    if m * k * n < table["small"] or m * n < cpu_few_outputs(dtype, device.vendor)[0]:
        return Plan("aten", "small: plain torch operations cost least")
    if _within(table["forward"], m, k, n):
        return Plan("explicit", "oneDNN's product with the activation in it", forward_gemm="onednn")
    return Plan("explicit", "torch's product, activation in place")


def _cpu_bwd(m: int, k: int, n: int, dtype: str, device: Device) -> Plan:
    table = _cpu_table(dtype, device.vendor)
    if m * k * n < table["small"] or m * n < cpu_few_outputs(dtype, device.vendor)[1]:
        return Plan("aten", "small: plain torch operations cost least")
    if min(k, n) < table.get("thin", 0):
        return Plan("aten", "thin: where gradients are wanted, plain torch operations, forward too")
    return _cpu_explicit_bwd(m, k, n, dtype, device)


def _cpu_explicit_bwd(m: int, k: int, n: int, dtype: str, device: Device) -> Plan:
    table = _cpu_table(dtype, device.vendor)
    itemsize = 4 if dtype == "float32" else 2
    chunk = 0
    if m * n * itemsize > table["chunk_above_bytes"]:
        # dz in pieces that stay in cache, instead of a fresh tensor that the system must map page by page.
        chunk = max(2048, table["chunk_bytes"] // (n * itemsize))
    rows = min(m, chunk or m)
    dx = "onednn" if _within(table["dx"], rows, k, n) else "mm"
    dweight = "onednn" if _within(table["dweight"], rows, k, n) else "mm"
    rule = table.get("split")
    split = rule["rows"] if rule is not None and _within(rule, m, k, n) else 0
    shared = f" or, from {split} rows per thread on, a part of the rows on each" if 0 < split <= rows else ""
    reason = f"dx by {dx}, dweight by {dweight}{shared}" + (f", dz in pieces of {chunk} rows" if chunk else "")
    return Plan("explicit", reason, dx_gemm=dx, dweight_gemm=dweight, split_rows=split, chunk=chunk)


# --- whole networks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MlpTile:
    block_m: int
    num_warps: int
    num_stages: int
    resident: bool = True  # weights are loaded once per program; else once per row tile (forward only)


@dataclass(frozen=True)
class MlpSegment:
    """Layers first to last - 1, run by one kernel."""

    first: int
    last: int
    tile: MlpTile
    programs: int


@dataclass(frozen=True)
class MlpPlan:
    """How a whole network runs in one direction.

    `impl` is "fused" (each segment is one kernel, inside which activations never leave the chip; forward in the order
    of `segments`, backward in reverse, with one number of programs), "stack" (wide layers as one autograd node, by
    kernels in which a layer's dz comes out of the product of the layer above), "layers" (not as a whole: layer by
    layer), or on a CPU "aten" (plain torch operations under autograd) and "explicit" (`reference.py`, one autograd
    node).
    """

    impl: str
    reason: str
    segments: tuple[MlpSegment, ...] = ()
    precision: str = "ieee"
    layers: tuple[Plan, ...] = ()  # "explicit" and "stack": each layer's own plan
    dgrads: tuple[Plan | None, ...] = ()  # "stack", backward: of each layer's product that ends in dz of the one below
    wgrads: tuple[Plan | None, ...] = ()  # likewise: of the product that is dweight, where it is not torch's
    chunk: int = 0  # "explicit", backward: rows that go through all layers at a time; 0: all of them
    prediction: "Prediction | None" = field(default=None, compare=False)  # `explain` adds it for GPUs

    @property
    def triton(self) -> bool:
        return self.impl in ("fused", "stack")

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The l for which a backward pass needs the input of layer l: where a segment other than the first begins.

        "explicit" and "stack" need all of them, and y, the input of the layer after the last.
        """
        if self.layers:
            return tuple(range(1, len(self.layers) + 1))
        return tuple(segment.first for segment in self.segments[1:])


MLP_MAX_WIDTH = 128

# Fewer rows at a time cost the products on a CPU more than what they save in cache.
CPU_MLP_CHUNK_ROWS = 1024

# Sums of weight gradients live in registers next to the activations: one backward kernel takes 8, 4, 2 or 1 layers of
# width 16, 32, 64 or 128. In between, a layer counts as the geometric mean of its two widths.
MLP_BACKWARD_WIDTHS = 128

# fp32 products on the FMA units make a pass bound by arithmetic from these widths on, and the backward pass computes
# the forward once more. Up to so many rows the launches that are saved count for more. Derived from peak rates, not
# yet measured.
MLP_IEEE_MAX_WIDTH = {False: 64, True: 32}  # backward?
MLP_IEEE_ROWS = 1 << 14


@functools.lru_cache(maxsize=4096)
def mlp_fwd(
    m: int,
    widths: tuple[int, ...],
    dtype: str,
    precision: str,
    device: Device,
    save: bool = False,
    loss: bool = False,
    impl: str | None = None,
    split: str | None = None,
) -> MlpPlan:
    """The plan for a network of layers widths[l] -> widths[l + 1] on m rows.

    save: activations between the layers are to be stored too, those at `boundaries` of the backward plan. loss: the
    network ends in the fused cross entropy. split: what fp32 products of wide layers may use, as for `linear_act_fwd`.
    """
    return _mlp("mlp_fwd" if save else "mlp_infer", m, widths, dtype, precision, device, loss, impl, split)


@functools.lru_cache(maxsize=4096)
def mlp_bwd(
    m: int,
    widths: tuple[int, ...],
    dtype: str,
    precision: str,
    device: Device,
    loss: bool = False,
    impl: str | None = None,
    split: str | None = None,
) -> MlpPlan:
    """The plan for all gradients of the same network from dy, x, the parameters and the inputs of `boundaries`."""
    return _mlp("mlp_bwd", m, widths, dtype, precision, device, loss, impl, split)


def mlp_bytes(m: int, widths: tuple[int, ...], itemsize: int, forward: MlpPlan, backward: MlpPlan | None = None) -> int:
    """Bytes that fused plans move between the chip and its memory: a forward pass, or a training step.

    Forward, every segment reads its input and its parameters and writes its output; with a backward plan of S segments
    the S - 1 activations at its boundaries are written too. Backward, every segment reads its input, dy and its
    parameters and writes dx; several programs write and read a slot of fp32 sums each, and the gradients are written
    once. With one forward segment and all widths equal that is 2 activations for inference, and 1 + 4 S for a training
    step, plus parameters and slots.
    """
    if backward is None:
        return _fwd_bytes(m, widths, itemsize, forward)
    return _fwd_bytes(m, widths, itemsize, forward, backward.boundaries) + _bwd_bytes(m, widths, itemsize, backward)


def _fwd_bytes(m: int, widths: tuple[int, ...], itemsize: int, plan: MlpPlan, boundaries: tuple[int, ...] = ()) -> int:
    stored = {segment.last for segment in plan.segments} | set(boundaries)
    activations = sum(widths[segment.first] for segment in plan.segments) + sum(widths[l] for l in stored)
    return itemsize * (m * activations + _parameters(widths))


def _bwd_bytes(m: int, widths: tuple[int, ...], itemsize: int, plan: MlpPlan) -> int:
    parameters, programs = _parameters(widths), plan.segments[0].programs
    activations = sum(2 * widths[segment.first] + widths[segment.last] for segment in plan.segments)
    return itemsize * (m * activations + 2 * parameters) + (8 * programs * parameters if programs > 1 else 0)


def _parameters(widths: tuple[int, ...]) -> int:
    return sum(n * (k + 1) for k, n in itertools.pairwise(widths))


def mlp_columns(widths: tuple[int, ...]) -> tuple[int, ...]:
    """How many columns x, the activations between layers and y have in memory where a fused network writes them.

    Those in between nobody else reads, so their rows are rounded up to whole 16-byte pieces, which cost fewer
    instructions than ragged ones. What padded neurons put out is finite, and the weights that read it are 0.
    """
    return (widths[0], *(_cdiv(width, 16) * 16 for width in widths[1:-1]), widths[-1])


def _mlp(op: str, m, widths, dtype, precision, device, loss, impl, split) -> MlpPlan:
    if reason := refusal(m, min(widths), 1, dtype, device):
        return MlpPlan("layers", reason)
    if len(widths) == 2 and not loss and impl != "triton":
        return MlpPlan("layers", "a single layer has kernels of its own, which compute nothing twice")
    if device.kind == "cpu" and not device.triton:
        return _cpu_mlp(op, m, widths, dtype, device)
    if impl == "torch":
        return MlpPlan("layers", 'impl="torch": layer by layer')
    if max(widths) > MLP_MAX_WIDTH:
        return _stack(op, m, widths, dtype, precision, device, loss, impl, split)
    kind, backward = _kind(dtype, precision), op == "mlp_bwd"
    if impl is None and kind == "ieee" and m > MLP_IEEE_ROWS and max(widths) > MLP_IEEE_MAX_WIDTH[backward]:
        return MlpPlan("layers", f"fp32 at a width of {max(widths)} is bound by arithmetic, and fusing saves none")
    found = _mlp_segments(op, widths, loss, kind, device.arch)
    if found is None:
        return MlpPlan("layers", f"{kind} products at these widths spill registers in every tile")
    programs = [min(_cdiv(m, tile.block_m), device.units * per_sm) for _, _, tile, per_sm in found]
    if backward:
        # One slot of sums per program: what the slots take must stay small beside the activations.
        slot = 4 * sum(n * (k + 1) for k, n in itertools.pairwise(widths))
        activations = (4 if dtype == "float32" else 2) * m * (widths[0] + widths[-1])
        few = all(m <= 4 * tile.block_m for _, _, tile, _ in found)
        programs = [1 if few else min(*programs, max(device.units, activations // (8 * slot)))] * len(found)
    segments = tuple(
        MlpSegment(first, last, tile, count) for (first, last, tile, _), count in zip(found, programs, strict=True)
    )
    cut = f" in {len(segments)} segments" if len(segments) > 1 else ""
    rest = "x and dy are read once each" if backward else "x is read once, y written once"
    return MlpPlan("fused", f"activations stay on chip{cut}; {rest}", segments, precision)


def _stack(op: str, m, widths, dtype, precision, device, loss, impl, split) -> MlpPlan:
    too_wide = f"a width of {max(widths)}: networks stay on chip up to {MLP_MAX_WIDTH}"
    pairs = list(itertools.pairwise(widths))
    dgrads = [None, *(linear_act_dgrad(m, n, k, dtype, precision, device, impl, split) for k, n in pairs[1:])]
    if loss or not any(dgrads):
        return MlpPlan("layers", too_wide)
    reason = "wide layers as one node: the product of a layer's gradient ends in dz of the layer below"
    if op == "mlp_bwd":
        layers = tuple(linear_act_bwd(m, k, n, dtype, precision, device, impl) for k, n in pairs)
        # A layer whose dz no product gives has a kernel of its own for all its gradients.
        apart = [own or above for own, above in zip(dgrads, [*dgrads[1:], None], strict=True)]
        wgrads = tuple(
            linear_act_wgrad(n, m, k, split or precision, device, impl) if dz else None
            for (k, n), dz in zip(pairs, apart, strict=True)
        )
        return MlpPlan("stack", reason, precision=precision, layers=layers, dgrads=tuple(dgrads), wgrads=wgrads)
    itemsize = _itemsize(dtype)
    layers = tuple(
        linear_act_fwd(m, k, n, dtype, precision, device, impl, split, k * itemsize % 16 == 0) for k, n in pairs
    )
    return MlpPlan("stack", reason, precision=precision, layers=layers)


def _cpu_mlp(op: str, m: int, widths: tuple[int, ...], dtype: str, device: Device) -> MlpPlan:
    pairs = list(itertools.pairwise(widths))
    table = _cpu_table(dtype, device.vendor)
    few = m * sum(widths[1:]) < cpu_few_outputs(dtype, device.vendor)[op == "mlp_bwd"]
    if few or m * max(k * n for k, n in pairs) < table["small"]:
        return MlpPlan("aten", "small: plain torch operations, without the calls of the layers, cost least")
    if op != "mlp_bwd":
        layers = tuple(_cpu_fwd(m, k, n, dtype, device) for k, n in pairs)
        return MlpPlan("explicit", "the faster product per layer, activation in place", layers=layers)
    # Pieces of rows go back through all layers: every dz and dh stays in cache, and none asks the system for memory.
    chunk = max(CPU_MLP_CHUNK_ROWS, table["chunk_bytes"] // (max(widths) * (4 if dtype == "float32" else 2)))
    chunk = chunk if m > chunk else 0
    layers = tuple(_cpu_explicit_bwd(chunk or m, k, n, dtype, device) for k, n in pairs)
    reason = "one autograd node" + (f", back through all layers in pieces of {chunk} rows" if chunk else "")
    return MlpPlan("explicit", reason, layers=layers, chunk=chunk)


def _mlp_segments(
    op: str, widths: tuple[int, ...], loss: bool, kind: str, arch: int
) -> list[tuple[int, int, MlpTile, int]] | None:
    """(first, last, tile, programs per SM) of the fewest segments, cut where the network is narrow, or None."""
    # best[l]: (number of segments, widths at their boundaries, segments) for the layers before l
    best: list = [(0, 0, [])]
    for last in range(1, len(widths)):
        options = []
        for first in range(last - 1, -1, -1):
            # Activations between segments are laid out for reading in pieces of 16 bytes; x and y may not be.
            ragged_in = first == 0 and widths[0] % 16 != 0
            ragged_out = last == len(widths) - 1 and (loss or widths[-1] % 16 != 0)
            row = _mlp_row(op, widths[first : last + 1], ragged_in, ragged_out, kind, arch)
            if row is None:
                continue
            count, width, segments = best[first]
            tile = MlpTile(row[0], row[1], row[2], bool(row[3]))
            options.append((count + 1, width + widths[first], [*segments, (first, last, tile, row[4])]))
        if not options:
            return None
        best.append(min(options, key=lambda option: option[:2]))
    return best[-1][2]


@functools.lru_cache(maxsize=4096)
def _mlp_row(
    op: str, widths: tuple[int, ...], ragged_in: bool, ragged_out: bool, kind: str, arch: int
) -> list[int] | None:
    """The first row of the table whose chain is at least as wide everywhere and at least as long, or None."""
    chain = tuple(max(_next_power_of_2(width), 16) for width in widths)
    if op == "mlp_bwd" and sum((k * n) ** 0.5 for k, n in itertools.pairwise(chain)) > MLP_BACKWARD_WIDTHS:
        return None
    layouts = {
        (False, False): ("exact", "in", "out", "both"),
        (True, False): ("in", "both"),
        (False, True): ("out", "both"),
        (True, True): ("both",),
    }[ragged_in, ragged_out]
    table = _table("mlp_tiles.json")["tiles"][_generation(arch)]
    for name, layout in itertools.product((op, "mlp_fwd") if op == "mlp_infer" else (op,), layouts):
        for key, row in table[name].get(kind, {}).get(layout, {}).items():
            other = tuple(map(int, key.split("-")))
            starts = range(len(other) - len(chain) + 1)
            if any(all(a >= b for a, b in zip(other[i:], chain, strict=False)) for i in starts):
                return row
    return None


# --- whole training loops ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What every step of a training loop does, apart from the numbers it starts from."""

    widths: tuple[int, ...]  # of the input and of every layer's output
    hidden: str = "sigmoid"  # names in activations.py and device.py
    output: str = "sigmoid"
    bias: bool = True
    loss: str = "bce"  # "bce" (output: sigmoid), "bce_logits" (output: identity) or "mse" (any output)
    reduction: str = "mean"  # or "sum"; mean divides by batch * widths[-1]
    optimizer: str = "sgd"  # or "adam", "adamw"
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True)
class TrainPlan:
    """How a whole training loop runs.

    `impl` is "lane" (one kernel for all steps of `networks` networks per program, one per lane), "block" (one kernel
    for all steps, one network per program), "graph" (`loop.py` on a GPU, each step a replay of a captured graph) or
    "torch" (`loop.py`, step by step).
    """

    impl: str
    reason: str
    rows: int = 0  # samples that a kernel takes at a time
    networks: int = 1  # per program
    num_warps: int = 1


# The most parameters of a network that one lane trains, by the tensors of state that the optimizer keeps for each.
# Registers would take some more; the compiler's time, which grows faster than the code that is unrolled, would not.
LANE_PARAMETERS = (49, 33, 17)
LANE_UNROLLED = 68  # parameters times samples
LANE_NETWORKS = 32

# The longest network that one program trains without a spill, by its widest layer and by the tensors of state: layers
# of that width, of which one from k to n counts as the geometric mean of the two.
BLOCK_LAYERS = {16: (8, 8, 6), 32: (4, 4, 3), 64: (1.25, 1.25, 1.21)}
BLOCK_ADAM_WEIGHTS = 3072  # padded: a single 64 x 64 layer spills on sm_80 with triton 3.6

# Cycles of one network's step, read off the schedules of the compiled loops: of a lane per parameter and sample, of a
# block per layer and tile of samples. Not yet measured.
LANE_CYCLES = 9
BLOCK_CYCLES = {16: 600, 32: 1300, 64: 2800}


@functools.lru_cache(maxsize=4096)
def train(
    members: int,
    samples: int,
    batch_size: int | None,
    recipe: Recipe,
    dtype: str,
    device: Device,
    impl: str | None = None,
) -> TrainPlan:
    """The plan for training `members` networks of one recipe on `samples` samples each.

    batch_size: None for all samples. impl: "lane", "block" or "graph" asks for that one; the plan says "torch", and
    why, where it cannot be had.
    """
    if impl in (None, "graph") and device.kind == "cuda" and 0 not in (members, samples, *recipe.widths):
        kernels = _kernel_loop(members, samples, batch_size, recipe, dtype, device, impl)
        if kernels.impl == "torch":
            return TrainPlan("graph", f"{kernels.reason}; a step is one replay of a captured graph")
        return kernels
    if impl == "graph":
        return TrainPlan("torch", f"{device.kind}: only a CUDA device captures graphs")
    return _kernel_loop(members, samples, batch_size, recipe, dtype, device, impl)


def _kernel_loop(members, samples, batch_size, recipe, dtype, device, impl) -> TrainPlan:
    """The cheapest kernel for the whole loop, or "torch" and why."""
    if impl == "graph":
        return TrainPlan("torch", 'impl="graph"')
    if reason := _no_loop(members, samples, recipe, dtype, device):
        return TrainPlan("torch", reason)
    if impl == "torch":
        return TrainPlan("torch", 'impl="torch"')
    batch = min(batch_size or samples, samples)
    options = {"lane": _lane(members, batch, recipe, device), "block": _block(members, batch, recipe, device)}
    if impl in options:
        options = {impl: options[impl]}
    plans = [option for option in options.values() if option[1].impl != "torch"]
    if not plans:
        return TrainPlan("torch", "; ".join(plan.reason for _, plan in options.values()))
    return min(plans, key=lambda option: option[0])[1]


def _no_loop(members: int, samples: int, recipe: Recipe, dtype: str, device: Device) -> str | None:
    """Why no kernel runs the whole loop, whatever its tile, or None."""
    if 0 in (members, samples, *recipe.widths):
        return EMPTY
    if device.kind == "cpu" and not device.triton:
        return "no kernels for the CPU"
    if dtype != "float32":
        return f"{dtype}: whole loops take float32"
    if reason := refusal(1, 1, 1, dtype, device):
        return reason
    if recipe.optimizer != "sgd" and recipe.eps < 1e-30:
        return f"eps {recipe.eps}: padded parameters would divide 0 by 0"
    return None


def _states(recipe: Recipe) -> int:
    """Tensors of state that the optimizer keeps for each parameter."""
    return 2 if recipe.optimizer != "sgd" else 1 if recipe.momentum else 0


def _lane(members: int, batch: int, recipe: Recipe, device: Device) -> tuple[float, TrainPlan]:
    """(cycles of all members' steps, plan), of impl "torch" where lanes cannot do it."""
    parameters = sum(n * (k + recipe.bias) for k, n in itertools.pairwise(recipe.widths))
    limit = LANE_PARAMETERS[_states(recipe)]
    if parameters > limit:
        return 0, TrainPlan("torch", f"{parameters} parameters: a lane holds {limit} with this optimizer")
    # Some warps per scheduler hide each other's latency; beyond that they wait for each other.
    waves = max(1.0, members / (LANE_NETWORKS * 8 * device.units))
    reason = f"{parameters} parameters: one network per lane, in registers for the whole loop"
    # Four samples at a time, two, or one.
    rows = next((rows for rows in (4, 2) if rows * parameters <= LANE_UNROLLED), 1)
    plan = TrainPlan("lane", reason, rows, LANE_NETWORKS, 1)
    return LANE_CYCLES * parameters * batch * waves, plan


def _block(members: int, batch: int, recipe: Recipe, device: Device) -> tuple[float, TrainPlan]:
    """(cycles of all members' steps, plan), of impl "torch" where blocks cannot do it."""
    padded = [max(_next_power_of_2(width), 16) for width in recipe.widths]
    widest = max(padded)
    if widest not in BLOCK_LAYERS:
        return 0, TrainPlan("torch", f"a width of {max(recipe.widths)}: blocks take {max(BLOCK_LAYERS)}")
    layers = sum((k * n) ** 0.5 for k, n in itertools.pairwise(padded)) / widest
    heavy = _states(recipe) == 2 and sum(k * n for k, n in itertools.pairwise(padded)) > BLOCK_ADAM_WEIGHTS
    if heavy or layers > BLOCK_LAYERS[widest][_states(recipe)]:
        return 0, TrainPlan("torch", f"{'-'.join(map(str, recipe.widths))} with this optimizer spills in a block")
    # Beside the widest layers there is room for fewer samples.
    rows = 16 if batch <= 16 or widest == 64 else 32
    num_warps = 4 if widest == rows == 16 else 8
    waves = max(1.0, members / (12 // num_warps * device.units))
    reason = "one network per program, on chip for the whole loop"
    plan = TrainPlan("block", reason, rows, 1, num_warps)
    return BLOCK_CYCLES[widest] * layers * _cdiv(batch, rows) * waves, plan


@dataclass(frozen=True)
class LoopPlan:
    """How `loop.py` lays its buffers out, on how many threads it runs, and why.

    "joint": one network, the parameters of all layers as blocks of one matrix. "matrices": a matrix per layer, or a
    stack of them. "arrays": every single parameter an array over the members.
    """

    layout: str
    one_thread: bool
    reason: str


# Microseconds on one core, read off layouts that were timed against each other: 2-2-1, 2-10-10-10-1, 4-8-1 and others
# to 32-64-5, with 2 to 8,192 members. They decide between two layouts, so only their ratios count.
CALL_US = 1.5  # of torch, whatever it computes
ARRAY_MAC_US = 2.5e-4  # per multiply-add of an elementwise call over members
SMALL_PRODUCT_MAC_US = 2e-3  # per multiply-add of a stack of products that torch computes itself
SMALL_PRODUCT_MACS = 400  # from here on the BLAS does, at a price per product and another per multiply-add
PRODUCT_US, PRODUCT_MAC_US = 0.25, 4e-5
UPDATE_CALLS = {"sgd": 0, "momentum": 3, "adam": 7, "adamw": 7}  # elementwise, beside the products

# Multiply-adds of the one product of a joint update, those that nobody needs included, to which it costs less than
# several.
JOINT_MACS = 1 << 16
# Below these, a second thread waits longer for the first than it works; where cores are shared, far longer.
THREADED_MACS = 1 << 21  # of one product
THREADED_ELEMENTS = 1 << 17  # of one elementwise call


@functools.lru_cache(maxsize=1024)
def train_loop(members: int, batch: int, recipe: Recipe, shared: bool) -> LoopPlan:
    """The plan for the plain torch loop on batches of `batch` samples. shared: all members see the same ones."""
    layers = list(itertools.pairwise(recipe.widths))
    macs = [batch * n * k for k, n in layers]
    together = members * macs[0] if shared else 0  # the first layers of all members are one product
    one_thread = max(together, *macs) < THREADED_MACS and members * batch * max(recipe.widths[1:]) < THREADED_ELEMENTS
    if members == 1:
        joint = batch * sum(n for _, n in layers) * sum(k + 1 for k, _ in layers)
        if joint <= JOINT_MACS:
            return LoopPlan("joint", one_thread, "one small network: a product for all updates")
        return LoopPlan("matrices", one_thread, "one network: a product for each layer")
    update = UPDATE_CALLS["momentum" if recipe.momentum else recipe.optimizer]
    alone = layers[1:] if shared else layers
    # Forward, backward and update: three products of the same size.
    arrays = CALL_US * (update + sum(2 + k + n + batch for k, n in alone))
    arrays += members * ARRAY_MAC_US * sum(3 * batch * n * k for k, n in alone)
    matrices = CALL_US * (update * len(layers) + 5 * len(alone))
    matrices += members * sum(3 * _stacked_product_us(batch * n * k) for k, n in alone)
    if arrays < matrices:
        return LoopPlan("arrays", one_thread, "many members, whose products cost more one by one than their elements")
    return LoopPlan("matrices", one_thread, "few members or wide layers: stacks of products")


def _stacked_product_us(macs: int) -> float:
    return SMALL_PRODUCT_MAC_US * macs if macs < SMALL_PRODUCT_MACS else PRODUCT_US + PRODUCT_MAC_US * macs


# --- tables ----------------------------------------------------------------------------------------------------------

KINDS = ("half", "tf32", "ieee")
GENERATIONS = ("sm_80", "sm_90")
LAYER_TILES = {op: ("aligned", "ragged") for op in ("linear_act_fwd", "linear_act_bwd")}
MLP_TILES = {
    "mlp_infer": ("exact",),
    "mlp_fwd": ("exact", "in", "out", "both"),
    "mlp_bwd": ("exact", "in", "out", "both"),
}
CPU_RULES = ("forward", "dx", "dweight")
CPU_SIZES = ("small", "chunk_above_bytes", "chunk_bytes")


def _expect(holds: bool, where: str, found: object) -> None:
    if not holds:
        raise ValueError(f"{where}: {found!r:.80}")


def _count(value: object, least: int = 0, most: int = 1 << 62) -> bool:
    return type(value) is int and least <= value <= most


def _block_size(value: object) -> bool:
    return isinstance(value, int) and _count(value, 16, 256) and value & (value - 1) == 0


def _read_tiles(document: dict, ops: dict[str, tuple[str, ...]], chain: str, numbers: tuple[int, ...]) -> dict:
    """The content of a table of tiles: generation, op, kind of product, layout, widths, tile.

    chain: how widths are written. numbers: of what follows block_m and num_warps in a tile, the most that each may be.
    """
    tiles = document["tiles"]
    _expect(set(tiles) == set(GENERATIONS), "generations", list(tiles))
    for generation, own in tiles.items():
        _expect(set(own) == set(ops), f"{generation}, ops", list(own))
        for op, kind in itertools.product(ops, KINDS):
            where = f"{generation}, {op}, {kind}"
            _expect(set(own[op]) == set(KINDS), f"{generation}, {op}, kinds", list(own[op]))
            _expect(set(own[op][kind]) == set(ops[op]), f"{where}, layouts", list(own[op][kind]))
            for layout, rows in own[op][kind].items():
                for widths, row in rows.items():
                    matched = re.fullmatch(chain, widths) is not None
                    matched = matched and all(_block_size(int(width)) for width in re.split("[x-]", widths))
                    _expect(matched, f"{where}, {layout}, widths", widths)
                    fits = isinstance(row, list) and len(row) == 2 + len(numbers) and _block_size(row[0])
                    fits = fits and type(row[1]) is int and row[1] in (1, 2, 4, 8, 16)
                    fits = fits and all(map(_count, row[2:], itertools.repeat(0), numbers)) and min(row[2], row[-1]) > 0
                    _expect(fits, f"{where}, {layout}, {widths}", row)
    return document


def read_layer_tiles(document: dict) -> dict:
    """The content of `gpu_tiles.json`. Raises ValueError at what a plan could not use."""
    return _read_tiles(document, LAYER_TILES, r"\d{2,3}x\d{2,3}", (8, 32))


def read_mlp_tiles(document: dict) -> dict:
    """The content of `mlp_tiles.json`. Raises ValueError at what a plan could not use."""
    return _read_tiles(document, MLP_TILES, r"\d{2,3}(-\d{2,3})+", (8, 1, 32))


def read_cpu(document: dict) -> dict:
    """The content of `cpu.json`: vendor, dtype, thresholds. Raises ValueError at what a plan could not use."""
    thresholds = document["thresholds"]
    _expect(set(thresholds["any"]) == set(DTYPES), "any, dtypes", list(thresholds["any"]))
    for vendor, (dtype, own) in ((vendor, pair) for vendor, dtypes in thresholds.items() for pair in dtypes.items()):
        where = f"{vendor}, {dtype}"
        _expect(dtype in DTYPES, where, own)
        few = own.get("few_outputs", [0, 0])
        _expect(isinstance(few, list) and len(few) == 2, f"{where}, few_outputs", few)
        sizes = [own[size] for size in CPU_SIZES] + [own.get("thin", 0), *few]
        _expect(all(map(_count, sizes)), where, sizes)
        rules = [
            (own[name], {"min_macs", "min_width", "min_in"}, {"min_rows", "max_width", "max_in"}) for name in CPU_RULES
        ]
        for rule, needed, more in [*rules, (own.get("split"), {"rows", "min_in"}, {"max_outputs"})]:
            known = rule is None or needed <= set(rule) <= needed | more
            _expect(known and all(map(_count, (rule or {}).values())), where, rule)
    return document


_PLAIN = dict.fromkeys(CPU_SIZES, 1 << 62) | dict.fromkeys(CPU_RULES)


def _no_tiles(ops: dict[str, tuple[str, ...]]) -> dict:
    layouts = {op: {kind: {name: {} for name in names} for kind in KINDS} for op, names in ops.items()}
    return {"tiles": dict.fromkeys(GENERATIONS, layouts)}


# How each table is read, and what stands for one that cannot be: no tiles, no measurements, plain torch on a CPU.
READERS: dict[str, tuple[Callable[[dict], dict], dict]] = {
    "cpu.json": (read_cpu, {"thresholds": {"any": dict.fromkeys(DTYPES, _PLAIN)}}),
    "gpu_tiles.json": (read_layer_tiles, _no_tiles(LAYER_TILES)),
    "mlp_tiles.json": (read_mlp_tiles, _no_tiles(MLP_TILES)),
    "wide.json": (read_wide, {"candidates": {}, "devices": {}}),
}


@functools.cache
def _table(name: str) -> dict:
    """What the table of that name under `tuned/` holds. Says so, once, where that cannot be used, and does without."""
    read, without = READERS[name]
    try:
        return read(json.loads((TABLES / name).read_text(encoding="utf-8")))
    # Of a damaged file anything may be missing, or be of another type.
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        warnings.warn(f"perceptriton ignores {TABLES / name}: {type(error).__name__}: {error}", stacklevel=2)
        return without
