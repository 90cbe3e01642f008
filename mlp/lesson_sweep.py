"""The lesson that trains thousands of networks at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from .ensemble import Ensemble
from .lesson_by_hand import SOLVED
from .lesson_race import FUSED, NN, FitCalls, Loop, Task, Trajectory, check_steps, draw, explained, race, table
from .lesson_training import XOR_BAND, XOR_SEED, unfused, xor_data
from .model import MLP

__all__ = ["SWEEP_RATES", "SWEEP_SEEDS", "SWEEP_STEPS", "Sweep", "sweep"]

SWEEP_SEEDS = 1000
SWEEP_STEPS = 5001
# Four to a decade; 1 is that of the lesson xor.
SWEEP_RATES = tuple(10 ** (k / 4) for k in range(-4, 8))


@dataclass(frozen=True)
class Sweep:
    """What `sweep` returns."""

    rates: list[float]  # (R,), learning rates
    seeds: range  # (S,)
    steps: list[int]  # (L,), at which the losses were logged
    losses: Tensor  # (L, R, S), mean binary cross-entropy before the update of that step, nats
    trajectory: Trajectory  # of the network of seed 777 at rate 1, alone and as a member, beside the table of xor

    @property
    def success(self) -> Tensor:
        """(L, R): the share of seeds whose loss is below SOLVED at that step, which proves all four answers right."""
        return (self.losses < SOLVED).double().mean(-1)

    @property
    def networks(self) -> int:
        return len(self.rates) * len(self.seeds)

    @property
    def misses(self) -> list[str]:
        """What does not follow the table, one phrase for each."""
        return self.trajectory.misses

    @property
    def matches(self) -> bool:
        return not self.misses


def sweep(
    steps: int = SWEEP_STEPS,
    device: torch.device | str = "cpu",
    *,
    seeds: int = SWEEP_SEEDS,
    rates: Sequence[float] = SWEEP_RATES,
    first_seed: int = XOR_SEED,
    progress: bool = False,
) -> Sweep:
    """Trains 2-2-1 networks on XOR from `seeds` seeds at each learning rate, all of them in one call of `fit`.

    The seeds are 777, 778, ...: each network is the one that the lesson `xor` would draw from its seed, so it can be
    had alone, and a sweep repeats to the bit. The network of seed 777 at rate 1 must follow the table of `xor`; one of
    nn.Linear + nn.Sigmoid and one of fused layers train alone beside it, in turns as in `xor`, to compare the times
    per step of one network.

    rates: 1 must be among them. first_seed: the table belongs to 777.

    Raises ValueError for steps or seeds below 1 and for rates without a 1.
    """
    check_steps(steps)
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds}")
    if 1.0 not in rates:
        raise ValueError(f"rates must hold 1, that of the table, not only {', '.join(f'{r:g}' for r in rates)}")
    drawn = range(first_seed, first_seed + seeds)
    models = [draw(seed, partial(MLP, [2, 2, 1])) for seed in drawn]
    ensemble = Ensemble.from_models(models).subset(torch.arange(seeds).repeat(len(rates))).to(device)
    x, y = (t.to(device) for t in xor_data())
    task = Task(x, y, nn.BCELoss(), partial(torch.optim.SGD, lr=1.0), steps, log_every=100)
    lr = torch.tensor(rates, dtype=torch.float32).repeat_interleave(seeds)
    member = list(rates).index(1.0) * seeds
    together = FitCalls(ensemble, task, name=f"fit, {len(ensemble):,} at once", calls=1, lr=lr, column=member)
    alone = [
        Loop(name, draw(first_seed, partial(build, [2, 2, 1])).to(device), task)
        for name, build in ((NN, unfused), (FUSED, MLP))
    ]
    *runs, run = race(task, [*alone, together], progress)
    losses = dict(table("xor_2-2-1")["loss"])
    reference = [losses.get(step) for step in task.logged]
    trajectory = Trajectory(
        device=str(device),
        sizes=[2, 2, 1],
        steps=list(task.logged),
        reference=reference,
        bands=[None if loss is None else XOR_BAND for loss in reference],
        initial=models[0].to(device),
        runs=(*runs, replace(run, model=cast(Ensemble, together.model).member(member))),
        samples=x.cpu(),
        targets=y.flatten().cpu(),
        points=x.cpu(),
        expected=None,
        prediction_band=math.nan,
        explanation=explained([2, 2, 1], x),
    )
    shown = together.history.loss.reshape(len(task.logged), len(rates), seeds)
    return Sweep(list(rates), drawn, list(task.logged), shown, trajectory)
