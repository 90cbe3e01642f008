# SPDX-License-Identifier: Apache-2.0
"""What the emulator computes is right: compiled kernels against fp64."""

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set, which compiles nothing", allow_module_level=True)

import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime import driver as active
from triton.tools.tensor_descriptor import TensorDescriptor

from . import driver, kernels, wgmma

pytestmark = pytest.mark.emulated

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def error(actual, exact):
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def assert_close(actual, exact, bound):
    assert actual.shape == exact.shape
    assert error(actual, exact) <= bound


def instructions_of(launch):
    """The names of all instructions, with their modifiers."""
    blocks = launch.program.entry.blocks
    return [own.op for block in blocks for own in [*block.instructions, *([block.end] if block.end else [])]]


def takes(launch, *heads):
    return all(any(op.startswith(head) for op in instructions_of(launch)) for head in heads)


def test_the_driver_goes_as_it_has_come():
    own = [(CUDABackend, "make_cubin"), (CUDABackend, "hash"), (CompiledKernel, "_init_handles"), (active, "_active")]
    before = [vars(owner)[name] for owner, name in own]
    with driver.activated(80), driver.activated(90):
        assert not any(vars(owner)[name] is old for (owner, name), old in zip(own, before, strict=True))
    assert [vars(owner)[name] for owner, name in own] == before


# --- products --------------------------------------------------------------------------------------------------------

# 10 mantissa bits round operands of tf32 to 2^-11, which is 3e-4 of a product; triton cuts them here, which is 8e-4.
BOUNDS = {"ieee": 1e-6, "tf32": 1e-3, "tf32x3": 1e-6, "bf16x6": 1e-6, "bf16x3": 1e-4}
MMA, WGMMA, FMA = "mma.sync", "wgmma.mma_async", "fma.rn.f32"
# dtype, precision, tile, warps, stages, operands that lie transposed, and what multiplies on sm_90: mma.sync does where
# a warpgroup is too much, and on sm_80.
PRODUCTS = {
    "bf16-one-tile": (BF16, "ieee", (64, 64, 16), 4, 1, "NN", WGMMA),
    "bf16-pipelined": (BF16, "ieee", (128, 64, 64), 4, 3, "NT", WGMMA),
    "bf16-both-transposed": (BF16, "ieee", (64, 32, 64), 4, 2, "TT", WGMMA),
    "bf16-narrow-rows": (BF16, "ieee", (64, 16, 32), 4, 3, "NN", WGMMA),
    "fp16-eight-warps": (FP16, "ieee", (64, 128, 32), 8, 2, "TN", WGMMA),
    "fp16-one-warp": (FP16, "ieee", (16, 16, 16), 1, 1, "NN", MMA),
    "fp16-deep-pipeline": (FP16, "ieee", (32, 32, 32), 2, 4, "NT", MMA),
    "tf32-pipelined": (FP32, "tf32", (64, 64, 32), 4, 3, "NT", WGMMA),
    "tf32-short-rows": (FP32, "tf32", (64, 64, 16), 4, 1, "NT", WGMMA),
    "tf32-transposed": (FP32, "tf32", (32, 64, 16), 4, 2, "TN", MMA),
    "fp32-no-tensor-cores": (FP32, "ieee", (32, 32, 16), 4, 2, "TT", FMA),
    "tf32x3": (FP32, "tf32x3", (64, 64, 32), 4, 1, "NN", WGMMA),
    "bf16x6": (FP32, "bf16x6", (64, 64, 32), 4, 2, "NN", WGMMA),
    "bf16x3": (FP32, "bf16x3", (64, 32, 32), 4, 2, "TN", WGMMA),
}


def multiply(a, b, precision, tile, warps, stages, order="NN"):
    m, k, n = *a.shape, b.shape[1]
    x, y = (t.t().contiguous().t() if own == "T" else t for t, own in zip((a, b), order, strict=True))
    c = torch.empty(m, n)
    kernels.matmul_kernel[triton.cdiv(m, tile[0]), triton.cdiv(n, tile[1])](
        *(x, y, c, m, n, k, *x.stride(), *y.stride(), precision, *tile, stages), num_warps=warps
    )
    return c


@pytest.mark.parametrize("own", PRODUCTS.values(), ids=PRODUCTS)
def test_products(chip, launched, own):
    dtype, precision, tile, warps, stages, order, multiplies = own
    # Copies of cp.async need rows of 16 bytes in memory; where nothing is copied so, sizes are ragged.
    m, n, k = (80, 96, 112) if stages > 1 else (70, 90, 101)
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    c = multiply(a, b, precision, tile, warps, stages, order)
    assert_close(c, a.double() @ b.double(), BOUNDS[precision])
    assert takes(launched[-1], MMA if (chip, multiplies) == (80, WGMMA) else multiplies)
    assert takes(launched[-1], "cp.async.c") == (stages > 1)


def test_wgmma_finds_matrices_in_every_swizzle(hopper, launched, monkeypatch):
    rows, swizzled = set(), wgmma.swizzled
    monkeypatch.setattr(wgmma, "swizzled", lambda at, row: (rows.add(row), swizzled(at, row))[1])
    for block_k, row in ((16, 32), (32, 64), (64, 128)):
        a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
        rows.clear()
        c = multiply(a, b, "ieee", (64, 64, block_k), 4, 2, "NT")
        assert rows == {row}
        assert_close(c, a.double() @ b.double(), 1e-6)


@pytest.mark.parametrize("order", ["left", "transposed", "right"])
@pytest.mark.parametrize(("dtype", "sizes", "warps"), [(BF16, (64, 32, 128), 4), (FP16, (128, 64, 64), 8)])
def test_a_product_of_a_product(chip, launched, dtype, sizes, warps, order):
    t, r, n = sizes
    a, b, c = (torch.randn(*size).to(dtype) for size in ((t, r), (r, t), (t, n)))
    out = torch.empty(t, n)
    kernels.chained_kernel[1,](a, b, c, out, t, r, n, order, num_warps=warps)
    h = (a.double() @ b.double()).to(dtype).double()
    # The first product is rounded from fp32 here, from fp64 there, and a tie may fall to either side.
    assert_close(out, (h if order == "left" else h.t()) @ c.double(), 1e-4)
    if chip == 90:
        in_registers = [own for own in wgmma_of(launched[-1]) if isinstance(own.operands[1], list)]
        assert bool(in_registers) == (order != "right")


def wgmma_of(launch):
    blocks = launch.program.entry.blocks
    return [own for block in blocks for own in block.instructions if own.op.startswith("wgmma.mma_async")]


TMA = {
    "rows-of-128": (BF16, (128, 64, 64), 4, 3),
    "rows-of-64": (FP16, (64, 32, 32), 4, 2),
    "rows-of-32": (BF16, (64, 64, 16), 8, 3),
    "fp32": (FP32, (64, 64, 32), 4, 1),
}


@pytest.mark.parametrize(("dtype", "tile", "warps", "stages"), TMA.values(), ids=TMA)
def test_tiles_that_travel_by_tma(hopper, launched, dtype, tile, warps, stages):
    m, n, k = 150, 88, 104  # the last tile of each is cut
    block_m, block_n, block_k = tile
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.full((m, n), torch.nan).to(dtype)
    blocks = (a, [block_m, block_k]), (b, [block_n, block_k]), (c, [block_m, block_n])
    kernels.tma_matmul_kernel[triton.cdiv(m, block_m), triton.cdiv(n, block_n)](
        *(TensorDescriptor.from_tensor(*own) for own in blocks), k, *tile, stages, num_warps=warps
    )
    assert_close(c, a.double() @ b.double().t(), {BF16: 2e-3, FP16: 3e-4, FP32: 1e-3}[dtype])
    assert takes(launched[-1], "cp.async.bulk.tensor.2d.shared", "cp.async.bulk.tensor.2d.global", "mbarrier.try_wait")


# --- everything else -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "dtype", "bound"), [(1000, FP32, 1e-6), (33, BF16, 3e-3)])
def test_softmax(chip, size, dtype, bound):
    x = torch.randn(5, size).to(dtype)
    y = torch.empty_like(x)
    kernels.softmax_kernel[5,](x, y, size, triton.next_power_of_2(size), num_warps=4)
    assert_close(y, torch.softmax(x.double(), 1), bound)


@pytest.mark.parametrize(("m", "n", "warps"), [(16, 64, 4), (64, 32, 2), (128, 128, 8), (1, 256, 4), (32, 1, 1)])
def test_layouts(chip, m, n, warps):
    x = torch.randn(m, n)
    actual = SimpleNamespace(
        transposed=torch.empty(n, m),
        columns=torch.empty(n),
        rows=torch.empty(m),
        largest=torch.empty(n),
        where=torch.empty(m, dtype=torch.int32),
        running=torch.empty(m, n),
    )
    kernels.layouts_kernel[1,](x, *vars(actual).values(), m, n, num_warps=warps)
    assert torch.equal(actual.transposed, x.t())
    assert torch.equal(actual.largest, x.amax(0))
    assert torch.equal(actual.where, x.argmax(1).int())
    assert_close(actual.columns, x.double().sum(0), 1e-6)
    assert_close(actual.rows, x.double().sum(1), 1e-6)
    assert_close(actual.running, x.double().cumsum(1), 1e-6)


def test_integers(chip):
    a = torch.randint(-(2**31), 2**31, (256,), dtype=torch.int32)
    b = torch.randint(1, 99, (256,), dtype=torch.int32) * (1 - 2 * (torch.arange(256) % 2)).int()
    x = torch.randn(256) * 1e4
    a[:3], b[:3] = torch.tensor([-7, 7, -(2**31)]), torch.tensor([2, -2, 3])
    x[:5] = torch.tensor([3e9, -3e9, 0.99, -0.99, 2.0**31])
    out = torch.empty(10, 256, dtype=torch.int32)
    kernels.integers_kernel[1,](a, b, x, out, 256)
    wide, unsigned = a.long() * b.long(), a.long() % 2**32
    exact = {
        "//": torch.div(a, b, rounding_mode="trunc"),
        "%": torch.fmod(a, b),
        "shifts": (a << 3) ^ (a >> 2),
        "min, max": torch.minimum(a, b) * torch.maximum(a, b),
        "saturated": x.double().trunc().clamp(-(2**31), 2**31 - 1).int(),
        "64 bits": (wide >> 5).int(),
        "int8": a.to(torch.int8).int(),
        "umulhi": torch.tensor([int(p) * (int(q) % 2**32) >> 32 for p, q in zip(unsigned, b, strict=True)]).int(),
        "unsigned shift": (unsigned >> 3).int(),
        "to fp32": a.float().view(torch.int32),
    }
    assert [name for name, own in zip(exact, out, strict=True) if not torch.equal(own, exact[name])] == []


@pytest.mark.parametrize(("dtype", "bound"), [(FP32, 1e-6), (BF16, 4e-3), (FP16, 5e-4)])
def test_elementwise(chip, dtype, bound):
    a, b = torch.randn(1024).to(dtype), torch.randn(1024).to(dtype)
    out = torch.empty(7, 1024, dtype=dtype)
    kernels.elementwise_kernel[2,](a, b, out, 512)
    x, y = a.double(), b.double()
    exact = {
        "+": x + y,
        "*": x * y,
        "/": x / y,
        "exp, log": torch.where(x > y, x.exp(), (y.abs() + 1).log()),
        "sqrt, rsqrt": x.abs().sqrt() + (y.abs() + 1).rsqrt(),
        "max, min": (x - y).abs(),
        "clamp": x.clamp(-0.5, 0.5),
    }
    assert {name: e for name, own in zip(exact, out, strict=True) if (e := error(own, exact[name])) > bound} == {}


def test_programs_of_different_lengths(chip):
    rounds = torch.tensor([3, 0, 7, 1], dtype=torch.int32)
    out = torch.empty(4, dtype=torch.int32)
    kernels.rounds_kernel[4,](out, rounds, 256, num_warps=4)
    assert out.tolist() == [256 * 255 // 2 * (r * (r - 1) // 2) for r in rounds.tolist()]


@pytest.mark.parametrize(("steps", "period"), [(10, 4), (3, 2), (5, 7)])
def test_the_emulator_sees_a_miscompiled_loop(chip, steps, period):
    """Up to 3.7, triton drops what a loop hands to its next turn if that only bounds a nested loop.

    Its interpreter compiles nothing, and is right.
    """
    out = torch.zeros(2, dtype=torch.int32)
    kernels.carried_bounds_kernel[1,](out, steps, period, num_warps=1)
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    right = out.tolist() == [steps, steps * (steps - 1) // 2]
    assert right == (version >= (3, 8) or steps <= period)
