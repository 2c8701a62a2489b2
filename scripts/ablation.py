"""The paper's ablation on a prepared MultiOrgan folder: what full resolution, varCE and weight maps each bring.

    python scripts/ablation.py --data-dir data/MultiOrgan --out experiments/ablation [--minutes 30] [--seeds 1 2]
        [--jobs 2] [any option of train.py, such as --growth-rate 8]

Every arm is trained with every seed under two budgets. Equal steps: as many as the FullNet arms make in `--minutes`.
Equal minutes: FCN_pooling, which is faster, makes as many steps more as its speed allows. The speed of each network is
measured once, over 31 steps, while nothing else trains. budgets.json keeps the numbers of epochs that follow from it,
and a later start reads them. The table has the minutes that each arm then took. Scores are those of the whole
validation images (val_full) without test-time augmentation. A run that is finished is not run again.
"""
import json
import math
import os
import shlex
import subprocess
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from options import Options
from support.checkpoints import load_checkpoint
from support.files import atomic_path, write_text
from support.images import list_images
from support.script import InputError, Parser, run_script

ROOT = Path(__file__).resolve().parents[1]
ARMS = {                                        # name in the table: options of train.py
    'FCN_pooling': ['--name', 'FCN_pooling', '--alpha', '0'],
    'FullNet': ['--alpha', '0'],
    'FullNet + varCE': [],
    'FullNet + varCE, no weight map': ['--use-weight-map', 'False'],
}
RECIPE = ['--n-layers', '4', '--growth-rate', '8', '--batch-size', '4', '--lr', '0.003', '--lr-schedule', 'onecycle',
          '--workers', '1']
SCORES = {'AJI': 'published_AJI', 'Dice': 'published_Dice', 'F1': 'published_F1', 'aji': 'aji', 'pq': 'pq'}
BUDGETS = ('equal steps', 'equal minutes')
# options of train.py that the arms and their budgets decide
OURS = ('--name', '--alpha', '--use-weight-map', '--seed', '--epochs', '--num-epochs', '--val-every', '--max-minutes',
        '--save-dir', '--overwrite', '--checkpoint-path', '--checkpoint', '--dataset')
running = []                                    # processes of train.py and test.py
start_or_stop = threading.Lock()                # no process starts while those that run are stopped, nor after it
stopping = threading.Event()


class Job(NamedTuple):
    """One training: an arm, a seed, and the epochs that its budgets give it."""
    arm: str
    seed: int
    epochs: int

    @property
    def folder(self):
        name = ''.join(c if c.isalnum() else '_' for c in self.arm)
        return f'{name}_seed{self.seed}_epochs{self.epochs}'


def main(argv=None):
    parser = Parser(prog='scripts/ablation.py', description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--data-dir', type=Path, required=True, help='prepared data, with images/val_full')
    parser.add_argument('--out', type=Path, default=Path('experiments/ablation'), help='where runs and table go')
    parser.add_argument('--minutes', type=float, default=30, help='training time of each FullNet arm')
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS))
    parser.add_argument('--jobs', type=int, default=1, help='trainings at a time, which share the cores')
    args, rest = parser.parse_known_args(argv)
    if not args.minutes > 0 or args.jobs < 1:
        raise InputError(f'--minutes is {args.minutes:g} and --jobs {args.jobs}; expected more than 0 and at least 1')
    list_images(args.data_dir / 'images' / 'val_full')
    words = [*RECIPE, '--data-dir', str(args.data_dir), *rest]
    ours = [word for word in rest if word.split('=')[0] in OURS]
    if ours:
        raise InputError(f'{ours[0]} is set by this script, for each arm; leave it out')
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    n_images, pool = len(list_images(args.data_dir / 'images' / 'train')), ThreadPoolExecutor(args.jobs)
    try:
        epochs = budgets(args.out, args.minutes, words, threads, n_images)
        jobs = [Job(arm, seed, n) for seed in args.seeds for arm in args.arms
                for n in sorted(set(epochs_of(arm, epochs)))]
        print(f'{len(jobs)} trainings, {args.jobs} at a time with {threads} threads each; results in {args.out}')
        futures = [pool.submit(finished, job, args.out, words, args.data_dir, threads) for job in jobs]
        if wait(futures, return_when=FIRST_EXCEPTION).not_done:
            pool.shutdown(wait=False, cancel_futures=True)
            print('a training failed; those that run end first', file=sys.stderr)
            wait(futures)
    except (KeyboardInterrupt, SystemExit):                                  # Ctrl-C, SIGTERM
        pool.shutdown(wait=False, cancel_futures=True)
        print('the trainings that run save a checkpoint and end', file=sys.stderr)
        with start_or_stop:
            stopping.set()
            stopped = list(running)
        for process in stopped:
            process.terminate()
        for process in stopped:
            process.wait()
        raise
    scores = dict(zip(jobs, (future.result() for future in futures)))
    text = report(scores, args.arms, args.seeds, epochs)
    write_text(args.out / 'ablation.md', text)
    write_text(args.out / 'ablation.json', json.dumps([job._asdict() | values for job, values in scores.items()],
                                                      indent=1) + '\n')
    draw(scores, args.arms, args.seeds, epochs, args.out / 'ablation.png')
    print(text, end='')


def epochs_of(arm, epochs):
    """(epochs for equal steps, epochs for equal minutes) of an arm."""
    return epochs['FullNet'], epochs['FCN_pooling' if arm == 'FCN_pooling' else 'FullNet']


# Budgets

def budgets(out, minutes, words, threads, n_images):
    """Epochs of FullNet and of FCN_pooling in `minutes`; measured once, then read from budgets.json."""
    path, asked = out / 'budgets.json', {'minutes': minutes, 'options': words, 'threads': threads}
    if path.is_file():
        stored = json.loads(path.read_text(encoding='utf-8'))
        if stored['asked'] != asked:
            raise InputError(f'{path} is of another ablation ({stored["asked"]}); give another --out, or the same '
                             f'options')
        return stored['epochs']
    steps_per_epoch = -(-n_images // Options(isTrain=True).parse(words).train['batch_size'])
    epochs = {name: max(1, math.ceil(planned_steps(name, out, minutes, words, threads, steps_per_epoch)
                                     / steps_per_epoch)) for name in ('FullNet', 'FCN_pooling')}
    write_text(path, json.dumps({'asked': asked, 'epochs': epochs}, indent=1) + '\n')
    print(', '.join(f'{name}: {n} epochs of {steps_per_epoch} steps in {minutes:g} minutes'
                    for name, n in epochs.items()))
    return epochs


def planned_steps(arm, out, minutes, words, threads, steps_per_epoch):
    """How many steps train.py plans for `minutes` after it has timed its first 30 steps; it ends soon after them."""
    folder, epochs = out / f'speed_of_{arm}', -(-31 // steps_per_epoch)
    call(['train.py', *words, *ARMS[arm], '--epochs', epochs, '--val-every', epochs, '--max-minutes', minutes,
          '--save-dir', folder, '--overwrite', 'True'], threads, out / f'speed_of_{arm}.out')
    return load_checkpoint(folder / 'checkpoints' / 'checkpoint.pth.tar')['steps_planned']


# Runs

def finished(job, out, words, data_dir, threads):
    """Train and test a job unless that was done before: dict of its scores, steps and minutes."""
    folder = out / job.folder
    result = folder / 'ablation_scores.json'
    if result.is_file():
        return json.loads(result.read_text(encoding='utf-8'))
    latest = folder / 'run' / 'checkpoints' / 'checkpoint.pth.tar'
    if latest.is_file():
        call(['train.py', '--checkpoint-path', latest], threads, folder / 'train.out')
    else:
        call(['train.py', *words, *ARMS[job.arm], '--seed', job.seed, '--epochs', job.epochs, '--val-every', job.epochs,
              '--save-dir', folder / 'run', '--overwrite', 'True'], threads, folder / 'train.out')
    amp = ['--amp', 'True'] if Options(isTrain=True).parse(words).train['amp'] else []
    call(['test.py', '--model-path', latest, '--img-dir', data_dir / 'images' / 'val_full',
          '--label-dir', data_dir / 'labels_instance' / 'val_full', '--tta', 'none', '--save-flag', 'False', *amp,
          '--save-dir', folder / 'results'], threads, folder / 'test.out')
    checkpoint = load_checkpoint(latest)
    mean = json.loads((folder / 'results' / 'val_full_metrics.json').read_text(encoding='utf-8'))['mean']
    values = {'steps': checkpoint['step'], 'minutes': checkpoint['minutes'], 'val_iou': checkpoint['history'][-1][-1],
              **{name: mean[key] for name, key in SCORES.items()}}
    write_text(result, json.dumps(values, indent=1) + '\n')
    print(f'{job.folder}: ' + ', '.join(f'{name} {value:.4g}' for name, value in values.items()), flush=True)
    return values


def call(words, threads, log):
    """Run one of the scripts with a number of threads, its output in a file. Raises InputError if it fails."""
    words = [sys.executable, str(ROOT / words[0]), *map(str, words[1:])]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a', encoding='utf-8') as file:
        file.write(f'$ {shlex.join(words)}\n')
        file.flush()
        with start_or_stop:
            if stopping.is_set():
                raise InputError('stopped')
            # in a session of their own, so that Ctrl-C reaches them once: from `main`
            process = subprocess.Popen(words, env={**os.environ, 'OMP_NUM_THREADS': str(threads)}, stdout=file,
                                       stderr=subprocess.STDOUT, start_new_session=True)
            running.append(process)
        code = process.wait()
        running.remove(process)
    if code:
        raise InputError(f'{Path(words[1]).name} ended with exit code {code}; see {log}, then start this again')


# Table and picture

def of_arm(scores, arm, budget, seeds, epochs, name):
    """The score `name` of an arm under a budget, of every seed, (n seeds,)."""
    n = epochs_of(arm, epochs)[BUDGETS.index(budget)]
    return np.array([scores[Job(arm, seed, n)][name] for seed in seeds])


def report(scores, arms, seeds, epochs):
    """Markdown: a table for each budget, mean and standard deviation over the seeds, and the paired differences."""
    names = ['val_iou', *SCORES]
    lines = []
    for budget in BUDGETS:
        lines += [f'| {budget}; {len(seeds)} seeds | steps | minutes | ' + ' | '.join(names) + ' |',
                  '|---' * (len(names) + 3) + '|']
        for arm in arms:
            steps, minutes = (of_arm(scores, arm, budget, seeds, epochs, name).mean() for name in ('steps', 'minutes'))
            cells = [spread(of_arm(scores, arm, budget, seeds, epochs, name)) for name in names]
            lines.append(f'| {arm} | {steps:.0f} | {minutes:.0f} | ' + ' | '.join(cells) + ' |')
        lines.append('')
    for budget in BUDGETS:
        for first, second in zip(arms, arms[1:]):
            a, b = (of_arm(scores, arm, budget, seeds, epochs, 'AJI') for arm in (first, second))
            verdict = 'all seeds agree' if abs(np.sign(b - a).sum()) == len(seeds) else 'the seeds disagree'
            lines.append(f'{budget}, AJI: {second} minus {first}: {np.mean(b - a):+.4f} (by seed: '
                         + ' '.join(f'{d:+.4f}' for d in b - a) + f'); {verdict if len(seeds) > 1 else "one seed"}.  ')
    return '\n'.join(lines) + '\n'


def spread(values):
    return f'{values.mean():.3f} ± {values.std(ddof=1):.3f}' if len(values) > 1 else f'{values.mean():.3f}'


def draw(scores, arms, seeds, epochs, path):
    """Picture: AJI of every run (dots) and the mean of every arm (bars), for both budgets."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout='constrained')
    both = figure.subplots(1, 2, sharey=True)
    both[0].set_ylabel('AJI (published definition), validation')
    for axes, budget in zip(both, BUDGETS):
        for x, arm in enumerate(arms):
            values = of_arm(scores, arm, budget, seeds, epochs, 'AJI')
            axes.bar(x, values.mean(), width=0.6, alpha=0.4)
            axes.plot(np.full(len(values), x), values, 'ko', markersize=5)
        axes.set_xticks(range(len(arms)), [arm.replace(' + ', '\n+ ').replace(', ', ',\n') for arm in arms], fontsize=8)
        axes.set_title(budget)
        axes.grid(axis='y', alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)


if __name__ == '__main__':
    run_script(main)
