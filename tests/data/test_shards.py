"""Preparing: the same shards whatever the workers and interruptions, damage detected, the split stable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mixtral.data.shards import prepare
from mixtral.data.sources import Source
from mixtral.data.store import NO_TARGET, TokenData
from mixtral.data.writer import Progress, encoder, token_dtype
from mixtral.errors import DataError, MixtralError, UsageError
from tests.data.byte_tokenizer import ByteTokenizer, ThreadTeller

TEXTS = [f"document {number} " + "x" * (number % 7) for number in range(60)]
Write = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".npy"}


def texts_of(data: TokenData, split: str) -> list[str]:
    """Every document decoded, which also checks BOS and EOS."""
    found = []
    documents = data.documents(split)
    for number in range(len(documents.length_M)):
        tokens = documents.tokens(number)
        assert tokens[0] == ByteTokenizer.bos_id and tokens[-1] == ByteTokenizer.eos_id
        found.append(bytes(int(token) - 3 for token in tokens[1:-1]).decode())
    return found


def test_every_document_once_on_one_side(tmp_path: Path, jsonl: Write, tokenizer: ByteTokenizer) -> None:
    source = Source(str(jsonl("a", [*TEXTS, TEXTS[3], "  "])))
    data = prepare([source], tokenizer, tmp_path / "p", val_share=0.2, shard_bytes=200)
    train, val = texts_of(data, "train"), texts_of(data, "val")
    assert sorted(train + val) == sorted(TEXTS)
    assert 3 <= len(val) <= 25
    assert len(data.index.shards["train"]) > 3
    summary = data.summary()
    assert summary["duplicates"] == 1 and summary["train"]["documents"] == len(train)
    assert summary["train"]["text_bytes"] == sum(map(len, train))
    assert summary["sources"][0]["train_tokens"] == sum(len(text) + 2 for text in train)
    # The side depends on the text alone: it stays when the corpus grows.
    more = Source(str(jsonl("b", [f"more {number}" for number in range(50)])))
    grown = prepare([more, source], tokenizer, tmp_path / "q", val_share=0.2)
    assert set(val) <= set(texts_of(grown, "val")) and set(train) <= set(texts_of(grown, "train"))
    other = prepare([source], tokenizer, tmp_path / "r", val_share=0.2, seed=1)
    assert set(texts_of(other, "val")) != set(val)


def test_one_document_is_always_held_out(tmp_path: Path, jsonl: Write, tokenizer: ByteTokenizer) -> None:
    data = prepare([Source(str(jsonl("a", TEXTS[:5])))], tokenizer, tmp_path / "p", val_share=1e-9)
    assert len(texts_of(data, "val")) == 1 and len(texts_of(data, "train")) == 4
    alone = prepare([Source(str(jsonl("b", TEXTS[:1])))], tokenizer, tmp_path / "q", val_share=1e-9)
    assert len(texts_of(alone, "train")) == 1
    with pytest.raises(DataError, match="no val documents"):
        alone.documents("val")


def test_workers_change_nothing(tmp_path: Path, jsonl: Write, tokenizer: ByteTokenizer) -> None:
    source = Source(str(jsonl("a", TEXTS)))
    for workers in (1, 2):
        prepare([source], tokenizer, tmp_path / str(workers), val_share=0.1, shard_bytes=300, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_each_of_several_workers_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "4")  # as the workers inherit them
    with encoder(ThreadTeller(), 2) as encode:
        found = [tokens.tolist() for tokens, _ in encode([["a"], ["b", "c"]])]
    assert found == [[1, 1], [1, 1, 1, 1]]


def test_interrupted_it_goes_on(tmp_path: Path, jsonl: Write, tokenizer: ByteTokenizer) -> None:
    source = Source(str(jsonl("a", TEXTS)))
    whole = prepare([source], ByteTokenizer(), tmp_path / "whole", val_share=0.1, shard_bytes=200)
    told: list[Progress] = []

    def kill(progress: Progress) -> None:
        told.append(progress)
        if len(told) == 3:
            raise KeyboardInterrupt

    folder = tmp_path / "p"
    with pytest.raises(KeyboardInterrupt):
        prepare([source], tokenizer, folder, val_share=0.1, shard_bytes=200, progress=kill)
    with pytest.raises(DataError, match="no prepared data here"):
        TokenData(folder, tokenizer)
    damaged = sorted(folder.glob("train-00000-*.npy"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")  # a finished shard that rotted is made again
    tokenizer.calls = 0
    prepare([source], tokenizer, folder, val_share=0.1, shard_bytes=200)
    shards = sum(map(len, whole.index.shards.values()))
    assert tokenizer.calls == shards - 1  # two were finished, one of them damaged
    assert contents(folder) == contents(tmp_path / "whole")


def test_same_inputs_are_only_opened(tmp_path: Path, jsonl: Write, tokenizer: ByteTokenizer) -> None:
    path = jsonl("a", TEXTS)
    prepare([Source(str(path))], tokenizer, tmp_path / "p")
    tokenizer.calls = 0
    again = prepare([Source(str(path), weight=2.0)], tokenizer, tmp_path / "p")
    assert tokenizer.calls == 0 and again.weights == [2.0]
    path.write_text(path.read_text() + '{"text": "one more"}\n')
    changed = prepare([Source(str(path))], tokenizer, tmp_path / "p")
    assert tokenizer.calls and "one more" in texts_of(changed, "train") + texts_of(changed, "val")
    named = {name for shards in changed.index.shards.values() for shard in shards for name in shard.files}
    assert set(contents(tmp_path / "p")) == named  # what the old inputs gave is gone


def test_what_is_no_shard_is_kept_whatever_its_name(tmp_path: Path, jsonl: Write, tokenizer: ByteTokenizer) -> None:
    """Shards of other inputs go, those left by a kill before their record too."""
    source = Source(str(jsonl("a", [f"text {i}" for i in range(9)])))
    folder = tmp_path / "data"
    prepare([source], tokenizer, folder, seed=1)
    next(folder.glob("train-*[0-9a-f].json")).unlink()
    old = {path.name for path in folder.iterdir()} - {"index.json"}
    name = "train-00000-0123456789ab"
    (folder / f"{name}.npy").write_text("precious")
    np.save(folder / f"{name}.docs.npy", np.zeros((2, 4)))
    (folder / f"{name}.json").write_text('{"name": "mine"}')
    (folder / "val-00000-0123456789ab.npy").mkdir()
    (folder / "val-00000-0123456789ab.docs.npy").symlink_to(folder / f"{name}.docs.npy")
    before = {path.name for path in folder.iterdir()} - old
    other = Source(str(jsonl("b", [f"other {i}" for i in range(9)])))
    prepare([other], tokenizer, folder, seed=1)
    after = {path.name for path in folder.iterdir()}
    assert before <= after and not old & after and (folder / f"{name}.npy").read_text() == "precious"


def test_a_failed_preparation_leaves_the_old_one(tmp_path: Path, jsonl: Write, tokenizer: ByteTokenizer) -> None:
    path = jsonl("a", TEXTS)
    before = texts_of(prepare([Source(str(path))], tokenizer, tmp_path / "p"), "train")
    path.write_text(path.read_text() + "broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 61: not JSON"):
        prepare([Source(str(path))], tokenizer, tmp_path / "p")
    assert texts_of(TokenData(tmp_path / "p", tokenizer), "train") == before
    skipping = prepare([Source(str(path))], tokenizer, tmp_path / "p", skip_bad=True)
    assert skipping.summary()["skipped"] == 1


def test_damage_is_detected(make_data: Callable[..., TokenData], tokenizer: ByteTokenizer) -> None:
    folder = make_data(TEXTS).folder
    path = sorted(folder.glob("train-00001-*.docs.npy"))[0]
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"\x01")
    TokenData(folder, tokenizer)  # the size is right: only `verify` reads everything
    with pytest.raises(DataError, match=r"train-00001-.*damaged, its checksum differs"):
        TokenData(folder, tokenizer, verify=True)
    path.write_bytes(good[:-1])
    with pytest.raises(DataError, match=r"\d+ bytes instead of \d+"):
        TokenData(folder, tokenizer)
    path.unlink()
    with pytest.raises(DataError, match="a shard of the prepared data is missing"):
        TokenData(folder, tokenizer)


def test_foreign_index_and_tokenizer(make_data: Callable[..., TokenData], tokenizer: ByteTokenizer) -> None:
    folder = make_data(TEXTS).folder
    with pytest.raises(DataError, match="prepared with tokenizer bytes, not with this other"):
        TokenData(folder, ByteTokenizer("other"))
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format": 0}))
    with pytest.raises(DataError, match="format 0, not 1"):
        TokenData(folder, tokenizer)
    (folder / "index.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="not an index of prepared data"):
        TokenData(folder, tokenizer)


def test_refusals(tmp_path: Path, jsonl: Write, tokenizer: ByteTokenizer) -> None:
    source = Source(str(jsonl("a", TEXTS)))
    with pytest.raises(UsageError, match="no source given"):
        prepare([], tokenizer, tmp_path / "p")
    with pytest.raises(UsageError, match=r"val_share must lie in \[0, 1\), not 1"):
        prepare([source], tokenizer, tmp_path / "p", val_share=1)
    with pytest.raises(UsageError, match="workers must be at least 1"):
        prepare([source], tokenizer, tmp_path / "p", workers=0)
    with pytest.raises(UsageError, match="give every one a weight, or none"):
        prepare([source, Source(source.name, 2.0)], tokenizer, tmp_path / "p")
    with pytest.raises(DataError, match="no text to train on"):
        prepare([Source(str(jsonl("empty", ["", " "])))], tokenizer, tmp_path / "p")


@pytest.mark.parametrize("content", [b'{"title": "of my book"}', b"[]", b"\xff not JSON", b""])
def test_an_index_of_something_else_is_kept(tmp_path: Path, jsonl: Write, tokenizer: ByteTokenizer,
                                            content: bytes) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "index.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"index\.json: not an index of prepared data; remove it, or name another"):
        prepare([Source(str(jsonl("a", TEXTS)))], tokenizer, tmp_path / "p")
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["index.json"]
    assert (tmp_path / "p" / "index.json").read_bytes() == content


def test_pairs_cross_no_document(make_data: Callable[..., TokenData]) -> None:
    data = make_data(["ab", "c"])
    ((inputs_N, targets_N),) = data.pairs("train")
    assert inputs_N.tolist() == [1, 100, 101, 2, 1, 102, 2]
    assert targets_N.tolist() == [100, 101, 2, NO_TARGET, 102, 2, NO_TARGET]


def test_token_dtype() -> None:
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32


def test_unwritable_folder(tmp_path: Path, jsonl: Write, tokenizer: ByteTokenizer) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(MixtralError, match="cannot write"):
        prepare([Source(str(jsonl("a", TEXTS)))], tokenizer, tmp_path / "file" / "p")


@pytest.mark.parametrize(
    ("suffix", "change", "reason"),
    [
        (".npy", lambda array: array.astype(np.float64), "not what the index says"),
        (".npy", lambda array: array[:-1], "not what the index says"),
        (".npy", lambda array: array[None], "not what the index says"),
        (".docs.npy", lambda table: table[:, :2], "not what the index says"),
        (".docs.npy", lambda table: table * [1, 9, 1] + [0, 1, 0], "not what the index says"),  # no such source
        (".docs.npy", lambda table: table * [-1, 1, 1], "not what the index says"),
        (".docs.npy", lambda table: np.array([{"a": 1}] * len(table)), "damaged"),  # would want pickle
    ],
)
def test_arrays_that_are_not_what_the_index_says(
    make_data: Callable[..., TokenData], suffix: str, change: Callable[[np.ndarray], np.ndarray], reason: str
) -> None:
    data = make_data(["a text", "another text"])
    record = json.loads((data.folder / "index.json").read_text())
    shard = record["shards"]["train"][0]
    file = data.folder / f"{shard['name']}{suffix}"
    np.save(file, change(np.load(file)), allow_pickle=True)
    shard["files"][file.name][0] = file.stat().st_size
    (data.folder / "index.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=reason):
        TokenData(data.folder, ByteTokenizer())


def test_a_header_of_an_array_that_promises_more_than_the_file_has(make_data: Callable[..., TokenData]) -> None:
    data = make_data(["a text"])
    file = data.folder / f"{data.index.shards['train'][0].name}.docs.npy"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"(1, 3), }" + b" " * 10, b"(10000000000, 3), }"))
    assert file.stat().st_size == len(content) and file.read_bytes() != content
    with pytest.raises(DataError, match="damaged"):
        TokenData(data.folder, ByteTokenizer())
