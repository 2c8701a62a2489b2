"""Sliding window, test-time augmentation, post-processing, checkpoints, safe saving, exit codes."""
import contextlib
import hashlib
import pickle
import re
import signal
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy import ndimage
from skimage.morphology import disk
from torch import nn
from torch.nn import functional as F

import utils
from FullNet import create_model
from support import devices, files, script
from support.checkpoints import WeightAverage, load_checkpoint, load_weights, save_checkpoint
from support.devices import choose_device
from support.files import atomic_path, save_instances
from support.images import read_instance_label
from support.script import InputError
from utils import (dilate, orient, orient_back, post_process, predict_in_bands, predict_probabilities,
                   split_forward)

GOLDEN = Path(__file__).parent / 'golden'
RNG = np.random.default_rng(0)
MODEL = dict(name='FullNet', in_c=3, out_c=3, n_layers=4, growth_rate=4, drop_rate=0.1, compress_ratio=0.5,
             dilations=(1, 2), is_hybrid=True, layer_type='basic')


# ---------------------------------------------------------------------------------------------------
# Sliding window
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('i', range(8))
def test_sliding_window_is_the_golden_one(i, device='cpu'):
    golden = np.load(GOLDEN / 'split_forward.npz')
    weight, bias = (torch.from_numpy(golden[name]).to(device) for name in ('weight', 'bias'))

    def model(window):                       # sees the whole of its window
        return F.conv2d(window, weight, bias, padding=4) + window.mean((2, 3), keepdim=True) + window[:, :, :1, :1]

    size, overlap = golden[f'{i}/size_overlap'].tolist()
    image = torch.from_numpy(golden[f'{i}/input']).to(device)
    output = split_forward(model, image, size, overlap)
    assert torch.allclose(split_forward(model, image, size, overlap, n_windows=3), output, atol=1e-6)
    assert np.abs(output.cpu().numpy() - golden[f'{i}/output']).max() < 1e-5


@settings(max_examples=200)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.data())
def test_every_pixel_is_written_once_by_a_pointwise_model(height, width, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    image = torch.rand(1, 2, height, width) + 1
    assert torch.equal(split_forward(lambda x: x[:, :1] * 3, image, size, overlap, 1), image[:, :1] * 3)


def test_a_window_as_large_as_its_overlap_is_refused():
    with pytest.raises(ValueError, match='overlap is 64; expected at least 0 and less than the window size, 64'):
        split_forward(lambda x: x, torch.zeros(1, 3, 99, 99), 64, 64)


# ---------------------------------------------------------------------------------------------------
# Test-time augmentation
# ---------------------------------------------------------------------------------------------------

def test_the_eight_orientations_are_different_and_undone_exactly():
    image = RNG.integers(0, 256, (5, 7, 3))
    turned = [orient(image, *o) for o in utils.ORIENTATIONS['full']]
    assert len({t.tobytes() + bytes(t.shape) for t in turned}) == 8
    for array, orientation in zip(turned, utils.ORIENTATIONS['full']):
        assert (orient_back(array, *orientation) == image).all()
    flips = {orient(image, *o).tobytes() for o in utils.ORIENTATIONS['flips']}
    assert flips == {a.tobytes() for a in (image, image[::-1], image[:, ::-1], image[::-1, ::-1])}


@pytest.mark.parametrize('tta, calls', [('none', 1), ('flips', 4), ('full', 8)])
def test_augmentation_is_the_mean_of_all_orientations(tta, calls):
    seen = []

    def blur(image):                         # equivariant: a symmetric filter
        seen.append(image)
        return ndimage.uniform_filter(image.astype(np.float64), (3, 3, 0), mode='constant')

    image = RNG.integers(0, 256, (20, 33, 3)).astype(np.uint8)
    assert np.allclose(predict_probabilities(blur, image, tta), blur(image), rtol=1e-6)
    assert len(seen) == calls + 1
    corner = np.array([[1, 0], [0, 0]])[..., None]             # not equivariant: always at the top left
    assert np.allclose(predict_probabilities(lambda _: corner, image[:2, :2], tta), corner if calls == 1 else 0.25)


# ---------------------------------------------------------------------------------------------------
# Post-processing
# ---------------------------------------------------------------------------------------------------

def slow_post_process(inside, min_area, radius):
    """Component by component, pixel by pixel."""
    mask = inside.copy()
    components, n = ndimage.label(inside)
    for i in range(1, n + 1):
        if (components == i).sum() < min_area:
            mask[components == i] = False
    label, _ = ndimage.label(mask, np.ones((3, 3)))
    result = np.zeros_like(label)
    for y in range(label.shape[0]):
        for x in range(label.shape[1]):
            for v in range(label.shape[0]):
                for u in range(label.shape[1]):
                    if (y - v) ** 2 + (x - u) ** 2 <= radius ** 2:
                        result[y, x] = max(result[y, x], label[v, u])
    return result


@pytest.mark.parametrize('share, min_area, radius', [(0.35, 3, 2), (0.4, 5, 1), (0.3, 0, 3), (0.35, 4, 0), (0, 20, 2)])
def test_post_processing_equals_the_slow_version(share, min_area, radius):
    inside = np.random.default_rng(0).random((16, 18)) < share
    assert (post_process(inside, min_area, radius) == slow_post_process(inside, min_area, radius)).all()


def test_a_scaled_mask_is_resized_to_the_original_size():
    inside = np.zeros((20, 30), bool)
    inside[5:15, 10:20] = True
    label = post_process(inside, 10, 0, original_size=(40, 60))
    assert label.shape == (40, 60) and label.dtype == np.int32 and 390 <= (label == 1).sum() <= 400


# ---------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------

def test_saved_checkpoints_have_the_published_prefix_and_load_without_it(tmp_path):
    weights = create_model(**MODEL).state_dict()
    save_checkpoint(tmp_path / 'c.tar', {'epoch': 3, 'state_dict': weights, 'best_iou': 0.5})
    assert list(torch.load(tmp_path / 'c.tar', weights_only=True)['state_dict']) == [f'module.{key}' for key in weights]
    torch.save({'state_dict': weights}, tmp_path / 'without.tar')
    for name in ('c.tar', 'without.tar'):
        assert list(load_checkpoint(tmp_path / name)['state_dict']) == list(weights)


@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
def test_a_published_checkpoint_loads_with_its_numpy_scalar(tmp_path, module):
    assert load_checkpoint(GOLDEN / 'tiny_checkpoint.pth.tar')['best_iou'] == 0.5
    torch.save({'state_dict': {}, 'best_iou': np.float64(0.25)}, tmp_path / 'c')
    with zipfile.ZipFile(tmp_path / 'c') as old, zipfile.ZipFile(tmp_path / 'd', 'w') as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith('data.pkl'):
                content, count = re.subn(rb'numpy\._?core\.multiarray', module.encode(), content)
                assert count
            new.writestr(item.filename, content)
    assert load_checkpoint(tmp_path / 'd')['best_iou'] == 0.25


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, 'w')                        # creates a file, when unpickled


@pytest.mark.parametrize('protocol', ['zip', 'legacy', 'pickle'])
def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path, protocol):
    harmful = {'state_dict': {}, 'extra': Malicious(str(tmp_path / 'owned'))}
    path = tmp_path / 'bad.pth.tar'
    if protocol == 'pickle':
        path.write_bytes(pickle.dumps(harmful))
    else:
        torch.save(harmful, path, _use_new_zipfile_serialization=protocol == 'zip')
    with pytest.raises(InputError, match='bad.pth.tar'):
        load_checkpoint(path)
    assert not (tmp_path / 'owned').exists()
    if protocol != 'pickle':
        with pytest.raises(InputError, match='was not loaded: it could run code; get .* as weights only'):
            load_checkpoint(path)


TINY = (GOLDEN / 'tiny_checkpoint.pth.tar').read_bytes()


@pytest.mark.parametrize('content, message', [
    (None, 'no checkpoint at .*c; train first, or give --model-path'),
    *[(content, 'is not a checkpoint, or is damaged') for content in (b'', b'hello', TINY[:100_000])],
    *[(content, 'expected a dict with a state_dict of tensors') for content in (
        [1, 2], {'weight': torch.zeros(1)}, {'state_dict': {'a': 3}}, {'state_dict': {1: torch.zeros(1)}})],
], ids=['missing', 'empty', 'text', 'half', 'list', 'weights alone', 'of numbers', 'numbers as keys'])
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / 'c').write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / 'c')
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / 'c')


@pytest.mark.parametrize('change, message', [
    (dict(n_layers=6), 'n_layers is 6 in the file, 4 in the options'),
    (dict(growth_rate=5), 'growth_rate is 5 in the file, 4 in the options'),
    (dict(in_c=1, out_c=4), 'in_c is 1 in the file, 3 in the options, out_c is 4 in the file, 3 in the options'),
    (dict(layer_type='bottleneck'), 'layer_type is bottleneck in the file, basic in the options'),
    (dict(dilations=(1, 2, 4)), '3 dense blocks in the file, dilations has 2'),
    (dict(compress_ratio=0.4), 'compress_ratio or another option differs'),
])
def test_a_mismatch_names_the_differing_option(change, message):
    other, model = create_model(**{**MODEL, **change}), create_model(**MODEL)
    with pytest.raises(InputError, match=message):
        load_weights(model, other.state_dict(), MODEL, 'file')


def test_missing_extra_and_broken_weights_are_named():
    model = create_model(**MODEL)
    weights = dict(model.state_dict())
    with pytest.raises(InputError, match='1 extra: more'):
        load_weights(model, {**weights, 'more': torch.zeros(1)}, MODEL, 'file')
    with pytest.raises(InputError, match='not those of a FullNet.*fc.weight'):
        load_weights(model, {'fc.weight': torch.zeros(3)}, MODEL, 'file')
    with pytest.raises(InputError, match='1 missing: conv2.weight'):
        load_weights(model, {k: v for k, v in weights.items() if k != 'conv2.weight'}, MODEL, 'file')
    for value in (np.nan, np.inf, 1e300):                                                # which is infinite in float32
        broken = torch.full_like(weights['conv2.weight'], value, dtype=torch.float64)
        with pytest.raises(InputError, match='conv2.weight holds NaN or infinite weights'):
            load_weights(model, {**weights, 'conv2.weight': broken}, MODEL, 'file')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_weights_are_converted_with_a_warning(dtype):
    model = create_model(**MODEL)
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match=f'{str(dtype)[6:]} weights, converted to float32'):
        load_weights(model, weights, MODEL, 'file')
    assert model.conv2.weight.dtype == torch.float32
    assert torch.equal(model.conv2.weight.to(dtype), weights['conv2.weight'])


def test_weight_average_follows_the_weights():
    model = create_model(**MODEL)
    average = WeightAverage(model, 0.9)
    start = model.conv2.weight.clone()
    model.train()(torch.randn(1, 3, 8, 8))                     # one batch seen: decay min(0.9, 2 / 11)
    with torch.no_grad():
        model.conv2.weight += 1
    average.update()
    torch.testing.assert_close(average.model.conv2.weight, start + 9 / 11)
    assert average.model.conv1.bn.num_batches_tracked == 1
    expected = {key: value.clone() for key, value in average.model.state_dict().items()}
    for step in range(2, 100):                                 # the loop over all values, as a check
        model(torch.randn(1, 3, 8, 8))
        average.update()
        for key, value in model.state_dict().items():
            decay = min(0.9, (1 + step) / (10 + step))
            expected[key] = expected[key] * decay + value * (1 - decay) if value.is_floating_point() else value
    for key, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[key])


# ---------------------------------------------------------------------------------------------------
# Saving and scripts
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_while_saving_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, error):
    path = tmp_path / 'file.txt'
    files.write_text(path, 'old')
    with pytest.raises(error), atomic_path(path) as temporary:
        Path(temporary).write_text('half')
        raise error
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_the_hash_of_a_file_is_of_all_of_it(tmp_path):
    content = bytes(range(256)) * 5000                                   # more than a piece of 1 MiB
    (tmp_path / 'a').write_bytes(content)
    assert files.sha256_of(tmp_path / 'a') == hashlib.sha256(content).hexdigest()


def test_instances_are_saved_with_the_depth_they_need(tmp_path):
    for top, dtype in ((65_535, np.uint16), (65_536, np.uint32)):
        label = np.array([[0, 1], [2, top]])
        save_instances(tmp_path / 'a.tiff', label)
        saved = tifffile.imread(tmp_path / 'a.tiff')
        assert saved.dtype == dtype and (saved == label).all()
    save_instances(tmp_path / 'a.png', np.array([[0, 300]]))
    assert np.asarray(Image.open(tmp_path / 'a.png')).tolist() == [[0, 300]]
    with pytest.raises(ValueError, match='a PNG holds no ids above 65,535'):
        save_instances(tmp_path / 'b.png', label)


def test_instances_above_4_gb_are_a_bigtiff(tmp_path, monkeypatch):
    label = np.arange(300 * 300).reshape(300, 300) % 500
    for limit, version in ((files.BIG, 42), (100_000, 43)):
        monkeypatch.setattr(files, 'BIG', limit)
        save_instances(tmp_path / 'a.tiff', label)
        assert (tmp_path / 'a.tiff').read_bytes()[:4] == b'II' + bytes([version, 0])
        assert np.array_equal(read_instance_label(tmp_path / 'a.tiff'), label)


def test_gpu_option_chooses_the_device():
    assert choose_device([]).type == 'cpu'
    assert choose_device('auto').type in ('cpu', 'cuda', 'mps')
    with pytest.raises(InputError, match=r'--gpu asks for GPU 99, but \d+ CUDA GPUs were found'):
        choose_device([99])


def test_a_gpu_that_cannot_be_used_is_a_note_where_another_device_will_do(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError('CUDA error: no kernel image is available for execution on the device\nmore')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch, 'zeros', fail)
    reason = r'cannot be used \(CUDA error: no kernel image is available for execution on the device\)'
    with pytest.warns(UserWarning, match=f'^GPU 0 {reason}; the CPU is used instead$'):
        assert choose_device('auto').type == 'cpu'
    for words in (([0],), ([0], 0, 2), ('auto', 0, 2)):
        with pytest.raises(InputError, match=f'^GPU 0 {reason}; use --gpu cpu, or a PyTorch that fits'):
            choose_device(*words)
    assert choose_device([]).type == 'cpu'


WHOLE = {'RANK': '1', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29500'}


def set_variables(monkeypatch, values):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize('values, place', [
    ({'MASTER_ADDR': '', 'MASTER_PORT': 'x'}, (0, 0, 1)), ({'WORLD_SIZE': '1'}, (0, 0, 1)), (WHOLE, (1, 0, 2)),
])
def test_the_place_among_the_processes_of_torchrun(monkeypatch, values, place):
    set_variables(monkeypatch, values)
    assert script.place_among_processes() == place


@pytest.mark.parametrize('values, message', [
    *(({key: value for key, value in WHOLE.items() if key != name}, f'{name} is missing') for name in WHOLE),
    ({'RANK': '0'}, 'WORLD_SIZE is missing'), ({'WORLD_SIZE': '1', 'RANK': ''}, 'RANK is empty'),
    (WHOLE | {'MASTER_PORT': 'x'}, "MASTER_PORT is 'x', expected a number"),
    (WHOLE | {'LOCAL_RANK': '2'}, 'LOCAL_RANK is 2, expected less than 2'),
    (WHOLE | {'MASTER_PORT': '65536'}, 'MASTER_PORT is 65536, expected less than 65536'),
])
def test_variables_of_torchrun_that_are_half_there_are_refused(monkeypatch, values, message):
    set_variables(monkeypatch, values)
    with pytest.raises(InputError, match=f'^the environment variable {message}; torchrun sets WORLD_SIZE, RANK'):
        script.place_among_processes()


@pytest.mark.parametrize('error, code, words', [
    (None, None, ''),
    (InputError('found a, expected b'), 2, 'error: found a, expected b\n'),
    (FileNotFoundError(2, 'No such file or directory', 'x'), 2, 'error: No such file or directory: x\n'),
    (OSError(28, 'No space left on device', 'x.png'), 2, 'no space left on the disk while writing x.png'),
    (KeyboardInterrupt(), 130, 'interrupted'),
    (ZeroDivisionError(), None, ''),                                     # a mistake of ours shows its traceback
])
def test_exit_codes(monkeypatch, capsys, error, code, words):
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)

    def main():
        if error:
            raise error
    with pytest.raises(SystemExit if code else type(error)) if error else contextlib.nullcontext() as ended:
        script.run_script(main)
    assert not code or ended.value.code == code
    said = capsys.readouterr().err
    assert words in said and said.count('\n') <= 1


def test_a_signal_stops_at_the_next_check_after_saving():
    saved, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, script.StopRequest(devices.Processes([])) as stop:
        stop.check(lambda: saved.append('too early'))
        signal.raise_signal(signal.SIGTERM)
        stop.check(lambda: saved.append('saved'))
    assert stopped.value.code == 143 and saved == ['saved'] and signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_stops_at_once():
    with pytest.raises(SystemExit) as stopped, script.StopRequest(devices.Processes([])):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 143
    with pytest.raises(KeyboardInterrupt), script.StopRequest(devices.Processes([])):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


# ---------------------------------------------------------------------------------------------------
# Large images in bands
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('tta', ['none', 'flips', 'full'])
@pytest.mark.parametrize('height, width, size, overlap', [(50, 37, 16, 6), (41, 60, 16, 5), (10, 70, 16, 8),
                                                          (33, 33, 64, 10), (47, 23, 20, 0)])
def test_bands_are_the_sliding_window_of_the_whole_image(tta, height, width, size, overlap):
    """Against split_forward of whole turned images, with a model whose output depends on the place in the window."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 5, padding=2)
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)

    def model(x):
        return conv(x) + torch.linspace(0, 1, x.shape[2])[:, None] + torch.linspace(0, 2, x.shape[3])

    def to_tensor(array):
        return torch.from_numpy(array.copy()).permute(2, 0, 1).float()[None] / 255 - 0.5

    @torch.no_grad()
    def whole(oriented):
        return split_forward(model, to_tensor(oriented), size, overlap).softmax(1)[0].permute(1, 2, 0).numpy()
    expected = predict_probabilities(whole, image, tta)

    @torch.no_grad()
    def windows(crops, shape):
        assert 1 <= len(crops) <= batch_size
        jobs[-1] += len(crops)
        x = torch.cat([F.pad(to_tensor(crop), (0, shape[1] - crop.shape[1], 0, shape[0] - crop.shape[0]))
                       for crop in crops])
        return model(x).softmax(1).permute(0, 2, 3, 1).numpy()
    jobs = []
    for batch_size, band_pixels in ((1, 2 ** 22), (3, 700), (2, 1)):
        jobs.append(0)
        bands = list(predict_in_bands(windows, image, size, overlap, tta, 3, batch_size, band_pixels))
        assert band_pixels > 700 or len(bands) > 1 or height <= size
        assert np.allclose(np.concatenate(bands), expected, atol=1e-6)
    assert jobs[0] == jobs[1] == jobs[2] or tta != 'none'              # no window is computed twice


@pytest.mark.parametrize('rows', [1, 5, 2048])
@pytest.mark.parametrize('highest', [8, 65_535, 65_536])
def test_dilation_in_pieces_is_that_of_the_whole(rows, highest):
    label = np.random.default_rng(0).integers(-30, 9, (40, 31)).clip(0)
    label[label == 8] = highest
    for radius in (0, 1, 3):
        expected = ndimage.grey_dilation(label, footprint=disk(radius))
        assert np.array_equal(dilate(label.copy(), radius, rows), expected)
