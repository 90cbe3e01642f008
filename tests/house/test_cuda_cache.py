# SPDX-License-Identifier: Apache-2.0
"""Kernels that are compiled where no GPU is: what `.ci/cache/cache.py` packs, another process launches at once."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".ci" / "cache" / "cache.py"
VERSION = "3.6.0"  # of triton, which the archives are for

pytestmark = [
    pytest.mark.more,
    pytest.mark.compiles,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]


def run(folder, *arguments, **environment):
    """What cache.py prints, with triton's cache in that folder."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"} | environment
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, CACHE, *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """An archive of the first launch of every family, and the folder in which they were compiled."""
    import triton

    if triton.__version__ != VERSION:
        pytest.skip(f"triton {triton.__version__} is here; make test-old-triton has {VERSION}")
    folder = tmp_path_factory.mktemp("cache")
    archive = folder / "archive.tar.xz"
    run(folder / "filled", "fill", archive, "--tests", "", "--suites", "")
    return archive, folder / "filled"


@pytest.mark.parametrize("alike", [True, False], ids=["machine-alike", "without-file"])
def test_every_family_launches_in_ten_seconds(alike, filled, tmp_path):
    archive, _ = filled
    elsewhere, environment = tmp_path / "elsewhere", {}
    if not alike:
        # The key of a launcher depends on whether this program is there to look at Python's executable.
        for tool in ("gcc", "as", "ld"):
            (tmp_path / tool).symlink_to(shutil.which(tool))
        environment = {"PATH": str(tmp_path)}
    # Not where it was filled: triton's own lists of a kernel's files have whole paths.
    assert run(elsewhere, "unpack", archive, **environment).endswith(f" kernels in {elsewhere}\n")
    found = json.loads(run(elsewhere, "prove", **environment))
    print(found)
    assert (found["compiled"], found["gcc"]) == ([], [])
    assert len(found["seconds"]) == 12
    assert found["launches"] >= 15
    assert max(found["seconds"].values()) < 10


def test_nothing_is_found_in_an_empty_cache(tmp_path, filled):
    found = json.loads(run(tmp_path, "prove"))
    assert len(found["compiled"]) > 15
    assert found["gcc"].count("cuda_utils") == 1
    assert found["gcc"].count("__triton_launcher") > 5


def test_an_archive_holds_what_a_launch_needs_and_no_more(filled):
    archive, folder = filled
    with tarfile.open(archive) as packed:
        names = [name for name in packed.getnames() if "/" in name]
    assert {Path(name).suffix for name in names} == {".cubin", ".json", ".so", ".c"}
    assert not [name for name in names if "__grp__" in name]
    assert all((folder / name).exists() for name in names)


def test_an_archive_for_another_triton_is_not_used(tmp_path):
    other = tmp_path / "other.tar.xz"
    about = tmp_path / "about.json"
    made_for = {"triton": VERSION, "python": "cpython-312", "key": "another wheel"}
    about.write_text(json.dumps({"for": made_for, "sources": "any"}))
    with tarfile.open(other, "w:xz") as packed:
        packed.add(about, "about.json")
    assert run(tmp_path / "empty", "unpack", other).startswith("cache: not used, it is for {")
    assert not list((tmp_path / "empty").glob("*/*"))
