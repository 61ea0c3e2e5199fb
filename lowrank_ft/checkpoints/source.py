"""Where a model comes from: a local folder or the Hub, checked before anything large is read.

Safetensors only. Remote code only where the caller says so.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from lowrank_ft.checkpoints.adapters import ADAPTER_CONFIG, check_adapter
from lowrank_ft.checkpoints.configs import read_config_file, refused
from lowrank_ft.checkpoints.files import TensorInfo, no_safetensors, read_headers, safetensors_files
from lowrank_ft.checkpoints.names import check_model_name, local_folder, near_miss
from lowrank_ft.errors import CheckpointError, CheckpointNotFoundError, LowRankError, first_line

_DATA_FILES = (
    "*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "vocab.bpe", "bpe.codes", "LICENSE*",
    "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*", "README.md",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model by name: a local folder, or a Hub id with a revision.

    Attributes:
        name: folder or Hub id, as the user gave it.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run Python code that the checkpoint brings.
        token: Hub token; None means the stored one.
        adapter: merge the PEFT adapter that lies beside the weights; without this, such a checkpoint is refused.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    token: str | None = None
    adapter: bool = False

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a Hub id."""
        return local_folder(self.name)

    @property
    def title(self) -> str:
        """The Hub id, or what the local folder is called, without the path to it."""
        return self.name if self.folder is None else self.folder.resolve().name

    def load_config(self) -> Any:
        """The transformers config.

        Raises:
            CheckpointNotFoundError: no such folder or repository, or it has no ``config.json``.
            CheckpointError: ``config.json`` is not readable, or of an unknown model type.
        """
        path = self._require_config_file()
        fields = read_config_file(path, self._shapes)
        where = self.name if self.folder is None else path
        try:
            return AutoConfig.from_pretrained(
                os.path.expanduser(self.name),
                revision=self.revision,
                token=self.token,
                trust_remote_code=self.trust_remote_code,
            )
        except Exception as error:  # each class of transformers checks in its own way, or not at all
            if fields.get("model_type") not in CONFIG_MAPPING:
                raise CheckpointError(f"{where}: {first_line(error)}") from error
            kind = CONFIG_MAPPING[fields["model_type"]]
            raise CheckpointError(refused(where, fields, lambda some: kind.from_dict(dict(some)), error)) from error

    def tensors(self) -> dict[str, TensorInfo]:
        """Name, dtype and shape of every tensor, read from the safetensors headers alone.

        Raises:
            CheckpointNotFoundError: no such folder or repository.
            CheckpointError: a file is missing, truncated or corrupt, or there are only pickles.
        """
        return self._headers_on_hub if self.folder is None else read_headers(self.folder)

    def download(self) -> Path:
        """The local folder; a Hub model is downloaded first (safetensors, configs and tokenizer; no pickles).

        Where the Hub cannot be reached, it is the folder in the Hub's local cache, as for transformers.

        Raises:
            CheckpointNotFoundError, CheckpointError: as :meth:`tensors`.
        """
        return self._downloaded if self.folder is None else self.folder

    @cached_property
    def _downloaded(self) -> Path:
        self.tensors()  # refuses pickle-only repositories before gigabytes move
        patterns = [*_DATA_FILES, *(["*.py"] if self.trust_remote_code else [])]

        def download() -> str:
            return snapshot_download(
                self.name,
                revision=self.revision,
                token=self.token,
                allow_patterns=patterns,
                # these hold the same weights a second time
                ignore_patterns=["original/*", "consolidated*", "onnx/*"],
            )

        try:
            return Path(self._remote(download))
        except _HubUnreachableError as error:
            # The cache may have all that is needed and not every file of the repository.
            return self._cached_folder(error)

    def check_adapter(self) -> None:
        """Look for an adapter beside the weights, before those are read.

        Raises:
            CheckpointNotFoundError: the name can only be that of a folder, and there is none.
            CheckpointError: there is one and ``adapter`` is not set, or the other way round.
        """
        check_model_name(self.name)
        if self.folder is not None:
            found = (self.folder / ADAPTER_CONFIG).is_file()
        else:
            try:
                hf_hub_download(self.name, ADAPTER_CONFIG, revision=self.revision, token=self.token)
                found = True
            except (OSError, hub_errors.HfHubHTTPError):  # none, or offline: what comes of the cache is looked at, too
                found = False
        check_adapter(self.name, found, self.adapter)

    def load_tokenizer(self, alone: bool = False) -> Any:
        """The checkpoint's tokenizer.

        Args:
            alone: the model is not needed, and of a repository on the Hub is not downloaded.

        Raises:
            CheckpointError: it has none, or one that transformers cannot read.
        """
        try:
            if alone and self.folder is None:
                return AutoTokenizer.from_pretrained(
                    self.name, revision=self.revision, token=self.token, trust_remote_code=self.trust_remote_code
                )
            folder = self.download()
            if (folder / "config.json").is_file():  # transformers looks into it, too
                read_config_file(folder / "config.json", self._shapes)
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=self.trust_remote_code)
        except LowRankError:
            raise
        except BaseException as error:  # whatever its class raises; a panic in Rust is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(
                f"{self.name} has no tokenizer that loads ({first_line(error)}); copy tokenizer.json and "
                "tokenizer_config.json of its base model into the folder"
            ) from error

    def load_preprocessor(self, model: PreTrainedModel) -> Any:
        """What turns the model's raw input into tensors: its image processor, or its tokenizer.

        Raises:
            CheckpointError: it has none, or one that transformers cannot read.
        """
        if model.main_input_name != "pixel_values":
            return self.load_tokenizer()
        try:
            return AutoImageProcessor.from_pretrained(str(self.download()), trust_remote_code=self.trust_remote_code)
        except Exception as error:  # whatever its class raises
            raise CheckpointError(f"{self.name} has no image processor that loads ({first_line(error)})") from error

    def _shapes(self) -> list[tuple[int, ...]]:
        """Of the tensors, to compare a config with; none where there are no weights."""
        try:
            return [info.shape for info in self.tensors().values()]
        except LowRankError:
            return []

    def _require_config_file(self) -> Path:
        """The local path of ``config.json``; that of a model on the Hub is downloaded."""
        folder = check_model_name(self.name)
        if folder is not None:
            return folder / "config.json"
        return Path(
            self._remote(lambda: hf_hub_download(self.name, "config.json", revision=self.revision, token=self.token))
        )

    @cached_property
    def _headers_on_hub(self) -> dict[str, TensorInfo]:
        api = HfApi(token=self.token)
        try:
            metadata = self._remote(lambda: api.get_safetensors_metadata(self.name, revision=self.revision))
        except hub_errors.NotASafetensorsRepoError:
            files = self._remote(lambda: api.list_repo_files(self.name, revision=self.revision))
            raise no_safetensors(self.name, files) from None
        except _HubUnreachableError as error:
            return Source(str(self._cached_folder(error))).tensors()
        return {
            name: TensorInfo(info.dtype, tuple(info.shape))
            for file in metadata.files_metadata.values()
            for name, info in file.tensors.items()
        }

    def _cached_folder(self, unreachable: "_HubUnreachableError") -> Path:
        """Where the Hub's local cache has the model with all its weights.

        Raises:
            CheckpointNotFoundError: it has none of it, or only a part.
        """
        config = try_to_load_from_cache(self.name, "config.json", revision=self.revision)
        if not isinstance(config, str):
            raise unreachable
        folder = Path(config).parent
        try:
            safetensors_files(folder)
        except CheckpointError as error:
            raise CheckpointNotFoundError(
                f"{self.name} is not whole in the Hub's local cache ({folder}), and the Hub cannot be reached; "
                "check the connection, and that HF_HUB_OFFLINE is not set"
            ) from error
        return folder

    def _remote(self, call: Any) -> Any:
        try:
            return call()
        except hub_errors.GatedRepoError as error:
            raise CheckpointNotFoundError(
                f"{self.name} is gated; accept its licence on its Hub page, then run hf auth login"
            ) from error
        except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
            raise CheckpointNotFoundError(
                f"{self.name} is neither a folder here nor a model on the Hub{near_miss(self.name)}; check the spelling, "
                "and run hf auth login if it is private"
            ) from error
        except hub_errors.RevisionNotFoundError as error:
            raise CheckpointNotFoundError(f"{self.name} has no revision {self.revision!r} on the Hub") from error
        except hub_errors.LocalEntryNotFoundError as error:
            raise _HubUnreachableError(
                f"{self.name} is no folder here, and the Hub cannot be reached{near_miss(self.name)}; check the path or the "
                "connection"
            ) from error
        except hub_errors.EntryNotFoundError as error:
            raise CheckpointNotFoundError(f"{self.name} has no config.json; it is not a transformers model") from error
        except hub_errors.NotASafetensorsRepoError:
            raise
        except Exception as error:  # offline mode, a failing Hub, or whatever the client's HTTP library raises
            raise _HubUnreachableError(
                f"{self.name}: the Hub cannot be read ({first_line(error)}){near_miss(self.name)}"
            ) from error


class _HubUnreachableError(CheckpointNotFoundError):
    """The Hub gave no answer, which its local cache may have."""
