"""Weight maps, which make pixels between close objects count more in the loss (published as a MATLAB script).

    python weight_map.py --label-dir DIR --save-dir DIR [--sigma 5] [--w0 10] [--binary-labels True]

writes `{name}_weight.png` for every instance label in a folder. `prepare_data.py` calls the same functions.
"""
import math
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from support.command_line import boolean
from support.files import save_image
from support.images import labels_by_name, number_pieces, read_instance_label, refuse_same_folder
from support.pictures import find_edges
from support.script import InputError, Parser, note, run_script

W0 = 10.0             # upper bound of w: where objects touch, d1 + d2 is 1, and w is 9.8 for sigma 5
NEGLIGIBLE = 1e-4     # smaller weights may come out too small; 8 bits, in steps of 0.05, do not show it
STEPS = 20            # in which a weight of 1 is stored


def weight_map(instance_label, w0=W0, sigma=5.0):
    """The weight map of an instance label: w = w0 * exp(-(d1 + d2)^2 / (2 sigma^2)), as in U-Net.

    d1 and d2 are the Euclidean distances, in pixels, from a pixel to the boundaries (`object_boundaries`) of the
    nearest and the second nearest object. They are 0 on a boundary, and positive inside objects as well as outside.
    instance_label: int (H, W), 0 = background, one positive id per object. w0: an upper bound. sigma: pixels; 5 for
    MultiOrgan nuclei, 20 for GlaS glands. Returns float64 (H, W) in [0, w0]; all 0 with fewer than two objects. The
    result is exact where w >= NEGLIGIBLE; elsewhere it is between 0 and the exact value. Raises InputError for w0 < 0
    or sigma <= 0.

    A distance transform for each object would be slow. Instead, the objects are numbered so that objects close to each
    other have different numbers. For each binary digit of the numbers there are two distance transforms: D0 is the
    distance to the objects with the digit 0, D1 to those with 1. The smaller one is a candidate for d1, the larger one
    for d2. The nearest and the second nearest object differ in at least one digit, so the minimum over the digits is
    exact.
    """
    instance_label = np.asarray(instance_label)
    if not (math.isfinite(w0) and w0 >= 0 and math.isfinite(sigma) and sigma > 0):
        raise InputError(f'the weight map needs w0 >= 0 and sigma > 0; found w0 = {w0}, sigma = {sigma}')
    boundary, boxes = object_boundaries(instance_label)
    if len(boxes) < 2:
        return np.zeros(instance_label.shape)

    # d1 + d2 is at least the distance between the two objects. If that exceeds `reach`, w is negligible, and the two
    # objects may have the same number.
    reach = sigma * math.sqrt(2 * math.log(max(w0 / NEGLIGIBLE, 1)))
    numbers = _numbers_distinct_within(reach, boxes)
    if numbers.max() == 0:                                                # no two objects are within reach
        return np.zeros(instance_label.shape)
    numbers = np.concatenate([[-1], numbers])[boundary]                   # (H, W), -1 where there is no boundary
    d1 = d2 = np.inf
    for digit in range(int(numbers.max()).bit_length()):
        bit = np.where(numbers < 0, -1, numbers >> digit & 1)
        distance_0, distance_1 = (ndimage.distance_transform_edt(bit != value) for value in (0, 1))
        d1 = np.minimum(d1, np.minimum(distance_0, distance_1))
        d2 = np.minimum(d2, np.maximum(distance_0, distance_1))
    return w0 * np.exp(-(d1 + d2) ** 2 / (2 * sigma ** 2))


def encode_weight_map(w):
    """Encode a weight map, float (H, W), as uint8 (H, W): round(20 (w + 1)), at most 255, with a note if that matters.

    Halves are rounded up, as MATLAB's uint8() does. `decode_weight_map` gives the weights 1 to 11 of training.
    """
    stored = np.floor((np.asarray(w, np.float64) + 1) * STEPS + 0.5)
    if stored.max(initial=0) > 255:
        note(f'w0 is too large for 8 bits: weights w above {255 / STEPS - 1:g} are stored as {255 / STEPS - 1:g}')
    return np.minimum(stored, 255).astype(np.uint8)


def decode_weight_map(stored):
    """Decode an encoded weight map, a tensor or array of any shape: stored / 20, the weights w + 1 of the loss.

    They are 1 to 11, and 0 where augmentation filled the crop, so that those pixels do not count.
    """
    return stored / STEPS


def object_boundaries(instance_label):
    """The outer boundary of each object, as MATLAB's bwboundaries(object, 'noholes'){1} traces it.

    It consists of the object's pixels that have a 4-neighbour outside the filled object, or lie on the image border.
    Holes have no boundary. Of an object in several 8-connected pieces, only the first piece in column-major order has
    one. instance_label: int (H, W). Returns `boundary`, int32 (H, W), which holds the number of the object, from 1, on
    its boundary and 0 elsewhere, and `boxes`, int (N, 4): first row, last row, first column, last column of each.
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
    """Keep only the first 8-connected piece, in column-major order, of each object.

    instance_label: int (H, W) with any ids. Returns int32 (H, W), 0 = background, objects numbered 1 to N.
    """
    by_column = np.ascontiguousarray(np.asarray(instance_label).T)
    pieces, id_of_piece = number_pieces(by_column)
    _, first = np.unique(id_of_piece[1:], return_index=True)
    new_number = np.zeros(len(id_of_piece), np.int32)
    new_number[1 + first] = np.arange(1, len(first) + 1)
    return np.ascontiguousarray(new_number[pieces].T)


def _numbers_distinct_within(reach, boxes):
    """Number N objects from 0, int (N,), such that two whose boxes are within `reach` pixels have different numbers.

    boxes: of `object_boundaries`. Each object takes the lowest number that no earlier object near it has.
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


# ---------------------------------------------------------------------------------------------------
# A folder of labels
# ---------------------------------------------------------------------------------------------------


def create_weight_maps(label_dir, save_dir, sigma=5.0, w0=W0, binary_labels=False):
    """Write `{save_dir}/{name}_weight.png` (8-bit grey, `encode_weight_map`) for every instance label in a folder.

    `Breast_1.png` and `Breast_1_label.png` give `Breast_1_weight.png`; `train_8_anno.bmp` gives
    `train_8_anno_weight.png`. The labels must be of whole images, because an object beyond the edge of a patch counts
    too. Raises InputError for a missing or empty folder, and for a file that is not an instance label.
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
