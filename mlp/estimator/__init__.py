# SPDX-License-Identifier: Apache-2.0
"""scikit-learn estimators over `MLP` and `fit`: `from perceptriton.mlp.estimator import FusedMLPClassifier`.

The rest of the package does not import this folder: it needs the extra `sklearn`.
"""

try:
    import sklearn.utils.validation

    _ = sklearn.utils.validation.validate_data  # since 1.6
except (ImportError, AttributeError) as error:
    raise ImportError("estimators need scikit-learn 1.6 or newer: install perceptriton[sklearn]") from error

from .classifier import FusedMLPClassifier
from .regressor import FusedMLPRegressor

__all__ = ["FusedMLPClassifier", "FusedMLPRegressor"]
