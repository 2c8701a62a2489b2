"""FullNet, the full-resolution network of the paper (section 2.1), and FCN_pooling, its ablation with pooling."""
import math

import torch
from torch import nn
from torch.nn import functional as F

from support import cpu_stage
from support.script import InputError

# Hybrid dilation: the dilation of each layer of a dense block, by (block dilation, n_layers). Consecutive rates
# without a common factor leave no gridding in the receptive field (paper, section 2.1).
HYBRID_DILATIONS = {
    (1, 4): (1, 1, 1, 1),
    (2, 4): (1, 2, 3, 2),
    (4, 4): (1, 2, 5, 9),
    (8, 4): (3, 7, 10, 13),
    (16, 4): (13, 15, 17, 19),
    (1, 6): (1, 1, 1, 1, 1, 1),
    (2, 6): (1, 2, 3, 1, 2, 3),
    (4, 6): (1, 2, 3, 5, 6, 7),
    (8, 6): (2, 5, 7, 9, 11, 14),
    (16, 6): (10, 13, 16, 17, 19, 21),
}
LAYER_TYPES = ('basic', 'bottleneck')
MODES = ('auto', 'plain', 'fast')


def layer_dilations(block_dilation, n_layers, is_hybrid=True):
    """Dilation of each of the `n_layers` layers of a dense block. Raises ValueError for a pair not in the table."""
    if not is_hybrid:
        return (block_dilation,) * n_layers
    if (block_dilation, n_layers) not in HYBRID_DILATIONS:
        valid = ', '.join(f'({d}, {n})' for d, n in HYBRID_DILATIONS)
        raise ValueError(f'no hybrid dilations for (dilation, n_layers) = ({block_dilation}, {n_layers}); '
                         f'valid pairs are {valid}; or set is_hybrid to False')
    return HYBRID_DILATIONS[block_dilation, n_layers]


class ConvLayer(nn.Sequential):
    """Convolution without bias -> LeakyReLU -> batch norm, in this order. Keeps height and width."""

    def __init__(self, in_channels, out_channels, kernel_size, dilation=1):
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2
        self.add_module('conv', nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding,
                                          dilation=dilation, bias=False))
        self.add_module('relu', nn.LeakyReLU(negative_slope=0.01, inplace=True))
        self.add_module('bn', nn.BatchNorm2d(out_channels))


class DenseLayer(nn.Module):
    """`growth_rate` new channels from all channels so far: (B, C, H, W) -> (B, growth_rate, H, W)."""

    def __init__(self, in_channels, growth_rate, drop_rate, dilation, layer_type):
        super().__init__()
        self.drop_rate = drop_rate
        if layer_type == 'basic':
            self.conv = ConvLayer(in_channels, growth_rate, 3, dilation)
        else:
            self.conv1 = ConvLayer(in_channels, 4 * growth_rate, 1)
            self.conv2 = ConvLayer(4 * growth_rate, growth_rate, 3, dilation)

    def forward(self, x):
        for conv in self.children():
            x = conv(x)
        return F.dropout(x, self.drop_rate, self.training) if self.drop_rate > 0 else x


class DenseBlock(nn.Sequential):
    """`n_layers` dense layers, each fed with the block's input and the output of all layers before it."""

    def __init__(self, in_channels, growth_rate, drop_rate, dilations, layer_type):
        super().__init__()
        channels = in_channels
        for k, dilation in enumerate(dilations, start=1):
            self.add_module(f'denselayer{k}', DenseLayer(channels, growth_rate, drop_rate, dilation, layer_type))
            channels += growth_rate
        self.out_channels = channels

    def forward(self, x):
        for layer in self.children():
            x = torch.cat([x, layer(x)], dim=1)      # (B, C, H, W) -> (B, C + growth_rate, H, W)
        return x


class Stages(nn.Sequential):
    """block1, trans1, block2, trans2, ... (with resampling in FCN_pooling), one after the other.

    mode: 'plain' runs the modules as they are written above. 'fast' runs each pair of dense block and transition on the
    CPU through support/cpu_stage.py, with the same results. 'auto' is fast where that is possible and worth it.
    memory_efficient, amp: of the fast mode, see there; elsewhere amp is torch.autocast's business.
    """

    mode = 'auto'
    memory_efficient = False
    amp = False

    def forward(self, x):
        if cpu_stage.suits(self, x):
            return cpu_stage.run(self, x)
        if self.mode == 'auto' and x.device.type == 'cpu' and cpu_stage.is_large(x):
            x = x.contiguous(memory_format=torch.channels_last)          # the layout the CPU's convolutions like best
        return super().forward(x)


class FullNet(nn.Module):
    """Dense blocks at full resolution: (B, color_channels, H, W) -> (B, output_channels, H, W), any H and W.

    dilations: one dense block (`n_layers` layers of `growth_rate` channels) for each entry, followed by a 1x1
    transition that keeps `compress_ratio` of the channels. drop_rate: element-wise dropout after each layer.
    is_hybrid: vary the dilation inside a block. layer_type: 'basic' (one 3x3) or 'bottleneck' (1x1, then 3x3).
    Raises ValueError for values that make no network.
    """

    def __init__(self, color_channels, output_channels=2, n_layers=6, growth_rate=24, compress_ratio=0.5,
                 drop_rate=0.1, dilations=(1, 2, 4, 8, 16, 4, 1), is_hybrid=True, layer_type='basic'):
        super().__init__()
        if layer_type not in LAYER_TYPES:
            raise ValueError(f"layer_type is '{layer_type}'; expected one of {', '.join(LAYER_TYPES)}")
        channels = 24
        self.conv1 = ConvLayer(color_channels, channels, 3)
        self.blocks = Stages()
        for i, block_dilation in enumerate(dilations, start=1):
            block = DenseBlock(channels, growth_rate, drop_rate,
                               layer_dilations(block_dilation, n_layers, is_hybrid), layer_type)
            channels = math.floor(block.out_channels * compress_ratio)
            if channels < 1:
                raise ValueError(f'compress_ratio {compress_ratio} leaves no channel after block {i}')
            self.blocks.add_module(f'block{i}', block)
            self.blocks.add_module(f'trans{i}', ConvLayer(block.out_channels, channels, 1))
            self.add_resampling(i)
        self.conv2 = nn.Conv2d(channels, output_channels, 3, padding=1, bias=False)
        self.reset_parameters()

    def add_resampling(self, i):
        """FullNet has none: every block works at the input's resolution."""

    def reset_parameters(self):
        """Convolutions ~ N(0, 2 / (k * k * output channels)), batch norm 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def set_mode(self, mode='auto', memory_efficient=False, amp=False):
        """How to compute, not what: see Stages. Raises ValueError for an unknown mode. Returns self."""
        if mode not in MODES:
            raise ValueError(f"mode is '{mode}'; expected one of {', '.join(MODES)}")
        self.blocks.mode, self.blocks.memory_efficient, self.blocks.amp = mode, memory_efficient, amp
        return self

    def forward(self, x):
        return self.conv2(self.blocks(self.conv1(x)))


class FCN_pooling(FullNet):
    """The paper's ablation: FullNet with 2x2 max pooling after blocks 1-4 and bilinear x4 upsampling after 5 and 6.

    Needs exactly 7 dilations. The published forward returns floor(H / 16) * 16 rows and columns; here the input is
    zero-padded (bottom, right) to multiples of 16 and the output cropped back, so that it too has the input's size.
    """

    def __init__(self, color_channels, output_channels=2, n_layers=6, growth_rate=24, compress_ratio=0.5,
                 drop_rate=0.1, dilations=(1, 2, 4, 8, 16, 4, 1), is_hybrid=True, layer_type='basic'):
        if len(dilations) != 7:
            raise ValueError(f'FCN_pooling needs exactly 7 dilations, found {len(dilations)}')
        super().__init__(color_channels, output_channels, n_layers, growth_rate, compress_ratio, drop_rate,
                         dilations, is_hybrid, layer_type)

    def add_resampling(self, i):
        if i <= 4:
            self.blocks.add_module(f'pool{i}', nn.MaxPool2d(2))
        elif i <= 6:
            self.blocks.add_module(f'upsample{i}', nn.Upsample(scale_factor=4, mode='bilinear', align_corners=True))

    def forward(self, x):
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 16, 0, -height % 16))
        return super().forward(x)[..., :height, :width]


NETWORKS = {'FullNet': FullNet, 'FCN_pooling': FCN_pooling}


def create_model(name='FullNet', in_c=3, out_c=3, **options):
    """The network of the `model` option group. Raises InputError for an unknown name or values that fit no network."""
    if name not in NETWORKS:
        raise InputError(f"no such model: its name is '{name}'; expected one of {', '.join(NETWORKS)}")
    try:
        return NETWORKS[name](in_c, out_c, **options)
    except (ValueError, TypeError) as error:
        raise InputError(f'no such model: {error}') from error


# The fast path on the CPU




