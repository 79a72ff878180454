"""Other people's libraries on our networks. They live in an environment of their own: `pip install -e '.[clients]'`."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)
