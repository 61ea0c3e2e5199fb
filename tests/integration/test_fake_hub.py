"""The fake Hub against the real client: what these tests prove, the tests of pushing and pulling may rely on.

The client runs in subprocesses, because it reads HF_ENDPOINT when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.fake_hub import FakeHub

FILES = {
    "README.md": b"---\nlicense: apache-2.0\n---\n# Card\n",
    "config.json": b"{}\n",
    "empty.txt": b"",
    "weights/every byte.bin": bytes(range(256)) * 300,
    "weights/deep/caf\u00e9+100%.txt": "na\u00efve".encode(),
}

Client = Callable[..., Any]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def client(hub: FakeHub, tmp_path: Path) -> Client:
    """Runs a script with the real client in a subprocess; returns what it printed last, as JSON."""

    def run(script: str, *arguments: object, token: str = "hf_test") -> Any:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **hub.environment(tmp_path / "hf_home", token)}
        command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_upload_and_download_are_byte_identical(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "source", FILES)
    script = """
        import json, sys
        from huggingface_hub import HfApi, snapshot_download
        api = HfApi()
        api.create_repo("model", private=True)
        url = api.create_repo("me/model", private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=url.repo_id, folder_path=sys.argv[1], commit_message="first")
        again = api.upload_folder(repo_id=url.repo_id, folder_path=sys.argv[1])
        info = api.model_info("me/model", files_metadata=True)
        print(json.dumps({
            "user": api.whoami()["name"],
            "oids": [commit.oid, again.oid, info.sha],
            "private": info.private,
            "sizes": {file.rfilename: file.size for file in info.siblings},
            "top": sorted(entry.path for entry in api.list_repo_tree("me/model")),
            "snapshot": snapshot_download("me/model"),
        }))
    """
    seen = client(script, folder)
    assert hub.files("me/model") == FILES
    assert read_folder(Path(seen["snapshot"])) == FILES
    assert seen["sizes"] == {name: len(content) for name, content in FILES.items()}
    assert seen["top"] == ["README.md", "config.json", "empty.txt", "weights"]
    assert seen["private"] is True
    assert hub.is_private("me/model")
    assert seen["user"] == "me"
    head = hub.commits("me/model")[-1]
    assert head.message == "first", "an unchanged folder makes no new commit"
    assert seen["oids"] == [head.sha] * 3


def test_revisions_stay_readable(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    first = hub.add_folder("me/model", write_folder(tmp_path / "one", {"a.txt": b"one", "old/b.txt": b"gone"}))
    script = """
        import json, sys
        from pathlib import Path
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        api = HfApi()
        api.create_branch("me/model", branch="side/way")
        second = api.upload_folder(
            repo_id="me/model", folder_path=sys.argv[2], delete_patterns="old/*", parent_commit=sys.argv[1]
        ).oid
        api.delete_file("a.txt", "me/model", revision="side/way")
        texts = {
            revision: Path(hf_hub_download("me/model", "a.txt", revision=revision)).read_text()
            for revision in (sys.argv[1], second, "main")
        }
        side = api.list_repo_files("me/model", revision="side/way")
        print(json.dumps({"second": second, "texts": texts, "side": side}))
    """
    seen = client(script, first, write_folder(tmp_path / "two", {"a.txt": b"two"}))
    second = seen["second"]
    assert first != second
    assert all(len(sha) == 40 and set(sha) <= set("0123456789abcdef") for sha in (first, second))
    assert seen["texts"] == {first: "one", second: "two", "main": "two"}
    assert seen["side"] == ["old/b.txt"]
    assert hub.files("me/model") == {"a.txt": b"two"}
    assert hub.files("me/model", first) == {"a.txt": b"one", "old/b.txt": b"gone"}


def test_safetensors_metadata_reads_headers_only(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"weight": np.zeros((1024, 1024), np.float32)}, folder / "model.safetensors")
    hub.add_folder("me/model", folder)
    script = """
        import json
        from huggingface_hub import HfApi
        print(json.dumps(HfApi().get_safetensors_metadata("me/model").parameter_count))
    """
    assert client(script) == {"F32": 1024 * 1024}
    assert {request.status for request in hub.requests if request.byte_range} == {206}
    served = sum(request.body_bytes for request in hub.requests)
    assert 0 < served < (folder / "model.safetensors").stat().st_size / 20


def test_what_is_missing_raises_the_clients_own_errors(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    hub.add_folder("me/model", write_folder(tmp_path / "source", {"a.txt": b"a"}))
    script = """
        import json
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
        api = HfApi()

        def raised(call, *arguments, **options):
            try:
                call(*arguments, **options)
            except Exception as error:
                kinds = (RepositoryNotFoundError, EntryNotFoundError, RevisionNotFoundError)
                return next((kind.__name__ for kind in kinds if isinstance(error, kind)), str(error))

        print(json.dumps([
            raised(api.model_info, "me/missing"),
            raised(hf_hub_download, "me/missing", "a.txt"),
            raised(hf_hub_download, "me/model", "missing.txt"),
            raised(lambda: list(api.list_repo_tree("me/model", path_in_repo="missing"))),
            raised(hf_hub_download, "me/model", "a.txt", revision="missing"),
            raised(api.create_repo, "me/model"),
            raised(api.list_repo_refs, "me/model"),
        ]))
    """
    *missing, exists, unsupported = client(script)
    assert missing == ["RepositoryNotFoundError"] * 2 + ["EntryNotFoundError"] * 2 + ["RevisionNotFoundError"]
    assert "409" in exists
    assert "501" in unsupported


def test_tokens_guard_writing_and_private_repositories(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "source", {"a.txt": b"a"})
    hub.add_folder("me/public", folder)
    hub.add_folder("me/private", folder, private=True)
    script = """
        import json
        from huggingface_hub import HfApi

        def status(call, *arguments):
            try:
                call(*arguments)
            except Exception as error:
                return [type(error).__name__, error.response.status_code]

        api = HfApi()
        print(json.dumps([
            status(api.model_info, "me/public"),
            status(api.model_info, "me/private"),
            status(api.create_repo, "me/new"),
            status(HfApi(token="hf_wrong").model_info, "me/public"),
        ]))
    """
    refused = ["HfHubHTTPError", 401]
    assert client(script, token="") == [None, ["RepositoryNotFoundError", 401], refused, refused]
    assert client(script)[:3] == [None, None, None]


def test_a_hub_may_ask_for_a_token_everywhere(tmp_path: Path) -> None:
    with FakeHub(require_token=True) as hub:
        hub.add_folder("me/model", write_folder(tmp_path / "source", {"a.txt": b"a"}))
        url = f"{hub.endpoint}/me/model/resolve/main/a.txt"
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(url)
        refusal.value.close()
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": "Bearer hf_test"})) as reply:
            assert reply.read() == b"a"
    assert [request.status for request in hub.requests] == [401, 200]


@pytest.mark.parametrize(
    ("header", "status", "body", "content_range"),
    [
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=0-1,4-5", 200, b"0123456789", None),
        ("bytes=10-", 416, None, "bytes */10"),
    ],
)
def test_ranges(
    hub: FakeHub, tmp_path: Path, header: str, status: int, body: bytes | None, content_range: str | None
) -> None:
    hub.add_folder("me/model", write_folder(tmp_path / "source", {"digits": b"0123456789"}))
    request = urllib.request.Request(f"{hub.endpoint}/me/model/resolve/main/digits", headers={"Range": header})
    try:
        reply = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        reply = error
    with reply:
        assert reply.status == status
        assert reply.headers["Content-Range"] == content_range
        assert body is None or reply.read() == body
    assert hub.requests[-1].byte_range == header


def test_transformers_pushes_and_loads(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    script = """
        import json, sys
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, vocab_size=32)
        local = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()
        local.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="me/tiny")
        pulled = AutoModelForCausalLM.from_pretrained("me/tiny").eval()
        ours, theirs = local.state_dict(), pulled.state_dict()
        tokens = torch.arange(8)[None]
        print(json.dumps({
            "type": type(pulled).__name__,
            "names": list(ours) == list(theirs),
            "weights": all(torch.equal(ours[name], theirs[name]) for name in ours),
            "logits": torch.equal(local(tokens).logits, pulled(tokens).logits),
        }))
    """
    folder = tmp_path / "tiny"
    assert client(script, folder) == {"type": "LlamaForCausalLM", "names": True, "weights": True, "logits": True}
    pushed = hub.files("me/tiny")
    assert {name: pushed[name] for name in read_folder(folder)} == read_folder(folder)
    weights = f"/me/tiny/resolve/{hub.commits('me/tiny')[-1].sha}/model.safetensors"
    served = [request.body_bytes for request in hub.requests if request.path == weights and request.method == "GET"]
    assert served == [len(pushed["model.safetensors"])], "the weights came from the hub, once"
