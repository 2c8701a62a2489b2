"""Pictures for people: contours, coloured instances, training samples, validation images, contact sheets."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.color import hsv2rgb

from support.files import save_image

HIT, MISSED, FALSE = (40, 230, 60), (60, 140, 255), (255, 50, 40)       # RGB of contours in the overlay
UNLABELLED = (255, 255, 0)                                              # RGB of contours without ground truth
N_COLOURS = 12                                                          # of instances in the coloured picture
PREVIEW_HEIGHT = 300                                                    # pixels, of an image in a contact sheet
CONTACT_SHEET_IMAGES = 24                                               # at most, of one split


def draw_overlay(image, instances, truth=None, matches=None):
    """Draw the contours of the instances into the image, uint8 (H, W, 3), in place. Returns the picture, uint8 RGB.

    instances: int (H, W). With ground truth, int (H, W), hits, false and missed objects differ in colour, and a legend
    is added. matches: of `match_objects(instances, truth)`; a hit is a pair with IoU >= 0.5.
    """
    if truth is None:
        draw_contours(image, instances, UNLABELLED)
        return image
    hits = {pred: gt for pred, (gt, iou) in matches.items() if iou >= 0.5}
    ids = np.unique(truth)
    missed = np.isin(truth, np.setdiff1d(ids, list(hits.values()))) * truth
    draw_contours(image, missed, MISSED)
    colours = np.full((instances.max(initial=0) + 1, 3), FALSE, np.uint8)
    colours[list(hits)] = HIT
    draw_contours(image, instances, colours)
    n_false, n_missed = int((np.bincount(instances.ravel())[1:] > 0).sum()) - len(hits), (ids > 0).sum() - len(hits)
    legend = Image.new('RGB', (image.shape[1], 20), 'black')
    draw, x = ImageDraw.Draw(legend), 4
    for text, colour in ((f'{len(hits)} hits (IoU >= 0.5)', HIT), (f'{n_missed} missed', MISSED),
                         (f'{n_false} false', FALSE)):
        draw.text((x, 4), text, fill=colour)
        x += draw.textlength(text) + 16
    return np.concatenate([image, np.asarray(legend)])


def draw_contours(image, instances, colours, rows=2048):
    """Colour the pixels of instances, int (H, W), that have a 4-neighbour outside their instance, in place.

    image: uint8 (H, W, 3). colours: one RGB colour (3,), or one for each id (ids, 3).
    """
    for top in range(0, len(instances), rows):                           # in pieces, which bounds the memory
        above = min(top, 1)                                              # plus a row on either side, for neighbours
        ids = instances[top:top + rows]
        border = find_edges(instances[top - above:top + rows + 1])[above:above + len(ids)] & (ids > 0)
        image[top:top + rows][border] = colours if np.ndim(colours) == 1 else colours[ids[border]]


def colour_instances(instances, picture=None, rows=2048):
    """Colour instances, int (H, W), as an RGB picture, uint8 (H, W, 3). Touching instances differ; background is black.

    picture: array to overwrite, which saves the memory of a new one. The instances get their colours in order of ids.
    Each tries colours, the first of which depends on its id, until no touching instance of lower id has the same.
    """
    colours = hsv2rgb([(k / N_COLOURS, 0.75, 0.7 + 0.3 * (k % 2)) for k in range(N_COLOURS)])
    chosen = {}
    for low, high in touching_pairs(instances):
        chosen.setdefault(high, set()).add(low)
    number = np.arange(instances.max(initial=0) + 1) * 7 % N_COLOURS
    for high in sorted(chosen):
        taken = {number[low] for low in chosen[high]}
        number[high] = next((k for k in range(number[high], number[high] + N_COLOURS) if k % N_COLOURS not in taken),
                            number[high]) % N_COLOURS
    palette = (colours * 255).astype(np.uint8)[number]
    palette[0] = 0
    if picture is None:
        picture = np.empty((*instances.shape, 3), np.uint8)
    for top in range(0, len(instances), rows):                           # in pieces, which bounds the memory
        picture[top:top + rows] = palette[instances[top:top + rows]]
    return picture


def touching_pairs(instances):
    """The pairs [lower id, higher id] of instances with 4-neighbouring pixels: sorted list of lists of int."""
    pairs = []
    for a, b in ((instances[:, :-1], instances[:, 1:]), (instances[:-1], instances[1:])):
        touch = (a != b) & (a > 0) & (b > 0)
        pairs.append(np.stack([np.minimum(a[touch], b[touch]), np.maximum(a[touch], b[touch])], axis=1))
    return np.unique(np.concatenate(pairs), axis=0).tolist()


def save_preview(dataset, train, mean_std, n=8):
    """Write {save_dir}_preview.png: n augmented samples of the first epoch, each as image, target and weight map.

    dataset: the DataFolder of training. train: the option group `train`. mean_std: (2, 3), or None if not normalised.
    """
    rng = np.random.default_rng(train['seed'])
    rows = []
    for index in rng.permutation(len(dataset))[:n]:
        image, weight, target = dataset[int(index), train['seed'], 0]
        grey = weight[0].clamp(0, 255).byte().numpy()
        rows.append([as_picture(image, mean_std), class_colours(target[0]), np.repeat(grey[..., None], 3, axis=2)])
    path = Path(train['save_dir']).resolve()
    path = path.with_name(f'{path.name}_preview.png')
    save_image(path, tile(rows))
    print(f'{len(rows)} samples in {path}: image, label (inside red, contour green), weight map')


def as_picture(image, mean_std):
    """An image of the network, float (3, H, W), as a picture, uint8 (H, W, 3).

    mean_std: (2, 3), with which the image was normalised; None if it was not.
    """
    if mean_std is not None:
        mean, std = (torch.as_tensor(values, dtype=torch.float32)[:, None, None] for values in mean_std)
        image = image * std + mean
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def class_colours(classes):
    """Classes, int tensor (H, W), in the colours of ternary labels: uint8 (H, W, 3), 0 blue, 1 red, 2 green."""
    palette = np.array([[0, 0, 255], [255, 0, 0], [0, 255, 0], *[[128] * 3] * 253], np.uint8)
    return palette[classes.numpy()]


def tile(rows, margin=4):
    """Arrange rows of pictures, uint8 (h, w, 3), on a white sheet. A column is as wide as its widest picture."""
    widths = [max(picture.shape[1] for picture in column) for column in zip(*rows)]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    height, width = (sum(sides) + margin * (len(sides) - 1) for sides in (heights, widths))
    sheet = np.full((height, width, 3), 255, np.uint8)
    y = 0
    for row, height in zip(rows, heights):
        x = 0
        for picture, width in zip(row, widths):
            sheet[y:y + picture.shape[0], x:x + picture.shape[1]] = picture
            x += width + margin
        y += height + margin
    return sheet


def preview(arrays):
    """The image with contours, and the ternary label and weight map if there are any, side by side; uint8 RGB.

    arrays: dict of image, instance and, of training and validation images, ternary and weight.
    """
    height, width = arrays['instance'].shape
    size = max(1, round(PREVIEW_HEIGHT * width / height)), PREVIEW_HEIGHT
    tiles = [arrays['image']]
    if 'weight' in arrays:
        tiles += [arrays['ternary'], np.repeat(arrays['weight'][..., None], 3, axis=2)]
    sheet = np.concatenate([np.asarray(Image.fromarray(tile).resize(size, Image.BOX)) for tile in tiles], axis=1)
    label = np.asarray(Image.fromarray(arrays['instance'].astype(np.int32)).resize(size, Image.NEAREST))
    draw_contours(sheet[:, :size[0]], label, UNLABELLED)                 # on the small picture, so that they are seen
    return sheet


def save_contact_sheets(images, folder):
    """Write contact_sheet_{split}.png of every split. images: dicts with name, split and preview."""
    for part in dict.fromkeys(image['split'] for image in images):
        rows = [image for image in images if image['split'] == part][:CONTACT_SHEET_IMAGES]
        save_image(folder / f'contact_sheet_{part}.png', contact_sheet([row['name'] for row in rows],
                                                                       [row['preview'] for row in rows]))


def contact_sheet(names, previews, width=1808):
    """Arrange previews, uint8 (PREVIEW_HEIGHT, W, 3), with their names, row by row. Returns uint8 RGB."""
    previews = [Image.fromarray(preview) for preview in previews]
    margin, line = 4, 16
    x = y = 0
    places = []
    for picture in previews:
        if x and x + picture.width > width:
            x, y = 0, y + PREVIEW_HEIGHT + line
        places.append((x, y))
        x += picture.width + margin
    width = max(place[0] + picture.width for place, picture in zip(places, previews))
    sheet = Image.new('RGB', (width, y + PREVIEW_HEIGHT + line), 'white')
    draw = ImageDraw.Draw(sheet)
    for name, picture, (x, y) in zip(names, previews, places):
        draw.text((x, y), name, fill='black')
        sheet.paste(picture, (x, y + line))
    return np.asarray(sheet)


def find_edges(label_map):
    """Which pixels have a 4-neighbour of another value: bool (H, W). Outside the image the value is 0."""
    padded = np.pad(label_map, 1)
    on_edge = np.zeros(label_map.shape, dtype=bool)
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        on_edge |= neighbour != label_map
    return on_edge
