# SPDX-License-Identifier: Apache-2.0
"""A driver of triton for a chip that is absent: what it launches runs here, on the memory of CPU tensors."""

import contextlib
import struct
import weakref
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from perceptriton.kernels.records import CHIPS

from . import machine, translate
from .parse import EmulationError
from .tma import TensorMap

FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"}
FORMATS |= {"u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}
# What is known and meant to be seen through, by the beginning of triton's version.
KNOWN = {"3.6.": ("wgmma reads what cp.async wrote, with no fence.proxy.async between",)}

launched = []  # every Launch since the chip is there, or somebody has cleared the list
edit = None  # a function of the PTX, for faults that are planted
raising = True  # whether faults raise at the end of the launch


@contextlib.contextmanager
def activated(arch):
    """Makes a chip of that compute capability, as in 90, triton's current device, and gives the list of its launches.

    Machine code is not made, and fresh tensors know that nobody has written them.
    """
    with (
        mock.patch.object(CUDABackend, "make_cubin", return_value=b"no machine code"),
        # What lies in triton's cache without machine code is not for those who have the chip.
        mock.patch.object(CUDABackend, "hash", lambda self: f"emulated-{self.target.arch}"),
        mock.patch.object(CompiledKernel, "_init_handles", _init_handles),
        mock.patch.object(driver, "_active", Driver(arch)),
        marked_fresh(),
    ):
        launched.clear()
        yield launched


class Driver:
    def __init__(self, arch):
        self.arch = arch
        self.utils = self

    def get_current_device(self):
        return self.arch  # kernels that are compiled for different chips are kept apart by it

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": CHIPS[f"sm_{self.arch}"].shared, "multiprocessor_count": 132, "warpSize": 32}

    def get_active_torch_device(self):
        return torch.device("cpu")


def _init_handles(compiled):
    if compiled.module is None:
        limit = driver.active.get_device_properties(None)["max_shared_mem"]
        if compiled.metadata.shared > limit:
            raise OutOfResources(compiled.metadata.shared, limit, "shared memory")
        compiled._run = Launcher(compiled)
        compiled.module = compiled.function = 0
        compiled.n_regs, compiled.n_spills, compiled.n_max_threads = 0, 0, 1024


class Launcher:
    """Takes what triton gives to the launcher of a kernel, and runs the kernel."""

    def __init__(self, compiled):
        self.compiled = compiled
        self.signature = list(compiled.src.signature.values())
        self.descriptors = list(getattr(compiled.metadata, "tensordesc_meta", None) or [])

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        found = _Arguments(self.descriptors)
        for kind, value in zip(self.signature, arguments, strict=True):
            found.add(kind, value)
        found.values += [("u64", 0)] * 2  # global and profile scratch
        name, text = self.compiled.metadata.name, self.compiled.asm["ptx"]
        program = translate.program(edit(text) if edit else text, self.compiled.metadata.shared)
        launch = machine.Launch(program, (x, y, z), *found.packed(program))
        launch.name, launch.types = name, found.types
        launch.run()
        launched.append(launch)
        known = next((own for version, own in KNOWN.items() if triton.__version__.startswith(version)), ())
        if raising and set(launch.faults).difference(known):
            raise EmulationError(f"{name}: {launch.describe()}")


class _Arguments:
    """The arguments of a launch, tuples taken apart."""

    def __init__(self, descriptors):
        self.descriptors = iter(descriptors)
        self.values, self.extents, self.types = [], [], []

    def add(self, kind, value):
        if isinstance(kind, tuple):
            for inner, element in zip(kind, value, strict=True):
                self.add(inner, element)
        elif kind.startswith("tensordesc"):
            self.add_descriptor(next(self.descriptors), value)
        elif kind.startswith("*"):
            self.values.append(("u64", 0 if value is None else value.data_ptr()))
            if value is not None:
                self.add_extent(value)
        elif kind != "constexpr":
            self.values.append((kind, value))

    def add_descriptor(self, layout, value):
        if value.padding not in ("zero", None):
            raise NotImplementedError(f"padding: {value.padding}")
        row = {0: 0, 1: 32, 2: 64, 3: 128}[layout["swizzle"]]
        shape, strides = tuple(value.shape), tuple(value.strides)
        box = TensorMap(value.base.data_ptr(), shape, strides, tuple(layout["block_size"]), layout["elem_size"], row)
        self.values += [("map", box), *(("i32", size) for size in shape), *(("i64", stride) for stride in strides)]
        self.add_extent(value.base)

    def add_extent(self, tensor):
        self.types.append(tensor.dtype)
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            self.extents.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))

    def packed(self, program):
        """What a Launch takes: parameters, extents, tensor maps, what nobody has written."""
        declared = program.entry.parameters
        if len(declared) != len(self.values):
            raise EmulationError(f"{len(self.values)} arguments for {len(declared)} parameters")
        parameters, maps = bytearray(-(-program.parameter_bytes // 8) * 8), {}
        for (_, size, offset), (kind, value) in zip(declared, self.values, strict=True):
            if kind == "map":
                maps[translate.PARAMETER_BASE + offset] = value
            else:
                parameters[offset : offset + size] = struct.pack("<" + FORMATS[kind], value).ljust(size, b"\0")
        touched = [
            own for own in _fresh.values() if any(own[0] < end and start < own[1] for start, end in self.extents)
        ]
        return bytes(parameters), self.extents, maps, touched


# --- memory that nobody has written ----------------------------------------------------------------------------------

PATTERNS = {2: 0x7FBA, 4: 0x7FBADBAD, 8: 0x7FF4BADBADBADBAD}  # NaN of each size, which nothing computes
_fresh = {}  # address -> (start, end, pattern) of fresh tensors


@contextlib.contextmanager
def marked_fresh():
    """torch.empty, empty_strided and new_empty give memory whose first reader is told."""
    empty, strided, new_empty = torch.empty, torch.empty_strided, torch.Tensor.new_empty
    with (
        mock.patch.object(torch, "empty", lambda *a, **k: _marked(empty(*a, **k))),
        mock.patch.object(torch, "empty_strided", lambda *a, **k: _marked(strided(*a, **k))),
        mock.patch.object(torch.Tensor, "new_empty", lambda self, *a, **k: _marked(new_empty(self, *a, **k))),
    ):
        yield


def _marked(t):
    size = t.element_size()
    ordinary = type(t) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    if not (ordinary and t.device.type == "cpu" and t.is_floating_point() and t.numel() and t.is_contiguous()):
        return t
    storage = t.untyped_storage()
    if size in PATTERNS and storage.nbytes() < 1 << 28:
        t.detach().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).fill_(PATTERNS[size])
        start = storage.data_ptr()
        _fresh[start] = start, start + storage.nbytes(), np.array(PATTERNS[size], f"u{size}").tobytes()
        weakref.finalize(storage, _fresh.pop, start, None)
    return t
