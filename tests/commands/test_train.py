"""What `mixtral train` refuses before any work is done; training itself is tested in tests/train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands.conftest import Run


def test_show_resolves_and_does_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--max-steps", "7", "--seed", "3", "--skip-bad", "--set", "lr=2e-3", "--set", "model.dim=384")
    told = run("train", "tiny", "--show", *options)
    config = json.loads(told.out)
    assert (config["steps"], config["seed"], config["lr"], config["model"]["dim"]) == (7, 3, 2e-3, 384)
    assert config["skip_bad"] is True and list(tmp_path.iterdir()) == []
    assert json.loads(run("train", "tiny", "--show", "--set", "skip_bad=true").out)["skip_bad"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name a recipe (tiny"),
        (["tinny", "--out", "new"], 2, "unknown recipe 'tinny'; did you mean 'tiny'?"),
        (["tyni", "--out", "new"], 2, "unknown recipe 'tyni'; did you mean 'tiny'?"),
        (["tiny"], 2, "--out DIR"),
        (["tiny", "--out", "full"], 2, "full is not empty"),
        (["tiny", "--out", "full/file/new"], 1, "cannot write full/file/new"),
        (["tiny", "--out", "new", "--set", "lrr=3"], 2, "--set lrr: unknown field; did you mean 'lr'?"),
        (["tiny", "--out", "new", "--max-steps", "0"], 2, "steps must be at least 1, not 0"),
        (["--resume", "nowhere"], 2, "nowhere is not a training run: no such folder"),
        (["--resume", "full/file"], 2, "full/file is not a training run: it is a file"),
        (["tiny", "--out", "full/file"], 2, "full/file is a file; choose another --out"),
        (["tiny", "--resume", "full", "--seed", "1"], 2, "leave out RECIPE, --seed"),
        (["--resume", "full", "--skip-bad"], 2, "leave out --skip-bad"),
        (["tiny", "--out", "new", "--data", "nothere"], 2, "nothere: no such file or folder; a source is a path"),
        (["tiny", "--out", "new", "--data", "stdlb:code"], 2, "no such file or folder; did you mean 'stdlib'?"),
        (["tiny", "--out", "new", "--data", "full/file=x"], 2, "the weight must be a positive number, not 'x'"),
        (["tiny", "--out", "new", "--data", "stdlib=-1"], 2, "the weight must be a positive number, not '-1'"),
        (["tiny", "--out", "new", "--data", "stdlib:cod"], 2, "unknown part 'cod'; did you mean 'code'?"),
        (["tiny", "--out", "new", "--data", "full/file?feild=a"], 2, "unknown option 'feild'; did you mean 'field'?"),
        (["tiny", "--out", "new", "--data", "full"], 1, "full: no text in this folder"),
        (["tiny", "--out", "new", "--data", "stdlib=1", "--data", "full/file"], 2, "give every one a weight, or none"),
        (["tiny", "--out", "new", "--set", "tokenizer=nothere"], 2, "nothere: no such file or folder"),
        (["tiny", "--out", "new", "--set", "tokenizer=full"], 2, "full"),
        (["tiny", "--out", "new", "--set", "model.vocab_size=200"], 2, "vocab_size 200 is too small"),
        (["tiny", "--out", "new", "--set", "balance=quantile"], 2, "the router of layer 0 has no bias"),
        (["tiny", "--out", "new", "--set", "balance=k_price"], 2, "the router learns no k"),
        (["tiny", "--out", "new", "--set", "balance=threshold"], 2, "choose model.router=threshold"),
        (["tiny", "--out", "new", "--data", "d\udce9"], 2, "data[0] must be a text that is UTF-8, not 'd\\udce9'"),
        (["tiny", "--out", "new", "--set", "tokenizer=\udce9"], 2, "tokenizer must be a text that is UTF-8"),
        (["tiny", "--out", "new", "--set", "trackers=wand"], 2, "unknown tracker 'wand'; did you mean 'wandb'?"),
    ],
)
def test_misuse(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int,
                message: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("mixtral.train.run_folder.choose_threads", lambda *_: pytest.fail("measured first"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("precious")
    got = run("train", *arguments)
    assert (got.code, got.out) == (code, "") and got.err.count("\n") == 1 and message in got.err
    assert not (tmp_path / "new").exists() and (tmp_path / "full/file").read_text() == "precious"


def test_a_tracker_that_is_not_installed_is_told_before_any_work(run: Run, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    got = run("train", "tiny", "--out", tmp_path / "new", "--set", "trackers=wandb")
    assert got.code == 2 and 'wandb is not installed; pip install "mixtral[wandb]"' in got.err
    assert got.err.count("\n") == 1 and not (tmp_path / "new").exists()
