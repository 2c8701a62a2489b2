"""The demo data set: reproducible, valid labels, and neither trivial nor hopeless for a threshold."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'scripts'))
import make_demo_data  # noqa: E402

from scripts.demo_report import otsu_label  # noqa: E402
from support.script import InputError  # noqa: E402
from utils import nuclei_accuracy_object_level  # noqa: E402


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    """The default data set."""
    out = tmp_path_factory.mktemp('demo')
    make_demo_data.main([str(out)])
    return out


def read(path):
    with Image.open(path) as image:
        return np.array(image)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_layout(demo):
    split = json.loads((demo / 'split.json').read_text())
    assert {name: len(images) for name, images in split.items()} == {'train': 6, 'val': 2, 'test_same': 2}
    names = sorted(name for images in split.values() for name in images)
    assert sorted(p.name for p in (demo / 'normalized').iterdir()) == [f'{n}.png' for n in names]
    assert sorted(p.name for p in (demo / 'labels_instance').iterdir()) == [f'{n}_label.png' for n in names]
    for name in names:
        image = read(demo / 'normalized' / f'{name}.png')
        assert image.shape == (500, 500, 3) and image.dtype == np.uint8


def test_labels_are_valid_and_nuclei_are_dark_and_touch_and_vary_in_size(demo):
    for path in sorted((demo / 'labels_instance').iterdir()):
        name, label = path.name, read(path)
        assert label.shape == (500, 500) and label.dtype in (np.uint16, np.int32), name     # int32: Pillow before 11
        count, areas = int(label.max()), np.bincount(label.ravel())[1:]
        assert 40 <= count <= 120, name
        assert areas.min() >= make_demo_data.SMALLEST_NUCLEUS, name           # so ids are consecutive too
        for number, window in enumerate(ndimage.find_objects(label), start=1):
            assert ndimage.label(label[window] == number, np.ones((3, 3)))[1] == 1, (name, number)
        small, large = np.percentile(areas, (5, 95))
        assert small < 150 and large > 300, name
        touching = np.unique(label[make_demo_data.touches_another(label.astype(int))])
        assert len(touching) >= 0.1 * count, name
        image = read(demo / 'normalized' / name.replace('_label', ''))
        assert image[label > 0].mean() < image[label == 0].mean() - 20, name


def test_touches_another():
    label = np.array([[1, 1, 2, 0], [1, 1, 0, 3], [0, 0, 0, 0], [4, 0, 0, 0]])
    expected = np.array([[0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]], bool)
    assert (make_demo_data.touches_another(label) == expected).all()


def test_same_seed_same_bytes_whatever_the_number_of_images(tmp_path):
    few = ['--size', '128', '--train', '2', '--val', '1', '--test', '1']
    make_demo_data.main([str(tmp_path / 'a'), *few])
    make_demo_data.main([str(tmp_path / 'b'), *few])
    make_demo_data.main([str(tmp_path / 'more'), '--size', '128', '--train', '3', '--val', '1', '--test', '2'])
    make_demo_data.main([str(tmp_path / 'other'), *few, '--seed', '1'])
    a, b, more, other = (files(tmp_path / name) for name in ('a', 'b', 'more', 'other'))
    assert a == b
    assert len(a) == 9 and len(more) == 13 and 'normalized/demo_test_02.png' in more
    pictures = [name for name in a if name.endswith('.png')]
    assert len({a[name] for name in pictures}) == len(pictures)              # no image is in two splits
    assert all(more[name] == a[name] for name in pictures)
    assert all(other[name] != a[name] for name in pictures)


def test_earlier_output_is_replaced_and_other_folders_refused(tmp_path):
    out = tmp_path / 'demo'
    few = ['--size', '64', '--val', '1', '--test', '1']
    make_demo_data.main([str(out), *few, '--train', '2'])
    make_demo_data.main([str(out), *few, '--train', '1'])
    assert not (out / 'normalized' / 'demo_train_02.png').exists()

    foreign = out / 'normalized' / 'patient.png'
    foreign.write_bytes(b'mine')
    before = files(out)
    with pytest.raises(InputError, match='patient.png was not made by this script'):
        make_demo_data.main([str(out), *few])
    assert files(out) == before

    (tmp_path / 'mine/normalized/talk').mkdir(parents=True)
    for name in ('split.json', 'normalized/talk/demo_talk.png', 'normalized/demo_patient7.png'):
        (tmp_path / 'mine' / name).write_text('mine')
        with pytest.raises(InputError, match=f'{name} was not made by this script'):
            make_demo_data.main([str(tmp_path / 'mine'), *few])
        (tmp_path / 'mine' / name).unlink()
    (tmp_path / 'link').symlink_to(tmp_path / 'mine')
    make_demo_data.main([str(tmp_path / 'link'), *few, '--train', '1'])
    assert (tmp_path / 'mine/split.json').is_file()


@pytest.mark.parametrize('option, value', [('--train', '0'), ('--size', '10'), ('--seed', '-1')])
def test_bad_options(tmp_path, option, value):
    with pytest.raises(InputError, match=f'{option} is {value}; expected'):
        make_demo_data.main([str(tmp_path / 'out'), option, value])
    assert not (tmp_path / 'out').exists()


def test_otsu_is_a_weak_baseline_on_the_test_images(demo):
    for name in json.loads((demo / 'split.json').read_text())['test_same']:
        predicted = otsu_label(read(demo / 'normalized' / f'{name}.png'))
        truth = read(demo / 'labels_instance' / f'{name}_label.png').astype(int)
        aji = nuclei_accuracy_object_level(predicted, truth)[6]
        assert 0.2 < aji < 0.5, name


def test_otsu_label_finds_dark_squares_and_nothing_in_a_flat_image():
    image = np.full((60, 60, 3), 220, np.uint8)
    image[10:20, 10:20] = image[40:50, 40:50] = (90, 50, 120)
    image[5:7, 50:52] = 0                                                # 4 pixels: too small
    label = otsu_label(image)
    assert label.max() == 2
    assert label[15, 15] == 1 and label[45, 45] == 2
    assert label[8, 15] == 1 and label[7, 15] == 0                       # dilated by the radius
    assert otsu_label(np.full((60, 60, 3), 220, np.uint8)).max() == 0
