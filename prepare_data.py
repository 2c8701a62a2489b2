"""From a data set as downloaded to the folders that train.py and test.py read.

    python prepare_data.py --dataset MultiOrgan --raw-dir DIR --data-dir ./data/MultiOrgan
    python prepare_data.py --dataset GlaS --raw-dir DIR --data-dir ./data/GlaS

Instance labels (read, or drawn from annotation XML) -> colour normalisation -> ternary labels -> weight maps -> patches
-> mean_std.npy. Each step is also a function of its own, on arrays and on folders. Ternary labels and weight maps are
made on whole images, before these are cut into patches.
"""
import itertools
import json
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import numpy as np
from skimage.color import lab2rgb, rgb2lab
from skimage.draw import polygon
from skimage.measure import label as connected_regions
from tqdm import tqdm

from dataset import (LABEL_EXTENSIONS, MAX_MEGAPIXELS, decode, list_images, missing_files_message, note, open_image,
                     read_image, read_instance_label)
from options import Options
from utils import InputError, atomic_path, run_script, save_image, save_instances
from weight_map import encode_weight_map, label_name, weight_map

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
PATCH_SIZE = 250                                                     # pixels, as published
FOLDERS = ('images', 'labels', 'weight_maps', 'labels_instance')     # what preparation fills, besides mean_std.npy


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
    except expat.ExpatError as error:
        raise InputError(f'{xml_path} is not well-formed XML ({error}); expected an ImageScope annotation') from None
    if not regions:
        raise InputError(f'{xml_path} holds no region; expected at least one in Annotations/Annotation/Regions')
    return regions


def save_instance_label(path, label):
    """Save an instance label, int (H, W): 8 bits as .bmp, else 16 bits, or above 65,535 ids a 32-bit TIFF.

    The TIFF is `path` with the extension .tif. Raises InputError for ids above 255 in a .bmp. Returns the path written.
    """
    path, largest = Path(path), label.max(initial=0)
    if path.suffix.lower() == '.bmp':
        if largest > 255:
            raise InputError(f'the label for {path} holds id {largest}; a BMP has room for ids up to 255')
        save_image(path, label.astype(np.uint8))
    else:
        path = path if largest <= 65535 else path.with_suffix('.tif')        # a PNG has room for no more
        save_instances(path, label)
    return path


# ---------------------------------------------------------------------------------------------------
# Ternary labels
# ---------------------------------------------------------------------------------------------------

def ternary_label(instance_label):
    """Inside / contour / background of an instance label, as an RGB image.

    instance_label: int (H, W), 0 = background. Per object, with a 3x3 cross: inside = erosion, contour = dilation minus
    erosion; then OR over the objects. Erosion does not eat in from the image border. Returns uint8 (H, W, 3): red 255 =
    inside, green 255 = contour, blue 255 = neither.

    One pass does for all objects: a pixel is inside if its four neighbours have its id, and in an object's dilation if
    it or a neighbour has an id. Inside one object it cannot be in another's dilation, so exactly one channel is 255.
    """
    padded = np.pad(np.asarray(instance_label), 1, mode='edge')
    centre = padded[1:-1, 1:-1]
    inside = centre != 0
    dilated = centre != 0
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        inside &= neighbour == centre
        dilated |= neighbour != 0
    return np.stack([inside, dilated & ~inside, ~dilated], axis=-1).astype(np.uint8) * 255


def create_ternary_labels(data_dir, save_dir, binary_labels=False):
    """Write the ternary label of every instance label in `data_dir`: `{name}_label.png`.

    GlaS labels keep their name: `train_8_anno.bmp` gives `train_8_anno.bmp`.
    """
    _refuse_same_folder(data_dir, save_dir)
    for path in tqdm(list_images(data_dir, LABEL_EXTENSIONS), desc='ternary labels', disable=None):
        file_name = f'{path.stem}.bmp' if path.stem.endswith('_anno') else f'{label_name(path)}_label.png'
        save_image(Path(save_dir) / file_name, ternary_label(read_instance_label(path, binary_labels=binary_labels)))


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
    _refuse_same_folder(data_dir, save_dir)
    normalizer = Reinhard_normalizer().fit(read_image(anchor_img_path))
    for path in tqdm(list_images(data_dir), desc='colour normalisation', disable=None):
        save_image(Path(save_dir) / f'{path.stem}.png', normalizer.transform(read_image(path)))


def _refuse_same_folder(data_dir, save_dir):
    if Path(data_dir).resolve() == Path(save_dir).resolve():
        raise InputError(f'reading from and writing to the same folder {data_dir}; give another folder to write to')


# ---------------------------------------------------------------------------------------------------
# Patches
# ---------------------------------------------------------------------------------------------------

def patch_positions(h, w, size=PATCH_SIZE):
    """Top-left corners (y, x) of the patches of an h x w image, row by row.

    Along a side they start at 0, size, 2 size, ... and the last ends at the image border, so every pixel is covered
    (the published grid fits 1000 x 1000 only). Raises InputError if the image is smaller than a patch.
    """
    if min(h, w) < size:
        raise InputError(f'an image of {w} x {h} pixels is smaller than a patch of {size} x {size}')
    return list(itertools.product(*([min(k * size, side - size) for k in range(-(-side // size))] for side in (h, w))))


def split_patches(data_dir, save_dir, postfix=None):
    """Cut the images of `data_dir` into 250 x 250 patches: `{name}.png` gives `{name}_{k}.png`, k from 0.

    With `postfix` ('label', 'weight'), only files named `{name}_{postfix}` are cut, into `{name}_{k}_{postfix}.png`,
    their pixels as stored; without, all are, as RGB. Raises InputError if there is none or one is smaller than a patch.
    """
    _refuse_same_folder(data_dir, save_dir)
    paths = list_images(data_dir)
    if postfix is not None:
        paths = [path for path in paths if path.stem.endswith(f'_{postfix}')]
        if not paths:
            raise InputError(f'no images named {{name}}_{postfix} in {data_dir}, '
                             f'saw {", ".join(p.name for p in list_images(data_dir)[:5])}')
    ending = '' if postfix is None else f'_{postfix}'
    for path in tqdm(paths, desc='patches', disable=None):
        pixels = read_image(path) if postfix is None else decode(open_image(path), path)
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


def find_multi_organ(raw_dir, anchor):
    """The Sources of a MultiOrgan folder: `find_fullnet_files` or `find_monuseg`, whichever fits."""
    raw_dir = Path(raw_dir)
    if all((raw_dir / name).exists() for name in ('normalized', 'labels_instance', 'split.json')):
        return find_fullnet_files(raw_dir)
    if any(path.suffix.lower() == '.xml' for path in _files_below(raw_dir)):
        return find_monuseg(raw_dir, anchor)
    raise InputError(f'{raw_dir} is not a MultiOrgan data set: looked for normalized/, labels_instance/ and '
                     f'split.json, or .tif images with .xml annotations at any depth; saw {_names_in(raw_dir)}')


def find_fullnet_files(raw_dir):
    """The FullNet authors' own files: normalized/X.png, labels_instance/X_label.png, split.json (split -> names)."""
    raw_dir = Path(raw_dir)
    images = {path.stem: path for path in list_images(raw_dir / 'normalized')}
    labels = {label_name(path): path for path in list_images(raw_dir / 'labels_instance', LABEL_EXTENSIONS)}
    split = _read_split(raw_dir / 'split.json')
    names = [name for group in split.values() for name in group]
    for kind, files, folder in (('images', images, 'normalized'), ('instance labels', labels, 'labels_instance')):
        missing = [name for name in names if name not in files]
        if missing:
            raise InputError(missing_files_message(f'{kind} named in split.json are', missing, raw_dir / folder))
    unused = sorted(set(images) - set(names))
    if unused:
        note(f'{len(unused)} images are not in split.json and are not used: {", ".join(unused)}')
    return [Source(name, part, images[name], labels[name]) for part, group in split.items() for name in group]


def _read_split(path):
    """{split: [names]} from a JSON file, checked."""
    allowed = tuple(MULTI_ORGAN_SPLIT)
    expected = f'expected a JSON object of lists of names: train, val and, if there are, {", ".join(allowed[2:])}'
    try:
        split = json.loads(path.read_text(encoding='utf-8'))
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


def find_monuseg(raw_dir, anchor):
    """MoNuSeg as distributed: .tif images and .xml annotations at any depth, named without the organ.

    The published split decides by name; images outside it are listed in a note and not used. Of an image with no
    annotation, or the other way round, only the colour anchor is accepted.
    """
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
    if unmatched:
        raise InputError(missing_files_message('images or annotations are', unmatched, raw_dir))
    if not {'train', 'val'} <= {source.split for source in sources}:
        raise InputError(f'{raw_dir} lacks the published train or val images: looked for '
                         f'{MULTI_ORGAN_SPLIT["train"][0].split("_", 1)[1]}.tif and others; saw {_names_in(raw_dir)}')
    if absent:
        note(f'{len(absent)} images of the published split are not there: {", ".join(absent)}')
    if images:
        note(f'{len(images)} images are not in the published split and are not used: {", ".join(sorted(images))}')
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
    kind: str                 # image, instance, ternary, weight
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


class Prepared(NamedTuple):
    """What was made of one image, for the report."""
    patches: int
    objects: int
    in_pieces: int            # objects of several 8-connected pieces
    histogram: np.ndarray     # `colour_histogram` of the whole image


def prepare_source(source, dataset, data_dir, sigma, w0, patch_size, normalizer, binary_labels, scale_16bit,
                   max_megapixels):
    """Write the files of one image into `data_dir`; returns `Prepared`. The images do not depend on each other.

    normalizer: a fitted `Reinhard_normalizer`, or None to leave the colours as they are. The others: see `prepare`.
    """
    image = read_image(source.image, max_megapixels, scale_16bit)
    height, width = image.shape[:2]
    if source.label.suffix.lower() == '.xml':
        label = instance_label_from_xml(source.label, height, width)
    else:
        label = read_instance_label(source.label, (height, width), binary_labels, max_megapixels)
    if normalizer is not None:
        image = normalizer.transform(image)
    arrays = {'image': image, 'instance': label}
    if source.split in ('train', 'val'):
        arrays['ternary'] = ternary_label(label)
        arrays['weight'] = encode_weight_map(weight_map(label, w0, sigma))

    files = planned_files(dataset, source, height, width, patch_size)
    for path, kind, corner in files:
        if kind == 'instance':
            save_instance_label(data_dir / path, label)
        elif corner is None:
            save_image(data_dir / path, arrays[kind])
        else:
            y, x = corner
            save_image(data_dir / path, arrays[kind][y:y + patch_size, x:x + patch_size])
    patches = sum(kind == 'image' and corner is not None for _, kind, corner in files)
    return Prepared(patches, *count_objects(label), colour_histogram(image))


def count_objects(instance_label):
    """(number of objects, how many of them are in several 8-connected pieces) of an int (H, W) label."""
    pieces = connected_regions(instance_label, background=0, connectivity=2)
    id_of_piece = np.zeros(pieces.max(initial=0) + 1, instance_label.dtype)
    id_of_piece[pieces] = instance_label
    ids, piece_count = np.unique(id_of_piece[1:], return_counts=True)
    return len(ids), int((piece_count > 1).sum())


def prepare(dataset, raw_dir, data_dir, anchor, sigma, w0, patch_size, val_fraction, seed, binary_labels,
            scale_16bit, max_megapixels):
    """Prepare a data set as downloaded in `raw_dir` for training and testing, in `data_dir`.

    dataset: MultiOrgan or GlaS. anchor: for MoNuSeg images, one of their names, the path of an image, or '' to leave
    the colours as they are. sigma, w0: of the weight maps. patch_size: pixels, MultiOrgan. val_fraction, seed: of
    GlaS's train images. binary_labels: take the 8-connected components of 0/255 masks as objects. scale_16bit:
    (lo, hi) maps 16-bit images to 8 bits, None refuses them. max_megapixels: larger images are refused.
    mean_std.npy is written last, so a folder that has one is complete.
    Returns a summary, text of several lines. Raises InputError for what the user can mend; names that do not match,
    image sizes and files of an earlier preparation are checked before anything is written.
    """
    raw_dir, data_dir = Path(raw_dir), Path(data_dir)
    _refuse_writing_into(raw_dir, data_dir)
    sources = find_glas(raw_dir, val_fraction, seed) if dataset == 'GlaS' else find_multi_organ(raw_dir, anchor)
    normalizer = None
    if anchor and any(source.label.suffix.lower() == '.xml' for source in sources):     # as distributed by MoNuSeg
        normalizer = Reinhard_normalizer().fit(read_image(_anchor_path(anchor, raw_dir), max_megapixels, scale_16bit))
    planned = set()
    for source in sources:
        width, height = open_image(source.image, max_megapixels).size
        planned |= {file.path for file in planned_files(dataset, source, height, width, patch_size)}
    _refuse_other_files(data_dir, planned)

    (data_dir / 'mean_std.npy').unlink(missing_ok=True)
    prepared = [prepare_source(source, dataset, data_dir, sigma, w0, patch_size, normalizer, binary_labels,
                               scale_16bit, max_megapixels)
                for source in tqdm(sources, desc='preparing', unit='image', disable=None)]
    mean_std = mean_std_of(sum(result.histogram for source, result in zip(sources, prepared)
                               if source.split in ('train', 'val')))
    save_mean_std(data_dir / 'mean_std.npy', mean_std)
    return _summary(sources, prepared, mean_std)


def _refuse_writing_into(raw_dir, data_dir):
    raw = raw_dir.resolve()
    for folder in (data_dir, *(data_dir / name for name in FOLDERS)):
        if raw == folder.resolve() or raw in folder.resolve().parents:
            raise InputError(f'the prepared data would be written into the raw data: --data-dir {data_dir}, --raw-dir '
                             f'{raw_dir}; give a --data-dir outside it')
        if folder != data_dir and folder.resolve() in raw.parents:
            raise InputError(f'--raw-dir {raw_dir} lies in {folder}, which preparation fills; move it out of there')


def _refuse_other_files(data_dir, planned):
    """Files of an earlier preparation with other options would be read by training as if they belonged to this one."""
    found = [path.relative_to(data_dir) for folder in FOLDERS for path in sorted((data_dir / folder).rglob('*'))
             if path.is_file() and not path.name.startswith('.')]
    planned = planned | {path.with_suffix('.tif') for path in planned if path.parts[0] == 'labels_instance'}
    others = [str(path) for path in found if path not in planned]
    if others:
        raise InputError(f'{data_dir} already holds {len(others)} files that this preparation does not make: '
                         f'{", ".join(others[:5])}; give an empty --data-dir or remove them')


def _anchor_path(anchor, raw_dir):
    """The anchor image: a path, or the name of a .tif below raw_dir with or without its organ."""
    if Path(anchor).is_file():
        return Path(anchor)
    images = _by_stem(_files_below(raw_dir), ('.tif', '.tiff'), raw_dir)
    for stem in (anchor, anchor.split('_', 1)[-1]):
        if stem in images:
            return images[stem]
    raise InputError(f"the colour anchor '{anchor}' is neither a file nor an image in {raw_dir}; give --anchor the "
                     f"path of an image, or '' to leave the colours as they are")


def _summary(sources, prepared, mean_std):
    """Counts per split and the colour statistics, as text."""
    lines = [f'{"":10} {"images":>8} {"patches":>8} {"objects":>8} {"in pieces":>10}']
    for part in dict.fromkeys(source.split for source in sources):
        rows = [result for source, result in zip(sources, prepared) if source.split == part]
        lines.append(f'{part:10} {len(rows):8} {sum(row.patches for row in rows):8} '
                     f'{sum(row.objects for row in rows):8} {sum(row.in_pieces for row in rows):10}')
    for title, values in zip(('mean', 'std'), mean_std):
        lines.append(f'{title:4} ' + ' '.join(f'{value:.8f}' for value in values))
    return '\n'.join(lines)


def main(argv=None):
    opt = Options(script='prepare').parse(argv)
    print(prepare(opt.dataset, **opt.prepare))
    print(f'{opt.dataset} is ready in {opt.prepare["data_dir"]}')


if __name__ == '__main__':
    run_script(main)
