"""Writing files: whole or not at all, and into a folder that nobody else writes."""
import atexit
import contextlib
import hashlib
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


def run_of(checkpoint):
    """The run folder of a checkpoint, '' if it does not lie in the folder `checkpoints` of one."""
    path = Path(checkpoint)
    if not checkpoint or path.resolve().parent.name != 'checkpoints':
        return ''
    return str(path.parent.parent if path.parent.name == 'checkpoints' else path.resolve().parents[1])


def results_folder(checkpoint, dataset):
    """Where the results of a checkpoint go by default: its run folder / `best`, or the like."""
    run, name = run_of(checkpoint), Path(checkpoint).name.split('.')[0]
    return f'{run}/{name.removeprefix("checkpoint_")}' if run else f'./experiments/{dataset}/{name}'


@contextlib.contextmanager
def new_folder(folder):
    """Yield a new, empty folder, which takes the place of `folder` if the block succeeds.

    On an exception, or if the process is killed, `folder` stays as it was. Raises InputError if `folder` cannot be
    replaced, or if another process is about to.
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
            shutil.rmtree(place, ignore_errors=True)
