# SPDX-License-Identifier: Apache-2.0
"""scikit-learn estimators over `MLP` and `fit`: `from perceptriton.mlp.estimator import FusedMLPClassifier`.

The rest of the package does not import this file: it needs the extra `sklearn`.
"""

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.native import ready
from .ensemble import Ensemble
from .training import EarlyStopping, fit
from .training.measures import Measure
from .training.validation import name_of

try:
    from scipy.sparse import issparse
    from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import LabelBinarizer
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets, type_of_target
    from sklearn.utils.validation import (
        _check_sample_weight,
        check_array,
        check_is_fitted,
        column_or_1d,
        validate_data,
    )
except ImportError as error:
    raise ImportError("estimators need scikit-learn 1.6 or newer: install perceptriton[sklearn]") from error

__all__ = ["FusedMLPClassifier", "FusedMLPRegressor"]

SOLVERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def _whole(method):
    """A fit that is refused leaves the estimator as it was, what scikit-learn's checks have set included."""

    @functools.wraps(method)
    def fit(self, *arguments, **options):
        before = dict(vars(self))
        try:
            return method(self, *arguments, **options)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    return fit


@dataclass(eq=False, repr=False)  # scikit-learn has a repr of its own, and estimators are equal to themselves alone
class _FusedMLP(BaseEstimator):
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

    def _start(self, features: int, outputs: int):
        """(a new model, its optimizer, the generator of all random numbers)"""
        hidden = self.hidden_layer_sizes
        hidden = [_count("hidden_layer_sizes", n) for n in (hidden if isinstance(hidden, Iterable) else [hidden])]
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, not {self.solver!r}")
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        generator = torch.Generator().manual_seed(int(seed))
        # An Ensemble draws from this generator, an MLP from torch's, which other threads draw from meanwhile.
        where = {"device": self.device, "dtype": torch.float32, "generator": generator}
        model = Ensemble(1, [features, *hidden, outputs], self.activation, "identity", **where).member(0)
        momentum = {"momentum": self.momentum} if self.solver == "sgd" else {}
        rates = {"lr": self.learning_rate, "weight_decay": self.weight_decay, **momentum}
        return model, SOLVERS[self.solver](model.parameters(), **rates), generator

    def _train(self, X, targets, outputs: int, criterion: nn.Module, sample_weight, more: bool) -> None:
        """X (samples, features), targets (samples, outputs) or class ids (samples,). more: one epoch after others."""
        self._check()
        run = self._run if more and hasattr(self, "_run") else self._start(X.shape[1], outputs)
        model, optimizer, generator = run
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, dtype=np.float32, ensure_non_negative=True)
            if not (there := sample_weight > 0).any():
                raise ValueError("sample_weight is 0 for all samples")
            # A sample without weight is none. A batch of such samples alone would have a loss of NaN.
            X, targets, sample_weight = X[there], targets[there], sample_weight[there]
        data = [self._tensor(X), torch.tensor(targets, device=self.device)]
        data += [] if sample_weight is None else [self._tensor(sample_weight)]
        n = self.n_iter_no_change
        patience, options = None if n is None else _count("n_iter_no_change", n), dict[str, Any]()
        if self.early_stopping and not more:
            parts = self._parts(targets, generator)
            held, data = ([t[part] for t in data] for part in parts)
            stop = EarlyStopping(patience, self.tol, name_of(self._metric), maximize=True, keep_best=True)
            options |= {"validation": held[:2], "metrics": [self._metric], "stop": stop}
        elif not more:
            options |= {"stop": EarlyStopping(patience, self.tol, "training_loss")}
        samples, epochs = len(data[0]), 1 if more else _count("max_iter", self.max_iter)
        batch = samples if self.batch_size is None else min(_count("batch_size", self.batch_size), samples)
        per_epoch = -(-samples // batch)
        options |= {"evaluate_every": per_epoch} if options else {}
        options |= {"criterion": criterion, "optimizer": optimizer, "generator": generator, "log_every": 1}
        options |= {"batch_size": None if batch == samples else batch, "steps": epochs * per_epoch}
        ready.load_what_is_on_disk()  # one fit is seldom alone, but one of folds and grids
        history = fit(model, data[0], data[1], sample_weight=data[2] if len(data) > 2 else None, **options)
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
            self.validation_scores_ = history.validation[name_of(self._metric)].tolist()

    def _check(self) -> None:
        """Raises TypeError and ValueError for numbers that torch or `fit` would name otherwise."""
        least = {"learning_rate": 0, "momentum": 0, "weight_decay": 0, "tol": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if not float(value) >= bound:
                raise ValueError(f"{name} must be at least {bound}, not {value!r}")

    def _parts(self, targets, generator: torch.Generator) -> list:
        """The indices that are held back, with as many of each class as there are in all, and the others."""
        stratify = targets if isinstance(self, ClassifierMixin) and targets.size == len(targets) else None
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        options = {"test_size": self.validation_fraction, "random_state": seed, "stratify": stratify}
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
        # A copy: numpy's arrays may be read-only, which torch's tensors cannot be.
        return torch.tensor(values, dtype=torch.float32, device=self.device)


def _count(name: str, value) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, not {value!r}") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}")
    return count


def r2(output: Tensor, target: Tensor) -> Tensor:
    """The coefficient of determination, the mean of all outputs, as scikit-learn's r2_score."""
    residual, total = (output - target).square().sum(0), (target - target.mean(0)).square().sum(0)
    exact = torch.where(residual == 0, 1.0, 0.0)
    return torch.where(total == 0, exact, 1 - residual / total).mean()


class FusedMLPClassifier(ClassifierMixin, _FusedMLP):
    """A classifier trained by `fit` on the cross entropy, as scikit-learn's MLPClassifier.

    Two classes have one output, the logit of the second; more have an output each, of which `predict_proba` is the
    softmax. Indicator matrices of several labels (samples, labels) have a logit for each label.

    hidden_layer_sizes: int or sequence of ints, the widths of the hidden layers; () for none.
    activation: of the hidden layers: "sigmoid", "tanh", "relu" or "identity".
    solver: "sgd", "adam" or "adamw", the optimizer of torch.optim with that name.
    learning_rate, weight_decay, momentum: the optimizer's; momentum for "sgd" only.
    batch_size: samples per step, None for all of them at once.
    max_iter: epochs, at most.
    tol, n_iter_no_change: training ends once n_iter_no_change epochs in a row have not improved on the least mean loss
    of the batches of an epoch by tol; None: never.
    early_stopping: validation_fraction of the samples is held back, what counts is their score, and the parameters of
    the best one are kept.
    device: where torch trains and predicts, "cpu" or "cuda".
    random_state: int, RandomState or None: what first weights and the order of samples are drawn with.

    Everything is computed in float32, so that inputs should be of order 1: `StandardScaler` in a pipeline. Sparse
    matrices are made dense.

    Fitted: `model_`, the trained `MLP`, without output activation; `n_iter_`, epochs; `loss_curve_`, the mean loss of
    each epoch's batches, each before its update; `loss_`, the last of these; with early_stopping `validation_scores_`,
    of each epoch; `n_features_in_`, `classes_`, and `feature_names_in_` where X has names.
    """

    _metric = "accuracy"

    @_whole
    def fit(self, X, y, sample_weight=None):
        """X (samples, features), y (samples,) of labels or (samples, labels) of 0 and 1; sample_weight (samples,)."""
        return self._fit(X, y, sample_weight)

    @_whole
    def partial_fit(self, X, y, sample_weight=None, classes=None):
        """One epoch more, the first call's included. classes: all labels that there are, which that call needs."""
        if not hasattr(self, "model_") and classes is None:
            raise ValueError("classes must be given to the first call of partial_fit, not None")
        return self._fit(X, y, sample_weight, classes, more=True)

    def _fit(self, X, y, sample_weight, classes=None, more=False):
        first = not more or not hasattr(self, "model_")
        y = y.toarray() if issparse(y) else y
        X, y = validate_data(self, X, y, dtype="float32", accept_sparse="csr", multi_output=True, reset=first)
        check_classification_targets(y)
        multilabel = type_of_target(y) == "multilabel-indicator"
        if not first and multilabel != self._multilabel:
            kinds = "an indicator matrix of several labels", "one label of each sample"
            raise ValueError(f"y must be {kinds[multilabel]}, as in the calls before, not {kinds[not multilabel]}")
        y = y if multilabel else column_or_1d(y, warn=True)
        labels = y if classes is None or multilabel else classes
        known = LabelBinarizer().fit(labels).classes_ if first else self.classes_
        if not first and classes is not None and not np.array_equal(np.unique(classes), known):
            raise ValueError(f"classes must be {known}, as in the first call, not {classes}")
        if len(known) < 2 and not multilabel:
            raise ValueError(f"y must hold at least two classes, not one class only: {known[0]!r}")
        if not multilabel and (strange := np.setdiff1d(y, known)).size:
            raise ValueError(f"y must hold classes among {known}, not {strange}")
        several = len(known) > 2 and not multilabel
        targets: Any = y if multilabel else np.searchsorted(known, y)
        targets = targets.astype(np.int64) if several else targets.reshape(len(targets), -1).astype(np.float32)
        criterion = nn.CrossEntropyLoss() if several else nn.BCEWithLogitsLoss()
        self._train(X, targets, len(known) if several else targets.shape[1], criterion, sample_weight, more)
        self._multilabel, self.classes_ = multilabel, known
        return self

    def predict_log_proba(self, X):
        """The logarithms of `predict_proba`, without its underflow."""
        z = self._outputs(X)
        if self._multilabel:
            return F.logsigmoid(z).numpy()
        return torch.log_softmax(z if z.shape[1] > 1 else torch.cat([torch.zeros_like(z), z], 1), 1).numpy()

    def predict_proba(self, X):
        """(samples, classes), rows that sum to 1; of several labels (samples, labels), each its own probability."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X):
        """(samples,), the likeliest class; of several labels (samples, labels), 1 above a probability of 0.5."""
        z = self._outputs(X).numpy()
        if self._multilabel:
            return (z > 0).astype(int)
        return self.classes_[z.argmax(1) if z.shape[1] > 1 else (z[:, 0] > 0).astype(int)]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        tags.input_tags.sparse = True
        return tags


class FusedMLPRegressor(MultiOutputMixin, RegressorMixin, _FusedMLP):
    """A regressor without output activation, trained by `fit` on the mean squared error (`nn.MSELoss`).

    hidden_layer_sizes: int or sequence of ints, the widths of the hidden layers; () for none.
    activation: of the hidden layers: "sigmoid", "tanh", "relu" or "identity".
    solver: "sgd", "adam" or "adamw", the optimizer of torch.optim with that name.
    learning_rate, weight_decay, momentum: the optimizer's; momentum for "sgd" only.
    batch_size: samples per step, None for all of them at once.
    max_iter: epochs, at most.
    tol, n_iter_no_change: training ends once n_iter_no_change epochs in a row have not improved on the least mean loss
    of the batches of an epoch by tol; None: never.
    early_stopping: validation_fraction of the samples is held back, what counts is their score, and the parameters of
    the best one are kept.
    device: where torch trains and predicts, "cpu" or "cuda".
    random_state: int, RandomState or None: what first weights and the order of samples are drawn with.

    Everything is computed in float32, so that inputs should be of order 1: `StandardScaler` in a pipeline. Sparse
    matrices are made dense.

    Fitted: `model_`, the trained `MLP`, without output activation; `n_iter_`, epochs; `loss_curve_`, the mean loss of
    each epoch's batches, each before its update; `loss_`, the last of these; with early_stopping `validation_scores_`,
    of each epoch; `n_features_in_`, and `feature_names_in_` where X has names.
    """

    _metric = staticmethod(r2)

    @_whole
    def fit(self, X, y, sample_weight=None):
        """X (samples, features), y (samples,) or (samples, outputs), of order 1 as X; sample_weight (samples,)."""
        return self._fit(X, y, sample_weight)

    @_whole
    def partial_fit(self, X, y, sample_weight=None):
        """One epoch more, the first call's included."""
        return self._fit(X, y, sample_weight, more=True)

    def _fit(self, X, y, sample_weight, more=False):
        first = not more or not hasattr(self, "model_")
        options = {"accept_sparse": "csr", "multi_output": True, "y_numeric": True, "reset": first}
        X, y = validate_data(self, X, y, dtype="float32", **options)
        y = check_array(y, dtype="float32", ensure_2d=False, input_name="y")
        targets = y.reshape(len(y), -1)
        self._train(X, targets, targets.shape[1], nn.MSELoss(), sample_weight, more)
        self._flat = y.ndim == 1
        return self

    def predict(self, X):
        """(samples,) or (samples, outputs), as y was; float32, in which it was computed."""
        y = self._outputs(X).numpy()
        return y.ravel() if self._flat else y

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags
