"""What may be trained without autograd: the loop's record, or in its place the reason why there is none."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ...kernels.records import TrainConfig
from ..as_network import Network, as_network, lie_apart, training_refusal
from ..ensemble import Ensemble, in_order
from ..sequential import runs_only_forward
from .checks import check_data
from .jobs import FastJob
from .members import own_numbers
from .state import State


def fast_job(model, x, y, criterion, optimizer, steps, batch_size, lr, impl, per_member) -> FastJob | str:
    """The loop without autograd, or the reason why there is none. Raises ValueError for data that do not fit it."""
    network = _network(model)
    if isinstance(network, str):
        return network
    if reason := training_refusal(network):
        return reason
    loss = _loss_fields(criterion, network)
    if isinstance(loss, str):
        return loss
    update = _optimizer_fields(optimizer, network)
    if isinstance(update, str):
        return update
    fields, rate = update
    p = network.parameters[0]
    if p.dtype not in (torch.float32, torch.float64):
        return f"parameters are {p.dtype}"
    if torch.is_autocast_enabled(p.device.type):
        return "autocast is on"
    if any(type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided for t in (x, y)):
        return "x or y is a subclass of Tensor, or not dense"
    if network.members is None and x.dim() != 2:
        return f"x {tuple(x.shape)} is not (samples, {network.widths[0]})"
    if loss["loss"] == "cross_entropy" and network.members is None and y.dim() == 1:
        y = _probabilities(y, network.widths[-1], p.dtype)
        if isinstance(y, str):
            return y
    config = TrainConfig(network.widths, network.hidden, network.output, network.bias, **loss, **fields)
    config, own = own_numbers(per_member, config)
    state = State.read(optimizer, network, config, own)
    if isinstance(state, str):
        return state
    check_data(network, config, x, y)
    if y.dtype != p.dtype:
        return f"y is {y.dtype}, the parameters {p.dtype}"
    if not all(lie_apart(t, p) for t in (x, y) for p in network.parameters):
        return "x or y shares memory with a parameter"
    if lr is None:
        lr = p.new_full((network.members or 1,), rate).detach()
    elif isinstance(lr, Tensor):
        lr = lr.detach().to(p.device, p.dtype)
    return FastJob(network, config, state, x, y, lr, batch_size, steps, impl)


def _probabilities(classes: Tensor, count: int, dtype: torch.dtype) -> Tensor | str:
    """(samples, count), 1 for the class of each sample; or why the ordinary loop has to say what becomes of them."""
    if classes.dtype != torch.int64:
        return f"class ids are {classes.dtype}"
    least, greatest = (extreme.item() for extreme in classes.aminmax())
    if least < 0 or greatest >= count:
        return f"class ids lie in [{least}, {greatest}], not in [0, {count - 1}]"
    return torch.nn.functional.one_hot(classes, count).to(dtype)


def _network(model: nn.Module) -> Network | str:
    if type(model) is not Ensemble:
        return as_network(model)
    if not runs_only_forward(model):
        return "the model has hooks or a forward of its own"
    options = (model.activation, model.output_activation, len(model.biases) > 0)
    return Network(model.sizes, *options, tuple(in_order(model)), len(model))


def _loss_fields(criterion: object, network: Network) -> dict[str, str] | str:
    names = {
        nn.BCELoss: "bce",
        nn.BCEWithLogitsLoss: "bce_logits",
        nn.MSELoss: "mse",
        nn.CrossEntropyLoss: "cross_entropy",
    }
    kind = type(criterion)
    if kind not in names or not isinstance(criterion, nn.Module):
        return f"the criterion is a {kind.__name__}"
    if not runs_only_forward(criterion):
        return "the criterion has hooks or a forward of its own"
    if getattr(criterion, "weight", None) is not None or getattr(criterion, "pos_weight", None) is not None:
        return "the criterion has weights"
    if getattr(criterion, "label_smoothing", 0.0) or getattr(criterion, "ignore_index", -100) != -100:
        return "the criterion smooths labels or ignores a class"
    if criterion.reduction not in ("mean", "sum"):
        return f"the criterion's reduction is {criterion.reduction!r}"
    wanted = {"bce": "sigmoid", "bce_logits": "identity", "cross_entropy": "identity"}.get(names[kind], network.output)
    if network.output != wanted:
        return f"{kind.__name__} on an output activation of {network.output}, not {wanted}"
    return {"loss": names[kind], "reduction": str(criterion.reduction)}


def _optimizer_fields(optimizer: torch.optim.Optimizer, network: Network) -> tuple[dict[str, Any], float] | str:
    """(fields of TrainConfig, learning rate), or the reason why the optimizer's steps cannot be written out."""
    kind = type(optimizer)
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        return f"the optimizer is a {kind.__name__}"
    if len(optimizer.param_groups) != 1:
        return f"the optimizer has {len(optimizer.param_groups)} parameter groups"
    (group,) = optimizer.param_groups
    if {id(p) for p in group["params"]} != {id(p) for p in network.parameters}:
        return "the optimizer does not have all parameters of the model"
    own_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if own_hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        return "the optimizer has hooks"
    # A learning rate scheduler replaces `step` too, by one that only counts its calls.
    if "step" in optimizer.__dict__ and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return "the optimizer has a step of its own"
    for flag in ("amsgrad", "centered", "maximize", "differentiable", "capturable"):
        if group.get(flag):
            return f"the optimizer has {flag}=True"
    rate = group["lr"].item() if isinstance(group["lr"], Tensor) else float(group["lr"])
    if kind is torch.optim.SGD:
        numbers = {name: group[name] for name in ("momentum", "dampening", "weight_decay")}
        fields = {"optimizer": "sgd", "nesterov": bool(group["nesterov"])}
    elif kind is torch.optim.RMSprop:
        numbers = {"beta2": group["alpha"], **{name: group[name] for name in ("eps", "momentum", "weight_decay")}}
        fields = {"optimizer": "rmsprop"}
    else:
        numbers = dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        numbers |= {"eps": group["eps"], "weight_decay": group["weight_decay"]}
        fields = {"optimizer": "adamw" if group.get("decoupled_weight_decay", kind is torch.optim.AdamW) else "adam"}
    if any(isinstance(value, Tensor) for value in numbers.values()):
        return "the optimizer has tensors for numbers"
    return fields | {name: float(value) for name, value in numbers.items()}, rate
