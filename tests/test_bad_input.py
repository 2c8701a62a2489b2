"""What is fed to the scripts and what happens: real files, through `main(argv)`; the readers' own tables are elsewhere.

Refused input is one line that names the file, what was found and what was expected, and leaves nothing half-written.
Accepted input gives the right result, some of it with a note.
"""
import codecs
import contextlib
import errno
import functools
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest.mock
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from skimage.color import rgb2lab

import my_transforms
import prepare_data
import test as test_script
import train
import weight_map
from FullNet import create_model
from loss import VarCELoss
from miniature import SMALL, make_multi_organ, nuclei, pixels
from prepare_data import ternary_label
from support import results, run_folder
from support.checkpoints import load_checkpoint
from support.files import FolderLock
from support.script import InputError, run_script
from utils import gland_accuracy_object_level, nuclei_accuracy_object_level, standard_metrics

ROOT = Path(__file__).parents[1]
MODEL = dict(name='FullNet', in_c=3, out_c=3, n_layers=4, growth_rate=2, drop_rate=0.1, compress_ratio=0.5,
             dilations=(1,), is_hybrid=True, layer_type='basic')
NET = ['--n-layers', '4', '--growth-rate', '2', '--dilations', '1']
TEST = [*NET, '--gpu', 'cpu', '--tta', 'none', '--patch-size', '64', '--overlap', '16', '--min-area', '1']
PREPARE = ['--like', 'MultiOrgan', '--patch-size', '32', '--fractions', '0.5', '0.5', '0']


# ---------------------------------------------------------------------------------------------------
# Files and how the scripts are run
# ---------------------------------------------------------------------------------------------------

@functools.cache
def plain(seed=0, height=64, width=64):
    """(image, label) that everything takes."""
    image, label = nuclei(seed, height, width)
    label = label.astype(np.uint8)
    image.flags.writeable = label.flags.writeable = False
    return image, label


def put(path, content):
    """Write `content`: bytes, a text, an array as image, or a function of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding='utf-8')
    else:
        Image.fromarray(content).save(path)
    return path


def pair(folder, image=None, label=None, image_name='x.png', label_name='x.png'):
    """images/ and labels/ with a pair that is fine, `a`, and one that may not be, `x`. None = as it should be."""
    put(folder / 'images/a.png', plain(1)[0])
    put(folder / 'labels/a.png', plain(1)[1])
    put(folder / 'images' / image_name, plain()[0] if image is None else image)
    put(folder / 'labels' / label_name, plain()[1] if label is None else label)


def run_prepare(folder, *words):
    prepare_data.main([*PREPARE, '--img-dir', str(folder / 'images'), '--label-dir', str(folder / 'labels'),
                       '--data-dir', str(folder / 'out'), *words])


def run_test(folder, *words, labels=True):
    test_script.main([*TEST, '--img-dir', str(folder / 'images'),
                      '--label-dir', str(folder / 'labels') if labels else '', '--data-dir', str(folder),
                      '--model-path', str(folder / 'net.pth.tar'), '--save-dir', str(folder / 'out'), *words])


def run_weight_map(folder, *words):
    weight_map.main(['--label-dir', str(folder / 'labels'), '--save-dir', str(folder / 'out'), *words])


def run_train(folder, *words):
    train.main([*SMALL, '--data-dir', str(folder), '--save-dir', str(folder / 'run'), *words])


RUN = {'prepare': run_prepare, 'test': run_test, 'weight_map': run_weight_map, 'train': run_train}
SCRIPT = {'prepare': 'prepare_data.py', 'test': 'test.py', 'weight_map': 'weight_map.py', 'train': 'train.py'}


def refused(run, *words):
    """`run()` raises what becomes one line, and the line holds the words; nothing half-written is left."""
    with pytest.raises((InputError, OSError)) as caught:
        run()
    message = str(caught.value) if isinstance(caught.value, InputError) else line_of(caught.value)
    assert '\n' not in message
    for word in words:
        assert word in message, message
    assert not temporary_files('.'), temporary_files('.')


def line_of(error):
    """What `run_script` makes of an OSError."""
    def fail():
        raise error
    handler, show = signal.getsignal(signal.SIGTERM), warnings.showwarning
    try:
        with contextlib.redirect_stderr(io.StringIO()) as shown, pytest.raises(SystemExit) as caught:
            run_script(fail)
    finally:
        signal.signal(signal.SIGTERM, handler)
        warnings.showwarning = show
    assert caught.value.code == 2
    return shown.getvalue().removesuffix('\n')


def notes(run):
    """What `run()` has to note."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        run()
    assert not temporary_files('.')
    return '\n'.join(str(w.message) for w in caught if w.category is UserWarning)


def temporary_files(folder):
    return [str(path) for path in Path(folder).rglob('.tmp_*')]


def made_of(folder, name='x'):
    """The files below `folder` that were made of the image `name`; records do not count."""
    return [str(path) for path in folder.rglob(f'{name}[._]*') if 'records' not in str(path)]


@functools.cache
def network():
    torch.manual_seed(0)
    return create_model(**MODEL)


def published(path, weights=None, **more):
    """Save a checkpoint as published."""
    weights = network().state_dict() if weights is None else weights
    torch.save({'epoch': 1, 'state_dict': {f'module.{key}': value for key, value in weights.items()},
                'best_iou': np.float64(0.5), 'optimizer': None, **more}, path)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in its own folder, with a network and colour statistics to test with."""
    published(tmp_path / 'net.pth.tar')
    np.save(tmp_path / 'mean_std.npy', np.array([[0.7, 0.5, 0.6], [0.2, 0.2, 0.2]]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    return make_multi_organ(tmp_path_factory.mktemp('prepared'), n_train=3)


@pytest.fixture
def data(prepared, here):
    """Prepared data of one's own, to be spoiled."""
    shutil.copytree(prepared, here, dirs_exist_ok=True)
    return here


# ---------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------

def saved(image, **options):
    """A function that saves a Pillow image."""
    return lambda path: image.save(path, **options)


def cut(path):
    """A PNG of which only the first half arrived."""
    Image.fromarray(plain()[0]).save(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def turned(path):
    """A JPEG with EXIF orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(plain()[0]).save(path, quality=95, exif=exif)


def rgba(alpha):
    return Image.fromarray(np.dstack([plain()[0], np.full((64, 64), alpha, np.uint8)]))


grey = Image.fromarray(plain()[0]).convert('L')

# all that the reader refuses is in test_dataset.py
REFUSED_IMAGES = {
    'truncated': ('x.png', cut, ['x.png is damaged or truncated', 'copy it again']),
    '16 bits': ('x.png', plain()[1].astype(np.uint16), ['x.png has 16 bits per channel, expected 8', '--scale-16bit']),
    'a folder': ('x.png', lambda path: path.mkdir(), ['x.png']),
}


@pytest.mark.parametrize('script', ['prepare', 'test'])
@pytest.mark.parametrize('name, content, words', REFUSED_IMAGES.values(), ids=REFUSED_IMAGES)
def test_refused_images(here, script, name, content, words):
    pair(here, content, image_name=name)
    refused(lambda: RUN[script](here), *words)
    assert not made_of(here / 'out')


# file name, content, what it shows (None = what is in the file, as RGB), words of the note ('' = none)
ACCEPTED_IMAGES = {
    'RGBA, not opaque': ('x.png', saved(rgba(128)), plain()[0], 'x.png: its alpha channel is not fully opaque'),
    'EXIF, turned by 90 degrees': ('x.jpg', turned, None, 'x.jpg: turned by its EXIF orientation (6)'),
    'upper-case ending': ('x.PNG', plain()[0], plain()[0], ''),
    'all black': ('x.png', np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8), ''),
}


def shown(path):
    """What a viewer shows, as RGB without alpha."""
    from PIL import ImageOps
    return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert('RGBA'))[..., :3]


@pytest.mark.parametrize('name, content, expected, note', ACCEPTED_IMAGES.values(), ids=ACCEPTED_IMAGES)
def test_accepted_images(here, name, content, expected, note):
    pair(here, content, image_name=name)
    expected = shown(here / 'images' / name) if expected is None else expected
    prepare_notes = notes(lambda: run_prepare(here, '--patch-size', '64'))
    assert np.array_equal(pixels(next((here / 'out/images').glob('*/x_0.png'))), expected)

    put(here / 'images/same.png', np.ascontiguousarray(expected))
    shutil.rmtree(here / 'out')
    test_notes = notes(lambda: run_test(here, labels=False))
    inside = [pixels(here / f'out/images_prob_maps/{stem}_prob_inside.png') for stem in ('x', 'same')]
    assert np.array_equal(*inside)
    for found in (prepare_notes, test_notes):
        assert note is None or (note in found if note else found == ''), found


def test_an_image_of_one_pixel_is_segmented_and_scored(here):
    pair(here, np.full((1, 1, 3), 200, np.uint8), np.ones((1, 1), np.uint8))
    run_test(here)
    assert tifffile.imread(here / 'out/images_segmentation/x_seg.tiff').shape == (1, 1)
    assert '\nx:\t' in (here / 'out/images_test_result.txt').read_text()


@pytest.mark.parametrize('name, content, words', [
    ('images/train/train_0.png', cut, ['train_0.png is damaged or truncated']),
    ('weight_maps/train/train_0_weight.png', plain(0, 32, 64)[1], ['train_0_weight.png is 64 x 32 pixels', '64 x 64']),
    ('weight_maps/train/train_0_weight.png', np.full((64, 64), 300, np.uint16),
     ['train_0_weight.png has colour mode I', 'expected a weight map of 8-bit grey', 'prepare_data.py']),
    ('labels/train/train_0_label.png', ternary_label(plain(0, 64, 32)[1]), ['train_0_label.png is 32 x 64 pixels']),
    ('labels/train/train_0_label.png', 'no pixels', ['train_0_label.png is not an image']),
])
def test_training_names_a_spoiled_file(data, name, content, words):
    put(data / name, content)
    refused(lambda: run_train(data), *words)
    assert not list((data / 'run').rglob('*.pth.tar'))


# ---------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------

label = plain()[1].astype(np.int32)
two_pieces = np.zeros((64, 64), np.uint8)
two_pieces[5:20, 5:20] = two_pieces[40:60, 40:60] = 3
two_pieces[30:35, 10:20] = 1
coloured = np.dstack([plain()[1], plain()[1] * 3, plain()[1] + 1])
ALL = ('prepare', 'weight_map', 'test')

# all that the reader refuses is in test_dataset.py
REFUSED_LABELS = {
    'RGB': ('x.png', coloured, ['x.png is a colour image', 'expected one integer id per pixel'], ALL),
    'truncated': ('x.png', cut, ['x.png is damaged or truncated'], ALL),
    'JPEG': ('x.jpg', plain()[1], ['labels', 'x.'], ALL[::2]),
    'other size': ('x.png', plain(0, 64, 60)[1], ['x.png is 60 x 64 pixels', '64 x 64', 'same size'], ALL[::2]),
    'XML of another schema': ('x.xml', '<annotation/>', ['x.xml is not an ImageScope annotation'], ALL[:1]),
}


@pytest.mark.parametrize('script, name, content, words', [
    pytest.param(script, name, content, words, id=f'{title}-{script}')
    for title, (name, content, words, scripts) in REFUSED_LABELS.items() for script in scripts])
def test_refused_labels(here, script, name, content, words):
    pair(here, label=content, label_name=name)
    refused(lambda: RUN[script](here), *words)
    assert not made_of(here / 'out')


# file name, content, ids that it stands for, words of the note
ACCEPTED_LABELS = {
    'RGB with equal channels': ('x.png', np.dstack([plain()[1]] * 3), label, 'x.png: RGB label with three equal'),
    'above 65,535': ('x.npy', lambda path: np.save(path, label * 70_000), label * 70_000, ''),
    'an object in two pieces': ('x.png', two_pieces, two_pieces.astype(int), ''),
    'no object': ('x.png', np.zeros((64, 64), np.uint8), np.zeros((64, 64), int), 'x.png: the label has no object'),
}


@pytest.mark.parametrize('name, content, ids, note', ACCEPTED_LABELS.values(), ids=ACCEPTED_LABELS)
def test_accepted_labels(here, name, content, ids, note):
    pair(here, label=content, label_name=name)
    found = notes(lambda: run_prepare(here, '--patch-size', '64'))
    assert note in found if note else found == '', found
    stored = next((here / 'out/labels_instance').glob('*/x_label.*'))
    assert np.array_equal(np.asarray(tifffile.imread(stored) if stored.suffix == '.tif' else pixels(stored)), ids)
    assert np.array_equal(pixels(next((here / 'out/labels').glob('*/x_0_label.png'))), ternary_label(ids))
    weights = weight_map.encode_weight_map(weight_map.weight_map(ids))
    assert np.array_equal(pixels(next((here / 'out/weight_maps').glob('*/x_0_weight.png'))), weights)
    report = json.loads((here / 'out/prepare_report.json').read_text())
    assert report['labels_with_objects_in_pieces'].get('x', 0) == (1 if ids is ACCEPTED_LABELS[
        'an object in two pieces'][2] else 0)

    notes(lambda: weight_map.main(['--label-dir', 'labels', '--save-dir', 'weights']))
    made = here / 'weights' / f'{Path(name).stem.removesuffix("_label")}_weight.png'
    assert np.array_equal(pixels(made), weights)

    shutil.rmtree(here / 'out')
    put(here / 'images/y.png', plain()[0])
    np.save(here / 'labels/y.npy', ids)
    found = notes(lambda: run_test(here))
    assert note in found
    rows = [line.split('\t') for line in (here / 'out/images_test_result.txt').read_text().splitlines()]
    scores = {row[0]: row[1:] for row in rows}
    assert scores['x:'] == scores['y:']
    assert [value == 'nan' for value in scores['x:']] == [column == 'Hausdorff' and not ids.any()
                                                          for column in scores['Metrics:']]


@pytest.mark.parametrize('script', ALL)
def test_masks_are_taken_when_told(here, script):
    mask = np.zeros((64, 64), np.uint8)
    mask[5:20, 5:20] = mask[22:60, 10:60] = 255
    pair(here, label=mask)
    put(here / 'labels/a.png', mask)
    RUN[script](here, '--binary-labels', 'True')
    if script == 'prepare':
        assert pixels(next((here / 'out/labels_instance').glob('*/x_label.png'))).max() == 2
    elif script == 'weight_map':
        assert pixels(here / 'out/x_weight.png').max() > 20             # two objects, or it would be 20 everywhere
    else:
        assert json.loads((here / 'out/images_records/x.json').read_text())['overlaps']


# ---------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------

def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def copy(name, other):
    return lambda folder: shutil.copy(folder / name, folder / other)


@pytest.mark.parametrize('script, spoil, words', [
    ('prepare', remove('labels/x.png'), ['1 instance labels of images missing', 'labels', 'x.png']),
    ('test', remove('labels/x.png'), ['1 instance labels of images missing', 'x.png', "--label-dir ''"]),
    ('prepare', remove('images/x.png'), ['1 images of instance labels missing', 'images', 'x.png']),
    ('prepare', copy('images/x.png', 'images/x.bmp'), ['two images of one name', 'x.bmp and x.png', 'keep one']),
    ('test', copy('images/x.png', 'images/x.bmp'), ['two images of one name', 'x.bmp and x.png', 'keep one']),
    ('prepare', copy('labels/x.png', 'labels/x.bmp'), ['x.bmp and x.png', 'keep one']),
    ('test', copy('labels/x.png', 'labels/x.bmp'), ['x.bmp and x.png', 'keep one']),
    ('weight_map', copy('labels/x.png', 'labels/x.bmp'), ['x.bmp and x.png', 'keep one']),
    ('weight_map', copy('labels/x.png', 'labels/x_label.png'), ['x.png and x_label.png']),
    ('prepare', copy('labels/x.png', 'labels/x_anno.png'), ['x.png and x_anno.png', 'labels of x.png', 'keep one']),
    ('test', copy('labels/x.png', 'labels/x_label.png'), ['x.png and x_label.png', 'labels of x.png', 'keep one']),
])
def test_pairs(here, script, spoil, words):
    pair(here)
    spoil(here)
    refused(lambda: RUN[script](here), *words)
    assert not made_of(here / 'out')


def test_up_to_five_missing_labels_are_named_and_all_counted(here):
    pair(here)
    for k in range(7):
        put(here / f'images/m{k}.png', plain()[0])
    for script in ('prepare', 'test'):
        refused(lambda: RUN[script](here), '7 instance labels', 'm0.png, m1.png, m2.png, m3.png, m4.png, ...')


# ---------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------

def missing(path):
    shutil.rmtree(path)


def emptied(path):
    shutil.rmtree(path)
    path.mkdir()


def a_file(path):
    shutil.rmtree(path)
    path.write_text('a file')


def other_files(path):
    emptied(path)
    put(path / 'readme.txt', 'nothing here')
    put(path / '.DS_Store', b'\0')


WAYS = {missing: 'no such', other_files: 'readme.txt'}


@pytest.mark.parametrize('script, part', [('prepare', 'images'), ('prepare', 'labels'), ('test', 'images'),
                                          ('test', 'labels'), ('weight_map', 'labels'), ('train', 'images/train'),
                                          ('train', 'labels/val')])
@pytest.mark.parametrize('spoil', [missing, other_files], ids=lambda spoil: spoil.__name__)
def test_folders_without_images(data, script, part, spoil):
    if script != 'train':
        shutil.rmtree(data / 'images'), shutil.rmtree(data / 'labels')
        pair(data)
    spoil(data / part)
    refused(lambda: RUN[script](data), str(data / part), '' if script == 'train' else WAYS[spoil])
    assert not (data / 'out').exists() and not (data / 'run').exists()


@pytest.mark.parametrize('words', [['--img-dir', '{}/nowhere'], ['--img-dir', '{}/images/nowhere.png']])
def test_a_missing_image_is_named(here, words):
    pair(here)
    words = [word.format(here) for word in words]
    refused(lambda: run_test(here, *words), 'no such', words[1])


@pytest.mark.parametrize('script, words', [
    ('prepare', ['--data-dir', 'file']), ('prepare', ['--data-dir', 'file/out']), ('test', ['--save-dir', 'file/out']),
    ('weight_map', ['--save-dir', 'file']), ('train', ['--save-dir', 'file']), ('train', ['--save-dir', 'file/run']),
])
def test_an_output_folder_that_is_a_file(here, data, script, words):
    pair(here)
    (here / 'file').write_text('kept')
    if script == 'prepare':
        emptied(here / 'images'), emptied(here / 'labels'), pair(here)
    refused(lambda: RUN[script](here, *words), 'file')
    assert (here / 'file').read_text() == 'kept'


@pytest.mark.parametrize('script, words', [('prepare', ['--data-dir', '{}/images']),
                                           ('prepare', ['--data-dir', '{}/labels/deeper']),
                                           ('weight_map', ['--save-dir', '{}/labels'])])
def test_output_inside_the_input_is_refused(here, script, words):
    pair(here)
    before = sorted(here.rglob('*'))
    refused(lambda: RUN[script](here, *[word.format(here) for word in words]),
            str(here / ('images' if 'images' in words[1] else 'labels')),
            'would replace the raw data' if script == 'prepare' else '')
    assert sorted(here.rglob('*')) == before


def test_results_beside_the_images_do_not_become_images(here):
    pair(here)
    for _ in range(2):
        run_test(here, '--save-dir', str(here / 'images'), '--overwrite', 'True')
    assert sorted(path.name for path in (here / 'images/images_records').iterdir()) == ['a.json', 'x.json']


NAMES = ['Färbung 核', '--img-dir', 'a.b.c..d', '{dataset}', 'n' * 200]


@pytest.mark.parametrize('stem', NAMES)
def test_names_of_files_and_folders(here, stem):
    """Whatever the name, the files are found and what is made of them bears it."""
    folder = here / stem
    pair(folder, image_name=f'{stem}.png', label_name=f'{stem}.png')
    prepare_data.main([*PREPARE, f'--img-dir={stem}/images', f'--label-dir={stem}/labels', f'--data-dir={stem}/out'])
    assert len(list((folder / 'out').glob('images/*/*_0.png'))) == 2
    assert stem in {path.stem.removesuffix('_0') for path in (folder / 'out').glob('images/*/*_0.png')}
    weight_map.main([f'--label-dir={stem}/labels', f'--save-dir={stem}/weights'])
    assert (folder / 'weights' / f'{stem.removesuffix("_label")}_weight.png').is_file()
    test_script.main([*TEST, f'--img-dir={stem}/images', f'--label-dir={stem}/labels', '--model-path=net.pth.tar',
                      f'--save-dir={stem}/results'])
    assert (folder / f'results/images_segmentation/{stem}_seg.tiff').is_file()
    assert f'\n{stem}:\t' in (folder / 'results/images_test_result.txt').read_text(encoding='utf-8')


@pytest.mark.parametrize('script', ['prepare', 'test', 'weight_map'])
def test_a_name_that_is_not_utf_8(here, script):
    """As old archives bring them; it cannot be written into a UTF-8 file as it is."""
    pair(here)
    for part in ('images', 'labels'):
        os.rename(here / part / 'x.png', os.fsencode(here / part) + b'/F\xe4rbung.png')
    with pytest.raises(InputError, match='rbung.png'):
        RUN[script](here)


# ---------------------------------------------------------------------------------------------------
# Files that may not be read or written
# ---------------------------------------------------------------------------------------------------

@pytest.fixture
def open_folder(prepared):
    """A folder that an unprivileged user reaches and owns."""
    if os.geteuid() != 0:
        pytest.skip('only root may become another user')
    folder = Path(tempfile.mkdtemp(dir='/tmp', prefix='bad_input_'))
    shutil.copytree(prepared, folder / 'data')
    pair(folder)
    published(folder / 'net.pth.tar')
    shutil.copy('mean_std.npy', folder)
    for path in (folder, *folder.rglob('*')):
        os.chown(path, 65534, 65534)
        path.chmod(0o777 if path.is_dir() else 0o666)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def unprivileged():
    Image.init()
    codecs.lookup('latin1'), codecs.lookup('cp437')      # of pickles and zip files: Python may lie in root's home
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize('script, path, mode, word', [
    ('prepare', 'images/x.png', 0, 'x.png'), ('prepare', 'labels', 0o644, 'labels'), ('prepare', '.', 0o555, 'out'),
    ('weight_map', 'labels/x.png', 0, 'x.png'), ('weight_map', '.', 0o555, 'out'),
    ('test', 'images', 0, 'images'), ('test', 'net.pth.tar', 0, 'net.pth.tar'), ('test', '.', 0o555, 'out'),
    ('train', 'data/images/train/train_0.png', 0, 'train_0.png'), ('train', '.', 0o555, 'run'),
    ('train', 'data/mean_std.npy', 0, 'mean_std.npy'),
])
def test_without_permission(open_folder, monkeypatch, script, path, mode, word):
    monkeypatch.chdir(open_folder)
    (open_folder / path).chmod(mode)
    words = ['--data-dir', str(open_folder / 'data')] if script == 'train' else []
    with unprivileged():
        refused(lambda: RUN[script](open_folder, *words), word, 'ermission')
    assert not made_of(open_folder / 'out') and not list((open_folder).glob('run/**/*.pth.tar'))


# ---------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------

class Malicious:
    """Unpickling this writes a file."""

    def __reduce__(self):
        return os.system, ('touch was_run',)


def weights(**changes):
    """A published checkpoint with the weights of a network of other options."""
    return lambda path: published(path, create_model(**{**MODEL, **changes}).state_dict())


def spoilt(path):
    state = network().state_dict()
    published(path, {**state, 'conv2.weight': state['conv2.weight'] * float('nan')})


# all that the loader refuses is in test_utils.py
REFUSED_CHECKPOINTS = {
    'missing': (lambda path: path.unlink(), ['no checkpoint at', 'net.pth.tar']),
    'a folder': (lambda path: (path.unlink(), path.mkdir()), ['no checkpoint at', 'net.pth.tar']),
    'truncated': (lambda path: path.write_bytes(path.read_bytes()[:-2000]), ['net.pth.tar', 'damaged', 'copy it']),
    'code beside weights': (lambda path: published(path, args=Malicious()), ['net.pth.tar', 'could run code']),
    'other growth_rate': (weights(growth_rate=3), ['growth_rate is 3 in the file, 2 in the options']),
    'NaN weights': (spoilt, ['conv2.weight holds NaN or infinite weights', 'earlier checkpoint']),
}


@pytest.mark.parametrize('script', ['test', 'train --init-from', 'train --checkpoint-path'])
@pytest.mark.parametrize('content, words', REFUSED_CHECKPOINTS.values(), ids=REFUSED_CHECKPOINTS)
def test_refused_checkpoints(here, prepared, script, content, words):
    put(here / 'net.pth.tar', content)
    if script == 'test':
        pair(here)
        refused(lambda: run_test(here), *words)
    else:
        if script == 'train --checkpoint-path':
            words = ['net.pth.tar']                    # resuming looks for the optimizer first
        refused(lambda: run_train(here, script.split()[1], str(here / 'net.pth.tar'), '--data-dir', str(prepared)),
                *words)
    assert not any((here / name).exists() for name in ('out', 'run', 'was_run'))


def on_cuda(path):
    """Its tensors say that they were on the second GPU."""
    with unittest.mock.patch('torch.serialization.location_tag', lambda storage: 'cuda:1'):
        published(path)
    assert b'cuda:1' in path.read_bytes()


def half(path):
    published(path, {key: value.bfloat16() if value.is_floating_point() else value
                     for key, value in network().state_dict().items()})


@pytest.mark.parametrize('content, note', [
    (half, 'net.pth.tar: bfloat16 weights, converted to float32'),
    (lambda path: torch.save({'state_dict': network().state_dict()}, path), ''),                  # no module. prefix
    (on_cuda, ''),
    (lambda path: published(path, best_iou=np.float32(0.5), epoch=np.int64(3)), ''),
    (lambda path: published(path, options={'lr': 0.1}), ''),
], ids=['bfloat16', 'without module.', 'saved on CUDA', 'other NumPy scalars', 'options of another program'])
def test_accepted_checkpoints(here, prepared, content, note):
    pair(here)
    run_test(here)
    before = pixels(here / 'out/images_prob_maps/x_prob_inside.png').astype(int)
    put(here / 'net.pth.tar', content)
    assert note in notes(lambda: run_test(here))
    after = pixels(here / 'out/images_prob_maps/x_prob_inside.png').astype(int)
    assert np.abs(before - after).max() <= 3
    assert note in notes(lambda: run_train(here, '--init-from', str(here / 'net.pth.tar'), '--data-dir', str(prepared)))


def test_a_mean_std_of_rows_of_different_lengths(here):
    pair(here)
    published(here / 'net.pth.tar', mean_std=[[0.7, 0.5, 0.6], [0.2, 0.2]])
    refused(lambda: run_test(here), 'net.pth.tar holds', '(2, 3)')


def with_optimizer(path, **more):
    optimizer = torch.optim.Adam(network().parameters())
    published(path, **{'optimizer': optimizer.state_dict(), **more})


@pytest.mark.parametrize('content, options, words', [
    (published, [], ['net.pth.tar holds no optimizer state', '--init-from']),
    (with_optimizer, ['--ema-decay', '0.9'], ['net.pth.tar']),             # holds no second set of weights
    (lambda path: torch.save({'state_dict': network().state_dict(), 'optimizer': {'state': {}}}, path), [],
     ['net.pth.tar']),
    (lambda path: with_optimizer(path, optimizer=torch.optim.Adam([torch.zeros(1)]).state_dict()), [], ['net.pth.tar']),
    (lambda path: with_optimizer(path, optimizer='adam'), [], ['net.pth.tar']),
    (lambda path: with_optimizer(path, epoch='last'), [], ['net.pth.tar']),
    (lambda path: with_optimizer(path, epoch='last', options={'lr': 0.1}), [], ['net.pth.tar']),
], ids=['no optimizer', 'no averaged weights', 'no epoch', 'optimizer of another network', 'optimizer is a text',
        'epoch is a text', 'options of another program'])
def test_checkpoints_that_cannot_be_resumed(here, prepared, content, options, words):
    content(here / 'net.pth.tar')
    refused(lambda: run_train(here, '--checkpoint-path', str(here / 'net.pth.tar'), '--data-dir', str(prepared),
                              '--epochs', '2', *options), *words)
    assert not (here / 'run').exists()


# ---------------------------------------------------------------------------------------------------
# mean_std.npy
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('script', ['train', 'test'])
def test_refused_mean_std(data, script):
    np.save(data / 'mean_std.npy', np.array([Malicious()], dtype=object), allow_pickle=True)
    if script == 'test':
        shutil.rmtree(data / 'images'), shutil.rmtree(data / 'labels')
        pair(data)
    refused(lambda: RUN[script](data), 'mean_std.npy is not a plain NumPy array')
    assert not any((data / name).exists() for name in ('out', 'run', 'was_run'))
    pickle.loads(pickle.dumps(Malicious()))                                # it would have been seen
    assert (data / 'was_run').exists()


# ---------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('script, options, words', [
    ('prepare', ['--no-such', '1'], ['--no-such']),
    ('prepare', ['--patch-size', '65'], ['64 x 64 pixels is smaller than a patch of 65 x 65']),
    ('prepare', ['--fractions', '0.5', '0.5', '0.5'], ['--fractions is 0.5 0.5 0.5', 'add up to 1']),
    ('prepare', ['--fractions', '0', '1', '0'], ['--fractions is 0 1 0', 'above 0']),
    ('prepare', ['--fractions', 'nan', '0.5', '0.5'], ['--fractions']),
    ('prepare', ['--max-megapixels', '0.001'], ['megapixels', '0.001']),
    ('prepare', ['--anchor', 'nobody'], ["anchor 'nobody'", '--anchor']),
    ('prepare', ['--split', 'nowhere.json'], ['no such file: nowhere.json; expected a JSON object of lists']),
    ('prepare', ['--label-dir', ''], ['--label-dir']),
    ('test', ['--overlap', '64'], ['--overlap is 64', 'less than --patch-size, 64']),
    ('test', ['--gpu', '99,100'], ['GPU 99', 'CUDA GPUs were found', '--gpu cpu']),
    ('test', ['--max-megapixels', '0.001'], ['more than max_megapixels = 0.001']),
    ('test', ['--scale-factor', '1e9'], ['scaled by 1e+09 the image has 64000000000', 'megapixels']),
    ('train', ['--no-such', '1'], ['--no-such']),
    ('train', ['--val-overlap', '40'], ['--val-overlap is 40', 'less than --input-size, 40']),
    ('train', ['--gpu', '7'], ['GPU 7', 'CUDA GPUs were found']),
    ('train', ['--compress-ratio', '0'], ['compress']),
    ('train', ['--data-dir', 'nowhere'], ['nowhere', 'mean_std.npy', 'prepare_data.py writes it']),
    ('weight_map', ['--no-such'], ['--no-such']),
    ('weight_map', ['--sigma', 'x'], ['--sigma']),
    ('weight_map', ['--sigma', '0'], ['sigma']),
], ids=lambda value: ' '.join(value) if isinstance(value, list) and value[:1] and value[0].startswith('--') else None)
def test_refused_options(here, prepared, script, options, words):
    """What is seen before any file is read is in test_options.py."""
    if script == 'train':
        folder = [] if '--data-dir' in options else ['--data-dir', str(prepared)]
        refused(lambda: run_train(here, *folder, *options), *words)
        assert not list(here.glob('run/**/*.pth.tar'))
    else:
        pair(here)
        refused(lambda: RUN[script](here, *options), *words)
        assert not made_of(here / 'out')


def test_images_shrunk_to_nothing(data):
    """A pixel is left of them."""
    run_train(data, '--transform.train.random_resize', '0.001', '0.002')
    assert load_checkpoint(data / 'run/checkpoints/checkpoint.pth.tar')['epoch'] == 1


def test_a_batch_larger_than_the_data_set(data):
    """It is one short batch."""
    run_train(data, '--batch-size', '50')
    assert load_checkpoint(data / 'run/checkpoints/checkpoint.pth.tar')['step'] == 1


# ---------------------------------------------------------------------------------------------------
# Two processes in one folder, and a run folder that is moved
# ---------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def written_by_another(folder):
    """Another process has locked the folder; yields it."""
    ready = multiprocessing.get_context('fork').Event()

    def work():
        FolderLock(folder)
        ready.set()
        time.sleep(600)
    process = multiprocessing.get_context('fork').Process(target=work)
    process.start()
    try:
        assert ready.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def files_in(folder):
    paths = sorted(path for path in folder.rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize('script, locked', [('prepare', '.out.preparing'), ('test', 'out/images_records'),
                                            ('train', 'run')])
def test_a_folder_that_another_process_writes(here, prepared, script, locked):
    """It is refused and nothing is changed there; once the other one is killed, its lock is too."""
    pair(here)
    words = ['--data-dir', str(prepared)] if script == 'train' else []
    with written_by_another(here / locked) as other:
        before = files_in(here)
        refused(lambda: RUN[script](here, *words), f'{here / locked} is being written by another process',
                f'process {other.pid} on', 'wait until it has ended')
        assert files_in(here) == before
    assert (here / locked / '.lock').exists()
    RUN[script](here, *words)
    assert not (here / locked / '.lock').exists()


def test_two_image_sets_may_be_tested_at_a_time(here):
    pair(here)
    with written_by_another(here / 'out/other_records'):
        run_test(here)
    assert (here / 'out/images_test_result.txt').is_file()


def test_a_process_is_not_in_its_own_way(here):
    """As in a notebook, after an error left the first lock."""
    first, second = FolderLock(here / 'run'), FolderLock(here / 'run')
    assert first.is_in_place() and second.is_in_place()
    second.release()
    assert not first.is_in_place() and not (here / 'run/.lock').exists()
    first.release()
    first.release()                                                  # once more changes nothing


def test_a_file_system_without_locks(data, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr('fcntl.flock', no_locks)
    assert 'run cannot be locked (No locks available): let only one process' in notes(lambda: run_train(data))
    assert (data / 'run/checkpoints/checkpoint.pth.tar').is_file()


def test_programs_train_on_one_run(data):
    """Of two at the same moment one gets the folder. Later ones are told so too; after kill -9 it can be resumed."""
    run, latest = ['--data-dir', '.', '--save-dir', 'run'], 'run/checkpoints/checkpoint.pth.tar'
    both = [start('train', *SMALL, *run, '--epochs', '100000', '--workers', '1', start_new_session=True)
            for _ in range(2)]
    try:
        while both[0].poll() is both[1].poll() is None:
            time.sleep(0.05)
        second, first = sorted(both, key=lambda process: process.poll() is None)
        one_line(second, 2, 'run is being written by another process')
        wait_for(data / latest, first)
        for words in ([*SMALL, *run], [*SMALL, *run, '--overwrite', 'True'], ['--checkpoint-path', latest]):
            with pytest.raises(InputError, match=f'run is being written by another process .process {first.pid} on'):
                train.main(words)
        assert first.poll() is None and (data / 'run/.lock').exists()
        first.kill()                                                 # not its loader process
        first.wait()
        done = load_checkpoint(latest)
        train.main(['--checkpoint-path', latest, '--epochs', str(done['epoch'] + 1), '--workers', '0'])
        assert load_checkpoint(latest)['epoch'] == done['epoch'] + 1
        assert len((data / 'run/epoch_results.txt').read_text().splitlines()) == done['epoch'] + 2
    finally:
        for process in both:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def moved(run):
    run.rename(run.with_name('elsewhere'))


def test_results_that_are_moved_while_they_are_written(here, monkeypatch):
    """They are not continued in a second folder; the first one is finished by the same command."""
    pair(here)
    write, calls = results.save_instances, []

    def then(*words):
        write(*words)
        calls.append(words)
        if len(calls) == 2:
            moved(here / 'out')
    with monkeypatch.context() as patch:
        patch.setattr(results, 'save_instances', then)
        refused(lambda: run_test(here), 'out', 'was moved or deleted while it was written', 'run the same command')
    assert len(calls) == 2 and not list(here.glob('out/**/*.*'))
    moved_to = here / 'elsewhere'
    run_test(here, '--save-dir', str(moved_to))
    assert (moved_to / 'images_test_result.txt').is_file()


def moved_and_replaced(run):
    moved(run)
    put(run / 'checkpoints/checkpoint.pth.tar', 'of another run')


def cleared(run):
    for path in run.iterdir():
        if path.name != '.lock':
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize('happens, minutes', [(moved, '0'), (moved, '10'), (cleared, '10'), (a_file, '0'),
                                              (moved_and_replaced, '10')])
def test_the_run_folder_goes_away_while_training(here, prepared, monkeypatch, happens, minutes):
    """Training ends with one line; nothing is written where the folder was, and what was moved can be resumed."""
    log_epoch = run_folder.Run.log_epoch

    def then(run, row):
        log_epoch(run, row)
        if run.state.epoch == 1:
            happens(here / 'run')
    words = [*SMALL, '--data-dir', str(prepared), '--epochs', '2', '--checkpoint-minutes', minutes]
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Run, 'log_epoch', then)
        refused(lambda: train.main([*words, '--save-dir', 'run']), 'the run folder run was moved, emptied or deleted',
                'resume from its checkpoint with --checkpoint-path')
    if happens is moved_and_replaced:
        assert files_in(here / 'run') == {'checkpoints/checkpoint.pth.tar': b'of another run'}
    elif happens is a_file:
        assert Path('run').read_text() == 'a file'
    else:
        assert not list(Path('run').rglob('*.*tar'))
    if happens in (moved, moved_and_replaced):
        train.main(['--checkpoint-path', 'elsewhere/checkpoints/checkpoint.pth.tar', '--data-dir', str(prepared)])
        assert load_checkpoint('elsewhere/checkpoints/checkpoint.pth.tar')['epoch'] == 2


# ---------------------------------------------------------------------------------------------------
# Numerics
# ---------------------------------------------------------------------------------------------------

ONE_CLASS = {'background': ternary_label(np.zeros((64, 64), int)), 'inside': ternary_label(np.ones((64, 64), int)),
             'contour': np.full((64, 64, 3), (0, 255, 0), np.uint8)}


@pytest.mark.parametrize('one_class, shade', [('background', 255), ('inside', 0), ('contour', 255)])
def test_training_on_one_colour_and_one_class(data, one_class, shade):
    for path in (data / 'images').glob('*/*.png'):
        put(path, np.full((64, 64, 3), shade, np.uint8))
    for path in (data / 'labels').glob('*/*.png'):
        put(path, ONE_CLASS[one_class])
    for path in (data / 'weight_maps').glob('*/*.png'):
        put(path, weight_map.encode_weight_map(weight_map.weight_map(np.ones((64, 64), int))))
    run_train(data)
    rows = (data / 'run/epoch_results.txt').read_text().splitlines()
    assert np.isfinite(np.array(rows[1].split('\t'), float)).all()
    weights = load_checkpoint(data / 'run/checkpoints/checkpoint.pth.tar')['state_dict']
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize('one_class, shade', [('background', 0), ('inside', 128), ('contour', 255)])
def test_transforms_of_one_colour_and_one_class(one_class, shade):
    """Every transform that there is, drawn anew ten times: nothing but finite numbers, and classes 0 to 2."""
    words = {'random_resize': [0.5, 2], 'horizontal_flip': True, 'vertical_flip': True, 'random_affine': 0.9,
             'random_elastic': [6, 15], 'random_rotation': 180, 'random_crop': 24, 'label_encoding': 2, 'to_tensor': 1,
             'normalize': [[0.7, 0.5, 0.6], [1e-3, 0.2, 1]]}
    assert set(words) | {'scale'} == set(my_transforms.TRANSFORMS)
    images = [Image.fromarray(array) for array in (np.full((64, 64, 3), shade, np.uint8),
                                                   np.full((64, 64), 220, np.uint8), ONE_CLASS[one_class])]
    for seed in range(10):
        image, weight, label = my_transforms.get_transforms(words)(images, np.random.default_rng(seed))
        assert torch.isfinite(image).all() and torch.isfinite(weight.float()).all()
        assert set(label.unique().tolist()) <= {0, 1, 2} and weight.float().max() <= 220


@pytest.mark.parametrize('size', [1, 1e4])
@pytest.mark.parametrize('label', [np.zeros((9, 9)), np.ones((9, 9)), np.full((9, 9), 2), np.eye(9),
                                   np.arange(81).reshape(9, 9) % 3, np.kron(np.ones((3, 3)), np.diag([0, 1, 0]))],
                         ids=['background', 'inside', 'contour', 'a line', 'all three', 'single pixels'])
def test_loss_and_scores_of_one_class(label, size):
    """However sure the network is, and of whichever class: loss, gradient and scores are finite."""
    target, weight = torch.from_numpy(label).long()[None], torch.full((1, 9, 9), 11.0)
    for predicted in range(3):
        logits = torch.zeros(1, 3, 9, 9)
        logits[:, predicted] = size
        logits.requires_grad_()
        losses = VarCELoss()(logits, target, weight)
        losses[0].backward()
        assert all(torch.isfinite(loss) for loss in losses) and torch.isfinite(logits.grad).all()
        assert np.isfinite(train.pixel_results(logits, target)).all()
        found, wanted = np.full((9, 9), predicted == 1, int), (label == 1).astype(int)
        for score in (nuclei_accuracy_object_level, gland_accuracy_object_level):
            values = score(found, wanted)._asdict()
            apart = values.pop('hausdorff')                                      # of no pair: not a number
            assert np.isfinite(list(values.values())).all() and (np.isfinite(apart) or not (found & wanted).any())
        assert np.isfinite(list(standard_metrics(found, wanted).values())).all()


@pytest.mark.parametrize('shade', [0, 128, 255])
def test_normalising_one_colour(shade):
    colours = prepare_data.Reinhard_normalizer().fit(plain()[0])
    one_colour = colours.transform(np.full((8, 8, 3), shade, np.uint8))
    assert np.abs(one_colour.astype(int) - one_colour[0, 0]).max() == 0
    assert np.abs(rgb2lab(one_colour)[0, 0] - colours.mean).max() < 2            # the anchor's mean colour
    flat = prepare_data.Reinhard_normalizer().fit(np.full((8, 8, 3), shade, np.uint8))
    assert np.abs(flat.transform(plain()[0]).astype(int) - shade).max() <= 1     # an anchor of one colour


@pytest.mark.parametrize('w0', [0, 1e-9, 1.3, 10, 250])
@pytest.mark.parametrize('sigma', [1e-3, 0.5, 5, 1e6])
def test_weights_are_finite_and_at_most_w0(w0, sigma):
    labels = [plain()[1], np.arange(1, 401).reshape(20, 20), np.ones((9, 9), int), np.zeros((9, 9), int),
              np.eye(9, dtype=int), np.arange(9).reshape(1, 9)]
    for label in labels:
        w = weight_map.weight_map(label, w0, sigma)
        assert np.isfinite(w).all() and w.min() >= 0 and w.max() <= w0
        stored = weight_map.encode_weight_map(w)
        assert stored.min() >= 20 and stored.max() / 20 <= w0 + 1 + 0.025        # rounded to 0.05


def test_preparing_images_of_one_colour_only(here):
    """Training refuses a standard deviation of 0, so preparation must not end as if all were well."""
    pair(here, np.full((64, 64, 3), 200, np.uint8))
    put(here / 'images/a.png', np.full((64, 64, 3), 200, np.uint8))
    refused(lambda: run_prepare(here), 'images')


# ---------------------------------------------------------------------------------------------------
# As programs
# ---------------------------------------------------------------------------------------------------

def heed_interrupts():
    """A shell that starts the tests in the background makes them, and what they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(script, *words, code=None, **options):
    arguments = ['-c', code] if code else [str(ROOT / SCRIPT[script])]
    options.setdefault('preexec_fn', heed_interrupts)
    return subprocess.Popen([sys.executable, *arguments, *map(str, words)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def one_line(process, code, *words, prefix='error: '):
    """The process ends with an exit code and, after any notes, one line on stderr."""
    output, error = process.communicate(timeout=120)
    lines = [line for line in error.split('\n') if line and '\r' not in line]      # without progress bars
    told = [line for line in lines if not line.startswith('note: ')]
    assert process.returncode == code and len(told) == 1 and told[0] == lines[-1], (process.returncode, error)
    assert told[0].startswith(prefix) and 'Traceback' not in error and 'Warning' not in error, error
    for word in words:
        assert word in told[0], error
    return lines


def test_program_prepare_data(here):
    pair(here, saved(rgba(100)), coloured)
    lines = one_line(start('prepare', *PREPARE, '--img-dir', 'images', '--label-dir', 'labels', '--data-dir', 'out'), 2,
                     'labels/x.png is a colour image')
    assert len(lines) == 1 or lines[0].startswith('note: ')


def test_program_weight_map(here):
    one_line(start('weight_map', '--label-dir', 'nowhere', '--save-dir', 'out', '--no-such'), 2, '--no-such')


def test_program_test(here):
    pair(here, saved(grey), plain(0, 64, 60)[1])
    shutil.copy(here / 'images/x.png', here / 'images/a.png')
    process = start('test', *TEST, '--img-dir', 'images', '--label-dir', 'labels', '--model-path', 'net.pth.tar')
    lines = one_line(process, 2, 'labels/x.png is 60 x 64 pixels')
    assert lines[0].startswith('note: net.pth.tar carries no mean_std') or lines[0].startswith('note: a.png: grey')


def test_program_train_whose_data_is_moved_away(data):
    """One loader process finds the files gone."""
    process = start('train', *SMALL, '--data-dir', 'data', '--save-dir', 'run', '--epochs', '100000', '--workers', '1',
                    cwd=moved_below(data, 'data'), start_new_session=True)
    wait_for(data / 'run/checkpoints/checkpoint.pth.tar', process)
    os.rename(data / 'data', data / 'elsewhere')
    try:
        output, error = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 2 and 'Traceback' not in error, error[-2000:]
    told = [line for line in error.split('\n') if line.startswith('error: ')]
    assert len(told) == 1 and 'no such file: data/' in told[0], error[-2000:]
    assert error.rstrip().endswith(told[0].rstrip()), error[-2000:]


def moved_below(folder, name):
    (folder / name).mkdir()
    for part in ('images', 'labels', 'weight_maps', 'mean_std.npy'):
        os.rename(folder / part, folder / name / part)
    return folder


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.01)


def many(folder, count, size=300):
    """Images and labels enough for a signal to arrive in the middle."""
    for k in range(count):
        for part, content in zip(('images', 'labels'), plain(0, size, size)):
            if k == 0:
                put(folder / part / 'n0.png', content)
            else:
                os.link(folder / part / 'n0.png', folder / part / f'n{k}.png')


def test_program_prepare_data_is_stopped(here):
    many(here, 300)
    process = start('prepare', '--like', 'MultiOrgan', '--img-dir', 'images', '--label-dir', 'labels', '--data-dir',
                    'out', '--patch-size', '100')
    while not list(here.glob('.out.preparing/new/images/*/n*.png')):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and 'Traceback' not in error, error
    assert not (here / 'out').exists() and not (here / '.out.preparing').exists()


def test_program_test_is_stopped(here):
    many(here, 500, 100)
    process = start('test', *TEST, '--img-dir', 'images', '--label-dir', 'labels', '--model-path', 'net.pth.tar',
                    '--save-dir', 'out')
    wait_for(here / 'out/images_records/n0.json', process)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and 'Traceback' not in error, error
    assert not temporary_files(here) and not (here / 'out/images_test_result.txt').exists()
    assert all(tifffile.imread(path).shape == (100, 100) for path in here.glob('out/*/*_seg.tiff'))
    for path in here.glob('out/images_records/*.json'):
        assert all((here / 'out' / file).is_file() for file in json.loads(path.read_text())['files'])


def test_program_whose_output_nobody_reads(here):
    """As `python test.py | head -1` when head has gone: a quiet end."""
    pair(here)
    process = start('test', *TEST, '--img-dir', 'images', '--label-dir', 'labels', '--model-path', 'net.pth.tar',
                    '--data-dir', '.', '--save-dir', 'out')
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 0
    assert 'Traceback' not in error and 'Error' not in error and 'Exception' not in error, error


ALL_SCRIPTS = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import prepare_data, test, train, weight_map
from support.script import run_script
words = json.loads(sys.argv[2])
for script in (prepare_data, train, test, weight_map):
    sys.argv[1:] = words[script.__name__]
    run_script(script.main)
"""


def words_of_all(folder, out):
    """Words for the four scripts, from the pair in `folder`; the one data set that is prepared there is trained on."""
    pairs = ['--img-dir', f'{folder}/images', '--label-dir', f'{folder}/labels']
    return {'prepare_data': [*PREPARE, *pairs, '--data-dir', f'{out}/data', '--patch-size', '64'],
            'train': [*SMALL, '--data-dir', f'{out}/data', '--save-dir', f'{out}/run'],
            'test': [*TEST, *pairs, '--model-path', f'{out}/run/checkpoints/checkpoint.pth.tar',
                     '--save-dir', f'{out}/results'],
            'weight_map': ['--label-dir', f'{folder}/labels', '--save-dir', f'{out}/weights']}


def test_programs_in_the_c_locale(here):
    """Names are UTF-8 whatever the locale, as Python has it."""
    folder = 'Färbung 核'
    pair(here / folder, image_name='Gewebe ä.png', label_name='Gewebe ä.png')
    process = start(None, json.dumps([str(ROOT)]), json.dumps(words_of_all(folder, folder)), code=ALL_SCRIPTS,
                    env={**os.environ, 'LANG': 'C', 'LC_ALL': 'C'}, encoding='utf-8')
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0 and 'Gewebe ä' in output and 'Färbung 核/results' in output, error
    assert (here / folder / 'results/images_segmentation/Gewebe ä_seg.tiff').is_file()
    assert (here / folder / 'weights/Gewebe ä_weight.png').is_file()


def test_program_when_python_reads_names_as_ascii(data):
    """PYTHONUTF8=0 in the C locale: a name beyond ASCII is refused before anything is written."""
    process = start('train', *SMALL, '--data-dir', '.', '--save-dir', 'Färbung', encoding='ascii',
                    env={**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0'})
    one_line(process, 2, 'the command line: the name', 'is not UTF-8; Python reads names as ascii: set PYTHONUTF8=1')
    assert not (data / 'Färbung').exists()


def test_scripts_whose_output_is_closed(here, monkeypatch):
    """As after `>&- 2>&-`, when Python has no sys.stdout and no sys.stderr."""
    pair(here)
    words = words_of_all('.', 'out')
    handler, show = signal.getsignal(signal.SIGTERM), warnings.showwarning
    try:
        for script in (prepare_data, train, test_script, weight_map):
            monkeypatch.setattr(sys, 'argv', [script.__name__, *words[script.__name__]])
            monkeypatch.setattr(sys, 'stdout', None), monkeypatch.setattr(sys, 'stderr', None)
            run_script(script.main)
        with pytest.raises(SystemExit) as caught:
            monkeypatch.setattr(sys, 'stderr', None)
            run_script(lambda: weight_map.main(['--label-dir', 'nowhere', '--save-dir', 'out']))
    finally:
        signal.signal(signal.SIGTERM, handler)
        warnings.showwarning = show
    assert caught.value.code == 2
    made = files_in(here / 'out')
    assert {'data/mean_std.npy', 'run/checkpoints/checkpoint.pth.tar', 'results/images_test_result.txt',
            'weights/x_weight.png'} <= set(made)


def test_training_is_interrupted_when_nobody_listens(data, monkeypatch):
    """As Ctrl-C in `python train.py 2>&1 | tee log`, which ends tee too: the checkpoint is saved all the same."""
    class Nobody(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, 'Broken pipe')

    monkeypatch.setattr(train.Run, 'save_if_due', lambda run: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(sys, 'stderr', Nobody())
    with pytest.raises(SystemExit) as caught:
        run_train(data, '--epochs', '5')
    assert caught.value.code == 130
    assert load_checkpoint(data / 'run/checkpoints/checkpoint.pth.tar')['step'] == 1
    assert 'resume with' in (data / 'run/train.log').read_text().splitlines()[-1]


def test_nothing_is_fetched(here, monkeypatch):
    """Offline, or not: no script asks for another computer."""
    asked = []
    for owner, name in ((socket.socket, 'connect'), (socket.socket, 'connect_ex'), (socket, 'getaddrinfo'),
                        (socket, 'create_connection')):
        monkeypatch.setattr(owner, name, lambda *words, **more: asked.append(words) or 1 / 0)
    pair(here)
    words = words_of_all('.', 'out')
    for script in (prepare_data, train, test_script, weight_map):
        script.main(words[script.__name__])
    assert asked == []
    with pytest.raises(ZeroDivisionError):
        urllib.request.urlopen('http://127.0.0.1:9')                         # it would have been seen
    assert asked


@pytest.mark.parametrize('error, code', [(MemoryError(), 2), (torch.OutOfMemoryError('CUDA out of memory.\nTried'), 2),
                                         (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2),
                                         (RuntimeError('another'), None)])
def test_too_little_memory(error, code):
    if code is None:
        with pytest.raises(RuntimeError, match='another'):
            line_of(error)
    else:
        line = line_of(error)
        assert line.startswith('error: not enough memory (') and '--batch-size' in line and '\n' not in line


@pytest.fixture
def full_disk(here):
    """A disk of 64 KiB."""
    (here / 'disk').mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(here / 'disk')]
    if not shutil.which('mount') or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('no small disk can be mounted here')
    yield here / 'disk'
    subprocess.run(['umount', '-l', str(here / 'disk')], check=True)


@pytest.mark.parametrize('script, words', [('prepare', ['--data-dir', 'disk/out']),
                                           ('test', ['--save-dir', 'disk/out'])])
def test_a_full_disk(here, full_disk, script, words):
    """What is written before the disk is full is whole."""
    many(here, 20, 100)
    with pytest.raises((OSError, InputError)) as caught:
        RUN[script](here, *words)
    assert isinstance(caught.value, InputError) or caught.value.errno == errno.ENOSPC, repr(caught.value)
    assert not temporary_files(here)
    assert all(path.stat().st_size and Image.open(path).load() for path in full_disk.rglob('*.png'))


def test_program_on_a_full_disk(here, full_disk):
    many(here, 20, 100)
    one_line(start('weight_map', '--label-dir', 'labels', '--save-dir', 'disk/out'), 2, 'no space left on the disk')
    assert not temporary_files(here)
