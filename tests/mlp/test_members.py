# SPDX-License-Identifier: Apache-2.0
"""Numbers of each member that `fit` is given: against ordinary loops, each with an optimizer that has its numbers."""

import random
import re

import pytest
import torch
from cases import negated, same_bits
from torch import nn
from training_cases import chunks_of, make, needs_numba, ordinary, relative, state_of, values

from perceptriton.mlp import MLP, Ensemble, fit, fit_sharded
from perceptriton.mlp.ensemble import in_order
from perceptriton.mlp.training.members import numbers_of

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = 1e-10
# name: (optimizer, what all members have, what each may have of its own)
KINDS = {
    "sgd": (torch.optim.SGD, {"lr": 0.3}, ("weight_decay", "momentum")),
    "dampening": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.4, "dampening": 0.3}, ("weight_decay", "momentum")),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, ("weight_decay", "momentum")),
    "adam": (torch.optim.Adam, {"lr": 0.02, "eps": 1e-4, "weight_decay": 0.1}, ("weight_decay", "betas")),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "eps": 1e-4}, ("weight_decay", "betas")),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "eps": 1e-2}, ("weight_decay", "momentum")),
    "rmsprop-momentum": (
        torch.optim.RMSprop,
        {"lr": 0.01, "alpha": 0.7, "eps": 1e-2, "momentum": 0.5, "weight_decay": 0.1},
        ("weight_decay", "momentum"),
    ),
}


@pytest.fixture(params=["torch", "native"])
def impl(request):
    needs_numba(request.param)
    return request.param


def drawn(draw, kind, members):
    """Numbers for some of what members of this kind may have of their own, of which about a third are 0."""

    def numbers(highest, lowest=0.0):
        own = [draw.choice([lowest, draw.uniform(0.1, highest), draw.uniform(0.1, highest)]) for _ in range(members)]
        return torch.tensor(own, dtype=draw.choice([torch.float64, torch.float32]))

    found = {}
    for name in draw.sample(KINDS[kind][2], draw.randint(1, 2)):
        if name == "betas":
            pair = [draw.choice([numbers(0.99), numbers(0.99), draw.choice([0.0, 0.8])]) for _ in range(2)]
            found[name] = draw.choice([list, tuple])(pair)
        else:
            found[name] = numbers(0.5 if name == "weight_decay" else 0.95, 0.2 if kind == "nesterov" else 0.0)
    return found


def of_member(per_member, e):
    """The same as options of an optimizer of torch."""
    own = {name: numbers[e].item() for name, numbers in per_member.items() if name != "betas"}
    pair = per_member.get("betas", ())
    betas = tuple(beta[e].item() if isinstance(beta, torch.Tensor) else beta for beta in pair)
    return own | ({"betas": betas} if betas else {})


def problem(members, sizes=(3, 4, 2), samples=7, dtype=torch.float64):
    made = [make(sizes, "tanh", "sigmoid", True, samples, dtype, seed) for seed in range(members)]
    return [model for model, _, _ in made], *made[0][1:]


def assert_members_are(ensemble, stacked, models, singles, bound=EXACT):
    """Each with its parameters and its optimizer's state; a momentum buffer that torch has not is 0."""
    for e, (model, single) in enumerate(zip(models, singles, strict=True)):
        assert relative([p[e] for p in in_order(ensemble)], model.parameters()) <= bound, f"member {e}"
        for p, q in zip(in_order(ensemble), model.parameters(), strict=True):
            ours, theirs = stacked.state[p], single.state[q]
            assert {*theirs} <= {*ours}
            for name, value in ours.items():
                if name not in theirs or theirs[name] is None:
                    assert name == "momentum_buffer"
                    assert not value[e].any()
                else:
                    own = value if name == "step" else value[e]
                    assert own.dtype is theirs[name].dtype
                    assert relative([own], [theirs[name]]) <= bound, f"{name} of member {e}"


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
@pytest.mark.parametrize("kind", KINDS)
def test_members_train_as_with_optimizers_of_their_own(kind, seed, impl):
    draw = random.Random(f"{kind} {seed}")
    make_optimizer, shared, _ = KINDS[kind]
    members, sizes = draw.choice([1, 2, 5, 18]), [draw.randint(1, 5) for _ in range(draw.randint(2, 4))]
    models, x, y = problem(members, sizes, draw.randint(1, 9))
    per_member, batch_size, steps = drawn(draw, kind, members), draw.choice([None, 3]), draw.randint(1, 12)
    lr = torch.tensor([shared["lr"] * draw.uniform(0.3, 1) for _ in range(members)], dtype=torch.float64)
    falling = torch.linspace(1, 0.4, steps, dtype=torch.float64)[:, None]
    rates = draw.choice([None, lr, falling * lr, shared["lr"] * falling])
    ensemble = Ensemble.from_models(models)
    stacked = make_optimizer(ensemble.parameters(), **shared)
    groups = stacked.state_dict()["param_groups"]
    options = {"criterion": nn.BCELoss(), "steps": steps, "batch_size": batch_size}
    common = options | {"lr": rates, "per_member": per_member, "impl": impl, "log_every": 2}
    history = fit(ensemble, x, y, optimizer=stacked, generator=torch.Generator().manual_seed(1), **common)
    assert history.path == impl
    assert stacked.state_dict()["param_groups"] == groups
    singles = [make_optimizer(m.parameters(), **shared | of_member(per_member, e)) for e, m in enumerate(models)]
    for e, (model, single) in enumerate(zip(models, singles, strict=True)):
        own = [shared["lr"]] * steps if rates is None else rates.expand(steps, members)[:, e].tolist()
        common = options | {"generator": torch.Generator().manual_seed(1), "log_every": 2, "rates": own}
        losses = ordinary(model, x, y, optimizer=single, **common)
        assert relative([history.loss[:, e]], [losses]) <= EXACT
    assert_members_are(ensemble, stacked, models, singles)


def test_numbers_of_other_members_are_refused(impl):
    # The negative control of the test above.
    models, x, y = problem(3)
    results = []
    for order in ([0, 1, 2], [0, 2, 1]):
        ensemble = Ensemble.from_models(models)
        own = torch.optim.Adam(ensemble.parameters(), lr=0.02)
        per_member = {"betas": (torch.tensor([0.0, 0.5, 0.9])[order], 0.99)}
        fit(ensemble, x, y, criterion=nn.BCELoss(), optimizer=own, steps=5, per_member=per_member, impl=impl)
        results.append(values(ensemble))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*results, strict=True))
    assert all(relative([a[1:]], [b[1:]]) > 1e6 * EXACT for a, b in zip(*results, strict=True))


# name: of KINDS, of which ordinary steps can go on with what all members have, where one had no momentum before
GOES_ON = {"sgd": {"momentum": 0.8}, "nesterov": {}, "adamw": {}, "rmsprop": {}}


@pytest.mark.parametrize("kind", GOES_ON)
def test_ordinary_steps_before_and_after(kind, impl):
    models, x, y = problem(3)
    make_optimizer, shared, _ = KINDS[kind]
    shared = shared | GOES_ON[kind]
    per_member = {"weight_decay": torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)}
    if kind == "adamw":
        per_member["betas"] = (0.7, torch.tensor([0.9, 0.0, 0.99], dtype=torch.float64))
    elif kind != "rmsprop":  # torch cannot begin with momentum where a state has no buffer
        momentum = [0.5, 0.7, 0.9] if kind == "nesterov" else [0.5, 0.0, 0.9]
        per_member["momentum"] = torch.tensor(momentum, dtype=torch.float64)
    ensemble, criterion = Ensemble.from_models(models), nn.BCELoss()

    def summed(outputs, targets):
        return sum(criterion(output, targets) for output in outputs)

    stacked = make_optimizer(ensemble.parameters(), **shared)
    singles = [make_optimizer(model.parameters(), **shared) for model in models]
    for own, steps in ((False, 3), (True, 4), (False, 3), (True, 1), (True, 4), (False, 2)):
        if own:
            numbers = {"per_member": per_member, "impl": impl}
            fit(ensemble, x, y, criterion=criterion, optimizer=stacked, steps=steps, **numbers)
        else:
            ordinary(ensemble, x, y, summed, stacked, steps)
        for e, (model, single) in enumerate(zip(models, singles, strict=True)):
            (group,) = single.param_groups
            kept = dict(group)
            group.update(of_member(per_member, e) if own else {})
            ordinary(model, x, y, criterion, single, steps)
            group.update(kept)
        # Among others the buffer of a member that had momentum and for some steps has none.
        assert_members_are(ensemble, stacked, models, singles)


def test_a_state_of_two_kinds_of_steps_is_refused():
    # Where torch itself would have no buffer to go on from.
    ensemble, (x, y) = Ensemble(2, [3, 4, 2], dtype=torch.float64), problem(1)[1:]
    own = torch.optim.RMSprop(ensemble.parameters(), lr=0.01)
    options = {"criterion": nn.BCELoss(), "optimizer": own, "steps": 2}
    fit(ensemble, x, y, **options)
    with pytest.raises(NotImplementedError, match=r"^per_member needs a loop .*: the optimizer's state does not fit"):
        fit(ensemble, x, y, per_member={"momentum": torch.tensor([0.5, 0.0])}, **options)


@pytest.mark.parametrize("kind", ["dampening", "adam", "rmsprop-momentum"])
def test_the_size_of_a_chunk_changes_no_bit(kind, impl, monkeypatch):
    results = []
    make_optimizer, shared, names = KINDS[kind]
    numbers = torch.tensor([0.0, 0.3, 0.9])
    per_member = {name: (numbers, 0.9) if name == "betas" else numbers for name in names}
    for sizes in ((20,), (1,), (3, 1, 7)):
        monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(*sizes))
        models, x, y = problem(3, dtype=torch.float32)
        ensemble = Ensemble.from_models(models)
        own = make_optimizer(ensemble.parameters(), **shared)
        options = {"batch_size": 3, "generator": torch.Generator().manual_seed(2), "steps": 20, "impl": impl}
        fit(ensemble, x, y, criterion=nn.BCELoss(), optimizer=own, per_member=per_member, **options)
        results.append([*values(ensemble), *state_of(own)[1]])
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("betas", ["shared", "own"])
def test_where_a_run_is_cut_changes_no_bit(betas, optimizer, dtype, impl):
    """Adam's corrections are powers of beta, which may not depend on how they were come by."""
    own = [torch.tensor([0.9, 0.3], dtype=torch.float64), torch.tensor([0.999, 0.95], dtype=torch.float64)]
    per_member = {"betas": own} if betas == "own" else None
    steps = (1, 2, 61, 137, 200, 399)
    ends = []
    for parts in ([sum(steps)], steps, sorted(steps, reverse=True)):
        torch.manual_seed(0)
        ensemble = Ensemble(2, (3, 4, 1), output_activation="identity", dtype=dtype)
        x, y, adam = (
            torch.randn(5, 3, dtype=dtype),
            torch.randn(5, 1, dtype=dtype),
            optimizer(ensemble.parameters(), 0.01),
        )
        for part in parts:
            fit(ensemble, x, y, optimizer=adam, steps=part, per_member=per_member, impl=impl, criterion=nn.MSELoss())
        ends.append(values(ensemble))
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])


@pytest.mark.parametrize("squares", [1.0, 0.0])
def test_a_rate_of_zero_moves_nothing(squares, impl):
    """Of RMSprop too, which divides by what may be 0."""
    ensemble = Ensemble(3, (2, 2), output_activation="identity", dtype=torch.float64)
    before, x = values(ensemble), squares * torch.randn(4, 2, dtype=torch.float64)
    rmsprop = torch.optim.RMSprop(ensemble.parameters(), 0.01)
    rates = torch.tensor([0.0, 0.01, 1e-320], dtype=torch.float64)
    options = {"criterion": nn.MSELoss(), "optimizer": rmsprop, "steps": 5, "lr": rates, "impl": impl}
    fit(ensemble, x, torch.ones(4, 2, dtype=torch.float64), **options)
    moved = [(a - b).flatten(1).abs().amax(1) for a, b in zip(values(ensemble), before, strict=True)]
    assert torch.stack(moved).amax(0)[[0, 2]].tolist() == [0, 0]
    assert moved[-1][1] > 0


def test_any_view_of_numbers(impl):
    results = []
    momentum = torch.tensor([0.5, 0.0, 0.8], dtype=torch.float64)
    for given in (momentum, negated(momentum), momentum.clone().requires_grad_(), momentum.repeat(2, 1).T[:, 1]):
        models, x, y = problem(3)
        ensemble = Ensemble.from_models(models)
        own = torch.optim.SGD(ensemble.parameters(), lr=0.1)
        fit(ensemble, x, y, criterion=nn.BCELoss(), optimizer=own, steps=4, per_member={"momentum": given}, impl=impl)
        results.append([*values(ensemble), *state_of(own)[1]])
    assert all(same_bits(result, results[0]) for result in results[1:])


def test_a_sweep_takes_them():
    results, per_member = [], {"momentum": torch.tensor([0.5, 0.0, 0.9]), "weight_decay": torch.tensor([0.0, 0.2, 0.1])}
    for train, own in ((fit, per_member), (fit_sharded, per_member), (fit_sharded, None)):
        models, x, y = problem(3)
        ensemble = Ensemble.from_models(models)
        sgd = lambda p: torch.optim.SGD(p, lr=0.3)  # noqa: E731
        optimizer = sgd(ensemble.parameters()) if train is fit else sgd
        train(ensemble, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=5, per_member=own)
        results.append(values(ensemble))
    assert same_bits(*results[:2])
    assert relative(results[0], results[2]) > 1e6 * EXACT
    share = numbers_of(per_member | {"betas": (0.5, torch.arange(3.0))}, slice(1, 3))
    assert {name: numbers.tolist() for name, numbers in share.items() if name != "betas"} == {
        name: numbers[1:].tolist() for name, numbers in per_member.items()
    }
    assert share["betas"][0] == 0.5
    assert share["betas"][1].tolist() == [1.0, 2.0]
    assert numbers_of(None, slice(1, 3)) is None


# --- the kernels -----------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dampening", "adamw", "rmsprop"])
@pytest.mark.parametrize("impl", ["lane", "block"])
def test_kernels_take_them(impl, kind, device):
    make_optimizer, shared, names = KINDS[kind]
    numbers, errors, results = torch.tensor([0.0, 0.3, 0.9]), [], []
    per_member = {name: (numbers, 0.9) if name == "betas" else numbers for name in names}
    for path, dtype in (("torch", torch.float64), ("torch", torch.float32), (impl, torch.float32)):
        models, x, y = problem(3, (2, 3, 1), 4, dtype)
        ensemble = Ensemble.from_models(models).to(device)
        own = make_optimizer(ensemble.parameters(), **shared)
        options = {"steps": 6, "log_every": 2, "per_member": per_member, "impl": path}
        history = fit(ensemble, x.to(device), y.to(device), criterion=nn.BCELoss(), optimizer=own, **options)
        assert history.path == path
        results.append([t.cpu() for t in (*ensemble.parameters(), history.loss, *state_of(own)[1])])
        errors.append(relative(results[-1], results[0]))
    assert errors[2] <= 2 * errors[1] + 2e-6


# --- errors ----------------------------------------------------------------------------------------------------

ADAM, NESTEROV = torch.optim.Adam, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True)
HALF = torch.full((3,), 0.5)


def holding(value, at=1):
    numbers = HALF.clone()
    numbers[at] = value
    return numbers


# name: (per_member, optimizer, error, message)
BAD = {
    "kind": ([HALF], ADAM, TypeError, "per_member must be a dict, not list"),
    "lr": ({"lr": HALF}, ADAM, ValueError, "per_member holds 'lr', but rates of each member are the argument lr"),
    "unknown": (
        {"alpha": HALF},
        torch.optim.RMSprop,
        ValueError,
        "per_member may hold 'weight_decay', 'momentum', 'betas', not 'alpha'",
    ),
    "adam-momentum": ({"momentum": HALF}, ADAM, ValueError, "per_member holds 'momentum', which a Adam does not have"),
    "sgd-betas": (
        {"betas": (HALF, HALF)},
        torch.optim.SGD,
        ValueError,
        "per_member holds 'betas', which a SGD does not have",
    ),
    "number": ({"momentum": 0.5}, NESTEROV, TypeError, "per_member['momentum'] must be a Tensor, not float"),
    "shape": (
        {"weight_decay": HALF[:2]},
        ADAM,
        ValueError,
        "per_member['weight_decay'] (2,) is not (3,), a number for each member",
    ),
    "dimensions": ({"weight_decay": HALF[None]}, ADAM, ValueError, "per_member['weight_decay'] (1, 3) is not (3,)"),
    "integers": (
        {"momentum": torch.zeros(3, dtype=torch.int64)},
        torch.optim.SGD,
        TypeError,
        "per_member['momentum'] must be a floating point tensor, not torch.int64",
    ),
    "negative": (
        {"weight_decay": holding(-0.5)},
        ADAM,
        ValueError,
        "per_member['weight_decay'] must not be negative, but that of member 1 is -0.5",
    ),
    "nan": (
        {"momentum": holding(torch.nan, 2)},
        torch.optim.RMSprop,
        ValueError,
        "per_member['momentum'] must not be negative, but that of member 2 is nan",
    ),
    "nesterov": (
        {"momentum": holding(0.0)},
        NESTEROV,
        ValueError,
        "per_member['momentum'] must be positive, as nesterov asks, but that of member 1 is 0.0",
    ),
    "one": ({"betas": HALF}, ADAM, TypeError, "per_member['betas'] must be a pair, not tensor"),
    "three": ({"betas": (0.5, 0.5, 0.5)}, ADAM, TypeError, "per_member['betas'] must be a pair, not (0.5, 0.5, 0.5)"),
    "beta-kind": ({"betas": (HALF, True)}, ADAM, TypeError, "per_member['betas'][1] must be a Tensor, not bool"),
    "beta": (
        {"betas": (holding(1.0), 0.9)},
        ADAM,
        ValueError,
        "per_member['betas'][0] must lie in [0, 1), but that of member 1 is 1.0",
    ),
    "beta-number": (
        {"betas": (HALF, 1.5)},
        ADAM,
        ValueError,
        "per_member['betas'][1] must lie in [0, 1), but that of member 0 is 1.5",
    ),
    "beta-nan": (
        {"betas": (holding(torch.nan), 0.9)},
        ADAM,
        ValueError,
        "per_member['betas'][0] must lie in [0, 1), but that of member 1 is nan",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument_and_leave_the_ensemble(case):
    per_member, make_optimizer, error, message = BAD[case]
    ensemble = Ensemble(3, [3, 2])
    before, data = values(ensemble), (torch.ones(6, 3), torch.ones(6, 2))
    own = make_optimizer(ensemble.parameters())
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        fit(ensemble, *data, criterion=nn.BCELoss(), optimizer=own, steps=2, per_member=per_member)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        fit_sharded(ensemble, *data, criterion=nn.BCELoss(), optimizer=make_optimizer, steps=2, per_member=per_member)
    assert same_bits(values(ensemble), before)


def test_one_network_has_no_members():
    model = MLP([3, 2])
    options = {"criterion": nn.BCELoss(), "optimizer": torch.optim.SGD(model.parameters(), 0.1), "steps": 1}
    with pytest.raises(
        TypeError, match=r"^per_member is for the members of an Ensemble, and the model is of type MLP$"
    ):
        fit(model, torch.ones(6, 3), torch.ones(6, 2), per_member={"momentum": torch.ones(1)}, **options)


@pytest.mark.filterwarnings("ignore:an ordinary loop trains this Ensemble")
def test_an_ordinary_loop_has_one_optimizer_for_all():
    ensemble = Ensemble(3, [3, 2])
    before, data = values(ensemble), (torch.ones(6, 3), torch.ones(6, 2))
    options = {"criterion": lambda p, t: (p - t).sum(), "optimizer": torch.optim.SGD(ensemble.parameters(), 0.1)}
    reason = r"^per_member needs a loop without autograd: the criterion is a function$"
    with pytest.raises(NotImplementedError, match=reason):
        fit(ensemble, *data, steps=2, per_member={"momentum": HALF}, **options)
    assert same_bits(values(ensemble), before)
    assert fit(ensemble, *data, steps=2, per_member={}, **options).path == "general"
