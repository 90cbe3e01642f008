"""What a CUDA graph needs of the calls that it is going to capture."""

import contextlib
from collections.abc import Callable, Iterator

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
    with torch.enable_grad(), _side_stream():
        y = function(*inputs)
        if not isinstance(y, Tensor):
            raise TypeError(f"function must return a Tensor, not {type(y).__name__}")
        if leaves := _leaves(y):
            torch.autograd.grad(y, leaves, torch.ones_like(y))


@contextlib.contextmanager
def _side_stream() -> Iterator[None]:
    """A stream as captures use them: on the default one, calls that are small take plain torch instead of kernels."""
    if not torch.cuda.is_available() or torch.cuda.current_stream() != torch.cuda.default_stream():
        yield
        return
    stream, default = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(default)
    with torch.cuda.stream(stream):
        yield
    default.wait_stream(stream)


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
