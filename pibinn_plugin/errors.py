"""The errors a user of the plugin can cause, one class a cause."""


class PIBiNNError(ValueError):
    """Base class: ``except PIBiNNError`` catches everything the plugin refuses."""


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
