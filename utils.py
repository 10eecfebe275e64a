"""What the scripts share: boxes and decoding, running a detector, average precision, Darknet's training rules, checkpoints, charts.

Letters: N images, A anchors (5), S_h x S_w grid cells, C classes (20), M = A * S_h * S_w boxes per image, K kept detections,
D detections and G ground truths of a whole data set. Boxes are xyxy (corners) or cxcywh (centre and size), in fractions of the
image (0..1) or in pixels as in the VOC devkit (the first pixel is 1 and both ends belong to the box).
"""

import ast
import atexit
import contextlib
import csv
import ctypes
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import types
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert

# ---------------------------------------------------------------- settings of a script


def script_settings(script_globals: dict) -> dict:
    """The UPPER_CASE globals of a script (not `F`, which is torch.nn.functional)."""
    return {name: value for name, value in script_globals.items() if name.isupper() and len(name) > 1 and name[0] != "_"}


def override_globals(script_globals: dict, words: list[str]) -> None:
    """Sets a script's UPPER_CASE globals from NAME=value words of its command line; `--help` prints them and exits.

    A value is read as a Python literal, or as plain text where the default is text. It must have the default's type (an int is
    accepted for a float; None is accepted both as a default and as a value). Exits with one sentence otherwise.
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
            value = text  # a path or a name without quotes
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if isinstance(default, str) and not isinstance(value, str) and value is not None:
            value = text  # CHECKPOINT=7
        wrong = type(value) is not type(default) and not (isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)))
        if default is not None and value is not None and wrong:
            sys.exit(f"{script}: {name} must be {type(default).__name__}, like its default {default!r}, not {text!r}")
        script_globals[name] = value


def check_at_least(least: float, **settings: float) -> None:
    """Raises ValueError for the first of the settings, given as NAME=value, that is less than `least`."""
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name} must be {least} or more, not {value}")


def check_one_of(choices: tuple[str, ...], **settings: str) -> None:
    """Raises ValueError for the first of the settings, given as NAME=value, that is none of the choices."""
    for name, value in settings.items():
        if value not in choices:
            quoted = [f'"{choice}"' for choice in choices]
            raise ValueError(f"{name} must be {', '.join(quoted[:-1])} or {quoted[-1]}, not {value!r}")


@contextlib.contextmanager
def plain_errors():
    """Around a script's main(): bad input ends in one sentence and exit status 1 instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:  # an error in a loader's worker carries a whole traceback: keep its last line
        sys.exit(f"error: {(str(error).strip().splitlines() or [''])[-1].removeprefix('ValueError: ')}")


def set_seed(seed: int) -> None:
    """Seeds Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that still use the global state
    torch.manual_seed(seed)


# ---------------------------------------------------------------- device and precision


def pick_device(name: str = "auto") -> torch.device:
    """ "auto": the first GPU where there is one, else the CPU; any other name as torch spells it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto", "fp32", "bf16" or "fp16" -> the dtype for autocast; "auto" is bfloat16 where the device computes it natively."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    check_one_of(("auto", *names), PRECISION=name)
    if name in names:
        return names[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory() -> None:
    """Keeps glibc from returning every large buffer to the kernel, which costs up to half of the time on a CPU.

    Each layer frees its feature maps and the next one allocates new ones; through mmap, every page of them would be faulted in
    again. With both thresholds off, the process keeps its peak memory. Does nothing on other systems.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation through mmap
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


# ---------------------------------------------------------------- boxes: overlap, decoding, non-maximum suppression


def box_iou(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) cxcywh of the same unit; leading dimensions broadcast -> (...)."""
    low = torch.maximum(boxes_1[..., :2] - boxes_1[..., 2:] / 2, boxes_2[..., :2] - boxes_2[..., 2:] / 2)
    high = torch.minimum(boxes_1[..., :2] + boxes_1[..., 2:] / 2, boxes_2[..., :2] + boxes_2[..., 2:] / 2)
    width, height = (high - low).clamp(min=0).unbind(dim=-1)
    intersection = width * height
    areas = boxes_1[..., 2] * boxes_1[..., 3] + boxes_2[..., 2] * boxes_2[..., 3]
    return intersection / (areas - intersection)


def decode_predictions(predictions: Tensor, anchors) -> tuple[Tensor, Tensor, Tensor]:
    """predictions: (N, A, S_h, S_w, 5+C) raw; anchors: A pairs in grid cells -> boxes (N, M, 4) cxcywh in fractions of the image,
    objectness (N, M) and class probabilities (N, M, C).

    b_x = (sigma(t_x) + c_x) / S_w, b_w = p_w exp(t_w) / S_w, and likewise for y and h (YOLO9000 sec. 2, Fig. 3).
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
    it, confidence (objectness x class probability), class; sorted by falling confidence, on the CPU.

    As in Darknet's `valid`, every class of a box above the threshold is a detection of its own, and non-maximum suppression
    works on one class at a time.
    """
    boxes, objectness, probabilities = (tensor.cpu() for tensor in decode_predictions(predictions, anchors))
    boxes = box_convert(boxes, "cxcywh", "xyxy")  # (N, M, 4)
    detections = []
    for image in range(len(boxes)):
        candidate = (objectness[image] > confidence_threshold).nonzero().squeeze(1)  # confidence never exceeds objectness
        confidence = objectness[image][candidate, None] * probabilities[image][candidate]  # (candidates, C)
        row, label = (confidence > confidence_threshold).nonzero(as_tuple=True)
        box, score = boxes[image][candidate[row]], confidence[row, label]
        # batched_nms offsets each class by the largest coordinate: without the clamp, one huge box would cost all others precision
        keep = batched_nms(box.clamp(-10, 10), score, label, nms_iou_threshold)
        detections.append(torch.cat([box[keep].clamp(0, 1), score[keep, None], label[keep, None].float()], dim=1))  # (K, 6)
    return detections


def to_devkit_pixels(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """boxes: (..., 4) xyxy in fractions of the image -> pixels of the devkit, the first pixel being 1 (Darknet's detector.c)."""
    return boxes * np.array([width, height, width, height]) + 1


# ---------------------------------------------------------------- running a detector over a data set


@torch.no_grad()
def detect_dataset(
    model: nn.Module,
    dataset,
    batch_size: int,
    num_workers: int,
    confidence_threshold: float = 0.005,
    nms_iou_threshold: float = 0.45,
    should_stop: Callable[[], bool] = bool,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Runs a model over a VOCDataset -> detections (D, 7) and ground truths (G, 7), as average_precision takes them, with the
    index in the data set as image index, and the seconds spent on loading, network and post-processing.

    The thresholds .005 and .45 are Darknet's (examples/detector.c, validate_detector). Returns early, with what it has so far,
    when should_stop() is true.
    """
    parameter = next(model.parameters())
    loader = torch.utils.data.DataLoader(
        range(len(dataset)),
        batch_size,
        collate_fn=dataset.images_and_sizes,  # a worker reads a batch of images by their indices
        num_workers=num_workers,
        pin_memory=parameter.is_cuda,
        worker_init_fn=ignore_signals,
    )
    seconds = {"loading": 0.0, "network": 0.0, "post-processing": 0.0}
    detections, ground_truths, index = [np.empty((0, 7))], [np.empty((0, 7))], 0
    clock = time.perf_counter()
    for images, sizes in loader:
        if should_stop():
            break
        seconds["loading"] += (loaded := time.perf_counter()) - clock
        predictions = model(images.to(parameter.device, parameter.dtype, non_blocking=True)).float().cpu()
        seconds["network"] += (computed := time.perf_counter()) - loaded
        found = postprocess(predictions, dataset.anchors, confidence_threshold, nms_iou_threshold)
        for (width, height), rows in zip(sizes.tolist(), found, strict=True):
            rows = rows.double().numpy()  # (K, 6)
            pixels = to_devkit_pixels(rows[:, :4], width, height).clip(1, [width, height, width, height])
            detections.append(np.column_stack([np.full(len(rows), index), rows[:, 5], rows[:, 4], pixels]))
            truths, _ = dataset.ground_truth(index, (width, height))
            ground_truths.append(np.column_stack([np.full(len(truths), index), truths.numpy()]))
            index += 1
        clock = time.perf_counter()
        seconds["post-processing"] += clock - computed
    return np.concatenate(detections), np.concatenate(ground_truths), seconds


# ---------------------------------------------------------------- average precision


def match_detections(
    detections, ground_truths, num_classes: int, iou_threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Decides which detections are true positives, by the rules of the VOC devkit (VOCevaldet.m).

    detections: (D, 7) image index, class, confidence, x1, y1, x2, y2; ground_truths: (G, 7) image index, class, difficult, x1,
    y1, x2, y2; pixels. -> classes (D',), confidences (D',), is_true_positive (D',) of the detections that count, sorted by class
    and falling confidence, and the number of ground truths per class that are not difficult (num_classes,).

    In order of falling confidence (stable for ties), each detection is assigned to the ground truth of its image and class that
    it overlaps most, taken or not. At or above the threshold it is a true positive if that ground truth is free and a false
    positive if it is taken; if the ground truth is difficult, the detection is ignored.
    """
    detections = np.asarray(detections, dtype=np.float64).reshape(-1, 7)
    truths = np.asarray(ground_truths, dtype=np.float64).reshape(-1, 7)
    for name, table in (("detections", detections), ("ground_truths", truths)):
        if len(table) and not (table[:, 1].min() >= 0 and table[:, 1].max() < num_classes):
            raise ValueError(f"{name}: a class lies outside 0..{num_classes - 1}")
    order = np.lexsort((-detections[:, 2], detections[:, 1]))  # by class, then by falling confidence; lexsort is stable
    detections = detections[order]

    # Sorted by (image, class), the ground truths of each such pair are contiguous; each detection looks up the range of its pair.
    truths = truths[np.lexsort((truths[:, 1], truths[:, 0]))]  # stable: within a pair in the order given
    truth_keys = truths[:, 0] * num_classes + truths[:, 1]
    keys = detections[:, 0] * num_classes + detections[:, 1]
    start = np.searchsorted(truth_keys, keys, side="left")
    count = np.searchsorted(truth_keys, keys, side="right") - start

    # Largest overlap: compare all detections with the first ground truth of their range, then with the second, and so on.
    best_iou = np.zeros(len(detections))
    best_truth = np.full(len(detections), -1)
    truth_areas = (truths[:, 5] - truths[:, 3] + 1) * (truths[:, 6] - truths[:, 4] + 1)  # both end pixels belong to a box
    x1, y1, x2, y2 = detections[:, 3:].T.copy()
    areas = (x2 - x1 + 1) * (y2 - y1 + 1)
    remaining = np.flatnonzero(count)
    for nth in range(int(count.max(initial=0))):
        remaining = remaining[count[remaining] > nth]
        truth = start[remaining] + nth
        width = np.minimum(x2[remaining], truths[truth, 5]) - np.maximum(x1[remaining], truths[truth, 3]) + 1
        height = np.minimum(y2[remaining], truths[truth, 6]) - np.maximum(y1[remaining], truths[truth, 4]) + 1
        intersection = np.clip(width, 0, None) * np.clip(height, 0, None)
        iou = intersection / (areas[remaining] + truth_areas[truth] - intersection)
        better = iou > best_iou[remaining]
        best_iou[remaining[better]], best_truth[remaining[better]] = iou[better], truth[better]

    matched = (best_iou >= iou_threshold) & (best_truth >= 0)
    difficult = np.zeros(len(detections), bool)
    difficult[matched] = truths[best_truth[matched], 2] > 0
    candidates = np.flatnonzero(matched & ~difficult)  # in falling confidence within each class
    _, first = np.unique(best_truth[candidates], return_index=True)  # the most confident one takes the ground truth
    is_true_positive = np.zeros(len(detections), bool)
    is_true_positive[candidates[first]] = True

    counts = ~difficult
    truths_per_class = np.bincount(truths[truths[:, 2] == 0, 1].astype(int), minlength=num_classes)
    return detections[counts, 1].astype(int), detections[counts, 2], is_true_positive[counts], truths_per_class


def precision_recall(
    detections, ground_truths, num_classes: int, iou_threshold: float = 0.5
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The precision-recall curve of each class: (confidences, precisions, recalls) after each detection by falling confidence.

    Arguments as in average_precision. Recall is NaN where the class has no ground truth.
    """
    classes, confidences, is_true_positive, truths = match_detections(detections, ground_truths, num_classes, iou_threshold)
    ends = np.searchsorted(classes, np.arange(num_classes + 1))
    curves = []
    for c in range(num_classes):
        true_positives = is_true_positive[ends[c] : ends[c + 1]].cumsum()
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = np.where(truths[c] > 0, true_positives / truths[c], np.nan)
        precision = true_positives / np.arange(1, len(true_positives) + 1)
        curves.append((confidences[ends[c] : ends[c + 1]], precision, recall))
    return curves


def area_under_curve(precision: np.ndarray, recall: np.ndarray, metric: str = "all_points") -> float:
    """AP of one class. "voc2007": mean of the best precision at recalls of at least 0, .1, .2 .. 1. "all_points": area under the
    curve after making precision monotonically decreasing (VOC 2010 and later, Padilla et al.)."""
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
    y1, x2, y2; pixels, both ends belong to a box. metric: "all_points" or "voc2007" (see area_under_curve). NaN where a class has
    no ground truth (difficult ones do not count). Raises ValueError for another metric or a class out of range.
    """
    curves = precision_recall(detections, ground_truths, num_classes, iou_threshold)
    truths = np.asarray(ground_truths, dtype=np.float64).reshape(-1, 7)
    known = np.bincount(truths[truths[:, 2] == 0, 1].astype(int), minlength=num_classes) > 0
    areas = [area_under_curve(precision, recall, metric) for _, precision, recall in curves]
    return torch.from_numpy(np.where(known, areas, np.nan))


def mean_average_precision(average_precisions: Tensor) -> float:
    """The mean over the classes that have ground truth; NaN where none has."""
    return float(torch.nanmean(torch.as_tensor(average_precisions, dtype=torch.float64)))


# ---------------------------------------------------------------- Darknet's training rules


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimiser groups: decay on the convolution kernels only, none on biases and batch norm (src/convolutional_layer.c)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kernels = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def warm_batch_norm(model: nn.Module, batches_seen: int) -> None:
    """Sets the momentum of every batch norm's running statistics: Darknet's .01, but more during the first 1000 batches (ours).

    With .01 alone the statistics need some 500 batches to forget their initial values, so a run of 100 batches would be evaluated
    with useless ones. 10 / (batches + 10) averages over about the last tenth of the run and reaches .01 at 990 batches. A compiled
    model keeps .01: the momentum is a constant of its code, and changing it would compile the model again for every batch.
    """
    if any(name.endswith("_orig_mod") for name, _ in model.named_modules()):  # torch.compile's name for the model it wraps
        return
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.momentum = max(0.01, 10 / (batches_seen + 10))


LR_SCHEDULES = ("constant", "steps", "polynomial", "cosine")


def learning_rate_at(
    step: int, total_steps: int, learning_rate: float, schedule: str, burn_in: int = 0, power: float = 4.0, drops: tuple = ()
) -> float:
    """The learning rate of one optimiser step, counted from 0 (get_current_rate in Darknet's src/network.c).

    schedule: "constant"; "steps", divided by 10 at each step of `drops`; "polynomial", (1 - step / total)^power; "cosine", down
    to 0. During the first `burn_in` steps it grows as ((step + 1) / burn_in)^4. Raises ValueError for another schedule.
    """
    check_one_of(LR_SCHEDULES, LR_SCHEDULE=schedule)
    if step < burn_in:
        return learning_rate * ((step + 1) / burn_in) ** 4  # + 1: Darknet has already counted the batch at this point
    if schedule == "constant":
        return learning_rate
    if schedule == "steps":
        return learning_rate * 0.1 ** sum(step >= drop for drop in drops)
    if schedule == "polynomial":
        return learning_rate * (1 - step / total_steps) ** power
    return learning_rate * (1 + math.cos(math.pi * step / total_steps)) / 2


# ---------------------------------------------------------------- stopping a run


def catch_stop_signals(max_hours: float = 0.0) -> types.SimpleNamespace:
    """Makes SIGTERM and the first SIGINT (Ctrl-C) a request to stop: -> an object whose `reason` becomes the signal's name, for
    should_stop to look at. A second SIGINT, at least a second after the first, raises KeyboardInterrupt.

    max_hours: should_stop is also true after so many hours; 0 for no limit.
    """
    stop = types.SimpleNamespace(reason="", deadline=time.monotonic() + 3600 * max_hours if max_hours > 0 else math.inf)
    interrupted = []

    def handle(number, frame):
        # a terminal sends Ctrl-C to torchrun and to its processes, and torchrun forwards it: within a second it is the same one
        if number == signal.SIGINT and interrupted and time.monotonic() - interrupted[0] > 1:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            interrupted.append(time.monotonic())
        stop.reason = stop.reason or signal.Signals(number).name

    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        signal.signal(signal.SIGINT, handle)
        signal.signal(signal.SIGTERM, handle)
    return stop


def should_stop(stop: types.SimpleNamespace) -> bool:
    """Whether a signal has arrived or the time limit is reached; stop.reason then says which."""
    if not stop.reason and time.monotonic() >= stop.deadline:
        stop.reason = "MAX_HOURS"
    return bool(stop.reason)


def stopped(stop: types.SimpleNamespace, state: dict, checkpoint: str) -> str:
    """The last line of a run that was stopped: why, where, and how to continue."""
    place = f"in epoch {state['epoch'] + 1} after step {state['step']}"
    return f"stopped by {stop.reason} {place}; RESUME=True continues from {checkpoint}"


def problem_of_step(names: tuple[str, ...], losses: Tensor, norm: Tensor, scaler) -> str:
    """What is not finite just before an optimiser step: "" if nothing, "the loss (coord, total)" or "the gradient".

    losses: the terms called `names`, summed over the accumulation steps; norm: of the gradient. In fp16 the scaler itself skips a
    step with infinite gradients and halves its scale; below 1, they do not become finite any more. Waits for a GPU once.
    """
    finite = torch.isfinite(torch.cat([losses, norm[None]])).tolist()
    if bad := [name for name, fine in zip(names, finite, strict=False) if not fine]:
        return f"the loss ({', '.join(bad)})"
    gradient_is_finite = scaler.get_scale() >= 1 if scaler.is_enabled() else finite[-1]
    return "" if gradient_is_finite else "the gradient"


def diverged(problem: str, state: dict, files: list[str], checkpoint: str) -> str:
    """The error of a run whose loss or gradient became NaN or infinite: where, on which images, and what to do."""
    kept = "the checkpoint is intact" if os.path.isfile(checkpoint) else "no checkpoint has been written"
    place = f"in epoch {state['epoch'] + 1}, step {state['step'] + 1}, images {', '.join(files)}"
    return (
        f"{problem} is not finite {place}; {kept}. Lower LEARNING_RATE, lengthen BURN_IN, clip the gradient or try PRECISION=fp32"
    )


def ignore_signals(worker: int) -> None:
    """worker_init_fn of a DataLoader: Ctrl-C and a queue's SIGTERM reach all processes of a run, and the main process decides what
    happens. If that one dies, PyTorch's workers notice and end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register  # before multiprocessing's own clean-up, which sends SIGTERM and waits: these workers ignore it
def kill_workers() -> None:
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler reports killed workers as an error
    for process in multiprocessing.active_children():
        process.kill()


# ---------------------------------------------------------------- checkpoints


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def atomic_write(file: str | os.PathLike):
    """Yields a temporary name to write to and renames it to `file` when everything is written; on failure the old file stays.

    Raises OSError, naming the file.
    """
    target = os.path.realpath(file)  # a symbolic link stays one
    temporary = f"{target}.tmp"  # always the same name: the next save replaces what kill -9 left behind
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise OSError(f"{file}: could not be written ({first_line(error)}); is the disk full?") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save_checkpoint(file: str | os.PathLike, **state) -> None:
    """Writes tensors and plain Python values; the old file stays until the new one is complete.

    Raises OSError, naming the file, and ValueError where a weight of `model` is not finite: a step has destroyed the network.
    """
    if not all(torch.isfinite(tensor).all() for tensor in state.get("model", {}).values()):
        kept = "it still holds the last good weights" if os.path.isfile(file) else "it was not written"
        raise ValueError(f"{file}: {kept}, because the new ones are not finite. Lower LEARNING_RATE, or set CLIP_NORM or BURN_IN")
    with atomic_write(file) as temporary:
        torch.save(state, temporary)


def load_checkpoint(file: str | os.PathLike, device: str | torch.device = "cpu", keys: tuple = ()) -> dict:
    """Reads a file of save_checkpoint; code hidden in a foreign pickle is refused, not run.

    Raises FileNotFoundError or ValueError, naming the file, where it is missing, damaged, not a checkpoint, or lacks one of the
    `keys` that the caller needs.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such checkpoint; train first, or set CHECKPOINT")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about foreign pickles; the sentences below say more
            state = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{file}: not a checkpoint of this repository, or one that would run code; it was not loaded") from None
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{file}: damaged or not a checkpoint ({first_line(error)[:80]})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{file}: not a checkpoint of this repository (holds {type(state).__name__})")
    if missing := [key for key in keys if key not in state]:
        raise ValueError(f"{file}: this checkpoint cannot be used here (it has no {', '.join(missing)})")
    return state


# may change silently on RESUME: where and how long a run runs, not what it computes
RUN_SETTINGS = {"DATA_DIR", "IMAGE_SETS", "NUM_WORKERS", "CHECKPOINT", "RESUME", "SAVE_EVERY_MINUTES", "MAX_HOURS", "DEVICE"}
RUN_SETTINGS |= {"PRETRAINED", "RESUME_WEIGHTS", "EVAL_EVERY"}
SCORE_SETTINGS = {"VAL_IMAGE_SETS", "EVAL_THRESHOLD", "EVAL_TRAIN_IMAGES"}  # what the best score was measured with


def fingerprint(samples: list[tuple]) -> str:
    """The number of samples (file, label) and a checksum of their file names, in a sentence that a person can compare."""
    names = "\n".join(os.path.basename(file) for file, _ in samples)
    return f"{len(samples)} images with the checksum {zlib.crc32(names.encode()):08x} of their names"


def resume(file: str | os.PathLike, model: nn.Module, optimizer, scaler, settings: dict, fixed: tuple[str, ...]) -> dict:
    """Loads a training checkpoint into model, optimizer and scaler -> the run's counters: epoch, step, images_seen, best, sums.

    Settings named in `fixed` may not change, because the run could not be the same; other changes are printed. Raises
    FileNotFoundError or ValueError, naming the file.
    """
    counters = ("epoch", "step", "images_seen", "best", "sums")
    saved = load_checkpoint(file, keys=("model", "optimizer", "scaler", *counters, "settings"))
    old = saved["settings"]
    changed = [name for name in settings if name in old and json.dumps(old[name]) != json.dumps(settings[name])]

    def shown(value):
        return repr(value) if len(repr(value)) <= 200 else f"{value!r:.200}... ({len(value)} in all)"

    if refused := [f"{name} was {shown(old[name])} and is {shown(settings[name])}" for name in changed if name in fixed]:
        raise ValueError(
            f"{file}: a resumed run must keep {'; '.join(refused)}; set it back, or start a new run from its weights "
            f"(RESUME_WEIGHTS, PRETRAINED)"
        )
    for name in changed:
        if name not in RUN_SETTINGS:
            print(f"changed since {file} was written: {name} {old[name]!r} -> {settings[name]!r}")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if saved["scaler"]:  # empty unless the run was in fp16
        scaler.load_state_dict(saved["scaler"])
    state = {name: saved[name] for name in counters}
    state["sums"] = state["sums"].to(next(model.parameters()).device)
    if SCORE_SETTINGS & set(changed):
        state["best"] = -1.0  # not comparable any more
    print(f"resuming {file} after epoch {state['epoch']}, step {state['step']}", flush=True)
    return state


# ---------------------------------------------------------------- log and charts


def append_metrics(file: str | os.PathLike, row: dict) -> None:
    """Adds one epoch to a CSV of metrics, in place of rows of this and later epochs, which a resumed run repeats."""
    rows = []
    if os.path.isfile(file):
        with open(file, newline="") as stream:
            rows = [old for old in csv.DictReader(stream) if old.get("epoch", "").isdigit() and int(old["epoch"]) < row["epoch"]]
    with atomic_write(file) as temporary, open(temporary, "w", newline="") as stream:
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
    with atomic_write(chart_file) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def log_epoch(stem: str, row: dict) -> None:
    """Adds an epoch to `<stem>_metrics.csv`, draws `<stem>_charts.png` and prints it as one line, without the empty columns."""
    append_metrics(f"{stem}_metrics.csv", row)
    draw_charts(f"{stem}_metrics.csv", f"{stem}_charts.png")
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items() if value != ""}
    print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)


# ---------------------------------------------------------------- drawing


def class_colour(index: int) -> tuple[int, int, int]:
    """A distinct colour for each class: hues a golden angle apart, so that neighbours in the list differ most."""
    hue = (index * 0.618034) % 1.0
    return tuple(Image.new("HSV", (1, 1), (int(hue * 255), 210, 235)).convert("RGB").getpixel((0, 0)))


def draw_boxes(image: np.ndarray, boxes, labels: list[str], class_indices) -> Image.Image:
    """Draws labelled boxes (K, 4) xyxy in pixels on an (H, W, 3) uint8 image; lines and letters scale with the image."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    size = max(picture.size)
    thickness = max(2, round(size / 200))
    font = ImageFont.load_default(size=max(11, round(size / 32)))
    for box, label, index in zip(boxes, labels, class_indices, strict=True):
        x1, y1, x2, y2 = (round(float(value)) for value in box)
        colour = class_colour(int(index))
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=thickness)
        _, _, right, bottom = draw.textbbox((0, 0), label, font=font)
        height = bottom + 2 * thickness
        text_x = max(0, min(x1, picture.width - right - 2 * thickness))
        text_y = y1 - height if y1 >= height else y1  # above the box, or just inside where there is no room
        draw.rectangle((text_x, text_y, text_x + right + 2 * thickness, text_y + height), fill=colour)
        dark = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] < 130
        draw.text((text_x + thickness, text_y + thickness / 2), label, fill="white" if dark else "black", font=font)
    return picture
