# SPDX-License-Identifier: Apache-2.0
"""The product whose tiles travel by TMA against fp64: on a GPU with TMA, or in triton's interpreter."""

import dataclasses
import functools
import itertools
import types

import cases
import pytest
import torch
from cases import (
    ACTIVATIONS,
    DTYPES,
    FLOOR,
    IDS,
    NO_KERNELS,
    TF32,
    assert_as_good_as_torch,
    assert_near,
    conjugated,
    core,
    join,
    kernel_device,
    make_layer,
    make_layers,
    make_network,
    negated,
    off_by_one,
    plain_network,
    relative_error,
    same_bits,
    spy_on,
    torch_layer,
    transposed,
)

from perceptriton.kernels import activations, allow_fp32_split, devices, ops, records, tables
from perceptriton.kernels import plan as planning
from perceptriton.kernels.records import Plan, WideTile
from perceptriton.mlp import linear_act, mlp_act

DEVICE = kernel_device()
if DEVICE is None:
    pytest.skip(NO_KERNELS, allow_module_level=True)
CAPABILITY = torch.cuda.get_device_capability() if DEVICE == "cuda" else (9, 0)
if cases.EMULATED not in (None, "sm_90") or not (9, 0) <= CAPABILITY < (11, 0):
    pytest.skip("tiles for TMA are those of compute capability 9.0 and 10.0", allow_module_level=True)
ARCH = 10 * CAPABILITY[0]

wide = pytest.importorskip("perceptriton.kernels.gpu.wide")
layer = pytest.importorskip("perceptriton.kernels.gpu.layer")
pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.interpreter, pytest.mark.gpu]

SMALL = WideTile(64, 64, 32, 4, 3, group_m=2)
HALVES = WideTile(64, 64, 32, 4, 3, group_m=2, subtiles=2)

# (rows, in_features, out_features): why. Rows of 16 bytes are 4 fp32 or 8 half-precision values.
SHAPES = {
    "one-by-eight": (1, 8, 8),  # every size is smaller than the tile
    "exact": (128, 64, 128),  # whole tiles
    "ragged": (100, 72, 88),  # the last tile of every size is cut
    "one-more": (129, 40, 72),  # a tile of one row
    "deep-k": (33, 520, 24),  # many steps, the last one of 8
    "groups": (330, 16, 72),  # 6 row tiles in groups of 2, two column tiles
    "odd-groups": (150, 16, 72),  # the last group has one row tile
}


def run(x, weight, bias, activation="sigmoid", tile=SMALL, programs=3, precision=None):
    precision = precision or ("tf32x3" if x.dtype is torch.float32 else "ieee")
    return wide.linear_act_fwd(x, weight, bias, activation, Plan("tma", "", tile, programs, precision))


def check(x, weight, bias, activation="sigmoid", actual=None, allowance=0.0):
    y = run(x, weight, bias, activation) if actual is None else actual
    dy = torch.ones_like(y)
    expected = torch_layer(x, weight, bias, dy, activation)[:1]
    exact = torch_layer(x, weight, bias, dy, activation, torch.float64)[:1]
    assert y.dtype is x.dtype
    assert y.is_contiguous()
    assert_as_good_as_torch([y], expected, exact, x.dtype, ["y"], allowance)


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize("tile", [SMALL, HALVES], ids=["whole", "halves"])
@pytest.mark.parametrize("shape", core(SHAPES, "exact", "ragged"))
def test_shapes(shape, tile, dtype):
    layers = make_layers(*SHAPES[shape], dtype, DEVICE)
    actual = join([(run(*layer[:3], tile=tile),) for layer in layers])
    expected, exact = (
        join([torch_layer(*layer, "sigmoid", own)[:1] for layer in layers]) for own in (None, torch.float64)
    )
    assert_as_good_as_torch(actual, expected, exact, dtype, ["y"])


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    x, weight, bias, _ = make_layer(*SHAPES["ragged"], dtype, DEVICE)
    check(x, weight, bias, activation)


CUTS = {
    "three-parts-and-an-empty-one": ("ragged", 4, SMALL, torch.float32),
    "uneven-parts": ("deep-k", 2, HALVES, torch.bfloat16),
    "one-step": ("one-by-eight", 2, HALVES, torch.float16),
}


@pytest.mark.parametrize(("shape", "splits", "tile", "dtype"), CUTS.values(), ids=CUTS)
def test_sums_cut_into_parts(shape, splits, tile, dtype):
    x, weight, bias, _ = make_layer(*SHAPES[shape], dtype, DEVICE)
    cut = Plan("tma", "", tile, 3, "tf32x3" if dtype is torch.float32 else "ieee", splits=splits)
    y = wide.linear_act_fwd(x, weight, bias, "sigmoid", cut)
    check(x, weight, bias, actual=y)
    # The number of programs changes no bit, and no bias is one of 0.
    assert same_bits(wide.linear_act_fwd(x, weight, bias, "sigmoid", dataclasses.replace(cut, programs=50)), y)
    assert same_bits(*(wide.linear_act_fwd(x, weight, b, "tanh", cut) for b in (None, torch.zeros_like(bias))))


# --- dgrad ----------------------------------------------------------------------------------------------------


def make_dgrad(m, k, n, dtype, activation="sigmoid"):
    """dz (m, k), weight (k, n) and h (m, n), the output of the layer below."""
    dz, weight, _, _ = make_layer(m, k, n, dtype, DEVICE)
    z = torch.randn(m, n, generator=torch.Generator().manual_seed(5))
    h = activations.ACTIVATIONS[activation].forward(1.4 * z).to(DEVICE, dtype)
    return dz, weight.t().contiguous(), h


def torch_dgrad(dz, weight, h, activation):
    below = activations.ACTIVATIONS[activation].backward(dz @ weight, h)
    return below, below.sum(0)


def check_dgrad(dz, weight, h, activation, tile=SMALL, programs=3, actual=None, precision=None, allowance=0.0):
    plan = Plan("tma", "", tile, programs, precision or ("tf32x3" if dz.dtype is torch.float32 else "ieee"))
    actual = wide.linear_act_dgrad(dz, weight, h, activation, True, plan) if actual is None else actual
    expected = torch_dgrad(dz, weight, h, activation)
    exact = torch_dgrad(dz.double(), weight.double(), h.double(), activation)
    assert all(a.dtype is dz.dtype and a.shape == e.shape for a, e in zip(actual, exact, strict=True))
    assert_as_good_as_torch(actual, expected, exact, dz.dtype, ["dz", "dbias"], allowance)
    return actual


@pytest.mark.parametrize(
    ("tile", "dtype"),
    [(SMALL, torch.bfloat16), (HALVES, torch.float16), (HALVES, torch.float32)],
    ids=["whole", "halves", "fp32"],
)
@pytest.mark.parametrize("shape", core(SHAPES, "exact", "ragged"))
def test_dgrad_shapes(shape, tile, dtype):
    m, k, n = SHAPES[shape]
    check_dgrad(*make_dgrad(m, k, n, dtype), "sigmoid", tile)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dgrad_activations(activation):
    tensors = make_dgrad(*SHAPES["ragged"], torch.float16, activation)
    before = [t.clone() for t in tensors]
    first = check_dgrad(*tensors, activation)
    for programs in (1, 50):
        assert all(map(same_bits, check_dgrad(*tensors, activation, programs=programs), first))
    assert all(map(same_bits, tensors, before))
    without = wide.linear_act_dgrad(*tensors, activation, False, Plan("tma", "", SMALL, 2))
    assert without[1] is None
    assert same_bits(without[0], first[0])


@pytest.mark.parametrize("layout", [transposed, off_by_one, lambda t: t], ids=["transposed", "off-by-one", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_dgrad_takes_weights_of_any_layout(dtype, layout):
    dz, weight, h = make_dgrad(*SHAPES["ragged"], dtype)
    check_dgrad(dz, layout(weight), h, "sigmoid")


# --- wgrad ----------------------------------------------------------------------------------------------------


def check_wgrad(dz, h, tile=SMALL, splits=1, precision="tf32x3", allowance=0.0, actual=None):
    plan = Plan("tma", "", tile, 3, precision, splits=splits)
    actual = wide.linear_act_wgrad(dz, h, plan) if actual is None else actual
    assert_as_good_as_torch(
        [actual], [dz.t() @ h], [dz.double().t() @ h.double()], torch.float32, ["dweight"], allowance
    )
    return actual


def make_wgrad(m, k, n):
    """dz (m, k) and h (m, n): the sum runs over the m rows."""
    return make_layer(m, k, 4, torch.float32, DEVICE)[0], make_layer(m, n, 4, torch.float32, DEVICE, seed=7)[0]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("tile", [SMALL, HALVES], ids=["whole", "halves"])
@pytest.mark.parametrize("shape", core(SHAPES, "exact", "ragged"))
def test_wgrad_shapes(shape, tile, splits):
    check_wgrad(*make_wgrad(*SHAPES[shape]), tile, splits)


def test_wgrad_of_rows_inside_a_larger_matrix():
    tensors = [pitched(t) for t in make_wgrad(*SHAPES["ragged"])]
    before = [t.clone() for t in tensors]
    first = check_wgrad(*tensors)
    assert same_bits(check_wgrad(*tensors), first)
    assert all(map(same_bits, tensors, before))


# The kinds of product that the chip has tiles for, with every one of them.
CANDIDATES = {
    f"{kind}-{'-'.join(map(str, tables.wide_row(tile)))}": (kind, tile)
    for product in ("half", "tf32", *records.SPLITS)
    for kind in (product, f"dgrad-{product}", f"wgrad-{product}")
    for tile in planning.wide_candidates(kind, ARCH)
}


@pytest.mark.more
@pytest.mark.parametrize(("kind", "tile"), CANDIDATES.values(), ids=CANDIDATES)
def test_every_candidate(kind, tile):
    # A second tile of every size, cut; two programs for four tiles.
    shape = (tile.block_m + 9, 2 * tile.block_k + 8, tile.block_n + 24)
    of, product = kind.rpartition("-")[::2]
    dtype, precision = (torch.bfloat16, "ieee") if product == "half" else (torch.float32, product)
    # tests/kernels/test_splits.py knows what each kind of product costs. The interpreter splits no operands.
    allowance = {"tf32": TF32, "bf16x3": 2e-5}.get(product, 0.0)
    if of == "wgrad":
        m, k, n = shape
        for splits in (1, 2)[: planning.wide_splits(1, 1 << 20, 1, tile, 132)]:
            check_wgrad(*make_wgrad(k, m - 1, n), tile, splits, precision, allowance)
        return
    if of == "dgrad":
        tensors = make_dgrad(*shape, dtype)
        check_dgrad(*tensors, "sigmoid", tile, programs=2, precision=precision, allowance=allowance)
        return
    x, weight, bias, _ = make_layer(*shape, dtype, DEVICE)
    y = run(x, weight, bias, tile=tile, programs=2, precision=precision)
    check(x, weight, bias, actual=y, allowance=allowance)


def test_there_are_candidates():
    assert len(CANDIDATES) > 10


@pytest.mark.core
@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda y: torch.full_like(y, y.mean().item()), torch.flipud])
def test_yardsticks_fail_wrong_results(wrong):
    shape = SHAPES["ragged"]
    x, weight, bias, _ = make_layer(*shape, torch.bfloat16, DEVICE)
    with pytest.raises(AssertionError, match=r"^y: error"):
        check(x, weight, bias, actual=wrong(run(x, weight, bias)))
    tensors = make_dgrad(*shape, torch.bfloat16)
    with pytest.raises(AssertionError, match=r"^dz: error"):
        check_dgrad(*tensors, "sigmoid", actual=[wrong(t) for t in check_dgrad(*tensors, "sigmoid")])
    tensors = make_wgrad(*shape)
    with pytest.raises(AssertionError, match=r"^dweight: error"):
        check_wgrad(*tensors, actual=wrong(check_wgrad(*tensors)))


# numpy warns where the interpreter overflows as the hardware does.
@pytest.mark.core
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_nan_and_inf_stay_in_their_rows(dtype):
    x, weight, bias, _ = make_layer(*SHAPES["ragged"], dtype, DEVICE)
    clean = run(x, weight, bias)
    x[40, 3], x[41, 0] = torch.nan, torch.inf
    y = run(x, weight, bias)
    others = [row for row in range(len(x)) if row not in (40, 41)]
    assert same_bits(y[others], clean[others])
    assert y[40].isnan().all()
    assert torch.equal(y[41], (weight[:, 0] > 0).to(dtype))


# --- memory ---------------------------------------------------------------------------------------------------


def pitched(t, gap=16):
    """Rows farther apart than they are long, NaN between them, at addresses that TMA takes."""
    view = t.new_full((t.shape[0] + 2, t.shape[1] + gap), torch.nan)[1:-1, : t.shape[1]]
    return view.copy_(t)


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_rows_inside_a_larger_matrix(dtype):
    # 70 columns are no whole number of 16 bytes; their pitch is one. What lies between the rows is not theirs.
    x, weight, bias, _ = make_layer(100, 70, 136, dtype, DEVICE)
    x, weight = (pitched(t, 10) for t in (x, weight))
    assert wide.readable(x)
    assert wide.readable(weight)
    check(x, weight, bias)


@pytest.mark.parametrize("bias", ["none", "every-other", "one-value"])
def test_bias(bias):
    x, weight, b, _ = make_layer(*SHAPES["ragged"], torch.float32, DEVICE)
    if bias == "every-other":
        b = torch.stack([b, torch.full_like(b, torch.nan)], 1)[:, 0]
    check(x, weight, {"none": None, "every-other": b, "one-value": b[:1].expand_as(b)}[bias])


@pytest.mark.core
def test_readable():
    x = torch.empty(8, 32, dtype=torch.float16, device=DEVICE)
    assert wide.readable(x)
    assert wide.readable(x[:, :30])
    assert not wide.readable(x[:, 1:])  # not at a multiple of 16 bytes
    assert not wide.readable(off_by_one(x))
    assert not wide.readable(transposed(x))
    assert not wide.readable(x[:1].expand(8, 32))  # rows on top of each other
    assert not wide.readable(torch.empty(8, 30, dtype=torch.float16, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize("tile", [SMALL, HALVES], ids=["whole", "halves"])
def test_writes_everything_and_nothing_else(tile, dtype, monkeypatch):
    x, weight, bias, _ = make_layer(*SHAPES["odd-groups"], dtype, DEVICE)
    expected = run(x, weight, bias, tile=tile)
    buffers = []

    def empty(shape, dtype, device):
        buffers.append(torch.full((shape[0] * shape[1] + 256,), -77, dtype=dtype, device=device))
        return buffers[-1][128:-128].fill_(torch.nan).view(shape)

    # The launcher's torch alone: the interpreter makes tensors of its own.
    monkeypatch.setattr(wide, "torch", types.SimpleNamespace(empty=empty))
    y = run(x, weight, bias, tile=tile)
    (buffer,) = buffers
    assert same_bits(y, expected)
    assert (buffer[:128] == -77).all()
    assert (buffer[-128:] == -77).all()


# A stride that needs 64 bits, and strides of which only the offset of the last row or element does.
FAR = {
    "x-row": ("x", (2, 40, 8), (2**31 + 64, 1)),
    "x-rows": ("x", (3, 40, 8), (2**30 + 64, 1)),
    "weight-rows": ("weight", (3, 40, 8), (2**31 // 7 // 8 * 8 + 8, 1)),
    "bias": ("bias", (3, 40, 8), (2**31 // 7 + 8,)),
}


@pytest.mark.parametrize(("operand", "shape", "stride"), FAR.values(), ids=FAR)
def test_offsets_beyond_int32(operand, shape, stride, wide_memory):
    operands = dict(zip(("x", "weight", "bias"), make_layer(*shape, torch.float16, DEVICE), strict=False))
    dense = run(*operands.values())
    far = wide_memory.as_strided(operands[operand].shape, stride, 2**31)
    assert (far.shape[0] - 1) * stride[0] > 2**31 - 1
    operands[operand] = far.copy_(operands[operand])
    assert same_bits(run(*operands.values()), dense)


def test_same_bits_every_time_and_for_any_number_of_programs():
    tensors = make_layer(*SHAPES["odd-groups"], torch.float32, DEVICE)[:3]
    first = run(*tensors, programs=1)
    for programs in (1, 2, 4, 6, 9, 9):
        assert same_bits(run(*tensors, programs=programs), first)


def test_inputs_are_left_alone():
    tensors = make_layer(*SHAPES["ragged"], torch.bfloat16, DEVICE)[:3]
    before = [t.clone() for t in tensors]
    run(*tensors)
    assert all(map(same_bits, tensors, before))


@pytest.fixture
def allowed():
    """allowed(mode): `allow_fp32_split`, undone after the test."""
    yield allow_fp32_split
    allow_fp32_split(None)


# --- networks of wide layers ----------------------------------------------------------------------------------

NETS = {
    "wide": (264, 136, 200, 136),  # every product between layers ends in the layer below
    "ends-narrow": (40, 264, 136, 10),  # the head has a kernel of its own, and a dz pass comes before the next
    "ragged-in": (31, 136, 264, 136),  # rows of x that TMA cannot read
    "ragged-between": (264, 130, 264, 136),  # a layer in between that it cannot write
}


def network(widths, dtype, m=70, bias=True):
    x, weights, biases, dy = make_network(widths, (m,), dtype, DEVICE, gain=1.4)
    for t in (x, *weights, *biases):
        t.requires_grad_()
    return x, weights, biases if bias else None, dy


def torch_network(x, weights, biases, dy, activation, dtype=None):
    tensors = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, *weights, *(biases or ()))]
    h = plain_network(tensors[0], tensors[1 : 1 + len(weights)], tensors[1 + len(weights) :], activation, activation)
    return h.detach(), *torch.autograd.grad(h, tensors, dy.to(h.dtype))


def check_network(y, x, weights, biases, dy, activation, allowance=0.0):
    """Rounding adds up from layer to layer, and in another order than torch's: one floor more for that."""
    assert y.grad_fn.name() == "MlpFunctionBackward"
    actual = (y.detach(), *torch.autograd.grad(y, (x, *weights, *(biases or ())), dy))
    own = (None, torch.float64)
    expected, exact = (torch_network(x, weights, biases, dy, activation, dtype) for dtype in own)
    names = ["y", "dx", *(f"dweight {l}" for l in range(3)), *(f"dbias {l}" for l in range(3) if biases)]
    assert_as_good_as_torch(actual, expected, exact, x.dtype, names, allowance=FLOOR[x.dtype] + allowance)
    return exact


@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, True), (torch.float16, False)], ids=["bias", "no-bias"])
@pytest.mark.parametrize("net", NETS)
def test_networks(net, dtype, bias, monkeypatch):
    spy = spy_on(monkeypatch, wide, "linear_act_dgrad_tma_kernel")
    x, weights, biases, dy = network(NETS[net], dtype, bias=bias)
    y = mlp_act(x, weights, biases, "tanh", impl="triton")
    check_network(y, x, weights, biases, dy, "tanh")
    assert len(spy.launches) == {"wide": 2, "ends-narrow": 1, "ragged-in": 2, "ragged-between": 1}[net]


@pytest.mark.parametrize("split", [*records.SPLITS, "torch says tf32"])
def test_fp32_networks(split, monkeypatch, allowed):
    """One node where a split is allowed or torch's setting lets products be TF32's, and no pass between its layers."""
    spies = [spy_on(monkeypatch, wide, f"linear_act_{kind}_tma_kernel") for kind in ("dgrad", "fwd")]
    x, weights, biases, dy = network(NETS["wide"], torch.float32)
    with pytest.raises(NotImplementedError, match="networks stay on chip up to 128"):
        mlp_act(x, weights, biases, "tanh", impl="triton")
    if split in records.SPLITS:
        allowed(split)
    else:
        monkeypatch.setattr(ops, "fp32_precision", lambda _: "tf32")
    y = mlp_act(x, weights, biases, "tanh", impl="triton")
    # Three layers add up what their operands lose.
    check_network(y, x, weights, biases, dy, "tanh", {"bf16x3": 2e-5, "torch says tf32": 3 * TF32}.get(split, 0.0))
    precision = split if split in records.SPLITS else "tf32"
    # Split, the gradients of weights are forward products too.
    for spy, launches in zip(spies, (2, 6 if split in records.SPLITS else 3), strict=True):
        assert [launch["PRECISION"] for launch in spy.launches] == [precision] * launches


@pytest.mark.more
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("layout", [negated, conjugated], ids=lambda f: f.__name__)
@pytest.mark.parametrize("operand", ["x", "weight", "bias", "dy"])
def test_networks_of_negative_views(operand, layout):
    x, weights, biases, dy = network(NETS["ends-narrow"], torch.float16)
    inputs = (x, *weights, *biases)
    with torch.no_grad():
        if operand == "x":
            x = layout(x.detach()).requires_grad_()
        elif operand == "dy":
            dy = layout(dy)
        else:
            tensors = weights if operand == "weight" else biases
            tensors[:] = [layout(t.detach()).requires_grad_() for t in tensors]
    y = mlp_act(x, weights, biases, "tanh", impl="triton")
    assert y.grad_fn.name() == "MlpFunctionBackward"
    actual = (y.detach(), *torch.autograd.grad(y, (x, *weights, *biases), dy))
    dense = mlp_act(*inputs[:1], inputs[1:4], inputs[4:], "tanh", impl="triton")
    expected = (dense.detach(), *torch.autograd.grad(dense, inputs, dy.resolve_neg()))
    assert_near(actual, expected, FLOOR[torch.float16])


def test_networks_stop_infinite_gradients_at_dead_units():
    x, weights, biases, dy = network(NETS["wide"], torch.bfloat16)
    with torch.no_grad():
        for bias in biases:
            bias[3] = -100.0
        dy[::2, 3] = torch.inf
    exact = check_network(mlp_act(x, weights, biases, "relu", impl="triton"), x, weights, biases, dy, "relu")
    assert all(t.isfinite().all() for t in exact)


@pytest.mark.parametrize("output", ["identity", "tanh"])
def test_networks_keep_what_gradients_need(output):
    x, weights, biases, dy = network(NETS["wide"], torch.float16)
    x.requires_grad_(False)
    results = []
    for write in (False, True):
        y = mlp_act(x, weights, biases, "tanh", output, impl="triton")
        if write:
            with torch.no_grad():
                biases[1].add_(1)
                weights[0].mul_(2)
            if output == "identity":
                y = y.mul_(1)
        results.append(torch.autograd.grad(y, (*weights, *biases), dy))
    assert same_bits(*results)


@pytest.mark.parametrize("hidden", ["tanh", "identity"])
def test_second_order_of_networks(hidden):
    x, weights, biases, dy = network(NETS["ends-narrow"], torch.float16, m=20)
    inputs = (x, *weights, *biases)
    results = []
    for dtype in (torch.float16, torch.float64):
        own = [t.detach().to(dtype).requires_grad_() for t in inputs]
        call = functools.partial(mlp_act, impl="triton") if dtype is torch.float16 else plain_network
        y = call(own[0], own[1:4], own[4:], hidden, "tanh")
        first = torch.autograd.grad((y * dy.to(dtype)).sum(), own, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().mean() for g in first), own))
    assert_near(*results, 0.02)


WANTED = {
    "dx": lambda x, weights, biases: [x],
    "last-layer": lambda x, weights, biases: [weights[2], biases[2]],
    "first-bias": lambda x, weights, biases: [biases[0]],
    "middle": lambda x, weights, biases: [weights[1]],
}


@pytest.mark.parametrize("choose", WANTED.values(), ids=WANTED)
def test_networks_compute_what_is_wanted(choose):
    x, weights, biases, dy = network(NETS["wide"], torch.float16)
    everything = [x, *weights, *biases]
    full = torch.autograd.grad(mlp_act(x, weights, biases, impl="triton"), everything, dy)
    wanted = choose(x, weights, biases)
    for tensor in everything:
        tensor.requires_grad_(any(tensor is w for w in wanted))
    some = torch.autograd.grad(mlp_act(x, weights, biases, impl="triton"), wanted, dy)
    for tensor, gradient in zip(wanted, some, strict=True):
        (place,) = [i for i, other in enumerate(everything) if other is tensor]
        assert relative_error(gradient, full[place]) < 1e-3


def test_networks_without_gradients():
    x, weights, biases, _ = network(NETS["ends-narrow"], torch.float16)
    with torch.no_grad():
        y = mlp_act(x, weights, biases, impl="triton")
    assert torch.equal(y, mlp_act(x, weights, biases, impl="triton"))


# --- choosing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fired(monkeypatch):
    """The kernels that ran since the last call."""
    kinds = {"tma": wide, "tiled": layer}
    spies = {kind: spy_on(monkeypatch, module, f"linear_act_fwd_{kind}_kernel") for kind, module in kinds.items()}

    def fired():
        names = [kind for kind, spy in spies.items() for _ in spy.launches]
        for spy in spies.values():
            spy.launches.clear()
        return names

    return fired


@pytest.mark.core
@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (lambda t: t, "tma"),
        (lambda t: pitched(t, 16), "tma"),
        (off_by_one, "tiled"),
        (transposed, "tiled"),
        (negated, "tiled"),
    ],
    ids=["dense", "pitched", "off-by-one", "transposed", "negated"],
)
@pytest.mark.parametrize("operand", [0, 1], ids=["x", "weight"])
def test_triton_takes_it_where_it_applies(operand, layout, expected, fired):
    tensors = list(make_layer(20, 264, 40, torch.bfloat16, DEVICE)[:3])
    tensors[operand] = layout(tensors[operand])
    check(*tensors, actual=linear_act(*tensors, impl="triton"))
    assert fired() == [expected]


@pytest.mark.parametrize("shape", [(20, 264, 44), (20, 264, 1)], ids=str)
def test_rows_of_y_that_tma_cannot_write(shape, fired):
    tensors = make_layer(*shape, torch.bfloat16, DEVICE)[:3]
    check(*tensors, actual=linear_act(*tensors, impl="triton"))
    assert fired() == ["tiled"]


def test_gradients_of_a_layer_that_took_it(fired):
    x, weight, bias, dy = make_layer(20, 264, 40, torch.bfloat16, DEVICE)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = linear_act(*inputs, impl="triton")
    assert fired() == ["tma"]
    actual = (y.detach(), *torch.autograd.grad(y, inputs, dy))
    expected, exact = (torch_layer(x, weight, bias, dy, "sigmoid", d) for d in (None, torch.float64))
    assert_as_good_as_torch(actual, expected, exact, torch.bfloat16)


def test_fp32_keeps_to_fp32_until_a_split_is_allowed(fired, allowed):
    tensors = make_layer(20, 264, 40, torch.float32, DEVICE)[:3]
    y = linear_act(*tensors, impl="triton")
    assert fired() == ["tiled"]
    for mode in records.SPLITS:
        allowed(mode)
        split = linear_act(*tensors, impl="triton")
        assert fired() == ["tma"]
        assert relative_error(split, y) < (2e-5 if mode == "bf16x3" else FLOOR[torch.float32])
        # Other dtypes have nothing to split.
        linear_act(*(t.half() for t in tensors), impl="triton")
        assert fired() == ["tma"]
    allowed(None)
    assert same_bits(linear_act(*tensors, impl="triton"), y)
    assert fired() == ["tiled"]


def test_a_split_is_named_to_the_kernel(allowed, monkeypatch):
    spy = spy_on(monkeypatch, wide, "linear_act_fwd_tma_kernel")
    tensors = make_layer(20, 264, 40, torch.float32, DEVICE)[:3]
    for before, mode in itertools.pairwise((None, *records.SPLITS)):
        assert allowed(mode) == before
        linear_act(*tensors, impl="triton")
    assert [launch["PRECISION"] for launch in spy.launches] == list(records.SPLITS)


def test_unknown_splits_are_refused():
    with pytest.raises(ValueError, match=r"mode must be None or one of 'tf32x3', 'bf16x6', 'bf16x3', not 'bf16x9'"):
        allow_fp32_split("bf16x9")
    assert devices.fp32_split(torch.float32) is None
