"""Boxes, decoding, non-maximum suppression and average precision, checked by hand and against a plain reference."""

import math
import types

import numpy as np
import pytest
import torch

import dataset
import test as test_script
import utils

NAN = math.nan

# ---------------------------------------------------------------- intersection over union


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1, 1, 2, 2), (1, 1, 2, 2), 1.0),  # the same box
        ((1, 1, 2, 2), (2, 2, 2, 2), 1 / 7),  # 0..2 and 1..3: intersection 1 * 1, union 4 + 4 - 1
        ((2, 1, 4, 2), (1, 2, 2, 4), 4 / 12),  # 0..4 x 0..2 and 0..2 x 0..4: intersection 2 * 2, union 8 + 8 - 4
        ((2, 2, 4, 2), (2, 2, 1, 1), 1 / 8),  # nested with the same centre: 1 / (4 * 2)
        ((2, 2, 4, 4), (1, 1, 2, 2), 4 / 16),  # nested in a corner: 0..2 of 0..4 in both directions
        ((1, 1, 2, 2), (3, 1, 2, 2), 0.0),  # touching along an edge
        ((1, 1, 2, 2), (3, 3, 2, 2), 0.0),  # touching in a corner
        ((1, 1, 2, 2), (1, 9, 2, 2), 0.0),  # disjoint in y only
        ((1, 1, 2, 2), (9, 9, 2, 2), 0.0),  # disjoint in x and y: two negative sides must not make a positive area
        ((0.5, 0.25, 0.5, 0.5), (0.25, 0.5, 0.5, 1.0), 1 / 5),  # fractions of an image: .25 * .5 / (.25 + .5 - .125)
    ],
)
def test_box_iou_by_hand(first, second, expected):
    first, second = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    iou = utils.box_iou(first, second)
    assert iou.item() == pytest.approx(expected, abs=1e-12)
    assert utils.box_iou(second, first).item() == pytest.approx(expected, abs=1e-12)
    assert iou.shape == () and iou.dtype == torch.float64


def test_box_iou_broadcasts_to_all_pairs():
    first = torch.tensor([[1.0, 1, 2, 2], [9, 9, 2, 2]])
    second = torch.tensor([[1.0, 1, 2, 2], [2, 2, 2, 2], [9, 9, 2, 2]])
    iou = utils.box_iou(first[:, None], second)
    torch.testing.assert_close(iou, torch.tensor([[1, 1 / 7, 0], [0, 0, 1]]))
    torch.testing.assert_close(utils.box_iou(first, second[0]), torch.tensor([1.0, 0]))  # one box against several


def test_box_iou_broadcasts_one_object_over_all_boxes_of_its_image():
    """The shapes of the loss: (K, A, S_h, S_w, 4) against (K, 1, 1, 1, 4)."""
    generator = torch.Generator().manual_seed(0)
    boxes, truth = torch.rand(2, 3, 4, 5, 4, generator=generator), torch.rand(2, 4, generator=generator)
    iou = utils.box_iou(boxes, truth[:, None, None, None])
    assert iou.shape == (2, 3, 4, 5) and (iou > 0).any() and (iou == 0).any()
    for place in np.ndindex(2, 3, 4, 5):
        torch.testing.assert_close(iou[place], utils.box_iou(boxes[place], truth[place[0]]))


# ---------------------------------------------------------------- decoding


def test_decode_predictions_by_hand_on_a_grid_that_is_not_square():
    # 2 anchors, 2 rows, 4 columns, 2 classes; all zeros except anchor 1, row 1, column 2
    raw = torch.zeros(1, 2, 2, 4, 7)
    ln = math.log
    raw[0, 1, 1, 2] = torch.tensor([ln(3), -ln(3), ln(2), -ln(2), -ln(4), 0, ln(3)])
    boxes, objectness, probabilities = utils.decode_predictions(raw, [(1, 1), (2, 3)])
    assert boxes.shape == (1, 16, 4) and objectness.shape == (1, 16) and probabilities.shape == (1, 16, 2)
    # Slot (anchor 1, row 1, column 2) is number (1 * 2 + 1) * 4 + 2 = 14. sigma(ln 3) = 3/4, sigma(-ln 3) =
    # 1/4, sigma(-ln 4) = .2. x = (3/4 + 2) / 4, y = (1/4 + 1) / 2, w = 2 * 2 / 4, h = 3 / 2 / 2; the softmax
    # of 0 and ln 3 is 1/4, 3/4.
    torch.testing.assert_close(boxes[0, 14], torch.tensor([0.6875, 0.625, 1.0, 0.75]))
    assert objectness[0, 14].item() == pytest.approx(0.2)
    torch.testing.assert_close(probabilities[0, 14], torch.tensor([0.25, 0.75]))
    # Slot 4 = (anchor 0, row 1, column 0), all zeros: x = .5 / 4, y = 1.5 / 2, w = 1 / 4, h = 1 / 2, sigma(0) = .5.
    torch.testing.assert_close(boxes[0, 4], torch.tensor([0.125, 0.75, 0.25, 0.5]))
    assert objectness[0, 4].item() == 0.5


def test_a_centre_stays_in_its_cell_whatever_the_network_predicts():
    raw = torch.randn(1, 2, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 1000
    raw[..., 2:4] = 0
    boxes, _, _ = utils.decode_predictions(raw, [(1, 1), (2, 3)])
    cells = boxes[0, :, :2].reshape(2, 3, 4, 2) * torch.tensor([4.0, 3.0])
    corners = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(3), indexing="xy"), dim=-1)  # (3, 4, 2)
    offsets = cells - corners
    assert offsets.min() > -1e-5 and offsets.max() < 1 + 1e-5 and offsets.max() - offsets.min() > 0.9


def test_decode_predictions_computes_in_float32_and_leaves_its_input_unchanged():
    raw = torch.randn(2, 2, 3, 3, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    before = raw.clone()
    decoded = utils.decode_predictions(raw, [(1, 1), (2, 2)])
    assert torch.equal(raw, before)
    for value, expected in zip(decoded, utils.decode_predictions(raw.float(), [(1, 1), (2, 2)]), strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, expected)


# ---------------------------------------------------------------- from raw outputs to detections


def raw_outputs(slots: dict, classes: int = 2, grid: int = 4, anchors: int = 2) -> torch.Tensor:
    """(1, anchors, grid, grid, 5 + classes) without objects except in `slots`: (anchor, row, column)
    -> 5 + classes values."""
    raw = torch.zeros(1, anchors, grid, grid, 5 + classes)
    raw[..., 4] = -30
    for (anchor, row, column), values in slots.items():
        raw[0, anchor, row, column] = torch.tensor(values, dtype=torch.float32)
    return raw


SURE = [20.0, 0.0]  # logits of two classes: the first has a probability of practically 1
SAME_SHAPE = [(2.0, 2.0), (2.0, 2.0)]


def test_nms_keeps_the_more_confident_of_two_overlapping_boxes():
    raw = raw_outputs({(0, 1, 1): [0, 0, 0, 0, 1, *SURE], (1, 1, 1): [0, 0, 0, 0, 2, *SURE]})  # the same box twice
    (found,) = utils.postprocess(raw, SAME_SHAPE, 0.5, 0.45)
    assert found.shape == (1, 6)
    # centre 1.5 cells, 2 cells wide: from .5 to 2.5 of 4 cells; confidence sigma(2) = 1 / (1 + e^-2)
    torch.testing.assert_close(found[0], torch.tensor([0.125, 0.125, 0.625, 0.625, 1 / (1 + math.exp(-2)), 0]))


def test_nms_keeps_overlapping_boxes_of_different_classes():
    raw = raw_outputs({(0, 1, 1): [0, 0, 0, 0, 1, 20, 0], (1, 1, 1): [0, 0, 0, 0, 2, 0, 20]})
    (found,) = utils.postprocess(raw, SAME_SHAPE, 0.5, 0.45)
    assert found[:, 5].tolist() == [1, 0]  # in descending order of confidence


@pytest.mark.parametrize(("nms_threshold", "kept"), [(0.32, 1), (0.34, 2)])
def test_nms_removes_boxes_above_the_iou_threshold(nms_threshold, kept):
    # Two boxes of 2 x 2 cells, one cell apart: intersection 2, union 4 + 4 - 2 = 6, IoU 1/3.
    raw = raw_outputs({(0, 1, 1): [0, 0, 0, 0, 1, *SURE], (0, 1, 2): [0, 0, 0, 0, 2, *SURE]})
    (found,) = utils.postprocess(raw, SAME_SHAPE, 0.5, nms_threshold)
    assert len(found) == kept


def test_each_class_above_the_threshold_is_a_separate_detection():
    # probabilities 1/2, 3/8, 1/8 and objectness 1: with a threshold of .3 the first two count
    raw = raw_outputs({(0, 1, 1): [0, 0, 0, 0, 30, math.log(4), math.log(3), 0]}, classes=3)
    (found,) = utils.postprocess(raw, SAME_SHAPE, 0.3, 0.45)
    assert found[:, 5].tolist() == [0, 1]
    torch.testing.assert_close(found[:, 4], torch.tensor([0.5, 0.375]))
    assert torch.equal(found[0, :4], found[1, :4])


def test_a_confidence_equal_to_the_threshold_is_not_enough():
    raw = raw_outputs({(0, 1, 1): [0, 0, 0, 0, 0, 0, 0]})  # objectness 1/2, both classes 1/2: confidence 1/4 exactly
    assert len(utils.postprocess(raw, SAME_SHAPE, 0.25, 0.45)[0]) == 0
    assert len(utils.postprocess(raw, SAME_SHAPE, 0.2499, 0.45)[0]) == 2


def test_detections_are_clipped_to_the_image_and_no_detection_gives_an_empty_tensor():
    # In the top left cell, 8 cells wide: from -3.5 to 4.5 of 4 cells.
    raw = raw_outputs({(0, 0, 0): [0, 0, math.log(4), math.log(4), 5, *SURE]})
    (found,) = utils.postprocess(raw, SAME_SHAPE, 0.5, 0.45)
    assert found[:, :4].tolist() == [[0, 0, 1, 1]]
    assert utils.postprocess(raw_outputs({}), SAME_SHAPE, 0.5, 0.45)[0].shape == (0, 6)


def test_a_batch_gives_the_same_detections_as_its_images_one_by_one():
    raw = torch.randn(3, 2, 5, 7, 9, generator=torch.Generator().manual_seed(1)) * 2
    together = utils.postprocess(raw, [(1, 2), (3, 2)], 0.2, 0.45)
    assert len(together) == 3 and all(len(found) > 1 for found in together)
    for index, found in enumerate(together):
        (alone,) = utils.postprocess(raw[index : index + 1], [(1, 2), (3, 2)], 0.2, 0.45)
        torch.testing.assert_close(found, alone)
        assert (found[:-1, 4] >= found[1:, 4]).all()


def test_the_first_devkit_pixel_is_one():
    # a quarter of 200 and of 100 pixels, then the whole: 0-based 50 and 25 become 51 and 26
    pixels = utils.to_devkit_pixels(np.array([[0.25, 0.25, 1.0, 1.0], [0, 0, 0.5, 0.5]]), 200, 100)
    assert pixels.tolist() == [[51, 26, 200, 100], [1, 1, 101, 51]]  # clipped to the image


@pytest.mark.parametrize(("shift", "kept"), [(0.7777, 3), (0.7398, 2)])
def test_the_default_thresholds_are_those_of_darknets_valid(shift, kept):
    """Confidence .005: of .0049 and .0051 the second is kept. NMS .45: boxes of 2 x 2 cells that are .7777 or .7398
    cells apart have an IoU of (2 - .7777) / (2 + .7777) = .44 or of (2 - .7398) / (2 + .7398) = .46."""
    slots = {(0, 3, 3): [0, 0, 0, 0, math.log(0.0049 / 0.9951), *SURE]}
    slots[(0, 3, 0)] = [0, 0, 0, 0, math.log(0.0051 / 0.9949), *SURE]
    slots[(0, 0, 0)] = [0, 0, 0, 0, 1, *SURE]  # its centre is at .5 cells
    slots[(0, 0, 1)] = [math.log((shift - 0.5) / (1.5 - shift)), 0, 0, 0, 0, *SURE]  # at .5 + shift
    model = torch.nn.Linear(1, 1)
    model.forward = lambda images: raw_outputs(slots)

    class OneImage(list):
        anchors, samples = SAME_SHAPE, [types.SimpleNamespace(size=(100, 100))]
        images = staticmethod(lambda indices: torch.zeros(1, 3, 128, 128))
        ground_truth = staticmethod(lambda index: torch.empty(0, 6))

    found, _, _ = utils.detect_dataset(model, OneImage([0]), batch_size=1, num_workers=0)
    assert len(found) == kept and found[:, 2].min() == pytest.approx(0.0051, rel=1e-3)


# ---------------------------------------------------------------- anchors


def test_as_many_anchors_as_boxes_are_the_boxes():
    sizes = [(w, h) for w in (1, 3, 7, 9) for h in (1, 2, 5, 8)]  # a start that draws one of them twice lacks another
    anchors = dataset.kmeans_anchors(sizes, len(sizes)).tolist()
    assert sorted(map(tuple, anchors)) == sizes
    areas = [w * h for w, h in anchors]
    assert areas == sorted(areas)


def test_the_anchors_are_the_best_of_five_starts():
    sizes = np.random.default_rng(11).integers(1, 10, (9, 2))  # the first, second and sixth start fit better and better
    fits = [dataset.average_best_iou(sizes, dataset.kmeans_anchors(sizes, 4, seeds=count)) for count in range(1, 7)]
    assert fits == sorted(fits) and fits[0] < fits[4] < fits[5]
    assert dataset.average_best_iou(sizes, dataset.kmeans_anchors(sizes, 4)) == fits[4]


# ---------------------------------------------------------------- average precision

BOX_A, BOX_B, BOX_C = (1, 1, 10, 10), (21, 1, 30, 10), (41, 1, 50, 10)  # disjoint, 10 x 10 pixels each
ELSEWHERE = (71, 71, 80, 80)


def truth(box, image=0, label=0, difficult=0):
    return [image, label, difficult, *box]


def detection(confidence, box, image=0, label=0):
    return [image, label, confidence, *box]


def ap(detections, truths, metric="all_points", **options) -> float:
    """The AP of class 0 where it is the only class."""
    return utils.average_precision(detections, truths, 1, metric=metric, **options).item()


def test_both_metrics_by_hand():
    # true, false, true positive of 2 truths: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1
    truths = [truth(BOX_A), truth(BOX_B)]
    found = [detection(0.9, BOX_A), detection(0.8, ELSEWHERE), detection(0.7, BOX_B)]
    assert ap(found, truths, "all_points") == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3, abs=1e-12)
    # the best precision is 1 at the six levels 0 .. .5 and 2/3 at the five levels .6 .. 1
    assert ap(found, truths, "voc2007") == pytest.approx((6 * 1 + 5 * 2 / 3) / 11, abs=1e-12)


def test_precision_and_recall_after_each_detection_by_hand():
    found = [detection(0.7, BOX_B), detection(0.8, ELSEWHERE), detection(0.9, BOX_A)]
    (curve,) = utils.precision_recall(found, [truth(BOX_A), truth(BOX_B)], 1)
    confidences, precisions, recalls = (values.tolist() for values in curve)
    assert confidences == [0.9, 0.8, 0.7]
    assert precisions == pytest.approx([1, 1 / 2, 2 / 3])
    assert recalls == pytest.approx([1 / 2, 1 / 2, 1])


@pytest.mark.parametrize("hits", range(6))
def test_a_recall_equal_to_one_of_the_11_levels_reaches_that_level(hits):
    # `hits` of 5 truths found, no false positive: recall hits/5 reaches the levels 0, .1 .. 2 hits/10,
    # which are 2 hits + 1 of 11
    truths = [truth(BOX_A, image=image) for image in range(5)]
    found = [detection(0.9, BOX_A, image=image) for image in range(hits)]
    assert ap(found, truths, "voc2007") == pytest.approx((2 * hits + 1) / 11 if hits else 0, abs=1e-12)


def test_a_second_detection_of_an_object_is_a_false_positive():
    truths = [truth(BOX_A), truth(BOX_B)]
    # true, false, true positive: as above
    found = [detection(0.9, BOX_A), detection(0.8, BOX_A), detection(0.7, BOX_B)]
    assert ap(found, truths) == pytest.approx(5 / 6, abs=1e-12)


def test_difficult_objects_are_ignored():
    truths = [truth(BOX_A), truth(BOX_B, difficult=1)]
    assert ap([detection(0.9, BOX_A)], truths) == 1  # not detected: recall is still 1
    found = [detection(0.9, BOX_B), detection(0.85, BOX_B), detection(0.8, BOX_A)]
    assert ap(found, truths) == 1  # detected twice: still no false positive
    assert ap([detection(0.9, ELSEWHERE), *found], truths) == pytest.approx(1 / 2)  # a real false positive still counts


def test_a_class_with_no_truths_or_only_difficult_ones_is_nan():
    truths = [truth(BOX_A, label=0), truth(BOX_B, label=2, difficult=1)]
    found = [detection(0.9, BOX_A, label=0), detection(0.9, BOX_A, label=1), detection(0.9, BOX_B, label=2)]
    for metric in ("all_points", "voc2007"):
        values = utils.average_precision(found, truths, 3, metric=metric)
        assert values.dtype == torch.float64
        np.testing.assert_allclose(values.numpy(), [1, NAN, NAN])
        assert utils.mean_average_precision(values) == 1


def test_truths_without_detections_give_zero():
    values = utils.average_precision([], [truth(BOX_A), truth(BOX_A, label=1)], 2)
    assert values.tolist() == [0, 0]
    assert utils.mean_average_precision(values) == 0


def test_empty_tables_give_nan_for_every_class():
    for empty in ([], np.empty((0, 7)), torch.empty(0, 7)):
        values = utils.average_precision(empty, empty, 3)
        assert values.shape == (3,) and values.isnan().all()
    assert math.isnan(utils.mean_average_precision(values))


def test_a_detection_on_an_image_without_truths_is_a_false_positive():
    found = [detection(0.9, BOX_A, image=1), detection(0.8, BOX_A, image=0)]
    assert ap(found, [truth(BOX_A, image=0)]) == pytest.approx(1 / 2)  # false, true positive: precision 1/2 at recall 1


def test_a_detection_on_an_object_of_another_class_is_a_false_positive():
    found = [detection(0.9, BOX_B, label=0), detection(0.8, BOX_A, label=0)]
    values = utils.average_precision(found, [truth(BOX_A, label=0), truth(BOX_B, label=1)], 2)
    np.testing.assert_allclose(values.numpy(), [1 / 2, 0])


@pytest.mark.parametrize(("bottom", "expected"), [(5, 1), (4, 0)])
def test_an_iou_equal_to_the_threshold_is_a_match(bottom, expected):
    # Rows 1..5 of rows 1..10 at the same columns: 5 * 10 / (10 * 10) = 1/2 exactly; rows 1..4 give .4.
    assert ap([detection(0.9, (1, 1, 10, bottom))], [truth(BOX_A)]) == expected


def test_both_end_pixels_belong_to_a_box():
    # Columns 1..4 of rows 1..2 in rows 1..4: 8 / 16 = 1/2 with both ends counted, but 3 * 1 / (3 * 3) = 1/3 without.
    assert ap([detection(0.9, (1, 1, 4, 2))], [truth((1, 1, 4, 4))]) == 1
    # Boxes that share only their border column: 1 * 4 / (4 * 4 + 1 * 4 - 4) = 1/4, and 0 without the convention.
    assert ap([detection(0.9, (4, 1, 4, 4))], [truth((1, 1, 4, 4))], iou_threshold=0.25) == 1


def test_detections_match_according_to_the_given_iou_threshold():
    found, truths = [detection(0.9, (1, 1, 10, 7))], [truth(BOX_A)]  # IoU .7
    assert ap(found, truths, iou_threshold=0.69) == 1
    assert ap(found, truths, iou_threshold=0.71) == 0


def test_a_detection_is_assigned_to_its_best_overlap_even_if_that_truth_is_taken():
    # Rows 1..10 and 4..13; the second detection, rows 2..11, overlaps the first truth by 9/11 and the second by 8/12.
    # The first truth is taken, so this is a false positive although the second is free: 1 of 2 found.
    truths = [truth((1, 1, 10, 10)), truth((1, 4, 10, 13))]
    found = [detection(0.9, (1, 1, 10, 10)), detection(0.8, (1, 2, 10, 11))]
    assert ap(found, truths) == pytest.approx(1 / 2)


def test_equal_overlaps_are_assigned_to_the_first_truth():
    easy, difficult = truth(BOX_A), truth(BOX_A, difficult=1)
    assert ap([detection(0.9, BOX_A)], [easy, difficult]) == 1
    assert ap([detection(0.9, BOX_A)], [difficult, easy]) == 0  # assigned to the difficult one, so it is ignored


def test_equal_confidences_keep_the_order_given():
    hit, miss = detection(0.5, BOX_A), detection(0.5, ELSEWHERE)
    assert ap([hit, miss], [truth(BOX_A)]) == 1
    assert ap([miss, hit], [truth(BOX_A)]) == pytest.approx(1 / 2)


def test_the_order_of_images_and_classes_in_the_tables_does_not_matter():
    rng = np.random.default_rng(3)
    detections, truths = random_data_set(rng)
    detections[:, 2] = rng.permutation(len(detections)) / 100  # no ties, whose order would matter
    expected = utils.average_precision(detections, truths, 3)
    shuffled = utils.average_precision(rng.permutation(detections), truths[np.argsort(-truths[:, 0], kind="stable")], 3)
    np.testing.assert_allclose(shuffled.numpy(), expected.numpy(), atol=1e-12)


def test_an_unknown_metric_is_an_error():
    with pytest.raises(ValueError, match="voc2012"):
        ap([detection(0.9, BOX_A)], [truth(BOX_A)], "voc2012")


@pytest.mark.parametrize("label", [-1, 2])
def test_a_class_out_of_range_is_an_error_that_names_the_table(label):
    with pytest.raises(ValueError, match="detections"):
        utils.average_precision([detection(0.9, BOX_A), detection(0.9, BOX_A, label=label)], [truth(BOX_A)], 2)
    with pytest.raises(ValueError, match="ground_truths"):
        utils.average_precision([detection(0.9, BOX_A)], [truth(BOX_A, label=label), truth(BOX_A)], 2)


# ---------------------------------------------------------------- average precision against a plain reference


def reference_average_precision(detections, truths, label: int, metric: str) -> float:
    """The AP of one class at IoU .5, step by step as the devkit's VOCevaldet.m describes it."""
    truths = [row for row in truths if row[1] == label]
    count = sum(row[2] == 0 for row in truths)
    if count == 0:
        return NAN
    # sorted() keeps the order of ties
    found = sorted((row for row in detections if row[1] == label), key=lambda row: -row[2])
    taken = [False] * len(truths)
    hits = misses = 0
    points = []  # (true positives, false positives) after each detection that is not ignored
    for image, _, _, *box in found:
        best, best_overlap = None, -math.inf
        for number, (truth_image, _, _, *other) in enumerate(truths):
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if truth_image != image or width <= 0 or height <= 0:
                continue
            area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
            other_area = (other[2] - other[0] + 1) * (other[3] - other[1] + 1)
            overlap = width * height / (area + other_area - width * height)
            if overlap > best_overlap:
                best, best_overlap = number, overlap
        if best_overlap < 0.5:
            misses += 1
        elif truths[best][2]:
            continue  # difficult
        elif taken[best]:
            misses += 1
        else:
            taken[best] = True
            hits += 1
        points.append((hits, misses))
    if metric == "voc2007":
        total = 0.0
        for level in range(11):  # recall >= level / 10, in integers
            total += max((tp / (tp + fp) for tp, fp in points if 10 * tp >= level * count), default=0.0)
        return total / 11
    recalls = [0.0] + [tp / count for tp, _ in points] + [1.0]
    precisions = [0.0] + [tp / (tp + fp) for tp, fp in points] + [0.0]
    for place in range(len(precisions) - 2, -1, -1):
        precisions[place] = max(precisions[place], precisions[place + 1])
    return sum((recalls[i] - recalls[i - 1]) * precisions[i] for i in range(1, len(recalls)))


def random_data_set(rng) -> tuple[np.ndarray, np.ndarray]:
    """A few images of 30 x 30 pixels with integer boxes of 3 classes; many detections near truths,
    confidences in tenths."""

    def boxes(count):
        corner = rng.integers(1, 20, size=(count, 2))
        return np.concatenate([corner, corner + rng.integers(1, 10, size=(count, 2))], axis=1)

    images, count, loose = rng.integers(1, 4), rng.integers(0, 25), rng.integers(0, 10)
    truths = np.concatenate(
        [
            rng.integers(0, images, (count, 1)),
            rng.integers(0, 3, (count, 1)),
            rng.random((count, 1)) < 0.2,
            boxes(count),
        ],
        axis=1,
    ).astype(float)
    near = truths[rng.integers(0, count, rng.integers(0, 30))] if count else truths
    near = np.concatenate([near[:, :3], near[:, 3:] + rng.integers(-1, 2, size=(len(near), 4))], axis=1)
    near[:, 5:] = np.maximum(near[:, 5:], near[:, 3:5])
    far = np.concatenate(
        [rng.integers(0, images + 1, (loose, 1)), rng.integers(0, 3, (loose, 1)), np.zeros((loose, 1)), boxes(loose)],
        axis=1,
    )
    detections = np.concatenate([near, far])
    detections[:, 2] = rng.integers(1, 11, len(detections)) / 10
    return rng.permutation(detections), truths


@pytest.mark.parametrize("metric", ["all_points", "voc2007"])
def test_average_precision_agrees_with_the_reference_on_random_data_sets(metric):
    rng = np.random.default_rng(0)
    values = []
    for number in range(200):
        detections, truths = random_data_set(rng)
        expected = [
            reference_average_precision(detections.tolist(), truths.tolist(), label, metric) for label in range(3)
        ]
        actual = utils.average_precision(detections, truths, 3, metric=metric).numpy()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12, err_msg=f"data set {number}")
        values += expected
    values = np.array(values)  # the comparison is only meaningful if many APs are neither 0 nor 1
    assert np.isnan(values).any() and (values == 0).any() and ((values > 0.1) & (values < 0.9)).sum() > 200


def reference_kinds(detections, truths) -> list[str]:
    """error_kinds, one detection at a time."""

    def iou(box, other):
        width, height = (min(box[i + 2], other[i + 2]) - max(box[i], other[i]) + 1 for i in (0, 1))
        shared = max(width, 0) * max(height, 0)
        areas = sum((b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, other))
        return shared / (areas - shared)

    kinds, taken = {}, set()
    for number, (image, label, _, *box) in sorted(enumerate(detections), key=lambda item: -item[1][2]):
        here = [(iou(box, other), k) for k, (where, _, _, *other) in enumerate(truths) if where == image]
        own = max((pair for pair in here if truths[pair[1]][1] == label), key=lambda pair: pair[0], default=(0, None))
        if own[0] >= 0.5:
            kinds[number] = "ignored" if truths[own[1]][2] else "duplicate" if own[1] in taken else "correct"
            taken.add(own[1])
        elif own[0] >= 0.1:
            kinds[number] = "localisation"
        else:
            kinds[number] = "confusion" if any(overlap >= 0.1 for overlap, _ in here) else "background"
    return [kinds[number] for number in range(len(detections))]


def test_error_kinds_agree_with_the_reference_on_random_data_sets():
    rng = np.random.default_rng(1)
    seen = []
    for number in range(100):
        detections, truths = random_data_set(rng)
        kinds, confused_with, missed = test_script.error_kinds(detections, truths, 3)
        expected = reference_kinds(detections.tolist(), truths.tolist())
        assert kinds.tolist() == expected, f"data set {number}"
        seen += expected
        assert ((confused_with >= 0) == (kinds == "confusion")).all() and (confused_with != detections[:, 1]).all()
        assert missed.sum() == (truths[:, 2] == 0).sum() - (kinds == "correct").sum()
    assert all(seen.count(kind) > 20 for kind in ("correct", "ignored", *test_script.FALSE_POSITIVES))
