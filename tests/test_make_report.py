"""The report about a result of test.py: right numbers, nothing from outside, names that are no HTML, clear errors."""
import base64
import csv
import io
import json
import re
import shutil
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from scripts import make_report
from support.files import save_image, save_instances
from support.script import InputError

ODD = 'a<b>&"quoted" \'x\''                       # a file may be called this
SCORES = {
    'definitions': {'dice': 'twice the common pixels / the pixels of both',
                    'published_AJI': 'aggregated <Jaccard> & "index"'},
    'images': {'plain': {'dice': None, 'published_AJI': 0.81234567}, ODD: {'dice': 0.7, 'published_AJI': 0.51239}},
    'mean': {'dice': 0.7, 'published_AJI': 0.66176},
    'pooled': {'dice': None, 'published_AJI': None, 'pq': 0.4},
}
rng = np.random.default_rng(0)
AREAS = [*rng.integers(20, 600, 199).tolist(), 30000]
IOUS = [None if i % 4 == 0 else round(float(rng.uniform(0, 1)), 6) for i in range(199)] + [1.0]


def parsed(page):
    """The page as a tree. XML is strict: every element is closed where it belongs, and no attribute is there twice."""
    return ElementTree.fromstring(re.sub(r'<((?:meta|img)\b[^>]*)>', r'<\1/>', page))


def words(element):
    return ''.join(element.itertext())


def rows(table):
    """[[text of each cell], ...]"""
    return [[words(cell) for cell in row] for row in table.iter('tr')]


def write_image(folder, name, areas, ious=None, size=(40, 60)):
    """The files of one image. Its overlay, (H, W) `size`, is of one colour; an iou of None: without a partner."""
    save_image(folder / f'{name}_overlay.png', np.full((*size, 3), (200, 40, 120), np.uint8))
    save_instances(folder / f'{name}_seg.tiff', np.eye(*size, dtype=int))
    save_image(folder / f'{name}_seg_colored.png', np.zeros((*size, 3), np.uint8))
    with open(folder / f'{name}_objects.csv', 'w', newline='') as file:
        table = csv.writer(file)
        table.writerow(['id', 'area'] + ['matched_id', 'matched_iou'] * (ious is not None))
        for i, area in enumerate(areas):
            matched = [] if ious is None else ['', ''] if ious[i] is None else [i + 7, ious[i]]
            table.writerow([i + 1, area, *matched])


def write_results(root, labelled=True, set_name='test_same'):
    """A result of two images: 200 objects with one large clump among them, and none."""
    folder = root / f'{set_name}_segmentation'
    folder.mkdir(parents=True)
    write_image(folder, ODD, AREAS, IOUS if labelled else None)
    write_image(folder, 'plain', [], [] if labelled else None, size=(10, 2000))
    options = {'dataset': 'MultiOrgan', 'model': {'name': 'FullNet', 'dilations': [1, 2]},
               'test': {'model_path': '<best>.pth.tar', 'tta': 'flips', 'patch_size': 208, 'overlap': 80,
                        'color_norm': False, 'scale_factor': 2, 'scale_16bit': None},
               'post': {'min_area': 20, 'radius': 3, 'inside_threshold': 0.6, 'h_maxima': 0.2},
               'transform': {'test': {'normalize': True}}}
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
    return parsed(page)


def test_table_begins_with_the_scores_people_look_for_and_the_worst_image(tree):
    table, = tree.iterfind('.//table[@class="scores"]')
    head, worst, best, mean, pooled = rows(table)
    assert head == ['image', 'published_AJI', 'pq', 'dice', 'objects', 'median area', 'matched', 'median IoU']
    assert worst[:5] == [ODD, '0.5124', '–', '0.7000', '200'] and worst[6] == '150'
    assert best == ['plain', '0.8123', '–', '–', '0', '–', '0', '–']
    assert mean == ['mean', '0.6618', '–', '0.7000', *'––––'] and pooled == ['pooled', '–', '0.4000', *'–––––']
    areas, ious = AREAS, [iou for iou in IOUS if iou is not None]
    assert [worst[5], worst[7]] == [f'{np.median(areas):.4f}', f'{np.median(ious):.4f}']
    assert '2 images, 200 objects, 150 of them matched' in words(tree)
    for link in table.iter('a'):
        figure, = tree.iterfind(f'.//figure[@id="{link.get("href").removeprefix("#")}"]')
        assert words(figure.find('figcaption')) == link.text


def test_definitions_are_tooltips_and_listed(tree):
    tooltips = {cell.text: cell.get('title') for cell in tree.iter('th') if cell.get('title')}
    assert {name: tooltips[name] for name in SCORES['definitions']} == SCORES['definitions']
    assert {term.text: text.text for term, text in zip(tree.iter('dt'), tree.iter('dd'))} == SCORES['definitions']


def test_settings(tree):
    short, full = [dict(rows(table)) for table in tree.iterfind('.//table[@class="settings"]')]
    assert short == {'data set': 'MultiOrgan', 'checkpoint': '<best>.pth.tar', 'network': 'FullNet',
                     'test-time augmentation': 'flips', 'patch size, px (0: whole image)': '208',
                     'patch overlap, px': '80', 'colours of the training images': 'False', 'enlarged by': '2',
                     'smallest object, px': '20', 'dilation radius, px': '3',
                     'threshold on the inside probability (0: most likely class)': '0.6',
                     'objects split at maxima that stand out by (0: not)': '0.2'}
    assert full == {'dataset': 'MultiOrgan', 'model.name': 'FullNet', 'model.dilations': '1 2', 'test.tta': 'flips',
                    'test.model_path': '<best>.pth.tar', 'test.patch_size': '208', 'test.scale_16bit': 'none',
                    'test.overlap': '80', 'test.color_norm': 'False', 'test.scale_factor': '2', 'post.min_area': '20',
                    'post.radius': '3', 'post.inside_threshold': '0.6', 'post.h_maxima': '0.2',
                    'transform.test.normalize': 'True'}


def picture(uri):
    """The picture in a data URI, PIL."""
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix('data:image/jpeg;base64,'), validate=True)))


def test_overlays_are_embedded_and_lead_to_those_of_full_size(results, tree):
    sizes = {}
    for figure in tree.iter('figure'):
        image, caption = picture(figure.find('img').get('src')), figure.find('figcaption/a')
        assert np.abs(np.asarray(image).astype(int) - (200, 40, 120)).max() < 8
        assert (results / unquote(caption.get('href'))).is_file()
        sizes[caption.text] = image.size
    assert sizes == {ODD: (60, 40), 'plain': (1600, 8)}


def test_the_more_images_the_smaller_their_overlays(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)       # nothing compresses less
    save_image(tmp_path / 'noise.png', noise)
    whole, small = (make_report.jpeg_uri(tmp_path / 'noise.png', n) for n in (28e6, make_report.OVERLAY_BYTES / 500))
    assert 0.4 * 28e6 / 500 < len(small) <= 28e6 / 500 < len(whole)
    sizes = [picture(uri).size for uri in (whole, small)]
    assert sizes[0] == (900, 600) and sizes[1][0] / sizes[1][1] == pytest.approx(1.5, abs=0.02)


def test_histograms_count_every_object(monkeypatch):
    drawn = []
    monkeypatch.setattr(make_report.Figure, 'savefig', lambda figure, buffer, **words: drawn.append(
        [[bar.get_height() for bar in axes.patches] for axes in figure.axes]))
    make_report.histograms(np.array(AREAS), np.array([0.0, 0.5, 1.0]))
    make_report.histograms(np.array([]), np.array([]))
    (areas, ious), empty = drawn
    assert sum(areas) == 200 and areas[0] < 40 and 2 <= areas[-1] < 20       # the clump does not squeeze the others
    assert sum(ious) == 3 and ious[-1] == 1 and not np.any(empty[0])


def test_names_are_escaped_and_nothing_comes_from_outside(page, tree):
    assert ODD not in page and 'a<b>' not in page
    assert 'a&lt;b&gt;&amp;&quot;quoted&quot; &#x27;x&#x27;' in page
    assert 'http' not in page and '@import' not in page and 'url(' not in page and '<script' not in page
    for node in tree.iter():
        for name in ('src', 'href', 'srcset', 'action'):
            assert node.get(name, '#').startswith(('#', 'data:image/', 'test_same_segmentation/')), (node.tag, name)
    ids = [node.get('id') for node in tree.iterfind('.//*[@id]')]
    assert len(ids) == len(set(ids)) == 2


def test_each_set_has_a_section_and_without_labels_no_scores(tmp_path):
    write_results(tmp_path, set_name='test_same')
    write_results(tmp_path / 'more', labelled=False, set_name='test_diff')
    shutil.move(tmp_path / 'more' / 'test_diff_segmentation', tmp_path)
    tree = parsed(make_report.report_page(tmp_path))
    assert [node.text for node in tree.iter('h2')] == ['Settings', 'test_diff', 'test_same']
    assert len({figure.get('id') for figure in tree.iter('figure')}) == 4
    (head, *body), labelled = (rows(table) for table in tree.iterfind('.//table[@class="scores"]'))
    assert head == ['image', 'objects', 'median area', 'matched', 'median IoU'] and len(labelled) == 5
    assert [row[:2] + row[3:] for row in body] == [[ODD, '200', '–', '–'], ['plain', '0', '–', '–']]
    assert words(tree).count('there were no labels') == 1


def test_the_page_may_go_elsewhere(results, page, tmp_path, capsys):
    make_report.main([str(results), '--out', str(tmp_path / 'new' / 'page.html')])
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


def test_only_what_the_last_test_made_is_reported(results, tmp_path):
    root = tmp_path / 'results'
    shutil.copytree(results, root)
    write_image(root / 'test_same_segmentation', 'earlier', [50], [0.5])       # of a test of more images
    make_report.main([str(root)])
    assert (root / 'report.html').read_bytes() == (results / 'report.html').read_bytes()
    (root / 'test_same_metrics.json').unlink()                                 # as when a test is stopped
    with pytest.raises(InputError, match='compared with labels, and there is no .*_metrics.json; run test.py again'):
        make_report.main([str(root)])


@pytest.mark.parametrize('labelled', [True, False])
def test_images_of_different_tests_are_not_reported_together(tmp_path, labelled):
    root = write_results(tmp_path / 'results', labelled)
    (root / 'test_same_records').mkdir()
    for name, made_by in ((ODD, 'one'), ('plain', 'another')):
        (root / f'test_same_records/{name}.json').write_text(json.dumps({'test': made_by}))
    with pytest.raises(InputError, match='plain in .*results were tested with different weights or options; run'):
        make_report.main([str(root)])
    (root / 'test_same_records/plain.json').write_text(json.dumps({'test': 'one'}))
    make_report.main([str(root)])


OBJECTS, OVERLAY = (f'test_same_segmentation/plain_{kind}' for kind in ('objects.csv', 'overlay.png'))


@pytest.mark.parametrize('file, content, message', [
    ('test_options.json', None, 'no .*test_options.json; expected the save_dir of test.py'),
    ('test_options.json', '{"dataset":', 'test_options.json is damaged, or test.py did not write it'),
    ('test_options.json', '[]', 'test_options.json is damaged'),
    ('test_same_metrics.json', json.dumps({**SCORES, 'mean': {'AJI': 'high'}}), 'metrics.json is damaged'),
    ('test_same_metrics.json', json.dumps({**SCORES, 'pooled': {'AJI': float('nan')}}), 'AJI is nan'),
    (OBJECTS, None, 'no .*plain_objects.csv; expected .*; run test.py again'),
    (OBJECTS, '', "plain_objects.csv is damaged.*KeyError: 'area'"),
    (OBJECTS, 'id,area\n1,nan\n', 'area or matched_iou is not finite'),
    (OVERLAY, None, 'no such file: .*plain_overlay.png'),
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
