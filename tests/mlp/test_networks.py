# SPDX-License-Identifier: Apache-2.0
"""mlp_act, the fused cross entropy and MLP: every path of a whole network, autograd, and what torch builds on top."""

import functools
import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ACTIVATIONS,
    DTYPES,
    IDS,
    assert_as_good_as_the_worst,
    assert_same,
    conjugated,
    every_other,
    inside,
    kernel_device,
    make_network,
    negated,
    nothing_is_small,
    one_row,
    one_value,
    relative_error,
    same_bits,
    second_order,
    torch_bce,
    transposed,
    twins,
    written,
)
from cases import plain_network as plain
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from perceptriton.kernels import Device, MlpExplanation, eligibility, explain, ops, reference
from perceptriton.kernels import plan as planning
from perceptriton.kernels.records import MlpPlan, MlpSegment, MlpTile, Plan
from perceptriton.mlp import MLP, LinearSigmoidBCELoss, linear_sigmoid_bce, mlp_act, mlp_sigmoid_bce

KERNELS = kernel_device()
DEVICE = KERNELS or "cpu"
# torch itself uses what it deprecates when it differentiates forward.
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.gpu,
    pytest.mark.usefixtures("rounding"),
    pytest.mark.filterwarnings(r"ignore:.*torch\.jit\."),
]

WIDTHS = {"xor": (2, 2, 1), "deep": (7, 33, 20, 16, 3), "wide": (20, 40, 40)}


@pytest.fixture
def rounding(request):
    request.getfixturevalue("device" if KERNELS else "poisoned")


def explicit(chunk):
    def plans(layers):
        own = (Plan("explicit", "the test says so"),) * layers
        return MlpPlan("explicit", "", layers=own), MlpPlan("explicit", "", layers=own, chunk=chunk)

    return plans


def fused(cuts):
    def plans(layers):
        ends = range(layers + 1) if cuts else (0, layers)
        segments = tuple(MlpSegment(*pair, MlpTile(16, 4, 1), 3) for pair in itertools.pairwise(ends))
        return (MlpPlan("fused", "", segments),) * 2

    return plans


# For a number of layers the plans forward and back, and the impl to ask for.
PATHS = {
    "aten": (lambda layers: (MlpPlan("aten", ""),) * 2, None),
    "layers": (lambda layers: (MlpPlan("layers", ""),) * 2, None),
    "explicit": (explicit(0), None),
    "chunked": (explicit(7), None),
    "kernel": (fused(False), "triton"),
    "segments": (fused(True), "triton"),
}
# Where kernels run, their paths; elsewhere those of a CPU.
PATHS = {name: path for name, path in PATHS.items() if (path[1] == "triton") == (KERNELS is not None)}
OWN = [name for name in PATHS if name not in ("aten", "layers")]  # what has a backward pass of its own
WHOLE = OWN[0]


def paths(*names):
    return [name for name in names if name in PATHS]


@pytest.fixture
def take(monkeypatch):
    """take(path): whole networks go that way whatever their size, and the impl to ask for."""

    def take(path):
        make, impl = PATHS[path]

        def plans(x, weights, training, loss=False, impl=None):
            forward, backward = make(len(weights))
            return planning.MlpPlans(forward, backward if training else None)

        monkeypatch.setattr(ops, "mlp_plans", plans)
        nothing_is_small(monkeypatch)
        return impl

    return take


@pytest.fixture(autouse=True)
def impl(request, take):
    """The impl to ask for, where a test has a path: its networks go that way."""
    return take(request.getfixturevalue("path")) if "path" in request.fixturenames else None


class Net:
    """x, weights, biases (None without), dy: pre-activations of std 1 to 2, upstream gradients of order 1."""

    def __init__(self, widths=WIDTHS["deep"], m=40, dtype=torch.float32, bias=True, leading=None):
        self.dtype, leading = dtype, (m,) if leading is None else leading
        self.x, self.weights, biases, self.dy = make_network(widths, leading, dtype, DEVICE)
        self.biases = biases if bias else None

    @property
    def tensors(self):
        return [self.x, *self.weights, *(self.biases or ())]

    def split(self, tensors):
        x, *parameters = tensors
        layers = len(self.weights)
        return x, parameters[:layers], parameters[layers:] or None


def differentiate(net, network, dy=None, dtype=None):
    """y and the gradients of x and of every parameter."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in net.tensors]
    y = network(*net.split(inputs))
    dy = net.dy if dy is None else dy
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def check(net, ours, theirs=plain, dy=None):
    actual, expected = differentiate(net, ours, dy), differentiate(net, theirs, dy)
    exact = differentiate(net, theirs, dy, torch.float64)
    layers = len(net.weights)
    names = ["y", "dx", *["dweight"] * layers, *["dbias"] * (layers if net.biases else 0)]
    kinds = {name: [] for name in names}
    for name, *tensors in zip(names, actual, expected, exact, strict=True):
        assert tensors[0].dtype is tensors[1].dtype, name
        kinds[name].append(tensors)
    assert_as_good_as_the_worst(kinds, net.dtype)


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("path", PATHS)
def test_as_good_as_torch(path, widths, dtype, bias, impl):
    check(Net(WIDTHS[widths], dtype=dtype, bias=bias), lambda *net: mlp_act(*net, impl=impl))


@pytest.mark.parametrize(("hidden", "output"), [*itertools.product(ACTIVATIONS, ACTIVATIONS)], ids=str)
@pytest.mark.core
@pytest.mark.parametrize("path", paths("chunked", "segments"))
def test_activations(path, hidden, output, impl):
    net = Net((7, 20, 5, 3), m=20)
    check(net, lambda *net: mlp_act(*net, hidden, output, impl=impl), lambda *net: plain(*net, hidden, output))


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_any_leading_shape(path, leading, impl):
    net = Net((7, 20, 3), leading=leading)
    torch.testing.assert_close(
        differentiate(net, lambda *net: mlp_act(*net, impl=impl)), differentiate(net, plain), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "layout", [every_other, inside, transposed, one_row, one_value, negated, conjugated], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("operand", ["x", "weight", "bias", "dy"])
@pytest.mark.parametrize("path", OWN)
def test_layouts(path, operand, layout, impl):
    if operand == "bias" and layout is transposed:
        pytest.skip("a vector has no transpose")
    net = Net((7, 20, 3))
    if operand in ("x", "dy"):
        setattr(net, operand, layout(getattr(net, operand)))
    else:
        tensors = net.weights if operand == "weight" else net.biases
        tensors[1] = layout(tensors[1])
    # detach() keeps strides; the gradient of an expanded parameter is that of its elements one by one
    check(net, lambda *net: mlp_act(*net, impl=impl))


@pytest.mark.parametrize("loss", ["activation", "bce"])
@pytest.mark.parametrize("path", OWN)
def test_gradients_that_come_through_complex_numbers(path, loss, impl):
    # They are negative views: only who asks knows that memory holds -dy.
    net = Net((7, 20, 3))
    target, other = torch.rand(40, 3, device=DEVICE), torch.randn(40, 3, dtype=torch.complex64, device=DEVICE)
    results = []
    for ours in (True, False):
        inputs = [t.detach().requires_grad_() for t in net.tensors]
        if loss == "bce":
            network = bce(target, reduction="none", impl=impl) if ours else plain_bce(target, reduction="none")
        else:
            network = functools.partial(mlp_act, impl=impl) if ours else plain
        y = network(*net.split(inputs))
        seen = []
        y.register_hook(lambda dy, seen=seen: seen.append(dy.is_neg()))
        (torch.complex(torch.zeros_like(y), y).conj() * other).real.sum().backward()
        assert seen == [True]
        results.append([t.grad for t in inputs])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", OWN)
def test_inputs_are_left_alone(path, impl):
    net = Net()
    inputs = [t.requires_grad_() for t in net.tensors]
    before = [t.detach().clone() for t in (*inputs, net.dy)]
    y = mlp_act(*net.split(inputs), impl=impl)
    output = y.detach().clone()
    first = torch.autograd.grad(y, inputs, net.dy, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(y, inputs, net.dy)
    assert same_bits((*inputs, net.dy, y, *first), (*before, output, *copies))
    assert same_bits(first, second)


WANTED = {
    "x": lambda l: (True, [False] * l, [False] * l),
    "parameters": lambda l: (False, [True] * l, [True] * l),
    "last-layer": lambda l: (False, [i == l - 1 for i in range(l)], [i == l - 1 for i in range(l)]),
    "biases": lambda l: (False, [False] * l, [True] * l),
    "middle-weight": lambda l: (False, [i == 1 for i in range(l)], [False] * l),
}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("path", OWN)
def test_only_what_is_wanted(path, wanted, impl, monkeypatch):
    net = Net()
    need_x, need_weights, need_biases = wanted(len(net.weights))
    flags = [need_x, *need_weights, *need_biases]
    asked = []
    for name in ("mlp_bwd", "mlp_bwd_call"):  # a whole network's node decides for itself what runs
        backward = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, backward=backward: asked.append(a[7]) or backward(*a))
    everything = differentiate(net, plain)[1:]
    inputs = [t.detach().requires_grad_(flag) for t, flag in zip(net.tensors, flags, strict=True)]
    mlp_act(*net.split(inputs), impl=impl).backward(net.dy)
    assert asked == [(need_x, tuple(need_weights), tuple(need_biases))]
    expected = [e if flag else None for e, flag in zip(everything, flags, strict=True)]
    torch.testing.assert_close([t.grad for t in inputs], expected, rtol=1e-4, atol=1e-4)


def forwards(monkeypatch):
    """What the forward passes return that run from now on, of networks that run as a whole."""
    calls, forward, decide = [], ops.mlp_fwd, ops.mlp_fwd_call

    def seen(call):
        return lambda *a: calls.append(call(*a)) or calls[-1]

    monkeypatch.setattr(ops, "mlp_fwd", seen(forward))
    monkeypatch.setattr(ops, "mlp_fwd_call", lambda *a: seen(decide(*a)))
    return calls


@pytest.mark.parametrize("path", OWN)
def test_inference_saves_nothing(path, impl, monkeypatch):
    net = Net()
    calls = forwards(monkeypatch)
    inputs = [t.requires_grad_() for t in net.tensors]
    with torch.no_grad():
        y = mlp_act(*net.split(inputs), impl=impl)
    assert [saved for _, saved in calls] == [()]
    assert not y.requires_grad
    assert relative_error(y, plain(*net.split([t.detach().double() for t in inputs]))) < 1e-6


def test_wrong_results_are_refused():
    net = Net()
    with pytest.raises(AssertionError, match="y"):
        check(net, lambda x, weights, biases: plain(x, weights, biases) + 0.01)
    with pytest.raises(AssertionError, match="dx"):
        check(net, lambda x, weights, biases: plain(x.detach() + 0 * x, weights, biases))


# --- a chain of pieces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gemm", ["mm", "onednn", "shared"] if DEVICE == "cpu" else ["mm"])
@pytest.mark.parametrize("need_dx", [True, False], ids=["dx", "no-dx"])
@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 1000])
def test_pieces_change_nothing(chunk, need_dx, gemm, monkeypatch):
    net = Net()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # whatever this machine has
    choices = {"mm": {}, "onednn": {"dx_gemm": "onednn", "dweight_gemm": "onednn"}, "shared": {"split_rows": 2}}
    plan = MlpPlan("explicit", "", layers=(Plan("explicit", "", **choices[gemm]),) * 4, chunk=chunk)
    y, saved = reference.mlp_fwd(net.x, net.weights, net.biases, "sigmoid", "tanh", plan, plan.boundaries)
    wanted = (need_dx, (True,) * 4, (True,) * 4)
    dx, dweights, dbiases = reference.mlp_bwd(net.dy, net.x, saved, net.weights, "sigmoid", "tanh", wanted, plan)
    expected = differentiate(net, lambda *net: plain(*net, "sigmoid", "tanh"))
    assert (dx is not None) == need_dx
    actual = [y, dx if need_dx else expected[1], *dweights, *dbiases]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_sums_over_pieces_stay_in_fp32():
    # 4,096 times 2^-8: a sum in bf16 stops growing at 1.
    dy = torch.full((4096, 2), 2.0**-8, dtype=torch.bfloat16)
    x, weights = torch.ones(4096, 2, dtype=torch.bfloat16), [torch.eye(2, dtype=torch.bfloat16)] * 2
    plan = MlpPlan("explicit", "", layers=(Plan("explicit", ""),) * 2, chunk=1)
    _, saved = reference.mlp_fwd(x, weights, None, "identity", "identity", plan, plan.boundaries)
    wanted = (False, (True, True), (True, True))
    _, dweights, dbiases = reference.mlp_bwd(dy, x, saved, weights, "identity", "identity", wanted, plan)
    assert all((gradient == 16).all() for gradient in (*dweights, *dbiases))


@pytest.mark.parametrize("path", OWN)
def test_dead_units_stop_infinite_gradients(path, impl):
    """torch's relu selects: where its output is 0, nothing is left of a gradient, and NaN passes one on."""
    net = Net((4, 8, 8, 3), m=12)
    net.biases[-1] = torch.tensor([-50.0, 50.0, 1.0], device=DEVICE)  # dead everywhere, alive everywhere
    net.biases[0][2] = -50.0
    net.dy[:, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan], device=DEVICE).repeat(4)
    actual, expected = (
        differentiate(net, lambda *net, network=network: network(*net, "relu", "relu"))
        for network in (lambda *net: mlp_act(*net, impl=impl), plain)
    )
    assert all(t.isfinite().all() for t in expected)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# --- autograd ----------------------------------------------------------------------------------------------------


def penalty(net, network):
    """A loss on the gradient with respect to x, differentiated once more with respect to everything."""
    inputs = [t.detach().requires_grad_() for t in net.tensors]
    y = network(*net.split(inputs))
    gradients = torch.autograd.grad((y * net.dy).sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)


@pytest.mark.parametrize("path", OWN)
def test_second_order(path, impl):
    net = Net((5, 8, 6, 2), m=12)
    actual = penalty(net, lambda *net: mlp_act(*net, "sigmoid", "tanh", impl=impl))
    torch.testing.assert_close(actual, penalty(net, lambda *net: plain(*net, "sigmoid", "tanh")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", OWN)
def test_a_weight_that_is_used_twice_or_depends_on_x(path, impl):
    net = Net((6, 6, 6), m=12)

    def tied(network):
        def call(x, weights, biases):
            own = weights[0] + 0.1 * x.mean(0)
            return network(x, [own, own], [biases[0], biases[0]])

        return call

    ours, theirs = tied(lambda *net: mlp_act(*net, impl=impl)), tied(plain)
    for order in (differentiate, penalty):
        inputs = [net.x, *net.weights[:1], *net.biases[:1]]
        small = types.SimpleNamespace(tensors=inputs, dy=net.dy, split=lambda t: (t[0], [t[1]], [t[2]]))
        torch.testing.assert_close(order(small, ours), order(small, theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", paths("aten", "explicit", "kernel"))
def test_fp64_is_exact_to_second_order(path, impl):
    net = Net((3, 4, 2), m=3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in net.tensors]

    def network(*tensors):
        return mlp_act(*net.split(tensors))

    assert torch.autograd.gradcheck(network, inputs)
    assert torch.autograd.gradgradcheck(network, inputs)
    if impl == "triton":
        with pytest.raises(NotImplementedError, match=r"x is torch\.float64"):
            mlp_act(*net.split(inputs), impl=impl)


@pytest.mark.parametrize("path", OWN)
def test_checkpoint(path, impl):
    # It unpacks what was saved once only.
    net = Net((5, 8, 3), m=6)
    target = torch.rand(6, 3, device=DEVICE)
    for network, dy in (
        (lambda *net: mlp_act(*net, impl=impl), net.dy),
        (lambda *net: mlp_sigmoid_bce(*net, target, impl=impl), torch.tensor(0.7, device=DEVICE)),
    ):
        net.dy = dy
        expected = differentiate(net, network)
        actual = differentiate(net, lambda *net, network=network: checkpoint(network, *net, use_reentrant=False))
        assert same_bits(actual, expected)


@pytest.mark.parametrize("path", OWN)
def test_batched_backward(path, impl):
    net = Net((5, 8, 3), m=6)
    inputs = [t.requires_grad_() for t in net.tensors]
    dy = torch.randn(4, 6, 3, device=DEVICE)
    actual, expected = (
        torch.autograd.grad(y, inputs, dy, is_grads_batched=True)
        for y in (mlp_act(*net.split(inputs), impl=impl), plain(*net.split(inputs)))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", OWN)
def test_forward_over_backward(path, impl):
    net = Net((5, 8, 3), m=6)
    inputs = [t.requires_grad_() for t in net.tensors]
    dy = torch.randn(2, 6, 3, device=DEVICE)
    found = []
    for y in (mlp_act(*net.split(inputs), impl=impl), plain(*net.split(inputs))):
        pull = functools.partial(torch.autograd.grad, y, inputs, retain_graph=True)
        with forward_ad.dual_level():
            found.append([forward_ad.unpack_dual(g).tangent for g in pull(forward_ad.make_dual(*dy))])
        found.append([*torch.func.jvp(pull, (dy[0],), (dy[1],))[1]])
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", OWN)
def test_transforms(path):
    net = Net((5, 8, 3), m=6)
    x, weights, biases = net.split(net.tensors)

    def loss(x, network):
        return (network(x, weights, biases) * net.dy[0]).sum()

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        actual, expected = (transform(lambda x, n=n: loss(x, n))(x[0]) for n in (mlp_act, plain))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    actual, expected = (torch.func.vmap(lambda x, n=n: n(x, weights, biases))(x) for n in (mlp_act, plain))
    torch.testing.assert_close(actual, expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        actual, expected = (forward_ad.unpack_dual(n(dual, weights, biases)) for n in (mlp_act, plain))
        torch.testing.assert_close(actual.tangent, expected.tangent)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=IDS.get)
@pytest.mark.parametrize("path", PATHS)
def test_autocast(path, parameters, impl):
    net = Net(dtype=parameters)
    net.x = net.x.float()
    inputs = [t.detach().requires_grad_() for t in net.tensors]
    with torch.autocast(DEVICE, torch.bfloat16):
        y, expected = mlp_act(*net.split(inputs), impl=impl), plain(*net.split(inputs))
        assert y.dtype is expected.dtype is torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
        gradients = torch.autograd.grad(y, inputs, net.dy.bfloat16())
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
    for g, e in zip(gradients, torch.autograd.grad(expected, inputs, net.dy.bfloat16()), strict=True):
        assert relative_error(g, e) < 0.05


@pytest.mark.parametrize("path", OWN)
def test_two_forwards_then_a_joint_backward(path, impl):
    net = Net()
    inputs = [t.requires_grad_() for t in net.tensors]
    x, weights, biases = net.split(inputs)
    y = mlp_act(x, weights, biases, impl=impl) * mlp_act(2 * x, weights, biases, impl=impl)
    expected = plain(x, weights, biases) * plain(2 * x, weights, biases)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, net.dy), torch.autograd.grad(expected, inputs, net.dy), rtol=1e-4, atol=1e-4
    )


# (operand, whether x wants a gradient): whether torch's own operations need it
WRITTEN = {
    "x": ("x", True, True),
    "first-weight": ("weight", True, True),
    "first-weight-without-dx": ("weight", False, False),
    "bias": ("bias", True, False),
    "output": ("y", True, True),
}


@pytest.mark.parametrize(("operand", "need_dx", "needed"), WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("path", paths("aten", "explicit", "chunked", "kernel"))
def test_what_gradients_need_may_not_be_written_over(path, operand, need_dx, needed, impl):
    net = Net()
    expected = differentiate(net, plain)[1:]
    inputs = [t.detach().clone().requires_grad_() for t in net.tensors]
    x, weights, biases = net.split(inputs)
    x.requires_grad_(need_dx)
    y = mlp_act(x, weights, biases, impl=impl)
    with torch.no_grad():
        {"x": x, "weight": weights[0], "bias": biases[0], "y": y}[operand].add_(1)
    if impl == "triton":
        # Kernels compute the activations again: from all inputs, and they keep no output.
        needed = operand != "y"
    if needed:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(net.dy)
        return
    for _ in range(2):
        y.backward(net.dy, retain_graph=True)
        for t, e in zip(inputs[not need_dx :], expected[not need_dx :], strict=True):
            torch.testing.assert_close(t.grad, e, rtol=1e-4, atol=1e-5)
            t.grad = None


@pytest.mark.parametrize("path", paths("explicit", "chunked"))
def test_second_order_after_a_bias_was_written_over(path):
    # Of what was saved, not of what a second forward pass would make of the parameters as they are now.
    net = Net((5, 8, 6, 2), m=12)
    results = []
    for network in (mlp_act, plain):
        inputs = [t.detach().clone().requires_grad_() for t in net.tensors[1:]]
        x, weights, biases = net.split([net.x, *inputs])
        y = network(x, weights, biases)
        with torch.no_grad():
            biases[0].add_(1)
            weights[0].mul_(2)
        gradients = torch.autograd.grad((y * net.dy).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


KEEPS = {
    # of x, weights, hidden outputs and y: which are kept
    "everything": (lambda l: (True, [True] * l, [True] * l), "tanh", (True, "1111", "111", True)),
    "parameters": (WANTED["parameters"], "tanh", (True, "0111", "111", True)),
    "x": (WANTED["x"], "tanh", (False, "1111", "111", True)),
    "x-of-a-bare-network": (WANTED["x"], "identity", (False, "1111", "111", False)),
    "biases": (WANTED["biases"], "tanh", (False, "0111", "111", True)),
    "last-layer": (WANTED["last-layer"], "identity", (False, "0000", "001", False)),
    "middle-weight": (WANTED["middle-weight"], "tanh", (False, "0011", "111", True)),
    "last-bias": (lambda l: (False, [False] * l, [i == l - 1 for i in range(l)]), "tanh", (False, "0000", "000", True)),
}


@pytest.mark.parametrize(("wanted", "output", "keeps"), KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("path", paths("explicit", "chunked"))
def test_keeps_only_what_gradients_need(path, wanted, output, keeps):
    net = Net()
    need_x, need_weights, need_biases = wanted(len(net.weights))
    for t, flag in zip(net.tensors, (need_x, *need_weights, *need_biases), strict=True):
        t.requires_grad_(flag)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = mlp_act(net.x, net.weights, net.biases, "sigmoid", output)
    addresses = [t.data_ptr() for t in kept]
    keep_x, keep_weights, keep_hs, keep_y = keeps
    assert (net.x.data_ptr() in addresses) == keep_x
    assert [w.data_ptr() in addresses for w in net.weights] == [flag == "1" for flag in keep_weights]
    assert (y.data_ptr() in addresses) == keep_y
    assert len(kept) == keep_x + keep_weights.count("1") + keep_hs.count("1") + keep_y


@pytest.mark.parametrize("gradients", [True, False], ids=["", "no-gradients"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_outputs_may_be_written_to(path, leading, gradients, impl):
    net = Net((7, 20, 3), leading=leading)
    results = []
    for network in (functools.partial(mlp_act, impl=impl), plain):
        inputs = [t.detach().requires_grad_(gradients) for t in net.tensors]
        y = written(network(*net.split(inputs), "relu", "identity"))
        results.append([y])
        if gradients:
            results[-1] += second_order(y, inputs, net.dy)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_losses_may_be_written_to(path, leading, impl):
    net = Net((7, 20, 3), leading=leading)
    target, ignored = torch.rand(*leading, 3, device=DEVICE), torch.rand(*leading, 3, device=DEVICE) < 0.5

    def masked(loss):
        def network(*net):
            values = loss(*net)
            values[ignored] = 0
            return values.mul_(2)

        return network

    losses = bce(target, reduction="none", impl=impl), plain_bce(target, reduction="none")
    torch.testing.assert_close(*(differentiate(net, masked(loss)) for loss in losses), rtol=1e-4, atol=1e-5)


# torch broadcasts such a bias; kernels would read behind it.
BROADCAST = {"one": (1,), "no-dimensions": (), "row": (1, 20)}


@pytest.mark.parametrize("shape", BROADCAST.values(), ids=BROADCAST)
@pytest.mark.parametrize("path", PATHS)
def test_a_bias_that_torch_broadcasts(path, shape, impl, monkeypatch):
    net = Net((7, 20, 3))
    net.biases[0] = torch.full(shape, 0.5, device=DEVICE)
    target = torch.rand_like(net.dy)
    ours, theirs = bce(target), plain_bce(target)
    results = []
    for large in (True, False):
        if not large:
            monkeypatch.undo()
        results += [differentiate(net, mlp_act), differentiate(net, ours, torch.ones((), device=DEVICE))]
    expected = [differentiate(net, plain), differentiate(net, theirs, torch.ones((), device=DEVICE))]
    torch.testing.assert_close(results, 2 * expected)
    if impl == "triton":
        with pytest.raises(NotImplementedError, match=r'^impl="triton": biases\[0\] \(.*\) is not the out_features'):
            mlp_act(net.x, net.weights, net.biases, impl=impl)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler itself uses what torch deprecates
@pytest.mark.parametrize("shape", BROADCAST.values(), ids=BROADCAST)
def test_a_compiled_network_broadcasts_a_bias(shape, monkeypatch):
    monkeypatch.setattr(eligibility, "launchable", lambda device, dtype: True)
    torch.compiler.reset()
    net = Net((7, 20, 3))
    net.biases[0] = torch.full(shape, 0.5, device=DEVICE)
    compiled = torch.compile(mlp_act, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(differentiate(net, compiled), differentiate(net, plain))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler itself uses what torch deprecates
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic):
    torch.compiler.reset()
    net = Net((7, 20, 3))
    network = functools.partial(mlp_act, impl=None if KERNELS is None else "triton")
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(differentiate(net, compiled), differentiate(net, plain), rtol=1e-4, atol=1e-5)


# --- MLP ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(monkeypatch, take):
    """The networks that ran as a whole, as all do that can."""
    take(WHOLE)
    return forwards(monkeypatch)


def model_pair(sizes=(4, 8, 3), **options):
    return twins(*sizes, device=DEVICE, **options)


def same(model, twin):
    assert_same(model, twin, rtol=1e-4, atol=1e-5)


def test_a_model_runs_as_a_whole(whole):
    for options in ({}, {"bias": False}, {"activation": "tanh", "output_activation": "identity"}):
        same(*model_pair(**options))
    assert len(whole) == 3


# test_layers.py tries hooks of every kind.
def test_a_model_with_a_hook_runs_layer_by_layer_until_it_is_removed(whole):
    model, twin = model_pair()
    seen = []
    handle = model[2].register_forward_hook(lambda *_: seen.append(1))
    same(model, twin)
    handle.remove()
    assert seen
    assert not whole
    same(model, twin)
    assert len(whole) == 1


def test_a_parametrized_or_mixed_model_runs_layer_by_layer(whole):
    model, twin = model_pair()
    for net in (model, twin):
        nn.utils.parametrizations.weight_norm(net[2])
    same(model, twin)
    half, twin = model_pair()
    half[2].bias = twin[2].bias = None
    same(half, twin)
    assert all(len(weights) == 1 for _, weights, *_ in whole)


# --- plans and errors ---------------------------------------------------------------------------------------------


def test_plans_of_networks_on_a_cpu():
    small = explain((4, 2), [(10, 2), (10, 10), (1, 10)])
    assert isinstance(small, MlpExplanation)
    assert {plan.impl for plan in small} == {"aten"}
    large = explain((65536, 64), [(64, 64)] * 3)
    assert [plan.impl for plan in large] == ["explicit"] * 3
    assert large.backward.boundaries == (1, 2, 3)
    assert {plan.impl for plan in explain((65536, 64), [(64, 64)])} == {"layers"}
    assert {plan.impl for plan in explain((0, 64), [(64, 64)] * 2)} == {"layers"}
    assert {plan.impl for plan in explain((8, 64), [(64, 64)] * 2, torch.float64)} == {"layers"}
    assert str(large).splitlines()[2].startswith("backward  explicit  ")


def test_plans_of_networks_on_a_gpu():
    h200 = Device("cuda", arch=90, units=132, triton=True)
    plans = explain((1 << 20, 64), [(64, 64)] * 5, torch.bfloat16, h200)
    assert [plan.impl for plan in plans] == ["fused"] * 3
    assert len(plans.inference.segments) == 1
    assert len(plans.backward.segments) == 3
    assert {plan.impl for plan in explain((128, 784), [(128, 784), (10, 128)], torch.bfloat16, h200)} == {"layers"}
    # Either both directions of a training step run as a whole, or neither.
    wide = explain((1 << 20, 64), [(64, 64)] * 2, torch.float32, h200)
    assert [plan.impl for plan in wide] == ["fused", "layers", "layers"]
    with pytest.raises(NotImplementedError, match="784"):
        explain((128, 784), [(128, 784), (10, 128)], torch.bfloat16, h200, impl="triton")
    with pytest.raises(ValueError, match="does not fit"):
        explain((128, 7), [(8, 7), (10, 9)])


W, B = [torch.ones(3, 5), torch.ones(2, 3)], [torch.ones(3), torch.ones(2)]
X = torch.ones(4, 5)
ERRORS = {
    "x-type": (([[1.0]], W, B), TypeError, "x must be a Tensor, not list"),
    "x-shape": ((X[:, :2], W, B), ValueError, r"x \(4, 2\) does not end in the in_features of weights\[0\] \(3, 5\)"),
    "chain": (
        (X, [W[0], W[0]], B),
        ValueError,
        r"weights\[1\] \(3, 5\) does not take the out_features of weights\[0\]",
    ),
    "weight-type": ((X, [W[0], None], B), TypeError, r"weights\[1\] must be a Tensor, not NoneType"),
    "weights-type": ((X, W[0], B), TypeError, "weights must be a sequence of Tensors, not Tensor"),
    "no-weights": ((X, [], None), ValueError, "weights must hold at least one Tensor, not 0"),
    "biases-count": ((X, W, B[:1]), ValueError, "biases holds 1 Tensors, but weights 2"),
    "bias-shape": ((X, W, [B[0], B[0]]), ValueError, r"biases\[1\] \(3,\) is not the out_features of weights\[1\]"),
    "dtype": ((X, [W[0], W[1].double()], B), ValueError, r"weights\[1\] is torch.float64, but x torch.float32"),
    "biases-type": ((X, W, torch.ones(2)), TypeError, "biases must be a sequence of Tensors, not Tensor"),
    "device": ((X, [W[0], W[1].to("meta")], [B[0][:1], B[1]]), ValueError, r"weights\[1\] is on meta, but x on cpu"),
    "bias-matrix": ((X, W, [torch.ones(2, 3), B[1]]), ValueError, r"biases\[0\] \(2, 3\) is not the out_features of"),
    "activation": ((X, W, B, "gelu"), ValueError, "activation must be one of .*, not 'gelu'"),
    "output": ((X, W, B, "sigmoid", "gelu"), ValueError, "activation must be one of .*, not 'gelu'"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        mlp_act(*arguments)


def test_impl():
    with pytest.raises(ValueError, match=r"impl must be one of .*, not 'cuda'"):
        mlp_act(X, W, B, impl="cuda")
    torch.testing.assert_close(mlp_act(X, W, B, impl="torch"), plain(X, W, B))
    if KERNELS is None:
        for call in (mlp_act, functools.partial(mlp_sigmoid_bce, target=torch.ones(4, 2))):
            with pytest.raises(NotImplementedError, match="interpreter"):
                call(X, W, B, impl="triton")


# --- binary cross entropy ----------------------------------------------------------------------------------------


def bce(target, pos_weight=None, reduction="mean", impl=None):
    return functools.partial(mlp_sigmoid_bce, target=target, pos_weight=pos_weight, reduction=reduction, impl=impl)


def plain_bce(target, *head, **options):
    return lambda *net: torch_bce(plain(*net, output="identity"), target, *head, **options)


BCE_PATHS = paths("aten", "layers", "explicit", "kernel", "segments")


@pytest.mark.parametrize("weighted", [False, True], ids=["", "pos_weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize("path", BCE_PATHS)
def test_bce(path, dtype, reduction, weighted, impl):
    net = Net((7, 20, 3), dtype=dtype)
    target = torch.rand(40, 3, device=DEVICE).to(dtype)
    pos_weight = torch.tensor([0.3, 1.0, 8.0], device=DEVICE, dtype=dtype) if weighted else None
    dy = net.dy if reduction == "none" else torch.tensor(0.7, device=DEVICE)
    options = (target, pos_weight, reduction)
    check(net, bce(*options, impl), plain_bce(*options), dy)


@pytest.mark.parametrize("layout", [negated, conjugated], ids=lambda f: f.__name__)
@pytest.mark.parametrize("operand", ["x", "weight", "bias", "target", "pos_weight", "dloss"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("path", paths("explicit", "kernel", "segments"))
def test_bce_of_negative_views(path, reduction, operand, layout, impl):
    net = Net((7, 20, 3))
    head = {
        "target": torch.rand(40, 3, device=DEVICE),
        "pos_weight": torch.tensor([0.3, 1.0, 8.0], device=DEVICE),
        "dloss": net.dy if reduction == "none" else torch.tensor(0.7, device=DEVICE),
    }
    if operand in head:
        head[operand] = layout(head[operand])
    elif operand == "x":
        net.x = layout(net.x)
    else:
        tensors = net.weights if operand == "weight" else net.biases
        tensors[:] = map(layout, tensors)
    options = (head["target"], head["pos_weight"], reduction)
    check(net, bce(*options, impl), plain_bce(*options), head["dloss"])


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("path", BCE_PATHS)
def test_bce_has_the_dtype_of_torch(path, autocast, target_dtype, impl):
    net = Net((7, 20, 3))
    target = torch.rand(40, 3, device=DEVICE).to(target_dtype)
    if target_dtype is torch.float64 and impl == "triton":
        with pytest.raises(NotImplementedError, match=r"target is torch\.float64"):
            bce(target, impl=impl)(*net.split(net.tensors))
        impl = None
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss = bce(target, impl=impl)(*net.split(net.tensors))
        z = plain(*net.split(net.tensors), output="identity")
        expected = F.binary_cross_entropy_with_logits(z, target)
    assert loss.dtype is expected.dtype
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("path", BCE_PATHS)
def test_bce_second_order(path, impl):
    net = Net((5, 8, 2), m=12)
    target = torch.rand(12, 2, device=DEVICE)
    net.dy = torch.tensor(0.7, device=DEVICE)
    options = (target, torch.tensor([0.5, 3.0], device=DEVICE), "sum")
    torch.testing.assert_close(
        penalty(net, bce(*options, impl)), penalty(net, plain_bce(*options)), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("path", paths("explicit", "kernel"))
def test_gradients_of_targets(path):
    # Nobody's fast path, but nobody's zero either.
    net = Net((5, 8, 2), m=12)
    target = torch.rand(12, 2, device=DEVICE, requires_grad=True)
    pos_weight = torch.tensor([0.5, 3.0], device=DEVICE)
    losses = (make(target, pos_weight)(*net.split(net.tensors)) for make in (bce, plain_bce))
    torch.testing.assert_close(*(torch.autograd.grad(loss, target) for loss in losses))


@pytest.mark.parametrize("path", paths("aten", "kernel"))
def test_bce_leading_shapes(path, impl):
    for leading in ((), (2, 3)):
        x, weight = torch.randn(*leading, 5, device=DEVICE), torch.randn(2, 5, device=DEVICE)
        target = torch.rand(*leading, 2, device=DEVICE)
        for reduction in ("mean", "none"):
            loss = linear_sigmoid_bce(x, weight, None, target, reduction=reduction, impl=impl)
            expected = F.binary_cross_entropy_with_logits(F.linear(x, weight), target, reduction=reduction)
            torch.testing.assert_close(loss, expected)


def test_where_sigmoid_and_bce_differ():
    # The differences that the docstring promises.
    z = torch.tensor([20.0, -120.0, 120.0], device=DEVICE)
    x, one = z[:, None].requires_grad_(), torch.ones(1, 1, device=DEVICE)
    target = torch.tensor([[0.0], [1.0], [1.0]], device=DEVICE)
    loss = linear_sigmoid_bce(x, one, None, target, reduction="none")
    torch.testing.assert_close(loss.flatten(), torch.tensor([20.0, 120.0, 0.0], device=DEVICE))
    (dx,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(dx.flatten(), torch.tensor([1.0, -1.0, 0.0], device=DEVICE))
    other = F.binary_cross_entropy(torch.sigmoid(x), target, reduction="none")
    torch.testing.assert_close(other.flatten(), torch.tensor([100.0, 100.0, 0.0], device=DEVICE))
    (dx,) = torch.autograd.grad(other.sum(), x)
    assert dx.flatten().tolist() == [0.0, 0.0, 0.0]


def test_head_is_a_linear():
    torch.manual_seed(1)
    linear = nn.Linear(5, 2).to(DEVICE)
    torch.manual_seed(1)
    pos_weight = torch.tensor([0.5, 3.0])
    head = LinearSigmoidBCELoss(5, 2, pos_weight=pos_weight, reduction="sum").to(DEVICE)
    assert isinstance(head, nn.Linear)
    assert list(head.state_dict()) == ["weight", "bias"]
    linear.load_state_dict(head.state_dict(), strict=True)
    x, target = torch.randn(7, 5, device=DEVICE), torch.rand(7, 2, device=DEVICE)
    torch.testing.assert_close(head.predict(x), torch.sigmoid(linear(x)))
    criterion = nn.BCEWithLogitsLoss(pos_weight=pos_weight.to(DEVICE), reduction="sum")
    loss, expected = head(x, target), criterion(linear(x), target)
    torch.testing.assert_close(loss, expected)
    actual = torch.autograd.grad(loss, list(head.parameters()))
    torch.testing.assert_close(actual, torch.autograd.grad(expected, list(linear.parameters())))
    with pytest.raises(ValueError, match="reduction must be one of none, mean, sum, not 'max'"):
        LinearSigmoidBCELoss(5, 2, reduction="max")


@pytest.mark.parametrize("sizes", [(4, 1), (4, 8, 3)], ids=str)
def test_loss_of_a_model(sizes, take):
    take(WHOLE)
    model, twin = model_pair(sizes)
    x, target = torch.randn(7, 4, device=DEVICE), torch.rand(7, sizes[-1], device=DEVICE)
    loss = model.bce_loss(x, target, reduction="sum")
    expected = F.binary_cross_entropy(twin(x), target, reduction="sum")
    torch.testing.assert_close(loss, expected)
    actual = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(actual, torch.autograd.grad(expected, list(twin.parameters())), rtol=1e-4, atol=1e-5)


def test_loss_of_a_model_that_has_none():
    x, target = torch.randn(7, 4), torch.rand(7, 3)
    with pytest.raises(NotImplementedError, match="sigmoid"):
        MLP([4, 8, 3], output_activation="identity").bce_loss(x, target)
    model = MLP([4, 8, 3])
    model[2].register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="plain layers"):
        model.bce_loss(x, target)


T = torch.ones(4, 2)
BCE_ERRORS = {
    "target-type": (dict(target=[1.0]), TypeError, "target must be a Tensor, not list"),
    "target-dtype": (dict(target=T.long()), ValueError, r"target must be floating, not torch\.int64"),
    "target-shape": (dict(target=T[:, :1]), ValueError, r"target \(4, 1\) has not the shape of the output \(4, 2\)"),
    "reduction": (dict(target=T, reduction="max"), ValueError, "reduction must be one of none, mean, sum, not 'max'"),
    "pos_weight": (dict(target=T, pos_weight=torch.ones(3)), ValueError, r"pos_weight \(3,\) does not fit the output"),
    "pos_weight-bool": (
        dict(target=T, pos_weight=torch.ones(2).bool()),
        ValueError,
        r"pos_weight must be floating or of integers, not torch\.bool",
    ),
    "pos_weight-complex": (
        dict(target=T, pos_weight=torch.ones(2).cfloat()),
        ValueError,
        r"pos_weight must be floating or of integers, not torch\.complex64",
    ),
    "pos_weight-type": (dict(target=T, pos_weight=2.0), TypeError, "pos_weight must be a Tensor, not float"),
    "weight": (
        dict(target=T, weights=W[::-1]),
        ValueError,
        r"x \(4, 5\) does not end in the in_features of weights\[0\]",
    ),
    "activation": (dict(target=T, activation="gelu"), ValueError, "activation must be one of"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BCE_ERRORS.values(), ids=BCE_ERRORS)
def test_bce_errors(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        mlp_sigmoid_bce(**{"x": X, "weights": W, "biases": B} | arguments)


def test_errors_of_one_layer_name_its_arguments():
    with pytest.raises(ValueError, match=r"^x \(4, 5\) does not end in the in_features of weight \(2, 3\)$"):
        linear_sigmoid_bce(X, W[1], B[1], T)
    with pytest.raises(ValueError, match=r"^bias \(3,\) is not the out_features of weight \(2, 5\)$"):
        linear_sigmoid_bce(X, torch.ones(2, 5), B[0], T)


def test_plans_of_losses():
    h200 = Device("cuda", arch=90, units=132, triton=True)
    for widths, segments in (((2, 2, 1), 1), ((64, 1), 1), ((64, 64, 64, 1), 2)):
        plan = planning.mlp_bwd(4096, widths, "bfloat16", "ieee", h200, loss=True)
        assert (plan.impl, len(plan.segments)) == ("fused", segments)
    # One program covers a small batch: one launch forward, one back.
    plans = [f(4, (2, 2, 1), "float32", "ieee", h200, loss=True) for f in (planning.mlp_fwd, planning.mlp_bwd)]
    assert [segment.programs for plan in plans for segment in plan.segments] == [1, 1]
