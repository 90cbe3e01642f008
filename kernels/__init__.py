"""Arithmetic on tensors: fused linear + activation in Triton, in plain torch, and the choice between them."""

from .ops import Explanation, MlpExplanation, allow_fp32_split, explain
from .plan import Device, MlpPlan, Plan, Tile

__all__ = ["Device", "Explanation", "MlpExplanation", "MlpPlan", "Plan", "Tile", "allow_fp32_split", "explain"]
