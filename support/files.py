"""Write files and folders atomically, lock folders, hash files, and find the run folder of a checkpoint."""
import atexit
import contextlib
import hashlib
import json
import os
import platform
import shutil
import uuid
import warnings
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from support.script import InputError

try:
    import fcntl
except ImportError:                                # Windows
    import msvcrt
    fcntl = None


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`, with the same extension; rename it to `path` if the block succeeds.

    A reader sees the old file or the complete new one. On an exception the temporary file is removed, and `path` is
    not changed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f'.tmp_{uuid.uuid4().hex}{path.suffix}'   # named before the try: a signal cannot lose it
    try:
        yield str(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


class FolderLock:
    """A lock by the operating system on `folder/.lock`, so that at most one process writes there. Makes the folder.

    `release()`, the end of the `with` block or the end of the process unlocks it. The file that a killed process leaves
    behind locks nothing. Other computers see the lock if the shared file system supports locks; a file system without
    locks gives a note, and no lock. A process may lock a folder again. Processes of torchrun that write into one folder
    each lock their own file, by `rank`. Raises InputError that names the process which holds the lock.
    """

    def __init__(self, folder, rank=0):
        self.path = Path(folder) / f'.lock{rank or ""}'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self._open()
        if not self.is_in_place():                 # its owner removed it before we locked it
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
        """Whether the folder and its lock file are still at their path."""
        try:
            return os.path.samestat(os.fstat(self.file), os.stat(self.path))
        except OSError:
            return False

    def check(self):
        """Raise InputError if the folder was moved or deleted. Writing now would make a second, partial folder."""
        if not self.is_in_place():
            raise InputError(f'{self.path.parent} was moved or deleted while it was written; run the same command '
                             f'again with its new path: finished images are kept')

    def release(self):
        """Unlock the folder and remove the lock file."""
        atexit.unregister(self.release)
        if self.file is not None:
            if self.is_in_place():
                with contextlib.suppress(OSError):                       # Windows does not remove open files
                    self.path.unlink()
            os.close(self.file)
            self.file = None


def _lock(file):
    """Lock an open file for this process. Raises BlockingIOError or PermissionError if another process holds the lock.

    Loader processes do not inherit a lock by lockf. So it ends with this process, even if its loaders live on.
    """
    if fcntl:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        os.lseek(file, 2 ** 30, os.SEEK_SET)                             # not byte 0: nobody can read a locked byte
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)


def write_text(path, text):
    """Write `text` (UTF-8) to `path`, atomically."""
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding='utf-8')


def sha256_of(path):
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while piece := file.read(2 ** 20):
            digest.update(piece)
    return digest.hexdigest()


def hash_of(values):
    """SHA-256 of values that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def save_image(path, array):
    """Save a uint8 (H, W) or (H, W, 3) array as an image, or a uint16 (H, W) array as PNG, atomically.

    The extension of `path` (.png, .bmp, ...) decides the format.
    """
    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(array)).save(temporary)


BIG = 2 ** 32 - 2 ** 25                            # bytes of pixels above which a TIFF must be a BigTIFF


def save_instances(path, label):
    """Save an instance label, int (H, W), as TIFF (deflate) or PNG, by the extension of `path`.

    Its ids are stored as uint16, or as uint32 if one is above 65,535. A TIFF of 4 GB of pixels becomes a BigTIFF.
    Raises ValueError for a PNG with ids above 65,535.
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
        # tifffile chooses BigTIFF itself only for uncompressed data
        tifffile.imwrite(temporary, pixels, compression='zlib', photometric='minisblack', bigtiff=pixels.nbytes > BIG)


def run_of(checkpoint):
    """The run folder of a checkpoint, str; '' if the checkpoint is not in a folder named `checkpoints`."""
    path = Path(checkpoint)
    if not checkpoint or path.resolve().parent.name != 'checkpoints':
        return ''
    return str(path.parent.parent if path.parent.name == 'checkpoints' else path.resolve().parents[1])


def results_folder(checkpoint, dataset):
    """Default folder for the results of a checkpoint: `best` (or its epoch) in its run folder, else in experiments/."""
    run, name = run_of(checkpoint), Path(Path(checkpoint).name.removesuffix('.tar')).stem
    return f'{run}/{name.removeprefix("checkpoint_")}' if run else f'./experiments/{dataset}/{name}'


@contextlib.contextmanager
def new_folder(folder):
    """Yield a new, empty folder, which replaces `folder` if the block succeeds.

    On an exception, or if the process is killed, `folder` is not changed. Raises InputError if `folder` cannot be
    replaced, or if another process is writing a new one.
    """
    folder = Path(folder).resolve()
    if os.path.ismount(folder):
        raise InputError(f'{folder} is a mount point, which cannot be replaced; give a folder in it')
    place = folder.with_name(f'.{folder.name}.preparing')
    new, old = place / 'new', place / 'old'
    try:
        with FolderLock(place):
            if old.exists() and not folder.exists():            # a process was killed between the two renames below
                os.replace(old, folder)
            for rest in (new, old):
                shutil.rmtree(rest, ignore_errors=True)
            new.mkdir()
            yield new
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
    finally:
        if not (place / '.lock').exists():                      # else another process works there
            if old.exists() and not folder.exists():            # an exception between the two renames
                os.replace(old, folder)
            shutil.rmtree(place, ignore_errors=True)
