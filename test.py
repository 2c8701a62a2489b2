"""Segment images with a trained network, and score the result: `python test.py`; an empty label_dir means no scores.

From Python: `from test import segment; label, probabilities = segment(image, 'checkpoint_best.pth.tar')`.
"""
import csv
import hashlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.measure import regionprops
from torch.nn import functional as F
from tqdm import tqdm

from dataset import (check_mean_std, find_labels, list_images, load_mean_std, note, read_image,
                     read_instance_label)
from my_transforms import get_transforms
from options import DATASETS, Options, results_folder
from prepare_data import Reinhard_normalizer
from utils import (AverageMeter, FolderLock, InputError, MixedPrecision, OverlapTable, Processes, accuracy_pixel_level,
                   build_model, choose_device, find_edges, gland_scores_of, inside_mask, load_checkpoint, load_weights,
                   match_objects, nuclei_scores_of, overlap_table, pool, post_process, predict_in_bands,
                   predict_probabilities, put_on, resize_bilinear, run_script, save_image, save_instances,
                   sha256_of, standard_metrics_of, windows_at_once, write_text)

METRICS = {
    'MultiOrgan': ('pixel_acc', 'recall', 'precision', 'F1', 'Dice', 'IoU', 'Hausdorff', 'AJI'),
    'GlaS': ('pixel_acc', 'recall', 'precision', 'F1', 'Dice', 'IoU', 'Hausdorff'),
}
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
HIT, MISSED, FALSE = (40, 230, 60), (60, 140, 255), (255, 50, 40)           # colours of contours in the overlay
UNLABELLED = (255, 255, 0)
N_COLOURS = 12                                                              # of the coloured picture
RESULT_VERSION = 2                    # counts up when the same input gives other results, so that old ones are not kept
PRETRAINED = Path(__file__).parent / 'pretrained' / 'FullNet_MultiOrgan.pth.tar'
# mean and standard deviation of the published data sets, for a published checkpoint without its mean_std.npy
PUBLISHED_MEAN_STD = {
    'MultiOrgan': [[0.74408994, 0.53806349, 0.66497889], [0.15811703, 0.19705941, 0.15046222]],
    'GlaS': [[0.78780321, 0.5120167, 0.78493782], [0.16766301, 0.24838048, 0.13225162]],
}


def main(argv=None):
    # 1. options, network
    opt, checkpoint = parse_options(argv)
    test = opt.test
    if isinstance(checkpoint.get('licence'), str) and checkpoint['licence']:
        print(f'licence of {test["model_path"]}: {ascii(" ".join(checkpoint["licence"].split()))[1:-1][:300]}')
    processes = Processes(test['gpu'])
    device = processes.device
    normalizer = find_normalizer(opt, checkpoint)
    mean_std = find_mean_std(opt, checkpoint)
    model = load_model(opt, checkpoint, device)

    # 2. images and labels
    single = Path(test['img_dir']).is_file()
    images = [Path(test['img_dir'])] if single else list_images(test['img_dir'], name_others=processes.rank == 0)
    labels = [None] * len(images)
    if test['label_dir']:
        labels = find_labels(images, test['label_dir'], hint="; for images without labels give --label-dir ''")
    set_name = Path(os.path.abspath(images[0].parent)).name
    out = Results(Path(test['save_dir']), set_name, opt, mean_std, processes.rank)
    if processes.rank == 0:
        out.remove_tables()
        opt.save(out.folder)
    with processes.watched(how_to_go_on):
        processes.wait()                                                 # until the first one has the set's lock

    # 3. every image: probabilities, instances, scores; each of torchrun's processes takes its share
    pairs, kept = list(zip(images, labels)), 0
    for path, label_path in tqdm(pairs[processes.rank::processes.count], desc=set_name, disable=processes.quiet):
        if out.is_finished(path, label_path) and not test['overwrite']:
            kept += 1
            continue
        image = read_image(path, test['max_megapixels'], test['scale_16bit'])
        label = None
        if label_path is not None:
            label = read_instance_label(label_path, image.shape[:2], test['binary_labels'], test['max_megapixels'])
        seen = image if normalizer is None else normalizer.transform(image)
        bands = probability_bands(model, opt, mean_std, device, seen)
        segmentation, inside, contour = segment_bands(bands, image.shape[:2], opt.post, test['scale_factor'])
        scores = score(segmentation, label, opt.dataset) if label is not None else None
        if test['save_flag']:
            out.save_images(path.stem, image, segmentation, inside, contour, label)
        out.finish(path.stem, scores)
    with processes.watched(how_to_go_on):
        kept = round(processes.sums([kept])[0])
    processes.end()
    if kept:
        print(f'{kept} images were finished before with the same options and weights and are kept '
              f'(--overwrite True computes them again)')

    # 4. tables of results
    if test['label_dir'] and processes.rank == 0:
        for path, label_path in pairs:
            if path.stem not in out.records and not out.is_finished(path, label_path):       # another process's share
                raise InputError(f'no record of {path} in {out.folder}, though another process finished it; all '
                                 f'processes must write into one folder, which all machines see')
        print(out.save_tables([path.stem for path in images]), end='')
    out.lock.release()
    print(f'{len(images)} images; results in {out.folder}')


def how_to_go_on():
    return 'start the same command again: finished images are kept'


def segment(image, checkpoint, *words):
    """Segment one image with a checkpoint, as test.py does.

    image: uint8 (H, W, 3) RGB. checkpoint: path. words: further options, as on the command line ('--tta', 'none').
    Returns the instance label, int32 (H, W), and the probability maps, float32 (H', W', classes), (H', W') = (H, W)
    unless the image is scaled. Raises InputError.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f'segment was given {image.dtype} of shape {image.shape}; expected uint8 (H, W, 3), RGB')
    opt, loaded = parse_options(['--model-path', str(checkpoint), *words])
    device = choose_device(opt.test['gpu'])
    model, normalizer = load_model(opt, loaded, device), find_normalizer(opt, loaded)
    seen = image if normalizer is None else normalizer.transform(image)
    bands = probability_bands(model, opt, find_mean_std(opt, loaded), device, seen)
    probabilities = np.concatenate(list(bands))
    return segment_bands([probabilities], image.shape[:2], opt.post, opt.test['scale_factor'])[0], probabilities


# ---------------------------------------------------------------------------------------------------
# Options, network and its input
# ---------------------------------------------------------------------------------------------------

def parse_options(argv=None):
    """The options, and the checkpoint that they name, which knows its data set and network if it is of ours."""
    opt = Options(isTrain=False).parse(argv)
    if {('test', 'epoch'), ('test', 'model_path')} <= opt.given:
        raise InputError('--epoch chooses a checkpoint of a run, and --model-path names a checkpoint; leave one out')
    take_pretrained_if_untrained(opt)
    checkpoint = load_checkpoint(opt.test['model_path'])
    stored = checkpoint.get('options', {}).get('dataset')
    if stored in DATASETS and stored != opt.dataset and ('', 'dataset') not in opt.given:
        path = opt.test['model_path']
        note(f'{path} was trained on {stored}: taking --dataset {stored}')
        words = sys.argv[1:] if argv is None else argv
        opt = Options(isTrain=False).parse([*words, '--dataset', stored, '--model-path', path])
    take_model_of_checkpoint(opt, checkpoint)
    return opt, checkpoint


def take_pretrained_if_untrained(opt):
    """Without a run of the user's own, the default is the weights that come with the code."""
    test = opt.test
    chosen = {('test', name) for name in ('model_path', 'epoch')} & opt.given
    if chosen or opt.dataset != 'MultiOrgan' or Path(test['model_path']).exists() or not PRETRAINED.is_file() \
            or any(Path('experiments/MultiOrgan').glob('*/checkpoints')):
        return
    test['model_path'] = str(PRETRAINED)
    if ('test', 'save_dir') not in opt.given:
        test['save_dir'] = results_folder(PRETRAINED, opt.dataset)
    print(f'no trained run in ./experiments/MultiOrgan: taking the weights that come with the code, {PRETRAINED}')


def find_normalizer(opt, checkpoint):
    """With color_norm, the Reinhard_normalizer of the training images' LAB statistics, which the checkpoint carries."""
    if not opt.test['color_norm']:
        return None
    if 'lab' not in checkpoint:
        raise InputError(f'--color-norm True needs the training images\' colours, which {opt.test["model_path"]} does '
                         f'not carry; scripts/export_pretrained.py makes a file that does, of a run and its data')
    normalizer = Reinhard_normalizer()
    normalizer.mean, normalizer.std = np.array(checkpoint['lab'])
    return normalizer


def take_model_of_checkpoint(opt, checkpoint):
    """A checkpoint of ours knows its model group, so that no architecture flags are needed.

    Raises InputError that names a model option which was given on the command line and contradicts it.
    """
    stored = checkpoint.get('options')
    if not stored:                                            # published: the options decide
        return
    for name, value in stored['model'].items():
        if ('model', name) in opt.given and opt.model[name] != value:
            raise InputError(f'--{name.replace("_", "-")} is {opt.model[name]}, but {opt.test["model_path"]} was '
                             f'trained with {value}; leave it out')
        opt.model[name] = value
    validation = stored.get('transform', {}).get('val', opt.transform['test'])
    for name in ('scale', 'normalize'):
        value, before = (values.get(name, 'none') for values in (opt.transform['test'], validation))
        if value != before and opt.dataset == stored['dataset'] and ('transform.test', name) not in opt.given:
            note(f'{name} is {value} here, and was {before} in the validation of {opt.test["model_path"]}; '
                 f'--transform.test.{name} {before} tests as validation did')


def find_mean_std(opt, checkpoint):
    """mean_std, float64 (2, 3): the checkpoint's; a published one has none, so data_dir's file or published values."""
    if 'mean_std' in checkpoint:
        return check_mean_std(checkpoint['mean_std'], opt.test['model_path'])
    path = Path(opt.test['data_dir']) / 'mean_std.npy'
    if path.exists():
        return load_mean_std(path)
    warnings.warn(f'{opt.test["model_path"]} carries no mean_std and there is no {path}; '
                  f'taking the published values of {opt.dataset}', stacklevel=2)
    return np.array(PUBLISHED_MEAN_STD[opt.dataset])


def load_model(opt, checkpoint, device):
    """The network with the checkpoint's weights, ready to test."""
    model = build_model(opt.model)
    load_weights(model, checkpoint['state_dict'], opt.model, opt.test['model_path'])
    return put_on(device, model.set_mode('auto', amp=opt.test['amp'])).eval()


def probability_bands(model, opt, mean_std, device, image):
    """Probability maps of an image, uint8 (H, W, 3): float32 (rows, W', classes), band by band from top to bottom.

    Sliding window unless patch_size is 0; then the network sees the whole image at once, in one band.
    """
    params, test = dict(opt.transform['test']), opt.test
    if params.pop('normalize', False):
        params['normalize'] = mean_std
    scale = get_transforms({'scale': params.pop('scale')}) if 'scale' in params else None
    transform = get_transforms(params)
    batch_size = test['batch_size'] or windows_at_once(device)
    precision = MixedPrecision(device, test['amp'], testing=True)

    def scaled(image):
        image = resize(image, test['scale_factor'], test['max_megapixels'])
        return image if scale is None else np.asarray(scale([Image.fromarray(image)])[0])

    @torch.inference_mode()
    def predict(windows, shape):
        """Probabilities (n, H, W, classes) of n windows, uint8 (h, w, 3), zero-padded once normalised."""
        inputs = [transform([Image.fromarray(window)])[0] for window in windows]
        inputs = torch.stack([F.pad(x, (0, shape[1] - x.shape[2], 0, shape[0] - x.shape[1])) for x in inputs])
        with precision.autocast():
            logits = model(inputs.to(device))
        return torch.softmax(logits.float(), dim=1).permute(0, 2, 3, 1).cpu().numpy()

    if test['patch_size']:
        for _, _, band in predict_in_bands(predict, scaled(image), test['patch_size'], test['overlap'], test['tta'],
                                           opt.model['out_c'], batch_size):
            yield band
    else:
        def whole(oriented):
            oriented = scaled(oriented)
            return predict([oriented], oriented.shape[:2])[0]
        yield predict_probabilities(whole, image, test['tta'])


def resize(image, factor, max_megapixels):
    """The image, uint8 (H, W, 3), with sides `factor` times as long. Raises InputError if that is too large."""
    if factor == 1:
        return image
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    if height * width > max_megapixels * 1e6:
        raise InputError(f'--scale-factor {factor:g} makes an image of {width} x {height} pixels, more than '
                         f'{max_megapixels:g} megapixels; make it smaller, or --max-megapixels larger')
    return resize_bilinear(image, (height, width))


def segment_bands(bands, image_shape, post, scale_factor=1):
    """From bands of probability maps to (instance label, int32 (H, W), inside and contour maps, uint8 (H', W')).

    The maps hold 255 times the probability. image_shape: (H, W). The radius of the dilation is divided by scale_factor,
    because the contour that it gives back is thinner in the image than in what the network saw.
    """
    masks, inside, contour = [], [], []
    for band in bands:
        masks.append(inside_mask(band, post['inside_threshold']))
        inside.append(np.round(band[..., 1] * 255).astype(np.uint8))
        contour.append(np.round(band[..., 2] * 255).astype(np.uint8))
        del band                                                     # before the next one is made
    masks, inside, contour = map(np.concatenate, (masks, inside, contour))
    radius = round(post['radius'] / scale_factor)
    label = post_process(masks, post['min_area'], radius, image_shape, post['h_maxima'], inside)
    return label, inside, contour


# ---------------------------------------------------------------------------------------------------
# Scores, and the files of a test
# ---------------------------------------------------------------------------------------------------

class Scores(NamedTuple):
    """Of one image. published: the values of METRICS. table: its OverlapTable without the maps."""
    published: list
    table: object


def score(segmentation, label, dataset):
    """Scores of one image: pixel accuracy of the foreground and the published object-level metrics; all overlaps."""
    pixel_acc = accuracy_pixel_level(segmentation[None] > 0, label[None] > 0)[0]
    table = overlap_table(segmentation, label)
    object_level = nuclei_scores_of(table) if dataset == 'MultiOrgan' else gland_scores_of(table)
    return Scores([float(pixel_acc), *map(float, object_level)], table._replace(pred_map=None, gt_map=None))


def results_table(results, columns):
    """The published result file: means first, then every image by name; tab-separated, 4 decimals."""
    meter = AverageMeter(len(columns))
    for values in results.values():
        meter.update(values, 1)
    rows = [('Metrics:', columns), ('Average:', [f'{v:.4f}' for v in meter.avg]), None]
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

    def save_images(self, name, image, segmentation, inside, contour, label):
        """Probability maps, instances, table of objects, overlay and coloured picture. `image` is drawn over."""
        files = []

        def place(kind, ending):
            self.lock.check()
            files.append(self.path(kind, name, ending))
            return files[-1]
        save_image(place('prob_maps', '_prob_inside.png'), inside)
        save_image(place('prob_maps', '_prob_contour.png'), contour)
        save_instances(place('segmentation', '_seg.tiff'), segmentation)
        matches = None if label is None else match_objects(segmentation, label)
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
            record |= {'published': scores.published, 'overlaps': table}
        self.records[name] = record
        self.lock.check()
        write_text(self.path('records', name, '.json'), json.dumps(record) + '\n')

    def save_tables(self, names):
        """`{set}_test_result.txt` as published, which is returned, and all as `{set}_metrics.csv` and `.json`."""
        published = {name: self.records[name]['published'] for name in names}
        text = results_table(published, METRICS[self.dataset])
        write_text(self.folder / f'{self.set_name}_test_result.txt', text)

        tables = {name: table_of(self.records[name]['overlaps']) for name in names}
        columns = [f'published_{column}' for column in METRICS[self.dataset]]
        images = {name: dict(zip(columns, published[name])) | without_published(standard_metrics_of(tables[name]))
                  for name in sorted(names)}
        meter = AverageMeter(len(images[names[0]]))
        for row in images.values():
            meter.update(list(row.values()))
        mean = dict(zip(images[names[0]], meter.avg.tolist()))
        pooled = dict.fromkeys(columns) | without_published(standard_metrics_of(pool(list(tables.values()))))
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


def table_of(stored):
    """The OverlapTable of a record."""
    return OverlapTable(None, None, **{field: value if isinstance(value, int) else np.array(
        value, float if field == 'iou' else int) for field, value in stored.items()})


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


# ---------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------

def draw_overlay(image, segmentation, label=None, matches=None):
    """The image, uint8 (H, W, 3), with the contours of the objects drawn into it.

    With ground truth: hits, false objects and missed ones in three colours, and a legend below. A hit is a pair of
    `match_objects` with IoU >= 0.5.
    """
    if label is None:
        draw_contours(image, segmentation, UNLABELLED)
        return image
    hits = {pred: gt for pred, (gt, iou) in matches.items() if iou >= 0.5}
    ids = np.unique(label)
    missed = np.isin(label, np.setdiff1d(ids, list(hits.values()))) * label
    draw_contours(image, missed, MISSED)
    colours = np.full((segmentation.max(initial=0) + 1, 3), FALSE, np.uint8)
    colours[list(hits)] = HIT
    draw_contours(image, segmentation, colours)
    n_false, n_missed = int((np.bincount(segmentation.ravel())[1:] > 0).sum()) - len(hits), (ids > 0).sum() - len(hits)
    legend = Image.new('RGB', (image.shape[1], 20), 'black')
    draw, x = ImageDraw.Draw(legend), 4
    for text, colour in ((f'{len(hits)} hits (IoU >= 0.5)', HIT), (f'{n_missed} missed', MISSED),
                         (f'{n_false} false', FALSE)):
        draw.text((x, 4), text, fill=colour)
        x += draw.textlength(text) + 16
    return np.concatenate([image, np.asarray(legend)])


def draw_contours(image, label, colours, rows=2048):
    """Colour the pixels of objects that have a 4-neighbour outside their object. colours: (3,), or (ids, 3)."""
    for top in range(0, len(label), rows):                               # in pieces, for large images
        above = min(top, 1)                                              # and a row around them, to see the neighbours
        ids = label[top:top + rows]
        border = find_edges(label[top - above:top + rows + 1])[above:above + len(ids)] & (ids > 0)
        image[top:top + rows][border] = colours if np.ndim(colours) == 1 else colours[ids[border]]


def colour_instances(label, picture=None, rows=2048):
    """RGB picture, uint8 (H, W, 3), of an instance label, int (H, W): black background, touching objects differ.

    It is written over `picture`, if that is given: a large image then needs no memory for another one.

    Each object in order of its id gets the first colour, from one that depends on its id on, that no touching object
    of lower id has.
    """
    hue = np.arange(N_COLOURS) / N_COLOURS
    phase = (hue[:, None] + np.array([1, 2 / 3, 1 / 3])) % 1
    colours = (0.7 + 0.3 * (np.arange(N_COLOURS) % 2))[:, None] * (1 - 0.75 * np.clip(2 - np.abs(phase * 6 - 3), 0, 1))
    chosen = {}
    for low, high in touching_pairs(label):
        chosen.setdefault(high, set()).add(low)
    number = np.arange(label.max(initial=0) + 1) * 7 % N_COLOURS
    for high in sorted(chosen):
        taken = {number[low] for low in chosen[high]}
        number[high] = next((k for k in range(number[high], number[high] + N_COLOURS) if k % N_COLOURS not in taken),
                            number[high]) % N_COLOURS
    palette = (colours * 255).astype(np.uint8)[number]
    palette[0] = 0
    if picture is None:
        picture = np.empty((*label.shape, 3), np.uint8)
    for top in range(0, len(label), rows):                               # in pieces, for large images
        picture[top:top + rows] = palette[label[top:top + rows]]
    return picture


def touching_pairs(label):
    """Pairs (lower id, higher id) of objects with 4-neighbouring pixels; list of pairs of int, sorted."""
    pairs = []
    for a, b in ((label[:, :-1], label[:, 1:]), (label[:-1], label[1:])):
        touch = (a != b) & (a > 0) & (b > 0)
        pairs.append(np.stack([np.minimum(a[touch], b[touch]), np.maximum(a[touch], b[touch])], axis=1))
    return np.unique(np.concatenate(pairs), axis=0).tolist()


if __name__ == '__main__':
    run_script(main)
