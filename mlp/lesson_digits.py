"""The lesson that learns to read handwritten digits, in minibatches, and is tested on digits that it has not seen."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .lesson_race import FUSED, NN, Loop, Run, Task, Trajectory, check_steps, draw, explained, fits, race
from .lesson_training import unfused
from .model import MLP

__all__ = [
    "DIGITS_BAND",
    "DIGITS_BATCH",
    "DIGITS_SEED",
    "DIGITS_SHARE",
    "DIGITS_STEPS",
    "Digits",
    "digits",
    "digits_data",
]

DIGITS_SEED = 0
DIGITS_STEPS = 661
DIGITS_BATCH = 64
TESTED = 450  # of the 1,797 images
# Relative. The order in which fp32 sums are rounded moved a logged loss by at most 2.4e-6 against fp64: the largest of
# seven ways of rounding, from three seeds.
DIGITS_BAND = 1e-5
DIGITS_SHARE = 0.95  # of the test images; each way must read more than these


@dataclass(frozen=True)
class Digits:
    """What `digits` returns."""

    trajectory: Trajectory  # the reference is the loss of nn.Linear + nn.Sigmoid, the first of the runs
    images: Tensor  # (T, 64), of the test, on the CPU
    labels: Tensor  # (T,), 0 to 9

    @torch.no_grad()
    def probabilities(self, run: Run, images: Tensor | None = None) -> Tensor:
        """(T, 10): each output for each test image, or for each of the images given; on the CPU."""
        parameter = next(run.model.parameters())
        return run.model((self.images if images is None else images).to(parameter.device)).cpu()

    def read(self, run: Run) -> Tensor:
        """(T,): the digit whose output is the largest."""
        return self.probabilities(run).argmax(1)

    def accuracy(self, run: Run) -> float:
        """The share of test images that are read right."""
        return (self.read(run) == self.labels).double().mean().item()

    def training_accuracy(self, run: Run) -> float:
        """The same share of the images that it was trained on."""
        trajectory = self.trajectory
        read = self.probabilities(run, trajectory.samples).argmax(1)
        return (read == trajectory.targets).double().mean().item()

    def misread(self, run: Run) -> list[int]:
        """The indices of test images that are read wrong, the one with the largest wrong output first."""
        p = self.probabilities(run)
        wrong = (p.argmax(1) != self.labels).nonzero().flatten()
        return wrong[p[wrong].amax(1).argsort(descending=True)].tolist()

    @property
    def misses(self) -> list[str]:
        """What does not follow the first run, one phrase for each, and who reads too few of the test images."""
        found = list(self.trajectory.misses)
        for run in self.trajectory.runs:
            if not (share := self.accuracy(run)) > DIGITS_SHARE:
                found.append(f"{run.name}: {share:.1%} of the test images read right, not more than {DIGITS_SHARE:.0%}")
        return found

    @property
    def matches(self) -> bool:
        return not self.misses


def digits(
    steps: int = DIGITS_STEPS, device: torch.device | str = "cpu", *, seed: int = DIGITS_SEED, progress: bool = False
) -> Digits:
    """Trains a 64-128-10 sigmoid network to read digits: mean binary cross-entropy, Adam with lr 0.01, batches of 64.

    nn.Linear + nn.Sigmoid, fused layers and `fit` train in turns as in `xor`, from the same weights on the same batches
    in the same order. The loss is that of the step's batch, logged every 10 steps. The last two must follow the first,
    and all three must read more than 95% of the test images. seed: that of weights and order.

    Raises ValueError for steps below 1, ImportError without scikit-learn, which has the images.
    """
    check_steps(steps)
    x, labels, images, test_labels = digits_data()
    y = nn.functional.one_hot(labels, 10).to(x.dtype)
    sizes = [64, 128, 10]
    optimizer = partial(torch.optim.Adam, lr=0.01)
    task = Task(x.to(device), y.to(device), nn.BCELoss(), optimizer, steps, 10, DIGITS_BATCH, seed)

    def network(build) -> nn.Module:
        return draw(seed, partial(build, sizes)).to(device)

    loops = [Loop(NN, network(unfused), task), Loop(FUSED, network(MLP), task)]
    runs = race(task, [*loops, *fits(network(MLP), task)], progress)
    trajectory = Trajectory(
        device=str(device),
        sizes=sizes,
        steps=list(task.logged),
        reference=list(runs[0].losses),
        bands=[DIGITS_BAND] * len(task.logged),
        initial=network(MLP),
        runs=runs,
        samples=x,
        targets=labels,
        points=images,
        expected=None,
        prediction_band=math.nan,
        explanation=explained(sizes, task.x[:DIGITS_BATCH]),
    )
    return Digits(trajectory, images, test_labels)


def digits_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images, labels) to train on and (images, labels) to test: (1347, 64), (1347,), (450, 64), (450,).

    Handwritten digits of 8 by 8 pixels from 0 to 1. Both parts have the same share of each digit. Raises ImportError
    without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: install perceptriton[sklearn]") from error
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images / 16, labels, test_size=TESTED, stratify=labels, random_state=0)
    return (
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(y),
        torch.tensor(x_test, dtype=torch.float32),
        torch.tensor(y_test),
    )
