"""GeoJSON of instance labels: drawn again by another method it is the label, and its rings are valid."""
import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from skimage.measure import grid_points_in_poly

from scripts import export_geojson
from support.files import save_instances
from support.script import InputError

COLUMNS = ('id centroid_y centroid_x bbox_top bbox_left bbox_bottom bbox_right area perimeter eccentricity solidity '
           'mean_inside_probability matched_id matched_iou').split()
small_labels = arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 1, 1, 7]))


def picture(*rows):
    """A label from rows of digits, '.' = background."""
    return np.array([[int(pixel) for pixel in row.replace('.', '0')] for row in rows], np.int32)


def export(label, folder, name='a', words=()):
    """Write a label and export it: the text of its GeoJSON."""
    save_instances(folder / f'{name}_seg.tiff', np.asarray(label))
    export_geojson.main([str(folder / f'{name}_seg.tiff'), *words])
    return (folder / f'{name}.geojson').read_text()


def write_table(path, rows, columns=COLUMNS):
    """rows: dicts of columns; a column that a row lacks is empty."""
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def features_of(label):
    """The features after a trip through JSON."""
    return json.loads(json.dumps(list(export_geojson.features(label, 'a'))))


def polygons_of(feature):
    kind, coordinates = feature['geometry']['type'], feature['geometry']['coordinates']
    assert kind in ('Polygon', 'MultiPolygon')
    return [coordinates] if kind == 'Polygon' else coordinates


# ---------------------------------------------------------------------------------------------------
# Slow, obvious versions: a point-in-polygon test for every pixel centre, the rings unit step by unit step
# ---------------------------------------------------------------------------------------------------

def inside(ring, shape):
    """bool (H, W): the pixels whose centre is in the ring."""
    points = np.array(ring)[:, ::-1]                                           # row, column
    low, high = points.min(axis=0), points.max(axis=0)
    mask = np.zeros(shape, bool)
    mask[low[0]:high[0], low[1]:high[1]] = grid_points_in_poly(high - low, points - low - 0.5)
    return mask


def drawn(features, shape):
    """The label, int (H, W), that features describe; no pixel may be in two of them."""
    label = np.zeros(shape, np.int64)
    for feature in features:
        for exterior, *holes in polygons_of(feature):
            mask = inside(exterior, shape)
            for hole in holes:
                assert mask[inside(hole, shape)].all(), 'a hole outside the exterior, or two holes overlap'
                mask &= ~inside(hole, shape)
            assert not label[mask].any(), 'two polygons overlap'
            label[mask] = int(feature['properties']['name'])
    return label


def signed_area(ring):
    x, y = np.array(ring).T
    return np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) / 2


def steps(ring):
    """The grid points that a closed ring passes, from its first point to the one before it comes back."""
    passed = []
    for (x0, y0), (x1, y1) in zip(ring[:-1], ring[1:]):
        n = abs(x1 - x0) + abs(y1 - y0)
        passed += [(x0 + (x1 - x0) * k // n, y0 + (y1 - y0) * k // n) for k in range(n)]
    return passed


def check_ring(ring):
    assert ring[0] == ring[-1] and len(ring) >= 5
    assert all(type(value) is int and value >= 0 for point in ring for value in point)
    for before, point, after in zip([ring[-2], *ring], ring[:-1], ring[1:]):
        assert (before[0] == point[0]) != (before[1] == point[1]), 'not along a pixel border, or a point repeated'
        assert (before[0] == point[0]) == (point[1] == after[1]), 'a point amid a straight line'
    assert len(set(steps(ring))) == len(steps(ring)), 'the ring meets itself'


def check_polygon(polygon, shape):
    """Validity by the OGC's rules; together with `drawn`, which sees holes that leave the exterior or overlap."""
    for ring in polygon:
        check_ring(ring)
    exterior, *holes = polygon
    assert signed_area(exterior) > 0 and all(signed_area(hole) < 0 for hole in holes)
    points = [set(steps(ring)) for ring in polygon]
    assert all(len(a & b) <= 1 for i, a in enumerate(points) for b in points[:i]), 'rings share more than a point'
    part = drawn([{'geometry': {'type': 'Polygon', 'coordinates': polygon}, 'properties': {'name': '1'}}], shape)
    assert ndimage.label(part)[1] == 1, 'a polygon of several parts'
    assert sum(map(signed_area, polygon)) == part.sum()


# ---------------------------------------------------------------------------------------------------
# Outlines
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('rows, kind, coordinates', [
    (['1111', '1..1', '1111'], 'Polygon', [[[0, 0], [4, 0], [4, 3], [0, 3], [0, 0]],                    # with a hole
                                           [[3, 1], [1, 1], [1, 2], [3, 2], [3, 1]]]),
    (['1.', '.1'], 'MultiPolygon', [[[[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]],        # parts that touch
                                    [[[1, 1], [2, 1], [2, 2], [1, 2], [1, 1]]]])])
def test_outlines_by_hand(rows, kind, coordinates):
    feature, = features_of(picture(*rows))
    assert feature['geometry'] == {'type': kind, 'coordinates': coordinates}


@settings(max_examples=300)
@given(small_labels)
@example(picture('.11', '1.1', '111'))                                 # the hole touches the exterior by a corner
@example(picture('11.', '1.1', '111'))
@example(picture('1111', '1.11', '11.1', '1111'))                      # two holes touch
@example(picture('11111', '1.1.1', '11.11', '1.1.1', '11111'))
@example(picture('11111', '1...1', '1.1.1', '1...1', '11111'))         # an island in a hole
@example(picture('1.1', '.1.', '1.1'))
def test_any_label_is_drawn_again_from_valid_rings(label):
    features = features_of(label)
    assert (drawn(features, label.shape) == label).all()
    assert [int(feature['properties']['name']) for feature in features] == [i for i in np.unique(label) if i]
    for feature in features:
        polygons = polygons_of(feature)
        parts = ndimage.label(label == int(feature['properties']['name']))[1]      # 4-connected
        assert len(polygons) == parts
        assert feature['geometry']['type'] == ('Polygon' if parts == 1 else 'MultiPolygon')
        for polygon in polygons:
            check_polygon(polygon, label.shape)


def test_a_large_label_with_gaps_in_its_ids(tmp_path):
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(300, 400)), 3)
    label = ndimage.label((smooth > 0.02) & (rng.random(smooth.shape) > 0.03))[0]           # blobs with many holes
    label[label > 0] = rng.choice(2_000_000, label.max() + 1, replace=False)[label[label > 0]] // 2 + 60_000
    collection = json.loads(export(label, tmp_path))
    assert collection['type'] == 'FeatureCollection'
    features = collection['features']
    assert len(features) == len(np.unique(label)) - 1 > 100 and label.max() > 65_535
    assert any(len(polygon) > 3 for feature in features for polygon in polygons_of(feature))
    assert (drawn(features, label.shape) == label).all()
    for feature in features:
        rings = [ring for polygon in polygons_of(feature) for ring in polygon]
        for ring in rings:
            check_ring(ring)
        measured = feature['properties']['measurements']
        assert sum(map(signed_area, rings)) == measured['area'] == (label == measured['id']).sum()


# ---------------------------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------------------------

def test_a_feature_is_a_detection_of_a_class(tmp_path):
    feature, other = json.loads(export(picture('33.8'), tmp_path, words=['--class-name', 'Gland']))['features']
    assert feature['type'] == 'Feature' and len({feature['id'], other['id']}) == 2
    assert feature['properties'] == {'objectType': 'detection', 'name': '3', 'classification': {'name': 'Gland'},
                                     'measurements': {'id': 3, 'area': 2}}
    assert features_of(picture('1'))[0]['properties']['classification'] == {'name': 'Nucleus'}


def test_measurements_come_from_the_table_beside_the_label(tmp_path):
    """Not from that of another image; an empty cell, NaN and a column with text in it are left out."""
    write_table(tmp_path / 'ab_objects.csv', [dict(id=3, area=9)])
    write_table(tmp_path / 'a_objects.csv', [
        dict(id=8, area=1, centroid_y=0, centroid_x=3.0, solidity='nan', matched_id='', grade='high', stain=''),
        dict(id=3, area=2, centroid_y=0.25, centroid_x='1e-1', mean_inside_probability=0.75, matched_id=4,
             matched_iou=0.5, grade='2', stain='5')], [*COLUMNS, 'grade', 'stain'])
    three, eight = (f['properties']['measurements'] for f in json.loads(export(picture('33.8'), tmp_path))['features'])
    assert three == {'id': 3, 'area': 2, 'centroid_y': 0.25, 'centroid_x': 0.1, 'mean_inside_probability': 0.75,
                     'matched_id': 4, 'matched_iou': 0.5, 'stain': 5}
    assert eight == {'id': 8, 'area': 1, 'centroid_y': 0, 'centroid_x': 3}


# ---------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------

def test_the_same_label_makes_the_same_bytes(tmp_path):
    label = picture('11.2', '.1.2')
    once, again = tmp_path / 'once', tmp_path / 'again'
    for folder in (once, again):
        save_instances(folder / 'a_seg.tiff', label)
        export_geojson.main([str(folder)])
        export_geojson.main([str(folder), '--gzip'])
        assert sorted(path.name for path in folder.iterdir()) == ['a.geojson', 'a.geojson.gz', 'a_seg.tiff']
        assert gzip.decompress((folder / 'a.geojson.gz').read_bytes()) == (folder / 'a.geojson').read_bytes()
    for name in ('a.geojson', 'a.geojson.gz'):
        assert (once / name).read_bytes() == (again / name).read_bytes()
    assert (once / 'a.geojson.gz').read_bytes()[4:8] == bytes(4)                       # the time of a gzip header
    other = json.loads(export(label, tmp_path, name='b'))['features'][0]['id']
    assert other != json.loads((once / 'a.geojson').read_text())['features'][0]['id']


def test_a_folder_is_exported_to_another_one(tmp_path, capsys):
    for name in ('b', 'a'):
        save_instances(tmp_path / 'in' / f'{name}_seg.tiff', picture('1.2'))
    (tmp_path / 'in' / 'a_seg_colored.png').write_bytes(b'not a label')
    (tmp_path / 'in' / '._a_seg.tiff').write_bytes(b'hidden')
    export_geojson.main([str(tmp_path / 'in'), '--out', str(tmp_path / 'deep' / 'out')])
    assert sorted(path.name for path in (tmp_path / 'deep' / 'out').iterdir()) == ['a.geojson', 'b.geojson']
    assert len(list((tmp_path / 'in').iterdir())) == 4
    assert f'4 objects of 2 labels written to {tmp_path / "deep" / "out"}' in capsys.readouterr().out


def test_downsample_and_offset_put_the_outlines_of_one_image_into_its_slide(tmp_path):
    label = picture('33.8', '3..8')
    plain = json.loads(export(label, tmp_path))['features']
    for factor, whole in (('1', True), ('4', True), ('2.5', False)):
        words = ['--downsample', factor, '--offset', '20000', '700']
        moved = json.loads(export(label, tmp_path, words=words))['features']
        for before, after in zip(plain, moved):
            rings = [np.array(ring) * float(factor) + [20000, 700] for ring in before['geometry']['coordinates']]
            assert [ring.tolist() for ring in rings] == after['geometry']['coordinates']
            assert all(isinstance(v, int) for v in after['geometry']['coordinates'][0][0]) == whole
            assert before['properties'] == after['properties'] and before['id'] == after['id']
    for word in ('0', 'nan', '-1'):
        with pytest.raises(InputError, match='--downsample is .*; expected a number above 0'):
            export(label, tmp_path, words=[f'--downsample={word}'])
    save_instances(tmp_path / 'b_seg.tiff', label)
    with pytest.raises(InputError, match='--offset is that of one image, and .* holds 2 labels; give one'):
        export_geojson.main([str(tmp_path), '--offset', '1', '0'])


@pytest.mark.filterwarnings('ignore:.*has no object')
def test_a_label_without_objects_is_an_empty_collection(tmp_path):
    assert json.loads(export(np.zeros((3, 4), int), tmp_path)) == {'type': 'FeatureCollection', 'features': []}


# ---------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------

def test_errors_of_paths_and_names(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/a.png').touch()
    save_instances(tmp_path / 'a_seg.tiff', picture('1'))
    for words, message in (
            (['empty'], r'no {name}_seg.tiff in .*: saw an empty folder; give'),
            (['other'], r'no {name}_seg.tiff in .*: saw a.png; give'),
            (['other/a.png'], 'expected a file named {name}_seg.tiff, or a folder of them, found .*a.png'),
            (['a_seg.tiff', '--out', str(tmp_path / 'other/a.png')], '--out is .*a.png, a file; expected a folder'),
            (['a_seg.tiff', '--class-name', ' '], '--class-name is empty')):
        with pytest.raises(InputError, match=message):
            export_geojson.main([str(tmp_path / words[0]), *words[1:]])


@pytest.mark.parametrize('rows, message', [
    ([dict(id=1, area=2)], 'a_seg.tiff has an object 2 of 1 pixels, .*a_objects.csv has no row for it; .* test.py'),
    ([], 'a_seg.tiff has an object 1 of 2 pixels, .*a_objects.csv has no row for it'),
    ([dict(id=1, area=2), dict(id=2, area=5)], 'has an object 2 of 1 pixels, .*a_objects.csv has the area 5'),
    ([dict(id=i) for i in (1, 2, 4, 3)], 'a_objects.csv has a row for object 3, a_seg.tiff has no such object'),
    ([dict(id=1), dict(id=1)], 'a_objects.csv has two rows with the id "1"; expected one row for each object'),
    ([dict(id=1), dict(id='x')], 'a_objects.csv has a row with the id "x"; expected')])
def test_a_table_of_other_objects_is_refused_and_the_earlier_file_stays(tmp_path, rows, message):
    before = export(picture('11.2'), tmp_path)
    write_table(tmp_path / 'a_objects.csv', rows)
    with pytest.raises(InputError, match=message):
        export(picture('11.2'), tmp_path)
    assert (tmp_path / 'a.geojson').read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.geojson', 'a_objects.csv', 'a_seg.tiff']


def test_a_table_that_cannot_be_read(tmp_path):
    (tmp_path / 'a_objects.csv').write_text('number,area\n1,1\n')
    with pytest.raises(InputError, match='a_objects.csv has the columns number, area; expected one named id'):
        export(picture('1'), tmp_path)
    (tmp_path / 'a_objects.csv').write_bytes(b'id,area\n\xff\xfe,1\n')
    with pytest.raises(InputError, match='a_objects.csv is not a table of objects'):
        export(picture('1'), tmp_path)


def test_as_a_program_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    script = Path(export_geojson.__file__)
    done = subprocess.run([sys.executable, str(script), 'nothing'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.startswith('error: no such file or folder: nothing; give the {set}_segmentation folder')
    assert done.stderr.count('\n') == 1
