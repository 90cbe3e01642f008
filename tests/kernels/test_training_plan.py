# SPDX-License-Identifier: Apache-2.0
"""Plans for whole training loops: which kernel, which tile, and why not."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_cases import RECIPES, make, states_of, torch_optimizer

from perceptriton.kernels import Device
from perceptriton.kernels import plan as planning
from perceptriton.kernels.loop import TorchLoop
from perceptriton.kernels.plan import train, train_gpu, train_prices
from perceptriton.kernels.records import EMPTY, LoopPlan, TrainConfig, TrainPlan

H200 = Device("cuda", 90, 132, triton=True)
A100 = Device("cuda", 80, 108, triton=True)
RTX_4090 = Device("cuda", 89, 128, triton=True)
RTX_5090 = Device("cuda", 120, 170, triton=True)
CPU = Device("cpu", 90, 1, "AMD")
INTERPRETER = dataclasses.replace(CPU, triton=True)
ADAM = {"optimizer": "adam"}


def plan(widths, members=1, samples=4, batch_size=4, device=H200, dtype="float32", impl=None, **options):
    return train(members, samples, batch_size, TrainConfig(widths, **options), dtype, device, impl)


@pytest.mark.parametrize(
    "device", [H200, A100, RTX_4090, RTX_5090, INTERPRETER], ids=lambda own: f"{own.kind}-{own.arch}"
)
@pytest.mark.parametrize(
    ("widths", "options", "impl"),
    [
        ((2, 2, 1), {}, "lane"),
        ((2, 2, 1), ADAM, "lane"),
        ((2, 10, 10, 10, 1), {}, "block"),
        ((2, 10, 10, 10, 1), ADAM, "block"),
        ((32, 64, 5), {}, "block"),
        ((32, 64, 5), ADAM, "block"),
        ((2, 64, 9, 9), {}, "block"),
        ((2, 64, 9, 9), ADAM, "torch"),
        ((2, 64, 64, 1), {}, "torch"),
        ((60, 60), {}, "block"),
        ((60, 60), ADAM, "torch"),
        ((64, 64, 64, 10), {}, "torch"),
        ((784, 32, 10), {}, "torch"),
    ],
    ids=str,
)
def test_which_loop(widths, options, impl, device):
    chosen = plan(widths, device=device, **options)
    # What no kernel takes, a GPU captures.
    assert chosen.impl == ("graph" if (impl, device.kind) == ("torch", "cuda") else impl)
    assert chosen.reason
    assert (chosen.rows > 0) == (impl != "torch")


def test_the_optimizer_s_state_takes_room():
    # 2-12-1 has 49 parameters.
    assert plan((2, 12, 1), impl="lane").impl == "lane"
    assert plan((2, 12, 1), impl="lane", momentum=0.9).impl == "torch"
    assert "49 parameters: a lane holds 17" in plan((2, 12, 1), impl="lane", **ADAM).reason
    # Without biases there are fewer.
    assert plan((2, 12, 1), impl="lane", bias=False, momentum=0.9).impl == "torch"
    assert plan((2, 11, 1), impl="lane", bias=False, momentum=0.9).impl == "lane"


def test_a_large_batch_of_one_network_takes_a_block_and_many_networks_take_lanes():
    sizes = {"samples": 1024, "batch_size": 256}
    assert plan((2, 4, 1), **sizes).impl == "block"
    assert plan((2, 4, 1), members=1 << 17, **sizes).impl == "lane"


def test_a_block_takes_as_many_samples_as_the_batch_has_and_as_fit_beside_the_weights():
    assert plan((2, 10, 10, 1)) == TrainPlan("block", plan((2, 10, 10, 1)).reason, 16, 1, 4)
    assert plan((2, 10, 10, 1), samples=64, batch_size=17).rows == 32
    # A batch is never larger than the samples there are.
    assert plan((2, 10, 10, 1), samples=9, batch_size=64).rows == 16
    assert plan((2, 10, 10, 1), samples=64, batch_size=None).rows == 32
    assert plan((32, 64, 5), samples=64, batch_size=64).rows == 16


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": CPU, "impl": "lane"}, "no kernels for the CPU"),
        ({"device": CPU, "impl": "torch"}, 'impl="torch"'),
        ({"device": dataclasses.replace(H200, triton=False)}, "its description says triton=False"),
        ({"device": Device("cuda", 75, 40, triton=True)}, "compute capability 7.5"),
        ({"device": Device("mps")}, "mps"),
        ({"dtype": "float64"}, "float64: whole loops take float32"),
        ({"dtype": "bfloat16"}, "bfloat16: whole loops take float32"),
        ({"samples": 0}, EMPTY),
        ({"members": 0}, EMPTY),
        ({"impl": "torch"}, 'impl="torch"'),
        ({**ADAM, "eps": 0.0}, "eps 0.0"),
    ],
    ids=str,
)
def test_reasons_for_no_kernel(options, reason):
    chosen = plan((2, 2, 1), **options)
    captured = options.get("device", H200).kind == "cuda" and reason not in (EMPTY, 'impl="torch"')
    assert chosen.impl == ("graph" if captured else "torch")
    assert reason in chosen.reason


def test_a_graph_is_had_on_a_gpu_only():
    assert plan((784, 32, 10), impl="graph").impl == plan((2, 2, 1), impl="graph").impl == "graph"
    refused = plan((784, 32, 10), impl="graph", device=CPU)
    assert (refused.impl, refused.reason) == ("torch", "cpu: only a CUDA device captures graphs")


def test_where_both_are_refused_both_reasons_are_given():
    reason = plan((2, 65, 1)).reason
    assert "a lane holds 49" in reason
    assert "a width of 65: blocks take 64" in reason


@pytest.mark.parametrize("impl", ["lane", "block"])
def test_what_is_asked_for_is_planned_or_refused(impl):
    assert plan((2, 2, 1), impl=impl).impl == impl
    refused = plan((2, 100, 1), impl=impl)
    assert refused.impl == "torch"
    assert {"lane": "parameters", "block": "width"}[impl] in refused.reason


# --- prices on a GPU ------------------------------------------------------------------------------------------------


def shapes(count):
    """(members, samples, batch_size, config, dtype, device), from a seed."""
    draw = random.Random(0)
    for _ in range(count):
        widths = tuple(round(2 ** draw.uniform(0, draw.choice((2, 4, 7, 11)))) for _ in range(draw.randint(2, 6)))
        loss, output = draw.choice((("bce", "sigmoid"), ("bce_logits", "identity"), ("mse", "tanh")))
        options = dict(draw.choice(list(RECIPES.values())))
        config = TrainConfig(widths, "sigmoid", output, draw.random() < 0.8, loss, **options)
        members = draw.choice((1, 1, round(10 ** draw.uniform(0, 5))))
        samples = round(2 ** draw.uniform(0, draw.choice((4, 20))))
        batch_size = draw.choice((None, round(2 ** draw.uniform(0, 14))))
        dtype = draw.choice(("float32",) * 4 + ("torch.float64",))
        named = draw.choice([peaks.device for peaks in planning.PEAKS.values()])
        yield members, samples, batch_size, config, dtype, draw.choice((H200, A100, named))


SHAPES = list(shapes(900))


def test_the_cheapest_way_is_taken_and_none_is_above_the_ordinary_loop():
    taken = set()
    for members, samples, batch_size, config, dtype, device in SHAPES:
        prices = train_prices(members, samples, batch_size, config, dtype, device)
        chosen = train(members, samples, batch_size, config, dtype, device)
        assert chosen.impl == min(prices, key=prices.__getitem__), (members, samples, batch_size, config)
        assert prices[chosen.impl] > 0
        assert set(prices) <= {"lane", "block", "graph", "ordinary loop"}
        assert all(f"{name} {us:.3g}" in chosen.reason for name, us in prices.items())
        for impl in ("lane", "block", "graph", "torch"):
            asked = train(members, samples, batch_size, config, dtype, device, impl)
            assert asked.impl == (impl if impl in prices else "torch")
            assert asked.reason
        taken.add((chosen.impl, device.arch, members > 1, batch_size is None))
    # All ways, on both chips, for one network and for many, in full batches and in minibatches.
    kinds = itertools.product((80, 90), (True, False), (True, False))
    assert taken >= {(impl, *kind) for impl in ("lane", "block", "graph") for kind in kinds}


@pytest.mark.parametrize("size", ["members", "samples", "batch_size"])
def test_more_to_do_costs_no_less(size):
    for shape in SHAPES[:100]:
        sizes = dict(zip(("members", "samples", "batch_size"), shape[:3], strict=True))
        if sizes["batch_size"] is None and size == "batch_size":
            continue
        sizes |= {"samples": 1 << 20} if size == "batch_size" else {}
        before = {}
        for value in (1, 2, 3, 7, 16, 17, 64, 1000, 33_792, 33_793, 1 << 18):
            prices = train_prices(**(sizes | {size: value}), config=shape[3], dtype=shape[4], device=shape[5])
            assert all(prices[name] >= us for name, us in before.items()), (shape, value)
            before = prices


@pytest.mark.parametrize(
    ("widths", "samples", "members", "impl", "programs"),
    [
        ((4, 16, 1), 32, 1, "block", 1),
        ((4, 16, 1), 256, 1, "block", 1),
        ((4, 16, 1), 4096, 1, "block", 64),
        ((4, 16, 1), 65_536, 1, "block", 128),
        ((32, 64, 5), 1024, 1, "block", 32),
        ((32, 64, 5), 1024, 1000, "graph", 1),
        ((32, 64, 5), 1 << 18, 1, "graph", 1),
        ((2, 2, 1), 1 << 20, 1, "graph", 1),
    ],
    ids=str,
)
def test_a_large_batch_of_one_network_is_no_work_for_one_multiprocessor(widths, samples, members, impl, programs):
    chosen = plan(widths, members, samples, None)
    assert (chosen.impl, chosen.programs) == (impl, programs)
    if programs > 1:
        assert f"{programs} programs" in chosen.reason
    # The interpreter, which runs one program after the other, has nothing to divide.
    assert plan(widths, members, samples, None, INTERPRETER).programs == 1


# Those of views, of torch's own profiling, and of Adam's count of steps, which stays on the CPU.
NOT_COUNTED = ("t", "view", "expand", "detach", "_local_scalar_dense", "lift_fresh")


class Counter(TorchDispatchMode):
    """How many calls of torch compute something, and how many numbers they read and write."""

    calls = numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        if space == "aten" and name not in NOT_COUNTED:
            self.calls += 1
            given = [value for name, value in (kwargs or {}).items() if name not in ("out", "grad_input")]
            tensors = [t for t in tree_leaves((args, given, out)) if isinstance(t, torch.Tensor)]
            # Of a broadcast tensor, each number once.
            self.numbers += sum(math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s) for t in tensors)
        return out


LOSSES = {"bce": "sigmoid", "bce_logits": "identity", "mse": "tanh"}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("members", "layout"), [(1, "joint"), (1, "matrices"), (3, "matrices"), (3, "arrays")])
def test_what_a_captured_step_is_said_to_do_is_what_it_does(members, layout, loss, recipe, monkeypatch):
    monkeypatch.setattr(planning, "train_loop", lambda *_: LoopPlan(layout, True, "the test says so"))
    config = TrainConfig((3, 5, 4, 2), output=LOSSES[loss], loss=loss, **RECIPES[recipe])
    parameters = [torch.rand(members, *s) for k, n in itertools.pairwise(config.widths) for s in ((n, k), (n,))]
    first, second = (parameters if len(states_of(config)) > i else () for i in range(2))
    data = torch.rand(1, 7, 3), torch.rand(1, 7, 2)
    loop = TorchLoop(config, parameters, first, second, torch.rand(members), *data, 7, 1, TrainPlan("graph", ""))
    loop.run(None, 0, 1, 0, torch.empty(0, members))
    (batch,) = loop.batches.values()
    with Counter() as counter, torch.inference_mode():
        for call in batch.calls:
            call()
    if layout == "arrays":
        work = train_gpu.arrays(members, 7, config, True)
    else:
        work = train_gpu.matrices(members, 7, config, True, layout == "joint")
    assert work.calls + work.products == counter.calls
    # Tensors of ones and corners that nobody reads are counted here and there.
    assert 0.85 * counter.numbers < work.numbers < 1.15 * counter.numbers


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_an_ordinary_step_is_said_to_do_is_no_more_than_it_does(loss, recipe):
    config = TrainConfig((3, 5, 4, 2), output=LOSSES[loss], loss=loss, **RECIPES[recipe])
    model, x, y = make(config.widths, config.hidden, config.output, True, 7, torch.float32)
    criterion = {"bce": nn.BCELoss(), "bce_logits": nn.BCEWithLogitsLoss(), "mse": nn.MSELoss()}[loss]
    optimizer = torch_optimizer(config, model.parameters(), 0.01, foreach=True)  # as it is by default on a GPU

    def step():
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    step()
    with Counter() as counter:
        step()
    work = train_gpu.ordinary_work(1, 7, True, config)
    assert 0.7 * counter.calls < work.calls + work.products <= counter.calls
