"""The lesson that writes backpropagation out and trains by it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .lesson_race import FUSED, HAND, NN, Loop, Task, Trajectory, check_steps, draw, explained, fits, race, table
from .lesson_training import unfused, xor_data
from .model import MLP

__all__ = ["HAND_BAND", "HAND_SEED", "HAND_STEPS", "SOLVED", "ByHand", "by_hand", "hand_gradients"]

HAND_SEED = 3
HAND_STEPS = 3801
# Relative. The 1e-7 in the hand's dL/dy moves its losses by 2e-5 over 3,801 steps in fp64; fp32 rounding, which the
# plateau near ln 2 amplifies, by as much again.
HAND_BAND = 2e-4
# A mean binary cross-entropy over four points below this proves that all four are on the right side of 0.5: one that
# is not costs at least ln 2, a quarter of which is this.
SOLVED = math.log(2) / 4


@dataclass(frozen=True)
class ByHand:
    """What `by_hand` returns."""

    trajectory: Trajectory  # the reference is the loss of the loop by hand, the first of the runs
    textbook: list[float | None]  # the table's loss at the logged steps, from weights that nobody knows
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
        stuck = (
            [] if self.converged else [f"not converged: a loss of {loss:.4f} at step {step}, not below {SOLVED:.4f}"]
        )
        return stuck + trajectory.misses

    @property
    def matches(self) -> bool:
        return not self.misses


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
    check_steps(steps)
    x, y = (t.to(device) for t in xor_data())
    task = Task(x, y, nn.BCELoss(), _two_rates, steps, log_every=100)

    def network(build: Callable[..., nn.Sequential]) -> nn.Module:
        return draw(seed, partial(build, [2, 2, 1])).to(device)

    hand = _HandLoop(network(MLP), task)
    names, ratios = _compared(hand.model, x, y)
    loops = [Loop(NN, network(unfused), task), Loop(FUSED, network(MLP), task)]
    runs = race(task, [hand, *loops, *fits(network(MLP), task, calls=1)], progress)
    losses = dict(table("xor_by_hand")["loss"])
    groups = task.optimizer(hand.model.parameters()).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    trajectory = Trajectory(
        device=str(device),
        sizes=[2, 2, 1],
        steps=list(task.logged),
        reference=list(runs[0].losses),
        bands=[HAND_BAND] * len(task.logged),
        initial=network(MLP),
        runs=runs,
        samples=x.cpu(),
        targets=y.flatten().cpu(),
        points=x.cpu(),
        expected=None,
        prediction_band=HAND_BAND,
        explanation=explained([2, 2, 1], x),
    )
    textbook = [losses.get(step) for step in task.logged]
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


def _compared(model: nn.Module, x: Tensor, y: Tensor) -> tuple[list[str], list[float]]:
    """The parameters' names, and the ratios of `ByHand`."""
    parameters = list(model.parameters())
    loss = nn.BCELoss()(model(x), y)
    own = torch.autograd.grad(loss, parameters)
    _, hand = hand_gradients(x, y, *(p.detach() for p in parameters))
    names = ["weight1", "bias1", "weight2", "bias2"]
    return names, [(h / o).median().item() for h, o in zip(hand, own, strict=True)]
