"""The lessons that train a network on a small problem and follow the table's losses step by step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor, nn

from .lesson_race import FUSED, NN, Loop, Task, Trajectory, check_steps, draw, explained, fits, race, table
from .model import MLP

__all__ = [
    "BLOBS_BAND",
    "BLOBS_SEED",
    "BLOBS_STEPS",
    "DEEP_BANDS",
    "WAYS",
    "XOR_BAND",
    "XOR_SEED",
    "XOR_STEPS",
    "blobs",
    "blobs_data",
    "unfused",
    "xor",
    "xor_data",
    "xor_deep",
]

WAYS = ("nn", "fused", "fit")

XOR_SEED = 777
XOR_STEPS = 10_001
# Relative. The order in which fp32 sums are rounded moves a logged loss by up to this much: the largest difference
# between nine ways of computing the same 10,001 steps.
XOR_BAND = 6e-5
# The same of the deep network: while its loss is still on the plateau near ln 2 (to step 2000), and after the fast
# drop, which each way of rounding reaches a little earlier or later. There a step moves weights by a few units in the
# last place of fp32. It is twice 1.7e-2, the most in 120 runs that permuted samples and hidden neurons (119: 8e-3).
DEEP_BANDS = (3e-7, 3.4e-2)
DEEP_PREDICTION_BAND = 0.1  # twice 4.8e-2: that of one sample moves more than the mean over four
PLATEAU = 0.6  # nats

BLOBS_SEED = 2
BLOBS_STEPS = 1000
# Relative. A mean over 100 losses near 0.5 that is off by a few units in the last place of fp32, 6e-8 each.
BLOBS_BAND = 1e-6

Build = Callable[[Sequence[int]], nn.Sequential]  # a network of these widths


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
    losses = table("xor_2-2-1")
    problem = _Problem(
        *xor_data(),
        sizes=[2, 2, 1],
        lr=1.0,
        log_every=100,
        reference=dict(losses["loss"]),
        band=lambda reference: XOR_BAND,
        expected=losses["prediction"] if steps == XOR_STEPS else None,
        prediction_band=1e-4,  # p is printed with eight decimals, and near 0.001
    )
    return _train(problem, lambda build: build(problem.sizes), steps, device, seed, ways, progress)


def xor_deep(
    steps: int = XOR_STEPS,
    device: torch.device | str = "cpu",
    *,
    seed: int = XOR_SEED,
    draws: int = 1,
    ways: Sequence[str] = WAYS,
    progress: bool = False,
) -> Trajectory:
    """The same on a 2-10-10-10-1 network, which stays near ln 2, the loss of a guess, until it drops all at once.

    draws: 1 or 2, how often the network is drawn after the 2-2-1 network of `xor`; the last draw is trained. The
    table has both. The other arguments and errors are those of `xor`, ValueError too for other draws.
    """
    if draws not in (1, 2):
        raise ValueError(f"draws must be 1 or 2, not {draws}")
    run = table("xor_2-10-10-10-1")["runs"][draws - 1]
    problem = _Problem(
        *xor_data(),
        sizes=[2, 10, 10, 10, 1],
        lr=1.0,
        log_every=100,
        reference=dict(run["loss"]),
        band=lambda reference: DEEP_BANDS[reference < PLATEAU],
        expected=run["prediction"] if steps == XOR_STEPS else None,
        prediction_band=DEEP_PREDICTION_BAND,
    )

    def make(build: Build) -> nn.Sequential:
        build([2, 2, 1])
        return [build(problem.sizes) for _ in range(draws)][-1]

    return _train(problem, make, steps, device, seed, ways, progress)


def blobs(
    steps: int = BLOBS_STEPS,
    device: torch.device | str = "cpu",
    *,
    seed: int = BLOBS_SEED,
    ways: Sequence[str] = WAYS,
    progress: bool = False,
) -> Trajectory:
    """Trains a perceptron, one layer 2-1 with a sigmoid, on two blobs of 50 points each: SGD with lr 0.01, full batch.

    The loss, a mean binary cross-entropy, is logged at every step; the table has the first ten and two of the last.
    `points` are (1, -1) and (-1, 1), which lie beyond the centres of class 1 and class 0. The arguments and errors
    are those of `xor`.
    """
    losses = table("blobs_2-1")
    reference = dict(enumerate(losses["loss_first"])) | {int(s): loss for s, loss in losses["loss_last"].items()}
    problem = _Problem(
        *blobs_data(),
        sizes=[2, 1],
        lr=0.01,
        log_every=1,
        reference=reference,
        band=lambda reference: BLOBS_BAND,
        expected=list(losses["probability"].values()) if steps == BLOBS_STEPS else None,
        prediction_band=BLOBS_BAND,
        points=torch.tensor([[1.0, -1.0], [-1.0, 1.0]]),
    )
    return _train(problem, lambda build: build(problem.sizes), steps, device, seed, ways, progress)


def blobs_data() -> tuple[Tensor, Tensor]:
    """(100, 2) points and (100, 1) classes: 50 points of standard deviation 0.4 around each of two centres, shuffled.

    The bits are those of sklearn.datasets.make_blobs(n_samples=100, random_state=123, centers=[[-0.5, 0.5],
    [0.5, -0.5]], cluster_std=0.4), in float32.
    """
    random = np.random.RandomState(123)
    x = np.concatenate([random.normal(centre, 0.4, (50, 2)) for centre in ((-0.5, 0.5), (0.5, -0.5))])
    y = np.repeat((0, 1), 50)
    order = np.arange(100)
    random.shuffle(order)
    return torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order, None], dtype=torch.float32)


def unfused(sizes: Sequence[int], bias: bool = True) -> nn.Sequential:
    """nn.Linear and nn.Sigmoid in turn, for these widths."""
    return nn.Sequential(*chain.from_iterable((nn.Linear(i, o, bias), nn.Sigmoid()) for i, o in pairwise(sizes)))


def xor_data() -> tuple[Tensor, Tensor]:
    """(4, 2) inputs and (4, 1) targets."""
    losses = table("xor_2-2-1")
    return torch.tensor(losses["x"], dtype=torch.float32), torch.tensor(losses["y"], dtype=torch.float32)


@dataclass(frozen=True)
class _Problem:
    """Data, network, learning rate and table of a lesson."""

    x: Tensor  # (samples, inputs)
    y: Tensor  # (samples, 1)
    sizes: list[int]
    lr: float
    log_every: int
    reference: dict[int, float]  # loss by step
    band: Callable[[float], float]  # of a loss in the reference
    expected: list[float] | None
    prediction_band: float
    points: Tensor | None = None  # the samples, unless given


def _train(
    problem: _Problem,
    make: Callable[[Build], nn.Sequential],
    steps: int,
    device: torch.device | str,
    seed: int,
    ways: Sequence[str],
    progress: bool,
) -> Trajectory:
    check_steps(steps)
    if not ways or not set(ways) <= set(WAYS):
        raise ValueError(f"ways must be some of {', '.join(WAYS)}, not {ways!r}")
    optimizer = partial(torch.optim.SGD, lr=problem.lr)
    task = Task(problem.x.to(device), problem.y.to(device), nn.BCELoss(), optimizer, steps, problem.log_every)

    def network(build: Build) -> nn.Module:
        return draw(seed, lambda: make(build)).to(device)

    contenders = []
    for way in ways:
        if way == "fit":
            contenders += fits(network(MLP), task)
        else:
            contenders.append(Loop(NN, network(unfused), task) if way == "nn" else Loop(FUSED, network(MLP), task))
    runs = race(task, contenders, progress)
    reference = [problem.reference.get(step) for step in task.logged]
    return Trajectory(
        device=str(device),
        sizes=problem.sizes,
        steps=list(task.logged),
        reference=reference,
        bands=[None if loss is None else problem.band(loss) for loss in reference],
        initial=network(MLP),
        runs=runs,
        samples=problem.x,
        targets=problem.y.flatten(),
        points=problem.x if problem.points is None else problem.points,
        expected=problem.expected,
        prediction_band=problem.prediction_band,
        explanation=explained(problem.sizes, task.x),
    )
