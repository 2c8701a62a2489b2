"""Training through its command line: what is written, what every option changes, exact resume, what is refused."""
import argparse
import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

import test
import train
from FullNet import create_model
from loss import VarCELoss
from miniature import SMALL, calls_of, make_glas, make_multi_organ
from options import TRAIN, Options
from support import checkpoints, devices, files, run_folder
from support.checkpoints import load_checkpoint, save_checkpoint
from support.devices import MixedPrecision
from support.pictures import class_colours
from support.script import InputError
from utils import accuracy_pixel_level, split_forward

ROOT = Path(__file__).parents[1]
EARLIER = ROOT / 'tests/checkpoint_b1a071d.pth.tar'      # of an earlier version: 3 steps of FOUR_EPOCHS, with affine
FOUR_EPOCHS = ['--epochs', '4', '--ema-decay', '0.9', '--lr-schedule', 'cosine', '--drop-rate', '0.3',
               '--transform.train.random_affine', 'none']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_multi_organ(tmp_path_factory.mktemp('data'))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(data, save_dir, *words):
    """Train; returns the latest checkpoint and the rows of epoch_results.txt."""
    train.main([*SMALL, '--data-dir', str(data), '--save-dir', str(save_dir), *words])
    return load_checkpoint(latest(save_dir)), results(save_dir)


def resume(save_dir, *words):
    """Go on with the run in a folder; returns what `run` does."""
    train.main(['--checkpoint-path', str(latest(save_dir)), *words])
    return load_checkpoint(latest(save_dir)), results(save_dir)


def latest(save_dir):
    return Path(save_dir) / 'checkpoints/checkpoint.pth.tar'


def results(save_dir):
    lines = (Path(save_dir) / 'epoch_results.txt').read_text().splitlines()
    return [dict(zip(lines[0].split('\t'), map(float, line.split('\t')))) for line in lines[1:]]


def same_weights(a, b):
    return a['state_dict'].keys() == b['state_dict'].keys() and \
        all(torch.equal(a['state_dict'][key], b['state_dict'][key]) for key in a['state_dict'])


@pytest.fixture(scope='module')
def base(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('base') / 'run'
    return (*run(data, folder), folder)


# ---------------------------------------------------------------------------------------------------
# What a run writes
# ---------------------------------------------------------------------------------------------------

def test_a_run_writes_what_the_paper_s_code_writes_and_more(base, data):
    checkpoint, rows, folder = base
    header = (folder / 'epoch_results.txt').read_text().splitlines()[0]
    assert header.split('\t') == ['epoch', 'train_loss', 'train_loss_CE', 'train_loss_var', 'train_acc', 'train_iou',
                                  'val_loss', 'val_acc', 'val_iou']
    assert sorted(p.name for p in folder.iterdir()) == sorted(set(run_folder.RUN_FILES) - {'val_grid.png'})
    assert sorted(p.name for p in (folder / 'checkpoints').iterdir()) == ['checkpoint.pth.tar',
                                                                         'checkpoint_best.pth.tar']
    assert list((folder / 'tb_logs').iterdir()) and Image.open(folder / 'learning_curve.png').width > 500
    assert (checkpoint['epoch'], checkpoint['best_iou']) == (1, pytest.approx(rows[0]['val_iou'], abs=1e-4))
    assert rows[0]['train_loss'] == pytest.approx(rows[0]['train_loss_CE'] + rows[0]['train_loss_var'], abs=2e-4)
    assert checkpoint['mean_std'] == np.load(data / 'mean_std.npy').tolist()
    log = (folder / 'train.log').read_text()
    assert 'FullNet with' in log and 'epoch 1  train: loss' in log and 'done: 1 epochs' in log


def test_run_info_records_versions_seed_and_files(base, data):
    info = json.loads((base[2] / 'run_info.json').read_text())
    assert info['packages']['torch'].split('+')[0] == torch.__version__.split('+')[0]
    assert info['packages']['scikit-image'] == skimage.__version__ and len(info['packages']) == 6
    assert info['seed'] == TRAIN['seed'].default
    names = {Path(name).name for name in info['files']}
    assert {'train_0.png', 'train_0_label.png', 'val_0_weight.png'} <= names and len(names) == 15


def test_checkpoint_optimizer_and_weights_of_the_loss_are_the_published_ones(base):
    stored = torch.load(base[2] / 'checkpoints/checkpoint_best.pth.tar', weights_only=True)
    assert {'epoch', 'state_dict', 'best_iou', 'optimizer'} <= set(stored)
    assert all(key.startswith('module.') for key in stored['state_dict'])
    settings = base[0]['optimizer']['param_groups'][0]
    assert settings['betas'] == (0.9, 0.99) and settings['weight_decay'] == 1e-4
    assert not settings['amsgrad'] and not settings.get('decoupled_weight_decay')                     # not AdamW
    stored = torch.tensor([[[20, 220]]], dtype=torch.uint8)
    for use, expected in ((True, [[[1, 11]]]), (False, [[[1, 1]]])):
        batch = torch.zeros(1, 3, 1, 2), stored, stored, stored
        assert train.to_device(batch, 'cpu', use)[1].tolist() == expected


def test_training_is_repeated_exactly_whatever_the_number_of_workers(base, data, tmp_path, monkeypatch):
    asked = []
    loader = train.DataLoader
    monkeypatch.setattr(train, 'DataLoader', lambda *a, **k: (asked.append(k['num_workers']), loader(*a, **k))[1])
    again, rows = run(data, tmp_path / 'run', '--workers', '2')
    assert asked == [2, 1] and same_weights(again, base[0]) and rows == base[1]


def test_training_learns(data, tmp_path):
    _, rows = run(data, tmp_path / 'a', '--epochs', '8', '--lr', '0.01', '--transform.train.random_elastic', 'none',
                  '--transform.train.random_affine', 'none')
    assert rows[-1]['train_loss_CE'] < 0.6 * rows[0]['train_loss_CE'] and rows[-1]['train_iou'] > 0.3


# ---------------------------------------------------------------------------------------------------
# Every option changes what runs
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words', [
    '--growth-rate 3', '--drop-rate 0.4', '--compress-ratio 0.4', '--out-c 4', '--input-size 32', '--batch-size 3',
    '--lr 0.01', '--weight-decay 0.5', '--alpha 3', '--seed 3', '--use-weight-map False', '--lr-schedule cosine',
    '--warmup-epochs 1', '--clip-grad 0.01', '--ema-decay 0.9', '--transform.train.random_affine none',
    '--transform.train.random_elastic 6 3', '--transform.train.vertical_flip True',
    '--transform.train.normalize False', '--transform.train.random_crop 32',
])
def test_options_that_change_the_weights(base, data, tmp_path, words):
    assert not same_weights(run(data, tmp_path / 'run', *words.split())[0], base[0])


def test_gradients_are_clipped_to_the_norm_that_is_given(data, tmp_path, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def recorded(optimizer, *rest):
        gradients = [p.grad.flatten() for p in optimizer.param_groups[0]['params']]
        norms.append(torch.cat(gradients).norm().item())
        return step(optimizer, *rest)
    monkeypatch.setattr(torch.optim.Adam, 'step', recorded)
    run(data, tmp_path / 'run', '--clip-grad', '0.01')
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_amp_computes_in_bfloat16_and_resumes_exactly(data, tmp_path, monkeypatch):
    monkeypatch.setattr('support.cpu_stage.MIN_PIXELS', 0)
    words = ['--amp', 'True', '--epochs', '2']
    whole = run(data, tmp_path / 'whole', *words)[0]
    assert not same_weights(whole, run(data, tmp_path / 'float32', '--epochs', '2')[0])
    run(data, tmp_path / 'half', *words[:2])
    assert same_weights(resume(tmp_path / 'half', '--epochs', '2')[0], whole)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: True)                   # autocast is for testing
    assert [MixedPrecision(torch.device('cpu'), True, testing).enabled for testing in (False, True)] == [False, True]


def test_amp_is_refused_on_mps():
    with pytest.raises(InputError, match='--amp True works on CUDA GPUs and on the CPU, not on Apple MPS; leave it'):
        MixedPrecision(torch.device('mps'), True)


@pytest.mark.parametrize('words', ['--val-overlap 20', '--transform.val.label_encoding 2'])
def test_options_that_change_the_validation_only(base, data, tmp_path, words):
    checkpoint, rows = run(data, tmp_path / 'run', *words.split())
    assert same_weights(checkpoint, base[0]) and rows[0]['val_loss'] != base[1][0]['val_loss']


@pytest.mark.parametrize('words', ['--alpha 1', '--alpha 3 --ema-decay 0.9'])
def test_validation_is_the_sliding_window_and_the_loss_of_training(data, tmp_path, words):
    checkpoint, rows = run(data, tmp_path / 'run', *words.split())
    opt = Options(True).parse([*SMALL, '--data-dir', str(data)])
    model = create_model(**opt.model).eval()
    model.load_state_dict(checkpoint['state_dict'])
    image, weight, target = train.load_data(opt, 'val', np.load(data / 'mean_std.npy'))[0]
    with torch.no_grad():
        logits = split_forward(model, image[None], size=40, overlap=8)
    loss, _, _ = VarCELoss(int(words[8]))(logits, target, weight / 20)
    accuracy, iou, *_ = accuracy_pixel_level(logits.argmax(1).numpy(), target.numpy())
    assert [rows[0][f'val_{name}'] for name in ('loss', 'acc', 'iou')] == pytest.approx([loss.item(), accuracy, iou],
                                                                                       abs=1e-4)


def test_validation_grid(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, 'GRID_EPOCHS', 2)
    _, rows = run(data, tmp_path / 'run', '--epochs', '3', '--val-every', '1')
    grid = np.asarray(Image.open(tmp_path / 'run/val_grid.png'))
    assert grid.shape == (64, 4 * 64 + 3 * 4, 3)                     # one validation image of 64 x 64
    image, target, probabilities, prediction = (grid[:, k * 68:k * 68 + 64].astype(int) for k in range(4))
    assert np.abs(image - np.asarray(Image.open(data / 'images/val/val_0.png'))).max() <= 1
    assert set(map(tuple, target.reshape(-1, 3))) == {(0, 0, 255), (255, 0, 0), (0, 255, 0)}
    assert np.abs(probabilities.sum(axis=2) - 255).max() <= 2
    best = probabilities == probabilities.max(axis=2, keepdims=True)
    assert (best[prediction == 255]).mean() > 0.99
    log = event_accumulator.EventAccumulator(str(tmp_path / 'run/tb_logs'))
    log.Reload()
    assert [event.step for event in log.Images('validation')] == [2]
    for name in ('train_loss', 'val_iou'):
        drawn = [(event.step, event.value) for event in log.Scalars(name.replace('_', '/'))]
        assert np.allclose(drawn, [(row['epoch'], row[name]) for row in rows], atol=1e-4)


def test_preview_shows_what_the_first_epoch_sees_and_stops(data, tmp_path, capsys, monkeypatch):
    train.main([*SMALL, '--data-dir', str(data), '--save-dir', str(tmp_path / 'run'), '--preview'])
    assert not (tmp_path / 'run').exists() and 'run_preview.png: image, label' in capsys.readouterr().out
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    train.main([*SMALL, '--data-dir', str(data), '--save-dir', '.', '--preview'])
    assert (tmp_path / 'here_preview.png').read_bytes() == (tmp_path / 'run_preview.png').read_bytes()
    sheet = np.asarray(Image.open(tmp_path / 'run_preview.png'))
    assert sheet.shape == (4 * 40 + 3 * 4, 3 * 40 + 2 * 4, 3)
    opt = Options(True).parse([*SMALL, '--data-dir', str(data)])
    dataset = train.load_data(opt, 'train', np.load(data / 'mean_std.npy'))
    samples = [dataset[i, opt.train['seed'], 0] for i in range(4)]
    labels = [class_colours(label[0]) for _, _, label in samples]
    weights = [weight[0, ..., None].expand(-1, -1, 3).numpy() for _, weight, _ in samples]
    for x, column in ((44, labels), (88, weights)):
        shown = [sheet[y:y + 40, x:x + 40] for y in range(0, 176, 44)]
        assert all(any(np.array_equal(a, b) for b in column) for a in shown)
    train.main([*SMALL, '--data-dir', str(data), '--save-dir', str(tmp_path / 'colours'), '--preview',
                '--transform.train.normalize', 'none'])                                # shown in the same colours
    assert np.abs(sheet.astype(int) - np.asarray(Image.open(tmp_path / 'colours_preview.png'))).max() <= 1


def test_pooling_network(data, tmp_path):
    dilations = ['--dilations', '1', '1', '1', '1', '1', '1', '1', '--growth-rate', '1']
    pooled, full = (run(data, tmp_path / name, *dilations, '--name', name)[0] for name in ('FCN_pooling', 'FullNet'))
    assert pooled['state_dict'].keys() == full['state_dict'].keys() and not same_weights(pooled, full)


def test_start_epoch_epochs_checkpoint_freq_val_every_log_interval_and_alpha_0(data, tmp_path):
    checkpoint, rows = run(data, tmp_path / 'run', '--epochs', '5', '--start-epoch', '1', '--checkpoint-freq', '2',
                           '--val-every', '2', '--log-interval', '1', '--alpha', '0')
    assert [row['epoch'] for row in rows] == [2, 3, 4, 5] and checkpoint['epoch'] == 5
    assert [math.isnan(row['val_iou']) for row in rows] == [False, True, False, False]
    names = {p.name for p in (tmp_path / 'run/checkpoints').iterdir()}
    assert names == {'checkpoint.pth.tar', 'checkpoint_best.pth.tar', 'checkpoint_2.pth.tar', 'checkpoint_4.pth.tar'}
    assert (tmp_path / 'run/train.log').read_text().count('  step 1/2') == 4
    assert all(row['train_loss_var'] == -1 and row['train_loss'] == row['train_loss_CE'] for row in rows)


def test_checkpoint_minutes(data, tmp_path, monkeypatch):
    saved = []
    save = run_folder.save_checkpoint

    def count(path, checkpoint):
        save(path, checkpoint)
        if path.name == 'checkpoint.pth.tar':
            saved.append((checkpoint['batch'], checkpoint['meter'][1][0]))
    monkeypatch.setattr(run_folder, 'save_checkpoint', count)
    run(data, tmp_path / 'a')
    assert saved == [(0, 0)]
    run(data, tmp_path / 'b', '--checkpoint-minutes', '0', '--batch-size', '3')
    # after both steps, of 3 images and of 1, in the validation, after the epoch
    assert saved[1:] == [(1, 3), (2, 4), (2, 4), (0, 0)]


def test_auto_takes_as_many_loader_processes_as_the_machine_has_cpus_for(monkeypatch):
    gpu, cpu = (argparse.Namespace(device=torch.device(name)) for name in ('cuda', 'cpu'))
    assert [devices.loader_processes('auto', cpu), devices.loader_processes(3, gpu)] == [1, 3]
    for cpus, processes, expected in ((16, '', 15), (64, '1', 16), (64, '8', 2), (1, '', 1), (4, '8', 1)):
        monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(cpus), raising=False)
        monkeypatch.setenv('LOCAL_WORLD_SIZE', processes)
        assert devices.loader_processes('auto', gpu) == expected


def test_results_of_an_epoch_are_means_over_its_images_and_the_best_iou_stays():
    options = dict(ema_decay=0, start_epoch=0, num_epochs=3)
    state = run_folder.TrainingState(torch.nn.Linear(1, 1), None, options, steps_per_epoch=2, scaler=None)
    assert state.best_iou < 0                                        # so the first validation is the best, even if 0
    for k, (iou, best) in enumerate(((0.5, 0.5), (0.7, 0.7), (0.6, 0.7))):
        state.finish_step([k, 1, 2, 3, 4], n_images=3)
        state.finish_step([k + 4, 5, 6, 7, 8], n_images=1)
        assert state.finish_epoch([9, 8, iou]) == [k + 1, k + 1, 2, 3, 4, 5, 9, 8, iou] and state.best_iou == best


def test_pixel_results_are_those_of_the_arrays():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(5, 3, 9, 7, generator=generator), torch.randint(3, (5, 9, 7), generator=generator)
    target[0], logits[0, 1] = 0, -9                                    # neither found nor wanted
    expected = accuracy_pixel_level(logits.argmax(1).numpy(), target.numpy())[:2]
    assert [value.item() for value in train.pixel_results(logits, target)] == pytest.approx(expected, abs=1e-6)


def test_init_from_starts_from_other_weights(base, data, tmp_path):
    tuned, _ = run(data, tmp_path / 'run', '--init-from', str(latest(base[2])), '--lr', '0', '--weight-decay', '0')
    weight = 'conv2.weight'
    assert torch.equal(tuned['state_dict'][weight], base[0]['state_dict'][weight]) and tuned['epoch'] == 1
    begun, _ = run(data, tmp_path / 'begun', '--seed', '3', '--lr', '0', '--weight-decay', '0')
    torch.manual_seed(3)                                                         # without it the seed draws them
    assert torch.equal(begun['state_dict'][weight], create_model(**begun['options']['model']).conv2.weight)


def test_a_run_is_not_resumed_with_other_images(base, data, tmp_path):
    other = make_multi_organ(tmp_path / 'other', n_train=3)
    with pytest.raises(InputError, match='other/mean_std.npy is not that of .*checkpoint.pth.tar, which was'):
        resume(base[2], '--epochs', '2', '--data-dir', str(other))
    again = tmp_path / 'again'                                            # another split of the images
    shutil.copytree(data, again)
    for part in again.rglob('train_0*'):
        part.rename(str(part).replace('train', 'val'))
    with pytest.raises(InputError, match='checkpoint.pth.tar had other training or validation images; prepare them as'):
        resume(base[2], '--epochs', '2', '--data-dir', str(again))


def test_more_epochs_are_those_of_a_longer_run_and_not_overwritten_unless_asked(base, data, tmp_path):
    whole, rows = run(data, tmp_path / 'whole', '--epochs', '2')
    shutil.copytree(base[2], tmp_path / 'run')
    first = shutil.copy(latest(tmp_path / 'run'), tmp_path / 'run/checkpoints/first.pth.tar')
    two, two_rows = resume(tmp_path / 'run', '--epochs', '2')
    assert same_weights(two, whole) and two_rows == rows
    told = (tmp_path / 'run/train.log').read_text()
    assert [told.count(f'\nepoch {k}  train: loss') for k in (1, 2)] == [1, 1]
    words = ['--checkpoint-path', str(first), '--epochs', '2']
    with pytest.raises(InputError, match='first.pth.tar has 1 epochs, and the run in .*run went on to 2, which would'):
        train.main(words)
    assert results(tmp_path / 'run') == rows
    for name in ('2', 'best'):
        save_checkpoint(tmp_path / f'run/checkpoints/checkpoint_{name}.pth.tar', two)
    train.main([*words, '--save-dir', str(tmp_path / 'other')])
    train.main([*words, '--overwrite', 'True'])
    for name in ('other', 'run'):
        assert same_weights(load_checkpoint(latest(tmp_path / name)), whole)
        best = load_checkpoint(tmp_path / name / 'checkpoints/checkpoint_best.pth.tar')      # of the epochs of this run
        assert best['best_iou'] == pytest.approx(rows[1]['val_iou'], abs=1e-4) and best['epoch'] == 2
    assert not (tmp_path / 'run/checkpoints/checkpoint_2.pth.tar').exists()


def test_a_run_that_goes_on_elsewhere_takes_its_best_checkpoint_along(base, tmp_path):
    shutil.copytree(base[2], tmp_path / 'run')
    for ending in ('', '_best'):
        save_checkpoint(tmp_path / f'run/checkpoints/checkpoint{ending}.pth.tar', base[0] | {'best_iou': 0.99})
    words = ['--checkpoint-path', str(latest(tmp_path / 'run')), '--epochs', '2']
    train.main([*words, '--save-dir', str(tmp_path / 'on')])
    best = load_checkpoint(tmp_path / 'on/checkpoints/checkpoint_best.pth.tar')
    assert best['epoch'] == 1 and best['best_iou'] == load_checkpoint(latest(tmp_path / 'on'))['best_iou'] == 0.99
    (tmp_path / 'run/checkpoints/checkpoint_best.pth.tar').write_bytes(b'damaged')
    train.main([*words, '--save-dir', str(tmp_path / 'on2')])
    assert load_checkpoint(tmp_path / 'on2/checkpoints/checkpoint_best.pth.tar')['epoch'] == 2


def test_later_checkpoints_stay_where_the_latest_is_damaged(base, tmp_path):
    shutil.copytree(base[2], tmp_path / 'run')
    folder = tmp_path / 'run/checkpoints'
    for ending, epoch in (('_1', 1), ('_7', 7), ('_best', 7)):
        save_checkpoint(folder / f'checkpoint{ending}.pth.tar', base[0] | {'epoch': epoch, 'best_iou': 0.99})
    (folder / 'checkpoint.pth.tar').write_bytes(b'damaged')
    train.main(['--checkpoint-path', str(folder / 'checkpoint_1.pth.tar'), '--epochs', '2'])
    kept = {path.name: load_checkpoint(path)['epoch'] for path in folder.iterdir()}
    assert kept == {'checkpoint.pth.tar': 2, 'checkpoint_1.pth.tar': 1, 'checkpoint_7.pth.tar': 7,
                    'checkpoint_best.pth.tar': 7}


def test_a_full_disk_at_the_end_of_an_epoch_loses_nothing(data, tmp_path, monkeypatch):
    """Whatever is written then: the resumed run has the files of the undisturbed one."""
    words = ['--epochs', '2', '--checkpoint-freq', '1']
    whole, rows = run(data, tmp_path / 'whole', *words)
    names = sorted(path.name for path in (tmp_path / 'whole/checkpoints').iterdir())
    not_saved = ('cannot save .*checkpoint.pth.tar: No space left on device; the last good checkpoint is .*; make '
                 'room, then resume with: python train.py --checkpoint-path')
    other = 'make room.* resume with: .*--checkpoint'
    for name, message in (('checkpoint_2.pth.tar', not_saved), ('checkpoint.pth.tar', not_saved),
                          ('epoch_results.txt', other), ('learning_curve.png', other)):
        folder, atomic_path = tmp_path / name, files.atomic_path

        def full(path):
            if Path(path).name == name and latest(folder).is_file():                  # from the second epoch on
                raise OSError(errno.ENOSPC, 'No space left on device', str(path))
            return atomic_path(path)
        with monkeypatch.context() as patch, pytest.raises(InputError, match=message):
            patch.setattr(files, 'atomic_path', full)
            patch.setattr(checkpoints, 'atomic_path', full)
            patch.setattr(run_folder, 'atomic_path', full)
            run(data, folder, *words)
        resumed, again = resume(folder)
        assert same_weights(resumed, whole) and again == rows
        assert sorted(path.name for path in (folder / 'checkpoints').iterdir()) == names


def test_weights_that_are_not_finite_replace_no_checkpoint(data, tmp_path, monkeypatch):
    finish_epoch = run_folder.TrainingState.finish_epoch

    def spoil(state, val):
        if state.epoch == 1:
            state.model.conv2.weight.data[0, 0] = math.nan
        return finish_epoch(state, val)
    monkeypatch.setattr(run_folder.TrainingState, 'finish_epoch', spoil)
    with pytest.raises(InputError, match='weights are no longer finite after 2 epochs and 0 steps; the last good'):
        run(data, tmp_path / 'run', '--epochs', '2')
    assert load_checkpoint(latest(tmp_path / 'run'))['epoch'] == 1


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    assert run_folder.git_commit(tmp_path) is None and run_folder.git_commit(ROOT / 'tests') is None
    monkeypatch.setenv('PATH', str(tmp_path))
    assert run_folder.git_commit(ROOT) is None


def test_max_minutes_fixes_the_number_of_steps_and_keeps_it(data, tmp_path):
    first, _ = run(data, tmp_path / 'run', '--max-minutes', '0.03', '--epochs', '1000')
    assert 1 <= first['step'] == first['total_steps'] == first['steps_planned'] < 2000
    assert resume(tmp_path / 'run')[0]['step'] == first['step']
    with pytest.raises(InputError, match='ends after .* steps, which its --max-minutes gave: --epochs may be at most'):
        resume(tmp_path / 'run', '--epochs', '2000')
    save_checkpoint(latest(tmp_path / 'run'), first | {'steps_planned': True})            # as earlier versions wrote it
    assert resume(tmp_path / 'run')[0]['step'] == first['step']


def test_max_minutes_is_a_cap_beside_the_epochs(data, tmp_path):
    first, _ = run(data, tmp_path / 'run', '--max-minutes', '1000', '--epochs', '16')         # 2 steps an epoch
    assert first['step'] == 32 < first['steps_planned']
    save_checkpoint(latest(tmp_path / 'run'), first | {'minutes': 900.0})
    again, _ = resume(tmp_path / 'run', '--epochs', '17')                    # the plan leaves room for more
    assert again['step'] == 34 and again['steps_planned'] == first['steps_planned'] and again['minutes'] > 900


@pytest.mark.parametrize('seconds, minutes_used, planned', [
    ([60.0] * 10 + [1.0, 3.0] * 10, 3, 30 + 57 * 60 / 2),                    # the first 10 steps do not count
    ([600.0, 200.0, 100.0, 300.0], 20, 4 + 40 * 60 / 200),                   # a quarter of the time is over: half count
    ([9.0], 61, 1),                                                          # all of it is over
])
def test_the_number_of_steps_comes_from_the_speed_after_a_warm_up(monkeypatch, seconds, minutes_used, planned):
    options = dict(ema_decay=0, start_epoch=0, num_epochs=10000)
    state = run_folder.TrainingState(torch.nn.Linear(1, 1), None, options, steps_per_epoch=7, scaler=None)
    monkeypatch.setattr(run_folder.TrainingState, 'minutes', lambda state: minutes_used * (state.step == len(seconds)))
    for value in seconds:
        assert state.steps_planned == 0
        state.finish_step([0] * 5, 1)
        state.plan_steps(value, 60, devices.Processes([]))
    assert state.steps_planned == state.total_steps == planned


def test_learning_rates():
    def rates(**changes):
        options = dict(lr=1.0, lr_schedule='none', warmup_epochs=0.0) | changes
        return np.array([train.learning_rate(step, 100, options, steps_per_epoch=10) for step in range(101)])
    assert (rates() == 1).all()
    assert rates(warmup_epochs=1.0)[:10] == pytest.approx(np.arange(1, 11) / 11) and rates(warmup_epochs=1.0)[10] == 1
    cosine = rates(lr_schedule='cosine')
    assert cosine[0] == 1 and cosine[50] == pytest.approx(0.5) and (np.diff(cosine) < 0).all() and cosine[100] == 0
    cycle = rates(lr_schedule='onecycle')
    assert cycle[0] == pytest.approx(0.04) and cycle[30] == 1 and cycle.argmax() == 30
    assert cycle[100] == pytest.approx(1e-4) and (np.diff(cycle[30:]) < 0).all()


# ---------------------------------------------------------------------------------------------------
# Resume
# ---------------------------------------------------------------------------------------------------

class Stop(Exception):
    """Ends a run as abruptly as a crash would."""


@pytest.fixture(scope='module')
def four_epochs(data, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp('four_epochs') / 'run', *FOUR_EPOCHS)


@pytest.mark.parametrize('workers, steps', [('0', 3), ('0', 4), ('2', 3)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(four_epochs, data, tmp_path, monkeypatch, workers, steps):
    """4 epochs of 2 steps, against a crash after 3 or 4 steps and a resume: weights, averages, optimizer, results."""
    whole, rows = four_epochs

    def crash(run):
        run.save_latest()
        if run.state.step == steps:
            raise Stop
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(run_folder.Run, 'save_if_due', crash)
        run(data, tmp_path / 'parts', *FOUR_EPOCHS, '--workers', workers)
    assert load_checkpoint(latest(tmp_path / 'parts'))['step'] == steps

    resumed, again = resume(tmp_path / 'parts')
    assert same_weights(resumed, whole) and again == rows
    assert all(torch.equal(resumed['raw_state_dict'][k], v) for k, v in whole['raw_state_dict'].items())
    for k, values in whole['optimizer']['state'].items():
        assert all(torch.equal(resumed['optimizer']['state'][k][name], value) for name, value in values.items())
    assert (resumed['best_iou'], resumed['history']) == (whole['best_iou'], whole['history'])
    last = 0.001 * (1 + math.cos(math.pi * 7 / 8)) / 2                       # learning rate of the last of 8 steps
    assert resumed['optimizer']['param_groups'][0]['lr'] == pytest.approx(last)


def test_a_checkpoint_of_an_earlier_version_from_the_middle_of_an_epoch_goes_on(data, tmp_path):
    """Written by commit b1a071d; the numbers are those with which that commit went on."""
    latest(tmp_path / 'run').parent.mkdir(parents=True)
    shutil.copy(EARLIER, latest(tmp_path / 'run'))
    earlier = load_checkpoint(EARLIER)['options']['train']
    checkpoint, _ = resume(tmp_path / 'run', '--data-dir', str(data))
    stored = checkpoint['options']['train']
    assert 'grid_every' in earlier and 'grid_every' not in stored                           # an option that is no more
    assert 'compile' not in earlier and stored['compile'] is TRAIN['compile'].default       # one that was not yet
    assert (checkpoint['epoch'], checkpoint['step'], len(checkpoint['history'])) == (4, 8, 4)
    if torch.__version__.startswith('2.14'):                   # other versions draw another dropout
        assert checkpoint['history'][3] == pytest.approx([4, 3.857681, 3.795967, 0.061713, 0.629687, 0.025944, 1.838738,
                                                          0.643555, 0.217997], rel=1e-4)
        assert checkpoint['state_dict']['conv2.weight'].abs().sum().item() == pytest.approx(91.501472, rel=1e-5)


@pytest.mark.parametrize('words, message', [
    (['--n-layers', '6'], '--n-layers is 6, but the run of .*checkpoint.pth.tar has 4, and it cannot change'),
    (['--batch-size', '7'], '--batch-size is 7, but the run of .* has 2'),
    (['--transform.train.random_affine', '0.1'], '--transform.train.random_affine is 0.1, but the run of .* has 0.3'),
    (['--dataset', 'GlaS'], '--dataset is GlaS, but the run of .* has MultiOrgan'),
    (['--epochs', '9', '--checkpoint-path', str(EARLIER)],                            # under a schedule
     '--num-epochs is 9, but the run of .* has 4'),
])
def test_options_that_cannot_change_are_refused_by_name(base, words, message):
    with pytest.raises(InputError, match=message):
        resume(base[2], *words)


def test_a_published_checkpoint_can_be_resumed_if_it_has_an_optimizer(base, data, tmp_path):
    stored = torch.load(latest(base[2]), weights_only=True)
    published = {key: stored[key] for key in ('epoch', 'state_dict', 'best_iou', 'optimizer')}
    torch.save({**published, 'step': 2}, tmp_path / 'published.pth.tar')              # as a fork of it may have
    checkpoint, rows = run(data, tmp_path / 'run', '--checkpoint-path', str(tmp_path / 'published.pth.tar'),
                           '--epochs', '2', '--weight-decay', '0.5')
    assert checkpoint['epoch'] == 2 and [row['epoch'] for row in rows] == [2]
    assert checkpoint['optimizer']['param_groups'][0]['weight_decay'] == 0.5
    # no file holds the weights that the published best_iou is of
    assert checkpoint['best_iou'] == pytest.approx(rows[0]['val_iou'], abs=1e-4)

    path = tmp_path / 'theirs/checkpoints/checkpoint_1.pth.tar'
    path.parent.mkdir(parents=True)
    torch.save(published, path)
    table = tmp_path / 'theirs/epoch_results.txt'
    values = '\t'.join(f'0.{k}000' for k in range(1, 9))
    table.write_text('\t'.join(run_folder.COLUMNS) + f'\n1\t{values}\n2\t{values}\n')
    words = [*SMALL, '--data-dir', str(data), '--checkpoint-path', str(path), '--epochs', '2']
    train.main(words)                                                # row 2 is made anew
    assert [line.split('\t')[0] for line in table.read_text().splitlines()] == ['epoch', '1', '2']
    assert table.read_text().splitlines()[1] == f'1\t{values}' and table.read_text().count(values) == 1
    table.write_text('no table\n1\n')
    with pytest.raises(InputError, match='theirs/epoch_results.txt is not a table of 9 columns'):
        train.main(words)
    assert table.read_text() == 'no table\n1\n'

    with pytest.raises(InputError, match='--init-from and --checkpoint-path both give weights'):
        train.main([*words, '--init-from', str(latest(base[2]))])
    done = ['--checkpoint-path', str(tmp_path / 'published.pth.tar'), '--save-dir', str(tmp_path / 'new')]
    with pytest.raises(InputError, match='1 epochs count as done, and --epochs is 1: nothing is left to train'):
        train.main([*SMALL, '--data-dir', str(data), *done, '--epochs', '1'])
    assert not (tmp_path / 'new').exists()


def test_a_checkpoint_of_glands_elsewhere_is_resumed_among_the_runs_of_glands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, '--dataset', 'GlaS', '--data-dir', str(make_glas(tmp_path / 'data')), '--save-dir', 'run',
                '--transform.train.scale', '60'])
    shutil.move('run/checkpoints/checkpoint.pth.tar', 'mine.pth.tar')
    train.main(['--checkpoint-path', 'mine.pth.tar', '--epochs', '2'])
    assert [path.parent.parent.name for path in Path('experiments').glob('*/1/checkpoints')] == ['GlaS']


def test_a_run_does_not_delete_the_weights_it_starts_from(base, data, tmp_path):
    shutil.copytree(base[2], tmp_path / 'run')
    shutil.copy(latest(base[2]), tmp_path / 'run/start.pth.tar')
    with pytest.raises(InputError, match='--overwrite True would delete .*checkpoint.pth.tar, from which this run'):
        run(data, tmp_path / 'run', '--init-from', str(latest(tmp_path / 'run')), '--overwrite', 'True')
    assert latest(tmp_path / 'run').is_file()
    run(data, tmp_path / 'run', '--init-from', str(tmp_path / 'run/start.pth.tar'), '--overwrite', 'True')
    assert (tmp_path / 'run/start.pth.tar').is_file()


def test_ctrl_c_saves_and_says_how_to_resume(data, tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *SMALL, '--data-dir', str(data), '--save-dir',
                                str(tmp_path / 'run'), '--epochs', '10000', '--workers', '1'],
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 120
    while not latest(tmp_path / 'run').exists():
        assert process.poll() is None and time.monotonic() < end, 'training ended or hung before its first checkpoint'
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)                # as Ctrl-C and batch systems do: the loader's processes too
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and 'Traceback' not in error
    assert f'resume with: python train.py --checkpoint-path {tmp_path}/run/checkpoints/checkpoint.pth.tar' in error
    assert load_checkpoint(latest(tmp_path / 'run'))['step'] > 0


GPU_FULL = ('not enough memory on the GPU ({}); give --amp True, or begin a new run with a smaller --batch-size or '
            '--input-size; the last good checkpoint is ')
SHM_FULL = ('/dev/shm, through which loader processes send their images, is too small; enlarge it (docker run '
            '--shm-size=2g), or give --workers 0; the last good checkpoint is ')


@pytest.mark.parametrize('kind, said, message', [
    (torch.OutOfMemoryError, 'CUDA out of memory. Tried to allocate 2.00 GiB.', GPU_FULL),
    (RuntimeError, 'CUDA error: out of memory', GPU_FULL),
    (RuntimeError, 'unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device', SHM_FULL),
    (RuntimeError, 'DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that', SHM_FULL)])
def test_too_little_memory_is_one_line_with_what_helps(data, tmp_path, monkeypatch, kind, said, message):
    step, steps = torch.optim.Adam.step, itertools.count()

    def fail(self, *rest):
        if next(steps):
            raise kind(f'{said}\nmore')
        return step(self, *rest)
    monkeypatch.setattr(torch.optim.Adam, 'step', fail)
    with pytest.raises(InputError) as refused:
        run(data, tmp_path / 'run', '--checkpoint-minutes', '0')
    path = latest(tmp_path / 'run')
    assert str(refused.value) == message.format(said) + str(path) and load_checkpoint(path)['step'] == 1


@pytest.mark.parametrize('number', [errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.EFBIG])
def test_a_drive_that_goes_away_is_one_line(data, tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number), 'train.log')
    monkeypatch.setattr(run_folder.Run, 'log_epoch', fail)
    with pytest.raises(InputError, match=f'{os.strerror(number)}: train.log; the drive or network folder may be gone'):
        run(data, tmp_path / 'run')


# ---------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------

def test_an_older_run_is_not_overwritten_unless_asked(base, data, tmp_path):
    shutil.copytree(base[2], tmp_path / 'run')
    (tmp_path / 'run/notes.txt').write_text('mine')
    before = (tmp_path / 'run/train.log').read_text()
    for words in ([], ['--checkpoint-path', str(latest(base[2])), '--epochs', '2']):                   # of another run
        with pytest.raises(InputError, match='run is not empty; resume the run in it with --checkpoint-path .*or '
                                             'replace the run with --overwrite True'):
            run(data, tmp_path / 'run', *words)
        assert (tmp_path / 'run/train.log').read_text() == before
    _, rows = run(data, tmp_path / 'run', '--overwrite', 'True', '--seed', '3')
    assert rows != base[1] and len(rows) == 1 and (tmp_path / 'run/notes.txt').exists()


@pytest.mark.parametrize('words, message', [
    ('--input-size 80 --transform.train.random_resize none', r'random_crop \(input_size\) is 80, but an image is'),
    ('--transform.train.random_crop none --transform.train.random_resize 1 1.9 --batch-size 4',
     r'images of a batch differ in size, \d+ x \d+ and \d+ x \d+ .*pixels; crop')])
def test_crops_that_do_not_fit_the_images(data, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        run(data, tmp_path / 'run', *words.split(), '--workers', '1')


def test_the_best_checkpoint_has_a_strictly_higher_iou(data, tmp_path, monkeypatch):
    ious = iter([0.2, 0.5, 0.5, 0.3])
    monkeypatch.setattr(train, 'validate', lambda *_: ([0.0, 0.9, next(ious)], []))
    run(data, tmp_path / 'run', '--epochs', '4')
    best = load_checkpoint(tmp_path / 'run/checkpoints/checkpoint_best.pth.tar')
    assert best['epoch'] == 2 and best['best_iou'] == 0.5


def test_a_loss_that_is_not_finite_stops_and_names_the_images(data, tmp_path):
    with pytest.raises(InputError, match=r'the loss is nan in epoch 1, step 2, on train_\d.png, train_\d.png; '
                                         'nothing was saved before; try a lower --lr'):
        run(data, tmp_path / 'run', '--lr', '1e30')


# ---------------------------------------------------------------------------------------------------
# The run scripts
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('script, make, sets', [('run_MO.sh', make_multi_organ, ('test_same', 'test_diff')),
                                                ('run_GlaS.sh', make_glas, ('testA',))])
def test_run_scripts_train_and_test_the_sets_that_are_there(tmp_path, script, make, sets):
    folder = make(tmp_path / 'my data')
    small = [word for word in SMALL if word != 'cpu' and word != '--gpu']
    if 'GlaS' in script:                                             # the run folder as a variable, and as an option
        shutil.rmtree(folder / 'images/testB')
        words, environment = ['--transform.train.scale', '44'], {'SAVE_DIR': str(tmp_path / 'run'),
                                                                 'DATA_DIR': str(folder)}
    else:
        words, environment = ['--save-dir', str(tmp_path / 'run'), '--data-dir', str(folder)], {}
    calls, said = calls_of(script, tmp_path, *small, *words, **environment)
    assert (f'no {folder}/images/testB: not tested\n' in said) == (len(sets) == 1)
    assert [call[0] for call in calls] == ['train.py'] + ['test.py'] * len(sets)
    for call in calls:
        {'train.py': train.main, 'test.py': test.main}[call[0]](call[1:])
    for name in sets:
        table = (tmp_path / 'run' / 'best' / f'{name}_test_result.txt').read_text()
        assert table.startswith('Metrics:\tpixel_acc') and '\nAverage:\t' in table
        assert list((tmp_path / 'run' / 'best' / f'{name}_segmentation').glob('*_seg.tiff'))
