"""Freed memory is reused, so that large tensors do not ask the system for fresh pages each time."""

import subprocess
import sys
import textwrap

import pytest

from parameternet.memory import keep_freed_memory

FAULTS = """
    import resource
    import torch
    {first}
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(32 << 20)  # 128 MiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    for _ in range(4):  # until the heap is large enough
        number = faults()
    print(number)
"""


def faults(first: str) -> int:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FAULTS.format(first=first))], capture_output=True)
    return int(done.stdout)


def test_freed_memory_is_reused():
    if not keep_freed_memory():
        pytest.skip("another C library than glibc")
    assert faults("from parameternet.memory import keep_freed_memory; keep_freed_memory()") < 100
    assert faults("") > 1000  # otherwise nothing was shown


def test_the_command_line_reuses_it():
    if not keep_freed_memory():
        pytest.skip("another C library than glibc")
    command = (
        "from click.testing import CliRunner; from parameternet.cli import main; CliRunner().invoke(main, ['list'])"
    )
    assert faults(command) < 100
