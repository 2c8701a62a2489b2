"""The training and validation sets: (image, weight map, ternary label), batches, and their order.

A ternary label is a picture of inside, contour and background (`prepare_data.ternary_label`). A target holds the
classes 0, 1, 2 that `LabelEncoding` makes of it. Instances are maps of integer ids, one for each object.
"""
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from loss import label_instances
from support.images import read_instance_label  # noqa: F401  (users read labels with it)
from support.images import decode, list_images, missing_files_message, open_image, read_image
from support.script import InputError


class DataFolder(torch.utils.data.Dataset):
    """Samples (image, weight map, ternary label), transformed together.

    dir_list: the folders [images, weight maps, ternary labels]. Item k > 0 of the image `X.ext` is the file
    `X_{post_fix[k-1]}` in dir_list[k]. num_channels: 1 or 3 for each item; 1 expects a grey file of 8 bits, 3
    converts to RGB. data_transform: maps (list of Pillow images, NumPy generator) to a list of tensors; without it a
    sample is a list of Pillow images. Raises InputError that names the files if an image lacks its weight map or label,
    or one of these lacks its image. (The published code skips such images silently.)

    `dataset[index]` draws its transforms from torch's global generator. `dataset[index, seed, epoch]` draws them from
    these three numbers alone, so that every process, and a resumed run, makes the same sample.
    """

    def __init__(self, dir_list, post_fix, num_channels, data_transform=None):
        if not len(dir_list) == len(num_channels) == len(post_fix) + 1:
            raise ValueError(f'expected one post-fix fewer than folders and channels, found {len(dir_list)} folders, '
                             f'{len(post_fix)} post-fixes, {len(num_channels)} channels')
        self.num_channels = num_channels
        self.data_transform = data_transform
        images = list_images(dir_list[0])
        self.names = [path.name for path in images]
        partners = list(zip(map(Path, dir_list[1:]), post_fix))
        self.items = [[path, *(folder / f'{path.stem}_{ending}' for folder, ending in partners)] for path in images]
        for k, folder in enumerate(dir_list[1:], start=1):
            missing = [item[k].name for item in self.items if not item[k].is_file()]
            if missing:
                raise InputError(missing_files_message('partners of images', missing, folder)
                                 + '; run prepare_data.py again')
            expected = {item[k].name for item in self.items}
            unmatched = [p.name for p in sorted(Path(folder).glob(f'[!.]*_{post_fix[k - 1]}'))
                         if p.name not in expected]
            if unmatched:
                raise InputError(f'{len(unmatched)} files in {folder} have no image in {dir_list[0]}: '
                                 + ', '.join(unmatched[:5]))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        index, *seeds = key if isinstance(key, tuple) else (key,)
        images = [self.load(path, channels) for path, channels in zip(self.items[index], self.num_channels)]
        for path, image in zip(self.items[index][1:], images[1:]):
            if image.size != images[0].size:
                raise InputError(f'{path} is {image.width} x {image.height} pixels, its image '
                                 f'{images[0].width} x {images[0].height}; run prepare_data.py again')
        if self.data_transform is None:
            return images
        return self.data_transform(images, np.random.default_rng([*seeds, index]) if seeds else None)

    @staticmethod
    def load(path, channels):
        if channels == 3:
            return Image.fromarray(read_image(path))
        image = open_image(path)
        decode(image, path)
        if image.mode != 'L':
            raise InputError(f'{path} has colour mode {image.mode}; expected a weight map of 8-bit grey; run '
                             f'prepare_data.py again')
        return image


def batch_items(items):
    """Collate samples of a DataFolder into a batch. Its types are small, so that it is copied to a GPU quickly.

    items: list of (image, weight map, target) tensors, each (channels, H, W). Returns image, float32 (B, 3, H, W);
    weight, uint8 (B, H, W), of `encode_weight_map`; target, uint8 (B, H, W), classes; instances, int32 (B, H, W),
    `label_instances` of the target. Raises InputError if the images differ in size.
    """
    sizes = {tuple(item[0].shape[-2:]) for item in items}
    if len(sizes) > 1:
        raise InputError('images of a batch differ in size, ' + ' and '.join(f'{w} x {h}' for h, w in sorted(sizes))
                         + ' pixels; crop them with --transform.train.random_crop, or use --batch-size 1')
    image, weight, target = torch.utils.data.default_collate(items)
    target = target[:, 0].byte()
    return image, weight[:, 0].byte(), target, label_instances(target)


class EpochBatches(torch.utils.data.Sampler):
    """Shuffled batches of the keys (index, seed, epoch) of a DataFolder. It yields epoch after epoch, without end.

    The last batch of an epoch may be short. Of each batch, the process `rank` of `count` yields its own part. The order
    depends only on (seed, epoch), so that training can resume within an epoch, and with another number of processes.
    One iterator serves all epochs, so that the loader processes load ahead across the end of an epoch.
    """

    def __init__(self, n_images, batch_size, seed, rank=0, count=1):
        self.n_images, self.batch_size, self.seed = n_images, batch_size, seed
        self.rank, self.count = rank, count
        self.start_at(0, 0)

    def start_at(self, epoch, batch):
        """Let the next iterator start with this batch of this epoch, both counted from 0."""
        self.epoch, self.first = epoch, batch

    def batch(self, epoch, k):
        """The keys of batch `k` of an epoch, of all processes together."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n_images)
        return [(int(i), self.seed, epoch) for i in order[k * self.batch_size:(k + 1) * self.batch_size]]

    def sizes(self, k):
        """Number of images in this process's part of batch `k`, and in the whole batch."""
        size = min(self.batch_size, self.n_images - k * self.batch_size)
        return len(range(self.rank, size, self.count)), size

    def __len__(self):
        """Number of batches in one epoch."""
        return -(-self.n_images // self.batch_size)

    def __iter__(self):
        for step in itertools.count(self.epoch * len(self) + self.first):
            keys = self.batch(*divmod(step, len(self)))
            yield keys[self.rank::self.count] or keys[:1]          # fewer images than processes: one of weight 0
