# SPDX-License-Identifier: Apache-2.0
"""The pictures of the suites of bench_stacks.py."""

from report_style import FAINT, INK, machine, new_figure, png
from report_tables import BASELINE, JUDGED, Row, read
from stack_cases import MODES

COLOURS = {"forward": "#0072B2", "forward+backward": "#E69F00"}
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


def _bars(document: dict, title: str, axis: str, value, text, marks: dict, unit: float | None) -> bytes:
    """One horizontal bar per case and mode. value, text: of a row; marks: label to (value of a row, marker)."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = [row for row in read(document)[0] if value(row) is not None]
    groups = list(dict.fromkeys((row.case, row.dtype) for row in rows))
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    several_dtypes = len({dtype for _, dtype in groups}) > 1
    height = 0.36
    figure = new_figure(figsize=(9, 1.9 + 0.62 * len(groups)), dpi=150)
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
    # On two lines: beside long labels one would run out of the picture.
    what = machine(document).replace("; ", "\n", 1) + _missed(document)
    axes.set_title(title, loc="left", fontsize=13, color=INK, pad=14 + 9 * len(what.splitlines()))
    at = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(what, (0, 1), (0, 6), **at, fontsize=7.5, color=INK, va="bottom")
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=8)
    return png(figure)


def _missed(document: dict) -> str:
    """Why an implementation is missing here and there, as a line of its own."""
    missed = document["machine_info"].get("missed")
    return "\nWhere one is missing, its results were further off than allowed, and it was not timed" if missed else ""


def _throughput(document: dict) -> bytes | None:
    """Rows per second against rows, a panel per network, dtype and mode; None without a network over several sizes."""
    rows, labels = read(document)
    networks: dict[tuple, list[Row]] = {}
    for row in rows:
        networks.setdefault((tuple(row.shape[1:]), row.dtype), []).append(row)
    networks = {key: own for key, own in networks.items() if len({row.shape[0] for row in own}) > 1}
    if not networks:
        return None
    figure = new_figure(figsize=(9, 1.2 + 2.3 * len(networks)), dpi=130)
    panels = figure.subplots(len(networks), len(MODES), squeeze=False, sharex=True)
    for line, ((sizes, dtype), own) in zip(panels, networks.items(), strict=True):
        for axes, mode in zip(line, MODES, strict=True):
            points = [row for row in own if row.mode == mode]
            for impl, (colour, marker) in IMPL_STYLES.items():
                found = [(row.shape[0], row.shape[0] / row.us[impl]) for row in points if impl in row.us]
                if found:
                    axes.plot(*zip(*found, strict=True), marker, color=colour, label=labels[impl], markersize=4)
            axes.set_xscale("log", base=2)
            counts = sorted({row.shape[0] for row in own})
            axes.set_xticks(counts, [f"{count:,}" for count in counts])
            axes.set_ylim(0, None)
            axes.set_title(f"{'-'.join(map(str, sizes))}, {dtype}, {mode}", loc="left", fontsize=8.5, color=INK)
            axes.grid(color=FAINT, linewidth=0.4)
            axes.tick_params(which="both", colors=INK, labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("rows", color=INK)
    figure.supylabel("million rows per second (more is better)", color=INK, fontsize=9)
    figure.suptitle(f"Throughput of whole networks\n{machine(document)}{_missed(document)}", fontsize=9, color=INK)
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
    if document["machine_info"].get("suite") == "mlp" and (image := _throughput(document)):
        found["throughput"] = image
    return found
