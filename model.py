"""YOLOv2: the Darknet-19 backbone with a detection head (YOLO9000 sec. 2, yolov2-voc.cfg).

    python model.py                                                        prints the layers
    python model.py CHECKPOINT=runs/yolov2.pt OUTPUT=runs/yolov2.weights   writes a checkpoint of train.py for Darknet
                                                                           and OpenCV: yolov2.weights, yolov2.cfg and
                                                                           yolov2.names

Letters: N images, A anchors (5), S_h x S_w grid cells (13 x 13 at 416 x 416), C classes (20).
Images are float32 RGB in 0..1.
"""

import copy
import os
import sys

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import utils
from darknet_model import (
    DARKNET19_LAYERS,
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
from dataset import COCO_CLASSES, VOC_CLASSES, read_classes

CHECKPOINT = ""  # from train.py; "" for an untrained network with 20 classes
OUTPUT = ""  # Darknet file to write, .weights; its .cfg and .names are written beside it; "": print the layers
IMAGE_SIZE = None  # pixels, a multiple of 32; None for the checkpoint's own, 416 without a checkpoint


def check_settings():
    """Raises ValueError or OSError for an invalid setting."""
    if IMAGE_SIZE is not None and (not isinstance(IMAGE_SIZE, int) or IMAGE_SIZE < 32 or IMAGE_SIZE % 32):
        raise ValueError(f"IMAGE_SIZE must be a multiple of 32 pixels or None, not {IMAGE_SIZE}")
    if OUTPUT:
        check_output(OUTPUT, CHECKPOINT)


# widths and heights of the five prior boxes p_w, p_h in grid cells (yolov2-voc.cfg), found by k-means on the VOC boxes
ANCHORS = [(1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071)]
# those of yolov2.cfg
COCO_ANCHORS = [(0.57273, 0.677385), (1.87446, 2.06253), (3.33843, 5.47434), (7.88282, 3.52778), (9.77052, 9.16828)]
# outputs A (5 + C) of the published Darknet detectors -> class names, anchors, image size of the cfg file
# yolov2-voc.weights, yolov2.weights
KNOWN_DETECTORS = {125: (VOC_CLASSES, ANCHORS, 416), 425: (COCO_CLASSES, COCO_ANCHORS, 608)}
STRIDE = 32  # pixels of the image per grid cell
PASSTHROUGH = 16  # index in DARKNET19_LAYERS, pools counted, of the last (13th) convolution on the 26 x 26 map


def reorg(maps: Tensor, stride: int = 2) -> Tensor:
    """Darknet's reorg layer: (N, C, H, W) -> (N, 4C, H/2, W/2) at stride 2 (src/reorg_layer.c, as
    its forward pass calls it).

    It is not pixel_unshuffle: Darknet reads the (C, H, W) map as if it were (C/4, 2H, 2W), so an output channel mixes
    pixels of several channels and rows. The official weights need exactly this order.
    """
    n, c, h, w = maps.shape
    # (N, C/4, H, 2, W, 2): not the rows and columns of the input map
    maps = maps.reshape(n, c // stride**2, h, stride, w, stride)
    maps = maps.permute(0, 3, 5, 1, 2, 4)  # (N, 2, 2, C/4, H, W)
    return maps.reshape(n, c * stride**2, h // stride, w // stride)  # the same numbers, read as (N, 4C, H/2, W/2)


class YOLOv2(nn.Module):
    """YOLOv2 as in yolov2-voc.cfg; its modules are registered in the order of the cfg file, which is
    that of a Darknet file."""

    def __init__(self, num_classes: int = 20, num_anchors: int = 5):
        super().__init__()
        self.num_classes, self.num_anchors = num_classes, num_anchors
        self.features = darknet19_features()  # named as in Darknet19, whose weights are loaded here
        # channels, 26 x 26 and 13 x 13 map: 512, 1024
        fine, coarse = DARKNET19_LAYERS[PASSTHROUGH][0], DARKNET19_LAYERS[-1][0]
        # before the concatenation
        self.head = nn.Sequential(convolution(coarse, coarse, 3), convolution(coarse, coarse, 3))
        # 512 -> 64 as in the cfg; reorg makes them 256. Paper: reorg of all 512
        self.passthrough = convolution(fine, fine // 8, 1)
        self.merge = convolution(fine // 8 * 4 + coarse, coarse, 3)
        self.output = nn.Conv2d(coarse, num_anchors * (5 + num_classes), kernel_size=1)  # no batch norm, no activation
        initialise_kernels(self)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) RGB in 0..1, or uint8 -> raw outputs (N, A, S_h, S_w, 5 + C): t_x, t_y, t_w, t_h, t_o,
        class logits; utils.decode_predictions turns them into boxes.

        Raises ValueError if height or width is not a multiple of 32.
        """
        n, _, h, w = images.shape
        if h % STRIDE or w % STRIDE:
            raise ValueError(
                f"YOLOv2 takes images whose height and width are multiples of {STRIDE} pixels, not {h} x {w}"
            )
        images = as_input(images, self.output.weight.dtype)
        fine = self.features[: PASSTHROUGH + 1](images)  # (N, 512, H/16, W/16)
        coarse = self.head(self.features[PASSTHROUGH + 1 :](fine))  # (N, 1024, S_h, S_w)
        passed = reorg(self.passthrough(fine))  # (N, 256, S_h, S_w)
        maps = self.output(self.merge(torch.cat([passed, coarse], dim=1)))  # (N, A*(5+C), S_h, S_w)
        # (N, A, 5+C, S_h, S_w)
        maps = maps.reshape(n, self.num_anchors, 5 + self.num_classes, h // STRIDE, w // STRIDE)
        return maps.permute(0, 1, 3, 4, 2)  # (N, A, S_h, S_w, 5+C)


def read_anchors(anchors, image_sizes: list[int]) -> list[list[float]]:
    """anchors: pairs of width and height in grid cells, or the flat list of a cfg file -> a list of pairs.
    Raises ValueError for other forms, and for sides above 13 cells (or the largest grid, if that is larger),
    which are probably in pixels."""
    pairs = list(anchors) if isinstance(anchors, (list, tuple)) else []
    if pairs and all(isinstance(anchor, (int, float)) for anchor in pairs) and len(pairs) % 2 == 0:
        pairs = list(zip(pairs[::2], pairs[1::2], strict=True))
    lists = [pair for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2]
    if (
        not pairs
        or len(lists) < len(pairs)
        or not all(isinstance(side, (int, float)) for pair in lists for side in pair)
    ):
        raise ValueError(f"ANCHORS must hold pairs of width and height, not {' '.join(repr(anchors).split())[:80]}")
    pairs = [[float(width), float(height)] for width, height in pairs]
    grid = max(416, *image_sizes) // STRIDE
    if wrong := [side for pair in pairs for side in pair if not 0 < side <= grid]:
        raise ValueError(
            f"ANCHORS must be in grid cells, above 0 and at most {grid}, not {wrong[0]}; divide pixels by {STRIDE}"
        )
    return pairs


def load_pretrained_backbone(model: YOLOv2, file: str | os.PathLike, classes: list[str] | None = None) -> int:
    """Loads pretrained weights into a YOLOv2: all 23 convolutions if classes and number of anchors match, otherwise the
    18 of the backbone. Prints and returns the number of convolutions loaded.

    file: a checkpoint of darknet_train*.py or train.py, or a Darknet file. A Darknet file contains no class names:
    125 outputs are taken for VOC's classes, 425 for COCO's. Raises FileNotFoundError or ValueError, naming the file;
    the model is then unchanged.
    """
    if utils.is_torch_file(file):
        checkpoint = utils.load_checkpoint(file, "cpu")
        state, own = checkpoint.get("model", {}), model.state_dict()
        fitting = {name for name, tensor in own.items() if name in state and state[name].shape == tensor.shape}
        same_classes = classes is None or checkpoint.get("classes", classes) == classes
        if len(fitting) == len(own) and same_classes:
            model.load_state_dict({name: state[name] for name in own})
            print(f"{file}: loaded all 23 convolutions")
            return 23
        backbone = [name for name in own if name.startswith("features.")]
        if not fitting.issuperset(backbone):
            raise ValueError(
                f"{file}: contains no Darknet-19 backbone; train one with darknet_train.py, or use a Darknet file"
            )
        model.load_state_dict({name: state[name] for name in backbone}, strict=False)
        is_detector = "output.weight" in state
        reason = "; its classes are different, or in another order" if is_detector and not same_classes else ""
        print(f"{file}: loaded 18 of 23 convolutions, the backbone{reason}")
        return 18

    numbers, _ = open_darknet_file(file)
    convolutions = list(darknet_tensors(model))
    sizes = [sum(tensor.numel() for tensor in tensors) for tensors in convolutions]
    outputs = convolutions[-1][0].numel()  # the last layer's biases
    published, _, _ = KNOWN_DETECTORS.get(outputs, (classes, (), 0))  # other files: taken as trained on `classes`
    other_classes = classes is not None and list(classes) != list(published)
    # the same 18 convolutions, another head
    if numbers.size > sum(sizes[:18]) and (numbers.size != sum(sizes) or other_classes):
        copy_convolutions(convolutions[:18], numbers, file)
        print(f"{file}: loaded its first 18 convolutions, the backbone")
        return 18
    return load_darknet_weights(model, file)


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


def read_detector(file: str | os.PathLike) -> tuple[YOLOv2, dict]:
    """Reads a checkpoint of train.py -> the trained model on the CPU, and the checkpoint, with
    classes, anchors and image_size.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    state = utils.load_checkpoint(file, "cpu", keys=("model", "classes", "image_size"))
    if "anchors" not in state or state["image_size"] % STRIDE:
        raise ValueError(
            f"{file}: holds a classifier of darknet_train*.py, not a detector; pass it to train.py as PRETRAINED"
        )
    try:
        state["anchors"] = read_anchors(state["anchors"], [10_000])  # any grid: MULTI_SCALE may go beyond image_size
    except ValueError as error:
        raise ValueError(f"{file}: damaged checkpoint ({error}); use another one") from None
    model = YOLOv2(len(state["classes"]), len(state["anchors"]))
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, AttributeError):
        raise ValueError(
            f"{file}: these are not the weights of a YOLOv2 with {len(state['classes'])} classes"
        ) from None
    return model, state


def darknet_detector(file: str | os.PathLike, classes, anchors) -> tuple[list[str], list, int]:
    """Class names, anchors and image size of a Darknet detector. The file itself tells only how
    many outputs the network has.

    Empty classes or anchors default to those of the published detector with as many outputs, if there is one. Raises
    ValueError, naming the file and what to set, if they are not known or do not fit.
    """
    with torch.device("meta"):  # no memory
        convolutions = list(darknet_tensors(YOLOv2(1, 1)))
    numbers, _ = open_darknet_file(file)
    per_output = convolutions[-1][1].shape[1] + 1  # weights and bias of one output: 1025
    outputs, rest = divmod(
        numbers.size - sum(tensor.numel() for tensors in convolutions[:-1] for tensor in tensors), per_output
    )
    if outputs <= 0 or rest:
        raise ValueError(
            f"{file}: {numbers.size:,} numbers are not those of a YOLOv2 detector; "
            "a backbone is for train.py's PRETRAINED"
        )
    known_classes, known_anchors, image_size = KNOWN_DETECTORS.get(outputs, ((), (), 416))
    classes, anchors = classes or known_classes, anchors or known_anchors
    classes, anchors = read_classes(classes) if classes else [], read_anchors(anchors, [1664]) if anchors else []
    if len(anchors) * (5 + len(classes)) != outputs:
        fitting = [
            f"{outputs // count - 5} classes and {count} anchors"
            for count in (5, 3, 6, 9)
            if outputs % count == 0 and outputs // count > 5
        ]
        raise ValueError(
            f"{file}: has {outputs} outputs per cell, which fits {' or '.join(fitting) or 'other numbers of anchors'}, "
            f"not {len(classes)} and {len(anchors)}; set CLASSES (names, or a .names file) and ANCHORS to those of "
            "its training"
        )
    return classes, anchors, image_size


def load_detector(
    file: str | os.PathLike, classes, anchors, device: torch.device, precision: str = "auto", compiled: bool = False
) -> tuple[nn.Module, list[str], list, int]:
    """Loads a trained YOLOv2 for inference, fused and channels-last -> model, class names, anchors,
    image size of its training.

    file: a checkpoint of train.py (`.pt`), which contains all four, or a Darknet file (see darknet_detector). classes
    and anchors: empty, or those of the file. precision: as in utils.pick_precision. compiled: torch.compile with frozen
    weights, for long runs. Raises FileNotFoundError or ValueError, naming the file.
    """
    if utils.is_torch_file(file):
        model, state = read_detector(file)
        own_classes, own_anchors, image_size = list(state["classes"]), state["anchors"], state["image_size"]
        if classes and read_classes(classes) != own_classes:
            raise ValueError(
                f"{file}: has other classes than CLASSES; leave CLASSES empty, because a checkpoint contains its own"
            )
        if anchors and (
            len(own_anchors) != len(given := read_anchors(anchors, [10_000])) or not np.allclose(given, own_anchors)
        ):
            raise ValueError(
                f"{file}: has other anchors than ANCHORS; leave ANCHORS empty, because a checkpoint contains its own"
            )
    else:
        own_classes, own_anchors, image_size = darknet_detector(file, classes, anchors)
        model = YOLOv2(len(own_classes), len(own_anchors))
        load_darknet_weights(model, file)
    model = fuse(model).to(device, utils.pick_precision(precision, device), memory_format=torch.channels_last)
    if compiled:
        # freezing turns the weights into constants in the best layout; it has no effect as an option of torch.compile()
        from torch._inductor import config as inductor  # here, because it takes a second to import

        inductor.freezing = True
        model = torch.compile(model)
    return model, own_classes, own_anchors, image_size


def darknet_cfg(num_classes: int, anchors, image_size: int) -> str:
    """yolov2-voc.cfg for a number of classes, anchors (A pairs in grid cells) and an image size in pixels -> its text.
    jitter and random are those of this repository's training."""
    sections = [
        f"[net]\nbatch=1\nsubdivisions=1\nwidth={image_size}\nheight={image_size}\nchannels=3\nmomentum=0.9\ndecay=0.0005\nangle=0\n"
        "saturation=1.5\nexposure=1.5\nhue=.1\nlearning_rate=0.001\nburn_in=1000\nmax_batches=80200\npolicy=steps\n"
        "steps=40000,60000\nscales=.1,.1\n"
    ]

    def convolutional(filters, size):
        sections.append(
            f"[convolutional]\nbatch_normalize=1\nfilters={filters}\nsize={size}\nstride=1\npad=1\nactivation=leaky\n"
        )

    for layer in DARKNET19_LAYERS:  # layers 0 to 22
        if layer == "pool":
            sections.append("[maxpool]\nsize=2\nstride=2\n")
        else:
            convolutional(*layer)
    fine, coarse = DARKNET19_LAYERS[PASSTHROUGH][0], DARKNET19_LAYERS[-1][0]
    convolutional(coarse, 3)
    convolutional(coarse, 3)  # layer 24
    sections.append("[route]\nlayers=-9\n")  # layer 25: the 26 x 26 map, layer 25 - 9 = 16
    convolutional(fine // 8, 1)
    sections.append("[reorg]\nstride=2\n")  # layer 27
    sections.append("[route]\nlayers=-1,-4\n")  # layer 28: the reorganised map, then layer 24
    convolutional(coarse, 3)
    sections.append(
        f"[convolutional]\nsize=1\nstride=1\npad=1\nfilters={len(anchors) * (5 + num_classes)}\nactivation=linear\n"
    )
    numbers = ", ".join(str(float(side)) for anchor in anchors for side in anchor)
    sections.append(
        f"[region]\nanchors={numbers}\nbias_match=1\nclasses={num_classes}\ncoords=4\nnum={len(anchors)}\nsoftmax=1\njitter=.2\nrescore=1\n"
        "object_scale=5\nnoobject_scale=1\nclass_scale=1\ncoord_scale=1\nabsolute=1\nthresh=.6\nrandom=0\n"
    )
    return "\n".join(sections)


def main():
    check_settings()
    model, state = read_detector(CHECKPOINT) if CHECKPOINT else (YOLOv2(), {})
    image_size = IMAGE_SIZE or state.get("image_size", 416)
    if not OUTPUT:
        print(layer_table(model, image_size))
        return
    stem, classes, images_seen = OUTPUT.removesuffix(".weights"), state["classes"], state.get("images_seen", 0)
    save_darknet_weights(model, OUTPUT, images_seen)
    texts = {
        "cfg": darknet_cfg(len(classes), state["anchors"], image_size),
        "names": "".join(f"{name}\n" for name in classes),
    }
    for suffix, text in texts.items():
        with (
            utils.atomic_write(f"{stem}.{suffix}") as temporary,
            open(temporary, "w", encoding="utf-8", newline="\n") as stream,
        ):
            stream.write(text)
    print(
        f"wrote {OUTPUT}, {stem}.cfg and {stem}.names: {len(classes)} classes, "
        f"{image_size} px, {images_seen:,} images seen"
    )


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
