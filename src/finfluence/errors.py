"""The exceptions and warnings that finfluence raises, all under one base class each.

Every message says what was wrong, the value that was seen and what to do. The command line catches
`FinfluenceError` once, prints its message on one line and exits with status 2.
"""


class FinfluenceError(Exception):
    """Base of every error that finfluence raises on purpose."""


class InputError(FinfluenceError, ValueError):
    """An argument, a file or an identifier given by the caller cannot be used."""


class StoreError(FinfluenceError):
    """A run directory cannot be read or written: foreign, truncated, existing, unfinished or out of space."""


class RecordingError(FinfluenceError):
    """A training run cannot be recorded correctly: unsupported module, optimizer, batch layout or a non-finite loss."""


class ReplayError(FinfluenceError):
    """A recorded run cannot be replayed: its re-execution differs, or the adjoint diverges."""


class OracleError(FinfluenceError):
    """Retraining cannot give a truth: deterministic training, too few finished runs, unsupported executor."""


class FinfluenceWarning(UserWarning):
    """Something that does not stop the work but makes its figures less trustworthy; the message says what to do."""
