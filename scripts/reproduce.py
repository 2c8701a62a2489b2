"""The paper's experiment on one machine: prepare, train, test, export, and print the scores beside the paper's.

    sh scripts/reproduce.sh MultiOrgan                       # the published 300 epochs; GlaS: 1000
    sh scripts/reproduce.sh GlaS 60 --batch-size 4           # everything within 60 minutes; the rest goes to train.py

Beside the published settings: mixed precision, averaged weights (--ema-decay 0.999), validation every 20 epochs. The
checkpoint of the best validation is tested, averaged and raw, without and with test-time augmentation.

Environment: RAW_DIR, the files as downloaded [./raw/DATASET]; DATA_DIR, where they are prepared unless mean_std.npy is
there [./data/DATASET]; SAVE_DIR, the run folder [./experiments/reproduce/DATASET].

MINUTES are those of one start. Three quarters of what preparation leaves are for the training steps, whose number is
fixed in the first start; the last quarter is for validation, export and tests. The averaged weights are always tested
without augmentation. Other tests end with the MINUTES; those left out are named, and done when started again.
"""
import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
try:
    import export_pretrained
    import numpy as np
    import torch

    import prepare_data
    import test
    import train
    from options import DATASETS, Options
    from support.checkpoints import load_checkpoint
    from support.devices import choose_device
    from support.files import write_text
    from support.run_folder import git_commit
    from support.script import InputError, Parser, run_script
except ModuleNotFoundError as error:
    print(f'error: {error} in {sys.executable}; sh scripts/setup.sh makes a .venv that has it', file=sys.stderr)
    sys.exit(2)

RECIPE = ['--amp', str(not torch.backends.mps.is_available()), '--ema-decay', '0.999', '--val-every', '20']
TRAINING_SHARE = 0.75                                                     # of MINUTES
SETS = {'MultiOrgan': {'val_full': 'val_full', 'test_same': 'test', 'test_diff': 'test'},      # images: labels
        'GlaS': {'val': 'val', 'testA': 'testA', 'testB': 'testB'}}
PAPER = {'MultiOrgan': [("paper, quoted by CDNet's authors (which Dice and AJI is not said)", 'test: 14 images',
                         {'dice': 0.8027, 'AJI': 0.6039})],
         'GlaS': [('paper, FullNet + varCE', 'test: testA', {'F1': 0.924, 'Dice': 0.914, 'Hausdorff': 37.28}),
                  ('paper, FullNet + varCE', 'test: testB', {'F1': 0.853, 'Dice': 0.856, 'Hausdorff': 88.75})]}
NOTE = 'Means over images of the published scores; dice is that of the foreground pixels.\n' \
       'Validation images chose the checkpoint: only test rows compare with the paper.\n'
LICENCE = {'MultiOrgan': 'CC BY-NC-SA 4.0, the licence of the MoNuSeg images (Kumar et al., IEEE TMI 2017)', 'GlaS': ''}


class TimeIsUp(BaseException):
    """MINUTES are over. No Exception, which the readers of files would take for a damaged file."""


def main(argv=None):
    started, words = time.monotonic(), list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog='scripts/reproduce.py', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dataset', choices=DATASETS)
    parser.add_argument('minutes', type=float, nargs='?', default=0.0, help='for everything; 0 = no limit [0]')
    own = next((i for i, word in enumerate(words) if word[:1] == '-' and word not in ('-h', '--help')), len(words))
    args = parser.parse_args(words[:own])
    if not 0 <= args.minutes < float('inf'):
        raise InputError(f'MINUTES is {args.minutes:g}; expected a number of minutes, or 0 for no limit')

    def seconds_left():
        return started + args.minutes * 60 - time.monotonic()

    # 1. options of train.py, which also say where everything is
    dataset = args.dataset
    words = ['--dataset', dataset, '--data-dir', os.environ.get('DATA_DIR') or f'./data/{dataset}', '--save-dir',
             os.environ.get('SAVE_DIR') or f'./experiments/reproduce/{dataset}', *RECIPE, *words[own:]]
    asked = Options().parse(words).train
    data_dir, save_dir = Path(asked['data_dir']), Path(asked['save_dir'])
    latest = save_dir / 'checkpoints' / 'checkpoint.pth.tar'
    # with a comma at the end: '10,' is GPU 10, where '10' is GPUs 1 and 0
    gpu = 'auto' if asked['gpu'] == 'auto' else ','.join([*map(str, asked['gpu']), '']) or 'cpu'
    if args.minutes and latest.is_file() and not load_checkpoint(latest).get('options', {}).get(
            'train', {}).get('max_minutes'):
        raise InputError(f'the run in {save_dir} was started without MINUTES, which its training cannot be given now; '
                         f'leave them out, or name another run folder: SAVE_DIR')

    # 2. data
    if not (data_dir / 'mean_std.npy').is_file():                         # written last
        prepare_data.main(['--dataset', dataset, '--data-dir', str(data_dir), '--workers', str(os.cpu_count() or 1),
                           '--raw-dir', os.environ.get('RAW_DIR') or f'./raw/{dataset}'])

    # 3. training, or the rest of it
    if latest.is_file():
        words += ['--checkpoint-path', str(latest)]
    else:
        if args.minutes and seconds_left() <= 0:
            raise InputError(f'the {args.minutes:g} MINUTES were over before training; start again: the data is there')
        words += ['--overwrite', 'True']
        words += ['--max-minutes', str(TRAINING_SHARE * seconds_left() / 60)] if args.minutes else []
    train.main(words)
    torch.backends.cudnn.benchmark = False                                # as in test.py: images of GlaS differ in size
    run = load_checkpoint(latest)
    trained = run['options']['train']

    # 4. files of weights
    best, weights = save_dir / 'checkpoints' / 'checkpoint_best.pth.tar', {}
    for kind in ('averaged', 'raw') if trained['ema_decay'] else ('raw',):
        weights[kind] = save_dir / f'weights_{kind}.pth.tar'
        if not weights[kind].is_file() or weights[kind].stat().st_mtime < best.stat().st_mtime:
            raw = ['--raw'] if kind == 'raw' and trained['ema_decay'] else []
            export_pretrained.main(['--run', str(save_dir), '--data-dir', str(data_dir), '--out', str(weights[kind]),
                                    '--licence', LICENCE[dataset], *raw])

    # 5. tests, the first round of which is done whatever the time
    sets, images, left_out = [name for name in SETS[dataset] if (data_dir / 'images' / name).is_dir()], {}, []
    rounds = [(kind, tta) for tta in ('none', 'full') for kind in weights]
    for kind, tta, name in ((*pair, name) for pair in rounds for name in sets):
        results = save_dir / 'results' / f'{kind}_tta_{tta}'
        try:
            if args.minutes and (kind, tta) != rounds[0]:
                end_after(seconds_left())
            test.main(['--dataset', dataset, '--model-path', str(weights[kind]), '--tta', tta, '--save-dir',
                       str(results), '--img-dir', str(data_dir / 'images' / name), '--label-dir',
                       str(data_dir / 'labels_instance' / SETS[dataset][name]), '--amp', str(trained['amp']),
                       '--save-flag', 'False', '--gpu', gpu])
            if args.minutes:
                signal.setitimer(signal.ITIMER_REAL, 0)
            images[kind, tta, name] = json.loads((results / f'{name}_metrics.json').read_text())['images']
        except TimeIsUp:
            left_out.append(f'{kind} weights, --tta {tta}, {name}')

    # 6. report
    device = choose_device(asked['gpu'])
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{device} ({os.cpu_count()} CPU cores)'
    text = f'{dataset}: {run["epoch"]} of {trained["num_epochs"]} epochs, {run["step"]} steps, {run["minutes"]:.1f} ' \
           f'minutes of training;\n{(time.monotonic() - started) / 60:.1f} minutes since this start, on {where}, ' \
           f'commit {git_commit(ROOT)}\nWeights: {", ".join(map(str, weights.values()))}\n\n'
    text += f'{table(dataset, rounds, sets, images)}\n{NOTE}'
    if left_out:
        text += f'\nLeft out, as the {args.minutes:g} minutes were over (start again for them): {"; ".join(left_out)}\n'
    write_text(save_dir / 'reproduce.md', text)
    print(f'\n{text}\nThis report: {save_dir / "reproduce.md"}')


def end_after(seconds):
    """Raise TimeIsUp in the midst of what is done then, or at once."""
    def end(*_):
        raise TimeIsUp
    if seconds <= 0:
        end()
    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def table(dataset, rounds, sets, images):
    """Markdown: a row of means for each round and set that was tested, and the paper's.

    rounds: (weights, tta) pairs. images: {(weights, tta, set): {image: {metric: value or None}}}.
    """
    columns = {name: f'published_{name}' for name in test.METRICS[dataset]}
    columns['dice'] = 'dice'
    rows = [('weights', 'TTA', 'measured on', *columns), ['---'] * (3 + len(columns))]
    together = [[name] for name in sets] + [['test_same', 'test_diff']] * ({'test_same', 'test_diff'} <= set(sets))
    for kind, tta in rounds:
        for names in together:
            if all((kind, tta, name) in images for name in names):
                scores = [row for name in names for row in images[kind, tta, name].values()]
                values = {name: [row[key] for row in scores if row[key] is not None] for name, key in columns.items()}
                part = 'validation' if names[0].startswith('val') else 'test'
                rows.append((kind, tta, f'{part}: {" + ".join(names)}, {len(scores)} images', *(
                    f'{np.mean(found):.{2 if name == "Hausdorff" else 4}f}' if found else '-'
                    for name, found in values.items())))
    rows += [(who, '-', where, *(f'{scores.get(name, "-")}' for name in columns))
             for who, where, scores in PAPER[dataset]]
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


if __name__ == '__main__':
    run_script(main)
