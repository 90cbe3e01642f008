# SPDX-License-Identifier: Apache-2.0
"""Importing this binds OpenMP's threads to cores, if torch comes later: OpenMP reads its settings once, with torch.

Unbound threads wander between cores, and one run of the same product then takes anything from 1x to 2x of another.
"""

import os
import sys
from pathlib import Path

CPUS = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def physical_cores() -> int:
    """How many physical cores the logical CPUs lie on: what torch itself takes as its number of threads."""
    siblings = set()
    for cpu in CPUS:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings) or os.cpu_count() or 1


# Settings of the environment win.
DEFAULTS = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "OMP_NUM_THREADS": str(physical_cores())}

# What came too early for the settings to count, or None.
LATE = (
    "torch was imported before OpenMP's threads were bound; set OMP_PROC_BIND=true in the environment"
    if "torch" in sys.modules and os.environ.get("OMP_PROC_BIND", "false").lower() == "false"
    else None
)

if LATE is None:
    os.environ.update({name: value for name, value in DEFAULTS.items() if name not in os.environ})


def free_main_thread() -> None:
    """Undoes what binding did to this thread, so that compilers that are started from here get every core."""
    if CPUS:
        os.sched_setaffinity(0, CPUS)
