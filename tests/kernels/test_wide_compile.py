# SPDX-License-Identifier: Apache-2.0
"""Compile-only: every tile of the TMA product that `kernels/tuned/wide.json` ships, compiled for its chip.

No GPU and no driver is needed. `--cubins DIR` keeps the cubins; the resource table is printed with -rA or -s.
"""

import dataclasses
import os

import pytest
import torch
from compiling import assert_fits, assert_sound, compile_for, compile_selected, launch_signature

pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process; run without it", allow_module_level=True)

from perceptriton.kernels import Plan, records, tables
from perceptriton.kernels import plan as planning
from perceptriton.kernels.gpu import aot, wide
from perceptriton.kernels.records import WideTile

pytestmark = pytest.mark.compiles

SHAPE = (8192, 4096, 4096)
PRODUCTS = ("half", "tf32", *records.SPLITS)
KINDS = (*PRODUCTS, *(f"dgrad-{product}" for product in PRODUCTS), *(f"wgrad-{product}" for product in records.SPLITS))
# Products of tensor cores for each product, and the depth of one instruction.
DOTS = {"half": (1, 16), "tf32": (1, 8), "tf32x3": (3, 8), "bf16x6": (6, 16), "bf16x3": (3, 16)}

# id: (arch, kind, tile, dtype of 16-bit products, splits)
CASES = {
    f"sm_{arch}-{kind}-{'-'.join(map(str, tables.wide_row(tile)))}{'-split' * (splits > 1)}": (
        *(arch, kind, tile, torch.bfloat16),
        splits,
    )
    for arch in (90, 100)
    for kind in KINDS
    for tile in planning.wide_candidates(kind, arch)
    for splits in ((1,) if kind.startswith("dgrad") or planning.wide_splits(1, 1 << 20, 1, tile, 132) == 1 else (1, 2))
}
# fp16 differs from bf16 in the conversions of the epilogue alone.
FIRST = next(iter(planning.wide_candidates("half", 90)))
CASES["sm_90-half-fp16"] = (90, "half", FIRST, torch.float16, 1)


def _launch(kind, tile, dtype=torch.bfloat16, splits=1, shape=SHAPE, activation="sigmoid"):
    (m, k, n), (of, product) = shape, kind.rpartition("-")[::2]
    dtype = dtype if product == "half" else torch.float32
    plan = Plan("tma", "", tile, 132, "ieee" if product == "half" else product, splits=splits)
    if of == "dgrad":
        tensors = [torch.empty(size, dtype=dtype, device="meta") for size in ((m, k), (k, n), (m, n))]
        launch, _ = aot.launches(wide.linear_act_dgrad, *tensors, activation, True, plan)  # and the sum of dbias
        return launch
    if of == "wgrad":
        tensors = [torch.empty(size, dtype=dtype, device="meta") for size in ((k, m), (k, n))]
        launch, *sums = aot.launches(wide.linear_act_wgrad, *tensors, plan)
    else:
        tensors = [torch.empty(size, dtype=dtype, device="meta") for size in ((m, k), (n, k), (n,))]
        launch, *sums = aot.launches(wide.linear_act_fwd, *tensors, activation, plan)
    assert len(sums) == (splits > 1)
    return launch


def _launches(case):
    arch, kind, tile, dtype, splits = case
    return [(arch, _launch(kind, tile, dtype, splits))]


@pytest.fixture(scope="session")
def compiled(request):
    return compile_selected(request, CASES, _launches)


def faults(arch, resources, tile, functions=2):
    """What keeps a compiled tile from being a candidate. functions: special ones for each output."""
    found = []
    if resources.spills:
        found.append(f"{resources.stack} bytes of stack per thread")
    if resources.shared > aot.SHARED_LIMIT[arch]:
        found.append(f"{resources.shared} bytes of shared memory")
    if resources.opcodes["MUFU"] < functions * outputs(tile) or not resources.products:
        found.append("outputs that are not computed")
    return found


def outputs(tile):
    """Of a thread."""
    return tile.block_m * tile.block_n / (32 * tile.num_warps)


def functions(case):
    """exp2 and rsqrt for each output; a part of a sum and a derivative from h take none."""
    return 0 if "grad" in case[1] or case[4] > 1 else 2


@pytest.mark.parametrize("name", CASES)
def test_candidates_are_clean(name, compiled):
    arch, kind, tile, *_ = CASES[name]
    (resources,) = compiled[name]
    assert_sound(resources)
    found = faults(arch, resources, tile, functions(CASES[name]))
    assert "outputs that are not computed" not in found
    assert_fits(resources, arch)
    assert found == []
    assert resources.programs_per_sm(arch) >= planning.wide_candidates(kind, arch)[tile]


@pytest.mark.parametrize("name", CASES)
def test_products_run_on_tensor_cores(name, compiled):
    arch, kind, tile, *_ = CASES[name]
    opcodes = compiled[name][0].opcodes
    count, depth = DOTS[kind.rpartition("-")[2]]
    # A group of four warps computes 64 rows with one wgmma; on sm_100 one thread starts 128 rows at once.
    rows = tile.block_m // (64 * tile.num_warps // 4)
    expected = count * tile.block_k // depth * rows
    if arch == 90:
        assert opcodes["HGMMA"] == expected
    else:
        assert opcodes["UTCHMMA"] >= count * tile.block_k // depth
    assert opcodes["HMMA"] == 0
    # fp32 that was multiplied outside the tensor cores would show as FFMA by the thousand.
    assert opcodes["FFMA"] < 1000


@pytest.mark.parametrize("name", CASES)
def test_special_function_units_per_output(name, compiled):
    _, _, tile, *_ = CASES[name]
    mufu = compiled[name][0].opcodes["MUFU"]
    # Divisions of tile numbers take a few more. Of two loops in one, some of the epilogue is there twice, under
    # conditions that exclude each other.
    assert mufu <= functions(CASES[name]) * outputs(tile) * (2 if tile.flatten else 1) + 16


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[0] == 90])
def test_tiles_travel_by_tma(name, compiled):
    opcodes = compiled[name][0].opcodes
    # Two loads to a step, and a store for each piece; h is loaded likewise.
    assert opcodes["UTMALDG"] >= 2 + (CASES[name][2].subtiles if CASES[name][1].startswith("dgrad") else 0)
    assert opcodes["UTMASTG"] >= CASES[name][2].subtiles


def test_ragged_sizes_compile_alike():
    # Edges are the hardware's: sizes that are no multiple of a tile take no code of their own. N stays one of 8.
    launch = _launch("half", FIRST, shape=(8191, 4072, 4088))
    resources = compile_for(90, launch)
    assert faults(90, resources, FIRST) == []
    assert resources.opcodes["HGMMA"] == DOTS["half"][0] * FIRST.block_k // DOTS["half"][1]


def test_signatures_are_those_of_a_launch():
    # What is gated here must be what would run.
    launch = _launch("bf16x6", next(iter(planning.wide_candidates("bf16x6", 90))))
    types, constants, attributes = launch_signature(launch)
    source = aot.source(launch)
    assert source.signature == types
    assert set(source.constants) == set(constants)
    assert source.attrs == attributes
    assert types["x_desc"] == "tensordesc<fp32[128, 32]>"


# --- the gates see what they are for -----------------------------------------------------------------------------


def test_true_fp32_spills_and_is_never_picked():
    resources = compile_for(90, _launch("ieee", WideTile(64, 64, 32, 4, 3)))
    assert faults(90, resources, WideTile(64, 64, 32, 4, 3))
    assert resources.opcodes["HGMMA"] == 0
    assert planning.wide_candidates("ieee", 90) == {}


def test_a_tile_that_compiles_to_nothing_is_seen():
    # triton 3.6.0, 3.7.1 and 3.8.0 make an empty kernel of it for sm_100, without a word, and a good one for sm_90;
    # 3.9.0 does not.
    tile = WideTile(128, 128, 32, 8, 3, subtiles=2)
    resources = compile_for(100, _launch("bf16x6", tile))
    empty = aot.triton.__version__ in ("3.6.0", "3.7.1", "3.8.0")
    assert faults(100, resources, tile) == (["outputs that are not computed"] if empty else [])
    nothing = dataclasses.replace(resources, opcodes=dict.fromkeys(resources.opcodes, 0))
    assert faults(100, nothing, tile) == ["outputs that are not computed"]


def test_shared_memory_is_counted():
    tile = WideTile(128, 256, 64, 8, 5, subtiles=2)
    assert "shared memory" in " ".join(faults(90, compile_for(90, _launch("half", tile)), tile))


def test_specialized_warps_repeat_each_others_products():
    # Why no candidate of sm_90 has a warp of its own for loads: both groups of consumers compute the whole tile.
    plain, special = (WideTile(64, 128, 64, 4, 4, specialize=specialize) for specialize in (False, True))
    one, two = (compile_for(90, _launch("half", tile)).opcodes["HGMMA"] for tile in (plain, special))
    assert two == 2 * one
    assert not any(tile.specialize for tile in planning.wide_candidates("half", 90))
