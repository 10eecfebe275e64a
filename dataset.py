"""Data sets: Pascal VOC in the devkit's layout, lists of files, COCO JSON, ImageNet; augmentation,
targets and k-means anchors.

Order: augmentation, targets, data set, batches, ImageNet, anchors; then readers of images, lists and labels; then the
checks of `python dataset.py DATA_DIR=... IMAGE_SETS=...`. Run it before a long training: it prints the objects per
class, every unusable file with the reason, and how well the anchors fit, and draws augmented samples with their boxes
to `runs/label_sheet.png`.

Letters: G objects in a label file, difficult ones included, M boxes of a training sample, A anchors (5),
S_h x S_w grid cells (13 x 13 at 416 x 416). Rows are y, columns are x. Devkit pixels: the first pixel is 1, and
boxes include both end pixels.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import random
import re
import struct
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import checks online for a newer version

import albumentations
import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, get_worker_info
from torchvision.datasets import ImageFolder
from torchvision.ops import box_convert
from tqdm import tqdm

import utils

cv2.setNumThreads(0)  # one thread per process, because the loader's workers run in parallel

Image.preinit()  # JPEG and PNG first: Image.open tries the formats in the order in which they were loaded
# every format that Pillow reads, without MPEG videos; .mpo (two JPEGs in one file) is missing
# because Pillow opens it as JPEG
IMAGE_SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
IMAGE_SUFFIXES = IMAGE_SUFFIXES - {".mpg", ".mpeg"} | {".mpo"}

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

COCO_CLASSES = (  # coco.names
    "person", "bicycle", "car", "motorbike", "aeroplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "sofa", "pottedplant", "bed", "diningtable", "toilet",
    "tvmonitor", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

# data
DATA_DIR = "data_samples/voc"  # holds VOC2007/ or VOCdevkit/VOC2007/, or .csv, .txt or .json lists
IMAGE_SETS = [("2007", "train")]  # (year, list) or files in DATA_DIR: .csv (image,label), Darknet .txt, COCO .json
CLASSES = VOC_CLASSES  # any names, or a Darknet .names file
TOLERATE = []  # "other classes": skip objects that CLASSES does not name; "missing labels": unlabelled is background
# model
IMAGE_SIZE = 416  # pixels of the sheet's samples, a multiple of 32
# run
SHEET = "runs/label_sheet.png"  # augmented samples with boxes
SHEET_IMAGES = 20  # samples on the sheet
SEED = 0

# ---------------------------------------------------------------- augmentation


class DarknetColour(albumentations.ImageOnlyTransform):
    """Darknet's random_distort_image (src/image.c): in HSV, shifts the hue by up to `hue` of the circle, and multiplies
    saturation and value by random factors of up to `saturation` and `exposure`, or their inverses. Albumentations' own
    colour jitters add instead, or blend with grey."""

    def __init__(self, hue: float, saturation: float, exposure: float):
        super().__init__(p=1.0)
        self.hue, self.saturation, self.exposure = hue, saturation, exposure

    def get_params(self) -> dict:
        def factor(limit):
            scale = self.py_random.uniform(1, limit)
            return scale if self.py_random.random() < 0.5 else 1 / scale

        shift = self.py_random.uniform(-self.hue, self.hue)
        return {"shift": shift, "factors": (factor(self.saturation), factor(self.exposure))}

    def apply(self, image: np.ndarray, shift: float, factors: tuple, **params) -> np.ndarray:
        # FULL: a full circle of hues is 256 steps, so uint8 arithmetic wraps around correctly
        hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL))
        hue += np.uint8(round(shift * 256) % 256)
        image = cv2.cvtColor(cv2.merge([hue, saturation, value]), cv2.COLOR_HSV2RGB_FULL)
        # Each channel is V (1 - S u), where u depends on the hue alone. The factors s of S and v of V make it
        # v V (1 - s S u), which is v s times the channel plus v (1 - s) V: no second conversion, and only the result
        # is clipped, as in Darknet.
        s, v = factors
        return cv2.addWeighted(image, v * s, cv2.merge([value, value, value]), v * (1 - s), 0)


def train_transform(image_size: int) -> albumentations.Compose:
    """Augmentation to a square of image_size pixels: moves each side in or out by up to a fifth of the image, repeating
    the border, flips, and distorts the colours (load_data_detection and crop_image in Darknet when the paper was
    written). Boxes (M, 5): xyxy in fractions, class; those with less than a tenth of their area left are dropped."""
    transforms = [
        # percent is drawn for each side; negative values crop
        albumentations.CropAndPad(percent=(-0.2, 0.2), keep_size=False, border_mode=cv2.BORDER_REPLICATE),
        albumentations.Resize(image_size, image_size, interpolation=cv2.INTER_LINEAR),
        albumentations.HorizontalFlip(p=0.5),
        DarknetColour(hue=0.1, saturation=1.5, exposure=1.5),
    ]
    boxes = albumentations.BboxParams(  # checking the boxes once, at the end, gives the same result in less time
        format="albumentations", min_visibility=0.1, clip=True, filter_invalid_bboxes=True, check_each_transform=False
    )
    return albumentations.Compose(transforms, bbox_params=boxes)


def plain_transform(image_size: int) -> albumentations.Compose:
    """Stretches the whole image to a square of image_size pixels, with its boxes (M, 5): xyxy in fractions, class."""
    resize = albumentations.Resize(image_size, image_size, interpolation=cv2.INTER_LINEAR)
    boxes = albumentations.BboxParams(format="albumentations", clip=True, filter_invalid_bboxes=True)
    return albumentations.Compose([resize], bbox_params=boxes)


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W), both uint8: a quarter of float32's bytes on the way to the device; the
    network divides by 255."""
    return torch.from_numpy(image).permute(2, 0, 1)


# ---------------------------------------------------------------- targets


def encode_targets(boxes, class_indices, anchors, grid_height: int, grid_width: int) -> Tensor:
    """boxes: (M, 4) cxcywh in fractions of the image; class_indices: (M,); anchors: A pairs in grid cells ->
    (A, S_h, S_w, 6) float32: object (1 or 0), x, y (offset in the cell, 0..1), w, h (in grid cells), class; zeros
    where there is no object.

    An object belongs to the cell of its centre and to the anchor with the best IoU of shapes. If two objects claim the
    same slot, the later one gets it (forward_region_layer in Darknet's src/region_layer.c, which sees an image's
    objects in random order).
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    anchors = np.asarray(anchors, dtype=np.float64)
    targets = np.zeros((len(anchors), grid_height, grid_width, 6), dtype=np.float32)
    x, y, w, h = (boxes * [grid_width, grid_height, grid_width, grid_height]).T  # in grid cells
    column = np.clip(x.astype(int), 0, grid_width - 1)  # for a centre on the right or lower border
    row = np.clip(y.astype(int), 0, grid_height - 1)
    anchor = shape_iou(np.stack([w, h], axis=1), anchors).argmax(dim=1).numpy()
    values = np.stack(
        [np.ones_like(x), x - column, y - row, w, h, np.asarray(class_indices, dtype=np.float64).reshape(-1)], axis=1
    )
    targets[anchor, row, column] = values  # numpy writes in order: the later object wins a shared slot
    return torch.from_numpy(targets)


def shape_iou(sizes, anchors) -> Tensor:
    """IoU of shapes alone, all boxes at the same centre: sizes (M, 2), anchors (A, 2) of the same
    unit -> (M, A) float64."""
    boxes = F.pad(torch.as_tensor(sizes, dtype=torch.float64), (2, 0))  # (M, 4) cxcywh with centres at 0
    anchor_boxes = F.pad(torch.as_tensor(anchors, dtype=torch.float64), (2, 0))  # (A, 4)
    return utils.box_iou(boxes[:, None], anchor_boxes)


# ---------------------------------------------------------------- the data set


class VOCDataset(Dataset):
    """Images and encoded targets of VOC image sets or of lists of files (see list_samples).

    anchors: A pairs in grid cells; image_size: pixels, a multiple of 32; limit: use only the first `limit` images;
    tolerate: see read_labels. All labels are read at once, so that errors show before training. Difficult objects are
    ground truth but not targets, as in Darknet's voc_label.py. Raises FileNotFoundError or ValueError, naming the file.
    """

    def __init__(
        self, root, image_sets, anchors, image_size=416, classes=VOC_CLASSES, augment=False, limit=None, tolerate=()
    ):
        if image_size % 32 or not 32 <= image_size < 10_000:
            raise ValueError(f"IMAGE_SIZE must be a multiple of 32 pixels, not {image_size}")
        if unknown := set(tolerate) - {"other classes", "missing labels"}:
            raise ValueError(f'TOLERATE takes "other classes" and "missing labels", not {unknown.pop()!r}')
        self.anchors, self.image_size, self.classes, self.augment = anchors, image_size, read_classes(classes), augment
        self.samples = list_samples(root, image_sets)[:limit]
        read = [read_labels(label_file, self.classes, tolerate) for _, label_file in self.samples]
        self.labels = [labels for labels, _ in read]  # (G, 6) each, in the units of read_labels
        self.declared_sizes = [size for _, size in read]  # (width, height) of each image according to its label file
        self.transforms = {}  # one per image size
        self.broken_list = ""  # see read_or_next

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """key: an index, or (index, image size, seed of the augmentation) -> image (3, H, W) uint8, targets
        (A, S_h, S_w, 6). Size and seed are part of the key because a worker process does not see later
        changes of the data set."""
        index, size, seed = key if isinstance(key, tuple) else (key, self.image_size, None)
        if size not in self.transforms:
            self.transforms[size] = train_transform(size) if self.augment else plain_transform(size)
        if self.augment and seed is not None:
            # one generator for all: set_random_seed would give each transform the same numbers,
            # and correlate flip and hue
            self.transforms[size].set_random_state(np.random.default_rng(seed), random.Random(seed))
        image, index = read_or_next(self.samples, index, self.broken_list)
        height, width = image.shape[:2]
        labels = self.labels[index][self.labels[index][:, 1] == 0]  # without difficult objects
        fractions = boxes_in_fractions(labels[:, 2:], self.samples[index][1], width, height)
        augmented = self.transforms[size](image=image, bboxes=np.column_stack([fractions, labels[:, 0]]))
        boxes = np.asarray(augmented["bboxes"], dtype=np.float64).reshape(-1, 5)  # (M, 5) xyxy, class
        cxcywh = box_convert(torch.from_numpy(boxes[:, :4]), "xyxy", "cxcywh")
        return to_tensor(augmented["image"]), encode_targets(cxcywh, boxes[:, 4], self.anchors, size // 32, size // 32)

    def ground_truth(self, index: int, size: tuple[int, int] | None = None) -> tuple[Tensor, str]:
        """-> (G, 6) float64: class, difficult, x1, y1, x2, y2 in devkit pixels of the original image; and the image id.
        size: width and height of the image, if they are already known."""
        image_file, label_file = self.samples[index]
        labels = self.labels[index].copy()
        if not is_voc_xml(label_file):
            labels[:, 2:] = utils.to_devkit_pixels(labels[:, 2:], *(size or image_size(image_file)))
        return torch.from_numpy(labels), Path(image_file).stem

    def images_and_sizes(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """For utils.detect_dataset: a batch without augmentation (N, 3, H, W) uint8, and the original
        widths and heights (N, 2)."""
        transform, images, sizes = plain_transform(self.image_size), [], []
        for index in indices:
            image = read_image(self.samples[index][0])
            images.append(to_tensor(transform(image=image, bboxes=np.empty((0, 5)))["image"]))
            sizes.append(image.shape[1::-1])
        batch = torch.stack(images)
        if get_worker_info():
            batch.share_memory_()  # in a worker: if /dev/shm is full, fail here, where the main process gets the error
        return batch, torch.tensor(sizes)


# ---------------------------------------------------------------- batches


def steps_per_epoch(count: int, batch_size: int, subdivisions: int = 1) -> int:
    """Optimiser steps per epoch of `count` images: the number of full batches, or 1 if the images do not fill one."""
    if count < batch_size and subdivisions > 1:
        advice = "lower BATCH_SIZE, or set SUBDIVISIONS=1 (DDP: in one process)"
        raise ValueError(f"{count} images per epoch do not fill a batch of {batch_size}; {advice}")
    return max(1, count // batch_size)


def training_batches(
    count: int,
    batch_size: int,
    subdivisions: int,
    image_sizes: list[int],
    seed: int,
    first_step: int = 0,
    repeat: int = 1,
) -> Iterator[list[tuple[int, int, int]]]:
    """Yields endlessly, from optimiser step first_step on, lists of batch_size / subdivisions VOCDataset keys: the
    images of one forward pass. `subdivisions` of these lists make one step (gradient accumulation).

    An epoch is `repeat` permutations of the `count` images, without a last partial batch unless it is the only one. A
    new size is drawn every 10 steps (YOLO9000 sec. 2, multi-scale training). All of it depends on seed and step alone,
    so a resumed run sees the same batches as an uninterrupted one.
    """
    steps = steps_per_epoch(count * repeat, batch_size, subdivisions)
    part_size = batch_size // subdivisions  # images per forward pass
    for epoch in itertools.count(first_step // steps):
        rng = np.random.default_rng([seed, epoch])
        order = np.concatenate([rng.permutation(count) for _ in range(repeat)])
        seeds = rng.integers(2**31, size=len(order))
        for step in range(max(epoch * steps, first_step), (epoch + 1) * steps):
            # the 1: not the stream of [seed, epoch]
            size = int(np.random.default_rng([seed, step // 10, 1]).choice(image_sizes))
            first = (step - epoch * steps) * batch_size
            for start in range(first, first + batch_size, part_size):
                keys = zip(order[start : start + part_size], seeds[start : start + part_size], strict=True)
                yield [(int(index), size, int(augmentation_seed)) for index, augmentation_seed in keys]


def files_of_step(samples: list[tuple], batches: Iterator, subdivisions: int) -> list[str]:
    """The image files of the next optimiser step; `batches` comes from training_batches."""
    return [samples[index][0] for batch in itertools.islice(batches, subdivisions) for index, _, _ in batch]


# ---------------------------------------------------------------- ImageNet


class DarknetCrop(albumentations.ImageOnlyTransform):
    """Darknet's random_augment_image in one resampling: stretches the image by an aspect ratio between 3/4 and
    4/3, scales it to a short side in the range `sides`, rotates it by up to 7 degrees and crops a square of `size`
    at random (darknet19.cfg).

    Ours: `sides` limits the short side of the stretched image. Darknet computes it with the inverse aspect.
    """

    def __init__(self, size: int, sides: tuple[float, float]):
        super().__init__(p=1.0)
        self.size, self.sides = size, sides

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        height, width = params["shape"][:2]
        aspect = self.py_random.uniform(0.75, 1)
        aspect = aspect if self.py_random.random() < 0.5 else 1 / aspect
        scale = self.py_random.uniform(*self.sides) / min(height, width * aspect)
        scale_x, scale_y = scale * aspect, scale
        # largest offset of the square's centre from the image's centre, in pixels of the scaled image
        max_dx, max_dy = abs(width * scale_x - self.size) / 2, abs(height * scale_y - self.size) / 2
        dx, dy = self.py_random.uniform(-max_dx, max_dx), self.py_random.uniform(-max_dy, max_dy)
        angle = math.radians(self.py_random.uniform(-7.0, 7.0))
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        matrix = rotation @ np.diag([scale_x, scale_y])
        shift = np.array([self.size / 2 + dx, self.size / 2 + dy]) - matrix @ np.array([width / 2, height / 2])
        return {"matrix": np.column_stack([matrix, shift])}

    def apply(self, image: np.ndarray, matrix: np.ndarray, **params) -> np.ndarray:
        return cv2.warpAffine(
            image, matrix, (self.size, self.size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )


class ImageNetFolder(ImageFolder):
    """torchvision's ImageFolder, indexed like VOCDataset: -> image (3, size, size) uint8, class index. If `broken_list`
    is set, training replaces an unreadable image by the next one, and validation gives it the label -100."""

    def __init__(self, folder: str, image_size: int, augment: bool, crop_scale: tuple[float, float]):
        self.skipped = []
        super().__init__(folder, is_valid_file=self.is_image)
        self.image_size, self.augment, self.crop_scale, self.transforms = image_size, augment, crop_scale, {}
        self.broken_list = ""  # see read_or_next

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """As in torchvision, but without hidden folders such as .ipynb_checkpoints."""
        classes, _ = super().find_classes(directory)
        classes = utils.check_classes(directory, [name for name in classes if not name.startswith(".")])
        return classes, {name: index for index, name in enumerate(classes)}

    def is_image(self, file: str) -> bool:
        # .ipynb_checkpoints in a class folder
        if any(part.startswith(".") for part in Path(file).relative_to(self.root).parts):
            return False
        if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:
            return True
        self.skipped.append(file)
        return False

    def __getitem__(self, key: int | tuple[int, int, int]) -> tuple[Tensor, int]:
        index, size, seed = key if isinstance(key, tuple) else (key, self.image_size, None)
        if size not in self.transforms:
            if self.augment:
                crop = DarknetCrop(size, (size * self.crop_scale[0], size * self.crop_scale[1]))
                transforms = [
                    crop,
                    albumentations.HorizontalFlip(p=0.5),
                    DarknetColour(hue=0.1, saturation=4 / 3, exposure=4 / 3),  # cfg: .75, so 3/4 to 4/3
                ]
            else:
                transforms = [albumentations.SmallestMaxSize(size), albumentations.CenterCrop(size, size)]
            self.transforms[size] = albumentations.Compose(transforms)
        if self.augment and seed is not None:
            # one generator for all transforms, as in VOCDataset
            self.transforms[size].set_random_state(np.random.default_rng(seed), random.Random(seed))
        image, read_index = read_or_next(self.samples, index, self.broken_list)
        # validation counts no image twice
        label = self.samples[read_index][1] if self.augment or read_index == index else -100
        return to_tensor(self.transforms[size](image=image)["image"]), label


def imagenet_dataset(
    root, split: str, image_size: int, augment: bool, crop_scale=(0.5, 1.75), classes=None
) -> ImageNetFolder:
    """The images of root/split/<wnid>/, ImageNet's usual layout; classes are the sorted wnids.

    augment: the crops, rotations, flips and colours of darknet19.cfg; otherwise the centre square. crop_scale: smallest
    and largest short side of the scaled image, relative to the crop (Darknet's min_crop and max_crop over its input:
    128 and 448 over 256 in darknet19.cfg, 448 and 512 over 448 in darknet19_448.cfg). classes: the wnids that must be
    there. Raises FileNotFoundError or ValueError, naming the folder.
    """
    if not (len(crop_scale) == 2 and 0 < crop_scale[0] <= crop_scale[1]):
        raise ValueError(f"CROP_SCALE {crop_scale} must be two increasing numbers above 0, such as (0.5, 1.75)")
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"{folder}: no such folder; DATA_DIR must hold train/ and val/ with one folder per class"
        )
    if not any(entry.is_dir() for entry in os.scandir(folder)):
        raise ValueError(
            f"{folder}: its images are not in class folders; move each to {split}/<wnid>/. For ImageNet's flat val/, "
            "line n of the devkit's ILSVRC2012_validation_ground_truth.txt is the ILSVRC2012_ID of image n, and "
            "meta.mat gives its wnid"
        )
    try:
        dataset = ImageNetFolder(folder, image_size, augment, crop_scale)
    except FileNotFoundError as error:  # torchvision's error for class folders without images
        raise ValueError(f"{folder}: {utils.first_line(error)}") from None
    if dataset.skipped:
        print(f"{folder}: skipped {len(dataset.skipped)} files that are not images (first: {dataset.skipped[0]})")
    if classes is not None and dataset.classes != classes:
        unshared = sorted(set(dataset.classes) ^ set(classes))
        raise ValueError(
            f"{root}: train/ and val/ have different class folders ({', '.join(unshared[:5])}); both need all of them"
        )
    return dataset


# ---------------------------------------------------------------- anchors


def average_best_iou(box_sizes, anchors) -> float:
    """Mean IoU of shapes between each box and its best anchor (YOLO9000 Table 1); sizes and
    anchors in the same unit."""
    return float(shape_iou(box_sizes, anchors).amax(dim=1).mean())


def kmeans_anchors(box_sizes, k: int, seeds: int = 5) -> Tensor:
    """k-means with the distance 1 - IoU (YOLO9000 sec. 2, dimension clusters), the best of `seeds` starts. box_sizes:
    (B, 2) widths and heights -> anchors (k, 2) in the same unit, by rising area. Raises ValueError if B < k.

    Ours: medians instead of means, because they fit better (tests/MEASUREMENTS.md, Anchors).
    """
    box_sizes = torch.as_tensor(np.asarray(box_sizes), dtype=torch.float64)
    if len(box_sizes) < k:
        raise ValueError(f"{len(box_sizes)} boxes are too few for {k} anchors")
    best, best_iou = None, -1.0
    for seed in range(seeds):
        anchors = box_sizes[np.random.default_rng(seed).choice(len(box_sizes), k, replace=False)]
        for _ in range(300):
            previous = anchors.clone()
            nearest = shape_iou(box_sizes, anchors).argmax(dim=1)  # the largest IoU is the smallest distance
            for cluster in range(k):
                if (nearest == cluster).any():
                    anchors[cluster] = box_sizes[nearest == cluster].median(dim=0).values
            if torch.equal(anchors, previous):
                break
        if (iou := average_best_iou(box_sizes, anchors)) > best_iou:
            best, best_iou = anchors, iou
    return best[best.prod(dim=1).argsort()]


# ---------------------------------------------------------------- reading images


@contextlib.contextmanager
def open_image(file: str | os.PathLike):
    """PIL's Image.open; any error in the block becomes a FileNotFoundError or ValueError that names the file."""
    try:
        with Image.open(file) as image:
            if image.format == "PNG":
                image.verify()  # its checksums, which reading ignores
            else:
                yield image
                return
        with Image.open(file) as image:  # verify() leaves it unusable
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such image") from None
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{file}: not a readable image ({utils.first_line(error)}); replace it or take it off the list"
        ) from None


def read_image(file: str | os.PathLike) -> np.ndarray:
    """Reads an image of any mode as a viewer shows it (EXIF rotation applied, transparent parts white) -> (H, W, 3)
    uint8 RGB. Raises FileNotFoundError or ValueError, naming the file."""
    with open_image(file) as image:
        with contextlib.suppress(SyntaxError, TypeError, ValueError, KeyError, struct.error):  # unreadable EXIF data
            ImageOps.exif_transpose(image, in_place=True)  # in place: the default copies every image, rotated or not
        if image.mode.startswith("I;16"):  # 16-bit grey: keep the upper eight bits
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("32-bit greyscale has no defined value range; save it with 8 bits")
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def image_size(file: str | os.PathLike) -> tuple[int, int]:
    """Width and height in pixels of what read_image returns, from the file's header alone. Raises the same errors."""
    with open_image(file) as image:
        if image.format != "TIFF":
            orientation = 1
            with contextlib.suppress(SyntaxError, TypeError, ValueError, KeyError, struct.error):
                orientation = image.getexif().get(0x0112, 1)
            rotated = orientation in (5, 6, 7, 8)  # by 90 degrees
            return (image.height, image.width) if rotated else (image.width, image.height)
    return read_image(file).shape[1::-1]  # some versions of Pillow rotate TIFF images on opening


def read_or_next(samples: list[tuple], index: int, broken_list: str) -> tuple[np.ndarray, int]:
    """The image of samples[index] and its index. Raises FileNotFoundError or ValueError for an unreadable image;
    but if broken_list names a file, lists the image there and returns the next readable one, so that one bad file
    does not end a long run."""
    for _ in range(len(samples)):
        try:
            return read_image(samples[index][0]), index
        except (OSError, ValueError) as error:
            if not broken_list:
                raise
            os.makedirs(os.path.dirname(os.path.abspath(broken_list)), exist_ok=True)
            # the loader's workers share the file; a file name need not be UTF-8
            with open(broken_list, "a+", encoding="utf-8", errors="surrogateescape") as stream:
                stream.seek(0)
                if f"{error}\n" not in stream:
                    stream.write(f"{error}\n")
            index = (index + 1) % len(samples)
    raise ValueError(f"none of the {len(samples)} images can be read; {broken_list} lists them")


# ---------------------------------------------------------------- reading lists and labels


def read_text(file: str | os.PathLike, missing: str = "no such file") -> str:
    """Reads UTF-8 or, with a byte order mark, UTF-16. Raises FileNotFoundError (with the text
    `missing`) or ValueError."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: {missing}")
    content = Path(file).read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # also UTF-16 and UTF-32 without a byte order mark
        raise ValueError(f"{file}: not UTF-8 text; save it as UTF-8")
    return text


def read_classes(classes) -> list[str]:
    """Class names from a list or a Darknet `.names` file (one per line). Raises FileNotFoundError, or
    ValueError for bad names: empty, repeated (`a b` and `a_b` would share a file of results), or with control
    characters or slashes."""
    source = "CLASSES"
    if isinstance(classes, str):
        source, missing = classes, "no such file of class names; CLASSES is a list of names or a .names file"
        classes = [line.strip() for line in read_text(source, missing).splitlines() if line.strip()]
    return utils.check_classes(source, list(classes))


def list_samples(root: str | os.PathLike, image_sets) -> list[tuple[str, str]]:
    """Pairs (image file, label file) of a data set, in list order.

    image_sets: (year, list) pairs of the VOC devkit, or names of list files in root: `.csv` with lines `image,label`,
    Darknet's `.txt` with one image per line (images/x.jpg has labels/x.txt), or COCO's `.json`, whose label files are
    called `x.json#<image id>`. If it is empty, root is itself a csv or JSON file. Raises FileNotFoundError or
    ValueError, naming what is missing.
    """
    if os.fspath(root).lower().endswith((".csv", ".json")):
        if image_sets:
            raise ValueError(f"{root}: DATA_DIR must be the folder of the lists that IMAGE_SETS names ({image_sets})")
        root, image_sets = os.path.dirname(root), [os.path.basename(root)]
    if isinstance(image_sets, str) or (len(image_sets) == 2 and str(image_sets[0]).isdigit()):
        image_sets = [image_sets]  # a single set, not in a list
    samples = []
    for image_set in image_sets:
        if isinstance(image_set, str) and image_set.lower().endswith(".csv"):
            samples += read_csv_list(os.path.join(root, image_set))
        elif isinstance(image_set, str) and image_set.lower().endswith(".txt"):
            samples += read_darknet_list(os.path.join(root, image_set))
        elif isinstance(image_set, str) and image_set.lower().endswith(".json"):
            samples += read_coco_list(os.fspath(root), os.path.join(root, image_set))
        elif isinstance(image_set, (tuple, list)) and len(image_set) == 2:
            samples += read_voc_list(Path(root), *image_set)
        else:
            forms = "[('2007', 'trainval')], ['train.csv'], ['train.txt'] or ['train.json']"
            raise ValueError(f"IMAGE_SETS holds {image_set!r}; it takes {forms}")
    if not samples:
        raise ValueError(f"{root}: the lists {image_sets} name no image")
    return samples


def read_voc_list(root: Path, year: str, name: str) -> list[tuple[str, str]]:
    """The images of a list of the VOC devkit; their files may have any suffix."""
    folders = [root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}"]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{folders[0]}: no such folder; DATA_DIR must hold VOC{year} or VOCdevkit/VOC{year}")
    missing = "no such list of images; name another one in IMAGE_SETS"
    lines = read_text(folder / "ImageSets" / "Main" / f"{name}.txt", missing).splitlines()
    image_folder, files, samples = folder / "JPEGImages", {}, []
    for file in os.listdir(image_folder) if image_folder.is_dir() else []:
        image_id, suffix = os.path.splitext(file)
        if suffix.lower() in IMAGE_SUFFIXES:
            files.setdefault(image_id, []).append(file)
    for image_id in filter(None, map(str.strip, lines)):
        *first, last = image_id.rsplit(maxsplit=1)
        if image_id not in files and first and last in ("-1", "0", "1"):  # the second column of a list per class
            image_id = first[0]
        found = files.get(image_id, [f"{image_id}.jpg"])
        if len(found) > 1:
            raise ValueError(f"{image_folder}: {' and '.join(sorted(found))} are both images of {image_id}; remove one")
        samples.append((f"{image_folder}/{found[0]}", f"{folder}/Annotations/{image_id}.xml"))
    return samples


def read_csv_list(file: str) -> list[tuple[str, str]]:
    """Lines `image,label` -> pairs of paths, both relative to the csv file; a header line of
    these two words is skipped."""
    try:
        rows = list(csv.reader(io.StringIO(read_text(file, "no such list of images"), newline="")))
    except csv.Error as error:
        raise ValueError(f"{file}: not readable as csv ({error}); look for an unbalanced quote") from None
    samples = []
    for number, row in enumerate(rows, start=1):
        row = [cell.strip() for cell in row]
        if not any(row) or (number == 1 and row == ["image", "label"]):
            continue
        line = ",".join(row)
        if len(row) != 2 or not row[1].lower().endswith((".xml", ".txt")) or utils.printable(line) != line:
            found = utils.printable(line[:80])
            raise ValueError(f"{file}, line {number}: expected image,label with a .xml or .txt label, found {found!r}")
        samples.append(tuple(join_path([os.path.dirname(file)], cell) for cell in row))
    return samples


def read_darknet_list(file: str) -> list[tuple[str, str]]:
    """Lines with an image path relative to the list -> pairs with the label file. As in Darknet, `images` or
    `JPEGImages` in its path becomes `labels` (ours: only the last such folder) and the suffix `.txt`."""
    samples = []
    for line in filter(None, map(str.strip, read_text(file, "no such list of images").splitlines())):
        image = join_path([os.path.dirname(file)], line)
        label = re.sub(r"(^|.*[\\/])(JPEGImages|images)([\\/])", r"\1labels\3", image, count=1)
        samples.append((image, os.path.splitext(label)[0] + ".txt"))
    return samples


def read_coco_list(root: str, file: str) -> list[tuple[str, str]]:
    """The images of a COCO JSON file -> pairs (image file, `<file>#<image id>`); sizes that the file
    lacks come from the images."""
    name = Path(file).stem.rpartition("_")[2]  # COCO's own layout: the images of instances_val2017.json are in val2017/
    folders = [
        os.path.join(base, part)
        for base in (os.path.dirname(file), root)
        for part in ("", "images", name, f"../{name}")
    ]
    folders = list(dict.fromkeys(map(os.path.normpath, folders)))
    samples = []
    for image_id, image in read_coco(file)[0].items():
        path = join_path(folders, image["file_name"])
        if not os.path.isfile(path):
            places = ", ".join(folders)
            raise FileNotFoundError(
                f"{file}: its image {image['file_name']!r} is in none of the folders {places}; set DATA_DIR"
            )
        image["size"] = image["size"] or image_size(path)
        samples.append((path, f"{file}#{image_id}"))
    return samples


def join_path(folders: list[str], name: str) -> str:
    """The path of a file that a list names, relative to one of the folders or else (as in Darknet) to the working
    directory; a list made on Windows may separate folders by backslashes."""
    names = (name, name.replace("\\", "/"))
    paths = [os.path.join(folder, each) for folder in folders for each in names] + [name]
    return next(filter(os.path.isfile, paths), paths[1])


def read_labels(label_file: str, classes, tolerate=()) -> tuple[np.ndarray, tuple[int, int]]:
    """-> (G, 6) float64: class, difficult, x1, y1, x2, y2; and width and height that the file declares for the
    image, or (0, 0). The boxes of a VOC `.xml` are in devkit pixels, those of a YOLO `.txt` or COCO `.json#<image
    id>` in fractions of the image.

    tolerate: "other classes" skips objects of classes that are not in `classes`; "missing labels" reads a missing file
    as one without objects. Raises FileNotFoundError or ValueError, naming the file.
    """
    read = read_voc_xml if is_voc_xml(label_file) else read_coco_labels if is_coco(label_file) else read_yolo_txt
    try:
        labels, size = read(label_file, classes, tolerate)
    except FileNotFoundError:
        if "missing labels" not in tolerate:
            advice = "make one, or set TOLERATE=['missing labels'] if such images have no objects"
            raise FileNotFoundError(f"{label_file}: no such label file, but a list names it; {advice}") from None
        labels, size = [], (0, 0)
    return np.array(labels, dtype=np.float64).reshape(-1, 6), size


def is_voc_xml(label_file: str) -> bool:
    return label_file.lower().endswith(".xml")


def is_coco(label_file: str) -> bool:
    return ".json#" in label_file.lower()


def has_labels(label_file: str) -> bool:
    """Whether a label file exists, or a COCO JSON file holds annotations (that of a test server has none)."""
    return (
        find_coco_image(label_file)[1]["annotations"] is not None if is_coco(label_file) else os.path.exists(label_file)
    )


def boxes_in_fractions(boxes: np.ndarray, label_file: str, width: int, height: int) -> np.ndarray:
    """Boxes (M, 4) xyxy in the unit of their label file -> in fractions of the image. VOC XML: all four numbers minus
    1; the width is x2 - x1, although the devkit's is 1 more (voc_label.py)."""
    return (boxes - 1) / [width, height, width, height] if is_voc_xml(label_file) else boxes


def is_known_class(name: str, classes, tolerate, source: str) -> bool:
    """Whether the class is in `classes`; raises ValueError, naming the source, if others are not tolerated."""
    if name not in classes and "other classes" not in tolerate:
        advice = f"correct it, add it to CLASSES ({', '.join(classes)}), or set TOLERATE=['other classes']"
        raise ValueError(f"{source}: unknown class {name!r}; {advice}")
    return name in classes


# what tools write for `difficult`
DIFFICULT = {"": 0, "0": 0, "0.0": 0, "false": 0, "no": 0, "unspecified": 0, "1": 1, "1.0": 1, "true": 1, "yes": 1}


def read_voc_xml(file: str, classes, tolerate=()) -> tuple[list[list[float]], tuple[int, int]]:
    """The objects of a VOC annotation, and the image size that it declares."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{file}: not readable as XML ({error}); if its text is right, save it as UTF-8") from None
    if root.tag.startswith("{") or root.find("object") is None:  # a namespace, or perhaps <Object>
        for element in root.iter():
            element.tag = str(element.tag).rpartition("}")[2].lower()
    if root.tag != "annotation":
        raise ValueError(
            f"{file}: not a VOC annotation (its root is <{root.tag}>); export the labels as Pascal VOC XML"
        )
    labels = []
    for item in root.iter("object"):
        name = (item.findtext("name") or "").strip()
        if not is_known_class(name, classes, tolerate, file):
            continue
        boxes = item.findall("bndbox")
        if len(boxes) > 1:
            raise ValueError(
                f"{file}: an object of class {name} has {len(boxes)} bndbox; give each box an object of its own"
            )
        tags = [element.tag for element in (*item, *(boxes[0] if boxes else ()))]
        if twice := [tag for tag in ("name", "difficult", "xmin", "ymin", "xmax", "ymax") if tags.count(tag) > 1]:
            raise ValueError(f"{file}: an object of class {name} has {twice[0]} twice; remove the wrong one")
        if boxes and boxes[0].find("difficult") is not None:
            raise ValueError(f"{file}: an object of class {name} has its difficult inside bndbox; move it out")
        try:
            box = [float(boxes[0].findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")]
        except (TypeError, ValueError, IndexError):
            raise ValueError(f"{file}: an object of class {name} has no bndbox of four numbers") from None
        difficult = DIFFICULT.get((item.findtext("difficult") or "").strip().lower())
        if difficult is None:
            raise ValueError(
                f"{file}: difficult of an object of class {name} must be 0 or 1, not {item.findtext('difficult')!r}"
            )
        if not all(map(math.isfinite, box)) or box[2] <= box[0] or box[3] <= box[1]:
            raise ValueError(f"{file}: the box {box} of class {name} has no extent (xmax <= xmin or ymax <= ymin)")
        labels.append([classes.index(name), difficult, *box])
    size = [(root.findtext(f"size/{side}") or "").strip() for side in ("width", "height")]
    return labels, tuple(int(side) if side.isdecimal() and len(side) < 10 else 0 for side in size)


def read_yolo_txt(file: str, classes, tolerate=()) -> tuple[list[list[float]], tuple[int, int]]:
    """The objects of a YOLO label file: lines `class x y w h`, centre and size in fractions of the image."""
    labels = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        words = line.split()
        if not words:
            continue
        try:
            label, x, y, w, h = map(float, words)
            if not label.is_integer():
                raise ValueError
        except ValueError:
            guess = ""
            if not re.match(r"[-+.\d]", words[0]):
                guess = " (the class is a position in CLASSES, not a name)"
            elif len(words) > 5:
                guess = " (a sixth number, a confidence?)" if len(words) == 6 else " (a polygon?)"
            found = utils.printable(" ".join(words)[:80])
            raise ValueError(f"{file}, line {number}: expected `class x y w h`, found {found!r}{guess}") from None
        if not 0 <= label < len(classes):
            if "other classes" in tolerate:
                continue
            raise ValueError(f"{file}, line {number}: class {int(label)} is not one of the {len(classes)} in CLASSES")
        slack = 1e-4  # for rounding by the tool that wrote the file
        if not all(-slack <= value <= 1 + slack for value in (x, y, w, h)) or min(w, h) < 1e-5:
            raise ValueError(
                f"{file}, line {number}: x y w h must be fractions of the image in 0..1, and w, h at least 1e-5"
            )
        x, y, w, h = np.clip((x, y, w, h), 0, 1)
        labels.append([label, 0, x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return labels, (0, 0)


def read_coco(file: str) -> tuple[dict[str, dict], dict[str, dict]]:
    """-> the images of a COCO JSON file by id, with their size (None if the file has none) and annotations
    (None if the file has no such list), and the categories by id. Ids are text here. Parses a file once, and
    again when it changes."""
    return parse_coco(file, os.stat(file).st_mtime_ns if os.path.isfile(file) else 0)


@functools.cache
def parse_coco(file: str, modified: int) -> tuple[dict[str, dict], dict[str, dict]]:
    """See read_coco. Only the structure is checked here; read_coco_labels checks the boxes, so that
    check_dataset reports all bad ones."""
    text, images, empty, where = read_text(file, "no such list of images"), {}, [], "the file"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON ({utils.first_line(error)})") from None
    try:
        categories = {str(row["id"]): {"id": row["id"], "name": row["name"]} for row in content["categories"]}
        if len(categories) < len(content["categories"]):
            raise ValueError(f"{file}: two categories have the same id; give each category its own")
        for place, row in enumerate(content["images"]):
            where = f"entry {place} of images"
            if str(row["id"]) in images:
                raise ValueError(f"{file}: two images have the id {row['id']!r}; give each image its own")
            image = images[str(row["id"])] = {"id": row["id"], "file_name": str(row["file_name"]), "size": None}
            image["annotations"] = [] if "annotations" in content else None
            if all(type(row.get(side)) is int and 0 < row[side] < 1e6 for side in ("width", "height")):
                image["size"] = (row["width"], row["height"])
        for place, row in enumerate(content.get("annotations", [])):
            where = f"entry {place} of annotations"  # if it has no id
            where = f"annotation {row['id']!r}"
            for key, table in (("image_id", images), ("category_id", categories)):
                if str(row[key]) not in table:
                    raise ValueError(f"{file}: {where} has the {key} {row[key]!r}, which the file does not define")
            box = row["bbox"]
            if isinstance(box, list) and len(box) == 4 and (box[2] == 0 or box[3] == 0):
                empty.append(where)
                continue
            kept = {"where": where, "category": categories[str(row["category_id"])]["name"], "bbox": box}
            images[str(row["image_id"])]["annotations"].append(kept | {"iscrowd": row.get("iscrowd") or 0})
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else f"is malformed ({utils.first_line(error)})"
        raise ValueError(f"{file}: {where} {reason}; export the labels as COCO JSON") from None
    if empty:  # two in COCO's instances_train2017.json
        print(f"{file}: skipped {len(empty)} annotations of zero width or height (first: {empty[0]})")
    return images, categories


def find_coco_image(label_file: str) -> tuple[str, dict, dict[str, dict]]:
    """For a label file `x.json#<image id>`: the JSON file, its entry of the image, and its categories by id."""
    file, image_id = re.split(r"(?<=\.json)#", label_file, maxsplit=1, flags=re.IGNORECASE)
    images, categories = read_coco(file)
    return file, images[image_id], categories


# COCO's names of six classes -> those of Darknet's coco.names
DARKNET_NAMES = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant"}
DARKNET_NAMES |= {"dining table": "diningtable", "tv": "tvmonitor"}


def coco_name(category: str, classes) -> str:
    """The name among `classes` of a COCO category: its own, or Darknet's if only that is there."""
    other = DARKNET_NAMES.get(category)
    return other if category not in classes and other in classes else category


def read_coco_labels(label_file: str, classes, tolerate=()) -> tuple[list[list[float]], tuple[int, int]]:
    """The objects of an image of a COCO JSON file, and the image size. Crowds count as difficult."""
    file, image, _ = find_coco_image(label_file)
    if image["annotations"] is None and "missing labels" not in tolerate:
        raise ValueError(
            f"{file}: has no list 'annotations'; set TOLERATE=['missing labels'] if its images have no objects"
        )
    if image["size"] is None:  # read_coco_list has set it
        raise ValueError(f"{file}: changed while it was in use; start again")
    (width, height), labels = image["size"], []
    for annotation in image["annotations"] or []:
        name, box, source = (
            coco_name(annotation["category"], classes),
            annotation["bbox"],
            f"{file}: {annotation['where']}",
        )
        if not is_known_class(name, classes, tolerate, source):
            continue
        try:
            x, y, w, h = map(float, box)
            crowd = DIFFICULT[str(annotation["iscrowd"]).lower()]
        except (TypeError, ValueError, OverflowError, KeyError):
            found = f"{str(box)[:80]!r} and {annotation['iscrowd']!r}"
            raise ValueError(
                f"{source} needs a bbox of four numbers x, y, w, h and iscrowd 0 or 1, found {found}"
            ) from None
        if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
            raise ValueError(f"{source} has the bbox {box} of no extent (w or h is not above 0); remove it")
        labels.append([classes.index(name), crowd, x / width, y / height, (x + w) / width, (y + h) / height])
    return labels, image["size"]


# ---------------------------------------------------------------- checking a data set


def drop_broken_images(dataset: VOCDataset, broken_list: str) -> None:
    """Lists the unreadable images of an evaluation set in a file and removes them: evaluation cannot replace them."""
    for index in reversed(range(len(dataset))):
        if read_or_next(dataset.samples, index, broken_list)[1] != index:
            del dataset.samples[index], dataset.labels[index], dataset.declared_sizes[index]


def suspicion_about(label_file: str, labels: np.ndarray, declared: tuple[int, int], size: tuple[int, int]) -> str:
    """A sentence on labels (G, 6) that are readable but probably wrong, otherwise "": the file declares another width
    and height than the image has (`size`), or some objects lie completely outside the image."""
    width, height = size
    if all(declared) and declared != size:
        cause = "labelled without its EXIF rotation" if declared == (height, width) else "resized after labelling"
        return (
            f"{label_file}: declares an image of {declared[0]} x {declared[1]}, "
            f"but the image is {width} x {height} ({cause}?)"
        )
    boxes = boxes_in_fractions(labels[:, 2:], label_file, width, height).clip(0, 1)
    outside = int((boxes[:, 2:] <= boxes[:, :2]).any(axis=1).sum())
    fractions = outside and is_voc_xml(label_file) and labels[:, 2:].max() <= 1
    units = "; VOC XML is in pixels, not in fractions" if fractions else ""
    return (
        f"{label_file}: {outside} of {len(labels)} objects are outside the image and give no target{units}"
        if outside
        else ""
    )


def print_suspicious_labels(dataset: VOCDataset) -> None:
    """Prints how many images of a data set are listed twice, how many label files are probably wrong,
    and why the first one is."""
    if twice := [
        file for file, count in Counter(os.path.realpath(file) for file, _ in dataset.samples).items() if count > 1
    ]:
        print(f"images listed more than once: {len(twice)} (first: {utils.printable(twice[0])})")
    doubts = []
    for (image_file, label_file), labels, declared in zip(
        dataset.samples, dataset.labels, dataset.declared_sizes, strict=True
    ):
        with contextlib.suppress(OSError, ValueError):  # an unreadable image is reported when it is used
            doubts.append(suspicion_about(label_file, labels, declared, image_size(image_file)))
    if doubts := list(filter(None, doubts)):
        print(
            f"{len(doubts)} of {len(dataset)} label files look wrong (python dataset.py lists them), "
            f"the first: {doubts[0]}"
        )


def print_badly_fitting_anchors(dataset: VOCDataset) -> None:
    """Prints a hint if the average IoU of the objects and their best anchors is below 0.5, for example with
    anchors for 416 pixels at 224."""
    sizes = [np.empty((0, 2))]
    for (_, label_file), labels, declared in zip(dataset.samples, dataset.labels, dataset.declared_sizes, strict=True):
        # without reading the image, XML in pixels needs a declared size
        if all(declared) or not is_voc_xml(label_file):
            boxes = boxes_in_fractions(labels[labels[:, 1] == 0, 2:], label_file, *declared)
            sizes.append(boxes[:, 2:] - boxes[:, :2])
    cells, size = np.concatenate(sizes) * (dataset.image_size / 32), dataset.image_size
    if len(cells) and (fit := average_best_iou(cells, dataset.anchors)) < 0.5:
        print(
            f"ANCHORS fit the boxes badly (average IoU {fit:.2f}); "
            f"dataset.py IMAGE_SIZE={size} prints better ones for this data"
        )


def check_training_sets(train_set: VOCDataset, eval_sets: dict[str, VOCDataset]) -> None:
    """Prints what is probably wrong with the data of a training run; raises ValueError if there is nothing to learn."""
    if val_set := eval_sets.get("val_map"):
        paths = [{os.path.realpath(file) for file, _ in data.samples} for data in (train_set, val_set)]
        if shared := paths[0] & paths[1]:
            print(
                f"images in both the training and the validation set: {len(shared)} "
                f"(first: {utils.printable(min(shared))})"
            )
        print_suspicious_labels(val_set)
    sets = {"training": train_set, **eval_sets}
    empty = [name for name, data in sets.items() if not any((labels[:, 1] == 0).any() for labels in data.labels)]
    if "training" in empty:
        raise ValueError(
            "the training images have no objects, or only difficult ones; check the label files, CLASSES and TOLERATE"
        )
    for name in empty:
        print(f"{name} will be nan, because its images have no objects, or only difficult ones")
    print_suspicious_labels(train_set)
    print_badly_fitting_anchors(train_set)


def check_dataset(
    samples: list[tuple[str, str]], classes, tolerate=()
) -> tuple[list[str], list[np.ndarray], np.ndarray]:
    """Reads every file of a data set -> problems (one sentence each, naming the file), labels per image,
    box sizes in fractions."""
    problems = [
        f"{image}: listed {count} times"
        for image, count in Counter(os.path.realpath(image) for image, _ in samples).items()
        if count > 1
    ]
    all_labels, sizes = [], [np.empty((0, 2))]
    for image_file, label_file in tqdm(samples, desc="reading", unit="image", leave=False, disable=None):
        labels = image = None
        try:
            labels, declared = read_labels(label_file, classes, tolerate)
            all_labels.append(labels)
        except (OSError, ValueError) as error:
            problems.append(str(error))
        try:
            image = read_image(image_file)
        except (OSError, ValueError) as error:
            problems.append(str(error))
        if labels is None or image is None:
            continue
        height, width = image.shape[:2]
        if doubt := suspicion_about(label_file, labels, declared, (width, height)):
            problems.append(doubt)
        boxes = labels[:, 2:] if is_voc_xml(label_file) else utils.to_devkit_pixels(labels[:, 2:], width, height)
        outside = (boxes[:, :2] < 0).any(axis=1) | (boxes[:, 2] > width + 1.5) | (boxes[:, 3] > height + 1.5)
        for box in boxes[outside].round(1).tolist():
            problems.append(f"{label_file}: the box {box} extends beyond the image of {width} x {height}")
        sizes.append((boxes[:, 2:] - boxes[:, :2]) / [width, height])
    for kind, position in (("image", 0), ("label", 1)):  # files of the same folders that are in none of the lists
        listed = {os.path.abspath(sample[position]) for sample in samples}
        suffixes = {os.path.splitext(file)[1] for file in listed}
        for folder in filter(os.path.isdir, sorted({os.path.dirname(file) for file in listed})):
            files = [name for name in os.listdir(folder) if os.path.splitext(name)[1] in suffixes]
            if unlisted := [name for name in files if os.path.join(folder, name) not in listed]:
                print(f"{folder}: {len(unlisted)} {kind} files are in none of these lists (first: {min(unlisted)})")
    return problems, all_labels, np.concatenate(sizes)


def draw_label_sheet(dataset: VOCDataset, file: str, count: int, seed: int) -> None:
    """Draws `count` samples as the network sees them, with the boxes decoded from their targets."""
    from matplotlib import pyplot as plt

    rows = math.ceil(count / 5)
    figure, axes = plt.subplots(rows, 5, figsize=(15, 3 * rows), squeeze=False)
    chosen = np.random.default_rng(seed).permutation(len(dataset))
    for axis, place in zip(axes.flat, range(count), strict=False):
        index = int(chosen[place % len(chosen)])
        image, targets = dataset[(index, dataset.image_size, seed + place)]
        _, row, column = torch.nonzero(targets[..., 0], as_tuple=True)
        _, x, y, w, h, labels = targets[targets[..., 0] > 0].T
        boxes = box_convert(torch.stack([column + x, row + y, w, h], dim=1) * 32, "cxcywh", "xyxy")  # a cell: 32 pixels
        names = [dataset.classes[int(label)] for label in labels]
        axis.imshow(utils.draw_boxes(image.permute(1, 2, 0).numpy(), boxes, names, labels))
        title, font = utils.drawable(Path(dataset.samples[index][0]).stem, f"image {index}")
        axis.set_title(title, fontsize=9, parse_math=False, font=font and Path(font))
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    with utils.atomic_write(file) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def follow_object(
    sample: tuple[str, str], labels: np.ndarray, anchors, size: int
) -> list[tuple[str, list[float], str]]:
    """Traces the largest object of an image from its label file to its target -> lines of (step, numbers, explanation).

    sample: image file and label file; labels: (G, 6) of read_labels; anchors: A pairs in grid cells;
    size: network input in pixels.
    """
    image_file, label_file = sample
    width, height = image_size(image_file)
    boxes = boxes_in_fractions(labels[:, 2:], label_file, width, height)  # (G, 4) xyxy
    largest = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).argmax()
    box = box_convert(torch.from_numpy(boxes[largest]), "xyxy", "cxcywh").tolist()
    cells = size // 32
    x, y, w, h = (cells * value for value in box)
    overlaps = shape_iou([[w, h]], anchors)[0].tolist()
    targets = encode_targets([box], labels[largest, :1], anchors, cells, cells)
    anchor, row, column = targets[..., 0].nonzero()[0].tolist()
    p_w, p_h = anchors[anchor]
    slot = targets[anchor, row, column].tolist()
    in_loss = [x - column, y - row, math.log(w / p_w), math.log(h / p_h)]
    unit = f"pixels of {width} x {height}, from 1" if is_voc_xml(label_file) else "fractions of the image"
    return [
        ("label file", labels[largest, 2:].tolist(), f"x1, y1, x2, y2: {unit}"),
        ("centre and size", box, "x, y, w, h: fractions of the image"),
        ("in grid cells", [x, y, w, h], f"times {cells}"),
        ("cell", [column, row], "column, row: x and y without decimals"),
        ("IoU with the anchors", overlaps, f"shapes only; best: anchor {anchor}, {p_w:.2f} x {p_h:.2f} cells"),
        (f"target[{anchor}, {row}, {column}]", slot, "[anchor, row, column]: object, x, y, w, h, class"),
        ("in the loss", in_loss, "for sigma(t_x), sigma(t_y); ln(w/p_w), ln(h/p_h)"),
    ]


def check_settings() -> None:
    """Raises ValueError or OSError for an invalid setting."""
    utils.check_at_least(1, SHEET_IMAGES=SHEET_IMAGES)
    utils.check_at_most(500, SHEET_IMAGES=SHEET_IMAGES)
    utils.check_at_least(0, SEED=SEED)
    if IMAGE_SIZE % 32 or not 32 <= IMAGE_SIZE < 10_000:
        raise ValueError(f"IMAGE_SIZE must be a multiple of 32 pixels, not {IMAGE_SIZE}")
    utils.check_writable(SHEET)


def main() -> None:
    from model import ANCHORS  # here, because model.py imports dataset.py

    check_settings()
    samples, classes = list_samples(DATA_DIR, IMAGE_SETS), read_classes(CLASSES)
    problems, all_labels, sizes = check_dataset(samples, classes, TOLERATE)
    labels = np.concatenate(all_labels) if all_labels else np.empty((0, 6))
    print(f"{len(samples)} images, {len(labels)} objects, {int(labels[:, 1].sum())} of them difficult")
    counts = [len(rows) for rows in all_labels]
    print(f"{counts.count(0)} images without objects; at most {max(counts, default=0)} objects per image")
    for index, name in enumerate(classes):
        difficult = labels[labels[:, 0] == index, 1] > 0
        print(f"  {name:16s} {int((~difficult).sum()):6d}  difficult {int(difficult.sum()):5d}")
    if len(sizes):
        sides = np.percentile(np.sqrt(sizes.prod(axis=1)), [0, 25, 50, 75, 100])
        text = ", ".join(f"{side:.3f}" for side in sides)
        print(f"box size, as the square root of its share of the image: {text} (minimum, quartiles, maximum)")
        cells = sizes * (IMAGE_SIZE / 32)
        print(f"average IoU of the default anchors: {average_best_iou(cells, ANCHORS):.3f}")
        if len(cells) >= len(ANCHORS):
            anchors = kmeans_anchors(cells, len(ANCHORS))
            text = ",".join(f"({w:.4g},{h:.4g})" for w, h in anchors.tolist())
            print(f"average IoU of k-means anchors:     {average_best_iou(cells, anchors):.3f}")
            print(f'  for train.py: IMAGE_SIZE={IMAGE_SIZE} "ANCHORS=[{text}]"')
    for problem in problems:
        print(utils.printable(f"problem: {problem}"))
    if problems:
        sys.exit(f"{len(problems)} problems; correct them to get the label sheet")
    dataset = VOCDataset(DATA_DIR, IMAGE_SETS, ANCHORS, IMAGE_SIZE, classes, augment=True, tolerate=TOLERATE)
    draw_label_sheet(dataset, SHEET, SHEET_IMAGES, SEED)
    print(f"no problems; look at {SHEET}: every box should enclose its object")
    targeted = [labels[labels[:, 1] == 0] for labels in all_labels]  # without difficult objects
    followed = next((index for index, labels in enumerate(targeted) if len(labels)), None)
    if followed is not None:
        print(f"\nthe largest object of {utils.printable(samples[followed][0])}, from label to target:")
        for step, numbers, explanation in follow_object(samples[followed], targeted[followed], ANCHORS, IMAGE_SIZE):
            text = "".join(f"{number:.3f}".removesuffix(".000").rjust(8) for number in numbers)
            print(f"  {step:22s}{text:48s}  {explanation}")


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
