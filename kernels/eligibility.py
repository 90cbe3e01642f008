# SPDX-License-Identifier: Apache-2.0
"""What keeps a call from the kernels: dtype, layout, shapes, modes. A refusal is a reason in words, or None."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import crossover
from . import plan as planning
from .devices import DTYPE_NAMES, cpu_refusal, device_for, dtype_name, fp32_precision, fp32_split, look_at
from .operands import widths_of

PLAIN = (Tensor, torch.nn.Parameter)  # subclasses have rules of their own
Function = TypeVar("Function", bound=Callable)


def _untraced(function: Function) -> Function:
    """The tracer runs this instead of tracing it, under the transforms that the traced program has begun."""
    # As torch.compiler.assume_constant_result does, a call of which would import torch._dynamo, and with it triton.
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def layer_refusal(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, autocast: bool, impl: str | None
) -> str | None:
    """Why this call of a layer is left to plain torch operations (which may in turn raise), or None.

    dtype: what the product is computed in: that of x, or autocast's.
    """
    if reason := _tensor_refusal(x, (("weight", weight), ("bias", bias)), dtype, autocast):
        return reason
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}"
    return bias_refusal("bias", bias, weight) or _mode_refusal(x.device, impl)


def traced_refusal(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    autocast: bool,
    training: bool,
    impl: str | None = None,
    kinds: tuple[type, ...] = PLAIN,
    replayed: bool = False,
) -> str | None:
    """The same for a traced call. Of what does not fit together the registered op says so, as `torch.nn` would.

    Looks at no number of rows that is not known: a dynamic batch is compiled once. training: gradients are wanted.
    kinds: the types of tensors that are plain ones. replayed: a CUDA graph will ask nothing of the host.
    """
    if reason := _traced_refusal(x, (("weight", weight), ("bias", bias)), dtype, autocast, impl, kinds):
        return reason
    if reason := bias_refusal("bias", bias, weight):
        return reason
    return None if impl or replayed else _small(x, (weight,), training)


def traced_boundaries(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    dtype: torch.dtype,
    autocast: bool,
    training: bool,
    impl: str | None = None,
    kinds: tuple[type, ...] = PLAIN,
    replayed: bool = False,
    loss: bool = False,
) -> tuple[int, ...] | str:
    """The layers whose inputs a traced network saves for its backward pass, or why it is traced layer by layer.

    loss: it ends in the cross entropy. The rest as for `traced_refusal`. One plan must do for every number of rows that
    the program may see.
    """
    others = (*weights, *(biases or ()))
    if reason := _traced_refusal(x, [("a parameter", tensor) for tensor in others], dtype, autocast, impl, kinds):
        return reason
    if not _known(weights):
        return "its widths are not known"
    if not _fit(x, weights, biases) or any(t.device != x.device or not (autocast or t.dtype == dtype) for t in others):
        return "its layers do not fit together"
    if impl is None and not replayed and (reason := _small(x, weights, training)):
        return reason
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    widths = widths_of(weights)
    few = statically_known_true(x.numel() <= planning.MLP_IEEE_ROWS * widths[0])
    return _boundaries(widths, dtype, x.device, training, few, impl, loss)


@_untraced
def _boundaries(
    widths: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    few: bool,
    impl: str | None,
    loss: bool,
) -> tuple[int, ...] | str:
    """few: of rows there are no more than MLP_IEEE_ROWS."""
    described = device_for(device, impl) if impl == "triton" else look_at(device)
    kind = (dtype_name(dtype), fp32_precision(described), described)
    options = (widths, *kind, training, loss, impl, fp32_split(dtype))
    plans = [planning.mlp_both(rows, *options) for rows in ((1,) if few else (1, 1 << 40))]
    if refused := next((plan.forward.reason for plan in plans if plan.forward.impl != "fused"), None):
        return refused
    backward = plans[0].backward
    return () if backward is None else backward.boundaries


def _known(weights: Sequence[Tensor], *sizes: int) -> bool:
    """Whether weights have the same shapes, and these sizes are the same, whenever a traced program runs.

    To compare sizes that are not known would tie the program to them.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value  # which takes a second to import

    return all([has_static_value(size) for size in [*sizes, *[size for weight in weights for size in weight.shape]]])


def _fit(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> bool:
    if x.dim() == 0 or any([weight.dim() != 2 for weight in weights]):
        return False
    features = [x.shape[-1], *[weight.shape[0] for weight in weights]]
    if any([weight.shape[1] != k for weight, k in zip(weights, features[:-1], strict=True)]):
        return False
    return biases is None or all([bias.shape == w.shape[:1] for bias, w in zip(biases, weights, strict=True)])


def _small(x: Tensor, weights: Sequence[Tensor], training: bool) -> str | None:
    """Why a program that is traced for a GPU is best off with plain operations, which its compiler fuses."""
    if not x.is_cuda or not _known(weights, *x.shape[:-1]):
        return None
    widths = widths_of(weights)
    nbytes = math.prod(x.shape[:-1]) * widths[0] * x.dtype.itemsize
    if crossover.layer_bytes(nbytes, widths) < _traced_limit(training, x.device):
        return "small: the host decides how long it takes"
    return None


@_untraced
def _traced_limit(training: bool, device: torch.device) -> float:
    return crossover.traced_limit(training, look_at(device))


def mlp_refusal(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    dtype: torch.dtype,
    autocast: bool,
    impl: str | None,
) -> str | None:
    """The same for a whole network whose shapes fit."""
    tensors: list[tuple[str, Tensor | None]] = [(f"weights[{l}]", weight) for l, weight in enumerate(weights)]
    tensors += [(f"biases[{l}]", bias) for l, bias in enumerate(biases or ())]
    return _tensor_refusal(x, tensors, dtype, autocast) or _mode_refusal(x.device, impl)


def _traced_refusal(
    x: Tensor,
    others: Sequence[tuple[str, Tensor | None]],
    dtype: torch.dtype,
    autocast: bool,
    impl: str | None,
    kinds: tuple[type, ...],
) -> str | None:
    if impl == "torch":
        return 'impl="torch"'
    if impl is None and not launchable(x.device, dtype):
        return f"no kernels for {dtype} on {x.device} in this program"
    return _kind_refusal(x, others, dtype, autocast, kinds) or _mode_refusal(x.device, impl)


def _kind_refusal(
    x: Tensor,
    others: Sequence[tuple[str, Tensor | None]],
    dtype: torch.dtype,
    autocast: bool,
    kinds: tuple[type, ...] = PLAIN,
) -> str | None:
    if dtype not in DTYPE_NAMES:
        return f"x is {dtype}; the kernels take {', '.join(map(str, DTYPE_NAMES))}"
    if x.device.type not in ("cpu", "cuda"):
        return f"no kernels for {x.device.type} devices"
    for name, tensor in (("x", x), *others):
        if tensor is None:
            continue
        if type(tensor) not in kinds:
            return f"{name} is a {type(tensor).__name__}, a subclass of Tensor with rules of its own"
        if tensor.layout is not torch.strided:
            return f"{name} is {tensor.layout}"
        if autocast and tensor.dtype not in DTYPE_NAMES:
            return f"{name} is {tensor.dtype}, which autocast leaves as it is"
    return None


def _tensor_refusal(
    x: Tensor, others: Sequence[tuple[str, Tensor | None]], dtype: torch.dtype, autocast: bool
) -> str | None:
    if reason := _kind_refusal(x, others, dtype, autocast):
        return reason
    device = x.device
    for name, tensor in others:
        if tensor is not None and (tensor.device != device or not (autocast or tensor.dtype is dtype)):
            return f"{name} is {tensor.dtype} on {tensor.device}, not {dtype} on {device}"
    return None


def bias_refusal(name: str, bias: Tensor | None, weight: Tensor) -> str | None:
    """Why the kernels do not take this bias, or None. torch broadcasts what it can; a kernel would read behind it."""
    if bias is None or bias.shape == weight.shape[:1]:
        return None
    return f"{name} {tuple(bias.shape)} is not the out_features of weight {tuple(weight.shape)}"


def _mode_refusal(device: torch.device, impl: str | None) -> str | None:
    # The compiler keeps the modes that it traces in a stack of its own, which what is not traced does not see.
    if torch._C._len_torch_function_stack() and functions_are_watched():
        return "a TorchFunctionMode is active"
    return _other_refusal(device, impl)


@_untraced
def _other_refusal(device: torch.device, impl: str | None) -> str | None:
    if _functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    if torch._C._len_torch_dispatch_stack():
        # A mode that counts operations, or decides which results to keep, has to see those of the unfused pair.
        # torch.compile steps aside for a mode too, so the registered ops need no rules of their own.
        return "a TorchDispatchMode is active"
    return cpu_refusal(device) if impl == "triton" else None


def functions_are_watched() -> bool:
    """Whether a TorchFunctionMode sees the functions of torch that are called. That of `torch.device` does not."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def check_operands(x: Tensor, weight: Tensor, bias: Tensor | None = None, autocast: bool = False) -> None:
    """Raises the ValueError that says what does not fit together; whether the bias does is `bias_refusal`'s question.

    autocast: the dtypes need not be the same.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be (out_features, in_features), not {tuple(weight.shape)}")
    # An `if` would ask the compiler for a size that it may not know; this check then runs with the program.
    torch._check_value(
        x.dim() > 0 and x.shape[-1] == weight.shape[1],
        lambda: f"x {tuple(x.shape)} does not end in the in_features of weight {tuple(weight.shape)}",
    )
    check_alike("x", x, autocast, weight=weight, bias=bias)


def check_alike(name: str, tensor: Tensor, autocast: bool = False, /, **others: Tensor | None) -> None:
    """Raises the ValueError that says which of the others has another device or, without autocast, another dtype."""
    for other, found in others.items():
        if found is None:
            continue
        if found.device != tensor.device:
            raise ValueError(f"{other} is on {found.device}, but {name} on {tensor.device}")
        if found.dtype != tensor.dtype and not autocast:
            raise ValueError(f"{other} is {found.dtype}, but {name} {tensor.dtype}")


def transformed(tensor: Tensor) -> bool:
    """Whether a gradient is more than its values: many of them (is_grads_batched), or one that is differentiated."""
    return (
        _functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or _functorch.is_batchedtensor(tensor)
        or _functorch.is_legacy_batchedtensor(tensor)
    )


@_untraced
def launchable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a traced program may call the kernels for this dtype on this device. Looks at no shape.

    An exported one may not. That is asked here, outside of the trace: in torch 2.11 the compiler takes
    `torch.compiler.is_exporting()` to be true whenever it traces.
    """
    described = look_at(device)  # `describe` may warn, which is an error in a traced program
    usable = described.triton and planning.device_refusal(1, 1, 1, dtype_name(dtype), described) is None
    return usable and not torch.compiler.is_exporting()
