"""Check the weights that come with the code: the file, what it finds in two images, and its scores.

    python scripts/verify_pretrained.py [DATA_DIR] [--tta none] [--weights FILE.pth.tar]
    python scripts/verify_pretrained.py --write

Beside the weights, by default all in pretrained/, lie FILE.md, a model card with their SHA-256, and FILE.json, with the
number of objects and the mean probabilities in two images: the immunohistochemistry picture of scikit-image (real
tissue, 512 x 512, part of the package: nothing is downloaded), recoloured as H&E, with --color-norm True; and a
synthetic one. Numbers of objects may differ by 5 %, mean probabilities by 0.01. With DATA_DIR, a folder prepared by
prepare_data.py, the weights that were trained on it are scored anew on its val images; the mean AJI (of glands Dice)
may differ by 0.005 from that in the weights. --tta chooses which of the scores in the weights; full takes 8 times as
long as none. A line for each check; exit code 0: all pass, 1: some fail, 2: they cannot be made.

--write: for whoever made new weights; writes FILE.json, the facts that the weights carry into FILE.md, and the objects
found in the tissue, FILE.jpg.
"""
import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from skimage import color, img_as_ubyte
from skimage.data import immunohistochemistry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test as test_script
from scripts.make_demo_data import make_gland_image, make_image
from support.checkpoints import load_checkpoint, load_mean_std
from support.files import save_image, sha256_of, write_text
from support.pictures import draw_overlay
from support.script import InputError, Parser, run_script

OBJECTS, PROBABILITY, SCORE = 0.05, 0.01, 0.005                          # allowed differences; the first is relative
BEGIN, END = ('<!-- written by scripts/verify_pretrained.py --write: do not edit from here -->', '<!-- to here -->')
COLUMNS = {                                                              # of the card; the first is computed anew
    'MultiOrgan': {'published_AJI': 'AJI', 'published_Dice': 'Dice', 'published_F1': 'F1', 'aji': 'aji',
                   'aji_plus': 'aji_plus', 'pq': 'pq', 'f1': 'f1 (IoU > 0.5)', 'dice': 'dice (pixels)'},
    'GlaS': {'published_Dice': 'Dice', 'published_F1': 'F1', 'published_IoU': 'IoU', 'published_Hausdorff': 'Hausdorff',
             'pq': 'pq', 'f1': 'f1 (IoU > 0.5)', 'dice': 'dice (pixels)'},
}
SETTINGS = ('input_size', 'batch_size', 'lr', 'lr_schedule', 'warmup_epochs', 'ema_decay', 'clip_grad', 'amp')


def test_images(dataset):
    """{name: (image, uint8 (H, W, 3), options of test.py)}: real tissue and a synthetic one."""
    rng = np.random.default_rng([0, 2, 0])
    return {'tissue': (as_h_and_e(immunohistochemistry()), ['--color-norm', 'True']),
            'demo': (make_gland_image(rng, 400) if dataset == 'GlaS' else make_image(rng, 256)[0], [])}


def as_h_and_e(image):
    """An image of hematoxylin and DAB, uint8 (H, W, 3), with eosin in place of the DAB, half as dense."""
    hematoxylin, _, dab = np.moveaxis(color.rgb2hed(image), 2, 0)
    return img_as_ubyte(color.hed2rgb(np.stack([hematoxylin, dab / 2, np.zeros_like(dab)], axis=2)))


def measure(weights, picture=None):
    """{image: {objects, mean_inside, mean_contour}} of `test_images`: what the weights find there, without TTA.

    picture: file for the tissue with what was found.
    """
    found = {}
    for name, (image, options) in test_images(load_checkpoint(weights)['options']['dataset']).items():
        label, probabilities = test_script.segment(image, weights, '--tta', 'none', *options)
        if picture and name == 'tissue':
            save_image(picture, draw_overlay(image, label))
        found[name] = {'objects': int((np.bincount(label.ravel())[1:] > 0).sum()),
                       'mean_inside': round(float(probabilities[..., 1].mean()), 5),
                       'mean_contour': round(float(probabilities[..., 2].mean()), 5)}
    return found


def val_scores(weights, data_dir, stored):
    """Means of test.py's scores on the val images of a prepared folder, with the options of the stored scores."""
    options = {**stored['test'], **stored['post']}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        test_script.main(['--model-path', str(weights), '--img-dir', str(data_dir / 'images' / stored['set']),
                          '--label-dir', str(data_dir / 'labels_instance' / stored['set']), '--save-dir', folder,
                          '--save-flag', 'False',
                          *(word for name, value in options.items()
                            for word in (f'--{name.replace("_", "-")}', str(value)))])
        return json.loads((Path(folder) / f'{stored["set"]}_metrics.json').read_text(encoding='utf-8'))['mean']


# Checks

class Checks:
    """Prints a line for each check, and counts those that fail."""

    def __init__(self):
        self.failed = 0

    def __call__(self, passed, text):
        self.failed += not passed
        print(f'{"pass" if passed else "FAIL"}  {text}', flush=True)


def beside(weights, ending):
    """The path of a file that belongs to a file of weights."""
    return weights.with_name(weights.name.removesuffix('.pth.tar') + ending)


def check_hash(check, weights):
    card = beside(weights, '.md')
    known = re.search(r'SHA-256\W+([0-9a-f]{64})', card.read_text(encoding='utf-8')) if card.is_file() else None
    if known is None:
        raise InputError(f'no SHA-256 in {card}; take the file that belongs to {weights}, or make it anew with '
                         f'python scripts/verify_pretrained.py --write')
    found = sha256_of(weights)
    check(found == known[1], f'SHA-256 of {weights}: {found}'
          + ('' if found == known[1] else f', expected {known[1]}; copy the file again'))


def check_images(check, weights):
    expected_path = beside(weights, '.json')
    if not expected_path.is_file():
        raise InputError(f'no {expected_path}; take the file that belongs to {weights}')
    expected = json.loads(expected_path.read_text(encoding='utf-8'))
    for name, values in measure(weights).items():
        for quantity, value in values.items():
            known = expected.get(name, {}).get(quantity)
            if known is None:
                raise InputError(f'{expected_path} does not say what is expected of {name}; take the file that '
                                 f'belongs to {weights}')
            allowed = OBJECTS * known if quantity == 'objects' else PROBABILITY
            check(abs(value - known) <= allowed, f'{name}: {quantity.replace("_", " ")} {value:g}, expected {known:g} '
                                                 f'+- {allowed:.3g}')


def check_scores(check, weights, data_dir, tta):
    checkpoint = load_checkpoint(weights)
    metric, title = next(iter(COLUMNS[checkpoint['options']['dataset']].items()))
    stored = [scores for scores in checkpoint.get('scores', []) if scores['test']['tta'] == tta]
    if not stored:
        raise InputError(f'{weights} carries no scores with --tta {tta}; choose another --tta')
    for scores in stored:
        found, known = (means[metric] for means in (val_scores(weights, data_dir, scores), scores['mean']))
        check(abs(found - known) <= SCORE, f'{scores["set"]} of {data_dir}, TTA {tta}: {title} {found:.4f}, expected '
                                           f'{known:.4f} +- {SCORE}')


# The model card

def card_section(weights, found):
    """The part of the model card that is made of the weights' own contents, as Markdown. found: of `measure`."""
    shipped = load_checkpoint(weights)
    parameters = sum(value.numel() for key, value in shipped['state_dict'].items()
                     if not key.endswith(('running_mean', 'running_var', 'num_batches_tracked')))
    crops = shipped.get('batch_norm_crops', 0)
    lines = [BEGIN, '', '| | |', '|---|---|',
             f'| file | `{weights.name}`, {weights.stat().st_size / 1e6:.1f} MB |',
             f'| SHA-256 | `{sha256_of(weights)}` |',
             f'| network | {shipped["options"]["model"]["name"]}, {parameters:,} parameters, float32 |',
             f'| training | {shipped["hours"]:.1f} hours, {shipped["steps"]:,} steps |',
             '| batch-norm statistics | ' + (f'of {crops} training crops without augmentation |' if crops else
                                             'of the training |'),
             f'| code | commit {shipped["commit"]} |',
             f'| packages | {", ".join(f"{name} {version}" for name, version in shipped["packages"].items())} |',
             f'| data (SHA-256 of the hashes of all its files) | `{shipped["data_sha256"]}` |', '',
             '| stage | epochs | steps | hours | ' + ' | '.join(SETTINGS) + ' |', '|---' * (4 + len(SETTINGS)) + '|']
    for number, stage in enumerate(shipped['stages'], start=1):
        lines.append(f'| {number} | {stage["epochs"]} | {stage["steps"]:,} | {stage["hours"]:.1f} | '
                     + ' | '.join(f'{stage["train"][name]}' for name in SETTINGS) + ' |')
    columns = COLUMNS[shipped['options']['dataset']]
    for scores in shipped['scores']:
        post = ', '.join(f'{name} {value}' for name, value in scores['post'].items())
        lines += ['', f'Scores on `{scores["set"]}`, by which the weights were chosen; TTA {scores["test"]["tta"]}'
                      + ', --amp True' * scores['test']['amp'] + f'; {post}:', '',
                  f'| image | {" | ".join(columns.values())} |', '|---' * (1 + len(columns)) + '|']
        for name, row in {**scores['images'], 'mean': scores['mean']}.items():
            lines.append(f'| {name} | ' + ' | '.join('' if row[key] is None else f'{row[key]:.4f}' for key in columns)
                         + ' |')
    lines += ['', 'Found without TTA in the images of `verify_pretrained.sh`:', '',
              '| image | objects | mean inside probability | mean contour probability |', '|---|---|---|---|']
    lines += [f'| {name} | {values["objects"]} | {values["mean_inside"]:.4f} | {values["mean_contour"]:.4f} |'
              for name, values in found.items()]
    return '\n'.join([*lines, '', END])


def with_section(card, section):
    """The text of a card with its section replaced, or, if it has none, at the end."""
    if BEGIN not in card or END not in card:
        return f'{card.rstrip()}\n\n{section}\n'.lstrip()
    return card[:card.index(BEGIN)] + section + card[card.index(END) + len(END):]


def write_expected(weights):
    card, expected, picture = (beside(weights, ending) for ending in ('.md', '.json', '.jpg'))
    found = measure(weights, picture)
    section = card_section(weights, found)
    write_text(expected, json.dumps(found, indent=1) + '\n')
    write_text(card, with_section(card.read_text(encoding='utf-8') if card.is_file() else '', section))
    print(f'wrote {expected}, {picture.name} and the facts in {card}')


def main(argv=None):
    parser = Parser(prog='scripts/verify_pretrained.py', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data_dir', type=Path, nargs='?', help='prepared data, to compute the val scores anew')
    parser.add_argument('--tta', default='none', choices=('none', 'flips', 'full'), help='which of the stored scores')
    parser.add_argument('--weights', type=Path, help='by default all that come with the code')
    parser.add_argument('--write', action='store_true', help='write what lies beside the weights')
    args = parser.parse_args(argv)
    files = [args.weights] if args.weights else sorted(test_script.PRETRAINED.glob('*.pth.tar'))
    if not files:
        raise InputError(f'no *.pth.tar in {test_script.PRETRAINED}; name one with --weights')
    mean_stds = {}
    for weights in files:
        checkpoint = load_checkpoint(weights)
        if 'stages' not in checkpoint:
            raise InputError(f'{weights} does not say how it was made; make it with scripts/export_pretrained.py')
        mean_stds[weights] = checkpoint['mean_std']
    if args.write:
        for weights in files:
            write_expected(weights)
        return
    check, scored = Checks(), []
    if args.data_dir:
        mean_std = load_mean_std(args.data_dir / 'mean_std.npy')
        scored = [weights for weights, known in mean_stds.items() if np.abs(np.array(known) - mean_std).max() < 1e-3]
        if not scored:
            raise InputError(f'no weights were trained on {args.data_dir}: mean_std.npy is another one than that of '
                             f'{", ".join(map(str, files))}')
    for weights in files:
        check_hash(check, weights)
        check_images(check, weights)
        if weights in scored:
            check_scores(check, weights, args.data_dir, args.tta)
    if check.failed:
        print(f'{check.failed} checks failed')
        sys.exit(1)
    print('all checks pass' if args.data_dir else 'all checks pass; with a prepared data folder the scores are checked '
                                                  'too: sh scripts/verify_pretrained.sh DATA_DIR')


if __name__ == '__main__':
    run_script(main)
