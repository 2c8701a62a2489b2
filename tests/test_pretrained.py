"""Weights that come with the code: how they are exported, described and verified; the shipped file, if it is there."""
import hashlib
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import export_pretrained
import numpy as np
import pytest
import torch
import update_batch_norm
import verify_pretrained
from PIL import Image
from torch.nn import functional as F

import test as test_script
import train
from dataset import DataFolder
from FullNet import create_model
from miniature import SMALL, calls_of, make_glas, make_multi_organ, nuclei
from my_transforms import get_transforms
from support.checkpoints import load_checkpoint
from support.files import save_image, save_instances, sha256_of
from support.script import InputError

ROOT = Path(__file__).resolve().parents[1]
TINY = ['--n-layers', '4', '--growth-rate', '2', '--dilations', '1']


def add_val_full(data):
    """Whole val images for a prepared folder."""
    for i in range(2):
        image, label = nuclei([9, i], 72, 80)
        save_image(data / f'images/val_full/v{i}.png', image)
        save_instances(data / f'labels_instance/val_full/v{i}.png', label)
    return data


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Two stages of a miniature training, scores, the file of weights, its card and what is expected of it."""
    folder = tmp_path_factory.mktemp('made')
    data = add_val_full(make_multi_organ(folder / 'data', n_train=2))
    train.main([*SMALL, '--data-dir', str(data), '--save-dir', str(folder / 'stage1')])
    best = folder / 'stage1/checkpoints/checkpoint_best.pth.tar'
    train.main([*SMALL, '--data-dir', str(data), '--save-dir', str(folder / 'stage2'), '--init-from', str(best),
                '--lr', '0.0003', '--epochs', '2', '--ema-decay', '0.5'])
    test_script.main(['--model-path', str(folder / 'stage2/checkpoints/checkpoint_best.pth.tar'), '--img-dir',
                      str(data / 'images/val_full'), '--label-dir', str(data / 'labels_instance/val_full'), '--tta',
                      'none', '--min-area', '1', '--gpu', 'cpu', '--save-dir', str(folder / 'scores_none')])
    (folder / 'shipped').mkdir()
    (folder / 'shipped/FullNet_MultiOrgan.md').write_text('# Weights\n\nKnown facts.\n')
    export_pretrained.main(['--run', str(folder / 'stage2'), '--data-dir', str(data), '--scores',
                            str(folder / 'scores_none'), '--best', str(folder / 'scores_none'),
                            '--out', str(folder / 'shipped/FullNet_MultiOrgan.pth.tar')])
    verify_pretrained.main(['--weights', str(folder / 'shipped/FullNet_MultiOrgan.pth.tar'), '--write'])
    return folder


@pytest.fixture
def shipped(made, tmp_path):
    """A copy of what ships, to be damaged. Testing the images once is enough: they are remembered."""
    shutil.copytree(made / 'shipped', tmp_path / 'shipped')
    return tmp_path / 'shipped/FullNet_MultiOrgan.pth.tar'


@pytest.fixture
def measured(made, monkeypatch):
    """What the weights find in the two images, without computing it again; may be changed."""
    found = json.loads((made / 'shipped/FullNet_MultiOrgan.json').read_text())
    monkeypatch.setattr(verify_pretrained, 'measure', lambda weights, picture=None: found)
    return found


# ---------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------

def test_the_recipe_of_every_stage_is_carried_along_and_no_path(made):
    weights = load_checkpoint(made / 'shipped/FullNet_MultiOrgan.pth.tar')
    first, second = weights['stages']
    assert (first['train']['lr'], second['train']['lr']) == (1e-3, 3e-4)
    assert (first['steps'], first['epochs']) == (1, 1) and second['steps'] == second['epochs'] in (1, 2)
    runs = [load_checkpoint(made / f'{stage}/checkpoints/checkpoint.pth.tar') for stage in ('stage1', 'stage2')]
    assert weights['hours'] == pytest.approx(sum(run['minutes'] for run in runs) / 60)
    assert weights['steps'] == first['steps'] + second['steps']
    assert str(made) not in repr({**weights, 'state_dict': {}})
    hashes = [sha256_of(path) for part in ('images', 'labels', 'weight_maps') for split in ('train', 'val')
              for path in (made / 'data' / part / split).iterdir()]
    assert weights['data_sha256'] == hashlib.sha256('\n'.join(sorted(hashes)).encode()).hexdigest()


def test_weights_that_were_trained_from_an_exported_file_keep_its_stages(made, tmp_path):
    train.main([*SMALL, '--data-dir', str(made / 'data'), '--save-dir', str(tmp_path / 'run'), '--init-from',
                str(made / 'shipped/FullNet_MultiOrgan.pth.tar'), '--lr', '0.0001'])
    stages = export_pretrained.stages_of(tmp_path / 'run/checkpoints/checkpoint_best.pth.tar')
    assert [stage['train']['lr'] for stage in stages] == [1e-3, 3e-4, 1e-4]
    before = load_checkpoint(made / 'shipped/FullNet_MultiOrgan.pth.tar')
    assert stages[:2] == before['stages']
    older = {key: value for key, value in before.items() if key != 'stages'}             # without stages: one
    torch.save(older, tmp_path / 'older.pth.tar')
    assert [stage['hours'] for stage in export_pretrained.stages_of(tmp_path / 'older.pth.tar')] == [before['hours']]


def test_scores_and_preset_are_those_of_the_labelled_test(made, tmp_path):
    shutil.copytree(made / 'scores_none', tmp_path / 'scores')
    checkpoint = tmp_path / 'stage2/checkpoints/checkpoint_best.pth.tar'
    shutil.copytree(made / 'stage2', tmp_path / 'stage2')
    metrics = json.loads((tmp_path / 'scores/val_full_metrics.json').read_text())
    metrics['made_by']['model_path'] = str(checkpoint)
    (tmp_path / 'scores/val_full_metrics.json').write_text(json.dumps(metrics))
    test_script.main(['--model-path', str(checkpoint), '--img-dir', str(made / 'data/images/test_same'), '--min-area',
                      '7', '--gpu', 'cpu', '--save-dir', str(tmp_path / 'scores')])            # without labels
    words = ['--run', str(tmp_path / 'stage2'), '--data-dir', str(made / 'data'), '--out', str(tmp_path / 'w.pth.tar'),
             '--scores', str(tmp_path / 'scores'), '--best', str(tmp_path / 'scores')]
    export_pretrained.main(words)
    exported = load_checkpoint(tmp_path / 'w.pth.tar')
    assert exported['best_post']['min_area'] == 1 and exported['scores'][0]['test']['tta'] == 'none'
    shutil.copy(made / 'stage1/checkpoints/checkpoint_best.pth.tar', checkpoint)             # as if trained further
    with pytest.raises(InputError, match='checkpoint_best.pth.tar is not the file any more that has the scores in'):
        export_pretrained.main(words)


def test_what_is_not_exported(made, tmp_path):
    arguments = ['--data-dir', str(made / 'data'), '--out', str(tmp_path / 'w.pth.tar')]
    with pytest.raises(InputError, match='the scores in .*scores_none are of other weights, .*stage2.*; run test.py'):
        export_pretrained.main(['--run', str(made / 'stage1'), *arguments, '--scores', str(made / 'scores_none')])
    with pytest.raises(InputError, match=r'stage1 has 0 \*_metrics.json files; expected one, from test.py with labels'):
        export_pretrained.main(['--run', str(made / 'stage2'), *arguments, '--scores', str(made / 'stage1')])
    with pytest.raises(InputError, match='trained without --ema-decay; leave out --raw'):
        export_pretrained.main(['--run', str(made / 'stage1'), *arguments, '--raw'])
    best = made / 'stage1/checkpoints/checkpoint_best.pth.tar'
    with pytest.raises(InputError, match='the checkpoint itself; expected another name'):
        export_pretrained.main(['--run', str(made / 'stage1'), '--data-dir', str(made / 'data'), '--out', str(best)])
    assert not (tmp_path / 'w.pth.tar').exists()


# ---------------------------------------------------------------------------------------------------
# Verification
# ---------------------------------------------------------------------------------------------------

def test_all_checks_pass_where_nothing_changed(made, shipped, capsys):
    verify_pretrained.main(['--weights', str(shipped), str(made / 'data')])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and all(line.startswith('pass  ') for line in lines[:8]) and lines[8] == 'all checks pass'
    aji = load_checkpoint(shipped)['scores'][0]['mean']['published_AJI']
    assert f'val_full of {made / "data"}, TTA none: AJI {aji:.4f}, expected {aji:.4f}' in lines[7]
    assert f'SHA-256 of {shipped}: {sha256_of(shipped)}' in lines[0]


@pytest.mark.parametrize('quantity, inside, outside', [
    ('objects', 5, 6), ('objects', -5, -6), ('mean_inside', 0.0099, 0.0101), ('mean_contour', -0.0099, -0.0101)])
def test_tolerances(shipped, measured, capsys, quantity, inside, outside):
    expected = {name: {'objects': 100, 'mean_inside': 0.3, 'mean_contour': 0.2} for name in measured}
    (shipped.parent / 'FullNet_MultiOrgan.json').write_text(json.dumps(expected))
    measured |= {name: dict(values) for name, values in expected.items()}
    measured['demo'][quantity] = expected['demo'][quantity] + inside
    verify_pretrained.main(['--weights', str(shipped)])
    assert 'all checks pass; with a prepared data folder' in capsys.readouterr().out
    measured['demo'][quantity] = expected['demo'][quantity] + outside
    with pytest.raises(SystemExit) as stopped:
        verify_pretrained.main(['--weights', str(shipped)])
    text = capsys.readouterr().out
    assert stopped.value.code == 1 and text.endswith('1 checks failed\n')
    assert re.search(f'^FAIL  demo: {quantity.replace("_", " ")}', text, re.MULTILINE)


def test_other_scores_fail(made, shipped, measured, capsys):
    weights = torch.load(shipped, weights_only=True)
    weights['scores'][0]['mean']['published_AJI'] += 0.006
    torch.save(weights, shipped)
    with pytest.raises(SystemExit) as stopped:
        verify_pretrained.main(['--weights', str(shipped), str(made / 'data')])
    text = capsys.readouterr().out
    assert stopped.value.code == 1 and '2 checks failed' in text             # the file is another one, too
    assert re.search('^FAIL  SHA-256 of .*; copy the file again$', text, re.MULTILINE)
    assert re.search('^FAIL  val_full', text, re.MULTILINE)


def test_what_cannot_be_checked(made, shipped, measured, tmp_path, monkeypatch):
    with pytest.raises(InputError, match='carries no scores with --tta full; choose another --tta'):
        verify_pretrained.main(['--weights', str(shipped), '--tta', 'full', str(made / 'data')])
    with pytest.raises(InputError, match='no nowhere/mean_std.npy'):
        verify_pretrained.main(['--weights', str(shipped), 'nowhere'])
    other = make_multi_organ(tmp_path / 'other', n_train=3)
    with pytest.raises(InputError, match='no weights were trained on .*other: mean_std.npy is another one'):
        verify_pretrained.main(['--weights', str(shipped), str(other)])
    (shipped.parent / 'FullNet_MultiOrgan.json').write_text('{"demo": {}}')
    with pytest.raises(InputError, match='FullNet_MultiOrgan.json does not say what is expected of tissue; take'):
        verify_pretrained.main(['--weights', str(shipped)])
    (shipped.parent / 'FullNet_MultiOrgan.json').unlink()
    with pytest.raises(InputError, match='no .*FullNet_MultiOrgan.json; take the file that belongs to'):
        verify_pretrained.main(['--weights', str(shipped)])
    (shipped.parent / 'FullNet_MultiOrgan.md').write_text('no hash')
    with pytest.raises(InputError, match='no SHA-256 in .*FullNet_MultiOrgan.md; take the file that belongs'):
        verify_pretrained.main(['--weights', str(shipped)])
    with pytest.raises(InputError, match='no checkpoint at nowhere.pth.tar'):
        verify_pretrained.main(['--weights', 'nowhere.pth.tar'])
    monkeypatch.setattr(test_script, 'PRETRAINED', tmp_path)
    with pytest.raises(InputError, match=f'no ..pth.tar in {tmp_path}; name one with --weights'):
        verify_pretrained.main([])
    with pytest.raises(InputError, match='best.pth.tar does not say how it was made; make it with'):
        verify_pretrained.main(['--weights', str(made / 'stage2/checkpoints/checkpoint_best.pth.tar'), '--write'])


def test_weights_for_glands_have_columns_and_a_picture_of_their_own(tmp_path, capsys):
    data, weights = make_glas(tmp_path / 'data'), tmp_path / 'glands.pth.tar'
    train.main(['--dataset', 'GlaS', *SMALL, '--data-dir', str(data), '--save-dir', str(tmp_path / 'run')])
    test_script.main(['--model-path', str(tmp_path / 'run/checkpoints/checkpoint_best.pth.tar'), '--img-dir',
                      str(data / 'images/val'), '--label-dir', str(data / 'labels_instance/val'), '--tta', 'none',
                      '--gpu', 'cpu', '--min-area', '70', '--save-dir', str(tmp_path / 'scores')])
    export_pretrained.main(['--run', str(tmp_path / 'run'), '--data-dir', str(data), '--scores',
                            str(tmp_path / 'scores'), '--best', str(tmp_path / 'scores'), '--out', str(weights)])
    opt, _ = test_script.parse_options(['--model-path', str(weights), '--preset', 'best', '--radius', '9'])
    assert opt.dataset == 'GlaS' and (opt.post['min_area'], opt.post['radius']) == (70, 9)
    verify_pretrained.main(['--weights', str(weights), '--write'])
    dice = load_checkpoint(weights)['scores'][0]['mean']['published_Dice']
    assert '| image | Dice | F1 | IoU | Hausdorff |' in (tmp_path / 'glands.md').read_text()
    capsys.readouterr()
    verify_pretrained.main(['--weights', str(weights), str(data)])
    assert f'TTA none: Dice {dice:.4f}, expected {dice:.4f} +- 0.005' in capsys.readouterr().out
    nuclei, glands = (verify_pretrained.test_images(name)['demo'][0] for name in ('MultiOrgan', 'GlaS'))
    assert glands.shape == (400, 400, 3) and nuclei.shape == (256, 256, 3)


# ---------------------------------------------------------------------------------------------------
# Model card
# ---------------------------------------------------------------------------------------------------

def test_the_card_keeps_its_words_and_gets_the_facts_of_the_weights(made, shipped, measured):
    card = shipped.parent / 'FullNet_MultiOrgan.md'
    text = card.read_text()
    weights = load_checkpoint(shipped)
    model = create_model(**weights['options']['model'])
    assert text.startswith('# Weights\n\nKnown facts.\n\n<!-- written by')
    assert f'`{sha256_of(shipped)}`' in text and str(weights['commit']) in text and weights['data_sha256'] in text
    assert f'{sum(p.numel() for p in model.parameters()):,} parameters' in text
    for name, row in {**weights['scores'][0]['images'], 'mean': weights['scores'][0]['mean']}.items():
        assert re.search(rf'^\| {name} \| {row["published_AJI"]:.4f} \| .* {row["dice"]:.4f} \|$', text, re.MULTILINE)
    assert Image.open(shipped.parent / 'FullNet_MultiOrgan.jpg').size == (512, 512)
    assert f'| demo | {measured["demo"]["objects"]} |' in text
    measured['demo']['objects'] += 1
    verify_pretrained.main(['--weights', str(shipped), '--write'])                   # again: replaced, not added
    again = card.read_text()
    assert again == text.replace(f'| demo | {measured["demo"]["objects"] - 1} |',
                                 f'| demo | {measured["demo"]["objects"]} |') != text
    assert json.loads((shipped.parent / 'FullNet_MultiOrgan.json').read_text()) == measured


# ---------------------------------------------------------------------------------------------------
# --preset best
# ---------------------------------------------------------------------------------------------------

def test_the_preset_is_taken_from_the_weights_and_an_option_that_is_given_wins(made, tmp_path, monkeypatch):
    words = ['--model-path', str(made / 'shipped/FullNet_MultiOrgan.pth.tar')]
    published, best = (test_script.parse_options([*words, *more])[0] for more in ((), ('--preset', 'best')))
    assert published.post['min_area'] == 20 and best.post == published.post | {'min_area': 1}        # of the scores
    assert published.test['save_dir'] == best.test['save_dir']
    assert test_script.parse_options([*words, '--preset', 'best', '--min-area', '7'])[0].post == best.post | {
        'min_area': 7}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(test_script, 'PRETRAINED', made / 'shipped')                                 # not named
    opt, _ = test_script.parse_options(['--preset', 'best'])
    assert opt.post == best.post and opt.test['save_dir'] == './experiments/MultiOrgan/FullNet_MultiOrgan'
    unsafe = load_checkpoint(made / 'shipped/FullNet_MultiOrgan.pth.tar') | {'best_post': {'save_dir': '/tmp'}}
    torch.save(unsafe, tmp_path / 'best.pth.tar')
    for path in (made / 'stage2/checkpoints/checkpoint_best.pth.tar', tmp_path / 'best.pth.tar'):
        with pytest.raises(InputError, match='best.pth.tar has no preset best; leave out --preset, or give'):
            test_script.parse_options(['--model-path', str(path), '--preset', 'best'])


# ---------------------------------------------------------------------------------------------------
# The script that makes them, and the one that checks them
# ---------------------------------------------------------------------------------------------------

def test_the_training_script_trains_scores_exports_and_goes_on(tmp_path):
    data = add_val_full(make_multi_organ(tmp_path / 'data', n_train=2, size=212))
    run, out = tmp_path / 'a run', tmp_path / 'shipped/w.pth.tar'
    settings = dict(DATA_DIR=str(data), SAVE_DIR=str(run), OUT=str(out), SCORES='none', DATA_500=str(data),
                    **{f'EPOCHS_{i}': '1' for i in range(1, 6)})
    words = [*TINY, '--workers', '0', '--val-every', '1', '--gpu', 'cpu']
    (run / 'stage1').mkdir(parents=True)
    (run / 'stage1/train.log').write_text('killed before its first checkpoint')
    mains = {'train': train.main, 'update_batch_norm': update_batch_norm.main, 'test': test_script.main,
             'export_pretrained': export_pretrained.main, 'verify_pretrained': verify_pretrained.main}
    steps = [*['train'] * 4, 'update_batch_norm', 'train', 'test', 'test', 'export_pretrained', 'verify_pretrained']
    calls, _ = calls_of('train_pretrained.sh', tmp_path, *words, **settings)
    assert [Path(call[0]).stem for call in calls] == steps
    for step, call in zip(steps, calls):
        mains[step](call[1:])
    weights = load_checkpoint(out)
    assert [(stage['train']['input_size'], stage['train']['lr_schedule']) for stage in weights['stages']] == [
        (144, 'none'), (144, 'cosine'), (208, 'cosine'), (208, 'cosine'), (208, 'cosine')]
    assert [('random_stain' in stage['transform']['train'], stage['train']['lr']) for stage in weights['stages']] == [
        *[(False, 0.002)] * 4, (True, 0.001)]
    assert load_checkpoint(run / 'stage4/checkpoints/checkpoint_batch_norm.pth.tar')['batch_norm_crops'] == 96
    assert [(scores['set'], scores['test']['tta'], scores['post']['h_maxima']) for scores in weights['scores']] == [
        ('val_full', 'none', 0), ('val_full', 'none', 0.2)]
    assert (out.parent / 'w.json').is_file()
    assert sha256_of(out) in (out.parent / 'w.md').read_text()

    # started again
    calls, _ = calls_of('train_pretrained.sh', tmp_path, *words, **settings)
    assert [Path(call[0]).stem for call in calls] == steps
    for stage, call in zip(('stage1', 'stage2', 'stage3', 'stage4', 'stage5'), [*calls[:4], calls[5]]):
        latest = run / stage / 'checkpoints/checkpoint.pth.tar'
        assert call[call.index('--checkpoint-path') + 1] == str(latest)
        before = latest.read_bytes()
        train.main(call[1:])                                            # no option contradicts the run
        assert latest.read_bytes() == before


@pytest.mark.skipif(not (ROOT / '.venv/bin/python').is_file(), reason='would install requirements.txt into .venv')
def test_the_verification_script(shipped):
    def exit_code(weights):
        return subprocess.run(['sh', str(ROOT / 'scripts/verify_pretrained.sh'), '--weights', str(weights)]).returncode
    assert exit_code(shipped) == 0
    (shipped.parent / 'FullNet_MultiOrgan.md').write_text('SHA-256 ' + 64 * '0')
    assert exit_code(shipped) == 1 and exit_code(shipped.with_name('none')) == 2


# ---------------------------------------------------------------------------------------------------
# Batch-norm statistics computed anew
# ---------------------------------------------------------------------------------------------------

def test_batch_norm_statistics_are_those_of_training_crops_without_augmentation(made, tmp_path):
    path, out = tmp_path / 'scaled.pth.tar', tmp_path / 'anew.pth.tar'
    before = load_checkpoint(made / 'stage2/checkpoints/checkpoint_best.pth.tar')
    before['options']['transform']['train'] = {'scale': 56, **before['options']['transform']['train']}
    torch.save(before, path)
    words = ['--model-path', str(path), '--data-dir', str(made / 'data'), '--out', str(out), '--crops', '7']
    update_batch_norm.main(words)
    after = load_checkpoint(out)
    assert after['batch_norm_crops'] == 8 and 'raw_state_dict' in before and 'raw_state_dict' not in after
    statistics = ('running_mean', 'running_var', 'num_batches_tracked')
    assert after['optimizer'] == {} and after['mean_std'] == before['mean_std']
    assert all(torch.equal(value, after['state_dict'][key]) for key, value in before['state_dict'].items()
               if not key.endswith(statistics))

    # the first layer by hand: two images, scaled to 56 x 56, and the 8 crops of 40 x 40 that DataFolder gives of them
    data = DataFolder([made / 'data' / part / 'train' for part in ('images', 'weight_maps', 'labels')],
                      ['weight.png', 'label.png'], [3, 1, 3],
                      get_transforms(dict(scale=56, random_crop=40, label_encoding=1, to_tensor=1,
                                          normalize=np.array(before['mean_std']))))
    batches = [torch.stack([data[i, 0, epoch][0] for i in range(2)]) for epoch in range(4)]
    outputs = [F.leaky_relu(F.conv2d(batch, before['state_dict']['conv1.conv.weight'], padding=1), 0.01)
               for batch in batches]
    means = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    variances = torch.stack([output.transpose(0, 1).flatten(1).var(1) for output in outputs]).mean(0)
    assert torch.allclose(after['state_dict']['conv1.bn.running_mean'], means, atol=1e-5)
    assert torch.allclose(after['state_dict']['conv1.bn.running_var'], variances, rtol=1e-4)
    assert not torch.allclose(before['state_dict']['conv1.bn.running_mean'], means, rtol=0.01)

    update_batch_norm.main([*words[:-3], str(tmp_path / 'again.pth.tar'), *words[-2:]])
    again = load_checkpoint(tmp_path / 'again.pth.tar')['state_dict']
    assert all(torch.equal(value, again[key]) for key, value in after['state_dict'].items())
    with pytest.raises(InputError, match='holds no optimizer state, so that it cannot be resumed'):
        train.main(['--checkpoint-path', str(out)])


def test_what_batch_norm_statistics_cannot_be_computed_of(made, tmp_path):
    path = made / 'stage2/checkpoints/checkpoint_best.pth.tar'
    words = ['--data-dir', str(made / 'data'), '--model-path']
    with pytest.raises(InputError, match='the checkpoint itself; expected another name'):
        update_batch_norm.main([*words, str(path), '--out', str(path)])
    with pytest.raises(InputError, match='--crops is 0; expected at least 1'):
        update_batch_norm.main([*words, str(path), '--out', str(tmp_path / 'x'), '--crops', '0'])
    published = ROOT / 'tests/golden/tiny_checkpoint.pth.tar'
    with pytest.raises(InputError, match='tiny_checkpoint.pth.tar holds no options or no mean_std'):
        update_batch_norm.main([*words, str(published), '--out', str(tmp_path / 'x')])
    other = make_multi_organ(tmp_path / 'other', n_train=3)
    with pytest.raises(InputError, match='other/mean_std.npy is not that of .*checkpoint_best.pth.tar, which was'):
        update_batch_norm.main(['--data-dir', str(other), '--model-path', str(path), '--out', str(tmp_path / 'x')])


def test_batches_of_fewer_crops_are_left_out_of_the_statistics(tmp_path):
    data = make_multi_organ(tmp_path, n_train=3)
    train_set = DataFolder([data / part / 'train' for part in ('images', 'weight_maps', 'labels')],
                           ['weight.png', 'label.png'], [3, 1, 3],
                           get_transforms(dict(random_crop=40, label_encoding=1, to_tensor=1)))
    batches = itertools.islice(update_batch_norm.training_crops(train_set, 2), 3)
    assert [len(batch) for batch in batches] == [2, 2, 2]


# ---------------------------------------------------------------------------------------------------
# The file that ships
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path', sorted(test_script.PRETRAINED.glob('*.pth.tar')), ids=lambda path: path.name)
def test_the_shipped_weights(path, tmp_path, monkeypatch, capsys):
    assert path.stat().st_size < 8e6
    weights = load_checkpoint(path)
    assert weights['optimizer'] == {} and all(value.dtype == torch.float32 for value in weights['state_dict'].values()
                                              if value.is_floating_point())
    assert sum(p.numel() for p in create_model(**weights['options']['model']).parameters()) == 1_780_233
    assert {'mean_std', 'lab', 'data_sha256', 'commit', 'hours', 'stages', 'scores', 'packages'} <= weights.keys()
    card, expected = (verify_pretrained.beside(path, ending).read_text() for ending in ('.md', '.json'))
    assert verify_pretrained.card_section(path, json.loads(expected)) in card                    # and the hash

    monkeypatch.chdir(tmp_path)
    (tmp_path / 'images').mkdir()
    dataset = weights['options']['dataset']
    Image.fromarray(verify_pretrained.test_images(dataset)['demo'][0][:96, :96]).save('images/a.png')
    test_script.main(['--dataset', dataset, '--img-dir', 'images', '--tta', 'none', '--gpu', 'cpu'])
    printed = capsys.readouterr().out
    assert 'taking the weights that come with the code' in printed and printed.count('\nlicence of') == 1
    assert len(list(Path(f'experiments/{dataset}/FullNet_{dataset}').rglob('a_seg.tiff'))) == 1
