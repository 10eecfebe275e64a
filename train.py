"""Trains YOLOv2 for detection (YOLO9000 sec. 3, "Training for detection").

    python train.py                                          the sample of 16 images, a few minutes on a CPU
    python train.py DATA_DIR=/data/VOCdevkit "IMAGE_SETS=[('2007','trainval'),('2012','trainval')]"
        AUGMENT=True REPEAT=1 ...

The README has complete recipes. Writes, named after CHECKPOINT: `runs/yolov2.pt` after each epoch,
`runs/yolov2_best.pt` (best mAP), `runs/yolov2_metrics.csv` (one row per epoch), `runs/yolov2_charts.png` (its columns
as curves) and, at each evaluation, `runs/yolov2_samples.jpg` (detections on the first images). Ctrl-C, SIGTERM and
MAX_HOURS save after the current step and stop; RESUME=True continues as if the run had never been stopped.
"""

import functools
import sys
import time

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader
from tqdm import tqdm

import model as yolov2_model
import utils
from dataset import (
    VOC_CLASSES,
    VOCDataset,
    check_training_sets,
    drop_broken_images,
    files_of_step,
    read_image,
    steps_per_epoch,
    training_batches,
)
from loss import YoloLoss

# data
DATA_DIR = "data_samples/voc"  # holds VOC2007/ or VOCdevkit/VOC2007/, or .csv, .txt or .json lists
IMAGE_SETS = [("2007", "tiny")]  # VOC 07+12: [("2007", "trainval"), ("2012", "trainval")]; ["a.csv"]; COCO ["a.json"]
VAL_IMAGE_SETS = []  # none: the sample is too small to be split; VOC: [("2007", "test")]
CLASSES = VOC_CLASSES  # any names, or a Darknet .names file; saved in the checkpoint
TOLERATE = []  # "other classes": skip objects that CLASSES does not name; "missing labels": unlabelled is background
AUGMENT = False  # crop, flip and colour jitter; True for anything larger than the sample
REPEAT = 5  # repeats of each image per epoch; 1 for a real data set
NUM_WORKERS = 2  # processes that load images
BROKEN_IMAGES = "stop"  # or "skip": use the next image instead of an unreadable one, and list it in a file
# model
IMAGE_SIZE = 160  # pixels, a multiple of 32; 416 in yolov2-voc.cfg
MULTI_SCALE = []  # image sizes, a new one every 10 steps; paper: multiples of 32, 320 to 608; [] for IMAGE_SIZE only
ANCHORS = yolov2_model.ANCHORS  # width, height in cells of 32 pixels, for 416 px; python dataset.py computes others
PRETRAINED = ""  # a checkpoint of darknet_train*.py or train.py, or Darknet file (.conv.23, .weights); "" from scratch
# loss
EQUATION = "darknet"  # yolov2-voc.cfg; or "yolov1", the YOLOv1 paper's (its lambdas: 5, 1, .5, 1), worse here
LAMBDA_COORD = 1.0  # yolov2-voc.cfg: coord_scale
LAMBDA_OBJECT = 5.0  # object_scale
LAMBDA_NO_OBJECT = 1.0  # noobject_scale
LAMBDA_CLASS = 1.0  # class_scale
IGNORE_THRESHOLD = 0.6  # IoU; thresh in yolov2-voc.cfg
# optimiser
OPTIMIZER = "adam"  # "sgd" in the paper
BATCH_SIZE = 8  # images per optimiser step; 64 in yolov2-voc.cfg
SUBDIVISIONS = 1  # gradient-accumulation steps per batch; 8 in yolov2-voc.cfg
LEARNING_RATE = 5e-4  # SGD in the paper: 1e-3
MOMENTUM = 0.9  # SGD only; YOLO9000 sec. 3
WEIGHT_DECAY = 5e-4  # on kernels only; YOLO9000 sec. 3
CLIP_NORM = 10.0  # largest norm of the gradient (ours); 0 for none, as in Darknet
# schedule
EPOCHS = 12  # 160 in the paper
LR_SCHEDULE = "cosine"  # "constant", "steps", "polynomial" or "cosine"
LR_DROPS = [60, 90]  # for "steps": divide the rate by 10 in the last step of these epochs; YOLO9000 sec. 3
LR_POWER = 4.0  # of "polynomial"
BURN_IN = 10  # optimiser steps with a rising rate; 1000 in yolov2-voc.cfg
# run
EVAL_EVERY = 4  # epochs between two evaluations
EVAL_THRESHOLD = 0.4  # lowest confidence of the detections in an evaluation; test.py's .005 gives a higher mAP
EVAL_TRAIN_IMAGES = 100  # number of training images, the first of the list, for train_map
CHECKPOINT = "runs/yolov2.pt"
RESUME = False  # continue from CHECKPOINT
SAVE_EVERY_MINUTES = 30.0  # minutes between saves within an epoch; 0 saves after every step
MAX_HOURS = 0.0  # save and stop after this time, for queues with a time limit; 0 for no limit
SEED = 0
DEVICE = "auto"  # or "cuda", "cuda:1", "cpu"
PRECISION = "auto"  # "fp32", "bf16" or "fp16"; "auto": half precision if the device computes it faster
COMPILE = False  # torch.compile: faster on a GPU, after minutes of start-up


def check_settings():
    """Raises ValueError or OSError for an invalid setting."""
    utils.check_at_least(
        1, EPOCHS=EPOCHS, BATCH_SIZE=BATCH_SIZE, SUBDIVISIONS=SUBDIVISIONS, REPEAT=REPEAT, EVAL_EVERY=EVAL_EVERY
    )
    utils.check_at_least(1, EVAL_TRAIN_IMAGES=EVAL_TRAIN_IMAGES)
    utils.check_at_least(0, WEIGHT_DECAY=WEIGHT_DECAY, BURN_IN=BURN_IN, CLIP_NORM=CLIP_NORM, SEED=SEED)
    utils.check_at_least(0, LAMBDA_COORD=LAMBDA_COORD, LAMBDA_OBJECT=LAMBDA_OBJECT, LAMBDA_NO_OBJECT=LAMBDA_NO_OBJECT)
    utils.check_at_least(
        0, LAMBDA_CLASS=LAMBDA_CLASS, NUM_WORKERS=NUM_WORKERS, LEARNING_RATE=LEARNING_RATE, LR_POWER=LR_POWER
    )
    utils.check_at_least(0, SAVE_EVERY_MINUTES=SAVE_EVERY_MINUTES, MAX_HOURS=MAX_HOURS)
    utils.check_at_most(1, MOMENTUM=MOMENTUM, IGNORE_THRESHOLD=IGNORE_THRESHOLD, EVAL_THRESHOLD=EVAL_THRESHOLD)
    utils.check_numbers(MULTI_SCALE=MULTI_SCALE)
    utils.check_one_of(("stop", "skip"), BROKEN_IMAGES=BROKEN_IMAGES)
    utils.check_one_of(("adam", "sgd"), OPTIMIZER=OPTIMIZER)
    utils.check_schedule(LR_SCHEDULE, LR_DROPS, EPOCHS)
    if any(size < 32 or size % 32 for size in MULTI_SCALE):
        raise ValueError(f"MULTI_SCALE must hold multiples of 32 pixels, not {MULTI_SCALE}")
    if BATCH_SIZE % SUBDIVISIONS:
        raise ValueError(f"BATCH_SIZE {BATCH_SIZE} must be a multiple of SUBDIVISIONS {SUBDIVISIONS}")
    utils.check_writable(CHECKPOINT)


# may not change on RESUME
FIXED = ("CLASSES", "ANCHORS", "IMAGE_SIZE", "MULTI_SCALE", "AUGMENT", "REPEAT", "EQUATION", "OPTIMIZER", "BATCH_SIZE")
FIXED += ("SUBDIVISIONS", "MOMENTUM", "WEIGHT_DECAY", "SEED", "training images")
LOSS_TERMS = ("coord", "object", "no_object", "class", "prior", "total")


def read_data_sets(anchors, broken_list):
    """-> the training set, and the sets to evaluate: train_map (the first training images, not
    augmented) and val_map."""
    common = {"anchors": anchors, "image_size": IMAGE_SIZE, "classes": CLASSES, "tolerate": TOLERATE}
    train_set = VOCDataset(DATA_DIR, IMAGE_SETS, augment=AUGMENT, **common)
    eval_sets = {"train_map": VOCDataset(DATA_DIR, IMAGE_SETS, limit=EVAL_TRAIN_IMAGES, **common)}
    if VAL_IMAGE_SETS:
        eval_sets["val_map"] = VOCDataset(DATA_DIR, VAL_IMAGE_SETS, **common)
    check_training_sets(train_set, eval_sets)
    if min(BATCH_SIZE // SUBDIVISIONS, len(train_set) * REPEAT) == 1 and min(MULTI_SCALE or [IMAGE_SIZE]) == 32:
        raise ValueError("batch norm needs two values per channel: set IMAGE_SIZE=64, or two images or more per batch")
    train_set.broken_list = broken_list
    for eval_set in eval_sets.values() if broken_list else ():
        drop_broken_images(eval_set, broken_list)
    return train_set, eval_sets


def evaluate(model, eval_set, device, dtype, stop):
    """mAP at IoU .5 (all points) of detections with confidence >= EVAL_THRESHOLD; incomplete if a stop was requested
    meanwhile. Draws the first eight images; val_map is computed last, so its picture is the one that stays."""
    settings = (BATCH_SIZE // SUBDIVISIONS, NUM_WORKERS, EVAL_THRESHOLD)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        # found (D, 7), truths (G, 7), as in utils.average_precision
        found, truths, _ = utils.detect_dataset(
            model.eval(), eval_set, *settings, should_stop=lambda: utils.should_stop(stop)
        )
    mean = utils.mean_average_precision(utils.average_precision(found, truths, len(eval_set.classes)))
    if not stop.reason:
        images = [read_image(file) for file, _ in eval_set.samples[:8]]
        utils.draw_samples(images, eval_set.classes, found, truths, f"{CHECKPOINT.removesuffix('.pt')}_samples.jpg")
    if mean == 0 and not stop.reason:  # distinguishes no detections from wrong ones
        tqdm.write(f"mAP is 0: {len(found)} detections at {EVAL_THRESHOLD} for {len(truths)} ground truths")
    return mean


def main():
    check_settings()
    utils.keep_freed_memory()
    utils.set_seed(SEED)
    device = utils.pick_device(DEVICE)
    dtype = utils.pick_precision(PRECISION, device, CHECKPOINT if RESUME else "")
    stop = utils.catch_stop_signals(MAX_HOURS)
    stem = CHECKPOINT.removesuffix(".pt")
    anchors = yolov2_model.read_anchors(ANCHORS, [IMAGE_SIZE, *MULTI_SCALE])

    # data
    broken_list = f"{stem}_broken.txt" if BROKEN_IMAGES == "skip" else ""
    train_set, eval_sets = read_data_sets(anchors, broken_list)
    classes = train_set.classes
    steps = steps_per_epoch(len(train_set) * REPEAT, BATCH_SIZE, SUBDIVISIONS)
    utils.print_long_burn_in(BURN_IN, EPOCHS * steps)
    sampling = (len(train_set), BATCH_SIZE, SUBDIVISIONS, MULTI_SCALE or [IMAGE_SIZE], SEED)
    batches_from = functools.partial(training_batches, *sampling, repeat=REPEAT)  # batches_from(first_step)

    # model, loss, optimiser
    model = yolov2_model.YOLOv2(len(classes), len(anchors)).to(device, memory_format=torch.channels_last)
    if PRETRAINED and not RESUME:
        yolov2_model.load_pretrained_backbone(model, PRETRAINED, classes)
    network = torch.compile(model) if COMPILE else model
    lambdas = (LAMBDA_COORD, LAMBDA_OBJECT, LAMBDA_NO_OBJECT, LAMBDA_CLASS)
    loss_function = YoloLoss(anchors, *lambdas, IGNORE_THRESHOLD, EQUATION).to(device)
    groups = utils.parameter_groups(model, WEIGHT_DECAY)
    fused = dtype != torch.float16  # in fp16, GradScaler would leave the inf check to a fused optimiser
    if OPTIMIZER == "sgd":
        optimizer = torch.optim.SGD(groups, LEARNING_RATE, momentum=MOMENTUM, fused=fused)
    else:
        optimizer = torch.optim.AdamW(groups, LEARNING_RATE, fused=fused)  # decoupled weight decay
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # the run's position, and the epoch's sums of the loss terms
    state = {"epoch": 0, "step": 0, "images_seen": 0, "best": -1.0}
    state["sums"] = torch.zeros(len(LOSS_TERMS), dtype=torch.float64, device=device)
    settings = utils.script_settings(globals()) | {"PRECISION": str(dtype), "CLASSES": classes, "ANCHORS": anchors}
    settings["training images"] = utils.fingerprint(train_set.samples)
    if RESUME:
        state = utils.resume(CHECKPOINT, model, optimizer, scaler, settings, FIXED)
    else:
        utils.keep_earlier_run(CHECKPOINT, PRETRAINED)
    metadata = {"classes": classes, "anchors": anchors, "image_size": IMAGE_SIZE, "settings": settings}

    def save():
        optimizing = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        utils.save_checkpoint(CHECKPOINT, model=model.state_dict(), **optimizing, **state, **metadata)

    print(
        f"{len(train_set)} training images, {EPOCHS} epochs of {steps} steps, "
        f"{MULTI_SCALE or IMAGE_SIZE} px, {device}, {dtype}"
    )
    loading = {"num_workers": NUM_WORKERS, "pin_memory": device.type == "cuda", "worker_init_fn": utils.ignore_signals}
    data = iter(DataLoader(train_set, batch_sampler=batches_from(state["step"]), **loading))
    bar = tqdm(total=EPOCHS * steps, initial=state["step"], unit="step", disable=None)
    stopping, saved, began, first_step = False, time.monotonic(), time.monotonic(), state["step"]
    while state["epoch"] < EPOCHS:
        end, images_before, start = (state["epoch"] + 1) * steps, state["images_seen"], time.monotonic()
        model.train()
        while state["step"] < end:
            drops = [drop * steps for drop in LR_DROPS]
            rate = utils.learning_rate_at(
                state["step"], EPOCHS * steps, LEARNING_RATE, LR_SCHEDULE, BURN_IN, LR_POWER, drops
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            utils.warm_batch_norm(network, state["step"] * SUBDIVISIONS)  # a larger momentum at first, then .01

            step_sums = torch.zeros_like(state["sums"])
            for part in range(SUBDIVISIONS):  # gradient accumulation
                images, targets = next(data)
                images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
                targets = targets.to(device, non_blocking=True)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    predictions = network(images)
                terms = loss_function(predictions, targets, state["images_seen"])
                scaler.scale(terms["total"] / SUBDIVISIONS).backward()
                step_sums += torch.stack([terms[name].detach() for name in LOSS_TERMS])
                state["images_seen"] += len(images)

            scaler.unscale_(optimizer)
            # the norm is for clipping and for finding NaN and inf; in fp16 the scaler finds them
            needed = CLIP_NORM > 0 or not scaler.is_enabled()
            norm = get_total_norm([parameter.grad for parameter in model.parameters()] if needed else [])
            if CLIP_NORM > 0:
                clip_grads_with_norm_(model.parameters(), CLIP_NORM, norm)
            if problem := utils.problem_of_step(LOSS_TERMS, step_sums, norm, scaler):
                files = files_of_step(train_set.samples, batches_from(state["step"]), SUBDIVISIONS)
                raise ValueError(utils.divergence_message(problem, state, files, CHECKPOINT))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state["sums"] += step_sums
            state["step"] += 1
            utils.advance(bar, state["images_seen"] - images_before, start, step_sums[-1] / SUBDIVISIONS)

            if stopping := utils.should_stop(stop):
                break
            if time.monotonic() - saved >= 60 * SAVE_EVERY_MINUTES:
                save()
                saved = time.monotonic()

        images, seconds = state["images_seen"] - images_before, time.monotonic() - start
        row = {"epoch": state["epoch"] + 1, "learning_rate": optimizer.param_groups[0]["lr"]}
        row |= dict(zip(LOSS_TERMS, (state["sums"] / (steps * SUBDIVISIONS)).tolist(), strict=True))
        row |= {"images_per_second": images / seconds if images else "", "train_map": "", "val_map": ""}
        if not stopping and (row["epoch"] % EVAL_EVERY == 0 or row["epoch"] == EPOCHS):
            save()  # so that a failing evaluation loses no training
            for name, eval_set in eval_sets.items():
                row[name] = evaluate(model, eval_set, device, dtype, stop)
            stopping = utils.should_stop(stop)
        if stopping:
            save()
            utils.report_stop(bar, stop, state, CHECKPOINT)
            return

        state["epoch"] += 1
        state["sums"].zero_()
        score = row["val_map"] if VAL_IMAGE_SETS else row["train_map"]
        if score != "" and not score < state["best"]:  # if it is NaN (no objects), the last network is the best
            state["best"] = score
            utils.save_checkpoint(f"{stem}_best.pt", model=model.state_dict(), **state, **metadata)
        bar.clear()
        utils.log_epoch(stem, row, utils.time_left(began, state["step"] - first_step, EPOCHS * steps - state["step"]))
        save()  # last: after a crash above, RESUME repeats the end of the epoch and writes its row and best network
    utils.finish(bar, broken_list)


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
