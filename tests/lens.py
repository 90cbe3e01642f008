# SPDX-License-Identifier: Apache-2.0
"""tilelens (triton-viz until its version 3.0) with what these kernels need, from outside.

Its sanitizer asks a solver whether an access can leave its tensor; its race detector records accesses and asks nothing
yet, which `races` does. As they come, both take all `tl.arange` of one size for one and the same number, so that of a
square tile they see the diagonal alone, and take every turn of a loop for the first, so that a pointer which moves
along is a stray one. Here each program and each turn of a loop is followed by itself, and only the places within a
tile are unknowns, one per axis.
"""

import contextlib
import itertools

import numpy as np
import pytest
import triton.language as tl
import z3
from tilelens.clients import symbolic_engine
from tilelens.clients.race_detector.race_detector import SymbolicRaceDetector
from tilelens.clients.sanitizer.sanitizer import SymbolicSanitizer
from tilelens.clients.symbolic_engine import SymbolicClient, SymbolicExpr
from tilelens.core.callbacks import ForLoopCallbacks
from tilelens.core.symbolic_metadata import INT32
from tilelens.core.trace import trace
from triton.runtime import interpreter
from z3.z3util import get_vars


class ByItself:
    """Clients that meet every program and every turn of a loop."""

    def pre_run_callback(self, fn):
        # Not that of the sanitizer, which skips a launch that looks like an earlier one.
        self.need_full_grid = True
        return SymbolicClient.pre_run_callback(self, fn)

    def _op_program_id_overrider(self, axis):
        return SymbolicExpr.from_value(self.grid_idx[axis])

    def register_for_loop_callback(self):
        return ForLoopCallbacks(range_wrapper_factory=self._turns)

    def _turns(self, iterable, site, kind, arguments, options, call):
        if kind == "unknown":
            return None
        bounds = [a.value if isinstance(a, tl.constexpr) else a for a in arguments]
        return range(*(self._materialize_loop_value(SymbolicExpr.from_value(a)) for a in bounds))

    def _op_load_overrider(self, ptr, mask, *rest):
        # A place that was loaded itself is a number, and so must be what hides it.
        if isinstance(ptr, SymbolicExpr) and isinstance(mask, SymbolicExpr) and ptr.has_op("load"):
            mask = mask.replace_subtree()
        return super()._op_load_overrider(ptr, mask, *rest)

    def _collect_tensor_base(self, expr):
        base = super()._collect_tensor_base(expr)
        return np.ravel(base).tolist() if isinstance(base, list) else base


class Sanitizer(ByItself, SymbolicSanitizer):
    pass


class RaceDetector(ByItself, SymbolicRaceDetector):
    pass


def renamed(value, name):
    """A z3 expression, a list of them or None, with other unknowns."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, list):
        return [renamed(v, name) for v in value]
    return z3.substitute(value, [(v, z3.Int(name(str(v)))) for v in get_vars(value)])


class ExpandDims(symbolic_engine.ExpandDimsSymbolicExpr):
    """Unknowns are named by their axis, counted from the last one: arange_0_16, then arange_0_16' for [:, None]."""

    def _to_z3_impl(self):
        rank = len(self.shape)
        axis = self.axis.to_py() % rank

        def name(old):
            place = rank - 2 - old.count("'")
            return old if place >= axis else old + "'"

        value, constraints = self.arg._to_z3()
        return renamed(value, name), renamed(constraints, name)


class Where(symbolic_engine.WhereSymbolicExpr):
    """Conditions may be whole numbers."""

    def _to_z3_impl(self):
        (cond, one), (lhs, two), (rhs, three) = (e._to_z3() for e in (self.cond, self.lhs, self.rhs))
        values = [v if isinstance(v, list) else [v] for v in (cond, lhs, rhs)]
        size = max(map(len, values))
        both = (v * (size // len(v)) for v in values)
        chosen = [z3.If(symbolic_engine._constraint_to_bool(c), a, b) for c, a, b in zip(*both, strict=True)]
        return chosen if size > 1 else chosen[0], symbolic_engine._and_constraints(one, two, three)


def _place(descriptor, offsets):
    """(pointers, mask) of a block of a descriptor: beyond an edge TMA touches nothing."""
    create = SymbolicExpr.create
    pointers, mask = SymbolicExpr.from_value(descriptor.base), None
    rank = len(descriptor.block_shape)
    for dim, (offset, size) in enumerate(zip(offsets, descriptor.block_shape, strict=True)):
        at = create("arange", INT32, 0, size)
        for axis in range(rank):
            if axis != dim:
                at = create("expand_dims", at, axis)
        at = create("add", at, SymbolicExpr.from_value(offset))
        pointers = create("addptr", pointers, create("mul", at, SymbolicExpr.from_value(descriptor.strides[dim])))
        below = create("less", at, SymbolicExpr.from_value(descriptor.shape[dim]))
        inside = create("bitwise_and", create("greater_equal", at, SymbolicExpr.from_value(0)), below)
        mask = inside if mask is None else create("bitwise_and", mask, inside)
    return pointers, mask


def _descriptor_load(builder, descriptor, offsets, *hints):
    pointers, mask = _place(descriptor, offsets)
    return builder.create_masked_load(pointers, mask, None, *hints, False)


def _descriptor_store(builder, descriptor, value, offsets):
    pointers, mask = _place(descriptor, offsets)
    return builder.create_masked_store(pointers, value, mask, None, None)


def _patch_tensor(tensor, scope, original=interpreter._patch_lang_tensor):
    original(tensor, scope)
    # That of the interpreter wants an array.
    scope.set_attr(tensor, "T", property(tl.trans))


@contextlib.contextmanager
def _extended():
    builder, classes = interpreter.InterpreterBuilder, SymbolicExpr._OP_CLASS_MAP
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(classes, "expand_dims", ExpandDims)
        patch.setitem(classes, "where", Where)
        patch.setattr(interpreter, "_patch_lang_tensor", _patch_tensor)
        patch.setattr(builder, "create_descriptor_load", _descriptor_load)
        patch.setattr(builder, "create_descriptor_store", _descriptor_store)
        # It reads the strides, which are expressions here.
        patch.setattr(interpreter.TensorDescHandle, "validate", lambda descriptor: None)
        yield


def races(records):
    """Pairs of records of which one program writes what another one touches."""
    found = []
    for one, two in itertools.combinations(records, 2):
        if one.grid_idx == two.grid_idx or "write" not in (one.access_mode, two.access_mode):
            continue
        if one.tensor is not None and two.tensor is not None and one.tensor.data_ptr() != two.tensor.data_ptr():
            continue
        solver = z3.Solver()
        ours, theirs = [], []
        for record, places, name in ((one, ours, "one {}"), (two, theirs, "two {}")):
            at = renamed(record.addr_expr, name.format)
            # A list are the places of all elements, whatever their masks: no constraint is that of one of them.
            if isinstance(at, list):
                places += at
            else:
                places.append(at)
                solver.add(*(renamed(c, name.format) for c in record.local_constraints))
        solver.add(z3.Or(*(a == b for a, b in itertools.product(ours, theirs))))
        if solver.check() != z3.unsat:
            found.append((one, two))
    return found


def follow(kernel, grid, *arguments, **options):
    """Fails if something is found. Nothing is written: no value is computed."""
    sanitizer, detector = Sanitizer(abort_on_error=False), RaceDetector()
    with _extended():
        for client in (sanitizer, detector):
            trace(client=client)(kernel)[grid](*arguments, **options)
    found = [f"{r.op_type.__name__.lower()}s outside of {r.tensor_name}" for r in sanitizer.records]
    for one, two in races(detector.records):
        verbs = sorted(f"{r.access_mode}s" for r in (one, two))
        found.append(f"{' and '.join(verbs)} of {one.tensor_name} race")
    assert not found, f"{kernel.__name__}: {', '.join(dict.fromkeys(found))}"


class Followed:
    """A kernel that is followed and, if nothing was found, launched."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            follow(self.kernel, grid, *arguments, **options)
            self.launched.add(self.kernel.__name__)
            return self.kernel[grid](*arguments, **options)

        return launch
