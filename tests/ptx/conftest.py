import pytest


@pytest.fixture
def launched():
    """The launches of a test, oldest first, on fresh memory that knows whether somebody has written it."""
    from . import driver

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
