# SPDX-License-Identifier: Apache-2.0
"""The lesson in which a small network learns exclusive or."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..model import MLP
from .lesson import Count, Lesson
from .pictures import plot_training
from .problem import WAYS, contenders, network_from_seed, own_defaults, table
from .race import Task, race
from .text import TURNS, counted, page
from .trajectory import Trajectory, trajectory_of

XOR_SEED = 777
XOR_STEPS = 10_001
# Relative. The order in which fp32 sums are rounded moves a logged loss by up to this much: the largest difference
# between nine ways of computing the same 10,001 steps.
XOR_BAND = 6e-5


@own_defaults()
def xor(
    steps: int = XOR_STEPS,
    device: torch.device | str = "cpu",
    *,
    seed: int = XOR_SEED,
    ways: Sequence[str] = WAYS,
    progress: bool = False,
) -> Trajectory:
    """Trains a 2-2-1 sigmoid network on XOR: mean binary cross-entropy, SGD with lr 1, all four points at each step.

    steps: at least 1. device: "cpu" or a CUDA device; the weights are drawn on the CPU wherever they train. seed:
    that of the weights; the table belongs to 777. ways: which of "nn", "fused" and "fit" train; the others are timed
    against the first. progress: a bar on stderr if that is a terminal, tqdm is installed and training takes longer
    than two seconds.

    The loss is logged every 100 steps from step 0, before that step's update. All ways start from the same weights.
    Loops take turns of about 100 steps, so that whatever slows the machine slows them all.

    The caller's random numbers are left as they were. Raises ValueError for steps below 1 and for unknown ways.
    """
    given, sizes = table("xor_2-2-1"), [2, 2, 1]
    task, network = xor_task(steps, device), network_from_seed(seed, device, sizes)
    runs = race(task, contenders(task, network, ways), progress)
    losses, expected = dict(given["loss"]), given["prediction"] if steps == XOR_STEPS else None
    # The table prints p, which is near 0.001, with eight decimals.
    bands = {"band": lambda loss: XOR_BAND, "prediction_band": 1e-4}
    return trajectory_of(task, device, sizes, network(MLP), runs, reference=losses, expected=expected, **bands)


def xor_task(steps: int, device: torch.device | str) -> Task:
    """Exclusive or by gradient descent with lr 1. Raises ValueError for steps below 1."""
    return Task(*xor_data(device), nn.BCELoss(), partial(torch.optim.SGD, lr=1.0), steps, log_every=100)


def xor_data(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(4, 2) inputs and (4, 1) targets."""
    given = table("xor_2-2-1")
    x, y = (torch.tensor(given[name], dtype=torch.float32, device=device) for name in "xy")
    return x, y


def _intro(steps: int) -> str:
    return page(
        "XOR: is exactly one of two inputs 1? No straight line separates the answers, so a single layer cannot learn "
        "it. A hidden layer of two units bends the plane until one line can.",
        """
        h = sigmoid(W1 x + b1)      p = sigmoid(W2 h + b2)
        loss = mean of -t ln p - (1 - t) ln(1 - p)      t: the right answer
        every weight: w <- w - 1 dloss/dw
        """,
        f"{counted(steps, 'step')} over all four cases, weights drawn with seed {XOR_SEED}. The losses must be those "
        f"of the textbook's table. {TURNS}",
    )


XOR = Lesson(
    name="xor",
    summary="a 2-2-1 network learns exclusive or",
    run=xor,
    intro=_intro,
    counts=(Count("steps", XOR_STEPS),),
    plot=plot_training,
)
