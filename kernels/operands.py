# SPDX-License-Identifier: Apache-2.0
"""Operands as the kernels read them: two-dimensional, dense where that is asked, their values in memory."""

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

Operand = TypeVar("Operand", Tensor, Tensor | None)


def widths_of(weights: Sequence[Tensor]) -> tuple[int, ...]:
    return (weights[0].shape[1], *(weight.shape[0] for weight in weights))


def stored(tensor: Operand) -> Operand:
    """The tensor, or a copy if memory holds its negative, as that of `z.conj().imag` does: kernels read memory."""
    return tensor.resolve_neg() if tensor is not None and tensor.is_neg() else tensor


def led(y: Tensor, shape: Sequence[int]) -> Tensor:
    """y (M, N) with the leading dimensions of a shape: no view, which autograd would let nobody write to."""
    return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[1]).data


def flattened(x: Tensor) -> Tensor:
    return stored(x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def flat_head(head: tuple | None) -> tuple | None:
    """The target, pos_weight and options of a loss, as the kernels of whole networks read them."""
    if head is None:
        return None
    target, pos_weight, *options = head
    if pos_weight is not None:
        real = pos_weight if pos_weight.is_floating_point() else pos_weight.float()
        pos_weight = stored(real).expand(target.shape[-1])
    return flattened(target), pos_weight, *options


def dense(
    weights: Sequence[Tensor], biases: Sequence[Tensor] | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Parameters as the kernels of whole networks read them."""
    dense = tuple(stored(weight).contiguous() for weight in weights)
    return dense, None if biases is None else tuple(stored(bias).contiguous() for bias in biases)


def are_dense(
    found: Sequence[Sequence[Tensor] | None], weights: Sequence[Tensor], biases: Sequence[Tensor] | None
) -> bool:
    """Whether parameters lie as `dense` has them, which found these."""
    pairs = zip((*(found[0] or ()), *(found[1] or ())), (*weights, *(biases or ())), strict=True)
    return all([own is given for own, given in pairs])
