# SPDX-License-Identifier: Apache-2.0
"""What watches the kernels' memory finds what it is there for; `make sanitize` runs every kernel under it.

What tilelens (formerly triton-viz) does by a solver, at one small launch of each kernel (test_tilelens.py), this
does by addresses, at every launch of the tests, and for what a program loads after it has stored it.
"""

import contextlib

import cases
import pytest
import torch
import watching

if cases.kernel_device() != "cpu" or cases.EMULATED:
    pytest.skip("needs TRITON_INTERPRET=1; on a GPU compute-sanitizer does this", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter

pytestmark = [pytest.mark.interpreter, pytest.mark.core]


@triton.jit
def copy_kernel(x_ptr, y_ptr, size, stride_x, BLOCK: tl.constexpr, LIMIT: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at * stride_x, mask=at < LIMIT), mask=at < size)


@triton.jit
def same_place_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def neighbour_kernel(y_ptr):
    pid = tl.program_id(0)
    tl.store(y_ptr + pid, tl.load(y_ptr + (pid + 1) % 2))


@triton.jit
def round_trip_kernel(x_ptr, y_ptr, BARRIER: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(y_ptr + at, tl.load(x_ptr + at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + at, tl.load(y_ptr + 15 - at))


@triton.jit
def last_one_sums_kernel(x_ptr, y_ptr, count_ptr, SEM: tl.constexpr, BARRIER: tl.constexpr, EARLY: tl.constexpr):
    pid = tl.program_id(0)
    at = tl.arange(0, 2)
    if EARLY:
        tl.store(y_ptr + 2, tl.sum(tl.load(x_ptr + at)))
    tl.store(x_ptr + pid, pid + 1.0)
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1, sem=SEM) == 1:
        tl.store(y_ptr, tl.sum(tl.load(x_ptr + at)))


@triton.jit
def _combined(a, b, OPERATION: tl.constexpr):
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "sub":
        result = a - b
    else:
        result = a * b
    return result


@triton.jit
def integers_kernel(a_ptr, b_ptr, y_ptr, size, OPERATION: tl.constexpr):
    at = tl.arange(0, 8)
    a, b = tl.load(a_ptr + at, mask=at < size, other=0), tl.load(b_ptr + at, mask=at < size, other=0)
    tl.store(y_ptr + at, _combined(a, b, OPERATION), mask=at < size)


def integers(operation, a, b, dtype=torch.int32):
    a, b = (torch.tensor(own, dtype=dtype) for own in (a, b))
    y = torch.empty_like(a)
    integers_kernel[(1,)](a, b, y, len(a), operation)
    return y.tolist()


LOW, HIGH = -(2**31), 2**31 - 1


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("operation", "dtype", "a", "b", "y"),
    [
        ("add", torch.int32, [HIGH - 1, LOW, 3], [1, 0, 4], [HIGH, LOW, 7]),
        ("sub", torch.int32, [LOW + 1, 0, HIGH], [1, HIGH, 0], [LOW, -HIGH, HIGH]),
        ("mul", torch.int32, [46341, -65536, 0], [46340, 32768, LOW], [46341 * 46340, LOW, 0]),
        ("mul", torch.int64, [46341, LOW], [46341, HIGH], [46341**2, LOW * HIGH]),
    ],
)
def test_whole_numbers_that_fit_pass(operation, dtype, a, b, y):
    assert integers(operation, a, b, dtype) == y


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("operation", "a", "b"),
    [("add", [0, HIGH], [0, 1]), ("add", [LOW], [-1]), ("sub", [LOW, 0], [1, 0]), ("sub", [0], [LOW]),
     ("mul", [46341], [46341]), ("mul", [1, LOW], [1, -1])],
)  # fmt: skip
def test_offsets_that_overflow_are_found(operation, a, b):
    with pytest.raises(Exception, match=f"int32 overflow detected for operation {operation}"):
        integers(operation, a, b)
    # The language is what it was: no launch that failed leaves the interpreter's functions in its place.
    assert tl.core.is_builtin(tl.arange)
    assert integers(operation, [2], [1]) == {"add": [3], "sub": [1], "mul": [2]}[operation]


def summed(sem="acq_rel", barrier=True, early=False):
    y = torch.zeros(4)
    last_one_sums_kernel[(2,)](torch.zeros(2), y, torch.zeros(1, dtype=torch.int32), sem, barrier, early)
    assert y[0] == 3


def copies(x, size, limit, y_size=None):
    y = torch.empty(y_size or size)
    copy_kernel[(2,)](x, y, size, x.stride(0), BLOCK=16, LIMIT=limit)
    return y


RIGHT = {
    "masked": lambda: copies(torch.randn(20), 20, 20),
    "strided": lambda: copies(cases.every_other(torch.randn(20)), 20, 20),
    "expanded": lambda: copies(torch.randn(1).expand(20), 20, 20),
    "barrier": lambda: round_trip_kernel[(1,)](torch.randn(16), torch.empty(16), BARRIER=True),
    "own-places": lambda: neighbour_kernel[(1,)](torch.randn(2)),
    "last-one-sums": summed,
}
WRONG = {
    # The interpreter itself lets all of these pass.
    "reads-past-the-end": (lambda: copies(torch.randn(20), 20, 21), "copy_kernel: .* loads outside of its tensors"),
    "reads-past-a-view": (lambda: copies(torch.randn(40)[:20], 20, 21), "loads outside of its tensors"),
    "reads-beside-a-stride": (
        lambda: copy_kernel[(1,)](torch.randn(40)[::2], torch.empty(20), 20, 1, BLOCK=16, LIMIT=16),
        "loads outside of its tensors",
    ),
    "writes-past-the-end": (lambda: copies(torch.randn(24), 24, 24, y_size=20), "stores outside of its tensors"),
    "two-programs-store": (
        lambda: same_place_kernel[(2,)](torch.randn(2), torch.empty(1)),
        r"same_place_kernel: program \(0, 0, 0\) stores what program \(1, 0, 0\) stores",
    ),
    "one-stores-one-loads": (
        lambda: neighbour_kernel[(2,)](torch.randn(2)),
        r"neighbour_kernel: program \(0, 0, 0\) stores what program \(1, 0, 0\) loads",
    ),
    "no-barrier": (
        lambda: round_trip_kernel[(1,)](torch.randn(16), torch.empty(16), BARRIER=False),
        "loads what it stored, with no barrier between",
    ),
    "counts-too-early": (lambda: summed(barrier=False), "counts itself with no barrier after what it stored"),
    "counts-without-order": (
        lambda: summed(sem="relaxed"),
        r"program \(0, 0, 0\) stores what program \(1, 0, 0\) loads",
    ),
    "loads-before-it-counts": (lambda: summed(early=True), r"stores what program \(\d, 0, 0\) (loads|stores)"),
}


@pytest.mark.parametrize("run", RIGHT.values(), ids=RIGHT)
def test_what_is_right_passes(run):
    with watching.kernels():
        run()


def test_results_are_the_same():
    x = torch.randn(20)
    with watching.kernels():
        assert torch.equal(copies(x, 20, 20), x)


@pytest.mark.parametrize(("run", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found(run, message):
    with watching.kernels(), pytest.raises(Exception, match=message) as found:
        run()
    assert "AssertionError" in repr(found.value) or type(found.value) is AssertionError


def test_nothing_is_watched_afterwards():
    before = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.create_masked_load
    with contextlib.suppress(AssertionError), watching.kernels():
        neighbour_kernel[(2,)](torch.randn(2))
    assert (interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.create_masked_load) == before
