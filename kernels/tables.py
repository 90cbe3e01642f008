"""The tables under `tuned/`, read and checked. One that no plan could use is ignored with a warning."""

import functools
import itertools
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

from .records import DTYPES, WideTile

TABLES = Path(__file__).parent / "tuned"


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


def cpu_thresholds(dtype: str, vendor: str) -> dict | None:
    """What `cpu.json` says of a dtype on a vendor's CPUs, or else on any; None for dtypes that it does not know."""
    table = read_table("cpu.json")["thresholds"]
    return table.get(vendor, {}).get(dtype) or table["any"].get(dtype)


def wide_tile(row: list[int]) -> WideTile:
    """The tile that `wide_row` wrote."""
    *sizes, flatten, specialize = row
    return WideTile(*sizes, flatten=bool(flatten), specialize=bool(specialize))


def wide_row(tile: WideTile) -> list[int]:
    """A tile as `wide.json` writes it."""
    return [int(value) for value in astuple(tile)]


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
def read_table(name: str) -> dict:
    """What the table of that name under `tuned/` holds. Says so, once, where that cannot be used, and does without."""
    read, without = READERS[name]
    try:
        return read(json.loads((TABLES / name).read_text(encoding="utf-8")))
    # Of a damaged file anything may be missing, or be of another type.
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        warnings.warn(f"perceptriton ignores {TABLES / name}: {type(error).__name__}: {error}", stacklevel=2)
        return without
