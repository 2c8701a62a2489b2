"""Load and check checkpoints and mean_std.npy without running code in them; save them; average weights."""
import copy
import io
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import torch

from support.files import atomic_path
from support.images import load_npy
from support.script import InputError

# Published checkpoints hold a NumPy scalar, `best_iou`. These are the types that loading it needs, under NumPy's old
# and new names.
_NUMPY_SCALARS = [
    np.dtype, *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)),
    *((np.float64().__reduce__()[0], f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
]


def load_checkpoint(path):
    """Load a checkpoint, ours or a published one, to the CPU. Returns a dict.

    The keys of its `state_dict` lose the prefix `module.`. Only tensors and plain values are unpickled
    (`weights_only`), so that a checkpoint from a stranger cannot run code. Raises InputError if the file is missing,
    damaged or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f'no checkpoint at {path}; train first, or give --model-path / --checkpoint-path')
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            # reading from memory: a damaged length of gigabytes cannot allocate more than the file has
            checkpoint = torch.load(io.BytesIO(path.read_bytes()), map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        if 'global' in str(error).lower():             # it names a type other than tensors and plain values
            raise InputError(f'{path} holds more than weights and plain values, and was not loaded: it could run '
                             f'code; get the checkpoint from its authors as weights only') from error
        raise InputError(f'{path} is not a checkpoint, or is damaged; copy it again') from error
    except Exception as error:                         # on a damaged pickle PyTorch can raise almost any error
        raise InputError(f'{path} is not a checkpoint, or is damaged ({type(error).__name__}); '
                         f'copy it again') from error
    weights = checkpoint.get('state_dict') if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor)
                                                for k, v in weights.items()):
        raise InputError(f'{path} is not a checkpoint: expected a dict with a state_dict of tensors')
    checkpoint['state_dict'] = {key.removeprefix('module.'): value for key, value in weights.items()}
    options = checkpoint.get('options')
    if not isinstance(options, dict) or not isinstance(options.get('dataset'), str) or \
            not all(isinstance(options.get(group), dict) for group in ('model', 'train', 'transform')) or \
            'compress_ratio' not in options['model']:
        checkpoint.pop('options', None)                # of another program: ignored, as if published
    return checkpoint


def save_checkpoint(path, checkpoint):
    """Save a checkpoint atomically. The keys of its state_dict get the prefix `module.` of the published format."""
    weights = {f'module.{key}': value for key, value in checkpoint['state_dict'].items()}
    buffer = io.BytesIO()                          # on a full disk torch.save itself raises no OSError
    torch.save({**checkpoint, 'state_dict': weights}, buffer)
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())                    # before the rename, in case the machine stops


def architecture(state_dict):
    """Read model options off the shapes in a state_dict.

    Returns ({option name: value}, number of dense blocks). Raises KeyError, ValueError or IndexError for keys that
    are not those of a FullNet.
    """
    blocks = sorted({int(key.split('.')[1][5:]) for key in state_dict if key.startswith('blocks.block')})
    layers = {int(key.split('.')[2][10:]) for key in state_dict if key.startswith('blocks.block1.denselayer')}
    found = {'in_c': state_dict['conv1.conv.weight'].shape[1], 'out_c': state_dict['conv2.weight'].shape[0],
             'n_layers': max(layers)}
    if 'blocks.block1.denselayer1.conv2.conv.weight' in state_dict:
        found['layer_type'] = 'bottleneck'
        found['growth_rate'] = state_dict['blocks.block1.denselayer1.conv2.conv.weight'].shape[0]
    else:
        found['layer_type'] = 'basic'
        found['growth_rate'] = state_dict['blocks.block1.denselayer1.conv.conv.weight'].shape[0]
    return found, len(blocks)


def load_weights(model, state_dict, options, path):
    """Load a state_dict into `model`. options: the group `model`, from which it was built. path: for messages.

    float16 and float64 weights are converted to float32, with a note. Raises InputError if the weights do not fit or
    are not finite. It names the options that the shapes contradict, and missing and extra keys.
    """
    expected = model.state_dict()
    shapes_differ = [key for key in expected if key in state_dict and expected[key].shape != state_dict[key].shape]
    missing = [key for key in expected if key not in state_dict]
    extra = [key for key in state_dict if key not in expected]
    if missing or extra or shapes_differ:
        raise InputError(f'{path} does not fit the model: {_what_differs(state_dict, options)}'
                         + _name_keys('missing', missing) + _name_keys('extra', extra)
                         + _name_keys('of another shape', shapes_differ))
    for key, value in state_dict.items():
        if value.is_floating_point() != expected[key].is_floating_point():                   # integers, complex
            raise InputError(f'{path}: {key} holds {value.dtype}, expected {expected[key].dtype}; copy it again')
    try:
        # checked as float32, the type in which they are used: 1e300 is infinite there
        not_finite = [key for key, value in state_dict.items() if not torch.isfinite(value.float()).all()]
        model.load_state_dict(state_dict)
    except (RuntimeError, NotImplementedError) as error:         # sparse, quantised, or larger than their data
        raise InputError(f'{path} holds tensors that are not weights ({str(error).splitlines()[0]}); '
                         f'copy it again') from error
    if not_finite:
        raise InputError(f'{path}: {not_finite[0]} holds NaN or infinite weights; use an earlier checkpoint')
    types = {value.dtype for value in state_dict.values() if value.is_floating_point()} - {torch.float32}
    if types:
        warnings.warn(f'{path}: {", ".join(str(t).removeprefix("torch.") for t in types)} weights, '
                      f'converted to float32', stacklevel=2)


def _name_keys(what, keys):
    """Part of a message: the number of keys and the first three; '' if there are none."""
    if not keys:
        return ''
    names = ', '.join(repr(key)[1:-1][:100] for key in keys[:3])           # a stranger's keys may hold line breaks
    return f'; {len(keys)} {what}: {names}' + (', ...' if len(keys) > 3 else '')


def _what_differs(state_dict, options):
    """Part of a message: the options that a state_dict contradicts."""
    try:
        found, n_blocks = architecture(state_dict)
    except (KeyError, ValueError, IndexError):
        return 'its keys are not those of a FullNet'
    differing = [f'{name} is {value} in the file, {options[name]} in the options'
                 for name, value in found.items() if options[name] != value]
    if n_blocks != len(options['dilations']):
        differing.append(f'{n_blocks} dense blocks in the file, dilations has {len(options["dilations"])}')
    return ', '.join(differing) or 'compress_ratio or another option differs'


class WeightAverage:
    """Exponential moving average of a network's weights and batch-norm statistics. `model` is the averaged network.

    decay: share of the average that is kept in a step, such as 0.999. In step t it is at most (1 + t) / (10 + t), so
    that the initial weights are soon forgotten.
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.step = decay, None
        own, network = self.model.state_dict(), model.state_dict()           # these tensors are those of the networks
        floats = [name for name, value in own.items() if value.is_floating_point()]
        counters = [name for name in own if name not in floats]              # num_batches_tracked
        self.floats, self.counters = ([[state[name] for name in names] for state in (own, network)]
                                      for names in (floats, counters))

    @torch.no_grad()
    def update(self):
        """Update the average after a training step of the network."""
        # The number of steps comes from batch norm, which counts them; so it is right after a resume. It is read only
        # once, because reading it waits for the GPU.
        self.step = int(self.counters[1][0]) if self.step is None else self.step + 1
        torch._foreach_lerp_(*self.floats, 1 - min(self.decay, (1 + self.step) / (10 + self.step)))
        torch._foreach_copy_(*self.counters)


def load_mean_std(path):
    """Load mean_std.npy: float64 (2, 3), mean and standard deviation of each RGB channel, in [0, 1].

    Raises InputError if the file is missing or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f'no {path}; prepare_data.py writes it')
    array = load_npy(path)
    return check_mean_std(array, path)


def load_mean_std_of_run(data_dir, checkpoint, path):
    """Load data_dir's mean_std.npy, float64 (2, 3), and compare it with that in the checkpoint loaded from `path`.

    Raises InputError if they differ: the checkpoint was trained on other images. Published checkpoints have none.
    """
    mean_std = load_mean_std(Path(data_dir) / 'mean_std.npy')
    if 'mean_std' in checkpoint and not np.allclose(mean_std, check_mean_std(checkpoint['mean_std'], path), rtol=0,
                                                    atol=1e-9):
        raise InputError(f'{data_dir}/mean_std.npy is not that of {path}, which was trained on other images; give the '
                         f'--data-dir of its run, or start a new run on these images with --init-from')
    return mean_std


def check_mean_std(array, path):
    """Return `array` as float64 (2, 3). Raises InputError that names `path` if it is no mean and standard deviation."""
    try:
        array = np.asarray(array)
    except ValueError:                                     # rows of different lengths
        array = np.array(None)
    if array.shape != (2, 3) or array.dtype.kind != 'f' or not np.isfinite(array).all():
        raise InputError(f'{path} holds {array.dtype} of shape {array.shape}; expected finite floats of shape (2, 3), '
                         f'mean and standard deviation per channel; prepare_data.py writes it')
    if (array[1] <= 0).any():
        raise InputError(f'{path} has a standard deviation of 0 or less; run prepare_data.py again')
    if array.min() < 0 or array.max() > 1:
        raise InputError(f'{path} holds values from {array.min():g} to {array.max():g}; expected colour values '
                         f'from 0 to 1; prepare_data.py writes it')
    return array.astype(np.float64)
