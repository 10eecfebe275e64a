"""Pre-trains Darknet-19 on ImageNet, on one GPU or on the CPU (YOLO9000 sec. 3, "Training for classification").

    python darknet_train.py                                     the sample: a look at the loop, a minute on a CPU
    python darknet_train.py DATA_DIR=/data/imagenet NUM_WORKERS=8 IMAGE_SIZE=224 BATCH_SIZE=128 EPOCHS=160

Writes, with the name of CHECKPOINT: `runs/darknet19.pt` after each epoch, `runs/darknet19_best.pt` (best top-1),
`runs/darknet19_metrics.csv` and `runs/darknet19_charts.png`. `train.py PRETRAINED=runs/darknet19.pt` goes on from there.
darknet_train_multigpu.py and darknet_train_multigpu_distr.py are the same script for several GPUs; only their main() differs.
"""

import contextlib
import math
import os
import sys
import time
import zlib

import torch
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from tqdm import tqdm

import darknet_model
import utils
from dataset import epoch_batches, imagenet_dataset

# data
DATA_DIR = "data_samples/imagenet"  # holds train/<wnid>/ and val/<wnid>/
IMAGE_SIZE = 64  # pixels; 224 in the paper, 448 in its second stage
CROP_SCALE = (0.5, 1.75)  # least and greatest short side, in crops, that an image is scaled to; (1.0, 1.14) in the second stage
NUM_WORKERS = 2  # processes that load images
BROKEN_IMAGES = "stop"  # or "skip": another image takes the place of one that cannot be read, and a file lists it
# model
IDENTITY_INIT = 0.0  # how much of its input each new layer passes on; 0 in Darknet, 2 for runs of a few thousand steps
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
SAVE_EVERY_MINUTES = 30.0  # inside long epochs
MAX_HOURS = 0.0  # save and stop after so long, for the time limit of a queue; 0 for none
RESUME_WEIGHTS = ""  # a checkpoint or Darknet file whose weights a new run starts from, as for the 448 px stage
SEED = 0
DEVICE = "auto"  # "cuda", "cuda:1", "cpu"
PRECISION = "auto"  # "fp32", "bf16", "fp16"; auto: half where the device computes it natively
COMPILE = False  # torch.compile, worth its minutes of start-up on a GPU

# RESUME refuses a change of the first and does not mind one of the second; any other change is logged
_FIXED = ("IMAGE_SIZE", "BATCH_SIZE", "SUBDIVISIONS", "MOMENTUM", "WEIGHT_DECAY", "SEED", "classes", "training images")
_FREE = (
    "DATA_DIR",
    "NUM_WORKERS",
    "CHECKPOINT",
    "RESUME",
    "RESUME_WEIGHTS",
    "SAVE_EVERY_MINUTES",
    "MAX_HOURS",
    "DEVICE",
)


def train_one_epoch(
    model, loader, optimizer, scaler, rates, subdivisions, smoothing, device, dtype, batches_seen, sums, should_pause
):
    """One pass over the loader, or its beginning: it ends after an optimiser step when should_pause() says so.

    `rates` holds the learning rate of each step; loss, right answers and images are added to `sums`, which stays on the device.
    -> optimiser steps taken. Raises FloatingPointError(batch) where a loss or its gradient is not finite; the weights are still
    those before it (in fp16 on a GPU, up to nine steps later). The processes of DistributedDataParallel have one gradient in
    common, so that all of them stop; in fp16 it may be the one with the loss alone, and torchrun ends the others.
    """
    model.train()
    steps = 0
    first_bad = torch.full((), -1, device=device)  # the first batch whose loss or gradient is not finite
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
            scaler.scale(loss / subdivisions).backward()
        right = (logits.argmax(dim=1) == labels).sum()
        sums += torch.stack([loss.detach() * len(images), right, torch.full_like(right, len(images))])
        finite = torch.isfinite(loss)
        if last and not scaler.is_enabled():  # a GradScaler looks for infinite gradients itself: it lowers its scale and goes on
            finite &= torch.isfinite(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        first_bad = torch.where(finite | (first_bad >= 0), first_bad, batch)

        if last:
            optimizer.found_inf = (first_bad >= 0).float()  # where it is 1 the fused optimisers leave the weights alone ...
            scaler.step(optimizer)
            scaler.update()
            steps += 1
            if should_pause():
                break
            # ... so that a GPU, which would have to be waited for, need not be asked in every step
            if device.type == "cpu" or step % 10 == 9:
                if scaler.is_enabled() and scaler.get_scale() < 1:  # halved at each step: gradients stay infinite
                    first_bad.fill_(batch)
                if first_bad >= 0:
                    break
    if first_bad >= 0:
        raise FloatingPointError(int(first_bad))
    return steps


@torch.no_grad()
def validate(model, loader, device, dtype, should_stop):
    """One pass over the loader -> sums of loss, images whose class was guessed first, among the first five, images.

    Images that could not be read have the label -100 and count nowhere. It ends early as soon as should_stop() says so.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels in loader:
        if should_stop():
            break
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (N, 5)
        sums += torch.stack([loss, guesses[:, 0].sum(), guesses.sum(), (labels >= 0).sum()])
    return sums


def main():
    utils.keep_freed_memory()
    utils.set_seed(SEED)
    device = utils.pick_device(DEVICE)
    dtype = utils.pick_precision(PRECISION, device)
    stop = utils.catch_stop_signals()
    deadline = time.monotonic() + 3600 * MAX_HOURS if MAX_HOURS > 0 else math.inf
    stem = os.path.splitext(CHECKPOINT)[0]
    utils.check_at_least(1, EPOCHS=EPOCHS, BATCH_SIZE=BATCH_SIZE, SUBDIVISIONS=SUBDIVISIONS)
    utils.check_at_least(32, IMAGE_SIZE=IMAGE_SIZE)  # Darknet-19 halves it five times
    if BATCH_SIZE % SUBDIVISIONS:
        raise ValueError(f"BATCH_SIZE {BATCH_SIZE} must be a multiple of SUBDIVISIONS {SUBDIVISIONS}")
    part_size = BATCH_SIZE // SUBDIVISIONS

    # data
    train_set = imagenet_dataset(DATA_DIR, "train", IMAGE_SIZE, augment=True, crop_scale=CROP_SCALE)
    val_set = imagenet_dataset(DATA_DIR, "val", IMAGE_SIZE, augment=False)
    if train_set.classes != val_set.classes:
        odd = sorted(set(train_set.classes) ^ set(val_set.classes))
        raise ValueError(f"{DATA_DIR}: train/ and val/ have different class folders ({', '.join(odd[:5])}); both need all of them")
    if BROKEN_IMAGES == "skip":
        train_set.broken_list = val_set.broken_list = f"{stem}_broken.txt"
    elif BROKEN_IMAGES != "stop":
        raise ValueError(f'BROKEN_IMAGES must be "stop" or "skip", not {BROKEN_IMAGES!r}')
    options = {"num_workers": NUM_WORKERS, "persistent_workers": NUM_WORKERS > 0, "pin_memory": device.type == "cuda"}
    options["worker_init_fn"] = utils.leave_signals_to_the_parent
    batches = []  # filled anew each epoch; the loader's workers live through all of them
    train_loader = DataLoader(train_set, batch_sampler=batches, **options)
    val_loader = DataLoader(val_set, part_size, **options)

    # model, optimiser
    model = darknet_model.Darknet19(len(train_set.classes))
    darknet_model.add_identity(model, IDENTITY_INIT)
    model.to(device, memory_format=torch.channels_last)
    if RESUME_WEIGHTS and not RESUME:
        darknet_model.load_classifier(model, RESUME_WEIGHTS)
    groups = darknet_model.parameter_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.SGD(groups, LEARNING_RATE, momentum=MOMENTUM, fused=True)
    for parameter in model.parameters():  # torch would leave it uninitialised where fp16's first step overflows and is skipped
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    wrapped = torch.compile(model) if COMPILE else model

    # where the run stands: finished epochs, optimiser steps, and what the current epoch has added up
    epoch, step, images_seen, best = 0, 0, 0, -1.0
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right answers, images
    names = "\n".join(os.path.basename(file) for file, _ in train_set.samples)
    settings = utils.script_settings(globals()) | {"classes": train_set.classes, "PRECISION": str(dtype)}
    settings["training images"] = f"{len(train_set)} images with the checksum {zlib.crc32(names.encode()):08x} of their names"
    if RESUME:
        keys = ("model", "optimizer", "scaler", "epoch", "step", "images_seen", "best", "sums", "rng", "settings")
        state = utils.load_checkpoint(CHECKPOINT, keys=keys)
        utils.compare_settings(CHECKPOINT, state["settings"], settings, _FIXED, _FREE)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run was not in fp16
            scaler.load_state_dict(state["scaler"])
        utils.restore_random_states(state["rng"])
        epoch, step, images_seen, best = state["epoch"], state["step"], state["images_seen"], state["best"]
        sums += state["sums"].to(device)
        del state  # or its copy of the weights would stay in memory
        print(f"going on from {CHECKPOINT} after epoch {epoch}, step {step}", flush=True)

    def network():
        return {
            "model": model.state_dict(),
            "classes": train_set.classes,
            "image_size": IMAGE_SIZE,
            "images_seen": images_seen,
            "best": best,
        }

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

    def should_stop():
        if time.monotonic() >= deadline and not stop:
            stop.append("MAX_HOURS")
        return bool(stop)

    def should_pause():
        return should_stop() or time.monotonic() >= pause_at

    steps = len(train_set) // BATCH_SIZE or int(SUBDIVISIONS == 1)  # optimiser steps an epoch; a small set is one batch
    if steps == 0:
        raise ValueError(f"{len(train_set)} images do not fill a batch; lower BATCH_SIZE or SUBDIVISIONS")
    print(f"{len(train_set)} training and {len(val_set)} validation images of {len(train_set.classes)} classes on {device}")
    while epoch < EPOCHS:
        all_batches = epoch_batches(len(train_set), part_size, epoch, SEED, [IMAGE_SIZE])[: steps * SUBDIVISIONS]
        drops = [drop * steps for drop in LR_DROPS]
        rates = [
            utils.learning_rate_at(epoch * steps + number, EPOCHS * steps, LEARNING_RATE, LR_SCHEDULE, BURN_IN, LR_POWER, drops)
            for number in range(steps)
        ]
        # the epoch, or what is left of it, in parts: between them the run is saved, and ends where it has to
        seconds, images_before = 0.0, float(sums[2])
        while step < (epoch + 1) * steps and not stop:
            if seconds > 0:
                save()
            done = step - epoch * steps
            batches[:] = all_batches[done * SUBDIVISIONS :]
            start = time.monotonic()
            pause_at = start + 60 * SAVE_EVERY_MINUTES
            bar = tqdm(train_loader, desc=f"epoch {epoch + 1}", unit="batch", leave=False, disable=None)
            try:
                step += train_one_epoch(
                    wrapped, bar, optimizer, scaler, rates[done:], SUBDIVISIONS, LABEL_SMOOTHING, device, dtype,
                    step * SUBDIVISIONS, sums, should_pause,
                )  # fmt: skip
            except FloatingPointError as error:
                batch = error.args[0]
                files = ", ".join(train_set.samples[index][0] for index, *_ in batches[batch])
                raise ValueError(
                    f"the loss or its gradient is not finite in epoch {epoch + 1}, step {step + batch // SUBDIVISIONS + 1}, "
                    f"images {files}; the checkpoint is intact. Lower LEARNING_RATE, lengthen BURN_IN, or try PRECISION=fp32"
                ) from None
            finally:
                bar.close()
            seconds += time.monotonic() - start

        if not stop:
            val_sums = validate(model, val_loader, device, dtype, should_stop)
        if stop:
            save()
            print(f"stopped by {stop[0]} in epoch {epoch + 1} after step {step}; RESUME=True goes on from {CHECKPOINT}")
            return

        epoch += 1
        images_seen += int(sums[2])
        row = {
            "epoch": epoch,
            "learning_rate": rates[-1],
            "loss": float(sums[0] / sums[2]),
            "val_loss": float(val_sums[0] / val_sums[3]),
            "images_per_second": (float(sums[2]) - images_before) / seconds if seconds else "",
            "train_top1": float(sums[1] / sums[2]),
            "val_top1": float(val_sums[1] / val_sums[3]),
            "val_top5": float(val_sums[2] / val_sums[3]),
        }
        sums.zero_()
        improved = row["val_top1"] >= best
        best = max(best, row["val_top1"])
        if improved:
            utils.save_checkpoint(f"{stem}_best.pt", **network(), epoch=epoch)
        utils.append_metrics(f"{stem}_metrics.csv", row)  # before the checkpoint: a row that is there twice takes its own place
        save()
        utils.draw_charts(f"{stem}_metrics.csv", f"{stem}_charts.png")
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items() if value != ""), flush=True)
    if BROKEN_IMAGES == "skip" and os.path.isfile(train_set.broken_list):
        print(f"images that could not be read stand in {train_set.broken_list}")


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
