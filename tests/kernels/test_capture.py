# SPDX-License-Identifier: Apache-2.0
"""What a CUDA graph needs, as far as it can be shown without a GPU; `test_gpu.py` captures."""

import contextlib
import importlib.util
import types

import pytest
import torch
import torch.nn.functional as F
from cases import kernel_device, limit_eager_calls, make_layer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from perceptriton.kernels import Device, crossover, explain, ops, records, small
from perceptriton.mlp import MLP, functional, linear_act, mlp_act, mlp_sigmoid_bce, warmup

pytestmark = [pytest.mark.gpu, pytest.mark.hardware]
DEVICE = kernel_device()


# --- warming up ---------------------------------------------------------------------------------------------------


def test_warmup_runs_both_directions_and_leaves_gradients_alone():
    model, x = MLP([4, 8, 2]), torch.randn(3, 4)
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    seen = []

    def watch(module, args, y):
        y.register_hook(lambda dy: seen.append(dy.stride()))

    model[3].register_forward_hook(watch)
    with torch.no_grad():
        warmup(lambda x: model(x).sum(), x)
    # The strides are those that the gradient of a sum has.
    assert seen == [(0, 0)]
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))


def test_warmup_without_gradients():
    calls = []
    warmup(lambda x: calls.append(x) or 2 * x, torch.ones(2))
    assert len(calls) == 1


class Streams:
    """torch.cuda with two devices, each with a default stream; `now` is the current stream of each."""

    def __init__(self, monkeypatch, current=0):
        self.now, self.current, self.waits = ["default 0", "default 1"], current, []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: self.make(f"default {device}"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.make(self.now[device]))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.make(f"side {device}"))
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "device", self.device)

    def make(self, name):
        streams = self

        class Stream(str):
            def wait_stream(self, other):
                streams.waits.append((str(self), str(other)))

        return Stream(name)

    @contextlib.contextmanager
    def stream(self, stream):
        device = int(stream[-1])
        before, self.now[device] = self.now[device], stream
        try:
            with self.device(device):
                yield
        finally:
            self.now[device] = before

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before


def on_cuda(*devices):
    """Tensors of GPUs that are not there."""
    with FakeTensorMode():
        return [torch.empty(2, device=f"cuda:{device}") for device in devices]


# Devices of the inputs and of a module's parameters -> the streams during the call
SIDES = {
    "current": ((0,), None, ["side 0", "default 1"]),
    "other": ((1,), None, ["default 0", "side 1"]),
    "both": ((0, 1), None, ["side 0", "side 1"]),
    "none": ((), None, ["side 0", "default 1"]),
    "parameters": ((), 1, ["default 0", "side 1"]),
}


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize(("devices", "held", "during"), SIDES.values(), ids=SIDES)
def test_warmup_keeps_off_the_default_stream_of_the_device_it_warms(devices, held, during, current, monkeypatch):
    inputs, seen = on_cuda(*devices), []
    streams = Streams(monkeypatch, current)

    class Watch(nn.Module):
        def forward(self, *_):
            seen.append(([str(name) for name in streams.now], streams.current))
            return torch.ones(())

    function = Watch()
    if held is not None:
        function.register_parameter("p", nn.Parameter(*on_cuda(held)))
    if not devices and held is None and current == 1:
        during = ["default 0", "side 1"]
    warmup(function, *inputs)
    assert seen == [(during, current)]
    assert (streams.now, streams.current) == (["default 0", "default 1"], current)
    # The side stream starts after what was there, and what comes later starts after it.
    sides = [(name, f"default {name[-1]}") for name in during if name.startswith("side")]
    assert sorted(streams.waits) == sorted([*sides, *(pair[::-1] for pair in sides)])


def test_warmup_stays_on_a_stream_of_the_callers_own(monkeypatch):
    inputs, seen = on_cuda(1), []
    streams = Streams(monkeypatch)
    streams.now[1] = "mine 1"
    warmup(lambda x: seen.append(list(streams.now)) or torch.ones(()), *inputs)
    assert seen == [["default 0", "mine 1"]]
    assert not streams.waits


def test_warmup_that_fails_leaves_the_streams_as_they_were(monkeypatch):
    streams = Streams(monkeypatch)
    with pytest.raises(TypeError, match=r"^function must return a Tensor, not tuple$"):
        warmup(lambda: (torch.ones(2),) * 2)
    assert streams.waits == [("side 0", "default 0"), ("default 0", "side 0")]
    assert streams.now == ["default 0", "default 1"]


# --- calls that are too small to wait for ---------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_small_eager_calls_are_launch_bound(monkeypatch, training):
    streams = {0: 0, 1: 0x7F}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.get, raising=False)
    monkeypatch.setattr(small, "describe", lambda device: Device("cuda", 90, 132, triton=True))
    limit_eager_calls(monkeypatch, 1000, 3000)
    limit = 500 * (1 + 2 * training) // 4

    def x(elements, device=0, kind="cuda", dtype=torch.float32):
        place = torch.device(kind, device)
        own = {"is_cpu": False, "is_cuda": kind == "cuda", "device": place, "get_device": lambda: device}
        return types.SimpleNamespace(numel=lambda: elements, dtype=dtype, **own)

    with torch.set_grad_enabled(training):
        assert small.prefers_torch(x(limit - 1), (64, 64))
        assert not small.prefers_torch(x(limit), (64, 64))
        assert not small.prefers_torch(x(limit - 1, device=1), (64, 64)), "where graphs are captured"
        assert not small.prefers_torch(x(limit - 1, kind="mps"), (64, 64))
        # What the kernels do not take, torch has at every size, without a search for the reason.
        assert small.prefers_torch(x(1 << 40, dtype=torch.float64), (64, 64))
        monkeypatch.setattr(small, "describe", lambda device: Device("cuda", 75, 40, triton=True))
        assert small.prefers_torch(x(1 << 40), (64, 64))


@pytest.mark.parametrize("widths", [(0, 0), (0, 0, 0), (0, 5)])
def test_layers_without_features_are_small(widths, monkeypatch):
    monkeypatch.setattr(small, "describe", lambda device: Device("cuda", 90, 132, triton=True))
    limit_eager_calls(monkeypatch, 1000, 3000)
    for autocast in (False, True):
        assert small.few_on_gpu(widths, torch.float32, False, torch.device("cuda", 0), autocast) > 0


def test_bytes_are_those_of_the_average_layer():
    assert crossover.layer_bytes(10, (64, 64)) == 20
    assert crossover.layer_bytes(10, (8, 24)) == 40
    assert crossover.layer_bytes(10, (8, 24, 8)) == 40
    assert crossover.layer_bytes(10, (10, 20, 30)) == 40
    assert crossover.layer_bytes(10, (0, 3)) == 30


def test_launch_bound_calls_take_plain_torch(monkeypatch):
    monkeypatch.setattr(small, "prefers_torch", lambda x, widths: True)

    def planned(*_, **__):
        raise AssertionError("went on to the kernels")

    monkeypatch.setattr(functional.layer, "_planned", planned)
    monkeypatch.setattr("perceptriton.mlp.chains.mlp_act", planned)
    # Tensors that are neither on a CPU nor here at all.
    x, weight = torch.empty(3, 8, device="meta"), torch.empty(4, 8, device="meta")
    assert linear_act(x, weight).shape == (3, 4)
    model = MLP([8, 5, 4], device="meta")
    assert model(x).shape == (3, 4)
    with pytest.raises(AssertionError, match="kernels"):
        linear_act(x, weight, impl="triton")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_networks_too_small_for_a_plan_take_plain_torch(monkeypatch, device):
    model, x, target = MLP([8, 5, 4], device=device), torch.randn(3, 8, device=device), torch.rand(3, 4, device=device)
    weights, biases = [layer.weight for layer in model[::2]], [layer.bias for layer in model[::2]]
    z = F.linear(torch.sigmoid(F.linear(x, weights[0], biases[0])), weights[1], biases[1])
    # The meta device stands for a GPU; a CPU is asked for multiply-adds instead.
    if device == "meta":
        monkeypatch.setattr(small, "prefers_torch", lambda x, widths: widths == (8, 5, 4))

    def planned(*_, **__):
        raise AssertionError("asked for a plan")

    monkeypatch.setattr(ops, "mlp_plans", planned)
    loss = F.binary_cross_entropy_with_logits(z, target)
    results = mlp_act(x, weights, biases), mlp_sigmoid_bce(x, weights, biases, target)
    for result, expected in zip(results, (torch.sigmoid(z), loss), strict=True):
        assert result.shape == expected.shape
        assert device == "meta" or torch.equal(result, expected)
    with pytest.raises(ValueError, match=r"biases holds 1 Tensors, but weights 2"):
        mlp_act(x, weights, biases[:1])
    with pytest.raises(AssertionError, match="plan"):
        mlp_act(torch.zeros(3, 8), [torch.zeros(5, 8), torch.zeros(4, 5)], impl="torch")


@pytest.mark.parametrize("tiny", [True, False])
def test_a_cold_capture_of_a_small_call_takes_plain_torch(monkeypatch, force, tiny):
    """Warmed up on the default stream, it has met no kernel; torch.nn would be captured."""
    explicit = records.Plan("explicit", "the test says so")
    force(explicit, explicit)

    def cold(*_):
        raise records.NotCompiledError("not compiled yet")

    monkeypatch.setattr(ops, "linear_act_fwd", cold)
    monkeypatch.setattr(ops, "mlp_fwd", cold)
    monkeypatch.setattr(small, "is_small", lambda *_: tiny)
    x, weight, bias, _ = make_layer(12, 8, 8, torch.float32)
    y = torch.sigmoid(F.linear(x, weight, bias))
    calls = (lambda: linear_act(x, weight, bias), lambda: mlp_act(x, [weight, weight], [bias, bias]))
    for call, expected in zip(calls, (y, torch.sigmoid(F.linear(y, weight, bias))), strict=True):
        if tiny:
            torch.testing.assert_close(call(), expected)
        else:
            with pytest.raises(records.NotCompiledError):
                call()
    with pytest.raises((records.NotCompiledError, NotImplementedError)):
        linear_act(x, weight, bias, impl="torch")


def test_explanations_say_what_eager_calls_take(monkeypatch):
    chip = Device("cuda", 90, 132, triton=True)
    # Three shapes of a layer of the library's product, which at 2^20 and 6 * 2^20 bytes of x and y is worth its calls.
    limit_eager_calls(monkeypatch, 1 << 20, 6 << 20)
    tiny, middle, large = (explain((rows, 512), (512, 512), device=chip) for rows in (64, 1024, 1 << 14))
    assert "eager calls on the default stream take plain torch: launch-bound" in tiny.forward.reason
    assert tiny.forward.reason.endswith("below 6 MiB of x and y per layer, uncalibrated")
    assert "eager calls with gradients on the default stream" in middle.forward.reason
    assert "eager calls on the default stream" in middle.backward.reason
    assert all(own.reason.endswith("; eager calls launch it, uncalibrated") for own in large)
    limit_eager_calls(monkeypatch, 0, 0)
    everywhere = explain((64, 64), [(64, 64)] * 2, device=chip)
    assert all(own.reason.endswith("; eager calls launch it at every size, uncalibrated") for own in everywhere)
    asked = explain((64, 64), [(64, 64)] * 2, device=chip, impl="triton")
    assert not any("eager" in own.reason for own in asked)


# --- captures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def layer():
    if DEVICE == "cpu":
        pytest.skip("the interpreter compiles nothing")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    from perceptriton.kernels.gpu import layer

    return layer


@pytest.fixture
def h200(layer, absent_h200, monkeypatch):
    """Tensors on a CPU are launched as if they were on a chip that is not there."""
    monkeypatch.setattr(torch.cuda, "device", lambda place: contextlib.nullcontext())
    from perceptriton.kernels.gpu import launch

    current = launch.device_of
    monkeypatch.setattr(launch, "device_of", lambda _: current(torch.device("cuda", 0)))
    yield
    layer.linear_act_fwd_rows_kernel.device_caches.clear()


def test_a_cold_kernel_is_not_compiled_while_a_graph_is_captured(layer, h200, monkeypatch):
    from triton.runtime import JITFunction

    from perceptriton.kernels import Plan, Tile
    from perceptriton.kernels.gpu import launch

    compiled = []
    monkeypatch.setattr(JITFunction, "_do_compile", JITFunction._do_compile)  # restored at the end, whatever happens
    monkeypatch.setattr(launch, "_compile", lambda kernel, *_: compiled.append(kernel.__name__))
    x, weight, bias, _ = make_layer(16, 16, 16, torch.float32)
    plan = Plan("rows", "the test says so", Tile(16, 16, 16, 4, 1), 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^linear_act_fwd_rows_kernel is not compiled yet.*captured.*warmup$"):
        layer.linear_act_fwd(x, weight, bias, "sigmoid", plan)
    assert not compiled
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # Another thread, which captures nothing, may come by while the first one does.
    launch._refuse_to_compile(layer.linear_act_fwd_rows_kernel)
    # Of two captures the first to end leaves the other one its guard.
    with launch._captured(torch.device("cuda", 0)):
        with launch._captured(torch.device("cuda", 0)):
            pass
        assert JITFunction._do_compile is launch._refuse_to_compile
    assert JITFunction._do_compile is launch._compile
    # The capture is over.
    monkeypatch.setattr(launch, "device_of", lambda _: contextlib.nullcontext())
    layer.linear_act_fwd(x, weight, bias, "sigmoid", plan)
    assert compiled == ["linear_act_fwd_rows_kernel"] * 2
