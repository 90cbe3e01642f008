# SPDX-License-Identifier: Apache-2.0
"""Kernels for a rented GPU, compiled where there is none: an archive of cubins for triton's own cache.

usage: python .ci/cache/cache.py fill ARCHIVE [--tests MARKERS] [--suites NAMES] [--processes N]
       python .ci/cache/cache.py unpack ARCHIVE     puts what is lacking into triton's cache
       python .ci/cache/cache.py prove              launches every family from that cache, on a driver that does nothing

triton finds a kernel by a key of its source, its types and constants, the options, the chip, ptxas, and every file of
triton itself: `fill` has to run under the wheel, and so under the Python, of the GPU's machine. `make cuda-cache` does.
It compiles into TRITON_CACHE_DIR (.build/cuda-cache), where a second run finds all that has not changed.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import time
import types
from pathlib import Path

BEGAN = time.perf_counter()

ROOT = Path(__file__).parents[2]
SUITES = "training,layers,mlp,kernelbench"
KEPT = (".cubin", ".json", ".so", ".c")  # of what the cache holds; a launch needs no more


def import_package() -> None:
    """Makes the working tree importable as the package that it is, where nothing else does."""
    if importlib.util.find_spec("perceptriton") is None:
        package = types.ModuleType("perceptriton")
        package.__path__ = [str(ROOT)]
        sys.modules["perceptriton"] = package


def about() -> dict[str, str]:
    """What has to be the same here and on the GPU's machine."""
    import triton
    from triton.runtime.cache import triton_key

    key = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    return {"triton": triton.__version__, "python": sys.implementation.cache_tag, "key": key}


def sources() -> str:
    """A hash of the kernels' sources. Of a file that changed, nothing is found below the change."""
    texts = [path.read_bytes() for path in sorted((ROOT / "kernels" / "gpu").glob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def place_of(source: str) -> str:
    """The folder of what gcc makes of a source. Whether the program `file` is installed counts in triton's key."""
    from triton.runtime.build import platform_key
    from triton.runtime.cache import _base32

    return _base32(hashlib.sha256((source + platform_key()).encode()).hexdigest())


# --- fill ------------------------------------------------------------------------------------------------------------


def fill(archive: Path, tests: str, suites: str, processes: int) -> None:
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".build" / "cuda-cache"))
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    import_package()
    import asked
    import chip
    from triton import knobs
    from triton.runtime import build

    make, cache = build._build, Path(knobs.cache.dir)

    def keep(name: str, source: str, *rest) -> str:
        """What is built, with its source beside it, from which `unpack` finds the folder again."""
        text = Path(source).read_text()
        (cache / place_of(text) / f"{name}.c").write_text(text)
        return make(name, source, *rest)

    build._build = keep
    with tempfile.TemporaryDirectory() as folder:
        chip.pretend(chip.Driver(Path(folder)))
        with asked.Asked() as found:
            for launch in asked.families().values():
                launch()
            asked.hardware()
            if tests:
                asked.tests(tests)
            for suite in filter(None, suites.split(",")):
                asked.benchmarks(suite)
        JOBS[:] = found.values()
        began, made = time.perf_counter(), []
        print(f"{len(JOBS)} kernels to compile, in {processes} processes", flush=True)
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            for one in pool.imap_unordered(_compile, range(len(JOBS))):
                made.append(one)
                if len(made) % 50 == 0:
                    print(f"{len(made)} after {time.perf_counter() - began:.0f} s", flush=True)
    places = [place for place, _ in made if place]
    launchers = [path.parent.name for path in cache.glob("*/*.so")]
    size = pack(archive, cache, {*places, *launchers})
    took = sum(seconds for _, seconds in made)
    print(
        f"{archive}: {len(places)} kernels ({len(JOBS) - len(places)} could not be compiled), {len(launchers)} "
        f"launchers, {size / 1e6:.1f} MB; {took:.0f} core-seconds, {took / max(1, len(made)):.2f} each"
    )


# What is to be compiled. A kernel cannot be sent to another process, but its number to one that was forked.
JOBS: list[tuple] = []


def _compile(number: int) -> tuple[str, float]:
    """Where triton's cache has the kernel, "" if it does not compile, and the seconds until it and its launcher are."""
    import triton
    from triton.compiler import ASTSource
    from triton.runtime import driver
    from triton.runtime.cache import _base32

    began = time.perf_counter()
    kernel, signature, constants, attributes, options = JOBS[number]
    source = ASTSource(kernel, signature, constants, attributes)
    try:
        compiled = triton.compile(source, driver.active.get_current_target(), options.__dict__)
        driver.active.launcher_cls(compiled.src, compiled.metadata)
    except Exception as error:  # tests ask for tiles that no compiler takes, to see what is said then
        print(f"{kernel.__name__}: {type(error).__name__}: {error!s:.500}", file=sys.stderr)
        return "", time.perf_counter() - began
    return _base32(compiled.hash), time.perf_counter() - began


def pack(archive: Path, cache: Path, places: set[str]) -> int:
    """Writes those folders of a cache, without what a launch does not need. Its size in bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as out:
        manifest = json.dumps({"for": about(), "sources": sources()}).encode()
        entry = tarfile.TarInfo("about.json")
        entry.size = len(manifest)
        out.addfile(entry, io.BytesIO(manifest))
        for place in sorted(places):
            for path in sorted((cache / place).iterdir()):
                if path.suffix in KEPT and not path.name.startswith("__grp__"):
                    out.add(path, f"{place}/{path.name}")
    return archive.stat().st_size


# --- unpack ----------------------------------------------------------------------------------------------------------


def unpack(archive: Path) -> None:
    from triton import knobs

    cache, places, new, held = Path(knobs.cache.dir), {}, 0, 0
    with tarfile.open(archive) as packed:
        manifest = json.loads(packed.extractfile("about.json").read())
        if manifest["for"] != (own := about()):
            print(f"cache: not used, it is for {manifest['for']} and this machine has {own}")
            return
        for entry in packed:
            place, _, name = entry.name.partition("/")
            if not name:
                continue
            content = packed.extractfile(entry).read()
            if name.endswith(".c"):  # the first of its folder
                places[place] = place_of(content.decode())
            path = cache / places.get(place, place) / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                new += 1
    for metadata in cache.glob("*/[!_]*.json"):
        # triton names the files of a kernel by their whole paths, which are those of this machine.
        group = metadata.with_name(f"__grp__{metadata.name}")
        files = [metadata, metadata.with_suffix(".cubin")]
        if not group.exists() and files[1].exists():
            group.write_text(json.dumps({"child_paths": {path.name: str(path) for path in files}}))
        held += 1
    stale = "" if manifest["sources"] == sources() else "; of other sources, so that some have to be compiled again"
    print(f"cache: {new} files unpacked, {held} kernels in {cache}{stale}")


# --- prove -----------------------------------------------------------------------------------------------------------


def prove() -> None:
    """Prints a JSON document: seconds until each family's first launch, and what had to be compiled on the way."""
    import_package()
    import asked
    import chip
    from triton import knobs
    from triton.runtime import build

    compiled, gcc, seconds = [], [], {}
    make = build._build
    build._build = lambda name, *rest: gcc.append(name) or make(name, *rest)
    knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or compiled.append(src.name)
    with tempfile.TemporaryDirectory() as folder:
        own = chip.Driver(Path(folder))
        chip.pretend(own)
        for name, launch in asked.families().items():
            before = own.launches()
            launch()
            if own.launches() == before:
                sys.exit(f"{name}: nothing was launched")
            seconds[name] = round(time.perf_counter() - BEGAN, 2)
    print(json.dumps({"seconds": seconds, "launches": own.launches(), "compiled": compiled, "gcc": gcc}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    filling = commands.add_parser("fill")
    filling.add_argument("archive", type=Path)
    filling.add_argument("--tests", default="gpu and not long", help="markers of the tests to compile for; '' for none")
    filling.add_argument("--suites", default=SUITES, help="of benchmarks, separated by commas; '' for none")
    filling.add_argument("--processes", type=int, default=os.cpu_count())
    commands.add_parser("unpack").add_argument("archive", type=Path)
    commands.add_parser("prove")
    options = vars(parser.parse_args())
    if options["command"] != "unpack" and shutil.which("gcc") is None:
        sys.exit("gcc is needed, for triton's launchers and for the driver below them")
    {"fill": fill, "unpack": unpack, "prove": prove}[options.pop("command")](**options)


if __name__ == "__main__":
    main()
