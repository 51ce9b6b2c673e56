"""`mixtral score`: log-probabilities against one plain pass of the model."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch

import mixtral
from mixtral.engine import score as module
from tests.commands.conftest import Run


def scored(run: Run, *arguments: object) -> list[dict[str, object]]:
    done = run("score", *map(str, arguments))
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_texts(run: Run, folder: Path, tmp_path: Path) -> None:
    texts = ["To be, or not", "def add(a, b):"]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts) + "\n")
    lm = mixtral.load(folder)
    assert lm.tokenizer is not None
    for line, text in zip(scored(run, tmp_path / "texts.txt", "--model", folder, "--logprobs"), texts, strict=True):
        ids = lm.tokenizer.encode(text, eos=False)
        wanted = lm.logits(ids).log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (line["text"], line["tokens"], line["token_ids"]) == (text, len(ids) - 1, ids[1:])
        torch.testing.assert_close(torch.tensor(line["logprobs"]), wanted, rtol=0, atol=1e-5)
        assert line["logprob"] == pytest.approx(float(wanted.sum()), abs=1e-4)
        assert line["bits_per_byte"] == pytest.approx(-float(wanted.sum()) / math.log(2) / len(text.encode()), rel=1e-5)


def test_a_continuation_counts_alone(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        {"text": "To be, or not"}, {"prompt": "To be,", "continuation": " or not"},
        {"prompt": "", "continuation": "To"},
    ]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, lines))))
    whole, pair, alone = scored(run, "-", "--model", folder, "--logprobs")
    assert pair["prompt"] == "To be," and 0 < pair["tokens"] < whole["tokens"]
    assert pair["logprobs"] == whole["logprobs"][-pair["tokens"] :]
    assert alone["tokens"] >= 1


def test_what_was_generated_has_the_log_probabilities_that_it_had_then(folder: Path) -> None:
    lm = mixtral.load(folder)
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode("To be", eos=False)
    made = lm.complete([ids], max_tokens=9, temperature=1.0, seed=3)[0][0]
    assert module.score(lm.engine, [*ids, *made.tokens])[len(ids) - 1 :] == made.logprobs


def test_fewer_experts(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("To be, or not to be")
    (one,), (two,) = (scored(run, tmp_path / "t.txt", "--model", folder, "--k", k) for k in (1, 2))
    assert one["logprob"] != two["logprob"]


@pytest.mark.parametrize(("bad", "message"), [
    ('{"prompt": "a"}', "a text is wanted"), ('{"text": 5}', "a text is wanted"), ("[]", "a JSON object is wanted"),
    ('{"text": ""}', "nothing to score: a text of two tokens or more is wanted"),
    (json.dumps({"text": "word " * 400}), "text: 1602 tokens do not fit the model's context"),
])  # fmt: skip
def test_a_line_that_is_wrong(bad: str, message: str, run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "To be"}\n' + bad + "\n")
    code, out, err = run("score", str(tmp_path / "t.jsonl"), "--model", str(folder))
    assert code == 2 and out == "" and f"t.jsonl, line 2: {message}" in err and err.count("\n") == 1
    assert len(scored(run, tmp_path / "t.jsonl", "--model", folder, "--skip-bad")) == 1
