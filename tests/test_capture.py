"""What a CUDA graph needs, as far as it can be shown without a GPU; `test_gpu.py` captures."""

import contextlib
import importlib.util
import types

import pytest
import torch
from cases import kernel_device, make_layer

from perceptriton.mlp import MLP, warmup

DEVICE = kernel_device()


# --- warming up ---------------------------------------------------------------------------------------------------


def test_warmup_runs_both_directions_and_leaves_gradients_alone():
    model, x = MLP([4, 8, 2]), torch.randn(3, 4)
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    seen = []

    def watch(module, args, y):
        y.register_hook(lambda dy: seen.append(dy.stride()))

    model[2].register_forward_hook(watch)
    with torch.no_grad():
        warmup(lambda x: model(x).sum(), x)
    # The strides are those that the gradient of a sum has.
    assert seen == [(0, 0)]
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))


def test_warmup_without_gradients():
    calls = []
    warmup(lambda x: calls.append(x) or 2 * x, torch.ones(2))
    assert len(calls) == 1


def test_warmup_error():
    with pytest.raises(TypeError, match=r"^function must return a Tensor, not tuple$"):
        warmup(lambda x: (x, x), torch.ones(2))


@pytest.fixture
def linear():
    if DEVICE == "cpu":
        pytest.skip("the interpreter compiles nothing")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    from perceptriton.kernels import linear

    return linear


@pytest.fixture
def h200(linear, monkeypatch):
    """A driver for a chip that is not there: kernels go as far as the compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    monkeypatch.setattr(torch.cuda, "device", lambda place: contextlib.nullcontext())
    current = linear._current
    tensor = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    monkeypatch.setattr(linear, "_current", lambda _: current(tensor))
    yield
    linear.linear_act_fwd_rows_kernel.device_caches.clear()
    driver.set_active(None)  # whatever this machine has, once it is asked for


def test_a_cold_kernel_is_not_compiled_while_a_graph_is_captured(linear, h200, monkeypatch):
    from triton.runtime import JITFunction

    from perceptriton.kernels import Plan, Tile

    compiled = []
    monkeypatch.setattr(JITFunction, "_do_compile", JITFunction._do_compile)  # restored at the end, whatever happens
    monkeypatch.setattr(linear, "_compile", lambda kernel, *_: compiled.append(kernel.__name__))
    x, weight, bias, _ = make_layer(16, 16, 16, torch.float32)
    plan = Plan("rows", "the test says so", Tile(16, 16, 16, 4, 1), 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^linear_act_fwd_rows_kernel is not compiled yet.*captured.*warmup$"):
        linear.linear_act_fwd(x, weight, bias, "sigmoid", plan)
    assert not compiled
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # Another thread, which captures nothing, may come by while the first one does.
    linear._refuse_to_compile(linear.linear_act_fwd_rows_kernel)
    # Of two captures the first to end leaves the other one its guard.
    with linear._captured(torch.device("cuda", 0)):
        with linear._captured(torch.device("cuda", 0)):
            pass
        assert JITFunction._do_compile is linear._refuse_to_compile
    assert JITFunction._do_compile is linear._compile
    # The capture is over.
    monkeypatch.setattr(linear, "_current", lambda _: contextlib.nullcontext())
    linear.linear_act_fwd(x, weight, bias, "sigmoid", plan)
    assert compiled == ["linear_act_fwd_rows_kernel"] * 2
