"""The product whose tiles travel by TMA against fp64: on a GPU with TMA, or in triton's interpreter."""

import itertools
import types

import pytest
import torch
from cases import (
    ACTIVATIONS,
    DTYPES,
    FLOOR,
    NO_KERNELS,
    assert_as_good_as_torch,
    join,
    kernel_device,
    make_layer,
    make_layers,
    off_by_one,
    relative_error,
    torch_layer,
    transposed,
)

from perceptriton.kernels import allow_fp32_split, ops
from perceptriton.kernels import plan as planning
from perceptriton.kernels.plan import Plan, WideTile
from perceptriton.mlp import linear_act

DEVICE = kernel_device()
if DEVICE is None:
    pytest.skip(NO_KERNELS, allow_module_level=True)
if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("TMA needs compute capability 9.0", allow_module_level=True)
ARCH = 90 if DEVICE == "cpu" else 10 * torch.cuda.get_device_capability()[0]

wide = pytest.importorskip("perceptriton.kernels.wide")
linear = pytest.importorskip("perceptriton.kernels.linear")
pytestmark = pytest.mark.usefixtures("device")

IDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SMALL = WideTile(64, 64, 32, 4, 3, group_m=2)
HALVES = WideTile(64, 64, 32, 4, 3, group_m=2, subtiles=2)

# (rows, in_features, out_features): why. Rows of 16 bytes are 4 fp32 or 8 half-precision values.
SHAPES = {
    "one-by-eight": (1, 8, 8),  # every size is smaller than the tile
    "exact": (128, 64, 128),  # whole tiles
    "ragged": (100, 72, 136),  # the last tile of every size is cut
    "one-more": (129, 40, 72),  # a tile of one row
    "deep-k": (33, 520, 24),  # many steps, the last one of 8
    "groups": (330, 16, 72),  # 6 row tiles in groups of 2, two column tiles
    "odd-groups": (300, 16, 200),  # the last group has one row tile
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


def same_bits(a, b):
    return torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize("tile", [SMALL, HALVES], ids=["whole", "halves"])
@pytest.mark.parametrize("shape", SHAPES)
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


# The kinds of product that the chip has tiles for, with every one of them.
CANDIDATES = {
    f"{kind}-{'-'.join(map(str, planning.wide_row(tile)))}": (kind, tile)
    for kind in ("half", "tf32", *planning.SPLITS)
    for tile in planning.wide_candidates(kind, ARCH)
}


@pytest.mark.parametrize(("kind", "tile"), CANDIDATES.values(), ids=CANDIDATES)
def test_every_candidate(kind, tile):
    # A second tile of every size, cut; two programs for four tiles.
    shape = (tile.block_m + 9, 2 * tile.block_k + 8, tile.block_n + 24)
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    x, weight, bias, _ = make_layer(*shape, dtype, DEVICE)
    y = run(x, weight, bias, tile=tile, programs=2, precision="ieee" if kind == "half" else kind)
    # The interpreter multiplies in fp32 whatever the kind; tests/test_splits.py knows what each one costs.
    allowance = {"tf32": 2e-3, "bf16x3": 2e-5}.get(kind, 0.0) if DEVICE == "cuda" else 0.0
    check(x, weight, bias, actual=y, allowance=allowance)


def test_there_are_candidates():
    assert len(CANDIDATES) > 10


@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda y: torch.full_like(y, y.mean().item()), torch.flipud])
def test_yardstick_fails_wrong_results(wrong):
    x, weight, bias, _ = make_layer(*SHAPES["ragged"], torch.bfloat16, DEVICE)
    with pytest.raises(AssertionError, match=r"^y: error"):
        check(x, weight, bias, actual=wrong(run(x, weight, bias)))


# numpy warns where the interpreter overflows as the hardware does.
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


@pytest.fixture(scope="module")
def wide_memory():
    """9 GB of addresses, of which only the pages that a test touches take memory on a CPU."""
    size = 2**32 + 2**28
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 2 * size + 2**30:
        pytest.skip("needs 10 GB of free GPU memory")
    # The deterministic mode would write to all of it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        try:
            return torch.empty(size, dtype=torch.float16, device=DEVICE)
        except RuntimeError as error:
            pytest.skip(f"9 GB of addresses are not to be had: {error}")


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
    for programs in (1, 2, 3, 7, 20, 20):
        assert same_bits(run(*tensors, programs=programs), first)


def test_inputs_are_left_alone():
    tensors = make_layer(*SHAPES["ragged"], torch.bfloat16, DEVICE)[:3]
    before = [t.clone() for t in tensors]
    run(*tensors)
    assert all(map(same_bits, tensors, before))


# --- choosing ---------------------------------------------------------------------------------------------------


class Spy:
    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(**arguments):
            self.launches.append(arguments | {"grid": grid})
            return self.kernel[grid](**arguments)

        return launch


@pytest.fixture
def fired(monkeypatch):
    """The kernels that ran since the last call."""
    spies = {}
    for module, name in ((wide, "linear_act_fwd_tma_kernel"), (linear, "linear_act_fwd_tiled_kernel")):
        spies[name] = Spy(getattr(module, name))
        monkeypatch.setattr(module, name, spies[name])

    def fired():
        names = [name.split("_")[3] for name, spy in spies.items() for _ in spy.launches]
        for spy in spies.values():
            spy.launches.clear()
        return names

    return fired


@pytest.mark.parametrize(
    ("layout", "expected"),
    [(lambda t: t, "tma"), (lambda t: pitched(t, 16), "tma"), (off_by_one, "tiled"), (transposed, "tiled")],
    ids=["dense", "pitched", "off-by-one", "transposed"],
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


@pytest.fixture
def allowed():
    """allowed(mode): `allow_fp32_split`, undone after the test."""
    yield allow_fp32_split
    allow_fp32_split(None)


def test_fp32_keeps_to_fp32_until_a_split_is_allowed(fired, allowed):
    tensors = make_layer(20, 264, 40, torch.float32, DEVICE)[:3]
    y = linear_act(*tensors, impl="triton")
    assert fired() == ["tiled"]
    for mode in planning.SPLITS:
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
    spy = Spy(wide.linear_act_fwd_tma_kernel)
    monkeypatch.setattr(wide, "linear_act_fwd_tma_kernel", spy)
    tensors = make_layer(20, 264, 40, torch.float32, DEVICE)[:3]
    for before, mode in itertools.pairwise((None, *planning.SPLITS)):
        assert allowed(mode) == before
        linear_act(*tensors, impl="triton")
    assert [launch["PRECISION"] for launch in spy.launches] == list(planning.SPLITS)


def test_unknown_splits_are_refused():
    with pytest.raises(ValueError, match=r"mode must be None or one of 'tf32x3', 'bf16x6', 'bf16x3', not 'bf16x9'"):
        allow_fp32_split("bf16x9")
    assert ops._fp32_split is None
