# SPDX-License-Identifier: Apache-2.0
"""linear_act without kernels: the paths that a CPU takes, autograd, and what torch builds on top of both."""

import contextlib
import functools
import itertools
import math
import re
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ACTIVATIONS,
    DTYPES,
    EMPTY_SHAPES,
    IDS,
    LAYOUTS,
    LOSSES,
    SHAPES,
    WANTED,
    WRONG,
    check_autocast,
    check_empty,
    check_extremes,
    check_gradients,
    check_inputs_are_left_alone,
    check_layer,
    check_loss,
    check_shape,
    check_written,
    check_yardstick,
    forget_plans,
    gradient_penalty,
    lay_out,
    make_layer,
    plain,
    run_layer,
    same_bits,
    torch_layer,
    train_step,
    twins,
)
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend, EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import xor

from perceptriton.kernels import Device, Plan, crossover, eligibility, explain, ops, records, reference, small, tables
from perceptriton.kernels import devices as device_questions
from perceptriton.kernels import plan as planning
from perceptriton.kernels.registration import OVERLOAD, registered
from perceptriton.kernels.train import plan_train
from perceptriton.mlp import MLP, linear_act, linear_sigmoid, mlp_act
from perceptriton.mlp.functional.functions import LinearActFunction
from perceptriton.mlp.layers import MODULES, NAMES

# torch itself uses what it deprecates when it differentiates forward, compiles or traces.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*torch\.jit\."),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function:UserWarning"),
]

ALL = (True, True, True)


def explicit(**choices):
    return Plan("explicit", "the test says so", **choices)


# forward, backward: each way that a CPU may take, whatever the shape
PATHS = {
    "small": None,  # plain torch under autograd: what every shape of the tests takes by itself
    "mm": (explicit(), explicit()),
    "onednn": (explicit(forward_gemm="onednn"), explicit(dx_gemm="onednn", dweight_gemm="onednn")),
    "chunked": (explicit(), explicit(chunk=7)),
    "shared": (explicit(), explicit(split_rows=1)),
    "shared-chunks": (explicit(), explicit(split_rows=2, chunk=7)),
    "chunked-onednn": (explicit(forward_gemm="onednn"), explicit(dx_gemm="onednn", dweight_gemm="onednn", chunk=7)),
    "no-onednn": (explicit(forward_gemm="onednn"), explicit(dx_gemm="onednn", dweight_gemm="onednn", chunk=7)),
}


@pytest.fixture
def take(force, monkeypatch):
    def take(path):
        if PATHS[path] is not None:
            force(*PATHS[path])
        if path.startswith("shared"):
            monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # whatever this machine has
        if path == "no-onednn":
            monkeypatch.setattr(reference, "onednn_linear", lambda: None)

    return take


@pytest.fixture(autouse=True)
def take_the_path_of_the_test(request, take):
    if "path" in request.fixturenames:
        take(request.getfixturevalue("path"))


@pytest.fixture
def fused(monkeypatch):
    """The calls that reach the package's own forward pass, instead of F.linear and the activation."""
    calls = []
    forward = ops.linear_act_fwd
    monkeypatch.setattr(ops, "linear_act_fwd", lambda *arguments: calls.append(arguments) or forward(*arguments))
    return calls


@pytest.mark.parametrize("path", PATHS)
def test_gradients_have_the_shapes_of_their_inputs(path):
    """Autograd would sum a gradient that has a dimension too many."""
    forward, backward = PATHS[path] or PATHS["mm"]
    x, weight, dy = torch.randn(20, 3), torch.randn(5, 3), torch.randn(20, 5)
    y = reference.linear_act_fwd(x, weight, None, "sigmoid", forward)
    gradients = reference.linear_act_bwd(dy, y, x, weight, "sigmoid", ALL, backward)
    assert [gradient.shape for gradient in gradients] == [(20, 3), (5, 3), (5,)]


def check(*tensors, actual=None):
    check_layer(run_layer(*tensors) if actual is None else actual, *tensors)


# --- numbers ------------------------------------------------------------------------------------------------------

COMBINATIONS = {
    f"{path}-{shape}-{activation}-{IDS[dtype]}": (path, shape, activation, dtype)
    for path, shape, activation, dtype in itertools.product(PATHS, SHAPES, ACTIVATIONS, DTYPES)
    # Plans send fp32 alone to oneDNN: its bf16 needs instructions that not every CPU has, and it takes no fp16.
    if "onednn" not in path or dtype is torch.float32
    # Every activation meets a narrow shape and a wide one.
    if activation == "sigmoid" or shape in ("xor-hidden", "wide")
}


@pytest.mark.parametrize(("path", "shape", "activation", "dtype"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_shapes(path, shape, activation, dtype):
    check_shape(run_layer, shape, activation, dtype)


@pytest.mark.parametrize("path", PATHS)
def test_without_bias(path):
    x, weight, _, dy = make_layer(*SHAPES["ragged"], torch.float32)
    check(x, weight, None, dy)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_crossover_of_this_machine(dtype, fused):
    # Nothing forced: one row less stays with plain operations, one more takes the plan for large layers.
    k, n = 32, 64  # narrow, so that multiply-adds decide and not the number of outputs
    m = -(-tables.cpu_thresholds(str(dtype)[6:], device_questions.cpu_kind())["small"] // (k * n))
    for rows, large in ((m - 1, False), (m, True)):
        fused.clear()
        assert explain((rows, k), (n, k), dtype).forward.impl == ("explicit" if large else "aten")
        check(*make_layer(rows, k, n, dtype))
        assert bool(fused) is large


@pytest.mark.parametrize("training", [False, True])
def test_few_outputs_stay_with_plain_operations(training, monkeypatch):
    monkeypatch.setattr(crossover, "cpu_thresholds", lambda *_: {"small": 1, "few_outputs": (2**19, 2**20)})
    forget_plans()
    called = []
    monkeypatch.setattr("perceptriton.mlp.functional.layer._planned", lambda *_: called.append(1))
    rows = 2 ** (13 + training)
    with torch.set_grad_enabled(training):
        for m in (rows - 1, rows):
            called.clear()
            linear_act(*make_layer(m, 8, 64, torch.float32)[:3])
            assert bool(called) is (m == rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=IDS.get)
def test_sums_over_many_rows_stay_in_fp32(dtype, take):
    # 343 pieces and gradients of one sign: rounded to the dtype after each piece, sums would drift by percents.
    take("chunked")
    x, weight, bias, dy = make_layer(2400, 3, 2, dtype)
    check(x.abs(), weight, bias, dy.abs())


@pytest.mark.parametrize("path", ["mm", "onednn"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes(activation, path):
    check_extremes(run_layer, activation, torch.float32)


@pytest.mark.parametrize(("name", "wrong"), WRONG.values(), ids=WRONG)
def test_yardstick_fails_wrong_results(name, wrong, take):
    take("mm")
    check_yardstick(run_layer, check, name, wrong)


# --- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", [None, "torch"], ids=str)
@pytest.mark.parametrize("shape", EMPTY_SHAPES)
def test_empty(shape, impl):
    check_empty(functools.partial(run_layer, impl=impl), shape)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 2), (2, 0)], ids=str)
@pytest.mark.parametrize("impl", [None, "torch"], ids=str)
def test_leading_dimensions(impl, leading):
    x, weight, bias, dy = make_layer(math.prod(leading), 5, 3, torch.float32)
    x, dy = x.view(*leading, 5), dy.view(*leading, 3)
    actual = run_layer(x, weight, bias, dy, impl=impl)
    torch.testing.assert_close(actual, run_layer(x, weight, bias, dy, layer=plain))


@pytest.mark.parametrize("path", ["small", "mm", "onednn", "chunked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, path):
    check(*lay_out(make_layer(*SHAPES["ragged"], torch.float32), layout))


@pytest.mark.parametrize("shape", [(1,), (), (1, 3), (6, 3)], ids=str)
@pytest.mark.parametrize("path", ["small", "mm", "onednn"])
def test_a_bias_that_torch_broadcasts(path, shape):
    x, weight, _, dy = make_layer(6, 4, 3, torch.float32)
    bias = torch.randn(shape)
    torch.testing.assert_close(run_layer(x, weight, bias, dy), torch_layer(x, weight, bias, dy, "sigmoid"))


def test_sigmoid_is_the_default():
    x, weight, bias, _ = make_layer(6, 4, 3, torch.float32)
    expected = plain(x, weight, bias)
    assert torch.equal(linear_act(x, weight, bias), expected)
    assert torch.equal(linear_sigmoid(x, weight, bias), expected)
    assert torch.equal(linear_sigmoid(x, weight, impl="torch"), plain(x, weight))


@pytest.mark.parametrize("path", ["mm", "onednn"])
def test_permuted_leading_dimensions(path):
    x, weight, bias, dy = make_layer(24, 5, 3, torch.float32)
    x, dy = x.view(2, 3, 4, 5).permute(2, 0, 1, 3), dy.view(2, 3, 4, 3).permute(2, 0, 1, 3)
    check(x, weight, bias, dy)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("path", ["small", "mm", "onednn", "chunked"])
def test_losses(path, loss):
    check_loss(linear_act, loss, *make_layer(*SHAPES["ragged"], torch.float32))


# --- autograd -----------------------------------------------------------------------------------------------------


class CountOps(TorchDispatchMode):
    """Counts torch's operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("path", ["small", "mm", "onednn", "chunked"])
def test_computes_and_keeps_only_what_is_asked_for(path, wanted):
    x, weight, bias, dy = make_layer(*SHAPES["ragged"], torch.float32)
    full = run_layer(x, weight, bias, dy)[1:]
    for tensor, want in zip((x, weight, bias), wanted, strict=True):
        tensor.requires_grad_(want)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear_act(x, weight, bias)
    with CountOps() as ops_run:
        y.backward(dy)
    gradients = [t.grad for t in (x, weight, bias)]
    assert [g is not None for g in gradients] == list(wanted)
    assert same_bits([g for g in gradients if g is not None], [g for g, want in zip(full, wanted, strict=True) if want])
    need_dx, need_dweight, need_dbias = wanted
    addresses = {t.data_ptr() for t in kept}
    assert (x.data_ptr() in addresses) is need_dweight
    assert (weight.data_ptr() in addresses) is need_dx
    if path == "mm":
        assert ops_run.counts.get("mm", 0) == need_dx + need_dweight
        assert ops_run.counts.get("sum", 0) == need_dbias
    if path == "onednn":
        assert ops_run.counts.get("_linear_pointwise", 0) == need_dx + need_dweight


def test_nothing_is_kept_without_gradients(take):
    take("mm")
    x, weight, bias, _ = make_layer(*SHAPES["ragged"], torch.float32)
    weight.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), torch.no_grad():
        y = linear_act(x, weight, bias)
    with torch.inference_mode():
        again = linear_act(x, weight, bias)
    assert not kept
    assert not y.requires_grad
    torch.testing.assert_close(y, plain(x, weight, bias).detach())
    assert torch.equal(again, y)


# The public function takes fp64 to plain operations; the Function itself is exact in it too.
FUNCTIONS = {
    "public": linear_act,
    "function": lambda x, weight, bias, activation: LinearActFunction.apply(x, weight, bias, activation, None),
}


@pytest.mark.parametrize("leading", [(5,), (), (2, 3)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_gradcheck(function, activation, leading):
    x, weight, bias, _ = make_layer(math.prod(leading), 3, 2, torch.float64)
    inputs = [t.requires_grad_() for t in (x.view(*leading, 3), weight, bias)]
    layer = functools.partial(function, activation=activation)
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("path", ["mm", "onednn", "chunked"])
def test_what_is_not_finite_takes_torchs_way(path, activation):
    """Infinite gradients at dead and at saturated units, and gradients at units that are NaN, to second order."""
    x, weight, bias, dy = make_layer(6, 3, 4, torch.float32)
    bias[:3] = torch.tensor([-200.0, 200.0, torch.nan])
    dy[:, :2] = torch.tensor([[torch.inf, 1.0], [-torch.inf, 2.0], [torch.nan, 3.0]]).repeat(2, 1)

    def gradients(layer):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        upstream = dy.detach().requires_grad_()
        y = layer(*inputs, activation)
        first = torch.autograd.grad(y, inputs, upstream, retain_graph=True)
        double = torch.autograd.grad(y, inputs, upstream, create_graph=True)
        ones = [torch.ones_like(g) for g in double]
        second = torch.autograd.grad(double, [*inputs, upstream], ones, allow_unused=True, materialize_grads=True)
        return [*first, *double, *second]

    actual, expected = gradients(linear_act), gradients(plain)
    if activation == "relu":
        assert expected[2][0] == 0  # dbias of the dead unit
        assert expected[2][2].isfinite()  # of the one that is NaN
    torch.testing.assert_close(actual, expected, equal_nan=True)


# name: a matrix (M, K) whose elements share memory, or seem to
OVERLAPPING = {
    "windows": lambda m, k: torch.randn(m + k - 1).unfold(0, k, 1),
    "wide-windows": lambda m, k: torch.randn(3 * m + k).unfold(0, k, 3)[:m],
    "stretched-windows": lambda m, k: torch.randn(2 * m + 3 * k).as_strided((m, k), (2, 3)),
    "one-row": lambda m, k: torch.randn(1, k).expand(m, k),
    "one-column": lambda m, k: torch.randn(m, 1).expand(m, k),
    "one-value": lambda m, k: torch.randn(1, 1).expand(m, k),
    "every-other-column-of-an-odd-width": lambda m, k: torch.randn(m, 2 * k - 1)[:, ::2],
    "every-other-row-of-an-odd-height": lambda m, k: torch.randn(k, 2 * m - 1)[:, ::2].t(),
}


@pytest.mark.parametrize("operand", ["x", "weight", "bias", "dy"])
@pytest.mark.parametrize("overlapping", OVERLAPPING)
@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
@pytest.mark.parametrize("path", ["onednn", "chunked-onednn"])
def test_operands_that_share_memory(path, activation, overlapping, operand):
    # oneDNN cannot describe them.
    make = OVERLAPPING[overlapping]
    layer = dict(zip(("x", "weight", "bias", "dy"), make_layer(100, 10, 31, torch.float32), strict=True))
    layer[operand] = make(1, 31)[0] if operand == "bias" else make(*layer[operand].shape)
    check(*layer.values(), activation)


def third_order(layer, x, weight, bias, dy):
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    value = (layer(*inputs) * dy).sum()
    for _ in range(2):
        first = torch.autograd.grad(value, inputs, create_graph=True)
        value = sum((g * g.detach().cos()).sum() for g in first)
    return torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("leading", [(33,), (3, 11), ()], ids=str)
@pytest.mark.parametrize("path", ["mm", "onednn", "chunked"])
@pytest.mark.parametrize("order", [gradient_penalty, third_order], ids=lambda function: function.__name__)
def test_higher_orders(order, path, leading):
    x, weight, bias, dy = make_layer(math.prod(leading), 7, 5, torch.float32)
    check_gradients(order, linear_act, x.view(*leading, 7), weight, bias, dy.view(*leading, 5))


@pytest.mark.parametrize("order", [gradient_penalty, third_order], ids=lambda function: function.__name__)
def test_higher_orders_in_fp64(order):
    layer = make_layer(33, 7, 5, torch.float64)
    actual = order(lambda *inputs: LinearActFunction.apply(*inputs, "sigmoid", None), *layer)
    torch.testing.assert_close(actual, order(plain, *layer), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("path", PATHS)
def test_inputs_are_left_alone(path):
    check_inputs_are_left_alone(linear_act, *make_layer(*SHAPES["ragged"], torch.float32))


@pytest.mark.parametrize("path", ["small", "mm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_writing_over_the_output(activation, path):
    # Where torch needs the output for the backward pass, writing over it must raise; where it does not, it must not.
    x, weight, bias, dy = make_layer(*SHAPES["ragged"], torch.float32)
    weight.requires_grad_()
    y = linear_act(x, weight, bias, activation)
    y.mul_(2)
    if activation == "identity":
        y.backward(dy)
        torch.testing.assert_close(weight.grad, 2 * dy.t() @ x)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(dy)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("path", ["small", "mm", "onednn", "chunked"])
def test_in_place_operations_on_the_output(path, leading):
    check_written(linear_act, leading)


@pytest.mark.parametrize("path", PATHS)
def test_same_bits_every_time(path):
    tensors = make_layer(*SHAPES["one-off"], torch.float32)
    first = run_layer(*tensors)
    for _ in range(50):
        assert same_bits(run_layer(*tensors), first)


# Both are process-wide settings that a user may have for reasons of his own.
@pytest.mark.parametrize("setting", ["default-device", "default-dtype"])
@pytest.mark.parametrize("path", ["mm", "onednn", "chunked", "chunked-onednn"])
def test_defaults_of_the_process_do_not_matter(path, setting):
    tensors = make_layer(*SHAPES["ragged"], torch.float32)
    expected = run_layer(*tensors)
    reference.onednn_linear.cache_clear()
    try:
        if setting == "default-device":
            with torch.device("meta"):
                actual = run_layer(*tensors)
        else:
            torch.set_default_dtype(torch.float64)
            actual = run_layer(*tensors)
        had_onednn = reference.onednn_linear() is not None
    finally:
        torch.set_default_dtype(torch.float32)
        reference.onednn_linear.cache_clear()
    assert same_bits(actual, expected)
    if "onednn" in path:
        assert had_onednn is (reference.onednn_linear() is not None)


@pytest.mark.parametrize(
    "around", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, FakeTensorMode]
)
def test_the_first_call_decides_nothing_for_the_next(around):
    found = []
    for circumstances in (contextlib.nullcontext, around):
        reference.onednn_linear.cache_clear()
        with circumstances():
            found.append(reference.onednn_linear())
    reference.onednn_linear.cache_clear()
    assert found[0] is found[1]


# --- errors -------------------------------------------------------------------------------------------------------

X, W, B = torch.ones(4, 3), torch.ones(2, 3), torch.ones(2)
ERRORS = {
    "x-type": ([[1.0], W], TypeError, "x must be a Tensor, not list"),
    "weight-type": ([X, None], TypeError, "weight must be a Tensor, not NoneType"),
    "bias-type": ([X, W, 1.0], TypeError, "bias must be a Tensor, not float"),
    "activation": ([X, W, B, "gelu"], ValueError, f"activation must be one of {', '.join(ACTIVATIONS)}, not 'gelu'"),
    "activation-type": ([X, W, B, ["tanh"]], ValueError, r"activation must be one of .*, not \['tanh'\]"),
    "weight-dims": ([X, W[None]], ValueError, r"weight must be \(out_features, in_features\), not \(1, 2, 3\)"),
    "in-features": ([X[:, :2], W], ValueError, r"x \(4, 2\) does not end in the in_features of weight \(2, 3\)"),
    "x-dims": ([X[0, 0], W], ValueError, r"x \(\) does not end in the in_features of weight \(2, 3\)"),
    "out-features": ([X, W, torch.ones(5)], ValueError, r"bias \(5,\) is not the out_features of weight \(2, 3\)"),
    "matrix-on-a-vector": (
        [X[0], W, torch.ones(1, 1)],
        ValueError,
        r"bias \(1, 1\) is not the out_features of weight \(2, 3\)",
    ),
    "bias-device": ([X, W, B.to("meta")], ValueError, "bias is on meta, but x on cpu"),
    "weight-dtype": ([X, W.double()], ValueError, r"weight is torch\.float64, but x torch\.float32"),
    "bias-dtype": ([X, W, B.bfloat16()], ValueError, r"bias is torch\.bfloat16, but x torch\.float32"),
}


@pytest.mark.parametrize("impl", [None, "torch", "triton"], ids=str)
@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(arguments, error, message, impl):
    with pytest.raises(error, match=f"^{message}$"):
        linear_act(*arguments, impl=impl)


def test_choices_that_are_not_there():
    with pytest.raises(ValueError, match=r"^impl must be one of None, 'triton', 'torch', not 'cuda'$"):
        linear_act(X, W, impl="cuda")
    with pytest.raises(NotImplementedError, match=r'^impl="triton": x is on the CPU, .* \(TRITON_INTERPRET=1\)$'):
        linear_act(X, W, B, impl="triton")


MLP_ERRORS = {
    "no-sizes": (dict(sizes=[]), ValueError, r"sizes must hold an input and an output width, not \[\]"),
    "one-size": (dict(sizes=[3]), ValueError, r"sizes must hold an input and an output width, not \[3\]"),
    "negative": (dict(sizes=[3, -2]), ValueError, r"sizes must not be negative: \[3, -2\]"),
    "sizes-type": (dict(sizes=3), TypeError, "sizes must be .*, not .*3"),
    "size-type": (dict(sizes=[2, 2.5]), TypeError, r"sizes must be .*, not .*2\.5.*"),
    "activation": (dict(sizes=[2, 2], activation="gelu"), ValueError, "activation must be one of .*, not 'gelu'"),
    "output": (dict(sizes=[2, 2], output_activation="gelu"), ValueError, "output_activation must be .*, not 'gelu'"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), MLP_ERRORS.values(), ids=MLP_ERRORS)
def test_mlp_errors(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        MLP(**arguments)


# --- autocast -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
@pytest.mark.parametrize("path", ["small", "mm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=IDS.get)
def test_autocast(dtype, path, inside):
    check_autocast(linear_act, dtype, inside=inside)


@pytest.mark.parametrize("path", ["mm", "chunked"])
def test_backward_keeps_the_precision_of_forward(path):
    x, weight, bias, dy = make_layer(*SHAPES["ragged"], torch.float32)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = linear_act(*inputs)
    outside = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, inputs, dy)
    assert same_bits(inside, outside)


@pytest.mark.parametrize("path", ["small", "mm"])
@pytest.mark.parametrize(
    ("x_dtype", "parameter_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=["fp32", "bf16-input", "fp64"],
)
def test_autocast_output_dtype(x_dtype, parameter_dtype, path):
    model, sequential = twins(10, 31, 3, dtype=parameter_dtype)
    x = torch.randn(64, 10, dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = model(x), sequential(x)
    assert actual.dtype is expected.dtype
    torch.testing.assert_close(actual, expected)


# --- torch.func and forward mode ----------------------------------------------------------------------------------


def dual(layer):
    def tangent(x, weight, bias):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(x, forward_ad.make_dual(weight, x[:3]), bias)).tangent

    return tangent


def with_weight(transform):
    """A transform of the layer as a function of its weight."""
    return lambda layer: lambda x, weight, bias: transform(lambda w: layer(x, w, bias))(weight)


def with_bias(change):
    return lambda layer: lambda x, weight, bias: layer(x, weight, change(bias))


def with_all(change):
    return lambda layer: lambda *tensors: layer(*map(change, tensors))


# What the kernels do not take, made of the layer.
UNUSUAL = {
    "one-bias": with_bias(lambda bias: bias[:1]),
    "bias-without-dimensions": with_bias(lambda bias: bias[0]),
    "bias-row": with_bias(lambda bias: bias[None]),
    "bias-matrix": with_bias(lambda bias: bias.expand(6, 3)),
    "fp64": with_all(lambda t: t.double()),
    "complex": with_all(lambda t: t.to(torch.complex64)),
    "conjugate": with_all(lambda t: t.to(torch.complex64).conj()),
    "integers": with_all(lambda t: (4 * t).long()),
    "vmap": lambda layer: torch.vmap(layer, (0, None, None)),
    "vmap-of-weights": lambda layer: (
        lambda x, weight, bias: torch.vmap(layer, (None, 0, None))(x, torch.stack([weight, -weight]), bias)
    ),
    "grad": with_weight(lambda f: torch.func.grad(lambda w: f(w).square().sum())),
    "grad-per-sample": lambda layer: (
        lambda x, weight, bias: torch.vmap(
            torch.func.grad(lambda w, row: layer(row, w, bias).square().sum()), (None, 0)
        )(weight, x)
    ),
    "vjp": with_weight(lambda f: lambda w: torch.func.vjp(f, w)[1](torch.ones(6, 3))),
    "jvp": with_weight(lambda f: lambda w: torch.func.jvp(f, (w,), (w.cos(),))),
    "jacrev": with_weight(torch.func.jacrev),
    "jacfwd": with_weight(torch.func.jacfwd),
    "hessian": with_weight(lambda f: torch.func.hessian(lambda w: f(w).square().sum())),
    "dual": dual,
}


@pytest.mark.parametrize("path", ["small", "mm"])
@pytest.mark.parametrize("unusual", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_calls(unusual, path):
    tensors = make_layer(6, 5, 3, torch.float32)[:3]
    torch.testing.assert_close(unusual(linear_act)(*tensors), unusual(plain)(*tensors))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "forward-and-reverse"])
@pytest.mark.parametrize("path", ["small", "mm", "onednn"])
@pytest.mark.parametrize("operand", range(3), ids=["x", "weight", "bias"])
def test_forward_mode_duals(operand, path, reverse):
    tensors = [t.requires_grad_(reverse) for t in make_layer(6, 4, 3, torch.float32)[:3]]
    tangent = torch.randn_like(tensors[operand])

    def derivatives(layer):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(tensors[operand], tangent)
            y = forward_ad.unpack_dual(layer(*tensors[:operand], dual, *tensors[operand + 1 :]))
            mixed = torch.autograd.grad(y.tangent.square().sum(), tensors[:2]) if reverse else ()
            return y.primal, y.tangent, *mixed

    torch.testing.assert_close(derivatives(linear_act), derivatives(plain))


# --- what is not for us -------------------------------------------------------------------------------------------


class Marked(torch.Tensor):
    """A subclass with no rules of its own: enough to be left to torch."""


@pytest.mark.parametrize("operand", range(3), ids=["x", "weight", "bias"])
def test_subclasses_are_left_to_torch(operand, take, fused):
    take("mm")
    tensors = list(make_layer(6, 4, 3, torch.float32)[:3])
    linear_act(*tensors)
    assert len(fused) == 1
    fused.clear()
    tensors[operand] = tensors[operand].as_subclass(Marked)
    y = linear_act(*tensors)
    assert type(y) is Marked
    assert not fused
    torch.testing.assert_close(y.as_subclass(torch.Tensor), plain(*(t.as_subclass(torch.Tensor) for t in tensors)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_nested_tensors_are_left_to_torch(activation):
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    layer = next(kind for kind in NAMES if getattr(kind, "activation", None) == activation)(4, 3)

    def torchs(x):
        return MODULES[activation]()(F.linear(x, layer.weight, layer.bias))

    try:
        expected = torchs(x).unbind()
    except NotImplementedError as error:
        with pytest.raises(NotImplementedError, match=re.escape(str(error)[:60])):
            layer(x)
    else:
        torch.testing.assert_close(layer(x).unbind(), expected)


def test_parameters_are_not(take, fused):
    take("mm")
    model = MLP([4, 3])
    x = torch.randn(6, 4)
    torch.testing.assert_close(model(x), plain(x, model[0].weight, model[0].bias))
    assert len(fused) == 1


@pytest.fixture
def mesh():
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
@pytest.mark.parametrize("path", ["small", "mm"])
def test_dtensors_are_left_to_torch(path, mesh, fused):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    x, weight, bias, dy = make_layer(6, 4, 3, torch.float32)
    expected = torch_layer(x, weight, bias, dy, "sigmoid")
    placements = (Replicate(), Shard(0), Shard(0), Shard(1))
    x, weight, bias, dy = (
        distribute_tensor(t, mesh, [p]) for t, p in zip((x, weight, bias, dy), placements, strict=True)
    )
    y, dx, dweight, dbias = run_layer(x, weight, bias, dy)
    assert not fused
    assert isinstance(dweight, DTensor)
    assert dweight.placements == (Shard(0),)
    torch.testing.assert_close([t.full_tensor() for t in (y, dx, dweight, dbias)], list(expected))


def test_fp64_is_left_to_torch(take, fused):
    take("mm")
    tensors = make_layer(*SHAPES["ragged"], torch.float64)
    torch.testing.assert_close(run_layer(*tensors), torch_layer(*tensors, "sigmoid"), rtol=0, atol=0)
    assert not fused


def test_meta_tensors(fused):
    x, weight, bias, dy = make_layer(4, 3, 2, torch.float32, "meta")
    results = run_layer(x, weight, bias, dy)
    assert [tuple(t.shape) for t in results] == [(4, 2), (4, 3), (2, 3), (2,)]
    assert {t.device.type for t in results} == {"meta"}
    assert not fused


def test_fake_tensors(take, fused):
    take("mm")
    with FakeTensorMode():
        y = linear_act(torch.ones(4, 3), torch.ones(2, 3), torch.ones(2))
    assert y.shape == (4, 2)
    assert not fused


# --- tracing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [ALL, (False, True, False), (False, False, True)], ids=str)
def test_registered_ops(wanted):
    x, weight, bias, dy = make_layer(6, 5, 3, torch.float32)
    y = torch.tanh(F.linear(x, weight, bias))
    forward = torch.library.opcheck(
        registered.linear_act,
        (x.view(2, 3, 5), weight, bias if all(wanted) else None, "tanh", None),
    )
    backward = torch.library.opcheck(registered.linear_act_backward, (dy, y, x, weight, "tanh", wanted, None))
    assert set(forward.values()) | set(backward.values()) == {"SUCCESS"}


MISFITS = {
    "in-features": ({"weight": (3, 8)}, r"x (2, 4, 5) does not end in the in_features of weight (3, 8)"),
    "no-matrix": ({"weight": (5,)}, r"weight must be (out_features, in_features), not (5,)"),
    "scalar": ({"x": ()}, r"x () does not end in the in_features of weight (3, 5)"),
    "one-bias": ({"bias": (1,)}, r"bias (1,) is not the out_features of weight (3, 5)"),
    "no-dimensions": ({"bias": ()}, r"bias () is not the out_features of weight (3, 5)"),
    "matrix": ({"bias": (1, 3)}, r"bias (1, 3) is not the out_features of weight (3, 5)"),
    "weight-dtype": ({"weight": torch.bfloat16}, r"weight is torch.bfloat16, but x torch.float32"),
    "bias-dtype": ({"bias": torch.float64}, r"bias is torch.float64, but x torch.float32"),
    "weight-device": ({"weight": "meta"}, r"weight is on meta, but x on cpu"),
    "bias-device": ({"bias": "meta"}, r"bias is on meta, but x on cpu"),
}
BACKWARD_MISFITS = {
    "dy": ({"dy": (2, 4, 4)}, r"dy (2, 4, 4) has not the shape of y (2, 4, 3)"),
    "weight": ({"weight": (4, 5)}, r"weight (4, 5) does not give the features of y (2, 4, 3)"),
    "weight-dims": ({"weight": (3,)}, r"weight (3,) does not give the features of y (2, 4, 3)"),
    "rows": ({"x": (2, 3, 5)}, r"x (2, 3, 5) has not the rows of y (2, 4, 3)"),
    "features": ({"x": (2, 4, 6)}, r"x (2, 4, 6) does not end in the in_features of weight (3, 5)"),
    "no-x": ({"x": None}, r"x is None, but wanted [True, True, True]"),
    "no-weight": ({"weight": None}, r"weight is None, but wanted [True, True, True]"),
    "dy-dtype": ({"dy": torch.float16}, r"dy is torch.float16, but y torch.float32"),
    "x-dtype": ({"x": torch.bfloat16}, r"x is torch.bfloat16, but y torch.float32"),
    "x-device": ({"x": "meta"}, r"x is on meta, but y on cpu"),
}


def change(tensor, to):
    """Another dtype, another device, another shape or None."""
    if isinstance(to, tuple):
        return torch.zeros(to)
    return to if to is None else tensor.to(to)


def operands_for(direction):
    x, weight, bias, dy = make_layer(8, 5, 3, torch.float32)
    x, dy = x.view(2, 4, 5), dy.view(2, 4, 3)
    if direction == "forward":
        return {"x": x, "weight": weight, "bias": bias}
    return {"dy": dy, "y": plain(x, weight, bias), "x": x, "weight": weight}


@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode], ids=["real", "fake"])
@pytest.mark.parametrize(
    ("direction", "changes", "message"),
    [("forward", *case) for case in MISFITS.values()] + [("backward", *case) for case in BACKWARD_MISFITS.values()],
    ids=[*MISFITS, *(f"backward-{name}" for name in BACKWARD_MISFITS)],
)
def test_registered_ops_name_what_does_not_fit(direction, changes, message, mode):
    with mode():
        operands = operands_for(direction)
        operands |= {name: change(operands[name], to) for name, to in changes.items()}
        op, options = registered.linear_act, ("sigmoid", None)
        if direction == "backward":
            op, options = registered.linear_act_backward, ("sigmoid", ALL, None)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            op(*operands.values(), *options)


@pytest.fixture
def no_launches(monkeypatch):
    """The op itself cannot be called."""
    monkeypatch.setattr(ops, "linear_act_fwd", None)
    monkeypatch.setattr(ops, "linear_act_bwd", None)


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, 0, None), (None, 1, 0), (0, 0, 0)], ids=str)
def test_vmap_takes_a_registered_op_for_plain_operations(in_dims, no_launches):
    x, weight, bias, _ = make_layer(6, 5, 3, torch.float32)
    stacked = zip((x, weight, bias), in_dims, strict=True)
    inputs = [t if dim is None else torch.stack([t, 2 * t, -t], dim) for t, dim in stacked]
    op = functools.partial(registered.linear_act, activation="tanh", impl=None)
    expected = torch.vmap(lambda *layer: torch.tanh(F.linear(*layer)), in_dims)(*inputs)
    torch.testing.assert_close(torch.vmap(op, in_dims)(*inputs), expected)


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_vmap_takes_a_registered_backward_for_plain_operations(wanted, no_launches):
    x, weight, bias, dy = make_layer(6, 5, 3, torch.float32)
    y, many = plain(x, weight, bias), torch.stack([dy, 2 * dy, -dy], 1)
    op = registered.linear_act_backward
    found = torch.vmap(lambda dy: op(dy, y, x, weight, "sigmoid", wanted, None), 1)(many)
    expected = reference.linear_act_bwd_differentiable(dy, y, x, weight, "sigmoid", ALL)
    for gradients, single, want in zip(found, expected, wanted, strict=True):
        assert gradients.numel() == (3 * single.numel() if want else 0)
        if want:
            torch.testing.assert_close(gradients, torch.stack([single, 2 * single, -single]))


def ops_held(record):
    """The registered ops in the graphs that a backend has recorded."""
    graphs = [*record.graphs, *getattr(record, "fw_graphs", ()), *getattr(record, "bw_graphs", ())]
    parts = [part for graph in graphs for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = {str(node.target).removesuffix(f".{OVERLOAD}") for part in parts for node in part.graph.nodes}
    return {target for target in targets if target.startswith("perceptriton.")}


@pytest.fixture
def traced(monkeypatch):
    """traced(function, *inputs): what the compiled function returns, and the registered ops that its graphs hold.

    traced.held(): those that they hold by now; a graph of a backward pass is there once the pass has run.
    As on a GPU with kernels; the ops themselves run in plain torch.
    """
    monkeypatch.setattr(eligibility, "launchable", lambda device, dtype: True)

    def traced(function, *inputs, backend=AotEagerAndRecordGraphs, **options):
        torch._dynamo.reset()
        record = backend()
        traced.held = functools.partial(ops_held, record)
        return torch.compile(function, backend=record, **options)(*inputs), traced.held()

    yield traced
    torch._dynamo.reset()


# What is ordinary for the kernels is so in a compiled program.
ORDINARY = {
    "matrix": lambda x, weight, bias: (x, weight, bias),
    "leading": lambda x, weight, bias: (x.view(2, 3, 5), weight, bias),
    "vector": lambda x, weight, bias: (x[0], weight, bias),
    "no-rows": lambda x, weight, bias: (x[:0], weight, bias),
    "no-features": lambda x, weight, bias: (x[:, :0], weight[:, :0], bias),
    "expanded": lambda x, weight, bias: (x[:1].expand(6, 5), weight.t().contiguous().t(), bias[:1].expand(3)),
    "negative-bit": lambda x, weight, bias: tuple(
        torch.complex(t, t).conj().imag if t is not weight else t for t in (x, weight, bias)
    ),
    "parameters": lambda x, weight, bias: (x, nn.Parameter(weight), nn.Parameter(bias)),
}


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("case", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_calls_are_compiled_into_the_registered_op(case, autocast, traced):
    x, weight, bias, _ = make_layer(6, 5, 3, torch.float32)
    inputs = case(x, weight, bias)
    inputs = [t.requires_grad_() if t.is_leaf else t for t in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, held = traced(linear_act, *inputs, fullgraph=True)
        eager, expected = linear_act(*inputs), plain(*inputs)
    assert held == {"perceptriton.linear_act"}
    assert y.dtype is eager.dtype is (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(y, expected)
    leaves = [t for t in inputs if t.is_leaf]
    dy = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(out, leaves, dy) for out in (y, expected))
    assert traced.held() == {"perceptriton.linear_act", "perceptriton.linear_act_backward"}
    assert [g.dtype for g in found] == [torch.float32] * len(leaves)
    torch.testing.assert_close(found, wanted, **({"rtol": 2e-2, "atol": 5e-2} if autocast else {}))


@pytest.mark.slow
@pytest.mark.parametrize("unusual", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_calls_are_compiled_into_plain_operations(unusual, traced):
    x, weight, bias, _ = make_layer(6, 5, 3, torch.float32)
    found, held = traced(unusual(linear_act), x, weight, bias, fullgraph=True)
    assert not held
    torch.testing.assert_close(found, unusual(plain)(x, weight, bias))


@pytest.mark.slow
@pytest.mark.parametrize("position", range(3), ids=["x", "weight", "bias"])
@pytest.mark.parametrize("kind", ["subclass", "wrapper"])
def test_compiled_subclasses_take_plain_operations(kind, position, traced):
    tensors = list(make_layer(6, 5, 3, torch.float32)[:3])
    expected = plain(*tensors)
    if kind == "subclass":
        tensors[position] = tensors[position].as_subclass(Marked)
        # What torch's own tool for ahead-of-time autograd cannot handle, whatever the operation.
        found, held = traced(linear_act, *tensors, backend=EagerAndRecordGraphs, fullgraph=True)
        assert isinstance(found, Marked)
    else:
        tensors[position] = TwoTensor(tensors[position], tensors[position])
        found, held = traced(linear_act, *tensors, fullgraph=True)
        found = found.a
    assert not held
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("name", [name for name in MISFITS if not name.startswith(("one", "no-", "matrix"))])
def test_compiled_misfits_are_named(name, dynamic, traced):
    changes, message = MISFITS[name]
    operands = operands_for("forward")
    operands |= {name: change(operands[name], to) for name, to in changes.items()}
    if dynamic:
        message = re.sub(r"\d+", r"s?\\d+", re.escape(message)) if isinstance(*changes.values(), tuple) else message
    with pytest.raises(RuntimeError, match=message if dynamic else re.escape(message)):
        traced(linear_act, *operands.values(), fullgraph=True, dynamic=dynamic)


WRONG_CALLS = {
    "activation": ({"activation": "softmax"}, ValueError, "activation must be one of sigmoid"),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of None"),
    "x": ({"x": [1.0]}, TypeError, "x must be a Tensor, not list"),
    "weight": ({"weight": None}, TypeError, "weight must be a Tensor, not NoneType"),
    "bias": ({"bias": 1.0}, TypeError, "bias must be a Tensor, not float"),
    "fp64": ({"x": torch.ones(2, 5, dtype=torch.float64), "impl": "triton"}, NotImplementedError, "float64"),
    "one-bias": ({"bias": torch.ones(1), "impl": "triton"}, NotImplementedError, r"bias \(1,\)"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "error", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_compiled_calls_raise_what_eager_ones_do(changes, error, message, monkeypatch):
    monkeypatch.setattr(eligibility, "launchable", lambda device, dtype: True)
    monkeypatch.setattr(eligibility, "cpu_refusal", lambda device: None)  # as under the interpreter
    torch._dynamo.reset()
    inputs = operands_for("forward") | changes
    if inputs["x"] is changes.get("x") and isinstance(inputs["x"], torch.Tensor):
        inputs = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
    for call in (linear_act, torch.compile(linear_act, backend="aot_eager")):
        with pytest.raises(error, match=message):
            call(**inputs)


@pytest.mark.slow
def test_kernels_see_as_many_rows_as_the_program_finds(traced):
    x, weight, bias, _ = make_layer(6, 5, 3, torch.float32)

    def chosen(x, weight, bias):
        return linear_act(x[(x[:, 0] > 0).nonzero().squeeze(1)], weight, bias)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found, held = traced(chosen, x, weight, bias, fullgraph=True)
    assert held == {"perceptriton.linear_act"}
    torch.testing.assert_close(found, plain(x[x[:, 0] > 0], weight, bias))


@pytest.mark.slow
def test_a_batched_gradient_of_a_compiled_layer_takes_plain_operations(traced, monkeypatch):
    inputs = [t.requires_grad_() for t in make_layer(6, 5, 3, torch.float32)[:3]]
    y, _ = traced(linear_act, *inputs)
    dys = torch.randn(4, 6, 3)
    expected = torch.autograd.grad(plain(*inputs), inputs, dys, is_grads_batched=True)
    torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)  # the backward pass is compiled by now
    monkeypatch.setattr(ops, "linear_act_bwd", None)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dys, is_grads_batched=True), expected)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compiled_parity(autocast, take):
    take("mm")
    model, sequential = twins(5, 8, 3)
    x = torch.randn(6, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, expected = train_step(compiled, x), train_step(sequential, x)
    assert actual[0].dtype is (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_dynamic_batches_make_no_more_graphs():
    graphs = []
    for model in twins(5, 8, 3):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for m in (2, 3, 4, 7, 16, 33, 1, 5):
            x = torch.randn(m, 5)
            torch.testing.assert_close(train_step(compiled, x), train_step(model, x))
        graphs.append(counter.frame_count)
    ours, theirs = graphs
    assert ours <= theirs


# --- explain ------------------------------------------------------------------------------------------------------

H100 = Device("cuda", 90, 132, triton=True)
AMPERE, NEWER, TURING = (Device("cuda", arch, 108, triton=True) for arch in (80, 103, 75))
# x_shape, weight_shape, dtype, device -> forward, backward, in the reasons
REGIMES = {
    "cpu-small": ((4, 2), (1, 2), torch.float32, "cpu", "aten", "aten", "small"),
    "cpu-large": ((4096, 512), (512, 512), torch.float32, "cpu", "explicit", "explicit", ""),
    "cpu-empty": ((0, 2), (1, 2), torch.float32, "cpu", "aten", "aten", "nothing to compute"),
    "fp64": ((4096, 512), (512, 512), torch.float64, "cpu", "aten", "aten", "float64"),
    "meta": ((4, 2), (1, 2), torch.float32, "meta", "aten", "aten", "no kernels for meta devices"),
    "launch-bound": ((4, 2), (1, 2), torch.float32, H100, "rows", "rows", ""),
    "narrow": ((1 << 20, 64), (64, 64), torch.bfloat16, H100, "rows", "rows", "one read|read once"),
    "leading": ((1 << 10, 1 << 10, 64), (64, 64), torch.bfloat16, H100, "rows", "rows", ""),
    "wide": ((4096, 4096), (4096, 4096), torch.bfloat16, H100, "library", "passes", "library"),
    "medium": ((16384, 256), (256, 256), torch.bfloat16, H100, "tiled", "passes", ""),
    "wide-fp32": ((4096, 1024), (1024, 1024), torch.float32, H100, "library", "passes", "library"),
    "ampere": ((1 << 20, 64), (64, 64), torch.bfloat16, AMPERE, "rows", "rows", ""),
    "newer": ((1 << 20, 64), (64, 64), torch.bfloat16, NEWER, "rows", "rows", ""),
    "turing": ((4, 2), (1, 2), torch.float32, TURING, "aten", "aten", "compute capability 7.5.*need 8.0"),
    "gpu-empty": ((0, 4), (4, 4), torch.float32, H100, "aten", "aten", "nothing to compute"),
    "gpu-fp64": ((4, 4), (4, 4), torch.float64, H100, "aten", "aten", "float64"),
    "mps": ((64, 64), (64, 64), torch.float32, Device("mps"), "aten", "aten", "no kernels for mps devices"),
    "no-triton": (
        (4, 2),
        (1, 2),
        torch.float32,
        Device("cuda", 90, 132),
        "aten",
        "aten",
        "its description says triton=False",
    ),
}


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "dtype", "device", "forward", "backward", "reason"), REGIMES.values(), ids=REGIMES
)
def test_explain(x_shape, weight_shape, dtype, device, forward, backward, reason):
    explanation = explain(x_shape, weight_shape, dtype, device)
    assert (explanation.forward.impl, explanation.backward.impl) == (forward, backward)
    text = str(explanation)
    assert re.search(reason, text)
    said = [line for line in text.splitlines() if not line.startswith(" ")]
    for plan, line in zip(explanation, said, strict=True):
        assert plan.reason
        assert line.split()[1] == plan.impl
        assert line.endswith(plan.reason)
    # Below each plan that runs on a GPU, what a model of one says of it.
    modelled = [line.strip() for line in text.splitlines() if line.startswith(" ")]
    assert modelled == [str(plan.prediction) for plan in explanation if plan.impl not in ("aten", "explicit")]


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_explain_follows_torchs_precision(precision, matmul):
    matmul.fp32_precision = precision
    plans = explain((1 << 20, 64), (64, 64), torch.float32, H100)
    assert [plan.precision for plan in plans] == [precision, precision]


EXPLAIN_ERRORS = {
    "in-features": (((4, 3), (2, 5)), r"weight_shape \(2, 5\) does not fit x_shape \(4, 3\)"),
    "weight-dims": (((4, 3), (3,)), r"weight_shape \(3,\) does not fit x_shape \(4, 3\)"),
    "x-dims": (((), (2, 3)), r"weight_shape \(2, 3\) does not fit x_shape \(\)"),
}


@pytest.mark.parametrize(("shapes", "message"), EXPLAIN_ERRORS.values(), ids=EXPLAIN_ERRORS)
def test_explain_errors(shapes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        explain(*shapes)


def test_explain_promises_no_kernel_that_a_call_would_refuse():
    with pytest.raises(NotImplementedError, match=r"TRITON_INTERPRET=1"):
        explain((4096, 512), (512, 512), impl="triton")
    with pytest.raises(NotImplementedError, match=r"compute capability 7\.5"):
        explain((4096, 512), (512, 512), device=TURING, impl="triton")
    with pytest.raises(ValueError, match=r"^impl must be one of None, 'triton', 'torch', not 'cuda'$"):
        explain((4096, 512), (512, 512), impl="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device to explain")
def test_explain_of_an_absent_gpu():
    with pytest.raises(ValueError, match=r"^device .cuda. is not at hand; describe it with .*, or name its chip$"):
        explain((4, 2), (1, 2), device="cuda")


def test_explain_of_a_chip_by_name():
    named = explain((1 << 20, 64), (64, 64), torch.bfloat16, "RTX 4090")
    chip = Device("cuda", 89, 128, triton=True, name="NVIDIA GeForce RTX 4090")
    assert named == explain((1 << 20, 64), (64, 64), torch.bfloat16, chip)
    assert [plan.impl for plan in named] == ["rows", "rows"]
    assert str(named).count("RTX 4090 at peak rates (a model): ") == 2
    assert explain((4, 2), (1, 2), device="B200", impl="triton").forward.impl == "rows"
    with pytest.raises(ValueError, match=r"^device 'RTX 4070': .*; chips that it may name: 'RTX 3090', .*, 'B200'$"):
        explain((4, 2), (1, 2), device="RTX 4070")


# --- GPUs that the kernels cannot use -----------------------------------------------------------------------------


def forget_devices():
    for function in list(vars(device_questions).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture
def pretend(monkeypatch):
    """pretend(major, minor, triton) makes every GPU such a device; it must not be remembered by other tests.

    GPUs of several generations: pretend(capabilities=...), one pair for each.
    """

    def pretend(major=9, minor=0, triton=True, capabilities=None):
        def properties(device):
            pair = (major, minor) if capabilities is None else capabilities[device.index]
            return types.SimpleNamespace(major=pair[0], minor=pair[1], multi_processor_count=40, name="a GPU")

        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        refusal = None if triton else "triton is not installed"
        monkeypatch.setattr(device_questions, "triton_refusal", lambda: refusal)
        return torch.device("cuda", 0)

    forget_devices()
    yield pretend
    forget_devices()


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [((7, 5), True, r"compute capability 7\.5: the kernels need 8\.0"), ((9, 0), False, "triton is not installed")],
    ids=["turing", "no-triton"],
)
def test_unusable_gpus_are_named_once(capability, triton, reason, pretend):
    device = pretend(*capability, triton)
    with pytest.warns(UserWarning, match=f"^perceptriton runs as plain torch on cuda:0: {reason}$"):
        described = device_questions.describe(device)
    # From here on warnings are errors.
    assert device_questions.describe(device) == described
    assert not eligibility.launchable(device, torch.float32)
    assert planning.linear_act_fwd(4, 2, 1, "float32", "ieee", described).impl == "aten"


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_eager_calls_name_them_too(capability, pretend, monkeypatch):
    device = pretend(*capability, capability == (9, 0))
    small.few_on_gpu.cache_clear()
    expected = (
        pytest.warns(UserWarning, match=r"compute capability 7\.5")
        if capability == (7, 5)
        else contextlib.nullcontext()
    )
    with expected:
        limit = small.few_on_gpu((64, 64), torch.float32, False, device)
    assert limit == (math.inf if capability == (7, 5) else 0)
    small.few_on_gpu.cache_clear()


def test_a_gpu_whose_driver_triton_cannot_start_is_plain_torchs(pretend, monkeypatch):
    """As on an image without a C compiler: it must not be the first layer of a model that finds it out."""
    triton, real = pytest.importorskip("triton"), device_questions.triton_refusal
    device = pretend(9, 0, True)
    monkeypatch.setattr(device_questions, "triton_refusal", real)

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(triton.runtime, "driver", Driver())
    reason = "triton's driver does not start: Failed to find C compiler"
    with pytest.warns(UserWarning, match=f"^perceptriton runs as plain torch on cuda:0: {reason}"):
        described = device_questions.describe(device)
    assert not described.triton
    assert not eligibility.launchable(device, torch.float32)
    plans = explain((1 << 20, 64), (64, 64), device=described)
    assert {plan.impl for plan in plans} == {"aten"}
    assert plans.forward.reason.startswith(reason)
    small.few_on_gpu.cache_clear()
    assert small.few_on_gpu((64, 64), torch.float32, False, device) == math.inf
    small.few_on_gpu.cache_clear()


def test_usable_gpus_need_no_warning(pretend):
    device = pretend(9, 0, True)
    assert device_questions.describe(device) == Device("cuda", 90, 40, triton=True, name="a GPU")
    assert eligibility.launchable(device, torch.bfloat16)
    assert not eligibility.launchable(device, torch.float64)


def held_in_a_program_on(device, function=linear_act, rows=1 << 22, **options):
    """The registered ops in a compiled layer on a GPU that is not there: tracing asks for shapes and dtypes alone."""
    held = []

    def look(module, inputs):
        held.extend(str(node.target) for part in module.modules() for node in part.graph.nodes)
        return module

    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        x, weight, bias = (torch.empty(shape, device=device) for shape in ((rows, 16), (8, 16), (8,)))
        torch.compile(function, fullgraph=True, backend=look, **options)(x, weight, bias)
    return [name.removesuffix(f".{OVERLOAD}") for name in held if name.startswith("perceptriton.")]


# The compiler itself uses what torch deprecates.
@pytest.mark.filterwarnings("default")
def test_compiled_programs_hold_the_kernels(pretend, monkeypatch):
    pretend(9, 0, True)

    def network(x, weight, bias):
        return mlp_act(x, [weight, weight.t()])

    assert held_in_a_program_on("cuda") == ["perceptriton.linear_act"]
    assert held_in_a_program_on("cuda", network) == ["perceptriton.mlp"]
    # What torch's own calls do as fast they do here too, but for a batch of which nobody knows the size.
    for function in (linear_act, network):
        assert held_in_a_program_on("cuda", function, 64) == []
    assert held_in_a_program_on("cuda", rows=64, dynamic=True) == ["perceptriton.linear_act"]


# --- GPUs of several kinds ----------------------------------------------------------------------------------------

CAPABILITIES = [(9, 0), (8, 0), (7, 5), (10, 0), (8, 9)]  # an H200, an A100, a T4, a B200, an L4


@pytest.mark.filterwarnings("ignore:perceptriton runs as plain torch")
def test_each_gpu_of_a_process_has_plans_of_its_own(pretend, monkeypatch):
    pretend(capabilities=CAPABILITIES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # A torch with CUDA starts the driver for a fake tensor.
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None, raising=False)
    devices = [torch.device("cuda", index) for index in range(len(CAPABILITIES))]
    recipe = records.TrainConfig((64, 32, 8))
    for _ in range(2):  # found, and found again
        for device, (major, minor) in zip(devices, CAPABILITIES, strict=True):
            chip = Device("cuda", 10 * major + minor, 40, triton=True, name="a GPU")
            assert device_questions.describe(device) == chip
            assert explain((4096, 64), (64, 64), device=device) == explain((4096, 64), (64, 64), device=chip)
            with FakeTensorMode():
                x, weight = torch.empty(4096, 64, device=device), torch.empty(64, 64, device=device)
                plans = ops.mlp_plans(x, [weight, weight], training=True)
            args = (4096, (64, 64, 64), "float32", "ieee", chip)
            assert plans.backward == planning.mlp_bwd(*args)
            train = plan_train(1, 1000, 10, recipe, torch.float32, device)
            assert train == planning.train(1, 1000, 10, recipe, "float32", chip)
    usable = [eligibility.launchable(device, torch.float32) for device in devices]
    assert usable == [True, True, False, True, True]
    # Tiles of three generations, and plain torch: nothing here is the same for all.
    assert len({explain((4096, 256), (256, 256), torch.bfloat16, device).forward for device in devices}) > 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_programs_hold_kernels_for_the_gpus_that_have_some(pretend):
    pretend(capabilities=CAPABILITIES)
    found = [bool(held_in_a_program_on(f"cuda:{index}")) for index in range(len(CAPABILITIES))]
    assert found == [True, True, False, True, True]


@pytest.mark.filterwarnings("ignore:perceptriton runs as plain torch")
def test_a_device_without_a_number_is_the_current_one(pretend, monkeypatch):
    pretend(capabilities=CAPABILITIES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for index in (0, 1, 2, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        shapes = ((4096, 64), (64, 64))
        assert explain(*shapes, device="cuda") == explain(*shapes, device=f"cuda:{index}")
    assert explain(*shapes, device="cuda").forward.triton
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert not explain(*shapes, device="cuda").forward.triton


@pytest.mark.filterwarnings("default")
def test_rocm_takes_plain_torch(pretend, monkeypatch):
    # What a build for AMD's GPUs says of an MI250.
    device = pretend(9, 0, True)
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not held_in_a_program_on("cuda")
        assert not said, "a warning in a traced program would be an error"
        described = [device_questions.describe(device) for _ in range(2)]
    assert [str(warning.message) for warning in said] == [
        "perceptriton runs as plain torch on cuda:0: no kernels for ROCm devices"
    ]
    assert described == [Device("ROCm")] * 2
    kind = ("float32", "ieee", described[0])
    plans = (
        planning.linear_act_fwd(4096, 64, 64, *kind),
        planning.linear_act_bwd(4096, 64, 64, *kind),
        planning.mlp_fwd(4096, (64, 64, 64), *kind, True),
        planning.mlp_bwd(4096, (64, 64, 64), *kind),
        plan_train(1, 4, None, records.TrainConfig((2, 2, 1)), torch.float32, device),
    )
    assert {plan.impl for plan in plans} <= {"aten", "layers", "torch"}
    for call in (
        lambda: plan_train(1, 4, None, records.TrainConfig((2, 2, 1)), torch.float32, device, "lane"),
        lambda: explain((4096, 64), (64, 64), device=described[0], impl="triton"),
    ):
        with pytest.raises(NotImplementedError, match="no kernels for ROCm devices"):
            call()


def test_exported_programs_hold_no_kernels(pretend, monkeypatch):
    device = pretend(9, 0, True)
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    assert not eligibility.launchable(device, torch.float32)


def test_the_warning_waits_for_eager_code(pretend):
    # What a traced forward asks must neither warn, which is an error there, nor use the warning up.
    device = pretend(7, 0, True)
    assert not eligibility.launchable(device, torch.float32)
    with pytest.warns(UserWarning, match=r"compute capability 7\.0"):
        device_questions.describe(device)


# --- training -----------------------------------------------------------------------------------------------------


def train_xor(models, steps=400):
    """The last loss of each; one optimizer for all, since no gradient of one reaches another."""
    x, target = xor()
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=2.0, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = torch.stack([F.mse_loss(model(x), target) for model in models])
        losses.sum().backward()
        optimizer.step()
    return losses.detach()


@pytest.mark.slow
def test_xor_is_learned_from_the_same_seeds(take):
    # 2-2-1 is the smallest net that can, and gets stuck for some seeds: both must happen to the same ones.
    take("mm")
    pairs = []
    for seed in range(10):
        torch.manual_seed(seed)
        pairs.append(twins(2, 2, 1))
    ours, theirs = (train_xor(models) for models in zip(*pairs, strict=True))
    learned = theirs < 0.01
    assert 0 < learned.sum() < 10
    assert torch.equal(ours < 0.01, learned)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
