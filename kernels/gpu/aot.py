# SPDX-License-Identifier: Apache-2.0
"""What a kernel costs on a chip that is not at hand: compiled ahead of time, read from the machine code.

Used by the tests that gate register spills and by the tool that picks tiles. Needs triton, but no driver.
"""

import ast
import functools
import hashlib
import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction
from triton.runtime.jit import DependenciesFinder, JITCallable
from triton.tools.tensor_descriptor import TensorDescriptor

from ..records import CHIPS

POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}

SHARED_LIMIT = {int(name[3:]): chip.shared for name, chip in CHIPS.items()}  # bytes, by compute capability


# The machine instructions that are counted by name, each in all its forms.
OPCODES = ("HGMMA", "HMMA", "UTCHMMA", "FFMA", "MUFU", "LDG", "LDL", "STL", "UTMALDG", "UTMASTG")


@dataclass(frozen=True)
class Resources:
    """What one program takes: numbers alone, so that a table can hold them.

    `opcodes` counts the instructions in OPCODES by name, as in {"HGMMA": 4, "MUFU": 64, ...}, and all of them as "all";
    `loop_opcodes` counts those from the first loop's head to the last loop's end.
    """

    registers: int  # per thread
    stack: int  # bytes per thread; anything but 0 is a spill
    shared: int  # bytes
    num_warps: int
    opcodes: dict[str, int]
    loop_opcodes: dict[str, int]
    findings: dict[str, int] = field(default_factory=dict)  # what the caller counts besides

    @property
    def products(self) -> int:
        """Instructions of tensor cores, of whatever generation."""
        return sum(count for name, count in self.opcodes.items() if "MMA" in name)

    @property
    def spills(self) -> bool:
        """Whether registers did not suffice, and the stack took what was left."""
        return bool(self.stack or self.opcodes["LDL"] or self.opcodes["STL"])

    def programs_per_sm(self, arch: int) -> int:
        """How many programs fit on a streaming multiprocessor, with its 65,536 registers, at once."""
        chip = CHIPS[f"sm_{arch}"]
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.num_warps)
        # 1 KB of shared memory per program is the system's.
        by_shared = (chip.shared + 1024) // (self.shared + 1024)
        return max(1, min(by_registers, by_shared, chip.warps // self.num_warps, chip.programs))


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
        names = [name for name in keywords if name in kernel.arg_names]
        recorded.append(Launch(kernel, {name: keywords.pop(name) for name in names}, keywords))

    with mock.patch.object(JITFunction, "run", record):
        launcher(*arguments)
    return recorded


# What to count in the texts that the compiler leaves, "ttir", "ttgir", "ptx" and "sass": a function for each name.
Findings = Mapping[str, Callable[[dict[str, Any]], int]]


def compile_for(arch: int, launch: Launch, findings: Findings | None = None) -> Resources:
    """What the kernel that a launch would compile for sm_<arch> takes there, as the machine code says."""
    return measure(compiled(arch, launch), findings)


def compiled(arch: int, launch: Launch) -> CompiledKernel:
    """What a launch would compile on sm_<arch>."""
    return triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options)


def source(launch: Launch) -> ASTSource:
    """A launch as the compiler sees it: the kernel, types of its arguments, and what is known of their values.

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
    return ASTSource(kernel, signature, constants, attributes)


def measure(compiled: CompiledKernel, findings: Findings | None = None) -> Resources:
    """The resources of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # pyright: ignore
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*?);", code)
    instructions = [(int(address, 16), name, rest) for address, name, rest in lines]
    # A loop ends in a jump back to its head.
    targets = ((re.search(r"0x([0-9a-f]+)", rest), at) for at, name, rest in instructions if name == "BRA")
    jumps = [(int(target[1], 16), at) for target, at in targets if target]
    loops = [(head, end) for head, end in jumps if head < end]
    begin, end = min((head for head, _ in loops), default=0), max((end for _, end in loops), default=-1)
    texts = {**compiled.asm, "sass": code}
    return Resources(
        registers,
        stack,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        _counts([name for _, name, _ in instructions]),
        _counts([name for at, name, _ in instructions if begin <= at <= end]),
        {name: count(texts) for name, count in (findings or {}).items()},
    )


def _counts(names: list[str]) -> dict[str, int]:
    counts = Counter(names)
    return {name: counts[name] for name in OPCODES} | {"all": len(names)}


def _cuobjdump(flag: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout


def identity(arch: int, launch: Launch) -> str:
    """The name of what `compiled` would make, found without compiling: another one as soon as anything differs.

    The code of the kernel and of all that it calls counts, with the values it reads, and so do types, constants,
    options and the versions of both compilers. Comments, docstrings, files and line numbers do not.
    """
    own = source(launch)
    compilers = triton.__version__, get_ptxas_version(arch)
    parts = own.fn, own.signature, own.constants, own.attrs, launch.options, arch, compilers
    return hashlib.sha256(_text(parts).encode()).hexdigest()[:20]


class _Dependencies(DependenciesFinder):
    """triton's search for what a function's code hangs on. Its own key of that holds files and line numbers too."""

    def __init__(self, function: JITCallable) -> None:
        tree = function.parse()
        (definition,) = tree.body
        if ast.get_docstring(definition) is not None:  # pyright: ignore[reportArgumentType]
            del definition.body[0]  # pyright: ignore[reportAttributeAccessIssue]
        nonlocals = inspect.getclosurevars(function.fn).nonlocals
        super().__init__(function.__name__, function.__globals__, nonlocals, _text(tree))
        self.visit(tree)
        values = {name: value for (name, _), (value, _) in self.used_global_vals.items()}
        parameters = function.signature.parameters.values()
        # A default keeps the value that it had when the function was defined.
        defaults = {own.name: own.default for own in parameters if own.default is not own.empty}
        self.hasher.update(_text((values, defaults, getattr(function, "noinline", False))).encode())

    def _update_hash(self, func: JITCallable) -> None:
        self.hasher.update(_code(func).encode())

    def record_reference(self, val: Any, var_dict: Any = None, name: Any = None) -> None:
        # triton's own search leaves out values that are reached through a module.
        name = name or f"attribute {len(self.used_global_vals)}"
        super().record_reference(val, self.globals if var_dict is None else var_dict, name)


@functools.cache
def _code(function: JITCallable) -> str:
    return _Dependencies(function).ret


def _text(value: Any) -> str:
    """A value in words that are the same in every process and for every Python."""
    if isinstance(value, JITCallable):
        return _code(value)
    if isinstance(value, tl.constexpr):
        return _text(value.value)
    if isinstance(value, ast.AST):  # ast.dump shows empty fields in some Pythons alone
        fields = [f"{name}={_text(own)}" for name, own in ast.iter_fields(value) if own is not None and own != []]
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_text(key)}: {_text(own)}' for key, own in value.items()))}}}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, tl.dtype)):
        return repr(value)
    raise TypeError(f"a kernel hangs on {value!r}, a {type(value).__name__}, which has no text of its own")
