# SPDX-License-Identifier: Apache-2.0
"""The tables of the suites of bench_stacks.py: one of a run, and those of several machines side by side."""

import itertools
import statistics
from dataclasses import dataclass, field

from report_style import Scattered, digits, machine, provenance, scatter, table, times
from stack_cases import MODES

BASELINE, JUDGED = "eager", "fused"
TITLES = {"layers": "Layers", "mlp": "Networks", "kernelbench": "KernelBench"}
NOTES = {
    "kernelbench": "Inference in fp32. Log-sum-exp, row sum, scaling and residual are torch operations behind the "
    "layers, the same ones for every contender. A tensor-core split computes an fp32 product as several products of "
    "16-bit numbers, and TF32 rounds operands to 11 bits: neither is an fp32 product. `-eighth`: rows as published, "
    "every width an eighth of that, to suit a CPU."
}


@dataclass
class Row(Scattered):
    """One case, dtype and mode: what each contender needed, and the least that the machine's limits allow."""

    case: str
    shape: list[int]
    dtype: str
    mode: str
    us: dict[str, float] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)
    limit_us: float | None = None
    limit: str = ""  # what sets it: "arithmetic" or "memory"
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    predicted: dict[str, tuple[float, float]] = field(default_factory=dict)  # by a model of a chip: limit, own plan
    chip: str = ""  # that the model is of

    @property
    def sizes(self) -> str:
        """Rows and widths, long runs of equal ones counted."""
        runs = [(size, len(list(run))) for size, run in itertools.groupby(self.shape)]
        return " x ".join(
            " x ".join([f"{size:,}"] * count) if count < 10 else f"{size:,} ({count} times)" for size, count in runs
        )

    def reached(self, impl: str) -> float | None:
        """The share of the limit, from 0 to 1."""
        return None if self.limit_us is None or impl not in self.us else self.limit_us / self.us[impl]

    def over_eager(self, impl: str) -> str:
        """The speed-up of one, marked where its timings or eager's scattered; "" where it was not timed."""
        return times(self.speedup[impl], self.noisy(BASELINE, impl)) if impl in self.speedup else ""


def least_us(flops: int, traffic: int, dtype: str, limits: dict | None) -> tuple[float | None, str]:
    """The time under which no implementation can stay, in microseconds, and what sets it.

    Traffic counts only where it is at least twice the last-level cache: what fits there need not come from memory.
    Below a microsecond neither limit matters; launches do.
    """
    if not limits:
        return None, ""
    bounds = {}
    if rate := limits["flops_per_s"].get(dtype):
        bounds["arithmetic"] = 1e6 * flops / rate
    if traffic >= 2 * limits["last_level_cache_bytes"]:
        bounds["memory"] = 1e6 * traffic / limits["copy_bytes_per_s"]
    if not bounds or max(bounds.values()) < 1:
        return None, ""
    name = max(bounds, key=lambda bound: bounds[bound])
    return bounds[name], name


def read(document: dict) -> tuple[list[Row], dict[str, str]]:
    """The rows in the order of the file, and the label of each contender."""
    rows: dict[tuple, Row] = {}
    labels: dict[str, str] = {}
    for benchmark in document["benchmarks"]:
        info = benchmark["extra_info"]
        if "interleaved_us" not in info:
            continue
        row = rows.setdefault(
            (info["case"], info["dtype"], info["mode"]), Row(info["case"], info["shape"], info["dtype"], info["mode"])
        )
        limits = document["machine_info"].get("limits")
        row.limit_us, row.limit = least_us(info["flops"], info["bytes"], info["dtype"], limits)
        impl = info["impl"]
        labels[impl] = info["label"]
        row.us[impl] = info["interleaved_us"]
        row.errors[impl] = info.get("errors", {})
        if "predicted_us" in info:
            row.predicted[impl], row.chip = (info["predicted_limit_us"], info["predicted_us"]), info["predicted_chip"]
        if "speedup_over_eager" in info:
            row.speedup[impl] = info["speedup_over_eager"]
        row.spreads[impl] = info["interleaved_spread"]
    return list(rows.values()), labels


def means(rows: list[Row]) -> dict[str, float]:
    """Geometric means of the speed-ups over eager, by mode and over all rows."""
    every = "all rows"
    found = {
        name: [row.speedup[JUDGED] for row in rows if name in (row.mode, every) and JUDGED in row.speedup]
        for name in (*MODES, every)
    }
    return {name: statistics.geometric_mean(ratios) for name, ratios in found.items() if ratios}


def _microseconds(us: float) -> str:
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def markdown(document: dict) -> str:
    rows, labels = read(document)
    suite = document["machine_info"].get("suite", "layers")
    others = [impl for impl in labels if impl not in (BASELINE, JUDGED)]
    impls = [impl for impl in (BASELINE, JUDGED) if impl in labels]
    header = ["case", "rows x widths", "dtype", "mode", *(f"{labels[impl]}, us" for impl in impls), "speed-up"]
    header += ["share of the limit", *(f"{labels[impl]}, us" for impl in others)]
    predicted = next((row.chip for row in rows if JUDGED in row.predicted), "")
    header += [f"{predicted} model: limit, us", f"{labels[JUDGED]}, us"] if predicted else []
    lines = []
    for row in rows:
        cells = [row.case, row.sizes, row.dtype, row.mode]
        cells += [_microseconds(row.us[impl]) if impl in row.us else "" for impl in impls]
        ratio = f"**{row.speedup[JUDGED]:.2f}x**" if JUDGED in row.speedup else ""
        cells.append(ratio + (" ~" if ratio and row.noisy(BASELINE, JUDGED) else ""))
        reached = row.reached(JUDGED)
        cells.append("" if reached is None else f"{reached:.0%}, {row.limit}")
        for impl in others:
            ratio = f" ({row.speedup[impl]:.2f}x)" if impl in row.speedup else ""
            cells.append(_microseconds(row.us[impl]) + ratio if impl in row.us else "")
        if predicted:
            cells += map(_microseconds, row.predicted[JUDGED]) if JUDGED in row.predicted else ["", ""]
        lines.append(cells)

    text = [f"# {TITLES[suite]}: {machine(document)}", ""]
    if mean := means(rows):
        listed = ", ".join(f"{name} {value:.2f}x" for name, value in mean.items())
        text += [f"Geometric mean of the speed-ups over eager torch: {listed}.", ""]
    text += [*table(header, 4, lines), ""]
    if any("worst" in errors for row in rows for errors in row.errors.values()):
        text += [*_accuracy(rows, labels), ""]
    if note := NOTES.get(suite):
        text.append(note)
    text.append(
        "Median times per call, all contenders of a row timed in turn; a speed-up is the median over the rounds of the "
        "ratio within a round. Rows not clearly above 1x were timed three times, and the median run is shown."
    )
    if any(row.noisy(BASELINE, JUDGED) for row in rows):
        text.append(scatter())
    if limits := document["machine_info"].get("limits"):
        rates = ", ".join(f"{name} products {rate / 1e9:,.0f} Gflop/s" for name, rate in limits["flops_per_s"].items())
        text.append(
            f"Limits, measured in the same run: {rates}; a copy {limits['copy_bytes_per_s'] / 1e9:,.0f} GB/s. Memory "
            "counts only where the traffic is at least twice the last-level cache, and no limit under 1 us is shown."
        )
    if predicted:
        text.append(
            f"{predicted} model: the time that flops, bytes and special functions take at peak rates, for the slowest "
            "of them alone and for the plan that was taken (`perceptriton.kernels.explain`). It is not a measurement."
        )
    if missed := document["machine_info"].get("missed"):
        text.append(f"Not timed, since they miss the truth: {'; '.join(missed)}.")
    text.append(provenance(document))
    return "\n".join(text) + "\n"


def _accuracy(rows: list[Row], labels: dict[str, str]) -> list[str]:
    """A table of every contender's errors where cases have a tolerance, and of what a model predicts for it."""
    predicted = next((row.chip for row in rows if row.predicted), "")
    header = ["case", "contender", "error", "worst element, tolerances"]
    header += [f"{predicted} model: limit, us", "own plan, us"] if predicted else []
    lines = []
    for row in rows:
        for impl in row.us:
            errors = row.errors[impl]
            worst = f"{errors['worst']:.2g}" + (", beyond it" if errors["worst"] > 1 else "")
            cells = [row.case, labels[impl], f"{errors['y']:.1e}", worst]
            if predicted:
                cells += map(_microseconds, row.predicted[impl]) if impl in row.predicted else ["", ""]
            lines.append(cells)
    text = (
        "Errors against fp64: as a relative norm, of what varies from row to row; and of the worst element, in units "
        "of what KernelBench lets pass, 1e-4 absolute and as much relative."
    )
    return [*table(header, 2, lines), "", text]


def layers_by_machine(documents: dict[str, dict]) -> list[str]:
    """The speed-ups of layers in fp32, and torch.compile's, in the order of the first machine's cases."""
    (first, *_), found = documents, {name: _by_case(document) for name, document in documents.items()}
    header = ["rows x widths", "mode", *documents, f"torch.compile, {first}", *list(documents)[1:]]
    lines = []
    for key, row in found[first].items():
        cells = [own[key].over_eager(impl) for impl in (JUDGED, "compiled") for own in found.values()]
        lines.append([row.sizes, row.mode, *cells])
    return table(header, 2, lines)


def networks_by_machine(documents: dict[str, dict]) -> list[str]:
    """Of every network the case of most rows in fp32: the first machine's times, and all speed-ups."""
    (first, *others), found = documents, {name: _by_case(document) for name, document in documents.items()}
    header = ["rows x widths"]
    for mode in MODES:
        header += [f"{mode}, {first}, us", "speed-up", *others]
    largest = {tuple(row.shape[1:]): row.case for row in sorted(found[first].values(), key=lambda row: row.shape[0])}
    lines = []
    for case in dict.fromkeys(case for case, _ in found[first] if case in largest.values()):
        rows, *sizes = found[first][case, MODES[0]].shape
        cells = [f"{rows:,} x {'-'.join(map(str, sizes))}"]
        for mode in MODES:
            cells.append(digits(found[first][case, mode].us[JUDGED]))
            cells += [own[case, mode].over_eager(JUDGED) for own in found.values()]
        lines.append(cells)
    return table(header, 1, lines)


def _by_case(document: dict) -> dict[tuple[str, str], Row]:
    return {(row.case, row.mode): row for row in read(document)[0] if row.dtype == "float32"}
