"""Joint transforms of (image, weight map, ternary label): a random transform draws once and changes all three alike.

They are Pillow images until `to_tensor`, tensors after it. A random transform has two methods: `draw` draws its
parameters from a NumPy generator, and `apply` applies them, so that tests can choose the parameters.
A new transform is a class here with an entry in TRANSFORMS. Its flag is an entry in TRANSFORM_PARSERS of
support/command_line.py, which has the order of application; the bounds of its value are in `_check_transforms` there.
With a value in TRANSFORM of options.py, whose order then counts, it is on by default.
"""
import functools

import cv2
import numpy as np
import torch
from PIL import Image
from scipy.interpolate import BSpline
from skimage.color import hed_from_rgb, rgb_from_hed
from skimage.morphology import disk
from torch.nn import functional as F

from support.script import InputError


class Compose:
    """Apply transforms one after the other to a list of images."""

    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, images, rng=None):
        """images: list of Pillow images of one size. rng: NumPy generator, by default seeded from torch's generator."""
        if rng is None:
            rng = np.random.default_rng(torch.randint(2 ** 63 - 1, ()).item())
        for transform in self.transforms:
            images = transform(images, rng)
        return images

    def __repr__(self):
        return f'Compose({", ".join(type(t).__name__ for t in self.transforms)})'


class Scale:
    """Resize bilinearly: the shorter side becomes `size` pixels, the longer one int(size * long / short)."""

    def __init__(self, size):
        self.size = size

    def __call__(self, images, rng):
        width, height = images[0].size
        if width < height:
            new = self.size, int(self.size * height / width)
        else:
            new = int(self.size * width / height), self.size
        return [image.resize(new, Image.BILINEAR) for image in images]


class RandomTransform:
    """Base of the random transforms: `draw(rng, (width, height))` once, then `apply(images, drawn)`."""

    def __call__(self, images, rng):
        return self.apply(images, self.draw(rng, images[0].size))


class RandomStain(RandomTransform):
    """Vary the strength of hematoxylin and eosin, and the brightness, of the first image; not in the paper.

    The optical density of a pixel, -log10(value / 255) in each of R, G, B, is a mixture of hematoxylin, eosin and a
    rest (the stains of skimage's rgb2hed). The density of either stain is multiplied by a factor uniform in
    1 +- strength, and a number uniform in +- offset is added. Then the image is multiplied by a factor uniform in
    1 +- brightness.
    """
    DENSITIES = -np.log10(np.maximum(np.arange(256), 1) / 255).astype(np.float32)           # 0 counts as 1

    def __init__(self, strength, offset, brightness):
        self.strength, self.offset, self.brightness = strength, offset, brightness

    def draw(self, rng, size):
        factors, offsets = 1 + rng.uniform(-self.strength, self.strength, 2), rng.uniform(-self.offset, self.offset, 2)
        return factors, offsets, 1 + rng.uniform(-self.brightness, self.brightness)

    def apply(self, images, drawn):
        factors, offsets, brightness = drawn
        # to stains, which change, and back to densities: one matrix and one vector
        matrix, vector = hed_from_rgb @ np.diag([*factors, 1]) @ rgb_from_hed, np.array([*offsets, 0]) @ rgb_from_hed
        densities = cv2.transform(self.DENSITIES[np.asarray(images[0])], np.column_stack([matrix.T, vector]))
        rgb = cv2.exp(densities * -np.log(10).astype(np.float32)) * np.float32(255 * brightness)
        return [Image.fromarray(rgb.round().clip(0, 255).astype(np.uint8)), *images[1:]]


class RandomResize(RandomTransform):
    """Resize bilinearly by a uniform factor in [lo, hi]; zero-pad smaller results to the old size, image centred."""

    def __init__(self, lo, hi):
        self.lo, self.hi = lo, hi

    def draw(self, rng, size):
        return rng.uniform(self.lo, self.hi)

    def apply(self, images, factor):
        return [self.resize(image, factor) for image in images]

    @staticmethod
    def resize(image, factor):
        width, height = image.size
        new_width, new_height = max(1, int(width * factor)), max(1, int(height * factor))
        resized = image.resize((new_width, new_height), Image.BILINEAR)
        if factor >= 1:
            return resized
        padded = Image.new(image.mode, (width, height))
        padded.paste(resized, ((width - new_width) // 2, (height - new_height) // 2))
        return padded


class RandomFlip(RandomTransform):
    """Mirror with probability 0.5."""

    def __init__(self, direction):
        self.method = {'horizontal': Image.FLIP_LEFT_RIGHT, 'vertical': Image.FLIP_TOP_BOTTOM}[direction]

    def draw(self, rng, size):
        return rng.random() < 0.5

    def apply(self, images, flip):
        return [image.transpose(self.method) for image in images] if flip else images


class RandomAffine(RandomTransform):
    """Affine map about the image centre, x' = a x + b y, y' = d x + e y; nearest neighbour, 0 outside the image.

    It maps output to input coordinates. a and e are uniform in 1 +- bound, b and d in +- bound.
    """

    def __init__(self, bound):
        self.bound = bound

    def draw(self, rng, size):
        a, b, d, e = rng.uniform(-self.bound, self.bound, 4)
        return np.array([[1 + a, b], [d, 1 + e]])

    def apply(self, images, matrix):
        (a, b), (d, e) = matrix
        width, height = images[0].size
        x0, y0 = width / 2, height / 2
        coefficients = (a, b, x0 - a * x0 - b * y0, d, e, y0 - d * x0 - e * y0)
        return [image.transform(image.size, Image.AFFINE, coefficients, Image.NEAREST) for image in images]


class RandomElastic(RandomTransform):
    """B-spline deformation of order 3 on an n x n mesh: (n + 3)^2 control points move by N(0, sigma) pixels.

    As in the published code, the first third of the parameter vector (all x, then all y) is 0, so that most points
    move in y only. The field maps output to input; linear interpolation, 0 outside the image, truncated to uint8.
    """

    def __init__(self, n, sigma):
        self.n, self.sigma = n, sigma

    def draw(self, rng, size):
        parameters = rng.normal(0, self.sigma, 2 * (self.n + 3) ** 2)
        parameters[:len(parameters) // 3] = 0
        return parameters

    def apply(self, images, parameters):
        width, height = images[0].size
        x, y = self.displacement(parameters, width, height).float()
        x = x * (2 / width) + ((2 * torch.arange(width) + 1) / width - 1)                              # -1 ... 1
        y = y * (2 / height) + ((2 * torch.arange(height) + 1) / height - 1)[:, None]
        inside = (x >= -1) & (x < 1) & (y >= -1) & (y < 1)
        points = torch.stack([x, y]).permute(1, 2, 0)

        bands = torch.from_numpy(np.stack([np.asarray(band) for image in images for band in image.split()]))
        warped = F.grid_sample(bands[None].float(), points[None], padding_mode='border', align_corners=False)[0]
        warped += 1e-3                  # else a whole number that was rounded down is truncated to the next lower one
        bands = iter([Image.fromarray(band) for band in warped.numpy().astype(np.uint8) * inside.numpy()])
        return [Image.merge(image.mode, [next(bands) for _ in image.getbands()]) for image in images]

    def displacement(self, parameters, width, height):
        """How far each pixel moves in x and y, in pixels: float64 (2, height, width)."""
        control_points = torch.from_numpy(parameters).reshape(2, self.n + 3, self.n + 3)
        return spline_weights(self.n, height) @ control_points @ spline_weights(self.n, width).T


@functools.lru_cache(256)
def spline_weights(n, size):
    """The weights of the n + 3 control points of a cubic B-spline at every pixel of a side: float64 (size, n + 3)."""
    places = (np.arange(size) + 0.625) * (n / (size + 0.25))     # 0 ... n; as in ITK, the mesh begins 1/8 pixel outside
    return torch.from_numpy(BSpline.design_matrix(places, np.arange(-3.0, n + 4), 3).toarray())


class RandomRotation(RandomTransform):
    """Rotate by a uniform angle in +- `degrees`; bilinear, same size, 0 outside the image."""

    def __init__(self, degrees):
        self.degrees = degrees

    def draw(self, rng, size):
        return rng.uniform(-self.degrees, self.degrees)

    def apply(self, images, angle):
        return [image.rotate(angle, Image.BILINEAR) for image in images]


class RandomCrop(RandomTransform):
    """Cut the same random `size` x `size` window out of every image. Raises InputError if an image is smaller."""

    def __init__(self, size):
        self.size = size

    def draw(self, rng, size):
        width, height = size
        if width < self.size or height < self.size:
            raise InputError(f'random_crop (input_size) is {self.size}, but an image is {width} x {height} pixels; '
                             f'make it smaller or the patches larger')
        return rng.integers(width - self.size + 1), rng.integers(height - self.size + 1)

    def apply(self, images, corner):
        x, y = corner
        return [image.crop((x, y, x + self.size, y + self.size)) for image in images]


class InsideBand:
    """Replace the RGB ternary label (last image) by its red band, inside. `LabelEncoding` needs no other band."""

    def __call__(self, images, rng):
        return [*images[:-1], images[-1].getchannel(0)]


class LabelEncoding:
    """From the RGB ternary label or its red band (last image) to classes: 0 background, 1 inside, 2 contour.

    The contour is computed from the transformed inside mask, inside = red > 127.5. It is the mask's dilation with the
    3x3 cross minus its erosion with a disk of `radius` pixels.
    """

    def __init__(self, radius):
        self.footprint = disk(radius)

    def __call__(self, images, rng):
        inside = (np.asarray(images[-1].getchannel(0)) > 127.5).astype(np.uint8)
        outer = cv2.dilate(inside, disk(1))         # both ignore what is outside the image
        inner = cv2.erode(inside, self.footprint)
        return [*images[:-1], Image.fromarray(np.where(outer > inner, np.uint8(2), inside))]


class ToTensor:
    """Turn the first `n` images into float32 tensors (C, H, W) in [0, 1], the others into int64 tensors (C, H, W)."""

    def __init__(self, n):
        self.n = n

    def __call__(self, images, rng):
        arrays = [np.atleast_3d(np.asarray(image)).transpose(2, 0, 1) for image in images]
        return [torch.from_numpy(array.astype(np.float32)) / 255 if i < self.n
                else torch.from_numpy(array.astype(np.int64)) for i, array in enumerate(arrays)]


class Normalize:
    """Normalise the first image, a float tensor (C, H, W), to (x - mean) / std for each channel."""

    def __init__(self, mean, std):
        self.mean = torch.as_tensor(np.asarray(mean), dtype=torch.float32)[:, None, None]
        self.std = torch.as_tensor(np.asarray(std), dtype=torch.float32)[:, None, None]

    def __call__(self, images, rng):
        return [(images[0] - self.mean) / self.std, *images[1:]]


TRANSFORMS = {
    'scale': Scale,
    'random_stain': lambda values: RandomStain(*values),
    'random_resize': lambda bounds: RandomResize(*bounds),
    'horizontal_flip': lambda _: RandomFlip('horizontal'),
    'vertical_flip': lambda _: RandomFlip('vertical'),
    'random_affine': RandomAffine,
    'random_elastic': lambda values: RandomElastic(*values),
    'random_rotation': RandomRotation,
    'random_crop': RandomCrop,
    'label_encoding': LabelEncoding,
    'to_tensor': ToTensor,
    'normalize': lambda mean_std: Normalize(*mean_std),
}


def get_transforms(params):
    """Build a Compose from a dict {name: value}, in its order, such as TRANSFORM['train'] of options.py.

    A transform with the value False is left out. Raises InputError for an unknown name.
    """
    unknown = [name for name in params if name not in TRANSFORMS]
    if unknown:
        raise InputError(f"unknown transform '{unknown[0]}'; expected one of {', '.join(TRANSFORMS)}")
    transforms = [TRANSFORMS[name](value) for name, value in params.items() if value is not False]
    return Compose([InsideBand(), *transforms] if 'label_encoding' in params else transforms)
