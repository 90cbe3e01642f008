# SPDX-License-Identifier: Apache-2.0
"""Which implementation an op takes for given shapes, dtype and device, with which tile, and why.

Pure functions of numbers and names: no torch, no triton, no device is touched. The tables under `tuned/` are data.
"""

from ..peaks import PEAKS, peaks_of
from .chips import device_refusal
from .layer import linear_act_bwd, linear_act_fwd
from .native import COMPILE_SECONDS, LOAD_SECONDS, NEURON_ROWS, TILES
from .network import MLP_IEEE_ROWS, MlpPlans, mlp_both, mlp_bwd, mlp_bytes, mlp_columns, mlp_fwd, mlp_slots
from .predict import predict, predict_bwd, predict_mlp
from .train import train, train_loop, train_prices
from .wide import linear_act_dgrad, linear_act_wgrad, wide_candidates, wide_splits
