"""The loss of YOLOv2: the region layer of Darknet, and the equation of the YOLOv1 paper with the boxes of YOLOv2.

    python loss.py        computes the loss of a small example by hand and prints every number

Letters: N images, A anchors (5), S_h x S_w grid cells (13 x 13 at 416), C classes (20), K responsible slots in the
whole batch. A slot is one (anchor, row, column); the slot to which an object is assigned is responsible for it. Boxes
are cxcywh in grid cells.
"""

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
            raise ValueError(
                f"predictions {tuple(predictions.shape)} and {len(self.anchors)} anchors "
                f"do not fit targets {tuple(targets.shape)}"
            )
        if predictions.dtype != torch.float64:
            predictions = predictions.float()  # outputs may be half precision; the loss needs float32
        targets, anchors = targets.to(predictions.dtype), self.anchors.to(predictions.dtype)

        # ---- The responsible slots, what they predict, and their objects (ground truth)
        has_object = targets[..., 0] > 0  # (N, A, S_h, S_w)
        slots = has_object.nonzero(as_tuple=True)
        image_index, anchor, row, column = slots  # (K,) each
        t_xy, t_wh, t_o, class_logits = predictions[slots].split([2, 2, 1, channels - 5], dim=-1)  # (K, 2 or 1 or C)
        _, true_xy, true_wh, label = targets[slots].split([1, 2, 2, 1], dim=-1)  # offset in cell; size in grid cells
        label = label[:, 0].long()  # (K,)
        c_xy = torch.stack([column, row], dim=-1)  # (K, 2) the cell's corner
        p_wh = anchors[anchor]  # (K, 2) the anchor's size
        truth = torch.cat([true_xy + c_xy, true_wh], dim=-1)  # (K, 4)
        box = torch.cat([torch.sigmoid(t_xy) + c_xy, p_wh * torch.exp(t_wh)], dim=-1)  # (K, 4) YOLO9000 Fig. 3

        # the region layer's squares have the factor 1/2, so that their gradients are plain differences; YOLOv1 has none
        scale = 0.5 if self.equation == "darknet" else 1.0

        # ---- The boxes that overlap any object by more than ignore_threshold: no_object leaves
        # them out (no gradient here)
        all_t_xy, all_t_wh, all_t_o = predictions[..., 0:2], predictions[..., 2:4], predictions[..., 4]
        ignored = torch.zeros_like(has_object)  # (N, A, S_h, S_w)
        if self.equation == "darknet":
            with torch.no_grad():
                rows, columns = torch.arange(s_h, device=anchors.device), torch.arange(s_w, device=anchors.device)
                all_c_xy = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # (S_h, S_w, 2)
                all_boxes = torch.cat(
                    [torch.sigmoid(all_t_xy) + all_c_xy, anchors[:, None, None] * torch.exp(all_t_wh)], dim=-1
                )
                # each object with all boxes of its image (K, A, S_h, S_w, 4): the largest tensor of the loss
                overlap = box_iou(all_boxes[image_index], truth[:, None, None, None]) > self.ignore_threshold
                # objects per box
                overlapped = torch.zeros_like(all_t_o).index_add(0, image_index, overlap.to(all_t_o.dtype))
                ignored = overlapped > 0

        if self.equation == "darknet":
            # ---- coord: 1/2 lambda_coord (2 - w h / (S_w S_h)) [(sigma(t_x) - x)^2 + (sigma(t_y) - y)^2
            #                                                     + (t_w - ln w/p_w)^2 + (t_h - ln h/p_h)^2]
            # w h / (S_w S_h) is the object's share of the image: small objects weigh up to twice as much as large ones.
            share = true_wh.prod(dim=-1) / (s_h * s_w)  # (K,)
            error = (torch.sigmoid(t_xy) - true_xy) ** 2 + (t_wh - torch.log(true_wh / p_wh)) ** 2  # (K, 2)
            coord = scale * self.lambda_coord * ((2 - share) * error.sum(dim=-1)).sum()

            # ---- class: cross-entropy of the softmax over the classes
            class_loss = self.lambda_class * F.cross_entropy(class_logits, label, reduction="sum")
        else:
            # ---- coord: lambda_coord [(sigma(t_x) - x)^2 + (sigma(t_y) - y)^2
            #                          + (sqrt(b_w) - sqrt(w))^2 + (sqrt(b_h) - sqrt(h))^2]
            # Rows 1 and 2 of the equation; the square roots give errors in small boxes more weight. Lengths are in
            # cells (YOLOv1: w, h in fractions of the image, so row 2 weighs S times less). The responsible box is that
            # of the anchor with the best shape (YOLOv1: the predicted box with the best IoU).
            root = torch.sqrt(box[:, 2:].clamp(min=1e-12))  # the root's slope is infinite at 0
            error = (torch.sigmoid(t_xy) - true_xy) ** 2 + (root - torch.sqrt(true_wh)) ** 2  # (K, 2)
            coord = scale * self.lambda_coord * error.sum()

            # ---- class: lambda_class sum_c (p(c) - 1[c is the object's class])^2: row 5, per responsible slot instead
            # of per cell, because in YOLOv2 every box has its own classes.
            difference = torch.softmax(class_logits, dim=-1) - F.one_hot(label, channels - 5)  # (K, C)
            class_loss = self.lambda_class * (difference**2).sum()

        # ---- object: 1/2 lambda_object (sigma(t_o) - IoU)^2 (yolov1: without 1/2); no gradient flows through the IoU
        iou = box_iou(box, truth).detach()  # (K,)
        object_loss = scale * self.lambda_object * ((torch.sigmoid(t_o[:, 0]) - iou) ** 2).sum()

        # ---- no_object: 1/2 lambda_no_object sigma(t_o)^2 (yolov1: without 1/2) in all other
        # slots that are not ignored
        background = ~has_object & ~ignored
        no_object_loss = scale * self.lambda_no_object * (torch.sigmoid(all_t_o) ** 2 * background).sum()

        # ---- prior: 1/2 .01 [(sigma(t_x) - .5)^2 + (sigma(t_y) - .5)^2 + t_w^2 + t_h^2] in all slots without an
        # object, at the start of training: pulls each box towards its anchor, centred in its cell.
        prior = predictions.new_zeros(())
        if self.equation == "darknet" and images_seen is not None and images_seen + n < PRIOR_IMAGES:
            offset = (torch.sigmoid(all_t_xy) - 0.5) ** 2 + all_t_wh**2  # (N, A, S_h, S_w, 2)
            prior = 0.5 * PRIOR_WEIGHT * (offset.sum(dim=-1) * ~has_object).sum()

        # The sums are divided by the number of images, not by the number of boxes.
        terms = {
            "coord": coord,
            "object": object_loss,
            "no_object": no_object_loss,
            "class": class_loss,
            "prior": prior,
        }
        terms = {name: value / n for name, value in terms.items()}
        return {**terms, "total": sum(terms.values())}


# ---------------------------------------------------------------- python loss.py: a worked example


def print_example(equation: str) -> None:
    """Prints the terms of the loss for one image in plain arithmetic, with every number, next
    to the values of YoloLoss.

    The image has 2 x 2 cells, 2 anchors and 3 classes; its only object, of class 1, is assigned to
    anchor 1, row 1, column 0.
    """
    anchors, (x, y, w, h) = [(1.0, 1.0), (1.5, 0.75)], (0.7, 0.4, 1.2, 0.8)  # in grid cells; x, y: offset in the cell
    predictions, targets = torch.zeros(1, 2, 2, 2, 8).double(), torch.zeros(1, 2, 2, 2, 6).double()
    predictions[..., 4] = -2.0  # objectness .119 everywhere except in the responsible slot and one that overlaps
    predictions[0, 1, 1, 0] = torch.tensor([0.4, -0.4, -0.2, 0.1, 0.8, 0.0, 1.0, -1.0]).double()
    predictions[0, 0, 1, 0] = torch.tensor([0.8, -0.4, 0.1, -0.2, 0.5, 0.0, 0.0, 0.0]).double()
    targets[0, 1, 1, 0] = torch.tensor([1, x, y, w, h, 1]).double()
    darknet = equation == "darknet"
    weights = (1.0, 5.0, 1.0, 1.0) if darknet else (5.0, 1.0, 0.5, 1.0)  # yolov2-voc.cfg; YOLOv1 sec. 2.2
    half, factor = (0.5, "1/2 * ") if darknet else (1.0, "")
    ours = YoloLoss(anchors, *weights, equation=equation)(predictions, targets, images_seen=0)

    def sigma(value):
        return 1 / (1 + math.exp(-value))

    def show(term, text, value):
        print(f"  {term:9s} = {text} = {value:.6f}        YoloLoss: {ours[term]:.6f}")

    t_x, t_y, t_w, t_h, t_o, *logits = (round(value, 1) for value in predictions[0, 1, 1, 0].tolist())
    p_w, p_h = anchors[1]
    b_w, b_h = p_w * math.exp(t_w), p_h * math.exp(t_h)
    truth = torch.tensor([0 + x, 1 + y, w, h])
    iou = float(box_iou(torch.tensor([0 + sigma(t_x), 1 + sigma(t_y), b_w, b_h]), truth))
    p = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
    print(f'\nequation="{equation}", lambdas of coord, object, no_object, class: {weights}; units are grid cells')
    print(f"  object       anchor 1 ({p_w} x {p_h}), row 1, column 0: x {x}, y {y}, w {w}, h {h}, class 1")
    print(f"  prediction   t_x {t_x}, t_y {t_y}, t_w {t_w}, t_h {t_h}, t_o {t_o}, class logits {logits}")
    print(
        f"  box          b_w = {p_w} e^{t_w} = {b_w:.4f}, b_h = {p_h} e^{t_h} = {b_h:.4f}, "
        f"IoU with the object {iou:.4f}"
    )
    text, coord = (
        f"({sigma(t_x):.4f} - {x})^2 + ({sigma(t_y):.4f} - {y})^2",
        (sigma(t_x) - x) ** 2 + (sigma(t_y) - y) ** 2,
    )
    if darknet:
        text = f"(2 - {w} * {h} / 4) * [{text} + ({t_w} - ln {w}/{p_w})^2 + ({t_h} - ln {h}/{p_h})^2]"
        coord = (2 - w * h / 4) * (coord + (t_w - math.log(w / p_w)) ** 2 + (t_h - math.log(h / p_h)) ** 2)
    else:
        text = f"[{text} + (sqrt {b_w:.4f} - sqrt {w})^2 + (sqrt {b_h:.4f} - sqrt {h})^2]"
        coord += (math.sqrt(b_w) - math.sqrt(w)) ** 2 + (math.sqrt(b_h) - math.sqrt(h)) ** 2
    show("coord", f"{factor}{weights[0]} * {text}", half * weights[0] * coord)
    text = f"{factor}{weights[1]} * ({sigma(t_o):.4f} - {iou:.4f})^2"
    show("object", text, half * weights[1] * (sigma(t_o) - iou) ** 2)
    no_object, prior, squares = 0.0, 0.0, []
    for a, row, column in [(a, r, c) for a in range(2) for r in range(2) for c in range(2) if (a, r, c) != (1, 1, 0)]:
        u, v, s, t, o, *_ = predictions[0, a, row, column].tolist()
        box = (column + sigma(u), row + sigma(v), anchors[a][0] * math.exp(s), anchors[a][1] * math.exp(t))
        overlap = float(box_iou(torch.tensor(box), truth)) if darknet else 0.0
        no_object += sigma(o) ** 2 if overlap <= 0.6 else 0.0
        squares.append(f"{sigma(o):.3f}^2" if overlap <= 0.6 else f"[left out, IoU {overlap:.2f} > 0.6]")
        prior += 0.5 * PRIOR_WEIGHT * ((sigma(u) - 0.5) ** 2 + (sigma(v) - 0.5) ** 2 + s**2 + t**2)
    show("no_object", f"{factor}{weights[2]} * ({' + '.join(squares)})", half * weights[2] * no_object)
    if darknet:
        show("class", f"{weights[3]} * -ln {p[1]:.4f}", weights[3] * -math.log(p[1]))
        show(
            "prior",
            "1/2 * 0.01 * sum of (sigma(t_x)-.5)^2 + (sigma(t_y)-.5)^2 + t_w^2 + t_h^2 in the 7 other slots",
            prior,
        )
    else:
        text = f"({p[0]:.4f} - 0)^2 + ({p[1]:.4f} - 1)^2 + ({p[2]:.4f} - 0)^2"
        show("class", f"{weights[3]} * [{text}]", weights[3] * (p[0] ** 2 + (p[1] - 1) ** 2 + p[2] ** 2))
    print(f"  total     = {ours['total']:.6f}")


if __name__ == "__main__":
    print_example("darknet")
    print_example("yolov1")
