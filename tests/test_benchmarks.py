"""Every program in benchmarks/ can be started: its imports work, and it explains itself."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# In one process: each import of torch takes seconds. Ultralytics changes torch, so it is not this process.
START = """
import argparse, importlib, sys
sys.path.insert(0, {folder!r})
class Done(Exception): pass
def parse_args(self, *_, **__):
    self.format_help()
    raise Done
argparse.ArgumentParser.parse_args = parse_args
for name in {names!r}:
    module = importlib.import_module(name)
    try:
        module.main()
    except Done:
        print(name)
"""


def test_programs_start():
    pytest.importorskip("ultralytics")
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py") if not path.stem.startswith("_"))
    command = [sys.executable, "-W", "ignore", "-c", START.format(folder=str(BENCHMARKS), names=names)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == names, done.stderr[-2000:]
