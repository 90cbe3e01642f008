# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on tensors: fused linear + activation in Triton, in plain torch, and the choice between them."""

if __name__ == "kernels":
    raise ImportError("this folder is a part of perceptriton, not the package kernels: run this elsewhere")

from . import registration as registration  # registers the ops that torch.compile calls
from .devices import allow_fp32_split
from .explain import Explanation, MlpExplanation, explain
from .records import Device, MlpPlan, Plan, Tile

__all__ = ["Device", "Explanation", "MlpExplanation", "MlpPlan", "Plan", "Tile", "allow_fp32_split", "explain"]
