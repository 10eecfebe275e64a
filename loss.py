"""The loss of YOLOv2: the region layer of Darknet, or the equation of the YOLOv1 paper with the boxes of YOLOv2.

    python loss.py        prints the loss of a small example term by term, in plain arithmetic and from YoloLoss

Letters: N images, A anchors (5), S_h x S_w grid cells (13 x 13 at 416), C classes (20), K responsible slots in the
whole batch. A slot is one (anchor, row, column); the slot to which an object is assigned is responsible for it. Boxes
are cxcywh in grid cells.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils import box_iou

# boxes without an object are pulled towards their anchors during the first 12,800 images (src/region_layer.c)
PRIOR_IMAGES = 12_800
PRIOR_WEIGHT = 0.01


class YoloLoss(nn.Module):
    """The loss between raw outputs and encoded targets, one scalar per term.

    anchors: A pairs of width and height in grid cells. The lambdas weight the terms; yolov2-voc.cfg has coord 1, object
    5, no_object 1, class 1. ignore_threshold: boxes that overlap any object by more than this IoU are not penalised as
    background (darknet only). equation: "darknet" (region layer of yolov2-voc.cfg, with the same gradients) or "yolov1"
    (YOLOv1 sec. 2.2, eq. 3, with b_x, b_y, b_w, b_h of YOLO9000 Fig. 3). Raises ValueError for another equation.
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
        images_seen: images trained on before this batch (None: no prior term).

        -> scalars coord, object, no_object, class, prior (weighted, summed over the image, averaged over the N images)
        and total, their sum. Raises ValueError if the shapes do not fit. The inputs are not changed.
        """
        n, a, s_h, s_w, channels = predictions.shape
        if targets.shape != (n, a, s_h, s_w, 6) or a != len(self.anchors):
            shapes = f"predictions {tuple(predictions.shape)} and {len(self.anchors)} anchors"
            raise ValueError(f"{shapes} do not fit targets {tuple(targets.shape)}")
        if predictions.dtype != torch.float64:
            predictions = predictions.float()  # outputs may be half precision; the loss needs float32
        targets, anchors = targets.to(predictions.dtype), self.anchors.to(predictions.dtype)
        is_darknet = self.equation == "darknet"
        # the region layer's squares have the factor 1/2, so that their gradients are plain differences; YOLOv1 has none
        half = 0.5 if is_darknet else 1.0
        terms = {}

        # ---- The boxes of all slots (YOLO9000 Fig. 3); only IoUs are computed from them, and no gradient flows through
        all_t_xy, all_t_wh, all_t_o = predictions[..., 0:2], predictions[..., 2:4], predictions[..., 4]
        with torch.no_grad():
            rows, columns = torch.arange(s_h, device=anchors.device), torch.arange(s_w, device=anchors.device)
            all_c_xy = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # (S_h, S_w, 2) cells' corners
            all_b_wh = anchors[:, None, None] * torch.exp(all_t_wh)  # (N, A, S_h, S_w, 2)
            all_boxes = torch.cat([torch.sigmoid(all_t_xy) + all_c_xy, all_b_wh], dim=-1)  # (N, A, S_h, S_w, 4)

        # ---- The responsible slots, what they predict, and their objects (ground truth)
        has_object = targets[..., 0] > 0  # (N, A, S_h, S_w)
        slots = has_object.nonzero(as_tuple=True)
        image, anchor, row, column = slots  # (K,) each
        t_xy, t_wh, t_o, class_logits = predictions[slots].split([2, 2, 1, channels - 5], dim=-1)  # (K, 2 or 1 or C)
        _, true_xy, true_wh, label = targets[slots].split([1, 2, 2, 1], dim=-1)  # offset in cell; size in grid cells
        label = label[:, 0].long()  # (K,)
        p_wh = anchors[anchor]  # (K, 2) the anchor's size
        truth = torch.cat([true_xy + torch.stack([column, row], dim=-1), true_wh], dim=-1)  # (K, 4)

        # ---- coord
        error_xy = (torch.sigmoid(t_xy) - true_xy) ** 2  # (K, 2)
        if is_darknet:
            # 1/2 lambda_coord (2 - w h / (S_w S_h)) [(sigma(t_x) - x)^2 + (sigma(t_y) - y)^2
            #                                         + (t_w - ln w/p_w)^2 + (t_h - ln h/p_h)^2]
            # w h / (S_w S_h) is the object's share of the image: small objects weigh up to twice as much as large ones.
            share = true_wh.prod(dim=-1) / (s_h * s_w)  # (K,)
            error = error_xy + (t_wh - torch.log(true_wh / p_wh)) ** 2  # (K, 2)
            terms["coord"] = half * self.lambda_coord * ((2 - share) * error.sum(dim=-1)).sum()
        else:
            # lambda_coord [(sigma(t_x) - x)^2 + (sigma(t_y) - y)^2 + (sqrt(b_w) - sqrt(w))^2 + (sqrt(b_h) - sqrt(h))^2]
            # Rows 1 and 2 of the equation; the square roots give errors in small boxes more weight. Lengths are in
            # cells (YOLOv1: w, h in fractions of the image, so row 2 weighs S times less). The responsible box is that
            # of the anchor with the best shape (YOLOv1: the predicted box with the best IoU).
            b_wh = (p_wh * torch.exp(t_wh)).clamp(min=1e-12)  # (K, 2) the root's slope is infinite at 0
            error = error_xy + (torch.sqrt(b_wh) - torch.sqrt(true_wh)) ** 2  # (K, 2)
            terms["coord"] = half * self.lambda_coord * error.sum()

        # ---- object: 1/2 lambda_object (sigma(t_o) - IoU)^2 (yolov1: row 3, without 1/2)
        iou = box_iou(all_boxes[slots], truth)  # (K,)
        terms["object"] = half * self.lambda_object * ((torch.sigmoid(t_o[:, 0]) - iou) ** 2).sum()

        # ---- no_object: 1/2 lambda_no_object sigma(t_o)^2 (yolov1: row 4, without 1/2) in all other slots, except
        # (darknet) those whose box overlaps any object by more than ignore_threshold
        background = ~has_object  # (N, A, S_h, S_w)
        if is_darknet:
            # each object with all boxes of its image (K, A, S_h, S_w, 4): the largest tensor of the loss
            overlaps = box_iou(all_boxes[image], truth[:, None, None, None]) > self.ignore_threshold
            overlap_count = torch.zeros_like(all_t_o).index_add(0, image, overlaps.to(all_t_o.dtype))
            background &= overlap_count == 0
        terms["no_object"] = half * self.lambda_no_object * (torch.sigmoid(all_t_o) ** 2 * background).sum()

        # ---- class
        if is_darknet:  # lambda_class times the cross-entropy of the softmax over the classes
            terms["class"] = self.lambda_class * F.cross_entropy(class_logits, label, reduction="sum")
        else:
            # lambda_class sum_c (p(c) - 1[c is the object's class])^2: row 5, per responsible slot instead of per cell,
            # because in YOLOv2 every box has its own classes
            difference = torch.softmax(class_logits, dim=-1) - F.one_hot(label, channels - 5)  # (K, C)
            terms["class"] = self.lambda_class * (difference**2).sum()

        # ---- prior (darknet): 1/2 .01 [(sigma(t_x) - .5)^2 + (sigma(t_y) - .5)^2 + t_w^2 + t_h^2] in all slots without
        # an object, at the start of training: pulls each box towards its anchor, centred in its cell
        terms["prior"] = predictions.new_zeros(())
        if is_darknet and images_seen is not None and images_seen + n < PRIOR_IMAGES:
            offset = (torch.sigmoid(all_t_xy) - 0.5) ** 2 + all_t_wh**2  # (N, A, S_h, S_w, 2)
            terms["prior"] = 0.5 * PRIOR_WEIGHT * (offset.sum(dim=-1) * ~has_object).sum()

        terms = {name: value / n for name, value in terms.items()}  # per image, not per box
        return {**terms, "total": sum(terms.values())}


# ---------------------------------------------------------------- python loss.py: a worked example


def print_example() -> None:
    """Prints each term of Darknet's loss for one image in plain arithmetic, beside the value of YoloLoss.

    The image has 2 x 2 cells, 2 anchors and 3 classes. Its only object, of class 1, is assigned to anchor 1, row 1,
    column 0.
    """
    x, y, w, h = 0.7, 0.4, 1.2, 0.8  # the object: offset in its cell, size in grid cells
    anchors = [(1.0, 1.0), (1.5, 0.75)]
    t_x, t_y, t_w, t_h, t_o, *logits = responsible = [0.4, -0.4, -0.2, 0.1, 0.8, 0.0, 1.0, -1.0]
    predictions = torch.zeros(1, 2, 2, 2, 8, dtype=torch.float64)  # (N, A, S_h, S_w, 5 + C)
    predictions[..., 4] = -2.0  # objectness .119, except in two slots: the responsible one, and one of a similar box
    predictions[0, 1, 1, 0] = torch.tensor(responsible)
    predictions[0, 0, 1, 0] = torch.tensor([0.8, -0.4, 0.1, -0.2, 0.5, 0.0, 0.0, 0.0])
    targets = torch.zeros(1, 2, 2, 2, 6)
    targets[0, 1, 1, 0] = torch.tensor([1, x, y, w, h, 1])
    terms = YoloLoss(anchors)(predictions, targets, images_seen=0)  # lambda_object is 5, the others are 1

    def sigma(value):
        return 1 / (1 + math.exp(-value))

    def iou_with_object(b_x, b_y, b_w, b_h):
        return box_iou(torch.tensor([b_x, b_y, b_w, b_h]), torch.tensor([0 + x, 1 + y, w, h])).item()

    def show(term, text, value):
        print(f"  {term:9s} = {text} = {value:.6f}        YoloLoss: {terms[term]:.6f}")

    p_w, p_h = anchors[1]
    b_w, b_h = p_w * math.exp(t_w), p_h * math.exp(t_h)
    sigma_x, sigma_y, sigma_o = sigma(t_x), sigma(t_y), sigma(t_o)
    iou = iou_with_object(0 + sigma_x, 1 + sigma_y, b_w, b_h)
    sizes = f"b_w = {p_w} e^{t_w} = {b_w:.4f}, b_h = {p_h} e^{t_h} = {b_h:.4f}"
    print("Darknet's loss of one object; 2 x 2 cells, 2 anchors, 3 classes; the lambdas are those of yolov2-voc.cfg")
    print(f"  object       anchor 1 ({p_w} x {p_h}), row 1, column 0: x {x}, y {y}, w {w}, h {h}, class 1")
    print(f"  prediction   t_x {t_x}, t_y {t_y}, t_w {t_w}, t_h {t_h}, t_o {t_o}, class logits {logits}")
    print(f"  box          {sizes}, IoU with the object {iou:.4f}")

    error_xy = (sigma_x - x) ** 2 + (sigma_y - y) ** 2
    text_xy = f"({sigma_x:.4f} - {x})^2 + ({sigma_y:.4f} - {y})^2"
    error_wh = (t_w - math.log(w / p_w)) ** 2 + (t_h - math.log(h / p_h)) ** 2
    text = f"(2 - {w} * {h} / 4) * [{text_xy} + ({t_w} - ln {w}/{p_w})^2 + ({t_h} - ln {h}/{p_h})^2]"
    show("coord", f"1/2 * 1 * {text}", 0.5 * (2 - w * h / 4) * (error_xy + error_wh))
    show("object", f"1/2 * 5 * ({sigma_o:.4f} - {iou:.4f})^2", 0.5 * 5 * (sigma_o - iou) ** 2)

    squares, texts, prior = 0.0, [], 0.0
    for a, row, column in itertools.product(range(2), repeat=3):
        if (a, row, column) == (1, 1, 0):
            continue  # the responsible slot
        t_x, t_y, t_w, t_h, t_o, *_ = predictions[0, a, row, column].tolist()
        prior += 0.5 * PRIOR_WEIGHT * ((sigma(t_x) - 0.5) ** 2 + (sigma(t_y) - 0.5) ** 2 + t_w**2 + t_h**2)
        b_w, b_h = anchors[a][0] * math.exp(t_w), anchors[a][1] * math.exp(t_h)
        iou = iou_with_object(column + sigma(t_x), row + sigma(t_y), b_w, b_h)
        if iou > 0.6:
            texts.append(f"[left out, IoU {iou:.2f} > 0.6]")
        else:
            squares += sigma(t_o) ** 2
            texts.append(f"{sigma(t_o):.3f}^2")
    show("no_object", f"1/2 * 1 * ({' + '.join(texts)})", 0.5 * squares)

    p = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]  # softmax
    show("class", f"1 * -ln {p[1]:.4f}", -math.log(p[1]))
    text = "1/2 * 0.01 * sum of (sigma(t_x)-.5)^2 + (sigma(t_y)-.5)^2 + t_w^2 + t_h^2 in the 7 other slots"
    show("prior", text, prior)
    print(f"  total     = {terms['total']:.6f}")


if __name__ == "__main__":
    print_example()
