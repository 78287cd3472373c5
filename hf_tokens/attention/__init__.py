"""The attention call, and the registered functions that tap it."""
