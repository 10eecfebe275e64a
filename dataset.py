"""Data sets: Pascal VOC in the devkit's layout, lists of files, COCO JSON, ImageNet; augmentation, targets, k-means
anchors.

Order: the record of an image, augmentation, targets, data set, batches, ImageNet, anchors; then reading images, lists
and labels; then the checks of `python dataset.py DATA_DIR=... IMAGE_SETS=...`. Run it before a long training: it prints
the objects per class, everything that is wrong or doubtful with the file it is in, and how well the anchors fit, and
draws augmented samples with their boxes to `runs/label_sheet.png`.

Letters: G objects in a label file, difficult ones included, M boxes of a training sample, A anchors (5), S_h x S_w grid
cells (13 x 13 at 416 x 416). Rows are y, columns are x. Boxes are in fractions of the image, except where VOC's XML is
read and in ground_truth, which are in devkit pixels: the first pixel is 1, and boxes include both end pixels."""

import contextlib
import copy
import csv
import glob
import io
import itertools
import json
import math
import os
import random
import re
import struct
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import checks online for a newer version

import albumentations
import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from PIL.Image import Transpose
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.ops import box_convert
from tqdm import tqdm

import utils
from model import ANCHORS as VOC_ANCHORS
from model import VOC_CLASSES, read_anchors, read_classes

cv2.setNumThreads(0)  # one thread per process, because the loader's workers run in parallel

# data
DATA_DIR = "data_samples/voc"  # holds VOC2007/ or VOCdevkit/VOC2007/, lists, or folders of images
IMAGE_SETS = [("2007", "train")]  # (year, list); in DATA_DIR: .csv (image,label), Darknet .txt, COCO .json, a folder
CLASSES = VOC_CLASSES  # any names, "voc", "coco", or a .names or data.yaml file
TOLERATE = []  # "other classes": skip objects that CLASSES does not name; "missing labels": unlabelled is background
# model
ANCHORS = VOC_ANCHORS  # as in train.py; better ones, of the same number, are printed
IMAGE_SIZE = 416  # network input in pixels, a multiple of 32: for the anchors and the sheet
# run
SHEET = "runs/label_sheet.png"  # augmented samples with boxes
SHEET_IMAGES = 20  # samples on the sheet
SEED = 0


class Sample(NamedTuple):
    """One image of a detection data set, and what its label file says."""

    image_file: str
    label_file: str  # for messages; "instances.json, image 7" for COCO; "" if a tolerated one is missing
    size: tuple[int, int]  # width and height of what read_image returns; of an unreadable image the declared ones, or 0
    labels: np.ndarray  # (G, 6) float64: class, difficult, x1, y1, x2, y2 in fractions of the image, clipped to it
    image_id: int | str  # COCO's id; otherwise the file name without suffix
    doubts: tuple[str, ...]  # what can be read but is probably wrong: sentences "kind: detail"


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
        # v V (1 - s S u): v s times the channel plus v (1 - s) V. As in Darknet, only the result is clipped.
        s, v = factors
        return cv2.addWeighted(image, v * s, cv2.merge([value, value, value]), v * (1 - s), 0)


class DarknetJitter(albumentations.DualTransform):
    """load_data_detection and crop_image in Darknet when the paper was written: moves each side in or out by up to a
    fifth of the image, repeating the border, stretches the result to a square of `size` pixels and flips half of the
    images. Three transforms of albumentations would do the same, but an image would take a tenth more time."""

    def __init__(self, size: int):
        super().__init__(p=1.0)
        self.size = size

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        height, width = params["shape"][:2]
        # pixels that each side moves out; below 0, in
        top, right, bottom, left = [int(self.py_random.uniform(-0.2, 0.2) * n) for n in (height, width) * 2]
        return {"sides": (top, right, bottom, left), "flip": self.py_random.random() < 0.5}

    def apply(self, image: np.ndarray, sides: tuple, flip: bool, **params) -> np.ndarray:
        height, width = image.shape[:2]
        top, right, bottom, left = sides
        image = image[max(-top, 0) : height - max(-bottom, 0), max(-left, 0) : width - max(-right, 0)]
        margins = [max(side, 0) for side in (top, bottom, left, right)]
        image = cv2.copyMakeBorder(image, *margins, cv2.BORDER_REPLICATE)
        image = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
        return cv2.flip(image, 1) if flip else image

    def apply_to_bboxes(self, boxes: np.ndarray, sides: tuple, flip: bool, **params) -> np.ndarray:
        height, width = params["shape"][:2]
        top, right, bottom, left = sides
        new_width, new_height = width + left + right, height + top + bottom
        corners = boxes[:, :4] * [width, height, width, height] + [left, top, left, top]
        corners /= [new_width, new_height, new_width, new_height]
        if flip:
            x1, y1, x2, y2 = corners.T
            corners = np.column_stack([1 - x2, y1, 1 - x1, y2])
        return np.column_stack([corners, boxes[:, 4:]])


def train_transform(image_size: int) -> albumentations.Compose:
    """Augmentation to a square of image_size pixels. Boxes (M, 5): xyxy in fractions, class; those with less than a
    tenth of their area left are dropped."""
    # checking the boxes once, at the end, gives the same result in less time
    boxes = albumentations.BboxParams("albumentations", min_visibility=0.1, check_each_transform=False)
    transforms = [DarknetJitter(image_size), DarknetColour(hue=0.1, saturation=1.5, exposure=1.5)]
    return albumentations.Compose(transforms, bbox_params=boxes)


def plain_transform(image_size: int) -> albumentations.Compose:
    """Stretches the whole image to a square of image_size pixels, with its boxes (M, 5): xyxy in fractions, class."""
    resize = albumentations.Resize(image_size, image_size, interpolation=cv2.INTER_LINEAR)
    return albumentations.Compose([resize], bbox_params=albumentations.BboxParams("albumentations"))


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W), both uint8: a quarter of float32's bytes to copy; the network divides by 255."""
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
    anchor = shape_iou(np.stack([w, h], axis=1), anchors).argmax(axis=1)
    labels = np.asarray(class_indices, dtype=np.float64).reshape(-1)
    values = np.stack([np.ones_like(x), x - column, y - row, w, h, labels], axis=1)
    targets[anchor, row, column] = values  # numpy writes in order: the later object wins a shared slot
    return torch.from_numpy(targets)


def shape_iou(sizes, anchors) -> np.ndarray:
    """IoU of boxes with the same centre: sizes (M, 2), anchors (A, 2) of the same unit -> (M, A) float64, an array."""
    w, h = np.asarray(sizes, dtype=np.float64).T[..., None]  # (M, 1) each
    p_w, p_h = np.asarray(anchors, dtype=np.float64).T  # (A,) each
    intersection = np.minimum(w, p_w) * np.minimum(h, p_h)  # (M, A)
    return intersection / (w * h + p_w * p_h - intersection)


# ---------------------------------------------------------------- the data set


class VOCDataset(Dataset):
    """Images and encoded targets of VOC image sets or of lists of files.

    anchors: A pairs in grid cells; image_size: pixels, a multiple of 32; root, image_sets, classes, tolerate and
    problems as in list_samples, whose records are `samples`. Difficult objects are ground truth but not targets, as in
    Darknet's voc_label.py. Raises FileNotFoundError or ValueError, naming the file."""

    def __init__(
        self, root, image_sets, anchors, image_size=416, classes=VOC_CLASSES, augment=False, tolerate=(), problems=None
    ):
        if image_size % 32 or image_size < 32:
            raise ValueError(f"IMAGE_SIZE must be a multiple of 32 pixels, not {image_size}")
        self.anchors, self.image_size, self.augment = anchors, image_size, augment
        self.classes = read_classes(classes)
        self.samples = list_samples(root, image_sets, self.classes, tolerate, problems)
        self.transforms = {}  # one per image size
        self.broken_list = ""  # see read_or_next

    def changed(self, **attributes) -> "VOCDataset":
        """A data set of the same records with other attributes, such as augment=False or image_size=544."""
        other = copy.copy(self)
        vars(other).update(attributes, transforms={})
        return other

    def with_classes(self, classes: list[str], tolerate=()) -> "VOCDataset":
        """A data set with the same labels, numbered in the order of `classes`, the model's. Raises ValueError if these
        lack a name, unless `tolerate` has "other classes": then such objects are left out."""
        unknown = [name for name in self.classes if name not in classes]
        if unknown and "other classes" not in tolerate:
            advice = "set TOLERATE=['other classes'] to leave such objects out"
            raise ValueError(f"DATA_CLASSES: the model does not know {', '.join(unknown)}; {advice}")
        numbers = np.array([classes.index(name) if name in classes else -1 for name in self.classes])
        tables = [np.column_stack([numbers[s.labels[:, 0].astype(int)], s.labels[:, 1:]]) for s in self.samples]
        pairs = zip(self.samples, tables, strict=True)
        samples = [sample._replace(labels=table[table[:, 0] >= 0]) for sample, table in pairs]
        return self.changed(classes=classes, samples=samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """key: an index, or (index, image size, seed of the augmentation) -> image (3, H, W) uint8, targets
        (A, S_h, S_w, 6). Size and seed are part of the key: workers do not see later changes of the data set."""
        index, size, seed = key if isinstance(key, tuple) else (key, self.image_size, None)
        if size not in self.transforms:
            self.transforms[size] = train_transform(size) if self.augment else plain_transform(size)
        if self.augment and seed is not None:
            # one generator for all: set_random_seed would give all the same numbers: flip and hue would be correlated
            self.transforms[size].set_random_state(np.random.default_rng(seed), random.Random(seed))
        image, index = read_or_next(self.samples, index, self.broken_list)
        labels = self.samples[index].labels
        labels = labels[labels[:, 1] == 0]  # without difficult objects
        augmented = self.transforms[size](image=image, bboxes=labels[:, [2, 3, 4, 5, 0]])
        boxes = np.asarray(augmented["bboxes"], dtype=np.float64).reshape(-1, 5)  # (M, 5) xyxy, class
        x1y1, x2y2 = boxes[:, :2], boxes[:, 2:4]
        cxcywh = np.hstack([(x1y1 + x2y2) / 2, x2y2 - x1y1])
        targets = encode_targets(cxcywh, boxes[:, 4], self.anchors, size // 32, size // 32)
        return to_tensor(augmented["image"]), targets

    def images(self, indices: list[int]) -> Tensor:
        """A batch without augmentation, for utils.detect_dataset: (N, 3, H, W) uint8."""
        transform = plain_transform(self.image_size)
        images = [read_image(self.samples[index].image_file) for index in indices]
        items = [(to_tensor(transform(image=image, bboxes=NO_LABELS)["image"]), 0) for image in images]
        return collate(items)[0]

    def ground_truth(self, index: int) -> Tensor:
        """-> (G, 6) float64: class, difficult, x1, y1, x2, y2 in devkit pixels of the original image."""
        sample = self.samples[index]
        pixels = utils.to_devkit_pixels(sample.labels[:, 2:], *sample.size)
        return torch.from_numpy(np.column_stack([sample.labels[:, :2], pixels]))


# ---------------------------------------------------------------- batches


def collate(items: list[tuple]) -> tuple[Tensor, Tensor]:
    """The images and targets (or labels) of a batch; images (N, 3, H, W) are channels_last, the fastest order."""
    images, targets = zip(*items, strict=True)
    return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2), default_collate(targets)


def steps_per_epoch(count: int, batch_size: int, subdivisions: int = 1) -> int:
    """Optimiser steps per epoch of `count` images: the number of full batches, or 1 if the images do not fill one."""
    if count < batch_size and subdivisions > 1:
        advice = "lower BATCH_SIZE, or set SUBDIVISIONS=1 (DDP: in one process)"
        raise ValueError(f"{count} images per epoch do not fill a batch of {batch_size}; {advice}")
    return max(1, count // batch_size)


def training_batches(
    count: int, batch_size: int, subdivisions: int, image_sizes: list[int], seed: int, first_step=0, repeat=1
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


def files_of_step(samples: list[tuple] | np.ndarray, batches: Iterator, subdivisions: int) -> list[str]:
    """The image files of the next optimiser step; `batches` comes from training_batches."""
    keys = [key for batch in itertools.islice(batches, subdivisions) for key in batch]
    return [os.fsdecode(samples[index][0]) for index, _, _ in keys]


# ---------------------------------------------------------------- ImageNet


class DarknetCrop(albumentations.ImageOnlyTransform):
    """Darknet's random_augment_image in one resampling: stretches the image by an aspect ratio between 3/4 and
    4/3, scales it to a short side in the range `sides`, rotates it by up to 7 degrees, crops a square of `size`
    at random (darknet19.cfg) and flips half of the images.

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
        a, b = math.cos(angle) * scale_x, -math.sin(angle) * scale_y
        c, d = math.sin(angle) * scale_x, math.cos(angle) * scale_y
        # the image's centre goes to the crop's centre, moved by (dx, dy)
        shift_x = self.size / 2 + dx - (a * width / 2 + b * height / 2)
        shift_y = self.size / 2 + dy - (c * width / 2 + d * height / 2)
        matrix = np.array([[a, b, shift_x], [c, d, shift_y]])
        return {"matrix": matrix, "flip": self.py_random.random() < 0.5}

    def apply(self, image: np.ndarray, matrix: np.ndarray, flip: bool, **params) -> np.ndarray:
        shape = (self.size, self.size)
        image = cv2.warpAffine(image, matrix, shape, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return cv2.flip(image, 1) if flip else image


class ImageNetFolder(ImageFolder):
    """torchvision's ImageFolder, indexed like VOCDataset: -> image (3, size, size) uint8, class index. If `broken_list`
    is set, training replaces an unreadable image by the next one, and validation gives it the label -100."""

    def __init__(self, folder: str, image_size: int, augment: bool, crop_scale: tuple[float, float]):
        self.skipped = []
        super().__init__(folder, is_valid_file=self.is_image)
        # one array (file, label) instead of a million Python objects: each worker that reads those copies them
        samples = [(os.fsencode(file), label) for file, label in self.samples]
        longest = max(len(file) for file, _ in samples)
        self.samples = np.array(samples, dtype=[("file", f"S{longest}"), ("label", np.int32)])
        del self.imgs, self.targets  # torchvision's lists of the same
        self.image_size, self.augment, self.crop_scale, self.transforms = image_size, augment, crop_scale, {}
        self.broken_list = ""  # see read_or_next

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """As in torchvision, but without hidden folders such as .ipynb_checkpoints."""
        classes, _ = super().find_classes(directory)
        classes = utils.check_classes(directory, [name for name in classes if not name.startswith(".")])
        return classes, {name: index for index, name in enumerate(classes)}

    def is_image(self, file: str) -> bool:
        # .ipynb_checkpoints in a class folder, ._name.jpg of macOS
        is_hidden = f"{os.sep}." in file[len(self.root) :]
        if not is_hidden and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:
            return True
        self.skipped.append(file)
        return False

    def __getitem__(self, key: int | tuple[int, int, int]) -> tuple[Tensor, int]:
        index, size, seed = key if isinstance(key, tuple) else (key, self.image_size, None)
        if size not in self.transforms:
            if self.augment:
                crop = DarknetCrop(size, (size * self.crop_scale[0], size * self.crop_scale[1]))
                # cfg: .75; ours draws from 1..4/3 or its inverse, Darknet from 3/4..1 or its inverse
                colour = DarknetColour(hue=0.1, saturation=4 / 3, exposure=4 / 3)
                transforms = [crop, colour]
            else:
                transforms = [albumentations.SmallestMaxSize(size), albumentations.CenterCrop(size, size)]
            self.transforms[size] = albumentations.Compose(transforms)
        if self.augment and seed is not None:
            # one generator for all transforms, as in VOCDataset
            self.transforms[size].set_random_state(np.random.default_rng(seed), random.Random(seed))
        image, read_index = read_or_next(self.samples, index, self.broken_list)
        # validation counts no image twice
        label = int(self.samples[read_index][1]) if self.augment or read_index == index else -100
        return to_tensor(self.transforms[size](image=image)["image"]), label


def imagenet_dataset(
    root, split: str, image_size: int, augment: bool, crop_scale=(0.5, 1.75), train_set=None
) -> ImageNetFolder:
    """The images of root/split/<wnid>/, ImageNet's usual layout; classes are the sorted wnids.

    augment: the crops, rotations, flips and colours of darknet19.cfg; otherwise the centre square. crop_scale: smallest
    and largest short side of the scaled image, relative to the crop (Darknet's min_crop and max_crop over its input:
    128 and 448 over 256 in darknet19.cfg, 448 and 512 over 448 in darknet19_448.cfg). train_set: for the validation
    set, which must have its classes and should not have its images. Raises FileNotFoundError or ValueError, naming
    the folder.
    """
    if not (len(crop_scale) == 2 and 0 < crop_scale[0] <= crop_scale[1]):
        raise ValueError(f"CROP_SCALE {crop_scale} must be two increasing numbers above 0, such as (0.5, 1.75)")
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder; DATA_DIR must hold train/ and val/ of class folders")
    if not any(entry.is_dir() for entry in os.scandir(folder)):
        raise ValueError(
            f"{folder}: its images are not in class folders: unpack each archive <wnid>.tar to {split}/<wnid>/. For "
            "ImageNet's flat val/, Kaggle's LOC_val_solution.csv gives the wnid of each image; in the devkit, line n "
            "of ILSVRC2012_validation_ground_truth.txt is the ILSVRC2012_ID of image n, and meta.mat gives its wnid"
        )
    try:
        dataset = ImageNetFolder(folder, image_size, augment, crop_scale)
    except FileNotFoundError as error:  # torchvision's error for class folders without images
        raise ValueError(f"{folder}: {utils.first_line(error)}") from None
    if dataset.skipped:
        print(f"{folder}: skipped {len(dataset.skipped)} files that are not images (first: {dataset.skipped[0]})")
    if len(dataset.classes) == 1:
        raise ValueError(f"{folder}: its only class folder is {dataset.classes[0]}; move those inside it one level up")
    if train_set is None:
        return dataset
    if dataset.classes != train_set.classes:
        unshared = sorted(set(dataset.classes) ^ set(train_set.classes))
        raise ValueError(f"{root}: these class folders are only in train/ or only in val/: {', '.join(unshared[:5])}")
    val_root, train_root = len(os.fsencode(dataset.root)), len(os.fsencode(train_set.root))
    of_val = {file[val_root:]: file for file, _ in dataset.samples}  # by class folder and name
    twins = ((file, of_val.get(file[train_root:])) for file, _ in train_set.samples)
    shared = [file for file, twin in twins if twin and os.path.getsize(file) == os.path.getsize(twin)]
    if shared:
        first = utils.printable(os.fsdecode(shared[0]))
        print(f"images in both training and validation set: {len(shared)} (first: {first})")
    return dataset


# ---------------------------------------------------------------- anchors


def average_best_iou(box_sizes, anchors) -> float:
    """Mean IoU of shapes of each box and its best anchor (YOLO9000 Table 1); sizes and anchors in the same unit."""
    return float(shape_iou(box_sizes, anchors).max(axis=1).mean())


def kmeans_anchors(box_sizes, k: int, seeds: int = 5) -> Tensor:
    """k-means with the distance 1 - IoU (YOLO9000 sec. 2, dimension clusters), the best of `seeds` starts. box_sizes:
    (B, 2) widths and heights -> anchors (k, 2) in the same unit, by rising area. Raises ValueError if B < k.

    Ours: medians instead of means, because they fit better (tests/MEASUREMENTS.md, Anchors).
    """
    box_sizes = np.asarray(box_sizes, dtype=np.float64)
    if len(box_sizes) < k:
        raise ValueError(f"{len(box_sizes)} boxes are too few for {k} anchors")
    best, best_iou = None, -1.0
    for seed in range(seeds):
        anchors = box_sizes[np.random.default_rng(seed).choice(len(box_sizes), k, replace=False)]
        for _ in range(300):
            previous = anchors.copy()
            nearest = shape_iou(box_sizes, anchors).argmax(axis=1)  # the largest IoU is the smallest distance
            for cluster in range(k):
                if (nearest == cluster).any():
                    anchors[cluster] = np.quantile(box_sizes[nearest == cluster], 0.5, axis=0, method="lower")
            if np.array_equal(anchors, previous):
                break
        if (iou := average_best_iou(box_sizes, anchors)) > best_iou:
            best, best_iou = anchors, iou
    return torch.from_numpy(best[best.prod(axis=1).argsort()])


# ---------------------------------------------------------------- reading images

Image.preinit()  # JPEG and PNG first: Image.open tries the formats in the order in which they were loaded
# every format that Pillow reads, without MPEG videos; .mpo (two JPEGs) is missing, because it is opened as JPEG
IMAGE_SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
IMAGE_SUFFIXES = IMAGE_SUFFIXES - {".mpg", ".mpeg"} | {".mpo"}

SIDEWAYS = {5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM} | SIDEWAYS

ORIENTATION_TAGS = (b"Exif\0\0", b"http://ns.adobe.com/xap/")  # begin EXIF and XMP data in a JPEG
IMAGE_ADVICE = "convert it to JPEG or PNG, replace it, or take it off the list"


def exif_turn(image: Image.Image) -> Transpose | None:
    """The transposition that shows an opened image upright, from its header; None if there is none."""
    if image.format == "TIFF":
        image.load()  # Pillow itself turns TIFF images, some versions only while loading
    if image.format == "PNG" and not {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"} & image.info.keys():
        return None  # getexif would decode the whole image to look behind it
    with contextlib.suppress(SyntaxError, TypeError, ValueError, KeyError, struct.error):  # unreadable EXIF data
        return TURNS.get(image.getexif().get(0x0112))
    return None


def read_image(file: str | os.PathLike) -> np.ndarray:
    """Reads an image of any mode as a viewer shows it (EXIF rotation applied, transparent parts white) -> (H, W, 3)
    uint8 RGB. Raises FileNotFoundError or ValueError, naming the file."""
    with utils.reading(file, "image", IMAGE_ADVICE), contextlib.ExitStack() as stack:
        data = np.fromfile(file, dtype=np.uint8)
        content = data.tobytes()
        if content.startswith(b"\xff\xd8") and not any(tag in content for tag in ORIENTATION_TAGS):
            # a JPEG as it is stored: the same pixels as Pillow's, faster. Pillow says what is wrong with a file, and
            # reads all of them if torchvision no longer has this function (deprecated in 0.29)
            with contextlib.suppress(RuntimeError, AttributeError):
                return torchvision.io.decode_jpeg(torch.from_numpy(data), "RGB").permute(1, 2, 0).numpy()
        image = stack.enter_context(Image.open(file))
        if image.format == "PNG":
            image.verify()  # its checksums, which decoding ignores; the image cannot be used afterwards
            image = stack.enter_context(Image.open(file))
        turn = exif_turn(image)
        if turn is not None:  # Transpose.FLIP_LEFT_RIGHT is 0
            image = image.transpose(turn)
        if image.mode.startswith("I;16"):  # 16-bit grey: keep the upper eight bits
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("32-bit greyscale has no defined value range; save it with 8 bits")
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_image_size(file: str | os.PathLike) -> tuple[int, int]:
    """Width and height of what read_image returns, from the header of the file. Raises the same errors."""
    with utils.reading(file, "image", IMAGE_ADVICE), Image.open(file) as image:
        return image.size[::-1] if exif_turn(image) in SIDEWAYS.values() else image.size


def read_or_next(samples: list[tuple] | np.ndarray, index: int, broken_list: str) -> tuple[np.ndarray, int]:
    """The image of samples[index] and its index. Raises FileNotFoundError or ValueError for an unreadable image; but if
    broken_list names a file, lists the image there and returns the next readable one."""
    for _ in range(len(samples)):
        try:
            return read_image(os.fsdecode(samples[index][0])), index
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


# ---------------------------------------------------------------- reading lists


def list_samples(
    root: str | os.PathLike, image_sets, classes: list[str], tolerate=(), problems: list[str] | None = None
) -> list[Sample]:
    """The records of a data set, in list order; reads every label file and the header of every image, once.

    image_sets: (year, list) pairs of the VOC devkit, or names of list files in root: `.csv` with lines `image,label`,
    Darknet's `.txt` with one image per line, or COCO's `.json`; or a folder of images, with labels as for Darknet's
    (see darknet_label). tolerate: "other classes" skips objects of classes that are not in `classes`; "missing labels"
    takes a missing label file as one without objects.

    Raises FileNotFoundError or ValueError, naming the file; but if `problems` is a list, adds the error of each bad
    label file to it and goes on, with a record without labels."""
    if not isinstance(image_sets, (list, tuple)) or (len(image_sets) == 2 and str(image_sets[0]).isdigit()):
        image_sets = [image_sets]  # a single set, not in a list
    pair_readers = {".csv": read_csv_list, ".txt": read_darknet_list}
    samples = []
    for image_set in image_sets:
        suffix = os.path.splitext(image_set)[1].lower() if isinstance(image_set, str) else ""
        if suffix == ".json":
            samples += read_coco_file(os.fspath(root), os.path.join(root, image_set), classes, tolerate, problems)
            continue
        if suffix in pair_readers:
            pairs = pair_readers[suffix](os.path.join(root, image_set))
        elif isinstance(image_set, (tuple, list)) and len(image_set) == 2:
            pairs = read_voc_list(Path(root), *image_set)
        elif isinstance(image_set, str) and os.path.isdir(folder := os.path.join(root, image_set)):
            files = sorted(glob.glob(f"{glob.escape(folder)}/**/*", recursive=True))  # without hidden files
            images = [file for file in files if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES]
            pairs = [(image, darknet_label(image)) for image in images]
        else:
            forms = "[('2007', 'trainval')], ['train.csv'], ['train.txt'], ['train.json'] or ['train/images']"
            advice = f"IMAGE_SETS (VAL_IMAGE_SETS) takes {forms}"
            raise ValueError(f"{image_set!r} is not a list or folder of images in {root}; {advice}")
        samples += [read_sample(image, label, classes, tolerate, problems) for image, label in pairs]
    if not samples:
        raise ValueError(f"{root}: there are no images in {image_sets}; set IMAGE_SETS (VAL_IMAGE_SETS)")
    return samples


def read_voc_list(root: Path, year: str, name: str) -> list[tuple[str, str]]:
    """A list of the VOC devkit, one image id per line -> (image file, label file) pairs; images may have any suffix."""
    folders = [root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}"]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        advice = f"DATA_DIR must hold VOC{year} or VOCdevkit/VOC{year}"
        raise FileNotFoundError(f"{folders[0].absolute()}: no such folder; {advice}")
    image_folder, files, pairs = folder / "JPEGImages", {}, []
    for file in glob.glob("**/*", root_dir=image_folder, recursive=True):  # an id may contain folders
        image_id, suffix = os.path.splitext(utils.composed(file.replace("\\", "/")))
        if suffix.lower() in IMAGE_SUFFIXES:
            files.setdefault(image_id, []).append(file)
    for image_id in map(utils.composed, read_lines(folder / "ImageSets" / "Main" / f"{name}.txt")):
        *first, last = image_id.rsplit(maxsplit=1)
        if image_id not in files and first and last in ("-1", "0", "1"):  # the second column of a list per class
            image_id = first[0]
        found = files.get(image_id, [f"{image_id}.jpg"])
        if len(found) > 1:
            raise ValueError(f"{image_folder}: {' and '.join(sorted(found))} are both images of {image_id}; remove one")
        pairs.append((f"{image_folder}/{found[0]}", find_file([f"{folder}/Annotations"], f"{image_id}.xml")))
    return pairs


def read_csv_list(file: str) -> list[tuple[str, str]]:
    """Lines `image,label`, both relative to the file; a header line of these two words is skipped -> pairs of paths."""
    pairs = []
    with utils.reading(file, "list of images", "it takes lines image,label with a .xml or .txt label"):
        for number, row in enumerate(csv.reader(io.StringIO(utils.read_text(file), newline="")), start=1):
            row = [cell.strip() for cell in row]
            if not any(row) or (number == 1 and row == ["image", "label"]):
                continue
            line = ",".join(row)
            if len(row) != 2 or not row[1].lower().endswith((".xml", ".txt")) or utils.printable(line) != line:
                raise ValueError(f"line {number}: {utils.printable(line[:80])!r}")
            pairs.append(tuple(find_file([os.path.dirname(file)], cell) for cell in row))
    return pairs


def read_darknet_list(file: str) -> list[tuple[str, str]]:
    """Darknet's list, an image per line, relative to the list or else to the working directory -> (image, label)."""
    images = [find_file([os.path.dirname(file), ""], line) for line in read_lines(file)]
    return [(image, darknet_label(image)) for image in images]


def darknet_label(image: str) -> str:
    """The label file of an image by Darknet's rule: `images` or `JPEGImages` in its path becomes `labels` (ours: only
    the last such folder), the suffix .txt. Without such a folder or file: beside the image."""
    label = re.sub(r"(^|.*[\\/])(JPEGImages|images)([\\/])", r"\1labels\3", image, count=1)
    folder, name = os.path.split(os.path.splitext(label)[0] + ".txt")
    return find_file([folder, os.path.dirname(image)], name)


def read_lines(file: str | os.PathLike) -> list[str]:
    """The lines of a list of images, without blank ones."""
    with utils.reading(file, "list of images", "correct DATA_DIR or IMAGE_SETS"):
        return list(filter(None, map(str.strip, utils.read_text(file).splitlines())))


def find_file(folders: list[str], name: str) -> str:
    """The path of a file that a list names: in the first folder that holds it, otherwise in the first of all. A list
    made on Windows may have backslashes and another case of the suffix, and one made on macOS decomposed names."""
    slashes = name.replace("\\", "/")
    stem, suffix = os.path.splitext(slashes)
    names = (name, slashes, utils.composed(slashes), unicodedata.normalize("NFD", slashes), stem + suffix.upper())
    paths = (os.path.join(folder, each) for each in dict.fromkeys(names) for folder in folders)  # the exact name first
    return next(filter(os.path.isfile, paths), os.path.join(folders[0], slashes))


# ---------------------------------------------------------------- reading labels
# The reader of a format only yields the objects of an image, (where, class name or index, difficult, box), with the box
# x1, y1, x2, y2 in the unit of the format. judge() does everything else, alike for all formats.

NO_LABELS = np.empty((0, 6))
# what tools write for `difficult`
DIFFICULT = {"": 0, "0": 0, "0.0": 0, "false": 0, "no": 0, "unspecified": 0, "1": 1, "1.0": 1, "true": 1, "yes": 1}


def judge(sample: Sample, objects: Iterable[tuple], declared, frame, classes: list[str], tolerate) -> Sample:
    """The record of an image with the labels and doubts that follow from the objects that a reader has yielded.

    declared: width and height of the image according to the label file, or zeros; frame: its width and height in the
    unit of the boxes, None for the size in pixels. Boxes are clipped to the image, and those with nothing left are
    dropped. Both are doubts, as are another declared size, the same box twice, and fractions in a format of pixels.
    Raises ValueError, naming file and object, for an unknown class or flag, or a box with x2 < x1, y2 < y1 or NaN."""
    size, doubts, rows = sample.size, list(sample.doubts), []
    if all(declared) and all(size) and declared != size:
        cause = "labelled without its EXIF rotation" if declared == size[::-1] else "resized after labelling"
        sizes = "declares {} x {}, but the image is {} x {}".format(*declared, *size)
        doubts.append(f"another image size: {sizes} ({cause}?)")
    size = size if all(size) else declared
    if not all(size):  # an unreadable image, whose boxes cannot be checked
        return sample
    width, height = frame or size
    left_out, cut_off, largest = [], [], 0.0
    for where, name, flag, (x1, y1, x2, y2) in objects:
        label = classes.index(name) if name in classes else name
        if isinstance(label, str) or not 0 <= label < len(classes):
            if "other classes" in tolerate:
                continue
            advice = "correct it, CLASSES or DATA_DIR, or set TOLERATE=['other classes']"
            names = ", ".join(classes)
            raise ValueError(f"{sample.label_file}, {where}: unknown class {name!r} (CLASSES: {names}); {advice}")
        difficult = DIFFICULT.get(str(flag).strip().lower())
        if difficult is None:
            raise ValueError(f"{sample.label_file}, {where}: difficult (COCO: iscrowd) must be 0 or 1, not {flag!r}")
        if not math.isfinite(x1 + y1 + x2 + y2) or x2 < x1 or y2 < y1:
            box = f"the box from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) has swapped corners or is not finite"
            raise ValueError(f"{sample.label_file}, {where}: {box}; correct or remove it")
        largest = max(largest, x2, y2)
        box = (x1 / width, y1 / height, x2 / width, y2 / height)
        inside = [min(max(side, 0.0), 1.0) for side in box]
        if inside[0] == inside[2] or inside[1] == inside[3]:
            left_out.append(where)
            continue
        rows.append((label, difficult, *inside))
        if max(abs(a - b) * pixels for a, b, pixels in zip(box, inside, size * 2, strict=True)) > 1.001:
            cut_off.append(where)
    if frame != (1, 1) and (rows or left_out) and largest <= 1:
        doubts.append("fractions instead of pixels: all boxes lie within the first pixel")
    if left_out:
        doubts.append(f"boxes left out: {len(left_out)} outside the image or without extent ({left_out[0]})")
    if cut_off:
        doubts.append(f"boxes cut off: {len(cut_off)} extend beyond the image by more than a pixel ({cut_off[0]})")
    if len({(label, *box) for label, _, *box in rows}) < len(rows):
        doubts.append("a box twice: two objects of one class have the same box")
    labels = np.array(rows, dtype=np.float64) if rows else NO_LABELS
    return sample._replace(size=size, labels=labels, doubts=tuple(doubts))


def unlabelled(image_file: str, label_file: str, image_id: int | str) -> Sample:
    """A record without labels. Its size is (0, 0) if the header of the image cannot be read."""
    try:
        return Sample(image_file, label_file, read_image_size(image_file), NO_LABELS, image_id, ())
    except (OSError, ValueError) as error:
        return Sample(image_file, label_file, (0, 0), NO_LABELS, image_id, (f"unreadable image: {error}",))


@contextlib.contextmanager
def collecting(problems: list[str] | None):
    """An error in the block is added to `problems`, if that is a list."""
    try:
        yield
    except (OSError, ValueError) as error:
        if problems is None:
            raise
        problems.append(str(error))


def read_sample(image_file: str, label_file: str, classes: list[str], tolerate=(), problems=None) -> Sample:
    """The record of an image with a VOC `.xml` or a YOLO `.txt` label file; arguments and errors as in list_samples."""
    sample = unlabelled(image_file, label_file, os.path.splitext(os.path.basename(image_file))[0])
    with collecting(problems):
        if not os.path.isfile(label_file):
            if "missing labels" in tolerate:
                return sample._replace(label_file="")
            if not os.path.isfile(image_file):
                advice = "paths in a list are relative to the list (.txt: or to the working directory)"
                raise FileNotFoundError(f"{image_file}: no such image; {advice}")
            advice = "make one, or set TOLERATE=['missing labels'] if such images have no objects"
            raise FileNotFoundError(f"{label_file}: no such label file; {advice}")
        if label_file.lower().endswith(".xml"):
            with utils.reading(label_file, "VOC annotation", "export the labels as Pascal VOC XML, in UTF-8"):
                objects, declared = read_voc_xml(label_file)
            sample = judge(sample, objects, declared, None, classes, tolerate)
        else:
            with utils.reading(label_file, "YOLO label file", "its lines are `class x y w h` in 0..1, or a polygon"):
                objects = list(read_yolo_txt(label_file))
            sample = judge(sample, objects, (0, 0), (1, 1), classes, tolerate)
    return sample


def read_voc_xml(file: str) -> tuple[list[tuple], tuple[int, int]]:
    """The objects of a VOC annotation, boxes in pixels from 0, and the width and height that it declares, or zeros. As
    in Darknet's voc_label.py, all four numbers are devkit pixels minus 1: x2 - x1 is one less than its width."""
    root = ElementTree.parse(file).getroot()
    if root.tag.startswith("{") or root.find("object") is None:  # a namespace, or perhaps <Object>
        for element in root.iter():
            element.tag = str(element.tag).rpartition("}")[2].lower()
    if root.tag != "annotation":
        raise ValueError(f"its root is <{root.tag}>")
    sides, objects = ("xmin", "ymin", "xmax", "ymax"), []
    for number, item in enumerate(root.iter("object"), start=1):
        elements = [*item, *item.findall("bndbox/*")]  # not those of a <part>
        tags = [element.tag for element in elements]
        if twice := [tag for tag in ("name", "difficult", "bndbox", *sides) if tags.count(tag) > 1]:
            raise ValueError(f"object {number} has {twice[0]} twice")
        texts = {element.tag: (element.text or "").strip() for element in elements}
        box = [float(texts[side]) - 1 for side in sides]
        name = utils.composed(texts.get("name", ""))
        objects.append((f"object {number}", name, texts.get("difficult", ""), box))
    declared = [(root.findtext(f"size/{side}") or "").strip() for side in ("width", "height")]
    return objects, tuple(int(side) if side.isdecimal() else 0 for side in declared)


def read_yolo_txt(file: str) -> Iterator[tuple]:
    """Yields the objects of a YOLO label file: lines `class x y w h`, centre and size in fractions of the image, or
    `class x1 y1 x2 y2 x3 y3 ...`, a polygon, whose bounding box is taken."""
    slack = 1e-4  # for rounding by the tool that wrote the file
    for number, line in enumerate(utils.read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            label, *numbers = map(float, line.split())
        except ValueError:
            label, numbers = math.nan, []
        is_polygon = len(numbers) >= 6 and len(numbers) % 2 == 0
        in_range = all(-slack <= value <= 1 + slack for value in numbers)
        if not label.is_integer() or not in_range or not (is_polygon or len(numbers) == 4):
            raise ValueError(f"line {number}: {utils.printable(line.strip()[:80])!r}")
        points = np.reshape(numbers, (-1, 2))  # (2, 2) centre and size, or the corners of the polygon
        if is_polygon:
            box = (*points.min(axis=0), *points.max(axis=0))
        else:
            box = (*points[0] - points[1] / 2, *points[0] + points[1] / 2)
        yield f"line {number}", int(label), 0, tuple(map(float, box))


def read_coco_file(root: str, file: str, classes: list[str], tolerate=(), problems=None) -> list[Sample]:
    """The records of a COCO JSON file; arguments and errors as in list_samples. Crowds count as difficult."""
    # in COCO's own layout, the images of instances_val2017.json are in val2017/
    name = Path(file).stem.rpartition("_")[2]
    parts = ("", "images", name, f"../{name}", f"images/{name}")
    bases = (os.path.dirname(file), root)
    folders = list(dict.fromkeys(os.path.normpath(os.path.join(base, part)) for base in bases for part in parts))
    with utils.reading(file, "COCO file", "export the labels as COCO JSON"):
        content = json.loads(utils.read_text(file))
        categories = coco_categories(content, classes)
        annotations = {image["id"]: [] for image in content["images"]}  # image id -> its annotations
        files = [find_file(folders, str(image["file_name"])) for image in content["images"]]
        if len(annotations) < len(content["images"]):
            raise ValueError("two images have the same id")
        unknown = 0
        for row in content.get("annotations", ()):
            if row["image_id"] in annotations:
                annotations[row["image_id"]].append(row)
            else:
                unknown += 1
    if unknown:
        print(f"{file}: skipped {unknown} annotations of images that the file does not list")
    is_labelled = "annotations" in content
    if not is_labelled and "missing labels" not in tolerate:
        raise ValueError(f"{file}: no annotations; set TOLERATE=['missing labels'] if its images have no objects")
    samples = []
    for image, path in zip(content["images"], files, strict=True):
        label_file = f"{file}, image {image['id']}"
        sample = unlabelled(path, label_file if is_labelled else "", image["id"])
        with collecting(problems):
            with utils.reading(label_file, "COCO annotation", "export the labels as COCO JSON"):
                objects = list(coco_objects(annotations[image["id"]], categories))
            sides = image.get("width"), image.get("height")
            declared = sides if all(type(side) is int and side > 0 for side in sides) else (0, 0)
            sample = judge(sample, objects, declared, declared if all(declared) else None, classes, tolerate)
        samples.append(sample)
    if files and not any(map(os.path.isfile, files)):
        raise FileNotFoundError(f"{file}: none of its images is in any of {', '.join(folders)}; set DATA_DIR")
    return samples


def coco_objects(annotations: list[dict], categories: dict) -> Iterator[tuple]:
    """Yields the objects of an image of a COCO file, boxes in pixels from 0 of the size that the file declares."""
    for row in annotations:
        if row["category_id"] not in categories:
            raise ValueError(f"annotation {row.get('id')} has the unknown category_id {row['category_id']!r}")
        x, y, w, h = map(float, row["bbox"])
        difficult = row.get("iscrowd") or row.get("ignore") or 0
        yield f"annotation {row.get('id')}", categories[row["category_id"]], difficult, (x, y, x + w, y + h)


# COCO's names of six classes -> those of Darknet's coco.names
DARKNET_NAMES = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant"}
DARKNET_NAMES |= {"dining table": "diningtable", "tv": "tvmonitor"}


def coco_categories(content: dict, classes: list[str]) -> dict:
    """The categories of a COCO file's content, id -> class name: its own, or Darknet's if only that is in `classes`."""
    names = {row["id"]: utils.composed(str(row["name"]).strip()) for row in content["categories"]}
    if len(names) < len(content["categories"]):
        raise ValueError("two categories have the same id")
    used = names.keys() & {row["category_id"] for row in content.get("annotations", ())}
    if len({names[key] for key in used}) < len(used):
        raise ValueError("two categories of the same name have annotations; rename or merge them")
    ids = {names[key]: key for key in [*names, *used]}  # of two with one name, the one with annotations
    names = {key: name for key, name in names.items() if ids[name] == key}
    others = {key: DARKNET_NAMES.get(name) for key, name in names.items() if name not in classes}
    return names | {key: other for key, other in others.items() if other in classes}


# ---------------------------------------------------------------- checking a data set


def drop_broken_images(dataset: VOCDataset, broken_list: str) -> None:
    """Lists the unreadable images of an evaluation set in a file and removes them: evaluation cannot replace them."""
    samples = dataset.samples
    dataset.samples = [sample for i, sample in enumerate(samples) if read_or_next(samples, i, broken_list)[1] == i]


def print_doubts(dataset: VOCDataset, where: str = "") -> None:
    """Prints what is probably wrong with a data set, one line per kind: how often it occurs, and where first."""
    samples, found = dataset.samples, {}
    counts = Counter(os.path.realpath(sample.image_file) for sample in samples)
    found["images listed more than once"] = [file for file, count in counts.items() if count > 1]
    found["images without a label file"] = [sample.image_file for sample in samples if not sample.label_file]
    used = np.concatenate([sample.labels[:, 0] for sample in samples])
    unused = [dataset.classes[c] for c in range(len(dataset.classes)) if c not in used]
    found[f"classes without objects, of the {len(dataset.classes)} in CLASSES"] = unused
    for sample in samples:
        for doubt in sample.doubts:
            kind, _, detail = doubt.partition(": ")
            found.setdefault(kind, []).append(f"{sample.label_file}: {detail}")
    for kind, cases in found.items():
        if cases:
            print(utils.printable(f"{kind}{where}: {len(cases)} (first: {cases[0]})"))


def check_training_sets(train_set: VOCDataset, eval_sets: dict[str, VOCDataset]) -> None:
    """Prints what is probably wrong with the data of a training run; raises ValueError if there is nothing to learn."""
    sets = {"training": train_set, **eval_sets}
    boxes = {}  # (M, 4) of each set, without difficult objects
    for name, data in sets.items():
        labels = np.concatenate([sample.labels for sample in data.samples])
        boxes[name] = labels[labels[:, 1] == 0, 2:]
    if len(boxes["training"]) == 0:
        raise ValueError("no training image has an object that is not difficult; check labels, CLASSES and TOLERATE")
    for name in sets:
        if len(boxes[name]) == 0:
            print(f"{name} will be nan, because its images have no objects, or only difficult ones")
    if "val_map" in sets:
        files = {name: {os.path.realpath(sample.image_file) for sample in sets[name].samples} for name in sets}
        if shared := files["training"] & files["val_map"]:
            print(f"images in both training and validation set: {len(shared)} (first: {utils.printable(min(shared))})")
        print_doubts(sets["val_map"], " in the validation set")
    print_doubts(train_set)
    size = train_set.image_size
    cells = (boxes["training"][:, 2:] - boxes["training"][:, :2]) * (size / 32)
    if (fit := average_best_iou(cells, train_set.anchors)) < 0.5:  # for example anchors for 416 pixels at 224
        print(f"ANCHORS fit the boxes badly (average IoU {fit:.2f}); dataset.py IMAGE_SIZE={size} prints better ones")


def find_problems(samples: list[Sample]) -> list[str]:
    """What is wrong or doubtful with records and images, one sentence each, naming the file; reads every image."""
    counts = Counter(os.path.realpath(sample.image_file) for sample in samples)
    problems = [f"{file}: listed {count} times" for file, count in counts.items() if count > 1]
    for sample in tqdm(samples, desc="reading", unit="image", leave=False, disable=None):
        try:
            read_image(sample.image_file)
            problems += [f"{sample.label_file}: {doubt}" for doubt in sample.doubts]
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return problems


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
        title = utils.drawable(str(dataset.samples[index].image_id), f"image {index}")
        axis.set_title(title, fontsize=9, parse_math=False)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    utils.write_picture(file, figure.savefig, dpi=100, format="png")
    plt.close(figure)


def follow_object(sample: Sample, anchors, size: int) -> list[tuple[str, list[float], str]]:
    """Traces the largest object of an image, difficult ones aside, from its box to its target -> lines of (step,
    numbers, explanation). anchors: A pairs in grid cells; size: network input in pixels."""
    labels = sample.labels[sample.labels[:, 1] == 0]
    label, _, *corners = labels[(labels[:, 4:] - labels[:, 2:4]).prod(axis=1).argmax()]
    width, height = sample.size
    box = box_convert(torch.tensor(corners), "xyxy", "cxcywh").tolist()
    cells = size // 32
    x, y, w, h = (cells * value for value in box)
    overlaps = shape_iou([[w, h]], anchors)[0].tolist()
    targets = encode_targets([box], [label], anchors, cells, cells)
    anchor, row, column = targets[..., 0].nonzero()[0].tolist()
    p_w, p_h = anchors[anchor]
    slot = targets[anchor, row, column].tolist()
    in_loss = [x - column, y - row, math.log(w / p_w), math.log(h / p_h)]
    pixels = utils.to_devkit_pixels(np.array(corners), width, height).tolist()
    return [
        ("ground truth", pixels, f"x1, y1, x2, y2: pixels of {width} x {height}, from 1"),
        ("centre and size", box, "x, y, w, h: fractions of the image"),
        ("in grid cells", [x, y, w, h], f"times {cells}"),
        ("cell", [column, row], "column, row: x and y without decimals"),
        ("IoU with the anchors", overlaps, f"shapes only; best: anchor {anchor}, {p_w:.2f} x {p_h:.2f} cells"),
        (f"target[{anchor}, {row}, {column}]", slot, "[anchor, row, column]: object, x, y, w, h, class"),
        ("in the loss", in_loss, "what sigma(t_x), sigma(t_y), t_w, t_h should be"),
    ]


def check_settings() -> None:
    """Raises ValueError or OSError for an invalid setting."""
    utils.check_settings(globals())
    utils.check_writable(SHEET)


def main() -> None:
    check_settings()
    problems = []
    anchors = read_anchors(ANCHORS, IMAGE_SIZE)
    dataset = VOCDataset(DATA_DIR, IMAGE_SETS, anchors, IMAGE_SIZE, CLASSES, True, TOLERATE, problems)
    samples = dataset.samples
    problems += find_problems(samples)
    labels = np.concatenate([sample.labels for sample in samples])  # (all objects, 6)
    print(f"{len(samples)} images, {len(labels)} objects, {int(labels[:, 1].sum())} of them difficult")
    if labels[:, 1].all():
        problems.append(f"{DATA_DIR}: no image has an object that is not difficult")
    counts = [len(sample.labels) for sample in samples]
    missing = sum(not sample.label_file for sample in samples)
    print(f"{counts.count(0)} images without objects ({missing} without a label file); at most {max(counts)} per image")
    for index, name in enumerate(dataset.classes):
        difficult = labels[labels[:, 0] == index, 1] > 0
        print(f"  {name:16s} {int((~difficult).sum()):6d}  difficult {int(difficult.sum()):5d}")
    grid, targets = IMAGE_SIZE // 32, 0
    for sample in samples:
        objects = sample.labels[sample.labels[:, 1] == 0]
        boxes = box_convert(torch.from_numpy(objects[:, 2:]), "xyxy", "cxcywh")
        targets += int(encode_targets(boxes, objects[:, 0], anchors, grid, grid)[..., 0].sum())
    plain = int((labels[:, 1] == 0).sum())
    print(f"{plain - targets} of {plain} objects lose their cell and anchor to another object at {IMAGE_SIZE} px")
    sizes = labels[:, 4:] - labels[:, 2:4]  # widths and heights
    if len(sizes):
        sides = np.percentile(np.sqrt(sizes.prod(axis=1)), [0, 25, 50, 75, 100])
        text = ", ".join(f"{side:.3f}" for side in sides)
        print(f"box size, as the square root of its share of the image: {text} (minimum, quartiles, maximum)")
        cells = sizes * (IMAGE_SIZE / 32)
        print(f"average IoU of ANCHORS:         {average_best_iou(cells, anchors):.3f}")
        if len(cells) >= len(anchors):
            better = kmeans_anchors(cells, len(anchors))
            text = ",".join(f"({w:.4g},{h:.4g})" for w, h in better.tolist())
            print(f"average IoU of k-means anchors: {average_best_iou(cells, better):.3f}")
            print(f'  for train.py: IMAGE_SIZE={IMAGE_SIZE} "ANCHORS=[{text}]"')
    for problem in problems:
        print(utils.printable(f"problem: {problem}"))
    if problems:
        sys.exit(f"{len(problems)} problems; correct them to get the label sheet")
    draw_label_sheet(dataset, SHEET, SHEET_IMAGES, SEED)
    print(f"no problems; look at {SHEET}: every box should enclose its object (those that lost their cell have none)")
    followed = next(sample for sample in samples if (sample.labels[:, 1] == 0).any())
    print(f"\nthe largest object of {utils.printable(followed.image_file)}, from label to target:")
    for step, numbers, explanation in follow_object(followed, anchors, IMAGE_SIZE):
        text = "".join(f"{number:.3f}".removesuffix(".000").rjust(8) for number in numbers)
        print(f"  {step:22s}{text:48s}  {explanation}")


if __name__ == "__main__":
    with utils.plain_errors():
        utils.override_globals(globals(), sys.argv[1:])
        main()
