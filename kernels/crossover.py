# SPDX-License-Identifier: Apache-2.0
"""Below which sizes torch's own calls win: what plans, layers and networks ask before anything of ours runs.

Numbers and names alone, as in `plan`: no tensor, no device.
"""

import functools
import itertools

from .peaks import peaks_of
from .records import Device
from .tables import cpu_thresholds, measured_limits

MLP_MAX_WIDTH = 128  # of networks that stay on chip

# What eager calls ask of the host: microseconds, and launches, (base, per layer) of each, without gradients and with
# them. Measured on a core of Zen 4 by `benches/tune.py host`: torch's modules on a CPU at one row and a width of 1, and
# ours on a driver that does nothing. What wide layers take, products of the library and passes of ours, is estimated.
HOST = {
    "torch": (((1.9, 7.8), (0, 2)), ((23.5, 31.8), (0, 6))),
    "layer": (((0.0, 10.4), (0, 1)), ((0.0, 59.8), (0, 3))),
    "wide": (((0.0, 14.0), (0, 2)), ((0.0, 75.0), (0, 6))),
    "network": (((13.4, 1.1), (1, 0)), ((55.0, 19.0), (4, 0))),
}
# What autocast adds to ours beyond what it adds to torch's, which casts in C: (base, per layer), measured in the same
# way on a core of the Xeon with AMX.
AUTOCAST_US = ((8.0, 3.5), (11.0, 9.0))
LAUNCH_US = 2.0  # of the driver, an estimate
# In a compiled program a layer of ours is a call of Python, and torch's is code that the compiler has made.
TRACED_US = (40.0, 93.0)

# How often torch's kernels move the bytes of a layer's x and y: the product and the activation, and back dz, dx,
# dweight and dbias.
PASSES = (2, 6)


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


@functools.lru_cache(maxsize=4096)
def eager_limit(widths: tuple[int, ...], training: bool, device: Device, autocast: bool = False) -> float:
    """Bytes of x and y, per layer, below which eager calls cost least as torch's own; 0: nowhere.

    Where the host decides, ours must take it no longer than torch's: launches and calls are priced alike. Where ours
    takes longer, torch's kernels have to keep the device as busy as that. What a device has measured comes first.
    """
    layers, wide = len(widths) - 1, max(widths) > MLP_MAX_WIDTH
    kind = "wide" if wide else "layer" if layers == 1 else "network"
    measured = measured_limits(device.name)
    if measured is not None and not autocast:
        return measured["layer" if wide else kind][training]
    ours = _host_us(kind, layers, training)
    if autocast:
        base, each = AUTOCAST_US[training]
        ours += base + each * layers
    return 0 if ours <= _host_us("torch", layers, training) else _busy_bytes(ours / layers, training, device)


def traced_limit(training: bool, device: Device) -> float:
    """The same for a program that is compiled for sizes that it knows."""
    return _busy_bytes(TRACED_US[training], training, device)


def _host_us(kind: str, layers: int, training: bool) -> float:
    calls, launches = (base + each * layers for base, each in HOST[kind][training])
    return calls + LAUNCH_US * launches


def _busy_bytes(us: float, training: bool, device: Device) -> float:
    """Bytes of a layer's x and y with which torch's kernels keep the device busy for so long."""
    return us * 1e-6 * peaks_of(device).bandwidth / PASSES[training]


def layer_bytes(nbytes: float, widths: tuple[int, ...]) -> float:
    """Bytes that go in and out of a layer, the average over all, of which so many are those of the first one's x."""
    return nbytes * (2 * sum(widths) - widths[0] - widths[-1]) / (max(widths[0], 1) * (len(widths) - 1))


def limit_note(nbytes: float, widths: tuple[int, ...], backward: bool, device: Device) -> str:
    """What is to be said beside the reason of a plan for x of so many bytes of where eager calls follow it."""
    limits = [eager_limit(widths, training, device) for training in ((True,) if backward else (False, True))]
    said = "" if measured_limits(device.name) is not None else ", uncalibrated"
    if max(limits) <= layer_bytes(nbytes, widths):
        return f"; eager calls launch it{said}" if max(limits) else f"; eager calls launch it at every size{said}"
    when = " with gradients" if not backward and limits[0] <= layer_bytes(nbytes, widths) else ""
    return (
        f"; eager calls{when} on the default stream take plain torch: launch-bound below "
        f"{max(limits) / (1 << 20):.3g} MiB of x and y per layer{said}"
    )
