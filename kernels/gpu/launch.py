"""How kernels are launched: on their tensors' device, past triton's search of the compiled version, and in captures."""

import contextlib
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from ..records import NotCompiledError
from .layer_kernels import linear_act_fwd_rows_kernel

INTERPRETED = not isinstance(linear_act_fwd_rows_kernel, JITFunction)
ON_CPU = INTERPRETED  # whether kernels can be launched on tensors of the CPU; tests that emulate a GPU set it


def device_of(tensor: Tensor):
    # triton launches on the current device, even if the tensors lie on another one.
    if not tensor.is_cuda:
        return contextlib.nullcontext()
    if torch.cuda.is_current_stream_capturing():
        return _captured(tensor.device)
    if tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


# A private function of triton. Where it is missing, a capture of a cold kernel ends in triton's own error.
_compile = getattr(JITFunction, "_do_compile", None)
_lock = threading.Lock()
_captures = 0  # launches into captures that are going on, of all threads


@contextlib.contextmanager
def _captured(place: torch.device):
    # To compile and load a kernel now would spoil the capture, with an error that does not say why.
    global _captures
    with torch.cuda.device(place):
        if _compile is None:
            yield
            return
        with _lock:
            _captures += 1
            JITFunction._do_compile = _refuse_to_compile  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            with _lock:
                _captures -= 1
                if not _captures:
                    JITFunction._do_compile = _compile


def _refuse_to_compile(kernel, *arguments):
    # A thread that captures nothing may go on compiling.
    if _compile is not None and not torch.cuda.is_current_stream_capturing():
        return _compile(kernel, *arguments)
    raise NotCompiledError(
        f"{kernel.__name__} is not compiled yet, and cannot be while a CUDA graph is captured: before that, take one "
        "step with the same shapes, dtypes and strides, or give it to perceptriton.mlp.warmup"
    )


_runners: dict[tuple, tuple[object, int, Callable[..., object]]] = {}
MAX_RUNNERS = 4096

Tensors = tuple[Tensor, ...]
OptionalTensors = tuple[Tensor | None, ...]


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all begin at multiples of 16 bytes, as those that torch allocates do."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return not addresses % 16


def known_operands(*tensors: Tensor | None) -> tuple | None:
    """What the choice of a compiled kernel depends on in these tensors, or None where they are not `aligned`."""
    if not aligned(*tensors):
        return None
    return tuple([None if t is None else (t.device, t.dtype, t.stride()) for t in tensors])


def launch(kernel, grid: tuple[int, ...], owner: object, known: tuple | None, /, **arguments: object) -> None:
    """kernel[grid](**arguments), the arguments in the order of the signature and launch options after them.

    At every launch triton looks at each argument in order to find the compiled version for it, which on the host takes
    longer than everything else that a small layer does. What it found is kept here and called from then on.

    known: all that it depends on (device, dtypes, None or not, every integer, every constant), and the grid does, given
    that all tensors are `aligned`; None where they are not. owner: kept as long as `known` is, which holds its id.
    """
    if known is None:
        kernel[grid](**arguments)
        return
    key = (id(kernel), id(owner), known)
    if found := _runners.get(key):
        _, count, run = found
        run(*list(arguments.values())[:count])
        return
    compiled = kernel[grid](**arguments)
    # The interpreter returns nothing to keep, and a stand-in for a kernel, as tests have it, has to see every launch.
    if isinstance(compiled, CompiledKernel) and isinstance(kernel, JITFunction):
        if len(_runners) >= MAX_RUNNERS:
            _runners.clear()
        _runners[key] = owner, len(kernel.arg_names), compiled[(*grid, 1, 1)[:3]]


def launch_in_a_row(kernel, grid: tuple[int, ...], count: int, /, **arguments: object) -> None:
    """kernel[grid](**arguments), `count` times in a row."""
    compiled = kernel[grid](**arguments)
    if isinstance(compiled, CompiledKernel) and isinstance(kernel, JITFunction):
        run, values = compiled[(*grid, 1, 1)[:3]], [arguments[name] for name in kernel.arg_names]
        for _ in range(count - 1):
            run(*values)
    else:
        for _ in range(count - 1):
            kernel[grid](**arguments)
