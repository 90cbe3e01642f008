# SPDX-License-Identifier: Apache-2.0
"""What a CUDA graph needs of the calls that it is going to capture."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["warmup"]


def warmup(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Calls function(*inputs) and its backward pass once: a CUDA graph can capture both afterwards.

    A kernel is compiled and loaded on its first launch, which a capture does not bear: with a cold kernel it ends in a
    RuntimeError. function: what will be captured, a model or rather model and loss, since kernels are compiled for the
    strides of gradients too. inputs: of the shapes, dtypes and strides to come, and on the device to come: its default
    stream, which captures keep away from, is left alone here too. No `.grad` changes; what else a call changes, as
    random numbers and running statistics, does.

    Raises TypeError if an input is no tensor, and if the function returns none.
    """
    for i, tensor in enumerate(inputs):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"inputs[{i}] must be a Tensor, not {type(tensor).__name__}")
    tensors = [*inputs, *function.parameters()] if isinstance(function, nn.Module) else inputs
    with torch.enable_grad(), _side_streams({tensor.device.index for tensor in tensors if tensor.is_cuda}):
        y = function(*inputs)
        if not isinstance(y, Tensor):
            raise TypeError(f"function must return a Tensor, not {type(y).__name__}")
        if leaves := _leaves(y):
            torch.autograd.grad(y, leaves, torch.ones_like(y))


@contextlib.contextmanager
def _side_streams(devices: set[int]) -> Iterator[None]:
    """Makes streams other than the default ones current, as a capture does: on those, small calls launch no kernels."""
    if not torch.cuda.is_available():
        yield
        return
    current = torch.cuda.current_device()
    with contextlib.ExitStack() as stack:
        for device in devices or {current}:
            default = torch.cuda.default_stream(device)
            if torch.cuda.current_stream(device) != default:
                continue
            stream = torch.cuda.Stream(device)
            stream.wait_stream(default)
            stack.callback(default.wait_stream, stream)
            stack.enter_context(torch.cuda.stream(stream))
        # Entering a stream makes its device the current one, where the function would then create its tensors.
        stack.enter_context(torch.cuda.device(current))
        yield


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
