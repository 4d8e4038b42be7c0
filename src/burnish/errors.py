"""The errors a caller may want to catch. Each message is one line: what was seen, what was expected, what to do."""


class BurnishError(Exception):
    """Base of every error that burnish raises on purpose; the command prints it as one line and exits with 1."""


class CheckpointError(BurnishError):
    """A checkpoint is missing, truncated, corrupt or not what its index says; the message names file and tensor."""


class UnsupportedModelError(BurnishError):
    """The model is of no known family, already dense, or stored in a form that cannot be read."""


class ResumeMismatchError(BurnishError):
    """Unfinished work lies beside the output, but it belongs to other inputs or options."""


class OutputError(BurnishError):
    """The output cannot be written: it exists already, the disk is full, or a written file failed verification."""


class DataError(BurnishError):
    """A text or preference file cannot be used; the message names file, row and column."""


class TrainingError(BurnishError):
    """Training cannot go on, because its loss or gradient is no longer a number; names the last good checkpoint."""


class LabelsNeededError(BurnishError):
    """The work stops here until somebody has written labels; the message says which file, and how to go on."""
