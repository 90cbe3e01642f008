# SPDX-License-Identifier: Apache-2.0
"""Errors at the door of `fit`."""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.records import TRAIN_IMPLS, TrainConfig
from ..as_network import Network
from ..ensemble import Ensemble
from ..history import History
from ..model import is_whole
from .criteria import has_class_ids
from .jobs import Job
from .pacing import logged_steps
from .rates import check_rates

# Of torch.optim; not every torch has all of them.
MIXING = tuple(getattr(torch.optim, name) for name in ("LBFGS", "Adafactor", "Muon") if hasattr(torch.optim, name))


def check_arguments(model, x, y, criterion, optimizer, steps, batch_size, log_every, lr, generator, impl) -> None:
    kinds = {
        "model": (model, nn.Module),
        "x": (x, Tensor),
        "y": (y, Tensor),
        "optimizer": (optimizer, torch.optim.Optimizer),
        **({} if generator is None else {"generator": (generator, torch.Generator)}),
    }
    for name, (value, kind) in kinds.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, not {type(criterion).__name__}")
    if isinstance(criterion, type):
        raise TypeError(f"criterion must be a {criterion.__name__}(), not the class {criterion.__name__} itself")
    if lr is not None and not isinstance(lr, Tensor) and not callable(lr):
        raise TypeError(f"lr must be a Tensor or a function of the step, not {type(lr).__name__}")
    counts = {"steps": (steps, 0), "log_every": (log_every, 0)}
    counts |= {} if batch_size is None else {"batch_size": (batch_size, 1)}
    for name, (value, least) in counts.items():
        if not is_whole(value):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if impl not in TRAIN_IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, TRAIN_IMPLS))}, not {impl!r}")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator must be one of the cpu, where the order is drawn, not of {generator.device}")
    own = {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in own:
                raise ValueError(f"optimizer holds a parameter {tuple(p.shape)} that is none of the model's {len(own)}")
    if isinstance(model, Ensemble) and len(model) > 1 and isinstance(optimizer, MIXING):
        own = f"{type(optimizer).__name__} looks at whole tensors, and would mix the members"
        raise ValueError(f"optimizer of an Ensemble must update each element by itself: {own}")
    check_samples(model, criterion, x, y)
    if lr is not None:
        check_rates(lr, model, optimizer, steps)


def plain_int(value: Any) -> Any:
    """An int for one of numpy's; anything else as it is, for a check to refuse."""
    return int(value) if is_whole(value) else value


def check_numbers(model: nn.Module, x: Tensor, y: Tensor, nan: str, whose: str = "") -> None:
    """Raises ValueError for NaN that all members share, unless it is to be propagated."""
    if nan not in ("raise", "propagate"):
        raise ValueError(f'nan must be "raise" or "propagate", not {nan!r}')
    for name, tensor in (("x", x), ("y", y)) if nan == "raise" else ():
        shared = not isinstance(model, Ensemble) or tensor.dim() < 3
        if shared and tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_meta:
            rows = tensor.detach().isnan().flatten(1).any(1) if tensor.dim() > 1 else tensor.detach().isnan()
            if bool(rows.any()):
                row = int(rows.nonzero()[0])
                raise ValueError(f'{whose}{name} is NaN, first in row {row} of {len(rows)}; nan="propagate" takes it')


def check_resume(resume: object, job: Job, steps: int, batch_size: int | None, log_every: int) -> None:
    if resume is None:
        return
    if not isinstance(resume, History):
        raise TypeError(f"resume must be a History, not {type(resume).__name__}")
    taken, members = resume.steps_taken, resume.loss.shape[1] if resume.loss.dim() > 1 else 1
    if not {"samples", "batch_size"} <= resume.state.keys():
        raise ValueError("resume has no state to go on from, as a History of fit_sharded's has none")
    if taken > steps:
        raise ValueError(f"resume has taken {taken} steps, more than steps={steps}")
    for name, own, other in (
        ("samples", job.samples, resume.state["samples"]),
        ("batch_size", batch_size, resume.state["batch_size"]),
        ("networks", job.columns, members),
    ):
        if own != other:
            raise ValueError(f"resume is of a run with {name} {other}, not {own}")
    if resume.steps != list(logged_steps(0, taken, log_every)):
        raise ValueError(
            f"resume logged {len(resume.steps)} losses in {taken} steps, which is not log_every={log_every}"
        )


def check_samples(model: nn.Module, criterion: Any, x: Tensor, y: Tensor, whose: str = "") -> None:
    if isinstance(model, Ensemble):
        classes = has_class_ids(criterion, model, x, y)
        _check_ensemble(model, x, y, classes, whose)
        if classes and type(criterion) in (nn.CrossEntropyLoss, nn.NLLLoss):
            _check_ids(y, model.sizes[-1], criterion.ignore_index, whose)
        samples, targets = x.shape[-2], y.shape[-1 if classes else -2]
    else:
        samples, targets = (t.shape[0] if t.dim() else None for t in (x, y))
    if samples != targets or samples is None:
        raise ValueError(f"{whose}x {tuple(x.shape)} and y {tuple(y.shape)} differ in their number of samples")
    if samples == 0:
        raise ValueError(f"{whose}x {tuple(x.shape)} holds no samples")


def check_weight(weight: Tensor | None, model: nn.Module, x: Tensor) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"sample_weight must be a Tensor, not {type(weight).__name__}")
    many = isinstance(model, Ensemble)
    forms = [tuple(x.shape[-2:-1]), (len(model), x.shape[-2])] if many else [tuple(x.shape[:1])]
    if tuple(weight.shape) not in forms:
        raise ValueError(f"sample_weight {tuple(weight.shape)} is not {' or '.join(map(str, forms))}")
    if not weight.is_floating_point():
        raise TypeError(f"sample_weight must be a floating point tensor, not {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"sample_weight is on {weight.device}, but x on {x.device}")
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError(f"sample_weight must be finite and not negative, not in [{weight.min()}, {weight.max()}]")
    if not bool((weight > 0).any(-1).all()):
        raise ValueError("sample_weight is 0 for all samples")


def _check_ensemble(model: Ensemble, x: Tensor, y: Tensor, classes: bool, whose: str) -> None:
    members = len(model)
    for name, tensor, width in (("x", x, model.sizes[0]), ("y", y, model.sizes[-1]))[: 2 - classes]:
        fits = tensor.dim() == 2 or (tensor.dim() == 3 and tensor.shape[0] == members)
        if not fits or tensor.shape[-1] != width:
            forms = f"(samples, {width}) nor ({members}, samples, {width})"
            raise ValueError(f"{whose}{name} {tuple(tensor.shape)} is neither {forms}")


def _check_ids(y: Tensor, classes: int, ignored: int, whose: str) -> None:
    """Raises ValueError for ids of no class, of which torch's functions would tell in words of their own."""
    unknown = ((y < 0) | (y >= classes)) & (y != ignored)
    if not y.is_meta and bool(unknown.any()):
        raise ValueError(f"{whose}y holds the class id {y[unknown][0]}, but there are {classes} classes, from 0")


def check_data(network: Network, config: TrainConfig, x: Tensor, y: Tensor, whose: str = "") -> None:
    """Raises ValueError for data that would fail inside the loop, or be broadcast there."""
    p = network.parameters[0]
    for name, tensor, width in (("x", x, network.widths[0]), ("y", y, network.widths[-1])):
        if tensor.shape[-1] != width or (network.members is None and tensor.dim() != 2):
            raise ValueError(f"{whose}{name} {tuple(tensor.shape)} is not ({x.shape[0]}, {width})")
        # torch promotes y to the dtype of the output, or says that it cannot: MSELoss from any dtype, others from
        # floating ones.
        wide = config.loss in ("bce_logits", "cross_entropy") and y.is_floating_point()
        promoted = tensor is y and (config.loss in ("mse", "smooth_l1") or wide)
        if tensor.dtype != p.dtype and not promoted:
            raise ValueError(f"{whose}{name} is {tensor.dtype}, but the model's parameters {p.dtype}")
        if tensor.device != p.device:
            raise ValueError(f"{whose}{name} is on {tensor.device}, but the model on {p.device}")
    if config.loss == "bce" and bool(((y < 0) | (y > 1)).any()):
        raise ValueError(f"{whose}y must lie in [0, 1] for BCELoss, not in [{y.min().item()}, {y.max().item()}]")
