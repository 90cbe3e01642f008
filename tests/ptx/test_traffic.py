# SPDX-License-Identifier: Apache-2.0
"""What compiled kernels move, against the least that the plans' formulas say, and how well their accesses lie.

`traffic.json` has, for each case, the bytes that its kernels ask for over the formula's, and for each kernel the
sectors of global memory and the wavefronts of shared memory over the fewest for the same bytes, and the barriers that a
warp meets in a tile of rows. A figure that is 5% worse fails. `pytest --write-traffic tests/ptx/test_traffic.py` writes
the table.
"""

import itertools
import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from perceptriton.kernels import Device, plan
from perceptriton.kernels.records import Plan, TrainConfig, TrainPlan

driver = pytest.importorskip("ptx.driver", reason="needs triton")
from perceptriton.kernels.gpu import layer, network, train, wide  # noqa: E402 (without triton there is none)

pytestmark = pytest.mark.emulated

TABLE = Path(__file__).with_name("traffic.json")
WRITTEN_BY = "3.7.1"  # triton: others lay operands out in other ways
WORSE = 1.05
UNITS = 1  # multiprocessors: programs walk many tiles each, as they do on large inputs
CHIPS = {"sm_80": 80, "sm_90": 90}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
ROW_TILES = 64
SIZE = {torch.float32: 4, torch.bfloat16: 2}


def normal(*shape, dtype):
    return torch.randn(*shape).div(shape[-1] ** 0.5).to(dtype)


def layer_forward(device, dtype):
    k, n = 64, 64
    own = plan.linear_act_fwd(1 << 16, k, n, NAMES[dtype], "ieee", device)
    m = ROW_TILES * own.tile.block_m
    layer.linear_act_fwd(normal(m, k, dtype=dtype), normal(n, k, dtype=dtype), normal(n, dtype=dtype), "sigmoid", own)
    return plan.predict(m, k, n, NAMES[dtype], own).bytes


def layer_backward(device, dtype):
    k, n = (64, 64) if dtype is torch.bfloat16 else (32, 32)
    own = plan.linear_act_bwd(1 << 16, k, n, NAMES[dtype], "ieee", device)
    assert own.impl == "rows"
    m = ROW_TILES * own.tile.block_m
    dy, y, x = (normal(m, width, dtype=dtype) for width in (n, n, k))
    layer.linear_act_bwd(dy, y, x, normal(n, k, dtype=dtype), "sigmoid", (True, True, True), own)
    # fp32 sums of each program, written and read.
    slots = 8 * own.programs * n * (k + 1) if own.programs > 1 else 0
    return plan.predict_bwd(m, k, n, NAMES[dtype], own).bytes + slots


def tiled_forward(device, dtype):
    """A product whose output tiles each read their rows of x and of the weight."""
    kind = "ieee" if dtype is torch.float32 else "half"
    tile = plan.layer.TILED.get(f"{kind} on sm_{device.arch}", plan.layer.TILED[kind])[-1]
    m, n, k = 8 * tile.block_m, 8 * tile.block_n, 4 * tile.block_k
    own = Plan("tiled", "the test says so", tile, 64)
    layer.linear_act_fwd(normal(m, k, dtype=dtype), normal(n, k, dtype=dtype), normal(n, dtype=dtype), "sigmoid", own)
    return SIZE[dtype] * (8 * (m * k + n * k) + n + m * n)


def pass_backward(device, dtype):
    """dz and dbias of a layer whose products the library computes."""
    m, n = 2048, 256
    own = plan.linear_act_bwd(m, 1024, n, NAMES[dtype], "ieee", device, "triton")
    layer.act_bwd(normal(m, n, dtype=dtype), normal(m, n, dtype=dtype), "sigmoid", True, own)
    slots = sum(launch.grid[0] for launch in driver.launched if launch.name == "act_bwd_kernel")
    return SIZE[dtype] * (3 * m * n + n) + 8 * slots * n


WIDTHS = (16, 32, 32, 8)


def network_tensors(m, dtype):
    weights = tuple(normal(n, k, dtype=dtype) for k, n in itertools.pairwise(WIDTHS))
    biases = tuple(normal(n, dtype=dtype) for n in WIDTHS[1:])
    return normal(m, WIDTHS[0], dtype=dtype), weights, biases


def network_plans(device, dtype, save=True):
    forward = plan.mlp_fwd(1 << 14, WIDTHS, NAMES[dtype], "ieee", device, save, False, "triton")
    backward = plan.mlp_bwd(1 << 14, WIDTHS, NAMES[dtype], "ieee", device, False, "triton")
    assert {forward.impl, backward.impl} == {"fused"}
    return forward, backward


def network_forward(device, dtype):
    forward, _ = network_plans(device, dtype, save=False)
    m = ROW_TILES * forward.segments[0].tile.block_m
    network.mlp_fwd(*network_tensors(m, dtype), "sigmoid", "sigmoid", forward, ())
    return plan.mlp_bytes(m, WIDTHS, SIZE[dtype], forward)


def network_step(device, dtype):
    """A forward pass that keeps what the backward pass wants, and that."""
    forward, backward = network_plans(device, dtype)
    m = ROW_TILES * max(own.tile.block_m for own in (*forward.segments, *backward.segments))
    x, weights, biases = network_tensors(m, dtype)
    _, saved = network.mlp_fwd(x, weights, biases, "sigmoid", "sigmoid", forward, backward.boundaries)
    wanted = True, (True,) * len(weights), (True,) * len(weights)
    dy = normal(m, WIDTHS[-1], dtype=dtype)
    network.mlp_bwd(dy, x, saved, weights, biases, "sigmoid", "sigmoid", wanted, backward)
    return plan.mlp_bytes(m, WIDTHS, SIZE[dtype], forward, backward)


def training(own, widths, members, samples, steps=4):
    """Parameters in and out once, and in each step the batch of samples."""
    config = TrainConfig(widths)
    parameters = []
    for k, n in itertools.pairwise(widths):
        parameters += [normal(members, n, k, dtype=torch.float32), normal(members, n, dtype=torch.float32)]
    x, y = normal(1, samples, widths[0], dtype=torch.float32), torch.rand(1, samples, widths[-1])
    losses, rates = torch.zeros(0, members), torch.full((members,), 0.1)
    loop = train.KernelLoop(config, tuple(parameters), (), (), rates, x, y, samples, 0, own)
    loop.run(None, 0, steps, 0, losses)
    programs = -(-members // (own.networks or 1))
    once = samples <= own.rows
    batch = programs * samples * (widths[0] + widths[-1])
    return 4 * (2 * sum(p.numel() for p in parameters) + members + (1 if once else steps) * batch)


def lane_training(device, dtype):
    return training(TrainPlan("lane", "the test says so", rows=4, networks=32, num_warps=1), (2, 2, 1), 64, 4)


def block_training(device, dtype):
    return training(TrainPlan("block", "the test says so", rows=16, num_warps=4), (16, 32, 8), 4, 64)


def wide_tile(kind, device):
    return next(iter(plan.wide_candidates(kind, device.arch)))


def wide_forward(device, dtype):
    tile = wide_tile("half" if dtype is torch.bfloat16 else "tf32", device)
    m, n, k = 8 * tile.block_m, 4 * tile.block_n, 4 * tile.block_k
    own = Plan("tma", "the test says so", tile, UNITS, "ieee" if dtype is torch.bfloat16 else "tf32")
    wide.linear_act_fwd(normal(m, k, dtype=dtype), normal(n, k, dtype=dtype), normal(n, dtype=dtype), "sigmoid", own)
    return SIZE[dtype] * (4 * m * k + 8 * n * k + n + m * n)


def wide_backward(device, dtype):
    tile = wide_tile("dgrad-half" if dtype is torch.bfloat16 else "dgrad-tf32", device)
    m, n, k = 8 * tile.block_m, 4 * tile.block_n, 4 * tile.block_k  # dh (m, n) = dz (m, k) @ weight (k, n)
    own = Plan("tma", "the test says so", tile, UNITS, "ieee" if dtype is torch.bfloat16 else "tf32")
    h = torch.rand(m, n).to(dtype)
    wide.linear_act_dgrad(normal(m, k, dtype=dtype), normal(k, n, dtype=dtype), h, "sigmoid", True, own)
    slots = 8 * n * (m // tile.block_m)
    return SIZE[dtype] * (4 * m * k + 8 * n * k + 2 * m * n + n) + slots


CASES = {
    own.__name__: own
    for own in (
        layer_forward,
        layer_backward,
        tiled_forward,
        pass_backward,
        network_forward,
        network_step,
        lane_training,
        block_training,
        wide_forward,
        wide_backward,
    )
}
DTYPES = {own: tuple(NAMES) for own in CASES} | {"lane_training": (torch.float32,), "block_training": (torch.float32,)}
MEASURED = [
    (chip, case, dtype)
    for chip in CHIPS
    for case in CASES
    for dtype in DTYPES[case]
    if chip == "sm_90" or not case.startswith("wide")
]


def measure(chip, case, dtype):
    """{"bytes": asked for / least, kernel: {"sectors": asked for / needed, "wavefronts": .., "barriers": ..}}."""
    torch.manual_seed(0)
    with driver.activated(CHIPS[chip]):
        least = CASES[case](Device("cuda", CHIPS[chip], UNITS, triton=True), dtype)
        launched, moved = list(driver.launched), 0
    sums = defaultdict(lambda: defaultdict(int))
    for launch in launched:
        moved += launch.counters["ld bytes"] + launch.counters["st bytes"]
        for name in ("sectors", "wavefronts"):
            for key in (f"ld {name}", f"st {name}", f"ld.shared {name}", f"st.shared {name}"):
                sums[launch.name][name] += launch.counters[key]
                sums[launch.name][f"{name} needed"] += launch.counters[f"{key} needed"]
        sums[launch.name]["barriers"] += launch.counters["barrier instructions"] * 32 / launch.program.entry.threads
    rows = {}
    for kernel, own in sums.items():
        names = [name for name in ("sectors", "wavefronts") if own[f"{name} needed"]]
        rows[kernel] = {name: round(own[name] / own[f"{name} needed"], 3) for name in names}
        rows[kernel]["barriers"] = round(own["barriers"] / ROW_TILES, 3)
    return {"bytes": round(moved / least, 3), **rows}


def worse(found, known):
    """Figures that are 5% worse than the table's, or that it lacks."""
    flat = lambda row: {  # noqa: E731
        f"{kernel} {name}".strip(): value
        for kernel, own in row.items()
        for name, value in (own.items() if isinstance(own, dict) else [("", own)])
    }
    known = flat(known)
    return {key: (value, known.get(key)) for key, value in flat(found).items() if value > WORSE * known.get(key, 0)}


@pytest.mark.skipif(version("triton") != WRITTEN_BY, reason=f"the table was written by triton {WRITTEN_BY}")
@pytest.mark.parametrize(("chip", "case", "dtype"), MEASURED, ids=lambda own: NAMES.get(own, own))
def test_no_kernel_moves_more_than_it_did(request, chip, case, dtype):
    found = measure(chip, case, dtype)
    key = f"{case} {NAMES[dtype]}"
    if request.config.getoption("--write-traffic"):
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        table.setdefault(chip, {})[key] = found
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    known = json.loads(TABLE.read_text()).get(chip, {}).get(key, {})
    assert worse(found, known) == {}


def test_the_table_has_these_cases():
    table = json.loads(TABLE.read_text())
    assert {(chip, key) for chip in table for key in table[chip]} == {
        (chip, f"{case} {NAMES[dtype]}") for chip, case, dtype in MEASURED
    }


def test_worse_figures_are_found():
    known = {"bytes": 1.0, "a": {"sectors": 1.0, "wavefronts": 2.0}}
    assert worse(known, known) == {}
    assert worse({"bytes": 1.04, "a": {"sectors": 1.04, "wavefronts": 2.09}}, known) == {}
    assert set(worse({"bytes": 1.06, "a": {"sectors": 1.06, "wavefronts": 2.11}}, known)) == {
        "bytes",
        "a sectors",
        "a wavefronts",
    }
    assert set(worse({"bytes": 1.0, "b": {"sectors": 1.0}}, known)) == {"b sectors"}
