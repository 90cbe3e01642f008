"""What a CUDA graph needs of the calls that it is going to capture."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["warmup"]


def warmup(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Calls function(*inputs) and its backward pass once: a CUDA graph can capture both afterwards.

    A kernel is compiled and loaded on its first launch, which a capture does not bear: with a cold kernel it ends in a
    RuntimeError. function: what will be captured, a model or rather model and loss, since kernels are compiled for the
    strides of gradients too. inputs: of the shapes, dtypes and strides to come. No `.grad` changes; what else a call
    changes, as random numbers and running statistics, does.

    Raises TypeError if the function returns no tensor.
    """
    with torch.enable_grad():
        y = function(*inputs)
        if not isinstance(y, Tensor):
            raise TypeError(f"function must return a Tensor, not {type(y).__name__}")
        if leaves := _leaves(y):
            torch.autograd.grad(y, leaves, torch.ones_like(y))


def _leaves(y: Tensor) -> list[Tensor]:
    """The tensors whose gradients y.backward() would accumulate."""
    nodes, seen, leaves = [y.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        leaves += [leaf] if (leaf := getattr(node, "variable", None)) is not None else []
    return leaves
