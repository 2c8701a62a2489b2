"""What a test writes: tables of scores and of objects, and the record of each image."""
import csv
import hashlib
import io
import json
import warnings

import numpy as np
from skimage.measure import regionprops
from tqdm import tqdm

from support.files import FolderLock, save_image, save_instances, sha256_of, write_text
from support.images import resize_bilinear
from support.pictures import colour_instances, draw_overlay

PUBLISHED = 'published code, mean over images: '
DEFINITIONS = {           # of {set}_metrics.json
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
RESULT_VERSION = 3                    # counts up when the same input gives other results, so that old ones are not kept


def means(rows):
    """The mean of every column over its rows that are not NaN; NaN where there is none. rows: lists of one length."""
    values = np.array(rows, dtype=float)
    known = ~np.isnan(values)
    with np.errstate(invalid='ignore'):
        return (np.where(known, values, 0).sum(0) / known.sum(0)).tolist()


def results_table(results, columns):
    """The published result file: means first, then every image by name; tab-separated, 4 decimals."""
    rows = [('Metrics:', columns), ('Average:', [f'{v:.4f}' for v in means(list(results.values()))]), None]
    rows += [(f'{name}:', [f'{v:.4f}' for v in results[name]]) for name in sorted(results)]
    return '\n'.join('\t'.join([row[0], *row[1]]) if row else '' for row in rows) + '\n'


class Results:
    """What test.py writes into `folder`: {set}_prob_maps/, {set}_segmentation/, {set}_records/ and the tables.

    A record remembers of an image what it was computed of and its scores, so that it need not be computed again. Two
    processes would mix their files under one record: the set is locked until `lock.release()`. Raises InputError if
    another process has locked it, other than those of other `rank` that share its images.
    """

    def __init__(self, folder, set_name, opt, mean_std, rank=0):
        self.folder, self.set_name, self.dataset = folder, set_name, opt.dataset
        ignored = ('data_dir', 'epoch', 'gpu', 'img_dir', 'label_dir', 'save_dir', 'model_path', 'max_megapixels',
                   'batch_size', 'overwrite')
        self.made_of = [RESULT_VERSION, opt.dataset, opt.model, opt.post, opt.transform, mean_std.tolist(),
                        sha256_of(opt.test['model_path']),
                        {name: value for name, value in opt.test.items() if name not in ignored}]
        self.records = {}
        self.lock = FolderLock(folder / f'{set_name}_records', rank)

    def remove_tables(self):
        """Those of an earlier test, which would be read as made with the options of this one."""
        for ending in ('test_result.txt', 'metrics.csv', 'metrics.json'):
            (self.folder / f'{self.set_name}_{ending}').unlink(missing_ok=True)

    def path(self, kind, name, ending):
        return self.folder / f'{self.set_name}_{kind}' / f'{name}{ending}'

    def is_finished(self, path, label_path):
        """Whether the image was finished with the same options, weights, image and label; then its record is taken."""
        self.records[path.stem] = {'key': ''}
        try:
            made_of = [self.made_of, sha256_of(path), label_path and sha256_of(label_path)]
            key = self.records[path.stem]['key'] = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
            record = json.loads(self.path('records', path.stem, '.json').read_text(encoding='utf-8'))
            finished = record['key'] == key and all((self.folder / file).is_file() for file in record['files'])
        except (OSError, ValueError, KeyError, TypeError):                   # none, or not one of ours
            return False
        if finished:
            self.records[path.stem] = record
        return finished

    def save_images(self, name, image, segmentation, inside, contour, label, matches):
        """Probability maps, instances, table of objects, overlay and coloured picture. `image` is drawn over.

        matches: of `match_objects`, None without a label.
        """
        files = []

        def place(kind, ending):
            self.lock.check()
            files.append(self.path(kind, name, ending))
            return files[-1]
        save_image(place('prob_maps', '_prob_inside.png'), inside)
        save_image(place('prob_maps', '_prob_contour.png'), contour)
        save_instances(place('segmentation', '_seg.tiff'), segmentation)
        write_text(place('segmentation', '_objects.csv'), objects_csv(segmentation, inside, matches))
        save_image(place('segmentation', '_overlay.png'), draw_overlay(image, segmentation, label, matches))
        save_image(place('segmentation', '_seg_colored.png'), colour_instances(segmentation, image))
        self.records[name]['files'] = [file.relative_to(self.folder).as_posix() for file in files]

    def finish(self, name, scores):
        """Write the record of an image."""
        record = {'files': [], **self.records[name]}
        if scores is not None:
            table = {field: value if isinstance(value, int) else np.asarray(value).tolist()
                     for field, value in scores.table._asdict().items() if field not in ('pred_map', 'gt_map')}
            record |= {'published': scores.published, 'standard': scores.standard, 'overlaps': table}
        self.records[name] = record
        self.lock.check()
        write_text(self.path('records', name, '.json'), json.dumps(record) + '\n')

    def save_tables(self, names, columns, pooled):
        """`{set}_test_result.txt` as published, which is returned, and all as `{set}_metrics.csv` and `.json`.

        columns: the published ones. pooled: standard scores of all images as if they were one.
        """
        published = {name: self.records[name]['published'] for name in names}
        text = results_table(published, columns)
        write_text(self.folder / f'{self.set_name}_test_result.txt', text)

        columns = [f'published_{column}' for column in columns]
        images = {name: dict(zip(columns, published[name])) | without_published(self.records[name]['standard'])
                  for name in sorted(names)}
        mean = dict(zip(images[names[0]], means([list(row.values()) for row in images.values()])))
        pooled = dict.fromkeys(columns) | without_published(pooled)
        *rows, mean, pooled = ({key: None if value is None or np.isnan(value) else value for key, value in row.items()}
                               for row in (*images.values(), mean, pooled))
        summary = {'dataset': self.dataset, 'set': self.set_name,
                   'definitions': {key: DEFINITIONS[key] for key in mean},
                   'images': dict(zip(images, rows)), 'mean': mean, 'pooled': pooled}
        write_text(self.folder / f'{self.set_name}_metrics.json', json.dumps(summary, indent=1) + '\n')
        lines = [['image', *mean]] + [[name, *('' if value is None else f'{value:.6f}' for value in row.values())]
                                      for name, row in zip((*images, 'mean', 'pooled'), (*rows, mean, pooled))]
        write_text(self.folder / f'{self.set_name}_metrics.csv', csv_text(lines))
        return text


def without_published(metrics):
    """Without aji_fullnet, which is published_AJI."""
    return {name: value for name, value in metrics.items() if name != 'aji_fullnet'}


def csv_text(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    return text.getvalue()


def objects_csv(segmentation, inside, matches=None):
    """One line per object, as CSV: OBJECT_COLUMNS, and with `matches` (`match_objects`) matched_id and matched_iou.

    Lengths in pixels; the bounding box is top, left and, one behind the last, bottom, right.
    mean_inside_probability is that of the stored map, uint8, resized to the segmentation.
    """
    if inside.shape != segmentation.shape:
        inside = resize_bilinear(inside, segmentation.shape)
    rows = [[*OBJECT_COLUMNS, *(('matched_id', 'matched_iou') if matches is not None else ())]]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                # objects too small to have a convex hull
        regions = regionprops(segmentation, inside)[::-1]
        for _ in tqdm(range(len(regions)), desc='objects', disable=None, leave=False, delay=5):
            region = regions.pop()                                     # which remembers all that was asked of it
            row = [region.label, *(f'{x:.2f}' for x in region.centroid), *region.bbox, int(region.area),
                   f'{region.perimeter:.2f}', f'{region.eccentricity:.4f}', f'{region.solidity:.4f}',
                   f'{region.intensity_mean / 255:.4f}']
            if matches is not None:
                matched, iou = matches.get(region.label, ('', None))
                row += [matched, '' if iou is None else f'{iou:.4f}']
            rows.append(row)
    return csv_text(rows)
