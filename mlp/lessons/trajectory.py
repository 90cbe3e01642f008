# SPDX-License-Identifier: Apache-2.0
"""The losses of every contender, step by step, beside those of a reference."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ...kernels import Explanation, MlpExplanation, explain
from .race import HAND, Run, Task
from .values import Result

TEXTBOOK = "the textbook"
Losses = Sequence[float | None]  # by logged step; None where there is none


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output for x, computed on the model's device and returned on the CPU."""
    parameter = next(model.parameters())
    return model(x.to(parameter.device, parameter.dtype)).cpu()


@dataclass(frozen=True)
class Trajectory(Result):
    """What the lessons that train return: every contender's losses beside those of the reference."""

    device: str
    sizes: list[int]  # widths of the network
    steps: list[int]  # at which the loss was logged
    reference: list[float | None]  # the loss at that step; None where the table has none
    against: str  # what the reference is, in words
    bands: list[float | None]  # relative, of each loss in the reference
    initial: nn.Module  # the network before its first step
    runs: tuple[Run, ...]  # the first is what the others are timed against
    samples: Tensor  # (samples, inputs), on the CPU
    targets: Tensor  # (samples,), 0 or 1; of digits 0 to 9
    points: Tensor  # (P, inputs), where `predictions` looks
    expected: list[float] | None  # the table's p at the points; None if the table is of another number of steps
    prediction_band: float  # relative
    explanation: Explanation | MlpExplanation  # how the fused layers run

    def run(self, name: str) -> Run:
        """The contender of that name. Raises KeyError if there is none."""
        return {run.name: run for run in self.runs}[name]

    def differences(self, run: Run) -> list[float | None]:
        """|loss - reference| / reference at each logged step, None where the reference has no loss."""
        return [None if r is None else abs(loss - r) / r for loss, r in zip(run.losses, self.reference, strict=True)]

    def largest_difference(self, run: Run) -> tuple[float, int, float]:
        """(difference, its step, the band there) where the difference is the largest part of its band; NaN is larger.

        Raises ValueError if no logged step is in the reference.
        """
        rows = zip(self.differences(run), self.steps, self.bands, strict=True)
        compared = [(d, step, band) for d, step, band in rows if d is not None and band is not None]
        return max(compared, key=lambda row: math.inf if math.isnan(row[0]) else row[0] / row[2])

    def predictions(self, run: Run) -> list[float]:
        """The p of class 1 at each of `points`."""
        return outputs(run.model, self.points).flatten().tolist()

    def predict(self, run: Run, x: Tensor | None = None) -> list[int]:
        """The class of each of `points`, or of the rows of x: 1 where p is above 0.5, otherwise 0."""
        return [int(p > 0.5) for p in outputs(run.model, self.points if x is None else x).flatten().tolist()]

    def accuracy(self, run: Run) -> float:
        """The share of samples whose p is on the target's side of 0.5."""
        p = outputs(run.model, self.samples).flatten()
        return ((p > 0.5) == (self.targets > 0.5)).double().mean().item()

    @property
    def misses(self) -> list[str]:
        """What does not match the reference, one phrase for each; empty if all contenders do."""
        found = []
        for run in self.runs:
            difference, step, band = self.largest_difference(run)
            if not difference <= band:
                found.append(f"{run.name}: {difference:.1e} relative at step {step}, outside the band of {band:.0e}")
            band = self.prediction_band
            for p, e in zip(self.predictions(run), self.expected, strict=True) if self.expected else ():
                if not abs(p - e) <= band * e:
                    found.append(f"{run.name}: p = {p:.8f} and not {e:.8f}, outside the band of {band:.0e}")
        return found


def trajectory_of(
    task: Task,
    device: torch.device | str,
    sizes: list[int],
    initial: nn.Module,
    runs: tuple[Run, ...],
    band: Callable[[float], float],
    reference: Mapping[int, float] | None = None,
    *,
    targets: Tensor | None = None,
    points: Tensor | None = None,
    expected: list[float] | None = None,
    prediction_band: float = math.nan,
    compared: int = 1,
) -> Trajectory:
    """The Trajectory of these runs through the task. device: as the lesson's caller gave it.

    band(loss): how far, relatively, a loss may be from one in the reference. reference: losses by step, by default
    those of the first run at each multiple of `compared`. targets: by default the task's. points: by default the
    samples.
    """
    by_whom = "by hand" if runs[0].name == HAND else f"over {runs[0].name}"
    against = TEXTBOOK if reference is not None else f"the loop {by_whom}"
    if reference is None:
        logged = zip(task.logged, runs[0].losses, strict=True)
        reference = {step: loss for step, loss in logged if step % compared == 0}
    losses = [reference.get(step) for step in task.logged]
    x, samples = task.x[: task.batch_size], task.x.cpu()
    shapes = [(n, k) for k, n in pairwise(sizes)]
    return Trajectory(
        device=str(device),
        sizes=sizes,
        steps=list(task.logged),
        reference=losses,
        against=against,
        bands=[None if loss is None else band(loss) for loss in losses],
        initial=initial,
        runs=runs,
        samples=samples,
        targets=task.y.flatten().cpu() if targets is None else targets,
        points=samples if points is None else points,
        expected=expected,
        prediction_band=prediction_band,
        explanation=explain(x.shape, shapes if len(shapes) > 1 else shapes[0], x.dtype, x.device),
    )
