"""Feed damaged files to the readers: what they read has to be an image, a label, ..., or they refuse it with one line.

    python scripts/fuzz.py all --count 2000 --keep findings

Readers: image, label, xml, checkpoint. The files are made here, from small valid ones of every format that the readers
know, and damaged by a seeded generator: the same --seed makes the same files, but for checkpoints: PyTorch's older
format orders tensors by where they lie in memory. They are read in a second process, which is started again after a
crash. A finding is another exception than InputError, a message of several lines, a wrong result, the end of the
process, more than 5 s of processor time, or more than 1 GB of memory. Exit code 1 if there are findings.
"""
import argparse
import faulthandler
import functools
import io
import itertools
import multiprocessing
import os
import re
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image
from scipy.io import savemat
from tqdm import tqdm

try:
    import resource
except ImportError:                  # Windows: memory is not limited there
    resource = None

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from FullNet import create_model  # noqa: E402
from prepare_data import instance_label_from_xml  # noqa: E402
from support.checkpoints import load_checkpoint, load_weights, save_checkpoint  # noqa: E402
from support.images import image_size, read_image, read_instance_label  # noqa: E402
from support.script import InputError, Parser, run_script  # noqa: E402

SECONDS = 5.0                        # of processor time for one file: other work on the machine does not count
PATIENCE = 60.0                      # seconds until a process that does not answer is ended
MEGABYTES = 1000                     # above what the process held before the file
# Bytes of address space above the start; what asks for more gets a MemoryError, which is a finding. Above the 4 GB that
# read() of a 32-bit length reserves, and does not touch, for a damaged length.
GUARD = 5 * 2 ** 30
FILES_PER_FINDING = 3                # of those that fail in the same place, this many are kept
MODEL = dict(name='FullNet', in_c=3, out_c=3, n_layers=4, growth_rate=2, compress_ratio=0.5, drop_rate=0.0,
             dilations=(1,), is_hybrid=True, layer_type='basic')


# ---------------------------------------------------------------------------------------------------
# Readers, and what they have to return
# ---------------------------------------------------------------------------------------------------

class WrongResult(Exception):
    """A reader returned something else than it promises."""


def read_image_file(path):
    """`read_image`, 16 bits allowed. Raises WrongResult unless it is uint8 RGB of the size that `image_size` tells."""
    size = image_size(path)
    image = read_image(path, scale_16bit=(0, 65535))
    check_array(image, np.uint8)
    if image.shape != (*size, 3):
        raise WrongResult(f'shape {image.shape}, but image_size is {size}')


def read_label_file(path):
    """`read_instance_label`. Raises WrongResult unless it is int32 (H, W) of ids from 0 on."""
    check_label(read_instance_label(path))


def read_xml_file(path):
    """`instance_label_from_xml`. Raises WrongResult unless it is int32 (48, 64) of ids from 0 on."""
    label = instance_label_from_xml(path, 48, 64)
    check_label(label)
    if label.shape != (48, 64):
        raise WrongResult(f'shape {label.shape} instead of (48, 64)')


def read_checkpoint_file(path):
    """`load_checkpoint` and `load_weights`. Raises WrongResult unless all weights are then finite float32."""
    model = create_model(**MODEL)
    load_weights(model, load_checkpoint(path)['state_dict'], MODEL, path)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            check_array(value.numpy(), np.float32, name)


def check_label(label):
    """Raises WrongResult unless `label` is int32 (H, W) without negative ids."""
    check_array(label, np.int32)
    if label.ndim != 2 or label.min(initial=0) < 0:
        raise WrongResult(f'label of shape {label.shape}, minimum {label.min(initial=0)}')


def check_array(array, dtype, name='result'):
    """Raises WrongResult unless `array` is an array of `dtype` of finite values."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        raise WrongResult(f'{name} is {getattr(array, "dtype", type(array).__name__)} instead of {np.dtype(dtype)}')
    if not np.isfinite(array).all():
        raise WrongResult(f'{name} holds NaN or infinite values')


# ---------------------------------------------------------------------------------------------------
# Valid files
# ---------------------------------------------------------------------------------------------------

def image_seeds(folder):
    """Write a small image in each format that is read."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (40, 36, 3), np.uint8)
    deep = rng.integers(0, 65536, (40, 36), np.uint16)
    picture = Image.fromarray(rgb)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, options in [('rgb.png', {}), ('rgb.jpg', {}), ('progressive.jpg', {'progressive': True}),
                          ('exif.jpg', {'exif': turned}), ('exif.png', {'exif': turned}), ('rgb.bmp', {}),
                          ('rgb.ppm', {}), ('plain.tif', {}), ('lzw.tif', {'compression': 'tiff_lzw'}),
                          ('deflate.tif', {'compression': 'tiff_adobe_deflate'}), ('jpeg.tif', {'compression': 'jpeg'}),
                          ('pages.tif', {'save_all': True, 'append_images': [picture]}),
                          ('animated.png', {'save_all': True, 'append_images': [picture.rotate(180)]})]:
        picture.save(folder / name, **options)
    picture.convert('P').save(folder / 'palette.png', transparency=3)
    picture.convert('P').save(folder / 'palette.bmp')
    picture.convert('L').save(folder / 'grey.jpg')
    picture.convert('LA').save(folder / 'grey_alpha.png')
    Image.fromarray(np.dstack([rgb, rgb[..., 0]])).save(folder / 'rgba.png')
    Image.fromarray(deep).save(folder / 'grey16.png')
    tifffile.imwrite(folder / 'grey16.tif', deep)
    tifffile.imwrite(folder / 'rgb16.tif', np.dstack([deep] * 3), photometric='rgb')
    (folder / 'rgb16.png').write_bytes(png_of_16_bits(np.dstack([deep] * 3)))
    tifffile.imwrite(folder / 'tiled16.tif', np.dstack([deep] * 3), photometric='rgb', tile=(16, 16))
    tifffile.imwrite(folder / 'tiled.tif', rgb, photometric='rgb', tile=(16, 16))
    tifffile.imwrite(folder / 'big.tif', rgb, photometric='rgb', bigtiff=True)
    with tifffile.TiffWriter(folder / 'pyramid.tif') as writer:
        writer.write(rgb, photometric='rgb')
        writer.write(rgb[::2, ::2], photometric='rgb', subfiletype=1)


def png_of_16_bits(array):
    """An RGB PNG of 16 bits of a uint16 (H, W, 3) array, which Pillow does not write: bytes."""
    height, width, _ = array.shape
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in array)
    return b'\x89PNG\r\n\x1a\n' + b''.join(png_chunk(kind, body) for kind, body in (
        (b'IHDR', struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)),
        (b'IDAT', zlib.compress(rows)), (b'IEND', b'')))


def png_chunk(kind, body):
    """A chunk of a PNG with its length and checksum, bytes."""
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def label_seeds(folder):
    """Write a small instance label in each format that is read."""
    label = np.kron(np.arange(12).reshape(3, 4), np.ones((12, 10), int))
    Image.fromarray(label.astype(np.uint8)).save(folder / '8bit.png')
    Image.fromarray(label.astype(np.uint16)).save(folder / '16bit.png')
    Image.fromarray(np.dstack([label.astype(np.uint8)] * 3)).save(folder / 'rgb.png')
    palette = Image.fromarray(label.astype(np.uint8)).convert('P')
    palette.save(folder / 'palette.png')
    palette.save(folder / 'palette.bmp')
    for name, dtype, options in [('32bit.tif', np.uint32, {}), ('zlib.tif', np.uint32, {'compression': 'zlib'}),
                                 ('16bit.tif', np.uint16, {}), ('tiled.tif', np.uint32, {'tile': (16, 16)})]:
        tifffile.imwrite(folder / name, label.astype(dtype), photometric='minisblack', **options)
    np.save(folder / 'int32.npy', label.astype(np.int32))
    np.save(folder / 'float64.npy', np.asfortranarray(label.astype(np.float64)))
    for name, contents, options in [('plain.mat', {'inst_map': label.astype(np.int32)}, {}),
                                    ('compressed.mat', {'inst_map': label.astype(float), 'other': 'text'},
                                     {'do_compression': True}),
                                    ('version4.mat', {'inst_map': label.astype(float)}, {'format': '4'})]:
        (folder / name).write_bytes(mat_file(contents, **options))


def mat_file(contents, **options):
    """The bytes of a MATLAB file. Version 5 begins with 116 bytes of text, in which SciPy writes the time of day."""
    buffer = io.BytesIO()
    savemat(buffer, contents, **options)
    data = buffer.getvalue()
    return data if options.get('format') == '4' else b'MATLAB 5.0 MAT-file'.ljust(116) + data[116:]


def xml_seeds(folder):
    """Write two small ImageScope annotations."""
    rng = np.random.default_rng(0)
    regions = []
    for number in range(1, 7):
        angle = np.linspace(0, 6.28, 3 + number)
        vertices = np.stack([np.cos(angle), np.sin(angle)], 1) * 9 + rng.uniform(0, 60, 2)
        points = ''.join(f'<Vertex X="{x:.4f}" Y="{y:.4f}" Z="0"/>' for x, y in vertices)
        regions.append(f'   <Region Id="{number}" Type="0" Zoom="0.5" Text="">\n    <Attributes/>\n'
                       f'    <Vertices>{points}</Vertices>\n   </Region>\n')
    document = ('<Annotations MicronsPerPixel="0.252">\n <Annotation Id="1" Name="" LineColor="65280">\n  <Regions>\n'
                f'{"".join(regions)}  </Regions>\n  <Plots/>\n </Annotation>\n</Annotations>\n')
    (folder / 'declared.xml').write_text('<?xml version="1.0" encoding="UTF-8"?>\n' + document, encoding='utf-8')
    (folder / 'utf16.xml').write_text('<?xml version="1.0" encoding="UTF-16"?>\n' + document, encoding='utf-16')
    (folder / 'bare.xml').write_text(document, encoding='utf-8')


def checkpoint_seeds(folder):
    """Write checkpoints of a tiny FullNet: ours, half precision, published (NumPy scalar, Adam), the older format."""
    torch.manual_seed(0)
    model = create_model(**MODEL)
    weights = model.state_dict()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    published = {'epoch': 3, 'state_dict': {f'module.{key}': value for key, value in weights.items()},
                 'best_iou': np.float64(0.5), 'optimizer': optimizer.state_dict()}
    save_checkpoint(folder / 'ours.pth', {'epoch': 1, 'state_dict': weights, 'best_iou': 0.5,
                                          'options': {'dataset': 'MultiOrgan', 'model': MODEL, 'train': {},
                                                      'transform': {}}})
    half = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    torch.save({'state_dict': half}, folder / 'half.pth')
    torch.save(published, folder / 'published.pth.tar')
    torch.save(published, folder / 'older.pth.tar', _use_new_zipfile_serialization=False)


# ---------------------------------------------------------------------------------------------------
# Damage to any file
# ---------------------------------------------------------------------------------------------------

def position(data, rng):
    """An offset into `data`; every other one among the first 200 bytes, where headers are."""
    return int(rng.integers(min(len(data), 200 if rng.random() < 0.5 else len(data)) + 1))


def block(data, rng):
    """(start, end) of a part of `data`, short ones more often."""
    start = position(data, rng)
    return start, min(len(data), start + int(2 ** rng.uniform(0, np.log2(len(data) + 2))))


def flip_bytes(data, other, rng):
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 9)) if data else 0):
        at = min(position(data, rng), len(data) - 1)
        data[at] ^= int(rng.integers(1, 256)) if rng.random() < 0.5 else 1 << int(rng.integers(8))
    return bytes(data)


def truncate(data, other, rng):
    return data[:position(data, rng)]


def delete_block(data, other, rng):
    start, end = block(data, rng)
    return data[:start] + data[end:]


def repeat_block(data, other, rng):
    start, end = block(data, rng)
    return data[:end] + data[start:end] * int(rng.integers(1, 4)) + data[end:]


def swap_blocks(data, other, rng):
    a, b, c, d = sorted(position(data, rng) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def edit_integer(data, other, rng):
    """Overwrite 1, 2, 4 or 8 bytes, of either byte order, with a number that programs stumble over."""
    size = int(rng.choice([1, 2, 4, 8]))
    bits = 8 * size
    values = [0, 1, 2, 3, 7, 16, 255, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2 ** bits - 1, 2 ** bits - 2,
              10_000, 30_000, 65_535, 100_000, int(rng.integers(2 ** 31))]
    value = values[rng.integers(len(values))] % 2 ** bits
    at = position(data, rng)
    return data[:at] + value.to_bytes(size, 'little' if rng.random() < 0.5 else 'big') + data[at + size:]


def edit_digits(data, other, rng):
    """Replace a number written in digits, as headers of PPM and .npy have them."""
    numbers = list(re.finditer(rb'\d+', data[:4000]))
    if not numbers:
        return data
    found = numbers[rng.integers(len(numbers))]
    values = [b'0', b'-1', b'1', b'255', b'256', b'65535', b'30000', b'99999', b'2147483648', b'9' * 19, b'9' * 400,
              b'1.5', b'1e9', b'nan', b'0x10', b'']
    return data[:found.start()] + values[rng.integers(len(values))] + data[found.end():]


def splice(data, other, rng):
    """The head of one file and the tail of another."""
    return data[:position(data, rng)] + other[position(other, rng):]


def change_start(data, other, rng):
    """The first bytes of another file, by which programs tell formats apart."""
    n = int(rng.integers(1, 17))
    return other[:n] + data[n:]


ANY_FILE = (flip_bytes, flip_bytes, truncate, delete_block, repeat_block, swap_blocks, edit_integer, edit_integer,
            edit_integer, edit_digits, splice, change_start)


# ---------------------------------------------------------------------------------------------------
# Damage that knows the format: it gets past checksums and into what lies behind
# ---------------------------------------------------------------------------------------------------

def edit_png(data, other, rng):
    """Damage one chunk, or what its compressed data hold, and write its length and checksum anew."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size, kind = struct.unpack('>I4s', data[at:at + 8])
        chunks.append([kind, data[at + 8:at + 8 + size]])
        at += 12 + size
    k = int(rng.integers(len(chunks)))
    kind, body = chunks[k]
    if kind == b'IDAT' and rng.random() < 0.7:
        try:
            body = zlib.compress(damage(zlib.decompress(body), other, rng))
        except zlib.error:           # one of several chunks
            body = damage(body, other, rng)
    else:
        body = damage(body, other, rng)
    names = [b'IHDR', b'PLTE', b'tRNS', b'eXIf', b'acTL', b'fcTL', b'iCCP', b'zTXt', b'iTXt', b'gAMA', b'pHYs', b'cHRM']
    new = [names[rng.integers(len(names))] if rng.random() < 0.2 else kind, body]
    chunks[k:k + (rng.random() < 0.8)] = [new]         # at times beside the old one
    return data[:8] + b''.join(png_chunk(*chunk) for chunk in chunks)


def edit_tiff(data, other, rng):
    """Change tag, type, count or value of an entry of the first directory; classic TIFF only, others as any file."""
    order = {b'II*\0': '<', b'MM\0*': '>'}.get(data[:4])
    if not order:
        return damage(data, other, rng)
    start, = struct.unpack(order + 'I', data[4:8])
    if start + 2 > len(data):                          # the directory was cut off
        return damage(data, other, rng)
    count, = struct.unpack(order + 'H', data[start:start + 2])
    at = start + 2 + 12 * int(rng.integers(max(count, 1)))
    offset, size = [(0, 2), (2, 2), (4, 4), (8, 4), (8, 2), (8, 4), (8, 2)][rng.integers(7)]
    tags = [254, 256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338,
            339, 347, 700]
    numbers = [0, 1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 10_000, 65_535, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, len(data)]
    choices = {0: tags, 2: range(20)}.get(offset, numbers)
    value = choices[int(rng.integers(len(choices)))] % 2 ** (8 * size)
    return data[:at + offset] + struct.pack(order + ('H' if size == 2 else 'I'), value) + data[at + offset + size:]


def edit_array(data, other, rng):
    """A .npy or .mat file of another kind of array: data type, dimensions, values."""
    shape = [(), (0,), (5,), (4, 5), (4, 5), (4, 5, 1), (4, 5, 3), (2, 4, 5), (0, 5), (1, 1, 1, 1)][rng.integers(10)]
    dtype = ['bool', 'int8', 'uint16', 'int64', 'uint64', '>i4', 'float16', 'float32', 'float64', 'complex64', 'S3',
             'U3', 'datetime64[s]', [('id', 'i4'), ('x', 'f8')], 'V4', 'longdouble'][rng.integers(16)]
    values = np.frombuffer(rng.bytes(64 * 60), np.uint8)
    array = np.zeros(shape, dtype)
    if rng.random() < 0.6 and array.dtype.kind not in 'U':
        array = np.ndarray(shape, dtype, values.tobytes()).copy()
    elif array.dtype.kind in 'iufc':
        numbers = [1, 127, 255, 2 ** 31, -1] + [np.nan, np.inf, 0.5, 2 ** 62] * (array.dtype.kind in 'fc')
        with np.errstate(all='ignore'):
            array[...] = np.array(numbers[rng.integers(len(numbers))]).astype(dtype)
    buffer = io.BytesIO()
    if data[:6] == b'\x93NUMPY':
        np.save(buffer, array)
    else:
        if rng.random() < 0.3:       # a cell, a structure, a sparse matrix
            from scipy.sparse import csc_array
            array = [np.array([1, 'a'], object), {'field': np.arange(3)}, csc_array(np.eye(4))][rng.integers(3)]
        if isinstance(array, np.ndarray) and array.dtype.kind in 'MV':
            return damage(data, other, rng)            # savemat has no such types
        with np.errstate(all='ignore'):                # what float64 does not hold
            buffer.write(mat_file({'inst_map': array}, do_compression=bool(rng.random() < 0.5)))
    return buffer.getvalue()


def edit_xml(data, other, rng):
    """Change numbers, attributes, elements, nesting, the declaration or the encoding of an XML document."""
    text = data.decode('utf-16' if data[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8', errors='replace')
    tag = _choose(re.finditer(r'<[^<>]*>', text), rng)
    number = _choose(re.finditer(r'(?<=")[-\d.]+(?=")', text), rng)
    attribute = _choose(re.finditer(r' \w+="[^"]*"', text), rng)
    numbers = ['', 'nan', '-nan', 'inf', '1e309', '1e308', '-1e308', '1e-320', '-5', '1,5', '0x10', '1_000', '٣',
               '9' * 5000, ' 12 ', '12px', '&amp;', '&lol;', '&#0;', '&#x41;', '\n3', '\x00', '2147483648']
    depth = int(10 ** rng.uniform(1, 4.7))
    encodings = ['utf-8', 'utf-16', 'utf-32', 'latin-1', 'ascii', 'cp1252', 'cp037', 'big5', 'shift_jis', 'idna', 'hex',
                 'nonsense', 'utf-7', 'punycode', 'undefined', 'rot13', '\u00e4']
    dtd = ['<!DOCTYPE a>', '<!DOCTYPE a SYSTEM "file:///etc/passwd">',
           '<!DOCTYPE a [<!ENTITY lol "lol"><!ENTITY lol2 "&lol;&lol;">]>']
    insertions = ['<!-- ' + 'x' * depth + ' -->', '<![CDATA[ <Region> ]]>', '<?target data?>', 'text', '&lol;',
                  '<Vertex/>', '<Region>', '</Region>', '<Vertices>', '<Vertex X="1" X="2" Y="3"/>', '\ud800',
                  '<x:Region xmlns:x="y">', '<\u00e9l\u2028\x85ment/>',
                  '<Region><Vertices/></Region>' * min(depth, 3000)]
    kind = rng.integers(12)
    if kind < 3 and number:
        text = _replace(text, number, numbers[rng.integers(len(numbers))])
    elif kind == 3 and attribute:
        text = _replace(text, attribute, ['', attribute[0] * 2, attribute[0].lower(), attribute[0].replace('"', "'")]
                        [rng.integers(4)])
    elif kind == 4 and tag:
        text = _replace(text, tag, ['', tag[0] * 2, tag[0].lower(), tag[0].replace('<', '</'),
                                    tag[0].replace('>', '/>')][rng.integers(5)])
    elif kind == 5 and tag:
        text = _replace(text, tag, '<a>' * depth + '</a>' * depth + tag[0])
    elif kind == 6 and tag:
        text = _replace(text, tag, tag[0] + insertions[rng.integers(len(insertions))])
    elif kind == 7:
        text = re.sub(r'<(/?)Annotations\b', lambda m: f'<{m[1]}' + ['Root', 'annotations', 'A\u2028B', 'A' * depth]
                      [depth % 4], text)
    elif kind == 8:
        head, body = re.match(r'(<\?.*?\?>)?(.*)', text, re.S).groups(default='')
        text = head + dtd[rng.integers(len(dtd))] + body
    elif kind == 9:
        declared = encodings[rng.integers(len(encodings))]
        text = f'<?xml version="1.0" encoding="{declared}"?>' + re.sub(r'^\s*<\?.*?\?>', '', text)
    elif kind == 10 and tag:
        other_tag = _choose(re.finditer(r'<[^<>]*>', text), rng)
        text = _replace(text, tag, other_tag[0])
    else:
        declared = encodings[rng.integers(7)]
        return text.encode(declared, errors='replace')
    return text.encode('utf-16' if data[:2] == b'\xff\xfe' else 'utf-8', errors='surrogatepass')


def _choose(matches, rng):
    """One of the matches of a pattern, or None."""
    matches = list(matches)
    return matches[rng.integers(len(matches))] if matches else None


def _replace(text, match, new):
    return text[:match.start()] + new + text[match.end():]


def edit_checkpoint(data, other, rng):
    """Damage one entry of the zip archive, with its checksum written anew, or save other values than weights."""
    if rng.random() < 0.5 or data[:2] != b'PK':
        return edit_weights(data, other, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(item.filename, archive.read(item)) for item in archive.infolist()]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError, zlib.error):
        return damage(data, other, rng)                # damaged before: no archive any more
    if not entries:
        return damage(data, other, rng)
    k = int(rng.integers(len(entries)))
    if rng.random() < 0.6:           # the pickle, which says what is where
        k = next((i for i, (name, _) in enumerate(entries) if name.endswith('data.pkl')), k)
    name, body = entries[k]
    names = [name, name + 'x', 'archive/version', 'archive/byteorder', '../outside', 'archive/data/9999', 'data.pkl',
             'constants.pkl', '/']
    action = rng.integers(8)
    if action == 0:
        entries[k:k + 1] = []
    elif action == 1:
        entries[k] = names[rng.integers(len(names))], body
    elif action == 2:
        entries.append((names[rng.integers(len(names))], body))
    elif action == 3:
        entries[k] = name, [b'', b'big', b'\0' * 8, body * 2, body[:len(body) // 2]][rng.integers(5)]
    else:
        entries[k] = name, damage(body, other, rng)
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED if rng.random() < 0.1 else
                                                    zipfile.ZIP_STORED) as archive:
        warnings.simplefilter('ignore')                # two entries of one name are what is wanted
        for name, body in entries:
            entry = zipfile.ZipInfo(name)              # without the time of day
            entry.compress_type = archive.compression
            archive.writestr(entry, body)
    return buffer.getvalue()


@functools.cache
def tiny_weights():
    """The state_dict that `edit_weights` starts from."""
    torch.manual_seed(0)
    return create_model(**MODEL).state_dict()


def edit_weights(data, other, rng):
    """A checkpoint that is well-formed, but in which one thing is not what a checkpoint holds."""
    weights = {f'module.{key}': value.clone() for key, value in tiny_weights().items()}
    key = list(weights)[rng.integers(len(weights))]
    value = weights[key]
    number = [np.nan, np.inf, -np.inf, 3e38, 1e300][rng.integers(5)]
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64,
              torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint64]
    values = [lambda: value.double() * number, lambda: torch.full(value.shape, number, dtype=torch.float64),
              lambda: value.to(dtypes[rng.integers(len(dtypes))]), lambda: value.to(dtypes[rng.integers(len(dtypes))]),
              lambda: value[None], lambda: value.sum(), lambda: torch.zeros(0), lambda: value.to_sparse(),
              lambda: value.to('meta'), lambda: torch.zeros((), dtype=value.dtype).expand(value.shape),
              lambda: torch.nn.Parameter(value) if value.is_floating_point() else value,
              lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8),
              lambda: torch.complex(value.double(), value.double()), lambda: value.tolist(), lambda: None,
              lambda: 'text', lambda: torch.zeros(1).expand(10 ** 6, 10 ** 6)]
    names = [3, ('a', 1), None, b'key', '', 'module.', 'blocks.block', 'module.blocks.blockX.denselayer1',
             key + '.more', 'blocks.block1', 'module.conv1', key.removeprefix('module.'),
             'several\nlines', 'x' * 10_000]
    action = rng.integers(6)
    if action < 3:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')            # PyTorch is to drop quantised tensors some day
            weights[key] = values[rng.integers(len(values))]()
    elif action == 3:
        weights[names[rng.integers(len(names))]] = weights.pop(key) if rng.random() < 0.5 else value
    content = {'epoch': 1, 'state_dict': weights, 'best_iou': np.float64(0.5)}
    if action == 4:                  # other things than a dict, or a state_dict of other things
        content = [weights, {}, {'state_dict': {}}, {'state_dict': None}, {'state_dict': list(weights)}, [content],
                   3, None, 'text', {'state_dict': {key: value}}, {'state_dict': {'conv1': weights}},
                   torch.zeros(3), {'epoch': 1}][rng.integers(13)]
    elif action == 5:
        loop = {'state_dict': weights}
        loop['state_dict'][names[rng.integers(len(names))]] = loop['state_dict']
        content = [loop, {'state_dict': weights, 'x': [[[]] * 5] * 100}, {**content, 'epoch': 10 ** 400},
                   {'state_dict': {**weights, key: value, 'conv2.weight': value}}][rng.integers(4)]
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=bool(rng.random() < 0.8))
    return buffer.getvalue()


FORMATS = {'.png': edit_png, '.tif': edit_tiff, '.npy': edit_array, '.mat': edit_array, '.xml': edit_xml,
           '.pth': edit_checkpoint, '.tar': edit_checkpoint}


def damage(data, other, rng):
    """`data` after one change of any kind; `other` is another file, for those that mix two."""
    return ANY_FILE[rng.integers(len(ANY_FILE))](data, other, rng)


# ---------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------

class Reader(NamedTuple):
    """A reader under test: `read(path)` raises InputError, or returns after it has checked the result."""
    make_seeds: Callable
    read: Callable


READERS = {'image': Reader(image_seeds, read_image_file), 'label': Reader(label_seeds, read_label_file),
           'xml': Reader(xml_seeds, read_xml_file), 'checkpoint': Reader(checkpoint_seeds, read_checkpoint_file)}


def make_seeds(name):
    """{file name: bytes} of the valid files of a reader, sorted."""
    with tempfile.TemporaryDirectory() as folder:
        READERS[name].make_seeds(Path(folder))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def damaged_files(name, count, seed):
    """Yield `count` pairs (file name, bytes) of damaged files for a reader; the same seed gives the same ones."""
    seeds = make_seeds(name)
    names = list(seeds)
    for k in range(count):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), k])
        seed_name, other = names[k % len(names)], seeds[names[rng.integers(len(names))]]
        data, edit = seeds[seed_name], FORMATS.get(Path(seed_name).suffix, damage)
        # the format's own edits first: they need a file whose parts can be told apart
        steps = [edit] * int(rng.random() < 0.6) + [damage] * int(rng.random() < 0.5) or [damage, damage]
        for step in steps:
            data = step(data, other, rng)
        yield f'{name}_{k:05d}_{seed_name}', data


# ---------------------------------------------------------------------------------------------------
# One file
# ---------------------------------------------------------------------------------------------------

class Outcome(NamedTuple):
    """What became of one file. kind: 'accepted', 'refused' or 'finding'; what: in short, the same for the same bug."""
    kind: str
    what: str = ''
    detail: str = ''
    seconds: float = 0.0             # of processor time
    megabytes: float = 0.0           # highest resident memory above that before the file


def examine(read, path):
    """The `Outcome` of reading a file in this process."""
    before = memory_now()
    start = time.process_time()
    try:
        read(path)
        kind, what, detail = 'accepted', '', ''
    except InputError as error:
        kind, what, detail = judge_refusal(error)
    except Exception as error:       # whatever it is, it is the finding
        kind, what, detail = 'finding', f'{type(error).__name__} in {place(error)}', traceback.format_exc(limit=-12)
    seconds, megabytes = time.process_time() - start, (memory_peak() - before) / 1e6
    if kind != 'finding' and seconds > SECONDS:
        kind, what = 'finding', f'over {SECONDS:g} s ({kind})'
    if kind != 'finding' and megabytes > MEGABYTES:
        kind, what = 'finding', f'over {MEGABYTES} MB ({kind})'
    return Outcome(kind, what, detail, seconds, megabytes)


def judge_refusal(error):
    """(kind, what, detail) of an InputError: a finding if its message is no single line, or memory had run out."""
    cause = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return 'finding', f'MemoryError behind InputError in {place(cause)}', traceback.format_exc(limit=-12)
        cause = cause.__cause__ or cause.__context__
    if len(str(error).splitlines()) != 1:
        return 'finding', f'message of {len(str(error).splitlines())} lines in {place(error)}', repr(str(error))
    return 'refused', '', str(error)


def place(error):
    """The innermost function of this project in the traceback of an exception, as file:function:line."""
    frames = traceback.extract_tb(error.__traceback__)
    root = str(Path(__file__).resolve().parents[1])
    own = [frame for frame in frames if os.path.abspath(frame.filename).startswith(root)] or frames
    return f'{Path(own[-1].filename).name}:{own[-1].name}:{own[-1].lineno}'


def memory_now():
    """Resident memory of this process in bytes, after its high-water mark was put back to it. 0 outside Linux."""
    try:
        Path('/proc/self/clear_refs').write_text('5')
        return _memory('VmRSS')
    except OSError:
        return 0


def memory_peak():
    """The high-water mark of resident memory in bytes. 0 outside Linux."""
    try:
        return _memory('VmHWM')
    except OSError:
        return 0


def _memory(field):
    status = Path('/proc/self/status').read_text()
    return int(re.search(rf'{field}:\s+(\d+) kB', status)[1]) * 1024


# ---------------------------------------------------------------------------------------------------
# The process that reads
# ---------------------------------------------------------------------------------------------------

class ReadingProcess:
    """A second process that reads files, for what ends a process or never returns. A context manager.

    read: a function of a module, called with each path. patience: seconds until an answer is given up.
    """

    def __init__(self, read, patience=PATIENCE):
        self.read, self.patience = read, patience
        self.process = None

    def __enter__(self):
        self.log = tempfile.NamedTemporaryFile(prefix='fuzz_', suffix='.log')
        return self

    def __exit__(self, *exception):
        self._stop()
        self.log.close()

    def examine(self, path):
        """The `Outcome` of reading a file; a crash and a hang are findings, too."""
        if self.process is None:
            self._start()
        try:
            self.connection.send(str(path))
            if self.connection.poll(self.patience):
                return self.connection.recv()
            what = f'no answer within {self.patience:g} s'
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode
            what = f'process ended: {signal.Signals(-code).name if code and code < 0 else f"exit code {code}"}'
        self._stop()
        said = Path(self.log.name).read_text(errors='replace')[:3000]          # faulthandler's stack comes first
        return Outcome('finding', what, said, self.patience if what.startswith('no answer') else 0.0)

    def _start(self):
        context = multiprocessing.get_context('spawn')                 # a fork of PyTorch's threads may hang
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.log.name, self.read), daemon=True)
        self.process.start()
        theirs.close()
        if not self.connection.poll(120) or self.connection.recv() != 'ready':
            raise InputError('the process that reads did not start')

    def _stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def serve(connection, log, read):
    """Answer each path from `connection` with the `Outcome` of reading it, until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # the main process ends this one
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)                                 # libtiff and libpng write there
    faulthandler.enable()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    limit_memory()
    connection.send('ready')
    while True:
        try:
            path = connection.recv()
        except EOFError:
            return
        os.ftruncate(handle, 0)
        connection.send(examine(read, Path(path)))


def limit_memory():
    """Let this process allocate GUARD bytes more than now; the machine may have other work."""
    if resource is not None and Path('/proc/self/status').is_file():
        limit = _memory('VmSize') + GUARD
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


# ---------------------------------------------------------------------------------------------------
# All files of a reader
# ---------------------------------------------------------------------------------------------------

def fuzz(name, count, seed, keep=None):
    """Feed `count` damaged files to a reader; returns a list of (file name, Outcome).

    keep: folder for FILES_PER_FINDING files of each finding, each with a .txt that tells what happened, or None.
    """
    outcomes, kept = [], Counter()
    with tempfile.TemporaryDirectory() as folder, ReadingProcess(READERS[name].read) as process:
        for file_name, data in tqdm(damaged_files(name, count, seed), total=count, desc=name, disable=None):
            path = Path(folder) / file_name
            path.write_bytes(data)
            outcome = process.examine(path)
            path.unlink()
            outcomes.append((file_name, outcome))
            if outcome.kind == 'finding' and keep and kept[outcome.what] < FILES_PER_FINDING:
                kept[outcome.what] += 1
                (keep / file_name).write_bytes(data)
                (keep / f'{file_name}.txt').write_text(f'{outcome.what}\n{outcome.detail}\n', encoding='utf-8',
                                                       errors='backslashreplace')
    return outcomes


def summary(outcomes):
    """One line of the table: files, accepted, refused, findings, slowest seconds, peak MB."""
    kinds = Counter(outcome.kind for _, outcome in outcomes)
    return (f'{len(outcomes):7} {kinds["accepted"]:9} {kinds["refused"]:9} {kinds["finding"]:9} '
            f'{max(outcome.seconds for _, outcome in outcomes):10.2f} '
            f'{max(outcome.megabytes for _, outcome in outcomes):9.0f}')


def findings(outcomes):
    """A line for each finding: how often, what, the first file."""
    found = [(outcome.what, name) for name, outcome in outcomes if outcome.kind == 'finding']
    first = dict(reversed(found))
    return [f'{count:6}  {what}  ({first[what]})' for what, count in Counter(what for what, _ in found).most_common()]


def main(argv=None):
    parser = Parser(prog='scripts/fuzz.py', description='Feed damaged files to the readers.',
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('reader', nargs='?', default='all', choices=(*READERS, 'all'), help='what is tested')
    parser.add_argument('--count', type=int, default=2000, help='damaged files for each reader')
    parser.add_argument('--seed', type=int, default=0, help='of the damage')
    parser.add_argument('--keep', type=Path, help='folder for the files that failed')
    args = parser.parse_args(argv)
    for option, least in (('count', 1), ('seed', 0)):
        if getattr(args, option) < least:
            raise InputError(f'--{option} is {getattr(args, option)}; expected {least} or more')
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)

    names = list(READERS) if args.reader == 'all' else [args.reader]
    outcomes = {name: fuzz(name, args.count, args.seed, args.keep) for name in names}
    print('reader       files  accepted   refused  findings slowest, s  peak, MB')
    for name in names:
        print(f'{name:10} {summary(outcomes[name])}')
    lines = list(itertools.chain.from_iterable(findings(outcomes[name]) for name in names))
    if lines:
        print('\nfindings: how many, what, the first file' + ('' if args.keep else '; --keep DIR keeps the files'))
        print('\n'.join(lines))
        sys.exit(1)


if __name__ == '__main__':
    run_script(main)
