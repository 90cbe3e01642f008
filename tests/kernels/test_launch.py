# SPDX-License-Identifier: Apache-2.0
"""The short way to a kernel that has been launched before: what goes over it, and that it leads to the right version.

Nothing runs here. Triton binds the arguments of each launch as it would for a GPU and says which version it would take.
"""

import importlib.util
import itertools

import pytest
import torch
from cases import kernel_device

from perceptriton.kernels import Device, records
from perceptriton.kernels import plan as planning
from perceptriton.kernels.calls import Calls

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if kernel_device() == "cpu":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from perceptriton.kernels.gpu import launch, layer, network, wide

H200 = Device("cuda", 90, 132, triton=True)


class Version(CompiledKernel):
    """A compiled kernel that takes note of its launches."""

    function = packed_metadata = module = None

    def __init__(self, key, launches):
        self.key, self.launches = key, launches

    def _init_handles(self):
        pass

    def launch_metadata(self, *_):
        return None

    def run(self, *arguments):  # grid, stream, what was compiled and hooks come first, of which the short way has none
        way = "short" if arguments[7] is None else "long"
        self.launches.append((way, self.key, arguments[:3], arguments[9:]))


@pytest.fixture
def launches(absent_h200, monkeypatch):
    """(way, version, grid, arguments) of every launch."""

    def forget():
        for kernel in (*vars(layer).values(), *vars(network).values(), *vars(wide).values()):
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()

    found = []
    forget()
    monkeypatch.setattr(JITFunction, "_do_compile", lambda kernel, key, *_: Version((kernel.__name__, key), found))
    yield found
    forget()


def lay(rows, columns, layout, dtype):
    """A matrix that lies as `layout` says."""
    if layout == "transposed":
        return torch.empty(columns, rows, dtype=dtype).t()
    if layout == "pitch":
        return torch.empty(rows, columns + 16, dtype=dtype)[:, :columns]
    if layout == "shifted":
        return torch.empty(rows * columns + 1, dtype=dtype)[1:].view(rows, columns)
    return torch.empty(rows, columns, dtype=dtype)


TILED = records.Plan("tiled", "", records.Tile(32, 32, 16, 4, 2), 3)
# One program writes dbias, two write sums.
PASSES, APART = (records.Plan("passes", "", records.Tile(32, 32, 0, 4, 1), programs) for programs in (1, 2))
LAYOUTS = ("dense", "transposed", "pitch", "shifted")
ROWS, DTYPES = (1, 16, 33), (torch.float32, torch.bfloat16)


def layers():
    """(what prepares a launch, operands, other arguments) for all kernels of a layer, one plan for all shapes."""
    forwards = [planning.linear_act_fwd(64, 32, 16, "float32", "ieee", H200), TILED]
    # One program writes the gradients, several write sums that another kernel adds up.
    backwards = [planning.linear_act_bwd(rows, 32, 16, "float32", "ieee", H200) for rows in (16, 1 << 16)]
    for m, k, n, layout, dtype in itertools.product(ROWS, (1, 32), (1, 16), LAYOUTS, DTYPES):
        x, weight, dy, y = (lay(*shape, layout, dtype) for shape in ((m, k), (n, k), (m, n), (m, n)))
        y = y.contiguous()
        for activation, bias in (("sigmoid", None), ("tanh", None), ("sigmoid", torch.empty(n, dtype=dtype))):
            for plan in forwards:
                yield layer.linear_act_fwd_call, (x, weight, bias), (activation, plan)
        for wanted in itertools.product((False, True), repeat=3):
            for plan in backwards:
                yield layer.linear_act_bwd_call, (dy, y, x, weight), ("sigmoid", wanted, plan)
            for plan in (PASSES, APART):
                yield layer.act_bwd_call, (dy, y), ("sigmoid", wanted[2], plan)
        if layout == "dense":
            # The door lets no operands of several dtypes in, but what is kept does not rely on that.
            other = torch.float16
            for plan in forwards:
                yield layer.linear_act_fwd_call, (x, weight.to(other), None), ("sigmoid", plan)
                yield layer.linear_act_fwd_call, (x, weight, torch.empty(n, dtype=other)), ("sigmoid", plan)
            for plan in backwards:
                for operands in ((dy.to(other), x, weight), (dy, x.to(other), weight), (dy, x, weight.to(other))):
                    operands = (operands[0], y, *operands[1:])
                    yield layer.linear_act_bwd_call, operands, ("sigmoid", (True, True, True), plan)
            yield layer.act_bwd_call, (dy.to(other), y), ("sigmoid", True, APART)


def networks():
    """Likewise for all kernels of a network."""
    for widths in ((16, 32, 8), (3, 5, 2), (64,) * 6):
        both = [planning.mlp_bwd(m, widths, "float32", "ieee", H200) for m in (16, 1 << 14)]
        forward = planning.mlp_fwd(16, widths, "float32", "ieee", H200, True)
        every, layers = (True,) * (len(widths) - 1), list(itertools.pairwise(widths))
        for m, layout, dtype, bias in itertools.product(ROWS, LAYOUTS, DTYPES, (False, True)):
            x, target = lay(m, widths[0], layout, dtype), lay(m, widths[-1], layout, dtype)
            weights = tuple(torch.empty(n, k, dtype=dtype) for k, n in layers)
            biases = tuple(torch.empty(n, dtype=dtype) for _, n in layers) if bias else None
            operands, pos_weight = (x, weights, biases), torch.empty(widths[-1])
            yield network.mlp_fwd_call, operands, ("sigmoid", "sigmoid", forward)
            heads = list(itertools.product((None, pos_weight), ("none", "mean")))
            for (weight, reduction), t in itertools.product(heads, (target, target.float())):
                head = (t, weight, reduction, torch.float32)
                yield network.mlp_fwd_call, (*operands, head), ("sigmoid", "identity", forward)
            for backward in both:
                _, saved = network.mlp_fwd(*operands, "sigmoid", "sigmoid", forward, backward.boundaries)
                for wanted in ((False, every, every), (True, (*every[:-1], False), (False,) * len(every))):
                    inputs = (x, saved, weights, biases)
                    yield network.mlp_bwd_call, (target, *inputs), ("sigmoid", "sigmoid", wanted, backward)
                    for weight, reduction in heads:
                        dloss = target.float() if reduction == "none" else torch.empty(())
                        head = (target, weight, reduction)
                        yield network.mlp_bwd_call, (dloss, *inputs, head), ("sigmoid", "identity", wanted, backward)


def tensors_of(operands):
    if isinstance(operands, torch.Tensor):
        return [operands]
    return [t for own in operands for t in tensors_of(own)] if isinstance(operands, tuple) else []


def others_of(operands):
    """What is no tensor in the operands, and where the tensors are."""
    if isinstance(operands, tuple):
        return tuple(map(others_of, operands))
    return "tensor" if isinstance(operands, torch.Tensor) else operands


def prepared(prepare, operands, rest):
    """The head of a loss is the last operand, and named where a launch is prepared."""
    heads = {"head": operands[-1]} if "identity" in rest else {}
    return prepare(*operands[: len(operands) - len(heads)], *rest, **heads)


@pytest.mark.slow
@pytest.mark.parametrize("run", [layers, networks])
def test_what_is_kept_of_a_call_launches_what_the_next_one_needs(run, launches):
    known, versions, repeated = Calls(), set(), 0
    for _ in range(2):
        for prepare, operands, rest in run():
            tensors, key = tensors_of(operands), (prepare, others_of(operands), rest)
            launches.clear()
            fresh = prepared(prepare, operands, rest)
            fresh(*operands)
            long = list(launches)
            launches.clear()
            call = known.find(key, tensors)
            repeated += call is not None
            (call or fresh)(*operands)
            assert [own[1:3] for own in launches] == [own[1:3] for own in long]
            for (*_, found), (*_, expected) in zip(launches, long, strict=True):
                # Fresh tensors differ, and what else is no tensor must not.
                assert [others_of(own) for own in found] == [others_of(own) for own in expected]
            if launch.aligned(*tensors):
                assert {way for way, *_ in launches} == {"short"}
                versions.update(version for _, version, *_ in launches)
            if call is None:
                known.keep(key, tensors, fresh)
    assert repeated > 100
    assert len(versions) > 50


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "last"), [(64, 37), (256, 232), (1024, 1000), (4096, 4095), (32, 1)])
def test_a_ragged_last_batch_compiles_nothing(batch, last, dtype, launches):
    """Neither do other numbers of programs, whose sums are added up by one kernel."""
    name, widths, half = str(dtype)[6:], (32, 64, 16), dtype == torch.bfloat16
    every = (True, True)
    tma = next(iter(planning.wide_candidates("half" if half else "tf32x3", 90)))
    sums = records.Plan("tma", "", tma, 8, "ieee" if half else "tf32x3")

    def step(rows):
        x, h, y = (torch.empty(rows, width, dtype=dtype) for width in widths)
        weights = tuple(torch.empty(n, k, dtype=dtype) for k, n in itertools.pairwise(widths))
        biases = tuple(torch.empty(n, dtype=dtype) for n in widths[1:])
        forwards = [planning.linear_act_fwd(rows, 32, 64, name, "ieee", H200), TILED]
        for plan in forwards:
            layer.linear_act_fwd(x, weights[0], biases[0], "sigmoid", plan)
        backward = planning.linear_act_bwd(rows, 32, 64, name, "ieee", H200)
        layer.linear_act_bwd(h, h, x, weights[0], "sigmoid", (True, True, True), backward)
        layer.act_bwd(h, h, "sigmoid", True, APART)
        whole = planning.mlp_bwd(rows, widths, name, "ieee", H200)
        forward = planning.mlp_fwd(rows, widths, name, "ieee", H200, True)
        common = (weights, biases, "sigmoid")
        _, saved = network.mlp_fwd(x, *common, "sigmoid", forward, whole.boundaries)
        network.mlp_bwd(y, x, saved, *common, "sigmoid", (True, every, every), whole)
        network.mlp_fwd(x, *common, "identity", forward, head=(y, None, "mean", dtype))
        wide.linear_act_fwd(h, torch.empty(64, 64, dtype=dtype), biases[0], "sigmoid", sums)
        wide.linear_act_dgrad(h, torch.empty(64, 32, dtype=dtype), x, "sigmoid", True, sums)

    def versions():
        return {version for _, version, *_ in launches}

    for _ in range(2):
        step(batch)
    even = versions()
    assert len({kernel for kernel, _ in even}) >= 9
    for rows in (batch, batch, last) * 3:
        step(rows)
    assert versions() == even


def test_the_short_way_stays_on_its_device(launches):
    """The meta device stands for a second GPU, which may be of another generation."""
    several = planning.linear_act_bwd(1 << 16, 32, 16, "float32", "ieee", H200)
    backward = planning.mlp_bwd(1 << 14, (32, 16, 16), "float32", "ieee", H200)
    forward = planning.mlp_fwd(64, (32, 16, 16), "float32", "ieee", H200, True)
    rows, wanted = planning.linear_act_fwd(64, 32, 16, "float32", "ieee", H200), (True, (True, True), (True, True))
    known = Calls()

    def run(device):
        x, weight, dy, y = (torch.empty(shape, device=device) for shape in ((64, 32), (16, 32), (64, 16), (64, 16)))
        parameters = (weight, torch.empty(16, 16, device=device)), tuple(torch.empty(2, 16, device=device))
        saved = tuple(torch.empty(64, 16, device=device) for _ in backward.boundaries)
        for prepare, operands, rest in (
            (layer.linear_act_fwd_call, (x, weight, parameters[1][0]), ("sigmoid", rows)),
            (layer.linear_act_fwd_call, (x, weight, parameters[1][0]), ("sigmoid", TILED)),
            (layer.linear_act_bwd_call, (dy, y, x, weight), ("sigmoid", (True, True, True), several)),
            (layer.act_bwd_call, (dy, y), ("sigmoid", True, APART)),
            (network.mlp_fwd_call, (x, *parameters), ("sigmoid", "sigmoid", forward, tuple(backward.boundaries))),
            (network.mlp_bwd_call, (dy, x, saved, *parameters), ("sigmoid", "sigmoid", wanted, backward)),
        ):
            tensors, key = tensors_of(operands), (prepare, rest)
            call = known.find(key, tensors)
            if call is None:
                known.keep(key, tensors, call := prepare(*operands, *rest))
            call(*operands)

    ways = []
    for device in ("cpu", "meta", "cpu", "meta"):
        launches.clear()
        run(device)
        ways.append({way for way, *_ in launches})
    assert ways == [{"long"}, {"long"}, {"short"}, {"short"}]


def test_the_second_launch_is_short(launches):
    plan = planning.linear_act_fwd(64, 32, 16, "float32", "ieee", H200)
    x, weight, bias = torch.empty(64, 32), torch.empty(16, 32), torch.empty(16)
    call = layer.linear_act_fwd_call(x, weight, bias, "sigmoid", plan)
    for _ in range(2):
        call(x, weight, bias)
    (first, version, grid, arguments), (second, *others) = launches
    assert (first, second) == ("long", "short")
    assert others[:2] == [version, grid]
    # All but y, which is fresh.
    assert [a is b for a, b in zip(arguments, others[2], strict=True)].count(False) == 1
    # What does not begin at a multiple of 16 bytes has another version.
    call(lay(64, 32, "shifted", torch.float32), weight, bias)
    assert launches[-1][0] == "long"
    assert launches[-1][1] != version
    call(x, weight, bias)
    assert launches[-1][:2] == ("short", version)


def test_a_profilers_hooks_are_told_of_every_launch(launches):
    from triton import knobs

    plan = planning.linear_act_fwd(64, 32, 16, "float32", "ieee", H200)
    x, weight = torch.empty(64, 32), torch.empty(16, 32)
    call = layer.linear_act_fwd_call(x, weight, None, "sigmoid", plan)
    call(x, weight, None)
    hook = lambda metadata: None  # noqa: E731
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        call(x, weight, None)
        chain.remove(hook)
        call(x, weight, None)
    assert [way for way, *_ in launches] == ["long", "long", "short", "long", "short"]
