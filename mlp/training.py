"""Whole training loops in one call."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..kernels import ops
from ..kernels.records import TRAIN_IMPLS, Recipe
from .ensemble import Ensemble
from .network import Network, apart, describe, hooked, why_not_trainable

__all__ = ["History", "fit"]

CHUNK_SECONDS = 0.2  # between two moments at which progress shows and an interrupt counts
PATIENCE_SECONDS = 2.0  # after which a terminal is shown a bar that nobody asked for


@dataclass(frozen=True, eq=False)  # tensors do not compare to one bool
class History:
    """What `fit` returns."""

    steps: list[int]  # at which the loss was logged, counted from 0 in each call of fit
    loss: Tensor  # before the update of that step: (rows,), of an Ensemble (rows, E), on the CPU
    seconds: float  # of training, with what it sets up
    path: str  # which implementation ran: "lane", "block", "graph", "torch"; "general": an ordinary loop


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int | None = None,
    log_every: int = 0,
    lr: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    impl: str | None = None,
) -> History:
    """Trains the model in place for `steps` steps of the optimizer, and leaves both as an ordinary loop would.

    x: the samples, (samples, ...). y: their targets, (samples, ...). batch_size: samples per step, None for all of
    them at once. Each epoch takes the order of one `torch.randperm(samples, generator=generator)` on the CPU, in
    consecutive batches, the last one smaller if it must be; each call begins a new epoch.

    log_every: the loss before the update is logged at the steps 0, log_every, 2 * log_every, ...; 0 for never. NaN
    and inf are logged like any loss, and stop nothing. progress: a bar at once and not after two seconds, where stderr
    is a terminal and tqdm is installed.

    An `MLP`, an `Ensemble` or an `nn.Sequential` of linear layers and activations in float32 or float64, under SGD,
    Adam or AdamW with one group of all its parameters, with BCELoss, BCEWithLogitsLoss or MSELoss, trains without
    autograd: all steps of a chunk in one kernel or one loop. Everything else (other modules, criteria and optimizers,
    amsgrad, maximize, parameters that are frozen, tied or share memory, hooks, autocast, other dtypes) trains in an
    ordinary loop. With BCELoss the gradient at the logit is p - t; torch's differs from it only where
    p (1 - p) < 1e-12. `criterion` is called as criterion(model(x), y).

    An Ensemble's members see the same samples, x (samples, I) and y (samples, O), or each its own, (E, samples, I)
    and (E, samples, O), in the same order. The criterion applies to each member, and the losses are summed. lr, for an
    Ensemble only: (E,), a learning rate per member in place of the optimizer's own, which stays as it is.

    impl: None chooses; "lane", "block", "graph" and "torch" are obeyed, or refused with NotImplementedError and the
    reason. `History.path` says what ran.

    Steps run in chunks of about 0.2 s, whose size does not change the result. KeyboardInterrupt leaves model and
    optimizer at the end of a chunk. The gradients of all parameters are None afterwards. x and y are not written to.

    Raises TypeError and ValueError for arguments that do not fit, which leaves the model as it was, TypeError too for
    a criterion that returns no tensor.
    """
    began = time.perf_counter()
    job = _prepare(model, x, y, criterion, optimizer, steps, batch_size, log_every, lr, generator, impl)
    order = None if batch_size is None else _Order(job.samples, batch_size, generator)
    bar = _Bar(steps, progress, began)
    rows: list[Tensor] = []
    try:
        # Of a state made in inference mode, no ordinary step could go on.
        with _Interrupts() as interrupts, torch.inference_mode(False):
            for start, count in _chunks(steps):
                rows.append(job.run(start, count, order, log_every).cpu())
                bar.show(start + count)
                interrupts.raise_pending()
    finally:
        bar.close()
        for p in model.parameters():
            p.grad = None
    rows = [row for row in rows if len(row)]
    # Without a row, that of the losses there would have been.
    empty = torch.empty(0, job.columns, device="cpu", dtype=next(model.parameters(), x).dtype)
    loss = torch.cat(rows) if rows else empty
    return History(
        list(range(0, steps, log_every)) if log_every else [],
        loss if isinstance(model, Ensemble) else loss.squeeze(1),
        time.perf_counter() - began,
        job.path,
    )


def _prepare(
    model, x, y, criterion, optimizer, steps, batch_size, log_every, lr, generator, impl
) -> "_FastJob | _GeneralJob":
    """Raises whatever may be refused; has trained nothing, and copied nothing."""
    _check(model, x, y, criterion, optimizer, steps, batch_size, log_every, lr, generator, impl)
    x, y = x.detach(), y.detach()
    job = _fast_job(model, x, y, criterion, optimizer, lr)
    if isinstance(job, str):
        if impl is not None:
            raise NotImplementedError(f"impl={impl!r}: {job}")
        if lr is not None:
            raise NotImplementedError(f"lr needs a loop without autograd: {job}")
        return _GeneralJob(model, x, y, criterion, optimizer)
    job.choose(batch_size, impl)
    return job


# --- errors at the door ------------------------------------------------------------------------------------


def _check(model, x, y, criterion, optimizer, steps, batch_size, log_every, lr, generator, impl) -> None:
    kinds = {
        "model": (model, nn.Module),
        "x": (x, Tensor),
        "y": (y, Tensor),
        "optimizer": (optimizer, torch.optim.Optimizer),
        **({} if lr is None else {"lr": (lr, Tensor)}),
        **({} if generator is None else {"generator": (generator, torch.Generator)}),
    }
    for name, (value, kind) in kinds.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, not {type(criterion).__name__}")
    counts = {"steps": (steps, 0), "log_every": (log_every, 0)}
    for name, (value, least) in (counts if batch_size is None else counts | {"batch_size": (batch_size, 1)}).items():
        if not isinstance(value, int) or isinstance(value, bool):
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
    if isinstance(model, Ensemble):
        _check_ensemble(model, x, y, lr)
    elif lr is not None:
        raise ValueError(f"lr is for an Ensemble; the model is a {type(model).__name__}, whose optimizer has its own")
    elif not x.dim() or not y.dim() or x.shape[0] != y.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} differ in their number of samples")
    if 0 in x.shape[:1] or (isinstance(model, Ensemble) and not x.shape[-2]):
        raise ValueError(f"x {tuple(x.shape)} holds no samples")


def _check_ensemble(model: Ensemble, x: Tensor, y: Tensor, lr: Tensor | None) -> None:
    members = len(model)
    for name, tensor, width in (("x", x, model.sizes[0]), ("y", y, model.sizes[-1])):
        fits = tensor.dim() == 2 or (tensor.dim() == 3 and tensor.shape[0] == members)
        if not fits or tensor.shape[-1] != width:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} is neither (samples, {width}) nor ({members}, samples, {width})"
            )
    if x.shape[-2] != y.shape[-2]:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} differ in their number of samples")
    if lr is None:
        return
    if lr.shape != (members,):
        raise ValueError(f"lr {tuple(lr.shape)} is not one rate for each of {members} members")
    if not lr.is_floating_point():
        raise TypeError(f"lr must be a floating point tensor, not {lr.dtype}")
    if not bool((lr >= 0).all()):
        raise ValueError(f"lr must not be negative, but its least is {lr.min().item()}")


def _check_data(network: Network, recipe: Recipe, x: Tensor, y: Tensor) -> None:
    """What would only fail inside the loop, or broadcast there."""
    p = network.parameters[0]
    for name, tensor, width in (("x", x, network.widths[0]), ("y", y, network.widths[-1])):
        if tensor.shape[-1] != width or (network.members is None and tensor.dim() != 2):
            raise ValueError(f"{name} {tuple(tensor.shape)} is not ({x.shape[0]}, {width})")
        # Of the criteria, BCELoss does not promote its target, and only MSELoss takes whole numbers.
        promoted = tensor is y and (recipe.loss == "mse" or (recipe.loss == "bce_logits" and y.is_floating_point()))
        if tensor.dtype != p.dtype and not promoted:
            raise ValueError(f"{name} is {tensor.dtype}, but the model's parameters {p.dtype}")
        if tensor.device != p.device:
            raise ValueError(f"{name} is on {tensor.device}, but the model on {p.device}")
    if recipe.loss == "bce" and bool(((y < 0) | (y > 1)).any()):
        raise ValueError(f"y must lie in [0, 1] for BCELoss, not in [{y.min().item()}, {y.max().item()}]")


# --- the jobs: a chunk of steps, one way or the other --------------------------------------------------------


class _FastJob:
    """Steps on copies of the parameters and of the optimizer's state, written back after every chunk."""

    def __init__(self, network: Network, recipe: Recipe, state: "_State", x: Tensor, y: Tensor, lr: Tensor) -> None:
        self.network, self.recipe, self.state, self.x, self.y, self.lr = network, recipe, state, x, y, lr
        self.columns, self.samples = network.members or 1, x.shape[-2]
        self.loop: Any = None

    def choose(self, batch_size: int | None, impl: str | None) -> None:
        p = self.network.parameters[0]
        self.plan = ops.plan_train(self.columns, self.samples, batch_size, self.recipe, p.dtype, p.device, impl)
        self.path = self.plan.impl

    def _set_up(self, batch: int) -> Any:
        self.parameters, self.first, self.second = map(self._copies, (self.network.parameters, *self.state.tensors()))
        # Kernels read memory, which holds the negative of a view like z.conj().imag.
        x, y, lr = (t.resolve_neg().contiguous() for t in (self.x, self.y, self.lr))
        x, y = (t if t.dim() == 3 else t[None] for t in (x, y))
        arguments = (self.parameters, self.first, self.second, lr, x, y, batch, self.state.taken, self.plan)
        return ops.training_loop(self.plan)(self.recipe, *arguments)

    def _copies(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        copies = (t.detach().clone(memory_format=torch.contiguous_format) for t in tensors)
        return tuple(copy if self.network.members else copy[None] for copy in copies)

    def run(self, start: int, steps: int, order: "_Order | None", log_every: int) -> Tensor:
        p = self.network.parameters[0]
        if self.loop is None:
            self.loop = self._set_up(self.samples if order is None else order.batch)
        losses = p.new_empty(_logged(start, steps, log_every), self.columns)
        rows = None if order is None else order.rows(start, steps).to(p.device)
        self.loop.run(rows, start, steps, log_every, losses)
        _finish(p.device)
        with torch.no_grad():
            for own, copy in zip(self.network.parameters, self.parameters, strict=True):
                own.copy_(copy.view(own.shape))
            self.state.write(steps, self.first, self.second)
        return losses


class _GeneralJob:
    """The loop that everyone writes."""

    path = "general"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, criterion, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.x, self.y, self.criterion, self.optimizer = model, x, y, criterion, optimizer
        many = isinstance(model, Ensemble)
        self.columns, self.samples = (len(model), x.shape[-2]) if many else (1, x.shape[0])

    def run(self, start: int, steps: int, order: "_Order | None", log_every: int) -> Tensor:
        batches = None if order is None else order.batches(start, steps)
        losses = []
        for step in range(start, start + steps):
            x, y = self.x, self.y
            if batches is not None:
                indices = next(batches)
                x, y = self._take(x, indices), self._take(y, indices)
            logged = None

            def closure(x=x, y=y):
                nonlocal logged
                self.optimizer.zero_grad()
                values = self._losses(x, y)
                logged = values.detach() if logged is None else logged
                loss = values.sum()
                loss.backward()
                return loss

            with torch.enable_grad():
                if isinstance(self.optimizer, torch.optim.LBFGS):
                    self.optimizer.step(closure)  # pyright: ignore[reportArgumentType]
                else:
                    closure()
                    self.optimizer.step()
            if log_every and step % log_every == 0 and logged is not None:
                losses.append(logged)
        _finish(self.x.device)
        return torch.stack(losses) if losses else torch.empty(0, self.columns, device="cpu")

    def _take(self, data: Tensor, indices: Tensor) -> Tensor:
        dimension = 1 if isinstance(self.model, Ensemble) and data.dim() == 3 else 0
        return data.index_select(dimension, indices.to(data.device))

    def _losses(self, x: Tensor, y: Tensor) -> Tensor:
        """(1,), of an Ensemble (E,)"""
        output = self.model(x)
        if not isinstance(self.model, Ensemble):
            return self._loss(output, y).reshape(1)
        targets = y if y.dim() == 3 else y.expand(len(output), *y.shape)
        return torch.stack([self._loss(p, t).reshape(()) for p, t in zip(output, targets, strict=True)])

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        loss = self.criterion(output, target)
        if not isinstance(loss, Tensor):
            raise TypeError(f"criterion must return a tensor with one number, not a {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"criterion must return a tensor with one number, not one of shape {tuple(loss.shape)}")
        return loss


# --- what may run without autograd ---------------------------------------------------------------------------


def _fast_job(model, x, y, criterion, optimizer, lr) -> _FastJob | str:
    """The loop without autograd, or the reason why there is none. Raises ValueError for data that do not fit it."""
    network = _network(model)
    if isinstance(network, str):
        return network
    if reason := why_not_trainable(network):
        return reason
    loss = _loss_of(criterion, network)
    if isinstance(loss, str):
        return loss
    steps = _optimizer_of(optimizer, network)
    if isinstance(steps, str):
        return steps
    fields, rate = steps
    p = network.parameters[0]
    if p.dtype not in (torch.float32, torch.float64):
        return f"parameters are {p.dtype}"
    if torch.is_autocast_enabled(p.device.type):
        return "autocast is on"
    if any(type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided for t in (x, y)):
        return "x or y is a subclass of Tensor, or not dense"
    if network.members is None and x.dim() != 2:
        return f"x {tuple(x.shape)} is not (samples, {network.widths[0]})"
    recipe = Recipe(network.widths, network.hidden, network.output, network.bias, **loss, **fields)
    state = _State.read(optimizer, network, recipe)
    if isinstance(state, str):
        return state
    _check_data(network, recipe, x, y)
    if y.dtype != p.dtype:
        return f"y is {y.dtype}, the parameters {p.dtype}"
    if not all(apart(t, p) for t in (x, y) for p in network.parameters):
        return "x or y shares memory with a parameter"
    rates = p.new_full((network.members or 1,), rate) if lr is None else lr.detach().to(p.device, p.dtype)
    return _FastJob(network, recipe, state, x, y, rates.detach())


def _network(model: nn.Module) -> Network | str:
    if type(model) is not Ensemble:
        return describe(model)
    if hooked(model):
        return "the model has hooks or a forward of its own"
    parameters = tuple(model._in_order())
    return Network(
        model.sizes, model.activation, model.output_activation, len(model.biases) > 0, parameters, len(model)
    )


def _loss_of(criterion: object, network: Network) -> dict[str, str] | str:
    names = {nn.BCELoss: "bce", nn.BCEWithLogitsLoss: "bce_logits", nn.MSELoss: "mse"}
    kind = type(criterion)
    if kind not in names or not isinstance(criterion, nn.Module):
        return f"the criterion is a {kind.__name__}"
    if hooked(criterion):
        return "the criterion has hooks or a forward of its own"
    if getattr(criterion, "weight", None) is not None or getattr(criterion, "pos_weight", None) is not None:
        return "the criterion has weights"
    if criterion.reduction not in ("mean", "sum"):
        return f"the criterion's reduction is {criterion.reduction!r}"
    wanted = {"bce": "sigmoid", "bce_logits": "identity"}.get(names[kind], network.output)
    if network.output != wanted:
        return f"{kind.__name__} on an output activation of {network.output}, not {wanted}"
    return {"loss": names[kind], "reduction": str(criterion.reduction)}


def _optimizer_of(optimizer: torch.optim.Optimizer, network: Network) -> tuple[dict[str, Any], float] | str:
    """The recipe's fields and the learning rate."""
    kind = type(optimizer)
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        return f"the optimizer is a {kind.__name__}"
    if len(optimizer.param_groups) != 1:
        return f"the optimizer has {len(optimizer.param_groups)} parameter groups"
    (group,) = optimizer.param_groups
    if {id(p) for p in group["params"]} != {id(p) for p in network.parameters}:
        return "the optimizer does not have all parameters of the model"
    own_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if own_hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        return "the optimizer has hooks"
    # A learning rate scheduler replaces `step` by one that only takes note that it was called.
    if "step" in optimizer.__dict__ and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return "the optimizer has a step of its own"
    for flag in ("amsgrad", "maximize", "differentiable", "capturable"):
        if group.get(flag):
            return f"the optimizer has {flag}=True"
    rate = group["lr"].item() if isinstance(group["lr"], Tensor) else float(group["lr"])
    if kind is torch.optim.SGD:
        numbers = {name: group[name] for name in ("momentum", "dampening", "weight_decay")}
        fields = {"optimizer": "sgd", "nesterov": bool(group["nesterov"])}
    else:
        numbers = dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        numbers |= {"eps": group["eps"], "weight_decay": group["weight_decay"]}
        fields = {"optimizer": "adamw" if group.get("decoupled_weight_decay", kind is torch.optim.AdamW) else "adam"}
    if any(isinstance(value, Tensor) for value in numbers.values()):
        return "the optimizer has tensors for numbers"
    return fields | {name: float(value) for name, value in numbers.items()}, rate


class _State:
    """The optimizer's state of each parameter: found as earlier steps left it, and left as ordinary steps would."""

    def __init__(self, optimizer, network: Network, names: tuple[str, ...], taken: int) -> None:
        self.optimizer, self.network, self.names = optimizer, network, names
        self.taken = taken  # by the steps that the state has seen

    @classmethod
    def read(cls, optimizer: torch.optim.Optimizer, network: Network, recipe: Recipe) -> "_State | str":
        """The state, or the reason why it is not that of ordinary steps."""
        if recipe.optimizer == "sgd":
            names = ("momentum_buffer",) if recipe.momentum else ()
        else:
            names = ("exp_avg", "exp_avg_sq")
        entries = [optimizer.state.get(p, {}) for p in network.parameters]
        found = [tuple(entry.get(name) for name in names) for entry in entries]
        missing = [all(value is None for value in values) for values in found]
        if all(missing):
            return cls(optimizer, network, names, 0)
        for p, values in zip(network.parameters, found, strict=True):
            if any(not isinstance(v, Tensor) or (v.shape, v.dtype) != (p.shape, p.dtype) for v in values):
                return "the optimizer's state does not fit the parameters, or is there for some only"
        taken = 1  # momentum knows a first step and others
        if recipe.optimizer != "sgd":
            counts = {float(entry.get("step", 0)) for entry in entries}
            if len(counts) > 1 or min(counts) < 1:
                return "the optimizer has taken different numbers of steps for different parameters"
            taken = int(counts.pop())
        return cls(optimizer, network, names, taken)

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """The recipe's `first` and `second`."""
        lists: list[list[Tensor]] = [[], []]
        for index, name in enumerate(self.names):
            for p in self.network.parameters:
                found = self.optimizer.state.get(p, {}).get(name)
                lists[index].append(torch.zeros_like(p) if found is None else found)
        return lists[0], lists[1]

    def write(self, steps: int, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Takes over what `steps` more steps have made of the state."""
        self.taken += steps
        (group,) = self.optimizer.param_groups
        for name, tensors in zip(self.names, (first, second), strict=False):
            for p, tensor in zip(self.network.parameters, tensors, strict=True):
                entry = self.optimizer.state[p]
                if entry.get(name) is None:
                    if name == "exp_avg":
                        entry["step"] = _step_counter(p, bool(group.get("fused")))
                    entry[name] = torch.empty_like(p, memory_format=torch.preserve_format, requires_grad=False)
                entry[name].copy_(tensor.view(p.shape))
        for p in self.network.parameters if "exp_avg" in self.names else ():
            self.optimizer.state[p]["step"].fill_(self.taken)
        if hasattr(self.optimizer.step, "_wrapped_by_lr_sched"):
            self.optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]


def _step_counter(p: Tensor, fused: bool) -> Tensor:
    # As torch.optim.Adam makes it.
    double = torch.get_default_dtype() == torch.float64 and not fused
    return torch.zeros((), dtype=torch.float64 if double else torch.float32, device=p.device if fused else "cpu")


# --- chunks, order, interrupts, progress ---------------------------------------------------------------------


def _chunks(steps: int) -> Iterator[tuple[int, int]]:
    """(first step, number of steps), each as many as take about CHUNK_SECONDS by the time that the last one took."""
    start, count = 0, 1
    while start < steps:
        count = min(count, steps - start)
        began = time.perf_counter()
        yield start, count
        start += count
        # A first step takes longer than others, which makes the next chunk too short, never too long.
        count = max(1, int(count * CHUNK_SECONDS / max(time.perf_counter() - began, 1e-6)))


def _finish(device: torch.device) -> None:
    """Waits for what was launched: progress and interrupts are about steps that are done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _logged(start: int, steps: int, log_every: int) -> int:
    """How many of the steps are logged."""
    return len(range(-(-start // log_every) * log_every, start + steps, log_every)) if log_every else 0


class _Order:
    """The order of the samples: one permutation per epoch, drawn when its first batch comes up."""

    def __init__(self, samples: int, batch_size: int, generator: torch.Generator | None) -> None:
        self.samples, self.batch, self.generator = samples, min(batch_size, samples), generator
        self.per_epoch = -(-samples // self.batch)
        self.epoch = -1  # of the last row drawn
        self.row: Tensor

    def rows(self, start: int, steps: int) -> Tensor:
        """(epochs, samples), int32: those in which the steps lie."""
        first, last = start // self.per_epoch, (start + steps - 1) // self.per_epoch
        rows = []
        for epoch in range(first, last + 1):
            if epoch > self.epoch:
                self.row = torch.randperm(self.samples, generator=self.generator, device="cpu")
                self.epoch = epoch
            rows.append(self.row)
        return torch.stack(rows).to(torch.int32)

    def batches(self, start: int, steps: int) -> Iterator[Tensor]:
        for step in range(start, start + steps):
            # Drawn when its first batch comes up: a model that draws numbers itself must find them in the same order
            # whatever the size of a chunk.
            row = self.rows(step, 1)[0]
            begin = step % self.per_epoch * self.batch
            yield row[begin : begin + self.batch]


class _Interrupts:
    """Holds a KeyboardInterrupt back until a chunk has finished. A second one comes through at once."""

    def __init__(self) -> None:
        self.pending = self.installed = False

    def __enter__(self) -> "_Interrupts":
        # Python delivers signals to the main thread; a handler that is not Python's own belongs to someone else.
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._handle)
            self.installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, *_: object) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True

    def raise_pending(self) -> None:
        if self.pending:
            raise KeyboardInterrupt


class _Bar:
    """A progress bar on stderr, from the moment that somebody is seen to wait for it."""

    def __init__(self, steps: int, wanted: bool, began: float) -> None:
        self.steps, self.wanted, self.began = steps, wanted, began
        self.bar: Any = None
        self.useful = sys.stderr is not None and sys.stderr.isatty()

    def show(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif self.useful and (self.wanted or time.perf_counter() - self.began > PATIENCE_SECONDS):
            try:
                from tqdm import tqdm
            except ImportError:
                self.useful = False
                return
            self.bar = tqdm(total=self.steps, initial=done, unit="step", leave=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
