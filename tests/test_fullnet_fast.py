"""The fast path of FullNet on the CPU against the plain modules."""
import copy
import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from FullNet import FCN_pooling, FullNet
from support import cpu_stage
from support.cpu_stage import (LayerSpec, Workers, conv1x1_backward, conv3x3_backward, dropout_mask, keep_threshold,
                               normalise, run_fast)

GOLDEN = Path(__file__).parent / 'golden'
# dilations 1, 2, 3, 2, then 13, 15, 17, 19
TINY = dict(n_layers=4, growth_rate=3, drop_rate=0.0, dilations=(2, 16))


def make_network(network=FullNet, dtype=torch.float64, **options):
    """A network whose batch norms are not at their initial values."""
    torch.manual_seed(0)
    model = network(3, 3, **{**TINY, **options}).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def train_step(model, x, mode, memory_efficient=False, seed=0, amp=False):
    """One forward and backward pass of a copy: output, gradients by name (and of the input), buffers by name."""
    model = copy.deepcopy(model).set_mode(mode, memory_efficient, amp)
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    output = model(x)
    (output ** 2).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return output.detach(), {**gradients, 'input': x.grad}, dict(model.named_buffers())


def assert_close(actual, expected, tolerance):
    for name in expected:
        if expected[name] is None:
            assert actual[name] is None, name
        else:
            scale = expected[name].abs().max().clamp(min=1e-12)
            assert ((actual[name] - expected[name]).abs().max() <= tolerance * scale), name


def relative_distance(actual, expected):
    """Of all gradients together."""
    a, b = (torch.cat([gradients[name].flatten() for name in expected]) for gradients in (actual, expected))
    return (a - b).norm() / b.norm()


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param         # the fast path puts it back


@pytest.fixture
def small_pieces(monkeypatch):
    """Bands and strips so small that even tiny images have many."""
    monkeypatch.setattr(cpu_stage, 'BAND_PIXELS', 100)
    monkeypatch.setattr(cpu_stage, 'STRIP_PIXELS', 40)


# The same numbers as the plain path

@pytest.mark.parametrize('shape', [(2, 3, 24, 40), (1, 3, 1, 7), (3, 3, 7, 1), (1, 3, 13, 13), (2, 3, 33, 17)])
def test_training_equals_plain(shape, threads, small_pieces):
    model, x = make_network(), torch.randn(shape, dtype=torch.float64)
    for fast, plain in zip(train_step(model, x, 'fast')[1:], train_step(model, x, 'plain')[1:]):
        assert_close(fast, plain, 1e-9)


@pytest.mark.parametrize('shape', [(2, 3, 24, 40), (1, 3, 1, 1), (3, 3, 7, 50)])
def test_evaluation_equals_plain(shape, threads, small_pieces):
    model, x = make_network().eval(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(model.set_mode('fast')(x), model.set_mode('plain')(x), rtol=0, atol=1e-11)
    for fast, plain in zip(train_step(model, x, 'fast')[1:], train_step(model, x, 'plain')[1:]):
        assert_close(fast, plain, 1e-9)


def test_float32_equals_plain():
    model, x = make_network(dtype=torch.float32), torch.randn(2, 3, 60, 52)
    for slope, tolerance in ((0.01, 5e-2), (1.0, 1e-4)):
        # where an input of LeakyReLU is 0 up to rounding its gradient may come out either way; slope 1 has no kink
        for module in model.modules():
            if isinstance(module, nn.LeakyReLU):
                module.negative_slope = slope
        fast, plain = train_step(model, x, 'fast'), train_step(model, x, 'plain')
        assert_close({'output': fast[0]}, {'output': plain[0]}, 1e-4)
        assert relative_distance(fast[1], plain[1]) < tolerance
        assert_close(fast[2], plain[2], 1e-5)


@pytest.mark.parametrize('name', ['basic4', 'basic6'])
def test_golden_numbers(name):
    golden = np.load(GOLDEN / f'model_{name}.npz')
    model = FullNet(3, 3, **json.loads(str(golden['config']))).set_mode('fast')
    model.load_state_dict({k[3:]: torch.from_numpy(golden[k]) for k in golden if k.startswith('sd/')})
    for mode, key in ((model.eval, 'eval_output'), (model.train, 'train_output')):
        mode()
        output = model(torch.from_numpy(golden['input'])).detach().numpy()
        assert np.abs(output - golden[key]).max() < 1e-4 * np.abs(golden[key]).max()


def test_fcn_pooling_equals_plain():
    model = make_network(FCN_pooling, dilations=(1, 2, 4, 8, 16, 4, 1))
    x = torch.randn(2, 3, 40, 33, dtype=torch.float64)
    for fast, plain in zip(train_step(model, x, 'fast')[1:], train_step(model, x, 'plain')[1:]):
        assert_close(fast, plain, 1e-8)


def test_frozen_parameters_and_batch_norms():
    model = make_network()
    model.conv1.requires_grad_(False)
    model.blocks.block1.denselayer2.requires_grad_(False)
    model.blocks.block2.denselayer1.conv.bn.eval()
    x = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    for fast, plain in zip(train_step(model, x, 'fast')[1:], train_step(model, x, 'plain')[1:]):
        assert_close(fast, plain, 1e-9)


def test_channels_last_input():
    model, x = make_network(), torch.randn(2, 3, 20, 24, dtype=torch.float64)
    assert torch.allclose(train_step(model, x.contiguous(memory_format=torch.channels_last), 'fast')[0],
                          train_step(model, x, 'fast')[0])


def test_gradient_with_dropout_is_the_numerical_one(small_pieces):
    model = make_network(n_layers=4, growth_rate=2, drop_rate=0.3, dilations=(4,))
    block, transition = model.blocks.block1, model.blocks.trans1
    parameters = [*block.parameters(), *transition.parameters()]

    def stage(x, *_):
        torch.manual_seed(0)
        return run_fast(block, transition, x, False, x.dtype)
    x = torch.randn(2, 24, 4, 5, dtype=torch.float64, requires_grad=True)
    # fast_mode: the gradient along random directions, not one entry at a time
    assert gradcheck(stage, (x, *parameters), fast_mode=True)


# bfloat16

@pytest.mark.parametrize('training', [False, True])
def test_bfloat16_is_near_float32_and_in_float32_outside(training, small_pieces):
    torch.manual_seed(0)
    model = make_network(dtype=torch.float32, growth_rate=6).train(training)
    x = torch.randn(2, 3, 40, 37)
    exact, half = (train_step(model, x, 'fast', amp=amp) for amp in (False, True))
    assert half[0].dtype == torch.float32 and all(g.dtype == torch.float32 for g in half[1].values())
    error = (half[0] - exact[0]).norm() / exact[0].norm()
    assert 1e-4 < error < 0.05                                  # bfloat16 has 8 bits
    assert 1e-4 < relative_distance(half[1], exact[1]) < 0.25
    assert_close(half[2], exact[2], 0.02)


def test_bfloat16_gradients_of_weights_are_summed_in_float32(small_pieces):
    ones = torch.ones(2, 1, 120, 100, dtype=torch.bfloat16)         # a sum of bfloat16 would not reach 24,000 by 100s
    with Workers() as workers:
        point = conv1x1_backward(ones, torch.ones(1, 1, 1, 1), ones, workers)[1]
        square = conv3x3_backward(ones, torch.ones(1, 1, 3, 3), 1, F.pad(ones, (1, 1, 1, 1)), torch.zeros_like(ones),
                                  workers)
    assert point.item() == 2 * 120 * 100
    corner, above, beside = 2 * 119 * 99, 2 * 119 * 100, 2 * 120 * 99
    assert square.flatten().tolist() == [corner, above, corner, beside, 24000, beside, corner, above, corner]


# Dropout and memory_efficient

@pytest.mark.parametrize('amp', [False, True])
def test_memory_efficient_is_bit_for_bit_the_same(amp, threads):
    model, x = make_network(dtype=torch.float32, drop_rate=0.2), torch.randn(3, 3, 40, 37)
    fast, lean = (train_step(model, x, 'fast', memory_efficient, amp=amp) for memory_efficient in (False, True))
    assert torch.equal(fast[0], lean[0])
    for first, second in zip(fast[1:], lean[1:]):
        assert_close(second, first, 0)


def test_results_do_not_depend_on_the_number_of_threads():
    model, x = make_network(dtype=torch.float32, drop_rate=0.2), torch.randn(2, 24, 100, 120)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        block, transition = copy.deepcopy((model.blocks.block1, model.blocks.trans1))
        block_input = x.clone().requires_grad_()
        torch.manual_seed(0)
        output = run_fast(block, transition, block_input, False, torch.float32)
        output.square().sum().backward()
        results.append([output, block_input.grad, transition.bn.running_var, *(p.grad for p in block.parameters())])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize('drop_rate', [0.0, 0.1, 0.5, 0.999])
def test_dropout_mask_drops_the_right_share(drop_rate):
    torch.manual_seed(0)
    mask = dropout_mask((1, 7, 333, 501), drop_rate)
    if drop_rate == 0:
        assert mask is None
    else:
        keep = keep_threshold(drop_rate)[1]
        assert keep == pytest.approx(1 - drop_rate, abs=1e-5)
        assert mask.double().mean().item() == pytest.approx(keep, abs=5 * (keep * (1 - keep) / mask.numel()) ** 0.5)
        # neighbours, which share a random number, are independent
        pairs = (mask.flatten()[:-1] & mask.flatten()[1:]).double().mean().item()
        assert pairs == pytest.approx(keep ** 2, abs=2e-3)


def test_threads_are_put_back_where_two_contexts_overlap():
    torch.set_num_threads(2)
    first, second = Workers().__enter__(), Workers().__enter__()
    assert torch.get_num_threads() == 1 and first.threads == second.threads == 2
    first.__exit__()
    second.__exit__()
    assert torch.get_num_threads() == 2


def test_dropout_keeps_the_mean():
    ones, zero, one = torch.ones(2, 1, 300, 400), torch.zeros(1), torch.ones(1)
    out = torch.empty_like(ones)
    spec = LayerSpec(nn.BatchNorm2d(1, eps=0), False, 0.01, 1, drop_rate=0.3)
    with Workers() as workers:
        normalise(ones, zero, one, one, zero, spec, dropout_mask(ones.shape, 0.3), out, workers)
    assert out.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.allclose(out.unique(), torch.tensor([0, 1 / 0.7]), rtol=1e-4)


def test_dropout_repeats_with_the_seed_and_is_off_in_evaluation():
    model, x = make_network(drop_rate=0.4), torch.randn(1, 3, 12, 12, dtype=torch.float64)
    first, again, other = (train_step(model, x, 'fast', seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert_close(again[1], first[1], 0)
    model.eval()
    assert torch.allclose(model.set_mode('fast')(x), model.set_mode('plain')(x))


# Everything around it

def test_auto_takes_the_fast_path_only_where_it_can(monkeypatch):
    used = []
    monkeypatch.setattr(cpu_stage, 'run_fast', lambda *args: used.append(True) or run_fast(*args))

    def is_fast(model, x):
        used.clear()
        model.eval()(x)
        return bool(used)
    large, small = torch.randn(1, 3, 80, 80), torch.randn(1, 3, 20, 20)
    wide = dict(dtype=torch.float32, growth_rate=16)
    model = make_network(**wide)
    assert is_fast(model, large) and not is_fast(model, small)
    assert not is_fast(make_network(dtype=torch.float32), large)
    assert is_fast(make_network(dtype=torch.float32).set_mode('auto', memory_efficient=True), large)
    assert not is_fast(model.set_mode('plain'), large)
    assert is_fast(model.set_mode('fast'), small)
    assert not is_fast(make_network(growth_rate=16), large.double())
    assert not is_fast(make_network(**wide, layer_type='bottleneck'), large)
    with torch.autocast('cpu', torch.bfloat16):
        assert not is_fast(make_network(**wide), large)
    assert not is_fast(nn.SyncBatchNorm.convert_sync_batchnorm(make_network(**wide)), large)


def test_auto_with_channels_last_equals_plain():
    model, x = make_network(dtype=torch.float32).eval(), torch.randn(2, 3, 90, 80)
    with torch.no_grad():
        assert torch.allclose(model.set_mode('auto')(x), model.set_mode('plain')(x), atol=1e-4)


def test_errors():
    with pytest.raises(ValueError, match="mode is 'quick'; expected one of auto, plain, fast"):
        make_network().set_mode('quick')
    with pytest.raises(ValueError, match="not possible: it needs layer_type 'basic'"):
        make_network(layer_type='bottleneck').set_mode('fast')(torch.randn(1, 3, 8, 8, dtype=torch.float64))
    model = make_network()
    model.conv1.eval()
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model.set_mode('fast')(torch.randn(1, 3, 1, 1, dtype=torch.float64))


def test_inference_mode_equals_no_grad():
    model, x = make_network(dtype=torch.float32).set_mode('fast').eval(), torch.randn(2, 3, 20, 20)
    with torch.inference_mode():
        output = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), output)


def test_gradients_twice_through_one_graph():
    model = make_network().set_mode('fast')
    loss = model(torch.randn(2, 3, 12, 12, dtype=torch.float64)).square().mean()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, list(model.parameters()))):
        assert torch.equal(a, b)


@pytest.mark.parametrize('memory_efficient', [False, True])
def test_nothing_is_left_behind_after_a_step(memory_efficient):
    model, x = make_network(dtype=torch.float32).set_mode('fast', memory_efficient), torch.randn(2, 3, 20, 20)

    def tensors():
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    gc.disable()                # what only the garbage collector would free counts as left behind
    try:
        counts = []
        for _ in range(4):
            model.zero_grad()
            model(x).square().mean().backward()
            counts.append(tensors())
    finally:
        gc.enable()
    assert counts[-1] == counts[1]
