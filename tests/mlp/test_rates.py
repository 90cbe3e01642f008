# SPDX-License-Identifier: Apache-2.0
"""Learning rates that `fit` is given for each step: against the loop that everyone writes."""

import copy
import math
import threading

import pytest
import torch
from cases import same_bits
from torch import nn
from training_cases import (
    OPTIMIZERS,
    assert_same_state,
    chunks_of,
    interrupt_after,
    make,
    needs_numba,
    ordinary,
    relative,
    values,
)

from perceptriton.mlp import MLP, EarlyStopping, Ensemble, fit, fit_sharded
from perceptriton.mlp.training import run, validation

EXACT = 1e-10
STEPS = 12


def falling(step):
    return 0.3 * 0.8**step


SCHEDULES = {
    "function": falling,
    "function-of-tensors": lambda step: torch.tensor(falling(step), dtype=torch.float64),
    "tensor": torch.tensor([[falling(step)] for step in range(STEPS)], dtype=torch.float64),
    "mixed": lambda step: falling(step) if step < 10 else 0,
}


def rate_of(schedule, step):
    return float(schedule[step] if isinstance(schedule, torch.Tensor) else schedule(step))


def scheduled(model, x, y, criterion, optimizer, schedule, *batches):
    """The ordinary loop by that schedule; its losses."""
    rates = [rate_of(schedule, step) for step in range(STEPS)]
    return ordinary(model, x, y, criterion, optimizer, STEPS, *batches, rates=rates)


def absolute(p, t):
    return (p - t).abs().mean()


def problem(seed=0, dtype=torch.float64):
    return make((3, 5, 2), "sigmoid", "sigmoid", True, 7, dtype=dtype, seed=seed)


# --- one network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("criterion", [nn.BCELoss(), absolute], ids=["torch", "general"])
def test_a_schedule_is_that_of_a_loop_that_sets_the_rate(criterion, optimizer, schedule):
    model, x, y = problem()
    twin = copy.deepcopy(model)
    own, other = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    rates = SCHEDULES[schedule]
    order = torch.Generator().manual_seed(3)
    options = {"criterion": criterion, "optimizer": own, "steps": STEPS, "log_every": 1, "batch_size": 3}
    history = fit(model, x, y, lr=rates, generator=order, **options)
    losses = scheduled(twin, x, y, criterion, other, rates, 3, torch.Generator().manual_seed(3))
    assert history.path == ("general" if criterion is absolute else "torch")
    assert relative([history.loss], [losses]) <= EXACT
    assert relative(model.parameters(), twin.parameters()) <= EXACT
    assert_same_state(own, other, EXACT)  # of which the rates are a part


def test_compiled_loops_take_a_schedule():
    pytest.importorskip("numba", reason="numba is not installed")
    model, x, y = problem()
    twin = copy.deepcopy(model)
    own, other = (torch.optim.AdamW(m.parameters(), lr=1) for m in (model, twin))
    options = {"criterion": nn.BCELoss(), "optimizer": own, "steps": STEPS, "impl": "native"}
    assert fit(model, x, y, lr=falling, **options).path == "native"
    scheduled(twin, x, y, nn.BCELoss(), other, falling)
    assert relative(model.parameters(), twin.parameters()) <= EXACT
    assert_same_state(own, other, EXACT)


def test_every_group_has_the_rate_and_gets_its_own_back():
    model, x, y = problem()
    twin = copy.deepcopy(model)
    own, other = (
        torch.optim.SGD([{"params": m[0].parameters(), "lr": torch.tensor(3.0)}, {"params": m[2].parameters()}], lr=2.0)
        for m in (model, twin)
    )
    rates = [group["lr"] for group in own.param_groups]
    fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=STEPS, lr=falling)
    scheduled(twin, x, y, nn.BCELoss(), other, falling)
    assert relative(model.parameters(), twin.parameters()) <= EXACT
    assert all(group["lr"] is rate for group, rate in zip(own.param_groups, rates, strict=True))


def test_the_rates_are_given_back_after_an_error():
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)

    def fails(p, t):
        assert optimizer.param_groups[0]["lr"] == falling(0)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fit(model, x, y, criterion=fails, optimizer=optimizer, steps=2, lr=falling)
    assert optimizer.param_groups[0]["lr"] == 2.0


@pytest.mark.parametrize("impl", ["torch", "native", "general"])
@pytest.mark.parametrize("schedule", ["function", "tensor"])
def test_chunks_of_any_size_change_no_bit(monkeypatch, schedule, impl):
    needs_numba(impl)
    results, calls = [], []

    def counted(step):
        calls.append(step)
        return falling(step)

    for sizes in ((STEPS,), (1,), (5, 1, 2)):
        monkeypatch.setattr(run, "chunks", chunks_of(*sizes))
        model, x, y = problem(dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.5, weight_decay=0.1)
        options = {"criterion": absolute if impl == "general" else nn.BCELoss(), "steps": STEPS, "batch_size": 3}
        options |= {"generator": torch.Generator().manual_seed(1), "impl": None if impl == "general" else impl}
        lr = counted if schedule == "function" else SCHEDULES["tensor"]
        assert fit(model, x, y, optimizer=optimizer, lr=lr, **options).path == impl
        results.append(values(model))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])
    if schedule == "function":  # once for each step, in order
        assert calls == 3 * list(range(STEPS))


# --- many networks -------------------------------------------------------------------------------------------

BASE = torch.tensor([0.5, 1.0, 0.2, 0.8], dtype=torch.float64)
FALL = torch.tensor([falling(step) for step in range(STEPS)], dtype=torch.float64)[:, None]
OF_MEMBERS = {
    "each": FALL * BASE,
    "all": FALL,
    "function": lambda step: falling(step) * BASE,
    "function-of-all": falling,
    "float-at-first": lambda step: falling(step) if step < 3 else falling(step) * BASE,
}


@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("schedule", OF_MEMBERS)
def test_members_have_schedules(schedule, impl):
    needs_numba(impl)
    given = OF_MEMBERS[schedule]
    models = [problem(seed)[0] for seed in range(4)]
    _, x, y = problem()
    ensemble = Ensemble.from_models(models)
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=7.0)
    options = {"criterion": nn.BCELoss(), "optimizer": optimizer, "steps": STEPS, "log_every": 1, "impl": impl}
    history = fit(ensemble, x, y, lr=given, **options)
    double = {"dtype": torch.float64}
    rows = given if isinstance(given, torch.Tensor) else [torch.as_tensor(given(s), **double) for s in range(STEPS)]
    rows = torch.stack([row.expand(4) for row in rows])
    for e, model in enumerate(models):
        losses = scheduled(model, x, y, nn.BCELoss(), torch.optim.Adam(model.parameters()), rows[:, e])
        assert relative([history.loss[:, e]], [losses]) <= EXACT
        assert relative(ensemble.member(e).parameters(), model.parameters()) <= EXACT
    assert optimizer.param_groups[0]["lr"] == 7.0


def test_a_tensor_of_one_dimension_is_never_a_schedule():
    # As many steps as members.
    models = [problem(seed)[0] for seed in range(STEPS)]
    _, x, y = problem()
    rates = FALL.flatten()
    ensemble = Ensemble.from_models(models)
    fit(
        ensemble,
        x,
        y,
        criterion=nn.BCELoss(),
        optimizer=torch.optim.SGD(ensemble.parameters(), lr=1),
        steps=STEPS,
        lr=rates,
    )
    for e, model in enumerate(models):
        scheduled(model, x, y, nn.BCELoss(), torch.optim.SGD(model.parameters(), lr=1), lambda _, e=e: rates[e])
        assert relative(ensemble.member(e).parameters(), model.parameters()) <= EXACT


@pytest.mark.filterwarnings("ignore:an ordinary loop trains this Ensemble")
def test_one_schedule_for_all_members_of_an_ordinary_loop():
    models = [problem(seed)[0] for seed in range(3)]
    _, x, y = problem()
    ensemble = Ensemble.from_models(models)
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=5.0)
    assert fit(ensemble, x, y, criterion=absolute, optimizer=optimizer, steps=STEPS, lr=falling).path == "general"
    for e, model in enumerate(models):
        scheduled(model, x, y, absolute, torch.optim.SGD(model.parameters(), lr=1), falling)
        assert relative(ensemble.member(e).parameters(), model.parameters()) <= EXACT
    before = values(ensemble)
    for lr in (FALL.expand(STEPS, 3), lambda step: torch.ones(3)):
        with pytest.raises(NotImplementedError, match=r"^lr of each member needs a loop without autograd"):
            fit(ensemble, x, y, criterion=absolute, optimizer=optimizer, steps=STEPS, lr=lr)
    assert same_bits(values(ensemble), before)


@pytest.mark.parametrize("schedule", OF_MEMBERS)
def test_a_share_of_the_members_has_its_share_of_the_rates(schedule):
    from perceptriton.mlp.training.rates import Schedule, share_of

    given, part = OF_MEMBERS[schedule], slice(1, 3)
    whole, share = Schedule(given, 4), Schedule(share_of(given, part, 4), 2)
    expected = whole.rows(2, 5).expand(5, 4)[:, part]
    assert torch.equal(share.rows(2, 5).expand(5, 2), expected)


def test_a_sweep_takes_a_schedule():
    results = []
    for train in (fit, fit_sharded):
        models = [problem(seed)[0] for seed in range(4)]
        _, x, y = problem()
        ensemble = Ensemble.from_models(models)
        sgd = lambda p: torch.optim.SGD(p, lr=1)  # noqa: E731
        optimizer = sgd(ensemble.parameters()) if train is fit else sgd
        train(ensemble, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=STEPS, lr=OF_MEMBERS["each"])
        results.append(values(ensemble))
    assert same_bits(*results)


# --- errors --------------------------------------------------------------------------------------------------

ENSEMBLE = {
    "rows": (torch.ones(5, 3), ValueError, r"^lr \(5, 3\) is neither \(3,\), .* nor a schedule, \(2, 1\) or \(2, 3\)$"),
    "columns": (torch.ones(2, 2), ValueError, r"^lr \(2, 2\) is neither"),
    "three-dimensions": (torch.ones(2, 3, 1), ValueError, r"^lr \(2, 3, 1\) is neither"),
    "no-dimension": (torch.tensor(0.1), ValueError, r"^lr \(\) is neither"),
    "negative": (torch.tensor([[1.0], [-2.0]]), ValueError, r"^lr must not be negative, but its least is -2.0$"),
    "nan": (torch.tensor([[1.0], [math.nan]]), ValueError, r"^lr must not be negative, but its least is nan$"),
    "integers": (
        torch.ones(2, 1, dtype=torch.int64),
        TypeError,
        r"^lr must be a floating point tensor, not torch.int64",
    ),
    "returns": (lambda step: "0.1", TypeError, r"^lr\(0\) must return a float or a tensor, not str$"),
    "returns-shape": (
        lambda step: torch.ones(2),
        ValueError,
        r"^lr\(0\) returned a tensor \(2,\), neither \(\) nor \(3,\)$",
    ),
    "returns-negative": (lambda step: -0.1, ValueError, r"^lr must not be negative, but lr\(0\) is -0.1$"),
}


@pytest.mark.parametrize("case", ENSEMBLE)
def test_errors_leave_the_ensemble(case):
    lr, error, message = ENSEMBLE[case]
    ensemble = Ensemble(3, [3, 2])
    before = values(ensemble)
    data = torch.ones(6, 3), torch.ones(6, 2)
    with pytest.raises(error, match=message):
        fit(ensemble, *data, criterion=nn.BCELoss(), optimizer=torch.optim.SGD(ensemble.parameters()), steps=2, lr=lr)
    assert same_bits(before, values(ensemble))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 1), (3, 2), (1, 3)])
def test_errors_name_both_shapes(shape):
    model = MLP([3, 2])
    data, optimizer = (torch.ones(6, 3), torch.ones(6, 2)), torch.optim.SGD(model.parameters())
    told = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"^lr {told} is not a schedule \(3, 1\), which is what it may be for a MLP$"):
        fit(model, *data, criterion=nn.BCELoss(), optimizer=optimizer, steps=3, lr=torch.ones(shape))


# --- CrossEntropyLoss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("targets", ["classes", "probabilities"])
def test_cross_entropy(targets, reduction):
    model, x, y = make((3, 5, 4), "sigmoid", "identity", True, 7)
    twin, criterion = copy.deepcopy(model), nn.CrossEntropyLoss(reduction=reduction)
    y = torch.arange(7) % 4 if targets == "classes" else y.softmax(1)
    own, other = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5) for m in (model, twin))
    options = {"criterion": criterion, "steps": STEPS, "log_every": 1, "batch_size": 3}
    history = fit(model, x, y, optimizer=own, generator=torch.Generator().manual_seed(1), **options)
    losses = scheduled(twin, x, y, criterion, other, lambda _: 0.1, 3, torch.Generator().manual_seed(1))
    assert history.path == "torch"
    assert relative([history.loss], [losses]) <= EXACT
    assert relative(model.parameters(), twin.parameters()) <= EXACT
    assert_same_state(own, other, EXACT)


# --- torch's schedulers ------------------------------------------------------------------------------------------

L = torch.optim.lr_scheduler


class Locked:
    """A rate by a function that cannot be copied."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, step):
        return 0.8**step


SCHEDULERS = {
    "step": lambda o: L.StepLR(o, 2, 0.5),
    "cosine": lambda o: L.CosineAnnealingLR(o, 7),
    "lambda": lambda o: L.LambdaLR(o, lambda n: 1 / (1 + n)),
    "restarts": lambda o: L.CosineAnnealingWarmRestarts(o, 3),
    "warmup": lambda o: L.SequentialLR(o, [L.LinearLR(o, 0.1, total_iters=3), L.ExponentialLR(o, 0.8)], [3]),
    "chained": lambda o: L.ChainedScheduler([L.LinearLR(o, 0.1, total_iters=3), L.ExponentialLR(o, 0.8)]),
    "one-cycle": lambda o: L.OneCycleLR(o, 0.5, total_steps=20),  # of the momentum too
    "one-cycle-of-rates": lambda o: L.OneCycleLR(o, 0.5, total_steps=20, cycle_momentum=False),
    "locked": lambda o: L.LambdaLR(o, Locked()),
    "mine": lambda o: Halving(o),
}


class Halving(L.LRScheduler):
    def get_lr(self):
        return [base * 0.5**self.last_epoch for base in self.base_lrs]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_steps_as_in_an_ordinary_loop(kind, batch_size, interval, monkeypatch):
    monkeypatch.setattr(run, "chunks", chunks_of(1, 4, 2))
    model, x, y = problem()
    twin = copy.deepcopy(model)
    own, other = (torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.5) for m in (model, twin))
    scheduler, expected = SCHEDULERS[kind](own), SCHEDULERS[kind](other)
    options = {"criterion": nn.BCELoss(), "steps": STEPS, "batch_size": batch_size, "log_every": 1}
    options |= {"generator": torch.Generator().manual_seed(2), "scheduler": scheduler, "scheduler_interval": interval}
    history = fit(model, x, y, optimizer=own, **options)
    generator, losses, taken = torch.Generator().manual_seed(2), [], 0
    while taken < STEPS:
        rows = [slice(None)] if batch_size is None else torch.randperm(len(x), generator=generator).split(batch_size)
        for chosen in rows[: STEPS - taken]:
            other.zero_grad()
            loss = nn.BCELoss()(twin(x[chosen]), y[chosen])
            losses.append(loss.item())
            loss.backward()
            other.step()
            taken += 1
            if interval == "step" or taken % len(rows) == 0:
                expected.step()
    assert history.path == ("general" if kind in ("one-cycle", "locked", "mine") else "torch")
    assert relative([history.loss], [torch.tensor(losses, dtype=torch.float64)]) <= EXACT
    assert relative(model.parameters(), twin.parameters()) <= EXACT
    assert_same_state(own, other, EXACT)
    assert scheduler.get_last_lr() == expected.get_last_lr()
    assert scheduler.state_dict().keys() == expected.state_dict().keys()
    assert own.param_groups[0]["lr"] == other.param_groups[0]["lr"]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("impl", ["torch", "native"])
def test_a_scheduler_may_pass_below_0(impl, momentum):
    needs_numba(impl)
    models, data, _ = zip(*(problem(seed) for seed in range(2)), strict=True)
    ensemble, x, y = Ensemble.from_models(models), data[0], problem()[2]
    optimizer = torch.optim.RMSprop(ensemble.parameters(), lr=0.01, momentum=momentum)
    scheduler = L.LambdaLR(optimizer, lambda step: 1 - step / 5)
    options = {"criterion": nn.BCELoss(), "scheduler": scheduler, "scheduler_interval": "step", "impl": impl}
    fit(ensemble, x, y, optimizer=optimizer, steps=STEPS, **options)
    for e, model in enumerate(models):
        own = torch.optim.RMSprop(model.parameters(), lr=1, momentum=momentum)
        scheduled(model, x, y, nn.BCELoss(), own, lambda step: 0.01 * (1 - step / 5))
        assert relative(ensemble.member(e).parameters(), model.parameters()) <= EXACT


def decaying(group, value):
    group["weight_decay"] = 0.5 * value
    return 1.0


CHANGES = {
    "checkpoint": lambda o: {"checkpoint": lambda history: o.param_groups[0].update(lr=0.0)},
    "rates": lambda o: {"lr": lambda step: decaying(o.param_groups[0], step)},
    "scheduler": lambda o: {
        "scheduler": L.LambdaLR(o, lambda step: decaying(o.param_groups[0], step)),
        "scheduler_interval": "step",
    },
}


@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("change", CHANGES)
def test_numbers_that_change_on_the_way_are_refused(change, impl, monkeypatch):
    needs_numba(impl)
    monkeypatch.setattr(run, "chunks", chunks_of(4))
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    name = "lr" if change == "checkpoint" else "weight_decay"
    options = {"criterion": nn.BCELoss(), "optimizer": optimizer, "steps": STEPS, **CHANGES[change](optimizer)}
    with pytest.raises(RuntimeError, match=rf"^optimizer's {name} was changed while fit ran, from \S+ to \S+: rates"):
        fit(model, x, y, impl=impl, **options)
    fit(model, x, y, **options | {"criterion": absolute, "steps": 2})  # which an ordinary loop sees


HARMLESS = {
    "nan": lambda o: o.param_groups[0].update(lr=math.nan),
    "tensor-nan": lambda o: o.param_groups[0].update(lr=torch.tensor(math.nan)),
    "extra-tensor": lambda o: o.param_groups[0].update(extra=torch.ones(3)),
    "extra-nan": lambda o: o.param_groups[0].update(extra=math.nan),
}


@pytest.mark.parametrize("prepare", HARMLESS.values(), ids=HARMLESS)
def test_numbers_that_stay_are_no_change(prepare, monkeypatch):
    monkeypatch.setattr(run, "chunks", chunks_of(2))
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    prepare(optimizer)

    def checkpoint(history):
        optimizer.param_groups[0]["seen"] = torch.ones(history.steps_taken)
        L.StepLR(optimizer, 1)  # which writes initial_lr
        optimizer.param_groups[0]["momentum"] = torch.tensor(0.5).item()

    options = {"criterion": nn.MSELoss(), "optimizer": optimizer, "steps": 8, "checkpoint": checkpoint}
    assert fit(model, x, y, **options).path == "torch"


def test_a_last_checkpoint_may_set_the_rate():
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    options = {"criterion": nn.BCELoss(), "optimizer": optimizer, "steps": 1}
    fit(model, x, y, checkpoint=lambda history: optimizer.param_groups[0].update(lr=0.1), **options)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_scheduler_is_where_the_model_is_after_an_interrupted_chunk(monkeypatch):
    monkeypatch.setattr(run, "chunks", chunks_of(3, 4))
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scheduler = L.StepLR(optimizer, 2, 0.5)
    interrupt_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt) as error:
        fit(model, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=STEPS, scheduler=scheduler)
    assert error.value.history.steps_taken == scheduler.last_epoch == 3
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]] == [0.15]


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"lr": falling}, ValueError, r"^lr and scheduler both say what the rate of a step is: give one of them$"),
    ({"scheduler": 3}, TypeError, r"^scheduler must be an LRScheduler .*, not int$"),
    ({"scheduler": L.ReduceLROnPlateau}, TypeError, r"^scheduler must be .*, not ReduceLROnPlateau$"),
    ({"scheduler": "other"}, ValueError, r"^scheduler is not this SGD's, but another optimizer's$"),
    ({"scheduler": None, "scheduler_interval": "x"}, ValueError, r'^scheduler_interval must be .*, not \'x\'$'),
    ({"scheduler_interval": "batch"}, ValueError, r'^scheduler_interval must be "epoch" or "step", not \'batch\'$'),
])  # fmt: skip
def test_schedulers_that_are_refused(options, error, message):
    model, x, y = problem()
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.3) for _ in range(2))
    scheduler = options.get("scheduler", "own")
    made = {"own": lambda: L.StepLR(optimizer, 2), "other": lambda: L.StepLR(other, 2)}
    scheduler = made[scheduler]() if scheduler in made else scheduler(optimizer) if callable(scheduler) else scheduler
    before = values(model)
    with pytest.raises(error, match=message):
        fit(model, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=2, **(options | {"scheduler": scheduler}))
    assert same_bits(values(model), before)


def test_a_function_is_asked_once_for_each_step_in_order(monkeypatch):
    """Also where steps are taken back: a stop by the training loss takes more than there are."""
    monkeypatch.setattr(validation, "LATE_SECONDS", 0)  # how many more is then no question of the machine's speed
    (model, x, y), criterion = problem(), nn.BCELoss()
    asked, rates = [], iter([0.5 * 0.99**step for step in range(4000)])

    def rate(step):
        asked.append(step)
        return next(rates)

    stop = EarlyStopping(2, threshold=1e-4, metric="training_loss")
    options = {"criterion": criterion, "steps": 4000, "log_every": 1, "evaluate_every": 5, "stop": stop}
    history = fit(model, x, y, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), lr=rate, **options)
    assert history.steps_taken < len(asked) < 4000
    assert asked == list(range(len(asked)))


@pytest.mark.parametrize("impl", ["torch", None])
def test_a_function_that_ends_ends_the_training(impl):
    (model, x, y), criterion = problem(), nn.BCELoss()
    model = model if impl else nn.Sequential(*model, nn.Dropout(0.0))
    rates, before = iter([0.5] * 10), values(model)
    options = {"optimizer": torch.optim.SGD(model.parameters(), lr=1.0), "impl": impl}
    with pytest.raises(StopIteration):
        fit(model, x, y, criterion=criterion, steps=40, lr=lambda step: next(rates), **options)
    assert not same_bits(values(model), before)  # by the chunks before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ExponentialLR", "CosineAnnealingLR", "SequentialLR"])
def test_a_rate_that_is_a_tensor_is_taken_back_too(kind):
    """Where steps are taken that a stop undoes."""
    ends = []
    for made in (float, torch.tensor):
        (model, x, y), criterion = problem(), nn.BCELoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=made(0.5))
        makers = {
            "ExponentialLR": lambda o: L.ExponentialLR(o, 0.999),
            "CosineAnnealingLR": lambda o: L.CosineAnnealingLR(o, 3000),
            "SequentialLR": lambda o: L.SequentialLR(o, [L.ConstantLR(o), L.ExponentialLR(o, 0.999)], [7]),
        }
        scheduler = makers[kind](optimizer)
        options = {"steps": 4000, "log_every": 1, "evaluate_every": 5, "scheduler_interval": "step"}
        stop = EarlyStopping(2, threshold=1e-4, metric="training_loss")
        history = fit(model, x, y, criterion=criterion, optimizer=optimizer, scheduler=scheduler, stop=stop, **options)
        twin, x, y = problem()
        own = torch.optim.SGD(twin.parameters(), lr=made(0.5))
        steps = makers[kind](own)
        for _ in range(history.steps_taken):
            own.zero_grad()
            criterion(twin(x), y).backward()
            own.step()
            steps.step()
        assert float(optimizer.param_groups[0]["lr"]) == float(own.param_groups[0]["lr"])
        assert relative(values(model), values(twin)) <= 1e-6
        ends.append(history.steps_taken)
    assert ends[0] < 4000


def test_a_scheduler_that_ends_too_early_is_where_the_model_is():
    (model, x, y), criterion = problem(), nn.BCELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler, before = L.OneCycleLR(optimizer, 1.0, total_steps=5, cycle_momentum=False), values(model)
    rate = optimizer.param_groups[0]["lr"]
    options = {"scheduler": scheduler, "scheduler_interval": "step", "impl": "torch"}
    with pytest.raises(ValueError, match="Tried to step"):
        fit(model, x, y, criterion=criterion, optimizer=optimizer, steps=1000, **options)
    taken = scheduler.last_epoch
    assert taken < 5
    assert (optimizer.param_groups[0]["lr"] == rate) == (taken == 0)
    assert same_bits(values(model), before) == (taken == 0)
