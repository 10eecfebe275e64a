"""Runs that are stopped, killed or fed broken files: they go on bit for bit, lose nothing, and say what was wrong."""

import contextlib
import io
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import darknet_model
import darknet_train
import darknet_train_multigpu_distr
import dataset
import loss
import train
import utils
from model import ANCHORS

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data_samples"
DETECTOR = {
    "DATA_DIR": str(SAMPLE / "voc"), "IMAGE_SETS": [("2007", "tiny")], "VAL_IMAGE_SETS": [], "IMAGE_SIZE": 32, "BATCH_SIZE": 4,
    "REPEAT": 1, "EPOCHS": 2, "EVAL_EVERY": 2, "BURN_IN": 2, "NUM_WORKERS": 0, "PRECISION": "fp32", "AUGMENT": True,
    "OPTIMIZER": "sgd", "LEARNING_RATE": 1e-3,
}  # fmt: skip
CLASSIFIER = {"DATA_DIR": str(SAMPLE / "imagenet"), "IMAGE_SIZE": 32, "EPOCHS": 2, "NUM_WORKERS": 0, "PRECISION": "fp32"}


def run(monkeypatch, script, folder, **values):
    """One run of a script by its main() -> the checkpoint it left."""
    defaults = DETECTOR if script is train else CLASSIFIER
    for name, value in (defaults | {"CHECKPOINT": str(folder / "run.pt"), "RESUME": False, "MAX_HOURS": 0.0} | values).items():
        monkeypatch.setattr(script, name, value)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        script.main()
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    return utils.load_checkpoint(folder / "run.pt")


def stop_in_step(monkeypatch, number):
    """SIGTERM reaches the process while it works on the batch of this number."""
    calls = []

    def warm_batch_norm(model, batches_seen, original=darknet_model.warm_batch_norm):
        calls.append(batches_seen)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        original(model, batches_seen)

    monkeypatch.setattr(darknet_model, "warm_batch_norm", warm_batch_norm)


def assert_equal(one, other, path=""):
    """Equal to the last bit, all the way down."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{path}/{place}")
    else:
        assert one == other, path


def metrics(folder):
    """The CSV of a run without the column that is a time."""
    rows = [line.split(",") for line in (folder / "run_metrics.csv").read_text().splitlines()]
    clock = rows[0].index("images_per_second")
    return [row[:clock] + row[clock + 1 :] for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """script -> checkpoint and metrics of a whole run."""
    results = {}
    for script in (train, darknet_train):
        folder = tmp_path_factory.mktemp(script.__name__)
        with pytest.MonkeyPatch.context() as monkeypatch:
            results[script] = (run(monkeypatch, script, folder), metrics(folder))
    return results


@pytest.mark.parametrize(
    ("script", "stopped_in", "workers"),  # steps 3 (darknet_train) and 4 (train) are the last of their epochs
    [(train, 2, 0), (train, 4, 0), (train, 7, 2), (darknet_train, 2, 0), (darknet_train, 3, 0), (darknet_train, 5, 2)],
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(script, stopped_in, workers, uninterrupted, tmp_path, monkeypatch, capsys):
    whole, rows = uninterrupted[script]
    stop_in_step(monkeypatch, stopped_in)
    stopped = run(monkeypatch, script, tmp_path, NUM_WORKERS=workers)
    assert stopped["step"] == stopped_in < whole["step"]
    assert "stopped by SIGTERM" in capsys.readouterr().out
    resumed = run(monkeypatch, script, tmp_path, NUM_WORKERS=workers, RESUME=True)
    for name in ("model", "optimizer", "scaler", "scheduler", "epoch", "step", "images_seen", "best", "sums"):
        assert_equal(whole[name], resumed[name], name)
    assert metrics(tmp_path) == rows


def test_saving_inside_an_epoch_changes_nothing(uninterrupted, tmp_path, monkeypatch):
    saved = []
    save = utils.save_checkpoint
    monkeypatch.setattr(utils, "save_checkpoint", lambda file, **state: (saved.append(state.get("step")), save(file, **state)))
    whole, rows = uninterrupted[darknet_train]
    state = run(monkeypatch, darknet_train, tmp_path, SAVE_EVERY_MINUTES=0.0)
    assert_equal(whole["model"], state["model"])
    assert metrics(tmp_path) == rows
    assert set(range(1, whole["step"] + 1)) == {step for step in saved if step}


def test_a_time_limit_saves_and_ends_the_run(tmp_path, monkeypatch, capsys):
    state = run(monkeypatch, train, tmp_path, MAX_HOURS=1e-9)
    assert state["step"] == 1 and state["epoch"] == 0
    assert "stopped by MAX_HOURS in epoch 1 after step 1; RESUME=True" in capsys.readouterr().out
    assert not (tmp_path / "run_metrics.csv").exists()  # a row stands for a whole epoch


def test_a_time_limit_that_falls_into_a_validation_ends_it(uninterrupted, tmp_path, monkeypatch, capsys):
    whole, rows = uninterrupted[train]
    clock = time.monotonic

    def detect_dataset(*arguments, original=utils.detect_dataset, **options):
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 7200)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "detect_dataset", detect_dataset)
        state = run(monkeypatch, train, tmp_path, MAX_HOURS=1.0)
    assert state["step"] == whole["step"] and state["epoch"] == 1
    assert "stopped by MAX_HOURS in epoch 2 after step 8" in capsys.readouterr().out
    monkeypatch.setattr(time, "monotonic", clock)
    resumed = run(monkeypatch, train, tmp_path, RESUME=True)
    assert_equal(whole["model"], resumed["model"])
    assert metrics(tmp_path) == rows


def test_a_checkpoint_holds_what_the_contract_names(uninterrupted):
    names = "model optimizer scheduler scaler epoch step images_seen best rng settings classes anchors image_size"
    assert set(names.split()) <= uninterrupted[train][0].keys()
    assert {"python", "numpy", "torch", "cuda"} == uninterrupted[train][0]["rng"].keys()


def test_random_states_come_back():
    utils.set_seed(5)
    states = utils.random_states()
    draws = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    utils.restore_random_states(states)
    assert draws == (random.random(), np.random.rand(), torch.rand(1))  # noqa: NPY002


# ---------------------------------------------------------------- changed settings


@pytest.mark.parametrize(
    ("script", "setting", "words"),
    [
        (train, {"IMAGE_SIZE": 64}, ["IMAGE_SIZE was 32 and is 64"]),
        (train, {"CLASSES": (*dataset.VOC_CLASSES, "bolt")}, ["CLASSES was"]),
        (train, {"IMAGE_SETS": [("2007", "one")]}, ["training images", "16 images", "1 images"]),
        (train, {"BATCH_SIZE": 2, "SEED": 7}, ["BATCH_SIZE was 4 and is 2", "SEED was 0 and is 7"]),
        (darknet_train, {"IMAGE_SIZE": 64}, ["IMAGE_SIZE"]),
    ],
)
def test_a_change_that_cannot_be_the_same_run_is_refused_by_name(script, setting, words, uninterrupted, tmp_path, monkeypatch):
    utils.save_checkpoint(tmp_path / "run.pt", **uninterrupted[script][0])
    with pytest.raises(ValueError, match="run.pt") as error:
        run(monkeypatch, script, tmp_path, RESUME=True, **setting)
    assert all(word in str(error.value) for word in words)


def test_another_number_of_classes_is_refused_for_the_classifier(uninterrupted, tmp_path, monkeypatch):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / split / name / "x.jpg")
    utils.save_checkpoint(tmp_path / "run.pt", **uninterrupted[darknet_train][0])
    with pytest.raises(ValueError, match=r"run.pt.*classes was .*\['a', 'b'\]"):
        run(monkeypatch, darknet_train, tmp_path, RESUME=True, DATA_DIR=str(tmp_path), BATCH_SIZE=6)


def test_rate_and_epochs_may_change_and_the_log_says_so(uninterrupted, tmp_path, monkeypatch, capsys):
    utils.save_checkpoint(tmp_path / "run.pt", **uninterrupted[darknet_train][0])
    state = run(monkeypatch, darknet_train, tmp_path, RESUME=True, EPOCHS=3, LEARNING_RATE=1e-5, NUM_WORKERS=1)
    out = capsys.readouterr().out
    assert "EPOCHS 2 -> 3" in out and "LEARNING_RATE 0.01 -> 1e-05" in out and "NUM_WORKERS" not in out
    assert state["epoch"] == 3 and state["settings"]["LEARNING_RATE"] == 1e-5


def test_an_older_checkpoint_is_refused_by_what_it_lacks(tmp_path, monkeypatch):
    utils.save_checkpoint(tmp_path / "run.pt", model={}, epoch=3)
    with pytest.raises(ValueError, match=r"run.pt.*it has no optimizer, scaler, step"):
        run(monkeypatch, train, tmp_path, RESUME=True)


def test_the_best_value_is_forgotten_where_it_was_measured_in_another_way(uninterrupted, tmp_path, monkeypatch, capsys):
    utils.save_checkpoint(tmp_path / "run.pt", **uninterrupted[train][0] | {"best": 0.99})
    state = run(monkeypatch, train, tmp_path, RESUME=True, EPOCHS=3, EVAL_THRESHOLD=0.1)
    assert "EVAL_THRESHOLD 0.4 -> 0.1" in capsys.readouterr().out
    assert 0 <= state["best"] < 0.99 and (tmp_path / "run_best.pt").exists()


# ---------------------------------------------------------------- losses that are not finite, images that cannot be read


@pytest.mark.parametrize("script", [train, darknet_train], ids=["train", "darknet_train"])
def test_a_loss_that_is_not_finite_names_its_images_and_keeps_the_checkpoint(script, uninterrupted, tmp_path, monkeypatch):
    utils.save_checkpoint(tmp_path / "run.pt", **uninterrupted[script][0])
    before = (tmp_path / "run.pt").read_bytes()
    monkeypatch.setattr(torch, "isfinite", lambda tensor, original=torch.isfinite: original(tensor) & False)
    with pytest.raises(ValueError, match=r"not finite in epoch 3, step \d+, images .*\.(jpg|JPEG).*checkpoint is intact") as error:
        run(monkeypatch, script, tmp_path, RESUME=True, EPOCHS=3)
    assert str(error.value).lower().count(".jp") == getattr(script, "BATCH_SIZE")  # noqa: B009
    assert (tmp_path / "run.pt").read_bytes() == before


def test_a_gradient_that_is_not_finite_counts_like_a_loss():
    """The loss is 0, its gradient is not: the slope of a square root at 0."""
    model = train.yolov2.YOLOv2(num_classes=2)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def loss_function(predictions, targets, images_seen):
        zero = torch.sqrt(predictions.sum() * 0)
        return dict.fromkeys(train.LOSS_TERMS, zero)

    optimizer = torch.optim.SGD(darknet_model.parameter_groups(model, 5e-4), 0.1, fused=True)
    batch, cpu = (torch.rand(2, 3, 32, 32), torch.zeros(2, 5, 1, 1, 6)), torch.device("cpu")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(FloatingPointError) as error:
        train.train_one_epoch(
            model, [batch], loss_function, optimizer, scaler, [0.1], 1, 0.0, cpu, torch.float32, 0, torch.zeros(6), lambda: False
        )
    assert error.value.args == (0, "its gradient")
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_of_a_loss_that_is_not_finite_leaves_the_weights_alone(optimizer):
    model = train.yolov2.YOLOv2(num_classes=2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    groups = darknet_model.parameter_groups(model, 5e-4)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    images = torch.full((2, 3, 32, 32), torch.nan)
    scaler, cpu = torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu")
    with pytest.raises(FloatingPointError) as error:
        train.train_one_epoch(
            model, [(images, torch.zeros(2, 5, 1, 1, 6))], loss.YoloLoss(ANCHORS), kind(groups, 0.1, fused=True), scaler, [0.1], 1,
            0.0, cpu, torch.float32, 0, torch.zeros(6), lambda: False,
        )  # fmt: skip
    assert error.value.args == (0, "no_object, prior, total")
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def break_one_image(folder, source, file):
    """A copy of a sample folder in which one image is cut short -> that image."""
    subprocess.run(["cp", "-r", str(source), str(folder)], check=True)
    broken = folder / file
    broken.write_bytes(broken.read_bytes()[:500])
    return broken


def test_a_broken_image_stops_the_run_or_is_skipped_and_listed(tmp_path, monkeypatch, capsys):
    image = (SAMPLE / "voc/VOC2007/ImageSets/Main/tiny.txt").read_text().split()[3]
    broken = break_one_image(tmp_path / "voc", SAMPLE / "voc", f"VOC2007/JPEGImages/{image}.jpg")
    values = {"DATA_DIR": str(tmp_path / "voc"), "NUM_WORKERS": 2, "EPOCHS": 1}
    with pytest.raises(ValueError, match=broken.name):
        run(monkeypatch, train, tmp_path, **values)
    state = run(monkeypatch, train, tmp_path, **values, BROKEN_IMAGES="skip")
    assert state["images_seen"] == 16  # another image stood in
    assert "run_broken.txt" in capsys.readouterr().out
    listed = (tmp_path / "run_broken.txt").read_text()
    assert listed.count(broken.name) == 1 and len(listed.splitlines()) == 1


def test_a_broken_image_of_the_classifier_is_skipped_and_listed(tmp_path, monkeypatch):
    first = next((SAMPLE / "imagenet/train").rglob("*.JPEG"))
    broken = break_one_image(tmp_path / "imagenet", SAMPLE / "imagenet", first.relative_to(SAMPLE / "imagenet"))
    run(monkeypatch, darknet_train, tmp_path, DATA_DIR=str(tmp_path / "imagenet"), EPOCHS=1, BROKEN_IMAGES="skip")
    assert broken.name in (tmp_path / "run_broken.txt").read_text()
    with pytest.raises(ValueError, match="BROKEN_IMAGES"):
        run(monkeypatch, darknet_train, tmp_path, BROKEN_IMAGES="ignore")


def test_a_folder_of_broken_images_alone_ends(tmp_path):
    files = [(str(tmp_path / f"{number}.jpg"), 0) for number in range(3)]
    with pytest.raises(ValueError, match="none of the 3 images"):
        dataset.read_or_next(files, 1, str(tmp_path / "broken.txt"))
    assert len((tmp_path / "broken.txt").read_text().splitlines()) == 3


# ---------------------------------------------------------------- signals and kills, in processes of their own


def start(script, folder, *words):
    command = [sys.executable, str(ROOT / script), *words]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def group_members(group):
    """The live processes of a process group."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[2]) == group and fields[0] != "Z":
                members.append(int(entry.name))
    return members


LONG = [
    f"DATA_DIR={SAMPLE}/imagenet", "IMAGE_SIZE=32", "EPOCHS=100000", "NUM_WORKERS=2", "PRECISION=fp32",
    "CHECKPOINT=run.pt", "SAVE_EVERY_MINUTES=0",
]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_or_a_queue_saves_and_ends_well_and_nothing_is_left_running(signal_name, tmp_path):
    process = start("darknet_train.py", tmp_path, *LONG)
    while not (tmp_path / "run.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    assert len(group_members(process.pid)) >= 3  # with two workers
    os.killpg(process.pid, getattr(signal, signal_name))  # as a terminal or a queue does: to all of them
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"stopped by {signal_name}" in out and "Traceback" not in err
    assert group_members(process.pid) == []
    assert utils.load_checkpoint(tmp_path / "run.pt")["step"] >= 1
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_second_sigint_raises(monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        stop = utils.catch_stop_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # at once, as by torchrun: the same one
        assert stop == ["SIGTERM", "SIGINT", "SIGINT"]
        time.sleep(1.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    """20 processes save in a tight loop and are killed at random moments."""
    file, rng = tmp_path / "run.pt", random.Random(0)
    state = {"model": {"weight": torch.arange(500_000.0)}, "classes": ["a"] * 500}
    utils.save_checkpoint(file, number=-1, **state)
    seen, halfway = set(), 0
    for number in range(20):
        child = os.fork()
        if child == 0:
            while True:
                utils.save_checkpoint(file, number=number, **state)
        time.sleep(rng.uniform(0.005, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = utils.load_checkpoint(file)
        assert torch.equal(loaded["model"]["weight"], state["model"]["weight"])
        seen.add(loaded["number"])
        for left in tmp_path.glob("*.tmp*"):  # the file that was being written
            halfway += 1
            left.unlink()
    assert len(seen) > 5 and halfway > 3  # kills fell after whole saves and into unfinished ones


def test_a_full_disk_is_one_sentence_and_keeps_the_old_checkpoint(tmp_path):
    """The system refuses to write more than 100 kB of a file (RLIMIT_FSIZE)."""
    file = tmp_path / "run.pt"
    utils.save_checkpoint(file, number=1)
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"run.pt: could not be written .*disk full"):
            utils.save_checkpoint(file, weight=torch.zeros(1_000_000))
        with pytest.raises(OSError, match=r"a.weights: could not be written"):
            darknet_model.save_darknet_weights(darknet_model.Darknet19(2), tmp_path / "a.weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.pt"] and file.read_bytes() == before


# ---------------------------------------------------------------- DistributedDataParallel

DISTRIBUTED = [
    f"DATA_DIR={SAMPLE}/imagenet", "IMAGE_SIZE=32", "NUM_WORKERS=0", "PRECISION=fp32", "LR_SCHEDULE=constant", "CHECKPOINT=run.pt",
]  # fmt: skip


def start_torchrun(folder, *words, options=()):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *options]
    command = [sys.executable, *launcher, str(ROOT / "darknet_train_multigpu_distr.py"), *DISTRIBUTED, *words]
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-9000:]
    return out


def test_two_processes_that_were_stopped_end_with_the_same_bits(tmp_path):
    whole = start_torchrun(tmp_path / "whole", "EPOCHS=2")
    first = start_torchrun(tmp_path / "parts", "EPOCHS=2", "MAX_HOURS=1e-9")
    assert finish(whole).count("epoch 1  learning_rate") == 1  # the first process alone prints
    assert "stopped by MAX_HOURS" in finish(first)
    state = utils.load_checkpoint(tmp_path / "parts" / "run.pt")
    assert (state["epoch"], state["step"]) == (0, 1)
    finish(start_torchrun(tmp_path / "parts", "EPOCHS=2", "RESUME=True"))
    one, other = (utils.load_checkpoint(tmp_path / name / "run.pt") for name in ("whole", "parts"))
    for name in ("model", "optimizer", "epoch", "step", "images_seen", "best", "sums"):
        assert_equal(one[name], other[name], name)
    assert one["images_seen"] == 36  # 18 an epoch, in 3 batches of 6
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_is_restarted_and_the_run_completed(tmp_path):
    (tmp_path / "run.pt").write_bytes(b"an older run's")  # neither read nor touched before this run's own first save
    process = start_torchrun(tmp_path, "EPOCHS=8", options=["--max-restarts=1"])
    while not (tmp_path / "run_metrics.csv").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(0.3)  # the row is written before the checkpoint
    trainers = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            cwd = os.readlink(entry / "cwd")
            if cwd == str(tmp_path.resolve()) and b"-m" not in words and any(b"multigpu_distr" in word for word in words):
                trainers.append(int(entry.name))
    assert len(trainers) >= 2
    os.kill(max(trainers), signal.SIGKILL)
    out = finish(process)
    assert re.search(r"going on from run.pt after epoch [1-7],", out), out
    assert utils.load_checkpoint(tmp_path / "run.pt")["epoch"] == 8
    assert [row[0] for row in metrics(tmp_path)[1:]] == [str(epoch) for epoch in range(1, 9)]


def test_a_restart_does_not_take_another_runs_checkpoint(tmp_path, monkeypatch, capsys):
    values = {"NUM_WORKERS": 0, "DATA_DIR": str(SAMPLE / "imagenet"), "IMAGE_SIZE": 32, "EPOCHS": 1, "PRECISION": "fp32"}
    for name, value in (values | {"CHECKPOINT": str(tmp_path / "run.pt")}).items():
        monkeypatch.setattr(darknet_train_multigpu_distr, name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    darknet_train_multigpu_distr.train(0, 1, torch.device("cpu"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(darknet_train_multigpu_distr, "EPOCHS", 2)
    capsys.readouterr()
    for launcher, goes_on in (("first", True), ("second", False)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launcher)
        darknet_train_multigpu_distr.train(0, 1, torch.device("cpu"))
        out = capsys.readouterr().out
        assert ("going on from" in out) == goes_on and ("epoch 1  " in out) == (not goes_on) and "epoch 2  " in out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_ends_all_processes_with_a_checkpoint(tmp_path):
    process = start_torchrun(tmp_path, "EPOCHS=100000", "SAVE_EVERY_MINUTES=0")
    while not (tmp_path / "run.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "stopped by SIGINT" in out, err[-3000:]
    assert group_members(process.pid) == []
    assert utils.load_checkpoint(tmp_path / "run.pt")["step"] >= 1


def test_a_loss_that_is_not_finite_stops_all_processes_with_its_sentence(tmp_path):
    """A rate that throws the weights to infinity; none of the two is left waiting for the other."""
    process = start_torchrun(tmp_path, "EPOCHS=50", "LEARNING_RATE=1e30", "BATCH_SIZE=8", "SUBDIVISIONS=2")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("is not finite in epoch") == 2, err[-3000:]


def gradients_of_a_process(rank, folder):
    """The gradients that the script's own loop hands to the optimiser, in one part and accumulated over two."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for subdivisions in (1, 2):
        model, images, labels = small_classifier()
        parts = list(zip(images.chunk(subdivisions), labels.chunk(subdivisions), strict=True))
        loader = [(some_images[rank::2], some_labels[rank::2]) for some_images, some_labels in parts]
        optimizer = torch.optim.SGD(model.parameters(), 0.0, fused=True)
        darknet_train_multigpu_distr.train_one_epoch(
            nn.parallel.DistributedDataParallel(model), loader, optimizer, torch.amp.GradScaler("cpu", enabled=False), [0.0],
            subdivisions, 0.0, torch.device("cpu"), torch.float32, 0, torch.zeros(3, dtype=torch.float64), lambda: False,
        )  # fmt: skip
        torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/{rank}{subdivisions}.pt")
    torch.distributed.destroy_process_group()


def small_classifier():
    """Darknet-19's first layers without batch norm, which would see other images in each process."""
    torch.manual_seed(0)
    model = nn.Sequential(*darknet_model.darknet19_features()[:7], nn.Conv2d(128, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for block in model:
        if isinstance(block, nn.Sequential):
            block[1] = nn.Identity()
    return model, torch.rand(8, 3, 32, 32), torch.arange(8) % 4


def test_gradients_of_two_processes_equal_those_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(gradients_of_a_process, (str(tmp_path),), nprocs=2)
    model, images, labels = small_classifier()
    nn.functional.cross_entropy(model(images), labels).backward()
    for name in ("01", "11", "02", "12"):
        for parameter, gradient in zip(model.parameters(), torch.load(tmp_path / f"{name}.pt"), strict=True):
            assert torch.allclose(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- fuzz


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, doubles, swaps or replaces some bytes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
        low, high = min(place, other), max(place, other)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[place % len(data)] = rng.randrange(256)
        elif kind == 1:
            del data[low : min(high, low + 50)]
        elif kind == 2:
            data[place:place] = data[low : min(high, low + 50)]
        elif kind == 3:
            data[place:place] = rng.choice([b"nan", b"-1", b"1e400", b"\0\0", b"<", b"&x;", b"\xff\xfe", b"9" * 30, b"\n"])
        elif kind == 4:
            del data[place:]
        else:
            data[place : place + 8] = rng.randbytes(8)
    return bytes(data)


def readers(folder):
    """kind -> (a good file's content, name, reader)."""
    voc = SAMPLE / "voc" / "VOC2007"
    image_id = (voc / "ImageSets/Main/one.txt").read_text().split()[0]
    photograph = voc / "JPEGImages" / f"{image_id}.jpg"
    small = io.BytesIO()
    Image.open(photograph).resize((64, 48)).save(small, "JPEG")
    checkpoint, weights = folder / "good.pt", folder / "good.weights"
    utils.save_checkpoint(checkpoint, model={"w": torch.ones(9)}, classes=["a"], anchors=ANCHORS, image_size=32)
    network = darknet_model.convolution(3, 4, 3)
    darknet_model.save_darknet_weights(network, weights)
    (folder / "a.jpg").write_bytes(small.getvalue())
    (folder / "a.txt").write_text("3 0.5 0.5 0.2 0.3\n")
    keys = ("model", "classes", "anchors", "image_size")
    return {
        "xml": ((voc / "Annotations" / f"{image_id}.xml").read_bytes(), "x.xml",
                lambda file: dataset.read_labels(str(photograph), file, dataset.VOC_CLASSES)),
        "txt": (b"3 0.5 0.5 0.2 0.3\n0 .25 .25 .1 .1\n19 0.9 0.9 0.2 0.1\n", "x.txt",
                lambda file: dataset.read_labels(str(photograph), file, dataset.VOC_CLASSES)),
        "csv": (b"image,label\na.jpg,a.txt\na.jpg,a.txt\n", "x.csv", lambda file: dataset.VOCDataset(file, [], ANCHORS, 32)),
        "jpeg": (small.getvalue(), "x.jpg", utils.read_image),
        "checkpoint": (checkpoint.read_bytes(), "x.pt", lambda file: utils.load_checkpoint(file, keys=keys)),
        "weights": (weights.read_bytes(), "x.weights", lambda file: darknet_model.load_darknet_weights(network, file)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["xml", "txt", "csv", "jpeg", "checkpoint", "weights"])
def test_300_damaged_files_are_read_or_named(kind, tmp_path, capsys):
    content, name, read = readers(tmp_path)[kind]
    files, rng, refused = {entry.name for entry in tmp_path.iterdir()}, random.Random(7), 0
    for number in range(300):
        (tmp_path / name).write_bytes(mutate(content, rng))
        start_time = time.monotonic()
        try:
            read(str(tmp_path / name))
        except (OSError, ValueError) as error:
            refused += 1
            assert str(tmp_path) in str(error) and len(str(error).splitlines()) == 1, (number, error)
        assert time.monotonic() - start_time < 5, number
    assert refused > 30, refused
    assert {entry.name for entry in tmp_path.iterdir()} == files | {name}  # nothing else was written
