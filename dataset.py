"""Data sets: Pascal VOC in the devkit's layout or as lists of files, ImageNet folders; augmentation, targets and k-means anchors.

As a script it checks a data set before you spend hours on it (`python dataset.py DATA_DIR=... IMAGE_SETS=...`): objects per class,
every unusable file with the reason, how well the anchors fit, and `runs/label_sheet.png`, augmented samples with encoded boxes.

Letters: M boxes of an image, A anchors (5), S_h x S_w grid cells (13 x 13 at 416 x 416). Rows are y, columns are x.
"""

import contextlib
import csv
import itertools
import math
import os
import random
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise it looks for its newest version on the network when imported

import albumentations
import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import utils

cv2.setNumThreads(0)  # one thread per process: the loader's workers run side by side

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# data
DATA_DIR = "data_samples/voc"  # holds VOC2007/ ..., or VOCdevkit/VOC2007/ ..., or the .csv lists
IMAGE_SETS = [("2007", "train")]  # (year, list) pairs, or names of .csv files with lines image,label
CLASSES = VOC_CLASSES
# model
IMAGE_SIZE = 416  # pixels of the sheet's samples, a multiple of 32
# run
SHEET = "runs/label_sheet.png"  # augmented samples with boxes
SHEET_IMAGES = 20
SEED = 0

# ---------------------------------------------------------------- reading images


@contextlib.contextmanager
def open_image(file: str | os.PathLike):
    """PIL's Image.open; whatever goes wrong inside becomes a FileNotFoundError or ValueError that names the file."""
    try:
        with Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such image") from None
    except (OSError, ValueError, SyntaxError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: not a readable image ({error}); replace it or take it off the list") from None


def read_image(file: str | os.PathLike) -> np.ndarray:
    """Reads an image of any mode as a viewer shows it (EXIF rotation applied) -> (H, W, 3) uint8 RGB.

    Transparent parts become white. Raises FileNotFoundError or ValueError, naming the file, where it is missing or broken.
    """
    with open_image(file) as image:
        ImageOps.exif_transpose(image, in_place=True)  # in place: otherwise it copies every image, rotated or not
        if image.mode.startswith("I;16"):  # 16-bit grey: keep the upper eight bits
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("32-bit grey has no defined white; save it with 8 bits")
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def image_size(file: str | os.PathLike) -> tuple[int, int]:
    """Width and height in pixels as read_image would return them, from the file's header alone; raises as read_image does."""
    with open_image(file) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 are rotated by 90 degrees
        return (image.height, image.width) if turned else (image.width, image.height)


# ---------------------------------------------------------------- reading lists and labels


def list_samples(root: str | os.PathLike, image_sets) -> list[tuple[str, str]]:
    """Pairs (image file, label file) of a data set, in list order.

    image_sets: (year, list) pairs of the VOC devkit, or names of `.csv` files in root with lines `image,label`, both relative to
    the csv file; without image_sets, root is such a csv file. Raises FileNotFoundError or ValueError, naming what is missing.
    """
    if os.fspath(root).endswith(".csv"):
        if image_sets:
            raise ValueError(f"{root}: DATA_DIR must be the folder of the lists that IMAGE_SETS names ({image_sets})")
        root, image_sets = os.path.dirname(root), [os.path.basename(root)]
    if isinstance(image_sets, str):
        image_sets = [image_sets]
    samples = []
    for image_set in image_sets:
        if isinstance(image_set, str):
            samples += read_csv_list(os.path.join(root, image_set))
            continue
        year, name = image_set
        folders = [Path(root) / f"VOC{year}", Path(root) / "VOCdevkit" / f"VOC{year}"]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"{folders[0]}: no such folder; DATA_DIR must hold VOC{year} or VOCdevkit/VOC{year}")
        list_file = folder / "ImageSets" / "Main" / f"{name}.txt"
        if not list_file.is_file():
            raise FileNotFoundError(f"{list_file}: no such list of images; name another one in IMAGE_SETS")
        for line in list_file.read_text(errors="replace").splitlines():
            if line.strip():
                image_id = line.split()[0]  # the devkit's lists per class have a second column
                samples.append((f"{folder}/JPEGImages/{image_id}.jpg", f"{folder}/Annotations/{image_id}.xml"))
    if not samples:
        raise ValueError(f"{root}: the lists {image_sets} name no image")
    return samples


def read_csv_list(file: str) -> list[tuple[str, str]]:
    """Lines `image,label` -> pairs of paths, both relative to the csv file; a first line of exactly these words is skipped."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such list of images")
    samples, folder = [], os.path.dirname(file)
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as stream:
        for number, row in enumerate(csv.reader(line.replace("\0", "") for line in stream), start=1):
            row = [cell.strip() for cell in row]
            if not any(row) or (number == 1 and row == ["image", "label"]):
                continue
            if len(row) != 2 or not row[1].lower().endswith((".xml", ".txt")) or not "".join(row).isprintable():
                raise ValueError(
                    f"{file}, line {number}: expected image,label with a .xml or .txt label, found {','.join(row)[:80]!r}"
                )
            samples.append((os.path.join(folder, row[0]), os.path.join(folder, row[1])))
    return samples


def read_labels(label_file: str, classes) -> np.ndarray:
    """One label file -> (G, 6) float64: class, difficult, x1, y1, x2, y2. A VOC `.xml` gives devkit pixels, a YOLO `.txt`
    fractions of the image.

    Raises FileNotFoundError or ValueError, naming the file: missing, broken, unknown class, empty box.
    """
    try:
        labels = read_voc_xml(label_file, classes) if is_voc_xml(label_file) else read_yolo_txt(label_file, classes)
    except FileNotFoundError:
        raise FileNotFoundError(f"{label_file}: no such label file, but a list names it") from None
    return np.array(labels, dtype=np.float64).reshape(-1, 6)


def is_voc_xml(label_file: str) -> bool:
    return label_file.lower().endswith(".xml")


def read_voc_xml(file: str, classes) -> list[list[float]]:
    """The objects of a VOC annotation, possibly none."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{file}: not readable as XML ({error})") from None
    labels = []
    for item in root.iter("object"):
        name = (item.findtext("name") or "").strip()
        if name not in classes:
            raise ValueError(f"{file}: unknown class {name!r}; correct it, or add it to CLASSES ({', '.join(classes)})")
        try:
            box = [float(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            difficult = float(int(item.findtext("difficult") or 0) != 0)
        except (TypeError, ValueError):
            raise ValueError(f"{file}: an object of class {name} has no bndbox of four numbers") from None
        if not all(map(math.isfinite, box)) or box[2] <= box[0] or box[3] <= box[1]:
            raise ValueError(f"{file}: the box {box} of class {name} has no extent (xmax <= xmin or ymax <= ymin)")
        labels.append([classes.index(name), difficult, *box])
    return labels


def read_yolo_txt(file: str, classes) -> list[list[float]]:
    """The objects of a YOLO label file, lines `class x y w h` with centre and size in fractions of the image."""
    labels = []
    with open(file, encoding="utf-8-sig", errors="replace") as stream:
        lines = [line.split() for line in stream]
    for number, words in enumerate(lines, start=1):
        if not words:
            continue
        try:
            label, x, y, w, h = int(words[0]), *(float(word) for word in words[1:])
        except ValueError:
            raise ValueError(f"{file}, line {number}: expected `class x y w h`, found {' '.join(words)[:80]!r}") from None
        if not 0 <= label < len(classes):
            raise ValueError(f"{file}, line {number}: class {label} is not one of the {len(classes)} in CLASSES")
        if not (0 <= x <= 1 and 0 <= y <= 1 and 0 < w <= 1 and 0 < h <= 1):
            raise ValueError(f"{file}, line {number}: x y w h must be fractions of the image in 0..1 and w, h above 0")
        labels.append([label, 0, x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return labels


# ---------------------------------------------------------------- augmentation


class DarknetColour(albumentations.ImageOnlyTransform):
    """Darknet's random_distort_image in HSV: hue shifted by up to `hue` of the circle, saturation and exposure (value)
    multiplied by a factor between 1/x and x (src/image.c). The library's own jitters only add, or blend with grey."""

    def __init__(self, hue: float = 0.1, saturation: float = 1.5, exposure: float = 1.5, p: float = 1.0):
        super().__init__(p=p)
        self.hue, self.saturation, self.exposure = hue, saturation, exposure

    def get_params(self) -> dict:
        def factor(limit):
            scale = self.py_random.uniform(1, limit)
            return scale if self.py_random.random() < 0.5 else 1 / scale

        shift = self.py_random.uniform(-self.hue, self.hue)
        return {"shift": shift, "factors": (factor(self.saturation), factor(self.exposure))}

    def apply(self, image: np.ndarray, shift: float, factors: tuple, **params) -> np.ndarray:
        # "full": the circle of hues has 256 steps, so that uint8 wraps around it
        hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL))
        hue += np.uint8(round(shift * 256) % 256)
        saturation, value = (  # clipped at 255; channel by channel, which is faster than one call for all three
            cv2.convertScaleAbs(channel, alpha=factor) for channel, factor in zip((saturation, value), factors, strict=True)
        )
        return cv2.cvtColor(cv2.merge([hue, saturation, value]), cv2.COLOR_HSV2RGB_FULL)


def train_transform(image_size: int) -> albumentations.Compose:
    """Augmentation to a square of image_size pixels; transforms boxes (M, 5) too: xyxy in fractions, class.

    Each side of the image moves by up to a fifth, outwards over grey or inwards, which jitters scale, aspect and placement (as
    load_data_region in Darknet's src/data.c); then resize, flip, colours. Boxes of which less than a tenth is left are dropped.
    """
    return albumentations.Compose(
        [
            albumentations.CropAndPad(percent=(-0.2, 0.2), keep_size=False, fill=127, sample_independently=True),
            albumentations.Resize(image_size, image_size, interpolation=cv2.INTER_LINEAR),
            albumentations.HorizontalFlip(p=0.5),
            DarknetColour(hue=0.1, saturation=1.5, exposure=1.5),
        ],
        bbox_params=albumentations.BboxParams(
            format="albumentations",
            min_visibility=0.1,
            clip=True,
            filter_invalid_bboxes=True,
            check_each_transform=False,  # the check at the end gives the same boxes in less time
        ),
    )


def test_transform(image_size: int) -> albumentations.Compose:
    """The whole image stretched to a square of image_size pixels; transforms boxes (M, 5) too: xyxy in fractions, class."""
    return albumentations.Compose(
        [albumentations.Resize(image_size, image_size, interpolation=cv2.INTER_LINEAR)],
        bbox_params=albumentations.BboxParams(format="albumentations", clip=True, filter_invalid_bboxes=True),
    )


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in 0..1."""
    return torch.from_numpy(image).permute(2, 0, 1).float().div_(255)


# ---------------------------------------------------------------- targets


def encode_targets(boxes, labels, anchors, grid_height: int, grid_width: int) -> Tensor:
    """boxes: (M, 4) cxcywh in fractions of the image; labels: (M,); anchors: A pairs in grid cells -> (A, S_h, S_w, 6) float32:
    objectness, x, y (offset in the cell, 0..1), w, h (in grid cells), class; zeros where there is no object.

    An object belongs to the cell of its centre and to the anchor whose shape it overlaps best, both placed at the origin. Where
    two objects want the same slot the later one takes it (forward_region_layer in Darknet's src/region_layer.c).
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    anchors = np.asarray(anchors, dtype=np.float64)
    targets = np.zeros((len(anchors), grid_height, grid_width, 6), dtype=np.float32)
    x, y, w, h = (boxes * [grid_width, grid_height, grid_width, grid_height]).T  # in grid cells
    column = np.clip(x.astype(int), 0, grid_width - 1)  # a centre on the right or lower border stays inside
    row = np.clip(y.astype(int), 0, grid_height - 1)
    anchor = shape_iou(np.stack([w, h], axis=1), anchors).argmax(dim=1).numpy() if len(boxes) else []
    values = np.stack([np.ones_like(x), x - column, y - row, w, h, np.asarray(labels, dtype=np.float64).reshape(-1)], axis=1)
    targets[anchor, row, column] = values  # numpy writes in order: of two objects in one slot the later one stays
    return torch.from_numpy(targets)


def shape_iou(sizes, anchors) -> Tensor:
    """IoU of shapes alone, all boxes at the same centre: sizes (M, 2), anchors (A, 2) of the same unit -> (M, A) float64."""
    sizes, anchors = torch.as_tensor(sizes, dtype=torch.float64), torch.as_tensor(anchors, dtype=torch.float64)
    boxes = torch.cat([torch.zeros_like(sizes), sizes], dim=1)  # (M, 4) cxcywh
    anchor_boxes = torch.cat([torch.zeros_like(anchors), anchors], dim=1)  # (A, 4)
    return utils.box_iou(boxes[:, None], anchor_boxes)


# ---------------------------------------------------------------- the data set


def read_or_next(samples: list[tuple], index: int, broken_list: str) -> tuple[np.ndarray, int]:
    """The image of samples[index], and the index of the image that was read.

    An image that cannot be read is an error, naming it. If broken_list names a file, the image is listed there instead and the
    next readable one is returned, so that one bad file does not end a run of several days.
    """
    for _ in range(len(samples)):
        try:
            return read_image(samples[index][0]), index
        except (OSError, ValueError) as error:
            if not broken_list:
                raise
            os.makedirs(os.path.dirname(os.path.abspath(broken_list)), exist_ok=True)
            with open(broken_list, "a+", encoding="utf-8") as stream:  # shared by the loader's workers
                stream.seek(0)
                if f"{error}\n" not in stream:
                    stream.write(f"{error}\n")
            index = (index + 1) % len(samples)
    raise ValueError(f"none of the {len(samples)} images can be read; {broken_list} lists them")


class VOCDataset(Dataset):
    """Images and encoded targets of VOC image sets or of csv lists (see list_samples).

    anchors: A pairs in grid cells; image_size: pixels, a multiple of 32; limit: use only the first so many images. All labels are
    read here, so that a wrong one shows at once. Difficult objects are ground truth but no targets, as in Darknet's voc_label.py.
    Raises FileNotFoundError or ValueError, naming the file.
    """

    def __init__(self, root, image_sets, anchors, image_size=416, classes=VOC_CLASSES, augment=False, limit: int | None = None):
        if image_size % 32 or image_size <= 0:
            raise ValueError(f"IMAGE_SIZE must be a multiple of 32 pixels, not {image_size}")
        self.anchors, self.image_size, self.classes, self.augment = anchors, image_size, list(classes), augment
        self.samples = list_samples(root, image_sets)[:limit]
        self.labels = [read_labels(label_file, self.classes) for _, label_file in self.samples]  # (G, 6) each, see read_labels
        self.transforms = {}  # one per image size
        self.broken_list = ""  # a file: an image that cannot be read is listed there and replaced by the next one

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """key: an index, or (index, image size, seed of the augmentation) -> image (3, H, W), targets (A, S_h, S_w, 6).

        The size is part of the key because a worker process would not see a changed attribute; the seed makes an augmentation
        the same in every worker.
        """
        index, size, seed = key if isinstance(key, tuple) else (key, self.image_size, None)
        if size not in self.transforms:
            self.transforms[size] = train_transform(size) if self.augment else test_transform(size)
        if self.augment and seed is not None:
            # one stream for all transforms: set_random_seed gives each the same numbers, and flip and hue would be correlated
            self.transforms[size].set_random_state(np.random.default_rng(seed), random.Random(seed))
        image, index = read_or_next(self.samples, index, self.broken_list)
        height, width = image.shape[:2]
        labels = self.labels[index][self.labels[index][:, 1] == 0]  # without difficult objects
        boxes = np.column_stack([self.in_fractions(index, labels[:, 2:], width, height), labels[:, 0]])  # (M, 5) xyxy, class
        augmented = self.transforms[size](image=image, bboxes=boxes)
        boxes = np.asarray(augmented["bboxes"], dtype=np.float64).reshape(-1, 5)
        centres, sizes = (boxes[:, 0:2] + boxes[:, 2:4]) / 2, boxes[:, 2:4] - boxes[:, 0:2]
        cells = size // 32
        targets = encode_targets(np.concatenate([centres, sizes], axis=1), boxes[:, 4], self.anchors, cells, cells)
        return to_tensor(augmented["image"]), targets

    def in_fractions(self, index: int, boxes: np.ndarray, width: int, height: int) -> np.ndarray:
        """Boxes (M, 4) xyxy of image `index`, in the unit of its label file -> fractions of the image of this size."""
        return (boxes - 1) / [width, height, width, height] if is_voc_xml(self.samples[index][1]) else boxes

    def ground_truth(self, index: int, size: tuple[int, int] | None = None) -> tuple[Tensor, str]:
        """-> (G, 6) float64: class, difficult, x1, y1, x2, y2 in devkit pixels of the original image; and the image id.

        size: width and height of the image, where they are known already.
        """
        image_file, label_file = self.samples[index]
        labels = self.labels[index].copy()
        if not is_voc_xml(label_file):
            labels[:, 2:] = utils.to_devkit_pixels(labels[:, 2:], *(size or image_size(image_file)))
        return torch.from_numpy(labels), Path(image_file).stem

    def images_and_sizes(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """The images of a batch as at test time (N, 3, H, W), and their original widths and heights (N, 2)."""
        transform, images, sizes = test_transform(self.image_size), [], []
        for index in indices:
            image = read_image(self.samples[index][0])
            images.append(to_tensor(transform(image=image, bboxes=np.empty((0, 5)))["image"]))
            sizes.append(image.shape[1::-1])
        return torch.stack(images), torch.tensor(sizes)


def drop_broken_images(dataset: VOCDataset, broken_list: str) -> None:
    """Lists the unreadable images of a data set for evaluation and removes them: there, no other image can replace them."""
    for index in reversed(range(len(dataset))):
        if read_or_next(dataset.samples, index, broken_list)[1] != index:
            del dataset.samples[index], dataset.labels[index]


def steps_per_epoch(count: int, batch_size: int, subdivisions: int = 1) -> int:
    """Optimiser steps per epoch of `count` images: whole batches, or a single incomplete one of a data set that fills none."""
    if count < batch_size and subdivisions > 1:
        raise ValueError(f"{count} images per epoch do not fill a batch of {batch_size}; lower BATCH_SIZE, or set SUBDIVISIONS=1")
    return max(1, count // batch_size)


def training_batches(
    count: int, batch_size: int, subdivisions: int, image_sizes: list[int], seed: int, first_step: int = 0, repeat: int = 1
) -> Iterator[list[tuple[int, int, int]]]:
    """Yields the batches of a training run from an optimiser step on, without end, as lists of VOCDataset keys (index, image size,
    seed of the augmentation). Each step has `subdivisions` of them, with batch_size / subdivisions images each.

    Every epoch shows each of `count` images `repeat` times in a new order; images that do not fill a batch are left out. Every 10
    steps a new size is drawn (YOLO9000 sec. 2, multi-scale training). Everything is a function of seed and step alone, so a
    resumed run sees the same batches as one that was never stopped.
    """
    steps = steps_per_epoch(count * repeat, batch_size, subdivisions)
    part = batch_size // subdivisions
    for epoch in itertools.count(first_step // steps):
        rng = np.random.default_rng([seed, epoch])
        order = np.concatenate([rng.permutation(count) for _ in range(repeat)])
        seeds = rng.integers(2**31, size=len(order))
        for step in range(max(epoch * steps, first_step), (epoch + 1) * steps):
            size = int(np.random.default_rng([seed, step // 10, 1]).choice(image_sizes))
            for start in range((step - epoch * steps) * batch_size, (step - epoch * steps + 1) * batch_size, part):
                chosen = slice(start, start + part)
                yield [(int(index), size, int(s)) for index, s in zip(order[chosen], seeds[chosen], strict=True)]


def files_of_step(samples: list[tuple], batches: Iterator, subdivisions: int) -> list[str]:
    """The image files of the next optimiser step of training_batches."""
    return [samples[index][0] for batch in itertools.islice(batches, subdivisions) for index, _, _ in batch]


# ---------------------------------------------------------------- ImageNet


class DarknetCrop(albumentations.ImageOnlyTransform):
    """Darknet's random_augment_image in one resampling: the image is scaled to a short side drawn from `sides`, stretched by an
    aspect between `aspect` and its inverse, rotated by up to `angle` degrees, and a square of `size` is cut out at random."""

    def __init__(self, size: int, sides: tuple[float, float], aspect: float = 0.75, angle: float = 7.0):
        super().__init__(p=1.0)
        self.size, self.sides, self.aspect, self.angle = size, sides, aspect, angle

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        height, width = params["shape"][:2]
        aspect = self.py_random.uniform(self.aspect, 1)
        aspect = aspect if self.py_random.random() < 0.5 else 1 / aspect
        scale = self.py_random.uniform(*self.sides) / min(height, width * aspect)
        scale_x, scale_y = scale * aspect, scale
        # how far the centre of the square may be from the centre of the image, in pixels of the scaled image
        room_x, room_y = abs(width * scale_x - self.size) / 2, abs(height * scale_y - self.size) / 2
        dx, dy = self.py_random.uniform(-room_x, room_x), self.py_random.uniform(-room_y, room_y)
        angle = math.radians(self.py_random.uniform(-self.angle, self.angle))
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        matrix = rotation @ np.diag([scale_x, scale_y])
        shift = np.array([self.size / 2 + dx, self.size / 2 + dy]) - matrix @ np.array([width / 2, height / 2])
        return {"matrix": np.column_stack([matrix, shift])}

    def apply(self, image: np.ndarray, matrix: np.ndarray, **params) -> np.ndarray:
        size = (self.size, self.size)
        return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


class ImageNetFolder(ImageFolder):
    """torchvision's ImageFolder with the keys of VOCDataset -> image (3, size, size) float32 in 0..1, class index.

    Where `broken_list` is set, training replaces an unreadable image by the next one, and validation labels it -100.
    """

    def __init__(self, folder: str, image_size: int, augment: bool, crop_scale: tuple[float, float]):
        super().__init__(folder)
        self.image_size, self.augment, self.crop_scale, self.transforms = image_size, augment, crop_scale, {}
        self.broken_list = ""  # as in VOCDataset

    def __getitem__(self, key: int | tuple[int, int, int]) -> tuple[Tensor, int]:
        index, size, seed = key if isinstance(key, tuple) else (key, self.image_size, None)
        if size not in self.transforms:
            self.transforms[size] = albumentations.Compose(
                [
                    DarknetCrop(size, (size * self.crop_scale[0], size * self.crop_scale[1])),
                    albumentations.HorizontalFlip(p=0.5),
                    DarknetColour(hue=0.1, saturation=4 / 3, exposure=4 / 3),
                ]
                if self.augment
                else [albumentations.SmallestMaxSize(size), albumentations.CenterCrop(size, size)]
            )
        if self.augment and seed is not None:
            # one stream of numbers for all transforms, as in VOCDataset
            self.transforms[size].set_random_state(np.random.default_rng(seed), random.Random(seed))
        image, taken = read_or_next(self.samples, index, self.broken_list)
        label = self.samples[taken][1] if self.augment or taken == index else -100  # validation counts no image twice
        return to_tensor(self.transforms[size](image=image)["image"]), label


def imagenet_dataset(
    root, split: str, image_size: int, augment: bool, crop_scale: tuple[float, float] = (0.5, 1.75), classes=None
) -> ImageNetFolder:
    """The images of root/split/<wnid>/, as ImageNet's tools lay them out; classes are the sorted wnids.

    augment: darknet19.cfg's crops, rotation, flips and colours; otherwise the centre square. crop_scale: smallest and largest
    short side of the image that a crop is taken from, relative to the crop (Darknet's min_crop and max_crop over its input: 128
    and 448 over 256 in darknet19.cfg; 448 and 512 over 448 in darknet19_448.cfg). classes: the wnids that must be there. Raises
    FileNotFoundError or ValueError, naming the folder, where it is missing or not sorted into the right class folders.
    """
    if not (len(crop_scale) == 2 and 0 < crop_scale[0] <= crop_scale[1]):
        raise ValueError(f"CROP_SCALE {crop_scale} must be two rising numbers above 0, such as (0.5, 1.75)")
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder; DATA_DIR must hold train/ and val/ with one folder per class")
    if not any(entry.is_dir() for entry in os.scandir(folder)):
        raise ValueError(
            f"{folder}: its images are not in class folders; move each to {split}/<wnid>/. For ImageNet's flat val/, line n of the "
            f"devkit's ILSVRC2012_validation_ground_truth.txt is the ILSVRC2012_ID of image n, and meta.mat gives its wnid"
        )
    try:
        dataset = ImageNetFolder(folder, image_size, augment, crop_scale)
    except FileNotFoundError as error:  # torchvision's, for class folders without images
        raise ValueError(f"{folder}: {utils.first_line(error)}") from None
    if classes is not None and dataset.classes != classes:
        odd = sorted(set(dataset.classes) ^ set(classes))
        raise ValueError(f"{root}: train/ and val/ have different class folders ({', '.join(odd[:5])}); both need all of them")
    return dataset


# ---------------------------------------------------------------- anchors


def average_best_iou(box_sizes, anchors) -> float:
    """The mean over the boxes of the IoU with the best anchor, shapes alone (YOLO9000 Table 1); the same unit for both."""
    return float(shape_iou(box_sizes, anchors).amax(dim=1).mean())


def kmeans_anchors(box_sizes, k: int, seeds: int = 5) -> Tensor:
    """k anchors by the paper's clustering with the distance 1 - IoU (YOLO9000 sec. 2, dimension clusters).

    box_sizes: (M, 2) widths and heights -> (k, 2) of the same unit, by rising area; the best of `seeds` starts. Raises ValueError
    where there are fewer boxes than anchors.
    """
    box_sizes = torch.as_tensor(np.asarray(box_sizes), dtype=torch.float64)
    if len(box_sizes) < k:
        raise ValueError(f"{len(box_sizes)} boxes are too few for {k} anchors")
    best, best_iou = None, -1.0
    for seed in range(seeds):
        anchors, nearest = box_sizes[np.random.default_rng(seed).choice(len(box_sizes), k, replace=False)], None
        for _ in range(300):
            assignment = shape_iou(box_sizes, anchors).argmax(dim=1)  # the largest IoU is the smallest distance
            if nearest is not None and torch.equal(assignment, nearest):
                break
            nearest = assignment
            for cluster in range(k):
                if (nearest == cluster).any():
                    anchors[cluster] = box_sizes[nearest == cluster].mean(dim=0)
        if (iou := average_best_iou(box_sizes, anchors)) > best_iou:
            best, best_iou = anchors, iou
    return best[best.prod(dim=1).argsort()]


# ---------------------------------------------------------------- python dataset.py: checking a data set


def check_dataset(samples: list[tuple[str, str]], classes) -> tuple[list[str], list[np.ndarray], np.ndarray]:
    """Reads every file of a data set -> problems (one sentence each, naming the file), labels per image, box sizes in fractions."""
    problems, all_labels, sizes = [], [], [np.empty((0, 2))]
    problems += [f"{image}: listed {count} times" for (image, _), count in Counter(samples).items() if count > 1]
    for image_file, label_file in tqdm(samples, desc="reading", unit="image", leave=False, disable=None):
        labels = image = None
        try:
            labels = read_labels(label_file, classes)
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
        boxes = labels[:, 2:] if is_voc_xml(label_file) else utils.to_devkit_pixels(labels[:, 2:], width, height)
        outside = (boxes[:, :2] < 0).any(axis=1) | (boxes[:, 2] > width + 1.5) | (boxes[:, 3] > height + 1.5)
        problems += [
            f"{label_file}: the box {box.round(1).tolist()} extends beyond the image of {width} x {height}"
            for box in boxes[outside]
        ]
        sizes.append((boxes[:, 2:] - boxes[:, :2]) / [width, height])
    for kind, position in (("image", 0), ("label", 1)):  # files of the same folders that no list names
        named = {os.path.abspath(sample[position]) for sample in samples}
        suffixes = {os.path.splitext(file)[1] for file in named}
        for folder in sorted({os.path.dirname(file) for file in named if os.path.isdir(os.path.dirname(file))}):
            extra = [entry for entry in os.scandir(folder) if Path(entry).suffix in suffixes and entry.path not in named]
            if extra:
                first = min(entry.name for entry in extra)
                print(f"{folder}: {len(extra)} {kind} files that are in none of these lists, {first} first")
    return problems, all_labels, np.concatenate(sizes)


def draw_label_sheet(dataset: VOCDataset, file: str, count: int, seed: int) -> None:
    """Draws `count` samples as the network gets them, with the boxes decoded from their targets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns, rows = 5, math.ceil(count / 5)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3 * rows), squeeze=False)
    chosen = np.random.default_rng(seed).permutation(len(dataset))
    for axis, place in zip(axes.flat, range(count), strict=False):
        index = int(chosen[place % len(chosen)])
        image, targets = dataset[(index, dataset.image_size, seed + place)]
        cell = image.shape[-1] / targets.shape[2]  # pixels
        _, row, column = torch.nonzero(targets[..., 0], as_tuple=True)
        _, x, y, w, h, labels = targets[targets[..., 0] > 0].T
        centres = torch.stack([column + x, row + y], dim=1) * cell
        extents = torch.stack([w, h], dim=1) * cell / 2
        boxes = torch.cat([centres - extents, centres + extents], dim=1)
        names = [dataset.classes[int(label)] for label in labels]
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        axis.imshow(utils.draw_boxes(pixels, boxes, names, labels))
        axis.set_title(Path(dataset.samples[index][0]).stem, fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    with utils.atomic_write(file) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def main() -> None:
    from model import ANCHORS  # here, because model.py is not needed by the module itself

    samples = list_samples(DATA_DIR, IMAGE_SETS)
    problems, all_labels, sizes = check_dataset(samples, list(CLASSES))
    labels = np.concatenate(all_labels) if all_labels else np.empty((0, 6))
    print(f"{len(samples)} images, {len(labels)} objects, {int(labels[:, 1].sum())} of them difficult")
    empty = sum(len(part) == 0 for part in all_labels)
    print(f"{empty} images without objects; at most {max((len(part) for part in all_labels), default=0)} objects in an image")
    for index, name in enumerate(CLASSES):
        difficult = labels[labels[:, 0] == index, 1] > 0
        print(f"  {name:16s} {int((~difficult).sum()):6d}  difficult {int(difficult.sum()):5d}")
    if len(sizes):
        sides = np.percentile(np.sqrt(sizes.prod(axis=1)), [0, 25, 50, 75, 100])
        text = ", ".join(f"{side:.3f}" for side in sides)
        print(f"box size, square root of its share of the image: {text} (minimum, quartiles, maximum)")
        cells = IMAGE_SIZE / 32
        print(f"average IoU of the anchors in use: {average_best_iou(sizes * cells, ANCHORS):.3f}")
        if len(sizes) >= len(ANCHORS):
            fresh = kmeans_anchors(sizes * cells, len(ANCHORS))
            text = ", ".join(f"({w:.2f}, {h:.2f})" for w, h in fresh.tolist())
            print(f"average IoU of new anchors:        {average_best_iou(sizes * cells, fresh):.3f}  {text} cells at {IMAGE_SIZE}")
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        sys.exit(f"{len(problems)} problems; the label sheet is drawn when they are corrected")
    dataset = VOCDataset(DATA_DIR, IMAGE_SETS, ANCHORS, IMAGE_SIZE, CLASSES, augment=True)
    draw_label_sheet(dataset, SHEET, SHEET_IMAGES, SEED)
    print(f"no problems; look at {SHEET}: every box should enclose its object")


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
