"""The run folder: what a training writes, and how it is resumed."""
import contextlib
import json
import logging
import math
import operator
import platform
import shutil
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import PIL
import scipy
import skimage
import torch
from torch.utils.tensorboard import SummaryWriter

from support.checkpoints import WeightAverage, load_checkpoint, load_weights, save_checkpoint
from support.files import FolderLock, atomic_path, run_of, save_image, sha256_of, write_text
from support.pictures import as_picture, class_colours, tile
from support.script import InputError

COLUMNS = ('epoch', 'train_loss', 'train_loss_CE', 'train_loss_var', 'train_acc', 'train_iou',
           'val_loss', 'val_acc', 'val_iou')
# What may differ when a run is resumed; anything else would make it two runs in one.
CHANGEABLE = {'data_dir', 'save_dir', 'num_epochs', 'log_interval', 'workers', 'gpu', 'checkpoint_freq', 'checkpoint',
              'checkpoint_minutes', 'overwrite', 'memory_efficient', 'val_every', 'amp', 'compile', 'preview'}
RETIRED = {'grid_every'}    # options of earlier versions that changed only what a run writes: a resume ignores them
OUR_STATE = {'batch', 'step', 'total_steps', 'steps_planned', 'history', 'meter', 'minutes'}  # of a checkpoint of ours
WARM_UP, TIMED = 10, 20     # steps: on CUDA compiling and the search for the fastest convolutions; then those measured
CURVE_MINUTES = 3         # between two drawings of learning_curve.png
GRID_EPOCHS = 5           # between two pictures val_grid.png
RUN_FILES = ('checkpoints', 'tb_logs', 'train.log', 'train_options.txt', 'train_options.json', 'run_info.json',
             'epoch_results.txt', 'learning_curve.png', 'val_grid.png')

log = logging.getLogger('train')


class TrainingState:
    """Everything that changes while training.

    epoch: epochs completed. batch: steps done in the current epoch. step: steps in all. steps_planned: those that
    max_minutes allows, 0 until the speed is known. sums: of the results of the images of the current epoch; count: how
    many these are. history: rows of epoch_results.txt. There is no random state: shuffling, transforms and dropout are
    functions of the seed and of these numbers.
    """

    def __init__(self, model, optimizer, train, steps_per_epoch, scaler):
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.average = WeightAverage(model, train['ema_decay']) if train['ema_decay'] else None
        self.steps_per_epoch = steps_per_epoch
        self.epoch, self.batch = train['start_epoch'], 0
        self.step = self.epoch * steps_per_epoch
        self.total_steps = train['num_epochs'] * steps_per_epoch
        self.steps_planned, self.step_seconds = 0, []
        self.sums, self.count = np.zeros(5), 0
        self.best_iou = -1.0                     # below any IoU: the first validation is the best so far
        self.history = []
        self.seconds_before, self.started = 0.0, time.monotonic()

    def minutes(self):
        """Minutes of this run, over all resumes."""
        return (self.seconds_before + time.monotonic() - self.started) / 60

    def finish_step(self, values, n_images):
        """Count a step, whose results are [loss, CE, variance term, accuracy, IoU]."""
        self.step += 1
        self.batch += 1
        self.sums, self.count = self.sums + np.array(values) * n_images, self.count + n_images
        if self.average:
            self.average.update()

    def means(self):
        """Of the results so far in this epoch: (5,) loss, CE, variance term, accuracy, IoU."""
        return (self.sums / max(self.count, 1)).tolist()

    def finish_epoch(self, val):
        """Count an epoch, whose validation results are [loss, accuracy, IoU]; returns its row of results."""
        self.epoch += 1
        row = [self.epoch, *self.means(), *val]
        self.history.append(row)
        self.best_iou = max(self.best_iou, val[2]) if not math.isnan(val[2]) else self.best_iou
        self.batch, self.sums, self.count = 0, np.zeros(5), 0
        return row

    def plan_steps(self, seconds, max_minutes, processes):
        """Count the seconds of a step; fix the number of steps when the speed is known, once, so that a schedule ends.

        That is the mean of the 20 steps after the first 10. Where these 30 take more than a quarter of max_minutes, it
        is the mean of those so far, without half of them or the first 10.
        """
        self.step_seconds.append(seconds)
        known = len(self.step_seconds) == WARM_UP + TIMED or self.minutes() > max_minutes / 4
        if not processes.from_first(known):
            return
        timed = self.step_seconds[min(WARM_UP, len(self.step_seconds) // 2):]
        speed = sum(timed) / len(timed)
        steps = max(0, round((max_minutes - self.minutes()) * 60 / speed))
        self.steps_planned = self.step + int(processes.from_first(steps))
        self.total_steps = min(self.total_steps, self.steps_planned)
        log.info(f'{speed:.3f} s per step: {self.steps_planned} steps in {max_minutes:g} minutes; training ends after '
                 f'{self.total_steps}')

    def validation_model(self):
        """The network that is validated and tested: that of the averaged weights, if they are averaged."""
        return self.average.model if self.average else self.model

    def as_checkpoint(self):
        """The published entries (epoch, state_dict, best_iou, optimizer), and what an exact resume needs besides."""
        checkpoint = {
            'epoch': self.epoch, 'state_dict': self.validation_model().state_dict(), 'best_iou': self.best_iou,
            'optimizer': self.optimizer.state_dict(), 'batch': self.batch, 'step': self.step,
            'total_steps': self.total_steps, 'steps_planned': self.steps_planned, 'history': self.history,
            'meter': (self.sums.tolist(), [self.count] * 5), 'minutes': self.minutes(),
            'loss_scale': self.scaler.state_dict(),
        }
        if self.average:
            checkpoint['raw_state_dict'] = self.model.state_dict()     # the weights that the optimizer moves
        return checkpoint

    def load(self, checkpoint, opt):
        """Go on from a checkpoint, ours or a published one. Raises InputError if it cannot be resumed."""
        path = opt.train['checkpoint']
        load_weights(self.validation_model(), checkpoint['state_dict'], opt.model, path)
        if self.average and 'raw_state_dict' not in checkpoint:
            raise InputError(f'{path} holds no averaged weights, so that it cannot be resumed with --ema-decay; '
                             f'leave it out, or start a new run from its weights with --init-from')
        if self.average:
            load_weights(self.model, checkpoint['raw_state_dict'], opt.model, path)
        try:
            self.optimizer.load_state_dict(checkpoint['optimizer'])
            for group in self.optimizer.param_groups:                  # a published checkpoint may have another
                group['weight_decay'] = opt.train['weight_decay']
            self.epoch, self.best_iou = operator.index(checkpoint['epoch']), float(checkpoint['best_iou'])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f'{path} holds no epoch, best_iou or optimizer state that fits the network ({error}); '
                             f'start a new run from its weights with --init-from') from error
        self.step = self.epoch * self.steps_per_epoch
        if not OUR_STATE <= checkpoint.keys():                         # published: its results are in a file only
            run = run_of(path)
            if run:
                self.history = read_results(Path(run, 'epoch_results.txt'), self.epoch)
            return
        self.batch, self.step, self.history = checkpoint['batch'], checkpoint['step'], checkpoint['history']
        self.steps_planned = int(checkpoint['steps_planned'])
        if checkpoint['steps_planned'] is True:                        # as earlier versions had it
            self.steps_planned = checkpoint['total_steps']
        if self.steps_planned:
            self.total_steps = min(self.total_steps, self.steps_planned)
        self.sums, self.count = np.array(checkpoint['meter'][0]), checkpoint['meter'][1][0]
        self.seconds_before = checkpoint['minutes'] * 60
        if self.scaler.is_enabled() and checkpoint.get('loss_scale'):  # none: a run without amp so far
            self.scaler.load_state_dict(checkpoint['loss_scale'])


def take_options_of_run(opt, checkpoint):
    """Resuming: options come from the checkpoint, but those that may change and were given on the command line.

    Raises InputError that names an option which was given another value and cannot change, and for weights alone.
    """
    path = Path(opt.train['checkpoint'])
    if not checkpoint.get('optimizer'):
        raise InputError(f'{path} holds no optimizer state, so that it cannot be resumed; '
                         f'start a new run from its weights with --init-from')
    stored = checkpoint.get('options')
    if not stored:                                                     # published: options.py decides
        if opt.train['init_from']:
            raise InputError('--init-from and --checkpoint-path both give weights to start from; leave one out')
        return
    if ('', 'dataset') in opt.given and opt.dataset != stored['dataset']:
        refuse_change('dataset', opt.dataset, stored['dataset'], path)
    opt.dataset = stored['dataset']
    changeable = CHANGEABLE if stored['train']['lr_schedule'] == 'none' else CHANGEABLE - {'num_epochs'}
    groups = [('model', opt.model), ('train', opt.train), *((f'transform.{k}', v) for k, v in opt.transform.items())]
    for group, values in groups:
        split = group.partition('.')[2]
        before = stored['transform'][split] if split else stored[group]
        before = {name: value for name, value in before.items() if name not in RETIRED}
        for name in [*before, *(name for name in values if name not in before)]:
            given = (group, name) in opt.given
            if given and name not in changeable and values.get(name) != before.get(name):
                refuse_change(name, values.get(name), before.get(name), path)
            if not given and name in before and name not in ('save_dir', 'checkpoint', 'overwrite', 'gpu'):
                values[name] = before[name]
        if split:
            opt.transform[split] = before


def read_results(path, epoch):
    """Rows of an epoch_results.txt up to `epoch`, [] if there is no such file. Raises InputError for any other file."""
    if not path.is_file():
        return []
    try:
        rows = [line.split('\t') for line in path.read_text(encoding='utf-8').splitlines()[1:]]
        rows = [[int(first), *map(float, rest)] for first, *rest in rows]
    except ValueError:
        rows = [[]]
    if any(len(row) != len(COLUMNS) for row in rows):
        raise InputError(f'{path} is not a table of {len(COLUMNS)} columns of numbers, one row for each epoch; move it '
                         f'to another folder')
    return [row for row in rows if row[0] <= epoch]


def is_free(folder):
    """Whether a folder is not there, or holds nothing but a lock."""
    return not folder.exists() or (folder.is_dir() and all(path.name == '.lock' for path in folder.iterdir()))


def refuse_change(name, value, before, path):
    raise InputError(f'--{name.replace("_", "-")} is {value}, but the run of {path} has {before}, and it cannot '
                     f'change when a run is resumed; leave it out, or start a new run')


class Run:
    """The run folder and what is written there; a context manager, whose end unlocks the folder.

    Raises InputError if the folder holds another run, or another process writes there.
    """

    def __init__(self, state, opt, mean_std):
        self.state, self.opt, self.mean_std = state, opt, mean_std
        self.lock = FolderLock(opt.train['save_dir'])
        folder = Path(opt.train['save_dir'])
        run = run_of(opt.train['checkpoint'])
        resumes = run and Path(run).resolve() == folder.resolve()
        if not resumes and not is_free(folder):
            if not opt.train['overwrite']:
                self.lock.release()
                raise InputError(f'{folder} is not empty; resume the run in it with --checkpoint-path '
                                 f'{folder}/checkpoints/checkpoint.pth.tar, choose another --save-dir, or replace the '
                                 f'run with --overwrite True')
            for name in RUN_FILES:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        latest = folder / 'checkpoints' / 'checkpoint.pth.tar'
        allowed = opt.train['overwrite'] and ('train', 'overwrite') in opt.given           # now, not when it began
        done = epochs_of(latest) if resumes and not allowed else 0
        if done > state.epoch:
            self.lock.release()
            raise InputError(f'{opt.train["checkpoint"]} has {state.epoch} epochs, and the run in {folder} went on to '
                             f'{done}, which would be overwritten; resume from {latest}, choose another --save-dir, or '
                             f'give --overwrite True')
        self.folder, self.checkpoints = folder, folder / 'checkpoints'
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.opt.save(folder)
        log.handlers.clear()
        log.setLevel(logging.INFO)
        log.propagate = False
        log.addHandler(logging.StreamHandler())
        log.addHandler(LogFile(folder / 'train.log', encoding='utf-8'))
        self.write_results()
        self.writer = SummaryWriter(folder / 'tb_logs', purge_step=self.state.epoch + 1)
        self.last_saved, self.last_grid, self.last_drawn = time.monotonic(), state.epoch, -math.inf

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.lock.release()

    def check_folder(self):
        """Raise InputError if the run folder was moved, emptied or deleted: what is saved now would lie apart."""
        if not (self.lock.is_in_place() and self.checkpoints.is_dir()):
            raise InputError(f'the run folder {self.folder} was moved, emptied or deleted while the training ran; '
                             f'resume from its checkpoint with --checkpoint-path, where it is now')

    def save_info(self, *datasets):
        """run_info.json: versions, git commit, seed, and every training and validation file with its SHA-256."""
        packages = {'torch': torch, 'numpy': np, 'scipy': scipy, 'scikit-image': skimage, 'opencv': cv2, 'Pillow': PIL}
        packages = {name: module.__version__ for name, module in packages.items()}
        files = {str(path): sha256_of(path)
                 for dataset in datasets for item in dataset.items for path in item}
        info = {'python': platform.python_version(), 'packages': packages,
                'commit': git_commit(Path(__file__).parents[1]), 'seed': self.opt.train['seed'], 'files': files}
        write_text(self.folder / 'run_info.json', json.dumps(info, indent=1) + '\n')

    def log_epoch(self, row):
        """One line of the log, TensorBoard, epoch_results.txt and learning_curve.png."""
        self.check_folder()
        text = 'epoch %d  train: loss %.4f  CE %.4f  var %.4f  acc %.4f  IoU %.4f' % tuple(row[:6])
        if not math.isnan(row[6]):
            text += '  val: loss %.4f  acc %.4f  IoU %.4f' % tuple(row[6:])
        log.info(f'{text}  ({self.state.minutes():.1f} min)')
        for name, value in zip(COLUMNS[1:], row[1:]):
            if not math.isnan(value):
                self.writer.add_scalar(name.replace('_', '/', 1), value, row[0])
        self.writer.flush()
        self.write_results()
        if time.monotonic() - self.last_drawn >= CURVE_MINUTES * 60:                 # drawing takes half a second
            self.draw_learning_curve()

    def write_results(self):
        """epoch_results.txt, whole: so that it agrees with the checkpoint after any interruption."""
        lines = ['\t'.join(COLUMNS)]
        lines += ['\t'.join([str(row[0]), *(f'{value:.4f}' for value in row[1:])]) for row in self.state.history]
        write_text(self.folder / 'epoch_results.txt', '\n'.join(lines) + '\n')

    def draw_learning_curve(self):
        """learning_curve.png: loss and IoU of training and validation over the epochs."""
        from matplotlib.figure import Figure
        table = dict(zip(COLUMNS, np.array(self.state.history, dtype=float).T))
        figure = Figure(figsize=(10, 4), layout='constrained')
        for axes, quantity in zip(figure.subplots(1, 2), ('loss', 'iou')):
            for split in ('train', 'val'):
                values = table[f'{split}_{quantity}']
                known = ~np.isnan(values)
                axes.plot(table['epoch'][known], values[known], label=split, marker='.' if known.sum() < 40 else None)
            axes.set_xlabel('epoch')
            axes.set_title({'loss': 'loss', 'iou': 'IoU of class 1'}[quantity])
            axes.grid(alpha=0.3)
            axes.legend()
        with atomic_path(self.folder / 'learning_curve.png') as temporary:
            figure.savefig(temporary, dpi=100)
        self.last_drawn = time.monotonic()

    def is_grid_due(self):
        return self.state.epoch // GRID_EPOCHS > self.last_grid // GRID_EPOCHS

    def save_grid(self, pictures):
        """val_grid.png, also for TensorBoard: image, target, probabilities (red, green, blue), prediction in a row."""
        mean_std = self.mean_std if self.opt.transform['val'].get('normalize') else None
        grid = tile([[as_picture(image, mean_std), class_colours(target),
                      (probabilities[[1, 2, 0]] * 255).round().byte().permute(1, 2, 0).numpy(),
                      class_colours(probabilities.argmax(0))] for image, target, probabilities in pictures])
        save_image(self.folder / 'val_grid.png', grid)
        self.writer.add_image('validation', grid, self.state.epoch, dataformats='HWC')
        self.last_grid = self.state.epoch

    @property
    def latest(self):
        return self.checkpoints / 'checkpoint.pth.tar'

    def save_latest(self, *copies):
        """The latest checkpoint, and before it `copies`, file names: a resume repeats an epoch that lacks one."""
        self.check_folder()
        checkpoint = self.state.as_checkpoint()
        checkpoint |= {'options': self.opt.as_dict(), 'mean_std': self.mean_std.tolist()}
        if not torch.stack([value.isfinite().all() for value in checkpoint['state_dict'].values()]).all():
            raise InputError(f'the weights are no longer finite after {self.state.epoch} epochs and {self.state.batch} '
                             f'steps; {self.last_good()}; try a lower --lr, or --clip-grad 1')
        try:
            first, *others = [self.checkpoints / name for name in copies] + [self.latest]
            save_checkpoint(first, checkpoint)
            for path in others:
                with atomic_path(path) as temporary:
                    shutil.copyfile(first, temporary)
        except OSError as error:
            self.check_folder()
            raise InputError(f'cannot save {self.latest}: {error.strerror}; {self.last_good()}; make room, then go on '
                             f'with: python train.py --checkpoint-path {self.latest}') from error
        self.last_saved = time.monotonic()

    def save_if_due(self):
        """Save the latest checkpoint every `checkpoint_minutes`, so that a crash in mid-epoch loses only minutes."""
        if time.monotonic() - self.last_saved >= self.opt.train['checkpoint_minutes'] * 60:
            self.save_latest()

    def save_epoch(self, is_best):
        """The latest checkpoint, and copies of it: every `checkpoint_freq` epochs, and the best."""
        kept = self.state.epoch % self.opt.train['checkpoint_freq'] == 0
        self.save_latest(*[f'checkpoint_{self.state.epoch}.pth.tar'] * kept, *['checkpoint_best.pth.tar'] * is_best)

    def last_good(self):
        return f'the last good checkpoint is {self.latest}' if self.latest.is_file() else 'nothing was saved before'

    def how_to_go_on(self):
        saved = self.latest.is_file()
        return self.last_good() + f'; go on with: train.py --checkpoint-path {self.latest}' * saved

    def save_and_say_how_to_go_on(self):
        self.save_latest()
        log.info(f'stopped; go on with: python train.py --checkpoint-path {self.latest}')


class LogFile(logging.FileHandler):
    """A log on a full disk is an error like others, not a traceback for each line."""

    def handleError(self, record):
        raise


def epochs_of(path):
    """How many epochs a run had done when it saved this checkpoint; 0 if there is none that can be read."""
    try:
        return int(load_checkpoint(path)['epoch'])
    except (InputError, KeyError, TypeError, ValueError):
        return 0


def git_commit(folder):
    """The commit of the code in `folder`; None without git, or where that is not the top of a repository."""
    try:
        git = subprocess.run(['git', 'rev-parse', '--show-toplevel', 'HEAD'], cwd=folder, capture_output=True,
                             text=True)
    except OSError:
        return None
    top, _, commit = git.stdout.strip().partition('\n')
    return commit if git.returncode == 0 and Path(top).resolve() == folder.resolve() else None


class Onlooker(contextlib.nullcontext):
    """Stands for the Run in all processes but one: whatever they would write, they do not."""

    def __getattr__(self, name):
        getattr(Run, name)                                             # AttributeError for a name that it does not have
        return lambda *_: None

    def last_good(self):
        return 'process 0 names the last good checkpoint'

    how_to_go_on = last_good


