"""The plans: pure functions of shapes, checked without a device."""

import itertools

import pytest

from perceptriton.kernels import Device
from perceptriton.kernels import plan as planning

H100 = Device("cuda", 90, 132, triton=True)
A100 = Device("cuda", 80, 108, triton=True)
CPU = Device("cpu", vendor="AMD")
SIZES = (1, 2, 3, 16, 17, 31, 64, 65, 128, 129, 256, 1000)


@pytest.mark.parametrize("device", [H100, A100], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "ieee"), ("float32", "ieee"), ("float32", "tf32")])
def test_tiles_cover_their_shapes(device, dtype, precision):
    for m, k, n in itertools.product((1, 63, 10_000, 1 << 20), SIZES, SIZES):
        forward = planning.linear_act_fwd(m, k, n, dtype, precision, device, "triton")
        backward = planning.linear_act_bwd(m, k, n, dtype, precision, device, "triton")
        for plan in (forward, backward):
            if plan.impl == "rows":
                assert k <= plan.tile.block_k < 2 * max(k, 9)
                assert n <= plan.tile.block_n < 2 * max(n, 9)
                assert 1 <= plan.programs <= max(device.units * 32, 1)
                assert plan.programs <= -(-m // plan.tile.block_m)
        assert forward.impl in ("rows", "tiled", "tma")
        assert backward.impl in ("rows", "passes")
        if forward.impl != "rows":
            tile = forward.tile
            tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
            assert forward.programs == (tiles if forward.impl == "tiled" else min(tiles, device.units))


@pytest.mark.parametrize(
    ("shape", "dtype", "forward", "backward"),
    [
        ((4, 2, 2), "float32", "rows", "rows"),  # launch-bound: one launch each way
        ((1 << 20, 64, 64), "bfloat16", "rows", "rows"),  # memory-bound
        ((1 << 20, 64, 64), "float32", "rows", "rows"),
        ((16384, 256, 256), "bfloat16", "tiled", "passes"),
        ((4096, 1024, 1024), "bfloat16", "library", "passes"),  # compute-bound: the library's product
        ((4096, 1024, 1024), "float32", "library", "passes"),
        ((0, 4, 4), "float32", "aten", "aten"),
        ((4, 4, 4), "float64", "aten", "aten"),
    ],
)
def test_regimes(shape, dtype, forward, backward):
    assert planning.linear_act_fwd(*shape, dtype, "ieee", H100).impl == forward
    assert planning.linear_act_bwd(*shape, dtype, "ieee", H100).impl == backward


def test_few_row_tiles_need_one_launch():
    assert planning.linear_act_bwd(64, 16, 16, "float32", "ieee", H100).programs == 1
    assert planning.linear_act_bwd(1 << 20, 16, 16, "float32", "ieee", H100).programs > 1


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (Device("cuda", 75, 40, triton=True), "compute capability 7.5"),
        (Device("cuda", 90, 132, triton=False), "triton is not installed"),
        (Device("mps"), "no kernels for mps devices"),
    ],
)
def test_unsupported_devices_say_why(device, reason):
    for plan_for in (planning.linear_act_fwd, planning.linear_act_bwd):
        plan = plan_for(64, 64, 64, "float32", "ieee", device)
        assert plan.impl == "aten"
        assert reason in plan.reason


def test_cpu_regimes():
    small = planning.cpu_small("float32", "AMD")
    assert planning.linear_act_fwd(4, 2, 2, "float32", "ieee", CPU).impl == "aten"
    wide = planning.linear_act_fwd(1024, 1024, 1024, "float32", "ieee", CPU)
    assert small < 1024**3
    assert (wide.impl, wide.forward_gemm) == ("explicit", "onednn")
    # A CPU that nobody measured keeps torch's own products.
    unknown = planning.linear_act_bwd(1024, 1024, 1024, "float32", "ieee", Device("cpu", vendor="Unheard-of"))
    assert (unknown.forward_gemm, unknown.dx_gemm, unknown.dweight_gemm) == ("mm", "mm", "mm")
    # A gradient of 16 MB is made in pieces, one of 1 MB is not.
    assert planning.linear_act_bwd(65536, 64, 64, "float32", "ieee", CPU).chunk > 0
    assert planning.linear_act_bwd(4096, 64, 64, "float32", "ieee", CPU).chunk == 0


def test_every_plan_gives_a_reason():
    for device, shape in itertools.product((H100, A100, CPU), ((4, 2, 2), (65536, 64, 64), (1024, 1024, 1024))):
        assert planning.linear_act_fwd(*shape, "float32", "ieee", device).reason
        assert planning.linear_act_bwd(*shape, "float32", "ieee", device).reason


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tile_table_is_well_formed(arch):
    for op, kinds in planning._table("gpu_tiles.json")["tiles"][arch].items():
        assert op in ("linear_act_fwd", "linear_act_bwd")
        for (kind, layouts), layout in itertools.product(kinds.items(), ("aligned", "ragged")):
            assert kind in ("half", "tf32", "ieee")
            assert layouts[layout]
            for size, (block_m, num_warps, num_stages, per_sm) in layouts[layout].items():
                assert all(int(width) in (16, 32, 64, 128, 256) for width in size.split("x"))
                assert block_m in (16, 32, 64, 128)
                assert num_warps in (4, 8)
                assert num_stages in (1, 2, 3)
                assert 1 <= per_sm <= 32
