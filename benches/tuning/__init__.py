# SPDX-License-Identifier: Apache-2.0
"""The tuners of the tables under kernels/tuned; `benches/tune.py` is their command."""
