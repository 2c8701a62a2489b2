"""Train FullNet: `python train.py`, with the options of options.py or the command line."""
import contextlib
import itertools
import json
import logging
import math
import operator
import os
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
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dataset import DataFolder, EpochBatches, batch_items, load_mean_std_of_run, start_loader
from loss import VarCELoss
from my_transforms import get_transforms
from options import Options, run_of
from utils import (AverageMeter, FolderLock, InputError, MixedPrecision, Processes, StopRequest, WeightAverage,
                   atomic_path, build_model, load_checkpoint, load_weights, put_on, run_script, save_checkpoint,
                   save_image, sha256_of, split_forward, windows_at_once, write_text)

log = logging.getLogger('train')

POST_FIX = {'MultiOrgan': ['weight.png', 'label.png'], 'GlaS': ['anno_weight.png', 'anno.bmp']}
COLUMNS = ('epoch', 'train_loss', 'train_loss_CE', 'train_loss_var', 'train_acc', 'train_iou',
           'val_loss', 'val_acc', 'val_iou')
# What may differ when a run is resumed; anything else would make it two runs in one.
CHANGEABLE = {'data_dir', 'save_dir', 'num_epochs', 'log_interval', 'workers', 'gpu', 'checkpoint_freq', 'checkpoint',
              'checkpoint_minutes', 'overwrite', 'memory_efficient', 'val_every', 'amp', 'compile', 'grid_every',
              'preview'}
OUR_STATE = {'batch', 'step', 'total_steps', 'steps_planned', 'history', 'meter', 'minutes'}  # of a checkpoint of ours
WARM_UP, TIMED = 10, 20     # steps: on CUDA compiling and the search for the fastest convolutions; then those measured
GRID_IMAGES = 4
CURVE_MINUTES = 3         # between two drawings of learning_curve.png
RUN_FILES = ('checkpoints', 'tb_logs', 'train.log', 'train_options.txt', 'train_options.json', 'run_info.json',
             'epoch_results.txt', 'learning_curve.png', 'val_grid.png')


def main(argv=None):
    # 1. options, the checkpoint to go on from, the processes that torchrun started
    opt = Options(isTrain=True).parse(argv)
    train = opt.train
    checkpoint = load_checkpoint(train['checkpoint']) if train['checkpoint'] else None
    if checkpoint:
        take_options_of_run(opt, checkpoint)
    processes = Processes(train['gpu'])
    if train['batch_size'] < processes.count:
        raise InputError(f'--batch-size is {train["batch_size"]}, for {processes.count} processes; expected at least '
                         f'{processes.count}: it counts the crops of all processes together')

    # 2. data
    mean_std = load_mean_std_of_run(train['data_dir'], checkpoint or {}, train['checkpoint'])
    train_set, val_set = (load_data(opt, split, mean_std) for split in ('train', 'val'))
    if train['preview']:
        return save_preview(train_set, train, mean_std if opt.transform['train'].get('normalize') else None)
    batches = EpochBatches(len(train_set), train['batch_size'], train['seed'], processes.rank, processes.count)
    workers = loader_processes(train['workers'], processes)
    common = dict(collate_fn=batch_items, worker_init_fn=start_loader, generator=torch.Generator(),
                  pin_memory=processes.device.type == 'cuda')
    train_loader = DataLoader(train_set, batch_sampler=batches, num_workers=workers, **common)
    val_loader = DataLoader(val_set, sampler=share_of_images(len(val_set), processes), num_workers=min(1, workers),
                            persistent_workers=workers > 0, **common)

    # 3. network, loss, optimizer
    torch.manual_seed(train['seed'])
    model = build_model(opt.model)
    if train['init_from'] and not checkpoint:
        load_weights(model, load_checkpoint(train['init_from'])['state_dict'], opt.model, train['init_from'])
    model = put_on(processes.device, model.set_mode('auto', train['memory_efficient'], train['amp']))
    model = processes.synchronise_batch_norm(model)
    torch.backends.cudnn.benchmark = True                    # all crops have one size: find the fastest convolutions
    precision = MixedPrecision(processes.device, train['amp'])
    optimizer = torch.optim.Adam(model.parameters(), lr=train['lr'], betas=(0.9, 0.99),
                                 weight_decay=train['weight_decay'])
    criterion = VarCELoss(train['alpha'])
    state = TrainingState(model, optimizer, train, len(batches), precision.scaler)
    if checkpoint:
        state.load(checkpoint, opt)

    # 4. run folder and logs
    run = Run(state, opt, mean_std) if processes.rank == 0 else Onlooker()
    log.info(opt.describe())
    run.save_info(train_set, val_set)
    log.info(f'{len(train_set)} training and {len(val_set)} validation images; {opt.model["name"]} with '
             f'{sum(p.numel() for p in model.parameters()):,} parameters on {processes.device}'
             + f' in {processes.count} processes' * (processes.count > 1) + f'; run folder {opt.train["save_dir"]}')
    if checkpoint:
        log.info(f'resumed from {train["checkpoint"]}: {state.epoch} epochs and {state.batch} steps done')

    # 5. epochs
    with StopRequest(processes) as stop, run, processes.watched(run.how_to_go_on), memory_watched(run):
        network = processes.share(model)
        compiled = torch.compile(network, dynamic=False) if train['compile'] else network
        batches.start_at(state.epoch, state.batch)
        crops = iter(train_loader)                               # of all epochs
        while state.step < state.total_steps or state.batch > 0:
            train_epoch(state, network, compiled, crops, train_loader, criterion, train, processes, precision, run,
                        stop)
            validated = (state.epoch + 1) % train['val_every'] == 0 or state.step >= state.total_steps
            val, pictures = [math.nan] * 3, []
            if validated:
                val, pictures = validate(state.validation_model(), val_loader, criterion, train, processes, precision,
                                         run, stop)
            is_best = val[2] > state.best_iou
            row = state.finish_epoch(val)
            run.save_epoch(is_best)
            run.log_epoch(row)
            if pictures and run.is_grid_due():
                run.save_grid(pictures)
        run.draw_learning_curve()
    processes.end()
    log.info(f'done: {state.epoch} epochs in {state.minutes():.1f} minutes, best validation IoU {state.best_iou:.4f}; '
             f'weights in {opt.train["save_dir"]}/checkpoints')


# ---------------------------------------------------------------------------------------------------
# An epoch
# ---------------------------------------------------------------------------------------------------

def train_epoch(state, network, compiled, crops, loader, criterion, train, processes, precision, run, stop):
    """The training half of an epoch, from the step at which the state stands.

    network: the model as `processes` share it; compiled: the same, for batches of full size. crops: iterator over the
    batches of the loader, epoch after epoch.
    """
    network.train()
    batches = loader.batch_sampler
    progress = tqdm(itertools.islice(crops, len(batches) - state.batch), desc=f'epoch {state.epoch + 1}',
                    initial=state.batch, total=len(batches), disable=processes.quiet)
    started = time.monotonic()
    for batch in progress:
        if state.step >= state.total_steps:                      # the time budget ends within an epoch
            break
        # 1. a seed of its own for every step, so that dropout is the same after a resume
        torch.manual_seed(step_seed(train['seed'], state.step, processes.rank))
        n_own, n_all = batches.sizes(state.batch)                # images of this process, and of all
        image, weight, target, instances = to_device(batch, processes.device, train['use_weight_map'])

        # 2. forward and loss; for a short batch the network would be compiled anew
        with precision.autocast():
            logits = compiled(image) if n_all == train['batch_size'] else network(image)
        logits = logits.float()                                  # softmax, loss and variance in float32
        loss, loss_ce, loss_var = criterion(logits, target, weight, instances)
        results = torch.stack([loss, loss_ce, loss_var, *pixel_results(logits, target)]).detach()               # (5,)

        # 3. backward; the gradients become the mean over the processes, so weigh them by their images
        state.optimizer.zero_grad(set_to_none=True)
        precision.scaler.scale(loss * (n_own * processes.count / n_all)).backward()

        # 4. is the loss finite? This is where the CPU waits for a GPU, once in a step
        values = processes.sums([value * n_own for value in results.tolist()])
        values = [value / n_all for value in values]
        if not math.isfinite(values[0]):
            names = ', '.join(loader.dataset.names[key[0]] for key in batches.batch(state.epoch, state.batch))
            raise InputError(f'the loss is {values[0]} in epoch {state.epoch + 1}, step {state.batch + 1}, on '
                             f'{names}; {run.last_good()}; try a lower --lr, or --clip-grad 1')

        # 5. update
        if train['clip_grad']:
            precision.scaler.unscale_(state.optimizer)
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), train['clip_grad'])
        for group in state.optimizer.param_groups:
            group['lr'] = learning_rate(state.step, state.total_steps, train, len(batches))
        precision.scaler.step(state.optimizer)
        precision.scaler.update()

        # 6. results so far
        state.finish_step(values, n_all)
        progress.set_postfix(loss=f'{state.meter.avg[0]:.4f}', IoU=f'{state.meter.avg[4]:.4f}')
        if state.batch % train['log_interval'] == 0:
            log.info('  step %d/%d  loss %.4f  CE %.4f  var %.4f  acc %.4f  IoU %.4f',
                     state.batch, len(batches), *state.meter.avg)

        # 7. time budget, checkpoint, stop
        if train['max_minutes'] and not state.steps_planned:
            state.plan_steps(time.monotonic() - started, train['max_minutes'], processes)
        run.save_if_due()
        stop.check(run.save_and_say_how_to_go_on)
        started = time.monotonic()
    progress.close()


def loader_processes(workers, processes):
    """How many processes load data: `workers`, or with 'auto' what the CPUs suffice for.

    A GPU is fed by the CPUs that this process may use, less one, 16 at most, shared with the other processes on the
    machine. A CPU that trains itself gets one.
    """
    if workers != 'auto':
        return workers
    if processes.device.type == 'cpu':
        return 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, min(16, usable - 1) // int(os.environ.get('LOCAL_WORLD_SIZE') or 1))


@contextlib.contextmanager
def memory_watched(run):
    """Raises InputError that says what takes memory, where in the block that of a GPU does not suffice."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and 'CUDA error: out of memory' not in str(error):
            raise
        said = str(error).splitlines()[0][:100]
        raise InputError(f'not enough memory on the GPU ({said}); give --amp True, or begin a new run with a smaller '
                         f'--batch-size or --input-size; {run.last_good()}') from error


def share_of_images(n_images, processes):
    """Indices of the images that this process validates. All processes get as many: the last image may be repeated."""
    return [min(i, n_images - 1) for i in
            range(processes.rank, -(-n_images // processes.count) * processes.count, processes.count)]


def validate(model, loader, criterion, train, processes, precision, run, stop):
    """Mean over the validation images of [loss, pixel accuracy, IoU of class 1], with the sliding window.

    Returns it and the first images of this process: (image (3, H, W), target (H, W), probabilities (C, H, W)), on the
    CPU.
    """
    model.eval()
    processes.copy_from_first(model.buffers())                       # the running moments of batch norm
    results, pictures, n_images = [], [], len(loader.dataset)
    progress = tqdm(loader, desc='validation', disable=processes.quiet, leave=False)
    for i, batch in enumerate(progress):
        image, weight, target, instances = to_device(batch, processes.device, train['use_weight_map'])
        with torch.inference_mode():
            with precision.autocast():
                logits = split_forward(model, image, train['input_size'], train['val_overlap'],
                                       model.conv2.out_channels, windows_at_once(processes.device))
            logits = logits.float()
            loss = criterion(logits, target, weight, instances)[0]
            if processes.rank + i * processes.count < n_images:      # not a repetition
                results.append(torch.stack([loss, *pixel_results(logits, target)]))
        if len(pictures) < GRID_IMAGES:
            pictures.append((image[0].cpu(), target[0].cpu(), logits[0].softmax(0).cpu()))
        run.save_if_due()                                            # validation is done again after a resume
        stop.check(run.save_and_say_how_to_go_on)
    sums = torch.stack(results).double().sum(0).tolist() if results else [0.0] * 3
    return [value / n_images for value in processes.sums(sums)], pictures


def to_device(batch, device, use_weight_map):
    """image (B, 3, H, W) float, weight (B, H, W) float of 1 to 11, target (B, H, W) int64, instances (B, H, W) int32,
    on the device. batch: of `batch_items`."""
    image, weight, target, instances = (values.to(device, non_blocking=True) for values in batch)
    weight = weight.float() / 20                                     # weight maps are stored as 20 times the weight
    return image, weight if use_weight_map else torch.ones_like(weight), target.long(), instances


def pixel_results(logits, target):
    """Pixel accuracy and IoU of class 1, mean over the batch, (2,) on the device: `accuracy_pixel_level` of a GPU."""
    found, wanted = logits.detach().argmax(1) == 1, target == 1
    both, either = ((found & wanted).sum((1, 2)), (found | wanted).sum((1, 2)))
    return (found == wanted).float().mean(), (both / (either + 1e-10)).mean()


def step_seed(seed, step, rank=0):
    """A seed of 63 bits for each (seed, step, number of the process)."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate(step, total_steps, train, steps_per_epoch):
    """Learning rate of a step, counted from 0.

    none: constant, as published. cosine: to 0 at the end. Both after `warmup_epochs` of linear warm-up. onecycle: up
    from lr / 25 during 30 % of the steps, then down to lr / 10,000, both as half a cosine.
    """
    lr, done = train['lr'], step / total_steps
    if train['lr_schedule'] == 'onecycle':
        return half_cosine(lr / 25, lr, done / 0.3) if done < 0.3 else half_cosine(lr, lr / 1e4, (done - 0.3) / 0.7)
    warmup_steps = train['warmup_epochs'] * steps_per_epoch
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    return half_cosine(lr, 0, done) if train['lr_schedule'] == 'cosine' else lr


def half_cosine(start, end, t):
    """From `start` at t = 0 to `end` at t = 1."""
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


# ---------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------

def load_data(opt, split, mean_std):
    """The DataFolder of 'train' or 'val' in data_dir."""
    data_dir, transform = Path(opt.train['data_dir']), dict(opt.transform[split])
    if transform.get('normalize'):
        transform['normalize'] = mean_std
    else:
        transform.pop('normalize', None)
    folders = [data_dir / part / split for part in ('images', 'weight_maps', 'labels')]
    return DataFolder(folders, POST_FIX[opt.dataset], [3, 1, 3], get_transforms(transform))


def save_preview(dataset, train, mean_std, n=8):
    """`{save_dir}_preview.png`: augmented training samples of the first epoch; image, label and weight map each."""
    rng = np.random.default_rng(train['seed'])
    rows = []
    for index in rng.permutation(len(dataset))[:n]:
        image, weight, label = dataset[int(index), train['seed'], 0]
        grey = weight[0].clamp(0, 255).byte().numpy()
        rows.append([as_picture(image, mean_std), class_colours(label[0]), np.repeat(grey[..., None], 3, axis=2)])
    path = Path(train['save_dir'])
    path = path.with_name(f'{path.name}_preview.png')
    save_image(path, tile(rows))
    print(f'{len(rows)} samples in {path}: image, label (inside red, contour green), weight map')


def as_picture(image, mean_std):
    """uint8 (H, W, 3) of an image, float (3, H, W), which was normalised by mean_std, or, if that is None, was not."""
    if mean_std is not None:
        mean, std = (torch.as_tensor(values, dtype=torch.float32)[:, None, None] for values in mean_std)
        image = image * std + mean
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def class_colours(classes):
    """uint8 (H, W, 3), coloured as ternary labels: inside red, contour green, background blue. classes: (H, W) int."""
    palette = np.array([[0, 0, 255], [255, 0, 0], [0, 255, 0], *[[128] * 3] * 253], np.uint8)
    return palette[classes.numpy()]


def tile(rows, margin=4):
    """Pictures, uint8 (h, w, 3), in rows on white, the columns aligned by the widest."""
    widths = [max(picture.shape[1] for picture in column) for column in zip(*rows)]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    height, width = (sum(sides) + margin * (len(sides) - 1) for sides in (heights, widths))
    sheet = np.full((height, width, 3), 255, np.uint8)
    y = 0
    for row, height in zip(rows, heights):
        x = 0
        for picture, width in zip(row, widths):
            sheet[y:y + picture.shape[0], x:x + picture.shape[1]] = picture
            x += width + margin
        y += height + margin
    return sheet


# ---------------------------------------------------------------------------------------------------
# State: what changes while training, and what a checkpoint holds
# ---------------------------------------------------------------------------------------------------

class TrainingState:
    """Everything that changes while training.

    epoch: epochs completed. batch: steps done in the current epoch. step: steps in all. steps_planned: those that
    max_minutes allows, 0 until the speed is known. meter: sums of the current epoch. history: rows of
    epoch_results.txt. There is no random state: shuffling, transforms and dropout are functions of the seed and of
    these numbers.
    """

    def __init__(self, model, optimizer, train, steps_per_epoch, scaler):
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.average = WeightAverage(model, train['ema_decay']) if train['ema_decay'] else None
        self.steps_per_epoch = steps_per_epoch
        self.epoch, self.batch = train['start_epoch'], 0
        self.step = self.epoch * steps_per_epoch
        self.total_steps = train['num_epochs'] * steps_per_epoch
        self.steps_planned, self.step_seconds = 0, []
        self.meter = AverageMeter(5)
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
        self.meter.update(values, n_images)
        if self.average:
            self.average.update()

    def finish_epoch(self, val):
        """Count an epoch, whose validation results are [loss, accuracy, IoU]; returns its row of results."""
        self.epoch += 1
        row = [self.epoch, *self.meter.avg.tolist(), *val]
        self.history.append(row)
        self.best_iou = max(self.best_iou, val[2]) if not math.isnan(val[2]) else self.best_iou
        self.batch, self.meter = 0, AverageMeter(5)
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
            'meter': (self.meter.sum.tolist(), self.meter.count.tolist()), 'minutes': self.minutes(),
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
        self.meter.sum, self.meter.count = (np.array(values) for values in checkpoint['meter'])
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
        for name in [*before, *(name for name in values if name not in before)]:
            given = (group, name) in opt.given
            if given and name not in changeable and values.get(name) != before.get(name):
                refuse_change(name, values.get(name), before.get(name), path)
            if not given and name in before and name not in ('save_dir', 'checkpoint', 'overwrite', 'gpu'):
                values[name] = before[name]
        if split:
            opt.transform[split] = dict(before)


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


# ---------------------------------------------------------------------------------------------------
# Run folder: checkpoints, logs, pictures
# ---------------------------------------------------------------------------------------------------

class Run:
    """The run folder and what is written there; a context manager, whose end unlocks the folder.

    Raises InputError if the folder holds another run, or another process writes there.
    """

    def __init__(self, state, opt, mean_std):
        self.state, self.opt, self.mean_std, self.info = state, opt, mean_std, None
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
        self.begin(folder)
        self.last_saved, self.last_grid, self.last_drawn = time.monotonic(), state.epoch, -math.inf

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.lock.release()

    def begin(self, folder):
        """Write into this folder from now on."""
        self.folder, self.checkpoints = folder, folder / 'checkpoints'
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.opt.save(folder)
        if self.info:
            write_text(folder / 'run_info.json', self.info)
        log.handlers.clear()
        log.setLevel(logging.INFO)
        log.propagate = False
        log.addHandler(logging.StreamHandler())
        log.addHandler(LogFile(folder / 'train.log', encoding='utf-8'))
        self.write_results()
        self.writer = SummaryWriter(folder / 'tb_logs', purge_step=self.state.epoch + 1)

    def stay(self):
        """Before something is saved: if the folder was moved, deleted or emptied, go on in a new one of this name."""
        if self.lock.is_in_place() and self.checkpoints.is_dir():
            return
        before = folder = self.folder
        if not self.lock.is_in_place():
            names = itertools.chain([before], (Path(f'{before}_{k}') for k in itertools.count(2)))
            folder = next(filter(is_free, names))
            self.lock.release()
            self.lock = FolderLock(folder)
            self.opt.train['save_dir'] = str(folder)
        self.begin(folder)
        log.warning(f'{before} was moved, emptied or deleted while the training ran; '
                    f'it goes on in {folder}, without the earlier checkpoints')

    def save_info(self, *datasets):
        """run_info.json: versions, git commit, seed, and every training and validation file with its SHA-256."""
        packages = {'torch': torch, 'numpy': np, 'scipy': scipy, 'scikit-image': skimage, 'opencv': cv2, 'Pillow': PIL}
        packages = {name: module.__version__ for name, module in packages.items()}
        files = {str(path): sha256_of(path)
                 for dataset in datasets for item in dataset.items for path in item}
        info = {'python': platform.python_version(), 'packages': packages, 'commit': git_commit(Path(__file__).parent),
                'seed': self.opt.train['seed'], 'files': files}
        self.info = json.dumps(info, indent=1) + '\n'
        write_text(self.folder / 'run_info.json', self.info)

    def log_epoch(self, row):
        """One line of the log, TensorBoard, epoch_results.txt and learning_curve.png."""
        self.stay()
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
        every, epoch = self.opt.train['grid_every'], self.state.epoch
        return every and epoch // every > self.last_grid // every

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
        self.stay()
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
            if not self.lock.is_in_place():                            # the folder was moved in this very moment
                return self.save_latest(*copies)
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


if __name__ == '__main__':
    run_script(main)
