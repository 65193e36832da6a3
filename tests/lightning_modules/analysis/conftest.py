"""What the tests of the analysis share."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("analysis", deadline=None, max_examples=40)
settings.load_profile("analysis")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
