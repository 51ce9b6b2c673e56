"""`mixtral pull` and models by name, against a hub on loopback."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import pytest
import torch

import mixtral
from mixtral import hub
from mixtral.config import ModelConfig
from mixtral.errors import MixtralError, UsageError
from mixtral.tokenizer import train_bpe
from mixtral.weights import save_hf
from mixtral.weights.names import parameter_shapes
from tests.hub_server import Hub, hub_of

CONFIG = ModelConfig(
    vocab_size=400, dim=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=64, n_experts=4,
    experts_per_token=2, rope_theta=1e4, context=64,
)  # fmt: skip
NAME = "someone/small-mixtral"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A whole model, and beside it what nobody needs."""
    folder, random = tmp_path_factory.mktemp("model"), torch.Generator().manual_seed(0)
    state = {name: 0.1 * torch.randn(shape, generator=random) for name, shape in parameter_shapes(CONFIG).items()}
    save_hf(state, CONFIG, folder)
    train_bpe(["one two three, four"], 300).save(folder)
    read = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = {"README.md": b"# A model", "pytorch_model.bin": b"pickle", "consolidated.00.pth": b"0"}
    return {**read, **others, "onnx/model.onnx": b""}


@pytest.fixture
def server(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_of(NAME, files) as server:
        yield server


def fetch(server: Hub, name: str = NAME, **options: Any) -> Path:
    return hub.pull(name, endpoint=server.url, **options)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """snapshot_download has the cache's folder as the default of an argument."""
    whole = huggingface_hub.snapshot_download

    def to_cache(*arguments: Any, **options: Any) -> Any:
        return whole(*arguments, **{"cache_dir": tmp_path / "cache", **options})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", to_cache)


def test_a_model_is_fetched_and_then_found_by_name(server: Hub, files: dict[str, bytes]) -> None:
    folder = fetch(server)
    got = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert got == {name: files[name] for name in got}
    assert {"config.json", "model.safetensors"} < got.keys() and not got.keys() & {"README.md", "pytorch_model.bin"}
    sent = dict(server.sent)
    assert fetch(server) == folder and server.sent == sent  # nothing a second time
    lm = mixtral.load(NAME)
    assert lm.tokenizer is not None and lm.config.n_experts == 4
    assert torch.equal(lm.logits([1, 2, 3]), mixtral.load(folder).logits([1, 2, 3]))


def test_needed_files() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    native = ["consolidated-00001-of-00001.safetensors", "params.json", "tokenizer.model.v3"]
    others = ["README.md", "pytorch_model.bin", "model.onnx", "original/consolidated.00.pth", "model.fp16.safetensors"]
    assert hub.needed([*others, *shards, "config.json", *native]) == [
        "config.json", "params.json", "tokenizer.model.v3", *shards,
    ]  # fmt: skip
    assert hub.needed([*others, *native]) == ["params.json", "tokenizer.model.v3", native[0]]
    assert hub.needed(["consolidated.00.pt", "consolidated.01.pt", "params.json"])[1:] == [
        "consolidated.00.pt", "consolidated.01.pt",
    ]  # fmt: skip


def test_killed_in_the_middle_and_resumed(tmp_path: Path) -> None:
    """Whole files are kept; what is left of the one that was cut off goes when it is there whole."""
    data, first = os.urandom(4 << 20), os.urandom(1 << 18)
    shards = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": data}
    code = f"from mixtral import hub; hub.pull({NAME!r})"
    with hub_of(NAME, {"config.json": b"{}", **shards}) as server:
        server.pause = 0.02
        environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": server.url}
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
        assert server.under_way.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        server.pause = 0.0
        assert server.sent["model-00002-of-00002.safetensors"] < len(data)
        which = [sys.executable, "-c", f"from mixtral import hub; print(hub.pulled({NAME!r}))"]
        found = subprocess.run(which, env=environment, capture_output=True, text=True, check=False)
        assert found.returncode and f"was not fetched to the end; `mixtral pull {NAME}` goes on" in found.stderr
        command = [sys.executable, "-m", "mixtral", "pull", NAME]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert "model-00002-of-00002.safetensors  4.00 MiB" in done.stdout
        found = subprocess.run(which, env=environment, capture_output=True, text=True, check=True)
        folder = Path(found.stdout.strip())
        assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == shards
        assert server.sent["model-00001-of-00002.safetensors"] == len(first)  # once
        (folder / "model-00002-of-00002.safetensors").unlink()  # as a kill between two files leaves it
        found = subprocess.run(which, env=environment, capture_output=True, text=True, check=False)
        assert f"was not fetched to the end; `mixtral pull {NAME}` goes on" in found.stderr
        assert not list(tmp_path.rglob("*.incomplete"))


def test_what_the_hub_refuses(server: Hub) -> None:
    refused = (
        (f"{NAME}@v9", {}, "has no revision 'v9' of it; a branch, tag or commit"),
        ("someone/else", {}, "has no such model, or does not show it to this token"),
        ("nonsense", {}, "OWNER/MODEL or OWNER/MODEL@REVISION is wanted, not 'nonsense'"),
    )
    for name, options, message in refused:
        with pytest.raises(UsageError, match=message):
            fetch(server, name, **options)
    server.token = "right"
    with pytest.raises(UsageError, match="has no such model, or does not show it to this token"):
        fetch(server, token="wrong")
    assert fetch(server, token="right").is_dir()


def test_a_model_without_weights_that_are_read() -> None:
    files = {"config.json": b"{}", "pytorch_model.bin": b""}
    message = "the hub has no weights of it that are read; safetensors are"
    with hub_of(NAME, files) as server, pytest.raises(UsageError, match=message):
        fetch(server)


def test_no_room(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(MixtralError, match=r"0\.0 GB are to be fetched, and .*cache has 0\.0 GB left; HF_HOME names"):
        fetch(server)
    assert not server.sent
    monkeypatch.undo()

    def full(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(MixtralError, match="the disk is full; whole files stay, and the next pull goes on"):
        fetch(server)


def test_no_hub() -> None:
    with pytest.raises(MixtralError, match=r"cannot be fetched from http://127\.0\.0\.1:9: "):
        hub.pull(NAME, endpoint="http://127.0.0.1:9")


def test_names_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = r"^no/where: no such file or folder; .* `mixtral pull no/where` fetches a model of the hub"
    with pytest.raises(UsageError, match=missing):
        mixtral.load("no/where")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").mkdir()
    assert not hub.is_name("a/b") and hub.is_name("a/c") and not hub.is_name("a/b/c") and not hub.is_name("/a")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=missing):
        mixtral.load("no/where")
    with pytest.raises(UsageError, match=r'models of a hub need huggingface_hub: pip install "mixtral\[hub\]"'):
        hub.pull("no/where")
