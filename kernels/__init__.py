"""Arithmetic on tensors: fused linear + activation in Triton, in plain torch, and the choice between them."""

from .ops import Explanation, explain
from .plan import Device, Plan, Tile

__all__ = ["Device", "Explanation", "Plan", "Tile", "explain"]
