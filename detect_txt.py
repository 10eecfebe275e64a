"""Writes a trained YOLOv2's detections, and the ground truth, as text files for evaluation toolkits and the VOC server.

    python detect_txt.py                                       the sample, with the checkpoint of train.py
    python detect_txt.py CHECKPOINT=yolov2-voc.weights DATA_DIR=/data/VOCdevkit "IMAGE_SETS=[('2007','test')]"

Writes under `runs/detect_txt/`, in pixels of the original image, where the first pixel is 1:
  detections/<image id>.txt        one line `class confidence left top right bottom` per detection, whole
                                   pixels; may be empty
  groundtruths/<image id>.txt      one line `class left top right bottom` per object (both folders as for
                                   Padilla et al.'s toolkit)
  comp4_det_test_<class>.txt       lines `id confidence left top right bottom`, the submission files of the VOC devkit
and, in pixels that count from 0, for COCO.loadRes of pycocotools:
  coco_results.json                a list of {"image_id": .., "category_id": .., "bbox": [x, y, w, h], "score": ..}
"""

import json
import os
import sys
from pathlib import Path

import utils
from dataset import VOCDataset, coco_name, find_coco_image, has_labels, image_size, is_coco, list_samples
from model import load_detector

# data
DATA_DIR = "data_samples/voc"  # holds VOC2007/ or VOCdevkit/VOC2007/, or .csv, .txt or .json lists
IMAGE_SETS = [("2007", "tiny")]  # the sample's training images; VOC: [("2007", "test")]; COCO: ["val.json"]
TOLERATE = []  # "other classes": skip objects of classes the model lacks; "missing labels": unlabelled is background
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
COMPILE = False  # torch.compile with frozen weights; pays off after a few thousand images


def check_settings():
    """Raises ValueError or OSError for an invalid setting."""
    utils.check_at_least(1, BATCH_SIZE=BATCH_SIZE)
    utils.check_at_least(0, NUM_WORKERS=NUM_WORKERS)
    utils.check_at_most(1, CONFIDENCE_THRESHOLD=CONFIDENCE_THRESHOLD, NMS_IOU_THRESHOLD=NMS_IOU_THRESHOLD)
    if IMAGE_SIZE is not None and (IMAGE_SIZE < 32 or IMAGE_SIZE % 32):
        raise ValueError(f"IMAGE_SIZE must be a multiple of 32 pixels or None, not {IMAGE_SIZE}")
    utils.check_writable(OUTPUT_DIR, is_folder=True)


def coco_image_info(samples, classes):
    """-> for COCO results, per image: its id, the category id of each class, (width, height) of
    the image and of its labels.

    Ids and size of the labels are those of the COCO JSON file (category None if it lacks the class); for other
    labels, they are the file name without suffix, class index + 1, and the size of the image. Raises
    ValueError if an id occurs twice.
    """
    frames = {}
    for image_file, label_file in samples:
        image_id, category_ids = Path(image_file).stem, list(range(1, len(classes) + 1))
        size = label_size = image_size(image_file)
        if is_coco(label_file):
            _, image, categories = find_coco_image(label_file)
            image_id, label_size = image["id"], image["size"]
            ids = {coco_name(category["name"], classes): category["id"] for category in categories.values()}
            category_ids = [ids.get(name) for name in classes]
        if image_id in frames:
            raise ValueError(f"IMAGE_SETS={IMAGE_SETS}: two images have the id {image_id!r}; run each set on its own")
        frames[image_id] = (image_id, category_ids, size, label_size)
    return list(frames.values())


def coco_results(frames, detections):
    """The detections (D, 7) as COCO results, in pixels that count from 0; frames: see coco_image_info."""
    results = []
    for index, label, confidence, x1, y1, x2, y2 in detections.tolist():
        image_id, category_ids, (width, height), (label_width, label_height) = frames[int(index)]
        if category_ids[int(label)] is None:
            continue
        # devkit pixels are clipped to the last one, `width`: such a box ends at the border of the image
        right, bottom = width if x2 >= width else x2 - 1, height if y2 >= height else y2 - 1
        scale_x, scale_y = label_width / width, label_height / height
        bbox = [(x1 - 1) * scale_x, (y1 - 1) * scale_y, (right - x1 + 1) * scale_x, (bottom - y1 + 1) * scale_y]
        row = {
            "image_id": image_id,
            "category_id": category_ids[int(label)],
            "bbox": [round(value, 3) for value in bbox],
        }
        results.append(row | {"score": round(confidence, 6)})
    return results


def main():
    check_settings()
    utils.keep_freed_memory()
    device = utils.pick_device(DEVICE)
    model, classes, anchors, own_size = load_detector(CHECKPOINT, CLASSES, ANCHORS, device, PRECISION, COMPILE)
    # the test set of VOC 2012 has no annotations; if no image has any, only the detections are written
    labelled = any(has_labels(label) for _, label in list_samples(DATA_DIR, IMAGE_SETS))
    tolerate = TOLERATE if labelled else ["missing labels"]
    dataset = VOCDataset(DATA_DIR, IMAGE_SETS, anchors, IMAGE_SIZE or own_size, classes, tolerate=tolerate)
    ids = [Path(file).stem for file, _ in dataset.samples]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"{twice}: two images of {DATA_DIR} have this name and would share their files; rename one")
    if spaced := [name for name in ids if " " in name]:
        print(
            f"{len(spaced)} image ids contain spaces, {spaced[0]!r} first: "
            "the devkit cannot read their lines in comp4 files"
        )
    frames = coco_image_info(dataset.samples, classes)
    names = [name.replace(" ", "_") for name in classes]  # toolkits split lines at blanks

    # filled below
    detection_lines, truth_lines, class_lines = [[] for _ in ids], [[] for _ in ids], [[] for _ in names]
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
                    f"{other}: left by a run over other images or classes; "
                    f"empty {OUTPUT_DIR}, or set another OUTPUT_DIR"
                )

    detections, truths, _ = utils.detect_dataset(
        model, dataset, BATCH_SIZE, NUM_WORKERS, CONFIDENCE_THRESHOLD, NMS_IOU_THRESHOLD
    )
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

    files["coco_results.json"] = [json.dumps(coco_results(frames, detections))]
    for name, lines in files.items():
        with (
            utils.atomic_write(os.path.join(OUTPUT_DIR, name)) as temporary,
            open(temporary, "w", encoding="utf-8") as stream,
        ):
            stream.writelines(line + "\n" for line in lines)
    kept = sum(map(len, truth_lines))
    print(f"{len(ids)} images: {len(detections)} detections and {kept} ground truths -> {OUTPUT_DIR}")


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
