"""Segment images with a trained network, and score the result: `python test.py`; an empty label_dir means no scores."""
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset import check_mean_std, find_labels, list_images, load_mean_std, read_image, read_instance_label
from my_transforms import get_transforms
from options import Options
from utils import (AverageMeter, InputError, accuracy_pixel_level, build_model, choose_device,
                   gland_accuracy_object_level, load_checkpoint, load_weights, nuclei_accuracy_object_level,
                   post_process, predict_probabilities, run_script, save_image, save_instances, split_forward,
                   write_text)

METRICS = {
    'MultiOrgan': ('pixel_acc', 'recall', 'precision', 'F1', 'Dice', 'IoU', 'Hausdorff', 'AJI'),
    'GlaS': ('pixel_acc', 'recall', 'precision', 'F1', 'Dice', 'IoU', 'Hausdorff'),
}
# mean and standard deviation of the published data sets, for a published checkpoint without its mean_std.npy
PUBLISHED_MEAN_STD = {
    'MultiOrgan': [[0.74408994, 0.53806349, 0.66497889], [0.15811703, 0.19705941, 0.15046222]],
    'GlaS': [[0.78780321, 0.5120167, 0.78493782], [0.16766301, 0.24838048, 0.13225162]],
}


def main(argv=None):
    # 1. options, network
    opt = Options(isTrain=False).parse(argv)
    test = opt.test
    device = choose_device(test['gpu'])
    checkpoint = load_checkpoint(test['model_path'])
    take_model_of_checkpoint(opt, checkpoint)
    model = build_model(opt.model)
    load_weights(model, checkpoint['state_dict'], opt.model, test['model_path'])
    model.to(device).eval()
    predict = make_predictor(model, opt, find_mean_std(opt, checkpoint), device)

    # 2. images and labels
    images = list_images(test['img_dir'])
    labels = [None] * len(images)
    if test['label_dir']:
        labels = find_labels(images, test['label_dir'], hint="; for images without labels give --label-dir ''")
    save_dir, set_name = Path(test['save_dir']), Path(test['img_dir']).resolve().name
    opt.save(save_dir)

    # 3. every image: probabilities, instances, scores
    results = {}
    for path, label_path in zip(tqdm(images, desc=set_name, disable=None), labels):
        image = read_image(path, test['max_megapixels'], test['scale_16bit'])
        label = None
        if label_path is not None:
            label = read_instance_label(label_path, image.shape[:2], test['binary_labels'])
        probabilities = predict_probabilities(predict, image, test['tta'])
        segmentation = post_process(probabilities.argmax(axis=2) == 1, opt.post['min_area'], opt.post['radius'],
                                    original_size=image.shape[:2])
        if label is not None:
            results[path.stem] = score(segmentation, label, opt.dataset)
        if test['save_flag']:
            save_results(save_dir, set_name, path.stem, probabilities, segmentation)

    # 4. table of results
    if results:
        table = results_table(results, METRICS[opt.dataset])
        write_text(save_dir / f'{set_name}_test_result.txt', table)
        print(table, end='')
    print(f'{len(images)} images; results in {save_dir}')


# ---------------------------------------------------------------------------------------------------
# Network and its input
# ---------------------------------------------------------------------------------------------------

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


def find_mean_std(opt, checkpoint):
    """mean_std, float64 (2, 3): the checkpoint's; a published one has none, so data_dir's file or published values."""
    if 'mean_std' in checkpoint:
        return check_mean_std(np.array(checkpoint['mean_std']), opt.test['model_path'])
    path = Path(opt.test['data_dir']) / 'mean_std.npy'
    if path.exists():
        return load_mean_std(path)
    warnings.warn(f'{opt.test["model_path"]} carries no mean_std and there is no {path}; '
                  f'taking the published values of {opt.dataset}', stacklevel=2)
    return np.array(PUBLISHED_MEAN_STD[opt.dataset])


def make_predictor(model, opt, mean_std, device):
    """A function from an RGB image, uint8 (H, W, 3), to probability maps, float32 (H', W', classes)."""
    params = dict(opt.transform['test'])
    if params.pop('normalize', False):
        params['normalize'] = mean_std
    transform = get_transforms(params)
    patch_size, overlap = opt.test['patch_size'], opt.test['overlap']

    @torch.inference_mode()
    def predict(image):
        input = transform([Image.fromarray(image)])[0][None].to(device)
        if patch_size:
            logits = split_forward(model, input, patch_size, overlap, opt.model['out_c'])
        else:
            logits = model(input)
        return torch.softmax(logits, dim=1)[0].permute(1, 2, 0).cpu().numpy()

    return predict


# ---------------------------------------------------------------------------------------------------
# Scores and files
# ---------------------------------------------------------------------------------------------------

def score(segmentation, label, dataset):
    """The values of METRICS[dataset] for one image: pixel accuracy of the foreground, then the object-level scores."""
    pixel_acc = accuracy_pixel_level(segmentation[None] > 0, label[None] > 0)[0]
    object_level = nuclei_accuracy_object_level if dataset == 'MultiOrgan' else gland_accuracy_object_level
    return [pixel_acc, *object_level(segmentation, label)]


def results_table(results, columns):
    """The published result file: means first, then every image by name; tab-separated, 4 decimals."""
    meter = AverageMeter(len(columns))
    for values in results.values():
        meter.update(values, 1)
    rows = [('Metrics:', columns), ('Average:', [f'{v:.4f}' for v in meter.avg]), None]
    rows += [(f'{name}:', [f'{v:.4f}' for v in results[name]]) for name in sorted(results)]
    return '\n'.join('\t'.join([row[0], *row[1]]) if row else '' for row in rows) + '\n'


def save_results(save_dir, set_name, name, probabilities, segmentation):
    """Probability maps (8-bit, 255 = probability 1), instance ids as TIFF, and a coloured picture of them."""
    for channel, kind in ((1, 'inside'), (2, 'contour')):
        path = save_dir / f'{set_name}_prob_maps' / f'{name}_prob_{kind}.png'
        save_image(path, np.round(probabilities[..., channel] * 255).astype(np.uint8))
    folder = save_dir / f'{set_name}_segmentation'
    save_instances(folder / f'{name}_seg.tiff', segmentation)
    save_image(folder / f'{name}_seg_colored.png', colour_instances(segmentation))


def colour_instances(label):
    """RGB picture, uint8 (H, W, 3), of an instance label: the same colour for the same id, black background."""
    ids = np.arange(1, label.max(initial=0) + 1)
    hue = ids * 0.618034 % 1                                   # the golden ratio spreads neighbouring ids
    value = 0.6 + 0.4 * (ids * 0.381966 % 1)
    phase = (hue[:, None] + np.array([1, 2 / 3, 1 / 3])) % 1
    colours = value[:, None] * (1 - 0.8 * np.clip(2 - np.abs(phase * 6 - 3), 0, 1))
    palette = np.concatenate([np.zeros((1, 3)), colours * 255]).astype(np.uint8)
    return palette[label]


if __name__ == '__main__':
    run_script(main)
