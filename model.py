"""YOLOv2: the Darknet-19 backbone with a detection head (YOLO9000 sec. 2, yolov2-voc.cfg).

    python model.py                                                        prints the layers
    python model.py CHECKPOINT=runs/yolov2.pt OUTPUT=runs/yolov2.weights   writes yolov2.weights, yolov2.cfg and
                                                                           yolov2.names for Darknet and OpenCV

Letters: N images, A anchors (5), S_h x S_w grid cells (13 x 13 at 416 x 416), C classes (20). Images are RGB, uint8
or in 0..1.
"""

import copy
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import utils
from darknet_model import (
    DARKNET19_LAYERS,
    OTHER_READERS,
    as_input,
    check_output,
    convolution,
    copy_convolutions,
    darknet19_features,
    darknet_tensors,
    initialise_kernels,
    layer_table,
    load_darknet_weights,
    open_darknet_file,
    save_darknet_weights,
)

CHECKPOINT = ""  # from train.py; "" for an untrained network with 20 classes
OUTPUT = ""  # Darknet file to write, .weights; its .cfg and .names are written beside it; "": print the layers
IMAGE_SIZE = None  # pixels, a multiple of 32; None for the checkpoint's own, 416 without a checkpoint


def check_settings():
    """Raises ValueError or OSError for an invalid setting."""
    utils.check_settings(globals())
    if OUTPUT:
        check_output(OUTPUT, CHECKPOINT)


# ---------------------------------------------------------------- the published detectors

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

COCO_CLASSES = (  # coco.names
    "person", "bicycle", "car", "motorbike", "aeroplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "sofa", "pottedplant", "bed", "diningtable", "toilet",
    "tvmonitor", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

# widths and heights of the five prior boxes p_w, p_h in grid cells, found by k-means: yolov2-voc.cfg, yolov2.cfg
ANCHORS = [(1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071)]
COCO_ANCHORS = [(0.57273, 0.677385), (1.87446, 2.06253), (3.33843, 5.47434), (7.88282, 3.52778), (9.77052, 9.16828)]
# outputs A (5 + C) per cell -> class names, anchors, image size of the cfg file: yolov2-voc.weights, yolov2.weights
KNOWN_DETECTORS = {125: (VOC_CLASSES, ANCHORS, 416), 425: (COCO_CLASSES, COCO_ANCHORS, 608)}


def read_classes(classes) -> list[str]:
    """Class names from a list, "voc" or "coco", a Darknet `.names` file (one per line), or the `names` of a data.yaml.
    Raises FileNotFoundError, or ValueError for names that utils.check_classes refuses."""
    if isinstance(classes, str):
        classes = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}.get(classes, classes)
    if not isinstance(classes, str):
        return utils.check_classes("CLASSES", list(classes))
    with utils.reading(classes, "file of class names", "CLASSES is a list of names, voc, coco, a .names or .yaml file"):
        text = utils.read_text(classes)
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if classes.lower().endswith((".yaml", ".yml")):
            names = yaml.load(text, yaml.BaseLoader)["names"]  # a list, or a dictionary of 0: name, 1: name, ...
            names = [names[str(index)] for index in range(len(names))] if isinstance(names, dict) else names
        if isinstance(names, str) or classes.lower().endswith((".data", ".cfg")):
            raise ValueError("it contains no list of names; Darknet's .data file names the file that does")
    return utils.check_classes(classes, names)


# ---------------------------------------------------------------- the network

STRIDE = 32  # pixels of the image per grid cell
# the layer before the last pool, the 13th convolution; its map is 26 x 26 (index 16, pools counted, as in route -9)
PASSTHROUGH = max(index for index, layer in enumerate(DARKNET19_LAYERS) if layer == "pool") - 1
LARGEST_SIZE = 9984  # pixels; the largest IMAGE_SIZE


def reorg(maps: Tensor, stride: int = 2) -> Tensor:
    """Darknet's reorg layer: (N, C, H, W) -> (N, 4C, H/2, W/2) at stride 2 (src/reorg_layer.c, as its forward pass
    calls it).

    It is not pixel_unshuffle: Darknet reads the (C, H, W) map as if it were (C/4, 2H, 2W), so an output channel mixes
    pixels of several channels and rows. The official weights need exactly this order.
    """
    n, c, h, w = maps.shape
    maps = maps.reshape(n, c // stride**2, h, stride, w, stride)  # (N, C/4, H, 2, W, 2): not the map's rows and columns
    maps = maps.permute(0, 3, 5, 1, 2, 4)  # (N, 2, 2, C/4, H, W)
    return maps.reshape(n, c * stride**2, h // stride, w // stride)  # the same numbers, read as (N, 4C, H/2, W/2)


class YOLOv2(nn.Module):
    """YOLOv2 as in yolov2-voc.cfg; its modules are registered in the order of the cfg, that of a Darknet file."""

    def __init__(self, num_classes: int = 20, num_anchors: int = 5):
        super().__init__()
        self.num_classes, self.num_anchors = num_classes, num_anchors
        fine_channels = DARKNET19_LAYERS[PASSTHROUGH][0]  # 512, of the 26 x 26 map
        channels = DARKNET19_LAYERS[-1][0]  # 1024, of the 13 x 13 maps
        self.features = darknet19_features()  # named as in Darknet19, whose weights are loaded here
        self.head = nn.Sequential(convolution(channels, channels, 3), convolution(channels, channels, 3))
        # takes the finer 26 x 26 map to the 13 x 13 one, for small objects: 512 -> 64 as in the cfg, which reorg makes
        # 256. Paper: reorg of all 512
        self.passthrough = convolution(fine_channels, fine_channels // 8, 1)
        self.merge = convolution(fine_channels // 8 * 4 + channels, channels, 3)
        self.output = nn.Conv2d(channels, num_anchors * (5 + num_classes), kernel_size=1)  # no batch norm or activation
        initialise_kernels(self)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) RGB in 0..1, or uint8 -> raw outputs (N, A, S_h, S_w, 5 + C): t_x, t_y, t_w, t_h, t_o,
        class logits; utils.decode_predictions turns them into boxes.

        Raises ValueError if height or width is not a multiple of 32.
        """
        n, _, h, w = images.shape
        if h % STRIDE or w % STRIDE:
            raise ValueError(f"height and width of the images must be multiples of {STRIDE} pixels, not {h} x {w}")
        images = as_input(images, self.output.weight.dtype)
        fine = self.features[: PASSTHROUGH + 1](images)  # (N, 512, H/16, W/16)
        coarse = self.head(self.features[PASSTHROUGH + 1 :](fine))  # (N, 1024, S_h, S_w)
        passed = reorg(self.passthrough(fine))  # (N, 256, S_h, S_w)
        outputs = self.output(self.merge(torch.cat([passed, coarse], dim=1)))  # (N, A*(5+C), S_h, S_w)
        shape = n, self.num_anchors, 5 + self.num_classes, h // STRIDE, w // STRIDE
        return outputs.reshape(shape).permute(0, 1, 3, 4, 2)  # (N, A, S_h, S_w, 5+C)


def fuse(model: nn.Module) -> nn.Module:
    """A copy for inference with every batch norm folded into the convolution before it.

    y = (conv(x) - mean) / sqrt(var + eps) * scale + bias is again a convolution, with scaled kernels and a bias.
    """
    fused = copy.deepcopy(model).eval()
    for parent in fused.modules():
        if isinstance(parent, nn.Sequential) and len(parent) == 3 and isinstance(parent[1], nn.BatchNorm2d):
            parent[0] = fuse_conv_bn_eval(parent[0], parent[1])
            parent[1] = nn.Identity()
    return fused


# ---------------------------------------------------------------- loading pretrained weights and trained detectors


def read_anchors(anchors, largest_size: int = 416) -> list[list[float]]:
    """anchors: pairs of width and height in grid cells, the flat list of a cfg file, "voc", "coco" or the name of a cfg
    file with a [region] section -> a list of pairs.

    largest_size: of the input, in pixels. Raises ValueError for other forms, and for sides above its number of cells
    (13 if that is smaller), which are probably in pixels.
    """
    if isinstance(anchors, str):
        anchors = {"voc": ANCHORS, "coco": COCO_ANCHORS}.get(anchors, anchors)
    if isinstance(anchors, str):
        with utils.reading(anchors, "cfg file of a YOLOv2", "ANCHORS is a list of pairs, or a file with [region]"):
            region = utils.read_text(anchors).partition("[region]")[2].partition("[")[0]
            found = re.search(r"^anchors *=(.*)$", region, re.MULTILINE)
            if found is None:
                raise ValueError("it has no [region] section with anchors")
            anchors = [float(side) for side in found[1].split(",")]
    try:
        table = torch.tensor(anchors, dtype=torch.float64)
        pairs = table.reshape(-1, 2).tolist() if table.ndim == 1 or table.shape[1:] == (2,) else []
    except (TypeError, ValueError, RuntimeError):
        pairs = []
    if not pairs:
        raise ValueError(f"ANCHORS must hold pairs of width and height, not {anchors!r:.80}")
    grid = max(416, largest_size) // STRIDE
    if wrong := [side for pair in pairs for side in pair if not 0 < side <= grid]:
        limits = f"above 0 and at most {grid}, not {wrong[0]}"
        advice = f"divide pixels by {STRIDE}, or set the IMAGE_SIZE for which they were made"
        raise ValueError(f"ANCHORS must be in grid cells, {limits}; {advice}")
    return pairs


def load_pretrained_backbone(model: YOLOv2, file: str | os.PathLike, classes: list[str] | None = None) -> int:
    """Loads pretrained weights into a YOLOv2: all 23 convolutions of a detector with the same classes and number of
    anchors, all but the last of another detector, or the 18 of a classifier or backbone. Prints and returns the number
    of convolutions loaded.

    file: a checkpoint of darknet_train*.py or train.py, or a Darknet file. A Darknet file contains no class names:
    125 outputs are taken for VOC's classes, 425 for COCO's. Raises FileNotFoundError or ValueError, naming the file;
    the model is then unchanged.
    """
    contents = {23: "", 22: ", all but the last: for other classes, or another number of anchors", 18: ", the backbone"}
    if utils.is_torch_file(file):
        checkpoint = utils.load_checkpoint(file)
        state, own = checkpoint.get("model", {}), model.state_dict()
        fitting = {name for name in own if name in state and state[name].shape == own[name].shape}
        if classes is not None and checkpoint.get("classes", classes) != classes:
            fitting -= {"output.weight", "output.bias"}
        parts = {23: list(own), 22: [name for name in own if not name.startswith("output.")]}
        parts[18] = [name for name in own if name.startswith("features.")]
        count = next((count for count, names in parts.items() if fitting.issuperset(names)), None)
        if count is None:
            raise ValueError(f"{file}: contains no Darknet-19 backbone; use one of darknet_train.py, or a Darknet file")
        model.load_state_dict({name: state[name] for name in parts[count]}, strict=False)
        print(f"{file}: loaded {count} of 23 convolutions{contents[count]}")
        return count

    numbers, _ = open_darknet_file(file)
    convolutions = list(darknet_tensors(model))
    ends = np.cumsum([sum(tensor.numel() for tensor in tensors) for tensors in convolutions]).tolist()
    bias, kernel = convolutions[-1]
    per_output = kernel.shape[1] + 1  # weights and bias of one output: 1025, in a detector as in a classifier
    published, _, _ = KNOWN_DETECTORS.get(len(bias), (classes, (), 0))  # other files: taken as trained on `classes`
    same_classes = classes is None or list(classes) == list(published)
    if numbers.size <= ends[17] or (numbers.size == ends[22] and same_classes):
        return load_darknet_weights(model, file)
    count = 22 if numbers.size >= ends[21] else 18
    if (numbers.size - ends[count - 1]) % per_output:
        advice = f"those of a YOLOv2 or Darknet-19; {OTHER_READERS}"
        raise ValueError(f"{file}: {numbers.size:,} numbers are not {advice}")
    copy_convolutions(convolutions[:count], numbers, file)
    print(f"{file}: loaded its first {count} of 23 convolutions{contents[count]}")
    return count


def read_detector(file: str | os.PathLike) -> tuple[YOLOv2, dict]:
    """Reads a checkpoint of train.py -> the trained model on the CPU, and the checkpoint, with classes, anchors and
    image_size.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    state = utils.load_checkpoint(file, keys=("model", "classes", "image_size"))
    if "anchors" not in state:
        advice = "pass it to train.py as PRETRAINED"
        raise ValueError(f"{file}: holds a classifier of darknet_train*.py, not a detector; {advice}")
    with utils.reading(file, "checkpoint of train.py", "use another one"):
        utils.check_classes("its classes", list(state["classes"]))
        # not image_size: MULTI_SCALE may go beyond it
        state["anchors"] = read_anchors(state["anchors"], largest_size=LARGEST_SIZE)
        model = YOLOv2(len(state["classes"]), len(state["anchors"]))
        model.load_state_dict(state["model"])
    return model, state


def darknet_detector(file: str | os.PathLike, classes, anchors) -> tuple[list[str], list, int]:
    """Class names, anchors and image size of a Darknet detector. The file itself tells only how many outputs the
    network has.

    Empty classes or anchors default to those of the published detector with as many outputs, if there is one. Raises
    ValueError, naming the file and what to set, if they are not known or do not fit.
    """
    with torch.device("meta"):  # no memory
        *convolutions, (_, kernel) = darknet_tensors(YOLOv2(1, 1))
    numbers, _ = open_darknet_file(file)
    size_of_others = sum(tensor.numel() for tensors in convolutions for tensor in tensors)
    outputs, rest = divmod(numbers.size - size_of_others, kernel.shape[1] + 1)  # weights and bias of one output: 1025
    if outputs <= 0 or rest:
        advice = f"a backbone is for train.py's PRETRAINED, and {OTHER_READERS}"
        raise ValueError(f"{file}: {numbers.size:,} numbers are not those of a YOLOv2 detector; {advice}")
    known_classes, known_anchors, image_size = KNOWN_DETECTORS.get(outputs, ((), (), 416))
    classes, anchors = classes or known_classes, anchors or known_anchors
    classes = read_classes(classes) if classes else []
    anchors = read_anchors(anchors, largest_size=1664) if anchors else []  # 52 cells; the file does not tell its size
    if len(anchors) * (5 + len(classes)) != outputs:
        counts = f"{len(anchors)} anchors x (5 + {len(classes)} classes)"
        advice = "set CLASSES and ANCHORS to those of its training (its .names and .cfg file)"
        raise ValueError(f"{file}: has {outputs} outputs per cell, not {counts}; {advice}")
    return classes, anchors, image_size


def load_detector(
    file: str | os.PathLike, classes, anchors, device, precision: str = "auto", compiled: bool = False
) -> tuple[nn.Module, list[str], list, int]:
    """Loads a trained YOLOv2 for inference, fused and channels-last -> model, class names, anchors, image size of its
    training.

    file: a checkpoint of train.py (`.pt`), which contains all four, or a Darknet file (see darknet_detector). classes
    and anchors: empty, or those of the file. precision: as in utils.pick_precision. compiled: torch.compile with frozen
    weights, for long runs. Raises FileNotFoundError or ValueError, naming the file.
    """
    device = torch.device(device)
    if utils.is_torch_file(file):
        model, state = read_detector(file)
        own_classes, own_anchors, image_size = list(state["classes"]), state["anchors"], state["image_size"]
        advice = "because a checkpoint contains its own"
        if classes and (given := read_classes(classes)) != own_classes:
            if sorted(given) == sorted(own_classes):
                advice = "and set DATA_CLASSES if the labels number their classes in that order"
            raise ValueError(f"{file}: has other classes than CLASSES; leave CLASSES empty, {advice}")
        if anchors and read_anchors(anchors, largest_size=LARGEST_SIZE) != own_anchors:
            raise ValueError(f"{file}: has other anchors than ANCHORS; leave ANCHORS empty, {advice}")
    else:
        own_classes, own_anchors, image_size = darknet_detector(file, classes, anchors)
        kind = f"{len(own_classes)} classes ({own_classes[0]}, ...), first anchor {own_anchors[0]}, {image_size} px"
        print(f"{file}: read as {kind}; if that is wrong, set CLASSES, ANCHORS, IMAGE_SIZE (test.py: INPUT_SIZES)")
        model = YOLOv2(len(own_classes), len(own_anchors))
        load_darknet_weights(model, file)
    model = fuse(model).to(device, utils.pick_precision(precision, device), memory_format=torch.channels_last)
    if compiled:
        # freezing turns the weights into constants in the best layout; it has no effect as an option of torch.compile()
        from torch._inductor import config as inductor  # here, because it takes a second to import

        inductor.freezing = True
        model = torch.compile(model)
    return model, own_classes, own_anchors, image_size


# ---------------------------------------------------------------- writing the files of a detector


def darknet_cfg(num_classes: int, anchors, image_size: int) -> str:
    """yolov2-voc.cfg for a number of classes, anchors (A pairs in grid cells) and an image size in pixels -> its text.
    jitter is that of this repository's training; random is always 0."""

    def convolutional(filters, size):
        normalised = f"[convolutional]\nbatch_normalize=1\nfilters={filters}\n"
        return f"{normalised}size={size}\nstride=1\npad=1\nactivation=leaky\n"

    pool = "[maxpool]\nsize=2\nstride=2\n"
    fine_channels, channels = DARKNET19_LAYERS[PASSTHROUGH][0], DARKNET19_LAYERS[-1][0]
    filters = len(anchors) * (5 + num_classes)
    sides = ", ".join(str(float(side)) for anchor in anchors for side in anchor)
    sections = [
        f"[net]\nbatch=1\nsubdivisions=1\nwidth={image_size}\nheight={image_size}\nchannels=3\nmomentum=0.9\n"
        "decay=0.0005\nangle=0\nsaturation=1.5\nexposure=1.5\nhue=.1\nlearning_rate=0.001\nburn_in=1000\n"
        "max_batches=80200\npolicy=steps\nsteps=40000,60000\nscales=.1,.1\n",
        *[pool if layer == "pool" else convolutional(*layer) for layer in DARKNET19_LAYERS],  # layers 0 to 22
        convolutional(channels, 3),
        convolutional(channels, 3),  # layer 24
        "[route]\nlayers=-9\n",  # layer 25: the 26 x 26 map, layer 25 - 9 = 16
        convolutional(fine_channels // 8, 1),
        "[reorg]\nstride=2\n",  # layer 27
        "[route]\nlayers=-1,-4\n",  # layer 28: the reorganised map, then layer 24
        convolutional(channels, 3),
        f"[convolutional]\nsize=1\nstride=1\npad=1\nfilters={filters}\nactivation=linear\n",
        f"[region]\nanchors={sides}\nbias_match=1\nclasses={num_classes}\ncoords=4\nnum={len(anchors)}\nsoftmax=1\n"
        "jitter=.2\nrescore=1\nobject_scale=5\nnoobject_scale=1\nclass_scale=1\ncoord_scale=1\nabsolute=1\n"
        "thresh=.6\nrandom=0\n",
    ]
    return "\n".join(sections)


def main():
    check_settings()
    model, state = read_detector(CHECKPOINT) if CHECKPOINT else (YOLOv2(), {})
    image_size = IMAGE_SIZE or state.get("image_size", 416)
    if not OUTPUT:
        print(layer_table(model, image_size))
        return
    stem, classes, images_seen = OUTPUT.removesuffix(".weights"), state["classes"], state.get("images_seen", 0)
    cfg, names = darknet_cfg(len(classes), state["anchors"], image_size), "".join(f"{name}\n" for name in classes)
    texts = {f"{stem}.cfg": cfg.encode(), f"{stem}.names": names.encode()}
    for file, text in texts.items():
        if os.path.exists(file) and Path(file).read_bytes() != text:
            raise ValueError(f"{file}: a file with other contents would be replaced; move it, or set another OUTPUT")
    save_darknet_weights(model, OUTPUT, images_seen)
    for file, text in texts.items():
        utils.write_file(file, text)
    print(f"wrote {OUTPUT}, {stem}.cfg and {stem}.names: {len(classes)} classes, {images_seen:,} images seen")
    print(f"use: detect.py CHECKPOINT={OUTPUT} CLASSES={stem}.names ANCHORS={stem}.cfg IMAGE_SIZE={image_size}")


if __name__ == "__main__":
    with utils.plain_errors():
        utils.override_globals(globals(), sys.argv[1:])
        main()
