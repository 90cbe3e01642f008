# SPDX-License-Identifier: Apache-2.0
"""What is compiled of kernels that have changed is run again, and of no others."""

import json

import pytest
from ptx import changes

pytest.importorskip("triton")  # whose version counts


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A copy of the kernels' folder, all of which have passed."""
    for path in changes.GPU.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(changes, "GPU", tmp_path)
    monkeypatch.setattr(changes, "PASSED", tmp_path / "passed.json")
    own = {family: changes.digest(family) for family in changes.FILES}
    changes.PASSED.write_text(json.dumps({changes.version("triton"): own}))
    return tmp_path


def test_nothing_has_passed_at_first(kernels):
    assert changes.changed() == set()
    changes.PASSED.unlink()
    assert changes.changed() == set(changes.FILES)
    changes.PASSED.write_text('{"1.0": {}}')
    assert changes.changed() == set(changes.FILES)


@pytest.mark.parametrize(
    ("name", "families"),
    [("functions", set(changes.FILES)), ("wide_kernels", {"wide"}), ("train_lane", {"training"})],
)
def test_families_that_a_file_is_part_of(kernels, name, families):
    path = kernels / f"{name}.py"
    path.write_text(f"# A comment.\n{path.read_text()}")
    assert changes.changed() == set()
    path.write_text(f"{path.read_text()}\nmore = 1\n")
    assert changes.changed() == families


def test_every_file_of_kernels_belongs_to_a_family():
    # What plans and launchers share has no code that is compiled.
    shared = {"__init__", "aot", "build", "launch"}
    assert {path.stem for path in changes.GPU.glob("*.py")} == shared.union(*changes.FILES.values())


@pytest.mark.parametrize(
    ("test", "families"),
    [
        ("tests/kernels/test_kernels.py::test_paths[rows]", {"layers"}),
        ("tests/kernels/test_mlp_kernels.py::test_row_counts[17]", {"networks"}),
        ("tests/mlp/test_networks.py::test_gradients", {"networks"}),
        ("tests/kernels/test_training_kernels.py::test_trajectories[lane]", {"training"}),
        ("tests/kernels/test_wide.py::test_shapes[ragged]", {"wide"}),
        ("tests/ptx/test_tiles.py::test_layers[sm_90-a]", {"layers"}),
        ("tests/ptx/test_tiles.py::test_wide[half]", {"wide"}),
        ("tests/kernels/test_of_tomorrow.py::test_all", set(changes.FILES)),
    ],
)
def test_families_that_a_test_runs(test, families):
    assert changes.families(test) == families
