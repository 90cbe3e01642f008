# SPDX-License-Identifier: Apache-2.0
"""tilelens (triton-viz until its version 3.0) over every kernel: no stray access, no race; planted ones are found.

A second opinion on tests/watching.py, by a solver instead of by addresses. `make sanitize` runs it: tilelens is no part
of the development environment, for the packages that its drawings need.
"""

import itertools

import cases
import pytest
import torch

if cases.kernel_device() != "cpu":
    pytest.skip("needs TRITON_INTERPRET=1; on a GPU compute-sanitizer does this", allow_module_level=True)
pytest.importorskip("tilelens", reason="needs tilelens, which `make sanitize` installs beside the environment")

import lens
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from perceptriton.kernels.gpu import layer as layers
from perceptriton.kernels.gpu import network as networks
from perceptriton.kernels.gpu import train, wide
from perceptriton.kernels.records import MlpPlan, MlpSegment, MlpTile, Plan, Tile, TrainConfig, TrainPlan, WideTile

pytestmark = pytest.mark.tilelens
MODULES = (layers, networks, train, wide)
KERNELS = {
    name: kernel
    for module in MODULES
    for name, kernel in vars(module).items()
    if isinstance(kernel, InterpretedFunction) and name.endswith("_kernel")
}


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that have been launched, each of them followed."""
    names = set()
    for module in MODULES:
        for name in vars(module).keys() & KERNELS.keys():
            monkeypatch.setattr(module, name, lens.Followed(KERNELS[name], names))
    return names


# --- every kernel -----------------------------------------------------------------------------------------------------


def layer(impl, tile, programs, backward):
    m, k, n = 37, 10, 20
    # Nothing is contiguous: addresses between the elements are stray ones too.
    x, dy = (cases.every_other(torch.randn(m, size)) for size in (k, n))
    weight, bias = cases.transposed(torch.randn(n, k)), cases.every_other(torch.randn(n))
    y = layers.linear_act_fwd(x, weight, bias, "sigmoid", Plan(impl, "", tile, programs))
    layers.linear_act_bwd(dy, y, x, weight, "sigmoid", (True, True, True), backward)


def rows():
    layer("rows", Tile(16, 32, 16, 4, 1), 2, Plan("rows", "", Tile(16, 32, 16, 4, 1), 2))


def tiled():
    layer("tiled", Tile(16, 16, 16, 4, 1), 6, Plan("passes", "", Tile(16, 16, 0, 4, 1), 4))


def network():
    widths, m = (3, 17, 16, 2), 37
    weights = tuple(torch.randn(n, k) for k, n in itertools.pairwise(widths))
    biases = tuple(torch.randn(n) for n in widths[1:])
    segments = (MlpSegment(0, 2, MlpTile(16, 4, 1, True), 2), MlpSegment(2, 3, MlpTile(16, 4, 1, False), 2))
    plan = MlpPlan("fused", "", segments)
    x, target = cases.every_other(torch.randn(m, 3)), torch.rand(m, 2)
    wanted = (True, (True,) * 3, (True,) * 3)
    y, saved = networks.mlp_fwd(x, weights, biases, "tanh", "sigmoid", plan, plan.boundaries)
    networks.mlp_bwd(torch.randn_like(y), x, saved, weights, biases, "tanh", "sigmoid", wanted, plan)
    head = (target, torch.rand(2), "mean")
    parameters = (weights, biases, "tanh", "identity")
    loss, saved = networks.mlp_fwd(x, *parameters, plan, plan.boundaries, (*head, torch.float32))
    networks.mlp_bwd(torch.ones_like(loss), x, saved, *parameters, wanted, plan, head)


def loop(plan):
    """Three members, two batches in an order of their own, momentum, and a loss of every step."""
    widths, members, samples = (2, 3, 1), 3, 5
    shapes = [(members, *s) for k, n in itertools.pairwise(widths) for s in ((n, k), (n,))]
    parameters, first = (tuple(torch.randn(s) for s in shapes) for _ in range(2))
    x, y = torch.randn(members, samples, 2), torch.rand(members, samples, 1)
    config = TrainConfig(widths, momentum=0.9)
    run = train.KernelLoop(config, parameters, first, (), torch.rand(members), x, y, 3, 1, plan)
    run.run(torch.randperm(samples).int()[None], 0, 2, 1, torch.empty(2, members))


def lane():
    loop(TrainPlan("lane", "", rows=2, networks=2, num_warps=1))


def block():
    loop(TrainPlan("block", "", rows=16, num_warps=4))


def tma():
    tile = WideTile(32, 32, 32, 4, 3, group_m=2, subtiles=2)
    x, weight, h = (torch.randn(*shape, dtype=torch.float16) for shape in ((40, 72), (48, 72), (40, 72)))
    wide.linear_act_fwd(x, weight, torch.randn(48, dtype=torch.float16), "sigmoid", Plan("tma", "", tile, 3))
    split = Plan("tma", "", tile, 3, splits=2)
    y = wide.linear_act_fwd(x, weight, torch.randn(48, dtype=torch.float16), "sigmoid", split)
    wide.linear_act_dgrad(y, weight, h, "sigmoid", True, Plan("tma", "", tile, 3))
    wide.linear_act_wgrad(y.float(), h.float(), Plan("tma", "", tile, 3, "tf32x3"))


LAUNCHES = {
    rows: {"linear_act_fwd_rows_kernel", "linear_act_bwd_rows_kernel", "sum_slots_kernel"},
    tiled: {"linear_act_fwd_tiled_kernel", "act_bwd_kernel", "sum_slots_kernel"},
    network: {"mlp_fwd_kernel", "mlp_bwd_kernel", "sum_losses_kernel", "sum_slots_kernel"},
    lane: {"train_lane_kernel"},
    block: {"train_block_kernel"},
    tma: {"linear_act_fwd_tma_kernel", "sum_splits_kernel", "linear_act_dgrad_tma_kernel", "sum_slots_kernel"},
}


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.__name__)
def test_kernels(launch, launched):
    launch()
    assert launched == LAUNCHES[launch]


# tilelens follows no atomic. tests/ptx sees every address of the compiled kernel.
NOT_FOLLOWED = {"train_spread_kernel"}


def test_every_kernel_is_among_them():
    assert set.union(*LAUNCHES.values()) | NOT_FOLLOWED == set(KERNELS)


# --- what is planted --------------------------------------------------------------------------------------------------


@triton.jit
def square_kernel(x_ptr, y_ptr, M, N, stride, LIMIT_X: tl.constexpr, LIMIT_Y: tl.constexpr, BLOCK: tl.constexpr):
    offs_m = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    offs_n = tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + (offs_m * N + offs_n) * stride, mask=(offs_m < M) & (offs_n < LIMIT_X), other=0.0)
    tl.store(y_ptr + offs_m * N + offs_n, x, mask=(offs_m < M) & (offs_n < LIMIT_Y))


@triton.jit
def moving_kernel(x_ptr, y_ptr, size, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    x_ptrs = x_ptr + offs
    for start in range(0, size, BLOCK):
        total += tl.load(x_ptrs, mask=offs < LIMIT - start, other=0.0)
        x_ptrs += BLOCK
    tl.store(y_ptr + tl.program_id(0) * BLOCK + offs, total)


@triton.jit
def neighbour_kernel(x_ptr, y_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def block_kernel(x_desc, y_desc, STEP: tl.constexpr):
    y_desc.store([tl.program_id(0) * STEP, 0], x_desc.load([tl.program_id(0) * STEP, 0]))


def square(x, limit_x, limit_y):
    x_stride = x.stride(1)
    return square_kernel, (2,), (x, torch.empty(20, 10), 20, 10, x_stride, limit_x, limit_y, 16)


def moving(limit):
    return moving_kernel, (1,), (torch.randn(40), torch.empty(16), 40, limit, 16)


def neighbour(step, same=False):
    x, y = torch.randn(48), torch.empty(48)
    return neighbour_kernel, (2,), (y if same else x, y, step, 16)


def blocks(step, y_rows=24, described=None):
    x, y = torch.randn(24, 16), torch.empty(y_rows, 16)
    described = TensorDescriptor(y, [described or y_rows, 16], [16, 1], [16, 16])
    return block_kernel, (2,), (TensorDescriptor.from_tensor(x, [16, 16]), described, step)


RIGHT = {
    "square": square(torch.randn(20, 10), 10, 10),
    "strided": square(cases.every_other(torch.randn(20, 10)), 10, 10),
    "moving": moving(40),
    "neighbours": neighbour(16),
    "neighbours-in-place": neighbour(16, same=True),
    "blocks": blocks(16),
}
WRONG = {
    # Rows and columns of a square tile are not the same number.
    "loads-past-a-row": (square(torch.randn(20, 10), 16, 10), "loads outside of x_ptr"),
    "stores-past-a-row": (square(torch.randn(20, 10), 10, 16), "stores outside of y_ptr"),
    "loads-at-the-last-turn": (moving(41), "loads outside of x_ptr"),
    "two-programs-store": (neighbour(15), "writes and writes of y_ptr race"),
    "one-stores-one-loads": (neighbour(15, same=True), "reads and writes of x_ptr race"),
    "blocks-that-overlap": (blocks(8), "writes and writes of y_desc race"),
    "a-block-past-the-end": (blocks(16, y_rows=20, described=24), "stores outside of y_desc"),
}


@pytest.mark.parametrize("launch", RIGHT.values(), ids=RIGHT)
def test_what_is_right_passes(launch):
    kernel, grid, arguments = launch
    lens.follow(kernel, grid, *arguments)


@pytest.mark.parametrize(("launch", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found(launch, message):
    kernel, grid, arguments = launch
    with pytest.raises(AssertionError, match=f"{kernel.__name__}: (.*, )?{message}"):
        lens.follow(kernel, grid, *arguments)
