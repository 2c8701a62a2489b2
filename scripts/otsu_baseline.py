"""Score Otsu's threshold on a folder of labelled nuclei images: the number that a trained network has to beat.

    python scripts/otsu_baseline.py --img-dir DEMO/normalized --label-dir DEMO/labels_instance

Dark pixels go through the same post-processing and the same (published) metrics as the network's output in test.py.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.images import find_labels, list_images, read_image, read_instance_label  # noqa: E402
from support.script import InputError, Parser, run_script  # noqa: E402
from utils import nuclei_accuracy_object_level, post_process  # noqa: E402


def otsu_label(image, min_area=20, radius=2, channel='grey'):
    """Instance label, int32 (H, W), of the parts of an RGB image (H, W, 3) uint8 darker than Otsu's threshold.

    min_area, radius: pixels, see `post_process`. channel: 'grey', or 'hematoxylin' after colour deconvolution.
    """
    grey = -rgb2hed(image)[..., 0] if channel == 'hematoxylin' else np.array(Image.fromarray(image).convert('L'))
    dark = (grey <= threshold_otsu(grey)) & (grey < grey.max())          # an image of one grey value has no nuclei
    return post_process(dark, min_area, radius)


def otsu_scores(images, label_dir, min_area=20, radius=2, channel='grey'):
    """{image name: (AJI, Dice, F1)} of Otsu's threshold on image files; their mean has the name 'Average'."""
    scores = {}
    for path, label in zip(images, find_labels(images, label_dir)):
        image = read_image(path)
        truth = read_instance_label(label, image.shape[:2])
        result = nuclei_accuracy_object_level(otsu_label(image, min_area, radius, channel), truth)
        scores[path.stem] = (result.AJI, result.dice, result.F1)
    return {**scores, 'Average': tuple(np.mean(list(scores.values()), axis=0))}


def main(argv=None):
    parser = Parser(prog='scripts/otsu_baseline.py',
                    description="Score Otsu's threshold on a folder of labelled nuclei images.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--img-dir', required=True, help='folder of RGB images')
    parser.add_argument('--label-dir', required=True, help='instance labels, {name}.png or {name}_label.png')
    parser.add_argument('--min-area', type=int, default=20, help='smaller components are removed, pixels')
    parser.add_argument('--radius', type=int, default=2, help='dilation of each object, pixels')
    parser.add_argument('--channel', choices=('grey', 'hematoxylin'), default='grey', help='what is thresholded')
    args = parser.parse_args(argv)
    for name in ('min_area', 'radius'):
        if getattr(args, name) < 0:
            raise InputError(f'--{name.replace("_", "-")} is {getattr(args, name)}; expected 0 or more')

    print('name\tAJI\tDice\tF1')
    images = list_images(args.img_dir)
    for name, scores in otsu_scores(images, args.label_dir, args.min_area, args.radius, args.channel).items():
        print('\t'.join([name, *(f'{score:.4f}' for score in scores)]))


if __name__ == '__main__':
    run_script(main)
