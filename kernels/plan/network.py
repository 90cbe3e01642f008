# SPDX-License-Identifier: Apache-2.0
"""Whole networks: on chip in as few segments as registers allow, as a stack of wide layers, or layer by layer."""

import functools
import itertools
from typing import NamedTuple

from ..crossover import MLP_MAX_WIDTH
from ..records import Device, MlpPlan, MlpSegment, MlpTile
from ..tables import MLP_TILES, TileRow, tile_rows
from .chips import cdiv, device_refusal, generation, itemsize, next_power_of_2, product_kind
from .cpu import cpu_mlp
from .layer import linear_act_bwd, linear_act_fwd
from .wide import linear_act_dgrad, linear_act_wgrad

# Sums of weight gradients live in registers next to the activations: one backward kernel takes 8, 4, 2 or 1 layers of
# width 16, 32, 64 or 128. In between, a layer counts as the geometric mean of its two widths.
MLP_BACKWARD_WIDTHS = 128

# fp32 products on the FMA units make a pass bound by arithmetic from these widths on, and the backward pass computes
# the forward once more. Up to MLP_IEEE_ROWS rows the launches that are saved count for more. Derived from peak rates,
# not yet measured.
MLP_IEEE_MAX_WIDTH = {False: 64, True: 32}  # by whether the pass goes backward
MLP_IEEE_ROWS = 1 << 14


@functools.lru_cache(maxsize=4096)
def mlp_fwd(
    m: int,
    widths: tuple[int, ...],
    dtype: str,
    precision: str,
    device: Device,
    save: bool = False,
    loss: bool = False,
    impl: str | None = None,
    split: str | None = None,
) -> MlpPlan:
    """The plan for a network of layers widths[l] -> widths[l + 1] on m rows.

    save: activations between the layers are to be stored too, those at `boundaries` of the backward plan. loss: the
    network ends in the fused cross entropy. split: what fp32 products of wide layers may use, as for `linear_act_fwd`.
    """
    return _mlp("mlp_fwd" if save else "mlp_infer", m, widths, dtype, precision, device, loss, impl, split)


@functools.lru_cache(maxsize=4096)
def mlp_bwd(
    m: int,
    widths: tuple[int, ...],
    dtype: str,
    precision: str,
    device: Device,
    loss: bool = False,
    impl: str | None = None,
    split: str | None = None,
) -> MlpPlan:
    """The plan for all gradients of the same network from dy, x, the parameters and the inputs of `boundaries`."""
    return _mlp("mlp_bwd", m, widths, dtype, precision, device, loss, impl, split)


def mlp_bytes(m: int, widths: tuple[int, ...], itemsize: int, forward: MlpPlan, backward: MlpPlan | None = None) -> int:
    """Bytes that fused plans move between the chip and its memory: a forward pass, or a training step.

    Forward, every segment reads its input and its parameters and writes its output; with a backward plan of S segments
    the S - 1 activations at its boundaries are written too. Backward, every segment reads its input, dy and its
    parameters and writes dx; several programs write and read a slot of fp32 sums each, and the gradients are written
    once. With one forward segment and all widths equal that is 2 activations for inference, and 1 + 4 S for a training
    step, plus parameters and slots.
    """
    if backward is None:
        return fwd_bytes(m, widths, itemsize, forward)
    return fwd_bytes(m, widths, itemsize, forward, backward.boundaries) + bwd_bytes(m, widths, itemsize, backward)


def fwd_bytes(m: int, widths: tuple[int, ...], itemsize: int, plan: MlpPlan, boundaries: tuple[int, ...] = ()) -> int:
    stored = {segment.last for segment in plan.segments} | set(boundaries)
    activations = sum(widths[segment.first] for segment in plan.segments) + sum(widths[l] for l in stored)
    return itemsize * (m * activations + parameter_count(widths))


def bwd_bytes(m: int, widths: tuple[int, ...], itemsize: int, plan: MlpPlan) -> int:
    parameters, programs = parameter_count(widths), plan.segments[0].programs
    activations = sum(2 * widths[segment.first] + widths[segment.last] for segment in plan.segments)
    return itemsize * (m * activations + 2 * parameters) + (8 * programs * parameters if programs > 1 else 0)


def parameter_count(widths: tuple[int, ...]) -> int:
    return sum(n * (k + 1) for k, n in itertools.pairwise(widths))


def mlp_columns(widths: tuple[int, ...]) -> tuple[int, ...]:
    """How many columns x, the activations between layers and y have in memory where a fused network writes them.

    Those in between nobody else reads, so their rows are rounded up to whole 16-byte pieces, which cost fewer
    instructions than ragged ones. What padded neurons put out is finite, and the weights that read it are 0.
    """
    return (widths[0], *(cdiv(width, 16) * 16 for width in widths[1:-1]), widths[-1])


def mlp_slots(
    widths: tuple[int, ...], wanted: tuple[bool, tuple[bool, ...], tuple[bool, ...]]
) -> tuple[list[int], list[int], int]:
    """Where each gradient of a weight and of a bias begins in the one tensor that holds all, and its size.

    -1 stands for those that are not wanted. 8 elements align all: 16 bytes of the smallest dtypes.
    """
    _, weights, biases = wanted
    at_weights, at_biases, size = [], [], 0
    for l, (k, n) in enumerate(itertools.pairwise(widths)):
        at_weights.append(size if weights[l] else -1)
        size += cdiv(n * k, 8) * 8 if weights[l] else 0
        at_biases.append(size if biases[l] else -1)
        size += cdiv(n, 8) * 8 if biases[l] else 0
    return at_weights, at_biases, size


def _mlp(op: str, m, widths, dtype, precision, device, loss, impl, split) -> MlpPlan:
    if reason := device_refusal(m, min(widths), 1, dtype, device):
        return MlpPlan("layers", reason)
    if len(widths) == 2 and not loss and impl != "triton":
        return MlpPlan("layers", "a single layer has kernels of its own, which compute nothing twice")
    if device.kind == "cpu" and not device.triton:
        return cpu_mlp(op, m, widths, dtype, device)
    if impl == "torch":
        return MlpPlan("layers", 'impl="torch": layer by layer')
    if max(widths) > MLP_MAX_WIDTH:
        return _stack(op, m, widths, dtype, precision, device, loss, impl, split)
    kind, backward = product_kind(dtype, precision), op == "mlp_bwd"
    if impl is None and kind == "ieee" and m > MLP_IEEE_ROWS and max(widths) > MLP_IEEE_MAX_WIDTH[backward]:
        return MlpPlan("layers", f"fp32 at a width of {max(widths)} is bound by arithmetic, and fusing saves none")
    found = _mlp_segments(op, widths, loss, kind, device.arch)
    if found is None:
        return MlpPlan("layers", f"{kind} products at these widths spill registers in every tile")
    programs = [min(cdiv(m, tile.block_m), device.units * per_sm) for _, _, tile, per_sm in found]
    if backward:
        # Every program writes a slot of sums, and all slots must stay small beside the activations.
        slot = 4 * parameter_count(widths)
        activations = itemsize(dtype) * m * (widths[0] + widths[-1])
        few = all(m <= 4 * tile.block_m for _, _, tile, _ in found)
        programs = [1 if few else min(*programs, max(device.units, activations // (8 * slot)))] * len(found)
    segments = tuple(
        MlpSegment(first, last, tile, count) for (first, last, tile, _), count in zip(found, programs, strict=True)
    )
    cut = f" in {len(segments)} segments" if len(segments) > 1 else ""
    rest = "x and dy are read once each" if backward else "x is read once, y written once"
    return MlpPlan("fused", f"activations stay on chip{cut}; {rest}", segments, precision)


def _stack(op: str, m, widths, dtype, precision, device, loss, impl, split) -> MlpPlan:
    too_wide = f"a width of {max(widths)}: networks stay on chip up to {MLP_MAX_WIDTH}"
    pairs = list(itertools.pairwise(widths))
    dgrads = [None, *(linear_act_dgrad(m, n, k, dtype, precision, device, impl, split) for k, n in pairs[1:])]
    if loss or not any(dgrads):
        return MlpPlan("layers", too_wide)
    reason = "wide layers as one node: the product of a layer's gradient ends in dz of the layer below"
    if op == "mlp_bwd":
        layers = tuple(linear_act_bwd(m, k, n, dtype, precision, device, impl) for k, n in pairs)
        # Where no product of the layer above gives dz, one kernel computes all gradients of the layer.
        apart = [own or above for own, above in zip(dgrads, [*dgrads[1:], None], strict=True)]
        wgrads = tuple(
            linear_act_wgrad(n, m, k, split or precision, device, impl) if dz else None
            for (k, n), dz in zip(pairs, apart, strict=True)
        )
        return MlpPlan("stack", reason, precision=precision, layers=layers, dgrads=tuple(dgrads), wgrads=wgrads)
    size = itemsize(dtype)
    layers = tuple(linear_act_fwd(m, k, n, dtype, precision, device, impl, split, k * size % 16 == 0) for k, n in pairs)
    return MlpPlan("stack", reason, precision=precision, layers=layers)


def _mlp_segments(
    op: str, widths: tuple[int, ...], loss: bool, kind: str, arch: int
) -> list[tuple[int, int, MlpTile, int]] | None:
    """(first, last, tile, programs per SM) of the fewest segments, cut where the network is narrow, or None."""
    # best[l]: (number of segments, widths at their boundaries, segments) for the layers before l
    best: list = [(0, 0, [])]
    for last in range(1, len(widths)):
        options = []
        for first in range(last - 1, -1, -1):
            # Activations between segments are laid out for reading in pieces of 16 bytes; x and y may not be.
            ragged_in = first == 0 and widths[0] % 16 != 0
            ragged_out = last == len(widths) - 1 and (loss or widths[-1] % 16 != 0)
            row = _mlp_row(op, widths[first : last + 1], ragged_in, ragged_out, kind, arch)
            if row is None:
                continue
            count, width, segments = best[first]
            segment = (first, last, row.network_tile, row.programs_per_sm)
            options.append((count + 1, width + widths[first], [*segments, segment]))
        if not options:
            return None
        best.append(min(options, key=lambda option: option[:2]))
    return best[-1][2]


@functools.lru_cache(maxsize=4096)
def _mlp_row(
    op: str, widths: tuple[int, ...], ragged_in: bool, ragged_out: bool, kind: str, arch: int
) -> TileRow | None:
    """The first row of the table whose chain is at least as wide everywhere and at least as long, or None."""
    chain = tuple(max(next_power_of_2(width), 16) for width in widths)
    if op == "mlp_bwd" and sum((k * n) ** 0.5 for k, n in itertools.pairwise(chain)) > MLP_BACKWARD_WIDTHS:
        return None
    layouts = {
        (False, False): ("exact", "in", "out", "both"),
        (True, False): ("in", "both"),
        (False, True): ("out", "both"),
        (True, True): ("both",),
    }[ragged_in, ragged_out]
    for name, layout in itertools.product((op, "mlp_fwd") if op == "mlp_infer" else (op,), layouts):
        for row in tile_rows(MLP_TILES, generation(arch), name, kind, layout):
            starts = range(len(row.widths) - len(chain) + 1)
            if any(all(a >= b for a, b in zip(row.widths[i:], chain, strict=False)) for i in starts):
                return row
    return None


class MlpPlans(NamedTuple):
    """How a whole network runs. Either both directions run as a whole or neither does."""

    forward: MlpPlan
    backward: MlpPlan | None  # None: nobody wants gradients


@functools.lru_cache(maxsize=4096)
def mlp_both(
    rows: int,
    widths: tuple[int, ...],
    dtype: str,
    precision: str,
    device: Device,
    training: bool,
    loss: bool,
    impl: str | None,
    split: str | None,
) -> MlpPlans:
    arguments = (rows, widths, dtype, precision, device)
    if not training:
        return MlpPlans(mlp_fwd(*arguments, False, loss, impl, split), None)
    backward = mlp_bwd(*arguments, loss, impl, split)
    forward = mlp_fwd(*arguments, bool(backward.boundaries), loss, impl, split)
    refused = next((plan for plan in (forward, backward) if plan.impl in ("layers", "aten")), None)
    return MlpPlans(refused, refused) if refused else MlpPlans(forward, backward)
