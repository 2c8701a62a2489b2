"""What test.py writes: tables of scores and of objects, and a record of each image."""
import csv
import io
import json
import warnings

import numpy as np
from skimage.measure import regionprops
from tqdm import tqdm

from support.files import FolderLock, hash_of, save_image, save_instances, sha256_of, write_text
from support.images import read_json, resize_bilinear
from support.objects import OverlapTable, pool
from support.pictures import colour_instances, draw_overlay
from support.script import InputError

PUBLISHED = 'published code, mean over images: '
DEFINITIONS = {           # of the columns, in {set}_metrics.json
    'published_pixel_acc': PUBLISHED + 'share of pixels on which foreground and background agree',
    'published_recall': PUBLISHED + 'MultiOrgan: any overlap is a hit; GlaS: covering half of the object is',
    'published_precision': PUBLISHED + 'as published_recall, over the predictions',
    'published_F1': PUBLISHED + 'harmonic mean of these two',
    'published_Dice': PUBLISHED + 'MultiOrgan: mean over matched pairs; GlaS: area-weighted, over all objects',
    'published_IoU': PUBLISHED + 'as published_Dice',
    'published_Hausdorff': PUBLISHED + 'as published_Dice, in pixels',
    'published_AJI': PUBLISHED + 'ground truth in raster order takes each prediction once',
    'aji': "MoNuSeg's AJI: every ground-truth object with its best prediction",
    'aji_plus': 'AJI with the one-to-one pairs of the largest summed IoU',
    'pq': 'panoptic quality, dq * sq', 'dq': 'F1 at IoU > 0.5', 'sq': 'mean IoU of the pairs with IoU > 0.5',
    'f1': 'F1 at IoU > 0.5', 'ap50': 'TP / (TP + FP + FN) at IoU >= 0.5', 'map': 'mean of that at 0.5, 0.55, ..., 0.95',
    'dice': 'Dice of the foreground pixels',
}
OBJECT_COLUMNS = ('id', 'centroid_y', 'centroid_x', 'bbox_top', 'bbox_left', 'bbox_bottom', 'bbox_right', 'area',
                  'perimeter', 'eccentricity', 'solidity', 'mean_inside_probability')
RESULT_VERSION = 3      # raise it when the same input gives other results, so that old results are recomputed


def refuse_mixed_results(folder, sets):
    """Raise InputError if images were tested with different weights or options. sets: {set: [image names]}."""
    tests = {}
    for path in [folder / f'{name}_records' / f'{image}.json' for name, images in sets.items() for image in images]:
        if path.is_file():
            tests.setdefault(read_json(path).get('test'), path.stem)
    if len(tests) > 1:
        first, second, *_ = tests.values()
        raise InputError(f'{first} and {second} in {folder} were tested with different weights or options; run test.py '
                         f'again on all images, with --overwrite True or another --save-dir')


def means(rows):
    """Mean of each column, list of float, without NaN values; NaN for a column of NaN. rows: lists of equal length."""
    values = np.array(rows, dtype=float)
    known = ~np.isnan(values)
    with np.errstate(invalid='ignore'):
        return (np.where(known, values, 0).sum(0) / known.sum(0)).tolist()


def results_table(results, columns):
    """The text of the published result file: means, then each image by name; tab-separated, 4 decimals.

    results: {image name: values}. columns: names of the values.
    """
    rows = [('Metrics:', columns), ('Average:', [f'{v:.4f}' for v in means(list(results.values()))]), None]
    rows += [(f'{name}:', [f'{v:.4f}' for v in results[name]]) for name in sorted(results)]
    return '\n'.join('\t'.join([row[0], *row[1]]) if row else '' for row in rows) + '\n'


class Results:
    """What test.py writes into `folder`: {set}_prob_maps/, {set}_segmentation/, {set}_records/ and the tables.

    The record of an image holds its scores and a hash of everything that they depend on, so that a finished image need
    not be recomputed. The set is locked until `lock.release()`, so that two tests cannot mix their files; processes of
    torchrun, which share the images, lock it by `rank`. Raises InputError if another process has locked it.
    """

    def __init__(self, folder, set_name, opt, mean_std, rank=0):
        self.folder, self.set_name, self.dataset = folder, set_name, opt.dataset
        ignored = ('data_dir', 'epoch', 'gpu', 'img_dir', 'label_dir', 'save_dir', 'model_path', 'max_megapixels',
                   'batch_size', 'overwrite', 'preset')
        self.made_by = {'model_path': opt.test['model_path'], 'weights_sha256': sha256_of(opt.test['model_path']),
                        'test': {name: value for name, value in opt.test.items() if name not in ignored},
                        'post': opt.post}
        self.made_of = [RESULT_VERSION, opt.dataset, opt.model, opt.post, opt.transform, mean_std.tolist(),
                        self.made_by['weights_sha256'], self.made_by['test']]
        self.test_hash = hash_of(self.made_of)         # the key of a record is of these and of the image and its label
        self.records = {}
        self.lock = FolderLock(folder / f'{set_name}_records', rank)

    def remove_tables(self):
        """Remove the tables of an earlier test. They would look as if made with the options of this one."""
        for ending in ('test_result.txt', 'metrics.csv', 'metrics.json'):
            (self.folder / f'{self.set_name}_{ending}').unlink(missing_ok=True)

    def path(self, kind, name, ending):
        """Path of a file of the image `name`. kind: prob_maps, segmentation or records."""
        return self.folder / f'{self.set_name}_{kind}' / f'{name}{ending}'

    def read_record(self, path, label_path):
        """Read the record of an image into `records`, if it was finished with the same options, weights and files.

        path: of the image; label_path: of its instance label, or None. Returns whether it was finished. A record of an
        earlier version is written again, with the hash of this test.
        """
        self.records[path.stem] = {'key': ''}
        try:
            key = hash_of([self.made_of, sha256_of(path), label_path and sha256_of(label_path)])
            self.records[path.stem]['key'] = key
            record = json.loads(self.path('records', path.stem, '.json').read_text(encoding='utf-8'))
            finished = record['key'] == key and all((self.folder / file).is_file() for file in record['files'])
        except (OSError, ValueError, KeyError, TypeError):                   # no record, or a damaged one
            return False
        if finished:
            self.records[path.stem] = record
            if 'test' not in record:                                         # of an earlier version
                self.finish(path.stem, None)
        return finished

    def save_images(self, name, image, instances, inside, contour, truth, matches):
        """Write probability maps, instances, table of objects, overlay and coloured picture of an image.

        image: uint8 (H, W, 3), changed in place. instances, truth: int (H, W), segmentation and ground truth, or None
        for the latter. inside, contour: uint8 (H', W'). matches: of `match_objects`, None without ground truth.
        """
        files = []

        def place(kind, ending):
            self.lock.check()
            files.append(self.path(kind, name, ending))
            return files[-1]
        save_image(place('prob_maps', '_prob_inside.png'), inside)
        save_image(place('prob_maps', '_prob_contour.png'), contour)
        save_instances(place('segmentation', '_seg.tiff'), instances)
        write_text(place('segmentation', '_objects.csv'), objects_csv(instances, inside, matches))
        save_image(place('segmentation', '_overlay.png'), draw_overlay(image, instances, truth, matches))
        save_image(place('segmentation', '_seg_colored.png'), colour_instances(instances, image))
        self.records[name]['files'] = [file.relative_to(self.folder).as_posix() for file in files]

    def finish(self, name, scores):
        """Write the record of an image. scores: Scores, or None without ground truth."""
        record = {'files': [], **self.records[name], 'test': self.test_hash}
        if scores is not None:
            table = {field: value if isinstance(value, int) else np.asarray(value).tolist()
                     for field, value in scores.table._asdict().items() if field not in ('pred_map', 'gt_map')}
            record |= {'published': scores.published, 'standard': scores.standard, 'overlaps': table}
        self.records[name] = record
        self.lock.check()
        write_text(self.path('records', name, '.json'), json.dumps(record) + '\n')

    def pooled_overlaps(self, names):
        """The OverlapTable of the images with these names, as if they were one image; from their records."""
        return pool([OverlapTable(None, None, **{
            field: value if isinstance(value, int) else np.array(value, float if field == 'iou' else int)
            for field, value in self.records[name]['overlaps'].items()}) for name in names])

    def save_tables(self, names, columns, pooled):
        """Write {set}_test_result.txt as published, {set}_metrics.csv and {set}_metrics.json. Returns the first's text.

        names: of the images. columns: of the published scores. pooled: standard scores of all images as if one.
        """
        published = {name: self.records[name]['published'] for name in names}
        text = results_table(published, columns)
        write_text(self.folder / f'{self.set_name}_test_result.txt', text)

        columns = [f'published_{column}' for column in columns]
        images = {name: dict(zip(columns, published[name])) | without_aji_fullnet(self.records[name]['standard'])
                  for name in sorted(names)}
        mean = dict(zip(images[names[0]], means([list(row.values()) for row in images.values()])))
        pooled = dict.fromkeys(columns) | without_aji_fullnet(pooled)
        rows = [(name, {key: None if value is None or np.isnan(value) else value for key, value in row.items()})
                for name, row in (*images.items(), ('mean', mean), ('pooled', pooled))]
        summary = {'dataset': self.dataset, 'set': self.set_name,
                   'definitions': {key: DEFINITIONS[key] for key in mean},
                   'images': dict(rows[:-2]), 'mean': rows[-2][1], 'pooled': rows[-1][1], 'made_by': self.made_by}
        write_text(self.folder / f'{self.set_name}_metrics.json', json.dumps(summary, indent=1) + '\n')
        lines = [['image', *mean]] + [[name, *('' if value is None else f'{value:.6f}' for value in row.values())]
                                      for name, row in rows]
        write_text(self.folder / f'{self.set_name}_metrics.csv', csv_text(lines))
        return text


def without_aji_fullnet(metrics):
    """The standard metrics without aji_fullnet, which equals published_AJI."""
    return {name: value for name, value in metrics.items() if name != 'aji_fullnet'}


def csv_text(rows):
    """Rows, lists of values, as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    return text.getvalue()


def objects_csv(instances, inside, matches=None):
    """The text of a CSV file with one line for each object: OBJECT_COLUMNS.

    With `matches` (`match_objects`) also matched_id and matched_iou. instances: int (H, W). inside: uint8 (H', W'),
    255 = probability 1, resized to (H, W) for mean_inside_probability. Lengths are in pixels. bbox_bottom
    and bbox_right are one past the last row and column.
    """
    if inside.shape != instances.shape:
        inside = resize_bilinear(inside, instances.shape)
    rows = [[*OBJECT_COLUMNS, *(('matched_id', 'matched_iou') if matches is not None else ())]]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                # on objects without a convex hull
        regions = regionprops(instances, inside)[::-1]
        for _ in tqdm(range(len(regions)), desc='objects', disable=None, leave=False, delay=5):
            region = regions.pop()                                     # removed, because it caches all its results
            row = [region.label, *(f'{x:.2f}' for x in region.centroid), *region.bbox, int(region.area),
                   f'{region.perimeter:.2f}', f'{region.eccentricity:.4f}', f'{region.solidity:.4f}',
                   f'{region.intensity_mean / 255:.4f}']
            if matches is not None:
                matched, iou = matches.get(region.label, ('', None))
                row += [matched, '' if iou is None else f'{iou:.4f}']
            rows.append(row)
    return csv_text(rows)
