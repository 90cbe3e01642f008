# SPDX-License-Identifier: Apache-2.0
"""The lesson that learns to read handwritten digits, in minibatches, and is tested on digits that it has not seen."""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..model import MLP
from .lesson import Count, Lesson
from .pictures import INK, PALE_BLUE, VERMILION, Figure, new_figure, tidy
from .problem import contenders, network_from_seed, own_defaults
from .race import FUSED, NN, Run, Task, check_steps, race
from .text import TURNS, View, agreement, counted, fill, grid, loss_table, page, sections, timing_table
from .trajectory import Trajectory, outputs, trajectory_of
from .values import Result

DIGITS_SEED = 0
DIGITS_STEPS = 661
DIGITS_BATCH = 64
TESTED = 450  # of the 1,797 images
# Relative. The order in which fp32 sums are rounded moved a logged loss by at most 2.4e-6 against fp64: the largest of
# seven ways of rounding, from three seeds.
DIGITS_BAND = 1e-5
DIGITS_SHARE = 0.95  # each contender must read a larger share of the test images than this


@dataclass(frozen=True)
class Digits(Result):
    """What `digits` returns."""

    trajectory: Trajectory  # the reference is the loss of nn.Linear + nn.Sigmoid, the first of the runs
    images: Tensor  # (T, 64), of the test, on the CPU
    labels: Tensor  # (T,), 0 to 9

    def probabilities(self, run: Run, images: Tensor | None = None) -> Tensor:
        """(T, 10): each output for each test image, or for each of the images given; on the CPU."""
        return outputs(run.model, self.images if images is None else images)

    def read(self, run: Run) -> Tensor:
        """(T,): the digit whose output is the largest."""
        return self.probabilities(run).argmax(1)

    def accuracy(self, run: Run) -> float:
        """The share of test images that are read right."""
        return (self.read(run) == self.labels).double().mean().item()

    def training_accuracy(self, run: Run) -> float:
        """The share of the images it was trained on that are read right."""
        read = self.probabilities(run, self.trajectory.samples).argmax(1)
        return (read == self.trajectory.targets).double().mean().item()

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


@own_defaults()
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
    sizes, optimizer = [64, 128, 10], partial(torch.optim.Adam, lr=0.01)
    task = Task(x.to(device), y.to(device), nn.BCELoss(), optimizer, steps, 10, DIGITS_BATCH, seed)
    network = network_from_seed(seed, device, sizes)
    runs = race(task, contenders(task, network), progress)
    trajectory = trajectory_of(
        task, device, sizes, network(MLP), runs, lambda loss: DIGITS_BAND, targets=labels, points=images
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
    parts = train_test_split(images / 16, labels, test_size=TESTED, stratify=labels, random_state=0)
    x, x_test, y, y_test = map(torch.from_numpy, parts)
    return x.float(), y, x_test.float(), y_test


def _intro(steps: int) -> str:
    return page(
        "Reading: 1,797 handwritten digits, images of 8 by 8 pixels that come with scikit-learn. A network of 64 "
        "inputs, 128 hidden units and 10 outputs asks of each image ten questions: is it a 0, is it a 1, ...? The "
        "answer is the digit whose output is the largest.",
        """
        h = sigmoid(W1 x + b1)      p = sigmoid(W2 h + b2)
        loss = mean over images and digits of -t ln p - (1 - t) ln(1 - p)      t = 1 for its digit
        """,
        "A step looks at 64 images, a minibatch. 22 steps, an epoch, see each of 1,347 images once; then they are "
        f"shuffled anew. {counted(steps, 'step')} of Adam with a learning rate of 0.01. The other 450 images are kept "
        "for the test, since a network may know by heart what it was trained on. It must read more than "
        f"{DIGITS_SHARE:.0%} of those. {TURNS} All three see the same minibatches, so the losses must agree.",
    )


def _report(result: Digits, view: View) -> str:
    trajectory, last = result.trajectory, result.trajectory.runs[-1]
    learned, new = f"of {len(trajectory.samples):,} it learned", f"of {len(result.images)} new"
    rows = [
        [run.name, f"{result.training_accuracy(run):.2%}", f"{result.accuracy(run):.2%}"] for run in trajectory.runs
    ]
    read = result.read(last)
    mistakes = Counter((int(result.labels[i]), int(read[i])) for i in result.misread(last))
    told = ", ".join(f"{true} as {wrong}" + f" ({n} times)" * (n > 1) for (true, wrong), n in mistakes.most_common())
    return sections(
        ["The loss of the minibatch, before its step:", *loss_table(trajectory, view)],
        agreement(trajectory),
        ["Images read right:", *grid(["", learned, new], rows), fill(f"Misread by {last.name}: {told or 'none'}.")],
        timing_table(view, trajectory.runs),
    )


@dataclass(frozen=True)
class DigitsPicture:
    """What `plot_digits` draws."""

    steps: np.ndarray  # (L,)
    losses: dict[str, np.ndarray]  # (L,) of each contender, nats
    accuracies: dict[str, float]  # of each contender, on the test images
    misread: list[int]  # indices of the test images shown
    read: list[int]  # what each of these was taken for


def plot_digits(result: Digits) -> tuple[Figure, DigitsPicture]:
    """The losses of all contenders, which lie on each other, and the test images that `fit` misreads most surely.

    Raises ImportError if matplotlib is missing.
    """
    figure = new_figure(12, 4.8)
    trajectory, last = result.trajectory, result.trajectory.runs[-1]
    misread = result.misread(last)
    data = DigitsPicture(
        np.array(trajectory.steps),
        {run.name: np.array(run.losses) for run in trajectory.runs},
        {run.name: result.accuracy(run) for run in trajectory.runs},
        misread[:6],
        result.read(last)[misread[:6]].tolist(),
    )
    left, right = figure.subfigures(1, 2, width_ratios=(1.4, 1))  # pyright: ignore[reportGeneralTypeIssues]
    axes = left.subplots()
    # From the widest to the narrowest, so that each shows on the one below.
    looks = {NN: {"color": PALE_BLUE, "linewidth": 7}, FUSED: {"color": VERMILION, "linewidth": 2.6}}
    for name, curve in data.losses.items():
        label = f"{name}: {data.accuracies[name]:.1%} of the test images"
        look = looks.get(name, {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 3))})
        axes.plot(data.steps, curve, label=label, solid_capstyle="round", **look)
    axes.set(xlabel="step of Adam", ylabel="mean binary cross-entropy of the minibatch (nats)", yscale="log")
    axes.set_title("Three ways to train a 64-128-10 network: one curve on the other")
    tidy(axes)
    count = f"{len(misread)} of {len(result.images)} test images"
    right.suptitle(f"{last.name} misreads {count}" + ("; the surest:" if data.misread else ""))
    p = result.probabilities(last)
    for cell, index, read in zip(right.subplots(2, 3).flat, data.misread, data.read, strict=False):
        cell.imshow(result.images[index].view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        cell.set_title(f"a {result.labels[index]}, read as {read}\n(p = {p[index, read]:.2f})", fontsize=10)
    for cell in right.axes:
        cell.set(xticks=[], yticks=[], frame_on=bool(cell.images))
    return figure, data


DIGITS = Lesson(
    name="digits",
    summary="a 64-128-10 network reads handwritten digits",
    run=digits,
    intro=_intro,
    report=_report,
    counts=(Count("steps", DIGITS_STEPS),),
    plot=plot_digits,
    picture="the losses and the surest mistakes",
)
