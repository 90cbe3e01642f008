# SPDX-License-Identifier: Apache-2.0
"""Kernels' arithmetic in torch on a CPU, as far as triton's interpreter does not have it: what it costs in accuracy.

First fp32 products as tensor cores compute them.

Follows the operations that triton 3.6.0 and 3.7.1 compile a dot of that input precision to (see them in the TTGIR of
`test_wide_compile.py`): operands split into short numbers, the small products first, their NaN replaced by 0, the
large product on top, the sum added to the accumulator. Sums are taken in fp32 here; that tensor cores cut off low bits
while they sum is not modelled. Triton's interpreter computes every one of these in plain fp32.
"""

import torch


def _cut(t):
    """tf32 as tensor cores read an fp32: the low 13 bits are ignored."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


def round_tf32(t):
    """cvt.rna.tf32: to nearest, ties away from 0."""
    rounded = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(t.isfinite(), rounded, t)


def _bf16_parts(t, count):
    parts = []
    for _ in range(count):
        parts.append(t.to(torch.bfloat16).to(torch.float32))
        t = t - parts[-1]
    return parts


def _split(a, b, kind):
    """(small products in their order, large product), each a pair of operands."""
    if kind == "tf32x3":
        (a0, a1), (b0, b1) = ((big, _cut(t - big)) for t in (a, b) for big in (round_tf32(t),))
        return [(a1, b0), (a0, b1)], (a0, b0)
    if kind == "bf16x3":
        (a0, a1), (b0, b1) = _bf16_parts(a, 2), _bf16_parts(b, 2)
        return [(a1, b0), (a0, b1)], (a0, b0)
    assert kind == "bf16x6", kind
    (a0, a1, a2), (b0, b1, b2) = _bf16_parts(a, 3), _bf16_parts(b, 3)
    return [(a1, b1), (a2, b0), (a0, b2), (a1, b0), (a0, b1)], (a0, b0)


def product(x, weight, kind, block_k=32):
    """x @ weight.T of fp32 x (M, K) and weight (N, K) as a kernel with steps of block_k along K computes it."""
    a, b = (torch.nn.functional.pad(t, (0, -t.shape[1] % block_k)) for t in (x, weight))
    # The steps as a batch: (steps, M, block_k) and (steps, block_k, N).
    a = a.unflatten(1, (-1, block_k)).transpose(0, 1).contiguous()
    b = b.unflatten(1, (-1, block_k)).permute(1, 2, 0).contiguous()
    if kind in ("ieee", "tf32"):
        # Tensor cores would cut the operands; the kernels round them before.
        steps = a @ b if kind == "ieee" else round_tf32(a) @ round_tf32(b)
    else:
        small, large = _split(a, b, kind)
        total = sum(p @ q for p, q in small)
        steps = torch.where(total.isnan(), 0.0, total) + large[0] @ large[1]
    acc = torch.zeros_like(steps[0])
    for step in steps:
        acc = acc + step
    return acc


def sigmoid(z, power_error=0.0, root_error=0.0):
    """The kernels' sigmoid of fp32 z, with `exp2` and `rsqrt` that have these errors before they are rounded."""
    power = (torch.exp2((z * -1.4426950408889634).double()) * (1 + power_error)).float()
    root = ((1 + power).double().rsqrt() * (1 + root_error)).float()
    return root * root
