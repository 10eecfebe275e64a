"""The loss of YOLOv2: the region layer of Darknet, and the printed equation of YOLOv1 with the boxes of YOLOv2.

Letters: N images, A anchors (5), S_h x S_w grid cells (13 x 13 at 416), C classes (20), M = A * S_h * S_w boxes of an image,
K the largest number of objects in an image of the batch. A slot is one (anchor, row, column); the slot that holds an object is
the one "responsible" for it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRIOR_IMAGES = 12_800  # Darknet pulls every box towards its anchor during so many images (src/region_layer.c)
PRIOR_WEIGHT = 0.01
MOST_TRUTHS = 100  # objects of an image that count on a GPU; ours: Darknet keeps 30, and would not need a bound on a CPU


class YoloLoss(nn.Module):
    """The loss between raw outputs and encoded targets, one scalar a term.

    anchors: A pairs of width and height in grid cells. The lambdas weigh the terms; yolov2-voc.cfg has coord 1, object 5,
    no_object 1, class 1. ignore_threshold: IoU above which a box without an object is not called background (darknet only).
    equation: "darknet" (region layer of yolov2-voc.cfg, gradient for gradient) or "yolov1" (YOLOv1 sec. 2.2, eq. 3, with b_x,
    b_y, b_w, b_h of YOLO9000 Fig. 3). Raises ValueError for another equation.
    """

    def __init__(
        self,
        anchors,
        lambda_coord: float = 1.0,
        lambda_object: float = 5.0,
        lambda_no_object: float = 1.0,
        lambda_class: float = 1.0,
        ignore_threshold: float = 0.6,
        equation: str = "darknet",
    ):
        super().__init__()
        if equation not in ("darknet", "yolov1"):
            raise ValueError(f'equation must be "darknet" or "yolov1", not {equation!r}')
        self.register_buffer("anchors", torch.as_tensor(anchors, dtype=torch.float32), persistent=False)
        self.lambda_coord, self.lambda_object = lambda_coord, lambda_object
        self.lambda_no_object, self.lambda_class = lambda_no_object, lambda_class
        self.ignore_threshold, self.equation = ignore_threshold, equation

    def forward(self, predictions: Tensor, targets: Tensor, images_seen: int | None = None) -> dict[str, Tensor]:
        """predictions: (N, A, S_h, S_w, 5+C) raw; targets: (N, A, S_h, S_w, 6) as dataset.encode_targets makes them;
        images_seen: images trained on before this batch (None: the prior phase is over).

        -> scalars coord, object, no_object, class, prior (weights in, summed over the image, averaged over the N images) and
        total, their sum. Raises ValueError where the two shapes do not fit. Neither input is changed.
        """
        n, a, s_h, s_w, channels = predictions.shape
        if targets.shape != (n, a, s_h, s_w, 6) or a != len(self.anchors):
            raise ValueError(
                f"predictions {tuple(predictions.shape)} and {len(self.anchors)} anchors do not fit targets {tuple(targets.shape)}"
            )
        if predictions.dtype != torch.float64:
            predictions = predictions.float()  # the outputs may come in half precision, the loss is worked out in full
        anchors = self.anchors.to(predictions.dtype)
        m = a * s_h * s_w
        predictions = predictions.reshape(n, m, channels)  # (N, M, 5+C)
        targets = targets.reshape(n, m, 6).to(predictions.dtype)  # (N, M, 6)

        # t_x, t_y, t_w, t_h, t_o of all M slots, as planes: faster to work on than every 25th number
        all_t_xy, all_t_wh, all_t_o = predictions[..., :5].movedim(-1, 0).contiguous().split([2, 2, 1])  # (2 or 1, N, M)
        all_sigma_xy = torch.sigmoid(all_t_xy)

        # The anchor and the cell of each of the M slots: p_w, p_h and c_x, c_y of the paper.
        p_wh = anchors[:, None, None, :].expand(a, s_h, s_w, 2).reshape(m, 2)  # (M, 2)
        rows, columns = torch.meshgrid(
            torch.arange(s_h, device=anchors.device), torch.arange(s_w, device=anchors.device), indexing="ij"
        )
        c_xy = torch.stack([columns, rows], dim=-1).expand(a, s_h, s_w, 2).reshape(m, 2)  # (M, 2)

        # The slots that hold an object, padded to K a image: rows of the largest objectness. Working on these K rows rather than on
        # all M slots is what keeps the loss cheap; a constant K on a GPU keeps the processor from waiting for it.
        objectness = targets[..., 0]  # (N, M), 1 where the slot holds an object
        k = min(m, MOST_TRUTHS) if targets.is_cuda else int(objectness.sum(dim=1).max())
        held, slots = objectness.topk(k, dim=1)  # (N, K), held is 1 for an object and 0 for padding
        truth = targets.gather(1, slots[..., None].expand(n, k, 6))  # (N, K, 6)
        responsible = predictions.gather(1, slots[..., None].expand(n, k, channels))  # (N, K, 5+C)
        responsible = torch.where(held[..., None] > 0, responsible, 0.0)  # no number of the padding can spoil a gradient
        p_wh_responsible, c_xy_responsible = p_wh[slots], c_xy[slots]  # (N, K, 2)
        truth_xy = truth[..., 1:3] + c_xy_responsible  # centres in grid cells
        truth_wh = torch.where(held[..., None] > 0, truth[..., 3:5], 1.0)  # sizes in grid cells; 1 in padding avoids log(0)

        t_xy, t_wh, t_o, class_logits = responsible.split([2, 2, 1, channels - 5], dim=-1)
        b_xy = torch.sigmoid(t_xy) + c_xy_responsible  # YOLO9000 Fig. 3, in grid cells
        b_wh = p_wh_responsible * torch.exp(t_wh)
        confidence = torch.sigmoid(t_o[..., 0])  # (N, K)
        with torch.no_grad():  # the IoU of each responsible box with its own object: the confidence to aim at
            iou_with_truth = intersection_over_union(b_xy, b_wh, truth_xy, truth_wh)  # (N, K)
        labels = truth[..., 5].long()

        if self.equation == "darknet":
            # ---- coord: 1/2 lambda_coord (2 - w h) [(sigma(t_x) - x)^2 + (sigma(t_y) - y)^2
            #                                         + (t_w - ln w/p_w)^2 + (t_h - ln h/p_h)^2]
            # with w h the object's share of the image: small objects weigh up to twice as much as large ones.
            share = truth_wh.prod(dim=-1) / (s_h * s_w)
            error = (torch.sigmoid(t_xy) - truth[..., 1:3]) ** 2 + (t_wh - torch.log(truth_wh / p_wh_responsible)) ** 2  # (N, K, 2)
            coord = 0.5 * self.lambda_coord * ((2 - share) * error.sum(dim=-1) * held).sum()
            half = 0.5  # every square of the region layer stands behind a half, so that its gradient is the plain difference

            # ---- class: cross-entropy of the softmax over the classes
            entropy = F.cross_entropy(class_logits.flatten(0, 1), labels.flatten(), reduction="none")  # (N*K,)
            classes = self.lambda_class * (entropy * held.flatten()).sum()
        else:
            # ---- coord: lambda_coord [(b_x - x)^2 + (b_y - y)^2 + (sqrt(b_w) - sqrt(w))^2 + (sqrt(b_h) - sqrt(h))^2]
            # in grid cells: rows 1 and 2 of the equation; the roots let the same error weigh more in a small box.
            root = torch.sqrt(b_wh.clamp(min=1e-12))  # the slope of a root at 0 has no end
            error = (b_xy - truth_xy) ** 2 + (root - torch.sqrt(truth_wh)) ** 2  # (N, K, 2)
            coord = self.lambda_coord * (error.sum(dim=-1) * held).sum()
            half = 1.0

            # ---- class: lambda_class sum_c (p(c) - 1[c is the object's class])^2: row 5, of the responsible slot instead of
            # the cell, because in YOLOv2 every box has classes of its own.
            difference = torch.softmax(class_logits, dim=-1) - F.one_hot(labels, channels - 5)
            classes = self.lambda_class * ((difference**2).sum(dim=-1) * held).sum()

        # ---- object: (half) lambda_object (sigma(t_o) - IoU)^2; no gradient flows through the IoU
        objects = half * self.lambda_object * ((confidence - iou_with_truth) ** 2 * held).sum()

        # ---- no_object: (half) lambda_no_object sigma(t_o)^2 in all other slots
        background = 1 - objectness  # (N, M)
        if self.equation == "darknet":  # unless the box lies well on some object of the image: that is no mistake
            with torch.no_grad():
                all_xy = (all_sigma_xy + c_xy.T[:, None]).movedim(0, -1)  # (N, M, 2)
                all_wh = (p_wh.T[:, None] * torch.exp(all_t_wh)).movedim(0, -1)
                iou = intersection_over_union(
                    all_xy[:, None], all_wh[:, None], truth_xy[:, :, None], truth_wh[:, :, None]
                )  # (N, K, M)
                lies_well = ((iou > self.ignore_threshold) & (held[..., None] > 0)).any(dim=1)  # (N, M)
                background = background * ~lies_well
        no_object = half * self.lambda_no_object * (torch.sigmoid(all_t_o[0]) ** 2 * background).sum()

        # ---- prior: 1/2 .01 [(sigma(t_x) - .5)^2 + (sigma(t_y) - .5)^2 + t_w^2 + t_h^2] in all slots without an object, at
        # the start of training: until it knows better, a box is its anchor in the middle of its cell.
        prior = predictions.new_zeros(())
        if self.equation == "darknet" and images_seen is not None and images_seen < PRIOR_IMAGES:
            offset = (all_sigma_xy - 0.5) ** 2 + all_t_wh**2  # (2, N, M)
            prior = 0.5 * PRIOR_WEIGHT * (offset * (1 - objectness)).sum()

        # The sum over the boxes is divided by the number of images, never by the number of boxes.
        terms = {"coord": coord, "object": objects, "no_object": no_object, "class": classes, "prior": prior}
        terms = {name: value / n for name, value in terms.items()}
        return {**terms, "total": sum(terms.values())}


def intersection_over_union(xy_1: Tensor, wh_1: Tensor, xy_2: Tensor, wh_2: Tensor) -> Tensor:
    """IoU of boxes given by centres and sizes (..., 2) of one unit; the leading dimensions broadcast -> (...)."""
    sides = []
    for axis in range(2):  # x, then y: one plane at a time is twice as fast as pairs of numbers
        low_1, high_1 = (xy_1 - wh_1 / 2)[..., axis].contiguous(), (xy_1 + wh_1 / 2)[..., axis].contiguous()
        low_2, high_2 = (xy_2 - wh_2 / 2)[..., axis].contiguous(), (xy_2 + wh_2 / 2)[..., axis].contiguous()
        sides.append((torch.minimum(high_1, high_2) - torch.maximum(low_1, low_2)).clamp_(min=0))
    intersection = sides[0] * sides[1]
    return intersection / (wh_1.prod(dim=-1) + wh_2.prod(dim=-1) - intersection)


# ---------------------------------------------------------------- python loss.py: a worked example, and the notes as a picture

EXAMPLE_ANCHORS = [(1.0, 1.0), (1.5, 0.75)]  # two priors, in cells of a 2 x 2 grid
EXAMPLE_TRUTH = {
    "anchor": 1,
    "row": 1,
    "column": 0,
    "x": 0.7,
    "y": 0.4,
    "w": 1.2,
    "h": 0.8,
    "label": 1,
}  # one object of class 1 of 3


def example_tensors() -> tuple[Tensor, Tensor]:
    """One image, 2 anchors, 2 x 2 cells, 3 classes -> predictions (1, 2, 2, 2, 8) and targets (1, 2, 2, 2, 6), float64."""
    predictions = torch.zeros(1, 2, 2, 2, 8, dtype=torch.float64)
    predictions[..., 4] = -2.0  # nothing here, says every slot with confidence sigma(-2) = .119 ...
    # ... but the responsible one, and its neighbour, which lies on the same object
    predictions[0, 1, 1, 0] = torch.tensor([0.4, -0.4, -0.2, 0.1, 0.8, 0.0, 1.0, -1.0], dtype=torch.float64)
    predictions[0, 0, 1, 0] = torch.tensor([0.8, -0.4, 0.1, -0.2, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    targets = torch.zeros(1, 2, 2, 2, 6, dtype=torch.float64)
    anchor, row, column, *values = EXAMPLE_TRUTH.values()
    targets[0, anchor, row, column] = torch.tensor([1, *values], dtype=torch.float64)
    return predictions, targets


def print_example(equation: str) -> None:
    """Works the loss of the example out in plain arithmetic, a line a step, and sets it beside what YoloLoss says."""
    predictions, targets = example_tensors()
    sigma, t = (lambda value: 1 / (1 + math.exp(-value))), EXAMPLE_TRUTH
    darknet = equation == "darknet"
    weights = (1.0, 5.0, 1.0, 1.0) if darknet else (5.0, 1.0, 0.5, 1.0)  # coord, object, no_object, class; cfg and YOLOv1 sec. 2.2
    half, half_text = (0.5, "1/2 * ") if darknet else (1.0, "")
    names = ("coord", "object", "no_object", "class")
    print(f'\n==== equation="{equation}", lambdas', ", ".join(f"{n} {w}" for n, w in zip(names, weights, strict=True)), "====")

    t_x, t_y, t_w, t_h, t_o, *logits = predictions[0, t["anchor"], t["row"], t["column"]].tolist()
    p_w, p_h = EXAMPLE_ANCHORS[t["anchor"]]
    print(f"responsible slot: anchor {t['anchor']} ({p_w} x {p_h}), row {t['row']}, column {t['column']}; units are grid cells")
    print(f"  prediction   t_x {t_x}, t_y {t_y}, t_w {t_w}, t_h {t_h}, t_o {t_o}, class logits {logits}")
    b_w, b_h = p_w * math.exp(t_w), p_h * math.exp(t_h)
    print(f"  box          sigma(t_x) {sigma(t_x):.4f}, sigma(t_y) {sigma(t_y):.4f}, ", end="")
    print(f"b_w = {p_w} e^{t_w} = {b_w:.4f}, b_h = {p_h} e^{t_h} = {b_h:.4f}")
    print(f"  target       x {t['x']}, y {t['y']}, w {t['w']}, h {t['h']}, class {t['label']}")

    def overlap(box, truth):  # corners from centre and size, then intersection over union
        sides = [
            min(b + s / 2, u + v / 2) - max(b - s / 2, u - v / 2)
            for b, s, u, v in zip(box[:2], box[2:], truth[:2], truth[2:], strict=True)
        ]
        intersection = max(sides[0], 0) * max(sides[1], 0)
        return intersection / (box[2] * box[3] + truth[2] * truth[3] - intersection)

    truth = (t["column"] + t["x"], t["row"] + t["y"], t["w"], t["h"])
    iou = overlap((t["column"] + sigma(t_x), t["row"] + sigma(t_y), b_w, b_h), truth)
    exponents = [math.exp(logit) for logit in logits]
    shares = [value / sum(exponents) for value in exponents]
    print(f"  IoU of the box with its object {iou:.4f}; class probabilities {', '.join(f'{share:.4f}' for share in shares)}")

    squares = f"({sigma(t_x):.4f} - {t['x']})^2 + ({sigma(t_y):.4f} - {t['y']})^2"
    coord = (sigma(t_x) - t["x"]) ** 2 + (sigma(t_y) - t["y"]) ** 2
    if darknet:
        goal_w, goal_h, factor = math.log(t["w"] / p_w), math.log(t["h"] / p_h), 2 - t["w"] * t["h"] / 4
        coord = half * weights[0] * factor * (coord + (t_w - goal_w) ** 2 + (t_h - goal_h) ** 2)
        squares = f"(2 - {t['w']} * {t['h']} / 4) * [{squares} + ({t_w} - ln {t['w']}/{p_w})^2 + ({t_h} - ln {t['h']}/{p_h})^2]"
        classes, class_text = -weights[3] * math.log(shares[t["label"]]), f"-ln {shares[t['label']]:.4f}"
    else:
        coord = weights[0] * (coord + (math.sqrt(b_w) - math.sqrt(t["w"])) ** 2 + (math.sqrt(b_h) - math.sqrt(t["h"])) ** 2)
        squares = f"[{squares} + (sqrt {b_w:.4f} - sqrt {t['w']})^2 + (sqrt {b_h:.4f} - sqrt {t['h']})^2]"
        differences = [share - (index == t["label"]) for index, share in enumerate(shares)]
        classes, class_text = weights[3] * sum(d * d for d in differences), " + ".join(f"({d:.4f})^2" for d in differences)
    objects = half * weights[1] * (sigma(t_o) - iou) ** 2

    no_object, prior, pieces = 0.0, 0.0, []
    for a, row, column in ((a, r, c) for a in range(2) for r in range(2) for c in range(2)):
        if (a, row, column) == (t["anchor"], t["row"], t["column"]):
            continue
        x, y, w, h, o, *_ = predictions[0, a, row, column].tolist()
        box = (column + sigma(x), row + sigma(y), EXAMPLE_ANCHORS[a][0] * math.exp(w), EXAMPLE_ANCHORS[a][1] * math.exp(h))
        ignored = darknet and overlap(box, truth) > 0.6
        no_object += 0.0 if ignored else half * weights[2] * sigma(o) ** 2
        pieces.append(f"[left out, IoU {overlap(box, truth):.2f} > 0.6]" if ignored else f"{sigma(o):.3f}^2")
        prior += 0.5 * PRIOR_WEIGHT * ((sigma(x) - 0.5) ** 2 + (sigma(y) - 0.5) ** 2 + w**2 + h**2) if darknet else 0.0

    print(f"  coord     = {half_text}{weights[0]} * {squares} = {coord:.6f}")
    print(f"  object    = {half_text}{weights[1]} * ({sigma(t_o):.4f} - {iou:.4f})^2 = {objects:.6f}")
    print(f"  no_object = {half_text}{weights[2]} * ({' + '.join(pieces)}) = {no_object:.6f}")
    print(f"  class     = {weights[3]} * ({class_text}) = {classes:.6f}")
    if darknet:
        squares = "(sigma(t_x)-.5)^2 + (sigma(t_y)-.5)^2 + t_w^2 + t_h^2"
        print(f"  prior     = 1/2 * 0.01 * sum over the 7 other slots of {squares} = {prior:.6f}")
    total = coord + objects + no_object + classes + prior
    ours = YoloLoss(EXAMPLE_ANCHORS, *weights, equation=equation)(predictions, targets, images_seen=0)
    print(f"  total     = {total:.6f}        YoloLoss: " + ", ".join(f"{name} {value:.6f}" for name, value in ours.items()))
    if not math.isclose(total, float(ours["total"]), rel_tol=1e-6):
        raise ValueError("the plain arithmetic and YoloLoss disagree; one of the two is wrong")


def draw_notes(file: str) -> None:
    """Draws the box geometry (YOLO9000 Fig. 3) beside the equation with a note on each term."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    blue, orange, green, grey = "#1f5fa8", "#c75f00", "#2e8540", "#666666"
    figure = plt.figure(figsize=(19, 9))
    left, right = figure.add_axes((0.01, 0.01, 0.41, 0.93)), figure.add_axes((0.435, 0.01, 0.56, 0.93))

    # ---- left: one cell of a 4 x 4 piece of the grid, its anchor, and the box predicted there
    c_x, c_y, p_w, p_h, b_x, b_y, b_w, b_h = 1, 1, 1.9, 1.3, 1.68, 1.6, 2.6, 2.1
    for line in range(5):
        left.plot([0, 4], [line, line], color="#c8c8c8", lw=1, zorder=0)
        left.plot([line, line], [0, 4], color="#c8c8c8", lw=1, zorder=0)
    left.add_patch(Rectangle((c_x, c_y), 1, 1, fc="#fff0c2", ec=orange, lw=2, zorder=1))
    left.add_patch(Rectangle((b_x - p_w / 2, b_y - p_h / 2), p_w, p_h, fill=False, ec=grey, lw=2, ls="--"))
    left.add_patch(Rectangle((b_x - b_w / 2, b_y - b_h / 2), b_w, b_h, fill=False, ec=blue, lw=3))
    left.plot(b_x, b_y, "o", color=blue, ms=9)
    below, beside = b_y + b_h / 2 + 0.2, b_x + b_w / 2 + 0.2
    distances = [  # from, to, label, where the label goes, colour
        ((0, c_y), (c_x, c_y), "$c_x$", (0.2, c_y - 0.12), orange),
        ((c_x, 0), (c_x, c_y), "$c_y$", (c_x + 0.15, 0.28), orange),
        ((c_x, b_y), (b_x, b_y), r"$\sigma(t_x)$", (c_x + 0.33, b_y + 0.19), blue),
        ((b_x, c_y), (b_x, b_y), r"$\sigma(t_y)$", (b_x - 0.31, c_y + 0.26), blue),
        ((b_x - b_w / 2, below), (b_x + b_w / 2, below), r"$b_w = p_w\, e^{t_w}$", (b_x, below + 0.22), blue),
        ((beside, b_y - b_h / 2), (beside, b_y + b_h / 2), r"$b_h = p_h\, e^{t_h}$", (beside + 0.42, b_y), blue),
        ((b_x - p_w / 2, 2.12), (b_x + p_w / 2, 2.12), "$p_w$", (2.2, 2.0), grey),
        ((2.42, b_y - p_h / 2), (2.42, b_y + p_h / 2), "$p_h$", (2.27, b_y - 0.3), grey),
    ]
    for start, end, label, place, colour in distances:
        left.annotate("", end, start, arrowprops={"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0, "lw": 1.6, "color": colour})
        left.text(*place, label, fontsize=18, color=colour, ha="center", va="center")
    left.text(0, -0.62, r"$b_x = \sigma(t_x) + c_x$      $b_y = \sigma(t_y) + c_y$      confidence $= \sigma(t_o)$", fontsize=17)
    left.text(
        0, -0.32, "in cells of 32 x 32 pixels; divided by the size S of the grid: fractions of the image", fontsize=12.5, color=grey
    )
    left.text(0, 4.2, "yellow: the cell that predicts    dashed: its anchor, centred    blue: the box", fontsize=12.5)
    left.set(xlim=(-0.05, 4.2), ylim=(4.4, -0.8), aspect="equal")
    left.set_title("From raw outputs to a box", fontsize=20)

    # ---- right: the terms, one under another, each with what it is for
    terms = [
        (
            "coord",
            r"$\frac{1}{2}\lambda_{coord}\,(2-wh)\,"
            r"[(\sigma(t_x)-x)^2+(\sigma(t_y)-y)^2+(t_w-\ln\frac{w}{p_w})^2+(t_h-\ln\frac{h}{p_h})^2]$",
            "Responsible slots. Centres count in cells, sizes as logarithms: 10 % too wide costs the same for a bottle and a bus.\n"
            "2 - wh (wh: the object's share of the image) lets small objects weigh up to twice as much.",
            blue,
        ),
        (
            "object",
            r"$\frac{1}{2}\lambda_{object}\,(\sigma(t_o)-IoU)^2$",
            "Responsible slots. The confidence learns how well its own box lies. The IoU is taken as a number: no gradient\n"
            "flows through it. Weight 5, because the few responsible slots stand against hundreds of empty ones.",
            green,
        ),
        (
            "no_object",
            r"$\frac{1}{2}\lambda_{no\_object}\,\sigma(t_o)^2$      unless the box has $IoU > 0.6$ with any object",
            "All other slots, some 840 of the 845 at 416 pixels. A neighbour whose box happens to lie well on an object is not\n"
            "punished: non-maximum suppression will remove it.",
            orange,
        ),
        (
            "class",
            r"$-\lambda_{class}\,\ln p(class)$,    $p$: softmax over the class logits",
            "Responsible slots. Every slot has classes of its own; in YOLOv1 the two boxes of a cell shared one set.",
            blue,
        ),
        (
            "prior",
            r"$\frac{1}{2}\,0.01\,[(\sigma(t_x)-\frac{1}{2})^2+(\sigma(t_y)-\frac{1}{2})^2+t_w^2+t_h^2]$",
            "All other slots, during the first 12,800 images only: a box without an object rests as its anchor in mid-cell.",
            grey,
        ),
    ]
    right.set(xlim=(0, 1), ylim=(0, 1))
    right.set_title("The loss: YOLOv2's region layer, term by term", fontsize=20)
    head = "A slot is one (anchor, row, column). An object makes one responsible: the cell of its centre, the anchor of its shape."
    right.text(0, 0.965, head, fontsize=12.5)
    for place, (name, formula, note, colour) in enumerate(terms):
        y = 0.88 - 0.165 * place
        right.add_patch(Rectangle((0, y - 0.1), 0.006, 0.145, fc=colour, ec="none"))
        right.text(0.02, y, name, fontsize=16, color=colour, weight="bold", va="center")
        right.text(0.18, y, formula, fontsize=17, va="center")
        right.text(0.02, y - 0.068, note, fontsize=12.5, va="center", color="#333333")
    foot = "The sum over all slots is divided by the number of images, never by the number of boxes. A weight stands\n"
    foot += "in front of the square, never inside it: $(5d)^2$ is $25d^2$. The halves make each gradient the plain difference."
    right.text(0, 0.03, foot, fontsize=12, weight="bold")
    for axis in (left, right):
        axis.axis("off")
    figure.savefig(file, dpi=90, pil_kwargs={"quality": 90})
    plt.close(figure)


if __name__ == "__main__":
    print("One image, 2 x 2 cells, 2 anchors, 3 classes, one object (see example_tensors).")
    for equation in ("darknet", "yolov1"):
        print_example(equation)
    draw_notes("images/yolov2_loss_notes.jpg")
    print("\nwrote images/yolov2_loss_notes.jpg")
