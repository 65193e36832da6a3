"""What the tests of the plugin share."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("pibinn", deadline=None, max_examples=40)
settings.load_profile("pibinn")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
