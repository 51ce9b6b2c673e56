"""Every kind of tokenizer that is read, as a folder made in a moment, and what is to be expected of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from mixtral.tokenizer import Tokenizer, load_tokenizer
from mixtral.tokenizer.gguf import read_metadata, side_files, tokenizer_metadata
from tests.tokenizer.conftest import FILES, NAMES, STDLIB, tokenizer_named

MODEL = {"model_type": "mixtral"}  # beside it, transformers takes the classes that it has for Mixtral
SPECIAL = ("<unk>", "<s>", "</s>")
IM_END = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
          "special": True}  # fmt: skip
TAG = IM_END | {"content": "<tag>", "special": False}
BYTE_TOKENS = [f"<0x{i:02X}>" for i in range(256)]


class Kind(NamedTuple):
    make: Callable[[Path], None]  # writes the folder
    back: Callable[[str], str]  # the text that comes back of a text
    auto: bool = True  # transformers' AutoTokenizer reads it, and rightly


def _same(text: str) -> str:
    return text


def _marks(text: str) -> str:
    """U+2581 stands for the space inside tokens, and comes back as one."""
    return text.replace("▁", " ")


def _one_space_less(text: str) -> str:
    """The encoder begins a text with a space unless it has one: "a" and " a" are the same to it."""
    return text.removeprefix(" ")


def _space_in_token(text: str) -> str:
    """A token that is `normalized`, as those of added_tokens.json are, is looked for with the space before it."""
    return _marks(text).replace(" <tag>", "<tag>")


def _marks_and_one_space_less(text: str) -> str:
    return _one_space_less(_marks(text))


def write(folder: Path, **files: Any) -> None:
    """config.json, and others: JSON values, bytes or texts; "__" in a name stands for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in {"config__json": MODEL, **files}.items():
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        (folder / name.replace("__", ".")).write_bytes(content)


def mistral_file(name: str) -> Callable[[Path], None]:
    """A file of Mistral's alone, under the name that Mistral gives it."""

    def make(folder: Path) -> None:
        write(folder)
        shutil.copyfile(FILES / NAMES[name], folder / (f"tokenizer.model.{name}" if name[0] == "v" else "tekken.json"))

    return make


def saved(name: str) -> Callable[[Path], None]:
    """What `save` writes of a tokenizer."""

    def make(folder: Path) -> None:
        write(folder)
        tokenizer_named(name).save(folder)

    return make


def trained(fast: FastTokenizer, trainer: trainers.Trainer, **config: Any) -> Callable[[Path], None]:
    """A tokenizer.json that the tokenizers library learns."""

    def make(folder: Path) -> None:
        texts = [(STDLIB / file).read_text() for file in ("ast.py", "json/decoder.py")]
        fast.train_from_iterator(texts, trainer)
        if fast.post_processor is None and config.pop("bos", False):
            fast.post_processor = processors.TemplateProcessing(
                single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)])  # fmt: skip
        write(folder, tokenizer__json=fast.to_str().encode(), tokenizer_config__json=config)

    return make


def byte_level(prefix: bool = False, **config: Any) -> Callable[[Path], None]:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    return trained(fast, trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False), **config)  # fmt: skip


def metaspace(scheme: str, **config: Any) -> Callable[[Path], None]:
    fast = FastTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return trained(fast, trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL, *BYTE_TOKENS], show_progress=False), **config)  # fmt: skip


def llama_style(**config: Any) -> Callable[[Path], None]:
    """As transformers writes Llama's and Mixtral's: the space comes from a normalizer, and is stripped again."""
    fast = FastTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # fmt: skip

    def make(folder: Path) -> None:
        fast.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # a whole line would be learnt as one word
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *BYTE_TOKENS], show_progress=False)
        trained(fast, trainer, **config)(folder)
        document = json.loads((folder / "tokenizer.json").read_bytes()) | {"pre_tokenizer": None}
        document["added_tokens"] = document["added_tokens"][:3]  # bytes are ordinary tokens there
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return make


def with_added(where: str) -> Callable[[Path], None]:
    """The own sentencepiece model with two tokens more, of which one is special, said in one of four ways."""

    def make(folder: Path) -> None:
        own = tokenizer_named("own")
        size = own.vocab_size
        config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
        files = dict(own._files())
        write(folder, tokenizer__model=files["own.model.v3"])
        if where == "added_tokens_decoder":
            config["added_tokens_decoder"] = {str(size): IM_END, str(size + 1): TAG}
        if where == "added_tokens.json":
            write(folder, added_tokens__json={"<|im_end|>": size, "<tag>": size + 1})
        if "tokenizer.json" in where:
            fast = FastTokenizer.from_str(files["tokenizer.json"].decode())
            if where == "tokenizer.json":
                fast.add_tokens([AddedToken(**IM_END), AddedToken(**TAG)])
            else:
                config["added_tokens_decoder"] = {str(size): IM_END, str(size + 1): TAG}
            write(folder, tokenizer__json=fast.to_str().encode())
        write(folder, tokenizer_config__json=config)

    return make


KINDS = {
    "v1 alone": Kind(mistral_file("v1"), _marks, auto=False),
    "v2 alone": Kind(mistral_file("v2"), _marks, auto=False),
    "v3 alone": Kind(mistral_file("v3"), _marks, auto=False),
    "tekken": Kind(mistral_file("tekken"), _same),
    "v1 saved": Kind(saved("v1"), _marks),
    "v3 saved": Kind(saved("v3"), _marks),
    "own saved": Kind(saved("own"), _marks),
    "small tekken saved": Kind(saved("small-tekken"), _same),
    "byte-level": Kind(byte_level(), _same),
    "byte-level framed": Kind(byte_level(bos=True), _same),
    "byte-level prefix": Kind(byte_level(prefix=True), _one_space_less),
    "metaspace first": Kind(metaspace("first", bos=True), _marks_and_one_space_less),
    "metaspace always": Kind(metaspace("always"), _marks_and_one_space_less),
    "metaspace never": Kind(metaspace("never"), _marks),
    "llama style": Kind(llama_style(bos=True), _marks),
    "llama style, no BOS": Kind(llama_style(add_bos_token=True), _marks),  # transformers does not look at the flag
    "added, tokenizer.json": Kind(with_added("tokenizer.json"), _marks),
    "added, tokenizer.json and config": Kind(with_added("tokenizer.json and config"), _marks),
    "added, added_tokens_decoder": Kind(with_added("added_tokens_decoder"), _marks, auto=False),
    "added, added_tokens.json": Kind(with_added("added_tokens.json"), _space_in_token, auto=False),
}
GGUF = ("v1 alone", "v3 alone", "own saved", "added, tokenizer.json", "added, added_tokens.json")


def check(name: str, folder: Path, lines: list[str]) -> tuple[str, int, int]:
    """-> (what its ids were held to, lines whose ids differ from that, lines whose text does not come back)."""
    kind, tokenizer = KINDS[name], load_tokenizer(folder)
    ours = tokenizer.encode_batch(lines)
    if kind.auto:
        oracle, expected = "AutoTokenizer", auto_ids(folder, lines)
    else:  # transformers cuts the text of a bare tokenizer.model wrongly
        oracle, expected = "sentencepiece", sentencepiece_ids(folder, lines)
        for number in [i for i, line in enumerate(lines) if "<tag>" in line]:
            expected[number] = ours[number]  # the library knows no added tokens
    other_ids = sum(mine != theirs for mine, theirs in zip(ours, expected, strict=True))
    other_texts = sum(tokenizer.decode(ids) != kind.back(line) for ids, line in zip(ours, lines, strict=True))
    return oracle, other_ids, other_texts


def check_gguf(name: str, folder: Path, lines: list[str]) -> tuple[str, int, int]:
    """The same of the tokenizer that comes back from GGUF, held to the one that went there."""
    tokenizer = load_tokenizer(folder)
    back = by_way_of_gguf(tokenizer, folder)
    pairs = list(zip(tokenizer.encode_batch(lines), back.encode_batch(lines), strict=True))
    texts = sum(back.decode(ids) != KINDS[name].back(line) for (_, ids), line in zip(pairs, lines, strict=True))
    return "the folder's", sum(mine != theirs for mine, theirs in pairs), texts


def auto_ids(folder: Path, lines: list[str]) -> list[list[int]]:
    """transformers' ids, control tokens that are typed in a text left as text."""
    from transformers import AutoTokenizer

    native = (folder / "tekken.json").exists()  # read by mistral-common, which leaves them as text always
    options = {} if native else {"split_special_tokens": True}
    ids: list[list[int]] = AutoTokenizer.from_pretrained(folder, **options)(lines)["input_ids"]
    return ids


def sentencepiece_ids(folder: Path, lines: list[str]) -> list[list[int]]:
    """The library's own ids of a folder's model, <s> before each."""
    model = next(folder.glob("*.model*"))
    processor = SentencePieceProcessor(model_proto=model.read_bytes())
    return [[processor.bos_id(), *ids] for ids in processor.encode(lines)]


def by_way_of_gguf(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer as it comes back from a GGUF file's metadata."""
    return read_metadata(tokenizer_metadata(tokenizer, tokenizer.vocab_size + 3, side_files(folder)))
