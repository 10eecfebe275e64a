"""The data sets: reading, targets, augmentation, batches, anchors, and the errors for bad input."""

import ast
import colorsys
import io
import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import albumentations
import cv2
import numpy as np
import pytest
import torch
from conftest import PerfectDetector, raw_outputs, set_globals, voc_xml, write_coco, write_devkit
from PIL import Image

import dataset
import train
import utils
from dataset import VOC_CLASSES, VOCDataset
from model import ANCHORS

SAMPLE = Path(__file__).resolve().parent.parent / "data_samples" / "voc"
CAT, DOG, PERSON = (VOC_CLASSES.index(name) for name in ("cat", "dog", "person"))
CATEGORIES = {"dog": 11, "cat": 21, "unicorn": 31}  # class name -> id in COCO files


def open_devkit(root: Path, files: dict, **options) -> VOCDataset:
    """The data set of a devkit of 100 x 80 images; files as in conftest.write_devkit."""
    write_devkit(root, files)
    return VOCDataset(root, [("2026", "train")], ANCHORS, **{"image_size": 64, **options})


def open_picture(root: Path, picture: np.ndarray, objects=(), **options) -> VOCDataset:
    """The data set of one picture (H, W, 3), with objects as in conftest.voc_xml."""
    folder = write_devkit(root, {"a": list(objects)}, size=picture.shape[1::-1])
    Image.fromarray(picture).save(folder / "JPEGImages/a.jpg", quality=95, subsampling=0)
    return VOCDataset(root, [("2026", "train")], ANCHORS, **{"image_size": 64, "augment": True, **options})


def open_coco(root: Path, images, annotations, names=None, changes=(), **options) -> VOCDataset:
    """The data set of a COCO file; images, annotations and names as in conftest.write_coco; changes: rows (table,
    number, values) with new values in the file, None to remove a key."""
    file = write_coco(root, images, annotations, names or {key: name for name, key in CATEGORIES.items()})
    content = json.loads(file.read_text())
    for table, number, values in changes:
        row = content[table][number] | values
        content[table][number] = {key: value for key, value in row.items() if value is not None}
    file.write_text(json.dumps(content))
    return VOCDataset(root, ["train.json"], ANCHORS, **{"image_size": 64, **options})


def open_yolo(root: Path, text: str, *names: str, **options) -> VOCDataset:
    """The data set of images in root that share one YOLO label file."""
    (root / "a.txt").write_text(text)
    (root / "list.csv").write_text("".join(f"{name},a.txt\n" for name in names))
    return VOCDataset(root, ["list.csv"], ANCHORS, **{"image_size": 64, **options})


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def boxes_in_pixels(targets: torch.Tensor, image_size: int) -> torch.Tensor:
    """Encoded targets (A, S_h, S_w, 6) -> xyxy boxes (M, 4) in pixels of the network's input."""
    _, row, column = torch.nonzero(targets[..., 0], as_tuple=True)
    _, x, y, w, h, _ = targets[targets[..., 0] > 0].T
    centre_x, centre_y, cell = column + x, row + y, image_size / targets.shape[2]
    return torch.stack([centre_x - w / 2, centre_y - h / 2, centre_x + w / 2, centre_y + h / 2], dim=1) * cell


# ---------------------------------------------------------------- encoding of targets


@pytest.mark.parametrize(("grid_height", "grid_width"), [(13, 13), (10, 19)])
def test_decoding_inverts_the_encoding(grid_height, grid_width):
    rng = np.random.default_rng(0)
    sizes = rng.uniform(0.02, 0.6, (12, 2))
    boxes = np.concatenate([rng.uniform(0.05, 0.95, (12, 2)), sizes], axis=1)
    labels = rng.integers(0, 20, 12)
    targets = dataset.encode_targets(boxes, labels, ANCHORS, grid_height, grid_width)
    assert targets.shape == (5, grid_height, grid_width, 6) and targets.dtype == torch.float32
    assert targets[..., 0].sum() == 12  # no two of these share a slot
    decoded, confidence, probabilities = utils.decode_predictions(raw_outputs(targets, 20)[None], ANCHORS)

    found = confidence > 0.5
    assert found.sum() == 12
    rows = np.concatenate([decoded[found].numpy(), probabilities[found].argmax(1, keepdim=True).numpy()], axis=1)
    expected = np.concatenate([boxes, labels[:, None]], axis=1)
    np.testing.assert_allclose(rows[np.argsort(rows[:, 0])], expected[np.argsort(expected[:, 0])], atol=1e-5)


def test_encoding_by_hand():
    # centre (.3, .55), size .2 x .4 on 10 columns and 4 rows: x = 3.0, y = 2.2, w = 2.0, h = 1.6 in cells
    targets = dataset.encode_targets([[0.3, 0.55, 0.2, 0.4]], [7], [(2, 1.5)], 4, 10)
    assert targets[..., 0].sum() == 1
    np.testing.assert_allclose(targets[0, 2, 3].numpy(), [1, 0, 0.2, 2, 1.6, 7], atol=1e-6)


def test_the_later_of_two_objects_in_one_slot_wins():
    boxes = [[0.5, 0.5, 0.1, 0.1], [0.51, 0.51, 0.1, 0.1]]
    targets = dataset.encode_targets(boxes, [3, 7], [(1, 1)], 13, 13)
    assert targets[..., 0].sum() == 1
    x, w = 0.51 * 13 - 6, 0.1 * 13
    np.testing.assert_allclose(targets[0, 6, 6].numpy(), [1, x, x, w, w, 7], atol=1e-6)
    assert dataset.encode_targets(boxes[::-1], [7, 3], [(1, 1)], 13, 13)[0, 6, 6, 5] == 3
    # objects of different shapes in one cell have slots of their own
    boxes = [[0.5, 0.5, 0.1, 0.4], [0.5, 0.5, 0.4, 0.1]]
    targets = dataset.encode_targets(boxes, [3, 7], [(1.3, 5.2), (5.2, 1.3)], 13, 13)
    assert targets[:, 6, 6, 0].tolist() == [1, 1] and targets[:, 6, 6, 5].tolist() == [3, 7]


@pytest.mark.parametrize("boxes", [[], np.empty((0, 4)), torch.empty(0, 4)])
def test_without_objects_the_targets_are_zero(boxes):
    targets = dataset.encode_targets(boxes, [], ANCHORS, 3, 4)
    assert targets.shape == (5, 3, 4, 6) and not targets.any()


@pytest.mark.parametrize(("centre", "cell"), [((1, 0.5), (1, 3)), ((0.5, 1), (2, 2)), ((1, 1), (2, 3))])
def test_a_centre_on_the_border_of_the_image_belongs_to_the_cell_inside_it(centre, cell):
    # 3 rows, 4 columns; x = offset + column must still be the centre: 1.0 * 4 = 1 + 3
    targets = dataset.encode_targets([[*centre, 0.2, 0.2]], [0], [(1, 1)], 3, 4)
    row, column = cell
    assert targets[0, row, column, 0] == 1
    assert targets[0, row, column, 1] + column == pytest.approx(centre[0] * 4)
    assert targets[0, row, column, 2] + row == pytest.approx(centre[1] * 3)


def test_an_object_is_assigned_to_the_anchor_of_its_shape():
    for number, (w, h) in enumerate(ANCHORS):
        targets = dataset.encode_targets([[0.5, 0.5, w / 13, h / 13]], [0], ANCHORS, 13, 13)
        assert targets[:, 6, 6, 0].argmax() == number
    # 3 x 3 cells against 1 x 9 (IoU 3 / (9 + 9 - 3) = .2) and 2 x 2 (4 / 9): the shape decides, not the area
    targets = dataset.encode_targets([[0.5, 0.5, 0.3, 0.3]], [0], [(1, 9), (2, 2)], 10, 10)
    assert targets[:, 5, 5, 0].tolist() == [0, 1]
    np.testing.assert_allclose(dataset.shape_iou(np.array([[3.0, 3]]), np.array([[1.0, 9], [2, 2]])), [[0.2, 4 / 9]])


# ---------------------------------------------------------------- reading


def test_samples_are_uint8_images_and_targets():
    data = VOCDataset(SAMPLE, [("2007", "tiny")], ANCHORS, image_size=96)
    assert len(data) == len((SAMPLE / "VOC2007/ImageSets/Main/tiny.txt").read_text().split())
    images = data.images(list(range(len(data))))
    for index, sample in enumerate(data.samples):
        image, targets = data[index]
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8 and image.max() > 128
        assert targets.shape == (5, 3, 3, 6) and targets.dtype == torch.float32
        assert 1 <= targets[..., 0].sum() <= len(data.ground_truth(index))
        assert sample.size == Image.open(SAMPLE / f"VOC2007/JPEGImages/{sample.image_id}.jpg").size
        assert torch.equal(images[index], image)


def test_image_sets_are_concatenated_and_a_changed_data_set_leaves_the_original_as_it_is():
    sets = [("2007", "one"), ("2007", "tiny")]
    one, tiny, both = (VOCDataset(SAMPLE, each, ANCHORS, 64, augment=True) for each in (sets[:1], sets[1:], sets))
    assert [sample.image_id for sample in both.samples] == [s.image_id for s in one.samples + tiny.samples]
    assert both[0][0].shape == (3, 64, 64) and both.changed(image_size=96)[0][0].shape == (3, 96, 96)
    other = both.changed(augment=False, samples=both.samples[-3:])
    assert len(other) == 3 < len(both) and both.augment and both[0][0].shape == (3, 64, 64)
    assert torch.equal(other[2][0], VOCDataset(SAMPLE, sets[1:], ANCHORS, 64)[len(tiny) - 1][0])


def test_ground_truth_is_in_the_pixels_of_the_annotation_and_targets_in_grid_cells(tmp_path):
    """Difficult objects are ground truth but not targets. Devkit pixels 21..71 x 11..51 of 100 x 80 are .2 to .7 of
    the width and .125 to .625 of the height: centre .45, .375 -> .9, .75 of 2 x 2 cells; size .5, .5 -> 1 x 1 cells."""
    data = open_devkit(tmp_path, {"000007": [("person", (1, 2, 100, 80), 1), ("cat", (21, 11, 71, 51))]})
    rows = data.ground_truth(0)
    assert rows.tolist() == [[PERSON, 1, 1, 2, 100, 80], [CAT, 0, 21, 11, 71, 51]]  # to the last bit
    assert rows.dtype == torch.float64 and data.samples[0].image_id == "000007" and not data.samples[0].doubts
    targets = data[0][1]
    assert targets[..., 0].sum() == 1
    np.testing.assert_allclose(targets[0, 0, 0].numpy(), [1, 0.9, 0.75, 1, 1, CAT], atol=1e-5)


@pytest.mark.parametrize("augment", [False, True])
def test_the_targets_of_an_image_without_objects_are_zero(tmp_path, augment):
    data = open_devkit(tmp_path, {"a": [], "b": [("dog", (5, 5, 20, 20), 1)]}, augment=augment)  # b: a difficult one
    assert data.ground_truth(0).shape == (0, 6)
    for index in (0, 1):
        image, targets = data[index]
        assert image.shape == (3, 64, 64) and targets.shape == (5, 2, 2, 6) and not targets.any()


def yolo_line(name: str, x1, y1, x2, y2) -> str:
    label = 20 if name == "unicorn" else VOC_CLASSES.index(name)
    return f"{label} {(x1 + x2) / 200!r} {(y1 + y2) / 160!r} {(x2 - x1) / 100!r} {(y2 - y1) / 80!r}\n"


def test_the_same_boxes_in_all_formats_give_the_same_targets_and_ground_truth(tmp_path):
    """x = 10, w = 20 of COCO are .1 to .3 of 100 pixels, and devkit pixels 11 to 31: an edge is 1 + its distance from
    the border (Darknet's voc_label.py and detector.c). The box at the right and lower border ends at 101, 81."""
    boxes = {"a": [("dog", (10, 20, 20, 40)), ("cat", (50.5, 8, 12.25, 16))], "b": [], "c": [("cat", (60, 40, 40, 40))]}
    devkit, images, annotations, xml_list, txt_list = {}, [], [], "image,label\n", ""
    for number, (name, rows) in enumerate(boxes.items(), start=7):
        devkit[name] = [(label, (x + 1, y + 1, x + w + 1, y + h + 1)) for label, (x, y, w, h) in rows]
        images.append((number, f"{name}.jpg"))
        annotations += [(number, CATEGORIES[label], box) for label, box in rows]
        lines = [yolo_line(label, x, y, x + w, y + h) for label, (x, y, w, h) in rows]
        (tmp_path / f"{name}.txt").write_text("".join(lines) or "\n")
        xml_list += f"VOC2026/JPEGImages/{name}.jpg,VOC2026/Annotations/{name}.xml\n"
        txt_list += f"VOC2026/JPEGImages/{name}.jpg, {name}.txt\n\n"
    (tmp_path / "xml.csv").write_text(xml_list)
    (tmp_path / "yolo.csv").write_text(txt_list)

    from_json = open_coco(tmp_path / "VOC2026/JPEGImages", images, annotations)
    others = [open_devkit(tmp_path, devkit)]
    others += [VOCDataset(tmp_path, [name], ANCHORS, image_size=64) for name in ("xml.csv", "yolo.csv")]
    np.testing.assert_allclose(from_json.samples[0].labels[0], [DOG, 0, 0.1, 0.25, 0.3, 0.75], atol=1e-12)
    assert from_json.ground_truth(0)[0].tolist() == [DOG, 0, 11, 21, 31, 61]
    assert from_json.ground_truth(2).tolist() == [[CAT, 0, 61, 41, 100, 80]]  # devkit pixels end at the size
    for index, name in enumerate("abc"):
        assert from_json.samples[index].image_id == index + 7 and not from_json.samples[index].doubts
        assert int(from_json[index][1][..., 0].sum()) == len(boxes[name])
        for data in others:
            sample, expected = data.samples[index], from_json.samples[index]
            assert sample.image_id == name and sample.size == expected.size == (100, 80) and not sample.doubts
            np.testing.assert_allclose(sample.labels, expected.labels, atol=1e-12)
            torch.testing.assert_close(data.ground_truth(index), from_json.ground_truth(index), atol=1e-9, rtol=0)
            for value, other in zip(data[index], from_json[index], strict=True):
                torch.testing.assert_close(value, other)


# the start of messages about the second object
FORMATS = {"voc": r"a\.xml, object 2:", "coco": r"train\.json, image 1, annotation 501:", "yolo": r"a\.txt.*line 2:"}


def open_format(form: str, root: Path, boxes, **options) -> VOCDataset:
    """The data set of a 100 x 80 image with boxes (class name, x1, y1, x2, y2) in pixels from 0."""
    if form == "voc":
        return open_devkit(root, {"a": [(name, [side + 1 for side in box]) for name, *box in boxes]}, **options)
    if form == "coco":
        rows = [(1, CATEGORIES[name], (x1, y1, x2 - x1, y2 - y1)) for name, x1, y1, x2, y2 in boxes]
        return open_coco(root, [(1, "a.jpg")], rows, **options)
    Image.new("RGB", (100, 80)).save(root / "a.png")
    lines = [yolo_line(*box) for box in boxes]
    return open_yolo(root, "".join(lines), "a.png", **options)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("box", "expected", "doubt"),
    [
        ((50, 40, 120, 60), (0.5, 0.5, 1, 0.75), "boxes cut off"),
        ((50, 40, 100.9, 60), (0.5, 0.5, 1, 0.75), None),  # up to a pixel is rounding
        ((50, 40, 50, 60), None, "boxes left out"),  # as two boxes of COCO's own instances_train2017.json
        ((50, 40, 60, 40), None, "boxes left out"),
        ((10, 8, 20, 16), (0.1, 0.1, 0.2, 0.2), "a box twice"),
    ],
)
def test_boxes_are_clipped_and_left_out_alike_in_all_formats(tmp_path, form, box, expected, doubt):
    data = open_format(form, tmp_path, [("dog", 10, 8, 20, 16), ("dog", *box)])
    rows = [(DOG, 0, 0.1, 0.1, 0.2, 0.2)] + ([(DOG, 0, *expected)] if expected else [])
    np.testing.assert_allclose(data.samples[0].labels, rows, atol=1e-12)
    assert [text.partition(":")[0] for text in data.samples[0].doubts] == ([doubt] if doubt else [])


@pytest.mark.parametrize("form", ["voc", "coco"])
@pytest.mark.parametrize(
    ("boxes", "count", "doubt"),
    [
        ([(10, 8, 20, 16), (120, 90, 140, 100), (-20, 8, 0, 16)], 1, "boxes left out"),
        ([(0.1, 0.2, 0.5, 0.6), (0.3, 0.2, 0.9, 1)], 2, "fractions instead of pixels"),
    ],
)
def test_boxes_outside_the_image_and_in_fractions_are_doubts_of_formats_in_pixels(tmp_path, form, boxes, count, doubt):
    (sample,) = open_format(form, tmp_path, [("dog", *box) for box in boxes]).samples
    assert len(sample.labels) == count and [text.partition(":")[0] for text in sample.doubts] == [doubt]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("box", [(30, 8, 10, 24), (10, 24, 30, 8), (10, 8, math.nan, 24), (10, 8, math.inf, 24)])
def test_a_box_without_corners_is_named_in_all_formats(tmp_path, form, box):
    with pytest.raises(ValueError, match=FORMATS[form]):
        open_format(form, tmp_path, [("dog", 10, 8, 30, 24), ("dog", *box)])


@pytest.mark.parametrize("form", FORMATS)
def test_other_classes_are_an_error_or_skipped_in_all_formats(tmp_path, form):
    boxes = [("dog", 10, 8, 30, 24), ("unicorn", 50, 40, 70, 60)]
    with pytest.raises(ValueError, match=FORMATS[form] + ".*('unicorn'|20).*CLASSES.*TOLERATE"):
        open_format(form, tmp_path, boxes)
    assert open_format(form, tmp_path, boxes, tolerate=["other classes"]).samples[0].labels[:, 0].tolist() == [DOG]


def test_coco_categories_are_matched_by_name_and_labels_by_image_id(tmp_path):
    """Crowds are difficult, and images without annotations background."""
    images = [(9, "b.jpg"), (4, "a.jpg"), (7, "c.jpg")]
    rows = [(4, 21, [0, 0, 50, 40]), (9, 11, [0, 0, 10, 8]), (4, 11, [50, 40, 50, 40], 1)]
    data = open_coco(tmp_path, images, rows, classes=["cat", "dog"])
    assert [(sample.image_id, Path(sample.image_file).name) for sample in data.samples] == images
    labels = [[[1, 0, 0, 0, 0.1, 0.1]], [[0, 0, 0, 0, 0.5, 0.5], [1, 1, 0.5, 0.5, 1, 1]], []]
    assert [sample.labels.tolist() for sample in data.samples] == labels
    assert [int(targets[..., 0].sum()) for _, targets in data] == [1, 1, 0]


def test_cocos_own_class_names_fit_darknets(tmp_path):
    rows, names = [(1, 11, [0, 0, 10, 8]), (1, 21, [50, 40, 20, 20])], {11: "airplane", 21: "tv"}
    for classes, expected in ((["tvmonitor", "aeroplane"], [1, 0]), (["tv", "tvmonitor", "airplane"], [2, 0])):
        data = open_coco(tmp_path, [(1, "a.jpg")], rows, names, classes=classes)
        assert data.samples[0].labels[:, 0].tolist() == expected


@pytest.mark.parametrize("declared", [(100, 80), (50, 40), (None, None), (0, 0)])
def test_coco_boxes_are_fractions_of_the_declared_size_or_else_of_the_image(tmp_path, declared):
    changes = [("images", 0, dict(zip(("width", "height"), declared, strict=True)))]
    (sample,) = open_coco(tmp_path, [(1, "a.jpg")], [(1, 11, [10, 8, 20, 16])], changes=changes).samples
    scale = 2 if declared == (50, 40) else 1
    np.testing.assert_allclose(sample.labels[:, 2:] / scale, [[0.1, 0.1, 0.3, 0.3]], atol=1e-12)
    assert sample.size == (100, 80) and len(sample.doubts) == scale - 1
    assert all(re.match("another image size: .*50 x 40.*100 x 80", doubt) for doubt in sample.doubts)


def test_an_annotation_without_a_size_casts_no_doubt_on_its_image(tmp_path):
    (sample,) = open_devkit(tmp_path, {"a": voc_xml([("cat", (11, 9, 31, 25))], size=None)}).samples
    assert sample.size == (100, 80) and not sample.doubts


@pytest.mark.parametrize(
    ("image", "json_file", "file_name"),
    [
        ("a.jpg", "train.json", "a.jpg"), ("images/a.jpg", "train.json", "a.jpg"),
        ("a.jpg", "labels/train.json", "a.jpg"), ("images/a.jpg", "labels/train.json", "a.jpg"),
        ("images/a.jpg", "labels/train.json", "images/a.jpg"), ("images/a.jpg", "labels/train.json", "images\\a.jpg"),
        ("val2017/a.jpg", "annotations/instances_val2017.json", "a.jpg"),
        ("val2017/a.jpg", "annotations/instances_val2017.json", "../val2017/a.jpg"),
    ],
)  # fmt: skip
def test_images_of_a_coco_file_are_found(tmp_path, monkeypatch, image, json_file, file_name):
    for root in (tmp_path / "data", tmp_path / "elsewhere"):
        file = write_coco(root, [(1, image)], [], {11: "dog"}, json_file)
        file.write_text(file.read_text().replace(json.dumps(image), json.dumps(file_name)))
    monkeypatch.chdir(tmp_path / "elsewhere")  # the working directory holds such an image, too
    for image_sets in ([json_file], json_file):
        (sample,) = dataset.list_samples(tmp_path / "data", image_sets, VOC_CLASSES)
        assert Path(sample.image_file).samefile(tmp_path / "data" / image)


def test_yolo_labels_stay_exact_fractions_whatever_the_size_of_the_image(tmp_path):
    Image.new("RGB", (333, 217)).save(tmp_path / "odd.jpg")
    Image.new("RGB", (64, 64)).save(tmp_path / "square.jpg")
    Image.new("RGB", (217, 101)).save(tmp_path / "rotated.jpg", exif=exif(6))
    rows = [(7, 0.1, 0.3, 0.07, 0.11), (11, 0.6180339887498949, 0.7, 0.123456789, 0.2)]
    text = "".join(f"{label} {x!r} {y!r} {w!r} {h!r}\n" for label, x, y, w, h in rows)
    data = open_yolo(tmp_path, text, "odd.jpg", "square.jpg", "rotated.jpg", image_size=416)
    corners = [[label, 0, x - w / 2, y - h / 2, x + w / 2, y + h / 2] for label, x, y, w, h in rows]
    expected = dataset.encode_targets([row[1:] for row in rows], [row[0] for row in rows], ANCHORS, 13, 13)
    for index, sample in enumerate(data.samples):
        assert sample.labels.tolist() == corners  # to the last bit
        torch.testing.assert_close(data[index][1], expected, atol=1e-6, rtol=0)
        assert torch.equal(data[index][1], data[0][1])


@pytest.mark.parametrize("augment", [False, True])
def test_images_are_a_batch_without_augmentation_and_sizes_are_those_of_the_images_as_shown(tmp_path, augment):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "rotated.jpg", exif=exif(6))  # shown as 40 x 60
    Image.fromarray(noise[:, :, 0]).save(tmp_path / "grey.png")
    Image.fromarray(noise).convert("RGBA").save(tmp_path / "rgba.png")
    data = open_yolo(tmp_path, "7 .5 .5 .5 .5\n", "rotated.jpg", "grey.png", "rgba.png", augment=augment)
    assert [sample.size for sample in data.samples] == [(40, 60), (60, 40), (60, 40)]
    # a quarter to three quarters: 10..30 of 40 and 15..45 of 60, the first pixel being 1
    assert data.ground_truth(0).tolist() == [[7, 0, 11, 16, 31, 46]]
    images = data.images([2, 0, 1])
    assert images.shape == (3, 3, 64, 64) and images.dtype == torch.uint8
    for image, index in zip(images, (2, 0, 1), strict=True):
        assert torch.equal(image, data.changed(augment=False)[index][0])


def test_a_model_that_outputs_the_targets_has_an_average_precision_of_1(tmp_path):
    """Labels -> targets -> raw outputs -> detections -> AP: no step is off by one pixel, row or class."""
    files = {
        "a": [("dog", (5, 9, 24, 30)), ("cat", (60, 40, 91, 71)), ("person", (40, 5, 50, 30), 1)],
        "b": [("dog", (10, 20, 29, 75)), ("dog", (50, 9, 97, 30))],
        "c": [],
    }
    data = open_devkit(tmp_path, files, image_size=160)
    detections, truths, seconds = utils.detect_dataset(PerfectDetector(data), data, batch_size=2, num_workers=0)
    assert len(detections) == 4 and len(truths) == 5 and set(seconds) == {"loading", "network", "post-processing"}
    for metric in ("all_points", "voc2007"):
        values = utils.average_precision(detections, truths, 20, iou_threshold=0.99, metric=metric)
        expected = [1.0 if label in (CAT, DOG) else math.nan for label in range(20)]
        np.testing.assert_allclose(values.numpy(), expected)


# ---------------------------------------------------------------- augmentation


def test_the_key_decides_the_sample_regardless_of_earlier_ones():
    first, second = (VOCDataset(SAMPLE, [("2007", "one")], ANCHORS, 64, augment=True) for _ in range(2))
    image, targets = first[(0, 96, 5)]
    for seed in (1, 2):
        other_image, other_targets = second[(0, 96, seed)]
        assert not torch.equal(other_image, image) and not torch.equal(other_targets, targets)
    for size in (96, 160, 96):
        again_image, again_targets = second[(0, size, 5)]
        assert again_image.shape == (3, size, size) and again_targets.shape == (5, size // 32, size // 32, 6)
    assert torch.equal(again_image, image) and torch.equal(again_targets, targets)
    plain = first.changed(augment=False)  # without augmentation, the seed changes nothing
    assert plain[0][0].shape == (3, 64, 64)
    assert torch.equal(plain[(0, 64, 1)][0], plain[(0, 64, 2)][0]) and torch.equal(plain[(0, 64, 1)][0], plain[0][0])


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_flips_and_colours_are_independent(kind, tmp_path):
    """With and without a flip, the hue is shifted both ways: the transforms must not draw the same random numbers."""
    pixels = np.full((64, 64, 3), (200, 40, 40), np.uint8)
    pixels[:, :32] //= 2  # the left half is darker
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "train" / name / "x.png")
    if kind == "detector":
        data = open_yolo(tmp_path, "", "train/a/x.png", augment=True)
    else:
        data = dataset.imagenet_dataset(tmp_path, "train", 64, augment=True)
    hues = {True: [], False: []}
    for seed in range(60):
        middle = data[(0, 64, seed)][0][:, 16:48, 16:48].numpy()
        red, green, blue = middle.mean(axis=(1, 2))
        flipped = bool(middle[..., :8].mean() > middle[..., -8:].mean())
        hues[flipped].append(green > blue)  # red was shifted towards yellow, not towards violet
    for shifted in hues.values():
        assert len(shifted) > 15 and 0.2 < np.mean(shifted) < 0.8, hues


def test_colours_are_rgb_and_the_first_row_is_at_the_top(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32] = (255, 0, 0)  # top left red
    picture[32:, 32:] = (0, 0, 255)  # bottom right blue
    image, _ = open_picture(tmp_path, picture, augment=False)[0]
    for row, column, colour in ((8, 8, (255, 0, 0)), (56, 56, (0, 0, 255)), (8, 56, (0, 0, 0)), (56, 8, (0, 0, 0))):
        assert image[:, row, column].tolist() == pytest.approx(colour, abs=8)


@pytest.mark.parametrize("box", [(60, 40, 160, 130), (3, 150, 120, 237)], ids=["inside", "near_the_corner"])
def test_boxes_stay_on_their_object_under_augmentation(tmp_path, box):
    left, top, right, bottom = box  # pixels, 0-based, right and bottom exclusive
    picture = np.zeros((240, 320, 3), np.uint8)
    picture[top:bottom, left:right] = (255, 0, 0)  # the only object; the padding repeats the black border
    data = open_picture(tmp_path, picture, [("cat", (left + 1, top + 1, right, bottom))])
    boxes, seen_on_the_left = [], 0
    for seed in range(50):
        image, targets = data[(0, 160, seed)]
        chroma = image.amax(dim=0) - image.amin(dim=0)  # not below 0: uint8
        rows, columns = torch.nonzero(chroma > chroma.max() / 2, as_tuple=True)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        (found,) = boxes_in_pixels(targets, 160).tolist()
        assert found == pytest.approx([float(value) for value in expected], abs=1.5), f"seed {seed}"
        boxes.append(found)
        seen_on_the_left += found[0] + found[2] < 160
    assert len({tuple(round(value) for value in found) for found in boxes}) > 40  # the boxes do move
    assert 10 < seen_on_the_left < 40  # and about half of them are flipped


def test_a_box_with_less_than_a_tenth_of_its_area_left_is_dropped(tmp_path):
    picture = np.zeros((240, 320, 3), np.uint8)
    picture[:, 3:60] = (255, 0, 0)  # a strip near the border, of which up to 64 pixels are cropped
    picture[80:160, 100:220] = (0, 0, 255)  # a block that always stays inside; its width gives the scale
    data = open_picture(tmp_path, picture, [("cat", (4, 1, 60, 240)), ("dog", (101, 81, 220, 160))])
    dropped_but_seen = 0
    for seed in range(80):
        image, targets = data[(0, 256, seed)]
        difference = image[0].int() - image[2].int()  # above 0 in the strip, below in the block, 0 in black
        strip, block = ((sign * difference > 50).any(dim=0).sum().item() for sign in (1, -1))
        share = strip / block * 120 / 57  # of the strip's width; 2 of its 46 or so pixels are .04
        labels = set(targets[targets[..., 0] > 0][:, 5].tolist())
        assert DOG in labels
        assert share > 0.06 if CAT in labels else share < 0.14, f"seed {seed}"
        dropped_but_seen += CAT not in labels and share > 0
    assert dropped_but_seen


def test_padding_repeats_the_pixels_at_the_border(tmp_path):
    """As crop_image in Darknet's src/image.c: vertical stripes stay stripes however far top and bottom move out."""
    picture = np.zeros((200, 200, 3), np.uint8)
    picture[:, :, :] = np.random.default_rng(0).integers(60, 200, (1, 200, 1))
    data = open_picture(tmp_path, picture)
    for seed in range(20):
        image = data[(0, 256, seed)][0].float()
        assert image.std(dim=1).max() < 4 and image.std(dim=2).min() > 10, f"seed {seed}"


def test_jitter_gives_what_albumentations_gives_with_three_transforms():
    crop = albumentations.CropAndPad(percent=(-0.2, 0.2), keep_size=False, border_mode=cv2.BORDER_REPLICATE)
    flip = albumentations.HorizontalFlip(p=0.5)
    limits = albumentations.BboxParams("albumentations", min_visibility=0.1, check_each_transform=False)
    three = albumentations.Compose([crop, albumentations.Resize(96, 96), flip], bbox_params=limits)
    one = albumentations.Compose([dataset.DarknetJitter(96)], bbox_params=limits)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (75, 100, 3), dtype=np.uint8)
    boxes = np.array([[0.0, 0.0, 0.2, 0.3, 1], [0.9, 0.1, 1.0, 0.2, 2], [0.3, 0.4, 0.5, 1.0, 3]])
    for seed in range(100):
        for transform in (one, three):
            transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        ours, theirs = one(image=image, bboxes=boxes.copy()), three(image=image, bboxes=boxes.copy())
        assert np.array_equal(ours["image"], theirs["image"]), f"seed {seed}"
        np.testing.assert_allclose(ours["bboxes"], theirs["bboxes"], atol=1e-12)


def darknet_distortion(image, shift, saturation, exposure):
    """distort_image of Darknet's src/image.c in floating point: image (H, W, 3) in 0..1; only RGB is clipped."""
    distorted = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        hue, s, v = colorsys.rgb_to_hsv(*image[place])
        distorted[place] = colorsys.hsv_to_rgb((hue + shift) % 1, s * saturation, v * exposure)
    return distorted.clip(0, 1)


@pytest.mark.parametrize("exposure", [1.5, 1.2, 1 / 1.5])
@pytest.mark.parametrize(("shift", "saturation"), [(0.0, 1.0), (0.1, 1 / 1.5), (-0.1, 1.0), (0.05, 1.5)])
def test_colours_are_distorted_as_in_darknet(shift, saturation, exposure):
    image = np.random.default_rng(3).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    ours = dataset.DarknetColour(0.1, 1.5, 1.5).apply(image, shift=shift, factors=(saturation, exposure))
    error = np.abs(ours / 255.0 - darknet_distortion(image / 255.0, shift, saturation, exposure))
    # 8-bit; clipping before RGB: value .07, saturation .1
    assert np.mean(error > 10 / 255) < (0.03 if saturation > 1 else 0.005)


def test_a_hue_shifted_below_red_comes_round_on_the_other_side():
    """-.1 of the circle are -26 of its 256 steps: 230 steps, in the last sixth of the circle .39 of the way to red."""
    red = np.uint8([[[255, 0, 0]]])
    shifted = dataset.DarknetColour(0.1, 1.5, 1.5).apply(red, shift=-0.1, factors=(1.0, 1.0))
    # OpenCV's way back to RGB divides the circle into 255 steps
    assert shifted[0, 0].tolist() == pytest.approx([255, 0, 255 * (1 - 0.39)], abs=7)


@pytest.mark.parametrize(("kind", "limit"), [("detector", 1.5), ("classifier", 1 / 0.75)])
def test_colour_shifts_and_factors_fill_the_ranges_of_the_cfg_files(kind, limit):
    transforms = {64: dataset.train_transform(64)}
    if kind == "classifier":
        data = dataset.imagenet_dataset(SAMPLE.parent / "imagenet", "train", 64, augment=True)
        assert data[0][0].shape == (3, 64, 64)  # makes the transforms
        transforms = data.transforms
    colour = transforms[64].transforms[-1]
    colour.set_random_state(np.random.default_rng(0), random.Random(0))
    drawn = [colour.get_params() for _ in range(2000)]
    shifts = np.array([values["shift"] for values in drawn])
    assert shifts.min() == pytest.approx(-0.1, abs=0.001) and shifts.max() == pytest.approx(0.1, abs=0.001)
    for factors in np.array([values["factors"] for values in drawn]).T:  # saturation, exposure
        assert factors.min() == pytest.approx(1 / limit, abs=0.003) and factors.max() == pytest.approx(limit, abs=0.003)
        assert 0.45 < np.mean(factors < 1) < 0.55


def test_crops_of_the_classifier_fill_the_ranges_of_darknet19_cfg():
    crop = dataset.DarknetCrop(256, (128, 448))
    crop.set_random_state(np.random.default_rng(0), random.Random(0))
    matrices = [crop.get_params_dependent_on_data({"shape": (300, 500, 3)}, {})["matrix"] for _ in range(3000)]
    angles = [math.degrees(math.atan2(matrix[1, 0], matrix[0, 0])) for matrix in matrices]
    scales = np.array([np.linalg.norm(matrix[:, :2], axis=0) for matrix in matrices])  # (3000, 2): of x and y
    for values, low, high in (
        (angles, -7, 7),  # degrees
        (scales[:, 0] / scales[:, 1], 0.75, 4 / 3),  # aspect
        ((scales * [500, 300]).min(axis=1), 128, 448),  # short side in pixels
    ):
        slack = 0.01 * (high - low)
        assert low - 1e-6 <= min(values) < low + slack and high - slack < max(values) <= high + 1e-6


# ---------------------------------------------------------------- batches of a training run


def batches_of_epoch(epoch, count, batch_size, subdivisions=1, image_sizes=(320,), seed=0, repeat=1) -> list[list]:
    steps = dataset.steps_per_epoch(count * repeat, batch_size, subdivisions)
    batches = dataset.training_batches(count, batch_size, subdivisions, list(image_sizes), seed, epoch * steps, repeat)
    return list(itertools.islice(batches, steps * subdivisions))


def indices(batches) -> list[int]:
    return [index for batch in batches for index, _, _ in batch]


def test_an_epoch_visits_every_image_once_in_an_order_that_depends_on_epoch_and_seed():
    batches = batches_of_epoch(3, count=12, batch_size=4, seed=7, image_sizes=[320, 352])
    assert [len(batch) for batch in batches] == [4, 4, 4] and sorted(indices(batches)) == list(range(12))
    assert batches == batches_of_epoch(3, count=12, batch_size=4, seed=7, image_sizes=[320, 352])
    for epoch, seed in ((4, 7), (3, 8)):
        other = batches_of_epoch(epoch, count=12, batch_size=4, seed=seed)
        assert indices(other) != indices(batches)
        assert {key[2] for batch in other for key in batch}.isdisjoint(key[2] for batch in batches for key in batch)
    repeated = batches_of_epoch(0, count=5, batch_size=5, repeat=3)
    assert [sorted(indices([batch])) for batch in repeated] == [list(range(5))] * 3
    assert len({key[2] for batch in repeated for key in batch}) == 15  # with a different augmentation each time


@pytest.mark.parametrize("subdivisions", [1, 2])
def test_the_image_size_changes_every_10_steps_of_the_whole_run(subdivisions):
    """Epochs have 7 steps, so most blocks of 10 steps begin in the middle of an epoch."""
    batches = dataset.training_batches(28, 4, subdivisions, [320, 352, 384], seed=0)
    sizes = []
    for _ in range(300):  # steps
        of_step = {size for batch in itertools.islice(batches, subdivisions) for _, size, _ in batch}
        assert len(of_step) == 1
        sizes += of_step
    blocks = [sizes[start : start + 10] for start in range(0, 300, 10)]
    assert all(len(set(block)) == 1 for block in blocks)
    drawn = [block[0] for block in blocks]
    assert set(drawn) == {320, 352, 384}
    assert len(set(zip(drawn, drawn[1:], drawn[2:], strict=False))) > 5  # in no fixed order
    for seed in (0, 1):
        other = dataset.training_batches(28, 4, 1, [320, 352, 384], seed)
        assert ([batch[0][1] for batch in itertools.islice(other, 300)] == sizes) == (seed == 0)


def test_an_incomplete_last_batch_is_left_out_unless_it_is_the_only_one():
    for count, steps, size in ((8, 2, 4), (10, 2, 4), (4, 1, 4), (3, 1, 3)):
        assert dataset.steps_per_epoch(count, 4) == steps
        batches = itertools.islice(dataset.training_batches(count, 4, 1, [320], 0), 3 * steps)  # three epochs
        assert [len(batch) for batch in batches] == [size] * 3 * steps
    assert dataset.steps_per_epoch(11, 4, subdivisions=2) == 2
    with pytest.raises(ValueError, match="3 images.* 4.*BATCH_SIZE.*SUBDIVISIONS=1"):
        dataset.steps_per_epoch(3, 4, subdivisions=2)


def test_subdivisions_split_each_batch_and_change_nothing_else():
    sizes = [320, 352]
    whole = batches_of_epoch(2, count=14, batch_size=6, image_sizes=sizes, repeat=2)
    parts = batches_of_epoch(2, count=14, batch_size=6, subdivisions=3, image_sizes=sizes, repeat=2)
    assert [len(batch) for batch in whole] == [6] * 4 and [len(part) for part in parts] == [2] * 12
    assert [key for part in parts for key in part] == [key for batch in whole for key in batch]
    samples = [(f"{number}.jpg", f"{number}.xml") for number in range(14)]
    assert dataset.files_of_step(samples, iter(parts), 3) == [f"{index}.jpg" for index in indices(whole[:1])]


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("subdivisions", [1, 3])
def test_a_resumed_run_sees_the_rest_of_the_batches(subdivisions, repeat):
    """17 images in batches of 6: 2 or 5 steps per epoch. A run may resume at any step, also within an epoch."""
    arguments = (17, 6, subdivisions, [320, 352, 384], 5)
    whole = list(itertools.islice(dataset.training_batches(*arguments, repeat=repeat), 24 * subdivisions))
    for first_step in range(24):
        resumed = dataset.training_batches(*arguments, first_step=first_step, repeat=repeat)
        tail = whole[first_step * subdivisions :]
        assert list(itertools.islice(resumed, len(tail))) == tail, f"first step {first_step}"


# ---------------------------------------------------------------- anchors


def test_average_best_iou_by_hand():
    # (2, 2) is an anchor itself: 1; (4, 1) against (2, 2): 2 / (4 + 4 - 2) = 1/3, against (4, 4): 4 / 16; mean: 2/3
    assert dataset.average_best_iou(np.array([[2, 2], [4, 1]]), [(2, 2), (4, 4)]) == pytest.approx(2 / 3, abs=1e-12)


def test_badly_fitting_anchors_are_reported(tmp_path, capsys):
    """At 64 px, an object that fills the image has 2 x 2 cells: IoU .4 x 2 / 4 and 1 x 2 / 4. Crowds do not count."""
    rows = [(1, 11, [0, 0, 100, 80]), (1, 21, [0, 0, 1, 1], 1)]
    data = open_coco(tmp_path, [(1, "a.jpg")], rows, classes=["dog", "cat"])
    dataset.check_training_sets(data.changed(anchors=[(0.4, 2)]), {})
    assert re.search(r"ANCHORS fit the boxes badly \(average IoU 0\.20\).*IMAGE_SIZE=64", capsys.readouterr().out)
    dataset.check_training_sets(data.changed(anchors=[(0.4, 2), (1, 2)]), {})
    assert capsys.readouterr().out == ""
    data = VOCDataset(SAMPLE, [("2007", "train")], ANCHORS)
    for size, reported in ((160, True), (416, False)):  # the anchors are for 416 px
        dataset.check_training_sets(data.changed(image_size=size), {})
        assert ("dataset.py IMAGE_SIZE=160" in capsys.readouterr().out) == reported


def test_kmeans_finds_the_clusters_of_the_boxes_by_rising_area():
    centres = np.array([[1.0, 1.0], [3.0, 6.0], [9.0, 4.0]])  # areas 1, 18, 36
    noise = np.random.default_rng(0).uniform(0.95, 1.05, (3, 60, 2))
    sizes = np.random.default_rng(1).permutation((centres[:, None] * noise).reshape(-1, 2))
    anchors = dataset.kmeans_anchors(sizes, 3)
    assert anchors.shape == (3, 2)
    np.testing.assert_allclose(anchors.numpy(), centres, rtol=0.02)
    assert dataset.average_best_iou(sizes, anchors) > 0.9


def euclidean_kmeans(sizes, k):
    centres = sizes[np.random.default_rng(0).choice(len(sizes), k, replace=False)]
    for _ in range(50):
        nearest = ((sizes[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
        centres = np.array([sizes[nearest == cluster].mean(axis=0) for cluster in range(k)])
    return centres


def test_the_iou_distance_beats_the_euclidean_one_and_more_anchors_fit_better():
    """The order of YOLO9000 Table 1, on random boxes with sides from .05 to .95."""
    sizes = np.exp(np.random.default_rng(1).uniform(math.log(0.05), math.log(0.95), (1000, 2)))
    euclidean = dataset.average_best_iou(sizes, euclidean_kmeans(sizes, 5))
    five, nine = (dataset.average_best_iou(sizes, dataset.kmeans_anchors(sizes, k)) for k in (5, 9))
    assert euclidean + 0.02 < five < nine - 0.05


def test_a_single_anchor_is_the_median_of_the_boxes_and_more_anchors_than_boxes_are_an_error():
    assert dataset.kmeans_anchors([(1, 1), (2, 4), (9, 5)], 1).tolist() == [[2, 4]]
    with pytest.raises(ValueError, match="2 boxes .* 3 anchors"):
        dataset.kmeans_anchors([(1, 1), (2, 2)], 3)


# ---------------------------------------------------------------- bad input


def truncated_jpeg() -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()[: len(stream.getvalue()) // 2]


@pytest.mark.parametrize(
    ("image_set", "named"),
    [
        (("2012", "train"), "VOC2012"), (("2026", "trainval"), r"trainval\.txt"), ("mine.csv", r"mine\.csv"),
        ("mine.txt", r"mine\.txt"), ("mine.json", r"mine\.json"), (("2026", "train"), r"a\.xml.*TOLERATE"),
    ],
)  # fmt: skip
def test_missing_folders_lists_and_label_files_are_named(tmp_path, image_set, named):
    folder = write_devkit(tmp_path, {"a": []})
    (folder / "Annotations/a.xml").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(tmp_path))}/.*{named}"):
        VOCDataset(tmp_path, [image_set], ANCHORS)


def test_an_empty_list_and_a_file_in_place_of_the_data_folder_are_errors(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}.* no image"):
        open_devkit(tmp_path, {})
    (tmp_path / "train.csv").write_text("")
    with pytest.raises((OSError, ValueError), match=r"train\.csv"):
        VOCDataset(tmp_path / "train.csv", ["val.csv"], ANCHORS)


@pytest.mark.parametrize(
    ("content", "labels"),  # without a header, the size is that which a label file declares, and YOLO's declare none
    [(truncated_jpeg(), [1, 1]), (b"this is not an image", [1, 0]), (b"", [1, 0]), (None, [1, 0])],
    ids=["truncated", "text", "empty", "missing"],
)
def test_a_damaged_or_missing_image_keeps_its_place_and_is_named_when_it_is_read(tmp_path, content, labels):
    folder = write_devkit(tmp_path, {"a": [("dog", (1, 1, 51, 41))]})
    (folder / "a.txt").write_text("11 .25 .25 .5 .5\n")
    (folder / "list.csv").write_text("JPEGImages/a.jpg,Annotations/a.xml\nJPEGImages/a.jpg,a.txt\n")
    (folder / "JPEGImages/a.jpg").unlink() if content is None else (folder / "JPEGImages/a.jpg").write_bytes(content)
    data = VOCDataset(folder, ["list.csv"], ANCHORS)
    assert [len(sample.labels) for sample in data.samples] == labels
    for index, sample in enumerate(data.samples):
        assert [doubt[:16] for doubt in sample.doubts] == ([] if labels[1] else ["unreadable image"])
        with pytest.raises((FileNotFoundError, ValueError), match=r"a\.jpg"):
            data[index]


BNDBOX = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"
GOOD_XML = voc_xml([("cat", (5, 5, 20, 20))])
BAD_XML = [
    (f"<annotation><object>{BNDBOX}</object></annotation>", ", object 1: .*''"),
    (voc_xml([("cat", (5, 5, "wide", 20))]), ".*wide"),
    (voc_xml([("cat", (5, 5, 20, 20), "maybe")]), ", object 1: .*difficult.*maybe"),
    ("<annotation><object><name>cat</name></object></annotation>", ".*xmin"),
    ("<annotation><object>", ""),
    ("", ""),
    ("<annotations><image name='x'><box label='cat'/></image></annotations>", ": "),  # CVAT
    ("<html><body>404</body></html>", ": "),
    (GOOD_XML.replace("</object>", "<bndbox><xmin>1</xmin></bndbox></object>"), ": "),
    *[(re.sub(rf"(<{tag}>.*?</{tag}>)", r"\1\1", GOOD_XML), ": ") for tag in ("name", "difficult", "xmin", "ymax")],
]
BAD_YOLO = ["-1 .5 .5 .1 .1", "cat .5 .5 .1 .1", "7 .5 .5 .1", "7 .5 .5 .1 .1 .9", "7 .5 1.5 .1 .1", "7 250 180 100 90"]
BAD_LISTS = ["img,text", "a.png;a.txt", "a\x1b[2J.png,a.txt", '"a.png,a.txt\n' + "b.png,b.txt\n" * 20_000]
NO_COCO = [
    '{"images": [], "annotations": []}', '{"images": 7, "annotations": [], "categories": []}',
    '{"images": [7], "annotations": [], "categories": []}', "[1, 2]", '{"images": [', "[" * 100_000, "",
]  # fmt: skip
BAD_FILES = [
    *[("a.xml", xml, named) for xml, named in BAD_XML],
    *[("a.txt", f"7 .5 .5 .1 .1\n{line}\n", ".*line 2") for line in BAD_YOLO],
    *[
        ("list.csv", f"image,label\na.png,a.txt\n{line}\n", ".*line 3.*image,label")
        for line in ("b.png", "b.png,b.txt,7", "b.png,b.json", "b.txt,b.png", ",b")
    ],
    *[("list.csv", f"{lines}\n", ": ") for lines in BAD_LISTS],
    *[("train.json", text, "") for text in NO_COCO],
]


@pytest.mark.parametrize(("name", "content", "named"), BAD_FILES, ids=lambda value: value[:40])
def test_a_bad_label_file_or_list_is_named_in_one_printable_line(tmp_path, name, content, named):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    (tmp_path / "good.xml").write_text(GOOD_XML)
    (tmp_path / "good.txt").write_text("7 .5 .5 .1 .1\n")
    for form in ("xml", "txt"):
        (tmp_path / f"{form}.csv").write_text(f"a.png,good.{form}\na.png,a.{form}\n")
    (tmp_path / name).write_text(content)
    image_set = {"a.xml": "xml.csv", "a.txt": "txt.csv"}.get(name, name)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}{named}") as error:
        VOCDataset(tmp_path, [image_set], ANCHORS)
    assert len(str(error.value)) < 500 and str(error.value).isprintable()


@pytest.mark.parametrize(
    ("table", "values", "named"),
    [
        ("annotations", {"bbox": [50, 40, 20]}, "image 2"), ("annotations", {"bbox": 7}, "image 2"),
        ("annotations", {"bbox": None}, "image 2.*bbox"), ("annotations", {"iscrowd": 3}, "image 2, annotation 501.*3"),
        ("annotations", {"image_id": None}, "image_id"), ("annotations", {"category_id": 77}, "image 2.*77"),
        ("images", {"id": 1}, "id"), ("images", {"file_name": None}, "file_name"),
        ("categories", {"id": 11}, "id"), ("categories", {"name": None}, "name"),
    ],
)  # fmt: skip
def test_a_bad_entry_of_a_coco_file_is_named(tmp_path, table, values, named):
    rows = [(1, 11, [0, 0, 10, 8]), (2, 21, [50, 40, 20, 20])]
    with pytest.raises(ValueError, match=rf"train\.json.*{named}") as error:
        open_coco(tmp_path, [(1, "a.jpg"), (2, "b.jpg")], rows, changes=[(table, 1, values)])
    assert len(str(error.value).splitlines()) == 1


def test_annotations_of_images_that_a_coco_file_does_not_list_are_skipped_and_counted(tmp_path, capsys):
    rows = [(1, 11, [0, 0, 10, 8]), (77, 11, [0, 0, 10, 8]), (78, 11, [0, 0, 10, 8])]
    assert len(open_coco(tmp_path, [(1, "a.jpg")], rows).samples[0].labels) == 1
    assert re.search(r"train\.json.* 2 annotations", capsys.readouterr().out)


def test_one_missing_image_of_a_coco_file_is_a_doubt_and_all_are_an_error(tmp_path):
    rows = [(1, 11, [0, 0, 10, 8]), (2, 11, [0, 0, 10, 8])]
    write_coco(tmp_path, [(1, "a.jpg"), (2, "b.jpg")], rows, {11: "dog"}, "annotations/instances_val2017.json")
    (tmp_path / "b.jpg").unlink()
    good, missing = dataset.list_samples(tmp_path, ["annotations/instances_val2017.json"], VOC_CLASSES)
    assert not good.doubts and len(missing.labels) == 1  # the file declares the size
    (doubt,) = missing.doubts
    assert re.match(r"unreadable image: .*b\.jpg", doubt)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances_val2017\.json") as error:
        dataset.list_samples(tmp_path, ["annotations/instances_val2017.json"], VOC_CLASSES)
    for folder in ("annotations", "annotations/images", "", "images", "val2017"):
        assert f"{tmp_path / folder}," in str(error.value) or f"{tmp_path / folder};" in str(error.value)


def test_a_coco_file_without_annotations_is_refused_unless_tolerated(tmp_path):
    write_coco(tmp_path, [(1, "a.jpg")], None, {11: "dog"})
    with pytest.raises(ValueError, match=r"train\.json: .*annotations.*TOLERATE=\['missing labels'\]"):
        dataset.list_samples(tmp_path, ["train.json"], VOC_CLASSES)
    (sample,) = dataset.list_samples(tmp_path, ["train.json"], VOC_CLASSES, ["missing labels"])
    assert sample.labels.shape == (0, 6) and sample.label_file == ""


@pytest.mark.parametrize("size", [100, 0, -32])
def test_an_image_size_that_is_not_a_multiple_of_32_is_an_error(size):
    with pytest.raises(ValueError, match=f"IMAGE_SIZE.*{size}"):
        VOCDataset(SAMPLE, [("2007", "one")], ANCHORS, image_size=size)


# ---------------------------------------------------------------- images of any mode


@pytest.mark.parametrize(
    ("picture", "name", "expected"),
    [
        (Image.new("L", (8, 6), 100), "grey.png", (100, 100, 100)),
        (Image.new("1", (8, 6), 1), "bits.png", (255, 255, 255)),
        (Image.new("RGBA", (8, 6), (200, 0, 100, 255)), "opaque.png", (200, 0, 100)),
        (Image.new("RGBA", (8, 6), (200, 0, 100, 0)), "transparent.png", (255, 255, 255)),  # over white
        (Image.new("RGBA", (8, 6), (200, 0, 100, 51)), "faint.png", (244, 204, 224)),  # 51/255 = .2: .2*200 + .8*255
        (Image.new("LA", (8, 6), (100, 0)), "grey_transparent.png", (255, 255, 255)),
        (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "cmyk.jpg", (255, 0, 0)),
        (Image.fromarray(np.full((6, 8), 0x6412, np.uint16)), "sixteen.png", (100, 100, 100)),  # the upper 8 bits: 0x64
        (Image.new("P", (8, 6)), "palette.gif", (0, 0, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_of_every_mode_are_read_as_rgb(tmp_path, picture, name, expected):
    picture.save(tmp_path / name)
    image = dataset.read_image(tmp_path / name)
    assert image.shape == (6, 8, 3) and image.dtype == np.uint8
    tolerance = 3 if name.endswith("jpg") else 1
    np.testing.assert_allclose(image.reshape(-1, 3).astype(int), np.tile(expected, (48, 1)), atol=tolerance)
    assert dataset.read_image_size(tmp_path / name) == (8, 6)


# orientation -> where the stored image's top left corner is shown: row, column
ORIENTATIONS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *(("RGB", {"subsampling": kind}) for kind in ("4:4:4", "4:2:2", "4:2:0")),
        ("RGB", {"progressive": True}),
        ("RGB", {"qtables": "web_low", "optimize": True}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
def test_a_jpeg_has_the_pixels_that_pillow_reads_and_must_be_complete(tmp_path, mode, options):
    """Pillow's decoder is left out for speed; sides that are no multiples of 8 or 16."""
    photo = Image.open(SAMPLE / "VOC2007/JPEGImages/000005.jpg").crop((0, 0, 333, 251)).convert(mode)
    photo.save(tmp_path / "a.jpg", quality=85, **options)
    image = dataset.read_image(tmp_path / "a.jpg")
    assert image.flags.writeable and image.flags.c_contiguous
    assert np.array_equal(image, np.array(Image.open(tmp_path / "a.jpg").convert("RGB")))
    content = (tmp_path / "a.jpg").read_bytes()
    for size in (len(content) - 2, len(content) // 2, 300):
        (tmp_path / "a.jpg").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"a\.jpg: not a readable image \(.*\); convert"):
            dataset.read_image(tmp_path / "a.jpg")


def test_a_batch_is_in_channels_last_order(tmp_path):
    data = VOCDataset(SAMPLE, [("2007", "tiny")], ANCHORS, 64)
    items = [data[index] for index in range(3)]
    images, targets = dataset.collate(items)
    assert images.shape == (3, 3, 64, 64) and images.is_contiguous(memory_format=torch.channels_last)
    for index, (image, target) in enumerate(items):
        assert torch.equal(images[index], image) and torch.equal(targets[index], target)
    batch = data.images([0, 1, 2])
    assert torch.equal(batch, images) and batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("name", ["rotated.jpg", "rotated.tif"])
def test_exif_orientation_is_applied(tmp_path, name, orientation):
    picture = np.zeros((40, 64, 3), np.uint8)
    picture[:16, :16] = 255
    tags = {"tiffinfo": {0x0112: orientation}} if name.endswith("tif") else {"exif": exif(orientation), "quality": 95}
    Image.fromarray(picture).save(tmp_path / name, **tags)
    image = dataset.read_image(tmp_path / name)
    assert image.shape == ((64, 40, 3) if orientation > 4 else (40, 64, 3))
    assert dataset.read_image_size(tmp_path / name) == image.shape[1::-1]
    corners = {(y, x): image[y, x].mean() for y in (0, -1) for x in (0, -1)}
    assert corners.pop(ORIENTATIONS[orientation]) > 240 and max(corners.values()) < 15


def test_the_orientation_of_xmp_is_applied(tmp_path):
    Image.new("RGB", (64, 40)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    segment = b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp
    (tmp_path / "a.jpg").write_bytes(content[:2] + segment + content[2:])
    assert dataset.read_image(tmp_path / "a.jpg").shape == (64, 40, 3)
    assert dataset.read_image_size(tmp_path / "a.jpg") == (40, 64)


# ---------------------------------------------------------------- python dataset.py: checking a data set


def check(monkeypatch, root, image_sets, sheet, **values) -> None:
    """Runs `python dataset.py` on image sets of root."""
    values = {"SHEET": str(sheet), "SHEET_IMAGES": 2, "IMAGE_SIZE": 64, **values}
    set_globals(monkeypatch, dataset, DATA_DIR=str(root), IMAGE_SETS=image_sets, **values)
    dataset.main()


def test_the_check_prints_counts_and_average_ious_and_draws_a_label_sheet(monkeypatch, tmp_path, capsys):
    check(monkeypatch, SAMPLE, [("2007", "tiny")], tmp_path / "out/sheet.png")
    printed = capsys.readouterr().out

    folder = SAMPLE / "VOC2007"  # the same counts, taken from the files
    ids = (folder / "ImageSets/Main/tiny.txt").read_text().split()
    objects = [item for name in ids for item in ElementTree.parse(folder / f"Annotations/{name}.xml").iter("object")]
    difficult = sum(item.findtext("difficult") == "1" for item in objects)
    cats = sum(item.findtext("name") == "cat" and item.findtext("difficult") != "1" for item in objects)
    assert cats and f"{len(ids)} images, {len(objects)} objects, {difficult} of them difficult" in printed
    assert re.search(rf"^  cat +{cats}  difficult", printed, re.MULTILINE)
    in_use = float(re.search(r"average IoU of ANCHORS: +(0\.\d+)", printed)[1])
    new = float(re.search(r"average IoU of k-means anchors: +(0\.\d+)", printed)[1])
    assert 0.2 < in_use < new < 1
    argument = re.search(r'for train.py: IMAGE_SIZE=64 "(ANCHORS=.*)"', printed)[1]
    utils.override_globals(pasted := dict(vars(train)), [argument])
    assert np.shape(pasted["ANCHORS"]) == (5, 2)
    check(monkeypatch, SAMPLE, [("2007", "tiny")], tmp_path / "out/sheet.png", ANCHORS=pasted["ANCHORS"][1:4])
    printed = capsys.readouterr().out
    assert float(re.search(r"average IoU of ANCHORS: +(0\.\d+)", printed)[1]) < new
    assert len(ast.literal_eval(re.search('"ANCHORS=(.*)"', printed)[1])) == 3
    with Image.open(tmp_path / "out/sheet.png") as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 200


def test_a_set_without_objects_is_a_problem(monkeypatch, tmp_path, capsys):
    open_devkit(tmp_path, {"a": [], "b": []})
    with pytest.raises(SystemExit):
        check(monkeypatch, tmp_path, [("2026", "train")], tmp_path / "sheet.png")
    assert re.search(rf"problem: {tmp_path}: no image has an object", capsys.readouterr().out)


def test_one_object_is_followed_from_its_label_to_its_target_by_hand(monkeypatch, tmp_path, capsys):
    files = {"empty": [], "a": [("cat", (1, 1, 11, 9)), ("dog", (11, 9, 61, 49))]}  # of 100 x 80 pixels
    data = open_devkit(tmp_path, files, image_size=96).changed(anchors=[(1, 1), (2, 2)])
    lines = dataset.follow_object(data.samples[1], data.anchors, 96)
    expected = [  # the dog, which is the larger one; 96 pixels are 3 x 3 cells
        ("ground truth", [11, 9, 61, 49], "pixels of 100 x 80, from 1"),
        ("centre and size", [0.35, 0.35, 0.5, 0.5], "fractions"),
        ("in grid cells", [1.05, 1.05, 1.5, 1.5], "times 3"),
        ("cell", [1, 1], "column, row"),
        ("IoU with the anchors", [1 / 2.25, 2.25 / 4], "anchor 1, 2.00 x 2.00 cells"),
        ("target[1, 1, 1]", [1, 0.05, 0.05, 1.5, 1.5, DOG], "[anchor, row, column]"),
        ("in the loss", [0.05, 0.05, math.log(0.75), math.log(0.75)], "sigma(t_x)"),
    ]
    for (step, numbers, explanation), (name, by_hand, words) in zip(lines, expected, strict=True):
        assert step == name and words in explanation
        np.testing.assert_allclose(numbers, by_hand, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(data[1][1][1, 1, 1], np.float32(lines[5][1]))  # the same slot of the data set

    check(monkeypatch, tmp_path, [("2026", "train")], tmp_path / "sheet.png", IMAGE_SIZE=96)
    rows = capsys.readouterr().out.partition("the largest object of ")[2].splitlines()
    assert re.search(r"a\.jpg", rows[0]) and re.search("ground truth +11 +9 +61 +49 +x1", rows[1])
    assert re.search(r"in grid cells +1\.050 +1\.050 +1\.500 +1\.500 +times 3", rows[3]) and len(rows) == 8


def test_the_check_names_every_problem_and_fails(monkeypatch, tmp_path, capsys):
    names = ("fine", "broken", "cut", "twice", "wide", "gone", "unlabelled")
    files = {name: [("cat", (5, 5, 60, 60))] for name in names}
    folder = write_devkit(tmp_path, files | {"broken": "<annotation>", "wide": [("dog", (50, 5, 140, 60))]})
    (folder / "JPEGImages/cut.jpg").write_bytes(truncated_jpeg())
    (folder / "JPEGImages/gone.jpg").unlink()
    (folder / "Annotations/unlabelled.xml").unlink()
    with open(folder / "ImageSets/Main/train.txt", "a") as stream:
        stream.write("twice\n")
    with pytest.raises(SystemExit) as stop:
        check(monkeypatch, tmp_path, [("2026", "train")], tmp_path / "sheet.png")
    assert stop.value.code not in (None, 0)
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    for text in ("broken.xml:", "cut.jpg:", "twice.jpg:", "wide.xml: boxes cut off", "gone.jpg:", "unlabelled.xml:"):
        assert sum(text in line for line in problems) == 1, text
    assert len(problems) == 6 and not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("train/images", "train/labels"),  # Roboflow, Ultralytics
        ("images/train2017", "labels/train2017"),  # coco128
        ("obj_train_data", "obj_train_data"),  # CVAT's YOLO 1.1
        ("images", "labels"),
    ],
)
def test_a_folder_of_images_has_its_labels_where_tools_put_them(tmp_path, images, labels):
    for folder in {images, labels}:
        (tmp_path / folder / "deeper").mkdir(parents=True)
    for name in ("b.jpg", "deeper/a.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / images / name)
        (tmp_path / labels / name).with_suffix(".txt").write_text("1 .5 .5 .5 .5\n")
    (tmp_path / images / "notes.md").write_text("no image")
    data = VOCDataset(tmp_path, images, ANCHORS, 64, ["bolt", "nut"])
    assert [sample.image_id for sample in data.samples] == ["b", "a"]
    assert all(sample.labels.tolist() == [[1, 0, 0.25, 0.25, 0.75, 0.75]] for sample in data.samples)
    (tmp_path / labels / "b.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.txt: .*TOLERATE"):
        VOCDataset(tmp_path, images, ANCHORS, 64, ["bolt", "nut"])
    (tmp_path / "list.txt").write_text("data/obj/b.jpg\n")  # relative to the folder in which Darknet is started
    with pytest.raises(FileNotFoundError, match=r"b\.jpg: no such image"):
        VOCDataset(tmp_path, "list.txt", ANCHORS, 64, ["bolt", "nut"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        VOCDataset(tmp_path, "empty", ANCHORS, 64, ["bolt"])


def test_a_polygon_is_read_as_its_bounding_box(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    data = open_yolo(tmp_path, "0 .2 .1 .6 .5 .4 .9\n1 .1 .2 .3 .2 .3 .4 .1 .4\n", "a.jpg", classes=["bolt", "nut"])
    assert data.samples[0].labels.tolist() == [[0, 0, 0.2, 0.1, 0.6, 0.9], [1, 0, 0.1, 0.2, 0.3, 0.4]]
    for line in ("0 .2 .1 .6 .5 .4", "0 .2 .1 .6 .5 .4 .9 .1", "0 .2 .1 .6 .5 .4 1.2", "0 .5 .5"):
        with pytest.raises(ValueError, match=r"a\.txt: .*line 1"):
            open_yolo(tmp_path, line, "a.jpg", classes=["bolt"])
