"""`python -m hf_tokens_cli` is `hf-tokens`."""

from . import main

main()
