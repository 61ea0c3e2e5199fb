"""Push a finished folder to the Hub."""

import json
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors

from lowrank_ft.checkpoints.format import CONVERSION_FILE, PLACEHOLDER
from lowrank_ft.checkpoints.source import RUN_FILE, Source, is_hub_id
from lowrank_ft.errors import CheckpointError, CheckpointNotFoundError, OutputError, first_line

_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_NOT_FOR_THE_HUB = [*_UNSAFE, ".*", "*/.*"]
_OF_THE_RUN = ("checkpoints", RUN_FILE, "metrics.jsonl")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Create the repository if need be and upload the folder: safetensors, configs, tokenizer, loader, card.

    Training checkpoints and pickles inside it stay here.

    Returns:
        The address of the commit.

    Raises:
        CheckpointNotFoundError, CheckpointError: the folder is not a whole checkpoint.
        OutputError: the Hub refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder} is not a folder; push what convert or finetune wrote")
    if not (folder / "adapter_config.json").is_file():
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise CheckpointNotFoundError(f"{folder} has no config.json; push what convert or finetune wrote")
        try:
            json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{config_file} is no valid JSON: {error}") from error
        Source(str(folder)).tensors()
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as staged:
            _stage(folder, Path(staged), repo_id)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
                revision=revision,
                commit_message=commit_message or "Upload low-rank model",
                ignore_patterns=_NOT_FOR_THE_HUB,
            )
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        raise OutputError(
            f"pushing to {repo_id} failed: {first_line(error)}; run hf auth login with a token that may write there"
        ) from error
    return str(commit.commit_url)


def _stage(folder: Path, staged: Path, repo_id: str) -> None:
    """Links to what is to be published; config, card and record are rewritten for readers elsewhere."""
    for path in folder.iterdir():
        if path.name not in (*_OF_THE_RUN, "config.json", "README.md", CONVERSION_FILE):
            (staged / path.name).symlink_to(path.resolve())
    if (folder / "README.md").is_file():
        card = (folder / "README.md").read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id)
        (staged / "README.md").write_text(card, encoding="utf-8")
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        entry = config.get("quantization_config")
        if isinstance(entry, dict) and not is_hub_id(entry.get("base_model")):
            entry.pop("base_model", None)
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (folder / CONVERSION_FILE).is_file():
        record = _public_record((folder / CONVERSION_FILE).read_text(encoding="utf-8"))
        if record is not None:
            (staged / CONVERSION_FILE).write_text(record, encoding="utf-8")


def _public_record(text: str) -> str | None:
    """``conversion.json`` without local paths; None where it is damaged, which keeps it here."""
    try:
        record = json.loads(text)
        if not is_hub_id(record.get("base_model")):
            record.pop("base_model", None)
        calibration = record.get("calibration") or {}
        if Path(calibration.get("source") or "").is_absolute():
            calibration["source"] = Path(calibration["source"]).name
    except (ValueError, AttributeError, TypeError):
        return None
    return json.dumps(record) + "\n"
