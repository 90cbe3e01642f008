# SPDX-License-Identifier: Apache-2.0
"""What must happen before compiled loops can run, told without importing numba."""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from .. import plan as planning

FOLDER = Path(__file__).parent
# Kinds of steps that this process has compiled or read from disk: (dtype, samples, networks).
loaded: set[tuple[torch.dtype, int, int]] = set()
# Seconds that runs of this process would have saved with compiled loops, each too short to wait for them. Once that is
# as much as the wait takes, it is made: so all together lose at most twice what they had to.
missed = 0.0
_found: set[tuple[Path, str]] = set()  # folders in which compiled code of a source lay: they are asked no more


@functools.cache
def refusal() -> str | None:
    """Why there are no compiled loops in this process, or None."""
    with suppress(ValueError):  # something else goes by that name
        if importlib.util.find_spec("numba"):
            return None
    return "compiled loops need numba, which is not installed: pip install 'perceptriton[native]'"


def load_what_is_on_disk() -> None:
    """Lets the next run read compiled loops from disk, however short it is: whoever asks expects more runs."""
    global missed
    missed = max(missed, planning.LOAD_SECONDS)


def seconds(dtype: torch.dtype) -> tuple[float, ...]:
    """About how long it takes until steps of each of the plan's TILES can begin."""
    return tuple(0.0 if (dtype, *tile) in loaded else _wait(tile[0]) for tile in planning.TILES)


def _wait(rows: int) -> float:
    source = "neurons" if rows == planning.NEURON_ROWS else "steps"
    for folder in _folders():
        if (folder, source) in _found or next(folder.glob(f"{source}.train-*.nbi"), None):
            _found.add((folder, source))
            return planning.LOAD_SECONDS
    return planning.COMPILE_SECONDS


def _folders() -> Iterator[Path]:
    """Where numba keeps compiled code: there alone if it is told where, else in the first of these that takes it.

    That what lies there is of this version is a guess.
    """
    below = f"{FOLDER.name}_{hashlib.sha1(str(FOLDER).encode(), usedforsecurity=False).hexdigest()}"
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(chosen, below)
        return
    yield FOLDER / "__pycache__"
    yield Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "numba", below)
