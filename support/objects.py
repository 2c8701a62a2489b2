"""The objects of two label maps: which of them overlap, and how far they are apart (exact Hausdorff distances)."""
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage import measure

from support.pictures import find_edges
from support.script import InputError

NO_OBJECT_HAUSDORFF = 1e5                          # pixels: distance to an image without objects, as published (GlaS)


# ---------------------------------------------------------------------------------------------------
# Overlaps
# ---------------------------------------------------------------------------------------------------

class OverlapTable(NamedTuple):
    """Two label maps and all pairs of objects that overlap. Objects are numbered from 1."""
    pred_map: np.ndarray                           # (H, W) 0 = background, 1..n_pred in raster order of first pixels
    gt_map: np.ndarray
    n_pred: int
    n_gt: int
    pred_area: np.ndarray                          # (n_pred + 1,) pixels of each object, [0] is 0
    gt_area: np.ndarray
    pred: np.ndarray                               # (n_pairs,) the objects of each pair
    gt: np.ndarray
    intersection: np.ndarray                       # (n_pairs,) pixels
    union: np.ndarray
    iou: np.ndarray


def pool(tables):
    """Join the `OverlapTable`s of several images, as if these were one large image. The result has no maps."""
    n_pred, n_gt = (np.cumsum([0] + [getattr(table, name) for table in tables]) for name in ('n_pred', 'n_gt'))
    areas = [np.concatenate([[0], *(getattr(table, name)[1:] for table in tables)])
             for name in ('pred_area', 'gt_area')]
    ids = [np.concatenate([[], *(getattr(table, name) + before for table, before in zip(tables, counts))]).astype(int)
           for name, counts in (('pred', n_pred), ('gt', n_gt))]
    rest = [np.concatenate([[], *(getattr(table, name) for table in tables)])
            for name in ('intersection', 'union', 'iou')]
    return OverlapTable(None, None, int(n_pred[-1]), int(n_gt[-1]), *areas, *ids, *rest)


def overlap_table(pred, gt):
    """The `OverlapTable` of two label maps. Objects are their 8-connected regions of one value.

    pred, gt: integer or bool (H, W), 0 = background; ids may have any order and gaps. Raises InputError as
    `accuracy_pixel_level` does.
    """
    (pred_map, pred_area), (gt_map, gt_area) = map(_regions, check_labels(pred, gt, '(H, W)'))
    return table_of(pred_map, pred_area, gt_map, gt_area)


def table_of(pred_map, pred_area, gt_map, gt_area):
    """`OverlapTable` of two maps whose objects are numbered without gaps, and their areas."""
    both = (pred_map > 0) & (gt_map > 0)
    codes = gt_map[both].astype(np.int64) * len(pred_area) + pred_map[both]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))          # starts of runs; sorting runs is faster than pixels
    codes, runs = np.unique(codes[starts], return_inverse=True)
    intersection = np.bincount(runs, np.diff(starts, append=np.count_nonzero(both)), len(codes)).astype(int)
    gt_ids, pred_ids = np.divmod(codes, len(pred_area))
    union = gt_area[gt_ids] + pred_area[pred_ids] - intersection
    return OverlapTable(pred_map, gt_map, len(pred_area) - 1, len(gt_area) - 1, pred_area, gt_area,
                        pred_ids, gt_ids, intersection, union, intersection / union)


def _regions(labels):
    """Regions of equal value, int32 (H, W), numbered in raster order of their first pixel, and areas (n + 1,).

    The area of the background, [0], is set to 0.
    """
    regions = measure.label(labels, background=0, connectivity=2).astype(np.int32)
    area = np.bincount(regions.ravel())
    area[0] = 0
    return regions, area


def without_small_gt(table, min_area):
    """The table without ground-truth objects under `min_area` pixels; the others are renumbered without gaps."""
    keep = table.gt_area >= min_area                          # the background, [0], has the area 0
    new_id = np.cumsum(keep, dtype=np.int32) * keep
    pairs = keep[table.gt]
    return table._replace(gt_map=new_id[table.gt_map], n_gt=int(keep.sum()), gt_area=np.append(0, table.gt_area[keep]),
                          gt=new_id[table.gt[pairs]],
                          **{name: getattr(table, name)[pairs] for name in ('pred', 'intersection', 'union', 'iou')})


def check_labels(pred, gt, axes):
    """Both as arrays. Raises InputError unless both hold non-negative integers and have one shape with these axes."""
    pred, gt = np.asarray(pred), np.asarray(gt)
    for name, array in (('prediction', pred), ('ground truth', gt)):
        if array.dtype.kind not in 'bui':
            raise InputError(f'{name}: expected an array of integer labels, found {array.dtype}')
        if array.ndim != len(axes.split(',')) or array.size == 0:
            raise InputError(f'{name}: expected a non-empty array of shape {axes}, found shape {array.shape}')
        if array.min() < 0:
            raise InputError(f'{name}: expected labels of 0 (background) and up, found {array.min()}')
    if pred.shape != gt.shape:
        raise InputError(f'prediction and ground truth differ in shape: {pred.shape} and {gt.shape}')
    return pred, gt


# ---------------------------------------------------------------------------------------------------
# Hausdorff distances
# ---------------------------------------------------------------------------------------------------

class ObjectShapes:
    """The objects 1..n of a label map, int (H, W). area: (n,) pixels. slices: of their bounding boxes.

    edges: bool (H, W), whether a 4-neighbour of the pixel has another value or lies outside the image.
    """

    def __init__(self, label_map):
        self.label_map, self.edges = label_map, find_edges(label_map)
        self.slices = ndimage.find_objects(label_map)
        self.area = np.bincount(label_map.ravel())[1:]
        self.boxes = np.array([(rows.start, columns.start, rows.stop, columns.stop) for rows, columns in self.slices])

    def pixels(self, i, on_edge=False):
        """(y, x) of the pixels of object i, or of those on its edge: int (pixels, 2)."""
        window = self.slices[i - 1]
        mask = self.label_map[window] == i
        if on_edge:
            mask &= self.edges[window]
        return np.argwhere(mask) + [side.start for side in window]


def hausdorff_distance(a_shapes, a, b_shapes, b):
    """Symmetric Hausdorff distance, in pixels, between all pixels of object a of one map and object b of another."""
    return max(_directed_hausdorff(a_shapes, a, b_shapes, b), _directed_hausdorff(b_shapes, b, a_shapes, a))


def _directed_hausdorff(a_shapes, a, b_shapes, b):
    """Largest distance from a pixel of `a` to its nearest pixel of `b`.

    Pixels of `a` inside `b` have distance 0. The nearest pixel of `b` to any other is on b's edge: if all its
    4-neighbours were in `b`, one of them would be nearer.
    """
    pixels = a_shapes.pixels(a)
    outside = pixels[b_shapes.label_map[tuple(pixels.T)] != b]
    return cKDTree(b_shapes.pixels(b, on_edge=True)).query(outside)[0].max() if len(outside) else 0.0


def nearest_object_distance(shapes, a, other_shapes):
    """Smallest Hausdorff distance, in pixels, from object a to any object of the other map; else NO_OBJECT_HAUSDORFF.

    If the same sides of two bounding boxes are d apart, the Hausdorff distance is at least d. So the objects come in
    order of d, until no other can be nearer.
    """
    if len(other_shapes.boxes) == 0:
        return NO_OBJECT_HAUSDORFF
    apart = np.abs(other_shapes.boxes - shapes.boxes[a - 1]).max(axis=1)
    nearest = np.inf
    for b in np.argsort(apart):
        if apart[b] >= nearest:
            break
        nearest = min(nearest, hausdorff_distance(shapes, a, other_shapes, b + 1))
    return nearest
