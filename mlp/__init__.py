# SPDX-License-Identifier: Apache-2.0
"""Sigmoid, tanh and relu MLPs in fused kernels: drop-in layers, networks, training loops, the classic lessons."""

from .capturing import warmup
from .ensemble import Ensemble
from .functional import linear_act, linear_sigmoid, linear_sigmoid_bce, mlp_act, mlp_sigmoid_bce
from .fusing import fuse_, unfuse_
from .layers import LinearReLU, LinearSigmoid, LinearSigmoidBCELoss, LinearTanh
from .model import MLP
from .reporting import report
from .training import EarlyStopping, History, fit, fit_sharded

__all__ = [
    "MLP",
    "EarlyStopping",
    "Ensemble",
    "History",
    "LinearReLU",
    "LinearSigmoid",
    "LinearSigmoidBCELoss",
    "LinearTanh",
    "fit",
    "fit_sharded",
    "fuse_",
    "linear_act",
    "linear_sigmoid",
    "linear_sigmoid_bce",
    "mlp_act",
    "mlp_sigmoid_bce",
    "report",
    "unfuse_",
    "warmup",
]
