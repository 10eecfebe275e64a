"""Stopped and killed runs resume bit-identically; losses that are not finite and damaged files give clear errors."""

import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import run_narrow
import torch
from conftest import assert_equal, handlers_kept, set_globals, write_coco
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import darknet_model
import darknet_train
import darknet_train_multigpu_distr
import dataset
import train
import utils
from model import ANCHORS

pytestmark = pytest.mark.usefixtures("narrow_module", "fork_server")

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data_samples"
DETECTOR = {
    "DATA_DIR": str(SAMPLE / "voc"), "IMAGE_SETS": [("2007", "tiny")], "VAL_IMAGE_SETS": [], "IMAGE_SIZE": 32,
    "BATCH_SIZE": 4, "REPEAT": 1, "EPOCHS": 2, "EVAL_EVERY": 2, "BURN_IN": 2, "NUM_WORKERS": 0, "PRECISION": "fp32",
    "AUGMENT": True, "OPTIMIZER": "sgd", "LEARNING_RATE": 1e-3,
}  # fmt: skip
IMAGENET = str(SAMPLE / "imagenet")
CLASSIFIER = {"DATA_DIR": IMAGENET, "IMAGE_SIZE": 32, "EPOCHS": 2, "NUM_WORKERS": 0, "PRECISION": "fp32"}
BOTH_SCRIPTS = pytest.mark.parametrize("script", [train, darknet_train], ids=["train", "darknet_train"])


def run(monkeypatch, script, folder, **values):
    """Calls main() of a script, without its charts (a second per epoch) -> the checkpoint that it leaves."""
    monkeypatch.setattr(utils, "draw_charts", lambda rows, chart_file: None)
    own = {"CHECKPOINT": str(folder / "run.pt"), "RESUME": False, "MAX_HOURS": 0.0}
    set_globals(monkeypatch, script, **((DETECTOR if script is train else CLASSIFIER) | own | values))
    with handlers_kept():
        script.main()
    return utils.load_checkpoint(folder / "run.pt")


def signal_in_step(monkeypatch, number, sent=signal.SIGTERM):
    """The process sends itself a signal during this optimiser step of the next run, counted from 1."""
    calls = []

    def warm_batch_norm(model, batches_seen, original=utils.warm_batch_norm):
        calls.append(batches_seen)
        if len(calls) == number:
            os.kill(os.getpid(), sent)
        original(model, batches_seen)

    monkeypatch.setattr(utils, "warm_batch_norm", warm_batch_norm)


def metrics(folder):
    """The CSV of a run without images_per_second, which depends on the machine."""
    rows = [line.split(",") for line in (folder / "run_metrics.csv").read_text().splitlines()]
    clock = rows[0].index("images_per_second")
    return [row[:clock] + row[clock + 1 :] for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, narrow_module):
    """script -> checkpoint and metrics of a run that was never stopped; (script, "best") -> its best checkpoint."""
    results = {}
    for script in (train, darknet_train):
        folder = tmp_path_factory.mktemp(script.__name__)
        with pytest.MonkeyPatch.context() as monkeypatch:
            results[script] = (run(monkeypatch, script, folder), metrics(folder))
            results[script, "best"] = utils.load_checkpoint(folder / "run_best.pt")
    return results


@pytest.mark.parametrize(
    ("script", "stopped_in", "workers"),  # steps 3 (darknet_train) and 4 (train) are the last of their epochs
    [(train, 2, 0), (train, 4, 0), (train, 7, 2), (darknet_train, 2, 0), (darknet_train, 3, 0), (darknet_train, 5, 2)],
)
def test_a_resumed_run_equals_a_whole_one(script, stopped_in, workers, uninterrupted, tmp_path, monkeypatch, capsys):
    whole, rows = uninterrupted[script]
    signal_in_step(monkeypatch, stopped_in)
    stopped = run(monkeypatch, script, tmp_path, NUM_WORKERS=workers)
    assert stopped["step"] == stopped_in < whole["step"]
    assert "stopped by SIGTERM" in capsys.readouterr().out
    assert (tmp_path / "run_metrics.csv").exists() == (stopped["epoch"] > 0)  # a row stands for a whole epoch
    resumed = run(monkeypatch, script, tmp_path, NUM_WORKERS=workers, RESUME=True)
    where = f"resuming {tmp_path / 'run.pt'} after epoch {stopped['epoch']}, step {stopped_in}"
    assert where in capsys.readouterr().out
    for name in ("model", "optimizer", "scaler", "epoch", "step", "images_seen", "best", "sums"):
        assert_equal(whole[name], resumed[name], name)
    assert metrics(tmp_path) == rows


def test_saving_inside_an_epoch_changes_nothing(uninterrupted, tmp_path, monkeypatch):
    saved, save = [], utils.save_checkpoint
    record = lambda file, **state: (saved.append(state["step"]), save(file, **state))  # noqa: E731
    monkeypatch.setattr(utils, "save_checkpoint", record)
    whole, rows = uninterrupted[darknet_train]
    state = run(monkeypatch, darknet_train, tmp_path, SAVE_EVERY_MINUTES=0.0)
    assert_equal(whole["model"], state["model"])
    assert metrics(tmp_path) == rows
    assert set(range(1, whole["step"] + 1)) == set(saved)


@pytest.mark.parametrize("dies_before", ["run_best.pt", "run.pt", "run_metrics.csv"])  # in the order of writing
def test_a_run_that_dies_between_two_files_loses_nothing(dies_before, uninterrupted, tmp_path, monkeypatch):
    whole, rows = uninterrupted[darknet_train]

    def atomic_write(file, original=utils.atomic_write):
        # the first save of an epoch is that before its validation
        if Path(file).name == dies_before and (dies_before != "run.pt" or (tmp_path / "run_best.pt").exists()):
            raise KeyboardInterrupt  # like kill -9: nothing is written after this
        return original(file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, "atomic_write", atomic_write)
        run(patch, darknet_train, tmp_path)
    assert not (tmp_path / "run_metrics.csv").exists()
    resumed = run(monkeypatch, darknet_train, tmp_path, RESUME=True)
    assert_equal(whole["model"], resumed["model"])
    assert metrics(tmp_path) == rows
    best = uninterrupted[darknet_train, "best"]
    assert_equal(best["model"], utils.load_checkpoint(tmp_path / "run_best.pt")["model"])


@BOTH_SCRIPTS
@pytest.mark.parametrize("remains", [b"", b"\xff\xfe\x00broken"], ids=["deleted", "damaged"])
def test_resume_writes_a_lost_csv_again_from_the_checkpoint(script, remains, uninterrupted, tmp_path, monkeypatch):
    whole, rows = uninterrupted[script]
    utils.save_checkpoint(tmp_path / "run.pt", **whole)
    if remains:
        (tmp_path / "run_metrics.csv").write_bytes(remains)
    assert_equal(whole["model"], run(monkeypatch, script, tmp_path, RESUME=True)["model"])  # all epochs are done
    assert metrics(tmp_path) == rows


@pytest.mark.parametrize("signalled", [False, True], ids=["an error", "a signal"])
@BOTH_SCRIPTS
def test_an_interrupted_evaluation_is_repeated(script, signalled, uninterrupted, tmp_path, monkeypatch, capsys):
    whole, rows = uninterrupted[script]
    epoch = 1 if script is train else 0  # train evaluates in epoch 2 only
    name = "evaluate" if script is train else "validate"
    original = getattr(script, name)

    def interrupted(*arguments):
        if not signalled:
            raise RuntimeError("the evaluation failed")
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script, name, interrupted)
        with contextlib.nullcontext() if signalled else pytest.raises(RuntimeError, match="evaluation failed"):
            run(patch, script, tmp_path)
    state = utils.load_checkpoint(tmp_path / "run.pt")
    assert (state["epoch"], state["step"]) == (epoch, whole["step"] // 2 * (epoch + 1))  # no step is lost
    assert ("stopped by SIGTERM" in capsys.readouterr().out) == signalled
    resumed = run(monkeypatch, script, tmp_path, RESUME=True)
    assert_equal(whole["model"], resumed["model"])
    assert metrics(tmp_path) == rows


def test_a_time_limit_saves_and_ends_the_run(tmp_path, monkeypatch, capsys):
    state = run(monkeypatch, train, tmp_path, MAX_HOURS=1e-9)
    assert state["step"] == 1 and state["epoch"] == 0
    assert "stopped by MAX_HOURS in epoch 1 after step 1; RESUME=True" in capsys.readouterr().out


def test_training_checkpoints_have_exactly_the_expected_keys(uninterrupted):
    names = "model optimizer scaler epoch step images_seen best sums metrics settings classes anchors image_size"
    assert set(names.split()) == uninterrupted[train][0].keys()
    assert set(names.split()) - {"anchors"} == uninterrupted[darknet_train][0].keys()
    for script in (train, darknet_train):
        state = uninterrupted[script][0]
        assert state["epoch"] == 2 and [row["epoch"] for row in state["metrics"]] == [1, 2]
        assert not state["sums"].any() and state["best"] >= 0  # saved after the end of its epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_a_function_of_seed_and_step(workers):
    """Two epochs of 8 steps, each of 2 gradient-accumulation steps; the image size changes at step 10."""
    data = dataset.VOCDataset(str(SAMPLE / "voc"), [("2007", "tiny")], ANCHORS, 32, augment=True)
    batches_from = functools.partial(dataset.training_batches, len(data), 4, 2, [32, 64], 1, repeat=2)

    def load(first_step, count, num_workers):
        loader = DataLoader(data, batch_sampler=batches_from(first_step), num_workers=num_workers)
        return list(itertools.islice(loader, count))

    whole = load(0, 24, num_workers=0)
    assert {images.shape for images, _ in whole} == {(2, 3, 32, 32), (2, 3, 64, 64)}
    assert_equal(load(0, 24, workers), whole)
    assert_equal(load(5, 14, workers), whole[10:])  # from the middle of the first epoch
    assert_equal(load(11, 2, workers), whole[22:])  # and of the second


# ---------------------------------------------------------------- changed settings


@pytest.mark.parametrize(
    ("script", "setting", "words"),
    [
        (train, {"IMAGE_SIZE": 64}, ["IMAGE_SIZE was 32 and is 64"]),
        (train, {"CLASSES": (*dataset.VOC_CLASSES, "bolt")}, ["CLASSES was"]),
        (train, {"IMAGE_SETS": [("2007", "train")]}, ["training images", "16 images", "100 images"]),
        (train, {"BATCH_SIZE": 2, "SEED": 7}, ["BATCH_SIZE was 4 and is 2", "SEED was 0 and is 7"]),
        (darknet_train, {"IMAGE_SIZE": 64}, ["IMAGE_SIZE"]),
    ],
)
def test_a_changed_fixed_setting_is_named_on_resume(script, setting, words, uninterrupted, tmp_path, monkeypatch):
    utils.save_checkpoint(tmp_path / "run.pt", **uninterrupted[script][0])
    with pytest.raises(ValueError, match="run.pt") as error:
        run(monkeypatch, script, tmp_path, RESUME=True, **setting)
    assert all(word in str(error.value) for word in words)


def test_resuming_the_classifier_with_other_classes_is_an_error(uninterrupted, tmp_path, monkeypatch):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / split / name / "x.jpg")
    utils.save_checkpoint(tmp_path / "run.pt", **uninterrupted[darknet_train][0])
    with pytest.raises(ValueError, match=r"run.pt.*classes was .*\['a', 'b'\]"):
        run(monkeypatch, darknet_train, tmp_path, RESUME=True, DATA_DIR=str(tmp_path), BATCH_SIZE=6)


def test_learning_rate_and_epochs_may_change_on_resume_and_are_printed(uninterrupted, tmp_path, monkeypatch, capsys):
    utils.save_checkpoint(tmp_path / "run.pt", **uninterrupted[darknet_train][0])
    state = run(monkeypatch, darknet_train, tmp_path, RESUME=True, EPOCHS=3, LEARNING_RATE=1e-5, NUM_WORKERS=1)
    out = capsys.readouterr().out
    assert "EPOCHS 2 -> 3" in out and "LEARNING_RATE 0.01 -> 1e-05" in out and "NUM_WORKERS" not in out
    assert state["epoch"] == 3 and state["settings"]["LEARNING_RATE"] == 1e-5


@BOTH_SCRIPTS
def test_the_best_network_has_no_training_state_to_resume_from(script, uninterrupted, tmp_path, monkeypatch):
    utils.save_checkpoint(tmp_path / "run.pt", **uninterrupted[script, "best"])
    with pytest.raises(ValueError, match=r"run.pt.*\boptimizer, scaler\b"):
        run(monkeypatch, script, tmp_path, RESUME=True)


def test_a_changed_evaluation_setting_resets_the_best_score(uninterrupted, tmp_path, monkeypatch, capsys):
    utils.save_checkpoint(tmp_path / "run.pt", **uninterrupted[train][0] | {"best": 0.99})
    state = run(monkeypatch, train, tmp_path, RESUME=True, EPOCHS=3, EVAL_THRESHOLD=0.1)
    assert "EVAL_THRESHOLD 0.005 -> 0.1" in capsys.readouterr().out
    assert 0 <= state["best"] < 0.99 and (tmp_path / "run_best.pt").exists()


# ---------------------------------------------------------------- losses not finite, images that cannot be read


@BOTH_SCRIPTS
@pytest.mark.parametrize(("minutes", "problem"), [(30.0, "loss .*not finite in epoch 3"), (0.0, "weights are")])
def test_a_diverging_run_keeps_its_checkpoint(script, minutes, problem, uninterrupted, tmp_path, monkeypatch):
    """Within the epoch, or at the first save, which would replace the last good checkpoint."""
    utils.save_checkpoint(tmp_path / "run.pt", **uninterrupted[script][0])
    before = (tmp_path / "run.pt").read_bytes()
    fast = {"LEARNING_RATE": 1e12, "LR_SCHEDULE": "constant", "SAVE_EVERY_MINUTES": minutes}
    with pytest.raises(ValueError, match=f"{problem}.* kept.*LEARNING_RATE") as error:
        run(monkeypatch, script, tmp_path, RESUME=True, EPOCHS=3, **fast)
    if minutes:
        assert len(re.findall(r"/\w+\.(?:jpg|JPEG)", str(error.value))) == script.BATCH_SIZE
    assert (tmp_path / "run.pt").read_bytes() == before


def watch_weights(monkeypatch):
    """-> a function that tells whether the network of the next run still has its initial weights."""
    built = []

    def parameter_groups(model, weight_decay, original=utils.parameter_groups):
        built.append((model, [parameter.detach().clone() for parameter in model.parameters()]))
        return original(model, weight_decay)

    monkeypatch.setattr(utils, "parameter_groups", parameter_groups)

    def unchanged():
        [(model, before)] = built
        return all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))

    return unchanged


def zero_with_an_infinite_slope(outputs):
    """The square root at 0: a loss that is finite, with a gradient that is not."""
    return torch.sqrt(outputs.float().sum() * 0)


def set_infinite_gradients(patch):
    def forward(self, predictions, targets, images_seen):
        return dict.fromkeys(train.LOSS_TERMS, zero_with_an_infinite_slope(predictions))

    patch.setattr(train.YoloLoss, "forward", forward)
    patch.setattr(nn.functional, "cross_entropy", lambda logits, labels, **more: zero_with_an_infinite_slope(logits))


EACH_OPTIMIZER = pytest.mark.parametrize(
    ("script", "setting"),
    [(train, {"OPTIMIZER": "sgd"}), (train, {"OPTIMIZER": "adam"}), (darknet_train, {})],
    ids=["sgd", "adam", "darknet_train"],
)


@EACH_OPTIMIZER
@pytest.mark.parametrize(("precision", "step"), [("fp32", 1), ("fp16", 3)])
def test_a_gradient_that_is_not_finite_stops_before_the_step(script, setting, precision, step, tmp_path, monkeypatch):
    """In fp16, the scale starts at 2 and is halved twice; at the third step it is below 1."""
    unchanged = watch_weights(monkeypatch)
    set_infinite_gradients(monkeypatch)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0))
    problem = f"gradient is not finite in epoch 1, step {step}, images .*no checkpoint"
    with pytest.raises(ValueError, match=problem):
        run(monkeypatch, script, tmp_path, LEARNING_RATE=0.1, PRECISION=precision, **setting)
    assert unchanged() and [file.suffix for file in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("part", [0, 1])
@EACH_OPTIMIZER
def test_a_loss_that_is_not_finite_in_any_part_stops_before_the_step(script, setting, part, tmp_path, monkeypatch):
    kind, count = (dataset.VOCDataset, 16) if script is train else (dataset.ImageNetFolder, 18)
    parts = list(itertools.islice(dataset.training_batches(count, 4, 2, [32], seed=0), 2))
    bad = parts[part][0][0]

    def item(self, key, original=kind.__getitem__):
        image, target = original(self, key)
        return (image * torch.nan if key[0] == bad else image), target

    monkeypatch.setattr(kind, "__getitem__", item)
    unchanged = watch_weights(monkeypatch)
    with pytest.raises(ValueError, match=r"^the loss \(.*\) is not finite in epoch 1, step 1, images") as error:
        run(monkeypatch, script, tmp_path, BATCH_SIZE=4, SUBDIVISIONS=2, LEARNING_RATE=0.1, **setting)
    assert len(re.findall(r"/\w+\.(?:jpg|JPEG)", str(error.value))) == 4
    assert unchanged()


def test_only_the_terms_of_the_loss_that_are_not_finite_are_named():
    values, scaler = torch.tensor([1.0, torch.nan, torch.inf, 1.0]), torch.amp.GradScaler("cpu", enabled=False)
    problem = utils.problem_of_step(("coord", "object", "total"), values, scaler)
    assert "(object, total)" in problem


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    file = tmp_path / "run.pt"
    for number in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="run.pt: .*weights are NaN, infinite or huge"):
            utils.save_checkpoint(file, model={"weight": torch.tensor([1.0, number])})
    assert not list(tmp_path.iterdir())
    utils.save_checkpoint(file, model={"weight": torch.ones(2), "count": torch.tensor(3)})
    before = file.read_bytes()
    with pytest.raises(ValueError, match="run.pt: .* kept"):
        utils.save_checkpoint(file, model={"weight": torch.tensor([1.0, torch.nan])})
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


@BOTH_SCRIPTS
def test_a_broken_image_stops_the_run_or_is_skipped_and_listed(script, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(SAMPLE / "voc" if script is train else IMAGENET, tmp_path / "data")
    image_id = (SAMPLE / "voc/VOC2007/ImageSets/Main/tiny.txt").read_text().split()[3]
    broken = next(folder.rglob(f"{image_id}.jpg" if script is train else "train/*/*.JPEG"))
    broken.write_bytes(broken.read_bytes()[:500])
    values = {"DATA_DIR": str(folder), "EPOCHS": 1}
    for workers in (0, 1):
        with pytest.raises(SystemExit) as stop, utils.plain_errors():
            run(monkeypatch, script, tmp_path, NUM_WORKERS=workers, **values)
        assert re.fullmatch(rf"error: .*{broken.name}.*", stop.value.code)  # one line
    state = run(monkeypatch, script, tmp_path, **values, BROKEN_IMAGES="skip", NUM_WORKERS=2)
    assert state["images_seen"] == (16 if script is train else 18)  # another image took its place
    assert "run_broken.txt" in capsys.readouterr().out
    listed = (tmp_path / "run_broken.txt").read_text()
    assert listed.count(broken.name) == 1 and len(listed.splitlines()) == 1
    with pytest.raises(ValueError, match="BROKEN_IMAGES"):
        run(monkeypatch, script, tmp_path, BROKEN_IMAGES="ignore")


def test_broken_images_are_listed_once_and_a_folder_of_them_is_an_error(tmp_path):
    name = b"br\xfcken.png" if sys.platform == "linux" else b"broken.png"  # not UTF-8
    broken, good = os.fsdecode(os.fsencode(tmp_path) + b"/" + name), tmp_path / "good.png"
    Path(broken).write_bytes(b"no image")
    Image.new("RGB", (40, 30)).save(good)
    for _ in range(2):
        _, index = dataset.read_or_next([(broken, ""), (str(good), "")], 0, str(tmp_path / "broken.txt"))
        assert index == 1
    files = [(broken, ""), *((str(tmp_path / f"{number}.jpg"), "") for number in range(2))]
    with pytest.raises(ValueError, match="none of the 3 images"):
        dataset.read_or_next(files, 1, str(tmp_path / "broken.txt"))
    listed = (tmp_path / "broken.txt").read_bytes()
    assert listed.count(name + b": ") == 1 and len(listed.splitlines()) == 3


# ---------------------------------------------------------------- signals and kills, in separate processes


@pytest.fixture
def start():
    """start(folder, *words) starts Python in that folder, in a new session, and kills it at the end."""
    started = []

    def start(folder, *words):
        folder.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1", "STARTED_IN": str(folder)},
        )  # fmt: skip
        started.append((process, folder))
        return process

    yield start
    for process, folder in started:
        for number in processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.communicate()


def wait_for(file, process):
    """Waits until a process has written a file."""
    end = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{file} was not written"
        time.sleep(0.05)


def processes_of(folder):
    """The ids of all live processes that `start` has started in this folder, and of the processes started by them."""
    mark, found = f"STARTED_IN={folder}\0".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_alive = (process / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            if is_alive and mark in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


LAUNCHER = str(ROOT / "tests" / "run_narrow.py")
LONG = [
    f"DATA_DIR={SAMPLE}/imagenet", "IMAGE_SIZE=32", "EPOCHS=100000", "NUM_WORKERS=2", "PRECISION=fp32",
    "CHECKPOINT=run.pt", "SAVE_EVERY_MINUTES=0",
]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigint_sigterm_and_an_error_leave_no_process_running(tmp_path, start):
    words = {"SIGINT": [], "SIGTERM": [], "error": ["LEARNING_RATE=1e12"]}
    processes = {name: start(tmp_path / name, LAUNCHER, "darknet_train.py", *LONG, *words[name]) for name in words}
    for name in ("SIGINT", "SIGTERM"):
        folder, process = tmp_path / name, processes[name]
        wait_for(folder / "run.pt", process)
        assert len(processes_of(folder)) >= 3  # with two workers
        os.killpg(process.pid, getattr(signal, name))  # all of them, as a terminal or a queue does
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert f"stopped by {name}" in out and "Traceback" not in err
        assert processes_of(folder) == []
        assert utils.load_checkpoint(folder / "run.pt")["step"] >= 1
        assert not list(folder.glob("*.tmp*"))
    _, err = processes["error"].communicate(timeout=120)
    assert processes["error"].returncode == 1 and "error: " in err and "LEARNING_RATE" in err and "Traceback" not in err
    assert processes_of(tmp_path / "error") == []


def test_loader_workers_ignore_sigint_and_sigterm():
    data = iter(DataLoader(range(8), num_workers=2, worker_init_fn=utils.ignore_signals))
    items = [int(next(data)) for _ in range(2)]  # one from each worker: both have started
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
    assert items + [int(item) for item in data] == list(range(8))


def ignore_signals_late(worker):
    time.sleep(0.5)
    utils.ignore_signals(worker)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="only fork blocks signals that early")
def test_a_signal_does_not_end_a_worker_that_is_just_starting():
    with handlers_kept():
        stop = utils.catch_stop_signals()
        data = iter(DataLoader(range(8), num_workers=2, worker_init_fn=ignore_signals_late))
        time.sleep(0.2)  # PyTorch has installed its own handlers
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGTERM)
        assert [int(item) for item in data] == list(range(8)) and not stop.reason


def test_a_second_sigint_raises(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with handlers_kept():
        stop = utils.catch_stop_signals()
        assert not utils.should_stop(stop)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        now += 0.9
        os.kill(os.getpid(), signal.SIGINT)  # within a second: the same one, forwarded by torchrun
        assert stop.reason == "SIGTERM" and utils.should_stop(stop)  # the first one
        now += 0.2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    """20 processes save in a tight loop and are killed at random moments, every second one in the middle of a save."""
    file, rng = tmp_path / "run.pt", random.Random(0)
    state = {"model": {"weight": torch.arange(500_000.0)}, "classes": [f"class {number}" for number in range(500)]}
    utils.save_checkpoint(file, number=-1, **state)
    unfinished = 0
    for number in range(20):
        before = file.stat().st_mtime_ns
        child = os.fork()
        if child == 0:
            while True:
                utils.save_checkpoint(file, number=number, **state)
        end = time.monotonic() + 60
        while file.stat().st_mtime_ns == before:
            assert time.monotonic() < end
            time.sleep(0.001)
        while True:
            time.sleep(rng.uniform(0, 0.01))
            os.kill(child, signal.SIGSTOP)
            os.waitpid(child, os.WUNTRACED)
            leftovers = [entry for entry in tmp_path.iterdir() if entry != file]
            if leftovers or number % 2 == 0:
                break
            os.kill(child, signal.SIGCONT)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += len(leftovers)
        assert leftovers in ([], [tmp_path / "run.pt.tmp"])  # each save replaces what an earlier one left behind
        loaded = utils.load_checkpoint(file)
        assert loaded["number"] == number and torch.equal(loaded["model"]["weight"], state["model"]["weight"])
    assert unfinished >= 10
    utils.save_checkpoint(file, **state)
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_gives_a_clear_error_and_keeps_the_old_checkpoint(tmp_path):
    """A file-size limit of 100 kB (RLIMIT_FSIZE) stands in for a full disk."""
    file = tmp_path / "run.pt"
    utils.save_checkpoint(file, number=1)
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"run.pt: could not be written"):
            utils.save_checkpoint(file, weight=torch.zeros(1_000_000))
        with pytest.raises(OSError, match=r"a.weights: could not be written"):
            darknet_model.save_darknet_weights(darknet_model.Darknet19(2), tmp_path / "a.weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.pt"] and file.read_bytes() == before


# ---------------------------------------------------------------- DistributedDataParallel

DISTRIBUTED = CLASSIFIER | {"LR_SCHEDULE": "constant", "MAX_HOURS": 0.0, "RESUME": False}
DISTRIBUTED |= {"SUBDIVISIONS": 1, "BATCH_SIZE": 6}


def run_rank(rank, folder, name, stop_rank_1_in, values):
    """One of two processes: main() of the DDP script; what it prints, or its error, goes into a file."""
    run_narrow.narrow()
    script = darknet_train_multigpu_distr
    vars(script).update(DISTRIBUTED | {"CHECKPOINT": f"{folder}/run.pt"} | values)
    if rank == 1 and stop_rank_1_in:
        signal_in_step(pytest.MonkeyPatch(), stop_rank_1_in)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{name}_group", rank=rank, world_size=2)
    with open(f"{folder}/{name}_{rank}.txt", "w") as out, contextlib.redirect_stdout(out):
        try:
            script.main()
        except ValueError as error:
            out.write(str(error))
    torch.distributed.destroy_process_group()


def run_two(folder, name, stop_rank_1_in=0, **values):
    """The DDP script in two processes -> what each of them printed."""
    folder.mkdir(exist_ok=True)
    run_narrow.run_processes(run_rank, 2, str(folder), name, stop_rank_1_in, values)
    return [(folder / f"{name}_{rank}.txt").read_text() for rank in range(2)]


@pytest.fixture(scope="module")
def two_uninterrupted(tmp_path_factory):
    """Checkpoint, metrics and output of a run of two processes that was never stopped."""
    folder = tmp_path_factory.mktemp("two")
    printed = run_two(folder, "whole")
    return utils.load_checkpoint(folder / "run.pt"), metrics(folder), printed


@pytest.mark.parametrize(
    ("how", "reason", "step"),
    # rank 0 prints why it stopped
    [({"MAX_HOURS": 1e-9}, "MAX_HOURS", 1), ({"stop_rank_1_in": 2}, "a request to another process", 2)],
    ids=["time limit", "a signal to one of them"],
)
def test_two_processes_stop_at_the_same_step_and_resume_bit_identically(how, reason, step, two_uninterrupted, tmp_path):
    whole, rows, printed = two_uninterrupted
    assert printed[0].count("epoch 1  learning_rate") == 1 and printed[1] == ""  # the first process alone prints
    assert f"stopped by {reason} in epoch 1 after step {step}" in run_two(tmp_path, "stopped", **how)[0]
    state = utils.load_checkpoint(tmp_path / "run.pt")
    assert (state["epoch"], state["step"]) == (0, step)
    assert state["images_seen"] == int(state["sums"][2]) == 6 * step  # the images of both
    assert f"resuming {tmp_path}/run.pt after epoch 0, step {step}" in run_two(tmp_path, "resumed", RESUME=True)[0]
    resumed = utils.load_checkpoint(tmp_path / "run.pt")
    for name in ("model", "optimizer", "scaler", "epoch", "step", "images_seen", "best", "sums"):
        assert_equal(whole[name], resumed[name], name)
    assert whole["images_seen"] == 36  # 18 per epoch, in 3 batches of 6
    assert metrics(tmp_path) == rows


def test_two_processes_validate_the_network_that_the_first_one_saves(two_uninterrupted):
    """Each process's batch norm sees different images: the statistics differ until those of rank 0 are broadcast."""
    state, rows, _ = two_uninterrupted
    model = darknet_model.Darknet19(5)
    model.load_state_dict(state["model"])
    val_set = dataset.imagenet_dataset(SAMPLE / "imagenet", "val", 32, augment=False)
    stop = types.SimpleNamespace(reason="", deadline=float("inf"))
    sums = darknet_train.validate(model, DataLoader(val_set, 3), torch.device("cpu"), torch.float32, stop)
    last = dict(zip(rows[0], rows[-1], strict=True))
    assert float(last["val_loss"]) == pytest.approx(float(sums[0] / sums[3]), rel=1e-4)
    assert float(last["val_top1"]) == pytest.approx(float(sums[1] / sums[3]), rel=1e-4)


def run_elastic_rank(folder):
    """One of two processes of torchrun's agent: main() of the DDP script; rank 1 is killed in the first two starts."""
    run_narrow.narrow()
    script, rank, restarts = darknet_train_multigpu_distr, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    vars(script).update(DISTRIBUTED | {"CHECKPOINT": f"{folder}/run.pt", "EPOCHS": 8})
    if rank == "1" and int(restarts) < 2:
        signal_in_step(pytest.MonkeyPatch(), 5, signal.SIGKILL)
    with open(f"{folder}/start_{restarts}_rank_{rank}.txt", "w") as out, contextlib.redirect_stdout(out):
        script.main()
    torch.distributed.destroy_process_group()


def test_a_killed_process_is_restarted_and_the_run_completes(tmp_path):
    """As with `torchrun --max-restarts=2`: rank 1 is killed in step 5 of the first two starts; an epoch has 3 steps."""
    (tmp_path / "run.pt").write_bytes(b"an older run's")
    with handlers_kept():
        run_narrow.run_elastic(run_elastic_rank, 2, 2, str(tmp_path))
    printed = [(tmp_path / f"start_{number}_rank_0.txt").read_text() for number in range(3)]
    assert "resuming" not in printed[0] and "epoch 1  learning_rate" in printed[0]
    for number in (1, 2):
        assert f"resuming {tmp_path}/run.pt after epoch {number}, step {3 * number}" in printed[number], printed
    assert utils.load_checkpoint(tmp_path / "run.pt")["epoch"] == 8
    assert (tmp_path / "run.pt.old1").read_bytes() == b"an older run's"  # a restart renames nothing
    assert [row[0] for row in metrics(tmp_path)[1:]] == [str(epoch) for epoch in range(1, 9)]


def test_a_restart_does_not_resume_from_another_runs_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    run(monkeypatch, darknet_train_multigpu_distr, tmp_path, EPOCHS=1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    for launcher, resumes in (("first", True), ("second", False)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launcher)
        run(monkeypatch, darknet_train_multigpu_distr, tmp_path)
        out = capsys.readouterr().out
        assert ("resuming" in out) == resumes and ("epoch 1  " in out) == (not resumes) and "epoch 2  " in out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_and_a_loss_that_is_not_finite_end_all_processes_of_torchrun(tmp_path, start):
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*torchrun, LAUNCHER, "darknet_train_multigpu_distr.py", *LONG]
    stopped = start(tmp_path / "stopped", *command)
    # the decay multiplies all weights by 1e24 in the first step; it is not saved
    fast = ["LEARNING_RATE=1e12", "WEIGHT_DECAY=1e12", "SAVE_EVERY_MINUTES=30", "BATCH_SIZE=8", "SUBDIVISIONS=2"]
    diverging = start(tmp_path / "diverging", *command, *fast)
    wait_for(tmp_path / "stopped" / "run.pt", stopped)
    assert len(processes_of(tmp_path / "stopped")) >= 7  # torchrun, and two ranks with two workers each
    os.killpg(stopped.pid, signal.SIGINT)
    out, err = stopped.communicate(timeout=120)
    assert "stopped by SIGINT" in out, err[-3000:]
    assert utils.load_checkpoint(tmp_path / "stopped" / "run.pt")["step"] >= 1
    _, err = diverging.communicate(timeout=120)
    # neither rank waits for the other
    assert diverging.returncode == 1 and err.count("is not finite in epoch") == 2, err[-3000:]
    assert processes_of(tmp_path / "stopped") == processes_of(tmp_path / "diverging") == []


class EightImages(torch.utils.data.TensorDataset):
    """In place of the ImageNet data set: with a batch of 8, every step sees all of its images."""

    def __init__(self):
        super().__init__(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4)
        self.samples, self.classes = [(f"{number}.jpg", 0) for number in range(8)], list("abcd")

    def __getitem__(self, key):
        return super().__getitem__(key[0] if isinstance(key, tuple) else key)


def small_classifier(num_classes):
    """Darknet-19's first layers without batch norm, whose statistics would differ between processes."""
    torch.manual_seed(0)
    features = darknet_model.darknet19_features()[:7]
    channels = features[6][0].out_channels
    model = nn.Sequential(*features, nn.Conv2d(channels, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for block in model:
        if isinstance(block, nn.Sequential):
            block[1] = nn.Identity()
    return model


def record_gradients(rank, folder, subdivisions):
    """One of two processes: main() of the DDP script; the gradients that it hands to the optimiser go into a file."""
    run_narrow.narrow()
    script, gradients = darknet_train_multigpu_distr, []
    script.imagenet_dataset = lambda *arguments, **options: EightImages()
    script.DistributedDataParallel = functools.partial(DistributedDataParallel, bucket_cap_mb=0.01)  # several buckets
    darknet_model.Darknet19 = small_classifier
    torch.optim.SGD.step = lambda self: gradients.append(
        [parameter.grad.clone() for group in self.param_groups for parameter in group["params"]]
    )
    values = {"EPOCHS": 2, "BATCH_SIZE": 8, "SUBDIVISIONS": subdivisions, "CHECKPOINT": f"{folder}/{subdivisions}.pt"}
    vars(script).update(DISTRIBUTED | values)
    group_file = f"file://{folder}/{subdivisions}_group"
    torch.distributed.init_process_group("gloo", init_method=group_file, rank=rank, world_size=2)
    script.main()
    torch.save(gradients, f"{folder}/{subdivisions}_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("subdivisions", [1, 2])
def test_gradients_of_two_processes_equal_those_of_the_whole_batch(subdivisions, tmp_path):
    run_narrow.run_processes(record_gradients, 2, str(tmp_path), subdivisions)
    model, (images, labels) = small_classifier(4), EightImages().tensors
    nn.functional.cross_entropy(model(images), labels).backward()
    expected = [parameter.grad for group in utils.parameter_groups(model, 0.0) for parameter in group["params"]]
    for rank in range(2):
        steps = torch.load(tmp_path / f"{subdivisions}_{rank}.pt")
        assert len(steps) == 2  # two, because DDP rebuilds its gradient buckets after the first
        for gradients in steps:
            for gradient, whole in zip(gradients, expected, strict=True):
                assert torch.allclose(whole, gradient, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- damaged files


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Flips, removes, duplicates, inserts or overwrites some bytes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        low, high = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        some = data[low : min(high, low + 50)]
        odd = rng.choice([b"nan", b"-1", b"1e400", b"\0\0", b"<", b"&x;", b"\xff\xfe", b"9" * 30, b"\n"])
        changes = [(low, low + 1, rng.randbytes(1)), (low, low + len(some), b""), (low, low, some), (low, low, odd)]
        changes += [(low, len(data), b""), (low, low + 8, rng.randbytes(8))]
        start, end, new = rng.choice(changes)
        data[start:end] = new
    return bytes(data)


def readers(folder):
    """kind -> (a good file's content, name, reader)."""
    voc = SAMPLE / "voc" / "VOC2007"
    image_id = (voc / "ImageSets/Main/one.txt").read_text().split()[0]
    small = io.BytesIO()
    Image.open(voc / "JPEGImages" / f"{image_id}.jpg").resize((64, 48)).save(small, "JPEG")
    checkpoint, weights = folder / "good.pt", folder / "good.weights"
    utils.save_checkpoint(checkpoint, model={"w": torch.ones(9)}, classes=["a"], anchors=ANCHORS, image_size=32)
    network = darknet_model.convolution(3, 4, 3)
    darknet_model.save_darknet_weights(network, weights)
    (folder / "a.txt").write_text("3 0.5 0.5 0.2 0.3\n")
    for kind in ("xml", "txt"):
        (folder / f"{kind}.csv").write_text(f"a.jpg,x.{kind}\n")
    coco = write_coco(folder, [(1, "a.jpg")], [(1, 5, [1.5, 2, 30, 40])], {5: "cat"}, size=(64, 48)).read_bytes()

    def read_list(name):
        return lambda file: dataset.VOCDataset(folder, [name], ANCHORS, 32)

    keys = ("model", "classes", "anchors", "image_size")
    return {
        "xml": ((voc / "Annotations" / f"{image_id}.xml").read_bytes(), "x.xml", read_list("xml.csv")),
        "txt": (b"3 0.5 0.5 0.2 0.3\n0 .25 .25 .1 .1\n19 0.9 0.9 0.2 0.1\n", "x.txt", read_list("txt.csv")),
        "csv": (b"image,label\na.jpg,a.txt\na.jpg,a.txt\n", "x.csv", read_list("x.csv")),
        "json": (coco, "x.json", read_list("x.json")),
        "jpeg": (small.getvalue(), "x.jpg", dataset.read_image),
        "checkpoint": (checkpoint.read_bytes(), "x.pt", lambda file: utils.load_checkpoint(file, keys=keys)),
        "weights": (weights.read_bytes(), "x.weights", lambda file: darknet_model.load_darknet_weights(network, file)),
    }


@pytest.mark.parametrize("kind", ["xml", "txt", "csv", "json", "jpeg", "checkpoint", "weights"])
def test_damaged_files_are_read_or_named(kind, tmp_path, capsys):
    content, name, read = readers(tmp_path)[kind]
    read_files, files, rng = [], {entry.name for entry in tmp_path.iterdir()}, random.Random(7)
    for number in range(20):
        (tmp_path / name).write_bytes(mutate(content, rng))
        try:
            read(str(tmp_path / name))
            read_files.append(number)
        except (OSError, ValueError) as error:
            assert str(tmp_path) in str(error) and len(str(error).splitlines()) == 1, (number, error)
    assert len(read_files) < 15, read_files
    assert {entry.name for entry in tmp_path.iterdir()} == files | {name}  # nothing else was written
    (tmp_path / name).write_bytes(content)
    read(str(tmp_path / name))
