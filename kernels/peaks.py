# SPDX-License-Identifier: Apache-2.0
"""Peak rates of chips by their vendor's data sheets, which `explain` models plans by."""

from dataclasses import dataclass

from .records import Device


@dataclass(frozen=True)
class Peaks:
    """What a chip does in a second at best."""

    name: str
    device: Device
    special: float  # functions (exp2, rsqrt)
    bandwidth: float  # bytes
    clock: float  # cycles
    half: float  # flops, dense and summed in fp32, by kind of product
    tf32: float
    ieee: float


# The device's name as its driver tells it, compute capability, multiprocessors, boost clock in GHz, memory in GB/s, and
# Tflop/s of products: half, tf32, ieee.
_SHEETS = {
    # NVIDIA's whitepapers on GA102, AD102 and GB202. GeForce cards sum half-precision products in fp32 at half the rate
    # of sums in fp16, which is the one that advertisements count, and twice where zeros are skipped.
    "RTX 3090": ("NVIDIA GeForce RTX 3090", 86, 82, 1.695, 936, 71, 35.6, 35.6),
    "RTX 4090": ("NVIDIA GeForce RTX 4090", 89, 128, 2.52, 1008, 165.2, 82.6, 82.6),
    "RTX 5090": ("NVIDIA GeForce RTX 5090", 120, 170, 2.407, 1792, 209.5, 104.8, 104.8),
    # Their data sheets: A10, L4 (its numbers are those of sparse products, twice these), L40S.
    "A10": ("NVIDIA A10", 86, 72, 1.695, 600, 125, 62.5, 31.2),
    "L4": ("NVIDIA L4", 89, 58, 2.04, 300, 121, 60, 30.3),
    "L40S": ("NVIDIA L40S", 89, 142, 2.52, 864, 362.05, 183, 91.6),
    # Data sheets and whitepapers of the SXM modules; the A100 with 80 GB. HGX B200's sheet divided by eight modules.
    "A100": ("NVIDIA A100-SXM4-80GB", 80, 108, 1.41, 2039, 312, 156, 19.5),
    "H100": ("NVIDIA H100 80GB HBM3", 90, 132, 1.83, 3350, 989.4, 494.7, 66.9),
    "H200": ("NVIDIA H200", 90, 132, 1.83, 4800, 989.4, 494.7, 66.9),
    "B200": ("NVIDIA B200", 100, 148, 1.965, 8000, 2250, 1125, 75),
}
PEAKS = {
    name: Peaks(
        name,
        Device("cuda", arch, units, triton=True, name=driver_name),
        # 16 per clock and multiprocessor, on all of them (CUDA programming guide, arithmetic instructions).
        16 * units * 1e9 * clock,
        1e9 * bandwidth,
        1e9 * clock,
        *(1e12 * rate for rate in rates),
    )
    for name, (driver_name, arch, units, clock, bandwidth, *rates) in _SHEETS.items()
}
H200 = PEAKS["H200"]
_BY_DEVICE = {peaks.device.name: peaks for peaks in PEAKS.values()}
_BY_ARCH = {peaks.device.arch: peaks for peaks in PEAKS.values()}


def peaks_of(device: Device) -> Peaks:
    """Those of the chip that has the device's name, of one of its compute capability, or of an H200."""
    return _BY_DEVICE.get(device.name) or _BY_ARCH.get(device.arch, H200)


def chip(name: str) -> Device:
    """A chip by its name here, as in "RTX 4090", or by its compute capability, as in "sm_89".

    Raises ValueError for another name.
    """
    named = {f"sm_{arch}": peaks.device for arch, peaks in _BY_ARCH.items()}
    named |= {name: peaks.device for name, peaks in PEAKS.items()}
    if name not in named:
        raise ValueError(f"{name!r} is none of {', '.join(named)}")
    return named[name]
