"""What the pages of several lessons have in common, as lines of text."""

import textwrap
from collections.abc import Callable, Iterable, Sequence

import torch

from .race import FUSED, NN, Run
from .trajectory import Trajectory

WIDTH = 100  # columns

TURNS = (
    "Three ways from the same weights, in turns: nn.Linear + nn.Sigmoid in an ordinary loop, fused layers in the same "
    "loop, and `fit`, which takes all steps in one call."
)


def page(before: str, formulas: str, after: str) -> str:
    """What a lesson teaches: a paragraph, formulas, a paragraph."""
    return "\n".join([fill(before), "", textwrap.indent(textwrap.dedent(formulas).strip(), "    "), "", fill(after)])


def training_report(result: Trajectory) -> str:
    """The page of a lesson that returns a Trajectory."""
    return "\n".join([*losses(result), "", *comparison(result), "", *predictions(result), "", *ran(result)])


def fill(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def short(name: str) -> str:
    """A contender's name at the head of a column."""
    return {NN: "nn", FUSED: "fused"}.get(name, name.partition(" at once")[0][:12])


def row(label: str, values: Iterable[float | str | None], width: int, form: str = "") -> str:
    """The label and the values, each in a column of this width; "-" where there is none."""
    return label + "".join(f"{'-' if value is None else format(value, form):>{width}}" for value in values)


def shown(reference: Sequence[float | None]) -> list[int]:
    """Indices of the rows of a table of a dozen lines: those with a reference, thinned by ten, and the last."""
    compared = [i for i, loss in enumerate(reference) if loss is not None]
    return sorted({*compared[:: 1 if len(compared) <= 13 else 10], len(reference) - 1})


def losses(result: Trajectory, head: str = "reference", reference: Sequence[float | None] | None = None) -> list[str]:
    """The losses of each contender, after those of a reference in a column with this head, if it has one.

    reference: by default that of the result. It chooses the rows.
    """
    reference = result.reference if reference is None else reference
    columns = {head: reference} if head else {}
    columns |= {short(run.name): run.losses for run in result.runs}
    rows = [(f"  {result.steps[i]:6}", [column[i] for column in columns.values()]) for i in shown(reference)]
    return [row("    step", columns, 14), *(row(label, values, 14, ".8f") for label, values in rows)]


def comparison(result: Trajectory, against: str = "the reference", why: str = "the order of rounding") -> list[str]:
    """How far each contender is from the reference, and its times."""

    def largest(run: Run) -> str:
        difference, step, _ = result.largest_difference(run)
        return f"{difference:18.1e}  {step:7}"

    bands = [band for band in result.bands if band is not None]
    stated = " or ".join(f"{band:.0e}" for band in sorted(set(bands)))
    verdict = f" All match {against}." if result.matches else ""
    compared = f"Differences are relative to {against}, over {len(bands)} logged steps."
    return [
        *timed("", f"{'largest difference':>18}  {'at step':>7}", largest, result.runs),
        fill(f"{compared} The band is {stated}: what {why} can do.{verdict}"),
    ]


def timed(title: str, head: str, cells: Callable[[Run], str], runs: Sequence[Run]) -> list[str]:
    """A line for each run with cells of its own and its times, under a head, and what the times mean."""
    lines = [f"  {title:24}  {'ran as':8}  {head}  {'seconds':>8}  {'us/step':>9}  {'speed':>8}"]
    for run in runs:
        us = f"{run.us_per_step:9.1f}" if run.us_per_step >= 1 else f"{run.us_per_step:9.4f}"
        speed = f"{run.ratio:7.2f}x" if run.ratio < 100 else f"{run.ratio:7,.0f}x"
        lines.append(f"  {run.name:24}  {run.path:8}  {cells(run)}  {run.seconds:8.2f}  {us}  {speed}")
    meaning = "us/step and speed: one network's step, median over turns, and how many times as fast as"
    return [*lines, fill(f"{meaning} {runs[0].name}.")]


def predictions(result: Trajectory) -> list[str]:
    """The p of each contender at the result's points, and its accuracy."""
    names = [short(run.name) for run in result.runs]
    labelled = torch.equal(result.points, result.samples)
    expected = {"reference": result.expected} if result.expected else {}
    columns = expected | {f"p, {name}": result.predictions(run) for name, run in zip(names, result.runs, strict=True)}
    lines = [row(f"  {'x1':>5} {'x2':>5}" + (f"  {'target':>6}" if labelled else ""), columns, 14) + "   class"]
    for i, point in enumerate(result.points.tolist()):
        label = f"  {point[0]:5g} {point[1]:5g}" + (f"  {result.targets[i].item():6g}" if labelled else "")
        p = [column[i] for column in columns.values()]
        lines.append(f"{row(label, p, 14, '.8f')}  {int(p[-1] > 0.5):6}")
    shares = ", ".join(f"{name} {result.accuracy(run):.0%}" for name, run in zip(names, result.runs, strict=True))
    return [*lines, f"Accuracy over the {len(result.samples)} samples: {shares}."]


def ran(result: Trajectory) -> list[str]:
    """Which implementation the fused layers took."""
    return [f"How the fused layers ran, on {result.device}:", textwrap.indent(str(result.explanation), "  ")]
