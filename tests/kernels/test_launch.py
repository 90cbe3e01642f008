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

    def launch_metadata(self, *_):
        return None

    def run(self, *arguments):  # triton's own way: grid, stream and metadata come first
        self.launches.append(("long", self.key, arguments[:3], arguments[9:]))

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append(("short", self.key, grid, arguments))


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
    monkeypatch.setattr(launch, "_runners", {})
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
    """Launches of all kernels of a layer, each with one plan for all shapes."""
    forwards = [planning.linear_act_fwd(64, 32, 16, "float32", "ieee", H200), TILED]
    # One program writes the gradients, several write sums that another kernel adds up.
    backwards = [planning.linear_act_bwd(rows, 32, 16, "float32", "ieee", H200) for rows in (16, 1 << 16)]
    for m, k, n, layout, dtype in itertools.product(ROWS, (1, 32), (1, 16), LAYOUTS, DTYPES):
        x, weight, dy, y = (lay(*shape, layout, dtype) for shape in ((m, k), (n, k), (m, n), (m, n)))
        for activation, bias in (("sigmoid", None), ("tanh", None), ("sigmoid", torch.empty(n, dtype=dtype))):
            for plan in forwards:
                layer.linear_act_fwd(x, weight, bias, activation, plan)
        for wanted in itertools.product((False, True), repeat=3):
            for plan in backwards:
                layer.linear_act_bwd(dy, y.contiguous(), x, weight, "sigmoid", wanted, plan)
            for plan in (PASSES, APART):
                layer.act_bwd(dy, y.contiguous(), "sigmoid", wanted[2], plan)
        if layout == "dense":
            # The door lets no operands of several dtypes in, but the key does not rely on that.
            other = torch.float16
            for plan in forwards:
                layer.linear_act_fwd(x, weight.to(other), None, "sigmoid", plan)
                layer.linear_act_fwd(x, weight, torch.empty(n, dtype=other), "sigmoid", plan)
            for plan in backwards:
                for operands in ((dy.to(other), x, weight), (dy, x.to(other), weight), (dy, x, weight.to(other))):
                    layer.linear_act_bwd(operands[0], y, *operands[1:], "sigmoid", (True, True, True), plan)
            layer.act_bwd(dy.to(other), y, "sigmoid", True, APART)


def networks():
    """Launches of all kernels of a network, likewise."""
    for widths in ((16, 32, 8), (3, 5, 2), (64,) * 6):
        both = [planning.mlp_bwd(m, widths, "float32", "ieee", H200) for m in (16, 1 << 14)]
        forward = planning.mlp_fwd(16, widths, "float32", "ieee", H200, True)
        every, layers = (True,) * (len(widths) - 1), list(itertools.pairwise(widths))
        for m, layout, dtype, bias in itertools.product(ROWS, LAYOUTS, DTYPES, (False, True)):
            x, target = lay(m, widths[0], layout, dtype), lay(m, widths[-1], layout, dtype)
            weights = tuple(torch.empty(n, k, dtype=dtype) for k, n in layers)
            biases = tuple(torch.empty(n, dtype=dtype) for _, n in layers) if bias else None
            common, pos_weight = (weights, biases, "sigmoid"), torch.empty(widths[-1])
            network.mlp_fwd(x, *common, "sigmoid", forward)
            heads = list(itertools.product((None, pos_weight), ("none", "mean")))
            for (weight, reduction), t in itertools.product(heads, (target, target.float())):
                network.mlp_fwd(x, *common, "identity", forward, head=(t, weight, reduction, torch.float32))
            for backward in both:
                _, saved = network.mlp_fwd(x, *common, "sigmoid", forward, backward.boundaries)
                for wanted in ((False, every, every), (True, (*every[:-1], False), (False,) * len(every))):
                    network.mlp_bwd(target, x, saved, *common, "sigmoid", wanted, backward)
                    for weight, reduction in heads:
                        dloss = target.float() if reduction == "none" else torch.empty(())
                        head = (target, weight, reduction)
                        network.mlp_bwd(dloss, x, saved, *common, "identity", wanted, backward, head)


@pytest.mark.slow
@pytest.mark.parametrize("run", [layers, networks])
def test_what_is_known_of_a_launch_decides_its_version(run, launches, monkeypatch):
    versions, repeated = {}, 0

    def launch(kernel, grid, owner, known, /, **arguments):
        nonlocal repeated
        kernel[grid](**arguments)
        if known is None:
            return
        way = (kernel.__name__, id(owner), known)
        # In this order the arguments go over the short way.
        assert list(arguments)[: len(kernel.arg_names)] == kernel.arg_names
        repeated += way in versions
        assert versions.setdefault(way, (launches[-1][1], grid)) == (launches[-1][1], grid)

    for module in (layer, network):
        monkeypatch.setattr(module, "launch", launch)
    run()
    run()
    assert repeated >= len(versions) > 100
    assert len({version for version, _ in versions.values()}) > 50


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
    forwards = [planning.linear_act_fwd(64, 32, 16, "float32", "ieee", H200), TILED]
    several = planning.linear_act_bwd(1 << 16, 32, 16, "float32", "ieee", H200)
    backward = planning.mlp_bwd(1 << 14, (32, 16, 16), "float32", "ieee", H200)
    forward = planning.mlp_fwd(64, (32, 16, 16), "float32", "ieee", H200, True)
    wanted = (True, (True, True), (True, True))

    def run(device):
        x, weight, dy, y = (torch.empty(shape, device=device) for shape in ((64, 32), (16, 32), (64, 16), (64, 16)))
        bias = torch.empty(16, device=device)
        for plan in forwards:
            layer.linear_act_fwd(x, weight, bias, "sigmoid", plan)
        layer.linear_act_bwd(dy, y, x, weight, "sigmoid", (True, True, True), several)
        layer.act_bwd(dy, y, "sigmoid", True, APART)
        parameters = (weight, torch.empty(16, 16, device=device)), (bias, bias)
        _, saved = network.mlp_fwd(x, *parameters, "sigmoid", "sigmoid", forward, backward.boundaries)
        network.mlp_bwd(dy, x, saved, *parameters, "sigmoid", "sigmoid", wanted, backward)

    ways = []
    for device in ("cpu", "meta", "cpu", "meta"):
        launches.clear()
        run(device)
        ways.append({way for way, *_ in launches})
    assert ways == [{"long"}, {"long"}, {"short"}, {"short"}]


def test_the_second_launch_is_short(launches):
    plan = planning.linear_act_fwd(64, 32, 16, "float32", "ieee", H200)
    x, weight, bias = torch.empty(64, 32), torch.empty(16, 32), torch.empty(16)
    for _ in range(2):
        layer.linear_act_fwd(x, weight, bias, "sigmoid", plan)
    (first, version, grid, arguments), (second, *others) = launches
    assert (first, second) == ("long", "short")
    assert others[:2] == [version, grid]
    # All but y, which is fresh.
    assert [a is b for a, b in zip(arguments, others[2], strict=True)].count(False) == 1
    # What does not begin at a multiple of 16 bytes has another version.
    layer.linear_act_fwd(lay(64, 32, "shifted", torch.float32), weight, bias, "sigmoid", plan)
    assert launches[-1][0] == "long"
    assert launches[-1][1] != version
