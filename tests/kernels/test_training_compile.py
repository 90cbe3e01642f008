# SPDX-License-Identifier: Apache-2.0
"""Compile-only: the training loops that a plan can pick, compiled ahead of time for their chips, with gates.

No GPU and no driver is needed. `--cubins DIR` keeps the cubins; the resource table is printed with -rA or -s.
"""

import dataclasses
import itertools
import os
import re

import pytest
import torch
from compiling import (
    CHIPS,
    FINDINGS,
    TILED_FOR,
    assert_fits,
    assert_is_what_a_launch_compiles,
    assert_sound,
    compile_for,
    compile_selected,
    launch_signature,
)
from machine_code import carried_bounds
from training_cases import states_of

triton = pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the interpreter replaces the compiler in this process; run without it", allow_module_level=True)

import triton.language as tl  # noqa: E402

from perceptriton.kernels import plan as planning  # noqa: E402
from perceptriton.kernels.gpu import aot, train  # noqa: E402
from perceptriton.kernels.hyperparameters import COMMON, Hyperparameters  # noqa: E402
from perceptriton.kernels.records import TrainConfig, TrainPlan  # noqa: E402

pytestmark = pytest.mark.compiles

# By the tensors of state they keep, with weight decay, which takes a few registers more than without.
OPTIMIZERS = (
    {"weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"optimizer": "adamw", "weight_decay": 0.1},
)
# RMSprop with one tensor of state and with two, of which it takes as many registers as those above.
RMSPROP = (
    {"optimizer": "rmsprop", "weight_decay": 0.1},
    {"optimizer": "rmsprop", "weight_decay": 0.1, "momentum": 0.9},
)
# tanh is the activation that takes most registers.
TANH = {"hidden": "tanh", "output": "tanh", "loss": "mse"}


def _config(widths, states, **options):
    return TrainConfig(widths, **{**TANH, **OPTIMIZERS[states], **options})


def _cases():
    """(arch, config, members, samples, batch_size, ordered, impl) by name.

    Each limit of the plans is compiled at its edge, streaming minibatches, which takes more registers than samples that
    stay on chip; the nets that everyone trains are compiled as they are.
    """
    for arch in TILED_FOR:
        yield f"sm_{arch}-lane-xor", (arch, TrainConfig((2, 2, 1)), 1, 4, 4, False, "lane")
        yield f"sm_{arch}-block-xor-deep", (arch, TrainConfig((2, 10, 10, 10, 1)), 1, 4, 4, False, "block")
        yield f"sm_{arch}-spread-digits", (arch, TrainConfig((32, 64, 5)), 1, 4096, None, False, "spread")
        yield f"sm_{arch}-spread-small", (arch, TrainConfig((4, 16, 1)), 1, 4096, None, False, "spread")
        yield f"sm_{arch}-block-digits", (arch, TrainConfig((32, 64, 5)), 1, 1024, 256, True, "block")
        for states, widths in enumerate(LANE_EDGES):
            yield f"sm_{arch}-lane-{states}-states", (arch, _config(widths, states), 9999, 100, 10, True, "lane")
        for states, edges in enumerate(BLOCK_EDGES):
            for widths in edges:
                name = "-".join(map(str, widths))
                for impl in ("block", "spread"):
                    yield (
                        f"sm_{arch}-{impl}-{states}-states-{name}",
                        (arch, _config(widths, states), 3, 99, 64, True, impl),
                    )
        for states, options in enumerate(RMSPROP, 1):
            # Of the edges those that came nearest to the limit.
            widths = LANE_EDGES[states], BLOCK_EDGES[states][2 * states - 1], BLOCK_EDGES[states][0]
            for impl, edge in zip(("lane", "block", "spread"), widths, strict=True):
                case = (arch, TrainConfig(edge, **TANH, **options), 3, 99, 64, True, impl)
                yield f"sm_{arch}-{impl}-rmsprop-{states}-states", case
    deep = (2, 10, 10, 10, 1)
    yield "sm_90-lane-xor-adam", (90, TrainConfig((2, 2, 1), optimizer="adam"), 1, 4, 4, False, "lane")
    yield "sm_90-lane-xor-minibatches", (90, TrainConfig((2, 2, 1)), 1, 99, 4, True, "lane")
    yield "sm_90-block-xor-deep-adam", (90, TrainConfig(deep, optimizer="adam"), 1, 4, 4, False, "block")
    yield "sm_90-block-xor-deep-nesterov", (90, TrainConfig(deep, momentum=0.9, nesterov=True), 1, 4, 4, False, "block")
    yield "sm_90-block-small-batch", (90, _config((20,) * 4, 2), 1, 99, 10, True, "block")
    yield "sm_90-block-no-bias", (90, TrainConfig(deep, bias=False), 1, 20, 20, False, "block")


# The largest networks that a plan lets into a lane, and into a block, by the states of the optimizer.
LANE_EDGES = ((2, 12, 1), (2, 8, 1), (2, 4, 1))
BLOCK_EDGES = (
    ((9,) * 9, (20,) * 5, (32, 64, 5), (9, 64, 9, 9)),
    ((9,) * 9, (20,) * 5, (32, 64, 5), (9, 20, 9, 20, 9, 20)),
    ((9,) * 7, (20,) * 4, (32, 64, 5), (9, 40, 32)),
)
CASES = dict(_cases())
PLANNED = {"spread": "block"}  # of which it is a form
# Chips with the tiles of another: these are sound and fit.
OTHERS = {
    f"sm_{arch}-{impl}-xor": (arch, TrainConfig(widths), 1, 4, 4, False, impl)
    for arch in (89, 100)
    for impl, widths in (("lane", (2, 2, 1)), ("block", (2, 10, 10, 10, 1)))
}


def _plan(case):
    arch, config, members, samples, batch_size, _, impl = case
    asked = planning.train(members, samples, batch_size, config, "float32", CHIPS[arch], PLANNED.get(impl, impl))
    return dataclasses.replace(asked, programs=32 if impl == "spread" else 1)


def _launch(case, plan=None, steps=(0, 0, 1000, 10), own=(), rates=None):
    """The launch of a case's plan, with a loss trace. steps: start, taken, steps, log_every. own: the names of numbers
    that members have of their own. rates: of how many members there is a schedule."""
    _, config, members, samples, batch_size, ordered, _ = case

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    parameters = ()
    for k, n in itertools.pairwise(config.widths):
        parameters += (empty(members, n, k), empty(members, n)) if config.bias else (empty(members, n, k),)
    first, second = (parameters if len(states_of(config)) > i else () for i in range(2))
    data = empty(1, samples, config.widths[0]), empty(1, samples, config.widths[-1] * (1 + config.weighted))
    batch_size = batch_size or samples
    order = empty(50, samples, dtype=torch.int32) if ordered else None
    start, taken, count, log_every = steps
    numbers = Hyperparameters(**{name: empty(members) for name in own}) if own else COMMON
    lr, schedule = (empty(members), None) if rates is None else (None, empty(count, rates))
    arguments = (config, parameters, first, second, lr, *data, batch_size, taken, plan or _plan(case), numbers)
    factors = empty(count, members) if config.reduction == "given" else None
    pace = order, start, count, log_every, empty(100, members), schedule, factors
    launch, *more = aot.launches(train.KernelLoop(*arguments).run, *pace)
    assert len(more) == (count - 1 if case[-1] == "spread" else 0)
    return launch


def _launches(case):
    return [(case[0], _launch(case))]


@pytest.fixture(scope="session")
def compiled(request):
    return compile_selected(request, CASES | OTHERS, _launches)


@pytest.mark.parametrize("name", CASES | OTHERS)
def test_no_spills_and_fits(name, compiled):
    (resources,) = compiled[name]
    assert_sound(resources)
    assert_fits(resources, (CASES | OTHERS)[name][0])


@pytest.mark.parametrize("name", [name for name in CASES if "-spread-" not in name])
def test_loops_load_no_parameters(name, compiled):
    """From the first loop's head on, memory is read for samples and their order alone."""
    _, config, _, samples, batch_size, ordered, impl = CASES[name]
    plan = _plan(CASES[name])
    (resources,) = compiled[name]
    loads = resources.loop_opcodes["LDG"]
    assert resources.opcodes["LDG"] > loads, "no parameters were loaded at all"
    ends = config.widths[0], config.widths[-1]
    if not ordered and batch_size == samples <= plan.rows:
        assert loads == 0
    elif impl == "lane":
        # unrolled in the step, and one sample at a time for the loss; one load of the order for each
        assert loads <= (plan.rows + 1) * (sum(ends) + 1)
    else:
        # the step and the loss: tiles of x and y, spread over the threads, and the order of either
        threads = 32 * plan.num_warps
        tiles = sum(-(-max(triton.next_power_of_2(end), 16) * plan.rows // threads) for end in ends)
        assert loads <= 2 * 2 * tiles


@pytest.mark.parametrize("name", CASES)
def test_fp32_products_are_fp32(name, compiled):
    # On tensor cores they would be TF32 in disguise.
    (resources,) = compiled[name]
    assert resources.products == 0
    assert resources.loop_opcodes["FFMA"] >= 16
    assert (resources.findings["dots"] > 0) == (CASES[name][-1] != "lane")
    # A transposed operand is read from shared memory in the other order: none is transposed in registers.
    assert resources.findings["transposes"] == 0


@pytest.mark.parametrize("name", [name for name in CASES if "-states" in name])
def test_edges_are_edges(name):
    """A network with one more layer of the same kind is refused."""
    arch, config, *rest = CASES[name]
    longer = dataclasses.replace(config, widths=(*config.widths[:-1], *config.widths[-2:]))
    impl = CASES[name][-1]
    assert _plan(CASES[name]).impl == PLANNED.get(impl, impl)
    assert _plan((arch, longer, *rest)).impl == "torch"


def test_a_spilling_tile_is_seen():
    # Positive control: 32 x 32 weights, their gradients and Adam's state in four warps.
    case = (90, _config((20,) * 4, 2), 1, 64, 64, False, "block")
    resources = compile_for(90, _launch(case, TrainPlan("block", "", 32, 1, 4)))
    assert resources.stack > 0
    assert resources.opcodes["STL"] > 0


@pytest.mark.parametrize(
    "name", ["sm_90-lane-1-states", "sm_90-block-2-states-9-40-32", "sm_90-block-xor-deep", "sm_90-spread-digits"]
)
def test_ahead_of_time_is_what_a_launch_compiles(name):
    assert_is_what_a_launch_compiles(_launch(CASES[name]))


def long_lanes(names):
    """The names, but lanes with optimizer states or many outputs, which compile for up to 10 s each, are left to CI."""
    long = re.compile("lane-.*(states|outputs)")
    return [pytest.param(name, marks=pytest.mark.more) if long.search(name) else name for name in names]


NUMBERED = {
    "sm_90-lane-xor": (),
    "sm_90-lane-1-states": ("momentum", "weight_decay"),
    "sm_90-lane-2-states": ("beta1", "beta2", "weight_decay"),
    "sm_90-lane-rmsprop-2-states": ("momentum", "weight_decay"),
    "sm_90-block-xor-deep": (),
    "sm_90-block-2-states-9-40-32": ("beta1", "beta2", "weight_decay"),
    "sm_90-spread-2-states-9-40-32": ("beta1", "beta2", "weight_decay"),
}


@pytest.mark.parametrize("loss", ["as-it-is", "cross-entropy"])
@pytest.mark.parametrize("name", long_lanes(NUMBERED))
def test_numbers_of_members_and_steps_fit_into_registers(name, loss):
    arch, config, *rest = CASES[name]
    if loss == "cross-entropy":
        config = dataclasses.replace(config, output="identity", loss="cross_entropy")
    plain, numbered = (
        compile_for(arch, _launch((arch, config, *rest), own=own, rates=rates))
        for own, rates in (((), None), (NUMBERED[name], 3))
    )
    assert_sound(numbered)
    assert_fits(numbered, arch)
    if "-spread-" not in name:
        # Numbers of a member are loaded once, only the rate is in each step.
        assert numbered.loop_opcodes["LDG"] - plain.loop_opcodes["LDG"] == 1


# Those with the fewest registers to spare, and a lane with the most outputs.
FOLDED = ("lane-2-states", "block-1-states-20-20-20-20-20", "block-2-states-9-40-32", "spread-2-states-9-9-9-9-9-9-9")


@pytest.mark.parametrize("name", long_lanes([*FOLDED, "lane-outputs"]))
@pytest.mark.parametrize("arch", [80, 90])
def test_weights_and_factors_fit_into_registers(arch, name):
    wide = arch, _config((1, 24), 0), 9999, 100, 10, True, "lane"
    _, config, *rest = CASES.get(f"sm_{arch}-{name}", wide)
    folded = dataclasses.replace(config, loss="smooth_l1", weighted=True, reduction="given")
    compiled = compile_for(arch, _launch((arch, folded, *rest)))
    assert_sound(compiled)
    assert_fits(compiled, arch)


@pytest.mark.parametrize("impl", ["lane", "block", "spread"])
def test_no_number_of_a_schedule_is_compiled_in(impl):
    case = (90, TrainConfig((2, 2, 1)), 3, 64, 4, False, impl)
    one, many = (launch_signature(_launch(case, steps=(0, 0, 30, 7), rates=rates)) for rates in (1, 3))
    assert one == many


@pytest.mark.parametrize("impl", ["lane", "block", "spread"])
def test_no_number_of_a_launch_is_compiled_in(impl):
    """Launches of one run, and runs of other sizes, share one compiled kernel: they cannot differ by a bit."""
    signatures = []
    for members, samples, batch_size, steps in ((1, 64, 1, (0, 0, 1, 1)), (48, 99, 16, (1, 16, 32, 16))):
        case = (90, TrainConfig((2, 2, 1), momentum=0.5), members, samples, batch_size, True, impl)
        launch = _launch(case, _plan((*case[:4], 10, *case[5:])), steps)
        signatures.append(launch_signature(launch))
    assert signatures[0] == signatures[1]


# --- bounds that a compiler loses ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["steps", "period"])
def handed_on_kernel(out_ptr, steps, period):
    count = 0
    first = 0
    last = tl.minimum(period, steps)
    for _ in range(tl.cdiv(steps, period)):
        for _step in range(first, last):
            count += 1
        first = last
        last = tl.minimum(last + period, steps)
    tl.store(out_ptr, count)


@triton.jit(do_not_specialize=["steps", "period"])
def counted_kernel(out_ptr, steps, period):
    count = 0
    for segment in range(tl.cdiv(steps, period)):
        for _step in range(segment * period, tl.minimum(segment * period + period, steps)):
            count += 1
    tl.store(out_ptr, count)


def test_lost_bounds_are_seen():
    # Positive control, for what triton 3.6.0 and 3.7.1 do; later versions keep both bounds.
    out = torch.empty(1, dtype=torch.int32, device="meta")

    def found(kernel):
        launch = aot.Launch(
            kernel, {"out_ptr": out, "steps": 10, "period": 4}, {"num_warps": 1, "enable_fp_fusion": True}
        )
        carried = {"carried": lambda texts: carried_bounds(texts["ttir"])}
        return aot.compile_for(90, launch, FINDINGS | carried).findings

    losing = triton.__version__ in ("3.6.0", "3.7.1")
    handed_on, counted = found(handed_on_kernel), found(counted_kernel)
    assert (handed_on["carried"], handed_on["lost bounds"]) == (2, 2 if losing else 0)
    assert (counted["carried"], counted["lost bounds"]) == (0, 0)


@pytest.mark.parametrize("impl", ["lane", "block", "spread"])
def test_logging_takes_no_other_kernel(impl):
    """So it changes no bit: both launches run one compiled kernel."""
    case = (90, TrainConfig((2, 2, 1)), 1, 64, 4, False, impl)
    logged, plain = (launch_signature(_launch(case, steps=(0, 0, 30, log_every))) for log_every in (7, 0))
    assert logged == plain


@pytest.mark.parametrize("arch", [80, 90])
def test_a_program_is_counted_after_all_that_it_stored(arch):
    """What all threads store comes before a barrier, the count of one thread after it, in an order that the GPU sees;
    and nothing of other programs is read before the count is known to all threads, nor from this one's own cache."""
    ptx = aot.compiled(arch, _launch(CASES[f"sm_{arch}-spread-digits"])).asm["ptx"]
    order = re.findall(r"^\s*(?:@!?%p\d+\s+)?(st\.global|bar\.sync|atom\.\S+|ld\.global\S*)", ptx, re.MULTILINE)
    (at,) = (i for i, op in enumerate(order) if op.startswith("atom"))
    assert order[at] == "atom.global.gpu.acq_rel.add.u32"
    assert order[at - 1] == "bar.sync"
    assert "st.global" in order[:at]
    assert order[at + 1] == "bar.sync"
    slots = [op for op in order[at:] if op.startswith("ld.global.cg")]
    assert slots
    assert not any(op.startswith("ld.global.cg") for op in order[:at])
