"""FullNet and FCN_pooling against the golden numbers and against what the paper says of them."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from FullNet import FCN_pooling, FullNet, create_model
from support.devices import put_on

GOLDEN = Path(__file__).parent / 'golden'
SMALL = dict(n_layers=4, growth_rate=4, drop_rate=0.0)


def relative_difference(a, b):
    """Of a tensor and the array that it should be, by the array's largest value."""
    return np.abs(a.cpu().numpy() - b).max() / np.abs(b).max()


@pytest.mark.parametrize('name, network', [('basic4', FullNet), ('basic6', FullNet), ('bottleneck', FullNet),
                                           ('fcn_pooling', FCN_pooling)])
def test_outputs_and_gradients_are_the_published_ones(name, network, device='cpu'):
    golden = np.load(GOLDEN / f'model_{name}.npz')
    model = network(3, 3, **json.loads(str(golden['config'])))
    model.load_state_dict({k[3:]: torch.from_numpy(golden[k]) for k in golden if k.startswith('sd/')})
    model, input = put_on(torch.device(device), model), torch.from_numpy(golden['input']).to(device)
    with torch.no_grad():
        assert relative_difference(model.eval()(input), golden['eval_output']) < 1e-4
    output = model.train()(input)
    assert relative_difference(output.detach(), golden['train_output']) < 1e-4
    (output ** 2).mean().backward()
    assert relative_difference(model.conv1.conv.weight.grad, golden['grad_conv1']) < 2e-2
    assert relative_difference(model.conv2.weight.grad, golden['grad_last']) < 1e-3


@pytest.mark.parametrize('name, network', [('fullnet', FullNet), ('fcn_pooling', FCN_pooling)])
def test_state_dict_has_the_published_names_and_shapes(name, network):
    published = json.loads((GOLDEN / f'{name}_state_dict.json').read_text())
    found = {k: list(v.shape) for k, v in network(3, 3).state_dict().items()}
    assert list(found.items()) == list(published.items())            # in this order: Adam's state goes by the order
    channels = network(3, 3, **SMALL, compress_ratio=0.32).blocks.trans1.conv.out_channels
    assert channels == 12                                            # of 24 + 4 * 4: 12.8, rounded down


def test_a_pair_outside_the_hybrid_table_is_an_error_that_names_the_valid_ones():
    with pytest.raises(ValueError, match=r'no hybrid dilations for .* \(3, 6\); valid pairs are \(1, 4\)'):
        FullNet(3, 3, dilations=(1, 3))


def test_initial_weights():
    torch.manual_seed(0)
    model = FullNet(3, 3, growth_rate=8)
    weight = model.blocks.trans3.conv.weight                   # 1x1
    assert weight.std().item() == pytest.approx(math.sqrt(2 / weight.shape[0]), rel=0.05)
    weight = model.blocks.block3.denselayer6.conv.conv.weight  # 3x3
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 8)), rel=0.05)
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize('network', [FullNet, FCN_pooling])
@pytest.mark.parametrize('size', [(1, 1), (1, 37), (33, 48), (50, 47)])
def test_output_has_the_size_of_the_input(network, size):
    with torch.no_grad():
        assert network(3, 3, **SMALL).eval()(torch.randn(1, 3, *size)).shape == (1, 3, *size)


def test_fcn_pooling_pads_to_multiples_of_16_and_crops_back():
    torch.manual_seed(0)
    model = FCN_pooling(3, 3, **SMALL).eval()
    image = torch.randn(1, 3, 40, 50)
    padded = torch.zeros(1, 3, 48, 64)
    padded[:, :, :40, :50] = image
    with torch.no_grad():
        torch.testing.assert_close(model(image), model(padded)[:, :, :40, :50])


def test_dropout_works_in_training_and_is_off_in_evaluation():
    torch.manual_seed(0)
    layer = FullNet(3, 3, n_layers=4, growth_rate=4).blocks.block1.denselayer1
    dropped = (layer(torch.randn(1, 24, 60, 60)) == 0).float().mean((0, 2, 3))           # element-wise, not channels
    assert ((dropped - 0.1).abs() < 0.03).all()                                          # by default
    model = FullNet(3, 3, n_layers=4, growth_rate=4, drop_rate=0.5)
    image = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        assert not torch.equal(model(image), model(image))
        model.eval()
        assert torch.equal(model(image), model(image))


@pytest.mark.parametrize('arguments, message', [
    (dict(name='UNet'), "no such model: its name is 'UNet'; expected one of FullNet, FCN_pooling"),
    (dict(layer_type='wide'), "layer_type is 'wide'; expected one of basic, bottleneck"),
    (dict(name='FCN_pooling', dilations=(1, 2)), 'FCN_pooling needs exactly 7 dilations, found 2'),
    (dict(compress_ratio=0.001), 'compress_ratio 0.001 leaves no channel after block 1'),
])
def test_values_that_fit_no_network(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(**arguments)
