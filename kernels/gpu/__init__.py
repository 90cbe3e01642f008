"""Kernels in triton and their launchers. Nothing outside of this folder imports triton, and only `devices.gpu` imports it."""
