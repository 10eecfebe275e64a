"""The network against Darknet: its outputs, its weight files, and OpenCV's independent implementation of both.

Tests that use golden_file or need the real channel counts run at full width; the others use a narrow network.
"""

import re
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import darknet_model
import model as yolov2_model
import train
import utils
from darknet_model import (
    Darknet19,
    darknet_tensors,
    layer_table,
    load_darknet_weights,
    open_darknet_file,
    save_darknet_weights,
)
from dataset import encode_targets
from loss import YoloLoss
from model import (
    ANCHORS,
    COCO_ANCHORS,
    COCO_CLASSES,
    VOC_CLASSES,
    YOLOv2,
    darknet_cfg,
    fuse,
    load_detector,
    load_pretrained_backbone,
    read_detector,
    reorg,
)

GOLDEN = Path(__file__).parent / "golden"
YOLOV2_NUMBERS = 50_676_061

# (in, out, kernel size) of yolov2-voc.cfg's convolutions in order; the last one has no batch norm
CONVOLUTIONS = [
    (3, 32, 3), (32, 64, 3), (64, 128, 3), (128, 64, 1), (64, 128, 3), (128, 256, 3), (256, 128, 1), (128, 256, 3),
    (256, 512, 3), (512, 256, 1), (256, 512, 3), (512, 256, 1), (256, 512, 3), (512, 1024, 3), (1024, 512, 1),
    (512, 1024, 3), (1024, 512, 1), (512, 1024, 3), (1024, 1024, 3), (1024, 1024, 3), (512, 64, 1), (1280, 1024, 3),
    (1024, 125, 1),
]  # fmt: skip


def write_random_darknet_file(file, seed):
    """Writes the weights file of the golden output: 203 MB of random numbers, determined by the seed."""
    rng = np.random.default_rng(seed)
    with open(file, "wb") as stream:
        np.array([0, 2, 0], "<i4").tofile(stream)
        np.array([32013312], "<i8").tofile(stream)
        for place, (inputs, outputs, size) in enumerate(CONVOLUTIONS):
            last = place == len(CONVOLUTIONS) - 1
            arrays = [rng.normal(0, 0.1, outputs)]  # biases
            if not last:
                arrays += [rng.normal(1, 0.1, outputs), rng.normal(0, 0.1, outputs), rng.uniform(0.5, 1.5, outputs)]
            deviation = np.sqrt((0.1 if last else 2.0) / (inputs * size * size))
            arrays.append(rng.normal(0, deviation, (outputs, inputs, size, size)))
            for array in arrays:
                array.astype("<f4").tofile(stream)


def write_numbers(file, count, header=(0, 2, 0), seen=5, wide=True):
    """Writes a weights file: a header and `count` float32 numbers."""
    with open(file, "wb") as stream:
        np.array(header, "<i4").tofile(stream)
        np.array([seen], "<i8" if wide else "<i4").tofile(stream)
        np.random.default_rng(0).uniform(0.1, 1, count).astype("<f4").tofile(stream)


def randomise_batch_norm(model):
    """Replaces the initial values of every batch norm, so that a test fails if one of them is not copied."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)


@pytest.fixture(scope="module")
def golden_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "random.weights"
    write_random_darknet_file(file, seed=7)
    return file


@pytest.fixture(scope="module")
def golden_model(golden_file):
    model = YOLOv2().eval()
    assert load_darknet_weights(model, golden_file) == 23
    return model


def channels_first(outputs):
    """(N, A, S_h, S_w, 5+C) -> Darknet's (N, A*(5+C), S_h, S_w)."""
    return outputs.permute(0, 1, 4, 2, 3).flatten(1, 2).numpy()


def numbers_of(model):
    return torch.cat([tensor.detach().flatten() for tensors in darknet_tensors(model) for tensor in tensors])


def test_output_matches_darknet(golden_model):
    golden = np.load(GOLDEN / "network_128x128.npz")
    with torch.no_grad():
        outputs = channels_first(golden_model(torch.from_numpy(golden["image_rgb"])))
    assert np.abs(outputs - golden["raw_output"]).max() < 5e-4


def test_reorg_matches_darknet():
    golden = np.load(GOLDEN / "network_128x128.npz")
    assert np.array_equal(reorg(torch.from_numpy(golden["reorg_input"])).numpy(), golden["reorg_output"])


def test_opencv_computes_the_same_output_from_a_file_we_wrote(golden_model, tmp_path):
    save_darknet_weights(golden_model, tmp_path / "ours.weights", images_seen=77)
    (tmp_path / "yolov2.cfg").write_text(darknet_cfg(20, ANCHORS, 160).replace("height=160", "height=96"))
    network = cv2.dnn.readNetFromDarknet(str(tmp_path / "yolov2.cfg"), str(tmp_path / "ours.weights"))
    images = torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(1))
    network.setInput(images.numpy())
    theirs = network.forward("conv_30")  # the last convolution, before the region layer
    with torch.no_grad():
        ours = channels_first(golden_model(images))
    assert theirs.shape == ours.shape == (1, 125, 3, 5)
    assert np.abs(theirs - ours).max() < 1e-3


@pytest.fixture
def exported(narrow, tmp_path, monkeypatch):
    """A detector with own classes and anchors, the anchors, and the folder of all that model.py writes of it."""
    torch.manual_seed(10)  # with this seed, no confidence is within .005 of .6, and no IoU within .02 of .4
    detector, anchors = YOLOv2(num_classes=3, num_anchors=4).eval(), [[0.6, 0.9], [1.5, 2.5], [2.25, 1.0], [2.0, 2.8]]
    randomise_batch_norm(detector)
    # t_w and t_h, so that boxes are not much larger than the image
    detector.output.weight.data.view(4, 8, -1)[:, 2:4] *= 0.1
    state = {"classes": ["bolt", "nut", "Schraubenschlüssel"], "anchors": anchors, "image_size": 128}
    utils.save_checkpoint(tmp_path / "bolts.pt", model=detector.state_dict(), images_seen=640, **state)
    monkeypatch.setattr(yolov2_model, "CHECKPOINT", str(tmp_path / "bolts.pt"))
    monkeypatch.setattr(yolov2_model, "OUTPUT", str(tmp_path / "bolts.weights"))
    yolov2_model.main()
    return detector, anchors, tmp_path


def test_opencv_finds_the_same_boxes_with_the_exported_files(exported):
    detector, anchors, folder = exported
    network = cv2.dnn.readNetFromDarknet(str(folder / "bolts.cfg"), str(folder / "bolts.weights"))
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    network.setInput(images.numpy())
    raw, region = network.forward(["conv_30", "detection_out"])
    with torch.no_grad():
        predictions = detector(images)
    assert raw.shape == (1, 4 * 8, 4, 4)
    # OpenCV's batch norm has eps 1e-6, ours 1e-5
    np.testing.assert_allclose(raw, channels_first(predictions), atol=1e-3)

    # OpenCV's rows are boxes (cell, then anchor), its columns are x y w h, objectness and the confidence of each class
    boxes, objectness, probabilities = utils.decode_predictions(predictions, anchors)
    ours = torch.cat([boxes, objectness[..., None], objectness[..., None] * probabilities], dim=-1)[0]
    ours = ours.reshape(4, 16, 8).transpose(0, 1).reshape(64, 8).numpy()
    np.testing.assert_allclose(region[:, :5], ours[:, :5], atol=1e-4)
    # confidences up to the cfg's thresh and those that OpenCV's NMS (IoU .4) suppresses are zero
    detections = utils.postprocess(predictions, anchors, 0.6, 0.4)[0]
    kept = region[:, 5:] > 0
    assert 5 < kept.sum() == len(detections) < (ours[:, 5:] > 0.6).sum()
    np.testing.assert_allclose(region[:, 5:][kept], ours[:, 5:][kept], atol=1e-4)
    np.testing.assert_allclose(np.sort(region[:, 5:][kept])[::-1], detections[:, 4], atol=1e-4)


def test_exported_files_hold_the_images_seen_the_size_the_anchors_and_the_names(exported, monkeypatch):
    detector, anchors, folder = exported
    numbers, images_seen = open_darknet_file(folder / "bolts.weights")
    assert images_seen == 640 and np.array_equal(numbers, numbers_of(detector).numpy())
    assert (folder / "bolts.names").read_text(encoding="utf-8") == "bolt\nnut\nSchraubenschlüssel\n"
    cfg = (folder / "bolts.cfg").read_text()
    assert "width=128\nheight=128\n" in cfg and "classes=3\n" in cfg and "num=4\n" in cfg and "filters=32\n" in cfg
    assert "anchors=0.6, 0.9, 1.5, 2.5, 2.25, 1.0, 2.0, 2.8\n" in cfg
    assert sorted(file.name for file in folder.iterdir()) == ["bolts.cfg", "bolts.names", "bolts.pt", "bolts.weights"]

    monkeypatch.setattr(yolov2_model, "IMAGE_SIZE", 160)
    with pytest.raises(ValueError, match=r"bolts\.cfg"):  # a user may have edited it
        yolov2_model.main()
    assert (folder / "bolts.cfg").read_text() == cfg
    (folder / "bolts.cfg").unlink()
    yolov2_model.main()
    assert (folder / "bolts.cfg").read_text() == cfg.replace("=128\nheight=128\n", "=160\nheight=160\n")


def test_opencv_finds_the_same_boxes_with_the_weights_of_80_classes(tmp_path):
    """A file of the size and header of COCO's yolov2.weights, with random numbers, read without CLASSES and ANCHORS."""
    torch.manual_seed(2)
    donor = YOLOv2(num_classes=80).eval()
    randomise_batch_norm(donor)
    # t_w and t_h, so that boxes are not much larger than the image
    donor.output.weight.data.view(5, 85, -1)[:, 2:4] *= 0.1
    save_darknet_weights(donor, tmp_path / "new.weights")
    content = (tmp_path / "new.weights").read_bytes()
    # header 0.1
    (tmp_path / "yolov2.weights").write_bytes(np.array([0, 1, 0, 32_013_312], "<i4").tobytes() + content[20:])
    assert (tmp_path / "yolov2.weights").stat().st_size == 203_934_260
    detector, classes, anchors, size = load_detector(tmp_path / "yolov2.weights", [], [], torch.device("cpu"), "fp32")
    assert (classes, size) == (list(COCO_CLASSES), 608)

    (tmp_path / "yolov2.cfg").write_text(darknet_cfg(80, COCO_ANCHORS, 96).replace("thresh=.6", "thresh=.0001"))
    network = cv2.dnn.readNetFromDarknet(str(tmp_path / "yolov2.cfg"), str(tmp_path / "yolov2.weights"))
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    network.setInput(images.numpy())
    raw, region = network.forward(["conv_30", "detection_out"])
    with torch.no_grad():
        predictions = detector(images)
    assert raw.shape == (1, 425, 3, 3)
    # OpenCV's batch norm has eps 1e-6
    np.testing.assert_allclose(raw, channels_first(predictions), atol=0.01 * np.abs(raw).max())
    boxes, objectness, _ = utils.decode_predictions(predictions, anchors)
    ours = torch.cat([boxes, objectness[..., None]], dim=-1)[0].reshape(5, 9, 5).transpose(0, 1).reshape(45, 5)
    np.testing.assert_allclose(region[:, :5], ours, atol=5e-3)
    found = utils.postprocess(predictions, anchors, 0.0001, 0.4)[0]
    assert len(found) and len(found) == pytest.approx((region[:, 5:] > 0).sum(), rel=0.02)


def test_the_cfg_has_the_layers_of_yolov2_voc():
    sections = darknet_cfg(20, ANCHORS, 416).split("\n\n")
    kinds = [section.split("\n")[0] for section in sections]
    assert kinds[0] == "[net]" and kinds[26:] == [
        "[route]", "[convolutional]", "[reorg]", "[route]", "[convolutional]", "[convolutional]", "[region]"
    ]  # fmt: skip
    assert kinds.count("[convolutional]") == 23 and kinds.count("[maxpool]") == 5
    filters = re.findall(r"\bfilters=(\d+)", "\n".join(sections))
    assert filters == [str(outputs) for _, outputs, _ in CONVOLUTIONS]
    anchors = "1.3221, 1.73145, 3.19275, 4.00944, 5.05587, 8.09892, 9.47112, 4.84053, 11.2364, 10.0071"
    assert f"anchors={anchors}\n" in sections[-1]


def test_a_classifier_is_exported_as_a_darknet_file_or_as_its_backbone(narrow, tmp_path, monkeypatch):
    classifier = Darknet19(num_classes=3)
    randomise_batch_norm(classifier)
    utils.save_checkpoint(tmp_path / "run.pt", model=classifier.state_dict(), images_seen=99)
    monkeypatch.setattr(darknet_model, "CHECKPOINT", str(tmp_path / "run.pt"))
    for name, part in (("run.weights", classifier), ("run.conv.23", classifier.features)):
        monkeypatch.setattr(darknet_model, "OUTPUT", str(tmp_path / name))
        darknet_model.main()
        numbers, images_seen = open_darknet_file(tmp_path / name)
        assert images_seen == 99 and np.array_equal(numbers, numbers_of(part).numpy())


# ---------------------------------------------------------------- table of layers


def rows_of(table):
    """The lines of a table of layers, cut at runs of two or more spaces."""
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]


def test_the_layers_of_darknet19_are_those_of_table_6():
    heading, *rows, total = rows_of(layer_table(Darknet19(), 224))
    assert heading == ["layer", "type", "kernel", "output", "parameters", "GFLOP"]
    assert [row[0] for row in rows] == [str(number) for number in range(1, 25)]
    # 2 * 3 * 3 * 3 * 32 * 224 * 224 = 86,704,128 operations; 3 * 3 * 3 * 32 kernel numbers and 2 * 32 of batch norm
    assert rows[0][2:] == ["convolution", "3x3", "32 x 224 x 224", "928", "0.087"]
    assert rows[1][2:] == ["max-pool", "2x2 / 2", "32 x 112 x 112", "0", "0.000"]
    assert rows[-1][1:] == ["classifier", "convolution", "1x1", "1000 x 7 x 7", "1,025,000", "0.100"]
    assert total[-1] == "5.582"  # "5.58 billion operations" in the paper


def test_kernels_and_output_sizes_are_those_of_table_6():
    table_6 = [
        "32 3x3 224", "32 max 112", "64 3x3 112", "64 max 56", "128 3x3 56", "64 1x1 56", "128 3x3 56", "128 max 28",
        "256 3x3 28", "128 1x1 28", "256 3x3 28", "256 max 14", "512 3x3 14", "256 1x1 14", "512 3x3 14", "256 1x1 14",
        "512 3x3 14", "512 max 7", "1024 3x3 7", "512 1x1 7", "1024 3x3 7", "512 1x1 7", "1024 3x3 7", "1000 1x1 7",
    ]  # fmt: skip
    _, *rows, _ = rows_of(layer_table(Darknet19(), 224))
    found = []
    for _, _, kind, kernel, output, *_ in rows:
        channels, height, width = output.split(" x ")
        assert height == width
        found.append(f"{channels} {'max' if kind == 'max-pool' else kernel} {width}")
    assert found == table_6


def test_the_operations_of_yolov2_are_those_that_darknet_prints():
    model = YOLOv2()
    *rows, total = rows_of(layer_table(model, 416))[1:]
    assert [row[1] for row in rows if row[2] == "convolution"][18:] == [
        "head.0",
        "head.1",
        "passthrough",
        "merge",
        "output",
    ]
    assert total == ["total", f"{sum(parameter.numel() for parameter in model.parameters()):,}", "29.360"]
    pools = [np.prod([int(side) for side in row[4].split(" x ")]) for row in rows if row[2] == "max-pool"]
    # which counts 2 x 2 operations per output of a pool
    assert 29.360 + 4 * sum(pools) / 1e9 == pytest.approx(29.371, abs=6e-4)
    # without the convolution in the passthrough, as in an earlier cfg: the 34.90 of the YOLOv2 page
    # merge takes 2048 instead of 256 channels of the passthrough
    wider = 2 * 9 * (4 * 512 - 4 * 64) * 1024 * 13 * 13 / 1e9
    assert rows[25][-1] == "0.044" and 29.360 - 0.044 + wider == pytest.approx(34.90, abs=5e-3)
    assert model.training and not model.output._forward_hooks and next(model.parameters()).device.type == "cpu"


# ---------------------------------------------------------------- ONNX


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_onnxruntime_computes_the_same_output_from_an_exported_model(exported):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    detector, _, folder = exported
    model, checkpoint = read_detector(folder / "bolts.pt")
    size = checkpoint["image_size"]
    torch.onnx.export(fuse(model), torch.zeros(1, 3, size, size), folder / "bolts.onnx", dynamo=False)
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(folder / "bolts.onnx")
    (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = detector(images).numpy()
    assert outputs.shape == expected.shape == (1, 4, 4, 4, 8)
    np.testing.assert_allclose(outputs, expected, atol=1e-4)


def test_saving_and_loading_is_bit_identical(golden_file, golden_model, tmp_path):
    save_darknet_weights(golden_model, tmp_path / "again.weights", images_seen=32013312)
    assert (tmp_path / "again.weights").read_bytes() == golden_file.read_bytes()


def test_a_yolov2_file_has_50676061_numbers(golden_file):
    assert golden_file.stat().st_size == 20 + 4 * YOLOV2_NUMBERS
    assert numbers_of(YOLOv2()).numel() == YOLOV2_NUMBERS


def test_a_fused_model_has_the_same_output_and_the_original_is_unchanged(golden_model):
    before = numbers_of(golden_model).clone()
    fused = fuse(golden_model)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = golden_model(images), fused(images)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    assert torch.equal(numbers_of(golden_model), before)


def test_a_fused_model_cannot_be_saved(narrow, tmp_path):
    with pytest.raises(ValueError, match="fused"):
        save_darknet_weights(fuse(Darknet19(num_classes=2)), tmp_path / "fused.weights")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", [(0, 2, 5), (1, 0, 0)])
def test_both_header_versions_are_read(version, narrow, tmp_path):
    old, new = Darknet19(num_classes=2), Darknet19(num_classes=2)
    count = numbers_of(old).numel()
    write_numbers(tmp_path / "v1", count, header=(0, 1, 0), wide=False)  # 16 bytes: 32-bit image count
    write_numbers(tmp_path / "v2", count, header=version, wide=True)  # 20 bytes: 64-bit image count
    assert load_darknet_weights(old, tmp_path / "v1") == load_darknet_weights(new, tmp_path / "v2") == 19
    assert torch.equal(numbers_of(old), numbers_of(new))


def test_darknet19_round_trip(narrow, tmp_path):
    one, other = Darknet19(num_classes=3), Darknet19(num_classes=3)
    randomise_batch_norm(one)
    save_darknet_weights(one, tmp_path / "one.weights")
    assert load_darknet_weights(other, tmp_path / "one.weights") == 19
    assert torch.equal(numbers_of(one), numbers_of(other))


def test_a_backbone_only_file_loads_the_first_convolutions_and_prints_how_many(narrow, tmp_path, capsys):
    backbone = Darknet19(num_classes=2)
    save_darknet_weights(torch.nn.Sequential(backbone.features), tmp_path / "darknet19_448.conv.23", images_seen=12)
    model = YOLOv2(num_classes=3)
    head = model.head.state_dict()["0.0.weight"].clone()
    assert load_darknet_weights(model, tmp_path / "darknet19_448.conv.23") == 18
    assert "18 of 23 convolutions" in capsys.readouterr().out
    assert torch.equal(numbers_of(model.features), numbers_of(backbone.features))
    assert torch.equal(model.head.state_dict()["0.0.weight"], head)


@pytest.mark.parametrize("change", ["short", "long", "empty", "header", "bare", "half", "text"])
def test_a_malformed_weights_file_is_named_and_the_model_is_unchanged(narrow, tmp_path, change):
    model = Darknet19(num_classes=2)
    before, file = numbers_of(model).clone(), tmp_path / "wrong.weights"
    if change == "empty":
        file.touch()
    elif change == "header":
        write_numbers(file, before.numel(), header=(1, 1000, 0))  # a version that no Darknet has written
    elif change == "bare":
        write_numbers(file, 0)
    elif change == "text":
        file.write_text("this is not a weights file, but it is longer than a header\n" * 3)
    else:
        write_numbers(file, {"short": before.numel() - 1, "long": before.numel() + 1, "half": 1000}[change])
    with pytest.raises(ValueError, match="wrong.weights"):
        load_darknet_weights(model, file)
    assert torch.equal(numbers_of(model), before)


def test_a_weights_file_that_ends_in_its_header_or_within_a_number_is_named(narrow, tmp_path):
    file = tmp_path / "cut.weights"
    save_darknet_weights(Darknet19(num_classes=2), file)
    content = file.read_bytes()
    for damaged in (content[:8], content[:19], content[:-1], content[:-2], content + b"\0", content + b"\0\0\0"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="cut.weights"):
            open_darknet_file(file)


def test_a_missing_file_or_one_of_another_network_is_refused(golden_file, tmp_path):
    with pytest.raises(ValueError, match="random.weights.*another"):
        load_darknet_weights(Darknet19(num_classes=1000), golden_file)
    with pytest.raises(ValueError, match="random.weights.*classes"):
        load_darknet_weights(YOLOv2(num_classes=3), golden_file)
    with pytest.raises(FileNotFoundError, match="nothing.weights"):
        load_darknet_weights(YOLOv2(), tmp_path / "nothing.weights")


@pytest.mark.parametrize("source", ["darknet19.weights", "conv.23", "yolov2-voc.weights", "darknet.pt", "yolov2.pt"])
def test_what_fits_is_loaded_from_every_kind_of_file(narrow, tmp_path, source):
    """From a detector of other classes all but the last convolution, otherwise the backbone."""
    file, classifier, detector = tmp_path / source, Darknet19(num_classes=7), YOLOv2(num_classes=20)
    donor = detector if source.startswith("yolov2") else classifier
    randomise_batch_norm(donor)
    if source.endswith(".pt"):
        utils.save_checkpoint(file, model=donor.state_dict())
    else:
        save_darknet_weights(torch.nn.Sequential(donor.features) if source == "conv.23" else donor, file)
    model = YOLOv2(num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = ("output.",) if donor is detector else ("head.", "passthrough.", "merge.", "output.")
    assert load_pretrained_backbone(model, file) == (22 if donor is detector else 18)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith(kept) else donor.state_dict()[name]), name


def test_files_of_other_networks_are_refused_and_the_published_ones_named(narrow, tmp_path):
    model, file = YOLOv2(num_classes=2), tmp_path / "other.weights"
    before = numbers_of(model).clone()
    backbone, detector = numbers_of(model.features).numel(), numbers_of(model).numel()
    for count in (backbone - 1, backbone + 1, detector - 1, detector + 1):
        write_numbers(file, count)
        with pytest.raises(ValueError, match="other.weights: .*OpenCV"):
            load_pretrained_backbone(model, file)
    with open(file, "r+b") as stream:
        stream.truncate(44_948_600)
    for load in (load_pretrained_backbone, load_darknet_weights):
        with pytest.raises(ValueError, match="other.weights: is yolov2-tiny, .*OpenCV"):
            load(model, file)
    assert torch.equal(numbers_of(model), before)


def test_a_detector_of_the_same_classes_is_loaded_completely(narrow, tmp_path):
    donor, model = YOLOv2(), YOLOv2()
    randomise_batch_norm(donor)
    save_darknet_weights(donor, tmp_path / "yolov2-voc.weights")
    assert load_pretrained_backbone(model, tmp_path / "yolov2-voc.weights") == 23
    assert torch.equal(numbers_of(model), numbers_of(donor))


def test_a_checkpoint_without_a_backbone_is_refused(narrow, tmp_path):
    utils.save_checkpoint(tmp_path / "foreign.pt", model={"weight": torch.zeros(3)})
    utils.save_checkpoint(tmp_path / "other.pt", weights=torch.zeros(3))
    for name in ("foreign.pt", "other.pt"):
        with pytest.raises(ValueError, match=name):
            load_pretrained_backbone(YOLOv2(), tmp_path / name)


def test_a_detector_is_built_from_a_darknet_file_or_a_checkpoint(narrow, tmp_path, capsys):
    donor = YOLOv2().eval()
    randomise_batch_norm(donor)
    classes = [f"class {number}" for number in range(20)]
    save_darknet_weights(donor, tmp_path / "ours.weights")
    state = {"classes": classes, "anchors": ANCHORS, "image_size": 96}
    utils.save_checkpoint(tmp_path / "ours.pt", model=donor.state_dict(), **state)
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(3))
    for file, size in (("ours.weights", 416), ("ours.pt", 96)):
        model, names, anchors, image_size = load_detector(tmp_path / file, classes, [], torch.device("cpu"), "fp32")
        assert (names, image_size) == (classes, size) and np.allclose(anchors, ANCHORS)
        assert ("416 px" in capsys.readouterr().out) == (size == 416)  # a Darknet file does not tell its size
        with torch.no_grad():
            assert torch.allclose(model(images), donor(images), atol=1e-4)


def test_a_backbone_or_a_foreign_checkpoint_is_not_a_detector(narrow, tmp_path):
    save_darknet_weights(torch.nn.Sequential(YOLOv2().features), tmp_path / "backbone.conv.23")
    utils.save_checkpoint(tmp_path / "foreign.pt", model={}, epoch=3)
    state = {"classes": ["a"], "anchors": ANCHORS, "image_size": 96}
    utils.save_checkpoint(tmp_path / "odd.pt", model={"a": torch.zeros(1)}, **state)
    for name in ("backbone.conv.23", "foreign.pt", "odd.pt"):
        with pytest.raises(ValueError, match=name):
            load_detector(tmp_path / name, [], [], torch.device("cpu"))


def load_darknet(file, classes=(), anchors=()):
    _, *rest = load_detector(file, classes, anchors, torch.device("cpu"), "fp32")
    return rest


def test_a_darknet_file_of_own_classes_needs_classes_and_anchors(narrow, tmp_path):
    file, anchors = tmp_path / "bolts.weights", [(1.0, 2.0), (3.0, 1.0), (2.0, 2.0), (4.0, 5.0), (9.0, 9.0)]
    donor = YOLOv2(3)
    save_darknet_weights(donor, file)
    (tmp_path / "bolts.names").write_text("bolt\nnut\nsmall screw\n")
    fits = r"bolts\.weights: .*40 outputs.* {} anchors .* {} classes.*CLASSES and ANCHORS"
    wrong = {(0, 0): (), (5, 0): ([], anchors), (0, 3): (["a", "b", "c"],), (5, 2): (["a", "b"], anchors)}
    for counts, arguments in wrong.items():
        with pytest.raises(ValueError, match=fits.format(*counts)):
            load_darknet(file, *arguments)
    names, own_anchors, size = load_darknet(file, str(tmp_path / "bolts.names"), anchors)
    assert (names, size) == (["bolt", "nut", "small screw"], 416) and np.allclose(own_anchors, anchors)
    (tmp_path / "bolts.cfg").write_text(darknet_cfg(3, anchors, 416))
    files = (str(tmp_path / "bolts.names"), str(tmp_path / "bolts.cfg"))
    assert yolov2_model.darknet_detector(file, *files) == (names, own_anchors, 416)
    assert load_pretrained_backbone(YOLOv2(2), file) == 22
    (tmp_path / "bolts.cfg").write_text("[yolo]\nanchors = 10,13, 16,30\n")
    with pytest.raises(ValueError, match=r"bolts\.cfg: .*\[region\]"):
        yolov2_model.darknet_detector(file, *files)


@pytest.mark.parametrize(
    ("count", "names", "anchors", "size"),
    [(20, VOC_CLASSES, ANCHORS, 416), (80, COCO_CLASSES, COCO_ANCHORS, 608)],
    ids=["VOC", "COCO"],
)
def test_the_published_detectors_are_known_by_their_size(count, names, anchors, size, narrow, tmp_path):
    save_darknet_weights(YOLOv2(count), tmp_path / "known.weights")
    found, own_anchors, own_size = load_darknet(tmp_path / "known.weights")
    assert (found, own_size) == (list(names), size) and np.allclose(own_anchors, anchors)
    others = [f"class {number}" for number in range(count)]
    assert load_darknet(tmp_path / "known.weights", others)[0] == others  # another network with as many classes
    assert load_pretrained_backbone(YOLOv2(count), tmp_path / "known.weights", list(names)) == 23
    assert load_pretrained_backbone(YOLOv2(count), tmp_path / "known.weights", others) == 22


def test_the_published_sizes_are_those_of_the_full_network():
    assert len(set(COCO_CLASSES)) == 80 and (COCO_CLASSES[0], COCO_CLASSES[79]) == ("person", "toothbrush")
    with torch.device("meta"):
        numbers = [numbers_of(YOLOv2(count)).numel() for count in (20, 80)]
    # bytes of COCO's yolov2.weights
    assert numbers == [YOLOV2_NUMBERS, 50_983_561] and 4 * numbers[1] + 16 == 203_934_260


def test_a_file_of_the_size_of_darknet19_448_weights_starts_a_detector(tmp_path):
    """With 1000 classes, header 0.1 and random numbers; the first 18 convolutions are the backbone."""
    file = tmp_path / "darknet19_448.weights"
    write_numbers(file, 20_856_776, header=(0, 1, 0), wide=False)
    assert file.stat().st_size == 83_427_120
    model = YOLOv2()
    assert load_pretrained_backbone(model, file, list(yolov2_model.VOC_CLASSES)) == 18
    backbone = torch.from_numpy(np.fromfile(file, "<f4", 19_831_776, offset=16))
    assert torch.equal(numbers_of(model.features), backbone)
    assert load_darknet_weights(Darknet19(), file) == 19


def test_a_checkpoint_refuses_other_classes_and_anchors_than_its_own(narrow, tmp_path):
    state = {"model": YOLOv2(2).state_dict(), "classes": ["a", "b"], "anchors": ANCHORS, "image_size": 96}
    utils.save_checkpoint(tmp_path / "own.pt", **state)
    assert load_darknet(tmp_path / "own.pt", ["a", "b"], ANCHORS)[0] == ["a", "b"]
    with pytest.raises(ValueError, match=r"own\.pt: has other classes than CLASSES"):
        load_darknet(tmp_path / "own.pt", ["b", "a"])
    with pytest.raises(ValueError, match=r"own\.pt: has other anchors than ANCHORS"):
        load_darknet(tmp_path / "own.pt", [], COCO_ANCHORS)


def test_kernels_are_initialised_as_in_darknet():
    torch.manual_seed(0)
    for module in YOLOv2().modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 50_000:
            fan_in = module.in_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)  # N(0, 2 / (k^2 c_in))
            assert abs(module.weight.mean().item()) < 0.01 * (2 / fan_in) ** 0.5 + 1e-4
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.momentum, module.eps) == (0.01, 1e-5)


def test_output_shapes_and_refusal_of_sizes_that_are_not_multiples_of_32():
    model = YOLOv2(num_classes=3, num_anchors=2).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 96)).shape == (2, 2, 2, 3, 8)
        assert Darknet19(num_classes=4).eval()(torch.zeros(2, 3, 64, 96)).shape == (2, 4)
        assert Darknet19().features(torch.zeros(1, 3, 64, 96)).shape == (1, 1024, 2, 3)
    with pytest.raises(ValueError, match="multiples of 32"):
        model(torch.zeros(1, 3, 65, 96))


def test_the_grid_is_13_x_13_at_416_px_and_one_network_takes_every_size_of_multi_scale_training():
    with torch.device("meta"):  # shapes only
        model = YOLOv2()
        shapes = {size: tuple(model(torch.empty(1, 3, size, size)).shape) for size in range(320, 609, 32)}
    assert len(shapes) == 10
    assert shapes == {size: (1, 5, size // 32, size // 32, 25) for size in shapes}
    assert shapes[416] == (1, 5, 13, 13, 25)  # an odd number of cells: one of them is in the middle


def test_the_logits_are_the_mean_of_the_maps_of_the_last_convolution(narrow):
    model, maps = Darknet19(num_classes=3).eval(), []
    model.classifier.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        logits = model(torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(5)))
    assert maps[0].shape == (2, 3, 2, 3)
    torch.testing.assert_close(logits, maps[0].reshape(2, 3, 6).sum(dim=2) / 6)


def test_a_batch_gives_the_outputs_of_its_images_one_by_one(golden_model):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        together = golden_model(images)
        apart = torch.cat([golden_model(image[None]) for image in images])
    assert torch.allclose(together, apart, atol=1e-4)


# ---------------------------------------------------------------- training compared with Darknet


def trajectory_inputs(seed=11, count=80, size=96, classes=20):
    """The images (80, 3, 96, 96) in 0..1 with which Darknet was trained for the golden trajectory, and the truths
    (80, 30, 5): x y w h class in fractions, rows of zeros after the last object. Every object has a cell of its own."""
    rng = np.random.default_rng(seed)
    images = rng.random((count, 3, size, size), dtype=np.float32)
    truths = np.zeros((count, 30, 5), np.float32)
    cells = size // 32
    for image in range(count):
        objects = int(rng.integers(1, 4))
        for place, cell in enumerate(rng.permutation(cells * cells)[:objects]):
            x = (cell % cells + rng.uniform(0.05, 0.95)) / cells
            y = (cell // cells + rng.uniform(0.05, 0.95)) / cells
            w, h = rng.uniform(0.1, 0.9, 2)
            truths[image, place] = x, y, w, h, rng.integers(classes)
    return images, truths


class TrajectorySet(Dataset):
    """The first 20 images of the golden trajectory: five batches of four."""

    classes, samples = VOC_CLASSES, [(f"{index}.jpg", "") for index in range(20)]

    def __init__(self):
        self.images, self.truths = trajectory_inputs()

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        truths = self.truths[index][self.truths[index][:, 2] > 0]
        return torch.from_numpy(self.images[index]), encode_targets(truths[:, :4], truths[:, 4], ANCHORS, 3, 3)


def cost_of(predictions, gradient):
    """Darknet's cost: the sum of the squared derivatives of the loss with respect to the activated outputs."""
    derivative = gradient.double()
    activated = torch.sigmoid(predictions[..., [0, 1, 4]].double())
    derivative[..., [0, 1, 4]] /= activated * (1 - activated)
    return (derivative**2).sum().item()


@pytest.fixture(scope="module")
def trajectory(golden_file, tmp_path_factory):
    """Five optimiser steps of train.main() -> per step the movement of each tensor since the start, and the cost per
    sub-batch. Darknet (a CPU copy that computes what its GPU version does) had random weights, batches of 4 in 2
    sub-batches, learning rate 2e-5, burn-in 5, momentum .9 and weight decay 1."""
    model = YOLOv2()
    load_darknet_weights(model, golden_file)
    start = [tensor.detach().clone() for tensors in darknet_tensors(model) for tensor in tensors]
    rng = np.random.default_rng(2026)
    places = [torch.from_numpy(rng.choice(tensor.numel(), min(64, tensor.numel()), replace=False)) for tensor in start]
    steps, costs = [], []

    class CostLoss(YoloLoss):
        def forward(self, predictions, targets, images_seen):
            # the derivative of total / SUBDIVISIONS is that of the sum over the images divided by 4
            predictions.register_hook(lambda gradient: costs.append(cost_of(predictions.detach(), 4 * gradient)))
            return super().forward(predictions, targets, images_seen)

    def record(stop):  # called after each step
        tensors = [tensor.detach() for tensors in darknet_tensors(model) for tensor in tensors]
        moved = [tensor - before for tensor, before in zip(tensors, start, strict=True)]
        sampled = [movement.flatten()[place].numpy() for movement, place in zip(moved, places, strict=True)]
        steps.append(([movement.norm().item() for movement in moved], sampled))
        return False

    def batches(*arguments, repeat):
        return iter([[2 * part, 2 * part + 1] for part in range(10)])

    settings = {
        "OPTIMIZER": "sgd", "BATCH_SIZE": 4, "SUBDIVISIONS": 2, "LEARNING_RATE": 2e-5, "BURN_IN": 5, "MOMENTUM": 0.9,
        "WEIGHT_DECAY": 1.0, "CLIP_NORM": 0.0, "LR_SCHEDULE": "constant", "EPOCHS": 1, "REPEAT": 1, "IMAGE_SIZE": 96,
        "NUM_WORKERS": 0, "PRECISION": "fp32", "DEVICE": "cpu",
        "CHECKPOINT": str(tmp_path_factory.mktemp("trajectory") / "run.pt"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(train, name, value)
        patch.setattr(train.yolov2_model, "YOLOv2", lambda classes, anchors: model)
        patch.setattr(train, "read_data_sets", lambda anchors, broken_list: (TrajectorySet(), {}))
        patch.setattr(train.dataset, "training_batches", batches)
        patch.setattr(train, "YoloLoss", CostLoss)
        patch.setattr(utils, "should_stop", record)
        patch.setattr(utils, "warm_batch_norm", lambda model, batches_seen: None)
        patch.setattr(utils, "save_checkpoint", lambda file, **state: None)
        patch.setattr(utils, "write_metrics", lambda stem, rows: None)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        train.main()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return steps, costs


def test_learning_rates_match_darknet():
    rates = np.load(GOLDEN / "trajectory.npz")["rate_after"][1::2]  # of updates 1 to 10; burn-in 5
    ours = [utils.learning_rate_at(step, 10, 2e-5, "steps", burn_in=5, drops=(12, 16)) for step in range(10)]
    assert ours == pytest.approx(rates.tolist(), rel=1e-6)


def test_the_costs_of_five_steps_match_darknet(trajectory):
    costs, golden = trajectory[1], np.load(GOLDEN / "trajectory.npz")["cost"][:10].tolist()
    print("largest difference of the costs:", np.abs(np.array(costs) / golden - 1).max())  # pytest -s shows it
    assert costs == pytest.approx(golden, rel=1e-3)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_weights_and_statistics_move_as_in_darknet(step, trajectory):
    golden = np.load(GOLDEN / "trajectory.npz")
    column = golden["steps"].tolist().index(step)
    norms, sampled = trajectory[0][step - 1]
    # 2e-8: the first step moves most weights by no more than the rounding of float32
    assert norms == pytest.approx(golden["movement_norm"][:, column].tolist(), rel=0.01, abs=2e-8)
    kinds = ["bias", "scale", "mean", "variance", "kernel"] * 22 + ["bias", "kernel"]
    for kind, limit in (("kernel", 0.05), ("bias", 0.05), ("scale", 0.05), ("mean", 1e-4), ("variance", 1e-4)):
        places = [place for place, other in enumerate(kinds) if other == kind]
        ours = np.concatenate([sampled[place] for place in places])
        darknets = np.concatenate([golden["movement"][place, column, : len(sampled[place])] for place in places])
        difference, moved = np.sqrt(np.mean((ours - darknets) ** 2)), np.sqrt(np.mean(darknets**2))
        print(f"step {step}, {kind}: {difference / moved:.1g}")  # pytest -s shows the table of tests/MEASUREMENTS.md
        assert difference < limit * moved + 1e-9, kind  # 1e-9: rounding, as above
