# SPDX-License-Identifier: Apache-2.0
"""What torch builds around models: around ours it computes what it does around the nn models that ours stand for."""

import collections
import functools
import itertools
import multiprocessing
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error, same_bits
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from perceptriton.kernels import Plan, eligibility, plan, reference
from perceptriton.kernels.registration import registered
from perceptriton.mlp import MLP, LinearSigmoid, LinearSigmoidBCELoss, LinearTanh, fuse_, linear_act, mlp_act, unfuse_

# torch itself uses what it deprecates when it compiles, exports and traces.
pytestmark = [
    pytest.mark.traced,
    pytest.mark.filterwarnings(r"ignore:.*torch\.jit\."),
    pytest.mark.filterwarnings(r"ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function:UserWarning"),
]
COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler"
)


# --- models -------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """A body and the loss of its head, (rows, outputs), against targets that come from the input."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        h, target = self.body(x), (x[..., :3] > 0).to(x.dtype)
        if isinstance(self.head, LinearSigmoidBCELoss):
            return self.head(h, target)
        return F.binary_cross_entropy_with_logits(self.head(h), target, reduction="none")


def sequential():
    """A model that has layers to fuse, and others beside them."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.LayerNorm(8), nn.Linear(8, 5), nn.ReLU()
    )


def fused():
    model = sequential()
    assert fuse_(model) == ["0", "2", "5"]
    return model


# ours, and what it stands for; both take (rows, 6)
MODELS = {
    "layer": (lambda: LinearSigmoid(6, 5), lambda: nn.Sequential(nn.Linear(6, 5), nn.Sigmoid())),
    "mlp": (
        lambda: MLP([6, 8, 5], "tanh", "sigmoid"),
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Sigmoid()),
    ),
    "fused": (fused, sequential),
    "loss": (
        lambda: Loss(LinearTanh(6, 8), LinearSigmoidBCELoss(8, 3, reduction="none")),
        lambda: Loss(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3)),
    ),
}
ROWS = 7


def pair(name):
    """Our model and its twin with the same values, and an input."""
    model, twin = (make() for make in MODELS[name])
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            # Gradients of a default-initialized sigmoid net are so small that zeros pass most tolerances.
            q.copy_(p.mul_(3))
    return model, twin, torch.randn(ROWS, 6)


def results(model, x):
    """y and every gradient."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    return (y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()]))


def sgd(model, x, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        yield


every_model = pytest.mark.parametrize("name", MODELS)


# --- compilers ----------------------------------------------------------------------------------------------------


@pytest.mark.more
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("name", ["fused", "loss"])
@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
def test_compiles_into_as_few_graphs(kernels, name, dynamic, monkeypatch):
    # As on a GPU the graphs then hold the registered ops, which run in plain torch here.
    monkeypatch.setattr(eligibility, "launchable", lambda device, dtype: kernels)
    counts, held = [], []
    for net in pair(name)[:2]:
        torch._dynamo.reset()
        backend = AotEagerAndRecordGraphs()
        compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=dynamic)
        for rows in (2, 3, 4, 7, 16, 1):
            x = torch.randn(rows, 6)
            torch.testing.assert_close(results(compiled, x), results(net, x))
        counts.append([len(graphs) for graphs in (backend.graphs, backend.fw_graphs, backend.bw_graphs)])
        targets = [str(node.target) for graph in backend.fw_graphs for node in graph.graph.nodes]
        held.append(str(registered.linear_act) in targets)
    ours, theirs = counts
    assert all(0 < own <= other for own, other in zip(ours, theirs, strict=True)), counts
    assert held == [kernels, False]


@pytest.mark.slow
@COMPILER
def test_inductor():
    model, twin, x = pair("fused")
    torch._dynamo.reset()
    torch.testing.assert_close(results(torch.compile(model), x), results(twin, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@every_model
def test_exports_as_plain_operations(name, strict, size):
    model, twin, x = pair(name)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {op.namespace for op in calls} == {"aten"}
    x = torch.randn(13, 6)
    torch.testing.assert_close(program.module()(x), twin(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fused", "loss"])
def test_onnx(name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which torch exports with, is not installed")
    model, twin, x = pair(name)
    program = torch.onnx.export(
        model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False
    )
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    x = torch.randn(13, 6)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), twin(x).detach())


@pytest.mark.more
@COMPILER
def test_aot_inductor(tmp_path):
    model, twin, x = pair("fused")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    x = torch.randn(13, 6)
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), twin(x))


# The tracer notes that the size decides which operations run; they are the same ones here.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@every_model
def test_traced_by_jit(name, size):
    model, twin, x = pair(name)
    traced = torch.jit.trace(model, (x,))
    x = torch.randn(13, 6)
    torch.testing.assert_close(results(traced, x), results(twin, x))


@every_model
def test_traced_by_fx(name, size):
    model, twin, x = pair(name)
    torch.testing.assert_close(results(torch.fx.symbolic_trace(model), x), results(twin, x))


@pytest.mark.parametrize(
    "function", [linear_act, lambda x, w, **options: mlp_act(x, [w], **options)], ids=["layer", "mlp"]
)
def test_fx_never_overrides_a_choice(function):
    with pytest.raises(NotImplementedError, match=r'^impl="triton": torch\.fx is tracing$'):
        torch.fx.symbolic_trace(lambda x: function(x, torch.ones(2, 3), impl="triton"))


# --- mixed precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_model
def test_mixed_precision_training(name, dtype, size):
    model, twin, x = pair(name)
    start = [p.detach().clone() for p in twin.parameters()]
    found = []
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        # Too much for the gradients of fp16 at first: steps are skipped until the scale has come down.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=2, enabled=dtype is torch.float16)
        dtypes, scales = [], []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                y = net(x)
                loss = y.float().square().sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            dtypes.append((y.dtype, *(p.grad.dtype for p in net.parameters())))
            scales.append(scaler.get_scale())
        found.append((dtypes, scales))
    assert found[0] == found[1]
    dtypes, scales = found[0]
    assert set(dtypes[0][1:]) == {torch.float32}
    if dtype is torch.float16:
        assert scales[0] < 2.0**17
        assert scales != sorted(scales, reverse=True)
    for p, q, s in zip(model.parameters(), twin.parameters(), start, strict=True):
        assert relative_error(q, s) > 1e-3
        assert relative_error(p - s, q - s) < 8 * torch.finfo(dtype).eps


# --- what wraps a forward pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@every_model
def test_checkpoint(name, reentrant, size):
    model, twin, x = pair(name)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=reentrant)

    def gradients(net):
        inputs = x.clone().requires_grad_()
        net(inputs).square().sum().backward()
        return [inputs.grad, *(p.grad for p in net.parameters())]

    torch.testing.assert_close(gradients(Checkpointed()), gradients(twin))


@pytest.mark.parametrize("name", ["mlp", "fused"])
def test_checkpoint_in_segments(name, size):
    model, twin, x = pair(name)
    segments = functools.partial(checkpoint_sequential, model, 2, use_reentrant=False)
    segments.parameters = model.parameters
    torch.testing.assert_close(results(segments, x), results(twin, x))


@every_model
def test_selective_checkpoint_sees_the_operations_of_nn(name, size):
    model, twin, x = pair(name)

    def run(net):
        seen = collections.Counter()

        def policy(context, op, *args, **kwargs):
            seen[str(op), context.is_recompute] += 1
            return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.MUST_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        call = functools.partial(checkpoint, net, use_reentrant=False, context_fn=contexts)
        call.parameters = net.parameters
        return seen, results(call, x)

    (seen, actual), (seen_in_twin, expected) = run(model), run(twin)
    assert seen == seen_in_twin
    assert seen["aten.addmm.default", False] > 0
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["small", "onednn"])
@every_model
def test_same_flops_as_nn(name, path, force):
    if path == "onednn":
        # Products of which no counter of torch's knows.
        own = Plan("explicit", "the test says so", forward_gemm="onednn", dx_gemm="onednn", dweight_gemm="onednn")
        force(own, own)
    model, twin, x = pair(name)
    torch._dynamo.reset()

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call(x).square().sum().backward()
        return counter.get_flop_counts()["Global"]

    expected = flops(twin)
    assert sum(expected.values()) > 0
    assert flops(model) == expected
    # Compiled or not: torch.compile steps aside while operations are counted.
    compiled = torch.compile(lambda x: model(x), backend="aot_eager")
    compiled(x)
    assert flops(compiled) == expected


def test_flops_by_module(size):
    model, twin, x = pair("mlp")
    counts = []
    for net in (model, twin):
        with FlopCounterMode(display=False) as counter:
            net(x)
        counts.append({key.partition(".")[2]: sum(ops.values()) for key, ops in counter.get_flop_counts().items()})
    ours, theirs = counts
    assert ours["0"] == theirs["0"] == 2 * ROWS * 6 * 8
    assert ours["2"] == theirs["2"] == 2 * ROWS * 8 * 5


# What a user reads in a trace: torch's operations for small inputs, the package's autograd nodes for large ones.
LABELS = {
    ("layer", "small"): {"aten::linear", "aten::sigmoid", "autograd::engine::evaluate_function: SigmoidBackward0"},
    ("layer", "large"): {"LinearActFunction", "aten::addmm", "aten::sigmoid_", "LinearActFunctionBackward"},
    ("mlp", "small"): {"aten::linear", "aten::tanh", "aten::sigmoid", "SigmoidBackward0", "TanhBackward0"},
    ("mlp", "large"): {"MlpFunction", "aten::addmm", "aten::tanh_", "aten::sigmoid_", "MlpFunctionBackward"},
}


@pytest.mark.parametrize("name", ["layer", "mlp"])
def test_profiler_labels(name, size):
    model, _, x = pair(name)
    # torch 2.11 warns where events are not kept from one cycle to the next; there is one cycle.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        results(model, x)
    assert {event.key for event in profile.key_averages()} >= LABELS[name, size]


# --- torch.func ---------------------------------------------------------------------------------------------------


def transforms(model, x):
    """Each of torch.func's transforms of a model that is a function of its parameters."""
    names, parameters = zip(*((n, p.detach()) for n, p in model.named_parameters()), strict=True)

    def call(parameters, x):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    def loss(parameters, x):
        return call(parameters, x).square().sum()

    def last_bias(bias):
        return loss((*parameters[:-1], bias), x)

    tangents = tuple(torch.cos(p) for p in parameters)
    return {
        "grad": lambda: torch.func.grad(loss)(parameters, x),
        "per-sample": lambda: torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x),
        "jvp": lambda: torch.func.jvp(lambda parameters: call(parameters, x), (parameters,), (tangents,)),
        "hessian": lambda: torch.func.hessian(last_bias)(parameters[-1]),
    }


@pytest.mark.parametrize("transform", ["grad", "per-sample", "jvp", "hessian"])
@pytest.mark.parametrize("name", ["fused", "loss"])
def test_transforms_of_models(name, transform, size):
    model, twin, x = pair(name)
    torch.testing.assert_close(transforms(model, x)[transform](), transforms(twin, x)[transform]())


@pytest.mark.parametrize("name", ["fused", "loss"])
def test_stacked_ensemble(name, size):
    models, twins, inputs = zip(*(pair(name) for _ in range(3)), strict=True)
    parameters, buffers = torch.func.stack_module_state(list(models))

    def call(parameters, buffers, x):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    actual = torch.func.vmap(call)(parameters, buffers, torch.stack(inputs))
    torch.testing.assert_close(actual, torch.stack([twin(x) for twin, x in zip(twins, inputs, strict=True)]))


# --- what changes modules and parameters -------------------------------------------------------------------------


def test_parametrized_after_fusing(size):
    model, twin, x = pair("fused")
    model(x)
    for net in (model, twin):
        parametrizations.weight_norm(net[2])
        prune.l1_unstructured(net[5], "weight", amount=0.5)
    torch.testing.assert_close(results(model, x), results(twin, x))
    refused = {}
    fuse_(model, refused)
    assert refused == {"2": "it is a ParametrizedLinear", "5": "it has hooks"}
    for net in (model, twin):
        parametrize.remove_parametrizations(net[2], "weight")
        prune.remove(net[5], "weight")
    assert unfuse_(model) == ["0", "2", "5"]
    torch.testing.assert_close(results(model, x), results(twin, x))


@every_model
def test_moving_average(name, size):
    model, twin, x = pair(name)
    averages = [AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for net in (model, twin)]
    for _ in zip(sgd(model, x), sgd(twin, x), strict=True):
        for average, net in zip(averages, (model, twin), strict=True):
            average.update_parameters(net)
    torch.testing.assert_close(*(average(x) for average in averages))
    assert relative_error(averages[0](x), model(x)) > 1e-3


# --- processes and threads ---------------------------------------------------------------------------------------


@every_model
def test_eight_threads_at_once(name, size):
    model, _, x = pair(name)
    expected = results(model, x)
    # What a first call finds out is found out by eight.
    plan.mlp_both.cache_clear()
    reference.onednn_linear.cache_clear()
    together = threading.Barrier(8)

    def run(_):
        together.wait(timeout=60)
        return [results(model, x) for _ in range(10)]

    with ThreadPoolExecutor(8) as threads:
        for found in itertools.chain.from_iterable(threads.map(run, range(8))):
            assert same_bits(found, expected)


@pytest.mark.slow
def test_spawned_process():
    pairs = {name: pair(name) for name in MODELS}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        for name, (model, twin, x) in pairs.items():
            torch.testing.assert_close(process.submit(results, model, x).result(60), results(twin, x), msg=name)


class Gradients(Dataset):
    """Samples that it takes a model's forward and backward pass to make."""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return results(self.model, self.x[index : index + 1])


# Python 3.12 warns of every fork in a process that has threads.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@every_model
def test_loader_workers_after_a_fork(name, size):
    model, twin, x = pair(name)
    results(model, x)  # threads and caches of the parent are there
    load = functools.partial(DataLoader, batch_size=None, num_workers=2, multiprocessing_context="fork")
    twins = Gradients(twin, x)
    try:
        list(load(twins))
    except RuntimeError as error:
        if "fork-based multiprocessing" not in str(error):
            raise
        # In CUDA builds autograd has some as soon as there is a device, or torch.compile ran before the first gradient.
        pytest.skip("autograd has threads for devices here: in a forked process nn has no backward pass either")
    found = list(load(Gradients(model, x)))
    assert len(found) == ROWS
    for index, actual in enumerate(found):
        torch.testing.assert_close(tuple(actual), twins[index])


# --- what is raised, and what does not come -----------------------------------------------------------------------


class Once:
    """Raises at its first call, and then no more, as what interrupts a process does."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls == 1:
            raise self.error


class Raising(TorchDispatchMode):
    def __init__(self, error):
        super().__init__()
        self.once = Once(error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.new_empty.default:  # a shape that is looked at
            self.once()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, KeyError, AttributeError])
@every_model
def test_an_error_from_elsewhere_comes_through(name, error, size):
    """As a signal's handler raises it, that of DataLoader for one, or a mode or a hook: the call is not repeated."""
    model, _, x = pair(name)
    with pytest.raises(error, match="time is up"), Raising(error("time is up")) as mode:
        model(x)
    assert mode.once.calls == 1
    pack = Once(error("time is up"))
    with pytest.raises(error, match="time is up"), saved_tensors_hooks(pack, lambda packed: packed):
        model(x)
    assert pack.calls == 1


class NoGradient(torch.autograd.Function):
    """Passes no gradient on."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


@every_model
def test_no_gradient_stays_none(name, size):
    model, _, x = pair(name)
    NoGradient.apply(model(x.requires_grad_())).sum().backward()
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
