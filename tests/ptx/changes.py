# SPDX-License-Identifier: Apache-2.0
"""Which kernels have changed since all that this triton compiles of them passed, on this machine or another.

`python tests/ptx/changes.py` writes down that they have passed as they are: the last step of `make test-compiled-all`.
With `pytest --changed` the tests of kernels that are as they were then are not run.
"""

import ast
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

PASSED = Path(__file__).with_name("passed.json")
GPU = Path(__file__).parents[2] / "kernels" / "gpu"
# By family: the files that its kernels and their launchers are in, and the files or tests that run them.
FILES = {
    "layers": ("functions", "layer_kernels", "layer"),
    "networks": ("functions", "network_functions", "network_kernels", "network"),
    "training": ("functions", "train_rules", "train_lane", "train_block", "train_spread", "train"),
    "wide": ("functions", "wide_kernels", "wide"),
}
TESTS = {
    "layers": ("test_kernels.py", "test_layers", "test_output_tiles"),
    "networks": ("test_mlp_kernels.py", "mlp/", "test_networks"),
    "training": ("test_training_kernels.py", "test_training"),
    "wide": ("test_wide.py", "test_wide"),
}


def digest(family):
    """Of the code alone: comments and line breaks do not count."""
    sources = [ast.dump(ast.parse((GPU / f"{name}.py").read_text())) for name in FILES[family]]
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()[:16]


def passed():
    """By triton's version and family: the digest that passed."""
    return json.loads(PASSED.read_text()) if PASSED.exists() else {}


def changed():
    own = passed().get(version("triton"), {})
    return {family for family in FILES if own.get(family) != digest(family)}


def families(nodeid):
    """Those whose kernels a test runs: all of them if nothing is known of it."""
    path, _, name = nodeid.rpartition("::")
    test = name.partition("[")[0]
    own = "test_tiles.py" in path
    found = {family for family, names in TESTS.items() if (test in names if own else any(n in path for n in names))}
    return found or set(FILES)


if __name__ == "__main__":
    now = passed() | {version("triton"): {family: digest(family) for family in FILES}}
    PASSED.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
