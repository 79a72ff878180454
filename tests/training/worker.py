"""What torchrun starts: train by a recipe; with KILL_AT, the first life of the first process ends there by SIGKILL."""

import os
import signal
import sys

from parameternet.training import Reporter, load_recipe, run


class Kill(Reporter):
    steps = int(os.environ.get("KILL_AT", -1))

    def step(self, *_):
        self.steps -= 1
        if self.steps == 0 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)


run(load_recipe(sys.argv[1]), sys.argv[2], Kill())
