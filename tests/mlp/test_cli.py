# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, what it refuses, and its exit codes."""

import dataclasses
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
from training_cases import needs_images

from perceptriton.kernels import explain
from perceptriton.kernels.native import ready
from perceptriton.mlp import doctor, lessons
from perceptriton.mlp.__main__ import main
from perceptriton.mlp.lessons import pictures, problem
from perceptriton.mlp.lessons.catalogue import LESSONS as CATALOGUE

pytestmark = pytest.mark.usefixtures("one_thread")
needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")


# Each lesson, short, with a line of its page that only its numbers can make.
LESSONS = {
    "gates": (["--steps", "301"], r"1 1 0\.\d{4} 0\.\d{4} 0\.5000"),
    "chain-rule": ([], r"fused layers -7 5 -2 1 -"),
    "worked-step": (["--steps", "101"], "W5 new 0.43703857 0.43703857 0.43703857 0.43703857 0.43703857"),
    "by-hand": (
        ["--steps", "1201"],
        r"gradient by hand / autograd (?:3\.9999|4\.0000)\d+ (?:0\.9999|1\.0000)\d+ (?:3\.9999|4\.0000)\d+ \S+",
    ),
    "xor": (["--steps", "301"], r"300 0\.69315171(?: 0\.6931517\d){3}"),
    "xor-deep": (["--steps", "301", "--draws", "2"], r"300 0\.69315147(?: 0\.693151\d\d){3}"),
    "blobs": (["--steps", "11"], r"9 0\.60920805(?: 0\.60920[78]\d\d){3}"),
    "digits": (["--steps", "301"], r"300 0\.03536\d{3}(?: 0\.03536\d{3}){2}"),
    "sweep": (["--steps", "201", "--seeds", "5"], r"200 0\.69315779(?: 0\.693157\d\d){3}"),
}


def run_instead(name, run, monkeypatch):
    """Gives a lesson of the catalogue another function."""
    monkeypatch.setitem(CATALOGUE, name, dataclasses.replace(CATALOGUE[name], run=run))


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSONS)
def test_lesson_prints_its_page_and_writes_its_picture_and_nothing_else(name, tmp_path, capsys):
    needs_images(name)
    options, line = LESSONS[name]
    target, drawn = tmp_path / "picture.png", CATALOGUE[name].plot and importlib.util.find_spec("matplotlib")
    assert main(["lesson", name, *options, *(["--plot", str(target)] if drawn else [])]) == 0
    out, err = capsys.readouterr()
    assert [path.name for path in tmp_path.iterdir()] == (["picture.png"] if drawn else [])
    if drawn:
        assert target.read_bytes().startswith(b"\x89PNG")
        assert out.endswith(f"\nPicture: {target}\n")
        out = out.removesuffix(f"Picture: {target}\n")
    assert err == ""  # in particular no progress bar: this is no terminal
    assert max(map(len, out.splitlines())) <= 80  # that of nobody's terminal
    pattern = " *" + line.replace(" ", " +")
    assert re.search(f"^{pattern}$", out, re.MULTILINE), out
    assert re.search("All (match|equal) the (textbook|loop by hand|loop over nn)", " ".join(out.split()))
    assert " = " in out  # a formula


def test_every_lesson_has_a_page_and_is_named_in_the_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["lesson", "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert re.findall(r"^    ([a-z]\S*)", out, re.MULTILINE) == list(LESSONS) == list(CATALOGUE)


@pytest.mark.slow
def test_lesson_xor_prints_the_table(capsys):
    assert main(["lesson", "xor", "--steps", "1501", "--timing"]) == 0
    out, _ = capsys.readouterr()
    number = r"0\.\d{8}"
    rows = re.findall(rf"^ +(\d+) +({number}) +({number}) +({number}) +({number})$", out, re.MULTILINE)
    assert [int(step) for step, *_ in rows] == [0, 1000, 1500]
    for _, reference, *losses in rows:
        for loss in losses:
            assert float(loss) == pytest.approx(float(reference), rel=lessons.XOR_BAND)
    words = " ".join(out.split())
    assert "at 16 steps: nn: " in words
    assert "can make up to 6e-05. All match the textbook." in words
    assert "Share of the 4 samples that are right: nn " in words
    run = r" +{} +\d+\.\d\d +\d+\.\d+ +[\d,.]+x$"
    path_of_fit = "compiled" if ready.refusal() is None else "Python"
    for contender, path in ((lessons.NN, "Python"), (lessons.FUSED, "Python"), ("fit", path_of_fit)):
        assert re.search(f"^  {re.escape(contender)}" + run.format(path), out, re.MULTILINE), contender


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("xor", {"seed": 778}), ("xor-deep", {"seed": 778}), ("blobs", {"seed": 3}), ("sweep", {"first_seed": 778})],
    ids=["xor", "xor-deep", "blobs", "sweep"],
)
def test_lesson_that_misses_the_table_is_a_failure(name, wrong, monkeypatch, capsys):
    run_instead(name, functools.partial(CATALOGUE[name].run, **wrong), monkeypatch)
    options = ["--seeds", "2"] if name == "sweep" else []
    assert main(["lesson", name, "--steps", "10", *options]) == 1
    out, err = capsys.readouterr()
    assert "match the textbook" not in out
    miss = r"[^;]*: (\d\.\de-\d\d) relative at step \d, outside the band of (\de-0\d)"
    found = re.fullmatch(rf"perceptriton: the reference is missed: {miss}; {miss}; {miss}\n", err)
    differences, bands = (list(map(float, found.groups()[i::2])) for i in (0, 1))
    assert min(differences) > 100 * max(bands)


def test_by_hand_that_has_not_converged_is_a_failure(capsys):
    assert main(["lesson", "by-hand", "--steps", "101"]) == 1
    out, err = capsys.readouterr()
    assert "has learned XOR" not in " ".join(out.split())
    assert re.fullmatch(
        r"perceptriton: the reference is missed: not converged: a loss of 0\.69\d\d at step 100, not below 0\.1733\n",
        err,
    )


@pytest.mark.parametrize(
    ("name", "change"), [("chain-rule", {"x": 4}), ("worked-step", {"W_output": [[0.45, 0.7], [0.4, 0.6]]})]
)
def test_gradients_that_miss_the_table_are_a_failure(name, change, monkeypatch, capsys):
    file = f"_{name.replace('-', '_')}"
    monkeypatch.setattr(f"perceptriton.mlp.lessons.{file}.table", lambda name: problem.table(name) | change)
    assert main(["lesson", name, *LESSONS[name][0]]) == 1
    out, err = capsys.readouterr()
    assert "the textbook." not in " ".join(out.split())
    assert re.match(r"perceptriton: the reference is missed: by hand in float\d\d: \S+ = \S+ and not \S+;", err)


def test_digits_after_too_few_steps_are_a_failure(capsys):
    needs_images("digits")
    assert main(["lesson", "digits", "--steps", "31"]) == 1
    out, err = capsys.readouterr()
    assert "All match the loop over nn." in " ".join(out.split())
    miss = r"[^;]*: \d\d\.\d% of the test images read right, not more than 95%"
    assert re.fullmatch(rf"perceptriton: the reference is missed: {miss}; {miss}; {miss}\n", err)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["lesson", "digits"]) == 1
    message = "perceptriton: the digits come with scikit-learn: install perceptriton[sklearn]\n"
    assert capsys.readouterr().err == message


@pytest.mark.slow
@needs_matplotlib
def test_a_picture_that_cannot_be_written_is_a_failure(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures, "save", full)
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
        (["lesson", "xor", "--draws", "2"], "unrecognized arguments: --draws 2"),
        (["lesson", "xor-deep", "--draws", "3"], "--draws: invalid choice: 3 .*0, 1, 2"),
        (["lesson", "xor", "--every", "0"], "--every: must be at least 1, not 0"),
        (["lesson", "chain-rule", "--every", "5"], "unrecognized arguments: --every 5"),
        (["lesson", "sweep", "--seeds", "0"], "--seeds: must be at least 1, not 0"),
        (["lesson", "chain-rule", "--steps", "5"], "unrecognized arguments: --steps 5"),
        (["lesson", "chain-rule", "--plot", "a.png"], "unrecognized arguments: --plot a.png"),
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

    for name in CATALOGUE:
        run_instead(name, train, monkeypatch)
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


def test_an_error_that_is_not_the_output_s_is_not_called_one(monkeypatch, capsys):
    def homeless(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    run_instead("xor", homeless, monkeypatch)
    assert main(["lesson", "xor"]) == 1
    assert capsys.readouterr().err == "perceptriton: No usable temporary directory found in ['/tmp']\n"


def test_interrupt(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    run_instead("xor", interrupted, monkeypatch)
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
    assert [tuple(map(int, re.findall(r"\d+", shape))) for shape in rows[::2]] == list(doctor.SHAPES)
    for (m, *widths), text in zip(doctor.SHAPES, rows[1::2], strict=True):
        words = " ".join(text.split())
        shapes = [(n, k) for k, n in itertools.pairwise(widths)]
        for plan in explain((m, widths[0]), shapes if len(shapes) > 1 else shapes[0], device=device):
            assert f"{plan.impl} {plan.reason}" in words


def test_doctor_says_whether_the_interpreter_is_on(monkeypatch, capsys):
    for value, state in (("1", "on"), ("0", "off")):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        main(["doctor"])
        assert re.search(f"^triton's interpreter +{state}", capsys.readouterr().out, re.MULTILINE)


needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC, errno.EACCES, None], ids=errno.errorcode.get)
def test_doctor_says_whether_kernels_can_be_cached(error, tmp_path, monkeypatch, capsys):
    def refused(**_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "yet"))
    if error:
        monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refused)
    assert main(["doctor"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("triton's cache"))
    state = f"cannot be written ({os.strerror(error)}): new kernels will fail" if error else "writable"
    assert line.endswith(f"{tmp_path}/not/yet{' ' if error else ', '}{state}")
    assert list(tmp_path.iterdir()) == []


@needs_triton
@pytest.mark.parametrize("unset", ["TRITON_CACHE_DIR", "TRITON_HOME"])
def test_doctor_looks_at_the_cache_where_triton_does(unset, tmp_path, monkeypatch, capsys):
    script = "from triton import knobs; print(knobs.cache.dir)"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "triton"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in dict.fromkeys(["TRITON_CACHE_DIR", unset]):
        monkeypatch.delenv(name)
    expected = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    ).stdout.strip()
    assert expected.startswith(str(tmp_path))
    assert doctor.triton_cache() == f"{expected}, writable"


def test_build_compiles_ahead(monkeypatch, capsys):
    monkeypatch.setattr("perceptriton.mlp.__main__.compile_all", lambda: iter([("one kind", 1.5), ("another", 0.0)]))
    monkeypatch.setattr(ready, "refusal", lambda: None)
    assert main(["build"]) == 0
    assert re.findall(r"^(.+?) +(\d\.\d) s$", capsys.readouterr().out, re.MULTILINE) == [
        ("one kind", "1.5"),
        ("another", "0.0"),
    ]


def test_what_is_missed_without_numba_is_said(monkeypatch, capsys):
    monkeypatch.setattr(ready, "refusal", lambda: "no numba")
    assert main(["build"]) == 1
    assert capsys.readouterr().err == "perceptriton: no numba\n"
    assert main(["doctor"]) == 0
    assert re.search(r"^numba +not installed: small networks train slowly", capsys.readouterr().out, re.M)


def run_doctor(*flags, command="doctor", **options):
    return subprocess.run([sys.executable, *flags, "-m", "perceptriton.mlp", command], timeout=120, **options)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("arguments", [["lesson", "worked-step", "--steps", "1"], ["doctor"]], ids=["lesson", "doctor"])
def test_a_pipe_where_only_ascii_can_be_written(arguments, columns, tmp_path):
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "COLUMNS": str(columns)}
    plain |= {"HOME": str(tmp_path / "Zoë")}
    command = [sys.executable, "-m", "perceptriton.mlp", *arguments]
    run = subprocess.run(command, env=os.environ | plain, capture_output=True, timeout=120, check=True)
    assert run.stderr == b""
    lines = run.stdout.decode("ascii").splitlines()
    assert max(len(line) for line in lines if "cache" not in line) <= min(columns, 100)
    assert max(map(len, lines)) > 50


@pytest.mark.slow
def test_doctor_runs_anywhere_and_imports_neither_triton_nor_matplotlib(tmp_path):
    run = run_doctor("-W", "error", "-X", "importtime", cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0
    assert "65536  64-64-64-64" in run.stdout
    lines = run.stderr.splitlines()
    assert [line for line in lines if not line.startswith("import time:")] == []
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "torch" in imported
    assert not {"triton", "matplotlib"} & imported


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("command", ["doctor", "--version", "--help"])
def test_output_onto_a_full_disk_is_a_failure(command):
    with open("/dev/full", "w") as stdout:
        run = run_doctor(command=command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert run.stderr == "perceptriton: the output could not be written: No space left on device\n"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no SIGPIPE on this system")
def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout:
        run = run_doctor(stdout=stdout, stderr=subprocess.PIPE)
    assert (run.returncode, run.stderr) == (141, b"")
