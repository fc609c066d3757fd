"""Models on the Hugging Face hub, in the cache that its own tools use."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from tokenrelay.model.weights.errors import ModelSourceError

_FILES = ["*.json", "*.safetensors", "*.jinja"]


def fetch(repo_id: str) -> Path:
    """The model's folder, downloaded if need be. Raises ModelSourceError, saying what to do."""
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=_FILES))
    except GatedRepoError as error:
        raise ModelSourceError(f"{repo_id} has terms to accept: do so on its page, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelSourceError(f"the hub has no public model {repo_id}; if it is private, `hf auth login`") from error
    except OSError as error:  # the hub's own errors are OSErrors too
        raise ModelSourceError(
            f"cannot fetch {repo_id} from the hub ({type(error).__name__}: {error}); "
            "check the connection and HF_HUB_OFFLINE, or name a local folder or GGUF file"
        ) from error
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"{repo_id} has no config.json: it is not a transformers model")
    return folder
