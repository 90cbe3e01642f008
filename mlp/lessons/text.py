# SPDX-License-Identifier: Apache-2.0
"""What the pages of several lessons have in common, as lines of text, no wider than the terminal."""

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .race import FUSED, NN, Run
from .trajectory import TEXTBOOK, Losses, Trajectory

TURNS = (
    "Three ways from the same weights: nn.Linear + nn.Sigmoid in an ordinary loop (nn), our fused layers in the same "
    "loop (fused), and `fit`, which takes all steps in one call (fit)."
)
# What `Run.path` means to somebody who only wants to know what was timed.
PATHS = {"loop": "Python", "general": "Python", "torch": "Python", "native": "compiled"}


@dataclass(frozen=True)
class View:
    """What the reader asked for."""

    every: int | None = None  # a row of the table at each multiple of this many steps; None: about a dozen rows
    timing: bool = False  # whether to show times


def columns() -> int:
    """How wide a line may be: the terminal, but 60 at least and 100 at most; 80 where there is no terminal."""
    return max(60, min(100, shutil.get_terminal_size((80, 24)).columns))


def fill(text: str, first: str = "", others: str = "") -> str:
    """The text wrapped between words; first, others: what its first line and the others begin with."""
    wrapper = textwrap.TextWrapper(columns(), break_long_words=False, break_on_hyphens=False)
    wrapper.initial_indent, wrapper.subsequent_indent = first, others
    return wrapper.fill(text)


def page(before: str, formulas: str, after: str) -> str:
    """What a lesson teaches: a paragraph, formulas, a paragraph.

    A line of formulas that is too wide is broken where three spaces or more are.
    """
    lines = []
    for line in textwrap.indent(textwrap.dedent(formulas).strip(), "    ").splitlines():
        parts = [line] if len(line) <= columns() else re.split(r" {3,}", line.strip())
        lines += [line] if parts == [line] else [fill(part, " " * 4, " " * 6) for part in parts]
    return sections([fill(before)], lines, [fill(after)])


def sections(*parts: Sequence[str]) -> str:
    """The parts, lists of lines, with a blank line between; empty ones are left out."""
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], labels: int = 1) -> list[str]:
    """A table whose columns are as far apart as there is room for. The first `labels` say what a row is.

    Where not all columns fit, the others follow below, after the labels again. Columns without a head are words.
    """
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    room = columns() - 2
    gap = next((gap for gap in (4, 3, 2, 1) if sum(widths) + gap * (len(widths) - 1) <= room), 2)
    blocks, first = [[]], list(range(labels))
    for i in range(labels, len(head)):
        if blocks[-1] and sum(widths[j] + gap for j in (*first, *blocks[-1], i)) - gap > room:
            blocks.append([])
        blocks[-1].append(i)

    def line(row: list[str], block: list[int]) -> str:
        shown = [row[i].rjust(widths[i]) if head[i] else row[i].ljust(widths[i]) for i in (*first, *block)]
        return f"  {(' ' * gap).join(shown)}".rstrip()

    return sections(*([line(row, block) for row in cells] for block in blocks)).split("\n")


def training_report(result: Trajectory, view: View) -> str:
    """The page of a lesson that returns a Trajectory."""
    return sections(
        loss_table(result, view), agreement(result), prediction_table(result), timing_table(view, result.runs)
    )


def short_name(name: str) -> str:
    """A contender's name as the head of a column, 12 characters at most."""
    return {NN: "nn", FUSED: "fused"}.get(name, name.partition(" at once")[0][:12])


def shown_rows(steps: Sequence[int], every: int | None = None) -> list[int]:
    """Indices of the steps that are multiples of `every` and of the last one; by default of about a dozen."""
    stride = 1
    while every is None and len(steps) > 13 * stride:
        stride *= 10
    chosen = (i for i in range(0, len(steps), stride) if every is None or steps[i] % every == 0)
    return sorted({*chosen, len(steps) - 1})


def loss_table(
    result: Trajectory, view: View, textbook: Losses | None = None, rows: Sequence[int] | None = None
) -> list[str]:
    """A column of losses for each contender, after that of the textbook if there is one.

    textbook: by default the reference of the result, if it is that. rows: indices of the steps, unless the reader has
    asked for others.
    """
    textbook = textbook or (result.reference if result.against == TEXTBOOK else None)
    losses = {"textbook": textbook} if textbook else {}
    losses |= {short_name(run.name): run.losses for run in result.runs}
    rows = shown_rows(result.steps, view.every) if view.every or rows is None else rows
    body = [[str(result.steps[i]), *(number(column[i], ".8f") for column in losses.values())] for i in rows]
    return grid(["step", *losses], body)


def agreement(result: Trajectory, why: str = "the order in which numbers are rounded") -> list[str]:
    """How far the losses of each contender are from the reference, and how far they may be; why: for what reason."""
    found = []
    # What the others are compared with does not differ from itself.
    for run in result.runs[result.against != TEXTBOOK :]:
        difference, step, _ = result.largest_difference(run)
        found.append(f"{short_name(run.name)}: " + (f"{difference:.1e} at step {step:,}" if difference else "none"))
    compared = [band for band in result.bands if band is not None]
    allowed = " or ".join(f"{band:.0e}" for band in sorted(set(compared)))
    verdict = f" All match {result.against}." if result.matches else ""
    return [
        fill(
            f"Largest difference from {result.against}, as a share of the loss, at {counted(len(compared), 'step')}: "
            f"{'; '.join(found)}. {why[0].upper()}{why[1:]} can make up to {allowed}.{verdict}"
        )
    ]


def timing_table(view: View, runs: Sequence[Run]) -> list[str]:
    """A line for each run with its times, and what they mean, if the reader wants them."""
    if not view.timing:
        return []
    rows = []
    for run in runs:
        us = f"{run.us_per_step:.1f}" if run.us_per_step >= 1 else f"{run.us_per_step:.4f}"
        speed = f"{run.ratio:.2f}x" if run.ratio < 100 else f"{run.ratio:,.0f}x"
        rows.append([run.name, PATHS.get(run.path, "GPU"), f"{run.seconds:.2f}", us, speed])
    words = (
        "Loops in Python or compiled. seconds: all steps once, with what has to be compiled or loaded for the first. "
        "us/step: microseconds for a step of one network, the median. speed: how many times as fast as "
        f"{runs[0].name}."
    )
    return [*grid(["", "", "seconds", "us/step", "speed"], rows, 2), fill(words)]


def prediction_table(result: Trajectory, expected: Losses | None = None) -> list[str]:
    """A line for each of the result's points with the p of every contender there, and one with their accuracies.

    expected: the textbook's p, by default those that the result has to match.
    """
    names = [short_name(run.name) for run in result.runs]
    labelled = torch.equal(result.points, result.samples)
    expected = expected or result.expected
    p: dict[str, Losses] = {"textbook": expected} if expected else {}
    p |= {name: result.predictions(run) for name, run in zip(names, result.runs, strict=True)}
    head = ["x1", "x2", *["target"] * labelled, *p, "class"]
    rows, classes = [], result.predict(result.runs[-1])
    for i, point in enumerate(result.points.tolist()):
        label = [*(f"{x:g}" for x in point), *[f"{result.targets[i].item():g}"] * labelled]
        rows.append([*label, *(number(own[i], ".8f") for own in p.values()), str(classes[i])])
    shares = ", ".join(f"{name} {result.accuracy(run):.0%}" for name, run in zip(names, result.runs, strict=True))
    words = f"class: 1 where p is above 1/2. Share of the {len(result.samples)} samples that are right: {shares}."
    return ["p, the output, after the last step:", *grid(head, rows, 2 + labelled), fill(words)]
