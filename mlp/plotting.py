"""Pictures of the lessons. Each function returns the figure and the data in it; matplotlib is imported on first use."""

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .lessons import FUSED, NN, ByHand, Digits, Run, Sweep, Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BlobsPicture",
    "DigitsPicture",
    "SweepPicture",
    "TrainingPicture",
    "check_target",
    "plot_blobs",
    "plot_by_hand",
    "plot_digits",
    "plot_sweep",
    "plot_training",
    "save",
]

# Okabe and Ito's colours, which remain apart under every common colour blindness.
BLUE, VERMILION, INK = "#0072B2", "#D55E00", "#222222"
# Tints of the two for areas, so that points in the full colours stand out on them.
PALE_BLUE, PALE_VERMILION = "#8CC4E6", "#F2AE80"


@dataclass(frozen=True)
class TrainingPicture:
    """What `plot_training` and `plot_by_hand` draw."""

    steps: np.ndarray  # (L,)
    losses: np.ndarray  # (L,), nats
    reference_steps: np.ndarray  # (R,), R <= L
    reference_losses: np.ndarray  # (R,)
    axis: np.ndarray  # (G,), the values of x1 and of x2 on the grid
    probability: np.ndarray  # (G, G), p of class 1; row i has x2 = axis[i], column j has x1 = axis[j]


@dataclass(frozen=True)
class BlobsPicture:
    """What `plot_blobs` draws."""

    steps: np.ndarray  # (L,)
    losses: np.ndarray  # (L,), nats
    reference_steps: np.ndarray  # (R,)
    reference_losses: np.ndarray  # (R,)
    axis: np.ndarray  # (G,), the values of x1 and of x2 on the grid
    before: np.ndarray  # (G, G), p of class 1 before training, as in TrainingPicture
    after: np.ndarray  # (G, G), the same after it
    lines: dict[str, np.ndarray]  # "before", "after": (2, 2), two points (x1, x2) of the line p = 0.5


@dataclass(frozen=True)
class SweepPicture:
    """What `plot_sweep` draws."""

    rates: np.ndarray  # (R,)
    steps: np.ndarray  # (L,)
    success: np.ndarray  # (L, R), shares of the seeds


@dataclass(frozen=True)
class DigitsPicture:
    """What `plot_digits` draws."""

    steps: np.ndarray  # (L,)
    losses: dict[str, np.ndarray]  # (L,) of each contender, nats
    accuracies: dict[str, float]  # of each contender, on the test images
    misread: list[int]  # indices of the test images shown
    read: list[int]  # what each of these was taken for


def plot_training(result: Trajectory) -> "tuple[Figure, TrainingPicture]":
    """The loss of `fit` against the step with the reference on top, and the network's output over the plane.

    Raises ImportError if matplotlib is missing.
    """
    widths = "-".join(map(str, result.sizes))
    return _plot_training(result, result.runs[-1], result.reference, f"Loss of a {widths} network on XOR", "reference")


def plot_by_hand(result: ByHand) -> "tuple[Figure, TrainingPicture]":
    """The same of the loop by hand, with the textbook's losses, which are those of other weights.

    Raises ImportError if matplotlib is missing.
    """
    title = "Loss by hand-written backpropagation on XOR"
    return _plot_training(
        result.trajectory, result.trajectory.runs[0], result.textbook, title, "textbook, from other weights"
    )


def plot_blobs(result: Trajectory) -> "tuple[Figure, BlobsPicture]":
    """The points with the decision line before and after training, and the loss against the step.

    Raises ImportError if matplotlib is missing.
    """
    figure = _figure(14, 4.6)
    run = result.runs[-1]
    compared = [(s, r) for s, r in zip(result.steps, result.reference, strict=True) if r is not None]
    axis = np.linspace(-2, 2, 201)
    models = {"before": result.initial, "after": run.model}
    data = BlobsPicture(
        np.array(result.steps),
        np.array(run.losses),
        np.array([s for s, _ in compared]),
        np.array([r for _, r in compared]),
        axis,
        _surface(result.initial, axis),
        _surface(run.model, axis),
        {name: _decision_line(model) for name, model in models.items()},
    )
    loss_axes, before, after = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    surface = None
    for axes, name in ((before, "before"), (after, "after")):
        surface = _draw_probability(axes, axis, getattr(data, name))
        axes.axline(*data.lines[name], color=INK, linewidth=1.8, label="p = 0.5")
        _draw_classes(axes, result, size=6, edge=0.8)
        axes.plot(
            *result.points.T.tolist(),
            linestyle="none",
            marker="*",
            markersize=15,
            markerfacecolor="white",
            markeredgecolor=INK,
            label="test point",
        )
        for (x1, x2), p in zip(result.points.tolist(), _at(models[name], result.points), strict=True):
            outwards = (16 * x1, 30 * x2)
            axes.annotate(
                f"p = {p:.3f}", (x1, x2), outwards, textcoords="offset points", ha="center", va="center", color=INK
            )
        axes.set(xlim=(-2, 2), ylim=(-2, 2), xticks=range(-2, 3), yticks=range(-2, 3), aspect="equal")
        axes.set(xlabel="$x_1$", ylabel="$x_2$", title=f"The perceptron {name} training")
    before.legend(loc="upper right", facecolor="white", framealpha=0.9, edgecolor="none", fontsize=9)
    figure.colorbar(surface, ax=after, label="p, the output for class 1")
    _draw_losses(loss_axes, data, run.name, "reference")
    loss_axes.set(title="Loss of a 2-1 perceptron on two blobs", yscale="linear", ylim=(0, None))
    return figure, data


def plot_sweep(result: Sweep) -> "tuple[Figure, SweepPicture]":
    """A heat map: the share of seeds that have succeeded, over learning rates and steps.

    Raises ImportError if matplotlib is missing.
    """
    figure = _figure(9, 5.6)
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


def plot_digits(result: Digits) -> "tuple[Figure, DigitsPicture]":
    """The losses of all contenders, which lie on each other, and the test images that `fit` misreads most surely.

    Raises ImportError if matplotlib is missing.
    """
    figure = _figure(12, 4.8)
    trajectory = result.trajectory
    last = trajectory.runs[-1]
    data = DigitsPicture(
        np.array(trajectory.steps),
        {run.name: np.array(run.losses) for run in trajectory.runs},
        {run.name: result.accuracy(run) for run in trajectory.runs},
        result.misread(last)[:6],
        result.read(last)[result.misread(last)[:6]].tolist(),
    )
    left, right = figure.subfigures(1, 2, width_ratios=(1.4, 1))  # pyright: ignore[reportGeneralTypeIssues]
    axes = left.subplots()
    # From the widest to the narrowest, so that each shows on the one below.
    looks = {
        NN: {"color": PALE_BLUE, "linewidth": 7},
        FUSED: {"color": VERMILION, "linewidth": 2.6},
    }
    for name, losses in data.losses.items():
        label = f"{name}: {data.accuracies[name]:.1%} of the test images"
        look = looks.get(name, {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 3))})
        axes.plot(data.steps, losses, label=label, solid_capstyle="round", **look)
    axes.set(xlabel="step of Adam", ylabel="mean binary cross-entropy of the minibatch (nats)", yscale="log")
    axes.set_title("Three ways to train a 64-128-10 network: one curve on the other")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    count = f"{len(result.misread(last))} of {len(result.images)} test images"
    right.suptitle(f"{last.name} misreads {count}" + ("; the surest:" if data.misread else ""))
    p = result.probabilities(last)
    for cell, index, read in zip(right.subplots(2, 3).flat, data.misread, data.read, strict=False):
        cell.imshow(result.images[index].view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        cell.set_title(f"a {result.labels[index]}, read as {read}\n(p = {p[index, read]:.2f})", fontsize=10)
    for cell in right.axes:
        cell.set(xticks=[], yticks=[], frame_on=bool(cell.images))
    return figure, data


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises ValueError if `save` could not write to this path, ImportError if matplotlib is missing."""
    figure = _figure(1, 1)
    target = Path(path)
    # pgf is left out because it needs LaTeX.
    suffixes = sorted(set(figure.canvas.get_supported_filetypes()) - {"pgf"})
    if target.suffix[1:].lower() not in suffixes:
        raise ValueError(f"{str(path)!r} must end in one of .{', .'.join(suffixes)}")
    try:
        if not target.parent.is_dir():
            raise ValueError(f"{str(target.parent)!r} is not a directory")
        if target.exists() and not target.is_file():
            raise ValueError(f"{str(path)!r} exists and is not a file")
        probe = _beside(target)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written: {error.strerror}") from None


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Writes the figure in the format that the path's suffix names.

    The file is complete or not there: it is written under another name beside the target and then renamed. Raises
    OSError if it cannot be written.
    """
    target = Path(path)
    partial = _beside(target)
    try:
        figure.savefig(partial, format=target.suffix[1:].lower(), dpi=150)
        os.replace(partial, os.path.realpath(target))
    finally:
        partial.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return Path(os.path.realpath(target)).with_name(f".perceptriton-{secrets.token_hex(4)}{target.suffix}")


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: install perceptriton[cli]") from error
    return Figure(figsize=(width, height), layout="compressed")


def _plot_training(
    result: Trajectory, run: Run, reference: Sequence[float | None], title: str, label: str
) -> "tuple[Figure, TrainingPicture]":
    figure = _figure(11, 4.8)
    compared = [(s, r) for s, r in zip(result.steps, reference, strict=True) if r is not None]
    axis = np.linspace(-0.5, 1.5, 201)
    data = TrainingPicture(
        np.array(result.steps),
        np.array(run.losses),
        np.array([s for s, _ in compared]),
        np.array([r for _, r in compared]),
        axis,
        _surface(run.model, axis),
    )
    loss_axes, plane_axes = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_losses(loss_axes, data, run.name, label)
    loss_axes.set_title(title)
    surface = _draw_probability(plane_axes, axis, data.probability)
    bar = figure.colorbar(surface, ax=plane_axes, label="p, the output for class 1")
    # A network that has hardly been trained may be on one side of 0.5 everywhere.
    if data.probability.min() < 0.5 < data.probability.max():
        lines = plane_axes.contour(axis, axis, data.probability, levels=[0.5], colors=INK, linewidths=1.5)
        plane_axes.clabel(lines, fmt=lambda p: f"p = {p:g}", fontsize=9)
        bar.add_lines(lines)
    _draw_classes(plane_axes, result, size=11, edge=2)
    ticks = [-0.5, 0, 0.5, 1, 1.5]
    plane_axes.set(title="What the network makes of the plane", xlabel="$x_1$", ylabel="$x_2$")
    plane_axes.set(xticks=ticks, yticks=ticks, aspect="equal")
    plane_axes.legend(loc="upper left", facecolor="white", framealpha=0.9, edgecolor="none")
    return figure, data


@torch.no_grad()
def _at(model: torch.nn.Module, points: torch.Tensor) -> list[float]:
    parameter = next(model.parameters())
    return model(points.to(parameter.device, parameter.dtype)).flatten().tolist()


def _surface(model: torch.nn.Module, axis: np.ndarray) -> np.ndarray:
    grid = torch.from_numpy(np.stack(np.meshgrid(axis, axis), -1)).flatten(0, 1)
    return np.array(_at(model, grid), dtype=np.float32).reshape(len(axis), len(axis))


def _decision_line(model: torch.nn.Module) -> np.ndarray:
    """(2, 2): two points (x1, x2) with w1 x1 + w2 x2 + b = 0, one length of w apart."""
    weight, bias = (p.detach().cpu().double().numpy() for p in model.parameters())
    (w,), (b,) = weight, bias
    foot = -b * w / (w @ w)  # the line's point nearest to the origin
    return np.stack([foot, foot + np.array([-w[1], w[0]])])


def _draw_losses(axes, data: TrainingPicture | BlobsPicture, name: str, reference: str) -> None:
    # All hundred points would hide the line under them.
    every = max(1, len(data.reference_steps) // 33)
    shown = data.reference_steps[::every]
    even = len(set(np.diff(shown))) == 1 and shown[1] - shown[0] > 1
    axes.plot(data.steps, data.losses, color=BLUE, linewidth=2, label=name)
    axes.plot(
        data.reference_steps,
        data.reference_losses,
        linestyle="none",
        marker="o",
        markersize=5,
        markerfacecolor="none",
        markeredgecolor=VERMILION,
        markevery=every,
        label=f"{reference}, every {shown[1] - shown[0]} steps" if even else reference,
    )
    axes.set_yscale("log")
    axes.set_xlabel("step of gradient descent")
    axes.set_ylabel("mean binary cross-entropy (nats)")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_probability(axes, axis: np.ndarray, probability: np.ndarray):
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("classes", [PALE_VERMILION, "white", PALE_BLUE])
    return axes.pcolormesh(axis, axis, probability, cmap=colours, vmin=0, vmax=1, shading="gouraud", rasterized=True)


def _draw_classes(axes, result: Trajectory, size: float, edge: float) -> None:
    for label, marker, colour in ((0, "o", VERMILION), (1, "s", BLUE)):
        points = result.samples[result.targets == label]
        axes.plot(
            *points.T.tolist(),
            linestyle="none",
            marker=marker,
            markersize=size,
            markerfacecolor=colour,
            markeredgecolor="white",
            markeredgewidth=edge,
            label=f"class {label}",
        )
