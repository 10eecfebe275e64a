"""What the scripts share: boxes, decoding, NMS, average precision, checkpoints, settings, logging and drawing.

Letters: N images, A anchors (5), S_h x S_w grid cells, C classes (20), M = A * S_h * S_w boxes of an image, K kept detections,
D detections and G ground truths of a whole data set. Boxes are xyxy (corners) or cxcywh (centre and size), in fractions of the
image (0..1) or in pixels in the convention of the VOC devkit (the first pixel is 1, both ends belong to the box).
"""

import ast
import contextlib
import csv
import ctypes
import json
import math
import os
import pickle
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert

# ---------------------------------------------------------------- settings of a script


def script_settings(script_globals: dict) -> dict:
    """The UPPER_CASE globals of a script (torch.nn.functional's F is none of them)."""
    return {name: value for name, value in script_globals.items() if name.isupper() and len(name) > 1 and name[0] != "_"}


def override_globals(script_globals: dict, words: list[str]) -> None:
    """Sets a script's UPPER_CASE globals from NAME=value words of its command line; `--help` prints them and exits.

    A value is read as a Python literal, or as plain text where the default is text. It must have the default's type (a whole
    number is fine for a float; None, as a default or as a value, goes with anything). Exits with one sentence otherwise.
    """
    known = script_settings(script_globals)
    script = os.path.basename(script_globals.get("__file__", "script"))
    if any(word in ("--help", "-h") for word in words):
        print((script_globals.get("__doc__") or "").strip())
        print("\nGlobals (edit them in the file, or give NAME=value words):")
        for name, value in known.items():
            print(f"  {name} = {value!r}")
        sys.exit(0)
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            sys.exit(f"{script}: {word!r} is not of the form NAME=value; --help lists the names")
        if name not in known:
            sys.exit(f"{script}: there is no global {name!r}; the known ones are {', '.join(known)}")
        default = known[name]
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = text  # a path or a name may stand without quotes
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if isinstance(default, str) and not isinstance(value, str) and value is not None:
            value = text  # RUN=7 where a name is asked for
        wrong = type(value) is not type(default) and not (isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)))
        if default is not None and value is not None and wrong:
            sys.exit(f"{script}: {name} must be {type(default).__name__}, like its default {default!r}, not {text!r}")
        script_globals[name] = value


def check_at_least(least: int, **settings: float) -> None:
    """Raises ValueError for the first of a script's settings, given as NAME=value, that is less than `least`."""
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name} must be {least} or more, not {value}")


@contextlib.contextmanager
def plain_errors():
    """Around a script's main(): bad input ends in its one sentence and exit status 1 instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:  # of a loader's worker, the last line of a whole traceback
        sys.exit(f"error: {(str(error).strip().splitlines() or [''])[-1].removeprefix('ValueError: ')}")


def set_seed(seed: int) -> None:
    """Seeds Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that still use the global state
    torch.manual_seed(seed)


def random_states() -> dict:
    """The states of all random number generators as plain values, for a checkpoint."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_states(states: dict) -> None:
    """Sets what random_states gave; on another number of GPUs theirs stay as they are."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


# ---------------------------------------------------------------- stopping and going on


def catch_stop_signals() -> list[str]:
    """From now on SIGTERM and the first SIGINT (Ctrl-C) only add their name to the list that is returned, so that a training can
    finish its step and save; a second SIGINT, a second or more later, raises KeyboardInterrupt at once."""
    stop, seconds = [], []

    def note(number, frame):
        # not sooner: torchrun passes on to its processes a Ctrl-C that the terminal has sent them already
        if number == signal.SIGINT and seconds and time.monotonic() - seconds[0] > 1:
            raise KeyboardInterrupt
        stop.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            seconds.append(time.monotonic())

    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        signal.signal(signal.SIGINT, note)
        signal.signal(signal.SIGTERM, note)
    return stop


def leave_signals_to_the_parent(worker: int) -> None:
    """worker_init_fn of a DataLoader: Ctrl-C and a queue's SIGTERM reach all processes of a run, and its main one alone decides; of
    SIGTERMs a worker obeys those of its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # tells who sent a signal; not on macOS

        def obey():
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
                pass
            os._exit(0)

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey, daemon=True).start()


def compare_settings(file: str | os.PathLike, saved: dict, now: dict, fixed: tuple, free: tuple, tell: bool = True) -> list[str]:
    """The names of what a resumed run changes: one of `fixed` is refused (ValueError, naming all of them), any other but `free` is
    printed."""
    changed = [name for name in now if name in saved and json.dumps(saved[name]) != json.dumps(now[name])]

    def shown(value):
        return repr(value) if len(repr(value)) <= 200 else f"{value!r:.200}... ({len(value)} in all)"

    if refused := [f"{name} was {shown(saved[name])} and is {shown(now[name])}" for name in changed if name in fixed]:
        raise ValueError(
            f"{file}: a resumed run must keep {'; '.join(refused)}; set it back, or start a new run from its weights "
            f"(RESUME_WEIGHTS, PRETRAINED)"
        )
    for name in changed:
        if tell and name not in free:
            print(f"changed since {file} was written: {name} {saved[name]!r} -> {now[name]!r}")
    return changed


# ---------------------------------------------------------------- device and precision


def pick_device(name: str = "auto") -> torch.device:
    """ "auto": the first GPU where there is one, else the CPU; any other name as torch spells it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto", "fp32", "bf16" or "fp16" -> the dtype for autocast; "auto" is bfloat16 where the device computes it natively."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name in names:
        return names[name]
    if name != "auto":
        raise ValueError(f'PRECISION must be "auto", "fp32", "bf16" or "fp16", not {name!r}')
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory() -> None:
    """Stops glibc from handing every large buffer back to the kernel, which costs a CPU run up to half of its time.

    Each layer frees its maps and the next one asks for them again; through mmap every page of them would be faulted in anew.
    With both thresholds off the process keeps its peak for itself. On other systems nothing happens.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation through mmap
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


# ---------------------------------------------------------------- images


@contextlib.contextmanager
def open_image(file: str | os.PathLike):
    """PIL's Image.open; whatever goes wrong inside is a FileNotFoundError or ValueError that names the file."""
    try:
        with Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such image") from None
    except (OSError, ValueError, SyntaxError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: not a readable image ({error}); replace it or take it off the list") from None


def read_image(file: str | os.PathLike) -> np.ndarray:
    """Reads an image of any mode the way a viewer shows it (EXIF rotation applied) -> (H, W, 3) uint8 RGB.

    Transparent parts are laid on white. Raises FileNotFoundError or ValueError, naming the file, where it is missing or broken.
    """
    with open_image(file) as image:
        ImageOps.exif_transpose(image, in_place=True)  # a copy otherwise, of every image that lies as it should too
        if image.mode.startswith("I;16"):  # 16 bits of grey: keep the upper eight
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("32 bits of grey have no known white; save it with 8 bits")
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def image_size(file: str | os.PathLike) -> tuple[int, int]:
    """Width and height in pixels as read_image would give them, from the file's header alone; raises as read_image does."""
    with open_image(file) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
        return (image.height, image.width) if turned else (image.width, image.height)


def find_images(pattern: str) -> list[str]:
    """A file, a folder (its images, sorted) or a glob -> image files. Raises FileNotFoundError where there are none."""
    path = Path(pattern)
    suffixes = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        files = [str(file) for file in sorted(path.iterdir()) if file.suffix.lower() in suffixes]
    else:
        root = Path(path.anchor or ".")
        files = [str(file) for file in sorted(root.glob(os.path.relpath(pattern, root))) if file.suffix.lower() in suffixes]
    if not files:
        raise FileNotFoundError(f"{pattern}: no image file there; give an image, a folder of images or a glob")
    return files


# ---------------------------------------------------------------- from raw outputs to detections


def decode_predictions(predictions: Tensor, anchors) -> tuple[Tensor, Tensor, Tensor]:
    """predictions: (N, A, S_h, S_w, 5+C) raw; anchors: A pairs in grid cells -> boxes (N, M, 4) cxcywh in fractions of the image,
    objectness (N, M) and class probabilities (N, M, C).

    b_x = (sigma(t_x) + c_x) / S_w, b_w = p_w exp(t_w) / S_w, likewise y and h (YOLO9000 sec. 2, Fig. 3).
    """
    n, a, s_h, s_w, channels = predictions.shape
    predictions = predictions.float()
    anchors = torch.as_tensor(anchors, dtype=torch.float32, device=predictions.device)
    t_xy, t_wh, t_o, class_logits = predictions.split([2, 2, 1, channels - 5], dim=-1)
    c_y = torch.arange(s_h, device=predictions.device)[:, None].expand(s_h, s_w)
    c_x = torch.arange(s_w, device=predictions.device)[None, :].expand(s_h, s_w)
    grid = torch.tensor([s_w, s_h], device=predictions.device)
    b_xy = (torch.sigmoid(t_xy) + torch.stack([c_x, c_y], dim=-1)) / grid  # (N, A, S_h, S_w, 2)
    b_wh = anchors[:, None, None, :] * torch.exp(t_wh) / grid  # (N, A, S_h, S_w, 2)
    boxes = torch.cat([b_xy, b_wh], dim=-1).reshape(n, -1, 4)  # (N, M, 4)
    objectness = torch.sigmoid(t_o).reshape(n, -1)  # (N, M)
    probabilities = torch.softmax(class_logits, dim=-1).reshape(n, a * s_h * s_w, -1)  # (N, M, C)
    return boxes, objectness, probabilities


@torch.no_grad()
def postprocess(predictions: Tensor, anchors, confidence_threshold: float, nms_iou_threshold: float) -> list[Tensor]:
    """predictions: (N, A, S_h, S_w, 5+C) raw -> a list of N tensors (K, 6): x1, y1, x2, y2 in fractions of the image, clipped to
    it, confidence (objectness x class probability), class; by falling confidence, on the CPU.

    As in Darknet's `valid`, every class of a box above the threshold is a detection of its own, and non-maximum suppression
    looks at one class at a time.
    """
    boxes, objectness, probabilities = (tensor.cpu() for tensor in decode_predictions(predictions, anchors))
    boxes = box_convert(boxes, "cxcywh", "xyxy")  # (N, M, 4)
    detections = []
    for image in range(len(boxes)):
        likely = (objectness[image] > confidence_threshold).nonzero().squeeze(1)  # a confidence is never above its objectness
        confidence = objectness[image][likely, None] * probabilities[image][likely]  # (likely, C)
        rows, classes = (confidence > confidence_threshold).nonzero(as_tuple=True)
        candidates = boxes[image][likely[rows]]
        scores = confidence[rows, classes]
        # torchvision moves each class by the largest coordinate: one wild box must not take the digits of all the others
        keep = batched_nms(candidates.clamp(-10, 10), scores, classes, nms_iou_threshold)
        detections.append(
            torch.cat([candidates[keep].clamp(0, 1), scores[keep, None], classes[keep, None].float()], dim=1)
        )  # (K, 6)
    return detections


def to_devkit_pixels(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """boxes: (..., 4) xyxy in fractions of the image -> pixels of the devkit, the first pixel being 1 (Darknet's detector.c)."""
    return boxes * np.array([width, height, width, height]) + 1


# ---------------------------------------------------------------- average precision


def match_detections(
    detections, ground_truths, num_classes: int, iou_threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Decides which detections are right, by the rules of the VOC devkit (VOCevaldet.m).

    detections: (D, 7) image index, class, confidence, x1, y1, x2, y2; ground_truths: (G, 7) image index, class, difficult, x1,
    y1, x2, y2; pixels. -> classes (D',), confidences (D',), right (D',) of the detections that count, sorted by class and falling
    confidence, and truths (num_classes,), the number of ground truths that are not difficult.

    By falling confidence (stable for equal ones) each detection goes to the truth of its image and class that it overlaps most,
    taken or not. From the threshold on it is right if that truth is free, and wrong if it is taken; where the truth is
    difficult, the detection does not count at all.
    """
    detections = np.asarray(detections, dtype=np.float64).reshape(-1, 7)
    truths = np.asarray(ground_truths, dtype=np.float64).reshape(-1, 7)
    for name, table in (("detections", detections), ("ground_truths", truths)):
        if len(table) and not (table[:, 1].min() >= 0 and table[:, 1].max() < num_classes):
            raise ValueError(f"{name}: a class lies outside 0..{num_classes - 1}")
    order = np.lexsort((-detections[:, 2], detections[:, 1]))  # by class, then by falling confidence; lexsort is stable
    detections = detections[order]

    # Truths sorted by (image, class) stand in one run for each such pair; each detection finds the run of its own pair.
    truths = truths[np.lexsort((truths[:, 1], truths[:, 0]))]  # stable: within a run in the order given
    truth_keys = truths[:, 0] * num_classes + truths[:, 1]
    keys = detections[:, 0] * num_classes + detections[:, 1]
    start = np.searchsorted(truth_keys, keys, side="left")
    count = np.searchsorted(truth_keys, keys, side="right") - start

    # Best overlap: compare all detections with the first truth of their run, then with the second, and so on.
    best_iou = np.zeros(len(detections))
    best_truth = np.full(len(detections), -1)
    truth_areas = (truths[:, 5] - truths[:, 3] + 1) * (truths[:, 6] - truths[:, 4] + 1)
    x1, y1, x2, y2 = detections[:, 3:].T.copy()
    areas = (x2 - x1 + 1) * (y2 - y1 + 1)
    left = np.flatnonzero(count)
    for nth in range(int(count.max(initial=0))):
        left = left[count[left] > nth]
        truth = start[left] + nth
        width = np.minimum(x2[left], truths[truth, 5]) - np.maximum(x1[left], truths[truth, 3]) + 1
        height = np.minimum(y2[left], truths[truth, 6]) - np.maximum(y1[left], truths[truth, 4]) + 1
        intersection = np.clip(width, 0, None) * np.clip(height, 0, None)
        iou = intersection / (areas[left] + truth_areas[truth] - intersection)
        better = iou > best_iou[left]
        best_iou[left[better]], best_truth[left[better]] = iou[better], truth[better]

    matched = best_iou >= iou_threshold
    matched &= best_truth >= 0
    difficult = np.zeros(len(detections), bool)
    difficult[matched] = truths[best_truth[matched], 2] > 0
    candidates = np.flatnonzero(matched & ~difficult)  # in falling confidence within each class
    _, first = np.unique(best_truth[candidates], return_index=True)  # the first of them takes the truth
    right = np.zeros(len(detections), bool)
    right[candidates[first]] = True

    counts = ~difficult
    truths_of_class = np.bincount(truths[truths[:, 2] == 0, 1].astype(int), minlength=num_classes)
    return detections[counts, 1].astype(int), detections[counts, 2], right[counts], truths_of_class


def precision_recall(
    detections, ground_truths, num_classes: int, iou_threshold: float = 0.5
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The precision-recall curve of each class: (confidences, precisions, recalls) after each detection by falling confidence.

    Arguments as in average_precision. Recall is NaN where the class has no ground truth.
    """
    classes, confidences, right, truths = match_detections(detections, ground_truths, num_classes, iou_threshold)
    ends = np.searchsorted(classes, np.arange(num_classes + 1))
    curves = []
    for c in range(num_classes):
        hits = right[ends[c] : ends[c + 1]].cumsum()
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = np.where(truths[c] > 0, hits / truths[c], np.nan)
        curves.append((confidences[ends[c] : ends[c + 1]], hits / np.arange(1, len(hits) + 1), recall))
    return curves


def area_under_curve(precision: np.ndarray, recall: np.ndarray, metric: str = "all_points") -> float:
    """AP of one class: "voc2007" is the mean of the best precision at recalls from 0, .1, .2 .. 1 on, "all_points" the area
    under the curve once it is made to fall (VOC 2010 on, and Padilla et al.)."""
    if metric == "voc2007":
        best = [precision[recall >= level].max(initial=0) for level in np.arange(11) / 10]
        return float(np.mean(best))
    if metric != "all_points":
        raise ValueError(f'metric must be "voc2007" or "all_points", not {metric!r}')
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a larger one
    return float((np.diff(recall, prepend=0) * envelope).sum())


def average_precision(
    detections, ground_truths, num_classes: int, iou_threshold: float = 0.5, metric: str = "all_points"
) -> Tensor:
    """Average precision of each class by the rules of the VOC devkit (see match_detections) -> (num_classes,) float64.

    detections: (D, 7) image index, class, confidence, x1, y1, x2, y2; ground_truths: (G, 7) image index, class, difficult, x1,
    y1, x2, y2; pixels, both ends of a box belong to it. metric: "all_points" or "voc2007" (see area_under_curve). NaN where a class
    has no ground truth (difficult ones do not count). Raises ValueError for another metric or a class out of range.
    """
    curves = precision_recall(detections, ground_truths, num_classes, iou_threshold)
    truths = np.asarray(ground_truths, dtype=np.float64).reshape(-1, 7)
    known = np.bincount(truths[truths[:, 2] == 0, 1].astype(int), minlength=num_classes) > 0
    areas = [area_under_curve(precision, recall, metric) for _, precision, recall in curves]
    return torch.from_numpy(np.where(known, areas, np.nan))


def mean_average_precision(average_precisions: Tensor) -> float:
    """The mean over the classes that have ground truth; NaN where none has."""
    return float(torch.nanmean(torch.as_tensor(average_precisions, dtype=torch.float64)))


@torch.no_grad()
def detect_dataset(
    model: nn.Module,
    dataset,
    anchors,
    batch_size: int,
    num_workers: int,
    confidence_threshold: float = 0.005,
    nms_iou_threshold: float = 0.45,
    should_stop: Callable[[], bool] = bool,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Runs a model over a VOCDataset -> detections (D, 7), ground truths (G, 7), both as average_precision takes them with the
    position in the data set as image index, and the seconds spent on loading, network and post-processing. It ends early as soon
    as should_stop() says so.

    .005 and .45 are Darknet's (examples/detector.c, validate_detector).
    """
    parameter = next(model.parameters())
    options = {"num_workers": num_workers, "pin_memory": parameter.is_cuda, "worker_init_fn": leave_signals_to_the_parent}
    loader = torch.utils.data.DataLoader(dataset, batch_size, **options)
    seconds = {"loading": 0.0, "network": 0.0, "post-processing": 0.0}
    detections, truths, index = [np.empty((0, 7))], [np.empty((0, 7))], 0
    clock = time.perf_counter()
    for images, _ in loader:
        if should_stop():
            break
        seconds["loading"] += (loaded := time.perf_counter()) - clock
        predictions = model(images.to(parameter.device, parameter.dtype, non_blocking=True)).float().cpu()
        seconds["network"] += (computed := time.perf_counter()) - loaded
        for found in postprocess(predictions, anchors, confidence_threshold, nms_iou_threshold):
            found = found.double().numpy()
            width, height = dataset.original_size(index)
            pixels = to_devkit_pixels(found[:, :4], width, height).clip(1, [width, height, width, height])
            which = np.full((len(found), 1), index)
            detections.append(np.concatenate([which, found[:, 5:6], found[:, 4:5], pixels], axis=1))
            rows, _ = dataset.ground_truth(index)
            truths.append(np.concatenate([np.full((len(rows), 1), index), rows.numpy()], axis=1))
            index += 1
        clock = time.perf_counter()
        seconds["post-processing"] += clock - computed
    return np.concatenate(detections), np.concatenate(truths), seconds


# ---------------------------------------------------------------- training


def learning_rate_at(
    step: int, total_steps: int, learning_rate: float, schedule: str, burn_in: int = 0, power: float = 4.0, drops: tuple = ()
) -> float:
    """The learning rate of one optimiser step, counted from 0 (get_current_rate in Darknet's src/network.c).

    schedule: "constant"; "steps", a tenth of it from each step of `drops` on; "polynomial", (1 - step / total)^power;
    "cosine", down to 0. In the first `burn_in` steps it grows as ((step + 1) / burn_in)^4. Raises ValueError for another schedule.
    """
    if schedule not in ("constant", "steps", "polynomial", "cosine"):
        raise ValueError(f'LR_SCHEDULE must be "constant", "steps", "polynomial" or "cosine", not {schedule!r}')
    if step < burn_in:
        return learning_rate * ((step + 1) / burn_in) ** 4  # + 1: Darknet too has counted the batch when it looks
    if schedule == "constant":
        return learning_rate
    if schedule == "steps":
        return learning_rate * 0.1 ** sum(step >= drop for drop in drops)
    if schedule == "polynomial":
        return learning_rate * (1 - step / total_steps) ** power
    return learning_rate * (1 + math.cos(math.pi * step / total_steps)) / 2


# ---------------------------------------------------------------- checkpoints


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def whole_file(file: str | os.PathLike):
    """Gives a temporary name to write to and renames it to `file` when all is written; a failure leaves the old file alone.

    Raises OSError, naming the file.
    """
    os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
    temporary = f"{os.fspath(file)}.tmp{os.getpid()}"
    try:
        yield temporary
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise OSError(f"{file}: could not be written ({first_line(error)}); is the disk full?") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save_checkpoint(file: str | os.PathLike, **state) -> None:
    """Writes tensors and plain Python values; the old file stays until the new one is whole. Raises OSError, naming the file."""
    with whole_file(file) as temporary:
        torch.save(state, temporary)


def load_checkpoint(file: str | os.PathLike, device: str | torch.device = "cpu", keys: tuple = ()) -> dict:
    """Reads a file of save_checkpoint; code hidden in a foreign pickle is refused, not run.

    Raises FileNotFoundError or ValueError, naming the file, where it is missing, damaged, not a checkpoint, or without one of
    the `keys` that its reader needs.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such checkpoint; train first, or set CHECKPOINT")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about foreign pickles; the sentences below say more
            state = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{file}: not a checkpoint of this repository, or one that would run code; it was not loaded") from None
    except Exception as error:  # a damaged file may end in any of them
        raise ValueError(f"{file}: damaged or not a checkpoint ({first_line(error)[:80]})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{file}: not a checkpoint of this repository (holds {type(state).__name__})")
    if missing := [key for key in keys if key not in state]:
        raise ValueError(f"{file}: not a checkpoint that serves here (it has no {', '.join(missing)})")
    return state


# ---------------------------------------------------------------- log and charts


def append_metrics(file: str | os.PathLike, row: dict) -> None:
    """Adds one epoch to a CSV of metrics; rows of this and later epochs, left by a run that was stopped, make way."""
    rows = []
    if os.path.isfile(file):
        with open(file, newline="") as stream:
            rows = [old for old in csv.DictReader(stream) if old.get("epoch", "").isdigit() and int(old["epoch"]) < row["epoch"]]
    with whole_file(file) as temporary, open(temporary, "w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(row), extrasaction="ignore")
        writer.writeheader()
        for entry in [*rows, row]:
            writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in entry.items()})


def draw_charts(metrics_file: str | os.PathLike, chart_file: str | os.PathLike) -> None:
    """Draws the CSV of a run as one PNG: a panel for each loss term, one for the scores, one for the learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with open(metrics_file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns = {
        name: [(int(row["epoch"]), float(row[name])) for row in rows if row[name] not in ("", None)]
        for name in rows[0]
        if name not in ("epoch", "images_per_second")
    }
    scores = [name for name in columns if name.startswith(("train_", "val_")) and not name.endswith("loss")]
    panels = [[name] for name in columns if name not in scores and name != "learning_rate"] + [scores, ["learning_rate"]]
    width = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(2, width, figsize=(3.6 * width, 6), squeeze=False, layout="constrained")
    for axis, names in zip(axes.flat, panels, strict=False):
        for name in names:
            if columns[name]:
                axis.plot(*zip(*columns[name], strict=True), marker="." if len(columns[name]) < 40 else None, label=name)
        values = [value for name in names for _, value in columns[name]]
        if names == scores:
            axis.set(title="scores", ylim=(0, 1.02))
            if values:
                axis.legend(loc="lower right", fontsize=8)
        else:
            logarithmic = values and min(values) > 0 and names != ["learning_rate"] and max(values) > 20 * min(values)
            axis.set(title=names[0], yscale="log" if logarithmic else "linear")
            if not logarithmic:
                axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    with whole_file(chart_file) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


# ---------------------------------------------------------------- drawing


def class_colour(index: int) -> tuple[int, int, int]:
    """A colour of its own for each class: hues a golden angle apart, so that neighbours in the list differ most."""
    hue = (index * 0.618034) % 1.0
    return tuple(Image.new("HSV", (1, 1), (int(hue * 255), 210, 235)).convert("RGB").getpixel((0, 0)))


def draw_boxes(image: np.ndarray, boxes, labels: list[str], class_indices) -> Image.Image:
    """Draws boxes (K, 4) xyxy in pixels with a label each on an (H, W, 3) uint8 image; lines and letters grow with the image."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    size = max(picture.size)
    thickness = max(2, round(size / 200))
    font = ImageFont.load_default(size=max(11, round(size / 32)))
    for box, label, index in zip(boxes, labels, class_indices, strict=True):
        x1, y1, x2, y2 = (round(float(value)) for value in box)
        colour = class_colour(int(index))
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=thickness)
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
        height = bottom + 2 * thickness
        text_x = max(0, min(x1, picture.width - right - 2 * thickness))
        text_y = y1 - height if y1 >= height else y1  # above the box, or just inside where there is no room
        draw.rectangle((text_x, text_y, text_x + right + 2 * thickness, text_y + height), fill=colour)
        dark = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] < 130
        draw.text((text_x + thickness, text_y + thickness / 2), label, fill="white" if dark else "black", font=font)
    return picture
