"""Fixtures that make training runs cheap: an eighth of the channels, one thread, no charts."""

import contextlib

import pytest
import run_narrow
import torch

import darknet_model
import utils


@contextlib.contextmanager
def narrowed():
    """Everything inside builds Darknet19 and YOLOv2 with an eighth of the channels: 64 times fewer weights."""
    layers, threads = darknet_model.DARKNET19_LAYERS[:], torch.get_num_threads()
    darknet_model.DARKNET19_LAYERS[:] = run_narrow.NARROW
    torch.set_num_threads(1)  # such small layers are slower on several
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
    """For `pytestmark`, and for fixtures of a module that train."""
    with narrowed():
        yield


@pytest.fixture
def no_charts(monkeypatch):
    """Charts take a second per epoch, longer than all steps of a narrow network."""
    monkeypatch.setattr(utils, "draw_charts", lambda metrics_file, chart_file: None)


@pytest.fixture(scope="module")
def fork_server():
    """Imports the scripts once for all tests with several processes, in the background while the first tests run."""
    run_narrow.start_fork_server()
