"""Pictures to look at: contours, coloured instances, samples of training and validation, contact sheets."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from support.files import save_image

HIT, MISSED, FALSE = (40, 230, 60), (60, 140, 255), (255, 50, 40)           # colours of contours in the overlay
UNLABELLED = (255, 255, 0)
N_COLOURS = 12                                                              # of the coloured picture
PREVIEW_HEIGHT = 300      # pixels, of an image in the contact sheets
CONTACT_SHEET_IMAGES = 24   # of a split


def draw_overlay(image, segmentation, label=None, matches=None):
    """The image, uint8 (H, W, 3), with the contours of the objects drawn into it.

    With ground truth: hits, false objects and missed ones in three colours, and a legend below. A hit is a pair of
    `match_objects` with IoU >= 0.5.
    """
    if label is None:
        draw_contours(image, segmentation, UNLABELLED)
        return image
    hits = {pred: gt for pred, (gt, iou) in matches.items() if iou >= 0.5}
    ids = np.unique(label)
    missed = np.isin(label, np.setdiff1d(ids, list(hits.values()))) * label
    draw_contours(image, missed, MISSED)
    colours = np.full((segmentation.max(initial=0) + 1, 3), FALSE, np.uint8)
    colours[list(hits)] = HIT
    draw_contours(image, segmentation, colours)
    n_false, n_missed = int((np.bincount(segmentation.ravel())[1:] > 0).sum()) - len(hits), (ids > 0).sum() - len(hits)
    legend = Image.new('RGB', (image.shape[1], 20), 'black')
    draw, x = ImageDraw.Draw(legend), 4
    for text, colour in ((f'{len(hits)} hits (IoU >= 0.5)', HIT), (f'{n_missed} missed', MISSED),
                         (f'{n_false} false', FALSE)):
        draw.text((x, 4), text, fill=colour)
        x += draw.textlength(text) + 16
    return np.concatenate([image, np.asarray(legend)])


def draw_contours(image, label, colours, rows=2048):
    """Colour the pixels of objects that have a 4-neighbour outside their object. colours: (3,), or (ids, 3)."""
    for top in range(0, len(label), rows):                               # in pieces, for large images
        above = min(top, 1)                                              # and a row around them, to see the neighbours
        ids = label[top:top + rows]
        border = find_edges(label[top - above:top + rows + 1])[above:above + len(ids)] & (ids > 0)
        image[top:top + rows][border] = colours if np.ndim(colours) == 1 else colours[ids[border]]


def colour_instances(label, picture=None, rows=2048):
    """RGB picture, uint8 (H, W, 3), of an instance label, int (H, W): black background, touching objects differ.

    It is written over `picture`, if that is given: a large image then needs no memory for another one.

    Each object in order of its id gets the first colour, from one that depends on its id on, that no touching object
    of lower id has.
    """
    hue = np.arange(N_COLOURS) / N_COLOURS
    phase = (hue[:, None] + np.array([1, 2 / 3, 1 / 3])) % 1
    colours = (0.7 + 0.3 * (np.arange(N_COLOURS) % 2))[:, None] * (1 - 0.75 * np.clip(2 - np.abs(phase * 6 - 3), 0, 1))
    chosen = {}
    for low, high in touching_pairs(label):
        chosen.setdefault(high, set()).add(low)
    number = np.arange(label.max(initial=0) + 1) * 7 % N_COLOURS
    for high in sorted(chosen):
        taken = {number[low] for low in chosen[high]}
        number[high] = next((k for k in range(number[high], number[high] + N_COLOURS) if k % N_COLOURS not in taken),
                            number[high]) % N_COLOURS
    palette = (colours * 255).astype(np.uint8)[number]
    palette[0] = 0
    if picture is None:
        picture = np.empty((*label.shape, 3), np.uint8)
    for top in range(0, len(label), rows):                               # in pieces, for large images
        picture[top:top + rows] = palette[label[top:top + rows]]
    return picture


def touching_pairs(label):
    """Pairs (lower id, higher id) of objects with 4-neighbouring pixels; list of pairs of int, sorted."""
    pairs = []
    for a, b in ((label[:, :-1], label[:, 1:]), (label[:-1], label[1:])):
        touch = (a != b) & (a > 0) & (b > 0)
        pairs.append(np.stack([np.minimum(a[touch], b[touch]), np.maximum(a[touch], b[touch])], axis=1))
    return np.unique(np.concatenate(pairs), axis=0).tolist()


def save_preview(dataset, train, mean_std, n=8):
    """`{save_dir}_preview.png`: augmented training samples of the first epoch; image, label and weight map each."""
    rng = np.random.default_rng(train['seed'])
    rows = []
    for index in rng.permutation(len(dataset))[:n]:
        image, weight, label = dataset[int(index), train['seed'], 0]
        grey = weight[0].clamp(0, 255).byte().numpy()
        rows.append([as_picture(image, mean_std), class_colours(label[0]), np.repeat(grey[..., None], 3, axis=2)])
    path = Path(train['save_dir'])
    path = path.with_name(f'{path.name}_preview.png')
    save_image(path, tile(rows))
    print(f'{len(rows)} samples in {path}: image, label (inside red, contour green), weight map')


def as_picture(image, mean_std):
    """uint8 (H, W, 3) of an image, float (3, H, W), which was normalised by mean_std, or, if that is None, was not."""
    if mean_std is not None:
        mean, std = (torch.as_tensor(values, dtype=torch.float32)[:, None, None] for values in mean_std)
        image = image * std + mean
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def class_colours(classes):
    """uint8 (H, W, 3), coloured as ternary labels: inside red, contour green, background blue. classes: (H, W) int."""
    palette = np.array([[0, 0, 255], [255, 0, 0], [0, 255, 0], *[[128] * 3] * 253], np.uint8)
    return palette[classes.numpy()]


def tile(rows, margin=4):
    """Pictures, uint8 (h, w, 3), in rows on white, the columns aligned by the widest."""
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
    """Image with contours of the objects, ternary label and weight map (if there is one) side by side, uint8 RGB."""
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
    """Write `contact_sheet_{split}.png` of every split. images: dicts with name, split and preview."""
    for part in dict.fromkeys(image['split'] for image in images):
        rows = [image for image in images if image['split'] == part][:CONTACT_SHEET_IMAGES]
        save_image(folder / f'contact_sheet_{part}.png', contact_sheet([row['name'] for row in rows],
                                                                       [row['preview'] for row in rows]))


def contact_sheet(names, previews, width=1808):
    """Previews, uint8 (PREVIEW_HEIGHT, W, 3), with their names, row by row; uint8 RGB."""
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
    """bool (H, W): the pixels with a 4-neighbour of another value; outside the image all is 0."""
    padded = np.pad(label_map, 1)
    on_edge = np.zeros(label_map.shape, dtype=bool)
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        on_edge |= neighbour != label_map
    return on_edge
