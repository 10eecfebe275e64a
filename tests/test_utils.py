"""Settings, schedules, optimiser groups, checkpoints, logs, charts, drawing and detect.py's search for images."""

import io
import math
import os
import pickle
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_equal
from matplotlib.axes import Axes
from PIL import Image
from torch import nn
from tqdm import tqdm

import darknet_model
import detect
import utils

# ---------------------------------------------------------------- settings of a script

SCRIPT = '''"""Trains something."""
import os
from pathlib import Path

# data
DATA_DIR = "data"  # a folder, or EPOCHS = 4
IMAGE_SETS = [
    ("2007", "train"),  # on lines of its own
]
MULTI_SCALE = (320, 352)
# run
EPOCHS = 10
LEARNING_RATE = 0.1  # the paper's
RESUME = False
WIDTH = None  # None for the checkpoint's own
_HIDDEN = 1


def helper():
    pass


LATER = 1
'''
NAMES = ["DATA_DIR", "IMAGE_SETS", "MULTI_SCALE", "EPOCHS", "LEARNING_RATE", "RESUME", "WIDTH"]


@pytest.fixture
def settings(tmp_path) -> dict:
    """A script's globals(), with one setting of each type."""
    (tmp_path / "train.py").write_text(SCRIPT)
    return runpy.run_path(str(tmp_path / "train.py"))


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ([], {}),
        (["EPOCHS=3"], {"EPOCHS": 3}),
        (["EPOCHS=3", "DATA_DIR=x", "EPOCHS=4"], {"EPOCHS": 4, "DATA_DIR": "x"}),  # the last one wins
        (["LEARNING_RATE=1e-3"], {"LEARNING_RATE": 0.001}),
        (["LEARNING_RATE=1"], {"LEARNING_RATE": 1.0}),  # an int is accepted for a float
        (["RESUME=True"], {"RESUME": True}),
        (["DATA_DIR=/data/my VOC"], {"DATA_DIR": "/data/my VOC"}),  # text without quotes
        (["DATA_DIR='/data/VOC'"], {"DATA_DIR": "/data/VOC"}),  # and with them
        (["DATA_DIR=a=b"], {"DATA_DIR": "a=b"}),
        (["DATA_DIR=7"], {"DATA_DIR": "7"}),  # a folder may be called 7
        (["DATA_DIR="], {"DATA_DIR": ""}),
        (["WIDTH=416"], {"WIDTH": 416}),
        (["WIDTH=None"], {"WIDTH": None}),
        (["IMAGE_SETS=[('2007','val'),('2012','val')]"], {"IMAGE_SETS": [("2007", "val"), ("2012", "val")]}),
        (["IMAGE_SETS=mine.csv"], {"IMAGE_SETS": "mine.csv"}),  # a list's file
        (["MULTI_SCALE=[416]"], {"MULTI_SCALE": [416]}),  # a list is accepted for a tuple
    ],
)
def test_command_line_arguments_set_globals(words, changed, settings):
    before = dict(settings)
    utils.override_globals(settings, words)
    assert settings == before | changed
    assert [type(settings[name]) for name in changed] == [type(value) for value in changed.values()]


@pytest.mark.parametrize(
    "word",
    [
        "EPOCHS=1.5", "EPOCHS=many", "EPOCHS=True", "EPOCHS=None", "DATA_DIR=None", "IMAGE_SETS=None", "WIDTH=abc",
        "WIDTH=1.5", "LEARNING_RATE=fast", "RESUME=1", "RESUME=yes", "MULTI_SCALE=320", "MULTI_SCALE=[320",
        "EPOCHS", "--epochs", "EPOCH=3", "epochs=3", "_HIDDEN=3", "LATER=3", "helper=3", "__file__=3", "os=3",
    ],
)  # fmt: skip
def test_an_invalid_argument_exits_with_an_error_that_names_it(word, settings):
    before = dict(settings)
    with pytest.raises(SystemExit) as stop:
        utils.override_globals(settings, [word])
    name = word.partition("=")[0]
    assert re.fullmatch(rf"train\.py: .*\b{name.strip('-')}\b.*", stop.value.code) and settings == before
    if "=" in word and name not in NAMES:
        assert stop.value.code.endswith(", ".join(NAMES))  # the known ones


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["EPOCHS=3", "--help"]])
def test_help_prints_the_docstring_and_the_settings_as_they_are_in_the_file_and_exits(words, settings, capsys):
    with pytest.raises(SystemExit) as stop:
        utils.override_globals(settings, words)
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and printed.startswith("Trains something.\n")
    assert SCRIPT[SCRIPT.index("# data") : SCRIPT.index("_HIDDEN")] in printed  # with their comments
    assert "helper" not in printed and "LATER" not in printed and "import" not in printed


def test_the_settings_are_the_globals_that_a_script_assigns_above_its_functions(settings):
    settings |= {"EXTRA": 1, "DATA_DIR": Path("data")}
    values = utils.script_settings(settings)
    assert list(values) == NAMES and values["IMAGE_SETS"] == [("2007", "train")]
    assert values["DATA_DIR"] == "data"  # a checkpoint must not contain a Path


@pytest.mark.parametrize("error", [ValueError("a.xml: broken"), FileNotFoundError("a.xml: broken")])
def test_bad_input_exits_with_its_message_and_other_errors_keep_their_traceback(error):
    with pytest.raises(SystemExit) as stop, utils.plain_errors():
        raise error
    assert stop.value.code == "error: a.xml: broken"
    with pytest.raises(KeyError), utils.plain_errors():
        raise KeyError("a bug in the program")


def test_set_seed_seeds_torch_numpy_and_python():
    import random

    def draw():
        return torch.rand(1).item(), np.random.random(), random.random()  # noqa: NPY002 - a test of the global state

    utils.set_seed(5)
    first = draw()
    assert draw() != first
    utils.set_seed(5)
    assert draw() == first


# ---------------------------------------------------------------- device and precision


def test_precision_by_name():
    cpu = torch.device("cpu")
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert {name: utils.pick_precision(name, cpu) for name in expected} == expected


@pytest.mark.parametrize(
    ("native", "milliseconds", "expected"),
    [(True, [9.0, 5.0], torch.bfloat16), (True, [5.0, 9.0], torch.float32), (False, [9.0, 5.0], torch.float32)],
)
def test_automatic_precision_on_a_cpu_is_the_faster_native_one(monkeypatch, capsys, native, milliseconds, expected):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(utils, "time_convolution", lambda: milliseconds)
    assert utils.pick_precision("auto", torch.device("cpu")) == expected
    figures = f"takes {milliseconds[0]:.1f} ms in float32, {milliseconds[1]:.1f} ms in bfloat16"
    assert (figures in capsys.readouterr().out) == native


def test_timing_a_convolution_leaves_the_random_numbers_alone():
    utils.set_seed(0)
    expected = torch.rand(3)
    utils.set_seed(0)
    assert all(milliseconds > 0 for milliseconds in utils.time_convolution())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_a_resumed_run_keeps_its_precision(monkeypatch, tmp_path, saved):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(utils, "time_convolution", lambda: [5.0, 9.0] if saved == torch.bfloat16 else [9.0, 5.0])
    utils.save_checkpoint(tmp_path / "run.pt", settings={"PRECISION": str(saved)})
    assert utils.pick_precision("auto", torch.device("cpu"), str(tmp_path / "run.pt")) == saved
    assert utils.pick_precision("fp16", torch.device("cpu"), str(tmp_path / "run.pt")) == torch.float16
    (tmp_path / "broken.pt").write_bytes((tmp_path / "run.pt").read_bytes()[:200])
    assert utils.pick_precision("auto", torch.device("cpu"), str(tmp_path / "broken.pt")) != saved


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_automatic_precision_on_a_gpu_is_float16_where_bfloat16_is_emulated(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert utils.pick_precision("auto", torch.device("cuda")) == expected


def test_automatic_device_is_the_gpu_where_there_is_one_for_this_pytorch(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utils.pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    assert utils.pick_device("auto") == torch.device("cpu") and "too old" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert utils.pick_device("auto") == torch.device("cuda") and utils.pick_device("cpu") == torch.device("cpu")
    assert utils.pick_device("1") == utils.pick_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")] * 2


# ---------------------------------------------------------------- training

YOLOV2_VOC = {1: 1e-15, 500: 6.25e-5, 999: 1e-3 * 0.999**4, 1000: 1e-3, 1001: 1e-3}  # 1: 1e-3 (1 / 1000)^4
YOLOV2_VOC |= {39_999: 1e-3, 40_000: 1e-4, 59_999: 1e-4, 60_000: 1e-5, 80_200: 1e-5}
DARKNET19 = {1: 1e-13, 500: 0.00625, 1000: 0.1 * 0.99875**4, 200_000: 0.1 * 0.75**4, 800_000: 0.0}


def test_learning_rates_of_yolov2_voc_cfg_and_darknet19_cfg():
    detector = (80_200, 1e-3, "steps", 1000, 4.0, (40_000, 60_000))
    for expected, schedule in ((YOLOV2_VOC, detector), (DARKNET19, (800_000, 0.1, "polynomial", 1000, 4.0))):
        rates = {update: utils.learning_rate_at(update - 1, *schedule) for update in expected}
        assert rates == pytest.approx(expected, rel=1e-9, abs=1e-30)


def test_constant_cosine_and_polynomial_schedules():
    def rates(schedule, *steps, **options):
        return [utils.learning_rate_at(step, 100, 2.0, schedule, **options) for step in steps]

    assert rates("constant", 0, 99) == [2, 2]
    assert rates("cosine", 0, 25, 50) == pytest.approx([2, 1 + math.sqrt(0.5), 1])
    assert rates("polynomial", 49) == pytest.approx([0.125])  # 2 (1 - 50/100)^4: Darknet's power by default
    assert rates("polynomial", 74, power=0.5) == pytest.approx([1])  # 2 sqrt(1 - 75/100)
    # the burn-in has the power of the schedule: 2 sqrt(1/4)
    assert rates("polynomial", 0, burn_in=4, power=0.5) == pytest.approx([1])


@pytest.mark.parametrize("schedule", ["constant", "steps", "cosine"])
def test_burn_in_rises_with_the_fourth_power_and_does_not_shift_the_schedule(schedule):
    def rate(step, **options):
        return utils.learning_rate_at(step, 100, 2.0, schedule, drops=(50,), **options)

    # with a burn-in of 4, updates 1, 2 and 3 have (1/4)^4, (2/4)^4 and (3/4)^4 of the rate
    assert [rate(step, burn_in=4) for step in range(3)] == pytest.approx([2 / 256, 2 / 16, 2 * 81 / 256])
    assert [rate(step, burn_in=4) for step in (3, 4, 60)] == [rate(step) for step in (3, 4, 60)]


@pytest.mark.parametrize("step", [0, 20])
def test_an_unknown_schedule_is_an_error_even_during_burn_in(step):
    with pytest.raises(ValueError, match="LR_SCHEDULE must be .* not 'stepz'"):
        utils.learning_rate_at(step, 100, 1.0, "stepz", burn_in=10)


def test_only_kernels_have_weight_decay_and_frozen_parameters_are_in_no_group():
    frozen = nn.Conv2d(3, 3, 1).requires_grad_(False)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False), nn.Linear(2, 5), frozen
    model = nn.Sequential(*layers)
    decayed, others = utils.parameter_groups(model, 5e-4)
    assert (decayed["weight_decay"], others["weight_decay"]) == (5e-4, 0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in decayed["params"]] == ["0.weight", "2.weight", "3.weight"]
    assert [names[id(parameter)] for parameter in others["params"]] == ["0.bias", "1.weight", "1.bias", "3.bias"]


@pytest.mark.parametrize(("batches", "momentum"), [(0, 1.0), (10, 0.5), (90, 0.1), (990, 0.01), (80_000, 0.01)])
def test_batch_norm_has_a_larger_momentum_at_the_start(batches, momentum):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4, momentum=0.3)), nn.BatchNorm2d(4))
    utils.warm_batch_norm(model, batches)  # 10 / (batches + 10), at least .01
    assert [model[1][0].momentum, model[2].momentum] == pytest.approx([momentum, momentum])


def test_a_compiled_model_keeps_darknets_momentum(narrow):
    model = darknet_model.Darknet19(2)
    utils.warm_batch_norm(torch.compile(model), 0)
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.01}


# ---------------------------------------------------------------- checkpoints


def some_state() -> dict:
    """A state like those of the training scripts; the optimiser has taken one step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": None, "epoch": 3, "best": 0.5,
        "settings": {"DATA_DIR": "data", "IMAGE_SETS": [("2007", "train")]}, "classes": ["cat", "dog"],
        "anchors": [(1.5, 2.0)],
    }  # fmt: skip


def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path):
    file = tmp_path / "runs" / "new" / "model.pt"  # missing folders are created
    state = some_state()
    utils.save_checkpoint(file, **state)
    assert_equal(utils.load_checkpoint(file), state)
    assert os.listdir(file.parent) == ["model.pt"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), OSError),
        (OSError(), OSError),  # an error without a message
        (RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk_full", "no_text", "torch", "interrupted"],
)
def test_a_failed_write_keeps_the_old_checkpoint_and_leaves_no_temporary_file(tmp_path, monkeypatch, error, expected):
    file = tmp_path / "model.pt"
    utils.save_checkpoint(file, epoch=1)
    written = []

    def half(state, target):
        written.append(str(target))
        with open(target, "wb") as stream:
            stream.write(b"PK half of it")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(expected, match=re.escape(f"{file}: could not be written") if expected is OSError else None):
        utils.save_checkpoint(file, epoch=2)
    assert written and written != [str(file)]
    assert utils.load_checkpoint(file) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["model.pt"]


class MakesFolder:
    """Creates a folder when it is unpickled: harmless, but it could be any code."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_file_that_would_run_code_is_refused_without_running_it(tmp_path, writer):
    file, folder = tmp_path / "bad.pt", tmp_path / "created"
    with open(file, "wb") as stream:
        (pickle.dump if writer == "pickle" else torch.save)({"model": MakesFolder(folder)}, stream)
    with pytest.raises(ValueError, match=r"bad\.pt: "):
        utils.load_checkpoint(file)
    assert not folder.exists()
    with open(file, "rb") as stream:  # without the protection the file does run code
        pickle.load(stream) if writer == "pickle" else torch.load(stream, weights_only=False)
    assert folder.exists()


def torch_bytes(value) -> bytes:
    torch.save(value, stream := io.BytesIO())
    return stream.getvalue()


CHECKPOINT = torch_bytes(some_state())
CUTS = (20, 100, 500, 900, 999)  # thousandths that are left of a checkpoint


@pytest.mark.parametrize(
    "content",
    [
        b"", b"epoch,loss\n1,2\n", b"\x00" * 1000, b"\x80\x02}", b"\x80\x02X\xff\xff\xff", bytes(range(256)),
        pickle.dumps([1, 2]), torch_bytes(torch.zeros(3)), *(CHECKPOINT[: len(CHECKPOINT) * n // 1000] for n in CUTS),
    ],
    ids=["empty", "text", "zeros", "half_a_pickle", "cut_length", "bytes", "a_list", "a_tensor", *map(str, CUTS)],
)  # fmt: skip
def test_a_truncated_file_or_one_that_is_not_a_checkpoint_is_named(tmp_path, content):
    (tmp_path / "odd.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"odd\.pt: "):
        utils.load_checkpoint(tmp_path / "odd.pt")


def test_a_missing_checkpoint_and_missing_keys_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'none.pt'}: ")):
        utils.load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: ")):  # a folder is not a checkpoint either
        utils.load_checkpoint(tmp_path)
    utils.save_checkpoint(tmp_path / "model.pt", epoch=1)
    with pytest.raises(ValueError, match=r"model\.pt: .*\bclasses, anchors\b"):
        utils.load_checkpoint(tmp_path / "model.pt", keys=("classes", "epoch", "anchors"))


# ---------------------------------------------------------------- log and charts

COLUMNS = "epoch,learning_rate,coord,images_per_second,train_map,val_map"
SCORES = ((None, None), (0.123456789, 0.7), (0.9, 0.6))  # of three epochs; None: not evaluated
METRICS = [dict(zip(COLUMNS.split(","), (n, 0.001, 100 / n**4, 9.0, *SCORES[n - 1]), strict=True)) for n in (1, 2, 3)]


def test_metrics_are_written_as_a_header_and_one_row_per_epoch_and_as_charts(tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr(Axes, "legend", lambda axis, **options: labels.extend(axis.get_legend_handles_labels()[1]))
    (tmp_path / "run_metrics.csv").write_text("damaged \0")  # of the run before it was resumed
    utils.write_metrics(str(tmp_path / "run"), METRICS)
    assert (tmp_path / "run_metrics.csv").read_text().splitlines() == [
        COLUMNS,
        "1,0.001,100,9,,",
        "2,0.001,6.25,9,0.123457,0.7",
        "3,0.001,1.23457,9,0.9,0.6",
    ]
    assert labels == ["train_map", "val_map", "best: 0.700 in epoch 2"]
    with Image.open(tmp_path / "run_charts.png") as picture:
        pixels = np.asarray(picture.convert("L"))
        assert picture.format == "PNG" and min(picture.size) > 300
    assert pixels.min() < 100 < pixels.max()  # something is drawn
    assert sorted(os.listdir(tmp_path)) == ["run_charts.png", "run_metrics.csv"]


def test_metrics_may_have_no_rows_one_row_or_other_columns_than_before(tmp_path, no_charts):
    utils.write_metrics(str(tmp_path / "run"), [])
    assert os.listdir(tmp_path) == []
    older = {"epoch": 1, "old": 1.0, "total": 2.0}  # of an earlier version
    utils.write_metrics(str(tmp_path / "run"), [older, {"epoch": 2, "total": 3.0, "new": 4.0}])
    assert (tmp_path / "run_metrics.csv").read_text().splitlines() == ["epoch,total,new", "1,2,", "2,3,4"]


@pytest.mark.parametrize("score", [None, math.nan])
def test_charts_are_drawn_after_one_epoch_without_a_score(score, tmp_path):
    utils.draw_charts([METRICS[0] | {"val_map": score}], tmp_path / "charts.png")
    assert Image.open(tmp_path / "charts.png").format == "PNG"


def test_metrics_that_cannot_be_written_are_reported_and_do_not_end_the_run(tmp_path, capsys):
    (tmp_path / "run_metrics.csv").mkdir()
    utils.write_metrics(str(tmp_path / "run"), METRICS)
    assert "run_metrics.csv" in capsys.readouterr().out


def test_the_line_of_an_epoch_has_its_measured_values_and_the_time_left(capsys):
    utils.print_epoch(METRICS[0], "5.0 min left")
    utils.print_epoch(METRICS[1], "")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "epoch 1  learning_rate 0.001  coord 100  images_per_second 9  5.0 min left"
    assert second.endswith("  train_map 0.1235  val_map 0.7")


# ---------------------------------------------------------------- drawing


def test_a_box_is_drawn_along_its_edges_in_the_colour_of_its_class():
    image = np.zeros((120, 100, 3), np.uint8)
    picture = utils.draw_boxes(image, torch.tensor([[20.0, 40.0, 80.0, 90.0]]), ["dog"], torch.tensor([3]))
    colour = utils.class_colour(3)
    assert picture.size == (100, 120) and not image.any()  # the input array is unchanged
    for x, y in ((20, 65), (80, 65), (50, 90), (50, 40), (20, 90), (80, 40)):
        assert picture.getpixel((x, y)) == colour, (x, y)
    for x, y in ((18, 65), (82, 65), (50, 92), (50, 65), (23, 65), (50, 87)):  # outside and inside
        assert picture.getpixel((x, y)) == (0, 0, 0), (x, y)


def test_the_label_is_above_its_box_or_inside_if_there_is_no_room():
    for top, labelled, plain in ((40, slice(26, 39), slice(45, 60)), (0, slice(3, 14), slice(25, 60))):
        pixels = np.asarray(utils.draw_boxes(np.zeros((120, 100, 3), np.uint8), [[20, top, 80, 90]], ["dog"], [3]))
        assert (pixels[labelled, 24:40] == utils.class_colour(3)).all(axis=2).any()
        assert not pixels[plain, 24:70].any()


def test_no_boxes_and_boxes_beyond_the_picture_or_without_extent_can_be_drawn():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(utils.draw_boxes(image, torch.empty(0, 4), [], [])), image)
    picture = utils.draw_boxes(image, [[-9, -9, 99, 99], [30, 20, 30.2, 20.2]], ["a", "b"], [0, 19])
    assert picture.getpixel((30, 20)) == utils.class_colour(19)


def test_every_class_has_a_distinct_bright_colour():
    colours = np.array([utils.class_colour(index) for index in range(20)])
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1000 * np.eye(20)
    assert distances.min() > 15 and colours.max(axis=1).min() > 200


# ---------------------------------------------------------------- detect.find_sources


IMAGES = ["a.PNG", "b.jpg", "d.jfif", "e.PPM", "f.jpe", "g.gif"]


@pytest.fixture
def folder(tmp_path):
    """photos/: images of every kind and a text file; photos/more/: one image."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name in (*IMAGES, "notes.txt", "more/c.jpeg"):
        (tmp_path / "photos" / name).write_bytes(b"")
    return tmp_path / "photos"


def test_a_file_a_folder_or_a_glob_gives_sorted_image_files(folder, capsys):
    def found(pattern):
        return [os.path.relpath(file, folder) for file in detect.find_sources(str(pattern))]

    assert found(folder / "b.jpg") == ["b.jpg"]
    assert found(folder) == IMAGES and "skipped 1 files " in (out := capsys.readouterr().out) and "notes.txt" in out
    assert found(folder / "*") == IMAGES
    assert found(folder / "*.jpg") == ["b.jpg"]
    assert found(folder / "**" / "*.jp*g") == ["b.jpg", "more/c.jpeg"]


def test_patterns_may_be_relative(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert detect.find_sources("b.jpg") == ["b.jpg"]
    assert detect.find_sources("*.jpg") == ["b.jpg"]
    assert detect.find_sources(".") == IMAGES
    monkeypatch.chdir(folder / "more")
    assert [os.path.basename(file) for file in detect.find_sources("../*.jpg")] == ["b.jpg"]


@pytest.mark.parametrize("name", ["nothing.jpg", "*.bmp", "*.txt", "empty"])
def test_a_pattern_without_images_is_an_error_that_names_it(folder, name):
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder / name}: ")):
        detect.find_sources(str(folder / name))


def test_samples_show_the_six_most_confident_detections_and_all_ground_truths(tmp_path):
    # drawn at twice and once their size
    images = [np.zeros((150, 200, 3), np.uint8), np.zeros((300, 100, 3), np.uint8)]
    rows = [[0, 1, 0.1 + 0.1 * place, 21, 41, 61, 81] for place in range(6)]
    detections = np.array([*rows, [0, 0, 0.05, 101, 41, 141, 81]])
    truths = np.array([[0, 1, 0, 11, 31, 71, 91], [1, 0, 1, 21, 21, 81, 81]])
    utils.draw_samples(images, ["cat", "dog"], detections, truths, tmp_path / "samples.jpg")
    with Image.open(tmp_path / "samples.jpg") as sheet:
        assert sheet.size == (1600, 300)
        pixels = np.asarray(sheet).astype(int)
    dog, cat = (np.array(utils.class_colour(index)) for index in (1, 0))
    assert np.abs(pixels[120, 40] - dog).max() < 60  # the left side of the detection, at x = 20, twice as large
    assert np.abs(pixels[120, 200] - cat).max() > 100  # the seventh detection is left out
    assert pixels[100, 20].min() > 150 and pixels[50, 420].min() > 150  # the left sides of the ground truths


def test_the_time_left_is_extrapolated_from_the_steps_done(monkeypatch):
    monkeypatch.setattr(utils.time, "monotonic", lambda: 1600.0)
    assert utils.time_left(1000.0, 10, 5) == "5.0 min left"  # 10 steps in 600 s
    assert utils.time_left(1000.0, 10, 65) == "1 h 05 min left"
    assert utils.time_left(1000.0, 10, 0) == ""


def test_the_progress_bar_shows_images_per_second_and_the_loss(monkeypatch):
    monkeypatch.setattr(utils.time, "monotonic", lambda: 20.0)
    bar = tqdm(total=4, file=(screen := io.StringIO()), mininterval=0)
    utils.advance(bar, 25, 10.0, torch.tensor(1.25))
    assert "25%" in (shown := screen.getvalue()) and "2.5 images/s, loss 1.25" in shown


def test_the_worked_examples_give_the_values_of_the_functions(capsys):
    utils.print_examples()
    out = capsys.readouterr().out
    assert "keeps a, c" in out
    assert [line.split(" = ")[-1] for line in out.splitlines()[-2:]] == [
        "0.5667; average_precision: 0.5667", "0.5636; average_precision: 0.5636"
    ]  # fmt: skip
