"""A sweep over ranks: each trains its share of the members."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ensemble import Ensemble
from ..history import History
from .members import PerMember, numbers_of
from .pacing import logged_steps
from .rates import Rates, share_of
from .run import fit, prepare

__all__ = ["fit_sharded"]

FAILED = -1
# Ranks tell each other the dtype of their losses by its index in here.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    per_member: PerMember | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    impl: str | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> History:
    """`fit` of an Ensemble by all processes of a group, each training its share of the members.

    Every process calls this with the same arguments. All start from rank 0's parameters and its order of samples, and
    all end with the whole trained ensemble and the whole history, as one process would. That one process trains all
    members where torch.distributed is not initialized.

    optimizer: makes the optimizer of a share from its parameters, as in `lambda p: torch.optim.SGD(p, lr=0.1)`; its
    state is not kept. group: the processes, None for all. The other arguments are those of `fit`, for the whole
    ensemble. `History.seconds` is the time that this process took, waiting for the others included; `History.path`
    says what ran in it.

    Raises TypeError for a model that is no Ensemble, and what `fit` raises; RuntimeError where another process failed.
    """
    if not isinstance(ensemble, Ensemble):
        raise TypeError(f"ensemble must be an Ensemble, not {type(ensemble).__name__}")
    began = time.perf_counter()
    # Every rank checks the whole ensemble: after an error on one rank alone, the others would wait for it forever.
    whole = optimizer(ensemble.parameters())
    prepare(ensemble, x, y, criterion, whole, steps, batch_size, log_every, lr, generator, impl, per_member)
    distributed = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if distributed else (0, 1)
    # Rank 0 always has members; the last ranks have none if there are more processes than members.
    bounds = [-(-len(ensemble) * r // ranks) for r in range(ranks + 1)]
    shares = [slice(*pair) for pair in pairwise(bounds)]
    device = ensemble.weights[0].device

    def send(tensor: Tensor, source: int) -> None:
        """Overwrites the tensor on every rank with that of rank `source`."""
        if ranks > 1:
            # A group may communicate on the device of the parameters only, and sends dense memory only.
            buffer = tensor.to(device, copy=True).contiguous()
            dist.broadcast(buffer, group=group, group_src=source)
            tensor.copy_(buffer)

    parameters = [p.detach() for p in ensemble.parameters()]
    random = torch.default_generator if generator is None else generator
    state = random.get_state()
    for tensor in (*parameters, state):
        send(tensor, 0)
    random.set_state(state)

    idle = shares[rank].start == shares[rank].stop
    mine = slice(0, 1) if idle else shares[rank]
    share = ensemble.subset(mine)
    history, failure = None, None
    try:
        history = fit(
            share,
            *(t[mine] if t.dim() == 3 else t for t in (x, y)),
            criterion=criterion,
            optimizer=optimizer(share.parameters()),
            steps=0 if idle else steps,
            batch_size=batch_size,
            log_every=log_every,
            lr=None if idle else share_of(lr, mine, len(ensemble)),
            per_member=numbers_of(per_member, mine),
            generator=generator,
            progress=progress and rank == 0,
            impl=impl,
        )
    except BaseException as error:  # raised again below, once the other ranks know of it
        failure = error
    # By rank: the dtype of its losses, which an idle rank must learn from rank 0, or FAILED.
    outcomes = torch.full((ranks,), FAILED)
    if history is not None:
        outcomes[rank] = DTYPES.index(history.loss.dtype)
    for source in range(ranks):
        send(outcomes[source : source + 1], source)
    if failure is not None:
        raise failure
    if FAILED in outcomes.tolist() or history is None:
        raise RuntimeError(f"rank {outcomes.tolist().index(FAILED)} of {ranks} could not train its share")
    logged = list(logged_steps(0, steps, log_every))
    losses = torch.empty(len(ensemble), len(logged), dtype=DTYPES[outcomes[0]], device="cpu")
    if not idle:
        losses[mine] = history.loss.t()
        for own, part in zip(parameters, share.parameters(), strict=True):
            own[mine] = part.detach()
    for source, part in enumerate(shares):
        for tensor in (*parameters, losses):
            send(tensor[part], source)
    state = random.get_state()
    send(state, 0)
    random.set_state(state)
    return replace(history, steps=logged, loss=losses.t().contiguous(), seconds=time.perf_counter() - began)
