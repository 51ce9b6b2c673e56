"""What a folder says of its tokenizer, its templates and its generation survives every way of writing a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mixtral
from mixtral.config_formats import read_config
from mixtral.errors import MixtralError
from mixtral.gguf_header import read_gguf_header
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.recipe import Recipe
from mixtral.tokenizer import Tokenizer, load_tokenizer
from mixtral.weights import convert, save_hf
from mixtral.weights.chat_templates import folder_templates
from mixtral.weights.gguf_tokenizer import _files, read_tokenizer, side_files
from tests.tokenizer.kinds import KINDS
from tests.tokenizer.lines import make_lines
from tests.weights.weight_states import SPARSE, random_state

AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
GENERATION = {"do_sample": True, "temperature": 0.5, "eos_token_id": [1000, 2]}
LINES = make_lines(120, seed=3)
CONFIG = SPARSE.replace(vocab_size=1002, dim=64, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=32, eos_id=1000)


def _save(source: Path, target: Path) -> Path:
    mixtral.load(source, device="cpu").save(target)
    return target


def _convert(*steps: str) -> Callable[[Path, Path], Path]:
    def run(source: Path, target: Path) -> Path:
        for number, to in enumerate(steps):
            new = target / f"{number}.gguf" if to == "gguf" else target / str(number)
            convert(source, new, to)
            source = new
        return source

    return run


def _quantise(source: Path, target: Path) -> Path:
    quantise_folder(source, target, Recipe.of("8"))
    return target


def _train(source: Path, target: Path) -> Path:
    """As training takes a tokenizer over, and writes it to OUT/final."""
    load_tokenizer(source).save(target / "tokenizer")
    load_tokenizer(target / "tokenizer").save(target / "final")
    return target / "final"


WAYS: dict[str, Callable[[Path, Path], Path]] = {
    "save": _save, "hf": _convert("hf"), "mistral": _convert("mistral"), "mistral and back": _convert("mistral", "hf"),
    "gguf": _convert("gguf"), "gguf and back": _convert("gguf", "hf"), "gguf to mistral": _convert("gguf", "mistral"),
    "hf, saved": lambda source, target: _save(_convert("hf")(source, target), target / "saved"),
    "gguf, saved": lambda source, target: _save(_convert("gguf")(source, target), target / "saved"),
    "quantised": _quantise, "training": _train,
}  # fmt: skip


ADDED = ["added, tokenizer.json", "added, added_tokens_decoder", "added, added_tokens.json"]


@pytest.fixture(scope="module", params=ADDED)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two tokens more than its sentencepiece model, one of them its end, and all the files there are."""
    folder = tmp_path_factory.mktemp("source")
    save_hf(random_state(CONFIG), CONFIG, folder)
    model = (folder / "config.json").read_bytes()
    KINDS[request.param].make(folder)
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    config |= {"model_max_length": 77, "chat_template": [{"name": "default", "template": CHAT},
                                                         {"name": "tool_use", "template": "tools"}]}  # fmt: skip
    files = {"config.json": model, "tokenizer_config.json": json.dumps(config).encode(),
             "generation_config.json": json.dumps(GENERATION).encode(),
             "special_tokens_map.json": b'{"eos_token": "<|im_end|>"}'}  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _told(tokenizer: Tokenizer | None, files: dict[str, bytes]) -> dict[str, Any]:
    assert tokenizer is not None
    config = json.loads(files["tokenizer_config.json"])
    return {
        "vocabulary": tokenizer.fingerprint, "control": tokenizer.control, "size": tokenizer.vocab_size,
        "begin and end": (tokenizer.bos_id, tokenizer.eos_id, tokenizer.prefix, tokenizer.suffix),
        "ids": tokenizer.encode_batch(LINES), "text": tokenizer.decode([5, 1000, 1001, 7]),
        "templates": folder_templates(files), "max length": config["model_max_length"],
        "generation": json.loads(files["generation_config.json"]),
        "special": json.loads(files["special_tokens_map.json"]), "flags": config.get("added_tokens_decoder"),
    }  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_everything_survives(way: str, source: Path, tmp_path: Path) -> None:
    wanted = _told(read_tokenizer(source), side_files(source))
    assert wanted["control"][1000] == "<|im_end|>" and wanted["begin and end"][1] == 1000 and wanted["size"] == 1002
    written = WAYS[way](source, tmp_path)
    assert _told(read_tokenizer(written), side_files(written)) == wanted
    if way in ("mistral", "gguf to mistral"):  # where only the tokenizer says so
        assert "eos_id" not in (written / "params.json").read_text()
        assert mixtral.load(written).config.eos_ids[0] == 1000
    elif way != "training":
        assert read_config(written).eos_ids == (1000, 2)


def test_the_end_that_only_a_tokenizer_names_survives_quantising(source: Path, tmp_path: Path) -> None:
    mistral = _convert("mistral")(source, tmp_path)
    (mistral / "generation_config.json").unlink()
    assert read_config(_quantise(mistral, tmp_path / "small")).eos_id == 1000


@pytest.mark.parametrize("way", ["save", "gguf and back", "training"])
def test_transformers_reads_the_same(way: str, source: Path, tmp_path: Path) -> None:
    written = WAYS[way](source, tmp_path)
    theirs = AutoTokenizer.from_pretrained(written)
    assert (len(theirs), theirs.eos_token_id, theirs.convert_tokens_to_ids("<tag>")) == (1002, 1000, 1001)
    assert theirs.chat_template == {"default": CHAT, "tool_use": "tools"}
    split = AutoTokenizer.from_pretrained(written, split_special_tokens=True)
    ours = load_tokenizer(source)
    assert split(LINES)["input_ids"] == ours.encode_batch(LINES)


def test_the_added_end_ends_a_generation(source: Path) -> None:
    lm = mixtral.load(source, dtype="fp32", device="cpu")
    with torch.no_grad():
        lm.model.output.weight[1000] = 100 * lm.model.output.weight[:5].abs().sum(0)  # beside any other logit
        lm.model.output.weight[1001] = -lm.model.output.weight[1000]
    tokens = [lm.generate([1, first], max_tokens=4) for first in range(3, 40)]
    ended = [answer for answer in tokens if 1000 in answer]
    assert ended and all(answer[-1] == 1000 and answer.count(1000) == 1 for answer in ended)
    assert any(1001 in answer for answer in tokens)


def test_what_a_gguf_file_says(source: Path, tmp_path: Path) -> None:
    """By the format's own keys, for other programs."""
    metadata = read_gguf_header(_convert("gguf")(source, tmp_path)).metadata
    key = "tokenizer.ggml."
    assert metadata[key + "tokens"][1000:] == ["<|im_end|>", "<tag>"] and metadata[key + "token_type"][1000:] == [3, 4]
    assert metadata[key + "eos_token_id"] == 1000 and metadata[key + "add_bos_token"] is True
    assert metadata["tokenizer.chat_template"] == CHAT and metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert metadata["tokenizer.chat_template.tool_use"] == "tools"


@pytest.mark.parametrize(("metadata", "message"), [
    ({"mixtral.file.../x.json": "{}"}, "must be the text of a file that goes along with a tokenizer"),
    ({"mixtral.file.tokenizer_config.json": 5}, "must be the text of a file"),
    ({"mixtral.file.model.safetensors": ""}, "must be the text of a file"),
    ({"tokenizer.chat_template": 5}, "tokenizer.chat_template must be a text, not 5"),
])
def test_files_that_a_stranger_put_into_gguf(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises((MixtralError, ValueError), match=message):
        _files(metadata)


def test_a_strangers_templates_become_files() -> None:
    told = {"tokenizer.chat_template": CHAT, "tokenizer.chat_templates": ["rag"], "tokenizer.chat_template.rag": "r"}
    files = _files(told)
    assert files == {"chat_template.jinja": CHAT.encode(), "additional_chat_templates/rag.jinja": b"r"}
    changed = {**told, "mixtral.file.chat_template.jinja": "before", "mixtral.file.generation_config.json": "{}"}
    assert _files(changed) == {**files, "generation_config.json": b"{}"}  # another program changed the template


@pytest.mark.parametrize("way", ["save", "hf", "mistral and back", "gguf and back", "quantised"])
def test_what_a_folder_without_a_tokenizer_says(way: str, tmp_path: Path) -> None:
    save_hf(random_state(CONFIG), CONFIG, tmp_path / "source")
    files = {"generation_config.json": json.dumps(GENERATION).encode(), "chat_template.jinja": CHAT.encode()}
    for name, content in files.items():
        (tmp_path / "source" / name).write_bytes(content)
    written = WAYS[way](tmp_path / "source", tmp_path / "target")
    assert side_files(written) == files and read_tokenizer(written) is None


def test_params_json_gets_begin_and_end_from_the_tokenizer(source: Path, tmp_path: Path) -> None:
    written = _convert("mistral")(source, tmp_path)
    (written / "generation_config.json").unlink()
    assert mixtral.load(written, device="cpu").config.eos_ids == (1000,)
    convert(written, tmp_path / "back", "hf")
    assert read_config(tmp_path / "back").eos_ids == (1000,)
