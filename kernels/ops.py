"""The door to the kernels: describes devices, makes plans, flattens leading dimensions, runs what was chosen.

Below it nothing is checked again. Layers ask `refusal` first; it names what keeps a call from the kernels.
"""

import dataclasses
import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from . import loop, reference
from . import plan as planning
from .plan import Device, Plan, Recipe, TrainPlan

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # dx, dweight, dbias
IMPLS = (None, "triton", "torch")
TRAIN_IMPLS = (None, "lane", "block", "graph", "torch")

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


# --- devices -----------------------------------------------------------------------------------------------


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _launchers():
    from . import linear  # the first use of a kernel imports triton

    return linear


@functools.cache
def cpu_vendor() -> str:
    """The first word of the CPU's name ("AMD", "Intel"), or "" where torch does not tell."""
    try:
        return str(torch.cpu.get_capabilities().get("cpu_name", "")).partition(" ")[0]
    except (AttributeError, RuntimeError):
        return ""


@functools.cache
def _look_at(device: torch.device) -> Device:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        arch = 10 * properties.major + properties.minor
        return Device("cuda", arch, properties.multi_processor_count, triton=has_triton())
    return Device("cpu", 90, 1, cpu_vendor()) if device.type == "cpu" else Device(device.type)


@functools.cache
def _describe(device: torch.device, interpreted: bool = False) -> Device:
    """What plans need to know of a device. Says once if it is a GPU that the kernels cannot use."""
    described = _look_at(device)
    if described.kind == "cuda" and (reason := planning.refusal(1, 1, 1, "float32", described)):
        warnings.warn(f"perceptriton runs as plain torch on {device}: {reason}", stacklevel=2)
    return dataclasses.replace(described, triton=True) if interpreted else described


def _device_for(device: torch.device, impl: str | None) -> Device:
    # CPU tensors reach the kernels only when asked for, and only under triton's interpreter.
    return _describe(device, device.type == "cpu" and impl == "triton" and _launchers().INTERPRETED)


def _precision(device: Device) -> str:
    """How fp32 products are to be computed, from torch's setting at the time of the call."""
    if device.kind != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


small_cpu_products: dict[torch.dtype, int] = {}  # filled on first use: multiply-adds below which plain torch wins


def small_cpu_product(dtype: torch.dtype) -> int:
    limit = small_cpu_products[dtype] = planning.cpu_small(_NAMES[dtype], cpu_vendor()) if dtype in _NAMES else 1 << 62
    return limit


# --- what the kernels take ---------------------------------------------------------------------------------


def refusal(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, autocast: bool, impl: str | None
) -> str | None:
    """Why this call is left to plain torch operations (which may in turn raise), or None.

    dtype: what the product is computed in: that of x, or autocast's.
    """
    device = x.device
    if dtype not in _NAMES:
        return f"x is {dtype}; the kernels take {', '.join(map(str, _NAMES))}"
    if device.type not in ("cpu", "cuda"):
        return f"no kernels for {device.type} devices"
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"{name} is a {type(tensor).__name__}, a subclass of Tensor with rules of its own"
        if tensor.layout is not torch.strided:
            return f"{name} is {tensor.layout}"
        if tensor.device != device or not (tensor.dtype is dtype or (autocast and tensor.dtype in _NAMES)):
            return f"{name} is {tensor.dtype} on {tensor.device}, not {dtype} on {device}"
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"bias {tuple(bias.shape)} is not ({weight.shape[0]},)"
    if _functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    return _cpu_refusal(device) if impl == "triton" else None


def _cpu_refusal(device: torch.device) -> str | None:
    if device.type == "cpu" and not (has_triton() and _launchers().INTERPRETED):
        return "x is on the CPU, which triton reaches only under its interpreter (TRITON_INTERPRET=1)"
    return None


def launchable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a traced program may call the kernels for this dtype on this device. Looks at no shape."""
    described = _look_at(device)  # in a traced program a warning would be an error
    return described.triton and described.arch >= 80 and dtype in _NAMES


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, and with it triton.
launchable._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


# --- the ops -----------------------------------------------------------------------------------------------


def linear_act_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, impl: str | None) -> Tensor:
    """act(x @ weight.T + bias) for x (..., K), weight (N, K), bias (N,): (..., N), contiguous, in x's dtype."""
    if torch.compiler.is_compiling():
        return torch.ops.perceptriton.linear_act(x, weight, bias, activation, impl)
    n, k = weight.shape
    # Not -1: a size of 0 beside it would leave it undetermined.
    x2 = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), k)
    device = _device_for(x.device, impl)
    plan = planning.linear_act_fwd(
        x2.shape[0], k, n, _NAMES.get(x.dtype, str(x.dtype)), _precision(device), device, impl
    )
    _obey(impl, plan)
    implementation = _launchers() if plan.triton else reference
    y = implementation.linear_act_fwd(x2, weight, bias, activation, plan)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def linear_act_bwd(
    dy: Tensor,
    y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    activation: str,
    wanted: tuple[bool, bool, bool],
    impl: str | None,
) -> Gradients:
    """(dx, dweight, dbias) of `linear_act_fwd` from its output y and the gradient dy, (..., N) each.

    A gradient that is not wanted is None. x may be None if dweight is not wanted, weight if dx is not.
    """
    if torch.compiler.is_compiling():
        gradients = torch.ops.perceptriton.linear_act_backward(dy, y, x, weight, activation, wanted, impl)
        dx, dweight, dbias = (g if want else None for g, want in zip(gradients, wanted, strict=True))
        return dx, dweight, dbias
    n = y.shape[-1]
    k = _in_features(x, weight)
    if y.dim() != 2:
        rows = math.prod(y.shape[:-1])
        dy, flat_y, x = dy.reshape(rows, n), y.reshape(rows, n), None if x is None else x.reshape(rows, k)
    else:
        rows, flat_y = y.shape[0], y
    device = _device_for(y.device, impl)
    plan = planning.linear_act_bwd(rows, k, n, _NAMES.get(y.dtype, str(y.dtype)), _precision(device), device, impl)
    implementation = _launchers() if plan.triton else reference
    dx, dweight, dbias = implementation.linear_act_bwd(dy, flat_y.contiguous(), x, weight, activation, wanted, plan)
    return dx if dx is None or y.dim() == 2 else dx.view(*y.shape[:-1], k), dweight, dbias


def _in_features(x: Tensor | None, weight: Tensor | None) -> int:
    # With neither, only dbias is wanted, and its cost does not depend on in_features.
    return weight.shape[1] if weight is not None else x.shape[-1] if x is not None else 1


def _obey(impl: str | None, plan: Plan) -> None:
    if impl == "triton" and not plan.triton and plan.reason != planning.EMPTY:
        raise NotImplementedError(f'impl="triton": {plan.reason}')


def trains_plainly(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer on the CPU that wants gradients costs least as plain torch operations under autograd."""
    n, k = weight.shape
    rows, name = math.prod(x.shape[:-1]), _NAMES.get(x.dtype, str(x.dtype))
    return planning.linear_act_bwd(rows, k, n, name, "ieee", _describe(x.device), None).impl == "aten"


class Explanation(NamedTuple):
    """The plans for one layer at one shape."""

    forward: Plan
    backward: Plan

    def __str__(self) -> str:
        return "\n".join(f"{name:8}  {plan.impl:8}  {plan.reason}" for name, plan in self._asdict().items())


def explain(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | Device = "cpu",
    *,
    impl: str | None = None,
) -> Explanation:
    """Which implementation a linear + activation layer takes, with its tile and the reason. Launches nothing.

    x_shape: (..., in_features). weight_shape: (out_features, in_features). device: where the tensors would be, or a
    `Device` that describes a chip which is not at hand, as in `Device("cuda", arch=90, units=132, triton=True)`.
    Raises ValueError for shapes that do not fit and an unknown impl, NotImplementedError where a call would.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, not {impl!r}")
    if len(weight_shape) != 2 or not x_shape or x_shape[-1] != weight_shape[1]:
        raise ValueError(f"weight_shape {tuple(weight_shape)} does not fit x_shape {tuple(x_shape)}")
    if not isinstance(device, Device):
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {str(device)!r} is not at hand; describe it with perceptriton.kernels.Device")
        if impl == "triton" and (reason := _cpu_refusal(device)):
            raise NotImplementedError(f'impl="triton": {reason}')
        device = _device_for(device, impl)
    n, k = weight_shape
    arguments = (math.prod(x_shape[:-1]), k, n, _NAMES.get(dtype, str(dtype)), _precision(device), device, impl)
    explanation = Explanation(planning.linear_act_fwd(*arguments), planning.linear_act_bwd(*arguments))
    _obey(impl, explanation.forward)
    return explanation


# --- whole training loops ------------------------------------------------------------------------------------


@functools.cache
def _training_launchers():
    return importlib.import_module(".training", __package__)  # imports triton, as `linear` does


def plan_train(
    members: int,
    samples: int,
    batch_size: int | None,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    impl: str | None = None,
) -> TrainPlan:
    """Which implementation trains `members` networks on `samples` samples each, and why. batch_size: None for all.

    Raises NotImplementedError with the reason where `impl` cannot be obeyed.
    """
    if impl == "graph":
        raise NotImplementedError('impl="graph": no captured training step yet')
    kernels = impl in ("lane", "block")
    if kernels and (reason := _cpu_refusal(device)):
        raise NotImplementedError(f"impl={impl!r}: {reason}")
    described = _describe(device, kernels and device.type == "cpu")
    plan = planning.train(members, samples, batch_size, recipe, _NAMES.get(dtype, str(dtype)), described, impl)
    if impl is not None and plan.impl != impl:
        raise NotImplementedError(f"impl={impl!r}: {plan.reason}")
    return plan


def train(
    recipe: Recipe,
    parameters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    lr: Tensor,
    x: Tensor,
    y: Tensor,
    order: Tensor | None,
    batch_size: int,
    start: int,
    taken: int,
    steps: int,
    log_every: int,
    losses: Tensor,
    plan: TrainPlan,
) -> None:
    """Takes `steps` training steps by the implementation of the plan; see `loop.train` for the arguments."""
    implementation = loop if plan.impl == "torch" else _training_launchers()
    implementation.train(
        recipe,
        parameters,
        first,
        second,
        lr,
        x,
        y,
        order,
        batch_size,
        start,
        taken,
        steps,
        log_every,
        losses,
        plan,
    )


# --- registration: what torch.compile calls -------------------------------------------------------------------

_library = torch.library.Library("perceptriton", "DEF")
_library.define("linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, str? impl) -> Tensor")
_library.define(
    "linear_act_backward(Tensor dy, Tensor y, Tensor? x, Tensor? weight, str activation, bool[3] wanted, str? impl)"
    " -> (Tensor, Tensor, Tensor)"
)


def _linear_act_backward(dy, y, x, weight, activation, wanted, impl):
    gradients = linear_act_bwd(dy, y, x, weight, activation, tuple(wanted), impl)
    # A registered op returns tensors: an empty one stands for a gradient that nobody wants.
    return tuple(y.new_empty(0) if g is None else g for g in gradients)


_library.impl("linear_act", linear_act_fwd, "CompositeExplicitAutograd")
_library.impl("linear_act_backward", _linear_act_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("perceptriton::linear_act", lib=_library)
def _(x, weight, bias, activation, impl):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("perceptriton::linear_act_backward", lib=_library)
def _(dy, y, x, weight, activation, wanted, impl):
    k, n = _in_features(x, weight), y.shape[-1]
    shapes = ((*y.shape[:-1], k), (n, k), (n,))
    return tuple(y.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))
