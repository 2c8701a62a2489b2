"""Weight maps: against golden numbers, a slow obvious version, and the authors' own map of a real image."""
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage

import weight_map as weight_map_module
from support.files import save_image
from support.images import read_instance_label
from support.script import InputError
from weight_map import decode_weight_map, encode_weight_map, main, object_boundaries, weight_map

GOLDEN = Path(__file__).parent / 'golden'
REAL = Path(__file__).resolve().parents[2] / 'shared' / 'data'
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason='the real images are not on this machine')


# ---------------------------------------------------------------------------------------------------
# The slow, obvious version: one object at a time over the whole image
# ---------------------------------------------------------------------------------------------------

def slow_boundary(instance_label, object_id):
    """Pixels of the first 8-connected piece (column-major) that have a 4-neighbour outside the filled piece."""
    pieces, _ = ndimage.label(instance_label == object_id, np.ones((3, 3)))
    by_column = pieces.ravel(order='F')
    piece = pieces == by_column[by_column > 0][0]
    filled = np.pad(ndimage.binary_fill_holes(piece), 1)
    near_outside = ~(filled[:-2, 1:-1] & filled[2:, 1:-1] & filled[1:-1, :-2] & filled[1:-1, 2:])
    return piece & near_outside


def slow_weight_map(instance_label, w0, sigma):
    ids = np.unique(instance_label[instance_label > 0])
    if len(ids) < 2:
        return np.zeros(instance_label.shape)
    distances = [ndimage.distance_transform_edt(~slow_boundary(instance_label, i)) for i in ids]
    d1, d2 = np.sort(distances, axis=0)[:2]
    return w0 * np.exp(-(d1 + d2) ** 2 / (2 * sigma ** 2))


def random_label(seed, height=90, width=110, objects=25):
    """Touching blobs, some of them at the border, holes, lone pixels, ids with gaps and ids in several pieces."""
    rng = np.random.default_rng(seed)
    ids = rng.choice([1, 2, 300, 70000, 2 ** 31 - 1, *range(1000, 1000 + objects)], objects)
    y, x = np.ogrid[:height, :width]
    label = np.zeros((height, width), np.int64)
    for object_id in ids:
        centre_y, centre_x = rng.integers(height), rng.integers(width)
        radius_y, radius_x = rng.integers(1, 14, 2)
        label[((y - centre_y) / radius_y) ** 2 + ((x - centre_x) / radius_x) ** 2 <= 1] = object_id
    label[rng.random(label.shape) < 0.01] = 0
    label[rng.random(label.shape) < 0.001] = ids[0]
    return label


def assert_same_weights(fast, slow):
    """Equal in 8 bits; equal as numbers where they are not negligible, and never too large."""
    assert np.array_equal(encode_weight_map(fast), encode_weight_map(slow))
    assert np.allclose(fast, slow, rtol=1e-9, atol=weight_map_module.NEGLIGIBLE)
    assert (fast <= slow + 1e-9).all() and (fast >= 0).all()


# ---------------------------------------------------------------------------------------------------
# weight_map
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('sigma', [5, 20])
def test_golden(sigma):
    golden = np.load(GOLDEN / 'prepare.npz', allow_pickle=False)
    assert np.abs(weight_map(golden['instance'], 10, sigma) - golden[f'weight_s{sigma}']).max() <= 1e-3


@pytest.mark.parametrize('seed', range(12))
@pytest.mark.parametrize('sigma', [2.0, 5.0, 20.0])
def test_equals_the_slow_version(seed, sigma):
    label = random_label(seed)
    assert_same_weights(weight_map(label, 10.0, sigma), slow_weight_map(label, 10.0, sigma))


def test_equals_the_slow_version_for_distant_objects():
    """Far objects may share a number inside weight_map; that must not show."""
    rng = np.random.default_rng(0)
    label = np.zeros((150, 200), int)
    for object_id, (y, x) in enumerate(zip(rng.integers(0, 145, 60), rng.integers(0, 195, 60)), 1):
        label[y:y + 4, x:x + 4] = object_id
    for sigma in (0.5, 1.0, 3.0):
        assert_same_weights(weight_map(label, 10.0, sigma), slow_weight_map(label, 10.0, sigma))


@settings(max_examples=150)
@given(arrays(np.int64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 4)))
def test_equals_the_slow_version_on_any_small_label(label):
    assert_same_weights(weight_map(label, 10.0, 3.0), slow_weight_map(label, 10.0, 3.0))


def test_closed_form_between_two_points():
    label = np.zeros((1, 9), int)
    label[0, 1], label[0, 7] = 5, 9
    w = weight_map(label, w0=10.0, sigma=5.0)
    d1_plus_d2 = np.array([8, 6, 6, 6, 6, 6, 6, 6, 8])
    assert np.allclose(w[0], 10 * np.exp(-d1_plus_d2 ** 2 / 50))


@pytest.mark.parametrize('label', [np.zeros((5, 6), np.uint8), np.full((5, 6), 7), np.eye(5, dtype=np.uint16)])
def test_fewer_than_two_objects_have_no_weight(label):
    assert np.array_equal(weight_map(label), np.zeros(label.shape))


@pytest.mark.parametrize('w0, sigma', [(10, 0), (10, -1), (10, np.nan), (-1, 5), (np.inf, 5)])
def test_refuses_parameters_without_meaning(w0, sigma):
    with pytest.raises(InputError, match='the weight map needs w0 >= 0 and sigma > 0; found w0 ='):
        weight_map(np.eye(3, dtype=int), w0, sigma)


# ---------------------------------------------------------------------------------------------------
# object_boundaries
# ---------------------------------------------------------------------------------------------------

def picture(text):
    return np.array([[int(c) for c in row] for row in text.split()])


@pytest.mark.parametrize('label, expected, expected_boxes', [
    # holes have no boundary
    ('000000000 011111110 011111110 011000110 011020110 011000110 011111110 011111110 000000000',
     '000000000 011111110 010000010 010000010 010020010 010000010 010000010 011111110 000000000',
     [[1, 7, 1, 7], [4, 4, 4, 4]]),
    # the image border is a boundary
    ('11111 11111 11111 11111', '11111 10001 10001 11111', [[0, 3, 0, 4]]),
    # only the first piece in column-major order counts
    ('0000 0011 0000 1100', '0000 0000 0000 1100', [[3, 3, 0, 1]]),
    # diagonal neighbours are one piece
    ('1000 0100 0010 0001', '1000 0100 0010 0001', [[0, 3, 0, 3]]),
])
def test_object_boundaries(label, expected, expected_boxes):
    boundary, boxes = object_boundaries(picture(label))
    assert np.array_equal(boundary, picture(expected)) and boxes.tolist() == expected_boxes


# ---------------------------------------------------------------------------------------------------
# The 8-bit form and the script
# ---------------------------------------------------------------------------------------------------

def test_encoding_rounds_halves_up_and_saturates_with_a_note():
    w = np.array([0.0, 1.125, 1.1, 10.0, 11.75, 30.0])         # 20, 42.5, 42, 220, 255, 620
    with pytest.warns(UserWarning, match='w0 is too large for 8 bits: weights w above 11.75 are stored as 11.75'):
        encoded = encode_weight_map(w)
    assert encoded.dtype == np.uint8 and encoded.tolist() == [20, 43, 42, 220, 255, 255]


def test_a_decoded_map_is_the_weight_plus_1():
    w = np.linspace(0, 10, 1001)
    assert np.abs(decode_weight_map(encode_weight_map(w)) - (w + 1)).max() <= 0.025 + 1e-9


def test_script_writes_one_map_per_label(tmp_path):
    nuclei, glands = random_label(1) % 200, random_label(2) % 100
    save_image(tmp_path / 'labels' / 'Liver.1_label.png', nuclei.astype(np.uint16))
    save_image(tmp_path / 'labels' / 'train_8_anno.bmp', glands.astype(np.uint8))
    main(['--label-dir', str(tmp_path / 'labels'), '--save-dir', str(tmp_path / 'maps'), '--sigma', '3', '--w0', '8'])
    assert sorted(p.name for p in (tmp_path / 'maps').iterdir()) == ['Liver.1_weight.png', 'train_8_anno_weight.png']
    for name, label in (('Liver.1', nuclei), ('train_8_anno', glands)):
        stored = np.array(Image.open(tmp_path / 'maps' / f'{name}_weight.png'))
        assert stored.dtype == np.uint8 and np.array_equal(stored, encode_weight_map(weight_map(label, 8, 3)))


def test_script_takes_masks_when_told(tmp_path):
    mask = np.zeros((20, 20), np.uint8)
    mask[2:8, 2:8] = mask[12:18, 2:8] = 255
    save_image(tmp_path / 'labels' / 'a.png', mask)
    arguments = ['--label-dir', str(tmp_path / 'labels'), '--save-dir', str(tmp_path / 'maps')]
    with pytest.raises(InputError, match='give --binary-labels'):
        main(arguments)
    main([*arguments, '--binary-labels'])
    stored = np.array(Image.open(tmp_path / 'maps' / 'a_weight.png'))
    assert np.array_equal(stored, encode_weight_map(weight_map(ndimage.label(mask)[0])))


# ---------------------------------------------------------------------------------------------------
# The authors' own weight map
# ---------------------------------------------------------------------------------------------------

@needs_real_data
def test_authors_weight_map():
    """Equal, but round a few overlapping nuclei that the published instance label assigns differently."""
    from prepare_data import ternary_label
    label = read_instance_label(REAL / 'MultiOrgan/labels_instance/Breast_TCGA-A7-A13F-01Z-00-DX1_label.png')
    window = np.s_[500:750, 500:750]
    published = np.array(Image.open(REAL / 'reference/Breast_weight.png'))
    published_ternary = np.array(Image.open(REAL / 'reference/Breast_label.png').convert('RGB'))
    ternary_differs = (ternary_label(label)[window] != published_ternary).any(axis=-1)
    differs = encode_weight_map(weight_map(label, 10.0, 5.0))[window] != published
    assert ternary_differs.sum() == 292
    assert differs.sum() <= 2750
    near = ndimage.distance_transform_edt(~ternary_differs) <= 16
    assert near[differs].mean() >= 0.99
