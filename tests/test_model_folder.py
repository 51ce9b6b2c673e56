"""A model's folder is resolved once, and each of its small files is opened once on its way through `mixtral.load`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import mixtral
from mixtral import files, json_files
from mixtral.gguf import header
from mixtral.lm import LM
from mixtral.model import initialise
from mixtral.model_folder import ModelFolder
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from mixtral.tokenizer import load_tokenizer, train_bpe
from mixtral.weights import convert
from tests.engine.models import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer, generation defaults, and its quantised twin and GGUF form beside it."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_bpe(["the cat sat on the mat\n" * 20], vocab_size=300)
    model = initialise(make_model(vocab_size=300), torch.Generator().manual_seed(0))
    LM(model, tokenizer).save(root / "hf")
    (root / "hf/generation_config.json").write_text('{"max_new_tokens": 7, "eos_token_id": 2}')
    quantise_folder(root / "hf", root / "quantised", QuantScheme.of("8"))
    return root


@pytest.mark.parametrize("name", ["hf", "quantised"])
def test_each_small_file_is_opened_once(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()

    def counted(path: str | Path) -> Any:
        opened[Path(path).name] += 1
        return files.open_regular(path)

    for module in (json_files, header):
        monkeypatch.setattr(module, "open_regular", counted)
    lm = mixtral.load(folder / name, device="cpu")
    assert lm.tokenizer is not None and lm.sampling["max_tokens"] == 7
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= opened.keys()
    assert set(opened.values()) == {1}, opened


def test_what_a_folder_says(folder: Path) -> None:
    plain, quantised = ModelFolder(folder / "hf"), ModelFolder(folder / "quantised")
    assert plain.config == quantised.config and plain.config.vocab_size == 300
    assert plain.quant_scheme is None and plain.weights is not None and quantised.weights is None
    assert quantised.quant_scheme is not None and quantised.quant_scheme.experts == "int8"
    assert plain.sampling_defaults == {"max_tokens": 7} and "generation_config.json" in plain.side_files
    assert ModelFolder("mixtral-nano").path.name == "nano"


def test_the_one_door_to_tokenizers(folder: Path, tmp_path: Path) -> None:
    """A folder, a file in it, a GGUF file; and what each says when there is none."""
    source = ModelFolder("mixtral-nano")
    assert source.tokenizer is not None
    file = next(p for p in source.path.glob("*.json") if p.name == "tokenizer.json")
    for path in (source.path, file):
        assert load_tokenizer(path).fingerprint == source.tokenizer.fingerprint
    convert(folder / "hf", tmp_path / "model.gguf", "gguf")
    assert load_tokenizer(tmp_path / "model.gguf").encode("the cat") == load_tokenizer(folder / "hf").encode("the cat")


def test_nothing_is_kept_between_two_loads(folder: Path) -> None:
    """Else a changed file would not be seen."""
    first = ModelFolder(folder / "hf").sampling_defaults
    before = (folder / "hf/generation_config.json").read_text()
    (folder / "hf/generation_config.json").write_text('{"max_new_tokens": 9}')
    assert first["max_tokens"] == 7 and ModelFolder(folder / "hf").sampling_defaults["max_tokens"] == 9
    (folder / "hf/generation_config.json").write_text(before)
