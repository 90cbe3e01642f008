"""The classic lessons: small networks on small data, beside the tables that they have to reproduce.

A lesson is one function that trains and returns all there is to show; it prints nothing. The tables are in
`reference/`.
"""

import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ..kernels import MlpExplanation, explain
from .model import MLP

__all__ = ["XOR_BAND", "XOR_SEED", "XOR_STEPS", "XorResult", "xor"]

REFERENCE = Path(__file__).parent / "reference"

XOR_SEED = 777
XOR_STEPS = 10_001
# Relative. The order in which fp32 sums are rounded moves a logged loss by up to this much: the largest difference
# between nine ways of computing the same 10,001 steps.
XOR_BAND = 6e-5

LOG_EVERY = 100  # steps
# Steps that each of two loops takes before it is the other's turn. On a busy machine the ratio of
# their times wandered by 10% with turns of 500, by 2% with turns of 100.
TURN = 100


@dataclass(frozen=True)
class XorResult:
    """What `xor` returns: the trajectory beside the reference, the trained network, and the time both loops took."""

    device: str
    steps: list[int]  # at which the loss was logged
    losses: list[float]  # before the update of that step
    reference: list[float | None]  # the table's loss at that step; None where the table has ended
    nn_losses: list[float]  # of the loop over nn.Linear + nn.Sigmoid
    model: nn.Sequential
    inputs: list[list[int]]
    targets: list[int]
    predictions: list[float]  # p of class 1, one per input
    explanation: MlpExplanation  # how the network runs
    seconds: float  # all steps, the first one's compilation included where there is one
    us_per_step: float  # microseconds, median over turns
    nn_seconds: float  # the same of nn.Linear + nn.Sigmoid
    nn_us_per_step: float
    ratio: float  # time of nn.Linear + nn.Sigmoid over that of the fused layers, median over pairs of turns

    @property
    def differences(self) -> list[float]:
        """|loss - reference| / reference at each step that the table has."""
        return _differences(self.losses, self.reference)

    @property
    def largest_difference(self) -> float:
        """The largest of `differences`, NaN if one of them is."""
        return torch.tensor(self.differences, dtype=torch.float64).max().item()

    @property
    def nn_largest_difference(self) -> float:
        """The same of the loop over nn.Linear + nn.Sigmoid: what torch itself makes of the table on this device."""
        return torch.tensor(_differences(self.nn_losses, self.reference), dtype=torch.float64).max().item()

    @property
    def largest_difference_step(self) -> int:
        return self.steps[int(torch.tensor(self.differences, dtype=torch.float64).argmax())]

    @property
    def matches(self) -> bool:
        """Whether every logged loss lies within XOR_BAND of the table's."""
        return self.largest_difference <= XOR_BAND

    @property
    def accuracy(self) -> float:
        """The share of inputs whose p is on the target's side of 0.5."""
        return sum((p > 0.5) == (t == 1) for p, t in zip(self.predictions, self.targets, strict=True)) / len(
            self.targets
        )


def xor(
    steps: int = XOR_STEPS, device: torch.device | str = "cpu", *, seed: int = XOR_SEED, progress: bool = False
) -> XorResult:
    """Trains a 2-2-1 sigmoid network on XOR: mean binary cross-entropy, SGD with lr 1, all four points at each step.

    steps: at least 1. device: "cpu" or a CUDA device; the weights are drawn on the CPU wherever they train. seed:
    that of the weights; the table belongs to 777. progress: a bar on stderr if that is a terminal, tqdm is installed
    and training takes longer than two seconds.

    The loss is logged every 100 steps from step 0, before that step's update. A second network of nn.Linear and
    nn.Sigmoid takes the same steps from the same weights; the two loops take turns of about 100 steps, so that
    whatever slows the machine slows both.

    The caller's random numbers are left as they were. Raises ValueError for steps below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    table = json.loads((REFERENCE / "xor_2-2-1.json").read_text())
    x = torch.tensor(table["x"], dtype=torch.float32, device=device)
    y = torch.tensor(table["y"], dtype=torch.float32, device=device)
    model = _draw(seed, lambda: MLP([2, 2, 1])).to(device)
    unfused = _draw(seed, lambda: nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 1), nn.Sigmoid()))
    ours, theirs = _Loop(model), _Loop(unfused.to(device))
    _take_turns((ours, theirs), x, y, steps, progress)

    with torch.no_grad():
        predictions = model(x).flatten().tolist()
    logged = list(range(0, steps, LOG_EVERY))
    reference = {step: loss for step, loss in table["loss"]}
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    return XorResult(
        device=str(device),
        steps=logged,
        losses=ours.losses,
        reference=[reference.get(step) for step in logged],
        nn_losses=theirs.losses,
        model=model,
        inputs=table["x"],
        targets=[target for (target,) in table["y"]],
        predictions=predictions,
        explanation=explain(x.shape, [layer.weight.shape for layer in linears], x.dtype, x.device),
        seconds=sum(ours.seconds),
        us_per_step=ours.us_per_step,
        nn_seconds=sum(theirs.seconds),
        nn_us_per_step=theirs.us_per_step,
        ratio=statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)),
    )


def _differences(losses: list[float], reference: list[float | None]) -> list[float]:
    return [abs(loss - r) / r for loss, r in zip(losses, reference, strict=True) if r is not None]


def _draw(seed: int, make):
    # The generator is seeded directly: torch.manual_seed would also reseed those of the GPUs, which are not restored.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


@dataclass
class _Loop:
    """An ordinary training loop that can be run piece by piece, with a clock."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # one per piece
    lengths: list[int] = field(default_factory=list)  # steps

    def __post_init__(self) -> None:
        self.criterion = nn.BCELoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)

    def run(self, x: Tensor, y: Tensor, steps: range) -> None:
        _finish(x.device)
        start = time.perf_counter()
        for step in steps:
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(x), y)
            if step % LOG_EVERY == 0:
                self.losses.append(loss.item())
            loss.backward()
            self.optimizer.step()
        _finish(x.device)
        self.seconds.append(time.perf_counter() - start)
        self.lengths.append(len(steps))

    @property
    def us_per_step(self) -> float:
        return statistics.median(1e6 * s / n for s, n in zip(self.seconds, self.lengths, strict=True))


def _take_turns(loops: tuple[_Loop, ...], x: Tensor, y: Tensor, steps: int, progress: bool) -> None:
    # No short piece at the end: its time would be noise.
    pieces = max(1, steps // TURN)
    bounds = [i * steps // pieces for i in range(pieces + 1)]
    with _bar(steps, progress) as bar:
        for turn, (start, stop) in enumerate(pairwise(bounds)):
            # Each goes first every other time, so that a steady drift favours neither.
            for loop in loops if turn % 2 == 0 else reversed(loops):
                loop.run(x, y, range(start, stop))
            if bar is not None:
                bar.update(stop - start)


def _bar(steps: int, wanted: bool):
    if wanted:
        try:
            from tqdm import tqdm
        except ImportError:
            return nullcontext()
        return tqdm(total=steps, unit="step", delay=2, leave=False, disable=None)  # None: unless stderr is a terminal
    return nullcontext()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
