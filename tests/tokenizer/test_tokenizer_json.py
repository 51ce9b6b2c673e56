"""A bare tokenizer.json, whoever wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from mixtral.errors import MixtralError
from mixtral.tokenizer import Tokenizer, load_tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_level(*special: str) -> FastTokenizer:
    fast = FastTokenizer(models.BPE({**{c: i for i, c in enumerate(BYTES)}, "he": 256, "Ġhe": 257},
                                    [("h", "e"), ("Ġ", "he")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(special))
    return fast


def _load(fast: FastTokenizer, folder: Path, config: dict[str, object] | None = None) -> Tokenizer:
    fast.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def test_byte_level(tmp_path: Path) -> None:
    fast = _byte_level("<|begin|>", "<|end|>")
    fast.add_tokens(["<tag>"])  # not a control token: has text of its own
    config = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "chat_template": "kept"}
    tokenizer = _load(fast, tmp_path, config)
    assert (tokenizer.version, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == ("json", 258, 259, 261)
    assert tokenizer.token_bytes(257) == b" he" and tokenizer.token_bytes(258) == b""
    assert tokenizer.encode("he he<tag>") == [256, 257, 260]  # nothing in the file asks for <|begin|>
    assert tokenizer.encode("he he<tag>", bos=True) == [258, 256, 257, 260]
    for text in ("", " héhe\n", "<|end|> typed <tag>", "🙂"):
        assert tokenizer.decode(tokenizer.encode(text, eos=True)) == text
    assert 259 not in tokenizer.encode("<|end|>")
    assert tokenizer.mistral is None


def test_saving_keeps_the_file_and_its_config(tmp_path: Path) -> None:
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": "kept"}
    tokenizer = _load(_byte_level("<|begin|>", "<|end|>"), tmp_path, config)
    tokenizer.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert config.items() <= json.loads((tmp_path / "copy/tokenizer_config.json").read_text()).items()
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_byte_fallback_without_dummy_prefix(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}, "▁": 259, "a": 260}
    fast = FastTokenizer(models.BPE({**vocab, "▁a": 261}, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    tokenizer = _load(fast, tmp_path)
    assert not tokenizer.dummy_prefix
    assert tokenizer.encode(" a\n") == [261, 3 + 10]
    assert tokenizer.decode(tokenizer.encode(" a é")) == " a é"


def test_no_beginning_token(tmp_path: Path) -> None:
    with pytest.raises(MixtralError, match=r"tokenizer.json: no bos_token: none of <s>, .*tokenizer_config.json"):
        _load(_byte_level(), tmp_path)
    with pytest.raises(MixtralError, match="no eos_token: none of <gone> is in the vocabulary"):
        _load(_byte_level("<s>"), tmp_path, {"eos_token": "<gone>"})


def test_another_kind(tmp_path: Path) -> None:
    fast = FastTokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    fast.decoder = decoders.WordPiece()
    with pytest.raises(MixtralError, match=r"only byte-level, .* Metaspace .* not a WordPiece .*'WordPiece'"):
        _load(fast, tmp_path)
    with pytest.raises(MixtralError, match="only byte-level, byte-fallback and Metaspace"):
        _load(FastTokenizer(models.WordLevel({"a": 0}, unk_token="a")), tmp_path)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"model": 1}', b"\xff\xfe", b"[]"])
def test_a_damaged_file(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    reason = "(damaged or not a tokenizer.json|not JSON|not UTF-8|must hold a JSON object)"
    with pytest.raises(MixtralError, match=rf"tokenizer.json: {reason}[^\n]*$"):
        load_tokenizer(tmp_path)
