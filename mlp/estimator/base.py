# SPDX-License-Identifier: Apache-2.0
"""What the classifier and the regressor share: their parameters, and how they are trained by `fit`."""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from ...kernels.native import ready
from ..ensemble import Ensemble
from ..training import EarlyStopping, fit
from ..training.measures import Measure
from ..training.validation import name_of

Run = tuple[nn.Module, torch.optim.Optimizer, torch.Generator]
SOLVERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def whole(method):
    """A fit that is refused leaves the estimator as it was, what scikit-learn's checks have set included.

    One that goes on trains the model of the fit before in place, whose numbers are put back.
    """

    @functools.wraps(method)
    def fit(self, *arguments, **options):
        before = dict(vars(self))
        put_back = _numbers(*before["_run"]) if "_run" in before else None
        try:
            return method(self, *arguments, **options)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            if put_back is not None:
                put_back()
            raise

    return fit


@torch.inference_mode(False)  # ordinary steps could not go on with what is cloned in it
def _numbers(model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> Callable[[], None]:
    """What gives all three back the numbers that they have now."""
    parameters = [p.detach().clone() for p in model.parameters()]
    state = [(p, {name: t.clone() for name, t in entry.items()}) for p, entry in optimizer.state.items()]
    drawn = generator.get_state()

    @torch.no_grad()
    def put_back() -> None:
        for p, before in zip(model.parameters(), parameters, strict=True):
            p.copy_(before)
        optimizer.state.clear()
        optimizer.state.update(state)
        generator.set_state(drawn)

    return put_back


@dataclass(eq=False, repr=False)  # scikit-learn has a repr of its own, and estimators are equal to themselves alone
class FusedMLP(BaseEstimator):
    """What the classifier and the regressor share."""

    _metric: ClassVar[str | Measure]  # by which early_stopping judges
    hidden_layer_sizes: int | Sequence[int] = (100,)
    _: KW_ONLY
    activation: str = "sigmoid"
    solver: str = "adam"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int | None = 64
    max_iter: int = 100
    tol: float = 1e-4
    n_iter_no_change: int | None = 10
    early_stopping: bool = False
    validation_fraction: float = 0.1
    device: str = "cpu"
    random_state: Any = None
    impl: str | None = None

    def _start(self, features: int, outputs: int) -> Run:
        """(a new model, its optimizer, the generator of all random numbers)"""
        given: Any = self.hidden_layer_sizes
        hidden = [_count("hidden_layer_sizes", n) for n in (given if np.ndim(given) else [given])]
        if not isinstance(self.solver, str) or self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, not {self.solver!r}")
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        generator = torch.Generator().manual_seed(int(seed))
        # An Ensemble draws from this generator, an MLP from torch's, which other threads draw from meanwhile.
        where = {"device": self.device, "dtype": torch.float32, "generator": generator}
        model = Ensemble(1, [features, *hidden, outputs], self.activation, "identity", **where).member(0)
        momentum = {"momentum": self.momentum} if self.solver == "sgd" else {}
        rates = {"lr": self.learning_rate, "weight_decay": self.weight_decay, **momentum}
        return model, SOLVERS[self.solver](model.parameters(), **rates), generator

    @torch.inference_mode(False)
    def _train(self, X, targets, outputs: int, criterion: nn.Module, sample_weight, more: bool, metric=None) -> None:
        """X (samples, features), targets (samples, outputs) or class ids (samples,). more: one epoch after others.

        metric: by which early_stopping judges, None for the estimator's own.
        """
        metric = metric or self._metric
        self._check()
        run = self._run if more and hasattr(self, "_run") else self._start(X.shape[1], outputs)
        model, optimizer, generator = run
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, dtype=np.float32, ensure_non_negative=True)
            if not (there := sample_weight > 0).any():
                raise ValueError("sample_weight is 0 for all samples")
            # A sample without weight is none. A batch of such samples alone would have a loss of NaN.
            X, targets, sample_weight = X[there], targets[there], sample_weight[there]
        data = [self._tensor(X), torch.tensor(np.ascontiguousarray(targets), device=self.device)]
        data += [] if sample_weight is None else [self._tensor(sample_weight)]
        n = self.n_iter_no_change
        patience, watched = None if n is None else _count("n_iter_no_change", n), dict[str, Any]()
        if self.early_stopping and not more:
            held, data = ([t[part] for t in data] for part in self._parts(targets, generator))
            stop = EarlyStopping(patience, self.tol, name_of(metric), maximize=True, keep_best=True)
            watched = {"validation": held[:2], "metrics": [metric], "stop": stop}
        elif not more:
            watched = {"stop": EarlyStopping(patience, self.tol, "training_loss")}
        samples, epochs = len(data[0]), 1 if more else _count("max_iter", self.max_iter)
        batch = samples if self.batch_size is None else min(_count("batch_size", self.batch_size), samples)
        per_epoch = -(-samples // batch)
        ready.load_what_is_on_disk()  # one fit is seldom alone, but one of folds and grids
        history = fit(
            model,
            *data[:2],
            criterion=criterion,
            optimizer=optimizer,
            steps=epochs * per_epoch,
            batch_size=None if batch == samples else batch,
            log_every=1,
            sample_weight=data[2] if len(data) > 2 else None,
            generator=generator,
            evaluate_every=None if more else per_epoch,
            impl=self.impl,
            **watched,
        )
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            rate = self.learning_rate
            raise ValueError(f"the parameters are not finite any more: scale X, or lower learning_rate={rate}")
        losses = history.loss.double().numpy().reshape(-1, per_epoch)
        batches = [batch] * (per_epoch - 1) + [samples - (per_epoch - 1) * batch]
        curve = np.average(losses, axis=1, weights=batches).tolist()
        self.loss_curve_ = [*self.loss_curve_, *curve] if more and hasattr(self, "_run") else curve
        self._run, self.model_, self.n_iter_, self.loss_ = run, model, len(self.loss_curve_), curve[-1]
        vars(self).pop("validation_scores_", None)
        if self.early_stopping and not more:
            self.validation_scores_ = history.validation[name_of(metric)].tolist()

    def _check(self) -> None:
        """Raises TypeError and ValueError for numbers that torch or `fit` would name otherwise."""
        for name in ("learning_rate", "momentum", "weight_decay", "tol"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if not float(value) >= 0:
                raise ValueError(f"{name} must be at least 0, not {value!r}")
        share = self.validation_fraction
        if self.early_stopping and not (isinstance(share, Real) and 0 < float(share) < 1):
            raise ValueError(f"validation_fraction must be a number between 0 and 1, not {share!r}")

    def _parts(self, targets, generator: torch.Generator) -> list:
        """The indices that are held back, with as many of each class as there are in all, and the others."""
        stratify = targets if isinstance(self, ClassifierMixin) and targets.size == len(targets) else None
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device="cpu"))
        options = {"test_size": float(self.validation_fraction), "random_state": seed, "stratify": stratify}
        return train_test_split(np.arange(len(targets)), **options)[::-1]

    @torch.no_grad()
    def _outputs(self, X) -> Tensor:
        """(samples, outputs), float32 on the CPU."""
        check_is_fitted(self, "model_")
        X = validate_data(self, X, dtype="float32", accept_sparse="csr", reset=False)
        # Under autocast the model returns bfloat16, which numpy does not have.
        return self.model_(self._tensor(X)).cpu().float()

    def _tensor(self, values) -> Tensor:
        values = values.toarray() if issparse(values) else values
        # A copy: numpy's arrays may be read-only or run backwards, which torch's tensors cannot.
        return torch.tensor(np.ascontiguousarray(values), dtype=torch.float32, device=self.device)


def _count(name: str, value) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, not {value!r}") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}")
    return count
