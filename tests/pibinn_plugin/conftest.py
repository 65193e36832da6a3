"""What the tests of the plugin share."""

import sys

import pytest
import torch
from hypothesis import settings

settings.register_profile("pibinn", deadline=None, max_examples=40)
settings.load_profile("pibinn")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """The compiler counts how often it compiles a function, such as ``nn.Module.forward``, and gives up at a limit."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture
def threads_as_before():
    """For tests that set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
