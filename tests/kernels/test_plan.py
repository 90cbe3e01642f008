# SPDX-License-Identifier: Apache-2.0
"""The plans: pure functions of shapes, checked without a device."""

import itertools
import json

import pytest
import torch

from perceptriton.kernels import Device, devices, explain, records, tables
from perceptriton.kernels import plan as planning

H100 = Device("cuda", 90, 132, triton=True)
A100 = Device("cuda", 80, 108, triton=True)
RTX_3090 = Device("cuda", 86, 82, triton=True)
RTX_5090 = Device("cuda", 120, 170, triton=True)
CPU = Device("cpu", vendor="AMD")
SIZES = (1, 2, 3, 16, 17, 31, 64, 65, 128, 129, 256, 1000)


@pytest.mark.parametrize(
    "device", [H100, A100, RTX_3090, RTX_5090], ids=lambda device: planning.chips.generation(device.arch)
)
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
            kind = {"bfloat16": "half"}.get(dtype, precision)
            most = tiles if forward.impl == "tiled" else device.units * planning.wide_candidates(kind, 90)[tile]
            assert forward.programs == min(tiles, most)


def test_few_row_tiles_need_one_launch():
    assert planning.linear_act_bwd(64, 16, 16, "float32", "ieee", H100).programs == 1
    assert planning.linear_act_bwd(1 << 20, 16, 16, "float32", "ieee", H100).programs > 1


def test_cpu_regimes():
    small = tables.cpu_thresholds("float32", "AMD")["small"]
    assert planning.linear_act_fwd(4, 2, 2, "float32", "ieee", CPU).impl == "aten"
    wide = planning.linear_act_fwd(1024, 1024, 1024, "float32", "ieee", CPU)
    assert small < 1024**3
    assert (wide.impl, wide.forward_gemm) == ("explicit", "onednn")
    tall, short = (planning.linear_act_bwd(m, 1024, 1024, "float32", "ieee", CPU) for m in (1 << 14, 512))
    assert tall.split_rows > 0
    assert "rows on each" in tall.reason
    assert "rows on each" not in short.reason, "not even one thread would get enough"
    # torch.bmm takes a path of its own, 17 times slower, where there is one input.
    assert planning.linear_act_bwd(1 << 17, 1, 1024, "float32", "ieee", CPU).split_rows == 0
    # A CPU that nobody measured keeps torch's own products.
    unknown = planning.linear_act_bwd(1024, 1024, 1024, "float32", "ieee", Device("cpu", vendor="Unheard-of"))
    assert (unknown.forward_gemm, unknown.dx_gemm, unknown.dweight_gemm) == ("mm", "mm", "mm")
    # A gradient of 16 MB is made in pieces, one of 1 MB is not.
    assert planning.linear_act_bwd(65536, 64, 64, "float32", "ieee", CPU).chunk > 0
    assert planning.linear_act_bwd(4096, 64, 64, "float32", "ieee", CPU).chunk == 0


def test_bounds_from_above():
    intel = Device("cpu", vendor="Intel AMX")
    # oneDNN wins on narrow layers and where dx is narrow; a narrow dweight is shared, a wide one is not.
    forward = [planning.linear_act_fwd(1 << 16, k, k, "float32", "ieee", intel).forward_gemm for k in (64, 256, 512)]
    assert forward == ["onednn", "onednn", "mm"]
    # With fewer rows it loses.
    fewer = planning.linear_act_fwd((1 << 14) - 1, 256, 256, "float32", "ieee", intel)
    assert (fewer.impl, fewer.forward_gemm) == ("explicit", "mm")
    backward = [planning.linear_act_bwd(1 << 16, k, n, "float32", "ieee", intel) for k, n in ((64, 64), (128, 32))]
    assert [plan.dx_gemm for plan in backward] == ["onednn", "mm"]
    assert backward[0].split_rows > 0
    assert planning.linear_act_bwd(1 << 16, 64, 128, "float32", "ieee", intel).split_rows == 0


def test_few_outputs():
    # 2^19 outputs pay without gradients, three times as many with them; of a network those of all layers count.
    unknown = Device("cpu", vendor="Unheard-of")
    taken = {}
    for m in (1024, 4096, 12_288):
        layer = [
            of(m, 784, 128, "float32", "ieee", unknown) for of in (planning.linear_act_fwd, planning.linear_act_bwd)
        ]
        forward = planning.mlp_fwd(m, (784, 128, 128), "float32", "ieee", unknown, False)
        backward = planning.mlp_bwd(m, (784, 128, 128), "float32", "ieee", unknown)
        taken[m] = [plan.impl == "explicit" for plan in (*layer, forward, backward)]
    assert taken == {1024: [False] * 4, 4096: [True, False, True, False], 12_288: [True] * 4}
    assert "few_outputs" not in tables.cpu_thresholds("float32", "AMD"), "not measured there"


@pytest.mark.parametrize(
    ("capabilities", "kind"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "avx_vnni": True}, "AMD Zen 5"),
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "avx_vnni": False}, "AMD"),
        ({"cpu_name": "Intel Xeon", "avx512_f": True, "avx_vnni": True, "amx_bf16": True}, "Intel AMX"),
        ({"cpu_name": "Intel Core", "avx_vnni": True}, "Intel"),
        ({"architecture": "aarch64"}, ""),
        (None, ""),
    ],
    ids=str,
)
def test_kinds_of_cpus(monkeypatch, capabilities, kind):
    def asked():
        if capabilities is None:
            raise RuntimeError("cpuinfo could not be initialized")
        return capabilities

    monkeypatch.setattr(torch.cpu, "get_capabilities", asked)
    assert devices.cpu_kind.__wrapped__() == kind
    # Whoever is not in the table gets the row for any.
    known = tables.read_table("cpu.json")["thresholds"]
    assert (
        tables.cpu_thresholds("float32", kind)["small"] == known[kind if kind in known else "any"]["float32"]["small"]
    )


OPS = ("linear_act_fwd", "linear_act_bwd")


@pytest.mark.parametrize("arch", planning.chips.LAYER_CHIPS)
def test_tile_table_is_well_formed(arch):
    for op, kind, layout in itertools.product(OPS, ("half", "tf32", "ieee"), ("aligned", "ragged")):
        rows = tables.tile_rows("gpu_tiles.json", arch, op, kind, layout)
        assert rows
        assert len({row.widths for row in rows}) == len(rows)
        for row in rows:
            assert row.block_m <= 128
            assert row.num_warps in (4, 8)
            assert row.num_stages in (1, 2, 3)
            assert row.num_warps * row.programs_per_sm <= records.CHIPS[arch].warps


TAKEN = {80: 80, 86: 86, 87: 86, 89: 86, 90: 90, 100: 90, 103: 90, 120: 120, 121: 120}


@pytest.mark.parametrize(("arch", "chip"), TAKEN.items())
def test_tiles_of_a_chip(arch, chip):
    """Of the newest one that is no newer, whose tiles need no more than there is."""
    assert planning.chips.generation(arch) == f"sm_{chip}"
    device = Device("cuda", arch, 82, triton=True)
    assert planning.device_refusal(1, 1, 1, "float32", device) is None
    if own := records.CHIPS.get(f"sm_{arch}"):
        least = records.CHIPS[f"sm_{chip}"]
        assert (least.shared, least.warps, least.programs) <= (own.shared, own.warps, own.programs)


# --- wide layers -----------------------------------------------------------------------------------------------------

WIDE = (4096, 1024, 1024)


def wide_document(rows, name="NVIDIA H100*", kind="half"):
    """The table as it ships, with measurements of one device."""
    document = json.loads((tables.TABLES / "wide.json").read_text())
    measured = {"torch": "2.11.0", "triton": "3.6.0", "date": "2026-01-01", "rows": {kind: rows}}
    return document | {"devices": {name: measured}}


def wide_row(shape, tile, us=50.0, library_us=60.0):
    return {"shape": list(shape), "tile": tile, "us": us, "library_us": library_us}


@pytest.fixture
def measured(monkeypatch):
    """measured(rows, ...): plans see these measurements instead of the table that ships."""

    def measured(*arguments):
        table = tables.read_wide(wide_document(*arguments))
        monkeypatch.setattr(planning.wide, "read_table", lambda _: table)
        forget()

    def forget():
        for plan in (planning.linear_act_fwd, planning.linear_act_dgrad, planning.mlp_fwd, planning.mlp_bwd):
            plan.cache_clear()

    yield measured
    forget()


NAMED = Device("cuda", 90, 132, triton=True, name="NVIDIA H100 80GB HBM3")
TILE = [128, 128, 64, 8, 4, 8, 1, 0, 0]


def test_nobody_is_below_the_library_unmeasured():
    for device, dtype in itertools.product((H100, NAMED, A100), ("bfloat16", "float16", "float32")):
        assert planning.linear_act_fwd(*WIDE, dtype, "ieee", device).impl == "library"


def test_measured_shapes_speak_for_their_neighbours(measured):
    measured([wide_row(WIDE, TILE), wide_row((4096, 4096, 4096), None, 70.0)])

    def impl(m, k, n, device=NAMED, asked=None):
        return planning.linear_act_fwd(m, k, n, "bfloat16", "ieee", device, asked).impl

    plan = planning.linear_act_fwd(*WIDE, "bfloat16", "ieee", NAMED)
    assert (plan.impl, tables.wide_row(plan.tile), plan.programs) == ("tma", TILE, 132)
    assert plan.reason == "measured at 4096x1024x1024 on NVIDIA H100*: 1.20x the library and a pass"
    assert impl(3000, 1100, 2048) == "tma"
    assert impl(4096, 4096, 4096) == impl(3000, 3000, 3000) == "library"  # the library was measured to win
    assert impl(4096, 1024, 16384) == "library"  # too far from both
    assert impl(*WIDE, device=H100) == "library"  # a device without that name
    assert impl(4096, 4096, 4096, asked="triton") == "tma"  # a choice is obeyed


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("widths", [(2, 2), (64, 64), (512, 512)])
def test_no_kernel_counts_beyond_32_bits(widths, precision):
    """`tl.cdiv` of an int32 adds the tile's rows first: from 2^31 less those on, the sum would be negative."""
    kind = ("float32", precision, H100)
    for rows, refused in ((2**31 - 1024, False), (2**31 - 1023, True), (2**31 - 1, True), (2**31, False)):
        plans = [plan(rows, *widths, *kind) for plan in (planning.linear_act_fwd, planning.linear_act_bwd)]
        plans.append(planning.mlp_fwd(rows, (*widths, 4), *kind))
        for plan in plans:
            assert ("beyond 32 bits" in plan.reason) == refused
            assert not (refused and plan.triton)
    tiles = itertools.chain(*planning.layer.TILED.values(), [planning.layer.PASS_TILE])
    assert max(tile.block_m for tile in tiles) <= 128 <= planning.chips.TALLEST_TILE


def test_no_grid_is_too_tall():
    most, kind = 65_535 * planning.layer.PASS_TILE.block_n, ("bfloat16", "ieee", H100)
    assert planning.linear_act_bwd(64, 16, most, *kind).impl == "passes"
    for plan in (planning.linear_act_fwd, planning.linear_act_bwd):
        assert plan(64, 16, most + 1, *kind).impl == "aten"


def test_wide_needs_rows_of_sixteen_bytes():
    def impl(m, k, n, dtype="bfloat16", device=H100, readable=True):
        return planning.linear_act_fwd(m, k, n, dtype, "tf32", device, "triton", None, readable).impl

    assert impl(*WIDE) == impl(*WIDE, "float32") == "tma"
    assert impl(4096, 1024, 1028) == "tiled"
    assert impl(4096, 1024, 1028, "float32") == "tma"
    assert impl(*WIDE, readable=False) == "tiled"
    assert impl(*WIDE, device=A100) == "tiled"
    # TMA is there, but no tile was compiled for its smaller shared memory.
    assert impl(*WIDE, device=RTX_5090) == "tiled"
    assert impl(*WIDE, device=Device("cuda", 103, 148, triton=True)) == "tma"


def test_splits_are_taken_by_permission_alone():
    for impl, split in itertools.product((None, "triton"), (None, *records.SPLITS)):
        plan = planning.linear_act_fwd(*WIDE, "float32", "ieee", H100, impl, split)
        assert plan.precision == (split or "ieee")
        assert plan.impl == ("tma" if split else "library" if impl is None else "tiled")
    # Where the kernel does not apply, fp32 stays fp32.
    for shape, device in (((65536, 64, 64), H100), ((4096, 1024, 1023), H100), (WIDE, A100)):
        assert planning.linear_act_fwd(*shape, "float32", "ieee", device, "triton", "bf16x6").precision == "ieee"


def test_few_tiles_are_cut_along_the_sum(measured):
    def plan(m, k, n, dtype="bfloat16", device=H100, impl="triton"):
        return planning.linear_act_fwd(m, k, n, dtype, "ieee", device, impl)

    few = plan(128, 8192, 4096)
    tiles = -(-128 // few.tile.block_m) * -(-4096 // few.tile.block_n)
    assert few.splits > 1
    assert few.programs == tiles * few.splits <= H100.units * 2
    assert f"{few.splits} programs to a tile" in few.reason
    assert plan(128, 1024, 4096).splits == 1  # parts would be too short
    assert plan(8192, 8192, 8192).splits == 1
    measured([wide_row((128, 8192, 4096), TILE) | {"splits": 4}])
    few = plan(128, 8192, 4096, device=NAMED, impl=None)
    assert (few.splits, few.programs) == (4, 128)


def test_wide_networks_are_nodes_where_that_was_measured(measured):
    widths = (1024, 1024, 1024, 10)

    def plans(device=NAMED, dtype="bfloat16", impl=None, loss=False):
        arguments = (4096, widths, dtype, "ieee", device)
        return planning.mlp_fwd(*arguments, True, loss, impl), planning.mlp_bwd(*arguments, loss, impl)

    assert [plan.impl for plan in plans()] == ["layers", "layers"]
    assert plans()[1].reason == "a width of 1024: networks stay on chip up to 128"
    assert [plan.impl for plan in plans(dtype="float32", impl="triton")] == ["layers", "layers"]
    assert [plan.impl for plan in plans(A100, impl="triton")] == ["layers", "layers"]
    forward, backward = plans(impl="triton")
    assert [own.impl for own in forward.layers] == ["tma", "tma", "tiled"]
    assert [own.impl for own in backward.layers] == ["passes"] * 3
    # Nothing ends in x, and TMA does not read the 20 bytes of a row of ten.
    assert [own and own.impl for own in backward.dgrads] == [None, "tma", None]
    assert backward.boundaries == (1, 2, 3)
    measured([wide_row(WIDE, TILE)], "NVIDIA H100*", "dgrad-half")
    forward, backward = plans()
    assert (forward.impl, backward.impl) == ("stack", "stack")
    assert [own.impl for own in forward.layers] == ["library", "library", "library"]
    assert [own and own.tile for own in backward.dgrads] == [None, records.WideTile(*TILE[:7]), None]
    assert [plan.impl for plan in plans(loss=True)] == ["layers", "layers"]


def test_wide_fp32_networks_are_nodes_where_a_split_is_allowed():
    def plans(rows, split, impl=None, precision="ieee"):
        arguments = (rows, (1024, 1024, 1024, 512), "float32", precision, H100)
        return (
            planning.mlp_fwd(*arguments, True, False, impl, split),
            planning.mlp_bwd(*arguments, False, impl, split),
        )

    for split in records.SPLITS:
        forward, backward = plans(4096, split)
        assert (forward.impl, backward.impl) == ("stack", "stack")
        assert [(own.impl, own.precision) for own in forward.layers] == [("tma", split)] * 3
        assert [own and (own.impl, own.precision) for own in backward.dgrads] == [None, ("tma", split), ("tma", split)]
        assert {own.tile in planning.wide_candidates(f"dgrad-{split}", 90) for own in backward.dgrads[1:]} == {True}
        assert [(own.impl, own.precision) for own in backward.wgrads] == [("tma", split)] * 3
        assert {own.tile in planning.wide_candidates(f"wgrad-{split}", 90) for own in backward.wgrads} == {True}
        assert backward.wgrads[0].splits > 1  # 1,024 x 1,024 outputs of 4,096 rows
        # The transposed copy of a weight would cost more than the pass over few rows.
        forward, backward = plans(1000, split)
        assert [own is None for own in backward.dgrads] == [True, True, False]
        assert [own is None for own in backward.wgrads] == [True, False, False]  # dz of the first is nobody's epilogue
        assert plans(256, split)[1].impl == "layers"
        assert plans(256, split, impl="triton")[1].impl == "stack"
    assert plans(4096, None)[1].impl == plans(4096, None, "triton")[1].impl == "layers"
    assert plans(4096, None, precision="tf32")[1].impl == "layers"
    backward = plans(4096, None, "triton", "tf32")[1]
    assert backward.dgrads[1].precision == "tf32"
    assert backward.wgrads == (None,) * 3  # as fast in torch


def test_measurements_weigh_more_than_a_permission(measured):
    def plan(impl=None):
        return planning.linear_act_fwd(*WIDE, "float32", "ieee", NAMED, impl, "bf16x6").impl

    assert plan() == "tma"
    measured([wide_row(WIDE, None, 60.0, 50.0)], "NVIDIA H100*", "bf16x6")
    assert plan() == "library"
    assert plan("triton") == "tma"


def test_unmeasured_tiles_waste_little():
    for m, n in itertools.product((128, 1024, 4096, 16384), (128, 1024, 4096, 8192)):
        plan = planning.linear_act_fwd(m, 1024, n, "bfloat16", "ieee", H100, "triton")
        assert plan.tile in planning.wide_candidates("half", 90)
        least = min(planning.wide.wave_waste(m, n, tile, 132) for tile in planning.wide_candidates("half", 90))
        assert planning.wide.wave_waste(m, n, plan.tile, 132) <= planning.wide.WIDE_WASTE * least
    assert plan.tile.block_m * plan.tile.block_n == 128 * 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.pop("date"), r"NVIDIA H100\*, without: \['date'\]"),
        (lambda own: own["rows"].update(fp8=[wide_row(WIDE, None)]), "a kind of product without tiles: 'fp8'"),
        (lambda own: own["rows"]["half"][0].update(shape=[0, 1, 1]), "not three sizes"),
        (lambda own: own["rows"]["half"][0].update(shape=[1, 1]), "not three sizes"),
        (lambda own: own["rows"]["half"][0].update(tile=[16, *TILE[1:]]), r"half, none of the tiles: \[16, "),
        (lambda own: own["rows"]["half"][0].update(tile=[]), "none of the tiles"),
        (lambda own: own["rows"]["half"][0].update(us=0), "times of .*: 0 and 60.0"),
        (lambda own: own["rows"]["half"][0].update(splits=3), "3 splits"),
        (
            lambda own: own["rows"].update({"dgrad-half": [wide_row(WIDE, None) | {"splits": 2}]}),
            "dgrad-half, splits: 2",
        ),
    ],
)
def test_tables_are_checked_when_they_are_read(change, message):
    document = wide_document([wide_row(WIDE, TILE)])
    tables.read_wide(document)
    change(document["devices"]["NVIDIA H100*"])
    with pytest.raises(ValueError, match=message):
        tables.read_wide(document)


# rows, in_features, out_features, dtype, precision: microseconds at the least, and of a library product and a pass,
# as computed by hand from an H200's peak rates
LIMITS = [
    ((8192, 8192, 8192), "bfloat16", "ieee", 1.11e3, 1.17e3),
    ((16384, 4096, 4096), "bfloat16", "ieee", 556, 612),
    ((4096, 1024, 1024), "bfloat16", "ieee", 8.68, 12.2),
    ((4096, 1024, 1024), "float32", "ieee", 128, 135),
    ((8192, 8192, 8192), "float32", "tf32x3", 6670, None),
    ((8192, 8192, 8192), "float32", "bf16x6", 6670, None),
    ((8192, 8192, 8192), "float32", "bf16x3", 3330, None),
    ((1 << 20, 64, 64), "bfloat16", "ieee", 55.9, None),
]


# The same of other chips by hand from their data sheets, where arithmetic is the limit, memory, or special functions.
NAMED_LIMITS = [
    ("RTX 3090", (8192, 8192, 8192), "bfloat16", "ieee", 15_500),
    ("RTX 3090", (1 << 20, 64, 64), "bfloat16", "ieee", 287),
    ("RTX 4090", (8192, 8192, 8192), "bfloat16", "ieee", 6_660),
    ("RTX 4090", (8192, 8192, 8192), "float32", "tf32", 13_300),
    ("RTX 4090", (8192, 8192, 8192), "float32", "bf16x3", 20_000),
    ("RTX 5090", (1 << 20, 64, 64), "bfloat16", "ieee", 150),
    ("A10", (8192, 8192, 8192), "float32", "ieee", 35_200),
    ("L4", (1 << 23, 1, 64), "bfloat16", "ieee", 3_640),
    ("L40S", (8192, 8192, 8192), "bfloat16", "ieee", 3_040),
    ("A100", (1 << 23, 1, 64), "float32", "ieee", 1_069),
    ("H100", (1 << 20, 64, 64), "bfloat16", "ieee", 80.1),
    ("B200", (8192, 8192, 8192), "bfloat16", "ieee", 489),
    ("B200", (1 << 23, 1, 64), "bfloat16", "ieee", 231),
]


@pytest.mark.parametrize(("chip", "shape", "dtype", "precision", "limit"), NAMED_LIMITS)
def test_limits_of_named_chips(chip, shape, dtype, precision, limit):
    plan = records.Plan("library", "", precision=precision)
    found = planning.predict(*shape, dtype, plan, planning.PEAKS[chip])
    assert found.limit_us == pytest.approx(limit, rel=0.01)
    assert str(found).startswith(f"{chip} at peak rates (a model): ")


@pytest.mark.parametrize("name", planning.PEAKS)
def test_peaks_agree_with_each_other(name):
    peaks = planning.PEAKS[name]
    lanes = 64 if name == "A100" else 128
    # A multiprocessor does 16 special functions in a clock, and a product and a sum on each lane.
    assert peaks.ieee == pytest.approx(peaks.special / 16 * 2 * lanes, rel=0.09)
    assert peaks.half == pytest.approx(2 * peaks.tf32, rel=0.02)
    # GeForce cards sum half-precision products in fp32 at half the rate that their chips have elsewhere.
    assert (peaks.tf32 < 1.1 * peaks.ieee) == name.startswith("RTX")


@pytest.mark.parametrize("name", planning.PEAKS)
def test_plans_and_predictions_of_named_chips(name):
    device = planning.PEAKS[name].device
    assert planning.peaks_of(device).name == name
    for shapes in ((64, 64), [(64, 64)] * 3, [(1024, 64), (1024, 1024)]):
        plans = explain((1 << 20, 64), shapes, torch.bfloat16, name)
        assert plans == explain((1 << 20, 64), shapes, torch.bfloat16, device)
        for plan in plans:
            assert str(plan.prediction).startswith(f"{name} at peak rates (a model): ")
    narrow = explain((1 << 20, 64), (64, 64), torch.bfloat16, name).forward
    assert narrow.impl == "rows"
    assert narrow.programs % device.units == 0
    assert narrow.programs * narrow.tile.num_warps <= device.units * 64


@pytest.mark.parametrize(("arch", "like"), [(80, "A100"), (86, "A10"), (89, "L40S"), (90, "H200"), (121, "H200")])
@pytest.mark.parametrize("name", ["", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe"])
def test_devices_of_other_names_are_modelled_as_one_of_their_kind(name, arch, like):
    device = Device("cuda", arch, 76, triton=True, name=name)
    assert planning.peaks_of(device) == planning.PEAKS[like]
    assert f"{like} at peak rates (a model)" in str(explain((1 << 20, 64), (64, 64), torch.bfloat16, device))


@pytest.mark.parametrize(("shape", "dtype", "precision", "limit", "library"), LIMITS)
def test_limits_of_an_h200(shape, dtype, precision, limit, library):
    found = planning.predict(*shape, dtype, records.Plan("library", "", precision=precision))
    assert found.limit_us == pytest.approx(limit, rel=0.01)
    assert library is None or found.plan_us == pytest.approx(library, rel=0.01)
    assert "a model" in str(found)


def test_predictions_count_idle_multiprocessors():
    # 133 tiles take two waves of 132, and nearly as long as 264.
    tile = next(iter(planning.wide_candidates("half", 90)))
    one, two, full = (
        planning.predict(tiles * tile.block_m, 4096, tile.block_n, "bfloat16", records.Plan("tma", "", tile)).plan_us
        for tiles in (132, 133, 264)
    )
    assert two == pytest.approx(2 * one, rel=0.01)
    assert two == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize(("n", "walkers"), [(256, 264), (1024, 66), (2000, 33), (100_000, 1)])
def test_slots_of_the_dz_pass_are_bounded_by_the_chip(n, walkers):
    device = records.Device("cuda", 90, 132, triton=True)
    columns = -(-n // 128)
    found = [planning.linear_act_bwd(m, 1024, n, "bfloat16", "ieee", device) for m in (1, 1 << 20, 1 << 25)]
    assert [own.impl for own in found] == ["passes"] * 3
    assert [own.programs for own in found] == [columns, walkers * columns, walkers * columns]


# in_features 1024, out_features 1024, 4,096 rows, fp32: two products of 8.59 Gflop each at 66.9 Tflop/s take 256.8 us.
# A pass over dy and y that writes dz moves 50.3 MB, 10.5 us; to read dz once more for dbias takes 3.5 us.
@pytest.mark.parametrize(
    ("impl", "dz_at_hand", "us"), [("passes", False, 267.3), ("library", False, 270.8), ("passes", True, 260.3)]
)
def test_predictions_of_a_wide_backward_pass(impl, dz_at_hand, us):
    plan = records.Plan(impl, "")
    found = planning.predict_bwd(4096, 1024, 1024, "float32", plan, dz_at_hand=dz_at_hand)
    assert found.plan_us == pytest.approx(us, rel=1e-3)
    assert found.limit_us == pytest.approx(256.8, rel=1e-3)
    assert found.flops == 4 * 4096 * 1024 * 1024


def test_predictions_of_a_narrow_backward_pass():
    # dy, y, x and dx of 134 MB each, 111.9 us; 132 slots of 64 x 65 sums in fp32, written and read, 0.9 us.
    one, many = (
        planning.predict_bwd(1 << 20, 64, 64, "bfloat16", records.Plan("rows", "", programs=programs))
        for programs in (1, 132)
    )
    assert one.plan_us == one.limit_us == pytest.approx(111.9, rel=1e-3)
    assert many.plan_us == pytest.approx(112.8, rel=1e-3)


def test_predictions_of_a_network_on_chip():
    plans = explain((1 << 20, 64), [(64, 64)] * 4, torch.bfloat16, H100)
    # 2 x 4 x 64 special functions per row, back as forward: the bytes of x and y are less than half of that time.
    for plan in plans:
        assert plan.impl == "fused"
        assert plan.prediction.limit_us == pytest.approx(1e6 * 2 * 4 * 64 * (1 << 20) / (132 * 16 * 1.83e9))
    assert plans.inference.prediction.plan_us == plans.inference.prediction.limit_us
    # Back in two segments, each of which reads dy and x and writes dx, bytes decide.
    widths = (64,) * 5
    forward, training = (
        planning.mlp_bytes(1 << 20, widths, 2, plans.forward, *backward) for backward in ((), (plans.backward,))
    )
    stored = 2 * 64 * (1 << 20)  # by the forward pass, between the segments of the backward pass
    assert len(plans.backward.segments) == 2
    ends = {segment.last for segment in plans.forward.segments}
    moved = training - forward - (0 if set(plans.backward.boundaries) <= ends else stored)
    assert plans.backward.prediction.plan_us == pytest.approx(1e6 * moved / 4.8e12)
    # Recomputing the forward pass makes three products of a layer's two.
    assert plans.backward.prediction.flops == 3 * plans.forward.prediction.flops


@pytest.mark.parametrize("impl", [None, "triton"], ids=["layers", "stack"])
def test_predictions_of_a_wide_network_are_the_sum_of_its_layers(impl):
    shapes = [(4096, 2048), (4096, 4096)]
    plans = explain((8192, 2048), shapes, torch.bfloat16, H100, impl=impl)
    layers = [explain((8192, k), (n, k), torch.bfloat16, H100, impl=impl) for n, k in shapes]
    assert plans.inference.impl == ("layers" if impl is None else "stack")
    forward, backward = (sum(getattr(layer, name).prediction.plan_us for layer in layers) for name in layers[0]._fields)
    assert plans.inference.prediction.plan_us == pytest.approx(forward)
    # In a stack the first layer's dz comes out of the second one's product: of three passes over it one is left.
    saved = 0 if impl is None else 1e6 * 2 * 2 * 8192 * 4096 / 4.8e12
    assert plans.backward.prediction.plan_us == pytest.approx(backward - saved)
    assert plans.inference.prediction.flops == 2 * 8192 * (2048 * 4096 + 4096 * 4096)
