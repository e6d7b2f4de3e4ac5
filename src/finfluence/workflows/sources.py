"""Files of training data: reading them, hashing their rows, writing a chosen part back in the file's own form."""

from finfluence.runs.sources import Source, SourceRows, read_source, row_hash, source_format

__all__ = ["Source", "SourceRows", "read_source", "row_hash", "source_format"]
