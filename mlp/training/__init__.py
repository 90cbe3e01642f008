# SPDX-License-Identifier: Apache-2.0
"""Whole training loops: in one call, without autograd where a network's steps can be written out, and by many ranks."""

from ..history import History
from .run import fit
from .sharded import fit_sharded
from .validation import EarlyStopping

__all__ = ["EarlyStopping", "History", "fit", "fit_sharded"]
