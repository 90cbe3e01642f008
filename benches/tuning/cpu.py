# SPDX-License-Identifier: Apache-2.0
"""Measures torch's two CPU matrix libraries against each other and fits the thresholds that plans read.

usage: python benches/tune.py cpu [--quick] [--dtypes float32,bfloat16] [--out kernels/tuned/cpu.json]

For this CPU's vendor and each dtype, over a grid of shapes and with both sides of every comparison timed in turn:

    forward, dx, dweight         the product by torch.mm against oneDNN: rules for each role
    split                        dweight by the faster of both against a part of the rows per thread: `split`
    small_forward, small_both    plain torch operations against the explicit forward, and forward + backward: `small`
    chunk_<bytes>                dz whole against dz in pieces of that size: `chunk_above_bytes`, `chunk_bytes`

`few_outputs` and `thin` are set by hand, from whole layers and networks: what they say depends on what memory a process
has had before, so each is timed in a process of its own.

The table keeps what it holds of other kinds and dtypes. The rows behind the thresholds go to a file that is not
shipped, benches/results/tune-cpu-<kind>.json: [role, rows, in_features, out_features, us of either side].
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import binding  # before torch
import numpy as np
import timing
import torch

from perceptriton.kernels import crossover, devices, plan, records, reference, small, tables
from perceptriton.kernels.records import Device, Plan
from perceptriton.mlp import linear_sigmoid

from . import common

ROLES = ("forward", "dx", "dweight")
RESULTS = Path(__file__).parents[1] / "results"
NEVER = 1 << 62
MEGABYTE = 1 << 20


Shape = tuple[int, int, int]  # m, k, n


class Row(NamedTuple):
    role: str
    m: int
    k: int
    n: int
    first_us: float
    second_us: float

    @property
    def macs(self) -> int:
        return self.m * self.k * self.n


# --- the grid ----------------------------------------------------------------------------------------------

# Widths in all pairs, widths in squares only, and pairs that real networks have.
PAIRED = (1, 8, 16, 64, 256, 1024)
SQUARE = (2, 32, 128, 512)
ODD = ((784, 128), (128, 10), (100, 50), (300, 200))
ROWS = (64, 128, 256, 1024, 4096, 16_384, 65_536)


def grid(quick: bool) -> list[Shape]:
    """Shapes (m, k, n), none of which takes more than some 40 ms on two cores."""
    if quick:
        pairs = [(width, width) for width in (8, 64, 256, 1024)] + [(256, 16), (16, 256), (512, 1), (784, 128)]
        rows = (128, 1024, 16_384)
    else:
        pairs = list(itertools.product(PAIRED, PAIRED)) + [(width, width) for width in SQUARE] + list(ODD)
        rows = ROWS
    return [(m, k, n) for m in rows for k, n in pairs if 1 << 14 <= m * k * n <= 1 << 32 and m * (k + n) <= 1 << 25]


def by_role(shapes: list[Shape], itemsize: int) -> dict[str, list[Shape]]:
    """On which shapes of the grid each comparison is made."""
    threads, macs = torch.get_num_threads(), {shape: math.prod(shape) for shape in shapes}
    products = [shape for shape in shapes if macs[shape] >= 1 << 17]
    # Closely where an explicit backward costs as much as it saves, and now and then beyond.
    small = [shape for shape in shapes if 1 << 15 <= macs[shape] <= 1 << 25]
    small += [shape for shape in shapes if 1 << 25 < macs[shape] <= 1 << 30][::4]
    return {
        "products": products,
        "split": [shape for shape in products if threads > 1 and shape[0] >= 128 * threads],
        "small": small,
        "chunk": [(m, k, n) for m, k, n in shapes if m > 2048 and m * n * itemsize >= MEGABYTE],
    }


CHUNK_BYTES = (256 << 10, MEGABYTE // 2, MEGABYTE, 2 * MEGABYTE, 4 * MEGABYTE)

# --- both sides of each comparison -------------------------------------------------------------------------


class Tensors:
    def __init__(self, m: int, k: int, n: int, dtype: torch.dtype) -> None:
        # One block of numbers over and over: to draw them all takes longer than to time the products.
        block = torch.randn(65_537, generator=torch.Generator().manual_seed(0)).to(dtype)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            size = math.prod(shape)
            return block.repeat(-(-size // block.numel()))[:size].view(shape).mul(scale)

        self.x, self.weight, self.bias = normal(m, k), normal(n, k, scale=1.4 / k**0.5), normal(n)
        self.y, self.dy = torch.sigmoid(normal(m, n)), normal(m, n)


def backward_steps(t: Tensors, plans: dict[str, Plan], act: str, wanted: tuple[bool, ...]) -> dict[str, timing.Step]:
    return {
        name: lambda own=own: reference.linear_act_bwd(t.dy, t.y, t.x, t.weight, act, wanted, own)
        for name, own in plans.items()
    }


def product_steps(role: str, t: Tensors) -> dict[str, timing.Step]:
    plans = {
        gemm: Plan("explicit", "", forward_gemm=gemm, dx_gemm=gemm, dweight_gemm=gemm) for gemm in ("mm", "onednn")
    }
    if role == "forward":
        return {
            gemm: lambda own=own: reference.linear_act_fwd(t.x, t.weight, t.bias, "sigmoid", own)
            for gemm, own in plans.items()
        }
    # The backward pass of the identity is the product alone.
    return backward_steps(t, plans, "identity", (role == "dx", role == "dweight", False))


def split_steps(gemm: str, tensors: Tensors) -> dict[str, timing.Step]:
    sides = {"product": 0, "split": 1}
    plans = {name: Plan("explicit", "", dweight_gemm=gemm, split_rows=rows) for name, rows in sides.items()}
    return backward_steps(tensors, plans, "identity", (False, True, False))


@contextlib.contextmanager
def in_force(thresholds: dict) -> Iterator[None]:
    """Inside, the package plans by these thresholds, for every dtype."""

    def forget():
        tables.read_table.cache_clear()
        plan.linear_act_fwd.cache_clear()
        plan.linear_act_bwd.cache_clear()
        crossover.cpu_rows.cache_clear()
        small.few_elements.cache_clear()

    before, question = tables.TABLES, small.few_elements
    with tempfile.TemporaryDirectory() as folder:
        table = {"thresholds": {"any": dict.fromkeys(records.DTYPES, thresholds)}}
        Path(folder, "cpu.json").write_text(json.dumps(table))
        tables.TABLES = Path(folder)
        forget()
        try:
            yield
        finally:
            tables.TABLES, small.few_elements = before, question
            forget()


def small_steps(role: str, tensors: Tensors) -> dict[str, timing.Step]:
    """To be timed inside `in_force` with `small` at 0."""
    x, weight, bias = (t.detach().clone() for t in (tensors.x, tensors.weight, tensors.bias))
    dy = tensors.dy
    leaves = (x, weight, bias)
    training = role == "small_both"
    for leaf in leaves:
        leaf.requires_grad_(training)

    def side(torch_wins: bool) -> timing.Step:
        def forward():
            small.few_elements = answers[torch_wins]
            return linear_sigmoid(x, weight, bias)

        def both():
            for leaf in leaves:
                leaf.grad = None
            forward().backward(dy)

        return both if training else forward

    answers = (lambda *_: 0), (lambda *_: NEVER)
    return {"aten": side(True), "explicit": side(False)}


def chunk_steps(m: int, k: int, n: int, dtype: str, thresholds: dict, tensors: Tensors) -> dict[str, timing.Step]:
    def planned(above: int, size: int) -> Plan:
        with in_force(thresholds | {"small": 0, "chunk_above_bytes": above, "chunk_bytes": size}):
            return plan.linear_act_bwd(m, k, n, dtype, "ieee", Device("cpu"))

    pieces = {f"chunk_{size}": planned(0, size) for size in CHUNK_BYTES}
    pieces = {name: own for name, own in pieces.items() if own.chunk < m}
    return backward_steps(tensors, {"whole": planned(NEVER, MEGABYTE)} | pieces, "sigmoid", (True, True, True))


# --- the fit -----------------------------------------------------------------------------------------------

# A choice slower than its alternative by more than this counts double: nobody thanks for a loss.
LOSS = 1.03


def preference(rows: list[Row]) -> np.ndarray:
    """What choosing the second side costs over choosing the first, in log time, per row; negative where it gains."""
    ratio = np.log(np.array([row.second_us / row.first_us for row in rows], dtype=float))
    # No row outvotes all others because the machine was disturbed just then.
    ratio = ratio.clip(-math.log(4), math.log(4))
    return np.where(np.abs(ratio) > math.log(LOSS), 2 * ratio, ratio)


# A bound from above has to gain this much over all rows: shapes beyond the grid, of which no row tells, fall outside.
WORTH = 0.01


def fit_rule(rows: list[Row]) -> dict | None:
    """The rule for taking oneDNN (second) over mm (first): bounds that `plan.cpu.within` reads; None: never.

    Rules that choose alike in all rows tie, and the most reluctant of them wins.
    """
    cost = preference(rows)
    width, inputs = np.array([min(row.k, row.n) for row in rows]), np.array([row.k for row in rows])
    counts = [1 << i for i in range(32, 9, -1)]
    costs = cost * (np.array([row.macs for row in rows]) >= np.array(counts)[:, None])
    best, rule = -1e-9, None
    widths = [512, 256, 128, 96, 64, 32, 16, 8, 4, 2, 1]
    upper = [NEVER, *widths[:7]]
    for max_width, max_in, min_width, min_in in itertools.product(upper, upper, widths, widths):
        if min_in < min_width:
            continue
        bounds = {"max_width": max_width, "max_in": max_in}
        bounds = {name: bound for name, bound in bounds.items() if bound != NEVER}
        inside = (width >= min_width) & (inputs >= min_in) & (width <= max_width) & (inputs <= max_in)
        totals = costs @ inside + WORTH * len(rows) * len(bounds)
        if totals.min() < best - 1e-9:
            least = int((totals < totals.min() + 1e-9).argmax())
            best, rule = totals[least], {"min_macs": counts[least], "min_width": min_width, "min_in": min_in} | bounds
    return rule


def fit_small(rows: list[Row]) -> int:
    """The number of multiply-adds from which the explicit path (second) is taken over plain operations (first)."""
    cost, macs = preference(rows), np.array([row.macs for row in rows])
    candidates = [NEVER, *(1 << i for i in range(32, 9, -1))]
    return min(candidates, key=lambda limit: round(cost[macs >= limit].sum(), 9))


def fit_split(rows: list[Row], threads: int) -> dict | None:
    """The rule for giving each thread rows of its own (second): how many, and bounds for `within`; None: never."""
    cost, m = preference(rows), np.array([row.m for row in rows])
    inputs, outputs = np.array([row.k for row in rows]), np.array([row.k * row.n for row in rows])
    best, rule = -1e-9, None
    for max_outputs in (NEVER, *(1 << i for i in range(20, 5, -1))):
        above = 0.0 if max_outputs == NEVER else WORTH * len(rows)
        for least, min_in in itertools.product((1 << i for i in range(20, 5, -1)), (256, 128, 64, 32, 16, 8, 4, 2, 1)):
            inside = (m >= least * threads) & (inputs >= min_in) & (outputs <= max_outputs)
            total = cost[inside].sum() + above
            if total < best - 1e-9:
                best, rule = total, {"rows": least, "min_in": min_in}
                if max_outputs != NEVER:
                    rule["max_outputs"] = max_outputs
    return rule


def fit_chunks(rows: list[Row], itemsize: int) -> tuple[int, int]:
    """(chunk_above_bytes, chunk_bytes) from rows whose role is chunk_<bytes> (second) against dz whole (first)."""
    found = []
    for size in sorted({int(row.role.removeprefix("chunk_")) for row in rows}):
        own = [row for row in rows if row.role == f"chunk_{size}"]
        cost, traffic = preference(own), np.array([row.m * row.n * itemsize for row in own])
        for above in (NEVER, *(MEGABYTE << i for i in range(9, -1, -1))):
            found.append((round(cost[traffic > above].sum(), 9), -above, -size))
    return (-min(found)[1], -min(found)[2]) if found else (NEVER, MEGABYTE)


def quality(rows: list[Row], takes_second: Callable[[Row], bool]) -> str:
    """How good a choice is over the rows: against always taking the first side, and against the best of each row."""
    if not rows:
        return "no rows"
    chosen = np.array([row.second_us if takes_second(row) else row.first_us for row in rows])
    first, best = np.array([row.first_us for row in rows]), np.array([min(row[-2:]) for row in rows])
    gain, possible = (np.exp(np.log(first / times).mean()) for times in (chosen, best))
    worse = chosen / first
    text = f"{gain:.3f}x of {possible:.3f}x possible over {len(rows)} rows"
    if count := int((worse > LOSS).sum()):
        at = rows[int(worse.argmax())]
        text += f"; {count} lose, by up to {worse.max() - 1:.0%} ({at.m}x{at.k}x{at.n})"
    return text


def takes(rule: dict | None) -> Callable[[Row], bool]:
    return lambda row: plan.cpu.within(rule, row.m, row.k, row.n)


# --- the measurement ---------------------------------------------------------------------------------------


class Progress:
    """Shares out the time, and writes a line on stderr at a terminal."""

    def __init__(self, total: int, seconds: float) -> None:
        self.left, self.total = total, total
        self.deadline = time.monotonic() + seconds

    def timed(self, steps: dict[str, timing.Step], what: str, shares: int = 1) -> dict[str, float]:
        """Median microseconds of each side. What earlier comparisons took too much of, later ones get less of."""
        seconds = shares * max(0.0, self.deadline - time.monotonic()) / max(1, self.left)
        samples = timing.interleaved(steps, seconds=seconds, batch_seconds=5e-4, rounds=(5, 101)) if steps else {}
        self.left -= 1
        if sys.stderr.isatty():
            remaining = max(0.0, self.deadline - time.monotonic())
            end = "" if self.left else "\n"
            sys.stderr.write(f"\r\x1b[K{self.total - self.left}/{self.total}  {remaining:4.0f} s left  {what}{end}")
            sys.stderr.flush()
        return {name: 1e6 * own.seconds for name, own in samples.items()}


def measure(dtype: str, grid: list[Shape], progress: Progress) -> tuple[dict, list[Row]]:
    """The thresholds of one dtype and the rows behind them."""
    torch_dtype = getattr(torch, dtype)
    shapes, rows = by_role(grid, torch_dtype.itemsize), []
    for m, k, n in shapes["products"]:
        tensors = Tensors(m, k, n, torch_dtype)
        for role in ROLES:
            us = progress.timed(product_steps(role, tensors), f"{dtype} {role} {m}x{k}x{n}")
            rows.append(Row(role, m, k, n, us["mm"], us["onednn"]))

    def found(role: str, least: int = 0) -> list[Row]:
        return [row for row in rows if row.role.startswith(role) and row.macs >= least]

    def fit_products(small: int) -> dict:
        return {role: fit_rule(found(role, small)) for role in ROLES}

    thresholds = {"small": 0, **fit_products(0), "chunk_above_bytes": NEVER, "chunk_bytes": MEGABYTE}
    for m, k, n in shapes["split"]:
        gemm = "onednn" if plan.cpu.within(thresholds["dweight"], m, k, n) else "mm"
        us = progress.timed(split_steps(gemm, Tensors(m, k, n, torch_dtype)), f"{dtype} split {m}x{k}x{n}")
        rows.append(Row("split", m, k, n, us["product"], us["split"]))
    threads = torch.get_num_threads()
    thresholds["split"] = fit_split(found("split"), threads)
    with in_force(thresholds):
        for m, k, n in shapes["small"]:
            tensors = Tensors(m, k, n, torch_dtype)
            for role in ("small_forward", "small_both"):
                us = progress.timed(small_steps(role, tensors), f"{dtype} {role} {m}x{k}x{n}")
                rows.append(Row(role, m, k, n, us["aten"], us["explicit"]))
    thresholds["small"] = fit_small(found("small_"))
    # Products that never take the explicit path have no say in its rules.
    thresholds |= fit_products(thresholds["small"])
    thresholds["split"] = fit_split(found("split", thresholds["small"]), threads)

    chunked = []
    for m, k, n in shapes["chunk"]:
        explicit = m * k * n >= thresholds["small"]
        sides = chunk_steps(m, k, n, dtype, thresholds, Tensors(m, k, n, torch_dtype)) if explicit else {}
        us = progress.timed(sides, f"{dtype} chunks {m}x{k}x{n}", 2)
        chunked += [Row(side, m, k, n, us["whole"], us[side]) for side in us if side != "whole"]
    thresholds["chunk_above_bytes"], thresholds["chunk_bytes"] = fit_chunks(chunked, torch_dtype.itemsize)
    return thresholds, rows + chunked


def summary(thresholds: dict, rows: list[Row], itemsize: int) -> list[str]:
    small, split, threads = thresholds["small"], thresholds["split"], torch.get_num_threads()
    above, size = thresholds["chunk_above_bytes"], thresholds["chunk_bytes"]

    def line(role: str, said: object, takes_second: Callable[[Row], bool], least: int = 0) -> str:
        own = [row for row in rows if row.role.startswith(role) and row.macs >= least]
        return f"{role.partition('_')[0]:9} {said}: {quality(own, takes_second)}"

    return [
        *(line(role, thresholds[role], takes(thresholds[role]), small) for role in ROLES),
        line("split", split, lambda row: takes(split)(row) and row.m >= split["rows"] * threads, small),
        line("small_", small, lambda row: row.macs >= small),
        line(f"chunk_{size}", f"{size} above {above}", lambda row: row.m * row.n * itemsize > above),
    ]


def count(grid: list[Shape], dtypes: list[str]) -> int:
    """Comparisons: three for each product, two for each small shape."""
    times = {"products": 3, "split": 1, "small": 2, "chunk": 1}
    found = [by_role(grid, getattr(torch, dtype).itemsize) for dtype in dtypes]
    return sum(times[role] * len(shapes) for own in found for role, shapes in own.items())


def merge(document: dict, vendor: str, thresholds: dict[str, dict], facts: dict) -> dict:
    """The document with this vendor's entries for the dtypes that were measured, and everything else as it was."""
    known = document["thresholds"]
    return document | {
        "thresholds": known | {vendor: known.get(vendor, {}) | thresholds},
        "measured": document.get("measured", {}) | {vendor: facts},
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tune.py cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=tables.TABLES / "cpu.json", help="the table to bring up to date")
    parser.add_argument("--rows", type=Path, help="what was measured; default: benches/results/tune-cpu-<kind>.json")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="a coarse grid in a minute, to try the script out")
    parser.add_argument("--seconds", type=float, help="for the whole run; default: 420, or 50 with --quick")
    options = parser.parse_args(arguments)
    if binding.LATE:
        parser.error(binding.LATE)
    vendor = devices.cpu_kind()
    if not vendor:
        parser.error("torch does not tell this CPU's name, so the plans could not find the table")
    if reference.onednn_linear() is None:
        parser.error("this torch has no oneDNN product: there is nothing to choose between")

    dtypes = options.dtypes.split(",")
    shapes = grid(options.quick)
    progress = Progress(count(shapes, dtypes), options.seconds or (50 if options.quick else 420))
    found = {}
    for dtype in dtypes:
        found[dtype] = measure(dtype, shapes, progress)
        print(dtype, *summary(*found[dtype], getattr(torch, dtype).itemsize), sep="\n    ")
    facts = {
        "machine": torch.cpu.get_capabilities()["cpu_name"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": common.today(),
        "quick": options.quick,
    }
    thresholds = {dtype: own for dtype, (own, _) in found.items()}
    rows = {dtype: [[*row[:4], round(row[4], 1), round(row[5], 1)] for row in own] for dtype, (_, own) in found.items()}
    kept = options.rows or RESULTS / f"tune-cpu-{vendor.lower().replace(' ', '-')}.json"
    common.write(kept, facts | {"vendor": vendor, "rows": rows})
    common.write(options.out, merge(common.load("cpu.json", options.out), vendor, thresholds, facts), "cpu.json")
    print("written:", options.out, kept)
