"""Turns the benchmark suite's JSON into a table in Markdown and two pictures.

usage: python benches/report.py FILE.json [--out DIR]
"""

import argparse
import io
import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import atomic
from stack_cases import MODES

BASELINE, JUDGED = "eager", "fused"
TITLES = {"layers": "Layers", "mlp": "Networks", "kernelbench": "KernelBench"}
NOTES = {
    "kernelbench": "Inference in fp32. Log-sum-exp, row sum, scaling and residual are torch operations behind the "
    "layers, the same ones for every contender. A tensor-core split computes an fp32 product as several products of "
    "16-bit numbers, and TF32 rounds operands to 11 bits: neither is an fp32 product. `-eighth`: rows as published, "
    "every width an eighth of that, to suit a CPU."
}

# Okabe and Ito's palette, told apart by every kind of colour vision.
COLOURS = {"forward": "#0072B2", "forward+backward": "#E69F00"}
INK, FAINT = "#333333", "#BBBBBB"
IMPL_STYLES = {
    "eager": ("#999999", "o-"),
    "fused": ("#D55E00", "o-"),
    "compiled": ("#0072B2", "D--"),
    "autotuned": ("#56B4E9", "s--"),
    "eager_graph": ("#666666", "o:"),
    "fused_graph": ("#E69F00", "^:"),
}
MARKS = {
    "compiled": "D",
    "autotuned": "s",
    "eager_graph": "o",
    "fused_graph": "^",
    "eager_tf32": "v",
    "split_bf16x6": "P",
    "split_bf16x3": "X",
}

# A row whose timings scattered more than this (interquartile range over median) is marked.
NOISY = 0.15


@dataclass
class Row:
    """One case, dtype and mode: what each contender needed, and the least that the machine's limits allow."""

    case: str
    shape: list[int]
    dtype: str
    mode: str
    us: dict[str, float] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)
    attempts: int = 1
    spread: float = 0.0
    limit_us: float | None = None
    limit: str = ""  # what sets it: "arithmetic" or "memory"
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    predicted: dict[str, tuple[float, float]] = field(default_factory=dict)  # by a model of an H200: limit, own plan

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
            row.predicted[impl] = info["predicted_limit_us"], info["predicted_us"]
        if "speedup_over_eager" in info:
            row.speedup[impl] = info["speedup_over_eager"]
            row.attempts = len(info["speedups_over_eager"])
        if impl in (BASELINE, JUDGED):
            row.spread = max(row.spread, info["interleaved_spread"])
    return list(rows.values()), labels


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def means(rows: list[Row]) -> dict[str, float]:
    """Geometric means of the speed-ups over eager, by mode and over all rows."""
    found = {
        mode: geometric_mean([row.speedup[JUDGED] for row in rows if row.mode == mode and JUDGED in row.speedup])
        for mode in MODES
    }
    found["all rows"] = geometric_mean([row.speedup[JUDGED] for row in rows if JUDGED in row.speedup])
    return {name: mean for name, mean in found.items() if not math.isnan(mean)}


def suite(document: dict) -> str:
    return document["machine_info"].get("suite", "layers")


def machine(document: dict) -> str:
    """One line: device, versions, threads, date."""
    info = document["machine_info"]
    if gpu := info.get("gpu"):
        driver = f", driver {gpu['driver']}" if gpu.get("driver") else ""
        device = f"{gpu['name']} (compute capability {gpu['capability']}{driver})"
    else:
        kind = info.get("cpu_kind", "")
        device = info["cpu"].get("brand_raw", info["machine"])
        # "AMD EPYC" alone leaves open which.
        device += f" ({kind})" if " " in kind else ""
        device += f", threads: {info['threads']}"
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items() if version)
    quick = "; quick run" if info.get("quick") else ""
    return f"{device}; {versions}; {document['datetime'][:10]}{quick}"


def _microseconds(us: float) -> str:
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def markdown(document: dict) -> str:
    rows, labels = read(document)
    others = [impl for impl in labels if impl not in (BASELINE, JUDGED)]
    impls = [impl for impl in (BASELINE, JUDGED) if impl in labels]
    header = ["case", "rows x widths", "dtype", "mode", *(f"{labels[impl]}, us" for impl in impls), "speed-up"]
    header += ["share of the limit", *(f"{labels[impl]}, us" for impl in others)]
    predicted = any(JUDGED in row.predicted for row in rows)
    header += ["H200 model: limit, us", f"{labels[JUDGED]}, us"] if predicted else []
    lines = _head(header, 4)
    for row in rows:
        cells = [row.case, row.sizes, row.dtype, row.mode]
        cells += [_microseconds(row.us[impl]) if impl in row.us else "" for impl in impls]
        ratio = f"**{row.speedup[JUDGED]:.2f}x**" if JUDGED in row.speedup else ""
        cells.append(ratio + (" ~" if ratio and row.spread > NOISY else ""))
        reached = row.reached(JUDGED)
        cells.append("" if reached is None else f"{reached:.0%}, {row.limit}")
        for impl in others:
            ratio = f" ({row.speedup[impl]:.2f}x)" if impl in row.speedup else ""
            cells.append(_microseconds(row.us[impl]) + ratio if impl in row.us else "")
        if predicted:
            cells += map(_microseconds, row.predicted[JUDGED]) if JUDGED in row.predicted else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")

    text = [f"# {TITLES[suite(document)]}: {machine(document)}", ""]
    if mean := means(rows):
        listed = ", ".join(f"{name} {value:.2f}x" for name, value in mean.items())
        text += [f"Geometric mean of the speed-ups over eager torch: {listed}.", ""]
    text += [*lines, ""]
    if any("worst" in errors for row in rows for errors in row.errors.values()):
        text += [*_accuracy(rows, labels), ""]
    if note := NOTES.get(suite(document)):
        text.append(note)
    text.append(
        "Median times per call, all contenders of a row timed in turn; a speed-up is the median over the rounds of the "
        "ratio within a round. Rows not clearly above 1x were timed three times, and the median run is shown."
    )
    if any(row.spread > NOISY for row in rows):
        text.append(f"`~`: timings scattered by more than {NOISY:.0%} (interquartile range over median).")
    if limits := document["machine_info"].get("limits"):
        rates = ", ".join(f"{name} products {rate / 1e9:,.0f} Gflop/s" for name, rate in limits["flops_per_s"].items())
        text.append(
            f"Limits, measured in the same run: {rates}; a copy {limits['copy_bytes_per_s'] / 1e9:,.0f} GB/s. Memory "
            "counts only where the traffic is at least twice the last-level cache, and no limit under 1 us is shown."
        )
    if predicted:
        text.append(
            "H200 model: the time that flops, bytes and special functions take at peak rates, for the slowest of them "
            "alone and for the plan that was taken (`perceptriton.kernels.explain`). It is not a measurement."
        )
    if missed := document["machine_info"].get("missed"):
        text.append(f"Not timed, since they miss the truth: {'; '.join(missed)}.")
    if left_out := document["machine_info"].get("not_reached"):
        text.append(f"Not reached in the time set for the run: {', '.join(left_out)}.")
    return "\n".join(text) + "\n"


def _head(header: list[str], left: int) -> list[str]:
    """The first lines of a table whose columns after the first few hold numbers."""
    rule = "|".join("---" if i < left else "---:" for i in range(len(header)))
    return ["| " + " | ".join(header) + " |", f"|{rule}|"]


def _accuracy(rows: list[Row], labels: dict[str, str]) -> list[str]:
    """A table of every contender's errors where cases have a tolerance, and of what a model predicts for it."""
    predicted = any(row.predicted for row in rows)
    header = ["case", "contender", "error", "worst element, tolerances"]
    lines = _head(header + (["H200 model: limit, us", "own plan, us"] if predicted else []), 2)
    for row in rows:
        for impl in row.us:
            errors = row.errors[impl]
            worst = f"{errors['worst']:.2g}" + (", beyond it" if errors["worst"] > 1 else "")
            cells = [row.case, labels[impl], f"{errors['y']:.1e}", worst]
            if predicted:
                cells += map(_microseconds, row.predicted[impl]) if impl in row.predicted else ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    text = (
        "Errors against fp64: as a relative norm, of what varies from row to row; and of the worst element, in units "
        "of what KernelBench lets pass, 1e-4 absolute and as much relative."
    )
    return [*lines, "", text]


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# --- pictures ----------------------------------------------------------------------------------------------


def _bars(document: dict, title: str, axis: str, value, text, marks: dict, unit: float | None) -> bytes:
    """One horizontal bar per case and mode. value, text: of a row; marks: label to (value of a row, marker)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = [row for row in read(document)[0] if value(row) is not None]
    groups = list(dict.fromkeys((row.case, row.dtype) for row in rows))
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    several_dtypes = len({dtype for _, dtype in groups}) > 1
    height = 0.36
    figure = Figure(figsize=(9, 1.9 + 0.62 * len(groups)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max([value(row) for row in rows] + [mark(row) or 0 for row in rows for mark, _ in marks.values()])
    ticks = []
    for place, group in enumerate(groups):
        own = [row for row in rows if (row.case, row.dtype) == group]
        ticks.append(f"{group[0]}\n{own[0].sizes}" + (f", {group[1]}" if several_dtypes else ""))
        for row in own:
            y = place + (modes.index(row.mode) - (len(modes) - 1) / 2) * height * 1.08
            axes.barh(y, value(row), height, color=COLOURS[row.mode], zorder=2)
            # In a column of their own, clear of the marks.
            axes.text(1.01, y, text(row), transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=INK)
            for mark, marker in marks.values():
                if (where := mark(row)) is not None:
                    axes.plot(
                        where, y, marker, color="white", markeredgecolor=INK, markeredgewidth=1, markersize=5, zorder=4
                    )
    handles: list = [Patch(color=COLOURS[mode], label=mode) for mode in modes]
    for label, (_, marker) in marks.items():
        handles.append(
            Line2D([], [], linestyle="", marker=marker, color="white", markeredgecolor=INK, markersize=5, label=label)
        )
    if unit is not None:
        axes.axvline(unit, color=INK, linewidth=1, zorder=3)
    axes.set_yticks(range(len(groups)), ticks, fontsize=8)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 1.03 * longest)
    axes.set_xlabel(axis, color=INK)
    axes.tick_params(colors=INK, left=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.5, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=13, color=INK, pad=32)
    # On two lines: beside long labels one would run out of the picture.
    what, at = machine(document).replace("; ", "\n", 1), {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(what, (0, 1), (0, 6), **at, fontsize=7.5, color=INK, va="bottom")
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=8)
    return png(figure)


def _throughput(document: dict) -> bytes | None:
    """Rows per second against rows, a panel per network, dtype and mode; None without a network over several sizes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, labels = read(document)
    networks: dict[tuple, list[Row]] = {}
    for row in rows:
        networks.setdefault((tuple(row.shape[1:]), row.dtype), []).append(row)
    networks = {key: own for key, own in networks.items() if len({row.shape[0] for row in own}) > 1}
    if not networks:
        return None
    figure = Figure(figsize=(9, 1.2 + 2.3 * len(networks)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(networks), len(MODES), squeeze=False, sharex=True)
    for line, ((sizes, dtype), own) in zip(panels, networks.items(), strict=True):
        for axes, mode in zip(line, MODES, strict=True):
            points = [row for row in own if row.mode == mode]
            for impl, (colour, marker) in IMPL_STYLES.items():
                found = [(row.shape[0], 1e6 * row.shape[0] / row.us[impl]) for row in points if impl in row.us]
                if found:
                    axes.plot(*zip(*found, strict=True), marker, color=colour, label=labels[impl], markersize=4)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(f"{'-'.join(map(str, sizes))}, {dtype}, {mode}", loc="left", fontsize=8.5, color=INK)
            axes.grid(color=FAINT, linewidth=0.4)
            axes.tick_params(which="both", colors=INK, labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("rows", color=INK)
    figure.supylabel("rows per second (more is better)", color=INK, fontsize=9)
    figure.suptitle(f"Throughput of whole networks\n{machine(document)}", fontsize=9, color=INK)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return png(figure)


def pictures(document: dict) -> dict[str, bytes]:
    """PNG images by name: the speed-ups, the shares of the machine's limits where these are known, the throughput."""
    rows, labels = read(document)
    found = {}
    if any(JUDGED in row.speedup for row in rows):
        marks = {
            labels[impl]: (lambda row, impl=impl: row.speedup.get(impl), marker)
            for impl, marker in MARKS.items()
            if impl in labels
        }
        found["speedup"] = _bars(
            document,
            "perceptriton against eager torch",
            "speed-up over the same modules of torch.nn (more is better)",
            lambda row: row.speedup.get(JUDGED),
            lambda row: f"{row.speedup[JUDGED]:.2f}x",
            marks,
            1.0,
        )
    if any(row.reached(JUDGED) is not None for row in rows):
        found["limits"] = _bars(
            document,
            "perceptriton against the machine's limits",
            "share of the rate of a large product, or of a large copy, whichever binds (%)",
            lambda row: None if row.reached(JUDGED) is None else 100 * row.reached(JUDGED),
            lambda row: f"{row.reached(JUDGED):.0%}, {row.limit}",
            {labels[BASELINE]: (lambda row: 100 * row.reached(BASELINE) if BASELINE in row.us else None, "o")},
            None,
        )
    if suite(document) == "mlp" and (image := _throughput(document)):
        found["throughput"] = image
    return found


def write(source: Path, out: Path | None = None) -> list[Path]:
    """Writes the table and, where matplotlib is installed, the pictures beside the JSON or into `out`."""
    document = json.loads(source.read_text())
    out = source.parent if out is None else out
    written = [out / f"{source.stem}.md"]
    if suite(document) == "training":
        import report_training

        text, draw = report_training.markdown(document), report_training.pictures
    else:
        text, draw = markdown(document), pictures
    atomic.write(written[0], text)
    try:
        images = draw(document)
    except ModuleNotFoundError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        images = {}
    for name, image in images.items():
        written.append(out / f"{source.stem}-{name}.png")
        atomic.write(written[-1], image)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="what pytest-benchmark wrote")
    parser.add_argument("--out", type=Path, help="folder of the table and the pictures; default: that of FILE")
    options = parser.parse_args(arguments)
    written = write(options.file, options.out)
    print(written[0].read_text())
    print("written:", *written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
