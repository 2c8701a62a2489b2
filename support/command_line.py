"""The command line: how its words become options, and --help."""
import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple

from support.files import results_folder, run_of, write_text
from support.script import InputError, Parser, expand_home

# paths that may not be '' on the command line, where that is an "$UNSET" of a shell
PATHS = {*(('train', name) for name in ('data_dir', 'save_dir', 'checkpoint', 'init_from')),
         *(('test', name) for name in ('data_dir', 'save_dir', 'model_path', 'img_dir')),
         ('prepare', 'raw_dir'), ('prepare', 'data_dir')}


class by_dataset(NamedTuple):
    """A default that differs between the two data sets of the paper."""
    MultiOrgan: Any
    GlaS: Any


class Option(NamedTuple):
    """One option: its default, what it means, and which values are allowed."""
    default: Any
    parse: Callable                  # turns a word of the command line into a value; raises ValueError
    help: str
    choices: tuple = ()              # allowed values; () = any
    at_least: float = None           # smallest allowed value
    below: float = None              # allowed values are smaller than this
    many: bool = False               # takes one or more words, which are parsed together
    flags: tuple = ()                # further names on the command line


def boolean(word):
    """'true', 'yes', '1' -> True; 'false', 'no', '0' -> False. (In the published code `--save-flag False` was true.)"""
    values = {'true': True, 'yes': True, '1': True, 'false': False, 'no': False, '0': False}
    if word.lower() not in values:
        raise ValueError('expected True or False')
    return values[word.lower()]


def tta_mode(word):
    """'full', 'flips' or 'none'; True means full and False means none, as published."""
    word = word.lower()
    word = {'true': 'full', 'false': 'none'}.get(word, word)
    if word not in ('full', 'flips', 'none'):
        raise ValueError('expected full, flips or none')
    return word


def gpu_list(words):
    """The GPUs in a list of words, list of int: `01`, `0,1` and `0 1` are [0, 1]; `10,11` is [10, 11]; `cpu` is [].

    `auto` stays 'auto'.
    """
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
    """A number of processes, int, or 'auto'."""
    if word != 'auto' and not word.isdigit():
        raise ValueError('expected a whole number of at least 0, or auto')
    return word if word == 'auto' else int(word)


def mpp_word(word):
    """A pixel size in um, or `auto`."""
    value = word if word == 'auto' else float(word)
    if value != 'auto' and not 0 < value < math.inf:
        raise ValueError('expected a number of um above 0, or auto')
    return value


def int_tuple(words):
    """Whole numbers, separated by spaces or commas, as a tuple of int."""
    return tuple(int(word) for word in ' '.join(words).replace(',', ' ').split())


def numbers(count, kind=float):
    """A parser of exactly `count` numbers: a tuple of `kind`, or a single value if `count` is 1."""
    def parse(words):
        values = tuple(kind(word) for word in ' '.join(words).replace(',', ' ').split())
        if len(values) != count:
            raise ValueError(f'expected {count} number{"s" * (count > 1)}')
        return values if count > 1 else values[0]
    return parse


def points_and_sigma(words):
    """The values of random_elastic: number of mesh points along a side, int, and sigma in pixels, float."""
    points, sigma = numbers(2)(words)
    if not points.is_integer():
        raise ValueError('expected a whole number of points and a sigma')
    return int(points), sigma


def float_pair(words):
    """Two numbers LO < HI, as a tuple of float."""
    values = tuple(float(word) for word in ' '.join(words).replace(',', ' ').split())
    if len(values) != 2 or not values[0] < values[1]:
        raise ValueError('expected two numbers LO HI with LO < HI')
    return values


def show(value):
    """The value of an option as it is written on the command line."""
    if isinstance(value, (tuple, list)):
        return ' '.join(str(v) for v in value) or ('cpu' if value == [] else "''")           # [] is of --gpu
    return 'none' if value is None else str(value) if value != '' else "''"


METAVARS = {int: 'N', int_tuple: 'N', float: 'X', boolean: 'BOOL', str: 'TEXT', gpu_list: 'GPU'}          # in --help
TRANSFORM_PARSERS = {                 # in the order in which transforms are applied
    'scale': numbers(1, int),
    'random_stain': numbers(3),
    'random_resize': numbers(2),
    'horizontal_flip': lambda words: boolean(' '.join(words)),
    'vertical_flip': lambda words: boolean(' '.join(words)),
    'random_affine': numbers(1),
    'random_elastic': points_and_sigma,
    'random_rotation': numbers(1),
    'random_crop': numbers(1, int),
    'label_encoding': numbers(1, int),
    'to_tensor': numbers(1, int),
    'normalize': lambda words: boolean(' '.join(words)),
}

# the transforms without randomness, for validation and testing
FIXED_TRANSFORMS = {'val': ('scale', 'label_encoding', 'to_tensor', 'normalize'),
                    'test': ('scale', 'to_tensor', 'normalize')}


def set_transform(transforms, name, value):
    """A copy of the dict `transforms` with `name` set to `value`, or without it if `value` is None.

    A new name goes before the first transform that comes later in TRANSFORM_PARSERS.
    """
    if name in transforms or value is None:
        changed = {**transforms, name: value}
        return {key: changed[key] for key in changed if changed[key] is not None}
    order = list(TRANSFORM_PARSERS).index
    items = list(transforms.items())
    place = next((i for i, (key, _) in enumerate(items) if order(key) > order(name)), len(items))
    return dict([*items[:place], (name, value), *items[place:]])


class CommandLine:
    """The option groups of one script as dictionaries, such as `opt.train['lr']`. options.py passes the tables.

    script: train, test or prepare. dataset_option: the Option of the data set, whose flags are `dataset_flags`.
    groups: {group: {name: Option}}. transforms: {split: by_dataset of {name: value}}. After `parse`, `given` is the set
    of (group, name) that the command line set; the group of a transform is `transform.train`, for example. `argv` are
    its words.
    """

    def __init__(self, script, dataset_option, groups, transforms, dataset_flags=('--dataset',)):
        self.script, self.dataset_option, self.dataset_flags = script, dataset_option, dataset_flags
        self.groups, self.transforms = groups, transforms
        self.program = {'prepare': 'prepare_data.py'}.get(script, f'{script}.py')
        self.given = set()

    def check(self):
        """Raise InputError for combinations of values that are not allowed. A subclass overrides this."""

    def parse(self, argv=None):
        """Read the command line, by default sys.argv; options that it does not set have their defaults. Returns self.

        Raises InputError for unknown options and values that are not allowed.
        """
        self.argv = sys.argv[1:] if argv is None else list(argv)
        first = Parser(add_help=False, prog=self.program, allow_abbrev=False)
        first.add_argument(*self.dataset_flags, dest='dataset', choices=by_dataset._fields)
        dataset = first.parse_known_args(argv)[0].dataset
        if dataset:
            self.given.add(('', 'dataset'))
        self.dataset = dataset or self.dataset_option.default

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
        for split in self.transforms:
            transforms = dict(getattr(self.transforms[split], self.dataset))
            for name in TRANSFORM_PARSERS:
                given = words[f'transform.{split}.{name}']
                if given is not None:
                    option = Option(None, TRANSFORM_PARSERS[name], '', many=True)
                    value = None if given == ['none'] else self._convert(f'transform.{split}.{name}', option, given)
                    transforms = set_transform(transforms, name, value)
                    self.given.add((f'transform.{split}', name))
            self.transform[split] = transforms
        self._resolve()
        self._check_values()
        self._check_transforms()
        self.check()
        return self

    def _defaults(self):
        return {group: {name: getattr(option.default, self.dataset) if isinstance(option.default, by_dataset)
                        else option.default for name, option in options.items()}
                for group, options in self.groups.items()}

    def _parser(self, defaults):
        parser = Parser(prog=self.program, allow_abbrev=False, usage=f'python {self.program} [--option value ...]',
                        description='Defaults are in brackets; they come from options.py.',
                        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28))
        parser.add_argument(*self.dataset_flags, dest='dataset', default=self.dataset_option.default,
                            choices=by_dataset._fields, help=self.dataset_option.help)
        for group, options in self.groups.items():
            section = parser.add_argument_group(group)
            for name, option in options.items():
                choices = f' ({", ".join(filter(None, option.choices))})' if option.choices else ''
                words = dict(nargs='+') if option.many else \
                    dict(nargs='?', const='True') if option.parse is boolean else {}            # --amp means --amp True
                text = f'{option.help}{choices} [{show(defaults[group][name])}]'.replace('%', '%%')
                section.add_argument('--' + name.replace('_', '-'), *option.flags, dest=f'{group}.{name}',
                                     metavar=METAVARS.get(option.parse, 'VALUE'), help=text, **words)
        if self.transforms:
            self._add_transforms(parser)
        return parser

    def _add_transforms(self, parser):
        """Add the flags of all transforms. --help shows one paragraph instead of a line for each."""
        text = (f'--transform.SPLIT.NAME VALUE sets a transform, and the value none removes it. '
                f'NAME is one of {", ".join(TRANSFORM_PARSERS)}.')
        for split in self.transforms:
            values = getattr(self.transforms[split], self.dataset)
            text += f' Defaults of {split}: {", ".join(f"{name} {show(value)}" for name, value in values.items())}.'
        section = parser.add_argument_group('transform', text)
        for split in self.transforms:
            for name in TRANSFORM_PARSERS:
                section.add_argument(f'--transform.{split}.{name}', nargs='+', help=argparse.SUPPRESS)

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
                    value = value.format(dataset=self.dataset, run=run, epoch=values.get('epoch'))
                    values[name] = expand_home(value)
        if self.script == 'train':
            crop = self.transform['train']
            if crop.get('random_crop') == 'input_size':
                crop['random_crop'] = self.train['input_size']
        if self.script == 'test' and ('test', 'img_dir') in self.given and ('test', 'label_dir') not in self.given:
            self.test['label_dir'] = ''
        # without --save-dir, a resumed run and the results of a test go into the run folder of the checkpoint
        if self.script == 'train' and ('train', 'save_dir') not in self.given:
            self.train['save_dir'] = run_of(self.train['checkpoint']) or self.train['save_dir']
        if self.script == 'test' and ('test', 'model_path') in self.given and ('test', 'save_dir') not in self.given:
            self.test['save_dir'] = results_folder(self.test['model_path'], self.dataset)

    def _run_number(self, epoch):
        """The number of the run folder in ./experiments/{dataset}.

        Training takes the next free number. Testing takes the newest run that has the checkpoint of `epoch`, else the
        newest run, else 1.
        """
        folder = Path('experiments') / self.dataset
        numbers = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
        if self.script == 'train':
            return max(numbers, default=0) + 1
        saved = [n for n in numbers if (folder / str(n) / 'checkpoints' / f'checkpoint_{epoch}.pth.tar').is_file()]
        return max(saved or numbers, default=1)

    def _check_values(self):
        for group, options in self.groups.items():
            for name, option in options.items():
                value, flag = getattr(self, group)[name], '--' + name.replace('_', '-')
                if value == '' and (group, name) in self.given & PATHS:
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

    def _check_transforms(self):
        at_least = {'scale': 1, 'random_crop': 1, 'label_encoding': 0, 'random_affine': 0, 'random_rotation': 0}
        for split, transforms in self.transform.items():
            for name, value in transforms.items():
                flag = f'--transform.{split}.{name}'
                if split != 'train' and name not in FIXED_TRANSFORMS[split]:
                    raise InputError(f'{flag} is {show(value)}; expected none: outside training only '
                                     f'{", ".join(FIXED_TRANSFORMS[split])} may be used')
                if not all(math.isfinite(x) for x in (value if isinstance(value, (tuple, list)) else [value])):
                    raise InputError(f'{flag} is {show(value)}; expected finite numbers')
                if name in at_least and not value >= at_least[name]:
                    raise InputError(f'{flag} is {value}; expected at least {at_least[name]}')
                if name == 'random_resize' and not 0 < value[0] <= value[1]:
                    raise InputError(f'{flag} is {show(value)}; expected two factors LO HI with 0 < LO <= HI')
                if name == 'random_stain' and not (0 <= value[0] < 1 and value[1] >= 0 and 0 <= value[2] < 1):
                    raise InputError(f'{flag} is {show(value)}; expected strength, offset and brightness of at least '
                                     f'0, strength and brightness below 1')
                if name == 'random_elastic' and not (value[0] >= 1 and value[1] >= 0):
                    raise InputError(f'{flag} is {show(value)}; expected at least 1 point and a sigma of at least 0')
            if transforms.get('to_tensor') != 1:
                raise InputError(f'--transform.{split}.to_tensor is {transforms.get("to_tensor", "none")}; expected 1: '
                                 f'only the image becomes float, not the weight map and the label')
            if 'label_encoding' not in transforms and split != 'test':
                raise InputError(f'--transform.{split}.label_encoding is none; expected a radius: the loss needs '
                                 f'classes')

    def as_dict(self):
        """All groups in one nested dict of plain values, as it is stored in checkpoints and JSON."""
        return {'dataset': self.dataset, **{group: getattr(self, group) for group in self.groups},
                'transform': self.transform}

    def describe(self):
        """All options as text, one per line. An option that differs from its default shows the default too."""
        lines = [f'dataset: {self.dataset}']
        defaults = self._defaults()
        for group, options in self.groups.items():
            lines.append(f'\n[{group}]')
            for name in options:
                default = defaults[group][name]
                filled_in = '{' in str(default) and (group, name) not in self.given
                changed = show(getattr(self, group)[name]) != show(default) and not filled_in
                mark = f'    [default: {show(default)}]' if changed else ''
                lines.append(f'{name}: {show(getattr(self, group)[name])}{mark}')
        for split, transforms in self.transform.items():
            lines.append(f'\n[transform.{split}]')
            default = getattr(self.transforms[split], self.dataset)
            for name in [*transforms, *(n for n in default if n not in transforms)]:
                filled_in = default.get(name) == 'input_size' and (f'transform.{split}', name) not in self.given
                value, usual = (show(values.get(name, 'none')) for values in (transforms, default))
                mark = f'    [default: {usual}]' if value != usual and not filled_in else ''
                lines.append(f'{name}: {value}{mark}')
        return '\n'.join(lines) + '\n'

    def save(self, folder):
        """Write {script}_options.txt and {script}_options.json into `folder`."""
        write_text(Path(folder) / f'{self.script}_options.txt', self.describe())
        write_text(Path(folder) / f'{self.script}_options.json', json.dumps(self.as_dict(), indent=1) + '\n')
