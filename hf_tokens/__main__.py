"""`python -m hf_tokens` is `hf-tokens`, for launchers that start modules: `accelerate launch -m hf_tokens train recipe.yaml`."""

from hf_tokens_cli import main

if __name__ == "__main__":
    main()
