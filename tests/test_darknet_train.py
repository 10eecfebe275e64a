"""Pre-training of Darknet-19: the three scripts, their interchangeable checkpoints, and the ImageNet data set."""

import ast
import difflib
import functools
import os
import random
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import run_narrow
import torch
from conftest import set_globals
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import darknet_model
import darknet_train
import darknet_train_multigpu
import darknet_train_multigpu_distr
import train
import utils
from dataset import ImageNetFolder, imagenet_dataset, steps_per_epoch
from model import YOLOv2, load_pretrained_backbone

pytestmark = pytest.mark.usefixtures("narrow_module", "fork_server")

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data_samples" / "imagenet"
SCRIPTS = [darknet_train, darknet_train_multigpu, darknet_train_multigpu_distr]


def set_small(monkeypatch, script, folder, **values):
    """Settings of a short run."""
    small = {"DATA_DIR": str(SAMPLE), "IMAGE_SIZE": 32, "EPOCHS": 1, "NUM_WORKERS": 0, "PRECISION": "fp32"}
    set_globals(monkeypatch, script, CHECKPOINT=str(folder / "darknet19.pt"), **(small | values))


# ---------------------------------------------------------------- the three files


def read_lines(source):
    """The code of a script from its first setting on, without the section of DDP-only functions -> lines without their
    comments, and for each whether a comment that begins with "# DataParallel:" or "# DDP:" stands directly above it."""
    source = source[source.index("\n# data\n") :]
    source = re.sub(r"\n# -+ DDP: several processes\n.*?(?=\ndef main\(\):)", "", source, flags=re.DOTALL)
    lines, reasons, reason = [], [], False
    for line in source.splitlines():
        code, _, comment = re.sub(r"(^| +)# ", "\0", line).partition("\0")
        if code:
            lines.append(code)
            reasons.append(reason)
        # the comment may continue on the next line
        reason = not code and bool(comment) and (reason or comment.startswith(("DataParallel: ", "DDP: ")))
    return lines, reasons


def compare(shorter, longer):
    """-> the differences between two scripts' lines that do not begin under a comment with their reason."""
    (old, _), (new, reasons) = read_lines(shorter), read_lines(longer)
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    differing = [block for block in blocks if block[0] != "equal"]
    return [old[i:i_end] + new[j:j_end] for _, i, i_end, j, j_end in differing if j == j_end or not reasons[j]]


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_the_multi_gpu_scripts_differ_from_darknet_train_in_explained_lines_only(script):
    one, several = (Path(module.__file__).read_text() for module in (darknet_train, script))
    assert len(read_lines(several)[0]) > len(read_lines(one)[0]) > 100 and compare(one, several) == []
    step, seen = "            scaler.step(optimizer)\n", '            state["step"] += 1\n'
    assert several.count(step) == several.count(seen) == 1
    # compare() must find each of these changes, and every reason that is missing
    assert compare(one, several.replace(step, step.replace("scaler", "optimizer")))
    assert compare(one, several.replace(step, ""))
    assert compare(one, several.replace(step, step[4:]))  # outside the loop
    assert compare(one, several.replace(seen, f"{seen}            # here too\n            bar.refresh()\n"))
    assert len(compare(one, re.sub("# (DataParallel|DDP): ", "# ", several))) >= 3


def test_darknet_train_does_not_mention_multiple_gpus():
    words = "DDP|Distributed|DataParallel|no_sync|rank|world|multigpu|torchrun|all_reduce|several GPUs"
    assert re.findall(words, Path(darknet_train.__file__).read_text(), re.IGNORECASE) == []


def test_the_settings_are_the_same_except_for_sync_batch_norm():
    names = [{name for name in vars(script) if name.isupper() and len(name) > 1} for script in SCRIPTS]
    assert names[0] == names[1]
    assert names[2] - names[0] == {"SYNC_BATCH_NORM"} and names[0] <= names[2]


# ---------------------------------------------------------------- runs


def test_the_scripts_train_the_same_weights_and_resume_each_others_checkpoints(tmp_path, monkeypatch, capsys):
    states = []
    for script in SCRIPTS:
        folder = tmp_path / script.__name__
        set_small(monkeypatch, script, folder, SUBDIVISIONS=2, MOMENTUM=0.8, WEIGHT_DECAY=1e-3)
        script.main()
        assert "epoch 1  learning_rate" in capsys.readouterr().out
        for name in ("darknet19.pt", "darknet19_best.pt", "darknet19_metrics.csv", "darknet19_charts.png"):
            assert (folder / name).is_file()
        states.append(utils.load_checkpoint(folder / "darknet19.pt"))
        assert len(states[-1]["classes"]) == 5 and states[-1]["epoch"] == 1
        groups = states[-1]["optimizer"]["param_groups"]  # kernels, then biases and batch norm
        assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.8, 1e-3), (0.8, 0.0)]
        assert load_pretrained_backbone(YOLOv2(), folder / "darknet19_best.pt") == 18
    for state in states[1:]:
        assert all(torch.equal(tensor, state["model"][name]) for name, tensor in states[0]["model"].items())

    monkeypatch.setattr(utils, "draw_charts", lambda rows, chart_file: None)  # charts were checked above
    for script, other in zip(SCRIPTS, [*SCRIPTS[1:], SCRIPTS[0]], strict=True):
        set_small(monkeypatch, other, tmp_path / script.__name__, EPOCHS=2, RESUME=True, SUBDIVISIONS=2)
        other.main()
        assert "after epoch 1, step 3" in capsys.readouterr().out
        states.append(utils.load_checkpoint(tmp_path / script.__name__ / "darknet19.pt"))
    for state in states[4:]:
        assert all(torch.equal(tensor, state["model"][name]) for name, tensor in states[3]["model"].items())


def set_run(monkeypatch, script, folder, **values):
    """Settings of a short run of train.py, 2 steps per epoch, or of darknet_train.py, 3 steps per epoch."""
    data = {"BURN_IN": 0}
    if script is train:
        data |= {"DATA_DIR": str(SAMPLE.parent / "voc"), "IMAGE_SETS": [("2007", "tiny")], "REPEAT": 1}
        data |= {"EVAL_TRAIN_IMAGES": 1, "EVAL_THRESHOLD": 0.99, "BATCH_SIZE": 8}
    set_small(monkeypatch, script, folder, **(data | values))


@pytest.mark.parametrize("script", [train, darknet_train])
@pytest.mark.parametrize("precision, dtype, fused", [("bf16", torch.bfloat16, True), ("fp16", torch.float16, None)])
def test_training_and_evaluation_compute_in_the_precision_of_the_setting(
    script, precision, dtype, fused, tmp_path, monkeypatch, no_charts
):
    """A fused optimiser would step on infinite gradients without GradScaler's check beside it."""
    seen, optimisers = set(), []

    def see(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d):
            seen.add((module.training, output.dtype))

    set_run(monkeypatch, script, tmp_path, PRECISION=precision)
    name = "AdamW" if script is train else "SGD"
    make = getattr(torch.optim, name)
    monkeypatch.setattr(torch.optim, name, lambda *args, **kw: optimisers.append(kw["fused"]) or make(*args, **kw))
    hook = torch.nn.modules.module.register_module_forward_hook(see)
    try:
        script.main()
    finally:
        hook.remove()
    assert seen == {(True, dtype), (False, dtype)} and optimisers == [fused]


class NoFloat64(TorchDispatchMode):
    """Stands in for Apple's GPU (mps): refuses float64 in operations on `tensors` and on what is computed from them."""

    tensors = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        inputs, outputs = ([t for t in tree_leaves(x) if torch.is_tensor(t)] for x in ((args, kwargs), results))
        if any(tensor in self.tensors for tensor in inputs):
            if torch.float64 in {tensor.dtype for tensor in inputs + outputs}:
                raise TypeError(f"{function} on mps: no float64")
            self.tensors.update((tensor, True) for tensor in outputs)
        return results


@pytest.mark.parametrize("script", [train, darknet_train])
def test_a_device_without_float64_trains_and_evaluates(script, tmp_path, monkeypatch, no_charts):
    device = NoFloat64()

    def to(module, *args, original=torch.nn.Module.to, **kwargs):
        module = original(module, *args, **kwargs)
        device.tensors.update((tensor, True) for tensor in [*module.parameters(), *module.buffers()])
        return module

    def cpu(tensor):
        copied = tensor.clone()
        device.tensors.pop(copied, None)
        return copied

    set_run(monkeypatch, script, tmp_path)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    with device:
        script.main()
        with pytest.raises(TypeError, match="float64"):
            torch.nn.Conv2d(1, 1, 1).to("cpu").weight.double()
    assert utils.load_checkpoint(tmp_path / "darknet19.pt")["sums"].dtype == torch.float64


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_epochs_only_validate_the_given_weights(script, tmp_path, monkeypatch, capsys, no_charts):
    set_small(monkeypatch, darknet_train, tmp_path / "trained")
    darknet_train.main()
    weights = tmp_path / "trained" / "darknet19.pt"
    row = utils.load_checkpoint(weights)["metrics"][-1]
    set_small(monkeypatch, script, tmp_path / "new", EPOCHS=0, RESUME_WEIGHTS=str(weights))
    script.main()
    names = ("val_loss", "val_top1", "val_top5")
    assert capsys.readouterr().out.split()[-8:] == [
        *(word for name in names for word in (name, f"{row[name]:.4g}")), "val_images", "5"
    ]  # fmt: skip
    assert os.listdir(tmp_path / "new") == []  # no run has begun
    monkeypatch.setattr(script, "RESUME_WEIGHTS", "")
    with pytest.raises(ValueError, match="EPOCHS=0 .*RESUME_WEIGHTS"):
        script.main()


@pytest.mark.parametrize("script", [train, darknet_train])
def test_the_rate_falls_over_all_steps_of_all_epochs(script, tmp_path, monkeypatch, no_charts):
    schedule = {"EPOCHS": 2, "LEARNING_RATE": 0.04, "LR_SCHEDULE": "polynomial", "LR_POWER": 2.0}
    set_run(monkeypatch, script, tmp_path, **schedule)
    script.main()
    rows = utils.load_checkpoint(tmp_path / "darknet19.pt")["metrics"]
    # Darknet's poly, (1 - update / all updates)^power: one half squared after the first epoch, 0 after the second
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01, 0.0])


@pytest.mark.parametrize("script, steps", [(train, 2), (darknet_train, 3)])
def test_the_momentum_of_batch_norm_counts_forward_passes(script, steps, tmp_path, monkeypatch, no_charts):
    passes = []
    monkeypatch.setattr(utils, "warm_batch_norm", lambda model, batches_seen: passes.append(batches_seen))
    set_run(monkeypatch, script, tmp_path, SUBDIVISIONS=2)
    script.main()
    assert passes == [2 * step for step in range(steps)]


def test_a_clip_norm_below_one_limits_the_gradient_of_every_step(tmp_path, monkeypatch, no_charts):
    norms = []

    def measure(optimizer, arguments, options):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    set_run(monkeypatch, train, tmp_path, CLIP_NORM=0.01)
    hook = register_optimizer_step_pre_hook(measure)
    try:
        train.main()
    finally:
        hook.remove()
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_resume_weights_starts_a_new_run_from_the_weights_alone(tmp_path, monkeypatch, no_charts):
    set_small(monkeypatch, darknet_train, tmp_path)
    darknet_train.main()
    first = utils.load_checkpoint(tmp_path / "darknet19.pt")["model"]
    changes = {"IMAGE_SIZE": 64, "RESUME_WEIGHTS": str(tmp_path / "darknet19.pt"), "LEARNING_RATE": 0.0}
    set_small(monkeypatch, darknet_train, tmp_path, **changes)
    darknet_train.main()
    second = utils.load_checkpoint(tmp_path / "darknet19.pt")
    assert second["epoch"] == 1
    assert all(torch.equal(first[name], second["model"][name]) for name in first if name.endswith("weight"))


def test_identity_init_makes_new_layers_start_as_a_scaled_identity(tmp_path, monkeypatch, no_charts):
    model = darknet_model.Darknet19(5)
    kernels = [module.weight for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    drawn = [kernel.detach().clone() for kernel in kernels]
    darknet_model.add_identity(model, 0.0)
    assert all(torch.equal(kernel, before) for kernel, before in zip(kernels, drawn, strict=True))
    for kernel in kernels:
        torch.nn.init.zeros_(kernel)
    darknet_model.add_identity(model, 3.0)
    assert not kernels[0].any() and not kernels[-1].any()  # the first and the last layer get no identity
    few, many = kernels[1].shape[1], kernels[1].shape[0]  # 3x3; 32 -> 64 at full width
    images = torch.rand(2, few, 4, 4)
    wide = torch.nn.functional.conv2d(images, kernels[1], padding=1)
    assert many == 2 * few and torch.equal(wide, 3 * torch.cat([images, images], dim=1))
    many, few = kernels[3].shape[1], kernels[3].shape[0]  # 1x1; 128 -> 64
    images = torch.rand(2, many, 4, 4)
    assert many == 2 * few and torch.equal(torch.nn.functional.conv2d(images, kernels[3]), 3 * images[:, :few])

    for script in SCRIPTS:  # with a rate of 0 the checkpoint holds the initial weights
        set_small(monkeypatch, script, tmp_path / script.__name__, LEARNING_RATE=0.0, IDENTITY_INIT=2.0)
        script.main()
        weight = utils.load_checkpoint(tmp_path / script.__name__ / "darknet19.pt")["model"]["features.22.0.weight"]
        outputs, inputs = weight.shape[:2]  # 3x3; 512 -> 1024
        centre = weight[torch.arange(outputs), torch.arange(outputs) % inputs, 1, 1]
        assert 1.9 < float(centre.mean()) < 2.1 and abs(float(weight[:, :, 0, 0].mean())) < 0.1


def test_fp16_scales_its_gradients_and_skips_steps_that_overflow(tmp_path, monkeypatch, no_charts):
    set_small(monkeypatch, darknet_train, tmp_path, PRECISION="fp16", EPOCHS=2, BURN_IN=2)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**40))
    darknet_train.main()
    state = utils.load_checkpoint(tmp_path / "darknet19.pt")
    assert state["scaler"]["scale"] < 2.0**40  # steps were skipped
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


@pytest.mark.parametrize("script", [train, darknet_train, darknet_train_multigpu_distr])
def test_compiled_steps_move_the_weights_as_plain_ones(script, tmp_path, monkeypatch, no_charts):
    """With gradient accumulation; the backend "eager" runs the compiled graphs without code generation. Running
    statistics differ, because a compiled model keeps momentum .01 (utils.warm_batch_norm)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    weights = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        set_run(monkeypatch, script, folder, COMPILE=compiled, BATCH_SIZE=6, SUBDIVISIONS=2)
        script.main()
        weights.append(utils.load_checkpoint(folder / "darknet19.pt")["model"])
    for name, weight in weights[0].items():
        if "running" not in name:
            torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6, msg=name)


def count_validation_images(rank, folder):
    """One of three processes; writes the number of validation images that it counted, and the total, to a file."""
    run_narrow.narrow()
    script, counts, totals = darknet_train_multigpu_distr, [], []
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=3)
    values = {"DATA_DIR": str(SAMPLE), "IMAGE_SIZE": 32, "EPOCHS": 1, "NUM_WORKERS": 0, "PRECISION": "fp32"}
    vars(script).update(values | {"CHECKPOINT": f"{folder}/d.pt"})

    def validate(*arguments, original=script.validate):
        sums = original(*arguments)
        counts.append(int(sums[3]))
        return sums

    def all_reduce(tensor, *arguments, original=torch.distributed.all_reduce):
        original(tensor, *arguments)
        if len(counts) > len(totals):  # the first sum after the validation
            totals.append(int(tensor[3]))

    script.validate, torch.distributed.all_reduce = validate, all_reduce
    script.main()
    Path(folder, f"{rank}.txt").write_text(f"{counts[0]} {totals[0]}")
    torch.distributed.destroy_process_group()


def test_three_processes_count_every_validation_image_once(tmp_path):
    """5 images: 2 + 2 + 1."""
    run_narrow.run_processes(count_validation_images, 3, str(tmp_path))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)] == ["2 5", "2 5", "1 5"]


def test_a_broken_validation_image_is_not_counted(tmp_path, monkeypatch, no_charts):
    data = tmp_path / "data"
    shutil.copytree(SAMPLE, data)
    broken = next((data / "val").rglob("*.JPEG"))
    broken.write_bytes(b"no image")
    set_small(monkeypatch, darknet_train, tmp_path, DATA_DIR=str(data), BROKEN_IMAGES="skip")
    seen = []

    def validate(*arguments, original=darknet_train.validate):
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(darknet_train, "validate", validate)
    darknet_train.main()
    assert int(seen[0][3]) == 4 and 0 < seen[0][0] < 100
    assert broken.name in (tmp_path / "darknet19_broken.txt").read_text()


@pytest.mark.parametrize("index", [0, 1])
def test_data_parallel_refuses_a_device_setting_for_a_single_gpu(index, tmp_path, monkeypatch):
    set_small(monkeypatch, darknet_train_multigpu, tmp_path)
    monkeypatch.setattr(utils, "pick_device", lambda name: torch.device("cuda", index))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *arguments, **options: self)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        darknet_train_multigpu.main()


def test_torchrun_refuses_a_device_setting_for_a_single_gpu(monkeypatch):
    monkeypatch.setattr(utils, "pick_device", lambda name: torch.device("cuda:1"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        darknet_train_multigpu_distr.join_processes()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"BATCH_SIZE": 6}, "6 images .*BATCH_SIZE .* 4 GPUs"),
        ({"BATCH_SIZE": 12, "SUBDIVISIONS": 2}, "6 images .*SUBDIVISIONS.* 4 GPUs"),
        ({"BATCH_SIZE": 8, "COMPILE": True}, "COMPILE"),
    ],
)
def test_data_parallel_refuses_settings_that_four_gpus_do_not_support(setting, message, tmp_path, monkeypatch):
    set_small(monkeypatch, darknet_train_multigpu, tmp_path, **setting)
    monkeypatch.setattr(utils, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=message):
        darknet_train_multigpu.main()


def test_a_batch_that_cannot_be_split_evenly_is_refused(tmp_path, monkeypatch):
    script = darknet_train_multigpu_distr
    set_small(monkeypatch, script, tmp_path, BATCH_SIZE=5)
    monkeypatch.setattr(script, "join_processes", lambda: torch.device("cpu"))
    monkeypatch.setattr(script.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(script.dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="BATCH_SIZE .* 5 images .* 2 processes"):
        script.main()


@pytest.mark.parametrize("script", SCRIPTS)
def test_image_sizes_need_not_be_multiples_of_32_and_huge_rates_are_refused(tmp_path, monkeypatch, script):
    set_small(monkeypatch, script, tmp_path, IMAGE_SIZE=33)  # a classifier has no grid
    script.check_settings()
    set_small(monkeypatch, script, tmp_path, LEARNING_RATE=1e13)
    with pytest.raises(ValueError, match="^LEARNING_RATE .*1"):
        script.main()


def test_restarts_over_several_machines_are_refused(monkeypatch):
    """Their torchruns count restarts apart: the processes would wait for each other."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--max-restarts .*RESUME"):
        darknet_train_multigpu_distr.join_processes()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(utils, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="process 1 .*--nproc_per_node .* 1 "):
        darknet_train_multigpu_distr.main()


def test_bad_folders_and_checkpoints_are_refused_by_name(tmp_path, monkeypatch, no_charts):
    with pytest.raises(FileNotFoundError, match="train"):
        imagenet_dataset(tmp_path, "train", 64, augment=False)
    (tmp_path / "val").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="class folders"):
        imagenet_dataset(tmp_path, "val", 64, augment=False)

    odd = tmp_path / "odd"
    for split, names in (("train", ("a", "b")), ("val", ("a", "c"))):
        for name in names:
            (odd / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(odd / split / name / "x.jpg")
    set_small(monkeypatch, darknet_train, tmp_path, DATA_DIR=str(odd))
    with pytest.raises(ValueError, match=f"{odd}: .*b, c"):
        darknet_train.main()

    utils.save_checkpoint(tmp_path / "three.pt", model=darknet_model.Darknet19(3).state_dict())
    set_small(monkeypatch, darknet_train, tmp_path, RESUME_WEIGHTS=str(tmp_path / "three.pt"))
    with pytest.raises(ValueError, match="three.pt.*3 classes, not 5") as error:
        darknet_train.main()
    classes = darknet_train.imagenet_dataset(darknet_train.DATA_DIR, "train", 32, augment=False).classes
    state = {"model": darknet_model.Darknet19(5).state_dict(), "classes": classes[::-1]}
    utils.save_checkpoint(tmp_path / "reversed.pt", **state)
    set_small(monkeypatch, darknet_train, tmp_path, RESUME_WEIGHTS=str(tmp_path / "reversed.pt"))
    with pytest.raises(ValueError, match="reversed.pt: was trained on other classes, or in another order"):
        darknet_train.main()
    command = shlex.split(str(error.value).partition("conv.23: ")[2])  # the command in the message exports the backbone
    assert command[:2] == ["python", "darknet_model.py"]
    monkeypatch.chdir(tmp_path)
    for word in command[2:]:
        monkeypatch.setattr(darknet_model, *word.split("="))
    darknet_model.main()
    set_small(monkeypatch, darknet_train, tmp_path, RESUME_WEIGHTS=str(tmp_path / "backbone.conv.23"))
    darknet_train.main()


def test_validation_crops_the_centre_square_and_training_crops_depend_on_the_seed(tmp_path):
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[:, 30:90] = 255  # the centre square is white
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / folder / "x.png")
    Image.fromarray(pixels[..., 0]).convert("CMYK").save(tmp_path / "val" / "a" / "cmyk.jpg")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "val" / "a" / "grey.png")
    val = imagenet_dataset(tmp_path, "val", 60, augment=False)
    assert len(val) == 4
    for index in range(3):
        image, label = val[index]
        assert image.shape == (3, 60, 60) and label == 0 and image.float().mean() > 250
    train = imagenet_dataset(tmp_path, "train", 32, augment=True)
    assert isinstance(train, ImageNetFolder)
    one, again, other = (train[(0, 32, seed)][0] for seed in (5, 5, 6))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert train[(0, 64, 1)][0].shape == (3, 64, 64)


def test_the_crop_scale_sets_how_much_of_an_image_a_crop_shows(tmp_path):
    """32 black and white stripes of 8 pixels: full-size crops show at least 21 edges, crops of a quarter
    of the side at most 12."""
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[:, np.arange(256) // 8 % 2 == 1] = 255
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "train" / name / "x.png")

    def edges(crop_scale):
        data = imagenet_dataset(tmp_path, "train", 128, augment=True, crop_scale=crop_scale)
        rows = [data[(0, 128, seed)][0].float().mean(dim=0)[64] > 100 for seed in range(10)]  # the middle row of a crop
        return [int((row[1:] != row[:-1]).sum()) for row in rows]

    assert min(edges((1, 1))) >= 21 and max(edges((4, 4))) <= 12
    assert len(set(edges((1, 4)))) > 4
    with pytest.raises(ValueError, match="CROP_SCALE.*two increasing numbers"):
        edges((2, 1))


def test_crops_are_scaled_turned_and_placed_in_the_ranges_of_darknet19_cfg():
    """Input 256, min_crop 128, max_crop 448: the image is scaled per axis, then turned without being sheared or
    mirrored, and its centre lies off the crop's by at most half of what the scaled image is larger (or smaller)."""
    data = imagenet_dataset(SAMPLE, "train", 256, augment=True)
    assert data[0][0].shape == (3, 256, 256)  # makes the transforms
    crop = data.transforms[256].transforms[0]
    crop.set_random_state(np.random.default_rng(0), random.Random(0))
    image = {"shape": (300, 500, 3)}
    maps = np.array([crop.get_params_dependent_on_data(image, {})["matrix"] for _ in range(2000)])  # (2000, 2, 3)
    scales = np.linalg.norm(maps[:, :, :2], axis=1)  # (2000, 2): of x and y
    np.testing.assert_allclose(np.linalg.det(maps[:, :, :2]), scales.prod(axis=1))  # right angles stay right angles
    sides = scales * [500, 300]
    offsets = (maps @ [250, 150, 1] - 128) / (np.abs(sides - 256) / 2)
    for values, low, high in ((sides.min(axis=1), 128, 448), (offsets[:, 0], -1, 1), (offsets[:, 1], -1, 1)):
        slack = 0.01 * (high - low)
        assert low - 1e-6 <= values.min() < low + slack and high - slack < values.max() <= high + 1e-6


def test_images_that_just_fill_a_batch_are_one_step_with_any_number_of_subdivisions():
    assert [steps_per_epoch(8, 8, subdivisions) for subdivisions in (1, 2, 8)] == [1, 1, 1]


def test_scripts_do_not_import_each_other():
    scripts = {"train", "test", "detect", "detect_txt", *(script.__name__ for script in SCRIPTS)}
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not scripts & set(names), file.name
