# SPDX-License-Identifier: Apache-2.0
"""Short tables over several suites: against what people would use instead, and what all rows come to."""

import statistics

import report_training
from report_style import digits, scatter, table, times
from report_tables import BASELINE, JUDGED, Row, means, read

OTHERS = {"compiled": "torch.compile", "jax": "JAX", "vmap": "vmap"}


def against_others(documents: dict[str, dict]) -> list[str]:
    """Times of everyone: all training loops, and of layers and of networks the best, the middle and the worst row.

    These are by the speed-up over whoever else is fastest there, so that rows that lose are shown. A line below says
    what marks mean, and of when the runs are.
    """
    lines, dates = [], {}
    for suite, document in documents.items():
        training = document["machine_info"].get("suite") == "training"
        lines += _loops(document) if training else _stacks(suite, document)
        dates.setdefault(document["datetime"][:10], []).append(suite)
    header = ["microseconds", "torch.nn", *OTHERS.values(), "perceptriton", "against the fastest other"]
    of_when = ", ".join(f"{date} ({' and '.join(suites)})" for date, suites in dates.items())
    return [*table(header, 1, lines), "", scatter(), f"Timed on {of_when}."]


def _stacks(suite: str, document: dict) -> list[list[str]]:
    rows = sorted((row for row in read(document)[0] if row.dtype == "float32"), key=_over_others, reverse=True)
    chosen = {"best": rows[0], "median": rows[len(rows) // 2], "worst": rows[-1]}
    return [
        _line(f"{suite}, {which} of {len(rows)}: {_sizes(row)}, {row.mode}", row.us, JUDGED, _against(row))
        for which, row in chosen.items()
    ]


def _sizes(row: Row) -> str:
    rows, *widths = row.shape
    if len(widths) > 4 and len({*widths}) == 1:
        return f"{rows:,} rows, {widths[0]} wide, {len(widths) - 1} layers"
    return f"{rows:,} rows, {'-'.join(map(str, widths))}"


def _fastest(row: Row) -> str:
    return max((BASELINE, *OTHERS), key=lambda impl: row.speedup.get(impl, 0.0))


def _over_others(row: Row) -> float:
    return row.speedup[JUDGED] / row.speedup[_fastest(row)]


def _against(row: Row) -> str:
    return times(_over_others(row), row.noisy(BASELINE, JUDGED, _fastest(row)), bold=True)


def _loops(document: dict) -> list[list[str]]:
    lines = []
    for row in report_training.read(document)[0]:
        others = {impl: us for impl, us in row.us.items() if impl == BASELINE or impl in OTHERS}
        fastest = min(others, key=lambda impl: others[impl])
        judged = row.speedup[report_training.JUDGED]
        over = row.over_jax if fastest == "jax" else judged / row.speedup.get(fastest, 1.0)
        timed = (fastest, report_training.JUDGED, *[BASELINE] * (fastest != "jax"))
        against = "" if over is None else times(over, row.noisy(*timed), bold=True)
        networks = "one network" if row.members is None else f"`Ensemble` of {row.members:,}"
        lines.append(_line(f"training, {networks}: {row.what}", row.us, report_training.JUDGED, against))
    return lines


def _line(what: str, found: dict[str, float], judged: str, against: str) -> list[str]:
    return [what, *(digits(found[impl]) if impl in found else "" for impl in (BASELINE, *OTHERS, judged)), against]


def over_eager(documents: dict[str, dict]) -> list[str]:
    """The mean of each run's speed-ups over nn, its lowest and highest row, and how many rows gain next to nothing."""
    header = ["run", "date", "dtype", "rows", "mean", "lowest", "highest", "rows up to 1.05x"]
    header.append("torch.compile, mean")
    lines = []
    for name, document in documents.items():
        rows = read(document)[0]
        for dtype in dict.fromkeys(row.dtype for row in rows):
            own = [row for row in rows if row.dtype == dtype and JUDGED in row.speedup]
            ratios = [row.speedup[JUDGED] for row in own]
            compiled = [row.speedup["compiled"] for row in own if "compiled" in row.speedup]
            few = sum(round(ratio, 2) <= 1.05 for ratio in ratios)
            cells = [f"{means(own)['all rows']:.2f}x", f"{min(ratios):.2f}x", f"{max(ratios):.2f}x", f"{few}"]
            cells.append(f"{statistics.geometric_mean(compiled):.2f}x" if compiled else "")
            lines.append([name, document["datetime"][:10], dtype, f"{len(own)}", *cells])
    return table(header, 3, lines)


def kernelbench_by_machine(documents: dict[str, dict]) -> list[str]:
    """The speed-ups of each machine, and torch.compile's, in fp32."""
    found = {name: {r.case: r for r in read(d)[0] if r.dtype == "float32"} for name, d in documents.items()}
    (first, *_) = found.values()
    lines = []
    for case, row in first.items():
        cells = [
            own[case].over_eager(impl) if case in own else "" for impl in (JUDGED, "compiled") for own in found.values()
        ]
        lines.append([case, row.sizes, *cells])
    return table(["problem", "rows x widths", *found, *(f"torch.compile, {name}" for name in found)], 2, lines)
