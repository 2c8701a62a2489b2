"""How scripts start and end: errors of the user in one line, exit codes, Ctrl-C, the variables of torchrun."""
import argparse
import atexit
import contextlib
import errno
import math
import multiprocessing
import os
import re
import signal
import sys
import warnings

import torch
from tqdm import tqdm


class InputError(ValueError):
    """A mistake that the user can correct. Its message is one line: what was found and expected, where, what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError instead of printing its usage, and expands `~` in paths."""

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([expand_home(word) for word in words], namespace)

    def error(self, message):
        raise InputError(f'{message} (see python {self.prog} --help)')


def expand_home(word):
    """Expand `~` in `~/x` and `--option=~/x` to the home folder. A shell does not do it in the latter."""
    option, equals, value = word.partition('=') if word.startswith('--') else ('', '', word)
    return option + equals + (os.path.expanduser(value) if value[:1] == '~' else value)


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# a drive or network folder that went away, or that holds no files as large as this one
DRIVE_FAILED = tuple(getattr(errno, name) for name in ('EIO', 'ENOTCONN', 'ESTALE', 'ENODEV', 'EFBIG')
                     if hasattr(errno, name))
# A bar sets its own `disable` in __init__. One that a signal stops before that has this one: its __del__ closes nothing.
tqdm.disable = True


def run_script(main):
    """Run `main()` as a program. Exit codes: 0 done, 2 a mistake of the user, 130 / 143 SIGINT / SIGTERM.

    An `InputError`, a missing or forbidden file, a full disk and too little memory print one line on stderr. Any other
    exception is a bug of this code: it prints its traceback and exits with 1.
    """
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:                            # the shell closed it with `>&-`
            setattr(sys, name, open(os.devnull, 'w'))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')         # file names that the terminal cannot show
    warnings.showwarning = lambda message, *_: _say(f'note: {message}')
    with contextlib.suppress(InputError):                         # `Processes` raises this error again later
        if place_among_processes()[0] > 0:                        # only process 0 prints
            sys.stdout = open(os.devnull, 'w')
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))       # exiting removes temporary files
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
        if error.errno in DISK_FULL + DRIVE_FAILED:
            _exit_with(2, f'error: {disk_problem(error)}, then run the same command again')
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


def disk_problem(error):
    """The message for an OSError whose errno is in DISK_FULL or DRIVE_FAILED."""
    if error.errno in DISK_FULL:
        return f'no space left on the disk while writing {error.filename or "a file"}; make room'
    return f'{error.strerror}: {error.filename or "a file"}; the drive or network folder may be gone: check it'


class StopRequest:
    """Lets Ctrl-C and SIGTERM stop a long computation at its next `check`. A second signal stops it at once.

    A context manager, for the main thread. `check(save)` does nothing before a signal. After one it calls `save()` and
    exits with 130 (SIGINT) or 143 (SIGTERM). Of several `processes`, all must call `check` equally often, and all stop
    when one gets a signal. There a second signal is ignored: torchrun sends the first one to all processes again.
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
            _say('\nstopping after this step; saving a checkpoint' + '; press Ctrl-C again to stop at once' * alone)

    def check(self, save):
        """If a signal came to any of the processes, call `save()` and exit."""
        number = self.processes.largest(self.signal or 0)
        if number:
            save()
            self.processes.wait()
            sys.exit(128 + number)


def check_name(name, place='the command line'):
    """Raise InputError if a name holds bytes that Python could not decode. It could not be written to a text file."""
    if any('\ud800' <= character <= '\udfff' for character in name):
        encoding = sys.getfilesystemencoding()
        remedy = 'rename it' if encoding == 'utf-8' else f'Python reads names as {encoding}: set PYTHONUTF8=1'
        raise InputError(f'{place}: the name {ascii(name)} is not UTF-8; {remedy}')


def _say(message):
    with contextlib.suppress(OSError):            # in `train.py 2>&1 | tee log`, Ctrl-C ends tee too: nobody reads this
        print(message, file=sys.stderr)


def _exit_with(code, message):
    _say(' '.join(message.split('\n')).strip())
    sys.exit(code)


def note(message):
    """Tell the user something that is not an error. The same message is shown once."""
    warnings.warn(message, stacklevel=2)


def ignore_interrupt(worker):
    """Set up a worker process to ignore Ctrl-C and SIGTERM. The main process handles them, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers():
    """At the exit of Python, kill the worker processes that an error left. They ignore the SIGTERM of Python."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, 'SIGCHLD'):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)               # torch's handler would report them as crashed
    for child in children:
        child.kill()


def place_among_processes():
    """(rank, local rank, count): number of this process on all machines, its number on this machine, and the count.

    They come from torchrun's environment variables; without any it is (0, 0, 1). Raises InputError if one of the
    variables is missing, empty or not a possible number.
    """
    names = 'WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_PORT', 'MASTER_ADDR'
    values = {name: os.environ[name] for name in names if name in os.environ}
    if not values.keys() & {'WORLD_SIZE', 'RANK', 'LOCAL_RANK'}:
        return 0, 0, 1
    if values.get('WORLD_SIZE') == '1':            # other launchers set this too; one process needs no address
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


atexit.register(end_workers)      # after multiprocessing registered its own exit function, and so runs before it
