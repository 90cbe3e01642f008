"""Sigmoid MLPs in fused kernels: drop-in layers, whole networks, the classic lessons."""

from .functional import linear_act, linear_sigmoid, linear_sigmoid_bce, mlp_act, mlp_sigmoid_bce
from .layers import LinearReLU, LinearSigmoid, LinearSigmoidBCELoss, LinearTanh
from .model import MLP

__all__ = [
    "MLP",
    "LinearReLU",
    "LinearSigmoid",
    "LinearSigmoidBCELoss",
    "LinearTanh",
    "linear_act",
    "linear_sigmoid",
    "linear_sigmoid_bce",
    "mlp_act",
    "mlp_sigmoid_bce",
]
