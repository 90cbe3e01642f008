# SPDX-License-Identifier: Apache-2.0
"""Damaged tables of tuned tiles: ignored with a warning that names the file, and never evaluated."""

import json
import warnings

import cases
import pytest
import torch

from perceptriton.kernels import Device, explain, tables

NAMES = tuple(tables.READERS)
H100 = Device("cuda", arch=90, units=132, triton=True)
# A layer with a tile, one for the wide kernel, one for a CPU, and a network.
CALLS = (
    ((65536, 64), (64, 64), H100),
    ((4096, 1024), (1024, 1024), H100),
    ((65536, 256), (256, 256), "cpu"),
    ((65536, 64), ((64, 64), (64, 64)), H100),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the tables that plans read from now on."""
    for name in NAMES:
        (tmp_path / name).write_text((tables.TABLES / name).read_text())
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    cases.forget_plans()
    yield tmp_path
    cases.forget_plans()


def choices():
    return [explain(x, weight, torch.bfloat16, device) for x, weight, device in CALLS]


def test_the_tables_that_ship_are_whole(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer, wide, cpu, network = choices()
    assert [layer.forward.impl, layer.backward.impl, wide.forward.impl] == ["rows", "rows", "library"]
    assert (cpu.forward.impl, network.forward.impl, network.backward.impl) == ("explicit", "fused", "fused")


# What does instead: the general kernel, its passes back, plain torch on a CPU, layer by layer.
INSTEAD = {
    "gpu_tiles.json": ("tiled", "passes", "explicit", "fused"),
    "mlp_tiles.json": ("rows", "rows", "explicit", "layers"),
    "cpu.json": ("rows", "rows", "aten", "fused"),
    "wide.json": ("rows", "rows", "explicit", "fused"),
    "launches.json": ("rows", "rows", "explicit", "fused"),
}
DAMAGE = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "not-json": lambda text: "__import__('os')._exit(3)",
    "a-list": lambda text: "[1, 2]",
    "a-number": lambda text: "1",
    "nothing-in-it": lambda text: "{}",
    "wrong-types": lambda text: '{"columns": 1, "rows": 1, "thresholds": "x", "devices": null}',
    "lists-inside": lambda text: '{"columns": [], "rows": [[]], "thresholds": {"any": []}, "devices": []}',
    "too-deep": lambda text: "[" * 100_000,
    "not-text": lambda text: b"\xff\xfe\x00",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", NAMES)
def test_damaged_tables_are_ignored_and_named(folder, name, damage):
    damaged = damage((folder / name).read_text())
    (folder / name).write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.warns(UserWarning, match="^perceptriton ignores ") as said:
        layer, wide, cpu, network = (choices(), choices())[1]
    assert [str(folder / name) in str(warning.message) for warning in said] == [True], "said once"
    found = (layer.forward.impl, layer.backward.impl, cpu.forward.impl, network.forward.impl)
    assert found == INSTEAD[name]
    assert wide.forward.impl == "library"


def test_missing_tables_are_as_good_as_damaged_ones(folder):
    for name in NAMES:
        (folder / name).unlink()
    with pytest.warns(UserWarning, match="FileNotFoundError") as said:
        layer, wide, cpu, network = choices()
    named = {str(warning.message).partition(": ")[0] for warning in said}
    assert named == {f"perceptriton ignores {folder / name}" for name in NAMES}
    assert (layer.forward.impl, cpu.forward.impl, network.forward.impl) == ("tiled", "aten", "layers")
    assert wide.forward.impl == "library"
    assert explain((4096, 1024), (1024, 1024), torch.bfloat16, H100, impl="triton").forward.impl == "tiled"


def first(op, layout="aligned"):
    """The place of the first row of that op and layout, by the names of its columns."""

    def place(document):
        row = next(row for row in document["rows"] if row[1] == op and row[3] == layout)
        return Row(document["columns"], row)

    return place


class Row:
    """A row of a table, in which a value can be set by the name of its column."""

    def __init__(self, columns, row):
        self.columns, self.row = columns, row

    def __setitem__(self, column, value):
        self.row[self.columns.index(column)] = value


def whole(document):
    return document


def every(document):
    return document["rows"]


FWD, BWD, NET = first("linear_act_fwd"), first("linear_act_bwd", "ragged"), first("mlp_fwd", "both")
TMA, LAYERS, NETS = first("linear_act_fwd", "tma"), "gpu_tiles.json", "mlp_tiles.json"
NUMBERS = [128, 4, 2, 10]

# The entry that is changed, and into what.
ABSURD = {
    "negative-tile": (LAYERS, FWD, "block_m", -128),
    "huge-block": (LAYERS, BWD, "block_m", 1 << 20),
    "block-of-96": (LAYERS, FWD, "block_m", 96),
    "block-of-8": (LAYERS, FWD, "block_m", 8),
    "three-warps": (LAYERS, FWD, "num_warps", 3),
    "no-stages": (LAYERS, FWD, "num_stages", 0),
    "nine-stages": (LAYERS, FWD, "num_stages", 9),
    "fractions": (LAYERS, FWD, "block_m", 64.0),
    "truth-values": (LAYERS, FWD, "num_warps", True),
    "text-for-a-number": (LAYERS, FWD, "num_stages", "2"),
    "short-row": (LAYERS, every, 0, ["sm_90", "linear_act_fwd", "half", "aligned", [16, 16], 128, 4]),
    "long-row": (LAYERS, every, 0, ["sm_90", "linear_act_fwd", "half", "aligned", [16, 16], *NUMBERS, 1]),
    "no-row": (LAYERS, every, 0, None),
    "no-rows": (LAYERS, whole, "rows", []),
    "unknown-column": (LAYERS, lambda d: d["columns"], 5, "block_q"),
    "lost-column": (LAYERS, whole, "columns", []),
    "no-width": (LAYERS, FWD, "widths", ["os.x", 64]),
    "one-width-of-two": (LAYERS, FWD, "widths", [64]),
    "three-widths": (LAYERS, FWD, "widths", [64, 64, 64]),
    "width-of-48": (LAYERS, FWD, "widths", [48, 64]),
    "unknown-chip": (LAYERS, FWD, "chip", "sm_900"),
    "unknown-op": (LAYERS, FWD, "op", "linear_act"),
    "unknown-kind": (LAYERS, FWD, "product", "fp8"),
    "another-ops-layout": (NETS, NET, "layout", "aligned"),
    "one-width": (NETS, NET, "widths", [64]),
    "resident-twice": (NETS, NET, "resident", 2),
    "no-programs": (NETS, NET, "programs_per_sm", 0),
    "too-many-programs": (NETS, NET, "programs_per_sm", 33),
    "negative-limit": ("cpu.json", lambda d: d["thresholds"]["any"]["float32"], "small", -1),
    "text-for-a-limit": ("cpu.json", lambda d: d["thresholds"]["AMD"]["float32"], "chunk_bytes", "1 << 20"),
    "half-a-pair": ("cpu.json", lambda d: d["thresholds"]["any"]["float32"], "few_outputs", [1 << 20]),
    "half-a-rule": ("cpu.json", lambda d: d["thresholds"]["any"]["float32"], "forward", {"min_macs": 1}),
    "split-of-rules": ("cpu.json", lambda d: d["thresholds"]["AMD"]["float32"], "split", {"rows": 1024}),
    "unknown-bound": (
        "cpu.json",
        lambda d: d["thresholds"]["AMD"]["float32"],
        "dx",
        {"min_macs": 1, "min_width": 1, "min_in": 1, "max_out": 9},
    ),
    "unknown-dtype": ("cpu.json", lambda d: d["thresholds"]["AMD"], "float8", {}),
    "huge-stages": ("wide.json", TMA, "num_stages", 1 << 20),
    "three-subtiles": ("wide.json", TMA, "subtiles", 3),
    "flattened-twice": ("wide.json", TMA, "flatten", 2),
    "no-devices": ("wide.json", whole, "devices", None),
    "no-shape": (
        "wide.json",
        lambda d: d["devices"],
        "NVIDIA H100",
        {"torch": "", "triton": "", "date": "", "rows": {"half": [{}]}},
    ),
}


@pytest.mark.parametrize(("name", "place", "key", "value"), ABSURD.values(), ids=ABSURD)
def test_absurd_entries_are_not_believed(folder, name, place, key, value):
    document = json.loads((folder / name).read_text())
    place(document)[key] = value
    (folder / name).write_text(json.dumps(document))
    with pytest.warns(UserWarning, match=name):
        tables.read_table(name)
    assert tables.read_table(name) is tables.READERS[name][1]


def test_a_row_says_what_is_wrong_with_it():
    row = ("sm_90", "linear_act_fwd", "half", "aligned", (16, 16), 128, 4, 2, 10)
    tables.TileRow(*row)
    for place, value, message in (
        (0, "sm_70", "chip of a tile: 'sm_70' is none of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"),
        (1, 5, "op of a tile: 5 is none of linear_act_fwd, .*"),
        (3, ["tma"], r"layout of a tile: \['tma'\] is none of aligned, ragged, tma"),
        (4, (16, 24), "widths of a tile: 24 is none of 16, 32, 64, 128, 256"),
        (6, 3, "num_warps of a tile: 3 is none of 1, 2, 4, 8, 16"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            tables.TileRow(*row[:place], value, *row[place + 1 :])


def test_results_do_not_depend_on_tables(folder):
    """Layers large enough that the table of the CPU is asked."""
    from perceptriton.mlp import linear_act

    x, weight = torch.randn(512, 128), torch.randn(256, 128)
    (folder / "cpu.json").write_text("{")
    with pytest.warns(UserWarning, match=r"cpu\.json"):
        y = linear_act(x, weight)
    assert torch.equal(y, torch.sigmoid(x @ weight.t()))
