"""The command line: `perceptriton lesson xor` and `perceptriton doctor`, also as `python -m perceptriton.mlp`.

Exit codes: 0; 1 where a lesson does not reproduce its table or its picture cannot be written; 2 for bad arguments;
130 after an interrupt; 141 when the reader of the output has gone.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import torch

from ..kernels import explain, ops
from . import lessons, plotting

__all__ = ["main"]

WIDTH = 100  # columns

# What `doctor` explains: rows, widths of a layer or of a network.
SHAPES = (
    (4, 2, 2),
    (64, 64, 64),
    (128, 784, 128),
    (65536, 16, 16),
    (65536, 64, 64),
    (16384, 256, 256),
    (1024, 1024, 1024),
    (4096, 1024, 1024),
    (8192, 512, 1),
    (4, 2, 10, 10, 10, 1),
    (256, 32, 64, 5),
    (65536, 64, 64, 64, 64),
    (4096, 256, 256, 256, 256),
    (128, 784, 128, 10),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; argv is sys.argv[1:] by default.

    Bad arguments raise SystemExit(2) after one line on stderr, as argparse does.
    """
    try:
        args = _parser().parse_args(argv)
        code = args.run(args)
        print(end="", flush=True)
        return code
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except BrokenPipeError:
        # `perceptriton doctor | head`. The interpreter flushes stdout once more as it exits: into nowhere, then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


# --- arguments ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_failed(f"error: {message}", 2))


def _failed(message: str, code: int) -> int:
    print(f"perceptriton: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    def add(commands, name: str, summary: str, **kwargs) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=f"{summary}.", allow_abbrev=False, **kwargs)

    parser = _Parser("perceptriton", description="Sigmoid MLPs in fused Triton kernels.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    doctor = add(commands, "doctor", "what is installed, and which implementation layers take on this machine")
    doctor.set_defaults(run=_doctor)
    lesson = add(commands, "lesson", "train a classic example and compare it with the textbook's numbers")
    names = lesson.add_subparsers(title="lessons", metavar="LESSON", required=True)
    for name, entry in LESSONS.items():
        one = add(names, name, entry.summary)
        entry.add_arguments(one)
        one.set_defaults(run=entry.run)
    return parser


def _steps(text: str) -> int:
    try:
        steps = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if steps < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {steps}")
    return steps


def _device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, not {text!r}")
    if text == "cuda" and not _has_cuda():
        raise argparse.ArgumentTypeError("torch finds no CUDA device here")
    return text


def _picture(text: str) -> str:
    # Refused before the training that it would show, not after.
    try:
        plotting.check_target(text)
    except (ImportError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _has_cuda() -> bool:
    # A driver that is too old is a warning to torch; here it is the answer "no".
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


# --- lessons -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _xor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=_steps, default=lessons.XOR_STEPS, metavar="N", help="training steps (default: %(default)s)"
    )
    parser.add_argument(
        "--device", type=_device, default="cpu", metavar="DEVICE", help="cpu or cuda (default: %(default)s)"
    )
    parser.add_argument(
        "--plot", type=_picture, metavar="FILE.png", help="write the loss and the decision surface here"
    )


def _xor(args: argparse.Namespace) -> int:
    _paragraph(
        f"XOR: is exactly one of two inputs 1? No straight line separates the answers, so a single layer cannot learn "
        f"it. Here a network of two fused linear + sigmoid layers, 2-2-1, is trained by {args.steps:,} steps of plain "
        f"gradient descent: learning rate 1, binary cross-entropy over all four cases, weights drawn with seed "
        f"{lessons.XOR_SEED}. Its losses must be those of the reference table. A network of nn.Linear + nn.Sigmoid "
        f"takes the same steps in turns with it, to compare their times."
    )
    result = lessons.xor(args.steps, args.device, progress=True)
    _print_losses(result)
    print("\n  x1  x2  target           p  class")
    for (x1, x2), target, p in zip(result.inputs, result.targets, result.predictions, strict=True):
        print(f"  {x1:2}  {x2:2}  {target:6}  {p:10.6f}  {int(p > 0.5):5}")
    print(f"Accuracy: {result.accuracy:.0%}")

    print("\n                           seconds   us/step")
    print(f"  fused layers            {result.seconds:8.2f}  {result.us_per_step:8.1f}")
    print(f"  nn.Linear + nn.Sigmoid  {result.nn_seconds:8.2f}  {result.nn_us_per_step:8.1f}")
    print(f"Ratio: {result.ratio:.3f} (above 1 the fused layers are faster; median over the turns)")

    print(f"\nWhat ran, on {result.device}:")
    print(textwrap.indent(str(result.explanation), "  "))
    if args.plot:
        figure, _ = plotting.plot_xor(result)
        try:
            plotting.save(figure, args.plot)
        except OSError as error:
            return _failed(f"{args.plot!r} could not be written: {error.strerror or error}", 1)
        print(f"\nPicture: {args.plot}")
    if not result.matches:
        return _failed(
            f"the losses do not match the reference: {result.largest_difference:.1e} relative at step "
            f"{result.largest_difference_step}, outside the band of {lessons.XOR_BAND:.0e}",
            1,
        )
    return 0


def _print_losses(result: lessons.XorResult) -> None:
    print("\n    step         loss    reference  relative difference")
    differences = iter(result.differences)
    for step, loss, reference in zip(result.steps, result.losses, result.reference, strict=True):
        compared = f"{reference:11.8f}  {next(differences):19.1e}" if reference is not None else f"{'-':>11}  {'-':>19}"
        if step % 1000 == 0 or step == result.steps[-1]:
            print(f"  {step:6}  {loss:11.8f}  {compared}")
    _paragraph(
        f"Largest relative difference over {len(result.differences)} logged steps: {result.largest_difference:.1e} at "
        f"step {result.largest_difference_step} (nn.Linear + nn.Sigmoid: {result.nn_largest_difference:.1e}). The "
        f"band is {lessons.XOR_BAND:.0e}, what the order of rounding can do."
        + (" The losses match the reference." if result.matches else "")
    )


LESSONS = {
    "xor": Lesson("a 2-2-1 network learns exclusive or", _xor_arguments, _xor),
}


# --- doctor ------------------------------------------------------------------------------------------------


def _doctor(args: argparse.Namespace) -> int:
    cuda = _has_cuda()
    for name, value in _facts(cuda):
        print(f"{name:<20}  {value}")
    device = "cuda" if cuda else "cpu"
    print(f"\nWhich implementation fp32 layers and networks take on {device}, and why:\n")
    print(f"{'rows':>5}  {'widths':15}  {'pass':17}  {'runs as':8}  why")
    for rows, *widths in SHAPES:
        shapes = [(n, k) for k, n in pairwise(widths)]
        with warnings.catch_warnings():
            # That a device is too old for the kernels is said once as a warning; here the table says it.
            warnings.simplefilter("ignore")
            found = explain((rows, widths[0]), shapes if len(shapes) > 1 else shapes[0], device=device)
        passes: dict[tuple[str, str], list[str]] = {}
        for name, plan in found._asdict().items():
            passes.setdefault((plan.impl, plan.reason), []).append(name)
        label = f"{rows:5}  {'-'.join(map(str, widths)):15}"
        for (impl, reason), names in passes.items():
            start = f"{label:22}  {'all' if len(passes) == 1 else '/'.join(names):17}  {impl:8}  "
            print(textwrap.fill(reason, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)))
            label = ""
    return 0


def _facts(cuda: bool) -> list[tuple[str, str]]:
    facts = [
        ("perceptriton", _version("perceptriton")),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("numpy", _version("numpy")),
        ("CPU", f"{ops.cpu_kind() or 'unknown vendor'}, torch uses {torch.get_num_threads()} threads"),
    ]
    for index in range(torch.cuda.device_count() if cuda else 0):
        properties = torch.cuda.get_device_properties(index)
        facts.append(
            (
                f"cuda:{index}",
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB",
            )
        )
    if not cuda:
        facts.append(("cuda", "no device" if torch.version.cuda else "no device, and torch is built without CUDA"))
    # What triton itself reads; it is not imported for this.
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true")
    facts.append(("triton's interpreter", 'on: impl="triton" takes CPU tensors' if interpreted else "off"))
    return facts


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _paragraph(text: str) -> None:
    print(textwrap.fill(text, WIDTH), flush=True)


if __name__ == "__main__":
    sys.exit(main())
