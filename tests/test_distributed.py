"""Several processes, started by torchrun, on the CPU over gloo: the same numbers as one process, and how they end."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import test
import train
from dataset import EpochBatches
from miniature import SMALL, make_multi_organ
from support import devices
from support.checkpoints import load_checkpoint
from support.devices import choose_device
from support.script import InputError

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(ROOT)}
# train.py without batch statistics, which are each process's own on the CPU; keeps the gradients of all steps
FROZEN = '''
import os, sys
import torch
import train
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
forward = torch.nn.BatchNorm2d.forward
def count(self, x):                                  # the steps, which the average of the weights asks for
    if torch.is_grad_enabled():
        self.num_batches_tracked += 1
    return forward(self, x)
torch.nn.BatchNorm2d.forward = count
gradients, step = [], torch.optim.Adam.step
def keep(self, *rest):
    gradients.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group['params']]))
    return step(self, *rest)
torch.optim.Adam.step = keep
train.main(sys.argv[2:])
if os.environ.get('RANK', '0') == '0':
    torch.save(gradients, sys.argv[1])
'''


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_multi_organ(tmp_path_factory.mktemp('data'), n_train=5, n_val=3)


def start(*words, **options):
    return subprocess.Popen(list(map(str, words)), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, **options)


def finish(process, code=0):
    error = process.communicate(timeout=300)[1]
    assert process.returncode == code, error
    return error


def run_frozen(monkeypatch, *words):
    """FROZEN in this process, whose classes are put back afterwards."""
    with monkeypatch.context() as patch:
        for owner, name in ((torch.nn.BatchNorm2d, 'train'), (torch.nn.BatchNorm2d, 'forward'),
                            (torch.optim.Adam, 'step')):
            patch.setattr(owner, name, getattr(owner, name))
        patch.setattr(sys, 'argv', ['frozen.py', *map(str, words)])
        exec(FROZEN, {})


def test_two_processes_compute_what_one_does_and_either_goes_on_with_the_other_s_run(data, tmp_path, monkeypatch):
    """Losses and gradients of every step, of which the last has one image for two processes; EMA, validation."""
    script = tmp_path / 'frozen.py'
    script.write_text(FROZEN)
    words = [*SMALL, '--data-dir', data, '--drop-rate', '0', '--ema-decay', '0.9', '--batch-size', '4', '--epochs', '2']
    run_frozen(monkeypatch, tmp_path / 'one.pt', *words, '--save-dir', tmp_path / 'one')
    finish(start(*TORCHRUN, script, tmp_path / 'two.pt', *words, '--epochs', '1', '--save-dir', tmp_path / 'two'))
    path = 'checkpoints/checkpoint.pth.tar'
    resume = ['--checkpoint-path', tmp_path / 'two' / path, '--epochs', '2']
    run_frozen(monkeypatch, tmp_path / 'rest.pt', *resume)

    one, *parts = (torch.load(tmp_path / f'{name}.pt') for name in ('one', 'two', 'rest'))
    assert [len(one), *map(len, parts)] == [4, 2, 2]
    for a, b in zip(one, parts[0] + parts[1]):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max() and a.abs().max() > 0
    one, two = (load_checkpoint(tmp_path / name / path) for name in ('one', 'two'))
    assert two['step'] == 4 and np.allclose(one['history'], two['history'], rtol=0, atol=1e-4)
    assert all(torch.allclose(value, two['state_dict'][key], atol=1e-4) for key, value in one['state_dict'].items())


def test_processes_share_a_batch():
    whole = EpochBatches(7, 3, seed=1)
    shares = [EpochBatches(7, 3, 1, rank, 2) for rank in range(2)]
    for k, keys, a, b in zip(range(len(whole)), whole, *shares):
        sizes = [share.sizes(k) for share in shares]
        assert sizes == [(2, 3), (1, 3)] if k < 2 else sizes == [(1, 1), (0, 1)]
        assert sorted(a[:sizes[0][0]] + b[:sizes[1][0]]) == sorted(keys) and a and b


def running(tmp_path, data, *words):
    """A training by two processes that goes on for ever and has saved a checkpoint; its path."""
    process = start(*TORCHRUN, ROOT / 'train.py', *SMALL, '--data-dir', data, '--save-dir', tmp_path / 'run',
                    '--epochs', '10000', '--checkpoint-minutes', '0', *words, start_new_session=True)
    path, end = tmp_path / 'run/checkpoints/checkpoint.pth.tar', time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, 'training ended or hung before its first checkpoint'
        time.sleep(0.05)
    return process, path


def goes_on(path):
    step = load_checkpoint(path)['step']
    train.main(['--checkpoint-path', str(path), '--epochs', str(step // 3 + 2)])
    assert load_checkpoint(path)['epoch'] == step // 3 + 2 and step > 0


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='finds the processes in /proc')
def test_a_killed_process_ends_the_run_with_a_message_and_a_checkpoint(data, tmp_path):
    process, path = running(tmp_path, data)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    ranks = {re.search(rb'\0RANK=(\d+)', Path(f'/proc/{child}/environ').read_bytes())[1]: child for child in children}
    os.kill(int(ranks[b'1']), signal.SIGKILL)
    error = finish(process, code=1)
    assert f'error: process 0: another process of this run ended; the last good checkpoint is {path}; resume' in error
    assert 'most recent call' not in error.partition('error: process 0')[0]
    goes_on(path)


def test_a_signal_stops_all_processes_after_the_same_step_with_a_checkpoint(data, tmp_path):
    process, path = running(tmp_path, data, '--workers', '1')
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and f'resume with: python train.py --checkpoint-path {path}' in error
    assert 'another process' not in error and error.count('stopping after this step') == 1
    goes_on(path)


def test_images_are_shared_out_in_testing(data, tmp_path):
    train.main([*SMALL, '--data-dir', str(data), '--save-dir', str(tmp_path / 'run')])
    words = ['--model-path', tmp_path / 'run/checkpoints/checkpoint_best.pth.tar',
             '--img-dir', data / 'images/test_same', '--label-dir', data / 'labels_instance/test', '--tta', 'none',
             '--gpu', 'cpu']
    test.main([*map(str, words), '--save-dir', str(tmp_path / 'one')])
    finish(start(*TORCHRUN, ROOT / 'test.py', *words, '--save-dir', tmp_path / 'two'))
    files = [[p.relative_to(tmp_path / name) for p in sorted((tmp_path / name).rglob('*')) if p.is_file()]
             for name in ('one', 'two')]
    assert files[0] == files[1] and len(files[0]) == 19
    for file in files[0]:
        if not file.name.startswith('test_options'):
            assert (tmp_path / 'one' / file).read_bytes() == (tmp_path / 'two' / file).read_bytes()


def test_gpus_of_several_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(devices, 'device_problem', lambda device: None)
    monkeypatch.setattr(sys, 'argv', ['train.py', '--gpu', '0', '1'])
    with pytest.raises(InputError, match='--gpu names 2 GPUs, and one process uses one; start a process for each with: '
                                         'torchrun --nproc-per-node 2 train.py --gpu 0 1$'):
        choose_device([0, 1])
    chosen = [str(choose_device(gpu, 1, 2)) for gpu in ([0, 1], [1, 0], 'auto', [])]
    assert chosen == ['cuda:1', 'cuda:0', 'cuda:1', 'cpu']
    with pytest.raises(InputError, match='more processes on this machine than the 2 GPUs .* --nproc-per-node 2, or'):
        choose_device('auto', 2, 3)


def test_a_batch_smaller_than_the_number_of_processes_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'Processes', lambda gpu: SimpleNamespace(count=2))
    with pytest.raises(InputError, match='--batch-size is 1, for 2 processes; expected at least 2: it counts'):
        train.main([*SMALL, '--data-dir', str(data), '--save-dir', str(tmp_path / 'run'), '--batch-size', '1'])
    assert not (tmp_path / 'run').exists()
