"""The scores of a small model, by hand and against the plain way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from scores import answers, code_score, compressed, exact_match, held_out_code, held_out_tasks, nats, windows

from mixtral.data.corpora import Task
from mixtral.data.shards import prepare
from mixtral.data.sources import Source
from mixtral.errors import DataError
from mixtral.lm import LM, load
from mixtral.model import Mixtral, Ragged, initialise
from mixtral.presets import tiny
from mixtral.recipes import recipe
from mixtral.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def lm(corpus: Path) -> LM:
    shape = tiny().replace(vocab_size=320, dim=16, n_heads=2, head_dim=8, n_layers=2, ffn_dim=16)
    model = initialise(Mixtral(shape), torch.Generator().manual_seed(0))
    return LM(model, load_tokenizer(corpus.parent / "tokenizer"))


@pytest.mark.parametrize(("targets", "window"), [(1, 8), (8, 8), (9, 8), (12, 8), (30, 8), (7, 3)])
def test_every_target_counts_once_and_has_half_a_window_before_it(targets: int, window: int) -> None:
    counted = []
    for first, count in windows(targets, window):
        last = min(first + window, targets)
        counted += range(last - count, last)
        assert first == 0 or last - count - first >= window // 2
    assert counted == list(range(targets))


def test_nats_of_a_text_that_fits_one_window(lm: LM) -> None:
    ids = torch.randint(3, 320, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    plain = lm.logits(ids[:-1]).log_softmax(-1)[range(19), ids[1:]].sum()
    assert nats(lm.model, ids, window=64) == pytest.approx(-float(plain), rel=1e-5)


def test_nats_in_windows(lm: LM) -> None:
    ids = torch.randint(3, 320, (11,), generator=torch.Generator().manual_seed(2)).tolist()

    def end(first: int, last: int, count: int) -> float:
        """-log probability of the last `count` of ids[first + 1 : last + 1], read from `first` on."""
        logits_TV = lm.model(Ragged.of([ids[first:last]])).logits
        assert logits_TV is not None
        return -float(logits_TV.log_softmax(-1)[range(last - first), ids[first + 1 : last + 1]][-count:].sum())

    wanted = end(0, 4, 4) + end(2, 6, 2) + end(4, 8, 2) + end(6, 10, 2)
    assert nats(lm.model, ids, window=4) == pytest.approx(wanted, rel=1e-5)


def test_bits_a_byte(lm: LM) -> None:
    assert lm.tokenizer is not None
    text = "def return self"
    expected = nats(lm.model, lm.tokenizer.encode(text, bos=True, eos=True), 64) / math.log(2) / len(text)
    assert code_score(lm, [text, text], window=64) == pytest.approx(expected)


def test_compressors() -> None:
    found = compressed(["abcd" * 500, "abcd" * 500])
    assert set(found) == {"gzip -9", "xz -9", "gzip -9, each file", "xz -9, each file"}
    assert 0 < found["gzip -9"] < found["gzip -9, each file"] < 1 and found["xz -9"] < found["xz -9, each file"]


def test_exact_match() -> None:
    tasks = [Task("sum", "1 + 1", "2"), Task("sum", "1 + 2", "3"), Task("legs", "a cat", "4")]
    assert exact_match(tasks, [" 2", "4", "4 "]) == pytest.approx({"all": 2 / 3, "sum": 0.5, "legs": 1.0})


def test_what_a_run_held_out(lm: LM, corpus: Path, tmp_path: Path) -> None:
    sources = [Source(str(corpus / "train" / f"{name}.jsonl"), domain=name) for name in ("code", "prose")]
    assert lm.tokenizer is not None
    prepare(sources, lm.tokenizer, tmp_path / "data", val_share=0.2)
    texts = held_out_code(tmp_path, lm)
    stored = (corpus / "train" / "code.jsonl").read_text()
    assert texts and all(f'"{text}"' in stored for text in texts)
    prepare(sources[1:], lm.tokenizer, tmp_path / "data", val_share=0.2)
    with pytest.raises(DataError, match="holds out no documents of domain code"):
        held_out_code(tmp_path, lm)


def test_tasks_are_not_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator of ten questions, of which training saw those below five."""
    monkeypatch.setattr("scores.reasoning_tasks", lambda *_: (Task("sum", str(i % 10), "0") for i in range(100)))
    trained = [Source("reasoning-gym")]
    monkeypatch.setattr("scores.documents", lambda source, bad: map(_Text, range(5 if source in trained else 0)))  # noqa: ARG005
    record = {"train": recipe("tiny").replace(data=("reasoning-gym",)).to_dict()}  # `begin` wants the package
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(record))
    assert [task.question for task in held_out_tasks(tmp_path / "run", 5)] == ["5", "6", "7", "8", "9"]


class _Text:
    def __init__(self, number: int) -> None:
        self.text = f"{number}\n0"


def test_answers_are_greedy_and_end_with_their_line() -> None:
    lm, questions = load("mixtral-nano"), ["What is 3 + 4?", "import os"]
    tasks = [Task("", question, "") for question in questions]
    wanted = [lm.generate(f"{question}\n", max_tokens=24, temperature=0, stop="\n") for question in questions]
    assert answers(lm, tasks) == wanted
