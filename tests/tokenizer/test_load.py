"""Which file of a folder is read, and what is said when there is none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mixtral.config.generation import read_generation_config
from mixtral.errors import MixtralError, UsageError
from mixtral.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.conftest import FILES, NAMES


def test_folder_and_file(own: Tokenizer, tmp_path: Path) -> None:
    own.save(tmp_path)
    assert (tmp_path / "own.model.v3").is_file()
    assert load_tokenizer(str(tmp_path)).version == "v3"
    assert load_tokenizer(tmp_path / "own.model.v3").version == "v3"
    assert load_tokenizer(tmp_path / "tokenizer.json").version == "json"


def test_a_name_with_its_version_goes_first(own: Tokenizer, tmp_path: Path) -> None:
    own.save(tmp_path)
    shutil.copy(FILES / NAMES["v1"], tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).fingerprint == own.fingerprint


def test_tekken_goes_before_all(own: Tokenizer, tmp_path: Path) -> None:
    own.save(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(MixtralError, match=r"/tekken.json: damaged"):
        load_tokenizer(tmp_path)


def test_several_with_a_version(own: Tokenizer, tmp_path: Path) -> None:
    own.save(tmp_path)
    shutil.copy(FILES / NAMES["v1"], tmp_path / "tokenizer.model.v1")
    with pytest.raises(UsageError, match=r"several tokenizers \(own.model.v3, tokenizer.model.v1\); name one file"):
        load_tokenizer(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer in this folder; looked for tekken.json, .*tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match=r"gone: no such file or folder"):
        load_tokenizer(tmp_path / "gone")


def test_not_a_tokenizer_name(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"notes.txt: not the name of a tokenizer file"):
        load_tokenizer(tmp_path / "notes.txt")


def test_messages_name_the_whole_path(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model.v3").write_bytes(b"hello")
    with pytest.raises(MixtralError, match=rf"^{tmp_path}/tokenizer.model.v3: the file is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("text", "reason"), [("{", "not JSON"), ("[]", "must hold a JSON object, not a list")])
def test_a_broken_tokenizer_config(own: Tokenizer, tmp_path: Path, text: str, reason: str) -> None:
    own.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(MixtralError, match=rf"tokenizer_config.json: {reason}"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(MixtralError, match=r"tokenizer.json: cannot be read: Permission denied"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                                  "chat_template.jinja", "tokenizer.json", "tekken.json", "generation_config.json",
                                  "additional_chat_templates", "other.model.v9"])
@pytest.mark.parametrize("kind", ["dangling", "fifo", "device"])
def test_what_is_no_regular_file_is_told_of(own: Tokenizer, tmp_path: Path, name: str, kind: str) -> None:
    own.save(tmp_path)
    file = tmp_path / name
    file.unlink(missing_ok=True)
    if name == "other.model.v9":
        (tmp_path / "own.model.v3").unlink()
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(MixtralError) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value)
    if name == "generation_config.json":
        with pytest.raises(MixtralError, match="generation_config"):
            read_generation_config(tmp_path)
