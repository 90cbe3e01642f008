# SPDX-License-Identifier: Apache-2.0
"""What the machine is, in machine.json, after one kernel has run: versions, the compiler, what calls cost the host.

usage: python .ci/machine.py FOLDER [--dry-run]      exit status 1 if the kernel's result is wrong
"""

import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from perceptriton.kernels.gpu.layer import sum_slots
from perceptriton.mlp import linear_sigmoid

# Programs and numbers of each: gradients of one layer of 64 and of four, a bias of 256 beside many programs.
SLOTS = ((264, 4160), (264, 16_640), (4096, 256))


@triton.jit
def nothing_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < size), mask=offsets < size)


def said(*command: str) -> str:
    """The first line that a program prints, or that there is none."""
    if shutil.which(command[0]) is None:
        return "not on this machine"
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.partition("\n")[0]


def host_us(call, cuda: bool, count: int) -> float:
    """Microseconds that a call takes the host, the least of five runs; what a GPU does meanwhile is short."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - began) / count)
        if cuda:
            torch.cuda.synchronize()
    return round(1e6 * best, 2)


def device_us(call, cuda: bool, count: int = 200) -> float:
    """Microseconds between events around calls that run one after the other, the least of five runs."""
    if not cuda:
        return host_us(call, cuda, 1)
    best = float("inf")
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / count)
    return round(1e3 * best, 2)


def sums_of_slots(cuda: bool) -> list[dict]:
    """`sum_slots` alone beside torch's sum over the first dimension: what a backward pass does at its end."""
    rows = []
    for programs, size in SLOTS if cuda else ((9, 70),):
        slots = torch.randn(programs, size, device="cuda" if cuda else "cpu")
        ours, theirs = torch.empty(2, size, device=slots.device)
        own = device_us(lambda s=slots, o=ours: sum_slots(s, o), cuda)
        us = {"sum_slots_us": own, "torch_us": device_us(lambda s=slots, o=theirs: torch.sum(s, 0, out=o), cuda)}
        truth = slots.double().sum(0)
        error = ((ours - truth).norm() / truth.norm()).item()
        rows.append({"programs": programs, "size": size, "bytes": 4 * slots.numel(), "relative_error": error} | us)
    return rows


def main(folder: str, *options: str) -> None:
    cuda = "--dry-run" not in options
    device = "cuda" if cuda else "cpu"
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((64, 64), (64, 64), (64,)))
    began = time.perf_counter()
    y = linear_sigmoid(x, weight, bias, impl="triton")
    if cuda:
        torch.cuda.synchronize()
    first = time.perf_counter() - began
    truth = torch.sigmoid(F.linear(x.double(), weight.double(), bias.double()))
    error = ((y.double() - truth).norm() / truth.norm()).item()
    with torch.no_grad():
        calls = {
            "triton launch": lambda: nothing_kernel[(1,)](x, y, 64, 64),
            "linear_sigmoid": lambda: linear_sigmoid(x, weight, bias, impl="triton"),
            "F.linear": lambda: F.linear(x, weight, bias),
            "torch.sigmoid": lambda: torch.sigmoid(x),
        }
        us = {name: host_us(call, cuda, 500 if cuda else 1) for name, call in calls.items()}
    found = {
        "device": torch.cuda.get_device_name() if cuda else "DRY RUN on a CPU",
        "driver": said("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"),
        "gcc": said("gcc", "--version"),
        "python": platform.python_version(),
        "versions": {module.__name__: module.__version__ for module in (torch, triton, numpy)},
        "cuda": torch.version.cuda,
        "first_kernel_seconds": round(first, 3),
        "relative_error": error,
        "host_us": us,
        "sums": sums_of_slots(cuda),
    }
    text = json.dumps(found, indent=2)
    Path(folder, "machine.json").write_text(text + "\n")
    print(text)
    errors = [error, *(row["relative_error"] for row in found["sums"])]
    if not all(error < 2e-6 for error in errors):  # a NaN must fail
        sys.exit(f"linear_sigmoid, or a sum of slots, is off: {errors}")


if __name__ == "__main__":
    main(*sys.argv[1:])
