"""Wrong or unusual input of the kind that people report: bad input is never accepted silently, and one
sentence names the cause.

Each test sets up one case with as few files as possible: labels made for other image sizes or units, lists and
encodings written by other tools, damaged weights, names that cannot be file names, contradictory settings.
"""

import io
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import darknet_model
import darknet_train
import dataset
import detect
import detect_txt
import model
import test as test_script
import train
import utils
from model import ANCHORS, YOLOv2

pytestmark = pytest.mark.usefixtures("narrow_module")

ROOT = Path(__file__).parent.parent


def annotation(box=(11, 11, 51, 41), name="bolt", size=(100, 60), difficult="0", extra="") -> str:
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return (
        f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size><object><name>{name}</name>"
        f"<difficult>{difficult}</difficult><bndbox>{sides}</bndbox>{extra}</object></annotation>"
    )


def write_devkit(root: Path, files: dict[str, str], size=(100, 60), suffix=".jpg", **save) -> Path:
    """Writes a devkit, VOC2026, and returns its folder; `files` maps each image id to the text of its
    annotation. The list is `train`."""
    folder = root / "VOC2026"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for image_id, xml in files.items():
        Image.new("RGB", size, (90, 120, 30)).save(folder / f"JPEGImages/{image_id}{suffix}", **save)
        (folder / f"Annotations/{image_id}.xml").write_text(xml)
    (folder / "ImageSets/Main/train.txt").write_text("".join(f"{image_id}\n" for image_id in files))
    return folder


def write_csv(root: Path, labels: str, image="a.png", size=(100, 60)) -> Path:
    root.mkdir(exist_ok=True)
    Image.new("RGB", size).save(root / image)
    (root / "a.txt").write_text(labels)
    (root / "train.csv").write_text(f"{image},a.txt\n")
    return root


def read(root: Path, image_sets=(("2026", "train"),), **options) -> dataset.VOCDataset:
    return dataset.VOCDataset(root, list(image_sets), ANCHORS, 64, **{"classes": ["bolt"], **options})


def set_training(monkeypatch, root: Path, **values):
    small = {
        "DATA_DIR": str(root), "IMAGE_SETS": [("2026", "train")], "VAL_IMAGE_SETS": [], "CLASSES": ["bolt"],
        "IMAGE_SIZE": 64, "BATCH_SIZE": 2, "REPEAT": 1, "EPOCHS": 1, "EVAL_EVERY": 1, "BURN_IN": 0, "NUM_WORKERS": 0,
        "PRECISION": "fp32", "CHECKPOINT": str(root / "runs/yolov2.pt"),
    }  # fmt: skip
    for name, value in (small | values).items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(utils, "draw_charts", lambda metrics_file, chart_file: None)


@pytest.fixture
def checkpoint(tmp_path):
    """An untrained detector of one class."""
    torch.manual_seed(0)
    file = tmp_path / "bolts.pt"
    state = {"model": YOLOv2(1).state_dict(), "classes": ["bolt"], "anchors": ANCHORS, "image_size": 64}
    utils.save_checkpoint(file, **state)
    return file


# ---------------------------------------------------------------- training images in the validation set


def test_data_dir_may_not_be_a_csv_file_if_image_sets_are_given(tmp_path):
    root = write_csv(tmp_path, "0 .5 .5 .2 .2\n")
    with pytest.raises(ValueError, match="train.csv: DATA_DIR must be the folder of the lists"):
        read(root / "train.csv", ["val.csv"])
    assert len(read(root / "train.csv", [])) == 1


def test_images_in_both_the_training_and_the_validation_set_are_counted(tmp_path, monkeypatch, capsys):
    folder = write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    (folder / "ImageSets/Main/val.txt").write_text("b\n")
    set_training(monkeypatch, tmp_path, VAL_IMAGE_SETS=[("2026", "val")])
    train.main()
    out = capsys.readouterr().out
    assert out.count("images in both the training and the validation set: 1 (first: ") == 1 and "b.jpg)" in out


# ---------------------------------------------------------------- labels that do not fit their image


@pytest.mark.parametrize(("declared", "cause"), [((60, 100), "EXIF rotation"), ((200, 120), "resized")])
def test_labels_made_for_another_image_size_are_reported(declared, cause, tmp_path, monkeypatch, capsys):
    write_devkit(tmp_path, {"a": annotation(size=declared), "b": annotation()})
    for name, value in {"DATA_DIR": str(tmp_path), "IMAGE_SETS": [("2026", "train")], "CLASSES": ["bolt"]}.items():
        monkeypatch.setattr(dataset, name, value)
    with pytest.raises(SystemExit, match="1 problems"):
        dataset.main()
    sizes = f"declares an image of {declared[0]} x {declared[1]}, but the image is 100 x 60"
    assert re.search(rf"problem: .*a\.xml: {sizes} \(.*{cause}", capsys.readouterr().out)
    set_training(monkeypatch, tmp_path)
    train.main()
    warning = re.compile(rf"^1 of 2 label files look wrong .*a\.xml: {sizes}", re.MULTILINE)
    assert len(warning.findall(capsys.readouterr().out)) == 1
    tested = {
        "DATA_DIR": str(tmp_path),
        "IMAGE_SETS": [("2026", "train")],
        "CHECKPOINT": str(tmp_path / "runs/yolov2.pt"),
    }
    for name, value in (tested | {"OUTPUT": str(tmp_path / "test"), "NUM_WORKERS": 0, "PRECISION": "fp32"}).items():
        monkeypatch.setattr(test_script, name, value)
    test_script.main()
    assert len(warning.findall(capsys.readouterr().out)) == 1


def test_labels_that_leave_no_target_are_reported(tmp_path, capsys):
    write_devkit(
        tmp_path,
        {"a": annotation(box=(0.1, 0.2, 0.5, 0.6)), "b": annotation(box=(150, 10, 180, 50)), "c": annotation()},
    )
    data = read(tmp_path)
    dataset.print_suspicious_labels(data)
    out = capsys.readouterr().out
    assert "2 of 3 label files look wrong" in out and "a.xml: 1 of 1 objects" in out and "not in fractions" in out
    assert not data[0][1].any() and data[2][1].any()


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_image_size_of_a_rotated_tiff_equals_that_of_the_image_read(tmp_path, orientation):
    Image.new("RGB", (60, 100)).save(tmp_path / "a.tif", tiffinfo={274: orientation})
    assert dataset.image_size(tmp_path / "a.tif") == dataset.read_image(tmp_path / "a.tif").shape[1::-1]
    assert dataset.image_size(tmp_path / "a.tif") == ((100, 60) if orientation > 4 else (60, 100))


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        ("<annotations><image name='x'><box label='bolt'/></image></annotations>", "root is <annotations>"),
        ("<html><body>404</body></html>", "root is <html>"),
        (annotation(extra="<bndbox><xmin>1</xmin></bndbox>"), "has 2 bndbox"),
        (annotation(difficult="maybe"), "difficult of an object of class bolt must be 0 or 1, not 'maybe'"),
        ("\x00\x01", "not readable as XML"),
    ],
)
def test_xml_that_is_not_a_valid_voc_annotation_is_refused(tmp_path, xml, reason):
    write_devkit(tmp_path, {"a": xml})
    with pytest.raises(ValueError, match=rf"a\.xml: .*{re.escape(reason)}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("flag", "value"), [("", 0), ("Unspecified", 0), ("\n 0 \n", 0), ("0.0", 0), ("True", 1), ("yes", 1)]
)
def test_common_spellings_of_the_difficult_flag_are_read(tmp_path, flag, value):
    write_devkit(tmp_path, {"a": annotation(difficult=flag)})
    assert read(tmp_path).labels[0][0, 1] == value


@pytest.mark.parametrize("tag", ["name", "difficult", "xmin", "ymax"])
def test_an_xml_object_with_a_value_given_twice_is_refused(tag, tmp_path):
    xml = re.sub(rf"(<{tag}>.*?</{tag}>)", r"\1\1", annotation())
    write_devkit(tmp_path, {"a": xml})
    with pytest.raises(ValueError, match=rf"a\.xml: an object of class bolt has {tag} twice"):
        read(tmp_path)


def test_xml_tags_may_have_capitals(tmp_path):
    write_devkit(tmp_path, {"a": annotation().replace("object>", "Object>").replace("name>", "Name>")})
    assert len(read(tmp_path).labels[0]) == 1


def test_xml_namespaces_are_ignored_and_parts_are_not_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    xml = annotation(extra=part).replace("<annotation>", '<annotation xmlns="http://example.org/voc">')
    write_devkit(tmp_path, {"a": xml})
    assert read(tmp_path).labels[0].tolist() == [[0, 0, 11, 11, 51, 41]]


# ---------------------------------------------------------------- lists and encodings of other tools


def test_image_ids_may_contain_spaces(tmp_path):
    folder = write_devkit(
        tmp_path, {"photo": annotation(), "photo (1)": annotation(box=(1, 1, 9, 9)), "photo 2": annotation()}
    )
    (folder / "ImageSets/Main/train.txt").write_text("photo (1)\nphoto 2\nphoto  1\nphoto -1\n")
    names = [Path(image).stem for image, _ in read(tmp_path).samples]
    assert names == ["photo (1)", "photo 2", "photo", "photo"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_are_read_in_utf_8_and_utf_16(tmp_path, encoding):
    folder = write_devkit(tmp_path, {"né": annotation()})
    (folder / "ImageSets/Main/train.txt").write_bytes("né\r\n".encode(encoding))
    assert Path(read(tmp_path).samples[0][0]).name == "né.jpg"
    assert len(read(tmp_path).labels[0]) == 1


def test_an_unsupported_encoding_is_refused_with_advice(tmp_path):
    folder = write_devkit(tmp_path, {"a": annotation()})
    (folder / "ImageSets/Main/train.txt").write_bytes("né\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.txt: not UTF-8 text; save it as UTF-8"):
        read(tmp_path)
    (folder / "ImageSets/Main/train.txt").write_text("a\n")
    xml = annotation(name="螺栓")
    (folder / "Annotations/a.xml").write_bytes(f'<?xml version="1.0" encoding="gb2312"?>{xml}'.encode("gb2312"))
    with pytest.raises(ValueError, match=r"a\.xml: not readable as XML .*save it as UTF-8"):
        read(tmp_path, classes=["螺栓"])


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".webp"])
def test_images_of_a_devkit_may_have_any_suffix(tmp_path, suffix):
    folder = write_devkit(tmp_path, {"a": annotation()}, suffix=suffix)
    assert Path(read(tmp_path).samples[0][0]).name == f"a{suffix}"
    assert read(tmp_path)[0][1].any()
    Image.new("RGB", (9, 9)).save(folder / "JPEGImages/a.bmp")
    with pytest.raises(ValueError, match=rf"a\.bmp and a\{suffix}|a\{suffix} and a\.bmp"):
        read(tmp_path)


@pytest.mark.parametrize("image_sets", [("2026", "train"), [["2026", "train"]], [("2026", "train")]])
def test_a_single_image_set_needs_no_enclosing_list(tmp_path, image_sets):
    write_devkit(tmp_path, {"a": annotation()})
    assert len(dataset.VOCDataset(tmp_path, image_sets, ANCHORS, 64, ["bolt"])) == 1


@pytest.mark.parametrize("image_sets", [[2026], "2026 train", [("2026",)], [("2026", "train", "x")]])
def test_a_malformed_image_set_is_refused_with_an_example(tmp_path, image_sets):
    write_devkit(tmp_path, {"a": annotation()})
    with pytest.raises(ValueError, match=r"IMAGE_SETS holds .*it takes \[\('2007', 'trainval'\)\]"):
        dataset.VOCDataset(tmp_path, image_sets, ANCHORS, 64, ["bolt"])


def test_darknet_lists_and_names_are_read(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images/a.jpg")
    (tmp_path / "labels/a.txt").write_text("1 .5 .5 .5 .5\n")
    (tmp_path / "train.txt").write_text("images/a.jpg\n\n")
    (tmp_path / "obj.names").write_text("bolt\nnut\n\n")
    data = dataset.VOCDataset(tmp_path, ["train.txt"], ANCHORS, 64, str(tmp_path / "obj.names"))
    assert data.classes == ["bolt", "nut"] and data.labels[0].tolist() == [[1, 0, 0.25, 0.25, 0.75, 0.75]]
    with pytest.raises(FileNotFoundError, match=r"none\.names: no such file of class names"):
        dataset.read_classes(str(tmp_path / "none.names"))
    settings = {"CLASSES": ("a", "b"), "IMAGE_SETS": [("2007", "train")]}
    utils.override_globals(settings, ["CLASSES=x/obj.names", "IMAGE_SETS=train.csv"])
    assert settings == {"CLASSES": "x/obj.names", "IMAGE_SETS": "train.csv"}


@pytest.mark.parametrize("blank", ["\u00a0", "\u202f", "\u3000", "\u200d"])
def test_unicode_spaces_in_a_csv_list_are_read_and_control_characters_are_refused(tmp_path, blank):
    write_csv(tmp_path, "0 .5 .5 .2 .2\n", image=f"a{blank}b.png")
    assert read(tmp_path, ["train.csv"])[0][1].any()
    (tmp_path / "train.csv").write_text("a\x1b[2J.png,a.txt\n")
    with pytest.raises(ValueError, match=r"train\.csv, line 1: .*x1b\[2J") as error:
        read(tmp_path, ["train.csv"])
    assert "\x1b" not in str(error.value)


def test_backslashes_separate_folders_in_a_list(tmp_path):
    (tmp_path / "images").mkdir()
    write_csv(tmp_path, "0 .5 .5 .2 .2\n", image="images/a.png")
    (tmp_path / "train.csv").write_text("images\\a.png,a.txt\n")
    assert read(tmp_path, ["train.csv"])[0][1].any()


@pytest.mark.parametrize("line", ["img,text", "a.png;a.txt", "a.png", "a.png,10,10,20,20,bolt"])
def test_malformed_csv_lines_are_refused_with_their_line_number(tmp_path, line):
    write_csv(tmp_path, "")
    (tmp_path / "train.csv").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"train\.csv, line 1: expected image,label"):
        read(tmp_path, ["train.csv"])


def test_an_unbalanced_quote_in_a_csv_list_is_named_as_the_cause(tmp_path):
    write_csv(tmp_path, "")
    (tmp_path / "train.csv").write_text('"a.png,a.txt\n' + "b.png,b.txt\n" * 20_000)
    with pytest.raises(ValueError, match=r"train\.csv: not readable as csv .*unbalanced quote"):
        read(tmp_path, ["train.csv"])


@pytest.mark.parametrize("line", ["0.0 .3 .4 .4 .5", "0 .3 .4 .4 1.00005", "0 .3 -.00005 .4 .5"])
def test_harmless_variants_of_yolo_labels_are_read(tmp_path, line):
    root = write_csv(tmp_path, line)
    assert read(root, ["train.csv"]).labels[0].shape == (1, 6)


@pytest.mark.parametrize(
    ("line", "guess"),
    [
        ("0 .3 .4 .4 .5 .9", "confidence"),
        ("0 .1 .1 .2 .1 .2 .2 .1 .2", "polygon"),
        ("bolt .3 .4 .4 .5", "not a name"),
        ("0 .3 .4 .4 1.1", "fractions of the image"),
    ],
)
def test_errors_for_other_label_formats_say_what_is_wrong(tmp_path, line, guess):
    with pytest.raises(ValueError, match=rf"a\.txt, line 1: .*{guess}"):
        read(write_csv(tmp_path, line), ["train.csv"])


# ---------------------------------------------------------------- missing labels, objects and classes


def test_objects_of_other_classes_and_missing_labels_are_tolerated_on_request(tmp_path):
    folder = write_devkit(tmp_path, {"a": annotation(name="nut"), "b": annotation()})
    with pytest.raises(ValueError, match=r"unknown class 'nut'.*TOLERATE=\['other classes'\]"):
        read(tmp_path)
    data = read(tmp_path, tolerate=["other classes"])
    assert [len(labels) for labels in data.labels] == [0, 1]
    (folder / "Annotations/a.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.xml: no such label file.*TOLERATE=\['missing labels'\]"):
        read(tmp_path)
    assert [len(labels) for labels in read(tmp_path, tolerate=["missing labels"]).labels] == [0, 1]
    with pytest.raises(ValueError, match="TOLERATE takes .*not 'all'"):
        read(tmp_path, tolerate=["all"])


def test_detections_are_written_for_images_without_annotations(tmp_path, monkeypatch, capsys, checkpoint):
    folder = write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    for file in (folder / "Annotations").iterdir():
        file.unlink()
    values = {
        "CHECKPOINT": str(checkpoint),
        "DATA_DIR": str(tmp_path),
        "IMAGE_SETS": [("2026", "train")],
        "NUM_WORKERS": 0,
    }
    for script, name, value in (
        (script, name, value) for script in (detect_txt, test_script) for name, value in values.items()
    ):
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(detect_txt, "OUTPUT_DIR", str(tmp_path / "out"))
    monkeypatch.setattr(test_script, "OUTPUT", str(tmp_path / "test"))
    detect_txt.main()
    assert "no ground truth is written" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "coco_results.json",
        "comp4_det_test_bolt.txt",
        "detections",
    ]
    with pytest.raises(FileNotFoundError, match=r"a\.xml: no such label file"):
        test_script.main()


def test_a_validation_set_without_objects_is_reported_and_the_last_checkpoint_becomes_the_best(
    tmp_path, monkeypatch, capsys
):
    folder = write_devkit(tmp_path, {"a": annotation(), "b": annotation(), "c": annotation(difficult="1")})
    (folder / "ImageSets/Main/train.txt").write_text("a\nb\n")
    (folder / "ImageSets/Main/val.txt").write_text("c\n")
    set_training(monkeypatch, tmp_path, VAL_IMAGE_SETS=[("2026", "val")], EPOCHS=2)
    train.main()
    assert capsys.readouterr().out.count("val_map will be nan, because its images have no objects") == 1
    best = utils.load_checkpoint(tmp_path / "runs/yolov2_best.pt")
    assert best["epoch"] == 2 and math.isnan(best["best"])


@pytest.mark.parametrize(
    ("labels", "tolerate"),
    [
        ({"a": annotation(difficult="1"), "b": annotation(difficult="1")}, []),
        ({"a": annotation(name="Bolt"), "b": annotation(name="Bolt")}, ["other classes"]),
        ({"a": "<annotation/>", "b": "<annotation/>"}, []),
    ],
)
def test_training_images_without_objects_are_refused(labels, tolerate, tmp_path, monkeypatch):
    write_devkit(tmp_path, labels)
    set_training(monkeypatch, tmp_path, TOLERATE=tolerate)
    with pytest.raises(ValueError, match="the training images have no objects, or only difficult ones"):
        train.main()


def test_first_training_images_without_objects_are_reported(tmp_path, monkeypatch, capsys):
    write_devkit(tmp_path, {"a": annotation(difficult="1"), "b": annotation()})
    for count, reported in ((1, True), (2, False)):
        set_training(monkeypatch, tmp_path, EVAL_TRAIN_IMAGES=count)
        train.main()
        assert ("train_map will be nan, because its images have no objects" in capsys.readouterr().out) == reported


def test_images_that_are_listed_twice_are_reported(tmp_path, monkeypatch, capsys):
    write_csv(tmp_path, "0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "b.txt").write_text("0 0.2 0.2 0.2 0.2\n")
    (tmp_path / "train.csv").write_text("a.png,a.txt\na.png,b.txt\n")
    dataset.print_suspicious_labels(read(tmp_path, ["train.csv"]))
    assert "images listed more than once: 1 (first: " in (out := capsys.readouterr().out) and "a.png)" in out
    problems, *_ = dataset.check_dataset(dataset.list_samples(tmp_path, ["train.csv"]), ["bolt"])
    assert len(problems) == 1 and problems[0].endswith("a.png: listed 2 times")


def test_hidden_class_folders_are_skipped_and_other_files_counted(tmp_path, capsys):
    for name in ("n1", "n2", ".ipynb_checkpoints"):
        (tmp_path / "train" / name).mkdir(parents=True)
    for name in ("n1", "n2"):
        Image.new("RGB", (40, 40)).save(tmp_path / "train" / name / "x.gif")
    (tmp_path / "train/n1/notes.txt").write_text("x")
    data = dataset.imagenet_dataset(tmp_path, "train", 32, augment=False)
    assert data.classes == ["n1", "n2"] and len(data) == 2
    assert "skipped 1 files that are not images (first: " in capsys.readouterr().out


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "names", [["a/b"], ["..", "x"], ["a\tb"], ["a\nb"], ["a", "a"], ["a b", "a_b"], [""], [], [" a"], [3], ["a\u00a0b"]]
)
def test_class_names_that_would_break_files_are_refused(tmp_path, names):
    with pytest.raises(ValueError, match="CLASSES"):
        dataset.read_classes(names)
    utils.save_checkpoint(tmp_path / "odd.pt", model={}, classes=names, anchors=ANCHORS, image_size=64)
    with pytest.raises(ValueError, match=r"odd\.pt"):
        utils.load_checkpoint(tmp_path / "odd.pt")


def test_only_the_scripts_own_globals_are_settings():
    for script in (train, dataset, detect, test_script, darknet_train):
        names = set(utils.script_settings(vars(script)))
        assert "VOC_CLASSES" not in names and "FIXED" not in names and names & {"DATA_DIR", "SOURCE"}
        with pytest.raises(SystemExit, match="unknown setting 'VOC_CLASSES'"):
            utils.override_globals(dict(vars(script)), ["VOC_CLASSES=['person']"])


def test_detect_refuses_to_overwrite_a_source_image(tmp_path, monkeypatch, checkpoint):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "data/street.jpg")
    before = (tmp_path / "data/street.jpg").read_bytes()
    values = {"SOURCE": str(tmp_path / "data"), "OUTPUT_DIR": str(tmp_path / "data"), "CHECKPOINT": str(checkpoint)}
    for name, value in values.items():
        monkeypatch.setattr(detect, name, value)
    with pytest.raises(ValueError, match=r"street\.jpg: a drawing would replace this source"):
        detect.main()
    assert (tmp_path / "data/street.jpg").read_bytes() == before
    (tmp_path / "out").mkdir()
    # like IMG.JPG and IMG.jpg on macOS: two names, one file
    os.link(tmp_path / "data/street.jpg", tmp_path / "out/street.jpg")
    monkeypatch.setattr(detect, "OUTPUT_DIR", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"street\.jpg: a drawing would replace this source"):
        detect.main()
    assert (tmp_path / "data/street.jpg").read_bytes() == before


def test_find_sources_lists_every_image_format_and_counts_other_files(tmp_path, capsys):
    for name in ("a.jfif", "b.PPM", "c.jpe", "d.gif"):
        Image.new("RGB", (9, 9)).save(
            tmp_path / name, format={".jfif": "JPEG", ".jpe": "JPEG", ".PPM": "PPM"}.get(Path(name).suffix)
        )
    (tmp_path / "notes.txt").write_text("x")
    assert [Path(file).name for file in detect.find_sources(str(tmp_path))] == ["a.jfif", "b.PPM", "c.jpe", "d.gif"]
    assert "skipped 1 files that are not images or videos (first: notes.txt)" in capsys.readouterr().out


def test_checkpoints_with_dots_in_their_names_write_separate_files(tmp_path, monkeypatch):
    write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    for name in ("lr0.001", "lr0.01", "v1.pth.tar"):
        set_training(monkeypatch, tmp_path, CHECKPOINT=str(tmp_path / "runs" / name))
        train.main()
    endings = ("", "_best.pt", "_metrics.csv", "_samples.jpg")
    expected = {f"{name}{ending}" for name in ("lr0.001", "lr0.01", "v1.pth.tar") for ending in endings}
    assert {file.name for file in (tmp_path / "runs").iterdir()} == expected
    loaded, *_ = model.load_detector(
        tmp_path / "runs/v1.pth.tar", ["bolt"], [], torch.device("cpu"), "fp32"
    )  # recognised by its content, not its suffix
    assert isinstance(loaded, torch.nn.Module)


def test_names_are_printed_with_escapes():
    assert utils.printable("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n" and utils.printable("né 螺栓") == "né 螺栓"
    assert utils.printable("bad\udcff") == "bad\\udcff"


# ---------------------------------------------------------------- damaged checkpoints and weights


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", 3), ("classes", "abc"), ("classes", None), ("anchors", None), ("anchors", [[1.0]] * 5),
        ("anchors", [["1", 1]] * 5), ("anchors", [(-1.0, 2.0)] * 5), ("anchors", [(math.nan, 2.0)] * 5),
        ("image_size", "64"), ("image_size", None), ("image_size", 63), ("image_size", 2**63), ("image_size", 64.0),
        ("model", [1]), ("model", {3: torch.ones(1)}), ("model", {"w": torch.ones(3, dtype=torch.bool)}),
        ("model", {"w": torch.ones(3).to_sparse()}), ("model", {"w": 3}),
    ],
)  # fmt: skip
def test_a_detector_with_a_damaged_value_is_refused_by_its_name(key, value, checkpoint, tmp_path):
    state = torch.load(checkpoint)
    torch.save(state | {key: value}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt: ") as error:
        model.load_detector(tmp_path / "odd.pt", [], [], torch.device("cpu"), "fp32")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("settings", None), ("settings", {}), ("settings", []), ("sums", [1.0]), ("sums", torch.zeros(6) > 1),
        ("sums", torch.zeros(5).double()), ("epoch", "1"), ("epoch", -1), ("epoch", 1.5), ("step", math.nan),
        ("step", -1), ("step", torch.tensor(1)), ("images_seen", None), ("best", None), ("best", 1e9),
        ("scaler", torch.tensor([])), ("optimizer", 3),
    ],
)  # fmt: skip
def test_resuming_a_checkpoint_with_a_damaged_value_is_refused(key, value, tmp_path, monkeypatch):
    write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    set_training(monkeypatch, tmp_path, RESUME=True)
    state = {"epoch": 0, "step": 0, "images_seen": 0, "best": -1.0, "sums": torch.zeros(6, dtype=torch.float64)}
    detector, settings = YOLOv2(1), utils.script_settings(vars(train)) | {"training images": ""}
    state |= {"model": detector.state_dict(), "optimizer": {"state": {}}, "scaler": {}, "settings": settings}
    torch.save(state | {key: value}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt: .*(damaged|does not fit)"):
        utils.resume(
            str(tmp_path / "odd.pt"), detector, torch.optim.SGD(detector.parameters()), None, settings, train.FIXED
        )


@pytest.mark.parametrize(
    "change",
    [
        {"exp_avg": torch.tensor(1.0)}, {"exp_avg_sq": torch.ones(1).expand(4, 3, 3, 3)}, {"exp_avg": torch.ones(3)},
        {"exp_avg": torch.ones(4, 3, 3, 3).to_sparse()}, {"exp_avg_sq": None},
        {"momentum_buffer": torch.ones(4, 3, 3, 3)},
    ],
)  # fmt: skip
def test_damaged_buffers_of_the_optimiser_are_refused(change, tmp_path):
    """A fused optimiser would read and write beyond them."""
    layer = torch.nn.Conv2d(3, 4, 3, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, fused=True)
    buffers = {"step": torch.tensor(1.0), "exp_avg": torch.ones(4, 3, 3, 3), "exp_avg_sq": torch.ones(4, 3, 3, 3)}
    changed = {name: buffer for name, buffer in (buffers | change).items() if buffer is not None}
    state = {
        "epoch": 0,
        "step": 0,
        "images_seen": 0,
        "best": -1.0,
        "sums": torch.zeros(3).double(),
        "scaler": {},
        "settings": {"EPOCHS": 1},
    }
    state |= {"model": layer.state_dict(), "optimizer": {"state": {0: changed}, "param_groups": [{"lr": 0.1}]}}
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt: does not fit this model and optimiser \(the optimiser's buffers"):
        utils.resume(str(tmp_path / "odd.pt"), layer, optimizer, None, {"EPOCHS": 1}, ())
    torch.save(state | {"optimizer": state["optimizer"] | {"state": {0: buffers}}}, tmp_path / "fine.pt")
    utils.resume(str(tmp_path / "fine.pt"), layer, optimizer, None, {"EPOCHS": 1}, ())


# ---------------------------------------------------------------- damaged weights


def damage(tensors: dict, kind: str) -> None:
    name = {
        "nan": "head.0.0.weight",
        "zeros": "head.0.0.weight",
        "variance": "head.0.1.running_var",
        "tail": "output.weight",
    }[kind]
    tensors[name] = tensors[name].clone()
    if kind == "nan":
        tensors[name].view(-1)[5] = math.nan
    elif kind == "zeros":
        tensors[name].zero_()
    elif kind == "variance":
        tensors[name][3] = -0.5
    else:
        tensors[name][-1, -20:] = 0


DAMAGES = {
    "nan": "NaN, infinite or huge",
    "zeros": "kernel of zeros",
    "variance": "negative variance",
    "tail": "kernel of zeros",
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("suffix", [".pt", ".weights"])
def test_damaged_weights_are_refused_and_the_model_is_unchanged(kind, suffix, tmp_path):
    donor, file = YOLOv2(1), tmp_path / f"damaged{suffix}"
    state = dict(donor.state_dict())
    damage(state, kind)
    if suffix == ".pt":
        torch.save({"model": state, "classes": ["bolt"], "anchors": ANCHORS, "image_size": 64}, file)
    else:
        donor.load_state_dict(state)
        darknet_model.save_darknet_weights(donor, file)
    own = YOLOv2(1)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    with pytest.raises(ValueError, match=rf"damaged{re.escape(suffix)}: damaged weights \(.*{DAMAGES[kind]}"):
        model.load_pretrained_backbone(own, file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    with pytest.raises(ValueError, match="damaged weights"):
        model.load_detector(file, ["bolt"], ANCHORS, torch.device("cpu"), "fp32")


def test_a_png_with_a_wrong_checksum_is_refused(tmp_path):
    """Pillow decodes the pixels without looking at the checksums."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[content.index(b"IDAT") + 2000] ^= 4
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        dataset.read_image(tmp_path / "a.png")


def test_big_endian_weights_are_refused(tmp_path):
    donor = YOLOv2(1)
    darknet_model.save_darknet_weights(donor, tmp_path / "x.weights")
    content = (tmp_path / "x.weights").read_bytes()
    numbers = np.frombuffer(content[20:], "<f4").astype(">f4").tobytes()
    (tmp_path / "x.weights").write_bytes(content[:20] + numbers)
    with pytest.raises(ValueError, match=r"x\.weights: damaged weights"):
        darknet_model.load_darknet_weights(YOLOv2(1), tmp_path / "x.weights")


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path, checkpoint):
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(checkpoint.read_bytes())
    content[largest.header_offset + 5000] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match=r"bolts\.pt: damaged"):
        utils.load_checkpoint(checkpoint)


def test_a_web_page_saved_as_weights_is_reported_as_one(tmp_path):
    (tmp_path / "yolov2.weights").write_text("\n<!DOCTYPE html><html><body>moved</body></html>" * 9)
    with pytest.raises(ValueError, match=r"yolov2\.weights: this is a web page, not weights"):
        darknet_model.load_darknet_weights(YOLOv2(1), tmp_path / "yolov2.weights")


def test_only_the_backbone_is_loaded_if_the_classes_or_their_order_differ(tmp_path, capsys):
    donor = YOLOv2(2)
    state = {"model": donor.state_dict(), "anchors": ANCHORS, "image_size": 64}
    utils.save_checkpoint(tmp_path / "two.pt", classes=["nut", "bolt"], **state)
    own = YOLOv2(2)
    assert model.load_pretrained_backbone(own, tmp_path / "two.pt", ["bolt", "nut"]) == 18
    assert "18 of 23 convolutions" in (out := capsys.readouterr().out) and "in another order" in out
    assert not torch.equal(own.output.weight, donor.output.weight)
    assert model.load_pretrained_backbone(own, tmp_path / "two.pt", ["nut", "bolt"]) == 23
    assert torch.equal(own.output.weight, donor.output.weight)
    utils.save_checkpoint(
        tmp_path / "classifier.pt", model=darknet_model.Darknet19(3).state_dict(), classes=["n1", "n2", "n3"]
    )
    capsys.readouterr()
    assert model.load_pretrained_backbone(own, tmp_path / "classifier.pt", ["nut", "bolt"]) == 18
    assert capsys.readouterr().out.endswith("loaded 18 of 23 convolutions, the backbone\n")  # its classes do not matter


def test_optimiser_buffers_of_another_shape_are_refused(tmp_path, monkeypatch):
    write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    set_training(monkeypatch, tmp_path, OPTIMIZER="sgd")
    train.main()
    state = utils.load_checkpoint(tmp_path / "runs/yolov2.pt")
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    utils.save_checkpoint(tmp_path / "runs/yolov2.pt", **state)
    set_training(monkeypatch, tmp_path, OPTIMIZER="sgd", RESUME=True, EPOCHS=2)
    with pytest.raises(ValueError, match=r"yolov2\.pt: does not fit this model and optimiser .*other shapes"):
        train.main()


def test_an_unreadable_metrics_file_is_renamed_and_a_new_one_is_started(tmp_path, capsys):
    file = tmp_path / "run_metrics.csv"
    for content in (b"\xff\xfe\x00broken", b"no,header\n1,2\n", b"1,0.5,7.25\n"):
        file.write_bytes(content)
        utils.append_metrics(file, {"epoch": 2, "loss": 1.5})
        assert file.read_text().splitlines() == ["epoch,loss", "2,1.5"]
        assert (tmp_path / "run_metrics.csv.unreadable").read_bytes() == content
        assert "is kept as" in capsys.readouterr().out


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"MOMENTUM": -0.1}, "MOMENTUM must be between 0 and 1"),
        ({"MOMENTUM": 2.0}, "MOMENTUM must be between 0 and 1"),
        ({"EVAL_THRESHOLD": 40.0}, "EVAL_THRESHOLD must be between 0 and 1"),
        ({"BATCH_SIZE": 10**30}, "BATCH_SIZE must be 1 or more"),
        ({"MAX_HOURS": -1.0}, "MAX_HOURS must be 0 or more"),
        ({"LR_DROPS": ["a"]}, "LR_DROPS must be a list of non-negative numbers"),
        ({"LR_DROPS": 60}, "LR_DROPS must be a list of non-negative numbers"),
        ({"LR_DROPS": [np.float64(60)]}, "LR_DROPS must be a list of non-negative numbers"),
        ({"LR_SCHEDULE": "steps", "LR_DROPS": [0, 60]}, r"LR_DROPS \[0, 60\] must be above 0: they are epochs"),
        (
            {"LR_SCHEDULE": "steps", "LR_DROPS": [40000, 60000], "EPOCHS": 310},
            r"LR_DROPS \[40000, 60000\] are all above",
        ),
        ({"MULTI_SCALE": range(320, 609, 32)}, "MULTI_SCALE must be a list of non-negative numbers"),
        ({"MULTI_SCALE": "x.txt"}, "MULTI_SCALE must be a list of non-negative numbers"),
        ({"ANCHORS": [("a", 1)]}, "ANCHORS must hold pairs"),
        ({"CHECKPOINT": ""}, "'' is not the name of a file or folder"),
        ({"DEVICE": "meta"}, "DEVICE=meta: not a device that works here"),
        ({"WEIGHT_DECAY": -1.0}, "WEIGHT_DECAY must be 0 or more"),
        ({"BURN_IN": -1}, "BURN_IN must be 0 or more"),
        ({"SEED": -1}, "SEED must be 0 or more"),
        ({"LAMBDA_COORD": -1.0}, "LAMBDA_COORD must be 0 or more"),
        ({"EVAL_TRAIN_IMAGES": 0}, "EVAL_TRAIN_IMAGES must be 1 or more"),
        ({"ANCHORS": [(1, 2, 3), (4, 5, 6)]}, "ANCHORS must hold pairs"),
        ({"ANCHORS": [(42, 55), (359, 320)]}, "ANCHORS must be in grid cells"),
        ({"IMAGE_SIZE": 32, "BATCH_SIZE": 1}, "batch norm needs two values"),
        ({"DEVICE": "gpu"}, "DEVICE=gpu: not a device that works here"),
        ({"DEVICE": "99"}, "DEVICE=99: PyTorch sees"),
    ],
)
def test_invalid_settings_are_refused_by_name(setting, message, tmp_path, monkeypatch):
    write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    set_training(monkeypatch, tmp_path, **setting)
    with pytest.raises(ValueError, match=message):
        train.main()
    assert not list((tmp_path / "runs").glob("*"))  # nothing was written


def test_settings_of_other_types_are_saved_as_text(tmp_path, monkeypatch):
    """A checkpoint with a pickled Path would not load."""
    write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    set_training(monkeypatch, tmp_path, DATA_DIR=tmp_path, TOLERATE={"other classes"}, CLASSES=list(np.array(["bolt"])))
    train.main()
    settings = utils.load_checkpoint(tmp_path / "runs/yolov2.pt")["settings"]
    assert settings["DATA_DIR"] == str(tmp_path) and settings["TOLERATE"] == "{'other classes'}"
    set_training(monkeypatch, tmp_path, DATA_DIR=tmp_path, TOLERATE={"other classes"}, RESUME=True, EPOCHS=2)
    train.main()
    assert utils.load_checkpoint(tmp_path / "runs/yolov2.pt")["epoch"] == 2


def test_a_new_run_keeps_the_files_of_an_earlier_one(tmp_path, monkeypatch, capsys):
    """Otherwise, forgetting RESUME=True would cost the weights of a long run, even if the new
    one is stopped at once."""
    write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    files = [tmp_path / "runs" / name for name in ("yolov2.pt", "yolov2_best.pt", "yolov2_metrics.csv")]
    kept = [Path(f"{file}.old") for file in files]
    set_training(monkeypatch, tmp_path)
    train.main()
    monkeypatch.setattr(train, "RESUME", True)
    train.main()
    assert "earlier" not in capsys.readouterr().out and not any(file.exists() for file in kept)
    contents = [file.read_bytes() for file in files]
    new = {"RESUME": False, "SEED": 1, "MAX_HOURS": 1e-9, "PRETRAINED": str(files[1])}  # stops after the first step
    for name, value in new.items():
        monkeypatch.setattr(train, name, value)
    train.main()
    assert [file.read_bytes() for file in kept] == contents
    assert (
        f"files of an earlier one are now {', '.join(map(str, kept))}: to continue that run" in capsys.readouterr().out
    )
    assert utils.load_checkpoint(files[0])["settings"]["SEED"] == 1 and not files[2].exists()
    assert files[1].read_bytes() == contents[1]  # the weights to start from, which a restart needs again


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_new_run_writes_through_the_link_of_an_earlier_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/run.pt").write_bytes(b"earlier")
    (tmp_path / "run.pt").symlink_to(tmp_path / "disk/run.pt")
    utils.keep_earlier_run(str(tmp_path / "run.pt"), "")
    utils.save_checkpoint(tmp_path / "run.pt", epoch=1)
    assert (tmp_path / "run.pt.old").read_bytes() == b"earlier"
    assert (tmp_path / "run.pt").is_symlink() and torch.load(tmp_path / "disk/run.pt") == {"epoch": 1}


def test_a_burn_in_longer_than_the_run_is_named(tmp_path, monkeypatch, capsys):
    write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    for burn_in, said in ((1, False), (2, True)):
        set_training(monkeypatch, tmp_path, BURN_IN=burn_in, BATCH_SIZE=2, EPOCHS=1, REPEAT=1)
        train.main()
        assert ("BURN_IN 2 is longer than the run (steps: 1)" in capsys.readouterr().out) == said


def test_pixel_anchors_of_a_darknet_file_are_refused(tmp_path):
    darknet_model.save_darknet_weights(YOLOv2(1), tmp_path / "bolt.weights")
    pixels = [10, 14, 23, 27, 37, 58, 81, 82, 135, 169]
    with pytest.raises(ValueError, match="ANCHORS must be in grid cells.* divide pixels by 32"):
        model.load_detector(tmp_path / "bolt.weights", ["bolt"], pixels, torch.device("cpu"))


def test_anchors_may_be_larger_than_the_grid_of_image_size_if_multi_scale_is(tmp_path, monkeypatch):
    """Here up to 15 cells at 512 px; the readers of checkpoint and Darknet file take them back."""
    anchors = [(1, 2), (15, 14.5)]
    write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    set_training(monkeypatch, tmp_path, ANCHORS=anchors, MULTI_SCALE=[512])
    train.main()
    network, state = model.read_detector(tmp_path / "runs/yolov2.pt")
    assert state["anchors"] == [[1, 2], [15, 14.5]] and state["image_size"] == 64
    darknet_model.save_darknet_weights(network, tmp_path / "bolts.weights")
    assert model.darknet_detector(tmp_path / "bolts.weights", ["bolt"], anchors)[1] == state["anchors"]


def test_another_number_of_anchors_than_the_checkpoint_has_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"bolts\.pt: has other anchors than ANCHORS"):
        model.load_detector(checkpoint, [], [1, 2, 3, 4], torch.device("cpu"), "fp32")


def test_anchors_may_be_the_flat_list_of_a_cfg():
    assert model.read_anchors([1.3, 1.7, 3.1, 4.0], [416]) == [[1.3, 1.7], [3.1, 4.0]]


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch):
    write_devkit(tmp_path, {"a": annotation()})
    (tmp_path / "runs").write_text("a file, not a folder")
    set_training(monkeypatch, tmp_path)
    with pytest.raises(OSError, match=r"yolov2\.pt: could not be written .*choose another place"):
        train.main()


def test_resuming_a_finished_run_says_so(tmp_path, monkeypatch, capsys):
    write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    set_training(monkeypatch, tmp_path)
    train.main()
    set_training(monkeypatch, tmp_path, RESUME=True)
    train.main()
    assert "all 1 epochs are done; set a larger EPOCHS" in capsys.readouterr().out


def test_a_killed_dataloader_worker_is_reported_as_out_of_memory(tmp_path):
    error = RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error.")
    with pytest.raises(RuntimeError, match="Bus error"), utils.atomic_write(tmp_path / "x"):
        raise error
    with pytest.raises(SystemExit, match=r"ran out of memory .*Bus error.*NUM_WORKERS=0.*shm"), utils.plain_errors():
        raise error


def test_a_full_gpu_ends_with_the_setting_that_helps():
    with (
        pytest.raises(SystemExit, match="the GPU ran out of memory; lower BATCH_SIZE .* SUBDIVISIONS"),
        utils.plain_errors(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_curves_are_drawn_for_dollar_signs_in_class_names_and_for_40_classes(tmp_path):
    rows = [dict.fromkeys(test_script.COLUMNS, 0.1 * (c % 10)) | {"class": f"cost $_{c}^$"} for c in range(40)]
    test_script.draw_curves(rows, [(np.array([1.0]), np.array([0.5]))] * 40, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height * 0.8  # 20 panels, not 40


def test_text_with_another_encoding_than_utf_8_is_refused_by_its_name(tmp_path):
    write_devkit(tmp_path, {"a": annotation()})
    (tmp_path / "VOC2026/ImageSets/Main/train.txt").write_bytes("a\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"train\.txt: not UTF-8 text; save it as UTF-8"):
        read(tmp_path)


def test_a_full_shared_memory_ends_an_evaluation_with_an_error(tmp_path, monkeypatch):
    write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    full = RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=full))  # forked workers inherit it
    with pytest.raises(RuntimeError, match="No space left on device"):
        utils.detect_dataset(YOLOv2(1).eval(), read(tmp_path), 1, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_a_broken_image_whose_name_is_not_utf8_is_skipped_and_listed(tmp_path):
    broken, good = os.fsdecode(os.fsencode(tmp_path) + b"/br\xfcken.png"), tmp_path / "good.png"
    Path(broken).write_bytes(b"no image")
    Image.new("RGB", (40, 30)).save(good)
    for _ in range(2):
        _, index = dataset.read_or_next([(broken, ""), (str(good), "")], 0, str(tmp_path / "broken.txt"))
        assert index == 1
    assert (tmp_path / "broken.txt").read_bytes().count(b"br\xfcken.png: not a readable image") == 1


def test_the_column_of_a_list_per_class_may_follow_a_tab(tmp_path):
    write_devkit(tmp_path, {"a": annotation(), "b 1": annotation()})
    (tmp_path / "VOC2026/ImageSets/Main/train.txt").write_text("a\t-1\nb 1\nb 1  1\n")
    assert [Path(file).name for file, _ in read(tmp_path).samples] == ["a.jpg", "b 1.jpg", "b 1.jpg"]


def test_a_file_is_recognised_by_its_content_whatever_its_suffix(checkpoint, tmp_path):
    darknet_model.save_darknet_weights(YOLOv2(1), tmp_path / "darknet.pt")
    (tmp_path / "ours.weights").write_bytes(checkpoint.read_bytes())
    for name in ("darknet.pt", "ours.weights"):
        _, classes, *_ = model.load_detector(tmp_path / name, ["bolt"], ANCHORS, torch.device("cpu"), "fp32")
        assert classes == ["bolt"]
    (tmp_path / "text.pt").write_text("neither of them")
    with pytest.raises(ValueError, match=r"text\.pt: (damaged or )?not a checkpoint"):
        model.load_detector(tmp_path / "text.pt", [], [], torch.device("cpu"), "fp32")


def test_class_folders_that_no_checkpoint_could_name_are_refused_before_training(tmp_path):
    for name in ("a b", "a_b", ".hidden"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "train" / name / "x.png")
    with pytest.raises(ValueError, match="'a b' and 'a_b' would share a file"):
        dataset.imagenet_dataset(tmp_path, "train", 32, augment=False)
    (tmp_path / "train" / "a_b").rename(tmp_path / "train" / "a b" / ".ipynb_checkpoints")
    assert len(dataset.imagenet_dataset(tmp_path, "train", 32, augment=False)) == 1


def test_confidences_between_the_thresholds_of_test_py_are_never_left_out_silently(monkeypatch):
    monkeypatch.setattr(test_script, "CONFIDENCE_THRESHOLD", 0.5)
    with pytest.raises(ValueError, match="CONFIDENCE_THRESHOLD 0.5 must be at most FIXED_THRESHOLD 0.4"):
        test_script.check_settings()
    monkeypatch.setattr(test_script, "CONFIDENCE_THRESHOLD", 0.1)
    monkeypatch.setattr(test_script, "INPUT_SIZES", [416, 500])
    with pytest.raises(ValueError, match="INPUT_SIZES must hold multiples of 32"):
        test_script.check_settings()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_detect_goes_on_after_a_file_name_that_is_not_utf8(checkpoint, tmp_path, monkeypatch, capsys):
    source = tmp_path / "pictures"
    source.mkdir()
    for name in (b"caf\xe9.png", b"z.png"):
        Image.new("RGB", (80, 60)).save(stream := io.BytesIO(), "PNG")
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_bytes(stream.getvalue())
    for name, value in {
        "SOURCE": str(source),
        "CHECKPOINT": str(checkpoint),
        "OUTPUT_DIR": str(tmp_path / "out"),
    }.items():
        monkeypatch.setattr(detect, name, value)
    detect.main()
    out = capsys.readouterr().out
    assert r"caf\udce9.png" in out and "z.png" in out
    assert sorted(os.listdir(os.fsencode(tmp_path / "out"))) == [b"caf\xe9.jpg", b"z.jpg"]


def test_charts_are_drawn_in_the_environment_of_a_notebook(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,learning_rate,total,images_per_second,train_map\n1,0.1,5.0,3.0,0.5\n")
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONPATH": str(ROOT)}
    command = "import utils; utils.draw_charts('metrics.csv', 'charts.png')"
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, env=environment, check=True)
    with Image.open(tmp_path / "charts.png") as picture:
        assert picture.width > 500


def test_spawned_workers_give_the_same_items(tmp_path):
    write_devkit(tmp_path, {"a": annotation(), "b": annotation()})
    data = read(tmp_path, augment=True)
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=[[(0, 64, 5)]], num_workers=1, multiprocessing_context="spawn"
    )
    (images, targets), *_ = loader
    image, target = data[(0, 64, 5)]
    assert torch.equal(images[0], image) and torch.equal(targets[0], target)


def test_an_image_with_unreadable_exif_data_is_still_read(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (60, 40)).save(stream, "JPEG")
    data = stream.getvalue()
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0"  # orientation as text
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (tmp_path / "odd.jpg").write_bytes(data[:2] + segment + data[2:])
    assert dataset.read_image(tmp_path / "odd.jpg").shape == (40, 60, 3)
    assert dataset.image_size(tmp_path / "odd.jpg") == (60, 40)
