# SPDX-License-Identifier: Apache-2.0
"""What may be trained without autograd."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ...kernels.records import TrainConfig
from ..as_network import Network, Refused, as_network, check_trainable, lie_apart
from ..chains import runs_as_written
from ..ensemble import Ensemble, in_order
from .checks import check_data
from .criteria import folded, has_class_ids, loss_fields, probabilities
from .jobs import FastJob
from .members import own_numbers
from .state import State


def fast_job(model, x, y, criterion, optimizer, steps, batch_size, lr, impl, per_member, weight) -> FastJob:
    """The loop without autograd. Raises Refused where there is none, ValueError for data that do not fit it.

    weight: of each sample, None for 1.
    """
    network = _network(model)
    check_trainable(network)
    loss = loss_fields(criterion, network)
    fields, rate = _optimizer_fields(optimizer, network)
    p = network.parameters[0]
    if p.dtype not in (torch.float32, torch.float64):
        raise Refused(f"parameters are {p.dtype}")
    if torch.is_autocast_enabled(p.device.type):
        raise Refused("autocast is on")
    if torch.is_anomaly_enabled():
        raise Refused("autograd looks for anomalies")
    if any(type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided for t in (x, y)):
        raise Refused("x or y is a subclass of Tensor, or not dense")
    if network.members is None and x.dim() != 2:
        raise Refused(f"x {tuple(x.shape)} is not (samples, {network.widths[0]})")
    ids = None
    if loss["loss"] == "cross_entropy" and _are_ids(model, criterion, x, y):
        ids, y = y, probabilities(criterion, y, network.widths[-1], p.dtype)
    config = TrainConfig(network.widths, network.hidden, network.output, network.bias, **loss, **fields)
    config, own = own_numbers(per_member, config)
    state = State.read(optimizer, network, config, own)
    check_data(network, config, x, y)
    if y.dtype != p.dtype:
        raise Refused(f"y is {y.dtype}, the parameters {p.dtype}")
    if not all(lie_apart(t, p) for t in (x, y) for p in network.parameters):
        raise Refused("x or y shares memory with a parameter")
    config, y, means = folded(criterion, config, y, ids, weight, batch_size)
    if lr is None:
        lr = p.new_full((network.members or 1,), rate).detach()
    elif isinstance(lr, Tensor):
        lr = lr.detach().to(p.device, p.dtype)
    return FastJob(network, config, state, x, y, means, lr, batch_size, steps, impl)


def check_validation(job: FastJob, model: nn.Module, criterion: Any, x: Tensor, y: Tensor) -> None:
    """Raises ValueError for validation data on which the first evaluation would fail, or be broadcast."""
    network, config = job.network, job.config
    if config.loss == "cross_entropy" and _are_ids(model, criterion, x, y):
        try:
            y = probabilities(criterion, y, network.widths[-1], network.parameters[0].dtype)
        except Refused as reason:
            raise ValueError(f"validation's {reason}") from None
    check_data(network, config, x, y, "validation's ")


def _are_ids(model: nn.Module, criterion: Any, x: Tensor, y: Tensor) -> bool:
    return has_class_ids(criterion, model, x, y) if isinstance(model, Ensemble) else y.dim() == 1


def _network(model: nn.Module) -> Network:
    if type(model) is not Ensemble:
        return as_network(model)
    if not runs_as_written(model):
        raise Refused("the model has hooks or a forward of its own")
    options = (model.activation, model.output_activation, len(model.biases) > 0)
    return Network(model.sizes, *options, tuple(in_order(model)), len(model))


_FLAGS = ("amsgrad", "centered", "maximize", "differentiable", "capturable")
# What `_optimizer_fields` reads of an optimizer's group, but for the rate.
READ = (*_FLAGS, "momentum", "dampening", "nesterov", "weight_decay", "alpha", "betas", "eps", "decoupled_weight_decay")


def _optimizer_fields(optimizer: torch.optim.Optimizer, network: Network) -> tuple[dict[str, Any], float]:
    """(fields of TrainConfig, learning rate). Raises Refused where the optimizer's steps cannot be written out."""
    kind = type(optimizer)
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        raise Refused(f"the optimizer is a {kind.__name__}")
    if len(optimizer.param_groups) != 1:
        raise Refused(f"the optimizer has {len(optimizer.param_groups)} parameter groups")
    (group,) = optimizer.param_groups
    if {id(p) for p in group["params"]} != {id(p) for p in network.parameters}:
        raise Refused("the optimizer does not have all parameters of the model")
    own_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if own_hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        raise Refused("the optimizer has hooks")
    # A learning rate scheduler replaces `step` too, by one that only counts its calls.
    own_step = "step" in optimizer.__dict__ and not hasattr(optimizer.step, "_wrapped_by_lr_sched")
    if own_step or "zero_grad" in optimizer.__dict__:
        raise Refused("the optimizer has a step or zero_grad of its own")
    for flag in _FLAGS:
        if group.get(flag):
            raise Refused(f"the optimizer has {flag}=True")
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
        raise Refused("the optimizer has tensors for numbers")
    return fields | {name: float(value) for name, value in numbers.items()}, rate
