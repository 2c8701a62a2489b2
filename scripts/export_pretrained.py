"""Make a file of weights to ship from a training run.

    python scripts/export_pretrained.py --run RUN --data-dir DATA --out FILE.pth.tar [--checkpoint best]
        [--scores RESULTS ...] [--best RESULTS] [--licence TEXT] [--raw]

It holds the weights in float32, the model options, mean_std, the LAB statistics of the training images, the recipe of
every stage (a run that started from another one's weights has two), a fingerprint of the data, the commit, the hours,
and scores; no optimizer. RESULTS: save_dir of test.py, whose scores are taken if they are those of these weights;
the post-processing options of --best become `test.py --preset best`.
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
from support.checkpoints import load_checkpoint, load_mean_std_of_run, save_checkpoint
from support.files import sha256_of
from support.images import list_images, read_image, shorter_side
from support.script import InputError, Parser, run_script

PRIVATE = ('data_dir', 'save_dir', 'checkpoint', 'init_from')            # paths of the machine that trained


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


def stages_of(path):
    """What the weights of a checkpoint went through: a list of {train, transform, epochs, steps, hours}, oldest first.

    train, transform: options. epochs, steps: when these weights were saved. hours: of the whole run. The weights that
    a run started from (--init-from) have stages of their own. Raises InputError if that file is gone.
    """
    checkpoint = load_checkpoint(path)
    if 'options' not in checkpoint:
        raise InputError(f'{path} holds no options: it was not written by this train.py')
    options = checkpoint['options']
    stage = {'train': {name: value for name, value in options['train'].items() if name not in PRIVATE},
             'transform': options['transform'], 'epochs': checkpoint['epoch']}
    if 'step' not in checkpoint:                                          # exported
        return checkpoint.get('stages') or [stage | {'steps': checkpoint['steps'], 'hours': checkpoint['hours']}]
    latest = path.with_name('checkpoint.pth.tar')
    whole_run = load_checkpoint(latest) if latest.is_file() else checkpoint
    before = options['train']['init_from']
    return [*(stages_of(Path(before)) if before else []),
            stage | {'steps': checkpoint['step'], 'hours': whole_run['minutes'] / 60}]


def scores_of(results, weights):
    """{set, test, post, mean, images} of a result folder of test.py: scores, and the options they were made with.

    weights: state_dict. Raises InputError if the folder has no scores, or was made with other weights.
    """
    files = sorted(results.glob('*_metrics.json'))
    if len(files) != 1:
        raise InputError(f'{results} has {len(files)} *_metrics.json files; expected one, from test.py with labels')
    metrics = json.loads(files[0].read_text(encoding='utf-8'))
    if 'made_by' not in metrics:
        raise InputError(f'{files[0]} was written by an earlier version; run test.py again')
    options, path = metrics['made_by'], Path(metrics['made_by']['model_path'])
    if not path.is_file() or sha256_of(path) != options['weights_sha256']:
        raise InputError(f'{path} is not the file any more that has the scores in {results}; run test.py again')
    scored = load_checkpoint(path)['state_dict']
    if scored.keys() != weights.keys() or not all(torch.equal(scored[key].float(), value.float())
                                                  for key, value in weights.items()):
        raise InputError(f'the scores in {results} are of other weights, {path}; run test.py with the '
                         f'checkpoint that is exported')
    names = ('tta', 'amp', 'patch_size', 'overlap', 'color_norm', 'scale_factor')
    return {'set': metrics['set'], 'test': {name: options['test'][name] for name in names},
            'post': options['post'], 'mean': metrics['mean'], 'images': metrics['images']}


def main(argv=None):
    parser = Parser(prog='scripts/export_pretrained.py', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', type=Path, required=True, help='run folder of train.py')
    parser.add_argument('--data-dir', type=Path, required=True, help='the prepared data that it was trained on')
    parser.add_argument('--checkpoint', default='best',
                        help='best, latest, the number of an epoch, or what else follows checkpoint_ in a name')
    parser.add_argument('--scores', type=Path, nargs='*', default=[], help='result folders of test.py')
    parser.add_argument('--best', type=Path, help='result folder whose post-processing is --preset best of test.py')
    parser.add_argument('--licence', default='', help='of the weights, as that of their data asks; test.py names it')
    parser.add_argument('--raw', action='store_true',
                        help='of a run with --ema-decay: the weights themselves, not their average')
    parser.add_argument('--out', type=Path, required=True, help='the file to write, such as pretrained/mine.pth.tar')
    args = parser.parse_args(argv)
    ending = '' if args.checkpoint == 'latest' else f'_{args.checkpoint}'
    path = args.run / 'checkpoints' / f'checkpoint{ending}.pth.tar'
    checkpoint = load_checkpoint(path)
    if 'options' not in checkpoint or not (args.run / 'run_info.json').is_file():
        raise InputError(f'{args.run} is not a run of this train.py: expected options in its checkpoint, and '
                         f'run_info.json')
    if args.raw and 'raw_state_dict' not in checkpoint:
        raise InputError(f'{path} has no averaged weights beside the raw ones, as it was trained without --ema-decay; '
                         f'leave out --raw')
    if args.out.exists() and args.out.samefile(path):
        raise InputError(f'--out is {args.out}, the checkpoint itself; expected another name')
    info = json.loads((args.run / 'run_info.json').read_text())
    load_mean_std_of_run(args.data_dir, checkpoint, path)
    weights = {key: value.float() if value.is_floating_point() else value
               for key, value in checkpoint['raw_state_dict' if args.raw else 'state_dict'].items()}
    stages, images = stages_of(path), list_images(args.data_dir / 'images' / 'train')
    best = {'best_post': scores_of(args.best, weights)['post']} if args.best else {}
    save_checkpoint(args.out, {
        'epoch': checkpoint['epoch'], 'state_dict': weights, 'mean_std': checkpoint['mean_std'],
        'best_iou': float(checkpoint['best_iou']), 'optimizer': {}, 'licence': args.licence,
        'options': {'dataset': checkpoint['options']['dataset'], 'model': checkpoint['options']['model'],
                    'train': stages[-1]['train'], 'transform': stages[-1]['transform']},
        'lab': lab_statistics(images), 'shorter_side': shorter_side(images),
        'data_sha256': data_fingerprint(info), 'commit': info['commit'], 'packages': info['packages'],
        'batch_norm_crops': checkpoint.get('batch_norm_crops', 0),         # 0: the statistics of the training
        'stages': stages, 'steps': sum(stage['steps'] for stage in stages),
        'hours': sum(stage['hours'] for stage in stages),
        'scores': [scores_of(results, weights) for results in args.scores], **best})
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {len(stages)} stages, '
          f'{sum(stage["hours"] for stage in stages):.1f} hours, SHA-256 {sha256_of(args.out)}')


if __name__ == '__main__':
    run_script(main)
