"""Train FullNet: `python train.py`, with the options of options.py or the command line."""
import itertools
import logging
import math
import time
from pathlib import Path

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
from support.devices import (MixedPrecision, Processes, loader_processes, memory_watched, put_on, start_loader,
                             windows_at_once)
from support.pictures import save_preview
from support.run_folder import Onlooker, Run, TrainingState, take_options_of_run
from support.script import InputError, StopRequest, run_script
from utils import split_forward
from weight_map import decode_weight_map

log = logging.getLogger('train')

POST_FIX = {'MultiOrgan': ['weight.png', 'label.png'], 'GlaS': ['anno_weight.png', 'anno.bmp']}
GRID_IMAGES = 4


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
        means = state.means()
        progress.set_postfix(loss=f'{means[0]:.4f}', IoU=f'{means[4]:.4f}')
        if state.batch % train['log_interval'] == 0:
            log.info('  step %d/%d  loss %.4f  CE %.4f  var %.4f  acc %.4f  IoU %.4f',
                     state.batch, len(batches), *means)

        # 7. time budget, checkpoint, stop
        if train['max_minutes'] and not state.steps_planned:
            state.plan_steps(time.monotonic() - started, train['max_minutes'], processes)
        run.save_if_due()
        stop.check(run.save_and_say_how_to_go_on)
        started = time.monotonic()
    progress.close()


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
    weight = decode_weight_map(weight.float())
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


# ---------------------------------------------------------------------------------------------------
# Run folder: checkpoints, logs, pictures
# ---------------------------------------------------------------------------------------------------


if __name__ == '__main__':
    run_script(main)
