"""The network, training and testing on a CUDA GPU, against the CPU and the golden numbers.

Where there is no GPU, the tests that can run on the CPU do so, to find errors that have nothing to do with CUDA.
"""
import contextlib
import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_fullnet
import test_loss
import test_test
import test_utils
import tifffile
import torch
from torch import distributed

import test as test_script
import train
from FullNet import FCN_pooling, FullNet
from loss import VarCELoss, label_instances
from miniature import SMALL, make_multi_organ
from support.checkpoints import load_checkpoint
from support.devices import MixedPrecision, Processes, put_on

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA GPU')
on_both = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_cuda)], indirect=True)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch, tmp_path):
    """float32 in full instead of TF32, and no search for the fastest convolutions, which may take minutes then."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.fixture
def device(request):
    return torch.device(request.param)


def gpu_option(device):
    return '0' if device.type == 'cuda' else 'cpu'


# ---------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------

@needs_cuda
@pytest.mark.parametrize('name, network', [('basic4', FullNet), ('bottleneck', FullNet), ('fcn_pooling', FCN_pooling)])
def test_outputs_and_gradients_are_the_golden_ones(name, network):
    test_fullnet.test_outputs_and_gradients_are_the_published_ones(name, network, 'cuda')


@needs_cuda
def test_loss_and_training_step_are_the_golden_ones():
    test_loss.test_training_step_is_the_golden_one('cuda')


@needs_cuda
@pytest.mark.parametrize('i', range(8))
def test_sliding_window_is_the_golden_one(i):
    test_utils.test_sliding_window_is_the_golden_one(i, 'cuda')


@on_both
def test_default_network_gives_what_it_gives_on_the_cpu(device):
    """Channels last on CUDA, plain modules on the CPU: outputs and the loss within 1e-4."""
    model, image, target, weight = step_of(dict(drop_rate=0.0), size=48)
    expected = losses_of(copy.deepcopy(model).set_mode('plain'), image, target, weight)
    found = losses_of(put_on(device, model), *(values.to(device) for values in (image, target, weight)))
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def step_of(options, batch=2, size=96, seed=0):
    """A network in training mode, images, targets with instances and weights, on the CPU."""
    torch.manual_seed(seed)
    model = FullNet(3, 3, **options).train()
    target = torch.nn.functional.max_pool2d((torch.rand(batch, 1, size, size) > 0.998).float(), 9, 1, 4)[:, 0].long()
    image = torch.randn(batch, 3, size, size) - 2 * target[:, None]
    return model, image, target, 1 + 10 * torch.rand(batch, size, size)


def losses_of(model, image, target, weight):
    """(logits, loss, CE, variance term), and the gradients in the model."""
    logits = model(image)
    losses = VarCELoss()(logits, target, weight)
    losses[0].backward()
    return [logits.detach(), *(loss.detach() for loss in losses)]


@on_both
def test_amp_is_near_float32(device):
    """Probabilities within 0.02 with trained weights; the gradient points the same way."""
    checkpoint = load_checkpoint(test_script.PRETRAINED / 'FullNet_MultiOrgan.pth.tar')
    model, image, target, weight = (values if isinstance(values, FullNet) else values.to(device)
                                    for values in step_of(dict(drop_rate=0.0), batch=1, size=80))
    model.load_state_dict(checkpoint['state_dict'])
    precision = MixedPrecision(device, True)
    probabilities, gradients = [], []
    for amp in (False, True):
        network = put_on(device, copy.deepcopy(model).set_mode('auto', amp=amp))
        with precision.autocast() if amp else contextlib.nullcontext():
            with torch.no_grad():
                probabilities.append(network.eval()(image).float().softmax(1))
            logits = network.train()(image)
        VarCELoss()(logits.float(), target, weight)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]).float())
    assert 0 < (probabilities[0] - probabilities[1]).abs().max() <= 2e-2
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) >= 0.99


@on_both
def test_a_step_does_not_wait_for_the_gpu(device):
    """From the copies to the backward pass nothing asks the GPU for a number; the one `.tolist()` comes after it."""
    model, image, target, weight = step_of(dict(n_layers=4, growth_rate=8))
    batch = image, (weight * 20).byte(), target.byte(), label_instances(target)
    if device.type == 'cuda':
        batch = [values.pin_memory() for values in batch]
    model, criterion = put_on(device, model), VarCELoss()
    optimizer = torch.optim.Adam(model.parameters())
    for mode in ('default', 'error'):                                  # the first step may wait: memory, algorithms
        if device.type == 'cuda':
            torch.cuda.set_sync_debug_mode(mode)
        try:
            image, weight, target, instances = train.to_device(batch, device, True)
            with MixedPrecision(device, device.type == 'cuda').autocast():
                logits = model(image)
            losses = criterion(logits.float(), target, weight, instances)
            results = torch.stack([*losses, *train.pixel_results(logits, target)]).detach()
            losses[0].backward()
            optimizer.step()
        finally:
            if device.type == 'cuda':
                torch.cuda.set_sync_debug_mode('default')
        assert np.isfinite(results.tolist()).all()


# ---------------------------------------------------------------------------------------------------
# Training and testing
# ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_multi_organ(tmp_path_factory.mktemp('data'), n_train=5)


def run(data, device, save_dir, *words):
    """Train 2 epochs of 3 steps, of which the last is short; the latest checkpoint."""
    train.main([*SMALL, '--epochs', '2', '--data-dir', str(data), '--save-dir', save_dir, '--gpu', gpu_option(device),
                *words])
    return load_checkpoint(Path(save_dir, 'checkpoints/checkpoint.pth.tar'))


@on_both
@pytest.mark.parametrize('words', ['--ema-decay 0.9 --clip-grad 1', '--amp True'])
def test_train_resume_and_test(data, device, words):
    whole = run(data, device, 'whole', *words.split(), '--workers', '2')
    assert whole['epoch'] == 2 and whole['step'] == 6 and np.isfinite(whole['history']).all()
    run(data, device, 'part', *words.split(), '--epochs', '1')
    train.main(['--checkpoint-path', 'part/checkpoints/checkpoint.pth.tar', '--epochs', '2', '--gpu',
                gpu_option(device)])
    resumed = load_checkpoint('part/checkpoints/checkpoint.pth.tar')
    # on CUDA the same images, seeds and rates, but sums in another order
    assert resumed['step'] == 6 and np.allclose(resumed['history'], whole['history'], rtol=0.05, atol=0.02)
    test_script.main(['--model-path', 'part/checkpoints/checkpoint.pth.tar', '--gpu', gpu_option(device),
                      '--img-dir', str(data / 'images/test_same'), '--label-dir', str(data / 'labels_instance/test')])
    assert len(list(Path('part/checkpoint').glob('test_same_segmentation/*_seg.tiff'))) == 2


@on_both
def test_a_compiled_run_has_the_losses_of_an_uncompiled_one(data, device, monkeypatch):
    if device.type == 'cpu':                                # traced as a whole; compiling needs a compiler and a minute
        monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='eager', fullgraph=True))
    words = ['--drop-rate', '0', '--lr', '0.0001']
    plain, compiled = (run(data, device, name, *words, '--compile', name) for name in ('False', 'True'))
    assert np.allclose(plain['history'], compiled['history'], rtol=1e-3, atol=1e-3)
    assert plain['state_dict'].keys() == compiled['state_dict'].keys()


@needs_cuda
@pytest.mark.parametrize('kind, dataset', [('nuclei', 'MultiOrgan'), ('gland', 'GlaS')])
def test_segmentations_and_scores_are_the_golden_ones(tmp_path, kind, dataset):
    test_test.test_segmentations_and_scores_are_the_golden_ones(tmp_path, kind, dataset, gpu='0')


@on_both
def test_foreground_without_augmentation_is_that_of_the_cpu(data, device):
    run(data, torch.device('cpu'), 'run')
    found = []
    for gpu in ('cpu', gpu_option(device)):
        test_script.main(['--model-path', 'run/checkpoints/checkpoint.pth.tar', '--tta', 'none', '--gpu', gpu,
                          '--img-dir', str(data / 'images/test_same'), '--save-dir', gpu, '--inside-threshold', '0.3'])
        found.append([tifffile.imread(path) > 0 for path in sorted(Path(gpu).rglob('*_seg.tiff'))])
    assert 0 < np.mean(found[0]) < 1 and np.mean(np.array(found[0]) == np.array(found[1])) >= 0.999


@on_both
def test_one_process_of_several(device, monkeypatch):
    """NCCL (gloo on the CPU), with itself: gradients, sums and batch statistics are those without it."""
    model, image, target, weight = step_of(dict(n_layers=4, growth_rate=4, drop_rate=0.0), size=32)
    model, *inputs = put_on(device, model), image.to(device), target.to(device), weight.to(device)
    alone = losses_of(copy.deepcopy(model), *inputs)
    backend = 'nccl' if device.type == 'cuda' else 'gloo'
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        processes = Processes([0] if device.type == 'cuda' else [])
        processes.count = 2                                            # so that it does not go the short way
        shared = processes.distribute(processes.synchronise_batch_norm(model))
        together = losses_of(shared, *inputs)
        for ours, theirs in zip(together, alone):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert processes.sums([1, 2.5]) == [1, 2.5] and processes.largest(7) == 7 and processes.from_first(3) == 3
        processes.copy_from_first(model.buffers())
        processes.wait()
    finally:
        distributed.destroy_process_group()


@needs_cuda
def test_amp_needs_less_memory_at_the_published_batch():
    peaks = []
    for amp in (False, True):
        model, image, target, weight = step_of({}, batch=8, size=208)
        model = put_on(torch.device('cuda'), model)
        image, target, weight = image.cuda(), target.cuda(), weight.cuda()
        torch.cuda.reset_peak_memory_stats()
        with MixedPrecision(torch.device('cuda'), amp).autocast():
            logits = model(image)
        VarCELoss()(logits.float(), target, weight)[0].backward()
        peaks.append(torch.cuda.max_memory_allocated() / 1e9)
        del model, logits
    print(f'peak memory of a step at batch 8: {peaks[0]:.1f} GB in float32, {peaks[1]:.1f} GB with amp')
    assert peaks[1] < 0.75 * peaks[0] < 30
