# SPDX-License-Identifier: Apache-2.0
"""Times what eager calls ask of the host, for HOST and AUTOCAST_US in kernels/crossover.py; needs gcc, triton, no GPU.

Ours run as on an H200 down to a driver that does nothing (.ci/cache/libcuda.c), with tensors on the CPU in the place of
those on a GPU. torch's modules run on the CPU at one row and a width of 1, where dispatch is nearly all that they cost.
Both in turn in one process, on one thread; the median over rounds of the fastest call in each.
"""

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import atomic
import torch
from torch import nn

from perceptriton.mlp import MLP, LinearSigmoid

ROOT = Path(__file__).parents[2]
ROWS, WIDTH, LAYERS = 16, 64, (1, 2, 4, 8)


def step(model: nn.Module, x: torch.Tensor, training: bool, autocast: bool) -> Callable[[], None]:
    """A call of the model, with its backward pass if it trains; x wants no gradient."""
    region = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else contextlib.nullcontext
    with region():
        dy, parameters = torch.ones_like(model(x)), list(model.parameters())

    def forward() -> None:
        with torch.no_grad(), region():
            model(x)

    def both() -> None:
        with region():
            y = model(x)
        y.backward(dy)
        for p in parameters:
            p.grad = None

    return both if training else forward


def modules(width: int, layers: int) -> nn.Sequential:
    pairs = [(nn.Linear(width, width), nn.Sigmoid()) for _ in range(layers)]
    return nn.Sequential(*itertools.chain.from_iterable(pairs))


def timed(steps: dict[str, Callable[[], None]], rounds: int, calls: int = 40) -> dict[str, float]:
    """Microseconds of each."""
    fastest: dict[str, list[float]] = {name: [] for name in steps}
    for own in steps.values():
        for _ in range(20):
            own()
    gc.disable()
    for name, own in itertools.chain.from_iterable([steps.items()] * rounds):
        took = []
        for _ in range(calls):
            began = time.perf_counter()
            own()
            took.append(time.perf_counter() - began)
        fastest[name].append(min(took))
    gc.enable()
    return {name: 1e6 * statistics.median(own) for name, own in fastest.items()}


def measure(training: bool, autocast: bool, rounds: int, launches: Callable[[], int]) -> list[dict]:
    """A row for each number of layers: both times, their ratio, and how often ours launch."""
    x, tiny = torch.randn(ROWS, WIDTH), torch.randn(1, 1)
    ours = {n: LinearSigmoid(WIDTH, WIDTH) if n == 1 else MLP([WIDTH] * (n + 1)) for n in LAYERS}
    steps, counts = {}, {}
    for n, model in ours.items():
        for own, module, given in (("ours", model, x), ("torch", modules(1, n), tiny)):
            steps[f"{n} {own}"] = step(module, given, training, autocast)
        steps[f"{n} ours"]()
        before = launches()
        steps[f"{n} ours"]()
        counts[n] = launches() - before
    us = timed(steps, rounds)
    return [
        {
            "layers": n,
            "training": training,
            "autocast": autocast,
            "launches": counts[n],
            "us": round(us[f"{n} ours"], 1),
            "torch_us": round(us[f"{n} torch"], 1),
            "ratio": round(us[f"{n} ours"] / us[f"{n} torch"], 3),
        }
        for n in LAYERS
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tune.py host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="of all cases in turn (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / ".build" / "host.json", help="the JSON to write")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT / ".ci" / "cache"))
    import chip

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        driver = chip.Driver(Path(folder))
        chip.pretend(driver)
        rows = [
            row
            for autocast, training in itertools.product((False, True), (False, True))
            for row in measure(training, autocast, options.rounds, driver.launches)
        ]
    atomic.write(options.out, json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")
    print("layers  gradients  autocast  launches     ours    torch  ratio")
    for row in rows:
        us = f"{row['us']:6.1f}us {row['torch_us']:6.1f}us {row['ratio']:6.2f}"
        kind = f"{'with' if row['training'] else 'without':9}  {'on' if row['autocast'] else 'off':8}"
        print(f"{row['layers']:6}  {kind}  {row['launches']:8} {us}")
