# SPDX-License-Identifier: Apache-2.0
"""What was decided for a call, found again by all that it was decided from."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_function_stack  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from .devices import fp32_setting
from .eligibility import functions_are_watched

try:  # torch.compile's own comparison, in C; without it every call is decided anew
    from torch._C._dynamo.guards import TensorGuards  # pyright: ignore[reportMissingImports]
except ImportError:
    TensorGuards = None

MAX_KEYS, MAX_ALIKE = 4096, 8


class Calls:
    """Functions that do what was decided, by a key of what is no tensor and by the tensors of the call.

    Two calls are the same if their tensors agree, one by one, in class, dtype, device, shape, strides, requires_grad
    and all that torch's dispatcher keeps with a tensor or a thread: values that are kept negated, transforms, autocast,
    inference mode, tracing, modes. Of the rest, gradient mode and the precision of fp32 products are compared here, and
    a call under forward-mode differentiation or a mode that watches torch's functions is like no other. Addresses are
    not compared. Tensors are not kept. Tensors that occur twice in a call make it like no other too.
    """

    def __init__(self) -> None:
        self._found: dict[tuple, tuple[tuple[Callable[..., bool], Callable, object], ...]] = {}
        _all.append(self)

    def find(self, key: tuple, tensors: Sequence[Tensor]) -> Callable | None:
        """The function that was kept for such a call, or None."""
        if not quiet():
            return None
        try:
            found = self._found.get(_whole(key, tensors), ())
        except TypeError:  # of sizes that are symbols
            return None
        for check, call, _ in found:
            if check(*tensors):
                return call
        return None

    def keep(self, key: tuple, tensors: Sequence[Tensor], call: Callable, owner: object = None) -> None:
        """Keeps a function for calls that are the same as this one, if torch can compare them.

        owner: what the key holds the id of, which is kept too.
        """
        # What a transform has left behind, torch itself takes away in `Function.apply`.
        if TensorGuards is None or not quiet() or any(map(is_functorch_wrapped_tensor, tensors)):
            return
        if len({id(tensor) for tensor in tensors}) < len(tensors):
            return  # it would never be found, and drive out what is
        if len(self._found) >= MAX_KEYS:
            self._found.clear()
        layout: Any = {
            "dynamic_dims_sizes": [[*t.shape] for t in tensors],
            "dynamic_dims_strides": [[*t.stride()] for t in tensors],
        }
        guards: Any = TensorGuards(*tensors, **layout)
        key = _whole(key, tensors)
        self._found[key] = ((guards.check, call, owner), *self._found.get(key, ()))[:MAX_ALIKE]

    def clear(self) -> None:
        self._found.clear()


def _whole(key: tuple, tensors: Sequence[Tensor]) -> tuple:
    """The key, with what tells most calls apart: without shapes, batches of many sizes drove each other out."""
    x, middle, last = tensors[0], tensors[len(tensors) >> 1], tensors[-1]
    return (is_grad_enabled(), fp32_setting(x.dtype), x.shape, middle.shape, last.shape, *key)


_all: list[Calls] = []


def forget() -> None:
    """Lets every call be decided anew, as is due when tables, limits or kernels have been replaced."""
    for calls in _all:
        calls.clear()


def quiet() -> bool:
    """Whether nobody looks on whom no tensor tells of, nor writes down, as torch.jit does, that a shape is read."""
    if forward_ad._current_level >= 0 or _get_tracing_state() is not None:
        return False
    return not (_len_torch_function_stack() and functions_are_watched())


def _leave_alone(*functions: Callable) -> None:
    """Keeps torch.compile from compiling these where it has given up on their caller, which then runs as it is."""
    try:  # by name: where a torch lacks one of these, that too is an ImportError
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:
        return
    for function in functions:
        set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


_leave_alone(Calls.find, Calls.keep)
