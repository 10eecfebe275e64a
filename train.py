"""Trains YOLOv2 for detection (YOLO9000 sec. 3, "Training for detection").

    python train.py                                          the sample of 16 images, a few minutes on a CPU
    python train.py DATA_DIR=/data/VOCdevkit "IMAGE_SETS=[('2007','trainval'),('2012','trainval')]" AUGMENT=True ...

The README has complete recipes. Writes, named after CHECKPOINT: `runs/yolov2.pt` after each epoch,
`runs/yolov2_best.pt` (best mAP), `runs/yolov2_metrics.csv` (one row per epoch), `runs/yolov2_charts.png` (its columns
as curves) and, at each evaluation, `runs/yolov2_samples.jpg` (detections on the first images, ground truth in white).
Ctrl-C, SIGTERM and MAX_HOURS save after the current step and stop; RESUME=True continues as if the run had never been
stopped.
"""

import functools
import sys
import time

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader
from tqdm import tqdm

import dataset
import model as yolov2_model
import utils
from loss import YoloLoss

# data
DATA_DIR = "data_samples/voc"  # holds VOC2007/ or VOCdevkit/VOC2007/, lists, or folders of images
IMAGE_SETS = [("2007", "tiny")]  # VOC 07+12: [("2007", "trainval"), ("2012", "trainval")]; "train/images"
VAL_IMAGE_SETS = []  # none: the sample is too small to be split; VOC: [("2007", "test")]
CLASSES = yolov2_model.VOC_CLASSES  # any names, "voc", "coco", or a .names or data.yaml file; saved in the checkpoint
TOLERATE = []  # "other classes": skip objects that CLASSES does not name; "missing labels": unlabelled is background
AUGMENT = False  # crop, flip and colour jitter; True for anything larger than the sample
REPEAT = 5  # repeats of each image per epoch; 1 for a real data set
NUM_WORKERS = 2  # processes that load images
BROKEN_IMAGES = "stop"  # or "skip": use the next image instead of an unreadable one, and list it in a file
# model
IMAGE_SIZE = 160  # pixels, a multiple of 32; 416 in yolov2-voc.cfg
MULTI_SCALE = []  # image sizes, a new one every 10 steps; paper: multiples of 32, 320 to 608; [] for IMAGE_SIZE only
ANCHORS = yolov2_model.ANCHORS  # width, height in cells of 32 pixels (dataset.py prints others); "voc", "coco", a cfg
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
LR_DROPS = [60, 90]  # for "steps": epochs after which the rate falls tenfold; YOLO9000 sec. 3
LR_POWER = 4.0  # of "polynomial"
BURN_IN = 10  # optimiser steps with a rising rate; 1000 in yolov2-voc.cfg
# run
EVAL_EVERY = 4  # epochs between two evaluations
EVAL_THRESHOLD = 0.005  # lowest confidence of the detections in an evaluation, as in test.py; .4 gives a lower mAP
EVAL_TRAIN_IMAGES = 100  # number of training images, the first of the list, for train_map
CHECKPOINT = "runs/yolov2.pt"
RESUME = False  # continue from CHECKPOINT
SAVE_EVERY_MINUTES = 30.0  # minutes between saves within an epoch; 0 saves after every step
MAX_HOURS = 0.0  # save and stop after this time, for queues with a time limit; 0 for no limit
SEED = 0
DEVICE = "auto"  # or "cuda", "cuda:1", "cpu", "mps"
PRECISION = "auto"  # "fp32", "bf16" or "fp16"; "auto": half precision if the device computes it faster
COMPILE = False  # torch.compile: faster on a GPU, after minutes of start-up


def check_settings():
    """Raises ValueError or OSError for an invalid setting."""
    utils.check_settings(globals())
    utils.check_writable(CHECKPOINT)


# may not change on RESUME
FIXED = ("CLASSES", "ANCHORS", "IMAGE_SIZE", "MULTI_SCALE", "AUGMENT", "REPEAT", "EQUATION", "OPTIMIZER", "BATCH_SIZE")
FIXED += ("SUBDIVISIONS", "MOMENTUM", "WEIGHT_DECAY", "SEED", "training images")
LOSS_TERMS = ("coord", "object", "no_object", "class", "prior", "total")


def read_data_sets(anchors, broken_list):
    """-> the training set, and the sets to evaluate: train_map (first training images, not augmented) and val_map."""
    common = {"anchors": anchors, "image_size": IMAGE_SIZE, "classes": CLASSES, "tolerate": TOLERATE}
    train_set = dataset.VOCDataset(DATA_DIR, IMAGE_SETS, augment=AUGMENT, **common)
    eval_sets = {"train_map": train_set.changed(augment=False, samples=train_set.samples[:EVAL_TRAIN_IMAGES])}
    if VAL_IMAGE_SETS:
        eval_sets["val_map"] = dataset.VOCDataset(DATA_DIR, VAL_IMAGE_SETS, **common)
    dataset.check_training_sets(train_set, eval_sets)
    if len(train_set) > 100 and (not AUGMENT or REPEAT > 1):
        print(f"AUGMENT=True REPEAT=1 suit {len(train_set)} images; the defaults are for the sample of 16")
    if min(BATCH_SIZE // SUBDIVISIONS, len(train_set) * REPEAT) == 1 and min(MULTI_SCALE or [IMAGE_SIZE]) == 32:
        raise ValueError("batch norm needs two values per channel: set IMAGE_SIZE=64, or two images or more per batch")
    if broken_list:
        train_set.broken_list = broken_list
        for eval_set in eval_sets.values():
            dataset.drop_broken_images(eval_set, broken_list)
    return train_set, eval_sets


def make_optimizer(model, dtype):
    """SGD with momentum as in the paper, or AdamW, whose weight decay is decoupled from the gradient."""
    groups = utils.parameter_groups(model, WEIGHT_DECAY)
    # fused: one kernel for all parameters; not in fp16, where GradScaler would leave its inf check to the optimiser
    fused = None if dtype == torch.float16 else True
    if OPTIMIZER == "sgd":
        return torch.optim.SGD(groups, LEARNING_RATE, momentum=MOMENTUM, fused=fused)
    return torch.optim.AdamW(groups, LEARNING_RATE, fused=fused)


def evaluate(model, eval_set, device, dtype, stop):
    """mAP at IoU .5 (all points) of detections with confidence >= EVAL_THRESHOLD; incomplete if a stop was requested
    meanwhile. Draws the first eight images; val_map is computed last, so its picture is the one that stays."""
    settings = (BATCH_SIZE, NUM_WORKERS, EVAL_THRESHOLD)
    asked = functools.partial(utils.should_stop, stop)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        # found (D, 7), truths (G, 7), as in utils.average_precision
        found, truths, _ = utils.detect_dataset(model.eval(), eval_set, *settings, should_stop=asked)
    mean = utils.mean_average_precision(utils.average_precision(found, truths, len(eval_set.classes)))
    if not stop.reason:
        images = [dataset.read_image(sample.image_file) for sample in eval_set.samples[:8]]
        utils.draw_samples(images, eval_set.classes, found, truths, f"{CHECKPOINT.removesuffix('.pt')}_samples.jpg")
        if mean == 0:  # distinguishes no detections from wrong ones
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

    # data
    anchors = yolov2_model.read_anchors(ANCHORS, largest_size=max([IMAGE_SIZE, *MULTI_SCALE]))
    broken_list = f"{stem}_broken.txt" if BROKEN_IMAGES == "skip" else ""
    train_set, eval_sets = read_data_sets(anchors, broken_list)
    classes = train_set.classes
    steps = dataset.steps_per_epoch(len(train_set) * REPEAT, BATCH_SIZE, SUBDIVISIONS)
    total_steps = EPOCHS * steps
    utils.print_long_burn_in(BURN_IN, total_steps)
    sampling = (len(train_set), BATCH_SIZE, SUBDIVISIONS, MULTI_SCALE or [IMAGE_SIZE], SEED)
    batches_from = functools.partial(dataset.training_batches, *sampling, repeat=REPEAT)  # batches_from(first_step)

    # model, loss, optimiser
    model = yolov2_model.YOLOv2(len(classes), len(anchors)).to(device, memory_format=torch.channels_last)
    if PRETRAINED and not RESUME:
        yolov2_model.load_pretrained_backbone(model, PRETRAINED, classes)
    network = torch.compile(model) if COMPILE else model
    lambdas = (LAMBDA_COORD, LAMBDA_OBJECT, LAMBDA_NO_OBJECT, LAMBDA_CLASS)
    loss_function = YoloLoss(anchors, *lambdas, IGNORE_THRESHOLD, EQUATION).to(device)
    optimizer = make_optimizer(model, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # the run's position, one row of metrics per finished epoch, and this epoch's sums of the loss terms
    state = {"epoch": 0, "step": 0, "images_seen": 0, "best": -1.0, "metrics": []}
    state["sums"] = torch.zeros(len(LOSS_TERMS), dtype=torch.float64)
    settings = utils.script_settings(globals()) | {"PRECISION": str(dtype), "CLASSES": classes, "ANCHORS": anchors}
    settings["training images"] = utils.fingerprint(train_set.samples)
    metadata = {"classes": classes, "anchors": anchors, "image_size": IMAGE_SIZE, "settings": settings}
    utils.lock_run(CHECKPOINT)
    if RESUME:
        state = utils.resume(CHECKPOINT, model, optimizer, scaler, settings, FIXED)
        utils.write_metrics(stem, state["metrics"])  # the last run may have died before it wrote them
    else:
        utils.keep_earlier_run(CHECKPOINT, PRETRAINED)

    def save():
        optimizing = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        utils.save_checkpoint(CHECKPOINT, model=model.state_dict(), **optimizing, **state, **metadata)

    device_text = utils.device_text(device)
    print(f"{len(train_set)} images, {EPOCHS} x {steps} steps, {MULTI_SCALE or IMAGE_SIZE} px, {device_text}, {dtype}")
    loading = utils.loader_options(NUM_WORKERS, device) | {"collate_fn": dataset.collate}
    data = iter(DataLoader(train_set, batch_sampler=batches_from(state["step"]), **loading))
    bar = tqdm(total=total_steps, initial=state["step"], unit="step", disable=None)
    schedule = (total_steps, LEARNING_RATE, LR_SCHEDULE, BURN_IN, LR_POWER, [drop * steps for drop in LR_DROPS])
    first_step = state["step"]
    run_start = time.monotonic()
    last_save = time.monotonic()
    while state["epoch"] < EPOCHS:
        images_before = state["images_seen"]
        epoch_start = time.monotonic()
        model.train()
        while state["step"] < (state["epoch"] + 1) * steps and not stop.reason:
            rate = utils.learning_rate_at(state["step"], *schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            utils.warm_batch_norm(network, state["step"] * SUBDIVISIONS)  # a larger momentum at first, then .01

            step_sums = torch.zeros(len(LOSS_TERMS), device=device)
            for part in range(SUBDIVISIONS):  # gradient accumulation
                images, targets = next(data)  # uint8; the network divides by 255 (as_input)
                images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
                targets = targets.to(device, non_blocking=True)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    predictions = network(images)
                terms = loss_function(predictions, targets, state["images_seen"])
                scaler.scale(terms["total"] / SUBDIVISIONS).backward()
                step_sums += torch.stack([terms[name].detach() for name in LOSS_TERMS])
                state["images_seen"] += len(images)

            scaler.unscale_(optimizer)
            norm = get_total_norm([parameter.grad for parameter in model.parameters()])
            if CLIP_NORM > 0:
                clip_grads_with_norm_(model.parameters(), CLIP_NORM, norm)
            values = torch.cat([step_sums, norm[None]]).cpu().double()  # one transfer for all of them
            if problem := utils.problem_of_step(LOSS_TERMS, values, scaler):
                files = dataset.files_of_step(train_set.samples, batches_from(state["step"]), SUBDIVISIONS)
                raise ValueError(utils.divergence_message(problem, state, files, CHECKPOINT))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state["sums"] += values[:-1]
            state["step"] += 1
            utils.advance(bar, state["images_seen"] - images_before, epoch_start, values[-2] / SUBDIVISIONS)
            if time.monotonic() - last_save >= 60 * SAVE_EVERY_MINUTES:
                save()
                last_save = time.monotonic()
            utils.should_stop(stop)  # sets stop.reason at the time limit

        images = state["images_seen"] - images_before  # none if this process resumed at the end of an epoch
        row = {"epoch": state["epoch"] + 1, "learning_rate": optimizer.param_groups[0]["lr"]}
        row |= dict(zip(LOSS_TERMS, (state["sums"] / (steps * SUBDIVISIONS)).tolist(), strict=True))
        row["images_per_second"] = images / (time.monotonic() - epoch_start) if images else None
        row |= {"train_map": None, "val_map": None}  # not evaluated
        if not stop.reason and (row["epoch"] % EVAL_EVERY == 0 or row["epoch"] == EPOCHS):
            save()  # so that a failing evaluation loses no training
            row |= {name: evaluate(model, eval_set, device, dtype, stop) for name, eval_set in eval_sets.items()}
        if utils.should_stop(stop):
            save()
            utils.report_stop(bar, stop, state, CHECKPOINT)
            return

        state["epoch"] += 1
        state["sums"].zero_()
        state["metrics"].append(row)
        score = row["val_map"] if VAL_IMAGE_SETS else row["train_map"]
        if score is not None and not score < state["best"]:  # if it is NaN (no objects), the last network is the best
            state["best"] = score
            utils.save_checkpoint(f"{stem}_best.pt", model=model.state_dict(), **state, **metadata)
        save()  # after the best network: if the run dies in between, RESUME repeats the end of the epoch
        utils.write_metrics(stem, state["metrics"])
        bar.clear()
        utils.print_epoch(row, utils.time_left(run_start, state["step"] - first_step, total_steps - state["step"]))
    utils.finish(bar, broken_list)


if __name__ == "__main__":
    with utils.plain_errors():
        utils.override_globals(globals(), sys.argv[1:])
        main()
