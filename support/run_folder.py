"""The run folder: what training writes, and how a run is resumed."""
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
from support.files import FolderLock, atomic_path, hash_of, run_of, save_image, sha256_of, write_text
from support.images import composed, shorter_side
from support.pictures import as_picture, class_colours, tile
from support.script import InputError

COLUMNS = ('epoch', 'train_loss', 'train_loss_CE', 'train_loss_var', 'train_acc', 'train_iou',
           'val_loss', 'val_acc', 'val_iou')
# Options that may change when a run is resumed. Any other would make it a different method halfway.
CHANGEABLE = {'data_dir', 'save_dir', 'num_epochs', 'log_interval', 'workers', 'gpu', 'checkpoint_freq', 'checkpoint',
              'checkpoint_minutes', 'overwrite', 'memory_efficient', 'val_every', 'amp', 'compile', 'preview'}
RETIRED = {'grid_every'}  # options of earlier versions that changed only what a run writes: a resume ignores them
# entries that this code's checkpoints have and published ones lack
OUR_STATE = {'batch', 'step', 'total_steps', 'steps_planned', 'history', 'meter', 'minutes'}
WARM_UP, TIMED = 10, 20   # --max-minutes times 20 steps, after 10 in which CUDA compiles and chooses convolutions
SAVE_SECONDS = 20         # least time between two saves of the latest checkpoint at the ends of epochs
CURVE_MINUTES = 3         # least time between two drawings of learning_curve.png
GRID_EPOCHS = 5           # between two pictures val_grid.png
RUN_FILES = ('checkpoints', 'tb_logs', 'train.log', 'train_options.txt', 'train_options.json', 'run_info.json',
             'epoch_results.txt', 'learning_curve.png', 'val_grid.png')

log = logging.getLogger('train')


class TrainingState:
    """Everything that changes during training.

    epoch: epochs completed. batch: steps completed in the current epoch. step: steps completed in all. steps_planned:
    the number of steps that max_minutes allows, 0 until the speed is known. sums, count: results of the current epoch,
    summed over its images, and the number of images. history: rows of epoch_results.txt. No random state is needed:
    shuffling, transforms and dropout depend only on the seed and on these numbers.
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
        self.best_iou = -1.0                     # below any IoU, so that the first validation is the best so far
        self.history = []
        self.seconds_before, self.started = 0.0, time.monotonic()

    def minutes(self):
        """Minutes that this run took, including those before it was resumed."""
        return (self.seconds_before + time.monotonic() - self.started) / 60

    def is_done(self):
        """Whether the last step of the training was made."""
        return self.step >= self.total_steps

    def finish_step(self, values, n_images):
        """Count a step. values: means of [loss, CE, variance term, accuracy, IoU] over its n_images images."""
        self.step += 1
        self.batch += 1
        self.sums, self.count = self.sums + np.array(values) * n_images, self.count + n_images
        if self.average:
            self.average.update()

    def means(self):
        """Mean results of the current epoch so far: [loss, CE, variance term, accuracy, IoU]."""
        return (self.sums / max(self.count, 1)).tolist()

    def finish_epoch(self, val):
        """Count an epoch. val: its validation [loss, accuracy, IoU]. Returns its row of epoch_results.txt."""
        self.epoch += 1
        row = [self.epoch, *self.means(), *val]
        self.history.append(row)
        self.best_iou = max(self.best_iou, val[2])
        self.batch, self.sums, self.count = 0, np.zeros(5), 0
        return row

    def plan_steps(self, seconds, max_minutes, processes):
        """Count the seconds of one step. Once the speed is known, fix how many steps fit into max_minutes.

        The number is fixed once, so that the learning-rate schedule can reach its end. The time per step is the mean of
        20 steps, after 10 that are skipped. If a quarter of max_minutes has passed before that, it is the mean of the
        steps so far, without the first half of them or the first 10, whichever is fewer.
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
        """The network to validate and test: with --ema-decay the one of averaged weights, else the trained one."""
        return self.average.model if self.average else self.model

    def as_checkpoint(self):
        """The published entries (epoch, state_dict, best_iou, optimizer), and those that an exact resume needs."""
        checkpoint = {
            'epoch': self.epoch, 'state_dict': self.validation_model().state_dict(), 'best_iou': self.best_iou,
            'optimizer': self.optimizer.state_dict(), 'batch': self.batch, 'step': self.step,
            'total_steps': self.total_steps, 'steps_planned': self.steps_planned, 'history': self.history,
            'meter': (self.sums.tolist(), [self.count] * 5),           # one count for each sum, as in earlier versions
            'minutes': self.minutes(), 'loss_scale': self.scaler.state_dict(),
        }
        if self.average:
            checkpoint['raw_state_dict'] = self.model.state_dict()     # the weights before averaging
        return checkpoint

    def load(self, checkpoint, opt):
        """Resume from a checkpoint, ours or a published one. Raises InputError if it cannot be resumed."""
        path = opt.train['checkpoint']
        load_weights(self.validation_model(), checkpoint['state_dict'], opt.model, path)
        if self.average and 'raw_state_dict' not in checkpoint:
            raise InputError(f'{path} holds no averaged weights, so that it cannot be resumed with --ema-decay; '
                             f'leave it out, or start a new run from its weights with --init-from')
        if self.average:
            load_weights(self.model, checkpoint['raw_state_dict'], opt.model, path)
        try:
            self.optimizer.load_state_dict(checkpoint['optimizer'])
            for group in self.optimizer.param_groups:                  # the option decides, not a published checkpoint
                group['weight_decay'] = opt.train['weight_decay']
            self.epoch, self.best_iou = operator.index(checkpoint['epoch']), float(checkpoint['best_iou'])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f'{path} holds no epoch, best_iou or optimizer state that fits the network ({error}); '
                             f'start a new run from its weights with --init-from') from error
        self.step = self.epoch * self.steps_per_epoch
        if not OUR_STATE <= checkpoint.keys():                         # published: earlier results are in a file
            run = run_of(path)
            if run:
                self.history = read_results(Path(run, 'epoch_results.txt'), self.epoch)
            return
        self.batch, self.step, self.history = checkpoint['batch'], checkpoint['step'], checkpoint['history']
        self.steps_planned = int(checkpoint['steps_planned'])
        if checkpoint['steps_planned'] is True:                        # written by an earlier version
            self.steps_planned = checkpoint['total_steps']
        if self.steps_planned:
            before = checkpoint.get('options', {}).get('train', {}).get('num_epochs', 0)
            if opt.train['num_epochs'] > before and self.total_steps > self.steps_planned:
                raise InputError(f'the run of {path} ends after {self.steps_planned} steps, which its --max-minutes '
                                 f'gave: --epochs may be at most {self.steps_planned // self.steps_per_epoch}; or '
                                 f'start a new run from its weights with --init-from')
            self.total_steps = min(self.total_steps, self.steps_planned)
        self.sums, self.count = np.array(checkpoint['meter'][0]), checkpoint['meter'][1][0]
        self.seconds_before = checkpoint['minutes'] * 60
        if self.scaler.is_enabled() and checkpoint.get('loss_scale'):  # empty if the run had no --amp before
            self.scaler.load_state_dict(checkpoint['loss_scale'])


def take_options_of_run(opt, checkpoint):
    """Take the options of the resumed run from its checkpoint, except paths and those given on the command line.

    opt: Options, changed in place. Only the options in CHANGEABLE may be given with another value. Raises InputError
    that names any other option given with another value, and for a checkpoint without optimizer state.
    """
    path = Path(opt.train['checkpoint'])
    if not checkpoint.get('optimizer'):
        raise InputError(f'{path} holds no optimizer state, so that it cannot be resumed; '
                         f'start a new run from its weights with --init-from')
    stored = checkpoint.get('options')
    if not stored:                                     # a published checkpoint has none: options.py decides
        if opt.train['init_from']:
            raise InputError('--init-from and --checkpoint-path both give weights to start from; leave one out')
        return
    if ('', 'dataset') in opt.given and opt.dataset != stored['dataset']:
        refuse_change('dataset', opt.dataset, stored['dataset'], path)
    if opt.dataset != stored['dataset']:               # with the defaults of that data set
        opt.parse([*opt.argv, '--dataset', stored['dataset']])
    changeable = CHANGEABLE if stored['train']['lr_schedule'] == 'none' else CHANGEABLE - {'num_epochs'}
    kept = ('save_dir', 'checkpoint', 'overwrite', 'gpu')                # of this start, not of the run
    for group, values in (('model', opt.model), ('train', opt.train)):
        before = {name: value for name, value in stored[group].items() if name not in RETIRED}
        refuse_changes(opt, group, values, before, changeable)
        values.update({name: value for name, value in before.items()
                       if (group, name) not in opt.given and name not in kept})
    for split, values in opt.transform.items():
        refuse_changes(opt, f'transform.{split}', values, stored['transform'][split], changeable)
        opt.transform[split] = dict(stored['transform'][split])


def refuse_changes(opt, group, values, before, changeable):
    """Raise InputError if the command line gives an option of a group another value than the resumed run has."""
    for name in {**before, **values}:
        if (group, name) in opt.given and name not in changeable and values.get(name) != before.get(name):
            flag = f'{group}.{name}' if group.startswith('transform.') else name.replace('_', '-')
            refuse_change(flag, values.get(name), before.get(name), opt.train['checkpoint'])


def facts_of_data(train_set, val_set, mean_std, checkpoint, path):
    """What a checkpoint says about its data, a dict. train_set, val_set: DataFolder. mean_std: (2, 3).

    shorter_side: of the training images, in pixels, for the size of images in testing after the transform `scale`.
    image_names: a hash. Raises InputError if the checkpoint to resume, loaded from `path`, has another one.
    """
    names = hash_of([[composed(name) for name in data.names] for data in (train_set, val_set)])
    if checkpoint.get('image_names', names) != names:
        raise InputError(f'the run of {path} had other training or validation images; prepare them as they were, with '
                         f'the same split and patch size, or start a new run with --init-from')
    return {'mean_std': mean_std.tolist(), 'image_names': names,
            'shorter_side': shorter_side(path for path, *_ in train_set.items)}


def read_results(path, epoch):
    """Rows of an epoch_results.txt up to `epoch`; [] without a file. Raises InputError if it is not such a table."""
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
    """Whether the folder does not exist, or holds nothing but a lock."""
    return not folder.exists() or (folder.is_dir() and all(path.name == '.lock' for path in folder.iterdir()))


def refuse_change(flag, value, before, path):
    """Raise the InputError for an option that must keep its value when the run of the checkpoint `path` is resumed."""
    raise InputError(f'--{flag} is {value}, but the run of {path} has {before}, and it cannot '
                     f'change when a run is resumed; leave it out, or start a new run')


class Run:
    """The run folder, and everything that training writes there. A context manager that unlocks the folder at the end.

    data: of `facts_of_data`. Raises InputError if the folder holds another run, or if another process writes there.
    """

    def __init__(self, state, opt, data):
        self.state, self.opt, self.data = state, opt, data
        self.folder = Path(opt.train['save_dir'])
        self.checkpoints = self.folder / 'checkpoints'
        self.latest = self.checkpoints / 'checkpoint.pth.tar'
        run = run_of(opt.train['checkpoint'])
        resumes = run and Path(run).resolve() == self.folder.resolve()
        self.lock = FolderLock(self.folder)
        try:
            allowed = opt.train['overwrite'] and ('train', 'overwrite') in opt.given      # for this resume, not stored
            if not resumes:
                self.clear_folder()
            elif not allowed:
                self.refuse_to_go_back()
        except InputError:
            self.lock.release()
            raise
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if opt.train['checkpoint']:
            self.take_best_checkpoint(run, overwrites=resumes and allowed)
        self.opt.save(self.folder)
        log.handlers.clear()
        log.setLevel(logging.INFO)
        log.propagate = False
        log.addHandler(logging.StreamHandler())
        log.addHandler(LogFile(self.folder / 'train.log', encoding='utf-8'))
        self.write_results()
        self.writer = SummaryWriter(self.folder / 'tb_logs', purge_step=self.state.epoch + 1)
        self.last_saved, self.last_grid, self.last_drawn = time.monotonic(), state.epoch, -math.inf

    def clear_folder(self):
        """With --overwrite True, delete the earlier run in the folder. Raises InputError if that was not asked for."""
        train, folder = self.opt.train, self.folder
        if is_free(folder):
            return
        if not train['overwrite']:
            raise InputError(f'{folder} is not empty; resume the run in it with --checkpoint-path {self.latest}, '
                             f'choose another --save-dir, or replace the run with --overwrite True')
        start, old_files = train['checkpoint'] or train['init_from'], [folder / name for name in RUN_FILES]
        if start and any(Path(start).resolve().is_relative_to(path.resolve()) for path in old_files):
            raise InputError(f'--overwrite True would delete {start}, from which this run starts; give another '
                             f'--save-dir')
        for path in old_files:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def refuse_to_go_back(self):
        """Raise InputError if the run in the folder has more epochs than the checkpoint that it is resumed from."""
        done = epochs_of(self.latest)
        if done > self.state.epoch:
            raise InputError(f'{self.opt.train["checkpoint"]} has {self.state.epoch} epochs, and the run in '
                             f'{self.folder} went on to {done}, which would be overwritten; resume from {self.latest}, '
                             f'choose another --save-dir, or give --overwrite True')

    def take_best_checkpoint(self, run, overwrites):
        """Of a resumed run, take the best checkpoint so far along, from its folder `run`.

        overwrites: the run goes back to an earlier epoch; the checkpoints of later ones are removed.
        """
        best = self.checkpoints / 'checkpoint_best.pth.tar'
        source = Path(run, 'checkpoints', best.name)
        if run and not best.exists() and 0 < epochs_of(source) <= self.state.epoch:
            save_checkpoint(best, load_checkpoint(source))
        for path in [best, *self.checkpoints.glob('checkpoint_[0-9]*.pth.tar')] if overwrites else []:
            if epochs_of(path) > self.state.epoch:
                path.unlink()
        if not best.is_file():
            self.state.best_iou = -1.0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.lock.release()

    def check_folder(self):
        """Raise InputError if the run folder was moved, emptied or deleted; saving would make a second, partial one."""
        if not (self.lock.is_in_place() and self.checkpoints.is_dir()):
            raise InputError(f'the run folder {self.folder} was moved, emptied or deleted while the training ran; '
                             f'resume from its checkpoint with --checkpoint-path, where it is now')

    def save_info(self, *datasets):
        """Write run_info.json: versions, git commit, seed, and the SHA-256 of every training and validation file."""
        packages = {'torch': torch, 'numpy': np, 'scipy': scipy, 'scikit-image': skimage, 'opencv': cv2, 'Pillow': PIL}
        packages = {name: module.__version__ for name, module in packages.items()}
        files = {str(path): sha256_of(path)
                 for dataset in datasets for item in dataset.items for path in item}
        info = {'python': platform.python_version(), 'packages': packages,
                'commit': git_commit(Path(__file__).parents[1]), 'seed': self.opt.train['seed'], 'files': files}
        write_text(self.folder / 'run_info.json', json.dumps(info, indent=1) + '\n')

    def log_epoch(self, row):
        """Add an epoch to the log, TensorBoard and epoch_results.txt, and every few minutes to learning_curve.png."""
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
        """Write the whole epoch_results.txt, so that it agrees with the checkpoint after any interruption."""
        lines = ['\t'.join(COLUMNS)]
        lines += ['\t'.join([str(row[0]), *(f'{value:.4f}' for value in row[1:])]) for row in self.state.history]
        write_text(self.folder / 'epoch_results.txt', '\n'.join(lines) + '\n')

    def draw_learning_curve(self):
        """Draw learning_curve.png: loss and IoU of training and validation over the epochs."""
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
        """Whether GRID_EPOCHS epochs have passed since the last val_grid.png."""
        return self.state.epoch // GRID_EPOCHS > self.last_grid // GRID_EPOCHS

    def save_grid(self, pictures):
        """Write val_grid.png, also to TensorBoard. A row shows image, target, probabilities and predicted classes.

        pictures: of `validate`. Red is inside, green contour, blue background.
        """
        mean_std = self.data['mean_std'] if self.opt.transform['val'].get('normalize') else None
        grid = tile([[as_picture(image, mean_std), class_colours(target),
                      (probabilities[[1, 2, 0]] * 255).round().byte().permute(1, 2, 0).numpy(),
                      class_colours(probabilities.argmax(0))] for image, target, probabilities in pictures])
        save_image(self.folder / 'val_grid.png', grid)
        self.writer.add_image('validation', grid, self.state.epoch, dataformats='HWC')
        self.last_grid = self.state.epoch

    def save_latest(self, *copies):
        """Save the latest checkpoint, and under the file names `copies` too.

        The copies come first: if saving is interrupted, the older latest checkpoint repeats the epoch and its copies.
        """
        self.check_folder()
        checkpoint = self.state.as_checkpoint()
        checkpoint |= {'options': self.opt.as_dict(), **self.data}
        if not torch.stack([value.isfinite().all() for value in checkpoint['state_dict'].values()]).all():
            raise InputError(f'the weights are no longer finite after {self.state.epoch} epochs and {self.state.batch} '
                             f'steps; {self.last_good()}; try a lower --lr, or --clip-grad 1')
        try:
            for name in (*copies, self.latest.name):
                save_checkpoint(self.checkpoints / name, checkpoint)
        except OSError as error:
            self.check_folder()
            raise InputError(f'cannot save {self.latest}: {error.strerror}; {self.last_good()}; make room, then resume '
                             f'with: python train.py --checkpoint-path {self.latest}') from error
        self.last_saved = time.monotonic()

    def save_if_due(self):
        """Save the latest checkpoint every checkpoint_minutes, so that a crash within an epoch loses only minutes."""
        if time.monotonic() - self.last_saved >= self.opt.train['checkpoint_minutes'] * 60:
            self.save_latest()

    def save_epoch(self, is_best):
        """Save the latest checkpoint, and copies: every checkpoint_freq epochs one is kept, and one if it is the best.

        Without a copy it is saved at most every SAVE_SECONDS, because an epoch on a GPU may take less than a second.
        """
        copies = []
        if self.state.epoch % self.opt.train['checkpoint_freq'] == 0:
            copies.append(f'checkpoint_{self.state.epoch}.pth.tar')
        if is_best:
            copies.append('checkpoint_best.pth.tar')
        if copies or self.state.is_done() or time.monotonic() - self.last_saved >= SAVE_SECONDS:
            self.save_latest(*copies)

    def last_good(self):
        """Where the latest checkpoint is, for error messages."""
        return f'the last good checkpoint is {self.latest}' if self.latest.is_file() else 'nothing was saved before'

    def how_to_resume(self):
        """Where the latest checkpoint is, and the command that resumes from it, for error messages."""
        saved = self.latest.is_file()
        return self.last_good() + f'; resume with: python train.py --checkpoint-path {self.latest}' * saved

    def save_before_stop(self):
        """Save the latest checkpoint, and log how to resume from it."""
        self.save_latest()
        log.info(f'stopped; resume with: python train.py --checkpoint-path {self.latest}')


class LogFile(logging.FileHandler):
    """A log file that raises its errors, such as a full disk. logging itself would print a traceback for each line."""

    def handleError(self, record):
        raise


def epochs_of(path):
    """The number of epochs completed in this checkpoint; 0 if the file does not exist or cannot be read."""
    try:
        return int(load_checkpoint(path)['epoch'])
    except (InputError, KeyError, TypeError, ValueError):
        return 0


def git_commit(folder):
    """The git commit of the code in `folder`; None without git, or if the folder is not the top of a repository."""
    try:
        git = subprocess.run(['git', 'rev-parse', '--show-toplevel', 'HEAD'], cwd=folder, capture_output=True,
                             text=True)
    except OSError:
        return None
    top, _, commit = git.stdout.strip().partition('\n')
    return commit if git.returncode == 0 and Path(top).resolve() == folder.resolve() else None


class SilentRun(contextlib.nullcontext):
    """Takes the place of Run in every process but process 0. Its methods write nothing."""

    def __getattr__(self, name):
        getattr(Run, name)                                             # AttributeError for what Run does not have
        return lambda *_: None

    def last_good(self):
        return 'process 0 names the last good checkpoint'

    how_to_resume = last_good


