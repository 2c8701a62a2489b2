"""Segment images with a trained network and score the result: `python test.py`. An empty label_dir means no scores.

The way of an image is the loop in `main`: read it; `probability_bands` (scale, windows, network, mean over
orientations); `segment_bands` (inside, small components removed, size of the image, instances, dilation); score; save.

From Python: `from test import segment; instances, probabilities = segment(image, 'checkpoint_best.pth.tar')`.
"""
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from FullNet import create_model
from my_transforms import Scale, get_transforms
from options import DATASETS, Options
from prepare_data import Reinhard_normalizer
from support.checkpoints import check_mean_std, load_checkpoint, load_mean_std, load_weights
from support.devices import MixedPrecision, Processes, choose_device, put_on, windows_at_once
from support.files import results_folder
from support.images import find_labels, list_images, pixel_size, read_image, read_instance_label, resize_by
from support.objects import OverlapTable, overlap_table
from support.results import Results
from support.script import InputError, note, run_script
from utils import (accuracy_pixel_level, gland_scores_of, inside_mask, match_objects, nuclei_scores_of, post_process,
                   predict_in_bands, predict_probabilities, standard_metrics_of, zero_pad)

METRICS = {
    'MultiOrgan': ('pixel_acc', 'recall', 'precision', 'F1', 'Dice', 'IoU', 'Hausdorff', 'AJI'),
    'GlaS': ('pixel_acc', 'recall', 'precision', 'F1', 'Dice', 'IoU', 'Hausdorff'),
}
GLAS_SIDE = 522          # pixels: the shorter side of most GlaS images
PRETRAINED = Path(__file__).parent / 'pretrained'            # the weights that come with the code: FullNet_{dataset}
# mean and standard deviation of the published data sets, for published checkpoints, which carry none
PUBLISHED_MEAN_STD = {
    'MultiOrgan': [[0.74408994, 0.53806349, 0.66497889], [0.15811703, 0.19705941, 0.15046222]],
    'GlaS': [[0.78780321, 0.5120167, 0.78493782], [0.16766301, 0.24838048, 0.13225162]],
}


def main(argv=None):
    # 1. options and network
    opt, checkpoint = parse_options(argv)
    test = opt.test
    if isinstance(checkpoint.get('licence'), str) and checkpoint['licence']:
        # ascii: the text of a stranger's checkpoint may hold control characters
        print(f'licence of {test["model_path"]}: {ascii(" ".join(checkpoint["licence"].split()))[1:-1][:300]}')
    processes = Processes(test['gpu'])
    device = processes.device
    normalizer = find_normalizer(opt, checkpoint)
    mean_std = find_mean_std(opt, checkpoint)
    model = load_model(opt, checkpoint, device)
    side = trained_side(checkpoint)

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
    with processes.report_lost_process(how_to_resume):
        processes.wait()                                                 # until process 0 has locked the results

    # 3. every image: read, windows, probabilities, post-processing, scores, files; each process takes its own images
    pairs, n_skipped = list(zip(images, labels)), 0
    for path, label_path in tqdm(pairs[processes.rank::processes.count], desc=set_name, disable=processes.quiet):
        if out.read_record(path, label_path) and not test['overwrite']:
            n_skipped += 1
            continue
        image = read_image(path, test['max_megapixels'], test['scale_16bit'])
        truth = None
        if label_path is not None:
            truth = read_instance_label(label_path, image.shape[:2], test['binary_labels'], test['max_megapixels'])
        normalized = image if normalizer is None else normalizer.transform(image)
        factor = scale_factor(opt, checkpoint, path)
        bands = probability_bands(model, opt, mean_std, device, normalized, factor, side)
        instances, inside, contour = segment_bands(bands, image.shape[:2], opt.post, factor)
        scores = score(instances, truth, opt.dataset) if truth is not None else None
        if test['save_flag']:
            matches = None if truth is None else match_objects(instances, truth)
            out.save_images(path.stem, image, instances, inside, contour, truth, matches)
        out.finish(path.stem, scores)
    with processes.report_lost_process(how_to_resume):
        n_skipped = round(processes.sums([n_skipped])[0])
    processes.shut_down()
    if n_skipped:
        print(f'{n_skipped} images were finished before with the same options and weights and are kept '
              f'(--overwrite True recomputes them)')

    # 4. tables of results
    if test['label_dir'] and processes.rank == 0:
        for path, label_path in pairs:
            if path.stem not in out.records and not out.read_record(path, label_path):      # of another process
                raise InputError(f'no record of {path} in {out.folder}, though another process finished it; all '
                                 f'processes must write into one folder, which all machines see')
        names = [path.stem for path in images]
        pooled = standard_metrics_of(out.pooled_overlaps(names))
        print(out.save_tables(names, METRICS[opt.dataset], pooled), end='')
    out.lock.release()
    print(f'{len(images)} images; results in {out.folder}')


def how_to_resume():
    return 'start the same command again: finished images are kept'


def segment(image, checkpoint, *words):
    """Segment one image with a checkpoint, as test.py does.

    image: uint8 (H, W, 3) RGB. checkpoint: path. words: further options, as on the command line ('--tta', 'none').
    Returns the instances, int32 (H, W), 0 = background, and the probability maps, float32 (H', W', classes).
    (H', W') is (H, W) unless the image is scaled. Raises InputError for another image, checkpoint or option.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f'segment was given {image.dtype} of shape {image.shape}; expected uint8 (H, W, 3), RGB')
    opt, loaded = parse_options(['--model-path', str(checkpoint), *words])
    device = choose_device(opt.test['gpu'])
    model, normalizer = load_model(opt, loaded, device), find_normalizer(opt, loaded)
    normalized = image if normalizer is None else normalizer.transform(image)
    factor = scale_factor(opt, loaded)
    bands = probability_bands(model, opt, find_mean_std(opt, loaded), device, normalized, factor,
                              trained_side(loaded))
    probabilities = np.concatenate(list(bands))
    return segment_bands([probabilities], image.shape[:2], opt.post, factor)[0], probabilities


# ---------------------------------------------------------------------------------------------------
# Options, network and its input
# ---------------------------------------------------------------------------------------------------

def parse_options(argv=None):
    """The Options and the checkpoint that they name. Our checkpoints carry their data set and network options."""
    opt = Options(isTrain=False).parse(argv)
    if {('test', 'epoch'), ('test', 'model_path')} <= opt.given:
        raise InputError('--epoch chooses a checkpoint of a run, and --model-path names a checkpoint; leave one out')
    take_pretrained_if_untrained(opt)
    path = opt.test['model_path']
    checkpoint = load_checkpoint(path)
    more, stored = [], checkpoint.get('options', {}).get('dataset')
    if stored in DATASETS and stored != opt.dataset and ('', 'dataset') not in opt.given:
        note(f'{path} was trained on {stored}: taking --dataset {stored}')
        more = ['--dataset', stored]
    if opt.test['preset'] == 'best':
        best = checkpoint.get('best_post')
        if not isinstance(best, dict) or not all(name in opt.post and isinstance(value, (int, float))
                                                 for name, value in best.items()):
            raise InputError(f'{path} has no preset best; leave out --preset, or give the options of post-processing')
        more += [word for name, value in best.items() if ('post', name) not in opt.given
                 for word in (f'--{name}'.replace('_', '-'), str(value))]
    if more:
        opt.parse([*opt.argv, *more, '--model-path', path])
    take_model_of_checkpoint(opt, checkpoint)
    return opt, checkpoint


def take_pretrained_if_untrained(opt):
    """Test the weights that come with the code if the user has trained nothing and named no checkpoint."""
    test, runs, weights = opt.test, Path('experiments', opt.dataset), PRETRAINED / f'FullNet_{opt.dataset}.pth.tar'
    chosen = {('test', name) for name in ('model_path', 'epoch')} & opt.given
    if chosen or Path(test['model_path']).exists() or not weights.is_file() or any(runs.glob('*/checkpoints')):
        return
    test['model_path'] = str(weights)
    if ('test', 'save_dir') not in opt.given:
        test['save_dir'] = results_folder(weights, opt.dataset)
    print(f'no trained run in ./{runs.as_posix()}: taking the weights that come with the code, {weights}')


def find_normalizer(opt, checkpoint):
    """With --color-norm, a Reinhard_normalizer fitted to the training images, else None.

    Raises InputError if the checkpoint does not carry the LAB statistics of its training images.
    """
    if not opt.test['color_norm']:
        return None
    if 'lab' not in checkpoint:
        raise InputError(f'--color-norm True needs the training images\' colours, which {opt.test["model_path"]} does '
                         f'not carry; scripts/export_pretrained.py makes a file that does, of a run and its data')
    normalizer = Reinhard_normalizer()
    normalizer.mean, normalizer.std = np.array(checkpoint['lab'])
    return normalizer


def take_model_of_checkpoint(opt, checkpoint):
    """Take the model options from a checkpoint of ours, so that testing needs no architecture flags.

    Raises InputError that names a model option on the command line which contradicts the checkpoint.
    """
    stored = checkpoint.get('options')
    if not stored:                                            # a published checkpoint: options.py decides
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
    """Mean and standard deviation of the training images' colours, float64 (2, 3), in [0, 1].

    They come from the checkpoint. A published checkpoint has none: then from data_dir, else the published values.
    """
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
    model = create_model(**opt.model)
    load_weights(model, checkpoint['state_dict'], opt.model, opt.test['model_path'])
    return put_on(device, model.set_mode('auto', amp=opt.test['amp'])).eval()


def scale_factor(opt, checkpoint, path=None):
    """By which an image is enlarged to the pixel size of the training images: --scale-factor, or what --mpp says.

    path: of the image, for --mpp auto. Raises InputError if the weights, or the image, do not say their pixel size.
    """
    mpp = opt.test['mpp']
    if not mpp:
        return opt.test['scale_factor']
    trained = checkpoint.get('options', {}).get('train', {}).get('mpp')
    if not isinstance(trained, (int, float)) or not trained > 0:
        other = '--transform.test.scale' if 'scale' in opt.transform['test'] else '--scale-factor'
        raise InputError(f'{opt.test["model_path"]} does not say the pixel size of its training images; give {other} '
                         f'instead of --mpp')
    if mpp == 'auto':
        if path is None:
            raise InputError('--mpp auto needs a file; give --mpp a number of um')
        mpp = pixel_size(path)
        note(f'{path.name}: {mpp:.4g} um per pixel, {mpp / trained:.3g} times that of the training images')
    return mpp / trained


def trained_side(checkpoint):
    """Shorter side of the training images before the transform `scale`, in pixels: their median."""
    side = checkpoint.get('shorter_side')
    return side if isinstance(side, (int, float)) and side > 0 else GLAS_SIDE         # weights from before it was kept


def probability_bands(model, opt, mean_std, device, image, factor, side):
    """Yield the probability maps of an image in bands from top to bottom, float32 (rows, W', classes).

    image: uint8 (H, W, 3). factor: `scale_factor`. side: `trained_side`. With patch_size 0 the network sees the whole
    image at once, in one band; else it sees windows.
    """
    params, test = dict(opt.transform['test']), opt.test
    scale = params.pop('scale', None)
    if params.get('normalize'):
        params['normalize'] = mean_std
    transform = get_transforms(params)
    shown = min(image.shape[:2])
    if scale and not test['mpp'] and ('transform.test', 'scale') not in opt.given and not 2 / 3 < shown / side < 3 / 2:
        note(f'an image with a shorter side of {shown} pixels is scaled to {scale}, as the training images were, which '
             f'had {side:g}; unless it shows as much tissue as they do, give --mpp (um per pixel)')
    batch_size = test['batch_size'] or windows_at_once(device)
    precision = MixedPrecision(device, test['amp'], testing=True)

    def scaled(pixels):
        return scale_for_network(pixels, scale, factor, side, test)

    @torch.inference_mode()
    def predict(windows, shape):
        """Probabilities (n, H, W, classes) of n windows, uint8 (h, w, 3), zero-padded after normalisation."""
        inputs = [transform([Image.fromarray(window)])[0] for window in windows]
        inputs = torch.stack([zero_pad(x, shape) for x in inputs])
        with precision.autocast():
            logits = model(inputs.to(device))
        return torch.softmax(logits.float(), dim=1).permute(0, 2, 3, 1).cpu().numpy()

    if test['patch_size']:
        yield from predict_in_bands(predict, scaled(image), test['patch_size'], test['overlap'], test['tta'],
                                    opt.model['out_c'], batch_size)
    else:
        def whole(oriented):
            oriented = scaled(oriented)
            return predict([oriented], oriented.shape[:2])[0]
        yield predict_probabilities(whole, image, test['tta'])


def scale_for_network(image, scale, factor, side, test):
    """Resize an image, uint8 (H, W, 3), to the size at which the network sees it.

    scale: the transform of that name, or None. Without --mpp it makes the shorter side of any image `scale` pixels, as
    published. With --mpp, `factor` gives the image the pixel size of the training images, which were then shrunk from
    a shorter side of `side` pixels to `scale`. test: the group `test` of options.py.
    """
    if scale and not test['mpp']:
        return np.asarray(Scale(scale)([Image.fromarray(image)], None)[0])
    return resize_by(image, factor * scale / side if scale else factor, test['max_megapixels'])


def segment_bands(bands, image_shape, post, scale_factor=1):
    """Post-process the bands of an image's probability maps.

    bands: iterable of float32 (rows, W', classes). image_shape: (H, W). post: the group `post` of options.py. Its
    radius is divided by scale_factor: the contour is that much thinner in the image than in what the network saw.
    Returns the instances, int32 (H, W), and the inside and contour probabilities, uint8 (H', W'), 255 = 1.
    """
    masks, inside, contour = [], [], []
    for band in bands:
        masks.append(inside_mask(band, post['inside_threshold']))
        inside.append(np.round(band[..., 1] * 255).astype(np.uint8))
        contour.append(np.round(band[..., 2] * 255).astype(np.uint8))
        del band                                                     # free its memory before the next one
    masks, inside, contour = map(np.concatenate, (masks, inside, contour))
    radius = round(post['radius'] / scale_factor)
    instances = post_process(masks, post['min_area'], radius, image_shape, post['h_maxima'], inside)
    return instances, inside, contour


# ---------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------

class Scores(NamedTuple):
    """The scores of one image."""
    published: list         # in the order of METRICS
    standard: dict          # of `standard_metrics`
    table: OverlapTable     # without its maps


def score(instances, truth, dataset):
    """The Scores of one image. instances, truth: int (H, W), 0 = background. dataset: chooses the published metrics."""
    pixel_acc = accuracy_pixel_level(instances[None] > 0, truth[None] > 0)[0]
    table = overlap_table(instances, truth)
    object_level = nuclei_scores_of(table) if dataset == 'MultiOrgan' else gland_scores_of(table)
    return Scores([float(pixel_acc), *map(float, object_level)], standard_metrics_of(table),
                  table._replace(pred_map=None, gt_map=None))


if __name__ == '__main__':
    run_script(main)
