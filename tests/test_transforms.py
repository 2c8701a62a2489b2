"""The transforms against the golden numbers; image, weight map and label must stay in register."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage import color
from skimage.morphology import disk

from my_transforms import (TRANSFORMS, LabelEncoding, RandomAffine, RandomCrop, RandomElastic, RandomFlip, RandomResize,
                           RandomRotation, RandomStain, Scale, get_transforms)
from support.command_line import TRANSFORM_PARSERS
from support.script import InputError

GOLDEN = Path(__file__).parent / 'golden'
RNG = np.random.default_rng(0)


def golden_images(golden):
    return [Image.fromarray(golden[name]) for name in ('image', 'weight', 'ternary')]


@pytest.mark.parametrize('name, params', [
    ('nuclei_val', dict(label_encoding=1, to_tensor=1)),
    ('gland_val', dict(scale=160, label_encoding=2, to_tensor=1)),
])
def test_validation_transforms_are_the_golden_ones(name, params):
    golden = np.load(GOLDEN / 'transforms.npz')
    image, weight, label = get_transforms({**params, 'normalize': golden['mean_std']})(golden_images(golden))
    assert np.abs(image.numpy() - golden[f'{name}/image']).max() < 1e-6
    assert image.dtype == torch.float32 and weight.dtype == label.dtype == torch.int64
    assert (weight.numpy() == golden[f'{name}/weight']).all() and (label.numpy() == golden[f'{name}/label']).all()


@pytest.mark.parametrize('name, transform, drawn, tolerance', [
    ('resize_0.83', RandomResize(0.8, 1.25), 0.83, 0),
    ('resize_1.21', RandomResize(0.8, 1.25), 1.21, 0),
    ('rotation_33.5', RandomRotation(90), 33.5, 0),
    ('affine', RandomAffine(0.3), 'affine/matrix', 0),
    ('elastic', RandomElastic(6, 15), 'elastic/parameters', 1),
])
def test_random_transforms_with_their_draw_fixed_are_the_golden_ones(name, transform, drawn, tolerance):
    golden = np.load(GOLDEN / 'transforms_pinned.npz')
    drawn = golden[drawn] if isinstance(drawn, str) else drawn
    for image, key in zip(transform.apply(golden_images(golden), drawn), ('image', 'weight', 'ternary')):
        difference = np.abs(np.asarray(image).astype(int) - golden[f'{name}/{key}'].astype(int))
        assert difference.max() <= tolerance, key


GEOMETRIC = {
    'scale': 80, 'random_resize': (0.8, 1.25), 'horizontal_flip': True, 'vertical_flip': True, 'random_affine': 0.3,
    'random_elastic': (6, 15), 'random_rotation': 90, 'random_crop': 64,
}


@pytest.mark.parametrize('name', GEOMETRIC)
@pytest.mark.parametrize('seed', range(6))
def test_image_weight_and_label_stay_in_register(name, seed):
    """The same picture in all three must come out the same in all three."""
    picture = ndimage.gaussian_filter(np.random.default_rng(99).normal(size=(100, 110)), 4)
    picture = ((picture - picture.min()) / np.ptp(picture) * 255).astype(np.uint8)
    images = [Image.fromarray(np.repeat(picture[..., None], 3, axis=2)), Image.fromarray(picture),
              Image.fromarray(np.repeat(picture[..., None], 3, axis=2))]
    image, weight, label = (np.asarray(i) for i in get_transforms({name: GEOMETRIC[name]})(
        images, np.random.default_rng(seed)))
    assert (image == weight[..., None]).all() and (label == weight[..., None]).all()
    if not (name.endswith('_flip') and (weight == picture).all()):
        assert weight.shape != picture.shape or (weight != picture).any()


def test_flips_mirror_half_of_the_time():
    image = [Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))]
    for direction, mirrored in (('horizontal', [[2, 1, 0], [5, 4, 3]]), ('vertical', [[3, 4, 5], [0, 1, 2]])):
        flips = [np.asarray(RandomFlip(direction)(image, RNG)[0]).tolist() for _ in range(200)]
        assert 60 < flips.count(mirrored) < 140 and flips.count([[0, 1, 2], [3, 4, 5]]) == 200 - flips.count(mirrored)
    assert get_transforms({'horizontal_flip': False, 'vertical_flip': False}).transforms == []


def test_scale_takes_the_shorter_side():
    for size, expected in (((100, 50), (80, 40)), ((50, 100), (40, 80)), ((775, 522), (308, 208)),
                           ((522, 775), (208, 308))):
        scaled = Scale(min(expected))([Image.new('RGB', size)], RNG)[0]
        assert scaled.size == expected


def elastic_by_simpleitk(image, parameters):
    """Every channel resampled on its own, as in the published code."""
    sitk = pytest.importorskip('SimpleITK')
    bands = []
    for band in image.split():
        channel = sitk.GetImageFromArray(np.asarray(band).astype(np.float32))
        spline = sitk.BSplineTransformInitializer(channel, [6, 6], 3)
        spline.SetParameters(parameters.tolist())
        warped = sitk.Resample(channel, channel, spline, sitk.sitkLinear, 0.0)
        bands.append(Image.fromarray(sitk.GetArrayFromImage(warped).astype(np.uint8)))
    return np.asarray(Image.merge(image.mode, bands)).astype(int)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('size', [(250, 250), (97, 64)])
def test_elastic_is_simpleitk_s_but_for_rounding(size, seed):
    rng = np.random.default_rng(seed)
    image, weight = (Image.fromarray(rng.integers(0, 256, (size[1], size[0], *c), dtype=np.uint8)) for c in ((3,), ()))
    white = Image.new('RGB', size, (255, 255, 255))
    elastic = RandomElastic(6, 15)
    parameters = elastic.draw(rng, size)
    results = elastic.apply([image, weight, white], parameters)
    differences = [np.abs(np.asarray(result) - elastic_by_simpleitk(original, parameters))
                   for result, original in zip(results, (image, weight, white))]
    assert [result.mode for result in results] == ['RGB', 'L', 'RGB']
    assert max(d.max() for d in differences) <= 1 and max((d > 0).mean() for d in differences) < 0.005
    assert differences[2].max() == 0                # a constant stays exactly what it was, and so does the border


@pytest.mark.parametrize('n, size', [(6, (250, 250)), (6, (64, 97)), (2, (3, 1)), (9, (40, 1000))])
def test_the_displacement_is_simpleitk_s(n, size):
    sitk = pytest.importorskip('SimpleITK')
    elastic = RandomElastic(n, 15)
    parameters = np.random.default_rng(n).normal(0, 15, 2 * (n + 3) ** 2)
    spline = sitk.BSplineTransformInitializer(sitk.Image(*size, sitk.sitkUInt8), [n, n], 3)
    spline.SetParameters(parameters.tolist())
    field = sitk.GetArrayFromImage(sitk.TransformToDisplacementField(spline, sitk.sitkVectorFloat64, size))
    displacement = elastic.displacement(parameters, *size).numpy()
    assert displacement.shape == (2, size[1], size[0])
    assert np.abs(displacement - np.moveaxis(field, 2, 0)).max() < 1e-9 < np.abs(field).max()


def test_elastic_moves_most_points_in_y_only():
    drawn = RandomElastic(6, 15).draw(np.random.default_rng(0), (250, 250))
    assert len(drawn) == 2 * 81 and (drawn[:54] == 0).all() and (drawn[54:] != 0).all()
    assert 13 < drawn[54:].std() < 17


def test_affine_and_rotation_draw_within_their_bounds():
    drawn = np.array([RandomAffine(0.3).draw(RNG, None) for _ in range(500)]) - np.eye(2)
    assert np.abs(drawn).max() <= 0.3 and (drawn.max(axis=0) > 0.28).all() and (drawn.min(axis=0) < -0.28).all()
    assert (drawn[:, 0] != drawn[:, 1, ::-1]).all()                                  # four numbers, not two
    angles = [RandomRotation(90).draw(RNG, None) for _ in range(500)]
    assert min(angles) < -80 and max(angles) > 80 and np.abs(angles).max() <= 90
    assert RandomResize.resize(Image.new('L', (5, 9)), 0.01).size == (5, 9)           # a pixel is left of it, padded
    factors = [RandomResize(0.8, 1.25).draw(RNG, None) for _ in range(500)]
    assert 0.8 <= min(factors) < 0.82 and 1.23 < max(factors) <= 1.25


@pytest.mark.parametrize('factors, offsets, brightness', [
    ((0.6, 1), (0, 0), 1), ((1, 1.4), (0, 0), 1), ((1, 1), (0.05, -0.03), 1), ((1, 1), (0, 0), 0.8),
    ((0.7, 1.3), (0.02, 0.04), 1.1)])
def test_stains_are_those_of_scikit_image(factors, offsets, brightness):
    """Its densities are to the base 10^-6, ours to the base 10^-1."""
    stains = np.random.default_rng(0).uniform(0.01, 0.06, (40, 50, 3))
    image = (color.combine_stains(stains, color.rgb_from_hed) * 255).round().astype(np.uint8)
    image[:2] = 255                                                              # stays white where it gets brighter
    expected = color.separate_stains(image, color.hed_from_rgb)
    expected[..., :2] = expected[..., :2] * factors + np.array(offsets) / 6
    expected = 255 * np.clip(color.combine_stains(expected, color.rgb_from_hed) * brightness, 0, 1)
    changed, weight = RandomStain(0, 0, 0).apply([Image.fromarray(image), 'weight'], (factors, offsets, brightness))
    assert np.abs(np.asarray(changed) - expected).max() < 0.51 and weight == 'weight'


def test_stains_are_drawn_within_their_bounds_and_none_changes_nothing():
    transform = RandomStain(0.4, 0.05, 0.15)
    factors, offsets, brightness = map(np.array, zip(*(transform.draw(RNG, None) for _ in range(1000))))
    for drawn, centre, bound in ((factors, 1, 0.4), (offsets, 0, 0.05), (brightness, 1, 0.15)):
        assert bound * 0.95 < (drawn - centre).max() <= bound and bound * 0.95 < (centre - drawn).max() <= bound
    assert (factors[:, 0] != factors[:, 1]).all() and (offsets[:, 0] != offsets[:, 1]).all()
    built = get_transforms({'random_stain': (0.4, 0.05, 0.15)}).transforms[0]
    assert vars(built) == vars(transform) == {'strength': 0.4, 'offset': 0.05, 'brightness': 0.15}
    image = Image.fromarray(RNG.integers(1, 256, (30, 30, 3), dtype=np.uint8))            # 0 has no logarithm
    assert (np.asarray(RandomStain(0, 0, 0)([image], RNG)[0]) == np.asarray(image)).all()
    assert (np.asarray(transform([image], RNG)[0]) != np.asarray(image)).any()


def test_random_crop_takes_a_window_and_refuses_a_small_image():
    pixels = np.arange(80, dtype=np.uint8).reshape(8, 10)
    corners = {int(np.asarray(RandomCrop(7)([Image.fromarray(pixels)], RNG)[0])[0, 0]) for _ in range(200)}
    assert corners == {0, 1, 2, 3, 10, 11, 12, 13}                       # to the last row and column
    with pytest.raises(InputError, match=r'random_crop \(input_size\) is 9, but an image is 10 x 8 pixels'):
        RandomCrop(9)([Image.fromarray(pixels)], RNG)


@pytest.mark.parametrize('radius', [1, 2])
def test_label_encoding_finds_the_contour_anew(radius):
    red = ndimage.gaussian_filter(np.random.default_rng(3).random((60, 70)), 3)
    ternary = np.zeros((60, 70, 3), np.uint8)
    ternary[..., 0] = np.where(red > np.median(red), 255, 100)
    label = np.asarray(LabelEncoding(radius)([Image.fromarray(ternary)], RNG)[-1])
    inside = ternary[..., 0] > 127.5
    padded = np.pad(inside, radius, mode='constant', constant_values=True)
    for y in range(60):
        for x in range(70):
            near = inside[max(y - 1, 0):y + 2, x].any() or inside[y, max(x - 1, 0):x + 2].any()
            window = padded[y:y + 2 * radius + 1, x:x + 2 * radius + 1]
            eroded = window[disk(radius) > 0].all()
            assert label[y, x] == (2 if near and not eroded else int(inside[y, x]))


def test_the_same_generator_gives_the_same_sample_and_torch_seeds_the_default():
    images = golden_images(np.load(GOLDEN / 'transforms.npz'))
    transform = get_transforms(dict(random_resize=(0.8, 1.25), random_affine=0.3, random_elastic=(6, 15),
                                    random_rotation=90, random_crop=100, to_tensor=1))
    first, again, other = (transform(images, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])
    torch.manual_seed(1)
    first = transform(images)
    torch.manual_seed(1)
    assert torch.equal(transform(images)[0], first[0])


def test_order_is_that_of_the_dict_and_unknown_names_are_refused():
    names = [type(t).__name__ for t in get_transforms({'random_crop': 5, 'scale': 9, 'to_tensor': 1}).transforms]
    assert names == ['RandomCrop', 'Scale', 'ToTensor']
    assert set(TRANSFORMS) == set(TRANSFORM_PARSERS)                 # of the command line
    with pytest.raises(InputError, match="unknown transform 'blur'; expected one of scale, .*random_resize"):
        get_transforms({'blur': 3})
