"""A second package that adds a router, an objective, a recipe and a data source: installed, trained, generated from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mixtral import extend
from mixtral.config.router import parse_router
from mixtral.errors import ConfigError, MixtralError, UsageError
from mixtral.extensions import load_extensions

PACKAGE = Path(__file__).parent / "extension"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extension")
    shutil.copytree(PACKAGE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(folder / "site"), str(folder / "source")], check=True)
    return folder / "site"


def run(*arguments: str, path: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mixtral", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_all_four_by_the_installed_command(installed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("train", "rotating-tiny", "--out", str(out), path=installed)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("quiet" in json.dumps(line) for line in lines)
    config = json.loads((out / "final/config.json").read_text())
    assert config["router"] == "rotating?turn=2"
    arguments = ("--model", str(out / "final"), "--prompt", "one two", "--max-tokens", "5")
    assert run("generate", *arguments, path=installed).stdout.strip()
    again = run("train", "--resume", str(out), path=installed)
    assert "done already" in again.stderr
    # without the package it is refused by name
    refused = run("info", str(out / "final"), path=tmp_path, code=2)
    assert "router: unknown 'rotating'" in refused.stderr and refused.stderr.count("\n") == 1


def test_by_import(installed: Path, tmp_path: Path) -> None:
    """Without an entry point: the module is named on the command line."""
    shutil.copytree(installed / "rotating_mixtral", tmp_path / "rotating_mixtral")
    run("train", "rotating-tiny", "--show", path=tmp_path, code=2)
    shown = run("--import", "rotating_mixtral", "train", "rotating-tiny", "--show", path=tmp_path).stdout
    assert json.loads(shown)["model"]["router"] == "rotating?turn=2"
    missing = run("--import", "no_such_module", "train", "tiny", "--show", path=tmp_path, code=2)
    assert missing.stderr == "mixtral: --import no_such_module: ModuleNotFoundError: No module named 'no_such_module'\n"


def test_an_extension_that_cannot_be_imported(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mixtral.extensions]\nbroken = broken_mixtral\n")
    (tmp_path / "broken_mixtral.py").write_text("1 / 0\n")
    done = run("train", "no-such-recipe", "--show", path=tmp_path, code=1)
    reason = "cannot be imported: ZeroDivisionError: division by zero"
    assert done.stderr == f"mixtral: extension broken of broken {reason}\n"
    assert run("train", "tiny", "--show", path=tmp_path).stderr == ""  # nobody asked


def test_names_that_are_taken() -> None:
    with pytest.raises(ConfigError, match="router topk: there is one of this name already"):

        @dataclass(frozen=True)
        class Again(extend.TopK, name="topk"):
            pass

    with pytest.raises(UsageError, match="router Nameless: its options have no name"):

        class Nameless(extend.RouterOptions):
            pass

        extend.router(Nameless, extend.TopKRouter)

    class Mine(extend.BalanceOptions):
        name = "z_loss"

    with pytest.raises(UsageError, match="objective z_loss: there is one of this name already"):
        extend.objective(Mine)
    with pytest.raises(UsageError, match="objective z_loss: a rule is wanted where it moves a buffer, and only there"):
        extend.objective(Mine, extend.Rule)
    with pytest.raises(UsageError, match="recipe tiny: there is one of this name already"):
        extend.recipe("tiny")(lambda: extend.PretrainConfig())  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="data source stdlib: there is one of this name already"):
        extend.source("stdlib", lambda *_: [])


def test_an_objective_that_does_nothing_says_so() -> None:
    class Idle(extend.BalanceOptions):
        name = "idle"

    with pytest.raises(NotImplementedError, match="balance idle: neither a loss nor a buffer to move"):
        Idle().loss(None)  # type: ignore[arg-type]


def test_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    load_extensions.cache_clear()
    asked: list[str] = []
    monkeypatch.setattr("mixtral.extensions.entry_points", lambda group: asked.append(group) or ())
    for _ in range(2):
        with pytest.raises(MixtralError, match="unknown 'nowhere'"):
            parse_router("nowhere")
    assert asked == ["mixtral.extensions"]
    load_extensions.cache_clear()
