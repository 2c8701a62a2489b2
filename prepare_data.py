"""From a data set as downloaded to the folders that train.py and test.py read.

    python prepare_data.py --dataset MultiOrgan --raw-dir DIR --data-dir ./data/MultiOrgan
    python prepare_data.py --dataset GlaS --raw-dir DIR --data-dir ./data/GlaS
    python prepare_data.py --like MultiOrgan --img-dir DIR --label-dir DIR --data-dir ./data/mine      # one's own data

Instance labels (read, or drawn from annotation XML) -> colour normalisation -> ternary labels -> weight maps -> patches
-> mean_std.npy. Each step is also a function of its own, on arrays and on folders. Ternary labels and weight maps are
made on whole images, before these are cut into patches. An interrupted preparation goes on where it stopped.
"""
import csv
import hashlib
import itertools
import json
import math
import multiprocessing
import re
import signal
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage.color import lab2rgb, rgb2lab
from skimage.draw import polygon
from skimage.measure import label as connected_regions
from skimage.segmentation import find_boundaries
from tqdm import tqdm

from dataset import (IMAGE_EXTENSIONS, LABEL_EXTENSIONS, decode, find_labels, ignore_interrupt, image_size, list_images,
                     missing_files_message, note, open_image, read_image, read_instance_label, refuse_same_folder)
from options import Options
from utils import FolderLock, InputError, atomic_path, run_script, save_image, save_instances, sha256_of, write_text
from weight_map import encode_weight_map, labels_by_name, weight_map

# The published split of the Multi-Organ data set (30 images of the first MoNuSeg release).
MULTI_ORGAN_SPLIT = {
    'train': ('Breast_TCGA-A7-A13E-01Z-00-DX1', 'Breast_TCGA-A7-A13F-01Z-00-DX1', 'Breast_TCGA-AR-A1AK-01Z-00-DX1',
              'Kidney_TCGA-B0-5711-01Z-00-DX1', 'Kidney_TCGA-HE-7128-01Z-00-DX1', 'Kidney_TCGA-HE-7129-01Z-00-DX1',
              'Liver_TCGA-18-5592-01Z-00-DX1', 'Liver_TCGA-38-6178-01Z-00-DX1', 'Liver_TCGA-49-4488-01Z-00-DX1',
              'Prostate_TCGA-G9-6336-01Z-00-DX1', 'Prostate_TCGA-G9-6348-01Z-00-DX1',
              'Prostate_TCGA-G9-6356-01Z-00-DX1'),
    'val': ('Breast_TCGA-AR-A1AS-01Z-00-DX1', 'Kidney_TCGA-HE-7130-01Z-00-DX1', 'Liver_TCGA-50-5931-01Z-00-DX1',
            'Prostate_TCGA-G9-6363-01Z-00-DX1'),
    'test_same': ('Breast_TCGA-E2-A1B5-01Z-00-DX1', 'Breast_TCGA-E2-A14V-01Z-00-DX1', 'Kidney_TCGA-B0-5698-01Z-00-DX1',
                  'Kidney_TCGA-B0-5710-01Z-00-DX1', 'Liver_TCGA-21-5784-01Z-00-DX1', 'Liver_TCGA-21-5786-01Z-00-DX1',
                  'Prostate_TCGA-CH-5767-01Z-00-DX1', 'Prostate_TCGA-G9-6362-01Z-00-DX1'),
    'test_diff': ('Bladder_TCGA-DK-A2I6-01A-01-TS1', 'Bladder_TCGA-G2-A2EK-01A-02-TSB',
                  'Colon_TCGA-AY-A8YK-01A-01-TS1', 'Colon_TCGA-NH-A8F7-01A-01-TS1',
                  'Stomach_TCGA-KB-A93J-01A-01-TS1', 'Stomach_TCGA-RD-A8N9-01A-01-TS1'),
}
PUBLISHED_ANCHOR = 'Prostate_TCGA-G9-6356-01Z-00-DX1'                # image whose colours the others get
PATCH_SIZE = 250                                                     # pixels, as published
FOLDERS = ('images', 'labels', 'weight_maps', 'labels_instance')     # what preparation fills, besides mean_std.npy
RECORDS = 'records'                                                  # and here it remembers what was made of what
RESULT_VERSION = 1        # counts up when the same input gives other files, so that old ones are made anew
PREVIEW_HEIGHT = 300      # pixels, of an image in the contact sheets


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
# Finding a data set's files
# ---------------------------------------------------------------------------------------------------

class Source(NamedTuple):
    """One image of a data set with its instance label or annotation XML."""
    name: str         # as in the prepared files
    split: str        # train, val, test_same, test_diff, testA, testB
    image: Path
    label: Path


def find_sources(dataset, options):
    """The Sources of the data set that the `prepare` options describe. Raises InputError if there is none."""
    if bool(options['img_dir']) != bool(options['label_dir']):
        given, other = ('img', 'label') if options['img_dir'] else ('label', 'img')
        raise InputError(f"--{given}-dir is given without --{other}-dir; one's own data needs both")
    if options['img_dir']:
        return find_own_data(dataset, options['img_dir'], options['label_dir'], options['split'], options['fractions'],
                             options['seed'])
    if options['split']:
        raise InputError("--split is for one's own data, given as --img-dir and --label-dir; leave it out")
    if dataset == 'GlaS':
        return find_glas(options['raw_dir'], options['val_fraction'], options['seed'])
    return find_multi_organ(options['raw_dir'], options['anchor'], options['others'])


def find_multi_organ(raw_dir, anchor='auto', others=''):
    """The Sources of a MultiOrgan folder: `find_fullnet_files` or `find_monuseg`, whichever fits."""
    raw_dir = Path(raw_dir)
    if all((raw_dir / name).exists() for name in ('normalized', 'labels_instance', 'split.json')):
        if anchor not in ('auto', ''):
            raise InputError(f'{raw_dir} holds images whose colours are normalised already; leave --anchor out')
        if others:
            raise InputError(f'{raw_dir} has a split of its own, split.json; leave --others out')
        return find_fullnet_files(raw_dir)
    if any(path.suffix.lower() == '.xml' for path in _files_below(raw_dir)):
        return find_monuseg(raw_dir, anchor, others)
    raise InputError(f'{raw_dir} is not a MultiOrgan data set: looked for normalized/, labels_instance/ and '
                     f'split.json, or .tif images with .xml annotations at any depth; saw {_names_in(raw_dir)}')


def find_fullnet_files(raw_dir):
    """The FullNet authors' own files: normalized/X.png, labels_instance/X_label.png, split.json (split -> names)."""
    raw_dir = Path(raw_dir)
    images = {path.stem: path for path in list_images(raw_dir / 'normalized')}
    labels = labels_by_name(raw_dir / 'labels_instance')
    split = _read_split(raw_dir / 'split.json', tuple(MULTI_ORGAN_SPLIT))
    names = [name for group in split.values() for name in group]
    for kind, files, folder in (('images', images, 'normalized'), ('instance labels', labels, 'labels_instance')):
        missing = [name for name in names if name not in files]
        if missing:
            raise InputError(missing_files_message(f'{kind} named in split.json are', missing, raw_dir / folder))
    unused = sorted(set(images) - set(names))
    if unused:
        note(f'{len(unused)} images are not in split.json and are not used: {", ".join(unused)}')
    return [Source(name, part, images[name], labels[name]) for part, group in split.items() for name in group]


def _read_split(path, allowed):
    """{split: [names]} from a JSON file, checked. allowed: names of splits, train and val first."""
    expected = f'expected a JSON object of lists of names: train, val and, if there are, {", ".join(allowed[2:])}'
    try:
        split = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise InputError(f'no such file: {path}; {expected}') from None
    except ValueError as error:
        raise InputError(f'{path} is not JSON ({error}); {expected}') from None
    if not (isinstance(split, dict) and all(isinstance(group, list) for group in split.values())):
        raise InputError(f'{path}: {expected}')
    names = [name for group in split.values() for name in group]
    if not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise InputError(f'{path}: a name is not that of a file without its ending; {expected}')
    if not set(split) <= set(allowed) or not split.get('train') or not split.get('val'):
        raise InputError(f'{path} has {", ".join(split) or "nothing"}; {expected}')
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f'{path} names {", ".join(repeated[:5])} more than once; an image belongs to one split')
    return split


def find_monuseg(raw_dir, anchor='auto', others=''):
    """MoNuSeg as distributed: .tif images and .xml annotations at any depth, named without the organ.

    The published split decides by name; images outside it go to the split `others`, or are listed in a note and not
    used. Of an image with no annotation, or the other way round, only the colour anchor is accepted.
    """
    anchor = PUBLISHED_ANCHOR if anchor == 'auto' else anchor
    images = _by_stem(_files_below(raw_dir), ('.tif', '.tiff'), raw_dir)
    annotations = _by_stem(_files_below(raw_dir), ('.xml',), raw_dir)
    sources, unmatched, absent = [], [], []
    for part, names in MULTI_ORGAN_SPLIT.items():
        for name in names:
            stems = (name, name.split('_', 1)[1])
            image = next((images.pop(stem) for stem in stems if stem in images), None)
            annotation = next((annotations.pop(stem) for stem in stems if stem in annotations), None)
            if image and annotation:
                sources.append(Source(name, part, image, annotation))
            elif image and anchor in stems:
                note(f'{image.name}, the colour anchor, has no annotation; it is used for its colours only')
            elif image or annotation:
                unmatched.append(f'{stems[1]}{".xml" if image else ".tif"}')
            else:
                absent.append(name)
    if others:
        unmatched += [f'{stem}.xml' for stem in sorted(set(images) - set(annotations))]
        unmatched += [f'{stem}.tif' for stem in sorted(set(annotations) - set(images))]
        sources += [Source(stem, others, images.pop(stem), annotations[stem])
                    for stem in sorted(set(images) & set(annotations))]
    if unmatched:
        raise InputError(missing_files_message('images or annotations are', unmatched, raw_dir))
    if not {'train', 'val'} <= {source.split for source in sources}:
        raise InputError(f'{raw_dir} lacks the published train or val images: looked for '
                         f'{MULTI_ORGAN_SPLIT["train"][0].split("_", 1)[1]}.tif and others; saw {_names_in(raw_dir)}')
    if absent:
        note(f'{len(absent)} images of the published split are not there: {", ".join(absent)}')
    if images:
        note(f'{len(images)} images are not in the published split and are not used (--others puts them into one): '
             + ', '.join(sorted(images)))
    return sources


def find_glas(raw_dir, val_fraction, seed):
    """GlaS as distributed: {train,testA,testB}_N.bmp with *_anno.bmp at any depth.

    `val_fraction` of the train images, drawn with `seed`, become the validation set (the published one is not known).
    """
    if not 0 < val_fraction < 1:
        raise InputError(f'val_fraction is {val_fraction}; expected a number between 0 and 1')
    files = _by_stem(_files_below(raw_dir), ('.bmp',), raw_dir)
    files = {name: path for name, path in files.items() if re.fullmatch(r'(train|testA|testB)_\d+(_anno)?', name)}
    names = sorted((name for name in files if not name.endswith('_anno')), key=_by_number)
    train = [name for name in names if name.startswith('train_')]
    if len(train) < 2:
        raise InputError(f'{raw_dir} is not the GlaS data set: looked for train_1.bmp, train_1_anno.bmp and so on, '
                         f'at least two of them; saw {_names_in(raw_dir)}')
    missing = [f'{name}_anno.bmp' for name in names if f'{name}_anno' not in files]
    missing += [f'{name.removesuffix("_anno")}.bmp' for name in files if name.removesuffix('_anno') not in files]
    if missing:
        raise InputError(missing_files_message('images or labels are', missing, raw_dir))
    n_val = min(max(round(val_fraction * len(train)), 1), len(train) - 1)
    val = set(np.random.default_rng(seed).permutation(train)[:n_val].tolist())
    return [Source(name, 'val' if name in val else name.split('_')[0], files[name], files[f'{name}_anno'])
            for name in names]


def find_own_data(dataset, img_dir, label_dir, split_path, fractions, seed):
    """A folder of images and one of instance labels, `{name}`, `{name}_label` or `{name}_anno`, of any kind.

    split_path: a JSON file {split: [names]}; '' = `fractions` (train, val, test) of the images, drawn with `seed`.
    dataset: whose layout, metrics and sizes to use; the test images become its first test set.
    """
    images = list_images(img_dir)
    labels = find_labels(images, label_dir, (*LABEL_EXTENSIONS, '.xml'))
    unmatched = sorted(set(list_images(label_dir, (*LABEL_EXTENSIONS, '.xml'))) - set(labels))
    if unmatched:
        raise InputError(missing_files_message('images of instance labels', [path.name for path in unmatched], img_dir))
    test_sets = {'MultiOrgan': ('test_same', 'test_diff'), 'GlaS': ('testA', 'testB')}[dataset]
    files = {image.stem: (image, label) for image, label in zip(images, labels)}
    if split_path:
        split = _read_split(Path(split_path), ('train', 'val', 'test', *test_sets))
        missing = [name for group in split.values() for name in group if name not in files]
        if missing:
            raise InputError(missing_files_message(f'images named in {split_path} are', missing, img_dir))
        unused = sorted(set(files).difference(*split.values()))
        if unused:
            note(f'{len(unused)} images are not in {split_path} and are not used: {", ".join(unused)}')
    else:
        split = draw_split(sorted(files), fractions, seed)
    return [Source(name, test_sets[0] if part == 'test' else part, *files[name])
            for part, names in split.items() for name in names]


def draw_split(names, fractions, seed):
    """{'train': [names], 'val': ..., 'test': ...}: the fractions of the names, at least one for train and val each."""
    train, val, test = fractions
    if not (train > 0 and val > 0 and test >= 0 and abs(sum(fractions) - 1) <= 1e-6):              # NaN is none of it
        raise InputError(f'--fractions is {train:g} {val:g} {test:g}; expected the shares of train, val and test, '
                         f'which add up to 1, the first two above 0')
    if len(names) < 2:
        raise InputError(f'found {len(names)} image; expected at least 2, one to train and one to validate')
    n_val = min(max(round(val * len(names)), 1), len(names) - 1)
    n_test = min(round(test * len(names)), len(names) - n_val - 1)
    order = np.random.default_rng(seed).permutation(names).tolist()
    groups = {'val': order[:n_val], 'test': order[n_val:n_val + n_test], 'train': order[n_val + n_test:]}
    return {part: sorted(groups[part]) for part in ('train', 'val', 'test')}


def _by_number(name):
    prefix, number = name.split('_')
    return prefix, int(number)


def _files_below(folder):
    """The files in a folder and its folders, sorted; hidden ones skipped."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f'no such folder: {folder}')
    return sorted(path for path in folder.rglob('*')
                  if path.is_file() and not any(part.startswith('.') for part in path.relative_to(folder).parts))


def _by_stem(paths, extensions, folder):
    """{name without ending: path} of the files with one of the endings; two of one name are refused."""
    files = {}
    for path in paths:
        if path.suffix.lower() in extensions and '__MACOSX' not in path.parts:
            if path.stem in files:
                raise InputError(f'two files of one name in {folder}: {files[path.stem].relative_to(folder)} and '
                                 f'{path.relative_to(folder)}; keep one of them')
            files[path.stem] = path
    return files


def _names_in(folder):
    names = sorted(path.name + '/' * path.is_dir() for path in Path(folder).iterdir())
    return (', '.join(names[:5]) + (', ...' if len(names) > 5 else '')) or 'an empty folder'


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
        save_contact_sheets(parts, data_dir)
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
    path = _anchor_path(anchor, options['img_dir'] or options['raw_dir'])
    return Reinhard_normalizer().fit(read_image(path, options['max_megapixels'], options['scale_16bit']))


def _anchor_path(anchor, folder):
    """The anchor image: a path, or the name of an image below the folder with or without its organ."""
    if Path(anchor).is_file():
        return Path(anchor)
    images = {path.stem: path for path in _files_below(folder) if path.suffix.lower() in IMAGE_EXTENSIONS}
    for stem in (anchor, anchor.split('_', 1)[-1]):
        if stem in images:
            return images[stem]
    raise InputError(f"the colour anchor '{anchor}' is neither a file nor an image in {folder}; give --anchor the "
                     f"path of an image, or '' to leave the colours as they are")


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

def preview(arrays):
    """Image with contours of the objects, ternary label and weight map (if there is one) side by side, uint8 RGB."""
    outlined = arrays['image'].copy()
    outlined[find_boundaries(arrays['instance'], connectivity=2, mode='thick')] = (255, 255, 0)
    tiles = [outlined]
    if 'weight' in arrays:
        tiles += [arrays['ternary'], np.repeat(arrays['weight'][..., None], 3, axis=2)]
    size = max(1, round(PREVIEW_HEIGHT * outlined.shape[1] / outlined.shape[0])), PREVIEW_HEIGHT
    return np.concatenate([np.asarray(Image.fromarray(tile).resize(size, Image.BOX)) for tile in tiles], axis=1)


def save_contact_sheets(parts, data_dir):
    """Write `contact_sheet_{split}.png` of every split, and remove those of others. parts: {split: [names]}."""
    sheets = {part: data_dir / f'contact_sheet_{part}.png' for part in parts}
    for sheet in set(data_dir.glob('contact_sheet_*.png')) - set(sheets.values()):
        sheet.unlink()
    for part, sheet in tqdm(sheets.items(), desc='contact sheets', disable=None):
        save_image(sheet, contact_sheet(parts[part], data_dir))


def contact_sheet(names, data_dir, width=1808, at_most=24):
    """The previews of the first images of a split, with their names, row by row; uint8 RGB."""
    previews = [Image.open(data_dir / RECORDS / f'{name}.png') for name in names[:at_most]]
    margin, line = 4, 16
    x = y = 0
    places = []
    for picture in previews:
        if x and x + picture.width > width:
            x, y = 0, y + PREVIEW_HEIGHT + line
        places.append((x, y))
        x += picture.width + margin
    width = max(place[0] + picture.width for place, picture in zip(places, previews))
    sheet = Image.new('RGB', (width, y + PREVIEW_HEIGHT + line), 'white')
    draw = ImageDraw.Draw(sheet)
    for name, picture, (x, y) in zip(names, previews, places):
        draw.text((x, y), name, fill='black')
        sheet.paste(picture, (x, y + line))
    return np.asarray(sheet)


def make_report(parts, records, mean_std):
    """Counts per split, labels with objects in several pieces, mean and standard deviation of the colours.

    parts: {split: [names]}. records: {name: record}. object_area: pixels, percentiles 5, 25, 50, 75, 95.
    """
    splits = {}
    for part, names in parts.items():
        rows = [records[name] for name in names]
        areas = np.concatenate([row['areas'] for row in rows])
        splits[part] = {'images': len(names), 'patches': sum(row['patches'] for row in rows),
                        'objects': sum(row['objects'] for row in rows),
                        'objects_in_pieces': sum(row['in_pieces'] for row in rows),
                        'object_area': (np.percentile(areas, (5, 25, 50, 75, 95)).round(1).tolist() if len(areas)
                                        else [])}
    return {'splits': splits, 'labels_with_objects_in_pieces': {name: record['in_pieces'] for name, record
                                                                in records.items() if record['in_pieces']},
            'mean': mean_std[0].tolist(), 'std': mean_std[1].tolist()}


def count_grades(raw_dir, parts):
    """{'grades': {split: {grade: images}}} from GlaS's Grade.csv, if there is one: columns name and grade..."""
    paths = [path for path in _files_below(raw_dir) if path.name.lower() == 'grade.csv']
    if not paths:
        return {}
    with open(paths[0], newline='', encoding='utf-8-sig', errors='replace') as file:
        header, *rows = [[cell.strip() for cell in row] for row in csv.reader(file)] or [[]]
    columns = [next((i for i, title in enumerate(header) if title.lower().startswith(start)), None)
               for start in ('name', 'grade')]
    grades = {}
    if None not in columns:
        grades = {row[columns[0]]: row[columns[1]] for row in rows if len(row) == len(header)}
    if not any(name in grades for names in parts.values() for name in names):
        note(f'{paths[0]} names none of the images; expected the columns name and grade, found {", ".join(header)}')
        return {}
    counts = {part: [grades.get(name, 'unknown') for name in names] for part, names in parts.items()}
    return {'grades': {part: {grade: found.count(grade) for grade in sorted(set(found))}
                       for part, found in counts.items()}}


def report_text(report):
    """The report as a table."""
    lines = [f'{"":10} {"images":>7} {"patches":>8} {"objects":>8} {"in pieces":>10}   '
             f'object area, pixels: 5, 25, 50, 75, 95 %']
    for part, row in report['splits'].items():
        areas = ' '.join(f'{area:.0f}' for area in row['object_area'])
        lines.append(f'{part:10} {row["images"]:7} {row["patches"]:8} {row["objects"]:8} {row["objects_in_pieces"]:10}'
                     f'   {areas}')
    for title in ('mean', 'std'):
        lines.append(f'{title:4} ' + ' '.join(f'{value:.8f}' for value in report[title]))
    for part, counts in report.get('grades', {}).items():
        lines.append(f'{part}: ' + ', '.join(f'{count} {grade}' for grade, count in counts.items()))
    pieces = report['labels_with_objects_in_pieces']
    if pieces:
        shown = [f'{name} ({count})' for name, count in pieces.items()]
        shown = ', '.join(shown[:5] + ['...'] * (len(shown) > 5))
        lines.append(f'{len(pieces)} labels have objects in several pieces: {shown}')
    return '\n'.join(lines)


def main(argv=None):
    opt = Options(script='prepare').parse(argv)
    report = prepare(opt.dataset, opt.prepare)
    print(report_text(report))
    print(f'{opt.dataset} is ready in {opt.prepare["data_dir"]} ({report["minutes"]:.1f} minutes); look at its '
          f'contact_sheet_*.png')


if __name__ == '__main__':
    run_script(main)
