"""Instance labels drawn from annotations: ImageScope's and HALO's XML, QuPath's GeoJSON."""
import itertools
import math
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from skimage.draw import ellipse, polygon

from support.images import read_json
from support.script import InputError, note


def instance_label_from_xml(xml_path, height, width, layers=()):
    """Draw the regions of an Aperio ImageScope annotation (MoNuSeg's XML), or a HALO one, as an instance label.

    layers: names of the annotation layers to draw; all if empty. Returns int32 (height, width): 0 = background; an id
    is the position of its region in the document, from 1 (not the region's Id). A pixel in several regions belongs to
    the first of them. A negative region is a hole in the region that it overlaps most. Vertices may lie outside the
    image. The ids of regions without a pixel stay unused, and a note counts such regions. Raises InputError for a file
    that is not such XML, has a DTD (which could define entities), has no region, or none with a pixel, or has a
    coordinate that is not a finite number.
    """
    shape, name, regions = (height, width), Path(xml_path).name, read_xml_regions(xml_path)
    found = list(dict.fromkeys(region.layer for region in regions))
    if unknown := [layer for layer in layers if layer not in found]:
        raise InputError(f"{xml_path} has no layer '{unknown[0]}'; its layers are {', '.join(found)}")
    if len(found) > 1 and not layers:
        note(f'{name}: the regions of its layers {", ".join(found)} are all drawn; --xml-layers chooses')
    chosen = [(k, region) for k, region in enumerate(regions, 1) if not layers or region.layer in layers]
    objects = {k: region for k, region in chosen if not region.negative}
    if not objects:
        raise InputError(f'{xml_path} holds no region but negative ones, which are holes in others')
    holes = {}                                                           # number of an object -> bool (H, W)
    for hole in [region for _, region in chosen if region.negative]:
        in_hole = np.zeros(shape, bool)
        in_hole[_pixels_of_region(hole, shape)] = True
        number = max(objects, key=lambda k: np.count_nonzero(in_hole[_pixels_of_region(objects[k], shape)]))
        holes[number] = holes.get(number, False) | in_hole

    instances = np.zeros(shape, np.int32)
    for number, region in reversed(objects.items()):                     # the first region is drawn last and stays
        rows, columns = _pixels_of_region(region, shape)
        if number in holes:
            keep = ~holes[number][rows, columns]
            rows, columns = rows[keep], columns[keep]
        instances[rows, columns] = number
    report_lost(len(objects), 'regions', instances, xml_path)
    return instances


def report_lost(drawn, kind, instances, path):
    """Note how many of the `drawn` regions or polygons have no pixel in instances, int (H, W). None is an error."""
    lost = drawn - np.count_nonzero(np.unique(instances))
    if lost == drawn:
        height, width = instances.shape
        raise InputError(f'{path}: none of its {drawn} {kind} has a pixel in the image of {width} x {height}; the '
                         f'annotation may be of another image, or of another resolution')
    if lost:
        note(f'{Path(path).name}: {lost} of {drawn} {kind} have no pixel of their own: they have too few vertices, lie '
             f'outside the image or are hidden under an earlier one')


class Region(NamedTuple):
    """A region of an annotation."""
    vertices: list            # of (X, Y), float, pixels
    kind: str                 # its Type: a number in ImageScope, a word in HALO
    negative: bool            # a hole
    layer: str                # name of its annotation layer


def _pixels_of_region(region, shape):
    """(rows, columns) of the pixels in a region, both int (n,). shape: (H, W) of the image."""
    if not region.vertices:
        return np.zeros((2, 0), int)
    # Coordinates are 1-based pixel centres. Clipping at 1e9 pixels, larger than any image, avoids integer overflow.
    x, y = np.clip(np.array(region.vertices), -1e9, 1e9).T - 1
    if region.kind in ('2', 'Ellipse'):                                  # the vertices span its bounding box
        radii = (np.ptp(y) / 2, np.ptp(x) / 2)
        return ellipse((y.min() + y.max()) / 2, (x.min() + x.max()) / 2, *radii, shape)
    if region.kind in ('1', 'Rectangle') and len(x) == 2:
        x, y = x[[0, 1, 1, 0]], y[[0, 0, 1, 1]]
    if len(x) < 3:
        return np.zeros((2, 0), int)
    # the two small shifts treat pixels exactly on an edge nearly as MATLAB's poly2mask does
    return polygon(y + 1e-6, x + 2e-6, shape)


def read_xml_regions(xml_path):
    """The Regions of an ImageScope or HALO XML, in document order."""
    class WithoutDoctype(ElementTree.TreeBuilder):
        def doctype(self, *_):                                    # the parser calls this before it expands entities
            raise InputError(f'{xml_path} has a document type declaration (DTD), which could define entities; '
                             f'expected a plain ImageScope annotation: remove the declaration')
    try:
        root = ElementTree.parse(xml_path, ElementTree.XMLParser(target=WithoutDoctype())).getroot()
    except FileNotFoundError:
        raise InputError(f'no such file: {xml_path}') from None
    except InputError:
        raise
    except (ElementTree.ParseError, LookupError, ValueError) as error:       # the last two: unknown encodings
        raise InputError(f'{xml_path} is not well-formed XML ({error}); expected an ImageScope annotation') from None
    if root.tag != 'Annotations':
        raise InputError(f'{xml_path} is not an ImageScope annotation: expected Annotations/Annotation/Regions/'
                         f'Region/Vertices/Vertex, found the root element {root.tag}')
    regions = []
    for position, annotation in enumerate(root.findall('Annotation'), 1):
        layer = annotation.get('Name') or str(position)
        for region in annotation.findall('Regions/Region'):
            vertices = [*region.findall('Vertices/Vertex'), *region.findall('Vertices/V')]              # V: HALO
            regions.append(Region([_coordinates(vertex, xml_path, len(regions) + 1) for vertex in vertices],
                                  region.get('Type', ''), region.get('NegativeROA') == '1', layer))
    if not regions:
        raise InputError(f'{xml_path} holds no region; expected at least one in Annotations/Annotation/Regions')
    return regions


def _coordinates(vertex, xml_path, number):
    """(X, Y) of a vertex in region `number`. Raises InputError unless both are finite numbers."""
    try:
        x, y = float(vertex.attrib['X']), float(vertex.attrib['Y'])
        if math.isfinite(x) and math.isfinite(y):
            return x, y
    except (KeyError, ValueError):
        pass
    raise InputError(f'{xml_path}, region {number}: expected vertices with finite numbers X and Y, found '
                     f'{str(vertex.attrib)[:80]}')


def instance_label_from_geojson(path, height, width):
    """Draw the polygons of QuPath's GeoJSON (`.geojson`, `.json`, `.gz`) as an instance label, int32 (height, width).

    0 = background, else the measurement `id` of the feature where every one has its own, as those of export_geojson.py
    have, or else its position in the file counted from 1. A pixel belongs to a polygon that its centre lies in, and to
    the first of several. Coordinates are pixels, (0, 0) the outer corner of the first one. Features that are no polygon
    or get no pixel are counted in a note. Raises InputError for another file, and if no polygon has a pixel.
    """
    polygons = read_geojson_polygons(path)
    instances = np.zeros((height, width), np.int32)
    for number, parts in reversed(polygons):                             # the first one is drawn last and stays
        for rings in parts:
            rings = [np.clip(np.array(ring, float)[:, :2], -1e9, 1e9) for ring in rings]
            left, top = np.clip(np.floor(rings[0].min(0)), 0, (width, height)).astype(int)
            right, bottom = np.clip(np.ceil(rings[0].max(0)), 0, (width, height)).astype(int)
            inside = np.zeros((bottom - top, right - left), bool)        # of the box around the outer ring
            for ring in rings if inside.size else ():                    # a ring within another is a hole
                x, y = ring.T - 0.5
                rows, columns = polygon(y - top, x - left, inside.shape)
                inside[rows, columns] ^= True
            instances[top:bottom, left:right][inside] = number
    report_lost(len(polygons), 'polygons', instances, path)
    return instances


def read_geojson_polygons(path):
    """[(number, [[ring, ...] for each part])] of the polygons in a GeoJSON file; a ring is a list of [x, y]."""
    collection = read_json(path)
    features = collection.get('features', [collection]) if isinstance(collection, dict) else collection
    polygons, numbers, others = [], [], 0
    try:
        for feature in features:
            geometry = feature.get('geometry') or {}
            parts = {'Polygon': lambda c: [c], 'MultiPolygon': list}.get(geometry.get('type'))
            if parts is None:
                others += 1
                continue
            parts = [rings for rings in parts(geometry['coordinates']) if rings]            # an empty one has no pixel
            for ring in itertools.chain.from_iterable(parts):
                if len(ring) < 3 or min(map(len, ring)) < 2 or not np.isfinite(np.array(ring, float)[:, :2]).all():
                    raise ValueError
            polygons.append(parts)
            measurements = (feature.get('properties') or {}).get('measurements')
            numbers.append(measurements.get('id') if isinstance(measurements, dict) else None)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise InputError(f'{path}, feature {len(polygons) + others + 1}: expected a GeoJSON feature with a geometry of '
                         f'finite coordinates') from None
    if not polygons:
        raise InputError(f'{path} holds no polygon; expected a GeoJSON FeatureCollection, as QuPath exports it')
    if others:
        note(f'{Path(path).name}: {others} features are no polygons and were skipped')
    whole = all(isinstance(number, int) and 0 < number < 2 ** 31 for number in numbers)
    if not whole or len(set(numbers)) < len(numbers):
        numbers = range(1, len(polygons) + 1)
    return list(zip(numbers, polygons))
