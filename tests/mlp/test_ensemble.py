# SPDX-License-Identifier: Apache-2.0
"""Ensembles: stacked networks that train as each of them would alone."""

import copy
import functools
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import same_bits, sequential
from torch import nn
from training_cases import (
    LOSSES,
    OPTIMIZERS,
    SLOW_OPTIMIZERS,
    STATEFUL,
    chunks_of,
    make,
    ordinary,
    relative,
    state_of,
    values,
)

from perceptriton.kernels import plan, records
from perceptriton.mlp import MLP, Ensemble, History, fit, fit_sharded
from perceptriton.mlp.ensemble import in_order

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = 1e-10
LAYOUTS = ("matrices", "arrays")
NO_MEMBER = r"^indices must name at least one of 2 members, not 0$"


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch):
    """Each way in which the loop may lay out several networks, however many."""
    monkeypatch.setattr(plan, "train_loop", lambda *_: records.LoopPlan(request.param, True, "the test says so"))
    return request.param


def networks(members, sizes=(3, 4, 3, 2), hidden="tanh", output="sigmoid", bias=True, dtype=torch.float64, samples=6):
    made = [make(sizes, hidden, output, bias, samples, dtype, seed) for seed in range(members)]
    return [model for model, _, _ in made], torch.stack([x for _, x, _ in made]), torch.stack([y for *_, y in made])


def assert_members_are(ensemble, models, bound=EXACT):
    for i, model in enumerate(models):
        assert relative(ensemble.member(i).parameters(), model.parameters()) <= bound, f"member {i}"


def assert_trained_as_alone(ensemble, models, x, y, criterion, optimizer, steps, lr=None, **options):
    """Trains the ensemble by fit, and each model by the loop that everyone writes, to the same end: the history.

    x and y are shared, or there is one for each.
    """
    stacked = optimizer(ensemble.parameters())
    rate = stacked.param_groups[0]["lr"]
    common = {"criterion": criterion, "steps": steps, **options}
    history = fit(ensemble, x, y, optimizer=stacked, generator=torch.Generator().manual_seed(3), lr=lr, **common)
    assert stacked.param_groups[0]["lr"] == rate
    for i, model in enumerate(models):
        single = optimizer(model.parameters())
        single.param_groups[0]["lr"] = rate if lr is None else lr[i].item()
        data = (t[i] if t.dim() == 3 else t for t in (x, y))
        losses = ordinary(model, *data, optimizer=single, generator=torch.Generator().manual_seed(3), **common)
        assert not options.get("log_every") or relative([history.loss[:, i]], [losses]) <= EXACT
        for p, q in zip(in_order(ensemble), model.parameters(), strict=True):
            for name, value in single.state.get(q, {}).items():
                state = stacked.state[p][name]
                assert relative([state if name == "step" else state[i]], [value]) <= EXACT
    assert_members_are(ensemble, models)
    return history


# --- construction ----------------------------------------------------------------------------------------------


def test_parameters_are_stacked():
    ensemble = Ensemble(5, [3, 4, 2], dtype=torch.float64)
    assert {name: tuple(p.shape) for name, p in ensemble.named_parameters()} == {
        "weights.0": (5, 4, 3),
        "weights.1": (5, 2, 4),
        "biases.0": (5, 4),
        "biases.1": (5, 2),
    }
    assert len(ensemble) == 5
    assert all(p.dtype is torch.float64 for p in ensemble.parameters())
    assert repr(ensemble).startswith("Ensemble(\n  5, [3, 4, 2], activation='sigmoid', output_activation='sigmoid'")
    assert list(Ensemble(2, [3, 1], bias=False).state_dict()) == ["weights.0"]


@pytest.mark.slow
def test_init_is_that_of_linear():
    generator = torch.Generator().manual_seed(1)
    before = torch.get_rng_state()
    ensemble = Ensemble(4000, [5, 3, 1], generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    linears = [nn.Linear(5, 3) for _ in range(4000)]
    for own, kind in ((ensemble.weights[0], "weight"), (ensemble.biases[0], "bias")):
        theirs = torch.stack([getattr(linear, kind).detach() for linear in linears])
        assert own.shape == theirs.shape
        quantiles = torch.linspace(0, 1, 11)
        torch.testing.assert_close(
            own.detach().flatten().quantile(quantiles), theirs.flatten().quantile(quantiles), atol=0.01, rtol=0
        )
    assert ensemble.weights[1].abs().max() <= 3**-0.5
    assert ensemble.weights[1].abs().max() > 0.99 * 3**-0.5
    # Members are drawn independently of each other.
    assert abs(torch.corrcoef(ensemble.weights[0].detach()[:, 0, :2].T)[0, 1]) < 0.06
    again = Ensemble(4000, [5, 3, 1], generator=torch.Generator().manual_seed(1))
    other = Ensemble(4000, [5, 3, 1], generator=torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(values(ensemble), values(again), strict=True))
    assert not torch.equal(ensemble.weights[0], other.weights[0])


def test_from_models_and_member_are_exact():
    models, x, _ = networks(3)
    ensemble = Ensemble.from_models(models)
    assert (ensemble.activation, ensemble.output_activation, ensemble.sizes) == ("tanh", "sigmoid", (3, 4, 3, 2))
    for i, model in enumerate(models):
        member = ensemble.member(i)
        assert isinstance(member, MLP)
        assert member.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(member.parameters(), model.parameters(), strict=True))
        assert torch.equal(member(x[i]), model(x[i]))
        with torch.no_grad():
            member[0].weight.zero_()  # a copy
    assert torch.equal(ensemble.weights[0][2], models[2][0].weight)
    for last in (-1, np.int64(2)):
        assert torch.equal(ensemble.member(last)[0].weight, models[2][0].weight)
    plain = sequential((3, 4, 3, 2), "tanh", "sigmoid", dtype=torch.float64)
    assert torch.equal(Ensemble.from_models([plain, models[0]]).member(0)[0].weight, plain[0].weight)


def test_subset_is_exact():
    ensemble = Ensemble(5, [3, 2])
    for indices in ([3, 1], torch.tensor([3, 1])):
        part = ensemble.subset(indices)
        assert torch.equal(part.weights[0], ensemble.weights[0][[3, 1]])
        assert torch.equal(part.biases[0], ensemble.biases[0][[3, 1]])
    assert torch.equal(ensemble.subset(slice(1, 4)).weights[0], ensemble.weights[0][1:4])


def test_repeated_members_are_copies_in_a_row():
    ensemble = Ensemble(3, [3, 4, 2], "tanh", "identity", dtype=torch.float64)
    repeated = ensemble.repeat(2)
    assert (len(repeated), repeated.activation, repeated.output_activation) == (6, "tanh", "identity")
    for p, q in zip(ensemble.parameters(), repeated.parameters(), strict=True):
        assert torch.equal(q, p.repeat_interleave(2, 0))
    with torch.no_grad():
        repeated.weights[0][1] = 0
    assert ensemble.weights[0][0].any()
    assert torch.equal(repeated.weights[0][0], ensemble.weights[0][0])


# torch.manual_seed takes negative seeds and the largest of 64 bits, and wraps them around.
SEEDS = [3, -1, 0, 3, 2**64 - 1, -(2**63)]
DRAWN = {
    "xor": ([2, 2, 1], {}),
    "one-layer": ([7, 5], {"activation": "tanh"}),
    "deep-and-wide": ([1, 33, 3, 100, 2], {"output_activation": "identity"}),
    "bare": ([6, 3, 9], {"bias": False, "activation": "relu"}),
    "fp64": ([3, 10, 2], {"dtype": torch.float64}),
    "bf16": ([3, 10, 2], {"dtype": torch.bfloat16}),
    "empty": ([3, 0, 2], {}),  # torch draws biases for layers without inputs too
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("case", DRAWN)
def test_seeds_draw_what_modules_draw(case):
    sizes, options = DRAWN[case]
    before = torch.get_rng_state()
    ensemble = Ensemble.from_seeds(SEEDS, sizes, **options)
    assert torch.equal(torch.get_rng_state(), before)
    for i, seed in enumerate(SEEDS):
        torch.manual_seed(seed)
        model = MLP(sizes, **options)
        member = ensemble.member(i)
        assert str(member) == str(model)
        assert same_bits(values(member), values(model))
        torch.manual_seed(seed)
        linears = [nn.Linear(*pair, model[0].bias is not None, dtype=model[0].weight.dtype) for pair in pairwise(sizes)]
        assert same_bits(values(member), [p for linear in linears for p in linear.parameters()])
    assert all(p.requires_grad and p.is_leaf for p in ensemble.parameters())


def test_any_sequence_of_seeds():
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    expected = values(Ensemble.from_seeds([4, 5, 6], [3, 2]))
    for seeds in (range(4, 7), torch.arange(4, 7), numpy.arange(4, 7), list(numpy.arange(4, 7)), iter((4, 5, 6))):
        assert same_bits(values(Ensemble.from_seeds(seeds, [3, 2])), expected)
    assert same_bits(values(Ensemble.from_seeds([6, 4], [3, 2])), [p[[2, 0]] for p in expected])
    with torch.device("meta"):
        assert all(p.is_meta for p in Ensemble.from_seeds([4, 5, 6], [3, 2]).parameters())
        assert same_bits(values(Ensemble.from_seeds([4, 5, 6], [3, 2], device="cpu")), expected)


def test_a_seed_that_is_none_leaves_the_generator():
    before = torch.get_rng_state()
    for seeds in ([1, 2.0], [1, 2**64], []):
        with pytest.raises((TypeError, ValueError), match=r"^seeds"):
            Ensemble.from_seeds(seeds, [3, 2])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mask_is_a_subset():
    ensemble = Ensemble(3, [3, 2])
    for mask in ([True, False, True], torch.tensor([True, False, True])):
        assert same_bits(values(ensemble.subset(mask)), values(ensemble.subset([0, -1])))
    # Numbers of one byte are no mask.
    assert same_bits(values(ensemble.subset(torch.tensor([1, 0], dtype=torch.uint8))), values(ensemble.subset([1, 0])))


ERRORS = {
    "seeds": (lambda: Ensemble.from_seeds([], [2, 1]), ValueError, r"^seeds must hold at least one seed, not 0$"),
    "seeds-number": (lambda: Ensemble.from_seeds(3, [2, 1]), TypeError, r"^seeds must be a sequence of ints, not 3$"),
    "seeds-float": (
        lambda: Ensemble.from_seeds([1, 2.0], [2, 1]),
        TypeError,
        r"^seeds\[1\] must be an int, not 2.0$",
    ),
    "seeds-tensor": (
        lambda: Ensemble.from_seeds(torch.ones(2), [2, 1]),
        TypeError,
        r"^seeds\[0\] must be an int, not 1.0$",
    ),
    "seeds-bool": (
        lambda: Ensemble.from_seeds([True], [2, 1]),
        TypeError,
        r"^seeds\[0\] must be an int, not True$",
    ),
    "seeds-large": (
        lambda: Ensemble.from_seeds([2**64], [2, 1]),
        ValueError,
        r"^seeds\[0\] must lie in \[-2\*\*63, 2\*\*64\), not 18446744073709551616$",
    ),
    "seeds-sizes": (lambda: Ensemble.from_seeds([1], [2]), ValueError, r"^sizes must hold an input and an output"),
    "repeat": (lambda: Ensemble(2, [3, 1]).repeat(0), ValueError, r"^n must be at least 1, not 0$"),
    "repeat-type": (lambda: Ensemble(2, [3, 1]).repeat(2.0), TypeError, r"^n must be an int, not 2.0$"),
    "repeat-bool": (lambda: Ensemble(2, [3, 1]).repeat(True), TypeError, r"^n must be an int, not True$"),
    **{
        f"subset-{name}": (lambda none=none: Ensemble(2, [3, 1]).subset(none), ValueError, NO_MEMBER)
        for name, none in {"none": [], "slice": slice(2, 2), "mask": torch.zeros(2, dtype=torch.bool)}.items()
    },
    **{
        f"subset-{name}": (
            lambda far=far: Ensemble(2, [3, 1]).subset(far),
            IndexError,
            r"^(index -?\d|The shape of the mask)",
        )
        for name, far in {"outside": [0, 2], "negative": [-3], "long-mask": [True, False, True]}.items()
    },
    "subset-nan": (
        lambda: Ensemble(2, [3, 1]).subset([0, torch.nan]),
        TypeError,
        r"^indices must be ints, \(n,\), not \(2,\) of torch.float32$",
    ),
    "subset-number": (
        lambda: Ensemble(2, [3, 1]).subset(1),
        TypeError,
        r"^indices must be ints, \(n,\), not \(\) of torch.int64$",
    ),
    "best-k-nan": (
        lambda: Ensemble(2, [3, 1]).best(torch.ones(2), torch.nan),
        TypeError,
        r"^k must be an int, not nan$",
    ),
    "best-k-bool": (
        lambda: Ensemble(2, [3, 1]).best(torch.ones(2), True),
        TypeError,
        r"^k must be an int, not True$",
    ),
    "members": (lambda: Ensemble(0, [2, 1]), ValueError, r"^num_members must be at least 1, not 0$"),
    "members-type": (lambda: Ensemble(2.0, [2, 1]), TypeError, r"^num_members must be an int, not 2.0$"),
    "sizes": (lambda: Ensemble(2, [2]), ValueError, r"^sizes must hold an input and an output width, not \[2\]$"),
    "activation": (lambda: Ensemble(2, [2, 1], "gelu"), ValueError, r"^activation must be one of .* not 'gelu'$"),
    "input": (
        lambda: Ensemble(2, [3, 1])(torch.ones(4, 2)),
        ValueError,
        r"^input \(4, 2\) is neither \(B, 3\) nor \(2, B, 3\)$",
    ),
    "input-members": (lambda: Ensemble(2, [3, 1])(torch.ones(1, 4, 3)), ValueError, r"^input \(1, 4, 3\) is neither"),
    "members-bool": (lambda: Ensemble(True, [2, 1]), TypeError, r"^num_members must be an int, not True$"),
    "member-bool": (lambda: Ensemble(2, [3, 1]).member(True), TypeError, r"^index must be an int, not True$"),
    "member-float": (lambda: Ensemble(2, [3, 1]).member(1.0), TypeError, r"^index must be an int, not 1.0$"),
    "member-text": (lambda: Ensemble(2, [3, 1]).member("a"), TypeError, r"^index must be an int, not 'a'$"),
    "member": (lambda: Ensemble(2, [3, 1]).member(2), IndexError, r"^index 2 is outside an ensemble of 2$"),
    "best": (lambda: Ensemble(2, [3, 1]).best(torch.ones(3)), ValueError, r"^losses \(3,\) are not one for each of 2"),
    "best-k": (lambda: Ensemble(2, [3, 1]).best(torch.ones(2), 3), ValueError, r"^k must lie in \[1, 2\], not 3$"),
    "best-empty": (
        lambda: Ensemble(2, [3, 1]).best(History([], torch.empty(0, 2), 0.0, "torch")),
        ValueError,
        r"^losses \(0, 2\) are not one for each",
    ),
    "models": (lambda: Ensemble.from_models([]), ValueError, r"^models must hold at least one model, not 0$"),
    "models-type": (
        lambda: Ensemble.from_models([nn.Linear(2, 2)]),
        TypeError,
        r"^models\[0\] cannot be a member: Linear is neither an MLP nor an nn.Sequential$",
    ),
    "models-differ": (
        lambda: Ensemble.from_models([MLP([2, 1]), MLP([2, 2])]),
        ValueError,
        r"^models\[1\] is \(\(2, 2\), .* but models\[0\] \(\(2, 1\), ",
    ),
    "sharded": (
        lambda: fit_sharded(MLP([2, 1]), None, None, criterion=None, optimizer=None, steps=1),
        TypeError,
        r"^ensemble must be an Ensemble, not MLP$",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


def test_best():
    ensemble = Ensemble(4, [2, 1])
    losses = torch.tensor([0.3, torch.nan, 0.1, 0.3])
    assert ensemble.best(losses) == [2]
    assert ensemble.best(losses, 4) == [2, 0, 3, 1]
    history = History([0, 1], torch.stack([losses.flip(0), losses]), 0.0, "torch")
    assert ensemble.best(history, 2) == [2, 0]


# --- as a module -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
def test_forward_is_that_of_its_members(bias):
    models, x, _ = networks(3, bias=bias)
    ensemble = Ensemble.from_models(models)
    own, shared = ensemble(x), ensemble(x[0])
    assert own.shape == shared.shape == (3, 6, 2)
    for i, model in enumerate(models):
        torch.testing.assert_close(own[i], model(x[i]))
        torch.testing.assert_close(shared[i], model(x[0]))
    assert ensemble(x[:, :0]).shape == (3, 0, 2)


def test_gradients_to_the_second_order():
    models, x, _ = networks(2, sizes=(2, 3, 1))
    ensemble = Ensemble.from_models(models)
    x = x[..., :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(ensemble, x)
    assert torch.autograd.gradgradcheck(ensemble, x)
    ensemble(x).sum().backward()
    for i, model in enumerate(models):
        gradients = torch.autograd.grad(model(x[i]).sum(), list(model.parameters()))
        stacked = [p.grad[i] for p in in_order(ensemble)]
        assert relative(stacked, gradients) <= EXACT


# test_checkpoints.py saves its state.
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ensemble: pickle.loads(pickle.dumps(ensemble))])
def test_copies(copied):
    ensemble = Ensemble(3, [2, 4, 1], "relu", "identity")
    other = copied(ensemble)
    x = torch.randn(5, 2)
    assert torch.equal(other(x), ensemble(x))
    with torch.no_grad():
        other.weights[0].add_(1)
    assert not torch.equal(other(x), ensemble(x))


def test_it_moves():
    ensemble = Ensemble(3, [2, 1]).to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in ensemble.parameters()} == {("meta", torch.bfloat16)}
    assert Ensemble(3, [2, 1], device="meta").weights[0].is_meta
    assert Ensemble(3, [2, 1]).double()(torch.ones(4, 2, dtype=torch.float64)).dtype is torch.float64


# --- fit -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("batch_size", [None, 4], ids=["full", "minibatches"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_members_train_as_they_would_alone(optimizer, batch_size, own, layout):
    models, x, y = networks(3)
    ensemble = Ensemble.from_models(models)
    before = values(ensemble)
    data, common = (x, y) if own else (x[0], y[0]), {"batch_size": batch_size, "log_every": 7}
    history = assert_trained_as_alone(ensemble, models, *data, nn.BCELoss(), OPTIMIZERS[optimizer], 30, **common)
    assert (history.path, history.steps, history.loss.shape) == ("torch", [0, 7, 14, 21, 28], (5, 3))
    assert relative(before, values(ensemble)) > 1e6 * EXACT


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_summed_over_members(loss, layout):
    criterion, output = LOSSES[loss]
    models, x, y = networks(3, output=output)
    ensemble = Ensemble.from_models(models)
    optimizer = functools.partial(torch.optim.SGD, lr=0.05)
    history = assert_trained_as_alone(ensemble, models, x[0], y, criterion, optimizer, 20, log_every=1)
    assert history.path == "torch"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("sizes", [(3, 1), (3, 5, 2), (3, 8, 8, 8, 2)], ids=str)
def test_shapes(sizes, bias, layout):
    models, x, y = networks(4, sizes=sizes, hidden="relu", bias=bias)
    ensemble = Ensemble.from_models(models)
    assert_trained_as_alone(ensemble, models, x, y, nn.BCELoss(), functools.partial(torch.optim.Adam, lr=0.02), 20)


@pytest.mark.parametrize("optimizer", ["sgd-decay", "momentum", "nesterov", "adam-decay", "adamw"])
def test_a_rate_for_each_member(optimizer, layout):
    models, x, y = networks(3)
    ensemble = Ensemble.from_models(models)
    rates = torch.tensor([0.01, 0.1, 0.3])
    assert_trained_as_alone(ensemble, models, x[0], y[0], nn.BCELoss(), OPTIMIZERS[optimizer], 20, rates)


@pytest.mark.parametrize("optimizer", ["sgd", *STATEFUL])
@pytest.mark.parametrize("change", ["weights", "data", "rate", "nan"])
def test_members_never_influence_each_other(change, optimizer, layout):
    results = []
    for perturbed in (False, True):
        models, x, y = networks(4, dtype=torch.float32)
        ensemble, rates = Ensemble.from_models(models), torch.full((4,), 0.1)
        if perturbed:
            with torch.no_grad():
                if change == "weights":
                    ensemble.weights[0][2] += 1
                elif change == "nan":
                    ensemble.biases[0][2] = torch.nan
                elif change == "data":
                    x[2] += 1
                else:
                    rates[2] = 0.7
        own, data = OPTIMIZERS[optimizer](ensemble.parameters()), (x if change == "data" else x[0], y[0])
        history = fit(ensemble, *data, criterion=nn.BCELoss(), optimizer=own, steps=30, log_every=10, lr=rates)
        results.append((values(ensemble), history.loss))
    (before, losses), (after, other_losses) = results
    rest = [0, 1, 3]
    assert all(torch.equal(a[rest], b[rest]) for a, b in zip(before, after, strict=True))
    assert torch.equal(losses[:, rest], other_losses[:, rest])
    assert all(not torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))
    assert other_losses[1:, 2].isnan().all() == (change == "nan")


@pytest.mark.parametrize("batch_size", [None, 4], ids=["full", "minibatches"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", *SLOW_OPTIMIZERS])
def test_the_size_of_a_chunk_changes_no_bit(optimizer, batch_size, layout, monkeypatch):
    results = []
    for size in (1, 7, 40):
        monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(size))
        models, x, y = networks(5, dtype=torch.float32)
        ensemble = Ensemble.from_models(models)
        own = OPTIMIZERS[optimizer](ensemble.parameters())
        options = {"batch_size": batch_size, "log_every": 3, "generator": torch.Generator().manual_seed(2)}
        history = fit(ensemble, x, y[0], criterion=nn.BCELoss(), optimizer=own, steps=40, **options)
        results.append([*values(ensemble), history.loss, *state_of(own)[1]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("members", [1, 7, 300])
def test_any_number_of_members(members):
    ensemble = Ensemble(members, [2, 4, 1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    some = sorted({0, members // 2, members - 1})
    models = [ensemble.member(i) for i in some]
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=1.0)
    history = fit(ensemble, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=50, log_every=49)
    assert history.loss.shape == (2, members)
    for model in models:
        ordinary(model, x, y, nn.BCELoss(), torch.optim.SGD(model.parameters(), lr=1.0), 50)
    assert_members_are(ensemble.subset(some), models)


def test_layouts_are_chosen_by_size():
    xor = records.TrainConfig((2, 2, 1))
    assert plan.train_loop(1, 4, xor, True).layout == "joint"
    assert plan.train_loop(8, 4, xor, True).layout == "matrices"
    assert plan.train_loop(1024, 4, xor, True).layout == "arrays"
    wide = records.TrainConfig((32, 64, 5))
    assert plan.train_loop(1, 256, wide, True).layout == "matrices"
    assert plan.train_loop(1024, 64, wide, False).layout == "matrices"
    assert plan.train_loop(1, 4, xor, True).one_thread
    assert not plan.train_loop(1, 1024, records.TrainConfig((784, 512, 10)), True).one_thread
    assert all(plan.train_loop(e, 4, xor, True).reason for e in (1, 8, 1024))


# --- the general path ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_another_criterion_applies_to_each_member(own):
    models, x, y = networks(3)
    ensemble = Ensemble.from_models(models)
    optimizer = functools.partial(torch.optim.Adam, lr=0.02, amsgrad=True)

    def absolute(p, t):
        assert p.shape == t.shape  # of one member
        return (p - t).abs().mean()

    data, common = (x, y) if own else (x[0], y[0]), {"batch_size": 4, "log_every": 5}
    with pytest.warns(UserWarning, match=r"^an ordinary loop trains this Ensemble, .*: the criterion is a function$"):
        history = assert_trained_as_alone(ensemble, models, *data, absolute, optimizer, 12, **common)
    assert (history.path, history.loss.shape) == ("general", (3, 3))
    assert history.reason == "the criterion is a function"


class Foreign(torch.optim.SGD):
    pass


Foreign.__module__ = "somebody.optim"


def test_optimizers_that_would_mix_members():
    ensemble = Ensemble.from_models(networks(3)[0]).float()
    x, y = torch.randn(5, 3), torch.rand(5, 2)
    options = {"criterion": nn.MSELoss(), "steps": 2}
    for name in {"LBFGS", "Adafactor", "Muon"} & {*dir(torch.optim)}:
        optimizer = torch.optim.SGD(ensemble.parameters())
        optimizer.__class__ = getattr(torch.optim, name)  # Muon itself takes no biases
        with pytest.raises(ValueError, match=rf"^optimizer of an Ensemble must .* itself: {name} looks at whole"):
            fit(ensemble, x, y, optimizer=optimizer, **options)
    alone = Ensemble(1, [3, 2])  # whose one member has none to be mixed with
    with pytest.warns(UserWarning, match=r"the optimizer is a LBFGS$"):
        fit(alone, x, y, optimizer=torch.optim.LBFGS(alone.parameters()), **options)
    with pytest.warns(UserWarning, match=r"is a Foreign; members stay apart only if it updates each element"):
        fit(ensemble, x, y, optimizer=Foreign(ensemble.parameters()), **options)


BAD = {
    "x": ({"x": torch.ones(4, 6, 3)}, ValueError, r"^x \(4, 6, 3\) is neither \(samples, 3\) nor \(3, samples, 3\)$"),
    "y": ({"y": torch.ones(6)}, ValueError, r"^y \(6,\) is neither \(samples, 2\) nor \(3, samples, 2\)$"),
    "samples": ({"y": torch.ones(5, 2)}, ValueError, r"^x \(6, 3\) and y \(5, 2\) differ in their number of samples$"),
    "lr": (
        {"lr": torch.ones(2)},
        ValueError,
        r"^lr \(2,\) is neither \(3,\), .* nor a schedule, \(2, 1\) or \(2, 3\)$",
    ),
    "lr-negative": ({"lr": torch.tensor([1.0, -2.0, 1.0])}, ValueError, r"^lr must not be negative, but .* -2.0$"),
    "lr-dtype": ({"lr": torch.ones(3, dtype=torch.int64)}, TypeError, r"^lr must be a floating point tensor, not"),
    "lr-general": (
        {"lr": torch.ones(3), "criterion": lambda p, t: (p - t).sum()},
        NotImplementedError,
        r"^lr of each member needs a loop without autograd: the criterion is a function$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_leave_the_ensemble(case):
    changes, error, message = BAD[case]
    ensemble = Ensemble(3, [3, 2])
    before = values(ensemble)
    given = {"x": torch.ones(6, 3), "y": torch.ones(6, 2), "criterion": nn.BCELoss()} | changes
    with pytest.raises(error, match=message):
        fit(ensemble, optimizer=torch.optim.SGD(ensemble.parameters(), lr=1.0), steps=2, **given)
    assert all(torch.equal(a, b) for a, b in zip(before, values(ensemble), strict=True))


# --- NaN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["x", "y"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("loss", ["bce", "mse", "function", "weighted"])
@pytest.mark.filterwarnings("ignore:an ordinary loop trains this Ensemble")
def test_nan_of_one_member_is_its_own(loss, own, place):
    """On every path. What all share is refused, and named, or trained on if that is wanted."""
    models, x, y = networks(3)
    criterion = {
        "bce": nn.BCELoss(),
        "mse": nn.MSELoss(),
        "function": lambda p, t: nn.functional.binary_cross_entropy(p, t.nan_to_num(0.5)) + 0 * t.sum(),
        "weighted": nn.BCELoss(weight=torch.tensor([[1.0], [2], [3], [1], [2], [3]], dtype=torch.float64)),
    }[loss]
    ensemble = Ensemble.from_models(models)
    x, y = (x, y) if own else (x[0], y[0])
    data = {"x": x, "y": y}
    clean = copy.deepcopy(data)
    data[place][(1, 4, 0) if own else (4, 0)] = torch.nan
    options = {"criterion": criterion, "steps": 5, "log_every": 1}
    adam = torch.optim.Adam(ensemble.parameters(), lr=0.02)
    if not own:
        before = values(ensemble)
        with pytest.raises(ValueError, match=rf'^{place} is NaN, first in row 4 of 6; nan="propagate" takes it$'):
            fit(ensemble, **data, optimizer=adam, **options)
        assert [p.tolist() for p in values(ensemble)] == [p.tolist() for p in before]
        history = fit(ensemble, **data, optimizer=adam, nan="propagate", **options)
        assert history.loss.isnan().all()
        return
    history = fit(ensemble, **data, optimizer=adam, **options)
    assert history.loss.isnan().any(0).tolist() == [False, True, False]
    for i in (0, 2):
        model, optimizer = models[i], torch.optim.Adam(models[i].parameters(), lr=0.02)
        losses = ordinary(model, clean["x"][i], clean["y"][i], criterion, optimizer, 5)
        assert relative([history.loss[:, i]], [losses]) <= EXACT
        assert relative(ensemble.member(i).parameters(), model.parameters()) <= EXACT
    assert all(p.isnan().all() for p in ensemble.member(1).parameters())


def test_nan_is_looked_for_in_what_has_it():
    model, x, y = make((3, 4, 1), "tanh", "identity", True, 6)
    options = {"criterion": nn.MSELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "steps": 1}
    with pytest.raises(ValueError, match=r"^nan must be \"raise\" or \"propagate\", not 'ignore'$"):
        fit(model, x, y, nan="ignore", **options)
    x[[3, 5]] = torch.nan
    with pytest.raises(ValueError, match=r"^x is NaN, first in row 3 of 6"):
        fit(model, x, y, **options)
    ids = nn.CrossEntropyLoss()
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    options |= {"criterion": ids, "optimizer": torch.optim.SGD(net.parameters(), lr=0.1)}
    fit(net, torch.ones(6, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0]), **options)
