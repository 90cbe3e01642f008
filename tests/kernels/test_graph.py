# SPDX-License-Identifier: Apache-2.0
"""The captured training step, on a CPU: a graph that records what a step launches, its numbers frozen, and replays.

Scalars are frozen and nothing runs while it is captured, as in a CUDA graph, so a step that hides a changing number in
an argument, or counts on a capture to take a step, trains wrongly here too.
"""

import itertools
import threading
import time

import pytest
import torch
from cases import assert_near
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import RECIPES, states_of

from perceptriton.kernels.hyperparameters import COMMON, Hyperparameters
from perceptriton.kernels.loop import TorchLoop, layout
from perceptriton.kernels.records import TrainConfig, TrainPlan

pytestmark = pytest.mark.usefixtures("poisoned")


class Recorder(TorchDispatchMode):
    def __init__(self, graph, stream=None, capture_error_mode=None):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = [
            kwargs.get(argument.name, args[i] if i < len(args) else None)
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        assert len(written) == 1, f"{func} makes a new tensor"
        self.graph.calls.append((func, args, kwargs))
        return written[0]


class Graph:
    made = 0

    def __init__(self):
        self.calls = []
        Graph.made += 1

    def replay(self):
        assert self.calls
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recorder)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream on {device}")
    monkeypatch.setattr(Graph, "made", 0)


def train(impl, config, members, batch_size, chunks, every=5, own=COMMON, rates=None):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    widths = config.widths
    parameters = [
        t for k, n in itertools.pairwise(widths) for t in (2 * normal(members, n, k) / k**0.5, normal(members, n))
    ]
    x, y = normal(1, 10, widths[0]), torch.rand(1, 10, widths[-1], generator=generator, dtype=torch.float64)
    states = len(states_of(config))
    first, second = ([torch.zeros_like(p) for p in parameters] if states > i else () for i in range(2))
    lr = torch.linspace(0.02, 0.2, members, dtype=torch.float64)
    epochs = [torch.randperm(10, generator=generator) for _ in range(40)]
    data = (config, parameters, first, second, lr if rates is None else None, x, y, batch_size or 10)
    run = TorchLoop(*data, 0, TrainPlan(impl, "the test says so"), own)
    start, losses = 0, []
    for steps in chunks:
        per_epoch = -(-10 // (batch_size or 10))
        order = torch.stack(epochs[start // per_epoch :]).int() if batch_size else None
        logged = torch.full(
            (len([s for s in range(start, start + steps) if s % every == 0]), members), torch.nan
        ).double()
        run.run(order, start, steps, every, logged, None if rates is None else rates[start : start + steps])
        start += steps
        losses.append(logged)
    return [*parameters, *first, *second, torch.cat(losses)]


@pytest.mark.parametrize("batch_size", [None, 4], ids=["full-batch", "minibatches"])
@pytest.mark.parametrize("members", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_replayed_steps_are_steps(options, members, batch_size):
    config = TrainConfig((3, 5, 2), **options)
    expected = train("torch", config, members, batch_size, [24])
    assert Graph.made == 0
    actual = train("graph", config, members, batch_size, [24])
    # one graph per size of batch
    assert Graph.made == (1 if batch_size is None else 2)
    assert_near(actual, expected, 1e-12)
    # Nor does the size of a chunk change a bit, or make another graph.
    Graph.made = 0
    for a, b in zip(train("graph", config, members, batch_size, [1, 9, 14]), actual, strict=True):
        assert torch.equal(a, b)
    assert Graph.made == (1 if batch_size is None else 2)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({"weight_decay": 0.1}, {"weight_decay": (0.0, 0.1, 0.2)}),
        ({"momentum": 0.9, "dampening": 0.1}, {"momentum": (0.9, 0.0, 0.5)}),
        ({"optimizer": "adamw", "weight_decay": 0.1}, {"beta1": (0.9, 0.8, 0.5), "beta2": (0.9, 0.99, 0.999)}),
        ({"optimizer": "rmsprop", "momentum": 0.1}, {"momentum": (0.5, 0.0, 0.9)}),
    ],
    ids=["decay", "dampening", "adamw", "rmsprop"],
)
@pytest.mark.parametrize("loss", ["bce", "cross_entropy"])
def test_replays_read_the_numbers_of_their_step(options, own, members, loss):
    config = TrainConfig((3, 5, 2), output="identity" if loss == "cross_entropy" else "sigmoid", loss=loss, **options)
    numbers = Hyperparameters(**{name: torch.tensor(values[:members]).double() for name, values in own.items()})
    rates = torch.linspace(0.2, 0.01, 24, dtype=torch.float64)[:, None] * torch.linspace(1, 0.5, members).double()
    expected = train("torch", config, members, 4, [24], own=numbers, rates=rates)
    actual = train("graph", config, members, 4, [24], own=numbers, rates=rates)
    assert Graph.made == 2
    assert_near(actual, expected, 1e-12)
    for a, b in zip(train("graph", config, members, 4, [1, 9, 14], own=numbers, rates=rates), actual, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("members", [1, 3])
def test_long_trajectories(members):
    expected, actual = (
        train(impl, TrainConfig((3, 2, 2)), members, None, [1, 1, 98, 9901]) for impl in ("torch", "graph")
    )
    assert len(expected[-1]) == 2001
    assert_near(actual, expected, 1e-9)


def test_steps_that_log_are_replayed_too():
    config = TrainConfig((3, 5, 2), momentum=0.9)
    expected = train("torch", config, 3, None, [24], every=1)
    assert Graph.made == 0
    actual = train("graph", config, 3, None, [24], every=1)
    assert Graph.made == 1
    assert_near(actual, expected, 1e-12)


def test_captures_have_a_stream_per_device_and_thread():
    one, other = torch.device("cuda", 0), torch.device("cuda", 1)
    streams = {device: layout._capture_stream(device) for device in (one, other)}
    assert streams == {one: "a stream on cuda:0", other: "a stream on cuda:1"}
    assert layout._capture_stream(one) is streams[one]
    layout._streams.__dict__.clear()


def test_one_capture_at_a_time(monkeypatch):
    """Whatever begins one waits for the whole device, and a capture that goes on elsewhere would fail."""
    going, most, entered = [], [], threading.Barrier(3)

    class Slow(Recorder):
        def __enter__(self):
            going.append(1)
            most.append(len(going))
            time.sleep(0.02)
            return super().__enter__()

        def __exit__(self, *error):
            going.pop()
            return super().__exit__(*error)

    monkeypatch.setattr(torch.cuda, "graph", Slow)
    results = []

    def run():
        entered.wait()
        results.append(train("graph", TrainConfig((3, 5, 2)), 1, None, [24]))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 3
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_step_that_is_captured_is_not_lost():
    # Negative control of the recorder itself: capturing runs nothing.
    w, graph = torch.zeros(3), Graph()
    with Recorder(graph):
        w.add_(1)
    assert w.tolist() == [0, 0, 0]
    graph.replay()
    graph.replay()
    assert w.tolist() == [2, 2, 2]
