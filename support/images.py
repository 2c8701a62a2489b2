"""Read images and instance labels, and list folders of them."""
import gzip
import io
import itertools
import json
import logging
import re
import struct
import unicodedata
import zlib
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageOps
from scipy import ndimage
from scipy.io import loadmat
from skimage import measure

from support.script import InputError, check_name, note

IMAGE_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.tif', '.tiff')
FORMATS = ('PNG', 'JPEG', 'BMP', 'PPM', 'TIFF')        # Pillow knows more, and starts Ghostscript for one of them
LABEL_ENDINGS = ('', '_label', '_anno', '_labels', '_mask', '_masks', '_cp_masks', '-labelled', '_GT')   # behind a name
GEOJSON_EXTENSIONS = ('.geojson', '.json', '.gz')
LABEL_EXTENSIONS = ('.png', '.bmp', '.tif', '.tiff', '.npy', '.mat')
WHOLE_SLIDE_EXTENSIONS = ('.svs', '.ndpi', '.mrxs', '.scn', '.vsi', '.czi', '.bif', '.vms')
WHOLE_SLIDE = 'whole-slide files are not read; export a region as TIFF, for instance with QuPath (File > Export images)'
MAX_MEGAPIXELS = 1000
# of TIFFs: none, CCITT, LZW, JPEG, deflate, PackBits, deflate
USUAL_COMPRESSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946)
# A file that declares more pixels than its bytes can hold is refused, if it is larger than ANY_MEGAPIXELS. Deflate
# compresses at most 1,032 to 1, and a byte holds at most 8 pixels of a palette image.
PIXELS_PER_BYTE = 10_000
ANY_MEGAPIXELS = 16

logging.getLogger('tifffile').setLevel(logging.CRITICAL)       # our InputErrors say what is damaged
Image.MAX_IMAGE_PIXELS = None        # `open_image` checks max_megapixels instead


def list_images(folder, extensions=IMAGE_EXTENSIONS, name_others=False):
    """Sorted paths of the image files in `folder`, without hidden files. With `name_others` a note names other files.

    Raises InputError if `folder` is missing, is a file, or holds no image, or two images of one stem.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f'no such folder: {folder}')
    if not folder.is_dir():
        raise InputError(f'expected a folder, found a file: {folder}')
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith('.'))
    for name in names:
        check_name(name, folder)
    paths = [folder / n for n in names if Path(n).suffix.lower() in extensions]
    if not paths:
        slide = next((n for n in names if Path(n).suffix.lower() in WHOLE_SLIDE_EXTENSIONS), None)
        raise InputError(f'no images in {folder}: looked for {" ".join(extensions)}, '
                         f'saw {", ".join(names[:5]) or "an empty folder"}' + (f'; {WHOLE_SLIDE}' if slide else ''))
    others = [n for n in names if Path(n).suffix.lower() not in extensions]
    if name_others and others:
        note(f'{len(others)} files in {folder} are not images and are skipped: ' + ', '.join(others[:5])
             + ', ...' * (len(others) > 5))
    by_stem = {}
    for path in paths:
        by_stem.setdefault(path.stem, []).append(path.name)
    for same in by_stem.values():
        if len(same) > 1:
            raise InputError(f'two images of one name in {folder}: {" and ".join(same)}; keep one of them')
    return paths


def find_labels(images, label_dir, extensions=LABEL_EXTENSIONS, hint=''):
    """The path of the instance label of each image: `{name}` with one of LABEL_ENDINGS in label_dir.

    Names are compared in their composed Unicode form. Raises InputError if an image has two labels or none (the latter
    message ends with `hint`), or if label_dir is the folder of the images.
    """
    if images and Path(label_dir).resolve() == images[0].resolve().parent:
        raise InputError(f'images and labels are both in {label_dir}; move the labels into a folder of their own')
    files = {composed(Path(p.name.removesuffix('.gz')).stem): p for p in list_images(label_dir, extensions)}
    # the label a_GT is that of an image a_GT, not of an a; also if only a is to be tested
    beside = images[0].parent.iterdir() if images and images[0].parent.is_dir() else ()
    stems = {composed(path.stem) for path in (*images, *beside) if path.suffix.lower() in IMAGE_EXTENSIONS}
    labels = [[files[stem + ending] for ending in LABEL_ENDINGS
               if stem + ending in files and (not ending or stem + ending not in stems)]
              for stem in (composed(path.stem) for path in images)]
    missing = [path.name for path, found in zip(images, labels) if not found]
    if missing:
        first = Path(missing[0]).stem
        raise InputError(missing_files_message('instance labels of images', missing, label_dir)
                         + f'; for the first looked for {", ".join(first + ending for ending in LABEL_ENDINGS)} with '
                           f'{" ".join(extensions)}; saw {", ".join(p.name for p in list(files.values())[:3])}{hint}')
    for path, found in zip(images, labels):
        if len(found) > 1:
            names = ' and '.join(label.name for label in found)
            raise InputError(f'{names} in {label_dir} are both named as labels of {path.name}; keep one of them there')
    image_of = {}
    for path, (label,) in zip(images, labels):
        other = image_of.setdefault(label, path)
        if other != path:
            raise InputError(f'{label} is named as the label of both {other.name} and {path.name}; rename it')
    return [label for label, in labels]


def composed(name):
    """A file name in composed Unicode form. macOS uses another form, which looks the same but is not equal."""
    return unicodedata.normalize('NFC', name)


def refuse_same_folder(data_dir, save_dir):
    """Raise InputError if input and output are the same folder."""
    if Path(data_dir).resolve() == Path(save_dir).resolve():
        raise InputError(f'reading from and writing to the same folder {data_dir}; give another folder to write to')


def missing_files_message(kind, missing, folder):
    """One line with the number of missing files and the names of up to five."""
    names = ', '.join(missing[:5]) + (', ...' if len(missing) > 5 else '')
    return f'{len(missing)} {kind} missing in {folder}: {names}'


def shorter_side(paths):
    """Median of the shorter sides of images, in pixels, float. Only headers are read."""
    sides = []
    for path in paths:
        with open_image(path) as image:
            sides.append(min(image.size))
    return float(np.median(sides))


def open_image(path, max_megapixels=MAX_MEGAPIXELS):
    """Open an image file with Pillow and check its size. Only the header is read; the pixels are not decoded.

    Raises InputError if it is missing, empty, not an image, or larger than `max_megapixels`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f'no such file: {path}' if not path.exists() else f'expected a file, found a folder: {path}')
    try:
        n_bytes = path.stat().st_size
    except FileNotFoundError:                                    # it was moved a moment ago
        raise InputError(f'no such file: {path}') from None
    if n_bytes == 0:
        raise InputError(f'{path} is empty (0 bytes); copy it again')
    if path.suffix.lower() in WHOLE_SLIDE_EXTENSIONS:
        raise InputError(f'{path}: {WHOLE_SLIDE}')
    try:
        image = Image.open(path, formats=FORMATS)
    except (Image.UnidentifiedImageError, OSError, ValueError, SyntaxError, struct.error) as error:
        if isinstance(error, PermissionError):
            raise InputError(f'cannot read {path}: permission denied') from error
        if isinstance(error, FileNotFoundError):
            raise InputError(f'no such file: {path}') from error
        refuse_unusual_tiff(path)
        raise InputError(f'{path} is not an image that can be read ({type(error).__name__}); '
                         f'expected one of {" ".join(IMAGE_EXTENSIONS)}') from error
    _check_megapixels(path, image.width, image.height, max_megapixels)
    offsets = [offset for _, _, offset, *_ in image.tile if isinstance(offset, int)]
    if max(offsets, default=0) > n_bytes:                        # Pillow would allocate that much
        raise damaged(path, 'pixels beyond the end of the file')
    return image


def _check_megapixels(path, width, height, max_megapixels):
    """Raise InputError if an image is larger than max_megapixels, or than its file can hold."""
    megapixels, n_bytes = width * height / 1e6, path.stat().st_size
    if megapixels > max_megapixels:
        raise InputError(f'{path} declares {width} x {height} = {megapixels:.0f} megapixels, more than '
                         f'max_megapixels = {max_megapixels}; crop it or raise the limit')
    if megapixels > ANY_MEGAPIXELS and megapixels * 1e6 > PIXELS_PER_BYTE * n_bytes:
        raise InputError(f'{path} declares {width} x {height} pixels, more than its '
                         f'{n_bytes:,} bytes can hold; it is damaged or truncated: copy it again')


def image_size(path, max_megapixels=MAX_MEGAPIXELS):
    """(height, width) of the image that `read_image` returns, from the header. Raises InputError as `open_image`."""
    with open_image(path, max_megapixels) as image:
        if orientation_of(image, path) != 1:                             # Pillow turns only some TIFFs itself
            try:
                image = ImageOps.exif_transpose(image)
            except Exception as error:
                raise damaged(path, error) from error
        return image.height, image.width


def orientation_of(image, path):
    """The EXIF orientation of an opened Pillow image, 1 to 8; 1 if there is none or no valid one.

    Raises InputError if the file is damaged: in a PNG, EXIF may follow the pixels, so that Pillow decodes them first.
    """
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception as error:
        raise damaged(path, error) from error
    return orientation if orientation in range(1, 9) else 1


def refuse_unusual_tiff(path):
    """Raise InputError if a file is an undamaged TIFF of a kind that is not supported, such as JPEG 2000."""
    page = _first_page(path)
    if page is None:
        return
    if page.compression not in USUAL_COMPRESSIONS:
        name = getattr(page.compression, 'name', page.compression)
        raise InputError(f'{path} is a TIFF with {name} compression, which is not read; save it uncompressed, or with '
                         f'deflate')
    if page.dtype is not None and (page.dtype.itemsize == 8 or page.dtype == np.float16):
        kind = 'a floating-point' if page.dtype.kind == 'f' else 'a 64-bit'
        raise InputError(f'{path} is {kind} image ({page.dtype}); expected 8-bit RGB')


def _first_page(path):
    """The first page of a TIFF, a tifffile page; None if the file is not a TIFF, or damaged."""
    try:
        with tifffile.TiffFile(path) as file:
            return file.pages[0]
    except Exception:                # on a damaged file tifffile can raise almost any error
        return None


def damaged(path, error):
    """The InputError, in one line, for a file that a decoder could not read. error: what the decoder said."""
    refuse_unusual_tiff(path)
    said = ' '.join(str(error).split())[:200] or type(error).__name__
    return InputError(f'{path} is damaged or truncated ({said}); copy it again')


def decode(image, path):
    """Decode an opened Pillow image to an array. Raises InputError if the file is damaged."""
    try:
        return np.array(image)
    except Exception as error:       # on damaged data Pillow can raise almost any error
        raise damaged(path, error) from error


def bits_per_channel(image):
    """Bits per channel in the file, int. Pillow itself opens a 16-bit RGB PNG, TIFF or PPM as if it had 8."""
    if image.format == 'PNG' and image.tile:
        raw_mode = image.tile[0][3]
        raw_mode = raw_mode if isinstance(raw_mode, str) else raw_mode[0]
        if '16' in str(raw_mode):
            return 16
        if raw_mode in ('L;2', 'L;4'):
            return int(raw_mode[-1])
    if image.format == 'TIFF':
        return max(image.tag_v2.get(258, (8 if image.mode != '1' else 1,)))
    if image.format == 'PPM' and image.mode in ('I', 'RGB'):
        layout = image.tile[0][3]                 # raw mode, or (raw mode, largest value)
        return 16 if image.mode == 'I' or (isinstance(layout, tuple) and layout[1] > 255) else 8
    return {'1': 1, 'I': 32, 'F': 32}.get(image.mode, 16 if image.mode.startswith('I;16') else 8)


def read_image(path, max_megapixels=MAX_MEGAPIXELS, scale_16bit=None):
    """Read an image as RGB, uint8 (H, W, 3).

    Grey and palette images are converted, alpha is dropped, an EXIF orientation is applied, and of an animation the
    first frame is taken, each with a note. `scale_16bit=(lo, hi)` maps 16-bit images linearly from lo..hi to 0..255.
    Raises InputError for 16-bit images without it, for 1-bit, float, CMYK and multi-page files, and as `open_image`.
    """
    path = Path(path)
    image = open_image(path, max_megapixels)
    planes = _three_planes(image, path)
    if planes is not None:
        return planes
    _check_frames(image, path)
    try:
        bits = bits_per_channel(image)
    except Exception as error:
        raise damaged(path, error) from error
    if image.mode == '1' or bits == 1:
        raise InputError(f'{path} is a 1-bit image; expected 8-bit RGB')
    if image.mode == 'F':
        raise InputError(f'{path} is a floating-point image; expected 8-bit RGB')
    if bits == 16:
        if image.format not in ('PNG', 'TIFF'):
            raise InputError(f'{path} has 16 bits per channel, which are read from PNG and TIFF only; convert it')
        if scale_16bit is None:
            raise InputError(f'{path} has 16 bits per channel, expected 8; give --scale-16bit LO HI to map '
                             f'LO..HI to 0..255')
        if orientation_of(image, path) != 1:
            raise InputError(f'{path} has 16 bits per channel and an EXIF orientation; turn its pixels, or convert it '
                             f'to 8 bits')
        return _read_16bit(image, path, scale_16bit)
    if image.mode not in ('RGB', 'RGBA', 'LA', 'L', 'P', 'PA', 'RGBX'):
        raise InputError(f'{path} has colour mode {image.mode}; expected 8-bit RGB')
    if image.mode in ('L', 'P', 'PA', 'LA'):
        note(f'{path.name}: {"palette" if image.mode[0] == "P" else "grey"} image, converted to RGB')
    has_alpha = image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info
    try:
        orientation = orientation_of(image, path)
        if orientation != 1:
            note(f'{path.name}: turned by its EXIF orientation ({orientation})')
            image = ImageOps.exif_transpose(image)
        if has_alpha:
            image = image.convert('RGBA')
            if image.getextrema()[3][0] < 255:
                note(f'{path.name}: its alpha channel is not fully opaque; it was dropped')
        if image.mode != 'RGB':
            image = image.convert('RGB')
    except InputError:
        raise
    except Exception as error:
        raise damaged(path, error) from error
    return decode(image, path)


def _three_planes(image, path):
    """Read a TIFF whose metadata (ImageJ, OME) say that its three grey pages are channels: uint8 RGB (H, W, 3).

    None for any other file.
    """
    if image.format != 'TIFF' or image.mode != 'L':
        return None
    try:
        if image.n_frames != 3:
            return None
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            if series.axes == 'CYX' and len(series.shape) == 3 and series.dtype == np.uint8:
                note(f'{path.name}: three grey pages, which its metadata call channels, are read as RGB')
                return np.ascontiguousarray(np.moveaxis(series.asarray(), 0, -1))
    except Exception as error:
        raise damaged(path, error) from error
    return None


def _check_frames(image, path):
    """Refuse a TIFF of several pages, unless the further ones are reduced-resolution copies of the first (a pyramid).

    Of another animated file the first frame is used, with a note.
    """
    try:                             # Pillow reads the header of every page
        frames = getattr(image, 'n_frames', 1)
        if frames > 1 and image.format != 'TIFF':
            note(f'{path.name}: animated, only the first of its {frames} frames is used')
        for frame in range(1, frames if image.format == 'TIFF' else 1):
            image.seek(frame)
            if not image.tag_v2.get(254, 0) & 1:
                hint = '; to make RGB of three grey pages: Image > Type > RGB Color in ImageJ, or export it from QuPath'
                raise InputError(f'{path} has {frames} pages; expected one image per file' + hint * (frames == 3))
        image.seek(0)
    except InputError:
        raise
    except Exception as error:
        raise damaged(path, error) from error


OTHER_16BIT = 'has 16 bits per channel, and other channels than grey, RGB or RGBA; convert it to RGB'


def _read_16bit(image, path, scale):
    """Read a 16-bit PNG or TIFF as RGB, uint8 (H, W, 3), mapped linearly from scale = (lo, hi) to 0..255."""
    if image.mode == 'CMYK':
        raise InputError(f'{path} {OTHER_16BIT}')
    lo, hi = scale
    tags = image.tag_v2 if image.format == 'TIFF' else {}
    in_strips = 322 not in tags and tags.get(284, 1) == 1        # OpenCV misreads channels in separate planes
    pixels = _read_with_opencv(path) if in_strips else _read_with_tifffile(path)
    if pixels.dtype.itemsize != 2 or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise InputError(f'{path} {OTHER_16BIT}')
    pixels = np.clip((pixels.astype(np.float32) - lo) * (255.0 / (hi - lo)), 0, 255).astype(np.uint8)
    if tags.get(262) == 0:                                       # a file in which 0 is white
        pixels = 255 - pixels
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., :3])


def _read_with_opencv(path):
    """The stored values of a grey, RGB or RGBA image: (H, W), or RGB (H, W, 3)."""
    data = np.fromfile(path, np.uint8)
    if bytes(data[1:4]) == b'PNG' and data[25] == 4:                         # grey and alpha
        raise InputError(f'{path} {OTHER_16BIT}')
    pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise InputError(f'{path} is damaged or truncated; copy it again')
    return pixels if pixels.ndim == 2 else pixels[..., 2::-1]                # from BGR or BGRA


def _read_with_tifffile(path):
    """The stored values of a TIFF: (H, W) or (H, W, channels)."""
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]               # a damaged list of pages could be endless
            if max(page.databytecounts) > path.stat().st_size:           # tifffile would allocate that much
                raise ValueError('a strip is longer than the file')
            if min(page.databytecounts) == 0:                            # tifffile would fill it with zeros
                raise ValueError('a strip is missing')
            pages = itertools.islice(file.pages, 1, 2)
            if any(not other.is_reduced for other in pages):
                raise InputError(f'{path} has several pages; expected one image per file')
            pixels = page.asarray()
            return np.moveaxis(pixels, 0, -1) if page.axes[0] == 'S' else pixels
    except InputError:
        raise
    except Exception as error:
        if 'imagecodecs' in str(error) or isinstance(error, ImportError):
            raise InputError(f'{path} is a TIFF whose kind and compression are not supported together; save it '
                             f'uncompressed, or with deflate') from error
        raise damaged(path, error) from error


def read_instance_label(path, image_shape=None, binary_labels=False, max_megapixels=MAX_MEGAPIXELS):
    """Read an instance label: int32 (H, W), 0 = background, one positive id per object; ids may have gaps.

    Accepts integer images of 8, 16 or 32 bits, palette images (the indices are the ids), RGB with three equal
    channels, integer .npy arrays, and the variable inst_map of MATLAB files (.mat, before version 7.3).
    `image_shape` (H, W), when given, must match. Raises InputError for colour, fractional, negative and JPEG labels,
    and for a 0/255 mask unless `binary_labels` is set, which labels the 8-connected components of masks and class maps.
    """
    path = Path(path)
    if path.suffix.lower() in ('.jpg', '.jpeg'):
        raise InputError(f'{path} is a JPEG, whose compression changes ids; expected a PNG, BMP, TIFF or .npy label')
    load = {'.npy': load_npy, '.mat': _load_mat}.get(path.suffix.lower())
    label = load(path) if load else _decode_label(path, max_megapixels)
    if label.ndim == 3 and 1 in (label.shape[0], label.shape[2]):         # one channel, as PyTorch or MATLAB keep it
        label = label[0] if label.shape[0] == 1 else label[..., 0]
    elif label.ndim == 3 and label.shape[2] == 3 and label.dtype == np.uint8:
        if not (label == label[..., :1]).all():
            raise InputError(f'{path} is a colour image; expected one integer id per pixel (0 = background)')
        note(f'{path.name}: RGB label with three equal channels, one of them is used')
        label = label[..., 0]
    if label.ndim != 2:
        raise InputError(f'{path} has shape {label.shape}; expected a label of shape (height, width)')
    if label.size == 0:
        raise InputError(f'{path} has no pixel, shape {label.shape}; expected a label of shape (height, width)')
    if label.dtype.kind == 'f':
        if not np.isfinite(label).all() or (label != np.floor(label)).any():
            raise InputError(f'{path} holds fractional or non-finite values; expected integer ids')
    elif label.dtype.kind not in 'iub':
        raise InputError(f'{path} holds {label.dtype} values; expected integer ids')
    if label.min() < 0:
        raise InputError(f'{path} holds negative ids; expected 0 = background and positive ids')
    if int(label.max()) > np.iinfo(np.int32).max:            # as int: float32 2 ** 31 would pass
        raise InputError(f'{path} holds ids above {np.iinfo(np.int32).max}')
    label = label.astype(np.int32)
    if image_shape is not None and label.shape != tuple(image_shape):
        raise InputError(f'{path} is {label.shape[1]} x {label.shape[0]} pixels, its image '
                         f'{image_shape[1]} x {image_shape[0]}; they must have the same size')
    return _instances_of(label, path, binary_labels)


def number_pieces(label):
    """Number the 8-connected pieces of equal value of a label, int (H, W).

    Returns them, int (H, W), from 1 in the order of their first pixels, 0 = background; and the value of each piece,
    int (n + 1,), with 0 for the background.
    """
    pieces = measure.label(label, background=0, connectivity=2)
    value_of_piece = np.zeros(pieces.max(initial=0) + 1, label.dtype)
    value_of_piece[pieces] = label
    return pieces, value_of_piece


def _instances_of(label, path, binary_labels):
    """The instances of a label, int32 (H, W), which may be a mask or a class map. Notes say what was done.

    With binary_labels they are the 8-connected components of the foreground. Foreground are the values above 0; if the
    largest value is above 16, those of at least half of it, because resizing and JPEG give masks values in between.

    A label that looks like an instance label is kept as it is. In such a label, at most one value, or less than half of
    the pixels, is in several pieces. And of more than 16 values the largest does not have most of the pixels, as it has
    in a mask of one object with grey edges.
    """
    if not label.any():
        note(f'{path.name}: the label has no object')
        return label
    pieces, value_of_piece = number_pieces(label)
    sizes = sum(np.bincount(pieces[top:top + 2048].ravel(), minlength=len(value_of_piece))        # bands save memory
                for top in range(0, len(pieces), 2048))
    values, value_number, n_pieces = np.unique(value_of_piece[1:], return_inverse=True, return_counts=True)
    areas, in_pieces, n_values = np.bincount(value_number, sizes[1:]), n_pieces > 1, len(values)
    half_of_all = areas.sum() / 2
    in_many_pieces = in_pieces.sum() > 1 and areas[in_pieces].sum() >= half_of_all
    is_instance_label = n_values > 1 and not in_many_pieces and not (n_values > 16 and areas[-1] > half_of_all)
    if binary_labels and is_instance_label:
        note(f'{path.name}: its {n_values} values look like one id per object and are kept, in spite of '
             f'--binary-labels')
    elif binary_labels:
        half = values[-1] > 16 and n_values > 1
        instances, n = ndimage.label(label >= values[-1] / 2 if half else label > 0, np.ones((3, 3)))
        if n_values > 1:
            rule = f'at least half of {values[-1]}' if half else 'above 0'
            note(f'{path.name}: {n_values} values; objects are the connected pixels {rule}: {n} objects')
        return instances.astype(np.int32)
    elif n_values == 1 and values[-1] == 255:
        raise InputError(f'{path} holds only 0 and 255, a mask rather than one id per object; '
                         f'give --binary-labels to take each 8-connected component as one object')
    elif n_values > 1 and label.min() > 0:
        note(f'{path.name}: no pixel is 0, which is the background; if the background has a number of its own, set it '
             f'to 0')
    elif not is_instance_label and pieces.max() > 1:
        note('labels with a few values in many pieces look like masks or class maps; if each piece is an object, give '
             '--binary-labels True')
    return label


def load_npy(path):
    """Load a .npy file without unpickling. Raises InputError if it is missing or not a plain array."""
    if not path.is_file():
        raise InputError(f'no such file: {path}')
    try:
        return np.array(np.lib.format.open_memmap(path, mode='r'))     # mapping does not allocate a damaged shape
    except Exception as error:       # a damaged header can raise almost any error
        raise InputError(f'{path} is not a plain NumPy array ({" ".join(str(error).split())[:200]})') from error


def read_json(path, at_most=2 ** 30):
    """The contents of a JSON file, in UTF-8 or UTF-16, with a byte order mark or without, packed with gzip or not.

    at_most: bytes, unpacked. Raises InputError.
    """
    try:
        with (gzip.open if str(path).endswith('.gz') else open)(path, 'rb') as file:
            content = file.read(at_most + 1)
        if len(content) > at_most:
            raise InputError(f'{path} is more than {at_most // 2 ** 20} MB unpacked; expected less: split it')
        return json.loads(content.decode('utf-16' if content[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig'))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f'no such file: {path}') from None
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(path, error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f'{path} is not JSON ({str(error)[:100]})') from None


def _load_mat(path):
    """The variable inst_map of a MATLAB file, an array. Raises InputError."""
    if not path.is_file():
        raise InputError(f'no such file: {path}')
    try:
        data = path.read_bytes()
        _check_mat(data)
        # reading from memory: a damaged size of gigabytes cannot allocate more than the file has
        contents = loadmat(io.BytesIO(data), variable_names=['inst_map'])
    except NotImplementedError as error:
        raise InputError(f'{path} is a MATLAB file of version 7.3; save it with -v7') from error
    except Exception as error:       # on damaged data loadmat can raise almost any error
        said = ' '.join(str(error).split())[:200]
        raise InputError(f'{path} is not a MATLAB file, or is damaged ({said})') from error
    if 'inst_map' not in contents:
        raise InputError(f'{path} has no variable inst_map; expected an instance label of that name')
    if not isinstance(contents['inst_map'], np.ndarray):
        raise InputError(f'{path}: inst_map is a sparse matrix; expected a full one: save full(inst_map)')
    return contents['inst_map']


def _check_mat(data):
    """Raise ValueError if a MATLAB 5 file has a data element of unknown type. SciPy would crash the process on it.

    data: the bytes of the file.
    """
    order = {b'IM': '<', b'MI': '>'}.get(data[126:128])
    if order and 1 in data[124:126]:                   # version 1; version 7.3 is 2, an HDF5 file
        _check_elements(memoryview(data)[128:], order)


def _check_elements(data, order):
    """Check the types and sizes of the elements in `data`, a memoryview. order: '<' or '>', the byte order."""
    while len(data) >= 8:
        kind, size = struct.unpack(order + 'II', data[:8])
        small = kind >> 16           # up to 4 bytes of data, stored in the size field
        if (kind & 0xffff if small else kind) not in (*range(1, 8), 9, *range(12, 19)):
            raise ValueError(f'element of type {kind}')
        if not small and size > len(data) - 8:
            raise ValueError('an element is longer than the file')
        if kind == 15:
            _check_elements(memoryview(zlib.decompress(data[8:8 + size])), order)
        elif kind == 14:
            _check_elements(data[8:8 + size], order)
        data = data[8 if small else 8 + (size if kind == 15 else -(-size // 8) * 8):]


def _decode_label(path, max_megapixels):
    page = _first_page(path) if path.suffix.lower() in ('.tif', '.tiff') else None
    if page is not None and page.dtype is not None and (
            page.dtype.itemsize == 8 or page.dtype == np.float16
            or (page.dtype == np.uint32 and page.parent.byteorder == '>')):
        _check_megapixels(path, page.imagewidth, page.imagelength, max_megapixels)
        if page.tags.valueof(274, 1) != 1:
            raise InputError(f'{path} has an orientation; turn its pixels')
        return _read_with_tifffile(path)                          # Pillow has no such numbers
    image = open_image(path, max_megapixels)
    if image.format == 'JPEG':
        raise InputError(f'{path} is a JPEG, whose compression changes ids; expected a PNG, BMP or TIFF label')
    _check_frames(image, path)
    if image.mode in ('RGBA', 'LA'):
        raise InputError(f'{path} has colour mode {image.mode}; expected one integer id per pixel (0 = background)')
    if image.mode == 'RGB' and bits_per_channel(image) != 8:
        raise InputError(f'{path} is a colour image of 16 bits; expected one integer id per pixel (0 = background)')
    if image.format == 'TIFF' and _pillow_changes_ids(image.tag_v2):
        if orientation_of(image, path) != 1:
            raise InputError(f'{path} has an orientation; turn its pixels')
        return _read_with_tifffile(path)
    bits = bits_per_channel(image)
    pixels = decode(image, path)
    if image.mode == 'L' and bits < 8:                            # Pillow has spread the ids over 0 to 255
        pixels //= 255 // (2 ** bits - 1)
    unsigned = image.format == 'TIFF' and image.tag_v2.get(339, (1,)) == (1,)
    return pixels.view(np.uint32) if unsigned and pixels.dtype == np.int32 else pixels


def _pillow_changes_ids(tags):
    """Whether Pillow reads other values from a TIFF than are stored.

    It inverts files in which 0 is white, reads signed 8 bits as unsigned, and swaps the bytes of compressed big-endian
    signed or float values twice.
    """
    is_signed_or_float = set(tags.get(339, (1,))) != {1}
    return tags.get(262, 0) == 0 or (is_signed_or_float and (tags.prefix == b'MM' or max(tags.get(258, (1,))) == 8))


def label_name(path):
    """The name of an image from that of its instance label: up to the last dot, without a trailing `_label`."""
    return Path(path).stem.removesuffix('_label')


def labels_by_name(folder):
    """{name: path} of the instance labels in a folder. Raises InputError if two have one name, or if there is none."""
    labels = {}
    for path in list_images(folder, LABEL_EXTENSIONS):
        other = labels.setdefault(label_name(path), path)
        if other != path:
            raise InputError(f'{other.name} and {path.name} in {folder} are labels of one image; keep one of them')
    return labels


# um in a unit of length, by its names in OME and ImageJ metadata; two characters look like the Greek letter
UM = {**dict.fromkeys(('um', 'micron', '\\u00B5m', '\u00b5m', '\u03bcm'), 1), 'nm': 1e-3, 'mm': 1e3, 'cm': 1e4}


def pixel_size(path):
    """The pixel size of a TIFF in um, from its OME metadata or its resolution. Raises InputError if it has none.

    A size outside 0.05 to 4 um is refused too: programs write 72 dots per inch where they know none.
    """
    sizes = []
    try:
        with tifffile.TiffFile(path) as file:
            tags = file.pages[0].tags
            # reversed: of several images in the file, the first one counts
            ome = dict(re.findall(r'PhysicalSize([XY](?:Unit)?)="([^"]+)"', file.ome_metadata or '')[::-1])
            if 'X' in ome:
                sizes = [float(ome[axis]) * UM[ome.get(f'{axis}Unit', 'um')] for axis in 'XY' if axis in ome]
            elif 'XResolution' in tags:
                unit = int(tags['ResolutionUnit'].value) if 'ResolutionUnit' in tags else 2           # inch
                imagej = (file.imagej_metadata or {}).get('unit')              # ImageJ's unit; ResolutionUnit is 1
                um = {2: 25_400, 3: 10_000}.get(unit) or UM[imagej]
                sizes = [um * units / pixels for pixels, units in (tags[f'{axis}Resolution'].value for axis in 'XY'
                                                                   if f'{axis}Resolution' in tags)]
    except (tifffile.TiffFileError, KeyError, ValueError, ZeroDivisionError, OSError):
        pass
    if not sizes:
        raise InputError(f'{path} does not say its pixel size; expected a TIFF with a resolution, or OME metadata; '
                         f'give --mpp a number of um')
    if not all(0.05 <= size <= 4 for size in sizes) or max(sizes) > 1.01 * min(sizes):
        said = ' x '.join(f'{size:.4g}' for size in sizes)
        raise InputError(f'{path} says that a pixel is {said} um; expected a square of 0.05 to 4, as of a microscope; '
                         f'give --mpp a number of um')
    return sizes[0]


def resize_bilinear(image, shape):
    """Resize an image, uint8 (H, W) or (H, W, 3), bilinearly (Pillow, antialiased) to shape = (H0, W0)."""
    return np.array(Image.fromarray(image).resize(shape[::-1], Image.BILINEAR))


def resize_by(image, factor, max_megapixels):
    """Resize an image, uint8 (H, W, 3), by a factor, bilinearly. Raises InputError above max_megapixels."""
    if factor == 1:
        return image
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    if height * width > max_megapixels * 1e6:
        raise InputError(f'scaled by {factor:g} the image has {width} x {height} pixels, more than '
                         f'{max_megapixels:g} megapixels; make it smaller, or --max-megapixels larger')
    return resize_bilinear(image, (height, width))
