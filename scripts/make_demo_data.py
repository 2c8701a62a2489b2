"""Make a small synthetic H&E data set, to try the code without downloading anything.

    python scripts/make_demo_data.py OUT [--seed 0] [--train 6] [--val 2] [--test 2] [--size 500]

writes OUT/normalized/{name}.png (RGB), OUT/labels_instance/{name}_label.png (uint16 ids, 0 = background) and
OUT/split.json, the layout of the published Multi-Organ files that prepare_data.py reads. Seconds on one core.

The model, per image (each has its own seed, so it does not depend on how many are made):
  tissue   epithelium islands in fibrous stroma (smooth noise decides which), thick eosin bands, holes of bare glass;
  nuclei   star-shaped outlines (ellipse + low Fourier modes) of four kinds, grown one beside the other into clumps
           whose members touch but keep their own id; membrane, chromatin and nucleoli follow the outline;
  fakes    mucin smears, debris and red blood cells: as dark as nuclei, told apart by outline, size or colour;
  stain    hematoxylin and eosin amounts, paler in faded regions and images, become colours by the Beer-Lambert law
           (light = white * exp(-amount * stain vector)); then the microscope's blur and sensor noise.
Because nuclei touch, some are pale and some dark things are not nuclei, Otsu's threshold alone does badly
(scripts/demo_report.py: AJI about 0.3), while a small trained network does well.
"""
import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.files import save_image, write_text
from support.script import InputError, Parser, run_script

HEMATOXYLIN = np.array([0.74, 0.98, 0.58])      # optical density in (R, G, B) of one unit of stain
EOSIN = np.array([0.24, 0.80, 0.44])
RED_CELL = np.array([0.22, 0.95, 0.80])         # haemoglobin takes up eosin and turns it towards orange
WHITE = 243                                     # grey value of bare glass
SMALLEST_NUCLEUS = 40                           # pixels; what the border or a neighbour cuts below this is left out
CONNECTED = np.ones((3, 3), bool)               # 8-connected


class Kind(NamedTuple):
    """A kind of nucleus: (low, high) ranges from which each nucleus draws uniformly."""
    radius: tuple        # pixels, geometric mean of the half axes
    elongation: tuple    # long axis / short axis
    body: tuple          # hematoxylin inside
    membrane: tuple      # hematoxylin added along the outline
    grain: tuple         # amplitude of the chromatin texture
    nucleoli: int        # at most
    clump: int           # at most so many grow together


KINDS = {
    'vesicular': Kind((9.0, 14.0), (1.0, 1.5), (0.40, 0.75), (0.40, 0.75), (0.12, 0.25), 2, 9),
    'dense': Kind((7.0, 11.5), (1.0, 1.8), (0.80, 1.20), (0.10, 0.30), (0.12, 0.22), 1, 6),
    'lymphocyte': Kind((5.5, 7.0), (1.0, 1.25), (1.00, 1.40), (0.10, 0.20), (0.15, 0.25), 0, 22),
    'spindle': Kind((5.5, 7.5), (2.0, 3.2), (0.80, 1.15), (0.05, 0.20), (0.10, 0.20), 0, 1),
}
IN_EPITHELIUM = {'vesicular': 0.60, 'dense': 0.35, 'lymphocyte': 0.05}       # share of the clumps
IN_STROMA = {'spindle': 0.60, 'lymphocyte': 0.20, 'dense': 0.20}


# Noise and shapes

def smooth_noise(rng, size, sigma):
    """Gaussian random field (size, size) of mean 0 and standard deviation 1, smooth over about `sigma` pixels.

    `sigma` may be a (rows, columns) pair. The field wraps around at the image border.
    """
    spectrum = np.fft.rfft2(rng.standard_normal((size, size)))
    field = np.fft.irfft2(ndimage.fourier_gaussian(spectrum, sigma, n=size), s=(size, size))
    return (field - field.mean()) / field.std()


def soft_step(values, threshold, width):
    """Step of `values` from 0 to 1 at `threshold`, smooth over about `width`."""
    return 1 / (1 + np.exp((threshold - values) / width))


def star_shape(rng, size, centre, radius, elongation, angle, roughness):
    """Random star-shaped blob round `centre` (y, x) -> (window, t).

    window: the part of the image it may touch, a pair of slices; t: float array over it, the distance from the
    centre relative to the outline's in that direction (1 = on the outline).
    """
    long, short = radius * np.sqrt(elongation), radius / np.sqrt(elongation)
    reach = int(long * (1 + 2 * roughness)) + 3
    window = tuple(slice(max(0, int(c) - reach), min(size, int(c) + reach + 1)) for c in centre)
    y, x = np.ogrid[window]
    dy, dx = y - centre[0], x - centre[1]
    u, v = (dx * np.cos(angle) + dy * np.sin(angle)) / long, (dy * np.cos(angle) - dx * np.sin(angle)) / short
    outline = 1.0
    for mode in (2, 3, 4, 5):
        wave = np.cos(mode * np.arctan2(v, u) + rng.uniform(0, 2 * np.pi))
        outline = outline + roughness / mode * np.clip(rng.normal(), -2, 2) * wave
    return window, np.hypot(u, v) / outline


def largest_piece(mask):
    """The largest 8-connected component of a bool mask."""
    pieces, count = ndimage.label(mask, CONNECTED)
    return pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:]) if count > 1 else mask


def touches_another(label):
    """Bool (H, W): pixels of an object that have a pixel of another object among their 8 neighbours."""
    nearby_lowest = ndimage.minimum_filter(np.where(label > 0, label, label.max() + 1), footprint=CONNECTED)
    nearby_highest = ndimage.maximum_filter(label, footprint=CONNECTED)
    return (label > 0) & ((nearby_lowest != label) | (nearby_highest != label))


# The parts of an image

def make_tissue(rng, size):
    """The background -> dict of float (size, size) arrays.

    hematoxylin, eosin: amounts of stain; epithelium, glass: 0 to 1; fibre_angle: radians.
    """
    y, x = np.mgrid[:size, :size].astype(float)
    direction = rng.uniform(0, np.pi)
    along = x * np.cos(direction) + y * np.sin(direction)
    across = y * np.cos(direction) - x * np.sin(direction) + rng.uniform(12, 25) * smooth_noise(rng, size, 45)
    fibre_angle = np.arctan2(*np.gradient(across)) + np.pi / 2           # fibres are the lines of equal `across`
    fibres = sum(ndimage.map_coordinates(smooth_noise(rng, size, sigma), [across, along], order=1, mode='grid-wrap')
                 for sigma in ((1.5, 12), (5, 40)))
    cloud, grain = smooth_noise(rng, size, 25), smooth_noise(rng, size, 1.6)

    islands = smooth_noise(rng, size, 40) + 0.15 * smooth_noise(rng, size, 6)
    epithelium = soft_step(islands, rng.uniform(-0.3, 0.5), 0.12)
    holes = soft_step(smooth_noise(rng, size, 28) + 0.12 * smooth_noise(rng, size, 4), rng.uniform(1.5, 2.3), 0.05)
    clefts = soft_step(-fibres, rng.uniform(2.4, 3.4), 0.25) * (1 - epithelium)
    glass = np.maximum(holes, 0.8 * clefts)

    stroma_eosin = 0.44 + 0.055 * fibres + 0.06 * cloud + 0.03 * grain
    for _ in range(rng.integers(1, 4)):                                  # thick bands of collagen
        middle, width = across[tuple(rng.integers(0, size, 2))], rng.uniform(5, 14)
        stroma_eosin += rng.uniform(0.2, 0.5) * np.exp(-((across - middle) / width) ** 2) * (1 + 0.2 * fibres)
    epithelium_eosin = 0.38 + 0.06 * grain + 0.06 * cloud
    epithelium_hematoxylin = rng.uniform(0.06, 0.16) + 0.05 * grain
    hematoxylin = epithelium_hematoxylin * epithelium + (0.04 + 0.015 * fibres) * (1 - epithelium)
    eosin = epithelium_eosin * epithelium + stroma_eosin * (1 - epithelium)
    return {'hematoxylin': np.clip(hematoxylin, 0, None) * (1 - glass),
            'eosin': np.clip(eosin, 0.05, None) * (1 - glass),
            'epithelium': epithelium, 'glass': glass, 'fibre_angle': fibre_angle}


def place_nuclei(rng, tissue, count):
    """Grow clumps of nuclei until there are `count`, or no room.

    Returns label (H, W) int with ids 1, 2, ..., and for each id its (kind, window, t); see `star_shape`.
    """
    size = len(tissue['glass'])
    label, nuclei = np.zeros((size, size), int), []
    for _ in range(20 * count):
        seed = rng.integers(0, size, 2)
        shares = IN_EPITHELIUM if tissue['epithelium'][tuple(seed)] > 0.5 else IN_STROMA
        name = rng.choice(list(shares), p=list(shares.values()))
        kind = KINDS[name]
        clump = []                                                       # (centre, radius) of its members
        for _ in range(rng.integers(1, kind.clump + 1)):
            radius, angle, centre = rng.uniform(*kind.radius), rng.uniform(0, np.pi), seed.astype(float)
            if name == 'spindle':                                        # these lie along the fibres
                angle = tissue['fibre_angle'][tuple(seed)]
            if clump:
                neighbour, neighbour_radius = clump[rng.integers(len(clump))]
                distance, towards = (radius + neighbour_radius) * rng.uniform(0.95, 1.65), rng.uniform(0, 2 * np.pi)
                centre = neighbour + distance * np.array([np.sin(towards), np.cos(towards)])
            if centre.min() < 0 or centre.max() >= size or tissue['glass'][tuple(centre.astype(int))] > 0.3:
                continue
            window, t = star_shape(rng, size, centre, radius, rng.uniform(*kind.elongation), angle, roughness=0.1)
            free = largest_piece((t < 1) & (label[window] == 0))
            if free.sum() < max(0.85 * (t < 1).sum(), SMALLEST_NUCLEUS):
                continue
            nuclei.append((kind, window, t))
            label[window][free] = len(nuclei)
            clump.append((centre, radius))
            if len(nuclei) == count:
                return label, nuclei
    return label, nuclei


def stain_nuclei(rng, tissue, label, nuclei):
    """Draw the nuclei into the stain amounts of `tissue`, in place."""
    chromatin = np.clip(smooth_noise(rng, len(label), 1.5), -2, 2)
    for number, (kind, window, t) in enumerate(nuclei, start=1):
        inside = label[window] == number
        width = 1.3 / np.mean(kind.radius)                               # of the membrane: 1.3 pixels
        amount = rng.uniform(*kind.body) + rng.uniform(*kind.membrane) * np.exp(-((t - 1 + width) / width) ** 2)
        amount += rng.uniform(*kind.grain) * chromatin[window]
        middle = np.argwhere(inside & (t < 0.6))
        for _ in range(rng.integers(0, kind.nucleoli + 1)):
            y, x = middle[rng.integers(len(middle))]
            distance = np.hypot(*np.ogrid[-y:t.shape[0] - y, -x:t.shape[1] - x])
            amount += rng.uniform(0.4, 0.8) * soft_step(-distance, -rng.uniform(1.2, 2.4), 0.4)
        tissue['hematoxylin'][window][inside] = np.clip(amount, 0.05, None)[inside]
        tissue['eosin'][window][inside] = 0.25
    tissue['hematoxylin'][touches_another(label)] *= 0.25                # a light seam between touching nuclei


def add_fakes(rng, tissue, label):
    """Add what a threshold takes for nuclei: smears and debris to `tissue`, in place; -> amount of red cell (H, W)."""
    size = len(label)
    per_image = (size / 500) ** 2                                        # the means below are for 500 x 500 pixels
    dark, red = np.zeros((size, size)), np.zeros((size, size))
    wisps = smooth_noise(rng, size, (3, 5))

    def blob(centre, radius, elongation, roughness):
        return star_shape(rng, size, centre, rng.uniform(*radius), rng.uniform(1, elongation), rng.uniform(0, np.pi),
                          roughness)

    for _ in range(rng.poisson(3.5 * per_image)):                        # mucin smears: large, wispy, no outline
        window, t = blob(rng.uniform(0, size, 2), (14, 34), 3, 0.3)
        dark[window] += rng.uniform(0.4, 0.9) * soft_step(-t, -0.75, 0.1) * np.clip(1 + 0.25 * wisps[window], 0, 2)
    for _ in range(rng.poisson(25 * per_image)):                         # debris: smaller than any nucleus
        window, t = blob(rng.uniform(0, size, 2), (1.2, 3.2), 2, 0.2)
        dark[window] += rng.uniform(0.7, 1.4) * (t < 1)
    for _ in range(rng.poisson(4 * per_image)):                          # groups of red blood cells, pale in the middle
        group = rng.uniform(0, size, 2)
        for _ in range(rng.integers(3, 14)):
            window, t = blob(np.clip(group + rng.normal(0, 14, 2), 0, size - 1), (4.5, 6.0), 1.4, 0.06)
            red[window] = np.maximum(red[window], rng.uniform(0.7, 1.1) * (0.65 + 0.35 * t) * (t < 1))
    red[label > 0] = 0
    tissue['hematoxylin'] += dark * (label == 0) * (1 - tissue['glass'])
    tissue['eosin'][red > 0] = 0.1
    return red


def make_image(rng, size):
    """One image, uint8 (size, size, 3), and its instance label, uint16 (size, size)."""
    tissue = make_tissue(rng, size)
    label, nuclei = place_nuclei(rng, tissue, max(2, round(rng.uniform(80, 120) * (size / 500) ** 2)))
    stain_nuclei(rng, tissue, label, nuclei)
    red = add_fakes(rng, tissue, label)

    faded = rng.random() < 0.25
    strength = rng.uniform(0.5, 0.65) if faded else rng.uniform(0.85, 1.1)
    strength = strength * (1 - 0.3 * soft_step(smooth_noise(rng, size, 50), rng.uniform(0.3, 1.0), 0.25))
    density = np.zeros((size, size, 3))
    for amount, vector in ((tissue['hematoxylin'], HEMATOXYLIN), (tissue['eosin'], EOSIN), (red, RED_CELL)):
        density += (strength * amount)[..., None] * vector * rng.normal(1, 0.04, 3)          # stains vary by batch
    blur = rng.uniform(0.7, 1.0)
    light = ndimage.gaussian_filter(np.exp(-density), (blur, blur, 0))
    noise = ndimage.gaussian_filter(rng.normal(0, 6, light.shape), (0.5, 0.5, 0))            # in grey values
    return np.clip(np.rint(WHITE * light + noise), 0, 255).astype(np.uint8), label.astype(np.uint16)


def make_gland_image(rng, size):
    """Four glands in stroma, uint8 (size, size, 3): nuclei in the wall, pale cytoplasm, an empty lumen."""
    tissue, grain = make_tissue(rng, size), smooth_noise(rng, size, 2)
    for centre in np.array([(0.27, 0.27), (0.30, 0.75), (0.74, 0.30), (0.70, 0.72)]) * size:
        window, t = star_shape(rng, size, centre, rng.uniform(0.14, 0.18) * size, rng.uniform(1, 1.4),
                               rng.uniform(0, np.pi), roughness=0.06)
        parts = [t < 0.35, (t > 0.72) & (t < 1) & (grain[window] > -0.5), t < 1]           # lumen, nuclei, the rest
        for stain, amounts in (('hematoxylin', (0.02, 0.9, 0.12)), ('eosin', (0.02, 0.3, 0.45))):
            tissue[stain][window] = np.select(parts, amounts, tissue[stain][window])
    density = tissue['hematoxylin'][..., None] * HEMATOXYLIN + tissue['eosin'][..., None] * EOSIN
    light = ndimage.gaussian_filter(np.exp(-density), (0.8, 0.8, 0))
    return np.clip(np.rint(WHITE * light + rng.normal(0, 3, light.shape)), 0, 255).astype(np.uint8)


# The data set

def clear_earlier_output(out):
    """Remove the demo images and labels in the folder `out`; raises InputError if anything else is there."""
    name = r'demo_(train|val|test)_\d+'
    ours = re.compile(rf'normalized/{name}\.png|labels_instance/{name}_label\.png|'
                      r'(normalized/|labels_instance/)?\.tmp_[0-9a-f]{32}\.\w+')
    files = [path for path in sorted(out.rglob('*')) if not path.is_dir()]
    made = [path for path in files if ours.fullmatch(path.relative_to(out).as_posix())]
    made += [out / 'split.json'] if made else []
    for path in files:
        if path not in made:
            raise InputError(f'{path} was not made by this script; name an empty or new folder instead of {out}')
    for path in made:
        path.unlink(missing_ok=True)


def make_data_set(out, counts, size, seed):
    """Write the data set to the folder `out`. counts: images per split, {'train': 6, 'val': 2, 'test_same': 2}."""
    out = Path(out)
    clear_earlier_output(out)
    split = {}
    for split_number, (split_name, count) in enumerate(counts.items()):
        split[split_name] = [f'demo_{split_name.split("_")[0]}_{i + 1:02d}' for i in range(count)]
        for i, name in enumerate(split[split_name]):
            image, label = make_image(np.random.default_rng([seed, split_number, i]), size)
            save_image(out / 'normalized' / f'{name}.png', image)
            save_image(out / 'labels_instance' / f'{name}_label.png', label)
            print(f'{name}: {label.max()} nuclei')
    write_text(out / 'split.json', json.dumps(split, indent=1) + '\n')


def main(argv=None):
    parser = Parser(prog='scripts/make_demo_data.py', description='Make a small synthetic H&E data set.',
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('out', help='folder to write; new, empty, or from an earlier run (which is replaced)')
    parser.add_argument('--seed', type=int, default=0, help='another seed, other images')
    parser.add_argument('--train', type=int, default=6, help='number of training images')
    parser.add_argument('--val', type=int, default=2, help='number of validation images')
    parser.add_argument('--test', type=int, default=2, help='number of test images')
    parser.add_argument('--size', type=int, default=500, help='height and width, pixels')
    args = parser.parse_args(argv)
    for name, low, high in (('seed', 0, 2**32 - 1), ('train', 1, 999), ('val', 1, 999), ('test', 1, 999),
                            ('size', 64, 4000)):
        if not low <= getattr(args, name) <= high:
            raise InputError(f'--{name} is {getattr(args, name)}; expected {low} to {high}')
    make_data_set(args.out, {'train': args.train, 'val': args.val, 'test_same': args.test}, args.size, args.seed)
    print(f'wrote {args.train} + {args.val} + {args.test} images to {args.out}')


if __name__ == '__main__':
    run_script(main)
