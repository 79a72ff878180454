"""Memory of training on a CPU."""

import os
import subprocess
import sys

import pytest

from parameternet.training.memory import keep_freed_memory

# Prints whether glibc keeps memory, and the page faults of one more tensor of 64 MiB.
PROGRAM = """
import resource
import torch
from parameternet.training.memory import keep_freed_memory
kept = {call}
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_"))}
    program = PROGRAM.format(call=call)
    done = subprocess.run(
        [sys.executable, "-c", program], env=inherited | environment, check=True, capture_output=True, text=True
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is on Linux")
def test_freed_memory_is_used_again():
    kept, few = faults("keep_freed_memory()")
    if not kept:
        pytest.skip("the C library is not glibc")
    _, many = faults("False")
    assert many > 1000 and few < many / 10


def test_an_allocator_chosen_by_the_environment_is_left_alone():
    assert not faults("keep_freed_memory()", MALLOC_ARENA_MAX="1")[0]


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
