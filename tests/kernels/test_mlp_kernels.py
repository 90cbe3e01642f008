# SPDX-License-Identifier: Apache-2.0
"""The whole-network kernels against fp64: on a GPU, or on the CPU in triton's interpreter."""

import dataclasses
import itertools

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    FLOOR,
    IDS,
    NO_KERNELS,
    assert_as_good_as_the_worst,
    assert_near,
    core,
    every_other,
    inside,
    kernel_device,
    make_network,
    off_by_one,
    one_row,
    one_value,
    poisoned,
    relative_error,
    same_bits,
    spy_on,
    torch_bce,
    transposed,
)
from emulation import round_tf32

from perceptriton.kernels.records import MlpPlan, MlpSegment, MlpTile

DEVICE = kernel_device()
if DEVICE is None:
    pytest.skip(NO_KERNELS, allow_module_level=True)

network = pytest.importorskip("perceptriton.kernels.gpu.network")
pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.interpreter, pytest.mark.gpu]

NETS = {
    "xor": (2, 2, 1),
    "xor-deep": (2, 10, 10, 10, 1),
    "digits": (32, 64, 5),
    "one-layer": (31, 10),
    "one-wide-layer": (128, 64),
    "policy": (31, 64, 64, 2),
    "funnel": (36, 64, 9, 1),
    "wide": (20, 128, 16),  # in fp32 the backward kernel keeps each weight twice, in 99 KB on some chips
    "exact-deep": (16, 16, 16, 16, 16, 16, 16, 16, 16),
    "ragged-deep": (7, 33, 20, 16, 3, 9, 17, 2, 40),  # every mask is false somewhere, wide and narrow alternate
}


class Net:
    """x, weights, biases (None without) and dy, with pre-activations of std 1 to 2, and what torch makes of them."""

    def __init__(self, widths, m=70, dtype=torch.float32, bias=True, hidden="sigmoid", output="sigmoid", seed=0):
        self.widths, self.dtype, self.hidden, self.output = widths, dtype, hidden, output
        self.layers = len(widths) - 1
        gain = 4.0 if hidden == "sigmoid" else 1.6
        self.x, weights, biases, self.dy = make_network(widths, (m,), dtype, DEVICE, gain, seed)
        self.weights, self.biases = tuple(weights), tuple(biases) if bias else None

    def everything(self):
        return (True, (True,) * self.layers, (self.biases is not None,) * self.layers)

    def run(self, plan, forward=None, wanted=None):
        """y, the saved activations, dx, dweights, dbiases from the launchers, whose fresh memory is full of NaN."""
        forward, wanted = forward or plan, wanted or self.everything()
        parameters = (self.weights, self.biases, self.hidden, self.output)
        with poisoned():
            y, saved = network.mlp_fwd(self.x, *parameters, forward, plan.boundaries)
            dx, dweights, dbiases = network.mlp_bwd(self.dy, self.x, saved, *parameters, wanted, plan)
        return y, saved, dx, dweights, dbiases

    def torch(self, dtype=None, loss=None):
        """[h_1, .., y], dx, dweights, dbiases by torch's own operations in `dtype`; y is the loss if there is one."""
        tensors = [self.x, *self.weights, *(self.biases or ())]
        inputs = [t.detach().to(dtype or self.dtype).requires_grad_() for t in tensors]
        hs = [inputs[0]]
        for l in range(self.layers):
            z = F.linear(hs[-1], inputs[1 + l], inputs[1 + self.layers + l] if self.biases is not None else None)
            act = self.output if l == self.layers - 1 else self.hidden
            hs.append(z if act == "identity" or (loss and l == self.layers - 1) else getattr(torch, act)(z))
        y = loss(hs[-1]) if loss else hs[-1]
        dy = self.dy.reshape(y.shape) if y.numel() == self.dy.numel() else torch.tensor(0.7, device=DEVICE)
        dx, *gradients = torch.autograd.grad(y, inputs, dy.to(y.dtype))
        return [h.detach() for h in hs[1:-1]] + [y.detach()], dx, gradients[: self.layers], gradients[self.layers :]


def fused(layers, *cuts, programs=3, block_m=16, resident=True, num_warps=4):
    """A plan with a new segment at each of the cuts."""
    ends = (0, *cuts, layers)
    tile = MlpTile(block_m, num_warps, 1, resident)
    return MlpPlan(
        "fused", "the test says so", tuple(MlpSegment(*pair, tile, programs) for pair in itertools.pairwise(ends))
    )


def check(net, actual, loss=None):
    y, _, dx, dweights, dbiases = actual
    torch_hs, torch_dx, torch_dweights, torch_dbiases = net.torch(loss=loss)
    hs, exact_dx, exact_dweights, exact_dbiases = net.torch(torch.float64, loss)
    kinds = {
        "y": ([y], torch_hs[-1:], hs[-1:]),
        "dx": ([dx], [torch_dx], [exact_dx]),
        "dweight": (dweights, torch_dweights, exact_dweights),
        "dbias": (dbiases if net.biases is not None else (), torch_dbiases, exact_dbiases),
    }
    kinds = {name: list(zip(*tensors, strict=True)) for name, tensors in kinds.items()}
    assert_as_good_as_the_worst(kinds, net.dtype)


def flat(actual):
    y, saved, dx, dweights, dbiases = actual
    return [t for t in (y, *saved, dx, *dweights, *dbiases) if t is not None]


# --- against fp64 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bias"),
    [*((dtype, True) for dtype in DTYPES), (torch.float32, False)],
    ids=["fp32", "bf16", "fp16", "no-bias"],
)
@pytest.mark.parametrize("name", core(NETS, "policy", "exact-deep", "ragged-deep"))
def test_as_good_as_torch(name, dtype, bias):
    # 70 rows are 5 tiles over 3 programs, the last tile partly filled.
    net = Net(NETS[name], dtype=dtype, bias=bias)
    actual = net.run(fused(net.layers))
    for name, tensor in zip(("y", "dx"), (actual[0], actual[2]), strict=True):
        assert tensor.dtype is dtype, name
        assert tensor.is_contiguous(), name
    for parameter, gradient in zip((*net.weights, *(net.biases or ())), (*actual[3], *actual[4]), strict=False):
        assert gradient.dtype is dtype
        assert gradient.shape == parameter.shape
        assert gradient.data_ptr() % 16 == 0
    check(net, actual)


@pytest.mark.core
@pytest.mark.parametrize("m", [1, 15, 16, 17, 64])
def test_row_counts(m):
    net = Net((7, 20, 3), m=m)
    check(net, net.run(fused(2)))


@pytest.mark.more
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize("cuts", [(1,), (4,), (2, 5), tuple(range(1, 8))], ids=str)
def test_segments_change_nothing(cuts, dtype):
    net = Net(NETS["ragged-deep"], m=40, dtype=dtype)
    actual = net.run(fused(8, *cuts))
    check(net, actual)
    for l, saved, h in zip(cuts, actual[1], (net.torch(torch.float64)[0][cut - 1] for cut in cuts), strict=True):
        assert relative_error(saved[:, : net.widths[l]], h) <= 8 * FLOOR[dtype], l
    if dtype is torch.float32:
        assert_near(flat(net.run(fused(8))), flat((actual[0], (), *actual[2:])), 2e-6)


@pytest.mark.parametrize("cuts", [(), (2,)], ids=["whole", "segments"])
def test_tf32_operands_are_rounded_and_derivatives_are_not(cuts):
    net = Net((5, 33, 20, 3), m=40)
    # Of units near 1 a rounded output would leave no digit of y (1 - y).
    net.biases = tuple(b + 6.0 * (torch.arange(len(b), device=DEVICE) % 3 == 0) for b in net.biases)
    actual = net.run(dataclasses.replace(fused(3, *cuts), precision="tf32"))

    def short(tensor):
        return round_tf32(tensor.float().contiguous()).double()

    hs = [net.x.double()]
    for weight, bias in zip(net.weights, net.biases, strict=True):
        hs.append(torch.sigmoid(short(hs[-1]) @ short(weight).t() + bias.double()))
    dweights, dbiases, dh = [], [], net.dy.double()
    for h, y, weight in reversed(list(zip(hs[:-1], hs[1:], net.weights, strict=True))):
        dz = dh * y * (1 - y)
        dweights.insert(0, short(dz).t() @ short(h))
        dbiases.insert(0, dz.sum(0))
        dh = short(dz) @ short(weight)
    y, _, dx, *gradients = actual
    for ours, exact in zip((y, dx, *gradients[0], *gradients[1]), (hs[-1], dh, *dweights, *dbiases), strict=True):
        # A number near the middle between two of TF32 is rounded to either; operands that are cut give 5e-4 and more.
        assert relative_error(ours, exact) < 1e-4
    assert relative_error(net.run(fused(3, *cuts))[0], y) > 1e-5


@pytest.mark.core
def test_forward_segments_need_not_be_those_of_backward():
    net = Net(NETS["ragged-deep"], m=40)
    check(net, net.run(fused(8, 3), forward=fused(8, 2, 6)))
    check(net, net.run(fused(8), forward=fused(8, 4)))


def test_weights_loaded_for_every_tile():
    net = Net(NETS["wide"])
    check(net, net.run(fused(2), forward=fused(2, resident=False)))


@pytest.mark.core
def test_inference_stores_the_output_only(monkeypatch):
    spy = spy_on(monkeypatch, network, "mlp_fwd_kernel")
    net = Net((7, 20, 33, 3))
    y, saved = network.mlp_fwd(net.x, net.weights, net.biases, "sigmoid", "sigmoid", fused(3))
    assert saved == ()
    (launch,) = spy.launches
    assert [pointer is not None for pointer in launch["out_ptrs"]] == [False, False, True]
    assert relative_error(y, net.torch(torch.float64)[0][-1]) < 1e-6


# --- the same result every time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("programs", [1, 2, 5, 9])
def test_programs(programs):
    # 5 tiles: one program for all, uneven shares, one each, and programs that have none and must leave zeros
    net = Net((7, 20, 33, 3))
    plan = fused(3, 1, programs=programs)
    actual, again = net.run(plan), net.run(plan)
    check(net, actual)
    assert same_bits(flat(actual), flat(again))


# The interpreter has no warps.
@pytest.mark.parametrize("num_warps", [1, 2, 4, 8] if DEVICE == "cuda" else [4])
@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_tiles(block_m, num_warps):
    net = Net((10, 31, 20, 3), m=150)
    check(net, net.run(fused(3, 1, block_m=block_m, num_warps=num_warps)))


def test_batch_equals_rows_one_by_one():
    net = Net((7, 20, 33, 3), m=5)
    y, saved, dx, dweights, dbiases = net.run(fused(3, 2))
    x, dy = net.x, net.dy
    sums = [torch.zeros_like(t, dtype=torch.float64) for t in (*dweights, *dbiases)]
    for i in range(5):
        net.x, net.dy = x[i : i + 1], dy[i : i + 1]
        row = net.run(fused(3, 2))
        for batched, alone in zip((y, *saved, dx), (row[0], *row[1], row[2]), strict=True):
            assert relative_error(alone, batched[i : i + 1]) < 1e-6
        sums = [s + t.double() for s, t in zip(sums, (*row[3], *row[4]), strict=True)]
    assert_near((*dweights, *dbiases), sums, 2e-6)


@pytest.mark.core
def test_slots_hold_nothing_that_was_in_memory(monkeypatch):
    # Gradients are aligned to 16 bytes; what lies between them is summed like everything else.
    summed = []
    make = network.sum_slots_call

    def watched(*sizes):
        add_up = make(*sizes)
        return lambda slots, *out: summed.append(slots.clone()) or add_up(slots, *out)

    monkeypatch.setattr(network, "sum_slots_call", watched)
    net = Net((7, 21, 33, 3))
    net.run(fused(3))
    assert len(summed) == 1
    assert not summed[0].isnan().any()


@pytest.mark.core
def test_inputs_are_left_alone():
    net = Net((7, 20, 3))
    target, pos_weight = torch.rand(70, 3, device=DEVICE), torch.rand(3, device=DEVICE)
    inputs = [net.x, net.dy, *net.weights, *net.biases, target, pos_weight]
    before = [t.clone() for t in inputs]
    plan = fused(2, 1)
    y, saved = network.mlp_fwd(net.x, net.weights, net.biases, "sigmoid", "tanh", plan, plan.boundaries)
    inputs, before = [*inputs, y, *saved], [*before, y.clone(), *(s.clone() for s in saved)]
    network.mlp_bwd(net.dy, net.x, saved, net.weights, net.biases, "sigmoid", "tanh", net.everything(), plan)
    head = (target, pos_weight, "none")
    parameters = (net.weights, net.biases, "sigmoid", "identity")
    network.mlp_fwd(net.x, *parameters, plan, plan.boundaries, (*head, torch.float32))
    network.mlp_bwd(net.dy, net.x, saved, *parameters, net.everything(), plan, head)
    assert same_bits(inputs, before)


# numpy, under the interpreter, warns where a GPU has nothing to say.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("cuts", [(), (1,)], ids=str)
@pytest.mark.parametrize(
    ("hidden", "dtype", "extreme"),
    [("sigmoid", torch.float32, float("inf")), ("tanh", torch.float32, float("nan")), ("relu", torch.float16, 6e4)],
    ids=["inf", "nan", "overflow"],
)
def test_what_is_not_finite_stays_where_torch_has_it(hidden, dtype, extreme, cuts):
    # Neurons that only pad a layer have weights of 0, and 0 * inf would carry NaN into every result.
    net = Net((2, 10, 3, 1), m=5, dtype=dtype, hidden=hidden)
    net.x[1, 0] = extreme
    if hidden == "relu":
        net.weights = tuple(weight.abs() for weight in net.weights)  # inf - inf would be NaN anyway
    y, _, dx, dweights, dbiases = net.run(fused(3, *cuts))
    hs, torch_dx, torch_dweights, torch_dbiases = net.torch()
    assert not all(t.isfinite().all() for t in (*hs, *torch_dweights))
    for name, ours, theirs in zip(
        ("y", "dx", *("dweight",) * 3, *("dbias",) * 3),
        (y, dx, *dweights, *dbiases),
        (hs[-1], torch_dx, *torch_dweights, *torch_dbiases),
        strict=True,
    ):
        if hidden == "relu" and name != "y":
            # An overflow leaves NaN in torch's gradients too, if not in as many.
            assert theirs.isfinite()[ours.isfinite()].all()
            continue
        torch.testing.assert_close(
            ours, theirs, rtol=2e-2, atol=2e-3, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- only what is wanted ------------------------------------------------------------------------------------------

WANTED = {
    "dx": (True, (False,) * 3, (False,) * 3),
    "weights": (False, (True,) * 3, (False,) * 3),
    "biases": (False, (False,) * 3, (True,) * 3),
    "last-layer": (False, (False, False, True), (False, False, True)),  # the chain stops early
    "first-bias": (False, (False,) * 3, (True, False, False)),
    "middle": (False, (False, True, False), (False, True, True)),
    "dx-and-middle": (True, (False, True, False), (False,) * 3),
    "nothing": (False, (False,) * 3, (False,) * 3),
}


@pytest.mark.more
@pytest.mark.parametrize(("cuts", "programs"), [((), 1), ((1,), 2), ((1, 2), 2)], ids=str)
@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_only_what_is_wanted(wanted, cuts, programs):
    net = Net((7, 20, 33, 3), m=40)
    plan = fused(3, *cuts, programs=programs)
    everything, some = net.run(plan), net.run(plan, wanted=wanted)
    flags = [wanted[0], *wanted[1], *wanted[2]]
    full, part = ((r[2], *r[3], *r[4]) for r in (everything, some))
    for want, a, b in zip(flags, full, part, strict=True):
        assert (b is not None) == want
        if want:
            assert relative_error(b, a) < 1e-6


def test_no_launch_below_the_first_layer_that_is_wanted(monkeypatch):
    spy = spy_on(monkeypatch, network, "mlp_bwd_kernel")
    net = Net((7, 20, 33, 3))
    net.run(fused(3, 1, 2), wanted=WANTED["last-layer"])
    (launch,) = spy.launches
    assert launch["dx_ptr"] is None
    net.run(fused(3, 1, 2), wanted=WANTED["nothing"])
    assert len(spy.launches) == 1


# --- any strides --------------------------------------------------------------------------------------------------


STRIDES = [("x", one_row), ("dy", one_value)]
STRIDES += [(name, layout) for name in ("x", "dy") for layout in (every_other, inside, off_by_one, transposed)]


@pytest.mark.parametrize(("name", "layout"), STRIDES, ids=lambda value: getattr(value, "__name__", value))
def test_strides(name, layout):
    net = Net((7, 20, 3))
    setattr(net, name, layout(getattr(net, name)))
    check(net, net.run(fused(2, 1)))


# --- the cross-entropy head ---------------------------------------------------------------------------------------


def bce(net, target, pos_weight, reduction, plan, dloss, dtype=None):
    dtype = dtype or net.dtype
    head, parameters = (target, pos_weight, reduction), (net.weights, net.biases, net.hidden, "identity")
    with poisoned():
        loss, saved = network.mlp_fwd(net.x, *parameters, plan, plan.boundaries, (*head, dtype))
        gradients = network.mlp_bwd(dloss, net.x, saved, *parameters, net.everything(), plan, head)
    return loss, saved, *gradients


def torch_loss(*head):
    return lambda z: torch_bce(z, *head)


@pytest.mark.parametrize("weighted", core(["", "pos_weight"], "pos_weight"))
# Every pair of a dtype, a reduction and a way through the network.
@pytest.mark.parametrize(
    ("dtype", "reduction", "cuts", "programs"),
    [
        (dtype, reduction, *(((), 1), ((), 7), ((1, 2), 3))[(i + j) % 3])
        for i, dtype in enumerate(DTYPES)
        for j, reduction in enumerate(("mean", "sum", "none"))
    ],
    ids=lambda value: IDS.get(value, str(value)),
)
def test_bce(dtype, reduction, weighted, cuts, programs):
    net = Net((7, 20, 33, 3), dtype=dtype)
    # soft targets, in another dtype than x
    target = torch.rand(len(net.x), 3, device=DEVICE)
    pos_weight = torch.tensor([0.3, 1.0, 8.0], device=DEVICE) if weighted else None
    dloss = net.dy if reduction == "none" else torch.tensor(0.7, device=DEVICE)
    actual = bce(net, target, pos_weight, reduction, fused(3, *cuts, programs=programs), dloss)
    assert actual[0].dtype is dtype
    assert actual[0].shape == (target.shape if reduction == "none" else ())
    check(net, actual, torch_loss(target, pos_weight, reduction))


@pytest.mark.parametrize("layout", [every_other, inside, transposed, one_row, one_value], ids=lambda f: f.__name__)
def test_bce_strides(layout):
    net = Net((7, 20, 3))
    target, pos_weight = layout(torch.rand(70, 3, device=DEVICE)), torch.rand(1, device=DEVICE).expand(3)
    actual = bce(net, target, pos_weight, "mean", fused(2), torch.tensor(0.7, device=DEVICE))
    check(net, actual, torch_loss(target, pos_weight, "mean"))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weight", [None, 5.0])
def test_bce_extreme_logits(t, weight):
    z = torch.tensor(
        [0, 1e-30, -1e-30, 1e-4, 1, -1, 16, -16, 88, -88, 104, -104, 1e4, -1e4, 1e30, -1e30], device=DEVICE
    )
    # a network that passes its input through: the logits are x
    net = Net((1, 1))
    net.x, net.weights, net.biases = z[:, None], (torch.ones(1, 1, device=DEVICE),), (torch.zeros(1, device=DEVICE),)
    target = torch.full_like(net.x, t)
    pos_weight = None if weight is None else torch.tensor([weight], device=DEVICE)
    loss, _, dx, _, _ = bce(net, target, pos_weight, "none", fused(1), torch.ones_like(target))
    w = 1 if weight is None else weight
    z = z.double()[:, None]
    # written for no cancellation: torch's own form loses small losses of either sign in z - z
    exact = torch.where(z >= 0, 1 - t, -w * t) * z + (1 + (w - 1) * t) * torch.log1p(torch.exp(-z.abs()))
    assert ((loss - exact).abs() <= 1e-5 * exact.abs() + 1e-30).all()
    exact = torch.sigmoid(z) * (1 + (w - 1) * t) - w * t
    assert ((dx - exact).abs() <= 1e-6 * max(w, 1)).all()


def test_bce_gradients_of_a_large_fp16_batch_do_not_underflow():
    # (p - t) / 2^20 is below the normal numbers of fp16; summed first and scaled last it is not lost.
    net = Net((7, 20, 3), m=64, dtype=torch.float16)
    target = torch.rand(64, 3, device=DEVICE)
    scale = 2.0**-18
    _, _, _, dweights, _ = bce(net, target, None, "mean", fused(2), torch.tensor(scale, device=DEVICE))
    _, _, exact, _ = net.torch(torch.float64, torch_loss(target, None, "mean"))
    for dweight, e in zip(dweights, exact, strict=True):
        # what is left is the rounding of the result itself, to steps of 2^-24
        assert (dweight.double() - e * scale / 0.7).abs().max() <= 2.0**-24


def test_bce_loss_in_another_dtype():
    net = Net((7, 20, 3), dtype=torch.bfloat16)
    target = torch.rand(len(net.x), 3, device=DEVICE)
    dloss = torch.tensor(0.7, device=DEVICE)
    for programs in (1, 3):
        loss = bce(net, target, None, "mean", fused(2, programs=programs), dloss, torch.float32)[0]
        assert loss.dtype is torch.float32
        assert relative_error(loss, net.torch(torch.float64, torch_loss(target, None, "mean"))[0][-1]) < 5e-3


# --- the yardstick itself -----------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(("name", "place"), [("y", 0), ("dx", 2), ("dweight", 3), ("dbias", 4)])
@pytest.mark.parametrize(
    "wrong",
    [torch.zeros_like, lambda t: torch.full_like(t, t.mean().item()), lambda t: t.flip(-1), lambda t: t * 1.05],
    ids=["zeros", "constant", "flipped", "scaled"],
)
def test_wrong_results_are_refused(name, place, wrong):
    net = Net((7, 20, 33, 3))
    actual = list(net.run(fused(3)))
    right = actual[place]
    actual[place] = wrong(right) if isinstance(right, torch.Tensor) else (*right[:-1], wrong(right[-1]))
    with pytest.raises(AssertionError, match=rf"^{name} \d: error"):
        check(net, actual)


@pytest.mark.core
def test_transposed_weight_is_refused():
    net = Net((20, 20, 3))
    weights = net.weights
    net.weights = (weights[0].t().contiguous(), *weights[1:])
    actual = net.run(fused(2))
    net.weights = weights
    with pytest.raises(AssertionError):
        check(net, actual)


# --- compiled code only -------------------------------------------------------------------------------------------


@pytest.mark.hardware
@pytest.mark.skipif(
    DEVICE != "cuda" and not cases.EMULATED, reason="the interpreter cannot see what a compiler makes of it"
)
@pytest.mark.parametrize("num_warps", [4, 8])
@pytest.mark.parametrize("block_m", [64, 128, 256])
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_gradients_of_weights_as_compiled(width, block_m, num_warps):
    # Products of transposed registers were once miscompiled for some of these tiles (see network_kernels.py).
    net = Net((width,) * 3, m=1000, dtype=torch.bfloat16)
    from triton.runtime.errors import OutOfResources

    try:
        actual = net.run(fused(2, block_m=block_m, num_warps=num_warps), forward=fused(2, block_m=32))
    except OutOfResources as error:
        pytest.skip(f"no plan picks it: {error}")
    check(net, actual)
