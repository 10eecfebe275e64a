"""Pascal VOC in the devkit's layout or as pairs of files, augmentation, the encoding of targets, and anchors by k-means.

As a script it checks a data set before hours are spent on it (`python dataset.py DATA_DIR=... IMAGE_SETS=...`): counts per class,
what is wrong with which file, how well the anchors fit, and `runs/label_sheet.png`, augmented samples with their encoded boxes.

Letters: M boxes of an image, A anchors (5), S_h x S_w grid cells (13 x 13 at 416 x 416). Rows are y, columns are x.
"""

import csv
import math
import os
import random
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or it asks the network for its newest version when imported

import albumentations
import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import utils

cv2.setNumThreads(0)  # one thread a process: the loader's workers run side by side

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

# ---------------------------------------------------------------- reading


def list_samples(root: str | os.PathLike, image_sets) -> list[tuple[str, str]]:
    """Pairs (image file, label file) of a data set, in list order.

    image_sets: (year, list) pairs of the VOC devkit, or names of `.csv` files in root with lines `image,label`, both relative to
    the csv file; root may also be such a csv file itself. Raises FileNotFoundError or ValueError, naming what is missing.
    """
    if os.fspath(root).endswith(".csv"):
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
                image_id = line.split()[0]  # the devkit's lists by class have a second column
                samples.append((f"{folder}/JPEGImages/{image_id}.jpg", f"{folder}/Annotations/{image_id}.xml"))
    if not samples:
        raise ValueError(f"{root}: the lists {image_sets} name no image")
    return samples


def read_csv_list(file: str) -> list[tuple[str, str]]:
    """Lines `image,label` -> pairs of paths, both relative to the csv file; a first line of just these words is skipped."""
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


def read_labels(image_file: str, label_file: str, classes) -> np.ndarray:
    """One label file, VOC `.xml` or YOLO `.txt` -> (G, 6) float64: class, difficult, x1, y1, x2, y2 in devkit pixels.

    Raises FileNotFoundError or ValueError, naming the file: missing, broken, unknown class, box without extent.
    """
    try:
        rows = (
            read_voc_xml(label_file, classes)
            if label_file.lower().endswith(".xml")
            else read_yolo_txt(image_file, label_file, classes)
        )
    except FileNotFoundError as error:
        if error.filename is None:
            raise
        raise FileNotFoundError(f"{label_file}: no such label file, but a list names it") from None
    return np.array(rows, dtype=np.float64).reshape(-1, 6)


def read_voc_xml(file: str, classes) -> list[list[float]]:
    """The objects of a VOC annotation; none is fine."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{file}: not readable as XML ({error})") from None
    rows = []
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
        rows.append([classes.index(name), difficult, *box])
    return rows


def read_yolo_txt(image_file: str, file: str, classes) -> list[list[float]]:
    """The objects of a YOLO label file, lines `class x y w h` with centre and size in fractions of the image."""
    rows = []
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
        rows.append([label, 0, x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    if rows:
        try:
            width, height = utils.image_size(image_file)
        except (OSError, ValueError):
            width, height = 1, 1  # whoever reads the image itself says what is wrong with it, or skips it
        for row in rows:
            row[2:] = utils.to_devkit_pixels(np.array(row[2:]), width, height)
    return rows


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
        saturation, value = (  # clipped at 255; plane by plane, which is faster than one call for all three
            cv2.convertScaleAbs(plane, alpha=factor) for plane, factor in zip((saturation, value), factors, strict=True)
        )
        return cv2.cvtColor(cv2.merge([hue, saturation, value]), cv2.COLOR_HSV2RGB_FULL)


def train_transform(image_size: int) -> albumentations.Compose:
    """Augmentation to a square of image_size pixels; carries boxes (M, 5) along: xyxy in fractions, class.

    Each side of the image moves by up to a fifth, outwards over grey or inwards, which jitters scale, aspect and placement (as
    load_data_region in Darknet's src/data.c); then one resize, flip, colours. A box of which under a tenth is left is dropped.
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
            check_each_transform=False,  # the check at the end gives the same boxes for less
        ),
    )


def test_transform(image_size: int) -> albumentations.Compose:
    """The whole image stretched to a square of image_size pixels; carries boxes (M, 5) along: xyxy in fractions, class."""
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
    objectness, x, y (offset in the cell, 0..1), w, h (in grid cells), class; zeros where no object is.

    An object belongs to the cell of its centre and to the anchor whose shape it overlaps best, both placed at the origin. Where
    two objects want the same slot the later one takes it (forward_region_layer in Darknet's src/region_layer.c).
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    anchors = np.asarray(anchors, dtype=np.float64)
    targets = np.zeros((len(anchors), grid_height, grid_width, 6), dtype=np.float32)
    scaled = boxes * [grid_width, grid_height, grid_width, grid_height]  # in grid cells
    x, y, w, h = scaled.T
    column = np.clip(x.astype(int), 0, grid_width - 1)  # a centre on the right or lower border stays inside
    row = np.clip(y.astype(int), 0, grid_height - 1)
    anchor = shape_iou(scaled[:, 2:], anchors).argmax(axis=1) if len(boxes) else np.empty(0, int)
    values = np.stack([np.ones_like(x), x - column, y - row, w, h, np.asarray(labels, dtype=np.float64).reshape(-1)], axis=1)
    targets[anchor, row, column] = values  # numpy writes in order: the later object stays
    return torch.from_numpy(targets)


def shape_iou(sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """IoU of shapes alone, all boxes at the origin: sizes (M, 2), anchors (A, 2) of the same unit -> (M, A)."""
    intersection = np.minimum(sizes[:, None, 0], anchors[None, :, 0]) * np.minimum(sizes[:, None, 1], anchors[None, :, 1])
    return intersection / (sizes.prod(axis=1)[:, None] + anchors.prod(axis=1)[None] - intersection)


# ---------------------------------------------------------------- the data set


def read_or_next(samples: list[tuple], index: int, broken_list: str) -> tuple[np.ndarray, int]:
    """The image of samples[index] and its index; where it cannot be read and broken_list names a file, it is listed there and the
    next readable one is taken, so that a run of days does not end at one bad sector. Raises as utils.read_image otherwise."""
    for _ in range(len(samples)):
        try:
            return utils.read_image(samples[index][0]), index
        except (OSError, ValueError) as error:
            if not broken_list:
                raise
            os.makedirs(os.path.dirname(os.path.abspath(broken_list)), exist_ok=True)
            with open(broken_list, "a+") as stream:  # the loader's workers share it
                stream.seek(0)
                if f"{error}\n" not in stream:
                    stream.write(f"{error}\n")
            index = (index + 1) % len(samples)
    raise ValueError(f"none of the {len(samples)} images can be read; {broken_list} lists them")


class VOCDataset(Dataset):
    """Images and encoded targets of VOC image sets or of csv lists (see list_samples).

    anchors: A pairs in grid cells; image_size: pixels, a multiple of 32. All labels are read here, so that a wrong one shows at
    once. Difficult objects are ground truth but no targets, as in Darknet's voc_label.py. Raises FileNotFoundError or ValueError,
    naming the file.
    """

    def __init__(self, root, image_sets, anchors, image_size: int = 416, classes=VOC_CLASSES, augment: bool = False):
        if image_size % 32 or image_size <= 0:
            raise ValueError(f"IMAGE_SIZE must be a multiple of 32 pixels, not {image_size}")
        self.anchors, self.image_size, self.classes, self.augment = anchors, image_size, list(classes), augment
        self.samples = list_samples(root, image_sets)
        self.rows = [read_labels(image_file, label_file, self.classes) for image_file, label_file in self.samples]
        self.transforms = {}  # one per image size
        self.broken_list = ""  # a file: an image that cannot be read is listed there and the next one taken instead

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """key: an index, or (index, image size, seed of the augmentation) -> image (3, H, W), targets (A, S_h, S_w, 6).

        The size travels with the index, because a worker process would not see a changed attribute; the seed makes an
        augmentation the same in whichever worker it runs.
        """
        index, size, seed = key if isinstance(key, tuple) else (key, self.image_size, None)
        if size not in self.transforms:
            self.transforms[size] = train_transform(size) if self.augment else test_transform(size)
        if self.augment and seed is not None:
            # one stream of numbers for all of them; set_random_seed would give each the same numbers, and flips would tell hues
            self.transforms[size].set_random_state(np.random.default_rng(seed), random.Random(seed))
        image, index = read_or_next(self.samples, index, self.broken_list)
        rows = self.rows[index][self.rows[index][:, 1] == 0]  # without the difficult ones
        height, width = image.shape[:2]
        boxes = np.concatenate(
            [(rows[:, 2:] - 1) / [width, height, width, height], rows[:, :1]], axis=1
        )  # (M, 5) xyxy fractions, class
        moved = self.transforms[size](image=image, bboxes=boxes)
        boxes = np.asarray(moved["bboxes"], dtype=np.float64).reshape(-1, 5)
        centres, sizes = (boxes[:, 0:2] + boxes[:, 2:4]) / 2, boxes[:, 2:4] - boxes[:, 0:2]
        cells = size // 32
        targets = encode_targets(np.concatenate([centres, sizes], axis=1), boxes[:, 4], self.anchors, cells, cells)
        return to_tensor(moved["image"]), targets

    def ground_truth(self, index: int) -> tuple[Tensor, str]:
        """-> (G, 6) float64: class, difficult, x1, y1, x2, y2 in devkit pixels of the original image; and the image id."""
        return torch.from_numpy(self.rows[index].copy()), Path(self.samples[index][0]).stem

    def original_size(self, index: int) -> tuple[int, int]:
        """Width and height of the image file in pixels."""
        return utils.image_size(self.samples[index][0])


def drop_broken_images(dataset: VOCDataset, broken_list: str) -> None:
    """Lists the images of a data set to evaluate on that cannot be read, and takes them off it: no other can stand in for them."""
    for index in reversed(range(len(dataset))):
        if read_or_next(dataset.samples, index, broken_list)[1] != index:
            del dataset.samples[index], dataset.rows[index]


def epoch_batches(
    count: int, batch_size: int, epoch: int, seed: int, image_sizes: list[int], batches_per_size: int = 10, repeat: int = 1
) -> list[list[tuple[int, int, int]]]:
    """The batches of one training epoch as lists of VOCDataset keys (index, image size, augmentation seed), freshly shuffled.

    Every `batches_per_size` batches of the epoch a new size is drawn (YOLO9000 sec. 2, multi-scale training). All is a function of
    seed and epoch alone, whatever the number of workers. An incomplete last batch is left out where there is a complete one.
    """
    rng = np.random.default_rng([seed, epoch])
    order = np.concatenate([rng.permutation(count) for _ in range(repeat)])
    seeds = rng.integers(2**31, size=len(order))
    number = max(1, len(order) // batch_size)
    batches = []
    for batch in range(number):
        size = int(np.random.default_rng([seed, epoch, 1, batch // batches_per_size]).choice(image_sizes))
        part = slice(batch * batch_size, (batch + 1) * batch_size)
        batches.append([(int(index), size, int(s)) for index, s in zip(order[part], seeds[part], strict=True)])
    return batches


# ---------------------------------------------------------------- ImageNet


class DarknetCrop(albumentations.ImageOnlyTransform):
    """Darknet's random_augment_image in one resampling: the image is scaled to a short side drawn from `sides`, stretched by an
    aspect between `aspect` and its inverse, turned by up to `angle` degrees, and a square of `size` is cut out at random."""

    def __init__(self, size: int, sides: tuple[float, float], aspect: float = 0.75, angle: float = 7.0):
        super().__init__(p=1.0)
        self.size, self.sides, self.aspect, self.angle = size, sides, aspect, angle

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        height, width = params["shape"][:2]
        aspect = self.py_random.uniform(self.aspect, 1)
        aspect = aspect if self.py_random.random() < 0.5 else 1 / aspect
        scale = self.py_random.uniform(*self.sides) / min(height, width * aspect)
        scale_x, scale_y = scale * aspect, scale
        # how far the middle of the square may lie from the middle of the image, in pixels of the scaled image
        room_x, room_y = abs(width * scale_x - self.size) / 2, abs(height * scale_y - self.size) / 2
        dx, dy = self.py_random.uniform(-room_x, room_x), self.py_random.uniform(-room_y, room_y)
        turn = math.radians(self.py_random.uniform(-self.angle, self.angle))
        turned = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        matrix = turned @ np.diag([scale_x, scale_y])
        shift = np.array([self.size / 2 + dx, self.size / 2 + dy]) - matrix @ np.array([width / 2, height / 2])
        return {"matrix": np.column_stack([matrix, shift])}

    def apply(self, image: np.ndarray, matrix: np.ndarray, **params) -> np.ndarray:
        size = (self.size, self.size)
        return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


class ImageNetFolder(ImageFolder):
    """torchvision's ImageFolder for keys as VOCDataset takes them -> image (3, size, size) float32 in 0..1, class index.

    Where `broken_list` is set, training takes another image for one that cannot be read, and validation gives it the label -100.
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
            # one stream of numbers for all of them; set_random_seed would give each the same numbers, and flips would tell hues
            self.transforms[size].set_random_state(np.random.default_rng(seed), random.Random(seed))
        image, taken = read_or_next(self.samples, index, self.broken_list)
        label = self.samples[taken][1] if self.augment or taken == index else -100  # a neighbour must not count twice
        return to_tensor(self.transforms[size](image=image)["image"]), label


def imagenet_dataset(
    root: str | os.PathLike, split: str, image_size: int, augment: bool, crop_scale: tuple[float, float] = (0.5, 1.75)
) -> ImageNetFolder:
    """The images of root/split/<wnid>/, as ImageNet's tools lay them out; classes are the sorted wnids.

    augment: darknet19.cfg's crops, rotation, flips and colours; otherwise the centre square. crop_scale: least and greatest short
    side of an image that a crop is taken from, in sides of the crop (Darknet's min_crop and max_crop over its input: 128 and 448
    over 256 in darknet19.cfg; 448 and 512 over 448 in darknet19_448.cfg). Raises FileNotFoundError or ValueError, naming the
    folder, where it is missing or not sorted into class folders.
    """
    if not (len(crop_scale) == 2 and 0 < crop_scale[0] <= crop_scale[1]):
        raise ValueError(f"CROP_SCALE {crop_scale} must be two rising numbers above 0, as (0.5, 1.75)")
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder; DATA_DIR must hold train/ and val/ with a folder for each class")
    if not any(entry.is_dir() for entry in os.scandir(folder)):
        raise ValueError(
            f"{folder}: its images are not in class folders; move each to {split}/<wnid>/. For ImageNet's flat val/, line n of the "
            f"devkit's ILSVRC2012_validation_ground_truth.txt is the ILSVRC2012_ID of image n, and meta.mat names its wnid"
        )
    try:
        return ImageNetFolder(folder, image_size, augment, crop_scale)
    except FileNotFoundError as error:  # torchvision's, for class folders without images
        raise ValueError(f"{folder}: {utils.first_line(error)}") from None


# ---------------------------------------------------------------- anchors


def average_best_iou(box_sizes: np.ndarray, anchors) -> float:
    """The mean over the boxes of the IoU with the best anchor, shapes alone (YOLO9000 Table 1); one unit for both."""
    return float(shape_iou(np.asarray(box_sizes, dtype=np.float64), np.asarray(anchors, dtype=np.float64)).max(axis=1).mean())


def kmeans_anchors(box_sizes, k: int, seeds: int = 5) -> Tensor:
    """k anchors by the paper's clustering with the distance 1 - IoU (YOLO9000 sec. 2, dimension clusters).

    box_sizes: (M, 2) widths and heights -> (k, 2) of the same unit, by rising area; the best of `seeds` starts. Raises ValueError
    where there are fewer boxes than anchors.
    """
    box_sizes = np.asarray(box_sizes, dtype=np.float64)
    if len(box_sizes) < k:
        raise ValueError(f"{len(box_sizes)} boxes are too few for {k} anchors")
    best, best_iou = None, -1.0
    for seed in range(seeds):
        anchors = np.random.default_rng(seed).choice(box_sizes, k, replace=False)
        nearest = None
        for _ in range(300):
            assignment = shape_iou(box_sizes, anchors).argmax(axis=1)  # the largest IoU is the smallest distance
            if nearest is not None and np.array_equal(assignment, nearest):
                break
            nearest = assignment
            counts = np.bincount(nearest, minlength=k)
            for side in range(2):
                sums = np.bincount(nearest, weights=box_sizes[:, side], minlength=k)
                anchors[:, side] = np.where(counts > 0, sums / np.maximum(counts, 1), anchors[:, side])
        if (iou := average_best_iou(box_sizes, anchors)) > best_iou:
            best, best_iou = anchors, iou
    return torch.from_numpy(best[np.argsort(best.prod(axis=1))])


# ---------------------------------------------------------------- the data set's own check


def check_dataset(samples: list[tuple[str, str]], classes) -> tuple[list[str], list[np.ndarray], np.ndarray]:
    """Reads every file of a data set -> problems (a sentence each, naming the file), label rows, box sizes in fractions."""
    problems, all_rows, sizes = [], [], [np.empty((0, 2))]
    problems += [f"{image}: listed {count} times" for (image, _), count in Counter(samples).items() if count > 1]
    for image_file, label_file in tqdm(samples, desc="reading", unit="image", leave=False, disable=None):
        rows = image = None
        try:
            rows = read_labels(image_file, label_file, classes)
            all_rows.append(rows)
        except (OSError, ValueError) as error:
            problems.append(str(error))
        try:
            image = utils.read_image(image_file)
        except (OSError, ValueError) as error:
            problems.append(str(error))
        if rows is None or image is None:
            continue
        height, width = image.shape[:2]
        outside = (rows[:, 2:4] < 0).any(axis=1) | (rows[:, 4] > width + 1.5) | (rows[:, 5] > height + 1.5)
        problems += [
            f"{label_file}: the box {row[2:].round(1).tolist()} leaves the image of {width} x {height}" for row in rows[outside]
        ]
        sizes.append((rows[:, 4:6] - rows[:, 2:4]) / [width, height])
    for kind, position in (("image", 0), ("label", 1)):  # files of the same folders that no list names
        named = {os.path.abspath(sample[position]) for sample in samples}
        suffixes = {os.path.splitext(file)[1] for file in named}
        for folder in sorted({os.path.dirname(file) for file in named if os.path.isdir(os.path.dirname(file))}):
            extra = [
                entry for entry in os.scandir(folder) if os.path.splitext(entry.name)[1] in suffixes and entry.path not in named
            ]
            if extra:
                print(
                    f"{folder}: {len(extra)} {kind} files that these lists do not name, {min(entry.name for entry in extra)} first"
                )
    return problems, all_rows, np.concatenate(sizes)


def draw_label_sheet(dataset: VOCDataset, file: str, count: int, seed: int) -> None:
    """Draws `count` samples as the network gets them, with the boxes decoded from their targets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 5
    figure, axes = plt.subplots(
        math.ceil(count / columns), columns, figsize=(3 * columns, 3 * math.ceil(count / columns)), squeeze=False
    )
    chosen = np.random.default_rng(seed).permutation(len(dataset))
    for axis, place in zip(axes.flat, range(count), strict=False):
        index = int(chosen[place % len(chosen)])
        image, targets = dataset[(index, dataset.image_size, seed + place)]
        cell = image.shape[-1] / targets.shape[2]  # pixels
        anchor, row, column = torch.nonzero(targets[..., 0], as_tuple=True)
        _, x, y, w, h, labels = targets[anchor, row, column].T
        centres = torch.stack([column + x, row + y], dim=1) * cell
        extents = torch.stack([w, h], dim=1) * cell / 2
        boxes = torch.cat([centres - extents, centres + extents], dim=1)
        names = [dataset.classes[int(label)] for label in labels]
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        axis.imshow(utils.draw_boxes(pixels, boxes, names, labels))
        axis.set_title(dataset.ground_truth(index)[1], fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    from model import ANCHORS  # only this check needs them; the module itself stands on utils alone

    samples = list_samples(DATA_DIR, IMAGE_SETS)
    problems, all_rows, sizes = check_dataset(samples, list(CLASSES))
    rows = np.concatenate(all_rows) if all_rows else np.empty((0, 6))
    print(f"{len(samples)} images, {len(rows)} objects, {int(rows[:, 1].sum())} of them difficult")
    empty = sum(len(part) == 0 for part in all_rows)
    print(f"{empty} images without objects; at most {max((len(part) for part in all_rows), default=0)} objects in an image")
    for index, name in enumerate(CLASSES):
        of_class = rows[:, 0] == index
        print(
            f"  {name:16s} {int((of_class & (rows[:, 1] == 0)).sum()):6d}  difficult {int((of_class & (rows[:, 1] > 0)).sum()):5d}"
        )
    if len(sizes):
        sides = np.percentile(np.sqrt(sizes.prod(axis=1)), [0, 25, 50, 75, 100])
        print(
            "box size, square root of its share of the image: "
            + ", ".join(f"{side:.3f}" for side in sides)
            + " (min, quartiles, max)"
        )
        cells = IMAGE_SIZE / 32
        print(f"average IoU of the anchors in use: {average_best_iou(sizes * cells, ANCHORS):.3f}")
        if len(sizes) >= len(ANCHORS):
            fresh = kmeans_anchors(sizes * cells, len(ANCHORS))
            text = ", ".join(f"({w:.2f}, {h:.2f})" for w, h in fresh.tolist())
            print(f"average IoU of fresh ones:         {average_best_iou(sizes * cells, fresh):.3f}  {text} cells at {IMAGE_SIZE}")
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        sys.exit(f"{len(problems)} problems; no label sheet is drawn before they are mended")
    dataset = VOCDataset(DATA_DIR, IMAGE_SETS, ANCHORS, IMAGE_SIZE, CLASSES, augment=True)
    draw_label_sheet(dataset, SHEET, SHEET_IMAGES, SEED)
    print(f"no problems; look at {SHEET}: every box should sit on its object")


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
