# SPDX-License-Identifier: Apache-2.0
"""Layers and networks on a CPU: plain torch operations, or products by the faster of torch's two libraries."""

import itertools
from typing import cast

from ..crossover import cpu_rows
from ..records import Device, MlpPlan, Plan
from ..tables import cpu_thresholds
from .chips import itemsize


def _thresholds(dtype: str, device: Device) -> dict:
    return cast(dict, cpu_thresholds(dtype, device.vendor))


def within(rule: dict | None, m: int, k: int, n: int) -> bool:
    """Whether a rule's bounds, min_ and max_ of rows, macs, width, in and outputs, hold for a product; None: never."""
    sizes = {"rows": m, "macs": m * k * n, "width": min(k, n), "in": k, "outputs": k * n}
    return rule is not None and all(
        sizes[name[4:]] >= bound if name.startswith("min_") else sizes[name[4:]] <= bound
        for name, bound in rule.items()
        if name != "rows"
    )


def cpu_fwd(m: int, k: int, n: int, dtype: str, device: Device) -> Plan:
    table = _thresholds(dtype, device)
    if m < cpu_rows((k, n), dtype, device.vendor, False):
        return Plan("aten", "small: plain torch operations cost least")
    if within(table["forward"], m, k, n):
        return Plan("explicit", "oneDNN's product with the activation in it", forward_gemm="onednn")
    return Plan("explicit", "torch's product, activation in place")


def cpu_bwd(m: int, k: int, n: int, dtype: str, device: Device) -> Plan:
    table = _thresholds(dtype, device)
    if m < cpu_rows((k, n), dtype, device.vendor, True):
        return Plan("aten", "small: plain torch operations cost least")
    if min(k, n) < table.get("thin", 0):
        return Plan("aten", "thin: where gradients are wanted, plain torch operations, forward too")
    return _cpu_explicit_bwd(m, k, n, dtype, device)


def _cpu_explicit_bwd(m: int, k: int, n: int, dtype: str, device: Device) -> Plan:
    table = _thresholds(dtype, device)
    size = itemsize(dtype)
    chunk = 0
    if m * n * size > table["chunk_above_bytes"]:
        # Pieces of dz stay in cache, where a whole dz would be a fresh tensor that the system maps page by page.
        chunk = max(2048, table["chunk_bytes"] // (n * size))
    rows = min(m, chunk or m)
    dx = "onednn" if within(table["dx"], rows, k, n) else "mm"
    dweight = "onednn" if within(table["dweight"], rows, k, n) else "mm"
    rule = table.get("split")
    split = rule["rows"] if rule is not None and within(rule, m, k, n) else 0
    shared = f" or, from {split} rows per thread on, a part of the rows on each" if 0 < split <= rows else ""
    reason = f"dx by {dx}, dweight by {dweight}{shared}" + (f", dz in pieces of {chunk} rows" if chunk else "")
    return Plan("explicit", reason, dx_gemm=dx, dweight_gemm=dweight, split_rows=split, chunk=chunk)


# Fewer rows at a time cost the products on a CPU more than what they save in cache.
CPU_MLP_CHUNK_ROWS = 1024


def cpu_mlp(op: str, m: int, widths: tuple[int, ...], dtype: str, device: Device) -> MlpPlan:
    pairs = list(itertools.pairwise(widths))
    if m < cpu_rows(widths, dtype, device.vendor, op == "mlp_bwd"):
        return MlpPlan("aten", "small: plain torch operations, without the calls of the layers, cost least")
    if op != "mlp_bwd":
        layers = tuple(cpu_fwd(m, k, n, dtype, device) for k, n in pairs)
        return MlpPlan("explicit", "the faster product per layer, activation in place", layers=layers)
    # Pieces of rows go back through all layers: every dz and dh stays in cache, and none asks the system for memory.
    chunk = max(CPU_MLP_CHUNK_ROWS, _thresholds(dtype, device)["chunk_bytes"] // (max(widths) * itemsize(dtype)))
    chunk = chunk if m > chunk else 0
    layers = tuple(_cpu_explicit_bwd(chunk or m, k, n, dtype, device) for k, n in pairs)
    reason = "one autograd node" + (f", back through all layers in pieces of {chunk} rows" if chunk else "")
    return MlpPlan("explicit", reason, layers=layers, chunk=chunk)
