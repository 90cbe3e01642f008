"""The lessons in words: what each teaches, and its result as a page of text. Nothing here prints or computes."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from . import lessons
from .lessons import ByHand, ChainRule, Digits, Run, Sweep, Trajectory, WorkedStep

__all__ = [
    "WIDTH",
    "blobs_intro",
    "by_hand_intro",
    "by_hand_report",
    "chain_rule_intro",
    "chain_rule_report",
    "digits_intro",
    "digits_report",
    "sweep_intro",
    "sweep_report",
    "training_report",
    "worked_step_intro",
    "worked_step_report",
    "xor_deep_intro",
    "xor_intro",
]

WIDTH = 100  # columns

TURNS = (
    "Three ways from the same weights, in turns: nn.Linear + nn.Sigmoid in an ordinary loop, fused layers in the same "
    "loop, and `fit`, which takes all steps in one call."
)


# --- what the lessons teach ----------------------------------------------------------------------------------


def chain_rule_intro() -> str:
    return _page(
        "The chain rule: how much does f change when something inside it does? Multiply the slopes along the way.",
        """
        g = w x        dg/dw = x    dg/dx = w
        f = g + b      df/dg = 1    df/db = 1

        df/dw = df/dg dg/dw = x        df/dx = df/dg dg/dx = w
        """,
        "The same slopes by differences, by autograd, and by a layer of one input and one output without activation, "
        "as torch has it and fused. All numbers here are exact in binary, so they must be equal, not close.",
    )


def worked_step_intro(steps: int) -> str:
    return _page(
        "One step of backpropagation, worked by hand: two inputs, two hidden units, two outputs, no biases. W1..W4 "
        "lead to the hidden units, [[W1, W2], [W3, W4]], and W5..W8 to the outputs.",
        """
        z_h = W_hidden x      h = sigmoid(z_h)      z_o = W_output h      o = sigmoid(z_o)
        E = 1/2 sum (target - o)^2

        dE/dz_o = (o - target) o (1 - o)                          dE/dW_output = dE/dz_o h'
        dE/dz_h = (W_output' dE/dz_o) h (1 - h)                   dE/dW_hidden = dE/dz_h x'
        W new = W - 0.5 dE/dW
        """,
        "(' is the transpose.) The table was worked on paper to eight decimals. A fused layer shows no z, and `fit` "
        f"only E and the new weights. Below, the same network trains on for {steps:,} steps to compare times.",
    )


def by_hand_intro(steps: int) -> str:
    return _page(
        "Backpropagation written out, without autograd: a 2-2-1 sigmoid network, XOR, binary cross-entropy, all four "
        f"samples at each of {steps:,} steps of size 0.5.",
        """
        dy  = (y - t) / (y (1 - y) + 1e-7)        the loss, kept finite
        dz2 = dy y (1 - y)                        the output's sigmoid: almost y - t
        dz1 = (dz2 W2) h (1 - h)                  back through the weights and the hidden sigmoid
        dW  = dz' (the layer's input)             SUMMED over the four samples
        db  = mean of dz                          AVERAGED over the four samples
        """,
        "A mean loss would average both. So the weights learn four times as fast as the biases: autograd takes the "
        "same steps with a learning rate of 2 for weights and 0.5 for biases, and nn.Linear + nn.Sigmoid, the fused "
        "layers and `fit` do just that. For two groups of parameters `fit` runs an ordinary loop.",
    )


def xor_intro(steps: int) -> str:
    return _page(
        "XOR: is exactly one of two inputs 1? No straight line separates the answers, so a single layer cannot learn "
        "it. A hidden layer of two units bends the plane until one line can.",
        """
        h = sigmoid(W1 x + b1)      p = sigmoid(W2 h + b2)
        loss = mean of -t ln p - (1 - t) ln(1 - p)      every weight: w <- w - 1 dloss/dw
        """,
        f"{steps:,} steps over all four cases, weights drawn with seed {lessons.XOR_SEED}. The losses must be those of "
        f"the reference table. {TURNS}",
    )


def xor_deep_intro(steps: int, draws: int) -> str:
    return _page(
        "XOR with three hidden layers of ten. Each sigmoid passes at most a quarter of its gradient back:",
        """
        sigmoid'(z) = y (1 - y) <= 1/4      through three hidden layers: at most 1/64, times the weights
        """,
        "So the loss stays at ln 2 = 0.6931, that of a guess, for thousands of steps, and then drops all at once. "
        f"Learning rate 1, {steps:,} steps, draw {draws} after seed {lessons.XOR_SEED}. Rounding decides when exactly "
        f"the drop comes: before it the losses must agree to {lessons.DEEP_BANDS[0]:.0e}, after it to "
        f"{lessons.DEEP_BANDS[1]:.1e}, relative. " + TURNS,
    )


def blobs_intro(steps: int) -> str:
    return _page(
        "A perceptron: one layer, one output. It draws one line through the plane, and learns where.",
        """
        p = sigmoid(w1 x1 + w2 x2 + b)      p = 1/2 on the line w1 x1 + w2 x2 + b = 0
        dloss/dw = mean of (p - t) x        dloss/db = mean of (p - t)
        """,
        "Fifty points around (-0.5, 0.5) are class 0, fifty around (0.5, -0.5) are class 1. "
        f"{steps:,} steps of size 0.01 over all hundred, weights drawn with seed {lessons.BLOBS_SEED}. {TURNS}",
    )


def sweep_intro(steps: int, seeds: int) -> str:
    return _page(
        "Does a 2-2-1 network learn XOR? That hangs on its first weights and on the learning rate. Here "
        f"{seeds:,} seeds at each of {len(lessons.SWEEP_RATES)} rates, {seeds * len(lessons.SWEEP_RATES):,} networks, "
        f"take {steps:,} steps in one call of `fit`.",
        """
        success:  mean loss over the four cases < ln 2 / 4 = 0.1733
        """,
        "That is proof: an answer on the wrong side of 1/2 costs at least ln 2, a quarter of which is in the mean. "
        f"Seeds count from {lessons.XOR_SEED}, so the first network at rate 1 is that of the lesson xor, and must "
        "follow its table.",
    )


def digits_intro(steps: int) -> str:
    return _page(
        "Reading: 1,797 handwritten digits, images of 8 by 8 pixels that come with scikit-learn. A network of 64 "
        "inputs, 128 hidden units and 10 outputs asks of each image ten questions: is it a 0, is it a 1, ...? The "
        "answer is the digit whose output is the largest.",
        """
        h = sigmoid(W1 x + b1)      p = sigmoid(W2 h + b2)
        loss = mean over images and digits of -t ln p - (1 - t) ln(1 - p)      t = 1 for its digit
        """,
        "A step looks at 64 images, a minibatch. 22 steps, an epoch, see each of 1,347 images once; then they are "
        f"shuffled anew. {steps:,} steps of Adam with a learning rate of 0.01. The other 450 images are kept for the "
        "test, since a network may know by heart what it was trained on. It must read more than "
        f"{lessons.DIGITS_SHARE:.0%} of those. {TURNS} All three see the same minibatches, so the losses must agree.",
    )


# --- what came out -------------------------------------------------------------------------------------------


def chain_rule_report(result: ChainRule) -> str:
    lines = [f"At w = {result.w:g}, x = {result.x:g}, b = {result.b:g}:", ""]
    lines.append(f"  {'':14}" + "".join(f"{name:>8}" for name in result.reference) + f"{'us':>10}")
    lines.append(f"  {'reference':14}" + "".join(f"{value:8g}" for value in result.reference.values()))
    for way in result.ways:
        cells = [f"{way.values[name]:8g}" if name in way.values else f"{'-':>8}" for name in result.reference]
        lines.append(f"  {way.name:14}{''.join(cells)}{result.us[way.name]:10.1f}")
    verdict = " All equal the reference." if result.matches else ""
    return "\n".join([*lines, "", _fill("us: microseconds for f and its slopes, median over 20 turns." + verdict)])


def worked_step_report(result: WorkedStep) -> str:
    ways = [way for way in result.ways if way.dtype == torch.float64]
    short = {lessons.NN: "nn", lessons.FUSED: "fused"}
    lines = [f"x = {result.x}, target = {result.target}, in float64:", ""]
    lines.append(f"  {'':8}{'reference':>12}" + "".join(f"{short.get(way.name, way.name):>12}" for way in ways))
    for name, reference in result.reference.items():
        cells = [f"{way.values[name]:12.8f}" if name in way.values else f"{'-':>12}" for way in ways]
        lines.append(f"  {name:8}{reference:12.8f}{''.join(cells)}")
    lines.append("")
    bands = lessons.WORKED_BANDS
    parts = []
    for dtype in bands:
        distances = [
            abs(value - result.reference[name])
            for way in result.ways
            if way.dtype == dtype
            for name, value in way.values.items()
        ]
        parts.append(f"{max(distances):.1e} in {str(dtype).removeprefix('torch.')} (band {bands[dtype]:.0e})")
    verdict = " All match the reference." if result.matches else ""
    lines.append(_fill(f"Largest difference: {', '.join(parts)}.{verdict}"))
    last = (result.steps - 1) // 100 * 100
    lines += [
        "",
        f"  {f'in float32, {result.steps:,} steps':24}  {'ran as':8}  {f'E at step {last:,}':>18}" + _times_head(),
    ]
    for run in result.runs:
        lines.append(f"  {run.name:24}  {run.path:8}  {run.losses[-1] / 2:18.8e}{_times(run)}")
    lines.append(_speed(result.runs[0]))
    return "\n".join(lines)


def training_report(result: Trajectory) -> str:
    columns = {"reference": result.reference} | {_short(run): run.losses for run in result.runs}
    lines = [_losses(result.steps, columns, result.reference), "", *_contenders(result), "", *_predictions(result)]
    return "\n".join([*lines, "", *_ran(result)])


def by_hand_report(result: ByHand) -> str:
    trajectory = result.trajectory
    rates = [f"{rate:g}" for rate in result.rates]
    lines = [f"  {'at the first step':28}" + "".join(f"{name:>12}" for name in result.names)]
    lines.append(f"  {'gradient by hand / autograd':28}" + "".join(f"{ratio:12.7f}" for ratio in result.ratios))
    lines.append(f"  {'learning rate for autograd':28}" + "".join(f"{rate:>12}" for rate in rates))
    columns = {"textbook": result.textbook} | {_short(run): run.losses for run in trajectory.runs}
    lines += [
        "",
        _losses(trajectory.steps, columns, result.textbook),
        "",
        *_contenders(trajectory, "the loop by hand", "the 1e-7 and the order of rounding"),
    ]
    lines.append(
        _fill(
            "The textbook's weights came from uninitialized memory, so its losses show the form, not the numbers. "
            f"Converged means a loss below ln 2 / 4 = {lessons.SOLVED:.4f}, which proves all four answers right."
            + (" It has converged." if result.converged else "")
        )
    )
    return "\n".join([*lines, "", *_predictions(trajectory)])


def sweep_report(result: Sweep) -> str:
    lines = [
        f"Share of {len(result.seeds):,} seeds that have succeeded by a step, in percent; learning rates across:",
        "",
    ]
    lines.append("    step" + "".join(f"{rate:7.3g}" for rate in result.rates))
    shown = _shown(result.steps, list(result.steps))
    for index, step in enumerate(result.steps):
        if index in shown:
            lines.append(f"  {step:6}" + "".join(f"{100 * share:7.1f}" for share in result.success[index].tolist()))
    best = int(result.success[-1].argmax())
    lines += [
        "",
        _fill(
            f"At the end {result.success[-1, best].item():.1%} at a rate of {result.rates[best]:.3g} have succeeded. "
            "Too small a rate has not got there yet; too large a one jumps into saturation and stays."
        ),
        "",
        f"Seed {result.seeds[0]} at rate 1, alone and among the {result.networks:,}:",
        "",
    ]
    trajectory = result.trajectory
    columns = {"reference": trajectory.reference} | {_short(run): run.losses for run in trajectory.runs}
    return "\n".join([*lines, _losses(trajectory.steps, columns, trajectory.reference), "", *_contenders(trajectory)])


def digits_report(result: Digits) -> str:
    trajectory = result.trajectory
    columns = {_short(run): run.losses for run in trajectory.runs}
    learned, new = f"of {len(trajectory.samples):,} it learned", f"of {len(result.images)} new"
    lines = [
        "The loss of the minibatch, before its step:",
        "",
        _losses(trajectory.steps, columns, trajectory.reference),
        "",
        *_contenders(trajectory, "the loop over nn"),
        "",
        f"  {'read right':24}  {learned:>20}  {new:>12}",
    ]
    for run in trajectory.runs:
        lines.append(f"  {run.name:24}  {result.training_accuracy(run):20.2%}  {result.accuracy(run):12.2%}")
    last = trajectory.runs[-1]
    read = result.read(last)
    mistakes = Counter((int(result.labels[i]), int(read[i])) for i in result.misread(last))
    told = ", ".join(f"{true} as {wrong}" + f" ({n} times)" * (n > 1) for (true, wrong), n in mistakes.most_common())
    lines += ["", _fill(f"Misread by {last.name}: {told or 'none'}."), "", *_ran(trajectory)]
    return "\n".join(lines)


# --- parts ---------------------------------------------------------------------------------------------------


def _page(before: str, formulas: str, after: str) -> str:
    return "\n".join([_fill(before), "", textwrap.indent(textwrap.dedent(formulas).strip(), "    "), "", _fill(after)])


def _fill(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def _short(run: Run) -> str:
    return {lessons.NN: "nn", lessons.FUSED: "fused"}.get(run.name, run.name.partition(" at once")[0][:12])


def _shown(steps: Sequence[int], reference: Sequence[float | None]) -> set[int]:
    """Indices of the rows of a table of a dozen lines: those with a reference, thinned by ten, and the last."""
    compared = [i for i, loss in enumerate(reference) if loss is not None]
    return {*compared[:: 1 if len(compared) <= 13 else 10], len(steps) - 1}


def _losses(
    steps: Sequence[int], columns: Mapping[str, Sequence[float | None]], reference: Sequence[float | None]
) -> str:
    lines = ["    step" + "".join(f"{name:>14}" for name in columns)]
    shown = _shown(steps, reference)
    for index, step in enumerate(steps):
        if index in shown:
            values = [column[index] for column in columns.values()]
            cells = [f"{'-':>14}" if value is None else f"{value:14.8f}" for value in values]
            lines.append(f"  {step:6}{''.join(cells)}")
    return "\n".join(lines)


def _contenders(result: Trajectory, against: str = "the reference", why: str = "the order of rounding") -> list[str]:
    lines = [f"  {'':24}  {'ran as':8}  {'largest difference':>18}  {'at step':>7}" + _times_head()]
    for run in result.runs:
        difference, step, _ = result.largest_difference(run)
        lines.append(f"  {run.name:24}  {run.path:8}  {difference:18.1e}  {step:7}{_times(run)}")
    lines.append(_speed(result.runs[0]))
    bands = sorted({band for band in result.bands if band is not None})
    stated = " or ".join(f"{band:.0e}" for band in bands)
    logged = sum(band is not None for band in result.bands)
    verdict = f" All match {against}." if result.matches else ""
    lines.append(
        _fill(
            f"Differences are relative to {against}, over {logged} logged steps. The band is {stated}: what {why} "
            f"can do.{verdict}"
        )
    )
    return lines


def _ran(result: Trajectory) -> list[str]:
    return [f"How the fused layers ran, on {result.device}:", textwrap.indent(str(result.explanation), "  ")]


def _times_head() -> str:
    return f"  {'seconds':>8}  {'us/step':>9}  {'speed':>8}"


def _times(run: Run) -> str:
    us = f"{run.us_per_step:9.1f}" if run.us_per_step >= 1 else f"{run.us_per_step:9.4f}"
    speed = f"{run.ratio:7.2f}x" if run.ratio < 100 else f"{run.ratio:7,.0f}x"
    return f"  {run.seconds:8.2f}  {us}  {speed}"


def _speed(first: Run) -> str:
    return _fill(
        f"us/step and speed: one network's step, median over turns, and how many times as fast as {first.name}."
    )


def _predictions(result: Trajectory) -> list[str]:
    labelled = result.points is result.samples or torch.equal(result.points, result.samples)
    head = f"  {'x1':>5} {'x2':>5}" + (f"  {'target':>6}" if labelled else "")
    head += f"{'reference':>14}" if result.expected else ""
    lines = [head + "".join(f"{'p, ' + _short(run):>14}" for run in result.runs) + "   class"]
    found = [result.predictions(run) for run in result.runs]
    for i, point in enumerate(result.points.tolist()):
        line = f"  {point[0]:5g} {point[1]:5g}" + (f"  {result.targets[i].item():6g}" if labelled else "")
        line += f"{result.expected[i]:14.8f}" if result.expected else ""
        line += "".join(f"{p[i]:14.8f}" for p in found)
        lines.append(f"{line}  {int(found[-1][i] > 0.5):6}")
    shares = ", ".join(f"{_short(run)} {result.accuracy(run):.0%}" for run in result.runs)
    return [*lines, f"Accuracy over the {len(result.samples)} samples: {shares}."]
