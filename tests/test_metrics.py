"""The metrics against golden numbers, closed-form answers, and a slow obvious version of each."""
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial.distance import directed_hausdorff

from support.objects import overlap_table, pool
from support.script import InputError
from utils import (AverageMeter, _largest_iou_sum_pairs, accuracy_pixel_level, gland_accuracy_object_level,
                   gland_scores_of, match_objects, nuclei_accuracy_object_level, nuclei_scores_of, standard_metrics,
                   standard_metrics_of)

GOLDEN = Path(__file__).parent / 'golden'
OBJECT_LEVEL = {'nuclei': nuclei_accuracy_object_level, 'gland': gland_accuracy_object_level}
NAN = float('nan')


def equal(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------
# Slow, obvious versions: Python loops over the masks of all objects
# ---------------------------------------------------------------------------------------------------

def slow_objects(labels, min_area=1):
    """Masks of the 8-connected regions of equal value in raster order, by flood fill."""
    seen = labels == 0
    masks = []
    for start in np.ndindex(labels.shape):
        if seen[start]:
            continue
        mask = np.zeros(labels.shape, bool)
        stack = [start]
        seen[start] = True
        while stack:
            y, x = stack.pop()
            mask[y, x] = True
            for v in range(max(y - 1, 0), min(y + 2, labels.shape[0])):
                for u in range(max(x - 1, 0), min(x + 2, labels.shape[1])):
                    if not seen[v, u] and labels[v, u] == labels[y, x]:
                        seen[v, u] = True
                        stack.append((v, u))
        if mask.sum() >= min_area:
            masks.append(mask)
    return masks


def slow_hausdorff(a, b):
    a, b = np.argwhere(a), np.argwhere(b)
    return max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0])


def iou(a, b):
    return Fraction(int((a & b).sum()), int((a | b).sum()))


def dice(a, b):
    return Fraction(2 * int((a & b).sum()), int(a.sum() + b.sum()))


def ratio(a, b):
    return a / b if b else 0.0


def slow_aji(gts, preds, pairs):
    """pairs: (index in gts, index in preds)."""
    intersections = sum((gts[i] & preds[j]).sum() for i, j in pairs)
    unions = sum((gts[i] | preds[j]).sum() for i, j in pairs)
    alone = sum(gts[i].sum() for i in set(range(len(gts))) - {i for i, _ in pairs})
    alone += sum(preds[j].sum() for j in set(range(len(preds))) - {j for _, j in pairs})
    return intersections / (unions + alone)


def slow_published_pairs(gts, preds):
    pairs, free = [], list(range(len(preds)))
    for i, gt in enumerate(gts):
        candidates = [j for j in free if (gt & preds[j]).any()]
        if candidates:
            best = max(candidates, key=lambda j: iou(gt, preds[j]))       # max() returns the first of equals
            pairs.append((i, best))
            free.remove(best)
    return pairs


def slow_nuclei(pred, gt):
    preds, gts = slow_objects(pred), slow_objects(gt)
    if not preds and not gts:
        return [1, 1, 1, 1, 1, NAN, 1]
    pairs = slow_published_pairs(gts, preds)
    if not pairs:
        return [0, 0, 0, 0, 0, NAN, 0]
    return [len(pairs) / len(gts), len(pairs) / len(preds), 2 * len(pairs) / (len(gts) + len(preds)),
            np.mean([float(dice(gts[i], preds[j])) for i, j in pairs]),
            np.mean([float(iou(gts[i], preds[j])) for i, j in pairs]),
            np.mean([slow_hausdorff(gts[i], preds[j]) for i, j in pairs]),
            slow_aji(gts, preds, pairs)]


def slow_partner(own, others):
    """The one of `others` that `own` overlaps most, the first on a tie; None if it overlaps none."""
    best = max(others, key=lambda other: (own & other).sum(), default=None)
    return best if best is not None and (own & best).any() else None


def slow_gland_means(owns, others):
    total = np.zeros(3)
    for own in owns:
        partner = slow_partner(own, others)
        if partner is None:
            scores = [0, 0, min([slow_hausdorff(own, other) for other in others], default=1e5)]
        else:
            scores = [float(dice(own, partner)), float(iou(own, partner)), slow_hausdorff(own, partner)]
        total += own.sum() * np.array(scores)
    return total / max(sum(own.sum() for own in owns), 1)


def slow_gland(pred, gt):
    preds, gts = slow_objects(pred), slow_objects(gt, min_area=3)
    if not preds and not gts:
        return [1, 1, 1, 1, 1, 0]
    found = set()
    for pred_mask in preds:
        partner = slow_partner(pred_mask, gts)
        if partner is not None and 2 * (pred_mask & partner).sum() >= partner.sum():
            found.add(partner.tobytes())
    means = (slow_gland_means(gts, preds) + slow_gland_means(preds, gts)) / 2
    return [ratio(len(found), len(gts)), ratio(len(found), len(preds)),
            2 * len(found) / (len(gts) + len(preds)), *means]


def slow_standard(pred, gt):
    preds, gts = slow_objects(pred), slow_objects(gt)
    keys = ('aji', 'aji_plus', 'aji_fullnet', 'pq', 'dq', 'sq', 'f1', 'ap50', 'map', 'dice')
    if not preds and not gts:
        return dict.fromkeys(keys, 1)
    if not preds or not gts:
        return dict.fromkeys(keys, 0)
    table = [[iou(a, b) for b in preds] for a in gts]
    best = [(i, max(range(len(preds)), key=lambda j: row[j])) for i, row in enumerate(table) if max(row) > 0]
    assigned = zip(*linear_sum_assignment(np.array(table, dtype=float), maximize=True))
    matches = [value for row in table for value in row if value > Fraction(1, 2)]
    dq = 2 * len(matches) / (len(gts) + len(preds))
    sq = float(sum(matches) / len(matches)) if matches else 0
    ap = []
    for percent in range(50, 100, 5):
        allowed = csr_array([[value >= Fraction(percent, 100) for value in row] for row in table])
        tp = (maximum_bipartite_matching(allowed) >= 0).sum()
        ap.append(tp / (len(gts) + len(preds) - tp))
    return {'aji': slow_aji(gts, preds, best),
            'aji_plus': slow_aji(gts, preds, [(i, j) for i, j in assigned if table[i][j] > 0]),
            'aji_fullnet': slow_aji(gts, preds, slow_published_pairs(gts, preds)),
            'pq': dq * sq, 'dq': dq, 'sq': sq, 'f1': dq, 'ap50': ap[0], 'map': np.mean(ap),
            'dice': float(dice(pred > 0, gt > 0))}


# ---------------------------------------------------------------------------------------------------
# Made-up images
# ---------------------------------------------------------------------------------------------------

# few values: many touching objects, ids in several pieces, ties
small_labels = st.sampled_from([0, 1, 2, 7, 2**40])
small_pairs = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: st.tuples(hnp.arrays(np.int64, shape, elements=small_labels),
                            hnp.arrays(np.int64, shape, elements=small_labels)))


def blobs(seed, shape=(48, 56), n=14, largest=9):
    """Discs of many sizes drawn over each other, with random ids: touching, cut and disconnected objects."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[:shape[0], :shape[1]]
    labels = np.zeros(shape, np.int32)
    for _ in range(n):
        cy, cx, radius = rng.integers(shape[0]), rng.integers(shape[1]), rng.integers(largest)
        labels[(y - cy) ** 2 + (x - cx) ** 2 <= radius ** 2] = rng.integers(1, 1000)
    return labels


def blob_pair(seed):
    """A label map and a prediction that finds it with errors: shifted, with objects lost, split and invented."""
    gt = blobs(seed)
    pred = np.roll(gt, (2, -1), (0, 1))
    invented = blobs(seed + 1000, n=4, largest=5)
    pred[invented > 0] = invented[invented > 0]
    pred[:, 20] = 0
    pred[pred % 5 == 0] = 0
    return pred, gt


def square(shape, *boxes):
    """Label map with objects 1, 2, ... at the boxes (top, left, height, width)."""
    labels = np.zeros(shape, int)
    for i, (top, left, height, width) in enumerate(boxes, 1):
        labels[top:top + height, left:left + width] = i
    return labels


# ---------------------------------------------------------------------------------------------------
# Golden numbers and slow versions
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('i', range(9))
def test_published_metrics_are_golden(i):
    golden = np.load(GOLDEN / 'metrics.npz', allow_pickle=False)
    pred, gt = golden[f'{i}/pred'], golden[f'{i}/gt']
    equal(OBJECT_LEVEL[str(golden[f'{i}/kind'])](pred, gt), golden[f'{i}/result'])
    equal(accuracy_pixel_level(pred[None] > 0, gt[None] > 0), golden[f'{i}/pixel'])


def test_standard_metrics_are_golden():
    golden = np.load(GOLDEN / 'metrics_standard.npz', allow_pickle=False)
    cases = sorted({key.split('/')[0] for key in golden.files})
    assert len(cases) >= 6
    for i in cases:
        expected = json.loads(str(golden[f'{i}/result']))
        scores = standard_metrics(golden[f'{i}/pred'], golden[f'{i}/gt'])
        assert scores.keys() == expected.keys()
        equal([scores[key] for key in expected], list(expected.values()))


@settings(max_examples=150)
@given(small_pairs)
def test_small_maps_like_the_slow_version(pair):
    equal(nuclei_accuracy_object_level(*pair), slow_nuclei(*pair))
    equal(gland_accuracy_object_level(*pair), slow_gland(*pair))
    scores, expected = standard_metrics(*pair), slow_standard(*pair)
    assert scores.keys() == expected.keys()
    for key in scores.keys() - {'aji_plus'}:                # equal sums of IoU can have different AJI+, see below
        equal(scores[key], expected[key])
    assert all(0 <= value <= 1 for value in scores.values())


@settings(max_examples=100)
@given(small_pairs)
def test_aji_plus_pairs_have_the_largest_sum_of_iou(pair):
    table = overlap_table(*pair)
    pairs = _largest_iou_sum_pairs(table)
    assert len(set(table.gt[pairs])) == len(set(table.pred[pairs])) == len(pairs)
    dense = np.zeros((table.n_gt, table.n_pred))
    dense[table.gt - 1, table.pred - 1] = table.iou
    equal(table.iou[pairs].sum(), dense[linear_sum_assignment(dense, maximize=True)].sum())


@pytest.mark.parametrize('seed', range(8))
def test_blobs_like_the_slow_version(seed):
    pred, gt = blob_pair(seed)
    table = overlap_table(pred, gt)                         # one table serves all metrics
    equal(nuclei_scores_of(table), slow_nuclei(pred, gt))
    equal(gland_scores_of(table), slow_gland(pred, gt))
    scores, expected = standard_metrics_of(table), slow_standard(pred, gt)
    equal([scores[key] for key in expected], list(expected.values()))


@pytest.mark.parametrize('seed', range(4))
def test_far_glands_like_the_slow_version(seed):
    # nearly nothing overlaps: the search for the nearest object decides
    pred, gt = blobs(seed, n=20, largest=4), blobs(seed + 50, n=20, largest=4)
    pred[gt > 0] = 0
    pred[:, :6] = gt[:, :6]
    scores = gland_accuracy_object_level(pred, gt)
    equal(scores, slow_gland(pred, gt))
    assert scores.iou < 0.5


# ---------------------------------------------------------------------------------------------------
# Closed-form answers
# ---------------------------------------------------------------------------------------------------

def test_two_shifted_squares():
    # 10 x 10 pixels, shifted by (3, 4): 7 * 6 of them overlap, and the corner is 5 away
    gt, pred = square((30, 30), (5, 5, 10, 10)), square((30, 30), (8, 9, 10, 10))
    nuclei = nuclei_accuracy_object_level(pred, gt)
    equal([nuclei.recall, nuclei.precision, nuclei.F1], 1)
    equal([nuclei.dice, nuclei.iou, nuclei.hausdorff, nuclei.AJI], [0.42, 42 / 158, 5, 42 / 158])
    # covers 42 of 100 pixels: no true positive for GlaS
    equal(gland_accuracy_object_level(pred, gt), [0, 0, 0, 0.42, 42 / 158, 5])
    scores = standard_metrics(pred, gt)
    equal([scores['aji'], scores['aji_plus'], scores['aji_fullnet'], scores['dice']], [42 / 158] * 3 + [0.42])
    assert scores['pq'] == scores['dq'] == scores['sq'] == scores['f1'] == scores['ap50'] == scores['map'] == 0


WITHOUT_BACKGROUND = np.repeat([[1, 2], [3, 4]], 8, axis=0).repeat(8, axis=1)


@pytest.mark.parametrize('gt', [square((40, 40), (2, 3, 10, 20), (20, 20, 15, 15)), WITHOUT_BACKGROUND],
                         ids=['two', 'without background'])
def test_perfect_prediction(gt):
    equal(nuclei_accuracy_object_level(gt, gt), [1, 1, 1, 1, 1, 0, 1])
    equal(gland_accuracy_object_level(gt, gt), [1, 1, 1, 1, 1, 0])
    assert set(standard_metrics(gt, gt).values()) == {1.0}


def test_one_object_everywhere():
    # it overlaps all four, and has IoU 1/4 with the one that it takes
    whole = np.ones_like(WITHOUT_BACKGROUND)
    equal(nuclei_accuracy_object_level(whole, WITHOUT_BACKGROUND)[:5], [1 / 4, 1, 2 / 5, 2 / 5, 1 / 4])
    equal(nuclei_accuracy_object_level(WITHOUT_BACKGROUND, whole)[:5], [1, 1 / 4, 2 / 5, 2 / 5, 1 / 4])


def test_hausdorff_inside_an_object_and_at_the_image_border():
    # a full square against its own frame: the centre is 10 away, everything on the square's edge is 0 away
    gt = square((25, 25), (2, 2, 21, 21))
    frame = gt.copy()
    frame[3:22, 3:22] = 0
    equal(nuclei_accuracy_object_level(frame, gt).hausdorff, 10)
    equal(nuclei_accuracy_object_level(gt, frame).hausdorff, 10)
    # the far pixels of the full image lie on no other object's side, only on the image's
    gt, pred = np.ones((20, 30), int), square((20, 30), (0, 0, 1, 1))
    equal(nuclei_accuracy_object_level(pred, gt).hausdorff, np.hypot(19, 29))


@pytest.mark.parametrize('left_id, middle_id', [(1, 2), (2, 1)])
def test_nuclei_tie_goes_to_the_first_in_raster_order(left_id, middle_id):
    # both predictions have IoU 1/3; from the far end the left one is 6 away, the middle one 3
    gt = square((4, 12), (1, 0, 1, 9))
    pred = left_id * square((4, 12), (1, 0, 1, 3)) + middle_id * square((4, 12), (1, 3, 1, 3))
    equal(nuclei_accuracy_object_level(pred, gt)[:6], [1, 1 / 2, 2 / 3, 1 / 2, 1 / 3, 6])


def test_nuclei_prediction_is_taken_once():
    # the first object takes the only prediction, although the second overlaps it more
    gt = square((10, 12), (0, 0, 5, 6), (5, 0, 5, 6))
    pred = square((10, 12), (4, 0, 6, 6))
    scores = nuclei_accuracy_object_level(pred, gt)
    equal(scores[:5], [0.5, 1, 2 / 3, 12 / 66, 6 / 60])
    equal(scores.AJI, 6 / (60 + 30))
    standard = standard_metrics(pred, gt)
    equal(standard['aji'], (6 + 30) / (60 + 36))             # MoNuSeg's: both take it
    equal(standard['aji_plus'], 30 / (36 + 30))              # the better of the two


def test_gland_true_positive_needs_half_of_the_gland_and_two_count_once():
    gt = square((20, 30), (5, 5, 10, 20))
    equal(gland_accuracy_object_level(square((20, 30), (5, 5, 10, 10)), gt)[:3], 1)
    equal(gland_accuracy_object_level(square((20, 30), (5, 5, 10, 9)), gt)[:3], 0)
    equal(gland_accuracy_object_level(square((20, 30), (5, 5, 10, 10), (5, 15, 10, 10)), gt)[:3], [1, 0.5, 2 / 3])


def test_gland_drops_ground_truth_under_three_pixels():
    gt = square((20, 20), (0, 0, 1, 2), (10, 10, 1, 3))
    pred = square((20, 20), (0, 0, 1, 2), (10, 10, 1, 3))
    scores = gland_accuracy_object_level(pred, gt)
    equal(scores[:3], [1, 0.5, 2 / 3])
    # the 2-pixel prediction has lost its partner: from (10, 12) its nearest pixel is (0, 1)
    equal(scores.hausdorff, 2 / 5 * np.hypot(10, 11) / 2)


def test_gland_without_partner_is_compared_with_the_nearest():
    gt = square((40, 60), (5, 5, 4, 4))
    pred = square((40, 60), (5, 15, 4, 4), (30, 50, 4, 4))
    equal(gland_accuracy_object_level(pred, gt), [0, 0, 0, 0, 0, (10 + (10 + np.hypot(25, 45)) / 2) / 2])


def test_iou_of_exactly_the_threshold():
    gt = square((10, 10), (0, 0, 1, 10))
    scores = standard_metrics(square((10, 10), (0, 0, 1, 6)), gt)
    equal([scores['ap50'], scores['map'], scores['pq']], [1, 0.3, 0.6])        # t = 0.50, 0.55, 0.60
    # both halves have IoU 0.5: no match for PQ, one match for AP
    scores = standard_metrics(square((10, 10), (0, 0, 1, 5), (0, 5, 1, 5)), gt)
    equal([scores['ap50'], scores['map'], scores['pq']], [0.5, 0.05, 0])


def test_pixel_level():
    target = np.array([[[1, 1, 1, 0], [0, 0, 2, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    output = np.array([[[1, 1, 0, 1], [0, 2, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    # first: tp 2, fn 1, fp 1, tn 4; class 2 is "rest". Second: nothing to find, its ratios are 0
    equal(accuracy_pixel_level(output, target),
          np.array([6 / 8 + 1, 2 / 4, 2 / 3, 2 / 3, 2 / 3, (2 / 3 + 4 / 5) / 2 + 1 / 2]) / 2)


# ---------------------------------------------------------------------------------------------------
# What must not matter
# ---------------------------------------------------------------------------------------------------

def all_scores(pred, gt):
    return np.concatenate([nuclei_accuracy_object_level(pred, gt), gland_accuracy_object_level(pred, gt),
                           list(standard_metrics(pred, gt).values())])


@pytest.mark.parametrize('dtype', [np.uint16, np.int32, np.int64, np.uint64])
def test_ids_do_not_matter(dtype):
    pred, gt = blob_pair(5)
    huge = [np.where(labels > 0, np.iinfo(dtype).max - labels.astype(dtype), 0).astype(dtype) for labels in (pred, gt)]
    assert np.array_equal(all_scores(*huge), all_scores(pred, gt))


def test_50_000_objects_are_not_confused():
    label = np.zeros((448, 448), int)
    label[::2, ::2] = 1                                     # the number of pairs of objects needs more than 32 bits
    table = overlap_table(label, label)
    assert table.n_pred == table.n_gt == len(table.iou) == 224 ** 2 and (table.iou == 1).all()
    assert np.array_equal(table.pred, table.gt) and np.array_equal(table.gt, np.arange(1, 224 ** 2 + 1))


def test_bool_masks_and_tensors_are_label_maps():
    import torch
    pred, gt = (labels > 0 for labels in blob_pair(6))
    expected = all_scores(pred.astype(int), gt.astype(int))
    assert np.array_equal(all_scores(pred, gt), expected)
    assert np.array_equal(all_scores(torch.from_numpy(pred), torch.from_numpy(gt)), expected)


# ---------------------------------------------------------------------------------------------------
# Nothing to match; wrong inputs; averages
# ---------------------------------------------------------------------------------------------------

EMPTY = np.zeros((20, 30), int)
OBJECT = square((20, 30), (2, 2, 5, 5))
ELSEWHERE = square((20, 30), (2, 12, 5, 5))


@pytest.mark.parametrize('pred, gt, score, nuclei_hausdorff, gland_hausdorff', [
    (EMPTY, EMPTY, 1, NAN, 0),
    (EMPTY, OBJECT, 0, NAN, 5e4),
    (OBJECT, EMPTY, 0, NAN, 5e4),
    (OBJECT, ELSEWHERE, 0, NAN, 10),
])
def test_nothing_to_match(pred, gt, score, nuclei_hausdorff, gland_hausdorff):
    equal(nuclei_accuracy_object_level(pred, gt), [score] * 5 + [nuclei_hausdorff, score])
    equal(gland_accuracy_object_level(pred, gt), [score] * 5 + [gland_hausdorff])
    assert set(standard_metrics(pred, gt).values()) == {score}


def test_gland_with_only_dropped_ground_truth_is_empty():
    speck = square((20, 30), (2, 2, 1, 2))
    equal(gland_accuracy_object_level(EMPTY, speck), [1, 1, 1, 1, 1, 0])
    equal(gland_accuracy_object_level(OBJECT, speck), [0, 0, 0, 0, 0, 5e4])


@pytest.mark.parametrize('metric', [*OBJECT_LEVEL.values(), standard_metrics])
@pytest.mark.parametrize('pred, gt, message', [
    (OBJECT, OBJECT[1:], r'prediction and ground truth differ in shape: \(20, 30\) and \(19, 30\)'),
    (OBJECT * 1.0, OBJECT, 'prediction: expected an array of integer labels, found float64'),
    (OBJECT, OBJECT - 1, r'ground truth: expected labels of 0 \(background\) and up, found -1'),
    (OBJECT, OBJECT[None], r'ground truth: expected a non-empty array of shape \(H, W\), found shape \(1, 20, 30\)'),
    (OBJECT[:0], OBJECT[:0], r'prediction: expected a non-empty array of shape \(H, W\), found shape \(0, 30\)'),
])
def test_wrong_inputs_are_named(metric, pred, gt, message):
    with pytest.raises(InputError, match=message):
        metric(pred, gt)


def test_wrong_input_of_the_pixel_level_is_named():
    with pytest.raises(InputError, match=r'of shape \(B, H, W\), found shape \(20, 30\)'):
        accuracy_pixel_level(OBJECT, OBJECT)


def test_average_meter_leaves_nan_out():
    meter = AverageMeter(2)
    meter.update([NAN, NAN])
    assert np.isnan(meter.avg).all()
    meter.update([1, 4], n=3)
    meter.update(np.array([5, 8]))
    meter.update([NAN, 6])
    equal(meter.avg, [2, 26 / 5])
    equal(meter.sum, [8, 26])
    equal(meter.count, [4, 5])
    with pytest.raises(ValueError):
        meter.update([1, 2, 3])


# ---------------------------------------------------------------------------------------------------
# Sets of images; matches by id
# ---------------------------------------------------------------------------------------------------

@given(st.lists(st.tuples(*[hnp.arrays(np.int8, (6, 7), elements=st.integers(0, 4))] * 2), min_size=1, max_size=4))
@settings(max_examples=60)
def test_pooled_metrics_are_those_of_one_large_image(pairs):
    """Images side by side with an empty column between them."""
    large = [np.concatenate([np.pad(pair[k], ((0, 0), (0, 1))) for pair in pairs], axis=1) for k in (0, 1)]
    pooled = standard_metrics_of(pool([overlap_table(*pair) for pair in pairs]))
    expected = standard_metrics(*large)
    for name in set(expected) - {'aji_fullnet'}:              # which depends on the order of the objects
        assert pooled[name] == pytest.approx(expected[name]), name


@given(*[hnp.arrays(np.int8, (6, 7), elements=st.integers(0, 4))] * 2)
@settings(max_examples=100)
def test_matches_are_the_pairs_of_highest_iou_one_to_one(pred, gt):
    iou = {(p, g): ((pred == p) & (gt == g)).sum() / ((pred == p) | (gt == g)).sum()
           for p in range(1, 5) for g in range(1, 5) if ((pred == p) & (gt == g)).any()}
    expected = {}
    while iou:
        p, g = max(iou, key=lambda pair: (iou[pair], -pair[0], -pair[1]))
        expected[p] = (g, pytest.approx(iou[p, g]))
        iou = {pair: value for pair, value in iou.items() if pair[0] != p and pair[1] != g}
    assert match_objects(pred, gt) == expected
