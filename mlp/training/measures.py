# SPDX-License-Identifier: Apache-2.0
"""Losses and metrics of networks one by one, whatever function computes them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ensemble import Ensemble
from ..sequential import runs_only_forward
from .criteria import LOSSES

Measure = Callable[[Tensor, Tensor], Any]


def losses_of(model: nn.Module, criterion: Measure, output: Tensor, target: Tensor, own: bool) -> Tensor:
    """The loss of each network: (1,) or, of an Ensemble, (E,). own: each member has targets of its own.

    A member with NaN among its outputs or targets has a loss of NaN, and gradients that are, whatever the criterion
    makes of NaN: torch's BCELoss raises an error, which would end the training of all members.
    """
    if not isinstance(model, Ensemble):
        return each(model, criterion, output, target, own, "criterion")
    bad = output.isnan().flatten(1).any(1)
    if target.is_floating_point():
        bad = bad | target.isnan().flatten(-2).any(-1)
        target = target.nan_to_num(0.5, torch.inf, -torch.inf)
    losses = each(model, criterion, output.nan_to_num(0.5, torch.inf, -torch.inf), target, own, "criterion")
    return losses * torch.where(bad, torch.nan, 1.0)


def each(model: nn.Module, measure: Measure, output: Tensor, target: Tensor, own: bool, name: str) -> Tensor:
    """What `measure` says of each network, (1,) or (E,). Raises TypeError and ValueError for what is not one number."""
    if not isinstance(model, Ensemble):
        return _number(measure(output, target), name)[None]
    if _maps(measure):
        target = target.long() if target.dtype == torch.uint8 else target  # class ids, of which vmap takes no bytes
        return torch.func.vmap(measure, in_dims=(0, 0 if own else None))(output, target)
    targets = target if own else target.expand(len(output), *target.shape)
    return torch.stack([_number(measure(*pair), name) for pair in zip(output, targets, strict=True)])


def accuracy(criterion: object, output: Tensor, target: Tensor) -> Tensor:
    """The share of samples whose greatest output is that of the target, a class id or the greatest of a row.

    Of one output, and under BCELoss and BCEWithLogitsLoss, where outputs are classes of their own: the share of outputs
    on the right side of 1/2, or of a logit of 0.
    """
    if target.dim() < output.dim():
        ignored = getattr(criterion, "ignore_index", None)
        counted = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != ignored
        return ((output.argmax(-1) == target) & counted).sum() / counted.sum()
    if output.shape[-1] == 1 or isinstance(criterion, (nn.BCELoss, nn.BCEWithLogitsLoss)):
        border = 0.0 if isinstance(criterion, nn.BCEWithLogitsLoss) else 0.5
        return ((output > border) == (target > 0.5)).double().mean()
    return (output.argmax(-1) == target.argmax(-1)).double().mean()


def _maps(measure: object) -> bool:
    """Whether it is known to compute all members at once as it does each."""
    if isinstance(measure, partial):
        return measure.func is accuracy
    known = type(measure) in LOSSES and getattr(measure, "reduction", "none") != "none"
    return known and isinstance(measure, nn.Module) and runs_only_forward(measure)


def _number(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a tensor with one number, not a {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"{name} must return a tensor with one number, not one of shape {tuple(value.shape)}")
    return value.reshape(())
