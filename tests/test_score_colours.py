"""scripts/score_colours.py: the images in other colours, and the table of their scores."""
import numpy as np
import pytest
import score_colours
import tifffile
from skimage.color import rgb2hsv

from FullNet import create_model
from miniature import nuclei, pixels
from support.checkpoints import load_checkpoint, save_checkpoint
from support.files import save_image, save_instances
from support.script import InputError

NAMES = ('Breast_TCGA-AR-A1AS-01Z-00-DX1', 'Liver_TCGA-50-5931-01Z-00-DX1')
MODEL = dict(name='FullNet', in_c=3, out_c=3, n_layers=4, growth_rate=2, drop_rate=0.1, compress_ratio=0.5,
             dilations=(1,), is_hybrid=True, layer_type='basic')


@pytest.fixture
def words(tmp_path):
    """The words of the command line; data, raw TIFFs and weights are in tmp_path."""
    for i, name in enumerate(NAMES):
        image, label = nuclei(i, 60, 70)
        save_image(tmp_path / 'data/images/val_full' / f'{name}.png', image)
        save_instances(tmp_path / 'data/labels_instance/val_full' / f'{name}.png', label)
    image, _ = nuclei(0, 60, 70)
    (tmp_path / 'tiffs').mkdir()
    tifffile.imwrite(tmp_path / 'tiffs/TCGA-AR-A1AS-01Z-00-DX1.tif', image // 2 + 60, photometric='rgb')
    save_checkpoint(tmp_path / 'w.pth.tar', {
        'epoch': 1, 'state_dict': create_model(**MODEL).state_dict(), 'best_iou': 0.5, 'optimizer': {},
        'options': {'dataset': 'MultiOrgan', 'model': MODEL, 'train': {}, 'transform': {}},
        'mean_std': [[0.74, 0.54, 0.66], [0.16, 0.2, 0.15]], 'lab': [[63, 25, -9], [17, 9, 6]]})
    return [str(tmp_path / 'data'), str(tmp_path / 'out'), '--model-path', str(tmp_path / 'w.pth.tar'), '--tta', 'none',
            '--min-area', '1', '--gpu', 'cpu', '--raw', str(tmp_path / 'tiffs')]


def test_the_val_images_are_scored_in_all_colours(words, tmp_path, capsys):
    score_colours.main([*words, '--color-norm', 'False'])              # of all rows but the last
    table = (tmp_path / 'out/colours.txt').read_text()
    assert capsys.readouterr().out == table
    rows = {line[:24].strip(): line[24:].split() for line in table.splitlines()[1:]}
    assert list(rows) == ['as they are', 'pale', 'dark', 'red', 'blue', 'raw', 'raw, --color-norm True']
    for name, row in rows.items():
        images = dict(zip(row[4::2], map(float, row[5::2])))
        assert list(images) == (['Breast'] if 'raw' in name else ['Breast', 'Liver'])
        assert float(row[0]) == pytest.approx(np.mean(list(images.values())), abs=1e-4) and 0 < float(row[3]) <= 1
    assert rows['raw'] != rows['raw, --color-norm True'] and rows['pale'] != rows['as they are']
    assert np.array_equal(pixels(tmp_path / f'out/images/raw/{NAMES[0]}.png'), nuclei(0, 60, 70)[0] // 2 + 60)

    weights = load_checkpoint(tmp_path / 'w.pth.tar')                      # as of a run that was not exported
    save_checkpoint(tmp_path / 'w.pth.tar', {key: value for key, value in weights.items() if key != 'lab'})
    with pytest.raises(InputError, match="needs the training images' colours"):
        score_colours.main(words)
    assert (tmp_path / 'out/colours.txt').read_text().splitlines() == table.splitlines()[:-1]


def test_the_colours(words, tmp_path):
    score_colours.write_versions(tmp_path / 'data', None, tmp_path / 'out')
    image = pixels(tmp_path / 'data/images/val_full' / f'{NAMES[0]}.png').astype(int)
    made = {name: pixels(tmp_path / 'out/images' / name / f'{NAMES[0]}.png') for name in score_colours.COLOURS}
    assert np.abs(made['pale'] - (255 + image) / 2).max() <= 0.5001
    assert np.abs(made['dark'] - 255 * (image / 255) ** 1.7).max() <= 0.5001
    coloured = image.max(2) - image.min(2) > 60                      # where rounding moves the hue little
    for name, degrees in (('red', 18), ('blue', -18)):
        turned = (rgb2hsv(made[name]) - rgb2hsv(image.astype(np.uint8)))[..., 0][coloured] * 360
        assert np.abs((turned - degrees + 180) % 360 - 180).max() < 2
    save_image(tmp_path / 'out/images/pale/mine.png', image.astype(np.uint8))
    with pytest.raises(InputError, match='mine.png is none of the images of .*data; give another OUT'):
        score_colours.write_versions(tmp_path / 'data', None, tmp_path / 'out')
    assert (tmp_path / 'out/images/pale/mine.png').is_file()


def test_a_folder_without_the_raw_images(words, tmp_path):
    (tmp_path / 'tiffs/TCGA-AR-A1AS-01Z-00-DX1.tif').rename(tmp_path / 'tiffs/other.tif')
    with pytest.raises(InputError, match='tiffs has none of the images Breast_TCGA'):
        score_colours.main(words)
