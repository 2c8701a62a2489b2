"""Preparation: each step against golden numbers or a slow obvious version; the whole on miniature data sets."""
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage
from scipy.io import savemat
from test_weight_map import GOLDEN, REAL, needs_real_data, random_label

import prepare_data
import train
from miniature import pixels
from options import Options
from prepare_data import (Reinhard_normalizer, color_norm, colour_histogram, compute_mean_std, create_instance_labels,
                          create_ternary_labels, instance_label_from_xml, main, mean_std_of, patch_positions,
                          save_instance_label, split_patches, ternary_label)
from support.data_sets import MULTI_ORGAN_SPLIT, count_grades, count_objects, draw_split, find_fullnet_files, find_glas
from support.files import new_folder, save_image, save_instances
from support.images import read_image, read_instance_label
from support.script import InputError
from weight_map import create_weight_maps, encode_weight_map, weight_map

CROSS = ndimage.generate_binary_structure(2, 1)
pytestmark = pytest.mark.filterwarnings('ignore:.*images of the published split are not there')


@pytest.fixture
def golden():
    return np.load(GOLDEN / 'prepare.npz', allow_pickle=False)


@functools.cache
def random_image(seed, height, width):
    """Smooth colours, so that the channels are correlated as in a stained tissue."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.random((height, width, 3)), (4, 4, 0.5))
    return (255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)


def contents(folder):
    """{relative path: bytes} of all files below a folder but the report, which holds the time."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*'))
            if path.is_file() and path.name != 'prepare_report.json'}


def layout(folder):
    """The files that training and testing read, without what preparation shows."""
    return sorted(name for name in contents(folder) if not name.startswith('contact_sheet_'))


# ---------------------------------------------------------------------------------------------------
# Ternary labels
# ---------------------------------------------------------------------------------------------------

def slow_ternary_label(instance_label, radius=1):
    """Erosion and dilation of the whole image by the cross, `radius` times, for each object."""
    inside = np.zeros(instance_label.shape, bool)
    contour = np.zeros(instance_label.shape, bool)
    for object_id in np.unique(instance_label[instance_label > 0]):
        mask = instance_label == object_id
        eroded = ndimage.binary_erosion(mask, CROSS, radius, border_value=1)
        inside |= eroded
        contour |= ndimage.binary_dilation(mask, CROSS, radius) & ~eroded
    assert not (inside & contour).any()
    return np.stack([inside, contour, ~(inside | contour)], axis=-1) * np.uint8(255)


def test_ternary_label_golden(golden):
    assert np.array_equal(ternary_label(golden['instance']), golden['ternary'])


@pytest.mark.parametrize('radius', [1, 2, 5])
@pytest.mark.parametrize('seed', range(8))
def test_ternary_label_equals_the_slow_version(seed, radius):
    label = random_label(seed)                                         # objects touch, and lie at the border
    ternary = ternary_label(label, radius)
    assert ternary.dtype == np.uint8 and np.array_equal(ternary, slow_ternary_label(label, radius))


@settings(max_examples=150)
@given(arrays(np.uint16, st.tuples(st.integers(1, 8), st.integers(1, 8)), elements=st.sampled_from([0, 1, 2, 65535])),
       st.integers(1, 3))
def test_ternary_label_equals_the_slow_version_on_any_small_label(label, radius):
    ternary = ternary_label(label, radius)
    assert np.array_equal(ternary, slow_ternary_label(label, radius))
    assert (ternary.astype(int).sum(axis=-1) == 255).all()


# ---------------------------------------------------------------------------------------------------
# Annotation XML
# ---------------------------------------------------------------------------------------------------

def region_xml(vertices, kind='0', negative='0', tag='Vertex'):
    """A region of ImageScope's XML, or HALO's. vertices: list of (X, Y)."""
    inner = ''.join(f'<{tag} X="{x}" Y="{y}" Z="0"/>' for x, y in vertices)
    return f'<Region Id="99" Type="{kind}" NegativeROA="{negative}"><Attributes/><Vertices>{inner}</Vertices></Region>'


def annotation_xml(*polygons, **layers):
    """ImageScope's XML of one layer of polygons, each a list of (X, Y), or of layers, each a list of `region_xml`."""
    layers = layers or {'nuclei': map(region_xml, polygons)}
    inner = ''.join(f'<Annotation Id="1" Name="{name}"><Regions><RegionAttributeHeaders/>{"".join(regions)}</Regions>'
                    f'</Annotation>' for name, regions in layers.items())
    return f'<Annotations MicronsPerPixel="0.25">{inner}</Annotations>'


def rectangle(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


@pytest.fixture
def label_of(tmp_path):
    """The label that `instance_label_from_xml` draws from a text, 20 x 30 pixels."""
    def draw(text, encoding='utf-8', layers=()):
        (tmp_path / 'a.xml').write_bytes(text.encode(encoding))
        return instance_label_from_xml(tmp_path / 'a.xml', 20, 30, layers)
    return draw


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16'])
def test_xml_coordinates_are_one_based_pixel_centres_and_may_lie_outside(label_of, encoding):
    text = annotation_xml(rectangle(8.5, 5.5, 12.5, 6.5), rectangle(-50, -50, 5.5, 3.5),
                          rectangle(20.5, 10.5, 1e300, 1e300))
    expected = np.zeros((20, 30), int)
    expected[5:6, 8:12] = 1                        # X 9 ... 12 and Y 6, counted from 1
    expected[:3, :5], expected[10:, 20:] = 2, 3
    assert np.array_equal(label_of(f'<?xml version="1.0" encoding="{encoding}"?>{text}', encoding), expected)


def test_xml_first_region_wins_and_ids_are_positions_and_regions_without_a_pixel_are_counted(label_of):
    first, line, third = rectangle(1.5, 1.5, 10.5, 10.5), [(3, 3), (9, 9)], rectangle(5.5, 5.5, 15.5, 15.5)
    outside, hidden = rectangle(100, 100, 200, 200), rectangle(2.5, 2.5, 4.5, 4.5)
    with pytest.warns(UserWarning, match='a.xml: 3 of 5 regions have no pixel of their own: they have too few'):
        label = label_of(annotation_xml(first, line, third, outside, hidden))
    assert np.unique(label).tolist() == [0, 1, 3]
    assert (label == 1).sum() == 81 and (label == 3).sum() == 100 - 25
    assert label[6, 6] == 1
    with pytest.raises(InputError, match='a.xml: none of its 2 regions has a pixel in the image of 30 x 20; .*other'):
        label_of(annotation_xml(outside, line))


def test_xml_negative_regions_are_holes_wherever_they_stand(label_of):
    outline, hole = region_xml(rectangle(1.5, 1.5, 15.5, 15.5)), region_xml(rectangle(4.5, 4.5, 9.5, 9.5), negative='1')
    inside = region_xml(rectangle(5.5, 5.5, 7.5, 7.5))                         # an object in the hole stays
    second = region_xml(rectangle(11.5, 11.5, 13.5, 13.5), negative='1')
    expected = np.zeros((20, 30), bool)
    expected[1:15, 1:15] = True
    expected[4:9, 4:9] = expected[11:13, 11:13] = False
    for order, number in (([outline, hole, inside, second], 1), ([hole, outline, inside, second], 2)):
        label = label_of(annotation_xml(nuclei=order))
        assert np.array_equal(label == number, expected) and (label == 3).sum() == 4
        assert np.unique(label).tolist() == [0, number, 3]
    with pytest.raises(InputError, match='a.xml holds no region but negative ones'):
        label_of(annotation_xml(nuclei=[hole]))


@pytest.mark.parametrize('kind', ['2', 'Ellipse'])
def test_xml_ellipses_are_drawn_as_ellipses(label_of, kind):
    for vertices in ([(3, 2), (23, 14)], rectangle(3, 2, 23, 14)):             # corners, or all four of them
        label = label_of(annotation_xml(nuclei=[region_xml(vertices, kind)]))
        y, x = np.mgrid[1:21, 1:31]
        assert np.array_equal(label == 1, ((y - 8) / 6) ** 2 + ((x - 13) / 10) ** 2 < 1)
    around = label_of(annotation_xml(nuclei=[region_xml([(-400, -400), (430, 420)], kind)]))        # the whole image
    assert (around == 1).all()


def test_xml_of_halo_has_v_elements_and_rectangles_of_two_corners(label_of):
    label = label_of(annotation_xml(nuclei=[region_xml(rectangle(1.5, 1.5, 4.5, 4.5), 'Polygon', tag='V'),
                                            region_xml([(6.5, 6.5), (10.5, 12.5)], 'Rectangle', tag='V'),
                                            region_xml([(15.5, 1.5), (21, 1.5), (15.5, 7)], 'Polygon', tag='V')]))
    assert [(label == k).sum() for k in (1, 2, 3)] == [9, 24, 5 + 4 + 3 + 2 + 1]


def test_xml_layers_are_named_and_chosen(label_of):
    nucleus, tissue = (region_xml(rectangle(*corners)) for corners in ((1.5, 1.5, 4.5, 4.5), (0, 0, 30, 20)))
    text = annotation_xml(nuclei=[nucleus], tissue=[tissue])
    with pytest.warns(UserWarning, match='a.xml: the regions of its layers nuclei, tissue are all drawn; --xml-layers'):
        assert np.unique(label_of(text)).tolist() == [1, 2]
    label = label_of(text, layers=('nuclei',))
    assert (label == 1).sum() == 9 and label.max() == 1
    with pytest.raises(InputError, match="a.xml has no layer 'cells'; its layers are nuclei, tissue"):
        label_of(text, layers=('cells',))


BILLION_LAUGHS = '<!DOCTYPE Annotations [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
EXTERNAL_ENTITY = '<!DOCTYPE Annotations [<!ENTITY secret SYSTEM "file:///etc/passwd">]>'
EXTERNAL_DTD = '<!DOCTYPE Annotations SYSTEM "http://localhost/evil.dtd">'


@pytest.mark.parametrize('declaration', ['<!DOCTYPE Annotations>', BILLION_LAUGHS, EXTERNAL_ENTITY, EXTERNAL_DTD])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16'])
def test_xml_with_a_dtd_is_refused(label_of, declaration, encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?>{declaration}' + annotation_xml(rectangle(1, 1, 5, 5))
    with pytest.raises(InputError, match=r'a.xml has a document type declaration \(DTD\)'):
        label_of(text, encoding)


@pytest.mark.parametrize('text, message', [
    ('<html/>', 'is not an ImageScope annotation: .* found the root element html'),
    (annotation_xml(), 'holds no region'),
    ('<Annotations><Annotation>', 'is not well-formed XML'),
    ('<?xml version="1.0" encoding="none"?>' + annotation_xml(rectangle(1, 1, 9, 9)), 'is not well-formed XML'),
    (annotation_xml([(1, 'nan'), (2, 2), (3, 3)]), 'region 1: expected vertices with finite numbers X and Y'),
    (annotation_xml([('inf', 1), (2, 2), (3, 3)]), 'expected vertices with finite numbers X and Y'),
    (annotation_xml([('left', 1), (2, 2), (3, 3)]), "finite numbers X and Y, found .*'left'"),
    (annotation_xml(rectangle(1, 1, 5, 5)).replace('Y="5"', ''), 'expected vertices with finite numbers X and Y'),
])
def test_xml_that_is_not_an_annotation_is_refused(label_of, text, message):
    with pytest.raises(InputError, match=message):
        label_of(text)


@pytest.mark.parametrize('asked, largest, file_name, dtype', [
    ('a.bmp', 3, 'a.bmp', np.uint8), ('a.bmp', 256, 'a.tif', np.uint16), ('a.png', 3, 'a.png', np.uint16),
    ('a.png', 65535, 'a.png', np.uint16), ('a.png', 65536, 'a.tif', np.uint32)])
def test_save_instance_label(tmp_path, asked, largest, file_name, dtype):
    label = np.zeros((6, 7), np.int32)
    label[2:4, 3:5], label[0, 0] = largest, 1
    written = save_instance_label(tmp_path / asked, label)
    assert written == tmp_path / file_name
    assert np.array_equal(read_instance_label(written), label)
    assert (tifffile.imread(written) if written.suffix == '.tif' else pixels(written)).dtype == dtype


# ---------------------------------------------------------------------------------------------------
# Colour normalisation
# ---------------------------------------------------------------------------------------------------

def test_reinhard_golden(golden):
    normalized = Reinhard_normalizer().fit(golden['anchor']).transform(golden['source'])
    assert normalized.dtype == np.uint8
    assert np.abs(normalized.astype(int) - golden['normalized']).max() <= 1
    assert (normalized == golden['normalized']).mean() > 0.99                          # truncated, not rounded


# ---------------------------------------------------------------------------------------------------
# Patches
# ---------------------------------------------------------------------------------------------------

def test_patch_positions_golden(golden):
    assert np.array_equal(patch_positions(1000, 1000), golden['patch_positions'])


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 60))
def test_patches_cover_every_pixel(h, w, size):
    if min(h, w) < size:
        with pytest.raises(InputError, match=f'an image of {w} x {h} pixels is smaller than a patch of {size} x'):
            patch_positions(h, w, size)
        return
    covered = np.zeros((h, w), bool)
    for y, x in patch_positions(h, w, size):
        assert 0 <= y <= h - size and 0 <= x <= w - size
        covered[y:y + size, x:x + size] = True
    assert covered.all() and len(patch_positions(h, w, size)) == -(-h // size) * -(-w // size)


def test_split_patches_refuses_what_does_not_fit(tmp_path):
    save_image(tmp_path / 'in' / 'small.png', random_image(0, 249, 300))
    with pytest.raises(InputError, match='small.png: an image of 300 x 249 pixels is smaller than a patch of 250'):
        split_patches(tmp_path / 'in', tmp_path / 'out')
    with pytest.raises(InputError, match=r'no images named \{name\}_label in .*, saw small.png'):
        split_patches(tmp_path / 'in', tmp_path / 'out', 'label')
    save_instances(tmp_path / 'in' / 'many_label.tif', np.full((250, 250), 70_000))
    with pytest.raises(InputError, match='many_label.tif has 32 bits per pixel; patches are PNG, of 8 or 16'):
        split_patches(tmp_path / 'in', tmp_path / 'out', 'label')


# ---------------------------------------------------------------------------------------------------
# The published functions for a folder
# ---------------------------------------------------------------------------------------------------

def test_folders_of_labels_and_colours(tmp_path):
    """What is named after a GlaS label, and what else the miniature data sets below do not show."""
    anchor, source = random_image(0, 40, 50), random_image(1, 30, 60)
    save_image(tmp_path / 'anchor.png', anchor)
    save_image(tmp_path / 'images/train_8_anno.tif', source)
    color_norm(tmp_path / 'anchor.png', tmp_path / 'images', tmp_path / 'normalized')
    assert [p.name for p in (tmp_path / 'normalized').iterdir()] == ['train_8_anno.png']
    normalized = pixels(tmp_path / 'normalized/train_8_anno.png')
    assert np.array_equal(normalized, Reinhard_normalizer().fit(anchor).transform(source))

    with pytest.raises(InputError, match='no such file: .*train_8_anno.xml'):
        create_instance_labels(tmp_path, tmp_path / 'images', tmp_path / 'labels')
    (tmp_path / 'train_8_anno.xml').write_text(annotation_xml(rectangle(3, 4, 10, 12)))
    create_instance_labels(tmp_path, tmp_path / 'images', tmp_path / 'labels')
    label = instance_label_from_xml(tmp_path / 'train_8_anno.xml', 30, 60)
    assert label.any() and np.array_equal(pixels(tmp_path / 'labels/train_8_anno.png'), label)

    create_ternary_labels(tmp_path / 'labels', tmp_path / 'ternary', radius=2)
    assert [p.name for p in (tmp_path / 'ternary').iterdir()] == ['train_8_anno.bmp']
    assert np.array_equal(pixels(tmp_path / 'ternary/train_8_anno.bmp'), ternary_label(label, 2))
    save_image(tmp_path / 'labels/train_8_anno_label.png', label.astype(np.uint8))
    with pytest.raises(InputError, match='anno.png and train_8_anno_label.png in .* are labels of one image; keep one'):
        create_ternary_labels(tmp_path / 'labels', tmp_path / 'again')
    assert not (tmp_path / 'again').exists()


@pytest.mark.parametrize('step', [split_patches, create_ternary_labels, lambda a, b: color_norm(a / 'a.png', a, b)])
def test_steps_refuse_to_write_over_their_input(tmp_path, step):
    save_image(tmp_path / 'a.png', random_image(0, 250, 250))
    with pytest.raises(InputError, match='reading from and writing to the same folder'):
        step(tmp_path, tmp_path / '.')


# ---------------------------------------------------------------------------------------------------
# mean_std
# ---------------------------------------------------------------------------------------------------

def test_mean_std_is_over_all_pixels_of_images_of_any_size(tmp_path):
    images = [random_image(seed, 20 + 31 * seed, 40) for seed in range(3)]
    for k, image in enumerate(images):
        save_image(tmp_path / f'{k}.png', image)
    every_pixel = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    mean_std = compute_mean_std(sorted(tmp_path.iterdir()))
    assert mean_std.shape == (2, 3) and mean_std.dtype == np.float64
    assert np.allclose(mean_std, [every_pixel.mean(axis=0), every_pixel.std(axis=0)], rtol=1e-12)
    assert np.array_equal(mean_std, compute_mean_std(sorted(tmp_path.iterdir(), reverse=True)))


def test_count_objects():
    label = np.array([[5, 5, 0, 9], [0, 0, 5, 9], [7, 0, 0, 0], [0, 0, 0, 9]])
    assert count_objects(label) == (3, 1)            # 9 is in two pieces; 5 is not, its pixels touch diagonally
    assert count_objects(np.zeros((3, 3), int)) == (0, 0)


# ---------------------------------------------------------------------------------------------------
# Whole data sets, in miniature
# ---------------------------------------------------------------------------------------------------

NUCLEI = {'train': ['Breast_A', 'Liver_B'], 'val': ['Breast_C'], 'test_same': ['Liver_D'], 'test_diff': ['Colon_E']}


@functools.cache
def nuclei_label(seed, height=300, width=520):
    return random_label(seed, height, width, objects=60) % 2000


@pytest.fixture(scope='module')
def fullnet_master(tmp_path_factory):
    raw = tmp_path_factory.mktemp('fullnet')
    for seed, name in enumerate(name for names in NUCLEI.values() for name in names):
        save_image(raw / 'normalized' / f'{name}.png', random_image(seed, 300, 520))
        save_image(raw / 'labels_instance' / f'{name}_label.png', nuclei_label(seed).astype(np.uint16))
    (raw / 'split.json').write_text(json.dumps(NUCLEI))
    return raw


@pytest.fixture
def fullnet_files(fullnet_master, tmp_path):
    """A miniature of the FullNet authors' files: 300 x 520 images, so 2 x 3 patches each."""
    return Path(shutil.copytree(fullnet_master, tmp_path / 'raw'))


@pytest.fixture(scope='module')
def prepared_master(fullnet_master, tmp_path_factory):
    """The files of `fullnet_master`, prepared as published; not to be changed. What was printed is in `printed.txt`."""
    out = tmp_path_factory.mktemp('prepared') / 'out'
    with open(out.with_name('printed.txt'), 'w') as printed, contextlib.redirect_stdout(printed):
        prepare_nuclei(fullnet_master, out)
    return out


@pytest.fixture
def prepared(prepared_master, tmp_path):
    return Path(shutil.copytree(prepared_master, tmp_path / 'out'))


def prepare_nuclei(raw, out, *options):
    main(['--dataset', 'MultiOrgan', '--raw-dir', str(raw), '--data-dir', str(out), *options])


def test_fullnet_files_give_the_whole_layout(fullnet_master, prepared_master):
    out, expected = prepared_master, ['mean_std.npy']
    for part in ('train', 'val'):
        for name in NUCLEI[part]:
            expected.append(f'labels_instance/{part}/{name}_label.png')
            for k in range(6):
                expected += [f'images/{part}/{name}_{k}.png', f'labels/{part}/{name}_{k}_label.png',
                             f'weight_maps/{part}/{name}_{k}_weight.png']
    expected += ['images/val_full/Breast_C.png', 'labels_instance/val_full/Breast_C.png',
                 'images/test_same/Liver_D.png', 'images/test_diff/Colon_E.png',
                 'labels_instance/test/Liver_D.png', 'labels_instance/test/Colon_E.png']
    assert layout(out) == sorted(expected)

    assert np.array_equal(pixels(out / 'images/val_full/Breast_C.png'), random_image(2, 300, 520))   # colours as given
    assert np.array_equal(read_instance_label(out / 'labels_instance/test/Colon_E.png'), nuclei_label(4))
    assert pixels(out / 'labels_instance/test/Colon_E.png').dtype == np.uint16
    ternary = ternary_label(nuclei_label(1))
    weight = encode_weight_map(weight_map(nuclei_label(1), 10.0, 5.0))
    for k, (y, x) in enumerate(patch_positions(300, 520)):
        window = np.s_[y:y + 250, x:x + 250]
        assert np.array_equal(pixels(out / f'images/train/Liver_B_{k}.png'), random_image(1, 300, 520)[window])
        assert np.array_equal(pixels(out / f'labels/train/Liver_B_{k}_label.png'), ternary[window])
        assert np.array_equal(pixels(out / f'weight_maps/train/Liver_B_{k}_weight.png'), weight[window])

    train_and_val = [fullnet_master / 'normalized' / f'{name}.png' for name in NUCLEI['train'] + NUCLEI['val']]
    assert np.array_equal(np.load(out / 'mean_std.npy', allow_pickle=False), compute_mean_std(train_and_val))

    printed = out.with_name('printed.txt').read_text().splitlines()
    objects = sum(count_objects(nuclei_label(seed))[0] for seed in (0, 1))
    assert printed[1].split()[:4] == ['train', '2', '12', str(objects)]
    assert [line.split()[:2] for line in printed[1:5]] == [['train', '2'], ['val', '1'], ['test_same', '1'],
                                                           ['test_diff', '1']]
    assert printed[5].startswith('mean 0.') and printed[6].startswith('std  0.')
    assert printed[-1].startswith(f'MultiOrgan is ready in {out} (0.')


def test_the_single_steps_make_the_same_files(fullnet_master, prepared_master, tmp_path):
    steps = tmp_path / 'steps'
    labels = fullnet_master / 'labels_instance'
    create_ternary_labels(labels, steps / 'ternary')
    create_weight_maps(labels, steps / 'weights')
    split_patches(fullnet_master / 'normalized', steps / 'image_patches')
    split_patches(steps / 'ternary', steps / 'ternary_patches', 'label')
    split_patches(steps / 'weights', steps / 'weight_patches', 'weight')
    for kind, folder in (('images', 'image_patches'), ('labels', 'ternary_patches'), ('weight_maps', 'weight_patches')):
        for path in (prepared_master / kind / 'train').iterdir():
            assert path.read_bytes() == (steps / folder / path.name).read_bytes()


def test_raw_data_is_untouched_and_nothing_of_an_earlier_preparation_is_left(fullnet_files, prepared_master, tmp_path):
    before, out = contents(fullnet_files), tmp_path / 'out'
    (fullnet_files / 'split.json').write_text(json.dumps({'train': ['Breast_A', 'Colon_E'], 'val': ['Liver_B']}))
    with pytest.warns(UserWarning, match='2 images are not in split.json and are not used: Breast_C, Liver_D'):
        prepare_nuclei(fullnet_files, out, '--patch-size', '290')
    (out / 'labels/train/Breast_A_0_label.png').write_bytes(b'')
    (out / 'images/val/Liver_B_1.png').unlink()
    (fullnet_files / 'split.json').write_text(json.dumps(NUCLEI))
    prepare_nuclei(fullnet_files, out)
    assert contents(out) == contents(prepared_master)
    assert contents(fullnet_files) == before


def test_options_reach_the_files(fullnet_files, tmp_path):
    path = fullnet_files / 'normalized/Breast_A.png'
    tifffile.imwrite(path.with_suffix('.tif'), pixels(path).astype(np.uint16) * 16, photometric='rgb')
    path.unlink()
    prepare_nuclei(fullnet_files, tmp_path / 'out', '--patch-size', '300', '--sigma', '2', '--w0', '7',
                   '--ternary-radius', '2', '--scale-16bit', '0', '4080')
    assert len(list((tmp_path / 'out/images/train').iterdir())) == 4
    image = random_image(0, 300, 520)
    assert np.array_equal(pixels(tmp_path / 'out/images/train/Breast_A_1.png'), image[:, 220:520])
    weight = encode_weight_map(weight_map(nuclei_label(0), 7.0, 2.0))
    assert np.array_equal(pixels(tmp_path / 'out/weight_maps/train/Breast_A_1_weight.png'), weight[:, 220:520])
    ternary = ternary_label(nuclei_label(0), 2)
    assert np.array_equal(pixels(tmp_path / 'out/labels/train/Breast_A_1_label.png'), ternary[:, 220:520])


def test_an_interrupted_preparation_leaves_the_earlier_one_as_it_was(fullnet_files, prepared, tmp_path):
    before = contents(prepared)
    save_image(fullnet_files / 'labels_instance/Colon_E_label.png', np.ones((300, 519), np.uint16))
    for out, workers in ((prepared, '1'), (tmp_path / 'anew', '2')):
        with pytest.raises(InputError, match='Colon_E_label.png is 519 x 300 pixels, its image 520 x 300'):
            prepare_nuclei(fullnet_files, out, '--workers', workers)
    assert contents(prepared) == before and not (tmp_path / '.out.preparing').exists()
    assert not (tmp_path / 'anew').exists()


@pytest.mark.parametrize('split, message', [
    ('{', 'split.json is not JSON'),
    ('[]', 'split.json: expected a JSON object of lists of names: train, val and, if there are, test_same, test_diff'),
    ('{"train": "a", "val": []}', 'expected a JSON object of lists of names'),
    ('{"train": ["../a"], "val": ["b"]}', 'each name must be a file name without extension'),
    ('{"train": ["Breast_A"]}', 'split.json has train; expected a JSON object'),
    ('{"train": ["a"], "val": ["b"], "tset": ["c"]}', 'split.json has train, val, tset; expected'),
    ('{"train": ["a", "b"], "val": ["b"]}', 'names b more than once; an image belongs to one split'),
    ('{"train": ["Breast_A"], "val": ["x", "y"]}', '2 images named in split.json are missing in .*normalized: x, y'),
    (json.dumps(NUCLEI), '1 instance labels named in split.json are missing in .*: Liver_B'),
])
def test_split_json_is_checked(fullnet_files, tmp_path, split, message):
    (fullnet_files / 'labels_instance/Liver_B_label.png').unlink()
    (fullnet_files / 'split.json').write_text(split)
    with pytest.raises(InputError, match=message):
        prepare_nuclei(fullnet_files, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_files_of_others_are_refused_and_stay(fullnet_files, prepared, tmp_path):
    save_image(tmp_path / 'out/images/train/mine_0.png', random_image(9, 250, 250))
    (tmp_path / 'out/.notes').write_text('x')
    (tmp_path / 'out/link').symlink_to(tmp_path)
    (tmp_path / 'out/._notes').write_text('of macOS')
    before = contents(tmp_path / 'out')
    with pytest.raises(InputError, match='out holds 3 files that no preparation made: .notes, '
                                         'images/train/mine_0.png, link; move them away, or give another --data-dir'):
        prepare_nuclei(fullnet_files, tmp_path / 'out', '--patch-size', '290')
    assert contents(tmp_path / 'out') == before


def test_several_processes_make_the_same_files(fullnet_files, prepared_master, tmp_path, recwarn):
    warnings.simplefilter('always')
    save_image(fullnet_files / 'labels_instance/Colon_E_label.png', np.zeros((300, 520), np.uint16))
    prepare_nuclei(fullnet_files, tmp_path / 'out', '--workers', '2')
    made = contents(tmp_path / 'out')
    expected = contents(prepared_master)
    assert made.keys() == expected.keys()
    assert {name for name in made if made[name] != expected[name]} == {'labels_instance/test/Colon_E.png',
                                                                      'contact_sheet_test_diff.png'}
    assert [str(w.message) for w in recwarn].count('Colon_E_label.png: the label has no object') == 1


def test_killed_in_the_middle_it_starts_anew(fullnet_files, prepared, prepared_master, tmp_path):
    preparing = tmp_path / '.out.preparing'
    (prepared / 'labels/train/Breast_A_0_label.png').write_bytes(b'')             # of another preparation
    before = contents(prepared)
    code = ('import sys, time, prepare_data; save = prepare_data.save_image\n'
            'def slow(*words): save(*words); time.sleep(0.05)\n'
            'prepare_data.save_image = slow; prepare_data.main(sys.argv[1:])')
    command = [sys.executable, '-c', code, '--raw-dir', str(fullnet_files), '--data-dir', str(prepared)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               cwd=Path(prepare_data.__file__).parent)
    while process.poll() is None and len(list(preparing.rglob('*.*'))) < 10:
        time.sleep(0.001)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert contents(prepared) == before
    # killed between the two renames at the end
    prepared.rename(preparing / 'old')
    prepare_nuclei(fullnet_files, prepared)
    assert contents(prepared) == contents(prepared_master) and not preparing.exists()


def test_an_exception_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/before.txt').write_text('x')
    replace = os.replace

    def stop(source, target):
        replace(source, target)
        if Path(target).name == 'old':
            raise KeyboardInterrupt
    monkeypatch.setattr(os, 'replace', stop)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / 'out') as folder:
        (folder / 'after.txt').write_text('y')
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('*')] == ['out', 'out/before.txt']

    # a process was killed there, and the next one fails
    (tmp_path / '.out.preparing').mkdir()
    (tmp_path / 'out').rename(tmp_path / '.out.preparing/old')
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / 'out'):
        1 / 0
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('*')] == ['out', 'out/before.txt']


def test_the_report_and_the_contact_sheets(prepared_master):
    label = nuclei_label(0)
    report = json.loads((prepared_master / 'prepare_report.json').read_text())
    assert list(report['splits']) == ['train', 'val', 'test_same', 'test_diff']
    areas = np.concatenate([np.bincount(x.ravel())[1:] for x in (label, nuclei_label(1))])
    percentiles = np.percentile(areas[areas > 0], (5, 25, 50, 75, 95)).round(1).tolist()
    assert report['splits']['train']['object_area'] == percentiles
    assert report['splits']['train']['patches'] == 12 and report['splits']['test_same']['patches'] == 0
    assert report['labels_with_objects_in_pieces']['Breast_A'] == count_objects(label)[1] > 0
    assert report['mean'] == np.load(prepared_master / 'mean_std.npy')[0].tolist() and report['minutes'] >= 0
    sheet = pixels(prepared_master / 'contact_sheet_train.png')
    assert sheet.shape == (2 * 316, 3 * 520, 3)                    # two images with ternary labels and weight maps
    tiles = sheet[16:316].reshape(300, 3, 520, 3).swapaxes(0, 1)
    assert (tiles[0] == (255, 255, 0)).all(2).any()                # contours
    assert np.array_equal(tiles[1], ternary_label(label))
    assert pixels(prepared_master / 'contact_sheet_test_same.png').shape == (316, 520, 3)


# --- One's own data

@pytest.fixture
def own(tmp_path):
    """Six images with instance labels of every kind that is read."""
    label = [random_label(seed, 260, 270, objects=20) % 2000 for seed in range(6)]
    for seed in range(6):
        save_image(tmp_path / f'mine/images/case {seed}.png', random_image(seed, 260, 270))
    folder = tmp_path / 'mine/labels'
    folder.mkdir()
    Image.fromarray((label[0] % 256).astype(np.uint8)).save(folder / 'case 0.png')
    Image.fromarray(label[1].astype(np.uint16)).save(folder / 'case 1_label.png')
    tifffile.imwrite(folder / 'case 2_anno.tif', label[2].astype(np.uint32) * 7)
    np.save(folder / 'case 3.npy', label[3].astype(np.int64))
    savemat(folder / 'case 4.mat', {'inst_map': label[4].astype(float)})
    (folder / 'case 5.xml').write_text(annotation_xml(nuclei=[region_xml(rectangle(10, 20, 60, 90))],
                                                      tissue=[region_xml(rectangle(0, 0, 270, 260))]))
    label[0] %= 256
    label[2] *= 7
    label[5] = instance_label_from_xml(folder / 'case 5.xml', 260, 270, ('nuclei',))
    return tmp_path / 'mine', label


def prepare_own(folder, out, *options):
    main(['--img-dir', str(folder / 'images'), '--label-dir', str(folder / 'labels'), '--data-dir', str(out), *options])


@pytest.mark.parametrize('like, ending', [('MultiOrgan', ''), ('GlaS', '_anno')])
def test_own_data_of_every_kind(own, tmp_path, like, ending):
    folder, labels = own
    (tmp_path / 'split.json').write_text(json.dumps({'train': ['case 0', 'case 1', 'case 2'], 'val': ['case 3'],
                                                     'test': ['case 4', 'case 5']}))
    prepare_own(folder, tmp_path / 'out', '--like', like, '--split', str(tmp_path / 'split.json'),
                '--xml-layers', 'nuclei')
    found = {p.stem: p for p in (tmp_path / 'out/labels_instance').rglob('*.*')}
    for seed, label in enumerate(labels):
        name = f'case {seed}' + ('_label' if seed < 4 and like == 'MultiOrgan' else ending)
        assert np.array_equal(read_instance_label(found[name]), label)
    tests = [p.stem for p in sorted((tmp_path / 'out/images' / ('testA' if ending else 'test_same')).iterdir())]
    assert tests == ['case 4', 'case 5']
    name = min((tmp_path / 'out/weight_maps/val').iterdir())
    weight = encode_weight_map(weight_map(labels[3], sigma={'GlaS': 20.0, 'MultiOrgan': 5.0}[like]))
    assert np.array_equal(pixels(name), weight if like == 'GlaS' else weight[:250, :250])
    assert np.array_equal(pixels(next((tmp_path / 'out/images').rglob('case 4.*'))), random_image(4, 260, 270))
    opt = Options(True).parse(['--dataset', like, '--data-dir', str(tmp_path / 'out')])
    assert len(train.load_data(opt, 'train', np.load(tmp_path / 'out/mean_std.npy'))) == (3 if ending else 12)


def test_an_image_is_in_one_split_however_it_is_written(own, tmp_path):
    (tmp_path / 'split.json').write_text('{"train": ["case 1", "case 2"], "val": ["case 1.png"]}')
    with pytest.raises(InputError, match='split.json names case 1 more than once; an image belongs to one split'):
        prepare_own(own[0], tmp_path / 'out', '--split', str(tmp_path / 'split.json'))
    with pytest.raises(InputError, match='no such file: nowhere.json; expected a JSON object of lists'):
        prepare_own(own[0], tmp_path / 'out', '--split', 'nowhere.json')


def test_own_data_drawn_by_fractions_and_coloured_when_asked(own, tmp_path):
    prepare_own(own[0], tmp_path / 'out', '--like', 'GlaS', '--fractions', '0.5', '0.2', '0.3', '--seed', '4',
                '--anchor', 'case 3')
    images = {p.stem: (p.parent.name, pixels(p)) for p in (tmp_path / 'out/images').rglob('*.bmp')}
    assert sorted(part for part, _ in images.values()) == ['testA'] * 2 + ['train'] * 3 + ['val']
    normalizer = Reinhard_normalizer().fit(random_image(3, 260, 270))
    assert np.array_equal(images['case 1'][1], normalizer.transform(random_image(1, 260, 270)))
    (own[0] / 'images/masks').mkdir()
    save_image(own[0] / 'images/masks/case 3.png', random_image(9, 60, 60))               # is none of the images
    prepare_own(own[0], tmp_path / 'again', '--like', 'GlaS', '--anchor', 'case 3')
    assert np.array_equal(pixels(next((tmp_path / 'again/images').rglob('case 1.bmp'))), images['case 1'][1])


def test_a_drawn_split_has_each_image_once_and_images_to_train_and_to_validate():
    names = list('abcdefghij')
    split = draw_split(names, (0.5, 0.2, 0.3), 4)
    assert {part: len(group) for part, group in split.items()} == {'train': 5, 'val': 2, 'test': 3}
    assert sorted(split['train'] + split['val'] + split['test']) == names
    assert split == draw_split(names, (0.5, 0.2, 0.3), 4) != draw_split(names, (0.5, 0.2, 0.3), 5)
    for fractions in ((0.1, 0.1, 0.8), (0.98, 0.01, 0.01), (0.01, 0.99, 0)):
        split = draw_split(list('ab'), fractions, 0)
        assert sorted(split['train'] + split['val']) == ['a', 'b'] and len(split['val']) == 1


@pytest.mark.parametrize('words, message', [
    (['--img-dir', 'x'], '--img-dir is given without --label-dir'),
    (['--label-dir', 'x'], '--label-dir is given without --img-dir'),
    (['--anchor', 'Breast_A'], ' holds images whose colours are normalised already; leave --anchor out'),
    (['--others', 'train'], ' has a split of its own, split.json; leave --others out'),
])
def test_options_that_do_not_go_with_the_data_are_refused(fullnet_master, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)                                # the folder of the results is below the current one
    with pytest.raises(InputError, match=message):
        prepare_nuclei(fullnet_master, tmp_path / 'out', *words)


@pytest.mark.parametrize('content, message', [
    (None, 'no variable inst_map; expected an instance label of that name'),
    (b'', 'is not a MATLAB file, or is damaged'), (b'MATLAB 7.3 MAT-file' + b' ' * 200, 'is not a MATLAB file|7.3')])
def test_mat_files_that_hold_no_label(tmp_path, content, message):
    path = tmp_path / 'a.mat'
    savemat(path, {'other': np.ones((2, 2))}) if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_instance_label(path)


@pytest.mark.parametrize('out', ['raw', 'raw/out', 'raw/../raw/normalized', '.'])
def test_writing_over_the_raw_folder_is_refused(fullnet_files, tmp_path, out):
    before = contents(tmp_path)
    with pytest.raises(InputError, match='the prepared data would replace the raw data: .*; give a --data-dir outside'):
        prepare_nuclei(fullnet_files, tmp_path / out)
    assert contents(tmp_path) == before


def test_the_wrong_folder_says_what_was_looked_for_and_seen(tmp_path):
    (tmp_path / 'raw' / 'photos').mkdir(parents=True)
    (tmp_path / 'raw' / 'readme.txt').touch()
    with pytest.raises(InputError, match=r'is not a MultiOrgan data set: looked for normalized/, labels_instance/ and '
                                         r'split.json, or .tif images .*; saw photos/, readme.txt$'):
        prepare_nuclei(tmp_path / 'raw', tmp_path / 'out')
    with pytest.raises(InputError, match='is not the GlaS data set: looked for train_1.bmp, .*; saw photos/, '):
        prepare_glands(tmp_path / 'raw', tmp_path / 'out')
    with pytest.raises(InputError, match='no such folder: .*elsewhere'):
        prepare_nuclei(tmp_path / 'elsewhere', tmp_path / 'out')


# --- MoNuSeg as distributed

def test_the_published_split():
    """Typed anew: a test image in train would go unnoticed."""
    patients = {part: ' '.join(name.replace('_TCGA-', ':').removesuffix('-01Z-00-DX1') for name in names)
                for part, names in MULTI_ORGAN_SPLIT.items()}
    assert patients == {
        'train': 'Breast:A7-A13E Breast:A7-A13F Breast:AR-A1AK Kidney:B0-5711 Kidney:HE-7128 Kidney:HE-7129 '
                 'Liver:18-5592 Liver:38-6178 Liver:49-4488 Prostate:G9-6336 Prostate:G9-6348 Prostate:G9-6356',
        'val': 'Breast:AR-A1AS Kidney:HE-7130 Liver:50-5931 Prostate:G9-6363',
        'test_same': 'Breast:E2-A1B5 Breast:E2-A14V Kidney:B0-5698 Kidney:B0-5710 Liver:21-5784 Liver:21-5786 '
                     'Prostate:CH-5767 Prostate:G9-6362',
        'test_diff': 'Bladder:DK-A2I6-01A-01-TS1 Bladder:G2-A2EK-01A-02-TSB Colon:AY-A8YK-01A-01-TS1 '
                     'Colon:NH-A8F7-01A-01-TS1 Stomach:KB-A93J-01A-01-TS1 Stomach:RD-A8N9-01A-01-TS1'}


ANCHOR = 'Prostate_TCGA-G9-6356-01Z-00-DX1'
TRAIN, VAL, TEST_SAME = (MULTI_ORGAN_SPLIT[part][0] for part in ('train', 'val', 'test_same'))


@pytest.fixture
def monuseg(tmp_path):
    """A miniature of MoNuSeg: LZW and plain TIFFs and XML in folders of their own, 260 x 260 pixels."""
    raw = tmp_path / 'raw'
    (raw / 'MoNuSeg/Tissue Images').mkdir(parents=True)
    (raw / 'MoNuSeg/Annotations').mkdir()
    for seed, name in enumerate((TRAIN, VAL, TEST_SAME, ANCHOR)):
        stem = name.split('_', 1)[1]
        compression = 'tiff_lzw' if seed % 2 else None
        Image.fromarray(random_image(seed, 260, 260)).save(raw / f'MoNuSeg/Tissue Images/{stem}.tif',
                                                           compression=compression)
        regions = [rectangle(10 * seed + 10, 20, 10 * seed + 60, 90), rectangle(100, 100, 200 + seed, 200)]
        (raw / f'MoNuSeg/Annotations/{stem}.xml').write_text(annotation_xml(*regions))
    return raw


def file_of(raw, name, ending):
    return next(raw.rglob(name.split('_', 1)[1] + ending))


def test_monuseg(monuseg, tmp_path):
    out = tmp_path / 'out'
    prepare_nuclei(monuseg, out)
    assert sorted(p.name for p in (out / 'labels_instance/train').iterdir()) == [f'{TRAIN}_label.png',
                                                                                 f'{ANCHOR}_label.png']
    assert [p.name for p in (out / 'images/test_same').iterdir()] == [f'{TEST_SAME}.png']
    label = instance_label_from_xml(file_of(monuseg, TEST_SAME, '.xml'), 260, 260)
    assert np.unique(label).tolist() == [0, 1, 2]
    assert np.array_equal(pixels(out / f'labels_instance/test/{TEST_SAME}.png'), label)
    normalizer = Reinhard_normalizer().fit(random_image(3, 260, 260))
    assert np.array_equal(pixels(out / f'images/val_full/{VAL}.png'), normalizer.transform(random_image(1, 260, 260)))
    histogram = sum(colour_histogram(normalizer.transform(random_image(seed, 260, 260))) for seed in (0, 1, 3))
    assert np.array_equal(np.load(out / 'mean_std.npy'), mean_std_of(histogram))


def test_monuseg_anchor_is_a_choice(monuseg, tmp_path):
    prepare_nuclei(monuseg, tmp_path / 'as_they_are', '--anchor', '')
    assert np.array_equal(pixels(tmp_path / f'as_they_are/images/val_full/{VAL}.png'), random_image(1, 260, 260))

    save_image(monuseg / f'masks/{ANCHOR}.png', random_image(6, 260, 260))             # is no image of the data set
    save_image(tmp_path / 'other.png', random_image(7, 60, 60))
    prepare_nuclei(monuseg, tmp_path / 'other', '--anchor', str(tmp_path / 'other.png'))
    expected = Reinhard_normalizer().fit(random_image(7, 60, 60)).transform(random_image(1, 260, 260))
    assert np.array_equal(pixels(tmp_path / f'other/images/val_full/{VAL}.png'), expected)

    with pytest.raises(InputError, match="the colour anchor 'TCGA-nothing' is neither a file nor an image in"):
        prepare_nuclei(monuseg, tmp_path / 'none', '--anchor', 'TCGA-nothing')


def test_monuseg_images_without_annotation_or_outside_the_published_split(monuseg, tmp_path):
    """The colour anchor may lack an annotation; the others are named, or go where told."""
    Image.fromarray(random_image(9, 260, 260)).save(monuseg / 'TCGA-ZZ-0000.tif')
    file_of(monuseg, ANCHOR, '.xml').unlink()
    with pytest.warns(UserWarning) as notes:
        prepare_nuclei(monuseg, tmp_path / 'out')
    messages = [str(note.message) for note in notes]
    assert '1 images are not in the published split and are not used (--others puts them into one): TCGA-ZZ-0000' \
        in messages
    for part in ('26 images of the published split are not there: Breast_',
                 'the colour anchor, has no annotation; it is used for its colours only'):
        assert any(part in message for message in messages)
    assert [p.name for p in (tmp_path / 'out/labels_instance/train').iterdir()] == [f'{TRAIN}_label.png']

    with pytest.raises(InputError, match='1 images or annotations are missing in .*: TCGA-ZZ-0000.xml'):
        prepare_nuclei(monuseg, tmp_path / 'out', '--others', 'train')
    (monuseg / 'TCGA-ZZ-0000.xml').write_text(annotation_xml(rectangle(10, 20, 60, 90)))
    prepare_nuclei(monuseg, tmp_path / 'out', '--others', 'test_diff')
    assert [p.name for p in (tmp_path / 'out/images/test_diff').iterdir()] == ['TCGA-ZZ-0000.png']
    assert read_instance_label(tmp_path / 'out/labels_instance/test/TCGA-ZZ-0000.png').max() == 1


@pytest.mark.parametrize('missing, message', [
    (((TRAIN, '.xml'), (TEST_SAME, '.tif')), '2 images or annotations are missing in .*: TCGA-A7-A13E-01Z-00-DX1.xml, '
                                             'TCGA-E2-A1B5-01Z-00-DX1.tif'),
    (((VAL, '.xml'), (VAL, '.tif')), 'lacks the published train or val images: looked for TCGA-A7-A13E.*MoNuSeg/'),
])
def test_monuseg_files_that_are_missing_are_named(monuseg, tmp_path, missing, message):
    for name, ending in missing:
        file_of(monuseg, name, ending).unlink()
    with pytest.raises(InputError, match=message):
        prepare_nuclei(monuseg, tmp_path / 'out')


def test_two_files_of_one_name_are_refused(monuseg, tmp_path):
    copy = file_of(monuseg, TRAIN, '.tif')
    (monuseg / 'again').mkdir()
    (monuseg / 'again' / f'{copy.stem}.tiff').write_bytes(copy.read_bytes())
    with pytest.raises(InputError, match='two files of one name in .*TCGA-A7-A13E.*; keep one of them'):
        prepare_nuclei(monuseg, tmp_path / 'out')


# --- GlaS as distributed

@pytest.fixture
def glas(tmp_path):
    """A miniature of GlaS: 5 train, 2 testA and 1 testB images with labels, one of them a palette file."""
    raw = tmp_path / 'raw' / 'Warwick QU Dataset (Released 2016_07_08)'
    for seed, name in enumerate(('train_1', 'train_2', 'train_3', 'train_4', 'train_10', 'testA_1', 'testA_2',
                                 'testB_1')):
        save_image(raw / f'{name}.bmp', random_image(seed, 90, 120))
        save_image(raw / f'{name}_anno.bmp', gland_label(seed))
    palette = Image.fromarray(gland_label(0)).convert('P')
    palette.putpalette([255 - value // 3 for value in range(768)])
    palette.putdata(gland_label(0).ravel().tolist())
    palette.save(raw / 'train_1_anno.bmp')
    (raw / 'Grade.csv').write_text('name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)\n'
                                   'testA_1, 1, benign, adenomatous\ntestA_2, 2, malignant, moderate\n'
                                   'testB_1, 2, malignant, moderate\n')
    return raw


def gland_label(seed):
    return (random_label(seed, 90, 120, objects=8) % 9).astype(np.uint8)


def prepare_glands(raw, out, *options):
    main(['--dataset', 'GlaS', '--raw-dir', str(raw), '--data-dir', str(out), *options])


def test_glas_gives_the_whole_layout(glas, tmp_path):
    out = tmp_path / 'out'
    prepare_glands(glas.parent, out)
    val = [path.stem for path in (out / 'images/val').iterdir()]
    train = [name for name in ('train_1', 'train_2', 'train_3', 'train_4', 'train_10') if name not in val]
    assert len(val) == 1 and val[0].startswith('train_')
    expected = ['mean_std.npy']
    for part, names in (('train', train), ('val', val)):
        for name in names:
            expected += [f'images/{part}/{name}.bmp', f'labels/{part}/{name}_anno.bmp',
                         f'weight_maps/{part}/{name}_anno_weight.png', f'labels_instance/{part}/{name}_anno.bmp']
    for part, names in (('testA', ('testA_1', 'testA_2')), ('testB', ('testB_1',))):
        for name in names:
            expected += [f'images/{part}/{name}.bmp', f'labels_instance/{part}/{name}_anno.bmp']
    assert layout(out) == sorted(expected)

    part = 'train' if 'train_1' in train else 'val'
    label = gland_label(0)
    assert np.array_equal(pixels(out / f'images/{part}/train_1.bmp'), random_image(0, 90, 120))
    assert np.array_equal(pixels(out / f'labels_instance/{part}/train_1_anno.bmp'), label)
    assert np.array_equal(pixels(out / f'labels/{part}/train_1_anno.bmp'), ternary_label(label, 2))
    assert np.array_equal(pixels(out / f'weight_maps/{part}/train_1_anno_weight.png'),
                          encode_weight_map(weight_map(label, 10.0, 20.0)))
    assert np.array_equal(np.load(out / 'mean_std.npy'), compute_mean_std(glas / f'{n}.bmp' for n in train + val))


def test_glas_grades_are_counted(glas, tmp_path):
    prepare_glands(glas.parent, tmp_path / 'out')
    grades = json.loads((tmp_path / 'out/prepare_report.json').read_text())['grades']
    assert grades['testA'] == {'benign': 1, 'malignant': 1} and grades['testB'] == {'malignant': 1}
    assert grades['train'] == {'unknown': 4}
    images = [{'name': name, 'split': 'testA'} for name in ('testA_1', 'testA_2')]
    (glas / 'Grade.csv').write_text('grade , patient ID,name\n malignant,1,testA_1 \n')     # in any order
    assert count_grades(glas, images) == {'grades': {'testA': {'malignant': 1, 'unknown': 1}}}
    for text in ('', 'name,grade\nothers_1,benign\n'):
        (glas / 'Grade.csv').write_text(text)
        with pytest.warns(UserWarning, match='Grade.csv names none of the images; expected the columns name and grade'):
            assert count_grades(glas, images) == {}


def test_glas_split_is_seeded(tmp_path):
    for prefix, count in (('train', 85), ('testA', 60), ('testB', 20)):
        for number in range(1, count + 1):
            (tmp_path / f'{prefix}_{number}.bmp').touch()
            (tmp_path / f'{prefix}_{number}_anno.bmp').touch()

    def names(part, seed, fraction=0.2):
        return [source.name for source in find_glas(tmp_path, fraction, seed) if source.split == part]

    assert [len(names(part, 0)) for part in ('train', 'val', 'testA', 'testB')] == [68, 17, 60, 20]
    assert names('val', 0) == names('val', 0) != names('val', 1)
    assert names('val', 0) == [f'train_{i}' for i in (6, 9, 10, 12, 14, 17, 20, 21, 28, 40, 43, 45, 53, 61, 72, 73, 85)]
    assert len(names('val', 0, 0.001)) == 1 and len(names('train', 0, 0.999)) == 1
    with pytest.raises(InputError, match='val_fraction is 0; expected a number between 0 and 1'):
        find_glas(tmp_path, 0, 0)


def test_glas_files_without_a_partner_are_named(glas, tmp_path):
    (glas / 'train_3_anno.bmp').unlink()
    (glas / 'testB_1.bmp').unlink()
    with pytest.raises(InputError, match='2 images or labels are missing in .*: train_3_anno.bmp, testB_1.bmp'):
        prepare_glands(glas, tmp_path / 'out')


# ---------------------------------------------------------------------------------------------------
# The published data
# ---------------------------------------------------------------------------------------------------

PUBLISHED_MEAN_STD = [[0.74408994, 0.53806349, 0.66497889], [0.15811703, 0.19705941, 0.15046222]]


@needs_real_data
def test_published_multi_organ_data():
    sources = find_fullnet_files(REAL / 'MultiOrgan')
    assert [sum(source.split == part for source in sources) for part in ('train', 'val')] == [12, 4]
    images = [source.image for source in sources if source.split in ('train', 'val')]
    assert all(len(patch_positions(*read_image(path).shape[:2])) == 16 for path in images)    # 192 and 64 patches
    assert np.abs(compute_mean_std(images) - PUBLISHED_MEAN_STD).max() <= 1e-6


@needs_real_data
def test_authors_files_of_a_gland_image():
    instances = read_instance_label(REAL / 'GlaS/train_8_anno.bmp')
    assert np.array_equal(ternary_label(instances, 2), pixels(REAL / 'reference/train_8_anno.bmp'))
    assert (ternary_label(instances, 1) != pixels(REAL / 'reference/train_8_anno.bmp')).any(axis=2).sum() == 9360
    weights = encode_weight_map(weight_map(instances, 10.0, 20.0))
    assert np.array_equal(weights, pixels(REAL / 'reference/train_8_anno_weight.png'))


@needs_real_data
def test_published_glas_data():
    sources = find_glas(REAL / 'GlaS', 0.2, 2019)
    assert [sum(source.split == part for source in sources) for part in ('train', 'val')] == [68, 17]
    published = [[0.78780321, 0.5120167, 0.78493782], [0.16766301, 0.24838048, 0.13225162]]
    assert np.abs(compute_mean_std(source.image for source in sources) - published).max() <= 1e-8
    images = [{'name': source.name, 'split': 'train'} for source in sources]
    assert count_grades(REAL / 'GlaS', images)['grades'] == {'train': {'benign': 37, 'malignant': 48}}


@needs_real_data
@pytest.mark.filterwarnings('ignore:.*no pixel of their own')
def test_annotations_give_the_authors_labels():
    differences = []
    for path in sorted((REAL / 'MultiOrgan/original/annotations').glob('*.xml')):
        published = read_instance_label(next((REAL / 'MultiOrgan/labels_instance').glob(f'*{path.stem}_label.png')))
        differences.append((instance_label_from_xml(path, *published.shape) != published).mean())
    assert len(differences) == 5
    assert max(differences) <= 0.0016 and np.mean(differences) <= 0.0010
