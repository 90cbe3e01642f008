# SPDX-License-Identifier: Apache-2.0
"""Compile-only: every tile that a plan can pick, compiled ahead of time for its chip, with gates on the machine code.

No GPU and no driver is needed. `--cubins DIR` keeps the cubins; the resource table is printed with -rA or -s.
"""

import itertools
import os
import re

import pytest
import torch
from compiling import CHIPS, TILED_FOR, assert_fits, assert_sound, compile_for, compile_selected

pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process; run without it", allow_module_level=True)

import triton

from perceptriton.kernels import Plan, Tile, tables
from perceptriton.kernels import plan as planning
from perceptriton.kernels.gpu import aot, layer

pytestmark = pytest.mark.compiles

# The dtype and fp32 precision that stand for each kind of product.
KINDS = {"half": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "ieee": (torch.float32, "ieee")}
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def _forward(m, k, n, dtype, plan):
    return layer.linear_act_fwd, _empty(dtype, (m, k), (n, k), (n,)), ("tanh", plan)


def _backward(m, k, n, dtype, plan):
    tensors = _empty(dtype, (m, n), (m, n), (m, k), (n, k))
    return layer.linear_act_bwd, tensors, ("sigmoid", (True, True, True), plan)


def _empty(dtype, *shapes):
    return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)


def _cases():
    """(id, arch, op, kind, shape, plan): every tile of the tables, through the plan of a shape that picks it."""
    ops = {"linear_act_fwd": planning.linear_act_fwd, "linear_act_bwd": planning.linear_act_bwd}
    for arch, (op, plan_for), kind in itertools.product(TILED_FOR, ops.items(), KINDS):
        dtype, precision = KINDS[kind]
        for layout in ("aligned", "ragged"):
            for row in tables.tile_rows("gpu_tiles.json", f"sm_{arch}", op, kind, layout):
                k, n = row.widths
                shape = (65536, k, n) if layout == "aligned" else (65531, k - 3, n - 1)
                plan = plan_for(*shape, NAMES[dtype], precision, CHIPS[arch])
                if plan.impl == "rows":
                    yield f"sm_{arch}-{op}-{kind}-{k}x{n}-{layout}", arch, op, kind, shape, plan
        if op == "linear_act_fwd":
            # Row counts from many to few reach every entry of the list of output tiles.
            for m in (16384, 2048, 256):
                shape = (m, 4096, 4096 if m > 256 else 128)
                # Of operands that TMA cannot read, which the pointer kernel takes.
                plan = planning.linear_act_fwd(*shape, NAMES[dtype], precision, CHIPS[arch], "triton", None, False)
                yield f"sm_{arch}-{op}-{kind}-tiled-{m}", arch, op, kind, shape, plan
        elif kind != "tf32":
            for layout, shape in (("passes", (4096, 1024, 1024)), ("passes-ragged", (4091, 1021, 1023))):
                plan = planning.linear_act_bwd(*shape, NAMES[dtype], precision, CHIPS[arch])
                yield f"sm_{arch}-{op}-{kind}-{layout}", arch, op, kind, shape, plan


CASES = {case[0]: case[1:] for case in _cases()}
# Chips with the tiles of another.
OTHERS = {
    f"sm_{arch}-{op}-{kind}": (arch, *CASES[f"{tiled_for}-{op}-{kind}-32x32-aligned"][1:])
    for arch, tiled_for in ((89, "sm_86"), (100, "sm_90"))
    for op in ("linear_act_fwd", "linear_act_bwd")
    for kind in KINDS
}


def _launches(case):
    """Every launch of a case, with the chip that it is compiled for."""
    arch, op, kind, shape, plan = case
    launcher, tensors, rest = (_forward if op == "linear_act_fwd" else _backward)(*shape, KINDS[kind][0], plan)
    return [(arch, launch) for launch in aot.launches(launcher, *tensors, *rest)]


@pytest.fixture(scope="session")
def compiled(request):
    return compile_selected(request, CASES | OTHERS, _launches)


@pytest.mark.parametrize("name", CASES | OTHERS)
def test_no_spills_and_fits(name, compiled):
    arch, *_ = (CASES | OTHERS)[name]
    for resources in compiled[name]:
        assert_sound(resources)
        assert_fits(resources, arch)


@pytest.mark.parametrize("name", [name for name in CASES if "passes" not in name])
def test_products_use_the_right_units(name, compiled):
    _, _, kind, _, _ = CASES[name]
    resources = compiled[name][0]
    if kind == "ieee":
        # fp32 that went through tensor cores would be TF32 in disguise.
        assert resources.products == 0
        assert resources.opcodes["FFMA"] >= 16
    else:
        assert resources.products > 0


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if c[0] == 90 and c[2] == "half" and c[4].impl == "tiled"]
)
def test_large_16_bit_tiles_use_wgmma(name, compiled):
    assert compiled[name][0].opcodes["HGMMA"] > 0


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c[1] == "linear_act_fwd" and c[2] == "half"])
def test_special_function_units_per_output(name, compiled):
    plan = CASES[name][4]
    elements_per_thread = plan.tile.block_m * plan.tile.block_n / (32 * plan.tile.num_warps)
    # exp2 and one division or rsqrt for each output; the pipeliner may copy the loop body once.
    assert compiled[name][0].opcodes["MUFU"] <= 2 * 2 * max(elements_per_thread, 1) + 8


@pytest.mark.parametrize("name", [f"{op}-{kind}" for op in ("linear_act_fwd", "linear_act_bwd") for kind in KINDS])
def test_one_code_for_ampere_and_ada(name):
    """What triton makes for 8.6 and 8.9, and for 8.0 up to 3.7, differs in its head alone: one is emulated for all."""
    archs = (86, 89, 80) if triton.__version__ in tables.read_table("gpu_tiles.json")["triton"] else (86, 89)
    for _, launch in _launches(CASES[f"sm_86-{name}-32x32-aligned"]):
        # Behind the code come the names of source files.
        texts = [aot.compiled(arch, launch).asm["ptx"].partition("\t.file\t")[0] for arch in archs]
        assert all(f".target sm_{arch}\n" in text for arch, text in zip(archs, texts, strict=True))
        assert len({re.sub(r"(?m)^\.(version|target) .*$", "", text) for text in texts}) == 1


def test_a_spilling_tile_is_seen():
    # Negative control: 128 rows of a 64x64 backward in 4 warps cannot keep its sums in sm_80's registers.
    plan = Plan("rows", "", Tile(128, 64, 64, 4, 2), programs=2)
    launcher, tensors, rest = _backward(4096, 64, 64, torch.bfloat16, plan)
    resources = compile_for(80, aot.launches(launcher, *tensors, *rest)[0])
    assert resources.stack > 0
    assert resources.opcodes["STL"] > 0
