# SPDX-License-Identifier: Apache-2.0
"""What an access costs a chip beside what it must: sectors of global memory, wavefronts of shared memory."""

import functools

import numpy as np

CLASSES = {
    "mma": ("mma", "wgmma"),
    "fma": ("fma", "mul.f", "add.f", "sub.f", "mad.f"),
    "special": ("ex2", "rsqrt", "rcp", "lg2", "sqrt", "tanh", "div.full"),
    "ld.global": ("ld.global",),
    "st.global": ("st.global",),
    "ld.shared": ("ld.shared", "ldmatrix"),
    "st.shared": ("st.shared", "stmatrix"),
    "cp.async": ("cp.async",),
    "barrier": ("bar.", "barrier", "mbarrier"),
    "shuffle": ("shfl", "vote", "elect", "redux"),
    "cvt": ("cvt",),
}


@functools.cache
def instruction_class(op):
    return next((name for name, heads in CLASSES.items() if op.startswith(heads)), "other")


def sectors(warps, at, total):
    """(sectors of 32 bytes that warps ask for, the fewest that hold as many distinct bytes)."""
    mine = warps.astype(np.int64) << 48
    asked = np.unique(mine | at >> 5)
    distinct = np.unique(mine | at)
    fewest = np.bincount(distinct >> 48) * total
    return len(asked), int((-(-fewest // 32)).sum())


def wavefronts(lanes, at, total):
    """(passes over the 32 banks that warps take, the fewest for as many distinct words).

    A warp takes 8 bytes a thread in two halves and 16 in four quarters; threads that read the same word share it.
    """
    groups = lanes // (128 // max(total, 4))
    words = (at[:, None] + 4 * np.arange(max(total // 4, 1))) >> 2
    distinct = np.unique((groups[:, None].astype(np.int64) << 32) | words)
    banks = np.bincount((distinct >> 32) << 5 | distinct & 31, minlength=32 * (int(groups.max()) + 1)).reshape(-1, 32)
    return int(banks.max(1).sum()), int((-(-banks.sum(1) // 32)).sum())
