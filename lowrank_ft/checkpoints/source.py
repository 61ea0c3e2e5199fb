"""Where a model comes from: a local folder or the Hub, checked before anything large is read.

Safetensors only. Remote code only where the caller says so.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from lowrank_ft.checkpoints.adapters import ADAPTER_CONFIG, check_adapter, merge_adapter, without_adapter
from lowrank_ft.checkpoints.configs import in_one_line, read_config_file, refused
from lowrank_ft.checkpoints.format import QUANT_METHOD
from lowrank_ft.errors import CheckpointError, CheckpointNotFoundError, LowRankError, NonFiniteError, first_line
from lowrank_ft.reading import kind_of, read_object

INDEX_FILE = "model.safetensors.index.json"
RUN_FILE = "run.json"
"""Beside the records of a training run: what an export of one of its checkpoints has to know."""
_DATA_FILES = (
    "*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "LICENSE*", "LICENCE*", "NOTICE*",
    "USE_POLICY*", "COPYING*", "README.md",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HOW_TO_CONVERT_PICKLE = (
    "load it once with AutoModel.from_pretrained(..., use_safetensors=False) in an environment that you trust, "
    "then model.save_pretrained(folder) writes safetensors"
)


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
        path = Path(self.name).expanduser()
        return path if os.path.isdir(path) else None  # False also for a name that is too long

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

    def tensors(self) -> dict[str, "TensorInfo"]:
        """Name, dtype and shape of every tensor, read from the safetensors headers alone.

        Raises:
            CheckpointNotFoundError: no such folder or repository.
            CheckpointError: a file is missing, truncated or corrupt, or there are only pickles.
        """
        if self.folder is None:
            return self._remote_tensors()
        tensors: dict[str, TensorInfo] = {}
        for file in safetensors_files(self.folder):
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                        view = handle.get_slice(name)
                        tensors[name] = TensorInfo(view.get_dtype(), tuple(view.get_shape()))
            except Exception as error:  # safetensors' own, or of a type of numbers that torch does not know
                raise CheckpointError(
                    f"{file} is truncated or corrupt ({first_line(error)}); download it again or restore it from a backup"
                ) from error
        return tensors

    def download(self) -> Path:
        """The local folder; a Hub model is downloaded first (safetensors, configs and tokenizer; no pickles).

        Where the Hub cannot be reached, it is the folder in the Hub's local cache, as for transformers.

        Raises:
            CheckpointNotFoundError, CheckpointError: as :meth:`tensors`.
        """
        if self.folder is not None:
            return self.folder
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
            CheckpointError: there is one and ``adapter`` is not set, or the other way round.
        """
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
        if not _is_utf8(self.name):
            raise CheckpointNotFoundError(
                f"the name {self.name[:60]!r} is not UTF-8, which safetensors needs; rename the folder"
            )
        if self.folder is not None:
            path = self.folder / "config.json"
            if not path.is_file():
                found = ", ".join(sorted(p.name for p in self.folder.iterdir())[:5]) or "nothing"
                raise CheckpointNotFoundError(f"{self.folder} has no config.json (found {found}); name a model folder")
            return path
        path = Path(self.name).expanduser()
        if os.path.isfile(path):
            remedy = "name the folder of the model, or its Hub id"
            if path.suffix.lower() == ".gguf":
                remedy = f"make a dense checkpoint of it first: lowrank-ft merge {path.name} --output-dir FOLDER"
            raise CheckpointNotFoundError(f"{path} is a file; {remedy}")
        # A Hub id is `model` or `name/model`; anything else, or a name below a folder that exists, means a path.
        looks_local = self.name.startswith((".", "/", "~")) or len(path.parts) > 2
        if looks_local or (len(path.parts) == 2 and path.parent.is_dir()):
            raise CheckpointNotFoundError(f"there is no folder {path}; check the path, or give a Hub id (name/model)")
        return Path(
            self._remote(lambda: hf_hub_download(self.name, "config.json", revision=self.revision, token=self.token))
        )

    def _remote_tensors(self) -> dict[str, "TensorInfo"]:
        api = HfApi(token=self.token)
        try:
            metadata = self._remote(lambda: api.get_safetensors_metadata(self.name, revision=self.revision))
        except hub_errors.NotASafetensorsRepoError:
            files = api.list_repo_files(self.name, revision=self.revision)
            raise _no_safetensors(self.name, files) from None
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
                f"{self.name} is neither a folder here nor a model on the Hub; check the spelling, "
                "and run hf auth login if it is private"
            ) from error
        except hub_errors.RevisionNotFoundError as error:
            raise CheckpointNotFoundError(f"{self.name} has no revision {self.revision!r} on the Hub") from error
        except hub_errors.LocalEntryNotFoundError as error:
            raise _HubUnreachableError(
                f"{self.name} is no folder here, and the Hub cannot be reached; check the path or the connection"
            ) from error
        except hub_errors.EntryNotFoundError as error:
            raise CheckpointNotFoundError(f"{self.name} has no config.json; it is not a transformers model") from error
        except hub_errors.NotASafetensorsRepoError:
            raise
        except Exception as error:  # offline mode, a failing Hub, or whatever the client's HTTP library raises
            raise _HubUnreachableError(f"{self.name}: the Hub cannot be read ({first_line(error)})") from error


class _HubUnreachableError(CheckpointNotFoundError):
    """The Hub gave no answer, which its local cache may have."""


def _is_utf8(name: str) -> bool:
    """Whether a name can be written as UTF-8; that of a folder may hold any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_hub_id(name: str | None) -> bool:
    """Whether a name can be one on the Hub, and is no folder here, which would mean nothing to anybody else."""
    return bool(name) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name or "") is not None and not Path(name or "").exists()


@dataclass(frozen=True)
class TensorInfo:
    """``dtype`` in safetensors' spelling (``BF16``) and ``shape``."""

    dtype: str
    shape: tuple[int, ...]


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a local checkpoint, all of them present.

    Raises:
        CheckpointError: none, only pickles, or a shard that the index names is missing.
    """
    index, single = folder / INDEX_FILE, folder / "model.safetensors"
    if index.is_file():
        names = _indexed_files(index)
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {missing[0]}, which its index names; download it again")
        return [folder / n for n in names]
    if single.is_file():
        return [single]
    raise _no_safetensors(str(folder), [p.name for p in folder.iterdir()])


def _indexed_files(index: Path) -> list[str]:
    """The files that an index names, each beside it."""
    table = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(
            f"{index}: weight_map is {kind_of(table)}; it must be an object that names a file per tensor"
        )
    for tensor, file in table.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or re.search(r"[/\\\x00]", file):
            raise CheckpointError(
                f"{index}: weight_map names {file!r} for {tensor}; it must be a .safetensors file in the same folder"
            )
    return sorted(set(table.values()))


def is_compact(config: Any) -> bool:
    """Whether a transformers config describes a checkpoint of this package."""
    entry = getattr(config, "quantization_config", None)
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    return method == QUANT_METHOD


def refuse_quantized(config: Any, name: str) -> None:
    """Raise a CheckpointError where another method has packed the weights of a checkpoint."""
    entry = getattr(config, "quantization_config", None)
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    if method is not None and method != QUANT_METHOD:
        raise CheckpointError(
            f"{name} is quantized ({getattr(method, 'value', method)}), and its weights are no matrices to factorize; "
            "name the model that it was quantized from, or dequantize it first"
        )


def model_class(config: Any, name: str, trust_remote_code: bool = False) -> Any:
    """The class to load a checkpoint with: the one that it was saved from, else the bare ``AutoModel``."""
    architecture = (getattr(config, "architectures", None) or [None])[0]
    if architecture and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code:
        for auto_class, reference in auto_map.items():
            if architecture and str(reference).endswith(f".{architecture}"):
                return getattr(transformers, auto_class)
    elif any(k.startswith("AutoModel") for k in auto_map):
        raise CheckpointError(
            f"{name} needs its own Python code ({architecture}); add --trust-remote-code if you trust its author"
        )
    return transformers.AutoModel


def writes_text(config: Any) -> bool:
    """Whether the checkpoint is a causal language model."""
    architecture = (getattr(config, "architectures", None) or ["none"])[0]
    return bool(architecture.endswith(("ForCausalLM", "LMHeadModel")))


def check_causal_lm(config: Any, source: Source) -> None:
    """Raise a CheckpointError unless the checkpoint is a causal language model, the kind that is fine-tuned here."""
    architecture = (getattr(config, "architectures", None) or ["none"])[0]
    if not writes_text(config):
        raise CheckpointError(
            f"{source.name} is a {architecture}, and this trains causal language models; convert it without "
            "fine-tuning, or train it in your own loop (lowrank_ft.convert, get_peft_model)"
        )


def skeleton(config: Any, name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device: all modules and shapes, no weights."""
    cls = model_class(config, name, trust_remote_code)

    def build(some: Any) -> PreTrainedModel:
        with torch.device("meta"):
            if hasattr(cls, "from_config"):
                return cls.from_config(some, trust_remote_code=trust_remote_code)
            return cls(some)

    try:
        return build(config)
    except Exception as error:  # a value that does not fit is found wherever it is used first
        fields = config.to_diff_dict()
        message = refused(f"{name}: config.json", fields, lambda some: build(type(config).from_dict(some)), error)
        raise CheckpointError(message) from error


def check_fits(model: torch.nn.Module, tensors: dict[str, "TensorInfo"], where: str) -> None:
    """Compare a model that was built from its config with the headers of the weights, where their names are the same.

    A field that the config lacks has a default, so a model can be built that the weights do not belong to.

    Raises:
        CheckpointError: a weight has another shape, or is missing.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not tensors or not tensors.keys() <= own.keys():  # renamed while it is loaded, or packed by a quantizer
        return
    for name, info in tensors.items():
        if own[name] != info.shape:
            raise CheckpointError(
                f"{where}: config.json describes {name} as {own[name]}, and the weights have it as {info.shape}; a field "
                "is missing or wrong, so download the file again"
            )
    tied = {*(getattr(model, "_tied_weights_keys", None) or {}), *(getattr(model, "all_tied_weights_keys", None) or {})}
    spared = "|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or ["(?!)"])
    missing = [name for name in own if name not in tensors and name not in tied and not re.search(spared, name)]
    if missing:
        raise CheckpointError(
            f"{where}: config.json describes a model of {len(own)} weights, and the first of {len(missing)} that are not "
            f"there is {missing[0]}; a field is missing or wrong, or the checkpoint is incomplete"
        )


def remember_origin(model: PreTrainedModel, name: str, folder: Path) -> None:
    """Note where a model came from, for what is written later: a Hub model, too, is read from a ``folder``."""
    config: Any = model.config
    config._name_or_path = name
    # The Hub's cache keeps each commit in a folder of its name.
    config._commit_hash = folder.name if folder.parent.name == "snapshots" else None


def load_model(
    source: Source,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    auto_class: Any = None,
    num_labels: int | None = None,
    offload_folder: Path | None = None,
) -> PreTrainedModel:
    """Load a dense or compact checkpoint with all its weights, in evaluation mode.

    Args:
        auto_class: one of transformers' classes with a head that the checkpoint lacks; the caller fills it. By default
            the class is that of the checkpoint, and nothing may be missing.
        num_labels: outputs of that head.
        offload_folder: leave all weights in their files (:mod:`lowrank_ft.checkpoints.on_disk`); here go those that
            transformers does not take as they are stored.

    Raises:
        CheckpointNotFoundError, CheckpointError: as :class:`Source`; or weights are missing from the checkpoint; or an
            adapter lies beside them, and ``source.adapter`` does not say that it is to be merged.
    """
    config = source.load_config()
    source.check_adapter()
    folder = source.download()
    check_adapter(source.name, (folder / ADAPTER_CONFIG).is_file(), source.adapter)
    Source(str(folder)).tensors()
    if num_labels is not None:
        config.num_labels = num_labels
    cls = auto_class or model_class(config, source.name, source.trust_remote_code)
    extra: dict[str, Any] = {}
    if hasattr(cls, "_model_mapping") and source.trust_remote_code:
        extra["trust_remote_code"] = True
    if offload_folder is not None:
        extra |= {"device_map": {"": "disk"}, "offload_folder": str(offload_folder)}
    try:
        with without_adapter(folder) as weights:
            model, info = cls.from_pretrained(
                str(weights), config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **extra
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever its class raises
        skeleton(source.load_config(), source.name, source.trust_remote_code)  # names a field of the config if it can
        raise CheckpointError(f"{source.name} does not load ({type(error).__name__}: {in_one_line(error)})") from error
    missing = sorted(info["missing_keys"])
    if auto_class is not None:  # of the body, though, nothing may be missing
        missing = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
    if missing:
        raise CheckpointError(
            f"{source.name} lacks {len(missing)} weights of {type(model).__name__}, the first being {missing[0]}; "
            "the checkpoint is incomplete, or its config.json names another architecture"
        )
    if source.adapter:
        model = merge_adapter(model, folder)
    remember_origin(model, source.name, folder)
    return model.to(device) if device else model


def check_runs(model: PreTrainedModel) -> Exception | None:
    """The error that a forward pass on a few made-up inputs ends in, or None."""
    inputs = {k: v.to(model.device) for k, v in model.dummy_inputs.items() if isinstance(v, torch.Tensor)}
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # whatever a model's forward may raise
        return error
    return None


def check_written(folder: Path, model: PreTrainedModel) -> None:
    """Open what was just written, on the meta device and so without its weights, by the way that everybody loads it.

    Raises:
        CheckpointError: a weight is missing, is of another shape, or belongs to nothing.
    """
    cls: Any = type(model)
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        _, info = cls.from_pretrained(
            str(folder), device_map={"": "meta"}, use_safetensors=True, output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"the written checkpoint does not load, so it was deleted: {first_line(error)}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
    for what in ("missing", "unexpected"):
        if keys := sorted(info[f"{what}_keys"]):
            raise CheckpointError(
                f"the written checkpoint does not load, so it was deleted: {len(keys)} weights of {cls.__name__} are "
                f"{what}, the first being {keys[0]}"
            )


def check_finite(model: torch.nn.Module, where: object = "") -> None:
    """Raise a NonFiniteError that names the first weight with NaN or infinity, and ``where`` it was read from."""
    of = f"{where}: " if where else ""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                f"{of}{name} {tuple(tensor.shape)} holds {bad} NaN or infinite values; "
                "the checkpoint is damaged, download or train it again"
            )


def _no_safetensors(name: str, files: list[str]) -> CheckpointError:
    pickles = sorted(f for f in files if f.endswith(_PICKLES))
    if pickles:
        return CheckpointError(
            f"{name} holds its weights as pickle only ({pickles[0]}), which can run code when it is opened; "
            f"it is refused. To convert it, {_HOW_TO_CONVERT_PICKLE}"
        )
    return CheckpointError(f"{name} holds no model.safetensors and no {INDEX_FILE}; it is not a model checkpoint")
