# SPDX-License-Identifier: Apache-2.0
"""Integers and bits, instruction by instruction, against Python's own numbers."""

import functools
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set, which compiles nothing", allow_module_level=True)

from . import assembly

pytestmark = [pytest.mark.emulated, pytest.mark.core]

EDGES = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFF, 0x00FF00FF]


def signed(x, bits=32):
    return x - (1 << bits) if x >> (bits - 1) else x


def toward_zero(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(a, position, length):
    position, length = position & 255, length & 255
    return (a >> position) & ((1 << length) - 1)


def permuted(a, b, selector):
    both = (b << 32 | a).to_bytes(8, "little")
    chosen = [(selector >> 4 * place) & 15 for place in range(4)]
    return int.from_bytes([both[c & 7] if c < 8 else 255 * (both[c & 7] >> 7) for c in chosen], "little")


def tabulated(table, a, b, c):
    return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))


# What %r2, %r3 and %r4 become in %r5.
CASES = {
    "mul.hi.u32 %r5, %r2, %r3;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %r5, %r2, %r3;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r5, %r2, %r3, %r4;": lambda a, b, c: a * b + c,
    "div.u32 %r5, %r2, %r4;": lambda a, b, c: a // c if c else 0xFFFFFFFF,
    "div.s32 %r5, %r2, %r4;": lambda a, b, c: toward_zero(signed(a), signed(c)) if c else -1,
    "rem.s32 %r5, %r2, %r4;": lambda a, b, c: signed(a) - toward_zero(signed(a), signed(c)) * signed(c) if c else a,
    "min.s32 %r5, %r2, %r3;": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %r5, %r2, %r3;": lambda a, b, c: max(a, b),
    "abs.s32 %r5, %r2;": lambda a, b, c: abs(signed(a)),
    "neg.s32 %r5, %r2;": lambda a, b, c: -a,
    "popc.b32 %r5, %r2;": lambda a, b, c: a.bit_count(),
    "clz.b32 %r5, %r2;": lambda a, b, c: 32 - a.bit_length(),
    "bfind.u32 %r5, %r2;": lambda a, b, c: a.bit_length() - 1,
    "brev.b32 %r5, %r2;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfe.u32 %r5, %r2, %r3, %r4;": lambda a, b, c: field(a, b, c),
    "bfe.s32 %r5, %r2, 3, 7;": lambda a, b, c: signed(field(a, 3, 7), 7),
    "bfi.b32 %r5, %r2, %r3, 5, 9;": lambda a, b, c: (b & ~(511 << 5)) | (a & 511) << 5,
    "shl.b32 %r5, %r2, %r3;": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 %r5, %r2, %r3;": lambda a, b, c: a >> b,
    "shr.s32 %r5, %r2, %r3;": lambda a, b, c: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 %r5, %r2, %r3, %r4;": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.wrap.b32 %r5, %r2, %r3, %r4;": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.l.clamp.b32 %r5, %r2, %r3, %r4;": lambda a, b, c: ((b << 32 | a) << min(c, 32)) >> 32,
    "shf.r.clamp.b32 %r5, %r2, %r3, %r4;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "lop3.b32 %r5, %r2, %r3, %r4, 0x96;": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 %r5, %r2, %r3, %r4, 0x1b;": lambda a, b, c: tabulated(0x1B, a, b, c),
    "prmt.b32 %r5, %r2, %r3, %r4;": permuted,
    "mov.b64 %rd5, {%r2, %r3}; clz.b64 %r5, %rd5;": lambda a, b, c: 64 - (b << 32 | a).bit_length(),
    "mov.b64 %rd5, {%r2, %r3}; mov.b64 %rd6, {%r3, %r4}; mul.hi.u64 %rd7, %rd5, %rd6; cvt.u32.u64 %r5, %rd7;": (
        lambda a, b, c: (b << 32 | a) * (c << 32 | b) >> 64
    ),
    "mov.b64 %rd5, {%r2, %r3}; mov.b64 %rd6, {%r3, %r4}; mul.hi.s64 %rd7, %rd5, %rd6; cvt.u32.u64 %r5, %rd7;": (
        lambda a, b, c: signed(b << 32 | a, 64) * signed(c << 32 | b, 64) >> 64
    ),
    "cvt.rna.tf32.f32 %r5, %r2;": lambda a, b, c: a if (a >> 23) & 255 == 255 else (a + 0x1000) & 0xFFFFE000,
}

LOAD = """
mad.wide.u32 %rd10, %r0, 12, %rd1;
ld.global.b32 %r2, [%rd10];
ld.global.b32 %r3, [%rd10+4];
ld.global.b32 %r4, [%rd10+8];
"""
STORE = """
mad.wide.u32 %rd11, %r0, 4, %rd2;
st.global.b32 [%rd11], %r5;
"""


def run(code, operands):
    given = torch.tensor([[signed(x) for x in row] for row in operands], dtype=torch.int32)
    out = torch.zeros(len(operands), dtype=torch.int32)
    launch = assembly.run(LOAD + code + STORE, given, out, threads=len(operands))
    assert not launch.faults
    return [x & 0xFFFFFFFF for x in out.tolist()]


def numbers(count):
    """Edges against edges, and random ones."""
    generator = torch.Generator().manual_seed(0)
    rows = [(a, b, EDGES[(i + j) % len(EDGES)]) for i, a in enumerate(EDGES) for j, b in enumerate(EDGES)]
    rows += torch.randint(0, 1 << 32, (count - len(rows), 3), generator=generator).tolist()
    return rows


@pytest.mark.parametrize("code", CASES)
def test_integers_and_bits(code):
    operands = numbers(256)
    expected = [CASES[code](*row) & 0xFFFFFFFF for row in operands]
    assert run(code, operands) == expected


# What pairs of fp32 become in the lower and in the upper half of a register, by their formulas.
PAIRS = {
    "fma.rn.f32x2 %rd8, %rd5, %rd6, %rd7;": lambda a, b, c: a * b + c,
    "add.rn.f32x2 %rd8, %rd5, %rd6;": lambda a, b, c: a + b,
    "mul.rn.f32x2 %rd8, %rd5, %rd6;": lambda a, b, c: a * b,
}


@pytest.mark.parametrize("code", PAIRS)
def test_pairs_of_fp32(code):
    operands = torch.randint(-1000, 1000, (64, 3), generator=torch.Generator().manual_seed(0)).float()
    a, b, c = operands.unbind(1)
    pairs = "mov.b64 %rd5, {%r2, %r3}; mov.b64 %rd6, {%r3, %r4}; mov.b64 %rd7, {%r4, %r2};"
    bits = [[x & 0xFFFFFFFF for x in row] for row in operands.view(torch.int32).tolist()]
    for half, expected in (("{%r5, %r6}", PAIRS[code](a, b, c)), ("{%r6, %r5}", PAIRS[code](b, c, a))):
        found = run(f"{pairs} {code} mov.b64 {half}, %rd8;", bits)
        assert torch.equal(torch.tensor([signed(x) for x in found], dtype=torch.int32).view(torch.float32), expected)


# What half-precision numbers in %rs1 and %rs2 and an fp32 one in %r4 become.
MIXED = {
    "add.rn.f32.{} %r5, %rs1, %r4;": lambda a, b, c: a + c,
    "sub.rn.f32.{} %r5, %rs1, %r4;": lambda a, b, c: a - c,
    "fma.rn.f32.{} %r5, %rs1, %rs2, %r4;": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("code", MIXED)
def test_mixed_precision(code, dtype):
    numbers = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    a, b = (numbers[:, column].to(dtype) for column in (0, 1))
    bits = [[x & 0xFFFFFFFF for x in own.tolist()] for own in (a.view(torch.int16), b.view(torch.int16))]
    bits.append([x & 0xFFFFFFFF for x in numbers[:, 2].contiguous().view(torch.int32).tolist()])
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    found = run(f"cvt.u16.u32 %rs1, %r2; cvt.u16.u32 %rs2, %r3; {code.format(name)}", [*zip(*bits, strict=True)])
    expected = MIXED[code](*(own.double() for own in (a, b, numbers[:, 2]))).float()
    assert torch.equal(torch.tensor([signed(x) for x in found], dtype=torch.int32).view(torch.float32), expected)


# What threads of a warp see of each other, from %r2 of each.
WARPS = {
    "redux.sync.add.s32 %r5, %r2, -1;": lambda mine, lane: sum(mine),
    "redux.sync.max.u32 %r5, %r2, -1;": lambda mine, lane: max(mine),
    "redux.sync.min.s32 %r5, %r2, -1;": lambda mine, lane: min(map(signed, mine)),
    "redux.sync.xor.b32 %r5, %r2, -1;": lambda mine, lane: functools.reduce(int.__xor__, mine),
    "setp.gt.s32 %p1, %r2, 0; vote.sync.ballot.b32 %r5, %p1, -1;": (
        lambda mine, lane: sum((signed(x) > 0) << i for i, x in enumerate(mine))
    ),
    "setp.gt.s32 %p1, %r2, 0; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r5, 1, 0, %p2;": (
        lambda mine, lane: any(signed(x) > 0 for x in mine)
    ),
    "setp.ne.b32 %p1, %r2, 7; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r5, 1, 0, %p2;": (
        lambda mine, lane: all(x != 7 for x in mine)
    ),
    "shfl.sync.up.b32 %r5, %r2, 3, 0, -1;": lambda mine, lane: mine[lane - 3 if lane >= 3 else lane],
    "shfl.sync.down.b32 %r5, %r2, 5, 31, -1;": lambda mine, lane: mine[lane + 5 if lane < 27 else lane],
    "shfl.sync.bfly.b32 %r5, %r2, 9, 31, -1;": lambda mine, lane: mine[lane ^ 9],
    "shfl.sync.idx.b32 %r5, %r2, 30, 31, -1;": lambda mine, lane: mine[30],
}


@pytest.mark.parametrize("code", WARPS)
def test_warps(code):
    operands = numbers(256)
    values = [row[0] for row in operands]
    expected = [WARPS[code](values[t // 32 * 32 :][:32], t % 32) & 0xFFFFFFFF for t in range(len(values))]
    assert run(code, operands) == expected
