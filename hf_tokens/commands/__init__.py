"""What `hf-tokens` and `make` run: none of it is needed to use the library from Python."""
