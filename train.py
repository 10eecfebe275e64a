"""Trains YOLOv2 for detection (YOLO9000 sec. 3, "Training for detection").

    python train.py                                          the sample: 16 images, a few minutes on a CPU
    python train.py DATA_DIR=/data/VOCdevkit "IMAGE_SETS=[('2007','trainval'),('2012','trainval')]" AUGMENT=True REPEAT=1 ...

The README has whole recipes. Writes, with the name of CHECKPOINT: `runs/yolov2.pt` after each epoch, `runs/yolov2_best.pt` (best
mAP), `runs/yolov2_metrics.csv` (a row an epoch) and `runs/yolov2_charts.png` (all columns over the epochs).
"""

import os
import random
import sys
import time

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from tqdm import tqdm

import darknet_model
import model as yolov2
import utils
from dataset import VOC_CLASSES, VOCDataset, epoch_batches
from loss import YoloLoss

# data
DATA_DIR = "data_samples/voc"  # holds VOC2007/ or VOCdevkit/VOC2007/, or .csv lists
IMAGE_SETS = [("2007", "tiny")]  # VOC 07+12: [("2007", "trainval"), ("2012", "trainval")]; or csv lists: ["train.csv"]
VAL_IMAGE_SETS = []  # none: the sample is too small for one; VOC: [("2007", "test")]
CLASSES = VOC_CLASSES  # any names; they travel in the checkpoint
AUGMENT = False  # crop, flip and colour jitter; True for anything larger than the sample
REPEAT = 5  # times an epoch shows each image; 1 for a real data set
NUM_WORKERS = 2  # processes that load images
# model
IMAGE_SIZE = 160  # pixels, a multiple of 32; 416 in yolov2-voc.cfg
MULTI_SCALE = []  # sizes to draw from every 10 batches: list(range(320, 609, 32)) in the paper; [] for IMAGE_SIZE alone
ANCHORS = yolov2.ANCHORS  # width and height in grid cells; python dataset.py computes others
PRETRAINED = ""  # a checkpoint of darknet_train*.py or a Darknet file such as darknet19_448.conv.23; "" from scratch
# loss
EQUATION = "darknet"  # "darknet": yolov2-voc.cfg; "yolov1": the printed equation
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
SEED = 0
DEVICE = "auto"  # "cuda", "cuda:1", "cpu"
PRECISION = "auto"  # "fp32", "bf16", "fp16"; auto: half where the device computes it natively
COMPILE = False  # torch.compile, worth its minutes of start-up on a GPU

LOSS_TERMS = ("coord", "object", "no_object", "class", "prior", "total")


def train_one_epoch(model, loader, loss_function, optimizer, scaler, rates, subdivisions, clip_norm, device, dtype, images_seen):
    """One pass over the loader; `rates` holds the learning rate of each optimiser step -> mean of each loss term, images seen.

    Raises ValueError before a step with a loss that is not finite, naming the batch.
    """
    model.train()
    sums = torch.zeros(len(LOSS_TERMS), device=device)
    bar = tqdm(loader, unit="batch", leave=False, disable=None)
    for batch, (images, targets) in enumerate(bar):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        targets = targets.to(device, non_blocking=True)
        step, part = divmod(batch, subdivisions)
        if part == 0:
            darknet_model.warm_batch_norm(model, images_seen // len(images))
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            optimizer.zero_grad(set_to_none=True)

        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predictions = model(images)
        terms = loss_function(predictions, targets, images_seen)
        if not torch.isfinite(terms["total"]):
            values = ", ".join(f"{name} {value.item():.3g}" for name, value in terms.items())
            raise ValueError(
                f"the loss is not finite in batch {batch} of this epoch ({values}); the last checkpoint is intact. "
                f"Lower LEARNING_RATE, lengthen BURN_IN, set CLIP_NORM, or try PRECISION=fp32"
            )
        scaler.scale(terms["total"] / subdivisions).backward()
        images_seen += len(images)
        sums += torch.stack([terms[name].detach() for name in LOSS_TERMS])

        if part == subdivisions - 1:
            if clip_norm > 0:
                scaler.unscale_(optimizer)
                clip_grad_norm_(model.parameters(), clip_norm)
            scaler.step(optimizer)
            scaler.update()
        if not bar.disable and batch % 10 == 0:  # reading a number makes a GPU wait, so not in every batch
            bar.set_postfix({name: f"{value:.3f}" for name, value in zip(LOSS_TERMS, (sums / (batch + 1)).tolist(), strict=True)})
    return dict(zip(LOSS_TERMS, (sums / len(loader)).tolist(), strict=True)), images_seen


def validate(model, dataset, anchors, batch_size, num_workers, threshold, dtype):
    """mAP@0.5 (all points) over a data set, of the detections from `threshold` on -> mAP, number of detections, of truths."""
    model.eval()
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        detections, truths, _ = utils.detect_dataset(model, dataset, anchors, batch_size, num_workers, threshold)
    precisions = utils.average_precision(detections, truths, len(dataset.classes))
    return utils.mean_average_precision(precisions), len(detections), len(truths)


def main():
    utils.keep_freed_memory()
    utils.set_seed(SEED)
    device = utils.pick_device(DEVICE)
    dtype = utils.pick_precision(PRECISION, device)
    stem = os.path.splitext(CHECKPOINT)[0]
    classes, anchors = list(CLASSES), [list(map(float, anchor)) for anchor in ANCHORS]
    if any(size % 32 for size in MULTI_SCALE):
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
    batches = []  # filled anew each epoch; the loader's workers live through all of them
    loader = DataLoader(
        train_set,
        batch_sampler=batches,
        num_workers=NUM_WORKERS,
        persistent_workers=NUM_WORKERS > 0,
        pin_memory=device.type == "cuda",
    )

    # model, loss, optimiser
    model = yolov2.YOLOv2(len(classes), len(anchors)).to(device, memory_format=torch.channels_last)
    if PRETRAINED:
        yolov2.load_pretrained_backbone(model, PRETRAINED)
    loss_function = YoloLoss(anchors, LAMBDA_COORD, LAMBDA_OBJECT, LAMBDA_NO_OBJECT, LAMBDA_CLASS, IGNORE_THRESHOLD, EQUATION).to(
        device
    )
    groups = darknet_model.parameter_groups(model, WEIGHT_DECAY)
    if OPTIMIZER == "sgd":
        optimizer = torch.optim.SGD(groups, LEARNING_RATE, momentum=MOMENTUM, fused=True)
    elif OPTIMIZER == "adam":
        optimizer = torch.optim.AdamW(groups, LEARNING_RATE, fused=True)  # the decay apart from the moments
    else:
        raise ValueError(f'OPTIMIZER must be "adam" or "sgd", not {OPTIMIZER!r}')
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    wrapped = torch.compile(model) if COMPILE else model

    first_epoch, images_seen, best = 0, 0, -1.0
    if RESUME:
        state = utils.load_checkpoint(CHECKPOINT, keys=("model", "optimizer", "scaler", "epoch", "images_seen", "best", "rng"))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        first_epoch, images_seen, best = state["epoch"], state["images_seen"], state["best"]
        random.setstate(state["rng"]["python"])
        torch.set_rng_state(state["rng"]["torch"])
        print(f"going on from {CHECKPOINT} after epoch {first_epoch}")

    part_size = BATCH_SIZE // SUBDIVISIONS
    batches[:] = epoch_batches(len(train_set), part_size, 0, SEED, [IMAGE_SIZE], repeat=REPEAT)
    steps = max(1, len(batches) // SUBDIVISIONS)  # optimiser steps an epoch
    print(
        f"{len(train_set)} training images, {steps} steps of {min(BATCH_SIZE, len(train_set) * REPEAT)} images an epoch, "
        f"{EPOCHS} epochs at {MULTI_SCALE or IMAGE_SIZE} px on {device} in {str(dtype).removeprefix('torch.')}"
    )
    for epoch in range(first_epoch, EPOCHS):
        batches[:] = epoch_batches(len(train_set), part_size, epoch, SEED, MULTI_SCALE or [IMAGE_SIZE], 10 * SUBDIVISIONS, REPEAT)[
            : steps * SUBDIVISIONS
        ]
        drops = [drop * steps for drop in LR_DROPS]
        rates = [
            utils.learning_rate_at(epoch * steps + step, EPOCHS * steps, LEARNING_RATE, LR_SCHEDULE, BURN_IN, LR_POWER, drops)
            for step in range(steps)
        ]
        start, seen_before = time.perf_counter(), images_seen
        terms, images_seen = train_one_epoch(
            wrapped, loader, loss_function, optimizer, scaler, rates, SUBDIVISIONS, CLIP_NORM, device, dtype, images_seen
        )
        speed = (images_seen - seen_before) / (time.perf_counter() - start)
        row = {"epoch": epoch + 1, "learning_rate": rates[-1], **terms, "images_per_second": speed, "train_map": "", "val_map": ""}

        if (epoch + 1) % EVAL_EVERY == 0 or epoch + 1 == EPOCHS:
            for name, eval_set in eval_sets.items():
                row[name], found, truths = validate(model, eval_set, anchors, part_size, NUM_WORKERS, EVAL_THRESHOLD, dtype)
                if row[name] == 0:  # the commonest question of all: is anything found at all?
                    print(f"{name} is 0: {found} detections at {EVAL_THRESHOLD} for {truths} ground truths")

        score = row["val_map"] if VAL_IMAGE_SETS else row["train_map"]
        improved = score != "" and score >= best  # of equal ones the later
        best = max(best, score) if score != "" else best
        state = {
            "model": model.state_dict(),
            "classes": classes,
            "anchors": anchors,
            "image_size": IMAGE_SIZE,
            "epoch": epoch + 1,
            "images_seen": images_seen,
            "best": best,
        }
        if improved:
            utils.save_checkpoint(f"{stem}_best.pt", **state)
        rng = {"python": random.getstate(), "torch": torch.get_rng_state()}
        training = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": (epoch + 1) * steps}
        settings = {name: value for name, value in globals().items() if name.isupper()}
        utils.save_checkpoint(CHECKPOINT, **state, **training, rng=rng, settings=settings)
        utils.append_metrics(f"{stem}_metrics.csv", row)
        utils.draw_charts(f"{stem}_metrics.csv", f"{stem}_charts.png")
        shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items() if value != ""}
        print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
