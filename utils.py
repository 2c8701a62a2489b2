"""Sliding window, test-time augmentation, post-processing and metrics."""
from collections import namedtuple
from typing import NamedTuple

import cv2
import numpy as np
import torch
from scipy import ndimage, sparse
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from skimage import morphology, segmentation
from torch.nn import functional as F
from tqdm import tqdm

from support.checkpoints import load_checkpoint  # noqa: F401  (imported from here, as in the published code)
from support.images import resize_bilinear
from support.objects import (ObjectShapes, check_labels, hausdorff_distance, nearest_object_distance, overlap_table,
                             table_of, without_small_gt)

# ---------------------------------------------------------------------------------------------------
# Sliding window
# ---------------------------------------------------------------------------------------------------

def window_grid(length, size, overlap):
    """Windows along one side of an image. The stride is size - overlap.

    Returns the padded length and a list of (start, stop, first, end), in pixels: a window reads [start, stop) and
    writes [first, end): from overlap // 2 after its start (the first window from 0) to where the next one begins to
    write. A side of at most `size` pixels is one window; a longer one is padded at its end. As published, a side of
    whole windows is padded by one more stride.
    """
    if length <= size:
        return length, [(0, length, 0, length)]
    stride = size - overlap
    padded = length + stride - (length - size) % stride
    starts = range(0, padded - overlap, stride)
    firsts = [start + overlap // 2 if start > 0 else 0 for start in starts]
    ends = [*firsts[1:], padded]
    return padded, [(start, start + size, first, end) for start, first, end in zip(starts, firsts, ends)]


class Window(NamedTuple):
    """A window of an image, as pairs (rows, columns)."""
    read: tuple         # slices of the image: the pixels that the network sees
    write: tuple        # slices of the result: the pixels that the window computes
    take: tuple         # slices of the network's output: those same pixels
    shape: tuple        # (h, w) of the window, after zero-padding at the bottom and right


def list_windows(height, width, size, overlap, box=None):
    """The Windows that compute an image, row by row. Each pixel is written by exactly one window.

    box: (top, bottom, left, right), the part of the image that is computed, by default all of it. `write` counts from
    the corner of the box.
    """
    top, bottom, left, right = box or (0, height, 0, width)
    return [Window(*zip(rows, columns)) for rows in _windows_along(height, size, overlap, top, bottom)
            for columns in _windows_along(width, size, overlap, left, right)]


def _windows_along(length, size, overlap, low, high):
    """(read, write, take, length) of the windows that write into [low, high) along one side of an image."""
    found = []
    for start, stop, first, end in window_grid(length, size, overlap)[1]:
        first, end = max(first, low), min(end, high)             # `high` is at most `length`
        if first < end:
            found.append((slice(start, min(stop, length)), slice(first - low, end - low),
                          slice(first - start, end - start), stop - start))
    return found


def zero_pad(tensor, shape):
    """Pad a tensor (..., h, w) with zeros at the bottom and right to the shape (H, W)."""
    return F.pad(tensor, (0, shape[1] - tensor.shape[-1], 0, shape[0] - tensor.shape[-2]))


def split_forward(model, input, size, overlap, outchannel=3, n_windows=1):
    """Run the model on overlapping windows of images, and put its output together.

    input: (B, C, H, W) float tensor. size, overlap: pixels; the stride is their difference. model: maps windows
    (n, C, h, w) to (n, outchannel, h, w). n_windows: number of windows of each image in one call of the model.
    A side longer than `size` is zero-padded at the bottom or right to whole windows; a shorter one is one window of
    that length. Returns (B, outchannel, H, W) on the input's device. Raises ValueError unless 0 <= overlap < size.
    """
    if not 0 <= overlap < size:
        raise ValueError(f'overlap is {overlap}; expected at least 0 and less than the window size, {size}')
    batch, _, height, width = input.shape
    output = input.new_empty(batch, outchannel, height, width)
    windows = list_windows(height, width, size, overlap)                 # all have the same shape
    for i in range(0, len(windows), n_windows):
        group = windows[i:i + n_windows]
        crops = torch.cat([zero_pad(input[(..., *window.read)], window.shape) for window in group])
        for window, result in zip(group, model(crops).split(batch)):
            output[(..., *window.write)] = result[(..., *window.take)]
    return output


# ---------------------------------------------------------------------------------------------------
# Test-time augmentation
# ---------------------------------------------------------------------------------------------------

# orientations of test-time augmentation: (number of 90-degree turns, mirror first?)
ORIENTATIONS = {
    'none': [(0, False)],
    'flips': [(0, False), (0, True), (2, False), (2, True)],
    'full': [(turns, mirror) for mirror in (False, True) for turns in range(4)],
}


def orient(array, turns, mirror):
    """Mirror an array (H, W, ...) left-right if `mirror`, then turn it by `turns` x 90 degrees. Returns a view."""
    return np.rot90(array[:, ::-1] if mirror else array, turns)


def orient_back(array, turns, mirror):
    """Undo `orient`."""
    array = np.rot90(array, -turns)
    return array[:, ::-1] if mirror else array


def predict_probabilities(predict, image, tta='full'):
    """Mean probability maps over the orientations of test-time augmentation, for images predicted as a whole.

    predict: maps an RGB image, uint8 (H, W, 3), to probabilities, float (H', W', classes). tta: full / flips / none.
    Returns float32 (H', W', classes).
    """
    orientations = ORIENTATIONS[tta]
    total = 0
    for turns, mirror in orientations:
        total = total + orient_back(predict(np.ascontiguousarray(orient(image, turns, mirror))), turns, mirror)
    return np.asarray(total / len(orientations), dtype=np.float32)


def predict_in_bands(predict, image, size, overlap, tta='full', n_classes=3, batch_size=1, band_pixels=2 ** 23):
    """`predict_probabilities` with the sliding window, in horizontal bands, so that memory suffices for large images.

    predict: maps a list of at most `batch_size` windows, uint8 (h, w, 3), and the shape (H', W') to which they are to
    be zero-padded, to probabilities (n, H', W', n_classes). image: uint8 (H, W, 3). Yields the probabilities of each
    band from top to bottom, float32 (rows, W, n_classes); each but the last has at least `band_pixels` pixels.

    The result is the same as of one band, because the windows lie on the grid of the whole image. A window that writes
    into two bands is computed for each. Without augmentation no window does: a band begins where a row of windows
    begins to write.
    """
    height, width = image.shape[:2]
    edges = [0]
    for _, _, first, _ in window_grid(height, size, overlap)[1]:
        if (first - edges[-1]) * width >= band_pixels and first < height:
            edges.append(first)
    bands = list(zip(edges, [*edges[1:], height]))

    def windows_of(top, bottom, turns):
        """The windows, in the image turned by `turns` x 90 degrees, that write into the band."""
        if turns >= 2:                                                   # the rows run backwards
            top, bottom = height - bottom, height - top
        if turns % 2:                                                    # the rows have become columns
            return list_windows(width, height, size, overlap, (0, width, top, bottom))
        return list_windows(height, width, size, overlap, (top, bottom, 0, width))

    windows_of_bands = [[windows_of(*band, turns) for turns, _ in ORIENTATIONS[tta]] for band in bands]
    n_windows = sum(len(windows) for band in windows_of_bands for windows in band)
    progress = tqdm(total=n_windows, desc='windows', unit='window', leave=False,
                    disable=None if height * width > 4 * size * size else True)
    for (top, bottom), windows_by_orientation in zip(bands, windows_of_bands):
        total = np.zeros((bottom - top, width, n_classes), np.float32)
        for orientation, windows in zip(ORIENTATIONS[tta], windows_by_orientation):
            oriented_image, oriented_total = orient(image, *orientation), orient(total, *orientation)      # views
            for i in range(0, len(windows), batch_size):
                group = windows[i:i + batch_size]
                crops = [np.ascontiguousarray(oriented_image[window.read]) for window in group]
                for window, result in zip(group, predict(crops, group[0].shape)):
                    oriented_total[window.write] += result[window.take]
                progress.update(len(group))
        yield total / len(ORIENTATIONS[tta])
    progress.close()


# ---------------------------------------------------------------------------------------------------
# Post-processing (test-time; paper section 3)
# ---------------------------------------------------------------------------------------------------

def remove_small_components(mask, min_area):
    """Remove the 4-connected components of fewer than `min_area` pixels from a bool mask (H, W)."""
    components, n = ndimage.label(mask)
    areas = sum(np.bincount(components[top:top + 2048].ravel(), minlength=n + 1)       # in pieces, for large images
                for top in range(0, len(components), 2048))
    keep = areas >= min_area
    keep[0] = False
    return keep[components]


def inside_mask(probabilities, threshold=0):
    """The pixels of class 1 (inside), bool (H, W). probabilities: float (H, W, classes).

    threshold 0: the pixels where class 1 is the most likely class, as published. Else: those where its probability is
    at least the threshold.
    """
    return probabilities[..., 1] >= threshold if threshold else probabilities.argmax(axis=2) == 1


def post_process(inside, min_area, radius, original_size=None, h_maxima=0, inside_map=None):
    """From the mask of class 1 to instances, int32 (H0, W0), 0 = background.

    inside: bool (H, W), of `inside_mask`. min_area: pixels; smaller 4-connected components are removed. original_size:
    (H0, W0), to which the mask is resized bilinearly if the network saw a scaled image. The 8-connected components are
    the instances. radius: pixels of the grey dilation that restores the contour.

    h_maxima, a probability, is not in the published method and off at 0: it splits instances with `split_objects`. It
    needs inside_map, the inside probability, uint8 (H, W), 255 = 1, and smooths it with a Gaussian of 1 pixel. The
    dilation then fills background only: no instance loses pixels to another one.
    """
    mask = remove_small_components(inside, min_area)
    smooth = ndimage.gaussian_filter(inside_map, 1) if h_maxima else None
    if original_size is not None and mask.shape != tuple(original_size):
        mask = resize_bilinear(mask * np.uint8(255), original_size) > 127.5
        smooth = resize_bilinear(smooth, original_size) if h_maxima else None
    instances, _ = ndimage.label(mask, np.ones((3, 3)))
    instances = instances.astype(np.int32, copy=False)
    if not h_maxima:
        return dilate(instances, radius)
    parts = split_objects(instances, smooth, h_maxima)
    instances = dilate(parts.copy(), radius)
    np.copyto(instances, parts, where=parts > 0)
    return instances


def split_objects(instances, inside, h):
    """Split instances along the valleys of the inside probability, by a watershed from its h-maxima.

    instances: int32 (H, W), ids 1, 2, ... inside: uint8 (H, W), 255 = probability 1. h: the probability by which a
    maximum must stand out: every path inside the instance to a higher maximum falls by at least h. An instance with
    fewer than two such maxima stays whole. Returns int32 (H, W), ids 1, 2, ...
    """
    result, n = np.zeros_like(instances), 0
    for i, window in enumerate(ndimage.find_objects(instances), start=1):
        region = instances[window] == i
        parts = region.astype(np.int32)
        top = np.where(region, inside[window], 0).astype(int)
        # morphology.h_maxima does not fit: it separates maxima of equal height, however shallow the valley between them
        cut = morphology.reconstruction(np.maximum(top - round(h * 255), 0), top, footprint=np.ones((3, 3)))
        seeds, count = ndimage.label(morphology.local_maxima(cut, connectivity=2), np.ones((3, 3)))
        if count > 1:
            parts = segmentation.watershed(-top, seeds, connectivity=2, mask=region)
        result[window][region] = n + parts[region]
        n += max(count, 1)
    return result


def dilate(instances, radius, rows=2048):
    """Grey dilation of instances, int (H, W), with a disk, in place. Returns them.

    The higher id wins, as published: it also overwrites the edge of an instance nearer than `radius` pixels. rows: how
    many rows are dilated at a time, which bounds the memory.
    """
    footprint = morphology.disk(radius)
    fits_16_bits = instances.max(initial=0) <= np.iinfo(np.uint16).max       # OpenCV dilates no larger integers
    above = instances[:0]                                            # the last rows of the piece above, undilated
    for top in range(0, len(instances), rows):
        piece = np.concatenate([above, instances[top:top + rows + radius]])
        first, end = len(above), len(above) + rows
        dilated = (cv2.dilate(piece.astype(np.uint16), footprint) if fits_16_bits
                   else ndimage.grey_dilation(piece, footprint=footprint))
        instances[top:top + rows] = dilated[first:end]
        above = piece[max(end - radius, 0):end]
    return instances


# ---------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------
# Every object-level metric is computed from the table of overlapping objects (`overlap_table` of support/objects.py).
# Scores of images without a pair of overlapping objects (H = Hausdorff distance):
#
#                             nuclei                      gland                       standard
#                             all but H     H             all but H     H             all
#   pred and gt empty         1             NaN           1             0             1
#   one of the two empty      0             NaN           0             5e4           0
#   no object overlaps        0             NaN           0             computed      0
#
# "Empty" means without objects; for the gland metric, without ground-truth objects of 3 pixels or more. Means over
# images leave NaN out. An image without background needs no special treatment.

EPS = 1e-10                                        # in the denominators of the published ratios
MIN_GLAND_AREA = 3                                 # pixels; smaller ground-truth glands are dropped, as published

NucleiScores = namedtuple('NucleiScores', 'recall precision F1 dice iou hausdorff AJI')        # hausdorff: pixels
GlandScores = namedtuple('GlandScores', 'recall precision F1 dice iou hausdorff')


class AverageMeter:
    """Running mean of arrays, per element. NaN values are left out; an element without values has the mean NaN.

    sum, count, avg: float arrays of `shape`.
    """

    def __init__(self, shape=1):
        self.sum = np.zeros(shape)
        self.count = np.zeros(shape)

    def update(self, values, n=1):
        """Add `values`, an array of `shape` that is the mean of `n` samples."""
        values = np.asarray(values, dtype=float).reshape(self.sum.shape)
        valid = ~np.isnan(values)
        self.sum[valid] += n * values[valid]
        self.count[valid] += n

    @property
    def avg(self):
        with np.errstate(invalid='ignore'):
            return self.sum / self.count


def accuracy_pixel_level(output, target):
    """Pixel-level scores of class 1 against all other classes, means over the batch.

    output, target: integer or bool (B, H, W). Returns float (6,): accuracy, IoU, recall, precision, F1,
    (recall + specificity) / 2. A ratio without a pixel in its denominator is 0.
    Raises InputError for arrays of other types, negative values or different shapes.
    """
    output, target = (labels.reshape(len(labels), -1) == 1 for labels in check_labels(output, target, '(B, H, W)'))
    tp = (output & target).sum(1)
    tn = (~output & ~target).sum(1)
    fp = (output & ~target).sum(1)
    fn = (~output & target).sum(1)
    recall = tp / (tp + fn + EPS)
    precision = tp / (tp + fp + EPS)
    specificity = tn / (tn + fp + EPS)
    return np.mean([(tp + tn) / (tp + tn + fp + fn + EPS),
                    tp / (tp + fp + fn + EPS),
                    recall,
                    precision,
                    2 * recall * precision / (recall + precision + EPS),
                    (recall + specificity) / 2], axis=1)


def nuclei_accuracy_object_level(pred, gt):
    """Object-level scores of the nuclei experiments (paper, section 3): `NucleiScores`.

    pred, gt: integer or bool (H, W), 0 = background. In raster order, each ground-truth object takes the free
    prediction of highest IoU; any overlap is a true positive. dice, iou and hausdorff (pixels) are means over these
    pairs. Raises InputError as `accuracy_pixel_level` does.
    """
    return nuclei_scores_of(overlap_table(pred, gt))


def nuclei_scores_of(table):
    """`nuclei_accuracy_object_level` from an `OverlapTable` with its maps."""
    if table.n_pred == table.n_gt == 0:
        return NucleiScores(1.0, 1.0, 1.0, 1.0, 1.0, np.nan, 1.0)
    pairs = _published_pairs(table)
    if len(pairs) == 0:
        return NucleiScores(0.0, 0.0, 0.0, 0.0, 0.0, np.nan, 0.0)
    iou = table.iou[pairs]
    pred_shapes, gt_shapes = ObjectShapes(table.pred_map), ObjectShapes(table.gt_map)
    distances = [hausdorff_distance(pred_shapes, table.pred[i], gt_shapes, table.gt[i]) for i in pairs]
    return NucleiScores(*_detection_scores(len(pairs), table), dice=float(np.mean(2 * iou / (1 + iou))),
                        iou=float(np.mean(iou)), hausdorff=float(np.mean(distances)), AJI=_aji(table, pairs))


def gland_accuracy_object_level(pred, gt):
    """Object-level scores of the GlaS challenge: `GlandScores`.

    pred, gt: integer or bool (H, W), 0 = background. A prediction is a true positive if it covers at least half of
    the gland that it overlaps most; two predictions on one gland count once. dice, iou and hausdorff (pixels) are
    area-weighted means: over the glands, each with the prediction that it overlaps most, and over the predictions,
    each with the gland that it overlaps most; then the mean of both. Raises InputError as `accuracy_pixel_level` does.
    """
    return gland_scores_of(overlap_table(pred, gt))


def gland_scores_of(table):
    """`gland_accuracy_object_level` from an `OverlapTable` with its maps."""
    table = without_small_gt(table, MIN_GLAND_AREA)
    if table.n_pred == table.n_gt == 0:
        return GlandScores(1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    pred_pairs = _best_pairs(table.pred, table.intersection, table.gt)
    gt_pairs = _best_pairs(table.gt, table.intersection, table.pred)
    covers_half = 2 * table.intersection[pred_pairs] >= table.gt_area[table.gt[pred_pairs]]
    found = np.unique(table.gt[pred_pairs[covers_half]])

    pred_shapes, gt_shapes = ObjectShapes(table.pred_map), ObjectShapes(table.gt_map)
    distance = np.full(len(table.iou), np.nan)                # computed once for pairs that are in both lists
    for i in np.union1d(pred_pairs, gt_pairs):
        distance[i] = hausdorff_distance(pred_shapes, table.pred[i], gt_shapes, table.gt[i])
    gt_means = _gland_means(gt_shapes, pred_shapes, table.gt[gt_pairs], table.iou[gt_pairs], distance[gt_pairs])
    pred_means = _gland_means(pred_shapes, gt_shapes, table.pred[pred_pairs], table.iou[pred_pairs],
                              distance[pred_pairs])
    return GlandScores(*_detection_scores(len(found), table), *((gt_means + pred_means) / 2).tolist())


def standard_metrics(pred, gt):
    """The metrics that other papers report: dict of aji, aji_plus, aji_fullnet, pq, dq, sq, f1, ap50, map, dice.

    pred, gt: integer or bool (H, W), 0 = background; the objects are their 8-connected regions of one value.
    aji: each ground-truth object with the prediction of highest IoU (MoNuSeg). aji_plus: the one-to-one pairs of
    largest summed IoU. aji_fullnet: the pairs of `nuclei_accuracy_object_level`.
    dq = f1 = 2 TP / (objects in both maps), with TP pairs of IoU > 0.5; sq = their mean IoU; pq = dq * sq.
    ap50: TP / (TP + FP + FN), with TP one-to-one pairs of IoU >= 0.5; map: its mean over the thresholds
    0.50, 0.55, ..., 0.95. dice: of the foreground pixels. Raises InputError as `accuracy_pixel_level` does.
    """
    return standard_metrics_of(overlap_table(pred, gt))


def standard_metrics_of(table):
    """`standard_metrics` from an `OverlapTable`; its maps are not needed."""
    n_objects = table.n_pred + table.n_gt
    if n_objects == 0:
        return dict.fromkeys(('aji', 'aji_plus', 'aji_fullnet', 'pq', 'dq', 'sq', 'f1', 'ap50', 'map', 'dice'), 1.0)
    # pairs with IoU > 0.5 are always one-to-one
    matched_iou = table.iou[table.iou > 0.5]
    dq = 2 * len(matched_iou) / n_objects
    sq = float(matched_iou.mean()) if len(matched_iou) else 0.0
    # pairs with IoU = 0.5 need not be (two halves of an object), so the pairs of highest IoU are taken first
    one_to_one_iou = table.iou[_one_to_one(table, np.lexsort((table.pred, table.gt, -table.iou)))]
    true_positives = np.array([np.sum(one_to_one_iou >= percent / 100) for percent in range(50, 100, 5)])
    ap = true_positives / (n_objects - true_positives)
    return {
        'aji': _aji(table, _best_pairs(table.gt, table.iou, table.pred)),
        'aji_plus': _aji(table, _largest_iou_sum_pairs(table)),
        'aji_fullnet': _aji(table, _published_pairs(table)),
        'pq': dq * sq, 'dq': dq, 'sq': sq, 'f1': dq,
        'ap50': float(ap[0]), 'map': float(ap.mean()),
        'dice': float(2 * table.intersection.sum() / (table.pred_area.sum() + table.gt_area.sum())),
    }


def match_objects(pred, gt):
    """Match the objects of two label maps one-to-one, pairs of highest IoU first. pred, gt: int (H, W), 0 = background.

    All pixels of one id are one object, also in several pieces. Returns {id in pred: (id in gt, IoU)}.
    """
    (pred_map, _, pred_ids), (gt_map, _, gt_ids) = map(segmentation.relabel_sequential, (pred, gt))
    table = table_of(pred_map, np.bincount(pred_map.ravel()), gt_map, np.bincount(gt_map.ravel()))
    pairs = _one_to_one(table, np.lexsort((table.gt, table.pred, -table.iou)))
    return {int(pred_ids[table.pred[i]]): (int(gt_ids[table.gt[i]]), float(table.iou[i])) for i in pairs}


def _detection_scores(tp, table):
    """recall, precision, F1 of `tp` true positives."""
    return tp / (table.n_gt + EPS), tp / (table.n_pred + EPS), 2 * tp / (table.n_gt + table.n_pred + EPS)


def _aji(table, pairs):
    """Aggregated Jaccard index: sum of intersections / (sum of unions + areas of the objects in no pair).

    pairs: indices of pairs in the table. They decide which AJI it is: `_published_pairs`; MoNuSeg's, each ground-truth
    object with its best prediction; AJI+, `_largest_iou_sum_pairs`.
    """
    alone = (table.gt_area.sum() - table.gt_area[np.unique(table.gt[pairs])].sum()
             + table.pred_area.sum() - table.pred_area[np.unique(table.pred[pairs])].sum())
    return float(table.intersection[pairs].sum() / (table.union[pairs].sum() + alone))


def _best_pairs(objects, score, partners):
    """For each object, in order, the index of its pair of highest score; on a tie, the pair of the lowest partner."""
    order = np.lexsort((partners, -score, objects))
    return order[np.unique(objects[order], return_index=True)[1]]


def _one_to_one(table, order):
    """Go through the pairs in `order`, and keep those whose objects are both still free. Returns their indices."""
    gt_taken, pred_taken, pairs = set(), set(), []
    for i, gt, pred in zip(order.tolist(), table.gt[order].tolist(), table.pred[order].tolist()):
        if gt not in gt_taken and pred not in pred_taken:
            gt_taken.add(gt)
            pred_taken.add(pred)
            pairs.append(i)
    return np.array(pairs, dtype=int)


def _published_pairs(table):
    """The published pairs: in raster order, each ground-truth object takes the free prediction of highest IoU.

    On a tie it takes the prediction that comes first in raster order.
    """
    return _one_to_one(table, np.lexsort((table.pred, -table.iou, table.gt)))


def _largest_iou_sum_pairs(table):
    """The one-to-one pairs with the largest summed IoU, by solving an assignment problem.

    SciPy's solver gives every ground-truth object a partner. So each may also take a dummy partner of IoU 0, which
    means "no partner". All weights are 1 + IoU, because a sparse matrix stores no zeros. The 1 changes no comparison:
    it is added once for each ground-truth object.
    """
    if len(table.iou) == 0:
        return np.array([], dtype=int)
    gt_ids, rows = np.unique(table.gt, return_inverse=True)
    pred_ids, columns = np.unique(table.pred, return_inverse=True)
    none = np.arange(len(gt_ids))
    weights = np.concatenate([1 + table.iou, np.ones(len(gt_ids))])
    places = np.concatenate([rows, none]), np.concatenate([columns, len(pred_ids) + none])
    places = [index.astype(np.int32) for index in places]          # the type that older SciPy asks for
    graph = sparse.csr_array((weights, places), shape=(len(gt_ids), len(pred_ids) + len(gt_ids)))
    partner = min_weight_full_bipartite_matching(graph, maximize=True)[1]
    return np.flatnonzero(partner[rows] == columns)


def _gland_means(own_shapes, other_shapes, own, iou, distance):
    """Area-weighted means over all objects of one map: float (3,) dice, iou, hausdorff; 0 without objects.

    own: int (n,), the objects with a partner. iou, distance: (n,), IoU and Hausdorff distance to the partner. An object
    without partner has dice and iou 0, and the smallest Hausdorff distance to any object of the other map.
    """
    n_objects = len(own_shapes.area)
    if n_objects == 0:
        return np.zeros(3)
    scores = np.zeros((n_objects, 3))
    scores[own - 1] = np.stack([2 * iou / (1 + iou), iou, distance], axis=1)
    alone = np.setdiff1d(np.arange(1, n_objects + 1), own)
    scores[alone - 1, 2] = [nearest_object_distance(own_shapes, i, other_shapes) for i in alone]
    return np.average(scores, axis=0, weights=own_shapes.area)


