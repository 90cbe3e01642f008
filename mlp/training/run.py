# SPDX-License-Identifier: Apache-2.0
"""Whole training loops in one call."""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..as_network import Refused
from ..ensemble import Ensemble
from ..history import History
from .checks import check_arguments, check_numbers, check_resume, check_weight, plain_int
from .eligibility import READ, check_validation, fast_job
from .jobs import FastJob, GeneralJob, Job
from .measures import Measure
from .members import PerMember, check_members
from .pacing import Bar, Interrupts, SampleOrder, chunks, logged_steps
from .rates import Rates, Schedule, Scheduled, check_scheduler
from .validation import EarlyStopping, Watch, check_watch


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
    lr: Rates | None = None,
    scheduler: LRScheduler | None = None,
    scheduler_interval: str = "epoch",
    per_member: PerMember | None = None,
    sample_weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    evaluate_every: int | None = None,
    metrics: Sequence[str | Measure] = (),
    stop: EarlyStopping | None = None,
    checkpoint: Callable[[History], object] | None = None,
    resume: History | None = None,
    nan: str = "raise",
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
    Adam, AdamW or RMSprop with one group of all its parameters, with BCELoss, BCEWithLogitsLoss, CrossEntropyLoss,
    MSELoss, L1Loss, SmoothL1Loss or HuberLoss, trains without autograd: by kernels that hold the whole network, or in a
    loop written out. Everything else (other modules, criteria and optimizers, a criterion's weights that tell the
    places of a minibatch apart, amsgrad, centered, maximize, parameters that are frozen, tied or share memory, hooks,
    autocast, other dtypes) trains in an ordinary loop; `History.reason` says why, and an Ensemble warns of it. With
    BCELoss the gradient at the logit is p - t; torch's differs from it only where p (1 - p) < 1e-12. `criterion` is
    called as criterion(model(x), y).

    An Ensemble's members see the same samples, x (samples, I) and y (samples, O), or each its own, (E, samples, I)
    and (E, samples, O), in the same order. Class ids, which are integers, are (samples,) or (E, samples). The criterion
    applies to each member, and the losses are summed. A member that has become NaN leaves the others alone.

    lr: in place of the optimizer's own rate, which stays as it is. (E,), for an Ensemble, is a rate for each member. A
    schedule is (steps, 1), for an Ensemble also (steps, E), or a function of the step, an int counted from 0 in this
    call, that returns a float, for an Ensemble also (E,). A tensor of one dimension is never a schedule. The function
    is called once for each step, in order, a chunk of steps ahead. Each step is that of a loop which sets "lr" of all
    parameter groups before it.

    scheduler: one of the optimizer's, in place of lr, which takes a step after each epoch or, with scheduler_interval
    "step", after each step. Those that watch a loss, as ReduceLROnPlateau does, are refused.

    validation: other samples and their targets, (x, y), on which the model, in evaluation mode, is evaluated after each
    evaluate_every steps and after the last; None for each epoch or, without batches, the last step alone.
    `History.validation` has the criterion's value as "loss", and the metrics: "accuracy", and functions of (output,
    target) of one network by their names, which return a tensor with one number. stop: an `EarlyStopping`. Accuracy is
    the share of samples whose greatest output is that of the target, a class id or the greatest of its own; of one
    output, and of each under `nn.BCELoss` and `nn.BCEWithLogitsLoss` or their functions, the share on the right side of
    1/2, or of 0 for logits under the latter; a criterion of your own on logits of one output needs a metric of its own.

    checkpoint: is called after each chunk with the History so far, when model and optimizer are what it says. resume: a
    History of the same call that was interrupted, with model, optimizer and scheduler as they were then: the run goes
    on inside its epoch, and ends to the bit as one that was not interrupted. The generator is set to what it was, and
    in an ordinary loop torch's own too, which Dropout draws from.

    nan: "raise" refuses samples and targets that are NaN and that all members share; "propagate" trains on them. A
    member's own make that member NaN.
    per_member: for an Ensemble, numbers of each member in the place of the optimizer's own, which stay as they are, by
    their names in its parameter groups: "weight_decay": (E,); "momentum": (E,); "betas": a pair of (E,) or floats; all
    in any floating point dtype. Each member trains as under an optimizer of its own with its numbers. A member whose
    momentum is 0 has no momentum buffer: its part of the stacked one stays as it is, zeros at first.

    sample_weight: (samples,), or (E, samples) of members; the loss of each sample is multiplied by its own, and a mean
    divides by their sum over the batch, times what the criterion's own weights give.

    impl: None chooses; "lane", "block", "graph", "native" and "torch" are obeyed, or refused with NotImplementedError
    and the reason. `History.path` says what ran. Of "native", loops that numba compiles for a CPU, None has only what
    is fast enough to make up for their start, which `History.setup_seconds` tells. Short runs take them once they are
    there, or once those of this process have lost by torch's loop as much as a start takes.

    Steps run in chunks of about 0.2 s, whose size does not change the result. KeyboardInterrupt leaves model and
    optimizer at the end of a chunk, and has the History so far as its `history`. The gradients of all parameters are
    None afterwards. x and y are not written to.

    Raises TypeError and ValueError for arguments that do not fit, which leaves the model as it was, TypeError too for
    a criterion that returns no tensor, and RuntimeError where `checkpoint`, or a function that gives rates, changes the
    optimizer's numbers, which only an ordinary loop would see.
    """
    began = time.perf_counter()
    steps, batch_size, log_every, evaluate_every = map(plain_int, (steps, batch_size, log_every, evaluate_every))
    check_watch(model, criterion, validation, evaluate_every, metrics, stop, log_every)
    if checkpoint is not None and not callable(checkpoint):
        raise TypeError(f"checkpoint must be a function of a History, not {type(checkpoint).__name__}")
    own = (lr, scheduler, scheduler_interval, per_member, sample_weight)
    if isinstance(resume, History) and resume.path != "general" and impl is None:
        impl = resume.path  # one that rounds otherwise may be faster by now
    job = prepare(model, x, y, criterion, optimizer, steps, batch_size, log_every, own, generator, nan, impl)
    check_resume(resume, job, steps, batch_size, log_every)
    if validation is not None:
        check_numbers(model, *validation, nan, "validation's ")
        if isinstance(job, FastJob):
            check_validation(job, model, criterion, *validation)
    if isinstance(model, Ensemble) and isinstance(job, GeneralJob):
        foreign = type(optimizer).__module__.partition(".")[0] != "torch"
        mixing = "; members stay apart only if it updates each element by itself" if foreign else ""
        why = f"{job.reason}{mixing}"
        warnings.warn(f"an ordinary loop trains this Ensemble, one operation at a time: {why}", stacklevel=2)
    watched = validation is not None or stop is not None
    per_epoch = steps if batch_size is None else -(-job.samples // batch_size)
    every = (evaluate_every or per_epoch) if watched else 0  # steps from one evaluation to the next; 0: there are none
    if stop is not None and stop.metric == "training_loss" and log_every > every and steps > every:
        raise ValueError(f"stop watches 'training_loss' each {every} steps, but log_every={log_every} is seldomer")
    watch = Watch(model, criterion, validation, metrics, stop, resume)
    order, first = None, 0 if resume is None else resume.steps_taken
    if batch_size is not None:
        order = SampleOrder(job.samples, batch_size, steps, generator, first, resume.state["order"] if resume else ())
    if resume is not None:
        job.taken, job.rows = first, [resume.loss.view(-1, job.columns)]
        if isinstance(job, GeneralJob) and "random" in resume.state:
            job.set_random(resume.state["random"])
    take, most = job.run, None
    if isinstance(job, FastJob) and watch.late:
        take = partial(job.run, review=partial(watch.review, every, steps, log_every, job))
        most = partial(watch.most, every)
    bar = Bar(steps, progress, began)
    # An ordinary loop sees what changes.
    own_rate = lr is None and scheduler is None
    read = partial(_numbers, optimizer, own_rate) if isinstance(job, FastJob) else dict[str, str]
    numbers = read()

    def check_optimizer() -> None:
        now = read()
        for name in [name for name in numbers if now.get(name) != numbers[name]]:
            change = f"from {numbers[name]} to {now.get(name)}"
            how = "rates change by a scheduler or a function as lr, other numbers between calls"
            raise RuntimeError(f"optimizer's {name} was changed while fit ran, {change}: {how}")

    def row(values: Tensor) -> Tensor:
        return values if isinstance(model, Ensemble) else values.squeeze(-1)

    def history() -> History:
        # With no step logged, the loss has no rows, but the dtype that they would have had.
        rows = [block.cpu() for block in job.rows if len(block)]
        rows = rows or [torch.empty(0, job.columns, device="cpu", dtype=next(model.parameters(), x).dtype)]
        state = watch.state() | {"samples": job.samples, "batch_size": batch_size}
        state |= {"random": job.random()} if isinstance(job, GeneralJob) else {}
        state |= {} if order is None else {"order": order.states(job.taken)}
        return History(
            list(logged_steps(0, job.taken, log_every)),
            row(torch.cat(rows)),
            time.perf_counter() - began + (0.0 if resume is None else resume.seconds),
            job.path,
            job.setup_seconds,
            job.reason,
            job.taken,
            **watch.columns(row),
            state=state,
        )

    try:
        # A state made in inference mode could not be updated by the caller's ordinary steps.
        with Interrupts() as interrupts, torch.inference_mode(False):
            # An evaluation may be what the interrupt has come into.
            due = every and first > 0 and not most and (first % every == 0 or first == steps)
            if due and first not in watch.evaluated:
                watch.evaluate(first, job.rows, log_every)
            for start, count in chunks(first, steps, 0 if most else every, most):
                if watch.done.all():
                    break
                if watch.done.any():
                    job.freeze(watch.done)
                check_optimizer()
                take(start, count, order, log_every)
                check_optimizer()
                if every and not most and (job.taken == steps or job.taken % every == 0):
                    watch.evaluate(job.taken, job.rows, log_every)
                if checkpoint is not None:
                    checkpoint(history())
                bar.show(start + count)
                interrupts.raise_pending()
            watch.finish()
            interrupts.raise_pending()
    except KeyboardInterrupt as interrupt:
        interrupt.history = history()  # pyright: ignore[reportAttributeAccessIssue]
        raise
    finally:
        bar.close()
        if order is not None:
            order.close()
        for p in model.parameters():
            p.grad = None
    return history()


def _numbers(optimizer: torch.optim.Optimizer, own_rate: bool) -> dict[str, str]:
    """What the fast loops have read of the optimizer's group, as words, in which NaN is NaN. own_rate: its rate too."""
    group = optimizer.param_groups[0]
    names = [name for name in READ if name in group] + ["lr"] * own_rate
    return {name: str(_plain(group[name])) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Tensor) else value


def prepare(model, x, y, criterion, optimizer, steps, batch_size, log_every, own, generator, nan, impl) -> Job:
    """The job that will train, of which nothing is computed or copied yet. Raises all that `fit` refuses.

    own: `fit`'s lr, scheduler, scheduler_interval, per_member and sample_weight.
    """
    lr, scheduler, interval, per_member, weight = own
    check_arguments(model, x, y, criterion, optimizer, steps, batch_size, log_every, lr, generator, impl)
    check_members(per_member, model, optimizer)
    check_weight(weight, model, x)
    weight = None if weight is None else weight.detach()
    members, samples = (len(model), x.shape[-2]) if isinstance(model, Ensemble) else (1, x.shape[0])
    schedule = None
    check_scheduler(scheduler, interval, optimizer, lr)
    if scheduler is not None:
        schedule = Scheduled(scheduler, -(-samples // (batch_size or samples)) if interval == "epoch" else 1)
    elif lr is not None and not (isinstance(lr, Tensor) and lr.dim() == 1):
        schedule = Schedule(lr, members)
    x, y = x.detach(), y.detach()
    try:
        if isinstance(schedule, Scheduled):
            schedule.check()
        rates = lr if schedule is None else schedule
        job = fast_job(model, x, y, criterion, optimizer, steps, batch_size, rates, impl, per_member, weight)
    except Refused as reason:
        if impl is not None:
            raise NotImplementedError(f"impl={impl!r}: {reason}") from None
        if isinstance(lr, Tensor) and lr.shape != (steps, 1):
            raise NotImplementedError(f"lr of each member needs a loop without autograd: {reason}") from None
        if per_member or weight is not None:
            name = "per_member" if per_member else "sample_weight"
            raise NotImplementedError(f"{name} needs a loop without autograd: {reason}") from None
        job = GeneralJob(model, x, y, criterion, optimizer, schedule, str(reason))
    check_numbers(model, x, y, nan)
    return job
