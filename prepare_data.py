"""Prepare a data set, as downloaded, for train.py and test.py.

    python prepare_data.py --dataset MultiOrgan --raw-dir DIR --data-dir ./data/MultiOrgan
    python prepare_data.py --dataset GlaS --raw-dir DIR --data-dir ./data/GlaS
    python prepare_data.py --like MultiOrgan --img-dir DIR --label-dir DIR --data-dir ./data/mine      # your own data

The steps for an image are in `prepare_image`: read the image and its instances (or draw them from annotation XML),
normalise the colours, compute the ternary label and the weight map of the whole image, cut patches. mean_std.npy comes
last. The published functions for a whole folder (`create_ternary_labels`, `color_norm`, ...) exist too.
"""
import itertools
import math
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage.color import lab2rgb, rgb2lab
from tqdm import tqdm

from options import Options
from support.annotations import instance_label_from_geojson, instance_label_from_xml
from support.data_sets import (PUBLISHED_ANCHOR, anchor_path, count_grades, count_objects, find_sources, make_report,
                               refuse_data_dir, report_text, write_report)
from support.devices import in_processes
from support.files import atomic_path, new_folder, save_image, save_instances
from support.images import (GEOJSON_EXTENSIONS, decode, image_size, labels_by_name, list_images, open_image, read_image,
                            read_instance_label, refuse_same_folder)
from support.pictures import CONTACT_SHEET_IMAGES, preview, save_contact_sheets
from support.script import InputError, note, run_script
from weight_map import encode_weight_map, weight_map

PATCH_SIZE = 250                                                     # pixels, as published


# ---------------------------------------------------------------------------------------------------
# Instance labels
# ---------------------------------------------------------------------------------------------------

def create_instance_labels(xml_dir, image_dir, save_dir):
    """Write the instance label, `{name}.png`, of every image in `image_dir` from its `{name}.xml` in `xml_dir`."""
    for path in tqdm(list_images(image_dir), desc='instance labels', disable=None):
        label = instance_label_from_xml(Path(xml_dir) / f'{path.stem}.xml', *image_size(path))
        save_instance_label(Path(save_dir) / f'{path.stem}.png', label)


def save_instance_label(path, label):
    """Save an instance label, int (H, W): ids up to 255 as .bmp, up to 65,535 as .png, by the extension of `path`.

    Larger ids are saved as .tif instead. Returns the path written.
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
    """The ternary label of an instance label: inside, contour and background as an RGB image.

    instance_label: int (H, W), 0 = background. Inside is each object eroded by the 3x3 cross, `radius` times. Contour
    is each object dilated likewise, without its inside. Erosion does not remove pixels at the image border. Returns
    uint8 (H, W, 3): red 255 = inside, green 255 = contour, blue 255 = neither. Training uses red only: `LabelEncoding`
    makes the contour anew. radius: pixels; 1 as in the published function, 2 for GlaS as in the authors' own labels.

    All objects are computed in one pass. A pixel is inside if all ids in the diamond around it are its own. It is in
    the dilation of an object if one of these ids is not 0. A pixel inside one object is in no other dilation, so that
    exactly one channel is 255.
    """
    instance_label = np.asarray(instance_label)
    diamond = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), radius)
    lowest = ndimage.minimum_filter(instance_label, footprint=diamond, mode='nearest')
    highest = ndimage.maximum_filter(instance_label, footprint=diamond, mode='nearest')
    inside, dilated = (lowest == highest) & (lowest > 0), highest > 0
    return np.stack([inside, dilated & ~inside, ~dilated], axis=-1).astype(np.uint8) * 255


def create_ternary_labels(data_dir, save_dir, binary_labels=False, radius=1):
    """Write the ternary label, `{name}_label.png`, of every instance label in `data_dir`. radius: of `ternary_label`.

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
    """Reinhard colour normalisation: each LAB channel gets the anchor image's mean and standard deviation."""

    def fit(self, target):
        """Store the statistics of the anchor image, uint8 (H, W, 3) RGB. Returns self."""
        lab = rgb2lab(target)
        self.mean, self.std = lab.mean((0, 1)), lab.std((0, 1))
        return self

    def transform(self, I):
        """Normalise an image, uint8 (H, W, 3) RGB. Returns uint8 (H, W, 3), truncated as in the published code.

        Deviation: a constant channel gets the anchor's mean; the published code divides by its standard deviation, 0.
        """
        lab = rgb2lab(I)
        mean, std = lab.mean((0, 1)), lab.std((0, 1))
        constant = std < 0.01                  # of a grey image, rounding gives a and b deviations of about 0.001
        scale = np.where(constant, 0, self.std / np.where(constant, 1, std))
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='Conversion from CIE-LAB')   # it clips colours outside RGB
            rgb = lab2rgb((lab - mean) * scale + self.mean)
        return (rgb * 255).astype(np.uint8)


def color_norm(anchor_img_path, data_dir, save_dir):
    """Write every image of `data_dir`, normalised to the colours of the anchor image, as `{name}.png`."""
    refuse_same_folder(data_dir, save_dir)
    normalizer = Reinhard_normalizer().fit(read_image(anchor_img_path))
    for path in tqdm(list_images(data_dir), desc='colour normalisation', disable=None):
        save_image(Path(save_dir) / f'{path.stem}.png', normalizer.transform(read_image(path)))


# ---------------------------------------------------------------------------------------------------
# Patches
# ---------------------------------------------------------------------------------------------------

def patch_positions(h, w, size=PATCH_SIZE):
    """Top-left corners (y, x) of the patches of an h x w image, row by row.

    Along each side, patches start at 0, size, 2 size, ..., and the last one ends at the image border, so that every
    pixel is covered. (The published grid fits 1000 x 1000 only.) Raises InputError for an image smaller than a patch.
    """
    if min(h, w) < size:
        raise InputError(f'an image of {w} x {h} pixels is smaller than a patch of {size} x {size}; give a '
                         f'smaller --patch-size, or leave the image out')
    rows, columns = ([*range(0, side - size, size), side - size] for side in (h, w))
    return list(itertools.product(rows, columns))


def split_patches(data_dir, save_dir, postfix=None):
    """Cut the images of `data_dir` into patches of 250 x 250: `{name}.png` gives `{name}_{k}.png`, k from 0.

    With `postfix` ('label' or 'weight') only files named `{name}_{postfix}` are cut, into `{name}_{k}_{postfix}.png`,
    with their pixels as stored. Without it all images are cut, as RGB. Raises InputError if there is no such image, or
    if one is smaller than a patch.
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
    """`patch_positions`, whose error names the file."""
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
    """Histogram of each channel of a uint8 (H, W, 3) image: int64 (3, 256) numbers of pixels."""
    return np.stack([np.bincount(image[..., c].ravel(), minlength=256) for c in range(3)])


def mean_std_of(histogram):
    """Means and population standard deviations in [0, 1], float64 (2, 3), from a histogram, int (3, 256).

    They are computed in whole numbers up to the last division, so that the order of the images does not matter.
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
    """Write mean_std, float64 (2, 3), to `path`, atomically."""
    with atomic_path(path) as temporary:
        np.save(temporary, mean_std)


# ---------------------------------------------------------------------------------------------------
# Preparing a data set
# ---------------------------------------------------------------------------------------------------

class PlannedFile(NamedTuple):
    """One file that preparing an image writes."""
    path: Path                # relative to data_dir
    kind: str                 # image, instance, ternary, weight
    corner: tuple | None      # top-left (y, x) of the patch; None for the whole image


def planned_files(dataset, source, height, width, patch_size=PATCH_SIZE):
    """The files that preparing one image writes, list of PlannedFile.

    MultiOrgan: patches of train and val images, whole test images, and whole val images too, for testing on val. GlaS:
    whole images. Raises InputError if a training or validation image is smaller than a patch.
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
    """The options of a preparation, as each process needs them."""
    dataset: str
    sigma: float
    w0: float
    ternary_radius: int
    patch_size: int
    binary_labels: bool
    xml_layers: tuple
    scale_16bit: tuple | None
    max_megapixels: float
    normalizer: Reinhard_normalizer | None      # fitted; None leaves the colours as they are


def prepare(dataset, options):
    """Prepare a data set for training and testing. options: the group `prepare` of options.py, a dict.

    A new folder is written beside data_dir and replaces it when it is complete, so that an interrupted preparation does
    not change an earlier one. Returns the report, a dict, which is also written as `prepare_report.json`. The pictures
    `contact_sheet_{split}.png` show the images. Raises InputError for mistakes of the user. File names, image sizes and
    files in data_dir that no preparation made are checked before anything is written.
    """
    started = time.monotonic()
    refuse_data_dir(options)
    sources = find_sources(dataset, options)
    settings = Settings(dataset=dataset, normalizer=fit_anchor(dataset, sources, options),
                        **{name: value for name, value in options.items() if name in Settings._fields})
    for source in tqdm(sources, desc='checking', unit='image', disable=None):           # raises for a too small image
        planned_files(dataset, source, *image_size(source.image, settings.max_megapixels), settings.patch_size)

    with new_folder(options['data_dir']) as folder:
        jobs = [(source, folder, settings) for source in sources]
        results = in_processes(prepare_image, jobs, options['workers'])
        images, previews = [], Counter()
        for image in tqdm(results, total=len(sources), desc='preparing', unit='image', disable=None):
            images.append(image)
            previews[image['split']] += 1
            if previews[image['split']] > CONTACT_SHEET_IMAGES:
                del image['preview']                                     # saves memory
        for message in dict.fromkeys(message for image in images for message in image['notes']):
            note(message)
        mean_std = mean_std_of(sum(image['histogram'] for image in images if image['split'] in ('train', 'val')))
        if (mean_std[1] == 0).any():
            raise InputError('a colour channel has the same value in all pixels of all training and validation images; '
                             'expected photographs: look at the images')
        report = make_report(images, mean_std)
        report |= {'dataset': dataset, 'options': options, 'minutes': round((time.monotonic() - started) / 60, 2)}
        if dataset == 'GlaS' and not options['img_dir']:
            report |= count_grades(Path(options['raw_dir']), images)
        save_contact_sheets(images, folder)
        write_report(folder, report)
        save_mean_std(folder / 'mean_std.npy', mean_std)
    return report


def prepare_image(source, folder, settings):
    """Prepare one image: read -> instances -> colours -> ternary label -> weight map -> patches.

    source: Source. folder: where the files go. settings: Settings. Returns a dict for the report: name, split, patches
    and objects (numbers), in_pieces (number of objects in several 8-connected pieces), areas (pixels of each object),
    histogram (`colour_histogram`), preview (`preview`), notes (messages for the user).
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', UserWarning)
        image = read_image(source.image, settings.max_megapixels, settings.scale_16bit)
        instances = read_instances(source.label, image.shape[:2], settings)
        if settings.normalizer:
            image = settings.normalizer.transform(image)
        arrays = {'image': image, 'instance': instances}
        if source.split in ('train', 'val'):
            arrays['ternary'] = ternary_label(instances, settings.ternary_radius)
            arrays['weight'] = encode_weight_map(weight_map(instances, settings.w0, settings.sigma))

    files = planned_files(settings.dataset, source, *image.shape[:2], settings.patch_size)
    for path, kind, corner in files:
        pixels = arrays[kind]
        if corner:
            y, x = corner
            pixels = pixels[y:y + settings.patch_size, x:x + settings.patch_size]
        (save_instance_label if kind == 'instance' else save_image)(folder / path, pixels)
    n_patches = sum(file.kind == 'image' and file.corner is not None for file in files)
    objects, in_pieces = count_objects(instances)
    _, areas = np.unique(instances[instances > 0], return_counts=True)
    return {'name': source.name, 'split': source.split, 'patches': n_patches, 'objects': objects,
            'in_pieces': in_pieces, 'areas': areas, 'histogram': colour_histogram(image), 'preview': preview(arrays),
            'notes': [str(w.message) for w in caught if w.category is UserWarning]}


def read_instances(path, shape, settings):
    """The instances of an image, int32 (H, W): read from a label, or drawn from annotation XML. shape: (H, W)."""
    if path.suffix.lower() == '.xml':
        return instance_label_from_xml(path, *shape, settings.xml_layers)
    if path.suffix.lower() in GEOJSON_EXTENSIONS:
        return instance_label_from_geojson(path, *shape)
    return read_instance_label(path, shape, settings.binary_labels, settings.max_megapixels)


def fit_anchor(dataset, sources, options):
    """The Reinhard_normalizer fitted to the anchor image; None if the colours stay as they are."""
    anchor = options['anchor']
    if anchor == 'auto':
        monuseg = not options['img_dir'] and any(source.label.suffix.lower() == '.xml' for source in sources)
        anchor = PUBLISHED_ANCHOR if monuseg else ''
    if not anchor:
        return None
    path = anchor_path(anchor, dataset, options)
    return Reinhard_normalizer().fit(read_image(path, options['max_megapixels'], options['scale_16bit']))


def main(argv=None):
    opt = Options(script='prepare').parse(argv)
    report = prepare(opt.dataset, opt.prepare)
    print(report_text(report))
    print(f'{opt.dataset} is ready in {opt.prepare["data_dir"]} ({report["minutes"]:.1f} minutes); look at its '
          f'contact_sheet_*.png')


if __name__ == '__main__':
    run_script(main)
