"""The loss of YOLOv2: the region layer of Darknet, and the printed equation of YOLOv1 with the boxes of YOLOv2.

Letters: N images, A anchors (5), S_h x S_w grid cells (13 x 13 at 416), C classes (20), M = A * S_h * S_w boxes of an image,
K the largest number of objects in an image of the batch. A slot is one (anchor, row, column); the slot that holds an object is
the one "responsible" for it.
"""

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
            error = (b_xy - truth_xy) ** 2 + (torch.sqrt(b_wh) - torch.sqrt(truth_wh)) ** 2  # (N, K, 2)
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
                all_xy = torch.sigmoid(predictions[..., 0:2]) + c_xy  # (N, M, 2)
                all_wh = p_wh * torch.exp(predictions[..., 2:4])
                iou = intersection_over_union(
                    all_xy[:, None], all_wh[:, None], truth_xy[:, :, None], truth_wh[:, :, None]
                )  # (N, K, M)
                lies_well = ((iou > self.ignore_threshold) & (held[..., None] > 0)).any(dim=1)  # (N, M)
                background = background * ~lies_well
        no_object = half * self.lambda_no_object * (torch.sigmoid(predictions[..., 4]) ** 2 * background).sum()

        # ---- prior: 1/2 .01 [(sigma(t_x) - .5)^2 + (sigma(t_y) - .5)^2 + t_w^2 + t_h^2] in all slots without an object, at
        # the start of training: until it knows better, a box is its anchor in the middle of its cell.
        prior = predictions.new_zeros(())
        if self.equation == "darknet" and images_seen is not None and images_seen < PRIOR_IMAGES:
            offset = (torch.sigmoid(predictions[..., 0:2]) - 0.5) ** 2 + predictions[..., 2:4] ** 2  # (N, M, 2)
            prior = 0.5 * PRIOR_WEIGHT * (offset.sum(dim=-1) * (1 - objectness)).sum()

        # The sum over the boxes is divided by the number of images, never by the number of boxes.
        terms = {"coord": coord, "object": objects, "no_object": no_object, "class": classes, "prior": prior}
        terms = {name: value / n for name, value in terms.items()}
        return {**terms, "total": sum(terms.values())}


def intersection_over_union(xy_1: Tensor, wh_1: Tensor, xy_2: Tensor, wh_2: Tensor) -> Tensor:
    """IoU of boxes given by centres and sizes (..., 2) of one unit; the leading dimensions broadcast -> (...)."""
    low = torch.maximum(xy_1 - wh_1 / 2, xy_2 - wh_2 / 2)
    high = torch.minimum(xy_1 + wh_1 / 2, xy_2 + wh_2 / 2)
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    return intersection / (wh_1.prod(dim=-1) + wh_2.prod(dim=-1) - intersection)
