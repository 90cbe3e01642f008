# SPDX-License-Identifier: Apache-2.0
"""The regressor of scikit-learn's kind."""

import torch
from sklearn.base import MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_array, validate_data
from torch import Tensor, nn

from .base import FusedMLP, whole


def r2(output: Tensor, target: Tensor) -> Tensor:
    """The coefficient of determination, the mean of all outputs, as scikit-learn's r2_score."""
    residual, total = (output - target).square().sum(0), (target - target.mean(0)).square().sum(0)
    exact = torch.where(residual == 0, 1.0, 0.0)
    return torch.where(total == 0, exact, 1 - residual / total).mean()


class FusedMLPRegressor(MultiOutputMixin, RegressorMixin, FusedMLP):
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
    impl: as `fit`'s. None takes another loop, which rounds otherwise, once compiled ones are there; "torch" and
    "native" give the same numbers in every run, from the same random_state.

    Everything is computed in float32, so that inputs should be of order 1: `StandardScaler` in a pipeline. Sparse
    matrices are made dense.

    Fitted: `model_`, the trained `MLP`, without output activation; `n_iter_`, epochs; `loss_curve_`, the mean loss of
    each epoch's batches, each before its update; `loss_`, the last of these; with early_stopping `validation_scores_`,
    of each epoch; `n_features_in_`, and `feature_names_in_` where X has names.
    """

    _metric = staticmethod(r2)

    @whole
    def fit(self, X, y, sample_weight=None):
        """X (samples, features), y (samples,) or (samples, outputs), of order 1 as X; sample_weight (samples,)."""
        return self._fit(X, y, sample_weight)

    @whole
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
