# SPDX-License-Identifier: Apache-2.0
"""The tables and the pictures of the suite "training"."""

from dataclasses import dataclass, field

from report_style import (
    FAINT,
    INK,
    Scattered,
    digits,
    machine,
    new_figure,
    png,
    provenance,
    scatter,
    table,
    times,
)

BASELINE, JUDGED = "eager", "fit"
STYLES = {
    "eager": ("#999999", "o-"),
    "fit": ("#D55E00", "o-"),
    "compiled": ("#0072B2", "D--"),
    "vmap": ("#56B4E9", "s--"),
    "jax": ("#009E73", "v--"),
    "skorch": ("#000000", "x:"),
    "graph": ("#E69F00", "^:"),
    "fit-block": ("#CC79A7", "<:"),
    "fit-graph": ("#F0E442", ">:"),
}


@dataclass
class Row(Scattered):
    """One case: what each contender needed per step of one network."""

    case: str
    what: str
    members: int | None
    us: dict[str, float] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)
    over_jax: float | None = None  # of fit
    first_call: dict[str, float] = field(default_factory=dict)  # seconds
    spreads: dict[str, float] = field(default_factory=dict)


def read(document: dict) -> tuple[list[Row], dict[str, str]]:
    """The rows in the order of the file, and the label of each contender."""
    rows: dict[str, Row] = {}
    labels: dict[str, str] = {}
    for benchmark in document["benchmarks"]:
        info = benchmark["extra_info"]
        if "us_per_net_step" not in info:
            continue
        batch = f"{info['batch_size']} of {info['samples']:,}" if info["batch_size"] else f"{info['samples']:,}"
        what = f"{'-'.join(map(str, info['sizes']))}, {info['optimizer']}, batch {batch}"
        row = rows.setdefault(info["case"], Row(info["case"], what, info["members"]))
        impl = info["impl"]
        labels[impl] = info["label"]
        row.us[impl] = info["us_per_net_step"]
        if "speedup_over_eager" in info:
            row.speedup[impl] = info["speedup_over_eager"]
        row.first_call[impl] = info.get("first_call_seconds", 0.0)
        if impl == JUDGED:
            row.over_jax = info.get("speedup_over_jax")
        row.spreads[impl] = info["spread"]
    return list(rows.values()), labels


def markdown(document: dict) -> str:
    rows, labels = read(document)
    others = [impl for impl in labels if impl not in (BASELINE, JUDGED)]
    impls = [impl for impl in (BASELINE, JUDGED) if impl in labels]
    header = ["case", "network", "members", *(f"{labels[impl]}, us" for impl in impls), "speed-up"]
    header += [f"{labels[impl]}, us" for impl in others]
    lines = []
    for row in rows:
        cells = [row.case, row.what, f"{row.members:,}" if row.members else ""]
        cells += [digits(row.us[impl]) if impl in row.us else "" for impl in impls]
        noisy = row.noisy(BASELINE, JUDGED)
        cells.append(times(row.speedup[JUDGED], noisy, bold=True) if JUDGED in row.speedup else "")
        for impl in others:
            ratio = f" ({times(row.speedup[impl])})" if impl in row.speedup else ""
            cells.append(digits(row.us[impl]) + ratio if impl in row.us else "")
        lines.append(cells)
    text = [f"# Training loops: {machine(document)}", "", *table(header, 2, lines), ""]
    text.append(
        "Microseconds per step of one network (a step of an ensemble of 1,024 counts 1,024), median. All contenders of "
        "a row were timed in turn; a speed-up over the eager loop is the median over the rounds of the ratio within a "
        "round. The eager loop of an ensemble is its networks one after the other, up to 32 of them."
    )
    for impl, label in labels.items():
        seconds = [row.first_call[impl] for row in rows if row.first_call.get(impl)]
        if seconds:
            text.append(f"Before its first step {label} took up to {max(seconds):.1f} s, which no figure here holds.")
    if any(row.noisy(BASELINE, JUDGED) for row in rows):
        text.append(scatter())
    text.append(provenance(document))
    return "\n".join(text) + "\n"


def loops_by_machine(documents: dict[str, dict]) -> list[str]:
    """The first machine's times and speed-ups, those over JAX and of vmap; of other machines the speed-ups of `fit`."""
    found = [read(document) for document in documents.values()]
    labels, machines = found[0][1], [{row.case: row for row in rows} for rows, _ in found]
    header = ["network", "networks", labels[BASELINE], "`fit`", "speed-up", "over JAX", labels["vmap"]]
    for name in list(documents)[1:]:
        header += [f"{name}: speed-up", "over JAX"]

    def ratios(row: Row | None) -> list[str]:
        if row is None:
            return ["", ""]
        over_jax = times(row.over_jax, row.noisy("jax", JUDGED), bold=True) if row.over_jax else ""
        return [times(row.speedup[JUDGED], row.noisy(BASELINE, JUDGED)), over_jax]

    lines = []
    for case in dict.fromkeys(case for rows in machines for case in rows):
        own, *others = (rows.get(case) for rows in machines)
        row = next(rows[case] for rows in machines if case in rows)
        cells = [row.what, f"{row.members:,} (ensemble)" if row.members else "1"]
        cells += [digits(own.us[BASELINE]), digits(own.us[JUDGED])] if own else ["", ""]
        vmap = times(own.speedup["vmap"], own.noisy(BASELINE, "vmap")) if own and "vmap" in own.speedup else ""
        cells += [*ratios(own), vmap]
        lines.append(cells + [ratio for other in others for ratio in ratios(other)])
    return table(header, 1, lines)


def pictures(document: dict) -> dict[str, bytes]:
    """PNG images by name: the time of a step by implementation, and net-steps per second against ensemble size."""
    rows, labels = read(document)
    single, many = [row for row in rows if row.members is None], [row for row in rows if row.members]
    # A line joins what differs in size alone, as cases of one name and other numbers do.
    many = [row for row in many if row.case.rpartition("-")[0] == many[0].case.rpartition("-")[0]]
    found = {}
    if single:
        found["step"] = _steps(document, single, labels)
    if len(many) > 1:
        found["ensembles"] = _ensembles(document, many, labels)
    return found


def _figure(document: dict, title: str, height: float):
    figure = new_figure(figsize=(9, height), dpi=150)
    axes = figure.add_subplot()
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=13, color=INK, pad=32)
    axes.text(
        0,
        1.012,
        machine(document).replace("; ", "\n", 1),
        transform=axes.transAxes,
        fontsize=7.5,
        color=INK,
        va="bottom",
    )
    return figure, axes


def _steps(document: dict, rows: list[Row], labels: dict[str, str]) -> bytes:
    impls = [impl for impl in STYLES if any(impl in row.us for row in rows)]
    figure, axes = _figure(document, "One step of one network", 1.6 + 0.3 * len(rows) * (len(impls) + 1))
    height = 0.8 / len(impls)
    for place, row in enumerate(rows):
        for i, impl in enumerate(impls):
            if impl not in row.us:
                continue
            y = place + (i - (len(impls) - 1) / 2) * height
            # Points and no bars: a logarithmic axis has no zero at which a bar could begin.
            axes.plot(row.us[impl], y, STYLES[impl][1][0], color=STYLES[impl][0], label=labels[impl], zorder=2)
            ratio = f" ({times(row.speedup[impl])})" if impl in row.speedup and impl != BASELINE else ""
            axes.text(row.us[impl] * 1.2, y, f"{digits(row.us[impl])} us{ratio}", va="center", fontsize=8, color=INK)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 3)
    axes.set_yticks(range(len(rows)), [f"{row.case}\n{row.what}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds per step (less is better)", color=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.5, zorder=0)
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    figure.legend(
        unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique), frameon=False, fontsize=8
    )
    return png(figure)


def _ensembles(document: dict, rows: list[Row], labels: dict[str, str]) -> bytes:
    figure, axes = _figure(document, "Ensembles of XOR networks", 5)
    for impl, (colour, marker) in STYLES.items():
        points = [(row.members, 1e6 / row.us[impl]) for row in rows if impl in row.us]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, label=labels[impl])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({row.members or 1 for row in rows})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlabel("networks in the ensemble", color=INK)
    axes.set_ylabel("steps of one network per second (more is better)", color=INK)
    axes.grid(color=FAINT, linewidth=0.5)
    axes.legend(frameon=False, fontsize=8)
    return png(figure)
