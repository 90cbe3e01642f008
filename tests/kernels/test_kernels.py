# SPDX-License-Identifier: Apache-2.0
"""Every kernel against fp64: on a GPU, or on the CPU in triton's interpreter."""

import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ACTIVATIONS,
    DTYPES,
    EMPTY_SHAPES,
    FLOOR,
    IDS,
    LAYOUTS,
    LOSSES,
    NO_KERNELS,
    SHAPES,
    TF32,
    WANTED,
    WRONG,
    assert_as_good_as_torch,
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
    every_other,
    gradient_penalty,
    kernel_device,
    lay_out,
    make_layer,
    relative_error,
    run_layer,
    same_bits,
    spy_on,
    torch_layer,
    transposed,
)
from emulation import round_tf32
from interpreting import let_integers_wrap

from perceptriton.kernels import Plan, Tile
from perceptriton.kernels.registration import registered
from perceptriton.mlp import linear_act

DEVICE = kernel_device()
if DEVICE is None:
    pytest.skip(NO_KERNELS, allow_module_level=True)

layer = pytest.importorskip("perceptriton.kernels.gpu.layer")
pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.interpreter, pytest.mark.gpu]

KERNELS = (
    "linear_act_fwd_rows_kernel",
    "linear_act_fwd_tiled_kernel",
    "linear_act_bwd_rows_kernel",
    "act_bwd_kernel",
    "sum_slots_kernel",
)


run = functools.partial(run_layer, impl="triton")
triton_layer = functools.partial(linear_act, impl="triton")


def check(*tensors, actual=None):
    actual = run(*tensors) if actual is None else actual
    check_layer(actual, *tensors)
    assert all(result.is_contiguous() for result in actual)


@pytest.fixture
def launches(monkeypatch):
    """{kernel name: [arguments of each launch]}"""
    return {name: spy_on(monkeypatch, layer, name).launches for name in KERNELS}


# --- plans, so that a test says which kernel it means -------------------------------------------------------------


def rows(k, n, programs, block_m=16):
    block_k, block_n = (max(16, 1 << (size - 1).bit_length()) for size in (k, n))
    return Plan("rows", "the test says so", Tile(block_m, block_n, block_k, 4, 1), programs)


def tiled(m, n, block_m, block_n, block_k):
    programs = math.ceil(m / block_m) * math.ceil(n / block_n)
    return Plan("tiled", "the test says so", Tile(block_m, block_n, block_k, 4, 1), programs)


def passes(block_m, block_n, programs=1):
    return Plan("passes", "the test says so", Tile(block_m, block_n, 0, 4, 1), programs)


def slots_of(plan, n):
    """Slots of dbias that a backward plan fills; of one, nothing is left to sum."""
    return plan.programs // math.ceil(n / plan.tile.block_n) if plan.impl == "passes" else plan.programs


# (m, k, n), forward, backward: why
PATHS = {
    # one program walks every row tile and writes the gradients itself
    "rows-alone": ((100, 10, 31), rows(10, 31, 1), rows(10, 31, 1)),
    # 7 tiles over 3 programs: they get 3, 2 and 2
    "rows-three": ((100, 10, 31), rows(10, 31, 3), rows(10, 31, 3)),
    # programs without a tile must leave zeros, not garbage, in their slots
    "rows-idle": ((100, 10, 31), rows(10, 31, 9), rows(10, 31, 9)),
    "rows-head": ((70, 3, 1), rows(3, 1, 5), rows(3, 1, 5)),
    # more slots than the reduction sums side by side
    "rows-many": ((300, 17, 5), rows(17, 5, 19), rows(17, 5, 19)),
    # every tile is ragged, the loop over K has a tail; 3 row tiles of dz over 2 programs in each of two column tiles
    "tiled-ragged": ((65, 37, 41), tiled(65, 41, 32, 32, 16), passes(32, 32, 4)),
    # the shape is a whole number of tiles, of which each program of the dz pass has one
    "tiled-exact": ((64, 64, 32), tiled(64, 32, 32, 16, 32), passes(16, 32, 4)),
    # one tile larger than the matrix: its program writes dbias itself
    "tiled-one": ((5, 20, 3), tiled(5, 3, 64, 64, 32), passes(32, 128)),
    # 10 row tiles in two column tiles: a full group of 8 and one of 2; 5 of 15 programs of the dz pass have no tile
    "tiled-groups": ((150, 5, 20), tiled(150, 20, 16, 16, 16), passes(16, 16, 30)),
}


@pytest.fixture
def path_shape(path, force):
    """(m, k, n) of the test's path, whose plans are taken."""
    shape, *plans = PATHS[path]
    force(*plans)
    return shape


ROWS, TILED = PATHS["rows-three"], PATHS["tiled-ragged"]


# --- numbers ------------------------------------------------------------------------------------------------


# Every activation meets one shape of each kernel.
COMBINATIONS = {
    f"{shape}-{activation}-{IDS[dtype]}": (shape, activation, dtype)
    for shape in SHAPES
    for activation in ACTIVATIONS
    if activation == "sigmoid" or shape in ("xor-hidden", "wide")
    for dtype in DTYPES
}


@pytest.mark.more
@pytest.mark.parametrize(("shape", "activation", "dtype"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_shapes(shape, activation, dtype):
    check_shape(run, shape, activation, dtype, DEVICE)


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize("path", PATHS)
def test_paths(path, dtype, path_shape, launches):
    _, forward, backward = PATHS[path]
    check(*make_layer(*path_shape, dtype, DEVICE))
    fired = {name for name in KERNELS if launches[name]}
    expected = {f"linear_act_fwd_{forward.impl}_kernel"}
    expected.add("linear_act_bwd_rows_kernel" if backward.impl == "rows" else "act_bwd_kernel")
    if slots_of(backward, path_shape[2]) > 1:
        expected.add("sum_slots_kernel")
    assert fired == expected


@pytest.mark.core
@pytest.mark.parametrize("path", ["rows-three", "tiled-ragged"])
def test_without_bias(path, path_shape):
    x, weight, _, dy = make_layer(*path_shape, torch.float32, DEVICE)
    check(x, weight, None, dy)


@pytest.mark.core
def test_one_program_writes_the_gradients_themselves(force, launches):
    shape, forward, backward = PATHS["rows-alone"]
    force(forward, backward)
    _, dx, dweight, dbias = run(*make_layer(*shape, torch.bfloat16, DEVICE))
    (arguments,) = launches["linear_act_bwd_rows_kernel"]
    written = [arguments[name] for name in ("dx_ptr", "dweight_ptr", "dbias_ptr")]
    assert [t.data_ptr() for t in written] == [t.data_ptr() for t in (dx, dweight, dbias)]
    assert not launches["sum_slots_kernel"]


# (slots, sums of the first tensor and of the second): why
SUMS = {
    **{f"one-round-{count}": (count, 30, 40) for count in (1, 2, 31, 33, 63, 64)},
    "two-rounds": (65, 30, 40),
    # sizes around the block of 64, the seam between the two tensors inside a block and on its edge
    **{f"sizes-{first}+{second}": (9, first, second) for first, second in ((1, 0), (63, 0), (65, 0), (1, 1), (64, 64))},
    "vectors": (140, 192, 0),
    "last-in-one-launch": (512, 100, 3),
    # the last chunk has a single slot
    "first-in-two": (513, 100, 3),
    "chunks": (1000, 64, 64),
    "ragged-chunks": (5000, 33, 0),
}


def sum_slots(slots, first, second, dtype=torch.float32):
    outputs = [torch.full((size,), torch.nan, dtype=dtype, device=DEVICE) for size in (first, second) if size]
    layer.sum_slots(slots, *outputs)
    return torch.cat(outputs)


def assert_near_sums(actual, slots):
    exact = slots.double().sum(0)
    assert relative_error(actual, exact) < 2e-7 + 2 * relative_error(slots.sum(0), exact)
    # One by one too, whatever cancels.
    assert ((actual - exact).abs() <= 2e-7 * slots.double().abs().sum(0)).all()


@pytest.mark.core
@pytest.mark.parametrize("case", SUMS)
def test_sum_of_slots(case, launches):
    num_slots, first, second = SUMS[case]
    generator = torch.Generator().manual_seed(0)
    slots = torch.randn(num_slots, first + second, generator=generator).to(DEVICE)
    actual = sum_slots(slots, first, second)
    assert_near_sums(actual, slots)
    assert len(launches["sum_slots_kernel"]) == (1 if num_slots <= 512 else 2)
    assert same_bits(sum_slots(slots, first, second), actual)


def test_sum_of_very_many_slots(launches):
    slots = torch.randn(40_000, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert_near_sums(sum_slots(slots, 67, 3), slots)
    # The second launch has no more slots than it reads at a time.
    assert launches["sum_slots_kernel"][1]["num_slots"] <= 64
    assert relative_error(sum_slots(slots, 70, 0, torch.bfloat16), slots.double().sum(0)) < 4e-3


@pytest.mark.core
@pytest.mark.parametrize("num_slots", [33, 1000])
def test_nan_and_inf_stay_in_their_sums(num_slots):
    slots = torch.ones(num_slots, 70, device=DEVICE)
    slots[num_slots - 1, 3], slots[0, 64], slots[num_slots // 2, 69] = torch.nan, torch.inf, -torch.inf
    expected = torch.full((70,), float(num_slots), device=DEVICE)
    expected[3], expected[64], expected[69] = torch.nan, torch.inf, -torch.inf
    torch.testing.assert_close(sum_slots(slots, 60, 10), expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("programs", [2, 6, 64])
def test_nan_stays_in_its_column_of_dbias(programs):
    # 3 column tiles of 16, 5 row tiles: one program, two, and more than there are tiles
    _, _, _, dy = make_layer(70, 3, 40, torch.float32, DEVICE)
    y = torch.rand_like(dy)
    plan = passes(16, 16, programs)
    dz, dbias = layer.act_bwd(dy, y, "sigmoid", True, plan)
    assert relative_error(dbias, (dy.double() * (y * (1 - y)).double()).sum(0)) < 2e-7
    dy[69, 17] = torch.nan
    other_dz, other = layer.act_bwd(dy, y, "sigmoid", True, plan)
    clean = [column for column in range(40) if column != 17]
    assert same_bits((other[clean], other_dz[:69]), (dbias[clean], dz[:69]))
    assert other[17].isnan()
    assert other_dz[69, 17].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=IDS.get)
@pytest.mark.parametrize("backward", [rows(3, 2, 1), passes(16, 16, 3)], ids=["rows", "passes"])
def test_sums_over_many_rows_stay_in_fp32(backward, dtype, force):
    # 150 row tiles and gradients of one sign: rounded to the dtype after each tile, sums would drift by percents.
    force(rows(3, 2, 1, block_m=128), backward)
    x, weight, bias, dy = make_layer(2400, 3, 2, dtype, DEVICE)
    check(x.abs(), weight, bias, dy.abs())


@pytest.mark.core
@pytest.mark.parametrize("shape", EMPTY_SHAPES)
def test_empty(shape):
    check_empty(run, shape, DEVICE)


@pytest.mark.core
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 2), (2, 0)], ids=str)
def test_leading_dimensions(leading):
    m = math.prod(leading)
    x, weight, bias, dy = make_layer(m, 5, 3, torch.float32, DEVICE)
    flat = run(x, weight, bias, dy)
    y, dx, dweight, dbias = run(x.view(*leading, 5), weight, bias, dy.view(*leading, 3))
    assert (y.shape, dx.shape) == ((*leading, 3), (*leading, 5))
    assert same_bits((y.view(m, 3), dx.view(m, 5), dweight, dbias), flat)


def test_permuted_leading_dimensions():
    x, weight, bias, dy = make_layer(24, 5, 3, torch.float32, DEVICE)
    x, dy = x.view(2, 3, 4, 5).permute(2, 0, 1, 3), dy.view(2, 3, 4, 3).permute(2, 0, 1, 3)
    check(x, weight, bias, dy)


# numpy warns where the interpreter overflows as the hardware does.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes(activation, dtype):
    check_extremes(run, activation, dtype, DEVICE)


@pytest.mark.core
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_value_counts(activation):
    # One by one: a relative norm over a layer does not see the small values, where a quotient may cancel.
    z = torch.logspace(-12, 1.5, 300, device=DEVICE)
    z = torch.cat([-z.flip(0), torch.zeros(1, device=DEVICE), z])[:, None]
    y, dx, *_ = run(z, torch.ones(1, 1, device=DEVICE), None, torch.ones_like(z), activation)
    exact_y, exact_dx, *_ = torch_layer(z, torch.ones_like(z[:1]), None, torch.ones_like(z), activation, torch.float64)
    # e^z is only as good as z, which is rounded: hence the factor |z|.
    bound = 3e-7 * (4 + z.abs().double())
    assert ((y - exact_y).abs() <= bound * exact_y.abs() + 1e-37).all()
    # From y alone: 1 - y and 1 - y^2 keep what is left of it near 1.
    assert ((dx - exact_dx).abs() <= bound * exact_dx.abs() + 3e-7).all()


# Here too.
@pytest.mark.core
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("path", ["rows-three", "tiled-ragged"])
def test_nan_and_inf_stay_in_their_rows(path, path_shape):
    x, weight, bias, dy = make_layer(*path_shape, torch.float32, DEVICE)
    clean = run(x, weight, bias, dy)
    x[40, 3], x[41, 0] = torch.nan, torch.inf
    y, dx, *_ = run(x, weight, bias, dy)
    others = [row for row in range(path_shape[0]) if row not in (40, 41)]
    assert same_bits((y[others], dx[others]), (clean[0][others], clean[1][others]))
    assert y[40].isnan().all()
    assert dx[40].isnan().all()
    assert torch.equal(y[41], (weight[:, 0] > 0).float())


@pytest.mark.core
@pytest.mark.parametrize(("name", "wrong"), WRONG.values(), ids=WRONG)
def test_yardstick_fails_wrong_results(name, wrong):
    check_yardstick(run, check, name, wrong, DEVICE)


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", ["rows-three", "tiled-ragged"])
def test_layouts(path, layout, path_shape, launches):
    tensors = lay_out(make_layer(*path_shape, torch.float32, DEVICE), layout)
    check(*tensors)
    # Seen as it is: a launcher that makes its operands dense first would pass everything above.
    operand = layout.partition("-")[0]
    tensor = dict(zip(("x", "weight", "bias", "dy"), tensors, strict=True))[operand].resolve_neg()
    name = "stride_b" if operand == "bias" else f"stride_{operand.replace('weight', 'w')}"
    (kernel,) = (
        k for k in launches if launches[k] and (k.startswith("linear_act_fwd") if operand != "dy" else "bwd" in k)
    )
    strides = tuple(value for key, value in launches[kernel][0].items() if key.startswith(name))
    assert strides == tensor.stride()


def test_dense_and_other_layouts_agree_to_the_bit(force):
    # Addresses must not change the arithmetic.
    for shape, forward, backward in (ROWS, TILED):
        force(forward, backward)
        tensors = make_layer(*shape, torch.float32, DEVICE)
        dense = run(*tensors)
        for layout in ("x-every_other", "weight-off_by_one", "bias-every_other", "dy-inside"):
            other = run(*lay_out(tensors, layout))
            # dx and dweight of the two passes come from the library, which may choose by layout.
            count = 4 if backward.impl == "rows" else 1
            assert same_bits(other[:count], dense[:count]), layout


@pytest.mark.core
@pytest.mark.parametrize("path", ["rows-three", "tiled-ragged"])
def test_output_in_another_layout(path, path_shape):
    # A compiler may hand the saved output back with strides of its own.
    x, weight, bias, dy = make_layer(*path_shape, torch.float32, DEVICE)
    y, *expected = run(x, weight, bias, dy)
    for layout in (transposed, every_other):
        actual = registered.linear_act_backward(dy, layout(y), x, weight, "sigmoid", (True, True, True), "triton")
        assert same_bits(actual, expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("path", ["rows-three", "tiled-ragged"])
def test_losses(path, loss, path_shape, launches):
    x, weight, bias, c = make_layer(*path_shape, torch.float32, DEVICE)
    check_loss(triton_layer, loss, x, weight, bias, c)
    strides = LOSSES[loss][1]
    if strides is not None:
        (arguments,) = launches["linear_act_bwd_rows_kernel"] + launches["act_bwd_kernel"]
        assert (arguments["stride_dym"], arguments["stride_dyn"]) == strides(path_shape[0], path_shape[2])


@pytest.fixture
def guarded(monkeypatch):
    """Fresh tensors are NaN, and lie between canaries: [buffer, ...], to be looked at after the launches."""
    buffers = []

    def empty_strided(shape, strides, *, dtype, device):
        buffer = torch.zeros(math.prod(shape) + 256, dtype=dtype, device=device).fill_(-77)
        buffers.append(buffer)
        return buffer[128:-128].fill_(torch.nan).as_strided(shape, strides)

    monkeypatch.setattr(torch, "empty_strided", empty_strided)
    return buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=IDS.get)
@pytest.mark.parametrize("path", PATHS)
def test_writes_everything_and_nothing_else(path, dtype, path_shape, guarded):
    _, forward, backward = PATHS[path]
    tensors = make_layer(*path_shape, dtype, DEVICE)
    y = layer.linear_act_fwd(*tensors[:3], "sigmoid", forward)
    gradients = layer.linear_act_bwd(tensors[3], y, *tensors[:2], "sigmoid", (True, True, True), backward)
    # y, dx, dweight, dbias; instead of dx and dweight the two passes make dz; and slots.
    assert len(guarded) >= (4 if backward.impl == "rows" else 3)
    for buffer in guarded:
        assert (buffer[:128] == -77).all()
        assert (buffer[-128:] == -77).all()
        assert buffer.isfinite().all()
    check(*tensors, actual=(y, *gradients))


# Strides that need 64 bits, and strides that do not but make offsets that do: of the last row, and of the last step
# along K.
FAR = {
    "x-row": ("x", (2**31 + 64, 1)),
    "x-rows": ("x", (2**30 + 64, 1)),
    "x-columns": ("x", (1, 2**26 + 2)),
    "weight-row": ("weight", (2**31 + 64, 1)),
    "weight-rows": ("weight", (2**30 + 64, 1)),
    "weight-columns": ("weight", (1, 2**26 + 2)),
    "bias": ("bias", (2**30 + 64,)),
    "dy-row": ("dy", (2**31 + 64, 1)),
    "dy-rows": ("dy", (2**30 + 64, 1)),
    "dy-columns": ("dy", (1, 2**30 + 64)),
}


@pytest.mark.parametrize("path", ["rows", "tiled"])
@pytest.mark.parametrize(("operand", "stride"), FAR.values(), ids=FAR)
def test_offsets_beyond_int32(operand, stride, path, force, wide_memory):
    # The third row or column of a stride above 2^30 lies beyond 2^31, as does the last of 36 columns of one above 2^26.
    m, k, n = (2, 36, 2) if stride[0] > 2**31 else (3, 36, 3)
    force(*((rows(k, n, 1), rows(k, n, 1)) if path == "rows" else (tiled(m, n, 16, 16, 32), passes(16, 16, 4))))
    operands = dict(zip(("x", "weight", "bias", "dy"), make_layer(m, k, n, torch.float16, DEVICE), strict=True))

    def results():
        x, weight, bias, dy = operands.values()
        if path == "rows":
            return run(x, weight, bias, dy)
        # dx and dweight would come from the library's product.
        bias = bias.detach().requires_grad_()
        y = linear_act(x, weight, bias, impl="triton")
        return y.detach(), *torch.autograd.grad(y, bias, dy)

    dense = results()
    far = wide_memory.as_strided(operands[operand].shape, stride, 2**31)
    operands[operand] = far.copy_(operands[operand])
    assert same_bits(results(), dense)


# Not fp16, in which a factor of 2 is not exact below 6e-5.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS.get)
@pytest.mark.parametrize("path", ["rows-three", "tiled-ragged"])
def test_inputs_are_left_alone(path, dtype, path_shape):
    check_inputs_are_left_alone(triton_layer, *make_layer(*path_shape, dtype, DEVICE))


@pytest.mark.parametrize(
    ("forward", "backward"),
    [(rows(3, 5, 2), rows(3, 5, 3)), (tiled(40, 5, 16, 16, 16), passes(16, 16, 3))],
    ids=["rows", "tiled"],
)
def test_same_bits_every_time(forward, backward, force):
    force(forward, backward)
    tensors = make_layer(40, 3, 5, torch.float32, DEVICE)
    first = run(*tensors)
    for _ in range(50 if DEVICE == "cuda" else 5):  # what changes there is the order of threads
        assert same_bits(run(*tensors), first)


# --- autograd ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("path", ["rows-alone", "rows-three", "tiled-ragged"])
def test_computes_only_what_is_asked_for(path, wanted, path_shape, launches, monkeypatch):
    _, _, backward = PATHS[path]
    x, weight, bias, dy = make_layer(*path_shape, torch.float32, DEVICE)
    full = run(x, weight, bias, dy)[1:]
    for calls in launches.values():
        calls.clear()
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *operands: products.append(operands) or mm(*operands))
    for tensor, want in zip((x, weight, bias), wanted, strict=True):
        tensor.requires_grad_(want)
    linear_act(x, weight, bias, impl="triton").backward(dy)
    gradients = [t.grad for t in (x, weight, bias)]
    assert [g is not None for g in gradients] == list(wanted)
    # Not to the bit: on a GPU the kernel without dx may keep dz in another layout and sum it in another order.
    expected = [g for g, want in zip(full, wanted, strict=True) if want]
    torch.testing.assert_close([g for g in gradients if g is not None], expected, rtol=1e-5, atol=1e-5)
    need_dx, need_dweight, need_dbias = wanted
    if backward.impl == "rows":
        (arguments,) = launches["linear_act_bwd_rows_kernel"]
        given = tuple(arguments[name] is not None for name in ("dx_ptr", "dweight_ptr", "dbias_ptr"))
        assert given == wanted
        # A reduction of nothing is not launched.
        assert len(launches["sum_slots_kernel"]) == (backward.programs > 1 and (need_dweight or need_dbias))
    else:
        (arguments,) = launches["act_bwd_kernel"]
        assert (arguments["dbias_ptr"] is not None) is need_dbias
        assert len(launches["sum_slots_kernel"]) == (need_dbias and slots_of(backward, path_shape[2]) > 1)
        assert len(products) == need_dx + need_dweight


def test_no_backward_without_gradients(launches):
    x, weight, bias, _ = make_layer(*SHAPES["row"], torch.float32, DEVICE)
    with torch.no_grad():
        y = linear_act(x, weight.requires_grad_(), bias, impl="triton")
    assert not y.requires_grad
    torch.testing.assert_close(y, torch.sigmoid(F.linear(x, weight, bias)).detach())
    assert sum(map(len, launches.values())) == 1


def test_second_order_is_exact():
    # Under create_graph the gradients come from differentiable operations; 1-Lipschitz penalties depend on it.
    check_gradients(gradient_penalty, triton_layer, *make_layer(33, 7, 5, torch.float32, DEVICE))


@pytest.mark.core
@pytest.mark.parametrize("path", ["rows-three", "tiled-ragged"])
def test_what_is_not_finite_takes_torchs_way_through_relu(path, path_shape):
    x, weight, bias, dy = make_layer(*path_shape, torch.float32, DEVICE)
    bias[:3] = torch.tensor([-200.0, 200.0, torch.nan])  # dead, alive, NaN
    dy[::2, 0], dy[1::2, 0] = torch.inf, torch.nan
    actual, expected = run(x, weight, bias, dy, "relu"), torch_layer(x, weight, bias, dy, "relu")
    assert all(t.isfinite().all() for t in expected[1:])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 0)], ids=str)
def test_in_place_operations_on_the_output(leading):
    check_written(triton_layer, leading, DEVICE, torch.autograd.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=IDS.get)
def test_autocast(dtype):
    check_autocast(triton_layer, dtype, DEVICE)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_fp32_products_follow_torchs_setting(precision, launches, matmul):
    x, weight, bias, dy = make_layer(*SHAPES["wide"], torch.float32, DEVICE)
    exact = torch_layer(x, weight, bias, dy, "sigmoid", torch.float64)
    matmul.fp32_precision = precision
    actual, expected = run(x, weight, bias, dy), torch_layer(x, weight, bias, dy, "sigmoid")
    # It is a setting for GPUs; a CPU multiplies in fp32 whatever it says.
    used = precision if DEVICE == "cuda" else "ieee"
    (arguments,) = launches["linear_act_fwd_rows_kernel"] + launches["linear_act_fwd_tiled_kernel"]
    assert arguments["PRECISION"] == used
    assert_as_good_as_torch(actual, expected, exact, torch.float32, allowance=TF32 if used == "tf32" else 0.0)


@pytest.mark.core
@pytest.mark.parametrize("path", ["rows-three", "tiled-ragged"])
def test_tf32_operands_are_rounded_to_nearest(path):
    shape, *plans = PATHS[path]
    forward, backward = (dataclasses.replace(plan, precision="tf32") for plan in plans)
    x, weight, bias, dy = make_layer(*shape, torch.float32, DEVICE)
    y = layer.linear_act_fwd(x, weight, bias, "identity", forward)
    short = {name: round_tf32(t.contiguous()).double() for name, t in (("x", x), ("weight", weight), ("dy", dy))}
    assert relative_error(y, short["x"] @ short["weight"].t() + bias.double()) < FLOOR[torch.float32]
    assert 1e-4 < relative_error(y, x.double() @ weight.double().t() + bias.double()) < TF32
    if backward.impl == "rows":
        dx, dweight, dbias = layer.linear_act_bwd(dy, y, x, weight, "identity", (True, True, True), backward)
        assert relative_error(dx, short["dy"] @ short["weight"]) < FLOOR[torch.float32]
        assert relative_error(dweight, short["dy"].t() @ short["x"]) < FLOOR[torch.float32]
        assert relative_error(dbias, dy.double().sum(0)) < FLOOR[torch.float32]


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7FFFF000], ids=hex)
def test_tf32_keeps_nan_and_inf(bits, monkeypatch):
    let_integers_wrap(monkeypatch)
    x, weight, _, _ = make_layer(20, 16, 16, torch.float32, DEVICE)
    x.view(torch.int32)[0, 0] = bits
    x[1, 1], x[2, 2] = torch.inf, -torch.inf
    y = layer.linear_act_fwd(x, weight, None, "identity", rows(16, 16, 1, 32))
    plan = dataclasses.replace(rows(16, 16, 1, 32), precision="tf32")
    short = layer.linear_act_fwd(x, weight, None, "identity", plan)
    assert y[0].isnan().all()
    assert torch.equal(y.isnan(), short.isnan())
    assert torch.equal(y.isposinf(), short.isposinf())
    assert torch.equal(y.isneginf(), short.isneginf())


# --- choosing ---------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_torch_is_obeyed(launches):
    tensors = make_layer(*SHAPES["ragged"], torch.float32, DEVICE)
    check(*tensors, actual=run(*tensors, impl="torch"))
    assert not any(launches.values())


@pytest.mark.core
def test_kernels_are_the_default_on_gpus_alone(launches):
    run(*make_layer(*SHAPES["row"], torch.float32, DEVICE), impl=None)
    assert bool(launches["linear_act_fwd_rows_kernel"]) is (DEVICE == "cuda")


@pytest.mark.core
def test_triton_refuses_what_it_cannot_do():
    x, weight, bias, _ = make_layer(*SHAPES["row"], torch.float64, DEVICE)
    with pytest.raises(NotImplementedError, match=r"x is torch\.float64; the kernels take torch\.float32"):
        linear_act(x, weight, bias, impl="triton")


@pytest.mark.core
def test_triton_refuses_a_plan_without_kernels(force):
    plan = Plan("library", "the test says so")
    force(plan, plan)
    with pytest.raises(NotImplementedError, match=r'^impl="triton": the test says so$'):
        run(*make_layer(*SHAPES["row"], torch.float32, DEVICE))


# --- tracing ------------------------------------------------------------------------------------------------------


@pytest.mark.more
@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
def test_forward_op_is_registered_right(leading):
    x, weight, bias, _ = make_layer(6, 5, 3, torch.float32, DEVICE)
    for b in (bias, None):
        result = torch.library.opcheck(registered.linear_act, (x.view(*leading, 5), weight, b, "tanh", "triton"))
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (False, False, True)], ids=str)
def test_backward_op_is_registered_right(wanted):
    x, weight, bias, dy = make_layer(6, 5, 3, torch.float32, DEVICE)
    y = torch.tanh(F.linear(x, weight, bias))
    result = torch.library.opcheck(registered.linear_act_backward, (dy, y, x, weight, "tanh", wanted, "triton"))
    assert set(result.values()) == {"SUCCESS"}


# Dynamo itself makes such an instance.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_compiled(bias, launches):
    x, weight, b, dy = make_layer(*SHAPES["ragged"], torch.float32, DEVICE)
    tensors = (x, weight, b if bias else None, dy)
    eager = run(*tensors)
    for calls in launches.values():
        calls.clear()
    compiled = run(*tensors, layer=torch.compile(linear_act, fullgraph=True, backend="aot_eager"))
    assert same_bits(compiled, eager)
    assert launches["linear_act_fwd_rows_kernel"] + launches["linear_act_fwd_tiled_kernel"]
    assert launches["linear_act_bwd_rows_kernel"] + launches["act_bwd_kernel"]
