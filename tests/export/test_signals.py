"""A process that ran exported files still handles signals: a data loader sends one whenever a worker ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import PACKAGES, needs

ROOT = Path(__file__).parents[2]
CODE = """
import importlib, os, signal, sys
import numpy as np
from small import network
from parameternet.export import export

writer = importlib.import_module(f"parameternet.export.{sys.argv[1]}")
paths = [export(network(), f"{name}{writer.SUFFIX}", sys.argv[1]).path for name in "ab"]
first, second = (writer.runner(path) for path in paths)
for run in (first, second):
    run(np.zeros((1, 3, 40, 56), np.float32))
del first, run
del second
seen = []
signal.signal(signal.SIGCHLD, lambda *_: seen.append("signal"))
os.kill(os.getpid(), signal.SIGCHLD)
print(*seen)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("format", PACKAGES)
def test_signals_are_handled_after_files_whose_lives_overlapped(tmp_path, format):
    needs(format)
    search = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CODE, format], cwd=tmp_path, env={**os.environ, "PYTHONPATH": search}, text=True,
        capture_output=True, timeout=250,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "signal\n"), done.stderr[-2000:]
