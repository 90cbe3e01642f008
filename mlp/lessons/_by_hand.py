# SPDX-License-Identifier: Apache-2.0
"""The lesson that writes backpropagation out and trains by it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..model import MLP
from ._xor import xor_task
from .lesson import Count, Lesson
from .pictures import Figure, TrainingPicture, plot_training
from .problem import contenders, network_from_seed, own_defaults, table
from .race import HAND, Loop, Task, race
from .text import View, agreement, fill, grid, loss_table, page, prediction_table, sections, timing_table
from .trajectory import Trajectory, trajectory_of
from .values import Result

HAND_SEED = 3
HAND_STEPS = 10_001
# Relative. The 1e-7 in the hand's dL/dy moves its losses by up to 8e-5 over 10,001 steps in fp64, and rounding in fp32
# by as much again: 1.2e-4 together in eight runs with permuted samples.
HAND_BAND = 3e-4
# A mean binary cross-entropy over four points below this proves that all four are on the right side of 0.5: one that
# is not costs at least ln 2, a quarter of which is this.
SOLVED = math.log(2) / 4


@dataclass(frozen=True)
class ByHand(Result):
    """What `by_hand` returns."""

    trajectory: Trajectory  # the reference is the loss of the loop by hand, the first of the runs
    textbook: list[float | None]  # the table's loss at the logged steps, from weights that were not recorded
    names: list[str]  # of the parameters
    ratios: list[float]  # gradient by hand over autograd's of the mean loss, median over the elements of a parameter
    rates: list[float]  # of an ordinary optimizer that takes the same steps, by parameter

    @property
    def converged(self) -> bool:
        """Whether the last logged loss by hand is below SOLVED."""
        return self.trajectory.runs[0].losses[-1] < SOLVED

    @property
    def misses(self) -> list[str]:
        """What does not follow the loop by hand, one phrase for each, and whether that has converged."""
        trajectory = self.trajectory
        loss, step = trajectory.runs[0].losses[-1], trajectory.steps[-1]
        stuck = f"not converged: a loss of {loss:.4f} at step {step}, not below {SOLVED:.4f}"
        return [stuck] * (not self.converged) + trajectory.misses


@own_defaults()
def by_hand(
    steps: int = HAND_STEPS, device: torch.device | str = "cpu", *, seed: int = HAND_SEED, progress: bool = False
) -> ByHand:
    """Trains a 2-2-1 sigmoid network on XOR by gradients written out in plain torch: `hand_gradients`, lr 0.5.

    They are not those of the mean loss: weights have the sum over the four samples, biases the mean. So an optimizer
    with a learning rate of 2 for weights and 0.5 for biases takes the same steps, and nn.Linear + nn.Sigmoid, the
    fused layers and `fit` do so, in turns as in `xor`. `fit` runs an ordinary loop for two groups of parameters.

    The table's weights came from uninitialized memory: its losses can be seen beside these, not reproduced.

    Raises ValueError for steps below 1.
    """
    task, sizes = replace(xor_task(steps, device), optimizer=_two_rates), [2, 2, 1]
    network = network_from_seed(seed, device, sizes)
    hand = _HandLoop(network(MLP), task)
    ratios = _ratios(hand.model, task)
    groups = task.optimizer(hand.model.parameters()).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    runs = race(task, [hand, *contenders(task, network, calls=1)], progress)
    trajectory = trajectory_of(
        task, device, sizes, network(MLP), runs, lambda loss: HAND_BAND, prediction_band=HAND_BAND
    )
    given = dict(table("xor_by_hand")["loss"])
    textbook = [given.get(step) for step in task.logged]
    names = ["weight1", "bias1", "weight2", "bias2"]
    return ByHand(trajectory, textbook, names, ratios, [rates[id(p)] for p in hand.model.parameters()])


def hand_gradients(
    x: Tensor, target: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(y, [dweight1, dbias1, dweight2, dbias2]) by the conventions of the textbook's script.

    x (B, I), target (B, 1), weight1 (H, I), bias1 (H,), weight2 (1, H), bias2 (1,) -> y (B, 1). With the loss
    L = -target ln y - (1 - target) ln(1 - y) of a sample:

        dy = (y - target) / (y (1 - y) + 1e-7)       the 1e-7 keeps it finite
        dz2 = dy y (1 - y)                           almost y - target
        dz1 = (dz2 @ weight2) h (1 - h)
        dweight = dz.T @ (the layer's input)         summed over the batch
        dbias = mean of dz                           averaged over the batch
    """
    h = torch.sigmoid(x @ weight1.T + bias1)
    y = torch.sigmoid(h @ weight2.T + bias2)
    dy = (y - target) / (y * (1 - y) + 1e-7)
    dz2 = dy * y * (1 - y)
    dz1 = (dz2 @ weight2) * h * (1 - h)
    return y, [dz1.T @ x, dz1.mean(0), dz2.T @ h, dz2.mean(0)]


class _HandLoop(Loop):
    """Gradient descent by `hand_gradients`, with the model for a place to keep the parameters in."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__(HAND, model, task)
        self.parameters = [p.detach() for p in model.parameters()]

    def step(self) -> Tensor:
        x, target = self.task.x, self.task.y
        y, gradients = hand_gradients(x, target, *self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter -= 0.5 * gradient
        return -(target * torch.log(y) + (1 - target) * torch.log(1 - y)).mean()


def _two_rates(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    parameters = list(parameters)
    weights, biases = ([p for p in parameters if p.dim() == d] for d in (2, 1))
    return torch.optim.SGD([{"params": weights, "lr": 4 * 0.5}, {"params": biases, "lr": 0.5}])


def _ratios(model: nn.Module, task: Task) -> list[float]:
    """The field `ratios` of `ByHand`."""
    parameters = list(model.parameters())
    own = torch.autograd.grad(task.criterion(model(task.x), task.y), parameters)
    _, hand = hand_gradients(task.x, task.y, *(p.detach() for p in parameters))
    return [(h / o).median().item() for h, o in zip(hand, own, strict=True)]


def _intro(steps: int) -> str:
    return page(
        "Backpropagation written out, without autograd: a 2-2-1 sigmoid network, XOR, binary cross-entropy, all four "
        f"samples at each of {steps:,} steps of size 0.5.",
        """
        dy  = (y - t) / (y (1 - y) + 1e-7)    the loss, kept finite
        dz2 = dy y (1 - y)                    the output's sigmoid: almost y - t
        dz1 = (dz2 W2) h (1 - h)              back through W2 and the hidden sigmoid
        dW  = dz' (the layer's input)         SUMMED over the four samples
        db  = mean of dz                      AVERAGED over the four samples
        """,
        "A mean loss would average both. So the weights learn four times as fast as the biases: autograd takes the "
        "same steps with a learning rate of 2 for weights and 0.5 for biases, and nn.Linear + nn.Sigmoid, the fused "
        "layers and `fit` do just that. For two groups of parameters `fit` runs an ordinary loop.",
    )


def _report(result: ByHand, view: View) -> str:
    trajectory, given = result.trajectory, table("xor_by_hand")["prediction"]
    ratios = ["gradient by hand / autograd", *(f"{ratio:.7f}" for ratio in result.ratios)]
    rates = ["learning rate for autograd", *(f"{rate:g}" for rate in result.rates)]
    return sections(
        ["At the first step:", *grid(["", *result.names], [ratios, rates])],
        loss_table(trajectory, view, result.textbook),
        [
            fill(
                "The textbook's script took the first weights from memory that nobody had set, so its numbers cannot "
                "be had again: compare how they fall. Its last row is that of step 3,800; its four answers are those "
                "after step 10,001."
            )
        ],
        prediction_table(trajectory, given if trajectory.steps[-1] == HAND_STEPS - 1 else None),
        agreement(trajectory, "the 1e-7, and the order in which numbers are rounded,"),
        [
            fill(
                f"A loss below ln 2 / 4 = {SOLVED:.4f} proves all four answers right."
                + (" Here it is: the network has learned XOR." if result.converged else "")
            )
        ],
        timing_table(view, trajectory.runs),
    )


def plot_by_hand(result: ByHand) -> tuple[Figure, TrainingPicture]:
    """The loss by hand with the textbook's, which is that of other weights, and the network's output over the plane.

    Raises ImportError if matplotlib is missing.
    """
    title, label = "Loss by hand-written backpropagation on XOR", "textbook, from other weights"
    trajectory = result.trajectory
    return plot_training(trajectory, trajectory.runs[0], result.textbook, title=title, label=label)


BY_HAND = Lesson(
    name="by-hand",
    summary="backpropagation written out without autograd learns exclusive or",
    run=by_hand,
    intro=_intro,
    report=_report,
    counts=(Count("steps", HAND_STEPS),),
    plot=plot_by_hand,
)
