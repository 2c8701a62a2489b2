"""scripts/reproduce.sh on miniature data: the whole way from the raw files to the table, without a network."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reproduce
import torch

import test
from miniature import SMALL, make_multi_organ, nuclei
from support.checkpoints import load_checkpoint, save_checkpoint
from support.files import save_image, save_instances, sha256_of
from support.images import decode
from support.script import InputError

ROOT = Path(__file__).resolve().parents[1]
TINY = [*SMALL, '--epochs', '2']
# no network, and no SimpleITK
ALONE = '''
import socket
import sys

def refused(*_):
    raise OSError('the network was asked for')
socket.socket.connect = socket.getaddrinfo = refused
sys.modules['SimpleITK'] = None
'''


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start the script with words, on a machine that has python3 but no python; returns (exit code, stdout, stderr)."""
    for name in ('raw', 'data', 'save'):
        monkeypatch.setenv(f'{name.upper()}_DIR', str(tmp_path / name))
    (tmp_path / 'bin').mkdir()
    for name in ('dirname', 'sh'):
        (tmp_path / 'bin' / name).symlink_to(f'/usr/bin/{name}')
    (tmp_path / 'bin/python3').write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / 'bin/python3').chmod(0o755)
    (tmp_path / 'alone').mkdir()
    (tmp_path / 'alone/sitecustomize.py').write_text(ALONE)
    elsewhere = tmp_path / 'project'                                         # without a .venv
    (elsewhere / 'scripts').mkdir(parents=True)
    for path in (*ROOT.glob('*.py'), *(ROOT / 'scripts').glob('*.*')):
        (elsewhere / path.relative_to(ROOT)).symlink_to(path)

    def run(*words):
        environment = os.environ | {'PATH': str(tmp_path / 'bin'), 'PYTHONPATH': str(tmp_path / 'alone')}
        done = subprocess.run(['/bin/sh', str(elsewhere / 'scripts/reproduce.sh'), *words], capture_output=True,
                              text=True, env=environment)
        return done.returncode, done.stdout, done.stderr
    return run


def rows_of(text):
    """{(weights, TTA, measured on): {column: word}} of the table in a report."""
    lines = [[word.strip() for word in line.strip('|\n').split('|')] for line in text.splitlines() if line[:1] == '|']
    return {tuple(line[:3]): dict(zip(lines[0][3:], line[3:])) for line in lines[2:]}


def test_multi_organ_from_prepared_data_to_the_table_and_again(start, tmp_path, capsys):
    data, run = make_multi_organ(tmp_path / 'data', n_train=2), tmp_path / 'save'
    image, label = nuclei(5)
    save_image(data / 'images/val_full/v.png', image)
    save_instances(data / 'labels_instance/val_full/v.png', label)
    code, out, err = start('MultiOrgan', *TINY)
    assert code == 0, err
    checkpoint = load_checkpoint(run / 'checkpoints/checkpoint.pth.tar')
    trained = checkpoint['options']['train']
    assert (trained['amp'], trained['ema_decay'], trained['val_every'], trained['lr']) == (True, 0.999, 20, 0.001)
    assert checkpoint['epoch'] == 2 and [row[-1] >= 0 for row in checkpoint['history']] == [False, True]

    # both files of weights are those of the best checkpoint
    for kind, key in (('averaged', 'state_dict'), ('raw', 'raw_state_dict')):
        exported = load_checkpoint(run / f'weights_{kind}.pth.tar')['state_dict']
        assert all(torch.equal(exported[name], value) for name, value in checkpoint[key].items())
    assert not torch.equal(checkpoint['state_dict']['conv2.weight'], checkpoint['raw_state_dict']['conv2.weight'])

    # the table
    report = (run / 'reproduce.md').read_text()
    assert report in out and 'MultiOrgan: 2 of 2 epochs, 2 steps' in report and 'CPU cores' in report
    rows = rows_of(report)
    names = ['validation: val_full, 1 images', 'test: test_same, 2 images', 'test: test_diff, 1 images',
             'test: test_same + test_diff, 3 images']
    assert list(rows)[:-1] == [(kind, tta, name) for tta in ('none', 'full') for kind in ('averaged', 'raw')
                               for name in names]
    paper = rows.pop(list(rows)[-1])
    assert (paper['dice'], paper['AJI'], paper['F1']) == ('0.8027', '0.6039', '-')
    for (kind, tta, name), row in rows.items():
        if '+' not in name:
            folder, part = run / f'results/{kind}_tta_{tta}', name.split()[1][:-1]
            words = (folder / f'{part}_test_result.txt').read_text().splitlines()
            published = dict(zip(words[0].split('\t')[1:], words[1].split('\t')[1:]))
            assert {key: f'{float(word):.2f}' if key == 'Hausdorff' else word for key, word in published.items()} == {
                key: 'nan' if word == '-' else word for key, word in row.items() if key != 'dice'}
            metrics = json.loads((folder / f'{part}_metrics.json').read_text())
            made_by = metrics['made_by']
            assert row['dice'] == f'{metrics["mean"]["dice"]:.4f}'
            assert made_by['test']['tta'] == tta and made_by['test']['amp']
            assert made_by['weights_sha256'] == sha256_of(run / f'weights_{kind}.pth.tar')
    for kind, tta in {key[:2] for key in rows}:
        both = [float(rows[kind, tta, name]['pixel_acc']) for name in names[1:]]
        assert both[2] == pytest.approx((2 * both[0] + both[1]) / 3, abs=1e-4)

    # again: nothing is trained or computed anew
    stored = {path: path.stat().st_mtime_ns for path in [*run.rglob('*.pth.tar'), *run.rglob('*_records/*.json')]}
    assert len(stored) == 4 + 4 * 4
    capsys.readouterr()
    reproduce.main(['MultiOrgan', *TINY])
    assert all(path.stat().st_mtime_ns == before for path, before in stored.items())
    assert rows_of(capsys.readouterr().out) == rows_of(report)

    # more epochs: the run goes on, and what it finds is tested
    reproduce.main(['MultiOrgan', *TINY, '--epochs', '21'])
    assert '21 of 21 epochs' in capsys.readouterr().out
    exported = load_checkpoint(run / 'weights_averaged.pth.tar')['epoch']
    assert exported == load_checkpoint(run / 'checkpoints/checkpoint_best.pth.tar')['epoch']


def test_glas_from_raw_files_within_minutes(start, tmp_path, capsys, monkeypatch):
    for part, count in (('train', 4), ('testA', 1), ('testB', 1)):
        for i in range(1, count + 1):
            image, label = nuclei([ord(part[-1]), i], 48, 60)
            save_image(tmp_path / f'raw/{part}_{i}.bmp', image)
            save_image(tmp_path / f'raw/{part}_{i}_anno.bmp', label.astype('uint8'))
    words = [*TINY, '--epochs', '100000', '--transform.train.scale', '48', '--transform.val.scale', '40']
    with pytest.raises(InputError, match='0.0001 MINUTES were over before training; start again: the data'):
        reproduce.main(['GlaS', '0.0001', *words])
    code, out, err = start('GlaS', '0.15', *words)
    assert code == 0, err
    latest, results = tmp_path / 'save/checkpoints/checkpoint.pth.tar', tmp_path / 'save/results'
    checkpoint = load_checkpoint(latest)
    assert 0 < checkpoint['options']['train']['max_minutes'] < 0.75 * 0.15
    assert checkpoint['step'] == checkpoint['steps_planned'] > 0

    # the time ends in the midst of the second round: what is not there yet is left out and named
    def slow(*args):
        if signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            time.sleep(60)
        return segment_bands(*args)
    segment_bands = test.segment_bands
    shutil.rmtree(results)
    capsys.readouterr()
    with monkeypatch.context() as slowly:
        slowly.setattr(test, 'segment_bands', slow)
        reproduce.main(['GlaS', '10', *words])
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert list(rows) == [('averaged', 'none', 'validation: val, 1 images'),
                          *(('averaged', 'none', f'test: test{x}, 1 images') for x in 'AB'),
                          *(('paper, FullNet + varCE', '-', f'test: test{x}') for x in 'AB')]
    paper = list(rows.values())[3:]
    assert [row[key] for row in paper for key in ('F1', 'Dice', 'Hausdorff')] == [
        '0.924', '0.914', '37.28', '0.853', '0.856', '88.75']
    assert all(f'{weights} weights, --tta {tta}, {name}' in out for name in ('val', 'testA', 'testB')
               for weights, tta in (('raw', 'none'), ('averaged', 'full'), ('raw', 'full')))

    # without a limit the rest is done; the training is over
    reproduce.main(['GlaS', *words])
    out = capsys.readouterr().out
    assert len(rows_of(out)) == 4 * 3 + 2 and 'Left out' not in out
    assert load_checkpoint(latest)['step'] == checkpoint['step']


def test_mistakes_are_one_line(start, tmp_path):
    code, out, err = start('GlaS', '10', *TINY)
    assert code == 2 and err.count('\n') == 1 and 'raw' in err                # nothing to prepare from
    (tmp_path / 'bin/python3').unlink()
    code, out, err = start('GlaS')
    assert code == 2 and err == 'error: no .venv, python3 or python was found; install Python 3.10 or later\n'

    for words, message in ((['GlaS', 'nan'], 'MINUTES is nan; expected a number of minutes'),
                           (['GlaS', '5', '--lr', 'fast'], "--lr is 'fast'")):
        with pytest.raises(InputError, match=message):
            reproduce.main(words)
    save_checkpoint(tmp_path / 'save/checkpoints/checkpoint.pth.tar',
                    {'state_dict': {}, 'options': {'train': {'max_minutes': 0}}})
    with pytest.raises(InputError, match='was started without MINUTES, which its training cannot be given now'):
        reproduce.main(['GlaS', '5'])


@pytest.mark.skipif(not hasattr(signal, 'setitimer'), reason='there are no timers')
def test_when_the_time_is_up_no_file_is_called_damaged():
    class Slow:
        def __array__(self, *_, **__):
            time.sleep(5)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(reproduce.TimeIsUp):
        reproduce.end_after(0.05)
        decode(Slow(), 'a.png')
    signal.signal(signal.SIGALRM, before)


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text("import sys; sys.modules['skimage'] = None")
    done = subprocess.run([sys.executable, str(ROOT / 'scripts/reproduce.py'), 'GlaS'], capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert 'skimage' in done.stderr and 'sh scripts/setup.sh makes a .venv that has it' in done.stderr
