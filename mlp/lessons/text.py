"""What the pages of several lessons have in common, as lines of text."""

import textwrap
from collections.abc import Callable, Iterable, Sequence

import torch

from .race import FUSED, NN, Run
from .trajectory import Losses, Trajectory

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
    parts = (loss_table(result), error_table(result), prediction_table(result), how_it_ran(result))
    return "\n\n".join("\n".join(lines) for lines in parts)


def fill(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def short_name(name: str) -> str:
    """A contender's name as the head of a column, 12 characters at most."""
    return {NN: "nn", FUSED: "fused"}.get(name, name.partition(" at once")[0][:12])


def row(label: str, values: Iterable[float | str | None], width: int, form: str = "") -> str:
    """The label and the values, each in a column of this width; "-" where there is none."""
    return label + "".join(f"{'-' if value is None else format(value, form):>{width}}" for value in values)


def shown_rows(reference: Losses) -> list[int]:
    """Indices of about a dozen rows: those with a reference, every tenth if there are more than 13, and the last."""
    compared = [i for i, loss in enumerate(reference) if loss is not None]
    return sorted({*compared[:: 1 if len(compared) <= 13 else 10], len(reference) - 1})


def loss_table(result: Trajectory, head: str = "reference", reference: Losses | None = None) -> list[str]:
    """A column of losses for each contender, after that of the reference, which has this head or, with "", is left out.

    reference: by default that of the result. The rows are those that `shown_rows` picks from it.
    """
    reference = result.reference if reference is None else reference
    columns = {head: reference} if head else {}
    columns |= {short_name(run.name): run.losses for run in result.runs}
    rows = [(f"  {result.steps[i]:6}", [column[i] for column in columns.values()]) for i in shown_rows(reference)]
    return [row("    step", columns, 14), *(row(label, values, 14, ".8f") for label, values in rows)]


def error_table(result: Trajectory, against: str = "the reference", why: str = "the order of rounding") -> list[str]:
    """The largest difference of each contender from the reference, its times, and the band for the differences.

    against: what the reference is. why: what moves losses within the band.
    """

    def largest(run: Run) -> str:
        difference, step, _ = result.largest_difference(run)
        return f"{difference:18.1e}  {step:7}"

    bands = [band for band in result.bands if band is not None]
    stated = " or ".join(f"{band:.0e}" for band in sorted(set(bands)))
    verdict = f" All match {against}." if result.matches else ""
    compared = f"Differences are relative to {against}, over {len(bands)} logged steps."
    return [
        *timing_table("", f"{'largest difference':>18}  {'at step':>7}", largest, result.runs),
        fill(f"{compared} The band is {stated}: what {why} can do.{verdict}"),
    ]


def timing_table(title: str, head: str, cells: Callable[[Run], str], runs: Sequence[Run]) -> list[str]:
    """A line for each run, with cells(run) under `head`, and one that says what the times mean."""
    lines = [f"  {title:24}  {'ran as':8}  {head}  {'seconds':>8}  {'us/step':>9}  {'speed':>8}"]
    for run in runs:
        us = f"{run.us_per_step:9.1f}" if run.us_per_step >= 1 else f"{run.us_per_step:9.4f}"
        speed = f"{run.ratio:7.2f}x" if run.ratio < 100 else f"{run.ratio:7,.0f}x"
        lines.append(f"  {run.name:24}  {run.path:8}  {cells(run)}  {run.seconds:8.2f}  {us}  {speed}")
    seconds = "seconds: all steps once, with what has to be compiled or loaded for the first"
    meaning = "us/step and speed: one network's step, median over turns, and how many times as fast as"
    return [*lines, fill(f"{seconds}. {meaning} {runs[0].name}.")]


def prediction_table(result: Trajectory) -> list[str]:
    """A line for each of the result's points with the p of every contender there, and one with their accuracies."""
    names = [short_name(run.name) for run in result.runs]
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


def how_it_ran(result: Trajectory) -> list[str]:
    """Which implementation the fused layers took."""
    return [f"How the fused layers ran, on {result.device}:", textwrap.indent(str(result.explanation), "  ")]
