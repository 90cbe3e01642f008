# SPDX-License-Identifier: Apache-2.0
"""A sweep over ranks: each trains its share of the members."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..ensemble import Ensemble
from ..history import History
from .criteria import has_own_targets
from .measures import Measure
from .members import PerMember, numbers_of
from .rates import Rates, share_of
from .run import fit, prepare
from .validation import EarlyStopping, check_watch

__all__ = ["fit_sharded"]


def fit_sharded(
    ensemble: Ensemble,
    x: Tensor,
    y: Tensor,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
    steps: int,
    batch_size: int | None = None,
    log_every: int = 0,
    lr: Rates | None = None,
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
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
    keep_state: bool = False,
    group: "dist.ProcessGroup | None" = None,
) -> History:
    """`fit` of an Ensemble by all processes of a group, each training its share of the members.

    Every process calls this with the same arguments. All start from rank 0's parameters and its order of samples, and
    all end with the whole trained ensemble and the whole history, as one process would. That one process trains all
    members where torch.distributed is not initialized.

    optimizer: makes the optimizer of a share from its parameters, as in `lambda p: torch.optim.SGD(p, lr=0.1)`.
    scheduler: makes its scheduler from that, as in `lambda o: torch.optim.lr_scheduler.StepLR(o, 10)`.
    keep_state: `History.state["optimizer"]` is then the state_dict of one for the whole ensemble, and that of its
    scheduler is beside it, as "scheduler". group: the processes, None for all. The other arguments are those of `fit`,
    for the whole ensemble. `History.seconds` is the time that this process took, waiting for the others included;
    `History.path` says what ran in it. Where `stop` has ended a share before others, its losses are NaN from then on.

    checkpoint: is called in each process with the History of its share, when the ensemble has the parameters of the
    share. resume: that History, with the ensemble and, by what `optimizer` and `scheduler` make, the state that this
    process had then, and as many processes; nothing is taken from rank 0.

    Raises TypeError for a model that is no Ensemble, and what `fit` raises; RuntimeError where another process failed.
    """
    if not isinstance(ensemble, Ensemble):
        raise TypeError(f"ensemble must be an Ensemble, not {type(ensemble).__name__}")
    for name, make in (("optimizer", optimizer), ("scheduler", scheduler)):
        if not callable(make) and (name, make) != ("scheduler", None):
            raise TypeError(f"{name} must be a function that makes one for a share, not {type(make).__name__}")
    began = time.perf_counter()
    # Every rank checks the whole ensemble: after an error on one rank alone, the others would wait for it forever.
    check_watch(ensemble, criterion, validation, evaluate_every, metrics, stop, log_every)
    whole = optimizer(ensemble.parameters())
    own = (lr, scheduler and scheduler(whole), scheduler_interval, per_member, sample_weight)
    prepare(ensemble, x, y, criterion, whole, steps, batch_size, log_every, own, generator, nan, impl)
    distributed = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if distributed else (0, 1)
    # Rank 0 always has members; the last ranks have none if there are more processes than members.
    bounds = [-(-len(ensemble) * r // ranks) for r in range(ranks + 1)]
    shares = [slice(*pair) for pair in pairwise(bounds)]
    device = ensemble.weights[0].device

    def everyones(value: Any, group: "dist.ProcessGroup | None") -> list:
        """The value of every rank, by rank."""
        values = [value] * ranks
        if ranks > 1:
            # A group may communicate by the memory of GPUs alone: then by that of the GPU which has the parameters.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                dist.all_gather_object(values, value, group=group)
        return values

    parameters = [p.detach() for p in ensemble.parameters()]
    random = torch.default_generator if generator is None else generator
    if resume is None:
        first, state = everyones(([p.cpu() for p in parameters], random.get_state()) if rank == 0 else None, group)[0]
        for own, given in zip(parameters, first, strict=True):
            own.copy_(given)
        random.set_state(state)

    idle = shares[rank].start == shares[rank].stop
    mine = slice(0, 1) if idle else shares[rank]
    share = ensemble.subset(mine)
    own_optimizer = optimizer(share.parameters())
    own_scheduler = scheduler and scheduler(own_optimizer)

    def write() -> None:
        for own, part in zip(parameters, share.parameters(), strict=True):
            own[mine] = part.detach()

    def own_checkpoint(history: History) -> None:
        write()
        if checkpoint is not None:
            checkpoint(history)

    def of_share(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = data
        return x[mine] if x.dim() == 3 else x, y[mine] if has_own_targets(criterion, ensemble, x, y) else y

    patient = _patient(group) if ranks > 1 else None
    history, failure = None, None
    try:
        history = fit(
            share,
            *of_share((x, y)),
            criterion=criterion,
            optimizer=own_optimizer,
            steps=0 if idle else steps,
            batch_size=batch_size,
            log_every=log_every,
            lr=None if idle else share_of(lr, mine, len(ensemble)),
            scheduler=own_scheduler,
            scheduler_interval=scheduler_interval,
            per_member=numbers_of(per_member, mine),
            sample_weight=sample_weight if sample_weight is None or sample_weight.dim() < 2 else sample_weight[mine],
            generator=generator,
            validation=None if validation is None or idle else of_share(validation),
            evaluate_every=None if idle else evaluate_every,
            metrics=() if idle else metrics,
            stop=None if idle else stop,
            checkpoint=None if idle or checkpoint is None else own_checkpoint,
            resume=None if idle else resume,
            nan=nan,
            progress=progress and rank == 0,
            impl=impl,
        )
    except BaseException as error:  # raised again below, once the other ranks know of it
        failure = error
    trained = None
    if history is not None:
        state = (own_optimizer.state_dict(), own_scheduler and own_scheduler.state_dict()) if keep_state else None
        trained = replace(history, state={}), [p.detach().cpu() for p in share.parameters()], state, random.get_state()
    if not idle:  # as `fit` leaves what it has trained, whatever becomes of the others
        write()
    outcomes = everyones(trained, patient)
    if ranks > 1:
        # A thread of gloo's needs Python's lock to let go of what was gathered. If it had to wait until the interpreter
        # ends, it would abort the process: while this one sleeps, it gets the lock.
        time.sleep(0.02)
        # One of a part stays: the next one would have its name, and find its addresses.
        if patient is not group and ranks == dist.get_world_size():
            dist.destroy_process_group(patient)
    if failure is not None:
        raise failure
    if None in outcomes or history is None:
        raise RuntimeError(f"rank {outcomes.index(None)} of {ranks} could not train its share")
    busy = [(part, outcome) for part, outcome in zip(shares, outcomes, strict=True) if part.start < part.stop]
    for part, (_, values, _, _) in busy:
        for own, value in zip(parameters, values, strict=True):
            own[part] = value
    histories = [outcome[0] for _, outcome in busy]
    # One process draws orders of samples until the last of its members has stopped.
    random.set_state(busy[_longest(histories)][1][3])
    joined = _joined(histories)
    state = _joined_state(histories, [outcome[2] for _, outcome in busy]) if keep_state else {}
    ran = {"path": history.path, "reason": history.reason, "setup_seconds": history.setup_seconds}
    return replace(joined, **ran, seconds=time.perf_counter() - began, state=state)


def _patient(group: "dist.ProcessGroup | None") -> Any:
    """The processes of a group, connected by gloo with no limit of time: a share may take hours longer than others."""
    if not dist.is_gloo_available() or dist.get_backend(group) == "mpi":
        return group
    options: dict[str, Any] = {"backend": "gloo", "timeout": timedelta(days=365)}
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    # All of WORLD are here: the name is a number that nobody else has. Of a part, the others know nothing.
    own = len(ranks) < dist.get_world_size()
    return dist.new_group(ranks if own else None, use_local_synchronization=own, **options)


def _longest(histories: Sequence[History]) -> int:
    """The index of one that has taken the most steps."""
    return max(range(len(histories)), key=lambda i: histories[i].steps_taken)


def _joined(histories: Sequence[History]) -> History:
    """That of all members. A share that stopped early is what it was at its last evaluation, and logs no more."""
    longest = histories[_longest(histories)]
    losses = []
    for history in histories:
        missing = history.loss.new_full((len(longest.steps) - len(history.loss), history.loss.shape[1]), torch.nan)
        losses.append(torch.cat([history.loss, missing]))
    validation = {}
    for name, values in longest.validation.items():
        parts = [history.validation[name] for history in histories]
        parts = [torch.cat([part, part[-1:].expand(len(values) - len(part), -1)]) for part in parts]
        validation[name] = torch.cat(parts, 1)
    columns = {name: [getattr(history, name) for history in histories] for name in ("stopped", "kept")}
    joined = {name: None if None in parts else torch.cat(parts) for name, parts in columns.items()}
    return replace(longest, loss=torch.cat(losses, 1), validation=validation, **joined)


def _joined_state(histories: Sequence[History], states: Sequence[tuple]) -> dict:
    """Of an optimizer of all members, and of its scheduler, as the share that trained longest has left them."""
    latest, scheduler = states[_longest(histories)]

    def join(values: Sequence[Any]) -> Any:
        """What is no stack counts steps, of which some shares took fewer."""
        if isinstance(values[0], Tensor) and values[0].dim():
            return torch.cat([value.cpu() for value in values])
        return max(values)

    state = {
        i: {name: join([own["state"][i][name] for own, _ in states]) for name in entry}
        for i, entry in latest["state"].items()
    }
    optimizer = {"state": state, "param_groups": latest["param_groups"]}
    return {"optimizer": optimizer} | ({} if scheduler is None else {"scheduler": scheduler})
