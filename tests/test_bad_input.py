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
from PIL import Image, ImageOps
from skimage.color import rgb2lab

import prepare_data
import test as test_script
import train
import weight_map
from FullNet import create_model
from loss import VarCELoss
from miniature import SMALL, make_multi_organ, nuclei, pixels
from prepare_data import ternary_label
from support import files, results, run_folder
from support.checkpoints import load_checkpoint
from support.files import FolderLock
from support.script import InputError, run_script

ROOT = Path(__file__).parents[1]
MODEL = dict(name='FullNet', in_c=3, out_c=3, n_layers=4, growth_rate=2, drop_rate=0.1, compress_ratio=0.5,
             dilations=(1,), is_hybrid=True, layer_type='basic')
TEST = ['--n-layers', '4', '--growth-rate', '2', '--dilations', '1', '--gpu', 'cpu', '--tta', 'none',
        '--patch-size', '64', '--overlap', '16', '--min-area', '1']
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
    """Write `content`: a text, an array as image, or a function of the path. None removes the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.unlink()
    elif callable(content):
        content(path)
    elif isinstance(content, str):
        path.write_text(content, encoding='utf-8')
    else:
        Image.fromarray(content).save(path)


def pair(folder, image=None, label=None, name='x.png'):
    """raw/images and raw/labels with a pair that is fine, `a`, and one that may not be, `x`. None = as it should be."""
    put(folder / 'raw/images/a.png', plain(1)[0])
    put(folder / 'raw/labels/a.png', plain(1)[1])
    put(folder / 'raw/images' / name, plain()[0] if image is None else image)
    put(folder / 'raw/labels' / name, plain()[1] if label is None else label)


def run_prepare(folder, *words):
    prepare_data.main([*PREPARE, '--img-dir', str(folder / 'raw/images'), '--label-dir', str(folder / 'raw/labels'),
                       '--data-dir', str(folder / 'out'), *words])


def run_test(folder, *words):
    test_script.main([*TEST, '--img-dir', str(folder / 'raw/images'), '--label-dir', str(folder / 'raw/labels'),
                      '--data-dir', str(folder), '--model-path', str(folder / 'net.pth.tar'),
                      '--save-dir', str(folder / 'out'), *words])


def run_weight_map(folder, *words):
    weight_map.main(['--label-dir', str(folder / 'raw/labels'), '--save-dir', str(folder / 'out'), *words])


def run_train(folder, *words):
    train.main([*SMALL, '--data-dir', str(folder), '--save-dir', str(folder / 'run'), *words])


def run_init(folder):
    run_train(folder, '--init-from', str(folder / 'net.pth.tar'))


def run_resume(folder, *words):
    run_train(folder, '--checkpoint-path', str(folder / 'net.pth.tar'), '--epochs', '2', *words)


RUN = {'prepare': run_prepare, 'test': run_test, 'weight_map': run_weight_map, 'train': run_train, 'init': run_init,
       'resume': run_resume}


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
    """What `run()` has to note, a list."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        run()
    assert not temporary_files('.')
    return [str(w.message) for w in caught if w.category is UserWarning]


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
    optimizer = torch.optim.Adam(network().parameters()).state_dict()
    torch.save({'epoch': 1, 'state_dict': {f'module.{key}': value for key, value in weights.items()},
                'best_iou': np.float64(0.5), 'optimizer': optimizer, **more}, path)


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
    """Prepared data of one's own and a pair of raw files, to be spoiled."""
    shutil.copytree(prepared, here, dirs_exist_ok=True)
    pair(here)
    return here


# ---------------------------------------------------------------------------------------------------
# Images and labels
# ---------------------------------------------------------------------------------------------------

def cut(path):
    """A PNG of which only the first half arrived."""
    Image.fromarray(plain()[0]).save(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def turned(path):
    """A JPEG with EXIF orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(plain()[0]).save(path, quality=95, exif=exif)


two_pieces = np.zeros((64, 64), np.uint8)
two_pieces[5:20, 5:20] = two_pieces[40:60, 40:60] = 3
two_pieces[30:35, 10:20] = 1


def each(table):
    """Parameters for each script of each row of {title: (scripts, ...)}."""
    return [pytest.param(script, *row, id=f'{title}-{script}') for title, (scripts, *row) in table.items()
            for script in scripts.split()]


# title: scripts, file, content, words of the message; all that the readers refuse is in test_dataset.py
REFUSED_FILES = {
    'truncated image': ('prepare test', 'raw/images/x.png', cut, ['x.png is damaged or truncated', 'copy it again']),
    'colour label': ('prepare weight_map test', 'raw/labels/x.png',
                     np.dstack([plain()[1], plain()[1] * 3, plain()[1] + 1]),
                     ['x.png is a colour image', 'expected one integer id per pixel']),
    'label of another size': ('prepare test', 'raw/labels/x.png', plain(0, 64, 60)[1],
                              ['x.png is 60 x 64 pixels', '64 x 64', 'same size']),
    'truncated crop': ('train', 'images/train/train_0.png', cut, ['train_0.png is damaged or truncated']),
    'weight map of 16 bits': ('train', 'weight_maps/train/train_0_weight.png', np.full((64, 64), 300, np.uint16),
                              ['train_0_weight.png has colour mode I', 'a weight map of 8-bit grey; run prepare_data']),
}


@pytest.mark.parametrize('script, file, content, words', each(REFUSED_FILES))
def test_refused_files(data, script, file, content, words):
    put(data / file, content)
    refused(lambda: RUN[script](data), *words)
    assert not made_of(data / 'out') and not list(data.glob('run/**/*.pth.tar'))


# name: ending, content, what it shows (None = what a viewer shows)
ACCEPTED_IMAGES = {
    'rgba': ('.png', np.dstack([plain()[0], np.full((64, 64), 128, np.uint8)]), plain()[0]),
    'turned': ('.jpg', turned, None),
    'upper': ('.PNG', plain()[0], plain()[0]),
    'black': ('.png', np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)),
}


def test_accepted_images(here):
    """Patches and probabilities are those of what the file shows."""
    for name, (ending, content, _) in ACCEPTED_IMAGES.items():
        put(here / f'raw/images/{name}{ending}', content)
        put(here / f'raw/labels/{name}.png', plain()[1])
    found = notes(lambda: run_prepare(here, '--patch-size', '64'))
    assert sorted(found) == ['rgba.png: its alpha channel is not fully opaque; it was dropped',
                             'turned.jpg: turned by its EXIF orientation (6)']
    for name, (ending, _, expected) in ACCEPTED_IMAGES.items():
        if expected is None:
            expected = np.array(ImageOps.exif_transpose(Image.open(here / f'raw/images/{name}{ending}')))
        assert np.array_equal(pixels(next((here / 'out/images').glob(f'*/{name}_0.png'))), expected)
        put(here / f'raw/images/{name}_same.png', expected)
        put(here / f'raw/labels/{name}_same.png', plain()[1])
    put(here / 'raw/images/one.png', np.full((1, 1, 3), 200, np.uint8))
    put(here / 'raw/labels/one.png', np.ones((1, 1), np.uint8))

    shutil.rmtree(here / 'out')
    assert sorted(notes(lambda: run_test(here))) == sorted(found)
    for name in ACCEPTED_IMAGES:
        assert np.array_equal(pixels(here / f'out/images_prob_maps/{name}_prob_inside.png'),
                              pixels(here / f'out/images_prob_maps/{name}_same_prob_inside.png'))
    assert tifffile.imread(here / 'out/images_segmentation/one_seg.tiff').shape == (1, 1)
    assert '\none:\t' in (here / 'out/images_test_result.txt').read_text()


label = plain()[1].astype(np.int32)
# name: ending, content, ids that it stands for
ACCEPTED_LABELS = {
    'rgb': ('.png', np.dstack([plain()[1]] * 3), label),
    'large': ('.npy', lambda path: np.save(path, label * 70_000), label * 70_000),
    'pieces': ('.png', two_pieces, two_pieces.astype(int)),
    'empty': ('.png', np.zeros((64, 64), np.uint8), np.zeros((64, 64), int)),
}


def test_accepted_labels(here):
    """Stored ids, ternary labels, weight maps and scores are those of the ids that a label stands for."""
    for name, (ending, content, _) in ACCEPTED_LABELS.items():
        put(here / f'raw/images/{name}.png', plain()[0])
        put(here / f'raw/labels/{name}{ending}', content)
    found = notes(lambda: run_prepare(here, '--patch-size', '64'))
    assert sorted(found) == ['empty.png: the label has no object',
                             'rgb.png: RGB label with three equal channels, one of them is used']
    report = json.loads((here / 'out/prepare_report.json').read_text())
    assert report['labels_with_objects_in_pieces'] == {'pieces': 1}
    notes(lambda: weight_map.main(['--label-dir', 'raw/labels', '--save-dir', 'weights']))
    for name, (_, _, ids) in ACCEPTED_LABELS.items():
        stored = next((here / 'out/labels_instance').glob(f'*/{name}_label.*'))
        assert np.array_equal(tifffile.imread(stored) if stored.suffix == '.tif' else pixels(stored), ids)
        assert np.array_equal(pixels(next((here / 'out/labels').glob(f'*/{name}_0_label.png'))), ternary_label(ids))
        weights = weight_map.encode_weight_map(weight_map.weight_map(ids))
        assert np.array_equal(pixels(next((here / 'out/weight_maps').glob(f'*/{name}_0_weight.png'))), weights)
        assert np.array_equal(pixels(here / f'weights/{name}_weight.png'), weights)
        put(here / f'raw/images/{name}_ids.png', plain()[0])
        np.save(here / f'raw/labels/{name}_ids.npy', ids)

    shutil.rmtree(here / 'out')
    assert set(found) <= set(notes(lambda: run_test(here)))
    rows = [line.split('\t') for line in (here / 'out/images_test_result.txt').read_text().splitlines()]
    scores = {row[0]: row[1:] for row in rows}
    for name, (_, _, ids) in ACCEPTED_LABELS.items():
        assert scores[f'{name}:'] == scores[f'{name}_ids:']
        assert [value == 'nan' for value in scores[f'{name}:']] == [column == 'Hausdorff' and not ids.any()
                                                                    for column in scores['Metrics:']]


def test_masks_are_prepared_when_told(here):
    mask = np.zeros((64, 64), np.uint8)
    mask[5:20, 5:20] = mask[22:60, 10:60] = 255
    pair(here, label=mask)
    put(here / 'raw/labels/a.png', mask)
    run_prepare(here, '--binary-labels', 'True')
    assert pixels(next((here / 'out/labels_instance').glob('*/x_label.png'))).max() == 2


# ---------------------------------------------------------------------------------------------------
# Folders, pairs, checkpoints and options
# ---------------------------------------------------------------------------------------------------

class Malicious:
    """Unpickling this writes a file."""

    def __reduce__(self):
        return os.system, ('touch was_run',)


def other_files(path):
    shutil.rmtree(path)
    put(path / 'readme.txt', 'nothing here')
    put(path / '.DS_Store', '')


NOT_RESUMED = ['net.pth.tar holds no epoch, best_iou or optimizer state that fits', '--init-from']

# title: scripts, file or folder, content, words of the message; all that the loader refuses is in test_utils.py
REFUSED_AT_ONCE = {
    # folders and pairs
    'missing images': ('prepare', 'raw/images', shutil.rmtree, ['no such folder', 'raw/images']),
    'missing labels': ('test weight_map', 'raw/labels', shutil.rmtree, ['no such folder', 'raw/labels']),
    'no images': ('prepare test', 'raw/images', other_files, ['no images in', 'raw/images', 'saw readme.txt']),
    'no labels': ('weight_map', 'raw/labels', other_files, ['no images in', 'raw/labels', 'saw readme.txt']),
    'missing crops': ('train', 'images/train', shutil.rmtree, ['no such folder', 'images/train']),
    'no ternary labels': ('train', 'labels/val', other_files, ['missing in', 'labels/val', 'prepare_data.py']),
    'missing label': ('test', 'raw/labels/x.png', None,
                      ['1 instance labels of images missing', 'x.png', "without labels give --label-dir ''"]),
    'missing image': ('prepare', 'raw/images/x.png', None, ['1 images of instance labels missing', 'images', 'x.png']),
    'seven missing labels': ('prepare', 'raw/images', lambda path: [put(path / f'm{k}.png', plain()[0])
                                                                    for k in range(7)],
                             ['7 instance labels', 'm0.png, m1.png, m2.png, m3.png, m4.png, ...']),
    'images of one colour': ('prepare', 'raw/images', lambda path: [put(path / f'{name}.png', np.full_like(
        plain()[0], 200)) for name in 'ax'], ['a colour channel has the same value in all pixels of all training']),
    # checkpoints and mean_std.npy
    'checkpoint with code': ('test init resume', 'net.pth.tar', lambda path: published(path, args=Malicious()),
                             ['net.pth.tar', 'could run code']),
    'mean_std with code': ('test train', 'mean_std.npy',
                           lambda path: np.save(path, np.array([Malicious()], dtype=object), allow_pickle=True),
                           ['mean_std.npy is not a plain NumPy array']),
    'mean_std of rows of different lengths': (
        'test', 'net.pth.tar', lambda path: published(path, mean_std=[[0.7, 0.5, 0.6], [0.2, 0.2]]),
        ['net.pth.tar holds', '(2, 3)']),
    'other growth_rate': (
        'test init resume', 'net.pth.tar',
        lambda path: published(path, create_model(**MODEL | dict(growth_rate=3)).state_dict()),
        ['growth_rate is 3 in the file, 2 in the options']),
    'no optimizer': ('resume', 'net.pth.tar', lambda path: published(path, optimizer=None),
                     ['net.pth.tar holds no optimizer state', '--init-from']),
    'optimizer of another network': (
        'resume', 'net.pth.tar',
        lambda path: published(path, optimizer=torch.optim.Adam([torch.zeros(1)]).state_dict()), NOT_RESUMED),
    'no epoch': ('resume', 'net.pth.tar', lambda path: torch.save(
        {'state_dict': network().state_dict(), 'optimizer': {'state': {}}}, path), NOT_RESUMED),
    'epoch is a text': ('resume', 'net.pth.tar', lambda path: published(path, epoch='last', options={'lr': 0.1}),
                        NOT_RESUMED),
}


@pytest.mark.parametrize('script, file, content, words', each(REFUSED_AT_ONCE))
def test_refused_at_once(data, script, file, content, words):
    put(data / file, content)
    before = sorted(data.rglob('*'))
    refused(lambda: RUN[script](data), *words)
    assert sorted(data.rglob('*')) == before


def test_the_malicious_files_would_have_been_seen(here):
    pickle.loads(pickle.dumps(Malicious()))
    assert (here / 'was_run').exists()


def unusual(path):
    """Its bfloat16 weights were on the second GPU; with other NumPy scalars, and options of another program."""
    state = {key: value.bfloat16() if value.is_floating_point() else value
             for key, value in network().state_dict().items()}
    with unittest.mock.patch('torch.serialization.location_tag', lambda storage: 'cuda:1'):
        published(path, state, best_iou=np.float32(0.5), epoch=np.int64(3), options={'lr': 0.1})
    assert b'cuda:1' in path.read_bytes()


def test_an_unusual_checkpoint(data):
    run_test(data)
    before = pixels(data / 'out/images_prob_maps/x_prob_inside.png').astype(int)
    unusual(data / 'net.pth.tar')
    note = f'{data}/net.pth.tar: bfloat16 weights, converted to float32'
    assert note in notes(lambda: run_test(data))
    assert np.abs(before - pixels(data / 'out/images_prob_maps/x_prob_inside.png')).max() <= 3
    assert note in notes(lambda: run_init(data))


@pytest.mark.parametrize('script, options, words', [
    ('prepare', '--patch-size 65', ['64 x 64 pixels is smaller than a patch of 65 x 65']),
    ('prepare', '--fractions 0.5 0.5 0.5', ['--fractions is 0.5 0.5 0.5', 'add up to 1']),
    ('prepare', '--fractions 0 1 0', ['--fractions is 0 1 0', 'above 0']),
    ('prepare', '--max-megapixels 0.001', ['more than max_megapixels = 0.001']),
    ('test', '--max-megapixels 0.001', ['more than max_megapixels = 0.001']),
    ('test', '--scale-factor 1e9', ['scaled by 1e+09 the image has 64000000000', 'megapixels']),
    ('resume', '--ema-decay 0.9', ['net.pth.tar holds no averaged weights', '--init-from']),
    ('prepare', '--data-dir file', ['file is a file; expected a folder, or a new name']),
    ('test', '--save-dir file/out', ['file']),
    ('weight_map', '--save-dir file', ['file']),
    ('train', '--save-dir file', ['file']),
    ('prepare', '--data-dir raw/images', ['would replace the raw data', 'images']),
    ('prepare', '--data-dir raw/labels/deeper', ['would replace the raw data', 'labels']),
    ('weight_map', '--save-dir raw/labels', ['same folder', 'labels']),
])
def test_refused_options(data, script, options, words):
    """What is seen before any file is read is in test_options.py."""
    put(data / 'file', 'kept')
    before = files_in(data)
    refused(lambda: RUN[script](data, *options.split()), *words)
    assert {name: content for name, content in files_in(data).items() if not name.startswith('out/')} == before
    assert not made_of(data / 'out')


# ---------------------------------------------------------------------------------------------------
# Names, and files that may not be read or written
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stem', ['Färbung 核', '--img-dir', 'a.b.c..d', '{dataset}', 'n' * 200])
def test_names_of_files_and_folders(here, stem):
    """Whatever the name, the files are found and what is made of them bears it."""
    folder = here / stem
    pair(folder, name=f'{stem}.png')
    raw = [f'--img-dir={stem}/raw/images', f'--label-dir={stem}/raw/labels']
    prepare_data.main([*PREPARE, *raw, f'--data-dir={stem}/out'])
    assert {path.stem for path in (folder / 'out').glob('images/*/*_0.png')} == {'a_0', f'{stem}_0'}
    weight_map.main([raw[1], f'--save-dir={stem}/weights'])
    assert (folder / f'weights/{stem}_weight.png').is_file()
    test_script.main([*TEST, *raw, '--model-path=net.pth.tar', f'--save-dir={stem}/results'])
    assert (folder / f'results/images_segmentation/{stem}_seg.tiff').is_file()
    assert f'\n{stem}:\t' in (folder / 'results/images_test_result.txt').read_text(encoding='utf-8')


@pytest.fixture
def open_folder(data):
    """Data in a folder that an unprivileged user reaches and owns."""
    if os.geteuid() != 0:
        pytest.skip('only root may become another user')
    folder = Path(tempfile.mkdtemp(dir='/tmp', prefix='bad_input_'))
    shutil.copytree(data, folder, dirs_exist_ok=True)
    for path in (folder, *folder.rglob('*')):
        os.chown(path, 65534, 65534)
        path.chmod(0o777 if path.is_dir() else 0o666)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize('script, path, mode, word', [
    ('prepare', 'raw/images/x.png', 0, 'x.png'), ('prepare', '.', 0o555, 'out'), ('weight_map', '.', 0o555, 'out'),
    ('test', 'raw/images', 0, 'images'), ('test', 'net.pth.tar', 0, 'net.pth.tar'), ('test', '.', 0o555, 'out'),
    ('train', 'mean_std.npy', 0, 'mean_std.npy'), ('train', '.', 0o555, 'run'),
])
def test_without_permission(open_folder, monkeypatch, script, path, mode, word):
    monkeypatch.chdir(open_folder)
    (open_folder / path).chmod(mode)
    Image.init()
    codecs.lookup('latin1'), codecs.lookup('cp437')      # of pickles and zip files: Python may lie in root's home
    os.setegid(65534), os.seteuid(65534)
    try:
        refused(lambda: RUN[script](open_folder), word, 'ermission')
    finally:
        os.seteuid(0), os.setegid(0)
    assert not made_of(open_folder / 'out') and not list(open_folder.glob('run/**/*.pth.tar'))


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
def test_a_folder_that_another_process_writes(data, script, locked):
    """It is refused and nothing is changed there; once the other one is killed, its lock is too."""
    with written_by_another(data / locked) as other:
        before = files_in(data)
        refused(lambda: RUN[script](data), f'{data / locked} is being written by another process',
                f'process {other.pid} on', 'wait until it has ended')
        assert files_in(data) == before
    assert (data / locked / '.lock').exists()
    with written_by_another(data / 'out/other_records') if script == 'test' else contextlib.nullcontext():
        RUN[script](data)                                            # another set of images may be tested meanwhile
    assert not (data / locked / '.lock').exists()


def test_a_process_is_not_in_its_own_way(here):
    """As in a notebook, after an error left the first lock."""
    first, second = FolderLock(here / 'run'), FolderLock(here / 'run')
    assert first.is_in_place() and second.is_in_place()
    second.release()
    assert not first.is_in_place() and not (here / 'run/.lock').exists()
    third = FolderLock(here / 'run')
    first.release()                                                  # leaves the lock that came after it
    first.release()                                                  # once more changes nothing
    assert third.is_in_place()
    third.release()


def test_a_lock_file_that_its_last_owner_removes_is_locked_anew(here, monkeypatch):
    """Between opening and locking: or the next process would make, and lock, another file of this name."""
    lock, calls = files._lock, []

    def too_late(file):
        if not calls:
            (here / 'run/.lock').unlink()
        calls.append(file)
        lock(file)
    monkeypatch.setattr(files, '_lock', too_late)
    held = FolderLock(here / 'run')
    assert len(calls) == 2 and held.is_in_place()
    held.release()


def test_a_file_system_without_locks(data, monkeypatch):
    def no_locks(file):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(files, '_lock', no_locks)
    assert f'{data}/run cannot be locked (No locks available): let only one process write there' in notes(
        lambda: run_train(data))
    assert (data / 'run/checkpoints/checkpoint.pth.tar').is_file()


def test_programs_train_on_one_run(data):
    """A second one is told so, however it is started; once the first is gone by kill -9, the run can be resumed."""
    run, latest = [*SMALL, '--data-dir', '.', '--save-dir', 'run'], 'run/checkpoints/checkpoint.pth.tar'
    with started('train.py', *run, '--epochs', '100000', '--workers', '1') as first:
        wait_for(data / latest, first)
        for words in (run, [*run, '--overwrite', 'True'], ['--checkpoint-path', latest]):
            with pytest.raises(InputError, match=f'run is being written by another process .process {first.pid} on'):
                train.main(words)
        assert first.poll() is None and (data / 'run/.lock').exists()
        first.kill()                                                 # not its loader process
        first.wait()
        done = load_checkpoint(latest)
        train.main(['--checkpoint-path', latest, '--epochs', str(done['epoch'] + 1), '--workers', '0'])
        assert load_checkpoint(latest)['epoch'] == done['epoch'] + 1
        assert len((data / 'run/epoch_results.txt').read_text().splitlines()) == done['epoch'] + 2


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


@pytest.mark.parametrize('happens, minutes', [(moved, '0'), (cleared, '10'), (moved_and_replaced, '10')])
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
    else:
        assert not list(Path('run').rglob('*.*tar'))
    if happens is not cleared:
        train.main(['--checkpoint-path', 'elsewhere/checkpoints/checkpoint.pth.tar', '--data-dir', str(prepared)])
        assert load_checkpoint('elsewhere/checkpoints/checkpoint.pth.tar')['epoch'] == 2


# ---------------------------------------------------------------------------------------------------
# Numerics
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('label, shade', [
    (ternary_label(np.zeros((64, 64), int)), 255), (ternary_label(np.ones((64, 64), int)), 0),
    (np.full((64, 64, 3), (0, 255, 0), np.uint8), 255)], ids=['background', 'inside', 'contour'])
def test_training_on_one_colour_and_one_class(data, label, shade):
    for path in (data / 'images').glob('*/*.png'):
        put(path, np.full((64, 64, 3), shade, np.uint8))
    for path in (data / 'labels').glob('*/*.png'):
        put(path, label)
    for path in (data / 'weight_maps').glob('*/*.png'):
        put(path, weight_map.encode_weight_map(weight_map.weight_map(np.ones((64, 64), int))))
    run_train(data)
    rows = (data / 'run/epoch_results.txt').read_text().splitlines()
    assert np.isfinite(np.array(rows[1].split('\t'), float)).all()
    weights = load_checkpoint(data / 'run/checkpoints/checkpoint.pth.tar')['state_dict']
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize('size', [1, 1e4])
@pytest.mark.parametrize('label', [np.zeros((9, 9)), np.ones((9, 9)), np.full((9, 9), 2), np.eye(9),
                                   np.arange(81).reshape(9, 9) % 3, np.kron(np.ones((3, 3)), np.diag([0, 1, 0]))],
                         ids=['background', 'inside', 'contour', 'a line', 'all three', 'single pixels'])
def test_loss_of_one_class(label, size):
    """However sure the network is, and of whichever class: loss and gradient are finite."""
    target, weight = torch.from_numpy(label).long()[None], torch.full((1, 9, 9), 11.0)
    for predicted in range(3):
        logits = torch.zeros(1, 3, 9, 9)
        logits[:, predicted] = size
        logits.requires_grad_()
        losses = VarCELoss()(logits, target, weight)
        losses[0].backward()
        assert all(torch.isfinite(loss) for loss in losses) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize('shade', [0, 128, 255])
def test_normalising_one_colour(shade):
    colours = prepare_data.Reinhard_normalizer().fit(plain()[0])
    one_colour = colours.transform(np.full((8, 8, 3), shade, np.uint8))
    assert np.abs(one_colour.astype(int) - one_colour[0, 0]).max() == 0
    assert np.abs(rgb2lab(one_colour)[0, 0] - colours.mean).max() < 2            # the anchor's mean colour
    flat = prepare_data.Reinhard_normalizer().fit(np.full((8, 8, 3), shade, np.uint8))
    assert np.abs(flat.transform(plain()[0]).astype(int) - shade).max() <= 1     # an anchor of one colour


def test_normalising_a_grey_image():
    colours = prepare_data.Reinhard_normalizer().fit(plain()[0])
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, 2)
    lab = rgb2lab(colours.transform(grey))[64:192, 0]                        # far from black and white, which are clipped
    assert np.abs(lab[:, 1:] - colours.mean[1:]).max() < 2                   # a and b are constant but for rounding


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


# ---------------------------------------------------------------------------------------------------
# As programs
# ---------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def started(script, *words, **options):
    """A script as a process, which is killed at the end, with its loader processes."""
    def heed_interrupts():                     # a shell that starts the tests in the background makes them ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([sys.executable, str(ROOT / script), *words], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, preexec_fn=heed_interrupts, start_new_session=True,
                          **options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.01)


def one_line(process, *words):
    """The process ends with exit code 2 and, after any notes, one line on stderr. Returns all lines."""
    output, error = process.communicate(timeout=120)
    lines = [line for line in error.split('\n') if line and '\r' not in line]      # without progress bars
    told = [line for line in lines if not line.startswith('note: ')]
    assert process.returncode == 2 and len(told) == 1 and told[0] == lines[-1], (process.returncode, error)
    assert told[0].startswith('error: ') and 'Traceback' not in error and 'Warning' not in error, error
    for word in words:
        assert word in told[0], error
    return lines


PAIRS = ['--img-dir', 'raw/images', '--label-dir', 'raw/labels']


@pytest.mark.parametrize('script, words, first', [
    ('prepare_data.py', [*PREPARE, *PAIRS, '--data-dir', 'out'], 'error: '),
    ('test.py', [*TEST, *PAIRS, '--model-path', 'net.pth.tar'], 'note: net.pth.tar carries no mean_std'),
])
def test_programs_end_with_one_line(here, script, words, first):
    pair(here, label=plain(0, 64, 60)[1])
    with started(script, *words) as process:
        assert one_line(process, 'labels/x.png is 60 x 64 pixels')[0].startswith(first)


def test_program_train_whose_data_is_moved_away(data):
    """One loader process finds the files gone."""
    with started('train.py', *SMALL, '--data-dir', '.', '--save-dir', 'run', '--epochs', '100000', '--workers',
                 '1') as process:
        wait_for(data / 'run/checkpoints/checkpoint.pth.tar', process)
        os.rename(data / 'images', data / 'elsewhere')
        error = process.communicate(timeout=30)[1]
    assert process.returncode == 2 and 'Traceback' not in error, error[-2000:]
    told = [line for line in error.split('\n') if line.startswith('error: ')]
    assert len(told) == 1 and 'no such file: images/' in told[0], error[-2000:]
    assert error.rstrip().endswith(told[0].rstrip()), error[-2000:]


def many(folder, count, size=300):
    """Images and labels enough for a signal to arrive in the middle."""
    for part, content in zip(('images', 'labels'), plain(0, size, size)):
        put(folder / 'raw' / part / 'n0.png', content)
        for k in range(1, count):
            os.link(folder / 'raw' / part / 'n0.png', folder / 'raw' / part / f'n{k}.png')


def test_program_prepare_data_is_stopped(here):
    many(here, 300)
    with started('prepare_data.py', *PREPARE, *PAIRS, '--data-dir', 'out', '--patch-size', '100') as process:
        wait_for(here / '.out.preparing/new/images/train/n*.png', process)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and 'Traceback' not in error, error
    assert not (here / 'out').exists() and not (here / '.out.preparing').exists()


def test_program_test_is_stopped(here):
    many(here, 500, 100)
    with started('test.py', *TEST, *PAIRS, '--model-path', 'net.pth.tar', '--save-dir', 'out') as process:
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
    with started('test.py', *TEST, *PAIRS, '--model-path', 'net.pth.tar', '--data-dir', '.') as process:
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(60) == 0
    assert 'Traceback' not in error and 'Error' not in error and 'Exception' not in error, error


def test_program_whose_output_is_closed(here):
    """After `>&- 2>&-` Python has no sys.stdout and no sys.stderr."""
    pair(here)
    words = [sys.executable, ROOT / 'weight_map.py', '--label-dir', 'raw/labels', '--save-dir', 'out']
    assert subprocess.run(['sh', '-c', 'exec "$@" >&- 2>&-', 'sh', *words]).returncode == 0
    assert (here / 'out/x_weight.png').is_file()


def test_program_when_python_reads_names_as_ascii(here):
    """PYTHONUTF8=0 in the C locale: a name beyond ASCII is refused before anything is written."""
    with started('weight_map.py', '--label-dir', 'labels', '--save-dir', 'Färbung', encoding='ascii',
                 env={**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0'}) as process:
        one_line(process, 'the command line: the name', 'is not UTF-8; Python reads names as ascii: set PYTHONUTF8=1')
    assert not (here / 'Färbung').exists()


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


def test_nothing_is_fetched(data, monkeypatch):
    """Offline, or not: no script asks for another computer."""
    asked = []
    for owner, name in ((socket.socket, 'connect'), (socket.socket, 'connect_ex'), (socket, 'getaddrinfo'),
                        (socket, 'create_connection')):
        monkeypatch.setattr(owner, name, lambda *words, **more: asked.append(words) or 1 / 0)
    for script in ('prepare', 'train', 'test', 'weight_map'):
        RUN[script](data)
    assert asked == []
    with pytest.raises(ZeroDivisionError):
        urllib.request.urlopen('http://127.0.0.1:9')                         # it would have been seen
    assert asked


def test_too_little_memory():
    for error in (MemoryError(), torch.OutOfMemoryError('CUDA out of memory.\nTried'),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        line = line_of(error)
        assert line.startswith('error: not enough memory (') and '--batch-size' in line and '\n' not in line
    with pytest.raises(RuntimeError, match='another'):
        line_of(RuntimeError('another'))


@pytest.fixture
def full_disk(here):
    """A disk of 64 KiB."""
    (here / 'disk').mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(here / 'disk')]
    if not shutil.which('mount') or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('no small disk can be mounted here')
    yield here / 'disk'
    subprocess.run(['umount', '-l', str(here / 'disk')], check=True)


@pytest.mark.parametrize('script, flag', [('prepare', '--data-dir'), ('test', '--save-dir'),
                                          ('weight_map', '--save-dir')])
def test_a_full_disk(here, full_disk, script, flag):
    """What is written before the disk is full is whole."""
    many(here, 20, 100)
    refused(lambda: RUN[script](here, flag, 'disk/out'), 'no space left on the disk while writing')
    assert all(path.stat().st_size and Image.open(path).load() for path in full_disk.rglob('*.png'))
