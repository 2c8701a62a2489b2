"""The scripts around the project."""
import importlib

import numpy as np
import pytest
from miniature import nuclei
from PIL import Image

from scripts import demo_report
from utils import InputError, save_image, save_instances

@pytest.mark.parametrize('script, words, message', [
    ('benchmark', 'nonsense', "argument what: invalid choice: 'nonsense'"),
    ('benchmark', 'large --model-path x', 'large needs --model-path, and there is no x'),
    ('benchmark', 'windows', 'windows needs --model-path, a file; it was not given'),
    ('demo_report', '', 'the following arguments are required: --data-dir, --result-dir, --out'),
    ('export_geojson', '', 'the following arguments are required: results'),
    ('export_pretrained', '--run x', 'the following arguments are required: --data-dir'),
    ('fuzz', '--count many', "argument --count: invalid int value: 'many'"),
    ('make_demo_data', 'x --sise 3', 'unrecognized arguments: --sise 3'),
    ('make_report', 'x --open', 'unrecognized arguments: --open'),
    ('otsu_baseline', '--img-dir x', 'the following arguments are required: --label-dir'),
])
def test_a_wrong_command_line_is_one_line(script, words, message):
    with pytest.raises(InputError) as refused:                     # of which run_script makes one line and exit code 2
        importlib.import_module(f'scripts.{script}').main(words.split())
    assert str(refused.value).startswith(message)
    assert 'needs' in message or str(refused.value).endswith(f'(see python scripts/{script}.py --help)')


TABLE = 'Metrics:\tpixel_acc\tF1\tDice\tAJI\nAverage:\t0.9\t0.8\t0.7\t0.6\n\na:\t0.9\t0.8\t0.7\t0.6\n'


def test_network_scores_are_read_from_the_result_file(tmp_path):
    (tmp_path / 'r.txt').write_text(TABLE)
    assert demo_report.network_scores(tmp_path / 'r.txt') == {
        name: dict(pixel_acc=0.9, F1=0.8, Dice=0.7, AJI=0.6) for name in ('Average', 'a')}
    with pytest.raises(InputError, match='no .*nothing.txt; run test.py first'):
        demo_report.network_scores(tmp_path / 'nothing.txt')


def test_report_compares_with_otsu_and_draws_the_overview(tmp_path, capsys):
    image, label = nuclei(0, 80, 80)
    save_image(tmp_path / 'data' / 'images' / 'test_same' / 'a.png', image)
    save_instances(tmp_path / 'data' / 'labels_instance' / 'test' / 'a.png', label)
    results = tmp_path / 'results'
    save_instances(results / 'test_same_segmentation' / 'a_seg.tiff', label)
    for kind in ('inside', 'contour'):
        save_image(results / 'test_same_prob_maps' / f'a_prob_{kind}.png', image[..., 0])
    (results / 'test_same_test_result.txt').write_text(TABLE)
    demo_report.main(['--data-dir', str(tmp_path / 'data'), '--result-dir', str(results), '--out',
                      str(tmp_path / 'overview.png')])
    text = capsys.readouterr().out
    otsu = float(text.split("of Otsu's threshold ")[1].split(',')[0])
    assert 0 < otsu <= 1 and "AJI of the network 0.6000" in text and f'difference {0.6 - otsu:+.4f}' in text
    picture = np.asarray(Image.open(tmp_path / 'overview.png'))
    assert picture.shape[1] == 1500 and picture[..., :3].std() > 20


def test_outline_is_drawn_on_the_object_s_own_border():
    label = np.zeros((9, 9), int)
    label[2:7, 2:7] = 1
    drawn = (demo_report.outline(np.zeros((9, 9, 3), np.uint8), label) > 0).any(axis=2)
    assert drawn.sum() == 16 and drawn[2, 2] and not drawn[4, 4]
