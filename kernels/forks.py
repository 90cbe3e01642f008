# SPDX-License-Identifier: Apache-2.0
"""Locks that a process leaves open in those that it forks."""

import os
import threading


def lock() -> "threading.RLock":
    """A lock that a fork waits for: the child has none of the threads that could let go of it."""
    made = threading.RLock()
    if hasattr(os, "register_at_fork"):  # not on Windows, where there are no forks
        os.register_at_fork(before=made.acquire, after_in_parent=made.release, after_in_child=made.release)
    return made
