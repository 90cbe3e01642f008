# SPDX-License-Identifier: Apache-2.0
"""An H200 that is not there: what asks for its kernels gets past triton's compiler, to a driver that does nothing.

Everything else is as on a chip: plans, autograd, triton's search of the version for a launch, its launchers in C.
"""

import ctypes
import os
import subprocess
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from perceptriton.kernels import Device, devices, eligibility, small, train

H200 = Device("cuda", 90, 132, triton=True, name="an H200 that is not there")


class Driver:
    """Of triton's driver for CUDA what launches ask, with `libcuda.c` below it, compiled into a folder.

    `launches()`: how many have come so far.
    """

    def __init__(self, folder: Path) -> None:
        library = folder / "libcuda.so.1"
        include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        source = Path(__file__).with_name("libcuda.c")
        # Whoever asks the loader for that name later finds the one that is loaded already.
        command = ["gcc", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", source, "-o", library]
        subprocess.run(command, check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self.launches = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL).launches_so_far
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        self.launcher_cls, self.utils = CudaLauncher, CudaUtils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def pretend(own: Driver) -> None:
    """From now on tensors on the CPU, and on device "meta", are planned for and launched as if they lay on an H200."""
    driver.set_active(own)
    devices.look_at = lambda device: H200
    small.few_elements = lambda *shape: small.few_on_gpu(*shape, torch.device("cuda", 0))
    refusal, enabled = eligibility._kind_refusal, torch.is_autocast_enabled
    eligibility._kind_refusal = lambda x, *rest: None if x.is_meta else refusal(x, *rest)
    eligibility.cpu_refusal = train.cpu_refusal = lambda device: None
    torch.is_autocast_enabled = lambda *kind: kind != ("meta",) and enabled(*kind)  # torch knows no autocast of that
