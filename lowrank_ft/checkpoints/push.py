"""Push a finished folder to the Hub."""

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub import errors as hub_errors

from lowrank_ft.checkpoints.companions import companions, is_own_file, matches
from lowrank_ft.checkpoints.files import check_adapter_file
from lowrank_ft.checkpoints.format import CONVERSION_FILE, PLACEHOLDER, RANK_MAP_FILE
from lowrank_ft.checkpoints.names import is_hub_id
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.console import human_bytes
from lowrank_ft.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    LowRankError,
    OutputError,
    first_line,
)

# Beside the companions, what this package and PEFT write. Whatever else lies in the folder stays there.
_WRITTEN = (
    "config.json", "README.md", CONVERSION_FILE, RANK_MAP_FILE, "training.png", "report.html", "lowrank_plugin.py",
    "model*.safetensors", "model.safetensors.index.json", "adapter_config.json", "adapter_model*.safetensors",
    "adapter_model.safetensors.index.json",
)  # fmt: skip
# What save_pretrained calls weights. Files of these names that an earlier push left would be loaded in their place.
_MODEL_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_ADAPTER = re.compile(r"adapter_config\.json|adapter_model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_ONNX = ("*.onnx", "*.onnx_data", "*.onnx.data")  # what browsers load, in a folder of that name
_TEXT_FILES = (".txt", ".md", ".json", ".jsonl", ".parquet")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Create the repository if need be and upload the folder: safetensors, ONNX, configs, tokenizer, loader, card.

    Anything else in it stays here: training checkpoints, pickles, and files that this package does not know. What is
    uploaded is listed on stderr before. In the repository, weights of an earlier push that have other names are deleted
    in the same commit, and named on stderr, too; nothing else is.

    Args:
        private: make a new repository private; one that is public already is refused.
        revision: branch to push to, made if there is none.
        create_pr: open a pull request against the default branch of a repository that exists.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ConfigError: ``create_pr`` together with ``revision`` or ``private``.
        CheckpointNotFoundError, CheckpointError: the folder is not a whole checkpoint.
        OutputError: the Hub refuses; or the repository is public, and ``private`` was asked for.
    """
    if create_pr and (private or revision is not None):
        given = "--private" if private else "--revision"
        raise ConfigError(
            "a pull request is opened against the default branch of a repository that exists; leave "
            f"{given} or --create-pr out"
        )
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder} is not a folder; push what convert or finetune wrote")
    if (folder / "adapter_config.json").is_file():
        check_adapter_file(folder)
    else:
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
        if not create_pr:  # a pull request is made to what is there
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.repo_info(repo_id).private:  # it was there before
                raise OutputError(
                    f"{repo_id} is public already, and --private is for a new repository; make it private in its settings on "
                    "the Hub, or leave --private out"
                )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as staged:
            _stage(folder, Path(staged), repo_id)
            names = {p.relative_to(staged).as_posix() for p in Path(staged).rglob("*") if p.is_file()}
            stale = _stale(names, api.list_repo_files(repo_id, revision=revision))
            _announce(folder, Path(staged), repo_id, names, stale)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
                delete_patterns=stale or None,
                revision=revision,
                commit_message=commit_message or "Upload low-rank model",
                create_pr=create_pr,
            )
    except LowRankError:
        raise
    except Exception as error:  # the Hub's, the disk's, or that of its HTTP library where there is no connection
        if create_pr and isinstance(error, hub_errors.RepositoryNotFoundError):
            raise OutputError(
                f"there is no {repo_id} on the Hub that your token may see, to open a pull request for; check the name, run "
                "hf auth login, or leave --create-pr out to make the repository"
            ) from error
        answered = isinstance(error, hub_errors.HfHubHTTPError | hub_errors.HFValidationError)
        remedy = "run hf auth login with a token that may write there" if answered else "check the connection"
        raise OutputError(f"pushing to {repo_id} failed: {first_line(error)}; {remedy}") from error
    return str(commit.pr_url or commit.commit_url)


def _stage(folder: Path, staged: Path, repo_id: str) -> None:
    """Links to what is to be published; config, card and record are rewritten for readers elsewhere."""
    names = companions(folder, _WRITTEN)
    for path in sorted((folder / "onnx").glob("*")):
        if matches(path.name, _ONNX) and is_own_file(path, folder):
            names.append(f"onnx/{path.name}")
    for name in names:
        if name not in ("config.json", "README.md", "adapter_config.json", CONVERSION_FILE):
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).symlink_to((folder / name).resolve())
    local = _strip_adapter(folder, staged) if "adapter_config.json" in names else None
    if "README.md" in names:
        card = (folder / "README.md").read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id)
        (staged / "README.md").write_text(card if local is None else _without_local(card, local), encoding="utf-8")
    base = None
    if "config.json" in names:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        entry = config.get("quantization_config")
        if isinstance(entry, dict):
            if is_hub_id(entry.get("base_model")):
                base = entry["base_model"]
            else:
                entry.pop("base_model", None)
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if CONVERSION_FILE in names:
        record = _public_record((folder / CONVERSION_FILE).read_text(encoding="utf-8"), base)
        if record is not None:
            (staged / CONVERSION_FILE).write_text(record, encoding="utf-8")


def _without_local(card: str, local: str) -> str:
    """The card of an adapter whose base model is a folder here: not in its header, and without the path in its text."""
    found = ModelCard(card, ignore_metadata_errors=True)
    header: Any = found.data
    if header.base_model == local:
        header.base_model = None
    header.tags = [t for t in header.tags or () if not t.endswith(f":{local}")] or None
    if len(Path(local).parts) > 1:  # a single word may mean anything
        found.text = re.sub(rf"(?<![\w.-]){re.escape(local)}(?![\w-])", lambda _: Path(local).name, found.text)
    return str(found) if card.startswith("---") else found.text


def _strip_adapter(folder: Path, staged: Path) -> str | None:
    """Write ``adapter_config.json`` without a base model that is a folder here; returns that folder's name."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    local = base if base and not is_hub_id(base) else None
    if local is not None:
        config["base_model_name_or_path"] = None
    (staged / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return local


def _stale(names: set[str], present: list[str]) -> list[str]:
    """The files of a repository that loaders would read in place of the weights in ``names``, or together with them.

    transformers prefers a single file to shards, and an adapter to the model beside it. The base model beside an adapter
    stays, because it may be what the adapter belongs to.
    """
    kinds = [_ADAPTER] if "adapter_config.json" in names else [_MODEL_WEIGHTS, _ADAPTER]
    return sorted(n for n in present if n not in names and any(kind.fullmatch(n) for kind in kinds))


def _announce(folder: Path, staged: Path, repo_id: str, names: set[str], stale: list[str]) -> None:
    print(f"uploading to {repo_id}:", file=sys.stderr)
    for name in sorted(names):
        print(f"  {name}  {human_bytes((staged / name).stat().st_size)}", file=sys.stderr)
    if stale:
        print(f"deleting there, because they are of an earlier push: {', '.join(stale)}", file=sys.stderr)
    left = sorted(p.name for p in folder.iterdir() if not any(n.split("/")[0] == p.name for n in names))
    if left:
        print(f"not uploaded: {', '.join(left)}", file=sys.stderr)


def _public_record(text: str, base: str | None) -> str | None:
    """``conversion.json`` without local paths; None where it is damaged, which keeps it here.

    Args:
        base: the dense model, if that is on the Hub. The record has the last part of a path, which may look like a Hub id.
    """
    try:
        record = json.loads(text)
        if base is None or record.get("base_model") != base:
            record.pop("base_model", None)
        calibration = record.get("calibration") or {}
        if calibration.get("source"):
            calibration["source"] = ", ".join(map(_public_source, calibration["source"].split(", ")))
    except (ValueError, AttributeError, TypeError):
        return None
    return json.dumps(record) + "\n"


def _public_source(name: str) -> str:
    """What calibration data are called in public: a local file or folder by the last part of its path."""
    path = Path(name)
    return path.name if path.suffix.lower() in _TEXT_FILES or not is_hub_id(name) else name
