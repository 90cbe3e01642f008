# SPDX-License-Identifier: Apache-2.0
"""The export for the kernel hub: what it writes, and that the hub's loader makes of it what is installed."""

import errno
import functools
import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from perceptriton import kernels as installed_kernels
from perceptriton import mlp as installed
from perceptriton.kernels import ops
from perceptriton.mlp import hub
from perceptriton.mlp.__main__ import main

REPO_ID = "owner/perceptriton"


@pytest.fixture(scope="module")
def loader():
    """The package `kernels`, which is not our folder of that name."""
    try:  # without it, the folder of that name in the checkout would be imported
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package kernels is not installed")
    pytest.importorskip("kernels._rust", reason="the package kernels has no module _rust")
    return pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "repository"
    hub.export(folder, REPO_ID)
    return folder


@pytest.fixture(scope="module")
def copy(loader, exported):
    """The exported package as the loader imports it, beside the installed one."""
    return loader.get_local_kernel(exported)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def variants(folder):
    return sorted((folder / "build").iterdir())


# --- what is written ---------------------------------------------------------------------------------------


def test_a_copy_holds_every_file_of_the_package(exported):
    root = Path(installed.__file__).parents[1]
    expected = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in ("kernels", "mlp")
        for suffix in ("py", "json")
        for path in (root / folder).rglob(f"*.{suffix}")
        if path.parent.name != "_front"  # that of the installed package: a copy has its own
    }
    assert {"kernels/tuned/cpu.json", "mlp/lessons/tables/blobs_2-1.json", "kernels/gpu/layer.py"} <= set(expected)
    source = files(exported / "torch-ext" / "perceptriton")
    assert {name: source[name] for name in expected} == expected
    assert set(source) - set(expected) == {"__init__.py", "layers.py"}
    assert [variant.name for variant in variants(exported)] == ["torch-cpu", "torch-cuda"]
    for variant in variants(exported):
        found = {name: text for name, text in files(variant).items() if not name.endswith(".pyc")}
        assert found.pop("metadata.json")
        assert found == source


def test_the_loader_reads_the_metadata_and_computes_the_same_digest(loader, exported, tmp_path):
    from kernels._rust import Digest, DigestValidationError

    ids = set()
    for variant in variants(exported):
        metadata = loader.Metadata.read_from_file(variant / "metadata.json")
        backend = variant.name.removeprefix("torch-")
        assert (str(metadata.name), metadata.version, metadata.license) == ("perceptriton", 1, "Apache-2.0")
        assert str(metadata.backend.backend_type) == backend
        assert re.fullmatch(f"_perceptriton_{backend}_[0-9a-f]{{12}}", metadata.id)
        ids.add(metadata.id)
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
    assert len(ids) == 2
    changed = shutil.copytree(variant, tmp_path / "changed")
    (changed / "mlp" / "layers.py").write_text("")
    with pytest.raises(DigestValidationError, match=r"mlp/layers\.py"):
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, changed))


@pytest.mark.parametrize("repo_id", [REPO_ID, None], ids=str)
def test_kernel_builder_can_read_the_source(repo_id, loader, tmp_path):
    from kernels._rust import Backend, Build

    hub.export(tmp_path / "source", repo_id)
    assert Build.open(tmp_path / "source").general.backends == [Backend.CPU, Backend.CUDA]
    text = (tmp_path / "source" / "build.toml").read_text()
    assert "edition = 5" in text
    assert ('repo-id = "owner/perceptriton"' in text) == (repo_id is not None)
    card = (tmp_path / "source" / "CARD.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n---\n")
    assert f'get_kernel("{repo_id or "OWNER/perceptriton"}", version=1' in card


def test_the_same_files_have_the_same_id_and_others_another(exported, tmp_path, monkeypatch):
    first = hub.export(tmp_path / "first", REPO_ID)
    assert first == {v.name: json.loads((v / "metadata.json").read_text())["id"] for v in variants(exported)}
    package = hub._package()
    monkeypatch.setattr(hub, "_package", lambda: package | {"mlp/layers.py": b"\n" + package["mlp/layers.py"]})
    second = hub.export(tmp_path / "second", REPO_ID)
    assert not set(first.values()) & set(second.values())


# --- what the loader makes of it ---------------------------------------------------------------------------


def test_a_copy_has_modules_and_ops_of_its_own(copy, exported):
    assert Path(copy.__file__).is_relative_to(exported)
    assert copy.__name__ in hub.export(exported.with_name("again")).values()
    assert copy.__all__ == ["layers", *installed_kernels.__all__, *installed.__all__]
    for package in (installed_kernels, installed):
        assert not [name for name in package.__all__ if getattr(copy, name) is getattr(package, name)]
    namespaces = [ops.NAMESPACE, copy.kernels.ops.NAMESPACE]
    assert namespaces == ["perceptriton", copy.__name__]
    tensors = torch.randn(3, 4), torch.randn(2, 4), torch.randn(2)
    results = [getattr(torch.ops, name).linear_act(*tensors, "tanh", None) for name in namespaces]
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], torch.tanh(nn.functional.linear(*tensors)))


def layer(package, activation):
    inputs = [torch.randn(300, 256), torch.randn(200, 256) / 16, torch.randn(200)]
    inputs = [t.requires_grad_() for t in inputs]
    y = package.linear_act(*inputs, activation)
    return y, *torch.autograd.grad(y, inputs, torch.randn(300, 200))


def network(package, output):
    model = package.MLP([8, 256, 3], output_activation=output)
    y = model(torch.randn(500, 8))
    return y, *torch.autograd.grad(y, list(model.parameters()), torch.randn(500, 3))


def training(package):
    model = package.MLP([4, 16, 1])
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    options = {"criterion": nn.BCELoss(), "optimizer": adam, "steps": 30, "log_every": 10}
    history = package.fit(model, torch.randn(64, 4), torch.rand(64, 1), **options)
    assert history.path == "torch"
    return history.loss, *model.parameters()


def ensemble(package):
    members = package.Ensemble(3, [4, 8, 1])
    return members(torch.randn(5, 4)), *members.parameters()


def fused(package):
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2), nn.Tanh())
    assert package.fuse_(model) == ["0", "2"]
    return (model(torch.randn(5, 4)),)


USES = {
    **{activation: functools.partial(layer, activation=activation) for activation in ("sigmoid", "tanh", "relu")},
    "network": functools.partial(network, output="identity"),
    "fit": training,
    "ensemble": ensemble,
    "fuse_": fused,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_copy_computes_what_the_installed_package_computes(use, copy):
    torch.manual_seed(1)
    expected = use(installed)
    torch.manual_seed(1)
    actual = use(copy)
    assert all(t.abs().sum() > 0 for t in expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_mapped_repository_is_loaded_from_its_folder(loader, copy, exported, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO_ID}={exported}")
    assert loader.get_kernel(REPO_ID, version=1) is copy


ACTIVATIONS = {"LinearSigmoid": torch.sigmoid, "LinearTanh": torch.tanh, "LinearReLU": torch.relu}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kernelize_puts_the_layers_into_a_model(name, bias, loader, copy, exported):
    class Gate(nn.Linear):
        def forward(self, input):
            return ACTIVATIONS[name](super().forward(input))

    loader.replace_kernel_forward_from_hub(Gate, name)
    model = nn.Sequential(Gate(5, 4, bias), Gate(4, 3, bias))
    twin = nn.Sequential(Gate(5, 4, bias), Gate(4, 3, bias))
    twin.load_state_dict(model.state_dict())
    repository = loader.LocalLayerRepository(exported, layer_name=name)
    with loader.use_kernel_mapping({name: {"cpu": repository}}, inherit_mapping=False):
        mode = loader.Mode.TRAINING | loader.Mode.TORCH_COMPILE
        loader.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    assert [gate.forward.__func__ for gate in model] == 2 * [getattr(copy.layers, name).forward]
    x = torch.randn(7, 5)
    for net in (model, twin):
        net(x).square().sum().backward()
    torch.testing.assert_close(model(x), twin(x))
    for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert expected.grad.abs().sum() > 0
        torch.testing.assert_close(actual.grad, expected.grad)


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_writes_and_says_how_to_load(exported, tmp_path, capsys):
    (tmp_path / "repository").mkdir()  # an empty folder may be there
    assert main(["export-hub", str(tmp_path / "repository"), "--repo-id", REPO_ID]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"^torch-cpu +_perceptriton_cpu_\w{12}$", out, re.MULTILINE)
    assert out.endswith(f"To load it: kernels.get_local_kernel(pathlib.Path({str(tmp_path / 'repository')!r}))\n")
    written, expected = files(tmp_path / "repository"), files(exported)
    assert {name: written.get(name) for name in expected if not name.endswith(".pyc")} == written
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["full"], "full' exists and is not empty"),
        (["file"], "file' exists and is not a directory"),
        (["missing/repository"], "missing' is not a directory"),
        (["new", "--repo-id", "perceptriton"], "repo_id must be OWNER/NAME, not 'perceptriton'"),
        (["new", "--repo-id", 'a/b"\nx = 1'], "repo_id must be OWNER/NAME, not .*"),
    ],
    ids=["not-empty", "file", "no-parent", "no-owner", "injection"],
)
def test_the_command_refuses(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = files(tmp_path)
    assert main(["export-hub", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
    assert re.fullmatch(f"perceptriton: error: .*{message}\n", capsys.readouterr().err)
    assert files(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "'.*' could not be written: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["full-disk", "interrupt"],
)
def test_a_write_that_breaks_off_leaves_nothing(error, code, message, tmp_path, monkeypatch, capsys):
    write, calls = hub._write, []

    def write_some(folder, contents):
        calls.append(folder)
        if len(calls) == 3:
            raise error
        write(folder, contents)

    monkeypatch.setattr(hub, "_write", write_some)
    assert main(["export-hub", str(tmp_path / "repository")]) == code
    assert re.fullmatch(f"perceptriton: {message}\n", capsys.readouterr().err)
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays_itself(tmp_path, monkeypatch):
    """As the current one, a mount point, or one that only its owner may read."""
    tmp_path.chmod(0o700)
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    hub.export(".", REPO_ID)
    assert {path.name for path in Path.cwd().iterdir()} >= {"build", "torch-ext", "CARD.md"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (tmp_path.stat().st_ino, tmp_path.stat().st_mode & 0o777) == (inode, 0o700)
