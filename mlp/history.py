# SPDX-License-Identifier: Apache-2.0
"""What a training loop leaves to look at, and to go on from."""

import csv
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)  # == of two tensors is no bool
class History:
    """What `fit` returns. Iterating gives the rows of its table, so `pandas.DataFrame(history)` is that table.

    `torch.save` writes it, and `torch.load` reads it with weights_only=True too.

    steps: at which the loss was logged, counted from 0 in each call of fit. loss: before the update of each of these
    steps, (rows,), of an Ensemble (rows, E), on the CPU.
    seconds: of the whole call. setup_seconds: of these, until compiled loops were compiled or read from disk.
    path: which implementation ran, "lane", "block", "graph", "native" or "torch", or "general", an ordinary loop.
    reason: why that one.
    steps_taken: updates that the model has seen, fewer than were asked for after an interrupt or a stop.
    evaluated: how many steps had been taken at each evaluation. validation: "loss" and each metric by its name, each
    (evaluations,), of an Ensemble (evaluations, E).
    stopped: steps that had been taken when `stop` ended the training, -1 where it did not, (), of an Ensemble (E,),
    int64; None without `stop`. kept: in the same form, steps after which the parameters were those that keep_best has
    given back; None where it has given back none.
    state: what `fit(resume=...)` needs besides.
    """

    steps: list[int] = field(repr=False)
    loss: Tensor
    seconds: float
    path: str
    setup_seconds: float = 0.0
    reason: str = ""
    steps_taken: int = 0
    evaluated: list[int] = field(default_factory=list, repr=False)
    validation: dict[str, Tensor] = field(default_factory=dict)
    stopped: Tensor | None = None
    kept: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_dict(self, wide: bool = False) -> dict[str, list]:
        """The table by columns: "step", "loss", "validation_loss", and "validation_" with the name of each metric.

        A row for each step at which something was logged or evaluated, after as many updates; NaN for what was not. Of
        an Ensemble a row for each step and member, with a column "member", or, if wide, a row for each step, with
        columns "loss_0", "loss_1" and so on.
        """
        series = {"loss": (self.steps, self.loss)} if self.steps else {}
        series |= {f"validation_{name}": (self.evaluated, values) for name, values in self.validation.items()}
        steps = sorted({*self.steps, *self.evaluated})
        places = {step: i for i, step in enumerate(steps)}
        columns: dict[str, Tensor] = {}
        for name, (at, values) in series.items():
            columns[name] = torch.full((len(steps), *values.shape[1:]), torch.nan, dtype=torch.float64, device="cpu")
            columns[name][[places[step] for step in at]] = values.double()
        if self.loss.dim() == 1:
            return {"step": steps} | {name: column.tolist() for name, column in columns.items()}
        members = range(self.loss.shape[1])
        if wide:
            return {"step": steps} | {
                f"{name}_{i}": column[:, i].tolist() for name, column in columns.items() for i in members
            }
        indices = {"step": [step for step in steps for _ in members], "member": [*members] * len(steps)}
        return indices | {name: column.flatten().tolist() for name, column in columns.items()}

    def __iter__(self) -> Iterator[dict[str, float]]:
        columns = self.to_dict()
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))

    def to_csv(self, path: "str | os.PathLike[str]", wide: bool = False) -> None:
        """Writes the table with the names of its columns in the first line. A file of that name is replaced."""
        columns = self.to_dict(wide)
        target = Path(os.path.realpath(path))
        partly = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
        try:
            with partly.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
            partly.replace(target)
        except OSError as error:
            if error.filename is None:
                raise
            raise OSError(error.errno, error.strerror, str(path)) from None  # the other name nobody knows
        finally:
            with suppress(OSError):  # where there can be no such file
                partly.unlink()

    def plot(self, axes: "Axes | None" = None, quantiles: tuple[float, float] = (0.1, 0.9)) -> "Axes":
        """Draws the losses against the steps; of an Ensemble the median of its members, and a band between quantiles.

        Members whose loss is NaN count for neither. axes: where to draw, None for a new figure. Raises ImportError
        without matplotlib, ValueError for quantiles that are not two in order.
        """
        low, high = quantiles
        if not 0 <= low <= high <= 1:
            raise ValueError(f"quantiles must be two in order within [0, 1], not {quantiles}")
        if axes is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise ImportError("plots need matplotlib: install perceptriton[cli]") from error
            axes = Figure(layout="constrained").subplots()
        series = {"training": (self.steps, self.loss)}
        if "loss" in self.validation:
            series["validation"] = (self.evaluated, self.validation["loss"])
        for name, (steps, values) in series.items():
            if steps and values.dim() == 1:
                axes.plot(steps, values.tolist(), label=name)
            elif steps:
                points = torch.tensor([low, 0.5, high], dtype=torch.float64, device="cpu")
                bottom, median, top = values.double().nanquantile(points, dim=1).tolist()
                (line,) = axes.plot(steps, median, label=f"{name}, median of {values.shape[1]}")
                label = f"{low:.0%} to {high:.0%}"
                axes.fill_between(steps, bottom, top, color=line.get_color(), alpha=0.25, linewidth=0, label=label)
        axes.set(xlabel="step", ylabel="loss", yscale="log" if bool((self.loss > 0).any()) else "linear")
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
        return axes


# torch.load with weights_only=True makes no objects of classes that it was not told of.
torch.serialization.add_safe_globals([History])
