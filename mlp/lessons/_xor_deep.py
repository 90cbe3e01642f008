# SPDX-License-Identifier: Apache-2.0
"""The lesson in which a deep network learns exclusive or, late."""

from collections.abc import Sequence

import torch

from ..model import MLP
from ._xor import XOR_SEED, XOR_STEPS, xor_task
from .lesson import Count, Lesson
from .pictures import plot_training
from .problem import WAYS, contenders, network_from_seed, own_defaults, table
from .race import race
from .text import (
    TURNS,
    View,
    agreement,
    counted,
    loss_table,
    page,
    prediction_table,
    sections,
    shown_rows,
    timing_table,
)
from .trajectory import Trajectory, trajectory_of

# Relative. The first is for losses on the plateau near ln 2 (to step 2000), where a step moves weights by a few units
# in the last place of fp32. The second is for losses after the drop, whose step depends on the order of rounding: twice
# 1.7e-2, the largest difference in 120 runs with permuted samples and hidden neurons (8e-3 in the other 119).
DEEP_BANDS = (3e-7, 3.4e-2)
DEEP_PREDICTION_BAND = 0.1  # twice 4.8e-2, the largest in the same runs; the p of one sample moves more than a mean
PLATEAU = 0.6  # nats
DROPPED = 0.1  # nats, which a loss has where the drop is over
EDGE = 0.69  # nats; where the table has no rows, a drop that has begun belongs to its end
DRAWS = (0, 1, 2)


@own_defaults()
def xor_deep(
    steps: int = XOR_STEPS,
    device: torch.device | str = "cpu",
    *,
    seed: int = XOR_SEED,
    draws: int = 1,
    ways: Sequence[str] = WAYS,
    progress: bool = False,
) -> Trajectory:
    """Trains a 2-10-10-10-1 network as `xor` does. Its loss stays near ln 2, that of a guess, then drops all at once.

    draws: 1 or 2, how often the network is drawn after the 2-2-1 network of `xor`; the last draw is trained. The
    table has both. 0: the network is the first that is drawn from the seed, which the table does not have: at each
    1,000th step the others must follow the first run. The other arguments and errors are those of `xor`, ValueError
    too for other draws.
    """
    if draws not in DRAWS:
        raise ValueError(f"draws must be 0, 1 or 2, not {draws}")
    sizes = [2, 10, 10, 10, 1]
    task = xor_task(steps, device)
    network = network_from_seed(seed, device, *([[2, 2, 1], *draws * [sizes]] if draws else [sizes]))
    runs = race(task, contenders(task, network, ways), progress)
    if draws == 0:
        bands = {"band": lambda loss: DEEP_BANDS[loss < EDGE], "compared": 1000}
        return trajectory_of(task, device, sizes, network(MLP), runs, **bands)
    given = table("xor_2-10-10-10-1")["runs"][draws - 1]
    losses, expected = dict(given["loss"]), given["prediction"] if steps == XOR_STEPS else None
    bands = {"band": lambda loss: DEEP_BANDS[loss < PLATEAU], "prediction_band": DEEP_PREDICTION_BAND}
    return trajectory_of(task, device, sizes, network(MLP), runs, reference=losses, expected=expected, **bands)


def _intro(steps: int, draws: int) -> str:
    drawn = f"draw {draws} after the network of xor" if draws else "the first network"
    return page(
        "XOR with three hidden layers of ten. Each sigmoid passes at most a quarter of its gradient back:",
        """
        sigmoid'(z) = y (1 - y) <= 1/4
        through three hidden layers: at most 1/64, times the weights
        """,
        "So the loss stays at ln 2 = 0.6931, that of a guess, for thousands of steps, and then drops all at once. "
        f"Learning rate 1, {counted(steps, 'step')}, {drawn} from seed {XOR_SEED}. Rounding decides when exactly the "
        f"drop comes: the losses must agree to {DEEP_BANDS[0]:.0e} of their size before it, to {DEEP_BANDS[1]:.1e} "
        f"after it. {TURNS}",
    )


def _report(result: Trajectory, view: View) -> str:
    # The table's rows are too far apart to show the drop: some more around it, at the steps that were logged.
    losses = result.runs[-1].losses
    drop = next((i for i, loss in enumerate(losses) if loss < DROPPED), None)
    rows = {*shown_rows(result.steps), *(range(max(0, drop - 4), min(len(losses), drop + 4)) if drop else ())}
    told = ""
    if drop:
        (before, after), (start, end) = losses[drop - 1 : drop + 1], result.steps[drop - 1 : drop + 1]
        told = f"The drop, here of fit: from {before:.4f} at step {start:,} to {after:.4f} at step {end:,}."
    return sections(
        loss_table(result, view, rows=sorted(rows)),
        [told] if told else [],
        agreement(result),
        prediction_table(result),
        timing_table(view, result.runs),
    )


XOR_DEEP = Lesson(
    name="xor-deep",
    summary="a 2-10-10-10-1 network learns exclusive or, late",
    run=xor_deep,
    intro=_intro,
    counts=(
        Count("steps", XOR_STEPS),
        Count("draws", 1, "which network from the seed is trained: 0, the first; 1 and 2, after that of xor", DRAWS),
    ),
    report=_report,
    plot=plot_training,
)
