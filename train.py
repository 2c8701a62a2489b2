"""Train FullNet (paper, section 3): `python train.py`, with the options of options.py or of the command line."""
import itertools
import logging
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset import DataFolder, EpochBatches, batch_items
from FullNet import create_model
from loss import VarCELoss
from my_transforms import get_transforms
from options import Options
from support.checkpoints import load_checkpoint, load_mean_std_of_run, load_weights
from support.devices import (MixedPrecision, Processes, loader_processes, put_on, report_out_of_memory, start_loader,
                             windows_at_once)
from support.pictures import save_preview
from support.run_folder import Run, SilentRun, TrainingState, facts_of_data, take_options_of_run
from support.script import InputError, StopRequest, run_script
from utils import split_forward
from weight_map import decode_weight_map

log = logging.getLogger('train')

POST_FIX = {'MultiOrgan': ['weight.png', 'label.png'], 'GlaS': ['anno_weight.png', 'anno.bmp']}
GRID_IMAGES = 4                         # validation images in val_grid.png


class Setup(NamedTuple):
    """What training and validation both need."""
    options: dict                       # the group `train` of options.py
    processes: Processes
    precision: MixedPrecision
    criterion: VarCELoss
    run: Run | SilentRun
    stop: StopRequest


def main(argv=None):
    # 1. options, the checkpoint to resume from, the processes that torchrun started
    opt = Options(isTrain=True).parse(argv)
    checkpoint = load_checkpoint(opt.train['checkpoint']) if opt.train['checkpoint'] else None
    if checkpoint:
        take_options_of_run(opt, checkpoint)
    train = opt.train
    processes = Processes(train['gpu'])
    if train['batch_size'] < processes.count:
        raise InputError(f'--batch-size is {train["batch_size"]}, for {processes.count} processes; expected at least '
                         f'{processes.count}: it counts the crops of all processes together')

    # 2. data
    mean_std = load_mean_std_of_run(train['data_dir'], checkpoint or {}, train['checkpoint'])
    train_set, val_set = (load_data(opt, split, mean_std) for split in ('train', 'val'))
    if train['preview']:
        return save_preview(train_set, train, mean_std if opt.transform['train'].get('normalize') else None)
    data = facts_of_data(train_set, val_set, mean_std, checkpoint or {}, train['checkpoint'])
    batches = EpochBatches(len(train_set), train['batch_size'], train['seed'], processes.rank, processes.count)
    workers = loader_processes(train['workers'], processes)
    common = dict(collate_fn=batch_items, worker_init_fn=start_loader, pin_memory=processes.device.type == 'cuda')
    train_loader = DataLoader(train_set, batch_sampler=batches, num_workers=workers, **common)
    val_loader = DataLoader(val_set, sampler=processes.own_images(len(val_set)), num_workers=min(1, workers),
                            persistent_workers=workers > 0, **common)

    # 3. network, loss, optimizer
    torch.manual_seed(train['seed'])
    model = create_model(**opt.model)
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
    if state.is_done() and not state.batch and not state.history:
        raise InputError(f'{state.epoch} epochs count as done, and --epochs is {train["num_epochs"]}: nothing is left '
                         f'to train; give more --epochs')

    # 4. run folder and logs
    run = Run(state, opt, data) if processes.rank == 0 else SilentRun()
    log.info(opt.describe())
    run.save_info(train_set, val_set)
    log.info(f'{len(train_set)} training and {len(val_set)} validation images; {opt.model["name"]} with '
             f'{sum(p.numel() for p in model.parameters()):,} parameters on {processes.device}'
             + f' in {processes.count} processes' * (processes.count > 1) + f'; run folder {opt.train["save_dir"]}')
    if checkpoint:
        log.info(f'resumed from {train["checkpoint"]}: {state.epoch} epochs and {state.batch} steps done')

    # 5. epochs
    with StopRequest(processes) as stop, run, processes.report_lost_process(run.how_to_resume), \
            report_out_of_memory(run.last_good):
        setup = Setup(train, processes, precision, criterion, run, stop)
        network = processes.distribute(model)
        compiled = torch.compile(network, dynamic=False) if train['compile'] else network
        batches.start_at(state.epoch, state.batch)
        crops = iter(train_loader)                               # one iterator over the batches of all epochs
        while not state.is_done() or state.batch > 0:                    # the last epoch may be short: validate it too
            train_epoch(setup, state, network, compiled, crops, train_loader)
            val, pictures = [math.nan] * 3, []
            if (state.epoch + 1) % train['val_every'] == 0 or state.is_done():
                val, pictures = validate(setup, state.validation_model(), val_loader)
            is_best = val[2] > state.best_iou                            # NaN, without validation, is not
            row = state.finish_epoch(val)
            run.save_epoch(is_best)
            run.log_epoch(row)
            if pictures and run.is_grid_due():
                run.save_grid(pictures)
        run.draw_learning_curve()
    processes.shut_down()
    log.info(f'done: {state.epoch} epochs in {state.minutes():.1f} minutes, best validation IoU {state.best_iou:.4f}; '
             f'weights in {opt.train["save_dir"]}/checkpoints')


# ---------------------------------------------------------------------------------------------------
# An epoch
# ---------------------------------------------------------------------------------------------------

def train_epoch(setup, state, network, compiled, crops, loader):
    """Train from the step at which the state stands to the end of the epoch, or of training.

    setup: Setup. state: TrainingState, updated in place. network: the model, distributed over the processes. compiled:
    the compiled network, for batches of full size. crops: iterator over the loader, which goes on from epoch to epoch.
    """
    train, processes, precision, criterion, run, stop = setup
    network.train()
    batches = loader.batch_sampler
    progress = tqdm(itertools.islice(crops, len(batches) - state.batch), desc=f'epoch {state.epoch + 1}',
                    initial=state.batch, total=len(batches), disable=processes.quiet)
    started = time.monotonic()
    for batch in progress:
        if state.is_done():                                      # max_minutes may end training within an epoch
            break
        # 1. data; each step has its own seed, so that a resumed run draws the same dropout
        torch.manual_seed(step_seed(train['seed'], state.step, processes.rank))
        n_own, n_all = batches.sizes(state.batch)                # images of this process, of all processes
        image, weight, target, instances = to_device(batch, processes.device, train['use_weight_map'])

        # 2. forward and loss; a short batch is not compiled, because that would take minutes
        with precision.autocast():
            logits = compiled(image) if n_all == train['batch_size'] else network(image)
        logits = logits.float()                                  # softmax, loss and variance in float32
        loss, loss_ce, loss_var = criterion(logits, target, weight, instances)
        results = torch.stack([loss, loss_ce, loss_var, *pixel_results(logits, target)]).detach()               # (5,)

        # 3. backward; DDP averages the gradients over the processes: with this factor that is the mean over the images
        state.optimizer.zero_grad(set_to_none=True)
        precision.scaler.scale(loss * (n_own * processes.count / n_all)).backward()

        # 4. check that the loss is finite; this reads numbers, so the CPU waits for the GPU here, once in a step
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

        # 6. results so far in this epoch
        state.finish_step(values, n_all)
        means = state.means()
        progress.set_postfix(loss=f'{means[0]:.4f}', IoU=f'{means[4]:.4f}')
        if state.batch % train['log_interval'] == 0:
            log.info('  step %d/%d  loss %.4f  CE %.4f  var %.4f  acc %.4f  IoU %.4f',
                     state.batch, len(batches), *means)

        # 7. time limit, checkpoint, stop request
        if train['max_minutes'] and not state.steps_planned:
            state.plan_steps(time.monotonic() - started, train['max_minutes'], processes)
        run.save_if_due()
        stop.check(run.save_before_stop)
        started = time.monotonic()
    progress.close()


def validate(setup, model, loader):
    """Validate with the sliding window; the loss, pixel accuracy and IoU of class 1, means over all images.

    setup: Setup. model: the network. loader: batches of one image, those of this process. Returns the three means, a
    list of float, and the first GRID_IMAGES images of this process: tuples of image (3, H, W), target (H, W) and
    probabilities (C, H, W), on the CPU.
    """
    train, processes, precision, criterion, run, stop = setup
    model.eval()
    processes.copy_from_first(model.buffers())                       # the running mean and variance of batch norm
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
            if processes.rank + i * processes.count < n_images:      # `own_images` may repeat the last image
                results.append(torch.stack([loss, *pixel_results(logits, target)]))
        if len(pictures) < GRID_IMAGES:
            pictures.append((image[0].cpu(), target[0].cpu(), logits[0].softmax(0).cpu()))
        run.save_if_due()                                            # a resume repeats the whole validation
        stop.check(run.save_before_stop)
    sums = torch.stack(results).cpu().double().sum(0).tolist() if results else [0.0] * 3
    return [value / n_images for value in processes.sums(sums)], pictures


def to_device(batch, device, use_weight_map):
    """Move a batch of `batch_items` to the device.

    Returns image (B, 3, H, W) float32, weight (B, H, W) float32 from 1 to 11 (all 1 without use_weight_map), target
    (B, H, W) int64 classes, instances (B, H, W) int32 ids.
    """
    image, weight, target, instances = (values.to(device, non_blocking=True) for values in batch)
    weight = decode_weight_map(weight.float())
    return image, weight if use_weight_map else torch.ones_like(weight), target.long(), instances


def pixel_results(logits, target):
    """Pixel accuracy and IoU of class 1, each the mean over the batch: two scalar tensors on the device.

    The first two values of `accuracy_pixel_level`, computed on the device. logits: (B, C, H, W); target: (B, H, W).
    """
    predicted, actual = logits.detach().argmax(1) == 1, target == 1
    intersection, union = (predicted & actual).sum((1, 2)), (predicted | actual).sum((1, 2))
    return (predicted == actual).float().mean(), (intersection / (union + 1e-10)).mean()


def step_seed(seed, step, rank=0):
    """A seed of 63 bits that depends on the run's seed, the step and the rank of the process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate(step, total_steps, train, steps_per_epoch):
    """Learning rate of a step, counted from 0. train: the group `train` of options.py.

    none: constant, as published. cosine: half a cosine down to 0. Both start with `warmup_epochs` of linear warm-up.
    onecycle: half a cosine up from lr / 25 in the first 30 % of the steps, then half a cosine down to lr / 10,000.
    With max_minutes, the first 30 steps follow the schedule of num_epochs, because total_steps is not known before.
    """
    lr, done = train['lr'], step / total_steps
    if train['lr_schedule'] == 'onecycle':
        return half_cosine(lr / 25, lr, done / 0.3) if done < 0.3 else half_cosine(lr, lr / 1e4, (done - 0.3) / 0.7)
    warmup_steps = train['warmup_epochs'] * steps_per_epoch
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    return half_cosine(lr, 0, done) if train['lr_schedule'] == 'cosine' else lr


def half_cosine(start, end, t):
    """Go from `start` at t = 0 to `end` at t = 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def load_data(opt, split, mean_std):
    """The DataFolder of the split 'train' or 'val' in data_dir. mean_std: (2, 3), what `normalize` uses."""
    data_dir, transform = Path(opt.train['data_dir']), dict(opt.transform[split])
    if transform.get('normalize'):
        transform['normalize'] = mean_std
    folders = [data_dir / part / split for part in ('images', 'weight_maps', 'labels')]
    return DataFolder(folders, POST_FIX[opt.dataset], [3, 1, 3], get_transforms(transform))


if __name__ == '__main__':
    run_script(main)
