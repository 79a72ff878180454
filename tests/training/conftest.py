"""Three classes of small coloured pictures, and a recipe that learns them in seconds."""

from __future__ import annotations

import pytest
import torch
from pictures import draw, pack

from parameternet.training import Recipe


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with `train` (3 x 8 pictures), `val` (3 x 5) and the same as tars."""
    root = tmp_path_factory.mktemp("pictures")
    draw(root / "train", 8, seed=0)
    draw(root / "val", 5, seed=1)
    pack(root / "train", root / "train.tar")
    pack(root / "val", root / "val.tar")
    return root


@pytest.fixture
def recipe(pictures):
    """Makes a recipe with everything random in it: 2 epochs of 6 steps, changed by keywords."""

    def make(**changes) -> Recipe:
        values = dict(
            model="test_efficientnet",
            train=str(pictures / "train"),
            val=str(pictures / "val"),
            input_size=32,
            batch_size=4,
            epochs=2,
            lr=3e-3,
            mixup=0.2,
            cutmix=0.5,
            reprob=0.3,
            color_jitter=0.2,
            auto_augment="rand-m3-mstd0.5",
            drop_rate=0.2,
            drop_path_rate=0.1,
            ema_decay=0.9,
            workers=0,
            threads=1,
            warmup_epochs=0.5,
            log_every=2,
        )
        return Recipe(**{**values, **changes})

    return make
