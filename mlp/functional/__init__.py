# SPDX-License-Identifier: Apache-2.0
"""Differentiable functions over the kernels."""

from .layer import linear_act, linear_sigmoid
from .loss import linear_sigmoid_bce, mlp_sigmoid_bce
from .network import mlp_act

__all__ = ["linear_act", "linear_sigmoid", "linear_sigmoid_bce", "mlp_act", "mlp_sigmoid_bce"]
