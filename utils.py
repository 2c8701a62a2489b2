"""What the scripts share: user errors, safe saving, sliding window, post-processing, metrics."""
import argparse
import atexit
import contextlib
import copy
import datetime
import errno
import hashlib
import io
import itertools
import math
import os
import pickle
import platform
import re
import shlex
import signal
import sys
import time
import uuid
import warnings
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import tifffile
import torch
from PIL import Image
from scipy import ndimage, sparse
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import cKDTree
from skimage import measure, morphology, segmentation
from torch import distributed, nn
from torch.nn import functional as F
from tqdm import tqdm

from FullNet import create_model

try:
    import fcntl
except ImportError:                                # Windows
    import msvcrt
    fcntl = None

tqdm.disable = True                                # of a bar that a signal stops while it is made: nothing to close


# ---------------------------------------------------------------------------------------------------
# Errors and script exit codes
# ---------------------------------------------------------------------------------------------------

class InputError(ValueError):
    """Something the user can mend. Its message is one line: what was found, expected, where, what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose user's mistakes are one line, an InputError."""

    def error(self, message):
        raise InputError(f'{message} (see python {self.prog} --help)')


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_script(main):
    """Run `main()` as a program and exit with 0 (done), 2 (the user can mend it), 130 / 143 (SIGINT / SIGTERM).

    An `InputError`, a missing or forbidden file, a full disk and too little memory are one line on stderr. Any other
    exception is a bug of ours: it keeps its traceback and exits with 1.
    """
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:                            # closed by the shell, as `>&-` does
            setattr(sys, name, open(os.devnull, 'w'))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')         # file names that the terminal cannot show
    warnings.showwarning = lambda message, *_: _say(f'note: {message}')
    with contextlib.suppress(InputError):                         # which `Processes` raises, where there are any
        if place_among_processes()[0] > 0:                        # of those that torchrun started one speaks
            sys.stdout = open(os.devnull, 'w')
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))       # temporary files are removed
    try:
        for word in sys.argv[1:]:
            check_name(word)
        main()
        sys.stdout.flush()
    except InputError as error:
        # a loader process wraps the message in its traceback
        _exit_with(2, 'error: ' + str(error).rsplit('InputError: ', 1)[-1])
    except BrokenPipeError:                        # `python test.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno in DISK_FULL:
            _exit_with(2, f'error: {no_space(error)}; free some space and run the same command again')
        if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR,
                           errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP):
            _exit_with(2, f'error: {error.strerror}: {error.filename}')
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            said = (str(error) or type(error).__name__).splitlines()[0][:100]
            _exit_with(2, f'error: not enough memory ({said}); make the images, --patch-size, --input-size, '
                          f'--batch-size or the network smaller')
        raise
    except KeyboardInterrupt:
        _exit_with(130, 'interrupted')


def no_space(error):
    """What an OSError with an errno of DISK_FULL says."""
    return f'no space left on the disk while writing {error.filename or "a file"}'


class StopRequest:
    """Ctrl-C and SIGTERM ask a long computation to stop at the next `check`; a second one stops it at once.

    A context manager, for the main thread. `check(save)` does nothing until a signal came; then it calls `save()` and
    exits with 130 (SIGINT) or 143 (SIGTERM). Of several `processes` all check as often, and all stop when one is asked;
    there a second signal is none: torchrun passes the first one on to those that got it already.
    """

    def __init__(self, processes):
        self.processes = processes

    def __enter__(self):
        self.signal = None
        self.before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        alone = self.processes.count == 1
        if self.signal is not None and alone:
            if number == signal.SIGTERM:
                sys.exit(128 + number)
            raise KeyboardInterrupt
        self.signal = number
        if self.processes.rank == 0:
            _say('\nstopping after this step, with a checkpoint' + '; once more to stop at once' * alone)

    def check(self, save):
        number = self.processes.largest(self.signal or 0)
        if number:
            save()
            self.processes.wait()
            sys.exit(128 + number)


def check_name(name, place='the command line'):
    """Raise InputError if a name holds bytes that Python could not decode: no text file could hold it."""
    if any('\ud800' <= character <= '\udfff' for character in name):
        encoding = sys.getfilesystemencoding()
        remedy = 'rename it' if encoding == 'utf-8' else f'Python reads names as {encoding}: set PYTHONUTF8=1'
        raise InputError(f'{place}: the name {ascii(name)} is not UTF-8; {remedy}')


def _say(message):
    with contextlib.suppress(OSError):            # nobody reads it: Ctrl-C ends `tee` too in `train.py 2>&1 | tee log`
        print(message, file=sys.stderr)


def _exit_with(code, message):
    _say(' '.join(message.split('\n')).strip())
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------
# Saving files: never half-written
# ---------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path` (same extension); rename it to `path` if the block succeeds.

    A reader sees the old file or the whole new one, never a part. On an exception the temporary file
    is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f'.tmp_{uuid.uuid4().hex}{path.suffix}'      # named first, so that no signal loses it
    try:
        yield str(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


class FolderLock:
    """A lock of the system on `folder/.lock`, so that at most one process writes into a folder. Makes the folder.

    It ends with `release()`, with the block of `with`, or with the process, however that ends: the file that a killed
    one leaves locks nothing. Other computers see it if their file system has locks; on one that has none there is a
    note, and no lock. A process may lock a folder again. Of torchrun's processes, those that share a folder lock it
    once for every `rank`. Raises InputError that names the process which holds the lock.
    """

    def __init__(self, folder, rank=0):
        self.path = Path(folder) / f'.lock{rank or ""}'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self._open()
        if not self.is_in_place():                 # its last owner removed it between opening and locking
            os.close(self.file)
            self.file = self._open()
        os.truncate(self.file, 0)
        os.write(self.file, f'process {os.getpid()} on {platform.node()}\n'.encode())
        atexit.register(self.release)

    def _open(self):
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):
            owner = os.read(file, 1000).decode(errors='replace').strip()
            os.close(file)
            raise InputError(f'{self.path.parent} is being written by another process ({owner or "just started"}); '
                             f'wait until it has ended, or choose another folder') from None
        except OSError as error:
            warnings.warn(f'{self.path.parent} cannot be locked ({error.strerror}): let only one process write there',
                          stacklevel=3)
        return file

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release()

    def is_in_place(self):
        """Whether the folder still is where it was, and the lock in it."""
        try:
            return os.path.samestat(os.fstat(self.file), os.stat(self.path))
        except OSError:
            return False

    def check(self):
        """Raise InputError if the folder is no longer where it was: what is written now would lie apart."""
        if not self.is_in_place():
            raise InputError(f'{self.path.parent} was moved or deleted while it was written; run the same command '
                             f'again, with the place where it is now: what is finished is kept')

    def release(self):
        """End the lock and remove its file."""
        atexit.unregister(self.release)
        if self.file is not None:
            if self.is_in_place():
                with contextlib.suppress(OSError):                       # Windows removes no open file
                    self.path.unlink()
            os.close(self.file)
            self.file = None


def _lock(file):
    """Lock an open file for this process. Raises BlockingIOError or PermissionError if another process has done so.

    A lock by lockf belongs to the process: its loader processes do not inherit it, so that none is left by a kill.
    """
    if fcntl:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        os.lseek(file, 2 ** 30, os.SEEK_SET)                             # a locked byte cannot be read
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)


def write_text(path, text):
    """Write `text` (UTF-8) to `path`, atomically."""
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding='utf-8')


def sha256_of(path):
    """Hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while piece := file.read(2 ** 20):
            digest.update(piece)
    return digest.hexdigest()


def save_image(path, array):
    """Save a uint8 (H, W) or (H, W, 3) array as an image, or a uint16 (H, W) array as PNG, atomically.

    The format is that of the extension of `path` (.png, .bmp, ...).
    """
    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(array)).save(temporary)


BIG = 2 ** 32 - 2 ** 25                            # bytes of pixels: a plain TIFF ends at 4 GB


def save_instances(path, label):
    """Save an instance label (H, W) as TIFF (deflate) or PNG, by the extension of `path`; uint16, above 65,535 uint32.

    A TIFF of 4 GB of pixels is a BigTIFF. Raises ValueError if a PNG is asked to hold ids above 65,535.
    """
    path = Path(path)
    dtype = np.uint16 if label.max(initial=0) <= np.iinfo(np.uint16).max else np.uint32
    pixels = label.astype(dtype)
    if path.suffix.lower() == '.png':
        if dtype == np.uint32:
            raise ValueError(f'{path}: a PNG holds no ids above 65,535; save it as TIFF')
        save_image(path, pixels)
        return
    with atomic_path(path) as temporary:
        # by itself tifffile takes BigTIFF for uncompressed data only
        tifffile.imwrite(temporary, pixels, compression='zlib', photometric='minisblack', bigtiff=pixels.nbytes > BIG)


# ---------------------------------------------------------------------------------------------------
# Devices
# ---------------------------------------------------------------------------------------------------

def choose_device(gpu='auto', process=0, n_processes=1):
    """The torch device for the `gpu` option: 'auto' = CUDA, Apple MPS or CPU, whichever is there first; [] = CPU; a
    list of CUDA numbers. Of several processes on this machine, `process` is the number of this one, and each gets a GPU
    of its own. Raises InputError if a GPU is not there or cannot be used, or if one process is to use several; for
    'auto' and one process, a GPU that cannot be used is a note, and the CPU is taken.
    """
    count = torch.cuda.device_count()
    if gpu == 'auto' and n_processes == 1 and count == 0:
        return torch.device('mps' if torch.backends.mps.is_available() else 'cpu')
    if not gpu or gpu == 'auto' and count == 0:
        return torch.device('cpu')
    numbers = range(count) if gpu == 'auto' else gpu
    missing = [number for number in numbers if number >= count]
    if missing:
        raise InputError(f'--gpu asks for GPU {missing[0]}, but {count} CUDA GPUs were found; '
                         f'use --gpu cpu, or leave it out')
    if gpu != 'auto' and len(gpu) > 1 and n_processes == 1:
        raise InputError(f'--gpu names {len(gpu)} GPUs, and one process uses one; start a process for each with: '
                         f'torchrun --nproc-per-node {len(gpu)} {shlex.join(sys.argv)}')
    if process >= len(numbers):
        raise InputError(f'torchrun started more processes on this machine than the {len(numbers)} GPUs there are for '
                         f'them; use --nproc-per-node {len(numbers)}, or --gpu cpu')
    device = torch.device('cuda', numbers[process])
    problem = problem_of(device)
    if problem and gpu == 'auto' and n_processes == 1:
        warnings.warn(f'GPU {device.index} cannot be used ({problem}); the CPU is used instead', stacklevel=2)
        return torch.device('cpu')
    if problem:
        raise InputError(f'GPU {device.index} cannot be used ({problem}); use --gpu cpu, or a PyTorch that fits the '
                         f'GPU and its driver')
    return device


def problem_of(device):
    """Why nothing can be computed on a device that was found, one line; None if all is well."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                       # PyTorch's, of many lines, on what the error says
            torch.zeros(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:
        return (str(error) or type(error).__name__).splitlines()[0][:200]


def place_among_processes():
    """(rank, local rank, count): the number of this process on all machines and on its own, and how many there are.

    torchrun's environment variables say so; without them it is (0, 0, 1). Raises InputError if one of them is missing,
    empty or no such number.
    """
    names = 'WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_PORT', 'MASTER_ADDR'
    values = {name: os.environ[name] for name in names if name in os.environ}
    if not values.keys() & {'WORLD_SIZE', 'RANK', 'LOCAL_RANK'}:
        return 0, 0, 1
    if values.get('WORLD_SIZE') == '1':            # other launchers leave this too; one process has nobody to speak to
        values = {'RANK': '0', 'LOCAL_RANK': '0', **values, 'MASTER_PORT': '0', 'MASTER_ADDR': 'none'}

    def problem(name):
        value = values.get(name)
        if not value:
            return 'missing' if value is None else 'empty'
        if name == 'MASTER_ADDR':
            return None
        if not re.fullmatch('[0-9]{1,9}', value):
            return f'{value!r}, expected a number'
        end = {'WORLD_SIZE': math.inf, 'MASTER_PORT': 2 ** 16}.get(name) or int(values['WORLD_SIZE'])
        return f'{value}, expected less than {end}' if int(value) >= end else None

    for name in names:
        if problem(name):
            raise InputError(f'the environment variable {name} is {problem(name)}; torchrun sets {", ".join(names)}: '
                             f'start with torchrun, or as a single process after: unset RANK LOCAL_RANK WORLD_SIZE')
    return tuple(int(values[name]) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))


class Processes:
    """The processes that torchrun started, each with a device of its own. Without torchrun there is one, which sends
    nothing.

    rank: number of this process, from 0. count: how many there are, on all machines. device: of this one. quiet: what
    tqdm's `disable` should be. Raises InputError for GPUs that are not there, and where torchrun's variables are not
    whole.
    """

    def __init__(self, gpu='auto'):
        self.rank, local_rank, self.count = place_among_processes()
        self.device = choose_device(gpu, local_rank, self.count)
        self.quiet = True if self.rank > 0 else None
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
        if self.count > 1 and not distributed.is_initialized():
            # a process may wait for hours for one that tests a large image; one that ends is noticed at once
            distributed.init_process_group('nccl' if self.device.type == 'cuda' else 'gloo',
                                           timeout=datetime.timedelta(days=7))
            # gloo's thread needs the interpreter to let go of the last reduction, and aborts where that has ended
            atexit.register(time.sleep, 0.1)

    def _reduce(self, values, operation):
        if self.count == 1:
            return list(values)
        # kept: gloo's thread would need the interpreter to free it, which in torch 2.6 waits for that thread in `end`
        self.last = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(self.last, operation)
        return self.last.tolist()

    def sums(self, values):
        """Each of the numbers, summed over the processes."""
        return self._reduce(values, distributed.ReduceOp.SUM)

    def largest(self, number):
        """The largest of the whole numbers that the processes give."""
        return int(self._reduce([number], distributed.ReduceOp.MAX)[0])

    def from_first(self, number):
        """The number that process 0 gives."""
        return self.sums([number if self.rank == 0 else 0])[0]

    def copy_from_first(self, tensors):
        """Overwrite the tensors with those of process 0."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def wait(self):
        """Until all processes are here."""
        self.largest(0)

    def end(self):
        """Of what the processes do together."""
        if self.count > 1:
            distributed.destroy_process_group()

    def share(self, model):
        """The model, whose gradients become the mean over the processes."""
        if self.count == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, [self.device] if self.device.type == 'cuda' else None)

    def synchronise_batch_norm(self, model):
        """On CUDA, the model with batch norm over the crops of all processes; elsewhere torch has none."""
        several = self.count > 1 and self.device.type == 'cuda'
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if several else model

    @contextlib.contextmanager
    def watched(self, advice):
        """Raises InputError, which ends with `advice()`, where in the block another process ended or a disk is full."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not re.search('gloo|nccl|connection', str(error), re.IGNORECASE):
                raise
            raise InputError(f'process {self.rank}: another process of this run ended; {advice()}') from error
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise InputError(f'{no_space(error)}; make room; {advice()}') from error


def put_on(device, model):
    """The network on its device; on CUDA channels last, the layout of the tensor cores."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if device.type == 'cuda' else model


def windows_at_once(device):
    """How many windows of an image a network sees at a time, in validation and testing."""
    return 1 if device.type == 'cpu' else 8


class MixedPrecision:
    """Half precision where it is fast and enough, in the network; the loss stays in float32.

    CUDA: autocast to bfloat16, or to float16 with a scaled loss where there is no bfloat16. CPU: FullNet computes its
    dense blocks in bfloat16 (FullNet.set_mode); in testing autocast is faster on a processor that has AMX, and only
    there. Raises InputError for Apple MPS.
    """

    def __init__(self, device, enabled, testing=False):
        if enabled and device.type == 'mps':
            raise InputError('--amp True works on CUDA GPUs and on the CPU, not on Apple MPS; leave it out')
        cuda = enabled and device.type == 'cuda'
        bfloat16 = not cuda or torch.cuda.is_bf16_supported(including_emulation=False)
        self.device, self.dtype = device, torch.bfloat16 if bfloat16 else torch.float16
        self.enabled = cuda or (enabled and testing and torch.cpu._is_amx_tile_supported())
        self.scaler = torch.amp.GradScaler(device.type, enabled=cuda and not bfloat16)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.enabled)


# ---------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------

# What a published checkpoint holds besides tensors: `best_iou`, a NumPy scalar, under NumPy's old or new names.
_NUMPY_SCALARS = [
    np.dtype, *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)),
    *((np.float64().__reduce__()[0], f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
]


def build_model(options):
    """The network of a `model` option group. Raises InputError for values that fit no network."""
    try:
        return create_model(**options)
    except (ValueError, TypeError) as error:
        raise InputError(f'no such model: {error}') from error


def load_checkpoint(path):
    """Read a checkpoint, ours or a published one, to the CPU; the `module.` prefix is taken off its state_dict.

    Only tensors and plain values are unpickled (`weights_only`), so that a checkpoint from a stranger cannot run
    code. Raises InputError if the file is missing, damaged or is not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f'no checkpoint at {path}; train first, or give --model-path / --checkpoint-path')
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            # from memory: a damaged file that names a length of gigabytes then gets no more than there is
            checkpoint = torch.load(io.BytesIO(path.read_bytes()), map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        if 'global' in str(error).lower():             # the name of something that is neither tensor nor plain value
            raise InputError(f'{path} holds more than weights and plain values, and was not loaded: it could run '
                             f'code; get the checkpoint from its authors as weights only') from error
        raise InputError(f'{path} is not a checkpoint, or is damaged; copy it again') from error
    except Exception as error:                         # a damaged pickle makes PyTorch raise almost anything
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
        checkpoint.pop('options', None)                # another program's: as with a published one, ours decide
    return checkpoint


def save_checkpoint(path, checkpoint):
    """Write a checkpoint atomically, its state_dict with the `module.` prefix of the published format."""
    weights = {f'module.{key}': value for key, value in checkpoint['state_dict'].items()}
    buffer = io.BytesIO()                          # torch.save to a full disk raises no OSError
    torch.save({**checkpoint, 'state_dict': weights}, buffer)
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())                    # on the disk before the rename, should the machine stop


def architecture(state_dict):
    """The model options that the shapes in a state_dict tell: a dict of those option names that can be read off."""
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
    """Load a state_dict into `model`, built with the model group `options`.

    float16 and float64 weights are converted to float32, with a warning. Raises InputError that names what differs:
    the options whose value the shapes contradict, missing or extra keys, or weights that are not finite.
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
        # as float32, in which they are used: 1e300 is infinite there
        not_finite = [key for key, value in state_dict.items() if not torch.isfinite(value.float()).all()]
        model.load_state_dict(state_dict)
    except (RuntimeError, NotImplementedError) as error:         # sparse, quantised, or beyond their storage
        raise InputError(f'{path} holds tensors that are no weights ({str(error).splitlines()[0]}); '
                         f'copy it again') from error
    if not_finite:
        raise InputError(f'{path}: {not_finite[0]} holds NaN or infinite weights; use an earlier checkpoint')
    types = {value.dtype for value in state_dict.values() if value.is_floating_point()} - {torch.float32}
    if types:
        warnings.warn(f'{path}: {", ".join(str(t).removeprefix("torch.") for t in types)} weights, '
                      f'converted to float32', stacklevel=2)


def _name_keys(what, keys):
    if not keys:
        return ''
    names = ', '.join(repr(key)[1:-1][:100] for key in keys[:3])           # a stranger's keys may hold line breaks
    return f'; {len(keys)} {what}: {names}' + (', ...' if len(keys) > 3 else '')


def _what_differs(state_dict, options):
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
    """Exponential moving average of a network's weights and batch-norm statistics, as a network: `average.model`.

    decay: of one step, such as 0.999; smaller in the first steps, so that the initial weights are soon forgotten.
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.step = decay, None
        own, network = self.model.state_dict(), model.state_dict()           # share their memory with the networks
        floats = [name for name, value in own.items() if value.is_floating_point()]
        counters = [name for name in own if name not in floats]              # num_batches_tracked
        self.floats, self.counters = ([[state[name] for name in names] for state in (own, network)]
                                      for names in (floats, counters))

    @torch.no_grad()
    def update(self):
        """Count a step of the network that this average was made of."""
        # the network counts its steps too; only the first time a GPU is asked, because it has to finish its work then
        self.step = int(self.counters[1][0]) if self.step is None else self.step + 1
        torch._foreach_lerp_(*self.floats, 1 - min(self.decay, (1 + self.step) / (10 + self.step)))
        torch._foreach_copy_(*self.counters)


# ---------------------------------------------------------------------------------------------------
# Sliding window and test-time augmentation
# ---------------------------------------------------------------------------------------------------

def window_grid(length, size, overlap):
    """Windows along one side: the padded length, and (start, stop, first, end) of each window.

    A window reads [start, stop) and writes [first, end): all but its outer overlap // 2 pixels, except at the border.
    """
    if length <= size:
        return length, [(0, length, 0, length)]
    stride = size - overlap
    padded = length + stride - (length - size) % stride
    windows = []
    for start in range(0, padded - overlap, stride):
        stop = min(start + size, padded)
        first = start + overlap // 2 if start > 0 else 0
        end = stop - overlap // 2 if stop < padded else padded
        windows.append((start, stop, first, end))
    return padded, windows


def split_forward(model, input, size, overlap, outchannel=3, n_windows=1):
    """The model's output for images larger than it is run on, from overlapping windows.

    input: (B, C, H, W) float tensor. size, overlap: pixels; the stride is their difference. model: maps windows
    (n, C, h, w) to (n, outchannel, h, w). n_windows: of each image, that the model sees at a time. Returns
    (B, outchannel, H, W) on the input's device. A side longer than `size` is zero-padded at the bottom / right to whole
    windows; a shorter one is one window of that length. Raises ValueError unless 0 <= overlap < size.
    """
    if not 0 <= overlap < size:
        raise ValueError(f'overlap is {overlap}; expected at least 0 and less than the window size, {size}')
    batch, _, height, width = input.shape
    padded_height, rows = window_grid(height, size, overlap)
    padded_width, columns = window_grid(width, size, overlap)
    padded = F.pad(input, (0, padded_width - width, 0, padded_height - height))
    output = input.new_zeros(batch, outchannel, padded_height, padded_width)
    windows = list(itertools.product(rows, columns))                     # all of one size
    for i in range(0, len(windows), n_windows):
        group = windows[i:i + n_windows]
        seen = torch.cat([padded[:, :, top:bottom, left:right] for (top, bottom, *_), (left, right, *_) in group])
        for ((top, _, *rows), (left, _, *columns)), window in zip(group, model(seen).split(batch)):
            output[:, :, slice(*rows), slice(*columns)] = \
                window[:, :, rows[0] - top:rows[1] - top, columns[0] - left:columns[1] - left]
    return output[:, :, :height, :width]


# Orientations of test-time augmentation: (number of 90-degree turns, mirror first). 'flips': what two mirrors give.
ORIENTATIONS = {
    'none': [(0, False)],
    'flips': [(0, False), (0, True), (2, False), (2, True)],
    'full': [(turns, mirror) for mirror in (False, True) for turns in range(4)],
}


def orient(array, turns, mirror):
    """Mirror (H, W, ...) left-right if asked, then turn it by `turns` x 90 degrees."""
    return np.rot90(array[:, ::-1] if mirror else array, turns)


def orient_back(array, turns, mirror):
    """Undo `orient`."""
    array = np.rot90(array, -turns)
    return array[:, ::-1] if mirror else array


def predict_probabilities(predict, image, tta='full'):
    """Mean probability maps over the orientations of test-time augmentation.

    predict: maps an RGB image, uint8 (H, W, 3), to probabilities, float (H', W', classes). tta: full / flips / none.
    Returns float32 (H', W', classes).
    """
    orientations = ORIENTATIONS[tta]
    total = 0
    for turns, mirror in orientations:
        total = total + orient_back(predict(np.ascontiguousarray(orient(image, turns, mirror))), turns, mirror)
    return np.asarray(total / len(orientations), dtype=np.float32)


def predict_in_bands(predict, image, size, overlap, tta='full', n_classes=3, batch_size=1, band_pixels=2 ** 23):
    """Probability maps of an image of any size, band by band: `predict_probabilities` with `split_forward`'s windows.

    predict: maps a list of at most `batch_size` windows, uint8 (h, w, 3), and a shape (H', W') that they are to be
    padded to, to probabilities (n, H', W', n_classes). image: uint8 (H, W, 3). Yields (top, bottom, probabilities) of
    at least `band_pixels` pixels, but for the last, float32 (bottom - top, W, n_classes), from top to bottom. How the
    image is cut into bands changes nothing: each pixel comes from one window of the whole image's grid, for every
    orientation. Windows that write to two bands are computed twice; bands end where rows of windows do, so that
    without augmentation there are none.
    """
    height, width = image.shape[:2]
    edges = [0]
    for _, _, first, _ in window_grid(height, size, overlap)[1]:
        if (first - edges[-1]) * width >= band_pixels and first < height:
            edges.append(first)
    bands = list(zip(edges, [*edges[1:], height]))
    jobs = [[list(_windows_of_band(*band, height, width, size, overlap, turns)) for turns, _ in ORIENTATIONS[tta]]
            for band in bands]
    progress = tqdm(total=sum(len(windows) for band in jobs for windows in band), desc='windows', unit='window',
                    disable=None if height * width > 4 * size * size else True, leave=False)
    for (top, bottom), orientations in zip(bands, jobs):
        total = np.zeros((bottom - top, width, n_classes), np.float32)
        for (turns, mirror), windows in zip(ORIENTATIONS[tta], orientations):
            oriented, place = orient(image, turns, mirror), orient(total, turns, mirror)          # views
            for i in range(0, len(windows), batch_size):
                batch = windows[i:i + batch_size]
                crops = [np.ascontiguousarray(oriented[window.read]) for window in batch]
                for window, output in zip(batch, predict(crops, batch[0].shape)):
                    place[window.write] += output[window.take]
                progress.update(len(batch))
        yield top, bottom, total / len(ORIENTATIONS[tta])
    progress.close()


class Window(NamedTuple):
    """A window of an oriented image. read, write, take: pairs of slices, of the image, of a band's result (oriented as
    the image), and of the window's output. shape: of the window with its padding."""
    read: tuple
    write: tuple
    take: tuple
    shape: tuple


def _windows_of_band(top, bottom, height, width, size, overlap, turns):
    """The Windows that write to rows top ... bottom of an image, in the image turned by 90 x `turns`."""
    if turns >= 2:                                            # the image's rows run backwards
        top, bottom = height - bottom, height - top
    band = [(top, bottom), (0, width)]
    sides = [height, width]
    if turns % 2:
        band, sides = band[::-1], sides[::-1]
    pieces = []
    for side, (low, high) in zip(sides, band):
        grid = window_grid(side, size, overlap)[1]
        ends = [first for _, _, first, _ in grid[1:]] + [side]          # where two windows write, the later one wins
        found = []
        for (start, stop, first, _), end in zip(grid, ends):
            first, end = max(first, low), min(end, high)
            if first < end:
                found.append((slice(start, min(stop, side)), slice(first - low, end - low),
                              slice(first - start, end - start), stop - start))
        pieces.append(found)
    for rows in pieces[0]:
        for columns in pieces[1]:
            yield Window(*zip(rows, columns))


# ---------------------------------------------------------------------------------------------------
# Post-processing (test-time; paper section 3)
# ---------------------------------------------------------------------------------------------------

def disk(radius):
    """Disk-shaped footprint, bool (2r + 1, 2r + 1): pixels within `radius` of the centre."""
    y, x = np.ogrid[-radius:radius + 1, -radius:radius + 1]
    return x * x + y * y <= radius * radius


def remove_small_components(mask, min_area):
    """Drop the 4-connected components of fewer than `min_area` pixels from a bool mask (H, W)."""
    components, n = ndimage.label(mask)
    areas = sum(np.bincount(components[top:top + 2048].ravel(), minlength=n + 1)       # in pieces, for large images
                for top in range(0, len(components), 2048))
    keep = areas >= min_area
    keep[0] = False
    return keep[components]


def inside_mask(probabilities, threshold=0):
    """Where class 1 is, bool (H, W). probabilities: float (H, W, classes). threshold 0: where it is the most likely
    class, as published; else where its probability is at least the threshold."""
    return probabilities[..., 1] >= threshold if threshold else probabilities.argmax(axis=2) == 1


def post_process(inside, min_area, radius, original_size=None, h_maxima=0, inside_map=None):
    """From the mask of class 1 to an instance label.

    inside: bool (H, W), `inside_mask`. min_area: pixels, smaller 4-connected components go. original_size: (H0, W0)
    when the network saw a scaled image; the mask is resized to it bilinearly. radius: pixels of the grey dilation
    that gives back the contour. Returns int32 (H0, W0), 0 = background.
    Not in the published method, and off at 0: h_maxima, a probability, see `split_objects`. It needs inside_map, the
    inside probability, uint8 (H, W), 255 = 1, which it smooths by a Gaussian of 1 pixel. Parts of one object touch; the
    dilation leaves the border between them where it is.
    """
    mask = remove_small_components(inside, min_area)
    smooth = ndimage.gaussian_filter(inside_map, 1) if h_maxima else None
    if original_size is not None and mask.shape != tuple(original_size):
        mask = resize_bilinear(mask * np.uint8(255), original_size) > 127.5
        smooth = resize_bilinear(smooth, original_size) if h_maxima else None
    label, _ = ndimage.label(mask, np.ones((3, 3)))
    label = label.astype(np.int32, copy=False)
    if not h_maxima:
        return dilate(label, radius)
    parts = split_objects(label, smooth, h_maxima)
    label = dilate(parts.copy(), radius)
    np.copyto(label, parts, where=parts > 0)
    return label


def resize_bilinear(image, shape):
    """An image, uint8 (H, W) or (H, W, 3), at the size (H0, W0)."""
    return np.array(Image.fromarray(image).resize(shape[::-1], Image.BILINEAR))


def split_objects(label, inside, h):
    """Split objects along the valleys of the inside probability: a watershed from its h-maxima.

    label: int32 (H, W), ids 1, 2, ... inside: uint8 (H, W), 255 = probability 1. h: probability by which a maximum
    stands out: all paths in the object from it to a higher one go down as far. An object with fewer than two of them
    stays whole. Returns int32 (H, W), ids 1, 2, ...
    """
    result, n = np.zeros_like(label), 0
    for i, window in enumerate(ndimage.find_objects(label), start=1):
        region = label[window] == i
        parts = region.astype(np.int32)
        top = np.where(region, inside[window], 0).astype(int)
        # not morphology.h_maxima, which counts tops of one height apart, however shallow the valley between them
        cut = morphology.reconstruction(np.maximum(top - round(h * 255), 0), top, footprint=np.ones((3, 3)))
        seeds, count = ndimage.label(morphology.local_maxima(cut, connectivity=2), np.ones((3, 3)))
        if count > 1:
            parts = segmentation.watershed(-top, seeds, connectivity=2, mask=region)
        result[window][region] = n + parts[region]
        n += max(count, 1)
    return result


def dilate(label, radius, rows=2048):
    """Grey dilation of an int (H, W) label with a disk, in place: where two objects meet, the higher id wins."""
    footprint = disk(radius).astype(np.uint8)
    fits_16_bits = label.max(initial=0) <= np.iinfo(np.uint16).max           # OpenCV dilates no larger integers
    before = label[:0]                                               # the last rows above, as they were
    for top in range(0, len(label), rows):
        piece = np.concatenate([before, label[top:top + rows + radius]])
        first, end = len(before), len(before) + rows
        dilated = (cv2.dilate(piece.astype(np.uint16), footprint) if fits_16_bits
                   else ndimage.grey_dilation(piece, footprint=footprint))
        label[top:top + rows] = dilated[first:end]
        before = piece[max(end - radius, 0):end]
    return label


# ---------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------
# Every object-level metric starts from one table of the objects that overlap (`overlap_table`).
# What images with nothing to match score:
#
#                             nuclei                      gland                       standard
#                             all but H     Hausdorff     all but H     Hausdorff     all
#   pred and gt empty         1             NaN           1             0             1
#   one of the two empty      0             NaN           0             5e4           0
#   no object overlaps        0             NaN           0             as usual      0
#
# "Empty" means no object; for the gland metric, no ground-truth object of 3 pixels or more. `AverageMeter` leaves
# NaN out of its averages. An image without background is no special case.

EPS = 1e-10                                        # in the denominators of the published ratios
MIN_GLAND_AREA = 3                                 # smaller ground-truth glands are dropped, pixels
NO_OBJECT_HAUSDORFF = 1e5                          # gland: distance to an image without objects, pixels
PIXELS_AT_ONCE = 2 ** 23                           # of the objects whose Hausdorff distances are computed together

NucleiScores = namedtuple('NucleiScores', 'recall precision F1 dice iou hausdorff AJI')        # hausdorff: pixels
GlandScores = namedtuple('GlandScores', 'recall precision F1 dice iou hausdorff')


class AverageMeter:
    """Means of arrays of one shape, per element, over the values that are not NaN (NaN where there is none).

    sum, count, avg: arrays of `shape`.
    """

    def __init__(self, shape=1):
        self.sum = np.zeros(shape)
        self.count = np.zeros(shape)

    def update(self, values, n=1):
        """Add `values`, the mean of `n` samples."""
        values = np.asarray(values, dtype=float).reshape(self.sum.shape)
        valid = ~np.isnan(values)
        self.sum[valid] += n * values[valid]
        self.count[valid] += n

    @property
    def avg(self):
        with np.errstate(invalid='ignore'):
            return self.sum / self.count


def accuracy_pixel_level(output, target):
    """Class 1 against the rest, mean over the batch.

    output, target: integer or bool (B, H, W). Returns (6,) accuracy, IoU, recall, precision, F1,
    (recall + specificity) / 2. A ratio without any pixel in its denominator is 0.
    Raises InputError on arrays that do not fit.
    """
    output, target = (labels.reshape(len(labels), -1) == 1 for labels in _checked(output, target, '(B, H, W)'))
    tp = (output & target).sum(1)
    tn = (~output & ~target).sum(1)
    fp = (output & ~target).sum(1)
    fn = (~output & target).sum(1)
    recall = tp / (tp + fn + EPS)
    precision = tp / (tp + fp + EPS)
    specificity = tn / (tn + fp + EPS)
    return np.mean([(tp + tn) / (tp + tn + fp + fn + EPS),
                    tp / (tp + fp + fn + EPS),
                    recall,
                    precision,
                    2 * recall * precision / (recall + precision + EPS),
                    (recall + specificity) / 2], axis=1)


def nuclei_accuracy_object_level(pred, gt):
    """Object-level scores of the nuclei experiments (paper section 3): `NucleiScores`.

    pred, gt: integer or bool (H, W), 0 = background. In raster order each ground-truth object takes the free
    prediction of highest IoU; any overlap makes a true positive. dice, iou, hausdorff are means over these pairs.
    Raises InputError on arrays that do not fit.
    """
    return nuclei_scores_of(overlap_table(pred, gt))


def nuclei_scores_of(table):
    """`nuclei_accuracy_object_level` of an `OverlapTable` with its maps."""
    if table.n_pred == table.n_gt == 0:
        return NucleiScores(1.0, 1.0, 1.0, 1.0, 1.0, np.nan, 1.0)
    pairs = _published_pairs(table)
    if len(pairs) == 0:
        return NucleiScores(0.0, 0.0, 0.0, 0.0, 0.0, np.nan, 0.0)
    iou = table.iou[pairs]
    distances = hausdorff_distances(ObjectShapes(table.pred_map), table.pred[pairs],
                                    ObjectShapes(table.gt_map), table.gt[pairs])
    return NucleiScores(*_detection_scores(len(pairs), table), dice=float(np.mean(2 * iou / (1 + iou))),
                        iou=float(np.mean(iou)), hausdorff=float(np.mean(distances)), AJI=_aji(table, pairs))


def gland_accuracy_object_level(pred, gt):
    """Object-level scores of the GlaS challenge: `GlandScores`.

    pred, gt: integer or bool (H, W), 0 = background. A prediction is a true positive if it covers at least half of
    the gland that it overlaps most; two predictions on one gland count once. dice, iou, hausdorff: area-weighted
    means over the glands, each with the prediction that it overlaps most, and over the predictions likewise, halved.
    Raises InputError on arrays that do not fit.
    """
    return gland_scores_of(overlap_table(pred, gt))


def gland_scores_of(table):
    """`gland_accuracy_object_level` of an `OverlapTable` with its maps."""
    table = _without_small_gt(table, MIN_GLAND_AREA)
    if table.n_pred == table.n_gt == 0:
        return GlandScores(1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    pred_pairs = _best_pairs(table.pred, table.intersection, table.gt)
    gt_pairs = _best_pairs(table.gt, table.intersection, table.pred)
    covers_half = 2 * table.intersection[pred_pairs] >= table.gt_area[table.gt[pred_pairs]]
    found = np.unique(table.gt[pred_pairs[covers_half]])

    pred_shapes, gt_shapes = ObjectShapes(table.pred_map), ObjectShapes(table.gt_map)
    distance = np.full(len(table.iou), np.nan)                # of the pairs that count, which are often in both lists
    pairs = np.union1d(pred_pairs, gt_pairs)
    distance[pairs] = hausdorff_distances(pred_shapes, table.pred[pairs], gt_shapes, table.gt[pairs])
    gt_means = _gland_means(gt_shapes, pred_shapes, table.gt[gt_pairs], table.iou[gt_pairs], distance[gt_pairs])
    pred_means = _gland_means(pred_shapes, gt_shapes, table.pred[pred_pairs], table.iou[pred_pairs],
                              distance[pred_pairs])
    return GlandScores(*_detection_scores(len(found), table), *((gt_means + pred_means) / 2).tolist())


def standard_metrics(pred, gt):
    """The measures that other papers report: dict of aji, aji_plus, aji_fullnet, pq, dq, sq, f1, ap50, map, dice.

    pred, gt: integer or bool (H, W), 0 = background; their 8-connected regions are the objects.
    aji: every ground-truth object with its best-IoU prediction (MoNuSeg). aji_plus: one-to-one, largest summed IoU.
    aji_fullnet: the pairs of `nuclei_accuracy_object_level`. Of the pairs with IoU > 0.5: dq = f1 = 2 TP / (objects
    in both maps), sq = mean IoU, pq = dq * sq. ap50, map: TP / (TP + FP + FN), TP one-to-one at IoU >= t; map is
    the mean over t = 0.50, 0.55, ..., 0.95. dice: of the foreground pixels.
    Raises InputError on arrays that do not fit.
    """
    return standard_metrics_of(overlap_table(pred, gt))


def standard_metrics_of(table):
    """`standard_metrics` of an `OverlapTable`."""
    n_objects = table.n_pred + table.n_gt
    if n_objects == 0:
        return dict.fromkeys(('aji', 'aji_plus', 'aji_fullnet', 'pq', 'dq', 'sq', 'f1', 'ap50', 'map', 'dice'), 1.0)
    # IoU > 0.5 makes pairs one-to-one by itself
    matched_iou = table.iou[table.iou > 0.5]
    dq = 2 * len(matched_iou) / n_objects
    sq = float(matched_iou.mean()) if len(matched_iou) else 0.0
    # IoU = 0.5 does not (both halves of an object): the best free pair goes first
    one_to_one_iou = table.iou[_one_to_one(table, np.lexsort((table.pred, table.gt, -table.iou)))]
    true_positives = np.array([np.sum(one_to_one_iou >= percent / 100) for percent in range(50, 100, 5)])
    ap = true_positives / (n_objects - true_positives)
    return {
        'aji': _aji(table, _best_pairs(table.gt, table.iou, table.pred)),
        'aji_plus': _aji(table, _largest_iou_sum_pairs(table)),
        'aji_fullnet': _aji(table, _published_pairs(table)),
        'pq': dq * sq, 'dq': dq, 'sq': sq, 'f1': dq,
        'ap50': float(ap[0]), 'map': float(ap.mean()),
        'dice': float(2 * table.intersection.sum() / (table.pred_area.sum() + table.gt_area.sum())),
    }


class OverlapTable(NamedTuple):
    """Two label maps and all pairs of objects that overlap. Objects are numbered from 1."""
    pred_map: np.ndarray                           # (H, W) 0 = background, 1..n_pred in raster order of first pixels
    gt_map: np.ndarray
    n_pred: int
    n_gt: int
    pred_area: np.ndarray                          # (n_pred + 1,) pixels of each object, [0] is 0
    gt_area: np.ndarray
    pred: np.ndarray                               # (n_pairs,) the objects of each pair
    gt: np.ndarray
    intersection: np.ndarray                       # (n_pairs,) pixels
    union: np.ndarray
    iou: np.ndarray


def pool(tables):
    """One `OverlapTable`, without maps, of the objects of several images, as if these were one large image."""
    n_pred, n_gt = (np.cumsum([0] + [getattr(table, name) for table in tables]) for name in ('n_pred', 'n_gt'))
    areas = [np.concatenate([[0], *(getattr(table, name)[1:] for table in tables)])
             for name in ('pred_area', 'gt_area')]
    ids = [np.concatenate([[], *(getattr(table, name) + before for table, before in zip(tables, counts))]).astype(int)
           for name, counts in (('pred', n_pred), ('gt', n_gt))]
    rest = [np.concatenate([[], *(getattr(table, name) for table in tables)])
            for name in ('intersection', 'union', 'iou')]
    return OverlapTable(None, None, int(n_pred[-1]), int(n_gt[-1]), *areas, *ids, *rest)


def match_objects(pred, gt):
    """{id in pred: (id in gt, IoU)}: one-to-one, the pairs of highest IoU first. pred, gt: int (H, W) label maps.

    Objects are what has one id, in however many pieces.
    """
    both = (pred > 0) & (gt > 0)
    pairs, intersection = np.unique(np.stack([pred[both], gt[both]]), axis=1, return_counts=True)
    areas = [dict(zip(*(values.tolist() for values in np.unique(x[x > 0], return_counts=True)))) for x in (pred, gt)]
    candidates = [(n / (areas[0][p] + areas[1][g] - n), p, g)
                  for n, p, g in zip(intersection.tolist(), *pairs.tolist())]
    matches, taken = {}, set()
    for iou, p, g in sorted(candidates, key=lambda c: (-c[0], c[1], c[2])):
        if p not in matches and g not in taken:
            matches[p] = (g, iou)
            taken.add(g)
    return matches


def overlap_table(pred, gt):
    """`OverlapTable` of the 8-connected regions of equal value of two label maps.

    pred, gt: integer or bool (H, W), 0 = background, ids in any order and with gaps. Raises InputError on arrays that
    do not fit.
    """
    (pred_map, pred_area), (gt_map, gt_area) = map(_regions, _checked(pred, gt, '(H, W)'))
    both = (pred_map > 0) & (gt_map > 0)
    codes = gt_map[both].astype(np.int64) * len(pred_area) + pred_map[both]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))          # of runs: far fewer to sort than pixels
    codes, runs = np.unique(codes[starts], return_inverse=True)
    intersection = np.bincount(runs, np.diff(starts, append=np.count_nonzero(both)), len(codes)).astype(int)
    gt_ids, pred_ids = np.divmod(codes, len(pred_area))
    union = gt_area[gt_ids] + pred_area[pred_ids] - intersection
    return OverlapTable(pred_map, gt_map, len(pred_area) - 1, len(gt_area) - 1, pred_area, gt_area,
                        pred_ids, gt_ids, intersection, union, intersection / union)


def _regions(labels):
    """Regions of equal value, int32 (H, W), numbered by their first pixel; their areas, (n + 1,), [0] is 0."""
    regions = measure.label(labels, background=0, connectivity=2).astype(np.int32)
    area = np.bincount(regions.ravel())
    area[0] = 0
    return regions, area


def _without_small_gt(table, min_area):
    """The table without the ground-truth objects under `min_area` pixels; the others are renumbered."""
    keep = table.gt_area >= min_area                          # [0], of area 0, is not an object
    new_id = np.cumsum(keep, dtype=np.int32) * keep
    pairs = keep[table.gt]
    return table._replace(gt_map=new_id[table.gt_map], n_gt=int(keep.sum()), gt_area=np.append(0, table.gt_area[keep]),
                          gt=new_id[table.gt[pairs]],
                          **{name: getattr(table, name)[pairs] for name in ('pred', 'intersection', 'union', 'iou')})


def _checked(pred, gt, axes):
    """Both as arrays; InputError unless they are non-negative integers of one shape with these axes."""
    pred, gt = np.asarray(pred), np.asarray(gt)
    for name, array in (('prediction', pred), ('ground truth', gt)):
        if array.dtype.kind not in 'bui':
            raise InputError(f'{name}: expected an array of integer labels, found {array.dtype}')
        if array.ndim != len(axes.split(',')) or array.size == 0:
            raise InputError(f'{name}: expected a non-empty array of shape {axes}, found shape {array.shape}')
        if array.min() < 0:
            raise InputError(f'{name}: expected labels of 0 (background) and up, found {array.min()}')
    if pred.shape != gt.shape:
        raise InputError(f'prediction and ground truth differ in shape: {pred.shape} and {gt.shape}')
    return pred, gt


def _detection_scores(tp, table):
    """recall, precision, F1 of `tp` true positives."""
    return tp / (table.n_gt + EPS), tp / (table.n_pred + EPS), 2 * tp / (table.n_gt + table.n_pred + EPS)


def _aji(table, pairs):
    """Sum of intersections / (sum of unions + areas of the objects in no pair). pairs: indices into the table."""
    alone = (table.gt_area.sum() - table.gt_area[np.unique(table.gt[pairs])].sum()
             + table.pred_area.sum() - table.pred_area[np.unique(table.pred[pairs])].sum())
    return float(table.intersection[pairs].sum() / (table.union[pairs].sum() + alone))


def _best_pairs(objects, score, partners):
    """Index of each object's pair of highest score, on a tie the one of the lowest partner; in order of objects."""
    order = np.lexsort((partners, -score, objects))
    return order[np.unique(objects[order], return_index=True)[1]]


def _one_to_one(table, order):
    """Those of the pairs, taken in `order`, of which both objects are still free."""
    gt_taken, pred_taken, pairs = set(), set(), []
    for i, gt, pred in zip(order.tolist(), table.gt[order].tolist(), table.pred[order].tolist()):
        if gt not in gt_taken and pred not in pred_taken:
            gt_taken.add(gt)
            pred_taken.add(pred)
            pairs.append(i)
    return np.array(pairs, dtype=int)


def _published_pairs(table):
    """In raster order each ground-truth object takes the free prediction of highest IoU, the first on a tie."""
    return _one_to_one(table, np.lexsort((table.pred, -table.iou, table.gt)))


def _largest_iou_sum_pairs(table):
    """The one-to-one pairs with the largest summed IoU.

    A sparse assignment problem, in which each ground-truth object may also take a partner of its own that stands for
    "none". The 1 added to every weight (a sparse matrix has no zeros) is in all sums alike: all get a partner.
    """
    if len(table.iou) == 0:
        return np.array([], dtype=int)
    gt_ids, rows = np.unique(table.gt, return_inverse=True)
    pred_ids, columns = np.unique(table.pred, return_inverse=True)
    none = np.arange(len(gt_ids))
    weights = np.concatenate([1 + table.iou, np.ones(len(gt_ids))])
    places = np.concatenate([rows, none]), np.concatenate([columns, len(pred_ids) + none])
    places = [index.astype(np.int32) for index in places]          # the type that older SciPy asks for
    graph = sparse.csr_array((weights, places), shape=(len(gt_ids), len(pred_ids) + len(gt_ids)))
    partner = min_weight_full_bipartite_matching(graph, maximize=True)[1]
    return np.flatnonzero(partner[rows] == columns)


def _gland_means(own_shapes, other_shapes, own, iou, distance):
    """Area-weighted means, (3,) dice, iou, hausdorff, over all objects of one map; 0 if it has none.

    own: (n,) the objects that have a partner; iou, distance: IoU and Hausdorff distance of each with its partner. The
    remaining objects have dice and iou 0 and the smallest Hausdorff distance to any object of the other map.
    """
    n_objects = len(own_shapes.area)
    if n_objects == 0:
        return np.zeros(3)
    scores = np.zeros((n_objects, 3))
    scores[own - 1] = np.stack([2 * iou / (1 + iou), iou, distance], axis=1)
    alone = np.setdiff1d(np.arange(1, n_objects + 1), own)
    scores[alone - 1, 2] = _nearest_object_distances(own_shapes, alone, other_shapes)
    return np.average(scores, axis=0, weights=own_shapes.area)


def find_edges(label_map):
    """bool (H, W): the pixels with a 4-neighbour of another value; outside the image all is 0."""
    padded = np.pad(label_map, 1)
    on_edge = np.zeros(label_map.shape, dtype=bool)
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        on_edge |= neighbour != label_map
    return on_edge


class ObjectShapes:
    """The pixels of the objects 1..n of a label map, int (H, W), for Hausdorff distances.

    flat_map: (H * W,) the map. on_edge: bool (H * W,), pixels with a 4-neighbour outside the object or the image.
    pixels, edges: sparse bool (n + 1, H * W), row i holds all pixels of object i, and those on its edge.
    area: (n,) pixels. boxes: (n, 4) top, left, bottom, right of the bounding boxes, inclusive.
    """

    def __init__(self, label_map):
        self.width = label_map.shape[1]
        self.flat_map, self.on_edge = label_map.ravel(), find_edges(label_map).ravel()
        places = np.flatnonzero(label_map)
        n = label_map.max()
        self.pixels = self._rows(places, n)
        self.edges = self._rows(places[self.on_edge[places]], n)
        self.area = np.diff(self.pixels.indptr)[1:]
        y, x = np.divmod(self.edges.indices, self.width)
        starts = self.edges.indptr[1:-1]                              # every object has an edge
        self.boxes = np.stack([np.minimum.reduceat(y, starts), np.minimum.reduceat(x, starts),
                               np.maximum.reduceat(y, starts), np.maximum.reduceat(x, starts)], axis=1)

    def _rows(self, places, n):
        """Pixels at some places of the flat map, by object. A sparse matrix sorts by counting, in one pass."""
        rows = (np.ones(len(places), bool), (self.flat_map[places], places))
        return sparse.coo_array(rows, shape=(n + 1, len(self.flat_map))).tocsr()


def _pixels_of(rows, objects):
    """(index into `objects`, place in the flat map) of all pixels in these rows of a sparse matrix, both (pixels,)."""
    chosen = rows[objects]
    return np.repeat(np.arange(len(objects)), np.diff(chosen.indptr)), chosen.indices


def hausdorff_distances(a_shapes, a, b_shapes, b):
    """Symmetric Hausdorff distance, in pixels, between all pixels of objects a[k] and b[k], for every k. Exact.

    a, b: int (n,), objects of two maps of one shape. Returns float (n,).
    """
    pixels = int(a_shapes.area[a - 1].sum() + b_shapes.area[b - 1].sum())
    pieces = np.array_split(np.arange(len(a)), pixels // PIXELS_AT_ONCE + 1)
    return np.concatenate([np.maximum(_directed_hausdorff(a_shapes, a[i], b_shapes, b[i]),
                                      _directed_hausdorff(b_shapes, b[i], a_shapes, a[i])) for i in pieces])


def _directed_hausdorff(a_shapes, a, b_shapes, b):
    """Largest distance from a pixel of a[k] to its nearest pixel of b[k], (n,).

    Few pixels decide it. Those of `a` inside `b` have distance 0. For any other one, the nearest pixel of `b` is on
    b's edge: were its 4-neighbours all in `b`, the one a step towards the pixel would be nearer. And outside the
    bounding box of `b` only the edge of `a` counts: a step away from the box leads away from all of `b`, so
    a pixel whose 4-neighbours are all in `a` is not the farthest. Within the box such a pixel is left out if it
    touches `b`: its distance is 1, the smallest there is.

    One tree of points (k, y, x) serves all pairs: their k lie further apart than any two pixels.
    """
    width = a_shapes.width
    k, place = _pixels_of(a_shapes.pixels, a)
    outside_b = b_shapes.flat_map[place] != b[k]
    k, place = k[outside_b], place[outside_b]
    distances = np.zeros(len(a))
    distances[k] = 1
    on_edge = a_shapes.on_edge[place]
    y, x = np.divmod(place, width)
    top, left, bottom, right = b_shapes.boxes[b[k] - 1].T
    inner = np.flatnonzero(~on_edge & (y >= top) & (y <= bottom) & (x >= left) & (x <= right))
    around = place[inner] + np.array([[-width], [-1], [1], [width]])                        # all in the image
    inner = inner[(b_shapes.flat_map[around] != b[k[inner]]).all(axis=0)]
    far = np.concatenate([np.flatnonzero(on_edge), inner])
    k, place = k[far], place[far]

    apart = width + len(a_shapes.flat_map) // width

    def points(k, place):
        return np.stack([k * apart, *np.divmod(place, width)], axis=1)
    if len(k):
        tree = cKDTree(points(*_pixels_of(b_shapes.edges, b)), leafsize=32, balanced_tree=False)       # sooner built
        np.maximum.at(distances, k, tree.query(points(k, place))[0])
    return distances


def _nearest_object_distances(shapes, objects, other_shapes):
    """Smallest Hausdorff distance from each of `objects` to any object of the other map, (n,).

    NO_OBJECT_HAUSDORFF if that has none. Where two sides of the bounding boxes lie d apart, the Hausdorff distance is
    at least d (no pixel of the one object is nearer to the outer side of the other). So after the object with the
    nearest box only those need a look whose boxes are no further away than it turns out to be.
    """
    if len(objects) == 0 or len(other_shapes.boxes) == 0:
        return np.full(len(objects), NO_OBJECT_HAUSDORFF)
    tree, boxes = cKDTree(other_shapes.boxes), shapes.boxes[objects - 1]
    nearest = hausdorff_distances(shapes, objects, other_shapes, tree.query(boxes, p=np.inf)[1] + 1)
    candidates = tree.query_ball_point(boxes, nearest, p=np.inf)
    index = np.repeat(np.arange(len(objects)), [len(others) for others in candidates])
    distances = hausdorff_distances(shapes, objects[index], other_shapes, np.concatenate(candidates).astype(int) + 1)
    np.minimum.at(nearest, index, distances)
    return nearest
