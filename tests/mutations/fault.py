"""A fault to plant, and the tests that should fail of it."""

from dataclasses import dataclass

PLUGIN, TESTS = "pibinn_plugin", "tests/pibinn_plugin"


@dataclass(frozen=True)
class Fault:
    """One piece of text of a file of the plugin replaced by another.

    Args:
        file: below ``pibinn_plugin/``.
        original: text that is in the file exactly once.
        replaced: what stands there instead.
        tests: names of test files without ``test_`` and ``.py``, or arguments of pytest.
        harmless: why no test can fail of it; such a fault may stay alive.
    """

    file: str
    original: str
    replaced: str
    tests: str
    harmless: str = ""

    @property
    def path(self) -> str:
        """From the root of the project."""
        return f"{PLUGIN}/{self.file}"

    @property
    def arguments(self) -> list[str]:
        """Of pytest."""
        return [word if "/" in word or word[0] == "-" else _test_file(word) for word in self.tests.split()]


def _test_file(word: str) -> str:
    name, separator, test = word.partition("::")
    return f"{TESTS}/test_{name}.py{separator}{test}"
