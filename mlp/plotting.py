"""Pictures of the lessons. Each function returns the figure and the data in it; matplotlib is imported on first use."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .lessons import XorResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["XorPicture", "check_target", "plot_xor", "save"]

# Okabe and Ito's colours, which remain apart under every common colour blindness.
BLUE, VERMILION, INK = "#0072B2", "#D55E00", "#222222"
# Tints of the two for areas, so that points in the full colours stand out on them.
PALE_BLUE, PALE_VERMILION = "#8CC4E6", "#F2AE80"


@dataclass(frozen=True)
class XorPicture:
    """What `plot_xor` draws."""

    steps: np.ndarray  # (L,)
    losses: np.ndarray  # (L,), nats
    reference_steps: np.ndarray  # (R,), R <= L
    reference_losses: np.ndarray  # (R,)
    axis: np.ndarray  # (G,), the values of x1 and of x2 on the grid
    probability: np.ndarray  # (G, G), p of class 1; row i has x2 = axis[i], column j has x1 = axis[j]


def plot_xor(result: XorResult) -> "tuple[Figure, XorPicture]":
    """The loss against the step with the reference on top, and the network's output over the plane.

    Raises ImportError if matplotlib is missing.
    """
    figure = _figure(11, 4.8)
    compared = [(s, r) for s, r in zip(result.steps, result.reference, strict=True) if r is not None]
    axis = np.linspace(-0.5, 1.5, 201)
    data = XorPicture(
        np.array(result.steps),
        np.array(result.losses),
        np.array([s for s, _ in compared]),
        np.array([r for _, r in compared]),
        axis,
        _surface(result.model, axis),
    )
    loss_axes, plane_axes = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_losses(loss_axes, data)
    _draw_plane(figure, plane_axes, data, result)
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


@torch.no_grad()
def _surface(model: torch.nn.Module, axis: np.ndarray) -> np.ndarray:
    x1, x2 = np.meshgrid(axis, axis)
    parameter = next(model.parameters())
    points = torch.from_numpy(np.stack([x1, x2], -1)).to(parameter.device, parameter.dtype)
    return model(points).squeeze(-1).cpu().numpy()


def _draw_losses(axes, data: XorPicture) -> None:
    # All hundred points would hide the line under them.
    every = max(1, len(data.reference_steps) // 33)
    shown = data.reference_steps[::every]
    axes.plot(data.steps, data.losses, color=BLUE, linewidth=2, label="this run")
    axes.plot(
        data.reference_steps,
        data.reference_losses,
        linestyle="none",
        marker="o",
        markersize=5,
        markerfacecolor="none",
        markeredgecolor=VERMILION,
        markevery=every,
        label=f"reference, every {shown[1] - shown[0]} steps" if len(shown) > 1 else "reference",
    )
    axes.set_yscale("log")
    axes.set_title("Loss of a 2-2-1 network on XOR")
    axes.set_xlabel("step of gradient descent")
    axes.set_ylabel("mean binary cross-entropy (nats)")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_plane(figure, axes, data: XorPicture, result: XorResult) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("classes", [PALE_VERMILION, "white", PALE_BLUE])
    surface = axes.pcolormesh(
        data.axis, data.axis, data.probability, cmap=colours, vmin=0, vmax=1, shading="gouraud", rasterized=True
    )
    bar = figure.colorbar(surface, ax=axes, label="p, the output for class 1")
    # A network that has hardly been trained may be on one side of 0.5 everywhere.
    if data.probability.min() < 0.5 < data.probability.max():
        lines = axes.contour(data.axis, data.axis, data.probability, levels=[0.5], colors=INK, linewidths=1.5)
        axes.clabel(lines, fmt=lambda p: f"p = {p:g}", fontsize=9)
        bar.add_lines(lines)
    for label, marker, colour in ((0, "o", VERMILION), (1, "s", BLUE)):
        points = [p for p, target in zip(result.inputs, result.targets, strict=True) if target == label]
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            linestyle="none",
            marker=marker,
            markersize=11,
            markerfacecolor=colour,
            markeredgecolor="white",
            markeredgewidth=2,
            label=f"class {label}",
        )
    axes.set_title("What the network makes of the plane")
    axes.set_xlabel("$x_1$")
    axes.set_ylabel("$x_2$")
    axes.set_xticks([-0.5, 0, 0.5, 1, 1.5])
    axes.set_yticks([-0.5, 0, 0.5, 1, 1.5])
    axes.set_aspect("equal")
    axes.legend(loc="upper left", facecolor="white", framealpha=0.9, edgecolor="none")
