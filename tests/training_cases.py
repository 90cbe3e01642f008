# SPDX-License-Identifier: Apache-2.0
"""The networks, losses and optimizers that whole training loops are tested with, and the loop that they must equal."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from perceptriton.kernels.loop import TorchLoop
from perceptriton.mlp import MLP

XOR_X = ((0, 0), (0, 1), (1, 0), (1, 1))
XOR_Y = ((0,), (1,), (1,), (0,))

# name: (sizes, hidden, output, bias, samples): why
NETS = {
    "xor": ((2, 2, 1), "sigmoid", "sigmoid", True, 4),
    "deep": ((2, 10, 10, 10, 1), "sigmoid", "sigmoid", True, 4),
    "one-layer": ((3, 2), "sigmoid", "sigmoid", True, 5),  # nothing to propagate
    "tanh": ((4, 6, 3), "tanh", "sigmoid", True, 7),
    "relu-bare": ((5, 8, 8, 2), "relu", "sigmoid", False, 9),  # no column for a bias
    "linear": ((3, 4, 2), "identity", "sigmoid", True, 6),
    "medium": ((32, 64, 5), "sigmoid", "sigmoid", True, 64),  # a matrix for each layer
}

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "sgd-decay": lambda p: torch.optim.SGD(p, lr=0.5, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
    "momentum-decay": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.01),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8, dampening=0.3, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adam-decay": lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003, alpha=0.95, eps=1e-3),
    "rmsprop-momentum": lambda p: torch.optim.RMSprop(p, lr=0.005, eps=1e-4, weight_decay=0.05, momentum=0.7),
}
STATEFUL = ("momentum", "nesterov", "adam", "adamw", "rmsprop", "rmsprop-momentum")
SLOW_OPTIMIZERS = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("momentum", "nesterov", "adamw", "rmsprop-momentum")
]
# The same kinds as fields of a TrainConfig.
RECIPES = {
    "sgd": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
    "adam": {"optimizer": "adam"},
    "adam-decay": {"optimizer": "adam", "weight_decay": 0.1, "beta1": 0.5, "beta2": 0.9, "eps": 1e-3},
    "adam-no-averages": {"optimizer": "adam", "beta1": 0.0, "beta2": 0.0, "eps": 0.1},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.3},
    "rmsprop": {"optimizer": "rmsprop", "beta2": 0.9, "eps": 1e-3},
    "rmsprop-momentum": {"optimizer": "rmsprop", "weight_decay": 0.1, "beta2": 0.8, "momentum": 0.6, "eps": 1e-2},
}
ADAM_STATES = ("exp_avg", "exp_avg_sq")
STATES = {"sgd": (), "adam": ADAM_STATES, "adamw": ADAM_STATES, "rmsprop": ("square_avg",)}

# name: (criterion, output activation)
LOSSES = {
    "bce": (nn.BCELoss(), "sigmoid"),
    "bce-sum": (nn.BCELoss(reduction="sum"), "sigmoid"),
    "logits": (nn.BCEWithLogitsLoss(), "identity"),
    "logits-sum": (nn.BCEWithLogitsLoss(reduction="sum"), "identity"),
    "mse-sigmoid": (nn.MSELoss(), "sigmoid"),
    "mse-tanh": (nn.MSELoss(), "tanh"),
    "mse-relu": (nn.MSELoss(), "relu"),
    "mse-sum": (nn.MSELoss(reduction="sum"), "identity"),
}


def needs_images(name):
    """Skips a test of the lesson on digits where nothing has them."""
    if name == "digits":
        pytest.importorskip("sklearn", reason="scikit-learn, which has the images, is not installed")


def states_of(config):
    """The names of what torch.optim keeps for each parameter."""
    return STATES[config.optimizer] + (("momentum_buffer",) if config.momentum else ())


def torch_optimizer(config, parameters, lr, **options):
    """That of torch.optim which a TrainConfig is about."""
    options |= {"lr": lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        options |= {"momentum": config.momentum, "dampening": config.dampening, "nesterov": config.nesterov}
        return torch.optim.SGD(parameters, **options)
    options["eps"] = config.eps
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, alpha=config.beta2, momentum=config.momentum, **options)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(parameters, betas=(config.beta1, config.beta2), **options)


def needs_numba(impl):
    """Skips a test of compiled loops where there can be none."""
    if impl == "native":
        pytest.importorskip("numba", reason="numba is not installed")


def two_ranks(script, folder):
    """What each of two processes of torch.distributed has saved that run `script` RANK RANKS STORE OUT."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), "2", str(folder / "store"), str(folder / f"{rank}.pt")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=100)
            assert process.returncode == 0, output
    finally:
        # One that fails leaves the other waiting.
        for process in processes:
            process.kill()
            process.communicate()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def xor(dtype=torch.float32):
    return torch.tensor(XOR_X, dtype=dtype), torch.tensor(XOR_Y, dtype=dtype)


def make_net(name, dtype=torch.float64, seed=0):
    """A network with pre-activations of std 1 to 2, and data for it.

    The gradients of a default-initialized sigmoid net are so small that a loop which does nothing passes.
    """
    sizes, hidden, output, bias, samples = NETS[name]
    return make(sizes, hidden, output, bias, samples, dtype, seed)


def make(sizes, hidden, output, bias, samples, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    model = MLP(sizes, hidden, output, bias, dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1.4 * normal(*p.shape) / p.shape[1] ** 0.5 if p.dim() == 2 else 0.5 * normal(*p.shape))
    y = torch.rand(samples, sizes[-1], generator=generator, dtype=torch.float64).to(dtype)
    return model, normal(samples, sizes[0]), y


def ordinary(model, x, y, criterion, optimizer, steps, batch_size=None, generator=None, log_every=1, rates=None):
    """The loop that everyone writes; losses before the update of every log_every-th step. rates: one for each step."""
    losses, batches = [], iter(())
    kept = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group in optimizer.param_groups if rates else ():
            group["lr"] = rates[step]
        if batch_size is None:
            rows = slice(None)
        else:
            rows = next(batches, None)
            if rows is None:
                batches = iter(torch.randperm(len(x), generator=generator).split(batch_size))
                rows = next(batches)
        optimizer.zero_grad()
        loss = criterion(model(x[rows]), y[rows])
        if step % log_every == 0:
            losses.append(loss.item())
        loss.backward()
        optimizer.step()
    for group, lr in zip(optimizer.param_groups, kept, strict=True):
        group["lr"] = lr
    for p in model.parameters():
        p.grad = None
    return torch.tensor(losses, dtype=torch.float64)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def interrupt_after(chunks, monkeypatch):
    """A chunk of the loop in plain torch raises KeyboardInterrupt in its last moment: the one of that number."""
    run, calls = TorchLoop.run, []

    def interrupted(*arguments):
        run(*arguments)
        calls.append(1)
        if len(calls) == chunks:
            raise KeyboardInterrupt

    monkeypatch.setattr(TorchLoop, "run", interrupted)


def chunks_of(*sizes):
    """In place of the chunks by time: these sizes in turn."""

    def chunks(start, steps, every=0, most=None):
        turn = 0
        while start < steps:
            count = min(sizes[turn % len(sizes)], steps - start, every - start % every if every else steps)
            yield start, count
            start, turn = start + count, turn + 1

    return chunks


def relative(actual, expected):
    """|actual - expected| / |expected| over all tensors together, in fp64."""
    actual, expected = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (actual, expected))
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def state_of(optimizer):
    """(names and shapes, values) of everything that the optimizer has stored."""
    entries = [
        sorted(optimizer.state[p].items()) for g in optimizer.param_groups for p in g["params"] if p in optimizer.state
    ]
    flat = list(itertools.chain.from_iterable(entries))
    return [(name, v.shape, v.dtype, v.device, v.requires_grad) for name, v in flat], [v for _, v in flat]


def assert_same_state(actual, expected, bound):
    """The same entries of the same kinds, and the same values but for rounding."""
    kinds, values = state_of(actual)
    expected_kinds, expected_values = state_of(expected)
    assert kinds == expected_kinds
    assert actual.state_dict()["param_groups"] == expected.state_dict()["param_groups"]
    if values:
        assert relative(values, expected_values) <= bound
