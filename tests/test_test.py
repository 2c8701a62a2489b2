"""Testing through its command line: the golden end-to-end numbers, files, what every option changes, refusals."""
import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import export_pretrained
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.segmentation import find_boundaries

import test as test_script
import train
from FullNet import create_model
from miniature import SMALL, make_multi_organ, nuclei, pixels
from prepare_data import Reinhard_normalizer
from support import results
from support.checkpoints import load_checkpoint
from support.devices import Processes
from support.files import save_instances
from support.images import read_instance_label
from support.pictures import (FALSE, HIT, MISSED, UNLABELLED, colour_instances, draw_contours, draw_overlay,
                              touching_pairs)
from support.script import InputError
from utils import dilate, match_objects, standard_metrics

GOLDEN = Path(__file__).parent / 'golden'
TINY = ['--model-path', str(GOLDEN / 'tiny_checkpoint.pth.tar'), '--n-layers', '4', '--growth-rate', '8',
        '--gpu', 'cpu']
WINDOWS = ['--tta', 'none', '--patch-size', '64', '--overlap', '16', '--min-area', '1']


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------
# Golden end to end
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, dataset', [('nuclei', 'MultiOrgan'), ('gland', 'GlaS')])
def test_segmentations_and_scores_are_the_golden_ones(tmp_path, kind, dataset, gpu='cpu'):
    golden = np.load(GOLDEN / 'end_to_end.npz')
    (tmp_path / 'set').mkdir()
    (tmp_path / 'truth').mkdir()
    for i in range(2):
        Image.fromarray(golden[f'{kind}/image{i}']).save(tmp_path / 'set' / f'im{i}.png')
        save_instances(tmp_path / 'truth' / f'im{i}.png', golden[f'{kind}/label{i}'])
    np.save(tmp_path / 'mean_std.npy', golden['mean_std'])
    test_script.main([*TINY, '--dataset', dataset, '--img-dir', 'set', '--label-dir', 'truth', '--data-dir', '.',
                      '--save-dir', 'out', '--gpu', gpu])

    for i in range(2):
        segmentation = tifffile.imread(tmp_path / 'out' / 'set_segmentation' / f'im{i}_seg.tiff')
        assert ((segmentation > 0) != (golden[f'{kind}/seg{i}'] > 0)).mean() <= 0.001
        probabilities = pixels(tmp_path / 'out' / 'set_prob_maps' / f'im{i}_prob_inside.png')
        if kind == 'gland':                                                   # at the scale that the network saw
            assert min(probabilities.shape) == 208 != min(segmentation.shape)
        else:
            assert probabilities.shape == segmentation.shape
    ours = (tmp_path / 'out' / 'set_test_result.txt').read_text().splitlines()
    theirs = str(golden[f'{kind}/result_txt']).splitlines()
    assert len(ours) == len(theirs)
    columns = theirs[0].split('\t')
    for our_line, line in zip(ours, theirs):
        assert our_line.split('\t')[0] == line.split('\t')[0]
        for column, ours_value, value in zip(columns[1:], our_line.split('\t')[1:], line.split('\t')[1:]):
            if line.startswith('Metrics'):
                assert ours_value == value
            else:
                tolerance = 0.5 if column == 'Hausdorff' else 0.002
                assert float(ours_value) == pytest.approx(float(value), abs=tolerance), column


# ---------------------------------------------------------------------------------------------------
# Files and options
# ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    for i, name in enumerate(('b.1', 'a')):
        image, label = nuclei(i, 70, 90)
        (folder / 'set').mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / 'set' / f'{name}.png')
        save_instances(folder / 'truth' / f'{name}_label.png', label)
    np.save(folder / 'mean_std.npy', np.array([[0.74, 0.54, 0.66], [0.16, 0.2, 0.15]]))
    return folder


def segment(images, *words, labels=True):
    """Run test.py with a small window and without augmentation."""
    label_dir = ['--label-dir', str(images / 'truth')] if labels else []
    test_script.main([*TINY, '--img-dir', str(images / 'set'), *label_dir, '--data-dir', str(images),
                      '--save-dir', 'out', *WINDOWS, *words])
    return Path('out')


def everything(out):
    """All results that were written, to see whether an option changed anything."""
    files = {str(path): path.read_bytes() for path in sorted(out.rglob('*')) if path.is_file() and
             'options' not in path.name and 'records' not in path.parent.name}
    return {name: content.split(b' "made_by": {')[0] if name.endswith('.json') else content
            for name, content in files.items()}


def test_files_of_a_labelled_set(images):
    out = segment(images)
    names = {str(path.relative_to(out)) for path in out.rglob('*') if path.is_file()}
    assert names == {'set_test_result.txt', 'set_metrics.csv', 'set_metrics.json', 'test_options.txt',
                     'test_options.json'} | {
        f'set_{kind}/{name}{ending}' for name in ('a', 'b.1') for kind, ending in (
            ('prob_maps', '_prob_inside.png'), ('prob_maps', '_prob_contour.png'), ('segmentation', '_seg.tiff'),
            ('segmentation', '_seg_colored.png'), ('segmentation', '_overlay.png'), ('segmentation', '_objects.csv'),
            ('records', '.json'))}
    lines = (out / 'set_test_result.txt').read_text().splitlines()
    assert lines[0].split('\t') == ['Metrics:', 'pixel_acc', 'recall', 'precision', 'F1', 'Dice', 'IoU', 'Hausdorff',
                                    'AJI']
    assert [line.split('\t')[0] for line in lines] == ['Metrics:', 'Average:', '', 'a:', 'b.1:']
    average, first, second = (np.array(line.split('\t')[1:], float) for line in (lines[1], lines[3], lines[4]))
    assert np.allclose(average, (first + second) / 2, atol=1e-4)


def test_averages_leave_out_nan():
    """The Hausdorff distance of an image in which nothing was found."""
    table = results.results_table({'b': [0.5, float('nan')], 'a': [1, 3]}, ['F1', 'Hausdorff'])
    assert table == ('Metrics:\tF1\tHausdorff\nAverage:\t0.7500\t3.0000\n\n'
                     'a:\t1.0000\t3.0000\nb:\t0.5000\tnan\n')


def test_amp_changes_little_and_is_autocast_on_processors_with_amx_only(images, monkeypatch):
    """autocast runs the plain modules, whose hooks are called; FastStage calls none."""
    monkeypatch.setattr('support.cpu_stage.MIN_PIXELS', 0)
    load_model, maps, seen = test_script.load_model, [], set()

    def with_hooks(*arguments):
        model = load_model(*arguments)
        model.blocks.block1.denselayer1.conv.conv.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
        return model
    monkeypatch.setattr(test_script, 'load_model', with_hooks)
    for amp, amx, dtypes in (('False', True, {torch.float32}), ('True', False, set()),
                             ('True', True, {torch.bfloat16})):
        monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
        segment(images, '--amp', amp, '--save-dir', f'{amp} {amx}')
        assert seen == dtypes
        seen.clear()
        maps.append(pixels(Path(f'{amp} {amx}/set_prob_maps/a_prob_inside.png')).astype(int))
    assert all(0 < np.abs(a - b).max() <= 0.02 * 255 for a, b in itertools.combinations(maps, 2))


def test_save_flag_off_still_scores_and_results_have_the_name_of_the_folder_as_given(images):
    Path('link').symlink_to(images / 'set')
    out = segment(images, '--save-flag', 'False', '--img-dir', 'link')
    assert {path.name for path in out.iterdir()} == {'link_test_result.txt', 'link_metrics.csv', 'link_metrics.json',
                                                     'link_records', 'test_options.txt', 'test_options.json'}


@pytest.mark.filterwarnings('ignore:.*carries no mean_std')
def test_segment_from_python_gives_what_test_py_writes(images, own_checkpoint):
    out = segment(images)
    image = pixels(images / 'set' / 'a.png')
    label, probabilities = test_script.segment(image, 'own.pth.tar', *WINDOWS, '--gpu', 'cpu')
    assert np.array_equal(label, tifffile.imread(out / 'set_segmentation' / 'a_seg.tiff')) and label.dtype == np.int32
    assert probabilities.shape == (70, 90, 3) and np.allclose(probabilities.sum(axis=2), 1, atol=1e-5)
    for channel, kind in ((1, 'inside'), (2, 'contour')):            # stored as 255 times the probability
        stored = pixels(out / 'set_prob_maps' / f'a_prob_{kind}.png')
        assert np.abs(stored / 255 - probabilities[..., channel]).max() <= 0.5 / 255 + 1e-6
    for other in (image[..., 0], image / 255, Image.fromarray(image[..., 0])):
        with pytest.raises(InputError, match='segment was given .*; expected uint8'):
            test_script.segment(other, 'own.pth.tar')


def test_all_metrics_are_in_json_and_csv(images):
    out = segment(images)
    report = json.loads((out / 'set_metrics.json').read_text())
    assert list(report['images']) == ['a', 'b.1'] and report['definitions'].keys() == report['mean'].keys()
    lines = [line.split('\t') for line in (out / 'set_test_result.txt').read_text().splitlines()]
    pairs = {name: [read_instance_label(path) for path in (out / f'set_segmentation/{name}_seg.tiff',
                                                           images / f'truth/{name}_label.png')]
             for name in ('a', 'b.1')}
    for name, pair in pairs.items():
        row = report['images'][name]
        for key, value in standard_metrics(*pair).items():
            assert row['published_AJI' if key == 'aji_fullnet' else key] == pytest.approx(value)
        published = [f'{row["published_" + column]:.4f}' for column in lines[0][1:]]
        assert published == next(line for line in lines[3:] if line[0] == f'{name}:')[1:]
    side_by_side = [np.concatenate([np.pad(label, 3) for label in labels]) for labels in zip(*pairs.values())]
    for key, value in standard_metrics(*side_by_side).items():
        if key != 'aji_fullnet':
            assert report['pooled'][key] == pytest.approx(value), key
            assert report['mean'][key] == pytest.approx(np.mean([row[key] for row in report['images'].values()]))
    assert report['pooled']['published_AJI'] is None
    table = [line.split(',') for line in (out / 'set_metrics.csv').read_text().splitlines()]
    assert table[0][1:] == list(report['mean']) and [row[0] for row in table[1:]] == ['a', 'b.1', 'mean', 'pooled']
    assert float(table[3][table[0].index('pq')]) == pytest.approx(report['mean']['pq'], abs=1e-6)


def test_objects_csv_holds_what_the_segmentation_shows(images):
    out = segment(images)
    label, truth = tifffile.imread(out / 'set_segmentation/a_seg.tiff'), pixels(images / 'truth/a_label.png')
    inside = pixels(out / 'set_prob_maps/a_prob_inside.png')
    rows = list(csv.DictReader(open(out / 'set_segmentation/a_objects.csv')))
    assert [int(row['id']) for row in rows] == np.unique(label)[1:].tolist()
    matched = []
    for row in rows:
        y, x = np.nonzero(label == int(row['id']))
        assert int(row['area']) == len(y)
        assert (float(row['centroid_y']), float(row['centroid_x'])) == pytest.approx((y.mean(), x.mean()), abs=0.006)
        box = [int(row[f'bbox_{side}']) for side in ('top', 'left', 'bottom', 'right')]
        assert box == [y.min(), x.min(), y.max() + 1, x.max() + 1]
        assert float(row['mean_inside_probability']) == pytest.approx(inside[y, x].mean() / 255, abs=1e-4)
        assert 0 <= float(row['eccentricity']) <= 1 and 0 < float(row['solidity']) <= 1
        if row['matched_id']:
            other = truth == int(row['matched_id'])
            iou = (other & (label == int(row['id']))).sum() / (other | (label == int(row['id']))).sum()
            assert float(row['matched_iou']) == pytest.approx(iou, abs=1e-4)
            matched.append(row['matched_id'])
    assert matched and len(set(matched)) == len(matched)
    assert 'matched_id' not in (segment(images, labels=False) / 'set_segmentation/a_objects.csv').read_text()


def test_objects_csv_of_shapes_that_are_known():
    label, inside = np.zeros((30, 40), int), np.zeros((15, 20), np.uint8)
    y, x = np.ogrid[:30, :40]
    label[2:7, 3:23] = 4                                                         # a rectangle
    label[np.abs(y - 18) + np.abs(x - 10) <= 6] = 7                              # a diamond
    label[12:17, 30:35], label[14, 32] = 9, 0                                    # a ring
    inside[:, :10] = 255                                                         # of half the size
    rows = list(csv.DictReader(results.objects_csv(label, inside).splitlines()))
    found = [[float(row[name]) for name in ('id', 'area', 'perimeter', 'eccentricity', 'solidity',
                                            'mean_inside_probability')] for row in rows]
    assert np.allclose(found[0][:5], [4, 100, 2 * (4 + 19), np.sqrt(1 - 24 / 399), 1], atol=0.005)
    assert np.allclose(found[1], [7, 85, 24 * np.sqrt(2), 0, 1, 1], atol=0.005)
    assert found[2][:2] == [9, 24] and found[2][5] == 0


def test_overlay_shows_hits_missed_and_false_objects(monkeypatch):
    truth = np.zeros((60, 300), int)
    truth[5:15, 5:15], truth[30:40, 5:15] = 7, 9
    found = np.zeros((60, 300), int)
    found[5:15, 10:15], found[5:15, 100:110] = 1, 2                   # the IoU of the first is 0.5
    grey = np.full((60, 300, 3), 128, np.uint8)
    matches = match_objects(found, truth)
    picture, texts = draw_overlay(grey.copy(), found, truth, matches), []
    assert picture.shape == (80, 300, 3)                              # a legend below
    with monkeypatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, 'text', lambda draw, place, text, **_: texts.append(text))
        draw_overlay(grey.copy(), found, truth, matches)
    assert texts == ['1 hits (IoU >= 0.5)', '1 missed', '1 false']
    assert tuple(picture[5, 10]) == HIT and tuple(picture[5, 105]) == FALSE
    assert tuple(picture[30, 10]) == MISSED and tuple(picture[10, 12]) == (128,) * 3
    plain = draw_overlay(grey.copy(), found)
    assert plain.shape == grey.shape and tuple(plain[5, 10]) == UNLABELLED
    outside = np.ones((60, 300), bool)
    outside[5:15, 10:15] = outside[5:15, 100:110] = False
    assert (plain[outside] == 128).all()


@pytest.mark.parametrize('rows', [1, 7, 2048])
def test_contours_do_not_depend_on_the_pieces(rows):
    label = nuclei(5)[1]
    image = np.zeros((*label.shape, 3), np.uint8)
    draw_contours(image, label, (9, 9, 9), rows)
    whole = find_boundaries(np.pad(label, 1), connectivity=1, mode='inner')[1:-1, 1:-1]
    assert np.array_equal(image[..., 0] > 0, whole)


def test_touching_objects_have_different_colours():
    rng = np.random.default_rng(0)
    seeds = np.zeros((80, 90), int)
    seeds[rng.integers(80, size=60), rng.integers(90, size=60)] = np.arange(1, 61)
    label = seeds[tuple(ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True))]
    picture = colour_instances(label).astype(int)
    pairs = touching_pairs(label)
    colour = {i: tuple(picture[label == i][0]) for i in np.unique(label)}
    assert len(pairs) > 100 and all(colour[a] != colour[b] for a, b in pairs)
    assert all(len(np.unique(picture[label == i], axis=0)) == 1 for i in np.unique(label))
    alone = colour_instances(np.array([[0, 3, 0]]))
    assert alone[0, 0].max() == 0 and alone[0, 1].max() > 100
    assert colour_instances(np.zeros((2, 2), int)).max() == 0


def test_finished_images_are_kept_until_something_changes(images, tmp_path, monkeypatch, capsys):
    first = everything(segment(images))
    seen = []
    bands = test_script.probability_bands
    monkeypatch.setattr(test_script, 'probability_bands', lambda *a: seen.append(a) or bands(*a))
    assert everything(segment(images)) == first and len(seen) == 0
    assert '2 images were finished before with the same options and weights' in capsys.readouterr().out
    (Path('out') / 'set_segmentation/a_overlay.png').unlink()
    (Path('out') / 'set_records/b.1.json').write_text('{')
    assert everything(segment(images)) == first and len(seen) == 2
    record = Path('out/set_records/a.json')
    made_by = json.loads(record.read_text())
    earlier = {key: value for key, value in made_by.items() if key != 'test'}               # of an earlier version
    record.write_text(json.dumps(earlier))
    assert everything(segment(images)) == first and len(seen) == 2 and json.loads(record.read_text()) == made_by
    capsys.readouterr()
    assert everything(segment(images, '--overwrite', 'True')) == first
    assert len(seen) == 4 and 'are kept' not in capsys.readouterr().out
    segment(images, '--batch-size', '2')
    assert len(seen) == 4
    segment(images, '--radius', '3')
    assert len(seen) == 6
    label = tmp_path / 'truth'
    shutil.copytree(images / 'truth', label)
    save_instances(label / 'a_label.png', nuclei(7, 70, 90)[1])
    segment(images, '--radius', '3', '--label-dir', str(label))
    assert len(seen) == 7
    words = ['--radius', '3', '--label-dir', str(label), '--img-dir', 'set', '--data-dir', '.']
    shutil.copytree(images / 'set', tmp_path / 'set')
    shutil.copy(images / 'mean_std.npy', tmp_path)
    Image.fromarray(nuclei(7, 70, 90)[0]).save(tmp_path / 'set/a.png')
    segment(images, *words)
    assert len(seen) == 8
    np.save('mean_std.npy', np.array([[0.7, 0.5, 0.6], [0.2, 0.2, 0.2]]))
    segment(images, *words)
    assert len(seen) == 10
    weights = load_checkpoint(TINY[1])
    weights['state_dict']['conv2.weight'] *= 2
    torch.save(weights, 'other.pth.tar')
    words += ['--model-path', 'other.pth.tar']
    segment(images, *words)
    assert len(seen) == 12
    monkeypatch.setattr(results, 'RESULT_VERSION', results.RESULT_VERSION + 1)
    segment(images, *words)
    assert len(seen) == 14


def test_a_process_that_wrote_elsewhere_is_noticed(images, monkeypatch):
    """As one on another machine, which does not see the folder of this one."""
    class FirstOfTwo(Processes):
        def __init__(self, gpu):
            super().__init__(gpu)
            self.count = 2
        sums = staticmethod(list)
        wait = shut_down = staticmethod(lambda: None)
    monkeypatch.setattr(test_script, 'Processes', FirstOfTwo)
    with pytest.raises(InputError, match=r'no record of .*b\.1\.png in out, though another process .* into one folder'):
        segment(images)
    assert (Path('out') / 'set_records/a.json').is_file() and not (Path('out') / 'set_test_result.txt').exists()


def test_a_single_image_and_a_folder_with_other_files(images, tmp_path):
    whole = everything(segment(images))
    shutil.rmtree('out')
    segment(images, '--img-dir', str(images / 'set' / 'a.png'))
    one = everything(Path('out'))
    assert {name for name in whole if '/a_' in name} == {name for name in one if '/a_' in name}
    assert all(one[name] == whole[name] for name in one if '/a_' in name)

    shutil.copytree(images / 'set', tmp_path / 'mixed')
    for name in ('notes.txt', 'slide.svs'):
        (tmp_path / 'mixed' / name).touch()
    with pytest.warns(UserWarning, match='2 files in .*mixed are not images and are skipped: notes.txt, slide.svs'):
        segment(images, '--img-dir', str(tmp_path / 'mixed'))
    for name in ('a.png', 'b.1.png', 'notes.txt'):
        (tmp_path / 'mixed' / name).unlink()
    with pytest.raises(InputError, match='no images in .*saw slide.svs; whole-slide files are not read; export a'):
        segment(images, '--img-dir', str(tmp_path / 'mixed'))
    (tmp_path / 'mixed/slide.svs').write_bytes(b'II*')
    with pytest.raises(InputError, match='slide.svs: whole-slide files are not read; export a region as TIFF'):
        segment(images, '--img-dir', str(tmp_path / 'mixed/slide.svs'), labels=False)


@pytest.mark.parametrize('shape', [(1, 1), (1, 150), (130, 1), (17, 33), (97, 205)])
@pytest.mark.parametrize('name', ['FullNet', 'FCN_pooling'])
@pytest.mark.filterwarnings('ignore')
def test_images_of_any_size(tmp_path, shape, name):
    model = create_model(**dict(name=name, n_layers=4, growth_rate=2))
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'any.pth.tar')
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    words = ['--name', name, '--n-layers', '4', '--growth-rate', '2', '--patch-size', '64', '--overlap', '20']
    label, probabilities = test_script.segment(image, tmp_path / 'any.pth.tar', *words)
    assert label.shape == shape and probabilities.shape == (*shape, 3) and np.isfinite(probabilities).all()


def test_options_that_change_the_results(images):
    """Each starts beside finished results without it, which must not be kept."""
    before = everything(segment(images))
    shutil.copytree('out', 'before')
    for words in ('--tta flips', '--tta full', '--patch-size 0', '--patch-size 40', '--overlap 40', '--min-area 60',
                  '--radius 4', '--transform.test.scale 50', '--dataset GlaS', '--transform.test.normalize False',
                  '--is-hybrid False'):
        assert everything(segment(images, *words.split())) != before, words
        shutil.rmtree('out')
        shutil.copytree('before', 'out')


def test_tables_of_other_options_do_not_stay(images):
    out = segment(images)
    segment(images, '--radius', '0', labels=False)
    assert not list(out.glob('set_metrics.*')) and not (out / 'set_test_result.txt').exists()


def test_defaults_find_the_newest_run_and_the_epoch(images):
    runs = Path('experiments/MultiOrgan')
    for run, epoch in (('1', 'best'), ('3', 'best'), ('3', '20')):
        (runs / run / 'checkpoints').mkdir(parents=True, exist_ok=True)
        shutil.copy(GOLDEN / 'tiny_checkpoint.pth.tar', runs / run / f'checkpoints/checkpoint_{epoch}.pth.tar')
    words = [*TINY[2:], '--img-dir', str(images / 'set'), '--data-dir', str(images), '--tta', 'none']
    (runs / '4/checkpoints').mkdir(parents=True)                                               # has just begun
    for epoch in ('best', '20'):
        test_script.main([*words, *(['--epoch', epoch] if epoch == '20' else [])])
        assert (runs / '3' / epoch / 'set_segmentation').is_dir() and not (runs / '4' / epoch).exists()
    with pytest.raises(InputError, match='--epoch chooses a checkpoint of a run, and --model-path names a checkpoint'):
        test_script.main([*TINY, '--img-dir', str(images / 'set'), '--epoch', '20'])
    with pytest.raises(InputError, match='no checkpoint at .*4/checkpoints/checkpoint_7.pth.tar'):
        test_script.main([*words, '--epoch', '7'])


def test_16_bit_images_and_masks_are_taken_when_told(images, tmp_path):
    (tmp_path / 'deep').mkdir()
    (tmp_path / 'masks').mkdir()
    tifffile.imwrite(tmp_path / 'deep' / 'x.tif', pixels(images / 'set' / 'a.png').astype(np.uint16) * 16,
                     photometric='rgb')
    Image.fromarray((pixels(images / 'truth' / 'a_label.png') > 0).astype(np.uint8) * 255).save(
        tmp_path / 'masks' / 'x.png')
    words = ['--img-dir', 'deep', '--label-dir', 'masks']
    with pytest.raises(InputError, match='holds only 0 and 255'):
        segment(images, *words, '--scale-16bit', '0', '4080')
    segment(images, *words, '--scale-16bit', '0', '4080', '--binary-labels', 'True')
    assert (Path('out') / 'deep_test_result.txt').exists()
    usual = pixels(segment(images, labels=False) / 'set_prob_maps/a_prob_inside.png')
    assert np.array_equal(pixels('out/deep_prob_maps/x_prob_inside.png'), usual)


# ---------------------------------------------------------------------------------------------------
# Memory and time of large images
# ---------------------------------------------------------------------------------------------------

MEASURED_RUN = """
import sys
from functools import partial

import torch

import test
import utils
from scripts.benchmark import peak_memory

network = torch.nn.Conv2d(3, 3, 1)               # dark is inside
network.weight.data[:] = torch.tensor([9., -9, 0])[:, None, None, None]
network.bias.data[:] = torch.tensor([0., 0, -9])
test.load_model = lambda *_: network
test.predict_in_bands = partial(utils.predict_in_bands, band_pixels=int(sys.argv[1]))
before = peak_memory()
test.main(sys.argv[2:])
print(peak_memory() - before)
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='measures memory as Linux shows it')
def test_the_memory_of_a_large_image(tmp_path):
    """14 million pixels through test.py, with a network that needs no memory of its own; in one band for comparison."""
    y, x = np.ogrid[:500, :500]
    disc = np.hypot(y - 100, x - 60) < 50                             # some lie across the borders of windows and bands
    image = np.where(np.tile(disc, (8, 7)), 60, 200).astype(np.uint8)[..., None].repeat(3, axis=2)
    (tmp_path / 'set').mkdir()
    tifffile.imwrite(tmp_path / 'set/large.tif', image, photometric='rgb')

    def peak_gb(band_pixels):
        words = [*TINY, '--img-dir', 'set', '--save-dir', 'out', '--tta', 'none', '--patch-size', '592', '--overwrite']
        done = subprocess.run([sys.executable, '-c', MEASURED_RUN, str(band_pixels), *words], cwd=tmp_path, check=True,
                              env=os.environ | {'PYTHONPATH': str(Path(test_script.__file__).parent)},
                              capture_output=True, text=True)
        return float(done.stdout.splitlines()[-1])
    assert peak_gb(2 ** 20) < 0.45                                     # 0.41 with PyTorch 2.6
    label = tifffile.imread(tmp_path / 'out/set_segmentation/large_seg.tiff')
    assert label.max() == 8 * 7                                        # each disc is one object
    assert peak_gb(2 ** 40) > 0.5
    assert np.array_equal(tifffile.imread(tmp_path / 'out/set_segmentation/large_seg.tiff'), label)


# ---------------------------------------------------------------------------------------------------
# Where the network's options and mean_std come from
# ---------------------------------------------------------------------------------------------------

@pytest.fixture
def own_checkpoint(tmp_path):
    """The golden network as a checkpoint of ours, which knows its options and mean_std."""
    published = load_checkpoint(GOLDEN / 'tiny_checkpoint.pth.tar')
    model = dict(name='FullNet', in_c=3, out_c=3, n_layers=4, growth_rate=8, drop_rate=0.1, compress_ratio=0.5,
                 dilations=(1, 2, 4, 8, 16, 4, 1), is_hybrid=True, layer_type='basic')
    checkpoint = {'epoch': 3, 'state_dict': published['state_dict'], 'best_iou': 0.5,
                  'options': {'dataset': 'MultiOrgan', 'model': model, 'train': {}, 'transform': {}},
                  'mean_std': [[0.74, 0.54, 0.66], [0.16, 0.2, 0.15]]}
    torch.save(checkpoint, tmp_path / 'own.pth.tar')
    return checkpoint


def test_our_checkpoints_need_no_architecture_flags_and_no_mean_std_file(images, own_checkpoint):
    published = everything(segment(images))
    words = ['--model-path', 'own.pth.tar', '--img-dir', str(images / 'set'), '--label-dir', str(images / 'truth'),
             '--save-dir', 'out', *WINDOWS, '--gpu', 'cpu']
    test_script.main(words)
    assert everything(Path('out')) == published
    with pytest.raises(InputError, match='--n-layers is 6, but own.pth.tar was trained with 4; leave it out'):
        test_script.main([*words, '--n-layers', '6'])


@pytest.mark.filterwarnings('ignore:.*was trained on GlaS')
def test_our_checkpoints_know_their_data_set(images, tmp_path, own_checkpoint):
    own_checkpoint['options']['dataset'] = 'GlaS'
    torch.save(own_checkpoint, tmp_path / 'gland.pth.tar')
    words = ['--model-path', 'gland.pth.tar', '--img-dir', str(images / 'set'), '--label-dir', str(images / 'truth'),
             '--tta', 'none', '--gpu', 'cpu']
    with pytest.warns(UserWarning, match='gland.pth.tar was trained on GlaS: taking --dataset GlaS'):
        test_script.main([*words, '--save-dir', 'of_itself'])
    test_script.main([*words, '--dataset', 'GlaS', '--save-dir', 'glands'])
    assert everything(Path('of_itself')).values() and \
        list(everything(Path('of_itself')).values()) == list(everything(Path('glands')).values())
    test_script.main([*words, '--dataset', 'MultiOrgan', '--save-dir', 'nuclei'])
    assert 'AJI' in Path('nuclei/set_test_result.txt').read_text()
    image = pixels(images / 'set' / 'a.png')
    ids, probabilities = test_script.segment(image, 'gland.pth.tar', '--tta', 'none', '--gpu', 'cpu')
    assert min(probabilities.shape[:2]) == 208 and (ids == tifffile.imread('glands/set_segmentation/a_seg.tiff')).all()


@pytest.mark.parametrize('validation, words, said', [
    ({'scale': 64, 'normalize': True}, [], 'scale is none here, and was 64 in the validation of own.pth.tar; '
                                           '--transform.test.scale 64 tests as validation did'),
    ({}, [], 'normalize is True here, and was none in the validation'),
    ({'scale': 64, 'normalize': True}, ['--transform.test.scale', '64'], None),
    ({'normalize': True, 'label_encoding': 1}, [], None)])
def test_other_transforms_than_in_validation_are_named(images, tmp_path, own_checkpoint, recwarn, validation, words,
                                                       said):
    own_checkpoint['options']['transform'] = {'val': validation}
    torch.save(own_checkpoint, tmp_path / 'own.pth.tar')
    test_script.parse_options(['--model-path', 'own.pth.tar', '--img-dir', str(images / 'set'), *words])
    notes = [str(warning.message) for warning in recwarn if 'validation' in str(warning.message)]
    assert len(notes) == (said is not None) and all(said in text for text in notes)


def test_a_published_checkpoint_without_mean_std_takes_the_published_values_with_a_warning(images, tmp_path):
    published = [[0.74408994, 0.53806349, 0.66497889], [0.15811703, 0.19705941, 0.15046222]]
    np.save(tmp_path / 'mean_std.npy', published)
    assert test_script.PUBLISHED_MEAN_STD == {'MultiOrgan': published, 'GlaS': [
        [0.78780321, 0.5120167, 0.78493782], [0.16766301, 0.24838048, 0.13225162]]}
    with_file = everything(segment(images, '--data-dir', '.'))
    with pytest.warns(UserWarning, match='carries no mean_std and there is no .*; taking the published values'):
        without = everything(segment(images, '--data-dir', 'nowhere'))
    assert with_file == without


# ---------------------------------------------------------------------------------------------------
# Weights that come with the code; colours and scale
# ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A short training run, its prepared data, and the file of weights made of it; not to be changed."""
    folder = tmp_path_factory.mktemp('trained')
    data = make_multi_organ(folder / 'data')
    train.main([*SMALL, '--data-dir', str(data), '--save-dir', str(folder / 'run')])
    export_pretrained.main(['--run', str(folder / 'run'), '--data-dir', str(data), '--out',
                            str(folder / 'pretrained/FullNet_MultiOrgan.pth.tar'), '--licence', 'for us\nonly'])
    return folder


def test_exported_weights(trained, capsys):
    run, shipped = (load_checkpoint(trained / path) for path in ('run/checkpoints/checkpoint_best.pth.tar',
                                                                 'pretrained/FullNet_MultiOrgan.pth.tar'))
    assert all(torch.equal(run['state_dict'][key], value) for key, value in shipped['state_dict'].items())
    assert shipped['optimizer'] == {} and shipped['mean_std'] == run['mean_std'] and shipped['shorter_side'] == 64
    images = (trained / 'data/images/train').iterdir()
    pixels_of_train = np.concatenate([rgb2lab(pixels(path)).reshape(-1, 3) for path in images])
    assert np.allclose(shipped['lab'], [pixels_of_train.mean(0), pixels_of_train.std(0)])
    assert len(shipped['data_sha256']) == 64 and shipped['hours'] > 0 and shipped['licence'] == 'for us\nonly'
    np.save('mean_std.npy', np.ones((2, 3)))
    with pytest.raises(InputError, match='mean_std.npy is not that of .*checkpoint_best.pth.tar, which was'):
        export_pretrained.main(['--run', str(trained / 'run'), '--data-dir', '.', '--out', 'x.tar'])


def test_without_a_run_the_shipped_weights_are_taken(trained, monkeypatch, capsys):
    monkeypatch.setattr(test_script, 'PRETRAINED', trained / 'pretrained')
    words = ['--img-dir', str(trained / 'data/images/test_same'), '--gpu', 'cpu', '--tta', 'none']
    test_script.main(words)
    assert 'taking the weights that come with the code' in capsys.readouterr().out
    assert len(list(Path('experiments/MultiOrgan/FullNet_MultiOrgan').rglob('*_seg.tiff'))) == 2
    with pytest.raises(InputError, match='no checkpoint at .*/checkpoint_3.pth.tar'):
        test_script.main([*words, '--epoch', '3'])                     # asked for: not replaced by something else
    folder = Path('experiments/MultiOrgan/4/checkpoints')
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match='no checkpoint at'):
        test_script.main(words)
    shutil.copy(trained / 'run/checkpoints/checkpoint_best.pth.tar', folder)
    test_script.main(words)
    assert 'come with the code' not in capsys.readouterr().out


def test_color_norm_and_scale_factor(trained):
    image = pixels(next((trained / 'data/images/test_same').iterdir()))
    weights = trained / 'pretrained/FullNet_MultiOrgan.pth.tar'
    words = ['--tta', 'none', '--gpu', 'cpu']
    lab = load_checkpoint(weights)['lab']
    normalizer = Reinhard_normalizer()
    normalizer.mean, normalizer.std = map(np.array, lab)
    faded = (image * 0.5 + 100).astype(np.uint8)
    expected = test_script.segment(normalizer.transform(faded), weights, *words)[1]
    assert np.array_equal(test_script.segment(faded, weights, '--color-norm', 'True', *words)[1], expected)
    assert not np.array_equal(test_script.segment(faded, weights, *words)[1], expected)
    with pytest.raises(InputError, match="--color-norm True needs the training images' colours, which .* does not"):
        test_script.segment(image, trained / 'run/checkpoints/checkpoint_best.pth.tar', '--color-norm')

    label, probabilities = test_script.segment(image, weights, '--scale-factor', '2', *words)
    double = np.asarray(Image.fromarray(image).resize((128, 128), Image.BILINEAR))
    assert probabilities.shape == (128, 128, 3) and label.shape == (64, 64)
    assert np.array_equal(probabilities, test_script.segment(double, weights, *words)[1])

    words += ['--scale-factor', '2', '--inside-threshold', f'{np.quantile(probabilities[..., 1], 0.7):.4f}',
              '--min-area', '1']
    wide, none = (test_script.segment(image, weights, *words, '--radius', radius)[0] for radius in ('4', '0'))
    assert none.any() and np.array_equal(wide, dilate(none, 2))                # 4 pixels in the image of twice the size
