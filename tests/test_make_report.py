"""The report about a result of test.py: right numbers, nothing from outside, names that are no HTML, clear errors."""
import base64
import csv
import io
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from scripts import make_report
from support.files import save_image, save_instances
from support.script import InputError

VOID = {'meta', 'img', 'br', 'link', 'input', 'hr'}
ODD = 'a<b>&"quoted" \'x\''                       # a file may be called this
SCORES = {
    'definitions': {'Dice': 'twice the common pixels / the pixels of both', 'AJI': 'aggregated <Jaccard> & "index"'},
    'images': {'plain': {'Dice': 0.81234567, 'AJI': None}, ODD: {'Dice': 0.7, 'AJI': 0.51239}},
    'mean': {'Dice': 0.75617, 'AJI': 0.51239},
    'pooled': {'Dice': 0.76, 'AJI': None, 'PQ': 0.4},
}
COLUMNS = ['id', 'centroid_y', 'centroid_x', 'bbox_top', 'bbox_left', 'bbox_bottom', 'bbox_right', 'area', 'perimeter',
           'eccentricity', 'solidity', 'mean_inside_probability']


class Node:
    def __init__(self, tag, attributes, parent=None):
        self.tag, self.attributes, self.parent, self.children, self.text = tag, attributes, parent, [], ''

    def find_all(self, tag, **attributes):
        """Descendants with this tag and these attributes, in order; `class_` is one of the classes."""
        found = []
        for child in self.children:
            if (not tag or child.tag == tag) and all(
                    value in (child.attributes.get('class') or '').split() if name == 'class_'
                    else child.attributes.get(name) == value for name, value in attributes.items()):
                found.append(child)
            found += child.find_all(tag, **attributes)
        return found

    def all_text(self):
        return self.text + ''.join(child.all_text() for child in self.children)


class Tree(HTMLParser):
    """Parses a page strictly: every element is closed, in the order of its nesting."""

    def __init__(self, page):
        super().__init__()
        self.root = self.now = Node('', {})
        self.feed(page)
        self.close()
        assert self.now is self.root, f'<{self.now.tag}> is not closed'

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f'<{tag}> has an attribute twice'
        node = Node(tag, dict(attributes), self.now)
        self.now.children.append(node)
        if tag not in VOID:
            self.now = node

    def handle_startendtag(self, tag, attributes):
        self.now.children.append(Node(tag, dict(attributes), self.now))

    def handle_endtag(self, tag):
        assert tag == self.now.tag, f'</{tag}> closes <{self.now.tag}>'
        self.now = self.now.parent

    def handle_data(self, text):
        self.now.text += text


def write_objects(path, areas, ious=None):
    """A table as test.py writes it; an iou of None is an object without a partner."""
    with open(path, 'w', newline='') as file:
        table = csv.DictWriter(file, COLUMNS + ['matched_id', 'matched_iou'] * (ious is not None))
        table.writeheader()
        for i, area in enumerate(areas):
            row = {column: 1.5 for column in COLUMNS} | {'id': i + 1, 'area': area}
            if ious is not None:
                row |= {'matched_id': '', 'matched_iou': ''} if ious[i] is None else \
                    {'matched_id': i + 7, 'matched_iou': ious[i]}
            table.writerow(row)


def write_image(folder, name, areas, ious=None, size=(40, 60)):
    """The files of one image; its overlay, (H, W) `size`, is of one colour."""
    label = np.zeros(size, int)
    label[2:9, 3:9] = 1
    save_image(folder / f'{name}_overlay.png', np.full((*size, 3), (200, 40, 120), np.uint8))
    save_instances(folder / f'{name}_seg.tiff', label)
    save_image(folder / f'{name}_seg_colored.png', np.zeros((*size, 3), np.uint8))
    write_objects(folder / f'{name}_objects.csv', areas, ious)


def write_results(root, labelled=True, set_name='test_same'):
    """A result of two images: 200 objects with one large clump among them, and none."""
    rng = np.random.default_rng(0)
    areas = [*rng.integers(20, 600, 199).tolist(), 30000]
    ious = [None if i % 4 == 0 else round(float(rng.uniform(0, 1)), 6) for i in range(199)] + [1.0]
    folder = root / f'{set_name}_segmentation'
    folder.mkdir(parents=True)
    write_image(folder, ODD, areas, ious if labelled else None)
    write_image(folder, 'plain', [], [] if labelled else None, size=(10, 2000))
    options = {'dataset': 'MultiOrgan', 'model': {'name': 'FullNet', 'dilations': [1, 2]},
               'test': {'model_path': '<best>.pth.tar', 'tta': 'flips', 'patch_size': 208, 'scale_16bit': None},
               'post': {'min_area': 20}, 'transform': {'test': {'normalize': True}}}
    (root / 'test_options.json').write_text(json.dumps(options))
    if labelled:
        (root / f'{set_name}_metrics.json').write_text(
            json.dumps({'dataset': 'MultiOrgan', 'set': set_name, **SCORES}))
    return root


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """A labelled result with its report.html. Tests that change it take a copy."""
    root = write_results(tmp_path_factory.mktemp('report') / 'results')
    make_report.main([str(root)])
    return root


@pytest.fixture(scope='module')
def page(results):
    return (results / 'report.html').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def tree(page):
    return Tree(page).root


def rows(table, part):
    """[[text of each cell], ...] of 'thead', 'tbody' or 'tfoot'."""
    return [[cell.all_text() for cell in row.children] for row in table.find_all(part)[0].find_all('tr')]


def histograms(tree):
    """[[(count, tooltip) of each bar], ...]."""
    return [[(int(bar.attributes['data-count']), bar.all_text()) for bar in figure.find_all('rect', class_='bar')]
            for figure in tree.find_all('figure', class_='histogram')]


def csv_column(results, column):
    """Its values over all images, without the empty ones."""
    return [row[column] for path in results.rglob('*_objects.csv')
            for row in csv.DictReader(path.open(newline='')) if row[column]]


def test_metric_table_holds_the_numbers_of_the_json(tree):
    table, = tree.find_all('table', class_='metrics')
    assert rows(table, 'thead') == [['image', 'Dice', 'AJI', 'PQ']]
    assert rows(table, 'tbody') == [['plain', '0.8123', '–', '–'], [ODD, '0.7000', '0.5124', '–']]
    assert rows(table, 'tfoot') == [['mean', '0.7562', '0.5124', '–'], ['pooled', '0.7600', '–', '0.4000']]
    assert [part.tag for part in table.children] == ['thead', 'tbody', 'tfoot']
    values = [cell.attributes['data-value'] for cell in table.find_all('tbody')[0].find_all('td')]
    assert values == ['0.81234567', '', '', '0.7', '0.51239', '']           # sorting goes by these, unrounded


def test_definitions_are_tooltips_and_listed(tree):
    head = tree.find_all('table', class_='metrics')[0].find_all('thead')[0]
    tooltips = {cell.all_text(): cell.attributes.get('title') for cell in head.find_all('th')}
    assert tooltips == {'image': None, 'PQ': None, **SCORES['definitions']}
    listed = dict(zip([node.text for node in tree.find_all('dt')], [node.text for node in tree.find_all('dd')]))
    assert listed == SCORES['definitions']


def test_settings(tree):
    short, full = [dict(rows(table, 'tbody')) for table in tree.find_all('table', class_='settings')]
    assert short['checkpoint'] == '<best>.pth.tar' and short['test-time augmentation'] == 'flips'
    assert short['patch size, px (0: whole image)'] == '208'
    assert full == {'dataset': 'MultiOrgan', 'model.name': 'FullNet', 'model.dilations': '1 2', 'test.tta': 'flips',
                    'test.model_path': '<best>.pth.tar', 'test.patch_size': '208', 'test.scale_16bit': 'none',
                    'post.min_area': '20', 'transform.test.normalize': 'True'}


def test_overlays_are_embedded_and_bounded(tree):
    sizes = {}
    for button in tree.find_all('button', class_='open'):
        image, = button.find_all('img')
        kind, content = image.attributes['src'].split(',')
        assert kind == 'data:image/jpeg;base64'
        picture = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
        assert np.abs(np.asarray(picture).astype(int) - (200, 40, 120)).max() < 8
        assert (str(picture.width), str(picture.height)) == (image.attributes['width'], image.attributes['height'])
        sizes[button.parent.find_all('figcaption')[0].text] = picture.size
    assert sizes == {ODD: (60, 40), 'plain': (1600, 8)}


def test_table_links_lead_to_the_image(tree):
    for table in tree.find_all('table', class_='sortable'):
        links = table.find_all('a')
        assert len(links) == 2
        for link in links:
            figure, = tree.find_all('figure', id=link.attributes['href'].removeprefix('#'))
            assert figure.find_all('figcaption')[0].text == link.text


def test_histograms_add_up_to_the_objects(results, tree):
    areas = np.array(csv_column(results, 'area'), float)
    ious = np.array(csv_column(results, 'matched_iou'), float)
    area_bars, iou_bars = histograms(tree)
    assert sum(count for count, _ in area_bars) == len(areas) == 200
    assert sum(count for count, _ in iou_bars) == len(ious) == 150
    for bars, values in ((area_bars, areas), (iou_bars, ious)):
        for count, tooltip in bars:
            span = tooltip.split(':')[0].replace(' or more', ' to inf').split()
            lower, upper = float(span[-3]), float(span[-1])
            last = upper == 1                     # the last bin of the IoU has its upper end
            assert count == np.sum((values >= lower) & ((values < upper) | (last & (values == upper)))), tooltip
    assert area_bars[-1][1].startswith('area, px 580 or more: ')             # the clump does not squeeze the others


@pytest.mark.parametrize('areas', [[], [1], [5, 5, 5], [20, 100000], list(range(1, 2000))])
def test_area_bins_hold_every_area(areas):
    edges, is_open = make_report.area_bins(np.array(areas, float))
    assert edges[0] == 0 and (np.diff(edges) > 0).all() and len(edges) <= make_report.BINS + 2
    assert is_open == (max(areas, default=0) > edges[-1])
    svg = make_report.area_histogram(np.array(areas, float))
    assert sum(count for count, _ in histograms(Tree(svg).root)[0]) == len(areas)


def test_round_step():
    assert [make_report.round_step(v) for v in (0, 0.3, 1, 1.5, 3, 7, 10, 11, 600)] == [1, 1, 1, 2, 5, 10, 10, 20, 1000]


def test_object_table(tree):
    table, = tree.find_all('table', class_='objects')
    head, body, foot = (rows(table, part) for part in ('thead', 'tbody', 'tfoot'))
    assert head == [['image', 'objects', 'median area', 'matched', 'median IoU']]
    assert body[1] == ['plain', '0', '–', '0', '–']
    assert body[0][:2] == [ODD, '200'] and body[0][3] == '150' and foot == [['all', *body[0][1:]]]


def test_names_are_escaped_and_nothing_comes_from_outside(page, tree):
    assert ODD not in page and 'a<b>' not in page
    assert 'a&lt;b&gt;&amp;&quot;quoted&quot; &#x27;x&#x27;' in page
    assert not tree.find_all('b') and not tree.find_all('jaccard')
    assert 'http' not in page and '@import' not in page and 'url(' not in page
    assert not tree.find_all('link') and not tree.find_all('iframe')
    for node in tree.find_all(''):
        for name, value in node.attributes.items():
            if name in ('src', 'href', 'srcset', 'action'):
                assert value.startswith(('#', 'data:image/jpeg;base64,')), (node.tag, name)
    assert [node.attributes for node in tree.find_all('script')] == [{}]
    ids = [node.attributes['id'] for node in tree.find_all('') if 'id' in node.attributes]
    assert len(ids) == len(set(ids))


def test_without_labels_there_are_no_scores(tmp_path):
    root = write_results(tmp_path, labelled=False)
    make_report.main([str(root)])
    tree = Tree((root / 'report.html').read_text(encoding='utf-8')).root
    assert not tree.find_all('table', class_='metrics')
    assert rows(tree.find_all('table', class_='objects')[0], 'thead') == [['image', 'objects', 'median area']]
    assert [sum(count for count, _ in bars) for bars in histograms(tree)] == [200]
    assert len(tree.find_all('button', class_='open')) == 2
    assert 'there were no labels' in tree.all_text()


def test_several_sets_each_have_a_section(tmp_path):
    write_results(tmp_path, set_name='test_same')
    write_results(tmp_path / 'more', labelled=False, set_name='test_diff')
    shutil.move(tmp_path / 'more' / 'test_diff_segmentation', tmp_path)
    tree = Tree(make_report.report_page(tmp_path)).root
    assert [node.text for node in tree.find_all('h2')] == ['Settings', 'test_diff', 'test_same']
    assert [link.attributes['href'] for link in tree.find_all('nav')[0].find_all('a')] == ['#set-1', '#set-2']
    assert [len(node.find_all('table', class_='metrics')) for node in tree.find_all('section')] == [0, 0, 1]


def test_same_input_same_bytes_wherever_it_lies(results, page, tmp_path, capsys):
    shutil.copytree(results, tmp_path / 'elsewhere')
    make_report.main([str(tmp_path / 'elsewhere'), '--out', str(tmp_path / 'new' / 'page.html')])
    assert (tmp_path / 'new' / 'page.html').read_bytes() == page.encode()
    assert 'page.html' in capsys.readouterr().out


def test_folders_that_are_no_result(tmp_path):
    with pytest.raises(InputError, match='no folder .*nowhere; expected the save_dir of test.py'):
        make_report.main([str(tmp_path / 'nowhere')])
    (tmp_path / 'notes').mkdir()
    with pytest.raises(InputError, match=r'notes has no folder named \*_segmentation; expected the save_dir'):
        make_report.main([str(tmp_path / 'notes')])
    (tmp_path / 'notes' / 'x_segmentation').mkdir()
    with pytest.raises(InputError, match='x_segmentation is empty: expected'):
        make_report.main([str(tmp_path / 'notes')])


OBJECTS, OVERLAY = (f'test_same_segmentation/plain_{kind}' for kind in ('objects.csv', 'overlay.png'))


@pytest.mark.parametrize('file, content, message', [
    ('test_options.json', None, 'no .*test_options.json; expected the save_dir of test.py'),
    ('test_options.json', '{"dataset":', 'test_options.json is not JSON, or is damaged'),
    ('test_options.json', '[]', "test_options.json: expected an object with an object 'test'"),
    ('test_same_metrics.json', '{"definitions": {}}', "metrics.json: expected an object with an object 'images'"),
    ('test_same_metrics.json', json.dumps({**SCORES, 'mean': {'AJI': 'high'}}),
     "metrics.json: AJI of 'mean' is \"high\"; expected a number or null"),
    ('test_same_metrics.json', json.dumps({**SCORES, 'pooled': {'AJI': float('nan')}}), "AJI of 'pooled' is NaN"),
    ('test_same_metrics.json', json.dumps({**SCORES, 'images': {'plain': 3}}), "'plain' is 3; expected an object"),
    (OBJECTS, None, 'no .*plain_objects.csv; run test.py again'),
    (OBJECTS, '', "plain_objects.csv has the columns none; expected 'area'"),
    (OBJECTS, 'id,area\n1,20\n2,large\n', "plain_objects.csv, line 3: expected numbers .* found 'large'"),
    (OBJECTS, 'id,area\n1\n', 'plain_objects.csv, line 2: expected numbers .* found None'),
    (OVERLAY, None, 'no such file: .*plain_overlay.png'),
    (OVERLAY, 'text', 'plain_overlay.png is not an image'),
])
def test_missing_and_damaged_files_are_named(results, tmp_path, file, content, message):
    root = tmp_path / 'results'
    shutil.copytree(results, root)
    (root / file).unlink()
    if content is not None:
        (root / file).write_text(content)
    before = (root / 'report.html').read_bytes()
    with pytest.raises(InputError, match=message):
        make_report.main([str(root)])
    assert (root / 'report.html').read_bytes() == before                     # an old report stays whole
