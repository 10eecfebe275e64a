"""Pre-training of Darknet-19: the three scripts, their exchangeable checkpoints, and the ImageNet data set."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import darknet_train
import darknet_train_multigpu
import darknet_train_multigpu_distr
import utils
from dataset import ImageNetFolder, imagenet_dataset
from model import YOLOv2, load_pretrained_backbone

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data_samples" / "imagenet"
SCRIPTS = [darknet_train, darknet_train_multigpu, darknet_train_multigpu_distr]


def set_small(monkeypatch, script, folder, **values):
    small = {"IMAGE_SIZE": 32, "EPOCHS": 1, "NUM_WORKERS": 0, "PRECISION": "fp32", "CHECKPOINT": str(folder / "darknet19.pt")}
    for name, value in ({"DATA_DIR": str(SAMPLE)} | small | values).items():
        monkeypatch.setattr(script, name, value)


def test_the_loops_are_the_same_to_the_letter():
    for name in ("train_one_epoch", "validate"):
        sources = {inspect.getsource(getattr(script, name)) for script in SCRIPTS}
        assert len(sources) == 1, name


def test_the_globals_are_the_same_but_for_the_explained_ones():
    names = [{name for name in vars(script) if name.isupper() and len(name) > 1} for script in SCRIPTS]
    assert names[0] == names[1]
    assert names[2] - names[0] == {"SYNC_BATCH_NORM"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_each_script_trains_and_its_checkpoint_serves_the_others(script, tmp_path, monkeypatch, capsys):
    set_small(monkeypatch, script, tmp_path, SUBDIVISIONS=2)
    script.main()
    assert "epoch 1  learning_rate" in capsys.readouterr().out
    for name in ("darknet19.pt", "darknet19_best.pt", "darknet19_metrics.csv", "darknet19_charts.png"):
        assert (tmp_path / name).is_file()
    state = utils.load_checkpoint(tmp_path / "darknet19.pt")
    assert len(state["classes"]) == 5 and state["epoch"] == 1 and not any(name.startswith("module.") for name in state["model"])

    for other in SCRIPTS:
        if other is not script:
            set_small(monkeypatch, other, tmp_path, EPOCHS=2, RESUME=True, SUBDIVISIONS=2)
            other.main()
            assert "after epoch 1" in capsys.readouterr().out
            break
    model = YOLOv2()
    assert load_pretrained_backbone(model, tmp_path / "darknet19_best.pt") == 18


def test_a_second_stage_starts_from_the_weights_alone(tmp_path, monkeypatch, capsys):
    set_small(monkeypatch, darknet_train, tmp_path)
    darknet_train.main()
    set_small(monkeypatch, darknet_train, tmp_path, IMAGE_SIZE=64, RESUME_WEIGHTS=str(tmp_path / "darknet19.pt"), LEARNING_RATE=0.0)
    darknet_train.main()
    assert utils.load_checkpoint(tmp_path / "darknet19.pt")["epoch"] == 1


def run_torchrun(folder, words, processes=2, options=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", *options]
    script = str(ROOT / "darknet_train_multigpu_distr.py")
    return subprocess.run([*command, script, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_two_processes_train_together_and_count_every_image_once(tmp_path):
    """5 validation images and 2 processes: 3 + 2, none twice; 18 training images in 3 batches of 6."""
    words = [f"DATA_DIR={SAMPLE}", "IMAGE_SIZE=32", "EPOCHS=1", "NUM_WORKERS=0", f"CHECKPOINT={tmp_path}/d.pt", "PRECISION=fp32"]
    result = run_torchrun(tmp_path, words)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("epoch 1  learning_rate") == 1  # the first process alone prints
    assert utils.load_checkpoint(tmp_path / "d.pt")["images_seen"] == 18
    top1 = float((tmp_path / "d_metrics.csv").read_text().splitlines()[1].split(",")[-2])
    assert min(abs(top1 - right / 5) for right in range(6)) < 1e-5  # a multiple of 1/5: 5 images were counted


def test_an_uneven_batch_is_one_sentence(tmp_path, monkeypatch):
    set_small(monkeypatch, darknet_train_multigpu_distr, tmp_path, BATCH_SIZE=5)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="2 processes"):
        darknet_train_multigpu_distr.train(0, 2, torch.device("cpu"))


def test_more_processes_than_gpus_is_one_sentence(monkeypatch):
    monkeypatch.setattr(utils, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="process 1 has no GPU: --nproc_per_node may be 1"):
        darknet_train_multigpu_distr.main()


def test_bad_folders_and_checkpoints_are_one_sentence(tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match="different class folders.*b, c"):
        darknet_train.main()

    utils.save_checkpoint(tmp_path / "three.pt", model=darknet_train.darknet_model.Darknet19(3).state_dict())
    set_small(monkeypatch, darknet_train, tmp_path, RESUME_WEIGHTS=str(tmp_path / "three.pt"))
    with pytest.raises(ValueError, match="three.pt.*3 classes, not 5"):
        darknet_train.main()


def test_validation_takes_the_centre_square_and_training_is_seeded(tmp_path):
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[:, 30:90] = 255  # the centre square is white
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a" / "x.png")
    Image.fromarray(pixels[..., 0]).convert("CMYK").save(tmp_path / "val" / "a" / "cmyk.jpg")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "val" / "a" / "grey.png")
    val = imagenet_dataset(tmp_path, "val", 60, augment=False)
    assert len(val) == 3
    for index in range(3):
        image, label = val[index]
        assert image.shape == (3, 60, 60) and label == 0 and image.mean() > 0.98
    train = imagenet_dataset(tmp_path, "train", 32, augment=True)
    assert isinstance(train, ImageNetFolder)
    one, again, other = (train[(0, 32, seed)][0] for seed in (5, 5, 6))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert train[(0, 64, 1)][0].shape == (3, 64, 64)


def test_no_script_imports_a_script():
    scripts = {"train", "test", "detect", "detect_txt", *(script.__name__ for script in SCRIPTS)}
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not scripts & set(names), file.name
