"""Every hyperparameter, in groups: model, train, transform, test, post, prepare.

Edit the defaults here, or give any of them on the command line: `--batch-size 4`, `--n-layers 4`,
`--transform.train.random_affine 0.2`. A default that depends on the data set is `by_dataset(...)`.
"""
import json
import math
from pathlib import Path
from typing import Any, Callable, NamedTuple

from FullNet import LAYER_TYPES, NETWORKS, layer_dilations
from utils import InputError, Parser, write_text

DATASETS = ('MultiOrgan', 'GlaS')
PATHS = ('data_dir', 'save_dir', 'model_path', 'checkpoint', 'init_from')       # empty only if left out


class by_dataset(NamedTuple):
    """A default that differs between the two data sets of the paper."""
    MultiOrgan: Any
    GlaS: Any


class Option(NamedTuple):
    """default value, how a word of the command line becomes a value, what it means, and what is allowed."""
    default: Any
    parse: Callable
    help: str
    choices: tuple = ()
    at_least: float = None           # smallest allowed value
    below: float = None              # allowed values are smaller than this
    many: bool = False               # takes one or more words, parsed together
    flags: tuple = ()                # further names on the command line


# ---------------------------------------------------------------------------------------------------
# How words become values
# ---------------------------------------------------------------------------------------------------

def boolean(word):
    """True or False (published `--save-flag False` was true)."""
    values = {'true': True, 'yes': True, '1': True, 'false': False, 'no': False, '0': False}
    if word.lower() not in values:
        raise ValueError('expected True or False')
    return values[word.lower()]


def tta_mode(word):
    """full / flips / none; True and False are full and none."""
    word = word.lower()
    word = {'true': 'full', 'false': 'none'}.get(word, word)
    if word not in ('full', 'flips', 'none'):
        raise ValueError('expected full, flips or none')
    return word


def gpu_list(words):
    """`01`, `0,1` and `0 1` are GPUs 0 and 1; `10,11` is 10 and 11; `cpu` is none; `auto` the best device there is."""
    text = ' '.join(words)
    if text in ('auto', 'cpu'):
        return 'auto' if text == 'auto' else []
    separated = text.replace(',', ' ').split()
    if text.isdigit():
        separated = list(text)                       # the published meaning: one digit, one GPU
    if not separated or not all(word.isdigit() for word in separated):
        raise ValueError('expected GPU numbers such as 0 or 0,1, or cpu, or auto')
    return [int(word) for word in separated]


def workers_count(word):
    """A number of processes, or `auto`."""
    if word != 'auto' and not word.isdigit():
        raise ValueError('expected a whole number of at least 0, or auto')
    return word if word == 'auto' else int(word)


def int_tuple(words):
    return tuple(int(word) for word in ' '.join(words).replace(',', ' ').split())


def _numbers(count, kind=float):
    def parse(words):
        values = tuple(kind(word) for word in ' '.join(words).replace(',', ' ').split())
        if len(values) != count:
            raise ValueError(f'expected {count} number{"s" * (count > 1)}')
        return values if count > 1 else values[0]
    return parse


def points_and_sigma(words):
    points, sigma = _numbers(2)(words)
    if not points.is_integer():
        raise ValueError('expected a whole number of points and a sigma')
    return int(points), sigma


def float_pair(words):
    values = tuple(float(word) for word in ' '.join(words).replace(',', ' ').split())
    if len(values) != 2 or not values[0] < values[1]:
        raise ValueError('expected two numbers LO HI with LO < HI')
    return values


# ---------------------------------------------------------------------------------------------------
# The options
# ---------------------------------------------------------------------------------------------------

DATASET = Option('MultiOrgan', str, 'data set: layout, metrics and the defaults below (those of GlaS: --dataset GlaS '
                                    '--help)', choices=DATASETS)

MODEL = dict(
    name=Option('FullNet', str, 'network; FCN_pooling is the ablation of the paper', choices=tuple(NETWORKS)),
    in_c=Option(3, int, 'input channels: RGB'),
    out_c=Option(3, int, 'output channels: background, inside, contour', at_least=3),
    n_layers=Option(6, int, 'layers of a dense block; 4 or 6 with hybrid dilation', at_least=1),
    growth_rate=Option(24, int, 'new channels per layer; time and memory grow with it', at_least=1),
    drop_rate=Option(0.1, float, 'dropout after each layer, 0 = off', at_least=0, below=1),
    compress_ratio=Option(0.5, float, 'share of the channels that a transition keeps', at_least=0),
    dilations=Option((1, 2, 4, 8, 16, 4, 1), int_tuple, 'dilation of each dense block', many=True),
    is_hybrid=Option(True, boolean, 'vary the dilation inside a block (no gridding)'),
    layer_type=Option('basic', str, 'basic: one 3x3 convolution; bottleneck: 1x1, then 3x3', choices=LAYER_TYPES),
)

TRAIN = dict(
    data_dir=Option('./data/{dataset}', str, 'prepared data: images/, labels/, weight_maps/, mean_std.npy'),
    save_dir=Option('./experiments/{dataset}/{run}', str, 'run folder; by default the next free number'),
    input_size=Option(208, int, 'pixels: side of the training crops and of the validation windows', at_least=1),
    num_epochs=Option(by_dataset(300, 1000), int, 'epochs', at_least=1, flags=('--epochs',)),
    batch_size=Option(8, int, 'crops per step, of all processes together; 4 needs half the memory', at_least=1),
    val_overlap=Option(80, int, 'pixels: overlap of the validation windows', at_least=0),
    lr=Option(by_dataset(1e-3, 5e-4), float, "Adam's learning rate", at_least=0),
    weight_decay=Option(1e-4, float, "Adam's L2 decay", at_least=0),
    log_interval=Option(50, int, 'steps between two lines of the log', at_least=1),
    workers=Option('auto', workers_count, 'processes that load data; 0 loads in the training process; auto fits '
                                          'the machine'),
    gpu=Option('auto', gpu_list, 'GPU, such as 0; with torchrun one for each process, such as 0,1 (01 means the same); '
                                 'cpu; auto', many=True),
    alpha=Option(1.0, float, 'weight of the variance term of varCE; 0 = cross entropy only', at_least=0),
    checkpoint_freq=Option(100, int, 'epochs between two kept checkpoints', at_least=1),
    start_epoch=Option(0, int, 'epochs counted as done when not resuming', at_least=0),
    checkpoint=Option('', str, 'checkpoint to resume from', flags=('--checkpoint-path',)),
    overwrite=Option(False, boolean, 'replace the run that is in save_dir'),
    init_from=Option('', str, 'checkpoint whose weights to start from (fine-tuning)'),
    seed=Option(2019, int, 'seed of weights, shuffling, transforms and dropout', at_least=0, below=2 ** 63),
    use_weight_map=Option(True, boolean, 'weight the cross entropy; False gives every pixel the weight 1'),
    lr_schedule=Option('none', str, 'learning rate over the steps', choices=('none', 'cosine', 'onecycle')),
    warmup_epochs=Option(0.0, float, 'epochs of linear warm-up, for none and cosine', at_least=0),
    clip_grad=Option(0.0, float, 'largest norm of the gradient; 0 = not clipped', at_least=0),
    compile=Option(False, boolean, 'torch.compile the network: faster steps on CUDA, after a minute of compiling'),
    ema_decay=Option(0.0, float, 'average the weights, such as 0.999, and validate the average; 0 = off',
                     at_least=0, below=1),
    val_every=Option(1, int, 'epochs between two validations', at_least=1),
    memory_efficient=Option(False, boolean, 'on the CPU, compute features again in the backward pass'),
    grid_every=Option(5, int, 'epochs between two pictures of the first validation images; 0 = none', at_least=0),
    preview=Option(False, boolean, 'write a picture of augmented samples beside save_dir, and stop'),
    amp=Option(False, boolean, 'mixed precision: bfloat16 in the network; less memory, coarser sums, faster where the '
                               'processor has it (AVX512_BF16, AMX, GPUs)'),
    max_minutes=Option(0.0, float, 'training ends after num_epochs or this time, whichever is first; its first 30 steps '
                                   'fix how many there are, over all resumes; validation comes on top; 0 = none',
                       at_least=0),
    checkpoint_minutes=Option(10.0, float, 'minutes between two savings of the latest checkpoint', at_least=0),
)

# What happens to (image, weight map, label), in this order. `input_size` stands for train's option of that name;
# `normalize` uses mean_std.npy. Values are explained in my_transforms.py; `none` on the command line removes one.
TRANSFORM = by_dataset(
    MultiOrgan=dict(
        train=dict(random_resize=(0.8, 1.25), horizontal_flip=True, random_affine=0.3, random_elastic=(6, 15),
                   random_rotation=90, random_crop='input_size', label_encoding=1, to_tensor=1, normalize=True),
        val=dict(label_encoding=1, to_tensor=1, normalize=True),
        test=dict(to_tensor=1, normalize=True),
    ),
    GlaS=dict(
        train=dict(scale=238, horizontal_flip=True, random_affine=0.3, random_elastic=(6, 15),
                   random_rotation=90, random_crop='input_size', label_encoding=2, to_tensor=1, normalize=True),
        val=dict(scale=208, label_encoding=2, to_tensor=1, normalize=True),
        test=dict(scale=208, to_tensor=1, normalize=True),
    ),
)

TEST = dict(
    data_dir=Option('./data/{dataset}', str, 'where mean_std.npy lies, for checkpoints that do not carry it'),
    epoch=Option('best', str, 'checkpoint to test: best, or the number of an epoch that was kept'),
    gpu=Option('auto', gpu_list, 'GPU, such as 0; cpu; auto', many=True),
    img_dir=Option(by_dataset('./data/{dataset}/images/test_same', './data/{dataset}/images/testA'), str,
                   'folder of images, or one image'),
    label_dir=Option(by_dataset('./data/{dataset}/labels_instance/test', './data/{dataset}/labels_instance/testA'),
                     str, 'folder of instance labels; empty: no metrics'),
    tta=Option('full', tta_mode, 'test-time augmentation: full = 8 flips and rotations, flips = 4, none'),
    save_flag=Option(True, boolean, 'write probability maps and segmentations'),
    patch_size=Option(by_dataset(208, 0), int, 'pixels: sliding window; 0 = the whole image at once', at_least=0),
    overlap=Option(by_dataset(80, 80), int, 'pixels: overlap of the windows', at_least=0),
    batch_size=Option(0, int, 'windows that the network sees at a time; 0 = 8 on a GPU, 1 on the CPU', at_least=0),
    amp=Option(False, boolean, 'mixed precision, see train.py --help; probabilities differ by about 0.01'),
    overwrite=Option(False, boolean, 'compute images again that were finished with the same options and weights'),
    save_dir=Option('./experiments/{dataset}/{run}/{epoch}', str, 'where the results go, by default into the run of '
                                                                  'the checkpoint'),
    model_path=Option('./experiments/{dataset}/{run}/checkpoints/checkpoint_{epoch}.pth.tar', str,
                      'checkpoint; by default of the newest run'),
    color_norm=Option(False, boolean, 'give images the colours of the training images, which the shipped weights and '
                                      'those of scripts/export_pretrained.py know'),
    scale_factor=Option(1.0, float, 'enlarge images before the network sees them: 2 for a scan at 20x, trained at 40x',
                        at_least=0.01),
    scale_16bit=Option(None, float_pair, 'LO HI: map 16-bit images linearly from LO..HI to 8 bits', many=True),
    binary_labels=Option(False, boolean, 'masks of one value as labels: their 8-connected components are objects'),
    max_megapixels=Option(1000, float, 'larger images are refused', at_least=0),
)

POST = dict(
    min_area=Option(by_dataset(20, 100), int, 'pixels of what the network saw (scaled, for GlaS): smaller '
                                           'components are removed', at_least=0),
    radius=Option(by_dataset(2, 4), int, 'pixels of the image, over scale_factor: dilation that gives back the '
                                       'contour', at_least=0),
    # not in the published method: off at 0; scripts/study_post_processing.py scores what each gains
    inside_threshold=Option(0.0, float, 'objects are where the inside probability is at least this; 0 = where inside '
                                        'is the most likely class', at_least=0, below=1),
    h_maxima=Option(0.0, float, 'split objects by a watershed from the maxima of the inside probability that stand out '
                                'by this; 0 = not; min_area is of objects before that', at_least=0, below=1),
)

PREPARE = dict(
    raw_dir=Option('./raw/{dataset}', str, 'the data set as it was downloaded; never written to'),
    data_dir=Option('./data/{dataset}', str, 'where the prepared data goes'),
    img_dir=Option('', str, "one's own images, instead of raw_dir"),
    label_dir=Option('', str, 'their instance labels'),
    split=Option('', str, "JSON file {split: [names]} for one's own images"),
    fractions=Option((0.7, 0.15, 0.15), _numbers(3), 'without --split: shares of train, val and test', many=True),
    others=Option('', str, "split that MoNuSeg images outside the published one go to; '' = they are left out",
                  choices=('', 'train', 'val', 'test_same', 'test_diff')),
    anchor=Option('auto', str, 'image whose colours the others get: a name in raw_dir or img_dir, or a file; auto = '
                               "the published one for MoNuSeg, else none; '' = none"),
    sigma=Option(by_dataset(5.0, 20.0), float, 'pixels: width of the weight between two objects', at_least=1e-3),
    w0=Option(10.0, float, 'largest weight between two objects', at_least=0),
    ternary_radius=Option(by_dataset(1, 2), int, 'pixels: the ternary label is contour up to this far on both sides of '
                                                 'an edge', at_least=1),
    patch_size=Option(250, int, 'pixels: side of the training patches (MultiOrgan)', at_least=1),
    val_fraction=Option(0.2, float, 'share of the training images held out for validation (GlaS)',
                        at_least=0.01, below=1),
    seed=Option(2019, int, 'seed of a split that is drawn', at_least=0, below=2 ** 63),
    binary_labels=Option(False, boolean, 'masks of one value as labels: their 8-connected components are objects'),
    scale_16bit=Option(None, float_pair, 'LO HI: map 16-bit images linearly from LO..HI to 8 bits', many=True),
    max_megapixels=Option(1000, float, 'larger images are refused', at_least=0),
    workers=Option(1, int, 'processes that prepare images at the same time', at_least=1),
)

SCRIPT_GROUPS = {
    'train': dict(model=MODEL, train=TRAIN),
    'test': dict(model=MODEL, test=TEST, post=POST),
    'prepare': dict(prepare=PREPARE),
}
SCRIPT_TRANSFORMS = {'train': ('train', 'val'), 'test': ('test',), 'prepare': ()}


# ---------------------------------------------------------------------------------------------------
# Transforms on the command line
# ---------------------------------------------------------------------------------------------------

TRANSFORM_PARSERS = {                 # in the order in which transforms are applied
    'scale': _numbers(1, int),
    'random_resize': _numbers(2),
    'horizontal_flip': lambda words: boolean(' '.join(words)),
    'vertical_flip': lambda words: boolean(' '.join(words)),
    'random_affine': _numbers(1),
    'random_elastic': points_and_sigma,
    'random_rotation': _numbers(1),
    'random_crop': _numbers(1, int),
    'label_encoding': _numbers(1, int),
    'to_tensor': _numbers(1, int),
    'normalize': lambda words: boolean(' '.join(words)),
}


def set_transform(transforms, name, value):
    """A copy of the ordered dict `transforms` with `name` set in its usual place, or removed if `value` is None."""
    if name in transforms or value is None:
        changed = {**transforms, name: value}
        return {key: changed[key] for key in changed if changed[key] is not None}
    order = list(TRANSFORM_PARSERS)
    before = [key for key in transforms if order.index(key) < order.index(name)]
    return {**{key: transforms[key] for key in before}, name: value,
            **{key: transforms[key] for key in transforms if key not in before}}


# ---------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------

class Options:
    """The option groups of one script as dictionaries: `opt.model['n_layers']`, `opt.train['lr']`, ...

    isTrain: True for train.py, False for test.py; `script='prepare'` for prepare_data.py. `given` holds the
    (group, name) of what came from the command line. Raises InputError for values that are not allowed.
    """

    def __init__(self, isTrain=True, script=None):
        self.script = script or ('train' if isTrain else 'test')
        self.groups = SCRIPT_GROUPS[self.script]
        self.dataset_flags = ('--dataset', '--like') if self.script == 'prepare' else ('--dataset',)
        self.given = set()

    def parse(self, argv=None):
        """Read the command line (`sys.argv` if `argv` is None) over the defaults; returns self."""
        first = Parser(add_help=False, prog=f'{self.script}.py', allow_abbrev=False)
        first.add_argument(*self.dataset_flags, dest='dataset', choices=DATASETS)
        dataset = first.parse_known_args(argv)[0].dataset
        if dataset:
            self.given.add(('', 'dataset'))
        self.dataset = dataset or DATASET.default

        defaults = self._defaults()
        words = vars(self._parser(defaults).parse_args(argv))
        for group, options in self.groups.items():
            values = dict(defaults[group])
            for name, option in options.items():
                given = words[f'{group}.{name}']
                if given is not None:
                    values[name] = self._convert(name, option, given)
                    self.given.add((group, name))
            setattr(self, group, values)
        self.transform = {}
        for split in SCRIPT_TRANSFORMS[self.script]:
            transforms = dict(getattr(TRANSFORM, self.dataset)[split])
            for name in TRANSFORM_PARSERS:
                given = words[f'transform.{split}.{name}']
                if given is not None:
                    option = Option(None, TRANSFORM_PARSERS[name], '', many=True)
                    value = None if given == ['none'] else self._convert(f'transform.{split}.{name}', option, given)
                    transforms = set_transform(transforms, name, value)
                    self.given.add((f'transform.{split}', name))
            self.transform[split] = transforms
        self._resolve()
        self._check()
        return self

    def _defaults(self):
        return {group: {name: getattr(option.default, self.dataset) if isinstance(option.default, by_dataset)
                        else option.default for name, option in options.items()}
                for group, options in self.groups.items()}

    def _parser(self, defaults):
        program = {'train': 'train.py', 'test': 'test.py', 'prepare': 'prepare_data.py'}[self.script]
        parser = Parser(prog=program, allow_abbrev=False, description=f'Options of {program}; defaults in options.py.')
        parser.add_argument(*self.dataset_flags, dest='dataset', default=DATASET.default, choices=DATASETS,
                            help=DATASET.help)
        for group, options in self.groups.items():
            section = parser.add_argument_group(group)
            for name, option in options.items():
                choices = f' ({", ".join(filter(None, option.choices))})' if option.choices else ''
                words = dict(nargs='+') if option.many else \
                    dict(nargs='?', const='True') if option.parse is boolean else {}            # --amp means --amp True
                text = f'{option.help}{choices} [{_show(defaults[group][name])}]'.replace('%', '%%')
                section.add_argument('--' + name.replace('_', '-'), *option.flags, dest=f'{group}.{name}',
                                     metavar=name.upper(), help=text, **words)
        for split in SCRIPT_TRANSFORMS[self.script]:
            section = parser.add_argument_group(f'transform.{split}',
                                                'as in TRANSFORM of options.py; `none` removes one')
            now = getattr(TRANSFORM, self.dataset)[split]
            for name in TRANSFORM_PARSERS:
                section.add_argument(f'--transform.{split}.{name}', nargs='+', metavar='VALUE',
                                     help=f'[{_show(now.get(name, "none"))}]')
        return parser

    @staticmethod
    def _convert(name, option, given):
        flag = name if name.startswith('transform.') else name.replace('_', '-')
        try:
            value = option.parse(given)
        except (ValueError, IndexError) as error:
            shown = ' '.join(given) if option.many else given
            reason = str(error) if str(error).startswith('expected') else \
                f'expected {"a whole number" if option.parse is int else "a number"}'
            raise InputError(f"--{flag} is '{shown}'; {reason}") from error
        return value

    def _resolve(self):
        """Fill in what depends on other options: {dataset}, {run} and {epoch} in paths, input_size in transforms."""
        for group in self.groups:
            values = getattr(self, group)
            run = self._run_number(values.get('epoch')) if group in ('train', 'test') else None
            for name, value in values.items():
                if isinstance(value, str) and (group, name) not in self.given:
                    values[name] = value.format(dataset=self.dataset, run=run, epoch=values.get('epoch'))
        if self.script == 'train':
            crop = self.transform['train']
            if crop.get('random_crop') == 'input_size':
                crop['random_crop'] = self.train['input_size']
        if self.script == 'test' and ('test', 'img_dir') in self.given and ('test', 'label_dir') not in self.given:
            self.test['label_dir'] = ''
        # without --save-dir, a run that is resumed and the results of a checkpoint stay in its run folder
        if self.script == 'train' and ('train', 'save_dir') not in self.given:
            self.train['save_dir'] = run_of(self.train['checkpoint']) or self.train['save_dir']
        if self.script == 'test' and ('test', 'model_path') in self.given and ('test', 'save_dir') not in self.given:
            self.test['save_dir'] = results_folder(self.test['model_path'], self.dataset)

    def _run_number(self, epoch):
        """Training takes the next free number in ./experiments/{dataset}, testing the newest that has the checkpoint.

        Where none has it, the newest; 1 if there is none.
        """
        folder = Path('experiments') / self.dataset
        numbers = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
        if self.script == 'train':
            return max(numbers, default=0) + 1
        saved = [n for n in numbers if (folder / str(n) / 'checkpoints' / f'checkpoint_{epoch}.pth.tar').is_file()]
        return max(saved or numbers, default=1)

    def _check(self):
        for group, options in self.groups.items():
            for name, option in options.items():
                value, flag = getattr(self, group)[name], '--' + name.replace('_', '-')
                if value == '' and (group, name) in self.given and name in PATHS:          # "$UNSET" in a shell
                    raise InputError(f"{flag} is ''; expected a path, or leave it out")
                if option.choices and value not in option.choices:
                    raise InputError(f"{flag} is '{value}'; expected one of "
                                     + ', '.join(choice or "''" for choice in option.choices))
                if option.at_least is not None and not value >= option.at_least:      # `not >=` also catches NaN
                    raise InputError(f'{flag} is {value}; expected at least {option.at_least}')
                if option.below is not None and not value < option.below:
                    raise InputError(f'{flag} is {value}; expected less than {option.below}')
                if isinstance(value, float) and not math.isfinite(value):
                    raise InputError(f'{flag} is {value}; expected a finite number')
        if hasattr(self, 'model'):
            self._check_model()
        self._check_transforms()
        if self.script == 'train' and self.train['val_overlap'] >= self.train['input_size']:
            raise InputError(f'--val-overlap is {self.train["val_overlap"]}; expected less than '
                             f'--input-size, {self.train["input_size"]}')
        if self.script == 'train' and self.train['lr_schedule'] == 'onecycle' and self.train['warmup_epochs']:
            raise InputError(f'--warmup-epochs is {self.train["warmup_epochs"]:g}, but --lr-schedule onecycle has a '
                             f'warm-up of its own; leave it out')
        if self.script == 'test' and 0 < self.test['patch_size'] <= self.test['overlap']:
            raise InputError(f'--overlap is {self.test["overlap"]}; expected less than '
                             f'--patch-size, {self.test["patch_size"]}')

    def _check_transforms(self):
        at_least = {'scale': 1, 'random_crop': 1, 'label_encoding': 0, 'random_affine': 0, 'random_rotation': 0}
        for split, transforms in self.transform.items():
            for name, value in transforms.items():
                flag = f'--transform.{split}.{name}'
                if split == 'test' and name not in ('scale', 'to_tensor', 'normalize'):
                    raise InputError(f'{flag} is {_show(value)}; expected none: in testing images may be scaled and '
                                     f'normalised, nothing else')
                if not all(math.isfinite(x) for x in (value if isinstance(value, (tuple, list)) else [value])):
                    raise InputError(f'{flag} is {_show(value)}; expected finite numbers')
                if name in at_least and not value >= at_least[name]:
                    raise InputError(f'{flag} is {value}; expected at least {at_least[name]}')
                if name == 'random_resize' and not 0 < value[0] <= value[1]:
                    raise InputError(f'{flag} is {_show(value)}; expected two factors LO HI with 0 < LO <= HI')
                if name == 'random_elastic' and not (value[0] >= 1 and value[1] >= 0):
                    raise InputError(f'{flag} is {_show(value)}; expected at least 1 point and a sigma of at least 0')
            if transforms.get('to_tensor') != 1:
                raise InputError(f'--transform.{split}.to_tensor is {transforms.get("to_tensor", "none")}; expected 1: '
                                 f'the image becomes numbers, weight map and label stay whole numbers')
            if 'label_encoding' not in transforms and split != 'test':
                raise InputError(f'--transform.{split}.label_encoding is none; expected a radius: losses need classes')

    def _check_model(self):
        if self.model['in_c'] != 3:
            raise InputError(f'--in-c is {self.model["in_c"]}; expected 3: all images are read as RGB')
        dilations = self.model['dilations']
        if not dilations or min(dilations) < 1:
            raise InputError(f'--dilations is {_show(dilations) if dilations else "empty"}; expected one or more '
                             f'numbers of at least 1')
        for dilation in dilations:
            try:
                layer_dilations(dilation, self.model['n_layers'], self.model['is_hybrid'])
            except ValueError as error:
                raise InputError(f'--dilations, --n-layers: {error}') from error

    def as_dict(self):
        """All groups in one nested dict of plain values, for JSON."""
        return {'dataset': self.dataset, **{group: getattr(self, group) for group in self.groups},
                'transform': self.transform}

    def describe(self):
        """All options as text, one per line; changed ones are marked with their default."""
        lines = [f'dataset: {self.dataset}']
        defaults = self._defaults()
        for group, options in self.groups.items():
            lines.append(f'\n[{group}]')
            for name in options:
                default = defaults[group][name]
                filled_in = '{' in str(default) and (group, name) not in self.given
                changed = _show(getattr(self, group)[name]) != _show(default) and not filled_in
                mark = f'    [default: {_show(default)}]' if changed else ''
                lines.append(f'{name}: {_show(getattr(self, group)[name])}{mark}')
        for split, transforms in self.transform.items():
            lines.append(f'\n[transform.{split}]')
            default = getattr(TRANSFORM, self.dataset)[split]
            for name in [*transforms, *(n for n in default if n not in transforms)]:
                filled_in = default.get(name) == 'input_size' and (f'transform.{split}', name) not in self.given
                value, usual = (_show(values.get(name, 'none')) for values in (transforms, default))
                mark = f'    [default: {usual}]' if value != usual and not filled_in else ''
                lines.append(f'{name}: {value}{mark}')
        return '\n'.join(lines) + '\n'

    def save(self, folder):
        """Write `{script}_options.txt` and the same as JSON into `folder`."""
        write_text(Path(folder) / f'{self.script}_options.txt', self.describe())
        write_text(Path(folder) / f'{self.script}_options.json', json.dumps(self.as_dict(), indent=1) + '\n')


def run_of(checkpoint):
    """The run folder of a checkpoint, '' if it does not lie in the folder `checkpoints` of one."""
    path = Path(checkpoint)
    if not checkpoint or path.resolve().parent.name != 'checkpoints':
        return ''
    return str(path.parent.parent if path.parent.name == 'checkpoints' else path.resolve().parents[1])


def results_folder(checkpoint, dataset):
    """Where the results of a checkpoint go by default: its run folder / `best`, or the like."""
    run, name = run_of(checkpoint), Path(checkpoint).name.split('.')[0]
    return f'{run}/{name.removeprefix("checkpoint_")}' if run else f'./experiments/{dataset}/{name}'


def _show(value):
    if isinstance(value, (tuple, list)):
        return ' '.join(str(v) for v in value) or 'cpu'
    return 'none' if value is None else str(value) if value != '' else "''"
