"""Draws a trained YOLOv2's detections on images, videos, cameras and streams.

    python detect.py                                           nine photographs of the sample, checkpoint of train.py
    python detect.py SOURCE=street.jpg CHECKPOINT=yolov2-voc.weights CONFIDENCE_THRESHOLD=0.5
    python detect.py SOURCE=clip.mp4                           a video; a folder or a glob may mix images and videos
    python detect.py SOURCE=0                                  the first camera, until Ctrl-C; or a stream:
                                                               rtsp://..., http://...

Writes each image (.jpg) and each video (.mp4, without sound) with its boxes, class names and confidences to
`runs/detections/`, and prints what was found and how long it took. A camera or stream becomes
`recording_<date>_<time>.mp4`. `detections.csv` has one row per box of this run: file, frame (of a video, from 1),
class, confidence, x1, y1, x2, y2 in pixels from 0. Ctrl-C ends the run; the video keeps the frames written so far.
"""

import csv
import glob
import os
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import utils
from dataset import IMAGE_SUFFIXES, plain_transform, read_image, to_tensor
from model import load_detector

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # draw_video's errors say the same in one sentence
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# data
SOURCE = "data_samples/voc/VOC2007/JPEGImages/00000*.jpg"  # image, video, folder, glob, camera number or stream address
# model
CHECKPOINT = "runs/yolov2.pt"  # from train.py (its best epoch is yolov2_best.pt), or a Darknet file
CLASSES = []  # only for a Darknet file: names or its .names file; [] for yolov2-voc.weights, or yolov2.weights of COCO
ANCHORS = []  # likewise: numbers or its cfg file
IMAGE_SIZE = None  # pixels, a multiple of 32; None for the checkpoint's own
# detection
CONFIDENCE_THRESHOLD = 0.4  # lowest confidence (objectness x class probability) that is drawn
NMS_IOU_THRESHOLD = 0.45  # NMS drops a box that overlaps a more confident one of its class by more than this IoU
# run
OUTPUT_DIR = "runs/detections"
DEVICE = "auto"  # or "cuda", "cuda:1", "cpu", "mps"
PRECISION = "auto"  # "fp32", "bf16" or "fp16"; "auto": half precision if the device computes it faster
COMPILE = False  # torch.compile with frozen weights; pays off after a few thousand images


def check_settings():
    """Raises ValueError or OSError for an invalid setting."""
    utils.check_settings(globals())
    utils.check_writable(os.path.join(OUTPUT_DIR, "detections.csv"))


VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp"}


def is_live(source: str) -> bool:
    # a stream or a camera, not a file or folder
    return "://" in source or (source.isdecimal() and not os.path.exists(source))


def is_image_or_video(file: Path) -> bool:
    # a hidden file: macOS adds a ._photo.jpg to each photo.jpg
    return file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not file.name.startswith(".")


def find_sources(pattern: str) -> list[str]:
    """A file, a folder (its images and videos, sorted) or a glob -> files. Raises FileNotFoundError if it has none."""
    path = Path(pattern)
    if is_live(pattern) and path.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"{pattern}: the address of an image; download it first")
    if is_live(pattern) or path.is_file():
        return [pattern if is_live(pattern) else str(path)]
    found = path.iterdir() if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    found = sorted(file for file in found if not file.is_dir())  # a folder may be called frames.mp4
    files = [str(file) for file in found if is_image_or_video(file)]
    if path.is_dir() and (deeper := sum(map(is_image_or_video, path.glob("*/**/*")))):
        print(f"{pattern}: does not draw {deeper} images and videos in its folders; a glob does ('{pattern}/**')")
    if not files:
        raise FileNotFoundError(f"{pattern}: no images or videos; set SOURCE to an image, a video, a folder or a glob")
    if others := [utils.printable(file.name) for file in found if not is_image_or_video(file)]:
        print(f"{pattern}: skipped {len(others)} files that are not images or videos (first: {others[0]})")
    return files


def output_name(source: str) -> str:
    """The file name of a source's drawing: .jpg for an image, .mp4 for a video."""
    if is_live(source):
        return time.strftime("recording_%Y%m%d_%H%M%S.mp4")  # timestamp: a later run must not replace a recording
    stem, suffix = os.path.splitext(os.path.basename(source))
    return stem + (".mp4" if suffix.lower() in VIDEO_SUFFIXES else ".jpg")


def draw_detections(image: np.ndarray, model, classes: list[str], anchors, transform, device: torch.device) -> tuple:
    """Detects on an (H, W, 3) uint8 RGB image -> the PIL image with boxes, a row (class name, confidence, x1, y1, x2,
    y2 in pixels) for each, and the milliseconds of the detection."""
    start = time.perf_counter()
    batch = to_tensor(transform(image=image, bboxes=[])["image"])[None]  # (1, 3, H, W)
    with torch.no_grad():
        predictions = model(batch.to(device))
    found = utils.postprocess(predictions, anchors, CONFIDENCE_THRESHOLD, NMS_IOU_THRESHOLD)[0]  # (K, 6)
    milliseconds = 1000 * (time.perf_counter() - start)

    height, width = image.shape[:2]
    boxes = found[:, :4] * torch.tensor([width, height, width, height])  # pixels
    numbers = torch.column_stack([found[:, 4], boxes]).double().round(decimals=4).tolist()
    rows = [(classes[int(index)], *row) for index, row in zip(found[:, 5], numbers, strict=True)]
    labels = [f"{name} {confidence:.2f}" for name, confidence, *_ in rows]
    return utils.draw_boxes(image, boxes, labels, found[:, 5]), rows, milliseconds


def draw_video(source: str, output: str, detector: tuple, table) -> tuple[int, int, Counter, bool]:
    """Writes a video file, camera or stream with its detections as MPEG-4. detector: draw_detections' arguments after
    the image; table: the csv writer of detections.csv.

    Returns the number of frames, the number that the file declares (0: none), the boxes per class over all frames, and
    whether Ctrl-C ended the video early. Raises ValueError, naming the source, if it cannot be read or stored as
    MPEG-4, and OSError, naming the output, if that cannot be written; then no new file is left.
    """
    # absolute, because FFmpeg takes 10:30.mp4 for an address; bytes, because OpenCV crashes on names that are not UTF-8
    address = os.fsencode(source if is_live(source) else os.path.abspath(source))
    video = cv2.VideoCapture(int(source)) if source.isdecimal() else cv2.VideoCapture(address, cv2.CAP_FFMPEG)
    more, frame = video.read()  # (H, W, 3) uint8, BGR
    if not more:
        raise ValueError(f"{source}: no video frame could be read; replace the file, or check camera or address")
    rate, expected = video.get(cv2.CAP_PROP_FPS), video.get(cv2.CAP_PROP_FRAME_COUNT)
    # cameras report 0 or NaN, files without a constant rate 1000 or 90000; MPEG-4 has 16 bits for the rate's numerator
    known = 0 < rate < 1000
    rate = round(rate, 1 if rate > 65 else 3) if known else 25.0
    if not known:
        expected = 0  # computed from the rate
        print(f"{source}: has no constant frame rate; its drawing gets {rate:.0f} frames per second")
    bar = tqdm(total=int(expected) if expected > 0 else None, unit="frame", leave=False, disable=None)
    frames, boxes, stopped = 0, Counter(), False
    with utils.atomic_write(output, ".mp4") as temporary, bar:
        file, size = os.fsencode(temporary), frame.shape[1::-1]  # the writer cuts off an odd last column or row
        writer = cv2.VideoWriter(file, cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
        if not writer.isOpened():
            shape = f"{size[0]} x {size[1]} pixels, {rate} frames per second"
            raise ValueError(f"{source}: could not be stored as MPEG-4 ({shape}); convert it to another size or rate")
        try:
            while more:
                picture, rows, _ = draw_detections(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), *detector)
                writer.write(cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR))
                frames += 1
                table.writerows((source, frames, *row) for row in rows)
                boxes.update(name for name, *_ in rows)
                bar.update()
                more, frame = video.read()
        except KeyboardInterrupt:
            if not frames:
                raise
            stopped = True
        finally:
            writer.release()  # adds the index, without which no player opens the file
        written = cv2.VideoCapture(file, cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT)
        if written < frames:  # the writer itself does not report a full disk
            raise OSError(f"{written:.0f} of {frames} frames")
    return frames, max(0, round(expected)), boxes, stopped


def draw_files(files: list[str], outputs: list[str], detector: tuple, table) -> None:
    """Draws all files, and prints a line for each; arguments as in draw_video. Exits with 1 if one is incomplete."""
    incomplete, stopped = 0, False
    for file, output in zip(files, outputs, strict=True):
        start = time.perf_counter()
        try:
            if output.endswith(".mp4"):
                frames, expected, names, stopped = draw_video(file, output, detector, table)
                is_exact = file.lower().endswith((".mp4", ".mov", ".avi"))  # of others, OpenCV estimates the number
                is_short = not stopped and frames < expected * (1 if is_exact else 0.9)
                incomplete += is_short and is_exact
                counted = f"{frames} of {expected} frames" if is_short else f"{frames} frames"
                duration = f"{counted} and {time.perf_counter() - start:.1f} s"
            else:
                picture, rows, milliseconds = draw_detections(read_image(file), *detector)
                utils.write_picture(output, picture.save, format="JPEG", quality=92)
                table.writerows((file, "", *row) for row in rows)
                names = Counter(name for name, *_ in rows)
                with Image.open(file) as image:  # .mpo: the other images are previews
                    pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
                duration = f"{milliseconds:.0f} ms" + (f", the first of {pages} frames" if pages > 1 else "")
        except (FileNotFoundError, ValueError) as error:  # an output that cannot be written (OSError) ends the run
            if len(files) == 1:
                raise
            print(utils.printable(f"error: {error}"))
            incomplete += 1
            continue
        summary = ", ".join(f"{count} {name}" for name, count in names.items()) or "nothing"
        print(utils.printable(f"{file}: {summary} in {duration} -> {output}"))
        if stopped:
            print(utils.printable(f"stopped by Ctrl-C: {output} contains the frames so far"))
            break
    if incomplete:
        sys.exit(f"{incomplete} of {len(files)} files could not be read, or only in part")


def main():
    check_settings()
    utils.keep_freed_memory()
    device = utils.pick_device(DEVICE)
    files = find_sources(str(SOURCE))
    model, classes, anchors, own_size = load_detector(CHECKPOINT, CLASSES, ANCHORS, device, PRECISION, COMPILE)
    detector = (model, classes, anchors, plain_transform(IMAGE_SIZE or own_size), device)
    outputs = [os.path.join(OUTPUT_DIR, output_name(file)) for file in files]
    for name, count in Counter(outputs).items():
        if count > 1:
            advice = "draw them one folder or suffix at a time"
            raise ValueError(f"{name}: {count} files of {SOURCE} would be drawn to it; {advice}")
    # by inode and device, because IMG.JPG and IMG.jpg may be one file
    identities = [{os.stat(file)[1:3]: file for file in group if os.path.exists(file)} for group in (files, outputs)]
    if overwritten := identities[0].keys() & identities[1].keys():
        source = identities[0][min(overwritten)]
        raise ValueError(f"{source}: a drawing would replace this source; set another OUTPUT_DIR")
    table = os.path.join(OUTPUT_DIR, "detections.csv")
    with open(table, "w", buffering=1, newline="", encoding="utf-8", errors="surrogateescape") as stream:
        csv.writer(stream).writerow(("file", "frame", "class", "confidence", "x1", "y1", "x2", "y2"))
        draw_files(files, outputs, detector, csv.writer(stream))


if __name__ == "__main__":
    with utils.plain_errors():
        utils.override_globals(globals(), sys.argv[1:])
        main()
