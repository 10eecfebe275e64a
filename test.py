"""Measures a trained YOLOv2 on a test set by the rules of the VOC devkit (average precision at IoU 0.5, difficult
objects ignored).

    python test.py                                             the sample, with the checkpoint of train.py
    python test.py CHECKPOINT=yolov2-voc.weights DATA_DIR=/data/VOCdevkit "IMAGE_SETS=[('2007','test')]"
        "INPUT_SIZES=[416,544]"

Prints one row per class and the mAP by three metrics: 11 points (VOC 2007, the paper's), all points (VOC 2010 and
later, Padilla et al.), and all points using only detections with at least FIXED_THRESHOLD. Also counts the kinds of
errors at that threshold (see error_kinds). Writes both tables to `runs/test.csv`, the precision-recall curves to
`runs/test_curves.png` and the worst errors to `runs/test_worst.jpg`, all for the last input size.
"""

import csv
import math
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import utils
from dataset import VOCDataset, print_doubts, read_image
from model import load_detector

# data
DATA_DIR = "data_samples/voc"  # holds VOC2007/ or VOCdevkit/VOC2007/, lists, or folders of images
IMAGE_SETS = [("2007", "tiny")]  # the sample's training images; VOC: [("2007", "test")]; COCO: "val.json"; "val/images"
TOLERATE = []  # "other classes": skip objects of classes the model lacks; "missing labels": unlabelled is background
DATA_CLASSES = []  # names, or a .names or data.yaml file, if YOLO labels number the classes in another order
NUM_WORKERS = 2  # processes that load images
BATCH_SIZE = 8  # images per forward pass
# model
CHECKPOINT = "runs/yolov2.pt"  # from train.py (its best epoch is yolov2_best.pt), or a Darknet file
CLASSES = []  # only for a Darknet file: names or its .names file; [] for yolov2-voc.weights, or yolov2.weights of COCO
ANCHORS = []  # likewise: numbers or its cfg file
INPUT_SIZES = []  # pixels; the paper's Table 3 has [288, 352, 416, 480, 544]; [] for the checkpoint's own
# detection
CONFIDENCE_THRESHOLD = 0.005  # lowest confidence on the curves; validate_detector in Darknet's examples/detector.c
NMS_IOU_THRESHOLD = 0.45  # from the same function
FIXED_THRESHOLD = 0.4  # confidence for precision, recall, F1 and errors, as in detect.py
# run
OUTPUT = "runs/test"  # prefix of the three files
DEVICE = "auto"  # or "cuda", "cuda:1", "cpu", "mps"
PRECISION = "auto"  # "fp32", "bf16" or "fp16"; "auto": half precision if the device computes it faster
COMPILE = False  # torch.compile with frozen weights; pays off after a few thousand images


def check_settings():
    """Raises ValueError or OSError for an invalid setting."""
    utils.check_settings(globals())
    if CONFIDENCE_THRESHOLD > FIXED_THRESHOLD:
        limit = f"FIXED_THRESHOLD {FIXED_THRESHOLD}"
        raise ValueError(f"CONFIDENCE_THRESHOLD {CONFIDENCE_THRESHOLD} must be at most {limit}")
    if OUTPUT[-1:] in ("", "/", "\\"):
        raise ValueError(f"OUTPUT is the start of three file names, such as runs/test, not {OUTPUT!r}")
    utils.check_writable(f"{OUTPUT}.csv")


PAPER_MAP = {288: 69.0, 352: 73.7, 416: 76.8, 480: 77.8, 544: 78.6}  # VOC 2007 test, trained on 07+12; YOLO9000 Table 3
COLUMNS = ("class", "truths", "difficult", "detections", "ap_11", "ap_all", "ap_at_fixed", "precision", "recall", "f1")
COLUMNS += ("ap_75", "ap_50_95")  # at IoU .75, and the mean of IoU .5, .55 .. .95
MEANS = ("ap_11", "ap_all", "ap_at_fixed", "ap_75", "ap_50_95")  # columns whose mean over the classes is reported
FALSE_POSITIVES = ("duplicate", "localisation", "confusion", "background")
ERROR_COLUMNS = (*FALSE_POSITIVES, "missed", "confused_with", "confused_with_count")


def measure(detections, truths, classes, fixed_threshold):
    """-> a row (dict of COLUMNS) and a curve (precisions, recalls) per class; NaN: AP, recall, F1 without truths."""
    steps = range(55, 100, 5)  # percent of IoU
    strict = {step: utils.average_precision(detections, truths, len(classes), step / 100).numpy() for step in steps}
    rows, curves = [], []
    for c, (confidences, precisions, recalls) in enumerate(utils.precision_recall(detections, truths, len(classes))):
        difficult = truths[truths[:, 1] == c, 2] > 0
        truth_count = int((~difficult).sum())
        kept = int((confidences >= fixed_threshold).sum())  # the first ones: a curve is sorted by confidence
        ap_11 = ap_all = ap_at_fixed = precision = recall = math.nan
        if truth_count:
            ap_11 = utils.area_under_curve(precisions, recalls, "voc2007")
            ap_all = utils.area_under_curve(precisions, recalls, "all_points")
            ap_at_fixed = utils.area_under_curve(precisions[:kept], recalls[:kept], "all_points")
            recall = float(recalls[kept - 1]) if kept else 0.0
        if kept:
            precision = float(precisions[kept - 1])
        f1 = 2 * precision * recall / (precision + recall) if recall != 0 else 0.0
        counts = (truth_count, int(difficult.sum()), int((detections[:, 1] == c).sum()))
        ap_strict = (float(strict[75][c]), float(np.mean([ap_all, *(ap[c] for ap in strict.values())])))
        values = (classes[c], *counts, ap_11, ap_all, ap_at_fixed, precision, recall, f1, *ap_strict)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        curves.append((precisions, recalls))
    return rows, curves


def print_table(rows):
    """The rows as an aligned table, with a dash for an undefined value."""
    heads = ("truths", "diffic.", "detect.", "AP 11", "AP all", f"AP@{FIXED_THRESHOLD}", "precis.", "recall", "F1")
    print("  ".join([f"{'class':>16s}", *(f"{head:>7s}" for head in heads)]))
    for row in rows:
        cells = [f"{row['class']:>16s}", *(f"{row[name]:7d}" for name in COLUMNS[1:4])]
        cells += ["      -" if math.isnan(row[name]) else f"{row[name]:7.3f}" for name in COLUMNS[4:10]]
        print("  ".join(cells))


def error_kinds(detections, truths, num_classes, iou_threshold=0.5, least_iou=0.1):
    """Classifies detections (D, 7) -> kinds (D,) text, confused_with (D,) class or -1, and missed (G,) of the truths
    (G, 7).

    The kinds of Hoiem et al. (ECCV 2012) and of the YOLO paper's Fig. 4, without their groups of similar classes.
    A detection is assigned to the ground truth of its class with the largest IoU, as in utils.assign_detections.
    The first kind that applies:
      correct       a true positive of the devkit
      ignored       IoU >= iou_threshold with a difficult ground truth: no error
      duplicate     IoU >= iou_threshold, but a more confident detection is matched to its ground truth
      localisation  IoU >= least_iou with its ground truth, difficult or not
      confusion     IoU >= least_iou with an object of another class, difficult or not; confused_with: the class
                    of the largest IoU
      background    everything else
    missed: neither difficult nor matched. Pass only the detections above the confidence threshold in use.
    """
    iou, truth, correct, ignored = utils.assign_detections(detections, truths, num_classes, iou_threshold)
    any_iou, any_truth = utils.largest_overlaps(detections, truths, num_classes, any_class=True)
    # np.select takes the first condition that holds, so the last one only sees objects of other classes
    conditions = [correct, ignored, iou >= iou_threshold, iou >= least_iou, any_iou >= least_iou]
    kinds = np.select(conditions, ["correct", "ignored", *FALSE_POSITIVES[:3]], "background")
    any_class = np.append(truths[:, 1], -1).astype(int)[any_truth]  # row -1: no overlap
    missed = truths[:, 2] == 0
    missed[truth[correct]] = False
    return kinds, np.where(kinds == "confusion", any_class, -1), missed


def count_errors(detections, truths, classes, errors):
    """errors: from error_kinds -> a dict of ERROR_COLUMNS per class."""
    kinds, confused_with, missed = errors
    rows = []
    for c in range(len(classes)):
        of_class = detections[:, 1] == c
        counts = Counter(kinds[of_class].tolist())
        counts["missed"] = int((truths[missed, 1] == c).sum())
        row = {name: counts[name] for name in (*FALSE_POSITIVES, "missed")}
        confusions = Counter(confused_with[of_class & (kinds == "confusion")].tolist())
        other, times = max(confusions.items(), key=lambda item: item[1], default=(None, 0))
        rows.append(row | {"confused_with": "" if other is None else classes[other], "confused_with_count": times})
    return rows


def print_errors(rows):
    """One line of errors per class, and their sums; the most frequent confusion in brackets."""
    names = ("duplicate", "localisation", "background", "missed", "confusion")
    print(f"{f'errors at {FIXED_THRESHOLD}':>16s}  " + "  ".join(f"{name:>{max(7, len(name))}s}" for name in names))
    total = {"class": "all", "confused_with": ""} | {name: sum(row[name] for row in rows) for name in names}
    for row in [*rows, total]:
        cells = "  ".join(f"{row[name]:{max(7, len(name))}d}" for name in names)
        most = f" ({row['confused_with']} {row['confused_with_count']})" if row["confused_with"] else ""
        print(f"{row['class']:>16s}  {cells}{most}")


def draw_worst(dataset, detections, truths, errors, file):
    """Draws up to 12 errors: the 4 largest missed objects and the 8 most confident false positives, or more of one
    if there are fewer of the other; ground truths are thin and white. -> number of panels."""
    kinds, confused_with, missed = errors
    false_positives = [k for k in np.argsort(-detections[:, 2], kind="stable") if kinds[k] in FALSE_POSITIVES]
    areas = (truths[:, 5:] - truths[:, 3:5] + 1).prod(axis=1)
    missed_objects = [k for k in np.argsort(-areas, kind="stable") if missed[k]][: max(4, 12 - len(false_positives))]
    false_positives = false_positives[: 12 - len(missed_objects)]
    panels = [(detections[k], kinds[k], confused_with[k]) for k in false_positives]
    panels += [(truths[k], "missed", -1) for k in missed_objects]
    if not panels:
        Path(file).unlink(missing_ok=True)  # of an earlier run
        return 0
    from matplotlib import pyplot as plt

    height = math.ceil(len(panels) / 3)
    figure, axes = plt.subplots(height, 3, figsize=(12, 3.4 * height), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (row, kind, other) in zip(axes.flat, panels, strict=False):
        index, label = int(row[0]), int(row[1])
        image_file = dataset.samples[index].image_file
        picture = Image.fromarray(read_image(image_file))
        extent = (0, picture.width, picture.height, 0)
        picture.thumbnail((800, 800))
        axis.imshow(picture, extent=extent)
        boxes = [(box, *style) for box in truths[truths[:, 0] == index, 3:] for style in (("black", 2.5), ("white", 1))]
        for (x1, y1, x2, y2), colour, width in [*boxes, (row[3:], np.array(utils.class_colour(label)) / 255, 3)]:
            corner = (x1 - 1, y1 - 1)  # the devkit's first pixel is 1
            axis.add_patch(plt.Rectangle(corner, x2 - x1 + 1, y2 - y1 + 1, fill=False, color=colour, linewidth=width))
        name, other_name = (utils.drawable(dataset.classes[c], f"class {c}") for c in (label, other))
        title = f"{name}: missed" if kind == "missed" else f"{name} {row[2]:.2f}: {kind}"
        if kind == "confusion":
            title += f" with {other_name}"
        title += f", image {utils.drawable(Path(image_file).stem, f'number {index}')}"
        axis.set_title(textwrap.fill(title, 46), fontsize=11, parse_math=False)
    utils.write_picture(file, figure.savefig, dpi=100, format="jpg")
    plt.close(figure)
    return len(panels)


def draw_curves(rows, curves, file):
    """Precision over recall, a panel per class with its AP in the title; at most the 20 of the lowest AP."""
    lowest = sorted(range(len(rows)), key=lambda c: (math.isnan(rows[c]["ap_all"]), rows[c]["ap_all"]))[:20]
    from matplotlib import pyplot as plt

    width = min(5, len(lowest))
    height = math.ceil(len(lowest) / width)
    figure, axes = plt.subplots(height, width, figsize=(2.6 * width, 2.4 * height), squeeze=False, layout="constrained")
    for axis, c in zip(axes.flat, sorted(lowest), strict=False):
        row, (precisions, recalls) = rows[c], curves[c]
        axis.plot([0, *recalls], [*precisions[:1], *precisions] or [0], drawstyle="steps-pre")
        score = "no truths" if math.isnan(row["ap_all"]) else f"{row['ap_all']:.3f}"
        axis.set_title(f"{utils.drawable(row['class'], f'class {c}')}: {score}", fontsize=9, parse_math=False)
        axis.set(xlim=(0, 1.02), ylim=(0, 1.05))
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(lowest) :]:
        axis.set_visible(False)
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    utils.write_picture(file, figure.savefig, dpi=100, format="png")
    plt.close(figure)


def main():
    check_settings()
    utils.keep_freed_memory()
    device = utils.pick_device(DEVICE)
    model, classes, anchors, own_size = load_detector(CHECKPOINT, CLASSES, ANCHORS, device, PRECISION, COMPILE)
    dataset = VOCDataset(DATA_DIR, IMAGE_SETS, anchors, own_size, DATA_CLASSES or classes, tolerate=TOLERATE)
    if DATA_CLASSES:
        dataset = dataset.with_classes(classes, TOLERATE)
    print_doubts(dataset)
    means = {}
    for size in INPUT_SIZES or [own_size]:
        resized = dataset.changed(image_size=size)
        thresholds = CONFIDENCE_THRESHOLD, NMS_IOU_THRESHOLD
        detections, truths, seconds = utils.detect_dataset(model, resized, BATCH_SIZE, NUM_WORKERS, *thresholds)
        rows, curves = measure(detections, truths, classes, FIXED_THRESHOLD)
        means[size] = [utils.mean_average_precision([row[name] for row in rows]) for name in MEANS]
        confident = detections[detections[:, 2] >= FIXED_THRESHOLD]
        errors = error_kinds(confident, truths, len(classes))
        error_rows = count_errors(confident, truths, classes, errors)
        rows = [row | counts for row, counts in zip(rows, error_rows, strict=True)]

        counts = f"{len(dataset)} images, {len(truths)} ground truths, {len(detections)} detections"
        print(f"\n{CHECKPOINT} at {size} px on {counts}")
        shown = [row for row in rows if row["truths"] or row["difficult"] or row["detections"]]
        print_table(shown)
        print(f"{'mAP':>16s}  {'':25s}  " + "  ".join(f"{value:7.3f}" for value in means[size][:3]))
        strict = "mAP at IoU .75: {:.3f}; mean over IoU .5 to .95: {:.3f}".format(*means[size][3:])
        print(f"{strict} (all points, devkit matching; pycocotools interpolates at 101 points)")
        if len(shown) < len(rows):
            print(f"not shown: {len(rows) - len(shown)} classes without ground truth and detections")
        print_errors(shown)
        rate = len(dataset) / sum(seconds.values())
        parts = ", ".join(f"{name} {1000 * value / len(dataset):.1f} ms" for name, value in seconds.items())
        print(f"{rate:.1f} images/s in batches of {BATCH_SIZE}; per image: {parts}")

    if len(means) > 1:  # as in the paper's Table 3
        print(f"\n{'input':>16s}  " + "  ".join(f"{size:7d}" for size in means))
        for place, name in enumerate(("mAP 11", "mAP all", f"mAP@{FIXED_THRESHOLD}", "mAP IoU .75", "mAP IoU .5:.95")):
            print(f"{name:>16s}  " + "  ".join(f"{100 * values[place]:7.1f}" for values in means.values()))
        paper = [f"{PAPER_MAP[size]:7.1f}" if size in PAPER_MAP else f"{'-':>7s}" for size in means]
        print(f"{'paper, VOC 2007':>16s}  " + "  ".join(paper))

    with utils.atomic_write(f"{OUTPUT}.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS + ERROR_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        writer.writerow({"class": "mAP", **dict(zip(MEANS, means[size], strict=True))})
    draw_curves(rows, curves, f"{OUTPUT}_curves.png")
    print(f"wrote {OUTPUT}.csv and {OUTPUT}_curves.png")
    if draw_worst(dataset, confident, truths, errors, f"{OUTPUT}_worst.jpg"):
        print(f"wrote the worst errors to {OUTPUT}_worst.jpg")
    else:
        print(f"no errors at confidence {FIXED_THRESHOLD} or above, so there is no {OUTPUT}_worst.jpg")


if __name__ == "__main__":
    with utils.plain_errors():
        utils.override_globals(globals(), sys.argv[1:])
        main()
