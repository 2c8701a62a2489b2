"""Post-processing beyond the published one, and the study of what it gains."""
import json
from pathlib import Path

import numpy as np
import pytest
import study_post_processing as study
from scipy import ndimage
from skimage.segmentation import watershed

import test as test_script
from miniature import nuclei, pixels
from options import Options
from support.files import save_image, save_instances
from support.script import InputError
from utils import (dilate, gland_accuracy_object_level, inside_mask, nuclei_accuracy_object_level, post_process,
                   split_objects, standard_metrics)

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


@pytest.mark.parametrize('changed', [dict(inside_threshold=0.6), dict(h_maxima=0.02)])
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


def slow_split(label, inside, h):
    """Object by object in the whole image, by the definition: a region that begins h under a maximum is the seed of
    this maximum, unless it holds a higher one."""
    result = label.copy()
    for i in range(1, label.max() + 1):
        levels, seeds = np.where(label == i, inside.astype(int), 0), np.zeros_like(label)
        for height in np.unique(levels):
            low = height - round(255 * h)
            if low > 0:
                regions, n = ndimage.label(levels >= low, EIGHT)
                for k in range(1, n + 1):
                    if levels[regions == k].max() == height:
                        seeds[regions == k] = seeds.max() + 1
        if seeds.max() > 1:
            result[label == i] = 1000 * i + watershed(-levels, seeds, connectivity=2, mask=label == i)[label == i]
    return result


def same_objects(a, b):
    """Whether two labels differ in nothing but the ids."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1] and np.array_equal(a > 0, b > 0)


@pytest.mark.parametrize('seed, h', [(0, 0.02), (1, 0.05), (2, 0.1), (3, 0.2), (4, 0.6)])
def test_objects_are_split_at_the_h_maxima_of_each(seed, h):
    inside = np.round(maps(seed, 60, 70)[..., 1] * 255).astype(np.uint8)
    label = ndimage.label(inside > 50, EIGHT)[0].astype(np.int32)
    split = split_objects(label, inside, h)
    assert split.dtype == np.int32 and same_objects(split, slow_split(label, inside, h))
    assert np.array_equal(np.unique(split), np.arange(split.max() + 1))
    assert split.max() > label.max() or h == 0.6


def test_two_nuclei_with_a_bridge_are_split_where_the_probability_is_lowest():
    y, x = np.mgrid[:21, :41]
    inside = (255 * np.clip(1.2 - np.minimum(np.hypot(y - 10, x - 11), np.hypot(y - 10, x - 29)) / 15, 0, 1))
    inside = inside.astype(np.uint8)
    mask = inside > 100
    assert post_process(mask, 20, 0).max() == 1
    label = post_process(mask, 20, 0, h_maxima=0.1, inside_map=inside)
    assert label.max() == 2 and np.array_equal(label > 0, mask)
    assert (label[:, :20][mask[:, :20]] == 1).all() and (label[:, 21:][mask[:, 21:]] == 2).all()
    dilated = post_process(mask, 20, 2, h_maxima=0.1, inside_map=inside)
    assert np.array_equal(dilated, np.where(mask, label, dilate(label.copy(), 2)))    # the border between them stays
    assert (dilated > 0).sum() > mask.sum() and (label != dilate(label.copy(), 2))[mask].any()
    scaled = post_process(mask, 20, 0, (42, 82), h_maxima=0.1, inside_map=inside)               # a scaled image
    assert scaled.max() == 2 and (scaled[:, :40][scaled[:, :40] > 0] == 1).all()
    for depth, count in ((50, 2), (100, 3)):          # of a dark line, which is smoothed to 40 % before anything else
        lined = inside.copy()
        lined[:, 11] -= np.minimum(lined[:, 11], depth).astype(np.uint8)
        for size in (None, (210, 410)):
            assert post_process(mask, 20, 0, size, h_maxima=0.1, inside_map=lined).max() == count


def test_maxima_of_one_height_are_one_unless_the_valley_is_deep():
    y, x = np.mgrid[:31, :41]
    for valley, count in ((150, 1), (90, 2)):
        inside = np.where(np.hypot(y - 15, x - 20) < 15, valley, 0)
        for column in (13, 27):
            inside[12:19, column - 3:column + 4] = 200
        assert split_objects((inside > 0).astype(np.int32), inside.astype(np.uint8), 0.3).max() == count        # 76


def test_nothing_to_split():
    empty, one, pixel = np.zeros((5, 6), np.int32), np.ones((5, 6), np.int32), np.zeros((5, 6), np.int32)
    pixel[2, 2] = 1
    for label in (empty, one, pixel):
        for level in (0, 20, 255):
            assert np.array_equal(split_objects(label, np.full((5, 6), level, np.uint8), 0.2), label)


# ---------------------------------------------------------------------------------------------------
# The study
# ---------------------------------------------------------------------------------------------------

PUBLISHED = dict.fromkeys(study.NUCLEI, 0) | {'min_area': 5, 'radius': 2}


@pytest.mark.parametrize('changed', [{}, {'min_area': 0}, {'inside_threshold': 0.6}, {'h_maxima': 0.05},
                                     {'inside_threshold': 0.3, 'h_maxima': 0.02, 'radius': 1}])
def test_stored_maps_give_what_the_probabilities_give(changed):
    steps = np.round(maps(1, sigma=1.5) * 255)
    steps[..., 0] = 255 - steps[..., 1] - steps[..., 2]
    probabilities = (steps / 255).astype(np.float32)                  # exact in 8 bits
    options = post(min_area=5) | changed
    label, inside, contour = test_script.segment_bands([probabilities], (60, 70), options)
    assert np.array_equal(study.segment_maps(inside, contour, PUBLISHED | changed), label)


def test_a_ring_too_small_alone_is_kept_when_its_hole_is_filled():
    inside = np.zeros((8, 8), np.uint8)
    inside[1:6, 1:6] = 255
    inside[2:5, 2:5] = 0                                                # 16 pixels round a hole of 9
    for fill_holes, area in ((0, 0), (8, 0), (9, 25)):
        choice = PUBLISHED | {'min_area': 20, 'radius': 0, 'fill_holes': fill_holes}
        assert (study.segment_maps(inside, 0 * inside, choice) > 0).sum() == area


@pytest.fixture
def results(tmp_path):
    """Probability maps of two images as test.py writes them, and their labels: objects a pixel thinner, with holes."""
    for i in range(2):
        _, truth = nuclei(i, 80, 90)
        save_instances(tmp_path / 'labels' / f'im.{i}_label.png', truth)
        core = ndimage.binary_erosion(truth > 0)
        inside = core * 220
        depth = ndimage.distance_transform_edt(core)
        for y, x in ndimage.maximum_position(depth, truth, np.unique(truth[depth > 2.5])):
            inside[y - 1:y + 2, x - 1:x + 2] = 0
        contour = ((truth > 0) & ~core) * 200
        for kind, array in (('inside', inside), ('contour', contour)):
            save_image(tmp_path / f'out/set_prob_maps/im.{i}_prob_{kind}.png', array.astype(np.uint8))
    write_options(tmp_path)
    return tmp_path


def write_options(folder, dataset='MultiOrgan', scale_factor=1, binary_labels=False, mpp=''):
    options = {'dataset': dataset, 'test': {'scale_factor': scale_factor, 'mpp': mpp, 'binary_labels': binary_labels}}
    (folder / 'out/test_options.json').write_text(json.dumps(options))


def test_the_study_reports_every_variant_and_a_best_one(results, monkeypatch, capsys):
    monkeypatch.setitem(study.CHOICES, 'MultiOrgan', {**{name: (0,) for name in study.NUCLEI}, 'min_area': (20, 40),
                                                      'radius': (0, 1, 2), 'fill_holes': (0, 20)})
    study.main([str(results / 'out'), '--label-dir', str(results / 'labels'), '--set', 'set'])
    text = (results / 'out/set_post_processing.txt').read_text()
    assert text in capsys.readouterr().out
    rows = {line[:40].strip(): [float(value) for value in line[40:].split()] for line in text.splitlines()[2:]}
    assert list(rows) == ['published: min_area 20 radius 2', 'min_area 40', 'radius 0', 'radius 1', 'fill_holes 20',
                          'greedy search: radius 1 fill_holes 20', 'greedy search on the other images']
    published, *_, best, others = rows.values()          # mean AJI, gain, aji, pq, dice, then the AJI of each image
    assert best[0] >= max(row[0] for row in rows.values()) and best[0] > rows['radius 0'][0] + 0.05
    for row in rows.values():
        assert row[0] == pytest.approx(np.mean(row[-2:]), abs=1e-4)
        assert row[1] == pytest.approx(row[0] - published[0], abs=2e-4)

    images = study.read_maps(results / 'out', 'set', results / 'labels', 'MultiOrgan')
    for i, name in enumerate(images):                    # each with what a search without it finds
        others_only = study.Study({other: images[other] for other in images if other != name}, 'MultiOrgan')
        found = others_only.greedy(PUBLISHED | {'min_area': 20})
        score = study.Study({name: images[name]}, 'MultiOrgan')(found)[0, 0]
        assert others[-2 + i] == pytest.approx(score, abs=1e-4)
    truth = images['im.0'][2]
    label = ndimage.label(ndimage.binary_dilation(truth > 0, iterations=2))[0]                # some are merged
    expected = standard_metrics(label, truth)
    assert expected['aji'] != nuclei_accuracy_object_level(label, truth).AJI
    assert study.score(label, truth, 'MultiOrgan') == [nuclei_accuracy_object_level(label, truth).AJI, expected['aji'],
                                                       expected['pq'], expected['dice']]


def test_the_search_does_not_see_the_image_that_is_left_out(monkeypatch):
    monkeypatch.setitem(study.CHOICES, 'MultiOrgan', {'radius': (0, 1)})
    scores = study.Study({'a': None, 'b': None}, 'MultiOrgan')
    scores.known = {(0,): np.array([[0.1, 0.9], [0.5, 0.9]]), (1,): np.array([[0.5, 0.0], [0.4, 0.0]])}
    found = [scores.greedy({'radius': 0}, left_out)['radius'] for left_out in (None, 0, 1)]
    assert found == [1, 0, 1]                            # radius 1 makes image a better, and b a little worse


def test_the_study_of_glands_scores_them_at_the_size_of_their_images(results, monkeypatch, capsys):
    write_options(results, 'GlaS')
    monkeypatch.setitem(study.CHOICES, 'GlaS', {**{name: (0,) for name in study.NUCLEI}, 'min_area': (5, 100)})
    truths = {}
    for path in (results / 'labels').iterdir():
        truths[path.stem.removesuffix('_label')] = truth = pixels(path).repeat(2, 0).repeat(2, 1)
        save_instances(path, truth)
    study.main([str(results / 'out'), '--label-dir', str(results / 'labels'), '--set', 'set'])
    rows = {line[:36].strip(): line[36:].split() for line in capsys.readouterr().out.splitlines()[2:]}
    expected = []
    for name, truth in truths.items():
        inside = pixels(results / f'out/set_prob_maps/{name}_prob_inside.png')
        glands = gland_accuracy_object_level(post_process(inside > 127, 5, 4, truth.shape), truth)
        expected.append([glands.dice, glands.F1, glands.hausdorff])
    found = [float(rows['min_area 5'][i]) for i in (0, 2, 3)]
    assert found == pytest.approx(np.mean(expected, axis=0), abs=1e-4) and found[0] > 0.3


def test_the_study_takes_masks_if_the_test_did(results, monkeypatch, capsys):
    monkeypatch.setitem(study.CHOICES, 'MultiOrgan', dict.fromkeys(study.NUCLEI, (0,)))
    for path in (results / 'labels').iterdir():
        save_image(path, ((pixels(path) > 0) * 255).astype(np.uint8))
    words = [str(results / 'out'), '--label-dir', str(results / 'labels'), '--set', 'set']
    with pytest.raises(InputError, match='holds only 0 and 255'):
        study.main(words)
    write_options(results, binary_labels=True)
    study.main(words)
    assert '2 images' in capsys.readouterr().out


def test_what_the_study_cannot_use(results):
    path = next((results / 'out/set_prob_maps').iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match='_prob_.*.png is damaged or truncated'):
        study.main([str(results / 'out'), '--label-dir', str(results / 'labels'), '--set', 'set'])
    path.write_bytes(whole)
    with pytest.raises(InputError, match='no .*_prob_inside.png in .*other_prob_maps; run test.py first'):
        study.main([str(results / 'out'), '--label-dir', str(results / 'labels'), '--set', 'other'])
    label = next(Path(results / 'labels').iterdir())
    save_instances(label, np.ones((160, 180), int))
    with pytest.raises(InputError, match=r'shape \(160, 180\), and the probability maps of im.* shape \(80, 90\)'):
        study.main([str(results / 'out'), '--label-dir', str(results / 'labels'), '--set', 'set'])
    label.unlink()
    with pytest.raises(InputError, match='1 instance labels of images missing'):
        study.main([str(results / 'out'), '--label-dir', str(results / 'labels'), '--set', 'set'])
    for scaled in (dict(scale_factor=2), dict(mpp=0.5)):
        write_options(results, **scaled)
        with pytest.raises(InputError, match='out was made with --scale-factor or --mpp; run test.py without them'):
            study.main([str(results / 'out'), '--label-dir', str(results / 'labels'), '--set', 'set'])
    (results / 'out/test_options.json').write_text('{')
    with pytest.raises(InputError, match='test_options.json is missing or damaged .*; expected the save_dir'):
        study.main([str(results / 'out'), '--label-dir', str(results / 'labels'), '--set', 'set'])
