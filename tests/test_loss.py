"""The loss against Darknet's region layer, against examples worked by hand, and in corner cases."""

import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import encode_targets
from loss import YoloLoss
from model import ANCHORS

TESTS = Path(__file__).resolve().parent
TERMS = ("coord", "object", "no_object", "class", "prior")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are slower on several threads, and ten times slower if the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def region_loss(**settings):
    """The defaults are the constants of yolov2-voc.cfg."""
    return YoloLoss(ANCHORS, **settings)


@pytest.mark.parametrize("file", sorted((TESTS / "golden").glob("region_*.npz")), ids=lambda file: file.stem)
def test_gradient_equals_darknets(file):
    golden = np.load(file)
    raw = torch.from_numpy(golden["raw"]).permute(0, 1, 3, 4, 2).contiguous().requires_grad_()  # (N, A, S, S, 25)
    size, targets = raw.shape[2], []
    for truths in golden["truths"]:
        truths = truths[truths[:, 2] > 0]  # drop the rows of zeros after the last object
        targets.append(encode_targets(truths[:, :4], truths[:, 4], ANCHORS, size, size))
    terms = region_loss()(raw, torch.stack(targets), images_seen=int(golden["seen"]))
    (terms["total"] * len(raw)).backward()  # Darknet's gradient is that of the sum over the batch
    gradient = raw.grad.permute(0, 1, 4, 2, 3).numpy()
    assert np.abs(gradient - golden["gradient_sum"]).max() < 1e-5
    assert (terms["prior"] > 0) == (golden["seen"] + len(golden["raw"]) < 12800)


def one_object():
    """A 2 x 2 grid, two anchors, two classes, one object in row 0, column 1 of anchor 0; other raw
    outputs are 0, except t_o."""
    predictions = torch.zeros(1, 2, 2, 2, 7, dtype=torch.float64)
    predictions[..., 4] = -math.log(3)  # sigma = 1/4 everywhere
    predictions[0, 0, 0, 1] = torch.tensor([0, 0, math.log(1.44), 0, math.log(3), 0, math.log(3)], dtype=torch.float64)
    targets = torch.zeros(1, 2, 2, 2, 6, dtype=torch.float64)
    targets[0, 0, 0, 1] = torch.tensor([1, 0.5, 0.25, 1, 1, 0], dtype=torch.float64)
    return predictions, targets, [(1.0, 1.0), (0.5, 0.5)]


def test_yolov1_equation_by_hand():
    predictions, targets, anchors = one_object()
    terms = YoloLoss(anchors, 5, 1, 0.5, 1, equation="yolov1")(predictions, targets, images_seen=0)
    # box:    centre (1 + sigma(0), 0 + sigma(0)) = (1.5, .5), b_w = 1 * 1.44, b_h = 1 * 1
    # object: centre (1.5, .25), 1 wide, 1 high
    # coord:  5 * [(.5 - .5)^2 + (.5 - .25)^2 + (sqrt 1.44 - sqrt 1)^2 + (1 - 1)^2] = 5 * (.0625 + .04)
    assert terms["coord"].item() == pytest.approx(5 * (0.0625 + 0.04))
    # IoU:    x 1.0..2.0 of .78..2.22 is 1 wide; y 0..1 and -.25..0.75 share .75; .75 / (1.44 + 1 - .75)
    # object: 1 * (sigma(ln 3) - IoU)^2 = (.75 - .75 / 1.69)^2
    assert terms["object"].item() == pytest.approx((0.75 - 0.75 / 1.69) ** 2)
    # no_object: .5 * 7 slots * .25^2
    assert terms["no_object"].item() == pytest.approx(0.5 * 7 * 0.0625)
    # class:  softmax(0, ln 3) = (1/4, 3/4), the object is of class 0: (1/4 - 1)^2 + (3/4)^2
    assert terms["class"].item() == pytest.approx(0.75**2 + 0.75**2)
    assert terms["prior"].item() == 0
    assert terms["total"].item() == pytest.approx(sum(terms[name].item() for name in TERMS))


def test_darknet_equation_by_hand():
    predictions, targets, anchors = one_object()
    terms = YoloLoss(anchors, 1, 5, 1, 1, equation="darknet")(predictions, targets, images_seen=0)
    # the object covers 1 of 4 cells: weight 2 - .25; t_w = ln 1.44 against ln 1/1 = 0
    assert terms["coord"].item() == pytest.approx(0.5 * 1.75 * (0.25**2 + math.log(1.44) ** 2))
    assert terms["object"].item() == pytest.approx(0.5 * 5 * (0.75 - 0.75 / 1.69) ** 2)
    # the box of anchor 1 in the same cell spans .25..0.75: inside the object, .5 x .5 = .25 of its
    # area: IoU .25, not ignored
    assert terms["no_object"].item() == pytest.approx(0.5 * 7 * 0.0625)
    assert terms["class"].item() == pytest.approx(-math.log(1 / 4))
    assert terms["prior"].item() == 0  # sigma(0) = .5 and t_w = t_h = 0 in all other slots: each box equals its anchor


def test_only_darknet_ignores_boxes_that_overlap_an_object():
    predictions, targets, anchors = one_object()
    # a neighbour: sigma(t_x) -> 1, so its centre is (1, .25), on the border of the cell; 2 wide, it covers the object
    predictions[0, 0, 0, 0] = torch.tensor([20, -math.log(3), math.log(2), 0, -math.log(3), 0, 0], dtype=torch.float64)
    # x 0..2, y -.25..0.75: the object 1..2 x -.25..0.75 is half of it: IoU .5
    assert YoloLoss(anchors, 1, 5, 1, 1)(predictions, targets)["no_object"].item() == pytest.approx(0.5 * 7 / 16)
    assert YoloLoss(anchors, 1, 5, 1, 1, ignore_threshold=0.49)(predictions, targets)[
        "no_object"
    ].item() == pytest.approx(0.5 * 6 / 16)
    loss = YoloLoss(anchors, 1, 5, 1, 1, ignore_threshold=0.49, equation="yolov1")
    assert loss(predictions, targets)["no_object"].item() == pytest.approx(7 / 16)


def test_boxes_are_ignored_from_an_iou_of_six_tenths_as_in_yolov2_voc_cfg():
    predictions, targets, anchors = one_object()
    for height, ignored in ((0.59, 0), (0.61, 1)):  # the other anchor in the object's cell: its centre and its width
        size = [math.log(1 / anchors[1][0]), math.log(height / anchors[1][1])]
        predictions[0, 1, 0, 1, 1:4] = torch.tensor([-math.log(3), *size], dtype=torch.float64)
        no_object = YoloLoss(anchors, 1, 5, 1, 1)(predictions, targets)["no_object"].item()
        assert no_object == pytest.approx(0.5 * (7 - ignored) / 16)


def random_batch(n=3, s_h=3, s_w=4, classes=4, objects=3, seed=0):
    rng = np.random.default_rng(seed)
    predictions = torch.from_numpy(rng.normal(0, 1, (n, 5, s_h, s_w, 5 + classes)))
    boxes = rng.uniform(0.1, 0.9, (n, objects, 4)) * [1, 1, 0.8, 0.8]
    targets = [encode_targets(box, rng.integers(0, classes, objects), ANCHORS, s_h, s_w) for box in boxes]
    return predictions, torch.stack(targets)


@pytest.mark.parametrize("equation", ["darknet", "yolov1"])
def test_gradient_equals_finite_differences(equation):
    """Every term except object: the loss treats its IoU as a constant, but finite differences would change it."""
    predictions, targets = random_batch(n=2, s_h=2, s_w=2)
    loss = YoloLoss(ANCHORS, 2, 3, 0.5, 1.5, equation=equation)
    gradients = {}
    for name in ("coord", "class", "no_object", "prior") if equation == "darknet" else ("coord", "class", "no_object"):
        free = predictions.clone().requires_grad_()
        loss(free, targets, images_seen=0)[name].backward()
        gradients[name] = free.grad
    for flat in np.random.default_rng(1).choice(predictions.numel(), 120, replace=False):
        place = np.unravel_index(flat, predictions.shape)
        up, down = predictions.clone(), predictions.clone()
        up[place] += 1e-6
        down[place] -= 1e-6
        above, below = loss(up, targets, images_seen=0), loss(down, targets, images_seen=0)
        for name, gradient in gradients.items():
            slope = (above[name] - below[name]).item() / 2e-6
            assert gradient[place].item() == pytest.approx(slope, abs=1e-6, rel=1e-5), (name, place)


@pytest.mark.parametrize("equation", ["darknet", "yolov1"])
def test_no_gradient_flows_through_the_iou(equation):
    predictions, targets = random_batch()
    predictions.requires_grad_()
    YoloLoss(ANCHORS, equation=equation)(predictions, targets)["object"].backward()
    assert predictions.grad[..., :4].abs().max() == 0
    assert predictions.grad[..., 4].abs().max() > 0


@pytest.mark.parametrize("equation", ["darknet", "yolov1"])
def test_inputs_are_unchanged(equation):
    predictions, targets = random_batch()
    copies = predictions.clone(), targets.clone()
    YoloLoss(ANCHORS, equation=equation)(predictions, targets, images_seen=0)
    assert torch.equal(predictions, copies[0]) and torch.equal(targets, copies[1])


@pytest.mark.parametrize("equation", ["darknet", "yolov1"])
def test_the_loss_of_a_batch_is_the_mean_over_its_images(equation):
    predictions, targets = random_batch()
    targets[1] = 0  # one of them without objects
    loss = YoloLoss(ANCHORS, equation=equation)
    together = loss(predictions, targets, images_seen=0)
    separately = [loss(predictions[i : i + 1], targets[i : i + 1], images_seen=0) for i in range(3)]
    for name in (*TERMS, "total"):
        assert together[name].item() == pytest.approx(sum(terms[name].item() for terms in separately) / 3)


@pytest.mark.parametrize("equation", ["darknet", "yolov1"])
def test_images_without_objects_have_only_no_object_and_prior(equation):
    predictions, targets = random_batch()
    terms = YoloLoss(ANCHORS, equation=equation)(predictions.requires_grad_(), torch.zeros_like(targets), images_seen=0)
    assert terms["coord"] == terms["object"] == terms["class"] == 0 and terms["no_object"] > 0
    terms["total"].backward()
    assert torch.isfinite(predictions.grad).all()


@pytest.mark.parametrize("equation", ["darknet", "yolov1"])
def test_a_perfect_prediction_has_a_loss_close_to_zero(equation):
    targets = encode_targets([[0.4, 0.6, 0.3, 0.5]], [2], ANCHORS, 5, 5)[None]
    held = targets[..., 0] > 0
    predictions = torch.zeros(1, 5, 5, 5, 9)
    predictions[..., 4] = -12
    anchor = torch.tensor(ANCHORS)[held.nonzero()[0, 1]]
    _, x, y, w, h, _ = targets[held][0]
    values = [torch.logit(x), torch.logit(y), torch.log(w / anchor[0]), torch.log(h / anchor[1]), 12, -12, -12, 12, -12]
    predictions[held] = torch.tensor([float(value) for value in values])
    assert YoloLoss(ANCHORS, equation=equation)(predictions, targets)["total"] < 1e-4


def test_prior_phase_ends_with_the_batch_that_reaches_12800_images():
    predictions, targets = random_batch()
    loss, n = region_loss(), len(predictions)
    assert loss(predictions, targets, images_seen=12800 - n - 1)["prior"] > 0
    assert loss(predictions, targets, images_seen=12800 - n)["prior"] == 0
    assert loss(predictions, targets)["prior"] == 0


@pytest.mark.parametrize("name", ["coord", "object", "no_object", "class"])
def test_each_lambda_scales_its_own_term_linearly(name):
    """A lambda inside the square would multiply the term by 9."""
    predictions, targets = random_batch()
    once = YoloLoss(ANCHORS, 1, 1, 1, 1)(predictions, targets)
    thrice = YoloLoss(ANCHORS, **({f"lambda_{other}": 1 for other in TERMS[:4]} | {f"lambda_{name}": 3}))(
        predictions, targets
    )
    for term in TERMS:
        assert thrice[term].item() == pytest.approx((3 if term == name else 1) * once[term].item())


def test_the_loss_of_half_precision_outputs_is_computed_in_float32():
    predictions, targets = random_batch()
    half = predictions.bfloat16()
    found, expected = region_loss()(half, targets.float()), region_loss()(half.float(), targets.float())
    assert found["total"].dtype == torch.float32 and found["total"] == expected["total"]


@pytest.mark.parametrize("equation", ["darknet", "yolov1"])
def test_boxes_of_zero_or_infinite_size_leave_the_gradient_finite(equation):
    """Sizes that underflow in an image with an object, and overflow in an image without one."""
    targets = torch.zeros(2, 5, 3, 3, 6)
    targets[0, 2, 1, 1] = torch.tensor([1, 0.5, 0.5, 2.0, 2.0, 3])
    predictions = torch.zeros(2, 5, 3, 3, 25)
    predictions[0, ..., 2:4], predictions[1, ..., 2:4] = -200.0, 200.0
    predictions.requires_grad_()
    losses = YoloLoss(ANCHORS, equation=equation)(predictions, targets)
    losses["total"].backward()
    assert torch.isfinite(losses["total"]) and torch.isfinite(predictions.grad).all()


def test_an_unknown_equation_or_mismatched_shapes_are_errors():
    predictions, targets = random_batch()
    with pytest.raises(ValueError, match="yolov3"):
        YoloLoss(ANCHORS, equation="yolov3")
    with pytest.raises(ValueError, match="do not fit"):
        region_loss()(predictions, targets[:, :4])
    with pytest.raises(ValueError, match="do not fit"):
        YoloLoss(ANCHORS[:4])(predictions, targets)


def test_every_value_of_the_worked_example_equals_that_of_the_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(TESTS.parent / "loss.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())  # it only prints
    assert "left out, IoU 0.90 > 0.6" in printed and "total     = 0.502541" in printed
    values = re.findall(r"^  (\w+) += .* = (-?\d+\.\d+) +YoloLoss: (-?\d+\.\d+)$", printed, re.MULTILINE)
    assert tuple(name for name, _, _ in values) == TERMS
    for name, by_hand, from_the_loss in values:
        assert float(by_hand) == pytest.approx(float(from_the_loss), abs=1.1e-6) and float(by_hand) > 0, name
    (total,) = re.findall(r"^  total +=.* (\d+\.\d+)$", printed, re.MULTILINE)
    assert float(total) == pytest.approx(sum(float(by_hand) for _, by_hand, _ in values), abs=1e-5)


def test_loss_notes_draws_its_figure(tmp_path):
    shutil.copy(TESTS.parent / "images" / "loss_notes.py", tmp_path)  # it writes next to itself
    result = subprocess.run([sys.executable, tmp_path / "loss_notes.py"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    file = tmp_path / "yolov2_loss_notes.jpg"
    assert file.stat().st_size > 50_000
    with Image.open(file) as picture, Image.open(TESTS.parent / "images" / file.name) as committed:
        assert picture.format == "JPEG" and picture.size == committed.size
