# SPDX-License-Identifier: Apache-2.0
"""The lesson that trains thousands of networks at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..ensemble import Ensemble
from ..model import MLP
from ._by_hand import SOLVED
from ._xor import XOR_BAND, XOR_SEED, xor_task
from .lesson import Count, Lesson
from .pictures import Figure, new_figure
from .problem import contenders, draw, network_from_seed, own_defaults, table
from .race import FitCalls, race
from .text import View, agreement, counted, fill, grid, loss_table, page, sections, shown_rows, timing_table
from .trajectory import Trajectory, trajectory_of
from .values import Result

SWEEP_SEEDS = 1000
SWEEP_STEPS = 5001
# Four rates to a decade, among them 1, which is that of the lesson xor.
SWEEP_RATES = tuple(10 ** (k / 4) for k in range(-4, 8))


@dataclass(frozen=True)
class Sweep(Result):
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


@own_defaults()
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
    task, sizes = xor_task(steps, device), [2, 2, 1]
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds}")
    if 1.0 not in rates:
        raise ValueError(f"rates must hold 1, that of the table, not only {', '.join(f'{r:g}' for r in rates)}")
    drawn_seeds = range(first_seed, first_seed + seeds)
    models = [draw(seed, partial(MLP, sizes)) for seed in drawn_seeds]
    ensemble = Ensemble.from_models(models).subset(torch.arange(seeds).repeat(len(rates))).to(device)
    lr = torch.tensor(rates, dtype=torch.float32).repeat_interleave(seeds)
    member = list(rates).index(1.0) * seeds
    together = FitCalls(ensemble, task, name=f"fit, {len(ensemble):,} at once", calls=1, lr=lr, column=member)
    alone = contenders(task, network_from_seed(first_seed, device, sizes), ("nn", "fused"))
    *runs, run = race(task, [*alone, together], progress)
    runs.append(replace(run, model=cast(Ensemble, together.model).member(member)))
    initial, reference = models[0].to(device), dict(table("xor_2-2-1")["loss"])
    trajectory = trajectory_of(task, device, sizes, initial, tuple(runs), lambda loss: XOR_BAND, reference)
    found = together.history.loss.reshape(len(task.logged), len(rates), seeds)
    return Sweep(list(rates), drawn_seeds, list(task.logged), found, trajectory)


def _intro(steps: int, seeds: int) -> str:
    return page(
        "Does a 2-2-1 network learn XOR? That hangs on its first weights and on the learning rate. Here "
        f"{counted(seeds, 'seed')} at each of {len(SWEEP_RATES)} rates, {seeds * len(SWEEP_RATES):,} networks, "
        f"take {counted(steps, 'step')} in one call of `fit`.",
        """
        success:  mean loss over the four cases < ln 2 / 4 = 0.1733
        """,
        "That is proof: an answer on the wrong side of 1/2 costs at least ln 2, a quarter of which is in the mean. "
        f"Seeds count from {XOR_SEED}, so the first network at rate 1 is that of the lesson xor, and must "
        "follow its table.",
    )


def _report(result: Sweep, view: View) -> str:
    percent = [(step, (100 * share).tolist()) for step, share in zip(result.steps, result.success, strict=True)]
    rows = [[str(step), *(f"{p:.1f}" for p in shares)] for step, shares in percent]
    shown = [rows[i] for i in shown_rows(result.steps, view.every)]
    best, trajectory = int(result.success[-1].argmax()), result.trajectory
    return sections(
        [
            fill(
                f"Percent of {counted(len(result.seeds), 'seed')} that have learned XOR, by step and by learning rate:"
            ),
            *grid(["step", *(f"{rate:.3g}" for rate in result.rates)], shown),
        ],
        [
            fill(
                f"At the end {result.success[-1, best].item():.1%} have, at a rate of {result.rates[best]:.3g}. Too "
                "small a rate has not got there yet. Too large a one throws the weights so far out that the sigmoids "
                "are flat, where nothing moves them any more."
            )
        ],
        [
            f"Seed {result.seeds[0]} at rate 1, alone and among the {result.networks:,}:",
            *loss_table(trajectory, view),
        ],
        agreement(trajectory),
        timing_table(view, trajectory.runs),
    )


@dataclass(frozen=True)
class SweepPicture:
    """What `plot_sweep` draws."""

    rates: np.ndarray  # (R,)
    steps: np.ndarray  # (L,)
    success: np.ndarray  # (L, R), shares of the seeds


def plot_sweep(result: Sweep) -> tuple[Figure, SweepPicture]:
    """A heat map: the share of seeds that have succeeded, over learning rates and steps.

    Raises ImportError if matplotlib is missing.
    """
    figure = new_figure(9, 5.6)
    data = SweepPicture(np.array(result.rates), np.array(result.steps), result.success.numpy())
    axes = figure.subplots()
    columns = np.arange(len(data.rates) + 1) - 0.5
    rows = np.append(data.steps, data.steps[-1] + 100) - 50
    surface = axes.pcolormesh(columns, rows, 100 * data.success, cmap="cividis", vmin=0, vmax=100, rasterized=True)
    figure.colorbar(surface, ax=axes, label="seeds that have succeeded (%)")
    axes.set_xticks(range(len(data.rates)), [f"{rate:.2g}" for rate in data.rates])
    last = axes.secondary_xaxis("top")
    last.set_xticks(range(len(data.rates)), [f"{100 * share:.0f}%" for share in data.success[-1]])
    last.tick_params(length=0)
    last.set_xlabel(f"at step {data.steps[-1]:,}")
    axes.set(xlabel="learning rate", ylabel="step of gradient descent")
    axes.set_title(f"XOR: success of {len(result.seeds):,} 2-2-1 networks at each learning rate", pad=12)
    return figure, data


SWEEP = Lesson(
    name="sweep",
    summary="how often 2-2-1 networks learn exclusive or, over seeds and learning rates",
    run=sweep,
    intro=_intro,
    report=_report,
    counts=(Count("steps", SWEEP_STEPS), Count("seeds", SWEEP_SEEDS, "seeds at each learning rate")),
    plot=plot_sweep,
    picture="the heat map of success",
)
