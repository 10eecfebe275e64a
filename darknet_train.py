"""Pre-trains Darknet-19 on ImageNet, on one GPU or on the CPU (YOLO9000 sec. 3, "Training for classification").

    python darknet_train.py                                     the sample: a look at the loop, a minute on a CPU
    python darknet_train.py DATA_DIR=/data/imagenet NUM_WORKERS=8 IMAGE_SIZE=224 BATCH_SIZE=128 EPOCHS=160

Writes, with the name of CHECKPOINT: `runs/darknet19.pt` after each epoch, `runs/darknet19_best.pt` (best top-1),
`runs/darknet19_metrics.csv` and `runs/darknet19_charts.png`. `train.py PRETRAINED=runs/darknet19.pt` goes on from there.
darknet_train_multigpu.py and darknet_train_multigpu_distr.py are the same script for several GPUs; only their main() differs.
"""

import contextlib
import os
import sys
import time

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import darknet_model
import utils
from dataset import epoch_batches, imagenet_dataset

# data
DATA_DIR = "data_samples/imagenet"  # holds train/<wnid>/ and val/<wnid>/
IMAGE_SIZE = 64  # pixels; 224 in the paper, 448 in its second stage
NUM_WORKERS = 2  # processes that load images
# optimiser
BATCH_SIZE = 6  # images an optimiser step; 128 in darknet19.cfg
SUBDIVISIONS = 1  # parts that a batch is worked through in (gradient accumulation)
LEARNING_RATE = 0.01  # 0.1 in the paper, 1e-3 in its second stage
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4  # on kernels only
LABEL_SMOOTHING = 0.0
# schedule
EPOCHS = 4  # 160 in the paper, 10 in its second stage
LR_SCHEDULE = "polynomial"  # "constant", "steps", "polynomial" or "cosine"
LR_POWER = 4.0  # of "polynomial"; 4 in the paper
LR_DROPS = [60, 90]  # epochs after which "steps" divides the rate by 10
BURN_IN = 0  # optimiser steps with a rising rate; 1000 in darknet19.cfg
# run
CHECKPOINT = "runs/darknet19.pt"
RESUME = False  # go on from CHECKPOINT
RESUME_WEIGHTS = ""  # a checkpoint or Darknet file whose weights a new run starts from, as for the 448 px stage
SEED = 0
DEVICE = "auto"  # "cuda", "cuda:1", "cpu"
PRECISION = "auto"  # "fp32", "bf16", "fp16"; auto: half where the device computes it natively
COMPILE = False  # torch.compile, worth its minutes of start-up on a GPU


def train_one_epoch(model, loader, optimizer, scaler, rates, subdivisions, smoothing, device, dtype, batches_seen):
    """One pass over the loader; `rates` holds the learning rate of each optimiser step -> sums of loss, right, images.

    Raises ValueError before a step with a loss that is not finite, naming the batch.
    """
    model.train()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right answers, images
    for batch, (images, labels) in enumerate(loader):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        step, part = divmod(batch, subdivisions)
        if part == 0:
            darknet_model.warm_batch_norm(model, batches_seen + batch)
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            optimizer.zero_grad(set_to_none=True)

        # Only the last part of a batch makes the processes of DistributedDataParallel exchange their gradients.
        last = part == subdivisions - 1
        exchange = contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
        with exchange:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the loss is not finite in batch {batch} of this epoch; the last checkpoint is intact. "
                    f"Lower LEARNING_RATE, lengthen BURN_IN, or try PRECISION=fp32"
                )
            scaler.scale(loss / subdivisions).backward()
        right = (logits.argmax(dim=1) == labels).sum()
        sums += torch.stack([loss.detach() * len(images), right, torch.tensor(len(images), device=device)])
        if last:
            scaler.step(optimizer)
            scaler.update()
    return sums


@torch.no_grad()
def validate(model, loader, device, dtype):
    """One pass over the loader -> sums of loss, images whose class was guessed first, among the first five, images."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels in loader:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (N, 5)
        sums += torch.stack([loss, guesses[:, 0].sum(), guesses.sum(), torch.tensor(len(images), device=device)])
    return sums


def main():
    utils.keep_freed_memory()
    utils.set_seed(SEED)
    device = utils.pick_device(DEVICE)
    dtype = utils.pick_precision(PRECISION, device)
    stem = os.path.splitext(CHECKPOINT)[0]
    if BATCH_SIZE % SUBDIVISIONS:
        raise ValueError(f"BATCH_SIZE {BATCH_SIZE} must be a multiple of SUBDIVISIONS {SUBDIVISIONS}")
    part_size = BATCH_SIZE // SUBDIVISIONS

    # data
    train_set = imagenet_dataset(DATA_DIR, "train", IMAGE_SIZE, augment=True)
    val_set = imagenet_dataset(DATA_DIR, "val", IMAGE_SIZE, augment=False)
    if train_set.classes != val_set.classes:
        odd = sorted(set(train_set.classes) ^ set(val_set.classes))
        raise ValueError(f"{DATA_DIR}: train/ and val/ have different class folders ({', '.join(odd[:5])}); both need all of them")
    options = {"num_workers": NUM_WORKERS, "persistent_workers": NUM_WORKERS > 0, "pin_memory": device.type == "cuda"}
    batches = []  # filled anew each epoch; the loader's workers live through all of them
    train_loader = DataLoader(train_set, batch_sampler=batches, **options)
    val_loader = DataLoader(val_set, part_size, **options)

    # model, optimiser
    model = darknet_model.Darknet19(len(train_set.classes)).to(device, memory_format=torch.channels_last)
    if RESUME_WEIGHTS:
        darknet_model.load_classifier(model, RESUME_WEIGHTS)
    groups = darknet_model.parameter_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.SGD(groups, LEARNING_RATE, momentum=MOMENTUM, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    first_epoch, images_seen, best = 0, 0, -1.0
    if RESUME:
        state = utils.load_checkpoint(CHECKPOINT, keys=("model", "optimizer", "scaler", "epoch", "images_seen", "best"))
        first_epoch, images_seen, best = state["epoch"], state["images_seen"], state["best"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        print(f"going on from {CHECKPOINT} after epoch {first_epoch}")
    wrapped = torch.compile(model) if COMPILE else model

    steps = max(1, len(train_set) // BATCH_SIZE)  # optimiser steps an epoch
    print(f"{len(train_set)} training and {len(val_set)} validation images of {len(train_set.classes)} classes on {device}")
    for epoch in range(first_epoch, EPOCHS):
        batches[:] = epoch_batches(len(train_set), part_size, epoch, SEED, [IMAGE_SIZE])[: steps * SUBDIVISIONS]
        drops = [drop * steps for drop in LR_DROPS]
        rates = [
            utils.learning_rate_at(epoch * steps + step, EPOCHS * steps, LEARNING_RATE, LR_SCHEDULE, BURN_IN, LR_POWER, drops)
            for step in range(steps)
        ]
        start = time.perf_counter()
        bar = tqdm(train_loader, desc=f"epoch {epoch + 1}", unit="batch", leave=False, disable=None)
        batches_seen = epoch * steps * SUBDIVISIONS
        sums = train_one_epoch(wrapped, bar, optimizer, scaler, rates, SUBDIVISIONS, LABEL_SMOOTHING, device, dtype, batches_seen)
        speed = float(sums[2]) / (time.perf_counter() - start)
        images_seen += int(sums[2])
        val_sums = validate(wrapped, val_loader, device, dtype)

        row = {
            "epoch": epoch + 1,
            "learning_rate": rates[-1],
            "loss": float(sums[0] / sums[2]),
            "val_loss": float(val_sums[0] / val_sums[3]),
            "images_per_second": speed,
            "train_top1": float(sums[1] / sums[2]),
            "val_top1": float(val_sums[1] / val_sums[3]),
            "val_top5": float(val_sums[2] / val_sums[3]),
        }
        improved = row["val_top1"] >= best
        best = max(best, row["val_top1"])
        state = {
            "model": model.state_dict(),
            "classes": train_set.classes,
            "image_size": IMAGE_SIZE,
            "epoch": epoch + 1,
            "images_seen": images_seen,
            "best": best,
        }
        if improved:
            utils.save_checkpoint(f"{stem}_best.pt", **state)
        utils.save_checkpoint(CHECKPOINT, **state, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        utils.append_metrics(f"{stem}_metrics.csv", row)
        utils.draw_charts(f"{stem}_metrics.csv", f"{stem}_charts.png")
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
