# SPDX-License-Identifier: Apache-2.0
"""Compiled functions on disk: where numba puts them, and safe from damaged files, full disks and old sources."""

import functools
import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache


@functools.cache
def _fingerprint() -> str:
    """Of all sources in this folder. numba asks for that of the one file that holds a function."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


class _Cache(FunctionCache):
    def _index_key(self, sig, codegen) -> Any:
        *rest, code = super()._index_key(sig, codegen)
        return (*rest, (*code, _fingerprint()))

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever a damaged file makes of itself: the function is compiled anew
            return None

    def save_overload(self, sig, data):
        with suppress(OSError):  # a disk that is full, or a folder that could be written to a moment ago
            super().save_overload(sig, data)


def cached(function: Any) -> Callable:
    """A compiled function that is kept on disk, or in this process alone where no folder can be written to."""
    with suppress(RuntimeError, OSError):
        function._cache = _Cache(function.py_func)
    return function
