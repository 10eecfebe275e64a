"""Writes a trained YOLOv2's detections, and the ground truth, as text files for evaluation toolkits and the VOC server.

    python detect_txt.py                                       the sample, with the checkpoint of train.py
    python detect_txt.py CHECKPOINT=yolov2-voc.weights DATA_DIR=/data/VOCdevkit "IMAGE_SETS=[('2007','test')]"

Writes under `runs/detect_txt/`, in pixels of the original image, where the first pixel is 1:
  detections/<image id>.txt        one line `class confidence left top right bottom` per detection, whole pixels; may be empty
  groundtruths/<image id>.txt      one line `class left top right bottom` per object (both folders as for Padilla et al.'s toolkit)
  comp4_det_test_<class>.txt       lines `id confidence left top right bottom`, the submission files of the VOC devkit
"""

import os
import sys
from pathlib import Path

import utils
from dataset import VOCDataset, list_samples
from model import load_detector

# data
DATA_DIR = "data_samples/voc"  # holds VOC2007/ or VOCdevkit/VOC2007/, or .csv lists
IMAGE_SETS = [("2007", "tiny")]  # the sample's training images; VOC: [("2007", "test")]
TOLERATE = []  # "other classes": skip objects of classes that the model lacks; "missing labels": such images have no objects
NUM_WORKERS = 2  # processes that load images
BATCH_SIZE = 8  # images per forward pass
# model
CHECKPOINT = "runs/yolov2.pt"  # from train.py (its best epoch is yolov2_best.pt), or a Darknet file
CLASSES = []  # only for a Darknet file: names or a .names file; [] for yolov2-voc.weights, or yolov2.weights of COCO
ANCHORS = []  # likewise: those of its cfg file
IMAGE_SIZE = None  # pixels, a multiple of 32; None for the checkpoint's own
# detection
CONFIDENCE_THRESHOLD = 0.005  # lowest confidence in the files; validate_detector in Darknet's examples/detector.c
NMS_IOU_THRESHOLD = 0.45  # from the same function
# run
OUTPUT_DIR = "runs/detect_txt"
MARK_DIFFICULT = False  # True: write difficult objects with a sixth word, "difficult"; False: leave them out
DEVICE = "auto"  # or "cuda", "cuda:1", "cpu"
PRECISION = "auto"  # "fp32", "bf16" or "fp16"; "auto": half precision if the device computes it faster
COMPILE = False  # torch.compile with frozen weights; pays off its start-up after a few thousand images


def check_settings():
    """Raises ValueError or OSError for an invalid setting."""
    utils.check_at_least(1, BATCH_SIZE=BATCH_SIZE)
    utils.check_at_least(0, NUM_WORKERS=NUM_WORKERS)
    utils.check_at_most(1, CONFIDENCE_THRESHOLD=CONFIDENCE_THRESHOLD, NMS_IOU_THRESHOLD=NMS_IOU_THRESHOLD)
    utils.check_writable(os.path.join(OUTPUT_DIR, "any"))


def main():
    check_settings()
    utils.keep_freed_memory()
    device = utils.pick_device(DEVICE)
    model, classes, anchors, own_size = load_detector(CHECKPOINT, CLASSES, ANCHORS, device, PRECISION, COMPILE)
    # the test set of VOC 2012 has no annotations; if no image has any, only the detections are written
    labelled = any(os.path.exists(label) for _, label in list_samples(DATA_DIR, IMAGE_SETS))
    tolerate = TOLERATE if labelled else ["missing labels"]
    dataset = VOCDataset(DATA_DIR, IMAGE_SETS, anchors, IMAGE_SIZE or own_size, classes, tolerate=tolerate)
    ids = [Path(file).stem for file, _ in dataset.samples]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"{twice}: two images of {DATA_DIR} have this name and would share their files; rename one")
    names = [name.replace(" ", "_") for name in classes]  # toolkits split lines at blanks

    detections, truths, _ = utils.detect_dataset(model, dataset, BATCH_SIZE, NUM_WORKERS, CONFIDENCE_THRESHOLD, NMS_IOU_THRESHOLD)
    detection_lines, truth_lines, class_lines = [[] for _ in ids], [[] for _ in ids], [[] for _ in names]
    for index, label, confidence, *box in detections.tolist():
        index, label = int(index), int(label)
        corners = " ".join(str(round(value)) for value in box)
        detection_lines[index].append(f"{names[label]} {confidence:.6f} {corners}")
        class_lines[label].append(f"{ids[index]} {confidence:.6f} " + " ".join(f"{value:.6f}" for value in box))
    for index, label, difficult, *box in truths.tolist():
        if difficult and not MARK_DIFFICULT:
            continue
        corners = " ".join(str(round(value)) for value in box)
        truth_lines[int(index)].append(f"{names[int(label)]} {corners}" + (" difficult" if difficult else ""))

    files = {f"detections/{name}.txt": lines for name, lines in zip(ids, detection_lines, strict=True)}
    if labelled:
        files |= {f"groundtruths/{name}.txt": lines for name, lines in zip(ids, truth_lines, strict=True)}
    else:
        print("none of the images has a label file: no ground truth is written")
    files |= {f"comp4_det_test_{name}.txt": lines for name, lines in zip(names, class_lines, strict=True)}
    for folder, ending in (("detections", "*.txt"), ("groundtruths", "*.txt"), (".", "comp4_det_test_*.txt")):
        for other in sorted(Path(OUTPUT_DIR, folder).glob(ending)):
            if other.relative_to(OUTPUT_DIR).as_posix() not in files:  # a toolkit would read it as part of this run
                raise ValueError(
                    f"{other}: left by a run over other images or classes; empty {OUTPUT_DIR}, or set another OUTPUT_DIR"
                )
    for name, lines in files.items():
        with utils.atomic_write(os.path.join(OUTPUT_DIR, name)) as temporary, open(temporary, "w", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in lines)
    kept = sum(map(len, truth_lines))
    print(f"{len(ids)} images: {len(detections)} detections and {kept} ground truths -> {OUTPUT_DIR}")


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
