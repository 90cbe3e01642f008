# SPDX-License-Identifier: Apache-2.0
"""Criteria of `fit` with all their options: against the loop that everyone writes, in fp64, on every fast path."""

import copy
import itertools
import random
import re
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from cases import ACTIVATIONS, FUZZ_BUDGET, FUZZ_SEED, core, same_bits
from torch import nn
from training_cases import chunks_of, make, needs_numba, ordinary, relative, values

from perceptriton.kernels import plan
from perceptriton.kernels.records import LoopPlan, TrainPlan
from perceptriton.mlp import MLP, Ensemble, fit, fit_sharded
from perceptriton.mlp.training import run

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")

LOOPS = {layout: TrainPlan("torch", "the test says so") for layout in ("joint", "matrices", "arrays")}
LOOPS |= {f"{rows}x{networks}": TrainPlan("native", "as above", rows, networks) for rows, networks in plan.TILES}
KERNELS = {
    "lane": TrainPlan("lane", "as above", rows=2, networks=4),
    "block": TrainPlan("block", "as above", rows=16, num_warps=4),
    "spread": TrainPlan("block", "as above", rows=16, num_warps=4, programs=3),
}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.02, eps=1e-3),
}
EXACT = 1e-10  # two orders of the same fp64 sums over some steps
double = partial(torch.tensor, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """Networks with their data, one of them or `members`, and what they are trained with."""

    criterion: nn.Module  # in fp64
    output: str = "identity"
    ids: bool = False
    ignored: int | None = None  # an id of one sample in three
    members: int | None = None
    own: tuple[bool, bool] = (False, False)  # whether members have inputs and targets of their own
    samples: int = 7
    batch_size: int | None = None
    log_every: int = 1
    optimizer: str = "sgd"
    outputs: int = 3
    steps: int = 7
    seed: int = 0
    device: str = "cpu"

    def data(self):
        """(models, x, y), fp64."""
        sizes = (2, 4, self.outputs)
        made = [
            make(sizes, "tanh", self.output, True, self.samples, seed=self.seed + e) for e in range(self.members or 1)
        ]
        models, xs, ys = zip(*made, strict=True)
        if self.ids:
            generator = torch.Generator().manual_seed(self.seed)
            ys = [torch.randint(self.outputs, (self.samples,), generator=generator) for _ in models]
            if self.ignored is not None:
                ys = [y.where(torch.rand(self.samples, generator=generator) < 0.7, self.ignored) for y in ys]
        x, y = (torch.stack(ts) if own else ts[0] for own, ts in zip(self.own, (xs, ys), strict=True))
        return models, x, y

    def fit(self, impl, dtype=torch.float64, change=None, **options):
        """[*parameters, losses] of each member, (E, ..)."""
        models, x, y = self.data()
        if change:
            change(x, y)
        x, y = (t.to(self.device, dtype if t.is_floating_point() else t.dtype) for t in (x, y))
        criterion = copy.deepcopy(self.criterion).to(self.device, dtype)
        model = models[0] if self.members is None else Ensemble.from_models(models)
        model = model.to(self.device, dtype)
        given = (x, y, *criterion.buffers())
        before = [t.clone() for t in given]
        optimizer = OPTIMIZERS[self.optimizer](model.parameters())
        options = {"batch_size": self.batch_size, "log_every": self.log_every, "steps": self.steps} | options
        options["generator"] = torch.Generator().manual_seed(self.seed)
        history = fit(model, x, y, criterion=criterion, optimizer=optimizer, impl=impl, **options)
        assert history.path == (impl or "general")
        assert same_bits(given, before)
        trained = (
            [values(model.member(e).cpu()) for e in range(self.members)] if self.members else [values(model.cpu())]
        )
        return [*map(torch.stack, zip(*trained, strict=True)), history.loss.view(len(history.loss), -1).T]

    def torch(self, dtype=torch.float64, change=None):
        """The same of ordinary loops, member by member."""
        models, x, y = self.data()
        if change:
            change(x, y)
        results = []
        for e, model in enumerate(models):
            own = [t[e] if own else t for own, t in zip(self.own, (x, y), strict=True)]
            own = [t.to(dtype) if t.is_floating_point() else t for t in own]
            model, criterion = model.to(dtype), copy.deepcopy(self.criterion).to(dtype)
            optimizer = OPTIMIZERS[self.optimizer](model.parameters())
            generator = torch.Generator().manual_seed(self.seed)
            arguments = (criterion, optimizer, self.steps, self.batch_size, generator, self.log_every)
            losses = ordinary(model, *own, *arguments)
            results.append([*values(model), losses])
        return [torch.stack(tensors) for tensors in zip(*results, strict=True)]

    def check(self, impl, change=None):
        assert_alike(self.fit(impl, change=change), self.torch(change=change), EXACT)

    def check_float32(self, impl, change=None):
        exact, theirs = self.torch(change=change), self.torch(torch.float32, change)
        assert_alike(self.fit(impl, torch.float32, change), exact, 2 * apart(theirs, exact) + 2e-6)


def apart(actual, expected):
    """How far from each other what is finite is."""
    found, wanted = ([t[e.isfinite()] for t, e in zip(ts, expected, strict=True)] for ts in (actual, expected))
    return relative([torch.ones(1), *found], [torch.ones(1), *wanted])


def assert_alike(actual, expected, bound):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.isfinite(), e.isfinite())
        assert torch.equal(a.isnan(), e.isnan())
    assert apart(actual, expected) <= bound


def chosen(monkeypatch, name, members):
    """Has `fit` take this way; returns its impl."""
    found = (LOOPS | KERNELS)[name]
    layout = name if name in ("joint", "matrices", "arrays") else "matrices"
    layout = "matrices" if (layout == "joint") == ((members or 1) > 1) else layout
    monkeypatch.setattr(plan, "train", lambda *_, **__: found)
    monkeypatch.setattr(plan, "train_loop", lambda *_: LoopPlan(layout, True, "the test says so"))
    needs_numba(found.impl)
    return found.impl


WEIGHT = double([0.5, 2.0, 0.0])
ENTROPY = nn.CrossEntropyLoss
MANY = {"members": 3, "own": (False, True), "batch_size": 3}
CASES = {
    "ids-of-one": Case(ENTROPY(), ids=True),
    "ids-of-all": Case(ENTROPY(), ids=True, members=3, batch_size=3),
    "ids-of-each": Case(ENTROPY(reduction="sum"), ids=True, **MANY),
    "ids-smoothed": Case(ENTROPY(label_smoothing=0.2), ids=True, **MANY),
    "ids-weighted": Case(ENTROPY(weight=WEIGHT + 0.5, label_smoothing=0.1), ids=True, **MANY),
    "ids-weighted-in-full": Case(ENTROPY(weight=WEIGHT + 0.5), ids=True, members=3, own=(True, True)),
    "ids-weighted-sum": Case(ENTROPY(weight=WEIGHT, reduction="sum"), ids=True, batch_size=3),
    "ids-ignored": Case(ENTROPY(label_smoothing=0.1), ids=True, ignored=-100, **MANY),
    "ids-ignored-in-full": Case(ENTROPY(weight=WEIGHT + 0.5), ids=True, ignored=-100, members=3, own=(False, True)),
    "class-ignored": Case(ENTROPY(ignore_index=1, weight=WEIGHT + 0.5), ids=True, batch_size=2, log_every=2),
    "probabilities": Case(ENTROPY(weight=WEIGHT, label_smoothing=0.3), batch_size=3),
    "probabilities-of-each": Case(ENTROPY(weight=WEIGHT, reduction="sum"), **MANY),
    "bce-number": Case(nn.BCELoss(weight=double(0.3)), "sigmoid", batch_size=3),
    "bce-outputs": Case(nn.BCELoss(weight=WEIGHT, reduction="sum"), "sigmoid", **MANY),
    "bce-samples": Case(nn.BCELoss(weight=torch.linspace(0, 2, 7).double()[:, None]), "sigmoid", members=3),
    "bce-elements": Case(nn.BCELoss(weight=torch.linspace(-1, 2, 21).double().view(7, 3)), "sigmoid"),
    "logits-outputs": Case(nn.BCEWithLogitsLoss(weight=WEIGHT[None]), batch_size=3),
    "logits-positive": Case(nn.BCEWithLogitsLoss(pos_weight=WEIGHT), **MANY),
    "logits-both": Case(nn.BCEWithLogitsLoss(weight=torch.ones(7, 1).double() / 3, pos_weight=WEIGHT, reduction="sum")),
    "smooth-l1": Case(nn.SmoothL1Loss(beta=0.5), "tanh", batch_size=3),
    "smooth-l1-relu": Case(nn.SmoothL1Loss(beta=0.2, reduction="sum"), "relu", **MANY),
    "smooth-l1-of-0": Case(nn.SmoothL1Loss(beta=0.0), **MANY),
    "l1": Case(nn.L1Loss(), "sigmoid", batch_size=3),
    "huber": Case(nn.HuberLoss(delta=0.4), **MANY),
    "huber-sum": Case(nn.HuberLoss(delta=1.5, reduction="sum"), "sigmoid"),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("case", CASES)
def test_criteria(monkeypatch, case, loop):
    case = CASES[case]
    case.check(chosen(monkeypatch, loop, case.members))


# numpy, under the interpreter, warns of columns that hold no sample.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.interpreter
@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", core(CASES))
def test_criteria_in_kernels(monkeypatch, device, case, kernel):
    case = replace(CASES[case], device=device, steps=4)
    case.check_float32(chosen(monkeypatch, kernel, case.members))


def random_case(seed):
    draw = random.Random(f"criteria {seed}")
    numbers = torch.Generator().manual_seed(seed)
    outputs, samples, members = draw.randint(1, 5), draw.randint(1, 12), draw.choice([None, None, 1, 2, 3, 17])
    own = tuple(members is not None and draw.random() < 0.5 for _ in range(2))
    batch_size = draw.choice([None, None, 1, 3, 5, samples])

    def weight(*shapes):
        made = 2 * torch.rand(draw.choice(shapes), generator=numbers, dtype=torch.float64)
        made[torch.rand(made.shape, generator=numbers) < 0.2] = 0
        return draw.choice([None, made])

    reduction = {"reduction": draw.choice(["mean", "sum"])}
    kind = draw.choice(["ids", "ids", "probabilities", "bce", "logits", "smooth-l1", "huber", "l1"])
    common = {"output": "identity", "ids": kind == "ids"}
    if kind in ("ids", "probabilities"):
        smoothing = {"label_smoothing": draw.choice([0.0, 0.0, 0.3, 1.0])}
        ignored = draw.choice([None, -100, outputs - 1, outputs + 5]) if kind == "ids" else None
        ignore = {} if ignored is None else {"ignore_index": ignored}
        criterion = nn.CrossEntropyLoss(weight((outputs,)), **smoothing, **ignore, **reduction)
        common["ignored"] = ignored
    elif kind in ("bce", "logits"):
        shapes = [(), (1,), (outputs,), (1, outputs)]
        shapes += [(samples, 1), (samples, outputs)] if batch_size is None else []
        if kind == "bce":
            criterion, common["output"] = nn.BCELoss(weight(*shapes), **reduction), "sigmoid"
        else:
            criterion = nn.BCEWithLogitsLoss(weight(*shapes), pos_weight=weight(*shapes), **reduction)
    else:
        common["output"] = draw.choice(ACTIVATIONS)
        bound = draw.choice([0.1, 0.5, 1.0, 2.0])
        criterion = {
            "smooth-l1": nn.SmoothL1Loss(beta=draw.choice([0.0, bound]), **reduction),
            "huber": nn.HuberLoss(delta=bound, **reduction),
            "l1": nn.L1Loss(**reduction),
        }[kind]
    pace = {"log_every": draw.randint(1, 3), "optimizer": draw.choice(list(OPTIMIZERS)), "steps": draw.randint(1, 8)}
    return Case(
        criterion,
        **common,
        **pace,
        members=members,
        own=own,
        samples=samples,
        batch_size=batch_size,
        **{"outputs": outputs, "seed": seed},
    ), draw


def check_random(seed, ways, **options):
    case, draw = random_case(seed)
    case = replace(case, **options)
    for way in draw.sample(list(ways), min(2, len(ways))):
        check = Case.check_float32 if way in KERNELS or draw.random() < 0.3 else Case.check
        with pytest.MonkeyPatch.context() as patch:
            impl = chosen(patch, way, case.members)
            try:
                check(case, impl)
            except NotImplementedError as error:
                if "all samples are ignored" not in str(error):
                    raise
            except AssertionError as error:
                raise AssertionError(f"FUZZ_SEED={seed}: {way}, {case}") from error


@pytest.mark.slow
@pytest.mark.fuzz
def test_random_criteria():
    for seed in range(FUZZ_SEED, FUZZ_SEED + max(1, int(400 * FUZZ_BUDGET))):
        check_random(seed, LOOPS)


@pytest.mark.fuzz
@pytest.mark.more
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.interpreter
@pytest.mark.parametrize("kernel", KERNELS)
def test_random_criteria_in_kernels(device, kernel):
    for seed in range(FUZZ_SEED, FUZZ_SEED + max(1, int(40 * FUZZ_BUDGET))):
        check_random(seed, [kernel], device=device, steps=3)


def test_other_options_are_refused(monkeypatch):
    """Positive control: each option matters, to each member."""
    changes = {
        "ids-smoothed": {"label_smoothing": 0.21},
        "ids-weighted": {"weight": double([0.5, 2.0, 0.1])},
        "class-ignored": {"ignore_index": 2},
        "logits-positive": {"pos_weight": double([0.5, 2.0, 0.01])},
        "bce-number": {"weight": double(0.31)},
        "smooth-l1": {"beta": 0.51},
        "huber": {"delta": 0.41},
    }
    for name, change in changes.items():
        case = CASES[name]
        other = replace(case, criterion=copy.deepcopy(case.criterion))
        for option, value in change.items():
            setattr(other.criterion, option, value)
        with pytest.raises(AssertionError):
            assert_alike(case.fit(chosen(monkeypatch, "matrices", case.members)), other.torch(), 1e-6)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("case", ["ids-ignored", "logits-positive"])
def test_the_size_of_a_chunk_changes_no_bit(monkeypatch, case, loop):
    case, results = replace(CASES[case], steps=9, log_every=2), []
    for sizes in ((9,), (1,), (4, 1, 2)):
        monkeypatch.setattr(run, "chunks", chunks_of(*sizes))
        results.append(case.fit(chosen(monkeypatch, loop, case.members), torch.float32))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


# --- numbers that are none ------------------------------------------------------------------------------------------

# Batches whose samples are all ignored leave torch a loss of NaN and no gradient, those without weight NaN in both.
EMPTY = {
    "ignored": (ENTROPY(), [-100, -100, 1, -100, -100, 2, -100], 1),
    "without-weight": (ENTROPY(weight=WEIGHT, label_smoothing=0.1), [2, 2, 1, 0, 2, 1, 0], 3),
    "either": (ENTROPY(weight=WEIGHT), [-100, 2, 2, -100, -100, 2, 1], 2),
    "in-full": (ENTROPY(weight=WEIGHT, label_smoothing=0.1), [2, 2, 2, -100, 2, 2, 2], None),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("case", EMPTY)
def test_a_mean_of_nothing(monkeypatch, case, loop):
    criterion, ids, batch_size = EMPTY[case]

    def change(x, y):
        y[...] = torch.tensor(ids)
        if y.dim() == 2:  # another member is as usual
            y[1] = torch.arange(7) % 2

    for members in (None, 3):
        one = Case(criterion, ids=True, members=members, own=(False, members is not None), batch_size=batch_size)
        found = one.torch(change=change)
        assert found[-1].isnan().any()
        assert members is None or all(t[1].isfinite().all() for t in found)
        one.check(chosen(monkeypatch, loop, members), change)


@pytest.mark.parametrize("loop", ["matrices", "arrays", *list(LOOPS)[3:]])
@pytest.mark.parametrize("case", ["bce-outputs", "logits-positive", "huber", "probabilities-of-each"])
def test_a_target_that_is_none_is_its_members_own(monkeypatch, case, loop):
    case = CASES[case]
    impl = chosen(monkeypatch, loop, case.members)
    expected = case.fit(impl)

    def change(x, y):
        y[1, 2] = torch.nan

    found = case.fit(impl, change=change)
    for a, e in zip(found, expected, strict=True):
        assert same_bits(a[[0, 2]], e[[0, 2]])
        assert a[1].isnan().any()
    assert found[0][1].isnan().all()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("case", ["l1", "smooth-l1", "huber-sum", "logits-both"])
def test_what_is_infinite_or_none_is_as_in_torch(monkeypatch, case, loop):
    def change(x, y):
        x[0, 0], y[3, 1] = 1e300, y[3, 1] if case == "logits-both" else torch.inf

    one = replace(CASES[case], steps=2, output="identity")
    assert_alike(one.fit(chosen(monkeypatch, loop, None), change=change), one.torch(change=change), EXACT)
    if case in ("l1", "smooth-l1"):  # torch has a slope of 0 for the one, of NaN for the other

        def change(x, y):
            y[3, 1] = torch.nan

        found = one.torch(change=change)
        assert found[0].isnan().any() == (case == "smooth-l1")
        assert_alike(one.fit(chosen(monkeypatch, loop, None), change=change, nan="propagate"), found, EXACT)


# --- what the ordinary loop trains ----------------------------------------------------------------------------------


def probability(x, y):
    y[0, 0] = 1.5


def unknown_class(x, y):
    y[2] = 3


def all_ignored(x, y):
    y[:] = -100


OUTPUTS = nn.BCEWithLogitsLoss
PART = torch.ones(4, dtype=torch.float64)
# name: (case, the reason that `fit` tells, what is changed)
GENERAL = {
    "places": (Case(OUTPUTS(torch.ones(7, 1)), batch_size=7), "weight (7, 1) tells the places of a minibatch apart"),
    "broadcasts-more": (Case(OUTPUTS(torch.ones(5))), "weight (5,) does not broadcast to (7, 3)"),
    "three-dimensions": (Case(nn.BCELoss(torch.ones(1, 7, 3)), "sigmoid"), "weight (1, 7, 3) does not broadcast"),
    "infinite": (Case(OUTPUTS(pos_weight=double([1, torch.inf, 1]))), "pos_weight is not finite"),
    "negative": (Case(OUTPUTS(pos_weight=double([1, -0.5, 1]))), "pos_weight is negative"),
    "range": (Case(OUTPUTS(pos_weight=WEIGHT)), "y lies outside of [0, 1]", probability),
    "wants-gradient": (Case(OUTPUTS(nn.Parameter(PART[:3]))), "weight is no plain tensor of torch.float64 on cpu"),
    "beta": (Case(nn.SmoothL1Loss(beta=-1.0)), "SmoothL1Loss has a beta of -1.0"),
    "delta": (Case(nn.HuberLoss(delta=1e30)), "HuberLoss has a delta of 1e+30"),
    "no-delta": (Case(nn.HuberLoss(delta=0.0)), "HuberLoss has a delta of 0.0"),
    "smoothing": (Case(ENTROPY(label_smoothing=-0.1), ids=True), "label_smoothing is -0.1"),
    "much-smoothing": (Case(ENTROPY(label_smoothing=1.1), ids=True), "label_smoothing is 1.1"),
    "classes": (Case(ENTROPY(weight=PART), ids=True), "weight is (4,), not (3,)"),
    "ignored-probability": (Case(ENTROPY(ignore_index=1)), "ignores a class of targets that are none"),
    "unknown": (Case(ENTROPY(), ids=True), "class ids lie in [0, 3], not in [0, 2]", unknown_class),
    "all-ignored": (Case(ENTROPY(), ids=True), "all samples are ignored", all_ignored),
}


@pytest.mark.parametrize("case", GENERAL)
def test_other_criteria_take_the_ordinary_loop(case):
    case, reason, change = (*GENERAL[case], None)[:3]
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        case.fit("torch", change=change)
    try:
        expected = case.torch(change=change)
    except (RuntimeError, IndexError) as error:
        with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
            case.fit(None, change=change)
    else:
        assert same_bits(case.fit(None, change=change), expected)


def test_a_weight_in_a_parameter_takes_the_ordinary_loop():
    model, x, y = make((2, 4, 3), "tanh", "identity", True, 7)
    criterion = nn.BCEWithLogitsLoss(weight=model[2].bias.detach())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert fit(model, x, y, criterion=criterion, optimizer=optimizer, steps=2).path == "general"


def entropy(p, t):
    return nn.functional.cross_entropy(p, t)


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("own", [(False, False), (False, True), (True, True)], ids=["shared", "targets", "all"])
@pytest.mark.parametrize("criterion", [entropy, nn.NLLLoss(), nn.CrossEntropyLoss()], ids=["function", "nll", "uint8"])
@pytest.mark.filterwarnings("ignore:an ordinary loop trains this Ensemble")
def test_class_ids_of_ensembles_in_the_ordinary_loop(criterion, own, batch_size):
    case = Case(nn.CrossEntropyLoss(), ids=True, members=7, own=own, batch_size=batch_size)
    models, x, y = case.data()
    y = y.to(torch.uint8) if isinstance(criterion, nn.CrossEntropyLoss) else y
    results = []
    ensemble = Ensemble.from_models(models)
    optimizer = torch.optim.SGD(ensemble.parameters(), 0.1)
    options = {"batch_size": batch_size, "log_every": 1, "generator": torch.Generator().manual_seed(1)}
    history = fit(ensemble, x, y, criterion=criterion, optimizer=optimizer, steps=5, **options)
    assert history.path == "general"
    for e, model in enumerate(models):
        data = [t[e] if mine else t for mine, t in zip(own, (x, y), strict=True)]
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses = ordinary(model, *data, criterion, optimizer, 5, batch_size, torch.Generator().manual_seed(1))
        assert relative([history.loss[:, e], *ensemble.member(e).parameters()], [losses, *model.parameters()]) <= EXACT
        results.append(losses)
    assert not torch.equal(*results[:2])


def test_a_sweep_takes_class_ids():
    models, x, y = Case(nn.CrossEntropyLoss(), ids=True, members=3, own=(False, True)).data()
    results = []
    for train in (fit, fit_sharded):
        ensemble = Ensemble.from_models(models)
        sgd = partial(torch.optim.SGD, lr=0.1)
        optimizer = sgd(ensemble.parameters()) if train is fit else sgd
        train(ensemble, x, y, criterion=nn.CrossEntropyLoss(), optimizer=optimizer, steps=5)
        results.append(values(ensemble))
    assert same_bits(*results)


WRONG = {
    "members": (torch.zeros(2, 7, dtype=torch.int64), nn.CrossEntropyLoss(), "y (2, 7) is neither (samples, 3) nor"),
    "samples": (torch.zeros(6, dtype=torch.int64), nn.CrossEntropyLoss(), "x (7, 2) and y (6,) differ"),
    "floats": (torch.zeros(7).double(), nn.CrossEntropyLoss(), "y (7,) is neither (samples, 3) nor"),
    "elements": (torch.zeros(7, dtype=torch.int64), nn.MSELoss(), "y (7,) is neither (samples, 3) nor"),
    "one-column": (torch.zeros(7, 1, dtype=torch.int64), nn.CrossEntropyLoss(), "y (7, 1) is neither (samples, 3) nor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_targets_that_do_not_fit_an_ensemble(case):
    y, criterion, message = WRONG[case]
    models, x, _ = Case(criterion, members=3).data()
    ensemble = Ensemble.from_models(models)
    before = values(ensemble)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        fit(ensemble, x, y, criterion=criterion, optimizer=torch.optim.SGD(ensemble.parameters(), 0.1), steps=2)
    assert same_bits(values(ensemble), before)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(ignore_index=7), nn.NLLLoss(ignore_index=7)], ids=str)
def test_an_ensemble_names_ids_of_no_class(criterion, own):
    models, x, y = Case(nn.CrossEntropyLoss(), ids=True, members=3, own=(False, own)).data()
    y[..., 1] = 7  # and is ignored
    ensemble = Ensemble.from_models(models)
    options = {"criterion": criterion, "optimizer": torch.optim.SGD(ensemble.parameters(), 0.1), "steps": 2}
    for unknown in (3, -1, -100):
        wrong = y.clone()
        wrong[..., -1] = unknown
        message = f"y holds the class id {unknown}, but there are 3 classes, from 0$"
        with pytest.raises(ValueError, match=f"^{message}"):
            fit(ensemble, x, wrong, **options)
        with pytest.raises(ValueError, match=f"^validation's {message}"):
            fit(ensemble, x, y, validation=(x, wrong), **options)


@pytest.mark.parametrize("kind", [nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss])
def test_targets_of_another_dtype_are_what_torch_says(kind):
    model, x, y = make((2, 4, 3), "tanh", "identity", True, 7, torch.float32)
    twin, criterion = copy.deepcopy(model), kind()
    own, other = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin))
    try:
        ordinary(twin, x, y.double(), criterion, other, 3)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=f"^{re.escape(str(error))}$"):
            fit(model, x, y.double(), criterion=criterion, optimizer=own, steps=3)
    else:
        assert fit(model, x, y.double(), criterion=criterion, optimizer=own, steps=3).path == "general"
    assert same_bits(values(model), values(twin))


@pytest.mark.parametrize("impl", ["torch", "native"])
def test_weights_of_samples_may_want_gradients(impl):
    needs_numba(impl)
    ends = []
    for wants in (False, True):
        model, x, y = make((3, 4, 1), "tanh", "sigmoid", True, 8)
        weight = torch.linspace(0.1, 2, 8, dtype=torch.float64).requires_grad_(wants)
        order = {"batch_size": 3, "generator": torch.Generator().manual_seed(1)}
        options = {"criterion": nn.BCELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.5), "steps": 7}
        fit(model, x, y, sample_weight=weight, impl=impl, **order, **options)
        ends.append(values(model))
    assert same_bits(*ends)


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("members", [1, 2, 3, 17])
@pytest.mark.parametrize("weights", ["shared", "own"])
@pytest.mark.parametrize("targets", ["shared", "own", "ids", "own-ids"])
def test_weights_and_targets_may_each_be_shared(targets, weights, members, batch_size):
    generator = torch.Generator().manual_seed(members)
    sizes, ids = [2, 3, 2], "ids" in targets
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    leading = (members, 20) if "own" in targets else (20,)
    if ids:
        y = torch.randint(2, leading, generator=generator)
    else:
        y = torch.rand(*leading, 2, generator=generator, dtype=torch.float64)
    weight = torch.rand(*((members, 20) if weights == "own" else (20,)), generator=generator, dtype=torch.float64)
    ensemble = Ensemble(members, sizes, output_activation="identity", generator=generator).double()
    singles = [ensemble.member(i) for i in range(members)]
    criterion = nn.CrossEntropyLoss() if ids else nn.BCEWithLogitsLoss()
    options = {"criterion": criterion, "steps": 6, "batch_size": batch_size, "log_every": 1}
    order = torch.Generator().manual_seed(1)
    made = {"optimizer": torch.optim.SGD(ensemble.parameters(), lr=0.3), "generator": order}
    history = fit(ensemble, x, y, sample_weight=weight, **made, **options)
    for i, single in enumerate(singles):
        optimizer = torch.optim.SGD(single.parameters(), lr=0.3)
        generator = torch.Generator().manual_seed(1)
        epochs = itertools.chain.from_iterable(
            torch.randperm(20, generator=generator).split(batch_size or 20) for _ in range(6)
        )
        for step, rows in zip(range(6), epochs, strict=False):
            own_y, own_weight = (t[i] if own else t for t, own in ((y, "own" in targets), (weight, weights == "own")))
            losses = type(criterion)(reduction="none")(single(x[rows]), own_y[rows])
            losses = losses if ids else losses.mean(1)
            loss = (losses * own_weight[rows]).sum() / own_weight[rows].sum()
            assert history.loss[step, i].item() == pytest.approx(loss.item(), rel=1e-10)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize(
    ("whose", "criterion"),
    [
        *itertools.product(["samples", "members"], [nn.CrossEntropyLoss, nn.MSELoss]),
        ("classes", nn.CrossEntropyLoss),
    ],
)
def test_a_mean_tells_only_how_weights_relate(whose, criterion, batch_size):
    ids = criterion is nn.CrossEntropyLoss
    data = torch.Generator().manual_seed(2)
    x, numbers = torch.randn(20, 3, generator=data), torch.randn(20, 3, generator=data)
    y = numbers.argmax(1) if ids else numbers
    weight = torch.tensor([0.0, 1.0, 3.0, 2.0]).repeat(5)
    weight = torch.stack([weight, weight.roll(1)]) if whose == "members" else weight
    # Powers of two change no bit of a small number, not even where the product has but two.
    scales = [torch.tensor(2.0**power) for power in (0, -148, 125)]
    scales += [torch.tensor([[2.0**-148], [1.0]])] if whose == "members" else []
    ends = []
    for scale in scales:
        ensemble = Ensemble(2, [3, 4, 3], output_activation="identity", generator=torch.Generator().manual_seed(3))
        own = {"weight": scale * torch.tensor([1.0, 2.0, 3.0])} if whose == "classes" else {}
        options = {"criterion": criterion(**own), "batch_size": batch_size, "steps": 5, "log_every": 1}
        options |= {} if whose == "classes" else {"sample_weight": scale * weight}
        optimizer, order = torch.optim.SGD(ensemble.parameters(), lr=0.3), torch.Generator().manual_seed(1)
        history = fit(ensemble, x, y, optimizer=optimizer, generator=order, impl="torch", **options)
        ends.append([history.loss, *(p.detach() for p in ensemble.parameters())])
    assert ends[0][0].isfinite().all()
    for end in ends[1:]:
        assert all(map(torch.equal, end, ends[0]))


def test_weights_of_doubles_may_be_smaller_than_floats():
    model, x, y = MLP([3, 4, 3]), torch.randn(8, 3), torch.randn(8, 3)
    options = {"criterion": nn.MSELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.0), "steps": 1}
    for weight in (1e-320, 1e-60, 1e300):
        loss = fit(
            model, x, y, log_every=1, sample_weight=torch.full((8,), weight, dtype=torch.float64), **options
        ).loss
        torch.testing.assert_close(loss, nn.MSELoss()(model(x), y).detach()[None])
