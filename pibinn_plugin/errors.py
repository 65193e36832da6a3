"""The errors a user of the plugin can cause, one class a cause."""

_LONGEST = 1000  # characters: a file may hold names and shapes of any length


class PIBiNNError(ValueError):
    """Base class: ``except PIBiNNError`` catches everything the plugin refuses.

    Args:
        message: what was given, what was expected and what to do. It becomes one line, cut in the middle beyond 1000
            characters.

    Example:
        >>> message = str(PIBiNNError(f"a name of {'x' * 5000} is too long"))
        >>> message[:14], message[-16:], len(message)
        ('a name of xxxx', 'xxxx is too long', 999)
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        half = (_LONGEST - 5) // 2
        super().__init__(line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}")


class StructureError(PIBiNNError):
    """A structure that is malformed, or that does not fit the shape of its weight."""


class TargetError(PIBiNNError):
    """A target of ``prepare`` that does not exist or cannot be quantized where it stands."""


class ScaleError(PIBiNNError):
    """The global scale is missing, doubled, not finite or not positive."""


class ArtifactError(PIBiNNError):
    """A packed file that is damaged, or that does not belong to the model it is loaded into."""


class ExportError(PIBiNNError):
    """A network that a format cannot hold, or an exported file that does not compute what the network computes."""
