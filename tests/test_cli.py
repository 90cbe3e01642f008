"""The command line: what it prints, what it refuses, and its exit codes."""

import errno
import functools
import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from perceptriton.kernels import explain
from perceptriton.mlp import lessons, plotting
from perceptriton.mlp.__main__ import SHAPES, main

needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")


@needs_matplotlib
def test_lesson_xor_prints_the_table_and_writes_the_picture(tmp_path, capsys):
    target = tmp_path / "xor.png"
    assert main(["lesson", "xor", "--steps", "1101", "--plot", str(target)]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # in particular no progress bar: this is no terminal
    rows = re.findall(r"^ +(\d+) +(0\.\d{8}) +(0\.\d{8}) +(\d\.\de-\d\d|0\.0e\+00)$", out, re.MULTILINE)
    assert [int(step) for step, *_ in rows] == [0, 1000, 1100]
    for _, loss, reference, difference in rows:
        assert float(loss) == pytest.approx(float(reference), rel=lessons.XOR_BAND)
        assert float(difference) <= lessons.XOR_BAND
    assert "12 logged steps" in out
    assert "The losses match the reference." in out
    assert "Accuracy: " in out
    assert len(re.findall(r"^  (?:inference|forward  |backward ) aten ", out, re.MULTILINE)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["xor.png"]
    assert target.read_bytes().startswith(b"\x89PNG")


def test_lesson_xor_that_misses_the_table_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(lessons, "xor", functools.partial(lessons.xor, seed=778))
    assert main(["lesson", "xor", "--steps", "101"]) == 1
    out, err = capsys.readouterr()
    assert "match the reference" not in out
    assert re.fullmatch(r"perceptriton: the losses do not match the reference: .* outside the band of 6e-05\n", err)


@needs_matplotlib
def test_a_picture_that_cannot_be_written_is_a_failure(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plotting, "save", full)
    assert main(["lesson", "xor", "--steps", "1", "--plot", str(tmp_path / "xor.png")]) == 1
    assert re.fullmatch(r"perceptriton: .* could not be written: No space left on device\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["train"], "choose from .*lesson"),
        (["lesson"], "required: LESSON"),
        (["lesson", "nand"], "'nand' .*choose from .*xor"),
        (["lesson", "xor", "--steps", "0"], "--steps: must be at least 1, not 0"),
        (["lesson", "xor", "--steps", "-3"], "--steps: must be at least 1, not -3"),
        (["lesson", "xor", "--steps", "many"], "--steps: 'many' is not a whole number"),
        (["lesson", "xor", "--device", "tpu"], "--device: must be cpu or cuda, not 'tpu'"),
        (["lesson", "xor", "--device", "cuda"], "--device: torch finds no CUDA device"),
        (["lesson", "xor", "--st", "5"], "unrecognized arguments: --st 5"),
        (["doctor", "two\nlines"], "unrecognized arguments: two lines"),
    ],
    ids=lambda value: " ".join(value)[:40].replace("\n", " ") or "nothing" if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_in_one_line(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(argv, message, monkeypatch, capsys)


@needs_matplotlib
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/xor.png", "missing' is not a directory"),
        ("xor.txt", r"must end in one of .*\.png"),
        ("xor", r"must end in one of .*\.png"),
        ("folder.png", "exists and is not a file"),
        (300 * "n" + ".png", "cannot be written: .*too long"),
    ],
    ids=["no-directory", "suffix", "no-suffix", "directory", "long-name"],
)
def test_pictures_that_cannot_be_written_are_refused_before_training(name, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.png").mkdir()
    assert_refused(["lesson", "xor", "--plot", str(tmp_path / name)], message, monkeypatch, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def assert_refused(argv, message, monkeypatch, capsys):
    def train(*_, **__):
        raise AssertionError("training started")

    monkeypatch.setattr(lessons, "xor", train)
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"perceptriton: error: .*{message}.*\n", err), err


def test_a_picture_without_matplotlib_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as exit:
        main(["lesson", "xor", "--plot", "xor.png"])
    assert exit.value.code == 2
    assert "install perceptriton[cli]" in capsys.readouterr().err


def test_interrupt(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(lessons, "xor", interrupted)
    assert main(["lesson", "xor"]) == 130
    assert capsys.readouterr().err == "perceptriton: interrupted\n"


def test_doctor_explains_every_shape(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for name, version in (("torch", torch.__version__), ("python", sys.version.split()[0])):
        assert re.search(rf"^{name} +{re.escape(version)}", out, re.MULTILINE)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = re.split(r"^ *(\d+ +\d+(?:-\d+)+) ", out, flags=re.MULTILINE)[1:]
    assert [tuple(map(int, re.findall(r"\d+", shape))) for shape in rows[::2]] == list(SHAPES)
    for (m, *widths), text in zip(SHAPES, rows[1::2], strict=True):
        words = " ".join(text.split())
        shapes = [(n, k) for k, n in itertools.pairwise(widths)]
        for plan in explain((m, widths[0]), shapes if len(shapes) > 1 else shapes[0], device=device):
            assert f"{plan.impl} {plan.reason}" in words


def test_doctor_says_whether_the_interpreter_is_on(monkeypatch, capsys):
    for value, state in (("1", "on"), ("0", "off")):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        main(["doctor"])
        assert re.search(f"^triton's interpreter +{state}", capsys.readouterr().out, re.MULTILINE)


def test_doctor_runs_anywhere_and_imports_neither_triton_nor_matplotlib(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "error", "-X", "importtime", "-m", "perceptriton.mlp", "doctor"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0
    assert "65536  64-64-64-64" in run.stdout
    lines = run.stderr.splitlines()
    assert [line for line in lines if not line.startswith("import time:")] == []
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "torch" in imported
    assert not {"triton", "matplotlib"} & imported


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no SIGPIPE on this system")
def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout:
        run = subprocess.run(
            [sys.executable, "-m", "perceptriton.mlp", "doctor"], stdout=stdout, stderr=subprocess.PIPE, timeout=120
        )
    assert (run.returncode, run.stderr) == (141, b"")
