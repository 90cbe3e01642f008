# SPDX-License-Identifier: Apache-2.0
"""The doors under random arguments: what torch answers to the plain formula, or a TypeError or ValueError.

Every run draws the same cases; FUZZ_SEED=n draws others, FUZZ_BUDGET=1 all of them.
"""

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from perceptriton.kernels import Device, crossover, devices, explain, plan, records
from perceptriton.mlp import MLP, LinearSigmoid, linear_act, linear_sigmoid_bce, mlp_act

KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHER_KINDS = (
    *(torch.int64, torch.int8, torch.uint8, torch.uint16, torch.bool),
    *(torch.complex64, torch.float8_e4m3fn),
)
WIDTHS = (3, 1, 2, 5, 16, 17, 0)
LEADING = ((4,), (), (1,), (0,), (2, 3), (1, 33), (2, 0), (1, 2, 2))


def budget(examples):
    return settings(
        max_examples=max(1, int(cases.FUZZ_BUDGET * examples)),
        deadline=None,
        database=None,
        # The tables that the fixture swaps are the same for all cases of a test.
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


# --- arguments ---------------------------------------------------------------------------------------------


def expanded(t):
    return t[tuple(slice(1) if size > 1 else slice(None) for size in t.shape)].expand_as(t)


def turned(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() > 1 else t


LAYOUTS = {
    "dense": lambda t: t,
    **{f.__name__: f for f in (expanded, turned, cases.inside, cases.off_by_one)},
    "every_other": lambda t: cases.every_other(t) if t.dim() else t,
}
VALUES = {"normal": None, "huge": 1e4, "infinite": math.inf, "nan": math.nan}
NO_TENSORS = {
    "None": None,
    "a number": 1.5,
    "a string": "x",
    "a list": [[1.0, 2.0, 3.0]],
    "an array": np.ones((4, 3), np.float32),
    "an object": object(),
}


@dataclass(frozen=True)
class Operand:
    """A tensor that can be printed before it is made."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "dense"
    device: str = "cpu"
    values: str = "normal"
    wants_gradient: bool = True

    def make(self, numbers):
        t = torch.randn(self.shape, generator=numbers, dtype=torch.float64)
        if self.values != "normal" and t.numel():
            t.view(-1)[0] = VALUES[self.values]
        if not self.dtype.is_floating_point and not self.dtype.is_complex:
            t = t.nan_to_num(1).abs().clamp(max=9)
        t = t.to(self.dtype)
        if self.dtype in KINDS:
            t = LAYOUTS[self.layout](t)
        # Of float8, torch has no gradients.
        differentiable = t.dtype.itemsize > 1 and (t.is_floating_point() or t.is_complex())
        return t.to(self.device).requires_grad_(self.wants_gradient and differentiable)


@dataclass(frozen=True)
class NoTensor:
    what: str

    def make(self, numbers):
        return NO_TENSORS[self.what]


def made(arguments, numbers):
    if isinstance(arguments, Operand | NoTensor):
        return arguments.make(numbers)
    if isinstance(arguments, tuple | list):
        return type(arguments)(made(a, numbers) for a in arguments)
    return arguments


# Made once: to make a strategy costs more than to draw from it.
ONE_IN_EIGHT = st.sampled_from([False] * 7 + [True])
DTYPE, ANY_DTYPE, OTHER_DTYPE = (st.sampled_from(kinds) for kinds in (KINDS, KINDS + OTHER_KINDS, OTHER_KINDS))
LAYOUT, VALUE, NO_TENSOR = (st.sampled_from(tuple(names)) for names in (LAYOUTS, VALUES, NO_TENSORS))
WIDTH, BATCH, ACTIVATION = (st.sampled_from(values) for values in (WIDTHS, LEADING, cases.ACTIVATIONS))
ODD = st.sampled_from(["", "", "layout", "layout", "values", "gradients", "fault"])
FAULT = st.sampled_from(["shape", "shape", "dtype", "dtypes", "device", "devices", "type"])
NUMBER = st.integers(0, 1 << 16)
YES = st.booleans()


def operands(draw, *shapes, optional=()):
    """Operands of these shapes, mostly of one dtype and as they should be. `optional`: those that may be None."""
    dtype, odd = draw(DTYPE), draw(ODD)
    found = [Operand(shape, dtype) for shape in shapes]
    i = draw(NUMBER) % len(shapes)
    if odd == "layout":
        found = [replace(operand, layout=draw(LAYOUT)) for operand in found]
    elif odd == "values":
        found[i] = replace(found[i], values=draw(VALUE))
    elif odd == "gradients":
        found = [replace(operand, wants_gradient=draw(YES)) for operand in found]
    elif odd == "fault":
        found = faulty(draw, found, i)
    return tuple(None if j in optional and draw(ONE_IN_EIGHT) else operand for j, operand in enumerate(found))


def faulty(draw, found, i):
    """These operands with one of them wrong, or all of a kind that few take."""
    fault = draw(FAULT)
    if fault in ("dtypes", "devices"):
        changes = {"dtype": draw(OTHER_DTYPE)} if fault == "dtypes" else {"device": "meta"}
        return [replace(operand, **changes) for operand in found]
    if fault == "shape":
        shapes = misshapen(found[i].shape)
        wrong = replace(found[i], shape=shapes[draw(NUMBER) % len(shapes)])
    elif fault == "dtype":
        wrong = replace(found[i], dtype=draw(ANY_DTYPE))
    else:
        wrong = replace(found[i], device="meta") if fault == "device" else NoTensor(draw(NO_TENSOR))
    return [*found[:i], wrong, *found[i + 1 :]]


def misshapen(shape):
    """Shapes like this one, some of which broadcast to it."""
    last = shape[-1:] or (1,)
    grown = (*shape[:-1], last[0] + 1)
    return [grown, (), (1, *shape), shape[1:], shape[:-1], (*shape, 1), (*shape[:-1], 1), shape[::-1], (0, *shape)]


# --- the yardstick -----------------------------------------------------------------------------------------


def outcome(function):
    """(result, None) or (None, the error)."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def apart(arguments):
    """Whether tensors lie on different devices. torch then reads past what is there, if it does not notice."""
    flat = [a for group in arguments for a in (group if isinstance(group, tuple) else (group,))]
    return len({a.device for a in flat if isinstance(a, Operand)}) > 1


def inputs_of(arguments):
    flat = [t for a in arguments for t in (a if isinstance(a, tuple | list) else (a,))]
    return [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]


def upcast(arguments):
    def up(a):
        if isinstance(a, tuple | list):
            return tuple(up(t) for t in a)
        if not isinstance(a, torch.Tensor):
            return a
        wide = torch.complex128 if a.is_complex() else torch.float64
        return a.detach().to(wide).requires_grad_(a.requires_grad)

    return tuple(up(a) for a in arguments)


@dataclass
class Answers:
    """What a door, torch and torch in fp64 make of the same values: y and the gradients, by name."""

    actual: dict
    expected: dict
    exact: Callable[[], dict]

    def assert_same_kind(self):
        for name, e in self.expected.items():
            a = self.actual[name]
            assert (a is None) == (e is None), f"{name}: {a} instead of {e}"
            if a is not None:
                told = [(tuple(t.shape), t.dtype, t.device, t.layout) for t in (a, e)]
                assert told[0] == told[1], f"{name}: {told[0]} instead of {told[1]}"

    def spreads(self):
        """Whether what is infinite in one row may have reached others.

        On CPUs with AMX oneDNN's product in bfloat16 lets it where rows have an odd length, torch's own too.
        """
        found = [t for t in (*self.actual.values(), *self.expected.values()) if t is not None and not t.is_meta]
        half = [t for t in found if t.dtype is torch.bfloat16]
        return devices.cpu_kind() == "Intel AMX" and not all(bool(t.isfinite().all()) for t in half)

    def same_bits(self):
        pairs = zip(self.actual.values(), self.expected.values(), strict=True)
        return all(e is None or e.is_meta or torch.equal(a, e) for a, e in pairs)


def answers(formula, tensors, y, expected, numbers):
    """What came of these tensors, and the gradients behind it."""
    assert y.requires_grad == expected.requires_grad
    dy = Operand(tuple(y.shape), y.dtype, ("dense", "expanded", "turned", "inside")[y.numel() % 4]).make(numbers)
    dy = dy.detach().to(y.device)

    def with_gradients(y, tensors):
        if not y.requires_grad:
            return {"y": y}
        return {"y": y} | dict(enumerate(torch.autograd.grad(y, inputs_of(tensors), dy.to(y.dtype), allow_unused=True)))

    def exact():
        wide = upcast(tensors)
        return with_gradients(formula(*wide), wide)

    found = Answers(with_gradients(y, tensors), with_gradients(expected, tensors), exact)
    found.assert_same_kind()
    return found


def assert_values(trials):
    """No result farther from the truth than the yardstick allows, where the trials are taken together."""
    trials = [t for t in trials if not t.spreads()]
    everything = [(t.actual, t.expected, t.exact()) for t in trials]
    for name, e in trials[0].expected.items() if trials else ():
        if e is None or e.is_meta:
            continue
        a, e, exact = (torch.cat([t[name].detach().flatten() for t in of]) for of in zip(*everything, strict=True))
        finite = e.isfinite()
        assert torch.equal(a.isfinite(), finite), f"{name}: {a} instead of {e}"
        assert torch.allclose(a[~finite], e[~finite], equal_nan=True), f"{name}: {a} instead of {e}"
        kept = [[torch.where(finite, t, 0)] for t in (a, e, exact)]
        cases.assert_as_good_as_torch(*kept, a.dtype, names=(name,), allowance=torch.finfo(a.dtype).eps)


# A result of a few numbers may be near the truth by luck.
TRIALS = 32


def check(door, formula, arguments, named, refused=None, own_words=None):
    """door(*arguments) against formula(*arguments): the same answer and gradients, or an error where torch has one.

    named: the arguments' names, one of which a message has to hold. refused: what the door may refuse though torch
    answers, as its docstring says. own_words(error, torch's error): whether an error of another kind is right.
    """
    numbers = torch.Generator().manual_seed(0)
    tensors = made(arguments, numbers)
    y, error = outcome(lambda: door(*tensors))
    expected, torch_error = outcome(lambda: formula(*tensors))
    if error is not None and not (own_words is not None and own_words(error, torch_error)):
        assert type(error) in (TypeError, ValueError), f"{type(error).__name__}: {error}"
        assert any(name in str(error) for name in named), f"names no argument: {error}"
    if torch_error is None and apart(arguments):
        torch_error = "operands lie on different devices"
    if torch_error is not None:
        assert error is not None, f"answers {y} where torch has: {torch_error}"
    elif error is not None:
        assert refused is not None, f"refuses what torch answers: {error}"
        assert refused(*arguments), f"refuses what torch answers: {error}"
    else:
        trials = [answers(formula, tensors, y, expected, numbers)]
        if not trials[0].same_bits():
            try:
                assert_values(trials)
            except AssertionError:
                for _ in range(TRIALS):
                    tensors = made(arguments, numbers)
                    trials.append(answers(formula, tensors, door(*tensors), formula(*tensors), numbers))
                assert_values(trials)


def activate(z, activation):
    return z if activation == "identity" else getattr(torch, activation)(z)


# --- tables that send small shapes where large ones go -------------------------------------------------------

ANY = {"min_macs": 1, "min_width": 1, "min_in": 1}
TABLES = {
    "as-planned": None,
    "explicit": {"forward": None, "dx": None, "dweight": None},
    "onednn": {"forward": ANY, "dx": ANY, "dweight": ANY},
}


# Tensors of a few numbers: threads would only wait for each other.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.fuzz]


@contextlib.contextmanager
def cpu_table(name):
    """The door's choices on the CPU by another table: plain torch only where nothing else can."""
    if TABLES[name] is None:
        yield
        return
    own = {"small": 1, "chunk_above_bytes": 1 << 30, "chunk_bytes": 1 << 30}
    # oneDNN takes no float16; neither do the tables that were measured send it there.
    tables = {dtype: own | TABLES["explicit" if dtype == "float16" else name] for dtype in records.DTYPES}
    with pytest.MonkeyPatch.context() as patch:
        for asking in (crossover, plan.cpu):
            patch.setattr(asking, "cpu_thresholds", lambda dtype, vendor: tables.get(dtype))
        cases.forget_plans()
        yield
    cases.forget_plans()


@pytest.fixture(params=TABLES)
def table(request):
    with cpu_table(request.param):
        yield request.param


# --- the doors ---------------------------------------------------------------------------------------------


@st.composite
def layers(draw):
    k, n = draw(WIDTH), draw(WIDTH)
    return *operands(draw, (*draw(BATCH), k), (n, k), (n,), optional=(2,)), draw(ACTIVATION)


def narrower_than_torch(x, weight, bias, *_):
    """weight is (out_features, in_features) and bias (out_features,); torch takes one row and biases that broadcast."""
    return len(weight.shape) != 2 or (bias is not None and bias.shape != weight.shape[:1])


def plain_layer(x, weight, bias, activation):
    return activate(F.linear(x, weight, bias), activation)


@seed(cases.FUZZ_SEED)
@budget(2400)
@given(layers())
def test_layer(table, arguments):
    check(linear_act, plain_layer, arguments, ("x", "weight", "bias"), narrower_than_torch)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@seed(cases.FUZZ_SEED)
@budget(250)
@given(layers(), YES)
def test_kernels(device, arguments, whole):
    """The kernels of layers, or of whole networks of one layer, which may refuse with the reason."""

    # Kernels of whole networks pad widths with zeros, and an infinite activation times 0 is NaN.
    assume(not (whole and any(isinstance(a, Operand) and a.values == "infinite" for a in arguments)))

    def door(x, weight, bias, activation):
        if whole:
            return mlp_act(x, (weight,), None if bias is None else (bias,), activation, impl="triton")
        return linear_act(x, weight, bias, activation, impl="triton")

    def refused(x, weight, bias, _):
        return narrower_than_torch(x, weight, bias) or x.dtype not in cases.DTYPES or x.device == "meta"

    def own_words(error, torch_error):
        return type(error) is NotImplementedError and re.match('impl="triton": .+', str(error))

    on = tuple(replace(a, device=device) if isinstance(a, Operand) and a.device == "cpu" else a for a in arguments)
    check(door, plain_layer, on, ("x", "weight", "bias"), refused, own_words)


@seed(cases.FUZZ_SEED)
@budget(800)
@given(layers())
def test_module(arguments):
    """A layer of which the parameters are replaced, as load_state_dict(assign=True) and functional_call do."""

    def module(x, weight, bias, _):
        layer = LinearSigmoid(1, 1)
        for name, tensor in (("weight", weight), ("bias", bias)):
            delattr(layer, name)
            setattr(layer, name, tensor)
        return layer(x)

    def formula(x, weight, bias, _):
        return torch.sigmoid(F.linear(x, weight, bias))

    check(module, formula, arguments, ("x", "weight", "bias"), narrower_than_torch)


REDUCTION = st.sampled_from(["none", "mean", "sum", "mean", "sum", "max", None])


@st.composite
def losses(draw):
    k, n, batch = draw(WIDTH), draw(WIDTH), draw(BATCH)
    found = operands(draw, (*batch, k), (n, k), (n,), (*batch, n), (n,), optional=(2, 4))
    # torch's loss has no gradient for pos_weight: nine of ten cases are to get farther than that.
    *others, pos_weight = found
    if isinstance(pos_weight, Operand):
        pos_weight = replace(pos_weight, wants_gradient=draw(ONE_IN_EIGHT))
    return *others, pos_weight, draw(REDUCTION)


def plain_loss(x, weight, bias, target, pos_weight, reduction):
    z = F.linear(x, weight, bias)
    return F.binary_cross_entropy_with_logits(z, target, pos_weight=pos_weight, reduction=reduction)


@seed(cases.FUZZ_SEED)
@budget(1800)
@given(losses())
def test_loss(table, arguments):
    def door(x, weight, bias, target, pos_weight, reduction):
        return linear_sigmoid_bce(x, weight, bias, target, pos_weight=pos_weight, reduction=reduction)

    def refused(x, weight, bias, target, pos_weight, reduction):
        return narrower_than_torch(x, weight, bias) or not target.dtype.is_floating_point

    named = ("x", "weight", "bias", "target", "pos_weight", "reduction")
    check(door, plain_loss, arguments, named, refused)


# --- whole networks ----------------------------------------------------------------------------------------

SIZES = st.sampled_from([(2, 3, 1), (3, 5), (4, 3, 3, 2), (1, 1, 1), (17, 16, 3), (3, 0, 2)])


@st.composite
def networks(draw):
    sizes = draw(SIZES)
    pairs = list(pairwise(sizes))
    shapes = ((*draw(BATCH), sizes[0]), *((n, k) for k, n in pairs), *((n,) for _, n in pairs))
    x, *parameters = operands(draw, *shapes)
    weights, biases = tuple(parameters[: len(pairs)]), tuple(parameters[len(pairs) :])
    if draw(ONE_IN_EIGHT):
        weights = draw(st.sampled_from([(), weights[:-1], weights[::-1], None, weights[0]]))
    if draw(ONE_IN_EIGHT):
        biases = draw(st.sampled_from([None, None, (), biases[:-1], biases[0]]))
    return x, weights, biases, draw(ACTIVATION), draw(ACTIVATION)


def plain_network(x, weights, biases, hidden, output):
    if not isinstance(weights, tuple) or not isinstance(biases, tuple | None) or not weights:
        raise TypeError("not one weight and bias per layer")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"{len(biases)} biases for {len(weights)} weights")
    last = len(weights) - 1
    for l, (weight, bias) in enumerate(zip(weights, biases or (None,) * len(weights), strict=True)):
        x = activate(F.linear(x, weight, bias), output if l == last else hidden)
    return x


def narrow_network(x, weights, biases, *_):
    pairs = list(zip(weights, biases or [None] * len(weights), strict=True))
    # All layers have a bias or none has.
    return any(isinstance(bias, NoTensor) or narrower_than_torch(x, weight, bias) for weight, bias in pairs)


@seed(cases.FUZZ_SEED)
@budget(2000)
@given(networks())
def test_network(table, arguments):
    check(mlp_act, plain_network, arguments, ("x", "weights", "biases"), narrow_network)


@seed(cases.FUZZ_SEED)
@budget(900)
@given(networks())
def test_mlp(table, arguments):
    """An MLP of which the parameters are replaced for one call."""
    _, weights, biases, hidden, output = arguments
    assume(isinstance(weights, tuple) and isinstance(biases, tuple) and len(weights) == len(biases) > 0)
    # What is no tensor, functional_call refuses itself.
    assume(all(isinstance(part, Operand) for part in (*weights, *biases)))
    with warnings.catch_warnings():
        # torch says that a layer without inputs has nothing to initialize.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = MLP([2] * (len(weights) + 1), hidden, output)
    names = [f"{2 * l}.{kind}" for kind in ("weight", "bias") for l in range(len(weights))]

    def door(x, weights, biases, *_):
        return torch.func.functional_call(model, dict(zip(names, (*weights, *biases), strict=True)), (x,))

    # A layer without activation is an nn.Linear, with torch's own errors, and its silence about a weight elsewhere.
    plain = "identity" in (hidden, output)
    assume(not (plain and apart(arguments)))

    def own_words(error, torch_error):
        return plain and type(error) is type(torch_error)

    check(door, plain_network, arguments, ("x", "weight", "bias"), narrow_network, own_words)


@seed(cases.FUZZ_SEED)
@budget(1000)
@given(
    st.one_of(
        st.lists(st.integers(-1, 5), max_size=4),
        st.lists(st.sampled_from([2, 3, True, 2.0, None, "2"]), max_size=3),
        st.sampled_from([None, 3, "23", (2, 3), range(1, 4), np.array([2, 3])]),
    ),
    st.sampled_from([*cases.ACTIVATIONS, *cases.ACTIVATIONS, "softmax", None, 1, ["sigmoid"]]),
    YES,
    st.sampled_from([*KINDS, None, *OTHER_KINDS, "float32"]),
)
def test_mlp_of_any_sizes(sizes, activation, bias, dtype):
    """The constructor takes what a chain of nn.Linear takes, if the activation has a name."""

    def plain():
        if activation not in cases.ACTIVATIONS or not isinstance(sizes, Sequence) or len(sizes) < 2:
            raise ValueError
        if any(isinstance(size, bool) for size in sizes):
            raise TypeError  # torch takes one that is not the first of a shape
        return nn.Sequential(*(nn.Linear(k, n, bias, dtype=dtype) for k, n in pairwise(sizes)))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        torch.random.default_generator.manual_seed(0)
        model, error = outcome(lambda: MLP(sizes, activation, bias=bias, dtype=dtype))
        torch.random.default_generator.manual_seed(0)
        expected, torch_error = outcome(plain)
    if torch_error is not None:
        expected_types = (TypeError, ValueError, type(torch_error))
        assert type(error) in expected_types, f"{model or repr(error)} where torch has: {torch_error!r}"
        return
    assert error is None, f"refuses what torch takes: {error!r}"
    pairs = list(zip(model.parameters(), expected.parameters(), strict=True))
    assert all(a.dtype == e.dtype and torch.equal(a, e) for a, e in pairs)


# --- explain -----------------------------------------------------------------------------------------------

IMPLS = (None, None, "torch", "triton", "cuda", 1, ["torch"])
SIZE = st.sampled_from([0, 1, 2, 3, 16, 64, 128, 256, 1000, 4096, 1 << 20, -1, 2.0, None, "3"])
SHAPE = st.one_of(st.lists(SIZE, max_size=3), st.sampled_from([None, 3, "ab", torch.Size([4, 3])]))
DEVICE = st.sampled_from(
    ["cpu", "meta", torch.device("cpu"), "nowhere", None, 7.5]
    + [Device("cuda", arch, 132, triton=True) for arch in (75, 80, 86, 90, 100, 120)]
)


@st.composite
def shapes_of_layers(draw):
    """A layer or a network that fits, or what comes to hand."""
    if draw(ONE_IN_EIGHT):
        return draw(SHAPE), draw(st.one_of(SHAPE, st.lists(SHAPE, max_size=3)))
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 3, 16, 64, 100, 128, 256, 4096]), min_size=2, max_size=5))
    weights = [(n, k) for k, n in pairwise(sizes)]
    return (*draw(BATCH), draw(st.sampled_from([1, 100, 1 << 20])), sizes[0]), weights[0] if draw(YES) else weights


def fits(x_shape, weight_shape):
    """Whether x @ weight.T would, for each weight in turn, on meta tensors."""
    y = torch.empty(tuple(x_shape), device="meta")
    weights = weight_shape if len(weight_shape) and not isinstance(weight_shape[0], int) else [weight_shape]
    for shape in weights:
        if len(shape) != 2:
            raise ValueError("torch's vectors")
        y = F.linear(y, torch.empty(tuple(shape), device="meta"))


@seed(cases.FUZZ_SEED)
@budget(2500)
@given(shapes_of_layers(), st.sampled_from([*KINDS, *OTHER_KINDS, None, "float32"]), DEVICE, st.sampled_from(IMPLS))
def test_explain(shapes, dtype, device, impl):
    found, error = outcome(lambda: explain(*shapes, dtype, device, impl=impl))
    _, misfit = outcome(lambda: fits(*shapes))
    wrong = misfit is not None or impl not in records.IMPLS or not isinstance(dtype, torch.dtype)
    wrong = wrong or device in ("nowhere", None, 7.5)
    if wrong:
        assert type(error) in (TypeError, ValueError), f"{found or repr(error)} where torch has: {misfit!r}"
    elif error is not None:
        assert impl == "triton", f"refuses what torch answers: {error!r}"
        assert type(error) is NotImplementedError
    else:
        assert all(choice.reason for choice in found)
