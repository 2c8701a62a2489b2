"""The objects of two label maps: which of them overlap, and how far they are apart (exact Hausdorff distances)."""
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree
from skimage import measure

from support.pictures import find_edges
from support.script import InputError

NO_OBJECT_HAUSDORFF = 1e5                          # pixels: distance to an image without objects, as published (GlaS)
PIXELS_AT_ONCE = 2 ** 23                           # objects with about so many pixels together are computed at a time


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
    """The pixels of the objects 1..n of a label map, int (H, W), as the functions below need them.

    flat_map: (H * W,), the label map. on_edge: bool (H * W,), whether a 4-neighbour of the pixel has another value or
    lies outside the image. pixels, edges: sparse bool (n + 1, H * W); row i holds all pixels of object i, and those on
    its edge. area: (n,) pixels. boxes: (n, 4), top, left, bottom, right of the bounding boxes, inclusive.
    """

    def __init__(self, label_map):
        self.width = label_map.shape[1]
        self.flat_map, self.on_edge = label_map.ravel(), find_edges(label_map).ravel()
        places = np.flatnonzero(label_map)
        n = label_map.max()
        self.pixels = self._rows(places, n)
        self.edges = self._rows(places[self.on_edge[places]], n)
        self.area = np.diff(self.pixels.indptr)[1:]
        y, x = np.divmod(self.edges.indices, self.width)
        starts = self.edges.indptr[1:-1]                              # every object has an edge
        self.boxes = np.stack([np.minimum.reduceat(y, starts), np.minimum.reduceat(x, starts),
                               np.maximum.reduceat(y, starts), np.maximum.reduceat(x, starts)], axis=1)

    def _rows(self, places, n):
        """Sparse bool (n + 1, H * W): the pixels at `places` of the flat map, by object.

        Converting a sparse matrix to rows sorts the pixels by object in linear time.
        """
        rows = (np.ones(len(places), bool), (self.flat_map[places], places))
        return sparse.coo_array(rows, shape=(n + 1, len(self.flat_map))).tocsr()


def _pixels_of(rows, objects):
    """All pixels of some objects: (index into `objects`, place in the flat map), both int (pixels,).

    rows: `pixels` or `edges` of ObjectShapes. objects: int (n,).
    """
    chosen = rows[objects]
    return np.repeat(np.arange(len(objects)), np.diff(chosen.indptr)), chosen.indices


def hausdorff_distances(a_shapes, a, b_shapes, b):
    """Symmetric Hausdorff distance, in pixels, between all pixels of the objects a[k] and b[k], for every k.

    a_shapes, b_shapes: ObjectShapes of two maps of one shape. a, b: int (n,), objects in them. Returns float (n,).
    """
    pixels = int(a_shapes.area[a - 1].sum() + b_shapes.area[b - 1].sum())
    pieces = np.array_split(np.arange(len(a)), pixels // PIXELS_AT_ONCE + 1)
    return np.concatenate([np.maximum(_directed_hausdorff(a_shapes, a[i], b_shapes, b[i]),
                                      _directed_hausdorff(b_shapes, b[i], a_shapes, a[i])) for i in pieces])


def _directed_hausdorff(a_shapes, a, b_shapes, b):
    """Largest distance from a pixel of a[k] to its nearest pixel of b[k], for every k: float (n,).

    Most pixels can be skipped without changing the result:
    - Pixels of `a` inside `b` have distance 0.
    - The nearest pixel of `b` is always on b's edge. If all its 4-neighbours were in `b`, one of them would be nearer.
    - Outside the bounding box of `b`, only the edge of `a` counts. From a pixel whose 4-neighbours are all in `a`, one
      step away from the box leads to a pixel of `a` that is farther from all of `b`.
    - Inside the box, a pixel that is not on a's edge but touches `b` has distance 1, the smallest distance above 0.

    One k-d tree of the points (k * apart, y, x) serves all pairs, because two pairs are farther apart than any two
    pixels of one pair.
    """
    width = a_shapes.width
    k, place = _pixels_of(a_shapes.pixels, a)
    outside_b = b_shapes.flat_map[place] != b[k]
    k, place = k[outside_b], place[outside_b]
    distances = np.zeros(len(a))
    distances[k] = 1
    on_edge = a_shapes.on_edge[place]
    y, x = np.divmod(place, width)
    top, left, bottom, right = b_shapes.boxes[b[k] - 1].T
    inner = np.flatnonzero(~on_edge & (y >= top) & (y <= bottom) & (x >= left) & (x <= right))
    around = place[inner] + np.array([[-width], [-1], [1], [width]])                        # all in the image
    inner = inner[(b_shapes.flat_map[around] != b[k[inner]]).all(axis=0)]
    far = np.concatenate([np.flatnonzero(on_edge), inner])
    k, place = k[far], place[far]

    apart = width + len(a_shapes.flat_map) // width

    def points(k, place):
        return np.stack([k * apart, *np.divmod(place, width)], axis=1)
    if len(k):
        tree = cKDTree(points(*_pixels_of(b_shapes.edges, b)), leafsize=32, balanced_tree=False)       # faster to build
        np.maximum.at(distances, k, tree.query(points(k, place))[0])
    return distances


def nearest_object_distances(shapes, objects, other_shapes):
    """Smallest Hausdorff distance, in pixels, from each of `objects` to any object of the other map: float (n,).

    It is NO_OBJECT_HAUSDORFF if the other map has no object. If the same sides of two bounding boxes are d apart, the
    Hausdorff distance is at least d: a pixel on the outer of the two sides is at least d from all of the other object.
    So the distance to the object with the most similar box is computed first. Then only objects whose boxes differ by
    no more than that distance are candidates.
    """
    if len(objects) == 0 or len(other_shapes.boxes) == 0:
        return np.full(len(objects), NO_OBJECT_HAUSDORFF)
    tree, boxes = cKDTree(other_shapes.boxes), shapes.boxes[objects - 1]
    nearest = hausdorff_distances(shapes, objects, other_shapes, tree.query(boxes, p=np.inf)[1] + 1)
    candidates = tree.query_ball_point(boxes, nearest, p=np.inf)
    index = np.repeat(np.arange(len(objects)), [len(others) for others in candidates])
    distances = hausdorff_distances(shapes, objects[index], other_shapes, np.concatenate(candidates).astype(int) + 1)
    np.minimum.at(nearest, index, distances)
    return nearest
