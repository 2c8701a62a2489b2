"""One page to look through a result of test.py: settings, scores, overlays and histograms of the objects.

    python scripts/make_report.py RESULTS [--out report.html]

RESULTS: the save_dir of test.py. The page is one file that needs no network and no script. It has at most about 28 MB
of overlays: the more images there are, the smaller are their overlays. A click on an overlay enlarges it; its name
leads to the overlay of full size, where the page lies in RESULTS. In the table of a set the image of the lowest score
comes first.
"""
import base64
import csv
import io
import json
import math
import sys
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.files import write_text
from support.images import read_image
from support.results import refuse_mixed_results
from support.script import InputError, Parser, run_script

OVERLAY_BYTES = 28e6             # of all overlays in the page
LARGEST_SIDE = 1600              # pixels of an overlay; nuclei at 40x stay legible
FIRST_SCORES = ('published_AJI', 'aji', 'pq', 'published_F1', 'published_Dice', 'published_Hausdorff')
OBJECT_COLUMNS = {'objects': 'number of objects', 'median area': 'of the objects, in pixels',
                  'matched': 'objects with a partner in the labels', 'median IoU': 'of the matched objects'}
AGAIN = 'run test.py again'

# rows of the short settings table: what a reader is told, and where it is in test_options.json
SETTINGS = {
    'data set': 'dataset',
    'checkpoint': 'test.model_path',
    'network': 'model.name',
    'test-time augmentation': 'test.tta',
    'patch size, px (0: whole image)': 'test.patch_size',
    'patch overlap, px': 'test.overlap',
    'colours of the training images': 'test.color_norm',
    'enlarged by': 'test.scale_factor',
    'smallest object, px': 'post.min_area',
    'dilation radius, px': 'post.radius',
    'threshold on the inside probability (0: most likely class)': 'post.inside_threshold',
    'objects split at maxima that stand out by (0: not)': 'post.h_maxima',
}


def main(argv=None):
    parser = Parser(prog='scripts/make_report.py', description='One HTML page about a result of test.py.')
    parser.add_argument('results', metavar='RESULTS', type=Path, help='save_dir of test.py')
    parser.add_argument('--out', type=Path, help='the page [RESULTS/report.html]')
    args = parser.parse_args(argv)
    out = args.out or args.results / 'report.html'
    page = report_page(args.results)
    write_text(out, page)
    print(f'report of {args.results} in {out} ({len(page.encode()) / 1e6:.1f} MB)')


# What test.py wrote

def find_sets(results):
    """{set: [image names]} of the `{set}_segmentation` folders in `results`, both sorted. Raises InputError."""
    if not results.is_dir():
        raise InputError(f'no folder {results}; expected the save_dir of test.py')
    folders = sorted(path for path in results.iterdir() if path.is_dir() and path.name.endswith('_segmentation'))
    if not folders:
        raise InputError(f'{results} has no folder named *_segmentation; expected the save_dir of test.py, '
                         f'which was run with --save-flag True')
    sets = {}
    for folder in folders:
        # the union, so that an image of which test.py wrote only a part is an error and does not go missing
        names = {path.name.removesuffix(suffix) for path in folder.iterdir()
                 for suffix in ('_objects.csv', '_overlay.png', '_seg.tiff') if path.name.endswith(suffix)}
        if not names:
            raise InputError(f'{folder} is empty: expected the *_seg.tiff, *_overlay.png and *_objects.csv of '
                             f'test.py; {AGAIN}')
        sets[folder.name.removesuffix('_segmentation')] = sorted(names)
    return sets


def read(path, parse):
    """What `parse` makes of the text of a file. Raises InputError if the file is missing or not what it expects."""
    try:
        return parse(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise InputError(f'no {path}; expected the save_dir of test.py; {AGAIN}') from error
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(f'{path} is damaged, or test.py did not write it ({type(error).__name__}: {error}); '
                         f'{AGAIN}') from error


def parse_options(text):
    """{'test.tta': 'full', ...}: all options as text, by their dotted path."""
    flat = {}

    def add(options, prefix):
        for key, value in options.items():
            if isinstance(value, dict):
                add(value, f'{prefix}{key}.')
            else:
                value = ' '.join(map(str, value)) if isinstance(value, list) else value
                flat[prefix + key] = 'none' if value in (None, '') else str(value)
    add(json.loads(text), '')
    return flat


def parse_metrics(text):
    """Of a `{set}_metrics.json`: {image: scores}, {'mean' or 'pooled': scores}, {metric: definition}.

    scores: {metric: finite number or None}.
    """
    content = json.loads(text)
    means = {name: content[name] for name in ('mean', 'pooled')}
    for row in (*content['images'].values(), *means.values()):
        for metric, value in row.items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f'{metric} is {value}')
    return content['images'], means, dict(content['definitions'])


def parse_objects(text):
    """(areas, float (n,), pixels; IoUs, float (matched,), or None if there were no labels) of a `_objects.csv`."""
    rows = csv.DictReader(io.StringIO(text))
    objects = [(float(row['area']), row.get('matched_iou')) for row in rows]
    if 'area' not in (rows.fieldnames or []):
        raise KeyError('area')
    areas, ious = np.array([area for area, _ in objects]), np.array([float(iou) for _, iou in objects if iou])
    if not (np.isfinite(areas).all() and np.isfinite(ious).all()):
        raise ValueError('area or matched_iou is not finite')
    return areas, ious if 'matched_iou' in rows.fieldnames else None


# The page

def report_page(results):
    """The whole page, HTML text, about the folder `results`. Raises InputError for what is missing or damaged."""
    sets, metrics = find_sets(results), {}
    for set_name, names in sets.items():
        path = results / f'{set_name}_metrics.json'
        metrics[set_name] = read(path, parse_metrics) if path.exists() else ({}, {}, {})
        sets[set_name] = sorted(metrics[set_name][0]) or names         # those with scores, or all that are there
    refuse_mixed_results(results, sets)
    options = read(results / 'test_options.json', parse_options)
    n_bytes = OVERLAY_BYTES / sum(map(len, sets.values()))
    sections = [set_section(results, number, set_name, names, metrics[set_name], n_bytes)
                for number, (set_name, names) in enumerate(sets.items(), start=1)]
    title = f'Segmentation report: {escape(options.get("dataset", ", ".join(sets)))}'
    short = {label: options[key] for label, key in SETTINGS.items() if key in options}
    body = [f'<h1>{title}</h1>', '<h2>Settings</h2>', settings_table(short), '<details>',
            f'<summary>All {len(options)} options</summary>', settings_table(options), '</details>', *sections]
    return PAGE.format(title=title, style=STYLE, body='\n'.join(body))


def settings_table(rows):
    lines = [f'<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>' for label, value in rows.items()]
    return '\n'.join(['<table class="settings">', *lines, '</table>'])


def set_section(results, number, set_name, names, metrics, n_bytes):
    """All about one set. number: from 1, for the ids of its images. metrics: of `parse_metrics`, empty without scores.

    n_bytes: of each overlay in the page.
    """
    folder, (scores, means, definitions) = results / f'{set_name}_segmentation', metrics
    objects = {name: read(folder / f'{name}_objects.csv', parse_objects) for name in names}
    if not scores and any(ious is not None for _, ious in objects.values()):
        raise InputError(f'{folder} has objects that were compared with labels, and there is no '
                         f'{results / set_name}_metrics.json; {AGAIN} on all images, or with another --save-dir')
    links = {name: f'image-{number}-{i}' for i, name in enumerate(names, start=1)}
    area, iou = (np.concatenate([values for values in column if values is not None] or [[]])
                 for column in zip(*objects.values()))
    count = f'{len(names)} images, {len(area)} objects'
    explained = [f'<dt>{escape(metric)}</dt><dd>{escape(str(text))}</dd>' for metric, text in definitions.items()]
    return '\n'.join([
        f'<h2>{escape(set_name)}</h2>',
        f'<p>{count}, {len(iou)} of them matched</p>' if scores else f'<p>{count}; no scores: there were no labels</p>',
        score_table(scores, means, definitions, objects, links),
        *(['<details>', '<summary>What the scores mean</summary>', '<dl>', *explained, '</dl>', '</details>']
          if scores else []),
        f'<img class="plots" src="{histograms(area, iou)}" alt="histograms of area and IoU">', '<div class="grid">',
        *(figure(folder / f'{name}_overlay.png', name, links[name], n_bytes) for name in names), '</div>'])


def figure(path, name, link, n_bytes):
    uri, name = jpeg_uri(path, n_bytes), escape(name)
    return (f'<figure id="{link}" tabindex="0"><img src="{uri}" alt="{name} with the outlines of its objects">'
            f'<figcaption><a href="{quote(f"{path.parent.name}/{path.name}")}">{name}</a></figcaption></figure>')


def score_table(scores, means, definitions, objects, links):
    """A row for each image, that of the lowest score first, then their mean and the pooled scores.

    scores, means, definitions: of `parse_metrics`. objects: {image: of `parse_objects`}. links: {image: id}.
    """
    metrics = list(dict.fromkeys(metric for row in (*scores.values(), *means.values()) for metric in row))
    metrics.sort(key=lambda metric: FIRST_SCORES.index(metric) if metric in FIRST_SCORES else len(FIRST_SCORES))
    rows = []
    for name, (area, iou) in objects.items():
        of_objects = [len(area), median(area), *((None, None) if iou is None else (len(iou), median(iou)))]
        numbers = [scores.get(name, {}).get(metric) for metric in metrics] + of_objects
        rows.append((f'<a href="#{links[name]}">{escape(name)}</a>', numbers))
    if metrics:
        rows.sort(key=lambda row: math.inf if row[1][0] is None else row[1][0])
    rows += [(name, [row.get(metric) for metric in metrics] + [None] * len(OBJECT_COLUMNS))
             for name, row in means.items()]
    columns = {metric: definitions.get(metric, '') for metric in metrics} | OBJECT_COLUMNS
    head = ''.join(f'<th title="{escape(str(text))}">{escape(column)}</th>' for column, text in columns.items())
    lines = ['<div class="scroll"><table class="scores">', f'<tr><th>image</th>{head}</tr>']
    for name, numbers in rows:
        cells = ['–' if value is None else f'{value:.4f}' if isinstance(value, float) else str(value)
                 for value in numbers]
        lines.append(f'<tr><th>{name}</th>' + ''.join(f'<td>{cell}</td>' for cell in cells) + '</tr>')
    return '\n'.join([*lines, '</table></div>'])


def median(values):
    return float(np.median(values)) if len(values) else None


# Pictures

def data_uri(kind, content):
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def jpeg_uri(path, n_bytes):
    """Data URI of an image file as JPEG of at most `n_bytes` and LARGEST_SIDE. Raises InputError."""
    image = Image.fromarray(read_image(path, max_megapixels=math.inf))        # test.py had its limit
    side = min(LARGEST_SIDE, max(image.size))
    while True:
        small, buffer = image.copy(), io.BytesIO()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        small.save(buffer, 'JPEG', quality=70, subsampling=0)                 # subsampling blurs thin contours
        uri = data_uri('jpeg', buffer.getvalue())
        if len(uri) <= n_bytes or side < 32:
            return uri
        side = int(side * max(0.5, 0.95 * math.sqrt(n_bytes / len(uri))))


def histograms(area, iou):
    """Data URI of a picture: histograms of the areas and, if there are any, of the IoUs of the matched objects."""
    figure, buffer = Figure(figsize=(11, 3), layout='constrained'), io.BytesIO()
    left, right = figure.subplots(1, 2)
    largest = np.percentile(area, 99) if len(area) else 1                     # a clump may be as large as 50 objects
    left.hist(np.minimum(area, largest), bins=40)
    left.set_xlabel(f'area of the objects, pixels; last bar: {largest:.0f} or more')
    right.hist(iou, bins=20, range=(0, 1))
    right.set_xlabel('IoU of the matched objects')
    figure.savefig(buffer, format='png', dpi=80)
    return data_uri('png', buffer.getvalue())


STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 90rem; font: 1rem/1.45 system-ui, sans-serif;
       overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 90vh; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ccc; text-align: left; font-weight: 400; }
.scores td { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.scores th { background: #f3f5f7; overflow-wrap: normal; min-width: 4rem; }
.scores tr:first-child th { position: sticky; top: 0; z-index: 1; }
.scores tr > :first-child { position: sticky; left: 0; max-width: 40vw; overflow-wrap: anywhere; }
.plots, figure img { max-width: 100%; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
figure { margin: 0; cursor: zoom-in; }
figure:focus, figure:target { grid-column: 1 / -1; }
figure:focus img, figure:target img { width: 100%; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


if __name__ == '__main__':
    run_script(main)
