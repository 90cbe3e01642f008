# SPDX-License-Identifier: Apache-2.0
"""Times contenders against each other, and measures what the machine can do at best.

A machine's speed drifts by more than the differences worth knowing. So contenders are never timed one after the
other: each round times a short batch of calls of every one of them, in a new order, and medians over the rounds are
compared.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from perceptriton.kernels import reference

Step = Callable[[], object]


@dataclass
class Samples:
    """Seconds per call, one value per round."""

    wall: list[float] = field(default_factory=list)
    event: list[float] = field(default_factory=list)  # between CUDA events around the batch; empty on a CPU

    @property
    def seconds(self) -> float:
        return statistics.median(self.wall)

    @property
    def event_seconds(self) -> float | None:
        return statistics.median(self.event) if self.event else None

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        if len(self.wall) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.wall, n=4)
        return (high - low) / self.seconds


class _Paused:
    """The garbage collector would strike one contender at random."""

    def __enter__(self):
        self.enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *_):
        if self.enabled:
            gc.enable()


def calls_per_batch(step: Step, batch_seconds: float, cuda: bool = False) -> int:
    """How many calls fill a batch, from the fastest of a few; the step has been called before."""
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
        if fastest > batch_seconds:
            break
    return max(1, round(batch_seconds / fastest))


def interleaved(
    steps: Mapping[str, Step],
    *,
    seconds: float,
    batch_seconds: float = 1e-3,
    rounds: tuple[int, int] = (11, 201),
    cuda: bool = False,
) -> dict[str, Samples]:
    """Times all steps in turn for about `seconds`, in no fewer and no more rounds than `rounds` says.

    On CUDA a batch ends with one synchronize: that is the time per call which a loop on the host sees.
    """
    samples = {name: Samples() for name in steps}
    calls, order = {}, random.Random(0)
    with _Paused():
        for name, step in steps.items():
            step()
            calls[name] = calls_per_batch(step, batch_seconds, cuda)
        fewest, most = rounds
        deadline = time.perf_counter() + seconds
        names = list(steps)
        for done in range(most):
            if done >= fewest and time.perf_counter() > deadline:
                break
            # In a fixed order everyone would always follow the same predecessor, and inherit its caches.
            order.shuffle(names)
            for name in names:
                step, count = steps[name], calls[name]
                if count > 1:
                    step()  # untimed: the predecessor has taken the caches
                if cuda:
                    wall, event = _cuda_batch(step, count)
                    samples[name].event.append(event)
                else:
                    wall = batch(step, count)
                samples[name].wall.append(wall)
    return samples


def batch(step: Step, count: int, cuda: bool = False) -> float:
    """Seconds per call; on CUDA until the device has done what the calls asked of it."""
    calls = range(count)
    start = time.perf_counter()
    for _ in calls:
        step()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def _cuda_batch(step: Step, count: int) -> tuple[float, float]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    calls = range(count)
    start = time.perf_counter()
    begin.record()
    for _ in calls:
        step()
    end.record()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count, begin.elapsed_time(end) / 1e3 / count


def speedup(baseline: Samples, other: Samples) -> float:
    """The median over the rounds of how many times faster `other` was than `baseline` in the same round.

    Not the ratio of the medians: on a machine that switches between two speeds, a median over all rounds may fall
    on either.
    """
    return statistics.median(base / own for base, own in zip(baseline.wall, other.wall, strict=True))


@dataclass
class Comparison:
    """The samples of the run that counts and, by contender, the speed-up over the baseline in it and in every run."""

    samples: dict[str, Samples]
    speedup: dict[str, float]
    all_speedups: dict[str, list[float]]


# Rows that are not clearly faster are timed three times and the median kept, so that no single run decides. The limit
# lies as far above 1 as noise reaches: asking again only below 1 would favour whoever is asked.
RETIME_BELOW = 1.03


def compare(steps: Mapping[str, Step], baseline: str, judged: str, **options) -> Comparison:
    """Times `steps` interleaved; three times, keeping the median run, if `judged` is not clearly above `baseline`."""
    runs = [interleaved(steps, **options)]
    if baseline not in steps:
        return Comparison(runs[0], {}, {})

    def speedups(samples: dict[str, Samples]) -> dict[str, float]:
        return {name: speedup(samples[baseline], own) for name, own in samples.items()}

    ratios = [speedups(runs[0])]
    if ratios[0].get(judged, RETIME_BELOW) < RETIME_BELOW:
        runs += [interleaved(steps, **options) for _ in range(2)]
        ratios = [speedups(samples) for samples in runs]
    kept = sorted(range(len(runs)), key=lambda run: ratios[run].get(judged, 0))[len(runs) // 2]
    return Comparison(runs[kept], ratios[kept], {name: [ratio[name] for ratio in ratios] for name in steps})


# --- what the machine can do -------------------------------------------------------------------------------


def last_level_cache(device: str) -> int:
    """Bytes; 0 where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [0]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 0) if text[:-1].isdigit() else 0)
    return max(sizes)


def _best(steps: Mapping[str, Step], seconds: float, cuda: bool) -> float:
    samples = interleaved(steps, seconds=seconds, rounds=(5, 101), cuda=cuda)
    return min(min(s.event or s.wall) for s in samples.values())


def copy_rate(device: str, seconds: float) -> float:
    """Bytes per second of a large copy, counting what it reads and what it writes."""
    cuda = device == "cuda"
    source = torch.ones((1 << 30 if cuda else 1 << 28) // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * 4 * source.numel() / _best({"copy": lambda: target.copy_(source)}, seconds, cuda)


def product_rate(device: str, dtype: torch.dtype, seconds: float) -> float:
    """Operations per second of a large square product; on a CPU by the better of torch's two libraries."""
    cuda = device == "cuda"
    size = 8192 if cuda else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    steps: dict[str, Step] = {"mm": lambda: torch.mm(a, b, out=out)}
    onednn = None if cuda else reference.onednn_linear()
    if onednn is not None:
        steps["onednn"] = lambda: onednn(a, b, None, "none", [], "")
    return 2 * size**3 / _best(steps, seconds, cuda)


def measure_limits(device: str, dtypes: tuple[str, ...], seconds: float) -> dict:
    """The best that simple programs reach on this machine."""
    return {
        "copy_bytes_per_s": copy_rate(device, seconds),
        "flops_per_s": {name: product_rate(device, getattr(torch, name), seconds) for name in dtypes},
        "last_level_cache_bytes": last_level_cache(device),
    }


def better_limits(first: dict, second: dict) -> dict:
    """The higher of two measurements: a machine that was busy during one of them can still do what the other saw."""
    rates = {name: max(rate, second["flops_per_s"][name]) for name, rate in first["flops_per_s"].items()}
    copy = max(first["copy_bytes_per_s"], second["copy_bytes_per_s"])
    return first | {"copy_bytes_per_s": copy, "flops_per_s": rates}
