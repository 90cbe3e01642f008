"""What the compile-only tests of several kernels share."""

import re

import torch

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
