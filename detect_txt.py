"""Writes a trained YOLOv2's detections, and the ground truth, as text files for evaluation toolkits and the VOC server.

    python detect_txt.py                                       the sample, with the checkpoint that train.py left
    python detect_txt.py CHECKPOINT=yolov2-voc.weights DATA_DIR=/data/VOCdevkit "IMAGE_SETS=[('2007','test')]"

Writes under `runs/detect_txt/`, in pixels of the original image, the first pixel being 1:
  detections/<image id>.txt        one line `class confidence left top right bottom` per detection, whole pixels; possibly empty
  groundtruths/<image id>.txt      one line `class left top right bottom` per object (both folders as for Padilla et al.'s toolkit)
  comp4_det_test_<class>.txt       lines `id confidence left top right bottom`, the submission files of the VOC devkit
"""

import os
import sys
from pathlib import Path

import utils
from dataset import VOC_CLASSES, VOCDataset
from model import load_detector

# data
DATA_DIR = "data_samples/voc"  # holds VOC2007/ or VOCdevkit/VOC2007/, or .csv lists
IMAGE_SETS = [("2007", "tiny")]  # the images trained on; VOC: [("2007", "test")]
NUM_WORKERS = 2  # processes that load images
BATCH_SIZE = 8  # images
# model
CHECKPOINT = "runs/yolov2.pt"  # of train.py (yolov2_best.pt: its best epoch), or a Darknet file of yolov2-voc.cfg
IMAGE_SIZE = None  # pixels, a multiple of 32; None for the checkpoint's own
# detection
CONFIDENCE_THRESHOLD = 0.005  # lowest confidence in the files; examples/detector.c, validate_detector
NMS_IOU_THRESHOLD = 0.45  # the same
# run
OUTPUT_DIR = "runs/detect_txt"
MARK_DIFFICULT = False  # True: difficult objects get a sixth word, "difficult"; False: left out, for toolkits without the flag
DEVICE = "auto"  # "cuda", "cuda:1", "cpu"
PRECISION = "auto"  # "fp32", "bf16", "fp16"; auto: half precision where the device computes it natively
COMPILE = False  # torch.compile with frozen weights; worth its start-up from some thousand images on


def main():
    utils.keep_freed_memory()
    device = utils.pick_device(DEVICE)
    model, classes, anchors, own_size = load_detector(CHECKPOINT, VOC_CLASSES, device, PRECISION, COMPILE)
    dataset = VOCDataset(DATA_DIR, IMAGE_SETS, anchors, IMAGE_SIZE or own_size, classes)
    ids = [Path(file).stem for file, _ in dataset.samples]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"{twice}: two images of {DATA_DIR} have this name and would share their files; rename one")
    names = [name.replace(" ", "_") for name in classes]  # the toolkits split a line at blanks

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
    files |= {f"groundtruths/{name}.txt": lines for name, lines in zip(ids, truth_lines, strict=True)}
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
