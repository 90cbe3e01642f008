"""Sigmoid MLPs in fused kernels: drop-in layers, whole networks, the classic lessons."""

from .functional import linear_act, linear_sigmoid
from .layers import LinearReLU, LinearSigmoid, LinearTanh
from .model import MLP

__all__ = ["MLP", "LinearReLU", "LinearSigmoid", "LinearTanh", "linear_act", "linear_sigmoid"]
