"""How weights cope with colours that they have not seen: scores of the whole val images in other colours.

    python scripts/score_colours.py DATA_DIR OUT [--raw TIFFS] [options of test.py, such as --tta none]

DATA_DIR: prepared MultiOrgan data. Its images val_full are scored as they are, pale, dark, and with their hues turned
to red and to blue. TIFFS: a folder of images as MoNuSeg distributes them; those of val_full are scored without and with
--color-norm True. OUT: where images and results go; finished images are not computed again. Prints a table, and writes
it to OUT/colours.txt, row by row: the last one needs weights that carry the colours of their training images.
"""
import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
from skimage import color

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test
from support.files import save_image, write_text
from support.images import list_images, read_image
from support.script import InputError, Parser, run_script


def turn_hue(rgb, degrees):
    """Turn the hues of an image, float (H, W, 3) in [0, 1]."""
    hsv = color.rgb2hsv(rgb)
    hsv[..., 0] = (hsv[..., 0] + degrees / 360) % 1
    return color.hsv2rgb(hsv)


COLOURS = {                                       # of images, float (H, W, 3) in [0, 1]
    'pale': lambda rgb: (1 + rgb) / 2,
    'dark': lambda rgb: rgb ** 1.7,
    'red': lambda rgb: turn_hue(rgb, 18),
    'blue': lambda rgb: turn_hue(rgb, -18),
}
METRICS = ('published_AJI', 'aji', 'pq', 'dice')


def write_versions(data_dir, raw, out):
    """Write the images in all colours. Returns {name: (folder of images, options of test.py)}."""
    images = list_images(data_dir / 'images/val_full')
    versions = {'as they are': (data_dir / 'images/val_full', [])}
    for name, change in COLOURS.items():
        for path in images:
            save_image(out / 'images' / name / f'{path.stem}.png',
                       (change(read_image(path) / 255) * 255).round().astype(np.uint8))
        versions[name] = out / 'images' / name, []
    if raw:
        tiffs = list_images(raw)
        found = [(path.stem, tiff) for path in images for tiff in tiffs if path.stem.endswith(tiff.stem)]
        if not found:                             # the prepared names begin with the organ
            raise InputError(f'{raw} has none of the images {", ".join(path.stem for path in images)}')
        for name, tiff in found:
            save_image(out / 'images/raw' / f'{name}.png', read_image(tiff))
        versions['raw'] = out / 'images/raw', []
        versions['raw, --color-norm True'] = out / 'images/raw', ['--color-norm', 'True']
    ours = {path.stem for path in images}
    others = [path for folder, _ in versions.values() for path in list_images(folder) if path.stem not in ours]
    if others:                                    # of an earlier call with other data, for example
        raise InputError(f'{others[0]} is none of the images of {data_dir}; give another OUT')
    return versions


def main(argv=None):
    parser = Parser(prog='scripts/score_colours.py', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data_dir', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--raw', type=Path, help='folder of images as MoNuSeg distributes them')
    args, words = parser.parse_known_args(argv)
    lines = [f'{"":24}' + ''.join(f'{name:>15}' for name in METRICS) + '  published AJI of each image']
    for i, (name, (folder, own_words)) in enumerate(write_versions(args.data_dir, args.raw, args.out).items()):
        results = args.out / f'results_{i}'
        with contextlib.redirect_stdout(io.StringIO()):
            test.main(['--dataset', 'MultiOrgan', *words, *own_words, '--img-dir', str(folder), '--label-dir',
                       str(args.data_dir / 'labels_instance/val_full'), '--save-dir', str(results)])
        scores = json.loads((results / f'{folder.name}_metrics.json').read_text())
        images = [f'  {image.split("_")[0]} {row["published_AJI"]:.4f}' for image, row in scores['images'].items()]
        lines.append(f'{name:24}' + ''.join(f'{scores["mean"][metric]:15.4f}' for metric in METRICS) + ''.join(images))
        print('\n'.join(lines[-1:] if i else lines), flush=True)
        write_text(args.out / 'colours.txt', '\n'.join(lines) + '\n')


if __name__ == '__main__':
    run_script(main)
