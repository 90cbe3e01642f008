# SPDX-License-Identifier: Apache-2.0
"""Trials, once in a process, of private functions of torch that this version may lack or have otherwise."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def undisturbed(trial: Callable[[], Result]) -> Callable[[], Result]:
    """A trial that runs in a thread of its own, where its first caller's autocast, modes and transforms are away."""

    @functools.wraps(trial)
    def tried() -> Result:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(trial).result()

    return tried
