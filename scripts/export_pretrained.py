"""Make a file of weights to ship from a training run.

    python scripts/export_pretrained.py --run RUN --data-dir DATA [--checkpoint best]
        [--scores val_full_metrics.json ...] [--out pretrained/FullNet_MultiOrgan.pth.tar]

It holds the weights in float32, the model options, mean_std, the LAB statistics of the training images, the recipe, a
fingerprint of the data, the commit, the hours, and the scores of {set}_metrics.json files of test.py; no optimizer.
"""
import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from skimage.color import rgb2lab
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataset import list_images, load_mean_std, read_image  # noqa: E402
from utils import InputError, Parser, load_checkpoint, run_script, save_checkpoint, sha256_of  # noqa: E402


def lab_statistics(paths):
    """[means, population standard deviations] of L, A, B over all pixels of the images, (2, 3) list of float."""
    count, total, squares = 0, 0, 0
    for path in tqdm(paths, desc='colours', disable=None):
        lab = rgb2lab(read_image(path)).reshape(-1, 3)
        count, total, squares = count + len(lab), total + lab.sum(0), squares + (lab ** 2).sum(0)
    mean = total / count
    return [mean.tolist(), np.sqrt(squares / count - mean ** 2).tolist()]


def data_fingerprint(run_info):
    """SHA-256 of the sorted hashes of all training and validation files that the run recorded."""
    return hashlib.sha256('\n'.join(sorted(run_info['files'].values())).encode()).hexdigest()


def main(argv=None):
    parser = Parser(prog='scripts/export_pretrained.py', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', type=Path, required=True, help='run folder of train.py')
    parser.add_argument('--data-dir', type=Path, required=True, help='the prepared data that it was trained on')
    parser.add_argument('--checkpoint', default='best', help='best, latest, or the number of an epoch')
    parser.add_argument('--scores', type=Path, nargs='*', default=[], help='{set}_metrics.json files to carry along')
    parser.add_argument('--out', type=Path, default=Path(__file__).parents[1] / 'pretrained/FullNet_MultiOrgan.pth.tar')
    args = parser.parse_args(argv)
    ending = '' if args.checkpoint == 'latest' else f'_{args.checkpoint}'
    checkpoint = load_checkpoint(args.run / 'checkpoints' / f'checkpoint{ending}.pth.tar')
    if 'options' not in checkpoint or not (args.run / 'run_info.json').is_file():
        raise InputError(f'{args.run} is not a run of this train.py: expected options in its checkpoint, and '
                         f'run_info.json')
    info = json.loads((args.run / 'run_info.json').read_text())
    mean_std = load_mean_std(args.data_dir / 'mean_std.npy')
    if not np.allclose(mean_std, checkpoint['mean_std'], atol=1e-9):
        raise InputError(f'{args.data_dir}/mean_std.npy differs from what {args.run} was trained with; give '
                         f'its --data-dir')
    weights = {key: value.float() if value.is_floating_point() else value
               for key, value in checkpoint['state_dict'].items()}
    options = checkpoint['options']
    recipe = {name: value for name, value in options['train'].items()
              if name not in ('data_dir', 'save_dir', 'checkpoint')}
    scores = {str(path.stem): json.loads(path.read_text()) for path in args.scores}
    save_checkpoint(args.out, {
        'epoch': checkpoint['epoch'], 'state_dict': weights, 'mean_std': checkpoint['mean_std'],
        'best_iou': float(checkpoint['best_iou']), 'optimizer': {},
        'options': {'dataset': options['dataset'], 'model': options['model'], 'train': recipe,
                    'transform': options['transform']},
        'lab': lab_statistics(list_images(args.data_dir / 'images' / 'train')),
        'data_sha256': data_fingerprint(info), 'commit': info['commit'], 'packages': info['packages'],
        'steps': checkpoint['step'], 'hours': checkpoint['minutes'] / 60, 'scores': scores})
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, epoch {checkpoint["epoch"]}, '
          f'{checkpoint["minutes"] / 60:.1f} hours, SHA-256 {sha256_of(args.out)}')


if __name__ == '__main__':
    run_script(main)
