"""Measures the speed and memory of each part and of its common alternatives on this machine.

    python tests/benchmark.py                                 all parts, some ten minutes on two cores
    python tests/benchmark.py "PARTS=['inference']" "BATCHES=[1]"

Prints one table per part: medians, ratios to the first line, and for whole networks spread and peak memory. Each
network runs in its own process, so that memory settings stay separate; their steps are interleaved, so that a slow
minute of the machine affects all of them. Missing alternatives are listed and skipped (`pip install onnxruntime onnx
onnxscript openvino torchmetrics pycocotools`; the repository needs none of them). It is a script, not a test: times
depend on the machine.
"""

import contextlib
import datetime
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn.utils import get_total_norm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules; the folder of this file is there already

import darknet_model
import dataset
import train
import utils
from loss import YoloLoss
from model import ANCHORS, COCO_CLASSES, YOLOv2, darknet_cfg, load_detector

# what to measure
PARTS = ["inference", "training", "loss", "data", "postprocessing", "ap", "memory"]  # not "scale": 5 minutes
IMAGE_SIZE = 416  # pixels
BATCHES = [1, 8]  # images, for inference
TRAINING_BATCHES = [2, 8]  # images
SCALE_FOLDER = "/tmp/scale"  # for "scale": data sets of full size, made once
SCALE_STEPS = 2000  # steps after which the memory of the loader's workers is read
CHECKPOINT = "runs/yolov2.pt"  # a trained detector, whose outputs are post-processed
# how
ROUNDS = 7  # timed steps of each variant
DEVICE = "cpu"  # with "cuda", only the PyTorch variants are comparable

# ---------------------------------------------------------------- variants: each returns a function that runs one step


def eager_inference(weights, batch, size, device):
    """What most re-implementations do: the network as it was trained, float32."""
    model = YOLOv2().to(device).eval()
    darknet_model.load_darknet_weights(model, weights)
    images = some_images(batch, size)

    @torch.inference_mode()
    def step():
        return model(images.to(device)).cpu().numpy()

    return step


def our_inference(weights, batch, size, device, precision, compiled):
    """What test.py, detect.py and detect_txt.py do."""
    utils.keep_freed_memory()
    model, *_ = load_detector(weights, [], [], torch.device(device), precision, compiled)
    images, parameter = some_images(batch, size), next(model.parameters())

    @torch.no_grad()
    def step():
        return model(images.to(parameter.device, parameter.dtype)).float().cpu().numpy()

    return step


def opencv_inference(weights, batch, size, device):
    cv2.setNumThreads(torch.get_num_threads())
    cfg = f"{weights}.{size}.{batch}.{os.getpid()}.cfg"
    Path(cfg).write_text(darknet_cfg(20, ANCHORS, size))
    network = cv2.dnn.readNetFromDarknet(cfg, weights)
    images = some_images(batch, size).numpy()

    def step():
        network.setInput(images)
        return darknet_order(network.forward("conv_30"))  # the last convolution, before the region layer

    return step


def onnxruntime_inference(weights, batch, size, device):
    import onnx  # noqa: F401 - the exporter needs it
    import onnxruntime

    model = YOLOv2().eval()
    darknet_model.load_darknet_weights(model, weights)
    images = some_images(batch, size)
    file = f"{weights}.{size}.{batch}.onnx"
    torch.onnx.export(model, (images,), file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: images.numpy()})[0]


def openvino_inference(weights, batch, size, device, precision):
    import openvino

    model = YOLOv2().eval()
    darknet_model.load_darknet_weights(model, weights)
    images = some_images(batch, size)
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    converted = openvino.convert_model(model, example_input=images, input=[list(images.shape)])
    request = openvino.compile_model(converted, "CPU", options).create_infer_request()
    return lambda: request.infer([images.numpy()])[0].copy()


def eager_training(batch, size, device):
    """A plain training step: float32, default memory format, PyTorch's default SGD."""
    model = YOLOv2().to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, weight_decay=5e-4)
    loss_function = YoloLoss(ANCHORS).to(device)
    images, targets = some_images(batch, size).to(device), some_targets(batch, size).to(device)

    def step():
        optimizer.zero_grad()
        total = loss_function(model(images), targets)["total"]
        total.backward()
        optimizer.step()
        return np.array([total.item()])

    return step


def our_training(batch, size, device, precision):
    """A training step as in train.py's loop."""
    utils.keep_freed_memory()
    device = torch.device(device)
    dtype = utils.pick_precision(precision, device)
    model = YOLOv2().to(device, memory_format=torch.channels_last).train()
    fused = None if dtype == torch.float16 else True  # as in train.make_optimizer
    optimizer = torch.optim.SGD(utils.parameter_groups(model, 5e-4), 1e-4, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    loss_function = YoloLoss(ANCHORS).to(device)
    batch_images, batch_targets = some_images(batch, size), some_targets(batch, size)

    def step():
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        utils.warm_batch_norm(model, 2000)
        images = batch_images.to(device, non_blocking=True, memory_format=torch.channels_last)
        targets = batch_targets.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predictions = model(images)
        terms = loss_function(predictions, targets, 20_000)
        scaler.scale(terms["total"]).backward()
        sums = torch.stack([terms[name].detach() for name in train.LOSS_TERMS])
        scaler.unscale_(optimizer)
        norm = get_total_norm([parameter.grad for parameter in model.parameters()])
        values = torch.cat([sums, norm[None]]).cpu().double()
        if problem := utils.problem_of_step(train.LOSS_TERMS, values, scaler):
            raise ValueError(problem)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return sums.numpy(force=True)

    return step


def some_images(batch, size):
    return torch.from_numpy(np.random.default_rng(0).random((batch, 3, size, size), dtype=np.float32))


def some_targets(batch, size, seed=0):
    """Targets of 3 to 10 objects per image."""
    rng, targets = np.random.default_rng(seed), []
    for _ in range(batch):
        count = rng.integers(3, 11)
        boxes = np.concatenate([rng.uniform(0.1, 0.9, (count, 2)), rng.uniform(0.05, 0.6, (count, 2))], axis=1)
        targets.append(dataset.encode_targets(boxes, rng.integers(20, size=count), ANCHORS, size // 32, size // 32))
    return torch.stack(targets)


def darknet_order(outputs):
    """Darknet's (N, A*(5+C), S_h, S_w) -> ours (N, A, S_h, S_w, 5+C)."""
    n, channels, s_h, s_w = outputs.shape
    return outputs.reshape(n, 5, channels // 5, s_h, s_w).transpose(0, 1, 3, 4, 2)


# ---------------------------------------------------------------- timing


def run_variant(connection, prepare, arguments):
    """The process of one variant: sets it up, times one step per request, and finally sends its last
    output and peak memory."""
    try:
        warnings.simplefilter("ignore")
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            step = prepare(*arguments)
            step()
    except ImportError as error:
        connection.send(f"{error.name} is not installed")
        return
    except Exception as error:
        connection.send(f"failed ({utils.first_line(error)[:90]})")
        return
    connection.send(None)
    output = None
    while connection.recv():
        step()  # untimed: loads the weights into the caches again
        start = time.perf_counter()
        output = step()
        connection.send(time.perf_counter() - start)
    connection.send((output, resident("VmHWM")))


def time_processes(title, variants, rounds, compare=True):
    """variants: name -> (prepare, arguments). Prints the table and returns name -> median milliseconds."""
    context = multiprocessing.get_context("spawn")
    running, left_out = {}, {}
    for name, (prepare, arguments) in variants.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=run_variant, args=(theirs, prepare, arguments), daemon=True)
        process.start()
        theirs.close()
        try:
            problem = ours.recv()
        except EOFError:
            problem = "its process died"
        if problem:
            left_out[name] = problem
        else:
            running[name] = ours
    times = {name: [] for name in running}
    for _ in range(rounds):
        for name, connection in running.items():
            connection.send(True)
            times[name].append(1000 * connection.recv())
    print(f"\n{title}: median of {rounds}, interleaved")
    print(
        f"{'':34s} {'ms':>9s} {'spread':>15s} {'x first':>8s} {'peak MB':>8s}" + (f" {'off by':>8s}" if compare else "")
    )
    medians, reference = {}, None
    for name, connection in running.items():
        connection.send(False)
        output, memory = connection.recv()
        reference = output if reference is None else reference
        medians[name] = statistics.median(times[name])
        spread = f"{min(times[name]):.0f}..{max(times[name]):.0f}"
        speedup = next(iter(medians.values())) / medians[name]
        line = f"{name:34s} {medians[name]:9.1f} {spread:>15s} {speedup:8.2f} {memory:8.0f}"
        if compare:  # distance of the outputs, relative to their size
            line += f" {np.linalg.norm(output - reference) / np.linalg.norm(reference):8.1e}"
        print(line, flush=True)
    for name, problem in left_out.items():
        print(f"{name:34s} left out: {problem}")
    return medians


def time_steps(title, unit, steps, rounds, per_step=1.0, rate=False):
    """steps: name -> function, timed in this process in turns; prints medians of milliseconds, or with
    `rate` units per second."""
    for step in steps.values():
        step()
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    print(f"\n{title}: median of {rounds}, interleaved, {torch.get_num_threads()} threads")
    medians = {name: statistics.median(values) / per_step for name, values in times.items()}
    print(f"{'':44s} {unit:>12s} {'x first':>8s}")
    for name, median in medians.items():
        print(
            f"{name:44s} {1 / median if rate else 1000 * median:12.2f} {next(iter(medians.values())) / median:8.2f}",
            flush=True,
        )
    return medians


def each(function, items):
    """Calls the function on every item and drops the results: keeping all would allocate memory that
    no script's loop does."""
    for item in items:
        function(item)


# ---------------------------------------------------------------- the parts


def inference(weights):
    for batch in BATCHES:
        common = (weights, batch, IMAGE_SIZE, DEVICE)
        variants = {
            "plain PyTorch, eager fp32": (eager_inference, common),
            "OpenCV DNN fp32": (opencv_inference, common),
            "ONNX Runtime fp32": (onnxruntime_inference, common),
            "OpenVINO fp32": (openvino_inference, (*common, "f32")),
            "OpenVINO bf16": (openvino_inference, (*common, "bf16")),
            "ours, PRECISION=fp32": (our_inference, (*common, "fp32", False)),
            "ours (the default)": (our_inference, (*common, "auto", False)),
            "ours, COMPILE=True": (our_inference, (*common, "auto", True)),
        }
        time_processes(f"Inference at {IMAGE_SIZE} px, batch {batch}", variants, ROUNDS)


def training(weights):
    for batch in TRAINING_BATCHES:
        common = (batch, IMAGE_SIZE, DEVICE)
        variants = {
            "plain PyTorch, eager fp32": (eager_training, common),
            "train.py, PRECISION=fp32": (our_training, (*common, "fp32")),
            "train.py (the default)": (our_training, (*common, "auto")),
        }
        time_processes(f"Training step at {IMAGE_SIZE} px, batch {batch}", variants, ROUNDS, compare=False)


def loss(weights):
    predictions = torch.randn(16, 5, 13, 13, 25, generator=torch.Generator().manual_seed(0))
    targets = some_targets(16, 416)

    def forward_and_backward(equation, images_seen):
        loss_function, leaf = YoloLoss(ANCHORS, equation=equation), predictions.clone().requires_grad_()
        return lambda: torch.autograd.grad(loss_function(leaf, targets, images_seen)["total"], leaf)

    steps = {
        "darknet": forward_and_backward("darknet", 20_000),
        "darknet, in the prior phase": forward_and_backward("darknet", 0),
        "yolov1": forward_and_backward("yolov1", 20_000),
    }
    time_steps("Loss, forward and backward at (16, 5, 13, 13, 25), 3 to 10 objects per image", "ms", steps, 20 * ROUNDS)


def data(weights):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder, count = Path(weights).parent / "voc", 20
    photograph_files(folder, count)
    voc = dataset.VOCDataset(folder, [("2007", "train")], ANCHORS, IMAGE_SIZE, augment=True)
    files = [sample[0] for sample in voc.samples]
    chain = dataset.albumentations.Compose(
        [
            dataset.albumentations.Affine(scale=(0.8, 1.2), translate_percent=(-0.2, 0.2), p=1.0),
            dataset.albumentations.HueSaturationValue(p=1.0),
            dataset.albumentations.Resize(IMAGE_SIZE, IMAGE_SIZE),
        ],
        bbox_params=dataset.albumentations.BboxParams(format="albumentations"),
    )
    boxes = np.array([[0.2, 0.2, 0.6, 0.7, 3.0], [0.5, 0.4, 0.9, 0.9, 7.0]])
    steps = {
        "decode alone, Pillow": lambda: each(lambda file: np.asarray(Image.open(file)), files),
        "decode alone, OpenCV": lambda: each(cv2.imread, files),
        "decode + Affine + HSV + Resize, in that order": lambda: each(
            lambda file: chain(image=cv2.cvtColor(cv2.imread(file), cv2.COLOR_BGR2RGB), bboxes=boxes), files
        ),
        "VOCDataset, augmented and encoded": lambda: each(lambda index: voc[(index, IMAGE_SIZE, index)], range(count)),
    }
    size = sum(os.path.getsize(file) for file in files) / count / 1000
    time_steps(
        f"Data, one core, JPEG of 500 x 375 ({size:.0f} kB) to {IMAGE_SIZE} px",
        "images/s",
        steps,
        ROUNDS,
        count,
        rate=True,
    )

    # the classifier's loader as its scripts have it: Darknet's crops from files of ImageNet's usual
    # size, in a separate process
    for name in ("a", "b"):  # a single class is refused; the batches take the files of a alone
        shutil.copytree(folder / "VOC2007" / "JPEGImages", folder / "train" / name)
    pictures = dataset.imagenet_dataset(folder, "train", 224, augment=True)
    loader = torch.utils.data.DataLoader(
        pictures,
        batch_sampler=list(itertools.islice(dataset.training_batches(count, 32, 1, [224], 0, repeat=32), count)),
        num_workers=1,
        persistent_workers=True,
        collate_fn=dataset.collate,
        worker_init_fn=lambda worker: utils.keep_freed_memory(),  # the scripts call it before their workers start
    )
    steps = {
        "decode alone, Pillow": lambda: each(lambda file: np.asarray(Image.open(file)), files * 32),
        "DataLoader of imagenet_dataset, one worker": lambda: each(len, loader),
    }
    title = "ImageNet data, the same files to 224 px in batches of 32, images/s per core and images/s per worker"
    time_steps(title, "images/s", steps, ROUNDS, 32 * count, rate=True)
    torch.set_num_threads(threads)


def photograph_files(folder, count):
    """A VOC folder of `count` JPEGs of 500 x 375 and about 70 kB, cut from the sample's photographs,
    each with two objects."""
    source = Path(__file__).parents[1] / "data_samples" / "voc" / "VOC2007"
    target = folder / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (target / name).mkdir(parents=True, exist_ok=True)
    photographs = sorted((source / "JPEGImages").glob("*.jpg"))[:count]
    for file in photographs:
        image = Image.open(file).convert("RGB").resize((500, 375))
        for quality in range(95, 30, -1):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= 70_000:
                break
        (target / "JPEGImages" / file.name).write_bytes(buffer.getvalue())
        objects = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for name, x1, y1, x2, y2 in (("boat", 100, 80, 300, 260), ("cat", 250, 150, 450, 340))
        )
        (target / "Annotations" / f"{file.stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    (target / "ImageSets" / "Main" / "train.txt").write_text("\n".join(file.stem for file in photographs))


def postprocessing(weights):
    def one_class_at_a_time(outputs):
        """The obvious way: a loop over images and classes."""
        boxes, objectness, probabilities = utils.decode_predictions(outputs, ANCHORS)
        corners = torchvision.ops.box_convert(boxes, "cxcywh", "xyxy")
        for image in range(len(outputs)):
            scores = objectness[image, :, None] * probabilities[image]
            for c in range(scores.shape[1]):
                likely = scores[:, c] > 0.005
                torchvision.ops.nms(corners[image][likely], scores[likely, c], 0.45)

    if os.path.isfile(CHECKPOINT):
        model, classes, anchors, size = load_detector(CHECKPOINT, [], [], torch.device("cpu"), "fp32")
        root = Path(__file__).parents[1] / "data_samples" / "voc"
        photographs = dataset.VOCDataset(root, [("2007", "train")], anchors, size, classes)
        with torch.no_grad():
            outputs = model(torch.stack([photographs[index][0] for index in range(8)]))
        found = sum(map(len, utils.postprocess(outputs, anchors, 0.005, 0.45)))
        steps = {
            "a loop over images and classes": lambda: one_class_at_a_time(outputs),
            "ours": lambda: utils.postprocess(outputs, anchors, 0.005, 0.45),
        }
        title = f"Post-processing of {CHECKPOINT}'s outputs, batch 8 at {size} px, threshold .005, {found} detections"
        time_steps(title, "ms", steps, 5 * ROUNDS)
        _, objectness, probabilities = utils.decode_predictions(outputs, anchors)
        steps = {}
        for threshold in (0.02, 0.005, 0.001, 0.0002):
            candidates = int((objectness[..., None] * probabilities > threshold).sum())
            steps[f"{candidates} candidates"] = lambda t=threshold: utils.postprocess(outputs, anchors, t, 0.45)
        time_steps("Post-processing by confidence threshold", "ms", steps, 5 * ROUNDS)
    else:
        print(f"\nPost-processing of a trained model's outputs left out: no {CHECKPOINT} (python train.py creates it)")

    steps = {}
    for size in (416, 608, 864, 1216):  # each has twice the boxes of the one before
        outputs = torch.randn(1, 5, size // 32, size // 32, 25, generator=torch.Generator().manual_seed(0))
        outputs[..., 4] -= 3
        boxes, objectness, probabilities = utils.decode_predictions(outputs, ANCHORS)
        candidates = int((objectness[..., None] * probabilities > 0.005).sum())
        steps[f"{candidates} candidates"] = lambda outputs=outputs: utils.postprocess(outputs, ANCHORS, 0.005, 0.45)
    time_steps(
        "The worst case: random outputs of one image, with hardly any overlapping boxes", "ms", steps, 3 * ROUNDS
    )


def ap(weights):
    images, objects, classes = 4952, 12_000, 20
    for count, rounds in ((50_000, 5), (500_000, 3)):
        rng = np.random.default_rng(0)
        truths = np.column_stack(
            [rng.integers(images, size=objects), rng.integers(classes, size=objects), np.zeros(objects)]
        )
        corners = rng.uniform(1, 300, (objects, 2))
        truths = np.concatenate([truths, corners, corners + rng.uniform(20, 200, (objects, 2))], axis=1)
        hits = truths[rng.integers(objects, size=count // 5), :]
        found = np.column_stack(
            [hits[:, 0], hits[:, 1], rng.random(len(hits)), hits[:, 3:] + rng.normal(0, 5, (len(hits), 4))]
        )
        corners = rng.uniform(1, 300, (count - len(hits), 2))
        noise = np.column_stack([rng.integers(images, size=len(corners)), rng.integers(classes, size=len(corners))])
        noise = np.concatenate(
            [noise, rng.random((len(corners), 1)), corners, corners + rng.uniform(20, 200, corners.shape)], axis=1
        )
        detections = np.concatenate([found, noise])
        steps = {"ours": lambda d=detections, t=truths: utils.average_precision(d, t, classes)}
        try:
            from torchmetrics.detection import MeanAveragePrecision

            steps["torchmetrics (pycocotools)"] = lambda d=detections, t=truths: torchmetrics_ap(
                MeanAveragePrecision, d, t, images
            )
            steps["torchmetrics (pycocotools)"]()
        except ImportError as error:
            steps.pop("torchmetrics (pycocotools)", None)
            print(f"\ntorchmetrics left out: {utils.first_line(error)}")
        time_steps(
            f"Average precision of {count:,} detections, {images} images, {objects:,} truths", "ms", steps, rounds
        )


def torchmetrics_ap(metric_class, detections, truths, images):
    """torchmetrics' AP at IoU .5 only; it uses COCO's 101 recall points, so the values differ slightly."""

    def split(rows):
        order = np.argsort(rows[:, 0], kind="stable")
        ends = np.searchsorted(rows[order, 0], np.arange(images + 1))
        return [torch.from_numpy(rows[order[ends[i] : ends[i + 1]]]) for i in range(images)]

    metric = metric_class(iou_thresholds=[0.5], max_detection_thresholds=[1, 10, 10_000])
    predicted = [
        {"boxes": rows[:, 3:], "scores": rows[:, 2], "labels": rows[:, 1].long()} for rows in split(detections)
    ]
    expected = [{"boxes": rows[:, 3:], "labels": rows[:, 1].long()} for rows in split(truths)]
    metric.update(predicted, expected)
    return metric.compute()


def memory(weights):
    """Memory of 200 training steps, and of loading a checkpoint; the tables above show the peaks of single steps."""
    context = multiprocessing.get_context("spawn")
    for target, arguments in ((measure_growth, (200, DEVICE)), (measure_loading, (weights,))):
        process = context.Process(target=target, args=arguments)
        process.start()
        process.join()


def resident(name="VmRSS"):
    """Resident memory of this process in MB, now or at its peak ("VmHWM"), from /proc/self/status; getrusage would
    report the peak of the parent process if that is higher. NaN on systems other than Linux."""
    if not os.path.isfile("/proc/self/status"):
        return math.nan
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(name)) / 1024


def measure_growth(steps, device):
    step, held = our_training(2, 128, device, "auto"), {}
    for number in range(1, steps + 1):
        step()
        if number in (20, 100, steps):
            held[number] = resident()
    print(
        "\nMemory of a training run, batch 2 at 128 px: "
        + ", ".join(f"{mb:.0f} MB after {n} steps" for n, mb in held.items())
    )


def measure_loading(weights):
    file = f"{weights}.pt"
    model = YOLOv2()
    utils.save_checkpoint(
        file, model=model.state_dict(), classes=list(dataset.VOC_CLASSES), anchors=ANCHORS, image_size=416
    )
    for name in (file, weights):
        before = resident()
        start = time.perf_counter()
        if name.endswith(".pt"):
            model.load_state_dict(utils.load_checkpoint(name, keys=("model",))["model"])
        else:
            darknet_model.load_darknet_weights(model, name)
        seconds, peak = time.perf_counter() - start, resident("VmHWM")
        print(
            f"Loading {os.path.getsize(name) / 1e6:.0f} MB of {os.path.splitext(name)[1]}: {seconds:.2f} s, "
            f"{before:.0f} MB held before, {peak:.0f} MB at the peak"
        )


# ---------------------------------------------------------------- scale: data sets of full size

# Runs a script until its optimiser has made N steps, and prints the seconds to the first one, those of a save, and the
# memory of this process and of its workers. Arguments: N, script, settings.
RUN_STEPS = """
import os, sys, time
start, (steps, script) = time.time(), sys.argv[1:3]
sys.path[:0] = [os.path.dirname(script), os.path.dirname(script) + "/tests"]
import multiprocessing, runpy, run_narrow, utils
from torch.optim.optimizer import register_optimizer_step_post_hook
if int(steps) > 1:
    run_narrow.narrow()  # many steps are for the loader's memory, a single one for the times of the whole network
state, save = {"steps": 0}, utils.save_checkpoint

def private(pid):
    lines = open(f"/proc/{pid}/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) // 1024

def peak(pid):
    lines = open(f"/proc/{pid}/status").read().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))

def timed_save(*arguments, **values):
    began = time.time()
    save(*arguments, **values)
    state["save"] = time.time() - began

def after_step(optimizer, *_):
    state["steps"] += 1
    state.setdefault("first", time.time() - start)
    if state["steps"] == int(steps):
        workers = [private(child.pid) for child in multiprocessing.active_children()]
        utils.should_stop = lambda stop: stop.__setattr__("reason", "the benchmark") or True
        state["line"] = f"main process {peak(os.getpid())} MB at its peak, workers {workers} MB of their own"

utils.save_checkpoint = timed_save
register_optimizer_step_post_hook(after_step)
sys.argv = [script, *sys.argv[3:]]
utils.draw_charts = lambda rows, file: None
runpy.run_path(script, run_name="__main__")
print(f"RESULT first step after {state['first']:.1f} s, save {state['save']:.1f} s; {state['line']}")
"""


def link(sources, names):
    """Hard links to the sources in turn: a file has at most 65,000 links."""
    for source, name in zip(itertools.cycle(sources), names):  # noqa: B905 - the names end
        os.link(source, name)


def make_trees(root):
    """ImageNet (1.28 million and 50,000 images), VOC 07+12 and COCO's train2017, of the images of data_samples/."""
    sample = Path(__file__).parents[1] / "data_samples"
    shutil.copytree(sample, root / "sample")  # links need one file system
    photos = sorted((root / "sample/imagenet").rglob("*.JPEG"))
    for part, count in (("train", 1281), ("val", 50)):
        names = (root / f"imagenet/{part}/n{c:08d}/n{c:08d}_{i}.JPEG" for c in range(1000) for i in range(count))
        for c in range(1000):
            (root / f"imagenet/{part}/n{c:08d}").mkdir(parents=True)
        link(photos, names)
    voc = root / "sample/voc/VOC2007"
    ids = (voc / "ImageSets/Main/train.txt").read_text().split()
    for year, part, count in (("2007", "trainval", 5011), ("2007", "test", 4952), ("2012", "trainval", 11540)):
        names = [f"{part}_{number:06d}" for number in range(count)]
        for folder, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
            (root / f"voc/VOC{year}/{folder}").mkdir(parents=True, exist_ok=True)
            sources = [voc / folder / f"{image_id}{suffix}" for image_id in ids]
            link(sources, [root / f"voc/VOC{year}/{folder}/{name}{suffix}" for name in names])
        (root / f"voc/VOC{year}/ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / f"voc/VOC{year}/ImageSets/Main/{part}.txt").write_text("\n".join(names))
    sources = [voc / f"JPEGImages/{image_id}.jpg" for image_id in ids]
    sizes = [Image.open(source).size for source in sources]
    (root / "coco/train2017").mkdir(parents=True)
    (root / "coco/annotations").mkdir()
    link(sources, [root / f"coco/train2017/{number:012d}.jpg" for number in range(118_000)])
    images = [
        {"id": n, "file_name": f"{n:012d}.jpg", "width": sizes[n % len(ids)][0], "height": sizes[n % len(ids)][1]}
        for n in range(118_000)
    ]
    rng, rows = np.random.default_rng(0), []
    for n in range(860_000):
        image = images[int(rng.integers(118_000))]
        x, y, w, h = (rng.uniform(0.05, 0.5, 4) * np.tile([image["width"], image["height"]], 2)).round(2).tolist()
        row = {"id": n, "image_id": image["id"], "category_id": int(rng.integers(1, 81)), "bbox": [x, y, w, h]}
        rows.append(row | {"area": w * h, "iscrowd": 0})
    categories = [{"id": n, "name": name} for n, name in enumerate(COCO_CLASSES, start=1)]
    content = {"images": images, "annotations": rows, "categories": categories}
    (root / "coco/annotations/instances_train2017.json").write_text(json.dumps(content))


def scale(weights):
    """Start, memory, save and resume of the scripts on data sets of full size, in SCALE_FOLDER (3 GB, 5 minutes)."""
    root = Path(SCALE_FOLDER)
    if not root.exists():
        start = time.perf_counter()
        make_trees(root)
        print(f"made the trees in {time.perf_counter() - start:.0f} s")
    tiny = ["IMAGE_SIZE=32", "NUM_WORKERS=4", "PRECISION=fp32", "EPOCHS=100", f"CHECKPOINT={root}/run.pt"]
    tiny += ["SAVE_EVERY_MINUTES=1000", "BATCH_SIZE=16"]
    voc = ["DATA_DIR=voc", "IMAGE_SETS=[('2007','trainval'),('2012','trainval')]", "VAL_IMAGE_SETS=[('2007','test')]"]
    coco = ["DATA_DIR=coco", "IMAGE_SETS=annotations/instances_train2017.json", "CLASSES=coco"]
    jobs = [("darknet_train.py", ["DATA_DIR=imagenet"]), ("train.py", voc), ("train.py", coco)]
    for script, data in jobs:
        own = (
            [*data, "AUGMENT=True", "REPEAT=1", "OPTIMIZER=sgd", "LEARNING_RATE=1e-6"] if script == "train.py" else data
        )
        for steps, resume in ((1, "RESUME=False"), (1, "RESUME=True"), (SCALE_STEPS, "RESUME=False")):
            words = [str(steps), str(Path(__file__).parents[1] / script), *own, *tiny, resume]
            done = subprocess.run([sys.executable, "-c", RUN_STEPS, *words], cwd=root, capture_output=True, text=True)
            lines = [
                line for line in done.stdout.splitlines() if line.startswith("RESULT")
            ] or done.stderr.splitlines()[-1:]
            print(f"{script} {data[0]} {resume}, {steps} steps: {lines[0].removeprefix('RESULT ')}", flush=True)


def machine():
    """The machine in a line."""
    name = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    if DEVICE != "cpu":
        name = torch.cuda.get_device_name(DEVICE)
    native = "native" if torch.cpu._is_avx512_bf16_supported() else "not native"
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, "
        f"bfloat16 {native}, PyTorch {torch.__version__}, {datetime.date.today()}"
    )


def main():
    parts = {part.__name__: part for part in (inference, training, loss, data, postprocessing, ap, memory, scale)}
    if unknown := [name for name in PARTS if name not in parts]:
        raise ValueError(f"unknown PARTS: {', '.join(unknown)}; choose from {', '.join(parts)}")
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "random.weights")
        torch.manual_seed(0)
        darknet_model.save_darknet_weights(YOLOv2(), weights)  # the same weights for all
        for name in PARTS:
            parts[name](weights)


if __name__ == "__main__":
    with utils.plain_errors():
        utils.override_globals(globals(), sys.argv[1:])
        main()
