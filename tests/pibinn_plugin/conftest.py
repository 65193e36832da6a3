"""What the tests of the plugin share."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("pibinn", deadline=None, max_examples=40)
settings.load_profile("pibinn")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """What a test makes the compiler give up on stays with the test."""
    yield
    torch._dynamo.reset()
