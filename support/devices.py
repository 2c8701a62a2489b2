"""The device and the processes that compute: CUDA, Apple MPS or CPU; torchrun; mixed precision; loaders."""
import atexit
import contextlib
import datetime
import itertools
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import cv2
import torch
from torch import distributed, nn

from support.script import DISK_FULL, InputError, ignore_interrupt, no_space, place_among_processes


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


def loader_processes(workers, processes):
    """How many processes load data: `workers`, or with 'auto' what the CPUs suffice for.

    A GPU is fed by the CPUs that this process may use, less one, 16 at most, shared with the other processes on the
    machine. A CPU that trains itself gets one.
    """
    if workers != 'auto':
        return workers
    if processes.device.type == 'cpu':
        return 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, min(16, usable - 1) // int(os.environ.get('LOCAL_WORLD_SIZE') or 1))


@contextlib.contextmanager
def memory_watched(run):
    """Raises InputError that says what takes memory, where in the block that of a GPU does not suffice."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and 'CUDA error: out of memory' not in str(error):
            raise
        said = str(error).splitlines()[0][:100]
        raise InputError(f'not enough memory on the GPU ({said}); give --amp True, or begin a new run with a smaller '
                         f'--batch-size or --input-size; {run.last_good()}') from error


def start_loader(worker):
    """What a loader process does first: OpenCV in one thread (torch has one there already), and no Ctrl-C."""
    cv2.setNumThreads(1)
    ignore_interrupt(worker)


def in_processes(function, arguments, workers):
    """function(*a) for every a of arguments, in order, as they get done; in `workers` processes if more than one."""
    if workers == 1:
        yield from itertools.starmap(function, arguments)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), ignore_interrupt, (0,)) as pool:
        # the processes inherit that they ignore Ctrl-C: it would end in a traceback of what they import
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            futures = [pool.submit(function, *a) for a in arguments]
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise InputError(f'one of the {workers} processes was killed, perhaps for its memory; run the same command '
                             f'again, with fewer --workers') from None
        finally:
            pool.shutdown(cancel_futures=True)
