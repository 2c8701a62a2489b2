"""Find the files of each data set, split them, and report on a preparation."""
import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.files import write_text
from support.images import (GEOJSON_EXTENSIONS, LABEL_EXTENSIONS, composed, find_labels, labels_by_name,
                            list_images, missing_files_message, number_pieces, read_json)
from support.script import InputError, note

# The published split of the Multi-Organ data set (30 images of the first MoNuSeg release).
MULTI_ORGAN_SPLIT = {
    'train': ('Breast_TCGA-A7-A13E-01Z-00-DX1', 'Breast_TCGA-A7-A13F-01Z-00-DX1', 'Breast_TCGA-AR-A1AK-01Z-00-DX1',
              'Kidney_TCGA-B0-5711-01Z-00-DX1', 'Kidney_TCGA-HE-7128-01Z-00-DX1', 'Kidney_TCGA-HE-7129-01Z-00-DX1',
              'Liver_TCGA-18-5592-01Z-00-DX1', 'Liver_TCGA-38-6178-01Z-00-DX1', 'Liver_TCGA-49-4488-01Z-00-DX1',
              'Prostate_TCGA-G9-6336-01Z-00-DX1', 'Prostate_TCGA-G9-6348-01Z-00-DX1',
              'Prostate_TCGA-G9-6356-01Z-00-DX1'),
    'val': ('Breast_TCGA-AR-A1AS-01Z-00-DX1', 'Kidney_TCGA-HE-7130-01Z-00-DX1', 'Liver_TCGA-50-5931-01Z-00-DX1',
            'Prostate_TCGA-G9-6363-01Z-00-DX1'),
    'test_same': ('Breast_TCGA-E2-A1B5-01Z-00-DX1', 'Breast_TCGA-E2-A14V-01Z-00-DX1', 'Kidney_TCGA-B0-5698-01Z-00-DX1',
                  'Kidney_TCGA-B0-5710-01Z-00-DX1', 'Liver_TCGA-21-5784-01Z-00-DX1', 'Liver_TCGA-21-5786-01Z-00-DX1',
                  'Prostate_TCGA-CH-5767-01Z-00-DX1', 'Prostate_TCGA-G9-6362-01Z-00-DX1'),
    'test_diff': ('Bladder_TCGA-DK-A2I6-01A-01-TS1', 'Bladder_TCGA-G2-A2EK-01A-02-TSB',
                  'Colon_TCGA-AY-A8YK-01A-01-TS1', 'Colon_TCGA-NH-A8F7-01A-01-TS1',
                  'Stomach_TCGA-KB-A93J-01A-01-TS1', 'Stomach_TCGA-RD-A8N9-01A-01-TS1'),
}
PUBLISHED_ANCHOR = 'Prostate_TCGA-G9-6356-01Z-00-DX1'                # the image whose colours the others get
BY_SYSTEMS = ('.DS_Store', '._', '.directory', '.nfs')              # hidden files that no user makes
SPLITS = ('train', 'val', 'test_same', 'test_diff', 'testA', 'testB')


class Source(NamedTuple):
    """One image of a data set and its annotation."""
    name: str         # in the names of the prepared files
    split: str        # train, val, test_same, test_diff, testA or testB
    image: Path
    label: Path       # instance label or annotation XML


def find_sources(dataset, options):
    """The images that the options describe, list of Source. options: the group `prepare` of options.py.

    A third data set needs a function like `find_glas`, called here (docs/data.md: all places). Raises InputError for
    missing files.
    """
    if bool(options['img_dir']) != bool(options['label_dir']):
        given, other = ('img', 'label') if options['img_dir'] else ('label', 'img')
        raise InputError(f"--{given}-dir is given without --{other}-dir; your own data needs both")
    if options['img_dir']:
        return find_own_data(dataset, options['img_dir'], options['label_dir'], options['split'], options['fractions'],
                             options['seed'])
    if dataset == 'GlaS':
        return find_glas(options['raw_dir'], options['val_fraction'], options['seed'])
    return find_multi_organ(options['raw_dir'], options['anchor'], options['others'])


def find_multi_organ(raw_dir, anchor='auto', others=''):
    """The Sources of a MultiOrgan folder, which is laid out as in `find_fullnet_files` or in `find_monuseg`."""
    raw_dir = Path(raw_dir)
    if all((raw_dir / name).exists() for name in ('normalized', 'labels_instance', 'split.json')):
        if anchor not in ('auto', ''):
            raise InputError(f'{raw_dir} holds images whose colours are normalised already; leave --anchor out')
        if others:
            raise InputError(f'{raw_dir} has a split of its own, split.json; leave --others out')
        return find_fullnet_files(raw_dir)
    if any(path.suffix.lower() == '.xml' for path in _files_below(raw_dir)):
        return find_monuseg(raw_dir, anchor, others)
    raise InputError(f'{raw_dir} is not a MultiOrgan data set: looked for normalized/, labels_instance/ and '
                     f'split.json, or .tif images with .xml annotations at any depth; saw {_names_in(raw_dir)}')


def find_fullnet_files(raw_dir):
    """The Sources of the FullNet authors' files: normalized/X.png, labels_instance/X_label.png, split.json.

    split.json holds {split: [names]}.
    """
    raw_dir = Path(raw_dir)
    images = {path.stem: path for path in list_images(raw_dir / 'normalized')}
    labels = labels_by_name(raw_dir / 'labels_instance')
    split = _read_split(raw_dir / 'split.json', tuple(MULTI_ORGAN_SPLIT))
    names = [name for group in split.values() for name in group]
    for kind, files, folder in (('images', images, 'normalized'), ('instance labels', labels, 'labels_instance')):
        missing = [name for name in names if name not in files]
        if missing:
            raise InputError(missing_files_message(f'{kind} named in split.json are', missing, raw_dir / folder))
    unused = sorted(set(images) - set(names))
    if unused:
        note(f'{len(unused)} images are not in split.json and are not used: {", ".join(unused)}')
    return [Source(name, part, images[name], labels[name]) for part, group in split.items() for name in group]


def _read_split(path, allowed, name_of=str):
    """Read {split: [names]} from a JSON file. allowed: names of splits, train and val first. Raises InputError.

    name_of: gives the names that are returned. No two names of the file may be the same then.
    """
    expected = f'expected a JSON object of lists of names: train, val and, if there are, {", ".join(allowed[2:])}'
    try:
        split = read_json(path)
    except InputError as error:
        raise InputError(f'{error}; {expected}') from None
    if not (isinstance(split, dict) and all(isinstance(group, list) for group in split.values())):
        raise InputError(f'{path}: {expected}')
    names = [name for group in split.values() for name in group]
    if not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise InputError(f'{path}: each name must be a file name without extension; {expected}')
    if not set(split) <= set(allowed) or not split.get('train') or not split.get('val'):
        raise InputError(f'{path} has {", ".join(split) or "nothing"}; {expected}')
    split = {part: [name_of(name) for name in group] for part, group in split.items()}
    names = [name for group in split.values() for name in group]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f'{path} names {", ".join(repeated[:5])} more than once; an image belongs to one split')
    return split


def find_monuseg(raw_dir, anchor='auto', others=''):
    """The Sources of MoNuSeg as distributed: .tif images and .xml annotations at any depth, named without the organ.

    The published split is found by the names. Images outside it go to the split `others`; without one they are not
    used, with a note. Raises InputError if an image that is used has no annotation, or an annotation no image. The
    colour anchor of the published split needs none.
    """
    anchor = PUBLISHED_ANCHOR if anchor == 'auto' else anchor
    images = _by_stem(_files_below(raw_dir), ('.tif', '.tiff'), raw_dir)
    annotations = _by_stem(_files_below(raw_dir), ('.xml',), raw_dir)
    sources, unmatched, absent = [], [], []
    for part, names in MULTI_ORGAN_SPLIT.items():
        for name in names:
            stems = (name, name.split('_', 1)[1])
            image = next((images.pop(stem) for stem in stems if stem in images), None)
            annotation = next((annotations.pop(stem) for stem in stems if stem in annotations), None)
            if image and annotation:
                sources.append(Source(name, part, image, annotation))
            elif image and anchor in stems:
                note(f'{image.name}, the colour anchor, has no annotation; it is used for its colours only')
            elif image or annotation:
                unmatched.append(f'{stems[1]}{".xml" if image else ".tif"}')
            else:
                absent.append(name)
    if others:
        unmatched += [f'{stem}.xml' for stem in sorted(set(images) - set(annotations))]
        unmatched += [f'{stem}.tif' for stem in sorted(set(annotations) - set(images))]
        sources += [Source(stem, others, images.pop(stem), annotations[stem])
                    for stem in sorted(set(images) & set(annotations))]
    if unmatched:
        raise InputError(missing_files_message('images or annotations are', unmatched, raw_dir))
    if not {'train', 'val'} <= {source.split for source in sources}:
        raise InputError(f'{raw_dir} lacks the published train or val images: looked for '
                         f'{MULTI_ORGAN_SPLIT["train"][0].split("_", 1)[1]}.tif and others; saw {_names_in(raw_dir)}')
    if absent:
        note(f'{len(absent)} images of the published split are not there: {", ".join(absent)}')
    if images:
        note(f'{len(images)} images are not in the published split and are not used (--others puts them into one): '
             + ', '.join(sorted(images)))
    return sources


def find_glas(raw_dir, val_fraction, seed):
    """The Sources of GlaS as distributed: {train,testA,testB}_N.bmp with *_anno.bmp at any depth.

    The published validation set is not known. So the share `val_fraction` of the train images, drawn with `seed`, is
    used for validation. Raises InputError for missing files.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f'val_fraction is {val_fraction}; expected a number between 0 and 1')
    files = _by_stem(_files_below(raw_dir), ('.bmp',), raw_dir)
    files = {name: path for name, path in files.items() if re.fullmatch(r'(train|testA|testB)_\d+(_anno)?', name)}
    names = sorted((name for name in files if not name.endswith('_anno')), key=_by_number)
    train = [name for name in names if name.startswith('train_')]
    if len(train) < 2:
        raise InputError(f'{raw_dir} is not the GlaS data set: looked for train_1.bmp, train_1_anno.bmp and so on, '
                         f'at least two of them; saw {_names_in(raw_dir)}')
    missing = [f'{name}_anno.bmp' for name in names if f'{name}_anno' not in files]
    missing += [f'{name.removesuffix("_anno")}.bmp' for name in files if name.removesuffix('_anno') not in files]
    if missing:
        raise InputError(missing_files_message('images or labels are', missing, raw_dir))
    n_val = min(max(round(val_fraction * len(train)), 1), len(train) - 1)
    val = set(np.random.default_rng(seed).permutation(train)[:n_val].tolist())
    return [Source(name, 'val' if name in val else name.split('_')[0], files[name], files[f'{name}_anno'])
            for name in names]


def find_own_data(dataset, img_dir, label_dir, split_path, fractions, seed):
    """The Sources of the user's own data: a folder of images and one of instance labels or annotation XML.

    The labels are named `{name}`, `{name}_label` or `{name}_anno`. split_path: a JSON file {split: [names]}, or '' for
    a split drawn with `seed`, whose shares of (train, val, test) are `fractions`. dataset: whose layout, metrics and
    sizes are used; the test images become its first test set. Raises InputError for missing files.
    """
    images = list_images(img_dir)
    # JSON of other kinds may lie beside masks: it is read only where there is nothing else
    extensions = (*LABEL_EXTENSIONS, '.xml', '.geojson')
    seen = {path.suffix.lower() for path in Path(label_dir).iterdir()} if Path(label_dir).is_dir() else set()
    if not seen & set(extensions) and seen & set(GEOJSON_EXTENSIONS):
        extensions = GEOJSON_EXTENSIONS
    labels = find_labels(images, label_dir, extensions)
    unmatched = sorted(set(list_images(label_dir, extensions)) - set(labels))
    if unmatched:
        raise InputError(missing_files_message('images of instance labels', [path.name for path in unmatched], img_dir))
    test_sets = {'MultiOrgan': ('test_same', 'test_diff'), 'GlaS': ('testA', 'testB')}[dataset]
    files = {image.stem: (image, label) for image, label in zip(images, labels)}
    if split_path:
        stems = {composed(form): image.stem for image in images for form in (image.name, image.stem)}
        split = _read_split(Path(split_path), ('train', 'val', 'test', *test_sets),
                            lambda name: stems.get(composed(name), name))
        missing = [name for group in split.values() for name in group if name not in files]
        if missing:
            raise InputError(missing_files_message(f'images named in {split_path} are', missing, img_dir))
        unused = sorted(set(files).difference(*split.values()))
        if unused:
            note(f'{len(unused)} images are not in {split_path} and are not used: {", ".join(unused)}')
    else:
        split = draw_split(sorted(files), fractions, seed)
    return [Source(name, test_sets[0] if part == 'test' else part, *files[name])
            for part, names in split.items() for name in names]


def draw_split(names, fractions, seed):
    """Draw a split of the names: {'train': [names], 'val': ..., 'test': ...}, at least one for train and for val.

    fractions: the shares of (train, val, test). Raises InputError if their sum is not 1, or for fewer than 2 names.
    """
    train, val, test = fractions
    if not (train > 0 and val > 0 and test >= 0 and abs(sum(fractions) - 1) <= 1e-6):              # `not` catches NaN
        raise InputError(f'--fractions is {train:g} {val:g} {test:g}; expected the shares of train, val and test, '
                         f'which add up to 1, the first two above 0')
    if len(names) < 2:
        raise InputError(f'found {len(names)} image; expected at least 2, one to train and one to validate')
    n_val = min(max(round(val * len(names)), 1), len(names) - 1)
    n_test = min(round(test * len(names)), len(names) - n_val - 1)
    order = np.random.default_rng(seed).permutation(names).tolist()
    groups = {'val': order[:n_val], 'test': order[n_val:n_val + n_test], 'train': order[n_val + n_test:]}
    return {part: sorted(groups[part]) for part in ('train', 'val', 'test')}


def _by_number(name):
    """Sort key of a GlaS name: 'train_8' -> ('train', 8)."""
    prefix, number = name.split('_')
    return prefix, int(number)


def _files_below(folder):
    """All files in a folder and its subfolders, sorted, without hidden ones."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f'no such folder: {folder}')
    return sorted(path for path in folder.rglob('*')
                  if path.is_file() and not any(part.startswith('.') for part in path.relative_to(folder).parts))


def _by_stem(paths, extensions, folder):
    """{name without extension: path} of the files with these extensions. Raises InputError if two have one name."""
    files = {}
    for path in paths:
        if path.suffix.lower() in extensions and '__MACOSX' not in path.parts:
            if path.stem in files:
                raise InputError(f'two files of one name in {folder}: {files[path.stem].relative_to(folder)} and '
                                 f'{path.relative_to(folder)}; keep one of them')
            files[path.stem] = path
    return files


def _names_in(folder):
    """The first five names in a folder, for error messages."""
    names = sorted(path.name + '/' * path.is_dir() for path in Path(folder).iterdir())
    return (', '.join(names[:5]) + (', ...' if len(names) > 5 else '')) or 'an empty folder'


def anchor_path(anchor, dataset, options):
    """The path of the anchor image. anchor: a path, or the name of an image, with or without organ.

    options: of prepare_data.py, with the folder of images. Raises InputError if there is no such image.
    """
    if Path(anchor).is_file():
        return Path(anchor)
    folder = options['img_dir'] or options['raw_dir']
    if options['img_dir']:
        images = {path.stem: path for path in list_images(folder)}
    else:                                                        # as find_monuseg and find_glas
        images = _by_stem(_files_below(folder), {'MultiOrgan': ('.tif', '.tiff'), 'GlaS': ('.bmp',)}[dataset], folder)
    for stem in (anchor, anchor.split('_', 1)[-1]):
        if stem in images:
            return images[stem]
    raise InputError(f"the colour anchor '{anchor}' is neither a file nor an image in {folder}; give --anchor the "
                     f"path of an image, or '' to leave the colours as they are")


def make_report(images, mean_std):
    """The report of a preparation, a dict: counts of each split, labels with objects in several pieces, colours.

    images: the dicts of `prepare_image`. mean_std: (2, 3). object_area holds the percentiles 5, 25, 50, 75, 95, pixels.
    """
    splits = {}
    for part in SPLITS:
        rows = [image for image in images if image['split'] == part]
        if rows:
            areas = np.concatenate([row['areas'] for row in rows])
            splits[part] = {'images': len(rows), 'patches': sum(row['patches'] for row in rows),
                            'objects': sum(row['objects'] for row in rows),
                            'objects_in_pieces': sum(row['in_pieces'] for row in rows),
                            'object_area': (np.percentile(areas, (5, 25, 50, 75, 95)).round(1).tolist()
                                            if len(areas) else [])}
    return {'splits': splits, 'labels_with_objects_in_pieces': {image['name']: image['in_pieces'] for image in images
                                                                if image['in_pieces']},
            'mean': mean_std[0].tolist(), 'std': mean_std[1].tolist()}


def count_grades(raw_dir, images):
    """{'grades': {split: {grade: number of images}}} from GlaS's Grade.csv; {} without such a file.

    Its columns begin with `name` and `grade`.
    """
    paths = [path for path in _files_below(raw_dir) if path.name.lower() == 'grade.csv']
    if not paths:
        return {}
    with open(paths[0], newline='', encoding='utf-8-sig', errors='replace') as file:
        header, *rows = [[cell.strip() for cell in row] for row in csv.reader(file)] or [[]]
    columns = [next((i for i, title in enumerate(header) if title.lower().startswith(start)), None)
               for start in ('name', 'grade')]
    grades = {}
    if None not in columns:
        grades = {row[columns[0]]: row[columns[1]] for row in rows if len(row) == len(header)}
    if not any(image['name'] in grades for image in images):
        note(f'{paths[0]} names none of the images; expected the columns name and grade, found {", ".join(header)}')
        return {}
    counts = {part: Counter(grades.get(image['name'], 'unknown') for image in images if image['split'] == part)
              for part in SPLITS}
    return {'grades': {part: dict(sorted(found.items())) for part, found in counts.items() if found}}


def report_text(report):
    """The report as a table of text."""
    lines = [f'{"":10} {"images":>7} {"patches":>8} {"objects":>8} {"in pieces":>10}   '
             f'object area, pixels: 5, 25, 50, 75, 95 %']
    for part, row in report['splits'].items():
        areas = ' '.join(f'{area:.0f}' for area in row['object_area'])
        lines.append(f'{part:10} {row["images"]:7} {row["patches"]:8} {row["objects"]:8} {row["objects_in_pieces"]:10}'
                     f'   {areas}')
    for title in ('mean', 'std'):
        lines.append(f'{title:4} ' + ' '.join(f'{value:.8f}' for value in report[title]))
    for part, counts in report.get('grades', {}).items():
        lines.append(f'{part}: ' + ', '.join(f'{count} {grade}' for grade, count in counts.items()))
    pieces = report['labels_with_objects_in_pieces']
    if pieces:
        shown = [f'{name} ({count})' for name, count in pieces.items()]
        shown = ', '.join(shown[:5] + ['...'] * (len(shown) > 5))
        lines.append(f'{len(pieces)} labels have objects in several pieces: {shown}')
    return '\n'.join(lines)


def refuse_data_dir(options):
    """Raise InputError if data_dir would overwrite the raw data, or holds files that no preparation made."""
    data_dir = Path(options['data_dir'])
    for name in ('img_dir', 'label_dir') if options['img_dir'] else ('raw_dir',):
        if not options[name]:                                            # find_sources says so
            continue
        raw, flag = Path(options[name]).resolve(), '--' + name.replace('_', '-')
        if raw == data_dir.resolve() or raw in data_dir.resolve().parents or data_dir.resolve() in raw.parents:
            raise InputError(f'the prepared data would replace the raw data: --data-dir {data_dir}, {flag} '
                             f'{options[name]}; give a --data-dir outside it')
    if data_dir.is_file():
        raise InputError(f'--data-dir {data_dir} is a file; expected a folder, or a new name')
    try:
        ours = set(json.loads((data_dir / 'prepare_report.json').read_text(encoding='utf-8'))['files'])
    except (OSError, ValueError, KeyError, TypeError):                   # no report, or not one of ours
        ours = set()
    others = [path.relative_to(data_dir).as_posix() for path in sorted(data_dir.rglob('*'))
              if (path.is_symlink() or not path.is_dir()) and not path.name.startswith(BY_SYSTEMS)]
    others = [name for name in others if name not in ours]
    if others:
        raise InputError(f'{data_dir} holds {len(others)} files that no preparation made: {", ".join(others[:5])}; '
                         f'move them away, or give another --data-dir')


def write_report(folder, report):
    """Write prepare_report.json: the report, and the names of all files of the preparation, for `refuse_data_dir`."""
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob('*')) if path.is_file()]
    report = report | {'files': [*files, 'mean_std.npy', 'prepare_report.json']}
    write_text(folder / 'prepare_report.json', json.dumps(report, indent=1) + '\n')


def count_objects(instance_label):
    """(number of objects, number of objects in several 8-connected pieces) of an instance label, int (H, W)."""
    _, id_of_piece = number_pieces(instance_label)
    ids, piece_count = np.unique(id_of_piece[1:], return_counts=True)
    return len(ids), int((piece_count > 1).sum())
