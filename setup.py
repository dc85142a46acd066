"""Package metadata of idlevit_mm.

Nothing that an OpenMMLab environment brings is listed as a requirement: torch, mmcv, mmengine,
mmdet and mmsegmentation exist as several builds and forks (mmcv-lite, onedl-mmcv, ...), and pip
would replace a working one or compile mmcv on its own. `tools/doctor.py` tells what is missing.

A wheel carries the configs, the tools and the index of models in `idlevit_mm/.mim`, where
OpenMMLab's `mim` looks for them: `mim train idlevit_mm CONFIG` then needs no checkout.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Tools that set up a checkout, or train and write inside it.
CHECKOUT_ONLY = ('setup_env.py', 'doctor.py', 'demo.py', 'studies')


def read_version() -> str:
    """Returns the version without importing the package, which would need torch."""
    text = (ROOT / 'idlevit_mm' / 'version.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__ = '([^']+)'$", text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError("idlevit_mm/version.py has no line __version__ = '...'")
    return match.group(1)


def read_readme() -> str:
    """Returns the README, or an empty text in a checkout that has none."""
    path = ROOT / 'README.md'
    return path.read_text(encoding='utf-8') if path.is_file() else ''


class BuildWithMim(build_py):
    """Builds the package, and what `mim` needs beside its code.

    It is copied into the build folder, never into the sources. An editable installation gets none:
    there the checkout itself is at hand.
    """

    def run(self) -> None:
        """Build."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / 'idlevit_mm' / '.mim'
        # What an earlier build left there may since have been renamed.
        shutil.rmtree(target, ignore_errors=True)
        for folder in ('configs', 'tools'):
            shutil.copytree(
                ROOT / folder,
                target / folder,
                ignore=shutil.ignore_patterns('__pycache__', *CHECKOUT_ONLY),
            )
        shutil.copy2(ROOT / 'model-index.yml', target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Returns the files that a build writes; a package's data are not compiled."""
        target = Path(self.build_lib) / 'idlevit_mm' / '.mim'
        files = [str(path) for path in target.rglob('*') if path.is_file()]
        return [*super().get_outputs(include_bytecode), *files]


setup(
    name='idlevit_mm',
    version=read_version(),
    description='Token-idling Swin, PVT and ViT backbones for MMDetection and MMSegmentation',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    author='idlevit_mm contributors',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['idlevit_mm', 'idlevit_mm.*']),
    install_requires=[],
    cmdclass={'build_py': BuildWithMim},
    extras_require={
        'demo': ['ftfy', 'matplotlib', 'pycocotools', 'regex', 'rich', 'scikit-learn'],
        'dev': ['hypothesis', 'mypy', 'pytest', 'pytest-xdist', 'ruff', 'tensorboard'],
    },
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    zip_safe=False,
)
