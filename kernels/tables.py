# SPDX-License-Identifier: Apache-2.0
"""The tables under `tuned/`, read and checked. One that no plan could use is ignored with a warning."""

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from .records import CHIPS, DTYPES, SPLITS, MlpTile, Tile, WideTile

TABLES = Path(__file__).parent / "tuned"
LAYER_TILES, MLP_TILES, WIDE_TILES = "gpu_tiles.json", "mlp_tiles.json", "wide.json"
LAUNCHES = "launches.json"

CPU_RULES = ("forward", "dx", "dweight")
CPU_SIZES = ("small", "chunk_above_bytes", "chunk_bytes")
# Bounds that a rule must have, and others that it may have.
RULE_BOUNDS = {"min_macs", "min_width", "min_in"}, {"min_rows", "max_width", "max_in"}
SPLIT_BOUNDS = {"rows", "min_in"}, {"max_outputs"}


# What a row of a table of tiles may say. A layout is how the operands of an op lie in memory: in whole rows of 16 bytes
# or not, in a network at either end, or so that TMA reads them.
BLOCKS = (16, 32, 64, 128, 256)
LAYOUTS = {
    "linear_act_fwd": ("aligned", "ragged", "tma"),
    "linear_act_bwd": ("aligned", "ragged"),
    "linear_act_dgrad": ("tma",),
    "linear_act_wgrad": ("tma",),
    "mlp_infer": ("exact",),
    "mlp_fwd": ("exact", "in", "out", "both"),
    "mlp_bwd": ("exact", "in", "out", "both"),
}
TILE_VALUES = {
    "chip": tuple(CHIPS),
    "op": tuple(LAYOUTS),
    "product": ("half", "tf32", "ieee", *SPLITS),
    "block_m": BLOCKS,
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": range(1, 9),
    "programs_per_sm": range(1, 33),
    "resident": (True, False),
    "subtiles": (1, 2),
    "flatten": (True, False),
}


def _one_of(name: str, value: object, values: Sequence[object]) -> None:
    # JSON's true and 1.0 equal the number 1 in Python, but are none in a table.
    if type(value) is not type(values[0]) or value not in values:
        raise ValueError(f"{name} of a tile: {value!r:.80} is none of {', '.join(map(str, values)):.80}")


@dataclass(frozen=True)
class TileRow:
    """A row of a table of tiles: what it is for, the tile, and how many programs of it fit on a multiprocessor.

    widths: of what a program holds, padded: in_features and out_features of a layer, those of all layers of a network,
    or block_k and block_n of a tile that travels by TMA. Raises ValueError at what no kernel could use.
    """

    chip: str
    op: str
    product: str  # kind of product, as in `plan.chips.product_kind`
    layout: str
    widths: tuple[int, ...]
    block_m: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    resident: bool = True  # of networks, see MlpTile
    subtiles: int = 1  # of tiles that travel by TMA, see WideTile
    flatten: bool = False

    def __post_init__(self) -> None:
        for name, values in TILE_VALUES.items():
            _one_of(name, getattr(self, name), values)
        _one_of("layout", self.layout, LAYOUTS[self.op])
        for width in self.widths:
            _one_of("widths", width, BLOCKS)
        _one_of("number of widths", len(self.widths), range(2, 65 if self.op.startswith("mlp") else 3))

    @property
    def layer_tile(self) -> Tile:
        return Tile(self.block_m, self.widths[1], self.widths[0], self.num_warps, self.num_stages)

    @property
    def wide_tile(self) -> WideTile:
        return WideTile(*astuple(self.layer_tile), subtiles=self.subtiles, flatten=self.flatten)

    @property
    def network_tile(self) -> MlpTile:
        return MlpTile(self.block_m, self.num_warps, self.num_stages, self.resident)


@dataclass(frozen=True)
class WideTiming:
    """What a device measured of a wide product of shape (m, k, n). Raises ValueError at what no plan could use."""

    shape: Sequence[int]
    tile: WideTile | None  # the fastest; None: the library was faster than all
    us: float  # of the fastest tile
    library_us: float
    splits: int = 1  # of the sum over k

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1 or self.splits not in (1, 2, 4, 8, 16):
            raise ValueError(f"not three sizes, or no power of 2: {self.shape!r:.80} in {self.splits!r:.80} splits")
        if not (self.us > 0 and self.library_us > 0):
            raise ValueError(f"times of {self.shape}: {self.us!r:.80} and {self.library_us!r:.80}")


def read_tiles(document: dict) -> dict:
    """A table of tiles: its rows in their order by chip, op, kind of product and layout.

    `columns` names the fields of TileRow that a row gives. Raises ValueError at what a plan could not use.
    """
    tiles: dict[tuple[str, ...], list[TileRow]] = {}
    for row in document["rows"]:
        own: dict[str, Any] = dict(zip(document["columns"], row, strict=True))
        own["widths"] = tuple(own["widths"])
        found = TileRow(**own)
        tiles.setdefault((found.chip, found.op, found.product, found.layout), []).append(found)
    _expect(bool(tiles), "no rows", document["rows"])
    return document | {"tiles": tiles}


def read_wide(document: dict) -> dict:
    """A table of tiles with what devices have measured of them. Raises ValueError at what a plan could not use.

    `devices`: a device's name (or a pattern of names, or a chip), what measured it, and per kind of product, written as
    for `wide_candidates`, the fields of WideTiming.
    """
    table = read_tiles(document)
    known: dict[tuple[str, ...], dict[tuple[int, ...], WideTile]] = {}
    for (_, *key), rows in table["tiles"].items():
        known.setdefault(tuple(key), {}).update((tuple(wide_row(row.wide_tile)), row.wide_tile) for row in rows)
    devices = {}
    for name, measured in document["devices"].items():
        missing = {"torch", "triton", "date", "rows"} - measured.keys()
        _expect(not missing, f"{name}, without", sorted(missing))
        timings: dict[str, list[WideTiming]] = {}
        for kind, rows in measured["rows"].items():
            tiles = known.get(wide_key(kind), {})
            _expect(bool(tiles), f"{name}, a kind of product without tiles", kind)
            for row in rows:
                tile = None if row["tile"] is None else tiles.get(tuple(row["tile"]))
                _expect(row["tile"] is None or tile is not None, f"{name}, {kind}, none of the tiles", row["tile"])
                timing = WideTiming(**row | {"tile": tile})
                _expect(timing.splits == 1 or not kind.startswith("dgrad"), f"{name}, {kind}, splits", timing.splits)
                timings.setdefault(kind, []).append(timing)
        devices[name] = measured | {"rows": timings}
    return table | {"devices": devices}


def wide_key(kind: str) -> tuple[str, str, str]:
    """(op, product, layout) of what `plan.wide_candidates` calls a kind."""
    of, product = kind.rpartition("-")[::2]
    return f"linear_act_{of or 'fwd'}", product, "tma"


def wide_row(tile: WideTile) -> list[int]:
    """A tile as measurements name it."""
    return [int(value) for value in astuple(tile)]


def tile_rows(name: str, chip: str, op: str, product: str, layout: str) -> list[TileRow]:
    """The rows of one table of tiles, the preferred one first."""
    return read_table(name)["tiles"].get((chip, op, product, layout), [])


def cpu_thresholds(dtype: str, vendor: str) -> dict | None:
    """What `cpu.json` says of a dtype on a vendor's CPUs, or else on any; None for dtypes that it does not know."""
    table = read_table("cpu.json")["thresholds"]
    return table.get(vendor, {}).get(dtype) or table["any"].get(dtype)


def _expect(holds: bool, where: str, found: object) -> None:
    if not holds:
        raise ValueError(f"{where}: {found!r:.80}")


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value <= 1 << 62


def read_cpu(document: dict) -> dict:
    """The content of `cpu.json`: vendor, dtype, thresholds. Raises ValueError at what a plan could not use."""
    thresholds = document["thresholds"]
    _expect(set(thresholds["any"]) == set(DTYPES), "any, dtypes", list(thresholds["any"]))
    for vendor, dtypes in thresholds.items():
        for dtype, own in dtypes.items():
            where = f"{vendor}, {dtype}"
            _expect(dtype in DTYPES, where, own)
            few = own.get("few_outputs", [0, 0])
            _expect(isinstance(few, list) and len(few) == 2, f"{where}, few_outputs", few)
            sizes = [own[size] for size in CPU_SIZES] + [own.get("thin", 0), *few]
            _expect(all(map(_count, sizes)), where, sizes)
            rules = [(own[name], *RULE_BOUNDS) for name in CPU_RULES]
            for rule, needed, more in [*rules, (own.get("split"), *SPLIT_BOUNDS)]:
                known = rule is None or needed <= set(rule) <= needed | more
                _expect(known and all(map(_count, (rule or {}).values())), where, rule)
    return document


def read_launches(document: dict) -> dict:
    """What devices, by name, have measured of eager calls. Raises ValueError at what nothing could be decided by.

    Of a layer and of a network: bytes of x and y, per layer, from which on kernels win, without gradients and with.
    """
    for name, measured in document["devices"].items():
        _expect({"torch", "triton", "date"} <= measured.keys(), f"{name}, keys", sorted(measured))
        for kind in ("layer", "network"):
            limits = measured[kind]
            _expect(len(limits) == 2 and all(map(_count, limits)), f"{name}, {kind}", limits)
    return document


def measured_limits(device: str) -> dict | None:
    """What `launches.json` has of the device of that name."""
    return read_table(LAUNCHES)["devices"].get(device)


_PLAIN = dict.fromkeys(CPU_SIZES, 1 << 62) | dict.fromkeys(CPU_RULES)

# How each table is read, and what stands for one that cannot be: no tiles, no measurements, plain torch on a CPU.
READERS: dict[str, tuple[Callable[[dict], dict], dict]] = {
    "cpu.json": (read_cpu, {"thresholds": {"any": dict.fromkeys(DTYPES, _PLAIN)}}),
    LAYER_TILES: (read_tiles, {"tiles": {}}),
    MLP_TILES: (read_tiles, {"tiles": {}}),
    WIDE_TILES: (read_wide, {"tiles": {}, "devices": {}}),
    LAUNCHES: (read_launches, {"devices": {}}),
}


@functools.cache
def read_table(name: str) -> dict:
    """What the table of that name under `tuned/` holds. Says so, once, where that cannot be used, and does without."""
    read, without = READERS[name]
    try:
        return read(json.loads((TABLES / name).read_text(encoding="utf-8")))
    # A damaged file may lack anything, or hold a value of another type anywhere.
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        warnings.warn(f"perceptriton ignores {TABLES / name}: {type(error).__name__}: {error}", stacklevel=2)
        return without
