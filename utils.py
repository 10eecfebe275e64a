"""Shared by the scripts: boxes, average precision, Darknet's training rules, checkpoints, settings, drawing.

Letters: N images, A anchors (5), S_h x S_w grid cells, C classes (20), M = A * S_h * S_w boxes per image, K kept
detections, D detections and G ground truths in a whole data set. Boxes are xyxy (corners) or cxcywh (centre and size),
in fractions of the image (0..1) or in pixels of the VOC devkit (the first is 1, both end pixels belong to a box)."""

import ast
import atexit
import contextlib
import csv
import ctypes
import functools
import glob
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import batched_nms, box_convert

os.environ["MPLBACKEND"] = "Agg"  # figures go to files; a notebook's MPLBACKEND may not be available in a script

# ---------------------------------------------------------------- boxes: overlap, decoding, non-maximum suppression


def box_iou(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) in the same unit; leading dimensions broadcast -> (...). Boxes are
    cxcywh, not xyxy as in torchvision.ops.box_iou."""
    xy_1, wh_1, xy_2, wh_2 = boxes_1[..., :2], boxes_1[..., 2:], boxes_2[..., :2], boxes_2[..., 2:]
    half_1, half_2 = wh_1 / 2, wh_2 / 2
    overlap = torch.minimum(xy_1 + half_1, xy_2 + half_2) - torch.maximum(xy_1 - half_1, xy_2 - half_2)  # (..., 2)
    intersection = overlap.clamp(min=0).prod(dim=-1)
    return intersection / (wh_1.prod(dim=-1) + wh_2.prod(dim=-1) - intersection)


def decode_predictions(predictions: Tensor, anchors) -> tuple[Tensor, Tensor, Tensor]:
    """predictions: (N, A, S_h, S_w, 5+C) raw; anchors: A pairs in grid cells -> boxes (N, M, 4) cxcywh in fractions of
    the image, objectness (N, M) and class probabilities (N, M, C).

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
    """predictions: (N, A, S_h, S_w, 5+C) raw -> a list of N tensors (K, 6): x1, y1, x2, y2 in fractions of the image,
    clipped to it, confidence (objectness x class probability), class; sorted by descending confidence, on the CPU.

    As in Darknet's `valid`, a box gives one detection per class above the threshold, and NMS works on one class at a
    time.
    """
    boxes, objectness, probabilities = (tensor.cpu() for tensor in decode_predictions(predictions, anchors))
    boxes = box_convert(boxes, "cxcywh", "xyxy")  # (N, M, 4)
    confidences = objectness[..., None] * probabilities  # (N, M, C)
    detections = []
    for box, confidence in zip(boxes, confidences, strict=True):  # (M, 4), (M, C)
        row, label = (confidence > confidence_threshold).nonzero(as_tuple=True)
        box, score = box[row], confidence[row, label]
        # batched_nms offsets each class by the largest coordinate: one huge box would cost the others their precision
        keep = batched_nms(box.clamp(-10, 10), score, label, nms_iou_threshold)
        # (K, 6)
        detections.append(torch.cat([box[keep].clamp(0, 1), score[keep, None], label[keep, None].float()], dim=1))
    return detections


def to_devkit_pixels(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """boxes: (..., 4) xyxy in fractions of the image -> devkit pixels, where the first pixel is 1 (Darknet's
    detector.c), clipped to the image. Rounded to 1e-6, so that the integers of VOC's XML come back exactly."""
    size = np.array([width, height, width, height])
    return (boxes * size + 1).round(6).clip(1, size)


# ---------------------------------------------------------------- running a detector over a data set


@torch.no_grad()
def detect_dataset(
    model: nn.Module,
    dataset,
    batch_size: int,
    num_workers: int,
    confidence_threshold: float = 0.005,
    nms_iou_threshold: float = 0.45,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Runs a model over a VOCDataset -> detections (D, 7) and ground truths (G, 7) as in average_precision, and the
    seconds spent on loading, network and post-processing.

    The default thresholds are those of Darknet's validate_detector (examples/detector.c). If should_stop() becomes
    true, returns what there is so far.
    """
    parameter = next(model.parameters())
    loading = loader_options(num_workers, parameter.device)
    loader = DataLoader(range(len(dataset)), batch_size, collate_fn=dataset.images, **loading)  # workers read by index
    seconds = {"loading": 0.0, "network": 0.0, "post-processing": 0.0}
    detections, ground_truths, index = [np.empty((0, 7))], [np.empty((0, 7))], 0
    clock = time.perf_counter()
    for images in loader:
        if should_stop():
            break
        loaded = time.perf_counter()
        predictions = model(images.to(parameter.device, non_blocking=True)).float().cpu()
        computed = time.perf_counter()
        for rows in postprocess(predictions, dataset.anchors, confidence_threshold, nms_iou_threshold):
            rows = rows.double().numpy()  # (K, 6)
            pixels = to_devkit_pixels(rows[:, :4], *dataset.samples[index].size)
            detections.append(np.column_stack([np.full(len(rows), index), rows[:, 5], rows[:, 4], pixels]))
            truths = dataset.ground_truth(index).numpy()
            ground_truths.append(np.column_stack([np.full(len(truths), index), truths]))
            index += 1
        seconds["loading"] += loaded - clock
        seconds["network"] += computed - loaded
        clock = time.perf_counter()
        seconds["post-processing"] += clock - computed
    return np.concatenate(detections), np.concatenate(ground_truths), seconds


# ---------------------------------------------------------------- average precision


def largest_overlaps(detections, truths, num_classes: int, any_class=False) -> tuple[np.ndarray, np.ndarray]:
    """The largest IoU (D,) of each detection with the ground truths of its image and class (any_class: of its image),
    and the row (D,) of that ground truth: the first for ties, -1 without overlap. Tables as in average_precision."""
    # Ground truths sorted by key: those that a detection may match are a contiguous range, found by binary search.
    classes_apart = 0 if any_class else 1
    keys, truth_keys = (table[:, 0] * num_classes + table[:, 1] * classes_apart for table in (detections, truths))
    order = np.argsort(truth_keys, kind="stable")
    truths = truths[order]
    start = np.searchsorted(truth_keys[order], keys, side="left")
    count = np.searchsorted(truth_keys[order], keys, side="right") - start

    # Compare all detections with the first ground truth of their range, then with the second, and so on.
    best_iou = np.zeros(len(detections))
    best_truth = np.full(len(detections), -1)
    # both end pixels belong to a box
    truth_areas = (truths[:, 5] - truths[:, 3] + 1) * (truths[:, 6] - truths[:, 4] + 1)
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
        best_iou[remaining[better]], best_truth[remaining[better]] = iou[better], order[truth[better]]
    return best_iou, best_truth


def assign_detections(detections, truths, num_classes: int, iou_threshold: float) -> tuple[np.ndarray, ...]:
    """Assigns each detection to a ground truth by the rules of the VOC devkit (VOCevaldet.m); tables as in
    average_precision.

    -> best_iou (D,) and best_truth (D,) of largest_overlaps, is_true_positive (D,), is_ignored (D,).

    By descending confidence (stable for ties), each detection is assigned to the ground truth of its image and class
    with the largest IoU, taken or not. At or above the threshold, it is a true positive if that ground truth is free, a
    false positive if it is taken, and ignored if it is difficult.
    """
    best_iou, best_truth = largest_overlaps(detections, truths, num_classes)
    matched = (best_iou >= iou_threshold) & (best_truth >= 0)
    is_ignored = np.zeros(len(detections), bool)
    is_ignored[matched] = truths[best_truth[matched], 2] > 0  # difficult
    order = np.argsort(-detections[:, 2], kind="stable")
    candidates = order[(matched & ~is_ignored)[order]]
    _, first = np.unique(best_truth[candidates], return_index=True)  # the most confident detection takes the truth
    is_true_positive = np.zeros(len(detections), bool)
    is_true_positive[candidates[first]] = True
    return best_iou, best_truth, is_true_positive, is_ignored


def precision_recall(detections, ground_truths, num_classes: int, iou_threshold=0.5) -> list[tuple[np.ndarray, ...]]:
    """(confidences, precisions, recalls) of each class after each detection that is not ignored, by descending
    confidence; arguments as in average_precision. Recall is NaN for a class without ground truth."""
    detections = np.asarray(detections, dtype=np.float64).reshape(-1, 7)
    truths = np.asarray(ground_truths, dtype=np.float64).reshape(-1, 7)
    for name, table in (("detections", detections), ("ground_truths", truths)):
        if len(table) and not (table[:, 1].min() >= 0 and table[:, 1].max() < num_classes):
            raise ValueError(f"{name}: a class is outside 0..{num_classes - 1}")
    detections = detections[np.argsort(-detections[:, 2], kind="stable")]
    _, _, is_true_positive, is_ignored = assign_detections(detections, truths, num_classes, iou_threshold)
    detections, is_true_positive = detections[~is_ignored], is_true_positive[~is_ignored]
    curves = []
    for c in range(num_classes):
        of_class = detections[:, 1] == c
        true_positives = is_true_positive[of_class].cumsum()
        truth_count = ((truths[:, 1] == c) & (truths[:, 2] == 0)).sum()
        precision = true_positives / np.arange(1, len(true_positives) + 1)
        curves.append((detections[of_class, 2], precision, true_positives / (truth_count or np.nan)))
    return curves


def average_precision(detections, ground_truths, num_classes: int, iou_threshold=0.5, metric="all_points") -> Tensor:
    """Average precision of each class by the rules of the VOC devkit (see assign_detections) -> (num_classes,) float64.

    detections: (D, 7) image index, class, confidence, x1, y1, x2, y2; ground_truths: (G, 7) image index, class,
    difficult, x1, y1, x2, y2. Boxes are in pixels that include both ends (to_devkit_pixels), so fractions give wrong
    results. metric: "voc2007" (11 points) or "all_points" (VOC 2010 and later, Padilla et al.). NaN for a class without
    ground truth (difficult ones do not count). Raises ValueError for another metric or a class out of range.
    """
    if metric not in ("voc2007", "all_points"):
        raise ValueError(f'metric must be "voc2007" or "all_points", not {metric!r}')
    curves = precision_recall(detections, ground_truths, num_classes, iou_threshold)
    truths = np.asarray(ground_truths, dtype=np.float64).reshape(-1, 7)
    areas = np.full(num_classes, np.nan)
    for c in np.unique(truths[truths[:, 2] == 0, 1]).astype(int):
        areas[c] = area_under_curve(*curves[c][1:], metric)
    return torch.from_numpy(areas)


def area_under_curve(precision: np.ndarray, recall: np.ndarray, metric: str = "all_points") -> float:
    """Average precision of one class from its curve, as precision_recall returns it; metric as in average_precision."""
    if metric == "voc2007":  # mean over the recall levels 0, .1 .. 1 of the best precision at that recall or above
        return float(np.mean([precision[recall >= level].max(initial=0) for level in np.arange(11) / 10]))
    # area under the curve after making precision monotonically decreasing
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0) * envelope).sum())


def mean_average_precision(average_precisions: Tensor) -> float:
    """The mean over the classes that have ground truth; NaN if none has."""
    return float(torch.nanmean(torch.as_tensor(average_precisions, dtype=torch.float64)))


# ---------------------------------------------------------------- Darknet's training rules


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimiser groups: weight decay on kernels only, none on biases and batch norm (src/convolutional_layer.c)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kernels = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def warm_batch_norm(model: nn.Module, batches_seen: int) -> None:
    """Sets the momentum of all batch norms: Darknet's .01, but more during the first 990 batches (ours).

    With .01, the running statistics need some 500 batches to forget their initial values, too long for short runs. 10 /
    (batches + 10) averages over about the last tenth of the batches so far. A compiled model keeps .01, because every
    change of momentum would compile it again.
    """
    if any(name.endswith("_orig_mod") for name, _ in model.named_modules()):  # torch.compile's name for a wrapped model
        return
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.momentum = max(0.01, 10 / (batches_seen + 10))


LR_SCHEDULES = ("constant", "steps", "polynomial", "cosine")


def learning_rate_at(
    step: int, total_steps: int, learning_rate: float, schedule: str, burn_in: int = 0, power=4.0, drops: tuple = ()
) -> float:
    """The learning rate of one optimiser step, counted from 0 (get_current_rate in Darknet's src/network.c).

    schedule: "constant"; "steps": divided by 10 from update number d on for each d in `drops`; "polynomial": times
    (1 - update / total_steps)^power; "cosine" (ours): falls to 0. During the first burn_in - 1 updates the rate is
    learning_rate (update / burn_in)^4 instead; with "polynomial", the exponent is `power` there too.
    """
    if schedule not in LR_SCHEDULES:
        raise ValueError(f"LR_SCHEDULE must be one of {LR_SCHEDULES}, not {schedule!r}")
    update = step + 1  # Darknet increments its batch counter before it computes the rate
    if update < burn_in:
        return learning_rate * (update / burn_in) ** (power if schedule == "polynomial" else 4)
    if schedule == "constant":
        return learning_rate
    if schedule == "steps":
        return learning_rate * 0.1 ** sum(update >= drop for drop in drops)
    if schedule == "polynomial":
        return learning_rate * (1 - update / total_steps) ** power
    return learning_rate * (1 + math.cos(math.pi * step / total_steps)) / 2


# ---------------------------------------------------------------- device and precision


def pick_device(name: str = "auto") -> torch.device:
    """The device for "auto" (the first CUDA GPU, otherwise the CPU), a GPU number or a PyTorch device name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and is_too_old():
            print("the GPU is too old for this PyTorch, so the CPU computes; an older PyTorch may support it")
            name = "cpu"
    try:
        device = torch.device(f"cuda:{name}" if str(name).isdigit() else name)
    except RuntimeError:
        device = torch.device("meta")  # refused below
    if device.type not in ("cpu", "cuda", "mps") or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(f'DEVICE={name}: not a device that works here; use "auto", "cpu", "cuda", "cuda:1" or "mps"')
    if device.type == "cuda":
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= gpus:
            raise ValueError(f"DEVICE={name}: PyTorch sees {gpus} GPUs; set another, or check PyTorch and GPU driver")
        if device.index is not None:
            torch.cuda.set_device(device)  # for functions that ask for the current device
    torch.backends.cudnn.benchmark = True  # chooses the fastest convolutions for each image size
    return device


def is_too_old() -> bool:
    """Whether this PyTorch was built for newer GPUs than the first one."""
    built_for = [int(name[3:].rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    major, minor = torch.cuda.get_device_capability(0)
    return 10 * major + minor < min(built_for, default=0)  # empty: ROCm


def device_text(device: torch.device) -> str:
    """The device for the first line of a training, with the reason why it is not a GPU."""
    if device.type != "cpu" or torch.cuda.is_available():
        return str(device)
    if torch.backends.mps.is_available():
        return "cpu (DEVICE=mps uses the Mac's GPU)"
    return "cpu (no GPU found)" if torch.version.cuda or torch.version.hip else "cpu (this PyTorch has no CUDA)"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(name: str, device: torch.device, resumed: str = "") -> torch.dtype:
    """The autocast dtype for "fp32", "bf16", "fp16" or "auto": bfloat16 if native, else float16 on a GPU and float32 on
    a CPU.

    "auto" keeps the type of the run in the checkpoint `resumed`, except bfloat16 on a GPU without it. On a CPU
    with native bfloat16, it measures which type is faster: some Intel processors without AMX have the
    instructions, but run slower with them.
    """
    if name != "auto":
        return DTYPES[name]
    if os.path.isfile(resumed):
        with contextlib.suppress(Exception):  # resume() reports what is wrong
            saved = torch.load(resumed, map_location="cpu", weights_only=True, mmap=True)["settings"]["PRECISION"]
            native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
            if native or saved != str(torch.bfloat16):
                dtype = {str(dtype): dtype for dtype in DTYPES.values()}[saved]
                print(f"PRECISION auto keeps {saved}, the type of the run in {resumed}")
                return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    full, half = time_convolution()
    faster = torch.bfloat16 if half < full else torch.float32
    print(f"PRECISION auto chose {faster}: a 3x3 convolution takes {full:.1f} ms in float32, {half:.1f} ms in bfloat16")
    return faster


@torch.no_grad()
def time_convolution() -> list[float]:
    """Milliseconds of a convolution (256 to 512 channels at 26 x 26) on the CPU in float32 and bfloat16."""
    layers = []
    for dtype in (torch.float32, torch.bfloat16):  # ones: drawing random numbers would change the initial weights
        maps, kernel = torch.ones(1, 256, 26, 26, dtype=dtype), torch.ones(512, 256, 3, 3, dtype=dtype)
        layers.append((maps.to(memory_format=torch.channels_last), kernel.to(memory_format=torch.channels_last)))
    seconds = [[], []]
    for _ in range(5):  # interleaved, and the minimum counts: the machine may be busy
        for (maps, kernel), times in zip(layers, seconds, strict=True):
            start = time.perf_counter()
            nn.functional.conv2d(maps, kernel, padding=1)
            times.append(time.perf_counter() - start)
    return [1000 * min(times) for times in seconds]


def keep_freed_memory() -> None:
    """Stops glibc from returning the feature maps of each layer to the operating system: on a CPU, the page faults of
    the next use would take up to half of the time. The process keeps its peak memory. Linux only."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation through mmap
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


# ---------------------------------------------------------------- stopping a run


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def catch_stop_signals(max_hours: float = 0.0) -> types.SimpleNamespace:
    """Turns SIGTERM, SIGHUP (a closed ssh) and the first SIGINT (Ctrl-C) into a request to stop -> the object that
    should_stop reads; its `reason` becomes the signal's name. Another SIGINT, more than a second later, raises
    KeyboardInterrupt. max_hours: time limit, 0 for none.
    """
    deadline = time.monotonic() + 3600 * max_hours if max_hours > 0 else math.inf
    stop = types.SimpleNamespace(reason="", deadline=deadline, interrupted=math.inf)

    def handle(number, frame):
        if number == signal.SIGINT:
            # one Ctrl-C arrives twice under torchrun, from the terminal and from torchrun, but within a second
            if time.monotonic() > stop.interrupted + 1:
                raise KeyboardInterrupt
            stop.interrupted = min(stop.interrupted, time.monotonic())
        stop.reason = stop.reason or signal.Signals(number).name

    def block_signals():  # in a forked worker: PyTorch's own handler would end it before ignore_signals is called
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    if threading.current_thread() is threading.main_thread():  # the only thread in which Python allows handlers
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, handle)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=block_signals)
    return stop


def should_stop(stop: types.SimpleNamespace) -> bool:
    """Whether a signal has arrived or the time limit is reached; stop.reason says which."""
    if not stop.reason and time.monotonic() >= stop.deadline:
        stop.reason = "MAX_HOURS"
    return bool(stop.reason)


def report_stop(bar, stop: types.SimpleNamespace, state: dict, checkpoint: str) -> None:
    """Closes the progress bar and prints why and where a run has stopped, and how to continue."""
    bar.close()
    where = f"in epoch {state['epoch'] + 1} after step {state['step']}"
    print(f"stopped by {stop.reason} {where}; RESUME=True in the same command continues {checkpoint}", flush=True)


def problem_of_step(names: tuple[str, ...], values: Tensor, scaler) -> str:
    """What is not finite before an optimiser step: "" (nothing), "the loss (coord, total)" or "the gradient".

    values: the terms called `names`, summed over the gradient accumulation, and last the norm of the gradient, which
    is not used in fp16: there, the scaler skips steps with infinite gradients and halves its scale, and a scale below 1
    means that the gradient has diverged.
    """
    finite = torch.isfinite(values).tolist()
    if bad := [name for name, fine in zip(names, finite, strict=False) if not fine]:
        return f"the loss ({', '.join(bad)})"
    gradient_is_finite = scaler.get_scale() >= 1 if scaler.is_enabled() else finite[-1]
    return "" if gradient_is_finite else "the gradient"


def divergence_message(problem: str, state: dict, files: list[str], checkpoint: str) -> str:
    """The error message for a loss or gradient that is not finite: where, on which images, and what to do."""
    kept = "the last checkpoint is kept" if os.path.isfile(checkpoint) else "no checkpoint has been written"
    where = f"in epoch {state['epoch'] + 1}, step {state['step'] + 1}, images {', '.join(files)}"
    advice = "Lower LEARNING_RATE, lengthen BURN_IN or try PRECISION=fp32"
    return f"{problem} is not finite {where}; {kept}. {advice}"


def loader_options(num_workers: int, device: torch.device) -> dict:
    """Options of a DataLoader. Workers are forked where that works: they need this process's memory settings and
    signal handlers, which Python 3.14 would not give them."""
    is_free = sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) is None
    fork = "fork" if num_workers > 0 and is_free else None
    options = {"num_workers": num_workers, "pin_memory": device.type == "cuda", "worker_init_fn": ignore_signals}
    return options | {"multiprocessing_context": fork}


def ignore_signals(worker: int) -> None:
    """worker_init_fn of a DataLoader: signals reach all processes of a run, but only the main process reacts."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # runs before multiprocessing's clean-up, which would wait for workers that ignore its SIGTERM
def kill_workers() -> None:
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler reports killed workers as an error
    for process in multiprocessing.active_children():
        process.kill()


# ---------------------------------------------------------------- reading and writing files


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """Text with escapes for what cannot be decoded or seen, except the joiners of Persian and Indian scripts."""
    special = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs")} - {"\u200c", "\u200d"}
    return "".join(c.encode("unicode_escape", "surrogatepass").decode() if c in special else c for c in text)


@contextlib.contextmanager
def reading(file: str | os.PathLike, kind: str, advice: str):
    """Any error in the block becomes a FileNotFoundError or ValueError of one sentence: the file, what is wrong, what
    to do.

    kind: what the file should be, such as "VOC annotation". A damaged file can raise anything.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such {kind}; {advice}") from None
    except Exception as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{file}: not a readable {kind} ({reason[:200]}); {advice}") from None


def read_text(file: str | os.PathLike) -> str:
    """Reads UTF-8 or, with a byte order mark, UTF-16. Raises OSError, or ValueError for other encodings."""
    content = Path(file).read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # also UTF-16 and UTF-32 without a byte order mark
        raise ValueError("it is not UTF-8 text; save it as UTF-8")
    return text.replace("\ufeff", "")  # in the middle: files joined by `cat`


# a name in one normal form: macOS stores an umlaut as two characters, a letter and its dots
composed = functools.partial(unicodedata.normalize, "NFC")


def file_name(text: str) -> str:
    """The text as part of a file name, and as one word, because toolkits split lines at blanks."""
    return re.sub(r"[ /\\]", "_", text)


def check_classes(source: str, classes: list[str]) -> list[str]:
    """Returns the class names; raises ValueError, naming their source, if they cannot be parts of file names."""
    if not classes:
        raise ValueError(f"{source}: contains no class names")
    files = {}
    for name in classes:
        if not isinstance(name, str) or printable(name) != name or re.search(r"^\s|[^\S ]|\s$|^$", name):
            advice = "use text without spaces around it, unusual spaces or characters that cannot be seen"
            raise ValueError(f"{source}: {printable(repr(name))} is not a class name; {advice}")
        file = file_name(composed(name))
        if file in files:
            raise ValueError(f"{source}: {files[file]!r} and {name!r} would share a file of detections; rename one")
        files[file] = name
    return [composed(str(name)) for name in classes]  # not numpy's str_, which a checkpoint must not contain


@contextlib.contextmanager
def atomic_write(file: str | os.PathLike, suffix: str = ""):
    """Yields a temporary name, renamed to `file` at the end; on failure the old file stays. Raises OSError, naming the
    file.

    suffix: of the temporary name, for a writer that takes the format from it."""
    target = os.path.realpath(file)  # keeps a symbolic link
    temporary = f"{target}.tmp{suffix}"  # a fixed name, so that the next save replaces what kill -9 left behind
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's own for a failed write
            raise
        reason = f"could not be written ({first_line(error)})"
        raise OSError(f"{file}: {reason}; free some space, or choose another place") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_file(file: str | os.PathLike, content: bytes) -> None:
    """Writes a whole file with atomic_write."""
    with atomic_write(file) as temporary:
        Path(temporary).write_bytes(content)


def write_picture(file: str | os.PathLike, save: Callable, **options) -> None:
    """Writes what save(stream, **options) encodes. In memory first, because encoders do not report a full disk."""
    stream = io.BytesIO()
    save(stream, **options)
    write_file(file, stream.getvalue())


def check_writable(file: str | os.PathLike) -> None:
    """Raises OSError or ValueError, naming the file, if atomic_write would fail: better now than after an epoch."""
    if not os.path.basename(file):
        raise ValueError(f"{os.fspath(file)!r} is no file name; set CHECKPOINT or OUTPUT")
    folder = os.path.dirname(os.path.realpath(file))
    try:
        if os.path.exists(file) and not os.path.isfile(file):
            raise FileExistsError("it is a folder, a device or a pipe")
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{file}: could not be written ({first_line(error)}); choose another place") from error


# ---------------------------------------------------------------- checkpoints


def is_torch_file(file: str | os.PathLike) -> bool:
    """Whether torch.save wrote a file: it has the suffix or is a zip archive. Others are taken for Darknet's."""
    return os.fspath(file).endswith((".pt", ".pth", ".pth.tar")) or zipfile.is_zipfile(file)


LARGEST_WEIGHT = 1e9  # far above any trained weight; abs() < it is false for NaN, infinity and most flipped exponents


def check_weights(file: str | os.PathLike, weights: dict[str, Tensor]) -> None:
    """Raises ValueError, naming the file, for weights that are not finite, a negative running variance, a kernel of
    zeros, or zeros at the end of the last kernel (an incomplete download)."""
    tensors = [tensor for tensor in weights.values() if isinstance(tensor, Tensor) and tensor.dtype != torch.bool]
    kernels = [tensor for tensor in tensors if tensor.ndim == 4]
    problem = ""
    if len(tensors) < len(weights):
        problem = "other values than numeric tensors"
    elif not all((tensor.abs() < LARGEST_WEIGHT).all() for tensor in weights.values()):
        problem = "NaN, infinite or huge numbers"
    elif any(name.endswith("running_var") and (tensor < 0).any() for name, tensor in weights.items()):
        problem = "a negative variance"
    elif not all(kernel.any() for kernel in kernels) or (kernels and not kernels[-1].flatten()[-16:].any()):
        problem = "a kernel of zeros"
    if problem:
        raise ValueError(f"{file}: damaged weights, or those of another network ({problem}); use another file")


def save_checkpoint(file: str | os.PathLike, **state) -> None:
    """Writes tensors and plain Python values with atomic_write.

    Raises OSError, and ValueError if a weight of `model` is not finite, so that the last good checkpoint stays.
    """
    if not all((tensor.abs() < LARGEST_WEIGHT).all() for tensor in state.get("model", {}).values()):
        kept = "those of the last save are kept" if os.path.isfile(file) else "it was not written"
        advice = "lower LEARNING_RATE or lengthen BURN_IN"
        raise ValueError(f"{file}: the weights are NaN, infinite or huge; {kept}; {advice}")
    with atomic_write(file) as temporary:
        torch.save(state, temporary)


def load_checkpoint(file: str | os.PathLike, device: str | torch.device = "cpu", keys: tuple = ()) -> dict:
    """Reads a file of save_checkpoint without running any code that a foreign pickle may contain.

    Raises FileNotFoundError or ValueError, naming the file, if it is missing, damaged, not a checkpoint or lacks one of
    `keys`.
    """
    with reading(file, "checkpoint of this repository", "train it first, or name another file"):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():  # torch does not check the checksums
                    raise ValueError(f"damaged: {damaged} fails its checksum")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about foreign pickles
                state = torch.load(file, map_location=device, weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError("it contains code or is damaged; it was not loaded") from None
        if missing := [key for key in keys if key not in state.keys()]:  # noqa: SIM118 - only a dict has keys()
            hint = " (a *_best.pt cannot be resumed)" if "optimizer" in missing else ""
            raise ValueError(f"it has no {', '.join(missing)}{hint}")
        weights = dict(state.get("model", {}))
    check_weights(file, weights)
    return state


# may change silently on RESUME, because they do not affect what a run computes (fingerprint() checks the images)
RUN_SETTINGS = {"NUM_WORKERS", "CHECKPOINT", "RESUME", "RESUME_WEIGHTS", "PRETRAINED"}
RUN_SETTINGS |= {"SAVE_EVERY_MINUTES", "MAX_HOURS", "DEVICE", "EVAL_EVERY"}
SCORE_SETTINGS = {"VAL_IMAGE_SETS", "EVAL_THRESHOLD", "EVAL_TRAIN_IMAGES"}  # a change of these resets the best score


def fingerprint(samples: list[tuple] | np.ndarray) -> str:
    """The number of samples (file, ...) and a checksum of their file names, as readable text."""
    names = b"\n".join(os.fsencode(os.path.basename(sample[0])) for sample in samples)
    return f"{len(samples)} images with the checksum {zlib.crc32(names):08x} of their names"


def resume(file: str | os.PathLike, model: nn.Module, optimizer, scaler, settings: dict, fixed: tuple) -> dict:
    """Loads a training checkpoint into model, optimizer and scaler -> the run's position and log: epoch, step,
    images_seen, best, sums, metrics.

    Raises ValueError if a setting in `fixed` has changed or the file does not fit; prints other changed settings.
    """
    position = ("epoch", "step", "images_seen", "best", "sums", "metrics")
    saved = load_checkpoint(file, keys=("model", "optimizer", "scaler", *position, "settings"))
    old = saved["settings"]
    if missing := [name for name in fixed if name not in old]:
        raise ValueError(f"{file}: a checkpoint of another script, without {', '.join(missing)}; resume it there")
    changed = [name for name in settings if name in old and json.dumps(old[name]) != json.dumps(settings[name])]
    refused = [f"{name} was {old[name]!r:.200} and is {settings[name]!r:.200}" for name in changed if name in fixed]
    if refused:
        advice = "set it back, or start a new run from its weights (PRETRAINED; darknet_train*.py: RESUME_WEIGHTS)"
        raise ValueError(f"{file}: cannot resume with changed settings: {'; '.join(refused)}; {advice}")
    for name in changed:
        if name not in RUN_SETTINGS:
            print(f"changed since {file} was written: {name} {old[name]!r} -> {settings[name]!r}")
    with reading(file, "checkpoint of this model and optimiser", "start a new run"):
        model.load_state_dict(saved["model"])
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, buffers in saved["optimizer"]["state"].items():  # a fused step would write beyond other shapes
            if any(buffer.ndim and buffer.shape != parameters[index].shape for buffer in buffers.values()):
                raise ValueError("the optimiser's buffers have other shapes than the weights")
        # of the groups, only the rate: all else is in this run's settings
        pairs = zip(optimizer.state_dict()["param_groups"], saved["optimizer"]["param_groups"], strict=True)
        groups = [own | {"lr": saved_group["lr"]} for own, saved_group in pairs]
        optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
        if saved["scaler"]:  # empty unless the run is in fp16
            scaler.load_state_dict(saved["scaler"])
        state = {name: saved[name] for name in position}
    if SCORE_SETTINGS & set(changed):
        state["best"] = -1.0  # no longer comparable
    print(f"resuming {file} after epoch {state['epoch']}, step {state['step']}", flush=True)
    if state["epoch"] >= settings["EPOCHS"]:
        print(f"all {settings['EPOCHS']} epochs are done; set a larger EPOCHS to continue training")
    return state


def keep_earlier_run(checkpoint: str, start_file: str) -> None:
    """Renames checkpoint, best checkpoint and metrics of an earlier run to `<file>.old1`, or the next free number, and
    says so. start_file: the weights that the new run starts from; it is copied, because a restart needs it."""
    stem, kept = checkpoint.removesuffix(".pt"), []
    files = (checkpoint, f"{stem}_best.pt", f"{stem}_metrics.csv")
    number = next(n for n in itertools.count(1) if not any(os.path.exists(f"{file}.old{n}") for file in files))
    for file in filter(os.path.isfile, files):
        path = os.path.realpath(file)  # a symbolic link stays
        move = shutil.copyfile if start_file and path == os.path.realpath(start_file) else shutil.move
        kept.append(move(path, f"{file}.old{number}"))
    if kept:
        size = sum(os.path.getsize(f) for file in files for f in glob.glob(f"{glob.escape(file)}.old*")) / 1e9
        advice = f"to continue that run, stop, rename them back and add RESUME=True ({size:.1f} GB are kept in all)"
        print(f"this is a new run; files of an earlier one are now {', '.join(kept)}: {advice}", flush=True)


LOCKS = []  # open files: closing one would release its lock


def lock_run(checkpoint: str) -> None:
    """Raises ValueError if another living process trains with the same CHECKPOINT. Windows has no such locks."""
    with contextlib.suppress(ImportError):
        import fcntl

        LOCKS.append(open(f"{checkpoint}.lock", "w"))  # noqa: SIM115
        try:
            fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{checkpoint}: another run is writing it; set another CHECKPOINT, or stop it") from None
        except OSError:
            return  # some network disks have no locks


# ---------------------------------------------------------------- log and charts


def print_epoch(row: dict, left: str) -> None:
    """Prints the values of an epoch that are not None, and the time left."""
    values = {name: value for name, value in row.items() if value is not None}
    shown = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()]
    print("  ".join([*shown, left] if left else shown), flush=True)


def print_scores(sums: Tensor, stop: types.SimpleNamespace) -> None:
    """Prints a validation without training; sums: loss, top-1 hits, top-5 hits, images. Exits with 1 if stopped."""
    loss, top1, top5 = (sums[:3] / sums[3]).tolist()
    print_epoch({"val_loss": loss, "val_top1": top1, "val_top5": top5, "val_images": int(sums[3])}, "")
    if stop.reason:
        sys.exit(f"stopped by {stop.reason} before all images were validated")


def write_metrics(stem: str, rows: list[dict]) -> None:
    """Writes the rows of a run's epochs, None where not evaluated, as `<stem>_metrics.csv` and `<stem>_charts.png`."""
    if not rows:
        return
    try:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[-1]), extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {name: f"{value:.6g}" for name, value in row.items() if isinstance(value, float)})
        write_file(f"{stem}_metrics.csv", text.getvalue().encode())
        draw_charts(rows, f"{stem}_charts.png")
    except Exception as error:  # no chart or CSV error may end a run
        print(f"{stem}_metrics.csv or {stem}_charts.png could not be written: {first_line(error)}")


def draw_charts(rows: list[dict], chart_file: str | os.PathLike) -> None:
    """Draws the rows of write_metrics as a PNG: a panel per loss term, one for the scores, one for the rate."""
    from matplotlib import pyplot as plt  # here, because it takes a second to import

    scores = [name for name in rows[-1] if name.startswith(("train_", "val_")) and not name.endswith("loss")]
    others = ("epoch", "learning_rate", "images_per_second", *scores)
    panels = {name: [name] for name in rows[-1] if name not in others}
    panels |= {"scores": scores, "learning_rate": ["learning_rate"]}
    width = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(2, width, figsize=(3.6 * width, 6), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        points = {name: [(row["epoch"], row[name]) for row in rows if row.get(name) is not None] for name in names}
        for name, pairs in points.items():
            if pairs:
                axis.plot(*zip(*pairs, strict=True), marker="." if len(pairs) < 40 else None, label=name)
        values = [value for pairs in points.values() for _, value in pairs]
        if title == "scores":
            # the first score that was measured decides on the best checkpoint
            decisive = next((points[name] for name in ("val_map", "val_top1", "train_map") if points.get(name)), [])
            if scored := [(value, epoch) for epoch, value in decisive if math.isfinite(value)]:
                value, epoch = max(scored)
                axis.plot([epoch], [value], "k*", markersize=10, label=f"best: {value:.3f} in epoch {epoch}")
            axis.set_ylim(0, 1.02)
            if axis.lines:
                axis.legend(loc="best", fontsize=8)
        elif title != "learning_rate" and values and 0 < 20 * min(values) < max(values):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    write_picture(chart_file, figure.savefig, dpi=100, format="png")
    plt.close(figure)


def advance(bar, images: int, start: float, loss: Tensor) -> None:
    """Moves the progress bar by a step; shows the images per second since `start` (time.monotonic()) and the loss."""
    if not bar.disable:
        speed = images / (time.monotonic() - start)
        bar.set_postfix_str(f"{speed:.1f} images/s, loss {loss:.3g}", refresh=False)
        bar.update()


def time_left(began: float, done: int, remaining: int) -> str:
    """The time for the remaining steps at the pace of those done since `began` (time.monotonic()), with evaluations."""
    if not remaining:
        return ""
    minutes = (time.monotonic() - began) / max(done, 1) * remaining / 60
    text = f"{round(minutes) // 60} h {round(minutes) % 60:02d} min" if minutes >= 60 else f"{minutes:.1f} min"
    return f"{text} left"


def finish(bar, broken_list: str) -> None:
    """Closes the progress bar and names the list of broken images, if there is one."""
    bar.close()
    if os.path.isfile(broken_list):
        print(f"{broken_list} lists the images that could not be read")


# ---------------------------------------------------------------- settings of a script

# What a setting may be on its own. The scripts' check_settings() add rules between two settings.
WORDS = {
    "BROKEN_IMAGES": ("stop", "skip"),
    "EQUATION": ("darknet", "yolov1"),
    "LR_SCHEDULE": LR_SCHEDULES,
    "OPTIMIZER": ("adam", "sgd"),
    "PRECISION": ("auto", *DTYPES),
    "TOLERATE": ("other classes", "missing labels"),
}
LIMITS = {  # least, most, and the number of which it must be a multiple (0: any number)
    "EPOCHS BATCH_SIZE SUBDIVISIONS REPEAT EVAL_EVERY EVAL_TRAIN_IMAGES": (1, 10**12, 1),
    "NUM_WORKERS BURN_IN SEED": (0, 10**12, 1),
    "LEARNING_RATE WEIGHT_DECAY CLIP_NORM LR_POWER IDENTITY_INIT CROP_SCALE": (0, 10**12, 0),
    "LAMBDA_COORD LAMBDA_OBJECT LAMBDA_NO_OBJECT LAMBDA_CLASS SAVE_EVERY_MINUTES MAX_HOURS": (0, 10**12, 0),
    "MOMENTUM LABEL_SMOOTHING IGNORE_THRESHOLD EVAL_THRESHOLD": (0, 1, 0),
    "CONFIDENCE_THRESHOLD NMS_IOU_THRESHOLD FIXED_THRESHOLD": (0, 1, 0),
    "IMAGE_SIZE MULTI_SCALE INPUT_SIZES": (32, 9984, 32),  # a grid cell is 32 pixels
    "LR_DROPS": (1, 10**12, 0),
    "SHEET_IMAGES": (1, 500, 1),
}
NAMED_LISTS = {"IMAGE_SETS", "VAL_IMAGE_SETS", "CLASSES", "DATA_CLASSES", "ANCHORS"}  # or a file's name
LISTS = {"TOLERATE", "CROP_SCALE", "MULTI_SCALE", "INPUT_SIZES", "LR_DROPS"}  # hold any number of such values
RANGES = {name: limits for names, limits in LIMITS.items() for name in names.split()}


def check_settings(script_globals: dict, **ranges: tuple) -> None:
    """Raises ValueError for the first setting of a script that is outside of WORDS or RANGES; in a list, each entry
    counts; then if LR_DROPS or SUBDIVISIONS do not fit. ranges: NAME=(least, most, multiple) instead of RANGES'."""
    settings = script_settings(script_globals)
    for name, value in settings.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if name in LISTS and values is not value:
            raise ValueError(f"{name} must be a list, not {value!r:.40}")
        if name in WORDS and (wrong := [word for word in values if word not in WORDS[name]]):
            raise ValueError(f"{name} must be one of {', '.join(WORDS[name])}, not {wrong[0]!r:.40}")
        if value is None or name not in RANGES | ranges:  # None: IMAGE_SIZE of a checkpoint
            continue
        least, most, step = (RANGES | ranges)[name]
        for number in values:
            if type(number) not in (int, float) or not least <= number <= most or (step and number % step):
                kind = {0: "a number", 1: "a whole number"}.get(step, f"a multiple of {step}")
                raise ValueError(f"{name} must be {kind} from {least} to {most:g}, not {number!r:.40}")
    if settings.get("LR_SCHEDULE") == "steps" and min(settings["LR_DROPS"], default=0) > settings["EPOCHS"] > 0:
        raise ValueError(f"LR_DROPS {settings['LR_DROPS']} are all above EPOCHS, so the rate would never drop")
    if settings.get("BATCH_SIZE", 0) % (parts := settings.get("SUBDIVISIONS", 1)):
        raise ValueError(f"BATCH_SIZE {settings['BATCH_SIZE']} must be a multiple of SUBDIVISIONS {parts}")


def settings_block(script_globals: dict) -> str:
    """The lines of a script that assign its settings, with their comments: from the first one to the first function."""
    text = Path(script_globals["__file__"]).read_text("utf-8")
    above = re.split(r"^(?:def \w+\(|class \w+[(:]|@)", text, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.search(r"^(# \w+\n)?[A-Z][A-Z_]+ = ", above, re.MULTILINE)
    return above[found.start() :].rstrip() if found else ""


def script_settings(script_globals: dict) -> dict:
    """The settings of a script: the UPPER_CASE globals that it assigns itself, above its first function."""
    names = re.findall(r"^([A-Z][A-Z_]+) = ", settings_block(script_globals), re.MULTILINE)
    # values of other types, such as a Path, become text: a checkpoint must not contain them
    plain = (str, int, float, bool, list, tuple, type(None))
    values = {name: script_globals[name] for name in names}
    return {name: value if type(value) in plain else str(value) for name, value in values.items()}


def override_globals(script_globals: dict, words: list[str]) -> None:
    """Sets a script's settings from the NAME=value arguments of its command line; `--help` prints the settings and
    exits.

    Values are Python literals; text needs no quotes. A value must have the type of its default, except that an int is
    accepted for a float, text for NAMED_LISTS, and an int for None. Other values end the script with one line."""
    known = script_settings(script_globals)
    script = os.path.basename(script_globals["__file__"])
    if "--help" in words or "-h" in words:
        print((script_globals["__doc__"] or "").strip())
        print(f"\nSettings (edit them in the file, or pass NAME=value):\n\n{settings_block(script_globals)}")
        sys.exit(0)
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            sys.exit(f"{script}: {word!r} is not of the form NAME=value; --help lists the names")
        if name not in known:
            sys.exit(f"{script}: unknown setting {name!r}; the known ones are {', '.join(known)}")
        default = known[name]
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = text  # a path or a name without quotes
        if isinstance(default, float) and type(value) is int and abs(value) < 2**60:
            value = float(value)
        if isinstance(default, str) and value is not None and not isinstance(value, str):
            value = text  # CHECKPOINT=7
        if isinstance(value, str):
            value = os.path.expanduser(value)  # CHECKPOINT=~/x.pt: zsh and sh leave it as it is
        fits = type(value) is type(default) or (default is None and type(value) is int)
        if isinstance(default, (list, tuple)):
            is_name = name in NAMED_LISTS and isinstance(value, str) and text[:1] not in ("", "[", "(")
            fits |= isinstance(value, (list, tuple)) or is_name
        if not fits:
            example = [1, 2] if default == [] else default
            kind = "an int or None" if default is None else f"{type(default).__name__}, such as {example!r}"
            sys.exit(f"{script}: {name} must be {kind}, not {text[:80]!r}")
        script_globals[name] = value


def print_long_burn_in(burn_in: int, total_steps: int) -> None:
    """Prints a hint if a run is too short for its burn-in."""
    if burn_in > total_steps > 0:
        print(f"BURN_IN {burn_in} exceeds the {total_steps} steps of the run: the rate never reaches LEARNING_RATE")


ADVICE = {  # pattern in the text of an error -> what to do
    "Too many open files": "set NUM_WORKERS=0, or raise the limit (ulimit -n 65536)",
    "killed by signal|shared memory|unable to mmap|No space": "set NUM_WORKERS=0, or enlarge /dev/shm (--shm-size=8g)",
    "MemoryError|out of memory|can't allocate memory": "lower BATCH_SIZE or image size, or double SUBDIVISIONS",
}


@contextlib.contextmanager
def plain_errors():
    """Around a script's main(): bad input ends with a one-line message and exit status 1 instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # escape what the terminal cannot print instead of failing
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # train.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python still flushes at its end
        sys.exit("error: the program that reads the output has ended")
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
        last = text.strip().splitlines()[-1].rstrip(": ")  # a DataLoader worker's error contains its traceback
        if isinstance(error, (OSError, ValueError)) and "Too many open files" not in text:
            sys.exit(f"error: {printable(re.sub(r'^[A-Za-z]+Error: ', '', last))}")
        advice = next((advice for pattern, advice in ADVICE.items() if re.search(pattern, text)), "")
        if not advice:
            raise
        sys.unraisablehook = lambda unraisable: None  # of a DataLoader that is only half made
        sys.exit(f"error: {printable(last)}; {advice}")


def set_seed(seed: int) -> None:
    """Seeds Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that still use the global state
    torch.manual_seed(seed)


# ---------------------------------------------------------------- drawing


def class_colour(index: int) -> tuple[int, int, int]:
    """A colour per class; consecutive hues are a golden angle apart, so that they differ clearly."""
    hue = (index * 0.618034) % 1.0
    return tuple(Image.new("HSV", (1, 1), (int(hue * 255), 210, 235)).convert("RGB").getpixel((0, 0)))


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along and uses for its own text: Latin, Greek, Cyrillic and more."""
    import matplotlib  # here, because it takes a moment to import

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


@functools.cache
def font_characters() -> set[int]:
    """The code points that the font has."""
    from matplotlib import ft2font

    return set(ft2font.FT2Font(font(10).path).get_charmap())


@functools.cache
def say_once(message: str) -> None:
    print(message)


def drawable(text: str, substitute: str) -> str:
    """The text, or the substitute if the font of the pictures lacks one of its characters, which is then said once."""
    text = printable(text)
    if font_characters().issuperset(map(ord, text)):
        return text
    say_once("names with characters that DejaVu Sans lacks are drawn as numbers in pictures")
    return substitute


def draw_boxes(image: np.ndarray, boxes, labels: list[str], class_indices) -> Image.Image:
    """Draws labelled boxes (K, 4) xyxy in pixels on an (H, W, 3) uint8 image; lines and text scale with the image."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    thickness = max(2, round(max(picture.size) / 200))
    font_size = max(11, round(max(picture.size) / 32))
    for box, label, index in zip(boxes, labels, class_indices, strict=True):
        x1, y1, x2, y2 = (round(float(value)) for value in box)
        colour = class_colour(int(index))
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=thickness)
        label = drawable(label, f"class {int(index)}")
        _, _, right, bottom = draw.textbbox((0, 0), label, font=font(font_size))
        width, height = right + 2 * thickness, bottom + 2 * thickness
        x = max(0, min(x1, picture.width - width))
        y = y1 - height if y1 >= height else y1  # above the box, or inside it at the top of the image
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        luminance = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
        fill = "white" if luminance < 130 else "black"
        draw.text((x + thickness, y + thickness / 2), label, fill, font(font_size))
    return picture


def draw_samples(images: list[np.ndarray], classes: list[str], detections, ground_truths, file: str) -> None:
    """Draws the first images of a data set (H, W, 3) as a sheet: the six most confident detections of each, (D, 7),
    without those below a quarter of the best, and all ground truths (G, 7) as thin white boxes on top; tables as in
    average_precision."""
    width, height, columns = 400, 300, 4  # pixels of a picture
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for index, image in enumerate(images):
        scale = min(width / image.shape[1], height / image.shape[0])
        small_size = [max(1, round(scale * side)) for side in image.shape[1::-1]]
        small = Image.fromarray(image).resize(small_size)
        found = detections[detections[:, 0] == index]
        found = found[np.argsort(-found[:, 2])[:6]]
        found = found[found[:, 2] >= found[:, 2].max(initial=0) / 4]
        labels = [f"{classes[int(label)]} {confidence:.2f}" for label, confidence in found[:, 1:3]]
        picture = draw_boxes(np.asarray(small), (found[:, 3:] - 1) * scale, labels, found[:, 1])
        for box in (ground_truths[ground_truths[:, 0] == index, 3:] - 1) * scale:
            ImageDraw.Draw(picture).rectangle(box.tolist(), outline="white")
        sheet.paste(picture, (index % columns * width, index // columns * height))
    write_picture(file, sheet.save, format="JPEG", quality=90)


# ---------------------------------------------------------------- python utils.py: worked examples


def print_examples() -> None:
    """Prints NMS of three boxes and the average precision of five detections, by hand and by the functions above."""
    boxes = [(0.1, 0.1, 0.5, 0.5), (0.2, 0.1, 0.5, 0.5), (0.4, 0.4, 0.9, 0.9)]  # b is inside a
    kept = batched_nms(torch.tensor(boxes), torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3), 0.45)
    print("NMS at IoU .45 of three boxes x1, y1, x2, y2 of one class, the most confident one first")
    print(f"  a {boxes[0]}: kept, because there is none before it")
    print(f"  b {boxes[1]}: IoU with a = .3 * .4 / (.16 + .12 - .12) = .75 > .45: dropped")
    print(f"  c {boxes[2]}: IoU with a = .1 * .1 / (.16 + .25 - .01) = .025; b does not count: kept")
    print(f"  batched_nms keeps {', '.join('abc'[index] for index in kept)}\n")

    print("average precision of five detections, the most confident one first; the image has four objects of the class")
    verdicts = ("object 0, free", "nothing there", "object 1, free", "object 0, taken", "object 2, free")
    hits = np.cumsum(["free" in verdict for verdict in verdicts])
    for rank, (verdict, hit) in enumerate(zip(verdicts, hits, strict=True), start=1):
        print(f"  {verdict:15s}  precision {hit}/{rank} = {hit / rank:.3f}, recall {hit}/4 = {hit / 4}")
    truths = [[0, 0, 0, x, 1, x + 9, 10] for x in (1, 21, 41, 61)]  # tables as in average_precision
    detections = [[0, 0, 0.9 - x / 1000, x, 1, x + 9, 10] for x in (1, 21, 41)]
    detections += [[0, 0, 0.89, 91, 1, 100, 10], [0, 0, 0.87, 1, 1, 10, 10]]
    print("  largest precision at each recall or above: 1 up to .25, .667 up to .5, .6 up to .75, then 0")
    all_points, voc2007 = 0.25 * 1 + 0.25 * 2 / 3 + 0.25 * 0.6, (3 * 1 + 3 * 2 / 3 + 2 * 0.6 + 3 * 0) / 11
    both = [average_precision(detections, truths, 1, metric=metric).item() for metric in ("all_points", "voc2007")]
    print(f"  all points: .25 * 1 + .25 * .667 + .25 * .6 = {all_points:.4f}; average_precision: {both[0]:.4f}")
    print(f"  11 points:  (3 * 1 + 3 * .667 + 2 * .6 + 3 * 0) / 11 = {voc2007:.4f}; average_precision: {both[1]:.4f}")


if __name__ == "__main__":
    print_examples()
