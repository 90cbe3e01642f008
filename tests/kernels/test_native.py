# SPDX-License-Identifier: Apache-2.0
"""Compiled loops against the plain torch loop, which is the definition of correct, and against ordinary loops."""

import ctypes
import dataclasses
import errno
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from cases import ACTIVATIONS, FUZZ_BUDGET, FUZZ_SEED, relative_error, same_bits
from torch import nn
from training_cases import LOSSES as CRITERIA
from training_cases import RECIPES, assert_same_state, make, ordinary, relative, state_of, states_of, values

from perceptriton.kernels import plan
from perceptriton.kernels.loop import TorchLoop
from perceptriton.kernels.native import ready
from perceptriton.kernels.native.loop import NativeLoop, compile_all
from perceptriton.kernels.records import Device, TrainConfig, TrainPlan
from perceptriton.kernels.train import plan_train
from perceptriton.mlp import MLP, Ensemble, fit

pytest.importorskip("numba", reason="numba is not installed")

ROOT = Path(__file__).parents[2]
TORCH = TrainPlan("torch", "the test says so")
TILES = {f"{rows}x{networks}": TrainPlan("native", "the test says so", rows, networks) for rows, networks in plan.TILES}
LANES = TILES["4x16"]
SECONDS = ready.seconds  # which a fixture replaces
SOURCES = ("steps", "neurons")  # of compiled loops
EXACT = 1e-10  # two orders of the same fp64 sums over some steps
every_tile = pytest.mark.parametrize("tile", TILES)


@dataclasses.dataclass(frozen=True)
class Case:
    """Members of one config with their data. Pre-activations have a std of 1 to 2: zeros would not pass."""

    config: TrainConfig
    members: int = 3
    samples: int = 5
    batch_size: int | None = None
    shared: tuple[bool, bool] = (True, True)  # inputs, targets

    def tensors(self, dtype):
        """(parameters, x, y, lr)"""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        parameters = []
        for k, n in itertools.pairwise(self.config.widths):
            parameters.append(1.4 * normal(self.members, n, k) / k**0.5)
            parameters += [0.5 * normal(self.members, n)] if self.config.bias else []
        many = [1 if shared else self.members for shared in self.shared]
        columns = self.config.widths[-1] * (1 + self.config.weighted)
        y = torch.rand(many[1], self.samples, columns, generator=generator, dtype=torch.float64)
        rates = (0.01, 0.05) if self.config.optimizer != "sgd" or self.config.reduction == "sum" else (0.1, 0.4)
        lr = torch.linspace(*rates, self.members, dtype=torch.float64)
        return parameters, normal(many[0], self.samples, self.config.widths[0]), y.to(dtype), lr.to(dtype)

    def run(self, chosen, dtype=torch.float32, pieces=(9,), log_every=2, change=None):
        """Parameters, state and losses after steps in these pieces."""
        parameters, x, y, lr = self.tensors(dtype)
        if change:
            change(parameters, x, y)
        config = self.config
        states = len(states_of(config))
        # What the state holds before its first step must not matter.
        first, second = ([torch.full_like(p, torch.nan) for p in parameters] if states > i else [] for i in range(2))
        size = self.batch_size or self.samples
        loop = (NativeLoop if chosen.impl == "native" else TorchLoop)(
            config, parameters, first, second, lr, x, y, size, 0, chosen
        )
        epochs = -(-self.samples // size)
        generator, done, losses, order = torch.Generator().manual_seed(1), 0, [], None
        orders = [torch.randperm(self.samples, generator=generator).int() for _ in range(sum(pieces))]
        for steps in pieces:
            if self.batch_size:
                order = torch.stack(orders[done // epochs : (done + max(steps, 1) - 1) // epochs + 1])
            rows = [step for step in range(done, done + steps) if step % log_every == 0]
            losses.append(torch.full((len(rows), self.members), torch.nan, dtype=dtype))
            loop.run(order, done, steps, log_every, losses[-1])
            done += steps
        return [*parameters, *first, *second, torch.cat(losses)]

    def check(self, chosen, change=None, steps=9):
        exact = self.run(TORCH, torch.float64, (steps,), change=change)
        for actual, expected in zip(self.run(chosen, torch.float64, (steps,), change=change), exact, strict=True):
            assert relative_error(actual, expected) <= EXACT
        ours, theirs = (self.run(one, torch.float32, (steps,), change=change) for one in (chosen, TORCH))
        assert relative(ours, exact) <= 2 * relative(theirs, exact) + 2e-6


# --- numbers -------------------------------------------------------------------------------------------------


@every_tile
@pytest.mark.parametrize("recipe", RECIPES)
def test_optimizers(recipe, tile):
    Case(TrainConfig((3, 4, 2), **RECIPES[recipe])).check(TILES[tile])


@every_tile
def test_no_momentum_is_none_whatever_else_is_asked_for(tile):
    """There are no buffers then, which nothing may be written to."""
    Case(TrainConfig((3, 4, 2), nesterov=True)).check(TILES[tile])
    Case(TrainConfig((3, 4, 2), nesterov=True, dampening=0.5, weight_decay=0.1)).check(TILES[tile])


LOSSES = {"bce": ("bce", "sigmoid"), "logits": ("bce_logits", "identity")}
LOSSES |= {f"{loss}-{output}": (loss, output) for loss in ("mse", "smooth_l1") for output in ACTIVATIONS}


@every_tile
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, reduction, tile):
    name, output = LOSSES[loss]
    config = TrainConfig((3, 4, 2), "tanh", output, loss=name, reduction=reduction, beta=0.4, factor=0.7)
    Case(config, samples=7, batch_size=3).check(TILES[tile])
    Case(dataclasses.replace(config, weighted=True), samples=7, batch_size=3).check(TILES[tile])


@every_tile
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("hidden", ACTIVATIONS)
def test_activations(hidden, bias, tile):
    Case(TrainConfig((3, 5, 4, 2), hidden, bias=bias, momentum=0.5)).check(TILES[tile], steps=5)


# name: members, samples, batch size, shared: why
DATA = {
    "one": (1, 1, None),
    "own": (3, 5, None, (False, False)),
    "own-inputs": (3, 5, 4, (False, True)),
    "own-targets": (17, 5, None, (True, False)),
    "full-tiles": (16, 16, None),
    "ragged": (17, 21, None, (False, False)),  # a block with one network, and a tile with one sample
    "batches": (2, 37, 18),
    "own-batches": (18, 10, 4, (False, False)),
    "single-samples": (2, 5, 1),
}


@every_tile
@pytest.mark.parametrize("data", DATA)
def test_data(data, tile):
    Case(TrainConfig((2, 3, 2), weight_decay=0.01), *DATA[data]).check(TILES[tile])


def test_a_wide_network():
    Case(TrainConfig((33, 65, 17), "relu", "identity", loss="mse"), 1, 20).check(TILES["8x1"])


def test_other_runs_are_refused():
    case = Case(TrainConfig((3, 4, 2), momentum=0.5))
    for change in ({"momentum": 0.51}, {"weight_decay": 0.001}, {"hidden": "tanh"}, {"nesterov": True}):
        other = dataclasses.replace(case, config=dataclasses.replace(case.config, **change))
        assert relative(other.run(LANES, torch.float64), case.run(TORCH, torch.float64)) > 1e4 * EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_functions_are_right_to_the_last_digits(activation, dtype):
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(4000, generator=generator, dtype=torch.float64) * torch.logspace(-6, 1.2, 4000, dtype=torch.float64)
    z = z.to(dtype)
    # The loss of an output y whose target is 0 is y ** 2.
    config = TrainConfig((1, 1), output=activation, bias=False, loss="mse", reduction="sum")
    data = (torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype))
    loop = NativeLoop(config, [z.clone().view(-1, 1, 1)], [], [], torch.zeros_like(z), *data, 1, 0, LANES)
    losses = torch.empty(1, len(z), dtype=dtype)
    loop.run(None, 0, 1, 1, losses)
    exact = getattr(torch, activation)(z.double()).abs()
    found = losses[0].double().sqrt()
    kept = exact**2 > torch.finfo(dtype).tiny
    assert (found / exact - 1)[kept].abs().max() <= 4 * torch.finfo(dtype).eps


# --- denormal numbers ------------------------------------------------------------------------------------------

TINY = {torch.float32: 2.0**-130, torch.float64: 2.0**-1030}  # fewer digits than others of their types
RESTING = {
    "momentum": (TrainConfig((3, 4, 2), "relu", "identity", loss="mse", momentum=0.5), 0),
    "read": (TrainConfig((3, 4, 2), "relu", "sigmoid", loss="bce", momentum=0.5), 0),
    "nesterov": (TrainConfig((3, 4, 2), "relu", "identity", loss="mse", momentum=0.5, nesterov=True), 0),
    "adam": (TrainConfig((3, 4, 2), "relu", "identity", loss="mse", optimizer="adam", beta1=0.5), 0),
    "adamw": (TrainConfig((3, 4, 2), "relu", "identity", loss="mse", optimizer="adamw", beta1=0.5, beta2=0.5), 1),
    "rmsprop": (TrainConfig((3, 4, 2), "relu", "identity", loss="mse", optimizer="rmsprop", beta2=0.5), 0),
    "decay": (TrainConfig((3, 4, 2), "relu", "identity", loss="mse", weight_decay=0.5), None),
}


@every_tile
@pytest.mark.parametrize("dtype", TINY, ids=str)
@pytest.mark.parametrize("resting", RESTING)
def test_what_fades_away_stays_quick(resting, dtype, tile):
    """Of neurons that never fire the gradients are 0: what is kept of them halves, down to numbers that are slow."""
    config, which = RESTING[resting]
    parameters, x, y, lr = Case(config).tensors(dtype)
    x = x.abs()
    parameters[0].fill_(-4 * torch.finfo(dtype).tiny)  # no neuron of the hidden layer fires
    parameters[1].fill_(-4 * torch.finfo(dtype).tiny)
    states = len(states_of(config))
    first, second = ([torch.zeros_like(p) for p in parameters] if states > i else [] for i in range(2))
    fading = (parameters if which is None else (first, second)[which])[:2]
    for t in fading:
        t.fill_(torch.finfo(dtype).tiny * (-4 if which is None else 4))
    lr = torch.ones_like(lr) if which is None else lr
    loop = NativeLoop(config, parameters, first, second, lr, x, y, 5, 7, TILES[tile])
    for steps in (1, 1, 1, 20):
        loop.run(None, 0, steps, 1, torch.empty(steps, 3, dtype=dtype))
        for t in fading:
            assert not ((t != 0) & (t.abs() < torch.finfo(dtype).tiny)).any()
    assert all((t.abs() <= torch.finfo(dtype).tiny).all() for t in fading)


def slow_numbers_are_kept():
    """Whether this thread computes with denormal numbers, in torch and in Python."""
    in_torch = {(torch.full((1,), tiny, dtype=dtype) > 0).item() for dtype, tiny in TINY.items()}
    return in_torch | {TINY[torch.float64] > 0}


@pytest.mark.parametrize("members", [1, 40])
def test_threads_compute_afterwards_as_before(members):
    config = dataclasses.replace(XOR, momentum=0.9)
    for flushes in (True, False):
        assert torch.set_flush_denormal(flushes)
        try:
            Case(config, members).run(LANES)
            assert slow_numbers_are_kept() == {not flushes}
        finally:
            torch.set_flush_denormal(False)


@every_tile
def test_reading_the_loss_changes_no_bit(tile):
    """An output is read as it is, with whatever digits it has, while all else is computed with 0 in its place."""

    def change(parameters, x, y):
        parameters[0].copy_(torch.linspace(-89, -85, 40).view(-1, 1, 1))
        x.fill_(1)
        y.copy_(torch.arange(y.numel()).view(y.shape) % 2)

    case = Case(TrainConfig((1, 1), bias=False, reduction="sum", momentum=0.5), 40, 4)
    seen, unseen = (case.run(TILES[tile], change=change, log_every=every) for every in (1, 10**6))
    assert same_bits(seen[:-1], unseen[:-1])
    theirs = case.run(TORCH, change=change, log_every=1)
    torch.testing.assert_close(seen[-1][0], theirs[-1][0], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-15, 1e-12, 1e-8])
@pytest.mark.parametrize("beta2", [0.99, 0.999, 1 - 1e-7])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
@every_tile
def test_an_eps_beside_which_small_squares_count(tile, optimizer, beta2, eps):
    config = TrainConfig((1, 1), output="identity", bias=False, loss="mse", optimizer=optimizer, eps=eps, beta2=beta2)

    def change(parameters, x, y):
        parameters[0].fill_(1e-3 if eps < 1e-15 else 0)  # nothing beside which an update would be rounded
        x.fill_(3e-19 if eps < 1e-15 else 3e-17)

    ours, theirs = (Case(config).run(one, change=change) for one in (TILES[tile], TORCH))
    for a, b in zip(ours[:1], theirs[:1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3 if eps < 1e-15 else 2e-6, atol=0)


# --- NaN and inf ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
@every_tile
def test_the_logarithm_of_a_saturated_output_is_cut_off(tile, t):
    logits = torch.tensor([-torch.inf, -200, -99, -88.5, -50, -17, 0, 10, 16.5, 50, 103, torch.inf, torch.nan])
    config = TrainConfig((1, 1), bias=False, reduction="sum")
    case = Case(config, members=len(logits), samples=1)

    def change(parameters, x, y):
        parameters[0].copy_(logits.view(-1, 1, 1))
        x.fill_(1)
        y.fill_(t)

    ours, theirs = (case.run(one, pieces=(1,), log_every=1, change=change)[-1][0] for one in (TILES[tile], TORCH))
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=1e-6, equal_nan=True)
    edges = [0, 1, 6, 10, 11, 12]
    torch.testing.assert_close(ours[edges], theirs[edges], rtol=2e-6, atol=1e-7, equal_nan=True)


SPOILED = [torch.nan, torch.inf, -torch.inf]


@every_tile
@pytest.mark.parametrize("where", ["weight", "input", "target"])
@pytest.mark.parametrize("hidden", ACTIVATIONS)
def test_nan_and_inf_are_what_torch_makes_of_them(hidden, where, tile):
    case = Case(TrainConfig((2, 3, 2), hidden, "identity", loss="mse"), 3, 5, shared=(False, False))

    def change(parameters, x, y):
        for member, value in enumerate(SPOILED):
            {"weight": parameters[0], "input": x, "target": y}[where][member, 1, 0] = value

    ours, theirs = (case.run(one, pieces=(1, 1), change=change) for one in (TILES[tile], TORCH))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@every_tile
def test_members_do_not_touch_each_other(tile):
    case = Case(TrainConfig((2, 3, 1), "relu"), 19, 5, shared=(False, False))

    def change(parameters, x, y):
        x[1, 0], x[17, 2] = torch.nan, torch.inf

    before, after = case.run(TILES[tile]), case.run(TILES[tile], change=change)
    others = [e for e in range(19) if e not in (1, 17)]
    for a, b in zip(before[:-1], after[:-1], strict=True):
        assert torch.equal(a[others], b[others])
        assert not b[1].isfinite().all()
    assert torch.equal(before[-1][:, others], after[-1][:, others])


# --- bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["decay", "dampening", "adam", "rmsprop-momentum"])
@every_tile
def test_the_size_of_a_piece_changes_no_bit(tile, recipe):
    case = Case(TrainConfig((3, 4, 2), **RECIPES[recipe]), 3, 10, batch_size=4)
    whole = case.run(TILES[tile], pieces=(23,))
    for pieces in ((1,) * 23, (2, 20, 1), (0, 7, 16)):
        assert same_bits(case.run(TILES[tile], pieces=pieces), whole)


@every_tile
def test_shared_samples_are_read_where_they_are(tile):
    config = TrainConfig((3, 4, 2))
    parameters, x, y, lr = Case(config).tensors(torch.float32)
    loop = NativeLoop(config, parameters, [], [], lr, x, y, 2, 0, TILES[tile])
    assert [data.ctypes.data for data in loop.data] == [x.data_ptr(), y.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_number_of_threads_changes_no_bit(dtype):
    case, results = Case(TrainConfig((3, 4, 2), optimizer="adam"), 161, 6, shared=(False, False)), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(case.run(LANES, dtype))
    torch.set_num_threads(before)
    assert all(same_bits(other, results[0]) for other in results[1:])


@every_tile
def test_a_member_alone_is_what_it_is_among_others(tile):
    case = Case(TrainConfig((3, 2, 2), optimizer="adam"), 18, 3, batch_size=2)
    together = case.run(TILES[tile])
    parameters, _, _, lr = case.tensors(torch.float32)
    for e in (0, 17):
        alone = dataclasses.replace(case, members=1)
        alone.__dict__["tensors"] = lambda _, e=e: ([p[e : e + 1] for p in parameters], *case_data(case), lr[e : e + 1])
        single = alone.run(TILES[tile])
        assert same_bits([t[0] for t in single[:-1]], [t[e] for t in together[:-1]])
        assert same_bits(single[-1][:, 0], together[-1][:, e])


def case_data(case):
    _, x, y, _ = case.tensors(torch.float32)
    return x, y


# --- in fit --------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr),
    "sgd-decay": lambda p, lr: torch.optim.SGD(p, lr, weight_decay=0.01),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, dampening=0.2),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.7, nesterov=True, weight_decay=0.01),
    "adam": lambda p, lr: torch.optim.Adam(p, 0.1 * lr, (0.8, 0.99), weight_decay=0.01),
    "adamw": lambda p, lr: torch.optim.AdamW(p, 0.1 * lr),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, 0.05 * lr, 0.9, weight_decay=0.01),
    "rmsprop-momentum": lambda p, lr: torch.optim.RMSprop(p, 0.03 * lr, momentum=0.6),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_is_taken_over_and_handed_back(optimizer):
    model, x, y = make((3, 4, 2), "tanh", "sigmoid", True, 7)
    twin, _, _ = make((3, 4, 2), "tanh", "sigmoid", True, 7)
    own, other = (OPTIMIZERS[optimizer](m.parameters(), 0.2) for m in (model, twin))
    ordinary(model, x, y, nn.BCELoss(), own, 5)
    for steps in (20, 1):
        history = fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=steps, impl="native")
        assert history.path == "native"
        assert history.seconds >= history.setup_seconds >= 0
    ordinary(model, x, y, nn.BCELoss(), own, 4)
    ordinary(twin, x, y, nn.BCELoss(), other, 30)
    assert relative(model.parameters(), twin.parameters()) <= EXACT
    assert_same_state(own, other, EXACT)


@pytest.mark.slow
@pytest.mark.fuzz
def test_random_configurations_train_as_an_ordinary_loop():
    for seed in range(FUZZ_SEED, FUZZ_SEED + max(1, int(1000 * FUZZ_BUDGET))):
        draw = random.Random(f"native {seed}")
        criterion, output = CRITERIA[draw.choice(list(CRITERIA))]
        sizes = [draw.randint(1, 9) for _ in range(draw.randint(2, 5))]
        samples, bias, hidden = draw.randint(1, 40), draw.random() < 0.8, draw.choice(ACTIVATIONS)
        batch_size = draw.choice([None, None, 1, 3, 16, samples])
        steps, log_every = draw.randint(1, 6), draw.randint(1, 3)
        name = draw.choice(list(OPTIMIZERS))
        where = f"FUZZ_SEED={seed}: {sizes} {hidden} {criterion} {name}, {samples} samples by {batch_size}"
        # The sum of many losses diverges sooner.
        rate = 0.02 if criterion.reduction == "sum" else 0.1
        model, x, y = make(sizes, hidden, output, bias, samples, seed=seed)
        # torch's BCELoss cuts its gradient off where its input is nearly 0 or 1; fit, as on logits, does not.
        logits = isinstance(criterion, nn.BCELoss)
        wanted = nn.BCEWithLogitsLoss(reduction=criterion.reduction) if logits else criterion
        twin, _, _ = make(sizes, hidden, "identity" if logits else output, bias, samples, seed=seed)
        own, other = (OPTIMIZERS[name](m.parameters(), rate) for m in (model, twin))
        options = {"batch_size": batch_size, "log_every": log_every, "generator": torch.Generator()}
        options["generator"].manual_seed(seed)
        history = fit(model, x, y, criterion=criterion, optimizer=own, steps=steps, impl="native", **options)
        options["generator"].manual_seed(seed)
        losses = ordinary(twin, x, y, wanted, other, steps, **options)
        if not (losses.isfinite().all() and losses.abs().max() < 1e3):
            continue
        assert relative(model.parameters(), twin.parameters()) <= 1e-8, where
        assert relative([torch.ones(1), *state_of(own)[1]], [torch.ones(1), *state_of(other)[1]]) <= 1e-8, where
        # The logarithm of 1 - p has no digits left where p is nearly 1.
        if not logits or max(sum(losses.tolist()), twin(x).abs().max().item()) < 5:
            assert relative([history.loss], [losses]) <= 1e-9, where


# --- which when ----------------------------------------------------------------------------------------------

CPU, XOR = Device("cpu"), TrainConfig((2, 2, 1))


def chosen(members=1, batch=4, config=XOR, dtype="float32", steps=None, waits=(0.0, 0.0, 0.0), **options):
    return plan.train(members, batch, None, config, dtype, CPU, steps=steps, native_seconds=waits, **options)


def test_small_networks_are_compiled_and_wide_ones_are_not():
    assert (chosen().rows, chosen().networks) == (4, 1)
    wide = chosen(config=TrainConfig((8, 16, 1)), batch=9)
    assert (wide.rows, wide.networks) == (8, 1)
    assert (chosen(64).rows, chosen(64).networks) == (4, 16)
    assert chosen(dtype="torch.float64").impl == "native"
    assert chosen(config=TrainConfig((784, 32, 10)), batch=64).impl == "native"
    assert chosen(config=TrainConfig((784, 256, 10)), batch=64).impl == "torch"
    assert chosen(dtype="bfloat16").impl == "torch"


def test_a_short_run_does_not_wait_for_compiled_loops():
    waits = (0.5, 0.5, 0.5)
    found = chosen(steps=1000, waits=waits)
    assert found.impl == "torch"
    assert re.fullmatch(r"compiled loops would save 0\.007\d s, and begin 0\.5 s later", found.reason)
    assert chosen(steps=1_000_000, waits=waits).impl == "native"
    assert chosen(steps=1000).impl == "native"
    assert chosen(steps=1000, waits=waits, impl="native").impl == "native"
    assert chosen(config=TrainConfig((2, 0, 1)), impl="native").impl == "torch"


def test_short_runs_together_are_worth_a_wait(monkeypatch):
    monkeypatch.setattr(ready, "seconds", SECONDS)
    monkeypatch.setattr(ready, "_wait", lambda rows: 0.05)
    monkeypatch.setattr(ready, "loaded", set())
    model, x, y = make((2, 3, 1), "tanh", "sigmoid", True, 4)
    own, paths = torch.optim.SGD(model.parameters(), 0.1), []
    while "native" not in paths:
        assert len(paths) < 20
        paths.append(fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=1000).path)
    later = plan_train(1, 4, None, TrainConfig((2, 3, 1)), x.dtype, x.device, steps=1000)
    assert len(paths) > 2
    assert ready.missed == later.missed == 0.0
    assert later.impl == "native"
    monkeypatch.setattr(ready, "missed", 0.01)  # of others, whose loops are not there yet
    assert fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=1000).path == "native"
    assert ready.missed == 0.01


def test_without_numba(monkeypatch):
    monkeypatch.setattr(ready, "refusal", lambda: "no numba")
    assert plan_train(1, 4, None, XOR, torch.float32, torch.device("cpu")) == TrainPlan("torch", "no numba")
    with pytest.raises(NotImplementedError, match=r"^impl='native': no numba$"):
        plan_train(1, 4, None, XOR, torch.float32, torch.device("cpu"), "native")


class Broken(types.ModuleType):
    """A module whose library does not load."""

    def __getattr__(self, name):
        raise OSError("no such library")


@pytest.mark.parametrize("module", [None, Broken("numba.core")], ids=["none", "broken"])
def test_a_numba_that_cannot_be_imported_is_none(module, monkeypatch):
    monkeypatch.setattr(ready, "seconds", lambda _: (0.0, 0.0, 0.0))
    monkeypatch.setitem(sys.modules, "numba.core", module)
    results = []
    for impl in (None, "torch"):
        model, x, y = make((2, 3, 1), "tanh", "sigmoid", True, 4)
        own = torch.optim.SGD(model.parameters(), 0.1)
        assert fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=9, impl=impl).path == "torch"
        results.append(values(model))
    assert same_bits(*results)
    with pytest.raises(NotImplementedError, match=r"^impl='native': .*numba"):
        fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=9, impl="native")


def test_what_is_missing_is_said(monkeypatch):
    ask = ready.refusal.__wrapped__
    assert ask() is None
    for module in (None, types.ModuleType("numba")):
        monkeypatch.setitem(sys.modules, "numba", module)
        assert ask() == "compiled loops need numba, which is not installed: pip install 'perceptriton[native]'"


def test_what_is_ready_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(ready, "seconds", SECONDS)
    for kind, seconds in compile_all():
        assert kind
        assert seconds >= 0
    assert ready.seconds(torch.float32) == ready.seconds(torch.float64) == (0, 0, 0)
    monkeypatch.setattr(ready, "loaded", {(torch.float32, 4, 1)})
    monkeypatch.setattr(ready, "FOLDER", tmp_path)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nowhere"))
    (tmp_path / "__pycache__").mkdir()
    assert ready.seconds(torch.float32) == (plan.COMPILE_SECONDS, 0, plan.COMPILE_SECONDS)
    steps, neurons = (tmp_path / "__pycache__" / f"{ready.file_name(f'{name}.train')}.nbi" for name in SOURCES)
    steps.write_text("of other sources")
    assert ready.seconds(torch.float32) == (plan.COMPILE_SECONDS, 0, plan.COMPILE_SECONDS)
    steps.write_text(f"of {ready.fingerprint()}")
    assert ready.seconds(torch.float32) == (plan.COMPILE_SECONDS, 0, plan.LOAD_SECONDS)
    neurons.write_text(f"of {ready.fingerprint()}")
    assert ready.seconds(torch.float32) == (plan.LOAD_SECONDS, 0, plan.LOAD_SECONDS)


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
def test_what_numba_keeps_elsewhere_is_found(variable, monkeypatch, tmp_path):
    """Where it was told to, and where it may not write beside the sources: as numba's own locators have it."""
    from numba import config
    from numba.core import caching

    monkeypatch.setattr(ready, "seconds", SECONDS)
    monkeypatch.setattr(ready, "loaded", set())
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path) if variable == "NUMBA_CACHE_DIR" else "")
    # Beside these sources something may lie already.
    monkeypatch.setattr(ready, "FOLDER", tmp_path / "site-packages" / "native")
    name = "UserProvidedCacheLocator" if variable == "NUMBA_CACHE_DIR" else "UserWideCacheLocator"
    kind = getattr(caching, name, None) or getattr(caching, f"_{name}")
    source = ready.FOLDER / "steps.py"
    source.parent.mkdir(parents=True)
    source.touch()
    folder = Path(kind.from_function(lambda: None, str(source)).get_cache_path())
    assert tmp_path in folder.parents
    assert ready.seconds(torch.float32)[-1] == plan.COMPILE_SECONDS
    (folder / f"{ready.file_name('steps.train')}.nbi").write_text(ready.fingerprint())
    assert ready.seconds(torch.float32)[-1] == plan.LOAD_SECONDS


# --- code on disk --------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys
import torch
from torch import nn
from perceptriton.mlp import Ensemble, fit
def train():
    ensemble = Ensemble(40, [2, 2, 1], generator=torch.Generator().manual_seed(1))
    x, y = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([[0.0], [1], [1], [0]])
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=1.0)
    history = fit(ensemble, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=50, log_every=10, impl="native")
    return history.loss.double().sum().item().hex()
"""


def start(script, folder, before=(), **environment):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder), "PYTHONWARNINGS": "ignore"} | environment
    command = [*before, sys.executable, "-c", SCRIPT + script]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def printed(process):
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    return output.split()


@pytest.mark.more
def test_two_processes_compile_at_once_and_a_third_reads(tmp_path):
    results = [printed(process) for process in [start("print(train())", tmp_path) for _ in range(2)]]
    assert [path.suffix for path in sorted(tmp_path.rglob("steps.train.*"))] == [".nbc", ".nbi"]
    # Where nothing can be compiled, all comes from the disk.
    script = "from numba.core import compiler; compiler.compile_extra = None; print(train())"
    results.append(printed(start(script, tmp_path)))
    assert results[0] == results[1] == results[2]


@pytest.mark.slow
def test_a_fork_trains_as_its_parent(tmp_path):
    script = """
torch.set_num_threads(2)
first = train()
if not os.fork():
    assert train() == first
    os._exit(7)
_, status = os.wait()
print(os.waitstatus_to_exitcode(status), train() == first)
"""
    chosen_folder = os.environ.get("NUMBA_CACHE_DIR", "")
    assert printed(start(script, chosen_folder)) == ["7", "True"]


@pytest.mark.slow
def test_forks_beside_a_thread_that_trains(tmp_path):
    """A child has the locks of its parent's threads, but none of the threads that would let go of them."""
    script = """
import faulthandler, threading
first, ended = train(), False
def forever():
    while not ended:
        assert train() == first
beside = threading.Thread(target=forever)
beside.start()
statuses = set()
for _ in range(20):
    if not os.fork():
        faulthandler.dump_traceback_later(30, exit=True)
        os._exit(7 if train() == first else 8)
    statuses.add(os.waitstatus_to_exitcode(os.wait()[1]))
ended = True
beside.join()
print(*statuses)
"""
    chosen_folder = os.environ.get("NUMBA_CACHE_DIR", "")
    assert printed(start(script, chosen_folder)) == ["7"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_threads_leave_the_place_that_their_beginner_is_bound_to(monkeypatch):
    """OpenMP binds the thread that imports torch. Threads that it begins inherit that: all would share one CPU."""
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    script = """
from perceptriton.kernels.native import steps
own, used, real = os.sched_getaffinity(0), set(), steps.train
def noting(*arguments):
    used.add(frozenset(os.sched_getaffinity(0)))
    return real(*arguments)
torch.set_num_threads(2)
steps.train = noting
train()
print(len(own), own == os.sched_getaffinity(0), used - {frozenset(own)} == {frozenset(ALLOWED)})
used.clear()
pinned = ALLOWED - own  # not where OpenMP binds the first thread
os.sched_setaffinity(0, pinned)
train()
print(used == {frozenset(pinned)})
"""
    script = script.replace("ALLOWED", repr(os.sched_getaffinity(0)))
    assert printed(start(script, os.environ.get("NUMBA_CACHE_DIR", ""))) == ["1", "True", "True", "True"]


@pytest.mark.more
def test_numba_may_be_switched_off_for_others(tmp_path):
    script = "import numba; numba.config.DISABLE_JIT = 1; print(train(), numba.config.DISABLE_JIT)"
    assert printed(start(script, tmp_path)) == [printed(start("print(train())", tmp_path))[0], "1"]


# Where root runs the tests: itself without the capability by which no folder is closed to it.
UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override"] if hasattr(os, "getuid") and os.getuid() == 0 else []


@pytest.fixture
def close():
    """close(folder): nothing below it can be written to by processes that start with UNPRIVILEGED."""
    closed = []

    def close(folder):
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
            closed.append(path)
        try:
            writable = subprocess.run([*UNPRIVILEGED, "test", "-w", folder], check=False).returncode != 1
        except FileNotFoundError as error:
            pytest.skip(f"nothing closes a folder here: {error}")
        if writable:
            pytest.skip("nothing closes a folder to this user")

    yield close
    for path in closed:
        path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["beside", "chosen"])
def test_code_is_read_where_nothing_can_be_written(where, close, tmp_path):
    """What an administrator has compiled, by users of that install: in a container's image, for one."""
    package, home = tmp_path / "site" / "perceptriton", tmp_path / "home"
    for source, target in (("mlp/_front", ""), ("kernels", "kernels"), ("mlp", "mlp")):
        shutil.copytree(ROOT / source, package / target, ignore=shutil.ignore_patterns("__pycache__"))
    home.mkdir()
    path = os.pathsep.join([str(package.parent), *sys.path])
    environment = {"PYTHONPATH": path, "HOME": str(home), "XDG_CACHE_HOME": ""}
    folder = package / "chosen" if where == "chosen" else ""
    compiled = printed(start("print(train())", folder, **environment))
    close(package)
    script = """
from numba.core import compiler
from perceptriton.kernels.native import ready
compiler.compile_extra = None
print(ready.seconds(torch.float32)[-1])
"""
    read = printed(start(f"{script}print(train())", folder, UNPRIVILEGED, **environment))
    assert read == [str(plan.LOAD_SECONDS), *compiled]
    functions = package / "kernels" / "native" / "functions.py"
    functions.chmod(0o644)
    functions.write_text(f"{functions.read_text()}# changed\n")
    assert printed(start(script, folder, UNPRIVILEGED, **environment)) == [str(plan.COMPILE_SECONDS)]
    assert list(home.iterdir()) == []


def plus(a):
    return a + 1


def test_code_is_read_from_all_folders_and_written_to_one_that_takes_it(monkeypatch, tmp_path):
    from numba import njit

    from perceptriton.kernels.native import cache

    closed, taken, other = tmp_path / "file" / "below", tmp_path / "taken", tmp_path / "other"
    closed.parent.touch()
    monkeypatch.setattr(ready, "folders", lambda _: [closed, taken])
    assert cache.cached(njit(plus))(2) == 3
    assert len(list(taken.iterdir())) == 2
    for folders in ([taken, other], [other, taken]):
        monkeypatch.setattr(ready, "folders", lambda _, folders=folders: folders)
        again = cache.cached(njit(plus))
        assert again(2) == 3
        assert sum(again.stats.cache_hits.values()) == 1
    assert not other.exists()
    monkeypatch.setattr(ready, "folders", lambda _: [closed])
    assert cache.cached(njit(plus))(2) == 3


def test_a_chosen_folder_stands_alone_unless_it_is_closed(tmp_path):
    (tmp_path / "file").touch()
    beside, own = ready.folders(None)
    alone, passed_over = tmp_path / "not" / "yet", tmp_path / "file"
    assert [folder.parent for folder in ready.folders(str(alone))] == [alone]
    first, *others = ready.folders(str(passed_over))
    assert first.parent == passed_over
    assert others == [beside, own]


def test_addresses_of_this_process_are_not_kept(monkeypatch, tmp_path):
    from numba import njit

    from perceptriton.kernels.native import cache

    absolute = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long)(abs)
    monkeypatch.setattr(ready, "folders", lambda _: [tmp_path])
    assert cache.cached(njit(lambda a: absolute(a)))(-3) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_a_damaged_file_cost_time_alone(monkeypatch, tmp_path):
    from numba import config, njit

    from perceptriton.kernels.native import cache

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
        assert cache.cached(njit(plus))(2) == 3
    assert not list(tmp_path.rglob("*.nbc"))
    assert cache.cached(njit(plus))(2) == 3
    (data,) = tmp_path.rglob("*.nbc")
    whole = data.read_bytes()
    data.write_bytes(whole[:100])
    assert cache.cached(njit(plus))(2) == 3
    assert len(data.read_bytes()) > 100
    again = cache.cached(njit(plus))
    assert again(2) == 3
    assert sum(again.stats.cache_hits.values()) == 1
    monkeypatch.setattr(ready, "fingerprint", lambda: "of other sources")
    other = cache.cached(njit(plus))
    assert other(2) == 3
    assert sum(other.stats.cache_hits.values()) == 0
    (index,) = tmp_path.rglob("*.nbi")
    whole = index.read_bytes()
    for damaged in (b"", whole[:40], whole[:-9]):
        index.write_bytes(damaged)
        assert cache.cached(njit(plus))(2) == 3
        again = cache.cached(njit(plus))
        assert again(2) == 3
        assert sum(again.stats.cache_hits.values()) == 1


def test_an_ensemble_with_rates_of_its_own():
    results = []
    for impl in ("native", "torch"):
        ensemble = Ensemble(20, [2, 3, 1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x, y = torch.ones(20, 3, 2, dtype=torch.float64).cumsum(0) / 20, torch.full((3, 1), 0.3, dtype=torch.float64)
        own = torch.optim.SGD(ensemble.parameters(), lr=1.0, momentum=0.5)
        options = {"steps": 30, "lr": torch.linspace(0.1, 1, 20), "impl": impl}
        history = fit(ensemble, x, y.expand(20, 3, 1), criterion=nn.BCELoss(), optimizer=own, **options)
        assert history.path == impl
        results.append(values(ensemble))
    assert relative(*results) <= EXACT


def test_a_model_in_single_precision_keeps_its_parameters():
    model = MLP([2, 2, 1])
    parameters = list(model.parameters())
    own = torch.optim.SGD(model.parameters(), lr=0.5)
    fit(model, torch.ones(4, 2), torch.ones(4, 1), criterion=nn.BCELoss(), optimizer=own, steps=3, impl="native")
    assert all(a is b and a.grad is None for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_the_default_device_is_of_no_account(optimizer):
    results = []
    for device in ("cpu", "meta"):
        model, x, y = make((2, 3, 1), "tanh", "sigmoid", True, 4)
        own = OPTIMIZERS[optimizer](model.parameters(), 0.1)
        options = {"steps": 3, "log_every": 1, "batch_size": 3, "impl": "native"}
        with torch.device(device):
            fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, generator=torch.Generator("cpu"), **options)
        results.append(values(model))
    assert same_bits(*results)


@every_tile
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_squares_stay_finite_as_long_as_those_of_torch(tile, optimizer):
    def change(parameters, x, y):
        y[:] = -1e20

    config = TrainConfig((3, 17, 16), output="identity", loss="mse", reduction="sum", optimizer=optimizer)
    for actual, expected in zip(*(Case(config).run(one, change=change) for one in (TILES[tile], TORCH)), strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
