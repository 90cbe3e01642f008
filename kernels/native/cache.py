# SPDX-License-Identifier: Apache-2.0
"""Compiled functions on disk: where `ready.folders` has them, safe from damaged files, full disks and old sources."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from numba.core import config
from numba.core.caching import IndexDataCacheFile, NullCache
from numba.core.compiler import CompileResult

from . import ready


class _Cache(NullCache):
    """Of one function, in several folders: numba's own caches know one, which must take what is written to it.

    Nor do they ask for more sources than the file that holds a function.
    """

    def __init__(self, function: Any) -> None:
        name = ready.file_name(f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}")
        folders = ready.folders(cast(Any, config).CACHE_DIR)
        self.files = {folder: IndexDataCacheFile(str(folder), name, ready.fingerprint()) for folder in folders}

    def load_overload(self, sig, target_context) -> Any:
        target_context.refresh()
        key = (sig, target_context.codegen().magic_tuple())
        for file in self.files.values():
            with suppress(Exception):  # whatever a damaged file makes of itself: the function is compiled anew
                if data := file.load(key):
                    found = CompileResult._rebuild(target_context, *data)
                    if found.signature.args == sig:  # else two processes have given two kinds one file's name
                        return found
        return None

    def save_overload(self, sig, cres):
        if cres.library.has_dynamic_globals:  # addresses of this process
            return
        for folder, file in self.files.items():
            with suppress(Exception):  # a full disk, a folder that may only be read
                folder.mkdir(parents=True, exist_ok=True)
                entry = (sig, cres.codegen.magic_tuple()), cres._reduce()
                try:
                    file.save(*entry)
                except OSError:
                    raise
                except Exception:  # an index that is damaged
                    file.flush()
                    file.save(*entry)
                return


def cached(function: Any) -> Callable:
    """A compiled function that is kept on disk, or in this process alone where no folder can be written to."""
    function._cache = _Cache(function.py_func)
    return function
