"""Damaged files: every reader either returns what it promises, or refuses the file with one line."""
import functools
import io
import warnings

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image
from scipy.io import savemat

from FullNet import create_model
from prepare_data import instance_label_from_xml
from support.checkpoints import load_checkpoint, load_weights
from support.images import image_size, read_image, read_instance_label
from support.script import InputError

MODEL = dict(name='FullNet', n_layers=4, growth_rate=2, drop_rate=0.0, dilations=(1,))
OPTIONS = MODEL | dict(in_c=3, out_c=3, compress_ratio=0.5, is_hybrid=True, layer_type='basic')
RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
IDS = np.arange(600, dtype=np.uint16).reshape(20, 30) // 50
XML = '<Annotations><Annotation><Regions><Region><Vertices>{}</Vertices></Region></Regions></Annotation></Annotations>'


def written(write, *words, **more):
    """The bytes that a function writes into a file."""
    buffer = io.BytesIO()
    write(buffer, *words, **more)
    return buffer.getvalue()


@functools.cache
def valid_files():
    """{file name: bytes}, small ones of every format."""
    image, ids = Image.fromarray(RGB), Image.fromarray(IDS)
    files = {f'image.{kind}': written(image.save, format=kind.replace('jpg', 'jpeg'))
             for kind in ('png', 'jpg', 'bmp', 'ppm')}
    files['image.tif'] = written(tifffile.imwrite, RGB, compression='zlib', photometric='rgb')
    files['image_16.tif'] = written(tifffile.imwrite, RGB.astype(np.uint16) * 200, photometric='rgb', tile=(16, 16))
    files |= {'label.png': written(ids.save, format='png'), 'label.tif': written(ids.save, format='tiff'),
              'label.bmp': written(Image.fromarray(IDS.astype(np.uint8)).save, format='bmp'),
              'label.npy': written(np.save, IDS), 'label.mat': written(savemat, {'inst_map': IDS.astype(float)})}
    vertices = ''.join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in ((2, 2), (20.5, 3), (11, 18)))
    files['regions.xml'] = XML.format(vertices).encode()
    checkpoint = {'epoch': 1, 'state_dict': create_model(**MODEL).state_dict(), 'best_iou': 0.5, 'optimizer': {}}
    for name, new in (('new.pth.tar', True), ('old.pth.tar', False)):
        files[name] = written(lambda file: torch.save(checkpoint, file, _use_new_zipfile_serialization=new))
    return files


def read(path):
    """Read a file with the reader of its kind, and check the result."""
    if path.name.startswith('image'):
        image = read_image(path, scale_16bit=(0, 65535))
        assert image.dtype == np.uint8 and image.shape == (*image_size(path), 3)
    elif path.name.startswith(('label', 'regions')):
        label = instance_label_from_xml(path, 20, 30) if path.suffix == '.xml' else read_instance_label(path)
        assert label.dtype == np.int32 and label.ndim == 2 and label.min() >= 0
    else:
        model = create_model(**MODEL)
        load_weights(model, load_checkpoint(path)['state_dict'], OPTIONS, path)
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize('name', ['image.png', 'image.jpg', 'image.bmp', 'image.ppm', 'image.tif', 'image_16.tif',
                                  'label.png', 'label.tif', 'label.bmp', 'label.npy', 'label.mat', 'regions.xml',
                                  'new.pth.tar', 'old.pth.tar'])
def test_a_valid_file_is_read_and_a_damaged_one_is_read_or_refused_with_one_line(tmp_path, name):
    path, content = tmp_path / name, valid_files()[name]
    path.write_bytes(content)
    read(path)

    @settings(max_examples=120, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(content) - 1), st.sampled_from(['cut', 'replace', 'insert', 'remove']),
           st.binary(min_size=1, max_size=8))
    @example(60, 'remove', b'1234')                    # of image.tif: a grey TIFF whose second page has no size
    def damaged(place, how, new):
        rest = {'cut': b'', 'replace': content[place + len(new):], 'insert': content[place:],
                'remove': content[place + len(new):]}[how]
        path.write_bytes(content[:place] + (new if how in ('replace', 'insert') else b'') + rest)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                read(path)
        except InputError as error:
            assert '\n' not in str(error) and str(path) in str(error)
    damaged()
