"""Darknet-19, the classifier that is YOLOv2's backbone (YOLO9000 sec. 3, Table 6), and Darknet's weight files.

    python darknet_model.py                                                             prints the layers, as in Table 6
    python darknet_model.py CHECKPOINT=runs/darknet19.pt OUTPUT=runs/darknet19.weights  writes it as a Darknet file

Letters: N images of H x W pixels, multiples of 32. Images are RGB, uint8 or 0..1, without mean and std as in Darknet.
"""

import copy
import functools
import itertools
import os
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

import utils

CHECKPOINT = ""  # of darknet_train*.py; "": the untrained network with 1000 classes
OUTPUT = ""  # Darknet file to write: .weights, or .conv.23 for the backbone alone; "": print the layers
IMAGE_SIZE = 224  # pixels of the printed layers' input, a multiple of 32


def check_settings():
    """Raises ValueError or OSError for an invalid setting."""
    utils.check_settings(globals())
    if OUTPUT:
        check_output(OUTPUT, CHECKPOINT, (".weights", ".conv.23"))


# Table 6 from top to bottom: (output channels, kernel size) of each convolution; "pool" is a 2x2 max-pool of stride 2.
# The 1x1 convolutions between the 3x3 ones reduce the channels, which keeps the network cheap. Other numbers of
# channels work if that before the last pool is a multiple of 32, but not with published weights.
DARKNET19_LAYERS = [
    (32, 3), "pool",
    (64, 3), "pool",
    (128, 3), (64, 1), (128, 3), "pool",
    (256, 3), (128, 1), (256, 3), "pool",
    (512, 3), (256, 1), (512, 3), (256, 1), (512, 3), "pool",
    (1024, 3), (512, 1), (1024, 3), (512, 1), (1024, 3),
]  # fmt: skip


def convolution(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Darknet's [convolutional] section: a convolution that keeps height and width, batch norm (momentum .01, larger at
    first: utils.warm_batch_norm) and leaky ReLU of slope .1 (src/batchnorm_layer.c, src/activations.h)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels, eps=1e-5, momentum=0.01),
        nn.LeakyReLU(0.1, inplace=True),
    )


def as_input(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts images to the dtype of the network, and uint8 (0..255) to 0..1; other types are in 0..1 already."""
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)


def darknet19_features() -> nn.Sequential:
    """The 18 convolutions and 5 max-pools before the classifier: (N, 3, H, W) -> (N, 1024, H/32, W/32)."""
    layers, channels = [], 3
    for layer in DARKNET19_LAYERS:
        if layer == "pool":
            layers.append(nn.MaxPool2d(2, stride=2))
        else:
            layers.append(convolution(channels, *layer))
            channels = layer[0]
    return nn.Sequential(*layers)


def initialise_kernels(model: nn.Module) -> None:
    """Draws kernels from N(0, 2 / (k^2 c_in)) and sets biases to 0, as Darknet's make_convolutional_layer does."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def add_identity(model: nn.Module, weight: float) -> None:
    """Adds `weight` to the kernel centre from input channel `o mod c_in` to output channel `o`, except in the first and
    last layer.

    IDENTITY_INIT of the darknet_train scripts (ours): each layer starts as a scaled identity plus its random kernel
    (Zagoruyko and Komodakis, DiracNets, 2017), which makes short runs more accurate (tests/MEASUREMENTS.md).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 3 and module.bias is None:  # the last has a bias
            out_channel, middle = torch.arange(module.out_channels), module.kernel_size[0] // 2
            with torch.no_grad():
                module.weight[out_channel, out_channel % module.in_channels, middle, middle] += weight


class Darknet19(nn.Module):
    """Darknet-19 classifier: 19 convolutions and 5 max-pools (YOLO9000 Table 6, darknet19.cfg)."""

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.features = darknet19_features()
        self.classifier = nn.Conv2d(DARKNET19_LAYERS[-1][0], num_classes, kernel_size=1)  # no batch norm, no activation
        initialise_kernels(self)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) RGB in 0..1, or uint8 -> logits (N, num_classes), before the softmax."""
        images = as_input(images, self.classifier.weight.dtype)
        maps = self.classifier(self.features(images))  # (N, num_classes, H/32, W/32)
        return maps.mean(dim=(2, 3))  # global average pooling -> (N, num_classes)


def layer_table(model: nn.Module, image_size: int) -> str:
    """The convolutions and max-pools of a model as lines of text, in the order in which they run on image_size x
    image_size pixels. Parameters are kernels, biases and batch-norm scales. GFLOP are those of the convolutions, 2 k^2
    c_in c_out h w / 1e9 as in Darknet: a multiply-add counts as two operations."""
    rows = []  # name, type, kernel, output, parameters, GFLOP

    def record(name, module, inputs, output):  # a forward hook
        _, c, h, w = output.shape
        parameters = sum(tensor.numel() for tensor in module.parameters())
        if isinstance(module, nn.BatchNorm2d):
            rows[-1][4] += parameters  # to those of its convolution
        elif isinstance(module, nn.MaxPool2d):
            rows.append([name, "max-pool", "2x2 / 2", f"{c} x {h} x {w}", 0, 0.0])
        else:
            k = module.kernel_size[0]
            gflop = 2 * module.weight.numel() * h * w / 1e9
            rows.append([name.removesuffix(".0"), "convolution", f"{k}x{k}", f"{c} x {h} x {w}", parameters, gflop])

    model = copy.deepcopy(model).to("meta").eval()  # tensors on "meta" have a shape but no values: nothing is computed
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)):
            module.register_forward_hook(functools.partial(record, name))
    model(torch.empty(1, 3, image_size, image_size, device="meta"))
    lines = [f"    {'layer':15}{'type':13}{'kernel':9}{'output':17}parameters    GFLOP"]
    total = ["total", "", "", "", sum(row[4] for row in rows), sum(row[5] for row in rows)]
    for number, row in [*enumerate(rows, start=1), ("", total)]:
        lines.append("{:>2}  {:15}{:13}{:9}{:17}{:10,}  {:7.3f}".format(number, *row))
    return "\n".join(lines)


# ---------------------------------------------------------------- Darknet's weight files
# A header, then for each convolution in the order of the cfg file: biases, batch-norm scales, running means, running
# variances and kernels (out, in, height, width); a convolution without batch norm has only biases and kernels. All
# numbers are little-endian float32. Header: int32 major, minor, revision; then the images seen, int64, before version
# 0.2 int32 (load_weights_upto in Darknet's src/parser.c).

# how many numbers the files of other networks have, with COCO's classes (yolov2-tiny-voc: VOC's)
OTHER_NETWORKS = {11_237_145: "yolov2-tiny", 15_867_885: "yolov2-tiny-voc", 8_858_734: "yolov3-tiny"}
OTHER_NETWORKS |= {62_001_757: "yolov3", 6_062_814: "yolov4-tiny", 64_429_405: "yolov4"}
OTHER_READERS = "OpenCV (cv2.dnn.readNetFromDarknet) and hank-ai/darknet run YOLOv3, YOLOv4 and tiny networks"


def darknet_tensors(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yields the tensors of each convolution in file order: our modules are registered in the order of the cfg file."""
    modules = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    for module, following in zip(modules, modules[1:] + [None], strict=True):
        if isinstance(following, nn.BatchNorm2d):
            yield [following.bias, following.weight, following.running_mean, following.running_var, module.weight]
        elif isinstance(module, nn.Conv2d):
            yield [module.bias, module.weight]


def open_darknet_file(file: str | os.PathLike) -> tuple[np.ndarray, int]:
    """Reads a Darknet weights file -> its float32 numbers after the header, and the number of images seen.

    Raises FileNotFoundError or ValueError, naming the file, if it is missing, not a Darknet file or one of
    OTHER_NETWORKS.
    """
    with utils.reading(file, "Darknet weights file", "download or export it again"):
        with open(file, "rb") as stream:
            start = stream.read(20)
        size = os.path.getsize(file)
        major, minor = np.frombuffer(start, "<i4", count=2).tolist()
        if not (0 <= major < 1000 and 0 <= minor < 1000):
            raise ValueError(f"its header says version {major}.{minor}")
        is_wide = major * 10 + minor >= 2  # version 0.2 and later count the images in 64 bits
        header = 20 if is_wide else 16
        if size < header or size % 4:
            raise ValueError(f"{size} bytes are too few, or not whole numbers")
        images_seen = np.frombuffer(start, "<i8" if is_wide else "<i4", count=1, offset=12).item()
        numbers = np.fromfile(file, "<f4", offset=header)
    if numbers.size in OTHER_NETWORKS:
        raise ValueError(f"{file}: is {OTHER_NETWORKS[numbers.size]}, not a YOLOv2 or Darknet-19; {OTHER_READERS}")
    return numbers, images_seen


def copy_convolutions(convolutions: list[list[Tensor]], numbers: np.ndarray, file: str | os.PathLike) -> None:
    """Copies the first numbers of a Darknet file into the tensors of these convolutions.

    Raises ValueError, naming the file, for damaged weights (utils.check_weights); the tensors are then unchanged.
    """
    pieces, position = {}, 0
    for number, tensors in enumerate(convolutions):
        names = ("bias", "scale", "running_mean", "running_var", "kernel") if len(tensors) == 5 else ("bias", "kernel")
        for name, tensor in zip(names, tensors, strict=True):
            piece = torch.from_numpy(numbers[position : position + tensor.numel()])
            pieces[f"{number}.{name}"] = piece.view(tensor.shape)
            position += tensor.numel()
    utils.check_weights(file, pieces)
    with torch.no_grad():
        for tensor, piece in zip(itertools.chain.from_iterable(convolutions), pieces.values(), strict=True):
            tensor.copy_(piece)


def load_darknet_weights(model: nn.Module, file: str | os.PathLike) -> int:
    """Loads a Darknet file into a Darknet19 or YOLOv2; prints and returns the number of convolutions loaded.

    The file may contain all convolutions or only the first ones (`darknet19_448.conv.23`: 18 convolutions, 23 counts
    the pools). Raises FileNotFoundError or ValueError, naming the file, if it is damaged or of another network; the
    model is then unchanged.
    """
    numbers, images_seen = open_darknet_file(file)
    convolutions = list(darknet_tensors(model))
    ends = np.cumsum([sum(tensor.numel() for tensor in tensors) for tensors in convolutions]).tolist()
    if numbers.size not in ends:
        raise ValueError(
            f"{file}: has {numbers.size:,} numbers, but this {type(model).__name__} takes {ends[-1]:,} or those of its "
            "first convolutions; the file is damaged, of other classes (then start from a backbone, such as "
            f"darknet19_448.conv.23) or of another network: {OTHER_READERS}"
        )
    count = ends.index(numbers.size) + 1
    copy_convolutions(convolutions[:count], numbers, file)
    print(f"{file}: loaded {count} of {len(convolutions)} convolutions ({images_seen:,} images seen in training)")
    return count


def save_darknet_weights(model: nn.Module, file: str | os.PathLike, images_seen: int = 0) -> None:
    """Writes a Darknet19, its features or a YOLOv2 as a Darknet file, version 0.2, with utils.atomic_write.

    Raises OSError, naming the file, or ValueError for a fused model.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise ValueError("a fused model has no batch norms to write; save the model it was made from")
    with utils.atomic_write(file) as temporary, open(temporary, "wb") as stream:
        np.array([0, 2, 0], "<i4").tofile(stream)
        np.array([images_seen], "<i8").tofile(stream)
        for tensor in itertools.chain.from_iterable(darknet_tensors(model)):
            tensor.detach().float().cpu().numpy().astype("<f4").tofile(stream)


def load_classifier(model: Darknet19, file: str | os.PathLike, names: list[str] | None = None) -> None:
    """Loads a Darknet19 from a checkpoint of darknet_train*.py (`.pt`), or from a Darknet file, which may contain only
    the first convolutions.

    names: the classes of the new run; a checkpoint must have the same ones in the same order. Raises FileNotFoundError
    or ValueError, naming the file, if it is missing, damaged or has other classes.
    """
    if not utils.is_torch_file(file):
        if load_darknet_weights(model, file) == 19 and names:
            order = "must be that of the class folders (that of darknet19.weights is another: use its backbone alone)"
            print(f"{file}: contains no class names; their order {order}")
        return
    checkpoint = utils.load_checkpoint(file, keys=("model",))
    state = checkpoint["model"]
    if state.keys() != model.state_dict().keys():
        raise ValueError(f"{file}: not a checkpoint of Darknet-19; make one with darknet_train.py")
    count, expected = len(state["classifier.bias"]), len(model.classifier.bias)
    if count != expected or (names and checkpoint.get("classes", names) != names):
        found = f"{count} classes, not {expected}" if count != expected else "other classes, or in another order"
        raise ValueError(
            f"{file}: was trained on {found}. To use only its backbone, write that to a Darknet file and start with "
            f'RESUME_WEIGHTS=backbone.conv.23: python darknet_model.py "CHECKPOINT={file}" OUTPUT=backbone.conv.23'
        )
    model.load_state_dict(state)


# ---------------------------------------------------------------- run as a script


def check_output(output: str, checkpoint: str, suffixes: tuple[str, ...] = (".weights",)) -> None:
    """Raises ValueError or OSError if the checkpoint cannot be written to the Darknet file `output`."""
    if not checkpoint:
        raise ValueError("OUTPUT needs CHECKPOINT, the checkpoint to convert")
    if not output.endswith(suffixes):
        raise ValueError(f"{output}: OUTPUT must end in {' or '.join(suffixes)}")
    if os.path.realpath(output) == os.path.realpath(checkpoint):
        raise ValueError(f"{output}: OUTPUT would replace CHECKPOINT; choose another name")
    utils.check_writable(output)


def main():
    check_settings()
    model, images_seen = Darknet19(), 0
    if CHECKPOINT:
        state = utils.load_checkpoint(CHECKPOINT, keys=("model",))
        if "classifier.bias" not in state["model"]:
            raise ValueError(f"{CHECKPOINT}: not a checkpoint of darknet_train*.py; for one of train.py, use model.py")
        model, images_seen = Darknet19(len(state["model"]["classifier.bias"])), state.get("images_seen", 0)
        load_classifier(model, CHECKPOINT)
    if OUTPUT:
        save_darknet_weights(model if OUTPUT.endswith(".weights") else model.features, OUTPUT, images_seen)
        print(f"wrote {OUTPUT} ({images_seen:,} images seen in training)")
    else:
        print(layer_table(model, IMAGE_SIZE))


if __name__ == "__main__":
    with utils.plain_errors():
        utils.override_globals(globals(), sys.argv[1:])
        main()
