"""Whole training loops in one call."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ensemble import Ensemble
from ..history import History
from .checks import check_arguments
from .eligibility import fast_job
from .jobs import GeneralJob, Job
from .members import PerMember, check_members
from .pacing import Bar, Interrupts, SampleOrder, chunks, logged_steps
from .rates import Rates, schedule_of


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
    per_member: PerMember | None = None,
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
    Adam, AdamW or RMSprop with one group of all its parameters, with BCELoss, BCEWithLogitsLoss, MSELoss or
    CrossEntropyLoss, trains without autograd: by kernels that hold the whole network, or in a loop written out.
    Everything else (other modules, criteria and optimizers, amsgrad, centered, maximize, parameters that are frozen,
    tied or share memory, hooks, autocast, other dtypes) trains in an ordinary loop. With BCELoss the gradient at the
    logit is p - t; torch's differs from it only where p (1 - p) < 1e-12. `criterion` is called as
    criterion(model(x), y).

    An Ensemble's members see the same samples, x (samples, I) and y (samples, O), or each its own, (E, samples, I)
    and (E, samples, O), in the same order. The criterion applies to each member, and the losses are summed.

    lr: in place of the optimizer's own rate, which stays as it is. (E,), for an Ensemble, is a rate for each member. A
    schedule is (steps, 1), for an Ensemble also (steps, E), or a function of the step, an int counted from 0 in this
    call, that returns a float, for an Ensemble also (E,). A tensor of one dimension is never a schedule. The function
    is called once for each step, in order, a chunk of steps ahead. Each step is that of a loop which sets "lr" of all
    parameter groups before it.

    per_member: for an Ensemble, numbers of each member in the place of the optimizer's own, which stay as they are, by
    their names in its parameter groups: "weight_decay": (E,); "momentum": (E,); "betas": a pair of (E,) or floats; all
    in any floating point dtype. Each member trains as under an optimizer of its own with its numbers. A member whose
    momentum is 0 has no momentum buffer: its part of the stacked one stays as it is, zeros at first.

    impl: None chooses; "lane", "block", "graph", "native" and "torch" are obeyed, or refused with NotImplementedError
    and the reason. `History.path` says what ran. Of "native", loops that numba compiles for a CPU, None has only what
    is fast enough to make up for their start, which `History.setup_seconds` tells; once they are there, short runs take
    them too.

    Steps run in chunks of about 0.2 s, whose size does not change the result. KeyboardInterrupt leaves model and
    optimizer at the end of a chunk. The gradients of all parameters are None afterwards. x and y are not written to.

    Raises TypeError and ValueError for arguments that do not fit, which leaves the model as it was, TypeError too for
    a criterion that returns no tensor.
    """
    began = time.perf_counter()
    job = prepare(model, x, y, criterion, optimizer, steps, batch_size, log_every, lr, generator, impl, per_member)
    order = None if batch_size is None else SampleOrder(job.samples, batch_size, steps, generator)
    bar = Bar(steps, progress, began)
    rows: list[Tensor] = []
    try:
        # A state made in inference mode could not be updated by the caller's ordinary steps.
        with Interrupts() as interrupts, torch.inference_mode(False):
            for start, count in chunks(steps):
                rows.append(job.run(start, count, order, log_every).cpu())
                bar.show(start + count)
                interrupts.raise_pending()
    finally:
        bar.close()
        if order is not None:
            order.close()
        for p in model.parameters():
            p.grad = None
    # With no step logged, the loss has no rows, but the dtype that they would have had.
    rows = [row for row in rows if len(row)]
    rows = rows or [torch.empty(0, job.columns, device="cpu", dtype=next(model.parameters(), x).dtype)]
    loss = torch.cat(rows)
    return History(
        list(logged_steps(0, steps, log_every)),
        loss if isinstance(model, Ensemble) else loss.squeeze(1),
        time.perf_counter() - began,
        job.path,
        job.setup_seconds,
    )


def prepare(model, x, y, criterion, optimizer, steps, batch_size, log_every, lr, generator, impl, per_member) -> Job:
    """The job that will train, of which nothing is computed or copied yet. Raises all that `fit` refuses."""
    check_arguments(model, x, y, criterion, optimizer, steps, batch_size, log_every, lr, generator, impl)
    check_members(per_member, model, optimizer)
    x, y = x.detach(), y.detach()
    schedule = schedule_of(lr, model)
    rates = lr if schedule is None else schedule
    job = fast_job(model, x, y, criterion, optimizer, steps, batch_size, rates, impl, per_member)
    if isinstance(job, str):
        if impl is not None:
            raise NotImplementedError(f"impl={impl!r}: {job}")
        if (lr is not None and schedule is None) or (schedule is not None and schedule.of_each_member):
            raise NotImplementedError(f"lr of each member needs a loop without autograd: {job}")
        if per_member:
            raise NotImplementedError(f"per_member needs a loop without autograd: {job}")
        return GeneralJob(model, x, y, criterion, optimizer, schedule)
    return job
