# SPDX-License-Identifier: Apache-2.0
"""What the model of costs on a CPU must say: compiled loops or torch's own operations, by what they were timed at."""

import pytest

from perceptriton.kernels import Device
from perceptriton.kernels.plan import train
from perceptriton.kernels.records import TrainConfig

ADAM = {"optimizer": "adam"}
ZEN4 = Device("cpu", 90, 1, "AMD")
XEON = Device("cpu", 90, 1, "Intel AMX")
ON_CPUS = {
    # The first layers of all members are one product of a library, and two of them, as nobody needs dx.
    "wide shared first layer": (XEON, 200, (256, 2), 256, None, {}, "torch"),
    "likewise under Adam": (XEON, 64, (784, 8, 10), 4096, 256, ADAM, "torch"),
    "narrow shared first layer": (XEON, 200, (4, 8, 8, 2), 512, 8, ADAM, "native"),
    # Weights that are turned for each step, and state beyond the cache, cost compiled loops more than a library.
    "a wide network": (XEON, 1, (10, 784, 50), 64, None, {}, "torch"),
    "momentum beyond the cache": (XEON, 1, (512, 8, 512, 512), 16, None, {"momentum": 0.9}, "torch"),
    # Torch passes over parameters and state several times, compiled loops once: it shows where batches are tiny.
    "passes beyond the cache": (XEON, 1, (20, 784, 512, 32), 4, 2, {"optimizer": "rmsprop"}, "native"),
    # All members' parameters go back to the model after each chunk of steps, here after each step.
    "millions of parameters": (XEON, 1000, (256, 128, 8, 16), 4, None, {}, "torch"),
    "members one by one, each in the cache": (XEON, 1000, (256, 8), 4, None, ADAM, "native"),
    # Torch copies what compiled loops read where it lies.
    "wide samples fetched": (XEON, 1, (784, 10, 4), 4000, 512, {"momentum": 0.9}, "native"),
    # As `benches/results/training-*.json` has them.
    **{
        f"{case}, {cpu.vendor}": (cpu, *sizes, "native")
        for cpu in (ZEN4, XEON)
        for case, sizes in {
            "xor": (1, (2, 2, 1), 4, None, {}),
            "xor-adam": (1, (2, 2, 1), 4, None, ADAM),
            "xor-deep": (1, (2, 10, 10, 10, 1), 4, None, {}),
            "forum": (1, (32, 64, 5), 256, None, {}),
            "digits": (1, (784, 32, 10), 2048, 64, {}),
            "xor-8192": (8192, (2, 2, 1), 4, None, {}),
            "classes-1000": (1000, (8, 16, 3), 512, 64, {}),
        }.items()
    },
}


@pytest.mark.parametrize("case", ON_CPUS)
def test_the_faster_of_torch_and_compiled_loops_is_taken(case):
    """By timings in which the other took at least 1.4 times as long."""
    device, members, widths, samples, batch_size, options, impl = ON_CPUS[case]
    config = TrainConfig(widths, output="identity", loss="mse", **options)
    assert train(members, samples, batch_size, config, "float32", device).impl == impl
