"""Writes a trained YOLOv2's detections, and the ground truth, as text files for evaluation toolkits and the VOC server.

    python detect_txt.py                                       the sample, with the checkpoint of train.py
    python detect_txt.py CHECKPOINT=yolov2-voc.weights DATA_DIR=/data/VOCdevkit "IMAGE_SETS=[('2007','test')]"

Writes under `runs/detect_txt/`, in pixels of the original image, where the first pixel is 1:
  detections/<image name>.txt      lines `class confidence left top right bottom`, possibly none, and
  groundtruths/<image name>.txt    lines `class left top right bottom`, for rafaelpadilla/Object-Detection-Metrics
  comp4_det_test_<class>.txt       lines `image confidence left top right bottom`, the submission of the VOC devkit
and, in pixels that count from 0, for COCO.loadRes of pycocotools:
  coco_results.json                a list of {"image_id": .., "category_id": .., "bbox": [x, y, w, h], "score": ..}
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import utils
from dataset import VOCDataset, coco_categories
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
IMAGE_SIZE = None  # pixels, a multiple of 32; None for the checkpoint's own
# detection
CONFIDENCE_THRESHOLD = 0.005  # lowest confidence in the files; validate_detector in Darknet's examples/detector.c
NMS_IOU_THRESHOLD = 0.45  # from the same function
# run
OUTPUT_DIR = "runs/detect_txt"
DEVICE = "auto"  # or "cuda", "cuda:1", "cpu", "mps"
PRECISION = "auto"  # "fp32", "bf16" or "fp16"; "auto": half precision if the device computes it faster
COMPILE = False  # torch.compile with frozen weights; pays off after a few thousand images


def check_settings():
    """Raises ValueError or OSError for an invalid setting."""
    utils.check_settings(globals())
    utils.check_writable(os.path.join(OUTPUT_DIR, "coco_results.json"))


def coco_results(detections, samples, classes):
    """The detections (D, 7) as COCO results, in pixels that count from 0. Category ids and image sizes are those of the
    COCO files in IMAGE_SETS, without classes that a file lacks; for other data, category ids are class index + 1."""
    declared = {}  # image id -> the image's entry in its COCO file, category ids by class name
    for file in [IMAGE_SETS] if isinstance(IMAGE_SETS, str) else IMAGE_SETS:
        if str(file).lower().endswith(".json"):
            content = json.loads(utils.read_text(os.path.join(DATA_DIR, file)))
            category_ids = {name: category_id for category_id, name in coco_categories(content, classes).items()}
            declared |= {image["id"]: (image, category_ids) for image in content["images"]}
    class_numbers = {name: index + 1 for index, name in enumerate(classes)}
    results = []
    for index, label, confidence, x1, y1, x2, y2 in detections.tolist():
        sample = samples[int(index)]
        image, category_ids = declared.get(sample.image_id, ({}, class_numbers))
        category_id = category_ids.get(classes[int(label)])
        if category_id is None:
            continue
        width, height = sample.size
        # devkit pixels are clipped to the last one, `width`: such a box ends at the border of the image
        right = width if x2 >= width else x2 - 1
        bottom = height if y2 >= height else y2 - 1
        size = image.get("width"), image.get("height")
        declared_width, declared_height = size if all(type(side) is int and side > 0 for side in size) else sample.size
        scale_x, scale_y = declared_width / width, declared_height / height
        bbox = [(x1 - 1) * scale_x, (y1 - 1) * scale_y, (right - x1 + 1) * scale_x, (bottom - y1 + 1) * scale_y]
        row = {"image_id": sample.image_id, "category_id": category_id, "bbox": [round(value, 3) for value in bbox]}
        results.append(row | {"score": round(confidence, 6)})
    return results


def main():
    check_settings()
    utils.keep_freed_memory()
    device = utils.pick_device(DEVICE)
    model, classes, anchors, own_size = load_detector(CHECKPOINT, CLASSES, ANCHORS, device, PRECISION, COMPILE)
    tolerate = [*TOLERATE, "missing labels"]
    size = IMAGE_SIZE or own_size
    dataset = VOCDataset(DATA_DIR, IMAGE_SETS, anchors, size, DATA_CLASSES or classes, tolerate=tolerate)
    if DATA_CLASSES:
        dataset = dataset.with_classes(classes, TOLERATE)
    samples = dataset.samples
    # the test set of VOC 2012 has no annotations: if no image has any, only the detections are written
    unlabelled = [sample.image_file for sample in samples if not sample.label_file]
    is_labelled = len(unlabelled) < len(samples)
    if unlabelled and is_labelled and "missing labels" not in TOLERATE:
        advice = "make one, or set TOLERATE=['missing labels'] if such images have no objects"
        raise FileNotFoundError(f"{unlabelled[0]}: has no label file, but other images have one; {advice}")
    paths = [Path(os.path.abspath(sample.image_file)).with_suffix("") for sample in samples]
    image_names = [path.name for path in paths]
    if len(set(image_names)) < len(paths):  # frames of two videos: with the folders in which they differ
        shared = os.path.commonpath([path.parent for path in paths])
        image_names = [utils.file_name(os.path.relpath(path, shared)) for path in paths]
        samples = [
            sample._replace(image_id=name) if sample.image_id == path.name else sample
            for sample, name, path in zip(samples, image_names, paths, strict=True)
        ]
    for kind, values in (("name", image_names), ("id", [sample.image_id for sample in samples])):
        value, count = Counter(values).most_common(1)[0]
        if count > 1:
            advice = "rename or remove one, or run each set on its own"
            raise ValueError(f"IMAGE_SETS={IMAGE_SETS}: two images have the {kind} {value!r}; {advice}")
    if spaced := [name for name in image_names if " " in name]:
        print(f"the devkit cannot read comp4 lines of the {len(spaced)} image names with spaces (first: {spaced[0]!r})")

    class_names = [utils.file_name(name) for name in classes]
    files = {f"detections/{name}.txt": [] for name in image_names}  # file -> lines
    files |= {f"comp4_det_test_{name}.txt": [] for name in class_names}
    if is_labelled:
        files |= {f"groundtruths/{name}.txt": [] for name in image_names}
    else:
        print("none of the images has a label file: no ground truth is written")
    for pattern in ("detections/*.txt", "groundtruths/*.txt", "comp4_det_test_*.txt"):
        for other in sorted(Path(OUTPUT_DIR).glob(pattern)):
            if other.relative_to(OUTPUT_DIR).as_posix() not in files:  # a toolkit would read it as part of this run
                advice = f"empty {OUTPUT_DIR}, or set another OUTPUT_DIR"
                raise ValueError(f"{other}: left by a run over other images or classes; {advice}")

    thresholds = CONFIDENCE_THRESHOLD, NMS_IOU_THRESHOLD
    detections, truths, _ = utils.detect_dataset(model, dataset, BATCH_SIZE, NUM_WORKERS, *thresholds)
    for index, label, confidence, *box in detections.tolist():
        image_name, class_name = image_names[int(index)], class_names[int(label)]
        numbers = " ".join(f"{value:.6f}" for value in (confidence, *box))
        files[f"detections/{image_name}.txt"].append(f"{class_name} {numbers}")
        files[f"comp4_det_test_{class_name}.txt"].append(f"{image_name} {numbers}")
    truths = truths[truths[:, 2] == 0]  # toolkits do not know difficult objects
    for index, label, _, *box in truths.tolist():
        line = " ".join([class_names[int(label)], *(f"{value:.6f}".removesuffix(".000000") for value in box)])
        files[f"groundtruths/{image_names[int(index)]}.txt"].append(line)
    files["coco_results.json"] = [json.dumps(coco_results(detections, samples, classes))]

    for name, lines in files.items():
        utils.write_file(os.path.join(OUTPUT_DIR, name), "".join(line + "\n" for line in lines).encode())
    print(f"{len(samples)} images: {len(detections)} detections and {len(truths)} ground truths -> {OUTPUT_DIR}")


if __name__ == "__main__":
    with utils.plain_errors():
        utils.override_globals(globals(), sys.argv[1:])
        main()
