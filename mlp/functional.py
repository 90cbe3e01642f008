"""Differentiable functions over the kernels."""

import contextlib
from collections.abc import Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from ..kernels import eligibility, ops, reference
from ..kernels.activations import ACTIVATIONS
from ..kernels.crossover import launch_bound
from ..kernels.records import IMPLS, NotCompiledError

__all__ = ["linear_act", "linear_sigmoid", "linear_sigmoid_bce", "mlp_act", "mlp_sigmoid_bce"]

REDUCTIONS = ("none", "mean", "sum")


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
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or eligibility.batched(dy)):
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
    has. Everything else that torch can multiply (float64, a bias to broadcast, tensor subclasses, torch.func
    transforms, forward-mode duals, dispatch modes, export) runs as `F.linear` and the activation, compiled or not.

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
        # torch's product does not notice a weight on the meta device, and reads memory that is not the weight's.
        if impl is None and (weight.is_cpu if x.is_cpu else weight.device == x.device):
            n, k = weight.shape
            if ops.prefers_torch(x, (k, n)):
                return ACTIVATIONS[activation].forward(F.linear(x, weight, bias))
        return _planned(x, weight, bias, activation, impl)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        if _captured_cold(error, x, (weight,), impl) or _symbolic(x, (activation,), impl):
            return _plain(x, (weight,), None if bias is None else (bias,), activation, activation)
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
    if activation not in ACTIVATIONS or impl not in IMPLS:
        raise ValueError
    dtype, autocast = _product_dtype(x)
    if refused := eligibility.refusal(x, weight, bias, dtype, autocast, impl):
        if impl == "triton":
            _check(x, weight, bias, activation, impl)
            raise NotImplementedError(f'impl="triton": {refused}')
        if weight.device != x.device:
            raise ValueError
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
    # Nothing here looks at the number of rows, so that a dynamic batch compiles once. On the CPU and under export plain
    # operations are traced: the compiler fuses them, and an exported graph needs no op of ours.
    tensors = all(isinstance(tensor, Tensor) for tensor in ((x, weight) if bias is None else (x, weight, bias)))
    if not tensors or activation not in ACTIVATIONS or impl not in IMPLS:
        _check(x, weight, bias, activation, impl)
    dtype, autocast = _product_dtype(x)
    if refused := eligibility.traced_refusal(x, weight, bias, dtype, autocast, impl):
        if impl == "triton":
            raise NotImplementedError(f'impl="triton": {refused}')
        return ACTIVATIONS[activation].forward(F.linear(x, weight, bias))
    if autocast:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return LinearActFunction.apply(x, weight, bias, activation, impl)


def _captured_cold(error: Exception, x, weights, impl) -> bool:
    """Whether the kernels of a CUDA graph being captured are missing because eager calls of this size need none.

    A caller who has warmed up on the default stream has done all that `torch.nn` asks for.
    """
    cold = isinstance(error, NotCompiledError) and impl is None
    widths = (x.shape[-1], *(weight.shape[0] for weight in weights))
    return cold and launch_bound(x.nbytes, widths, torch.is_grad_enabled())


def _symbolic(x, activations, impl) -> bool:
    """Whether x is a symbol that torch.fx traces with, which has no shape to plan with or to check."""
    if not isinstance(x, torch.fx.Proxy):
        return False
    if impl not in IMPLS or not all(act in ACTIVATIONS for act in activations):
        return False
    if impl == "triton":
        raise NotImplementedError('impl="triton": torch.fx is tracing') from None
    return True


def _check(x, weight, bias, activation, impl) -> None:
    """Raises the error that says what is wrong with the arguments of `linear_act`, if anything is."""
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}") from None
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}") from None
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, not {impl!r}") from None
    try:
        eligibility.check_operands(x, weight, bias, _product_dtype(x)[1])
    except ValueError as error:
        raise error from None
    # torch broadcasts one value or one row always, others if they happen to fit the rows.
    always = ((), (1,), (1, 1), (1, weight.shape[0]))
    if (
        bias is not None
        and tuple(bias.shape) not in always
        and (reason := eligibility.bias_refusal("bias", bias, weight))
    ):
        raise ValueError(reason) from None
    if impl != "triton" and not (x.is_floating_point() and x.dtype.itemsize > 1):
        raise ValueError(f"x is {x.dtype}, for which torch has no product or no {activation}") from None


# --- whole networks ----------------------------------------------------------------------------------------


class MlpFunction(torch.autograd.Function):
    """A network that keeps the outputs of its layers.

    Those of hidden layers are outputs of the node too, for gradients of gradients to come back through; none goes out.
    """

    @staticmethod
    def forward(ctx, x, hidden, output, plans, layers, *parameters):
        weights, biases = _split(parameters, layers)
        ctx.wanted = _flags((ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]), layers)
        ctx.hidden, ctx.output, ctx.plan, ctx.shape, ctx.kind = hidden, output, plans.backward, x.shape, x.device.type
        ctx.set_materialize_grads(False)
        need_dx, need_dweights, _ = ctx.wanted
        first = reference.first_wanted(ctx.wanted)
        save = tuple(l for l in range(1, layers) if l > first or (l == first and need_dweights[l]))
        y, hs = ops.mlp_fwd(x, weights, biases, hidden, output, plans.forward, save)
        ctx.save_for_backward(
            x if need_dweights[0] else None,
            *(weight if l > first or need_dx else None for l, weight in enumerate(weights)),
            *(None,) * (layers - 1 - len(hs)),
            *hs,
            None if output == "identity" else y,
        )
        return y, *hs

    @staticmethod
    def backward(ctx, dy, *dhs):  # pyright: ignore[reportIncompatibleMethodOverride]
        layers = len(ctx.wanted[1])
        # Read once: under activation checkpointing a second look finds nothing.
        x, *tensors = ctx.saved_tensors
        weights, saved = tensors[:layers], tensors[layers:]
        options = (ctx.hidden, ctx.output, ctx.wanted)
        others = any(dh is not None for dh in dhs)
        with _without_autocast(ctx.kind):
            if dy is None or others or torch.is_grad_enabled() or eligibility.batched(dy):
                # create_graph: gradients that can themselves be differentiated, exact to any order.
                upstream = (*(None,) * (layers - 1 - len(dhs)), *dhs, dy)
                dx, dweights, dbiases = reference.mlp_double(upstream, x, saved, weights, *options)
                dx = None if dx is None else dx.reshape(ctx.shape)
            else:
                dx, dweights, dbiases = ops.mlp_bwd(dy, x, saved, weights, None, *options, ctx.plan)
        return (dx, *(None,) * 4, *dweights, *dbiases)[: len(ctx.needs_input_grad)]


class FusedMlpFunction(torch.autograd.Function):
    """A network in kernels that compute the activations once more on the way back: for that they need every input."""

    @staticmethod
    def forward(ctx, x, hidden, output, plans, layers, *parameters):
        ctx.hidden, ctx.output, ctx.plan, ctx.layers = hidden, output, plans.backward, layers
        weights, biases = _split(parameters, layers)
        y, saved = ops.mlp_fwd(x, weights, biases, hidden, output, plans.forward, plans.backward.boundaries)
        ctx.save_for_backward(x, *parameters, *saved)
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, saved, wanted = _saved(ctx, 5)
        x, *parameters = inputs
        weights, biases = _split(parameters, ctx.layers)
        with _without_autocast(dy.device.type):
            if torch.is_grad_enabled() or eligibility.batched(dy):

                def network(x, *parameters):
                    return _plain(x, *_split(parameters, ctx.layers), ctx.hidden, ctx.output)

                gradients = _double(network, inputs, wanted, dy)
            else:
                flags = _flags(wanted, ctx.layers)
                of = ops.mlp_bwd(dy, x, saved, weights, biases, ctx.hidden, ctx.output, flags, ctx.plan)
                gradients = (of[0], *of[1], *of[2])[: len(inputs)]
        return gradients[0], *(None,) * 4, *gradients[1:]


class MlpBceFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, pos_weight, reduction, dtype, hidden, plans, layers, *parameters):
        ctx.reduction, ctx.hidden, ctx.plan, ctx.layers = reduction, hidden, plans.backward, layers
        weights, biases = _split(parameters, layers)
        head = (target, pos_weight, reduction, dtype)
        loss, saved = ops.mlp_bce_fwd(x, weights, biases, hidden, *head, plans.forward, plans.backward.boundaries)
        ctx.save_for_backward(x, *parameters, target, pos_weight, *saved)
        return loss

    @staticmethod
    def backward(ctx, dloss):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, (target, pos_weight, *rest), wanted = _saved(ctx, 8)
        saved = tuple(rest)
        x, *parameters = inputs
        weights, biases = _split(parameters, ctx.layers)
        head = (target, pos_weight, ctx.reduction)
        with _without_autocast(dloss.device.type):
            if torch.is_grad_enabled() or eligibility.batched(dloss):

                def loss(x, *parameters):
                    return _bce(_plain(x, *_split(parameters, ctx.layers), ctx.hidden, "identity"), *head)

                gradients = _double(loss, inputs, wanted, dloss)
            else:
                flags = _flags(wanted, ctx.layers)
                of = ops.mlp_bce_bwd(dloss, x, saved, weights, biases, ctx.hidden, *head, flags, ctx.plan)
                gradients = (of[0], *of[1], *of[2])[: len(inputs)]
        return gradients[0], *(None,) * 7, *gradients[1:]


def _without_autocast(kind: str) -> contextlib.AbstractContextManager:
    """The products keep the dtype of the forward pass even if backward() runs under autocast."""
    # To turn off what is off would cost as much as a launch.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _split(parameters: Sequence[Tensor], layers: int) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
    """(weights, biases) of so many layers; no biases: None."""
    return parameters[:layers], parameters[layers:] or None


def _saved(ctx, others: int):
    """(x and the parameters, what was saved after them, which of them want gradients): `others` stand between."""
    wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[others:])
    # Read once: under activation checkpointing a second look finds nothing.
    tensors = ctx.saved_tensors
    return tensors[: len(wanted)], tensors[len(wanted) :], wanted


def _flags(wanted: tuple[bool, ...], layers: int) -> reference.Wanted:
    return wanted[0], wanted[1 : 1 + layers], wanted[1 + layers :] or (False,) * layers


def _double(function, inputs: Sequence[Tensor], wanted: Sequence[bool], upstream: Tensor) -> list[Tensor | None]:
    """Gradients that can themselves be differentiated, exact to any order: those of torch's own operations."""
    create_graph = torch.is_grad_enabled()  # off in a batched backward pass, which nobody differentiates again
    with torch.enable_grad():
        # Aliases, so that an input that depends on another, or is given twice, gets the gradient of its own place only.
        aliases = [tensor.view_as(tensor) for tensor in inputs]
        chosen = [alias for alias, want in zip(aliases, wanted, strict=True) if want]
        gradients = iter(torch.autograd.grad(function(*aliases), chosen, upstream, create_graph=create_graph))
    return [next(gradients) if want else None for want in wanted]


def _plain(x, weights, biases, hidden, output) -> Tensor:
    """The network in torch's own operations."""
    for l, weight in enumerate(weights):
        act = ACTIVATIONS[output if l == len(weights) - 1 else hidden]
        x = act.forward(F.linear(x, weight, None if biases is None else biases[l]))
    return x


def _bce(z, target, pos_weight, reduction) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, target, pos_weight=pos_weight, reduction=reduction)


def mlp_act(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    activation: str = "sigmoid",
    output_activation: str | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """A whole network: `linear_act` for each weight in turn, differentiable to any order.

    x: (..., K_0), any strides. weights: (N_l, K_l) each, with K_{l+1} = N_l. biases: (N_l,) each, or None for none.
    activation: of the hidden layers; output_activation: of the last one, the same unless told otherwise. Returns
    (..., N) of the last layer, contiguous.

    On a GPU, networks whose widths are at most 128 run as one kernel forward, which leaves only y in memory, and as
    few as registers allow back, which compute the activations once more; on a CPU, networks that are not small run as
    one autograd node. `perceptriton.kernels.explain` says what and why. torch.compile sees a chain of layers. dtypes,
    autocast, impl and errors are those of `linear_act`; impl="triton" asks for the whole network in kernels of its own.
    """
    output = activation if output_activation is None else output_activation
    try:
        if _torch_is_best(x, weights, biases, (activation, output), impl):
            return _plain(x, weights, biases, activation, output)
        if (plans := _plans(x, weights, biases, impl)) is None:
            return _layers(x, weights, biases, activation, output, impl)
        (x, weights, biases), plans = plans
        if plans.forward.impl == "aten":
            return _plain(x, weights, biases, activation, output)
        if plans.backward is None:
            return ops.mlp_fwd(x, weights, biases, activation, output, plans.forward)[0]
        arguments = (x, activation, output, plans, len(weights), *weights, *(biases or ()))
        return FusedMlpFunction.apply(*arguments) if plans.backward.segments else MlpFunction.apply(*arguments)[0]
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        if _captured_cold(error, x, weights, impl) or _symbolic(x, (activation, output), impl):
            return _plain(x, weights, biases, activation, output)
        _check_network(x, weights, biases, (activation, output), impl)
        raise


def _layers(x, weights, biases, hidden, output, impl) -> Tensor:
    for l, weight in enumerate(weights):
        act = output if l == len(weights) - 1 else hidden
        x = linear_act(x, weight, None if biases is None else biases[l], act, impl=impl)
    return x


def _torch_is_best(x, weights, biases, activations, impl) -> bool:
    """Whether plain operations cost least, whatever a plan would say. Raises for what does not fit together."""
    if impl not in IMPLS or not all(act in ACTIVATIONS for act in activations):
        raise ValueError
    if torch.compiler.is_compiling():
        return False  # who looks at sizes has a dynamic batch compiled once for each
    if (misfit := _fit_together(x, weights, biases)) is not None:
        if not isinstance(biases, Sequence) or any(tensor.device != x.device for tensor in (*weights, *biases)):
            raise ValueError
        if impl == "triton":
            refused = eligibility.bias_refusal(f"biases[{misfit}]", biases[misfit], weights[misfit])
            raise NotImplementedError(f'impl="triton": {refused}')
        return True  # torch broadcasts it
    return impl is None and ops.network_prefers_torch(x, weights)


def _plans(x, weights, biases, impl, loss: bool = False):
    """((x, weights, biases) in the dtype of the products, plans), or None: layer by layer."""
    if torch.compiler.is_compiling():
        return None
    dtype, autocast = _product_dtype(x)
    if refused := eligibility.mlp_refusal(x, weights, biases, dtype, autocast, impl):
        if impl == "triton":
            raise NotImplementedError(f'impl="triton": {refused}')
        return None
    tensors = (x, *weights, *(biases or ()))
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if autocast:
        # Cast here, not inside a Function, so that the casts are differentiated and gradients keep their dtypes.
        x, *parameters = (tensor.to(dtype) for tensor in tensors)
        weights, biases = _split(parameters, len(weights))
    plans = ops.mlp_plans(x, weights, training, loss, impl)
    return None if plans.forward.impl == "layers" else ((x, weights, biases), plans)


def _fit_together(x, weights, biases) -> int | None:
    """The last layer whose bias is not (out_features,), if any. Raises ValueError for what else does not fit."""
    misfit = None
    if not weights or (biases is not None and len(biases) != len(weights)):
        raise ValueError
    features = x.shape[-1]
    for l, weight in enumerate(weights):
        n, k = weight.shape
        if k != features:
            raise ValueError
        if biases is not None and biases[l].shape != (n,):
            misfit = l
        features = n
    return misfit


def _check_network(x, weights, biases, activations, impl) -> None:
    """Raises the error that says what is wrong with the arguments of `mlp_act`, if anything is."""
    for name, tensors in (("weights", weights), *((("biases", biases),) if biases is not None else ())):
        if not isinstance(tensors, Sequence):
            raise TypeError(f"{name} must be a sequence of Tensors, not {type(tensors).__name__}") from None
    if not weights:
        raise ValueError("weights must hold at least one Tensor, not 0") from None
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"biases holds {len(biases)} Tensors, but weights {len(weights)}") from None
    for l, weight in enumerate(weights):
        if biases is not None and biases[l] is None:
            raise TypeError(f"biases[{l}] must be a Tensor, not NoneType: all layers have a bias or none has") from None
        inputs = x
        if l > 0 and isinstance(weight, Tensor) and weight.dim() == 2:
            if weight.shape[1] != weights[l - 1].shape[0]:
                raise ValueError(
                    f"weights[{l}] {tuple(weight.shape)} does not take the out_features of weights[{l - 1}] "
                    f"{tuple(weights[l - 1].shape)}"
                ) from None
            inputs = x.new_empty(0, weight.shape[1])
        try:
            act = activations[-1] if l == len(weights) - 1 else activations[0]
            _check(inputs, weight, None if biases is None else biases[l], act, impl)
        except (TypeError, ValueError) as error:
            message = str(error).replace("weight", f"weights[{l}]").replace("bias", f"biases[{l}]")
            raise type(error)(message) from None


# --- binary cross entropy ----------------------------------------------------------------------------------


def linear_sigmoid_bce(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """The binary cross entropy of sigmoid(x @ weight.T + bias) against target, from the logit z.

    x: (..., in_features). weight: (out_features, in_features). bias: (out_features,) or None. target:
    (..., out_features), floating, values in [0, 1]. pos_weight: (out_features,) or None. reduction: "mean" and "sum"
    give a scalar, "none" (..., out_features). See `mlp_sigmoid_bce`, of which this is the case of one layer.
    """
    biases = None if bias is None else (bias,)
    options = {"pos_weight": pos_weight, "reduction": reduction, "impl": impl}
    try:
        return mlp_sigmoid_bce(x, (weight,), biases, target, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("weights[0]", "weight").replace("biases[0]", "bias")) from None


def mlp_sigmoid_bce(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    target: Tensor,
    activation: str = "sigmoid",
    *,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """The binary cross entropy of a network that ends in a sigmoid, differentiable to any order.

    With z the output of the last layer before its sigmoid, p = sigmoid(z), and w = pos_weight or 1:

        loss = -(w t log p + (1 - t) log(1 - p)) = (1 - t) z + (1 + (w - 1) t) log(1 + e^-z)

    target: (..., N), floating; soft targets in [0, 1] are fine. pos_weight: (N,) or None. reduction: "mean" over all
    elements, "sum", or "none" for the shape of target. The rest as for `mlp_act`.

    It equals `torch.nn.BCEWithLogitsLoss` of the logits, the dtype of the result included: that of target, fp32 under
    autocast, where `torch.nn.BCELoss` refuses to run on a GPU. `nn.Sigmoid` followed by `nn.BCELoss` differs from both
    where p rounds to 0 or 1: in fp32 from |z| = 16 on its gradient (p - t) / (p (1 - p)) * p (1 - p) loses digits and
    from z = 17 on vanishes, and it cuts log p off at -100. Here the gradient is p - t everywhere.

    On a GPU a network of one segment takes two launches for loss and gradients when one program covers the batch;
    predictions are never written to memory. Gradients reach x and the parameters; where target wants one too, the
    network runs as `mlp_act` and torch's loss, as it does on a CPU. pos_weight may want none: torch has none for it.
    """
    try:
        n = weights[-1].shape[0]
        if (
            reduction not in REDUCTIONS
            or not target.is_floating_point()
            or target.shape != (*x.shape[:-1], n)
            or not (pos_weight is None or pos_weight.is_floating_point())
        ):
            raise ValueError
        if _torch_is_best(x, weights, biases, (activation,), impl):
            return _bce(_plain(x, weights, biases, activation, "identity"), target, pos_weight, reduction)
        refused = _head_refusal(x, target, pos_weight, n)
        if refused and impl == "triton":
            raise NotImplementedError(f'impl="triton": {refused}')
        found = None if refused else _plans(x, weights, biases, impl, loss=True)
        if found is None or not found[1].forward.triton:
            z = mlp_act(x, weights, biases, activation, "identity", impl=impl)
            return _bce(z, target, pos_weight, reduction)
        dtype = torch.float32 if _product_dtype(x)[1] else target.dtype
        (x, weights, biases), plans = found
        head = (target, None if pos_weight is None else pos_weight.expand(n), reduction, dtype)
        if plans.backward is None:
            return ops.mlp_bce_fwd(x, weights, biases, activation, *head, plans.forward)[0]
        parameters = (*weights, *(biases or ()))
        return MlpBceFunction.apply(x, *head, activation, plans, len(weights), *parameters)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        if _captured_cold(error, x, weights, impl) or _symbolic(x, (activation,), impl):
            return _bce(_plain(x, weights, biases, activation, "identity"), target, pos_weight, reduction)
        _check_network(x, weights, biases, (activation, "identity"), impl)
        _check_loss(x, weights, target, pos_weight, reduction)
        raise


def _head_refusal(x, target, pos_weight, n: int) -> str | None:
    """Why the kernels do not take this loss, or None."""
    for name, tensor in (("target", target), ("pos_weight", pos_weight)):
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"{name} is a {type(tensor).__name__}, a subclass of Tensor with rules of its own"
        if tensor.requires_grad:
            return f"{name} wants a gradient"
        if tensor.dtype is torch.float64 or tensor.device != x.device:
            return f"{name} is {tensor.dtype} on {tensor.device}, and x on {x.device}"
    if pos_weight is not None and pos_weight.shape not in ((), (1,), (n,)):
        return f"pos_weight {tuple(pos_weight.shape)} is not ({n},)"
    return None


def _check_loss(x, weights, target, pos_weight, reduction) -> None:
    """Raises the error that says what is wrong with the arguments of the loss, if anything is."""
    for name, tensor in (("target", target), *([] if pos_weight is None else [("pos_weight", pos_weight)])):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}") from None
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating, not {tensor.dtype}") from None
        if tensor.dtype.itemsize == 1:
            raise ValueError(f"{name} is {tensor.dtype}, for which torch has no loss") from None
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x on {x.device}") from None
    if pos_weight is not None and pos_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("pos_weight wants a gradient, but the loss has none for it") from None
    shape = (*x.shape[:-1], weights[-1].shape[0])
    if target.shape != shape:
        raise ValueError(f"target {tuple(target.shape)} has not the shape of the output {shape}") from None
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}") from None
    if pos_weight is not None:
        try:
            fits = torch.broadcast_shapes(pos_weight.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"pos_weight {tuple(pos_weight.shape)} does not fit the output {shape}") from None
