"""Fixtures that make training runs cheap: an eighth of the channels, one thread, no charts."""

import contextlib

import pytest
import run_narrow
import torch

import darknet_model
import utils


@contextlib.contextmanager
def narrowed():
    """Inside this block, Darknet19 and YOLOv2 are built with an eighth of the channels: 64 times fewer weights."""
    layers, threads = darknet_model.DARKNET19_LAYERS[:], torch.get_num_threads()
    darknet_model.DARKNET19_LAYERS[:] = run_narrow.NARROW
    torch.set_num_threads(1)  # layers this small are slower on several threads
    try:
        yield
    finally:
        darknet_model.DARKNET19_LAYERS[:] = layers
        torch.set_num_threads(threads)


@pytest.fixture
def narrow():
    with narrowed():
        yield


@pytest.fixture(scope="module")
def narrow_module():
    """Module-scoped `narrow`, for `pytestmark` and for module fixtures that train a network."""
    with narrowed():
        yield


@pytest.fixture
def no_charts(monkeypatch):
    """Skips the charts: they take a second per epoch, longer than training a narrow network."""
    monkeypatch.setattr(utils, "draw_charts", lambda metrics_file, chart_file: None)


@pytest.fixture(scope="module")
def fork_server():
    """Imports the scripts once for all multi-process tests, in the background while the first tests run."""
    run_narrow.start_fork_server()
