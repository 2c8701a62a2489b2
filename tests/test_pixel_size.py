"""`test.py --mpp`: images are scaled to the pixel size of the training images."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from miniature import SMALL, make_glas, make_multi_organ, nuclei
from PIL import Image

import test as test_script
import train
from options import Options
from support.checkpoints import load_checkpoint
from support.images import pixel_size
from support.run_folder import facts_of_data
from support.script import InputError

GOLDEN = Path(__file__).parent / 'golden'
IMAGE = nuclei(1, 60, 80)[0]


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Checkpoints of both data sets, by name."""
    folder = tmp_path_factory.mktemp('weights')
    for dataset, make, words in (('MultiOrgan', make_multi_organ, ['--mpp', '0.4']), ('GlaS', make_glas, [])):
        train.main([*SMALL, '--dataset', dataset, '--data-dir', str(make(folder / dataset)), '--save-dir',
                    str(folder / f'{dataset}_run'), '--transform.train.scale', '60', '--transform.val.scale', 'none',
                    *words])
    return {dataset: folder / f'{dataset}_run/checkpoints/checkpoint.pth.tar' for dataset in ('MultiOrgan', 'GlaS')}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def result(weights, path, *words):
    """Instances and inside probability of an image."""
    out = f'out {words}'
    test_script.main(['--model-path', str(weights), '--img-dir', str(path), '--save-dir', out, '--tta', 'none', '--gpu',
                      'cpu', '--inside-threshold', '0.3', *words])
    return [np.asarray(tifffile.imread(p) if p.suffix == '.tiff' else Image.open(p))
            for p in (next(Path(out).rglob('*_seg.tiff')), next(Path(out).rglob('*_prob_inside.png')))]


def with_resolution(path, mpp):
    tifffile.imwrite(path, IMAGE, photometric='rgb', resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit='CENTIMETER')
    return path


def test_the_pixel_size_of_the_training_images_is_stored(weights):
    stored = [load_checkpoint(weights[dataset])['options']['train']['mpp'] for dataset in ('MultiOrgan', 'GlaS')]
    assert stored == [0.4, 0.62] and Options(True).parse([]).train['mpp'] == 0.25


def test_mpp_is_the_scale_factor_to_the_pixel_size_of_the_weights(tmp_path, weights):
    path = with_resolution(tmp_path / 'a.tif', 0.8)
    expected = result(weights['MultiOrgan'], path, '--scale-factor', '2')
    assert expected[1].shape == (120, 160)
    found = result(weights['MultiOrgan'], path, '--mpp', '0.8')
    with pytest.warns(UserWarning, match='a.tif: 0.8 um per pixel, 2 times that of the training images'):
        by_itself = result(weights['MultiOrgan'], path, '--mpp', 'auto')
    for a, b, c in zip(expected, found, by_itself):
        assert np.array_equal(a, b) and np.array_equal(a, c)


def test_pixel_size_of_tiffs(tmp_path):
    assert pixel_size(with_resolution(tmp_path / 'cm.tif', 0.5)) == pytest.approx(0.5)
    tifffile.imwrite(tmp_path / 'inch.tif', IMAGE, resolution=(25_400 / 0.23, 25_400 / 0.23), resolutionunit='INCH')
    tifffile.imwrite(tmp_path / 'imagej.tif', IMAGE, imagej=True, resolution=(4, 4), metadata={'unit': 'um'})
    ome = {'axes': 'YXS', 'PhysicalSizeX': 500, 'PhysicalSizeXUnit': 'nm'}
    tifffile.imwrite(tmp_path / 'x.ome.tif', IMAGE, metadata=ome)
    tifffile.imwrite(tmp_path / 'mu.ome.tif', IMAGE, metadata=ome | {'PhysicalSizeX': 0.5, 'PhysicalSizeXUnit': 'µm'})
    tifffile.imwrite(tmp_path / 'mm.ome.tif', IMAGE, metadata=ome | {'PhysicalSizeX': 5e-4, 'PhysicalSizeXUnit': 'mm'})
    sizes = [pixel_size(tmp_path / f'{name}.tif') for name in ('inch', 'imagej', 'x.ome', 'mu.ome', 'mm.ome')]
    assert sizes == pytest.approx([0.23, 0.25, 0.5, 0.5, 0.5], rel=1e-4)


def test_the_size_of_the_training_images_is_the_median_of_their_shorter_sides(tmp_path):
    for k, size in enumerate(((30, 50), (60, 40), (90, 100))):
        Image.new('RGB', size).save(tmp_path / f'{k}.png')
    train_set = SimpleNamespace(names=[], items=[[path, 'weight map', 'label'] for path in sorted(tmp_path.iterdir())])
    val_set = SimpleNamespace(names=[], items=[])
    assert facts_of_data(train_set, val_set, np.zeros((2, 3)), {}, None)['shorter_side'] == 40


def test_glands_are_scaled_by_their_pixel_size_instead_of_their_shorter_side(tmp_path, weights):
    """208 stands for the shorter side of the training images, 48 pixels of 0.62 um; of earlier weights for 522."""
    Image.fromarray(np.tile(IMAGE, (3, 3, 1))).save(tmp_path / 'a.png')                       # 180 x 240
    earlier = load_checkpoint(weights['GlaS'])
    assert earlier.pop('shorter_side') == 48
    torch.save(earlier, tmp_path / 'earlier.pth.tar')
    for path, mpp, trained in ((tmp_path / 'earlier.pth.tar', 0.62, 522), (tmp_path / 'earlier.pth.tar', 1.24, 522),
                               (weights['GlaS'], 0.155, 48)):
        instances, inside = result(path, tmp_path / 'a.png', '--mpp', str(mpp))
        assert inside.shape == tuple(round(side * mpp / 0.62 * 208 / trained) for side in (180, 240))
        assert instances.shape == (180, 240)


def test_gland_images_of_another_size_are_noted(tmp_path, weights, recwarn):
    """The published scaling to one size is right only for images that show as much tissue as the training images."""
    Image.fromarray(np.tile(IMAGE, (3, 3, 1))).save(tmp_path / 'large.png')                   # 180 x 240
    Image.fromarray(IMAGE).save(tmp_path / 'usual.png')                                       # 60 x 80
    result(weights['GlaS'], tmp_path / 'usual.png', '--patch-size', '208')
    result(weights['GlaS'], tmp_path / 'large.png', '--transform.test.scale', '50')
    assert not [warning for warning in recwarn.list if 'shorter side' in str(warning.message)]
    with pytest.warns(UserWarning, match='side of 180 pixels is scaled to 208, .* had 48; .* give --mpp'):
        result(weights['GlaS'], tmp_path / 'large.png')


def test_what_does_not_say_its_pixel_size_is_refused(tmp_path, weights):
    Image.fromarray(IMAGE).save(tmp_path / 'a.png', dpi=(72, 72))
    with_resolution(tmp_path / 'b.tif', 25_400 / 72)
    (tmp_path / 'c').mkdir()
    tifffile.imwrite(tmp_path / 'c/c.tif', IMAGE)
    ome = {'axes': 'YXS', 'PhysicalSizeX': 1, 'PhysicalSizeXUnit': 'pixel'}                             # not calibrated
    tifffile.imwrite(tmp_path / 'd.ome.tif', IMAGE, metadata=ome)
    ours, golden = weights['MultiOrgan'], str(GOLDEN / 'tiny_checkpoint.pth.tar')
    tifffile.imwrite(tmp_path / 'e.tif', IMAGE, resolution=(20_000, 10_000), resolutionunit='CENTIMETER')
    for path, model, words, message in (
            ('a.png', ours, '--mpp auto', 'a.png does not say its pixel size; .* --mpp a number'),
            ('b.tif', ours, '--mpp auto', 'b.tif says that a pixel is 352.8 x 352.8 um; expected a square of 0.05 to'),
            ('c/c.tif', ours, '--mpp auto', 'c.tif does not say its pixel size'),                      # 1, of no unit
            ('e.tif', ours, '--mpp auto', 'e.tif says that a pixel is 0.5 x 1 um; expected a square of 0.05 to 4'),
            ('d.ome.tif', ours, '--mpp auto', 'd.ome.tif does not say its pixel size'),
            ('a.png', golden, '--mpp 0.5 --n-layers 4 --growth-rate 8', 'tiny_.* does not say the pixel size of its'),
            ('a.png', ours, '--mpp 0.5 --scale-factor 2', '--mpp and --scale-factor both say'),
            ('a.png', weights['GlaS'], '--scale-factor 2', '--scale-factor is 2, but .* 208 pixels; give --mpp'),
            ('a.png', golden, '--dataset GlaS --mpp 0.5 --n-layers 4 --growth-rate 8',
             'give --transform.test.scale inst'),
            ('a.png', ours, '--mpp 0', "--mpp is '0'; expected a number of um above 0, or auto")):
        with pytest.raises(InputError, match=message):
            result(model, tmp_path / path, *words.split())
