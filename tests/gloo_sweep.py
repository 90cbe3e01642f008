# SPDX-License-Identifier: Apache-2.0
"""Sweeps that each process of `test_distributed.py` takes its share of."""

import copy
import datetime
import functools
import time

import torch
from torch import nn

from perceptriton.mlp import EarlyStopping, Ensemble, fit_sharded


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


def watched(seed=3, cut=None, members=5):
    """A sweep that members leave one by one; cut: begun anew from what this process had after so many steps."""
    data = torch.Generator().manual_seed(7)
    x, other = torch.randn(10, 3, generator=data), torch.randn(6, 3, generator=data)
    y, targets = torch.rand(10, 2, generator=data), torch.rand(members, 6, 2, generator=data)
    saved: dict = {}

    def run(seed, resume=None):
        ensemble = Ensemble(members, [3, 4, 2], generator=torch.Generator().manual_seed(seed))
        generator, made, schedulers = torch.Generator().manual_seed(seed), [], []

        def optimizer(parameters):
            made.append(torch.optim.Adam(parameters, lr=0.05))
            return made[-1]

        def share_optimizer(parameters):
            own = optimizer(parameters)
            if resume is not None and len(made) == 2:  # the first one is of the whole ensemble, which checks it alone
                own.load_state_dict(saved["optimizer"])
            return own

        def scheduler(own):
            schedulers.append(torch.optim.lr_scheduler.StepLR(own, 2, 0.9))
            if resume is not None and len(schedulers) == 2:
                schedulers[-1].load_state_dict(saved["scheduler"])
            return schedulers[-1]

        def checkpoint(history):
            if history.steps_taken == cut:
                parts = {"ensemble": ensemble.state_dict(), "optimizer": made[-1].state_dict(), "history": history}
                parts["scheduler"] = schedulers[-1].state_dict()
                saved.update(copy.deepcopy(parts))

        if resume is not None:
            ensemble.load_state_dict(saved["ensemble"])
        options = {"steps": 60, "batch_size": 4, "log_every": 5, "generator": generator, "criterion": nn.BCELoss()}
        options |= {"validation": (other, targets), "evaluate_every": 2, "metrics": ["accuracy"]}
        options |= {"stop": EarlyStopping(2, keep_best=True), "keep_state": True, "checkpoint": checkpoint}
        history = fit_sharded(ensemble, x, y, optimizer=share_optimizer, scheduler=scheduler, resume=resume, **options)
        whole = torch.optim.Adam(ensemble.parameters(), lr=0.05)
        whole.load_state_dict(history.state["optimizer"])
        return {
            "parameters": [p.detach() for p in ensemble.parameters()],
            "state": [t for p in ensemble.parameters() for t in whole.state[p].values()],
            "loss": history.loss,
            "validation": list(history.validation.values()),
            "stopped": history.stopped,
            "steps": (history.steps, history.evaluated, history.steps_taken),
            "random": generator.get_state(),
            "rate": (whole.param_groups[0]["lr"], history.state["scheduler"]["last_epoch"]),
        }

    found = run(seed)
    return found if cut is None else run(seed + 10, saved["history"])


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


def late_sweep(rank):
    """Losses of a sweep by a group that waits for a second at most, of which rank 0 has members that take three."""
    group, began = torch.distributed.new_group(timeout=datetime.timedelta(seconds=1)), time.perf_counter()

    def lr(step):
        time.sleep(0.3 * (rank == 0))
        return 0.5

    for members in (1, 3):  # of one, rank 1 has nothing to do
        ensemble = Ensemble(members, [3, 2], generator=torch.Generator().manual_seed(0))
        options = {"criterion": nn.BCELoss(), "optimizer": functools.partial(torch.optim.SGD, lr=1.0), "group": group}
        x, y = torch.ones(4, 3), torch.zeros(4, 2)
        history = fit_sharded(ensemble, x, y, steps=6, log_every=1, lr=lr, **options)
    return history.loss, time.perf_counter() - began


def watched_sweeps(rank):
    """What `test_two_processes_stop_as_one` looks at."""
    return [watched(3 + rank), watched(3 + rank, cut=4), watched(3 + rank, members=1)]
