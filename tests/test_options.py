"""Defaults, command line, and what is refused."""
import json
from pathlib import Path

import pytest

from options import DATASETS, SCRIPT_GROUPS, TRAIN, TRANSFORM, Options
from support.command_line import TRANSFORM_PARSERS, set_transform
from support.script import InputError


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def for_training(*words):
    return Options(isTrain=True).parse(list(words))


def for_testing(*words):
    return Options(isTrain=False).parse(list(words))


def test_published_defaults():
    opt = for_training()
    assert opt.dataset == 'MultiOrgan'
    published = dict(data_dir='./data/MultiOrgan', save_dir='./experiments/MultiOrgan/1', input_size=208,
                     num_epochs=300, batch_size=8, val_overlap=80, lr=1e-3, weight_decay=1e-4, log_interval=50,
                     workers='auto', alpha=1.0, checkpoint_freq=100, start_epoch=0, checkpoint='', lr_schedule='none')
    assert {name: opt.train[name] for name in published} == published
    assert opt.model == dict(name='FullNet', in_c=3, out_c=3, n_layers=6, growth_rate=24, drop_rate=0.1,
                             compress_ratio=0.5, dilations=(1, 2, 4, 8, 16, 4, 1), is_hybrid=True, layer_type='basic')
    assert list(opt.transform['train'].items()) == [
        ('random_resize', (0.8, 1.25)), ('horizontal_flip', True), ('random_affine', 0.3), ('random_elastic', (6, 15)),
        ('random_rotation', 90), ('random_crop', 208), ('label_encoding', 1), ('to_tensor', 1), ('normalize', True)]
    glas = for_training('--dataset', 'GlaS')
    assert (glas.train['lr'], glas.train['num_epochs']) == (5e-4, 1000)
    assert list(glas.transform['train']) == ['scale', 'horizontal_flip', 'random_affine', 'random_elastic',
                                             'random_rotation', 'random_crop', 'label_encoding', 'to_tensor',
                                             'normalize']
    assert glas.transform['val'] == dict(scale=208, label_encoding=2, to_tensor=1, normalize=True)


OFF = dict(inside_threshold=0, h_maxima=0)          # not in the published method


@pytest.mark.parametrize('dataset, expected, post', [
    ('MultiOrgan', dict(img_dir='./data/MultiOrgan/images/test_same', patch_size=208, overlap=80,
                        label_dir='./data/MultiOrgan/labels_instance/test'), dict(min_area=20, radius=2, **OFF)),
    ('GlaS', dict(img_dir='./data/GlaS/images/testA', label_dir='./data/GlaS/labels_instance/testA', patch_size=0),
     dict(min_area=100, radius=4, **OFF)),
])
def test_published_test_defaults(dataset, expected, post):
    opt = for_testing('--dataset', dataset)
    assert {name: opt.test[name] for name in expected} == expected and opt.post == post
    assert (opt.test['epoch'], opt.test['tta'], opt.test['save_flag']) == ('best', 'full', True)
    assert opt.test['save_dir'] == f'./experiments/{dataset}/1/best'
    assert opt.test['model_path'] == f'./experiments/{dataset}/1/checkpoints/checkpoint_best.pth.tar'


def a_word_for(name, option):
    """A valid word for an option that is not its default."""
    special = {'dilations': '1 2', 'gpu': 'cpu', 'tta': 'flips', 'scale_16bit': '0 4095', 'n_layers': '4',
               'input_size': '160', 'patch_size': '160', 'lr_schedule': 'cosine', 'name': 'FCN_pooling',
               'layer_type': 'bottleneck', 'val_fraction': '0.4', 'epoch': '7',
               'fractions': '0.5 0.3 0.2', 'others': 'val', 'workers': '3',
               'xml_layers': 'nuclei', 'mpp': '0.5', 'preset': 'best'}
    if name in special:
        return special[name]
    default = option.default[0] if isinstance(option.default, tuple) else option.default
    if isinstance(default, bool):
        return str(not default)
    return f'{default}x' if isinstance(default, str) else str(default + 1) if isinstance(default, int) else '0.05'


ALL_FLAGS = [(script, group, name) for script, groups in SCRIPT_GROUPS.items() for group in groups
             for name in groups[group] if name != 'in_c']              # always 3


@pytest.mark.parametrize('script, group, name', ALL_FLAGS, ids=['-'.join(f) for f in ALL_FLAGS])
def test_every_option_has_a_flag(script, group, name):
    option = SCRIPT_GROUPS[script][group][name]
    words = {'img_dir': ['--label-dir', 'l'], 'val_fraction': ['--dataset', 'GlaS']}.get(name, [])     # what it needs
    if name in ('split', 'fractions'):
        words = ['--img-dir', 'i', '--label-dir', 'l']
    default, changed = (Options(script=script).parse([*words, *argv]) for argv in
                        ([], ['--' + name.replace('_', '-'), *a_word_for(name, option).split()]))
    assert getattr(default, group)[name] != getattr(changed, group)[name]
    assert (group, name) in changed.given


@pytest.mark.parametrize('word, value', [('True', True), ('false', False), ('0', False), ('yes', True)])
def test_flags_that_are_true_or_false(word, value):
    assert for_testing('--save-flag', word).test['save_flag'] is value


def test_published_names_of_flags():
    opt = for_training('--epochs', '3', '--checkpoint-path', 'x.pth')
    assert opt.train['num_epochs'] == 3 and opt.train['checkpoint'] == 'x.pth'


@pytest.mark.parametrize('words, gpus', [
    (['01'], [0, 1]), (['0', '1'], [0, 1]), (['10,11'], [10, 11]), (['10,'], [10]), (['cpu'], []), (['auto'], 'auto'),
])
def test_gpu_numbers(words, gpus):
    assert for_training('--gpu', *words).train['gpu'] == gpus


def test_training_takes_the_next_free_run_and_testing_the_newest(tmp_path):
    for number in ('1', '2', '10', 'notes'):
        (tmp_path / 'experiments' / 'MultiOrgan' / number).mkdir(parents=True)
    assert for_training().train['save_dir'] == './experiments/MultiOrgan/11'
    assert for_testing().test['save_dir'] == './experiments/MultiOrgan/10/best'
    assert for_training('--dataset', 'GlaS').train['save_dir'] == './experiments/GlaS/1'
    opt = for_testing('--dataset', 'GlaS', '--epoch', '20')
    assert opt.test['model_path'] == './experiments/GlaS/1/checkpoints/checkpoint_20.pth.tar'
    assert opt.test['save_dir'] == './experiments/GlaS/1/20'


def test_labels_belong_to_images():
    assert for_testing('--img-dir', 'somewhere').test['label_dir'] == ''
    assert for_testing('--img-dir', 'somewhere', '--label-dir', 'there').test['label_dir'] == 'there'
    assert for_testing('--label-dir', '').test['label_dir'] == ''


def test_transforms_on_the_command_line():
    opt = for_training('--transform.train.random_affine', '0.1', '--transform.train.random_elastic', 'none',
                        '--transform.train.vertical_flip', 'True', '--transform.train.random_resize', '0.5', '2',
                        '--transform.val.scale', '300')
    assert list(opt.transform['train'].items())[:4] == [('random_resize', (0.5, 2.0)), ('horizontal_flip', True),
                                                        ('vertical_flip', True), ('random_affine', 0.1)]
    assert 'random_elastic' not in opt.transform['train'] and opt.transform['val']['scale'] == 300
    assert for_testing('--dataset', 'GlaS', '--transform.test.scale', 'none').transform['test'] == \
        dict(to_tensor=1, normalize=True)
    assert 'random_elastic' in TRANSFORM.MultiOrgan['train'], 'the defaults must not change'


def test_set_transform_keeps_the_order():
    assert list(set_transform({'scale': 1, 'to_tensor': 1}, 'random_crop', 9)) == ['scale', 'random_crop', 'to_tensor']
    assert list(set_transform({'scale': 1, 'to_tensor': 1}, 'normalize', True)) == ['scale', 'to_tensor', 'normalize']
    own_order = {'random_crop': 208, 'random_affine': 0.3}
    assert list(set_transform(own_order, 'random_rotation', 90)) == ['random_rotation', 'random_crop', 'random_affine']
    assert set_transform({'scale': 1}, 'scale', None) == {} == set_transform({}, 'scale', None)
    assert set(TRANSFORM_PARSERS) >= {name for d in DATASETS for t in getattr(TRANSFORM, d).values() for name in t}


def test_the_crop_follows_input_size_unless_given():
    assert for_training('--input-size', '100').transform['train']['random_crop'] == 100
    opt = for_training('--input-size', '100', '--transform.train.random_crop', '90')
    assert opt.transform['train']['random_crop'] == 90


@pytest.mark.parametrize('script, words, message', [
    ('train', '--n-lay 4', 'unrecognized arguments: --n-lay 4'),
    ('train', '--lr fast', "--lr is 'fast'; expected a number"),
    ('train', '--batch-size 1.5', "--batch-size is '1.5'; expected a whole number"),
    ('train', '--lr-schedule step', "--lr-schedule is 'step'; expected one of none, cosine, onecycle"),
    ('train', '--dataset Camelyon', "argument --dataset: invalid choice: 'Camelyon'"),
    ('train', '--gpu first', "--gpu is 'first'; expected GPU numbers such as 0 or 0,1, or cpu, or auto"),
    ('train', '--workers -1', "--workers is '-1'; expected a whole number of at least 0, or auto"),
    ('train', '--is-hybrid maybe', "--is-hybrid is 'maybe'; expected True or False"),
    ('train', '--n-layers 5', r'--dilations, --n-layers: no hybrid dilations for \(dilation, n_layers\) = \(1, 5\)'),
    ('train', '--dilations 0', '--dilations is 0; expected one or more numbers of at least 1'),
    ('train', '--dilations ,', '--dilations is empty; expected one or more numbers of at least 1'),
    ('train', '--in-c 1', '--in-c is 1; expected 3: all images are read as RGB'),
    ('train', '--input-size 80', '--val-overlap is 80; expected less than --input-size, 80'),
    ('train', '--lr-schedule onecycle --warmup-epochs 2', '--warmup-epochs is 2.*warm-up of its own'),
    ('test', '--overlap 208', '--overlap is 208; expected less than --patch-size, 208'),
    ('test', '--tta some', "--tta is 'some'; expected full, flips or none"),
    ('test', '--scale-16bit 9 3', 'expected two numbers LO HI with LO < HI'),
    ('prepare', '--scale-16bit nan nan', 'expected two numbers LO HI with LO < HI'),
    ('prepare', '--fractions 0.5 0.5', "--fractions is '0.5 0.5'; expected 3 numbers"),
    ('prepare', '--sigma 0', '--sigma is 0.0; expected at least'),
    ('prepare', '--patch-size 0', '--patch-size is 0; expected at least 1'),
    ('train', '--batch-size 0', '--batch-size is 0; expected at least 1'),
    ('train', '--out-c 2', '--out-c is 2; expected at least 3'),
    # transforms
    ('train', '--transform.train.random_affine inf', 'random_affine is inf.*finite'),
    ('train', '--transform.train.random_resize 1.0 inf', 'random_resize is 1.0 inf.*finite'),
    ('train', '--transform.train.random_elastic 6.5,15', 'expected a whole number of points and a sigma'),
    ('train', '--transform.train.random_elastic 6', "random_elastic is '6'; expected 2 numbers"),
    ('train', '--transform.train.random_elastic 0 1', 'random_elastic'),
    ('train', '--transform.train.random_resize 0 0', 'random_resize is 0.0 0.0; expected two factors LO HI'),
    ('train', '--transform.train.scale 0', 'scale is 0; expected at least 1'),
    ('train', '--transform.train.random_crop 0', 'random_crop is 0; expected at least 1'),
    ('train', '--transform.train.label_encoding -1', 'label_encoding is -1; expected at least 0'),
    ('train', '--transform.train.random_affine -1', 'random_affine is -1.0; expected at least 0'),
    ('train', '--transform.train.random_rotation -1', 'random_rotation is -1.0; expected at least 0'),
    ('train', '--transform.train.random_stain 1 0 0', 'random_stain is 1.0 0.0 0.0; expected strength, offset and br'),
    ('train', '--transform.train.random_stain 0 -1 0', 'random_stain is 0.0 -1.0 0.0; expected strength, offset'),
    ('train', '--transform.train.random_stain 0 0 1', 'random_stain is 0.0 0.0 1.0; expected strength, offset'),
    ('train', '--transform.val.label_encoding none', 'label_encoding is none; expected a radius'),
    ('train', '--transform.train.to_tensor none', 'to_tensor is none; expected 1'),
    ('train', '--transform.train.to_tensor 3', 'to_tensor is 3; expected 1'),
    ('test', '--transform.test.horizontal_flip True', '--transform.test.horizontal_flip is True; expected none: outs'),
    ('train', '--transform.val.random_crop 20', 'val.random_crop is 20; expected none: outside training only scale, lab'),
    # options of prepare_data.py that would change nothing
    ('prepare', '--split x.json', '--split changes nothing for MultiOrgan without --img-dir; leave it out'),
    ('prepare', '--fractions 1 0 0', '--fractions changes nothing for MultiOrgan without --img-dir'),
    ('prepare', '--img-dir i --label-dir l --split x.json --fractions 1 0 0', '--fractions .* with --img-dir and --spl'),
    ('prepare', '--img-dir i --label-dir l --others val', '--others changes nothing for MultiOrgan with --img-dir'),
    ('prepare', '--val-fraction 0.5', '--val-fraction changes nothing for MultiOrgan without --img-dir'),
    ('prepare', '--dataset GlaS --patch-size 90', '--patch-size changes nothing for GlaS without --img-dir'),
])
def test_values_that_are_refused(script, words, message):
    with pytest.raises(InputError, match=message):
        Options(script=script).parse(words.split())


NUMBERS = [(script, group, name) for script, group, name in ALL_FLAGS
           if SCRIPT_GROUPS[script][group][name].parse in (int, float)]


@pytest.mark.parametrize('script, group, name', NUMBERS, ids=['-'.join(f) for f in NUMBERS])
def test_every_number_is_finite_and_has_a_least_value(script, group, name):
    option, flag = SCRIPT_GROUPS[script][group][name], '--' + name.replace('_', '-')
    refused = [option.at_least - 1] + ['nan', 'inf'] * (option.parse is float)
    refused += [] if option.below is None else [option.below]
    for word in refused:
        with pytest.raises(InputError, match=f'{flag} is .*; expected (at least|less than|a finite number)'):
            Options(script=script).parse([f'{flag}={word}'])


@pytest.mark.parametrize('script, flag', [('train', '--checkpoint-path'), ('train', '--save-dir'),
                                          ('test', '--save-dir'), ('test', '--model-path'), ('test', '--img-dir'),
                                          ('prepare', '--data-dir'), ('prepare', '--raw-dir')])
def test_empty_paths_are_refused(script, flag):
    with pytest.raises(InputError, match="is ''.*leave it out"):
        Options(script=script).parse([flag, ''])


def test_results_go_to_the_run_of_the_checkpoint(tmp_path, monkeypatch):
    Path('run/checkpoints').mkdir(parents=True)
    for checkpoint, folder in [('run/checkpoints/checkpoint_best.pth.tar', 'run/best'),
                               ('run/checkpoints/checkpoint_100.pth.tar', 'run/100'),
                               ('run/checkpoints/checkpoint.pth.tar', 'run/checkpoint'),
                               ('weights/mine.pth.tar', './experiments/GlaS/mine')]:
        words = ['--dataset', 'GlaS', '--model-path', checkpoint]
        assert for_testing(*words).test['save_dir'] == folder
        assert for_testing(*words, '--save-dir', 'out').test['save_dir'] == 'out'
    resumed = ['--checkpoint-path', 'run/checkpoints/checkpoint_100.pth.tar']
    assert for_training(*resumed).train['save_dir'] == 'run'
    assert for_training(*resumed, '--save-dir', 'out').train['save_dir'] == 'out'
    assert for_training('--checkpoint-path', 'mine.pth.tar').train['save_dir'] == './experiments/MultiOrgan/1'
    with monkeypatch.context() as edited:                        # in options.py instead of on the command line
        edited.setitem(TRAIN, 'checkpoint', TRAIN['checkpoint']._replace(default=resumed[1]))
        assert for_training().train['save_dir'] == 'run'
    monkeypatch.chdir('run/checkpoints')
    assert for_training('--checkpoint-path', 'checkpoint.pth.tar').train['save_dir'] == str(tmp_path / 'run')


def test_all_options_are_written_down_and_changed_ones_marked(tmp_path):
    opt = for_training('--lr', '0.5', '--transform.train.random_affine', 'none')
    opt.save(tmp_path / 'run')
    text = (tmp_path / 'run' / 'train_options.txt').read_text()
    assert 'lr: 0.5    [default: 0.001]' in text and 'random_affine: none    [default: 0.3]' in text
    for line in ('batch_size: 8', 'random_crop: 208', 'save_dir: ./experiments/MultiOrgan/1'):
        assert f'{line}\n' in text
    opt.train['batch_size'] = 4                                  # as from a checkpoint
    assert 'batch_size: 4    [default: 8]' in opt.describe()
    stored = json.loads((tmp_path / 'run' / 'train_options.json').read_text())
    assert stored['train']['lr'] == 0.5 and stored['dataset'] == 'MultiOrgan'


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        for_testing('--help')
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for name in (*SCRIPT_GROUPS['test']['test'], *SCRIPT_GROUPS['test']['post']):
        assert '--' + name.replace('_', '-') in text
