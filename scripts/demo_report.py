"""The end of the demo: the network's scores beside Otsu's, and one picture of everything.

    python scripts/demo_report.py --data-dir DATA --result-dir RESULTS --out overview.png

DATA: as prepared by prepare_data.py. RESULTS: where test.py wrote for DATA/images/test_same.
"""
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from skimage.filters import threshold_otsu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from prepare_data import ternary_label
from support.files import atomic_path
from support.images import decode, find_labels, list_images, open_image, read_image, read_instance_label
from support.pictures import HIT, draw_contours
from support.script import InputError, Parser, run_script
from utils import nuclei_accuracy_object_level, post_process
from weight_map import weight_map


def network_scores(result_file):
    """{image name: {column: value}} of a `_test_result.txt` of test.py; the mean has the name 'Average'."""
    path = Path(result_file)
    if not path.is_file():
        raise InputError(f'no {path}; run test.py first')
    header, *rows = [line.split('\t') for line in path.read_text().splitlines() if line]
    return {row[0].rstrip(':'): dict(zip(header[1:], map(float, row[1:]))) for row in rows}


def otsu_label(image, min_area=20, radius=2):
    """Instance label, int32 (H, W), of the parts of an RGB image (H, W, 3) uint8 darker than Otsu's threshold.

    min_area, radius: pixels, see `post_process`.
    """
    grey = np.array(Image.fromarray(image).convert('L'))
    dark = (grey <= threshold_otsu(grey)) & (grey < grey.max())          # an image of one grey value has no nuclei
    return post_process(dark, min_area, radius)


def otsu_scores(images, label_dir):
    """{image name: (AJI, Dice, F1)} of Otsu's threshold on image files; their mean has the name 'Average'."""
    scores = {}
    for path, label in zip(images, find_labels(images, label_dir)):
        image = read_image(path)
        result = nuclei_accuracy_object_level(otsu_label(image), read_instance_label(label, image.shape[:2]))
        scores[path.stem] = (result.AJI, result.dice, result.F1)
    return {**scores, 'Average': tuple(np.mean(list(scores.values()), axis=0))}


def draw_overview(path, image, label, inside, contour, prediction, title):
    """One picture: image, ternary label, weight map, inside and contour probability, prediction over the image."""
    outlined = image.copy()
    draw_contours(outlined, prediction, HIT)
    panels = [('image', image, {}), ('ternary label', ternary_label(label), {}),
              ('weight map', weight_map(label) + 1, dict(cmap='magma', vmin=1, vmax=11)),
              ('probability of inside', inside, dict(cmap='gray', vmin=0, vmax=255)),
              ('probability of contour', contour, dict(cmap='gray', vmin=0, vmax=255)),
              ('prediction', outlined, {})]
    figure = Figure(figsize=(15, 10.4), layout='constrained')
    for axes, (name, pixels, options) in zip(figure.subplots(2, 3).flat, panels):
        axes.imshow(pixels, interpolation='nearest', **options)
        axes.set_title(name)
        axes.axis('off')
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)


def main(argv=None):
    parser = Parser(prog='scripts/demo_report.py',
                    description="The network's scores beside Otsu's, and one picture of everything.")
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--result-dir', required=True)
    parser.add_argument('--out', required=True)
    args = parser.parse_args(argv)
    images, labels = Path(args.data_dir) / 'images' / 'test_same', Path(args.data_dir) / 'labels_instance' / 'test'
    results = Path(args.result_dir)

    network = network_scores(results / 'test_same_test_result.txt')
    otsu = otsu_scores(list_images(images), labels)
    if otsu.keys() != network.keys():
        raise InputError(f'{results} has not the scores of the images in {images}; run test.py again')
    print(f'{"":20} {"Otsu":>24} {"network":>24}')
    print(f'{"image":20}' + f' {"AJI":>8}{"Dice":>8}{"F1":>8}' * 2)
    for name, scores in otsu.items():
        row = network[name]
        print(f'{name:20} ' + ''.join(f'{v:8.4f}' for v in scores) + ' '
              + ''.join(f'{row[column]:8.4f}' for column in ('AJI', 'Dice', 'F1')))
    print(f"AJI of the network {network['Average']['AJI']:.4f}, of Otsu's threshold {otsu['Average'][0]:.4f}, "
          f"difference {network['Average']['AJI'] - otsu['Average'][0]:+.4f}")

    name = list_images(images)[0].stem
    paths = [results / 'test_same_prob_maps' / f'{name}_prob_{kind}.png' for kind in ('inside', 'contour')]
    maps = [decode(open_image(path), path) for path in paths]
    draw_overview(args.out, read_image(images / f'{name}.png'), read_instance_label(labels / f'{name}.png'), *maps,
                  read_instance_label(results / 'test_same_segmentation' / f'{name}_seg.tiff'),
                  f"{name}: AJI {network[name]['AJI']:.3f}, Otsu's threshold {otsu[name][0]:.3f}")


if __name__ == '__main__':
    run_script(main)
