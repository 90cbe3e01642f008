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
from typing import NamedTuple, TypeVar, cast, overload

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from . import loop, reference
from . import plan as planning
from .activations import ACTIVATIONS
from .plan import Device, MlpPlan, Plan, Recipe, TrainPlan
from .reference import Maybe, Wanted

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # dx, dweight, dbias
Operand = TypeVar("Operand", Tensor, Tensor | None)
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
def _wide_launchers():
    from . import wide

    return wide


@functools.cache
def _mlp_launchers():
    from . import mlp

    return mlp


@functools.cache
def cpu_kind() -> str:
    """The first word of the CPU's name ("AMD", "Intel"), or "" where torch does not tell; "AMD Zen 5" and "Intel AMX"
    of their newer CPUs.

    MKL uses 256-bit vectors on AMD. From Zen 5 on, whose 512-bit units are of full width, oneDNN is twice as fast; on
    older ones it is not. Among AMD's CPUs with AVX-512, AVX-VNNI came with Zen 5. Intel's with AMX (4th generation Xeon
    and later) multiply bfloat16 many times as fast as the older ones.
    """
    try:
        found = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):
        return ""
    vendor = str(found.get("cpu_name", "")).partition(" ")[0]
    if vendor == "AMD" and found.get("avx512_f") and found.get("avx_vnni"):
        return "AMD Zen 5"
    return "Intel AMX" if vendor == "Intel" and found.get("amx_bf16") else vendor


@functools.cache
def _look_at(device: torch.device) -> Device:
    if device.type == "cuda" and torch.version.hip:
        return Device("ROCm")  # torch calls its GPUs by the same names
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        arch = 10 * properties.major + properties.minor
        return Device("cuda", arch, properties.multi_processor_count, triton=has_triton(), name=properties.name)
    return Device("cpu", 90, 1, cpu_kind()) if device.type == "cpu" else Device(device.type)


@functools.cache
def _describe(device: torch.device, interpreted: bool = False) -> Device:
    """What plans need to know of a device. Says once if it is a GPU that the kernels cannot use."""
    described = _look_at(device)
    if device.type == "cuda" and (reason := planning.refusal(1, 1, 1, "float32", described)):
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


_fp32_split: str | None = None


def allow_fp32_split(mode: str | None) -> str | None:
    """Lets wide layers compute fp32 products as several products of tensor cores; returns what was allowed.

    mode: "tf32x3" or "bf16x6" (errors like fp32's, three and six products), "bf16x3" (three products, some 16 bits) or
    None, the default: nothing but what torch's own setting says. A permission for this process, like torch's: taken
    where the kernels for wide layers apply (compute capability 9.0, rows that start at multiples of 16 bytes), forward
    and, inside a network, backward in all but dx of its input; nowhere else. The README's section on precision lists
    errors and what happens at the ends of fp32's range.
    Raises ValueError for any other mode.
    """
    global _fp32_split
    if mode is not None and mode not in planning.SPLITS:
        raise ValueError(f"mode must be None or one of {', '.join(map(repr, planning.SPLITS))}, not {mode!r}")
    before, _fp32_split = _fp32_split, mode
    return before


def _split(dtype: torch.dtype) -> str | None:
    return _fp32_split if dtype is torch.float32 else None


small_cpu_products: dict[torch.dtype, int] = {}  # filled on first use: multiply-adds below which plain torch wins


def small_cpu_product(dtype: torch.dtype) -> int:
    limit = small_cpu_products[dtype] = planning.cpu_small(_NAMES[dtype], cpu_kind()) if dtype in _NAMES else 1 << 62
    return limit


@functools.cache
def _few_cpu_outputs(dtype: torch.dtype) -> tuple[int, int]:
    return planning.cpu_few_outputs(_NAMES[dtype], cpu_kind()) if dtype in _NAMES else (1 << 62, 1 << 62)


def few_outputs(x: Tensor, features: int, outputs: int) -> bool:
    """Whether layers on a CPU have too few outputs, so many per row of `features`, for more than plain torch to pay."""
    return x.numel() * outputs < _few_cpu_outputs(x.dtype)[torch.is_grad_enabled()] * features


def few_bytes(x: Tensor, growth: float) -> bool:
    """Whether a GPU is done with a call before the host has prepared the next one.

    growth: in_features + out_features, the average over the layers, for each of the features of x.
    """
    return x.nbytes * growth < planning.LAUNCH_BOUND_BYTES[torch.is_grad_enabled()]


def launch_bound(x: Tensor, growth: float) -> bool:
    """Whether plain torch operations on a GPU cost least, since the host decides how long a call takes.

    Not on a stream other than the default one: there, CUDA graphs are captured and warmed up, and a graph that is
    replayed asks nothing of the host.
    """
    return x.is_cuda and few_bytes(x, growth) and torch._C._cuda_getCurrentRawStream(x.get_device()) == 0


def growth(widths: Sequence[int]) -> float:
    """As `few_bytes` wants it, of a network's widths."""
    return (2 * sum(widths) - widths[0] - widths[-1]) / (max(widths[0], 1) * (len(widths) - 1))


def plain_costs_least(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a network of these weights, which fit together, is too small for a plan to gain what it costs to find.

    False where tensors are on several devices: torch's product does not notice a weight on the meta device.
    """
    if x.is_cpu:
        small = small_cpu_products.get(x.dtype) or small_cpu_product(x.dtype)
        # Of the largest layer.
        few = x.numel() * max([weight.numel() for weight in weights]) < small * x.shape[-1]
        few = few or few_outputs(x, x.shape[-1], sum([weight.shape[0] for weight in weights]))
        return few and all([weight.is_cpu for weight in weights])
    return launch_bound(x, growth(_widths(weights))) and all([weight.device == x.device for weight in weights])


# --- what the kernels take ---------------------------------------------------------------------------------


def refusal(
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
    if reason := _kind_refusal(x, (("weight", weight), ("bias", bias)), dtype, autocast):
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


def _kind_refusal(
    x: Tensor, others: Sequence[tuple[str, Tensor | None]], dtype: torch.dtype, autocast: bool
) -> str | None:
    if dtype not in _NAMES:
        return f"x is {dtype}; the kernels take {', '.join(map(str, _NAMES))}"
    if x.device.type not in ("cpu", "cuda"):
        return f"no kernels for {x.device.type} devices"
    for name, tensor in (("x", x), *others):
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"{name} is a {type(tensor).__name__}, a subclass of Tensor with rules of its own"
        if tensor.layout is not torch.strided:
            return f"{name} is {tensor.layout}"
        if autocast and tensor.dtype not in _NAMES:
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


def check_operands(x: Tensor, weight: Tensor, bias: Tensor | None = None, autocast: bool = False) -> None:
    """Raises the ValueError that says what does not fit together; whether the bias does is `bias_refusal`'s question.

    autocast: the dtypes need not be the same.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be (out_features, in_features), not {tuple(weight.shape)}")
    # Not `if`: a size that the compiler does not know is checked when the program runs.
    torch._check_value(
        x.dim() > 0 and x.shape[-1] == weight.shape[1],
        lambda: f"x {tuple(x.shape)} does not end in the in_features of weight {tuple(weight.shape)}",
    )
    _check_alike("x", x, autocast, weight=weight, bias=bias)


def _check_alike(name: str, tensor: Tensor, autocast: bool = False, /, **others: Tensor | None) -> None:
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


def _mode_refusal(device: torch.device, impl: str | None) -> str | None:
    if _functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    if torch._C._len_torch_dispatch_stack():
        # Who counts operations, or decides which results to keep, is to see those of the unfused pair. torch.compile
        # steps aside for a mode too, so the registered ops need no rules of their own.
        return "a TorchDispatchMode is active"
    return _cpu_refusal(device) if impl == "triton" else None


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, and with it triton. The
# tracer runs such a function instead of tracing it, under the transforms that the traced program has begun by then.
_mode_refusal._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _cpu_refusal(device: torch.device) -> str | None:
    if device.type == "cpu" and not (has_triton() and _launchers().INTERPRETED):
        return "x is on the CPU, which triton reaches only under its interpreter (TRITON_INTERPRET=1)"
    return None


def launchable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a traced program may call the kernels for this dtype on this device. Looks at no shape.

    An exported one may not. That is asked here, outside of the trace: in torch 2.11 the compiler takes
    `torch.compiler.is_exporting()` to be true whenever it traces.
    """
    described = _look_at(device)  # in a traced program a warning would be an error
    usable = described.triton and planning.refusal(1, 1, 1, _NAMES.get(dtype, str(dtype)), described) is None
    return usable and not torch.compiler.is_exporting()


launchable._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


# --- the ops -----------------------------------------------------------------------------------------------


def _stored(tensor: Operand) -> Operand:
    """The tensor, or a copy if memory holds its negative, as that of `z.conj().imag` does: kernels read memory."""
    return tensor.resolve_neg() if tensor is not None and tensor.is_neg() else tensor


def _led(y: Tensor, shape: Sequence[int]) -> Tensor:
    """y (M, N) with the leading dimensions of a shape: no view, which autograd would let nobody write to."""
    return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[1]).data


def linear_act_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, impl: str | None) -> Tensor:
    """act(x @ weight.T + bias) for x (..., K), weight (N, K), bias (N,): (..., N), contiguous, in x's dtype."""
    if torch.compiler.is_compiling():
        return _registered.linear_act(x, weight, bias, activation, impl)
    n, k = weight.shape
    # Not -1: a size of 0 beside it would leave it undetermined.
    x2 = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), k)
    device = _device_for(x.device, impl)
    dtype = _NAMES.get(x.dtype, str(x.dtype))
    arguments = (x2.shape[0], k, n, dtype, _precision(device), device, impl, _split(x.dtype))
    plan = planning.linear_act_fwd(*arguments)
    # Looked at for wide layers alone: for small ones it would cost more than it decides.
    if plan.impl == "tma" and not (_wide_launchers().readable(x2) and _wide_launchers().readable(weight)):
        plan = planning.linear_act_fwd(*arguments, False)
    _obey(impl, plan)
    return _led(_layer_fwd(x2, weight, bias, activation, plan), x.shape)


def _layer_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, plan: Plan) -> Tensor:
    if plan.triton:
        x, weight, bias = _stored(x), _stored(weight), _stored(bias)
    implementation = _wide_launchers() if plan.impl == "tma" else _launchers() if plan.triton else reference
    return implementation.linear_act_fwd(x, weight, bias, activation, plan)


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
        gradients = _registered.linear_act_backward(dy, y, x, weight, activation, wanted, impl)
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
    implementation = reference
    if plan.triton:
        implementation = _launchers()
        dy, flat_y, x, weight = _stored(dy), _stored(flat_y), _stored(x), _stored(weight)
    dx, dweight, dbias = implementation.linear_act_bwd(dy, flat_y.contiguous(), x, weight, activation, wanted, plan)
    return dx if dx is None or y.dim() == 2 else dx.view(*y.shape[:-1], k), dweight, dbias


def _in_features(x: Tensor | None, weight: Tensor | None) -> int:
    # With neither, only dbias is wanted, and its cost does not depend on in_features.
    return weight.shape[1] if weight is not None else x.shape[-1] if x is not None else 1


def _obey(impl: str | None, plan: Plan | MlpPlan) -> None:
    if impl == "triton" and not plan.triton and plan.reason != planning.EMPTY:
        raise NotImplementedError(f'impl="triton": {plan.reason}')


def trains_plainly(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer on the CPU that wants gradients costs least as plain torch operations under autograd."""
    n, k = weight.shape
    rows, name = math.prod(x.shape[:-1]), _NAMES.get(x.dtype, str(x.dtype))
    return planning.linear_act_bwd(rows, k, n, name, "ieee", _describe(x.device), None).impl == "aten"


# --- whole networks ----------------------------------------------------------------------------------------


class MlpPlans(NamedTuple):
    """How a whole network runs. Either both directions run as a whole or neither does."""

    forward: MlpPlan
    backward: MlpPlan | None  # None: nobody wants gradients


@functools.lru_cache(maxsize=4096)
def _mlp_plans(
    rows: int,
    widths: tuple[int, ...],
    dtype: str,
    precision: str,
    device: Device,
    training: bool,
    loss: bool,
    impl: str | None,
    split: str | None,
) -> MlpPlans:
    arguments = (rows, widths, dtype, precision, device)
    if not training:
        return MlpPlans(planning.mlp_fwd(*arguments, False, loss, impl, split), None)
    backward = planning.mlp_bwd(*arguments, loss, impl, split)
    forward = planning.mlp_fwd(*arguments, bool(backward.boundaries), loss, impl, split)
    refused = next((plan for plan in (forward, backward) if plan.impl in ("layers", "aten")), None)
    return MlpPlans(refused, refused) if refused else MlpPlans(forward, backward)


def mlp_plans(
    x: Tensor, weights: Sequence[Tensor], training: bool, loss: bool = False, impl: str | None = None
) -> MlpPlans:
    """The plans for a network of these weights on x (..., K). training: gradients are wanted. loss: of a BCE head.

    Raises NotImplementedError where impl="triton" cannot be obeyed.
    """
    rows = x.shape[0] if x.dim() == 2 else math.prod(x.shape[:-1])
    device = _device_for(x.device, impl)
    name, widths = _NAMES.get(x.dtype, str(x.dtype)), _widths(weights)
    arguments = (rows, widths, name, _precision(device), device)
    plans = _mlp_plans(*arguments, training, loss, impl, _split(x.dtype))
    _obey(impl, plans.forward)
    return plans


def _widths(weights: Sequence[Tensor]) -> tuple[int, ...]:
    return (weights[0].shape[1], *(weight.shape[0] for weight in weights))


def _flat(x: Tensor) -> Tensor:
    return _stored(x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def _stacked_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, plan: Plan) -> Tensor:
    """A layer of a stack, planned by shapes alone: operands that TMA cannot read as they lie are copied."""
    if plan.impl == "tma":
        x, weight = map(_wide_launchers().as_readable, (x, weight))
    return _layer_fwd(x, weight, bias, activation, plan)


def _dense(
    weights: Sequence[Tensor], biases: Sequence[Tensor] | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Parameters as the kernels of whole networks read them."""
    dense = tuple(_stored(weight).contiguous() for weight in weights)
    return dense, None if biases is None else tuple(_stored(bias).contiguous() for bias in biases)


def mlp_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    hidden: str,
    output: str,
    plan: MlpPlan,
    save: tuple[int, ...] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, saved): y (..., N), and what `mlp_bwd` needs beside the arguments if `save` is its plan's boundaries.

    x (..., K), weights (N_l, K_l) each, biases (N_l,) each or None, of any strides. hidden, output: activations.
    """
    if plan.impl == "fused":
        y, saved = _mlp_launchers().mlp_fwd(_flat(x), *_dense(weights, biases), hidden, output, plan, save)
    elif plan.impl == "stack":
        y, saved = reference.mlp_fwd(_flat(x), weights, biases, hidden, output, plan, save, _stacked_fwd)
    else:
        y, saved = reference.mlp_fwd(_flat(x), weights, biases, hidden, output, plan, save)
    return _led(y, x.shape), saved


def mlp_bwd(
    dy: Tensor,
    x: Tensor | None,
    saved: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor] | None,
    hidden: str,
    output: str,
    wanted: Wanted,
    plan: MlpPlan,
) -> tuple[Tensor | None, Maybe, Maybe]:
    """(dx, dweights, dbiases) of `mlp_fwd` from dy (..., N) of any strides. What is not wanted is None.

    saved: what a "fused" plan has at its boundaries, and then x and all parameters too; of other plans the outputs of
    all layers, y (..., N) last, where None will do for what `reference.mlp_bwd` does not need.
    """
    options = (hidden, output, wanted, plan)
    flat_dy, flat_x = _flat(dy), None if x is None else _flat(x)
    if plan.impl == "fused":
        inputs = (cast(Tensor, flat_x), cast("tuple[Tensor, ...]", saved))
        parameters = _dense(cast(Sequence[Tensor], weights), biases)
        gradients = _mlp_launchers().mlp_bwd(flat_dy, *inputs, *parameters, *options)
    else:
        *hs, y = saved
        flat_y = None if y is None else _flat(y)
        if plan.impl == "stack":
            # Of an identity, kernels still ask y for its shape.
            hs = (*hs, flat_dy.contiguous() if flat_y is None else flat_y)
            gradients = _wide_launchers().mlp_bwd(flat_dy, flat_x, hs, tuple(map(_stored, weights)), *options)
        else:
            gradients = reference.mlp_bwd(flat_dy, flat_x, (*hs, flat_y), weights, biases, *options)
    dx, dweights, dbiases = gradients
    return None if dx is None else dx.view(*dy.shape[:-1], dx.shape[1]), dweights, dbiases


def mlp_bce_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    hidden: str,
    target: Tensor,
    pos_weight: Tensor | None,
    reduction: str,
    dtype: torch.dtype,
    plan: MlpPlan,
    save: tuple[int, ...] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(loss, saved): binary cross entropy from the logits of the last layer, in `dtype`, by a fused plan.

    target (..., N) and pos_weight (N,) or None: any strides and floating dtypes. reduction: "none", "mean", "sum".
    """
    head = (_flat(target), _stored(pos_weight), reduction, dtype)
    loss, saved = _mlp_launchers().mlp_bce_fwd(_flat(x), *_dense(weights, biases), hidden, *head, plan, save)
    return _led(loss, target.shape) if reduction == "none" else loss, saved


def mlp_bce_bwd(
    dloss: Tensor,
    x: Tensor,
    saved: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    hidden: str,
    target: Tensor,
    pos_weight: Tensor | None,
    reduction: str,
    wanted: Wanted,
    plan: MlpPlan,
) -> tuple[Tensor | None, Maybe, Maybe]:
    """(dx, dweights, dbiases) of `mlp_bce_fwd`; dloss has the shape of the loss."""
    options = (hidden, _flat(target), _stored(pos_weight), reduction, wanted, plan)
    dloss = _flat(dloss) if reduction == "none" else _stored(dloss)
    dx, dweights, dbiases = _mlp_launchers().mlp_bce_bwd(dloss, _flat(x), saved, *_dense(weights, biases), *options)
    return None if dx is None else dx.view(x.shape), dweights, dbiases


# --- explanations ------------------------------------------------------------------------------------------


class Explanation(NamedTuple):
    """The plans for one layer at one shape."""

    forward: Plan
    backward: Plan

    def __str__(self) -> str:
        return _listed(self._asdict())


class MlpExplanation(NamedTuple):
    """The plans for one network at one shape: forward without gradients, and both directions of a training step."""

    inference: MlpPlan
    forward: MlpPlan
    backward: MlpPlan

    def __str__(self) -> str:
        return _listed(self._asdict())


def _check_shape(name: str, shape: object) -> None:
    if not isinstance(shape, Sequence) or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"{name} must be a sequence of ints, not {shape!r}")
    if any(size < 0 for size in shape):
        raise ValueError(f"{name} must not be negative: {tuple(shape)}")


def _listed(plans: dict[str, Plan] | dict[str, MlpPlan]) -> str:
    return "\n".join(
        f"{name:9} {plan.impl:8}  {plan.reason}" + (f"\n{'':20}{plan.prediction}" if plan.prediction else "")
        for name, plan in plans.items()
    )


@overload
def explain(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    dtype: torch.dtype = ...,
    device: torch.device | str | Device = ...,
    *,
    impl: str | None = ...,
) -> Explanation: ...
@overload
def explain(
    x_shape: Sequence[int],
    weight_shape: Sequence[Sequence[int]],
    dtype: torch.dtype = ...,
    device: torch.device | str | Device = ...,
    *,
    impl: str | None = ...,
) -> MlpExplanation: ...
def explain(
    x_shape: Sequence[int],
    weight_shape: Sequence[int] | Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | Device = "cpu",
    *,
    impl: str | None = None,
) -> Explanation | MlpExplanation:
    """Which implementation a layer or a network takes, with its tiles and the reason. Launches nothing.

    Where eager calls on the default stream of a GPU take plain torch, because the host would be what they wait for, the
    reason says so; what is named is what CUDA graphs, torch.compile and impl="triton" run.

    Plans for GPUs carry a `prediction`, which `print` shows too: the time that the plan's flops and bytes take at an
    H200's peak rates with sigmoids, and the least that any plan could take (the model: `predict`, `predict_bwd` and
    `predict_mlp` in plan.py).

    x_shape: (..., in_features). weight_shape: (out_features, in_features) of a layer, or a sequence of such pairs, one
    per layer of a network. device: where the tensors would be, or a `Device` that describes a chip which is not at
    hand, as in `Device("cuda", arch=90, units=132, triton=True)`. Raises ValueError for shapes that do not fit and an
    unknown impl or device, TypeError for what is no shape or no dtype, NotImplementedError where a call would.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, not {impl!r}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, not {dtype!r}")
    network = isinstance(weight_shape, Sequence) and len(weight_shape) > 0 and not isinstance(weight_shape[0], int)
    _check_shape("x_shape", x_shape)
    for shape in cast(Sequence[Sequence[int]], weight_shape if network else [weight_shape]):
        _check_shape("weight_shape", shape)
    shapes = [tuple(cast(Sequence[int], shape)) for shape in (weight_shape if network else [weight_shape])]
    features = x_shape[-1] if x_shape else None
    for shape in shapes:
        if len(shape) != 2 or shape[1] != features:
            raise ValueError(f"weight_shape {tuple(weight_shape)} does not fit x_shape {tuple(x_shape)}")
        features = shape[0]
    if not isinstance(device, Device):
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device {device!r}: {error}") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {str(device)!r} is not at hand; describe it with perceptriton.kernels.Device")
        if impl == "triton" and (reason := _cpu_refusal(device)):
            raise NotImplementedError(f'impl="triton": {reason}')
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # another one the next time, perhaps
        device = _device_for(device, impl)
    rows, name, precision = math.prod(x_shape[:-1]), _NAMES.get(dtype, str(dtype)), _precision(device)
    # Of operands that lie dense.
    layers = [
        (rows, k, n, name, precision, device, impl, _split(dtype), k * dtype.itemsize % 16 == 0) for n, k in shapes
    ]
    forwards = tuple(planning.linear_act_fwd(*arguments) for arguments in layers)
    backwards = tuple(planning.linear_act_bwd(*arguments[:7]) for arguments in layers)
    widths = (shapes[0][1], *(n for n, _ in shapes))
    if network:
        arguments = (rows, widths, name, precision, device)
        inference, (forward, backward) = (
            _mlp_plans(*arguments, training, False, impl, _split(dtype)) for training in (False, True)
        )
        explanation = MlpExplanation(inference.forward, forward, cast(MlpPlan, backward))
    else:
        explanation = Explanation(forwards[0], backwards[0])
    _obey(impl, explanation.forward)
    if device.kind != "cuda" or planning.refusal(rows, min(widths), 1, name, device):
        return explanation
    nbytes = rows * widths[0] * dtype.itemsize * growth(widths)

    def replace(plan, prediction):
        note = planning.launch_note(nbytes, plan is explanation[-1]) if impl is None else ""
        return dataclasses.replace(plan, reason=plan.reason + note, prediction=prediction)

    if isinstance(explanation, Explanation):
        (k, n), (forward, backward) = widths, explanation
        return Explanation(
            replace(forward, prediction=planning.predict(rows, k, n, name, forward)),
            replace(backward, prediction=planning.predict_bwd(rows, k, n, name, backward)),
        )
    inference, forward, backward = explanation
    shape = (rows, widths, name)
    stored = backward.boundaries
    return MlpExplanation(
        replace(inference, prediction=planning.predict_mlp(*shape, inference, forwards)),
        replace(forward, prediction=planning.predict_mlp(*shape, forward, forwards, boundaries=stored)),
        replace(backward, prediction=planning.predict_mlp(*shape, backward, backwards, backward=True)),
    )


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
    kernels = impl in ("lane", "block")
    if kernels and (reason := _cpu_refusal(device)):
        raise NotImplementedError(f"impl={impl!r}: {reason}")
    described = _describe(device, kernels and device.type == "cpu")
    plan = planning.train(members, samples, batch_size, recipe, _NAMES.get(dtype, str(dtype)), described, impl)
    if impl is not None and plan.impl != impl:
        raise NotImplementedError(f"impl={impl!r}: {plan.reason}")
    return plan


def training_loop(plan: TrainPlan) -> "type[loop.Loop]":
    """The implementation of the plan; the others have the signatures of `loop.Loop`."""
    return loop.Loop if plan.impl in ("torch", "graph") else _training_launchers().Loop


# --- registration: what torch.compile calls -------------------------------------------------------------------

# "perceptriton", or the name under which a copy of the package was imported: each copy registers ops of its own.
NAMESPACE = "_".join(__name__.split(".")[:-2])

_library = torch.library.Library(NAMESPACE, "DEF")
_registered = getattr(torch.ops, NAMESPACE)
_library.define("linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, str? impl) -> Tensor")
_library.define(
    "linear_act_backward(Tensor dy, Tensor y, Tensor? x, Tensor? weight, str activation, bool[3] wanted, str? impl)"
    " -> (Tensor, Tensor, Tensor)"
)


def _check_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_operands(x, weight, bias)
    if reason := bias_refusal("bias", bias, weight):
        raise ValueError(reason)


def _check_backward(dy: Tensor, y: Tensor, x: Tensor | None, weight: Tensor | None, wanted: Sequence[bool]) -> None:
    if dy.shape != y.shape:
        raise ValueError(f"dy {tuple(dy.shape)} has not the shape of y {tuple(y.shape)}")
    for name, tensor, want in (("weight", weight, wanted[0]), ("x", x, wanted[1])):
        if want and tensor is None:
            raise ValueError(f"{name} is None, but wanted {list(wanted)}")
    if weight is not None and (weight.dim() != 2 or weight.shape[0] != y.shape[-1]):
        raise ValueError(f"weight {tuple(weight.shape)} does not give the features of y {tuple(y.shape)}")
    if x is not None and x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"x {tuple(x.shape)} has not the rows of y {tuple(y.shape)}")
    _check_alike("y", y, dy=dy, x=x, weight=weight)
    if x is not None and weight is not None:
        check_operands(x, weight)


def _linear_act(x, weight, bias, activation, impl):
    _check_forward(x, weight, bias)
    return linear_act_fwd(x, weight, bias, activation, impl)


def _linear_act_backward(dy, y, x, weight, activation, wanted, impl):
    _check_backward(dy, y, x, weight, wanted)
    return _tensors(y, linear_act_bwd(dy, y, x, weight, activation, tuple(wanted), impl))


def _tensors(y: Tensor, gradients: Gradients) -> tuple[Tensor, ...]:
    # A registered op returns tensors: an empty one stands for a gradient that nobody wants.
    return tuple(y.new_empty(0) if g is None else g for g in gradients)


_library.impl("linear_act", _linear_act, "CompositeExplicitAutograd")
_library.impl("linear_act_backward", _linear_act_backward, "CompositeExplicitAutograd")


def _batched_linear_act(x, weight, bias, activation, impl):
    return ACTIVATIONS[activation].forward(torch.nn.functional.linear(x, weight, bias))


def _batched_linear_act_backward(dy, y, x, weight, activation, wanted, impl):
    return _tensors(y, reference.linear_act_double(dy, y, x, weight, activation, tuple(wanted)))


# torch.vmap would call an op without a rule once for each member: torch has rules for plain operations.
for _key in ("FuncTorchBatched", "Batched"):  # the second: torch.autograd.grad(..., is_grads_batched=True)
    _library.impl("linear_act", _batched_linear_act, _key)
    _library.impl("linear_act_backward", _batched_linear_act_backward, _key)


@torch.library.register_fake(f"{NAMESPACE}::linear_act", lib=_library)
def _(x, weight, bias, activation, impl):
    _check_forward(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake(f"{NAMESPACE}::linear_act_backward", lib=_library)
def _(dy, y, x, weight, activation, wanted, impl):
    _check_backward(dy, y, x, weight, wanted)
    k, n = _in_features(x, weight), y.shape[-1]
    shapes = ((*y.shape[:-1], k), (n, k), (n,))
    return tuple(y.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))
