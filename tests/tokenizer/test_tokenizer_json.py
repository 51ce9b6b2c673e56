"""A bare tokenizer.json, whoever wrote it."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
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
    with pytest.raises(MixtralError, match=r"no eos_token: none of </s>, .*tokenizer_config\.json"):
        _load(_byte_level("<s>"), tmp_path, {"eos_token": None})


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


def _special(fast: FastTokenizer, *names: str) -> FastTokenizer:
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return fast


def _template(single: str, ids: dict[str, int]) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=list(ids.items()))


BOS, EOS = {"<s>": 258}, {"</s>": 259}
FRAMES = {
    "nothing": (None, (), ()),
    "bos": (_template("<s> $A", BOS), (258,), ()),
    "both": (_template("<s> $A </s>", BOS | EOS), (258,), (259,)),
    "eos alone": (_template("$A </s>", EOS), (), (259,)),
    "two before": (_template("<s> </s> $A", BOS | EOS), (258, 259), ()),
    "byte-level, then bos": (
        processors.Sequence([processors.ByteLevel(trim_offsets=False), _template("<s> $A", BOS)]), (258,), ()),
}  # fmt: skip


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("frame", FRAMES)
def test_the_post_processor_decides(frame: str, config: dict[str, object], tmp_path: Path) -> None:
    """transformers 5 takes add_bos_token out of the configuration where there is a tokenizer.json."""
    fast = _special(_byte_level(), "<s>", "</s>")
    post_processor, before, after = FRAMES[frame]
    if post_processor is not None:
        fast.post_processor = post_processor
    tokenizer = _load(fast, tmp_path, {"bos_token": "<s>", "eos_token": "</s>", **config})
    assert (tokenizer.prefix, tokenizer.suffix) == (before, after)
    assert tokenizer.encode("he") == [*before, 256, *after] and tokenizer.encode("") == [*before, *after]
    assert tokenizer.encode_batch(["he"]) == [tokenizer.encode("he")]
    for bos in (True, False):
        for eos in (True, False):
            assert tokenizer.encode("he", bos, eos) == [258] * bos + [256] + [259] * eos
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert auto(["he", "", "a<s>"], split_special_tokens=True)["input_ids"][:2] == tokenizer.encode_batch(["he", ""])


def test_a_post_processor_that_is_no_frame(tmp_path: Path) -> None:
    fast = _special(_byte_level(), "<s>", "</s>")
    fast.post_processor = _template("<s> $A", {"<s>": 999})
    with pytest.raises(MixtralError, match=r"json: post_processor: turns the tokens \[64\] into \[999, 64\]"):
        _load(fast, tmp_path)


def test_pieces_outside_the_alphabet_of_bytes(tmp_path: Path) -> None:
    """They stand for themselves, as in the library's decoder."""
    fast = FastTokenizer(models.BPE({**{c: i for i, c in enumerate(BYTES)}, "日本": 256, "a日": 257}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = _load(_special(fast, "<s>", "</s>"), tmp_path)
    assert tokenizer.token_bytes(256).decode() == "日本" and tokenizer.decode([257, 256]) == "a日日本"
    assert decoders.ByteLevel().decode(["日本"]) == "日本"


@pytest.mark.parametrize(("scheme", "texts"), [
    ("first", {"a": "a", " a": "a", "  a": " a", "   a b": "  a b", "": ""}),
    ("always", {"a": "a", " a": "a", "  a": " a"}),
    ("never", {"a": "a", " a": " a", "   a": "   a"}),
])
def test_metaspace_keeps_the_spaces_that_it_can(scheme: str, texts: dict[str, str], tmp_path: Path) -> None:
    """The library's decoder drops all spaces of the first token; one is what the encoder put there."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁▁": 6, "▁▁▁": 7, "▁a": 8}
    merges = [("▁", "▁"), ("▁▁", "▁"), ("▁", "a")]
    fast = FastTokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    fast.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = _load(_special(fast, "<unk>", "<s>", "</s>"), tmp_path)
    assert {text: tokenizer.decode(tokenizer.encode(text)) for text in texts} == texts
    assert tokenizer.decode(tokenizer.encode("azb")) == "ab"  # without byte fallback the unknown is lost


@pytest.mark.parametrize("scheme", ["first", "always", "prefix space", "other mark"])
def test_added_tokens_keep_the_spaces_that_are_theirs(scheme: str, tmp_path: Path) -> None:
    """At the begin of a text, and after a token that is found as a whole word alone."""
    fast = _byte_level("<s>", "</s>")
    if scheme == "prefix space":
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        mark = "_" if scheme == "other mark" else "▁"
        vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}, mark: 259, "a": 260}
        fast = FastTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
        prepend = "first" if scheme == "first" else "always"
        fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark, prepend_scheme=prepend)
        fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement=mark)])
        _special(fast, "<s>", "</s>")
    spacey = [AddedToken(name, normalized=False) for name in (" <tag>", "  ", "<b>")]
    fast.add_tokens([*spacey, AddedToken("tag", normalized=False, single_word=True)])
    tokenizer = _load(fast, tmp_path)
    for text in (" <tag>a", "  ", "  a", " <tag> <tag>", "<b> <tag>a", "<b>  a", "<tag>", "tag.", "a tag.a", "<b>a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize("prepend", [True, False])
def test_the_encoder_tells_whether_there_is_a_space_to_take_away(prepend: bool, strip: bool, tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}, "▁": 259, "a": 260}
    fast = FastTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    parts = [normalizers.Prepend("▁")] * prepend + [normalizers.Replace(" ", "▁")]
    fast.normalizer = normalizers.Sequence(parts)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *[decoders.Strip(" ", 1, 0)] * strip])
    tokenizer = _load(_special(fast, "<unk>", "<s>", "</s>"), tmp_path)
    for text in ("a", " a", "  a é", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("decoder", "named"), [
    (decoders.Sequence([decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]), "Strip"),  # of each token
    (decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 0, 1)]), "Strip"),
    (decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip("x", 1, 0)]), "Strip"),
    (decoders.BPEDecoder(), "BPEDecoder"),
    (decoders.CTC(), "CTC"),
    (decoders.Fuse(), "Fuse"),
    (decoders.Sequence([decoders.ByteLevel(), decoders.Metaspace()]), "Metaspace"),
])
def test_decoders_that_are_refused_by_name(decoder: decoders.Decoder, named: str, tmp_path: Path) -> None:
    fast = _special(_byte_level(), "<s>", "</s>")
    fast.decoder = decoder
    with pytest.raises(MixtralError, match=rf"^[^\n]*tokenizer\.json: [^\n]*'{named}'[^\n]*$"):
        _load(fast, tmp_path)


def test_begin_and_end_among_the_ordinary_tokens(tmp_path: Path) -> None:
    """Named, they are control tokens all the same, as in transformers."""
    fast = FastTokenizer(models.BPE({**{c: i for i, c in enumerate(BYTES)}, "<s>": 256, "</s>": 257}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = _load(fast, tmp_path)
    assert tokenizer.control == {256: "<s>", 257: "</s>"} and tokenizer.decode([256, 64, 257]) == "a"
    assert not set(tokenizer.encode("<s>a</s>")) & {256, 257}


def test_it_travels_to_another_process(tmp_path: Path) -> None:
    """The library pickles all but that typed control tokens stay text."""
    tokenizer = _load(_special(_byte_level(), "<s>", "</s>"), tmp_path)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("he</s><s>") == tokenizer.encode("he</s><s>") and not set(copy.encode("</s>")) & {258, 259}
    assert copy.fingerprint == tokenizer.fingerprint


def test_a_decoder_that_does_not_say_its_type(tmp_path: Path) -> None:
    document = json.loads(_byte_level("<s>", "</s>").to_str())
    document["decoder"] = {"pattern": {"String": "_"}, "content": " "}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(MixtralError, match=r"tokenizer\.json: decoder: \{.*\} must be an object with its type"):
        load_tokenizer(tmp_path)


def test_a_text_that_the_vocabulary_cannot_spell(tmp_path: Path) -> None:
    fast = FastTokenizer(models.Unigram([("<s>", 0.0), ("</s>", 0.0), ("▁", -1.0), ("a", -1.0)], None, False))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    document = json.loads(fast.to_str())
    pieces = [*document["model"]["vocab"], *([c, -1.0] for c in "0ethe."), ["\n", -1.0]]
    document["model"]["vocab"] = [list(piece) for piece in dict(pieces).items()]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a")) == "a"
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(MixtralError, match=r"tokenizer\.json: a text that it cannot encode: .*unk_id. is missing"):
            encode("a日")


@pytest.mark.parametrize("key", ["single", "pair"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_post_processor_without_the_ids_of_its_token(
    key: str, inner: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fast = _special(_byte_level(), "<s>", "</s>")
    fast.post_processor = _template("<s> $A", {"<s>": 258})
    document = json.loads(fast.to_str())
    template = document["post_processor"]
    template[key] = [{"SpecialToken": {"id": "[X]", "type_id": 0}}, *template[key]]
    document["post_processor"] = {"type": "Sequence", "processors": [template]} if inner else template
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(MixtralError, match=rf"post_processor\.{key}: '\[X\]' is none of its special_tokens"):
        load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""  # the library's panic is not one line


def test_many_added_tokens_take_no_time(tmp_path: Path) -> None:
    """One by one they take seconds for some thousands, and four times as long for twice as many."""
    fast = _special(_byte_level(), "<s>", "</s>")
    decoder = {str(260 + i): {"content": f"<t{i}>", "special": i % 2 == 0} for i in range(6000)}
    start = time.process_time()
    tokenizer = _load(fast, tmp_path, {"added_tokens_decoder": decoder})
    assert time.process_time() - start < 2
    assert tokenizer.vocab_size == 6260 and tokenizer.encode("a<t5999>") == [*tokenizer.encode("a"), 6259]
    assert tokenizer.control[260] == "<t0>" and 261 not in tokenizer.control
