# SPDX-License-Identifier: Apache-2.0
"""Measures from how many bytes on eager calls of our kernels beat those of torch, for kernels/tuned/launches.json.

Below that a GPU is done before the host has asked for the next call, and torch's calls may take the host less time
(kernels/crossover.py). A layer and a network, 64 wide, with 64 KiB to 256 MiB of x and y per layer, are timed as
torch's modules and as ours with no limit in force, without gradients and with them. What was measured elsewhere,
`--adopt FILE` puts into the table.
"""

import argparse
import importlib
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import atomic
import contenders
import timing
import torch
from stack_cases import MODES, Case

from perceptriton.kernels import crossover, devices, small, tables

from . import common

ROOT = Path(__file__).parents[2]
WIDTH, LAYERS = 64, {"layer": 1, "network": 5}  # two of the suites' stacks, whose kernels they share
SIZES = tuple(1 << power for power in (16, 20, *range(22, 29)))  # bytes of x and y, per layer
TOYS = tuple(1 << power for power in range(11, 17))
DTYPE = "bfloat16"


def case(name: str, nbytes: int) -> Case:
    """A stack whose layers have so many bytes of x and y."""
    rows = nbytes // (2 * WIDTH * torch.bfloat16.itemsize)
    return Case(f"{name}-{nbytes >> 20}-MiB", rows, (WIDTH,) * (LAYERS[name] + 1))


def crossing(sizes: Sequence[int], speedups: Sequence[float]) -> int | None:
    """Bytes from which on all speed-ups are at least 1, by a line through logarithms between two sizes.

    0 if they all are, None if that of the highest is not.
    """
    last = max((at for at, speedup in enumerate(speedups) if speedup < 1), default=-1)
    if last < 0:
        return 0
    if last == len(sizes) - 1:
        return None
    low, high = map(math.log, speedups[last : last + 2])
    return round(sizes[last] * (sizes[last + 1] / sizes[last]) ** (low / (low - high)))


def measure(name: str, mode: str, nbytes: int, device: str, seconds: float) -> dict:
    """One row: microseconds per call of each, and the median speed-up within rounds."""
    problem = contenders.Problem.make(case(name, nbytes), DTYPE, mode, device)
    check, steps = contenders.Check(problem), {}
    with torch.set_grad_enabled(problem.training):
        for impl in ("eager", "fused"):
            contender = contenders.IMPLS[impl].build(problem)
            check(contender)
            steps[impl] = contender.step
        samples = timing.interleaved(steps, seconds=seconds, cuda=device == "cuda")
    us = {f"{impl}_us": round(1e6 * own.seconds, 2) for impl, own in samples.items()}
    speedup = round(timing.speedup(samples["eager"], samples["fused"]), 3)
    return {"network": name, "mode": mode, "bytes": nbytes, **us, "speedup": speedup}


def document(rows: list[dict], sizes: Sequence[int], about: dict) -> dict:
    """Rows and what follows from them; nothing does where some are still to come."""

    def found(name: str, mode: str) -> int | None:
        own = [row["speedup"] for row in rows if (row["network"], row["mode"]) == (name, mode)]
        return crossing(sizes, own) if len(own) == len(sizes) else None

    return about | {"rows": rows} | {name: [found(name, mode) for mode in MODES] for name in LAYERS}


def adopt(measured: dict, out: Path) -> None:
    """Puts a complete document into the table."""
    if None in (limits := [limit for name in LAYERS for limit in measured[name]]):
        sys.exit(f"not complete, or slower than torch at every size: {limits}")
    row = {key: measured[key] for key in ("torch", "triton", "date", *LAYERS)}
    table = common.load(tables.LAUNCHES, out)
    common.write(out, table | {"devices": table["devices"] | {measured["device"]: row}}, tables.LAUNCHES)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tune.py launches", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing for each size and mode")
    parser.add_argument("--out", type=Path, default=ROOT / ".build" / "calibration.json", help="the JSON to write")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, which says nothing")
    parser.add_argument("--adopt", type=Path, metavar="FILE", help="put such a JSON into the table, measure nothing")
    options = parser.parse_args(arguments)
    if options.adopt:
        adopt(json.loads(options.adopt.read_text()), tables.TABLES / tables.LAUNCHES)
        return
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("not run: no CUDA device; --dry-run needs none")
    device, sizes = ("cpu", TOYS) if options.dry_run else ("cuda", SIZES)
    about = {
        "device": "DRY RUN on a CPU" if options.dry_run else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if devices.has_triton() else "none",
        "date": common.today(),
        "dtype": DTYPE,
    }
    crossover.eager_limit = lambda *_: 0
    small.few_on_gpu.cache_clear()
    rows: list[dict] = []
    for name, mode, nbytes in itertools.product(LAYERS, MODES, sizes):
        rows.append(row := measure(name, mode, nbytes, device, options.seconds))
        print(f"{name:8} {mode:17} {nbytes / (1 << 20):10.3f} MiB {row['speedup']:7.2f}x", flush=True)
        # Each time: a run may be cut off.
        result = document(rows, sizes, about)
        atomic.write(options.out, json.dumps(result, indent=2) + "\n")
    found = {name: result[name] for name in LAYERS}
    print(f"{options.out}: kernels win from so many bytes on, without and with gradients: {found}")
