"""What the post-processing leaves on the table: scores of its variants on the probability maps that test.py stored.

    python scripts/study_post_processing.py RESULTS --set val_full --label-dir LABELS

RESULTS: save_dir of test.py with probability maps, without --scale-factor and --mpp. LABELS: the instance labels of the
images.

Writes RESULTS/{set}_post_processing.txt. The first row is the published way: class 1 where it is the most likely one,
components under min_area removed, each dilated by radius. Then one change at a time, and what a greedy search over all
of them finds. It chooses by the mean of the first column over the same images that it is reported on, so that its gain
is optimistic. In the last row each image is scored with what the search found on the others: that gain is closer to
what new images get, as far as these images did not choose the weights too. Columns, means over images: for nuclei
published AJI, MoNuSeg's aji, pq, dice; for glands published Dice, F1 and Hausdorff, pq.

The classes come from two 8-bit maps: background is what inside and contour leave of 255, exact up to rounding.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from options import Options
from support.files import write_text
from support.images import decode, find_labels, open_image, read_instance_label
from support.objects import overlap_table
from support.results import refuse_mixed_results
from support.script import InputError, Parser, run_script
from utils import gland_scores_of, post_process, remove_small_components, standard_metrics_of

# What may change, and the values that are tried; 0 is off, except for min_area and radius.
NUCLEI = {
    'min_area': (0, 10, 20, 40, 80),             # pixels of the maps
    'radius': (0, 1, 2, 3),                      # pixels
    'inside_threshold': (0, 0.3, 0.4, 0.5, 0.6, 0.7),        # probability, instead of the most likely class
    'fill_holes': (0, 20, 50, 100, 1000),        # pixels: largest hole that is filled; no option of test.py
    'h_maxima': (0, 0.05, 0.1, 0.2, 0.3, 0.4),   # probability: maxima that stand out by this split an object
}
CHOICES = {'MultiOrgan': NUCLEI, 'GlaS': {**NUCLEI, 'min_area': (0, 50, 100, 200, 400), 'radius': (0, 2, 3, 4, 5, 6)}}
METRICS = {'MultiOrgan': ('published_AJI', 'aji', 'pq', 'dice'),
           'GlaS': ('published_Dice', 'published_F1', 'published_Hausdorff', 'pq')}


def segment_maps(inside, contour, choice, original_size=None):
    """Instance label, int32 (H0, W0), of two probability maps, uint8 (H, W), 255 = 1, by a choice of each in NUCLEI.

    original_size: (H0, W0), by default that of the maps.
    """
    if choice['inside_threshold']:
        mask = inside >= choice['inside_threshold'] * 255
    else:                                               # above background, 255 - inside - contour, not below contour
        mask = (2 * inside.astype(int) + contour > 255) & (inside >= contour)
    if choice['fill_holes']:
        mask = ~remove_small_components(~mask, choice['fill_holes'] + 1)
    return post_process(mask, choice['min_area'], choice['radius'], original_size, choice['h_maxima'], inside)


def score(label, truth, dataset):
    """Values of METRICS."""
    table = overlap_table(label, truth)
    standard = standard_metrics_of(table)
    if dataset == 'GlaS':
        glands = gland_scores_of(table)
        return [glands.dice, glands.F1, glands.hausdorff, standard['pq']]
    return [standard[name] for name in ('aji_fullnet', 'aji', 'pq', 'dice')]


class Study:
    """Scores of variants on images. images: {name: (inside, contour, truth)}. Nothing is computed twice."""

    def __init__(self, images, dataset):
        self.images, self.dataset, self.known = images, dataset, {}
        self.progress = tqdm(desc='variants', disable=None)

    def __call__(self, choice):
        """float (images, METRICS)."""
        key = tuple(choice.values())
        if key not in self.known:
            self.known[key] = np.array([score(segment_maps(inside, contour, choice, truth.shape), truth, self.dataset)
                                        for inside, contour, truth in self.images.values()])
            self.progress.update()
        return self.known[key]

    def greedy(self, start, left_out=None):
        """Change one choice at a time, that which gains most in the mean of the first metric, until none gains.

        left_out: number of an image that does not count.
        """
        def mean(choice):
            return np.delete(self(choice)[:, 0], [] if left_out is None else left_out).mean()
        best = start
        while True:
            steps = ({**best, name: value} for name, values in CHOICES[self.dataset].items() for value in values)
            step = max(steps, key=mean)
            if not mean(step) > mean(best):
                return best
            best = step


def read_options(path):
    """(data set, binary_labels) of a test_options.json. Raises InputError if the images were scaled for the network."""
    try:
        options = json.loads(path.read_text(encoding='utf-8'))
        test, dataset = options['test'], options['dataset']
        scaled, binary_labels = test['scale_factor'] != 1 or test['mpp'], test['binary_labels']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path} is missing or damaged ({error!r}); expected the save_dir of test.py') from error
    if scaled:
        raise InputError(f'{path.parent} was made with --scale-factor or --mpp; run test.py without them')
    return dataset, binary_labels


def read_maps(results, set_name, label_dir, dataset, binary_labels=False):
    """{name: (inside, contour, truth)} of all images of a set: maps, uint8 (H, W), and instance labels."""
    folder = results / f'{set_name}_prob_maps'
    insides = sorted(folder.glob('*_prob_inside.png'))
    if not insides:
        raise InputError(f'no *_prob_inside.png in {folder}; run test.py first, with --save-flag True')
    names = [path.name.removesuffix('_prob_inside.png') for path in insides]
    refuse_mixed_results(results, {set_name: names})
    images = {}
    for name, label in zip(names, find_labels([folder / f'{name}.png' for name in names], label_dir)):
        paths = [folder / f'{name}_prob_{kind}.png' for kind in ('inside', 'contour')]
        inside, contour = (decode(open_image(path, math.inf), path) for path in paths)
        truth = read_instance_label(label, binary_labels=binary_labels)
        if inside.shape != truth.shape and dataset != 'GlaS':
            raise InputError(f'{label} has shape {truth.shape}, and the probability maps of {name} in {folder} have '
                             f'shape {inside.shape}; expected the same')
        images[name] = inside, contour, truth
    return images


def name_of(choice, published):
    """What differs from the published choice, as words."""
    return ' '.join(f'{key} {value:g}' for key, value in choice.items() if value != published[key])


def table_text(rows, images, metrics):
    """rows: [(name, scores (images, metrics))], the first one the published. metrics: names."""
    width = max(len(name) for name, _ in rows) + 2
    columns = [max(len(name) + 2, 9) for name in metrics]
    lines = [f'{"":{width}}' + f'{"mean over images":^{sum(columns) + 9}}  {metrics[0]} of each image',
             f'{"":{width}}' + f'{metrics[0]:>{columns[0]}}{"gain":>9}'
             + ''.join(f'{name:>{n}}' for name, n in zip(metrics[1:], columns[1:]))
             + '  ' + ' '.join(f'{name[:16]:>6}' for name in images)]
    base = rows[0][1][:, 0].mean()
    for name, scores in rows:
        mean = scores.mean(axis=0)
        of_images = ' '.join(f'{v:{max(6, min(16, len(image)))}.4f}' for v, image in zip(scores[:, 0], images))
        lines.append(f'{name:{width}}{mean[0]:{columns[0]}.4f}{mean[0] - base:+9.4f}'
                     + ''.join(f'{v:{n}.4f}' for v, n in zip(mean[1:], columns[1:])) + '  ' + of_images)
    return '\n'.join(lines) + '\n'


def main(argv=None):
    parser = Parser(prog='scripts/study_post_processing.py', description='Scores of variants of the post-processing.')
    parser.add_argument('results', metavar='RESULTS', type=Path, help='save_dir of test.py')
    parser.add_argument('--label-dir', required=True, help='instance labels of the images')
    parser.add_argument('--set', required=True, help='name of the set: RESULTS has {set}_prob_maps')
    args = parser.parse_args(argv)
    dataset, binary_labels = read_options(args.results / 'test_options.json')
    post = Options(isTrain=False).parse(['--dataset', dataset]).post
    published = {name: post.get(name, 0) for name in NUCLEI}
    study = Study(read_maps(args.results, args.set, args.label_dir, dataset, binary_labels), dataset)

    rows = [('published: ' + ' '.join(f'{name} {post[name]}' for name in ('min_area', 'radius')), published)]
    for name, values in CHOICES[dataset].items():
        rows += [(name_of(choice, published), choice) for choice in ({**published, name: value} for value in values)
                 if choice != published]
    best = study.greedy(published)
    rows.append((f'greedy search: {name_of(best, published) or "as published"}', best))
    rows = [(name, study(choice)) for name, choice in rows]
    if len(study.images) > 1:
        scores = [study(study.greedy(published, left_out=i))[i] for i in range(len(study.images))]
        rows.append(('greedy search on the other images', np.stack(scores)))
    text = table_text(rows, study.images, METRICS[dataset])
    out = args.results / f'{args.set}_post_processing.txt'
    write_text(out, text)
    print(text, end='')
    print(f'{len(study.images)} images, {len(study.known)} variants; table in {out}')


if __name__ == '__main__':
    run_script(main)
