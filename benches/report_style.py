# SPDX-License-Identifier: Apache-2.0
"""How reports look: what they call a machine, tables in Markdown, figures and their colours."""

import io

# Okabe and Ito's palette, told apart by every kind of colour vision.
INK, FAINT = "#333333", "#BBBBBB"

# What a CPU is called, by family and model.
GENERATIONS = {(25, 17): "Zen 4", (26, 2): "Zen 5", (6, 143): "Sapphire Rapids", (6, 207): "Emerald Rapids"}

# A row whose timings scattered more than this (interquartile range over median) is marked.
NOISY = 0.15


def machine(document: dict) -> str:
    """One line: device, versions, threads, date."""
    info = document["machine_info"]
    if gpu := info.get("gpu"):
        driver = f", driver {gpu['driver']}" if gpu.get("driver") else ""
        device = f"{gpu['name']} (compute capability {gpu['capability']}{driver})"
    else:
        cpu = info["cpu"]
        kind = GENERATIONS.get((cpu.get("family"), cpu.get("model")))
        if kind is None and " " in info.get("cpu_kind", ""):
            kind = f"{info['cpu_kind']}, family {cpu.get('family')} model {cpu.get('model')}"
        device = cpu.get("brand_raw", info["machine"])
        # "AMD EPYC" alone leaves open which.
        device += f" ({kind})" if kind else ""
        device += f", threads: {info['threads']}"
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items() if version)
    quick = "; quick run" if info.get("quick") else ""
    return f"{device}; {versions}; {document['datetime'][:10]}{quick}"


def provenance(document: dict) -> str:
    """What the time did not suffice for, which sources were timed, and when."""
    said = f"Timed on {document['datetime'][:10]}"
    if left_out := document["machine_info"].get("not_reached"):
        said = f"Not reached in the time set for the run: {', '.join(left_out)}.\n{said}"
    commit = document.get("commit_info", {})
    if not commit.get("id"):
        return f"{said}; the run has recorded no commit."
    changes = "with changes that were not committed" if commit.get("dirty") else "without other changes"
    return f"{said} at commit {commit['id'][:7]}, {changes}."


def digits(value: float) -> str:
    """Three significant digits: no run repeats more."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.3g}"


def times(ratio: float, noisy: bool = False, bold: bool = False) -> str:
    """A ratio in as many digits, marked where its timings scattered."""
    said = f"{digits(ratio) if ratio >= 9.995 else f'{ratio:.2f}'}x"
    return (f"**{said}**" if bold else said) + (" ~" if noisy else "")


class Scattered:
    """A row that has the scatter of each contender's timings."""

    spreads: dict[str, float]

    def noisy(self, *impls: str) -> bool:
        return any(self.spreads[impl] > NOISY for impl in impls if impl in self.spreads)


def scatter() -> str:
    return f"`~`: timings scattered by more than {NOISY:.0%} (interquartile range over median)."


def table(header: list[str], left: int, rows: list[list[str]]) -> list[str]:
    """The lines of a table whose columns after the first few, `left`, hold numbers."""
    rule = "|".join("---" if i < left else "---:" for i in range(len(header)))
    return [f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {' | '.join(cells)} |" for cells in rows)]


def new_figure(**options):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
