"""scikit-learn estimators over `MLP` and `fit`: `from perceptriton.mlp.estimator import FusedMLPClassifier`.

The rest of the package does not import this file: it needs the extra `sklearn`.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .ensemble import Ensemble
from .training import fit

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.preprocessing import LabelBinarizer
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets, type_of_target
    from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise ImportError("estimators need scikit-learn 1.6 or newer: install perceptriton[sklearn]") from error

__all__ = ["FusedMLPClassifier", "FusedMLPRegressor"]

SOLVERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(eq=False, repr=False)  # scikit-learn has a repr of its own, and estimators are equal to themselves alone
class _FusedMLP(BaseEstimator):
    """What the classifier and the regressor share."""

    hidden_layer_sizes: int | Sequence[int] = (100,)
    _: KW_ONLY
    activation: str = "sigmoid"
    solver: str = "adam"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int | None = 64
    max_iter: int = 100
    device: str = "cpu"
    random_state: Any = None

    def _train(self, X, targets, output_activation: str, criterion: nn.Module) -> None:
        """X (samples, features), targets (samples, outputs)."""
        hidden = self.hidden_layer_sizes
        hidden = [_count("hidden_layer_sizes", n) for n in (hidden if isinstance(hidden, Iterable) else [hidden])]
        epochs = _count("max_iter", self.max_iter)
        samples = len(X)
        batch = samples if self.batch_size is None else min(_count("batch_size", self.batch_size), samples)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, not {self.solver!r}")
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        generator = torch.Generator().manual_seed(int(seed))
        sizes = [X.shape[1], *hidden, targets.shape[1]]
        # An Ensemble draws from this generator, an MLP from torch's, which other threads draw from meanwhile.
        where = {"device": self.device, "dtype": torch.float32, "generator": generator}
        model = Ensemble(1, sizes, self.activation, output_activation, **where).member(0)
        momentum = {"momentum": self.momentum} if self.solver == "sgd" else {}
        rates = {"lr": self.learning_rate, "weight_decay": self.weight_decay, **momentum}
        per_epoch = -(-samples // batch)
        options = {"criterion": criterion, "optimizer": SOLVERS[self.solver](model.parameters(), **rates)}
        options |= {"batch_size": None if batch == samples else batch, "log_every": 1, "generator": generator}
        history = fit(model, self._tensor(X), self._tensor(targets), steps=epochs * per_epoch, **options)
        losses = history.loss.double().numpy().reshape(epochs, per_epoch)
        batches = [batch] * (per_epoch - 1) + [samples - (per_epoch - 1) * batch]
        self.model_ = model
        self.n_iter_ = epochs
        self.loss_curve_ = np.average(losses, axis=1, weights=batches).tolist()
        self.loss_ = self.loss_curve_[-1]

    @torch.no_grad()
    def _outputs(self, X) -> np.ndarray:
        """(samples, outputs), float32"""
        check_is_fitted(self, "model_")
        X = validate_data(self, X, dtype="float32", reset=False)
        # Under autocast the model returns bfloat16, which numpy does not have.
        return self.model_(self._tensor(X)).cpu().float().numpy()

    def _tensor(self, values) -> Tensor:
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


PARAMETERS = """
    hidden_layer_sizes: int or sequence of ints, the widths of the hidden layers; () for none.
    activation: of the hidden layers: "sigmoid", "tanh", "relu" or "identity".
    solver: "sgd", "adam" or "adamw", the optimizer of torch.optim with that name.
    learning_rate, weight_decay, momentum: the optimizer's; momentum for "sgd" only.
    batch_size: samples per step, None for all of them at once.
    max_iter: epochs. There is no early stop.
    device: where torch trains and predicts, "cpu" or "cuda".
    random_state: int, RandomState or None: what first weights and the order of samples are drawn with.

    Everything is computed in float32, so that inputs should be of order 1: `StandardScaler` in a pipeline.

    Fitted: `model_`, the trained `MLP`; `n_iter_`, epochs; `loss_curve_`, the mean loss of each epoch's batches, each
    before its update; `loss_`, the last of these; `n_features_in_`, and `feature_names_in_` where X has names."""


class FusedMLPClassifier(ClassifierMixin, _FusedMLP):
    __doc__ = f"""A classifier with sigmoid outputs, trained by `fit` on the binary cross-entropy (`nn.BCELoss`).

    Two classes have one output, the probability of the second. More classes have an output each, one against the
    rest, and `predict_proba` divides them by their sum, as scikit-learn's `OneVsRestClassifier` does: they are no
    softmax. Indicator matrices of several labels (samples, labels) have an output for each label, not divided.
    {PARAMETERS} `classes_`.
    """

    def fit(self, X, y):
        """X (samples, features), y (samples,) of labels or (samples, labels) of 0 and 1."""
        X, y = validate_data(self, X, y, dtype="float32", multi_output=True)
        check_classification_targets(y)
        multilabel = type_of_target(y) == "multilabel-indicator"
        binarizer = LabelBinarizer().fit(y if multilabel else column_or_1d(y, warn=True))
        classes = binarizer.classes_
        if len(classes) < 2 and not multilabel:
            raise ValueError(f"y must hold at least two classes, not one class only: {classes[0]!r}")
        self._train(X, binarizer.transform(y), "sigmoid", nn.BCELoss())
        # Set last, so that a refused fit leaves what the one before has set.
        self._multilabel, self.classes_ = multilabel, classes
        return self

    def predict_proba(self, X):
        """(samples, classes), rows that sum to 1; of several labels (samples, labels), each its own probability."""
        p = self._outputs(X)
        if self._multilabel:
            return p
        if p.shape[1] == 1:
            return np.hstack([1 - p, p])
        # Where every output underflows to 0, all classes are equally likely.
        p = p.clip(np.finfo(p.dtype).tiny)
        return p / p.sum(1, keepdims=True)

    def predict(self, X):
        """(samples,), the likeliest class; of several labels (samples, labels), 1 above a probability of 0.5."""
        p = self.predict_proba(X)
        return (p > 0.5).astype(int) if self._multilabel else self.classes_[p.argmax(1)]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class FusedMLPRegressor(MultiOutputMixin, RegressorMixin, _FusedMLP):
    __doc__ = f"""A regressor without output activation, trained by `fit` on the mean squared error (`nn.MSELoss`).
    {PARAMETERS}
    """

    def fit(self, X, y):
        """X (samples, features), y (samples,) or (samples, outputs), of order 1 as X should be."""
        X, y = validate_data(self, X, y, dtype="float32", multi_output=True, y_numeric=True)
        y = check_array(y, dtype="float32", ensure_2d=False, input_name="y")
        self._train(X, y.reshape(len(y), -1), "identity", nn.MSELoss())
        self._flat = y.ndim == 1
        return self

    def predict(self, X):
        """(samples,) or (samples, outputs), as y was; float32, in which it was computed."""
        y = self._outputs(X)
        return y.ravel() if self._flat else y
