"""The classic lessons: small networks on small data, beside the tables that they have to reproduce.

A lesson is one function that computes or trains, and returns all there is to show; it prints nothing. Its result has
`matches`, and `misses` that say what does not match. The tables are in `reference/`.
"""

from .lesson_by_hand import HAND_BAND, HAND_SEED, HAND_STEPS, SOLVED, ByHand, by_hand, hand_gradients
from .lesson_digits import DIGITS_BAND, DIGITS_SEED, DIGITS_SHARE, DIGITS_STEPS, Digits, digits, digits_data
from .lesson_gradients import WORKED_BANDS, WORKED_STEPS, ChainRule, Values, WorkedStep, chain_rule, worked_step
from .lesson_race import FUSED, NN, REFERENCE, Run, Trajectory
from .lesson_sweep import SWEEP_RATES, SWEEP_SEEDS, SWEEP_STEPS, Sweep, sweep
from .lesson_training import (
    BLOBS_BAND,
    BLOBS_SEED,
    BLOBS_STEPS,
    DEEP_BANDS,
    XOR_BAND,
    XOR_SEED,
    XOR_STEPS,
    blobs,
    blobs_data,
    xor,
    xor_deep,
)

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
    "hand_gradients",
    "sweep",
    "worked_step",
    "xor",
    "xor_deep",
]
