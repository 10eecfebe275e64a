"""The data sets: reading, targets, augmentation, batches, anchors, and the errors for bad input."""

import colorsys
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import utils
from dataset import VOC_CLASSES, VOCDataset
from model import ANCHORS

SAMPLE = Path(__file__).resolve().parent.parent / "data_samples" / "voc"
CAT, DOG, PERSON = (VOC_CLASSES.index(name) for name in ("cat", "dog", "person"))


def voc_xml(objects) -> str:
    """A VOC annotation; objects are rows (class name, difficult, (xmin, ymin, xmax, ymax))."""
    text = ""
    for name, difficult, box in objects:
        sides = "".join(
            f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        text += f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"
    return f"<annotation>{text}</annotation>"


def make_devkit(root: Path, samples: dict, layout: str = "VOC2007", size=(100, 80)) -> Path:
    """Writes a small devkit; `samples` maps each image id to its objects (see voc_xml), or to the
    text of its annotation."""
    folder = root / layout
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("".join(f"{image_id}\n" for image_id in samples))
    for number, (image_id, objects) in enumerate(samples.items()):
        Image.new("RGB", size, (40 * number % 256, 90, 160)).save(folder / f"JPEGImages/{image_id}.jpg")
        (folder / f"Annotations/{image_id}.xml").write_text(objects if isinstance(objects, str) else voc_xml(objects))
    return folder


def open_devkit(root: Path, **options) -> VOCDataset:
    return VOCDataset(root, [("2007", "train")], ANCHORS, **{"image_size": 64, **options})


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

    # the inverse of YOLO9000 Fig. 3: t_x = ln(x / (1 - x)), t_w = ln(w / p_w); logits of
    # objectness and classes far from 0
    objectness, x, y, w, h, label = targets.double().unbind(-1)
    p_w, p_h = torch.tensor(ANCHORS, dtype=torch.float64).T[:, :, None, None]
    has_object = objectness > 0
    raw = torch.zeros(1, 5, grid_height, grid_width, 25)
    for channel, value in enumerate((torch.logit(x), torch.logit(y), torch.log(w / p_w), torch.log(h / p_h))):
        raw[0, ..., channel] = torch.where(has_object, value, 0)
    raw[0, ..., 4] = torch.where(has_object, 20, -20)
    raw[0, ..., 5:] = 20.0 * torch.nn.functional.one_hot(label.long(), 20)
    decoded, confidence, probabilities = (tensor[0] for tensor in utils.decode_predictions(raw, ANCHORS))

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


def test_objects_of_different_shapes_in_one_cell_get_separate_slots():
    targets = dataset.encode_targets(
        [[0.5, 0.5, 0.1, 0.4], [0.5, 0.5, 0.4, 0.1]], [3, 7], [(1.3, 5.2), (5.2, 1.3)], 13, 13
    )
    assert targets[:, 6, 6, 0].tolist() == [1, 1] and targets[:, 6, 6, 5].tolist() == [3, 7]


@pytest.mark.parametrize("boxes", [[], np.empty((0, 4)), torch.empty(0, 4)])
def test_without_objects_the_targets_are_zero(boxes):
    targets = dataset.encode_targets(boxes, [], ANCHORS, 3, 4)
    assert targets.shape == (5, 3, 4, 6) and not targets.any()


@pytest.mark.parametrize(
    ("centre", "cell"), [((1.0, 0.5), (1, 3)), ((0.5, 1.0), (2, 2)), ((1.0, 1.0), (2, 3)), ((0, 0), (0, 0))]
)
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
    for index in (0, len(data) - 1):
        image, targets = data[index]
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8 and image.max() > 128
        assert targets.shape == (5, 3, 3, 6) and targets.dtype == torch.float32
        rows, image_id = data.ground_truth(index)
        assert 1 <= targets[..., 0].sum() <= len(rows)
        file, _ = data.samples[index]
        assert dataset.image_size(file) == Image.open(SAMPLE / f"VOC2007/JPEGImages/{image_id}.jpg").size


def test_several_image_sets_are_concatenated():
    sets = [("2007", "one"), ("2007", "tiny")]
    both = VOCDataset(SAMPLE, sets, ANCHORS)
    parts = [VOCDataset(SAMPLE, [image_set], ANCHORS) for image_set in sets]
    assert both.samples == parts[0].samples + parts[1].samples


def test_limit_keeps_the_first_images():
    whole = VOCDataset(SAMPLE, [("2007", "tiny")], ANCHORS, image_size=64)
    assert len(whole) > 3
    for limit, count in ((3, 3), (1, 1), (len(whole) + 5, len(whole)), (None, len(whole))):
        data = VOCDataset(SAMPLE, [("2007", "tiny")], ANCHORS, image_size=64, limit=limit)
        assert len(data) == len(data.labels) == count and data.samples == whole.samples[:count]
    assert torch.equal(data[2][1], whole[2][1])


def test_labels_of_images_beyond_the_limit_are_not_read(tmp_path):
    make_devkit(tmp_path, {"good": [], "bad": "<annotation>"})
    assert len(open_devkit(tmp_path, limit=1)) == 1


def test_ground_truth_is_class_difficult_flag_and_the_pixels_of_the_annotation(tmp_path):
    make_devkit(tmp_path, {"000007": [("dog", 0, (1, 2, 50, 60)), ("person", 1, (10, 20, 100, 80))]})
    rows, image_id = open_devkit(tmp_path).ground_truth(0)
    assert rows.tolist() == [[DOG, 0, 1, 2, 50, 60], [PERSON, 1, 10, 20, 100, 80]]
    assert rows.dtype == torch.float64 and image_id == "000007"


def test_targets_are_in_grid_cells(tmp_path):
    # 100 x 80 pixels on 2 x 2 cells; devkit pixels 21..71 x 11..51 are .2 to .7 of the width and .125 to .625 of the
    # height: centre .45, .375 -> .9, .75 cells; size .5, .5 -> 1 x 1 cells
    make_devkit(tmp_path, {"a": [("cat", 0, (21, 11, 71, 51))]})
    _, targets = open_devkit(tmp_path)[0]
    assert targets[..., 0].sum() == 1
    np.testing.assert_allclose(targets[0, 0, 0].numpy(), [1, 0.9, 0.75, 1, 1, CAT], atol=1e-5)


def test_the_data_folder_may_contain_the_years_or_vocdevkit(tmp_path):
    objects = {"a": [("cat", 0, (21, 11, 71, 51))]}
    make_devkit(tmp_path / "plain", objects)
    make_devkit(tmp_path / "nested", objects, layout="VOCdevkit/VOC2007")
    plain, nested = open_devkit(tmp_path / "plain"), open_devkit(tmp_path / "nested")
    assert torch.equal(plain.ground_truth(0)[0], nested.ground_truth(0)[0])
    for first, second in zip(plain[0], nested[0], strict=True):
        assert torch.equal(first, second)


def test_lists_per_class_with_a_second_column_are_read(tmp_path):
    folder = make_devkit(tmp_path, {"a": [], "b": []})
    (folder / "ImageSets/Main/cat_train.txt").write_text("a  1\nb -1\n\n")
    data = VOCDataset(tmp_path, [("2007", "cat_train")], ANCHORS)
    assert [Path(image).stem for image, _ in data.samples] == ["a", "b"]


def test_difficult_objects_are_ground_truth_but_not_targets(tmp_path):
    make_devkit(tmp_path, {"a": [("dog", 0, (5, 5, 20, 20)), ("cat", 1, (60, 40, 90, 70))]})
    data = open_devkit(tmp_path)
    assert data.ground_truth(0)[0][:, 1].tolist() == [0, 1]
    targets = data[0][1]
    assert targets[..., 0].sum() == 1 and targets[targets[..., 0] > 0][0, 5] == DOG


@pytest.mark.parametrize("augment", [False, True])
def test_the_targets_of_an_image_without_objects_are_zero(tmp_path, augment):
    make_devkit(tmp_path, {"a": [], "b": [("dog", 1, (5, 5, 20, 20))]})  # b has only a difficult one
    data = open_devkit(tmp_path, augment=augment)
    assert data.ground_truth(0)[0].shape == (0, 6)
    for index in (0, 1):
        image, targets = data[index]
        assert image.shape == (3, 64, 64) and targets.shape == (5, 2, 2, 6) and not targets.any()


def test_csv_lists_with_xml_or_yolo_labels_give_the_same_samples_as_the_devkit(tmp_path):
    devkit = VOCDataset(SAMPLE, [("2007", "tiny")], ANCHORS, image_size=64)
    xml_lines, txt_lines = ["image,label"], []
    for index in range(4):
        image_file, label_file = devkit.samples[index]
        name = Path(image_file).name
        shutil.copy(image_file, tmp_path / name)
        shutil.copy(label_file, tmp_path)
        width, height = dataset.image_size(image_file)
        labels = ""
        for label, _, x1, y1, x2, y2 in devkit.ground_truth(index)[0].tolist():
            x, y = ((x1 - 1) + (x2 - 1)) / 2 / width, ((y1 - 1) + (y2 - 1)) / 2 / height  # devkit pixels count from 1
            labels += f"{int(label)} {x!r} {y!r} {(x2 - x1) / width!r} {(y2 - y1) / height!r}\n"
        (tmp_path / f"{name[:-4]}.txt").write_text(labels)
        xml_lines.append(f"{name},{name[:-4]}.xml")
        txt_lines.append(f"{name}, {name[:-4]}.txt")
    (tmp_path / "with_xml.csv").write_text("\n".join(xml_lines))
    (tmp_path / "with_txt.csv").write_text("\n".join(txt_lines) + "\n\n")
    for data in (
        VOCDataset(tmp_path, ["with_xml.csv"], ANCHORS, image_size=64),
        VOCDataset(tmp_path, ["with_txt.csv"], ANCHORS, image_size=64),
        VOCDataset(tmp_path / "with_txt.csv", [], ANCHORS, image_size=64),  # the csv file instead of its folder
    ):
        assert len(data) == 4
        for index in range(4):
            (rows, image_id), (expected, expected_id) = data.ground_truth(index), devkit.ground_truth(index)
            assert image_id == expected_id
            torch.testing.assert_close(rows, expected, atol=1e-9, rtol=0)
            for value, original in zip(data[index], devkit[index], strict=True):
                torch.testing.assert_close(value, original)


def coco(images, annotations, names=("dog", "cat")) -> dict:
    """COCO's format from rows (image id, file name) and (image id, category id, bbox); the category
    ids are 11, 21, 31 ..."""
    return {
        "images": [{"id": image_id, "file_name": name, "width": 100, "height": 80} for image_id, name in images],
        "categories": [{"id": 10 * place + 11, "name": name} for place, name in enumerate(names)],
        "annotations": [
            {"id": 500 + place, "image_id": image_id, "category_id": category, "bbox": box, "iscrowd": 0}
            for place, (image_id, category, box) in enumerate(annotations)
        ],
    }


def write_coco(root: Path, content: dict | str, name="train.json", images=("a.jpg", "b.jpg")) -> Path:
    """Writes a COCO JSON file and its images, 100 x 80 pixels, beside it."""
    for place, image in enumerate(images):
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 80), (40 * place, 90, 160)).save(root / image)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root / name


def open_coco(root: Path, content: dict | str, **options) -> VOCDataset:
    write_coco(root, content)
    return VOCDataset(root, ["train.json"], ANCHORS, **{"image_size": 64, **options})


def test_the_same_boxes_as_voc_xml_yolo_txt_and_coco_json_give_the_same_targets_and_ground_truth(tmp_path):
    """x = 10, w = 20 of COCO are .1 to .3 of 100 pixels, and devkit pixels 11 to 31: an edge is 1 + its distance from
    the border (Darknet's voc_label.py and detector.c). The box at the right and lower border ends at 101, 81."""
    boxes = {"a": [("dog", (10, 20, 20, 40)), ("cat", (50.5, 8, 12.25, 16))], "b": [], "c": [("cat", (60, 40, 40, 40))]}
    devkit, images, annotations, yolo = {}, [], [], []
    for number, (name, rows) in enumerate(boxes.items()):
        devkit[name] = [(label, 0, (x + 1, y + 1, x + w + 1, y + h + 1)) for label, (x, y, w, h) in rows]
        images.append((number + 7, f"{name}.jpg"))
        annotations += [(number + 7, {"dog": 11, "cat": 21}[label], box) for label, box in rows]
        lines = [
            (VOC_CLASSES.index(label), (x + w / 2) / 100, (y + h / 2) / 80, w / 100, h / 80)
            for label, (x, y, w, h) in rows
        ]
        (tmp_path / f"{name}.txt").write_text("".join(" ".join(map(repr, line)) + "\n" for line in lines))
        yolo.append(f"VOC2007/JPEGImages/{name}.jpg,{name}.txt\n")
    folder = make_devkit(tmp_path, devkit)
    (tmp_path / "yolo.csv").write_text("".join(yolo))
    write_coco(folder / "JPEGImages", coco(images, annotations), images=())

    from_xml = open_devkit(tmp_path)
    from_txt = VOCDataset(tmp_path, ["yolo.csv"], ANCHORS, image_size=64)
    from_json = VOCDataset(folder / "JPEGImages", ["train.json"], ANCHORS, image_size=64)
    np.testing.assert_allclose(from_json.labels[0][0], [DOG, 0, 0.1, 0.25, 0.3, 0.75], atol=1e-12)
    np.testing.assert_allclose(from_json.ground_truth(0)[0][0].numpy(), [DOG, 0, 11, 21, 31, 61], atol=1e-9)
    np.testing.assert_allclose(from_json.ground_truth(2)[0].numpy(), [[CAT, 0, 61, 41, 101, 81]], atol=1e-9)
    assert not len(from_json.labels[1])
    for index in range(3):
        for data in (from_xml, from_txt):
            torch.testing.assert_close(data.ground_truth(index)[0], from_json.ground_truth(index)[0], atol=1e-9, rtol=0)
            assert data.ground_truth(index)[1] == from_json.ground_truth(index)[1]
            for value, other in zip(data[index], from_json[index], strict=True):
                torch.testing.assert_close(value, other)
        assert int(from_json[index][1][..., 0].sum()) == len(boxes["abc"[index]])


def test_coco_categories_are_matched_by_name_and_labels_by_image_id(tmp_path):
    content = coco(
        [(9, "b.jpg"), (4, "a.jpg")], [(4, 21, [0, 0, 50, 40]), (9, 11, [0, 0, 10, 8]), (4, 11, [50, 40, 50, 40])]
    )
    data = open_coco(tmp_path, content, classes=["cat", "dog"])
    assert [Path(image).name for image, _ in data.samples] == ["b.jpg", "a.jpg"]
    assert data.labels[0].tolist() == [[1, 0, 0, 0, 0.1, 0.1]]
    assert data.labels[1].tolist() == [[0, 0, 0, 0, 0.5, 0.5], [1, 0, 0.5, 0.5, 1, 1]]
    # as DATA_DIR
    assert torch.equal(VOCDataset(tmp_path / "train.json", [], ANCHORS, 64, ["cat", "dog"])[1][1], data[1][1])


def test_coco_boxes_without_width_or_height_are_left_out_and_counted(tmp_path, capsys):
    """As two boxes of COCO's own instances_train2017.json."""
    content = coco([(1, "a.jpg")], [(1, 11, [0, 0, 10, 8]), (1, 11, [5, 5, 0, 8]), (1, 21, [5, 5, 9, 0.0])])
    assert len(open_coco(tmp_path, content).labels[0]) == 1
    message = "skipped 2 annotations of zero width or height (first: annotation 501)"
    assert capsys.readouterr().out.count(message) == 1


def test_cocos_own_class_names_fit_darknets(tmp_path):
    content = coco([(1, "a.jpg")], [(1, 11, [0, 0, 10, 8]), (1, 21, [50, 40, 20, 20])], names=("airplane", "tv"))
    assert open_coco(tmp_path, content, classes=["tvmonitor", "aeroplane"]).labels[0][:, 0].tolist() == [1, 0]
    assert open_coco(tmp_path, content, classes=["tv", "tvmonitor", "airplane"]).labels[0][:, 0].tolist() == [2, 0]


def test_crowds_are_difficult_and_images_without_annotations_are_background(tmp_path):
    content = coco([(1, "a.jpg"), (2, "b.jpg")], [(1, 11, [0, 0, 10, 8]), (1, 21, [50, 40, 20, 20])])
    content["annotations"][1]["iscrowd"] = 1
    data = open_coco(tmp_path, content)
    assert data.ground_truth(0)[0][:, :2].tolist() == [[DOG, 0], [CAT, 1]]
    assert data[0][1][..., 0].sum() == 1 and not data[1][1].any() and data.ground_truth(1)[0].shape == (0, 6)


def test_other_categories_of_coco_are_an_error_or_skipped(tmp_path):
    content = coco([(1, "a.jpg")], [(1, 11, [0, 0, 10, 8]), (1, 21, [50, 40, 20, 20])], names=("dog", "unicorn"))
    with pytest.raises(
        ValueError, match=r"train\.json: annotation 501: unknown class 'unicorn'; .*TOLERATE=\['other classes'\]"
    ):
        open_coco(tmp_path, content)
    assert open_coco(tmp_path, content, tolerate=["other classes"]).labels[0][:, 0].tolist() == [DOG]


@pytest.mark.parametrize("declared", [(100, 80), (50, 40), (None, None), (0, 0)])
def test_coco_boxes_are_fractions_of_the_declared_size_or_else_of_the_image(tmp_path, capsys, declared):
    content = coco([(1, "a.jpg")], [(1, 11, [10, 8, 20, 16])])
    content["images"][0] |= dict(zip(("width", "height"), declared, strict=True))
    data = open_coco(tmp_path, content)
    scale = 2 if declared == (50, 40) else 1
    np.testing.assert_allclose(data.labels[0][:, 2:] / scale, [[0.1, 0.1, 0.3, 0.3]], atol=1e-12)
    dataset.print_suspicious_labels(data)
    doubt = "train.json#1: declares an image of 50 x 40, but the image is 100 x 80"
    assert (doubt in capsys.readouterr().out) == (declared == (50, 40))


@pytest.mark.parametrize(
    ("image", "json_file", "file_name"),
    [
        ("a.jpg", "train.json", "a.jpg"),
        ("images/a.jpg", "train.json", "a.jpg"),
        ("a.jpg", "labels/train.json", "a.jpg"),
        ("images/a.jpg", "labels/train.json", "a.jpg"),
        ("images/a.jpg", "labels/train.json", "images\\a.jpg"),
        ("val2017/a.jpg", "annotations/instances_val2017.json", "a.jpg"),
        ("val2017/a.jpg", "annotations/instances_val2017.json", "../val2017/a.jpg"),
    ],
)
def test_images_of_a_coco_file_are_found(tmp_path, image, json_file, file_name):
    write_coco(tmp_path, coco([(1, file_name)], []), json_file, [image])
    for image_sets in ([json_file], json_file):
        assert Path(dataset.list_samples(tmp_path, image_sets)[0][0]).samefile(tmp_path / image)


def test_images_of_a_coco_file_are_looked_for_in_its_folders_before_the_working_directory(tmp_path, monkeypatch):
    write_coco(tmp_path / "data", coco([(1, "images/a.jpg")], []), "annotations/train.json", ["images/a.jpg"])
    write_coco(tmp_path / "elsewhere", "{}", "other.json", ["images/a.jpg"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    ((image, _),) = dataset.list_samples(tmp_path / "data", ["annotations/train.json"])
    assert Path(image).samefile(tmp_path / "data/images/a.jpg")


def test_a_coco_file_is_parsed_once_and_again_after_a_change(tmp_path, monkeypatch):
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(1) or loads(text))
    images = [(number, "a.jpg") for number in range(50)]
    data = open_coco(tmp_path, coco(images, [(3, 11, [0, 0, 10, 8])]))
    again = VOCDataset(tmp_path, ["train.json"], ANCHORS)
    assert len(data) == len(again) == 50 and len(again.labels[3]) == 1 and len(parsed) == 1
    changed = write_coco(tmp_path, coco(images[:20], []))
    os.utime(changed, ns=(1, 1))  # the clock of a file system may be coarse
    assert len(VOCDataset(tmp_path, ["train.json"], ANCHORS)) == 20 and len(parsed) == 2


def test_yolo_labels_stay_exact_fractions_whatever_the_size_of_the_image(tmp_path):
    """No round trip through pixels: it would round, and would need the size of every image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (333, 217)).save(tmp_path / "odd.jpg")
    Image.new("RGB", (64, 64)).save(tmp_path / "square.jpg")
    Image.new("RGB", (217, 101)).save(tmp_path / "rotated.jpg", exif=exif)
    rows = [(7, 0.1, 0.3, 0.07, 0.11), (11, 0.6180339887498949, 0.7, 0.123456789, 0.2)]
    (tmp_path / "a.txt").write_text("".join(f"{label} {x!r} {y!r} {w!r} {h!r}\n" for label, x, y, w, h in rows))
    (tmp_path / "list.csv").write_text("odd.jpg,a.txt\nsquare.jpg,a.txt\nrotated.jpg,a.txt\nmissing.jpg,a.txt\n")
    data = VOCDataset(tmp_path, ["list.csv"], ANCHORS, image_size=416)  # reads no image: one of them is missing
    corners = [[label, 0, x - w / 2, y - h / 2, x + w / 2, y + h / 2] for label, x, y, w, h in rows]
    expected = dataset.encode_targets([row[1:] for row in rows], [row[0] for row in rows], ANCHORS, 13, 13)
    for index in range(3):
        assert data.labels[index].tolist() == corners  # to the last bit
        torch.testing.assert_close(data[index][1], expected, atol=1e-6, rtol=0)
        assert torch.equal(data[index][1], data[0][1])
    assert data.labels[3].tolist() == corners


def test_ground_truth_of_yolo_labels_accepts_a_known_image_size(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("7 .5 .5 .5 .5\n")
    (tmp_path / "list.csv").write_text("a.png,a.txt\n")
    data = VOCDataset(tmp_path, ["list.csv"], ANCHORS)
    rows, image_id = data.ground_truth(0)
    (tmp_path / "a.png").unlink()  # the size cannot come from the file any more
    assert torch.equal(data.ground_truth(0, (40, 30))[0], rows) and data.ground_truth(0, (40, 30))[1] == image_id == "a"
    np.testing.assert_allclose(data.ground_truth(0, (200, 100))[0].numpy(), [[7, 0, 51, 26, 151, 76]], atol=1e-9)


@pytest.mark.parametrize("augment", [False, True])
def test_images_and_sizes_returns_unaugmented_images_and_their_original_sizes(tmp_path, augment):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "rotated.jpg", exif=exif)  # shown as 40 x 60
    Image.fromarray(noise[:, :, 0]).save(tmp_path / "grey.png")
    Image.fromarray(noise).convert("RGBA").save(tmp_path / "rgba.png")
    names = ("rotated.jpg", "grey.png", "rgba.png")
    (tmp_path / "a.txt").write_text("7 .5 .5 .5 .5\n")
    (tmp_path / "list.csv").write_text("".join(f"{name},a.txt\n" for name in names))
    plain = VOCDataset(tmp_path, ["list.csv"], ANCHORS, image_size=96)
    data = VOCDataset(tmp_path, ["list.csv"], ANCHORS, image_size=96, augment=augment)
    images, sizes = data.images_and_sizes([2, 0, 1])
    assert images.shape == (3, 3, 96, 96) and images.dtype == torch.uint8
    assert sizes.tolist() == [[60, 40], [40, 60], [60, 40]]
    assert sizes.tolist() == [list(dataset.image_size(data.samples[index][0])) for index in (2, 0, 1)]
    for image, index in zip(images, (2, 0, 1), strict=True):
        assert torch.equal(image, plain[index][0])


def test_images_and_sizes_of_the_sample_equal_its_items():
    data = VOCDataset(SAMPLE, [("2007", "tiny")], ANCHORS, image_size=64)
    images, sizes = data.images_and_sizes(list(range(len(data))))
    for index in range(len(data)):
        assert torch.equal(images[index], data[index][0])
        assert tuple(sizes[index].tolist()) == dataset.image_size(data.samples[index][0])


def test_an_empty_yolo_label_file_is_an_image_without_objects(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("\n")
    (tmp_path / "list.csv").write_text("a.png,a.txt\n")
    data = VOCDataset(tmp_path, ["list.csv"], ANCHORS, image_size=32)
    assert data.ground_truth(0)[0].shape == (0, 6) and not data[0][1].any()


def test_custom_classes_are_numbered_in_their_own_order(tmp_path):
    make_devkit(tmp_path, {"a": [("pear", 0, (5, 5, 20, 20)), ("apple", 0, (30, 5, 50, 20))]})
    assert open_devkit(tmp_path, classes=("pear", "apple")).ground_truth(0)[0][:, 0].tolist() == [0, 1]


def test_a_model_that_outputs_the_targets_has_an_average_precision_of_1(tmp_path):
    """Labels -> targets -> raw outputs -> detections -> average precision: no step is off by
    one pixel, row or class."""
    make_devkit(
        tmp_path,
        {
            "a": [("dog", 0, (5, 9, 24, 30)), ("cat", 0, (60, 40, 91, 71)), ("person", 1, (40, 5, 50, 30))],
            "b": [("dog", 0, (10, 20, 29, 75)), ("dog", 0, (50, 9, 97, 30))],
            "c": [],
        },
    )
    data = open_devkit(tmp_path, image_size=160)

    class Oracle(torch.nn.Module):
        """Returns the raw outputs that decode to the targets, batch by batch."""

        def __init__(self):
            super().__init__()
            self.unused, self.index = torch.nn.Parameter(torch.zeros(1)), 0

        def forward(self, images):
            raw = torch.full((len(images), 5, 5, 5, 25), -20.0)
            for image in range(len(images)):
                targets = data[self.index][1]
                for a, row, column in torch.nonzero(targets[..., 0]).tolist():
                    _, x, y, w, h, label = targets[a, row, column].tolist()
                    (p_w, p_h), slot = ANCHORS[a], raw[image, a, row, column]
                    x, y = (min(max(value, 1e-6), 1 - 1e-6) for value in (x, y))
                    slot[:5] = torch.tensor(
                        [math.log(x / (1 - x)), math.log(y / (1 - y)), math.log(w / p_w), math.log(h / p_h), 10]
                    )
                    slot[5 + int(label)] = 20
                self.index += 1
            return raw

    detections, truths, seconds = utils.detect_dataset(Oracle(), data, batch_size=2, num_workers=0)
    assert len(detections) == 4 and len(truths) == 5 and set(seconds) == {"loading", "network", "post-processing"}
    for metric in ("all_points", "voc2007"):
        values = utils.average_precision(detections, truths, 20, iou_threshold=0.99, metric=metric)
        expected = [1.0 if label in (CAT, DOG) else math.nan for label in range(20)]
        np.testing.assert_allclose(values.numpy(), expected)


# ---------------------------------------------------------------- augmentation


def test_the_same_key_gives_the_same_sample_regardless_of_earlier_ones():
    first = VOCDataset(SAMPLE, [("2007", "one")], ANCHORS, image_size=96, augment=True)
    second = VOCDataset(SAMPLE, [("2007", "one")], ANCHORS, image_size=96, augment=True)
    image, targets = first[(0, 96, 5)]
    for seed in (1, 2):
        other_image, other_targets = second[(0, 96, seed)]
        assert not torch.equal(other_image, image) and not torch.equal(other_targets, targets)
    again_image, again_targets = second[(0, 96, 5)]
    assert torch.equal(again_image, image) and torch.equal(again_targets, targets)


def test_the_image_size_is_part_of_the_key():
    data = VOCDataset(SAMPLE, [("2007", "one")], ANCHORS, image_size=64, augment=True)
    for size in (96, 160, 96):
        image, targets = data[(0, size, 5)]
        assert image.shape == (3, size, size) and targets.shape == (5, size // 32, size // 32, 6)
    assert data[0][0].shape == (3, 64, 64)


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_flips_and_colours_are_independent(kind, tmp_path):
    """The transforms must not draw the same random numbers: with and without a flip, the hue is
    shifted in both directions."""
    pixels = np.full((64, 64, 3), (200, 40, 40), np.uint8)
    pixels[:, :32] //= 2  # the left half is darker
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "train" / "a" / "x.png")
    if kind == "detector":
        (tmp_path / "x.txt").write_text("")
        (tmp_path / "all.csv").write_text("train/a/x.png,x.txt\n")
        data = VOCDataset(tmp_path, ["all.csv"], ANCHORS, 64, augment=True)
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


def test_without_augmentation_the_seed_changes_nothing():
    data = VOCDataset(SAMPLE, [("2007", "one")], ANCHORS, image_size=64)
    assert torch.equal(data[(0, 64, 1)][0], data[(0, 64, 2)][0]) and torch.equal(data[(0, 64, 1)][0], data[0][0])


def test_worker_processes_give_the_same_samples_as_the_main_process():
    data = VOCDataset(SAMPLE, [("2007", "tiny")], ANCHORS, augment=True)
    batches = list(itertools.islice(dataset.training_batches(8, 4, 1, [64, 96], seed=1, first_step=9), 2))
    assert {size for batch in batches for _, size, _ in batch} == {64, 96}  # a new size is drawn at step 10
    here = list(torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=0))
    there = list(torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=2))
    assert len(here) == len(there) == 2
    for (images, targets), (other_images, other_targets) in zip(here, there, strict=True):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


def test_colours_are_rgb_and_the_first_row_is_at_the_top(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32] = (255, 0, 0)  # top left red
    picture[32:, 32:] = (0, 0, 255)  # bottom right blue
    folder = make_devkit(tmp_path, {"a": []})
    Image.fromarray(picture).save(folder / "JPEGImages/a.jpg", quality=95, subsampling=0)
    image, _ = open_devkit(tmp_path)[0]
    for row, column, colour in ((8, 8, (255, 0, 0)), (56, 56, (0, 0, 255)), (8, 56, (0, 0, 0)), (56, 8, (0, 0, 0))):
        assert image[:, row, column].tolist() == pytest.approx(colour, abs=8)


@pytest.mark.parametrize("box", [(60, 40, 160, 130), (3, 150, 120, 237)], ids=["inside", "near_the_corner"])
def test_boxes_stay_on_their_object_under_augmentation(tmp_path, box):
    left, top, right, bottom = box  # pixels, 0-based, right and bottom exclusive
    picture = np.zeros((240, 320, 3), np.uint8)
    picture[top:bottom, left:right] = (255, 0, 0)  # the only object; the padding repeats the black border
    folder = make_devkit(tmp_path, {"a": [("cat", 0, (left + 1, top + 1, right, bottom))]})
    Image.fromarray(picture).save(folder / "JPEGImages/a.jpg", quality=95, subsampling=0)
    data = open_devkit(tmp_path, image_size=160, augment=True)
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
    folder = make_devkit(tmp_path, {"a": [("cat", 0, (4, 1, 60, 240)), ("dog", 0, (101, 81, 220, 160))]})
    Image.fromarray(picture).save(folder / "JPEGImages/a.jpg", quality=95, subsampling=0)
    data = open_devkit(tmp_path, augment=True)
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
    """As crop_image in Darknet's src/image.c; a picture of vertical stripes stays one however far its
    top and bottom move out."""
    picture = np.zeros((200, 200, 3), np.uint8)
    picture[:, :, :] = np.random.default_rng(0).integers(60, 200, (1, 200, 1))
    folder = make_devkit(tmp_path, {"a": []})
    Image.fromarray(picture).save(folder / "JPEGImages/a.jpg", quality=95, subsampling=0)
    data = open_devkit(tmp_path, augment=True)
    for seed in range(20):
        image = data[(0, 256, seed)][0].float()
        assert image.std(dim=1).max() < 4 and image.std(dim=2).min() > 10, f"seed {seed}"


def darknet_distortion(image, shift, saturation, exposure):
    """distort_image of Darknet's src/image.c in floating point: image (H, W, 3) in 0..1; only the
    RGB values are clipped."""
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


def batches_of_epoch(
    epoch, count, batch_size, subdivisions=1, image_sizes=(320,), seed=0, repeat=1
) -> list[list[tuple]]:
    steps = dataset.steps_per_epoch(count * repeat, batch_size, subdivisions)
    batches = dataset.training_batches(count, batch_size, subdivisions, list(image_sizes), seed, epoch * steps, repeat)
    return list(itertools.islice(batches, steps * subdivisions))


def indices(batches) -> list[int]:
    return [index for batch in batches for index, _, _ in batch]


def test_an_epoch_visits_every_image_once_and_is_the_same_each_time():
    batches = batches_of_epoch(3, count=12, batch_size=4, seed=7, image_sizes=[320, 352])
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert sorted(indices(batches)) == list(range(12))
    assert batches == batches_of_epoch(3, count=12, batch_size=4, seed=7, image_sizes=[320, 352])


def test_order_and_augmentation_differ_between_epochs_and_between_seeds():
    batches = batches_of_epoch(3, count=12, batch_size=4, seed=7)
    for epoch, seed in ((4, 7), (3, 8)):
        other = batches_of_epoch(epoch, count=12, batch_size=4, seed=seed)
        assert indices(other) != indices(batches)
        assert {key[2] for batch in other for key in batch}.isdisjoint(key[2] for batch in batches for key in batch)


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


def test_the_image_sizes_depend_on_the_seed():
    def sizes(seed):
        return [batch[0][1] for batch in itertools.islice(dataset.training_batches(4, 4, 1, [320, 352], seed), 200)]

    assert sizes(0) == sizes(0) != sizes(1)


def test_repeat_visits_every_image_several_times_per_epoch():
    batches = batches_of_epoch(0, count=5, batch_size=5, repeat=3)
    assert [sorted(indices([batch])) for batch in batches] == [list(range(5))] * 3
    assert len({key[2] for batch in batches for key in batch}) == 15  # with a different augmentation each time


def test_an_incomplete_last_batch_is_left_out_unless_it_is_the_only_one():
    assert [len(batch) for batch in batches_of_epoch(0, count=10, batch_size=4)] == [4, 4]
    assert [len(batch) for batch in batches_of_epoch(0, count=3, batch_size=4)] == [3]
    # later epochs too
    assert [len(batch) for batch in itertools.islice(dataset.training_batches(10, 4, 1, [320], 0), 6)] == [4] * 6
    assert [len(batch) for batch in itertools.islice(dataset.training_batches(3, 4, 1, [320], 0), 3)] == [3] * 3


def test_steps_per_epoch_counts_complete_batches_and_is_at_least_1():
    counts = [(8, 4), (11, 4), (4, 4), (3, 4)]
    assert [dataset.steps_per_epoch(count, batch_size) for count, batch_size in counts] == [2, 2, 1, 1]
    assert dataset.steps_per_epoch(11, 4, subdivisions=2) == 2
    with pytest.raises(ValueError, match="3 images per epoch do not fill a batch of 4.*BATCH_SIZE.*SUBDIVISIONS=1"):
        dataset.steps_per_epoch(3, 4, subdivisions=2)


def test_subdivisions_split_each_batch_and_change_nothing_else():
    sizes = [320, 352]
    whole = batches_of_epoch(2, count=14, batch_size=6, image_sizes=sizes, repeat=2)
    parts = batches_of_epoch(2, count=14, batch_size=6, subdivisions=3, image_sizes=sizes, repeat=2)
    assert [len(batch) for batch in whole] == [6] * 4 and [len(part) for part in parts] == [2] * 12
    assert [key for part in parts for key in part] == [key for batch in whole for key in batch]


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("subdivisions", [1, 3])
def test_a_resumed_run_sees_the_rest_of_the_batches(subdivisions, repeat):
    """17 images in batches of 6: 2 or 5 steps per epoch. A run may resume at any step, also in
    the middle of an epoch."""
    arguments = (17, 6, subdivisions, [320, 352, 384], 5)
    whole = list(itertools.islice(dataset.training_batches(*arguments, repeat=repeat), 24 * subdivisions))
    for first_step in range(24):
        resumed = dataset.training_batches(*arguments, first_step=first_step, repeat=repeat)
        tail = whole[first_step * subdivisions :]
        assert list(itertools.islice(resumed, len(tail))) == tail, f"first step {first_step}"


def test_the_files_of_a_step_are_those_of_all_its_subdivisions():
    samples = [(f"{number}.jpg", f"{number}.xml") for number in range(8)]
    batches = list(itertools.islice(dataset.training_batches(8, 4, 2, [320], 0, first_step=1), 2))
    files = dataset.files_of_step(samples, dataset.training_batches(8, 4, 2, [320], 0, first_step=1), subdivisions=2)
    assert files == [f"{index}.jpg" for index in indices(batches)] and len(set(files)) == 4


# ---------------------------------------------------------------- anchors


def test_average_best_iou_by_hand():
    # (2, 2) is an anchor itself: 1. (4, 1) against (2, 2): 2 / (4 + 4 - 2) = 1/3, against
    # (4, 4): 4 / 16; the mean is 2/3.
    assert dataset.average_best_iou(np.array([[2, 2], [4, 1]]), [(2, 2), (4, 4)]) == pytest.approx(2 / 3, abs=1e-12)


def test_badly_fitting_anchors_are_reported(tmp_path, capsys):
    """At 64 px, an object that fills the image has 2 x 2 cells: IoU 1 x 2 / 4 with an anchor of half its width, .8 / 4
    with .4 x 2. Crowds do not count."""
    content = coco([(1, "a.jpg"), (2, "b.jpg")], [(1, 11, [0, 0, 100, 80]), (1, 21, [0, 0, 1, 1])])
    content["annotations"][1]["iscrowd"] = 1
    data = open_coco(tmp_path, content)
    data.anchors = [(0.4, 2)]
    dataset.print_badly_fitting_anchors(data)
    assert re.search(r"ANCHORS fit the boxes badly \(average IoU 0\.20\).*IMAGE_SIZE=64", capsys.readouterr().out)
    data.anchors = [(0.4, 2), (1, 2)]
    dataset.print_badly_fitting_anchors(data)
    assert capsys.readouterr().out == ""


def test_anchors_of_416_px_are_reported_at_160_px(capsys):
    for size, reported in ((160, True), (416, False)):
        dataset.print_badly_fitting_anchors(VOCDataset(SAMPLE, [("2007", "train")], ANCHORS, size))
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


def test_a_single_anchor_is_the_median_of_the_boxes():
    assert dataset.kmeans_anchors([(1, 1), (2, 4), (9, 5)], 1).tolist() == [[2, 4]]


def test_more_anchors_than_boxes_are_an_error():
    with pytest.raises(ValueError, match="2 boxes are too few for 3 anchors"):
        dataset.kmeans_anchors([(1, 1), (2, 2)], 3)


# ---------------------------------------------------------------- bad input


def test_a_missing_data_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'nowhere' / 'VOC2007'}")):
        open_devkit(tmp_path / "nowhere")


def test_a_missing_list_is_named(tmp_path):
    make_devkit(tmp_path, {"a": []})
    with pytest.raises(FileNotFoundError, match=r"trainval\.txt"):
        VOCDataset(tmp_path, [("2007", "trainval")], ANCHORS)
    with pytest.raises(FileNotFoundError, match=r"mine\.csv"):
        VOCDataset(tmp_path, ["mine.csv"], ANCHORS)


def test_a_csv_file_as_data_folder_together_with_image_sets_is_an_error(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "mine.csv").write_text("a.png,a.txt\n")
    assert len(VOCDataset(tmp_path / "mine.csv", [], ANCHORS)) == 1
    for image_sets in (["mine.csv"], [("2007", "trainval")]):
        with pytest.raises(
            ValueError, match=r"mine\.csv: DATA_DIR must be the folder of the lists that IMAGE_SETS names"
        ):
            VOCDataset(tmp_path / "mine.csv", image_sets, ANCHORS)


def test_an_empty_list_is_an_error(tmp_path):
    make_devkit(tmp_path, {})
    with pytest.raises(ValueError, match="name no image"):
        open_devkit(tmp_path)


def test_a_missing_image_is_named(tmp_path):
    folder = make_devkit(tmp_path, {"a": []})
    (folder / "JPEGImages/a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        open_devkit(tmp_path)[0]


def test_a_missing_label_file_is_named(tmp_path):
    folder = make_devkit(tmp_path, {"a": []})
    (folder / "Annotations/a.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.xml"):
        open_devkit(tmp_path)


def truncated_jpeg() -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()[: len(stream.getvalue()) // 2]


@pytest.mark.parametrize(
    "content", [truncated_jpeg(), b"this is not an image", b""], ids=["truncated", "text", "empty"]
)
def test_a_damaged_image_is_named(tmp_path, content):
    folder = make_devkit(tmp_path, {"a": []})
    (folder / "JPEGImages/a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jpg: not a readable image"):
        open_devkit(tmp_path)[0]


BNDBOX = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (voc_xml([("unicorn", 0, (5, 5, 20, 20))]), "unknown class 'unicorn'"),
        (f"<annotation><object>{BNDBOX}</object></annotation>", "unknown class ''"),
        (voc_xml([("cat", 0, (20, 5, 20, 20))]), "no extent"),
        (voc_xml([("cat", 0, (5, 21, 20, 20))]), "no extent"),
        (voc_xml([("cat", 0, (5, 5, "nan", 20))]), "no extent"),
        (voc_xml([("cat", 0, (5, 5, "inf", 20))]), "no extent"),
        (voc_xml([("cat", 0, (5, 5, "wide", 20))]), "no bndbox of four numbers"),
        (voc_xml([("cat", "maybe", (5, 5, 20, 20))]), "difficult of an object of class cat must be 0 or 1"),
        ("<annotation><object><name>cat</name></object></annotation>", "no bndbox of four numbers"),
        ("<annotation><object>", "not readable as XML"),
        ("", "not readable as XML"),
    ],
)
def test_a_bad_annotation_is_named_with_the_reason(tmp_path, xml, reason):
    make_devkit(tmp_path, {"good": [], "bad": xml})
    with pytest.raises(ValueError, match=rf"bad\.xml: .*{re.escape(reason)}"):
        open_devkit(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("20 .5 .5 .1 .1", "class 20"),
        ("-1 .5 .5 .1 .1", "class -1"),
        ("cat .5 .5 .1 .1", "expected `class x y w h`"),
        ("7 .5 .5 .1", "expected `class x y w h`"),
        ("7 .5 .5 .1 .1 .9", "expected `class x y w h`"),
        ("7 .5 1.5 .1 .1", "fractions of the image"),
        ("7 .5 .5 0 .1", "fractions of the image"),
        ("7 .5 .5 nan .1", "fractions of the image"),
        ("7 250 180 100 90", "fractions of the image"),
    ],
)
def test_a_bad_yolo_label_is_named_with_its_line(tmp_path, line, reason):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(f"7 .5 .5 .1 .1\n{line}\n")
    (tmp_path / "list.csv").write_text("a.png,a.txt\n")
    with pytest.raises(ValueError, match=rf"a\.txt, line 2: .*{re.escape(reason)}"):
        VOCDataset(tmp_path, ["list.csv"], ANCHORS)


def damage(table=None, **values):
    """A COCO file with one good and one changed row; the value None removes a key."""
    content = coco([(1, "a.jpg"), (2, "b.jpg")], [(1, 11, [0, 0, 10, 8]), (2, 21, [50, 40, 20, 20])])
    if table in content:
        content[table][1] = {key: value for key, value in (content[table][1] | values).items() if value is not None}
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (damage("annotations", bbox=[50, 40, 20, -1]), "annotation 501 has the bbox [50, 40, 20, -1] of no extent"),
        (
            damage("annotations", bbox=[50, math.nan, 20, 20]),
            "annotation 501 has the bbox [50, nan, 20, 20] of no extent",
        ),
        (damage("annotations", bbox=[50, 40, 20]), "annotation 501 needs a bbox of four numbers"),
        (damage("annotations", bbox=7), "annotation 501 needs a bbox of four numbers"),
        (damage("annotations", bbox=None), "annotation 501 has no 'bbox'"),
        (damage("annotations", iscrowd=3), "annotation 501 needs a bbox of four numbers x, y, w, h and iscrowd 0 or 1"),
        (damage("annotations", image_id=None), "annotation 501 has no 'image_id'"),
        (damage("annotations", id=None), "entry 1 of annotations has no 'id'"),
        (damage("annotations", image_id=77), "annotation 501 has the image_id 77, which the file does not define"),
        (
            damage("annotations", category_id=77),
            "annotation 501 has the category_id 77, which the file does not define",
        ),
        (damage("images", id=1), "two images have the id 1"),
        (damage("categories", id=11), "two categories have the same id"),
        (damage("images", file_name=None), "entry 1 of images has no 'file_name'"),
        (damage("categories", name=None), "the file has no 'name'"),
        ({"images": [], "annotations": []}, "the file has no 'categories'"),
        ({"images": 7, "annotations": [], "categories": []}, "the file is malformed"),
        ({"images": [7], "annotations": [], "categories": []}, "entry 0 of images is malformed"),
        ("[1, 2]", "the file is malformed"),
        ('{"images": [', "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("", "not readable as JSON"),
    ],
)
def test_a_bad_coco_file_is_named_with_the_reason(tmp_path, content, reason):
    with pytest.raises(ValueError, match=rf"train\.json: .*{re.escape(reason)}") as error:
        open_coco(tmp_path, content)
    assert len(str(error.value).splitlines()) == 1


def test_missing_images_and_missing_coco_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"val\.json: no such list of images"):
        dataset.list_samples(tmp_path, ["val.json"])
    write_coco(tmp_path, coco([(1, "lost.jpg")], []), "annotations/instances_val2017.json", [])
    with pytest.raises(
        FileNotFoundError, match=r"instances_val2017\.json: its image 'lost\.jpg' is in none of the folders"
    ) as error:
        dataset.list_samples(tmp_path, ["annotations/instances_val2017.json"])
    for folder in ("annotations", "annotations/images", "", "images", "val2017"):
        assert f"{tmp_path / folder}," in str(error.value) or f"{tmp_path / folder};" in str(error.value)


def test_a_coco_file_without_annotations_is_refused_unless_tolerated(tmp_path):
    content = {key: value for key, value in coco([(1, "a.jpg")], []).items() if key != "annotations"}
    with pytest.raises(ValueError, match=r"train\.json: has no list 'annotations'; set TOLERATE=\['missing labels'\]"):
        open_coco(tmp_path, content)
    assert open_coco(tmp_path, content, tolerate=["missing labels"]).labels[0].shape == (0, 6)
    assert not dataset.has_labels(f"{tmp_path}/train.json#1")


@pytest.mark.parametrize("line", ["b.png", "b.png,b.txt,7", "b.png,b.json", "b.txt,b.png", ",b"])
def test_a_bad_line_of_a_csv_list_is_named(tmp_path, line):
    (tmp_path / "list.csv").write_text(f"image,label\na.png,a.txt\n{line}\n")
    with pytest.raises(ValueError, match=r"list\.csv, line 3: expected image,label"):
        VOCDataset(tmp_path, ["list.csv"], ANCHORS)


@pytest.mark.parametrize("size", [100, 0, -32])
def test_an_image_size_that_is_not_a_multiple_of_32_is_an_error(size):
    with pytest.raises(ValueError, match=f"multiple of 32 pixels, not {size}"):
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
    np.testing.assert_allclose(
        image.reshape(-1, 3).astype(int), np.tile(expected, (48, 1)), atol=3 if name.endswith("jpg") else 1
    )
    assert dataset.image_size(tmp_path / name) == (8, 6)


# orientation -> where the stored image's top left corner is shown (row, column) and whether
# width and height are swapped
UNSWAPPED = {1: (0, 0, False), 2: (0, -1, False), 3: (-1, -1, False), 4: (-1, 0, False)}
ORIENTATIONS = {**UNSWAPPED, 5: (0, 0, True), 6: (0, -1, True), 7: (-1, -1, True), 8: (-1, 0, True)}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_applied(tmp_path, orientation):
    picture = np.zeros((40, 64, 3), np.uint8)
    picture[:16, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    image = dataset.read_image(tmp_path / "rotated.jpg")
    row, column, swapped = ORIENTATIONS[orientation]
    assert image.shape == ((64, 40, 3) if swapped else (40, 64, 3))
    assert dataset.image_size(tmp_path / "rotated.jpg") == image.shape[1::-1]
    corners = {(y, x): image[y, x].mean() for y in (0, -1) for x in (0, -1)}
    assert corners.pop((row, column)) > 240 and max(corners.values()) < 15


def test_yolo_labels_of_a_rotated_image_are_fractions_of_the_image_as_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)  # shown as 40 x 60
    (tmp_path / "a.txt").write_text("7 .5 .5 .5 .5\n")
    (tmp_path / "list.csv").write_text("a.jpg,a.txt\n")
    rows, _ = VOCDataset(tmp_path, ["list.csv"], ANCHORS).ground_truth(0)
    # a quarter to three quarters: 10..30 of 40 and 15..45 of 60, the first pixel being 1
    np.testing.assert_allclose(rows.numpy(), [[7, 0, 11, 16, 31, 46]], atol=1e-9)


# ---------------------------------------------------------------- python dataset.py: checking a data set


def settings(monkeypatch, tmp_path, **values) -> Path:
    sheet = tmp_path / "out" / "sheet.png"
    for name, value in {"SHEET": str(sheet), "SHEET_IMAGES": 2, "IMAGE_SIZE": 64, **values}.items():
        monkeypatch.setattr(dataset, name, value)
    return sheet


def test_the_check_prints_counts_and_average_ious_and_draws_a_label_sheet(monkeypatch, tmp_path, capsys):
    sheet = settings(monkeypatch, tmp_path, DATA_DIR=str(SAMPLE), IMAGE_SETS=[("2007", "tiny")])
    dataset.main()
    printed = capsys.readouterr().out

    folder = SAMPLE / "VOC2007"  # the same counts, taken from the files
    ids = (folder / "ImageSets/Main/tiny.txt").read_text().split()
    objects = [item for name in ids for item in ElementTree.parse(folder / f"Annotations/{name}.xml").iter("object")]
    difficult = sum(item.findtext("difficult") == "1" for item in objects)
    cats = sum(item.findtext("name") == "cat" and item.findtext("difficult") != "1" for item in objects)
    assert cats and f"{len(ids)} images, {len(objects)} objects, {difficult} of them difficult" in printed
    assert re.search(rf"^  cat +{cats}  difficult", printed, re.MULTILINE)
    in_use = float(re.search(r"average IoU of the default anchors: (0\.\d+)", printed)[1])
    new = float(re.search(r"average IoU of k-means anchors: +(0\.\d+)", printed)[1])
    assert 0.2 < in_use < new < 1
    argument = re.search(r'for train.py: IMAGE_SIZE=64 "(ANCHORS=.*)"', printed)[1]
    utils.override_globals(pasted := {"ANCHORS": [(1.0, 1.0)]}, [argument])
    assert np.shape(pasted["ANCHORS"]) == (5, 2)
    with Image.open(sheet) as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 200


def test_one_object_is_followed_from_its_label_to_its_target_by_hand(tmp_path):
    make_devkit(tmp_path, {"a": [("cat", 0, (1, 1, 11, 9)), ("dog", 0, (11, 9, 61, 49))]})  # of 100 x 80 pixels
    data = VOCDataset(tmp_path, [("2007", "train")], [(1, 1), (2, 2)], 96)
    lines = dataset.follow_object(data.samples[0], data.labels[0], data.anchors, 96)
    expected = [  # the dog, which is the larger one; 96 pixels are 3 x 3 cells
        ("label file", [11, 9, 61, 49], "pixels of 100 x 80, from 1"),
        ("centre and size", [0.35, 0.35, 0.5, 0.5], "fractions"),
        ("in grid cells", [1.05, 1.05, 1.5, 1.5], "times 3"),
        ("cell", [1, 1], "column, row"),
        ("IoU with the anchors", [1 / 2.25, 2.25 / 4], "anchor 1, 2.00 x 2.00 cells"),
        ("target[1, 1, 1]", [1, 0.05, 0.05, 1.5, 1.5, VOC_CLASSES.index("dog")], "[anchor, row, column]"),
        ("in the loss", [0.05, 0.05, math.log(0.75), math.log(0.75)], "sigma(t_x)"),
    ]
    for (step, numbers, explanation), (name, by_hand, words) in zip(lines, expected, strict=True):
        assert step == name and words in explanation
        np.testing.assert_allclose(numbers, by_hand, atol=1e-6, err_msg=name)
    _, targets = data[0]
    np.testing.assert_array_equal(targets[1, 1, 1], np.float32(lines[5][1]))  # the same slot of the data set


def test_the_check_ends_with_one_object_in_numbers(monkeypatch, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("empty.png,empty.txt\na.png,a.txt\n")
    for name, text in (("empty", ""), ("a", "7 .5 .25 .5 .25\n")):
        Image.new("RGB", (40, 20)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    settings(monkeypatch, tmp_path, DATA_DIR=str(tmp_path), IMAGE_SETS=["list.csv"])
    dataset.main()
    printed = capsys.readouterr().out
    assert f"the largest object of {tmp_path / 'a.png'}" in printed
    assert re.search(r"label file +0\.250 +0\.125 +0\.750 +0\.375 +x1, y1, x2, y2: fractions of the image", printed)
    assert re.search(r"in grid cells +1 +0\.500 +1 +0\.500 +times 2", printed)
    assert re.search(r"cell +1 +0 +column, row", printed)


def test_the_check_names_every_problem_and_fails(monkeypatch, tmp_path, capsys):
    good = [("cat", 0, (5, 5, 60, 60))]
    folder = make_devkit(
        tmp_path,
        {
            "fine": good,
            "broken": "<annotation>",
            "cut": good,
            "twice": good,
            "wide": [("dog", 0, (50, 5, 140, 60))],
            "gone": good,
        },
    )
    (folder / "JPEGImages/cut.jpg").write_bytes(truncated_jpeg())
    (folder / "JPEGImages/gone.jpg").unlink()
    with open(folder / "ImageSets/Main/train.txt", "a") as stream:
        stream.write("twice\n")
    sheet = settings(monkeypatch, tmp_path, DATA_DIR=str(tmp_path), IMAGE_SETS=[("2007", "train")])
    with pytest.raises(SystemExit) as stop:
        dataset.main()
    assert stop.value.code not in (None, 0)
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    for pattern in (
        r"broken\.xml: not readable as XML",
        r"cut\.jpg: not a readable image",
        r"twice\.jpg: listed 2 times",
        r"wide\.xml: the box .* extends beyond the image of 100 x 80",
        r"gone\.jpg: no such image",
    ):
        assert sum(bool(re.search(pattern, line)) for line in problems) == 1, pattern
    assert len(problems) == 5 and not sheet.exists()


def test_the_check_counts_files_that_are_in_no_list(monkeypatch, tmp_path, capsys):
    folder = make_devkit(tmp_path, {"a": [("cat", 0, (5, 5, 60, 60))], "unlisted": []})
    (folder / "ImageSets/Main/train.txt").write_text("a\n")
    settings(monkeypatch, tmp_path, DATA_DIR=str(tmp_path), IMAGE_SETS=[("2007", "train")])
    dataset.main()
    printed = capsys.readouterr().out
    assert "1 image files are in none of these lists (first: unlisted.jpg)" in printed
    assert "1 label files are in none of these lists (first: unlisted.xml)" in printed
