"""Trains YOLOv2 for detection (YOLO9000 sec. 3, "Training for detection").

    python train.py                                          the sample: 16 images, a few minutes on a CPU
    python train.py DATA_DIR=/data/VOCdevkit "IMAGE_SETS=[('2007','trainval'),('2012','trainval')]" AUGMENT=True REPEAT=1 ...

The README has whole recipes. Writes, with the name of CHECKPOINT: `runs/yolov2.pt` after each epoch, `runs/yolov2_best.pt` (best
mAP), `runs/yolov2_metrics.csv` (a row an epoch) and `runs/yolov2_charts.png` (all columns over the epochs). Ctrl-C, SIGTERM and
MAX_HOURS save in the middle of an epoch and stop; RESUME=True goes on from there as if nothing had happened.
"""

import math
import os
import sys
import time
import zlib

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader
from tqdm import tqdm

import darknet_model
import model as yolov2
import utils
from dataset import VOC_CLASSES, VOCDataset, drop_broken_images, epoch_batches
from loss import YoloLoss

# data
DATA_DIR = "data_samples/voc"  # holds VOC2007/ or VOCdevkit/VOC2007/, or .csv lists
IMAGE_SETS = [("2007", "tiny")]  # VOC 07+12: [("2007", "trainval"), ("2012", "trainval")]; or csv lists: ["train.csv"]
VAL_IMAGE_SETS = []  # none: the sample is too small for one; VOC: [("2007", "test")]
CLASSES = VOC_CLASSES  # any names; they travel in the checkpoint
AUGMENT = False  # crop, flip and colour jitter; True for anything larger than the sample
REPEAT = 5  # times an epoch shows each image; 1 for a real data set
NUM_WORKERS = 2  # processes that load images
BROKEN_IMAGES = "stop"  # or "skip": another image takes the place of one that cannot be read, and a file lists it
# model
IMAGE_SIZE = 160  # pixels, a multiple of 32; 416 in yolov2-voc.cfg
MULTI_SCALE = []  # sizes to draw from every 10 batches: list(range(320, 609, 32)) in the paper; [] for IMAGE_SIZE alone
ANCHORS = yolov2.ANCHORS  # width and height in grid cells; python dataset.py computes others
PRETRAINED = ""  # a checkpoint of darknet_train*.py or a Darknet file such as darknet19_448.conv.23; "" from scratch
# loss
# "darknet": yolov2-voc.cfg; "yolov1": the printed equation. 500 photographs: val mAP .085 / .023 (another backbone: .058 / .030)
EQUATION = "darknet"
LAMBDA_COORD = 1.0  # yolov2-voc.cfg: coord_scale
LAMBDA_OBJECT = 5.0  # object_scale
LAMBDA_NO_OBJECT = 1.0  # noobject_scale
LAMBDA_CLASS = 1.0  # class_scale
IGNORE_THRESHOLD = 0.6  # IoU; thresh in yolov2-voc.cfg
# optimiser
OPTIMIZER = "adam"  # "sgd" in the paper
BATCH_SIZE = 8  # images an optimiser step; 64 in yolov2-voc.cfg
SUBDIVISIONS = 1  # parts that a batch is worked through in (gradient accumulation); 8 in yolov2-voc.cfg
LEARNING_RATE = 5e-4  # SGD in the paper: 1e-3
MOMENTUM = 0.9  # SGD only; YOLO9000 sec. 3
WEIGHT_DECAY = 5e-4  # on kernels only; YOLO9000 sec. 3
CLIP_NORM = 0.0  # largest norm of a gradient; 0 for no clipping, as in Darknet
# schedule
EPOCHS = 12  # 160 in the paper
LR_SCHEDULE = "cosine"  # "constant", "steps", "polynomial" or "cosine"
LR_DROPS = [60, 90]  # epochs after which "steps" divides the rate by 10; YOLO9000 sec. 3
LR_POWER = 4.0  # of "polynomial"
BURN_IN = 30  # optimiser steps with a rising rate; 1000 in yolov2-voc.cfg
# run
EVAL_EVERY = 4  # epochs between two measurements of mAP
EVAL_THRESHOLD = 0.4  # confidence from which a detection counts in them
EVAL_TRAIN_IMAGES = 100  # the mAP on the training set is taken on its first so many images
CHECKPOINT = "runs/yolov2.pt"
RESUME = False  # go on from CHECKPOINT
SAVE_EVERY_MINUTES = 30.0  # inside long epochs
MAX_HOURS = 0.0  # save and stop after so long, for the time limit of a queue; 0 for none
SEED = 0
DEVICE = "auto"  # "cuda", "cuda:1", "cpu"
PRECISION = "auto"  # "fp32", "bf16", "fp16"; auto: half where the device computes it natively
COMPILE = False  # torch.compile, worth its minutes of start-up on a GPU

# RESUME refuses a change of the first and does not mind one of the second; any other change is logged
_FIXED = (
    "CLASSES", "ANCHORS", "IMAGE_SIZE", "MULTI_SCALE", "AUGMENT", "REPEAT", "EQUATION", "OPTIMIZER", "BATCH_SIZE", "SUBDIVISIONS",
    "MOMENTUM", "WEIGHT_DECAY", "SEED", "training images",
)  # fmt: skip
_FREE = (
    "DATA_DIR", "IMAGE_SETS", "NUM_WORKERS", "PRETRAINED", "EVAL_EVERY", "CHECKPOINT", "RESUME", "SAVE_EVERY_MINUTES", "MAX_HOURS",
    "DEVICE",
)  # fmt: skip
LOSS_TERMS = ("coord", "object", "no_object", "class", "prior", "total")


def train_one_epoch(
    model, loader, loss_function, optimizer, scaler, rates, subdivisions, clip_norm, device, dtype, images_seen, sums, should_pause
):
    """One pass over the loader, or its beginning: it ends after an optimiser step when should_pause() says so.

    `rates` holds the learning rate of each step; each loss term is added to `sums`, which stays on the device. -> optimiser steps
    taken, images seen. Raises FloatingPointError(batch, terms) where a loss or its gradient is not finite; the weights are still
    those before it (in fp16 on a GPU, up to nine steps later).
    """
    model.train()
    steps = 0
    first_bad = torch.full((), -1, device=device)  # the first batch whose loss or gradient is not finite
    bar = tqdm(loader, unit="batch", leave=False, disable=None)
    for batch, (images, targets) in enumerate(bar):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        targets = targets.to(device, non_blocking=True)
        step, part = divmod(batch, subdivisions)
        last = part == subdivisions - 1
        if part == 0:
            darknet_model.warm_batch_norm(model, images_seen // len(images))
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            optimizer.zero_grad(set_to_none=True)

        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predictions = model(images)
        terms = loss_function(predictions, targets, images_seen)
        scaler.scale(terms["total"] / subdivisions).backward()
        images_seen += len(images)
        sums += torch.stack([terms[name].detach() for name in LOSS_TERMS])
        finite = torch.isfinite(terms["total"])
        if last:
            scaler.unscale_(optimizer)
            norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            if clip_norm > 0:
                clip_grads_with_norm_(model.parameters(), clip_norm, norm)
            if not scaler.is_enabled():  # a GradScaler looks for infinite gradients itself: it lowers its scale and goes on
                finite &= torch.isfinite(norm)
        first_bad = torch.where(finite | (first_bad >= 0), first_bad, batch)

        if last:
            optimizer.found_inf = (first_bad >= 0).float()  # where it is 1 the fused optimisers leave the weights alone ...
            scaler.step(optimizer)
            scaler.update()
            steps += 1
            if should_pause():
                break
        # ... so that a GPU, which would have to be waited for, need not be asked in every batch
        if device.type == "cpu" or batch % 10 == 9:
            if scaler.is_enabled() and scaler.get_scale() < 1:  # halved at each step: gradients stay infinite
                first_bad.fill_(batch)
            if first_bad >= 0:
                break
            if not bar.disable:
                bar.set_postfix({name: f"{value.item():.3f}" for name, value in terms.items()})
    bar.close()
    if first_bad >= 0:
        bad_terms = [name for name, value in zip(LOSS_TERMS, sums.tolist(), strict=True) if not math.isfinite(value)]
        raise FloatingPointError(int(first_bad), ", ".join(bad_terms) or "its gradient")
    return steps, images_seen


def validate(model, dataset, anchors, batch_size, num_workers, threshold, dtype, should_stop):
    """mAP@0.5 (all points) over a data set, of the detections from `threshold` on -> mAP, number of detections, of truths."""
    model.eval()
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        detections, truths, _ = utils.detect_dataset(
            model, dataset, anchors, batch_size, num_workers, threshold, should_stop=should_stop
        )
    precisions = utils.average_precision(detections, truths, len(dataset.classes))
    return utils.mean_average_precision(precisions), len(detections), len(truths)


def main():
    utils.keep_freed_memory()
    utils.set_seed(SEED)
    stop = utils.catch_stop_signals()
    deadline = time.monotonic() + 3600 * MAX_HOURS if MAX_HOURS > 0 else math.inf
    device = utils.pick_device(DEVICE)
    dtype = utils.pick_precision(PRECISION, device)
    stem = os.path.splitext(CHECKPOINT)[0]
    classes, anchors = list(CLASSES), [list(map(float, anchor)) for anchor in ANCHORS]
    utils.check_at_least(1, EPOCHS=EPOCHS, BATCH_SIZE=BATCH_SIZE, SUBDIVISIONS=SUBDIVISIONS, REPEAT=REPEAT, EVAL_EVERY=EVAL_EVERY)
    if any(size < 32 or size % 32 for size in MULTI_SCALE):
        raise ValueError(f"MULTI_SCALE must hold multiples of 32 pixels, not {MULTI_SCALE}")
    if BATCH_SIZE % SUBDIVISIONS:
        raise ValueError(f"BATCH_SIZE {BATCH_SIZE} must be a multiple of SUBDIVISIONS {SUBDIVISIONS}")

    # data
    train_set = VOCDataset(DATA_DIR, IMAGE_SETS, anchors, IMAGE_SIZE, classes, augment=AUGMENT)
    train_view = VOCDataset(DATA_DIR, IMAGE_SETS, anchors, IMAGE_SIZE, classes)  # the same images as at test time
    del train_view.samples[EVAL_TRAIN_IMAGES:]
    eval_sets = {"train_map": train_view}
    if VAL_IMAGE_SETS:
        eval_sets["val_map"] = VOCDataset(DATA_DIR, VAL_IMAGE_SETS, anchors, IMAGE_SIZE, classes)
    if BROKEN_IMAGES == "skip":
        train_set.broken_list = f"{stem}_broken.txt"
        for eval_set in eval_sets.values():
            drop_broken_images(eval_set, train_set.broken_list)
    elif BROKEN_IMAGES != "stop":
        raise ValueError(f'BROKEN_IMAGES must be "stop" or "skip", not {BROKEN_IMAGES!r}')
    batches = []  # filled anew each epoch; the loader's workers live through all of them
    loader = DataLoader(
        train_set,
        batch_sampler=batches,
        num_workers=NUM_WORKERS,
        persistent_workers=NUM_WORKERS > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=utils.leave_signals_to_the_parent,
    )

    # model, loss, optimiser
    model = yolov2.YOLOv2(len(classes), len(anchors)).to(device, memory_format=torch.channels_last)
    if PRETRAINED and not RESUME:
        yolov2.load_pretrained_backbone(model, PRETRAINED)
    loss_function = YoloLoss(anchors, LAMBDA_COORD, LAMBDA_OBJECT, LAMBDA_NO_OBJECT, LAMBDA_CLASS, IGNORE_THRESHOLD, EQUATION).to(
        device
    )
    groups = darknet_model.parameter_groups(model, WEIGHT_DECAY)
    if OPTIMIZER == "sgd":
        optimizer = torch.optim.SGD(groups, LEARNING_RATE, momentum=MOMENTUM, fused=True)
        for parameter in model.parameters():  # torch would leave it uninitialised where fp16's first step overflows and is skipped
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    elif OPTIMIZER == "adam":
        optimizer = torch.optim.AdamW(groups, LEARNING_RATE, fused=True)  # the decay apart from the moments
    else:
        raise ValueError(f'OPTIMIZER must be "adam" or "sgd", not {OPTIMIZER!r}')
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    wrapped = torch.compile(model) if COMPILE else model

    # where the run stands: finished epochs, optimiser steps, and what the current epoch has added up
    epoch, step, images_seen, best = 0, 0, 0, -1.0
    sums = torch.zeros(len(LOSS_TERMS), dtype=torch.float64, device=device)
    names = "\n".join(os.path.basename(file) for file, _ in train_set.samples)
    settings = utils.script_settings(globals()) | {"PRECISION": str(dtype)}
    settings["training images"] = f"{len(train_set)} images with the checksum {zlib.crc32(names.encode()):08x} of their names"
    if RESUME:
        keys = ("model", "optimizer", "scaler", "epoch", "step", "images_seen", "best", "sums", "rng", "settings")
        state = utils.load_checkpoint(CHECKPOINT, keys=keys)
        changed = utils.compare_settings(CHECKPOINT, state["settings"], settings, _FIXED, _FREE)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run was not in fp16
            scaler.load_state_dict(state["scaler"])
        utils.restore_random_states(state["rng"])
        epoch, step, images_seen, best = state["epoch"], state["step"], state["images_seen"], state["best"]
        if {"VAL_IMAGE_SETS", "EVAL_THRESHOLD", "EVAL_TRAIN_IMAGES"} & set(changed):
            best = -1.0  # it was measured in another way
        sums += state["sums"].to(device)
        del state  # or its copy of the weights would stay in memory
        print(f"going on from {CHECKPOINT} after epoch {epoch}, step {step}")

    def save():
        utils.save_checkpoint(
            CHECKPOINT,
            **network(),
            epoch=epoch,
            step=step,
            sums=sums.cpu(),
            optimizer=optimizer.state_dict(),
            scheduler={"name": LR_SCHEDULE, "learning_rate": optimizer.param_groups[0]["lr"]},  # a function of the step alone
            scaler=scaler.state_dict(),
            rng=utils.random_states(),
            settings=settings,
        )

    def network():
        return {
            "model": model.state_dict(),
            "classes": classes,
            "anchors": anchors,
            "image_size": IMAGE_SIZE,
            "images_seen": images_seen,
            "best": best,
        }

    def should_stop():
        if time.monotonic() >= deadline and not stop:
            stop.append("MAX_HOURS")
        return bool(stop)

    def should_pause():
        return should_stop() or time.monotonic() >= pause_at

    part_size = BATCH_SIZE // SUBDIVISIONS
    steps = len(epoch_batches(len(train_set), part_size, 0, SEED, [IMAGE_SIZE], repeat=REPEAT)) // SUBDIVISIONS
    if steps == 0:
        raise ValueError(
            f"{len(train_set) * REPEAT} images an epoch do not fill {SUBDIVISIONS} parts; lower SUBDIVISIONS or BATCH_SIZE"
        )
    print(
        f"{len(train_set)} training images, {steps} steps of {min(BATCH_SIZE, len(train_set) * REPEAT)} images an epoch, "
        f"{EPOCHS} epochs at {MULTI_SCALE or IMAGE_SIZE} px on {device} in {str(dtype).removeprefix('torch.')}"
    )
    while epoch < EPOCHS:
        all_batches = epoch_batches(len(train_set), part_size, epoch, SEED, MULTI_SCALE or [IMAGE_SIZE], 10 * SUBDIVISIONS, REPEAT)[
            : steps * SUBDIVISIONS
        ]
        drops = [drop * steps for drop in LR_DROPS]
        rates = [
            utils.learning_rate_at(epoch * steps + number, EPOCHS * steps, LEARNING_RATE, LR_SCHEDULE, BURN_IN, LR_POWER, drops)
            for number in range(steps)
        ]
        # the epoch, or what is left of it, in parts: between them the run is saved, and ends where it has to
        seconds, seen_before = 0.0, images_seen
        while step < (epoch + 1) * steps and not stop:
            if seconds > 0:
                save()
            done = step - epoch * steps
            batches[:] = all_batches[done * SUBDIVISIONS :]
            start = time.monotonic()
            pause_at = start + 60 * SAVE_EVERY_MINUTES
            try:
                taken, images_seen = train_one_epoch(
                    wrapped, loader, loss_function, optimizer, scaler, rates[done:], SUBDIVISIONS, CLIP_NORM, device, dtype,
                    images_seen, sums, should_pause,
                )  # fmt: skip
            except FloatingPointError as error:
                batch, terms = error.args
                files = ", ".join(train_set.samples[index][0] for index, *_ in batches[batch])
                raise ValueError(
                    f"the loss ({terms}) is not finite in epoch {epoch + 1}, step {step + batch // SUBDIVISIONS + 1}, "
                    f"images {files}; the checkpoint is intact. Lower LEARNING_RATE, lengthen BURN_IN, set CLIP_NORM, or "
                    f"try PRECISION=fp32"
                ) from None
            step += taken
            seconds += time.monotonic() - start

        means = dict(zip(LOSS_TERMS, (sums / (steps * SUBDIVISIONS)).tolist(), strict=True))
        speed = (images_seen - seen_before) / seconds if seconds else ""
        row = {"epoch": epoch + 1, "learning_rate": rates[-1], **means, "images_per_second": speed, "train_map": "", "val_map": ""}
        if (epoch + 1) % EVAL_EVERY == 0 or epoch + 1 == EPOCHS:
            for name, eval_set in eval_sets.items():
                if not stop:
                    row[name], found, truths = validate(
                        model, eval_set, anchors, part_size, NUM_WORKERS, EVAL_THRESHOLD, dtype, should_stop
                    )
                    if row[name] == 0:  # the commonest question of all: is anything found at all?
                        print(f"{name} is 0: {found} detections at {EVAL_THRESHOLD} for {truths} ground truths")
        if stop:
            save()
            print(f"stopped by {stop[0]} in epoch {epoch + 1} after step {step}; RESUME=True goes on from {CHECKPOINT}")
            return

        epoch += 1
        sums.zero_()
        score = row["val_map"] if VAL_IMAGE_SETS else row["train_map"]
        if score != "" and score >= best:  # of equal ones the later
            best = score
            utils.save_checkpoint(f"{stem}_best.pt", **network(), epoch=epoch)
        utils.append_metrics(f"{stem}_metrics.csv", row)  # before the checkpoint: a row that is there twice takes its own place
        save()
        utils.draw_charts(f"{stem}_metrics.csv", f"{stem}_charts.png")
        shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items() if value != ""}
        print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
    if BROKEN_IMAGES == "skip" and os.path.isfile(train_set.broken_list):
        print(f"images that could not be read stand in {train_set.broken_list}")


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
