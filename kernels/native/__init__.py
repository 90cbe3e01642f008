# SPDX-License-Identifier: Apache-2.0
"""Whole training loops on a CPU in machine code, compiled by numba, which nothing outside of this folder imports.

A vector of the machine holds the same number of several networks, or of several samples of one network: `Tile` says of
how many. All steps of a chunk are taken for the networks of one vector before those of the next, so that parameters,
state and activations stay in the caches next to the core. Where numba is missing, `loop`, `layout` and `ready` may be
imported all the same.
"""
