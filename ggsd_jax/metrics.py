"""Confusion matrix, mIoU and mAcc as OpenScene computes them."""

import numpy as np
from jaxtyping import Int

UNKNOWN = 256  # prediction of a point about which a method says nothing (no 2D feature)


def confusion_matrix(
    pred: Int[np.ndarray, "N"], gt: Int[np.ndarray, "N"], num_classes: int, ignore: int = 255
) -> Int[np.ndarray, "K1 K"]:
    """Counts points by prediction (rows) and ground truth (columns).

    Args:
        pred: predicted class 0..num_classes-1, or `UNKNOWN`.
        gt: true class 0..num_classes-1, or `ignore`: such points are left out.

    Returns:
        int64 [num_classes + 1, num_classes]; the last row counts predictions `UNKNOWN`. Matrices of several scenes
        are added up before `scores`.

    Raises:
        ValueError: a prediction or a label outside these values, naming the first row; so many classes that one has
            the number of `ignore` or `UNKNOWN`.
    """
    if 0 <= ignore < num_classes or UNKNOWN < num_classes:
        raise ValueError(f"{num_classes} classes: one of them is {ignore} (ignore) or {UNKNOWN} (unknown)")
    for name, values, extra in (("pred", pred, UNKNOWN), ("gt", gt, ignore)):
        bad = ((values < 0) | (values >= num_classes)) & (values != extra)
        if name == "pred":
            bad &= gt != ignore
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(f"{name}[{row}] is {values[row]}; expected 0..{num_classes - 1} or {extra}")
    keep = gt != ignore
    rows = np.where(pred[keep] == UNKNOWN, num_classes, pred[keep]).astype(np.int64)
    flat = np.bincount(rows * num_classes + gt[keep], minlength=(num_classes + 1) * num_classes)
    return flat.reshape(num_classes + 1, num_classes)


def scores(counts: Int[np.ndarray, "K1 K"]) -> dict:
    """IoU and accuracy of each class and their means, from the counts of `confusion_matrix`.

    OpenScene's rules (its `metric.py`): the means divide by the number of all classes, so a class without ground
    truth counts as 0 (its own entry is None); points predicted `UNKNOWN` are left out of every IoU, but stay in
    the denominator of the accuracies.

    Returns:
        dict with `miou`, `macc` (fractions of 1), `iou`, `acc` (lists, None = no ground truth) and `confusion`
        int64 [K, K], rows = prediction.
    """
    confusion = counts[:-1]
    total = counts.sum(axis=0)
    known = confusion.sum(axis=0)
    true_positive = np.diag(confusion)
    union = known + confusion.sum(axis=1) - true_positive
    present = total > 0
    iou = [float(tp / max(u, 1)) if p else None for tp, u, p in zip(true_positive, union, present, strict=True)]
    acc = [float(tp / n) if p else None for tp, n, p in zip(true_positive, total, present, strict=True)]
    return {
        "miou": sum(v for v in iou if v is not None) / len(iou),
        "macc": sum(v for v in acc if v is not None) / len(acc),
        "iou": iou,
        "acc": acc,
        "confusion": confusion,
    }


def evaluate(pred: Int[np.ndarray, "N"], gt: Int[np.ndarray, "N"], num_classes: int, ignore: int = 255) -> dict:
    """`scores` of one set of points; see `confusion_matrix` for the values that `pred` and `gt` may take."""
    return scores(confusion_matrix(pred, gt, num_classes, ignore))


def head_common_tail(points: dict[str, int]) -> dict[str, list[str]]:
    """The classes in three equal groups by their number of points, most first (Table 2); larger groups come first.

    The paper's own division is in a supplement that is not public. Equal counts keep the order of `points`.
    """
    ranked = sorted(points, key=lambda name: -points[name])
    parts = np.array_split(np.arange(len(ranked)), 3)
    return {title: [ranked[i] for i in part] for title, part in zip(("Head", "Common", "Tail"), parts, strict=True)}


def mean_over(by_class: dict[str, float | None], classes: list[str]) -> float:
    """The mean of some classes' IoU or accuracy; absent ones (None) count as 0, as in `scores`."""
    return sum(by_class[name] or 0.0 for name in classes) / len(classes)
