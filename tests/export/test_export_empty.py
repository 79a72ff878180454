"""A batch of no images: which files run it, and that the documentation names those that do not."""

import numpy as np
import pytest
from small import PAIRS, SIZE

import parameternet.export
from parameternet.export import export


@pytest.mark.parametrize("format, form", PAIRS)
def test_an_empty_batch(exported, format, form):
    empty = np.zeros((0, *SIZE), np.float32)
    run = exported(format, form).run
    if form != "looped":
        assert np.asarray(run(empty)[0]).shape == (0, 7)
        return
    with pytest.raises(Exception):  # noqa: B017  each runtime has its own
        run(empty)
    assert "Skip empty batches" in parameternet.export.__doc__
    assert "at least 1 in files of form 'looped'" in export.__doc__
