"""A miniature of the prepared data, for tests that run the scripts; what a shell script would run."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from prepare_data import compute_mean_std, save_mean_std, ternary_label
from support.files import save_image, save_instances
from weight_map import encode_weight_map, weight_map

# a network and a schedule that train within a second
SMALL = ['--n-layers', '4', '--growth-rate', '2', '--dilations', '1', '--input-size', '40', '--val-overlap', '8',
         '--batch-size', '2', '--epochs', '1', '--workers', '0', '--gpu', 'cpu']


def nuclei(seed, height=64, width=64):
    """A pink image, uint8 (H, W, 3), with dark blobs, and its instance label, int (H, W)."""
    rng = np.random.default_rng(seed)
    label, _ = ndimage.label(ndimage.gaussian_filter(rng.random((height, width)), 3) > 0.515)
    shade = np.where(label > 0, 90, 200)[..., None] + rng.normal(0, 12, (height, width, 3)) + [20, -20, 10]
    return np.clip(shade, 0, 255).astype(np.uint8), label


def make_multi_organ(folder, n_train=4, n_val=1, size=64):
    """A prepared MultiOrgan folder with both test sets."""
    for part, count in (('train', n_train), ('val', n_val), ('test_same', 2), ('test_diff', 1)):
        for i in range(count):
            image, label = nuclei([len(part), i], size, size)
            name = f'{part}_{i}'
            save_image(folder / 'images' / part / f'{name}.png', image)
            if part.startswith('test'):
                save_instances(folder / 'labels_instance' / 'test' / f'{name}.png', label)
            else:
                save_image(folder / 'labels' / part / f'{name}_label.png', ternary_label(label))
                save_image(folder / 'weight_maps' / part / f'{name}_weight.png', encode_weight_map(weight_map(label)))
    save_mean_std(folder / 'mean_std.npy', compute_mean_std(sorted((folder / 'images').glob('*/*.png'))))
    return folder


def make_glas(folder):
    """A prepared GlaS folder with both test sets."""
    for part, count in (('train', 2), ('val', 1), ('testA', 1), ('testB', 1)):
        for i in range(count):
            image, label = nuclei([len(part), i], 48, 60)
            name = f'{part if part.startswith("test") else "train"}_{i + 10 * (part == "val")}'
            save_image(folder / 'images' / part / f'{name}.bmp', image)
            save_image(folder / 'labels_instance' / part / f'{name}_anno.bmp', label.astype(np.uint8))
            if not part.startswith('test'):
                save_image(folder / 'labels' / part / f'{name}_anno.bmp', ternary_label(label))
                save_image(folder / 'weight_maps' / part / f'{name}_anno_weight.png',
                           encode_weight_map(weight_map(label, sigma=20.0)))
    save_mean_std(folder / 'mean_std.npy', compute_mean_std(sorted((folder / 'images').glob('*/*.bmp'))))
    return folder


def pixels(path):
    array = np.asarray(Image.open(Path(path)))
    return array.astype(np.uint16) if array.dtype == np.int32 else array         # a PNG of 16 bits, by Pillow before 11


def calls_of(script, folder, *words, **environment):
    """What a shell script asks of python, as the words of each call, and what it prints. Only `python -c` is run."""
    root, bin = Path(__file__).parents[1], folder / 'bin'
    bin.mkdir(exist_ok=True)
    (bin / 'python').write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec "{sys.executable}" "$@"\n'
                                f'printf "%s\\0" "$@" "" >> "{folder}/calls"\n')
    (bin / 'python').chmod(0o755)
    (folder / 'calls').unlink(missing_ok=True)
    shutil.copytree(root / 'scripts', folder / 'elsewhere/scripts', dirs_exist_ok=True)     # no .venv comes first
    done = subprocess.run(['sh', str(folder / 'elsewhere/scripts' / script), *words], cwd=folder, text=True,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': str(root), **environment,
                                                    'PATH': f'{bin}{os.pathsep}{os.environ["PATH"]}'})
    assert done.returncode == 0, done.stderr
    calls = (folder / 'calls').read_text().removesuffix('\0\0').split('\0\0')
    return [call.split('\0') for call in calls], done.stdout
