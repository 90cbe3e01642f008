# SPDX-License-Identifier: Apache-2.0
"""Numbers of each member and step, and the cross entropy, in the loops of the CPU: against torch.optim in fp64."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import relative_error, same_bits, sequential
from torch import nn
from training_cases import RECIPES, states_of, torch_optimizer

from perceptriton.kernels import plan as planning
from perceptriton.kernels.hyperparameters import Hyperparameters
from perceptriton.kernels.loop import TorchLoop
from perceptriton.kernels.native.loop import NativeLoop
from perceptriton.kernels.records import LoopPlan, TrainConfig, TrainPlan

TORCH = TrainPlan("torch", "the test says so")
LOOPS = {layout: TORCH for layout in ("joint", "matrices", "arrays")}
LOOPS |= {f"{rows}x{networks}": TrainPlan("native", "as above", rows, networks) for rows, networks in planning.TILES}
every_loop = pytest.mark.parametrize("loop", LOOPS)
every_number = pytest.mark.parametrize("members", [pytest.param(1, marks=pytest.mark.slow), 3])

CRITERIA = {"bce": nn.BCELoss, "cross_entropy": nn.CrossEntropyLoss}
OWN = {
    "sgd": {},
    "decay": {"weight_decay": (0.0, 0.1, 0.3)},
    "momentum": {"momentum": (0.9, 0.5, 0.0)},
    "dampening": {"momentum": (0.8, 0.0, 0.5), "weight_decay": (0.2, 0.0, 0.1)},
    "nesterov": {"momentum": (0.3, 0.5, 0.9)},
    "adam-decay": {"beta1": (0.5, 0.0, 0.9), "beta2": (0.9, 0.999, 0.0), "weight_decay": (0.1, 0.0, 0.3)},
    "adamw": {"beta1": (0.9, 0.8, 0.0), "weight_decay": (0.2, 0.5, 0.0)},
    "adam": {"beta2": (0.99, 0.9, 0.999)},
    "rmsprop": {"weight_decay": (0.3, 0.0, 0.1)},
    "rmsprop-momentum": {"momentum": (0.9, 0.0, 0.5), "weight_decay": (0.0, 0.2, 0.1)},
}


class Run:
    """Members with their numbers, 7 samples in batches of 3, and a rate for each of 8 steps."""

    def __init__(self, variant, members, loss="bce", reduction="mean", rates="members"):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.members, widths = members, (3, 5, 3)
        self.own = {name: torch.tensor(own[:members], dtype=torch.float64) for name, own in OWN[variant].items()}
        # A config without weight decay has none, whatever its members have.
        shared = {name: 0.7 for name in self.own} | {k: v for k, v in RECIPES[variant].items() if k not in self.own}
        output = "identity" if loss == "cross_entropy" else "sigmoid"
        self.config = TrainConfig(widths, output=output, loss=loss, reduction=reduction, **shared)
        self.initial = [t for k, n in itertools.pairwise(widths) for t in (normal(members, n, k), normal(members, n))]
        self.x, self.y = normal(1, 7, 3), torch.rand(1, 7, 3, generator=generator, dtype=torch.float64)
        self.order = torch.stack([torch.randperm(7, generator=generator) for _ in range(3)])
        highest = 0.05 if self.config.optimizer != "sgd" or reduction == "sum" else 0.5
        lr = torch.linspace(highest / 2, highest, members, dtype=torch.float64)
        self.rates = lr * torch.linspace(1, 0.1, 8, dtype=torch.float64)[:, None]
        if rates == "shared":
            self.rates = self.rates[:, :1]
        elif rates == "constant":
            self.rates = self.rates[:1].expand(8, members)
        self.lr = self.rates[0] if rates == "constant" else None

    def loop(self, monkeypatch, name, pieces=(1, 2, 5), dtype=torch.float64, anew=False):
        """[*parameters, *state, losses] of all steps. anew: each piece is a run of its own."""
        if LOOPS[name] is not TORCH:
            pytest.importorskip("numba", reason="numba is not installed")
        else:
            layout = "matrices" if name == "joint" and self.members > 1 else name
            layout = "matrices" if name == "arrays" and self.members == 1 else layout
            monkeypatch.setattr(planning, "train_loop", lambda *_: LoopPlan(layout, True, "the test says so"))
        parameters = [t.to(dtype, copy=True) for t in self.initial]
        states = len(states_of(self.config))
        # What the state holds before its first step must not matter.
        first, second = ([torch.full_like(p, torch.nan) for p in parameters] if states > i else [] for i in range(2))
        lr = None if self.lr is None else self.lr.to(dtype)
        data, plan = (self.config, parameters, first, second, lr, self.x.to(dtype), self.y.to(dtype), 3), LOOPS[name]
        make = TorchLoop if plan is TORCH else NativeLoop
        run, done, losses = None, 0, []
        for steps in pieces:
            if run is None or anew:
                run = make(*data, done, plan, Hyperparameters(**self.own))
            due = [step for step in range(done, done + steps) if step % 2 == 0]
            losses.append(torch.full((len(due), self.members), torch.nan, dtype=dtype))
            rates = [self.rates[done : done + steps].to(dtype)] if self.lr is None else []
            run.run(self.order[done // 3 :].int(), done, steps, 2, losses[-1], *rates)
            done += steps
        return [*parameters, *first, *second, torch.cat(losses).T]

    def torch(self):
        """The same of an ordinary loop, member by member; a momentum buffer that torch has not is NaN."""
        members = [self._member(e) for e in range(self.members)]
        return [torch.stack(tensors) for tensors in zip(*members, strict=True)]

    def _member(self, e):
        r = replace(self.config, **{name: own[e].item() for name, own in self.own.items()})
        model = sequential(r.widths, r.hidden, r.output, dtype=torch.float64)
        parameters = list(model.parameters())
        with torch.no_grad():
            for p, initial in zip(parameters, self.initial, strict=True):
                p.copy_(initial[e])
        optimizer, names = torch_optimizer(r, parameters, 0.1), states_of(self.config)
        criterion, losses = CRITERIA[r.loss](reduction=r.reduction), []
        x, y = (data[e if len(data) > 1 else 0] for data in (self.x, self.y))
        for step in range(8):
            rows = self.order[step // 3].split(3)[step % 3]
            loss = criterion(model(x[rows]), y[rows])
            losses += [loss.detach()] if step % 2 == 0 else []
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = self.rates[step].expand(self.members)[e].item()
            optimizer.step()
        states = [optimizer.state[p].get(name) for name in names for p in parameters]
        states = [
            torch.full_like(p, torch.nan) if s is None else s
            for s, p in zip(states, parameters * len(names), strict=True)
        ]
        return [*(p.detach() for p in parameters), *states, torch.stack(losses)]


def assert_as_torch(actual, expected, bound=1e-10):
    for a, e in zip(actual, expected, strict=True):
        there = ~e.isnan()
        assert relative_error(a[there], e[there]) < bound


@pytest.mark.parametrize("variant", OWN)
@every_number
@every_loop
def test_numbers_of_each_member_and_step(monkeypatch, loop, members, variant):
    run = Run(variant, members)
    assert_as_torch(run.loop(monkeypatch, loop), run.torch())


@pytest.mark.parametrize("variant", ["decay", "adamw"])
@pytest.mark.parametrize("rates", ["shared", "constant"])
@every_loop
def test_a_rate_for_all_members_or_all_steps(monkeypatch, loop, rates, variant):
    run = Run(variant, 3, rates=rates)
    assert_as_torch(run.loop(monkeypatch, loop), run.torch())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@every_number
@every_loop
def test_cross_entropy(monkeypatch, loop, members, reduction):
    run = Run("momentum", members, "cross_entropy", reduction)
    assert_as_torch(run.loop(monkeypatch, loop), run.torch())
    run.y = torch.eye(3, dtype=torch.float64)[torch.arange(7) % 3][None]
    assert_as_torch(run.loop(monkeypatch, loop), run.torch())
    run.y = torch.stack([run.y[0].roll(e, 0) for e in range(members)])  # each member its own
    assert_as_torch(run.loop(monkeypatch, loop), run.torch())


@every_number
@every_loop
def test_cross_entropy_of_great_logits(monkeypatch, loop, members):
    # Some classes have no chance, of which e^z is 0; of others it would overflow.
    run = Run("sgd", members, "cross_entropy")
    run.initial[2] *= 900
    assert_as_torch(run.loop(monkeypatch, loop), run.torch())


@pytest.mark.parametrize("variant", ["nesterov", "adam-decay", "rmsprop-momentum"])
@every_number
@every_loop
def test_state_of_earlier_steps_is_continued(monkeypatch, loop, members, variant):
    run = Run(variant, members)
    assert_as_torch(run.loop(monkeypatch, loop, anew=True), run.torch())


@pytest.mark.parametrize("variant", ["sgd", "decay", "dampening", "adamw", "rmsprop-momentum"])
@every_number
@every_loop
def test_the_size_of_a_piece_changes_no_bit(monkeypatch, loop, members, variant):
    run = Run(variant, members)
    whole = run.loop(monkeypatch, loop, (8,), torch.float32)
    assert same_bits(run.loop(monkeypatch, loop, (1,) * 8, torch.float32), whole)
    # Nor does a schedule that does not change.
    run.rates = run.rates[:1].expand(8, members)
    assert not same_bits(run.loop(monkeypatch, loop, (8,), torch.float32), whole)
    scheduled, run.lr = run.loop(monkeypatch, loop, (8,), torch.float32), run.rates[0]
    assert same_bits(run.loop(monkeypatch, loop, (3, 5), torch.float32), scheduled)


def test_other_numbers_are_refused(monkeypatch):
    run = Run("adamw", 3)
    expected = run.torch()
    for name in run.own:
        own, run.own = run.own, run.own | {name: run.own[name].flip(0)}
        with pytest.raises(AssertionError):
            assert_as_torch(run.loop(monkeypatch, "arrays"), expected)
        run.own = own
    run.rates = run.rates.flip(0)
    with pytest.raises(AssertionError):
        assert_as_torch(run.loop(monkeypatch, "arrays"), expected)
