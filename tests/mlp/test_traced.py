# SPDX-License-Identifier: Apache-2.0
"""What torch.compile traces of layers and networks: registered ops, their autograd formulas, and when they are used."""

import copy
import functools
import hashlib
import inspect
import itertools
import math
import re
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from cases import FLOOR, kernel_device, relative_error, spy_on
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

from perceptriton.kernels import Device, eligibility, ops, plan, reference, registration
from perceptriton.kernels.registration import registered
from perceptriton.mlp import MLP, LinearSigmoid, LinearTanh, fuse_, linear_act, mlp_act, mlp_sigmoid_bce
from perceptriton.mlp.functional import functions, traced
from perceptriton.mlp.functional.functions import LinearActFunction

KERNELS = kernel_device()
DEVICE = KERNELS or "cpu"
IMPL = None if KERNELS is None else "triton"
pytestmark = [
    pytest.mark.traced,
    pytest.mark.usefixtures("rounding"),
    # The compiler itself uses what torch deprecates.
    pytest.mark.filterwarnings("default"),
]
mlp, mlp_backward = registered.mlp, registered.mlp_backward
mlp_bce, mlp_bce_backward = registered.mlp_bce, registered.mlp_bce_backward

# widths and what a network of them saves: where its backward pass is cut, as is that of three layers of 64 in fp32
NETWORKS = {"xor": ((2, 2, 1), []), "ragged": ((5, 17, 3), []), "cut": ((3, 64, 60, 2), [2])}
LEADING = {"rows": (6,), "leading": (2, 3), "vector": (), "no-rows": (0,)}


@pytest.fixture
def rounding(request):
    request.getfixturevalue("device" if KERNELS else "poisoned")


@pytest.fixture
def chip(monkeypatch):
    """Programs are traced as for a GPU with kernels."""
    monkeypatch.setattr(eligibility, "look_at", lambda device: Device("cuda", 90, 132, triton=True))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(widths, leading=(6,), bias=True, dtype=torch.float64):
    """x, weights, biases and dy: pre-activations of std near 1.5, upstream gradients of order 1."""
    pairs = list(itertools.pairwise(widths))
    x, dy = torch.randn(*leading, widths[0]), torch.randn(*leading, widths[-1])
    weights = [1.4 * torch.randn(n, k) / k**0.5 for k, n in pairs]
    biases = [0.5 * torch.randn(n) for _, n in pairs] if bias else []
    x, dy, *parameters = (t.to(DEVICE, dtype) for t in (x, dy, *weights, *biases))
    return x, parameters[: len(pairs)], parameters[len(pairs) :], dy


def logits(x, weights, biases):
    for l, weight in enumerate(weights):
        z = F.linear(x, weight, biases[l] if biases else None)
        x = torch.tanh(z)
    return z


def plain(x, weights, biases):
    return torch.sigmoid(logits(x, weights, biases))


def results(function, x, weights, biases, dy):
    """y and all gradients, in one list."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, *weights, *biases)]
    layers = len(weights)
    y = function(inputs[0], inputs[1 : layers + 1], inputs[layers + 1 :])
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def op(save):
    return lambda x, weights, biases: mlp(x, weights, biases, "tanh", "sigmoid", save, IMPL)[0]


def head(x, weights, reduction="none"):
    """Soft targets and weights of their own for each output."""
    shape = (*x.shape[:-1], weights[-1].shape[0])
    target = torch.linspace(0, 1, math.prod(shape), device=DEVICE).view(shape)
    return target, torch.linspace(0.5, 2, shape[-1], device=DEVICE), reduction


def plain_loss(x, weights, biases):
    return loss_of(logits(x, weights, biases), *head(x, weights))


def loss_of(z, target, pos_weight, reduction):
    return F.binary_cross_entropy_with_logits(z, target, pos_weight=pos_weight, reduction=reduction)


def loss_op(save):
    def call(x, weights, biases):
        return mlp_bce(x, weights, biases, "tanh", "identity", save, IMPL, *head(x, weights), torch.float32)[0]

    return call


every_op = pytest.mark.parametrize(("op", "plain"), [(op, plain), (loss_op, plain_loss)], ids=["mlp", "mlp_bce"])
every_network = pytest.mark.parametrize(("widths", "save"), NETWORKS.values(), ids=NETWORKS)


# --- the ops of networks ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.core
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@every_network
def test_errors_are_those_of_torch(widths, save, bias):
    truth = make(widths, (40,), bias)
    single = [[t.float() for t in part] if isinstance(part, list) else part.float() for part in truth]
    expected, ours, torchs = results(plain, *truth), results(op(save), *single), results(plain, *single)
    for own, other, want in zip(ours, torchs, expected, strict=True):
        assert relative_error(own, want) <= 2 * relative_error(other, want) + FLOOR[torch.float32]
    zeros = [torch.zeros_like(t) for t in ours]
    assert all(relative_error(own, want) > 0.5 for own, want in zip(zeros, expected, strict=True))


# widths, reduction, pos_weight, dtype of x and the parameters, bias: between them each of its kinds
LOSSES = {
    "mean": ((5, 17, 3), "mean", None, torch.float32, True),
    "layer": ((5, 3), "sum", [0.5, 1.0, 2.0], torch.float32, False),
    "integers": ((5, 17, 3), "none", [1, 2, 3], torch.float32, False),
    "number": ((3, 64, 60, 2), "mean", 3.0, torch.float32, True),
    "bf16": ((5, 17, 3), "mean", [2.0], torch.bfloat16, True),
    "fp16": ((5, 17, 16, 3), "none", None, torch.float16, True),
}


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.core
@pytest.mark.parametrize(("widths", "reduction", "weighted", "dtype", "bias"), LOSSES.values(), ids=LOSSES)
def test_errors_of_losses_are_those_of_torch(widths, reduction, weighted, dtype, bias, monkeypatch):
    *own, dy = make(widths, (40,), bias, dtype)
    truth = [[t.double() for t in part] if isinstance(part, list) else part.double() for part in own]
    target = torch.rand(40, widths[-1], device=DEVICE)
    pos_weight = None if weighted is None else torch.tensor(weighted, device=DEVICE)
    dy = dy.float() if reduction == "none" else dy.float().sum()
    launched = []
    if KERNELS is not None:
        from perceptriton.kernels.gpu import network

        launched = [spy_on(monkeypatch, network, f"mlp_{way}_kernel").launches for way in ("fwd", "bwd")]
    save = [2] if len(widths) > 3 and dtype == torch.float32 else []

    def ours(x, weights, biases):
        options = ("tanh", "identity", save, IMPL, target, pos_weight, reduction, torch.float32)
        return mlp_bce(x, weights, biases, *options)[0]

    def torchs(x, weights, biases):
        # torch computes a loss of a half in the half, not in the dtype that it has.
        z = logits(x, weights, biases)
        wide = torch.promote_types(z.dtype, target.dtype)
        return loss_of(z.to(wide), target.to(wide), pos_weight, reduction)

    found, other = results(ours, *own, dy), results(torchs, *own, dy)
    for mine, theirs, want in zip(found, other, results(torchs, *truth, dy.double()), strict=True):
        assert mine.dtype == theirs.dtype
        assert relative_error(mine, want) <= 2 * relative_error(theirs, want) + FLOOR[dtype]
    assert all(map(bool, launched))


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@every_op
@every_network
def test_every_number_of_rows(widths, save, op, plain, leading):
    tensors = make(widths, leading, dtype=torch.float32)
    torch.testing.assert_close(results(op(save), *tensors), results(plain, *tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.parametrize("wanted", [(0,), (1,), (3, 4), (0, 2, 5)], ids=str)
def test_only_what_is_wanted(wanted):
    x, weights, biases, dy = make((5, 17, 16, 3), dtype=torch.float32)
    inputs = [x, *weights, *biases]
    for index in wanted:
        inputs[index].requires_grad_()
    chosen = [inputs[index] for index in wanted]
    y, expected = op([])(x, weights, biases), plain(x, weights, biases)
    found, want = (torch.autograd.grad(out, chosen, dy) for out in (y, expected))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.parametrize("first", [True, False], ids=["forward", "backward"])
@every_op
def test_plans_that_change_on_the_way(op, plain, first, monkeypatch):
    # A direction whose plan is not that of the program's any more computes the same in plain operations.
    widths, save = NETWORKS["cut"]
    tensors = make(widths, dtype=torch.float32)
    plans, calls = ops.mlp_plans, []

    def changing(x, *rest, **options):
        calls.append(len(calls) + first)
        return plans(x, *rest, impl="torch") if calls[-1] == 1 else plans(x, *rest, **options)

    monkeypatch.setattr(ops, "mlp_plans", changing)
    found = results(op(save), *tensors)
    assert len(calls) == 2
    torch.testing.assert_close(found, results(plain, *tensors), rtol=1e-4, atol=1e-5)


# widths, save, bias, reduction of a loss behind it
REGISTERED = {
    **{f"{name}-{bias}": (*network, bias, None) for name, network in NETWORKS.items() for bias in (True, False)},
    "loss": (*NETWORKS["cut"], True, "none"),
    "mean-loss": (*NETWORKS["cut"], False, "mean"),
}


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize(("widths", "save", "bias", "reduction"), REGISTERED.values(), ids=REGISTERED)
def test_ops_are_registered_right(widths, save, bias, reduction):
    x, weights, biases, dy = make(widths, bias=bias, dtype=torch.float32)
    forward, backward, acts, behind = mlp, mlp_backward, ("tanh", "sigmoid", save), ()
    if reduction:
        target, pos_weight, _ = head(x, weights)
        forward, backward, acts = mlp_bce, mlp_bce_backward, ("tanh", "identity", save)
        behind = (target, pos_weight if bias else None, reduction, torch.float32)
    inputs = [t.requires_grad_() for t in (x, *weights, *biases)]
    checked = torch.library.opcheck(forward, (x, weights, biases, *acts, IMPL, *behind))
    x, *parameters = (t.detach() for t in inputs)
    weights, biases = parameters[: len(weights)], parameters[len(weights) :]
    y, saved = forward(x, weights, biases, *acts, IMPL, *behind)
    wanted = [index % 3 != 1 for index in range(len(inputs))]
    dy = torch.ones_like(y) if reduction == "mean" else dy
    arguments = (dy, x, weights, biases, saved, *acts, wanted, IMPL, *behind)
    checked |= {f"{name} backward": found for name, found in torch.library.opcheck(backward, arguments).items()}
    assert set(checked.values()) == {"SUCCESS"}


@every_op
def test_gradients_of_gradients(op, plain):
    x, weights, biases, dy = make((5, 17, 3), dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (x, *weights, *biases)]

    def penalty(function):
        gradients = torch.autograd.grad(function(x, weights, biases), inputs, dy, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    torch.testing.assert_close(penalty(op([])), penalty(plain), rtol=1e-3, atol=1e-4)


@pytest.fixture
def no_launches(monkeypatch):
    """The ops themselves cannot be called."""
    monkeypatch.setattr(ops, "mlp_fwd", None)
    monkeypatch.setattr(ops, "mlp_bwd", None)
    monkeypatch.setattr(ops, "mlp_plans", None)


@pytest.mark.parametrize("stacked", [(0,), (0, 1), (2, 5)], ids=str)
@every_op
def test_vmap_takes_plain_operations(op, plain, stacked, no_launches):
    x, weights, biases, _ = make((3, 64, 60, 2), dtype=torch.float32)
    inputs = [x, *weights, *biases]
    dims = [0 if index in stacked else None for index in range(len(inputs))]
    inputs = [t if dim is None else torch.stack([t, 2 * t, -t]) for t, dim in zip(inputs, dims, strict=True)]
    found = torch.vmap(lambda x, *own: op([2])(x, own[:3], own[3:]), tuple(dims))(*inputs)
    expected = torch.vmap(lambda x, *own: plain(x, own[:3], own[3:]), tuple(dims))(*inputs)
    torch.testing.assert_close(found, expected)


def test_what_is_saved_under_vmap(no_launches):
    x, weights, biases, _ = make((3, 64, 60, 2), dtype=torch.float32)
    _, saved = torch.vmap(lambda x: mlp(x, weights, biases, "tanh", "sigmoid", [2], IMPL))(torch.stack([x, -x]))
    assert [t.shape for t in saved] == [(2, 6, 64)]


@every_op
def test_batched_gradients_take_plain_operations(op, plain, monkeypatch):
    x, weights, biases, _ = make((5, 17, 3), dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (x, *weights, *biases)]
    y, dys = op([])(x, weights, biases), torch.randn(4, 6, 3, device=DEVICE)
    expected = torch.autograd.grad(plain(x, weights, biases), inputs, dys, is_grads_batched=True)
    monkeypatch.setattr(ops, "mlp_bwd", None)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dys, is_grads_batched=True), expected)


MISFITS = {
    "none": (lambda x, w, b: (x, [], []), r"weights holds 0 Tensors, and biases 0"),
    "biases": (lambda x, w, b: (x, w, b[:1]), r"weights holds 2 Tensors, and biases 1"),
    "x": (lambda x, w, b: (x[:, :4], w, b), r"weights[0] (17, 5) does not take the features of x (6, 4)"),
    "number": (lambda x, w, b: (x[0, 0], w, b), r"weights[0] (17, 5) does not take the features of x ()"),
    "chain": (
        lambda x, w, b: (x, [w[0], w[1][:, 1:]], b),
        r"weights[1] (3, 16) does not take the features of",
    ),
    "vector": (lambda x, w, b: (x, [w[0], w[1][0]], b), r"weights[1] (17,) does not take the features of"),
    "bias": (lambda x, w, b: (x, w, [b[0], b[1][:1]]), r"biases[1] (1,) is not the out_features of weight (3, 17)"),
    "dtype": (lambda x, w, b: (x, [w[0], w[1].half()], b), r"weights[1] is torch.float16, but x torch.float32"),
    "device": (lambda x, w, b: (x, w, [b[0], b[1].to("meta")]), r"biases[1] is on meta, but x on cpu"),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="messages name the CPU")
@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_ops_name_what_does_not_fit(change, message):
    x, weights, biases, _ = make((5, 17, 3), dtype=torch.float32)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        mlp(*change(x, weights, biases), "tanh", "sigmoid", [], IMPL)


@pytest.mark.skipif(DEVICE == "cuda", reason="messages name the CPU")
def test_ops_of_losses_name_what_does_not_fit():
    x, weights, biases, _ = make((5, 17, 3), dtype=torch.float32)
    call = functools.partial(mlp_bce, x, weights, biases, "tanh")
    target = torch.rand(6, 3)
    for output, given, message in (
        ("identity", target[:, :2], r"target (6, 2) on cpu has not the shape and device of the output (6, 3) on cpu"),
        ("identity", target.to("meta"), r"target (6, 3) on meta has not the shape and device of"),
        ("sigmoid", target, r"output is 'sigmoid', but the loss takes a logit"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            call(output, [], IMPL, given, None, "mean", torch.float32)


# --- when they are used -------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self, widths, function, bias=True):
        super().__init__()
        _, weights, biases, _ = make(widths, bias=bias, dtype=torch.float32)
        self.weights, self.biases, self.function = nn.ParameterList(weights), nn.ParameterList(biases), function

    def forward(self, x):
        # torch 2.11 unpacks no list of parameters.
        return self.function(x, [w for w in self.weights], [b for b in self.biases])


def act(x, weights, biases):
    return mlp_act(x, weights, biases or None, "tanh", "sigmoid")


def names(record):
    """The registered ops in the graphs of both directions."""
    graphs = [*record.fw_graphs, *record.bw_graphs]
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    return {target.split(".")[1] for target in targets if target.startswith("perceptriton.")}


def trained(net, x):
    x = x.detach().clone().requires_grad_()
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *net.parameters()])]


LAYERS = {"linear_act", "linear_act_backward"}
WHOLE = {"mlp", "mlp_backward"}
# In fp32, to train a network of middle width is worth kernels of its own for few rows alone, if their number is known.
# That of one row is.
TRACED = {
    "narrow": ((5, 17, 3), None, WHOLE),
    "dynamic": ((5, 17, 3), True, WHOLE),
    "middle": ((3, 64, 60, 2), None, WHOLE | LAYERS),
    "middle-dynamic": ((3, 64, 60, 2), True, WHOLE | LAYERS),
    "wide": ((3, 200, 2), True, LAYERS),
}


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "dynamic", "held"), TRACED.values(), ids=TRACED)
def test_a_dynamic_batch_is_compiled_as_often_as_with_nn(widths, dynamic, held, chip):
    counts = []
    for function in (act, plain):
        torch._dynamo.reset()
        net, record = Network(widths, function), AotEagerAndRecordGraphs()
        compiled = torch.compile(net, backend=record, fullgraph=True, dynamic=dynamic)
        for rows in (2, 3, 4, 7, 16, 1, 5):
            x = torch.randn(rows, widths[0], device=DEVICE)
            torch.testing.assert_close(trained(compiled, x), trained(net, x), rtol=1e-4, atol=1e-5)
        counts.append([len(graphs) for graphs in (record.graphs, record.fw_graphs, record.bw_graphs)])
        assert names(record) == (held if function is act else set())
    ours, theirs = counts
    assert all(0 < own <= other for own, other in zip(ours, theirs, strict=True)), counts


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_autocast_and_inference(bias, chip):
    net, x = Network((3, 64, 64, 2), act, bias), torch.randn(7, 3, device=DEVICE)
    record = AotEagerAndRecordGraphs()
    compiled = torch.compile(net, backend=record, fullgraph=True)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        found, expected = trained(compiled, x), trained(net, x)
    assert names(record) == WHOLE
    assert (
        [t.dtype for t in found] == [t.dtype for t in expected] == [torch.bfloat16] + [torch.float32] * (len(found) - 1)
    )
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    assert len(record.graphs) == 2
    assert [node.args[5] for g in record.graphs for node in g.graph.nodes if "mlp" in str(node.target)] == [[2], []]


# widths, options, whether autocast is on, and what the graphs hold
WITH_LOSS = {"mlp_bce", "mlp_bce_backward"}
BEHIND = {
    "network": ((5, 17, 3), {}, False, WITH_LOSS),
    "layer": ((5, 3), {"reduction": "none", "pos_weight": torch.tensor([1, 2, 3])}, False, WITH_LOSS),
    "autocast": ((5, 17, 3), {"reduction": "sum"}, True, WITH_LOSS),
    "wide": ((5, 200, 3), {}, False, LAYERS),
    "odd-weights": ((5, 17, 3), {"pos_weight": torch.full((1, 3), 2.0)}, False, WHOLE),
}


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "options", "autocast", "held"), BEHIND.values(), ids=BEHIND)
def test_a_loss_behind_a_network(widths, options, autocast, held, chip):
    x, weights, biases, target = make(widths, dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (x, *weights, *biases)]
    options = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    record, alone = AotEagerAndRecordGraphs(), AotEagerAndRecordGraphs()

    def in_torch(x, weights, biases, target, activation, reduction="mean", pos_weight=None):
        return loss_of(logits(x, weights, biases), target, pos_weight, reduction)

    for call, backend in ((mlp_sigmoid_bce, record), (in_torch, alone)):
        torch._dynamo.reset()
        compiled = torch.compile(call, backend=backend, fullgraph=True)
        for rows in (2, 3, 6):
            arguments = (x[:rows], weights, biases, target.sigmoid()[:rows], "tanh")
            with torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=autocast):
                losses = [own(*arguments, **options) for own in (compiled, in_torch)]
            tolerances = {"rtol": 3e-2, "atol": 3e-2} if autocast else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(*losses, **tolerances)
            gradients = [torch.autograd.grad(loss.sum(), inputs) for loss in losses]
            torch.testing.assert_close(*gradients, **tolerances)
    assert names(record) == held
    ours, theirs = ([len(r.graphs), len(r.fw_graphs), len(r.bw_graphs)] for r in (record, alone))
    assert all(0 < own <= other for own, other in zip(ours, theirs, strict=True)), (ours, theirs)


# What the kernels do not take, or not as a whole.
UNUSUAL = {
    "fp64": (lambda f: lambda x, w, b: f(x.double(), [t.double() for t in w], [t.double() for t in b]), set()),
    "bias-row": (lambda f: lambda x, w, b: f(x, w, [t[None] for t in b]), set()),
    "one-bias": (lambda f: lambda x, w, b: f(x, w, [b[0], b[1][:1]]), {"linear_act"}),
    "vmap": (lambda f: lambda x, w, b: torch.vmap(f, (0, None, None))(x, w, b), set()),
    "grad": (lambda f: lambda x, w, b: torch.func.grad(lambda x: f(x, w, b).square().sum())(x), set()),
}


@pytest.mark.slow
@pytest.mark.parametrize(("unusual", "held"), UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_calls(unusual, held, chip):
    x, weights, biases, _ = make((5, 17, 3), dtype=torch.float32)
    record = AotEagerAndRecordGraphs()
    found = torch.compile(unusual(act), backend=record, fullgraph=True)(x, weights, biases)
    torch.testing.assert_close(found, unusual(plain)(x, weights, biases), rtol=1e-4, atol=1e-5)
    assert names(record) == held


@pytest.mark.slow
@pytest.mark.parametrize("function", [linear_act, lambda x, w: mlp_act(x, [w])], ids=["layer", "network"])
def test_wrong_calls_raise_what_eager_ones_do(function, chip):
    compiled = torch.compile(function, backend="eager")
    with pytest.raises(TypeError, match=r"must be a Tensor, not list$"):
        compiled(torch.ones(2, 5), [1.0])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="torch traces no autograd.grad")
@pytest.mark.parametrize("net", [LinearTanh(5, 4), MLP([5, 7, 4], "tanh", "tanh")], ids=["layer", "network"])
def test_gradients_of_gradients_inside_a_program(net, chip):
    def penalty(x):
        y = net(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.square().sum() + slope.square().sum()

    found, point = [], torch.linspace(-1, 1, 30).view(6, 5)
    for function in (penalty, torch.compile(penalty, backend="aot_eager", fullgraph=True)):
        x = point.clone().requires_grad_()
        net.zero_grad()
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            function(x).backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_programs_of_another_version_are_told_apart():
    """What Inductor keeps on disk was made of these. If they change for a program, so must `registration.OVERLOAD`."""
    formulas = [functions.save_layer, functions.layer_bwd, functions.network_bwd, functions._differentiable_bwd]
    formulas += [functions.linear_act_backward, traced._save_mlp, traced._mlp_bwd, plan.mlp_slots, plan.mlp_columns]
    formulas += [reference.linear_act_bwd_differentiable, registration._saved_shapes, registration._tensors]
    formulas += [getattr(registration, f"_fake_{op}") for op in ("linear_act", "linear_act_backward")]
    formulas += [registration._fake_mlp, registration._fake_mlp_backward]
    digest = hashlib.sha256("".join(map(inspect.getsource, formulas)).encode()).hexdigest()[:16]
    assert (registration.OVERLOAD, digest) == ("v1", "d6ab463df77a45bc")


@pytest.mark.slow
def test_compiled_autograd_sees_one_graph():
    # The backward pass of an eager layer, which is planned for large inputs.
    x, weight = torch.randn(6, 5, device=DEVICE), torch.randn(3, 5, device=DEVICE, requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    y = LinearActFunction.apply(x, weight, None, "tanh", IMPL)
    with torch._dynamo.compiled_autograd._enable(functools.partial(torch.compile, backend=counter, fullgraph=True)):
        y.square().sum().backward()
    expected = torch.autograd.grad(torch.tanh(F.linear(x, weight)).square().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# --- modules ------------------------------------------------------------------------------------------------------


def fused(*modules):
    model = nn.Sequential(*modules)
    assert fuse_(model)
    return model


MODELS = {
    "mlp": (lambda: MLP([5, 17, 3], "tanh", "sigmoid"), WHOLE),
    "fused": (lambda: fused(nn.Linear(5, 17), nn.ReLU(inplace=True), nn.Linear(17, 3)), WHOLE),
    "mixed": (lambda: fused(nn.Linear(5, 17), nn.Tanh(), nn.Linear(17, 9), nn.ReLU(), nn.Linear(9, 3)), WHOLE),
    "between": (lambda: fused(nn.Linear(5, 17), nn.Tanh(), nn.LayerNorm(17), nn.Linear(17, 3), nn.Tanh()), LAYERS),
    "unfused": (lambda: nn.Sequential(nn.Linear(5, 17), nn.Tanh(), nn.Linear(17, 3)), set()),
}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.more)], ids=["automatic", "dynamic"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.more if name in ("mixed", "unfused") else ()) for name in MODELS]
)
def test_modules_are_networks_in_the_graphs_of_nn(name, dynamic, chip):
    make, held = MODELS[name]
    model = make().to(DEVICE)
    twin = nn.Sequential(*(copy.deepcopy(module) for module in model))
    counts = []
    for net in (model, twin):
        torch._dynamo.reset()
        record = AotEagerAndRecordGraphs()
        compiled = torch.compile(net, backend=record, fullgraph=True, dynamic=dynamic)
        for rows in (2, 3, 4, 7, 1):
            x = torch.randn(rows, 5, device=DEVICE)
            torch.testing.assert_close(trained(compiled, x), trained(twin, x), rtol=1e-4, atol=1e-5)
        counts.append([len(graphs) for graphs in (record.graphs, record.fw_graphs, record.bw_graphs)])
        assert names(record) == (held if net is model else set())
    assert all(0 < own <= other for own, other in zip(*counts, strict=True)), counts


def no_biases(model):
    model[0].bias = model[2].bias = None


CHANGES = {
    "replaced": (lambda m: m.__setitem__(1, nn.ReLU()), {"mlp"}),
    "inserted": (lambda m: m.insert(1, nn.LayerNorm(17)), {"linear_act"}),
    "deleted": (lambda m: m.pop(3), {"mlp"}),
    "no-biases": (no_biases, {"mlp"}),
    "plain-weight": (lambda m: m[0].__dict__.update(weight=m[0]._parameters.pop("weight").detach()), {"linear_act"}),
    "own-forward": (lambda m: setattr(m[3], "forward", torch.cos), {"mlp"}),
    "hidden-weight": (lambda m: m[0].__dict__.update(weight=torch.ones(17, 5)), {"linear_act"}),
    # Of what follows torch's compiler takes no notice, unless it is told to begin anew.
    "hook": (lambda m: m[1].register_forward_hook(lambda m, args, y: 2 * y), {"linear_act"}),
    "hook-in-a-new-dict": (
        lambda m: m[0].__dict__.update(_forward_pre_hooks=OrderedDict({0: lambda m, args: (2 * args[0],)})),
        {"linear_act"},
    ),
}


FIRST = ("replaced", "hook", "own-forward", "hidden-weight")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FIRST else pytest.mark.more) for name in CHANGES]
)
def test_a_compiled_module_notices_what_changes(name, chip):
    change, held = CHANGES[name]
    model = MLP([5, 17, 3], "tanh", "sigmoid").to(DEVICE)
    twin = nn.Sequential(*(copy.deepcopy(module) for module in model))
    x = torch.randn(4, 5, device=DEVICE)
    record = AotEagerAndRecordGraphs()
    compiled, other = torch.compile(model, backend=record), torch.compile(twin, backend="eager")
    torch.testing.assert_close(compiled(x), other(x), rtol=1e-4, atol=1e-5)
    assert names(record) == {"mlp"}
    for net in (model, twin):
        change(net)
    # Or what the change makes of it: from torch 2.14 on the compiler notices hooks that ours asks for, and not its own.
    expected = [net(x) for net in (other, twin)]
    close = [torch.allclose(compiled(x), y, rtol=1e-4, atol=1e-5) for y in expected]
    assert any(close), (compiled(x), expected)
    torch._dynamo.reset()
    record.fw_graphs.clear()
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-5)
    assert names(record) == held


class Doubles(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        return 2 * y if function is F.linear else y


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["from-the-first-call", "later"])
@pytest.mark.parametrize("make", [lambda: MLP([5, 17, 3]), lambda: LinearSigmoid(5, 3)], ids=["mlp", "layer"])
def test_modes_see_the_functions_of_compiled_modules(make, first, chip):
    model, x = make().to(DEVICE), torch.randn(4, 5, device=DEVICE)
    compiled = torch.compile(model, backend="aot_eager")
    if not first:
        compiled(x)
    with Doubles():
        torch.testing.assert_close(compiled(x), model(x))
    with torch.device(DEVICE):  # a mode too, which watches nothing
        record = AotEagerAndRecordGraphs()
        torch._dynamo.reset()
        torch.compile(model, backend=record)(x)
    assert names(record) == ({"mlp"} if isinstance(model, MLP) else {"linear_act"})


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight):
        self.calls.add_(1)
        return 2 * weight


@pytest.mark.slow
def test_a_parametrization_is_computed_once_a_call(chip):
    model = fused(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh()).to(DEVICE)
    counting = Counting().to(DEVICE)
    nn.utils.parametrize.register_parametrization(model[2], "weight", counting, unsafe=True)
    x = torch.randn(2, 5, device=DEVICE)
    compiled, counted = torch.compile(model, backend="eager"), counting.calls.item()
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x))
    assert counting.calls.item() - counted == 6
