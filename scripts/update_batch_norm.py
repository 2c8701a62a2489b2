"""Compute the batch-norm statistics of trained weights anew, from training crops without augmentation.

    python scripts/update_batch_norm.py --model-path CHECKPOINT --data-dir DATA --out FILE.pth.tar [--crops 96]

While a network trains, batch norm also averages over what augmentation fills with zeros, far from the colour of any
tissue, and over weights that still moved. Testing sees neither. The new statistics are the mean over `--crops` random
crops of training's size, scaled as in training and else unchanged, without dropout; the weights stay as they are.
FILE cannot be resumed, only tested, exported or started from; its best_iou is that of the old statistics, and it has no
scores.
"""
import argparse
import itertools
import sys
from pathlib import Path

from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataset import EpochBatches, batch_items
from FullNet import create_model
from options import Options
from support.checkpoints import load_checkpoint, load_mean_std_of_run, load_weights, save_checkpoint
from support.devices import choose_device
from support.script import InputError, Parser, run_script
from train import load_data

KEPT = ('scale', 'random_crop', 'label_encoding', 'to_tensor', 'normalize')           # of the training transforms
BATCH = 4                                             # batches of one size, so that all crops count the same


def training_crops(train_set, batch_size):
    """Yield normalised crops, float (batch_size, 3, H, W), without end: one of every image, then another of each, ..."""
    batches = EpochBatches(len(train_set), batch_size, seed=0)
    loader = DataLoader(train_set, batch_sampler=batches, collate_fn=batch_items)
    yield from (image for image, *_ in loader if len(image) == batch_size)


def main(argv=None):
    parser = Parser(prog='scripts/update_batch_norm.py', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model-path', type=Path, required=True, help='checkpoint of train.py')
    parser.add_argument('--data-dir', type=Path, required=True, help='the prepared data that it was trained on')
    parser.add_argument('--out', type=Path, required=True, help='the checkpoint to write')
    parser.add_argument('--crops', type=int, default=96, help='random training crops, rounded up to whole batches [96]')
    args = parser.parse_args(argv)
    if args.crops < 1:
        raise InputError(f'--crops is {args.crops}; expected at least 1')
    if args.out.exists() and args.out.samefile(args.model_path):
        raise InputError(f'--out is {args.out}, the checkpoint itself; expected another name')
    checkpoint = load_checkpoint(args.model_path)
    if not {'options', 'mean_std'} <= checkpoint.keys():
        raise InputError(f'{args.model_path} holds no options or no mean_std: expected a checkpoint of this train.py')
    opt = Options(isTrain=True).parse(['--dataset', checkpoint['options']['dataset'], '--data-dir', str(args.data_dir)])
    stored = checkpoint['options']['transform']['train']
    opt.transform['train'] = {name: value for name, value in stored.items() if name in KEPT}
    mean_std = load_mean_std_of_run(args.data_dir, checkpoint, args.model_path)

    device = choose_device('auto')
    model = create_model(**{**checkpoint['options']['model'], 'drop_rate': 0})
    load_weights(model, checkpoint['state_dict'], checkpoint['options']['model'], args.model_path)
    train_set = load_data(opt, 'train', mean_std)
    batch_size = min(BATCH, len(train_set))
    n_batches = -(-args.crops // batch_size)
    n_crops = n_batches * batch_size
    crops = itertools.islice(training_crops(train_set, batch_size), n_batches)
    update_bn(tqdm(crops, total=n_batches, disable=None), model.to(device), device)
    checkpoint['state_dict'] = {key: value.cpu() for key, value in model.state_dict().items()}
    checkpoint['optimizer'], checkpoint['batch_norm_crops'] = {}, n_crops
    for name in ('raw_state_dict', 'scores', 'best_post'):            # of the old statistics
        checkpoint.pop(name, None)
    save_checkpoint(args.out, checkpoint)
    print(f'{args.out}: batch-norm statistics of {n_crops} crops')


if __name__ == '__main__':
    run_script(main)
