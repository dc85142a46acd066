"""Tells what is installed, what works, and the first thing that is wrong."""

import argparse
import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Prints the report and returns 1 if something that is needed is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--plain', action='store_true', help='plain text, without colours')
    args = parser.parse_args()
    # By its path: importing the package would need torch, which may be what is missing.
    path = Path(__file__).resolve().parent.parent / 'idlevit_mm' / 'engine' / 'doctor.py'
    spec = importlib.util.spec_from_file_location('idlevit_mm_doctor', path)
    assert spec is not None
    assert spec.loader is not None
    doctor = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = doctor
    spec.loader.exec_module(doctor)
    return doctor.print_report(doctor.examine(), args.plain)


if __name__ == '__main__':
    sys.exit(main())
