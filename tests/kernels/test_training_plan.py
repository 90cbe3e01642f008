"""Plans for whole training loops: which kernel, which tile, and why not."""

import dataclasses

import pytest

from perceptriton.kernels import Device
from perceptriton.kernels.plan import train
from perceptriton.kernels.records import EMPTY, TrainConfig, TrainPlan

H200 = Device("cuda", 90, 132, triton=True)
A100 = Device("cuda", 80, 108, triton=True)
RTX_4090 = Device("cuda", 89, 128, triton=True)
RTX_5090 = Device("cuda", 120, 170, triton=True)
CPU = Device("cpu", 90, 1, "AMD")
INTERPRETER = dataclasses.replace(CPU, triton=True)
ADAM = {"optimizer": "adam"}


def plan(widths, members=1, samples=4, batch_size=4, device=H200, dtype="float32", impl=None, **options):
    return train(members, samples, batch_size, TrainConfig(widths, **options), dtype, device, impl)


@pytest.mark.parametrize(
    "device", [H200, A100, RTX_4090, RTX_5090, INTERPRETER], ids=lambda own: f"{own.kind}-{own.arch}"
)
@pytest.mark.parametrize(
    ("widths", "options", "impl"),
    [
        ((2, 2, 1), {}, "lane"),
        ((2, 2, 1), ADAM, "lane"),
        ((2, 10, 10, 10, 1), {}, "block"),
        ((2, 10, 10, 10, 1), ADAM, "block"),
        ((32, 64, 5), {}, "block"),
        ((32, 64, 5), ADAM, "block"),
        ((2, 64, 9, 9), {}, "block"),
        ((2, 64, 9, 9), ADAM, "torch"),
        ((2, 64, 64, 1), {}, "torch"),
        ((60, 60), {}, "block"),
        ((60, 60), ADAM, "torch"),
        ((64, 64, 64, 10), {}, "torch"),
        ((784, 32, 10), {}, "torch"),
    ],
    ids=str,
)
def test_which_loop(widths, options, impl, device):
    chosen = plan(widths, device=device, **options)
    # What no kernel takes, a GPU captures.
    assert chosen.impl == ("graph" if (impl, device.kind) == ("torch", "cuda") else impl)
    assert chosen.reason
    assert (chosen.rows > 0) == (impl != "torch")


def test_the_optimizer_s_state_takes_room():
    # 2-12-1 has 49 parameters.
    assert plan((2, 12, 1), impl="lane").impl == "lane"
    assert plan((2, 12, 1), impl="lane", momentum=0.9).impl == "torch"
    assert "49 parameters: a lane holds 17" in plan((2, 12, 1), impl="lane", **ADAM).reason
    # Without biases there are fewer.
    assert plan((2, 12, 1), impl="lane", bias=False, momentum=0.9).impl == "torch"
    assert plan((2, 11, 1), impl="lane", bias=False, momentum=0.9).impl == "lane"


def test_a_large_batch_of_one_network_takes_a_block_and_many_networks_take_lanes():
    sizes = {"samples": 1024, "batch_size": 256}
    assert plan((2, 4, 1), **sizes).impl == "block"
    assert plan((2, 4, 1), members=1 << 17, **sizes).impl == "lane"


def test_a_block_takes_as_many_samples_as_the_batch_has_and_as_fit_beside_the_weights():
    assert plan((2, 10, 10, 1)) == TrainPlan("block", plan((2, 10, 10, 1)).reason, 16, 1, 4)
    assert plan((2, 10, 10, 1), samples=64, batch_size=17).rows == 32
    # A batch is never larger than the samples there are.
    assert plan((2, 10, 10, 1), samples=9, batch_size=64).rows == 16
    assert plan((2, 10, 10, 1), samples=64, batch_size=None).rows == 32
    assert plan((32, 64, 5), samples=64, batch_size=64).rows == 16


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": CPU, "impl": "torch"}, "no kernels for the CPU"),
        ({"device": dataclasses.replace(H200, triton=False)}, "triton is not installed"),
        ({"device": Device("cuda", 75, 40, triton=True)}, "compute capability 7.5"),
        ({"device": Device("mps")}, "mps"),
        ({"dtype": "float64"}, "float64: whole loops take float32"),
        ({"dtype": "bfloat16"}, "bfloat16: whole loops take float32"),
        ({"samples": 0}, EMPTY),
        ({"members": 0}, EMPTY),
        ({"impl": "torch"}, 'impl="torch"'),
        ({**ADAM, "eps": 0.0}, "eps 0.0"),
    ],
    ids=str,
)
def test_reasons_for_no_kernel(options, reason):
    chosen = plan((2, 2, 1), **options)
    captured = options.get("device", H200).kind == "cuda" and reason not in (EMPTY, 'impl="torch"')
    assert chosen.impl == ("graph" if captured else "torch")
    assert reason in chosen.reason


def test_a_graph_is_had_on_a_gpu_only():
    assert plan((784, 32, 10), impl="graph").impl == plan((2, 2, 1), impl="graph").impl == "graph"
    refused = plan((784, 32, 10), impl="graph", device=CPU)
    assert (refused.impl, refused.reason) == ("torch", "cpu: only a CUDA device captures graphs")


def test_where_both_are_refused_both_reasons_are_given():
    reason = plan((2, 65, 1)).reason
    assert "a lane holds 49" in reason
    assert "a width of 65: blocks take 64" in reason


@pytest.mark.parametrize("impl", ["lane", "block"])
def test_what_is_asked_for_is_planned_or_refused(impl):
    assert plan((2, 2, 1), impl=impl).impl == impl
    refused = plan((2, 100, 1), impl=impl)
    assert refused.impl == "torch"
    assert {"lane": "parameters", "block": "width"}[impl] in refused.reason
