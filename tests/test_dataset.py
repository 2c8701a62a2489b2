"""What is read and what is refused; the training set."""
import itertools
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dataset import DataFolder, EpochBatches, batch_items
from my_transforms import get_transforms
from support.checkpoints import load_mean_std
from support.images import image_size, list_images, read_image, read_instance_label
from support.script import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
IDS = np.array([[0, 1, 1], [7, 0, 200]])


def png_by_hand(path, width, height, bits, pixels, colour=2):
    """An RGB (4: grey and alpha) PNG with the given header and (one row of) pixels, for what Pillow does not write."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>2I5B', width, height, bits, colour, 0, 0, 0))
                     + chunk(b'IDAT', zlib.compress(b'\0' + pixels)) + chunk(b'IEND', b''))


@pytest.mark.parametrize('name, options', [
    ('a.png', {}), ('a.bmp', {}), ('a.ppm', {}), ('a.tif', {}), ('b.tiff', dict(compression='tiff_lzw')),
    ('c.tif', dict(big_tiff=True)),
])
def test_8_bit_rgb_is_taken_as_it_is(tmp_path, name, options, recwarn):
    Image.fromarray(PIXELS).save(tmp_path / name, **options)
    assert (read_image(tmp_path / name) == PIXELS).all() and not recwarn.list


@pytest.mark.parametrize('mode, note', [('L', 'grey image, converted'), ('LA', 'grey image, converted'),
                                        ('P', 'palette image, converted')])
def test_grey_and_palette_images_are_converted_with_a_note(tmp_path, mode, note):
    image = Image.fromarray(PIXELS).convert(mode)
    image.save(tmp_path / 'a.png')
    with pytest.warns(UserWarning, match=note):
        assert (read_image(tmp_path / 'a.png') == np.asarray(image.convert('RGB'))).all()


def test_alpha_is_dropped_with_a_note_if_it_was_not_opaque(tmp_path, recwarn):
    alpha = np.full((12, 17, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)).save(tmp_path / 'opaque.png')
    assert (read_image(tmp_path / 'opaque.png') == PIXELS).all() and not recwarn.list
    alpha[3, 4] = 9
    Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)).save(tmp_path / 'a.png')
    with pytest.warns(UserWarning, match='not fully opaque'):
        assert (read_image(tmp_path / 'a.png') == PIXELS).all()
    palette = Image.fromarray(PIXELS).convert('P')
    palette.save(tmp_path / 'a.png', transparency=palette.getpixel((0, 0)))
    with pytest.warns(UserWarning, match='not fully opaque'):
        assert (read_image(tmp_path / 'a.png') == np.asarray(palette.convert('RGB'))).all()


def test_exif_orientation_is_applied_with_a_note(tmp_path, recwarn):
    exif = Image.Exif()
    exif[0x0112] = 99                                                                # means nothing
    Image.fromarray(PIXELS).save(tmp_path / 'a.png', exif=exif)
    assert (read_image(tmp_path / 'a.png') == PIXELS).all() and not recwarn.list
    for orientation, quarter_turns in ((3, 2), (6, -1)):
        exif[0x0112] = orientation
        Image.fromarray(PIXELS).save(tmp_path / 'a.png', exif=exif)
        with pytest.warns(UserWarning, match=r'turned by its EXIF orientation \(%d\)' % orientation):
            assert (read_image(tmp_path / 'a.png') == np.rot90(PIXELS, quarter_turns)).all()
        assert image_size(tmp_path / 'a.png') == np.rot90(PIXELS, quarter_turns).shape[:2]


def test_first_frame_of_an_animation(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / 'a.png', save_all=True, append_images=[Image.fromarray(255 - PIXELS)])
    with pytest.warns(UserWarning, match='only the first of its 2 frames'):
        assert (read_image(tmp_path / 'a.png') == PIXELS).all()


def test_what_a_file_is_counts_and_not_its_ending(tmp_path, recwarn):
    Image.fromarray(PIXELS).save(tmp_path / 'a.png', format='jpeg')
    assert (read_image(tmp_path / 'a.png') == np.asarray(Image.open(tmp_path / 'a.png'))).all() and not recwarn.list


def test_reduced_pages_of_a_pyramid_are_ignored_and_real_pages_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / 'pyramid.tif') as tiff:
        tiff.write(PIXELS, photometric='rgb')
        tiff.write(PIXELS[::2, ::2], photometric='rgb', subfiletype=1)
    assert (read_image(tmp_path / 'pyramid.tif') == PIXELS).all()
    tifffile.imwrite(tmp_path / 'pages.tif', np.stack([PIXELS, PIXELS]), photometric='rgb', subfiletype=2)
    with pytest.raises(InputError, match='has 2 pages'):
        read_image(tmp_path / 'pages.tif')
    tifffile.imwrite(tmp_path / 'labels.tif', np.zeros((2, 8, 8), np.uint32), photometric='minisblack')
    with pytest.raises(InputError, match='labels.tif has 2 pages; expected one image per file'):
        read_instance_label(tmp_path / 'labels.tif')


def test_16_bit_images_are_refused_unless_scaled(tmp_path):
    png_by_hand(tmp_path / 'a.png', 2, 1, 16, struct.pack('>6H', 0, 1000, 2000, 500, 1500, 3000))
    tifffile.imwrite(tmp_path / 'a.tif', np.array([[[0, 1000, 2000], [500, 1500, 3000]]], np.uint16), photometric='rgb')
    Image.fromarray(np.array([[0, 500]], np.uint16)).save(tmp_path / 'grey.png')
    for name in ('a.png', 'a.tif', 'grey.png'):
        with pytest.raises(InputError, match='has 16 bits per channel, expected 8; give --scale-16bit LO HI'):
            read_image(tmp_path / name)
    for name in ('a.png', 'a.tif'):
        assert read_image(tmp_path / name, scale_16bit=(0, 2000)).tolist() == [[[0, 127, 255], [63, 191, 255]]]
    assert read_image(tmp_path / 'a.tif', scale_16bit=(500, 1500)).tolist() == [[[0, 127, 255], [0, 255, 255]]]
    assert read_image(tmp_path / 'grey.png', scale_16bit=(0, 1000)).tolist() == [[[0] * 3, [127] * 3]]
    png_by_hand(tmp_path / 'alpha.png', 2, 1, 16, struct.pack('>4H', 0, 9, 500, 9), colour=4)
    with pytest.raises(InputError, match='alpha.png has 16 bits per channel, and other channels than grey, RGB or'):
        read_image(tmp_path / 'alpha.png', scale_16bit=(0, 1000))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.array([[0, 500]], np.uint16)).save(tmp_path / 'turned.png', exif=exif)
    with pytest.raises(InputError, match='turned.png has 16 bits per channel and an EXIF orientation; turn its pixels'):
        read_image(tmp_path / 'turned.png', scale_16bit=(0, 1000))


@pytest.mark.parametrize('options', [
    dict(tile=(16, 16)), dict(tile=(16, 16), compression='zlib', predictor=True), dict(planarconfig='separate'),
    dict(planarconfig='separate', tile=(16, 16), bigtiff=True), dict(byteorder='>'), dict(compression='zlib'),
])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_16_bit_tiffs_of_every_layout(tmp_path, channels, options):
    pixels = np.random.default_rng(0).integers(0, 65536, (40, 33, channels)).astype(np.uint16)
    if options.get('planarconfig') and channels == 1:
        options = {name: value for name, value in options.items() if name != 'planarconfig'}
    stored = pixels[..., 0] if channels == 1 else np.moveaxis(pixels, 2, 0) if 'planarconfig' in options else pixels
    tifffile.imwrite(tmp_path / 'a.tif', stored, photometric='minisblack' if channels == 1 else 'rgb', **options)
    expected = np.broadcast_to(pixels[..., :3] / 257, (40, 33, 3))
    found = read_image(tmp_path / 'a.tif', scale_16bit=(0, 65535))
    assert found.dtype == np.uint8 and np.abs(found - expected).max() <= 1


def test_16_bit_images_that_are_not_read(tmp_path):
    (tmp_path / 'rgb.ppm').write_bytes(b'P6 2 1 4095\n' + bytes(12))
    (tmp_path / 'grey.ppm').write_bytes(b'P5 2 1 65535\n' + bytes(4))
    for name, scale in itertools.product(('rgb.ppm', 'grey.ppm'), (None, (0, 4095))):
        with pytest.raises(InputError, match=f'{name} has 16 bits per channel, which are read from PNG and TIFF only'):
            read_image(tmp_path / name, scale_16bit=scale)
    (tmp_path / 'rgb.ppm').write_bytes(b'P6 2 1 100\n' + bytes([0, 50, 100] * 2))
    assert read_image(tmp_path / 'rgb.ppm').tolist() == [[[0, 128, 255]] * 2]
    four = np.zeros((16, 16, 4), np.uint16)
    for name, options in (('strips.tif', {}), ('tiles.tif', {'tile': (16, 16)})):
        tifffile.imwrite(tmp_path / name, four, photometric='separated', **options)
        with pytest.raises(InputError, match=f'{name} has 16 bits per channel, and other channels than grey'):
            read_image(tmp_path / name, scale_16bit=(0, 9))


@pytest.mark.parametrize('dtype, tag, spoil, message', [
    (np.uint16, 'TileByteCounts', lambda values: [0, *values[1:]], 'a strip is missing'),
    (np.uint8, 'TileOffsets', lambda values: [*values[:-1], 2 ** 40], 'pixels beyond the end of the file'),
])
def test_tiles_that_are_not_in_the_file_are_not_taken_for_black(tmp_path, dtype, tag, spoil, message):
    tifffile.imwrite(tmp_path / 'a.tif', np.full((32, 32, 3), 9, dtype), photometric='rgb', tile=(16, 16), bigtiff=True)
    with tifffile.TiffFile(tmp_path / 'a.tif', mode='r+b') as file:
        file.pages[0].tags[tag].overwrite(spoil(file.pages[0].tags[tag].value))
    with pytest.raises(InputError, match=f'a.tif is damaged or truncated .{message}.; copy it again'):
        read_image(tmp_path / 'a.tif', scale_16bit=(0, 9))


@pytest.mark.parametrize('options', [{}, {'tile': (16, 16)}])
def test_16_bit_grey_for_which_0_is_white(tmp_path, options):
    tifffile.imwrite(tmp_path / 'a.tif', np.array([[0, 100]] * 16, np.uint16), photometric='miniswhite', **options)
    assert read_image(tmp_path / 'a.tif', scale_16bit=(0, 100))[0].tolist() == [[255] * 3, [0] * 3]


def first_part(share):
    """A function that writes an image file of which only a part arrived."""
    def make(path):
        Image.fromarray(np.tile(PIXELS, (9, 9, 1))).save(path)
        path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    return make


@pytest.mark.parametrize('name, make, message', [
    ('a.png', first_part(0.5), 'a.png is damaged or truncated.*; copy it again'),
    ('a.jpg', first_part(0.9), 'a.jpg is damaged or truncated'),
    ('a.tif', first_part(0.9), 'a.tif is damaged or truncated'),
    ('a.png', lambda p: p.write_text('hello'), 'a.png is not an image that can be read.*; expected one of .jpg'),
    ('a.png', lambda p: Image.fromarray(PIXELS).save(p, 'EPS'), 'a.png is not an image that'),
    ('a.png', lambda p: Image.fromarray(PIXELS[..., 0] > 99).save(p), 'is a 1-bit image'),
    ('a.tif', lambda p: Image.fromarray(PIXELS[..., 0] > 99).save(p), 'is a 1-bit image'),
    ('a.tif', lambda p: tifffile.imwrite(p, IDS.astype(np.int32)), 'has colour mode I; expected 8-bit RGB'),
    ('a.tif', lambda p: tifffile.imwrite(p, PIXELS[..., 0] / 255), 'is a floating-point image .float64.'),
    ('a.tif', lambda p: Image.fromarray(PIXELS[..., 0].astype(np.float32)).save(p), 'is a floating-point image; exp'),
    ('a.jpg', lambda p: Image.fromarray(PIXELS).convert('CMYK').save(p), 'has colour mode CMYK'),
    ('a.png', lambda p: p.write_bytes(b''), r'is empty \(0 bytes\)'),
    ('a.png', lambda p: p.mkdir(), 'expected a file, found a folder'),
    ('a.png', lambda p: None, 'no such file'),
])
def test_images_that_are_refused(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(InputError, match=message):
        read_image(tmp_path / name)


def test_a_huge_image_is_refused_by_its_header(tmp_path):
    png_by_hand(tmp_path / 'a.png', 200_000, 200_000, 8, b'')
    with pytest.raises(InputError, match='200000 x 200000 = 40000 megapixels, more than max_megapixels = 1000'):
        read_image(tmp_path / 'a.png')


def test_folders(tmp_path):
    with pytest.raises(InputError, match='no such folder'):
        list_images(tmp_path / 'nothing')
    with pytest.raises(InputError, match='no images in .*: looked for .jpg .* saw an empty folder'):
        list_images(tmp_path)
    for name in ('b.PNG', 'a.tif', '.DS_Store', 'notes.txt', '._a.png'):
        (tmp_path / name).touch()
    assert [p.name for p in list_images(tmp_path)] == ['a.tif', 'b.PNG']
    with pytest.raises(InputError, match='expected a folder, found a file'):
        list_images(tmp_path / 'a.tif')
    (tmp_path / 'a.png').touch()
    with pytest.raises(InputError, match='two images of one name in .*: a.png and a.tif; keep one of them'):
        list_images(tmp_path)
    os.rename(tmp_path / 'a.png', os.fsencode(tmp_path) + b'/F\xe4rbung.png')              # as old archives bring it
    with pytest.raises(InputError, match='the name .*rbung.png. is not UTF-8; rename it'):
        list_images(tmp_path)


# ---------------------------------------------------------------------------------------------------
# Instance labels
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, make', [
    ('a.png', lambda p: Image.fromarray(IDS.astype(np.uint8)).save(p)),
    ('a.bmp', lambda p: Image.fromarray(IDS.astype(np.uint8)).save(p)),
    ('a.png', lambda p: Image.fromarray(IDS.astype(np.uint16)).save(p)),
    ('a.tif', lambda p: Image.fromarray(IDS.astype(np.uint16)).save(p)),
    ('a.tif', lambda p: tifffile.imwrite(p, IDS.astype(np.uint32))),
    ('a.tif', lambda p: tifffile.imwrite(p, IDS.astype(np.int16))),
    ('a.tif', lambda p: tifffile.imwrite(p, IDS.astype(np.uint8), photometric='miniswhite')),
    ('a.tif', lambda p: tifffile.imwrite(p, IDS.astype(np.uint16), photometric='miniswhite')),
    ('a.tif', lambda p: tifffile.imwrite(p, IDS.astype(np.uint16), byteorder='>', compression='zlib')),
    ('a.tif', lambda p: tifffile.imwrite(p, IDS.astype(np.int16), byteorder='>', compression='zlib')),
    ('a.tif', lambda p: tifffile.imwrite(p, IDS.astype(np.int32), byteorder='>', compression='zlib', tile=(16, 16))),
    ('a.tif', lambda p: tifffile.imwrite(p, IDS.astype(np.float32), byteorder='>', compression='zlib')),
    ('a.tif', lambda p: Image.fromarray(IDS.astype(np.int32)).save(p, compression='tiff_lzw')),
    ('a.tif', lambda p: tifffile.imwrite(p, IDS.astype(np.uint32), compression='zlib', predictor=True)),
    ('a.tif', lambda p: tifffile.imwrite(p, IDS.astype(np.uint32), byteorder='>')),
    ('a.npy', lambda p: np.save(p, IDS)),
    ('a.npy', lambda p: np.save(p, IDS.astype(float))),
])
def test_integer_labels_are_read_as_they_are(tmp_path, name, make):
    make(tmp_path / name)
    label = read_instance_label(tmp_path / name, (2, 3))
    assert label.dtype == np.int32 and (label == IDS).all()


@pytest.mark.parametrize('bits, row, ids', [(2, b'\x1b', [0, 1, 2, 3]), (4, b'\x01\x2f', [0, 1, 2, 15])])
def test_ids_of_few_bits_are_not_spread(tmp_path, bits, row, ids):
    png_by_hand(tmp_path / 'a.png', 4, 1, bits, row, colour=0)
    assert read_instance_label(tmp_path / 'a.png').tolist() == [ids]


@pytest.mark.parametrize('dtype', [np.uint32, np.int32, np.float32, np.uint64])
def test_big_endian_labels_of_several_pages_or_turned(tmp_path, dtype):
    tifffile.imwrite(tmp_path / 'a.tif', np.stack([IDS, IDS]).astype(dtype), byteorder='>', photometric='minisblack')
    tifffile.imwrite(tmp_path / 'b.tif', IDS.astype(dtype), byteorder='>', extratags=[(274, 3, 1, 3, True)])
    for name, message in (('a.tif', 'pages; expected one image per file'), ('b.tif', 'b.tif has an orientation; turn')):
        with pytest.raises(InputError, match=message):
            read_instance_label(tmp_path / name)


def test_large_ids(tmp_path):
    ids = np.array([[0, 70_000], [1, 2_000_000_000]], np.uint32)
    tifffile.imwrite(tmp_path / 'a.tif', ids)
    assert (read_instance_label(tmp_path / 'a.tif') == ids).all()


def test_indices_of_a_palette_are_the_ids(tmp_path):
    image = Image.fromarray(IDS.astype(np.uint8)).convert('P')
    image.putdata(IDS.astype(np.uint8).ravel().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    for name in ('a.png', 'a.bmp'):
        image.save(tmp_path / name)
        assert (read_instance_label(tmp_path / name) == IDS).all()


def test_equal_channels_empty_labels_and_masks(tmp_path):
    Image.fromarray(np.repeat(IDS[..., None], 3, axis=2).astype(np.uint8)).save(tmp_path / 'rgb.png')
    with pytest.warns(UserWarning, match='three equal channels'):
        assert (read_instance_label(tmp_path / 'rgb.png') == IDS).all()
    Image.new('L', (4, 4)).save(tmp_path / 'empty.png')
    with pytest.warns(UserWarning, match='the label has no object'):
        assert read_instance_label(tmp_path / 'empty.png').max() == 0
    Image.fromarray(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 0], [255, 0, 0]], np.uint8)).save(tmp_path / 'mask.png')
    with pytest.raises(InputError, match='holds only 0 and 255, .* give --binary-labels'):
        read_instance_label(tmp_path / 'mask.png')
    assert read_instance_label(tmp_path / 'mask.png', binary_labels=True).tolist() == \
        [[1, 0, 0], [0, 1, 0], [0, 0, 0], [2, 0, 0]]
    for one in (np.uint8(1), np.True_):                                  # masks of 0 and 1, and of one bit
        Image.fromarray((np.eye(3)[[0, 2]] > 0) * one).save(tmp_path / 'one.png')
        with pytest.warns(UserWarning, match='look like masks or class maps; .* give --binary-labels True'):
            assert read_instance_label(tmp_path / 'one.png').tolist() == [[1, 0, 0], [0, 0, 1]]
        assert read_instance_label(tmp_path / 'one.png', binary_labels=True).tolist() == [[1, 0, 0], [0, 0, 2]]
    Image.fromarray(IDS.astype(np.uint8)).save(tmp_path / 'ids.png')
    assert (read_instance_label(tmp_path / 'ids.png', binary_labels=True) == IDS).all()


@pytest.mark.parametrize('name, make, message', [
    ('a.png', lambda p: Image.fromarray(PIXELS).save(p), 'is a colour image; expected one integer id per pixel'),
    ('a.png', lambda p: Image.fromarray(PIXELS).convert('RGBA').save(p), 'has colour mode RGBA'),
    ('a.png', lambda p: png_by_hand(p, 2, 1, 16, bytes(range(12))), 'is a colour image of 16 bits'),
    ('a.jpg', lambda p: Image.fromarray(PIXELS).save(p), 'is a JPEG'),
    ('a.png', lambda p: Image.fromarray(PIXELS).save(p, 'JPEG'), 'is a JPEG'),
    ('a.npy', lambda p: np.save(p, IDS + 0.5), 'holds fractional or non-finite values; expected integer ids'),
    ('a.npy', lambda p: np.save(p, IDS + np.inf), 'fractional or non-finite'),
    ('a.npy', lambda p: np.save(p, IDS + 1j), 'holds complex128 values'),
    ('a.npy', lambda p: np.save(p, IDS[0]), r'has shape \(3,\); expected.*\(height, width\)'),
    ('a.npy', lambda p: np.save(p, IDS[:0]), r'a.npy has no pixel, shape \(0, 3\)'),
    ('a.npy', lambda p: np.save(p, -IDS), 'holds negative ids'),
    ('a.tif', lambda p: tifffile.imwrite(p, np.array([[-3, 0, 4]], np.int8)), 'holds negative ids'),
    ('a.tif', lambda p: tifffile.imwrite(p, -IDS.astype(np.int16)), 'holds negative ids'),
    ('a.tif', lambda p: Image.fromarray(IDS.astype(np.uint8)).save(p, compression='tiff_lzw', tiffinfo={262: 0}),
     'a TIFF whose kind and compression are not supported together; save it uncompressed'),
    ('a.npy', lambda p: np.save(p, IDS * 10 ** 9), 'holds ids above 2147483647'),
    ('a.npy', lambda p: np.save(p, np.array([{}], dtype=object), allow_pickle=True), 'is not a plain NumPy array'),
    ('a.npy', lambda p: None, 'no such file'),
    ('a.png', lambda p: Image.fromarray(IDS.astype(np.uint8)).resize((9, 9)).save(p), 'is 9 x 9 pixels, its image 3'),
])
def test_labels_that_are_refused(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(InputError, match=message):
        read_instance_label(tmp_path / name, (2, 3))


# ---------------------------------------------------------------------------------------------------
# Training set
# ---------------------------------------------------------------------------------------------------

@pytest.fixture
def folders(tmp_path):
    for k, (folder, ending, mode) in enumerate((('images', '', 'RGB'), ('weights', '_weight', 'L'),
                                                ('labels', '_label', 'RGB'))):
        (tmp_path / folder).mkdir()
        for name in ('x_1', 'x.y_2'):
            Image.new(mode, (20, 16), 10 * (k + 1) if mode == 'L' else (200, 0, k)).save(
                tmp_path / folder / f'{name}{ending}.png')
    return [tmp_path / 'images', tmp_path / 'weights', tmp_path / 'labels']


POST_FIX = ['weight.png', 'label.png']


def test_items_are_image_weight_map_and_label(folders):
    dataset = DataFolder(folders, POST_FIX, [3, 1, 3])
    assert len(dataset) == 2 and dataset.names == ['x.y_2.png', 'x_1.png']
    image, weight, label = dataset[1]
    assert (image.mode, weight.mode, label.mode) == ('RGB', 'L', 'RGB') and weight.getpixel((0, 0)) == 20
    tensors = DataFolder(folders, POST_FIX, [3, 1, 3], get_transforms({'label_encoding': 1, 'to_tensor': 1}))[0]
    assert [tuple(t.shape) for t in tensors] == [(3, 16, 20), (1, 16, 20), (1, 16, 20)]
    assert tensors[1].dtype == torch.int64


def test_missing_and_unmatched_partners_are_named(folders):
    (folders[1] / 'x_1_weight.png').unlink()
    with pytest.raises(InputError, match='1 partners of images missing in .*weights: x_1_weight.png; run prepare_data'):
        DataFolder(folders, POST_FIX, [3, 1, 3])
    Image.new('L', (20, 16)).save(folders[1] / 'x_1_weight.png')
    (folders[1] / '._x_1_weight.png').write_bytes(b'macOS')                              # copied there with the files
    DataFolder(folders, POST_FIX, [3, 1, 3])
    Image.new('L', (20, 16)).save(folders[1] / 'z_weight.png')
    with pytest.raises(InputError, match='1 files in .*weights have no image in .*images: z_weight.png'):
        DataFolder(folders, POST_FIX, [3, 1, 3])
    with pytest.raises(ValueError, match='3 folders, 1 post-fixes, 3 channels'):
        DataFolder(folders, ['label.png'], [3, 1, 3])


def test_a_partner_of_another_size(folders):
    Image.new('L', (20, 15)).save(folders[1] / 'x_1_weight.png')
    with pytest.raises(InputError, match='x_1_weight.png is 20 x 15 pixels, its image 20 x 16; run prepare_data'):
        DataFolder(folders, POST_FIX, [3, 1, 3])[1]


def test_a_sample_depends_on_index_seed_and_epoch_alone(folders):
    dataset = DataFolder(folders, POST_FIX, [3, 1, 3], get_transforms({'random_crop': 8, 'random_affine': 0.3,
                                                                       'to_tensor': 1}))
    first = dataset[0, 5, 1]
    dataset[1, 5, 1], torch.rand(3), np.random.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first, dataset[0, 5, 1]))
    others = [dataset[0, 5, 2], dataset[0, 6, 1], dataset[1, 5, 1]]                    # of pictures that are equal
    assert all(not torch.equal(first[0], other[0]) for other in others)


def test_batches_are_a_new_order_each_epoch_and_can_start_in_the_middle():
    batches = EpochBatches(10, 4, seed=3)
    assert len(batches) == 3

    def take(batches, n):
        return list(itertools.islice(batches, n))
    two = take(batches, 6)
    for k, epoch in enumerate((two[:3], two[3:])):
        assert [len(b) for b in epoch] == [4, 4, 2]
        assert {key[1:] for batch in epoch for key in batch} == {(3, k)}                     # seed and epoch
        assert sorted(key[0] for batch in epoch for key in batch) == list(range(10))
    assert [key[0] for batch in two[:3] for key in batch] != [key[0] for batch in two[3:] for key in batch]
    batches.start_at(0, 1)
    assert take(batches, 5) == two[1:]
    batches.start_at(1, 0)
    assert take(batches, 3) == two[3:]
    assert take(EpochBatches(10, 4, seed=3), 3) == two[:3]
    other = take(EpochBatches(10, 4, seed=4), 3)
    assert [key[0] for batch in other for key in batch] != [key[0] for batch in two[:3] for key in batch]
    assert [len(batch) for batch in take(EpochBatches(3, 50, seed=3), 2)] == [3, 3]          # more than there are


def test_a_batch_is_sent_in_few_bytes_with_its_instances():
    label = torch.tensor([[[1, 1, 0], [0, 0, 2], [1, 0, 0]]])
    items = [(torch.rand(3, 3, 3), torch.full((1, 3, 3), 220), label), (torch.rand(3, 3, 3), label * 20, label.flip(2))]
    image, weight, target, instances = batch_items(items)
    assert image.dtype == torch.float32 and torch.equal(image[1], items[1][0])
    assert weight.dtype == target.dtype == torch.uint8 and instances.dtype == torch.int32
    assert torch.equal(weight[0].long(), items[0][1][0]) and torch.equal(target[1].long(), items[1][2][0])
    assert instances.tolist() == [[[1, 1, 0], [0, 0, 0], [2, 0, 0]], [[0, 1, 1], [0, 0, 0], [0, 0, 2]]]


@pytest.mark.parametrize('make, message', [
    (lambda p: np.save(p, np.zeros((3, 2))), r'float64 of shape \(3, 2\); expected finite floats of shape \(2, 3\)'),
    (lambda p: np.save(p, np.zeros((2, 3), int)), 'holds int64'),
    (lambda p: np.save(p, np.full((2, 3), np.nan)), 'expected finite floats'),
    (lambda p: np.save(p, [[0.5] * 3, [0.1, 0, 0.1]]), 'has a standard deviation of 0 or less'),
    (lambda p: np.save(p, [[190.] * 3, [40.] * 3]), 'mean_std.npy holds values from 40 to 190; expected colour values'),
    (lambda p: np.save(p, [[-0.5] * 3, [0.1] * 3]), 'mean_std.npy holds values from -0.5 to 0.1; expected'),
    (lambda p: p.write_text('0.5 0.5 0.5'), 'is not a plain NumPy array'),
    (lambda p: None, 'no .*mean_std.npy; prepare_data.py writes it'),
])
def test_mean_std_that_are_refused(tmp_path, make, message):
    make(tmp_path / 'mean_std.npy')
    with pytest.raises(InputError, match=message):
        load_mean_std(tmp_path / 'mean_std.npy')
