"""Builds the package; its metadata are in pyproject.toml.

A wheel carries the configs, the tools and the index of models in `idlevit_mm/.mim`, where
OpenMMLab's `mim` looks for them: `mim train idlevit_mm CONFIG` then needs no checkout.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Tools that set up a checkout, or train and write inside it.
CHECKOUT_ONLY = (
    'setup.sh',
    'build_mmcv.py',
    'doctor.py',
    'demo.py',
    'site.py',
    'studies',
)


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


setup(cmdclass={'build_py': BuildWithMim})
