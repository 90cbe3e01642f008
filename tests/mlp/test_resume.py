# SPDX-License-Identifier: Apache-2.0
"""A run that was cut off and goes on ends to the bit as one that was not."""

import copy
import functools
import io
import os
import signal
import subprocess
import sys

import pytest
import torch
from cases import same_bits
from torch import nn
from training_cases import chunks_of, interrupt_after, values

from perceptriton.mlp import MLP, EarlyStopping, Ensemble, fit
from perceptriton.mlp.training import jobs
from perceptriton.mlp.training.pacing import SampleOrder

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 23


def dropout():
    return nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Dropout(0.3), nn.Linear(8, 2), nn.Sigmoid())


MODELS = {
    "mlp": lambda: MLP([3, 8, 2]),
    "ensemble": lambda: Ensemble(4, [3, 8, 2]),
    "general": dropout,  # draws numbers between the orders of epochs
}
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.5),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=0.02),
}
OPTIONS = {
    "full": {},
    "batches": {"batch_size": 4},
    "epochs": {"batch_size": 10},  # each step is one
    "schedule": {"batch_size": 3, "lr": lambda step: 0.3 * 0.9**step},
    "stop": {"batch_size": 4, "evaluate_every": 3, "metrics": ["accuracy"], "stop": EarlyStopping(2, keep_best=True)},
}


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Run:
    """A model with all that its training depends on."""

    def __init__(self, model, optimizer, options, own_generator=True):
        torch.manual_seed(5)
        self.model = MODELS[model]()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.generator = torch.Generator().manual_seed(9) if own_generator else None
        data = torch.Generator().manual_seed(7)
        x, y = torch.randn(10, 3, generator=data), torch.rand(10, 2, generator=data).round()
        self.options = {"criterion": nn.BCELoss(), "steps": STEPS, "log_every": 2, **OPTIONS[options]}
        self.options |= {"validation": (x[:5], y[:5])} if "stop" in self.options else {}
        self.data = x, y

    def fit(self, **more):
        options = {**self.options, "generator": self.generator, "optimizer": self.optimizer, **more}
        return fit(self.model, *self.data, **options)

    def saved(self, history):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "history": history}
        return through_a_file({**state, "random": torch.get_rng_state()})

    def loaded(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        # What an ordinary loop and orders of samples draw from is in the history.
        drawn = type(self.model) is nn.Sequential or (self.generator is None and "batch_size" in self.options)
        torch.manual_seed(1234) if drawn else torch.set_rng_state(state["random"])
        return state["history"]

    def end(self, history):
        random = torch.get_rng_state() if self.generator is None else self.generator.get_state()
        state = [t for entry in self.optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
        kept = [history.loss, *history.validation.values(), *([] if history.stopped is None else [history.stopped])]
        return [*values(self.model), *state, *kept, random, torch.tensor([*history.steps, *history.evaluated])]


@pytest.mark.parametrize(
    "own_generator",
    [pytest.param(True, marks=pytest.mark.slow, id="own-generator"), pytest.param(False, id="default-generator")],
)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("model", "optimizer"), [("mlp", "adam"), ("ensemble", "momentum"), ("general", "sgd")])
def test_a_checkpoint_goes_on_to_the_same_end(model, optimizer, options, own_generator, monkeypatch):
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(1, 4, 2, 7))
    whole, saved = Run(model, optimizer, options, own_generator), []
    history = whole.fit(checkpoint=lambda history: saved.append(whole.saved(history)))
    expected = whole.end(history)
    assert len(saved) > 5
    for state in saved:
        other = Run(model, optimizer, options, own_generator)
        if "batch_size" in other.options:
            torch.rand(3, generator=other.generator)  # wherever the generator is
        found = other.fit(resume=other.loaded(state))
        assert found.steps_taken == history.steps_taken
        assert same_bits(other.end(found), expected), state["history"].steps_taken


@pytest.mark.parametrize("ahead", [False, True], ids=["drawn-when-asked", "drawn-ahead"])
@pytest.mark.parametrize("options", ["batches", "epochs", "schedule"])
def test_an_interrupt_has_the_history_of_the_chunk_before(options, ahead, monkeypatch):
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(3, 5))
    monkeypatch.setattr(jobs, "runs_apart", lambda device: ahead)
    whole = Run("mlp", "momentum", options)
    expected = whole.end(whole.fit())
    interrupt_after(3, monkeypatch)
    cut = Run("mlp", "momentum", options)
    with pytest.raises(KeyboardInterrupt) as error:
        cut.fit()
    history = error.value.history
    assert (history.steps_taken, history.steps) == (8, [0, 2, 4, 6])
    other = Run("mlp", "momentum", options)
    assert same_bits(other.end(other.fit(resume=other.loaded(cut.saved(history)))), expected)


@pytest.mark.usefixtures("interruptible")
def test_an_ordinary_loop_counts_the_steps_before_a_second_interrupt(monkeypatch):
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(10))
    run = Run("general", "sgd", "batches")
    calls = []

    def criterion(output, target):
        calls.append(1)
        if len(calls) == 14:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return nn.functional.mse_loss(output, target)

    with pytest.raises(KeyboardInterrupt) as error:
        run.fit(criterion=criterion)
    assert (error.value.history.steps_taken, error.value.history.steps) == (13, [0, 2, 4, 6, 8, 10, 12])
    assert len(error.value.history.loss) == 7


def test_a_scheduler_goes_on_with_its_own_state(monkeypatch):
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(1, 4, 2, 7))
    ends = []
    for cut in (None, 5, 14):
        run = Run("mlp", "adam", "batches")
        scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 2, 0.5)
        if cut is None:
            history = run.fit(scheduler=scheduler)
        else:
            saved = []

            def save(history, run=run, scheduler=scheduler, saved=saved, cut=cut):
                if history.steps_taken == cut:
                    saved.append((copy.deepcopy(run.saved(history)), copy.deepcopy(scheduler.state_dict())))

            run.fit(scheduler=scheduler, checkpoint=save)
            state, own = saved[0]
            run = Run("mlp", "adam", "batches")
            scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 2, 0.5)
            resume = run.loaded(state)
            scheduler.load_state_dict(own)
            history = run.fit(scheduler=scheduler, resume=resume)
        ends.append([*run.end(history), torch.tensor(scheduler.get_last_lr())])
    assert same_bits(ends[1], ends[0])
    assert same_bits(ends[2], ends[0])


def test_what_does_not_go_on_is_refused():
    run = Run("mlp", "adam", "batches")
    history = run.fit(steps=6)
    before = values(run.model)
    for options, error, message in (
        ({"resume": {}}, TypeError, r"^resume must be a History, not dict$"),
        ({"steps": 5}, ValueError, r"^resume has taken 6 steps, more than steps=5$"),
        ({"batch_size": 5}, ValueError, r"^resume is of a run with batch_size 4, not 5$"),
        ({"log_every": 3}, ValueError, r"^resume logged 3 losses in 6 steps, which is not log_every=3$"),
    ):
        with pytest.raises(error, match=message):
            run.fit(**{"resume": history, **options})
    validation = {"validation": run.data, "evaluate_every": 2}
    for options, message in (
        ({**validation, "stop": EarlyStopping(2)}, r"^resume is of a run without this stop"),
        ({**validation, "metrics": ["accuracy"]}, r"^resume is of a run that evaluated loss, not loss, accuracy$"),
        ({}, r"^resume is of a run that evaluated loss, not nothing$"),
        ({"stop": EarlyStopping(metric="training_loss")}, r"^resume is of a run that evaluated loss, not nothing$"),
    ):
        seen = Run("mlp", "adam", "batches")
        half = seen.fit(steps=6, **validation)
        state = seen.generator.get_state()
        with pytest.raises(ValueError, match=message):
            seen.fit(resume=half, **options)
        assert torch.equal(seen.generator.get_state(), state)
    other = Run("ensemble", "adam", "batches")
    with pytest.raises(ValueError, match=r"^resume is of a run with networks 1, not 4$"):
        other.fit(resume=history)
    assert same_bits(values(run.model), before)
    # Nothing is left to do.
    assert run.fit(steps=6, resume=history).steps_taken == 6
    assert same_bits(values(run.model), before)


def test_a_run_goes_on_without_its_stop():
    run, stop = Run("mlp", "adam", "batches"), EarlyStopping(1, threshold=1.0, metric="training_loss")
    history = run.fit(stop=stop, evaluate_every=2)
    assert history.steps_taken < STEPS
    longer = run.fit(resume=history)
    assert (longer.steps_taken, longer.evaluated, longer.stopped) == (STEPS, history.evaluated, None)


@pytest.mark.parametrize("samples", [7, 12])
@pytest.mark.parametrize("batch", [3, 12])
def test_states_of_the_generator_do_not_depend_on_who_asks(samples, batch):
    """Over all that draws: rows, rows ahead, one epoch after the other."""

    def states(chunks, ahead):
        order = SampleOrder(samples, batch, 40, torch.Generator().manual_seed(1))
        found, start = [], 0
        for count in chunks:
            if ahead is None:
                list(order.batches(start, count, torch.device("cpu")))
            else:
                order.rows(start, count)
            start += count
            if ahead:
                order.draw_ahead(count)
            found.append((start, *order.states(start)))
        return {taken: (one, two) for taken, one, two in found}

    expected = states([1] * 40, None)
    for chunks in ([1] * 40, [4] * 10, [1, 9, 2, 8, 20], [40]):
        for ahead in (False, True):
            for taken, pair in states(chunks, ahead).items():
                assert same_bits(pair, expected[taken]), (chunks, ahead, taken)


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import torch
import test_resume
from training_cases import chunks_of
from perceptriton.mlp.training import run as module
module.chunks = chunks_of(3)
run = test_resume.Run("ensemble", "adam", "batches")
def save(history):
    torch.save(run.saved(history), {file!r} + ".part")
    os.replace({file!r} + ".part", {file!r})
    if history.steps_taken == 12:
        os.kill(os.getpid(), signal.SIGKILL)
run.fit(checkpoint=save)
"""


@pytest.mark.slow
def test_what_a_killed_process_saved_goes_on(tmp_path, monkeypatch):
    file = str(tmp_path / "run.pt")
    tests = os.path.dirname(__file__)
    code = KILLED.format(paths=[tests, os.path.dirname(tests)], file=file)
    killed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(3))
    whole, other = Run("ensemble", "adam", "batches"), Run("ensemble", "adam", "batches")
    history = other.loaded(torch.load(file, weights_only=True))
    assert history.steps_taken == 12
    assert same_bits(other.end(other.fit(resume=history)), whole.end(whole.fit()))
