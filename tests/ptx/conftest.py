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
def launched():
    """The launches of a test, oldest first."""
    from . import driver

    return driver.launched
