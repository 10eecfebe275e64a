"""Runs a script with an eighth of Darknet-19's channels and without charts, for tests that need separate processes.

    python tests/run_narrow.py darknet_train.py EPOCHS=2 ...            also under torchrun

Steps take milliseconds instead of seconds, and checkpoints are 64 times smaller.
"""

import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import darknet_model  # noqa: E402
import utils  # noqa: E402

NARROW = [layer if layer == "pool" else (layer[0] // 8, layer[1]) for layer in darknet_model.DARKNET19_LAYERS]
TIMEOUT = 240  # seconds until a hanging test is stopped


def narrow() -> None:
    """Makes every Darknet19 and YOLOv2 built from now on in this process narrow; skips charts, which
    take a second per epoch."""
    darknet_model.DARKNET19_LAYERS[:] = NARROW  # in place: model.py has imported the list
    utils.draw_charts = lambda rows, chart_file: None
    torch.set_num_threads(1)  # layers this small are slower on several threads


# ---------------------------------------------------------------- several processes
# They are forked from a server that has imported the scripts and has computed nothing: importing takes 5 s per process,
# and a fork of pytest itself could inherit a lock that some thread holds.


def start_fork_server() -> None:
    """Starts the server, which then imports in the background; does nothing if it is running already."""
    multiprocessing.set_forkserver_preload(["darknet_train_multigpu_distr", "train", "pytest"])
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        multiprocessing.forkserver.ensure_running()


def run_processes(function, count: int, *arguments) -> None:
    """Calls function(rank, *arguments) in `count` processes and raises the error of the first that fails."""
    start_fork_server()
    context = torch.multiprocessing.start_processes(function, arguments, count, join=False, start_method="forkserver")
    end = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"{function.__name__} has not finished in {count} processes")
    finally:
        for process in context.processes:
            process.kill()


def run_elastic(function, count: int, restarts: int, *arguments) -> None:
    """Calls function(*arguments) in `count` processes, as `torchrun --standalone --max-restarts` does with a script."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def give_up(number, frame):
        raise TimeoutError(f"{function.__name__} has not finished in {count} processes")

    start_fork_server()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(TIMEOUT)
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test"}
    config = LaunchConfig(1, 1, count, **rendezvous, max_restarts=restarts, start_method="forkserver")
    try:
        elastic_launch(config, function)(*arguments)
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    narrow()
    sys.argv = [str(ROOT / sys.argv[1]), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
