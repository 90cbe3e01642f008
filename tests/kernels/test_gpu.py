# SPDX-License-Identifier: Apache-2.0
"""What torch does with a GPU around a model: graphs, streams, devices, traces."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import kernel_device, limit_eager_calls, make_layer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from perceptriton.kernels import calls
from perceptriton.mlp import MLP, LinearSigmoid, linear_sigmoid, warmup

if kernel_device() != "cuda":
    pytest.skip("needs a GPU: the interpreter has no graphs, streams or devices", allow_module_level=True)

from triton.runtime import JITFunction

from perceptriton.kernels.gpu import layer as layers
from perceptriton.kernels.gpu import network

pytestmark = [pytest.mark.gpu, pytest.mark.hardware]
MODELS = {
    "layer": (lambda: LinearSigmoid(32, 16), 32),
    "network": (lambda: MLP([16, 32, 8], "tanh", "sigmoid"), 16),
    # wider than one kernel takes
    "wide": (lambda: MLP([256, 512, 256]), 256),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name, rows=64):
    build, features = MODELS[name]
    model = build().cuda()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model, torch.randn(rows, features, device="cuda")


def gradients(model, x):
    """y and every gradient of the parameters."""
    y = model(x)
    # Of y the values only: its graph would keep the nodes of the parameters, which remember the stream they began on.
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


# From 3.8 on triton unloads a kernel that nobody holds, which graphs may still replay and a device may still run.
forgotten = []


def forget_kernels():
    calls.forget()
    for kernel in (*vars(layers).values(), *vars(network).values()):
        if isinstance(kernel, JITFunction):
            forgotten.append(dict(kernel.device_caches))
            kernel.device_caches.clear()


@every_model
def test_capture_and_replay(name):
    model, x = make(name)
    # What only happens once per process: libraries set themselves up.
    gradients(copy.deepcopy(model), x)
    forget_kernels()
    warmup(lambda x: model(x).square().sum(), x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(model, x)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(found, gradients(model, x))


@every_model
def test_a_captured_training_step(name):
    model, x = make(name)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (model, twin)]

    def step(net, optimizer):
        optimizer.zero_grad(set_to_none=False)
        net(x).square().sum().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(model, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step(model, optimizers[0])
    step(twin, optimizers[1])
    for _ in range(4):
        x.copy_(torch.randn_like(x))
        graph.replay()
        step(twin, optimizers[1])
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


# So for any module: what was captured keeps the nodes of the parameters, on the stream of the capture.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
@every_model
def test_graphed_callables(name):
    model, x = make(name)
    expected = gradients(model, x)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (x.clone(),))
    torch.testing.assert_close(gradients(graphed, x), expected)


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_small_eager_calls_are_those_of_torch(name, training, monkeypatch):
    model, x = make(name)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]

    class Plain(nn.Module):
        def forward(self, x):
            for layer in layers:
                x = getattr(torch, layer.activation)(F.linear(x, layer.weight, layer.bias))
            return x

        parameters = model.parameters

    plain = Plain()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.set_grad_enabled(training), torch.cuda.stream(side):
        fused = gradients(model, x) if training else [model(x)]
    torch.cuda.current_stream().wait_stream(side)
    limit_eager_calls(monkeypatch, 1 << 25, 1 << 27)
    with torch.set_grad_enabled(training):
        eager, expected = (gradients(net, x) if training else [net(x)] for net in (model, plain))
    assert all(map(torch.equal, eager, expected))
    torch.testing.assert_close(fused, expected, rtol=1e-3, atol=1e-4)


def test_a_capture_after_a_warm_up_on_the_default_stream(monkeypatch):
    limit_eager_calls(monkeypatch, 1 << 25, 1 << 27)
    model, x = make("network")
    forget_kernels()
    expected = gradients(model, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(model, x)
    graph.replay()
    torch.testing.assert_close(found, expected)


# What a capture that was refused leaves behind.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("name", ["layer", "network"])
def test_a_cold_capture_says_what_to_do(name):
    model, x = make(name)
    expected = gradients(model, x)
    forget_kernels()
    cold = pytest.raises(RuntimeError, match=r"is not compiled yet.*perceptriton\.mlp\.warmup")
    with cold, torch.cuda.graph(torch.cuda.CUDAGraph()):
        gradients(model, x)
    # Nothing is spoiled.
    torch.cuda.synchronize()
    warmup(lambda x: model(x).square().sum(), x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(model, x)
    graph.replay()
    torch.testing.assert_close(found, expected)


# The compiler itself uses what torch deprecates.
@pytest.mark.filterwarnings("default")
def test_compiled_with_graphs():
    model, x = make("network")
    expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    # It runs, captures, and replays.
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        found = [t.clone() for t in gradients(compiled, x)]
        # One kernel for the network against one for each layer.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# The same for what torch uses and for what it prefers.
@pytest.mark.filterwarnings("default")
def test_compiled_programs_call_the_kernels():
    model, x = make("layer")
    compiled = torch.compile(model, fullgraph=True)
    gradients(compiled, x)
    with torch.profiler.profile(acc_events=True) as profile:
        gradients(compiled, x)
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    assert names >= {"linear_act_fwd_rows_kernel", "linear_act_bwd_rows_kernel"}


@every_model
def test_eight_threads_and_cold_kernels(name):
    model, x = make(name)
    expected = gradients(model, x)
    torch.cuda.synchronize()
    forget_kernels()
    together = threading.Barrier(8)

    def run(_):
        together.wait(timeout=60)
        found = gradients(model, x)
        torch.cuda.synchronize()
        return found

    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(run, range(8)):
            torch.testing.assert_close(found, expected)


@every_model
def test_side_stream(name):
    model, x = make(name)
    expected = gradients(model, x)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Long enough for a kernel on another stream to read what is not there yet.
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = gradients(model, late)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@every_model
def test_second_device(name):
    model, x = make(name)
    expected = gradients(model, x)
    found = gradients(model.to("cuda:1"), x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {t.device.index for t in found} == {1}
    # The other one may be of another generation, with tiles of its own.
    torch.testing.assert_close([t.to("cuda:0") for t in found], expected, rtol=1e-3, atol=1e-4)


def test_profiler_names_the_kernels():
    x, weight, bias, _ = make_layer(64, 32, 16, torch.float32, "cuda")
    weight.requires_grad_()
    # Without that, torch 2.11 warns that only the events of the last cycle are kept.
    with torch.profiler.profile(acc_events=True) as profile:
        linear_sigmoid(x, weight, bias, impl="triton").sum().backward()
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    assert names >= {"linear_act_fwd_rows_kernel", "linear_act_bwd_rows_kernel", "LinearActFunction"}


@every_model
def test_kernels_count_the_flops_of_nn(name):
    model, x = make(name)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    products = [2 * len(x) * m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    # Forward, dweight, and dx of every layer but the first, whose input wants no gradient.
    assert counter.get_total_flops() == 3 * sum(products) - products[0]
