"""Testing through its command line: the golden end-to-end numbers, files, what every option changes, refusals."""
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from miniature import nuclei, pixels
from PIL import Image

import test as test_script
from utils import InputError, load_checkpoint, save_instances

GOLDEN = Path(__file__).parent / 'golden'
TINY = ['--model-path', str(GOLDEN / 'tiny_checkpoint.pth.tar'), '--n-layers', '4', '--growth-rate', '8',
        '--gpu', 'cpu']


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------
# Golden end to end
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, dataset', [('nuclei', 'MultiOrgan'), ('gland', 'GlaS')])
def test_segmentations_and_scores_are_the_golden_ones(tmp_path, kind, dataset):
    golden = np.load(GOLDEN / 'end_to_end.npz')
    (tmp_path / 'set').mkdir()
    (tmp_path / 'truth').mkdir()
    for i in range(2):
        Image.fromarray(golden[f'{kind}/image{i}']).save(tmp_path / 'set' / f'im{i}.png')
        save_instances(tmp_path / 'truth' / f'im{i}.png', golden[f'{kind}/label{i}'])
    np.save(tmp_path / 'mean_std.npy', golden['mean_std'])
    test_script.main([*TINY, '--dataset', dataset, '--img-dir', 'set', '--label-dir', 'truth', '--data-dir', '.',
                      '--save-dir', 'out'])

    for i in range(2):
        segmentation = tifffile.imread(tmp_path / 'out' / 'set_segmentation' / f'im{i}_seg.tiff')
        assert ((segmentation > 0) != (golden[f'{kind}/seg{i}'] > 0)).mean() <= 0.001
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
                      '--save-dir', 'out', '--tta', 'none', '--patch-size', '64', '--overlap', '16', '--min-area', '1',
                      *words])
    return Path('out')


def everything(out):
    """All that was written, to see whether an option changed anything."""
    return {str(path): path.read_bytes() for path in sorted(out.rglob('*')) if path.is_file() and
            'options' not in path.name}


def test_files_of_a_labelled_set(images):
    out = segment(images)
    names = {str(path.relative_to(out)) for path in out.rglob('*') if path.is_file()}
    assert names == {'set_test_result.txt', 'test_options.txt', 'test_options.json'} | {
        f'set_{kind}/{name}_{ending}' for name in ('a', 'b.1') for kind, ending in (
            ('prob_maps', 'prob_inside.png'), ('prob_maps', 'prob_contour.png'), ('segmentation', 'seg.tiff'),
            ('segmentation', 'seg_colored.png'))}
    lines = (out / 'set_test_result.txt').read_text().splitlines()
    assert lines[0].split('\t') == ['Metrics:', 'pixel_acc', 'recall', 'precision', 'F1', 'Dice', 'IoU', 'Hausdorff',
                                    'AJI']
    assert [line.split('\t')[0] for line in lines] == ['Metrics:', 'Average:', '', 'a:', 'b.1:']
    average, first, second = (np.array(line.split('\t')[1:], float) for line in (lines[1], lines[3], lines[4]))
    assert np.allclose(average, (first + second) / 2, atol=1e-4)


def test_images_without_labels(images):
    for words in ((), ('--label-dir', '')):
        out = segment(images, *words, labels=False)
        assert not (out / 'set_test_result.txt').exists()
        assert len(list((out / 'set_segmentation').glob('*_seg.tiff'))) == 2


def test_save_flag_off_still_scores(images):
    out = segment(images, '--save-flag', 'False')
    assert {path.name for path in out.iterdir()} == {'set_test_result.txt', 'test_options.txt', 'test_options.json'}


def test_probability_maps_are_stored_as_255_times_the_probability(images, monkeypatch):
    seen = {}
    save = test_script.save_results
    monkeypatch.setattr(test_script, 'save_results', lambda *a: (seen.update({a[2]: a[3]}), save(*a)))
    out = segment(images)
    for name, probabilities in seen.items():
        assert np.allclose(probabilities.sum(axis=2), 1, atol=1e-5)
        for channel, kind in ((1, 'inside'), (2, 'contour')):
            stored = pixels(out / 'set_prob_maps' / f'{name}_prob_{kind}.png')
            assert np.abs(stored / 255 - probabilities[..., channel]).max() <= 0.5 / 255 + 1e-6


def test_colours_belong_to_ids():
    label = np.array([[0, 1, 1], [2, 0, 300]])
    picture = test_script.colour_instances(label)
    colours = {tuple(c) for c in picture[label > 0]}
    assert len(colours) == 3 and (picture[label == 0] == 0).all() and min(sum(map(int, c)) for c in colours) > 100
    assert (test_script.colour_instances(np.array([[300]]))[0, 0] == picture[1, 2]).all()
    assert len({tuple(c) for c in test_script.colour_instances(np.arange(1, 200)[None])[0]}) == 199
    assert test_script.colour_instances(np.zeros((2, 2), int)).max() == 0


@pytest.mark.parametrize('words', ['--tta flips', '--tta full', '--patch-size 0', '--patch-size 40', '--overlap 40',
                                   '--min-area 60', '--radius 4', '--transform.test.scale 50', '--dataset GlaS',
                                   '--transform.test.normalize False', '--is-hybrid False'])
def test_options_that_change_the_results(images, words):
    before = everything(segment(images))
    assert everything(segment(images, *words.split())) != before


def test_the_same_command_gives_the_same_files(images):
    before = everything(segment(images))
    assert everything(segment(images)) == before


def test_defaults_find_the_newest_run_and_the_epoch(images, tmp_path):
    for run, epoch in (('1', 'best'), ('3', 'best'), ('3', '20')):
        folder = tmp_path / 'experiments' / 'MultiOrgan' / run / 'checkpoints'
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'checkpoint_{epoch}.pth.tar').write_bytes((GOLDEN / 'tiny_checkpoint.pth.tar').read_bytes())
    for epoch in ('best', '20'):
        test_script.main([*TINY[2:], '--img-dir', str(images / 'set'), '--data-dir', str(images), '--tta', 'none',
                          '--epoch', epoch])
        assert (tmp_path / 'experiments' / 'MultiOrgan' / '3' / epoch / 'set_segmentation').is_dir()
    with pytest.raises(InputError, match='no checkpoint at .*3/checkpoints/checkpoint_7.pth.tar'):
        test_script.main([*TINY[2:], '--img-dir', str(images / 'set'), '--epoch', '7'])


def test_scale_16bit_binary_labels_max_megapixels_and_gpu(images, tmp_path):
    (tmp_path / 'deep').mkdir()
    (tmp_path / 'masks').mkdir()
    tifffile.imwrite(tmp_path / 'deep' / 'x.tif', pixels(images / 'set' / 'a.png').astype(np.uint16) * 16,
                     photometric='rgb')
    Image.fromarray((pixels(images / 'truth' / 'a_label.png') > 0).astype(np.uint8) * 255).save(
        tmp_path / 'masks' / 'x.png')
    words = ['--img-dir', 'deep', '--label-dir', 'masks']
    with pytest.raises(InputError, match='16 bits per channel'):
        segment(images, *words)
    with pytest.raises(InputError, match='holds only 0 and 255'):
        segment(images, *words, '--scale-16bit', '0', '4080')
    segment(images, *words, '--scale-16bit', '0', '4080', '--binary-labels', 'True')
    assert (Path('out') / 'deep_test_result.txt').exists()
    with pytest.raises(InputError, match='more than max_megapixels = 0.001'):
        segment(images, '--max-megapixels', '0.001')
    with pytest.raises(InputError, match='--gpu asks for GPU 99'):
        segment(images, '--gpu', '99,')


# ---------------------------------------------------------------------------------------------------
# Where the network's options and mean_std come from
# ---------------------------------------------------------------------------------------------------

@pytest.fixture
def own_checkpoint(tmp_path):
    """The golden network as a checkpoint of ours, which knows its options and mean_std."""
    published = load_checkpoint(GOLDEN / 'tiny_checkpoint.pth.tar')
    model = dict(name='FullNet', in_c=3, out_c=3, n_layers=4, growth_rate=8, drop_rate=0.1, compress_ratio=0.5,
                 dilations=(1, 2, 4, 8, 16, 4, 1), is_hybrid=True, layer_type='basic')
    checkpoint = {'epoch': 3, 'state_dict': published['state_dict'], 'best_iou': 0.5, 'options': {'model': model},
                  'mean_std': [[0.74, 0.54, 0.66], [0.16, 0.2, 0.15]]}
    torch.save(checkpoint, tmp_path / 'own.pth.tar')
    return checkpoint


def test_our_checkpoints_need_no_architecture_flags_and_no_mean_std_file(images, tmp_path, own_checkpoint):
    published = everything(segment(images))
    test_script.main(['--model-path', 'own.pth.tar', '--img-dir', str(images / 'set'), '--label-dir',
                      str(images / 'truth'), '--save-dir', 'out', '--tta', 'none', '--patch-size', '64', '--overlap',
                      '16', '--min-area', '1', '--gpu', 'cpu'])
    assert everything(Path('out')) == published


def test_a_flag_that_contradicts_our_checkpoint_is_refused(images, own_checkpoint):
    with pytest.raises(InputError, match='--n-layers is 6, but own.pth.tar was trained with 4; leave it out'):
        test_script.main(['--model-path', 'own.pth.tar', '--img-dir', str(images / 'set'), '--n-layers', '6'])


def test_options_that_do_not_fit_a_published_checkpoint_are_named(images):
    with pytest.raises(InputError, match='n_layers is 4 in the file, 6 in the options, growth_rate is 8 in'):
        test_script.main([*TINY[:2], '--img-dir', str(images / 'set')])


def test_a_published_checkpoint_without_mean_std_takes_the_published_values_with_a_warning(images, tmp_path):
    np.save(tmp_path / 'mean_std.npy', np.array(test_script.PUBLISHED_MEAN_STD['MultiOrgan']))
    with_file = everything(segment(images, '--data-dir', '.'))
    with pytest.warns(UserWarning, match='carries no mean_std and there is no .*; taking the published values'):
        without = everything(segment(images, '--data-dir', 'nowhere'))
    assert with_file == without


@pytest.mark.parametrize('mean_std, message', [([[0.5] * 3], r'of shape \(1, 3\); expected'),
                                               ([[0.5] * 3, [0.1, 0.0, 0.1]], 'has a standard deviation of 0')])
def test_a_damaged_mean_std_in_a_checkpoint(images, own_checkpoint, mean_std, message):
    torch.save({**own_checkpoint, 'mean_std': mean_std}, 'own.pth.tar')
    with pytest.raises(InputError, match=message):
        test_script.main(['--model-path', 'own.pth.tar', '--img-dir', str(images / 'set')])


# ---------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------

def test_missing_labels_are_named(images, tmp_path):
    (tmp_path / 'few').mkdir()
    (tmp_path / 'few' / 'a.png').write_bytes((images / 'truth' / 'a_label.png').read_bytes())
    with pytest.raises(InputError, match="1 instance labels of images missing in few: b.1.png; .* give --label-dir ''"):
        segment(images, '--label-dir', 'few')


def test_a_label_of_another_size(images, tmp_path):
    (tmp_path / 'other').mkdir()
    for name in ('a', 'b.1'):
        save_instances(tmp_path / 'other' / f'{name}.png', np.ones((5, 6), int))
    with pytest.raises(InputError, match='a.png is 6 x 5 pixels, its image 90 x 70; they must have the same size'):
        segment(images, '--label-dir', 'other')


def test_a_missing_image_folder():
    with pytest.raises(InputError, match='no such folder: nowhere'):
        test_script.main([*TINY, '--img-dir', 'nowhere'])
