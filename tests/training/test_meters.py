"""Meters of an epoch and stop signals, without a run."""

import os
import signal
import types

import pytest
import torch

from parameternet.training import meters
from parameternet.training.distributed import Place
from parameternet.training.meters import EpochMeter, Progress
from parameternet.training.signals import StopSignals

PLACE = Place(0, 1, torch.device("cpu"))


def test_the_loss_is_weighted_by_images_and_continues_after_a_resume():
    progress = Progress()
    first = EpochMeter(progress)
    first.add_loss(torch.tensor(2.0), 3)
    assert first.settle() == 6
    resumed = EpochMeter(progress)
    resumed.add_loss(torch.tensor(4.0), 1)
    assert (resumed.settle(), resumed.settle()) == (10, 10)
    resumed.stop()
    assert resumed.summary(PLACE)["train_loss"] == 2.5


def test_only_waiting_for_batches_counts_as_waiting(monkeypatch):
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(meters, "time", clock)

    def slow():
        for batch in range(2):
            clock.now += 1
            yield batch

    progress = Progress()
    meter = EpochMeter(progress)
    for progress.step, _ in enumerate(meter.timed(slow()), 1):
        clock.now += 3
    meter.stop()
    clock.now += 2  # validation
    assert progress.waited == 2
    assert meter.steps_per_second() == 2 / 10
    summary = meter.summary(PLACE)
    assert (summary["data_share"], summary["seconds"]) == (0.25, 10)


def test_the_next_epoch_starts_from_zero_and_keeps_the_history():
    progress = Progress(epoch=1, step=5, updates=9, loss_sum=3.0, loss_images=4, seconds=1.0, waited=0.5, rows=[{}])
    progress.next_epoch()
    assert progress == Progress(epoch=2, updates=9, rows=[{}])


def test_the_first_signal_is_noted_and_the_second_acts_as_usual():
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes may ignore it
    try:
        with StopSignals() as signals:
            assert signals.received == 0
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, former)
