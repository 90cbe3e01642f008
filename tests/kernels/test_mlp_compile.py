# SPDX-License-Identifier: Apache-2.0
"""Compile-only: every tile that a plan for a whole network can pick, compiled ahead of time for its chip, with gates.

No GPU and no driver is needed. `--cubins DIR` keeps the cubins; the resource table is printed with -rA or -s.
"""

import itertools
import os
import re

import pytest
import torch
from compiling import (
    CHIPS,
    FINDINGS,
    TILED_FOR,
    assert_fits,
    assert_is_what_a_launch_compiles,
    assert_sound,
    compile_for,
    compile_selected,
)
from machine_code import overwritten_operands

triton = pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the interpreter replaces the compiler in this process; run without it", allow_module_level=True)

import triton.language as tl  # noqa: E402

from perceptriton.kernels import plan as planning  # noqa: E402
from perceptriton.kernels import tables  # noqa: E402
from perceptriton.kernels.gpu import aot, network  # noqa: E402
from perceptriton.kernels.records import MlpPlan, MlpSegment, MlpTile  # noqa: E402

pytestmark = pytest.mark.compiles

if not (tables.TABLES / "mlp_tiles.json").exists():
    pytest.skip("no tile table yet: python benches/tune.py networks writes it", allow_module_level=True)

KINDS = {"half": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "ieee": (torch.float32, "ieee")}
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}

# Nets that take the tiles of wider chains, as most nets do.
EXAMPLES = {
    "xor": (2, 10, 10, 10, 1),
    "digits": (32, 64, 5),
    "policy": (31, 64, 64, 2),
    "funnel": (36, 64, 9, 1),
    "field": (48, 64, 64, 64, 64, 16),
    "ragged": (7, 33, 20, 16, 3, 9, 17, 2, 40),
}


def _plan(arch, op, kind, widths, rows, loss=False):
    dtype, precision = KINDS[kind]
    arguments = (rows, widths, NAMES[dtype], precision, CHIPS[arch])
    if op == "mlp_bwd":
        return planning.mlp_bwd(*arguments, loss=loss, impl="triton")
    return planning.mlp_fwd(*arguments, save=op == "mlp_fwd", loss=loss, impl="triton")


def _recorded(op, kind, widths, rows, plan, act="sigmoid", loss=False):
    """The launches of a plan, for tensors of the fewest attributes that a launch would see."""
    dtype, _ = KINDS[kind]

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = tuple(empty(n, k) for k, n in itertools.pairwise(widths))
    biases = tuple(empty(n) for n in widths[1:])
    layers = len(weights)
    x, y = empty(rows, widths[0]), empty(rows, widths[-1])
    net, wanted = (weights, biases, act), (True, (True,) * layers, (True,) * layers)
    if op != "mlp_bwd":
        save = tuple(range(1, layers)) if op == "mlp_fwd" else ()
        if loss:
            head = (y, empty(widths[-1]), "mean", dtype)
            return aot.launches(network.mlp_fwd, x, *net, "identity", plan, save, head)
        return aot.launches(network.mlp_fwd, x, *net, act, plan, save)
    saved = tuple(empty(rows, -(-widths[l] // 16) * 16) for l in plan.boundaries)
    if loss:
        head = (y, empty(widths[-1]), "mean")
        return aot.launches(network.mlp_bwd, empty(), x, saved, *net, "identity", wanted, plan, head)
    return aot.launches(network.mlp_bwd, y, x, saved, *net, act, wanted, plan)


def _cases():
    """(arch, op, kind, widths, rows, plan, activation, loss) by name."""
    for arch, op, kind in itertools.product(TILED_FOR, ("mlp_infer", "mlp_fwd", "mlp_bwd"), KINDS):
        for layout in tables.LAYOUTS[op]:
            for number, row in enumerate(tables.tile_rows("mlp_tiles.json", f"sm_{arch}", op, kind, layout)):
                chain, tile, name = row.widths, row.network_tile, "-".join(map(str, row.widths))
                ragged_in, ragged_out = layout in ("in", "both"), layout in ("out", "both")
                widths = (chain[0] - 3 * ragged_in, *chain[1:-1], chain[-1] - 3 * ragged_out)
                # The tool has compiled all variants; here they take turns.
                loss = ragged_out and number % 2 == 1
                plan = MlpPlan("fused", "", (MlpSegment(0, len(chain) - 1, tile, 2),), KINDS[kind][1])
                case = (arch, op, kind, widths, 65536 if layout == "exact" else 65531, plan, "sigmoid", loss)
                yield f"sm_{arch}-{op}-{kind}-{layout}-{name}", case
                if ragged_out and op != "mlp_bwd":
                    # An unbounded activation has its padding cleared.
                    inner = (chain[0] - 3 * ragged_in, *(width - 3 for width in chain[1:]))
                    case = (arch, op, kind, inner, 65531, plan, "relu", False)
                    yield f"sm_{arch}-{op}-{kind}-relu-{layout}-{name}", case
        if kind != "tf32":
            for name, widths in EXAMPLES.items():
                plan = _plan(arch, op, kind, widths, 65531)
                if op != "mlp_infer":
                    yield f"sm_{arch}-{op}-{kind}-{name}", (arch, op, kind, widths, 65531, plan, "tanh", False)


CASES = dict(_cases())
NARROW = (32, 32, 32)
# Chips with the tiles of another.
OTHERS = {
    f"sm_{arch}-{op}-{kind}": (arch, op, kind, NARROW, 65536, _plan(arch, op, kind, NARROW, 65536), "sigmoid", False)
    for arch in (89, 100)
    for op in ("mlp_fwd", "mlp_bwd")
    for kind in KINDS
}


def _launches(case):
    """The launches of the network's kernels, with the chip that they are compiled for."""
    arch, *rest = case
    kernels = (network.mlp_fwd_kernel, network.mlp_bwd_kernel)
    return [(arch, launch) for launch in _recorded(*rest) if launch.kernel in kernels]


@pytest.fixture(scope="session")
def compiled(request):
    return compile_selected(request, CASES | OTHERS, _launches)


@pytest.mark.parametrize("name", CASES)
def test_no_spills_and_fits(name, compiled):
    arch, *_ = CASES[name]
    for resources in compiled[name]:
        assert_sound(resources)
        assert_fits(resources, arch)


@pytest.mark.parametrize("name", CASES)
def test_products_use_the_right_units(name, compiled):
    kind = CASES[name][2]
    for resources in compiled[name]:
        if kind == "ieee":
            # fp32 that went through tensor cores would be TF32 in disguise.
            assert resources.products == 0
            assert resources.opcodes["FFMA"] >= 16
        else:
            assert resources.products > 0


@pytest.mark.parametrize("name", [name for name in CASES if re.match(r"sm_90-mlp_\w+-half-exact-(64|128)-", name)])
def test_wide_16_bit_products_use_wgmma(name, compiled):
    if CASES[name][5].segments[0].tile.block_m < 64:
        pytest.skip("wgmma takes 64 rows at least, and every such tile spills here")
    for resources in compiled[name]:
        assert resources.opcodes["HGMMA"] > 0


@pytest.mark.parametrize("name", [name for name in CASES if re.match(r"sm_90-mlp_(fwd|infer)-half-exact-", name)])
def test_special_function_units_per_output(name, compiled):
    *_, widths, _, plan, _, _ = CASES[name]
    tile = plan.segments[0].tile
    outputs = sum(widths[1:]) * tile.block_m / (32 * tile.num_warps)
    # exp2 and rsqrt for each output of each layer, and a few for the loop; the pipeliner copies no dot.
    assert compiled[name][0].opcodes["MUFU"] <= 2 * outputs + 8


def test_every_row_is_the_choice_of_its_own_chain():
    for name, (arch, op, kind, widths, rows, plan, _, _) in CASES.items():
        if re.search(r"-(exact|in|out|both)-", name):
            tiles = [segment.tile for segment in _plan(arch, op, kind, widths, rows).segments]
            assert tiles == [plan.segments[0].tile], name


@pytest.mark.parametrize("name", OTHERS)
def test_tiles_of_another_chip_fit(name, compiled):
    arch, *_ = OTHERS[name]
    for resources in compiled[name]:
        assert resources.registers > 0
        assert resources.shared <= aot.SHARED_LIMIT[arch]
        assert not (resources.spills and arch == 89), "its tiles are picked for it too"


def test_a_spilling_tile_is_seen():
    # Negative control: the sums of four 64 x 64 weights do not fit in the registers of four warps.
    plan = MlpPlan("fused", "", (MlpSegment(0, 4, MlpTile(64, 4, 1), 2),))
    (launch,) = _launches((90, "mlp_bwd", "half", (64,) * 5, 4096, plan, "sigmoid", False))
    resources = compile_for(*launch)
    assert resources.stack > 0
    assert resources.opcodes["STL"] > 0


# --- code that compilers are known to get wrong is seen -----------------------------------------------------------


@triton.jit
def transposed_product_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    a = tl.load(a_ptr + rows * BLOCK + columns)
    b = tl.load(b_ptr + rows * BLOCK + columns)
    dz = tl.dot(a, b).to(tl.bfloat16)
    tl.store(c_ptr + rows * BLOCK + columns, tl.dot(tl.trans(dz), b))


# Smaller ones are transposed in shared memory, which is the safe form.
@pytest.mark.parametrize("size", [64, 128])
def test_a_transposed_product_is_seen(size):
    # Positive control.
    a = torch.empty((size, size), dtype=torch.bfloat16, device="meta")
    c = torch.empty((size, size), device="meta")
    arguments = {"a_ptr": a, "b_ptr": a, "c_ptr": c, "BLOCK": size}
    launch = aot.Launch(transposed_product_kernel, arguments, {"num_warps": 4, "enable_fp_fusion": True})
    assert compile_for(90, launch).findings["dangerous dots"] > 0


def test_an_overwritten_operand_is_seen():
    # Positive control: behind the first product whose left operand lies in registers, one of these is written to.
    def planted(texts):
        lines = texts["sass"].splitlines()
        for index, line in enumerate(lines):
            if found := re.search(r"/\*([0-9a-f]{4,})\*/ .*HGMMA\S+ R\d+, (R\d+),", line):
                lines.insert(index + 1, f"/*{int(found[1], 16) + 8:04x}*/ MOV {found[2]}, R0 ;")
                return len(overwritten_operands("\n".join(lines)))
        return -1

    widths = (64, 64, 64)
    launch = _recorded("mlp_fwd", "half", widths, 65536, _plan(90, "mlp_fwd", "half", widths, 65536))[0]
    found = aot.compile_for(90, launch, {"as it is": FINDINGS["overwritten operands"], "planted": planted}).findings
    assert found == {"as it is": 0, "planted": 1}


# --- what is compiled here is what a launch compiles ----------------------------------------------------------------


@pytest.mark.parametrize("op", ["mlp_infer", "mlp_fwd", "mlp_bwd"])
@pytest.mark.parametrize("loss", [False, True], ids=["", "loss"])
def test_ahead_of_time_is_what_a_launch_compiles(op, loss):
    widths, rows = (32, 64, 5), 4096
    plan = _plan(90, op, "half", widths, rows, loss)
    launches = _recorded(op, "half", widths, rows, plan, loss=loss)
    assert launches
    for launch in launches:
        assert_is_what_a_launch_compiles(launch)
