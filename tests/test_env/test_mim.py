"""An installed wheel without a checkout: `mim` finds its configs, its tools and its models."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns

import pytest
import yaml

pytest.importorskip('mim')
pytest.importorskip('mmdet')
pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
# All that a source archive is made of.
SOURCES = (
    *('idlevit_mm', 'configs', 'tools', 'setup.py', 'pyproject.toml', 'MANIFEST.in'),
    *('LICENSE', 'README.md', 'model-index.yml'),
)
PIP = (sys.executable, '-m', 'pip', '--disable-pip-version-check', '--no-input')
CONFIG = 'retinanet_idle-pvtv2_digits.py'


def run(command, folder, **environment):
    """Run a command, with nothing of this checkout to be found, and return what it said."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **environment}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """Folder with the package, installed from a wheel that was built from a source archive."""
    folder = tmp_path_factory.mktemp('wheel')
    sources = folder / 'sources'
    sources.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            copytree(ROOT / name, sources / name, ignore=ignore_patterns('__pycache__'))
        else:
            copy2(ROOT / name, sources / name)
    build = "from setuptools import build_meta as b; print(b.build_sdist('../dist'))"
    run([sys.executable, '-c', build], sources)
    (archive,) = (folder / 'dist').iterdir()
    quick = ('--no-deps', '--no-index')
    run([*PIP, 'wheel', *quick, '--no-build-isolation', '-w', folder, archive], folder)
    (wheel,) = folder.glob('*.whl')
    run([*PIP, 'install', *quick, '--target', folder / 'site', wheel], folder)
    return folder / 'site'


@pytest.fixture
def mim(installed, tmp_path):
    from mim.utils import get_installed_path

    if Path(get_installed_path('packaging')).name != 'packaging':
        pytest.skip(
            "onedl-mim 0.5.1 looks for a package in the folder of its RECORD's first file, which "
            'is NAME-VERSION.dist-info wherever package and folder have one name'
        )

    def call(*arguments, python=sys.executable):
        path = os.pathsep.join([str(installed), str(tmp_path)])
        # mim starts tools by what it takes for the Python that it runs in.
        code = f'import sys; sys.executable = {str(python)!r}; from mim.cli import cli; cli()'
        return run([sys.executable, '-c', code, *arguments], tmp_path, PYTHONPATH=path)

    return call


def test_configs_and_tools_are_complete(installed):
    shipped = installed / 'idlevit_mm' / '.mim'

    def files(root):
        found = (path.relative_to(root) for path in root.rglob('*') if path.is_file())
        return {path for path in found if '__pycache__' not in path.parts}

    assert files(shipped / 'configs') == files(ROOT / 'configs')
    missing = files(ROOT / 'tools') - files(shipped / 'tools')
    assert {path.name for path in missing} == {
        *('setup.sh', 'build_mmcv.py', 'doctor.py', 'demo.py', 'site.py'),
        *('variants.py', 'run.py', 'report.py', 'rules.py', 'training_free.py'),
    }
    # The others need nothing that lies beside them in a checkout.
    for tool in (shipped / 'tools').rglob('*.py'):
        tree = ast.walk(ast.parse(tool.read_text(encoding='utf-8')))
        names = {getattr(node, 'id', getattr(node, 'attr', None)) for node in tree}
        assert not names & {'REPOSITORY', '__file__'}, tool


def test_mim_search_lists_the_models(mim, installed):
    output = mim('search', 'idlevit_mm', '--valid-config')
    listed = ast.literal_eval(output.strip().splitlines()[-1])
    names = {
        model['Name']
        for path in (ROOT / 'configs').rglob('metafile.yml')
        for model in yaml.safe_load(path.read_text(encoding='utf-8'))['Models']
    }
    assert len(listed) == len(names) > 20
    # mim writes names in small letters.
    assert set(listed) == {name.lower() for name in names}


@pytest.mark.skipif(sys.platform != 'linux', reason='a process is forked')
def test_mim_train_and_mim_test(mim, installed, scenes, tmp_path, quick_python):
    """Two iterations by a config's name, then a test by one that inherits the shipped config.

    Only the test starts a Python that has this package from its wheel.
    """
    data = scenes / 'coco'
    loader = dict(num_workers=0, persistent_workers=False)
    options = {
        'train_cfg.max_epochs': 1,
        **{f'{phase}_dataloader.dataset.data_root': data for phase in ('train', 'val', 'test')},
        **{
            f'{phase}_dataloader.{key}': loader[key] for phase in ('train', 'val') for key in loader
        },
        'train_dataloader.batch_size': 2,
        'val_evaluator.ann_file': data / 'annotations' / 'instances_val.json',
    }
    output = mim(
        *('train', 'idlevit_mm', CONFIG, '--gpus', '0', '--launcher', 'none', '--work-dir', 'run'),
        *('--cfg-options', *(f'{key}={value}' for key, value in options.items())),
        python=quick_python,
    )
    shipped = installed / 'idlevit_mm' / '.mim'
    assert f'will use {shipped / "configs" / "digit_scenes" / CONFIG} instead' in output
    assert f'{shipped / "tools" / "train.py"} ' in output
    assert 'Training finished successfully' in output
    assert 'Epoch(train) [1][2/2]' in output

    (tmp_path / 'witness.py').write_text("import idlevit_mm; print('is', idlevit_mm.__file__)")
    (tmp_path / 'mine.py').write_text(f"""
_base_ = '{shipped / 'configs' / 'digit_scenes' / CONFIG}'
custom_imports = dict(imports=['idlevit_mm', 'witness'])
model = dict(test_cfg=dict(score_thr=0.0))
test_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root='{data}')
)
test_evaluator = dict(ann_file='{data}/annotations/instances_val.json')
""")
    output = mim(
        *('test', 'idlevit_mm', 'mine.py', '--checkpoint', 'run/epoch_1.pth', '--work-dir', 'seen')
    )
    assert f'is {installed / "idlevit_mm" / "__init__.py"}\n' in output
    assert 'Testing finished successfully' in output
    assert 'coco/bbox_mAP_50' in output
