"""Post-processing beyond the published one, and the study of what it gains."""
import json
from pathlib import Path

import numpy as np
import pytest
from miniature import nuclei
from scipy import ndimage
from skimage.segmentation import watershed

import study_post_processing as study
import test as test_script
from options import Options
from utils import (InputError, confident_seeds, dilate, fill_small_holes, grow_objects, inside_mask, post_process,
                   save_image, save_instances, split_objects)

EIGHT = np.ones((3, 3))


def maps(seed, height=60, width=70, sigma=3.0):
    """Probability maps, float32 (H, W, 3), smooth, with many objects that touch."""
    rng = np.random.default_rng(seed)
    logits = ndimage.gaussian_filter(rng.normal(0, 1, (height, width, 3)), (sigma, sigma, 0)) * 5 * sigma
    exp = np.exp(logits)
    return (exp / exp.sum(2, keepdims=True)).astype(np.float32)


def post(**changed):
    """The post group of test.py."""
    return {**Options(isTrain=False).parse([]).post, **changed}


# ---------------------------------------------------------------------------------------------------
# The published way is the default
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(3))
def test_the_default_is_the_published_way(seed):
    bands = [maps(10 * seed + k, 20 + k) for k in range(3)]
    whole = np.concatenate(bands)
    label, inside, contour = test_script.segment_bands(iter(bands), whole.shape[:2], post(min_area=5))
    components, n = ndimage.label(whole.argmax(2) == 1)
    areas = np.bincount(components.ravel())
    mask = (components > 0) & (areas >= 5)[components]
    expected = ndimage.label(mask, EIGHT)[0]
    expected = ndimage.grey_dilation(expected, footprint=np.hypot(*np.mgrid[-2:3, -2:3]) <= 2)
    assert label.max() > 5 and np.array_equal(label, expected)
    assert np.array_equal(inside, np.round(whole[..., 1] * 255))
    assert np.array_equal(contour, np.round(whole[..., 2] * 255))


@pytest.mark.parametrize('changed', [dict(inside_threshold=0.6), dict(fill_holes=30), dict(watershed=0.8),
                                     dict(grow=0.5)])
def test_how_an_image_is_cut_into_bands_changes_nothing(changed):
    whole = maps(4, 90, sigma=1.5)
    options = post(min_area=5, radius=0, **changed)
    label = test_script.segment_bands([whole], whole.shape[:2], options)[0]
    in_bands = test_script.segment_bands((whole[top:top + 30] for top in (0, 30, 60)), whole.shape[:2], options)[0]
    assert np.array_equal(in_bands, label)
    published = test_script.segment_bands([whole], whole.shape[:2], post(min_area=5, radius=0))[0]
    assert not np.array_equal(label, published)


# ---------------------------------------------------------------------------------------------------
# Each option against an obvious version
# ---------------------------------------------------------------------------------------------------

def test_threshold_on_the_inside_probability():
    probabilities = np.array([[[0.5, 0.4, 0.1], [0.2, 0.5, 0.3], [0.0, 0.45, 0.55], [0.3, 0.4, 0.3]]], np.float32)
    assert inside_mask(probabilities).tolist() == [[False, True, False, True]]
    assert inside_mask(probabilities, 0.45).tolist() == [[False, True, True, False]]
    assert inside_mask(probabilities, 0.5).tolist() == [[False, True, False, False]]


def slow_fill(mask, max_area):
    """Region by region."""
    result = mask.copy()
    holes, n = ndimage.label(~mask)
    for i in range(1, n + 1):
        if (holes == i).sum() <= max_area:
            result[holes == i] = True
    return result


@pytest.mark.parametrize('max_area', [1, 6, 40])
def test_filled_holes(max_area):
    mask = maps(max_area)[..., 1] > 0.3
    filled = fill_small_holes(mask, max_area)
    assert np.array_equal(filled, slow_fill(mask, max_area))
    ring = np.ones((5, 5), bool)
    ring[1:4, 1:4] = False
    assert fill_small_holes(ring, 9).all() and np.array_equal(fill_small_holes(ring, 8), ring)


def test_a_ring_too_small_alone_is_kept_when_its_hole_is_filled():
    ring = np.zeros((8, 8), bool)
    ring[1:6, 1:6] = True
    ring[2:5, 2:5] = False                                              # 16 pixels round a hole of 9
    assert post_process(ring, 20, 0).max() == 0
    assert (post_process(ring, 20, 0, fill_holes=9) > 0).sum() == 25


def slow_split(label, probability, threshold, min_area):
    """Object by object, each in the whole image."""
    result = label.copy()
    for i in range(1, label.max() + 1):
        seeds, n = ndimage.label((probability >= threshold * 255) & (label == i), EIGHT)
        for k in range(1, n + 1):
            if (seeds == k).sum() < min_area:
                seeds[seeds == k] = 0
        if len(np.unique(seeds)) > 2:
            parts = watershed(255 - probability.astype(int), seeds, connectivity=2, mask=label == i)
            result[label == i] = 1000 * i + parts[label == i]
    return result


def same_objects(a, b):
    """Whether two labels differ in nothing but the ids."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1] and np.array_equal(a > 0, b > 0)


@pytest.mark.parametrize('seed, threshold, min_area', [(0, 0.7, 1), (1, 0.9, 4), (2, 0.8, 0), (3, 0.99, 20)])
def test_objects_are_split_as_by_a_watershed_of_each(seed, threshold, min_area):
    probability = np.round(maps(seed, 120, 130)[..., 1] * 255).astype(np.uint8)
    label = ndimage.label(probability > 90, EIGHT)[0].astype(np.int32)
    split = split_objects(label, probability, confident_seeds(label, probability, threshold, min_area))
    assert split.dtype == np.int32
    assert same_objects(split, slow_split(label, probability, threshold, min_area))
    assert np.array_equal(np.unique(split), np.arange(split.max() + 1))
    assert split.max() > label.max() or threshold == 0.99


def test_two_nuclei_with_a_bridge_are_split_where_the_probability_is_lowest():
    y, x = np.mgrid[:21, :41]
    probability = (255 * np.clip(1.2 - np.minimum(np.hypot(y - 10, x - 11), np.hypot(y - 10, x - 29)) / 15, 0, 1))
    probability = probability.astype(np.uint8)
    mask = probability > 100
    assert post_process(mask, 20, 0).max() == 1
    label = post_process(mask, 20, 0, watershed=0.9, maps=(probability, 0 * probability))
    assert label.max() == 2 and np.array_equal(label > 0, mask)
    assert (label[:, :20][mask[:, :20]] == 1).all() and (label[:, 21:][mask[:, 21:]] == 2).all()
    scaled = post_process(mask, 20, 0, (42, 82), watershed=0.9, maps=(probability, probability))        # a scaled image
    assert scaled.max() == 2 and (scaled[:, :40][scaled[:, :40] > 0] == 1).all()


def test_nothing_to_split_or_to_grow():
    empty, one, sure = np.zeros((5, 6), np.int32), np.ones((5, 6), np.int32), np.full((5, 6), 255, np.uint8)
    nothing = 0 * sure
    for label, inside in ((empty, nothing), (empty, sure), (one, nothing), (one, sure)):
        assert np.array_equal(split_objects(label, inside, confident_seeds(label, inside, 0.5, 0)), label)
    assert np.array_equal(grow_objects(empty, sure, nothing, 0.5), empty)
    assert np.array_equal(grow_objects(one, nothing, nothing, 0.5), one)


def slow_grow(label, inside, foreground):
    """One pixel at a time: that of the highest inside probability gives its id to all its free neighbours."""
    result, waiting = label.copy(), label > 0
    while waiting.any():
        y, x = np.argwhere(waiting)[np.argmax(inside[waiting])]
        waiting[y, x] = False
        around = np.s_[max(0, y - 1):y + 2, max(0, x - 1):x + 2]
        free = foreground[around] & (result[around] == 0)
        result[around][free] = result[y, x]
        waiting[around] |= free
    return result


@pytest.mark.parametrize('seed', range(4))
def test_objects_grow_over_the_foreground(seed):
    smooth = maps(seed, 15, 16, sigma=1.0)
    inside = smooth[..., 1].ravel().argsort().argsort().reshape(15, 16).astype(np.uint8)       # all different: no ties
    contour = (smooth[..., 2] * (255 - inside)).astype(np.uint8)
    cores = ndimage.label(inside > 200, EIGHT)[0].astype(np.int32)
    cores[cores == 1] = 0                                               # an object that is not there is not made
    grown = grow_objects(cores, inside, contour, 0.4)
    expected = slow_grow(cores, inside, inside.astype(int) + contour >= 102)
    assert grown.dtype == np.int32 and np.array_equal(grown, expected)
    assert (grown > 0).sum() > 2 * (cores > 0).sum()
    label = post_process(inside > 200, 1, 2, grow=0.4, maps=(inside, contour))
    assert np.array_equal(label, slow_grow(ndimage.label(inside > 200, EIGHT)[0], inside,
                                           inside.astype(int) + contour >= 102))


# ---------------------------------------------------------------------------------------------------
# The study
# ---------------------------------------------------------------------------------------------------

PUBLISHED = dict.fromkeys(study.CHOICES, 0) | {'min_area': 5, 'radius': 2}


@pytest.mark.parametrize('changed', [{}, {'min_area': 0}, {'inside_threshold': 0.6}, {'fill_holes': 50},
                                     {'watershed': 0.8}, {'grow': 0.5}, {'watershed': 0.8, 'grow': 0.5}])
def test_stored_maps_give_what_the_probabilities_give(changed):
    choice = PUBLISHED | changed
    steps = np.round(maps(1, sigma=1.5) * 255)
    steps[..., 0] = 255 - steps[..., 1] - steps[..., 2]
    probabilities = (steps / 255).astype(np.float32)                  # exact in 8 bits
    label, inside, contour = test_script.segment_bands([probabilities], (60, 70), post(**{
        name: choice[name] for name in ('min_area', 'radius', 'inside_threshold', 'fill_holes', 'watershed', 'grow')}))
    assert np.array_equal(study.segment_maps(study.Maps(inside, contour), choice), label)


def test_seeds_at_h_maxima_split_objects_and_join_none():
    probabilities = maps(2, 90, 100)
    image = study.Maps(*(np.round(probabilities[..., k] * 255).astype(np.uint8) for k in (1, 2)))
    cores = study.segment_maps(image, PUBLISHED | {'radius': 0})
    split = study.segment_maps(image, PUBLISHED | {'radius': 0, 'h_maxima': 0.05})
    assert np.array_equal(split > 0, cores > 0) and len(np.unique(split)) > len(np.unique(cores))
    for part in np.unique(split[split > 0]):
        assert len(np.unique(cores[split == part])) == 1
    assert np.array_equal(dilate(split.copy(), 2), study.segment_maps(image, PUBLISHED | {'h_maxima': 0.05}))
    grown = study.segment_maps(image, PUBLISHED | {'h_maxima': 0.05, 'grow': 0.5})
    assert np.array_equal(grown, grow_objects(split, image.inside, image.contour, 0.5))


def test_h_maxima_of_one_height_are_one_unless_the_valley_is_deep():
    y, x = np.mgrid[:31, :41]
    for valley, count in ((150, 1), (90, 2)):
        inside = np.where(np.hypot(y - 15, x - 20) < 15, valley, 0)
        for column in (13, 27):
            inside[12:19, column - 3:column + 4] = 200
        image = study.Maps(inside.astype(np.uint8), np.zeros((31, 41), np.uint8))
        seeds = image.h_maxima(0.3)                                     # 76
        assert len(np.unique(seeds[inside > 0])) - (seeds[inside > 0] == 0).any() == count


def test_a_maximum_that_leaves_an_object_and_comes_back_is_one_seed():
    inside, contour = np.zeros((2, 40, 50), np.uint8)
    inside[5:35, 5:15] = inside[5:35, 35:45] = 200                      # an object in two halves
    inside[5:15, 15:35], contour[5:15, 15:35] = 100, 60                 # joined by a part that is inside, barely
    inside[25:35, 15:35], contour[25:35, 15:35] = 120, 135              # and by a higher one that is contour
    image = study.Maps(inside, contour)
    for h, count in ((0.35, 1), (0.2, 2)):                              # 89 cuts between the two joints, 51 above both
        assert study.segment_maps(image, PUBLISHED | {'radius': 0, 'h_maxima': h}).max() == count


@pytest.fixture
def results(tmp_path):
    """Probability maps of two images as test.py writes them, and their labels: objects a pixel thinner, with holes."""
    for i in range(2):
        _, truth = nuclei(i, 80, 90)
        save_instances(tmp_path / 'labels' / f'im.{i}_label.png', truth)
        core = ndimage.binary_erosion(truth > 0)
        inside = core * 220
        inside[40, 20:70] = inside[40, 20:70] * (np.arange(50) % 5 > 0)
        contour = ((truth > 0) & ~core) * 200
        for kind, array in (('inside', inside), ('contour', contour)):
            save_image(tmp_path / f'out/set_prob_maps/im.{i}_prob_{kind}.png', array.astype(np.uint8))
    return tmp_path


def test_the_study_reports_every_variant_and_a_best_one(results, monkeypatch, capsys):
    monkeypatch.setattr(study, 'CHOICES', {**{name: (0,) for name in study.CHOICES}, 'min_area': (20, 40),
                                           'radius': (0, 1, 2), 'fill_holes': (0, 20), 'grow': (0, 0.5)})
    study.main([str(results / 'out'), '--label-dir', str(results / 'labels')])
    table = json.loads((results / 'out/set_post_processing.json').read_text())
    rows = {row['name']: row for row in table['variants']}
    assert list(rows)[:-1] == ['published: min_area 20 radius 2', 'min_area 40', 'radius 0', 'radius 1',
                               'fill_holes 20', 'grow 0.5']
    assert [name for name, row in rows.items() if row['published']] == ['published: min_area 20 radius 2']
    best = table['variants'][-1]
    assert best['name'].startswith('greedy search: ')
    assert best['mean']['published_AJI'] >= max(row['mean']['published_AJI'] for row in table['variants'])
    assert best['mean']['published_AJI'] > rows['radius 0']['mean']['published_AJI'] + 0.05
    assert best['choice']['fill_holes'] == 20
    for row in table['variants']:
        for name, value in row['mean'].items():
            assert value == pytest.approx(np.mean([row['images'][image][name] for image in ('im.0', 'im.1')]))
    text = (results / 'out/set_post_processing.txt').read_text()
    assert text in capsys.readouterr().out and f"{best['mean']['published_AJI']:.4f}" in text.splitlines()[-1]


def test_the_study_scores_as_the_metrics_do(results):
    from utils import nuclei_accuracy_object_level, standard_metrics
    image, truth = study.read_maps(results / 'out', 'set', results / 'labels')['im.0']
    label = study.segment_maps(image, PUBLISHED)
    expected = standard_metrics(label, truth)
    assert study.score(label, truth) == [nuclei_accuracy_object_level(label, truth).AJI, expected['aji'],
                                         expected['pq'], expected['dice']]
    assert np.array_equal(label, dilate(study.segment_maps(image, PUBLISHED | {'radius': 0}), 2))


def test_what_the_study_cannot_use(results):
    with pytest.raises(InputError, match='no probability maps in .*nowhere; run test.py first'):
        study.main([str(results / 'nowhere'), '--label-dir', str(results / 'labels')])
    (results / 'out/other_prob_maps').mkdir()
    with pytest.raises(InputError, match=r'2 sets \(other, set\); choose one with --set'):
        study.main([str(results / 'out'), '--label-dir', str(results / 'labels')])
    with pytest.raises(InputError, match='no .*_prob_inside.png in .*other_prob_maps; run test.py first'):
        study.main([str(results / 'out'), '--label-dir', str(results / 'labels'), '--set', 'other'])
    next(Path(results / 'labels').iterdir()).unlink()
    with pytest.raises(InputError, match='1 instance labels of images missing'):
        study.main([str(results / 'out'), '--label-dir', str(results / 'labels'), '--set', 'set'])
