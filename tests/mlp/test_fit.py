# SPDX-License-Identifier: Apache-2.0
"""fit trains as the loop that everyone writes, whatever runs underneath."""

import contextlib
import copy
import dataclasses
import functools
import math
import os
import re
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from cases import conjugated, negated, same_bits, sequential
from torch import nn
from training_cases import (
    LOSSES,
    NETS,
    OPTIMIZERS,
    SLOW_OPTIMIZERS,
    STATEFUL,
    assert_same_state,
    chunks_of,
    interrupt_after,
    make,
    make_net,
    needs_numba,
    ordinary,
    relative,
    state_of,
    values,
    xor,
)

from perceptriton.kernels import plan, records
from perceptriton.kernels.loop import TorchLoop
from perceptriton.kernels.loop import optimizer as optimizers
from perceptriton.kernels.loop.matrices import Matrices
from perceptriton.mlp import MLP, EarlyStopping, Ensemble, History, LinearSigmoid, fit, lessons
from perceptriton.mlp.as_network import Refused, as_network
from perceptriton.mlp.training import criteria, jobs, pacing, validation

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")
# Two orders of the same fp64 sums over 100 steps.
EXACT = 1e-10


@pytest.fixture(params=["joint", "matrices"])
def layout(request, monkeypatch):
    """Each way in which the loop may lay out one network, whatever its size."""
    monkeypatch.setattr(plan, "train_loop", lambda *_: records.LoopPlan(request.param, True, "the test says so"))
    return request.param


def twins(name, dtype=torch.float64):
    model, x, y = make_net(name, dtype)
    return model, copy.deepcopy(model), x, y


def assert_trained_alike(model, twin, own, other, *losses):
    """The same parameters and states of optimizers, and the same losses where they are given, but for rounding."""
    assert not losses or relative(losses[:1], losses[1:]) <= EXACT
    assert relative(model.parameters(), twin.parameters()) <= EXACT
    assert_same_state(own, other, EXACT)


# --- the same trajectory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_trajectory(net, optimizer):
    model, twin, x, y = twins(net)
    before = values(model)
    own, other = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    history = fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=30, log_every=1)
    losses = ordinary(twin, x, y, nn.BCELoss(), other, 30)
    assert history.path == "torch"
    assert_trained_alike(model, twin, own, other, history.loss, losses)
    assert relative(before, twin.parameters()) > 1e6 * EXACT  # a loop that does nothing would be seen


@pytest.mark.parametrize("steps", [1, 2, 100])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, steps, layout):
    criterion, output = LOSSES[loss]
    model, x, y = make((4, 6, 3), "tanh", output, True, 7)
    twin = copy.deepcopy(model)
    own, other = (torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.5) for m in (model, twin))
    history = fit(model, x, y, criterion=criterion, optimizer=own, steps=steps, log_every=1)
    losses = ordinary(twin, x, y, criterion, other, steps)
    assert history.path == "torch"
    assert_trained_alike(model, twin, own, other, history.loss, losses)


@pytest.mark.parametrize("optimizer", ["adam", "adam-decay", "adamw"])
def test_adam_without_torchs_own_function(optimizer, monkeypatch):
    monkeypatch.setattr(optimizers, "_fused_adam", dict)
    test_trajectory("tanh", optimizer)


def test_torchs_own_function_is_tried_first(monkeypatch):
    try_again = optimizers._fused_adam.__wrapped__
    assert list(try_again()) == ["adam", "adamw"]
    right = torch._fused_adam_

    def wrong(*arguments, lr, **options):
        right(*arguments, lr=1.001 * lr, **options)

    monkeypatch.setattr(torch, "_fused_adam_", wrong)
    assert try_again() == {}
    monkeypatch.delattr(torch, "_fused_adam_")
    assert try_again() == {}


@pytest.mark.parametrize("optimizer", ["sgd-decay", "adam"])
@pytest.mark.parametrize("net", ["deep", "relu-bare", "medium"])
def test_fp32_is_as_good_as_torch(net, optimizer):
    errors = []
    exact, x, y = make_net(net)
    ordinary(exact, x, y, nn.BCELoss(), OPTIMIZERS[optimizer](exact.parameters()), 100)
    # Torch's own error with the samples in two orders: sums over the batch round differently.
    for rows in (slice(None), torch.arange(len(x) - 1, -1, -1)):
        twin, x32, y32 = make_net(net, torch.float32)
        ordinary(twin, x32[rows], y32[rows], nn.BCELoss(), OPTIMIZERS[optimizer](twin.parameters()), 100)
        errors.append(relative(twin.parameters(), exact.parameters()))
    model, x32, y32 = make_net(net, torch.float32)
    fit(model, x32, y32, criterion=nn.BCELoss(), optimizer=OPTIMIZERS[optimizer](model.parameters()), steps=100)
    assert relative(model.parameters(), exact.parameters()) <= 2 * max(errors) + 2e-6


def xor_model(dtype=torch.float32):
    torch.manual_seed(lessons.XOR_SEED)
    return MLP([2, 2, 1]).to(dtype)


@pytest.mark.more
def test_xor_for_10001_steps():
    errors = []
    exact = xor_model(torch.float64)
    ordinary(exact, *xor(torch.float64), nn.BCELoss(), torch.optim.SGD(exact.parameters(), lr=1.0), 10_001)
    for rows in ([0, 1, 2, 3], [3, 1, 0, 2]):
        twin = xor_model()
        x, y = (t[rows] for t in xor())
        ordinary(twin, x, y, nn.BCELoss(), torch.optim.SGD(twin.parameters(), lr=1.0), 10_001)
        errors.append(relative(twin.parameters(), exact.parameters()))
    model = xor_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fit(model, *xor(), criterion=nn.BCELoss(), optimizer=optimizer, steps=10_001)
    assert relative(model.parameters(), exact.parameters()) <= 2 * max(errors) + 2e-6


def test_another_network_does_not_follow():
    model, twin, x, y = twins("xor")
    with torch.no_grad():
        next(twin.parameters()).copy_(next(twin.parameters()).t().clone())
    for m in (model, twin):
        fit(m, x, y, criterion=nn.BCELoss(), optimizer=torch.optim.SGD(m.parameters(), lr=0.5), steps=100)
    assert relative(model.parameters(), twin.parameters()) > 1e6 * EXACT


# --- minibatches ---------------------------------------------------------------------------------------------

# (samples, batch size): why
BATCHES = {
    "even": (12, 4),
    "ragged": (10, 4),  # the last batch is smaller
    "one": (5, 1),
    "more-than-all": (6, 9),  # each batch is all samples, in another order
}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("batches", BATCHES)
def test_minibatches_come_in_torchs_order(batches, optimizer, layout):
    samples, size = BATCHES[batches]
    model, x, y = make((3, 4, 2), "sigmoid", "sigmoid", True, samples)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 5, 6)]
    own, other, another = (OPTIMIZERS[optimizer](m.parameters()) for m in (model, twin, third))
    common = {"criterion": nn.BCELoss(), "steps": 17, "batch_size": size, "log_every": 3}
    history = fit(model, x, y, optimizer=own, generator=generators[0], **common)
    losses = ordinary(twin, x, y, nn.BCELoss(), other, 17, size, generators[1], log_every=3)
    assert history.steps == [0, 3, 6, 9, 12, 15]
    assert_trained_alike(model, twin, own, other, history.loss, losses)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    fit(third, x, y, optimizer=another, generator=generators[2], **common)
    if size < samples:
        assert relative(third.parameters(), twin.parameters()) > 1e6 * EXACT


def test_each_call_begins_an_epoch():
    model, twin, x, y = twins("tanh")
    own, other = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, twin))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for steps in (3, 2):
        fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=steps, batch_size=2, generator=generators[0])
        ordinary(twin, x, y, nn.BCELoss(), other, steps, 2, generators[1])
    assert relative(model.parameters(), twin.parameters()) <= EXACT


def test_without_a_generator_the_order_is_that_of_the_default_one():
    model, twin, x, y = twins("tanh")
    own, other = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, twin))
    torch.manual_seed(3)
    fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=9, batch_size=3)
    torch.manual_seed(3)
    ordinary(twin, x, y, nn.BCELoss(), other, 9, 3)
    assert relative(model.parameters(), twin.parameters()) <= EXACT


def orders(steps, samples, batch_size, chunks, ahead, generator):
    """The order of each step's samples, over chunks; ahead: as where a device computes meanwhile."""
    order = pacing.SampleOrder(samples, batch_size, steps, generator)
    taken = []
    for start, count in chunks:
        first, rows = start // order.per_epoch, order.rows(start, count)
        assert rows.dtype == torch.int32
        for step in range(start, start + count):
            begin = step % order.per_epoch * order.batch
            taken += rows[step // order.per_epoch - first][begin : begin + order.batch].tolist()
        if ahead:
            order.draw_ahead(count)
    order.close()
    return taken


@pytest.mark.parametrize("end", [40, 31, 1], ids=["finished", "interrupted", "after-one-step"])
@pytest.mark.parametrize("sizes", [(40,), (1, 4, 9, 2, 2, 30), (7, 1, 1, 1, 12, 3)], ids=str)
@pytest.mark.parametrize(("samples", "size"), [(10, 4), (3, 3), (5, 9), (7, 1), (60_000, 9_999)])
def test_orders_that_are_drawn_ahead_are_those_that_are_not(samples, size, sizes, end):
    chunks = [(start, min(count, end - start)) for start, count in chunks_of(*sizes)(0, 40) if start < end]
    generators = [torch.Generator().manual_seed(3) for _ in range(3)]
    ahead, in_time = (orders(40, samples, size, chunks, *pair) for pair in zip((True, False), generators, strict=False))
    per_epoch = -(-samples // size)
    drawn = torch.cat([torch.randperm(samples, generator=generators[2]) for _ in range(-(-end // per_epoch))])
    assert ahead == in_time == drawn[: len(in_time)].tolist()
    assert len(in_time) == end // per_epoch * samples + end % per_epoch * min(size, samples)
    for generator in generators[:2]:
        assert torch.equal(generator.get_state(), generators[2].get_state())


@pytest.mark.parametrize("own", [True, False], ids=["own-generator", "default-generator"])
def test_an_error_leaves_the_generator_as_it_was_then(own, monkeypatch):
    monkeypatch.setattr(jobs, "runs_apart", lambda device: True)
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(9, 1))
    model, x, y = make_net("tanh")
    generator = torch.Generator().manual_seed(3) if own else None
    random = torch.default_generator if generator is None else generator
    run = TorchLoop.run

    def fails(self, order, start, *rest):
        run(self, order, start, *rest)
        if start == 9:
            raise FloatingPointError

    monkeypatch.setattr(TorchLoop, "run", fails)
    common = {"criterion": nn.BCELoss(), "batch_size": 2, "generator": generator, "impl": "torch"}
    torch.manual_seed(4)
    before = random.get_state()
    with pytest.raises(FloatingPointError):
        fit(model, x, y, optimizer=sgd(model), steps=30, **common)
    after = random.get_state()
    random.set_state(before)
    # 10 steps, 4 to the epoch; after the ninth, more had been drawn ahead.
    for _ in range(3):
        torch.randperm(len(x), generator=generator)
    assert torch.equal(after, random.get_state())


# --- what is left behind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", STATEFUL)
def test_training_goes_on_seamlessly(optimizer):
    model, twin, x, y = twins("tanh")
    own, other = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    criterion = nn.BCELoss()
    ordinary(model, x, y, criterion, own, 5)
    held = {id(v) for v in state_of(own)[1]}
    fit(model, x, y, criterion=criterion, optimizer=own, steps=20)
    fit(model, x, y, criterion=criterion, optimizer=own, steps=1)
    assert {id(v) for v in state_of(own)[1]} == held  # written in place, as ordinary steps write
    ordinary(model, x, y, criterion, own, 4)
    ordinary(twin, x, y, criterion, other, 30)
    assert_trained_alike(model, twin, own, other)


@pytest.mark.parametrize("optimizer", STATEFUL)
def test_state_is_honoured(optimizer):
    # The negative control of the test above: without the state of the first steps, training goes elsewhere.
    model, twin, x, y = twins("tanh")
    for m, forget in ((model, False), (twin, True)):
        own = OPTIMIZERS[optimizer](m.parameters())
        ordinary(m, x, y, nn.BCELoss(), own, 5)
        if forget:
            own = OPTIMIZERS[optimizer](m.parameters())
        fit(m, x, y, criterion=nn.BCELoss(), optimizer=own, steps=20)
    assert relative(model.parameters(), twin.parameters()) > 1e6 * EXACT


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_state_is_of_the_same_kind(options):
    for make_optimizer in (torch.optim.SGD, torch.optim.Adam):
        model, twin, x, y = twins("xor", torch.float32)
        more = {"momentum": 0.9} if make_optimizer is torch.optim.SGD else {}
        own, other = (make_optimizer(m.parameters(), lr=0.1, **more, **options) for m in (model, twin))
        history = fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=3)
        ordinary(twin, x, y, nn.BCELoss(), other, 3)
        assert history.path == "torch"
        assert_same_state(own, other, 1e-5)


def test_what_is_left_behind(monkeypatch):
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(2))
    model, x, y = make_net("tanh")
    parameters = list(model.parameters())
    inputs = x.clone(), y.clone()
    parameters[0].grad = torch.ones_like(parameters[0])
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    handler = signal.getsignal(signal.SIGINT)
    fit(model, x, y, criterion=nn.BCELoss(), optimizer=torch.optim.SGD(parameters, lr=0.5), steps=3)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.requires_grad and p.grad is None and not p.is_inference() for p in parameters)
    assert torch.equal(x, inputs[0])
    assert torch.equal(y, inputs[1])
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGINT) is handler
    model(x).sum().backward()


def test_whole_numbers_may_be_those_of_numpy():
    results = []
    for number in (int, np.int64, np.int32):
        model, x, y = make_net("xor")
        counts = {"steps": number(7), "batch_size": number(2), "log_every": number(3), "evaluate_every": number(2)}
        options = {"validation": (x, y), "stop": EarlyStopping(number(50)), "generator": torch.Generator()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        history = fit(model, x, y, criterion=nn.BCELoss(), optimizer=optimizer, **counts, **options)
        assert {type(step) for step in (*history.steps, history.steps_taken, *history.evaluated)} == {int}
        results.append([history.loss, *values(model)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_history_of_many_steps_has_a_short_repr():
    assert len(repr(History([*range(10**5)], torch.zeros(10**5), 1.0, "torch", evaluated=[*range(10**5)]))) < 500


def test_class_ids_of_many_classes_stay_ids(monkeypatch):
    """Probabilities in their place would take more memory than all else."""
    monkeypatch.setattr(criteria, "MOST_BYTES", 4 * 9 * 50)
    model, x = MLP([3, 50], output_activation="identity"), torch.rand(9, 3)
    optimizer, ids = torch.optim.SGD(model.parameters(), lr=0.5), torch.arange(9)
    options = {"criterion": nn.CrossEntropyLoss(), "optimizer": optimizer, "steps": 2}
    assert fit(model, x, ids, **options).path != "general"
    more = MLP([3, 51], output_activation="identity")
    options["optimizer"] = torch.optim.SGD(more.parameters(), lr=0.5)
    history = fit(more, x, ids, **options)
    assert (history.path, history.reason) == ("general", "class ids would become probabilities of 0.0 GiB")


def test_an_order_is_copied_to_the_device_once_an_epoch(monkeypatch):
    order, copied, to = pacing.SampleOrder(10, 3, 40, None), [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *rest: copied.append(t) or to(t, *rest))
    batches = list(order.batches(0, 40, torch.device("meta")))
    assert [len(batch) for batch in batches] == [3, 3, 3, 1] * 10
    assert {batch.device.type for batch in batches} == {"meta"}
    assert len(copied) == 10


def test_a_run_waits_for_its_own_stream_alone(monkeypatch):
    """A thread that waits for the whole device breaks what another one captures."""
    waited = []
    stream = types.SimpleNamespace(synchronize=lambda: waited.append("stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append("device"))
    for device in ("cuda:1", "cpu"):
        pacing.synchronize(torch.device(device))
    assert waited == ["stream"]


def test_threads_come_back_from_loops_side_by_side():
    torch.set_num_threads(2)
    found = {}

    def train(name):
        model, x, y = make_net("xor")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        fit(model, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=300)
        found[name] = torch.get_num_threads(), values(model)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    train("main")
    for thread in threads:
        thread.join()
    assert [count for count, _ in found.values()] == [2] * 4
    for _, trained in found.values():
        assert relative(trained, found["main"][1]) == 0


@pytest.mark.parametrize(("own", "process", "after"), [(None, 2, 2), (3, 2, 3), (1, 1, 1)])
def test_threads_of_a_thread_that_began_beside_a_loop(own, process, after):
    """It has inherited the loop's 1, which is not a number that anyone chose."""
    torch.set_num_threads(1)  # as a loop does
    began, ended, found = threading.Event(), threading.Event(), []

    def train():
        found.append(torch.get_num_threads())
        if own:
            torch.set_num_threads(own)
        began.set()
        ended.wait()
        model, x, y = make_net("xor")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        fit(model, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=3)
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=train)
    thread.start()
    began.wait()
    torch.set_num_threads(process)  # as a loop does at its end
    ended.set()
    thread.join()
    assert found == [1, after]


def test_no_steps():
    model, twin, x, y = twins("xor")
    optimizer = torch.optim.Adam(model.parameters())
    history = fit(model, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=0, log_every=1)
    assert (history.steps, history.loss.shape, history.path) == ([], (0,), "torch")
    assert relative(model.parameters(), twin.parameters()) == 0
    assert not optimizer.state


def test_history():
    model, x, y = make_net("xor", torch.float32)
    arguments = {"criterion": nn.BCELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.5)}
    history = fit(model, x, y, **arguments, steps=11, log_every=5)
    assert isinstance(history, History)
    assert history.steps == [0, 5, 10]
    assert (history.loss.shape, history.loss.dtype) == ((3,), torch.float32)
    assert history.seconds > 0
    history = fit(model, x, y, **arguments, steps=11)
    assert (history.steps, history.loss.shape) == ([], (0,))


def test_a_scheduler_sees_the_steps():
    model, x, y = make_net("xor")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert fit(model, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=2).path == "torch"
    scheduler.step()  # would warn if it had seen none, and a warning is an error here
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_strided_parameters_and_data():
    model, twin, x, y = twins("tanh")
    with torch.no_grad():
        model[0].weight.data = model[0].weight.t().contiguous().t()
    stride = model[0].weight.stride()
    own, other = (torch.optim.Adam(m.parameters(), lr=0.05) for m in (model, twin))
    wide = torch.full((7, 8), torch.nan, dtype=torch.float64)[:, ::2].copy_(x)
    fit(model, wide, y, criterion=nn.BCELoss(), optimizer=own, steps=9)
    ordinary(twin, x, y, nn.BCELoss(), other, 9)
    assert relative(model.parameters(), twin.parameters()) <= EXACT
    assert model[0].weight.stride() == own.state[model[0].weight]["exp_avg"].stride() == stride


# --- chunks and interrupts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 4], ids=["full", "minibatches"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", *SLOW_OPTIMIZERS])
def test_the_size_of_a_chunk_changes_no_bit(optimizer, batch_size, layout, monkeypatch):
    results = []
    for sizes in ((1,), (2, 3, 1), (50,)):
        monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(*sizes))
        model, x, y = make((3, 7, 5, 2), "sigmoid", "sigmoid", True, 10, torch.float32)
        own = OPTIMIZERS[optimizer](model.parameters())
        options = {"batch_size": batch_size, "log_every": 7, "generator": torch.Generator().manual_seed(2)}
        history = fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=50, **options)
        results.append([*values(model), history.loss, *state_of(own)[1]])
    for other in results[1:]:
        assert same_bits(results[0], other)


@pytest.mark.parametrize(("batch_size", "sizes"), [(None, [10]), (4, [4, 2])], ids=["full", "minibatches"])
def test_chunks_share_their_buffers(batch_size, sizes, monkeypatch):
    # Made anew, they would take their time out of every chunk, and chunks of a model whose set-up takes longer than a
    # chunk would shrink to one step.
    built, build = [], Matrices.build
    monkeypatch.setattr(Matrices, "build", lambda own, batch: (built.append(batch.size), build(own, batch)))
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(2))
    model, x, y = make((3, 5, 2), "sigmoid", "sigmoid", True, 10, torch.float32)
    fit(model, x, y, criterion=nn.BCELoss(), optimizer=sgd(model), steps=9, batch_size=batch_size)
    assert built == sizes


def test_chunks_cover_all_steps_by_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    sizes = []
    for start, count in pacing.chunks(0, 10_000):
        assert start == sum(sizes)
        sizes.append(count)
        now[0] += count / 1024  # seconds
    assert sum(sizes) == 10_000
    assert sizes[0] == 1
    assert set(sizes[1:-1]) == {204}  # 0.2 s


@pytest.mark.parametrize("optimizer", ["sgd", *STATEFUL])
def test_an_interrupted_chunk_leaves_the_one_before(optimizer, monkeypatch):
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(10))
    model, twin, x, y = twins("tanh")
    own, other = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    interrupt_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=100)
    ordinary(twin, x, y, nn.BCELoss(), other, 20)
    assert_trained_alike(model, twin, own, other)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("path", ["torch", "general"])
def test_an_interrupt_waits_for_its_chunk(path, monkeypatch):
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(10))
    model, twin, x, y = twins("tanh")
    own, other = (torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m in (model, twin))
    calls = []

    def press(*_):
        calls.append(1)
        if len(calls) == (2 if path == "torch" else 13):
            os.kill(os.getpid(), signal.SIGINT)

    criterion = nn.BCELoss()
    if path == "torch":
        run = TorchLoop.run
        monkeypatch.setattr(TorchLoop, "run", lambda *arguments: (press(), run(*arguments)))
    else:
        criterion.register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt):
        fit(model, x, y, criterion=criterion, optimizer=own, steps=100)
    ordinary(twin, x, y, nn.BCELoss(), other, 20)
    assert_trained_alike(model, twin, own, other)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_comes_through():
    with pacing.Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.pending
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_at_the_very_end_is_not_lost(monkeypatch):
    finish = validation.Watch.finish
    monkeypatch.setattr(validation.Watch, "finish", lambda watch: (finish(watch), os.kill(os.getpid(), signal.SIGINT)))
    model, x, y = make_net("tanh")
    with pytest.raises(KeyboardInterrupt) as interrupt:
        fit(model, x, y, criterion=nn.BCELoss(), optimizer=sgd(model), steps=7)
    assert interrupt.value.history.steps_taken == 7


@pytest.mark.usefixtures("interruptible")
def test_a_handler_that_a_checkpoint_sets_stays():
    model, x, y = make_net("tanh")
    own = lambda *_: None  # noqa: E731
    options = {"criterion": nn.BCELoss(), "optimizer": sgd(model), "steps": 3}
    fit(model, x, y, checkpoint=lambda _: signal.signal(signal.SIGINT, own), **options)
    assert signal.getsignal(signal.SIGINT) is own


def test_losses_that_are_not_finite_are_reported():
    model, x, y = make((4, 6, 3), "identity", "identity", True, 7, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    history = fit(model, x, y, criterion=nn.MSELoss(), optimizer=optimizer, steps=60, log_every=1)
    assert (history.path, len(history.loss)) == ("torch", 60)
    assert math.isfinite(history.loss[0])
    assert history.loss.isinf().any()
    assert history.loss[-1].isnan()


# --- the general path ------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def absolute(p, t):
    return (p - t).abs().mean()


def frozen(model):
    model[0].weight.requires_grad_(False)
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def two_groups(model):
    first, *rest = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest}], lr=0.5)


def hooked_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def own_zero_grad(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.zero_grad = lambda: torch.optim.SGD.zero_grad(optimizer)
    return optimizer


def tied_state(model):
    """Momentum buffers of equal shapes in the same memory, as a careless checkpoint may have them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    shared = torch.zeros(16)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = shared[: p.numel()].view(p.shape)
    return optimizer


def half_of_a_state(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    first = next(model.parameters())
    optimizer.state[first]["momentum_buffer"] = torch.ones_like(first)
    return optimizer


def hook(model):
    model[0].register_forward_hook(lambda *_: None)
    return model


def tied():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Sigmoid(), layer, nn.Sigmoid())


def sharing(place):
    """A network of which place(numbers) puts some parameters where others are."""
    model = MLP([3, 4, 4, 3], "tanh", "sigmoid", dtype=torch.float64)
    for name, numbers in place(0.5 * torch.randn(28, dtype=torch.float64)).items():
        layer, kind = name.split()
        setattr(model[int(layer)], kind, nn.Parameter(numbers))
    return model


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Sigmoid())


def one_bias_for_all():
    model = plain()
    model[0].bias = nn.Parameter(torch.full((1,), 0.5))
    return model


def pruned():
    """Two of four hidden units are left, and nobody has told the modules."""
    model = plain()
    model[0].weight, model[0].bias = nn.Parameter(model[0].weight[:2]), nn.Parameter(model[0].bias[:2])
    model[2].weight = nn.Parameter(model[2].weight[:, :2])
    return model


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5)


def plain():
    return MLP([3, 4, 3])


def some_data(model):
    dtype = next(model.parameters()).dtype
    return torch.randn(5, 3).to(dtype), torch.rand(5, 3).to(dtype)


# What is trained by the ordinary loop: for its model, its optimizer or its data; (model, optimizer, criterion, data).
OTHER_MODELS = {
    "dropout": lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Sigmoid()),
    "subclass": lambda: nn.Sequential(Doubled(3, 3), nn.Sigmoid()),
    "two-activations": lambda: nn.Sequential(*sequential((3, 3), "tanh"), *sequential((3, 3, 3), "relu", "sigmoid")),
    "twice-activated": lambda: nn.Sequential(LinearSigmoid(3, 3), nn.Sigmoid()),
    "some-biases": lambda: nn.Sequential(*sequential((3, 3), bias=False), *sequential((3, 3))),
    "hook": lambda: hook(plain()),
    "tied": tied,
    "overlapping": lambda: sharing(lambda t: {"0 weight": t[:12].view(4, 3), "2 weight": t[8:24].view(4, 4)}),
    "bias-in-a-weight": lambda: sharing(lambda t: {"2 weight": (w := t[:16].view(4, 4)), "0 bias": w[:, 2]}),
    "overlapping-columns": lambda: sharing(
        lambda t: {"0 weight": t[:24].view(4, 6)[:, :3], "2 weight": t[:24].view(4, 6)[:, 2:]}
    ),
    "sliding-windows": lambda: sharing(lambda t: {"2 weight": t[:7].unfold(0, 4, 1)}),
    "parametrized": parametrized,
    "one-bias-for-all": one_bias_for_all,
    "pruned": pruned,
}
OTHER_OPTIMIZERS = {
    "frozen": frozen,
    "two-groups": two_groups,
    "hooked-optimizer": hooked_optimizer,
    "own-zero-grad": own_zero_grad,
    "tied-state": tied_state,
    "half-of-a-state": half_of_a_state,
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.1, amsgrad=True),
    "maximize": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, maximize=True),
    "centered": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.1, centered=True),
}
OTHER_DATA = {
    "more-dimensions": lambda m: (torch.randn(5, 2, 3), torch.rand(5, 2, 3)),
    # They change with it.
    "in-a-parameter": lambda m: (m[0].weight.detach(), torch.rand(4, 3)),
}
GENERAL = {
    **{name: (build, sgd, nn.BCELoss()) for name, build in OTHER_MODELS.items()},
    **{name: (plain, optimizer, nn.BCELoss()) for name, optimizer in OTHER_OPTIMIZERS.items()},
    **{name: (plain, sgd, nn.BCELoss(), data) for name, data in OTHER_DATA.items()},
    "own-module": (lambda: nn.ModuleList([nn.Linear(3, 3)])[0], sgd, nn.MSELoss()),
    "bfloat16": (lambda: plain().bfloat16(), sgd, nn.MSELoss()),
    "own-criterion": (plain, sgd, absolute),
    "logits-of-a-sigmoid": (plain, sgd, nn.BCEWithLogitsLoss()),
}


@pytest.mark.parametrize("batch_size", [None, 2], ids=["full", "minibatches"])
@pytest.mark.parametrize("case", GENERAL)
def test_everything_else_takes_the_ordinary_loop(case, batch_size):
    build, make_optimizer, criterion, data = (*GENERAL[case], some_data)[:4]
    results = []
    for train in (fit, ordinary):
        torch.manual_seed(4)
        model = build()
        x, y = data(model)
        before = values(model)
        optimizer = make_optimizer(model)
        common = {"steps": 8, "batch_size": batch_size, "log_every": 3, "generator": torch.Generator().manual_seed(1)}
        if train is fit:
            history = fit(model, x, y, criterion=criterion, optimizer=optimizer, **common)
            assert (history.path, history.steps) == ("general", [0, 3, 6])
            losses = history.loss.double()
        else:
            losses = ordinary(model, x, y, criterion, optimizer, **common)
        results.append([losses, *values(model), *state_of(optimizer)[1]])
        assert relative(values(model), before) > 1e-3
        assert all(p.grad is None for p in model.parameters())
    # The same operations: the same bits.
    assert same_bits(*results)


def test_parameters_that_share_one_number_fail_as_in_an_ordinary_loop():
    model = sharing(lambda t: {"2 bias": t[:1].expand(4)})
    before = values(model)
    x, y = some_data(model)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory"):
        fit(model, x, y, criterion=nn.BCELoss(), optimizer=sgd(model), steps=1)
    with pytest.raises(NotImplementedError, match="parameters share memory"):
        fit(model, x, y, criterion=nn.MSELoss(), optimizer=sgd(model), steps=1, impl="torch")
    assert torch.equal(values(model)[-1], before[-1])


def inference_state(p):
    with torch.inference_mode():
        return torch.zeros_like(p)


@pytest.mark.parametrize(
    "state", [inference_state, lambda p: torch.zeros(1).expand(p.shape)], ids=["inference", "expanded"]
)
def test_a_state_that_cannot_be_written_fails_as_in_an_ordinary_loop(state):
    model = plain()
    before, (x, y) = values(model), some_data(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = state(p)
    with pytest.raises(RuntimeError, match=r"inference tensor|single memory location"):
        fit(model, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=3)
    assert same_bits(values(model), before)


def test_optimizers_that_step_in_the_backward_pass_do():
    model, x, y = make_net("tanh", torch.float32)
    optim = pytest.importorskip("torch.distributed.optim", reason="needs a torch with torch.distributed")
    optim._apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.5})
    before = values(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert fit(model, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=3).path == "general"
    assert relative(values(model), before) > 1e-3


def test_anomalies_are_found_as_in_an_ordinary_loop():
    model, x, y = make_net("tanh")
    with torch.no_grad():
        next(model.parameters())[0] = torch.nan
    with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="returned nan values"):
        fit(model, x, y, criterion=nn.MSELoss(), optimizer=sgd(model), steps=1)


def test_lbfgs_gets_its_closure():
    model, x, y = make_net("tanh")
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, line_search_fn="strong_wolfe")
    history = fit(model, x, y, criterion=nn.MSELoss(), optimizer=optimizer, steps=5, log_every=1)
    assert history.path == "general"
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert (history.loss.diff() <= 0).all()


def test_autocast_takes_the_ordinary_loop():
    model, x, y = make_net("tanh", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        history = fit(model, x, y, criterion=nn.MSELoss(), optimizer=sgd(model), steps=1)
    assert history.path == "general"


@pytest.mark.parametrize(
    ("criterion", "dtype"),
    [(nn.MSELoss(), torch.float64), (nn.MSELoss(), torch.int64), (nn.BCEWithLogitsLoss(), torch.float64)],
    ids=str,
)
def test_targets_of_another_dtype_take_the_ordinary_loop(criterion, dtype):
    model, twin, x, _ = twins("tanh", torch.float32)
    y = torch.tensor([[0, 1, 1]] * len(x), dtype=dtype)
    refused = contextlib.nullcontext()
    try:
        ordinary(twin, x, y, criterion, sgd(twin), 4)
    except RuntimeError as error:
        # MSELoss of torch 2.11: fit says what torch says, and leaves the model as it was.
        refused = pytest.raises(RuntimeError, match=f"^{re.escape(str(error))}$")
    with refused:
        assert fit(model, x, y, criterion=criterion, optimizer=sgd(model), steps=4).path == "general"
    assert relative(model.parameters(), twin.parameters()) == 0


# name: parameters that lie woven into each other, or close to each other, but apart
APART = {
    "neighbours": lambda t: {"0 weight": t[:12].view(4, 3), "2 weight": t[12:28].view(4, 4)},
    "columns-of-one-matrix": lambda t: {"0 weight": t.view(4, 7)[:, :3], "2 weight": t.view(4, 7)[:, 3:]},
    "every-other": lambda t: {"0 bias": t[:8:2], "2 bias": t[1:8:2]},
    "transposed": lambda t: {"2 weight": t[:16].view(4, 4).t()},
    "odd-columns": lambda t: {"2 weight": t.view(4, 7)[:, ::2], "0 bias": t.view(4, 7)[:, 1]},
}
FUSIBLE = {
    "sequential": lambda: nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3), nn.Sigmoid()),
    "slice": lambda: MLP([3, 4, 3, 9])[:4],
    "mixed": lambda: nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Sigmoid(), LinearSigmoid(4, 3)),
    "one-layer": lambda: nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()),
    "no-hidden-activation": lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Sigmoid()),
    "in-place-relu": lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3), nn.Sigmoid()),
    **{name: functools.partial(sharing, place) for name, place in APART.items()},
}


@pytest.mark.parametrize("case", FUSIBLE)
def test_networks_of_layers_and_activations_take_the_fast_loop(case):
    model = FUSIBLE[case]().double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    assert fit(model, x, y, criterion=nn.BCELoss(), optimizer=sgd(model), steps=9).path == "torch"
    ordinary(twin, x, y, nn.BCELoss(), sgd(twin), 9)
    assert relative(model.parameters(), twin.parameters()) <= EXACT


# --- errors at the door ----------------------------------------------------------------------------------------


def arguments(**changes):
    model = MLP([3, 4, 2])
    given = {
        "model": model,
        "x": torch.randn(5, 3),
        "y": torch.rand(5, 2),
        "criterion": nn.BCELoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5),
        "steps": 3,
    }
    return given | changes


def bad(error, message, **changes):
    return changes, error, message


BAD = {
    "model": bad(TypeError, r"^model must be of type Module, not int$", model=3),
    "x": bad(TypeError, r"^x must be of type Tensor, not list$", x=[[1.0]]),
    "y": bad(TypeError, r"^y must be of type Tensor, not NoneType$", y=None),
    "criterion": bad(TypeError, r"^criterion must be callable, not str$", criterion="bce"),
    "optimizer": bad(TypeError, r"^optimizer must be of type Optimizer, not str$", optimizer="sgd"),
    "generator": bad(TypeError, r"^generator must be of type Generator, not int$", generator=3),
    "steps": bad(ValueError, r"^steps must be at least 0, not -1$", steps=-1),
    "steps-type": bad(TypeError, r"^steps must be an int, not 2.0$", steps=2.0),
    "log_every": bad(ValueError, r"^log_every must be at least 0, not -2$", log_every=-2),
    "batch_size": bad(ValueError, r"^batch_size must be at least 1, not 0$", batch_size=0),
    "batch_size-type": bad(TypeError, r"^batch_size must be an int, not True$", batch_size=True),
    "impl": bad(ValueError, r"^impl must be one of None, 'lane', 'block', .*, 'native', 'torch', not 'f", impl="fast"),
    "samples": bad(ValueError, r"^x \(5, 3\) and y \(4, 2\) differ in their number of samples$", y=torch.rand(4, 2)),
    "no-samples": bad(ValueError, r"^x \(0, 3\) holds no samples$", x=torch.rand(0, 3), y=torch.rand(0, 2)),
    "width": bad(ValueError, r"^x \(5, 4\) is not \(5, 3\)$", x=torch.rand(5, 4)),
    "target": bad(ValueError, r"^y \(5,\) is not \(5, 2\)$", y=torch.rand(5)),
    "target-broadcasts": bad(ValueError, r"^y \(5, 1\) is not \(5, 2\)$", y=torch.rand(5, 1), criterion=nn.MSELoss()),
    "dtype": bad(ValueError, r"^x is torch.float64, but the model's parameters torch.fl", x=torch.rand(5, 3).double()),
    "target-dtype": bad(
        ValueError, r"^y is torch.float64, but the model's parameters torch.fl", y=torch.rand(5, 2).double()
    ),
    "device": bad(ValueError, r"^y is on meta, but the model on cpu$", y=torch.rand(5, 2, device="meta")),
    "range": bad(ValueError, r"^y must lie in \[0, 1\] for BCELoss, not in \[1.5, 1.5\]$", y=torch.full((5, 2), 1.5)),
    "foreign": bad(
        ValueError,
        r"^optimizer holds a parameter \(7,\) that is none of the model's 4$",
        optimizer=torch.optim.SGD([nn.Parameter(torch.ones(7))], lr=1),
    ),
    "lr": bad(ValueError, r"^lr \(2,\) is not a schedule \(\d+, 1\), which .* a MLP$", lr=torch.ones(2)),
    "lr-type": bad(TypeError, r"^lr must be a Tensor or a function of the step, not float$", lr=0.1),
    "lane": bad(NotImplementedError, r"^impl='lane': ", impl="lane"),
    "block": bad(NotImplementedError, r"^impl='block': ", impl="block"),
    "graph": bad(NotImplementedError, r"^impl='graph': cpu: only a CUDA device", impl="graph"),
    "criterion-returns": bad(TypeError, r"^criterion must return a tensor .* not float$", criterion=lambda p, t: 0.0),
    "criterion-shape": bad(
        ValueError, r"one number, not one of shape \(5, 2\)$", criterion=nn.BCELoss(reduction="none")
    ),
    "general-torch": bad(NotImplementedError, r"^impl='torch': the criterion is a", criterion=absolute, impl="torch"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument_and_leave_the_model(case):
    if case in ("lane", "block") and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        pytest.skip("the interpreter runs these on the CPU")
    changes, error, message = BAD[case]
    given = arguments(**changes)
    trained = given["model"] if isinstance(given["model"], nn.Module) else MLP([3, 4, 2])
    before = values(trained)
    with pytest.raises(error, match=message):
        fit(**given)
    assert same_bits(values(trained), before)
    assert not getattr(given["optimizer"], "state", None)


def test_impl_torch_is_obeyed():
    assert fit(**arguments(impl="torch")).path == "torch"


@pytest.mark.parametrize("optimizer", ["sgd", *STATEFUL])
@pytest.mark.parametrize("batch_size", [None, 4], ids=["full", "minibatches"])
def test_the_size_of_a_compiled_chunk_changes_no_bit(optimizer, batch_size, monkeypatch):
    pytest.importorskip("numba", reason="numba is not installed")
    results = []
    for sizes in ((1,), (2, 3, 1), (50,)):
        monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks_of(*sizes))
        model, x, y = make((3, 7, 5, 2), "sigmoid", "sigmoid", True, 10, torch.float32)
        own = OPTIMIZERS[optimizer](model.parameters())
        options = {"batch_size": batch_size, "log_every": 7, "generator": torch.Generator().manual_seed(2)}
        history = fit(model, x, y, criterion=nn.BCELoss(), optimizer=own, steps=50, impl="native", **options)
        results.append([*values(model), history.loss, *state_of(own)[1]])
    for other in results[1:]:
        assert same_bits(results[0], other)


def test_a_run_that_makes_up_for_their_start_takes_compiled_loops(monkeypatch):
    pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setattr("perceptriton.kernels.native.ready.seconds", lambda _: (0.01, 0.01, 0.01))
    given = arguments(steps=3000)
    history = fit(**given)
    assert history.path == "native"
    assert 0 < history.setup_seconds < history.seconds
    history = fit(**given | {"steps": 30})
    assert (history.path, history.setup_seconds) == ("torch", 0)


# --- progress --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "progress", "seconds_per_chunk", "shown"),
    [(True, True, 0.01, True), (True, False, 0.01, False), (True, False, 0.5, True), (False, True, 0.5, False)],
    ids=["asked", "not-asked", "waited", "no-terminal"],
)
def test_progress(terminal, progress, seconds_per_chunk, shown, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **options):
            self.n, self.total, self.closed = options["initial"], options["total"], False
            bars.append(self)

        def update(self, n):
            self.n += n

        def close(self):
            self.closed = True

    now = [0.0]

    def chunks(start, steps, every, most):
        for start in range(0, steps, 10):
            now[0] += seconds_per_chunk
            yield start, 10

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: terminal))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("perceptriton.mlp.training.run.chunks", chunks)
    fit(**arguments(steps=100, progress=progress))
    assert len(bars) == shown
    assert all((bar.n, bar.total, bar.closed) == (100, 100, True) for bar in bars)


def test_a_model_that_draws_numbers_finds_them_in_the_same_order_whatever_the_chunk(monkeypatch):
    results = []
    for chunks in ([(0, 6)], [(step, 1) for step in range(6)], [(0, 1), (1, 5)]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(4, 1))
        x, y = torch.randn(8, 3), torch.rand(8, 1)
        monkeypatch.setattr("perceptriton.mlp.training.run.chunks", lambda *_, chunks=chunks: iter(chunks))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        fit(model, x, y, criterion=nn.MSELoss(), optimizer=optimizer, steps=6, batch_size=4)
        results.append([p.detach() for p in model.parameters()])
    for other in results[1:]:
        assert same_bits(other, results[0])


def test_progress_needs_no_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: True))
    fit(**arguments(progress=True))


def test_an_ensemble_is_no_sequential():
    with pytest.raises(Refused, match=r"^Ensemble is neither an MLP nor an nn.Sequential$"):
        as_network(Ensemble(2, [3, 2]))


def device_of(impl, request):
    """Where an implementation runs; skips where it cannot."""
    needs_numba(impl)
    return "cpu" if impl in ("torch", "native") else request.getfixturevalue("device")


NEGATIVE = [
    ("x", negated),
    ("x", conjugated),
    ("y", negated),
    ("y", conjugated),
    ("lr", negated),
    ("schedule", negated),
    ("parameters", conjugated),
]


@pytest.mark.parametrize(("operand", "layout"), NEGATIVE, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("impl", ["torch", "native", "lane", "block"])
def test_negative_views(impl, operand, layout, request):
    device = device_of(impl, request)
    results = []
    for negative in (False, True):
        ensemble = Ensemble(3, [2, 3, 1], generator=torch.Generator().manual_seed(1)).to(device)
        x, y = (t.to(device) for t in xor(torch.float32))
        lr = torch.tensor([0.2, 0.5, 0.9], device=device)
        if operand == "schedule":
            lr = lr * torch.tensor([[1.0], [0.5], [0.25]], device=device)
        if negative and operand == "parameters":
            for parameters in (ensemble.weights, ensemble.biases):
                for l, p in enumerate(parameters):
                    parameters[l] = nn.Parameter(layout(p.detach()))
        elif negative:
            named = (("x", x), ("y", y), (operand if operand == "schedule" else "lr", lr))
            x, y, lr = (layout(t) if name == operand else t for name, t in named)
        own = torch.optim.SGD(ensemble.parameters(), lr=1.0, momentum=0.9)
        options = {"steps": 3, "log_every": 2, "lr": lr, "impl": impl}
        history = fit(ensemble, x, y, criterion=nn.BCELoss(), optimizer=own, **options)
        results.append([*(p.detach().resolve_neg() for p in ensemble.parameters()), history.loss])
    assert same_bits(*results)


# --- the kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "native", "lane", "block"])
def test_infinite_targets_of_dead_outputs(impl, request):
    device = device_of(impl, request)
    results = []
    for path in (impl, "ordinary"):
        torch.manual_seed(0)
        model = MLP([3, 4, 2], "tanh", "relu")
        with torch.no_grad():
            model[2].bias[1] = -100.0
        x, y = torch.randn(5, 3), torch.rand(5, 2)
        y[:, 1] = torch.inf
        model.to(device)
        if path == "ordinary":
            ordinary(model, x.to(device), y.to(device), nn.MSELoss(), sgd(model), 3)
        else:
            data = {"criterion": nn.MSELoss(), "optimizer": sgd(model), "steps": 3, "impl": impl}
            assert fit(model, x.to(device), y.to(device), **data).path == impl
        results.append([p.detach().cpu() for p in model.parameters()])
    assert all(t.isfinite().all() for t in results[1])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


BCE, RATES = nn.BCELoss(), torch.tensor([0.02, 0.05, 0.1])


@pytest.mark.interpreter
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("optimizer", "batch_size"), [("sgd-decay", 3), ("dampening", None), ("adam", None), ("adamw", 3)]
)
@pytest.mark.parametrize(("impl", "programs"), [("lane", 1), ("block", 1), ("block", 2)])
def test_kernels_train_alike(impl, programs, optimizer, batch_size, device, monkeypatch):
    assert_kernels_train_alike(impl, programs, optimizer, batch_size, device, monkeypatch)


# numpy, under the interpreter, warns of columns that hold no sample.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.interpreter
@pytest.mark.gpu
@pytest.mark.parametrize("criterion", [BCE, nn.CrossEntropyLoss()], ids=["bce", "cross-entropy"])
@pytest.mark.parametrize(("impl", "programs"), [("lane", 1), ("block", 1), ("block", 2)])
def test_kernels_take_a_schedule(impl, programs, criterion, device, monkeypatch):
    def lr(step):
        return torch.tensor([0.02, 0.05, 0.1]) * 0.9**step

    assert_kernels_train_alike(impl, programs, "adamw", 3, device, monkeypatch, lr, criterion)


def assert_kernels_train_alike(impl, programs, optimizer, batch_size, device, monkeypatch, lr=RATES, criterion=BCE):
    planned = plan.train
    monkeypatch.setattr(plan, "train", lambda *a, **k: dataclasses.replace(planned(*a, **k), programs=programs))
    errors, results = [], []
    for path, dtype in (("torch", torch.float64), ("torch", torch.float32), (impl, torch.float32)):
        output = "sigmoid" if criterion is BCE else "identity"
        sizes = [2, 3, 1 if criterion is BCE else 2]
        ensemble = Ensemble(3, sizes, "sigmoid", output, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        x, y = xor(dtype)
        y = y if criterion is BCE else torch.cat([y, 1 - y], 1)
        own = OPTIMIZERS[optimizer](ensemble.parameters())
        options = {"batch_size": batch_size, "log_every": 2, "generator": torch.Generator().manual_seed(2)}
        options |= {"lr": lr, "impl": path}
        history = fit(ensemble, x.to(device), y.to(device), criterion=criterion, optimizer=own, steps=9, **options)
        assert history.path == path
        results.append([*ensemble.parameters(), history.loss, *state_of(own)[1]])
        errors.append(relative([t.cpu() for t in results[-1]], [t.cpu() for t in results[0]]))
    assert errors[2] <= 2 * errors[1] + 2e-6
