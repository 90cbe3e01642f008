# SPDX-License-Identifier: Apache-2.0
"""Losses and metrics of networks one by one, whatever function computes them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..chains import runs_as_written
from ..ensemble import Ensemble
from .criteria import LOSSES

Measure = Callable[[Tensor, Tensor], Any]

# Criteria that say what outputs are, and the functions that are the same.
KINDS = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
}
BINARY = (nn.BCELoss, nn.BCEWithLogitsLoss)


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
    """The share of samples whose greatest output is that of the target, a class id or the greatest of the target's own.

    Classes lie along dimension 1 under the cross entropy, as in torch, else along the last. Where there is one output,
    and under the binary cross entropies, where outputs are classes of their own: the share of outputs on the right side
    of 1/2, or of a logit of 0 under the one from logits; targets are of class 1 above 1/2.

    Raises ValueError for a target that is neither.
    """
    asked = criterion.func if isinstance(criterion, partial) else criterion
    kind = next((kind for kind, same in KINDS.items() if asked is same or isinstance(asked, kind)), None)
    along = 1 if kind is nn.CrossEntropyLoss and output.dim() > 1 else -1
    if output.dim() < 2 or output.shape[along] == 1 or (kind in BINARY and output.shape == target.shape):
        if output.numel() != target.numel():
            raise ValueError(_unlike(output, target))
        border = 0.0 if kind is nn.BCEWithLogitsLoss else 0.5
        return ((output > border).flatten() == (target > 0.5).flatten()).double().mean()
    if output.shape == target.shape:
        return (output.argmax(along) == target.argmax(along)).double().mean()
    # Functions of others may have classes along dimension 1 too.
    along = along if target.shape != output.select(1, 0).shape else 1
    found = output.argmax(along)
    if target.shape != found.shape and target.shape != (*found.shape, 1):
        raise ValueError(_unlike(output, target))
    ids, ignored = target.reshape(found.shape), getattr(criterion, "ignore_index", None)
    counted = torch.ones_like(ids, dtype=torch.bool) if ignored is None else ids != ignored
    return ((found == ids) & counted).sum() / counted.sum()


def _unlike(output: Tensor, target: Tensor) -> str:
    return f"accuracy: target {tuple(target.shape)} holds neither classes nor class ids of output {tuple(output.shape)}"


def _maps(measure: object) -> bool:
    """Whether it is known to compute all members at once as it does each."""
    if isinstance(measure, partial):
        return measure.func is accuracy
    known = type(measure) in LOSSES and getattr(measure, "reduction", "none") != "none"
    return known and isinstance(measure, nn.Module) and runs_as_written(measure)


def _number(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a tensor with one number, not {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"{name} must return a tensor with one number, not one of shape {tuple(value.shape)}")
    return value.reshape(())
