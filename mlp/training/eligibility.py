# SPDX-License-Identifier: Apache-2.0
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
from .criteria import folded, has_class_ids, loss_fields, probabilities
from .jobs import FastJob
from .members import own_numbers
from .state import State


def fast_job(model, x, y, criterion, optimizer, steps, batch_size, lr, impl, per_member, weight) -> FastJob | str:
    """The loop without autograd, or the reason why there is none. Raises ValueError for data that do not fit it.

    weight: of each sample, None for 1.
    """
    network = _network(model)
    if isinstance(network, str):
        return network
    if reason := training_refusal(network):
        return reason
    loss = loss_fields(criterion, network)
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
    ids = None
    if loss["loss"] == "cross_entropy" and _are_ids(model, criterion, x, y):
        ids, y = y, probabilities(criterion, y, network.widths[-1], p.dtype)
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
    goal = folded(criterion, config, y, ids, weight, batch_size)
    if isinstance(goal, str):
        return goal
    config, y, means = goal
    if lr is None:
        lr = p.new_full((network.members or 1,), rate).detach()
    elif isinstance(lr, Tensor):
        lr = lr.detach().to(p.device, p.dtype)
    return FastJob(network, config, state, x, y, means, lr, batch_size, steps, impl)


def check_validation(job: FastJob, model: nn.Module, criterion: Any, x: Tensor, y: Tensor) -> None:
    """Raises ValueError for validation data on which the first evaluation would fail, or be broadcast."""
    network, config, target = job.network, job.config, y
    if config.loss == "cross_entropy" and _are_ids(model, criterion, x, y):
        target = probabilities(criterion, y, network.widths[-1], network.parameters[0].dtype)
    if isinstance(target, str):
        raise ValueError(f"validation's {target}")
    check_data(network, config, x, target, "validation's ")


def _are_ids(model: nn.Module, criterion: Any, x: Tensor, y: Tensor) -> bool:
    return has_class_ids(criterion, model, x, y) if isinstance(model, Ensemble) else y.dim() == 1


def _network(model: nn.Module) -> Network | str:
    if type(model) is not Ensemble:
        return as_network(model)
    if not runs_only_forward(model):
        return "the model has hooks or a forward of its own"
    options = (model.activation, model.output_activation, len(model.biases) > 0)
    return Network(model.sizes, *options, tuple(in_order(model)), len(model))


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
