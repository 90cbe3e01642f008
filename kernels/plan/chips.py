# SPDX-License-Identifier: Apache-2.0
"""What is asked of every chip and dtype: whether the kernels run there, and which tables speak for it."""

from ..records import DTYPES, EMPTY, Device


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def product_kind(dtype: str, precision: str) -> str:
    return precision if dtype == "float32" else "half"


# Chips for which the tables of layers and networks have tiles, the newest first: a tile that is clean on one may spill
# on another, or not fit into its shared memory.
LAYER_CHIPS = ("sm_120", "sm_90", "sm_86", "sm_80")


def generation(arch: int) -> str:
    """The chip whose tiles layers and networks take: the newest one that is no newer."""
    return next((chip for chip in LAYER_CHIPS if arch >= int(chip[3:])), LAYER_CHIPS[-1])


def wide_generation(arch: int) -> str:
    """The chip whose tiles TMA takes. An older one's would not do: sm_120 has less than half the shared memory."""
    return f"sm_{arch // 10}0"


# Where 32 bits end: a kernel that counts its tiles adds the rows of one to all rows. And where a grid ends: the pass
# that computes dz has a program for each 128 columns on the grid's second axis.
MOST_ROWS, TALLEST_TILE, MOST_COLUMNS = 1 << 31, 1 << 10, 65_535 * 128


def device_refusal(m: int, k: int, n: int, dtype: str, device: Device) -> str | None:
    """Why plain torch has to do it, or None."""
    if 0 in (m, k, n):
        return EMPTY
    if dtype not in DTYPES:
        return f"{dtype}: the kernels take {', '.join(DTYPES)}"
    if device.kind not in ("cpu", "cuda"):
        return f"no kernels for {device.kind} devices"
    if device.kind == "cpu":
        return None
    if device.arch < 80:
        return f"compute capability {device.arch // 10}.{device.arch % 10}: the kernels need 8.0"
    if MOST_ROWS - TALLEST_TILE < m < MOST_ROWS:  # from there on they are counted in 64 bits
        return f"{m} rows: their tiles would be counted beyond 32 bits"
    if n > MOST_COLUMNS:
        return f"{n} out_features: more blocks of columns than a launch may have"
    return None if device.triton else device.refusal or "its description says triton=False"
