"""Shared by the tests: writers of small data sets, networks that find every object, and fixtures that make training
runs cheap (an eighth of the channels, one thread, no charts)."""

import contextlib
import json
import signal
from pathlib import Path

import pytest
import run_narrow
import torch
from PIL import Image

import darknet_model
import model as yolov2_model
import utils
from model import ANCHORS


def set_globals(monkeypatch, script, **values):
    for name, value in values.items():
        monkeypatch.setattr(script, name, value)


def assert_equal(one, other, path=""):
    """Nested dicts, lists, tuples and tensors are equal to the last bit."""
    assert type(one) is type(other), path
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


# ---------------------------------------------------------------- data sets


def voc_xml(objects, size=(100, 80)) -> str:
    """A VOC annotation; objects are rows (class name, (xmin, ymin, xmax, ymax)[, difficult]); size=None omits it."""
    text = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for name, box, *difficult in objects:
        sides = "".join(
            f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        flag = difficult[0] if difficult else 0
        text += f"<object><name>{name}</name><difficult>{flag}</difficult><bndbox>{sides}</bndbox></object>"
    return f"<annotation>{text}</annotation>"


def write_devkit(root: Path, files: dict, size=(100, 80), suffix=".jpg", year="2026", name="train") -> Path:
    """Writes the devkit VOC<year> and its list, and returns its folder; `files` maps each image id to the text of its
    annotation, or to the objects of one (see voc_xml). A second call adds another list to it."""
    folder = root / f"VOC{year}"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number, (image_id, xml) in enumerate(files.items()):
        Image.new("RGB", size, (40 * number % 256, 90, 160)).save(folder / f"JPEGImages/{image_id}{suffix}")
        (folder / f"Annotations/{image_id}.xml").write_text(xml if isinstance(xml, str) else voc_xml(xml, size))
    (folder / f"ImageSets/Main/{name}.txt").write_text("".join(f"{image_id}\n" for image_id in files))
    return folder


def write_coco(root, images, annotations, names, name="train.json", size=(100, 80), folder="", declared=None) -> Path:
    """Writes a COCO file, and its images into `folder`, and returns the file. images are rows (id, file name),
    annotations rows (image id, category id, bbox[, iscrowd]) or None, names maps category ids to class names."""
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    width, height = declared or size
    content = {
        "images": [{"id": key, "file_name": image, "width": width, "height": height} for key, image in images],
        "categories": [{"id": key, "name": category} for key, category in names.items()],
        "annotations": [
            {"id": n, "image_id": row[0], "category_id": row[1], "bbox": row[2], "iscrowd": (*row, 0)[3]}
            | {"area": row[2][2] * row[2][3]}
            for n, row in enumerate(annotations or [], 500)
        ],
    }
    if annotations is None:
        del content["annotations"]
    for number, (_, image) in enumerate(images):
        (root / folder / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (40 * number % 256, 90, 160)).save(root / folder / image)
    file.write_text(json.dumps(content))
    return file


# ---------------------------------------------------------------- networks and runs


def raw_outputs(targets: torch.Tensor, classes: int, t_o=20.0) -> torch.Tensor:
    """The network's outputs (A, S_h, S_w, 5 + C) that decode to the targets (A, S_h, S_w, 6): the inverse of YOLO9000
    Fig. 3, t_x = ln(x / (1 - x)), t_w = ln(w / p_w), with the logit t_o at objects, -20 elsewhere."""
    objectness, x, y, w, h, label = targets.double().unbind(-1)
    p_w, p_h = torch.tensor(ANCHORS, dtype=torch.float64).T[:, :, None, None]
    raw = torch.zeros(*targets.shape[:3], 5 + classes)
    values = (torch.logit(x, 1e-6), torch.logit(y, 1e-6), torch.log(w / p_w), torch.log(h / p_h))
    raw[..., :4] = torch.where(objectness[..., None] > 0, torch.stack(values, dim=-1), 0)
    raw[..., 4] = torch.where(objectness > 0, t_o, -20)
    raw[..., 5:] = 20.0 * torch.nn.functional.one_hot(label.long(), classes)
    return raw


def load_detector(file, classes=(), anchors=()):
    return yolov2_model.load_detector(file, list(classes), list(anchors), torch.device("cpu"), "fp32")


class PerfectDetector(torch.nn.Module):
    """Returns the raw outputs that decode to the targets of a data set, batch by batch."""

    def __init__(self, data, t_o=20.0):
        super().__init__()
        self.data, self.t_o, self.seen, self.unused = data, t_o, 0, torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        targets = [self.data[self.seen + number][1] for number in range(len(images))]
        self.seen += len(images)
        return torch.stack([raw_outputs(each, len(self.data.classes), self.t_o) for each in targets])


@contextlib.contextmanager
def handlers_kept():
    """Restores pytest's signal handlers, which the scripts, torchrun's agent and run_narrow replace."""
    changed = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in changed}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    monkeypatch.setattr(utils, "draw_charts", lambda rows, chart_file: None)


@pytest.fixture(scope="module")
def fork_server():
    """Imports the scripts once for all multi-process tests, in the background while the first tests run."""
    run_narrow.start_fork_server()
