# SPDX-License-Identifier: Apache-2.0
"""What the tuners share: the search for tiles that compile clean, and the one writer of all tables.

A tuner of tiles yields cells, lists of candidates in order of preference. Of each cell the first candidate is taken
that is clean in every launch that a plan may make: nothing spills, and shared memory suffices.

A tile must be clean on every triton that the project supports. With --resume the search of a cell starts at the tile
that the table has, and cells without one stay out: run once, then with --resume under the other versions.
"""

import argparse
import dataclasses
import datetime
import importlib
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import atomic
import torch

from perceptriton.kernels import tables
from perceptriton.kernels.tables import TileRow

# What stands for each kind of product when it is compiled: a dtype, and the precision of fp32 products.
PRODUCTS = {"half": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "ieee": (torch.float32, "ieee")}
# Chips whose programs take the tiles of another chip, and have to be clean too.
ALIKE = {"sm_86": ("sm_89",)}
# A value fits on a line of the tables up to this many characters.
LINE = 150


def text(value: object, indent: int = 0) -> str:
    """JSON in which everything that fits on a line is on one: a table to read and to diff."""
    line = json.dumps(value)
    if not isinstance(value, dict | list) or indent + len(line) <= LINE:
        return line
    if isinstance(value, dict):
        rows, brackets = [f"{json.dumps(key)}: {text(own, indent + 1)}" for key, own in value.items()], "{}"
    else:
        rows, brackets = [text(own, indent + 1) for own in value], "[]"
    pad = "\n" + " " * indent
    return brackets[0] + ",".join(f"{pad} {row}" for row in rows) + pad + brackets[1]


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def load(name: str, out: Path) -> dict:
    """The table that is to be brought up to date: at `out`, or where nothing is there the one that ships."""
    return json.loads((out if out.exists() else tables.TABLES / name).read_text())


def write(out: Path, document: dict, name: str | None = None) -> None:
    """name: of the table that it is. One that plans would refuse to read is not written, but raises what they meet."""
    if name is not None:
        tables.READERS[name][0](document)
    atomic.write(out, text(document) + "\n")


def with_rows(document: dict, rows: list[TileRow]) -> dict:
    """A table with these rows. Of what tiles may have left out, it has a column where any row needs one."""
    columns = [
        field.name
        for field in dataclasses.fields(TileRow)
        if field.default is dataclasses.MISSING or any(getattr(row, field.name) != field.default for row in rows)
    ]
    # Last, beside the tile.
    columns.append(columns.pop(columns.index("programs_per_sm")))
    return document | {"columns": columns, "rows": [[getattr(row, name) for name in columns] for row in rows]}


def rows_of(document: dict) -> list[TileRow]:
    return [row for rows in tables.read_tiles(document)["tiles"].values() for row in rows]


def cell_name(row: TileRow) -> str:
    widths = ("-" if row.op.startswith("mlp") else "x").join(map(str, row.widths))
    return f"{row.chip}/{row.op}/{row.product}/{row.layout}/{widths}"


def first_clean(tuner: str, candidates: list[TileRow]) -> TileRow | None:
    """The first candidate all of whose `launches` are `clean`, with the programs that fit on a multiprocessor."""
    own, aot = importlib.import_module(tuner), importlib.import_module("perceptriton.kernels.gpu.aot")
    for row in candidates:
        archs, fits = [int(chip.removeprefix("sm_")) for chip in (row.chip, *ALIKE.get(row.chip, ()))], []
        try:
            for arch, launch in itertools.product(archs, own.launches(row)):
                resources = aot.compile_for(arch, launch)
                if not own.clean(resources) or resources.shared > aot.SHARED_LIMIT[arch]:
                    break
                fits.append(resources.programs_per_sm(arch))
            else:
                return dataclasses.replace(row, programs_per_sm=min(fits))
        except Exception as error:  # a tile that the compiler refuses is not a candidate
            print(f"{cell_name(row)} {row}: {type(error).__name__}", file=sys.stderr)
    return None


def search(
    tuner: str, cells: Iterable[list[TileRow]], old: list[TileRow], only: str, resume: bool, processes: int | None
) -> list[TileRow]:
    """The row of every cell that has one, in the order of the cells."""
    cells, known = list(filter(None, cells)), {dataclasses.replace(row, programs_per_sm=1): row for row in old}
    if (only or resume) and (lost := known.keys() - set(itertools.chain.from_iterable(cells))):
        raise ValueError(f"no candidates any more, to be tuned without --only and --resume: {lost}")
    found: list[TileRow | None] = []
    tasks: list[tuple[int, list[TileRow]]] = []
    for candidates in cells:
        there = next((place for place, row in enumerate(candidates) if row in known), None)
        wanted = only in cell_name(candidates[0])
        if wanted and not (resume and there is None):
            tasks.append((len(found), candidates[there if resume else 0 :]))
        found.append(None if wanted or there is None else known[candidates[there]])
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        results = pool.map(first_clean, [tuner] * len(tasks), [candidates for _, candidates in tasks])
        for done, ((place, candidates), row) in enumerate(zip(tasks, results, strict=True), 1):
            print(f"{done}/{len(tasks)} {cell_name(candidates[0])} -> {row}", file=sys.stderr, flush=True)
            if row is not None and resume and (before := known.get(dataclasses.replace(row, programs_per_sm=1))):
                row = min(row, before, key=lambda own: own.programs_per_sm)
            found[place] = row
    return [row for row in found if row is not None]


def main(tuner: str, about: str, name: str, cells: Iterable[list[TileRow]], arguments: list[str]) -> None:
    """The command of a tuner of tiles: the module `tuner`, with `launches` and `clean`, for the table `name`."""
    parser = argparse.ArgumentParser(prog=f"tune.py {tuner.rpartition('.')[2]}", description=about.splitlines()[0])
    parser.add_argument("--out", type=Path, default=tables.TABLES / name, help="the table to bring up to date")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--resume", action="store_true", help="start at the tiles that the table has")
    parser.add_argument(
        "--only", default="", help="tune what this is part of, as in sm_90/linear_act_bwd/tf32; keep the rest"
    )
    options = parser.parse_args(arguments)
    document = load(name, options.out)
    rows = search(tuner, cells, rows_of(document), options.only, options.resume, options.processes)
    versions = {importlib.import_module("triton").__version__}
    versions.update(document["triton"] if options.resume or options.only else ())
    write(options.out, with_rows(document | {"triton": sorted(versions)}, rows), name)
