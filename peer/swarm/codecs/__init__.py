"""Encodings of a gradient's chunks, one file a format."""
