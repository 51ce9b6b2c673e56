"""What a folder says of its tokenizer, its templates and its generation survives every way of writing a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mixtral
from mixtral.config import table
from mixtral.config.formats import read_config
from mixtral.engine import recommended
from mixtral.errors import MixtralError
from mixtral.gguf.header import read_gguf_header
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from mixtral.tokenizer import Tokenizer, load_tokenizer
from mixtral.tokenizer.chat_templates import folder_templates
from mixtral.tokenizer.gguf import _files, read_metadata, side_files, tokenizer_metadata
from mixtral.tokenizer.load import find_tokenizer
from mixtral.weights import convert, save_hf
from mixtral.weights.gguf_write import write_gguf
from tests.tokenizer.conftest import tokenizer_named
from tests.tokenizer.kinds import KINDS
from tests.tokenizer.lines import make_lines
from tests.weights.weight_states import SPARSE, random_state

AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ENDS = (7, 1000, 5, 2, 9)  # more than GGUF has keys for, and the tokenizer's, 1000, is not the first
GENERATION = {"do_sample": True, "temperature": 0.5, "eos_token_id": list(ENDS)}
LINES = make_lines(120, seed=3)
CONFIG = SPARSE.replace(vocab_size=1002, dim=64, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=32, eos_id=8)


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
    quantise_folder(source, target, QuantScheme.of("8"))
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
    wanted = _told(find_tokenizer(source), side_files(source))
    assert wanted["control"][1000] == "<|im_end|>" and wanted["begin and end"][1] == 1000 and wanted["size"] == 1002
    written = WAYS[way](source, tmp_path)
    assert _told(find_tokenizer(written), side_files(written)) == wanted
    if way in ("mistral", "gguf to mistral"):
        assert "eos_id" not in (written / "params.json").read_text()
    if way != "training":
        assert mixtral.load(written).config.eos_ids == ENDS


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
    lm = mixtral.load(source, dtype="fp32", device="cpu", runner="torch")
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
    assert [metadata[f"{key}{name}_token_id"] for name in ("eos", "eot", "eom")] == [1000, 7, 5]
    assert metadata[key + "add_bos_token"] is True
    sampling = {name: metadata[f"general.sampling.{name}"] for name in ("temp", "top_k", "top_p", "min_p")}
    assert sampling == {"temp": 0.5, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
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
    assert _files({**told, "tokenizer.chat_template.default": "r"}).keys() == files.keys()
    changed = {**told, "mixtral.file.chat_template.jinja": "before", "mixtral.file.generation_config.json": "{}"}
    assert _files(changed) == {**files, "generation_config.json": b"{}"}  # another program changed the template


@pytest.mark.parametrize("way", ["save", "hf", "mistral and back", "gguf and back", "quantised"])
def test_what_a_folder_without_a_tokenizer_says(way: str, tmp_path: Path) -> None:
    save_hf(random_state(CONFIG), CONFIG, tmp_path / "source")
    files = {"generation_config.json": json.dumps(GENERATION).encode(), "chat_template.jinja": CHAT.encode()}
    for name, content in files.items():
        (tmp_path / "source" / name).write_bytes(content)
    written = WAYS[way](tmp_path / "source", tmp_path / "target")
    assert side_files(written) == files and find_tokenizer(written) is None


def test_params_json_gets_begin_and_end_from_the_tokenizer(source: Path, tmp_path: Path) -> None:
    written = _convert("mistral")(source, tmp_path)
    (written / "generation_config.json").unlink()
    assert mixtral.load(written, device="cpu").config.eos_ids == (1000,)
    convert(written, tmp_path / "back", "hf")
    assert read_config(tmp_path / "back").eos_ids == (1000,)


# -- what the model says of its end and its sampling, where the tokenizer and other files say something else -----------


def _small(folder: Path, **files: Any) -> Path:
    """A model of 1005 tokens, whose tokenizer has 1000 and ends a text with 2, with such files beside; "__": a dot."""
    save_hf(random_state(PADDED), PADDED, folder)
    tokenizer_named("own").save(folder)
    for name, values in files.items():
        file = folder / name.replace("__", ".")
        old = json.loads(file.read_bytes()) if file.exists() else {}
        file.write_text(json.dumps(old | values))
    return folder


PADDED = CONFIG.replace(vocab_size=1005, eos_id=2)
ADDED_JSON = {"<|im_start|>": 1000, "<|im_end|>": 1001}
FORMATS = ("gguf", "mistral", "gguf and back", "gguf to mistral", "mistral and back")


@pytest.mark.parametrize(("holder", "end"), [
    ("generation_config.json", 1001), ("generation_config.json", 0),
    ("config.json", 300), ("config.json", [300, 301]), ("config.json", 1004), ("config.json", [1001, 2]),
    ("generation_config.json", [2, 5, 6, 7, 8]), ("config.json", [2, 5, 6, 7, 8]),
], ids=str)
def test_end_tokens_other_than_the_tokenizers(end: Any, holder: str, tmp_path: Path) -> None:
    """As fine-tunes have them: an added token that is not special, any other, one in the padding, several."""
    source = _small(tmp_path / "source", added_tokens__json=ADDED_JSON, **{holder: {"eos_token_id": end}})
    (source / "tokenizer.json").unlink()  # the sentencepiece model decides
    wanted, lines = read_config(source).eos_ids, LINES[:20]
    ours = load_tokenizer(source)
    for way in FORMATS:
        lm = mixtral.load(WAYS[way](source, tmp_path / way), device="cpu")
        assert lm.config.eos_ids == wanted and lm.tokenizer is not None, way
        assert (lm.tokenizer.bos_id, lm.tokenizer.eos_id) == (1, 2), way
        assert lm.tokenizer.encode_batch(lines) == ours.encode_batch(lines), way


def test_the_tokenizers_end_does_not_become_the_models(tmp_path: Path) -> None:
    """params.json names no end; a reader would take the tokenizer's, which is not the model's here."""
    files = {"added_tokens__json": ADDED_JSON, "tokenizer_config__json": {"eos_token": "<|im_end|>"}}
    source = _small(tmp_path / "source", **files)
    assert load_tokenizer(source).eos_id == 1001 and read_config(source).eos_ids == (2,)
    for way in FORMATS:
        lm = mixtral.load(WAYS[way](source, tmp_path / way), device="cpu")
        assert lm.config.eos_ids == (2,) and lm.tokenizer is not None and lm.tokenizer.eos_id == 1001, way


def test_an_embedded_tokenizer_json_counts_whatever_the_models_end(tmp_path: Path) -> None:
    """Its ids differ from those of the sentencepiece model: it puts no space before a text."""
    files = {"generation_config__json": {"eos_token_id": 1001, "do_sample": True, "top_k": None}}
    source = _small(tmp_path / "source", added_tokens__json=ADDED_JSON, **files)
    document = json.loads((source / "tokenizer.json").read_bytes())
    document["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    (source / "tokenizer.json").write_text(json.dumps(document))
    wanted = load_tokenizer(source).encode_batch(LINES)
    assert wanted != tokenizer_named("own").encode_batch(LINES)
    metadata = dict(read_gguf_header(_convert("gguf")(source, tmp_path)).metadata)
    assert metadata["tokenizer.ggml.eos_token_id"] == 2 and metadata["general.sampling.top_k"] == 50
    earlier = metadata | {"tokenizer.ggml.eos_token_id": 1001}  # as earlier versions wrote it
    for back in (read_metadata(metadata), read_metadata(earlier)):
        assert back.encode_batch(LINES) == wanted and back.eos_id == 2
    del earlier["mixtral.file.tokenizer_config.json"]  # which names begin and end
    assert read_metadata(earlier).eos_id == 1001


def test_the_begin_in_gguf_is_the_tokenizers(tmp_path: Path) -> None:
    config = PADDED.replace(bos_id=99_999)
    write_gguf(random_state(config), config, tmp_path / "a.gguf", tokenizer=tokenizer_named("own"))
    assert read_gguf_header(tmp_path / "a.gguf").metadata["tokenizer.ggml.bos_token_id"] == 1
    assert mixtral.load(tmp_path / "a.gguf").config.bos_id == 1


DEFAULTS = {"do_sample": True, "temperature": 0.75, "top_p": 0.5, "repetition_penalty": 1.25, "pad_token_id": 0}
ALL_FORMATS = ("save", "hf", "quantised", *FORMATS)


def test_defaults_in_config_json_go_along(tmp_path: Path) -> None:
    source = _small(tmp_path / "source", config__json={**DEFAULTS, "eos_token_id": [2, 7]})
    wanted = {"temperature": 0.75, "top_k": 50, "top_p": 0.5, "repetition_penalty": 1.25}
    assert recommended(source) == wanted
    for way in ALL_FORMATS:
        written = WAYS[way](source, tmp_path / way)
        assert recommended(written) == wanted and read_config(written).eos_ids == (2, 7), way
        kept = json.loads(side_files(written)["generation_config.json"])
        assert kept == {**DEFAULTS, "bos_token_id": 1, "eos_token_id": [2, 7]}, way  # transformers ends by it alone


def test_no_defaults_no_file(tmp_path: Path) -> None:
    source = _small(tmp_path / "source", config__json={"use_cache": True, "transformers_version": "4.40"})
    assert "generation_config.json" not in side_files(source)


def _gguf_that_says(said: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    own = tokenizer_metadata(tokenizer_named("own"), PADDED.vocab_size)
    with monkeypatch.context() as patched:
        patched.setattr("mixtral.weights.gguf_write.tokenizer_metadata", lambda *_: own | said)
        write_gguf(random_state(PADDED), PADDED, path)
    return path


def test_sampling_of_a_gguf_file_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"general.sampling.temp": 0.75, "general.sampling.top_p": 0.5, "tokenizer.ggml.eot_token_id": 7}
    source = _gguf_that_says(said, tmp_path / "source.gguf", monkeypatch)
    wanted = {"temperature": 0.75, "top_p": 0.5}
    assert recommended(source) == wanted
    for way in ALL_FORMATS:
        written = WAYS[way](source, tmp_path / way)
        assert recommended(written) == wanted and mixtral.load(written).config.eos_ids == (2, 7), way
    again = read_gguf_header(_convert("gguf")(source, tmp_path)).metadata
    assert (again["general.sampling.temp"], again["general.sampling.top_k"], again["general.sampling.top_p"]) \
        == (0.75, 0, 0.5)


@pytest.mark.parametrize(("said", "message"), [
    ({"mixtral.file.generation_config.json": "[]"}, r"mixtral\.file\.generation_config\.json: must hold a JSON object"),
    ({"mixtral.file.generation_config.json": '{"eos_token_id": "x"}'},
     r"mixtral\.file\.generation_config\.json: eos_token_id must be a token id"),
    ({"general.sampling.temp": "hot"}, r"general\.sampling\.temp must be a finite number, not 'hot'"),
    ({"general.sampling.temp": 0.5, "general.sampling.top_p": math.nan}, r"general\.sampling\.top_p must be a finite"),
])
def test_damaged_defaults_are_not_passed_on(
    said: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _gguf_that_says(said, tmp_path / "source.gguf", monkeypatch)
    for to in ("hf", "mistral", "gguf"):
        with pytest.raises(MixtralError, match=rf"source\.gguf: {message}"):
            convert(source, tmp_path / "target.gguf", to)
    with pytest.raises(MixtralError, match=r"source\.gguf: .*mixtral\.file|general\.sampling"):
        mixtral.load(source)


BAD_NAMES = ("a\0b", "", "a/b", "../../x", "a" * 5000)


def test_templates_whose_names_no_file_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table.warn_once.cache_clear()
    said = {f"tokenizer.chat_template.{name}": "bad" for name in BAD_NAMES}
    said |= {"tokenizer.chat_template": CHAT, "tokenizer.chat_template.good": "good"}
    source = _gguf_that_says(said, tmp_path / "source.gguf", monkeypatch)
    mixtral.load(source)
    for name in ("'a\\x00b'", "''", "'a/b'", "'../../x'"):
        assert f"the template named {name} is left out: that is no name for a file" in caplog.text
    for way in ("save", "hf", "mistral", "gguf and back"):
        templates = folder_templates(side_files(WAYS[way](source, tmp_path / way)))
        assert templates == {"default": CHAT, "good": "good"}, way


def test_such_templates_stay_in_tokenizer_config(tmp_path: Path) -> None:
    entries = [{"name": name, "template": name[:9]} for name in (*BAD_NAMES, "good")]
    source = _small(tmp_path / "source", tokenizer_config__json={"chat_template": entries})
    wanted = {entry["name"]: entry["template"] for entry in entries}
    for way in ("save", "hf", "mistral", "gguf", "gguf and back"):
        assert folder_templates(side_files(WAYS[way](source, tmp_path / way))) == wanted, way
