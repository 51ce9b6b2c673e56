"""`mixtral generate --prompts`: a file of prompts, answered in order, once each, whatever kills it on the way."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mixtral
from tests.commands.conftest import Run

PROMPTS = ["To be", "or not", "that is", "the question", "whether"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:3], "", *PROMPTS[3:]]) + "\n")
    return tmp_path / "prompts.txt"


def test_lines_of_text(run: Run, folder: Path, texts: Path, tmp_path: Path) -> None:
    """Each is answered as it is alone."""
    out = tmp_path / "out.jsonl"
    done = run("generate", "--model", str(folder), "--prompts", str(texts), "--out", str(out), "--max-tokens", "6")
    assert done == (0, "", "")
    lm = mixtral.load(folder)
    assert [line["prompt"] for line in read(out)] == PROMPTS
    for line in read(out):
        alone = lm.complete([line["prompt"]], max_tokens=6)[0][0]
        assert (line["text"], line["tokens"], line["finish_reason"]) == (alone.text, alone.tokens, alone.finish_reason)
        assert line.keys() == {"prompt", "text", "tokens", "finish_reason"}
    again = run("generate", "--model", str(folder), "--prompts", str(texts), "--out", str(out), "--max-tokens", "6")
    assert again == (0, "", f"{out}: 5 of 5 are there; going on\n") and len(read(out)) == 5


def test_json_lines_have_their_own_parameters(run: Run, folder: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "To be", "max_tokens": 2}, {"prompt": [1, 5, 6]}, {"prompt": "To be", "temperature": 1.5, "seed": 4},
        {"prompt": "To be", "k": 1, "max_tokens": 3},
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("generate", "--model", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--max-tokens", "5")
    got = [json.loads(line) for line in run(*arguments, "--logprobs").out.splitlines()]
    assert [line["prompt"] for line in got] == [line["prompt"] for line in lines]
    lm = mixtral.load(folder)
    assert got[0]["tokens"] == lm.complete(["To be"], max_tokens=2)[0][0].tokens
    assert got[1]["tokens"] == lm.generate([1, 5, 6], max_tokens=5)
    assert got[3]["tokens"] == lm.complete(["To be"], max_tokens=3, k=1)[0][0].tokens
    assert got[2]["tokens"] != lm.complete(["To be"], max_tokens=5)[0][0].tokens
    assert all(len(line["logprobs"]) == len(line["tokens"]) for line in got)


def test_standard_input(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "To be"}\n{"prompt": "or"}\n'))
    lines = run("generate", "--model", str(folder), "--prompts", "-", "--max-tokens", "2").out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["To be", "or"]


BAD = [
    ("{", "--skip-bad"), ("[1]", "a JSON object is wanted"), ('{"prompt": 5}', "prompt must be a text or a list of"),
    ('{"prompt": "a", "text": "b"}', "unknown option 'text'"),
    ('{"prompt": "a", "temprature": 1}', "did you mean 'temperature'?"),
    ('{"prompt": "a", "top_p": 2}', "top_p must be above 0 and at most 1, not 2"), ('{"prompt": []}', "prompt: empty"),
    ('{"prompt": [99999]}', "token id 99999 is out of range"), ('{"prompt": "a", "k": 99}', "k: must lie in 1.."),
    ('{"prompt": "a", "k": "1"}', "k must be a number of experts"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_line_that_is_wrong(bad: str, message: str, run: Run, folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "To be"}\n' + bad + '\n{"prompt": "or"}\n')
    arguments = ("generate", "--model", str(folder), "--prompts", str(source), "--out", str(out), "--max-tokens", "2")
    code, _, err = run(*arguments)
    assert code == 2 and err.startswith(f"mixtral: {source}, line 2: ") and message in err and err.count("\n") == 1
    assert not out.exists()
    code, _, err = run(*arguments, "--skip-bad")
    assert code == 0 and err.startswith(f"left out: {source}, line 2: ")
    assert [line["prompt"] for line in read(out)] == ["To be", "or"]


def test_goes_on_where_it_was_cut_off(run: Run, folder: Path, texts: Path, tmp_path: Path) -> None:
    """A half line is done again, and a seed's random numbers are those of one go."""
    arguments = ("generate", "--model", str(folder), "--prompts", str(texts), "--max-tokens", "5",
                 "--temperature", "1", "--seed", "7")  # fmt: skip
    run(*arguments, "--out", str(tmp_path / "whole.jsonl"))
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.jsonl").write_bytes(whole[:cut])
        assert run(*arguments, "--out", str(tmp_path / "cut.jsonl")).code == 0
        assert (tmp_path / "cut.jsonl").read_bytes() == whole


def test_what_is_there_already_and_is_something_else(run: Run, folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ("generate", "--model", str(folder), "--prompts", str(texts), "--out", str(out), "--max-tokens", "2")
    for content, message in (
        ("precious\n", "line 1: nothing that this command writes; name another --out"),
        ('{"prompt": "other"}\n', "line 1: answers another prompt than the file has; name another --out"),
        ("".join(f'{{"prompt": "{p}"}}\n' for p in [*PROMPTS, "more"]), "line 6: answers another prompt"),
    ):
        out.write_text(content)
        code, _, err = run(*arguments)
        assert code == 2 and message in err and out.read_text() == content


def test_killed_and_resumed_twice(folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "p.txt", tmp_path / "out.jsonl"
    source.write_text("".join(f"line number {i}\n" for i in range(400)))
    command = [sys.executable, "-m", "mixtral", "generate", "--model", str(folder), "--prompts", str(source),
               "--out", str(out), "--max-tokens", "20"]  # fmt: skip
    for least in (32, 96):
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        while not out.exists() or out.read_bytes().count(b"\n") < least:
            assert process.poll() is None, "it must not be over before it is killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert [line["prompt"] for line in read(out)] == [f"line number {i}" for i in range(400)]


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give a --prompt, or a file of them: --prompts"),
    (["--prompt", "a", "--prompts", "b"], "give a --prompt, or a file of them: --prompts"),
    (["--prompts", "b", "--n", "2"], "--n: goes with --prompt"), (["--prompts", "b", "--json"], "--json: goes with"),
    (["--prompts", "b", "--routing"], "--routing: goes with --prompt"),
    (["--prompt", "a", "--out", "b"], "--out: goes with --prompts"),
    (["--prompt", "a", "--skip-bad"], "--skip-bad: goes with --prompts"),
    (["--prompt", "a", "--logprobs"], "--logprobs: goes with --prompts"),
    (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read: No such file or directory"),
])  # fmt: skip
def test_misuse(run: Run, folder: Path, arguments: list[str], message: str) -> None:
    code, out, err = run("generate", "--model", str(folder), *arguments)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
