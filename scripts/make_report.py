"""One page to look through a result of test.py: settings, scores, overlays and histograms of the objects.

    python scripts/make_report.py RESULTS [--out report.html]

RESULTS: the save_dir of test.py. The page is one file that needs no network: pictures, style and script are inside.
"""
import base64
import csv
import io
import json
import math
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.files import write_text  # noqa: E402
from support.images import read_image  # noqa: E402
from support.script import InputError, Parser, run_script  # noqa: E402

LARGEST_SIDE = 1600              # pixels of an embedded overlay; nuclei at 40x stay legible, a page of 50 images opens
JPEG_QUALITY = 80
BINS = 40                        # of the area histogram, at most, and the one of all larger objects
DASH = '–'                       # shown where there is no number
AGAIN = 'run test.py again'

# rows of the short settings table: what a reader is told, and where it is in test_options.json
SETTINGS = (
    ('data set', 'dataset'),
    ('checkpoint', 'test.model_path'),
    ('network', 'model.name'),
    ('layers of a block', 'model.n_layers'),
    ('growth rate', 'model.growth_rate'),
    ('test-time augmentation', 'test.tta'),
    ('patch size, px (0: whole image)', 'test.patch_size'),
    ('patch overlap, px', 'test.overlap'),
    ('colours of the training images', 'test.color_norm'),
    ('enlarged by', 'test.scale_factor'),
    ('smallest object, px', 'post.min_area'),
    ('dilation radius, px', 'post.radius'),
    ('threshold on the inside probability (0: most likely class)', 'post.inside_threshold'),
    ('objects split at maxima that stand out by (0: not)', 'post.h_maxima'),
)


def main(argv=None):
    parser = Parser(prog='scripts/make_report.py', description='One HTML page about a result of test.py.')
    parser.add_argument('results', metavar='RESULTS', help='save_dir of test.py')
    parser.add_argument('--out', help='the page [RESULTS/report.html]')
    args = parser.parse_args(argv)
    results = Path(args.results)
    out = Path(args.out) if args.out else results / 'report.html'

    page = report_page(results)
    write_text(out, page)
    print(f'report of {results} in {out} ({len(page.encode()) / 1e6:.1f} MB)')


# ---------------------------------------------------------------------------------------------------
# What test.py wrote
# ---------------------------------------------------------------------------------------------------

class Objects(NamedTuple):
    """The objects of one image: area, float (n,), pixels; iou, float (matched,), or None if there were no labels."""
    area: np.ndarray
    iou: np.ndarray | None


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


def read_json(path, keys):
    """The dict in a JSON file. Raises InputError if it is missing, damaged or has no dict at one of `keys`."""
    if not path.is_file():
        raise InputError(f'no {path}; expected the save_dir of test.py; {AGAIN}')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise InputError(f'{path} is not JSON, or is damaged ({error}); {AGAIN}') from error
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), dict):
            raise InputError(f"{path}: expected an object with an object '{key}'; {AGAIN}")
    return content


def read_metrics(path):
    """The content of a `{set}_metrics.json`, or None if there is no such file: there were no labels.

    Raises InputError for scores that are neither finite numbers nor null.
    """
    if not path.exists():
        return None
    metrics = read_json(path, ('definitions', 'images', 'mean', 'pooled'))
    for name, row in [*metrics['images'].items(), ('mean', metrics['mean']), ('pooled', metrics['pooled'])]:
        if not isinstance(row, dict):
            raise InputError(f"{path}: '{name}' is {json.dumps(row)}; expected an object of scores; {AGAIN}")
        for metric, value in row.items():
            if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
                raise InputError(f"{path}: {metric} of '{name}' is {json.dumps(value)}; "
                                 f'expected a number or null; {AGAIN}')
    return metrics


def read_objects(path):
    """The `Objects` of a `{name}_objects.csv`. Raises InputError that names the file and the line."""
    if not path.is_file():
        raise InputError(f'no {path}; {AGAIN}, or remove what else is there of this image')
    areas, ious = [], []
    with open(path, newline='', encoding='utf-8') as file:
        try:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            if 'area' not in columns:
                raise InputError(f"{path} has the columns {', '.join(columns) or 'none'}; expected 'area'; {AGAIN}")
            for row in rows:
                try:
                    areas.append(_finite(row['area']))
                    if row.get('matched_iou'):
                        ious.append(_finite(row['matched_iou']))
                except (TypeError, ValueError) as error:
                    raise InputError(f'{path}, line {rows.line_num}: expected numbers as area and matched_iou, '
                                     f'found {row["area"]!r} and {row.get("matched_iou")!r}; {AGAIN}') from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f'{path} is not a table of text, or is damaged ({error}); {AGAIN}') from error
    return Objects(np.array(areas, float), np.array(ious, float) if 'matched_iou' in columns else None)


def _finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def jpeg_uri(path):
    """(data URI, width, height) of an image file as JPEG, its longer side at most LARGEST_SIDE. Raises InputError."""
    image = Image.fromarray(read_image(path, max_megapixels=math.inf))        # test.py had its limit
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=JPEG_QUALITY, subsampling=0, optimize=True)   # subsampling blurs thin contours
    return 'data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode(), image.width, image.height


# ---------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------

def report_page(results):
    """The whole page, HTML text, about the folder `results`. Raises InputError for what is missing or damaged."""
    sets = find_sets(results)
    options = read_json(results / 'test_options.json', ('test',))
    sections = [set_section(results, number, set_name, names)
                for number, (set_name, names) in enumerate(sets.items(), start=1)]
    title = f'Segmentation report: {escape(str(options.get("dataset", ", ".join(sets))))}'
    links = ' '.join(f'<a href="#set-{number}">{escape(name)}</a>' for number, name in enumerate(sets, start=1))
    parts = [f'<h1>{title}</h1>', f'<nav aria-label="sets">{links}</nav>' if len(sets) > 1 else '',
             settings_section(options), *sections]
    return PAGE.format(title=title, style=STYLE, body='\n'.join(part for part in parts if part), script=SCRIPT)


def settings_section(options):
    """The settings that matter most, and all of them folded away."""
    flat = flatten(options)
    short = [(label, flat[key]) for label, key in SETTINGS if key in flat]
    return '\n'.join(['<section>', '<h2>Settings</h2>', _settings_table(short), '<details>',
                      f'<summary>All {len(flat)} options</summary>', _settings_table(flat.items()),
                      '</details>', '</section>'])


def flatten(options, prefix=''):
    """{'test.tta': 'full', ...}: the values of nested dicts as text, by their dotted path."""
    flat = {}
    for key, value in options.items():
        if isinstance(value, dict):
            flat |= flatten(value, f'{prefix}{key}.')
        elif isinstance(value, list):
            flat[prefix + key] = ' '.join(map(str, value)) or 'none'
        else:
            flat[prefix + key] = 'none' if value in (None, '') else str(value)
    return flat


def _settings_table(rows):
    lines = [f'<tr><th scope="row">{escape(label)}</th><td>{escape(value)}</td></tr>' for label, value in rows]
    return '\n'.join(['<div class="scroll"><table class="settings"><tbody>', *lines, '</tbody></table></div>'])


def set_section(results, number, set_name, names):
    """Everything about one set; `number` (from 1) makes the ids of its images unique in the page."""
    folder = results / f'{set_name}_segmentation'
    metrics = read_metrics(results / f'{set_name}_metrics.json')
    objects = {name: read_objects(folder / f'{name}_objects.csv') for name in names}
    links = {name: f'image-{number}-{i}' for i, name in enumerate(names, start=1)}
    total = pooled_objects(objects.values())

    parts = [f'<section id="set-{number}">', f'<h2>{escape(set_name)}</h2>',
             f'<p>{_count(len(names), "image")}, {_count(len(total.area), "object")}'
             f'{"" if metrics else "; not scored: there were no labels"}</p>']
    if metrics:
        parts.append(metric_table(metrics, links))
    parts += ['<h3>Images</h3>', '<div class="grid">',
              *(figure(folder / f'{name}_overlay.png', name, links[name], len(objects[name].area)) for name in names),
              '</div>', '<h3>Objects</h3>', '<div class="plots">', area_histogram(total.area)]
    if total.iou is not None:
        parts.append(iou_histogram(total.iou, len(total.area)))
    parts += ['</div>', object_table(objects, links, total), '</section>']
    return '\n'.join(parts)


def pooled_objects(objects):
    """The `Objects` of several images in one; iou is None if no image had labels."""
    objects = list(objects)
    ious = [image.iou for image in objects if image.iou is not None]
    return Objects(np.concatenate([image.area for image in objects]), np.concatenate(ious) if ious else None)


def figure(path, name, link, n_objects):
    """An overlay in the grid, as a button that opens it large."""
    uri, width, height = jpeg_uri(path)
    name = escape(name)
    return (f'<figure id="{link}"><button type="button" class="open" aria-label="Enlarge {name}">'
            f'<img src="{uri}" width="{width}" height="{height}" alt="{name} with the outlines of its objects">'
            f'</button><figcaption>{name}<br><small>{_count(n_objects, "object")}</small></figcaption></figure>')


def _count(number, noun):
    return f'{number} {noun}{"" if number == 1 else "s"}'


# ---------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------

def metric_table(metrics, links):
    """The scores of each image, and below them their mean and the pooled score. links: {image name: id of its figure}.

    Columns are all metrics of the file in the order in which they come.
    """
    rows = [*metrics['images'].items(), ('mean', metrics['mean']), ('pooled', metrics['pooled'])]
    columns = list(dict.fromkeys(metric for _, row in rows for metric in row))
    rows = [(name, [(row.get(metric), _decimals(row.get(metric))) for metric in columns]) for name, row in rows]
    definitions = metrics['definitions']
    listed = [f'<dt>{escape(metric)}</dt><dd>{escape(str(text))}</dd>' for metric, text in definitions.items()]
    return '\n'.join(['<h3>Scores</h3>', sortable_table('metrics', columns, definitions, rows[:-2], rows[-2:], links),
                      '<details>', '<summary>What the scores mean</summary>', '<dl>', *listed, '</dl>', '</details>'])


def object_table(objects, links, total):
    """Number and median area of the objects of each image, with labels also how many were matched; and of all."""
    columns = {'objects': 'number of objects', 'median area': 'pixels'}
    if total.iou is not None:
        columns |= {'matched': 'objects with a partner in the labels', 'median IoU': 'of the matched objects'}
    rows = []
    for name, (area, iou) in [*objects.items(), ('all', total)]:
        cells = [(len(area), str(len(area))), _median(area, 1)]
        if total.iou is not None:
            cells += [(None, DASH), (None, DASH)] if iou is None else [(len(iou), str(len(iou))), _median(iou, 4)]
        rows.append((name, cells))
    return sortable_table('objects', list(columns), columns, rows[:-1], rows[-1:], links)


def sortable_table(kind, columns, tooltips, rows, last_rows, links):
    """A table of numbers that the page's script sorts; `last_rows` are its foot and stay there.

    rows: [(name, [(value or None, text), ...]), ...]; a name in `links` leads to that id.
    """
    head = [_head_cell('image', ''), *(_head_cell(column, tooltips.get(column, '')) for column in columns)]
    return '\n'.join([
        f'<div class="scroll"><table class="sortable {kind}">', f'<thead><tr>{"".join(head)}</tr></thead>',
        '<tbody>', *(_number_row(name, cells, links.get(name)) for name, cells in rows), '</tbody>',
        '<tfoot>', *(_number_row(name, cells, None) for name, cells in last_rows), '</tfoot>', '</table></div>'])


def _head_cell(label, tooltip):
    title = f' title="{escape(str(tooltip))}"' if tooltip else ''
    return f'<th scope="col"{title}><button type="button">{escape(label)}</button></th>'


def _number_row(name, cells, link):
    name = f'<a href="#{link}">{escape(name)}</a>' if link else escape(name)
    cells = [f'<td data-value="{"" if value is None else repr(value)}">{text}</td>' for value, text in cells]
    return f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>'


def _decimals(value, digits=4):
    return DASH if value is None else f'{value:.{digits}f}'


def _median(values, digits):
    """(value, text) of a median; (None, a dash) of no values."""
    median = float(np.median(values)) if len(values) else None
    return median, _decimals(median, digits)


# ---------------------------------------------------------------------------------------------------
# Histograms
# ---------------------------------------------------------------------------------------------------

def area_histogram(area):
    """Histogram of areas, SVG in a figure. The last bin takes all larger objects: one clump may be as large as 50."""
    edges, is_open = area_bins(area)
    caption = 'Object area in pixels' + (f'; median {np.median(area):.0f}' if len(area) else '')
    return histogram(area, edges, is_open, caption, 'area, px')


def iou_histogram(iou, n_objects):
    """Histogram of the IoU of matched objects, SVG in a figure."""
    caption = f'IoU of matched objects; {len(iou)} of {n_objects} are matched'
    return histogram(iou, np.arange(21) / 20, False, caption, 'IoU')


def area_bins(area):
    """(edges, whether the last bin has no upper end): bins of a round width up to that of the 99th percentile."""
    if not len(area):
        return np.array([0.0, 1.0]), False
    upper = max(float(np.percentile(area, 99)), 1.0)
    width = round_step(upper / BINS)
    edges = np.arange(math.floor(upper / width) + 2) * width
    return edges, bool(area.max() > edges[-1])


def round_step(smallest):
    """The smallest of ..., 1, 2, 5, 10, 20, 50, ... that is at least `smallest`, and at least 1."""
    power = 10 ** max(math.floor(math.log10(smallest)), 0) if smallest > 0 else 1
    return next(step * power for step in (1, 2, 5, 10) if step * power >= smallest)


def histogram(values, edges, is_open, caption, label):
    """A figure with a bar for each bin that is not empty (its count in data-count and in a tooltip)."""
    width, height, left, right, top, bottom = 440, 240, 44, 14, 12, 42
    counts = np.histogram(np.minimum(values, edges[-1]), edges)[0]
    y_step = round_step(max(counts.max(), 1) / 4)
    y_max = y_step * math.ceil(max(counts.max(), 1) / y_step)

    def x(value):
        return left + (width - left - right) * value / edges[-1]

    def y(count):
        return height - bottom - (height - top - bottom) * count / y_max

    parts = []
    for tick in range(0, y_max + 1, y_step):
        parts.append(f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
                     f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for i, count in enumerate(counts.tolist()):
        if count:
            more = is_open and i == len(counts) - 1
            span = f'{edges[i]:g} or more' if more else f'{edges[i]:g} to {edges[i + 1]:g}'
            parts.append(f'<rect class="bar" data-count="{count}" x="{x(edges[i]) + 0.5:.1f}" y="{y(count):.1f}" '
                         f'width="{x(edges[i + 1]) - x(edges[i]) - 1:.1f}" height="{y(0) - y(count):.1f}">'
                         f'<title>{label} {span}: {_count(count, "object")}</title></rect>')
    every = max(1, math.ceil((len(edges) - 1) / 5))
    for edge in edges[::every]:
        parts.append(f'<text x="{x(edge):.1f}" y="{height - bottom + 17}" text-anchor="middle">{edge:g}</text>')
    note = f'; last bar: {edges[-2]:g} or more' if is_open else ''
    parts.append(f'<text x="{(left + width - right) / 2:.1f}" y="{height - 6}" text-anchor="middle">'
                 f'{label}{note}</text>')
    return '\n'.join([f'<figure class="histogram"><svg viewBox="0 0 {width} {height}" role="img" '
                      f'aria-label="Histogram. {caption}">', *parts,
                      f'</svg><figcaption>{caption}</figcaption></figure>'])


# ---------------------------------------------------------------------------------------------------
# Style and script
# ---------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --text: #1c2126; --soft: #5b6670; --page: #fff; --panel: #f3f5f7; --line: #d5dbe0;
        --accent: #1f6fb2; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --soft: #a3adb6; --page: #14181c; --panel: #1f252b; --line: #39424a; --accent: #6cb3ee; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--page); color: var(--text);
       font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); } h3 { margin-top: 1.6rem; }
a { color: var(--accent); } nav a { margin-right: 1rem; } small, figcaption { color: var(--soft); }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
details { margin: .8rem 0; } summary { cursor: pointer; } dt { font-weight: 600; } dd { margin: 0 0 .5rem 1rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); }
.settings th { text-align: left; font-weight: 400; color: var(--soft); vertical-align: top; min-width: 8rem; }
.settings td { min-width: 9rem; }
.sortable td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.sortable thead th { text-align: right; white-space: nowrap; background: var(--panel); }
.sortable thead button { font-weight: 600; }
.sortable thead button::after { content: "\\2195"; margin-left: .3em; color: var(--soft); font-weight: 400; }
.sortable [aria-sort=ascending] button::after { content: "\\2191"; color: var(--accent); }
.sortable [aria-sort=descending] button::after { content: "\\2193"; color: var(--accent); }
.sortable tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--page); font-weight: 400;
                              min-width: 8rem; max-width: 45vw; }
.sortable thead tr > :first-child, .sortable tfoot tr > :first-child { background: var(--panel); font-weight: 600; }
.sortable tfoot td { font-weight: 600; background: var(--panel); }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.plots { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 34rem));
         margin-bottom: 1rem; }
figure { margin: 0; min-width: 0; }
figure:target { outline: 3px solid var(--accent); outline-offset: 4px; }
.open { display: block; width: 100%; cursor: zoom-in; }
.open img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain;
            background: var(--panel); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--text); font-size: 13px; }
.rule { stroke: var(--line); } .bar { fill: var(--accent); }
dialog { border: 0; padding: .5rem; background: #14181c; color: #e4e8ec; max-width: 100vw; max-height: 100vh;
         cursor: zoom-out; text-align: center; }
dialog::backdrop { background: rgb(0 0 0 / 80%); }
dialog img { display: block; width: 94vw; height: 84vh; object-fit: contain; }
dialog p { margin: .4rem 0 0; } dialog button { padding: 0 .6rem; text-decoration: underline; }
"""

SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener('click', () => {
    const down = head.getAttribute('aria-sort') === 'ascending', sign = down ? -1 : 1;
    const value = row => row.cells[column].dataset.value, name = row => row.cells[0].textContent;
    const byName = (a, b) => name(a).localeCompare(name(b), 'en', {numeric: true});
    const byValue = (a, b) => {             // a dash is neither large nor small: it goes last both ways
      const missing = (value(a) === '') - (value(b) === '');
      return missing || sign * (value(a) - value(b)) || byName(a, b);
    };
    body.append(...[...body.rows].sort(column ? byValue : (a, b) => sign * byName(a, b)));
    heads.forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  }));
}
const dialog = document.querySelector('dialog'), large = dialog.querySelector('img');
for (const button of document.querySelectorAll('button.open')) {
  button.addEventListener('click', () => {
    const small = button.firstElementChild;
    large.src = small.src;
    large.alt = small.alt;
    dialog.querySelector('span').textContent = button.parentElement.querySelector('figcaption').firstChild.data;
    dialog.showModal();                     // Escape closes it, and the focus returns to the button
  });
}
dialog.addEventListener('click', () => dialog.close());
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
<main>
{body}
</main>
<dialog aria-label="image, large"><img alt=""><p><span></span> <button type="button">Close</button></p></dialog>
<script>{script}</script>
</body>
</html>
"""


if __name__ == '__main__':
    run_script(main)
