# SPDX-License-Identifier: Apache-2.0
"""The lesson in which a perceptron separates two blobs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..model import MLP
from .lesson import Count, Lesson
from .pictures import (
    BLUE,
    INK,
    VERMILION,
    Curve,
    Figure,
    curve,
    draw_classes,
    draw_losses,
    draw_probability,
    line_of,
    new_figure,
    surface,
    tidy,
)
from .problem import WAYS, contenders, network_from_seed, own_defaults, table
from .race import Task, race
from .text import (
    TURNS,
    View,
    agreement,
    counted,
    grid,
    loss_table,
    page,
    prediction_table,
    sections,
    short_name,
    timing_table,
)
from .trajectory import Trajectory, outputs, trajectory_of

BLOBS_SEED = 2
BLOBS_STEPS = 1000
# Relative. A mean over 100 losses near 0.5 that is off by a few units in the last place of fp32, 6e-8 each.
BLOBS_BAND = 1e-6


@own_defaults()
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
    given, sizes = table("blobs_2-1"), [2, 1]
    x, y = (t.to(device) for t in blobs_data())
    task = Task(x, y, nn.BCELoss(), partial(torch.optim.SGD, lr=0.01), steps, log_every=1)
    network = network_from_seed(seed, device, sizes)
    runs = race(task, contenders(task, network, ways), progress)
    losses = dict(enumerate(given["loss_first"])) | {int(step): loss for step, loss in given["loss_last"].items()}
    expected = list(given["probability"].values()) if steps == BLOBS_STEPS else None
    bands = {"band": lambda loss: BLOBS_BAND, "prediction_band": BLOBS_BAND}
    options = {"points": torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), "expected": expected, **bands}
    return trajectory_of(task, device, sizes, network(MLP), runs, reference=losses, **options)


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
    return torch.from_numpy(x[order]).float(), torch.from_numpy(y[order, None]).float()


def _intro(steps: int) -> str:
    return page(
        "A perceptron: one layer, one output. It draws one line through the plane, and learns where.",
        """
        p = sigmoid(w1 x1 + w2 x2 + b)      p = 1/2 on the line w1 x1 + w2 x2 + b = 0
        dloss/dw = mean of (p - t) x        dloss/db = mean of (p - t)
        """,
        "Fifty points around (-0.5, 0.5) are class 0, fifty around (0.5, -0.5) are class 1. "
        f"{counted(steps, 'step')} of size 0.01 over all hundred, weights drawn with seed {BLOBS_SEED}. {TURNS}",
    )


def _report(result: Trajectory, view: View) -> str:
    head = [
        [*(f"{value:.4f}" for value in point), f"{target:g}"]
        for point, target in zip(result.samples[:5].tolist(), result.targets[:5].tolist(), strict=True)
    ]
    models = {"before": result.initial} | {short_name(run.name): run.model for run in result.runs}
    weights = [
        [name, *(f"{value:.4f}" for p in model.parameters() for value in p.flatten().tolist())]
        for name, model in models.items()
    ]
    # The textbook prints the first ten losses and the last ten, of which two are known here.
    ends = sorted({*range(len(result.steps))[:10], *range(len(result.steps))[-10:]})
    return sections(
        ["The first five of the hundred points:", *grid(["x1", "x2", "class"], head, 2)],
        ["Weights before training and after it:", *grid(["", "w1", "w2", "b"], weights)],
        loss_table(result, view, rows=ends),
        agreement(result),
        prediction_table(result),
        timing_table(view, result.runs),
    )


@dataclass(frozen=True)
class BlobsPicture(Curve):
    """What `plot_blobs` draws."""

    axis: np.ndarray  # (G,), the values of x1 and of x2 on the grid
    before: np.ndarray  # (G, G), p of class 1 before training, as in TrainingPicture
    after: np.ndarray  # (G, G), the same after it
    lines: dict[str, np.ndarray]  # "before", "after": (2, 2), two points (x1, x2) of the line p = 0.5
    z: np.ndarray  # (Z,), and p = sigmoid(z), beside it
    sigmoid: np.ndarray
    p: np.ndarray  # (P,), and what an answer p costs where 1 is right and where 0 is
    costs: dict[int, np.ndarray]


def plot_blobs(result: Trajectory) -> tuple[Figure, BlobsPicture]:
    """The points, the line p = 0.5 before and after training; the sigmoid, what an answer costs, the loss by step.

    Raises ImportError if matplotlib is missing.
    """
    figure = new_figure(14, 9)
    run = result.runs[-1]
    axis = np.linspace(-2, 2, 201)
    models = {"before": result.initial, "after": run.model}
    surfaces = {name: surface(model, axis) for name, model in models.items()}
    lines = {name: line_of(model) for name, model in models.items()}
    z, p = np.linspace(-6, 6, 121), np.linspace(0.01, 0.99, 99)
    functions = {"z": z, "sigmoid": 1 / (1 + np.exp(-z)), "p": p, "costs": {1: -np.log(p), 0: -np.log(1 - p)}}
    data = BlobsPicture(**curve(result, run), axis=axis, **surfaces, lines=lines, **functions)
    (points, before, after), (sigmoid, cost, loss_axes) = figure.subplots(2, 3)
    draw_classes(points, result, size=6, edge=0.8)
    points.set(title="Two blobs of fifty points", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    points.set(xlim=(-2, 2), ylim=(-2, 2), xticks=range(-2, 3), yticks=range(-2, 3))
    points.legend(loc="upper right", frameon=False)
    sigmoid.plot(data.z, data.sigmoid, color=BLUE, linewidth=2, label="sigmoid(z) = 1 / (1 + exp(-z))")
    sigmoid.set(title="The sigmoid", xlabel="$z = w_1 x_1 + w_2 x_2 + b$", ylabel="p, the output for class 1")
    for label, colour in ((1, BLUE), (0, VERMILION)):
        formula = "-ln p" if label else "-ln(1 - p)"
        cost.plot(data.p, data.costs[label], color=colour, linewidth=2, label=f"{formula}: class {label} is right")
    cost.set(title="Cross entropy: what an answer costs", xlabel="p, the output for class 1", ylabel="loss (nats)")
    cost.set(ylim=(0, None))
    tidy(sigmoid)
    tidy(cost)
    plane = None
    for axes, name in ((before, "before"), (after, "after")):
        plane = draw_probability(axes, axis, getattr(data, name))
        axes.axline(*data.lines[name], color=INK, linewidth=1.8, label="p = 0.5")
        draw_classes(axes, result, size=6, edge=0.8)
        star = {"mfc": "white", "mec": INK, "markersize": 15, "label": "test point"}
        axes.plot(*result.points.T.tolist(), "*", **star)
        found = outputs(models[name], result.points).flatten().tolist()
        for (x1, x2), at in zip(result.points.tolist(), found, strict=True):
            outwards = (16 * x1, 30 * x2)
            axes.annotate(
                f"p = {at:.3f}", (x1, x2), outwards, textcoords="offset points", ha="center", va="center", color=INK
            )
        axes.set(xlim=(-2, 2), ylim=(-2, 2), xticks=range(-2, 3), yticks=range(-2, 3), aspect="equal")
        axes.set(xlabel="$x_1$", ylabel="$x_2$", title=f"The perceptron {name} training")
    before.legend(loc="upper right", facecolor="white", framealpha=0.9, edgecolor="none", fontsize=9)
    figure.colorbar(plane, ax=(before, after), label="p, the output for class 1")
    draw_losses(loss_axes, data, run.name, "textbook")
    loss_axes.set(title="Loss of a 2-1 perceptron on two blobs", yscale="linear", ylim=(0, None))
    return figure, data


BLOBS = Lesson(
    name="blobs",
    summary="a perceptron separates two blobs",
    run=blobs,
    intro=_intro,
    report=_report,
    counts=(Count("steps", BLOBS_STEPS),),
    plot=plot_blobs,
    picture="the decision line before and after training, the functions and the loss",
)
