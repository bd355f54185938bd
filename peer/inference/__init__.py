"""The trained model: load a version, talk to it, export it."""
