"""Whole scripts on the sample at a small size, by main() and from the command line, and what they say to bad input."""

import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import darknet_model
import detect
import detect_txt
import test as test_script
import train
import utils
from dataset import VOC_CLASSES, VOCDataset
from model import ANCHORS, YOLOv2

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data_samples" / "voc"


def set_globals(monkeypatch, script, **values):
    for name, value in values.items():
        monkeypatch.setattr(script, name, value)


def set_small_training(monkeypatch, folder, **values):
    small = {
        "DATA_DIR": str(SAMPLE), "IMAGE_SETS": [("2007", "one")], "VAL_IMAGE_SETS": [], "IMAGE_SIZE": 64, "BATCH_SIZE": 2,
        "REPEAT": 4, "EPOCHS": 2, "EVAL_EVERY": 2, "BURN_IN": 2, "NUM_WORKERS": 0, "PRECISION": "fp32",
        "CHECKPOINT": str(folder / "yolov2.pt"),
    }  # fmt: skip
    set_globals(monkeypatch, train, **(small | values))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short training run."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_small_training(monkeypatch, folder, VAL_IMAGE_SETS=[("2007", "one")], EPOCHS=4, MULTI_SCALE=[32, 64])
        train.main()
    return folder


def read_rows(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_training_writes_checkpoints_metrics_and_charts(trained):
    rows = read_rows(trained / "yolov2_metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    for row in rows:
        parts = sum(float(row[name]) for name in ("coord", "object", "no_object", "class", "prior"))
        assert float(row["total"]) == pytest.approx(parts, rel=1e-4)
    assert [row["train_map"] != "" for row in rows] == [False, True, False, True]
    assert all((row["val_map"] != "") == (row["train_map"] != "") for row in rows)
    assert float(rows[-1]["total"]) < float(rows[0]["total"])
    state = utils.load_checkpoint(trained / "yolov2.pt")
    assert (state["classes"], state["image_size"], state["epoch"], state["images_seen"]) == (list(VOC_CLASSES), 64, 4, 16)
    assert set(state["model"]) == set(YOLOv2().state_dict())
    assert state["step"] == 8 and state["settings"]["EPOCHS"] == 4 and state["settings"]["MULTI_SCALE"] == [32, 64]
    assert (trained / "yolov2_best.pt").is_file()
    with Image.open(trained / "yolov2_charts.png") as chart:
        assert min(chart.size) > 300
    assert not list(trained.glob("*.tmp*"))


def test_training_goes_on_from_a_checkpoint(trained, tmp_path, monkeypatch):
    (tmp_path / "yolov2.pt").symlink_to(trained / "yolov2.pt")
    (tmp_path / "yolov2_metrics.csv").write_bytes((trained / "yolov2_metrics.csv").read_bytes())
    set_small_training(monkeypatch, tmp_path, EPOCHS=5, RESUME=True, MULTI_SCALE=[32, 64])
    train.main()
    assert [row["epoch"] for row in read_rows(tmp_path / "yolov2_metrics.csv")] == ["1", "2", "3", "4", "5"]
    assert utils.load_checkpoint(tmp_path / "yolov2.pt")["images_seen"] == 20  # 16 from before


def test_the_best_checkpoint_alone_does_not_resume(trained, tmp_path, monkeypatch):
    set_small_training(monkeypatch, tmp_path, RESUME=True, CHECKPOINT=str(trained / "yolov2_best.pt"))
    with pytest.raises(ValueError, match="yolov2_best.pt.*optimizer"):
        train.main()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(optimizer):
    """Two parts of one image each give the step of a batch of two (batch norm in eval mode, since it sees a part)."""
    torch.manual_seed(0)
    images, targets = torch.rand(2, 3, 32, 32), torch.zeros(2, 5, 1, 1, 6)
    targets[0, 1, 0, 0] = torch.tensor([1, 0.4, 0.6, 0.5, 0.7, 3])
    results = []
    for parts in (1, 2):
        torch.manual_seed(1)
        model = YOLOv2(num_classes=4)
        model.train = lambda mode=True, model=model: torch.nn.Module.train(model, False)  # keeps batch norm out of it
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        step = kind(darknet_model.parameter_groups(model, 5e-4), 1e-3, fused=True)
        loader = [(images[i : i + 2 // parts], targets[i : i + 2 // parts]) for i in range(0, 2, 2 // parts)]
        loss_function = train.YoloLoss(ANCHORS)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        cpu = torch.device("cpu")
        steps, seen = train.train_one_epoch(
            model, loader, loss_function, step, scaler, [1e-3], parts, 5.0, cpu, torch.float32, 0, torch.zeros(6), lambda: False
        )
        assert (steps, seen) == (1, 2)
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    # one Adam step is the sign of a gradient, so a gradient that is zero but for rounding may fall either way: compare nearly all
    difference = (results[0] - results[1]).abs()
    assert torch.quantile(difference[::97], 0.999) < 1e-6
    if optimizer == "sgd":
        assert difference.max() < 1e-5


def test_a_loss_that_is_not_finite_stops_the_run_before_a_step(tmp_path, monkeypatch):
    set_small_training(monkeypatch, tmp_path, LEARNING_RATE=1e30, OPTIMIZER="sgd", BURN_IN=0)
    with pytest.raises(ValueError, match="not finite in epoch 1, step"):
        train.main()
    assert not (tmp_path / "yolov2.pt").exists()  # no epoch was finished


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"OPTIMIZER": "adamax"}, "OPTIMIZER"),
        ({"LR_SCHEDULE": "zigzag"}, "LR_SCHEDULE"),
        ({"BATCH_SIZE": 3, "SUBDIVISIONS": 2}, "SUBDIVISIONS"),
        ({"IMAGE_SIZE": 100}, "multiple of 32"),
        ({"EQUATION": "yolov3"}, "yolov3"),
        ({"CLASSES": ["cat"]}, "000005.xml.*dog"),
        ({"PRECISION": "int8"}, "PRECISION"),
        ({"MULTI_SCALE": [64, 100]}, "multiples of 32"),
        ({"MULTI_SCALE": [0, 64]}, "multiples of 32"),
        ({"EVAL_EVERY": 0}, "EVAL_EVERY must be 1 or more, not 0"),
        ({"SUBDIVISIONS": -1}, "SUBDIVISIONS must be 1 or more, not -1"),
        ({"REPEAT": 0}, "REPEAT must be 1 or more, not 0"),
        ({"EPOCHS": 0}, "EPOCHS must be 1 or more, not 0"),
    ],
)
def test_a_wrong_setting_of_the_training_is_one_sentence(tmp_path, monkeypatch, setting, message):
    set_small_training(monkeypatch, tmp_path, **setting)
    with pytest.raises(ValueError, match=message):
        train.main()


def test_test_prints_the_table_and_writes_csv_and_curves(trained, tmp_path, monkeypatch, capsys):
    set_globals(
        monkeypatch, test_script, DATA_DIR=str(SAMPLE), IMAGE_SETS=[("2007", "one")], CHECKPOINT=str(trained / "yolov2.pt"),
        OUTPUT=str(tmp_path / "test"), NUM_WORKERS=0, INPUT_SIZES=[64, 96], PRECISION="fp32",
    )  # fmt: skip
    test_script.main()
    out = capsys.readouterr().out
    assert all(name in out for name in ("aeroplane", "AP 11", "AP all", "AP@0.4", "mAP", "images/s", "at 96 px"))
    rows = {row["class"]: row for row in read_rows(tmp_path / "test.csv")}
    assert len(rows) == 21 and float(rows["mAP"]["ap_all"]) == float(rows["dog"]["ap_all"])  # the one class with truths
    assert rows["dog"]["truths"] == "1" and rows["cat"]["truths"] == "0"
    assert math.isnan(float(rows["cat"]["ap_all"])) and 0 <= float(rows["dog"]["ap_all"]) <= 1
    with Image.open(tmp_path / "test_curves.png") as picture:
        assert min(picture.size) > 500


def test_measure_by_hand():
    """Class 0: two truths; .9 hits, .6 misses, .3 hits. At .4 only the first two are shown."""
    truths = np.array([[0, 0, 0, 10, 10, 19, 19], [1, 0, 0, 10, 10, 19, 19], [1, 0, 1, 50, 50, 59, 59]], float)
    detections = np.array([[0, 0, 0.9, 10, 10, 19, 19], [0, 0, 0.6, 80, 80, 89, 89], [1, 0, 0.3, 10, 10, 19, 19]], float)
    rows, curves = test_script.measure(detections, truths, ["a", "b"], 0.4)
    row = rows[0]
    assert (row["truths"], row["difficult"], row["detections"]) == (2, 1, 3)
    assert (row["precision"], row["recall"], row["f1"]) == (0.5, 0.5, 0.5)  # 1 of 2 shown is right, 1 of 2 truths found
    assert row["ap_all"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert row["ap_at_fixed"] == pytest.approx(0.5)
    assert row["ap_11"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert math.isnan(rows[1]["ap_all"]) and len(curves) == 2


def test_detect_draws_every_kind_of_image(trained, tmp_path, monkeypatch, capsys):
    photo = Image.open(SAMPLE / "VOC2007" / "JPEGImages" / "000005.jpg")
    source = tmp_path / "source"
    source.mkdir()
    photo.convert("L").save(source / "grey.png")
    photo.convert("RGBA").save(source / "rgba.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    photo.crop((0, 0, 300, 200)).save(source / "turned.jpg", exif=exif)
    set_globals(
        monkeypatch, detect, SOURCE=str(source), CHECKPOINT=str(trained / "yolov2.pt"), OUTPUT_DIR=str(tmp_path / "out"),
        CONFIDENCE_THRESHOLD=0.0001, PRECISION="fp32",
    )  # fmt: skip
    detect.main()
    out = capsys.readouterr().out
    assert len(re.findall(r"in \d+ ms", out)) == 3
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["grey.jpg", "rgba.jpg", "turned.jpg"]
    with Image.open(tmp_path / "out" / "turned.jpg") as picture:
        assert picture.size == (200, 300)


def test_detect_goes_on_after_a_broken_image_and_says_so(trained, tmp_path, monkeypatch, capsys):
    source = tmp_path / "source"
    source.mkdir()
    data = (SAMPLE / "VOC2007" / "JPEGImages" / "000005.jpg").read_bytes()
    (source / "a_truncated.jpg").write_bytes(data[: len(data) // 2])
    (source / "b_good.jpg").write_bytes(data)
    set_globals(monkeypatch, detect, SOURCE=str(source), CHECKPOINT=str(trained / "yolov2.pt"), OUTPUT_DIR=str(tmp_path / "out"))
    with pytest.raises(SystemExit, match="1 of 2"):
        detect.main()
    assert "a_truncated.jpg" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["b_good.jpg"]

    (source / "b_good.png").write_bytes(data)
    with pytest.raises(ValueError, match="b_good.jpg: would be the picture of 2 files"):
        detect.main()


def run(*words, cwd=ROOT):
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.py", "DATA_DIR=/nowhere/voc"), "/nowhere/voc"),
        (("train.py", "EPOCHS=many"), "EPOCHS must be int"),
        (("train.py", "EPOCH=3"), "no global 'EPOCH'"),
        (("test.py", "CHECKPOINT=/nowhere/yolov2.pt"), "/nowhere/yolov2.pt"),
        (("detect.py", "SOURCE=/nowhere/street.jpg"), "/nowhere/street.jpg"),
        (("dataset.py", "IMAGE_SETS=[('2007','nothing')]"), "nothing.txt"),
    ],
)
def test_bad_input_on_the_command_line_is_one_sentence(words, message):
    result = run(*words)
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_ends_a_training_with_its_name(tmp_path, workers):
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "VOC2007" / folder).mkdir(parents=True)
    for name in ("JPEGImages/000005.jpg", "Annotations/000005.xml", "ImageSets/Main/one.txt"):
        data = (SAMPLE / "VOC2007" / name).read_bytes()
        (tmp_path / "VOC2007" / name).write_bytes(data[: len(data) // 2] if name.endswith(".jpg") else data)
    words = [f"DATA_DIR={tmp_path}", "IMAGE_SETS=[('2007','one')]", "VAL_IMAGE_SETS=[]", "IMAGE_SIZE=32", f"NUM_WORKERS={workers}"]
    result = run("train.py", *words, f"CHECKPOINT={tmp_path}/y.pt")
    assert result.returncode == 1
    assert result.stderr.strip().startswith("error: ") and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "000005.jpg" in result.stderr and "truncated" in result.stderr


def test_scripts_run_from_the_command_line(tmp_path):
    words = ["IMAGE_SETS=[('2007','one')]", "IMAGE_SIZE=64", "EPOCHS=1", "REPEAT=2", "BATCH_SIZE=2", "NUM_WORKERS=1"]
    result = run("train.py", *words, "VAL_IMAGE_SETS=[]", f"CHECKPOINT={tmp_path}/y.pt")
    assert result.returncode == 0, result.stderr
    line = result.stdout.strip().splitlines()[-1]
    assert re.match(r"epoch 1  learning_rate \S+  coord \S+  object \S+  no_object \S+  class \S+  prior \S+  total \S+  ", line)
    result = run(
        "detect.py",
        f"CHECKPOINT={tmp_path}/y.pt",
        f"OUTPUT_DIR={tmp_path}/d",
        "SOURCE=data_samples/voc/VOC2007/JPEGImages/000005.jpg",
    )
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path / "d") == ["000005.jpg"]


def test_the_network_is_not_asked_for_anything_at_import():
    """albumentations looks for a newer version of itself unless it is told not to."""
    guard = "import socket\ndef refuse(*a, **k): raise SystemExit('network')\nsocket.getaddrinfo = socket.socket.connect = refuse\n"
    result = run("-c", guard + "import train, test, detect, dataset")
    assert result.returncode == 0, result.stderr


def test_detect_txt_gives_back_the_numbers_of_test(trained, tmp_path, monkeypatch, capsys):
    """The comp4 files hold the boxes unrounded: read back, they give test.py's APs; the whole-pixel files nearly the same."""
    data = {"DATA_DIR": str(SAMPLE), "IMAGE_SETS": [("2007", "tiny")], "CHECKPOINT": str(trained / "yolov2.pt"), "NUM_WORKERS": 0}
    set_globals(monkeypatch, test_script, **data, OUTPUT=str(tmp_path / "test"), PRECISION="fp32", CONFIDENCE_THRESHOLD=1e-4)
    set_globals(monkeypatch, detect_txt, **data, OUTPUT_DIR=str(tmp_path), PRECISION="fp32", CONFIDENCE_THRESHOLD=1e-4)
    test_script.main()
    detect_txt.main()
    ids = (SAMPLE / "VOC2007" / "ImageSets" / "Main" / "tiny.txt").read_text().split()
    assert sorted(file.stem for file in (tmp_path / "detections").iterdir()) == ids
    assert sorted(file.stem for file in (tmp_path / "groundtruths").iterdir()) == ids

    truths, whole, exact = [], [], []
    for index, name in enumerate(ids):
        for line in (tmp_path / "groundtruths" / f"{name}.txt").read_text().splitlines():
            label, *box = line.split()
            truths.append([index, VOC_CLASSES.index(label), 0, *map(int, box)])
        for line in (tmp_path / "detections" / f"{name}.txt").read_text().splitlines():
            label, confidence, *box = line.split()
            whole.append([index, VOC_CLASSES.index(label), float(confidence), *map(int, box)])
    for label, name in enumerate(VOC_CLASSES):
        for line in (tmp_path / f"comp4_det_test_{name}.txt").read_text().splitlines():
            image, *numbers = line.split()
            exact.append([ids.index(image), label, *map(float, numbers)])
    assert len(exact) == len(whole) > 0

    dataset = VOCDataset(SAMPLE, [("2007", "tiny")], ANCHORS, 64)
    difficult = [[i, *row] for i in range(len(dataset)) for row in dataset.ground_truth(i)[0].tolist() if row[1]]
    assert difficult  # the list has some, and the default form leaves them out
    *rows, mean = read_rows(tmp_path / "test.csv")
    expected = [float(row["ap_all"]) for row in rows]
    assert mean["class"] == "mAP" and float(mean["ap_all"]) == pytest.approx(np.nanmean(expected))
    found = utils.average_precision(exact, [*truths, *difficult], 20).numpy()
    assert np.nanmax(expected) > 0
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(
        np.nanmean(utils.average_precision(whole, [*truths, *difficult], 20)), np.nanmean(expected), atol=0.05
    )


def test_detect_txt_marks_difficult_objects_when_told(trained, tmp_path, monkeypatch):
    """Image 000014 of the sample has difficult objects."""
    set_globals(
        monkeypatch, detect_txt, DATA_DIR=str(SAMPLE), IMAGE_SETS=[("2007", "tiny")], CHECKPOINT=str(trained / "yolov2.pt"),
        NUM_WORKERS=0, OUTPUT_DIR=str(tmp_path), PRECISION="fp32", MARK_DIFFICULT=True, CONFIDENCE_THRESHOLD=0.99,
    )  # fmt: skip
    detect_txt.main()
    lines = [line for file in (tmp_path / "groundtruths").iterdir() for line in file.read_text().splitlines()]
    marked = [line for line in lines if line.endswith(" difficult")]
    assert marked and all(len(line.split()) == (6 if line in marked else 5) for line in lines)
    assert all(file.read_text() == "" for file in (tmp_path / "detections").iterdir())  # nothing is that sure: empty files

    detect_txt.main()  # the same images once more
    stray = tmp_path / "groundtruths" / "street.txt"  # of a run over others
    stray.write_text("cat 1 1 9 9\n")
    with pytest.raises(ValueError, match="street.txt: left by a run over other images"):
        detect_txt.main()
    assert stray.read_text() == "cat 1 1 9 9\n"
