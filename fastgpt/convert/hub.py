"""The Hugging Face Hub through huggingface_hub: download a model at one commit, upload a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastgpt.core.errors import UserError
from fastgpt.core.hub import hub, reason

# names at the top of a repository, so that further copies of the weights, like consolidated.safetensors, are left out
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
OLD_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def download(
    name: str, revision: str, others: Sequence[str], *, what: str = "import", weights: bool = True
) -> tuple[Path, str]:
    """Download the weights of a model and the files `others`, or take them from huggingface_hub's cache.

    If a connection breaks, the download of the file continues; files that came whole are not downloaded again.

    Args:
        what: the command or the setting, for errors.
        weights: False downloads `others` only.

    Returns:
        The folder, and the commit that `revision` (a branch, tag or commit) names.

    Raises:
        UserError: huggingface_hub is not installed, or there is no such model, no access to it, or no network.
    """
    api = hub(f"{what}: {name}, a model of the hub,")
    try:
        some = [*WEIGHTS, *others] if weights else list(others)
        folder = Path(api.snapshot_download(name, revision=revision, allow_patterns=some))
        if weights and not any((folder / w).is_file() for w in (WEIGHTS[0], WEIGHTS[-1])):
            folder = Path(api.snapshot_download(name, revision=folder.name, allow_patterns=[*OLD_WEIGHTS, *others]))
    except Exception as e:  # the hub's errors have no common class
        raise UserError(f"{what}: {name} is not a folder, and {reason(e, name, revision)}") from e
    return folder, folder.name


def upload(folder: Path, name: str) -> str:
    """Upload a folder as a private model; return the address of the commit.

    Raises:
        UserError: huggingface_hub is not installed, or the upload fails.
    """
    api = hub("--push").HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        return str(api.upload_folder(folder_path=str(folder), repo_id=name))
    except Exception as e:  # the hub's errors have no common class
        raise UserError(f"export: {name} was not uploaded, because {reason(e, name)}; {folder} is complete") from e
