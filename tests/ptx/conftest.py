# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def chip(request):
    """The compute capability of a chip that launches are emulated for."""
    from . import driver

    with driver.activated(request.param):
        yield request.param


@pytest.fixture
def hopper():
    from . import driver

    with driver.activated(90):
        yield


@pytest.fixture
def launched(monkeypatch):
    """The launches of a test, oldest first."""
    from . import driver

    # triton 3.9 warns where nobody says it, that 3.10 will no longer fuse products with sums.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    return driver.launched
