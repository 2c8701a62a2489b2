"""The readers take damaged files or refuse them with one line; and the fuzzer notices a reader that does not."""
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'scripts'))
import fuzz  # noqa: E402

from support.script import InputError  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    """Damaged files are full of things worth a note."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


# Bad readers, for the fuzzer to find

def raises_key_error(path):
    raise KeyError('inst_map')


def returns_nan(path):
    fuzz.check_array(np.array([[0.5, np.nan]]), np.float64)


def returns_float_ids(path):
    fuzz.check_label(np.zeros((4, 4)))


def returns_negative_ids(path):
    fuzz.check_label(np.full((4, 4), -1, np.int32))


def refuses_in_two_lines(path):
    raise InputError(f'{path} is damaged:\nsee above')


def hides_a_memory_error(path):
    try:
        raise MemoryError
    except MemoryError as error:
        raise InputError(f'{path} is damaged') from error


def computes_for_long(path):
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass


def takes_memory(path):
    np.ones(45_000_000, np.uint8)        # over 32 MB, which malloc always takes anew from the system


def crashes(path):
    if path.name == 'bad':
        os.kill(os.getpid(), signal.SIGSEGV)


def hangs(path):
    if path.name == 'bad':
        time.sleep(60)


# Tests

@pytest.mark.parametrize('name', fuzz.READERS)
def test_damaged_files_are_read_right_or_refused_with_one_line(tmp_path, name):
    failed = []
    for file_name, data in fuzz.damaged_files(name, 60, seed=0):
        path = tmp_path / file_name
        path.write_bytes(data)
        outcome = fuzz.examine(fuzz.READERS[name].read, path)
        if outcome.kind == 'finding' and not outcome.what.startswith('over'):      # time and memory: the long form
            failed.append(f'{file_name}: {outcome.what}')
    assert failed == []


@pytest.mark.parametrize('name', fuzz.READERS)
def test_the_files_that_are_damaged_were_valid(tmp_path, name):
    refused = {}
    for file_name, data in fuzz.make_seeds(name).items():
        (tmp_path / file_name).write_bytes(data)
        outcome = fuzz.examine(fuzz.READERS[name].read, tmp_path / file_name)
        if outcome.kind != 'accepted':
            refused[file_name] = outcome.detail.split('; ')[-1]
    # several pages are the one thing that is refused undamaged
    assert refused == ({'pages.tif': 'expected one image per file'} if name == 'image' else {})


@pytest.mark.parametrize('reader', ['image', 'label', 'xml'])                  # of checkpoints this is not said
def test_same_seed_same_files(reader, monkeypatch):
    first, other = (list(fuzz.damaged_files(reader, 40, seed)) for seed in (1, 2))
    monkeypatch.setattr(time, 'asctime', lambda *_: 'Mon Jan  1 00:00:00 2001')           # another day
    monkeypatch.setattr(time, 'localtime', lambda *_: time.struct_time((2001, 1, 1, 0, 0, 0, 0, 1, 0)))
    assert first == list(fuzz.damaged_files(reader, 40, 1)) and len(first) == 40
    assert [name for name, _ in first] == [name for name, _ in other]
    assert sum(a != b for a, b in zip(first, other)) > 30
    assert first[:10] == list(fuzz.damaged_files(reader, 10, 1))


@pytest.mark.parametrize('read, what', [
    (raises_key_error, 'KeyError in test_fuzz.py:raises_key_error'),
    (returns_nan, 'WrongResult in fuzz.py:check_array'),
    (returns_float_ids, 'WrongResult in fuzz.py:check_array'),
    (returns_negative_ids, 'WrongResult in fuzz.py:check_label'),
    (refuses_in_two_lines, 'message of 2 lines in test_fuzz.py:refuses_in_two_lines'),
    (hides_a_memory_error, 'MemoryError behind InputError in test_fuzz.py:hides_a_memory_error'),
])
def test_a_bad_reader_is_noticed(tmp_path, read, what):
    outcome = fuzz.examine(read, tmp_path / 'any')
    assert outcome.kind == 'finding' and outcome.what.startswith(what)


def test_much_time_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, 'SECONDS', 0.1)
    assert fuzz.examine(computes_for_long, tmp_path / 'any').what == 'over 0.1 s (accepted)'


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='memory is measured on Linux')
def test_much_memory_is_noticed(tmp_path):
    """In a process of its own, as files are read: in this one, what earlier tests freed may be used again."""
    code = ('import fuzz, test_fuzz; from pathlib import Path; fuzz.MEGABYTES = 20\n'
            'outcome = fuzz.examine(test_fuzz.takes_memory, Path("any"))\n'
            'print(outcome.what, outcome.megabytes, sep="|")')
    paths = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / 'scripts', ROOT / 'tests'))
    done = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': paths}, capture_output=True,
                          text=True, check=True)
    what, megabytes = done.stdout.strip().split('|')
    assert what == 'over 20 MB (accepted)' and 20 < float(megabytes) < 60


def test_accepted_and_refused(tmp_path):
    Image.new('RGB', (5, 4)).save(tmp_path / 'good.png')
    (tmp_path / 'bad.png').write_bytes(b'no image')
    assert fuzz.examine(fuzz.read_image_file, tmp_path / 'good.png').kind == 'accepted'
    refused = fuzz.examine(fuzz.read_image_file, tmp_path / 'bad.png')
    assert refused.kind == 'refused' and 'bad.png is not an image that can be read' in refused.detail


@pytest.mark.skipif(sys.platform == 'win32', reason='processes end otherwise there')
def test_a_crash_is_a_finding_and_the_next_file_is_read(tmp_path):
    with fuzz.ReadingProcess(crashes) as process:
        crash = process.examine(tmp_path / 'bad')
        assert (crash.kind, crash.what) == ('finding', 'process ended: SIGSEGV')
        assert 'in crashes' in crash.detail                         # faulthandler's stack
        assert process.examine(tmp_path / 'good').kind == 'accepted'


def test_a_hang_is_a_finding(tmp_path):
    with fuzz.ReadingProcess(hangs, patience=0.5) as process:
        assert process.examine(tmp_path / 'bad').what == 'no answer within 0.5 s'


def test_findings_are_counted_kept_and_make_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(fuzz.READERS, 'xml', fuzz.Reader(fuzz.xml_seeds, raises_key_error))
    with pytest.raises(SystemExit) as exit_of:
        fuzz.main(['xml', '--count', '5', '--keep', str(tmp_path / 'kept')])
    assert exit_of.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ['xml', '5', '0', '0', '5']
    assert '5  KeyError in test_fuzz.py:raises_key_error' in lines[-1] and 'xml_00000_bare.xml' in lines[-1]
    kept = sorted(path.name for path in (tmp_path / 'kept').iterdir())
    assert len(kept) == 2 * fuzz.FILES_PER_FINDING and kept[:2] == ['xml_00000_bare.xml', 'xml_00000_bare.xml.txt']
    assert "KeyError: 'inst_map'" in (tmp_path / 'kept' / kept[1]).read_text()


@pytest.mark.parametrize('option, value', [('--count', '0'), ('--seed', '-1')])
def test_bad_options(option, value):
    with pytest.raises(InputError, match=f'{option} is {value}; expected'):
        fuzz.main(['xml', option, value])
