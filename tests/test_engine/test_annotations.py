"""Annotations that cannot be read are named: file, entry and image."""

import json
import re
import shutil
from xml.etree import ElementTree

import pytest
from mmengine.registry import DATASETS, DefaultScope

from idlevit_mm.engine import BadSampleError, SettingError
from idlevit_mm.engine.bad_samples import guard
from idlevit_mm.engine.data_sets import naming_the_data

pytest.importorskip('mmdet.datasets')


@pytest.fixture
def coco(scenes, tmp_path):
    """Builds the data set of the scenes from a file whose second annotation is changed."""
    source = shutil.copytree(scenes / 'coco', tmp_path / 'coco')
    file = source / 'annotations' / 'instances_train.json'

    def build(**changes):
        content = json.loads(file.read_text())
        content['annotations'][1].update(changes)
        file.write_text(json.dumps(content))
        settings = dict(
            type='CocoDataset',
            data_root=str(source),
            ann_file='annotations/instances_train.json',
            data_prefix=dict(img='train'),
            metainfo=dict(classes=[one['name'] for one in content['categories']]),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            ],
        )
        with DefaultScope.overwrite_default_scope('mmdet'):
            with naming_the_data('train', dict(dataset=settings)):
                data = DATASETS.build(settings)
            guard(data, training=False)
            return [data[number] for number in range(len(data))], content

    return build


@pytest.mark.parametrize('box', [None, [1, 2, 3], ['a', 1, 2, 3], 5])
def test_a_bad_box_is_named(coco, box):
    said = rf'train\.json\).*{re.escape(f"the bbox {box!r}")} in annotations\[1\] \(id \d+\)'
    with pytest.raises(SettingError, match=said) as error:
        coco(bbox=box)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('outline', [[['x'] * 6], 5])
def test_a_bad_outline_is_named(coco, outline):
    said = r'train\.json: instances\[\d+\] \(.*mask\) of image \d+ \(.*\.jpg\) cannot be loaded'
    with pytest.raises(BadSampleError, match=said) as error:
        coco(segmentation=outline)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (lambda root: '<annotation><size>', 'ParseError'),
        (lambda root: root.replace('<xmin>4', '<xmin>x'), "could not convert string to float: 'x'"),
        (lambda root: root.replace('<ymax>40</ymax>', ''), 'AttributeError'),
    ],
)
def test_a_bad_file_of_voc_is_named(tmp_path, change, said):
    (tmp_path / 'VOC2007' / 'Annotations').mkdir(parents=True)
    (tmp_path / 'list.txt').write_text('one\n')
    root = ElementTree.fromstring('<annotation/>')
    for holder, names in (('size', 'width height'), ('bndbox', 'xmin ymin xmax ymax')):
        parent = root
        if holder == 'bndbox':
            parent = ElementTree.SubElement(root, 'object')
            ElementTree.SubElement(parent, 'name').text = 'person'
        part = ElementTree.SubElement(parent, holder)
        for name in names.split():
            ElementTree.SubElement(part, name).text = '40' if 'min' not in name else '4'
    text = change(ElementTree.tostring(root, encoding='unicode'))
    (tmp_path / 'VOC2007' / 'Annotations' / 'one.xml').write_text(text)
    settings = dict(
        type='mmdet.VOCDataset',
        data_root=str(tmp_path),
        ann_file='list.txt',
        data_prefix=dict(sub_data_root='VOC2007/'),
        pipeline=[],
    )
    with (
        pytest.raises(SettingError, match=rf'list\.txt\) at .*one\.xml.*{said}') as error,
        naming_the_data('train', dict(dataset=settings)),
    ):
        DATASETS.build(settings)
    assert '\n' not in str(error.value)
