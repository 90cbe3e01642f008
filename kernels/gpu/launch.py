# SPDX-License-Identifier: Apache-2.0
"""How kernels are launched: on their tensors' device, past triton's search of the compiled version, and in captures."""

import contextlib
import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.knobs import runtime as hooks
from triton.runtime import JITFunction, driver

from ..records import NotCompiledError
from .layer_kernels import linear_act_fwd_rows_kernel

INTERPRETED = not isinstance(linear_act_fwd_rows_kernel, JITFunction)
ON_CPU = INTERPRETED  # whether kernels can be launched on tensors of the CPU; tests that emulate a GPU set it


def device_of(place: torch.device):
    # triton launches on the current device, even if the tensors lie on another one.
    if place.type != "cuda":
        return contextlib.nullcontext()
    if torch.cuda.is_current_stream_capturing():
        return _captured(place)
    if place.index != torch.cuda.current_device():
        return torch.cuda.device(place)
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


Tensors = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # dx, dweight, dbias
OptionalTensors = tuple[Tensor | None, ...]


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all begin at multiples of 16 bytes, as those that torch allocates do."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return not addresses % 16


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A function that makes contiguous tensors of that shape, whose memory nobody has written."""
    strides = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
    return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)  # twice as fast as torch.empty


try:  # what the programs of torch.compile call, in half the time of a view: autograd has nothing to note
    from torch._C._dynamo.guards import _reinterpret_tensor  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
except ImportError:
    _reinterpret_tensor = Tensor.as_strided
part_of: Callable[..., Tensor] = _reinterpret_tensor  # of a tensor that begins its memory: shape, strides, offset


class Launch:
    """Launches of one kernel on tensors of which everything is known but where they lie.

    At every launch triton looks at each argument in order to find the compiled version for it, which on the host takes
    longer than everything else that a small layer does. What the first launch found is called from then on.
    """

    def __init__(self, kernel, grid: tuple[int, ...], device: torch.device, tensors: tuple[str, ...], /, **options):
        """tensors: the names of the kernel's first arguments, tensors, None or tuples of those. options: the other
        arguments in the order of the signature, and launch options after them.
        """
        self.kernel, self.grid, self.device, self.tensors, self.options = kernel, grid, device, tensors, options
        self.index = device.index if device.type == "cuda" else None
        self.short: Callable[..., object] | None = None

    def __call__(self, aligned: bool, /, *tensors) -> None:
        """aligned: whether all tensors that were given to the launcher are; fresh ones always are."""
        if self.short is None or not aligned:
            with device_of(self.device):
                compiled = self.kernel[self.grid](**dict(zip(self.tensors, tensors, strict=True)), **self.options)
            # The interpreter returns nothing to keep, and a stand-in for a kernel, as tests have it, has to see every
            # launch.
            if aligned and isinstance(compiled, CompiledKernel) and isinstance(self.kernel, JITFunction):
                rest = tuple(self.options[name] for name in self.kernel.arg_names[len(tensors) :])
                self.short = _short(compiled, self.grid, rest)
        elif self.index is not None and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self.short(tensors)
        else:
            self.short(tensors)


def _short(compiled: Any, grid: tuple[int, ...], rest: tuple) -> Callable[[tuple], object]:
    """What launches a compiled kernel on the current device and stream, as `JITFunction.run` does once it has it."""
    grid = (*grid, 1, 1)[:3]
    runner, run, function, packed = compiled[grid], compiled.run, compiled.function, compiled.packed_metadata

    def short(tensors: tuple) -> None:
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler's
            runner(*tensors, *rest)
        else:
            active: Any = driver.active
            stream = active.get_current_stream(active.get_current_device())
            run(*grid, stream, function, packed, None, None, None, *tensors, *rest)

    return short


def launch_in_a_row(kernel, grid: tuple[int, ...], count: int, /, **arguments: object) -> None:
    """kernel[grid](**arguments), `count` times in a row."""
    compiled = kernel[grid](**arguments)
    if isinstance(compiled, CompiledKernel) and isinstance(kernel, JITFunction):
        run = _short(compiled, grid, tuple(arguments[name] for name in kernel.arg_names))
        for _ in range(count - 1):
            run(())
    else:
        for _ in range(count - 1):
            kernel[grid](**arguments)
