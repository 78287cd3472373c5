"""Versions of other libraries that stand between a test and what it tests. A skip ends by itself once a newer one is installed."""

import importlib.metadata

import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION


def needs(package: str, version: str, why: str) -> pytest.MarkDecorator:
    """Skip a test below a version of a package."""
    found = importlib.metadata.version(package)
    reason = f"{why}: un-skip when {package} >= {version} is installed, not {found}"
    return pytest.mark.skipif(Version(found) < Version(version), reason=reason)


TRANSFORMERS = importlib.metadata.version("transformers")
# for what goes through `add_adapter`, `set_adapter`, `disable_adapters`, `enable_adapters` or `delete_adapter` of a Transformers model
add_adapter = needs("peft", MIN_PEFT_VERSION, f"transformers {TRANSFORMERS} refuses to add or switch adapters with this peft, a LoRA too")
kernel_uploads = needs("huggingface-hub", "2.3", "this huggingface-hub uploads to no repository of kernels")
card_checks = needs("huggingface-hub", "2.2", "this huggingface-hub asks the public Hub whether a card is valid, whatever endpoint is set")
