# SPDX-License-Identifier: Apache-2.0
"""Kernels in triton and their launchers: the only folder that imports triton. `devices.gpu` imports its modules."""
