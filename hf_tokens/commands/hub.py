"""An adapter's way to the Hub and back, by its files: nothing is loaded of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from ..errors import AdapterError, explain, first_line
from ..peft.card import README, SCRIPT
from ..peft.config import PEFT_METHOD, HFTokensConfig
from ..peft.doors import CONFIG
from ..roles.registry import method_info
from ..tools.loading import DENOISERS, FILES, OF_A_BASE, check_files
from .apply import describe
from .report import size_of

LOGIN = "Log in with `hf auth login`, and check the name and what your token may do."


def folders_of(folder: Path) -> list[Path]:
    """The folders of an adapter: itself, or one for each denoiser of a pipeline."""
    inner = [folder / name for name in DENOISERS if (folder / name / CONFIG).is_file()]
    return inner if inner and not (folder / CONFIG).is_file() else [folder]


def contents(folder: Path, name: str) -> dict[str, Any]:
    """What an adapter's files say: its base, its methods and its size.

    Raises:
        AdapterError: A file is missing or damaged.
        ConfigError: A method is not known here.
    """
    methods: list[dict[str, Any]] = []
    base: set[str | None] = set()
    for part in folders_of(folder):
        check_files(part, name)
        config = HFTokensConfig.from_pretrained(str(part))
        base.add(config.base_model_name_or_path)
        for method in config.methods:
            if method["method"] == PEFT_METHOD:
                kind = method["config"]["peft_type"]
                methods.append({"method": kind, "role": "PEFT", "does": f"PEFT's {kind}", "needs": "training", "config": method["config"]})
            else:
                methods.append({**describe(method_info(method["method"], method.get("version"))), "config": method})
    return {"adapter": name, "folder": str(folder), "base": next(iter(base)), "methods": methods, "bytes": size_of(folder)}


def push(folder: Path, repo: str, private: bool, message: str, token: str | None = None) -> dict[str, Any]:
    """Upload an adapter's files, and its card, to a repository that is made where there is none.

    Raises:
        AdapterError: The folder is no adapter, or the Hub refuses it.
    """
    if not folder.is_dir():
        remedy = "There is no such folder: check the path."
        raise AdapterError(explain("What is pushed is the folder of an adapter", repr(str(folder)), remedy))
    told = contents(folder, str(folder))
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=[*FILES, README, SCRIPT], commit_message=message)
    except HFValidationError as error:
        raise AdapterError(explain("A repository is named like owner/name", f"{repo!r}: {first_line(error)}", "Fix the name.")) from None
    except HfHubHTTPError as error:
        raise AdapterError(explain("The Hub must take what is pushed", f"{repo!r}: {first_line(error)}", LOGIN)) from error
    return {**told, "repository": repo, "commit": done.oid, "url": str(done.commit_url)}


def pull(repo: str, output: Path | None, revision: str | None, token: str | None = None) -> dict[str, Any]:
    """Download an adapter's files, and say what it is.

    Raises:
        AdapterError: There is no such adapter, it is damaged, or the Hub does not give it away.
        ConfigError: A method is not known here.
    """
    if Path(repo).is_dir():
        return contents(Path(repo), repo)
    try:
        wanted = [*FILES, README, *OF_A_BASE]
        found = snapshot_download(repo, revision=revision, token=token, local_dir=output, allow_patterns=wanted)
    except HFValidationError:
        rule = "An adapter is a folder or a Hub id like owner/name"
        raise AdapterError(explain(rule, repr(repo), "There is no such folder: check the path.")) from None
    except RevisionNotFoundError:
        rule = "A revision is a branch, a tag or a commit of the repository"
        raise AdapterError(explain(rule, f"{revision!r} of {repo}", "Leave it out for the newest, or fix the name.")) from None
    except RepositoryNotFoundError as error:
        raise AdapterError(explain("An adapter is a repository that is there and open to you", repr(repo), LOGIN)) from error
    return contents(Path(found), repo)
