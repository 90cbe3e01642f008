# SPDX-License-Identifier: Apache-2.0
"""What is known of devices: probing, precision, and the modules that hold kernels for GPUs."""

import dataclasses
import functools
import importlib
import importlib.util
import warnings

import torch

from . import plan as planning
from .records import SPLITS, Device

CPU_ARCH = 90  # the compute capability that plans assume where kernels run on the CPU
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """The name that plans and tables know, of other dtypes torch's own."""
    return DTYPE_NAMES.get(dtype, str(dtype))


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def triton_refusal() -> str | None:
    """Why triton launches nothing on this machine's GPUs, or None.

    Imports triton, and starts its driver, which a C compiler makes where none has been made before: an image without a
    compiler is found out here, and not in the middle of a model.
    """
    if not has_triton():
        return "triton is not installed"
    try:
        _ = importlib.import_module("triton").runtime.driver.active
    except Exception as error:
        return f"triton's driver does not start: {error}"
    return None


@functools.cache
def gpu(name: str):
    """The module of that name which holds kernels and their launchers. The first one imports triton."""
    return importlib.import_module(f".gpu.{name}", __package__)


def cpu_refusal(device: torch.device) -> str | None:
    if device.type == "cpu" and not (has_triton() and gpu("launch").ON_CPU):
        return "x is on the CPU, which triton reaches only under its interpreter (TRITON_INTERPRET=1)"
    return None


@functools.cache
def cpu_kind() -> str:
    """The first word of the CPU's name ("AMD", "Intel"), or "" where torch does not tell; "AMD Zen 5" and "Intel AMX"
    of their newer CPUs.

    MKL uses 256-bit vectors on AMD. From Zen 5 on, whose 512-bit units are of full width, oneDNN is twice as fast; on
    older ones it is not. Among AMD's CPUs with AVX-512, AVX-VNNI came with Zen 5. Intel's with AMX (4th generation Xeon
    and later) multiply bfloat16 many times as fast as the older ones.
    """
    try:
        found = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):
        return ""
    vendor = str(found.get("cpu_name", "")).partition(" ")[0]
    if vendor == "AMD" and found.get("avx512_f") and found.get("avx_vnni"):
        return "AMD Zen 5"
    return "Intel AMX" if vendor == "Intel" and found.get("amx_bf16") else vendor


@functools.cache
def look_at(device: torch.device) -> Device:
    if device.type == "cuda" and torch.version.hip:
        return Device("ROCm")  # torch names AMD's GPUs "cuda" too
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        arch = 10 * properties.major + properties.minor
        refusal = triton_refusal() or ""
        return Device("cuda", arch, properties.multi_processor_count, "", not refusal, properties.name, refusal)
    return Device("cpu", CPU_ARCH, 1, cpu_kind()) if device.type == "cpu" else Device(device.type)


@functools.cache
def describe(device: torch.device, interpreted: bool = False) -> Device:
    """What plans need to know of a device. Says once if it is a GPU that the kernels cannot use."""
    described = look_at(device)
    if device.type == "cuda" and (reason := planning.device_refusal(1, 1, 1, "float32", described)):
        warnings.warn(f"perceptriton runs as plain torch on {device}: {reason}", stacklevel=2)
    return dataclasses.replace(described, triton=True) if interpreted else described


def device_for(device: torch.device, impl: str | None) -> Device:
    # CPU tensors reach the kernels only when asked for, and only under triton's interpreter.
    return describe(device, device.type == "cpu" and impl == "triton" and gpu("launch").ON_CPU)


def fp32_precision(device: Device) -> str:
    """How fp32 products are to be computed, from torch's setting at the time of the call."""
    if device.kind != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


_fp32_split: str | None = None


def allow_fp32_split(mode: str | None) -> str | None:
    """Lets wide layers compute fp32 products as several products of tensor cores; returns what was allowed.

    mode: "tf32x3" or "bf16x6" (errors like fp32's, three and six products), "bf16x3" (three products, some 16 bits) or
    None, the default: nothing but what torch's own setting says. A permission for this process, like torch's: taken
    where the kernels for wide layers apply (compute capability 9.0 and 10.x, rows that start at multiples of 16 bytes),
    forward and, inside a network, backward in all but dx of its input; nowhere else. docs/precision.md lists errors and
    what happens at the ends of fp32's range.
    Raises ValueError for any other mode.
    """
    global _fp32_split
    if mode is not None and mode not in SPLITS:
        raise ValueError(f"mode must be None or one of {', '.join(map(repr, SPLITS))}, not {mode!r}")
    before, _fp32_split = _fp32_split, mode
    return before


def fp32_split(dtype: torch.dtype) -> str | None:
    return _fp32_split if dtype is torch.float32 else None


def fp32_setting(dtype: torch.dtype) -> tuple | None:
    """What decides how products in this dtype are computed, beside their shapes: settings of the process for fp32."""
    # torch.backends.cuda.matmul.fp32_precision reads the same, and takes a microsecond longer.
    return (torch._C._get_fp32_precision_getter("cuda", "matmul"), _fp32_split) if dtype is torch.float32 else None
