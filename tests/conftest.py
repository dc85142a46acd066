import gc
import os
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault('OMP_NUM_THREADS', '1')

import mmengine.config.config
import mmengine.dataset.base_dataset
import pytest
import torch
from yapf.yapflib import yapf_api

# The layout of configs takes a third of a short training, and the memory that each data set has the
# collector look for a tenth.
LAYOUT, LAID_OUT_BY = yapf_api.FormatCode, (mmengine.config.config, yapf_api)
for module in LAID_OUT_BY:
    module.FormatCode = lambda text, **_: (text, True)
mmengine.dataset.base_dataset.gc = SimpleNamespace(collect=int)

# At the first backward pass autograd starts threads for the devices that are there, after which no
# fork can train. Fake CUDA tensors make it see one, so the first pass comes before any of them.
torch.ones(1, requires_grad=True).sum().backward()


def pytest_collection_finish():
    """Keep the collector out of what imports have made: each data set of mmengine calls it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def layout(monkeypatch):
    """Configs are laid out, and checked by that, as they are for users."""
    for module in LAID_OUT_BY:
        monkeypatch.setattr(module, 'FormatCode', LAYOUT)


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_machine_report(monkeypatch):
    """The runner starts compilers to log their versions; no test reads that."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)


@pytest.fixture(params=['cpu', 'reference'])
def each_window_path(request):
    """Runs a test twice: with the windows of the CPU, and with those of GPUs and compilers."""
    from idlevit_mm.kernels import use_backend

    with use_backend(request.param):
        yield


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """Folder of a handful of digit scenes of an odd size, 4 to train and 3 to validate."""
    from digit_scenes import write_digit_scenes

    folder = tmp_path_factory.mktemp('data') / 'digit_scenes'
    write_digit_scenes(
        folder,
        size=(70, 90),
        num_train=4,
        num_val=3,
        num_digits=(1, 3),
        digit_scale=(16, 40),
        progress=False,
    )
    return folder


@pytest.fixture(scope='session')
def scene_config(scenes):
    """Reads a config of digit scenes, for the tiny scenes and without processes for loading."""
    from mmengine.config import Config

    def read(name):
        path = Path(__file__).parents[1] / 'configs' / 'digit_scenes' / f'{name}.py'
        cfg = Config.fromfile(path)
        for phase in ('train', 'val', 'test'):
            loader = cfg[f'{phase}_dataloader']
            loader.dataset.data_root = str(scenes / Path(loader.dataset.data_root).name)
            loader.update(batch_size=2, num_workers=0, persistent_workers=False)
            evaluator = cfg.get(f'{phase}_evaluator') or {}
            if 'ann_file' in evaluator:
                evaluator.ann_file = str(scenes / 'coco' / 'annotations' / 'instances_val.json')
        if cfg.model.type == 'RetinaNet':
            # An untrained focal loss head is sure of nothing.
            cfg.model.test_cfg.score_thr = 0.0
        return cfg

    return read


@pytest.fixture(scope='session')
def quick_python(tmp_path_factory):
    """Path of a Python that has imported the libraries when it starts; Linux only."""
    from importlib import import_module

    from quick_python import quick_python

    for library in ('mmdet.models', 'mmseg.models', 'idlevit_mm'):
        import_module(library)
    with quick_python(tmp_path_factory.mktemp('bin')) as program:
        yield program


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Folder whose files are at ``http://127.0.0.1:PORT/``: the folder and that address."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_args):
            pass

    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch_home'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    folder = tmp_path / 'served'
    folder.mkdir()
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()
