"""Command lines are built hundreds of times: what jsonargparse reads in the source of a class, it reads once."""

import functools

import jsonargparse._signatures as signatures
import pytest


@pytest.fixture(scope="session", autouse=True)
def _signatures_are_read_once():
    """Half of the time of a command line; the parameters of a class do not change while tests run."""
    read = functools.cache(signatures.get_signature_parameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signatures, "get_signature_parameters", lambda *args, **options: list(read(*args, **options)))
        yield
