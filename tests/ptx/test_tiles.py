# SPDX-License-Identifier: Apache-2.0
"""Every tile that a plan can pick, as compiled code against fp64: `make test-compiled-all`."""

import dataclasses
import itertools
import os

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import core
from compiling import TILED_FOR

from perceptriton.kernels import plan, records, tables
from perceptriton.kernels.records import MlpPlan, MlpSegment, Plan, TrainConfig, TrainPlan

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the interpreter replaces the compiler in this process; run without it", allow_module_level=True)
driver = pytest.importorskip("ptx.driver", reason="needs triton")
from perceptriton.kernels.gpu import layer, network, train, wide  # noqa: E402 (without triton there is none)

from . import machine  # noqa: E402

pytestmark = pytest.mark.emulated

KINDS = {"half": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "ieee": (torch.float32, "ieee")}
ALLOWED = {"tf32": 2e-3, "bf16x3": 2e-5}  # what a product of fewer bits adds, for each layer
NETWORK_OPS = ("mlp_infer", "mlp_fwd", "mlp_bwd")


def tiles(table, op, kind, layout):
    """(chip, row) of a table. For sm_86 only those that sm_80 has not: its code is the same (test_compile.py)."""
    known = set()
    for chip in TILED_FOR:
        for row in tables.tile_rows(table, f"sm_{chip}", op, kind, layout):
            own = dataclasses.replace(row, chip="sm_80", programs_per_sm=1)
            if chip != 86 or own not in known:
                yield chip, row
            known.add(own)


def rows_of(tile):
    """Two whole tiles and a half, for two programs."""
    return 2 * tile.block_m + tile.block_m // 2 + 1


def check(actual, tensors, function, dtype, precision="ieee", layers=1):
    """Each result against `function` of the same tensors in fp64."""
    expected, exact = function(*tensors), function(*(t.double() for t in tensors))
    allowance = ALLOWED.get(precision, 0) * layers
    names = [str(number) for number in range(len(actual))]
    cases.assert_as_good_as_torch(actual, expected, exact, dtype, names, allowance)


# --- layers ----------------------------------------------------------------------------------------------------------


def _layers():
    for op, kind in itertools.product(("linear_act_fwd", "linear_act_bwd"), KINDS):
        for layout in ("aligned", "ragged"):
            for chip, row in tiles("gpu_tiles.json", op, kind, layout):
                k, n = row.widths if layout == "aligned" else (row.widths[0] - 3, row.widths[1] - 5)
                yield f"sm_{chip}-{op}-{kind}-{k}x{n}", (chip, op, kind, k, n, row.layer_tile)


LAYERS = dict(_layers())


# By wgmma, and by mma.sync.
FIRST_LAYERS = "sm_90-linear_act_fwd-half-32x32", "sm_80-linear_act_bwd-half-32x16"


def layer_gradients(dy, y, x, weight):
    dz = dy * y * (1 - y)
    return dz @ weight, dz.t() @ x, dz.sum(0)


@pytest.mark.parametrize("name", core(LAYERS, *FIRST_LAYERS))
def test_layers(name):
    chip, op, kind, k, n, tile = LAYERS[name]
    dtype, precision = KINDS[kind]
    x, weight, bias, dy = cases.make_layer(rows_of(tile), k, n, dtype)
    own = Plan("rows", "the test says so", tile, 2, precision)
    with driver.activated(chip):
        if op == "linear_act_fwd":
            actual = [layer.linear_act_fwd(x, weight, bias, "sigmoid", own)]
            check(actual, (x, weight, bias), lambda *t: [cases.plain(*t)], dtype, precision)
        else:
            y = cases.plain(x, weight, bias)
            actual = layer.linear_act_bwd(dy, y, x, weight, "sigmoid", (True, True, True), own)
            check(actual, (dy, y, x, weight), layer_gradients, dtype, precision)


TILED = {
    f"{kind}-{tile.block_m}x{tile.block_n}": (kind, tile) for kind, tiles in plan.layer.TILED.items() for tile in tiles
}


@pytest.mark.more
@pytest.mark.parametrize("chip", TILED_FOR)
@pytest.mark.parametrize("name", TILED)
def test_output_tiles(name, chip):
    kind, tile = TILED[name]
    dtype, precision = KINDS[kind.split()[0]]
    if " on " in kind and kind.split()[-1] != f"sm_{chip}":
        pytest.skip("the tile is of the other chip")
    m, k, n = 2 * tile.block_m + 3, 3 * tile.block_k + 5, tile.block_n + 9
    x, weight, bias, _ = cases.make_layer(m, k, n, dtype)
    own = Plan("tiled", "the test says so", tile, 6, precision)
    with driver.activated(chip):
        actual = [layer.linear_act_fwd(x, weight, bias, "tanh", own)]
    check(actual, (x, weight, bias), lambda *t: [cases.plain(*t, "tanh")], dtype, precision)


# --- networks --------------------------------------------------------------------------------------------------------


def _networks():
    for op, kind in itertools.product(NETWORK_OPS, KINDS):
        for layout in tables.LAYOUTS[op]:
            for chip, row in tiles("mlp_tiles.json", op, kind, layout):
                widths = list(row.widths)
                widths[0] -= 3 * (layout in ("in", "both"))
                widths[-1] -= 5 * (layout in ("out", "both"))
                if layout != "exact":
                    widths[1:-1] = [width - 1 for width in widths[1:-1]]
                name = f"sm_{chip}-{op}-{kind}-{layout}-{'-'.join(map(str, widths))}"
                yield name, (chip, op, kind, tuple(widths), row.network_tile)


NETWORKS = dict(_networks())


@pytest.mark.parametrize("name", core(NETWORKS, "sm_90-mlp_bwd-ieee-exact-32-32"))
def test_networks(name):
    chip, op, kind, widths, tile = NETWORKS[name]
    dtype, precision = KINDS[kind]
    layers = len(widths) - 1
    x, weights, biases, dy = cases.make_network(widths, (rows_of(tile),), dtype)
    own = MlpPlan("fused", "the test says so", (MlpSegment(0, layers, tile, 2),), precision)
    parameters = tuple(weights), tuple(biases), "sigmoid", "sigmoid"

    def forward(x, *parameters):
        return [cases.plain_network(x, parameters[:layers], parameters[layers:])]

    def gradients(dy, *tensors):
        inputs = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(forward(*inputs), inputs, dy)

    with driver.activated(chip):
        if op != "mlp_bwd":
            y, _ = network.mlp_fwd(x, *parameters, own, tuple(range(1, layers)) if op == "mlp_fwd" else ())
            check([y], (x, *weights, *biases), forward, dtype, precision, layers)
            return
        wanted = True, (True,) * layers, (True,) * layers
        dx, dweights, dbiases = network.mlp_bwd(dy, x, (), *parameters, wanted, own)
    tensors = dy, x, *weights, *biases
    expected, exact = gradients(*tensors), gradients(*(t.double() for t in tensors))
    ends = 0, 1, 1 + layers, 1 + 2 * layers
    actual = (dx, *dweights, *dbiases)
    kinds = {
        of: list(zip(*(results[first:last] for results in (actual, expected, exact)), strict=True))
        for of, (first, last) in zip(("dx", "dweight", "dbias"), itertools.pairwise(ends), strict=True)
    }
    cases.assert_as_good_as_the_worst(kinds, dtype, ALLOWED.get(precision, 0) * layers)


# --- training loops --------------------------------------------------------------------------------------------------

LOOPS = {
    "lane": TrainPlan("lane", "the test says so", rows=4, networks=32, num_warps=1),
    "block": TrainPlan("block", "the test says so", rows=16, num_warps=4),
    "spread": TrainPlan("block", "the test says so", rows=16, num_warps=4, programs=2),
}


@pytest.mark.parametrize("chip", TILED_FOR)
@pytest.mark.parametrize("name", core(LOOPS, "lane"))
def test_training(name, chip):
    """Five steps of two networks; tests/kernels/test_training_kernels.py has the rest."""
    x, y = torch.randn(1, 4, 2), torch.rand(1, 4, 1)
    parameters = [torch.randn(2, *size) for size in ((3, 2), (3,), (1, 3), (1,))]
    rate, losses = torch.full((2,), 0.3), torch.empty(0, 2)
    expected, exact = (
        [p.clone().to(dtype).requires_grad_() for p in parameters] for dtype in (torch.float32, torch.float64)
    )
    for inputs in (expected, exact):
        for _ in range(5):
            z = torch.sigmoid(x.to(inputs[0].dtype) @ inputs[0].mT + inputs[1][:, None])
            p = torch.sigmoid(z @ inputs[2].mT + inputs[3][:, None])
            loss = F.binary_cross_entropy(p, y.to(p.dtype).expand_as(p), reduction="sum") / 4
            for own, gradient in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
                own.data -= 0.3 * gradient
    actual = [p.clone() for p in parameters]
    with driver.activated(chip):
        loop = train.KernelLoop(TrainConfig((2, 3, 1)), actual, (), (), rate, x, y, 4, 0, LOOPS[name])
        loop.run(None, 0, 5, 0, losses)
    cases.assert_as_good_as_torch(actual, expected, exact, torch.float32, ("weight", "bias", "weight", "bias"))


@pytest.mark.core
def test_training_does_not_ask_which_program_is_the_last(monkeypatch):
    config = TrainConfig((2, 3, 1), momentum=0.9)
    initial = [torch.randn(2, *size) for size in ((3, 2), (3,), (1, 3), (1,))]
    x, y, order = torch.randn(1, 70, 2), torch.rand(1, 70, 1), torch.stack([torch.randperm(70) for _ in range(3)]).int()
    results = []

    def one_by_one(launch, turns):
        for program in turns(range(launch.grid[0] * launch.grid[1])):
            machine.Batch(launch, np.array([program])).run()
        return launch

    for turns in (list, lambda programs: programs[::-1], lambda programs: (*programs[1::2], *programs[::2])):
        monkeypatch.setattr(machine.Launch, "run", lambda launch, turns=turns: one_by_one(launch, turns))
        tensors = [torch.zeros(5, 2), *(p.clone() for p in initial), *(torch.zeros_like(p) for p in initial)]
        losses, parameters, first = tensors[0], tensors[1:5], tensors[5:]
        with driver.activated(90):
            own = dataclasses.replace(LOOPS["spread"], programs=3)
            loop = train.KernelLoop(config, parameters, first, (), torch.full((2,), 0.3), x, y, 40, 0, own)
            loop.run(order, 0, 5, 1, losses)
        results.append(tensors)
    assert all(p.isfinite().all() and not torch.equal(p, own) for p, own in zip(parameters, initial, strict=True))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


# --- wide layers by TMA ----------------------------------------------------------------------------------------------

PRODUCTS = ("half", "tf32", *records.SPLITS)
WIDE = {
    f"{kind}-{'-'.join(map(str, tables.wide_row(tile)))}": (kind, tile)
    for kind in (*PRODUCTS, *(f"dgrad-{own}" for own in PRODUCTS), *(f"wgrad-{own}" for own in records.SPLITS))
    for tile in plan.wide_candidates(kind, 90)
}


def wide_gradient(dz, weight, h):
    below = (dz @ weight) * h * (1 - h)
    return below, below.sum(0)


@pytest.mark.parametrize("name", core(WIDE, next(iter(WIDE))))
def test_wide(name):
    kind, tile = WIDE[name]
    of, product = kind.rpartition("-")[::2]
    dtype, precision = KINDS.get(product, (torch.float32, product))
    m, k, n = tile.block_m + 9, 2 * tile.block_k + 8, tile.block_n + 24
    with driver.activated(90):
        if of == "wgrad":
            dz, h = (cases.make_layer(k, width, 4, dtype, seed=seed)[0] for seed, width in enumerate((m - 1, n)))
            for splits in (1, 2)[: plan.wide_splits(1, 1 << 20, 1, tile, 132)]:
                own = Plan("tma", "the test says so", tile, 3, precision, splits=splits)
                actual = [wide.linear_act_wgrad(dz, h, own)]
                check(actual, (dz, h), lambda dz, h: [dz.t() @ h], dtype, precision)
            return
        own = Plan("tma", "the test says so", tile, 2, precision)
        x, weight, bias, _ = cases.make_layer(m, k, n, dtype)
        if of == "dgrad":
            h = torch.rand(m, n).to(dtype)
            weight = weight.t().contiguous()
            actual = wide.linear_act_dgrad(x, weight, h, "sigmoid", True, own)
            check(actual, (x, weight, h), wide_gradient, dtype, precision)
        else:
            actual = [wide.linear_act_fwd(x, weight, bias, "sigmoid", own)]
            check(actual, (x, weight, bias), lambda *t: [cases.plain(*t)], dtype, precision)
