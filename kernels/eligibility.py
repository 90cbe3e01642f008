"""What keeps a call from the kernels: dtype, layout, shapes, modes. A refusal is a reason in words, or None."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from . import plan as planning
from .devices import DTYPE_NAMES, dtype_name, gpu, has_triton, look_at


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
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, autocast: bool, impl: str | None
) -> str | None:
    """The same for a traced call. Of what does not fit together the registered op says so, as `torch.nn` would.

    Looks at no number of rows: a dynamic batch is compiled once.
    """
    if impl == "torch":
        return 'impl="torch"'
    if impl is None and not launchable(x.device, dtype):
        return f"no kernels for {dtype} on {x.device} in this program"
    if reason := _tensor_refusal(x, (("weight", weight), ("bias", bias)), dtype, autocast, traced=True):
        return reason
    return bias_refusal("bias", bias, weight) or _mode_refusal(x.device, impl)


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


def _tensor_refusal(
    x: Tensor, others: Sequence[tuple[str, Tensor | None]], dtype: torch.dtype, autocast: bool, traced: bool = False
) -> str | None:
    if dtype not in DTYPE_NAMES:
        return f"x is {dtype}; the kernels take {', '.join(map(str, DTYPE_NAMES))}"
    if x.device.type not in ("cpu", "cuda"):
        return f"no kernels for {x.device.type} devices"
    for name, tensor in (("x", x), *others):
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"{name} is a {type(tensor).__name__}, a subclass of Tensor with rules of its own"
        if tensor.layout is not torch.strided:
            return f"{name} is {tensor.layout}"
        if autocast and tensor.dtype not in DTYPE_NAMES:
            return f"{name} is {tensor.dtype}, which autocast leaves as it is"
    device = x.device
    for name, tensor in () if traced else others:
        if tensor is not None and (tensor.device != device or not (autocast or tensor.dtype is dtype)):
            return f"{name} is {tensor.dtype} on {tensor.device}, not {dtype} on {device}"
    return None


def bias_refusal(name: str, bias: Tensor | None, weight: Tensor) -> str | None:
    """Why the kernels do not take this bias, or None. torch broadcasts what it can; a kernel would read behind it."""
    if bias is None or bias.shape == weight.shape[:1]:
        return None
    return f"{name} {tuple(bias.shape)} is not the out_features of weight {tuple(weight.shape)}"


def _mode_refusal(device: torch.device, impl: str | None) -> str | None:
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


# This is what torch.compiler.assume_constant_result sets; a call of it would import torch._dynamo, and with it triton.
# The tracer runs a function so marked instead of tracing it, under the transforms that the traced program has begun.
_mode_refusal._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def cpu_refusal(device: torch.device) -> str | None:
    if device.type == "cpu" and not (has_triton() and gpu("launch").INTERPRETED):
        return "x is on the CPU, which triton reaches only under its interpreter (TRITON_INTERPRET=1)"
    return None


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


def batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for many, as the gradient does in a batched backward pass (is_grads_batched)."""
    return _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def launchable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a traced program may call the kernels for this dtype on this device. Looks at no shape.

    An exported one may not. That is asked here, outside of the trace: in torch 2.11 the compiler takes
    `torch.compiler.is_exporting()` to be true whenever it traces.
    """
    described = look_at(device)  # `describe` may warn, which is an error in a traced program
    usable = described.triton and planning.device_refusal(1, 1, 1, dtype_name(dtype), described) is None
    return usable and not torch.compiler.is_exporting()


launchable._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
