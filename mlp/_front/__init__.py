# SPDX-License-Identifier: Apache-2.0
"""Sigmoid, tanh and relu MLPs in fused Triton kernels for PyTorch: the names of `perceptriton.mlp`, and `explain` of
`perceptriton.kernels`, imported when asked for.

This folder is the package `perceptriton` itself, in which `kernels` and `mlp` lie: setup.py says so.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import kernels as kernels
    from . import mlp as mlp
    from .kernels import explain as explain
    from .mlp import *  # noqa: F403, the names that editors and type checkers are to see
else:

    def __getattr__(name):
        # Importing torch takes seconds, which `import perceptriton` does not need.
        if name in ("kernels", "mlp"):
            return import_module(f".{name}", __name__)
        if name == "explain":
            return import_module(".kernels", __name__).explain
        if not name.startswith("__") or name == "__all__":
            mlp = import_module(".mlp", __name__)
            if name == "__all__":
                return [*mlp.__all__, "explain"]
            if name in mlp.__all__:
                return getattr(mlp, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), "kernels", "mlp", "explain", *import_module(".mlp", __name__).__all__})
