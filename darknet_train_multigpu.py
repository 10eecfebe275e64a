"""Pre-trains Darknet-19 on ImageNet on all GPUs of one machine with DataParallel (YOLO9000 sec. 3).

    python darknet_train_multigpu.py DATA_DIR=/data/imagenet IMAGE_SIZE=224 BATCH_SIZE=128 LEARNING_RATE=0.1 EPOCHS=160

This is darknet_train.py, except for the lines under "DataParallel:" comments. One process splits each batch over the
GPUs and gathers the outputs. It copies the model to every GPU in every step and runs them all from one Python process,
so darknet_train_multigpu_distr.py is faster. Without a GPU it runs on the CPU. It writes the same files as
darknet_train.py; the checkpoints are interchangeable.
"""

import functools
import sys
import time

import torch
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from tqdm import tqdm

import darknet_model
import utils
from dataset import collate, files_of_step, imagenet_dataset, steps_per_epoch, training_batches

# data
DATA_DIR = "data_samples/imagenet"  # holds train/<class>/ and val/<class>/; ImageNet's class folders are wnids
IMAGE_SIZE = 64  # pixels; 224 in the paper, 448 in its second stage
CROP_SCALE = (0.5, 1.75)  # short side of the scaled image / crop: smallest, largest; (1.0, 1.14) in the second stage
NUM_WORKERS = 2  # processes that load images
BROKEN_IMAGES = "stop"  # or "skip": use the next image instead of an unreadable one, and list it in a file
# model
IDENTITY_INIT = 0.0  # weight of an identity added to each new kernel; 0 in Darknet; ours: 2 for a few thousand steps
# optimiser
BATCH_SIZE = 6  # images per optimiser step; 128 in darknet19.cfg
SUBDIVISIONS = 1  # gradient-accumulation steps per batch
LEARNING_RATE = 0.01  # 0.1 in the paper, 1e-3 in its second stage
MOMENTUM = 0.9  # YOLO9000 sec. 3
WEIGHT_DECAY = 5e-4  # on kernels only; YOLO9000 sec. 3
LABEL_SMOOTHING = 0.0  # none in darknet19.cfg
# schedule
EPOCHS = 4  # 160 in the paper, 10 in its second stage; 0: only validate the weights in RESUME_WEIGHTS
LR_SCHEDULE = "polynomial"  # "constant", "steps", "polynomial" or "cosine"
LR_POWER = 4.0  # of "polynomial"; 4 in the paper
LR_DROPS = [60, 90]  # for "steps": epochs after which the rate falls tenfold
BURN_IN = 0  # optimiser steps with a rising rate; 1000 in darknet19.cfg
# run
CHECKPOINT = "runs/darknet19.pt"
RESUME = False  # continue from CHECKPOINT
SAVE_EVERY_MINUTES = 30.0  # minutes between saves within an epoch; 0 saves after every step
MAX_HOURS = 0.0  # save and stop after this time, for queues with a time limit; 0 for no limit
RESUME_WEIGHTS = ""  # start a new run from the weights of this checkpoint or Darknet file, as for the 448 px stage
SEED = 0
# DataParallel: uses all visible GPUs; CUDA_VISIBLE_DEVICES=1,2 selects some
DEVICE = "auto"  # or "cuda", "cpu"
PRECISION = "auto"  # "fp32", "bf16" or "fp16"; "auto": half precision if the device computes it faster
COMPILE = False  # torch.compile: faster on a GPU, after minutes of start-up


def check_settings():
    """Raises ValueError or OSError for an invalid setting."""
    # Darknet-19 halves the image five times, without a grid; 0 epochs only validate
    utils.check_settings(globals(), IMAGE_SIZE=(32, 9984, 1), EPOCHS=(0, 10**12, 1))
    if EPOCHS == 0 and (RESUME or not RESUME_WEIGHTS):
        raise ValueError("EPOCHS=0 only validates the weights in RESUME_WEIGHTS; set these, and RESUME=False")
    if BATCH_SIZE == SUBDIVISIONS and IMAGE_SIZE < 64:
        raise ValueError("batch norm needs two values per channel: set IMAGE_SIZE=64, or a larger BATCH_SIZE")
    utils.check_writable(CHECKPOINT)


# may not change on RESUME
FIXED = ("IMAGE_SIZE", "BATCH_SIZE", "SUBDIVISIONS", "MOMENTUM", "WEIGHT_DECAY", "SEED", "classes", "training images")


@torch.no_grad()
def validate(model, loader, device, dtype, stop):
    """One pass over the loader -> (4,) sums: loss, top-1 hits, top-5 hits, number of images.

    Unreadable images have the label -100 and do not count. Returns early if the run is asked to stop.
    """
    model.eval()
    sums = [torch.zeros(4, device=device)]
    for images, labels in loader:
        if utils.should_stop(stop):
            break
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (N, 5)
        sums.append(torch.stack([loss, guesses[:, 0].sum(), guesses.sum(), (labels >= 0).sum()]))
    return torch.stack(sums).cpu().double().sum(dim=0)


def main():
    check_settings()
    utils.keep_freed_memory()
    utils.set_seed(SEED)
    device = utils.pick_device(DEVICE)
    # DataParallel: GPUs get equal shares of each batch; copies of a compiled model would run the first GPU's code
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.index is not None and gpus > 1:
        raise ValueError(f"DEVICE={DEVICE}: DataParallel uses all visible GPUs; choose them with CUDA_VISIBLE_DEVICES")
    chunk = BATCH_SIZE // SUBDIVISIONS  # images per forward pass
    if gpus > 0 and chunk % gpus:
        advice = f"set BATCH_SIZE to a multiple of {gpus * SUBDIVISIONS}"
        raise ValueError(f"{chunk} images (BATCH_SIZE / SUBDIVISIONS) cannot be split over {gpus} GPUs; {advice}")
    if gpus > 1 and COMPILE:
        raise ValueError("COMPILE works on one GPU; use darknet_train_multigpu_distr.py for several")
    dtype = utils.pick_precision(PRECISION, device, CHECKPOINT if RESUME else "")
    # DataParallel: autocast in its threads ignores bfloat16 and uses float16
    if gpus > 1 and dtype == torch.bfloat16:
        dtype = torch.float16
        print("float16 instead of bfloat16, because DataParallel cannot use bfloat16")
    stop = utils.catch_stop_signals(MAX_HOURS)
    stem = CHECKPOINT.removesuffix(".pt")

    # data
    train_set = imagenet_dataset(DATA_DIR, "train", IMAGE_SIZE, augment=True, crop_scale=CROP_SCALE)
    classes = train_set.classes
    val_set = imagenet_dataset(DATA_DIR, "val", IMAGE_SIZE, augment=False, train_set=train_set)
    train_set.broken_list = val_set.broken_list = f"{stem}_broken.txt" if BROKEN_IMAGES == "skip" else ""
    loading = utils.loader_options(NUM_WORKERS, device) | {"collate_fn": collate}
    val_loader = DataLoader(val_set, BATCH_SIZE, **loading)
    steps = steps_per_epoch(len(train_set), BATCH_SIZE, SUBDIVISIONS)
    total_steps = EPOCHS * steps
    utils.print_long_burn_in(BURN_IN, total_steps)
    batches_from = functools.partial(training_batches, len(train_set), BATCH_SIZE, SUBDIVISIONS, [IMAGE_SIZE], SEED)

    # model, optimiser
    model = darknet_model.Darknet19(len(classes))
    darknet_model.add_identity(model, IDENTITY_INIT)
    model.to(device, memory_format=torch.channels_last)
    if RESUME_WEIGHTS and not RESUME:
        darknet_model.load_classifier(model, RESUME_WEIGHTS, classes)
    network = model  # what the loop calls; shares the weights of model
    if COMPILE:
        network = torch.compile(network)
    # DataParallel: batch norm sees one GPU's share of the batch, and the running statistics are those of the first GPU.
    # The wrapper uses every GPU that PyTorch sees, so DEVICE=cpu leaves it out; without GPUs it only calls the model.
    if gpus > 0 or not torch.cuda.is_available():
        network = torch.nn.DataParallel(network)
    groups = utils.parameter_groups(model, WEIGHT_DECAY)
    fused = None if dtype == torch.float16 else True  # GradScaler would leave the inf check to a fused optimiser
    optimizer = torch.optim.SGD(groups, LEARNING_RATE, momentum=MOMENTUM, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    if EPOCHS == 0:  # no training, only the scores of RESUME_WEIGHTS
        val_sums = validate(model, val_loader, device, dtype, stop)
        utils.print_scores(val_sums, stop)
        return

    # the run's position, one row of metrics per finished epoch, and this epoch's sums: loss, top-1 hits, images
    state = {"epoch": 0, "step": 0, "images_seen": 0, "best": -1.0, "metrics": []}
    state["sums"] = torch.zeros(3, dtype=torch.float64)
    settings = utils.script_settings(globals()) | {"PRECISION": str(dtype), "classes": classes}
    settings["training images"] = utils.fingerprint(train_set.samples)
    metadata = {"classes": classes, "image_size": IMAGE_SIZE, "settings": settings}
    utils.lock_run(CHECKPOINT)
    if RESUME:
        state = utils.resume(CHECKPOINT, model, optimizer, scaler, settings, FIXED)
        utils.write_metrics(stem, state["metrics"])  # the last run may have died before it wrote them
    else:
        utils.keep_earlier_run(CHECKPOINT, RESUME_WEIGHTS)

    def save():
        optimizing = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        utils.save_checkpoint(CHECKPOINT, model=model.state_dict(), **optimizing, **state, **metadata)

    counts = f"{len(train_set)} training and {len(val_set)} validation images of {len(classes)} classes"
    print(f"{counts} on {utils.device_text(device)}, {dtype}")
    data = iter(DataLoader(train_set, batch_sampler=batches_from(state["step"]), **loading))
    bar = tqdm(total=total_steps, initial=state["step"], unit="step", disable=None)
    schedule = (total_steps, LEARNING_RATE, LR_SCHEDULE, BURN_IN, LR_POWER, [drop * steps for drop in LR_DROPS])
    first_step = state["step"]
    run_start = time.monotonic()
    last_save = time.monotonic()
    stopping = False
    while state["epoch"] < EPOCHS:
        images_before = state["images_seen"]
        epoch_start = time.monotonic()
        model.train()
        while state["step"] < (state["epoch"] + 1) * steps and not stopping:
            rate = utils.learning_rate_at(state["step"], *schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            utils.warm_batch_norm(network, state["step"] * SUBDIVISIONS)  # a larger momentum at first, then .01

            step_sums = torch.zeros(3, device=device)
            for part in range(SUBDIVISIONS):  # gradient accumulation
                images, labels = next(data)  # uint8; the network divides by 255 (as_input)
                images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
                labels = labels.to(device, non_blocking=True)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits = network(images)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
                scaler.scale(loss / SUBDIVISIONS).backward()
                correct = (logits.argmax(dim=1) == labels).sum()
                step_sums += torch.stack([loss.detach() * len(images), correct, torch.full_like(correct, len(images))])

            norm = get_total_norm([parameter.grad for parameter in model.parameters()])
            values = torch.cat([step_sums, norm[None]]).cpu().double()  # one transfer for all of them
            if problem := utils.problem_of_step(("cross-entropy",), values[[0, -1]], scaler):
                files = files_of_step(train_set.samples, batches_from(state["step"]), SUBDIVISIONS)
                raise ValueError(utils.divergence_message(problem, state, files, CHECKPOINT))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state["sums"] += values[:3]
            state["images_seen"] += min(BATCH_SIZE, len(train_set))
            state["step"] += 1
            utils.advance(bar, state["images_seen"] - images_before, epoch_start, values[0] / values[2])
            if time.monotonic() - last_save >= 60 * SAVE_EVERY_MINUTES:
                save()
                last_save = time.monotonic()
            stopping = utils.should_stop(stop)

        images = state["images_seen"] - images_before  # none if this process resumed at the end of an epoch
        speed = images / (time.monotonic() - epoch_start) if images else None
        if not stopping:
            save()  # so that a failing evaluation loses no training
            val_sums = validate(model, val_loader, device, dtype, stop)
            stopping = utils.should_stop(stop)
        if stopping:
            save()
            utils.report_stop(bar, stop, state, CHECKPOINT)
            return

        loss, train_top1 = (state["sums"][:2] / state["sums"][2]).tolist()
        val_loss, val_top1, val_top5 = (val_sums[:3] / val_sums[3]).tolist()
        row = {"epoch": state["epoch"] + 1, "learning_rate": optimizer.param_groups[0]["lr"]}
        row |= {"loss": loss, "val_loss": val_loss, "images_per_second": speed}
        row |= {"train_top1": train_top1, "val_top1": val_top1, "val_top5": val_top5}
        state["epoch"] += 1
        state["sums"].zero_()
        state["metrics"].append(row)
        if not val_top1 < state["best"]:  # if it is NaN (no readable image), the last network is the best
            state["best"] = val_top1
            utils.save_checkpoint(f"{stem}_best.pt", model=model.state_dict(), **state, **metadata)
        save()  # after the best network: if the run dies in between, RESUME repeats the end of the epoch
        utils.write_metrics(stem, state["metrics"])
        bar.clear()
        utils.print_epoch(row, utils.time_left(run_start, state["step"] - first_step, total_steps - state["step"]))
    utils.finish(bar, train_set.broken_list)


if __name__ == "__main__":
    with utils.plain_errors():
        utils.override_globals(globals(), sys.argv[1:])
        main()
