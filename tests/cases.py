# SPDX-License-Identifier: Apache-2.0
"""The cases that every op is tested with, each with its reason, and the yardstick that they are measured by."""

import contextlib
import importlib.util
import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perceptriton.kernels import calls, crossover, plan, small, tables
from perceptriton.mlp import MLP, linear_act

# (rows, in_features, out_features): why
SHAPES = {
    "xor-hidden": (4, 2, 2),
    "xor-head": (4, 2, 1),  # [N, 1] heads break narrow stores
    "single": (1, 1, 1),
    "row": (1, 16, 16),
    "exact-tile": (64, 16, 32),  # no mask is ever false
    "ragged": (100, 10, 31),  # every mask is false somewhere
    "one-off": (65, 17, 33),
    "deep-k": (33, 200, 9),  # wider than the tile that keeps the weight on chip
    "wide": (70, 100, 150),
}
EMPTY_SHAPES = {
    "no-rows": (0, 3, 2),
    "no-inputs": (5, 0, 2),  # act(bias)
    "no-outputs": (5, 3, 0),
}
MODULES = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "identity": nn.Identity}
ACTIVATIONS = tuple(MODULES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# What tests/mlp/test_fuzz.py draws its cases from, and which part of them it draws.
FUZZ_SEED = int(os.environ.get("FUZZ_SEED", "0"))
FUZZ_BUDGET = float(os.environ.get("FUZZ_BUDGET", "0.15"))


def core(names, *own):
    """Parameters by name: `make check` runs those of its own under the interpreter, `make test-more` the others."""
    return [pytest.param(name, marks=pytest.mark.core if name in own else pytest.mark.more) for name in names]


# What a dtype's own rounding may add to twice torch's error, as a relative norm.
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 4e-4}
WORST = {}  # dtype -> the largest error that passed in this process, as a part of what was allowed
# What TF32 adds where torch may multiply in fp32, as it does on a CPU: 3e-4 of rounded operands, 8e-4 of cut ones.
TF32 = 6e-4


EMULATED = None  # the chip that tests/ptx emulates, as in "sm_90": pytest --compiled-for


def kernel_device():
    """Where kernels run in this process: "cpu" in triton's interpreter or emulated, "cuda" on a GPU, None nowhere."""
    if importlib.util.find_spec("triton") is None:
        return None
    # Asked first: in the interpreter even a machine with a GPU computes on the CPU.
    if EMULATED or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "cpu"
    return "cuda" if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else None


NO_KERNELS = "needs a GPU or TRITON_INTERPRET=1; make test runs it under the interpreter"


@contextlib.contextmanager
def poisoned():
    """torch.empty gives NaN: torch's deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Spy:
    """A kernel that keeps what it was launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(**arguments):
            self.launches.append(arguments | {"grid": grid})
            return self.kernel[grid](**arguments)

        return launch


def spy_on(monkeypatch, module, name):
    """The kernel of that name, which keeps what it is launched with from now on."""
    calls.forget()  # what has been launched before would be launched without it
    spy = Spy(getattr(module, name))
    monkeypatch.setattr(module, name, spy)
    return spy


def nothing_is_small(monkeypatch):
    """No call on a CPU stays with plain torch for its size before anything is planned."""
    monkeypatch.setattr(small, "prefers_torch", lambda x, widths: not x.numel() or 0 in widths)
    monkeypatch.setattr(small, "is_small", small.prefers_torch)
    monkeypatch.setattr(small, "few_elements", lambda widths, *_: 1 << 62 if 0 in widths else 1)


def limit_eager_calls(monkeypatch, without, training):
    """Bytes of x and y, per layer, below which eager calls on a GPU take plain torch, without gradients and with."""
    monkeypatch.setattr(crossover, "eager_limit", lambda widths, grad, *_: training if grad else without)
    monkeypatch.setattr(small, "few_on_gpu", getattr(small.few_on_gpu, "__wrapped__", small.few_on_gpu))
    calls.forget()


def forget_plans():
    """Empties what plans, and the door above them, remember of shapes and tables."""
    calls.forget()
    for remembering in (
        *vars(plan).values(),
        plan.network._mlp_row,
        small.few_elements,
        small.few_on_gpu,
        crossover.eager_limit,
        crossover.cpu_rows,
        tables.read_table,
    ):
        if hasattr(remembering, "cache_clear"):
            remembering.cache_clear()


# How the same operand may lie in memory. What lies between and around the values is NaN, so that whoever reads
# past a view, or reads it as if it were dense, computes NaN.


def every_other(t):
    view = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)[..., ::2]
    return view.copy_(t)


def inside(t):
    """The interior of a larger tensor: rows are farther apart than they are long."""
    view = t.new_full([size + 6 for size in t.shape], torch.nan)[(slice(3, -3),) * t.dim()]
    return view.copy_(t)


def off_by_one(t):
    """One element after an aligned address, which no 16-byte load may assume."""
    return t.new_full((t.numel() + 2,), torch.nan)[1:-1].view(t.shape).copy_(t)


def transposed(t):
    return t.t().contiguous().t()


def one_row(t):
    return t[:1].expand_as(t)


def one_column(t):
    return t[:, :1].expand_as(t)


def one_value(t):
    return t[(slice(1),) * t.dim()].expand_as(t)


def negated(t):
    """Memory holds -t, densely, and the tensor says so: t.is_neg()."""
    return torch._neg_view(-t)


def conjugated(t):
    """z.conj().imag, which autograd sends through torch.complex: memory holds -t, beside real parts that are NaN."""
    return torch.complex(torch.full_like(t, torch.nan), -t).conj().imag


LAYOUTS = {
    f"{operand}-{layout.__name__}": (operand, layout)
    for operand, layouts in {
        "x": (every_other, inside, off_by_one, transposed, one_row, one_column, negated, conjugated),
        "weight": (every_other, inside, off_by_one, transposed, negated, conjugated),
        "bias": (every_other, off_by_one, one_value, negated, conjugated),
        # sum() sends stride (0, 0), t().contiguous() (1, M), cat rows inside longer ones
        "dy": (every_other, inside, off_by_one, transposed, one_row, one_column, one_value, negated, conjugated),
    }.items()
    for layout in layouts
}


def lay_out(tensors, name):
    """make_layer's tensors with one of them in the layout of that name."""
    operand, layout = LAYOUTS[name]
    operands = dict(zip(("x", "weight", "bias", "dy"), tensors, strict=True))
    return tuple((operands | {operand: layout(operands[operand])}).values())


# A loss, and the strides of the gradient that autograd sends back from it, for y (M, N)
LOSSES = {
    "sum": (lambda y, c: y.sum(), lambda m, n: (0, 0)),
    "mean": (lambda y, c: (y * c).mean(), lambda m, n: (n, 1)),
    "row-sums": (lambda y, c: (y.sum(1) * c[:, 0]).sum(), lambda m, n: (1, 0)),
    "transposed": (lambda y, c: (y.t().contiguous() * c.t().contiguous()).sum(), lambda m, n: (1, m)),
    "cat-columns": (lambda y, c: (torch.cat([y, y], 1) * torch.cat([c, -2 * c], 1)).sum(), None),
    "cat-left": (lambda y, c: (torch.cat([y, c], 1) * torch.cat([c, c], 1)).sum(), lambda m, n: (2 * n, 1)),
    "cat-rows": (lambda y, c: (torch.cat([c, y], 0) * torch.cat([c, c], 0)).sum(), lambda m, n: (n, 1)),
    "every-other": (lambda y, c: (y[:, ::2] * c[:, ::2]).sum(), None),
    "first-row": (lambda y, c: (y[0] * c[0]).sum(), None),
}


def make_layer(m, k, n, dtype, device="cpu", seed=0):
    """x, weight, bias, dy with pre-activations of std near 1.5 and upstream gradients of order 1.

    Gradients of a default-initialized sigmoid net are so small that zeros pass most tolerances.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, bias, dy = normal(m, k), 1.4 * normal(n, k) / max(k, 1) ** 0.5, 0.5 * normal(n), normal(m, n)
    return tuple(t.to(device, dtype) for t in (x, weight, bias, dy))


def make_network(widths, leading, dtype, device="cpu", gain=4.0, seed=0):
    """x, weights, biases, dy with pre-activations of std 1 to 2 and upstream gradients of order 1.

    Sigmoids spread by 0.2 around 0.5: it takes weights of 4 / sqrt(K) to keep pre-activations that large.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, gain=1.0):
        return (gain * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(device, dtype)

    x, dy = normal(*leading, widths[0]), normal(*leading, widths[-1])
    pairs = list(enumerate(itertools.pairwise(widths)))
    weights = [normal(n, k, gain=(gain if l else 1.4) / k**0.5) for l, (k, n) in pairs]
    return x, weights, [normal(n, gain=0.5) for n in widths[1:]], dy


def make_layers(m, k, n, dtype, device="cpu"):
    """make_layer for as many seeds as it takes that a layer of a few numbers is not near the truth by luck."""
    return [make_layer(m, k, n, dtype, device, seed) for seed in range(max(1, 32 // (m * n)))]


def join(results):
    """The results of several layers as one of each name, for one relative norm over all of them."""
    return tuple(torch.cat([t.flatten() for t in tensors]) for tensors in zip(*results, strict=True))


def torch_layer(x, weight, bias, dy, activation, dtype=None):
    """y, dx, dweight, dbias of the same values from torch's own operations and autograd, in `dtype`.

    Of dense tensors: where CPUs have AMX, torch's bfloat16 product reads on beyond the end of a row, times 0, and a NaN
    that lies between the rows of a larger matrix is in all of y.
    """
    x, weight, bias, dy = (
        t if t is None else t.detach().to(dtype or t.dtype).contiguous() for t in (x, weight, bias, dy)
    )
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    z = F.linear(*inputs)
    y = z if activation == "identity" else getattr(torch, activation)(z)
    return (y.detach(), *torch.autograd.grad(y, inputs, dy))


def second_order(y, inputs, dy):
    """The gradients of y, again with a graph, and those of the sum of their squares."""
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    double = torch.autograd.grad(y, inputs, dy, create_graph=True)
    penalty = sum(g.square().sum() for g in double)
    return [*first, *double, *torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True)]


def written(y):
    """What in-place operations make of an output, in a way that each of its elements still counts."""
    y.mul_(2).add_(1)
    y[y > 1.5] = 0.5
    return y.square()


def sequential(sizes, activation="sigmoid", output_activation=None, **options):
    """What an MLP stands for."""
    names = [activation] * (len(sizes) - 2) + [output_activation or activation]
    layers = zip(itertools.pairwise(sizes), names, strict=True)
    return nn.Sequential(*(module for pair, n in layers for module in (nn.Linear(*pair, **options), MODULES[n]())))


def twins(*sizes, **options):
    """An MLP and the nn.Sequential of the same parameters."""
    model, twin = MLP(sizes, **options), sequential(sizes, **options)
    twin.load_state_dict(model.state_dict())
    return model, twin


def train_step(model, x):
    """y and every gradient."""
    x = x.clone().requires_grad_()
    y = model(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])


def assert_same(model, twin, x=None, **tolerance):
    """Both networks compute the same outputs and the same gradients."""
    if x is None:
        first = next(twin.parameters())
        x = torch.randn(7, first.shape[1], device=first.device)
    torch.testing.assert_close(train_step(model, x), train_step(twin, x), **tolerance)


def same_bits(actual, expected):
    """Whether two tensors, or sequences of them, are the same to the bit, NaN and the sign of zero included."""
    if isinstance(actual, torch.Tensor):
        return torch.equal(*(t.detach().contiguous().view(BITS[t.element_size()]) for t in (actual, expected)))
    return all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))


def relative_error(actual, truth):
    """|actual - truth| / |truth| in fp64; absolute where the truth is 0."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    return ((actual - truth).norm() / (truth.norm() if truth.norm() > 0 else 1)).item()


def assert_near(actual, expected, bound):
    """Every relative error is below the bound."""
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < bound


def assert_as_good_as_torch(actual, torch_result, truth, dtype, names=("y", "dx", "dweight", "dbias"), allowance=0.0):
    """Each result no farther from the fp64 truth than twice torch's own in this dtype, plus the dtype's floor."""
    for name, a, t, exact in zip(names, actual, torch_result, truth, strict=True):
        error, torch_error = relative_error(a, exact), relative_error(t, exact)
        bound = 2 * torch_error + FLOOR[dtype] + allowance
        # `not <=`: a NaN must fail
        if not error <= bound:
            difference = (a.detach().double().cpu() - exact.double().cpu()).abs()
            where = tuple(torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), difference.shape))
            index = tuple(int(i) for i in where)
            raise AssertionError(
                f"{name}: error {error:.2e} > {bound:.2e} (torch {torch_error:.2e}); "
                f"at {index}: {a[index].item()} instead of {exact[index].item()}"
            )
        WORST[dtype] = max(WORST.get(dtype, 0), error / bound)


def assert_as_good_as_the_worst(kinds, dtype, allowance=0.0):
    """Every tensor no farther from the fp64 truth than twice the worst of its kind that torch computes in this dtype.

    kinds: by name, the (actual, torch's, exact) of each tensor. One of a few numbers may be near the truth by luck; the
    worst of torch's is not.
    """
    for name, tensors in kinds.items():
        torch_error = max((relative_error(t, exact) for _, t, exact in tensors), default=0)
        bound = 2 * torch_error + FLOOR[dtype] + allowance
        for index, (actual, _, exact) in enumerate(tensors):
            error = relative_error(actual, exact)
            # `not <=`: a NaN must fail
            if not error <= bound:
                raise AssertionError(f"{name} {index}: error {error:.2e} > {bound:.2e} (torch {torch_error:.2e})")
            WORST[dtype] = max(WORST.get(dtype, 0), error / bound)


def torch_bce(z, target, pos_weight=None, reduction="mean"):
    """F.binary_cross_entropy_with_logits with everything in the dtype of z."""
    weight = None if pos_weight is None else pos_weight.to(z.dtype)
    return F.binary_cross_entropy_with_logits(z, target.to(z.dtype), pos_weight=weight, reduction=reduction)


def plain(x, weight, bias=None, activation="sigmoid"):
    z = F.linear(x, weight, bias)
    return z if activation == "identity" else getattr(torch, activation)(z)


def plain_network(x, weights, biases, hidden="sigmoid", output="sigmoid"):
    for l, weight in enumerate(weights):
        x = plain(x, weight, biases[l] if biases else None, output if l == len(weights) - 1 else hidden)
    return x


def run_layer(x, weight, bias, dy, activation="sigmoid", layer=linear_act, **options):
    """y and the gradients of x, weight and bias (where there is one)."""
    inputs = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = layer(*inputs, activation, **options)
    return (y.detach(), *torch.autograd.grad(y, [t for t in inputs if t is not None], dy))


def check_layer(actual, x, weight, bias, dy, activation="sigmoid"):
    expected = torch_layer(x, weight, bias, dy, activation)
    exact = torch_layer(x, weight, bias, dy, activation, torch.float64)
    names = ("y", "dx", "dweight", "dbias")[: len(exact)]
    for name, result in zip(names, actual, strict=True):
        assert result.dtype is x.dtype, name
    assert_as_good_as_torch(actual, expected, exact, x.dtype, names)


# Checks of every way through a layer: run(x, weight, bias, dy, activation) gives y and the gradients.


def check_shape(run, shape, activation, dtype, device="cpu"):
    layers = make_layers(*SHAPES[shape], dtype, device)
    actual = [run(*layer, activation) for layer in layers]
    assert [t.shape for t in actual[0]] == [t.shape for t in torch_layer(*layers[0], activation)]
    expected = [torch_layer(*layer, activation) for layer in layers]
    exact = [torch_layer(*layer, activation, torch.float64) for layer in layers]
    assert_as_good_as_torch(join(actual), join(expected), join(exact), dtype)


def check_empty(run, shape, device="cpu"):
    x, weight, bias, dy = make_layer(*EMPTY_SHAPES[shape], torch.float32, device)
    y, dx, dweight, dbias = run(x, weight, bias, dy)
    torch.testing.assert_close(y, torch.sigmoid(bias).expand_as(y))
    assert [t.shape for t in (dx, dweight, dbias)] == [t.shape for t in (x, weight, bias)]
    torch.testing.assert_close(dbias, (dy * y * (1 - y)).sum(0))
    assert not dx.any()
    assert not dweight.any()


def check_extremes(run, activation, dtype, device="cpu"):
    """Pre-activations that are 0, near or beyond where exp overflows or underflows, infinite and NaN."""
    zs = (0.0, 17.0, 88.0, 89.0, 104.0, 1e4, torch.inf)
    for z in (*zs, *(-z for z in zs), torch.nan):
        # z comes in through the bias, so that its gradient is dz; a row of 1 by 1 keeps the extremes apart.
        operands = (((1, 1), 0.0), ((1, 1), 0.5), ((1,), z), ((1, 1), 1.0))
        tensors = [torch.full(size, value, dtype=dtype, device=device) for size, value in operands]
        actual, expected = run(*tensors, activation), torch_layer(*tensors, activation)
        # A rounding or two of the dtype. The approximate reciprocal root flushes the subnormal y below z = -87; the
        # gradient of a saturated unit is made of the last bit of y.
        eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        for results, atol in ((slice(1), 2 * tiny), (slice(1, 4), eps if z > 0 else 2 * tiny)):
            close = {"rtol": max(4 * eps, 2e-6), "atol": atol, "equal_nan": True, "msg": f"z = {z}: {{}}".format}
            torch.testing.assert_close(actual[results], expected[results], **close)


def check_autocast(layer, dtype, device="cpu", inside=False):
    """The layer under autocast, its backward pass inside or outside of it."""
    x, weight, bias, dy = make_layer(*SHAPES["ragged"], torch.float32, device)
    dy = dy.to(dtype)

    def gradients(layer):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        with torch.autocast(device, dtype):
            y = layer(*inputs)
            if inside:
                y.backward(dy)
        if not inside:
            y.backward(dy)
        return y.detach(), *(t.grad for t in inputs)

    actual, expected = gradients(layer), gradients(plain)
    assert actual[0].dtype is expected[0].dtype is dtype
    assert [t.dtype for t in actual[1:]] == [torch.float32] * 3
    # The values that both see are the parameters rounded to the dtype.
    exact = torch_layer(*(t.to(dtype) for t in (x, weight, bias)), dy, "sigmoid", torch.float64)
    assert_as_good_as_torch(actual, expected, exact, dtype)


def check_written(layer, leading, device="cpu", results=second_order):
    """Outputs that in-place operations have written to, and results(y, inputs, dy), are those of torch."""
    x, weight, bias, dy = make_layer(math.prod(leading), 7, 5, torch.float32, device)
    x, dy = x.view(*leading, 7), dy.view(*leading, 5)
    found = []
    for own in (layer, plain):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = written(own(*inputs, "identity"))
        found.append([y, *results(y, inputs, dy)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def check_yardstick(run, check, name, wrong, device="cpu"):
    """The yardstick takes run's results, and refuses them with that one of them wrong."""
    # Square, so that a transposed gradient has the right shape.
    tensors = make_layer(50, 16, 16, torch.bfloat16, device)
    results = dict(zip(("y", "dx", "dweight", "dbias"), run(*tensors), strict=True))
    check(*tensors, actual=tuple(results.values()))
    results[name] = wrong(results[name])
    with pytest.raises(AssertionError, match=f"^{name}: error"):
        check(*tensors, actual=tuple(results.values()))


def check_inputs_are_left_alone(layer, x, weight, bias, dy):
    before = [t.clone() for t in (x, weight, bias, dy)]
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = layer(*inputs)
    output = y.detach().clone()
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    copies = [g.clone() for g in first]
    other = torch.autograd.grad(y, inputs, 2 * dy, retain_graph=True)
    again = torch.autograd.grad(y, inputs, dy)
    assert same_bits((*inputs, dy, y), (*before, output))
    # Neither do later calls reach into what earlier ones returned.
    assert same_bits((*again, *first), copies * 2)
    # A factor of 2 is exact.
    assert same_bits(other, [2 * g for g in first])


def check_gradients(differentiate, layer, x, weight, bias, dy):
    """differentiate(layer, x, weight, bias, dy), the gradients of some loss, is as good as torch's."""
    tensors = (x, weight, bias, dy)
    actual, expected = differentiate(layer, *tensors), differentiate(plain, *tensors)
    exact = differentiate(plain, *(t.double() for t in tensors))
    assert_as_good_as_torch(actual, expected, exact, torch.float32, ("dx", "dweight", "dbias"))


def check_loss(layer, loss, *tensors):
    def gradients(layer, x, weight, bias, c):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(LOSSES[loss][0](layer(*inputs), c), inputs)

    check_gradients(gradients, layer, *tensors)


def gradient_penalty(layer, x, weight, bias, dy):
    """Gradients of a 1-Lipschitz penalty, which are second derivatives of the layer."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    (dx,) = torch.autograd.grad((layer(*inputs) * dy).sum(), inputs[0], create_graph=True)
    return torch.autograd.grad(((dx.norm(dim=-1) - 1) ** 2).sum(), inputs)


# Which of dx, dweight and dbias are asked for, by name.
WANTED = {
    "+".join(itertools.compress(("dx", "dw", "db"), wanted)): wanted
    for wanted in itertools.product((True, False), repeat=3)
    if any(wanted)
}
# Results that the yardstick has to refuse, as (name of the result, what is done to it).
WRONG = {
    **{f"{name}-zeros": (name, torch.zeros_like) for name in ("y", "dx", "dweight", "dbias")},
    **{
        f"{name}-constant": (name, lambda t: torch.full_like(t, t.mean().item()))
        for name in ("y", "dx", "dweight", "dbias")
    },
    "dweight-transposed": ("dweight", lambda t: t.t().contiguous()),
}
