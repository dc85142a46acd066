"""Package metadata of idlevit_mm.

Nothing that an OpenMMLab environment brings is listed as a requirement: torch, mmcv, mmengine,
mmdet and mmsegmentation exist as several builds and forks (mmcv-lite, onedl-mmcv, ...), and pip
would replace a working one or compile mmcv on its own. `tools/doctor.py` tells what is missing.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


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
    extras_require={
        'demo': ['ftfy', 'matplotlib', 'pycocotools', 'regex', 'rich', 'scikit-learn'],
        'dev': ['hypothesis', 'mypy', 'pytest', 'pytest-xdist', 'ruff'],
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
