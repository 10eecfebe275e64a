"""Shared by the tests: writers of small data sets, and fixtures that make training runs cheap (an eighth of the
channels, one thread, no charts)."""

import contextlib
import json
from pathlib import Path

import pytest
import run_narrow
import torch
from PIL import Image

import darknet_model
import utils


def set_globals(monkeypatch, script, **values):
    for name, value in values.items():
        monkeypatch.setattr(script, name, value)


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


def write_coco(
    root: Path, images, annotations, names: dict, name="train.json", size=(100, 80), folder="", declared=None
) -> Path:
    """Writes a COCO file, and its images into `folder`, and returns the file. images are rows (id, file name),
    annotations rows (image id, category id, bbox[, iscrowd]), names maps category ids to class names."""
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    width, height = declared or size
    content = {
        "images": [{"id": key, "file_name": image, "width": width, "height": height} for key, image in images],
        "categories": [{"id": key, "name": category} for key, category in names.items()],
        "annotations": [
            {"id": n, "image_id": row[0], "category_id": row[1], "bbox": row[2], "iscrowd": (*row, 0)[3]}
            for n, row in enumerate(annotations, 500)
        ],
    }
    for number, (_, image) in enumerate(images):
        (root / folder / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (40 * number % 256, 90, 160)).save(root / folder / image)
    file.write_text(json.dumps(content))
    return file


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
