"""Weight maps: pixels between close objects count more in the loss (the published code's MATLAB script).

    python weight_map.py --label-dir DIR --save-dir DIR [--sigma 5] [--w0 10] [--binary-labels True]

writes `{name}_weight.png` for every instance label in a folder. `prepare_data.py` calls the same functions.
"""
import math
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage.measure import label as connected_regions
from tqdm import tqdm

from support.command_line import boolean
from support.files import save_image
from support.images import labels_by_name, read_instance_label, refuse_same_folder
from support.pictures import find_edges
from support.script import InputError, Parser, run_script

W0 = 10.0             # weight of a pixel on the boundaries of two touching objects; `encode_weight_map` adds 1
NEGLIGIBLE = 1e-4     # weights below this may be stored as less than they are; 8 bits resolve 0.05


def weight_map(instance_label, w0=W0, sigma=5.0):
    """w = w0 * exp(-(d1 + d2)^2 / (2 sigma^2)), as in U-Net, from an instance label.

    instance_label: int (H, W), 0 = background, one positive id per object. d1 and d2 are the Euclidean distances in
    pixels from a pixel to the nearest and second nearest object's boundary (`object_boundaries`): 0 on a boundary,
    positive inside an object as well as outside. w0: the largest weight. sigma: pixels; 5 for MultiOrgan nuclei,
    20 for GlaS glands. Returns float64 (H, W) in [0, w0]; all 0 with fewer than two objects. The result is exact
    where w >= NEGLIGIBLE; elsewhere it lies between 0 and the exact value. Raises InputError for w0 < 0 or sigma <= 0.

    d1 and d2 come from a few distance transforms of the whole image instead of one per object. Objects are numbered so
    that any two close enough to matter differ. For one binary digit of the numbers, let D0 and D1 be the distances
    to the objects with that digit 0 and 1: then d1 = min(D0, D1), and max(D0, D1) is the distance to some object
    other than the nearest. The second nearest differs from the nearest in at least one digit, so
    d2 = min over the digits of max(D0, D1).
    """
    instance_label = np.asarray(instance_label)
    if not (math.isfinite(w0) and w0 >= 0 and math.isfinite(sigma) and sigma > 0):
        raise InputError(f'the weight map needs w0 >= 0 and sigma > 0; found w0 = {w0}, sigma = {sigma}')
    boundary, boxes = object_boundaries(instance_label)
    if len(boxes) < 2:
        return np.zeros(instance_label.shape)

    # d1 + d2 >= the distance between the two objects, so objects further apart than `reach` may share a number.
    reach = sigma * math.sqrt(2 * math.log(max(w0 / NEGLIGIBLE, 1)))
    numbers = _numbers_distinct_within(reach, boxes)
    if numbers.max() == 0:                                                # no two objects within reach of each other
        return np.zeros(instance_label.shape)
    numbers = np.concatenate([[-1], numbers])[boundary]                   # (H, W), -1 where there is no boundary
    d1 = d2 = np.iinfo(np.int64).max                                      # squared until the last line
    for digit in range(int(numbers.max()).bit_length()):
        bit = np.where(numbers < 0, -1, numbers >> digit & 1)
        distance_0, distance_1 = _squared_distance_to(bit == 0), _squared_distance_to(bit == 1)
        d1 = np.minimum(d1, np.minimum(distance_0, distance_1))
        d2 = np.minimum(d2, np.maximum(distance_0, distance_1))
    return w0 * np.exp(-(np.sqrt(d1) + np.sqrt(d2)) ** 2 / (2 * sigma ** 2))


def encode_weight_map(w):
    """The 8-bit form of a weight map, uint8 (H, W): round((w + 1) * 20), saturated at 255.

    Halves are rounded up, as MATLAB's uint8() does. Training divides by 20, so a pixel's weight is 1 ... 11.
    """
    return np.minimum(np.floor((np.asarray(w, np.float64) + 1) * 20 + 0.5), 255).astype(np.uint8)


def decode_weight_map(stored):
    """The weights of the loss, float of 1 to 11, from the 8-bit form: stored / 20. A tensor or array of any shape."""
    return stored / 20


def object_boundaries(instance_label):
    """The outer boundary of every object, as MATLAB's bwboundaries(object, 'noholes'){1} traces it.

    It consists of the object's pixels that have a 4-neighbour outside the filled object or lie on the image border.
    Of an object in several 8-connected pieces only the first in column-major order has a boundary; holes have none.
    instance_label: int (H, W). Returns `boundary`, int32 (H, W): 0, or the object's index counted from 1, and
    `boxes`, int (N, 4): first row, last row, first column, last column of the objects, in that order.
    """
    pieces = first_pieces(instance_label)
    slices = ndimage.find_objects(pieces)
    boundary = np.zeros(pieces.shape, np.int32)
    for index, (rows, columns) in enumerate(slices, 1):
        piece = pieces[rows, columns] == index
        boundary[rows, columns][find_edges(ndimage.binary_fill_holes(piece)) & piece] = index
    boxes = [(rows.start, rows.stop - 1, columns.start, columns.stop - 1) for rows, columns in slices]
    return boundary, np.array(boxes, int).reshape(-1, 4)


def first_pieces(instance_label):
    """Keep of each object the 8-connected piece that comes first in column-major order.

    instance_label: int (H, W) with any ids. Returns int32 (H, W), 0 or the object's number, 1 to N without gaps.
    """
    by_column = np.ascontiguousarray(np.asarray(instance_label).T)
    pieces = connected_regions(by_column, background=0, connectivity=2)   # numbered in the order of their first pixels
    id_of_piece = np.zeros(pieces.max(initial=0) + 1, by_column.dtype)
    id_of_piece[pieces] = by_column
    _, first = np.unique(id_of_piece[1:], return_index=True)
    new_number = np.zeros(len(id_of_piece), np.int32)
    new_number[1 + first] = np.arange(1, len(first) + 1)
    return np.ascontiguousarray(new_number[pieces].T)


def _numbers_distinct_within(reach, boxes):
    """Number N objects from 0, int (N,), so that two whose boxes are within `reach` pixels never share a number.

    Greedy: each object takes the lowest number that no earlier object near it has.
    """
    top, bottom, left, right = boxes.T
    numbers = np.zeros(len(boxes), int)
    for i in range(len(boxes)):
        near = ((top[:i] <= bottom[i] + reach) & (bottom[:i] >= top[i] - reach)
                & (left[:i] <= right[i] + reach) & (right[:i] >= left[i] - reach))
        taken = set(numbers[:i][near].tolist())
        while numbers[i] in taken:
            numbers[i] += 1
    return numbers


def _squared_distance_to(mask):
    """Squared Euclidean distance from each pixel to the nearest True pixel of `mask` (H, W), int64; 0 on it."""
    y, x = ndimage.distance_transform_edt(~mask, return_distances=False, return_indices=True)
    y -= np.arange(mask.shape[0], dtype=y.dtype)[:, None]
    x -= np.arange(mask.shape[1], dtype=x.dtype)
    return np.square(y, dtype=np.int64) + np.square(x, dtype=np.int64)


# ---------------------------------------------------------------------------------------------------
# A folder of labels
# ---------------------------------------------------------------------------------------------------


def create_weight_maps(label_dir, save_dir, sigma=5.0, w0=W0, binary_labels=False):
    """Write `{save_dir}/{name}_weight.png` (8-bit grey, `encode_weight_map`) for every instance label in a folder.

    `Breast_1.png` and `Breast_1_label.png` give `Breast_1_weight.png`; `train_8_anno.bmp` gives
    `train_8_anno_weight.png`. Labels must be of whole images, not patches: an object beyond a patch's edge counts.
    Raises InputError for a missing or empty folder and for what is not an instance label.
    """
    refuse_same_folder(label_dir, save_dir)
    for name, path in tqdm(labels_by_name(label_dir).items(), desc='weight maps', disable=None):
        w = weight_map(read_instance_label(path, binary_labels=binary_labels), w0, sigma)
        save_image(Path(save_dir) / f'{name}_weight.png', encode_weight_map(w))


def main(argv=None):
    parser = Parser(description='Write the weight map of every instance label in a folder.')
    parser.add_argument('--label-dir', required=True, help='folder of instance labels of whole images')
    parser.add_argument('--save-dir', required=True, help='where {name}_weight.png files go')
    parser.add_argument('--sigma', type=float, default=5.0, help='pixels: 5 for MultiOrgan nuclei, 20 for GlaS glands')
    parser.add_argument('--w0', type=float, default=W0, help='the largest weight')
    parser.add_argument('--binary-labels', type=boolean, nargs='?', const=True, default=False,
                        help='0/255 masks as labels: their 8-connected components are the objects')
    args = parser.parse_args(argv)
    create_weight_maps(args.label_dir, args.save_dir, args.sigma, args.w0, args.binary_labels)


if __name__ == '__main__':
    run_script(main)
