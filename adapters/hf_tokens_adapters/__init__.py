"""The built-in methods of hf-tokens: one file, one paper, one verb."""
