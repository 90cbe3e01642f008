"""Differentiable functions over the kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import ops, reference
from ..kernels.activations import ACTIVATIONS

__all__ = ["linear_act", "linear_sigmoid"]


class LinearActFunction(torch.autograd.Function):
    # The ctx style costs a third of what setup_context costs; torch.func transforms never come here.

    @staticmethod
    def forward(ctx, x, weight, bias, activation, impl):
        y = ops.linear_act_fwd(x, weight, bias, activation, impl)
        need_dx, need_dweight, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            x if need_dweight else None, weight if need_dx else None, None if activation == "identity" else y
        )
        ctx.activation, ctx.impl = activation, impl
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, y = ctx.saved_tensors
        if y is None:
            y = dy  # identity: its derivative asks for a shape only
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph: gradients that can themselves be differentiated, exact to any order.
            gradients = reference.linear_act_double(dy, y, x, weight, ctx.activation, wanted)
        elif torch.is_autocast_enabled(dy.device.type):
            # The products keep the dtype of the forward pass even if backward() runs under autocast.
            with torch.autocast(dy.device.type, enabled=False):
                gradients = ops.linear_act_bwd(dy, y, x, weight, ctx.activation, wanted, ctx.impl)
        else:
            gradients = ops.linear_act_bwd(dy, y, x, weight, ctx.activation, wanted, ctx.impl)
        return *gradients, None, None


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "sigmoid", *, impl: str | None = None
) -> Tensor:
    """act(x @ weight.T + bias), differentiable to any order.

    x: (..., in_features), any strides. weight: (out_features, in_features). bias: (out_features,) or None.
    activation: "sigmoid", "tanh", "relu" or "identity". Returns (..., out_features), contiguous.

    float32, bfloat16 and float16 run fused; under autocast the result has autocast's dtype, as that of `F.linear`
    has. Everything else that torch can multiply (float64, tensor subclasses, torch.func transforms, forward-mode
    duals, export) runs as `F.linear` and the activation.

    impl: None chooses by shape (`perceptriton.kernels.explain` says what and why); "triton" and "torch" are obeyed,
    or refused with NotImplementedError and the reason. CPU tensors reach triton only under its interpreter.

    The backward pass uses the saved output, as torch does: sigmoid' = y (1 - y), tanh' = 1 - y^2. In bfloat16 and
    float16, y rounds to 1 from z = 6.2 and z = 8.3 on, and the gradient is 0 from there.

    Raises ValueError for shapes, dtypes and devices that do not fit and for an unknown activation or impl, TypeError
    for arguments that are no tensors; the message names the argument and both values.
    """
    if torch.compiler.is_compiling():
        return _traced(x, weight, bias, activation, impl)
    try:
        if impl is None and x.is_cpu:
            small = ops.small_cpu_products.get(x.dtype) or ops.small_cpu_product(x.dtype)
            if x.numel() * weight.shape[0] < small:
                return ACTIVATIONS[activation].forward(F.linear(x, weight, bias))
        return _planned(x, weight, bias, activation, impl)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        _check(x, weight, bias, activation, impl)
        raise


def linear_sigmoid(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """sigmoid(x @ weight.T + bias); see `linear_act`."""
    return linear_act(x, weight, bias, "sigmoid", impl=impl)


def _product_dtype(x: Tensor) -> tuple[torch.dtype, bool]:
    """The dtype in which torch would multiply x, and whether that is autocast's."""
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind), True
    return x.dtype, False


def _planned(x, weight, bias, activation, impl):
    if activation not in ACTIVATIONS or impl not in ops.IMPLS:
        raise ValueError
    dtype, autocast = _product_dtype(x)
    if refused := ops.refusal(x, weight, bias, dtype, autocast, impl):
        if impl == "triton":
            _check(x, weight, bias, activation, impl)
            raise NotImplementedError(f'impl="triton": {refused}')
        return ACTIVATIONS[activation].forward(F.linear(x, weight, bias))
    if autocast:
        # Cast here, not inside the Function, so that the casts are differentiated and gradients keep their dtypes.
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        if impl is None and x.is_cpu and ops.trains_plainly(x, weight):
            # In place: autograd keeps y, not z, and a fresh large tensor costs more than the sigmoid.
            return ACTIVATIONS[activation].forward_(F.linear(x, weight, bias))
        return LinearActFunction.apply(x, weight, bias, activation, impl)
    return ops.linear_act_fwd(x, weight, bias, activation, impl)


def _traced(x, weight, bias, activation, impl):
    # Nothing here looks at a size, so that a dynamic batch compiles once. On the CPU and under export plain
    # operations are traced: the compiler fuses them, and an exported graph needs no op of ours.
    dtype, autocast = _product_dtype(x)
    if impl == "triton" or (
        impl is None and x.is_cuda and not torch.compiler.is_exporting() and ops.launchable(x.device, dtype)
    ):
        if autocast:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return LinearActFunction.apply(x, weight, bias, activation, impl)
    return ACTIVATIONS[activation].forward(F.linear(x, weight, bias))


def _check(x, weight, bias, activation, impl) -> None:
    """Raises the error that says what is wrong with the arguments of `linear_act`, if anything is."""
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}") from None
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}") from None
    if impl not in ops.IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, ops.IMPLS))}, not {impl!r}") from None
    if weight.dim() != 2:
        raise ValueError(f"weight must be (out_features, in_features), not {tuple(weight.shape)}") from None
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} does not end in the in_features of weight {tuple(weight.shape)}"
        ) from None
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} is not the out_features of weight {tuple(weight.shape)}") from None
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x on {x.device}") from None
        if tensor.dtype != x.dtype and not _product_dtype(x)[1]:
            raise ValueError(f"{name} is {tensor.dtype}, but x {x.dtype}") from None
