"""Draws yolov2_loss_notes.jpg next to this script: how raw outputs become a box, and the five terms of the loss.

Sources: the box is YOLO9000 Fig. 3; the loss is the region layer of yolov2-voc.cfg (Darknet, src/region_layer.c).
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FILE = Path(__file__).with_name("yolov2_loss_notes.jpg")
WIDTH, HEIGHT = 900, 700  # page units: pixels of the figure shown 900 pixels wide; the file has twice as many
BLUE, AMBER, GREY, INK, PALE = "#1f5fa8", "#b06a00", "#667080", "#1f2933", "#d5dae1"
TITLE, FORMULA, NOTE = 17, 14, 12  # font sizes in points; at 900 pixels wide, one point is about one pixel

TEXTS = [  # x, y, font size, text
    (15, 465, FORMULA + 1, r"$b_x=\sigma(t_x)+c_x$"),
    (15, 496, FORMULA + 1, r"$b_y=\sigma(t_y)+c_y$"),
    (190, 465, FORMULA + 1, r"$b_w=p_w\,e^{t_w}$"),
    (190, 496, FORMULA + 1, r"$b_h=p_h\,e^{t_h}$"),
    (15, 527, FORMULA + 1, r"$\mathrm{objectness}=\sigma(t_o)$"),
    (15, 575, NOTE, r"Lengths are in cells ($S\times S$, each $32\times 32$ pixels)."),
    (15, 597, NOTE, "A slot is one (anchor, row, column)."),
    (15, 629, NOTE, "Each object is assigned to one slot, which is then"),
    (15, 651, NOTE, "responsible for it: the cell of the object's centre"),
    (15, 673, NOTE, "and the anchor of best IoU (width and height only)."),
    (368, 66, FORMULA, r"$\mathrm{loss}=\dfrac{1}{N}\,\sum\,(\mathrm{coord+object+no\_object+class+prior})$"),
    (368, 98, NOTE, "The sum over all slots of all images is divided by $N$, the number of images."),
    (368, 118, NOTE, r"$\lambda_{object}=5$, all other $\lambda=1$ (yolov2-voc.cfg)."),
]
TERMS = [  # name, slots it applies to, formula lines, note lines
    (
        "coord",
        "responsible slots",
        [
            r"$\dfrac{1}{2}\,\lambda_{coord}\,(2-wh/S^2)\,[\,(\sigma(t_x)-x)^2+(\sigma(t_y)-y)^2$",
            r"$\qquad\quad\ +\,(t_w-\ln(w/p_w))^2+(t_h-\ln(h/p_h))^2\,]$",
        ],
        "$x$, $y$: the object's centre within its cell; $w$, $h$: its size, in cells. $wh/S^2$ is",
        "its share of the image: small objects weigh up to twice as much.",
    ),
    (
        "object",
        "responsible slots",
        [r"$\dfrac{1}{2}\,\lambda_{object}\,(\sigma(t_o)-\mathrm{IoU})^2$"],
        "Trains the objectness to match the IoU of the predicted box with its object.",
        "The IoU is a constant: no gradient flows through it.",
    ),
    (
        "no_object",
        "all other slots that are not ignored",
        [r"$\dfrac{1}{2}\,\lambda_{no\_object}\,\sigma(t_o)^2$"],
        "Trains the objectness towards 0. Ignored: slots whose box overlaps",
        "any object by more than ignore_threshold (IoU > 0.6).",
    ),
    (
        "class",
        "responsible slots",
        [r"$-\lambda_{class}\,\ln\,p_{class}$"],
        "Cross-entropy: $p_{class}$ is the softmax probability of the object's class.",
    ),
    (
        "prior",
        "all other slots",
        [r"$\dfrac{1}{2}\cdot 0.01\,[\,(\sigma(t_x)-0.5)^2+(\sigma(t_y)-0.5)^2+t_w^2+t_h^2\,]$"],
        "Only while fewer than 12,800 images have been seen: pulls the box",
        "towards its anchor, centred in its cell.",
    ),
]


def draw_geometry(axes) -> None:
    """Draws YOLO9000 Fig. 3 in grid cells: the top left corner of the image, one cell, its anchor and its predicted
    box."""
    c_x, c_y, p_w, p_h, b_x, b_y, b_w, b_h = 1, 1, 1.76, 1.48, 1.64, 1.62, 2.5, 2.3
    for line in range(4):
        colour, width = (PALE, 1) if line else (INK, 2)  # line 0 is the edge of the image
        axes.plot([0, 4], [line, line], [line, line], [0, 4], color=colour, lw=width, zorder=-line)
    axes.add_patch(plt.Rectangle((c_x, c_y), 1, 1, fc="#fdf0d5", ec=AMBER, lw=1.8))
    axes.add_patch(plt.Rectangle((b_x - p_w / 2, b_y - p_h / 2), p_w, p_h, fill=False, ec=GREY, lw=1.8, ls="--"))
    axes.add_patch(plt.Rectangle((b_x - b_w / 2, b_y - b_h / 2), b_w, b_h, fill=False, ec=BLUE, lw=2.5))
    axes.plot(b_x, b_y, "o", color=BLUE, ms=7)
    lengths = [  # start, end, label, label position, colour
        ((0, 1.14), (c_x, 1.14), "$c_x$", (0.2, 1.29), AMBER),
        ((1.14, 0), (1.14, c_y), "$c_y$", (1.32, 0.22), AMBER),
        ((c_x, b_y), (b_x, b_y), r"$\sigma(t_x)$", (1.33, 1.78), BLUE),
        ((b_x, c_y), (b_x, b_y), r"$\sigma(t_y)$", (1.37, 1.27), BLUE),
        ((b_x - b_w / 2, 2.89), (b_x + b_w / 2, 2.89), "$b_w$", (b_x, 3.1), BLUE),
        ((3.01, b_y - b_h / 2), (3.01, b_y + b_h / 2), "$b_h$", (3.2, b_y), BLUE),
        ((b_x - p_w / 2, 2.46), (b_x + p_w / 2, 2.46), "$p_w$", (b_x, 2.61), GREY),
        ((2.6, b_y - p_h / 2), (2.6, b_y + p_h / 2), "$p_h$", (2.74, b_y), GREY),
    ]
    for start, end, label, position, colour in lengths:
        arrow = {"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0, "lw": 1.3, "color": colour}
        axes.annotate("", end, start, arrowprops=arrow)
        axes.text(*position, label, fontsize=16, color=colour, ha="center", va="center")
    axes.set(xlim=(-0.02, 3.4), ylim=(3.45, -0.02))
    axes.axis("off")


def main() -> None:
    plt.rcParams.update({"text.color": INK, "font.size": NOTE})
    figure = plt.figure(figsize=(12, 12 * HEIGHT / WIDTH))
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    page.axis("off")
    page.plot([352, 352], [15, HEIGHT - 15], color=PALE, lw=1)
    page.text(15, 32, "From raw outputs to a box", fontsize=TITLE, weight="bold")
    page.text(368, 32, "The loss: five terms", fontsize=TITLE, weight="bold")
    legend = [(15, "image edge", INK), (118, "cell", AMBER), (162, "anchor", GREY), (231, "predicted box", BLUE)]
    for x, label, colour in legend:
        page.text(x, 64, label, color=colour, weight="bold")
    draw_geometry(figure.add_axes((15 / WIDTH, 1 - 407 / HEIGHT, 324 / WIDTH, 327 / HEIGHT)))
    for x, y, size, text in TEXTS:
        page.text(x, y, text, fontsize=size)
    top = 138
    for name, slots, formulas, *notes in TERMS:
        colour = BLUE if slots == "responsible slots" else GREY
        height = 26 + 31 * len(formulas) + 19 * len(notes)
        page.add_patch(plt.Rectangle((368, top), 4, height, fc=colour, ec="none"))
        page.text(382, top + 13, name, fontsize=FORMULA, color=colour, weight="bold")
        page.text(885, top + 13, slots, color=colour, ha="right")
        for row, formula in enumerate(formulas):
            page.text(382, top + 44 + 31 * row, formula, fontsize=FORMULA)
        for row, note in enumerate(notes):
            page.text(382, top + 41 + 31 * len(formulas) + 19 * row, note)
        top += height + 14
    figure.savefig(FILE, dpi=150, pil_kwargs={"quality": 80})


if __name__ == "__main__":
    main()
