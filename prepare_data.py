"""From a data set as downloaded to the folders that train.py and test.py read.

    python prepare_data.py --dataset MultiOrgan --raw-dir DIR --data-dir ./data/MultiOrgan
    python prepare_data.py --dataset GlaS --raw-dir DIR --data-dir ./data/GlaS
    python prepare_data.py --like MultiOrgan --img-dir DIR --label-dir DIR --data-dir ./data/mine      # one's own data

Instance labels (read, or drawn from annotation XML) -> colour normalisation -> ternary labels -> weight maps -> patches
-> mean_std.npy. Each step is also a function of its own, on arrays and on folders. Ternary labels and weight maps are
made on whole images, before these are cut into patches. An interrupted preparation goes on where it stopped.
"""
import hashlib
import itertools
import json
import math
import multiprocessing
import signal
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import numpy as np
from scipy import ndimage
from skimage.color import lab2rgb, rgb2lab
from skimage.draw import polygon
from skimage.measure import label as connected_regions
from tqdm import tqdm

from options import Options
from support.data_sets import (MULTI_ORGAN_SPLIT, PUBLISHED_ANCHOR, anchor_path, count_grades, find_sources,
                               make_report, report_text)
from support.files import FolderLock, atomic_path, save_image, save_instances, sha256_of, write_text
from support.images import (decode, image_size, labels_by_name, list_images, open_image, read_image,
                            read_instance_label, refuse_same_folder)
from support.pictures import preview, save_contact_sheets
from support.script import InputError, ignore_interrupt, note, run_script
from weight_map import encode_weight_map, weight_map

PATCH_SIZE = 250                                                     # pixels, as published
FOLDERS = ('images', 'labels', 'weight_maps', 'labels_instance')     # what preparation fills, besides mean_std.npy
RECORDS = 'records'                                                  # and here it remembers what was made of what
RESULT_VERSION = 1        # counts up when the same input gives other files, so that old ones are made anew


# ---------------------------------------------------------------------------------------------------
# Instance labels
# ---------------------------------------------------------------------------------------------------

def instance_label_from_xml(xml_path, height, width):
    """Draw the regions of an Aperio ImageScope annotation (MoNuSeg's XML) as an instance label.

    Returns int32 (height, width): 0 = background, else the region's position in the document counted from 1 (not its
    Id). A pixel in several regions belongs to the first of them. A region of fewer than 3 vertices is skipped, keeps
    its number, and is counted in a note. Vertices may lie outside the image. Raises InputError for a file that is not
    ImageScope XML, has a DTD (and so might have entities), no region, or a coordinate that is not a finite number.
    """
    regions = read_xml_regions(xml_path)
    label = np.zeros((height, width), np.int32)
    for number, vertices in reversed(list(enumerate(regions, 1))):       # the first region is drawn last and stays
        if len(vertices) >= 3:
            # Coordinates are 1-based pixel centres. The two small shifts settle pixels that lie exactly on an edge
            # nearly as MATLAB's poly2mask does. No image reaches 1e9 pixels; the clip keeps integers from overflowing.
            x, y = np.clip(np.array(vertices), -1e9, 1e9).T - 1
            label[polygon(y + 1e-6, x + 2e-6, label.shape)] = number
    skipped = sum(len(vertices) < 3 for vertices in regions)
    if skipped:
        note(f'{Path(xml_path).name}: {skipped} of {len(regions)} regions have fewer than 3 vertices and were skipped')
    return label


def read_xml_regions(xml_path):
    """The (X, Y) vertices of each region of an ImageScope XML in document order: list of lists of float pairs."""
    regions, open_tags = [], []

    def refuse_dtd(*_):
        raise InputError(f'{xml_path} has a document type declaration (DTD), which could define entities; '
                         f'expected a plain ImageScope annotation: remove the declaration')

    def start(tag, attributes):
        open_tags.append(tag)
        if open_tags[0] != 'Annotations':
            raise InputError(f'{xml_path} is not an ImageScope annotation: expected Annotations/Annotation/Regions/'
                             f'Region/Vertices/Vertex, found the root element {open_tags[0]}')
        if len(open_tags) > 6:                         # a damaged file may nest deep: no copy of all that is open
            return
        if open_tags[1:] == ['Annotation', 'Regions', 'Region']:
            regions.append([])
        elif open_tags[1:] == ['Annotation', 'Regions', 'Region', 'Vertices', 'Vertex']:
            try:
                vertex = float(attributes['X']), float(attributes['Y'])
            except (KeyError, ValueError):
                vertex = (math.nan, math.nan)
            if not all(map(math.isfinite, vertex)):
                raise InputError(f'{xml_path}, line {parser.CurrentLineNumber}: expected a vertex with finite '
                                 f'numbers X and Y, found {str(attributes)[:80]}')
            regions[-1].append(vertex)

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse_dtd
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda tag: open_tags.pop()
    try:
        with open(xml_path, 'rb') as file:
            parser.ParseFile(file)
    except FileNotFoundError:
        raise InputError(f'no such file: {xml_path}') from None
    except InputError:
        raise
    except (expat.ExpatError, LookupError, ValueError) as error:         # the last two: encodings that are not there
        raise InputError(f'{xml_path} is not well-formed XML ({error}); expected an ImageScope annotation') from None
    if not regions:
        raise InputError(f'{xml_path} holds no region; expected at least one in Annotations/Annotation/Regions')
    return regions


def create_instance_labels(xml_dir, image_dir, save_dir):
    """Write the instance label, `{name}.png`, of every image in `image_dir` from its `{name}.xml` in `xml_dir`."""
    for path in tqdm(list_images(image_dir), desc='instance labels', disable=None):
        label = instance_label_from_xml(Path(xml_dir) / f'{path.stem}.xml', *image_size(path))
        save_instance_label(Path(save_dir) / f'{path.stem}.png', label)


def save_instance_label(path, label):
    """Save an instance label, int (H, W), as 8-bit .bmp or 16-bit .png, by the extension of `path`.

    Ids for which that has no room (above 255, above 65,535) go into a TIFF instead. Returns the path written.
    """
    path, largest = Path(path), label.max(initial=0)
    if largest > (255 if path.suffix.lower() == '.bmp' else 65535):
        path = path.with_suffix('.tif')
    if path.suffix.lower() == '.bmp':
        save_image(path, label.astype(np.uint8))
    else:
        save_instances(path, label)
    return path


# ---------------------------------------------------------------------------------------------------
# Ternary labels
# ---------------------------------------------------------------------------------------------------

def ternary_label(instance_label, radius=1):
    """Inside / contour / background of an instance label, as an RGB image.

    instance_label: int (H, W), 0 = background. Per object, with the 3x3 cross applied `radius` times (a diamond):
    inside = erosion, contour = dilation minus erosion; then OR over the objects. Erosion does not eat in from the image
    border. Returns uint8 (H, W, 3): red 255 = inside, green 255 = contour, blue 255 = neither.

    One pass does for all objects: a pixel is inside if all ids in the diamond around it are its own, and in an object's
    dilation if one of them is not 0. Inside one object it cannot be in another's dilation, so exactly one channel is
    255. The published function has radius 1; the authors' own GlaS labels have radius 2, so this is the default there.
    """
    instance_label = np.asarray(instance_label)
    diamond = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), radius)
    lowest = ndimage.minimum_filter(instance_label, footprint=diamond, mode='nearest')
    highest = ndimage.maximum_filter(instance_label, footprint=diamond, mode='nearest')
    inside, dilated = (lowest == highest) & (lowest > 0), highest > 0
    return np.stack([inside, dilated & ~inside, ~dilated], axis=-1).astype(np.uint8) * 255


def create_ternary_labels(data_dir, save_dir, binary_labels=False, radius=1):
    """Write the ternary label of every instance label in `data_dir`: `{name}_label.png`. radius: 1, GlaS 2.

    GlaS labels keep their name: `train_8_anno.bmp` gives `train_8_anno.bmp`.
    """
    refuse_same_folder(data_dir, save_dir)
    for name, path in tqdm(labels_by_name(data_dir).items(), desc='ternary labels', disable=None):
        file_name = f'{name}.bmp' if name.endswith('_anno') else f'{name}_label.png'
        label = read_instance_label(path, binary_labels=binary_labels)
        save_image(Path(save_dir) / file_name, ternary_label(label, radius))


# ---------------------------------------------------------------------------------------------------
# Colour normalisation
# ---------------------------------------------------------------------------------------------------

class Reinhard_normalizer:
    """Reinhard colour normalisation: give each LAB channel the anchor's mean and standard deviation."""

    def fit(self, target):
        """Take the anchor's statistics. target: uint8 (H, W, 3) RGB."""
        lab = rgb2lab(target)
        self.mean, self.std = lab.mean((0, 1)), lab.std((0, 1))
        return self

    def transform(self, I):
        """Normalise I, uint8 (H, W, 3) RGB; returns the same shape and type (fractions cut off, as published).

        A channel that is the same everywhere gets the anchor's mean; the published code divides by its std, 0.
        """
        lab = rgb2lab(I)
        mean, std = lab.mean((0, 1)), lab.std((0, 1))
        scale = np.where(std > 1e-8, self.std / np.maximum(std, 1e-8), 0)      # 1e-8: above rounding, below one pixel
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='Conversion from CIE-LAB')   # colours outside RGB are clipped
            rgb = lab2rgb((lab - mean) * scale + self.mean)
        return (rgb * 255).astype(np.uint8)


def color_norm(anchor_img_path, data_dir, save_dir):
    """Normalise the colours of every image in `data_dir` to those of the anchor image; writes `{name}.png`."""
    refuse_same_folder(data_dir, save_dir)
    normalizer = Reinhard_normalizer().fit(read_image(anchor_img_path))
    for path in tqdm(list_images(data_dir), desc='colour normalisation', disable=None):
        save_image(Path(save_dir) / f'{path.stem}.png', normalizer.transform(read_image(path)))


# ---------------------------------------------------------------------------------------------------
# Patches
# ---------------------------------------------------------------------------------------------------

def patch_positions(h, w, size=PATCH_SIZE):
    """Top-left corners (y, x) of the patches of an h x w image, row by row.

    Along a side they start at 0, size, 2 size, ... and the last ends at the image border, so every pixel is covered
    (the published grid fits 1000 x 1000 only). Raises InputError if the image is smaller than a patch.
    """
    if min(h, w) < size:
        raise InputError(f'an image of {w} x {h} pixels is smaller than a patch of {size} x {size}; give a '
                         f'smaller --patch-size, or leave the image out')
    return list(itertools.product(*([min(k * size, side - size) for k in range(-(-side // size))] for side in (h, w))))


def split_patches(data_dir, save_dir, postfix=None):
    """Cut the images of `data_dir` into 250 x 250 patches: `{name}.png` gives `{name}_{k}.png`, k from 0.

    With `postfix` ('label', 'weight'), only files named `{name}_{postfix}` are cut, into `{name}_{k}_{postfix}.png`,
    their pixels as stored; without, all are, as RGB. Raises InputError if there is none or one is smaller than a patch.
    """
    refuse_same_folder(data_dir, save_dir)
    paths = list_images(data_dir)
    if postfix is not None:
        paths = [path for path in paths if path.stem.endswith(f'_{postfix}')]
        if not paths:
            raise InputError(f'no images named {{name}}_{postfix} in {data_dir}, '
                             f'saw {", ".join(p.name for p in list_images(data_dir)[:5])}')
    ending = '' if postfix is None else f'_{postfix}'
    for path in tqdm(paths, desc='patches', disable=None):
        pixels = read_image(path) if postfix is None else decode(open_image(path), path)
        if pixels.dtype.itemsize > 2:
            raise InputError(f'{path} has {pixels.dtype.itemsize * 8} bits per pixel; patches are PNG, of 8 or 16')
        for k, (y, x) in enumerate(_positions_in_file(path, *pixels.shape[:2], PATCH_SIZE)):
            patch_name = f'{path.stem.removesuffix(ending)}_{k}{ending}.png'
            save_image(Path(save_dir) / patch_name, pixels[y:y + PATCH_SIZE, x:x + PATCH_SIZE])


def _positions_in_file(path, h, w, size):
    try:
        return patch_positions(h, w, size)
    except InputError as error:
        raise InputError(f'{path}: {error}') from None


# ---------------------------------------------------------------------------------------------------
# mean_std.npy
# ---------------------------------------------------------------------------------------------------

def compute_mean_std(image_paths):
    """Mean and standard deviation of R, G, B over all pixels of all images, float64 (2, 3), in [0, 1]."""
    return mean_std_of(sum(colour_histogram(read_image(path)) for path in image_paths))


def colour_histogram(image):
    """How many pixels have each value, int64 (3, 256), of a uint8 (H, W, 3) image."""
    return np.stack([np.bincount(image[..., c].ravel(), minlength=256) for c in range(3)])


def mean_std_of(histogram):
    """[means, population standard deviations] in [0, 1], float64 (2, 3), from an int (3, 256) histogram.

    Computed in whole numbers up to the last division, so that the order of the images does not matter.
    """
    means, stds = [], []
    for counts in histogram.tolist():
        n = sum(counts)
        total = sum(count * value for value, count in enumerate(counts))
        squares = sum(count * value ** 2 for value, count in enumerate(counts))
        means.append(total / n / 255)
        stds.append(math.sqrt((n * squares - total ** 2) / n ** 2) / 255)
    return np.array([means, stds])


def save_mean_std(path, mean_std):
    """Write `mean_std.npy`."""
    with atomic_path(path) as temporary:
        np.save(temporary, mean_std)


# ---------------------------------------------------------------------------------------------------
# Preparing a data set
# ---------------------------------------------------------------------------------------------------

class PlannedFile(NamedTuple):
    path: Path                # relative to data_dir
    kind: str                 # image, instance, ternary, weight, preview
    corner: tuple | None      # top-left (y, x) of the patch; None for the whole image


def planned_files(dataset, source, height, width, patch_size=PATCH_SIZE):
    """The files that preparing one image writes, a list of PlannedFile.

    MultiOrgan: train and val as patches, val also whole for testing on it, test images whole. GlaS: whole images.
    """
    name, part = source.name, source.split
    if dataset == 'GlaS':
        files = [(f'images/{part}/{name}.bmp', 'image'), (f'labels_instance/{part}/{name}_anno.bmp', 'instance')]
        if part in ('train', 'val'):
            files += [(f'labels/{part}/{name}_anno.bmp', 'ternary'),
                      (f'weight_maps/{part}/{name}_anno_weight.png', 'weight')]
        return [PlannedFile(Path(path), kind, None) for path, kind in files]
    if part in ('test_same', 'test_diff'):
        return [PlannedFile(Path(f'images/{part}/{name}.png'), 'image', None),
                PlannedFile(Path(f'labels_instance/test/{name}.png'), 'instance', None)]
    files = [PlannedFile(Path(f'labels_instance/{part}/{name}_label.png'), 'instance', None)]
    if part == 'val':
        files += [PlannedFile(Path(f'images/val_full/{name}.png'), 'image', None),
                  PlannedFile(Path(f'labels_instance/val_full/{name}.png'), 'instance', None)]
    for k, corner in enumerate(_positions_in_file(source.image, height, width, patch_size)):
        files += [PlannedFile(Path(f'images/{part}/{name}_{k}.png'), 'image', corner),
                  PlannedFile(Path(f'labels/{part}/{name}_{k}_label.png'), 'ternary', corner),
                  PlannedFile(Path(f'weight_maps/{part}/{name}_{k}_weight.png'), 'weight', corner)]
    return files


class Settings(NamedTuple):
    """What the files of an image depend on besides the image and its label."""
    dataset: str
    sigma: float
    w0: float
    ternary_radius: int
    patch_size: int
    binary_labels: bool
    scale_16bit: tuple | None
    max_megapixels: float
    normalizer: Reinhard_normalizer | None      # fitted, or None: colours stay as they are


def prepare(dataset, options):
    """Prepare a data set for training and testing; the `prepare` options of options.py say which and how.

    Files that an earlier run with the same inputs and options made are kept, the others made anew;
    `records/{name}.json` in data_dir remembers what each image's files were made of. mean_std.npy is written last, so
    a folder that has one is complete. Returns the report, a dict; it is also `prepare_report.json`, and
    `contact_sheet_{split}.png` shows the images. Raises InputError for what the user can mend; names that do not match,
    image sizes and files that are not ours are checked before anything is written.
    """
    started = time.monotonic()
    data_dir = Path(options['data_dir'])
    for name in ('img_dir', 'label_dir') if options['img_dir'] else ('raw_dir',):
        _refuse_writing_into(name, Path(options[name]), data_dir)
    sources = find_sources(dataset, options)
    settings = Settings(dataset, options['sigma'], options['w0'], options['ternary_radius'], options['patch_size'],
                        options['binary_labels'], options['scale_16bit'], options['max_megapixels'],
                        fit_anchor(sources, options))
    planned = set()
    for source in tqdm(sources, desc='checking', unit='image', disable=None):
        height, width = image_size(source.image, settings.max_megapixels)
        planned |= {file.path for file in planned_files(dataset, source, height, width, settings.patch_size)}
    with FolderLock(data_dir) as lock:
        remove_outdated(data_dir, planned, {source.name for source in sources})
        (data_dir / 'mean_std.npy').unlink(missing_ok=True)
        results = _in_processes(prepare_source, [(source, data_dir, settings) for source in sources],
                                options['workers'])
        records = []
        for record in tqdm(results, total=len(sources), desc='preparing', unit='image', disable=None):
            lock.check()
            records.append(record)
        for message in dict.fromkeys(message for record in records for message in record['notes']):
            note(message)
        histogram = sum(np.array(record['histogram']) for source, record in zip(sources, records)
                        if source.split in ('train', 'val'))
        mean_std = mean_std_of(histogram)
        if (mean_std[1] == 0).any():
            raise InputError('a colour channel has the same value in all pixels of all training and validation images; '
                             'expected photographs: look at the images')
        parts = {part: [name for name, *_ in group] for part, group in
                 itertools.groupby(sorted(sources, key=_split_order), key=lambda source: source.split)}
        save_contact_sheets(parts, data_dir, data_dir / RECORDS)
        report = make_report(parts, {source.name: record for source, record in zip(sources, records)}, mean_std)
        report |= {'dataset': dataset, 'options': options, 'minutes': round((time.monotonic() - started) / 60, 2)}
        if dataset == 'GlaS' and not options['img_dir']:
            report |= count_grades(Path(options['raw_dir']), parts)
        write_text(data_dir / 'prepare_report.json', json.dumps(report, indent=1) + '\n')
        save_mean_std(data_dir / 'mean_std.npy', mean_std)
    return report


def _split_order(source):
    return list(dict.fromkeys(('train', 'val', *MULTI_ORGAN_SPLIT, 'testA', 'testB'))).index(source.split)


def _refuse_writing_into(option, folder, data_dir):
    raw, flag = folder.resolve(), '--' + option.replace('_', '-')
    for place in (data_dir, *(data_dir / name for name in FOLDERS)):
        if raw == place.resolve() or raw in place.resolve().parents:
            raise InputError(f'the prepared data would be written into the raw data: --data-dir {data_dir}, {flag} '
                             f'{folder}; give a --data-dir outside it')
        if place != data_dir and place.resolve() in raw.parents:
            raise InputError(f'{flag} {folder} lies in {place}, which preparation fills; move it out of there')


def fit_anchor(sources, options):
    """The Reinhard_normalizer of the anchor image, or None if the colours stay as they are."""
    anchor = options['anchor']
    if anchor == 'auto':
        monuseg = not options['img_dir'] and any(source.label.suffix.lower() == '.xml' for source in sources)
        anchor = PUBLISHED_ANCHOR if monuseg else ''
    if not anchor:
        return None
    path = anchor_path(anchor, options['img_dir'] or options['raw_dir'])
    return Reinhard_normalizer().fit(read_image(path, options['max_megapixels'], options['scale_16bit']))


def _in_processes(function, arguments, workers):
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


# ---------------------------------------------------------------------------------------------------
# One image
# ---------------------------------------------------------------------------------------------------

def prepare_source(source, data_dir, settings):
    """Write the files of one image into `data_dir`, but those that are there and were made of the same things.

    The images do not depend on each other. Returns the record of the image: for each kind of file a key, the hash of
    all that it depends on, and the SHA-256 of its files; and for the report `patches`, `objects`, `in_pieces` (how many
    of them are in several 8-connected pieces), `areas` (pixels, sorted), `histogram` (`colour_histogram`) and `notes`.
    """
    record_path = data_dir / RECORDS / f'{source.name}.json'
    before = read_record(record_path)
    height, width = image_size(source.image, settings.max_megapixels)
    files = {}
    for file in planned_files(settings.dataset, source, height, width, settings.patch_size):
        files.setdefault(file.kind, []).append(file)
    files['preview'] = [PlannedFile(Path(RECORDS, f'{source.name}.png'), 'preview', None)]
    keys = _keys(source, settings, files, (height, width))
    kinds = {kind: before['kinds'][kind] for kind in files
             if kind in before['kinds'] and before['kinds'][kind]['key'] == keys[kind]
             and all(_is_intact(data_dir / path, sha256) for path, sha256 in before['kinds'][kind]['files'].items())}
    if len(kinds) == len(files):
        return before
    # the files that are about to be written count as ours should this be interrupted
    unfinished = [str(file.path) for kind in files if kind not in kinds for file in files[kind]]
    write_record(record_path, {'kinds': kinds, 'unfinished': unfinished})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', UserWarning)
        image, label = read_source(source, settings)
        arrays = {'image': image, 'instance': label, 'ternary': ternary_label(label, settings.ternary_radius)}
        if source.split in ('train', 'val'):
            arrays['weight'] = encode_weight_map(weight_map(label, settings.w0, settings.sigma))
    arrays['preview'] = preview(arrays)
    for kind in files:
        if kind not in kinds:
            paths = [save_planned(file, arrays[kind], data_dir, settings.patch_size) for file in files[kind]]
            kinds[kind] = {'key': keys[kind], 'files': {path.relative_to(data_dir).as_posix(): sha256_of(path)
                                                        for path in paths}}
    objects, in_pieces = count_objects(label)
    areas = np.unique(label[label > 0], return_counts=True)[1]
    record = {'kinds': {kind: kinds[kind] for kind in files}, 'unfinished': [],
              'patches': sum(file.corner is not None for file in files['image']),
              'objects': objects, 'in_pieces': in_pieces, 'areas': np.sort(areas).tolist(),
              'histogram': colour_histogram(image).tolist(),
              'notes': [str(w.message) for w in caught if w.category is UserWarning]}
    write_record(record_path, record)
    return record


def _keys(source, settings, files, size):
    """{kind: hash of all that files of this kind depend on}."""
    normalizer = settings.normalizer
    colours = None if normalizer is None else [normalizer.mean.tolist(), normalizer.std.tolist()]
    image = [sha256_of(source.image), settings.scale_16bit, colours]
    label = [sha256_of(source.label), settings.binary_labels, size]
    ternary = [*label, settings.ternary_radius]
    weight = [*label, settings.w0, settings.sigma]
    preview_of = [image, ternary, weight, 'weight' in files]                 # of train and val it shows more
    depends = {'image': image, 'instance': label, 'ternary': ternary, 'weight': weight, 'preview': preview_of}
    return {kind: hashlib.sha256(json.dumps([RESULT_VERSION, depends[kind], settings.patch_size,
                                             [[file.path.as_posix(), file.corner] for file in files[kind]]]
                                            ).encode()).hexdigest() for kind in files}


def read_source(source, settings):
    """The image, uint8 (H, W, 3), with its colours normalised, and the instance label, int32 (H, W)."""
    image = read_image(source.image, settings.max_megapixels, settings.scale_16bit)
    if source.label.suffix.lower() == '.xml':
        label = instance_label_from_xml(source.label, *image.shape[:2])
    else:
        label = read_instance_label(source.label, image.shape[:2], settings.binary_labels, settings.max_megapixels)
    return image if settings.normalizer is None else settings.normalizer.transform(image), label


def save_planned(file, array, data_dir, patch_size):
    """Save the patch of `array` at the file's corner, or all of it; returns the path."""
    if file.kind == 'instance':
        path = save_instance_label(data_dir / file.path, array)
        for other in {data_dir / file.path, (data_dir / file.path).with_suffix('.tif')} - {path}:
            other.unlink(missing_ok=True)                         # of an earlier preparation, with more or fewer ids
        return path
    if file.corner:
        y, x = file.corner
        array = array[y:y + patch_size, x:x + patch_size]
    save_image(data_dir / file.path, array)
    return data_dir / file.path


def count_objects(instance_label):
    """(number of objects, how many of them are in several 8-connected pieces) of an int (H, W) label."""
    pieces = connected_regions(instance_label, background=0, connectivity=2)
    id_of_piece = np.zeros(pieces.max(initial=0) + 1, instance_label.dtype)
    id_of_piece[pieces] = instance_label
    ids, piece_count = np.unique(id_of_piece[1:], return_counts=True)
    return len(ids), int((piece_count > 1).sum())


# ---------------------------------------------------------------------------------------------------
# Records: what was made of what
# ---------------------------------------------------------------------------------------------------

def read_record(path):
    """The record of an image, or an empty one."""
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        return record if {'kinds', 'unfinished'} <= set(record) else {'kinds': {}, 'unfinished': []}
    except (OSError, ValueError, TypeError):                          # no record, or not one of ours: make it all anew
        return {'kinds': {}, 'unfinished': []}


def write_record(path, record):
    write_text(path, json.dumps(record) + '\n')


def _is_intact(path, sha256):
    return path.is_file() and sha256_of(path) == sha256


def remove_outdated(data_dir, planned, names):
    """Remove the files of an earlier preparation that this one, of images `names`, does not make. Files of others are
    refused: training would read them as if they belonged to this preparation."""
    records = {path: read_record(path) for path in sorted((data_dir / RECORDS).glob('*.json'))}
    ours = {path: sha256 for record in records.values() for kind in record['kinds'].values()
            for path, sha256 in kind['files'].items()}
    unfinished = {path for record in records.values() for path in record['unfinished']}
    planned = planned | {path.with_suffix('.tif') for path in planned if path.parts[0] == 'labels_instance'}
    found = [path for folder in FOLDERS for path in sorted((data_dir / folder).rglob('*'))
             if path.is_file() and not path.name.startswith('.') and path.relative_to(data_dir) not in planned]
    outdated, others = [], []
    for path in found:
        name = path.relative_to(data_dir).as_posix()
        mine = name in unfinished or (name in ours and _is_intact(path, ours[name]))
        (outdated if mine else others).append(path)
    if others:
        raise InputError(f'{data_dir} already holds {len(others)} files that this preparation does not make: '
                         f'{", ".join(str(path.relative_to(data_dir)) for path in others[:5])}; '
                         f'give an empty --data-dir or remove them')
    outdated += [path for folder in (*FOLDERS, RECORDS) for path in (data_dir / folder).rglob('.tmp_*')]     # of a kill
    for path in [*outdated, *(path for path in records if path.stem not in names)]:
        path.unlink()
        if path in records:
            path.with_suffix('.png').unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------


def main(argv=None):
    opt = Options(script='prepare').parse(argv)
    report = prepare(opt.dataset, opt.prepare)
    print(report_text(report))
    print(f'{opt.dataset} is ready in {opt.prepare["data_dir"]} ({report["minutes"]:.1f} minutes); look at its '
          f'contact_sheet_*.png')


if __name__ == '__main__':
    run_script(main)
