#!/usr/bin/env python3
"""The operator tables are what opsets/make.py writes."""
import runpy
import sys
from pathlib import Path

script = Path(__file__).resolve().parents[2] / "opsets" / "make.py"
sys.argv = [str(script), "--check"]
runpy.run_path(str(script), run_name="__main__")
