# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmark suite in a process of its own and writes JSON, table and pictures when it has ended.

usage: python benches/run.py [--suite layers|mlp|kernelbench|training] [--out DIR] [--cases SUBSTRING] [--quick] ...

Exit status: 0 if every contender passed its check and was timed; 1 if some did not (what was timed is written, under
a name that ends in "-incomplete"); otherwise that of pytest, and nothing is written. Interrupted, it leaves nothing.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import atomic
import binding  # noqa: F401 - the child process inherits the settings
import report
from stack_cases import SUITES

HERE = Path(__file__).resolve().parent


def slug(document: dict) -> str:
    """The device as part of a file name: "amd-zen-5", "nvidia-h200"."""
    info = document["machine_info"]
    name = info.get("gpu", {}).get("name") or info.get("cpu_kind") or "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def command(options: argparse.Namespace, output: Path) -> list[str]:
    selected = [f"({options.cases})"] if options.cases else []
    file = HERE / ("bench_training.py" if options.suite == "training" else "bench_stacks.py")
    found = [sys.executable, "-m", "pytest", str(file), "--rootdir", str(HERE.parent)]
    found += [f"--suite={options.suite}", "-c", str(HERE.parent / "pyproject.toml"), "-p", "no:cacheprovider"]
    found += ["--benchmark-quiet", "--benchmark-disable-gc", f"--benchmark-json={output}"]
    if options.toy:
        # No compiler, and only what takes a moment.
        selected += ["(launch or classifier or xor or digits or residual)", "not compiled"]
        found += ["--suite-device=cpu", "--suite-quick"]
    elif options.device:
        found.append(f"--suite-device={options.device}")
    if options.dtypes:
        found.append(f"--suite-dtypes={options.dtypes}")
    if options.quick:
        found.append("--suite-quick")
    if options.seconds is not None:
        found.append(f"--suite-seconds={options.seconds}")
    if options.autotune:
        found.append("--suite-autotune")
    return [*found, "-k", " and ".join(selected)] if selected else found


def run_to_end(arguments: list[str]) -> int:
    """The exit status of a child that does not outlive this process's interruption or termination."""

    def terminate(*_):
        raise SystemExit(128 + signal.SIGTERM)

    # The child must not import perceptriton's neighbours from the current folder, which `-m` puts on the path.
    with subprocess.Popen(arguments, cwd=HERE) as child:
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
            child.kill()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=(*SUITES, "training"), default="layers", help="what to time")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--cases", help="only benchmarks whose name contains this; an expression for pytest -k")
    parser.add_argument("--quick", action="store_true", help="few rounds: to look, not to quote")
    parser.add_argument("--toy", action="store_true", help="a rehearsal on the CPU in a few seconds")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--dtypes", help="comma-separated; default: float32, on CUDA bfloat16 too")
    parser.add_argument(
        "--seconds", type=float, help="start no case after this many; default on CUDA: 180, but for training"
    )
    parser.add_argument("--autotune", action="store_true", help="on CUDA, time torch.compile max-autotune too")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "results.json")
        code = run_to_end(command(options, output))
        if code not in (0, 1):
            return code
        try:
            document = json.loads(output.read_text())
        except (OSError, ValueError) as error:
            print(f"no results: {error}", file=sys.stderr)
            return code or 1
    kind = "-incomplete" if code else ""
    target = options.out.resolve() / f"{options.suite}-{slug(document)}{kind}.json"
    atomic.write(target, json.dumps(document, indent=1) + "\n")
    report.main([str(target)])
    return code


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
