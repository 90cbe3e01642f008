import pytest


@pytest.fixture
def launched(monkeypatch):
    """The launches of a test, oldest first, on fresh memory that knows whether somebody has written it."""
    from . import driver

    # triton 3.9 warns where nobody says it, that 3.10 will no longer fuse products with sums.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    driver.launched.clear()
    undo = driver.mark_fresh()
    yield driver.launched
    undo()
    driver.launched.clear()


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def chip(request, launched):
    """The compute capability of a chip that launches are emulated for."""
    from . import driver

    with driver.activated(request.param):
        yield request.param


@pytest.fixture
def hopper(launched):
    from . import driver

    with driver.activated(90):
        yield
