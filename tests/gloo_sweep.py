"""Sweeps that each process of `test_distributed.py` takes its share of."""

import functools

import torch
from torch import nn

from perceptriton.mlp import Ensemble, fit_sharded


def fails(output, target):
    raise ArithmeticError("not on this rank")


def sweep(members=5, seed=3, dtype=torch.float32, spoil=False, mixed=False, broken=False):
    """A minibatch sweep over learning rates. The seed stands for what each process has drawn on its own."""
    data = torch.Generator().manual_seed(7)
    x = torch.randn(10, 3, generator=data, dtype=dtype)
    y = torch.rand(members, 10, 2, generator=data, dtype=dtype)
    if spoil:
        y[-1] = 2  # the last member's alone
    # Of torch's losses this one has gradients for targets of another dtype in every version.
    criterion = nn.BCEWithLogitsLoss() if mixed else fails if broken else nn.BCELoss()
    y = y.double() if mixed else y
    ensemble = Ensemble(members, [3, 4, 2], generator=torch.Generator().manual_seed(seed), dtype=dtype)
    generator, lr = torch.Generator().manual_seed(seed), torch.linspace(0.1, 1.0, members)
    numbers = {"momentum": 0.9 * lr, "weight_decay": 0.1 * (1 - lr)}  # of which some are 0
    options = {"steps": 25, "batch_size": 4, "log_every": 6, "lr": None if mixed or broken else lr}
    options["per_member"] = None if mixed or broken else numbers
    options |= {"optimizer": functools.partial(torch.optim.SGD, lr=1.0, momentum=0.5), "generator": generator}
    history = fit_sharded(ensemble, x, y, criterion=criterion, **options)
    return {
        "parameters": [p.detach() for p in ensemble.parameters()],
        "loss": history.loss,
        "steps": history.steps,
        "best": ensemble.best(history, min(2, members)),
        "random": generator.get_state(),
    }


def sweeps(rank):
    """What `test_two_processes_sweep_as_one` looks at."""
    # Only rank 0 has the parameters and the order that count.
    results: list = [sweep(seed=3 + rank), sweep(members=1, seed=3 + rank, dtype=torch.float64)]
    # Losses of another dtype than the parameters, which an idle rank does not see; and errors of one rank alone.
    results.append(sweep(members=1, seed=3 + rank, mixed=True))
    for trouble in ({"spoil": True}, {"broken": rank == 1}):
        try:
            sweep(**trouble)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            results.append(f"{type(error).__name__}: {error}")
    return results
