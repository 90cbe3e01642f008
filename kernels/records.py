# SPDX-License-Identifier: Apache-2.0
"""What passes between the parts: devices, tiles, plans, and what a training loop does."""

import itertools
from dataclasses import dataclass, field

IMPLS = (None, "triton", "torch")
TRAIN_IMPLS = (None, "lane", "block", "graph", "native", "torch")
DTYPES = ("float32", "bfloat16", "float16")
EMPTY = "nothing to compute"

Wanted = tuple[bool, bool, bool]  # which gradients of a layer: dx, dweight, dbias
NeedsGrad = tuple[bool, tuple[bool, ...], tuple[bool, ...]]  # of a network: dx, every dweight, every dbias
# fp32 products as several products of tensor cores, each operand a sum of two or three short numbers.
SPLITS = ("tf32x3", "bf16x6", "bf16x3")


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device.

    kind: "cpu", "cuda", "ROCm", or any other torch device type. arch: of a CUDA device the compute capability, as
    10 * major + minor: 90 for 9.0. units: its streaming multiprocessors. vendor: of a CPU, "AMD", "AMD Zen 5", "Intel"
    or "Intel AMX". triton: whether kernels can be launched there; refusal: why not, where that is known. name: of a
    CUDA device, as its driver tells it; by that, tables of measurements are found.

    Raises TypeError for an arch that is no int, ValueError for one below 10 of a CUDA device; 0, which tells nothing of
    it, is one where triton is False.
    """

    kind: str
    arch: int = 0
    units: int = 1
    vendor: str = ""
    triton: bool = False
    name: str = ""
    refusal: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.arch, int):
            raise TypeError(f"arch must be an int, 10 * major + minor, not {self.arch!r}")
        if self.kind == "cuda" and self.arch < 10 and (self.triton or self.arch):
            raise ValueError(f"arch must be 10 * major + minor, at least 10, not {self.arch}")


@dataclass(frozen=True)
class Chip:
    """What the streaming multiprocessors of a compute capability have room for."""

    shared: int  # bytes of shared memory that one program may use
    warps: int  # of all programs on a multiprocessor
    programs: int


# Chips that kernels are compiled for (CUDA programming guide, compute capabilities).
CHIPS = {
    "sm_80": Chip(163 * 1024, 64, 32),
    "sm_86": Chip(99 * 1024, 48, 16),
    "sm_89": Chip(99 * 1024, 48, 24),
    "sm_90": Chip(227 * 1024, 64, 32),
    "sm_100": Chip(227 * 1024, 64, 32),
    "sm_120": Chip(99 * 1024, 48, 24),
}


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class WideTile(Tile):
    """A tile of the product that travels by TMA."""

    group_m: int = 8  # row tiles that are walked together, column by column
    subtiles: int = 1  # 1 or 2: pieces in which a tile is finished and stored
    flatten: bool = False  # both loops as one, so that loads run ahead into the next tile
    specialize: bool = False  # a warp of its own for the loads


@dataclass(frozen=True)
class MlpTile:
    block_m: int
    num_warps: int
    num_stages: int
    resident: bool = True  # weights are loaded once per program; else once per row tile (forward only)


@dataclass(frozen=True)
class Prediction:
    """What one call takes, the limit that peak rates set, and what a plan's own way adds to that."""

    flops: int  # on the units that do them, every product of a split counted
    bytes: int  # between chip and memory, each operand once
    special: int  # exp2 and rsqrt, two for each sigmoid
    limit_us: float  # the slowest of the three alone
    plan_us: float
    chip: str  # whose peak rates they are

    def __str__(self) -> str:
        functions = f", {_digits(self.special / 1e6)} M exp2 and rsqrt" if self.special else ""
        times = f"{_digits(self.plan_us)} us, limit {_digits(self.limit_us)} us"
        times = "under 1 us, where launches decide" if self.plan_us < 1 else times
        work = f"{_digits(self.flops / 1e9)} Gflop, {_digits(self.bytes / 1e6)} MB{functions}"
        return f"{self.chip} at peak rates (a model): {times}; {work}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Plan:
    """One choice. `impl` names it, `reason` says why, the rest is what that implementation needs.

    On a GPU: "rows" (whole weight on chip, programs walk rows), "tiled" (output tiles, loop over K), "tma" (the same
    for wide layers: tiles travel by TMA, programs walk them), "passes" (one pass for dz and dbias, then library GEMMs),
    "library" (library GEMM, activation in place). On a CPU: "aten" (plain torch under autograd) and "explicit"
    (forward and backward written out in `reference.py`).
    """

    impl: str
    reason: str
    tile: Tile = Tile(0, 0, 0, 0, 0)
    programs: int = 1
    precision: str = "ieee"  # of fp32 products in the kernels: "ieee", "tf32" or one of SPLITS
    forward_gemm: str = "mm"  # "mm" (the BLAS behind torch.mm) or "onednn"
    dx_gemm: str = "mm"
    dweight_gemm: str = "mm"
    split_rows: int = 0  # dweight: each thread takes its own rows where that many come to each; 0: never
    chunk: int = 0  # rows of dz that exist at a time; 0: all of them
    splits: int = 1  # "tma": parts of the sum over in_features that different programs take
    prediction: Prediction | None = field(default=None, compare=False)  # `explain` adds it for GPUs

    @property
    def triton(self) -> bool:
        return self.impl in ("rows", "tiled", "tma", "passes")


@dataclass(frozen=True)
class MlpSegment:
    """Layers first to last - 1, run by one kernel."""

    first: int
    last: int
    tile: MlpTile
    programs: int


@dataclass(frozen=True)
class MlpPlan:
    """How a whole network runs in one direction.

    `impl` is "fused" (each segment is one kernel, inside which activations never leave the chip; forward in the order
    of `segments`, backward in reverse, with one number of programs), "stack" (wide layers as one autograd node, by
    kernels where dz comes out of the product of the layer above), "layers" (not as a whole: layer by layer), or on a
    CPU "aten" (plain torch operations under autograd) and "explicit" (`reference.py`, one autograd node).
    """

    impl: str
    reason: str
    segments: tuple[MlpSegment, ...] = ()
    precision: str = "ieee"
    layers: tuple[Plan, ...] = ()  # "explicit" and "stack": each layer's own plan
    dgrads: tuple[Plan | None, ...] = ()  # "stack", backward: of each layer's product that ends in dz of the one below
    wgrads: tuple[Plan | None, ...] = ()  # likewise: of the product that is dweight, where it is not torch's
    chunk: int = 0  # "explicit", backward: rows that go through all layers at a time; 0: all of them
    prediction: Prediction | None = field(default=None, compare=False)  # `explain` adds it for GPUs

    @property
    def triton(self) -> bool:
        return self.impl in ("fused", "stack")

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The l for which a backward pass needs the input of layer l: where a segment other than the first begins.

        "explicit" and "stack" need all of them, and y, the input of the layer after the last.
        """
        return tuple(range(1, len(self.layers) + 1) or (segment.first for segment in self.segments[1:]))


@dataclass(frozen=True)
class TrainConfig:
    """What every step of a training loop does, apart from the numbers it starts from."""

    widths: tuple[int, ...]  # of the input and of every layer's output
    hidden: str = "sigmoid"  # a name in activations.py
    output: str = "sigmoid"
    bias: bool = True
    loss: str = "bce"  # (output: sigmoid), "bce_logits", "cross_entropy" (identity), "mse" or "smooth_l1" (any output)
    beta: float = 1.0  # of smooth_l1: where its square ends, 0 for L1
    reduction: str = "mean"  # or "sum", or "given": a sum times what `run` is given for each step
    factor: float = 1.0  # of the loss, whatever its reduction
    weighted: bool = False  # y has the targets and, behind them, a weight for each; not for cross_entropy
    optimizer: str = "sgd"  # or "adam", "adamw", "rmsprop"
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999  # RMSprop's alpha, too
    eps: float = 1e-8

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each."""
        return list(itertools.pairwise(self.widths))


@dataclass(frozen=True)
class TrainPlan:
    """How a whole training loop runs.

    `impl` is "lane" (one kernel for all steps, `networks` per program, one per lane), "block" (one for all steps, a
    network per program, or one for each step, `programs` per network), "graph" (`loop/`, each step a replay of a
    captured graph), "native" (`native/`, loops compiled for the CPU) or "torch" (`loop/`, step by step).
    """

    impl: str
    reason: str
    rows: int = 0  # samples that a kernel takes at a time
    networks: int = 1  # per program, or per vector of the CPU
    num_warps: int = 1
    programs: int = 1  # per network, between which each batch is divided
    missed: float = 0.0  # seconds that compiled loops would save, for which the run alone does not wait


@dataclass(frozen=True)
class LoopPlan:
    """How `loop/` lays its buffers out, on how many threads it runs, and why.

    "joint": one network, all parameters as blocks of one matrix. "matrices": one per layer, or a stack of them.
    "arrays": every single parameter an array over the members.
    """

    layout: str
    one_thread: bool
    reason: str


class NotCompiledError(RuntimeError):
    """A kernel would have had to be compiled while a CUDA graph is captured."""
