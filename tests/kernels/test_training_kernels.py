# SPDX-License-Identifier: Apache-2.0
"""The training loops in one launch against torch.optim in fp64: on a GPU, or on the CPU in triton's interpreter."""

import dataclasses
import itertools

import pytest
import torch
from cases import (
    ACTIVATIONS,
    FLOOR,
    NO_KERNELS,
    assert_as_good_as_the_worst,
    assert_near,
    core,
    kernel_device,
    poisoned,
    relative_error,
    sequential,
)
from torch import nn
from training_cases import RECIPES, states_of, torch_optimizer

from perceptriton.kernels.hyperparameters import Hyperparameters
from perceptriton.kernels.records import TrainConfig, TrainPlan

DEVICE = kernel_device()
if DEVICE is None:
    pytest.skip(NO_KERNELS, allow_module_level=True)

train = pytest.importorskip("perceptriton.kernels.gpu.train")
pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.interpreter, pytest.mark.gpu]

CRITERIA = {
    "bce": nn.BCELoss,
    "bce_logits": nn.BCEWithLogitsLoss,
    "mse": nn.MSELoss,
    "cross_entropy": nn.CrossEntropyLoss,
    "smooth_l1": nn.SmoothL1Loss,
}

LANE = TrainPlan("lane", "the test says so", rows=2, networks=4, num_warps=1)
BLOCK = TrainPlan("block", "the test says so", rows=16, num_warps=4)
SPREAD = dataclasses.replace(BLOCK, programs=3)
# The interpreter runs the programs of a spread batch one after the other.
every_plan = pytest.mark.parametrize(
    "plan", [LANE, BLOCK, pytest.param(SPREAD, marks=pytest.mark.slow)], ids=["lane", "block", "spread"]
)
XOR = TrainConfig((2, 2, 1))


def guarded(*shape):
    """A contiguous tensor, aligned to 16 bytes, inside a longer one that is full of NaN, and the longer one."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 64,), torch.nan, device=DEVICE)
    return whole[32 : 32 + size].view(shape), whole


class Run:
    """Members of one config with their data: what the kernels make of them, and what torch does, one by one.

    Pre-activations have a std of 1 to 2: in nets as they are initialized by default gradients are near 0, and zeros
    would pass.
    """

    def __init__(self, config, members=3, samples=4, batch_size=None, shared=True, epochs=0, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        widths = config.widths
        self.config, self.members, self.samples = config, members, samples
        self.batch_size = batch_size or samples
        self.batches = -(-samples // self.batch_size)
        gains = [1.4] + [4.0 if config.hidden == "sigmoid" else 1.6] * (len(widths) - 2)
        self.initial = []
        for gain, (k, n) in zip(gains, itertools.pairwise(widths), strict=True):
            self.initial += [gain * normal(members, n, k) / k**0.5, 0.5 * normal(members, n)]
        if not config.bias:
            self.initial = self.initial[::2]
        many = 1 if shared else members
        self.x = normal(many, samples, widths[0])
        self.y = torch.rand(many, samples, widths[-1] * (1 + config.weighted), generator=generator)
        orders = [torch.randperm(samples, generator=generator).int() for _ in range(epochs)]
        self.order = torch.stack(orders) if orders else None
        adaptive = config.optimizer != "sgd"
        self.lr = torch.linspace(0.02, 0.1, members) if adaptive else torch.linspace(0.2, 0.9, members)
        self.own = {}  # the Hyperparameters, fp64
        self.rates = None  # a schedule, (steps, members) or (steps, 1)
        self.factors = None  # of losses, the same
        self.kinds = ["weight", "bias"] if config.bias else ["weight"]
        self.states = states_of(config)

    # --- torch

    def torch(self, steps, dtype=torch.float64, log_every=0):
        """(parameters, states, losses), stacked over members, after each number of steps in `steps`."""
        members = [self._torch_member(e, steps, dtype, log_every) for e in range(self.members)]
        results = []
        for snapshots in zip(*members, strict=True):
            parameters = [torch.stack(ps) for ps in zip(*(s[0] for s in snapshots), strict=True)]
            states = [torch.stack(ps) for ps in zip(*(s[1] for s in snapshots), strict=True)]
            losses = torch.stack([s[2] for s in snapshots], dim=1)
            results.append((parameters, states, losses))
        return results

    def _torch_member(self, e, steps, dtype, log_every):
        r = dataclasses.replace(self.config, **{name: own[e].item() for name, own in self.own.items()})
        model = sequential(r.widths, r.hidden, r.output, bias=r.bias, dtype=dtype)
        parameters = list(model.parameters())
        with torch.no_grad():
            for p, initial in zip(parameters, self.initial, strict=True):
                p.copy_(initial[e])
        optimizer = torch_optimizer(r, parameters, self.lr[e].item())
        options = {"beta": r.beta} if r.loss == "smooth_l1" else {}
        criterion = CRITERIA[r.loss](reduction="none", **options)
        x, y = (t[e if len(t) > 1 else 0].to(dtype) for t in (self.x, self.y))
        losses, snapshots = [], []
        for step in range(max(steps)):
            rows = slice((step % self.batches) * self.batch_size, (step % self.batches + 1) * self.batch_size)
            if self.order is not None:
                rows = self.order[step // self.batches][rows].long()
            target, *weights = y[rows].split(r.widths[-1], 1)
            loss = criterion(model(x[rows]), target) * (weights[0] if weights else 1)
            loss = r.factor * (loss.mean() if r.reduction == "mean" else loss.sum())
            if self.factors is not None:
                loss = loss * self.factors[step].expand(self.members)[e].item()
            if log_every and step % log_every == 0:
                losses.append(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            if self.rates is not None:
                (group,) = optimizer.param_groups
                group["lr"] = self.rates[step].expand(self.members)[e].item()
            optimizer.step()
            if step + 1 in steps:
                states = [optimizer.state[p][name].clone() for name in self.states for p in parameters]
                snapshots.append(
                    ([p.detach().clone() for p in parameters], states, torch.tensor(losses, dtype=dtype).clone())
                )
        return snapshots

    # --- the kernels

    def kernel(self, plan, steps, log_every=0, taken=0, start=0, parameters=None, states=None):
        """(parameters, states, losses) after each number of steps in `steps`, one launch from each to the next.

        Every tensor that is written has NaN around it, fresh ones in it too. Without `states` the optimizer starts
        anew, and what its state holds must not matter.
        """
        pairs = [guarded(*t.shape) for t in self.initial]
        for (p, _), initial in zip(pairs, parameters or self.initial, strict=True):
            p.copy_(initial)
        state_pairs = [guarded(*t.shape) for _ in self.states for t in self.initial]
        for (s, _), initial in zip(state_pairs, states or [], strict=states is not None):
            s.copy_(initial)
        count = len(self.initial)
        written = tuple(p for p, _ in pairs)
        buffers = tuple(s for s, _ in state_pairs)
        lr, x, y = (t.to(DEVICE) for t in (self.lr, self.x, self.y))
        split = (buffers[:count], buffers[count:])
        lr, own = lr if self.rates is None else None, Hyperparameters(**self.own)
        run = train.KernelLoop(self.config, written, *split, lr, x, y, self.batch_size, taken, plan, own)
        results, losses, done = [], [], 0
        for end in steps:
            logged = [s for s in range(start + done, start + end) if log_every and s % log_every == 0]
            trace, whole = guarded(len(logged), self.members)
            epoch = (start + done) // self.batches
            order = None if self.order is None else self.order[epoch:].to(DEVICE).contiguous()
            rates = None if self.rates is None else self.rates[start + done : start + end].to(DEVICE)
            factors = None if self.factors is None else self.factors[start + done : start + end].to(DEVICE)
            with poisoned():
                run.run(order, start + done, end - done, log_every, trace, rates, factors)
            done = end
            losses.append(trace.cpu())
            for _, around in (*pairs, *state_pairs, (trace, whole)):
                assert around[:32].isnan().all()
                assert around[-32:].isnan().all()
            copies = [t.cpu().clone() for t in (*written, *buffers)]
            results.append((copies[:count], copies[count:], torch.cat(losses)))
        return results


def check(run, actual, steps, log_every=0):
    truths, torches = (run.torch(steps, dtype, log_every) for dtype in (torch.float64, torch.float32))
    kinds = run.kinds * (len(run.config.widths) - 1)
    for after, ours, theirs, exact in zip(steps, actual, torches, truths, strict=True):
        groups = {}
        for i, kind in enumerate(kinds):
            groups.setdefault(kind, []).append((ours[0][i], theirs[0][i], exact[0][i]))
        for i, name in enumerate(name for name in run.states for _ in kinds):
            groups.setdefault(name, []).append((ours[1][i], theirs[1][i], exact[1][i]))
        assert len(ours[1]) == len(exact[1])
        if log_every:
            groups["loss"] = [(ours[2], theirs[2], exact[2])]
        assert_as_good_as_the_worst({f"after {after} steps: {name}": groups[name] for name in groups}, torch.float32)


def flat(results):
    return [t for parameters, states, losses in results[-1:] for t in (*parameters, *states, losses)]


def same_bits(results, others):
    return all(torch.equal(a, b) for a, b in zip(flat(results), flat(others), strict=True))


# --- trajectories ---------------------------------------------------------------------------------------------------

RUNS = {
    "lane-xor": (dataclasses.replace(LANE, rows=4), XOR, {}),
    "lane-xor-streamed": (LANE, XOR, {"samples": 5}),
    "lane-minibatches": (LANE, TrainConfig((3, 4, 2)), {"samples": 5, "batch_size": 3, "epochs": 10}),
    "lane-own-data": (LANE, TrainConfig((3, 2, 2)), {"members": 5, "samples": 2, "shared": False}),
    "lane-one-layer": (LANE, TrainConfig((5, 3)), {"members": 1, "samples": 2}),
    "block-xor": (BLOCK, XOR, {}),
    "block-xor-deep": (BLOCK, TrainConfig((2, 10, 10, 10, 1)), {"members": 2}),
    "block-padded": (BLOCK, TrainConfig((3, 9, 20, 2)), {"members": 1, "samples": 7}),
    "block-ragged-batch": (BLOCK, TrainConfig((5, 20, 3)), {"members": 1, "samples": 37}),
    "block-minibatches": (BLOCK, TrainConfig((5, 20, 3)), {"members": 1, "samples": 37, "batch_size": 18, "epochs": 7}),
    "block-own-data": (BLOCK, TrainConfig((5, 20, 3)), {"members": 2, "shared": False, "samples": 9}),
    "block-exact-tile": (BLOCK, TrainConfig((16, 16, 16)), {"members": 1, "samples": 16}),
    "block-one-layer": (BLOCK, TrainConfig((33, 10)), {"members": 1, "samples": 20}),
    # 5 tiles, the last one ragged
    "spread-ragged-batch": (SPREAD, TrainConfig((5, 20, 3)), {"members": 1, "samples": 70}),
    # 3 tiles, and then 2: one program without any
    "spread-minibatches": (
        SPREAD,
        TrainConfig((5, 9, 3)),
        {"members": 2, "samples": 71, "batch_size": 40, "epochs": 10},
    ),
    "spread-own-data": (SPREAD, TrainConfig((5, 20, 3)), {"members": 2, "shared": False, "samples": 33}),
    "spread-more-slots-than-at-once": (
        dataclasses.replace(BLOCK, programs=19),
        TrainConfig((2, 2, 1)),
        {"members": 1, "samples": 16 * 19},
    ),
}


@pytest.mark.parametrize(
    "name",
    core(
        RUNS,
        "lane-xor",
        "lane-minibatches",
        "block-padded",
        "block-minibatches",
        "block-exact-tile",
        "spread-minibatches",
    ),
)
def test_trajectories(name):
    plan, config, data = RUNS[name]
    run = Run(config, **data)
    steps = (1, 2, 20)
    check(run, run.kernel(plan, steps, log_every=4), steps, log_every=4)


# What rounding in another order may do to 10,001 steps of XOR, as measured over nine ways of rounding.
BAND = 6e-5


@pytest.mark.long
@pytest.mark.parametrize("plan", [RUNS["lane-xor"][0], BLOCK], ids=["lane", "block"])
def test_long_trajectories(plan):
    steps = (10_001,)
    run = Run(XOR, members=1)
    for actual, exact in zip(run.kernel(plan, steps, 100), run.torch(steps, torch.float64, 100), strict=True):
        for ours, truth in zip((*actual[0], actual[2]), (*exact[0], exact[2]), strict=True):
            assert relative_error(ours, truth) <= BAND


@pytest.mark.parametrize("variant", core(RECIPES, "nesterov", "dampening", "adamw", "rmsprop-momentum"))
@every_plan
def test_optimizers(plan, variant):
    run = Run(TrainConfig((3, 2, 2), **RECIPES[variant]), samples=3, members=2)
    steps = (1, 2, 8)
    check(run, run.kernel(plan, steps), steps)


LOSSES = {
    "bce": ("bce", "sigmoid"),
    "bce-logits": ("bce_logits", "identity"),
    **{f"mse-{output}": ("mse", output) for output in ACTIVATIONS},
    **{f"smooth-l1-{output}": ("smooth_l1", output) for output in ("tanh", "relu")},
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("loss", "output"), LOSSES.values(), ids=LOSSES)
@every_plan
def test_losses(plan, loss, output, reduction):
    # 3 samples in batches of 2 and 1, whose means divide by different numbers
    config = TrainConfig((3, 4, 2), output=output, loss=loss, reduction=reduction)
    run = Run(config, members=2, samples=3, batch_size=2, epochs=2)
    run.lr /= 3 if reduction == "sum" else 1
    check(run, run.kernel(plan, (4,), log_every=1), (4,), log_every=1)


# Each with what it may have beside the output activation.
WEIGHTED = {
    "bce": {"loss": "bce", "weighted": True},
    "logits-given": {"loss": "bce_logits", "output": "identity", "weighted": True, "reduction": "given"},
    "huber": {"loss": "smooth_l1", "output": "tanh", "weighted": True, "beta": 0.3, "factor": 0.7},
    "l1-given": {"loss": "smooth_l1", "output": "relu", "beta": 0.0, "factor": 1.5, "reduction": "given"},
    "cross-entropy-given": {"loss": "cross_entropy", "output": "identity", "reduction": "given"},
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as below
@pytest.mark.parametrize("case", core(WEIGHTED, "logits-given"))
@every_plan
def test_weights_and_factors_of_steps(plan, case):
    # Five lanes are two programs, and 3 samples two batches.
    members = 5 if plan is LANE else 2
    run = Run(TrainConfig((3, 4, 2), **WEIGHTED[case]), members, samples=3, batch_size=2, epochs=3)
    if run.config.reduction == "given":
        # One for all members, or each its own.
        own = torch.arange(1 if case == "l1-given" else members)
        run.factors = torch.linspace(0.5, 0.1, 5)[:, None] * (1 + own)
    once = run.kernel(plan, (2, 5), log_every=2)
    check(run, once, (2, 5), log_every=2)
    assert same_bits(once, run.kernel(plan, (5,), log_every=2))


# numpy, under the interpreter, warns where a GPU has nothing to say: of columns that hold no sample.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("reduction", core(["mean", "sum"], "mean"))
@pytest.mark.parametrize("outputs", [1, 3])
@every_plan
def test_cross_entropy(plan, outputs, reduction):
    config = TrainConfig((3, 4, outputs), output="identity", loss="cross_entropy", reduction=reduction)
    run = Run(config, members=2, samples=3, batch_size=2, epochs=2)
    # A class, probabilities of classes, and what is none: torch takes any sum.
    run.y[0, 0] = torch.eye(outputs)[-1]
    run.y[0, 1] /= run.y[0, 1].sum()
    run.lr /= 3 if reduction == "sum" else 1
    check(run, run.kernel(plan, (4,), log_every=1), (4,), log_every=1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@every_plan
def test_cross_entropy_of_great_logits(plan):
    # Of a sample that is classified well the loss is small, and keeps its digits; e^z overflows from 89 on.
    logits = torch.tensor([[100.0, 88.0, -100.0], [-300.0, -290.0, -300.0], [5.0, -12.0, -100.0], [0.0, 0.0, 0.0]])
    for target in range(3):
        config = TrainConfig((1, 3), output="identity", loss="cross_entropy", bias=False)
        run = Run(config, members=len(logits), samples=1)
        run.initial, run.x, run.y = [logits[..., None]], torch.ones(1, 1, 1), torch.eye(3)[target].view(1, 1, 3)
        ((_, _, loss),) = run.kernel(plan, (1,), log_every=1)
        expected = nn.CrossEntropyLoss(reduction="none")(logits.double(), torch.full((len(logits),), target))
        torch.testing.assert_close(loss[0].double(), expected, rtol=2e-6, atol=1e-7)


# numpy, under the interpreter, warns where a GPU has nothing to say.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("t", [0.0, pytest.param(0.25, marks=pytest.mark.core), 1.0])
@every_plan
def test_the_logarithm_of_a_saturated_output_is_cut_off(plan, t):
    # at -100, as torch.nn.BCELoss does: from z = 16.64 on 1 - y is 0, and y below -88.7
    logits = torch.tensor([-200.0, -99, -89, -88, -50, -17, 0, 10, 15.5, 16.5, 16.7, 50, 103, torch.inf, torch.nan])
    run = Run(TrainConfig((1, 1), bias=False, reduction="sum"), members=len(logits), samples=1)
    run.initial, run.x, run.y = [logits.view(-1, 1, 1)], torch.ones(1, 1, 1), torch.full((1, 1, 1), t)
    ((_, _, loss),) = run.kernel(plan, (1,), log_every=1)
    p, exact = logits.sigmoid(), logits.double().sigmoid()
    # 1 - p has lost most of its digits in torch where it is not 0 yet.
    log_p = torch.where(p == 0, -100, exact.log())
    log_q = torch.where(p == 1, -100, (-logits.double()).sigmoid().log())
    expected = -(torch.nan_to_num(t * log_p, nan=0) + torch.nan_to_num((1 - t) * log_q, nan=0))
    expected[-1] = torch.nan
    torch.testing.assert_close(loss[0].double(), expected, rtol=2e-6, atol=1e-7, equal_nan=True)
    torch_loss = -(t * p.log().clamp(min=-100) + (1 - t) * torch.log1p(-p).clamp(min=-100))
    torch.testing.assert_close(loss[0], torch_loss, rtol=5e-2, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("hidden", ACTIVATIONS)
@every_plan
def test_activations(plan, hidden, bias):
    run = Run(TrainConfig((3, 3, 2, 2), hidden=hidden, bias=bias, momentum=0.5), members=2, samples=4)
    run.lr /= 4
    check(run, run.kernel(plan, (4,), log_every=3), (4,), log_every=3)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_padded_neurons_stay_silent(bias):
    # Without a bias to hold them down, and with weight decay to wear one out. With seed 0 the momentum of the last bias
    # is near 0 after 30 steps: two numbers of which roundings decide.
    run = Run(TrainConfig((3, 9, 20, 2), bias=bias, weight_decay=0.05, momentum=0.9), members=1, seed=1)
    check(run, run.kernel(BLOCK, (30,)), (30,))


# --- numbers of a member, and of a step -----------------------------------------------------------------------------

OWN = {
    "sgd": {"weight_decay": (0.0, 0.1, 0.3)},
    "momentum": {"momentum": (0.1, 0.5, 0.9)},
    "dampening": {"momentum": (0.2, 0.5, 0.8), "weight_decay": (0.2, 0.0, 0.1)},
    "nesterov": {"momentum": (0.3, 0.5, 0.9)},
    "adam-decay": {"beta1": (0.0, 0.5, 0.9), "beta2": (0.9, 0.0, 0.999), "weight_decay": (0.1, 0.0, 0.3)},
    "adamw": {"beta1": (0.9, 0.8, 0.0), "weight_decay": (0.0, 0.5, 0.1)},
    "rmsprop": {"weight_decay": (0.0, 0.3, 0.1)},
    "rmsprop-momentum": {"momentum": (0.3, 0.5, 0.9), "weight_decay": (0.1, 0.0, 0.2)},
}


def numbered(variant, rates="members", steps=8, **data):
    """A run whose members have numbers of their own, and a rate for each step."""
    # A config without weight decay has none.
    config = TrainConfig((3, 2, 2), **{"weight_decay": 0.9, **RECIPES[variant]})
    run = Run(config, **{"samples": 3, **data})
    copies = -(-run.members // 3)
    run.own = {
        name: torch.tensor(own * copies, dtype=torch.float64)[: run.members] for name, own in OWN[variant].items()
    }
    if rates:
        falling = run.lr * torch.linspace(1, 0.1, steps)[:, None]
        run.rates = falling if rates == "members" else falling[:, :1].clone()
    return run


@pytest.mark.parametrize("variant", core(OWN, "nesterov", "adam-decay"))
@every_plan
def test_numbers_of_each_member_and_step(plan, variant):
    run = numbered(variant)
    steps = (1, 2, 8)
    check(run, run.kernel(plan, steps), steps)


@pytest.mark.parametrize("variant", ["dampening", "rmsprop-momentum"])
@every_plan
def test_a_member_without_momentum_is_not_damped(plan, variant):
    run = numbered(variant)
    run.own["momentum"][1] = 0.0
    ((parameters, _, _),) = run.kernel(plan, (8,))
    run.states = ()  # of such a member torch has none
    ((torches, _, _),), ((truths, _, _),) = run.torch((8,), torch.float32), run.torch((8,))
    groups = {str(i): [values] for i, values in enumerate(zip(parameters, torches, truths, strict=True))}
    assert_as_good_as_the_worst(groups, torch.float32)


@every_plan
def test_one_schedule_for_all_members(plan):
    run = numbered("momentum", "shared")
    check(run, run.kernel(plan, (3, 8), log_every=2), (3, 8), log_every=2)


@pytest.mark.core
@every_plan
def test_a_schedule_in_pieces_changes_no_bit(plan):
    # Five lanes are two programs, of which the second one has three lanes without a network.
    run = numbered("adamw", members=5 if plan is LANE else 2, batch_size=2, epochs=4)
    once = run.kernel(plan, (8,), log_every=3)
    assert same_bits(once, run.kernel(plan, (1, 3, 4, 8), log_every=3))
    # Nor do rates that are all alike.
    run.rates = run.lr.expand(8, -1)
    alike, run.rates = run.kernel(plan, (8,), log_every=3), None
    assert same_bits(alike, run.kernel(plan, (8,), log_every=3))
    assert not same_bits(alike, once)


# --- where a launch begins and ends ---------------------------------------------------------------------------------


BITS = {
    "lane-adamw": (LANE, {"members": 2, "samples": 2}, "adamw"),
    "lane-minibatches": (LANE, {"members": 2, "samples": 3, "batch_size": 2, "epochs": 30}, "nesterov"),
    "block-adamw": (BLOCK, {"members": 1}, "adamw"),
    "block-minibatches": (BLOCK, {"members": 1, "samples": 5, "batch_size": 3, "epochs": 30}, "nesterov"),
    "spread-minibatches": (SPREAD, {"members": 2, "samples": 40, "batch_size": 33, "epochs": 30}, "adamw"),
}


@pytest.mark.more
@pytest.mark.parametrize(("plan", "data", "variant"), BITS.values(), ids=BITS)
def test_the_size_of_a_launch_changes_no_bit(plan, data, variant):
    run = Run(dataclasses.replace(XOR, **RECIPES[variant]), **data)
    once = run.kernel(plan, (24,), log_every=7)
    assert len(once[0][2]) == 4
    thrice = run.kernel(plan, (9, 16, 24), log_every=7)
    assert same_bits(once, thrice)
    assert same_bits(once, run.kernel(plan, range(1, 25), log_every=7))
    # Logging changes none either.
    parameters, states, _ = run.kernel(plan, (9,))[0]
    assert same_bits([(parameters, states, thrice[0][2])], thrice[:1])


@pytest.mark.parametrize("variant", ["dampening", "adam", "rmsprop-momentum"])
@every_plan
def test_state_of_earlier_steps_is_continued(plan, variant):
    # Torch takes five steps, the kernels four more, as another run of which they are the first.
    run = Run(TrainConfig((3, 4, 2), **RECIPES[variant]), samples=5)
    ((parameters, states, _),) = run.torch((5,))
    actual = run.kernel(plan, (4,), taken=5, parameters=parameters, states=states)
    (exact,) = run.torch((9,))
    assert_near((*actual[0][0], *actual[0][1]), (*exact[0], *exact[1]), 4 * FLOOR[torch.float32])


@every_plan
def test_bias_correction_all_along_a_run(plan):
    # 1 - beta^t for steps up to where it is 1 in fp32, on both sides of where its formula changes
    run = Run(TrainConfig((2, 1), optimizer="adam", beta1=0.99), members=1)
    for taken in (0, 3, 40, 80, 400, 900, 100_000):
        zeros = [torch.zeros_like(t) for _ in range(2) for t in run.initial]
        parameters, _, _ = run.kernel(plan, (1,), taken=taken, states=zeros)[0]
        model = sequential((2, 1), dtype=torch.float64)
        with torch.no_grad():
            for p, initial in zip(model.parameters(), run.initial, strict=True):
                p.copy_(initial[0])
        optimizer = torch.optim.Adam(model.parameters(), run.lr[0].item(), (0.99, 0.999))
        for p in model.parameters():
            names = ("exp_avg", "exp_avg_sq")
            optimizer.state[p] = {name: torch.zeros_like(p) for name in names} | {"step": torch.tensor(float(taken))}
        nn.BCELoss()(model(run.x[0].double()), run.y[0].double()).backward()
        optimizer.step()
        for ours, p, initial in zip(parameters, model.parameters(), run.initial, strict=True):
            # what the step added, not what it was added to; half a unit of fp32 in its last place is the parameter's
            step, exact = ours[0].double() - initial[0], p.detach() - initial[0]
            assert ((step - exact).abs() <= 1e-6 * exact.abs() + 2.0**-24 * initial[0].abs()).all(), taken


@every_plan
def test_losses_are_those_of_the_steps_that_are_due(plan):
    run = Run(XOR, members=1 if plan is BLOCK else 2)
    every = run.kernel(plan, (10,), log_every=1)[-1][2]
    assert every.isfinite().all()
    assert len(every) == 10
    for log_every, launches in ((2, (10,)), (3, (1, 2, 3, 6, 9, 10)), (9, (4, 10)), (10**9, (10,))):
        losses = run.kernel(plan, launches, log_every)[-1][2]
        assert torch.equal(losses, every[::log_every]), (log_every, launches)


@pytest.mark.core
@every_plan
def test_no_steps_change_nothing(plan):
    run = Run(XOR, members=2)
    parameters, _, losses = run.kernel(plan, (0,), log_every=1)[0]
    assert all(torch.equal(p, initial) for p, initial in zip(parameters, run.initial, strict=True))
    assert losses.shape == (0, 2)


# --- members --------------------------------------------------------------------------------------------------------


@every_plan
def test_members_do_not_touch_each_other(plan):
    # Nine lanes are two programs of four members and one of one.
    members = 9 if plan is LANE else 3
    run = Run(XOR, members=members, shared=False)
    before = run.kernel(plan, (3,), log_every=2)
    run.x[1, 0] = torch.nan
    after = run.kernel(plan, (3,), log_every=2)
    others = [e for e in range(members) if e != 1]
    for a, b in zip(before[0][0], after[0][0], strict=True):
        assert torch.equal(a[others], b[others])
        assert b[1].isnan().all()
    assert torch.equal(before[0][2][:, others], after[0][2][:, others])
    assert after[0][2][:, 1].isnan().all()


@every_plan
def test_a_member_alone_is_what_it_is_among_others(plan):
    run = Run(TrainConfig((3, 2, 2), optimizer="adam"), members=5, samples=3, batch_size=2, epochs=2)
    together = run.kernel(plan, (4,), log_every=2)[0]
    for e in (0, 4):
        alone = Run(run.config, members=1, samples=3, batch_size=2, epochs=2)
        alone.initial = [t[e : e + 1] for t in run.initial]
        alone.x, alone.y, alone.order, alone.lr = run.x, run.y, run.order, run.lr[e : e + 1]
        single = alone.kernel(plan, (4,), log_every=2)[0]
        for a, b in zip((*single[0], *single[1]), (*together[0], *together[1]), strict=True):
            assert torch.equal(a[0], b[e])
        assert torch.equal(single[2][:, 0], together[2][:, e])


# --- the yardstick itself -------------------------------------------------------------------------------------------

WRONG = {
    "zeros": lambda run: {"parameters": [torch.zeros_like(t) for t in run.initial]},
    "one-member": lambda run: {"parameters": [t[:1].expand_as(t) for t in run.initial]},
    "a-step-late": lambda run: {"taken": 1, "states": [torch.zeros_like(t) for _ in range(2) for t in run.initial]},
    "another-batch": lambda run: {"start": 1},
}


@pytest.mark.core
@every_plan
def test_wrong_runs_are_refused(plan):
    run = Run(TrainConfig((3, 2, 2), optimizer="adam"), members=2, samples=3, batch_size=2, epochs=4)
    check(run, run.kernel(plan, (4,)), (4,))
    for wrong in WRONG.values():
        with pytest.raises(AssertionError, match=r"^after 4 steps: "):
            check(run, run.kernel(plan, (4,), **wrong(run)), (4,))


CHANGES = [{"momentum": 0.51}, {"weight_decay": 0.001}, {"nesterov": True}, {"hidden": "tanh"}]


def test_other_recipes_are_refused():
    run = Run(TrainConfig((3, 2, 2), momentum=0.5), samples=3)
    actual = run.kernel(LANE, (4,))
    check(run, actual, (4,))
    config = run.config
    for change in CHANGES:
        run.config = dataclasses.replace(config, **change)
        with pytest.raises(AssertionError, match=r"^after 4 steps: "):
            check(run, actual, (4,))
