"""Devices (CUDA, Apple MPS, CPU), the processes of torchrun, mixed precision, and worker processes."""
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

from support.script import (DISK_FULL, DRIVE_FAILED, InputError, disk_problem, ignore_interrupt,
                            place_among_processes)


def choose_device(gpu='auto', process=0, n_processes=1):
    """Choose the torch.device of this process.

    gpu: 'auto' takes the first of CUDA, Apple MPS and CPU that exists; [] is the CPU; a list of int names CUDA GPUs.
    process: number of this process on this machine. n_processes: how many torchrun started; each takes its own GPU.
    Raises InputError if a GPU does not exist or does not work, or if one process is given several GPUs. With 'auto' and
    one process, a GPU that does not work is only a note, and the CPU is used.
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
    problem = device_problem(device)
    if problem and gpu == 'auto' and n_processes == 1:
        warnings.warn(f'GPU {device.index} cannot be used ({problem}); the CPU is used instead', stacklevel=2)
        return torch.device('cpu')
    if problem:
        raise InputError(f'GPU {device.index} cannot be used ({problem}); use --gpu cpu, or a PyTorch that fits the '
                         f'GPU and its driver')
    return device


def device_problem(device):
    """Try to compute on the device. Returns one line that says why it failed, or None if it worked."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                       # PyTorch warns in many lines of what the error says
            torch.zeros(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:
        return (str(error) or type(error).__name__).splitlines()[0][:200]


class Processes:
    """This process and the others that torchrun started; without torchrun there is one, which communicates nothing.

    rank: number of this process, from 0. count: number of processes on all machines. device: this process's device.
    quiet: the value for tqdm's `disable`; only process 0 shows progress bars. Raises InputError for a GPU that does not
    exist and for incomplete environment variables of torchrun.
    """

    def __init__(self, gpu='auto'):
        self.rank, local_rank, self.count = place_among_processes()
        self.device = choose_device(gpu, local_rank, self.count)
        self.quiet = True if self.rank > 0 else None
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
        if self.count > 1 and not distributed.is_initialized():
            # A process may wait for hours while another tests a large image. A lost process is noticed without timeout.
            distributed.init_process_group('nccl' if self.device.type == 'cuda' else 'gloo',
                                           timeout=datetime.timedelta(days=7))
            # gloo's thread aborts if the interpreter ends while that thread still releases the last reduction
            atexit.register(time.sleep, 0.1)

    def _reduce(self, values, operation):
        if self.count == 1:
            return list(values)
        # The tensor is kept as an attribute, to avoid a deadlock of torch 2.6: gloo's thread would need the interpreter
        # to free the tensor, while `shut_down` holds the interpreter and waits for that thread.
        self.last = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(self.last, operation)
        return self.last.tolist()

    def sums(self, values):
        """Sum each number over the processes. values: list of numbers; returns a list of float."""
        return self._reduce(values, distributed.ReduceOp.SUM)

    def largest(self, number):
        """The largest value of this int over the processes."""
        return int(self._reduce([number], distributed.ReduceOp.MAX)[0])

    def from_first(self, number):
        """The value of this number in process 0, as float."""
        return self.sums([number if self.rank == 0 else 0])[0]

    def copy_from_first(self, tensors):
        """Overwrite the tensors with the values that they have in process 0."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def own_images(self, n_images):
        """Indices of the images that this process validates, list of int.

        All processes get equally many, because they wait for each other; the last image may be repeated for that.
        """
        return [min(i, n_images - 1) for i in range(self.rank, -(-n_images // self.count) * self.count, self.count)]

    def wait(self):
        """Wait until every process has called this."""
        self.largest(0)

    def shut_down(self):
        """Shut down the process group."""
        if self.count > 1:
            distributed.destroy_process_group()

    def distribute(self, model):
        """Wrap the model so that gradients are averaged over the processes (DistributedDataParallel)."""
        if self.count == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, [self.device] if self.device.type == 'cuda' else None)

    def synchronise_batch_norm(self, model):
        """On CUDA, let batch norm use the crops of all processes. On the CPU, PyTorch cannot do this."""
        several = self.count > 1 and self.device.type == 'cuda'
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if several else model

    @contextlib.contextmanager
    def report_lost_process(self, advice):
        """Raise InputError if in the block another process ends or a disk is full. `advice()` ends the message."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not re.search('gloo|nccl|connection', str(error), re.IGNORECASE):
                raise
            raise InputError(f'process {self.rank}: another process of this run ended; {advice()}') from error
        except OSError as error:
            if error.errno not in DISK_FULL + DRIVE_FAILED:
                raise
            raise InputError(f'{disk_problem(error)}; {advice()}') from error


def put_on(device, model):
    """Move the network to the device. On CUDA its layout becomes channels last, which suits the tensor cores."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if device.type == 'cuda' else model


def windows_at_once(device):
    """How many windows of an image form one batch, in validation and testing."""
    return 1 if device.type == 'cpu' else 8


class MixedPrecision:
    """Half precision in the network; the loss stays in float32.

    CUDA: autocast to bfloat16, or to float16 with a scaled loss on GPUs without bfloat16. CPU: the dense blocks are
    computed in bfloat16 (FullNet.set_mode); on processors with AMX, testing uses autocast instead, which is faster
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
    """Number of loader processes: `workers`, unless that is 'auto'.

    'auto' on a GPU: one for each usable CPU but one, at most 16, divided by the number of training processes on this
    machine. 'auto' on the CPU: one, because training needs the CPUs itself.
    """
    if workers != 'auto':
        return workers
    if processes.device.type == 'cpu':
        return 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, min(16, usable - 1) // int(os.environ.get('LOCAL_WORLD_SIZE') or 1))


@contextlib.contextmanager
def report_out_of_memory(last_good):
    """Raise InputError if the memory of the GPU, or /dev/shm, runs out in the block. `last_good()` ends the message."""
    try:
        yield
    except RuntimeError as error:
        if re.search(r'shared memory|\bshm\b|Bus error', str(error)):
            raise InputError(f'/dev/shm, through which loader processes send their images, is too small; enlarge it '
                             f'(docker run --shm-size=2g), or give --workers 0; {last_good()}') from error
        if not isinstance(error, torch.OutOfMemoryError) and 'CUDA error: out of memory' not in str(error):
            raise
        said = str(error).splitlines()[0][:100]
        raise InputError(f'not enough memory on the GPU ({said}); give --amp True, or begin a new run with a smaller '
                         f'--batch-size or --input-size; {last_good()}') from error


def start_loader(worker):
    """Set up a loader process: it ignores Ctrl-C, and OpenCV uses one thread (PyTorch does so already)."""
    cv2.setNumThreads(1)
    ignore_interrupt(worker)


def in_processes(function, arguments, workers):
    """Yield function(*a) for every tuple `a` of arguments, in order, computed in `workers` processes.

    Raises InputError if a process is killed.
    """
    if workers == 1:
        yield from itertools.starmap(function, arguments)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), ignore_interrupt, (0,)) as pool:
        # the processes inherit that Ctrl-C is ignored; else it would stop their imports with a traceback
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            futures = [pool.submit(function, *a) for a in arguments]
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise InputError(f'one of the {workers} processes was killed, perhaps because memory ran out; run the same '
                             f'command again, with fewer --workers') from None
        finally:
            pool.shutdown(cancel_futures=True)
