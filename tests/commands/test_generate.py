from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtral import engine
from mixtral.engine import Generation, Piece, SamplingParams, generate
from mixtral.lm import load
from tests.commands.conftest import Run

DRAW = ("--temperature", "1", "--max-tokens", "12")


def test_greedy_text_is_the_library_s(run: Run, folder: Path) -> None:
    code, out, err = run("generate", "--model", folder, "--prompt", "To be", "--max-tokens", "12")
    assert code == 0 and out == load(folder).generate("To be", max_tokens=12) + "\n"
    assert err.startswith("[12 tokens; prompt of ") and "tokens/s]" in err


class Given:
    """A stream of these pieces."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[Piece]:
        return iter(self.pieces)

    def results(self) -> list[Generation]:
        text = "".join(p.text for p in self.pieces)
        return [Generation([p.token for p in self.pieces], [-1.0] * len(self.pieces), text, "length")]


def test_on_a_terminal_control_characters_are_escaped(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [Piece(0, 65, -1.0, "a\x1b[2J", None), Piece(0, 66, -1.0, "b\n", "length")]
    monkeypatch.setattr(engine.Engine, "stream", lambda *_, **__: Given(pieces))
    ask = ("generate", "--model", folder, "--prompt", "To be", "--n")
    assert run(*ask, "1").out == "a\x1b[2Jb\n\n"
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout.isatty", lambda: True)
        for number in ("1", "2"):
            assert r"a\x1b[2Jb" + "\n" in run(*ask, number).out


def test_the_folder_says_how_to_draw_unless_one_says_oneself(run: Run, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file, ask = tmp_path / "model/generation_config.json", ("generate", "--model", tmp_path / "model", "--prompt", "To")
    greedy = run(*ask, "--max-tokens", "12").out
    drawn = run(*ask, *DRAW, "--top-k", "7", "--seed", "1").out
    file.write_text('{"do_sample": true, "temperature": 1.0, "top_k": 7, "max_new_tokens": 5, "eos_token_id": 2}')
    assert run(*ask, "--max-tokens", "12", "--seed", "1").out == drawn != greedy
    assert run(*ask, "--max-tokens", "12", "--seed", "1", "--temperature", "0").out == greedy
    assert run(*ask, "--max-tokens", "12", "--seed", "1", "--top-k", "1").out == greedy
    file.write_text('{"do_sample": false, "temperature": 1.0}')
    assert run(*ask, "--max-tokens", "12").out == greedy
    file.write_text('{"do_sample": true, "top_p": 3}')
    code, out, err = run(*ask)
    assert code != 0 and out == "" and "generation_config.json: sampling: top_p must be above 0 and at most 1" in err


def test_the_folder_says_whether_there_is_a_begin_unless_one_says_oneself(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    ask = ("generate", "--prompt", "To be", "--max-tokens", "12", "--json")
    with_it, without = ([json.loads(run(*ask, "--model", place, *option).out)["tokens"] for place, option in cases]
                        for cases in ([(folder, ()), (folder, ("--bos",))], [(folder, ("--no-bos",))]))  # fmt: skip
    assert with_it[0] == with_it[1] != without[0]
    document = json.loads((tmp_path / "model/tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(document))
    for option, wanted in (((), without), (("--no-bos",), without), (("--bos",), with_it)):
        assert json.loads(run(*ask, "--model", tmp_path / "model", *option).out)["tokens"] == wanted[0]


OPTIONS: dict[str, Any] = {
    "min_tokens": 3, "temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.8,
    "repetition_penalty": 1.4, "no_repeat_ngram_size": 1, "suppress_tokens": [65, 66], "seed": 3, "max_tokens": 10,
}  # fmt: skip


def test_every_option_reaches_the_engine(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingParams] = []
    piece = Piece(0, 65, -1.0, "a", "length")
    monkeypatch.setattr(engine.Engine, "stream", lambda _, __, params, **___: seen.append(params) or Given([piece]))
    for name, value in OPTIONS.items():
        values = value if isinstance(value, list) else [value]
        given = [text for v in values for text in (f"--{name.replace('_', '-')}", str(v))]
        assert run("generate", "--model", folder, "--prompt", "To be", *given).code == 0
        assert seen.pop() == SamplingParams(**{name: value})


def test_command_line_and_python_follow_the_folder_alike(run: Run, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    free = load(folder).generate("To be", max_tokens=12)
    (tmp_path / "model/generation_config.json").write_text(json.dumps({
        "do_sample": True, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "max_new_tokens": 12, "top_p": 0.9,
        "stop_strings": [free[6:8]], "num_beams": 4, "eos_token_id": 2,
    }))  # fmt: skip
    lm = load(tmp_path / "model")
    ask = ("generate", "--model", tmp_path / "model", "--prompt", "To be")
    for given in ({"seed": 1}, {"seed": 2, "temperature": 0.0}, {"seed": 3, "max_tokens": 3}, {"seed": 1, "top_k": 1}):
        options = [text for name, v in given.items() for text in (f"--{name.replace('_', '-')}", str(v))]
        assert run(*ask, *options).out == lm.generate("To be", **given) + "\n"
        assert "".join(lm.stream("To be", **given)) == lm.generate("To be", **given)
    plain = SamplingParams(max_tokens=12, repetition_penalty=1.2, no_repeat_ngram_size=2, stop=(free[6:8],))
    ids = lm.tokenizer.encode("To be")
    [wanted] = generate(lm.runner, [ids], plain, tokenizer=lm.tokenizer)
    assert lm.generate("To be", temperature=0) == wanted.text


def test_a_folder_may_rule_out_tokens_beyond_its_vocabulary(run: Run, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    lm = load(folder)
    [first, *_] = lm.generate(lm.tokenizer.encode("To be"), max_tokens=1)
    rules = {"suppress_tokens": [first, 320], "begin_suppress_tokens": [999], "bad_words_ids": [[320], [first, 320]]}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(rules))
    wanted = lm.generate("To be", max_tokens=12, suppress_tokens=[first])
    assert wanted != lm.generate("To be", max_tokens=12)
    assert load(tmp_path / "model").generate("To be", max_tokens=12) == wanted
    got = run("generate", "--model", tmp_path / "model", "--prompt", "To be", "--max-tokens", "12")
    assert (got.code, got.out) == (0, wanted + "\n")


def test_what_the_folder_asks_for_and_is_not_applied_is_told(
    run: Run, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"num_beams": 4, "eos_token_id": 2, "fou": 1}')
    assert run("generate", "--model", tmp_path / "model", "--prompt", "To be", "--max-tokens", "2").code == 0
    [record] = caplog.records
    assert record.message.endswith("generation_config.json: not applied: num_beams 4; unknown: fou")


def test_a_seed_repeats(run: Run, folder: Path) -> None:
    texts = [run("generate", "--model", folder, "--prompt", "To be", *DRAW, "--seed", s).out for s in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_json(run: Run, folder: Path) -> None:
    asked = ("--prompt", "To be", "--json", "--max-tokens", "12", "--routing")
    code, out, err = run("generate", "--model", folder, *asked)
    told = json.loads(out)
    assert code == 0 and err == "" and told["prompt"] == "To be"
    assert told["text"] == load(folder).generate("To be", max_tokens=12)
    assert len(told["tokens"]) == 12 and told["finish_reason"] == "length" and told["prompt_tokens"] > 0
    assert told["timing"]["tokens_per_second"] > 0
    assert len(told["routing"]) == 2 and all(sum(load) == pytest.approx(1, abs=1e-5) for load in told["routing"])


def test_k_experts_a_token(run: Run, folder: Path) -> None:
    asked = ("generate", "--model", folder, "--prompt", "To be", "--max-tokens", "12")
    code, out, _ = run(*asked, "--k", "1")
    lm = load(folder)
    ids = lm.tokenizer.encode("To be")
    (want,) = generate(lm.runner, [ids], SamplingParams(max_tokens=12), tokenizer=lm.tokenizer, k=1, keep_routing=True)
    assert code == 0 and out == want.text + "\n"
    assert all((layer.experts_TK >= 0).sum(-1).eq(1).all() for layer in want.routing)
    told = [json.loads(run(*asked, "--json", "--routing", *k).out) for k in (("--k", "1"), ())]
    assert told[0]["routing"] != told[1]["routing"] and told[0]["text"] == want.text
    code, _, err = run(*asked, "--k", "99")
    assert code == 2 and "--k must lie in 1..4" in err


def test_several_continuations(run: Run, folder: Path) -> None:
    command = ("generate", "--model", folder, "--prompt", "To be", *DRAW, "--seed", "1", "--n", "3")
    texts = [json.loads(line)["text"] for line in run(*command, "--json").out.splitlines()]
    assert len(set(texts)) == 3
    out = run(*command).out
    assert all(f"--- {i} of 3 ---\n{text}" in out for i, text in enumerate(texts, start=1))


def test_stop_ends_the_text(run: Run, folder: Path) -> None:
    whole = load(folder).generate("To be", max_tokens=12)
    asked = ("--prompt", "To be", "--json", "--stop", whole[4:6], "--stop", "never")
    told = json.loads(run("generate", "--model", folder, *asked).out)
    assert told["finish_reason"] == "stop" and told["text"] == whole[: whole.index(whole[4:6])]


def test_prompt_from_standard_input(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("To be\n"))
    assert json.loads(run("generate", "--model", folder, "--prompt", "-", "--json").out)["prompt"] == "To be"


def test_routing_table_follows_the_text(run: Run, folder: Path) -> None:
    out = run("generate", "--model", folder, "--prompt", "To be", "--max-tokens", "4", "--routing").out
    assert "Routing of " in out and out.index("layer 0 ") > 0
    assert "first choice" not in out  # without colours that says nothing


def test_routing_in_colour(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = run("generate", "--model", folder, "--prompt", "To be", "--max-tokens", "4", "--routing").out
    assert "first choice: " in out and all(f"layer {number}" in out for number in (0, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "missing", "--prompt", "x"], "missing: no such file or folder"),
        (["--model", ".", "--prompt", "x"], "config.json"),
        (["--model", "{folder}", "--prompt", "to be " * 64], "do not fit the model's context of 64"),
        (["--model", "{folder}", "--prompt", "x", "--temperature", "-1"], "--temperature must be a number of at least"),
        (["--model", "{folder}", "--prompt", "x", "--max-tokens", "0"], "mixtral: --max-tokens must be a positive int"),
        (["--model", "{folder}", "--prompt", "x", "--dtype", "bf17"], "unknown name 'bf17'; did you mean"),
        (["--model", "{folder}", "--prompt", "x", "--device", "tpu"], "device: unknown name 'tpu'"),
        (["--model", "{dense}", "--prompt", "x", "--routing"], "--routing: this model is dense"),
        (["--model", "{folder}", "--prompt", "x", "--stop", ""], "--stop must be one or more texts that are not empty"),
        (["--model", "{folder}", "--prompt", "x", "--k", "5"], "--k must lie in 1..4 (the model's experts), not 5"),
        (["--model", "{dense}", "--prompt", "x", "--k", "2"], "--k must lie in 1..1 (the model's experts), not 2"),
        (["--model", "{folder}", "--prompt", "x", "--suppress-tokens", "-1"], "--suppress-tokens must be a list of t"),
        (["--model", "{folder}", "--prompt", "x", "--suppress-tokens", "320"],
         "mixtral: --suppress-tokens: token id 320 is out of range; the model knows ids 0 to 319"),
        (["--model", "{run}", "--prompt", "x"], "is a training run; it has no finished model yet"),
        (["--model", "{folder}/model.safetensors", "--prompt", "x"], "a file of weights; give its folder, {folder}\n"),
        (["--model", "{bare}", "--prompt", "x"], "no tokenizer"),
        (["--model", "{bare}", "--prompt", "x"], "mixtral.load('{bare}').generate([1, 2, 3])"),
        (["--model", "{folder}"], "give a --prompt, or a file of them: --prompts"),
    ],
)
def test_misuse(run: Run, folder: Path, dense_folder: Path, a_run: Path, tmp_path: Path,
                monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    folders = {"folder": folder, "dense": dense_folder, "bare": bare, "run": a_run}
    code, out, err = run("generate", *(a.format(**folders) for a in arguments))
    assert code == 2 and out == "" and err.count("\n") == 1 and message.format(**folders) in err


def test_standard_input_that_is_no_text(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    code, _, err = run("generate", "--model", folder, "--prompt", "-")
    assert code == 2 and "standard input: not UTF-8 text at byte 2" in err


def test_a_truncated_file_is_a_failure(run: Run, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: -100 if file.suffix == ".safetensors" else None])
    code, _, err = run("generate", "--model", tmp_path, "--prompt", "x")
    assert code == 1 and "model.safetensors" in err and err.count("\n") == 1


def test_more_continuations_than_the_memory_holds(run: Run, folder: Path) -> None:
    got = run("generate", "--model", folder, "--prompt", "To be", "--n", "1000000000000")
    assert got.code == 2 and got.out == "" and got.err.count("\n") == 1
    assert "--n 1000000000000: at least " in got.err and "iB of memory are needed, and " in got.err


def test_the_memory_that_n_continuations_need(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache of the prompt, and as many rows of logits, as fit exactly."""
    lm = load(folder, dtype="fp32")
    assert lm.tokenizer is not None
    a_token = 2 * lm.config.n_layers * lm.config.n_kv_heads * lm.config.head_dim
    needed = 4 * (3 * lm.config.vocab_size + len(lm.tokenizer.encode("To be")) * a_token)
    words = ("--model", folder, "--prompt", "To be", "--n", "3", "--max-tokens", "1", "--dtype", "fp32")
    for free, code in ((needed, 0), (needed - 1, 2)):
        monkeypatch.setattr("mixtral.hardware.available_memory_bytes", lambda free=free: free)
        assert run("generate", *words).code == code


def test_routing_without_colour(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR on a terminal: the expert's number stands before each stretch of text."""
    arguments = ("generate", "--model", str(folder), "--prompt", "To be", "--max-tokens", "6", "--routing")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLORTERM", "truecolor")
    coloured = run(*arguments, "--temperature", "0").out
    monkeypatch.setenv("NO_COLOR", "1")
    plain = run(*arguments, "--temperature", "0").out
    assert "48;2;" in coloured and "48;2;" not in plain
    _, _, layers = plain.partition("[number of the expert]")
    assert "[number of the expert]" not in coloured
    assert len(re.findall(r"\[\d\]", layers)) >= 3  # at each layer at least one
