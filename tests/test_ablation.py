"""The ablation script on miniature data."""
import json
import shutil
import signal
import threading
import time
from pathlib import Path

import ablation
import pytest
from PIL import Image

from miniature import SMALL, make_multi_organ
from options import Options
from support.checkpoints import load_checkpoint
from support.script import InputError

# without what the script sets itself
TINY = [*SMALL[:SMALL.index('--epochs')], *SMALL[SMALL.index('--epochs') + 2:], '--dilations', *'1111111']


@pytest.fixture
def data(tmp_path):
    folder = make_multi_organ(tmp_path / 'data')
    shutil.copytree(folder / 'images' / 'test_diff', folder / 'images' / 'val_full')
    shutil.copytree(folder / 'labels_instance' / 'test', folder / 'labels_instance' / 'val_full')
    return folder


def test_arms_budgets_and_going_on(data, tmp_path, monkeypatch, capsys):
    steps = {'FullNet': 2, 'FCN_pooling': 3}                                # 4 images in batches of 2: 2 steps an epoch
    monkeypatch.setattr(ablation, 'planned_steps', lambda arm, *_: steps[arm])
    words = ['--data-dir', str(data), '--out', str(tmp_path / 'out'), '--minutes', '0.03', '--seeds', '3', '--jobs',
             '2', '--arms', 'FCN_pooling', 'FullNet', *TINY]
    ablation.main(words)
    runs = json.loads((tmp_path / 'out/ablation.json').read_text())
    assert [(run['arm'], run['seed'], run['epochs'], run['steps']) for run in runs] == [
        ('FCN_pooling', 3, 1, 2), ('FCN_pooling', 3, 2, 4), ('FullNet', 3, 1, 2)]
    metrics = tmp_path / 'out' / ablation.Job('FullNet', 3, 1).folder / 'results/val_full_metrics.json'
    mean = json.loads(metrics.read_text())['mean']
    assert all(runs[-1][name] == mean[key] for name, key in [('AJI', 'published_AJI'), ('aji', 'aji'), ('pq', 'pq'),
                                                             ('Dice', 'published_Dice'), ('F1', 'published_F1')])
    trained = load_checkpoint(metrics.parents[1] / 'run/checkpoints/checkpoint.pth.tar')
    assert (runs[-1]['minutes'], runs[-1]['val_iou']) == (trained['minutes'], trained['history'][-1][-1])
    options = [json.loads((tmp_path / 'out' / ablation.Job(*[run[k] for k in ('arm', 'seed', 'epochs')]).folder
                           / 'run/train_options.json').read_text()) for run in runs]
    assert [o['model']['name'] for o in options] == [run['arm'] for run in runs]
    assert all(o['train']['alpha'] == 0 and o['train']['seed'] == 3 for o in options)
    assert Image.open(tmp_path / 'out/ablation.png').width == 1000

    table = (tmp_path / 'out/ablation.md').read_text()
    assert 'FullNet_seed3_epochs1: steps 2' in capsys.readouterr().out
    ablation.main(words)                                                    # what is done is kept
    assert 'seed3_epochs' not in capsys.readouterr().out
    assert (tmp_path / 'out/ablation.md').read_text() == table
    with pytest.raises(InputError, match='budgets.json is of another ablation'):
        ablation.main([*words, '--lr', '0.1'])

    # a training that was stopped goes on, and is tested as it was trained
    calls = []
    monkeypatch.setattr(ablation, 'call', lambda words, *_: calls.append(words))
    job, folder = ablation.Job('FullNet', 3, 1), metrics.parents[1]
    (folder / 'ablation_scores.json').unlink()
    ablation.finished(job, tmp_path / 'out', ['--amp', 'True'], data, 1)
    assert calls[0] == ['train.py', '--checkpoint-path', folder / 'run/checkpoints/checkpoint.pth.tar']
    assert calls[1][0] == 'test.py' and calls[1][calls[1].index('--amp') + 1] == 'True'


def test_table_of_means_spreads_and_differences():
    epochs, arms, seeds = {'FullNet': 2, 'FCN_pooling': 6}, list(ablation.ARMS), [1, 2]
    runs = [('FCN_pooling', 2, (0.1, 0.3)), ('FCN_pooling', 6, (0.5, 0.5)), ('FullNet', 2, (0.4, 0.6)),
            ('FullNet + varCE', 2, (0.7, 0.5)), ('FullNet + varCE, no weight map', 2, (0.6, 0.4))]
    scores = {ablation.Job(arm, seed, n): {'steps': n, 'minutes': 3, 'val_iou': value}
              | dict.fromkeys(ablation.SCORES, value) for arm, n, values in runs for seed, value in zip(seeds, values)}
    lines = ablation.report(scores, arms, seeds, epochs).splitlines()
    assert lines[2].startswith('| FCN_pooling | 2 | 3 | 0.200 ± 0.141 | 0.200 ± 0.141 |')
    assert lines[9].startswith('| FCN_pooling | 6 | 3 | 0.500 ± 0.000 |') and lines[3] == lines[10]
    assert lines[14:17] == [
        'equal steps, AJI: FullNet minus FCN_pooling: +0.3000 (by seed: +0.3000 +0.3000); all seeds agree.  ',
        'equal steps, AJI: FullNet + varCE minus FullNet: +0.1000 (by seed: +0.3000 -0.1000); the seeds disagree.  ',
        'equal steps, AJI: FullNet + varCE, no weight map minus FullNet + varCE: -0.1000 (by seed: -0.1000 -0.1000); '
        'all seeds agree.  ']
    ties = {job: values | {'AJI': 0.5 if job.seed == 1 else values['AJI']} for job, values in scores.items()}
    assert 'the seeds disagree' in ablation.report(ties, arms, seeds, epochs).splitlines()[14]
    assert lines[17] == ('equal minutes, AJI: FullNet minus FCN_pooling: +0.0000 (by seed: -0.1000 +0.1000); '
                         'the seeds disagree.  ')


def test_the_arms_are_those_of_the_paper():
    arms = {}
    for arm, words in ablation.ARMS.items():
        opt = Options(isTrain=True).parse([*ablation.RECIPE, *words])
        arms[arm] = opt.model['name'], opt.train['alpha'], opt.train['use_weight_map']
    assert arms == {'FCN_pooling': ('FCN_pooling', 0, True), 'FullNet': ('FullNet', 0, True),
                    'FullNet + varCE': ('FullNet', 1, True), 'FullNet + varCE, no weight map': ('FullNet', 1, False)}


@pytest.mark.skipif(not hasattr(signal, 'pthread_kill'), reason='sends itself a signal')
@pytest.mark.parametrize('phase', ['speed', 'training'])
def test_ctrl_c_stops_what_runs_and_starts_nothing_more(data, tmp_path, monkeypatch, phase):
    if phase == 'training':
        monkeypatch.setattr(ablation, 'planned_steps', lambda *_: 2)
    monkeypatch.setattr(ablation, 'ROOT', tmp_path)
    monkeypatch.setattr(ablation, 'running', [])
    monkeypatch.setattr(ablation, 'stopping', threading.Event())
    (tmp_path / 'train.py').write_text('import os, signal, time\n'
                                       'def stop(*_):\n    open("stopped", "w")\n    os._exit(143)\n'
                                       'signal.signal(signal.SIGTERM, stop)\n'
                                       'open("started", "w")\ntime.sleep(60)\n')
    monkeypatch.chdir(tmp_path)
    main_thread = threading.get_ident()

    def interrupt():
        while not Path('started').exists():
            time.sleep(0.02)
        signal.pthread_kill(main_thread, signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)         # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            ablation.main(['--data-dir', str(data), '--out', str(tmp_path / 'out'), '--seeds', '1', '2', *TINY])
    finally:
        signal.signal(signal.SIGINT, before)
    assert Path('stopped').exists() and all(process.poll() is not None for process in ablation.running)
    assert len([*(tmp_path / 'out').glob('*/train.out'), *(tmp_path / 'out').glob('speed*.out')]) == 1
    with pytest.raises(InputError, match='stopped'):                         # what was about to start does not
        ablation.call(['train.py'], 1, tmp_path / 'late.out')


def test_a_run_that_fails_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, 'planned_steps', lambda *_: 2)
    (data / 'mean_std.npy').unlink()
    with pytest.raises(InputError, match='train.py ended with exit code 2; see .*train.out, then start this again'):
        ablation.main(['--data-dir', str(data), '--out', str(tmp_path / 'out'), '--seeds', '1', '--arms', 'FullNet',
                       *TINY])
    assert 'no ' in next((tmp_path / 'out').glob('*/train.out')).read_text()


def test_options_that_the_arms_decide_are_refused(data, tmp_path):
    with pytest.raises(InputError, match='--epochs=7 is set by this script, for each arm; leave it out'):
        ablation.main(['--data-dir', str(data), '--out', str(tmp_path / 'out'), *TINY, '--epochs=7'])
    assert not (tmp_path / 'out').exists()


def test_steps_are_planned_by_train_py(data, tmp_path):
    words = [*ablation.RECIPE, *TINY, '--data-dir', str(data)]
    steps = ablation.planned_steps('FCN_pooling', tmp_path, 0.5, words, 1, 2)
    checkpoint = load_checkpoint(tmp_path / 'speed_of_FCN_pooling/checkpoints/checkpoint.pth.tar')
    options = checkpoint['options']
    assert options['model']['name'] == 'FCN_pooling' and options['train']['max_minutes'] == 0.5
    assert steps == checkpoint['steps_planned'] > 0 and checkpoint['step'] == min(32, steps)
