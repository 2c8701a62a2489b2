"""What users' tools write: masks, class maps, stacks, names, TIFFs of unusual kinds, paths with `~`."""
import gzip
import json
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from miniature import nuclei
from PIL import Image
from scipy import ndimage

from prepare_data import instance_label_from_geojson
from prepare_data import main as prepare
from scripts import export_geojson
from support.images import find_labels, list_images, read_image, read_instance_label, read_json
from support.script import InputError
from weight_map import main as weight_map

IMAGE, INSTANCES = nuclei(3, 96, 96)
INSTANCES = INSTANCES.astype(np.uint16)
N = int(INSTANCES.max())


def with_notes(path, **options):
    """The label that is read, and the notes that come with it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        label = read_instance_label(path, **options)
    return label, [str(w.message) for w in caught]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.npy':
        np.save(path, array)
    elif path.suffix == '.tif':
        tifffile.imwrite(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


# ---------------------------------------------------------------------------------------------------
# Labels that are no instance maps
# ---------------------------------------------------------------------------------------------------

def grey_edges():
    """A mask of 0 and 255 that was resized twice."""
    mask = Image.fromarray((INSTANCES > 0).astype(np.uint8) * 255)
    return np.asarray(mask.resize((192, 192), Image.BILINEAR).resize((96, 96), Image.BILINEAR))


def class_map():
    return ((INSTANCES > 0) * (INSTANCES % 4 + 1)).astype(np.uint8)


def test_objects_of_masks_and_class_maps_are_their_pieces_with_binary_labels(tmp_path):
    Image.fromarray((INSTANCES > 0).astype(np.uint8) * 255).save(tmp_path / 'mask.jpg', quality=90)
    for name, mask in (('grey', grey_edges()), ('jpeg', np.asarray(Image.open(tmp_path / 'mask.jpg')))):
        assert len(np.unique(mask)) > 5
        label, notes = with_notes(save(tmp_path / f'{name}.png', mask), binary_labels=True)
        expected, n = ndimage.label(mask >= mask.max() / 2, np.ones((3, 3)))
        assert np.array_equal(label, expected) and abs(n - N) <= 2
        assert len(notes) == 1 and f'at least half of {mask.max()}: {n} objects' in notes[0]
    label, notes = with_notes(save(tmp_path / 'x.png', class_map()), binary_labels=True)
    assert np.array_equal(label, ndimage.label(INSTANCES, np.ones((3, 3)))[0])
    assert notes == [f'x.png: 4 values; objects are the connected pixels above 0: {label.max()} objects']
    label, notes = with_notes(save(tmp_path / 'x.png', INSTANCES), binary_labels=True)
    assert np.array_equal(label, INSTANCES)
    assert len(notes) == 1 and 'look like one id per object and are kept, in spite of --binary-labels' in notes[0]


def test_stray_pieces_make_no_mask_of_a_label_and_grey_edges_no_label_of_a_mask(tmp_path):
    one, two = np.zeros((2, 40, 60), np.uint8)
    one[2:20, 2:20] = one[2:20, 30:50] = 1                                     # one id in two pieces, most of the area
    one[30:35, 5:10] = 2
    two[2:20, 2:20], two[2:20, 30:50], two[22:40, 2:48] = 1, 2, 3
    two[25, 55], two[30, 55] = 1, 2                                            # two ids in pieces, less than half of it
    for label in (one, two):
        assert np.array_equal(with_notes(save(tmp_path / 'x.png', label), binary_labels=True)[0], label)
    y, x = np.ogrid[:60, :60]
    mask = (255 * np.clip((22 - np.hypot(y - 30, x - 30)) / 4, 0, 1)).astype(np.uint8)
    assert np.array_equal(with_notes(save(tmp_path / 'x.png', mask), binary_labels=True)[0], mask > 127)


def test_what_looks_like_a_mask_is_noted_without_binary_labels(tmp_path):
    for mask in (grey_edges(), class_map()):
        label, notes = with_notes(save(tmp_path / 'x.png', mask))
        assert np.array_equal(label, mask)
        assert notes == ['labels with a few values in many pieces look like masks or class maps; if each piece is an '
                         'object, give --binary-labels True']                   # the same for all files: said once
    assert with_notes(save(tmp_path / 'x.png', INSTANCES))[1] == []


def test_a_label_without_background_is_noted_unless_one_object_fills_it(tmp_path):
    _, notes = with_notes(save(tmp_path / 'x.png', INSTANCES + 1))
    assert len(notes) == 1 and 'x.png: no pixel is 0, which is the background' in notes[0]
    assert with_notes(save(tmp_path / 'x.png', np.ones((9, 9), np.uint8)))[1] == []


def test_a_label_of_one_channel_is_read_without_a_word_and_other_stacks_are_named(tmp_path):
    for shape in ((1, 96, 96), (96, 96, 1)):
        label, notes = with_notes(save(tmp_path / 'x.npy', INSTANCES.reshape(shape)))
        assert np.array_equal(label, INSTANCES) and notes == []
    for shape in ((96, 96, 6), (3, 96, 96), (96, 96, 3), (2, 1, 96, 96)):
        with pytest.raises(InputError) as refused:
            read_instance_label(save(tmp_path / 'x.npy', np.zeros(shape, np.int32)))
        assert f'has shape {shape}; expected a label of shape (height, width)' in str(refused.value)


# ---------------------------------------------------------------------------------------------------
# GeoJSON
# ---------------------------------------------------------------------------------------------------

def test_label_to_geojson_to_label_is_exact(tmp_path):
    """Objects that touch, with a hole, in several parts, at the border, with gaps in the ids."""
    label = np.zeros((40, 50), np.int32)
    label[0:10, 0:10], label[0:10, 10:20], label[10:12, 5:15] = 7, 3, 12
    label[20:35, 20:40], label[25:30, 25:30], label[27, 27] = 5, 0, 9
    label[38:, 45:], label[37, 44] = 20, 20                                    # joined by a corner
    label[np.random.default_rng(0).random(label.shape) < 0.1] = 30
    export_geojson.write_geojson(tmp_path / 'a.geojson', export_geojson.features(label, 'a'))
    assert np.array_equal(instance_label_from_geojson(tmp_path / 'a.geojson', *label.shape), label)


def feature(kind, coordinates, **properties):
    return {'type': 'Feature', 'geometry': {'type': kind, 'coordinates': coordinates}, 'properties': properties}


def square(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def test_geojson_of_qupath(tmp_path):
    """Annotations and detections, holes, several parts; the first of two wins; points are counted."""
    hole, first = square(4, 4, 6, 6), square(1, 1, 9, 9)
    features = [feature('Polygon', [first, hole], objectType='annotation'),
                feature('Point', [3, 3]), feature('MultiPolygon', [[square(8, 8, 12, 12)], [square(20, 2, 22.4, 4.6)]],
                                                  objectType='detection'), feature('Polygon', [])]
    (tmp_path / 'a.geojson').write_text(json.dumps({'type': 'FeatureCollection', 'features': features}))
    with pytest.warns(UserWarning, match='a.geojson: 1 features are no polygons and were skipped'), \
            pytest.warns(UserWarning, match='a.geojson: 1 of 3 polygons have no pixel of their own'):
        label = instance_label_from_geojson(tmp_path / 'a.geojson', 20, 30)
    expected = np.zeros((20, 30), int)
    expected[8:12, 8:12], expected[2:5, 20:22] = 2, 2
    expected[1:9, 1:9] = 1
    expected[4:6, 4:6] = 0
    assert np.array_equal(label, expected)
    (tmp_path / 'a.json').write_text(json.dumps(features[:1]))                 # as older versions write it
    assert (instance_label_from_geojson(tmp_path / 'a.json', 20, 30) == 1).sum() == 60


@pytest.mark.parametrize('ids, drawn', [((7, 3), [7, 3]), ((7, 7), [1, 2]), ((0, 3), [1, 2]), ((2 ** 31, 3), [1, 2])])
def test_geojson_ids_are_positions_unless_each_object_has_its_own(tmp_path, ids, drawn):
    features = [feature('Polygon', [square(4 * k, 0, 4 * k + 2, 2)], measurements={'id': number})
                for k, number in enumerate(ids)]
    (tmp_path / 'a.json').write_text(json.dumps(features))
    label = instance_label_from_geojson(tmp_path / 'a.json', 2, 6)
    assert [np.unique(part).tolist() for part in np.split(label, 3, axis=1)] == [[drawn[0]], [0], [drawn[1]]]


@pytest.mark.parametrize('content, message', [
    ('{"type": "FeatureCollection", "features": []}', 'a.json holds no polygon; expected a GeoJSON FeatureCollection'),
    ('{"train": ["a"]}', 'a.json holds no polygon'), ('[1]', 'a.json, feature 1: expected a GeoJSON feature'),
    ('[', 'a.json is not JSON'),
    ('[' * 100_000, 'a.json is not JSON'),
    (json.dumps([feature('Polygon', [[[0, 0], [1, float('nan')], [2, 2]]])]), 'feature 1: .* finite coordinates'),
    (json.dumps([feature('Polygon', [[[0], [1], [2]]])]), 'feature 1: .* finite coordinates'),
    (json.dumps([feature('Polygon', [square(50, 50, 60, 60)])]), 'none of its 1 polygons has a pixel in the image'),
])
def test_geojson_that_holds_no_label(tmp_path, content, message):
    (tmp_path / 'a.json').write_text(content)
    with pytest.raises(InputError, match=message):
        instance_label_from_geojson(tmp_path / 'a.json', 20, 30)


def test_what_a_packed_file_unpacks_to_is_bounded(tmp_path):
    with gzip.open(tmp_path / 'a.json.gz', 'wb') as file:
        file.write(b' ' * 3_000_000)
    with pytest.raises(InputError, match='a.json.gz is more than 1 MB unpacked'):
        read_json(tmp_path / 'a.json.gz', at_most=2 ** 20)


@pytest.mark.parametrize('ending', ['.geojson', '.geojson.gz', '_masks.json'])
def test_geojson_is_prepared_as_labels(tmp_path, ending):
    for i in range(3):
        image, label = nuclei(i, 64, 64)
        save(tmp_path / f'images/x{i}.png', image)
        export_geojson.write_geojson(tmp_path / f'labels/x{i}{ending}', export_geojson.features(label, 'a'))
    prepare(['--like', 'MultiOrgan', '--img-dir', str(tmp_path / 'images'), '--label-dir', str(tmp_path / 'labels'),
             '--data-dir', str(tmp_path / 'out'), '--patch-size', '48', '--fractions', '0.4', '0.3', '0.3'])
    made = {path.stem.removesuffix('_label'): path for path in (tmp_path / 'out/labels_instance').rglob('*.png')}
    for i in range(3):
        assert np.array_equal(np.asarray(Image.open(made[f'x{i}'])), nuclei(i, 64, 64)[1])


# ---------------------------------------------------------------------------------------------------
# TIFFs
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [np.int64, np.uint64, np.float64, np.float16])
def test_labels_of_64_bits_and_half_floats_are_read_from_tiffs(tmp_path, dtype):
    assert np.array_equal(read_instance_label(save(tmp_path / 'x.tif', INSTANCES.astype(dtype))), INSTANCES)
    with pytest.raises(InputError, match='more than max_megapixels'):
        read_instance_label(tmp_path / 'x.tif', max_megapixels=0.001)


def test_a_sound_tiff_of_an_unusual_kind_is_not_called_damaged(tmp_path):
    path = save(tmp_path / 'x.tif', IMAGE)
    with tifffile.TiffFile(path) as file:
        place = file.pages[0].tags['Compression'].valueoffset
    content = bytearray(path.read_bytes())
    for code, name in ((33005, 'APERIO_JP2000_RGB'), (34712, 'JPEG2000'), (34887, 'LERC'), (50002, 'JPEGXL'),
                       (50001, 'WEBP')):
        content[place:place + 2] = code.to_bytes(2, 'little')
        path.write_bytes(content)
        with pytest.raises(InputError, match=f'is a TIFF with {name} compression, which is not read; save it') as error:
            read_image(path)
        assert 'damaged' not in str(error.value)


def test_three_grey_pages_are_rgb_where_the_metadata_say_so(tmp_path):
    pages = np.moveaxis(IMAGE, -1, 0)
    tifffile.imwrite(tmp_path / 'imagej.tif', pages, imagej=True, metadata={'axes': 'CYX'})
    tifffile.imwrite(tmp_path / 'ome.ome.tif', pages, metadata={'axes': 'CYX'}, photometric='minisblack')
    for name in ('imagej.tif', 'ome.ome.tif'):
        with pytest.warns(UserWarning, match='three grey pages, which its metadata call channels, are read as RGB'):
            assert np.array_equal(read_image(tmp_path / name), IMAGE)
    tifffile.imwrite(tmp_path / 'plain.tif', pages, photometric='minisblack', metadata=None)
    with pytest.raises(InputError, match='has 3 pages; expected one image per file; .* Image > Type > RGB Color'):
        read_image(tmp_path / 'plain.tif')


# ---------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------

def test_labels_are_found_by_the_endings_of_other_tools(tmp_path):
    endings = ['_mask', '_masks', '_cp_masks', '-labelled', '_GT', '_labels']
    images = [save(tmp_path / f'images/{k}.png', IMAGE) for k in range(len(endings))]
    labels = [save(tmp_path / f'labels/{k}{ending}.png', INSTANCES) for k, ending in enumerate(endings)]
    assert find_labels(images, tmp_path / 'labels') == labels
    with pytest.raises(InputError, match='1 instance labels of images missing in .*labels: a.png; for the first looked '
                                         'for a, a_label, .* with .png .*; saw 0_mask.png'):
        find_labels([*images, save(tmp_path / 'images/a.png', IMAGE)], tmp_path / 'labels')
    save(tmp_path / 'labels/0.png', INSTANCES)
    with pytest.raises(InputError, match='are both named as labels of 0.png; keep one'):
        find_labels(images, tmp_path / 'labels')


def test_a_label_belongs_to_one_image(tmp_path):
    images = [save(tmp_path / f'images/{name}.png', IMAGE) for name in ('a', 'a_GT')]
    labels = [save(tmp_path / f'labels/{name}.png', INSTANCES) for name in ('a_label', 'a_GT')]
    assert find_labels(images, tmp_path / 'labels') == labels
    assert find_labels(images[:1], tmp_path / 'labels') == labels[:1]
    labels[0].unlink()                                            # a_GT is an image: its label is not that of a
    with pytest.raises(InputError, match='1 instance labels of images missing in .*labels: a.png'):
        find_labels(images, tmp_path / 'labels')
    with pytest.raises(InputError, match='1 instance labels of images missing in .*labels: a.png'):
        find_labels(images[:1], tmp_path / 'labels')
    images = [save(tmp_path / f'more/{name}.png', IMAGE) for name in ('x', 'x_cp')]
    save(tmp_path / 'labels/x_cp_masks.png', INSTANCES)
    with pytest.raises(InputError, match='x_cp_masks.png is named as the label of both x.png and x_cp.png; rename it'):
        find_labels(images, tmp_path / 'labels')


def test_images_and_labels_in_one_folder_is_one_line(tmp_path):
    save(tmp_path / 'both/a.png', IMAGE)
    save(tmp_path / 'both/a_masks.png', INSTANCES)
    with pytest.raises(InputError, match='images and labels are both in .*both; move the labels into a folder'):
        find_labels(list_images(tmp_path / 'both'), tmp_path / 'both')


@pytest.fixture
def own(tmp_path):
    """Three images whose names have an accent, decomposed as macOS writes it, and labels with composed names."""
    for i in range(3):
        name = unicodedata.normalize('NFD', f'Färbung_{i}')
        image, label = nuclei(i, 64, 64)
        save(tmp_path / f'images/{name}.png', image)
        save(tmp_path / f'labels/{unicodedata.normalize("NFC", name)}.png', label.astype(np.uint16))
    return tmp_path


@pytest.mark.parametrize('encoding, ending', [('utf-8', ''), ('utf-8-sig', '.png'), ('utf-16', '')])
def test_split_files_as_editors_write_them_and_names_in_either_unicode_form(own, encoding, ending):
    split = {part: [unicodedata.normalize('NFC', f'Färbung_{i}{ending}')]
             for i, part in enumerate(('train', 'val', 'test'))}
    (own / 'split.json').write_text(json.dumps(split, ensure_ascii=False), encoding=encoding)
    prepare(['--like', 'MultiOrgan', '--img-dir', str(own / 'images'), '--label-dir', str(own / 'labels'), '--data-dir',
             str(own / 'out'), '--split', str(own / 'split.json'), '--patch-size', '48'])
    assert [len(list((own / 'out/images' / part).iterdir())) for part in ('train', 'test_same')] == [4, 1]


def test_a_tilde_is_the_home_folder_wherever_it_stands(own, monkeypatch):
    monkeypatch.setenv('HOME', str(own))
    monkeypatch.chdir(own)
    prepare(['--like', 'MultiOrgan', '--img-dir=~/images', '--label-dir', '~/labels', '--data-dir=~/out',
             '--patch-size', '48', '--fractions', '0.5', '0.5', '0'])
    weight_map(['--label-dir=~/labels', '--save-dir', '~/weights'])
    assert (own / 'out/mean_std.npy').is_file() and len(list((own / 'weights').iterdir())) == 3
    assert not Path('~').exists()
