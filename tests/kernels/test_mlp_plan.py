# SPDX-License-Identifier: Apache-2.0
"""Plans for whole networks: which segments, what they move, and why not."""

import itertools

import pytest

from perceptriton.kernels import Device, records, tables
from perceptriton.kernels import plan as planning

if not (tables.TABLES / "mlp_tiles.json").exists():
    pytest.skip("no tile table yet: python benches/tune.py networks writes it", allow_module_level=True)

H200 = Device("cuda", 90, 132, triton=True)
A100 = Device("cuda", 80, 108, triton=True)
RTX_3090 = Device("cuda", 86, 82, triton=True)
RTX_5090 = Device("cuda", 120, 170, triton=True)
DEVICES = {f"sm_{device.arch}": device for device in (A100, RTX_3090, H200, RTX_5090)}
ROWS = 1 << 20


def plans(widths, dtype="bfloat16", precision="ieee", device=H200, rows=ROWS, loss=False, impl=None):
    """(inference, forward of a training step, backward)"""
    backward = planning.mlp_bwd(rows, widths, dtype, precision, device, loss, impl)
    save = bool(backward.boundaries)
    return (
        planning.mlp_fwd(rows, widths, dtype, precision, device, False, loss, impl),
        planning.mlp_fwd(rows, widths, dtype, precision, device, save, loss, impl),
        backward,
    )


def uniform(width, layers):
    return (width,) * (layers + 1)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize(("width", "layers"), [(16, 8), (32, 4), (64, 2), (128, 1)])
def test_layers_per_backward_segment(width, layers, device):
    assert len(plans(uniform(width, layers), device=device, impl="triton")[2].segments) == 1
    assert len(plans(uniform(width, 2 * layers), device=device)[2].segments) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("width", "layers"), [(16, 8), (32, 4), (64, 2), (64, 4), (64, 8), (128, 1), (128, 4)])
def test_activations_that_are_moved(width, layers, dtype):
    inference, forward, backward = plans(uniform(width, layers), dtype, impl="triton")
    parameters = layers * width * (width + 1)
    activation = ROWS * width * 2
    segments = len(backward.segments)
    inference_bytes = planning.mlp_bytes(ROWS, uniform(width, layers), 2, inference)
    training_bytes = planning.mlp_bytes(ROWS, uniform(width, layers), 2, forward, backward)
    # inference reads x and the parameters and writes y
    assert inference_bytes == 2 * activation + 2 * parameters
    slots = 8 * parameters * backward.segments[0].programs
    extra = len(forward.segments) - 1
    assert training_bytes == (1 + 4 * segments + extra) * activation + 6 * parameters + slots
    # what several programs add stays small beside it
    assert slots < 0.1 * training_bytes
    assert extra == 0 or width == 128


def test_bytes_of_a_ragged_network():
    widths = (31, 64, 64, 2)
    inference, forward, backward = plans(widths)
    parameters = sum(n * (k + 1) for k, n in itertools.pairwise(widths))
    assert planning.mlp_bytes(ROWS, widths, 2, inference) == 2 * (ROWS * (31 + 2) + parameters)
    assert backward.boundaries in ((1,), (2,))
    read = (31 + 64 + 2) + (31 + 64 + 31) + (64 + 2 + 64)
    slots = 8 * parameters * backward.segments[0].programs
    assert planning.mlp_bytes(ROWS, widths, 2, forward, backward) == 2 * (ROWS * read + 3 * parameters) + slots


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize(
    ("widths", "segments"),
    [((2, 10, 10, 10, 1), 1), ((32, 64, 5), 1), ((31, 64, 64, 2), 2), ((36, 64, 9, 1), {80: 2, 86: 2, 90: 1, 120: 2})],
    ids=["xor", "digits", "policy", "funnel"],
)
def test_known_networks(widths, segments, device):
    segments = segments[device.arch] if isinstance(segments, dict) else segments
    inference, forward, backward = plans(widths, device=device)
    assert len(inference.segments) == len(forward.segments) == 1
    assert len(backward.segments) == segments


def test_segments_follow_each_other():
    nets = ((2, 2, 1), (7, 33, 20, 16, 3, 9, 17, 2, 40), uniform(64, 11), (3, 128, 128, 64, 1), uniform(16, 30))
    for widths, dtype, rows in itertools.product(nets, records.DTYPES, (1, 17, 1000, ROWS)):
        for plan in plans(widths, dtype, rows=rows):
            if plan.impl == "layers":
                # fp32 sums of a weight of 128 x 128 fit in no tile, and those of wide weights pay for few rows alone
                assert dtype == "float32"
                assert max(widths) == 128 or (max(widths) > 32 and rows == ROWS)
                continue
            ends = [0, *(segment.last for segment in plan.segments)]
            assert [segment.first for segment in plan.segments] == ends[:-1]
            assert ends[-1] == len(widths) - 1
            assert plan.boundaries == tuple(ends[1:-1])
            for segment in plan.segments:
                assert 1 <= segment.programs <= -(-rows // segment.tile.block_m)
        assert plan.impl == "layers" or len({segment.programs for segment in plan.segments}) == 1, (
            "of one backward pass"
        )


def test_cuts_where_the_network_is_narrow():
    assert plans((64, 64, 16, 64, 64))[2].boundaries == (2,)


def test_a_single_layer_has_kernels_of_its_own():
    for plan in plans((64, 64)):
        assert plan.impl == "layers"
        assert "single layer" in plan.reason
    # but not with a loss at its end
    assert {plan.impl for plan in plans((64, 1), loss=True)} == {"fused"}


def test_few_rows_take_one_program():
    for rows in (1, 16, 64):
        assert {segment.programs for segment in plans((32, 64, 5), rows=rows)[2].segments} == {1}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"widths": (784, 128, 10)}, "784"),
        ({"widths": (2, 2, 1), "rows": 0}, "nothing to compute"),
        ({"widths": (2, 0, 1)}, "nothing to compute"),
        ({"widths": (2, 2, 1), "dtype": "float64"}, "float64"),
        ({"widths": (2, 2, 1), "device": Device("cuda", 75, 40, triton=True)}, "7.5"),
        ({"widths": (2, 2, 1), "device": Device("cuda", 90, 132)}, "triton"),
        ({"widths": (2, 2, 1), "impl": "torch"}, "torch"),
    ],
    ids=str,
)
def test_reasons_for_layers(arguments, reason):
    for plan in plans(**arguments):
        assert plan.impl == "layers"
        assert reason in plan.reason
        assert plan.segments == ()


def test_wide_fp32_is_left_to_layers_when_rows_are_many():
    for widths, forward_fused, backward_fused in (
        (uniform(32, 4), 1, 1),
        (uniform(64, 2), 1, 0),
        (uniform(128, 2), 0, 0),
    ):
        inference, _, backward = plans(widths, "float32")
        assert (inference.impl == "fused", backward.impl == "fused") == (forward_fused, backward_fused)
        assert planning.mlp_bwd(ROWS, widths, "float32", "tf32", H200).impl == "fused"
    assert plans(uniform(64, 2), "float32", rows=4096)[2].impl == "fused"
    assert plans(uniform(64, 2), "float32", impl="triton")[2].impl == "fused"


def test_programs_that_torch_has_cached_find_their_gradients():
    """Compiled programs hold these numbers, and torch's caches keep programs from one version to the next.

    Whoever changes one of them renames the ops `mlp` and `mlp_bce` (kernels/registration.py), by which caches find
    programs: those of the old version would take gradients from the wrong places.
    """
    widths, all_of_three = (3, 5, 9, 2), (True,) * 3
    assert planning.mlp_columns(widths) == (3, 16, 16, 2)
    assert planning.mlp_slots(widths, (True, all_of_three, all_of_three)) == ([0, 24, 88], [16, 72, 112], 120)
    assert planning.mlp_slots(widths, (False, (True, False, True), (False, True, False))) == (
        [0, -1, 32],
        [-1, 16, -1],
        56,
    )
