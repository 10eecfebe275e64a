"""Draws a trained YOLOv2's detections on images.

    python detect.py                                           the photographs of the sample, with the checkpoint of train.py
    python detect.py SOURCE=street.jpg CHECKPOINT=yolov2-voc.weights CONFIDENCE_THRESHOLD=0.5

Writes each image with its boxes, class names and confidences to `runs/detections/`, and prints what was found and how long it took.
"""

import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import utils
from dataset import IMAGE_SUFFIXES, read_image, test_transform, to_tensor
from model import load_detector

# data
SOURCE = "data_samples/voc/VOC2007/JPEGImages/00000*.jpg"  # an image, a folder of images, or a glob
# model
CHECKPOINT = "runs/yolov2.pt"  # from train.py (its best epoch is yolov2_best.pt), or a Darknet file
CLASSES = []  # only for a Darknet file: names or a .names file; [] for yolov2-voc.weights, or yolov2.weights of COCO
ANCHORS = []  # likewise: those of its cfg file
IMAGE_SIZE = None  # pixels, a multiple of 32; None for the checkpoint's own
# detection
CONFIDENCE_THRESHOLD = 0.4  # lowest confidence (objectness x class probability) that is drawn
NMS_IOU_THRESHOLD = 0.45  # of two boxes of one class with a larger IoU, only the more confident one is kept
# run
OUTPUT_DIR = "runs/detections"
DEVICE = "auto"  # or "cuda", "cuda:1", "cpu"
PRECISION = "auto"  # "fp32", "bf16" or "fp16"; "auto": half precision if the device computes it faster
COMPILE = False  # torch.compile with frozen weights; pays off its start-up after a few thousand images


def check_settings():
    """Raises ValueError for an invalid setting."""
    utils.check_at_most(1, CONFIDENCE_THRESHOLD=CONFIDENCE_THRESHOLD, NMS_IOU_THRESHOLD=NMS_IOU_THRESHOLD)
    if not OUTPUT_DIR:
        raise ValueError("OUTPUT_DIR must name a folder")
    if IMAGE_SIZE is not None and (IMAGE_SIZE < 32 or IMAGE_SIZE % 32):
        raise ValueError(f"IMAGE_SIZE must be a multiple of 32 pixels or None, not {IMAGE_SIZE}")


def find_images(pattern: str) -> list[str]:
    """A file, a folder (its images, sorted) or a glob -> image files. Raises FileNotFoundError if there are none."""
    path = Path(pattern)
    if path.is_file():
        return [str(path)]
    root = Path(path.anchor or ".")
    found = sorted(path.iterdir()) if path.is_dir() else sorted(root.glob(os.path.relpath(pattern, root)))
    files = [str(file) for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise FileNotFoundError(f"{pattern}: no image file there; give an image, a folder of images or a glob")
    if others := [file.name for file in found if file.is_file() and str(file) not in set(files)]:
        print(f"{pattern}: {len(others)} files skipped that are not images, {utils.printable(others[0])} first")
    return files


def main():
    check_settings()
    utils.keep_freed_memory()
    device = utils.pick_device(DEVICE)
    files = find_images(SOURCE)
    model, classes, anchors, own_size = load_detector(CHECKPOINT, CLASSES, ANCHORS, device, PRECISION, COMPILE)
    transform = test_transform(IMAGE_SIZE or own_size)
    outputs = [os.path.join(OUTPUT_DIR, os.path.splitext(os.path.basename(file))[0] + ".jpg") for file in files]
    for name, count in Counter(outputs).items():
        if count > 1:
            raise ValueError(f"{name}: would be the picture of {count} files of {SOURCE}; draw them one folder or suffix at a time")
    if overwritten := {os.path.realpath(file) for file in files} & {os.path.realpath(output) for output in outputs}:
        raise ValueError(f"{min(overwritten)}: the picture would replace its own source; set another OUTPUT_DIR")
    os.makedirs(OUTPUT_DIR, exist_ok=True)
    unreadable = 0
    for file, output in zip(files, outputs, strict=True):
        try:
            image = read_image(file)
        except (OSError, ValueError) as error:
            print(utils.printable(f"error: {error}"))
            unreadable += 1
            continue
        start = time.perf_counter()
        batch = to_tensor(transform(image=image, bboxes=[])["image"])[None]  # (1, 3, H, W)
        with torch.no_grad():
            predictions = model(batch.to(device))
        found = utils.postprocess(predictions, anchors, CONFIDENCE_THRESHOLD, NMS_IOU_THRESHOLD)[0]  # (K, 6)
        milliseconds = 1000 * (time.perf_counter() - start)

        height, width = image.shape[:2]
        boxes = found[:, :4] * torch.tensor([width, height, width, height])  # pixels
        names = [classes[int(index)] for index in found[:, 5]]
        labels = [f"{name} {confidence:.2f}" for name, confidence in zip(names, found[:, 4].tolist(), strict=True)]
        picture = utils.draw_boxes(image, boxes, labels, found[:, 5])
        picture.save(output, quality=92)
        summary = ", ".join(f"{count} {name}" for name, count in Counter(names).items()) or "nothing"
        print(utils.printable(f"{file}: {summary} in {milliseconds:.0f} ms -> {output}"))
    if unreadable:
        sys.exit(f"{unreadable} of {len(files)} images could not be read")


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
