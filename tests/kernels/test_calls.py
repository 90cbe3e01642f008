# SPDX-License-Identifier: Apache-2.0
"""What was decided for one call is found for those that are like it, and for no other."""

import contextlib
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import kernel_device, spy_on
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from perceptriton.kernels import allow_fp32_split, calls, ops
from perceptriton.kernels.calls import Calls
from perceptriton.mlp import linear_act, mlp_act

DEVICE = kernel_device()


class Sub(torch.Tensor):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def operands():
    return torch.randn(4, 6), nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))


def with_weight(change):
    def changed():
        x, weight, bias = operands()
        return x, change(weight), bias

    return changed


def data(change):
    """The same parameter, whose data are others."""

    def changed(weight):
        weight.data = change(weight.data)
        return weight

    return with_weight(changed)


def tangent():
    x, *others = operands()
    return forward_ad.make_dual(x, torch.ones_like(x)), *others


OTHERS = {
    "dtype": data(torch.Tensor.bfloat16),
    "strides": data(torch.Tensor.t),  # a square matrix, of the same shape and at the same place
    "shape": lambda: (torch.randn(5, 6), *operands()[1:]),
    "dimensions": lambda: (torch.randn(2, 2, 6), *operands()[1:]),
    "device": with_weight(lambda weight: nn.Parameter(torch.empty_like(weight, device="meta"))),
    "frozen": with_weight(lambda weight: weight.requires_grad_(False)),
    "class": with_weight(lambda weight: weight.detach().requires_grad_()),
    "subclass": with_weight(lambda weight: weight.detach().as_subclass(Sub).requires_grad_()),
    "negated": data(lambda weight: torch.complex(weight, weight).conj().imag),
    "sparse": with_weight(lambda weight: nn.Parameter(weight.detach().to_sparse())),
    "twice": lambda: (lambda x, weight, bias: (weight, weight, bias))(*operands()),
}
AROUND = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dual": forward_ad.dual_level,
    "functions": Functions,
    "dispatch": Dispatch,
}


def kept():
    known, call = Calls(), object()
    known.keep(("sigmoid",), operands(), call)
    return known, call


def test_other_values_elsewhere_are_alike():
    known, call = kept()
    assert known.find(("sigmoid",), operands()) is call
    # A place that is no multiple of 16 bytes makes another launch, which looks at places itself.
    shifted = data(lambda weight: torch.randn(37)[1:].view(6, 6))
    assert known.find(("sigmoid",), shifted()) is call
    assert known.find(("tanh",), operands()) is None
    with torch.device("cpu"):  # a mode that watches nothing but what makes tensors
        assert known.find(("sigmoid",), operands()) is call


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_tensors_are_not(other):
    known, _ = kept()
    assert known.find(("sigmoid",), other()) is None


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_other_circumstances_are_not(around):
    known, call = kept()
    tensors = operands()
    with around():
        assert known.find(("sigmoid",), tensors) is None
    assert known.find(("sigmoid",), tensors) is call


def test_transforms_and_traces_are_not():
    known, call = kept()
    x, *parameters = operands()
    found = []

    def look(x):
        found.append(known.find(("sigmoid",), (x, *parameters)))
        return x * 2

    torch.func.vmap(look)(torch.randn(3, 4, 6))
    torch.func.grad(lambda x: look(x).sum())(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated
        torch.jit.trace(look, x, check_trace=False)
    assert found == [None] * 3
    look(x)
    assert found[-1] is call


def test_what_a_transform_has_left_behind_is_not_kept():
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(torch.randn(4, 6))
    known = Calls()
    known.keep((), left, object())
    assert known.find((), left) is None


def test_precision_of_fp32_counts_and_that_of_others_does_not(matmul):
    known, call = kept()
    half = [t.bfloat16() for t in operands()]
    known.keep((), half, call)
    matmul.fp32_precision = "tf32"
    assert known.find(("sigmoid",), operands()) is None
    assert known.find((), half) is call
    matmul.fp32_precision = "ieee"
    matmul.fp32_precision = "none"
    before = allow_fp32_split("tf32x3")
    try:
        assert known.find(("sigmoid",), operands()) is None
        assert known.find((), half) is call
    finally:
        allow_fp32_split(before)


def test_what_is_kept_is_bounded():
    known = Calls()
    for step in range(1, 3 * calls.MAX_ALIKE):
        known.keep((), (torch.empty(2 * step)[::step],), step)
    assert known.find((), (torch.empty(2),)) is None
    assert known.find((), (torch.empty(2 * step)[::step],)) == step
    for key in range(calls.MAX_KEYS + 1):
        known.keep((key,), (torch.empty(1),), key)
    assert known.find((0,), (torch.empty(1),)) is None
    assert known.find((calls.MAX_KEYS,), (torch.empty(1),)) == calls.MAX_KEYS


def test_shapes_do_not_drive_each_other_out():
    """Batches of many sizes, as of sequences, and layers of many widths, with a bias and without one."""
    known, shapes = Calls(), [(m, k, n) for m in (1, 7, 30) for k in (3, 8, 64) for n in (2, 5, 9)]
    assert len(shapes) > 3 * calls.MAX_ALIKE
    many = [(torch.empty(m, k), torch.empty(n, k), torch.empty(n)) for m, k, n in shapes]
    for bias in (True, False):
        for shape, tensors in zip(shapes, many, strict=True):
            known.keep((bias,), tensors if bias else tensors[:2], shape)
        found = [known.find((bias,), tensors if bias else tensors[:2]) for tensors in many]
        assert found == shapes


def test_an_owner_lives_as_long_as_its_number_is_used():
    import gc
    import weakref

    class Owner:
        pass

    known, owner = Calls(), Owner()
    gone = weakref.ref(owner)
    known.keep((id(owner),), (torch.empty(1),), object(), owner)
    del owner
    gc.collect()
    assert gone() is not None
    calls.forget()
    gc.collect()
    assert gone() is None


def test_without_torchs_comparison_every_call_is_decided_anew(monkeypatch):
    monkeypatch.setattr(calls, "TensorGuards", None)
    known, _ = kept()
    assert known.find(("sigmoid",), operands()) is None


# --- layers and networks in kernels ----------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    if DEVICE is None:
        pytest.skip("no kernels in this process")
    from perceptriton.kernels.gpu import layer, network

    return [
        *(spy_on(monkeypatch, layer, f"linear_act_{name}_kernel") for name in ("fwd_rows", "bwd_rows")),
        *(spy_on(monkeypatch, network, f"mlp_{name}_kernel") for name in ("fwd", "bwd")),
    ]


# What may happen to a model between two calls.
EVENTS = {
    "nothing": lambda model, x: (x, contextlib.nullcontext()),
    "no gradients": lambda model, x: (x, torch.no_grad()),
    "rows": lambda model, x: (torch.cat([x, x]), contextlib.nullcontext()),
    "leading": lambda model, x: (x.view(2, -1, x.shape[-1]), contextlib.nullcontext()),
    "strides": lambda model, x: (x.t().contiguous().t(), contextlib.nullcontext()),
    "transposed weight": lambda model, x: data_of(model, lambda p: p.t().contiguous().t() if p.dim() == 2 else p, x),
    "moved": lambda model, x: data_of(model, lambda p: torch.cat([p.new_zeros(1), p.flatten()])[1:].view(p.shape), x),
    "values": lambda model, x: data_of(model, lambda p: -p, x),
    "frozen": lambda model, x: (
        model[0].requires_grad_(not model[0].weight.requires_grad) and x,
        contextlib.nullcontext(),
    ),
    "x wants a gradient": lambda model, x: (x.clone().requires_grad_(), contextlib.nullcontext()),
    "negated x": lambda model, x: (torch.complex(x, -x).conj().imag, contextlib.nullcontext()),
}


def data_of(model, change, x):
    for p in model.parameters():
        p.data = change(p.data)
    return x, contextlib.nullcontext()


def outcome(model, x, network):
    """y and all gradients, by kernels, and by torch's own operations."""
    layers = [model[0], model[2], model[4]]
    every = []
    for impl in ("triton", None):
        inputs = [p for p in (x, *model.parameters()) if p.requires_grad]
        if impl is None:
            y = model(x)
        elif network:
            y = mlp_act(x, [l.weight for l in layers], [l.bias for l in layers], impl=impl)
        else:
            y = x
            for l in layers:
                y = linear_act(y, l.weight, l.bias, impl=impl)
        gradients = torch.autograd.grad(y, inputs, torch.ones_like(y)) if y.requires_grad else ()
        every.append((y.detach(), *gradients))
    return every


@pytest.mark.interpreter
@pytest.mark.parametrize("network", [False, True], ids=["layers", "network"])
@pytest.mark.parametrize("seed", range(3))
def test_calls_after_calls_compute_what_torch_does(launched, network, seed):
    """A model that changes between calls, so that what was kept for one call must not run another."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(16, 16), nn.Sigmoid()))).to(DEVICE)
    names = [*EVENTS, *EVENTS]  # each of them twice, so that some calls find what others have left
    for name in (names[place] for place in torch.randperm(len(names), generator=generator).tolist()):
        x, around = EVENTS[name](model, torch.randn(6, 16, device=DEVICE))
        with around:
            for ours, torchs in zip(*outcome(model, x, network), strict=True):
                assert torch.allclose(ours, torchs, rtol=2e-5, atol=2e-5), name
    assert sum(len(spy.launches) for spy in launched) >= len(names)


@pytest.mark.interpreter
@pytest.mark.parametrize("network", [False, True], ids=["layers", "network"])
@pytest.mark.parametrize("training", [False, True], ids=["", "training"])
def test_autocast_of_another_dtype(launched, network, training):
    """What has autocast's dtype already is not cast, but is another call once autocast has another dtype."""
    parameters = (
        torch.randn(n, requires_grad=training, device=DEVICE, dtype=torch.bfloat16) for n in ((16, 16), (16,))
    )
    x, (weight, bias) = torch.randn(4, 16, device=DEVICE, dtype=torch.bfloat16), parameters
    dtypes = [torch.bfloat16, torch.float16] * 2
    found = []
    for dtype in dtypes:
        with torch.autocast(DEVICE, dtype):
            y = mlp_act(x, [weight], [bias], impl="triton") if network else linear_act(x, weight, bias, impl="triton")
        found.append(y.dtype)
        if training:
            assert [g.dtype for g in torch.autograd.grad(y.sum(), (weight, bias))] == [torch.bfloat16] * 2
    assert found == dtypes
    assert sum(len(spy.launches) for spy in launched) >= len(dtypes)


@pytest.mark.interpreter
@pytest.mark.parametrize("network", [False, True], ids=["layers", "network"])
@pytest.mark.parametrize("training", [False, True], ids=["", "training"])
def test_calls_under_autocast_are_kept(launched, network, training, monkeypatch):
    """Each dtype of autocast's is decided on once, whether or not something is cast; what is cast is read anew."""
    decided = []
    for name in ("linear_act_fwd_call", "mlp_fwd_call"):
        own = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *given, own=own: decided.append(given) or own(*given))
    weight, bias = (torch.randn(n, requires_grad=training, device=DEVICE) for n in ((16, 16), (16,)))
    for cast in (False, True):
        x = torch.randn(4, 16, device=DEVICE, dtype=torch.bfloat16 if cast else torch.float32)
        for dtype in [torch.bfloat16] * 3 + [torch.float16] * 2 + [torch.bfloat16]:
            with torch.autocast(DEVICE, dtype):
                y = (
                    mlp_act(x, [weight], [bias], impl="triton")
                    if network
                    else linear_act(x, weight, bias, impl="triton")
                )
                expected = torch.sigmoid(torch.nn.functional.linear(x, weight, bias))
            assert y.dtype == expected.dtype == dtype
            assert torch.allclose(y, expected, rtol=2e-2, atol=1e-2)
            if training:
                ours, theirs = (torch.autograd.grad(own.sum(), (weight, bias)) for own in (y, expected))
                for a, b in zip(ours, theirs, strict=True):
                    assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
                    assert (a - b).norm() < 0.05 * b.norm()
            with torch.no_grad():
                weight.neg_(), bias.neg_()
    assert len(decided) == 2 * 3
    assert launched[2 * network].launches
    # Outside of autocast the same tensors are another call.
    assert linear_act(x.float(), weight, bias, impl="triton").dtype == torch.float32


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "make", [iter, lambda biases: (b for b in biases), torch.stack], ids=["iterator", "generator", "tensor"]
)
def test_no_sequence_is_like_one(launched, make):
    x, weights, biases = torch.randn(4, 16, device=DEVICE), [], []
    for _ in range(2):
        weights.append(torch.randn(16, 16, device=DEVICE))
        biases.append(torch.randn(16, device=DEVICE))
    expected = mlp_act(x, weights, biases, impl="triton")
    assert torch.equal(mlp_act(x, tuple(weights), tuple(biases), impl="triton"), expected)
    with pytest.raises(TypeError, match="biases must be a sequence of Tensors"):
        mlp_act(x, weights, make(biases), impl="triton")
    with pytest.raises(ValueError, match="biases"):
        mlp_act(x, weights, [*biases, biases[0]], impl="triton")


def test_tensors_given_twice_drive_out_nothing():
    known, call = kept()
    x, weight, _ = operands()
    for _ in range(2 * calls.MAX_ALIKE):
        known.keep(("sigmoid",), (x, weight, weight), object())
    assert known.find(("sigmoid",), operands()) is call


# --- backward passes -------------------------------------------------------------------------------------------------


def hooked(change):
    """Around the forward pass, whose saved tensors come back changed."""
    return lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, change)


def backward_of(y, inputs, dy, **options):
    return torch.autograd.grad(y, inputs, dy, **options)


def batched(y, inputs, dy):
    return [gradient[1] for gradient in backward_of(y, inputs, torch.stack([dy + 1, dy]), is_grads_batched=True)]


def differentiable(y, inputs, dy):
    gradients = backward_of(y, inputs, dy, create_graph=True)
    assert all(gradient.requires_grad for gradient in gradients)
    return [gradient.detach() for gradient in gradients]


def under(context):
    def run(y, inputs, dy):
        with context():
            return backward_of(y, inputs, dy)

    return run


# How a backward pass may differ from the one before: what stands around its forward pass, and what runs it.
BACKWARDS = {
    "nothing": (contextlib.nullcontext, backward_of),
    "some": (contextlib.nullcontext, lambda y, inputs, dy: backward_of(y, inputs[1:2], dy)),
    "strides": (contextlib.nullcontext, lambda y, inputs, dy: backward_of(y, inputs, dy.t().contiguous().t())),
    "expanded": (contextlib.nullcontext, lambda y, inputs, dy: backward_of(y, inputs, dy[:, :1].expand(dy.shape))),
    "negated": (
        contextlib.nullcontext,
        lambda y, inputs, dy: backward_of(y, inputs, torch.complex(dy, -dy).conj().imag),
    ),
    "batched": (contextlib.nullcontext, batched),
    "differentiable": (contextlib.nullcontext, differentiable),
    "autocast": (contextlib.nullcontext, under(lambda: torch.autocast(DEVICE, torch.bfloat16))),
    "functions": (contextlib.nullcontext, under(Functions)),
    "dispatch": (contextlib.nullcontext, under(Dispatch)),
    "copies": (hooked(torch.clone), backward_of),
    "strides of what was saved": (hooked(lambda t: t.t().contiguous().t() if t.dim() == 2 else t), backward_of),
    "elsewhere": (hooked(lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)), backward_of),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("network", [False, True], ids=["layers", "network"])
@pytest.mark.parametrize("seed", range(2))
def test_backward_passes_after_others_compute_what_torch_does(launched, network, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(16, 16), nn.Sigmoid()))).to(DEVICE)
    layers, inputs = [model[0], model[2], model[4]], list(model.parameters())
    x, dy = torch.randn(6, 16, device=DEVICE), torch.randn(6, 16, device=DEVICE)
    names = [*BACKWARDS, *BACKWARDS]
    for name in (names[place] for place in torch.randperm(len(names), generator=generator).tolist()):
        around, run = BACKWARDS[name]
        expected = run(model(x), inputs, dy)
        with around():
            if network:
                y = mlp_act(x, [l.weight for l in layers], [l.bias for l in layers], impl="triton")
            else:
                y = x
                for l in layers:
                    y = linear_act(y, l.weight, l.bias, impl="triton")
        for ours, torchs in zip(run(y, inputs, dy), expected, strict=True):
            tolerance = 2e-2 if name == "autocast" else 2e-5  # where torch rounds, and the kernels do not
            assert torch.allclose(ours, torchs, rtol=tolerance, atol=tolerance), name


@pytest.mark.interpreter
@pytest.mark.parametrize("network", [False, True], ids=["layers", "network"])
def test_what_was_written_to_since_is_refused_by_kept_calls_too(launched, network):
    x = torch.randn(4, 16, device=DEVICE)
    weight, bias = (torch.randn(n, device=DEVICE, requires_grad=True) for n in ((16, 16), (16,)))

    def y_of(x):
        x = x * 1  # whose gradient needs the weight
        if network:
            return mlp_act(x, [weight, weight * 1], [bias, bias * 1], impl="triton")
        return linear_act(x, weight, bias, impl="triton")

    for _ in range(2):
        x.requires_grad_()
        y_of(x).sum().backward()
        y = y_of(x)
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
