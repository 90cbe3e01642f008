# SPDX-License-Identifier: Apache-2.0
"""Watches what kernels touch under triton's interpreter, which reads and writes wherever it is told to.

Found are addresses outside the tensors that a launch was given, views taken as they are; two programs of a launch of
which one writes what the other touches, which on a GPU run in any order unless they meet an atomic, which orders them;
and a program that loads what it stored, or counts itself by an atomic, with no `tl.debug_barrier()` between, which is
unordered among its threads.
"""

import contextlib
import functools
import itertools

import numpy as np
import pytest
import torch


class Launch:
    """What one launch may touch, and what its programs have touched so far."""

    def __init__(self, kernel, arguments):
        self.kernel = kernel
        spans = np.concatenate([np.zeros((0, 2), np.uint64), *map(spans_of, tensors_of(arguments))])
        spans = spans[np.argsort(spans[:, 0], kind="stable")]
        self.starts, self.ends = spans[:, 0], np.maximum.accumulate(spans[:, 1])
        self.loads, self.stores = {}, {}  # addresses, by program and whether it has met its atomic
        self.fresh = {}  # stored by the program since its last barrier
        self.atomics = {}  # where each program has met one

    def touch(self, verb, program, pointers, mask, itemsize):
        # A mask may be of whole numbers.
        at = np.unique(pointers[np.broadcast_to(mask != 0, pointers.shape)])
        if not at.size:
            return
        nearest = np.searchsorted(self.starts, at, side="right") - 1
        outside = (nearest < 0) | (at + np.uint64(itemsize) > self.ends[nearest])
        assert not outside.any(), f"{self.kernel}: program {program} {verb} outside of its tensors"
        fresh = self.fresh.setdefault(program, [])
        if verb == "stores":
            fresh.append(at)
            self.stores.setdefault((program, program in self.atomics), []).append(at)
        elif verb == "counts itself":
            assert not fresh, f"{self.kernel}: program {program} counts itself with no barrier after what it stored"
            self.atomics[program] = at.tolist()
        else:
            stale = any(np.isin(at, stored, assume_unique=True).any() for stored in fresh)
            assert not stale, f"{self.kernel}: program {program} loads what it stored, with no barrier between"
            self.loads.setdefault((program, program in self.atomics), []).append(at)

    def ordered(self, one, other):
        """Whether what a program touched before its atomic comes before what another did behind the same atomic.

        The interpreter runs one program after the other, in the order in which `atomics` has them.
        """
        for (early, behind), (late, met) in ((one, other), (other, one)):
            if not behind and met and self.atomics.get(early) == self.atomics[late]:
                return list(self.atomics).index(early) < list(self.atomics).index(late)
        return False

    def end(self):
        stored = {program: np.unique(np.concatenate(at)) for program, at in self.stores.items()}
        loaded = {program: np.unique(np.concatenate(at)) for program, at in self.loads.items()}
        for what, touched in (("stores", stored), ("loads", loaded)):
            programs = np.concatenate([np.full(at.size, i) for i, at in enumerate(touched.values())] or [[]])
            everything = np.concatenate([*touched.values(), np.zeros(0, np.uint64)])
            names = list(touched)
            for program, at in stored.items():
                touching = [names[int(i)] for i in np.unique(programs[np.isin(everything, at)])]
                others = [other[0] for other in touching if other[0] != program[0] and not self.ordered(program, other)]
                assert not others, f"{self.kernel}: program {program[0]} stores what program {others[0]} {what}"


def tensors_of(arguments):
    """The tensors among a launch's arguments, in tuples and tensor descriptors too."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from tensors_of(argument)
        elif isinstance(argument, torch.Tensor):
            yield argument
        elif hasattr(argument, "base"):
            yield from tensors_of((argument.base,))


def spans_of(tensor):
    """[start, end) of the addresses that a view covers, one row for each run of neighbours."""
    if not tensor.numel():
        return np.zeros((0, 2), np.uint64)
    size = tensor.element_size()
    if tensor.is_contiguous():
        at, length = np.zeros(1, np.int64), size * tensor.numel()
    else:
        # One run per row where a row is dense, else one per element.
        dims = list(zip(tensor.shape, tensor.stride(), strict=True))
        length = size
        if dims[-1][1] == 1:
            length = size * dims.pop()[0]
        at = np.zeros(1, np.int64)
        for extent, stride in dims:
            # A stride of 0 goes nowhere.
            steps = np.arange(extent if stride else 1, dtype=np.int64)
            at = (at[:, None] + steps * (stride * size)).reshape(-1)
    starts = (at + tensor.data_ptr()).astype(np.uint64)
    return np.stack([starts, starts + np.uint64(length)], 1)


@contextlib.contextmanager
def kernels():
    """While it is open, a launch that touches what it may not fails."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    running = []

    def watched(original, verb):
        @functools.wraps(original)
        def access(self, pointers, *rest):
            mask = rest[0] if verb == "loads" else rest[1]
            itemsize = pointers.get_element_ty().primitive_bitwidth // 8
            # That of a descriptor is an array already.
            mask = mask if isinstance(mask, np.ndarray) else mask.data
            running[-1].touch(verb, self.grid_idx, pointers.data, mask, itemsize)
            return original(self, pointers, *rest)

        return access

    def call(original):
        @functools.wraps(original)
        def launch(self, *arguments, **options):
            running.append(Launch(self.fn.__name__, itertools.chain(arguments, options.values())))
            try:
                original(self, *arguments, **options)
                running[-1].end()
            finally:
                running.pop()

        return launch

    def barrier(original):
        @functools.wraps(original)
        def waits(self, *arguments):
            running[-1].fresh.pop(self.grid_idx, None)
            return original(self, *arguments)

        return waits

    def counted(original):
        @functools.wraps(original)
        def counts(self, operation, pointers, value, mask, sem, scope):
            if sem.name == "ACQUIRE_RELEASE":
                itemsize = pointers.get_element_ty().primitive_bitwidth // 8
                running[-1].touch("counts itself", self.grid_idx, pointers.data, mask.data, itemsize)
            return original(self, operation, pointers, value, mask, sem, scope)

        return counts

    def by_keyword(access):
        # Descriptors name the arguments that say how to cache.
        return lambda self, pointers, *rest, **hints: access(self, pointers, *rest, *hints.values())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", by_keyword(watched(builder.create_masked_load, "loads")))
        patch.setattr(builder, "create_masked_store", by_keyword(watched(builder.create_masked_store, "stores")))
        patch.setattr(builder, "create_barrier", barrier(builder.create_barrier))
        patch.setattr(builder, "create_atomic_rmw", counted(builder.create_atomic_rmw))
        patch.setattr(executor, "__call__", call(executor.__call__))
        yield
