# SPDX-License-Identifier: Apache-2.0
"""Measures on a GPU which wide layers the TMA kernel computes faster than the library, for kernels/tuned/wide.json.

For each kind of product and shape, every candidate tile of the chip is first checked against fp64, by the yardstick of
the tests, then timed in turn with torch's product and in-place activation; the kinds "dgrad-...", which lead from dz of
a layer to dz and dbias of the layer below, with torch's product and this package's pass; the kinds "wgrad-...", the
gradients of weights, with torch's product. Where tiles are few, each is tried with its sum cut into parts too. The row
of a shape names the fastest tile, or null where none beats the library by the margin. A row is written as soon as it is
measured, and nothing of other devices is touched. Plans pick by these rows from the next process on.

--dry-run proves the harness on a CPU: triton's interpreter, toy shapes, two tiles of each kind, a table of its own.
Its times mean nothing.

--resume leaves out what the table has measured on this device already, as after a run that was cut off.

usage: python benches/tune.py measure [--kinds half,tf32x3] [--seconds S] [--out FILE] [--resume] [--dry-run]
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import timing
import torch
from contenders import tf32

from perceptriton.kernels import plan as planning
from perceptriton.kernels import records, reference, tables
from perceptriton.kernels.records import Plan, WideTile
from perceptriton.kernels.tables import TABLES, WIDE_TILES

from . import common

ROOT = Path(__file__).parents[2]
PRODUCTS = ("half", "tf32", *records.SPLITS)
# Products forward, for dz of the layer below, and for dweight, where the library has none in fp32 on tensor cores.
KINDS = (*PRODUCTS, *(f"dgrad-{product}" for product in PRODUCTS), *(f"wgrad-{split}" for split in records.SPLITS))
# rows, in_features, out_features: squares, the layers of the benchmark suite, batches of inference, heads.
SHAPES = [(s, s, s) for s in (1024, 2048, 4096, 8192)] + [
    (16384, 4096, 4096),
    (4096, 1024, 1024),
    (131072, 256, 256),
    (65536, 512, 512),
    (128, 8192, 8192),
    (1024, 8192, 8192),
    (16384, 2048, 4096),
    (16384, 1024, 128),
]
TOYS = [(70, 264, 72), (130, 40, 136)]
# The pass that the library's product is followed by has one tile for all chips.
PASSES = records.Device("cuda", 90, 132, triton=True)
# A tile has to win by more than what repeated measurements differ by.
MARGIN = 1.02
# The library of a CPU multiplies in fp32 where a GPU's has TF32: what a rehearsal may add to its error.
TF32_ON_CPU = 6e-4
# What a result may add to twice the library's error: the floors of the tests, and what a short product costs.
FLOOR = {"half": 2e-3, "tf32": 2e-6, "tf32x3": 2e-6, "bf16x6": 2e-6, "bf16x3": 2e-5}


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def sides(of: str, shape: tuple[int, int, int], dtype: torch.dtype, precision: str, device: torch.device):
    """(the truth in fp64, a function of nothing by the library, a function of a plan by the kernel)."""
    linear, wide = (importlib.import_module(f"perceptriton.kernels.gpu.{name}") for name in ("layer", "wide"))
    m, k, n = shape
    options: dict = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    x = torch.randn(m, k, **options).to(dtype)
    weight = (1.4 / math.sqrt(k) * torch.randn(n, k, **options)).to(dtype)
    if of == "wgrad":
        x, weight = x.t().contiguous(), weight.t().contiguous()
        truth = x.double().t() @ weight.double()
        return truth, lambda: torch.mm(x.t(), weight), lambda plan: wide.linear_act_wgrad(x, weight, plan)
    if of == "dgrad":
        weight = weight.t().contiguous()
        h = torch.rand(m, n, **options).to(dtype)
        passes = planning.linear_act_bwd(m, 4096, n, str(dtype)[6:], precision, PASSES, "triton")
        return (
            (x.double() @ weight.double()) * (h.double() * (1 - h.double())),
            lambda: linear.act_bwd(torch.mm(x, weight), h, "sigmoid", True, passes)[0],
            lambda plan: wide.linear_act_dgrad(x, weight, h, "sigmoid", True, plan)[0],
        )
    bias = torch.randn(n, **options).to(dtype)
    return (
        torch.sigmoid(torch.addmm(bias.double(), x.double(), weight.double().t())),
        lambda: reference.linear_act_fwd(x, weight, bias, "sigmoid", Plan("library", "")),
        lambda plan: wide.linear_act_fwd(x, weight, bias, "sigmoid", plan),
    )


def measure(
    kind: str, shape: tuple[int, int, int], tiles, device: torch.device, units: int, seconds: float, wrong: list[str]
) -> dict | None:
    """The row of one shape, or None without a tile to time. Those whose results are wrong are said in `wrong`."""
    m, _, n = shape
    cuda = device.type == "cuda"
    of, product = kind.rpartition("-")[::2]
    sixteen = product == "half"
    # The interpreter has no bf16 products.
    dtype = torch.float32 if not sixteen else torch.bfloat16 if cuda else torch.float16
    precision = "ieee" if sixteen else product
    exact, library, kernel = sides(of, shape, dtype, precision, device)

    def step(tile: WideTile, splits: int):
        programs = min(-(-m // tile.block_m) * -(-n // tile.block_n) * splits, units * tiles[tile])
        return partial(kernel, Plan("tma", "", tile, programs, precision, splits=splits))

    # What the library's fp32 products are compared as: tf32 with tf32, the splits with fp32.
    with tf32() if product == "tf32" else contextlib.nullcontext():
        bound = 2 * relative_error(library(), exact) + FLOOR[product]
        if product == "tf32" and not exact.is_cuda:
            bound += TF32_ON_CPU
        steps = {"library": library}
        for tile in tiles:
            cuts = {1} if of == "dgrad" else {1, planning.wide_splits(*shape, tile, units)}
            for splits in sorted(cuts):
                error = relative_error(step(tile, splits)(), exact)
                if error <= bound:  # not so a NaN
                    steps[json.dumps([tables.wide_row(tile), splits])] = step(tile, splits)
                else:
                    wrong.append(f"{kind} {shape} {tile} in {splits}: error {error:.2e}, {bound:.2e} are allowed")
        del exact
        samples = timing.interleaved(steps, seconds=seconds, rounds=(5, 101), cuda=cuda)
    # What a loop on the host sees: for the smaller shapes that is the launch, three descriptors included.
    us = {name: 1e6 * own.seconds for name, own in samples.items()}
    library_us = us.pop("library")
    if not us:
        return None
    best = min(us, key=us.__getitem__)
    tile, splits = json.loads(best) if us[best] * MARGIN < library_us else (None, 1)
    return {
        "shape": list(shape),
        "tile": tile,
        **({"splits": splits} if splits > 1 else {}),
        "us": round(us[best], 2),
        "library_us": round(library_us, 2),
    }


def updated(document: dict, name: str, kind: str, row: dict) -> dict:
    """The table with one row more, or in place of the old one of that shape."""
    old = document["devices"].get(name, {"rows": {}})
    rows = [other for other in old["rows"].get(kind, []) if other["shape"] != row["shape"]] + [row]
    measured = {
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "date": common.today(),
        "rows": old["rows"] | {kind: rows},
    }
    return document | {"devices": document["devices"] | {name: measured}}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tune.py measure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", default=",".join(KINDS), help="of products, separated by commas")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each shape and kind")
    parser.add_argument(
        "--out", type=Path, help="the table (kernels/tuned/wide.json; dry run: .build/dry-run/wide.json)"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows of this device that are there")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))}: none of {', '.join(KINDS)}")
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        name, arch, units, device, shapes = "DRY RUN on a CPU", 90, 2, torch.device("cpu"), TOYS
    elif not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        sys.exit("not run: no CUDA device of compute capability 9.0; --dry-run needs none")
    else:
        properties = torch.cuda.get_device_properties(0)
        name, arch, units = properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count
        device, shapes = torch.device("cuda", 0), SHAPES
    out = options.out or (ROOT / ".build/dry-run" if options.dry_run else TABLES) / WIDE_TILES
    document = common.load(WIDE_TILES, out)
    wrong: list[str] = []
    for kind in kinds:
        tiles = planning.wide_candidates(kind, arch)
        if options.dry_run:
            smallest = sorted(tiles, key=lambda tile: tile.block_m * tile.block_n * tile.block_k)[:2]
            tiles = {tile: tiles[tile] for tile in smallest}
        there = document["devices"].get(name, {"rows": {}})["rows"].get(kind, []) if options.resume else []
        # The sum of a weight's gradient runs over the rows.
        own = [(n, m, k) for m, k, n in shapes] if kind.startswith("wgrad") else shapes
        for shape in own if tiles else ():
            if list(shape) in [row["shape"] for row in there]:
                continue
            if (row := measure(kind, shape, tiles, device, units, options.seconds, wrong)) is None:
                continue
            document = updated(document, name, kind, row)
            common.write(out, document, WIDE_TILES)
            print(f"{kind:12} {'x'.join(map(str, shape)):18} {row['library_us'] / row['us']:6.2f}x  {row['tile']}")
    print(f"{out}: {name}")
    if wrong:
        sys.exit("\n".join(["not timed, since their results are wrong:", *wrong]))
