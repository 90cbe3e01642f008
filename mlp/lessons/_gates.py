# SPDX-License-Identifier: Apache-2.0
"""The lesson in which one layer learns AND and OR and cannot learn XOR."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model import MLP
from ._xor import XOR_SEED, xor_data, xor_task
from .lesson import Count, Lesson
from .pictures import INK, Figure, draw_classes, draw_probability, line_of, new_figure, surface
from .problem import WAYS, contenders, draw, network_from_seed, own_defaults
from .race import race
from .text import TURNS, View, counted, fill, grid, page, sections, shown_rows, timing_table
from .trajectory import Trajectory, trajectory_of
from .values import Result

GATES_STEPS = 2001
GATES = {"AND": (0, 0, 0, 1), "OR": (0, 1, 1, 1), "XOR": (0, 1, 1, 0)}  # the answers to 00, 01, 10, 11
# Relative. Rounding in fp32 moves a loss, which is above 0.03, by a few units in the last place of numbers near 1.
GATES_BAND = 1e-5


@dataclass(frozen=True)
class Gates(Result):
    """What `gates` returns."""

    trajectories: dict[str, Trajectory]  # of each gate; the reference is the first run
    crash: str  # what torch says of ten outputs against one target

    @property
    def misses(self) -> list[str]:
        """Which gate was learned although it cannot be, or not although it can, one phrase for each way."""
        found = [f"{gate}: {miss}" for gate, trajectory in self.trajectories.items() for miss in trajectory.misses]
        for gate, trajectory in self.trajectories.items():
            for run in trajectory.runs:
                right = trajectory.accuracy(run)
                if (right == 1) != (gate != "XOR"):
                    found.append(f"{gate}: {run.name}: {right:.0%} of the answers right")
        return found


@own_defaults()
def gates(
    steps: int = GATES_STEPS,
    device: torch.device | str = "cpu",
    *,
    seed: int = XOR_SEED,
    ways: Sequence[str] = WAYS,
    progress: bool = False,
) -> Gates:
    """Trains one layer 2-1 with a sigmoid on each of AND, OR and XOR: mean binary cross-entropy, SGD with lr 1.

    The loss of one layer is convex: on XOR it has one lowest point, ln 2, where all weights are 0 and each answer is a
    half. So AND and OR must be learned and XOR must not. The arguments and errors are those of `xor`.
    """
    task, sizes = xor_task(steps, device), [2, 1]
    network = network_from_seed(seed, device, sizes)
    found = {}
    for gate, answers in GATES.items():
        own = replace(task, y=torch.tensor(answers, dtype=torch.float32, device=device)[:, None])
        runs = race(own, contenders(own, network, ways), progress)
        found[gate] = trajectory_of(own, device, sizes, network(MLP), runs, lambda loss: GATES_BAND)
    return Gates(found, _crash())


def _crash() -> str:
    """What torch says where a network has ten outputs and each sample one target."""
    network, (x, y) = draw(0, lambda: nn.Sequential(nn.Linear(2, 10), nn.Sigmoid())), xor_data()
    try:
        nn.BCELoss()(network(x), y)
    except ValueError as error:
        return f"ValueError: {error}"
    return ""


def _intro(steps: int) -> str:
    return page(
        "One layer with one output, a perceptron, answers with one straight line through the plane. Is a line enough?",
        """
        p = sigmoid(w1 x1 + w2 x2 + b)      answer 1 where p > 1/2
        loss = mean of -t ln p - (1 - t) ln(1 - p)      t: the right answer
        every weight: w <- w - 1 dloss/dw
        """,
        "For AND (1 where both inputs are 1) and for OR (1 where at least one is) there is a line with the ones on its "
        "one side and the zeros on its other. For XOR (1 where exactly one is) there is none. "
        f"{counted(steps, 'step')} for each. {TURNS}",
    )


def _report(result: Gates, view: View) -> str:
    found = {gate: (trajectory, trajectory.runs[-1]) for gate, trajectory in result.trajectories.items()}
    steps = result.trajectories["XOR"].steps
    losses = [
        [str(steps[i]), *(f"{run.losses[i]:.8f}" for _, run in found.values())] for i in shown_rows(steps, view.every)
    ]
    p = [trajectory.predictions(run) for trajectory, run in found.values()]
    inputs = result.trajectories["XOR"].samples.tolist()
    answers = [[*(f"{x:g}" for x in point), *(f"{own[i]:.4f}" for own in p)] for i, point in enumerate(inputs)]
    largest = max(t.largest_difference(run)[0] for t in result.trajectories.values() for run in t.runs)
    verdict = f" All match {result.trajectories['XOR'].against}." if result.matches else ""
    right = ", ".join(f"{gate} {4 * trajectory.accuracy(run):.0f}" for gate, (trajectory, run) in found.items())
    return sections(
        ["The loss by step, of fit:", *grid(["step", *found], losses)],
        [
            "p after the last step:",
            *grid(["x1", "x2", *found], answers, 2),
            fill(f"Right answers, of four: {right}."),
        ],
        [
            fill(
                "XOR stays at ln 2 = 0.6931 and answers 1/2 to everything. That is no accident of these weights: the "
                "loss of one layer is convex, without valleys to get stuck in, and for XOR its lowest point is where "
                "all weights are 0. It takes a hidden layer: see the lesson xor."
            )
        ],
        [fill(f"Losses of nn, fused and fit differ by up to {largest:.1e} of their size, by rounding.{verdict}")],
        ["Ten outputs for one target stop with an error:"],
        ["    network = nn.Sequential(nn.Linear(2, 10), nn.Sigmoid())", "    nn.BCELoss()(network(x), y)"],
        [fill(result.crash, "    ", "    ")],
        [
            fill(
                "Four samples make (4, 10) outputs, and there are (4, 1) targets: nine outputs in ten have nothing to "
                "be compared with. The last layer must have as many outputs as a sample has targets, here one: "
                "nn.Linear(10, 1) after a hidden layer of ten."
            )
        ],
        *([f"{gate}:", *timing_table(view, trajectory.runs)] for gate, (trajectory, _) in found.items() if view.timing),
    )


@dataclass(frozen=True)
class GatesPicture:
    """What `plot_gates` draws."""

    axis: np.ndarray  # (G,), the values of x1 and of x2 on the grid
    surfaces: dict[str, np.ndarray]  # (G, G) of each gate, p as in TrainingPicture
    lines: dict[str, np.ndarray]  # (2, 2) of AND and OR, two points of the line p = 0.5


def plot_gates(result: Gates) -> tuple[Figure, GatesPicture]:
    """What one layer makes of the plane for each gate. Raises ImportError if matplotlib is missing."""
    figure, axis = new_figure(13, 4.4), np.linspace(-0.5, 1.5, 201)
    models = {gate: trajectory.runs[-1].model for gate, trajectory in result.trajectories.items()}
    lines = {gate: line_of(model) for gate, model in models.items() if gate != "XOR"}
    data = GatesPicture(axis, {gate: surface(model, axis) for gate, model in models.items()}, lines)
    panels = figure.subplots(1, 3)
    plane: Any = None
    for axes, (gate, trajectory) in zip(panels, result.trajectories.items(), strict=True):
        plane = draw_probability(axes, axis, data.surfaces[gate])
        if gate in lines:
            axes.axline(*lines[gate], color=INK, linewidth=1.8, label="p = 0.5")
        draw_classes(axes, trajectory, size=11, edge=2)
        right = f"{4 * trajectory.accuracy(trajectory.runs[-1]):.0f} of 4 right"
        axes.set(
            title=f"{gate}: {right if gate in lines else 'p = 0.5 everywhere'}",
            xlabel="$x_1$",
            ylabel="$x_2$",
            aspect="equal",
        )
        axes.set(xlim=(-0.5, 1.5), ylim=(-0.5, 1.5), xticks=[-0.5, 0, 0.5, 1, 1.5], yticks=[-0.5, 0, 0.5, 1, 1.5])
    panels[0].legend(loc="center left", facecolor="white", framealpha=0.9, edgecolor="none")
    figure.colorbar(plane, ax=panels, label="p, the output for class 1")
    return figure, data


GATES_LESSON = Lesson(
    name="gates",
    summary="one layer learns AND and OR and cannot learn exclusive or",
    run=gates,
    intro=_intro,
    report=_report,
    counts=(Count("steps", GATES_STEPS),),
    plot=plot_gates,
    picture="what one layer makes of the plane for each gate",
)
