# SPDX-License-Identifier: Apache-2.0
"""What the suites of bench_stacks.py time: shapes with their reasons, and the arithmetic and traffic that each needs.

A case is a stack of linear + sigmoid layers over `rows` rows; most are one layer. With M rows and a layer from K
inputs to N outputs, counting the products only (2 operations per multiply-add; the bias, the sigmoid and its
derivative add 1/K to 1/N of that):

    forward              2 M K N
    backward             2 M K N for dweight, and as many for dx where x requires a gradient

Bytes are those of an ideal fused implementation, each operand moved once, nothing kept in a cache between the forward
and the backward pass:

    one layer, forward   reads x (M K), weight (N K), bias (N); writes y (M N)
    one layer, backward  reads dy, y (M N each), x (M K), weight (N K); writes dx (M K), dweight (N K), dbias (N)
    stack, forward       reads x and all parameters; writes the last y: activations in between never leave the chip
    stack, backward      reads x, all parameters and dy, recomputing the activations; writes the parameters' gradients
                         (x is data there and gets none)

What stands behind the last layer (`tail`) adds no products, and y is what comes out of it.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

MODES = ("forward", "forward+backward")
ITEMSIZE = {"float32": 4, "bfloat16": 2}
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}

# Tails that make one number of a row.
REDUCING = ("logsumexp", "sum")


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    sizes: tuple[int, ...]  # the widths of the input and of every layer's output
    devices: tuple[str, ...] = ("cpu", "cuda")
    activation: str = "sigmoid"  # of the hidden layers
    output_activation: str = "sigmoid"
    tail: str = ""  # what torch makes of the last layer's output: one of contenders.TAILS
    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = tuple(ITEMSIZE)
    tolerance: float | None = None  # how far each element may be off, absolutely and relative to its own size

    @property
    def x_requires_grad(self) -> bool:
        """One layer stands for a layer inside a network; a stack is a whole network, whose input is data."""
        return len(self.sizes) == 2

    @property
    def parameters(self) -> int:
        return sum(n * k + n for k, n in pairwise(self.sizes))

    def flops(self, mode: str) -> int:
        products = [2 * self.rows * k * n for k, n in pairwise(self.sizes)]
        forward = sum(products)
        if mode == "forward":
            return forward
        dx = forward if self.x_requires_grad else sum(products[1:])
        return 2 * forward + dx

    def bytes(self, mode: str, dtype: str) -> int:
        x, y = self.rows * self.sizes[0], self.rows * (1 if self.tail in REDUCING else self.sizes[-1])
        forward = x + self.parameters + y
        if mode == "forward":
            return forward * ITEMSIZE[dtype]
        if self.x_requires_grad:
            biases = self.sizes[1]
            weights = self.parameters - biases
            backward = 2 * y + x + weights + x + weights + biases
        else:
            backward = x + self.parameters + y + self.parameters
        return (forward + backward) * ITEMSIZE[dtype]


LAYERS = (
    # Bound by launches and by Python: the hidden layer of XOR, and a small batch.
    Case("launch-2", 4, (2, 2)),
    Case("launch-64", 64, (64, 64)),
    # A whole network at the batch size of the textbooks: digits of 28 x 28 pixels into ten classes.
    Case("classifier", 128, (784, 128, 10)),
    # More rows: products of a millisecond, and outputs too few for a CPU to gain much from how they lie in memory.
    Case("classifier-1024", 1024, (784, 128, 10), ("cpu",)),
    # Narrow layers over many rows, bound by memory: neural fields, policies, gates.
    Case("narrow-16", 65_536, (16, 16)),
    Case("narrow-64", 65_536, (64, 64)),
    Case("narrow-64-long", 1_048_576, (64, 64), devices=("cuda",)),
    # Between the two limits.
    Case("middle-256", 16_384, (256, 256)),
    # Wide layers, bound by arithmetic.
    Case("wide-1024", 1024, (1024, 1024)),
    Case("wide-1024-tall", 4096, (1024, 1024)),
    Case("wide-8192", 8192, (8192, 8192), devices=("cuda",)),
)


# Networks over more and more rows: where fusing pays, and from how many rows on. All but the last are of the kinds that
# people run: neural fields, a policy, a regression with a narrow end.
LADDER = {
    "hidden-2x64": (64,) * 4,
    "hidden-4x64": (64,) * 6,
    "hidden-8x64": (64,) * 10,
    "hidden-4x128": (128,) * 6,
    "policy": (31, 64, 64, 2),
    "funnel": (36, 64, 9, 1),
}
ROWS = {"cpu": (10, 13, 16), "cuda": (10, 12, 14, 16, 18, 20, 21)}  # powers of 2
NETWORKS = (
    # A lesson, a published training run, and a network that a CPU can do something about.
    Case("xor-deep", 4, (2, 10, 10, 10, 1)),
    Case("digits", 256, (32, 64, 5)),
    Case("classifier-1024", 1024, (784, 128, 10), ("cpu",)),
    Case("square-256", 4096, (256, 256, 256, 256)),
    # Wide enough that layers pass their gradients on by the kernels of wide layers.
    Case("square-2048", 8192, (2048, 2048, 2048, 2048), devices=("cuda",)),
    *(
        Case(f"{name}-{1 << power}", 1 << power, sizes, tuple(device for device in ROWS if power in ROWS[device]))
        for name, sizes in LADDER.items()
        for power in sorted({power for powers in ROWS.values() for power in powers})
    ),
)


def kernelbench(
    problem: str, rows: int, sizes: tuple[int, ...], *activations: str, tail: str = ""
) -> tuple[Case, Case]:
    """A problem as published, for GPUs; and for CPUs with an eighth of every width."""
    published = Case(
        problem,
        rows,
        sizes,
        ("cuda",),
        *activations,
        tail=tail,
        modes=("forward",),
        dtypes=("float32",),
        tolerance=1e-4,
    )
    eighth = tuple(size // 8 for size in sizes)
    return published, replace(published, name=f"{problem}-eighth", sizes=eighth, devices=("cpu",))


# The problems of KernelBench (github.com/ScalingIntelligence/KernelBench, its sizes since July 2025) that consist of
# such layers. It times inference in fp32 with TF32 off, and lets pass what is within 1e-4 of torch, element by element.
# The largest come last: a run may end before their turn.
KERNELBENCH = (
    *kernelbench("L2-45-gemm-sigmoid-logsumexp", 16_384, (2048, 4096, 1024), "sigmoid", "identity", tail="logsumexp"),
    *kernelbench("L2-56-matmul-sigmoid-sum", 128, (32_768, 32_768), tail="sum"),
    # The residual is the product itself, so no sigmoid can be fused with it.
    *kernelbench("L2-70-gemm-sigmoid-residual", 1024, (8192, 8192), "sigmoid", "identity", tail="residual"),
    *kernelbench("L3-3-deep-narrow-mlp", 1024, (8192, *(1024,) * 16, 8192), "relu", "identity"),
    *kernelbench("L3-1-mlp", 128, (16_384, 16_384, 16_384, 8192), "relu", "identity"),
    *kernelbench("L3-2-shallow-wide-mlp", 128, (16_384, 32_768, 32_768, 16_384), "relu", "identity"),
)
SUITES = {"layers": LAYERS, "mlp": NETWORKS, "kernelbench": KERNELBENCH}


# A run on a GPU starts no case after some time, and compilers take most of it: what has a target comes first, then the
# networks over many rows, over few, and over what lies between.
FIRST = ("hidden-4x64-1048576", "square-2048", "narrow-64-long", "wide-8192")
LADDER_ORDER = (20, 16, 10, 18, 13, 14, 12, 21)


def turn(case: Case) -> tuple[int, int]:
    """When a case runs on a GPU, lowest first."""
    if case.name in FIRST:
        return 0, FIRST.index(case.name)
    power = case.name.rpartition("-")[2]
    rung = case in NETWORKS and power.isdigit() and int(power) == case.rows
    return 1, LADDER_ORDER.index(case.rows.bit_length() - 1) if rung else 0


def cases(suite: str, device: str, dtypes: tuple[str, ...] | None = None) -> list[tuple[Case, str]]:
    """(case, dtype) of a suite in the order in which they run on a device of this type."""
    found = [case for case in SUITES[suite] if device in case.devices]
    found = sorted(found, key=turn) if device == "cuda" else found
    return [(case, dtype) for case in found for dtype in dtypes or DTYPES[device] if dtype in case.dtypes]
