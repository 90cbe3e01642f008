# SPDX-License-Identifier: Apache-2.0
"""What fit sees on data that it does not train on, and when that ends the training."""

import copy
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from cases import same_bits
from torch import nn
from training_cases import chunks_of, make, needs_numba, relative, values

from perceptriton.mlp import MLP, EarlyStopping, Ensemble, fit
from perceptriton.mlp.ensemble import in_order
from perceptriton.mlp.training.measures import accuracy, losses_of

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = 1e-10
SGD = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.5)


def problem(seed=0, output="sigmoid", sizes=(3, 5, 2)):
    model, x, y = make(sizes, "tanh", output, True, 9, torch.float64, seed)
    draw = {"dtype": x.dtype, "generator": torch.Generator().manual_seed(seed)}
    return model, x, y, torch.randn(4, sizes[0], **draw), torch.rand(4, sizes[-1], **draw).round()


def distance(output, target):
    return (output - target).abs().max()


@pytest.mark.parametrize("path", ["torch", "general"])
@pytest.mark.parametrize(("every", "batch_size", "seen"), [
    (4, None, [4, 8, 11]), (4, 5, [4, 8, 11]), (None, 5, [2, 4, 6, 8, 10, 11]), (None, None, [11]), (50, 3, [11]),
])  # fmt: skip
def test_evaluations_are_those_of_the_model_then(path, every, batch_size, seen):
    model, x, y, x_other, y_other = problem()
    criterion = nn.BCELoss()
    if path == "general":
        model = nn.Sequential(*model[:2], nn.Dropout(0.0), *model[2:])
    generator, options = torch.Generator(), {"criterion": criterion, "batch_size": batch_size, "log_every": 3}
    before, expected = copy.deepcopy(model), []
    for steps in seen:
        twin = copy.deepcopy(before)
        fit(twin, x, y, steps=steps, optimizer=SGD(twin.parameters()), generator=generator.manual_seed(1), **options)
        output = twin(x_other).detach()
        expected.append([criterion(output, y_other), accuracy(criterion, output, y_other), distance(output, y_other)])
    options |= {"validation": (x_other, y_other), "evaluate_every": every, "metrics": ["accuracy", distance]}
    optimizer = SGD(model.parameters())
    history = fit(model, x, y, steps=11, optimizer=optimizer, generator=generator.manual_seed(1), **options)
    assert (history.path, history.evaluated, list(history.validation)) == (path, seen, ["loss", "accuracy", "distance"])
    assert relative(history.validation.values(), torch.tensor(expected).t()) <= EXACT
    assert (history.stopped, history.steps_taken) == (None, 11)
    assert same_bits(values(model), values(twin))  # looking changes nothing


def test_the_model_is_in_evaluation_mode_while_it_is_looked_at():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(4, 1))
    model[3].eval()
    x, y = torch.randn(8, 3), torch.rand(8, 1)
    seen = []
    model.register_forward_hook(lambda *_: seen.append([m.training for m in model.modules()]))
    options = {"criterion": nn.MSELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "steps": 2}
    history = fit(model, x, y, validation=(x, y), evaluate_every=1, **options)
    modes = [True, True, True, True, False, True]
    assert seen == [modes, [False] * 6, modes, [False] * 6]
    assert [m.training for m in model.modules()] == modes
    model.eval()
    assert torch.allclose(history.validation["loss"][-1], nn.MSELoss()(model(x), y))


@pytest.mark.parametrize("criterion", [nn.BCELoss(), distance], ids=["known", "function"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("keep_best", [False, True], ids=["last", "best"])
@pytest.mark.filterwarnings("ignore:an ordinary loop trains this Ensemble")
def test_each_member_stops_as_it_would_alone(criterion, own, keep_best):
    models, x, y, x_other, y_other = zip(*map(problem, range(9)), strict=True)
    ensemble = Ensemble.from_models(models)
    x, y, x_other, y_other = (torch.stack(t) if own else t[0] for t in (x, y, x_other, y_other))
    options = {"criterion": criterion, "steps": 60, "batch_size": 4, "log_every": 1, "evaluate_every": 3}
    options |= {"stop": EarlyStopping(3, threshold=1e-3, keep_best=keep_best), "metrics": ["accuracy"]}

    def run(model, *data):
        optimizer, generator = SGD(model.parameters()), torch.Generator().manual_seed(1)
        return fit(
            model, *data[:2], optimizer=optimizer, validation=data[2:], generator=generator, **options
        ), optimizer

    history, stacked = run(ensemble, x, y, x_other, y_other)
    alone = [run(model, *(t[i] if own else t for t in (x, y, x_other, y_other))) for i, model in enumerate(models)]
    assert history.stopped.tolist() == [one.stopped.item() for one, _ in alone]
    assert len({*history.stopped.tolist()}) > 1  # not all at once
    for i, (model, (one, optimizer)) in enumerate(zip(models, alone, strict=True)):
        assert relative(ensemble.member(i).parameters(), model.parameters()) <= EXACT
        assert relative([history.loss[: one.steps_taken, i]], [one.loss]) <= EXACT
        assert history.loss[one.steps_taken :, i].isnan().all()
        for name, column in history.validation.items():
            assert relative([column[: len(one.evaluated), i]], [one.validation[name]]) <= EXACT
        own_state = [t for p in model.parameters() for t in optimizer.state[p].values()]
        found = [t[i] for p in in_order(ensemble) for t in stacked.state[p].values()]
        assert relative(found, own_state) <= EXACT
    assert history.steps_taken == max(s if s >= 0 else 60 for s in history.stopped.tolist())


@pytest.mark.parametrize("threshold", [0.0, 1.0])  # by which nothing is better than another: best it is all the same
def test_the_best_parameters_are_those_of_the_best_evaluation(threshold):
    model, x, y, x_other, y_other = problem(11)
    twin, options = copy.deepcopy(model), {"criterion": nn.BCELoss(), "steps": 80, "evaluate_every": 8}
    options["validation"] = (x_other, y_other)
    stop = EarlyStopping(None, threshold, keep_best=True)
    kept = fit(model, x, y, optimizer=SGD(model.parameters()), stop=stop, **options)
    losses = kept.validation["loss"]
    best = int(losses.argmin())
    assert 0 < best < len(losses) - 1
    fit(twin, x, y, optimizer=SGD(twin.parameters()), **(options | {"steps": kept.evaluated[best]}))
    assert same_bits(values(model), values(twin))
    assert (kept.steps_taken, kept.stopped.item()) == (80, -1)


def test_a_metric_may_be_the_one_to_watch():
    ends = {}
    for stop in (EarlyStopping(2, metric="accuracy"), EarlyStopping(2, metric="distance", maximize=True)):
        model, x, y, x_other, y_other = problem(1)
        options = {"criterion": nn.BCELoss(), "steps": 200, "evaluate_every": 2, "metrics": ["accuracy", distance]}
        options |= {"optimizer": SGD(model.parameters()), "validation": (x_other, y_other), "stop": stop}
        history = fit(model, x, y, **options)
        column, best, waited = history.validation[stop.metric].tolist(), float("-inf"), 0
        for value in column:
            assert waited < 2
            best, waited = (value, 0) if value > best else (best, waited + 1)
        assert waited == 2
        ends[stop.metric] = history.stopped.item()
    assert max(ends.values()) < 200


def test_a_member_that_is_nan_stops_and_the_others_train():
    ensemble = Ensemble(3, [2, 4, 1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ensemble.weights[0][1, 0, 0] = torch.nan
    x, y = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([[0.0], [1], [1], [0]])
    options = {"criterion": nn.BCELoss(), "optimizer": torch.optim.Adam(ensemble.parameters(), lr=0.05), "steps": 50}
    options |= {"validation": (x, y), "evaluate_every": 5, "stop": EarlyStopping(2, keep_best=True)}
    history = fit(ensemble, x, y, **options)
    assert history.stopped.tolist() == [-1, 10, -1]
    assert history.validation["loss"].isnan().tolist() == [[False, True, False]] * 10
    assert (history.validation["loss"][-1] < history.validation["loss"][0])[[0, 2]].all()
    assert ensemble.best(history, 3)[2] == 1


@pytest.mark.parametrize(("criterion", "output", "target", "share"), [
    (nn.CrossEntropyLoss(), [[1.0, 2], [3, 0], [0, 1]], [1, 1, 1], 2 / 3),
    (nn.CrossEntropyLoss(ignore_index=0), [[1.0, 2], [3, 0], [0, 1]], [1, 0, 0], 1.0),
    (nn.CrossEntropyLoss(), [[1.0, 2], [3, 0]], [[0.3, 0.7], [0.4, 0.6]], 0.5),
    (nn.BCELoss(), [[0.4], [0.6]], [[0.0], [0.0]], 0.5),
    (nn.BCELoss(), [[0.4, 0.6], [0.6, 0.1]], [[0.0, 1], [0, 0]], 0.75),
    (nn.BCEWithLogitsLoss(), [[0.4], [-0.6]], [[1.0], [1.0]], 0.5),
    (nn.MSELoss(), [[0.4], [0.9]], [[0.0], [1.0]], 1.0),
    (nn.MSELoss(), [[0.4, 0.5], [0.9, 0.1]], [[0.0, 1], [0, 1]], 0.5),
])  # fmt: skip
def test_accuracy(criterion, output, target, share):
    output, target = torch.tensor(output), torch.tensor(target)
    assert accuracy(criterion, output, target).item() == pytest.approx(share)
    model = nn.Sequential(nn.Linear(2, 1))

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return output + 0 * self.inner(x)

    options = {"criterion": criterion, "optimizer": torch.optim.SGD(model.parameters(), lr=0.0), "steps": 1}
    x = torch.ones(len(output), 2)
    net = Fixed()
    history = fit(net, x, target, validation=(x, target), metrics=["accuracy"], **options)
    assert history.validation["accuracy"].item() == pytest.approx(share)


@pytest.mark.parametrize("path", ["torch", "general"])
@pytest.mark.parametrize(("every", "log_every"), [(5, 1), (7, 3), (None, 1)])
def test_the_training_loss_may_be_the_one_to_watch(path, every, log_every, monkeypatch):
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(1, 2, 9))
    models, *data = zip(*map(problem, range(3)), strict=True)
    ensemble, x, y = Ensemble.from_models(models), data[0][0], data[1][0]
    model = models[0] if path == "torch" else nn.Sequential(*models[0], nn.Dropout(0.0))
    for net in (model, ensemble) if path == "torch" else (model,):
        options = {"criterion": nn.BCELoss(), "optimizer": torch.optim.SGD(net.parameters(), lr=0.3), "steps": 400}
        options |= {"batch_size": 4, "generator": torch.Generator().manual_seed(3), "evaluate_every": every}
        stop = EarlyStopping(2, threshold=0.02, metric="training_loss")
        history = fit(net, x, y, log_every=log_every, stop=stop, **options)
        assert (history.path, history.validation) == (path, {})
        assert history.evaluated == list(range(every or 3, history.steps_taken + 1, every or 3))
        for member, stopped in enumerate(history.stopped.view(-1).tolist()):
            best, waited, since = float("inf"), 0, 0
            for taken in history.evaluated:
                chosen = [since <= step < taken for step in history.steps]
                mean = history.loss.view(len(history.steps), -1)[chosen, member].mean().item()
                best, waited = min(mean, best), 0 if mean < best - 0.02 else waited + 1
                since = taken
                if waited == 2:
                    break
            assert stopped == taken < 400


@pytest.mark.parametrize("path", ["torch", "general", "native"])
@pytest.mark.parametrize("steps", [20, 21, 22])
def test_a_run_that_ends_before_another_loss_was_logged_is_not_judged(path, steps):
    needs_numba(path)
    model, x, y, *_ = problem()
    net = nn.Sequential(*model, nn.Dropout(0.0)) if path == "general" else model
    stop, options = EarlyStopping(1, metric="training_loss"), {"evaluate_every": 10, "log_every": 3, "steps": steps}
    optimizer, impl = torch.optim.SGD(net.parameters(), lr=0.01), "native" if path == "native" else None
    history = fit(net, x, y, criterion=nn.BCELoss(), optimizer=optimizer, stop=stop, impl=impl, **options)
    assert (history.path, history.steps_taken, history.stopped.item()) == (path, steps, -1)


@pytest.mark.parametrize("criterion", [
    nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 2.0]).double()), nn.HuberLoss(delta=0.3),
    nn.MSELoss(reduction="sum"), nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.SoftMarginLoss(), nn.KLDivLoss(reduction="batchmean"), distance,
])  # fmt: skip
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_losses_of_members_are_those_of_each(criterion, own):
    ensemble = Ensemble(3, [3, 2], output_activation="identity", generator=torch.Generator().manual_seed(0)).double()
    data = torch.Generator().manual_seed(1)
    x, y = torch.randn(5, 3, generator=data).double(), torch.rand(*[3] * own, 5, 2, generator=data).double()
    output = ensemble(x).detach()
    expected = torch.stack([criterion(p, y[i] if own else y) for i, p in enumerate(output)])
    assert relative([losses_of(ensemble, criterion, output, y, own)], [expected]) <= 1e-14


def share_of(kind, samples=40, classes=3, length=3):
    """(criterion, output, target, the share that is right) of random outputs, right at every second sample."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(classes, (samples, length) if "long" in kind else (samples,), generator=generator)
    scores = torch.randn(*ids.shape, classes, generator=generator)
    scores[::2].scatter_(-1, ids[::2, ..., None], 9.0)
    share = (scores.argmax(-1) == ids).double().mean().item()
    right = torch.randint(2, (samples,), generator=generator).double()
    logits = torch.where(torch.arange(samples) % 3 > 0, 2 * right - 1, 1 - 2 * right) * 0.4
    share_of_two = (torch.arange(samples) % 3 > 0).double().mean().item()
    p = logits.sigmoid()
    return {
        "squeezed": (F.binary_cross_entropy, p, right, share_of_two),
        "squeezed-mse": (nn.MSELoss(), p, right, share_of_two),
        "squeezed-by-the-criterion": (lambda o, t: F.mse_loss(o[:, 0], t), p[:, None], right, share_of_two),
        "logits": (F.binary_cross_entropy_with_logits, logits[:, None], right[:, None], share_of_two),
        "logits-partial": (
            functools.partial(F.binary_cross_entropy_with_logits, reduction="sum"), logits, right, share_of_two,
        ),
        "ids-in-a-column": (lambda o, t: F.cross_entropy(o, t[:, 0]), scores, ids[:, None], share),
        "long-classes-first": (nn.CrossEntropyLoss(), scores.mT, ids, share),
        "long-classes-first-by-a-function": (F.cross_entropy, scores.mT, ids, share),
        "long-classes-last": (lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()), scores, ids, share),
        "long-probabilities": (nn.CrossEntropyLoss(), scores.mT, F.one_hot(ids, classes).mT.float(), share),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("length", [3, 5], ids=["as-many", "more"])  # as classes
@pytest.mark.parametrize("kind", [
    "squeezed", "squeezed-mse", "squeezed-by-the-criterion", "logits", "logits-partial", "ids-in-a-column",
    "long-classes-first", "long-classes-first-by-a-function", "long-classes-last", "long-probabilities",
])  # fmt: skip
def test_accuracy_of_other_shapes(kind, length):
    criterion, output, target, share = share_of(kind, length=length)
    if kind == "long-classes-last" and length == 3:
        pytest.skip("which of the two dimensions classes are in, nobody could tell")
    assert accuracy(criterion, output, target).item() == pytest.approx(share)
    assert 0.3 < share < 0.9


@pytest.mark.parametrize(
    ("output", "target"), [((4, 3), (3,)), ((4, 3), (4, 2)), ((4, 1), (4, 2)), ((4,), (4, 4)), ((4, 3, 2), (4,))]
)
def test_accuracy_of_what_does_not_fit(output, target):
    message = f"accuracy: target {target} holds neither classes nor class ids of output {output}"
    with pytest.raises(ValueError, match=re.escape(message)):
        accuracy(nn.MSELoss(), torch.rand(output), torch.rand(target))


@pytest.mark.parametrize("criterion", [nn.functional.cross_entropy, nn.MultiMarginLoss(), nn.CrossEntropyLoss()])
def test_accuracy_of_class_ids_under_any_criterion(criterion):
    model, x, y = make((3, 5, 4), "tanh", "identity", True, 9, torch.float64, 0)[:3]
    ids = y.argmax(1)
    options = {"optimizer": SGD(model.parameters()), "steps": 3, "validation": (x, ids), "metrics": ["accuracy"]}
    history = fit(model, x, ids, criterion=criterion, **options)
    share = (model(x).argmax(1) == ids).double().mean().item()
    assert history.validation["accuracy"].item() == pytest.approx(share)


@pytest.mark.parametrize("metric", ["loss", "training_loss"])
def test_the_best_are_ranked_by_what_they_hold(metric):
    """Their best parameters, which are not those of the last evaluation."""
    generator = torch.Generator().manual_seed(0)
    x, x_other = torch.randn(2, 30, 2, generator=generator)
    y, y_other = torch.rand(2, 30, 1, generator=generator).round()
    nets = Ensemble(8, [2, 16, 1], generator=generator)
    stop = EarlyStopping(None, metric=metric, keep_best=True)
    options = {"steps": 600, "log_every": 1, "validation": (x_other, y_other), "evaluate_every": 20, "stop": stop}
    optimizer = torch.optim.Adam(nets.parameters(), lr=0.05)
    history = fit(nets, x, y, criterion=nn.BCELoss(), optimizer=optimizer, **options)
    held = torch.stack([nn.functional.binary_cross_entropy(p, y_other) for p in nets(x_other).detach()])
    assert nets.best(history, 8) == torch.argsort(held).tolist()
    at = [history.evaluated.index(steps) for steps in history.kept.tolist()]
    torch.testing.assert_close(history.validation["loss"][at, range(8)], held)
    if metric == "loss":
        assert torch.equal(history.validation["loss"].min(0).values, history.validation["loss"][at, range(8)])
        assert history.kept.max() < 600  # the problem has no answer to learn


@pytest.mark.parametrize("every", [3, None])
def test_an_interrupt_during_an_evaluation_loses_none(every, monkeypatch):
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(1, 2))
    ends = []
    for interrupted in (False, True):
        model, x, y, *other = problem()
        calls = 0

        def counted(output, target, interrupted=interrupted):
            nonlocal calls
            calls += 1
            if interrupted and calls == 2:
                raise KeyboardInterrupt
            return output.mean()

        options = {"criterion": nn.BCELoss(), "optimizer": SGD(model.parameters()), "steps": 10, "batch_size": 3}
        options |= {"validation": other, "metrics": [counted], "evaluate_every": every, "log_every": 1}
        options |= {"generator": torch.Generator().manual_seed(0)}
        history = None
        try:
            history = fit(model, x, y, **options)
        except KeyboardInterrupt as interrupt:
            history = fit(model, x, y, resume=interrupt.history, **options)
        ends.append((history.evaluated, history.validation["counted"].tolist(), values(model)))
    assert ends[0][:2] == ends[1][:2]
    assert same_bits(ends[0][2], ends[1][2])


def test_parameters_that_have_no_shape_yet_are_kept():
    _, x, y, *other = problem()
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2), nn.Sigmoid()).double()
    options = {"criterion": nn.BCELoss(), "optimizer": SGD(model.parameters()), "steps": 12, "validation": other}
    stop = EarlyStopping(None, keep_best=True)
    history = fit(model, x, y, evaluate_every=3, stop=stop, **options)
    best = history.validation["loss"].min()
    torch.testing.assert_close(nn.BCELoss()(model(other[0]), other[1]).detach(), best)


def test_a_network_that_is_nan_is_evaluated_as_nan():
    model, x, y, *other = problem()
    options = {"criterion": nn.BCELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=torch.inf), "steps": 8}
    history = fit(model, x, y, validation=other, evaluate_every=2, **options)
    assert history.validation["loss"].isnan().tolist() == [True] * 4


def _wrong_data(**changes):
    """(validation data, the message) of data that do not fit."""
    x, y = torch.rand(4, 3).double(), torch.rand(4, 2).double()
    ((name, change),) = changes.items()
    x, y = (change(x), y) if name == "x" else (x, change(y))
    return x, y


@pytest.mark.parametrize(("data", "message"), [
    (_wrong_data(x=lambda x: x[:, :2]), r"^validation's x \(4, 2\) is not \(4, 3\)$"),
    (_wrong_data(x=lambda x: x.float()), r"^validation's x is torch.float32, but the model's parameters torch.float64"),
    (_wrong_data(y=lambda y: y[:, 0]), r"^validation's y \(4,\) is not \(4, 2\)$"),
    (_wrong_data(y=lambda y: y + 1), r"^validation's y must lie in \[0, 1\] for BCELoss"),
    (_wrong_data(x=lambda x: x / 0 * 0), r"^validation's x is NaN, first in row 0 of 4"),
])  # fmt: skip
def test_validation_data_are_looked_at_before_anything_is_trained(data, message):
    model, x, y, *_ = problem()
    before, generator = values(model), torch.Generator().manual_seed(1)
    state = generator.get_state()
    options = {"criterion": nn.BCELoss(), "optimizer": SGD(model.parameters()), "steps": 5, "batch_size": 3}
    with pytest.raises(ValueError, match=message):
        fit(model, x, y, validation=data, generator=generator, **options)
    assert same_bits(values(model), before)
    assert torch.equal(generator.get_state(), state)


WRONG = {
    "alone": ({"evaluate_every": 3}, ValueError, r"^evaluate_every needs validation data, but validation is None$"),
    "metrics-alone": ({"metrics": ["accuracy"]}, ValueError, r"^metrics needs validation data"),
    "stop-alone": ({"stop": EarlyStopping()}, ValueError, r"^stop needs validation data"),
    "pair": ({"validation": torch.ones(3)}, TypeError, r"^validation must be a pair of tensors \(x, y\), not tensor"),
    "kind": ({"validation": (torch.ones(3, 3), [1.0])}, TypeError, r"^validation's y must be a Tensor, not list$"),
    "metric": ({"metrics": ["recall"]}, ValueError, r"^metrics must be \"accuracy\" or functions .*, not 'recall'$"),
    "names": ({"metrics": [distance, distance]}, ValueError, r"^metrics must have names that differ, but 'distance'"),
    "losses": (
        {"stop": EarlyStopping(metric="training_loss")},
        ValueError,
        r"^stop watches 'training_loss', but log_every=0 logs none$",
    ),
    "seldom": (
        {"stop": EarlyStopping(metric="training_loss"), "log_every": 5, "evaluate_every": 2, "steps": 20},
        ValueError,
        r"^stop watches 'training_loss' each 2 steps, but log_every=5 is seldomer$",
    ),
    "checkpoint": ({"checkpoint": "file"}, TypeError, r"^checkpoint must be a function of a History, not str$"),
    "criterion": (
        {"criterion": nn.BCELoss},
        TypeError,
        r"^criterion must be a BCELoss\(\), not the class BCELoss itself$",
    ),
    "every": ({"evaluate_every": 0}, ValueError, r"^evaluate_every must be at least 1, not 0$"),
    "every-kind": ({"evaluate_every": 2.0}, TypeError, r"^evaluate_every must be an int or None, not 2.0$"),
    "stop": ({"stop": 5}, TypeError, r"^stop must be an EarlyStopping, not int$"),
    "watch": (
        {"stop": EarlyStopping(metric="accuracy")},
        ValueError,
        r"^stop watches 'accuracy', but evaluated are loss$",
    ),
    "samples": ({"validation": (torch.ones(3, 3), torch.ones(4, 2))}, ValueError, r"^validation's x \(3, 3\) and y"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    wrong, error, message = WRONG[case]
    model, x, y, *other = problem()
    before = values(model)
    options = {"criterion": nn.BCELoss(), "optimizer": SGD(model.parameters()), "steps": 2}
    options |= {} if case.endswith("alone") else {"validation": other}
    with pytest.raises(error, match=message):
        fit(model, x, y, **(options | wrong))
    assert same_bits(values(model), before)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"patience": 0}, ValueError, r"^patience must be at least 1, not 0$"),
    ({"patience": 1.5}, TypeError, r"^patience must be an int or None, not 1.5$"),
    ({"threshold": "a"}, TypeError, r"^threshold must be a number, not 'a'$"),
    ({"threshold": -1.0}, ValueError, r"^threshold must not be negative, not -1.0$"),
    ({"threshold": float("nan")}, ValueError, r"^threshold must not be negative, not nan$"),
    ({"metric": "distance"}, ValueError, r"^maximize must be True or False for the metric 'distance'$"),
])  # fmt: skip
def test_early_stopping_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        EarlyStopping(**arguments)


def test_an_mlp_on_its_own_data():
    """As in an evening's work: stop when the training loss stops falling."""
    torch.manual_seed(1)
    model = MLP([2, 4, 1])
    x, y = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([[0.0], [1], [1], [0]])
    options = {"criterion": nn.BCELoss(), "optimizer": torch.optim.Adam(model.parameters(), lr=0.05), "steps": 100_000}
    history = fit(model, x, y, validation=(x, y), evaluate_every=100, stop=EarlyStopping(5, 1e-5), **options)
    assert history.steps_taken == history.stopped.item() < 100_000
    assert history.validation["loss"][-1] < 0.01
