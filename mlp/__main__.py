"""The command line: `perceptriton lesson NAME`, `doctor`, `build`, `export-hub DIR`; also `python -m perceptriton.mlp`.

Exit codes: 0; 1 where a lesson does not reproduce its table or lacks its data, or a file cannot be written; 2 for bad
arguments; 130 after an interrupt; 141 when the reader of the output has gone.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from ..kernels.native import ready
from ..kernels.native.loop import compile_all
from . import doctor, hub
from .lessons import pictures
from .lessons.catalogue import LESSONS
from .lessons.lesson import Lesson

__all__ = ["main"]


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
        # As in `perceptriton doctor | head`, where head ends first.
        _close_stdout()
        return 141
    except OSError as error:
        if error.filename is not None:
            raise
        # As in `perceptriton doctor > file` on a full disk: an error about stdout has no file name.
        _close_stdout()
        return _failed(f"the output could not be written: {error.strerror}", 1)


def _close_stdout() -> None:
    # As it exits, the interpreter flushes stdout once more, which must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- arguments ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_failed(f"error: {message}", 2))


def _failed(message: str, code: int) -> int:
    print(f"perceptriton: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    def add(commands, name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=f"{summary}.", allow_abbrev=False)

    parser = _Parser("perceptriton", description="Sigmoid MLPs in fused Triton kernels.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    about = add(commands, "doctor", "what is installed, and which implementation layers take on this machine")
    about.set_defaults(run=_doctor)
    build = add(commands, "build", "compile the loops for CPUs ahead of the first training, where numba is installed")
    build.set_defaults(run=_build)
    export = add(commands, "export-hub", "write this package as the kernel hub of the package `kernels` loads it")
    export.add_argument("directory", metavar="DIR", help="a folder that is empty or does not exist yet")
    export.add_argument("--repo-id", metavar="OWNER/NAME", help="where on the hub it is to be published")
    export.set_defaults(run=_export_hub)
    train = add(commands, "lesson", "train a classic example and compare it with the textbook's numbers")
    names = train.add_subparsers(title="lessons", metavar="LESSON", required=True)
    default = "(default: %(default)s)"
    for lesson in LESSONS.values():
        one = add(names, lesson.name, lesson.summary)
        for count in lesson.counts:
            options = {"choices": count.choices, "default": count.default, "help": f"{count.summary} {default}"}
            one.add_argument(f"--{count.name}", type=_count, metavar="N", **options)
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
    print(lesson.intro(**counts), end="\n\n", flush=True)
    options = {"progress": True} if counts else {}
    try:
        result = lesson.run(device=args.device, **counts, **options)
    except ImportError as error:
        return _failed(str(error), 1)
    print(lesson.report(result))
    if lesson.plot and args.plot:
        figure, _ = lesson.plot(result)
        try:
            pictures.save(figure, args.plot)
        except OSError as error:
            return _failed(f"{args.plot!r} could not be written: {error.strerror or error}", 1)
        print(f"\nPicture: {args.plot}")
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
        print(f"{variant:<16}  {identifier}")
    print(f"\nTo load it: kernels.get_local_kernel(pathlib.Path({args.directory!r}))")
    return 0


def _build(args: argparse.Namespace) -> int:
    if reason := ready.refusal():
        return _failed(reason, 1)
    print("compiling the training loops for this CPU, or reading them from disk", flush=True)
    for kind, seconds in compile_all():
        print(f"{kind:<40}  {seconds:4.1f} s", flush=True)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    print(*doctor.report(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
