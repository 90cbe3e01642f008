# SPDX-License-Identifier: Apache-2.0
"""What a plan can reach at best: flops, bytes and special functions at a chip's peak rates."""

import itertools

from ..peaks import H200, Peaks
from ..records import MlpPlan, Plan, Prediction
from .chips import itemsize, product_kind
from .network import bwd_bytes, fwd_bytes, parameter_count
from .wide import wave_waste

# Products of tensor cores that one fp32 product of each kind takes, and of which kind they are.
PRODUCTS = {"tf32x3": (3, "tf32"), "bf16x6": (6, "half"), "bf16x3": (3, "half")}


def _product(macs: int, dtype: str, precision: str, peaks: Peaks) -> tuple[int, float]:
    """Operations and seconds of a product."""
    count, unit = PRODUCTS.get(precision, (1, product_kind(dtype, precision)))
    return 2 * macs * count, 2 * macs * count / getattr(peaks, unit)


def predict(m: int, k: int, n: int, dtype: str, plan: Plan, peaks: Peaks = H200) -> Prediction:
    """A model of act(x @ weight.T + bias) by this plan, at the peak rates of a chip.

    The library's product writes z, and a pass over it reads z and writes y. A kernel with output tiles computes whole
    tiles in whole waves, and its multiprocessors do special functions after the products, not beside them. What an
    implementation loses against peak rates is not in it.
    """
    size = itemsize(dtype)
    flops, products = _product(m * k * n, dtype, plan.precision, peaks)
    moved, special = size * (m * k + n * k + n + m * n), 2 * m * n
    memory, functions = moved / peaks.bandwidth, special / peaks.special
    if plan.impl in ("tiled", "tma"):
        waste = wave_waste(m, n, plan.tile, peaks.device.units, plan.splits)
        took = max(memory, waste * (products + functions))
        if plan.splits > 1:  # parts are written and read once, in fp32
            took += 8 * plan.splits * m * n / peaks.bandwidth
    elif plan.impl == "library":
        took = max(memory, products) + max(2 * size * m * n / peaks.bandwidth, functions)
    else:
        took = max(memory, products, functions)
    return Prediction(flops, moved, special, 1e6 * max(memory, products, functions), 1e6 * took, peaks.name)


def predict_bwd(
    m: int,
    k: int,
    n: int,
    dtype: str,
    plan: Plan,
    dz_at_hand: bool = False,
    dgrad: Plan | None = None,
    wgrad: Plan | None = None,
    peaks: Peaks = H200,
) -> Prediction:
    """The same of (dx, dweight, dbias) from dy, y, x and weight: two products, each as large as the forward one.

    "rows" reads each operand once; if there are several programs, each writes a slot of fp32 sums, which is read once.
    Otherwise a pass over dy and y writes dz ("library": a second one reads it for dbias), and both products read that.
    dz_at_hand: it came out of the product of the layer above, which read y for that. dgrad, wgrad: how dx and dweight
    are computed, if not as `plan` has it; for fp32 dgrad reads the weight and writes its transpose first.
    """
    size = itemsize(dtype)
    each = [_product(m * k * n, dtype, own.precision, peaks) for own in (dgrad or plan, wgrad or plan)]
    flops, products = sum(count for count, _ in each), sum(seconds for _, seconds in each)
    moved = size * (2 * (m * n + m * k + n * k) + n)
    memory = moved / peaks.bandwidth
    if plan.impl == "rows":
        slots = 8 * plan.programs * n * (k + 1) if plan.programs > 1 else 0
        took = max(products, memory + slots / peaks.bandwidth)
    else:
        passes = 1 if dz_at_hand else 3 + (plan.impl == "library")
        took = passes * size * m * n / peaks.bandwidth
        took += sum(max(seconds, size * (m * n + n * k + m * k) / peaks.bandwidth) for _, seconds in each)
        if dgrad and dtype == "float32":
            took += 2 * size * n * k / peaks.bandwidth
    return Prediction(flops, moved, 0, 1e6 * max(memory, products), 1e6 * took, peaks.name)


def predict_mlp(
    m: int,
    widths: tuple[int, ...],
    dtype: str,
    plan: MlpPlan,
    layers: tuple[Plan, ...] = (),
    backward: bool = False,
    boundaries: tuple[int, ...] = (),
    peaks: Peaks = H200,
) -> Prediction:
    """The same of a whole network in one direction.

    "fused" moves what `mlp_bytes` counts, and back it computes the forward pass once more. Any other plan is the sum of
    its `layers`, and back reads the activations that the forward pass has kept. boundaries: of the backward plan, for
    a forward pass that stores the activations there.
    """
    pairs, size, fused = list(itertools.pairwise(widths)), itemsize(dtype), plan.impl == "fused"
    outputs = sum(m * n for _, n in pairs)
    dgrads, wgrads = (found or (None,) * len(pairs) for found in (plan.dgrads, plan.wgrads))
    # Whose precision the products of each layer have.
    if backward:
        gradients = zip(layers, dgrads, wgrads, strict=True)
        computed = [(dgrad or layer, wgrad or layer) for layer, dgrad, wgrad in gradients]
        computed = [(plan,) * 3] * len(pairs) if fused else computed
        special = 2 * outputs if fused else 0
        ends = 2 * widths[0] + widths[-1] + (0 if fused else sum(widths[1:]))
        moved = size * (m * ends + 2 * parameter_count(widths))
    else:
        computed = [(own,) for own in layers or [plan] * len(pairs)]
        special = 2 * outputs
        moved = size * (m * (widths[0] + widths[-1]) + parameter_count(widths))
    each = [
        _product(m * k * n, dtype, own.precision, peaks)
        for (k, n), plans in zip(pairs, computed, strict=True)
        for own in plans
    ]
    flops, products = sum(count for count, _ in each), sum(seconds for _, seconds in each)
    memory, functions = moved / peaks.bandwidth, special / peaks.special
    if fused:
        own = bwd_bytes(m, widths, size, plan) if backward else fwd_bytes(m, widths, size, plan, boundaries)
        took = 1e6 * max(own / peaks.bandwidth, products, functions)
    elif backward:
        above = (*(dgrad is not None for dgrad in dgrads[1:]), False)
        took = sum(
            predict_bwd(m, k, n, dtype, layer, dz_at_hand, dgrad, wgrad, peaks).plan_us
            for (k, n), layer, dz_at_hand, dgrad, wgrad in zip(pairs, layers, above, dgrads, wgrads, strict=True)
        )
    else:
        took = sum(predict(m, k, n, dtype, layer, peaks).plan_us for (k, n), layer in zip(pairs, layers, strict=True))
    return Prediction(flops, moved, special, 1e6 * max(memory, products, functions), took, peaks.name)
