"""Wrong or unusual input of the kind that people report: it is never accepted silently, and one sentence names the
file or setting. The contents of label files and lists are in test_dataset.py."""

import io
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import handlers_kept, load_detector, set_globals, voc_xml, write_coco, write_devkit
from PIL import Image

import darknet_model
import darknet_train
import darknet_train_multigpu
import darknet_train_multigpu_distr
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
CLASSIFIERS = [darknet_train, darknet_train_multigpu, darknet_train_multigpu_distr]
SCRIPTS = [train, *CLASSIFIERS, test_script, detect, detect_txt, dataset, model, darknet_model]
BOLT = [("bolt", (11, 11, 51, 41))]
TWO = {"a": BOLT, "b": BOLT}


def bolt(extra="", **size) -> str:
    """The annotation of BOLT, with an element more in its object."""
    return voc_xml(BOLT, **size).replace("</object>", f"{extra}</object>")


def write_csv(root: Path, labels: str, image="a.png") -> Path:
    Image.new("RGB", (100, 80)).save(root / image)
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
    set_globals(monkeypatch, train, **(small | values))
    monkeypatch.setattr(utils, "draw_charts", lambda rows, chart_file: None)


@pytest.fixture
def train_bolts(tmp_path, monkeypatch):
    """train_bolts(**values) trains on the devkit in tmp_path, which is that of TWO until a test writes another."""
    write_devkit(tmp_path, TWO)

    def train_on_devkit(**values):
        set_training(monkeypatch, tmp_path, **values)
        train.main()

    return train_on_devkit


@pytest.fixture
def checkpoint(tmp_path):
    """An untrained detector of one class."""
    torch.manual_seed(0)
    state = {"model": YOLOv2(1).state_dict(), "classes": ["bolt"], "anchors": ANCHORS, "image_size": 64}
    utils.save_checkpoint(tmp_path / "bolts.pt", **state)
    return tmp_path / "bolts.pt"


# ---------------------------------------------------------------- labels that do not fit their image or their set


def test_images_in_both_the_training_and_the_validation_set_are_counted(train_bolts, tmp_path, capsys):
    write_devkit(tmp_path, {"b": BOLT}, name="val")
    train_bolts(VAL_IMAGE_SETS=[("2026", "val")])
    assert len(re.findall(r"both training and validation.*: 1 \(first: .*b\.jpg\)", capsys.readouterr().out)) == 1


@pytest.mark.parametrize(("declared", "cause"), [((80, 100), "EXIF rotation"), ((200, 160), "resized")])
def test_labels_made_for_another_image_size_are_reported(declared, cause, train_bolts, tmp_path, monkeypatch, capsys):
    write_devkit(tmp_path, {"a": bolt(size=declared), "b": BOLT})
    data = {"DATA_DIR": str(tmp_path), "IMAGE_SETS": [("2026", "train")]}
    set_globals(monkeypatch, dataset, CLASSES=["bolt"], SHEET=str(tmp_path / "sheet.png"), **data)
    with pytest.raises(SystemExit, match="1 problems"):
        dataset.main()
    sizes = rf"a\.xml: .*{declared[0]} x {declared[1]}.* 100 x 80.*{cause}"
    assert re.search(rf"^problem: .*{sizes.replace(': ', ': another image size: ', 1)}", capsys.readouterr().out, re.M)
    train_bolts()
    warning = re.compile(rf"^another image size: 1 \(first: .*{sizes}", re.MULTILINE)
    assert len(warning.findall(capsys.readouterr().out)) == 1
    files = {"CHECKPOINT": str(tmp_path / "runs/yolov2.pt"), "OUTPUT": str(tmp_path / "test")}
    set_globals(monkeypatch, test_script, NUM_WORKERS=0, PRECISION="fp32", **data, **files)
    test_script.main()
    assert len(warning.findall(capsys.readouterr().out)) == 1


def test_doubts_are_one_line_per_kind_with_the_number_of_files_and_the_first(tmp_path, capsys):
    boxes = {
        "fine": [(1, 1, 100, 80)],
        "fractions": [(0.1, 0.2, 0.5, 0.6)],
        "outside": [(11, 11, 51, 41), (150, 10, 180, 50)],
        "overhang": [(-20, 10, 50, 80), (10, 10, 120, 80)],
        "touching": [(0, 0, 101, 81)],  # a pixel more, as of tools that count from 0: no doubt
        "twice": [(10, 10, 50, 80)] * 2,
        "missing": [],
    }
    folder = write_devkit(tmp_path, {name: [("bolt", box) for box in rows] for name, rows in boxes.items()})
    with open(folder / "ImageSets/Main/train.txt", "a") as stream:
        stream.write("fine\n")
    (folder / "Annotations/missing.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing\.xml: .*TOLERATE=\['missing labels'\]"):
        read(tmp_path)
    data = read(tmp_path, classes=["bolt", "nut"], tolerate=["missing labels"])
    dataset.print_doubts(data)
    found = re.findall(r"^(.*): (\d+) \(first: (?:.*/)?(\w+)[.)]", capsys.readouterr().out, re.MULTILINE)
    assert sorted(found) == [
        ("a box twice", "1", "twice"), ("boxes cut off", "1", "overhang"), ("boxes left out", "2", "fractions"),
        ("classes without objects, of the 2 in CLASSES", "1", "nut"), ("fractions instead of pixels", "1", "fractions"),
        ("images listed more than once", "1", "fine"), ("images without a label file", "1", "missing"),
    ]  # fmt: skip
    assert [len(sample.labels) for sample in data.samples] == [1, 0, 1, 2, 1, 2, 0, 1]


def test_common_spellings_of_the_difficult_flag_are_read(tmp_path):
    flags = {"": 0, "Unspecified": 0, "\n 0 \n": 0, "0.0": 0, "false": 0, "1": 1, "True": 1, "yes": 1}
    write_devkit(tmp_path, {str(n): [("bolt", (1, 1, 9, 9), flag)] for n, flag in enumerate(flags)})
    assert [sample.labels[0, 1] for sample in read(tmp_path).samples] == list(flags.values())


def test_capitals_and_namespaces_of_xml_are_read_and_parts_are_no_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    capitals = bolt().replace("object>", "Object>").replace("name>", "Name>")
    space = bolt(part).replace("<annotation>", '<annotation xmlns="http://example.org/voc">')
    write_devkit(tmp_path, {"a": capitals, "b": space, "c": bolt(part)})
    for index in range(3):
        assert read(tmp_path).ground_truth(index).tolist() == [[0, 0, 11, 11, 51, 41]]


# ---------------------------------------------------------------- lists and encodings of other tools


def test_image_ids_may_contain_spaces_and_only_a_last_minus_1_0_or_1_is_a_column(tmp_path):
    """The data folder may contain VOCdevkit/."""
    folder = write_devkit(tmp_path / "VOCdevkit", dict.fromkeys(("photo", "photo (1)", "photo 2", "b 1"), BOLT))
    lines = "photo (1)\nphoto 2\nphoto  1\nphoto -1\nphoto\t-1\nb 1\nb 1  1\n\n"
    (folder / "ImageSets/Main/train.txt").write_text(lines)
    data = read(tmp_path)
    names = [sample.image_id for sample in data.samples]
    assert names == ["photo (1)", "photo 2", "photo", "photo", "photo", "b 1", "b 1"]
    assert all(data.ground_truth(index).tolist() == [[0, 0, 11, 11, 51, 41]] for index in range(7)) and data[0][0].any()


def test_lists_are_read_in_utf_8_and_utf_16_and_other_encodings_are_refused(tmp_path):
    folder = write_devkit(tmp_path, {"né": BOLT})
    image_list = folder / "ImageSets/Main/train.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        image_list.write_bytes("né\r\n".encode(encoding))
        (sample,) = read(tmp_path).samples
        assert Path(sample.image_file).name == "né.jpg" and len(sample.labels) == 1
    for encoding in ("latin-1", "utf-16-le"):  # the second without a byte order mark
        image_list.write_bytes("né\n".encode(encoding))
        with pytest.raises(ValueError, match=r"train\.txt: .*UTF-8"):
            read(tmp_path)
    write_devkit(tmp_path, {"a": BOLT})
    xml = bolt().replace("bolt", "螺栓")
    (folder / "Annotations/a.xml").write_bytes(f'<?xml version="1.0" encoding="gb2312"?>{xml}'.encode("gb2312"))
    with pytest.raises(ValueError, match=r"a\.xml: .*UTF-8"):
        read(tmp_path, classes=["螺栓"])


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".webp"])
def test_images_of_a_devkit_may_have_any_suffix(tmp_path, suffix):
    folder = write_devkit(tmp_path, {"a": BOLT}, suffix=suffix)
    data = read(tmp_path)
    assert Path(data.samples[0].image_file).name == f"a{suffix}" and data[0][1].any()
    Image.new("RGB", (9, 9)).save(folder / "JPEGImages/a.bmp")
    with pytest.raises(ValueError, match=rf"a\.bmp and a\{suffix}|a\{suffix} and a\.bmp"):
        read(tmp_path)


def test_a_single_image_set_needs_no_enclosing_list_and_other_forms_are_refused(tmp_path):
    write_devkit(tmp_path, {"a": BOLT})
    for image_sets in (("2026", "train"), [["2026", "train"]], [("2026", "train")]):
        assert len(dataset.VOCDataset(tmp_path, image_sets, ANCHORS, 64, ["bolt"])) == 1
    for image_sets in ([2026], "2026 train", [("2026",)], [("2026", "train", "x")]):
        with pytest.raises(ValueError, match=r"IMAGE_SETS .*\[\('2007', 'trainval'\)\]"):
            dataset.VOCDataset(tmp_path, image_sets, ANCHORS, 64, ["bolt"])


def test_darknet_lists_and_names_are_read(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images/a.jpg")
    (tmp_path / "labels/a.txt").write_text("1 .5 .5 .5 .5\n")
    (tmp_path / "train.txt").write_text("images/a.jpg\n\n")
    (tmp_path / "obj.names").write_text("bolt\nnut\n\n")
    data = dataset.VOCDataset(tmp_path, ["train.txt"], ANCHORS, 64, str(tmp_path / "obj.names"))
    assert data.classes == ["bolt", "nut"] and data.samples[0].labels.tolist() == [[1, 0, 0.25, 0.25, 0.75, 0.75]]
    with pytest.raises(FileNotFoundError, match=r"none\.names: "):
        model.read_classes(str(tmp_path / "none.names"))
    settings = dict(vars(train))
    utils.override_globals(settings, ["CLASSES=x/obj.names", "IMAGE_SETS=train/images", "ANCHORS=x.cfg"])
    assert [settings[name] for name in ("CLASSES", "IMAGE_SETS", "ANCHORS")] == ["x/obj.names", "train/images", "x.cfg"]


@pytest.mark.parametrize(
    "names", ["[bolt, 'small nut']", "\n  0: bolt\n  1: small nut", "[bolt]", "{1: bolt, 2: nut}", "bolt", ""]
)
def test_class_names_come_from_a_data_yaml_or_a_word(tmp_path, names):
    (tmp_path / "data.yaml").write_text(f"train: ../train/images\nnc: 2\nnames: {names}\n")
    if "small nut" in names:
        assert model.read_classes(str(tmp_path / "data.yaml")) == ["bolt", "small nut"]
    elif names == "[bolt]":
        assert model.read_classes(str(tmp_path / "data.yaml")) == ["bolt"]
    else:
        with pytest.raises(ValueError, match=r"data\.yaml: "):
            model.read_classes(str(tmp_path / "data.yaml"))
    assert model.read_classes("voc") == list(model.VOC_CLASSES)
    assert model.read_classes("coco") == list(model.COCO_CLASSES)
    assert model.read_anchors("coco") == [list(pair) for pair in model.COCO_ANCHORS]


def test_names_with_unicode_spaces_or_backslashes_are_read_from_a_csv_list(tmp_path):
    (tmp_path / "images").mkdir()
    for blank in ("\u00a0", "\u202f", "\u3000", "\u200d"):
        write_csv(tmp_path, "0 .5 .5 .2 .2\n", image=f"images/a{blank}b.png")
        assert read(tmp_path, ["train.csv"])[0][1].any()
    (tmp_path / "train.csv").write_text(f"images\\a{blank}b.png,a.txt\n")
    assert read(tmp_path, ["train.csv"])[0][1].any()


def test_harmless_variants_of_yolo_labels_are_read(tmp_path):
    for line in ("0.0 .3 .4 .4 .5", "0 .3 .4 .4 1.00005", "0 .3 -.00005 .4 .5"):
        assert read(write_csv(tmp_path, line), ["train.csv"]).samples[0].labels.shape == (1, 6)


def test_scores_without_objects_are_announced_and_the_last_checkpoint_is_then_the_best(train_bolts, tmp_path, capsys):
    difficult = [(*BOLT[0], 1)]
    write_devkit(tmp_path, {"c": difficult}, name="val")
    write_devkit(tmp_path, {"a": difficult, "b": BOLT})
    for count, scores in ((1, ["train_map", "val_map"]), (2, ["val_map"])):
        train_bolts(VAL_IMAGE_SETS=[("2026", "val")], EPOCHS=2, EVAL_TRAIN_IMAGES=count)
        assert re.findall(r"^(\w+) will be nan", capsys.readouterr().out, re.MULTILINE) == scores
    best = utils.load_checkpoint(tmp_path / "runs/yolov2_best.pt")
    assert best["epoch"] == 2 and math.isnan(best["best"])


@pytest.mark.parametrize(
    ("objects", "tolerate"), [([(*BOLT[0], 1)], []), ([("Bolt", BOLT[0][1])], ["other classes"]), ([], [])]
)
def test_training_images_without_objects_are_refused(objects, tolerate, train_bolts, tmp_path):
    write_devkit(tmp_path, {"a": objects, "b": objects})
    with pytest.raises(ValueError, match="CLASSES.*TOLERATE"):
        train_bolts(TOLERATE=tolerate)


def test_hidden_class_folders_are_skipped_other_files_counted_and_names_that_clash_refused(tmp_path, capsys):
    for name in ("n 1", "n2", ".ipynb_checkpoints", "n2/.ipynb_checkpoints"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "train" / name / "x.gif")
    (tmp_path / "train/n2/notes.txt").write_text("x")
    data = dataset.imagenet_dataset(tmp_path, "train", 32, augment=False)
    assert data.classes == ["n 1", "n2"] and len(data) == 2
    assert "skipped 2 files that are not images (first: " in capsys.readouterr().out
    (tmp_path / "train/n2").rename(tmp_path / "train/n_1")
    with pytest.raises(ValueError, match="'n 1' and 'n_1'"):  # before training: no checkpoint could name them
        dataset.imagenet_dataset(tmp_path, "train", 32, augment=False)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "names",
    [["a/b", "a_b"], ["a\ufeffb"], ["a\tb"], ["a\nb"], ["a", "a"], ["a b", "a_b"], [""], [" a"], [3], ["a\u00a0b"]],
)
def test_class_names_that_would_break_files_are_refused(tmp_path, names):
    with pytest.raises(ValueError, match="CLASSES"):
        model.read_classes(names)
    utils.save_checkpoint(tmp_path / "odd.pt", model={}, classes=names, anchors=ANCHORS, image_size=64)
    with pytest.raises(ValueError, match=r"odd\.pt.*classes"):
        model.read_detector(tmp_path / "odd.pt")


def test_only_the_scripts_own_globals_are_settings():
    for script in (train, dataset, detect, test_script, darknet_train):
        names = set(utils.script_settings(vars(script)))
        assert "VOC_CLASSES" not in names and "FIXED" not in names and names & {"DATA_DIR", "SOURCE"}
        with pytest.raises(SystemExit, match="VOC_CLASSES"):
            utils.override_globals(dict(vars(script)), ["VOC_CLASSES=['person']"])


def test_checkpoints_with_dots_in_their_names_write_separate_files(train_bolts, tmp_path):
    names, endings = ("lr0.001", "lr0.01", "v1.pth.tar"), ("", ".lock", "_best.pt", "_metrics.csv", "_samples.jpg")
    for name in names:
        train_bolts(CHECKPOINT=str(tmp_path / "runs" / name))
    expected = {f"{name}{ending}" for name in names for ending in endings}
    assert {file.name for file in (tmp_path / "runs").iterdir()} == expected


def test_names_are_printed_with_escapes():
    assert utils.printable("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n" and utils.printable("né 螺栓") == "né 螺栓"
    assert utils.printable("bad\udcff") == "bad\\udcff"


# ---------------------------------------------------------------- damaged checkpoints and weights


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", ["bolt", "nut"]), ("classes", [3]), ("anchors", None), ("anchors", [[1.0]] * 5),
        ("anchors", [(-1.0, 2.0)] * 5), ("anchors", [(math.nan, 2.0)] * 5), ("anchors", ANCHORS[:4]), ("model", [1]),
        ("model", {"w": torch.ones(3)}),
    ],
)  # fmt: skip
def test_a_detector_whose_values_do_not_fit_is_refused_by_its_name(key, value, checkpoint, tmp_path):
    torch.save(torch.load(checkpoint) | {key: value}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt: ") as error:
        load_detector(tmp_path / "odd.pt")
    assert len(str(error.value).splitlines()) == 1


DAMAGES = {
    "nan": lambda tensors: tensors["head.0.0.weight"].view(-1)[5].fill_(math.nan),
    "zeros": lambda tensors: tensors["head.0.0.weight"].zero_(),
    "variance": lambda tensors: tensors["head.0.1.running_var"][3].fill_(-0.5),
    "tail": lambda tensors: tensors["output.weight"][-1, -20:].zero_(),  # an incomplete download
    "big-endian": lambda tensors: [
        tensor.copy_(torch.from_numpy(tensor.numpy().byteswap())) for tensor in tensors.values() if tensor.ndim
    ],
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("suffix", [".pt", ".weights"])
def test_damaged_weights_are_refused_and_the_model_is_unchanged(kind, suffix, tmp_path):
    donor, file = YOLOv2(1), tmp_path / f"odd{suffix}"
    DAMAGES[kind](donor.state_dict())
    if suffix == ".pt":
        torch.save({"model": donor.state_dict(), "classes": ["bolt"], "anchors": ANCHORS, "image_size": 64}, file)
    else:
        darknet_model.save_darknet_weights(donor, file)
    own = YOLOv2(1)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    with pytest.raises(ValueError, match=rf"odd\{suffix}: damaged weights"):
        model.load_pretrained_backbone(own, file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    with pytest.raises(ValueError, match=rf"odd\{suffix}: damaged weights"):
        load_detector(file, ["bolt"], ANCHORS)


def test_a_png_with_a_wrong_checksum_is_refused(tmp_path):
    """Pillow decodes the pixels without looking at the checksums."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[content.index(b"IDAT") + 2000] ^= 4
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: "):
        dataset.read_image(tmp_path / "a.png")


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path, checkpoint):
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(checkpoint.read_bytes())
    content[largest.header_offset + 5000] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match=r"bolts\.pt: .*checksum"):
        utils.load_checkpoint(checkpoint)


def test_all_but_the_last_convolution_is_loaded_if_the_classes_or_their_order_differ(tmp_path, capsys):
    donor = YOLOv2(2)
    state = {"model": donor.state_dict(), "anchors": ANCHORS, "image_size": 64}
    utils.save_checkpoint(tmp_path / "two.pt", classes=["nut", "bolt"], **state)
    own = YOLOv2(2)
    assert model.load_pretrained_backbone(own, tmp_path / "two.pt", ["bolt", "nut"]) == 22
    assert "22 of 23 convolutions" in capsys.readouterr().out
    same = {name for name, tensor in donor.state_dict().items() if torch.equal(own.state_dict()[name], tensor)}
    assert donor.state_dict().keys() - same == {"output.weight"}  # and the bias, which starts as 0
    assert model.load_pretrained_backbone(own, tmp_path / "two.pt", ["nut", "bolt"]) == 23
    assert torch.equal(own.output.weight, donor.output.weight)
    classifier = darknet_model.Darknet19(3).state_dict()
    utils.save_checkpoint(tmp_path / "classifier.pt", model=classifier, classes=["n1", "n2", "n3"])
    capsys.readouterr()
    assert model.load_pretrained_backbone(own, tmp_path / "classifier.pt", ["nut", "bolt"]) == 18
    assert capsys.readouterr().out.endswith("loaded 18 of 23 convolutions, the backbone\n")  # its classes do not matter


@pytest.mark.parametrize(("optimizer", "buffer"), [("sgd", "momentum_buffer"), ("adam", "exp_avg_sq")])
def test_optimiser_buffers_of_another_shape_are_refused(optimizer, buffer, train_bolts, tmp_path):
    """A fused optimiser would read and write beyond them."""
    train_bolts(OPTIMIZER=optimizer)
    state = utils.load_checkpoint(tmp_path / "runs/yolov2.pt")
    state["optimizer"]["state"][0][buffer] = torch.zeros(3)
    utils.save_checkpoint(tmp_path / "runs/yolov2.pt", **state)
    with pytest.raises(ValueError, match=r"yolov2\.pt: .*optimiser"):
        train_bolts(OPTIMIZER=optimizer, RESUME=True, EPOCHS=2)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_number_and_every_word_of_a_script_has_limits(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default outputs are relative
    lists = {"MULTI_SCALE", "INPUT_SIZES", "LR_DROPS", "CROP_SCALE"}  # every entry counts
    words = {"BROKEN_IMAGES", "EQUATION", "LR_SCHEDULE", "OPTIMIZER", "PRECISION", "TOLERATE"}
    for name, value in utils.script_settings(vars(script)).items():
        wrong = []
        if name in words:
            wrong = ["nonsense"] if isinstance(value, str) else [["nonsense"]]
        elif name in lists or name == "IMAGE_SIZE" or type(value) in (int, float):
            wrong = [[64, -1], [64, math.nan]] if name in lists else [-1, math.nan]
        for bad in wrong:
            with monkeypatch.context() as patch, pytest.raises(ValueError, match=rf"^{name}\b"):
                patch.setattr(script, name, bad)
                script.check_settings()
    script.check_settings()


INVALID = [
    *[(train, {name: 2.0}, name) for name in ("MOMENTUM", "EVAL_THRESHOLD", "IGNORE_THRESHOLD")],
    *[(train, {name: 0}, name) for name in ("EPOCHS", "EVAL_EVERY", "EVAL_TRAIN_IMAGES", "REPEAT", "SUBDIVISIONS")],
    (train, {"BATCH_SIZE": 10**30}, "BATCH_SIZE"),
    (train, {"BATCH_SIZE": 3, "SUBDIVISIONS": 2}, "BATCH_SIZE 3.*SUBDIVISIONS 2"),
    *[(train, {name: value}, name) for name in ("LR_DROPS", "MULTI_SCALE") for value in (60, None)],  # no lists
    (train, {"IMAGE_SIZE": 100}, "IMAGE_SIZE"),
    (train, {"IMAGE_SIZE": 32, "BATCH_SIZE": 1}, "IMAGE_SIZE"),  # batch norm needs two values
    *[(train, {"MULTI_SCALE": value}, "MULTI_SCALE") for value in ([64, 100], [0, 64], range(320, 609, 32), "x.txt")],
    *[(train, {"LR_DROPS": value}, "LR_DROPS") for value in (["a"], [0, 60])],
    (train, {"LR_SCHEDULE": "steps", "LR_DROPS": [40000, 60000]}, "LR_DROPS .*40000, 60000.* EPOCHS"),  # steps
    *[(train, {"ANCHORS": value}, "ANCHORS") for value in ([("a", 1)], [(1, 2, 3), (4, 5, 6)], [1, 2, 3], [])],
    (train, {"ANCHORS": [(42, 55), (359, 320)]}, "ANCHORS must be in grid cells"),  # pixels
    *[(train, {"DEVICE": name}, f"DEVICE={name}") for name in ("meta", "gpu", "99")],
    (train, {"CHECKPOINT": ""}, "^'' .*CHECKPOINT"),
    (train, {"CLASSES": []}, "CLASSES"),
    *[(script, {name: 0}, name) for script in CLASSIFIERS for name in ("EPOCHS", "BATCH_SIZE", "SUBDIVISIONS")],
    *[(script, {"IMAGE_SIZE": 16}, "IMAGE_SIZE") for script in CLASSIFIERS],
    *[(script, {"LABEL_SMOOTHING": 1.5}, "LABEL_SMOOTHING") for script in CLASSIFIERS],
    (test_script, {"CONFIDENCE_THRESHOLD": 0.5}, "CONFIDENCE_THRESHOLD 0.5.*FIXED_THRESHOLD 0.4"),
    (test_script, {"INPUT_SIZES": [416, 500]}, "INPUT_SIZES"),
]


@pytest.mark.parametrize(("script", "setting", "message"), INVALID)
def test_invalid_settings_are_refused_by_name(script, setting, message, tmp_path, monkeypatch):
    write_devkit(tmp_path, TWO)
    set_training(monkeypatch, tmp_path)
    for each in CLASSIFIERS:
        data = {"DATA_DIR": str(ROOT / "data_samples/imagenet"), "CHECKPOINT": str(tmp_path / "runs/darknet19.pt")}
        set_globals(monkeypatch, each, IMAGE_SIZE=32, EPOCHS=1, NUM_WORKERS=0, PRECISION="fp32", **data)
    monkeypatch.setattr(test_script, "OUTPUT", str(tmp_path / "runs/test"))
    set_globals(monkeypatch, script, **setting)
    with pytest.raises(ValueError, match=message):
        script.main()
    assert not list((tmp_path / "runs").glob("*"))  # nothing was written


def test_settings_of_other_types_are_saved_as_text(train_bolts, tmp_path):
    """A checkpoint with a pickled Path would not load."""
    train_bolts(DATA_DIR=tmp_path, CLASSES=list(np.array(["bolt"])))
    settings = utils.load_checkpoint(tmp_path / "runs/yolov2.pt")["settings"]
    assert settings["DATA_DIR"] == str(tmp_path)
    train_bolts(DATA_DIR=tmp_path, RESUME=True, EPOCHS=2)
    assert utils.load_checkpoint(tmp_path / "runs/yolov2.pt")["epoch"] == 2


def test_a_new_run_keeps_the_files_of_an_earlier_one(train_bolts, tmp_path, capsys):
    """Forgetting RESUME=True must not cost the weights of a long run, even if the new one is stopped at once."""
    files = [tmp_path / "runs" / name for name in ("yolov2.pt", "yolov2_best.pt", "yolov2_metrics.csv")]
    kept = [Path(f"{file}.old1") for file in files]
    train_bolts()
    train_bolts(RESUME=True)
    out = capsys.readouterr().out
    assert "earlier" not in out and not any(file.exists() for file in kept) and "set a larger EPOCHS" in out
    contents = [file.read_bytes() for file in files]
    train_bolts(RESUME=False, SEED=1, MAX_HOURS=1e-9, PRETRAINED=str(files[1]))  # stops after the first step
    assert [file.read_bytes() for file in kept] == contents
    assert ", ".join(map(str, kept)) in capsys.readouterr().out
    assert utils.load_checkpoint(files[0])["settings"]["SEED"] == 1 and not files[2].exists()
    assert files[1].read_bytes() == contents[1]  # the weights to start from, which a restart needs again
    train_bolts(RESUME=False, SEED=2, MAX_HOURS=1e-9, PRETRAINED="")  # once more: the finished run is still there
    assert [file.read_bytes() for file in kept] == contents and Path(f"{files[0]}.old2").exists()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_new_run_and_its_saves_write_through_the_link_of_an_earlier_one(tmp_path):
    for folder in ("disk", "runs"):
        (tmp_path / folder).mkdir()
    link, target = tmp_path / "runs/run.pt", tmp_path / "disk/run.pt"
    target.write_bytes(b"earlier")
    link.symlink_to(target)
    utils.keep_earlier_run(str(link), "")
    assert (tmp_path / "runs/run.pt.old1").read_bytes() == b"earlier"
    for epoch in (1, 2):
        utils.save_checkpoint(link, epoch=epoch)
        assert link.is_symlink() and utils.load_checkpoint(target) == {"epoch": epoch}
    assert os.listdir(tmp_path / "disk") == ["run.pt"] and sorted(os.listdir(link.parent)) == ["run.pt", "run.pt.old1"]


def test_a_burn_in_longer_than_the_run_is_named(train_bolts, capsys):
    for burn_in, said in ((1, False), (2, True)):
        train_bolts(BURN_IN=burn_in, BATCH_SIZE=2, EPOCHS=1, REPEAT=1)
        assert ("BURN_IN 2 " in capsys.readouterr().out) == said


def test_anchors_may_be_the_flat_list_of_a_cfg_but_neither_pixels_nor_others_than_the_files(checkpoint, tmp_path):
    assert model.read_anchors([1.3, 1.7, 3.1, 4.0]) == [[1.3, 1.7], [3.1, 4.0]]
    darknet_model.save_darknet_weights(YOLOv2(1), tmp_path / "bolt.weights")
    pixels = [10, 14, 23, 27, 37, 58, 81, 82, 135, 169]
    for file, anchors, message in (
        (tmp_path / "bolt.weights", pixels, "ANCHORS must be in grid cells"),
        (checkpoint, [1, 2, 3, 4], r"bolts\.pt: has other anchors than ANCHORS"),
    ):
        with pytest.raises(ValueError, match=message):
            load_detector(file, ["bolt"], anchors)


def test_anchors_may_be_larger_than_the_grid_of_image_size_if_multi_scale_is(train_bolts, tmp_path):
    """Here up to 15 cells at 512 px; the readers of checkpoint and Darknet file take them back."""
    anchors = [(1, 2), (15, 14.5)]
    train_bolts(ANCHORS=anchors, MULTI_SCALE=[512])
    network, state = model.read_detector(tmp_path / "runs/yolov2.pt")
    assert state["anchors"] == [[1, 2], [15, 14.5]] and state["image_size"] == 64
    darknet_model.save_darknet_weights(network, tmp_path / "bolts.weights")
    assert model.darknet_detector(tmp_path / "bolts.weights", ["bolt"], anchors)[1] == state["anchors"]


def test_a_folder_that_cannot_be_written_is_found_before_training(train_bolts, tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    with pytest.raises(OSError, match=r"yolov2\.pt: could not be written"):
        train_bolts()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error."), "NUM_WORKERS=0.*shm"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "CUDA.*BATCH_SIZE.*SUBDIVISIONS"),
    ],
)
def test_a_full_memory_ends_with_the_setting_that_helps(error, message, tmp_path):
    with pytest.raises(SystemExit, match=message), utils.plain_errors(), utils.atomic_write(tmp_path / "x"):
        raise error


def test_curves_are_drawn_for_dollar_signs_in_class_names_and_for_40_classes(tmp_path):
    rows = [dict.fromkeys(test_script.COLUMNS, 0.1 * (c % 10)) | {"class": f"cost $_{c}^$"} for c in range(40)]
    test_script.draw_curves(rows, [(np.array([1.0]), np.array([0.5]))] * 40, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height * 0.8  # 20 panels, not 40


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files in /dev/shm")
def test_a_full_shared_memory_ends_an_evaluation_with_an_error(tmp_path):
    """A worker that fails to send a batch must not leave the main process waiting for it."""
    import resource  # not on Windows

    write_devkit(tmp_path, TWO)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGCHLD)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # an image of 512 pixels has 786,432 bytes
    try:
        with pytest.raises(RuntimeError, match="torch_"):
            utils.detect_dataset(YOLOv2(1).eval(), read(tmp_path).changed(image_size=512), 1, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        utils.kill_workers()  # as at the end of a script; PyTorch alone would wait 10 s for the worker
        while multiprocessing.active_children():
            time.sleep(0.01)
        signal.signal(signal.SIGCHLD, handler)


def test_a_checkpoint_is_recognised_whatever_its_suffix_and_other_files_are_refused(checkpoint, tmp_path):
    (tmp_path / "ours.weights").write_bytes(checkpoint.read_bytes())
    assert load_detector(tmp_path / "ours.weights")[1] == ["bolt"]
    darknet_model.save_darknet_weights(YOLOv2(1), tmp_path / "darknet.pt")
    for name in ("page.pt", "page.weights"):
        (tmp_path / name).write_text("\n<!DOCTYPE html><html><body>moved</body></html>" * 9)
    for name in ("darknet.pt", "page.pt", "page.weights"):
        with pytest.raises(ValueError, match=rf"{re.escape(name)}: "):
            load_detector(tmp_path / name)


def test_charts_are_drawn_in_the_environment_of_a_notebook(tmp_path):
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONPATH": str(ROOT)}
    rows = [{"epoch": 1, "learning_rate": 0.1, "total": 5.0, "images_per_second": 3.0, "train_map": 0.5}]
    command = f"import utils; utils.draw_charts({rows}, 'charts.png')"
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, env=environment, check=True)
    with Image.open(tmp_path / "charts.png") as picture:
        assert picture.width > 500


def test_spawned_workers_give_the_same_items(tmp_path):
    write_devkit(tmp_path, TWO)
    data = read(tmp_path, augment=True)
    loading = {"num_workers": 1, "multiprocessing_context": "spawn"}
    (images, targets), *_ = torch.utils.data.DataLoader(data, batch_sampler=[[(0, 64, 5)]], **loading)
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
    assert dataset.read_image_size(tmp_path / "odd.jpg") == (60, 40)


# ---------------------------------------------------------------- names, ids and classes of other tools


def test_decomposed_names_and_ids_in_folders_are_found(tmp_path):
    """macOS stores an umlaut as a letter and its dots; the suffixes are those of another system, too."""
    decomposed = {form: unicodedata.normalize(form, "day_01/Müller") for form in ("NFC", "NFD")}
    folder = tmp_path / "VOC2026"
    for part in ("JPEGImages", "Annotations"):
        (folder / part / "day_01").mkdir(parents=True)
    Image.new("RGB", (100, 80)).save(folder / f"JPEGImages/{decomposed['NFD']}.PNG")
    text = voc_xml([(unicodedata.normalize("NFD", "Öse"), BOLT[0][1])])
    (folder / f"Annotations/{decomposed['NFC']}.XML").write_text(text, encoding="utf-8")
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text(f"\ufeff{decomposed['NFC']}\n", encoding="utf-8")
    (sample,) = read(tmp_path, classes=["Öse"]).samples
    assert sample.size == (100, 80) and sample.labels[:, 0].tolist() == [0]


def test_of_two_categories_with_one_name_the_one_with_annotations_counts(tmp_path):
    rows = [(1, 7, [10, 10, 40, 30])]
    file = write_coco(tmp_path, [(1, "a.png")], rows, {5: "bolt", 7: "bolt", 9: "bolt"})
    assert len(read(tmp_path, ["train.json"]).samples[0].labels) == 1
    content = json.loads(file.read_text())
    assert dataset.coco_categories(content, ["bolt"]) == {7: "bolt"}
    write_coco(tmp_path, [(1, "a.png")], [*rows, (1, 5, [10, 10, 40, 30])], {5: "bolt", 7: "bolt"})
    with pytest.raises(ValueError, match=r"train\.json.*same name"):
        read(tmp_path, ["train.json"])


def test_data_classes_give_the_order_of_the_labels_and_a_name_that_the_model_lacks_is_refused(tmp_path):
    write_csv(tmp_path, "0 .5 .5 .2 .2\n1 .2 .2 .1 .1\n2 .8 .8 .1 .1\n")
    data = read(tmp_path, ["train.csv"], classes=["cat", "bolt", "nut"])
    for tolerate in ([], ["missing labels"]):
        with pytest.raises(ValueError, match="DATA_CLASSES.*cat.*TOLERATE"):
            data.with_classes(["nut", "bolt"], tolerate)
    renumbered = data.with_classes(["nut", "bolt"], ["other classes"])
    assert renumbered.samples[0].labels[:, 0].tolist() == [1, 0] and renumbered.classes == ["nut", "bolt"]
    assert np.allclose(renumbered.ground_truth(0)[:, 2:], data.ground_truth(0)[1:, 2:])


def test_one_class_folder_and_the_same_images_in_train_and_val_are_named(tmp_path, capsys):
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / folder / "x.png")
    Image.new("RGB", (50, 40)).save(tmp_path / "val/b/x.png")  # the same name, another image
    train_set = dataset.imagenet_dataset(tmp_path, "train", 32, augment=False)
    dataset.imagenet_dataset(tmp_path, "val", 32, augment=False, train_set=train_set)
    assert f"validation set: 1 (first: {tmp_path}/train/a/x.png)" in capsys.readouterr().out
    (tmp_path / "train").rename(tmp_path / "images")
    (tmp_path / "deep/train").mkdir(parents=True)
    (tmp_path / "images").rename(tmp_path / "deep/train/images")
    with pytest.raises(ValueError, match="train.*images"):
        dataset.imagenet_dataset(tmp_path / "deep", "train", 32, augment=False)


# ---------------------------------------------------------------- several runs, signals, pipes


@pytest.mark.skipif(os.name == "nt", reason="no such locks and signals there")
def test_a_second_living_run_with_the_same_checkpoint_is_refused(tmp_path):
    code = "import sys, utils\nutils.lock_run(sys.argv[1]); print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "run.pt")]
    first = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=r"run\.pt.*CHECKPOINT"):
        utils.lock_run(str(tmp_path / "run.pt"))
    first.communicate()
    utils.lock_run(str(tmp_path / "run.pt"))  # the first one has ended


@pytest.mark.skipif(os.name == "nt", reason="no such signal there")
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_closed_terminal_stops_a_run_unless_nohup_ignores_it(before):
    with handlers_kept():
        signal.signal(signal.SIGHUP, before)
        stop = utils.catch_stop_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.reason == ("SIGHUP" if before == signal.SIG_DFL else "")


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (MemoryError(), "BATCH_SIZE"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "BATCH_SIZE"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "MPS .*BATCH_SIZE"),
        (RuntimeError("Too many open files. Communication with the workers"), "NUM_WORKERS"),
        (OSError(24, "Too many open files"), "NUM_WORKERS"),
    ],
)
def test_exhausted_memory_and_open_files_are_one_sentence(error, named, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # plain_errors may replace it
    with pytest.raises(SystemExit) as stop, utils.plain_errors():
        raise error
    assert re.match(f"error: .*{named}", str(stop.value)) and "\n" not in str(stop.value)


def test_a_closed_pipe_is_one_sentence():
    code = "import utils\nwith utils.plain_errors():\n    print('x')\n    raise BrokenPipeError"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "output" in done.stderr
