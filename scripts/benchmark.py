"""Speed and memory of this code beside the plain version, measured in one run. docs/performance.md has the numbers.

    python scripts/benchmark.py [step | memory | loss | loader | prepare | inference | metrics | all]
                                [--batch 2] [--repeats 5] [--threads 2]
    python scripts/benchmark.py windows --model-path CHECKPOINT --image IMAGE --label LABEL
    python scripts/benchmark.py large --model-path CHECKPOINT --image IMAGE [--size 10000]
    python scripts/benchmark.py gpu

Plain is what the published code does: the network's modules one by one with a torch.cat per layer (mode 'plain'), a
loop over the instances in the loss, an elastic deformation for every channel, a pass over the image for every object in
weight maps and metrics; 'plain, channels last' has our loss. The versions take turns in every repeat,
so that a busy machine slows both down. step and memory use the default FullNet on 208 x 208 patches; memory runs each
version in a process of its own, and the plain one needs about 20 GB at batch 8. windows shows what larger windows buy;
large sends an image, repeated to 10000 x 10000 pixels, through test.py in a process of its own. gpu compares, on a CUDA
GPU, the published way (float32, channels first, our loss with a loop over instances, window by window) with ours:
training steps, whole epochs with loader and validation, windows and a whole image in testing, memory.
"""
import argparse
import contextlib
import copy
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import tifffile
import torch
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage import measure
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train
from FullNet import FullNet, create_model
from loss import LossVariance, VarCELoss, label_instances, weighted_cross_entropy
from my_transforms import RandomElastic, get_transforms
from options import Options
from support.checkpoints import WeightAverage, load_checkpoint, save_checkpoint
from support.devices import MixedPrecision, choose_device, put_on
from support.files import save_image
from support.images import read_image, read_instance_label
from support.script import InputError, Parser, run_script
from test import segment
from utils import accuracy_pixel_level, nuclei_accuracy_object_level, split_forward, standard_metrics, window_grid
from weight_map import object_boundaries, weight_map

SIZE = 208
MODES = {'plain': dict(mode='plain'), 'plain, channels last': dict(mode='plain'), 'fast': dict(mode='fast'),
         'fast, memory_efficient': dict(mode='fast', memory_efficient=True), 'fast, amp': dict(mode='fast', amp=True),
         'fast, amp, memory_efficient': dict(mode='fast', memory_efficient=True, amp=True)}


# What is measured against

class PlainLossVariance(nn.Module):
    """The variance term as published: a loop over images and instances."""

    def forward(self, prob_maps, instances):
        loss = prob_maps.new_zeros(())
        for probs, ids in zip(prob_maps, instances):
            values = [value for value in ids.unique() if value != 0]
            total = prob_maps.new_zeros(())
            for value in values:
                pixels = probs[:, ids == value]
                if pixels.shape[1] > 1:
                    total = total + pixels.var(dim=1).sum()
            loss = loss + total / (len(values) + 1e-8)
        return loss / len(prob_maps)


class PlainElastic(RandomElastic):
    """The elastic deformation as published: SimpleITK resamples every channel of every image on its own."""

    def apply(self, images, parameters):
        return [Image.merge(image.mode, [self.warp(band, parameters) for band in image.split()]) for image in images]

    def warp(self, band, parameters):
        import SimpleITK as sitk
        image = sitk.GetImageFromArray(np.asarray(band))
        spline = sitk.BSplineTransformInitializer(image, [self.n, self.n], 3)
        spline.SetParameters(parameters.tolist())
        warped = sitk.Resample(sitk.Cast(image, sitk.sitkFloat32), image, spline, sitk.sitkLinear, 0.0)
        return Image.fromarray(sitk.GetArrayFromImage(warped).astype(np.uint8))


def plain_varce(logits, target, weight):
    instances = label_instances(target)
    return weighted_cross_entropy(logits, target, weight) + PlainLossVariance()(F.softmax(logits, 1), instances)


def varce(logits, target, weight):
    return VarCELoss(alpha=1.0)(logits, target, weight)[0]


# Made-up data

def make_patches(batch, size=SIZE, nuclei=40, seed=0):
    """Images (B, 3, H, W), classes (B, H, W), weights (B, H, W): dark discs of radius 4 to 9 with contours, on pink."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    images, targets = [], []
    for _ in range(batch):
        target = np.zeros((size, size), np.int64)
        side = int(np.ceil(np.sqrt(nuclei)))
        for cell in range(nuclei):
            centre = (np.array(divmod(cell, side)) + rng.uniform(0.4, 0.6, 2)) * size / side
            distance = np.hypot(y - centre[0], x - centre[1]) - rng.uniform(0.3, 0.4) * min(size / side, 25)
            target[(distance > 0) & (distance < 2)] = 2
            target[distance <= 0] = 1
        colour = np.array([[1.2, 0.4, 0.8], [-0.8, -1.0, 0.2], [-0.2, -0.4, 0.4]])[target]
        images.append((colour + rng.normal(0, 0.3, colour.shape)).transpose(2, 0, 1))
        targets.append(target)
    target = torch.from_numpy(np.stack(targets))
    return torch.from_numpy(np.stack(images)).float(), target, 1 + 4 * (target == 2).float()


# Measuring

def take_turns(functions, repeats):
    """Seconds of each call: {name: [seconds] * repeats}. One call of each before that does not count."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def print_table(header, rows):
    table = [header, *rows]
    widths = [max(len(str(row[i])) for row in table) for i in range(len(header))]
    for row in table:
        print('  '.join(str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))
    print()


def print_times(seconds, unit, count):
    """Median and minimum of each row, and its speed relative to 'plain', or where that was not run, to the first."""
    plain = seconds.get('plain', next(iter(seconds.values())))
    print_table(('', 'median ms', 'min ms', f'{unit}/s (median)', 'x plain (median)', 'x plain (min)'),
                [(name, f'{statistics.median(s) * 1e3:.1f}', f'{min(s) * 1e3:.1f}',
                  f'{count / statistics.median(s):.2f}',
                  f'{statistics.median(plain) / statistics.median(s):.2f}', f'{min(plain) / min(s):.2f}')
                 for name, s in seconds.items()])


def gflop_per_patch(net, size=SIZE):
    """Multiplications and additions of one training step (forward, and twice that backward) for one patch, in 1e9."""
    weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d))
    return 3 * 2 * weights * size * size / 1e9


def make_step(mode, batch):
    """A function that does one training step of the default network."""
    torch.manual_seed(0)
    net = FullNet(3, 3).set_mode(**MODES[mode])
    layout = torch.channels_last if 'channels last' in mode else torch.contiguous_format
    net.to(memory_format=layout)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    image, target, weight = make_patches(batch)
    image = image.contiguous(memory_format=layout)
    loss = plain_varce if mode == 'plain' else varce

    def step():
        optimizer.zero_grad()
        loss(net(image), target, weight).backward()
        optimizer.step()
    return step


# The benchmarks

def print_speeds(functions, repeats, unit, count, work):
    """Times of functions that process `count` units each, and their share of the rate of a matrix product.

    work: 1e9 operations of a unit. Names with 'amp' compare with the product of bfloat16 matrices.
    """
    matrices = {'float32': torch.randn(2048, 2048), 'bfloat16': torch.randn(2048, 2048).bfloat16()}
    products = {dtype: partial(torch.mm, a, a) for dtype, a in matrices.items()}
    seconds = take_turns(functions | products, repeats)
    peak = {dtype: 2 * 2048 ** 3 / 1e9 / min(seconds.pop(dtype)) for dtype in products}
    print_times(seconds, unit, count)
    print(f'{work:.0f} GFLOP each; a product of 2048 x 2048 matrices reaches '
          + ', '.join(f'{rate:.0f} GFLOP/s in {dtype}' for dtype, rate in peak.items()))
    rates = {name: work * count / min(times) for name, times in seconds.items()}
    print_table(('', 'GFLOP/s', 'of the matrix product'),
                [(name, f'{rate:.0f}', f'{rate / peak["bfloat16" if "amp" in name else "float32"]:.0%}')
                 for name, rate in rates.items()])


def benchmark_step(args):
    batch = args.batch or 2
    print(f'Training step: default FullNet, batch {batch} of {SIZE} x {SIZE}, {torch.get_num_threads()} threads')
    print_speeds({mode: make_step(mode, batch) for mode in MODES}, args.repeats, 'patches', batch,
                 gflop_per_patch(FullNet(3, 3)))


def peak_gigabytes(mode, batch, threads):
    """Peak memory of a process that does one training step."""
    command = [sys.executable, __file__, 'one_step', '--mode', mode, '--batch', str(batch), '--threads', str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


def benchmark_memory(args):
    batch = args.batch or 8
    peaks = {mode: peak_gigabytes(mode, batch, args.threads) for mode in MODES}
    print(f'Peak memory of a training step, batch {batch} of {SIZE} x {SIZE}')
    print_table(('', 'GB', 'of plain'),
                [(mode, f'{peak:.2f}' if peak else 'failed (out of memory?)',
                  f'{peak / peaks["plain"]:.0%}' if peak and peaks['plain'] else '') for mode, peak in peaks.items()])


def benchmark_loss(args):
    image, target, weight = make_patches(8)
    logits = torch.randn(8, 3, SIZE, SIZE, requires_grad=True)
    instances = label_instances(target)
    print(f'Loss with gradient, 8 patches of {SIZE} x {SIZE} with {int(instances.amax((1, 2)).float().mean())} nuclei')
    for name, plain, ours in (
            ('variance term', lambda: PlainLossVariance()(logits.softmax(1), instances).backward(),
             lambda: LossVariance()(logits.softmax(1), instances).backward()),
            ('varCE', lambda: plain_varce(logits, target, weight).backward(),
             lambda: varce(logits, target, weight).backward())):
        print(name)
        print_times(take_turns({'plain': plain, 'ours': ours}, 3 * args.repeats), 'patches', 8)


def benchmark_loader(args):
    cv2_threads = cv2.getNumThreads()
    torch.set_num_threads(1)        # as in a worker of the data loader
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    image, label = (Image.fromarray(rng.integers(0, 255, (250, 250, 3), dtype=np.uint8)) for _ in range(2))
    weight = Image.fromarray(rng.integers(0, 255, (250, 250), dtype=np.uint8))
    ours = get_transforms({
        'scale': 250, 'random_resize': [0.8, 1.25], 'horizontal_flip': True, 'vertical_flip': True,
        'random_affine': 0.3, 'random_elastic': [6, 15], 'random_rotation': 90, 'random_crop': SIZE,
        'label_encoding': 1, 'to_tensor': 1, 'normalize': np.array([[0.7, 0.5, 0.7], [0.2, 0.2, 0.2]])})
    versions = {'ours': ours}
    try:
        import SimpleITK as sitk
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        plain = copy.deepcopy(ours)
        plain.transforms = [PlainElastic(t.n, t.sigma) if isinstance(t, RandomElastic) else t for t in plain.transforms]
        versions = {'plain': plain, 'ours': ours}
    except ImportError:
        print('SimpleITK is not installed, so that there is no plain version to compare with')
    generators = {name: np.random.default_rng(0) for name in versions}
    print('Eleven transforms on a patch of 250 x 250, one thread')
    functions = {name: partial(version, [image, weight, label], generators[name]) for name, version in versions.items()}
    print_times(take_turns(functions, 10 * args.repeats), 'patches', 1)
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(cv2_threads)


def made_up_label(n, size=1000, seed=0):
    """Instance label, int32 (size, size), of n discs on a jittered grid."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(np.sqrt(n)))
    cell = size / side
    label = np.zeros((size, size), np.int32)
    for k, (row, column) in enumerate(np.argwhere(np.ones((side, side)))[:n], 1):
        y, x = (np.array([row, column]) + rng.uniform(0.4, 0.6, 2)) * cell
        radius = rng.uniform(0.3, 0.48) * cell
        top, left = max(int(y - radius), 0), max(int(x - radius), 0)
        rows, columns = np.mgrid[top:min(int(y + radius) + 2, size), left:min(int(x + radius) + 2, size)]
        label[rows, columns] = np.where(np.hypot(rows - y, columns - x) < radius, k, label[rows, columns])
    return label


def plain_weight_map(label, w0, sigma):
    """A distance transform of the whole image for every object, and the two smallest at every pixel."""
    boundary, boxes = object_boundaries(label)
    nearest = second = np.full(label.shape, np.inf)
    for index in range(1, len(boxes) + 1):
        distance = ndimage.distance_transform_edt(boundary != index)
        second = np.minimum(second, np.maximum(nearest, distance))
        nearest = np.minimum(nearest, distance)
    return w0 * np.exp(-(nearest + second) ** 2 / (2 * sigma ** 2))


def benchmark_prepare(args):
    print('Weight maps of 1000 x 1000 pixels, seconds (best of 3; plain once)')
    rows = []
    for n, sigma in ((400, 5), (400, 20), (1900, 5), (1900, 20)):
        label = made_up_label(n)
        start = time.perf_counter()
        expected = plain_weight_map(label, 10, sigma)
        plain = time.perf_counter() - start
        ours = min(take_turns({'ours': partial(weight_map, label, 10, sigma)}, 3)['ours'])
        largest = np.abs(weight_map(label, 10, sigma) - expected).max()
        rows.append((f'{n} objects, sigma {sigma}', f'{ours:.3f}', f'{plain:.1f}', f'{plain / ours:.0f}',
                     f'{largest:.1e}'))
    print_table(('', 'ours', 'plain', 'x plain', 'largest difference'), rows)


def peak_memory():
    """Largest resident memory of this process so far, in GB. Linux's ru_maxrss would count the parent's too."""
    status = Path('/proc/self/status')
    if status.exists():
        return int(status.read_text().split('VmHWM:')[1].split()[0]) * 1024 / 1e9
    import resource                                             # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == 'darwin' else 1e6)


def benchmark_inference(args):
    torch.manual_seed(0)
    net = FullNet(3, 3)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0                                     # the moments of these data, as after training
    with torch.no_grad():
        net(make_patches(1)[0])
    for norm in norms:
        norm.momentum = 0.1
    net.eval()
    image = make_patches(1)[0]

    def run(name):
        layout = torch.channels_last if 'channels last' in name else torch.contiguous_format
        model = copy.deepcopy(net).to(memory_format=layout).set_mode(**MODES[name])
        x = image.contiguous(memory_format=layout)

        @torch.inference_mode()
        def forward():
            return model(x)
        return forward
    functions = {name: run(name) for name in MODES if 'memory' not in name}
    print(f'Testing: default FullNet, one window of {SIZE} x {SIZE}, {torch.get_num_threads()} threads')
    print_speeds(functions, 2 * args.repeats, 'windows', 1, gflop_per_patch(net) / 3)
    plain = functions['plain']().softmax(1)
    print_table(('', 'largest difference of a probability'),
                [(name, f'{(forward().softmax(1) - plain).abs().max():.1e}') for name, forward in functions.items()])


def benchmark_windows(args):
    """What larger windows buy, on one image with its label: seconds and scores."""
    image = read_image(args.image)
    label = read_instance_label(args.label, image.shape[:2])
    rows, reference = [], None
    for size, tta in ((208, 'none'), (336, 'none'), (464, 'none'), (592, 'none'), (208, 'full'), (464, 'full')):
        start = time.perf_counter()
        found, probabilities = segment(image, args.model_path, '--patch-size', str(size), '--tta', tta)
        seconds = time.perf_counter() - start
        reference = probabilities if size == 208 and tta == 'none' else reference
        scores = standard_metrics(found, label)
        rows.append((f'{size}, tta {tta}', f'{seconds:.1f}', f'{scores["aji_fullnet"]:.4f}', f'{scores["aji"]:.4f}',
                     f'{scores["pq"]:.4f}', f'{np.abs(probabilities - reference).mean():.4f}'))
    print(f'{args.model_path} on {args.image}, overlap 80, {torch.get_num_threads()} threads')
    print_table(('windows', 'seconds', 'published AJI', 'AJI', 'PQ', 'mean change of the probabilities'), rows)


def plain_nuclei_scores(pred, gt):
    """The published nuclei metrics with masks of the whole image and Hausdorff distances over all pixels."""
    pred, gt = (measure.label(x, background=0, connectivity=2) for x in (pred, gt))
    free = set(range(1, pred.max() + 1))
    dice, iou, hausdorff, intersections, unions = [], [], [], 0, 0
    for i in range(1, gt.max() + 1):
        mask = gt == i
        best = None
        for j in np.unique(pred[mask]):
            if j in free:
                other = pred == j
                both, either = (mask & other).sum(), (mask | other).sum()
                if best is None or both / either > best[0]:
                    best = both / either, j, both, either, other
        if best is None:
            unions += mask.sum()
            continue
        value, j, both, either, other = best
        free.remove(j)
        a, b = np.argwhere(mask), np.argwhere(other)
        distances = cdist(a, b)
        hausdorff.append(max(distances.min(0).max(), distances.min(1).max()))
        iou.append(value)
        dice.append(2 * value / (1 + value))
        intersections, unions = intersections + both, unions + either
    unions += sum((pred == j).sum() for j in free)
    n, recall, precision = len(iou), len(iou) / gt.max(), len(iou) / pred.max()
    return [recall, precision, 2 * n / (gt.max() + pred.max()), *map(np.mean, (dice, iou, hausdorff)),
            intersections / unions]


def benchmark_metrics(args):
    print('Published and standard scores of 1000 x 1000 pixels against the same shifted by (2, 3), seconds (best of 3)')
    rows = []
    for n in (400, 1900):
        gt = made_up_label(n)
        pred = np.roll(gt, (2, 3), (0, 1))
        functions = {'ours': nuclei_accuracy_object_level, 'standard': standard_metrics, 'plain': plain_nuclei_scores}
        best = {name: min(seconds) for name, seconds in
                take_turns({name: partial(f, pred, gt) for name, f in functions.items()}, 3).items()}
        difference = np.abs(np.array(nuclei_accuracy_object_level(pred, gt)) - plain_nuclei_scores(pred, gt)).max()
        rows.append((n, *(f'{seconds:.2f}' for seconds in best.values()), f'{best["plain"] / best["ours"]:.0f}',
                     f'{difference:.0e}'))
    print_table(('objects', 'published, ours', 'standard', 'published, plain', 'x plain', 'largest difference'), rows)


def benchmark_large(args):
    """An image repeated to size x size pixels, through test.py in a process of its own: seconds and peak memory."""
    image = read_image(args.image)
    image = np.tile(image, (*(-(-args.size // side) for side in image.shape[:2]), 1))[:args.size, :args.size]
    weights = load_checkpoint(args.model_path)['state_dict']
    parameters = sum(value.numel() for key, value in weights.items() if key.endswith(('weight', 'bias')))
    words = ['--patch-size', '592', '--overlap', '80', '--tta', 'none']
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'large', 'large.tif')
        path.parent.mkdir()
        tifffile.imwrite(path, image, photometric='rgb')
        del image
        print(f'{args.size} x {args.size} RGB TIFF ({path.stat().st_size / 1e9:.2f} GB), network of {parameters:,} '
              f'parameters, {" ".join(words)}', flush=True)
        program = ('import sys, test, support.script; support.script.run_script(lambda: test.main(sys.argv[1:])); '
                   'from scripts.benchmark import peak_memory; print(peak_memory())')
        start = time.perf_counter()
        done = subprocess.run([sys.executable, '-c', program, '--img-dir', path, '--model-path', args.model_path,
                               '--save-dir', Path(folder, 'out'), '--gpu', 'cpu', *words], text=True,
                              stdout=subprocess.PIPE, cwd=folder, env=os.environ | {'PYTHONPATH': str(ROOT)})
        seconds = time.perf_counter() - start
        if done.returncode:
            raise InputError('test.py failed, see above')
        objects = Path(folder, 'out/large_segmentation/large_objects.csv').read_text().count('\n') - 1
        sizes = ', '.join(f'{file.name} {file.stat().st_size / 1e6:.1f} MB'
                          for file in sorted(Path(folder, 'out').glob('large_*/*')))
    print(f'{seconds / 60:.1f} minutes, peak memory {float(done.stdout.splitlines()[-1]):.2f} GB, {objects} objects')
    print(f'written: {sizes}')


@dataclass
class GpuSizes:
    """What benchmark.py gpu measures with."""
    device: torch.device
    batch: int = 8
    crop: int = SIZE
    image: int = 1000                                            # pixels of a side, in testing
    patches: int = 192                                           # of an epoch, as Multi-Organ has
    seconds: float = 2.0                                         # for each speed
    product: int = 8192                                          # rows of the matrices that show what the card can do
    network: tuple = ()                                          # model options of train.py
    compile: bool = True

    @property
    def overlap(self):
        """Of the windows in testing: 80 of 208, as published."""
        return self.crop * 80 // SIZE


def benchmark_gpu(args):
    device = choose_device('auto')
    if device.type != 'cuda':
        raise InputError(f'gpu needs a CUDA GPU, and the best device here is {device}')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}')
    gpu_table(GpuSizes(device))


def gpu_table(sizes):
    """Measure and print it all."""
    started = time.perf_counter()
    a = torch.randn(sizes.product, sizes.product, device=sizes.device).bfloat16()
    peak = 2 * sizes.product ** 3 * per_second(lambda: a @ a, sizes)
    model = Options(isTrain=True).parse(sizes.network).model
    work = gflop_per_patch(create_model(**model), sizes.crop) * 1e9

    def row(name, compiled=False, **version):
        step, network = gpu_step(model, sizes, compiled=compiled, **version)
        first = time.perf_counter()
        step()
        first = time.perf_counter() - first
        if sizes.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        crops = sizes.batch * per_second(step, sizes)
        memory = torch.cuda.max_memory_allocated() / 1e9 if sizes.device.type == 'cuda' else math.nan
        windows = '' if compiled else f'{windows_per_second(network, sizes, **version):.1f}'
        return name, f'{crops:.1f}', f'{memory:.1f}', f'{crops * work / peak:.1%}', windows, f'{first:.1f}'

    header = '', 'training, crops/s', 'peak GB', 'of the product', 'testing, windows/s', 'first step, s'
    print(f'Batches of {sizes.batch} crops of {sizes.crop} x {sizes.crop}, {work / 1e9:.0f} GFLOP each; a product of '
          f'bfloat16 matrices reaches {peak / 1e12:.1f} TFLOP/s')
    print_table(header, [row('published'), row('ours', ours=True), row('ours, amp', ours=True, amp=True)])
    for name, words in (('published', ()), ('ours, amp', ('--amp', 'True'))):
        epoch, validation = epoch_seconds(sizes, words, published=name == 'published')
        print(f'{name}: epoch of {sizes.patches} patches with loader {epoch:.2f} s, validation of {sizes.patches // 3} '
              f'patches {validation:.2f} s, image of {sizes.image} x {sizes.image} with --tta full '
              f'{image_seconds(sizes, words):.2f} s', flush=True)
    if sizes.compile:                                                    # last, because it may take minutes
        print_table(header, [row('ours, amp, compile', ours=True, amp=True, compiled=True)])
    print(f'measured in {time.perf_counter() - started:.0f} s')


def per_second(function, sizes):
    """How often a second a function runs, after three times that do not count."""
    wait = torch.cuda.synchronize if sizes.device.type == 'cuda' else lambda: None
    for _ in range(3):
        function()
    wait()
    started, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - started < sizes.seconds:
        function()
        n += 1
    wait()
    return n / (time.perf_counter() - started)


def gpu_step(model, sizes, ours=False, amp=False, compiled=False):
    """(a training step as train.py does it, or as published; its network)."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = ours
    network = create_model(**model).train()
    network = put_on(sizes.device, network) if ours else network.to(sizes.device)
    forward = torch.compile(network, dynamic=False) if compiled else network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    criterion, average = VarCELoss(), WeightAverage(network, 0.999)
    image, target, weight = make_patches(sizes.batch, sizes.crop)
    batch = image, (weight * 20).byte(), target.byte(), label_instances(target)
    if sizes.device.type == 'cuda':
        batch = [values.pin_memory() for values in batch]

    def published_step():
        image, target, weight = (values.to(sizes.device) for values in (batch[0], batch[2].long(), batch[1] / 20))
        optimizer.zero_grad()
        logits = network(image)
        loss = plain_varce(logits, target, weight)
        accuracy_pixel_level(logits.argmax(1).cpu().numpy(), target.cpu().numpy())
        loss.backward()
        optimizer.step()
        loss.item()

    def step():
        image, weight, target, instances = train.to_device(batch, sizes.device, True)
        with MixedPrecision(sizes.device, amp).autocast():
            logits = forward(image)
        logits = logits.float()
        losses = criterion(logits, target, weight, instances)
        results = torch.stack([*losses, *train.pixel_results(logits, target)]).detach()
        optimizer.zero_grad(set_to_none=True)
        losses[0].backward()
        results.tolist()
        optimizer.step()
        average.update()
    return step if ours else published_step, network


def windows_per_second(network, sizes, ours=False, amp=False):
    """In testing, of a whole image."""
    image = torch.randn(1, 3, sizes.image, sizes.image, device=sizes.device)
    network.eval()

    @torch.inference_mode()
    def predict():
        with MixedPrecision(sizes.device, amp).autocast():
            split_forward(network, image, sizes.crop, sizes.overlap, n_windows=8 if ours else 1)
    n = len(window_grid(sizes.image, sizes.crop, sizes.overlap)[1]) ** 2
    return n * per_second(predict, sizes)


def epoch_seconds(sizes, words, published):
    """Seconds of the second epoch and of the second validation of train.py."""
    seconds = {'train_epoch': [], 'validate': []}

    def timed(name, function):
        def call(*arguments):
            started = time.perf_counter()
            result = function(*arguments)
            seconds[name].append(time.perf_counter() - started)
            return result
        return call
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write_made_up_data(Path(folder, 'data'), sizes)
        for name in seconds:
            stack.enter_context(mock.patch.object(train, name, timed(name, getattr(train, name))))
        if published:                                            # channels first; the loss is ours
            stack.enter_context(mock.patch.object(train, 'put_on', lambda device, network: network.to(device)))
            stack.enter_context(mock.patch.object(train, 'windows_at_once', lambda device: 1))
        stack.enter_context(mock.patch.object(train.log, 'addHandler', lambda handler: None))
        train.main(['--data-dir', f'{folder}/data', '--save-dir', f'{folder}/run', '--epochs', '2', '--batch-size',
                    str(sizes.batch), '--input-size', str(sizes.crop), *sizes.network, *words])
    return [second for _, second in seconds.values()]


def write_made_up_data(folder, sizes):
    """A prepared data set of MultiOrgan's layout: patches of 250 x 250, a third as many for validation."""
    side = sizes.crop * 250 // SIZE
    for part, count in (('train', sizes.patches), ('val', sizes.patches // 3)):
        images, targets, weights = make_patches(8, side)
        ternary = np.array([(0, 0, 255), (255, 0, 0), (0, 255, 0)], np.uint8)[targets.numpy()]
        images = (images.numpy().transpose(0, 2, 3, 1) * 40 + 128).clip(0, 255).astype(np.uint8)
        for i in range(count):
            save_image(folder / f'images/{part}/{i}.png', images[i % 8])
            save_image(folder / f'labels/{part}/{i}_label.png', ternary[i % 8])
            save_image(folder / f'weight_maps/{part}/{i}_weight.png', (weights[i % 8].numpy() * 20).astype(np.uint8))
    np.save(folder / 'mean_std.npy', np.array([[0.7, 0.5, 0.7], [0.2, 0.2, 0.2]]))


def image_seconds(sizes, words):
    """Seconds of test.py's `segment` for an image with full augmentation, the weights' loading included."""
    words = [*words, *(() if words else ('--batch-size', '1')), '--patch-size', str(sizes.crop), '--overlap',
             str(sizes.overlap)]
    with tempfile.TemporaryDirectory() as folder:
        model = Options(isTrain=True).parse(sizes.network)
        save_checkpoint(f'{folder}/x.pth.tar', {'state_dict': create_model(**model.model).state_dict(), 'optimizer': {},
                                                'options': model.as_dict(), 'mean_std': [[0.7] * 3, [0.2] * 3]})
        image = np.random.default_rng(0).integers(0, 255, (sizes.image, sizes.image, 3), dtype=np.uint8)
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            segment(image, f'{folder}/x.pth.tar', '--gpu', 'auto' if sizes.device.type == 'cuda' else 'cpu', *words)
            seconds.append(time.perf_counter() - started)
    return min(seconds)


def one_step(args):
    make_step(args.mode, args.batch)()
    print(peak_memory())


def main(argv=None):
    benchmarks = {'step': benchmark_step, 'memory': benchmark_memory, 'loss': benchmark_loss,
                  'loader': benchmark_loader, 'prepare': benchmark_prepare, 'inference': benchmark_inference,
                  'metrics': benchmark_metrics}
    needs = {'windows': (benchmark_windows, ('model_path', 'image', 'label')),            # a trained network
             'large': (benchmark_large, ('model_path', 'image'))}
    parser = Parser(prog='scripts/benchmark.py', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='?', default='all',
                        choices=[*benchmarks, *needs, 'gpu', 'all', 'one_step'])
    for name in ('model_path', 'image', 'label'):
        parser.add_argument('--' + name.replace('_', '-'), type=Path, help='for ' + ' and '.join(
            what for what, (_, names) in needs.items() if name in names))
    parser.add_argument('--size', type=int, default=10000, help='for large: pixels of a side')
    parser.add_argument('--batch', type=int, help='patches per step; by default 2, and 8 for memory')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--mode', choices=MODES, default='fast', help='for one_step, which memory calls')
    args = parser.parse_args(argv)
    if args.threads < 1 or args.repeats < 1:
        raise InputError(f'--threads is {args.threads} and --repeats {args.repeats}; expected at least 1 of each')
    torch.set_num_threads(args.threads)
    if args.what == 'one_step':                                  # called by memory
        return one_step(args)
    if args.what in needs:
        function, names = needs[args.what]
        for name in names:
            path = getattr(args, name)
            if path is None or not path.is_file():
                raise InputError(f'{args.what} needs --{name.replace("_", "-")}, ' + (
                    f'and there is no {path}' if path else 'a file; it was not given'))
            setattr(args, name, path.resolve())
        return function(args)
    if args.what == 'gpu':
        return benchmark_gpu(args)
    for name, function in benchmarks.items():
        if args.what in (name, 'all'):
            function(args)


if __name__ == '__main__':
    run_script(main)
