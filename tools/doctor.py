"""Tells what is installed, what works, and the first thing that is wrong."""

import runpy
from pathlib import Path

if __name__ == '__main__':
    # By its path: importing the package would need torch, which may be what is missing.
    doctor = Path(__file__).resolve().parents[1] / 'idlevit_mm' / 'engine' / 'doctor.py'
    runpy.run_path(str(doctor), run_name='__main__')
