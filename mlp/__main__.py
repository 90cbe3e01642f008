"""The command line: `perceptriton lesson NAME`, `doctor` and `export-hub DIR`, also as `python -m perceptriton.mlp`.

Exit codes: 0; 1 where a lesson does not reproduce its table or lacks its data, or a file cannot be written; 2 for bad
arguments; 130 after an interrupt; 141 when the reader of the output has gone.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..kernels import devices, explain
from . import hub, lesson_pages, lessons, plotting
from .lesson_pages import WIDTH

__all__ = ["main"]

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
        # `perceptriton doctor | head`
        _close_stdout()
        return 141
    except OSError as error:
        if error.filename is not None:
            raise
        # `perceptriton doctor > file`, on a full disk: what is written to stdout has no name.
        _close_stdout()
        return _failed(f"the output could not be written: {error.strerror}", 1)


def _close_stdout() -> None:
    # The interpreter flushes it once more as it exits: into nowhere, then.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    export = add(commands, "export-hub", "write this package as the kernel hub of the package `kernels` loads it")
    export.add_argument("directory", metavar="DIR", help="a folder that is empty or does not exist yet")
    export.add_argument("--repo-id", metavar="OWNER/NAME", help="where on the hub it is to be published")
    export.set_defaults(run=_export_hub)
    lesson = add(commands, "lesson", "train a classic example and compare it with the textbook's numbers")
    names = lesson.add_subparsers(title="lessons", metavar="LESSON", required=True)
    for name, entry in LESSONS.items():
        one = add(names, name, entry.summary)
        _lesson_arguments(one, entry)
        one.set_defaults(run=partial(_lesson, entry))
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
    """A lesson's function in `lessons`, by name, and how its arguments and its result are shown."""

    summary: str
    function: str
    intro: Callable[..., str]  # of the function's arguments but device
    report: Callable[[Any], str]
    plot: str = ""  # the function in `plotting`, by name; "" if there is no picture
    picture: str = ""  # what the picture shows
    counts: dict[str, int] = field(default_factory=dict)  # arguments that are numbers, with their defaults


LESSONS = {
    "chain-rule": Lesson(
        "the slopes of f = w x + b", "chain_rule", lesson_pages.chain_rule_intro, lesson_pages.chain_rule_report
    ),
    "worked-step": Lesson(
        "one step of backpropagation in a 2-2-2 network, to eight decimals",
        "worked_step",
        lesson_pages.worked_step_intro,
        lesson_pages.worked_step_report,
        counts={"steps": lessons.WORKED_STEPS},
    ),
    "by-hand": Lesson(
        "backpropagation written out without autograd learns exclusive or",
        "by_hand",
        lesson_pages.by_hand_intro,
        lesson_pages.by_hand_report,
        "plot_by_hand",
        "the loss and the decision surface",
        {"steps": lessons.HAND_STEPS},
    ),
    "xor": Lesson(
        "a 2-2-1 network learns exclusive or",
        "xor",
        lesson_pages.xor_intro,
        lesson_pages.training_report,
        "plot_training",
        "the loss and the decision surface",
        {"steps": lessons.XOR_STEPS},
    ),
    "xor-deep": Lesson(
        "a 2-10-10-10-1 network learns exclusive or, late",
        "xor_deep",
        lesson_pages.xor_deep_intro,
        lesson_pages.training_report,
        "plot_training",
        "the loss and the decision surface",
        {"steps": lessons.XOR_STEPS, "draws": 1},
    ),
    "blobs": Lesson(
        "a perceptron separates two blobs",
        "blobs",
        lesson_pages.blobs_intro,
        lesson_pages.training_report,
        "plot_blobs",
        "the decision line before and after training, and the loss",
        {"steps": lessons.BLOBS_STEPS},
    ),
    "digits": Lesson(
        "a 64-128-10 network reads handwritten digits",
        "digits",
        lesson_pages.digits_intro,
        lesson_pages.digits_report,
        "plot_digits",
        "the losses and the surest mistakes",
        {"steps": lessons.DIGITS_STEPS},
    ),
    "sweep": Lesson(
        "how often 2-2-1 networks learn exclusive or, over seeds and learning rates",
        "sweep",
        lesson_pages.sweep_intro,
        lesson_pages.sweep_report,
        "plot_sweep",
        "the heat map of success",
        {"steps": lessons.SWEEP_STEPS, "seeds": lessons.SWEEP_SEEDS},
    ),
}

COUNTS = {
    "steps": "training steps",
    "draws": "1 or 2: which of the networks drawn in a row is trained",
    "seeds": "seeds at each learning rate",
}


def _lesson_arguments(parser: argparse.ArgumentParser, lesson: Lesson) -> None:
    for name, default in lesson.counts.items():
        choices = (1, 2) if name == "draws" else None
        parser.add_argument(
            f"--{name}",
            type=_count,
            choices=choices,
            default=default,
            metavar="N",
            help=f"{COUNTS[name]} (default: %(default)s)",
        )
    parser.add_argument(
        "--device", type=_device, default="cpu", metavar="DEVICE", help="cpu or cuda (default: %(default)s)"
    )
    if lesson.plot:
        parser.add_argument("--plot", type=_picture, metavar="FILE.png", help=f"write {lesson.picture} here")


def _lesson(lesson: Lesson, args: argparse.Namespace) -> int:
    counts = {name: getattr(args, name) for name in lesson.counts}
    print(lesson.intro(**counts), end="\n\n", flush=True)
    options = {"progress": True} if counts else {}
    try:
        result = getattr(lessons, lesson.function)(device=args.device, **counts, **options)
    except ImportError as error:
        return _failed(str(error), 1)
    print(lesson.report(result))
    if lesson.plot and args.plot:
        figure, _ = getattr(plotting, lesson.plot)(result)
        try:
            plotting.save(figure, args.plot)
        except OSError as error:
            return _failed(f"{args.plot!r} could not be written: {error.strerror or error}", 1)
        print(f"\nPicture: {args.plot}")
    if not result.matches:
        return _failed(f"the reference is missed: {'; '.join(result.misses)}", 1)
    return 0


# --- export-hub --------------------------------------------------------------------------------------------


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
        ("CPU", f"{devices.cpu_kind() or 'unknown vendor'}, torch uses {torch.get_num_threads()} threads"),
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
    if devices.has_triton():
        facts.append(("triton's cache", _triton_cache()))
    return facts


def _triton_cache() -> str:
    """The folder for compiled kernels, and what keeps triton from writing there. Leaves nothing behind."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")).absolute()
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing) as probe:
            # A full disk may have room for a few bytes.
            probe.write(bytes(1 << 20))
            probe.flush()
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror}): new kernels will fail"
    return f"{folder}, writable"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
