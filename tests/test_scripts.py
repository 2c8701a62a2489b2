"""The scripts around the project."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from miniature import SMALL, make_multi_organ, nuclei
from scripts import benchmark, demo_report
from support.files import save_image, save_instances
from support.images import list_images
from support.script import InputError
from utils import nuclei_accuracy_object_level


@pytest.mark.parametrize('script, words, message', [
    ('ablation', '', 'the following arguments are required: --data-dir'),
    ('benchmark', 'nonsense', "argument what: invalid choice: 'nonsense'"),
    ('benchmark', 'large --model-path x', 'large needs --model-path, and there is no x'),
    ('benchmark', 'windows', 'windows needs --model-path, a file; it was not given'),
    ('demo_report', '', 'the following arguments are required: --data-dir, --result-dir, --out'),
    ('export_geojson', '', 'the following arguments are required: results'),
    ('export_pretrained', '--run x', 'the following arguments are required: --data-dir'),
    ('make_demo_data', 'x --sise 3', 'unrecognized arguments: --sise 3'),
    ('make_report', 'x --open', 'unrecognized arguments: --open'),
    ('reproduce', 'GlaS many', "argument minutes: invalid float value: 'many'"),
    ('study_post_processing', 'x', 'the following arguments are required: --label-dir, --set'),
    ('update_batch_norm', '', 'the following arguments are required: --model-path, --data-dir, --out'),
    ('verify_pretrained', '--wrong', 'unrecognized arguments: --wrong'),
])
def test_a_wrong_command_line_is_one_line(script, words, message):
    with pytest.raises(InputError) as refused:                     # of which run_script makes one line and exit code 2
        importlib.import_module(f'scripts.{script}').main(words.split())
    assert str(refused.value).startswith(message)
    assert 'needs' in message or str(refused.value).endswith(f'(see python scripts/{script}.py --help)')


def test_the_gpu_benchmark_in_small_on_the_cpu(capsys):
    network = ('--n-layers', '4', '--growth-rate', '2', '--dilations', '1', '--gpu', 'cpu', '--workers', '0',
               '--val-overlap', '8')
    benchmark.gpu_table(benchmark.GpuSizes(torch.device('cpu'), batch=2, crop=40, image=64, patches=3, seconds=0.01,
                                           product=64, network=network, compile=False))
    out = capsys.readouterr().out
    table = {line[:15].strip(): line.split()[-5:] for line in out.splitlines()
             if line.startswith(('published', 'ours')) and 'epoch' not in line}
    assert list(table) == ['published', 'ours', 'ours, amp']
    assert all(float(row[0]) > 0 and float(row[3]) > 0 for row in table.values())
    assert out.count('epoch of 3 patches with loader') == 2
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match='gpu needs a CUDA GPU, and the best device here is'):
            benchmark.main(['gpu'])


def test_report_compares_with_otsu_and_draws_the_overview(tmp_path, capsys):
    image, label = nuclei(0, 80, 80)
    save_image(tmp_path / 'data' / 'images' / 'test_same' / 'a.png', image)
    save_instances(tmp_path / 'data' / 'labels_instance' / 'test' / 'a.png', label)
    results = tmp_path / 'results'
    save_instances(results / 'test_same_segmentation' / 'a_seg.tiff', label)
    for kind in ('inside', 'contour'):
        save_image(results / 'test_same_prob_maps' / f'a_prob_{kind}.png', image[..., 0])
    words = ['--data-dir', str(tmp_path / 'data'), '--result-dir', str(results),
             '--out', str(tmp_path / 'overview.png')]
    with pytest.raises(InputError, match='no .*test_same_test_result.txt; run test.py first'):
        demo_report.main(words)
    (results / 'test_same_test_result.txt').write_text(
        'Metrics:\tpixel_acc\tF1\tDice\tAJI\nAverage:\t0.9\t0.8\t0.7\t0.6\n\na:\t0.9\t0.83\t0.74\t0.65\n')
    image_path = tmp_path / 'data/images/test_same'
    other, other_label = nuclei(1, 80, 80)
    save_image(image_path / 'b.png', other)
    save_instances(tmp_path / 'data/labels_instance/test/b.png', other_label)
    with pytest.raises(InputError, match='results has not the scores of the images in .*test_same; run test.py again'):
        demo_report.main(words)
    scores = demo_report.otsu_scores(list_images(image_path), tmp_path / 'data/labels_instance/test')
    found = [nuclei_accuracy_object_level(demo_report.otsu_label(picture), truth)
             for picture, truth in ((image, label), (other, other_label))]
    expected = [(result.AJI, result.dice, result.F1) for result in found]
    assert scores == {'a': expected[0], 'b': expected[1], 'Average': pytest.approx(np.mean(expected, axis=0))}
    (image_path / 'b.png').unlink()
    demo_report.main(words)
    text = capsys.readouterr().out
    assert '  0.6500  0.7400  0.8300\n' in text                       # AJI, Dice and F1 of the network
    otsu = float(text.split("of Otsu's threshold ")[1].split(',')[0])
    assert 0 < otsu <= 1 and "AJI of the network 0.6000" in text and f'difference {0.6 - otsu:+.4f}' in text
    picture = np.asarray(Image.open(tmp_path / 'overview.png'))
    assert picture.shape[1] == 1500 and picture[..., :3].std() > 20


def test_training_testing_and_the_benchmark_need_no_simpleitk(tmp_path):
    data = make_multi_organ(tmp_path / 'data')
    (tmp_path / 'hidden').mkdir()
    (tmp_path / 'hidden/SimpleITK.py').write_text('raise ImportError("hidden")')
    words = [*SMALL, '--data-dir', str(data), '--save-dir', str(tmp_path / 'run')]
    weights, images = tmp_path / 'run/checkpoints/checkpoint_best.pth.tar', data / 'images/val'
    program = (f'import train, test; from scripts import benchmark; train.main({words}); test.main(["--model-path", '
               f'{str(weights)!r}, "--img-dir", {str(images)!r}, "--tta", "none", "--gpu", "cpu"]); '
               f'benchmark.main(["loader", "--repeats", "1"])')
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': f'{tmp_path / "hidden"}{os.pathsep}{root}'})
    assert done.returncode == 0, done.stderr
    assert 'SimpleITK is not installed' in done.stdout and 'ours' in done.stdout
