"""What torchrun starts: train by a recipe; with KILL_AT, the first life of the first process ends there by SIGKILL."""

import os
import signal
import sys
from pathlib import Path

from parameternet.training import Reporter, load_recipe, run, run_folder


class Kill(Reporter):
    steps = int(os.environ.get("KILL_AT", -1))

    def step(self, *_):
        self.steps -= 1
        if self.steps == 0 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)


run_folder.TAKEOVER_SECONDS = float(os.environ.get("TAKEOVER", run_folder.TAKEOVER_SECONDS))
run(load_recipe(sys.argv[1]), sys.argv[2], Kill())

# A thread of gloo that outlives the run can abort the process at its end.
threads = Path("/proc/self/task")
names = [(thread / "comm").read_text().strip() for thread in threads.iterdir()] if threads.is_dir() else []
assert not [name for name in names if "gloo" in name], names
