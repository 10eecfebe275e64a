"""Draws walkthrough_1.png and walkthrough_2.png next to this script: one photograph on its way through YOLOv2, from
grid and anchors to final boxes.

    python train.py && python images/walkthrough.py

All numbers and maps come from the photograph's label file and from the network in CHECKPOINT; for the committed
pictures, the detector of tests/MEASUREMENTS.md, A detector on 3,400 photographs. Sources: YOLO9000 sec. 2,
yolov2-voc.cfg.
"""

import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import patheffects, transforms
from matplotlib import pyplot as plt
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules

import utils
from darknet_model import DARKNET19_LAYERS
from dataset import VOCDataset, follow_object, read_image
from model import load_detector

CHECKPOINT = "runs/yolov2.pt"  # a detector trained by train.py
DATA_DIR = "data_samples/voc"
IMAGE_SETS = [("2007", "tiny")]
IMAGE_ID = "000007"  # an image of IMAGE_SETS
THRESHOLD = 0.1  # lowest objectness in parts 5 and 6, lowest confidence in parts 7 and 8
NMS_THRESHOLD = 0.45  # IoU
FOLDER = str(Path(__file__).parent)  # of the two pictures

WIDTH, SCALE = 900, 1.5  # page units: pixels of the figure shown 900 pixels wide; file pixels per page unit
LEFT, RIGHT, SIDE = 24, 484, 392  # page units: left edges and width of the square pictures; even: whole file pixels
PHOTO = 294  # pixels, each 2 x 2 file pixels: PNG needs half of the bytes, and no difference is visible
BLUE, AMBER, INK, PALE = "#1f5fa8", "#b06a00", "#1f2933", "#d5dae1"
KINDS = {"3x3": "#2f6fb5", "1x1": "#2a9d8f", "max-pool": "#d1495b", "passthrough": "#8353a8", "output": "#e59a1c"}
TITLE, NOTE, LABEL = 16, 12.5, 12  # font sizes in points; at 900 pixels wide, one point is about one pixel
PARAGRAPH = {"va": "top", "linespacing": 1.4}
OUTLINE = [patheffects.withStroke(linewidth=3, foreground="white")]  # keeps text on a photograph readable


def add_page(height):
    """height: page units -> the axes of an empty page, in page units from its top left corner."""
    figure = plt.figure(figsize=(WIDTH / 75, height / 75))
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    page.axis("off")
    return page


def save_page(page, number):
    file = Path(FOLDER) / f"walkthrough_{number}.png"
    page.figure.savefig(file, dpi=75 * SCALE)
    with Image.open(file) as drawn:
        picture = drawn.convert("RGB")  # without matplotlib's alpha channel
    picture.save(file, optimize=True)
    print(f"wrote {file}: {picture.width} x {picture.height} pixels, {file.stat().st_size / 1000:.0f} KB")


def add_picture(page, x, y, title, note, photo, cells):
    """Adds a square photograph with its title and note -> its axes, in grid cells."""
    page.text(x, y, title, fontsize=TITLE, weight="bold")
    page.text(x, y + SIDE + 24, textwrap.fill(note, 61), **PARAGRAPH)
    height = page.get_ylim()[0]
    axes = page.figure.add_axes((x / WIDTH, 1 - (y + 14 + SIDE) / height, SIDE / WIDTH, SIDE / height))
    axes.imshow(photo, extent=(0, cells, cells, 0), interpolation="nearest")
    axes.set(xlim=(0, cells), ylim=(cells, 0), xticks=[], yticks=[])
    return axes


def draw_grid(axes):
    cells = int(axes.get_xlim()[1])
    for line in range(1, cells):
        axes.plot([0, cells], [line, line], [line, line], [0, cells], color="white", lw=0.7)


def fill_cell(axes, row, column, text="", **style):
    axes.add_patch(plt.Rectangle((column, row), 1, 1, **style))
    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=11)


def add_box(axes, box, **style):
    """box: x, y, w, h of centre and size in grid cells."""
    x, y, w, h = box
    axes.add_patch(plt.Rectangle((x - w / 2, y - h / 2), w, h, fill=False, **style))


def draw_anchors(axes, box, anchors, overlaps):
    """The anchors of the cell that is responsible for a box, with their IoU; the best one in blue."""
    centre, reach = np.floor(box[:2]) + 0.5, np.max(anchors, axis=0) / 2
    # anchors may reach beyond the photograph: the axes grow to the square around both
    low, high = np.minimum(0, centre - reach), np.maximum(axes.get_xlim()[1], centre + reach)
    (x, y), half = (low + high) / 2, 0.52 * max(high - low)
    axes.set(xlim=(x - half, x + half), ylim=(y + half, y - half))
    for anchor, (width, height) in enumerate(anchors):
        best = overlaps[anchor] == max(overlaps)
        colour, weight, line = (BLUE, "bold", 2.5) if best else (INK, "normal", 1.2)
        add_box(axes, (*centre, width, height), ec=colour, lw=line, ls="--")
        x, y = centre - (width / 2 - 0.1, height / 2 - 0.1)
        if width < 2:  # too narrow for its label, which goes below
            x, y = centre + (-0.9, height / 2 + 0.1)
        style = {"color": colour, "weight": weight, "path_effects": OUTLINE}
        axes.text(x, y, f"{anchor}: {overlaps[anchor]:.2f}", fontsize=LABEL, va="top", **style)


def draw_block(page, x, base, share, channels, colour):
    """A feature map as a box in oblique projection -> width and height of its front, vector to its back, in page units.

    share: side of the map relative to the image. Height and depth grow with its square root, the width with that of the
    channels.
    """
    width, height = 0.5 * channels**0.5, 130 * share**0.5
    across, up, back = np.array([width, 0]), np.array([0, -height]), np.array([0.35 * height, -0.2 * height])
    faces = [(0 * up, across, up, 0.0), (across, back, up, 0.3), (up, across, back, 0.6)]  # front, right, top
    for corner, first, second, white in faces:
        shade = (1 - white) * np.array(matplotlib.colors.to_rgb(colour)) + white
        points = np.array([corner, corner + first, corner + first + second, corner + second]) + (x, base)
        page.add_patch(plt.Polygon(points, fc=shade, ec="white", lw=0.5))
    return width, height, back


def draw_network(page, base, photo, image_size, outputs):
    """A block per layer, left to right, and the passthrough above them. base: y of the blocks' lower edge."""
    stages = [[(3, "image")], []]  # blocks of the same map size, drawn side by side: (channels, kind)
    for layer in DARKNET19_LAYERS:
        if layer == "pool":
            stages.append([(stages[-1][-1][0], "max-pool")])
        else:
            stages[-1].append((layer[0], f"{layer[1]}x{layer[1]}"))
    stages += [[(1024, "3x3"), (1024, "3x3")], [(1024 + 256, "passthrough")], [(1024, "3x3")], [(outputs, "output")]]
    sides = [image_size] + [image_size >> pools for pools in range(6)] + 4 * [image_size // 32]
    x, starts, tops = LEFT, [], []
    for side, stage in zip(sides, stages, strict=True):
        starts.append(x)
        page.text(x, base + 7, f"{side} x {side}\nx {stage[-1][0]}", fontsize=LABEL, **PARAGRAPH)
        for channels, kind in stage:
            width, height, back = draw_block(page, x, base, side / image_size, channels, KINDS.get(kind, INK))
            if kind == "image":  # the photograph on the right face
                face = transforms.Affine2D.from_values(*back, 0, height, x + width, base - height)
                style = {"transform": face + page.transData, "aspect": "auto", "zorder": 2}
                page.imshow(photo, extent=(0, 1, 1, 0), **style)
            tops.append((x + width / 2, base - height))
            x += width + 5
        x = max(x + back[0], starts[-1] + (76 if len(starts) < 6 else 62))
    for left, right, text in [(1, 7, "Darknet-19 without its last convolution"), (7, 11, "detection head")]:
        left, right = starts[left], [*starts, WIDTH - LEFT + 12][right] - 12
        page.plot([left, left, right, right], [base + 46, base + 51, base + 51, base + 46], color=INK, lw=1)
        page.text((left + right) / 2, base + 67, text, ha="center")

    (x_fine, y_fine), (x_joined, y_joined) = tops[-12], tops[-3]  # the last map of side image_size / 16; 1280 channels
    level, colour = base - 95, KINDS["passthrough"]
    page.plot([x_fine, x_fine, x_joined], [y_fine, level, level], color=colour, lw=2)
    arrow = {"arrowstyle": "->", "color": colour, "lw": 2, "shrinkA": 0}
    page.annotate("", (x_joined, y_joined), (x_joined, level), arrowprops=arrow)
    for x, side, channels in [(x_fine + 40, image_size // 16, 64), (x_fine + 115, image_size // 32, 256)]:
        draw_block(page, x, level + 12, side / image_size, channels, colour)
        page.text(x, level + 19, f"{side} x {side}\nx {channels}", fontsize=LABEL, **PARAGRAPH)
    page.text(x_fine, level - 40, "passthrough: 1x1 convolution, then reorg", color=colour)


def draw_table(page, y, lines):
    """lines: (step, numbers, explanation) each; the last two, what the loss compares, are set off."""
    for row, (step, numbers, explanation) in enumerate(lines):
        style = {}
        if last := row >= len(lines) - 2:
            style = {"weight": "bold", "color": AMBER if row == len(lines) - 1 else BLUE}
        top = y + 22 * row + 10 * last
        page.text(LEFT, top, step, **style)
        for column, number in enumerate(numbers):
            text = f"{number:.0f}" if float(number).is_integer() else f"{number:.3f}"
            page.text(232 + 60 * column, top, text, ha="right", **style)
        page.text(555, top, explanation, color=style.get("color", INK))
    page.plot([LEFT, WIDTH - LEFT], [y + 22 * (len(lines) - 2) - 9] * 2, color=PALE, lw=1)


def main() -> None:
    model, classes, anchors, size = load_detector(CHECKPOINT, [], [], torch.device("cpu"), "fp32")
    is_known = utils.load_checkpoint(CHECKPOINT)["settings"]["DATA_DIR"] == DATA_DIR
    dataset = VOCDataset(DATA_DIR, IMAGE_SETS, anchors, size, classes)
    index = [sample.image_id for sample in dataset.samples].index(IMAGE_ID)
    sample, (image, targets) = dataset.samples[index], dataset[index]
    with torch.no_grad():
        outputs = model(image[None]).float()  # (1, A, S, S, 5 + C)
    shape, cells, channels = outputs.shape[1:4], size // 32, outputs.shape[1] * outputs.shape[4]

    # 32 of 256 levels, 16 for grey: no visible difference on a photograph, and half of the bytes
    small = np.asarray(Image.fromarray(read_image(sample.image_file)).resize((PHOTO, PHOTO), Image.Resampling.BOX))
    photo = (small // 8 * 8 + 4).repeat(2, axis=0).repeat(2, axis=1)
    faint = 128 + np.asarray(Image.fromarray(photo).convert("L").convert("RGB")) // 16 * 8

    # the objects, and the largest one, which the numbers are about
    lines = follow_object(sample, anchors, size)
    overlaps = {step: values for step, values, _ in lines}["IoU with the anchors"]
    slots = targets[..., 0].nonzero()  # (M, 3): anchor, row, column
    _, x, y, w, h, _ = targets[targets[..., 0] > 0].T
    boxes = torch.stack([slots[:, 2] + x, slots[:, 1] + y, w, h], dim=1)  # (M, 4): centre and size, in cells
    followed = int(boxes[:, 2:].prod(dim=1).argmax())
    slot = tuple(slots[followed].tolist())
    label = int(targets[slot][5])

    # what the network says in that slot
    decoded, objectness, probabilities = utils.decode_predictions(outputs, anchors)
    objectness = objectness.reshape(shape)  # (A, S, S)
    probabilities = probabilities.reshape(*shape, -1)  # (A, S, S, C)
    overlap = float(utils.box_iou(decoded.reshape(*shape, 4)[slot] * cells, boxes[followed]))
    says = f"objectness {objectness[slot]:.2f} (IoU {overlap:.2f}), {classes[label]} {probabilities[slot][label]:.2f}"
    t_xy, t_wh = outputs[0][slot][:4].split(2)
    lines.append(("the network says", [*torch.sigmoid(t_xy).tolist(), *t_wh.tolist()], says))

    plt.rcParams.update({"text.color": INK, "font.size": NOTE})
    page = add_page(1130)
    note = f"The photograph is stretched to {size} x {size} pixels and divided into {cells} x {cells} cells of 32 x 32 "
    note += "pixels. The cell of an object's centre (white dot) is responsible for the object."
    grid_axes = add_picture(page, LEFT, 30, "1  One cell per object", note, photo, cells)
    note = "The five anchors share the cell's centre. They are typical box sizes, found by k-means. The one whose "
    note += "shape has the highest IoU (numbers) is responsible (blue)."
    anchor_axes = add_picture(page, RIGHT, 30, "2  One of five anchors", note, faint, cells)
    for axes, shown in [(grid_axes, range(len(boxes))), (anchor_axes, [followed])]:
        draw_grid(axes)
        for index in shown:
            box, colour = boxes[index].tolist(), AMBER if index == followed else BLUE
            fill_cell(axes, int(box[1]), int(box[0]), fc=colour, alpha=0.7)
            add_box(axes, box, ec=colour, lw=2.5)
            axes.plot(*box[:2], "o", color="white", mec=colour, mew=2, ms=7)
    draw_anchors(anchor_axes, boxes[followed].tolist(), anchors, overlaps)

    page.text(LEFT, 540, "3  The network", fontsize=TITLE, weight="bold")
    page.text(220, 540, "convolutions:")
    for x, (kind, colour) in zip([334, 400, 490, 600, 735], KINDS.items(), strict=True):
        page.add_patch(plt.Rectangle((x - 18, 529), 12, 12, fc=colour))
        page.text(x, 540, kind)
    draw_network(page, 716, photo, size, channels)
    note = f"Height and depth of a block: size of the map. Width: channels. The {channels} channels of the output:\n"
    note += f"{len(anchors)} anchors x (t_x, t_y, t_w, t_h: box; t_o: objectness; {len(classes)} class scores).\n"
    note += "The passthrough brings in the finer map, for small objects; reorg halves its side and takes channels x 4."
    page.text(LEFT, 799, note, **PARAGRAPH)

    title = f"4  The {classes[label]} in amber: from the label file to the network's output"
    page.text(LEFT, 882, title, fontsize=TITLE, weight="bold")
    draw_table(page, 910, lines)
    note = "Box, in cells: x = column + sigma(t_x), y = row + sigma(t_y), w = p_w exp(t_w), h = p_h exp(t_h); "
    note += f"anchor: p_w x p_h.\nThis photograph was {'' if is_known else 'not '}in the training set."
    page.text(LEFT, 1088, note, **PARAGRAPH)
    save_page(page, 1)

    page = add_page(992)
    highest, best = objectness.max(dim=0)  # (S, S) each
    likely = probabilities.argmax(dim=-1).gather(0, best[None])[0]  # (S, S)
    note = f"How sure the network is of an object: the highest sigma(t_o) of a cell (if >= {THRESHOLD}). It learns the "
    note += "IoU of box and object if responsible, otherwise 0 (unless the IoU is above 0.6)."
    object_axes = add_picture(page, LEFT, 30, "5  Objectness", note, faint, cells)
    note = "The most probable class of the same anchors. Only responsible anchors learn the class: in the grey cells, "
    note += "it means nothing."
    class_axes = add_picture(page, RIGHT, 30, "6  Class", note, faint, cells)
    draw_grid(object_axes)
    draw_grid(class_axes)
    for row, column in (highest >= THRESHOLD).nonzero().tolist():
        value, index = float(highest[row, column]), int(likely[row, column])
        fill_cell(object_axes, row, column, f"{value:.2f}".lstrip("0"), fc="#5b9be0", alpha=0.2 + 0.7 * value)
        fill_cell(class_axes, row, column, classes[index], fc=np.array(utils.class_colour(index)) / 255, alpha=0.8)

    found = "Confidence is objectness x class probability. Several cells and anchors find the same object."
    suppressed = f"A box that overlaps a more confident one of its class (IoU > {NMS_THRESHOLD}) is dropped."
    for x, title, note, overlap in [
        (LEFT, f"7  Confidence above {THRESHOLD}", found, 1.0),
        (RIGHT, "8  After non-maximum suppression", suppressed, NMS_THRESHOLD),
    ]:
        detections = utils.postprocess(outputs, anchors, THRESHOLD, overlap)[0].flip(0)  # the most confident on top
        names = [f"{classes[int(index)]} {confidence:.2f}" for confidence, index in detections[:, 4:].tolist()]
        drawn = utils.draw_boxes(photo, detections[:, :4] * len(photo), names, detections[:, 5])
        add_picture(page, x, 530, title, f"{len(detections)} boxes. {note}", np.asarray(drawn), cells)
    save_page(page, 2)
    print(f"{len(slots)} objects, {len(detections)} detections")


if __name__ == "__main__":
    with utils.plain_errors():
        utils.override_globals(globals(), sys.argv[1:])
        main()
