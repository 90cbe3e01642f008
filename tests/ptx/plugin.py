# SPDX-License-Identifier: Apache-2.0
"""`pytest --compiled-for sm_90`: kernel tests, as they are, with what triton compiles for a chip that is not here."""

import os
from collections import defaultdict

import cases
import pytest

from perceptriton.kernels import devices, records

CHIPS = [chip for chip in records.CHIPS if chip != "sm_100"]  # whose own instructions are not emulated


class Emulation:
    """Launches go to the emulator; what it reports fails the test that launched. At the end, what has run."""

    def __init__(self, chip):
        if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            raise pytest.UsageError("--compiled-for: TRITON_INTERPRET is set, which compiles nothing")
        if chip not in CHIPS:
            raise pytest.UsageError(f"--compiled-for must be one of {', '.join(CHIPS)}, not {chip}")
        from . import driver

        self.driver, self.chip = driver, chip
        self.ran = defaultdict(lambda: [0, set(), 0.0])  # by kernel and dtype: launches, compiled kernels, seconds
        cases.EMULATED = chip
        devices.CPU_ARCH = int(chip[3:])
        devices.look_at.cache_clear()
        for name in ("layer", "network", "wide", "train"):  # they ask whether they are interpreted when imported
            devices.gpu(name)
        devices.gpu("launch").ON_CPU = True

    @pytest.fixture(autouse=True)
    def emulated(self):
        """The chip, whatever drivers other tests have set, and memory that knows whether it has been written."""
        with self.driver.activated(int(self.chip[3:])):
            yield

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self):
        for launch in self.driver.launched:
            own = self.ran[launch.name, str(launch.types[0]).removeprefix("torch.") if launch.types else ""]
            own[0] += 1
            own[1].add(id(launch.program))
            own[2] += launch.seconds

    def pytest_terminal_summary(self, terminalreporter):
        for (name, dtype), (launches, programs, seconds) in sorted(self.ran.items()):
            terminalreporter.write_line(
                f"{self.chip} {name} {dtype}: {launches} launches of {len(programs)} kernels, {seconds:.1f} s"
            )
        worst = ", ".join(f"{cases.IDS[dtype]} {part:.2f}" for dtype, part in cases.WORST.items())
        terminalreporter.write_line(f"largest error as a part of what is allowed: {worst}")
