"""Draws walkthrough.png next to this script: one photograph on its way through YOLOv2, from grid and anchors to final
boxes.

    python train.py IMAGE_SIZE=416 EPOCHS=24 && python images/walkthrough.py

All numbers and maps come from the photograph's label file and from the network in CHECKPOINT. Sources: YOLO9000 sec. 2
and yolov2-voc.cfg.
"""

import sys
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import patheffects
from matplotlib import pyplot as plt
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules

import utils
from dataset import VOCDataset, follow_object
from model import load_detector

CHECKPOINT = "runs/yolov2.pt"  # a detector trained by train.py
DATA_DIR = "data_samples/voc"
IMAGE_SETS = [("2007", "tiny")]
IMAGE_ID = "000003"  # an image of IMAGE_SETS
THRESHOLD = 0.1  # lowest confidence of the boxes in the last two pictures
NMS_THRESHOLD = 0.45  # IoU
FILE = Path(__file__).with_name("walkthrough.png")

WIDTH, HEIGHT = 900, 2172  # page units: pixels of the figure shown 900 pixels wide; the file has 1.6 times as many
LEFT, RIGHT, SIDE = 15, 465, 420  # page units: left edges and width of the square pictures
BLUE, AMBER, GREY, INK, PALE = "#1f5fa8", "#b06a00", "#667080", "#1f2933", "#d5dae1"
TITLE, NOTE, LABEL = 16, 12.5, 12  # font sizes in points; at 900 pixels wide, one point is about one pixel
OUTLINE = [patheffects.withStroke(linewidth=3, foreground="white")]  # keeps text on a photograph readable


def add_picture(page, x, y, number, title, notes, image, cells, dim=0.0):
    """Adds a square picture with its title and notes -> its axes, in grid cells. dim: share of white mixed into the
    image."""
    page.text(x, y, f"{number}  {title}", fontsize=TITLE, weight="bold")
    axes = page.figure.add_axes((x / WIDTH, 1 - (y + 14 + SIDE) / HEIGHT, SIDE / WIDTH, SIDE / HEIGHT))
    axes.imshow(image * (1 - dim) + dim, extent=(0, cells, cells, 0), interpolation="bilinear")
    axes.set(xlim=(0, cells), ylim=(cells, 0), xticks=[], yticks=[])
    for row, note in enumerate(notes):
        page.text(x, y + SIDE + 34 + 19 * row, note)
    return axes


def add_box(axes, box, **style):
    """box: x, y, w, h of centre and size in grid cells."""
    x, y, w, h = box
    axes.add_patch(plt.Rectangle((x - w / 2, y - h / 2), w, h, fill=False, **style))


def draw_grid(axes, boxes, followed):
    """The grid, each object's box and centre, and the cells that are responsible for them."""
    cells = int(axes.get_xlim()[1])
    for line in range(1, cells):
        axes.plot([0, cells], [line, line], [line, line], [0, cells], color="white", lw=0.7, alpha=0.8)
    for index, (x, y, w, h) in enumerate(boxes):
        colour = AMBER if index == followed else BLUE
        add_box(axes, (x, y, w, h), ec=colour, lw=2.5)
        axes.add_patch(plt.Rectangle((int(x), int(y)), 1, 1, fc=colour, alpha=0.7))
        axes.plot(x, y, "o", color="white", mec=colour, mew=2, ms=7)


def draw_anchors(axes, box, anchors, overlaps):
    """The anchors, centred on one object, with their IoU; the best one in blue."""
    x, y = box[:2]
    add_box(axes, box, ec=AMBER, lw=3)
    for anchor, (width, height) in enumerate(anchors):
        best = overlaps[anchor] == max(overlaps)
        add_box(axes, (x, y, width, height), ec=BLUE if best else GREY, lw=2.5 if best else 1.5, ls="--")
        text = f"{anchor}: IoU {overlaps[anchor]:.2f}"
        style = {"color": BLUE if best else INK, "weight": "bold" if best else "normal", "path_effects": OUTLINE}
        left, top = max(0.1, x - width / 2 + 0.1), y - height / 2
        if best:  # above the box
            axes.text(left, top - 0.1, text, fontsize=LABEL, va="bottom", **style)
        else:
            axes.text(left, max(0.1, top + 0.1), text, fontsize=LABEL, va="top", **style)


def draw_network(page, y, image_size, outputs):
    """A block per resolution, as high as its map on a logarithmic scale, and the passthrough above them."""
    stages = [  # title, side of the map relative to the image, channels, what computes it
        ("image", 1, 3, "RGB, 0 to 1"),
        ("", 1, 32, "1 convolution"),
        ("", 2, 64, "1 convolution"),
        ("", 4, 128, "3 convolutions"),
        ("", 8, 256, "3 convolutions"),
        ("fine", 16, 512, "5 convolutions"),
        ("coarse", 32, 1024, "5 + 2 conv."),
        ("joined", 32, 1024 + 256, "concatenation"),
        ("output", 32, outputs, "3x3 and 1x1"),
    ]
    step, width, base = 98, 58, y + 205
    tops = []
    for column, (title, shrink, channels, note) in enumerate(stages):
        side = image_size // shrink
        height = 34 + 24 * (5 - (shrink.bit_length() - 1))
        x, colour = 22 + step * column, BLUE if title in ("fine", "joined") else GREY
        page.add_patch(plt.Rectangle((x, base - height), width, height, fc=colour, alpha=0.25, ec=colour, lw=1.5))
        page.text(x + width / 2, base - height / 2, title, ha="center", va="center", color=INK)
        page.text(x + width / 2, base + 20, f"{side} x {side}", ha="center", weight="bold", color=INK)
        page.text(x + width / 2, base + 38, f"x {channels}", ha="center", weight="bold", color=INK)
        page.text(x + width / 2, base + 57, note, ha="center", fontsize=LABEL - 0.5)
        if column:
            start, end = (x - step + width + 2, base - 17), (x - 2, base - 17)
            page.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK})
            if shrink > stages[column - 1][1]:
                page.text(x - (step - width) / 2, base - 25, "pool", ha="center", fontsize=LABEL - 0.5)
        tops.append((x + width / 2, base - height))
    (x_1, top_1), (x_2, top_2) = tops[5], tops[7]
    level = y + 100
    page.plot([x_1, x_1, x_2], [top_1, level, level], color=BLUE, lw=2)
    page.annotate("", (x_2, top_2), (x_2, level), arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 2})
    page.text(x_1 + 8, level - 26, "passthrough: 1x1 convolution, 64 channels,", color=BLUE)
    fine, coarse = image_size // 16, image_size // 32
    page.text(x_1 + 8, level - 8, f"then reorg: {fine} x {fine} x 64 to {coarse} x {coarse} x 256", color=BLUE)


def draw_table(page, y, lines):
    """lines: (step, numbers, explanation) each; the last two, what the loss compares, are set off."""
    for row, (step, numbers, explanation) in enumerate(lines):
        style = {}
        if last := row >= len(lines) - 2:
            style = {"weight": "bold", "color": AMBER if row == len(lines) - 1 else BLUE}
        top = y + 24 * row + 10 * last
        page.text(LEFT, top, step, **style)
        for column, number in enumerate(numbers):
            text = f"{number:.0f}" if float(number).is_integer() else f"{number:.2f}"
            page.text(225 + 62 * column, top, text, ha="right", **style)
        page.text(555, top, explanation, color=style.get("color", INK))
    page.plot([LEFT, WIDTH - LEFT], [y + 24 * (len(lines) - 2) - 9] * 2, color=PALE, lw=1)


def main() -> None:
    model, classes, anchors, size = load_detector(CHECKPOINT, [], [], torch.device("cpu"), "fp32")
    dataset = VOCDataset(DATA_DIR, IMAGE_SETS, anchors, size, classes)
    index = [sample.image_id for sample in dataset.samples].index(IMAGE_ID)
    image, targets = dataset[index]
    with torch.no_grad():
        outputs = model(image[None]).float()  # (1, A, S, S, 5 + C)
    shape, cells = outputs.shape[1:4], size // 32  # A, S, S
    picture = image.permute(1, 2, 0).numpy() / 255

    # the objects, and the largest one, which the numbers are about
    lines = follow_object(dataset.samples[index], anchors, size)
    numbers = {step: values for step, values, _ in lines}
    overlaps = numbers["IoU with the anchors"]
    slots = targets[..., 0].nonzero()  # (M, 3): anchor, row, column
    _, x, y, w, h, _ = targets[targets[..., 0] > 0].T
    boxes = torch.stack([slots[:, 2] + x, slots[:, 1] + y, w, h], dim=1)  # (M, 4): centre and size, in cells
    followed = int(boxes[:, 2:].prod(dim=1).argmax())
    slot = tuple(slots[followed].tolist())
    label = int(targets[slot][5])

    # what the network says in that slot
    t_x, t_y, t_w, t_h, _ = outputs[0][slot][:5].tolist()
    decoded, objectness, probabilities = utils.decode_predictions(outputs, anchors)
    objectness = objectness.reshape(shape)  # (A, S, S)
    probabilities = probabilities.reshape(*shape, -1)  # (A, S, S, C)
    overlap = float(utils.box_iou(decoded.reshape(*shape, 4)[slot] * cells, boxes[followed]))
    says = f"objectness {objectness[slot]:.2f} (IoU {overlap:.2f}), {classes[label]} {probabilities[slot][label]:.2f}"
    sigmoid = torch.sigmoid(torch.tensor([t_x, t_y])).tolist()
    lines.append(("the network says", [*sigmoid, t_w, t_h], says))

    plt.rcParams.update({"text.color": INK, "font.size": NOTE})
    figure = plt.figure(figsize=(12, 12 * HEIGHT / WIDTH))
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    page.axis("off")

    notes = [
        f"Stretched to {size} x {size} pixels: {cells} x {cells} cells of 32 x 32.",
        "The cell of an object's centre is responsible for the object,",
        "together with one of the cell's anchors (2).",
    ]
    draw_grid(add_picture(page, LEFT, 30, 1, "One cell per object", notes, picture, cells), boxes, followed)
    notes = [
        "Anchors: typical box sizes (k-means). Each cell predicts one box",
        "per anchor. The anchor with the best IoU (intersection / union) is",
        "responsible; all have one centre, because only shapes count.",
    ]
    axes = add_picture(page, RIGHT, 30, 2, "One of five anchors", notes, picture, cells, dim=0.5)
    draw_anchors(axes, boxes[followed].tolist(), anchors, overlaps)

    page.text(LEFT, 560, "3  The network", fontsize=TITLE, weight="bold")
    draw_network(page, 535, size, outputs.shape[1] * outputs.shape[4])
    notes = [
        f"Per cell, {outputs.shape[1] * outputs.shape[4]} outputs = {len(anchors)} anchors x "
        f"(t_x, t_y, t_w, t_h: the box; t_o: the objectness; {len(classes)} class scores, softmax).",
        "The first 18 convolutions are Darknet-19. All but the last have batch norm and leaky ReLU. "
        "A pool halves both sides.",
    ]
    for row, note in enumerate(notes):
        page.text(LEFT, 829 + 20 * row, note)

    title = f"4  One {classes[label]} (amber), from its label to its target, and the output"
    page.text(LEFT, 893, title, fontsize=TITLE, weight="bold")
    draw_table(page, 921, lines)
    formula = "x = sigma(t_x) + column, y = sigma(t_y) + row, w = anchor width * exp(t_w), h = anchor height * exp(t_h)"
    page.text(LEFT, 1125, f"The box, in cells: {formula}.")
    note = f"The network was trained on this photograph and {len(dataset) - 1} others: it knows the answer."
    page.text(LEFT, 1145, note)

    best = objectness.argmax(dim=0, keepdim=True)  # (1, S, S): the anchor with the highest objectness of each cell
    notes = [
        "The highest sigma(t_o) of each cell. It is trained towards the",
        "object's IoU if responsible, otherwise towards 0 if IoU <= .6.",
    ]
    axes = add_picture(page, LEFT, 1190, 5, "Objectness", notes, picture, cells, dim=0.6)
    highest = objectness.amax(dim=0).numpy()
    axes.imshow(np.ones_like(highest), extent=(0, cells, cells, 0), cmap="Blues", vmin=0, vmax=1.3, alpha=0.9 * highest)
    centred = {"ha": "center", "va": "center", "fontsize": 11}
    for row, column in zip(*(highest >= 0.05).nonzero(), strict=True):
        colour = "white" if highest[row, column] > 0.6 else INK
        axes.text(column + 0.5, row + 0.5, f"{highest[row, column]:.2f}".lstrip("0"), color=colour, **centred)

    likely = probabilities.argmax(dim=-1).gather(0, best)[0]  # (S, S)
    notes = [
        "The likeliest class of that anchor. Only responsible anchors",
        "learn it; in the pale cells (objectness < .05) it means nothing.",
    ]
    axes = add_picture(page, RIGHT, 1190, 6, "Class", notes, picture, cells, dim=0.6)
    colours = torch.tensor([utils.class_colour(index) for index in range(len(classes))])
    axes.imshow(colours[likely].numpy() / 255, extent=(0, cells, cells, 0), alpha=np.where(highest < 0.05, 0.2, 0.9))
    for row, column in zip(*(highest >= 0.05).nonzero(), strict=True):
        axes.text(column + 0.5, row + 0.5, classes[likely[row, column]], **centred)

    large = cv2.resize(image.permute(1, 2, 0).numpy(), (SIDE * 2, SIDE * 2))  # for sharp labels
    threshold = f"Objectness x class probability >= {THRESHOLD}"
    found = "Several cells and anchors find the same object."
    suppressed = f"Boxes that overlap a better one (IoU > {NMS_THRESHOLD}) are gone."
    for x, number, title, note, overlap in [
        (LEFT, 7, threshold, found, 1.0),
        (RIGHT, 8, "After non-maximum suppression", suppressed, NMS_THRESHOLD),
    ]:
        detections = utils.postprocess(outputs, anchors, THRESHOLD, overlap)[0]
        notes = [f"{len(detections)} boxes. {note}"]
        names = [f"{classes[int(index)]} {confidence:.2f}" for confidence, index in detections[:, 4:].tolist()]
        drawn = utils.draw_boxes(large, detections[:, :4] * len(large), names, detections[:, 5])
        add_picture(page, x, 1700, number, title, notes, np.asarray(drawn) / 255, cells)
    figure.savefig(FILE, dpi=120)
    with Image.open(FILE) as drawn:  # 256 colours: less than half of the bytes
        picture = drawn.convert("RGB")
    palette = picture.quantize(256, Image.Quantize.FASTOCTREE)
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(FILE, optimize=True)
    print(f"wrote {FILE}: {len(slots)} objects, {len(detections)} detections")


if __name__ == "__main__":
    utils.override_globals(globals(), sys.argv[1:])
    with utils.plain_errors():
        main()
