"""Whole scripts on the sample at a small image size, through main() and from the command line, and their errors for bad
input. In the pytest process, networks have an eighth of the channels; separate processes use full networks."""

import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import matplotlib.text
import numpy as np
import pytest
import torch
from conftest import PerfectDetector, handlers_kept, load_detector, raw_outputs, set_globals, write_coco, write_devkit
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.ops import box_convert

import dataset
import detect
import detect_txt
import test as test_script
import train
import utils
from darknet_model import Darknet19
from dataset import VOC_CLASSES, VOCDataset
from model import ANCHORS, YOLOv2

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data_samples" / "voc"
DATA = {"DATA_DIR": str(SAMPLE), "IMAGE_SETS": [("2007", "tiny")], "NUM_WORKERS": 0, "PRECISION": "fp32"}
PHOTO = SAMPLE / "VOC2007/JPEGImages/000005.jpg"

pytestmark = pytest.mark.usefixtures("narrow_module")


@pytest.fixture(scope="module", autouse=True)
def signal_handlers():
    with handlers_kept():
        yield


# ---------------------------------------------------------------- train.py


def train_on_one_image(monkeypatch, folder, **values):
    small = {
        "DATA_DIR": str(SAMPLE), "IMAGE_SETS": [("2007", "one")], "VAL_IMAGE_SETS": [], "IMAGE_SIZE": 64,
        "BATCH_SIZE": 2, "REPEAT": 4, "EPOCHS": 2, "EVAL_EVERY": 2, "BURN_IN": 2, "NUM_WORKERS": 0,
        "PRECISION": "fp32", "CHECKPOINT": str(folder / "yolov2.pt"),
    }  # fmt: skip
    set_globals(monkeypatch, train, **(small | values))
    train.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, narrow_module):
    """The folder of a short training run."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw = utils.draw_charts  # of the last epoch only: it takes a second
        monkeypatch.setattr(utils, "draw_charts", lambda rows, file: draw(rows, file) if len(rows) == 4 else None)
        train_on_one_image(monkeypatch, folder, VAL_IMAGE_SETS=[("2007", "one")], EPOCHS=4, MULTI_SCALE=[32, 64])
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
    assert (state["classes"], state["image_size"]) == (list(VOC_CLASSES), 64)
    assert (state["epoch"], state["images_seen"], len(state["metrics"])) == (4, 16, 4)
    assert set(state["model"]) == set(YOLOv2().state_dict())
    assert state["step"] == 8 and state["settings"]["EPOCHS"] == 4 and state["settings"]["MULTI_SCALE"] == [32, 64]
    assert (trained / "yolov2_best.pt").is_file()
    with Image.open(trained / "yolov2_charts.png") as chart:
        assert min(chart.size) > 300
    assert not list(trained.glob("*.tmp*"))


def test_the_rate_is_divided_by_10_at_the_ends_of_the_epochs_in_lr_drops(tmp_path, monkeypatch, no_charts):
    rates, asked = [], utils.learning_rate_at
    monkeypatch.setattr(utils, "learning_rate_at", lambda *arguments: rates.append(asked(*arguments)) or rates[-1])
    monkeypatch.setattr(train, "evaluate", lambda *arguments: 0.0)
    drops = {"LR_SCHEDULE": "steps", "LR_DROPS": [1, 3], "BURN_IN": 0}
    train_on_one_image(monkeypatch, tmp_path, EPOCHS=4, LEARNING_RATE=0.01, **drops)
    # 2 steps per epoch: updates 1 | 2 to 5 | 6 to 8, as a drop at 40,000 acts on Darknet's update 40,000
    assert rates == pytest.approx([0.01] + 4 * [0.001] + 3 * [0.0001])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(optimizer, tmp_path, monkeypatch, request, no_charts):
    """Two accumulation steps of one image equal a batch of two (batch norm in eval mode: it depends on the batch)."""
    (tmp_path / "empty.txt").write_text("")
    first, second = (SAMPLE / "VOC2007" / "JPEGImages" / f"{name}.jpg" for name in ("000005", "000012"))
    label = SAMPLE / "VOC2007" / "Annotations" / "000005.xml"
    (tmp_path / "two.csv").write_text(f"{first},{label}\n{second},empty.txt\n")  # one image without objects
    monkeypatch.setattr(YOLOv2, "train", lambda model, mode=True: torch.nn.Module.train(model, False))

    gradients, weights, losses = [], [], []

    def record(optimizer, args, kwargs):
        gradients.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))

    request.addfinalizer(register_optimizer_step_pre_hook(record).remove)
    for subdivisions in (1, 2):
        folder = tmp_path / str(subdivisions)
        train_on_one_image(
            monkeypatch, folder, DATA_DIR=str(tmp_path), IMAGE_SETS=["two.csv"], REPEAT=1, EPOCHS=1, BURN_IN=0,
            SUBDIVISIONS=subdivisions, OPTIMIZER=optimizer, LEARNING_RATE=1e-3, LR_SCHEDULE="constant", CLIP_NORM=5.0,
        )  # fmt: skip
        state = utils.load_checkpoint(folder / "yolov2.pt")
        assert (state["step"], state["images_seen"], len(gradients)) == (1, 2, subdivisions)
        weights.append(torch.cat([value.flatten() for name, value in state["model"].items() if "running" not in name]))
        losses.append(float(read_rows(folder / "yolov2_metrics.csv")[0]["total"]))

    utils.set_seed(train.SEED)
    before = torch.cat([value.flatten() for name, value in YOLOv2().state_dict().items() if "running" not in name])
    assert (weights[0] - before).abs().max() > 1e-5  # a step was taken
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert gradients[0].norm() > 0.1 and (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()
    # Adam's first step is the sign of the gradient, so rounding may flip those close to zero: compare nearly all
    difference = (weights[0] - weights[1]).abs()
    assert torch.quantile(difference, 0.999) < 1e-6
    if optimizer == "sgd":
        assert difference.max() < 1e-5


# ---------------------------------------------------------------- test.py


def test_test_prints_a_table_and_writes_a_csv_and_curves(trained, tmp_path, monkeypatch, capsys):
    own = {"CHECKPOINT": str(trained / "yolov2.pt"), "OUTPUT": str(tmp_path / "test"), "INPUT_SIZES": [64, 96]}
    set_globals(monkeypatch, test_script, **(DATA | own | {"IMAGE_SETS": [("2007", "one")]}))
    test_script.main()
    out = capsys.readouterr().out
    assert all(name in out for name in ("dog", "AP 11", "AP all", "AP@0.4", "mAP", "images/s", "at 96 px"))
    rows = {row["class"]: row for row in read_rows(tmp_path / "test.csv")}
    assert len(rows) == 21 and float(rows["mAP"]["ap_all"]) == float(rows["dog"]["ap_all"])  # the only class with truth
    assert rows["dog"]["truths"] == "1" and rows["cat"]["truths"] == "0"
    assert math.isnan(float(rows["cat"]["ap_all"])) and 0 <= float(rows["dog"]["ap_all"]) <= 1
    with Image.open(tmp_path / "test_curves.png") as picture:
        assert min(picture.size) > 500
    assert out.count("errors at 0.4  duplicate") == 2 and "wrote the worst errors" in out
    assert float(rows["dog"]["recall"]) == 1 - int(rows["dog"]["missed"]) and rows["cat"]["missed"] == "0"
    assert (tmp_path / "test_worst.jpg").is_file()


def test_measure_equals_values_computed_by_hand():
    """Class 0 has two truths: the detections at .9 and .3 are right, .6 is wrong. Only two are above .4."""
    truths = np.array([[0, 0, 0, 10, 10, 19, 19], [1, 0, 0, 10, 10, 19, 19], [1, 0, 1, 50, 50, 59, 59]], float)
    detections = [[0, 0, 0.9, 10, 10, 19, 19], [0, 0, 0.6, 80, 80, 89, 89], [1, 0, 0.3, 10, 10, 19, 19]]
    rows, curves = test_script.measure(np.array(detections), truths, ["a", "b"], 0.4)
    row = rows[0]
    assert (row["truths"], row["difficult"], row["detections"]) == (2, 1, 3)
    # 1 of 2 detections is right, 1 of 2 truths is found
    assert (row["precision"], row["recall"], row["f1"]) == (0.5, 0.5, 0.5)
    assert row["ap_all"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert row["ap_at_fixed"] == pytest.approx(0.5)
    assert row["ap_11"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert math.isnan(rows[1]["ap_all"]) and len(curves) == 2


def test_mean_ap_over_iou_counts_each_threshold_that_the_box_reaches():
    """A box of 8 x 10 pixels on a truth of 10 x 10: IoU .8, a match for .5, .55 .. .8, which are 7 of 10 thresholds."""
    truths, box = np.array([[0, 0, 0, 1, 1, 10, 10]], float), np.array([[0, 0, 0.9, 1, 1, 8, 10]])
    (row,), _ = test_script.measure(box, truths, ["a"], 0.4)
    assert (row["ap_all"], row["ap_75"]) == (1, 1) and row["ap_50_95"] == pytest.approx(0.7)
    (row,), _ = test_script.measure(box - [0, 0, 0, 0, 0, 1, 0], truths, ["a"], 0.4)  # IoU .7
    assert (row["ap_all"], row["ap_75"]) == (1, 0) and row["ap_50_95"] == pytest.approx(0.5)


# Disjoint boxes of 10 x 10 pixels. Classes: A, HARD and D are of class 0, C is of class 1; HARD is difficult.
A, HARD, C, D = ([x, 1, x + 9, 10] for x in (1, 21, 41, 61))
TRUTHS = np.array([[0, 0, 0, *A], [0, 0, 1, *HARD], [0, 1, 0, *C], [0, 0, 0, *D]], float)


def rows_of(box, count, top=1):
    """`count` rows of pixels of a box of 10 x 10, so their IoU is count / 10."""
    return [box[0], top, box[2], top + count - 1]


def kinds_of(detections, truths=TRUTHS, classes=3):
    kinds, confused_with, missed = test_script.error_kinds(np.array(detections, float).reshape(-1, 7), truths, classes)
    return kinds.tolist(), confused_with.tolist(), missed.tolist()


def test_each_kind_of_error_by_hand():
    detections = [
        [0, 0, 0.5, *rows_of(A, 5)],  # IoU .5 with A, which the next one takes
        [0, 0, 0.9, *A],
        [0, 0, 0.8, *rows_of(HARD, 5)],
        [0, 0, 0.7, *HARD],  # a second detection of a difficult object is no error either
        [0, 0, 0.9, *rows_of(D, 4)],
        [0, 0, 0.9, *rows_of(D, 1)],  # IoU .1
        [0, 0, 0.9, *C],
        [0, 0, 0.9, *rows_of(C, 1)],  # IoU .1
        [0, 0, 0.9, 41, 1, 49, 1],  # 9 of 100 pixels of C
        [0, 0, 0.9, 1, 71, 10, 80],
        [1, 0, 0.9, *A],  # another image
        [0, 2, 0.9, *HARD],  # class 2 has no ground truth, and a difficult object can be confused, too
    ]
    kinds, confused_with, missed = kinds_of(detections)
    assert kinds == [
        "duplicate", "correct", "ignored", "ignored", "localisation", "localisation", "confusion", "confusion",
        "background", "background", "background", "confusion",
    ]  # fmt: skip
    assert confused_with == [-1] * 6 + [1, 1] + [-1] * 3 + [0]
    assert missed == [False, False, True, True]  # HARD is difficult; C has no detection of its class, D a bad one
    # a confusion names the class with the largest overlap
    truths = np.array([[0, 1, 0, *rows_of(A, 4)], [0, 2, 0, *rows_of(A, 6)], [0, 1, 0, *rows_of(A, 5)]], float)
    assert kinds_of([[0, 0, 0.9, *A]], truths)[:2] == (["confusion"], [2])


def test_the_precedence_of_the_kinds_of_errors():
    """An object of class 1 lies exactly under each detection; only what the detection has in its own class differs."""
    others = np.array([[0, 1, 0, *box] for box in (A, HARD, D)], float)
    detections = [[0, 0, 0.9, *A], [0, 0, 0.8, *A], [0, 0, 0.8, *HARD]]
    kinds, _, missed = kinds_of(detections, np.concatenate([TRUTHS, others]))
    assert kinds == ["correct", "duplicate", "ignored"]  # none is a confusion
    assert missed == [False, False, True, True, True, True, True]
    truths = np.array([[0, 0, 0, *rows_of(D, 2)], [0, 1, 0, *D]], float)
    assert kinds_of([[0, 0, 0.9, *D]], truths)[0] == ["localisation"]  # IoU .2 with class 0 comes before 1 with class 1
    # too far from a difficult object to be ignored
    assert kinds_of([[0, 0, 0.9, *rows_of(HARD, 4)]])[0] == ["localisation"]


def test_kinds_of_errors_without_detections_or_truths():
    assert kinds_of([]) == ([], [], [True, False, True, True])
    assert kinds_of([[0, 0, 0.9, *A]], np.empty((0, 7))) == (["background"], [-1], [])


def test_errors_are_counted_and_printed_per_class(capsys):
    truths = np.array([[0, 1, 0, *A], [0, 2, 0, *C], [0, 1, 0, *D]], float)
    detections = np.array([[0, 0, 0.9, *A], [0, 0, 0.9, *C], [0, 0, 0.9, *D], [0, 2, 0.9, *C], [0, 2, 0.8, *C]], float)
    classes = ["dog", "cat", "cow", "boat"]
    rows = test_script.count_errors(detections, truths, classes, test_script.error_kinds(detections, truths, 4))
    # duplicate, localisation, confusion, background, missed, confused_with
    assert [list(row.values()) for row in rows] == [
        [0, 0, 3, 0, 0, "cat", 2],  # on two cats and a cow; there are no dogs
        [0, 0, 0, 0, 2, "", 0],
        [1, 0, 0, 0, 0, "", 0],
        [0, 0, 0, 0, 0, "", 0],
    ]
    test_script.print_errors([{"class": name} | row for name, row in zip(classes, rows, strict=True)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "errors at 0.4 duplicate localisation background missed confusion"
    assert lines[1:] == ["dog 0 0 0 0 3 (cat 2)", "cat 0 0 0 2 0", "cow 1 0 0 0 0", "boat 0 0 0 0 0", "all 1 0 0 2 3"]


def worst_of(monkeypatch, dataset, detections, file):
    """Draws the sheet -> the number of panels and, for each, the title and the boxes of its patches."""
    from matplotlib import pyplot as plt

    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda figure: figures.append(figure) or close(figure))
    truths = np.concatenate([[[i, *row] for row in dataset.ground_truth(i).tolist()] for i in range(len(dataset))])
    detections = np.array(detections, float).reshape(-1, 7)
    errors = test_script.error_kinds(detections, truths, len(dataset.classes))
    count = test_script.draw_worst(dataset, detections, truths, errors, file)
    axes = [axis for figure in figures for axis in figure.axes if axis.get_title()]
    boxes = [[patch.get_bbox().extents for patch in axis.patches] for axis in axes]
    return count, [axis.get_title() for axis in axes], boxes


def test_the_sheet_shows_the_8_most_confident_false_positives_and_the_4_largest_missed_objects(tmp_path, monkeypatch):
    dataset = VOCDataset(SAMPLE, [("2007", "tiny")], ANCHORS, 64)
    dog = [sample.image_id for sample in dataset.samples].index("000005")
    box = dataset.ground_truth(dog)[0, 2:].tolist()
    corner = [1, 1, 2, 2]
    detections = [[dog, 11, 0.5, *box], [dog, 7, 0.93, *box], *([0, 0, 0.4 + k / 100, *corner] for k in range(10))]
    count, titles, boxes = worst_of(monkeypatch, dataset, detections, tmp_path / "worst.jpg")
    assert count == 12
    assert titles[0] == "cat 0.93: confusion with dog, image 000005"  # the correct dog is no error
    assert titles[1:8] == [f"aeroplane 0.{49 - k}: background, image 000001" for k in range(7)]
    assert all(re.fullmatch(r"\w+: missed, image \d{6}", title) for title in titles[8:])
    np.testing.assert_allclose(boxes[0][-1], [box[0] - 1, box[1] - 1, box[2], box[3]])  # the detection is drawn last
    areas = [np.prod(patches[-1][2:] - patches[-1][:2]) for patches in boxes[8:]]
    every = [row for i in range(len(dataset)) if i != dog for row in dataset.ground_truth(i).tolist() if not row[1]]
    largest = sorted(((row[4] - row[2] + 1) * (row[5] - row[3] + 1) for row in every), reverse=True)[:4]
    np.testing.assert_allclose(areas, largest)
    with Image.open(tmp_path / "worst.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (1200, 1360)


def test_the_sheet_has_more_missed_objects_if_there_are_few_false_positives(tmp_path, monkeypatch):
    dataset = VOCDataset(SAMPLE, [("2007", "tiny")], ANCHORS, 64)
    dataset = dataset.changed(classes=[f"{name} $x_1$" for name in VOC_CLASSES])  # no mathematics
    count, titles, _ = worst_of(monkeypatch, dataset, [[0, 0, 0.9, 1, 1, 2, 2]], tmp_path / "worst.jpg")
    assert count == 12 and titles[0] == "aeroplane $x_1$ 0.90: background, image 000001"
    assert sum("missed" in title for title in titles) == 11


def test_no_sheet_is_drawn_without_errors(trained, tmp_path, monkeypatch, capsys):
    own = {"CHECKPOINT": str(trained / "yolov2.pt"), "OUTPUT": str(tmp_path / "test"), "draw_curves": lambda *_: None}
    set_globals(monkeypatch, test_script, **(DATA | own | {"IMAGE_SETS": [("2007", "one")]}))
    truths = np.array([[0, 11, 0, *A]], float)
    found = np.array([[0, 11, 0.9, *A], [0, 7, 0.39, *A]])  # the wrong one is below the threshold
    monkeypatch.setattr(utils, "detect_dataset", lambda *arguments: (found, truths, {"network": 1.0}))
    (tmp_path / "test_worst.jpg").write_text("of an earlier run")
    test_script.main()
    out = capsys.readouterr().out
    assert "no errors at confidence 0.4 or above" in out
    assert "dog" in out and "cat" in out and "bird" not in out  # without classes that have no truth and no detection
    assert not (tmp_path / "test_worst.jpg").exists()
    assert [row["missed"] for row in read_rows(tmp_path / "test.csv")] == ["0"] * 20 + [""]


# ---------------------------------------------------------------- detect.py


def drawings(folder):
    """The names of what detect.py wrote to a folder, beside its table."""
    return [name for name in os.listdir(folder) if os.fsencode(name) != b"detections.csv"]


def test_detect_reads_images_of_every_mode_and_videos_and_counts_broken_files(trained, tmp_path, monkeypatch, capsys):
    source, photo, turned = tmp_path / "source", Image.open(PHOTO), Image.Exif()
    own = {"SOURCE": str(source), "CHECKPOINT": str(trained / "yolov2.pt"), "OUTPUT_DIR": str(tmp_path / "out")}
    set_globals(monkeypatch, detect, **own, PRECISION="fp32", CONFIDENCE_THRESHOLD=0.0001)
    source.mkdir()
    (source / "a_broken.mp4").write_bytes(b"no video")
    (source / "a_truncated.jpg").write_bytes(PHOTO.read_bytes()[:9000])
    write_clip(source / "b_clip.avi", frames=3, codec="MJPG")
    photo.convert("L").save(source / "grey.png")
    photo.convert("RGBA").save(source / "rgba.png")
    turned[0x0112] = 6  # by 90 degrees
    photo.crop((0, 0, 300, 200)).save(source / "rotated.jpg", exif=turned)
    (source / "notes.txt").write_text("x")
    with pytest.raises(SystemExit, match="2 of 6"):
        detect.main()
    out = capsys.readouterr().out
    assert re.search("skipped 1 .*notes.txt", out) and len(re.findall(r"in \d+ ms", out)) == 3
    assert len(re.findall("error: .*a_broken.mp4: ", out)) == len(re.findall("error: .*a_truncated.jpg", out)) == 1
    assert sorted(drawings(tmp_path / "out")) == ["b_clip.mp4", "grey.jpg", "rgba.jpg", "rotated.jpg"]
    assert len(read_clip(tmp_path / "out" / "b_clip.mp4")[0]) == 3
    assert Image.open(tmp_path / "out" / "rotated.jpg").size == (200, 300)

    for twin, drawing in (("grey.jpg", r"grey\.jpg"), ("b_clip.mp4", r"b_clip\.mp4")):
        shutil.copy(source / "a_truncated.jpg", source / twin)
        with pytest.raises(ValueError, match=rf"{drawing}: 2 files"):
            detect.main()
        (source / twin).unlink()


# ---------------------------------------------------------------- detect.py on videos

COLOUR = np.array(utils.class_colour(1))  # a blue


def square_in_frame(index):
    """Corners x1, y1, x2, y2 of the yellow square. The box around it has lines of two pixels; x1 and y1 are even, x2
    and y2 odd, because a video has one colour per 2 x 2 pixels."""
    return 4 + 2 * index, 18, 25 + 2 * index, 39


def square_frames(count, width=64, height=48):
    """BGR frames of a yellow square that moves to the right on a dark background."""
    frames = np.full((count, height, width, 3), 20, np.uint8)
    for index, frame in enumerate(frames):
        x1, y1, x2, y2 = square_in_frame(index)
        frame[y1:y2, x1:x2] = (40, 230, 230)
    return frames


def write_clip(file, frames=12, rate=12.5, size=(64, 48), codec="mp4v"):
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*codec), rate, size)
    for frame in square_frames(frames, *size):
        writer.write(frame)
    writer.release()


def read_clip(file):
    """The RGB frames of a video and its frame rate."""
    video, frames = cv2.VideoCapture(str(file)), []
    while (grabbed := video.read())[0]:
        frames.append(grabbed[1][:, :, ::-1].astype(int))
    return frames, video.get(cv2.CAP_PROP_FPS)


class SquareDetector(torch.nn.Module):
    """Stands in for a network: raw outputs with a box exactly around the yellow pixels of the image, class 1."""

    calls, error = 0, None  # the error is raised by the fifth call

    def forward(self, images):  # (1, 3, H, W) uint8
        self.calls += 1
        if self.error and self.calls == 5:
            raise self.error
        height, width = images.shape[2:]
        rows, columns = torch.where((images[0, 0] > 128) & (images[0, 2] < 128))
        boxes = torch.empty(0, 4)
        if len(rows):
            corners = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            boxes = box_convert(corners[None] / torch.tensor([width, height] * 2), "xyxy", "cxcywh")
        targets = dataset.encode_targets(boxes, [1] * len(boxes), ANCHORS, height // 32, width // 32)
        return raw_outputs(targets, classes=2)[None]


@pytest.fixture
def squares(tmp_path, monkeypatch):
    """squares(source) runs detect.py with squares.network, a SquareDetector; it writes to out/."""
    network = SquareDetector()
    monkeypatch.setattr(detect, "load_detector", lambda *args, **kwargs: (network, ["a", "b"], ANCHORS, 64))
    set_globals(monkeypatch, detect, OUTPUT_DIR=str(tmp_path / "out"), IMAGE_SIZE=None)

    def detect_in(source):
        monkeypatch.setattr(detect, "SOURCE", str(source))
        detect.main()

    detect_in.network = network
    return detect_in


def is_coloured(pixels):
    return abs(pixels - COLOUR).max(axis=-1) < 70


def check_boxes(frames):
    """Compares the drawn boxes with the squares: the lower edge and half of the sides, which no label covers."""
    for index, frame in enumerate(frames):
        x1, y1, x2, y2 = square_in_frame(index)
        lower = is_coloured(frame[30:])  # (H - 30, W)
        rows, columns = np.where(lower)
        assert abs(np.array([columns.min(), columns.max(), rows.max() + 30]) - (x1, x2, y2)).max() <= 1, index
        assert lower[y2 - 31 : y2 - 29, x1:x2].any(axis=0).all(), index  # without gaps
        assert not lower[: y2 - 32, x1 + 3 : x2 - 2].any(), index  # the box is not filled


CLIPS = [("clip.mp4", "mp4v", 12.5), *(("clip.AVI", "MJPG", rate) for rate in (23.976, 29.97, 119.763, 239.76))]


@pytest.mark.parametrize(("name", "codec", "rate"), CLIPS)
def test_a_video_keeps_size_and_rate_and_gets_a_box_in_each_frame(name, codec, rate, squares, tmp_path, capsys):
    write_clip(tmp_path / name, rate=rate, codec=codec)
    squares(tmp_path / name)
    frames, written_rate = read_clip(tmp_path / "out" / "clip.mp4")
    assert len(frames) == 12 and written_rate == pytest.approx(rate, abs=0.05)
    assert {frame.shape for frame in frames} == {(48, 64, 3)}
    check_boxes(frames)
    assert re.search(rf"{name}: 12 b in 12 frames and \d+\.\d s -> .*clip\.mp4", capsys.readouterr().out)
    assert drawings(tmp_path / "out") == ["clip.mp4"]
    rows = read_rows(tmp_path / "out" / "detections.csv")
    assert [(row["file"], row["frame"], row["class"]) for row in rows] == [
        (str(tmp_path / name), str(number), "b") for number in range(1, 13)
    ]
    for index, row in enumerate(rows):  # the network sees 64 x 64 pixels: a row of the frame is 4/3 of them
        found = [float(row[side]) for side in ("x1", "y1", "x2", "y2")]
        assert found == pytest.approx([*square_in_frame(index)], abs=2), index
        assert 0.9 < float(row["confidence"]) <= 1


def test_a_video_that_ends_early_and_a_file_of_several_pages_say_what_is_missing(squares, tmp_path, capsys):
    write_clip(tmp_path / "clip.avi", codec="MJPG", frames=60)
    content = (tmp_path / "clip.avi").read_bytes()
    (tmp_path / "clip.avi").write_bytes(content[: len(content) // 2])  # an incomplete download
    with pytest.raises(SystemExit):
        squares(tmp_path / "clip.avi")
    frames, declared = map(int, re.search(r"clip\.avi: .* in (\d+) of (\d+) frames", capsys.readouterr().out).groups())
    assert 0 < frames < 60 == declared and len(read_clip(tmp_path / "out/clip.mp4")[0]) == frames
    pages = [Image.fromarray(frame) for frame in square_frames(3)]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    squares(tmp_path / "scan.tif")
    assert "the first of 3 frames" in capsys.readouterr().out


def test_the_odd_last_row_and_column_of_a_video_are_cut_off(squares, tmp_path):
    pictures = [Image.fromarray(frame[:, :, ::-1]) for frame in square_frames(5, 63, 47)]
    source = tmp_path / "odd.mov"  # GIF has odd sizes, and FFmpeg knows it by its content
    pictures[0].save(source, format="GIF", save_all=True, append_images=pictures[1:], duration=40)
    assert read_clip(source)[0][0].shape == (47, 63, 3)
    squares(source)
    frames, rate = read_clip(tmp_path / "out" / "odd.mp4")
    assert len(frames) == 5 and rate == pytest.approx(25) and frames[0].shape == (46, 62, 3)
    check_boxes(frames)


def test_a_video_without_a_frame_is_one_sentence_that_names_it(squares, tmp_path, capfd):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.webm").write_bytes(bytes(range(256)) * 20)
    for name in ("empty.mp4", "noise.webm"):
        with pytest.raises(SystemExit) as stop, utils.plain_errors():
            squares(tmp_path / name)
        assert re.fullmatch(rf"error: .*{name}: .*", stop.value.code)
    assert capfd.readouterr() == ("", "")  # nor any message of FFmpeg
    assert drawings(tmp_path / "out") == []


def test_detect_never_replaces_a_source(squares, tmp_path, monkeypatch):
    picture, clip = tmp_path / "data/street.jpg", tmp_path / "clips/clip.mp4"
    for folder in ("data", "out", "clips"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 40)).save(picture)
    os.link(picture, tmp_path / "out/street.jpg")  # like IMG.JPG and IMG.jpg on macOS: two names, one file
    write_clip(clip, frames=2)
    for source, folder in ((picture, "data"), (picture, "out"), (clip, "clips")):
        before = source.read_bytes()
        monkeypatch.setattr(detect, "OUTPUT_DIR", str(tmp_path / folder))
        with pytest.raises(ValueError, match=rf"{source.name}: "):
            squares(source.parent)
        assert source.read_bytes() == before


def test_ctrl_c_keeps_the_frames_so_far_and_ends_the_run(squares, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_clip(source / name)
    squares.network.error = KeyboardInterrupt()
    squares(source)  # no SystemExit: status 0
    assert f"stopped by Ctrl-C: {tmp_path / 'out' / 'a.mp4'} contains the frames so far" in capsys.readouterr().out
    assert drawings(tmp_path / "out") == ["a.mp4"]
    frames, rate = read_clip(tmp_path / "out" / "a.mp4")
    assert len(frames) == 4 and rate == pytest.approx(12.5)
    check_boxes(frames)


def test_an_error_in_the_middle_of_a_video_leaves_the_older_file(squares, tmp_path):
    write_clip(tmp_path / "clip.mp4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "clip.mp4").write_bytes(b"older")
    squares.network.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        squares(tmp_path / "clip.mp4")
    assert drawings(tmp_path / "out") == ["clip.mp4"]
    assert (tmp_path / "out" / "clip.mp4").read_bytes() == b"older"


def test_a_video_or_folder_that_cannot_be_written_is_an_error_that_names_it(squares, tmp_path, monkeypatch):
    write_clip(tmp_path / "wide.avi", frames=2, size=(8200, 48), codec="MJPG")  # MPEG-4 has at most 8191 columns
    with pytest.raises(ValueError, match=r"wide\.avi: .*8200 x 48 pixels"):
        squares(tmp_path / "wide.avi")
    assert drawings(tmp_path / "out") == []
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(detect, "OUTPUT_DIR", str(tmp_path / "file"))
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'file'}/")):
        squares(tmp_path / "wide.avi")
    assert squares.network.calls <= 2  # found before detecting


def test_a_video_that_does_not_fit_on_the_disk_is_an_error(squares, tmp_path, monkeypatch):
    """OpenCV's writer loses frames without an error then."""
    write_clip(tmp_path / "clip.mp4", frames=3)
    create = cv2.VideoWriter
    writer = types.SimpleNamespace(isOpened=lambda: True, write=lambda frame: None)

    def open_writer(*arguments):
        writer.release = create(*arguments).release
        return writer

    monkeypatch.setattr(cv2, "VideoWriter", open_writer)
    with pytest.raises(OSError, match=r"clip\.mp4: .*0 of 3 frames"):
        squares(tmp_path / "clip.mp4")
    assert drawings(tmp_path / "out") == []


def test_a_folder_of_digits_is_no_camera(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("2024")
    Image.new("RGB", (8, 8)).save("2024/a.png")
    assert detect.find_sources("2024") == [os.path.join("2024", "a.png")] and detect.is_live("2025")


@pytest.mark.parametrize("rate", [0.0, math.nan, -1.0, 90000.0])
def test_a_camera_number_opens_that_camera_and_a_wrong_frame_rate_becomes_25(rate, squares, tmp_path, monkeypatch):
    write_clip(tmp_path / "clip.mp4", frames=3)
    opened, capture = [], cv2.VideoCapture

    def open_capture(source, *backend):
        """The camera's frames are those of a clip; OpenCV's rate is replaced."""
        opened.append(source)
        if source != 3:
            return capture(source, *backend)
        clip = capture(str(tmp_path / "clip.mp4"))
        return types.SimpleNamespace(read=clip.read, get=lambda name: rate if name == cv2.CAP_PROP_FPS else -1.0)

    monkeypatch.setattr(cv2, "VideoCapture", open_capture)
    squares("3")  # SOURCE=3 on the command line
    assert opened[0] == 3
    (name,) = drawings(tmp_path / "out")
    assert re.fullmatch(r"recording_\d{8}_\d{6}\.mp4", name)
    frames, written_rate = read_clip(tmp_path / "out" / name)
    assert len(frames) == 3 and written_rate == pytest.approx(25)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_file_names_may_hold_colons_percent_signs_and_bytes_that_are_not_utf8(squares, tmp_path, monkeypatch, capsys):
    write_clip(tmp_path / "clip.mp4", frames=1)
    Image.new("RGB", (80, 60)).save(tmp_path / "photo.jpg")
    names = [b"10:30.mp4", b"%03d.mp4", b"caf\xe9.mp4", b"photo \xe9.jpg", b"z.jpg"]
    (tmp_path / "source").mkdir()
    for name in names:
        original = "photo.jpg" if name.endswith(b"jpg") else "clip.mp4"
        shutil.copy(tmp_path / original, os.fsencode(tmp_path / "source") + b"/" + name)
    monkeypatch.chdir(tmp_path / "source")
    squares(".")
    assert sorted(drawings(os.fsencode(tmp_path / "out"))) == sorted(names)
    out = capsys.readouterr().out
    assert all(name in out for name in (r"caf\udce9.mp4", r"photo \udce9.jpg", "z.jpg"))


# ---------------------------------------------------------------- command lines


def run_here(script, *words):
    """Runs a script with command-line arguments in this process, where torch is already imported."""
    status, output, errors = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, *words])
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:  # Python prints a string to stderr and exits with status 1
            status = 1 if isinstance(stop.code, str) else stop.code
            errors.write(f"{stop.code}\n" if isinstance(stop.code, str) else "")
    return subprocess.CompletedProcess(words, status, output.getvalue(), errors.getvalue())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("train.py", "DATA_DIR=/nowhere/voc"), "/nowhere/voc"),
        (("train.py", "EPOCHS=many"), "EPOCHS .*'many'"),
        (("train.py", "EPOCHS=0"), "EPOCHS"),
        (("train.py", "IMAGE_SETS=[('2007','one')]", "CLASSES=['cat']"), "000005.xml.*dog"),
        (("test.py", "CHECKPOINT=/nowhere/yolov2.pt"), "/nowhere/yolov2.pt"),
        (("test.py", "OUTPUT=runs/"), "OUTPUT .*'runs/'"),
        (("detect.py", "SOURCE=/nowhere/street.jpg"), "/nowhere/street.jpg"),
        (("dataset.py", "IMAGE_SETS=[('2007','train'"), "IMAGE_SETS must be"),
        (("dataset.py", "IMAGE_SETS=[('2007','nothing')]"), "nothing.txt"),
        (("model.py", "OUTPUT=runs/yolov2.weights"), "OUTPUT .*CHECKPOINT"),
        (("model.py", "CHECKPOINT=/nowhere/yolov2.pt"), "/nowhere/yolov2.pt"),
        (("model.py", "CHECKPOINT=runs/yolov2.pt", "OUTPUT=runs/yolov2.onnx"), "runs/yolov2.onnx: .*OUTPUT"),
        (("model.py", "CHECKPOINT=x.weights", "OUTPUT=./x.weights"), "./x.weights: OUTPUT .*CHECKPOINT"),
        (("model.py", "ANCHORS=[]"), "'ANCHORS'.* CHECKPOINT, OUTPUT, IMAGE_SIZE"),
        (("darknet_model.py", "CHECKPOINT=x.pt", "OUTPUT=x.cfg"), "x.cfg: .*OUTPUT"),
        (("darknet_model.py", "IMAGE_SIZE=0"), "IMAGE_SIZE"),
    ],
)
def test_bad_input_exits_with_a_one_line_error(words, named):
    result = run_here(*words)
    assert result.returncode == 1
    assert re.search(named, result.stderr) and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "script", ["train.py", "test.py", "detect.py", "detect_txt.py", "dataset.py", "model.py", "darknet_train.py"]
)
def test_help_prints_the_settings_as_they_are_in_the_file(script):
    result = run_here(script, "--help")
    *_, settings = result.stdout.strip().partition("NAME=value):\n\n")
    assert result.returncode == 0 and settings in (ROOT / script).read_text()
    assert re.search("^[A-Z_]+ = .*  # ", settings, re.MULTILINE) and "def " not in settings


def test_model_py_and_darknet_model_py_refuse_checkpoints_of_the_other_network(trained, tmp_path):
    state = Darknet19(num_classes=3).state_dict()
    utils.save_checkpoint(tmp_path / "classifier.pt", model=state, classes=["a", "b", "c"], image_size=64)
    for script, file in (("model.py", tmp_path / "classifier.pt"), ("darknet_model.py", trained / "yolov2.pt")):
        result = run_here(script, f"CHECKPOINT={file}", f"OUTPUT={tmp_path}/x.weights")
        assert result.returncode == 1 and f"{file}: " in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("x*"))


def test_model_py_and_darknet_model_py_print_their_layers(trained):
    result = run_here("model.py", "IMAGE_SIZE=96")
    assert result.returncode == 0, result.stderr
    assert re.search(r"28  output +convolution +1x1 +125 x 3 x 3 ", result.stdout)
    result = run_here("model.py", f"CHECKPOINT={trained / 'yolov2.pt'}")
    assert re.search(r"28  output +convolution +1x1 +125 x 2 x 2 ", result.stdout)  # trained at 64 px
    result = run_here("darknet_model.py")
    assert re.search(r"24  classifier +convolution +1x1 +1000 x 7 x 7 +1,025,000 +0\.100\n +total ", result.stdout)


def test_model_py_writes_the_files_of_a_training_run(trained, tmp_path):
    result = run_here("model.py", f"CHECKPOINT={trained / 'yolov2.pt'}", f"OUTPUT={tmp_path}/new/yolov2.weights")
    assert result.returncode == 0, result.stderr
    assert "20 classes, 16 images seen" in result.stdout
    assert all(f"{name}={tmp_path}/new/yolov2." in result.stdout for name in ("CHECKPOINT", "CLASSES", "ANCHORS"))
    assert "IMAGE_SIZE=64\n" in result.stdout
    assert (tmp_path / "new" / "yolov2.names").read_text().split() == list(VOC_CLASSES)
    model, *_ = load_detector(tmp_path / "new" / "yolov2.weights", VOC_CLASSES)
    expected, *_ = load_detector(trained / "yolov2.pt")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), expected(images))


def run(*words):
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two such processes share two cores
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=300
    )


def train_and_detect(folder):
    words = ["IMAGE_SETS=[('2007','one')]", "IMAGE_SIZE=64", "EPOCHS=1", "REPEAT=2", "BATCH_SIZE=2", "NUM_WORKERS=1"]
    yield run("train.py", *words, "VAL_IMAGE_SETS=[]", f"CHECKPOINT={folder}/y.pt")
    yield run("detect.py", f"CHECKPOINT={folder}/y.pt", f"OUTPUT_DIR={folder}/d", f"SOURCE={PHOTO}")


def import_without_network():
    guard = (
        "import socket\ndef refuse(*a, **k): raise SystemExit('network')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
    )
    return run("-c", guard + "import train, test, detect, dataset")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Everything that needs a separate process, two at a time: importing torch takes seconds, on one core."""
    folder = tmp_path_factory.mktemp("processes")
    with ThreadPoolExecutor(2) as pool:
        yield {
            "folder": folder,
            "train and detect": pool.submit(lambda: list(train_and_detect(folder))),
            "import": pool.submit(import_without_network),
        }


def test_scripts_run_from_the_command_line(processes):
    trained, detected = processes["train and detect"].result()
    assert trained.returncode == 0, trained.stderr
    values = r"learning_rate \S+  coord \S+  object \S+  no_object \S+  class \S+  prior \S+  total \S+  "
    assert re.match(f"epoch 1  {values}", trained.stdout.strip().splitlines()[-1])
    assert detected.returncode == 0, detected.stderr
    assert sorted(os.listdir(processes["folder"] / "d")) == ["000005.jpg", "detections.csv"]


def test_importing_the_scripts_does_not_use_the_network(processes):
    """albumentations looks for its newest version unless NO_ALBUMENTATIONS_UPDATE is set."""
    result = processes["import"].result()
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------- detect_txt.py


def test_the_files_of_detect_txt_give_the_average_precisions_of_test(trained, tmp_path, monkeypatch, capsys):
    """Both forms hold unrounded boxes."""
    common = {"CHECKPOINT": str(trained / "yolov2.pt"), "CONFIDENCE_THRESHOLD": 1e-4, **DATA}
    set_globals(monkeypatch, test_script, OUTPUT=str(tmp_path / "test"), **common)
    set_globals(monkeypatch, detect_txt, OUTPUT_DIR=str(tmp_path), **common)
    for name in ("draw_curves", "draw_worst"):  # they take three seconds
        monkeypatch.setattr(test_script, name, lambda *arguments: None)
    test_script.main()
    detect_txt.main()
    ids = (SAMPLE / "VOC2007" / "ImageSets" / "Main" / "tiny.txt").read_text().split()
    assert sorted(file.stem for file in (tmp_path / "detections").iterdir()) == ids
    assert sorted(file.stem for file in (tmp_path / "groundtruths").iterdir()) == ids

    truths, per_image, per_class = [], [], []
    for index, name in enumerate(ids):
        for line in (tmp_path / "groundtruths" / f"{name}.txt").read_text().splitlines():
            label, *box = line.split()
            truths.append([index, VOC_CLASSES.index(label), 0, *map(float, box)])
        for line in (tmp_path / "detections" / f"{name}.txt").read_text().splitlines():
            label, *numbers = line.split()
            per_image.append([index, VOC_CLASSES.index(label), *map(float, numbers)])
    for label, name in enumerate(VOC_CLASSES):
        for line in (tmp_path / f"comp4_det_test_{name}.txt").read_text().splitlines():
            image, *numbers = line.split()
            per_class.append([ids.index(image), label, *map(float, numbers)])
    assert sorted(per_class) == sorted(per_image)

    dataset = VOCDataset(SAMPLE, [("2007", "tiny")], ANCHORS, 64)
    difficult = [[i, *row] for i in range(len(dataset)) for row in dataset.ground_truth(i).tolist() if row[1]]
    assert difficult  # the list has some, and by default the files leave them out
    *rows, mean = read_rows(tmp_path / "test.csv")
    expected = [float(row["ap_all"]) for row in rows]
    assert mean["class"] == "mAP" and float(mean["ap_all"]) == pytest.approx(np.nanmean(expected))
    found = utils.average_precision(per_class, [*truths, *difficult], 20).numpy()
    assert np.nanmax(expected) > 0
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_detect_txt_refuses_files_that_another_run_left(trained, tmp_path, monkeypatch):
    own = {"CHECKPOINT": str(trained / "yolov2.pt"), "OUTPUT_DIR": str(tmp_path), "CONFIDENCE_THRESHOLD": 1.0}
    set_globals(monkeypatch, detect_txt, **DATA, **own)
    detect_txt.main()
    assert all(file.read_text() == "" for file in (tmp_path / "detections").iterdir())  # none is above 1

    detect_txt.main()  # the same images again
    stray = tmp_path / "groundtruths" / "street.txt"  # of a run over other images
    stray.write_text("cat 1 1 9 9\n")
    monkeypatch.setattr(utils, "detect_dataset", None)  # refused before the detection
    with pytest.raises(ValueError, match="street.txt: .*OUTPUT_DIR"):
        detect_txt.main()
    assert stray.read_text() == "cat 1 1 9 9\n"


def run_perfect_detector(monkeypatch, root, image_sets, classes, **options) -> list[dict]:
    """coco_results.json of a detector that finds every object that is not difficult, with confidence sigmoid(4)."""
    data = VOCDataset(root, image_sets, ANCHORS, 128, classes, **options)
    monkeypatch.setattr(detect_txt, "load_detector", lambda *_, **__: (PerfectDetector(data, 4), classes, ANCHORS, 128))
    own = {"DATA_DIR": str(root), "IMAGE_SETS": image_sets, "BATCH_SIZE": 1, "OUTPUT_DIR": str(root / "out")}
    set_globals(monkeypatch, detect_txt, **(DATA | own))
    detect_txt.main()
    return json.loads((root / "out/coco_results.json").read_text())


SETS = ["annotations/instances_val2017.json"]


def write_val2017(root, boxes, numbers=(30, 7), **options) -> Path:
    """The images `numbers` of val2017/ (200 x 160 pixels) and their COCO file, with the categories 18, 3 and 90."""
    images = [(number, f"{number:012d}.png") for number in numbers]
    names = {18: "dog", 3: "car", 90: "toothbrush"}
    return write_coco(root, images, boxes, names, SETS[0], (200, 160), "val2017", **options)


COCO_BOXES = [
    (30, 18, [10, 20, 40, 60], 0),
    (30, 3, [150.5, 100.25, 49.5, 59.75], 0),  # up to the right and lower border
    (7, 90, [0, 0, 9.5, 12], 0),  # at the left and upper border
    (7, 90, [100, 40, 60, 30], 1),
    (7, 3, [60, 90, 100, 30], 0),
]


@pytest.mark.parametrize("declared", [None, (400, 320)])
def test_coco_results_have_the_ids_and_boxes_of_the_coco_file(declared, tmp_path, monkeypatch):
    """The detector's classes have another order than the file's categories, and one more. Boxes are in pixels of the
    size that the file declares."""
    write_val2017(tmp_path, COCO_BOXES, declared=declared)
    classes = ["zebra", "toothbrush", "car", "dog"]
    results = run_perfect_detector(monkeypatch, tmp_path, SETS, classes)
    found = sorted((row["image_id"], row["category_id"], row["bbox"]) for row in results)
    expected = sorted((image, category, box) for image, category, box, crowd in COCO_BOXES if not crowd)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[2] for row in found], [row[2] for row in expected], atol=0.002)
    assert {row["score"] for row in results} == {round(1 / (1 + math.exp(-4)), 6)}
    if declared is None:  # the size of the image
        truths = (tmp_path / "out/groundtruths/000000000030.txt").read_text().splitlines()
        assert truths == ["dog 11 21 51 81", "car 151.500000 101.250000 200 160"]


def test_coco_results_of_other_data_sets_have_file_names_and_class_numbers(tmp_path, monkeypatch):
    Image.new("RGB", (200, 160)).save(tmp_path / "street.png")
    (tmp_path / "street.txt").write_text("1 .5 .5 .25 .5\n")
    (tmp_path / "val.csv").write_text("street.png,street.txt\n")
    (result,) = run_perfect_detector(monkeypatch, tmp_path, ["val.csv"], ["cat", "dog"])
    assert (result["image_id"], result["category_id"]) == ("street", 2)
    np.testing.assert_allclose(result["bbox"], [75, 40, 50, 80], atol=0.002)


def test_classes_that_the_coco_file_lacks_are_left_out_of_its_results(tmp_path, monkeypatch):
    write_val2017(tmp_path, [])
    set_globals(monkeypatch, detect_txt, DATA_DIR=str(tmp_path), IMAGE_SETS=SETS)
    sample = VOCDataset(tmp_path, SETS, ANCHORS, 64, ["zebra", "dog"]).samples[0]
    detections = np.array([[0, 0, 0.9, 1, 1, 11, 11], [0, 1, 0.8, 1, 1, 200, 51]])
    assert detect_txt.coco_results(detections, [sample], ["zebra", "dog"]) == [
        {"image_id": 30, "category_id": 18, "bbox": [0.0, 0.0, 200.0, 50.0], "score": 0.8}
    ]


def test_frames_of_the_same_name_get_files_with_their_folder_and_the_same_id_twice_is_refused(tmp_path, monkeypatch):
    for name, number in (("one", 30), ("two", 7), ("three", 30)):
        write_coco(tmp_path / name, [(number, "frame.png")], [(number, 3, [9, 9, 50, 50])], {3: "car"})
    results = run_perfect_detector(monkeypatch, tmp_path, ["one/train.json", "two/train.json"], ["car"])
    assert {row["image_id"] for row in results} == {30, 7}
    for folder in ("detections", "groundtruths"):
        assert sorted(os.listdir(tmp_path / "out" / folder)) == ["one_frame.txt", "two_frame.txt"]
    with pytest.raises(ValueError, match=r"IMAGE_SETS.*\bid 30"):
        run_perfect_detector(monkeypatch, tmp_path, ["one/train.json", "three/train.json"], ["car"])


@pytest.mark.parametrize("form", ["devkit", "coco"])
def test_detections_are_written_for_images_without_annotations(form, trained, tmp_path, monkeypatch, capsys):
    if form == "coco":
        write_val2017(tmp_path, None)
    else:
        shutil.rmtree(write_devkit(tmp_path, {"a": [], "b": []}) / "Annotations")
    image_sets, named = (SETS, "val2017.json") if form == "coco" else ([("2026", "train")], "a.xml")
    assert run_perfect_detector(monkeypatch, tmp_path, image_sets, ["car"], tolerate=["missing labels"]) == []
    assert "no ground truth is written" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == ["coco_results.json", "comp4_det_test_car.txt", "detections"]
    files = {"CHECKPOINT": str(trained / "yolov2.pt"), "OUTPUT": str(tmp_path / "test")}
    set_globals(monkeypatch, test_script, **(DATA | files | {"DATA_DIR": str(tmp_path), "IMAGE_SETS": image_sets}))
    with pytest.raises((FileNotFoundError, ValueError), match=named):
        test_script.main()


def test_pycocotools_gives_a_perfect_detector_an_average_precision_of_1(tmp_path, monkeypatch):
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    file = write_val2017(tmp_path, COCO_BOXES)
    run_perfect_detector(monkeypatch, tmp_path, SETS, ["dog", "toothbrush", "car"])
    truths = coco.COCO(str(file))
    evaluation = cocoeval.COCOeval(truths, truths.loadRes(str(tmp_path / "out/coco_results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == 1  # mean over the IoU thresholds .5, .55 .. .95


# ---------------------------------------------------------------- images/walkthrough.py


def test_the_walkthrough_draws_what_the_network_says(trained, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("walkthrough", ROOT / "images" / "walkthrough.py")
    walkthrough = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(walkthrough)
    figures, save = [], walkthrough.plt.Figure.savefig
    monkeypatch.setattr(
        walkthrough.plt.Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))
    )
    own = {"CHECKPOINT": str(trained / "yolov2.pt"), "FOLDER": str(tmp_path), "THRESHOLD": 0.0}
    set_globals(monkeypatch, walkthrough, **own)
    walkthrough.main()
    for name in ("walkthrough_1.png", "walkthrough_2.png"):
        assert Image.open(tmp_path / name).size == Image.open(ROOT / "images" / name).size
    texts = [text.get_text() for figure in figures for text in figure.findobj(matplotlib.text.Text)]
    assert [title.split("  ")[0] for title in texts if re.match(r"\d  ", title)] == list("12345678")
    data = VOCDataset(SAMPLE, [("2007", "tiny")], ANCHORS, 64)
    index = [sample.image_id for sample in data.samples].index("000007")
    objects = data[index][1][..., 3:5][data[index][1][..., 0] > 0]  # (M, 2) width and height in cells
    assert f"{len(objects)} objects" in capsys.readouterr().out
    for anchor, iou in enumerate(dataset.shape_iou(objects, ANCHORS)[objects.prod(dim=1).argmax()].tolist()):
        assert f"{anchor}: {iou:.2f}" in texts
    model, *_ = load_detector(trained / "yolov2.pt")
    outputs = model(data[index][0][None])
    for overlap, text in zip((1.0, 0.45), [text for text in texts if " boxes. " in text], strict=True):
        assert text.startswith(f"{len(utils.postprocess(outputs, ANCHORS, 0.0, overlap)[0])} boxes. ")


# ---------------------------------------------------------------- README.md


def test_the_readme_names_existing_files_and_settings():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    for name in [*links, *re.findall(r"`(\w+\.py)`", text)]:
        assert name == "voc_label.py" or (ROOT / name).exists(), name  # Darknet's
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        scripts = re.findall(r"(?<![/\w])\w+\.py", block)
        settings = "".join(utils.settings_block({"__file__": ROOT / name}) for name in scripts)
        known = set(re.findall("^([A-Z_]+) = ", settings, re.MULTILINE))
        used = set(re.findall(r"""[\s"(]([A-Z][A-Z_]+)=""", block))
        assert used <= known, used - known


def test_the_python_of_the_readme_detects_on_an_array(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "data_samples").symlink_to(ROOT / "data_samples")
    (tmp_path / "runs").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    found = {}
    exec(code.replace("0.4, 0.45", "0.0001, 0.45"), found)  # the network is trained for a few steps only
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("PRECISION")]
    assert lines and all(re.match(r"[a-z]+ 0\.\d+(e-\d+)? \[", line) for line in lines)
    assert found["image"].shape == (375, 500, 3)
