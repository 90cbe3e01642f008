# SPDX-License-Identifier: Apache-2.0
"""Trials, once in a process, of private functions of torch that this version may lack or have otherwise."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def undisturbed(trial: Callable[[], Result]) -> Result:
    """What a trial returns that is kept for the process: its first caller's autocast, modes and transforms are away.

    A new thread has none of them.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(trial).result()
