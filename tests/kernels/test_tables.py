"""Damaged tables of tuned tiles: ignored with a warning that names the file, and never evaluated."""

import json
import subprocess
import sys
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
}
DAMAGE = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "not-json": lambda text: "__import__('os')._exit(3)",
    "a-list": lambda text: "[1, 2]",
    "a-number": lambda text: "1",
    "nothing-in-it": lambda text: "{}",
    "wrong-types": lambda text: '{"tiles": 1, "thresholds": "x", "candidates": [], "devices": null}',
    "lists-inside": lambda text: '{"tiles": [], "thresholds": {"any": []}, "candidates": {"sm_90": []}, "devices": []}',
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


def tiles(document):
    return document["tiles"]["sm_90"]


# The entry that is changed, and into what.
ABSURD = {
    "negative-tile": (
        "gpu_tiles.json",
        lambda d: tiles(d)["linear_act_fwd"]["half"]["aligned"],
        "64x64",
        [-128, 8, 2, 2],
    ),
    "huge-block": (
        "gpu_tiles.json",
        lambda d: tiles(d)["linear_act_bwd"]["ieee"]["ragged"],
        "16x16",
        [1 << 20, 8, 2, 2],
    ),
    "block-of-96": ("gpu_tiles.json", lambda d: tiles(d)["linear_act_fwd"]["tf32"]["aligned"], "16x16", [96, 4, 2, 2]),
    "three-warps": ("gpu_tiles.json", lambda d: tiles(d)["linear_act_fwd"]["half"]["aligned"], "16x16", [64, 3, 2, 2]),
    "no-stages": ("gpu_tiles.json", lambda d: tiles(d)["linear_act_fwd"]["half"]["aligned"], "16x16", [64, 4, 0, 2]),
    "fractions": ("gpu_tiles.json", lambda d: tiles(d)["linear_act_fwd"]["half"]["aligned"], "16x16", [64.0, 4, 2, 2]),
    "truth-values": (
        "gpu_tiles.json",
        lambda d: tiles(d)["linear_act_fwd"]["half"]["aligned"],
        "16x16",
        [64, 4, True, 2],
    ),
    "short-row": ("gpu_tiles.json", lambda d: tiles(d)["linear_act_fwd"]["half"]["aligned"], "16x16", [64, 4]),
    "no-width": ("gpu_tiles.json", lambda d: tiles(d)["linear_act_fwd"]["half"]["aligned"], "os.x", [64, 4, 2, 2]),
    "unknown-chip": ("gpu_tiles.json", lambda d: d["tiles"], "sm_900", {}),
    "unknown-op": ("gpu_tiles.json", lambda d: tiles(d), "linear_act", {}),
    "lost-kind": ("gpu_tiles.json", lambda d: tiles(d), "linear_act_fwd", {"half": {}}),
    "lost-layout": ("mlp_tiles.json", lambda d: tiles(d)["mlp_fwd"], "half", {"exact": {}}),
    "one-width": ("mlp_tiles.json", lambda d: tiles(d)["mlp_bwd"]["half"]["both"], "64", [16, 4, 1, 1, 1]),
    "resident-twice": ("mlp_tiles.json", lambda d: tiles(d)["mlp_fwd"]["half"]["both"], "64-64", [16, 4, 1, 2, 1]),
    "no-programs": ("mlp_tiles.json", lambda d: tiles(d)["mlp_fwd"]["half"]["both"], "64-64", [16, 4, 1, 1, 0]),
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
    "huge-stages": ("wide.json", lambda d: d["candidates"]["sm_90"], "half", [[128, 128, 64, 8, 1 << 20, 8, 1, 0, 0]]),
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


def test_results_do_not_depend_on_tables(folder):
    """Layers large enough that the table of the CPU is asked."""
    from perceptriton.mlp import linear_act

    x, weight = torch.randn(512, 128), torch.randn(256, 128)
    (folder / "cpu.json").write_text("{")
    with pytest.warns(UserWarning, match=r"cpu\.json"):
        y = linear_act(x, weight)
    assert torch.equal(y, torch.sigmoid(x @ weight.t()))


def test_import_reads_no_table():
    """What is damaged is found by those who ask for a plan, not by everyone who imports the package."""
    code = (
        "import json, perceptriton.mlp\n"
        "from perceptriton.kernels import tables\n"
        "assert tables.read_table.cache_info().currsize == 0\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd="/", timeout=120)
