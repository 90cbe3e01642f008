# SPDX-License-Identifier: Apache-2.0
"""The classifier of scikit-learn's kind."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import issparse
from sklearn.base import ClassifierMixin
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import column_or_1d, validate_data
from torch import Tensor, nn

from .base import FusedMLP, whole


def exact_match(output: Tensor, target: Tensor) -> Tensor:
    """The share of samples all of whose labels are right, from logits: the score of an indicator matrix."""
    return ((output > 0) == (target > 0.5)).all(1).double().mean()


class FusedMLPClassifier(ClassifierMixin, FusedMLP):
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
    impl: as `fit`'s. None takes another loop, which rounds otherwise, once compiled ones are there; "torch" and
    "native" give the same numbers in every run, from the same random_state.

    Everything is computed in float32, so that inputs should be of order 1: `StandardScaler` in a pipeline. Sparse
    matrices are made dense.

    Fitted: `model_`, the trained `MLP`, without output activation; `n_iter_`, epochs; `loss_curve_`, the mean loss of
    each epoch's batches, each before its update; `loss_`, the last of these; with early_stopping `validation_scores_`,
    of each epoch; `n_features_in_`, `classes_`, and `feature_names_in_` where X has names.
    """

    _metric = "accuracy"

    @whole
    def fit(self, X, y, sample_weight=None):
        """X (samples, features), y (samples,) of labels or (samples, labels) of 0 and 1; sample_weight (samples,)."""
        return self._fit(X, y, sample_weight)

    @whole
    def partial_fit(self, X, y, sample_weight=None, classes=None):
        """One epoch more, the first call's included.

        classes: all labels that there are, which that call needs; for indicator matrices the numbers of the columns.
        """
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
        if multilabel and not np.isin(y, (0, 1)).all():
            raise ValueError(f"y must hold 0 and 1 where it is a matrix of several labels, not {np.unique(y)}")
        y = y if multilabel else column_or_1d(y, warn=True)
        labels = y if classes is None or multilabel else classes
        known = LabelBinarizer().fit(labels).classes_ if first else self.classes_
        if classes is not None and not np.array_equal(np.unique(classes), known):
            why = "the columns of y" if multilabel else "as in the first call"
            raise ValueError(f"classes must be {known}, {why}, not {classes}")
        if len(known) < 2 and not multilabel:
            raise ValueError(f"y must hold at least two classes, not one class only: {known[0]!r}")
        if not multilabel and (strange := np.setdiff1d(y, known)).size:
            raise ValueError(f"y must hold classes among {known}, not {strange}")
        several = len(known) > 2 and not multilabel
        targets: Any = y if multilabel else np.searchsorted(known, y)
        targets = targets.astype(np.int64) if several else targets.reshape(len(targets), -1).astype(np.float32)
        criterion = nn.CrossEntropyLoss() if several else nn.BCEWithLogitsLoss()
        outputs, metric = len(known) if several else targets.shape[1], exact_match if multilabel else None
        self._train(X, targets, outputs, criterion, sample_weight, more, metric)
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
