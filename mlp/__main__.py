# SPDX-License-Identifier: Apache-2.0
"""The command line: `perceptriton lesson NAME`, `doctor`, `build`, `export-hub DIR`; also `python -m perceptriton`.

Exit codes: 0; 1 where a lesson does not reproduce its table or lacks its data, a file cannot be written, or nothing can
be compiled; 2 for bad arguments; 130 after an interrupt; 141 when the reader of the output has gone.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch

from ..kernels import devices, peaks
from ..kernels.activations import ACTIVATIONS
from ..kernels.native import ready
from ..kernels.native.loop import compile_all
from ..kernels.records import DTYPES, Device
from . import doctor, hub
from .lessons import pictures
from .lessons.catalogue import LESSONS
from .lessons.lesson import Lesson
from .lessons.text import View

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; argv is sys.argv[1:] by default.

    Bad arguments raise SystemExit(2) after one line on stderr, as argparse does.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # one that cannot write a path's letters must not end in a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except BrokenPipeError:
        # As in `perceptriton doctor | head`, where head ends first.
        _close_stdout()
        return 141
    except OSError as error:
        if error.filename is not None:
            raise
        return _failed(str(error.strerror or error), 1)
    except _Unwritten as error:
        # As in `perceptriton doctor > file` on a full disk.
        _close_stdout()
        return _failed(f"the output could not be written: {error}", 1)


class _Unwritten(Exception):
    """What stdout does not take. Its OSError would look like any other without a file name."""


def _say(*lines: str, end: str = "\n") -> None:
    try:
        print(*lines, sep="\n", end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _Unwritten(error.strerror) from error


def _close_stdout() -> None:
    # As it exits, the interpreter flushes stdout once more, which must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- arguments ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_failed(f"error: {message}", 2))

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own leaves it at that where it cannot be written.
        if file in (None, sys.stdout):
            _say(message, end="")
        else:
            super()._print_message(message, file)


def _failed(message: str, code: int) -> int:
    print(f"perceptriton: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    def add(commands, name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=f"{summary}.", allow_abbrev=False)

    parser = _Parser(
        "perceptriton", description="Sigmoid, tanh and relu MLPs in fused Triton kernels.", allow_abbrev=False
    )
    # A copy on the hub has no version of the package.
    version = getattr(sys.modules[str(__package__).partition(".")[0]], "__version__", "without a version")
    parser.add_argument("--version", action="version", version=f"perceptriton {version}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    about = add(commands, "doctor", "what is installed, and which implementation layers take on this machine")
    about.set_defaults(run=_doctor)
    build = add(commands, "build", "compile ahead: the loops for CPUs or, with --sizes, a network's kernels for a GPU")
    sizes = "widths of a network: compile its kernels, forward alone and for a training step"
    build.add_argument("--sizes", type=_sizes, metavar="N,N,..", help=sizes)
    build.add_argument("--dtype", choices=DTYPES, help="of x and parameters (default: float32)")
    build.add_argument("--activation", choices=ACTIVATIONS, help="of all layers (default: sigmoid)")
    rows = "of x; a kernel's code depends on whether they are few or many (default: 32,65536)"
    build.add_argument("--rows", type=_counts, metavar="N,..", help=rows)
    chips = "the chip to compile for, as in H100 or sm_90 (default: the CUDA device at hand)"
    build.add_argument("--chip", type=_chip, metavar="NAME", help=chips)
    build.set_defaults(run=_build)
    export = add(commands, "export-hub", "write this package as the kernel hub of the package `kernels` loads it")
    export.add_argument("directory", metavar="DIR", help="a folder that is empty or does not exist yet")
    export.add_argument("--repo-id", metavar="OWNER/NAME", help="where on the hub it is to be published")
    export.set_defaults(run=_export_hub)
    train = add(commands, "lesson", "train a classic example and check its numbers")
    names = train.add_subparsers(title="lessons", metavar="LESSON", required=True)
    default = "(default: %(default)s)"
    for lesson in LESSONS.values():
        one = add(names, lesson.name, lesson.summary)
        for count in lesson.counts:
            options = {"choices": count.choices, "default": count.default, "help": f"{count.summary} {default}"}
            kind = int if count.choices else _count
            one.add_argument(f"--{count.name}", type=kind, metavar="N", **options)
        if any(count.name == "steps" for count in lesson.counts):
            one.add_argument("--every", type=_count, metavar="N", help="print the losses of every N-th logged step")
        one.add_argument("--timing", action="store_true", help="print how long the ways of computing it take")
        one.add_argument("--device", type=_device, default="cpu", metavar="DEVICE", help=f"cpu or cuda {default}")
        if lesson.plot:
            one.add_argument("--plot", type=_picture, metavar="FILE.png", help=f"write {lesson.picture} here")
        one.set_defaults(run=partial(_lesson, lesson))
    return parser


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {count}")
    return count


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _sizes(text: str) -> tuple[int, ...]:
    sizes = _counts(text)
    if len(sizes) < 2:
        raise argparse.ArgumentTypeError(f"an input and an output width are the least, not {text!r}")
    return sizes


def _chip(text: str) -> Device:
    try:
        return peaks.chip(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, not {text!r}")
    if text == "cuda" and not doctor.has_cuda():
        raise argparse.ArgumentTypeError("torch finds no CUDA device here")
    return text


def _picture(text: str) -> str:
    # Checked while arguments are parsed, so that a bad path is refused before the training, not after it.
    try:
        pictures.check_target(text)
    except (ImportError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


# --- commands ----------------------------------------------------------------------------------------------


def _lesson(lesson: Lesson, args: argparse.Namespace) -> int:
    counts = {count.name: getattr(args, count.name) for count in lesson.counts}
    _say(lesson.intro(**counts), end="\n\n")
    options = {"progress": True} if counts else {}
    try:
        result = lesson.run(device=args.device, **counts, **options)
    except ImportError as error:
        return _failed(str(error), 1)
    _say(lesson.report(result, View(getattr(args, "every", None), args.timing)))
    if lesson.plot and args.plot:
        figure, _ = lesson.plot(result)
        try:
            pictures.save(figure, args.plot)
        except OSError as error:
            return _failed(f"{args.plot!r} could not be written: {error.strerror or error}", 1)
        _say(f"\nPicture: {args.plot}")
    if not result.matches:
        return _failed(f"the reference is missed: {'; '.join(result.misses)}", 1)
    return 0


def _export_hub(args: argparse.Namespace) -> int:
    try:
        identifiers = hub.export(args.directory, args.repo_id)
    except ValueError as error:
        return _failed(f"error: {error}", 2)
    except OSError as error:
        return _failed(f"{args.directory!r} could not be written: {error.strerror or error}", 1)
    for variant, identifier in identifiers.items():
        _say(f"{variant:<16}  {identifier}")
    _say(f"\nTo load it: kernels.get_local_kernel(pathlib.Path({args.directory!r}))")
    return 0


def _build(args: argparse.Namespace) -> int:
    if args.sizes is not None:
        return _build_kernels(args)
    for name in ("dtype", "activation", "rows", "chip"):
        if getattr(args, name) is not None:
            return _failed(f"error: argument --{name}: of a network, whose --sizes are not given", 2)
    if reason := ready.refusal():
        return _failed(reason, 1)
    _say("compiling the training loops for this CPU, or reading them from disk")
    for kind, seconds in compile_all():
        _say(f"{kind:<40}  {seconds:4.1f} s")
    return 0


def _build_kernels(args: argparse.Namespace) -> int:
    if not devices.has_triton():
        return _failed("triton is not installed", 1)
    if args.chip is None and not doctor.has_cuda():
        return _failed("torch finds no CUDA device here; --chip names one, as in --chip sm_90", 1)
    device = args.chip or devices.look_at(torch.device("cuda", torch.cuda.current_device()))
    ahead, dtype, activation = devices.gpu("build"), args.dtype or "float32", args.activation or "sigmoid"
    if reason := ahead.refusal(device, dtype):
        return _failed(reason, 1)
    rows, precision = args.rows or (32, 65536), devices.fp32_precision(device)
    order = ahead.Order(args.sizes, dtype, precision, activation, rows, device, args.chip is None)
    _say(f"compiling for sm_{device.arch}, or finding in triton's cache, {doctor.triton_cache()}")
    kernel = None
    try:
        for kernel in ahead.build(order):
            _say(f"{kernel.name:<32}{kernel.rows:>10,} rows  {kernel.seconds:5.1f} s")
    except (BrokenPipeError, _Unwritten):
        raise
    except Exception as error:  # whatever triton, gcc or ptxas says
        return _failed(f"{type(error).__name__}: {error}", 1)
    if kernel is None:
        _say("none: torch's own products take all layers")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    _say(*doctor.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
