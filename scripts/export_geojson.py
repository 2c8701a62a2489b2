"""Turn the instance labels that test.py writes into GeoJSON, which QuPath opens as detections over the image.

    python scripts/export_geojson.py RESULTS [--out DIR] [--gzip] [--class-name Nucleus] [--offset X Y]
        [--downsample 1]

RESULTS is one {name}_seg.tiff or a folder of them ({set}_segmentation). Each becomes {name}.geojson (.geojson.gz with
--gzip), which replaces an earlier one. Outlines run along the pixel borders, so nothing of the label is lost. Where
{name}_objects.csv lies beside the label, its numbers become measurements of the objects. Coordinates are pixels of the
image, from its top left corner. For a region that was exported from a slide, --offset, where its corner
lies in the slide, moves the outlines there, and --downsample, by which it was shrunk, enlarges them; the measurements
stay those of the region.
"""
import csv
import gzip
import itertools
import json
import math
import sys
import uuid
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage import measure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.files import atomic_path
from support.images import read_instance_label
from support.script import InputError, Parser, run_script

LABEL_ENDING = '_seg.tiff'
TABLE_ENDING = '_objects.csv'


# Outlines

def outline(mask, top=0, left=0):
    """Rings of a 4-connected part, the coordinates of a GeoJSON polygon: [exterior, hole, hole, ...].

    mask: bool (h, w), not empty, whose first pixel is pixel (top, left) of the image. A ring is a list of [x, y], the
    first repeated at the end; pixel (row, column) covers [column, column + 1] x [row, row + 1]. The signed area in
    (x, y) is positive for the exterior and negative for holes. Every point is a corner, no ring meets itself, and two
    rings share at most one point.
    """
    padded = np.pad(mask, 1)
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]      # around each grid point
    ends_here = (nw != sw) != (ne != se)           # a horizontal piece of outline ends here, or begins
    crossing = (nw == se) & (ne == sw) & (nw != ne)               # two pixels meet by this corner alone
    y, x = np.nonzero(ends_here | crossing)
    # A crossing is two points: the first ends the piece on its left, the second begins the one on its right. Thus in
    # row order points 2k and 2k + 1 are the ends of one horizontal piece, and in column order of one vertical piece.
    copies = 1 + crossing[y, x]
    second = np.arange(copies.sum()) - np.repeat(np.cumsum(copies) - copies, copies)
    y, x = np.repeat(y, copies), np.repeat(x, copies)
    # At a crossing a ring turns around a background pixel, never around a pixel of the part. The two background pixels
    # are cut off from each other by the part, so that they belong to different rings, and no ring comes back here.
    lower = np.where(crossing[y, x] & nw[y, x], 1 - second, second)
    order = np.lexsort((lower, y, x))
    vertical = np.empty_like(order)
    vertical[order] = order.reshape(-1, 2)[:, ::-1].ravel()

    rightwards = se[y[::2], x[::2]]                # the part lies below the piece: (x, y) areas come out positive
    starts = np.arange(0, len(y), 2) + ~rightwards
    points = np.column_stack([x + left, y + top]).tolist()
    vertical = vertical.tolist()
    rings, seen = [], set()
    for first in starts.tolist():                  # the first point of the top row is on the exterior
        if first in seen:
            continue
        ring, start = [], first
        while start not in seen:
            seen.add(start)
            end = start ^ 1
            ring += [points[start], points[end]]
            start = vertical[end]
        rings.append([*ring, ring[0]])
    return rings


def object_outlines(label, offset=(0, 0), downsample=1):
    """Yield (id, area in pixels, [rings of `outline` for each 4-connected part]) in order of ids.

    label: int (H, W). offset: (x, y) of its top left corner in the slide. downsample: pixels of the slide to one of the
    label, in each direction.
    """
    parts, count = measure.label(label, background=0, connectivity=1, return_num=True)
    owner = np.zeros(count + 1, dtype=label.dtype)
    owner[parts.ravel()] = label.ravel()
    boxes = ndimage.find_objects(parts)
    in_order = (np.argsort(owner[1:], kind='stable') + 1).tolist()
    for number, group in itertools.groupby(in_order, key=lambda part: int(owner[part])):
        area, polygons = 0, []
        for part in group:
            rows, columns = boxes[part - 1]
            mask = parts[rows, columns] == part
            area += int(mask.sum())
            rings = outline(mask, rows.start, columns.start)
            polygons.append([[[x * downsample + offset[0], y * downsample + offset[1]] for x, y in ring]
                             for ring in rings])
        yield number, area, polygons


# Measurements

def read_measurements(path):
    """{id: {column: number}} of a table of objects; a cell without a finite number is left out.

    A column that has text in it is no measurement. Raises InputError if the file is damaged, has no column `id`, an id
    that is no integer, or one id twice.
    """
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            rows = list(csv.DictReader(file, restkey='', restval='', strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f'{path} is not a table of objects ({error}); run test.py again') from error
    if not rows:
        return {}
    if 'id' not in rows[0]:
        raise InputError(f'{path} has the columns {", ".join(rows[0])}; expected one named id; run test.py again')
    columns = [name for name in rows[0] if name and all(_is_number(row[name]) for row in rows if row[name])]
    table = {}
    for row in rows:
        number = int(row['id']) if row['id'].isdecimal() else None
        if number is None or number in table:
            raise InputError(f'{path} has {"two rows" if number in table else "a row"} with the id "{row["id"]}"; '
                             f'expected one row for each object, with its integer id; run test.py again')
        values = {name: float(row[name]) for name in columns if row[name]}
        table[number] = {name: int(value) if value.is_integer() else value
                         for name, value in values.items() if math.isfinite(value)}
    return table


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


# GeoJSON

def features(label, name, class_name='Nucleus', table=None, source='the label', offset=(0, 0), downsample=1):
    """Yield one QuPath detection, a GeoJSON feature as a dict, for each object of a label, int (H, W), by its id.

    name: of the image; with an object's id it fixes the feature's UUID. table: more measurements, `read_measurements`
    of the file `source`. offset, downsample: of `object_outlines`. Raises InputError if label and table
    are not of the same objects.
    """
    missing = set(table or ())
    for number, area, polygons in object_outlines(label, offset, downsample):
        measured = {} if table is None else table.get(number)
        if measured is None or measured.get('area', area) != area:
            found = 'no row for it' if measured is None else f'the area {measured["area"]}'
            raise InputError(f'{name}{LABEL_ENDING} has an object {number} of {area} pixels, {source} has {found}; '
                             f'they are of different runs: run test.py again, or move the table away')
        missing.discard(number)
        single = len(polygons) == 1
        yield {
            'type': 'Feature',
            'id': str(uuid.uuid5(uuid.NAMESPACE_URL, f'{name}/{number}')),
            'geometry': {'type': 'Polygon' if single else 'MultiPolygon',
                         'coordinates': polygons[0] if single else polygons},
            'properties': {'objectType': 'detection', 'name': str(number), 'classification': {'name': class_name},
                           'measurements': {'id': number, 'area': area, **measured}},
        }
    if missing:
        raise InputError(f'{source} has a row for object {min(missing)}, {name}{LABEL_ENDING} has no such object; '
                         f'they are of different runs: run test.py again, or move the table away')


def write_geojson(path, collection):
    """Write features (dicts) as a FeatureCollection, one on a line; compressed if `path` ends in .gz.

    Returns the number of features. The same features make the same bytes.
    """
    count = 0
    with atomic_path(path) as temporary, open(temporary, 'wb') as plain:
        # a gzip header would hold the time and the name of the temporary file
        packed = gzip.GzipFile('', 'wb', 6, plain, mtime=0) if Path(path).suffix == '.gz' else plain
        with packed as file:
            file.write(b'{"type":"FeatureCollection","features":[')
            for count, feature in enumerate(collection, start=1):
                line = json.dumps(feature, separators=(',', ':'), allow_nan=False)
                file.write((',\n' if count > 1 else '\n').encode() + line.encode())
            file.write(b'\n]}\n')
    return count


def number(word):
    """A number, whole if it can be: outlines then stay whole numbers."""
    value = float(word)
    return int(value) if value.is_integer() else value


def result_files(results):
    """The label file `results`, or those in the folder `results`, sorted. Raises InputError if there is none."""
    results = Path(results)
    if results.is_dir():
        names = sorted(path.name for path in results.iterdir() if not path.name.startswith('.'))
        files = [results / name for name in names if name.endswith(LABEL_ENDING)]
        if not files:
            seen = ', '.join(names[:5]) or 'an empty folder'
            raise InputError(f'no {{name}}{LABEL_ENDING} in {results}: saw {seen}; '
                             f'give the {{set}}_segmentation folder that test.py writes')
        return files
    if not results.exists():
        raise InputError(f'no such file or folder: {results}; give the {{set}}_segmentation folder that test.py writes')
    if not results.name.endswith(LABEL_ENDING):
        raise InputError(f'expected a file named {{name}}{LABEL_ENDING}, or a folder of them, found {results}')
    return [results]


def main(argv=None):
    parser = Parser(prog='scripts/export_geojson.py',
                    description='Turn the instance labels of test.py into GeoJSON for QuPath.')
    parser.add_argument('results', help=f'a {{name}}{LABEL_ENDING}, or a folder of them: {{set}}_segmentation')
    parser.add_argument('--out', help='folder to write to (default: the one of the labels)')
    parser.add_argument('--gzip', action='store_true', help='write {name}.geojson.gz, about a fifth of the size')
    parser.add_argument('--class-name', default='Nucleus', help='class of the objects in QuPath (default: %(default)s)')
    parser.add_argument('--offset', type=int, nargs=2, default=(0, 0), metavar=('X', 'Y'),
                        help='pixels: where the top left corner of the image lies in its slide (default: 0 0)')
    parser.add_argument('--downsample', type=number, default=1, metavar='F',
                        help='by which the image was shrunk when it was exported from its slide, such as 2 or 4 '
                             '(default: 1)')
    args = parser.parse_args(argv)
    if not 0 < args.downsample < math.inf:
        raise InputError(f'--downsample is {args.downsample}; expected a number above 0, such as 2')
    if not args.class_name.strip():
        raise InputError('--class-name is empty; expected the name of a class, such as Nucleus')

    files = result_files(args.results)
    if any(args.offset) and len(files) > 1:
        raise InputError(f'--offset is that of one image, and {args.results} holds {len(files)} labels; give one')
    out = Path(args.out or files[0].parent)
    if out.exists() and not out.is_dir():
        raise InputError(f'--out is {out}, a file; expected a folder')
    count = 0
    for path in tqdm(files, desc='GeoJSON', unit='image', disable=None):
        name = path.name.removesuffix(LABEL_ENDING)
        source = path.with_name(name + TABLE_ENDING)
        table = read_measurements(source) if source.exists() else None
        label = read_instance_label(path, max_megapixels=math.inf)
        collection = features(label, name, args.class_name, table, source, args.offset, args.downsample)
        count += write_geojson(out / f'{name}.geojson{".gz" * args.gzip}', collection)
    print(f'{count} objects of {len(files)} labels written to {out}')


if __name__ == '__main__':
    run_script(main)
