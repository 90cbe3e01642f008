# SPDX-License-Identifier: Apache-2.0
"""What must happen before compiled loops can run, told without importing numba."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
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
    for folder in folders(os.environ.get("NUMBA_CACHE_DIR")):
        if (folder, source) in _found or _holds(folder, f"{source}.train"):
            _found.add((folder, source))
            return planning.LOAD_SECONDS
    return planning.COMPILE_SECONDS


def _holds(folder: Path, function: str) -> bool:
    """Whether its index there is of these sources. That what it lists is for this CPU and these types is a guess."""
    with suppress(OSError):  # there is none, or it may not be read
        return fingerprint().encode() in (folder / f"{file_name(function)}.nbi").read_bytes()
    return False


def folders(chosen: str | None) -> Iterator[Path]:
    """Where compiled code is read, from the first that holds it, and written, to the first that takes it.

    numba itself passes over folders that it cannot write to, though an administrator may have filled them.
    chosen: where numba is told to keep code, and there alone unless that may only be read.
    """
    below = f"{FOLDER.name}_{hashlib.sha1(str(FOLDER).encode(), usedforsecurity=False).hexdigest()}"
    if chosen:
        yield (folder := Path(chosen, below))
        there = next(filter(os.path.exists, (folder, *folder.parents)), folder)
        if os.access(there, os.W_OK | os.X_OK):
            return
    yield FOLDER / "__pycache__"
    yield Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "numba", below)


def file_name(function: str) -> str:
    """Of what is compiled of it for this Python, without a suffix."""
    return f"{function}.{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}"


@functools.cache
def fingerprint() -> str:
    """Of numba and all sources here, or the program that they are frozen into: what was compiled of others is stale."""
    sources = sorted(Path(__file__).parent.glob("*.py*")) or [Path(sys.executable)]
    versions = [found.version for found in importlib.metadata.distributions(name="numba")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources) + str(versions).encode()).hexdigest()
