"""Below which sizes torch's own calls win: what plans, layers and networks ask before anything of ours runs.

Numbers and names alone, as in `plan`: no tensor, no device.
"""

import functools
import itertools

from .tables import cpu_thresholds

# Bytes of x and y, per layer, below which a GPU is done before the host has asked for more: without gradients, with
# them. An eager call of ours takes the host 15 to 25 us per layer, and 115 to 270 with its backward pass; torch's own 8
# and 75 to 180 (measured with a driver that does nothing). Its kernels for as many bytes as these take a GPU about as
# long as ours takes the host. Estimates: `benches/tune.py launches` measures them.
LAUNCH_BOUND_BYTES = (32 << 20, 128 << 20)


@functools.lru_cache(maxsize=4096)
def cpu_rows(widths: tuple[int, ...], dtype: str, vendor: str, training: bool) -> int:
    """Rows below which plain torch operations cost least on a CPU, for layers widths[l] -> widths[l + 1] in turn.

    They do where the largest layer has too few multiply-adds for any plan to gain what it costs to find, and where all
    layers together have too few outputs: what the explicit path gains there is in memory above all, in fresh tensors
    that the system maps page by page. Every number of rows is too few for a dtype that the kernels do not take.
    """
    macs, outputs = max(k * n for k, n in itertools.pairwise(widths)), sum(widths[1:])
    if not macs or not (limits := cpu_thresholds(dtype, vendor)):
        return 1 << 62
    few = limits.get("few_outputs", (0, 0))[training]
    return max(-(-limits["small"] // macs), -(-few // outputs))


def launch_bound(nbytes: float, widths: tuple[int, ...], training: bool) -> bool:
    """Whether a GPU is done with x of so many bytes before the host has prepared the next call of these layers."""
    return layer_bytes(nbytes, widths) < LAUNCH_BOUND_BYTES[training]


def layer_bytes(nbytes: float, widths: tuple[int, ...]) -> float:
    """Bytes that go in and out of a layer, the average over all, of which so many are those of the first one's x."""
    return nbytes * (2 * sum(widths) - widths[0] - widths[-1]) / (max(widths[0], 1) * (len(widths) - 1))


def launch_note(nbytes: float, widths: tuple[int, ...], backward: bool) -> str:
    """What is to be said beside the reason of a plan for x of so many bytes, if eager calls do not follow it."""
    if not launch_bound(nbytes, widths, True):
        return ""
    when = " with gradients" if not backward and not launch_bound(nbytes, widths, False) else ""
    return f"; eager calls{when} on the default stream take plain torch: launch-bound"
