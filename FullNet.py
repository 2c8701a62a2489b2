"""FullNet, the full-resolution network of the paper (section 2.1), and FCN_pooling, its ablation with pooling."""
import math

import torch
from torch import nn
from torch.nn import functional as F

from support import cpu_stage
from support.script import InputError

# Hybrid dilation: the dilation of each layer of a dense block, by (block dilation, n_layers). Varied dilations leave
# fewer gaps in the receptive field ("gridding"; paper, section 2.1).
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
    """The dilations of the layers of a dense block, tuple of `n_layers` int.

    Raises ValueError for a pair (block_dilation, n_layers) that is not in HYBRID_DILATIONS.
    """
    if not is_hybrid:
        return (block_dilation,) * n_layers
    if (block_dilation, n_layers) not in HYBRID_DILATIONS:
        valid = ', '.join(f'({d}, {n})' for d, n in HYBRID_DILATIONS)
        raise ValueError(f'no hybrid dilations for (dilation, n_layers) = ({block_dilation}, {n_layers}); '
                         f'valid pairs are {valid}; or set is_hybrid to False')
    return HYBRID_DILATIONS[block_dilation, n_layers]


class ConvLayer(nn.Sequential):
    """Convolution without bias -> LeakyReLU -> batch norm: (B, in, H, W) -> (B, out, H, W). Batch norm comes last."""

    def __init__(self, in_channels, out_channels, kernel_size, dilation=1):
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2
        self.add_module('conv', nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding,
                                          dilation=dilation, bias=False))
        self.add_module('relu', nn.LeakyReLU(negative_slope=0.01, inplace=True))
        self.add_module('bn', nn.BatchNorm2d(out_channels))


class DenseLayer(nn.Module):
    """Compute `growth_rate` new channels from all channels so far: (B, C, H, W) -> (B, growth_rate, H, W)."""

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
    """Dense layers, one for each of `dilations`: (B, C, H, W) -> (B, C + n_layers * growth_rate, H, W).

    Each layer sees the input of the block and the output of all layers before it.
    """

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
    """block1, trans1, block2, trans2, ... one after the other; FCN_pooling also resamples between them.

    mode: 'plain' runs the modules as they are written above. 'fast' runs each dense block with its transition on the
    CPU by support/cpu_stage.py, with the same results up to rounding. 'auto' is 'fast' on the CPU for images of 80 x 80
    pixels or more, if the growth rate is at least 16 or memory_efficient or amp is set; else 'plain'. These two act in
    the fast mode only. On a GPU, torch.autocast does amp.
    """

    mode = 'auto'
    memory_efficient = False
    amp = False

    def forward(self, x):
        if cpu_stage.suits(self, x):
            return cpu_stage.run(self, x)
        if self.mode == 'auto' and x.device.type == 'cpu' and cpu_stage.is_large(x):
            x = x.contiguous(memory_format=torch.channels_last)        # the fastest layout for convolutions on the CPU
        return super().forward(x)


class FullNet(nn.Module):
    """Dense blocks at full resolution: (B, color_channels, H, W) -> (B, output_channels, H, W), any H and W.

    dilations: each entry adds a dense block (`n_layers` layers of `growth_rate` channels) and a 1x1 transition, which
    keeps the share `compress_ratio` of the channels. drop_rate: element-wise dropout after each layer. is_hybrid: vary
    the dilation inside a block. layer_type: 'basic' (one 3x3 convolution) or 'bottleneck' (1x1, then 3x3).
    Raises ValueError for values from which no network can be built.
    """

    def __init__(self, color_channels, output_channels=2, n_layers=6, growth_rate=24, compress_ratio=0.5,
                 drop_rate=0.1, dilations=(1, 2, 4, 8, 16, 4, 1), is_hybrid=True, layer_type='basic'):
        super().__init__()
        if layer_type not in LAYER_TYPES:
            raise ValueError(f"layer_type is '{layer_type}'; expected one of {', '.join(LAYER_TYPES)}")
        channels = 24                                            # of the first convolution, as published
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
        """FCN_pooling resamples after transition i. FullNet does not: every block keeps the input's resolution."""

    def reset_parameters(self):
        """Draw the initial weights: convolutions ~ N(0, variance 2 / (k * k * output channels)); batch norm 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def set_mode(self, mode='auto', memory_efficient=False, amp=False):
        """Choose how the same result is computed, see Stages. Returns self. Raises ValueError for an unknown mode."""
        if mode not in MODES:
            raise ValueError(f"mode is '{mode}'; expected one of {', '.join(MODES)}")
        self.blocks.mode, self.blocks.memory_efficient, self.blocks.amp = mode, memory_efficient, amp
        return self

    def forward(self, x):
        return self.conv2(self.blocks(self.conv1(x)))


class FCN_pooling(FullNet):
    """The paper's ablation: FullNet with 2x2 max pooling after blocks 1-4 and bilinear x4 upsampling after 5 and 6.

    (B, color_channels, H, W) -> (B, output_channels, H, W). Raises ValueError unless there are exactly 7 dilations.
    Deviation: the published output has only floor(H / 16) * 16 rows and floor(W / 16) * 16 columns. Here the input is
    zero-padded at the bottom and right to multiples of 16 and the output is cropped, so that it has the input's size.
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
    """Build the network of the option group `model`.

    Raises InputError for an unknown name, and for values from which no network can be built.
    """
    if name not in NETWORKS:
        raise InputError(f"no such model: its name is '{name}'; expected one of {', '.join(NETWORKS)}")
    try:
        return NETWORKS[name](in_c, out_c, **options)
    except (ValueError, TypeError) as error:
        raise InputError(f'no such model: {error}') from error
