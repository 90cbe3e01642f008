# SPDX-License-Identifier: Apache-2.0
"""The classic lessons: small networks on small data, beside the tables that they have to reproduce.

A lesson is one function that computes or trains, and returns all there is to show; it prints nothing. Its result has
`matches`, and `misses` that say what does not match. A lesson's file holds its words and its picture too; `catalogue`
lists them all. The tables are in `tables/`.
"""

from ._blobs import BLOBS_BAND, BLOBS_SEED, BLOBS_STEPS, blobs, blobs_data
from ._by_hand import HAND_BAND, HAND_SEED, HAND_STEPS, SOLVED, ByHand, by_hand, hand_gradients
from ._chain_rule import ChainRule, chain_rule
from ._digits import DIGITS_BAND, DIGITS_SEED, DIGITS_SHARE, DIGITS_STEPS, Digits, digits, digits_data
from ._gates import GATES_STEPS, Gates, gates
from ._sweep import SWEEP_RATES, SWEEP_SEEDS, SWEEP_STEPS, Sweep, sweep
from ._worked_step import WORKED_BANDS, WORKED_STEPS, WorkedStep, worked_step
from ._xor import XOR_BAND, XOR_SEED, XOR_STEPS, xor
from ._xor_deep import DEEP_BANDS, xor_deep
from .problem import REFERENCE
from .race import FUSED, NN, Run
from .trajectory import Trajectory
from .values import Values

__all__ = [
    "BLOBS_BAND",
    "BLOBS_SEED",
    "BLOBS_STEPS",
    "DEEP_BANDS",
    "DIGITS_BAND",
    "DIGITS_SEED",
    "DIGITS_SHARE",
    "DIGITS_STEPS",
    "FUSED",
    "GATES_STEPS",
    "HAND_BAND",
    "HAND_SEED",
    "HAND_STEPS",
    "NN",
    "REFERENCE",
    "SOLVED",
    "SWEEP_RATES",
    "SWEEP_SEEDS",
    "SWEEP_STEPS",
    "WORKED_BANDS",
    "WORKED_STEPS",
    "XOR_BAND",
    "XOR_SEED",
    "XOR_STEPS",
    "ByHand",
    "ChainRule",
    "Digits",
    "Gates",
    "Run",
    "Sweep",
    "Trajectory",
    "Values",
    "WorkedStep",
    "blobs",
    "blobs_data",
    "by_hand",
    "chain_rule",
    "digits",
    "digits_data",
    "gates",
    "hand_gradients",
    "sweep",
    "worked_step",
    "xor",
    "xor_deep",
]
