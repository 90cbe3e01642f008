# SPDX-License-Identifier: Apache-2.0
"""What `fit` looks at between steps: losses and metrics on other data, and whether they tell it to stop."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ensemble import Ensemble
from ..history import History
from ..model import is_whole
from .checks import check_samples
from .criteria import has_own_targets
from .jobs import FastJob
from .measures import Measure, accuracy, each, losses_of
from .pacing import logged_steps

LATE_SECONDS = 4e-3  # of steps that may be taken for nothing


@dataclass(frozen=True)
class EarlyStopping:
    """Stops `fit` once a value has not improved for `patience` evaluations in a row.

    patience: None stops never, which leaves keep_best. threshold: by how much, absolutely, a value must be better than
    the best so far to count as improved, as in scikit-learn; NaN never is. metric: "loss" on the validation data, or
    the name of one of `fit`'s metrics; "training_loss" needs no other data: the mean of the losses logged since the
    last evaluation.
    maximize: whether more is better; None: as is usual, which is less for losses and more for "accuracy". keep_best: at
    the end of `fit` the model has the parameters, and buffers, of its best evaluation, not the last ones.

    Of an Ensemble each member stops by itself: its parameters are kept, while the others train on.

    Raises TypeError and ValueError for arguments that do not fit.
    """

    patience: int | None = 5
    threshold: float = 0.0
    metric: str = "loss"
    maximize: bool | None = None
    keep_best: bool = False

    def __post_init__(self) -> None:
        if self.patience is not None and not is_whole(self.patience):
            raise TypeError(f"patience must be an int or None, not {self.patience!r}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, not {self.patience}")
        if not isinstance(self.threshold, Real):
            raise TypeError(f"threshold must be a number, not {self.threshold!r}")
        if not float(self.threshold) >= 0:
            raise ValueError(f"threshold must not be negative, not {self.threshold}")
        if self.maximize is None and self.metric not in ("loss", "training_loss", "accuracy"):
            raise ValueError(f"maximize must be True or False for the metric {self.metric!r}")

    @property
    def sign(self) -> int:
        """By which a value is multiplied so that less is better."""
        maximize = self.metric == "accuracy" if self.maximize is None else self.maximize
        return -1 if maximize else 1


class Watch:
    """Evaluates the model, keeps what was best, and says who is done; without data and stop does none of that."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Measure,
        data: tuple[Tensor, Tensor] | None,
        metrics: Sequence[str | Measure],
        stop: EarlyStopping | None,
        resume: History | None,
    ) -> None:
        self.model, self.criterion, self.data, self.stop = model, criterion, data, stop
        self.metrics = {name_of(metric): metric for metric in metrics}
        self.evaluated: list[int] = []
        self.rows: dict[str, list[Tensor]] = {name: [] for name in ("loss", *self.metrics) if data is not None}
        self.members = len(model) if isinstance(model, Ensemble) else 1
        self.kept = [*model.parameters(), *model.buffers()] if stop else []
        self.best = torch.full((self.members,), torch.inf, dtype=torch.float64, device="cpu")
        self.waited = torch.zeros(self.members, dtype=torch.int64, device="cpu")
        self.stopped = torch.full((self.members,), -1, dtype=torch.int64, device="cpu")
        # Of the best evaluation, the first before that: what is there now may still be without a shape.
        self.keeps, self.best_values = stop is not None and stop.keep_best, list[Tensor]()
        self.best_at = torch.zeros(self.members, dtype=torch.int64, device="cpu")  # steps that had been taken
        self.finished = False
        if resume is not None:
            self._resume(resume)

    @property
    def done(self) -> Tensor:
        """(members,): who has stopped."""
        return self.stopped >= 0

    def evaluate(self, taken: int, losses: Sequence[Tensor], log_every: int) -> None:
        """Evaluates the model after so many steps. losses: (n, members) each, all that were logged."""
        values = {} if self.data is None else self._values(*self.data)
        since = self.evaluated[-1] if self.evaluated else 0
        self.evaluated.append(taken)
        for name, rows in self.rows.items():
            rows.append(values[name])
        if self.stop is None:
            return
        # numpy's calls are the shorter ones, which counts where an epoch takes as long as a few of them.
        if self.stop.metric == "training_loss":
            count = len(logged_steps(since, taken - since, log_every))
            if not count:  # at the end of a run: there is nothing to judge
                return
            value = _last(losses, count).mean(0).numpy()
        else:
            value = values[self.stop.metric].double().numpy()
        self._judge(taken, self.stop, self.stop.sign * value)

    def _judge(self, taken: int, stop: EarlyStopping, value: np.ndarray) -> None:
        """value: (members,), of which less is better."""
        best, waited, stopped = (t.numpy() for t in (self.best, self.waited, self.stopped))
        training = stopped < 0
        waited[training] += 1
        waited[training & (value < best - stop.threshold)] = 0
        better = training & (value < best)
        best[better] = value[better]
        self.best_at.numpy()[better] = taken
        if self.keeps:
            self.best_values = self.best_values or [t.detach().clone() for t in self.kept]
            _copy(self.best_values, self.kept, torch.from_numpy(better))
        if stop.patience is not None:
            stopped[training & (waited >= stop.patience)] = taken

    @property
    def late(self) -> bool:
        """Whether what it looks at is there after more steps too: the losses of one network alone."""
        return self.stop is not None and self.data is None and not self.keeps and self.members == 1

    def most(self, every: int, taken: int, seconds: float) -> int:
        """How many steps to take before a review: no more than there surely are, an eighth of those taken, or as many
        as take about as long as a few calls.

        What goes beyond the end is taken for nothing, and what comes before it twice. seconds: of a step.
        """
        patience = None if self.stop is None else self.stop.patience
        if patience is None:
            return sys.maxsize
        return max((patience - int(self.waited)) * every - taken % every, taken // 8, int(LATE_SECONDS / seconds))

    def review(self, every: int, last: int, log_every: int, job: FastJob, steps: int, losses: Tensor) -> int:
        """How many of the job's next steps, whose losses are logged, are to be taken until it is done."""
        start, end = job.taken, job.taken + steps
        due = [*range(start - start % every + every, end + 1, every)]
        for taken in due + [end] * (end == last and end % every > 0):
            count = len(logged_steps(start, taken - start, log_every))
            self.evaluate(taken, [*job.rows, losses[:count]], log_every)
            if self.done.all():
                return taken - start
        return steps

    def finish(self) -> None:
        """Gives the model the best of its parameters, where they are kept; who was never any good has the last."""
        _copy(self.kept, self.best_values, self.best < torch.inf)
        self.finished = True

    def state(self) -> dict[str, Any]:
        """What `_resume` needs besides the columns of a History."""
        if self.stop is None:
            return {}
        values = [tensor.clone() for tensor in self.best_values]
        clones = {name: getattr(self, name).clone() for name in ("best", "waited", "best_at")}
        return clones | {"best_values": values}

    def columns(self, row: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Those of a History. row: what becomes of the last dimension, of members."""
        validation = {name: row(torch.stack(rows)) for name, rows in self.rows.items() if rows}
        stopped = None if self.stop is None else row(self.stopped.clone()[None])[0]
        kept = None
        if self.best_values and self.finished and self.evaluated:
            last = torch.where(self.stopped >= 0, self.stopped, self.evaluated[-1])
            kept = row(torch.where(self.best < torch.inf, self.best_at, last)[None])[0]
        return {"evaluated": [*self.evaluated], "validation": validation, "stopped": stopped, "kept": kept}

    def _resume(self, history: History) -> None:
        """Raises ValueError for one of a run that looked at something else."""
        if history.evaluated and history.validation.keys() != self.rows.keys():
            told, asked = (", ".join(names) or "nothing" for names in (history.validation, self.rows))
            raise ValueError(f"resume is of a run that evaluated {told}, not {asked}")
        if self.stop is not None and (
            not {"best", "best_at"} <= history.state.keys()
            or (history.evaluated and len(history.state["best_values"]) != len(self.kept) * self.keeps)
        ):
            raise ValueError("resume is of a run without this stop, which knows neither what was best nor for how long")
        self.evaluated += history.evaluated
        for name, rows in self.rows.items():
            rows += history.validation[name].view(-1, self.members).unbind() if history.evaluated else ()
        if self.stop is not None:
            state, stopped = history.state, history.stopped
            self.best, self.waited, self.best_at = (state[name].clone() for name in ("best", "waited", "best_at"))
            self.stopped = stopped.clone().view(-1) if stopped is not None else self.stopped
            kept = zip(self.kept, state["best_values"], strict=True) if history.evaluated and self.keeps else ()
            self.best_values = [given.to(own, copy=True) for own, given in kept]

    @torch.no_grad()
    def _values(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """By name, of each network: (members,) on the CPU."""
        with _evaluating(self.model):
            output = self.model(x)
        own = isinstance(self.model, Ensemble) and has_own_targets(self.criterion, self.model, x, y)
        if isinstance(self.criterion, nn.BCELoss) and self.members == 1 and bool(output.isnan().any()):
            # Of an Ensemble `losses_of` sees to that. torch's function raises, which would end a run that goes on.
            values = {"loss": output.new_full((1,), torch.nan)}
        else:
            values = {"loss": losses_of(self.model, self.criterion, output, y, own)}
        for name, metric in self.metrics.items():
            measure = metric if callable(metric) else partial(accuracy, self.criterion)
            values[name] = each(self.model, measure, output, y, own, name)
        return {name: value.detach().cpu() for name, value in values.items()}


def _last(blocks: Sequence[Tensor], count: int) -> Tensor:
    """The last `count` rows of blocks that follow each other, fp64 on the CPU."""
    if len(blocks[-1]) >= count:
        return blocks[-1][len(blocks[-1]) - count :].cpu().double()
    rows = []
    for block in reversed(blocks):
        rows.insert(0, block[max(0, len(block) - count) :])
        count -= len(rows[0])
        if count <= 0:
            break
    return torch.cat(rows).cpu().double()


def name_of(metric: "str | Measure") -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """As model.eval(), until the modules that were training train again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _copy(to: Sequence[Tensor], source: Sequence[Tensor], which: Tensor) -> None:
    """Copies members' numbers; a tensor of one network is that of its only member."""
    if not to or not source or not bool(which.any()):
        return
    for own, given in zip(to, source, strict=True):
        if len(which) == 1:
            own.copy_(given)
        else:
            chosen = which.to(own.device)
            own[chosen] = given[chosen]


def check_watch(model, criterion, validation, evaluate_every, metrics, stop, log_every) -> None:
    """Raises TypeError and ValueError for what `fit` is given to look at."""
    if stop is not None and not isinstance(stop, EarlyStopping):
        raise TypeError(f"stop must be an EarlyStopping, not {type(stop).__name__}")
    by_training = stop is not None and stop.metric == "training_loss"
    if by_training and not log_every:
        raise ValueError("stop watches 'training_loss', but log_every=0 logs none")
    given = {"metrics": len(metrics) > 0, "stop": stop is not None and not by_training}
    given["evaluate_every"] = evaluate_every is not None and not by_training
    for name, there in given.items():
        if there and validation is None:
            raise ValueError(f"{name} needs validation data, but validation is None")
    if evaluate_every is not None and not is_whole(evaluate_every):
        raise TypeError(f"evaluate_every must be an int or None, not {evaluate_every!r}")
    if evaluate_every is not None and evaluate_every < 1:
        raise ValueError(f"evaluate_every must be at least 1, not {evaluate_every}")
    if validation is None:
        return
    if isinstance(metrics, str):
        raise TypeError(f"metrics must be a sequence of metrics, as in [{metrics!r}], not {metrics!r}")
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        raise TypeError(f"validation must be a pair of tensors (x, y), not {validation!r}")
    for name, tensor in zip("xy", validation, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"validation's {name} must be a Tensor, not {type(tensor).__name__}")
    x, y = validation
    check_samples(model, criterion, x, y, "validation's ")
    names = ["loss", *map(name_of, metrics)]
    for metric, name in zip(metrics, names[1:], strict=True):
        if not callable(metric) and metric != "accuracy":
            raise ValueError(f'metrics must be "accuracy" or functions of (output, target), not {metric!r}')
        if names.count(name) > 1:
            raise ValueError(f"metrics must have names that differ, but {name!r} stands for two columns")
    if stop is not None and not by_training and stop.metric not in names:
        raise ValueError(f"stop watches {stop.metric!r}, but evaluated are {', '.join(names)}")
