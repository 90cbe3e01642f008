# SPDX-License-Identifier: Apache-2.0
"""What the pictures of several lessons have in common; matplotlib is imported on first use."""

import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .race import Run
from .trajectory import Losses, Trajectory, outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = object  # a name for annotations, so that matplotlib is imported only where something is drawn

# Okabe and Ito's colours, which remain apart under every common colour blindness.
BLUE, VERMILION, INK = "#0072B2", "#D55E00", "#222222"
# Tints of the two for areas, so that points in the full colours stand out on them.
PALE_BLUE, PALE_VERMILION = "#8CC4E6", "#F2AE80"


@dataclass(frozen=True)
class Curve:
    """The losses of one contender and of the reference."""

    steps: np.ndarray  # (L,)
    losses: np.ndarray  # (L,), nats
    reference_steps: np.ndarray  # (R,), R <= L
    reference_losses: np.ndarray  # (R,)


@dataclass(frozen=True)
class TrainingPicture(Curve):
    """What `plot_training` draws."""

    axis: np.ndarray  # (G,), the values of x1 and of x2 on the grid
    probability: np.ndarray  # (G, G), p of class 1; row i has x2 = axis[i], column j has x1 = axis[j]


def plot_training(
    result: Trajectory,
    run: Run | None = None,
    reference: Losses | None = None,
    *,
    title: str = "",
    label: str = "textbook",
) -> tuple[Figure, TrainingPicture]:
    """The loss of a run against the step with the reference on top, and the network's output over the plane.

    By default it is the last run, `fit`, with the reference of the result. Raises ImportError if matplotlib is missing.
    """
    run = run or result.runs[-1]
    figure = new_figure(11, 4.8)
    axis = np.linspace(-0.5, 1.5, 201)
    data = TrainingPicture(**curve(result, run, reference), axis=axis, probability=surface(run.model, axis))
    loss_axes, plane_axes = figure.subplots(1, 2, width_ratios=(1.15, 1))
    draw_losses(loss_axes, data, run.name, label)
    loss_axes.set_title(title or f"Loss of a {'-'.join(map(str, result.sizes))} network on XOR")
    plane = draw_probability(plane_axes, axis, data.probability)
    bar = figure.colorbar(plane, ax=plane_axes, label="p, the output for class 1")
    # A network that has hardly been trained may be on one side of 0.5 everywhere.
    if data.probability.min() < 0.5 < data.probability.max():
        lines = plane_axes.contour(axis, axis, data.probability, levels=[0.5], colors=INK, linewidths=1.5)
        plane_axes.clabel(lines, fmt=lambda p: f"p = {p:g}", fontsize=9)
        bar.add_lines(lines)
    draw_classes(plane_axes, result, size=11, edge=2)
    ticks = [-0.5, 0, 0.5, 1, 1.5]
    plane_axes.set(title="What the network makes of the plane", xlabel="$x_1$", ylabel="$x_2$")
    plane_axes.set(xticks=ticks, yticks=ticks, aspect="equal")
    plane_axes.legend(loc="upper left", facecolor="white", framealpha=0.9, edgecolor="none")
    return figure, data


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches. Raises ImportError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: install perceptriton[cli]") from error
    return Figure(figsize=(width, height), layout="compressed")


def curve(result: Trajectory, run: Run, reference: Losses | None = None) -> dict[str, np.ndarray]:
    """The fields of `Curve` for this run; reference: by default that of the result."""
    rows = zip(result.steps, result.reference if reference is None else reference, strict=True)
    compared = [row for row in rows if row[1] is not None]
    steps, losses = (np.array([row[i] for row in compared]) for i in (0, 1))
    found = {"steps": np.array(result.steps), "losses": np.array(run.losses)}
    return found | {"reference_steps": steps, "reference_losses": losses}


def surface(model: torch.nn.Module, axis: np.ndarray) -> np.ndarray:
    """(G, G): the model's output on a grid, as in TrainingPicture."""
    grid = torch.from_numpy(np.stack(np.meshgrid(axis, axis), -1)).flatten(0, 1)
    return outputs(model, grid).float().reshape(len(axis), len(axis)).numpy()


def line_of(model: torch.nn.Module) -> np.ndarray:
    """(2, 2): two points (x1, x2) of a layer 2-1 with w1 x1 + w2 x2 + b = 0, one length of w apart."""
    weight, bias = (p.detach().cpu().double().numpy() for p in model.parameters())
    (w,), (b,) = weight, bias
    foot = -b * w / (w @ w)  # the line's point nearest to the origin
    return np.stack([foot, foot + np.array([-w[1], w[0]])])


def draw_losses(axes, data: Curve, name: str, reference: str) -> None:
    """The curve on a logarithmic scale, and the reference as circles."""
    # At most some 33 circles: more would hide the line under them.
    every = max(1, len(data.reference_steps) // 33)
    shown = data.reference_steps[::every]
    even = len(set(np.diff(shown))) == 1 and shown[1] - shown[0] > 1
    label = f"{reference}, every {shown[1] - shown[0]} steps" if even else reference
    circles = {"mfc": "none", "mec": VERMILION, "markersize": 5, "markevery": every, "label": label}
    axes.plot(data.steps, data.losses, color=BLUE, linewidth=2, label=name)
    axes.plot(data.reference_steps, data.reference_losses, "o", **circles)
    axes.set(xlabel="step of gradient descent", ylabel="mean binary cross-entropy (nats)", yscale="log")
    tidy(axes)


def tidy(axes) -> None:
    """A pale grid, two spines and a legend."""
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def draw_probability(axes, axis: np.ndarray, probability: np.ndarray):
    """Colours the plane by p. Returns the mesh, which a colour bar takes."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("classes", [PALE_VERMILION, "white", PALE_BLUE])
    return axes.pcolormesh(axis, axis, probability, cmap=colours, vmin=0, vmax=1, shading="gouraud", rasterized=True)


def draw_classes(axes, result: Trajectory, size: float, edge: float) -> None:
    """The samples, marked by their class."""
    for label, marker, colour in ((0, "o", VERMILION), (1, "s", BLUE)):
        look = {"mfc": colour, "mec": "white", "mew": edge, "markersize": size, "label": f"class {label}"}
        axes.plot(*result.samples[result.targets == label].T.tolist(), marker, **look)


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises ValueError if `save` could not write to this path, ImportError if matplotlib is missing."""
    figure = new_figure(1, 1)
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
        tempfile.TemporaryFile(dir=Path(os.path.realpath(target)).parent).close()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written: {error.strerror}") from None


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure in the format that the path's suffix names.

    The file is complete or not there: it is written under another name beside the target and then renamed. Raises
    OSError if it cannot be written.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".perceptriton-{secrets.token_hex(4)}")
    try:
        figure.savefig(partial, format=Path(path).suffix[1:].lower(), dpi=150)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
