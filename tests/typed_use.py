"""What a type checker knows of a user's script. `make check` runs pyright on it; a mistake that pyright does not see is an error, too."""

# pyright: standard, reportUnnecessaryTypeIgnoreComment=true

import dataclasses

import hf_tokens
from hf_tokens import FTP, FTPConfig, MethodConfig, PrefixKVConfig, TokenRouter, get_token_model

config = FTPConfig(sparsity=0.3, strict=True, layers=(0, 1))
sparsity: float = dataclasses.replace(config, sparsity=0.1).sparsity
stack: list[MethodConfig] = [config, PrefixKVConfig(budget=0.4)]
router: type[TokenRouter] = FTP


def operate(model: object) -> object:
    return get_token_model(model, stack)


def mistakes() -> None:
    FTPConfig(sparsty=0.3)  # pyright: ignore[reportCallIssue]
    FTPConfig(sparsity="most")  # pyright: ignore[reportArgumentType]
    config.sparsity = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    print(hf_tokens.FTPConfg)  # pyright: ignore[reportAttributeAccessIssue]
