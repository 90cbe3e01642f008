"""What a kernel costs on a chip that is not at hand: compiled ahead of time, read from the machine code.

Used by the tests that gate register spills and by the tool that picks tiles. Needs triton, but no driver.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}

# Bytes of shared memory that one program may use, by chip generation (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Resources:
    """What one program takes. `opcodes` counts machine instructions by name, as in {"HGMMA": 4, "MUFU": 64}.

    `loop_opcodes` counts those from the first loop's head to the last loop's end.
    """

    registers: int  # per thread
    stack: int  # bytes per thread; anything but 0 is a spill
    shared: int  # bytes
    num_warps: int
    opcodes: dict[str, int]
    loop_opcodes: dict[str, int]
    cubin: bytes
    ttgir: str  # the compiler's last representation in which dots and transposes are still operations

    @property
    def spills(self) -> bool:
        """Whether registers did not suffice, and the stack took what was left."""
        return bool(self.stack or self.opcodes.get("LDL", 0) or self.opcodes.get("STL", 0))

    def programs_per_sm(self, arch: int) -> int:
        """How many programs fit on a streaming multiprocessor at once (65,536 registers, 64 warps, 32 programs)."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.num_warps)
        # 1 KB of shared memory per program is the system's.
        by_shared = (SHARED_LIMIT[arch] + 1024) // (self.shared + 1024)
        return max(1, min(by_registers, by_shared, 64 // self.num_warps, 32))


@dataclass(frozen=True)
class Launch:
    """A kernel, the arguments that a launcher gave it by name, and the options of the launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def launches(launcher: Callable, *arguments: Any) -> list[Launch]:
    """The launches that `launcher(*arguments)` makes, recorded instead of run. Its tensors are on device "meta"."""
    recorded: list[Launch] = []

    def record(kernel, *_, grid, warmup, **keywords):
        names = set(kernel.arg_names)
        recorded.append(
            Launch(
                kernel,
                {name: value for name, value in keywords.items() if name in names},
                {name: value for name, value in keywords.items() if name not in names},
            )
        )

    run = JITFunction.run
    JITFunction.run = record  # pyright: ignore[reportAttributeAccessIssue]
    try:
        launcher(*arguments)
    finally:
        JITFunction.run = run
    return recorded


def compile_for(arch: int, launch: Launch) -> Resources:
    """Compile for sm_<arch> what a launch would compile there.

    Ints are specialized as a launch specializes them: 1 becomes a constant, multiples of 16 are known as such.
    Tensors count as aligned to 16 bytes. What the kernel exempts from specialization is exempt here too.
    """
    kernel = launch.kernel
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def specialize(path: tuple[int, ...], value: Any, parameter: Any) -> Any:
        """The type of one argument, or of one element of a tuple of arguments."""
        if isinstance(value, tuple) and not parameter.is_constexpr:
            return tuple(specialize((*path, i), element, parameter) for i, element in enumerate(value))
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{POINTERS[value.base.dtype]}{list(value.block_shape)}>"
        if isinstance(value, Tensor):
            if not parameter.do_not_specialize_on_alignment:
                attributes[path] = [["tt.divisibility", 16]]
            return "*" + POINTERS[value.dtype]
        if type(value) is float and not parameter.is_constexpr:
            return "fp32"
        if type(value) is int and not parameter.is_constexpr and (value != 1 or parameter.do_not_specialize):
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32" if abs(value) < 2**31 else "i64"
        constants[path] = value
        return "constexpr"

    for index, parameter in enumerate(kernel.params):
        signature[parameter.name] = specialize((index,), launch.arguments[parameter.name], parameter)
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options=launch.options,
    )
    cubin = compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # pyright: ignore
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*?);", code)
    instructions = [(int(address, 16), name, rest) for address, name, rest in lines]
    # A loop ends in a jump back to its head.
    jumps = [(int(to[1], 16), at) for at, name, rest in instructions if name == "BRA" and (to := _target(rest))]
    loops = [(head, end) for head, end in jumps if head < end]
    begin, end = min((head for head, _ in loops), default=0), max((end for _, end in loops), default=-1)
    return Resources(
        registers,
        stack,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        dict(Counter(name for _, name, _ in instructions)),
        dict(Counter(name for at, name, _ in instructions if begin <= at <= end)),
        cubin,
        compiled.asm["ttgir"],
    )


def _target(operands: str) -> re.Match[str] | None:
    return re.search(r"0x([0-9a-f]+)", operands)


@functools.cache
def _tool() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _cuobjdump(flag: str, path: str) -> str:
    return subprocess.run([_tool(), flag, path], check=True, capture_output=True, text=True).stdout
