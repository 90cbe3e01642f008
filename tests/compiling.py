"""What the compile-only tests share: cases compiled ahead of time in all cores, and the table that they print."""

import dataclasses
import multiprocessing
import os
import re
from pathlib import Path

import pytest
import torch

OPCODES = ("HGMMA", "HMMA", "FFMA", "MUFU")


def compile_selected(request, cases, compile):
    """name -> the Resources that compile(case) lists, for the cases that selected tests name.

    Prints a row per launch, and writes the cubins into the folder that --cubins names.
    """
    selected = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    names = [name for name in cases if name in selected]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        table = dict(zip(names, pool.map(compile, [cases[name] for name in names], chunksize=1), strict=True))
    if option := request.config.getoption("--cubins"):
        folder = Path(option)
        folder.mkdir(parents=True, exist_ok=True)
        for name, results in table.items():
            for index, resources in enumerate(results):
                (folder / f"{name}.{index}.cubin").write_bytes(resources.cubin)
    print("\n" + f"{'kernel':64}" + "".join(f"{head:>7}" for head in ("regs", "stack", "smem", "warps", *OPCODES)))
    for name, results in table.items():
        for own in results:
            cells = (own.registers, own.stack, own.shared, own.num_warps, *map(own.opcodes.get, OPCODES))
            print(f"{name:64}" + "".join(f"{cell or 0:7}" for cell in cells))
    return table


def assert_fits(resources, arch):
    """Neither spills nor too much shared memory.

    Tables of tiles name the tritons whose compilers they were made with. Another one may spill a few bytes where these
    do not: reported, and no fault. What it compiles must fit and compute all the same.
    """
    import triton

    from perceptriton.kernels import aot
    from perceptriton.kernels import plan as planning

    assert resources.shared <= aot.SHARED_LIMIT[arch]
    if triton.__version__ not in planning._table("gpu_tiles.json")["triton"] and resources.spills:
        pytest.xfail(f"triton {triton.__version__}, with which no table was made, spills {resources.stack} bytes")
    assert resources.stack == 0, f"{resources.stack} bytes of stack per thread"
    assert not resources.spills


# --- what was compiled -----------------------------------------------------------------------------------------------

DOTS = ("tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma")


def dangerous_dots(ttgir):
    """Dots whose left operand is the transpose, in registers, of something that came from another dot.

    triton 3.4.0-3.7.0 miscompile them on Hopper. Between the transpose and the dot there may be conversions, arithmetic
    and a round trip through shared memory.
    """
    definitions = {}
    for line in ttgir.splitlines():
        if found := re.match(r'\s*(%\w+)(?::\d+)? = "?([\w.]+)"?(.*)', line):
            definitions[found[1]] = (found[2], re.findall(r"%\w+", found[3]))

    def reaches(value, stops, goal, seen):
        """Whether following operands back from `value`, not past `stops`, arrives at an op that is a goal."""
        if value in seen or value not in definitions:
            return False
        seen.add(value)
        op, operands = definitions[value]
        if goal(op, operands):
            return True
        return op not in stops and any(reaches(operand, stops, goal, seen) for operand in operands)

    def from_dot(op, operands):
        return op in DOTS

    def transposed_dot(op, operands):
        return op == "tt.trans" and any(reaches(operand, ("tt.load",), from_dot, set()) for operand in operands)

    return [
        value
        for value, (op, operands) in definitions.items()
        if op in DOTS and operands and reaches(operands[0], (*DOTS, "tt.load"), transposed_dot, set())
    ]


def _real(value):
    if isinstance(value, tuple):
        return tuple(map(_real, value))
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return dataclasses.replace(value, base=_real(value.base))
    return torch.empty_like(value, device="cpu") if isinstance(value, torch.Tensor) else value


def launch_signature(launch):
    """Types, constants and attributes that triton's own launch code derives from the arguments of a recorded launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    # Tensors on a device that has addresses; "meta" has none.
    arguments = {name: _real(value) for name, value in launch.arguments.items()}
    keywords = arguments | launch.options | {"debug": False, "instrumentation_mode": ""}
    bound, specialization, options = binder(**keywords)
    _, types, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    return types, constants, {path: value for path, value in attributes.items() if value}
