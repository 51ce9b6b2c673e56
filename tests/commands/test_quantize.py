from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mixtral.lm import load
from mixtral.weights import convert
from mixtral.weights.safetensors_file import SafetensorsFile
from tests.commands.conftest import TEXT, Run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXT))
    return file


def test_size_and_what_follows(run: Run, folder: Path, tmp_path: Path) -> None:
    code, out, err = run("quantize", folder, tmp_path / "q", "--bits", "mixed")
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith(f"{tmp_path / 'q'}: ") and " % of bf16; in theory " in first
    assert second == "attention int8, experts int4, output int8; norms and gates as they were"
    assert run("generate", "--model", tmp_path / "q", "--prompt", "To be", "--max-tokens", "3").code == 0
    assert run("info", tmp_path / "q").code == 0
    assert load(tmp_path / "q").tokenizer is not None


def test_calibrated_and_compared(run: Run, folder: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--bits", "4", "--calibrate", text, "--text", text, "--tokens", "300")
    code, out, _ = run("quantize", folder, tmp_path / "q", *arguments)
    assert code == 0 and f"calibrated on 300 tokens of {text}" in out
    lines = out.splitlines()
    assert "On 295 tokens, against the unquantised model" in lines  # five sequences of 64 at most, one token each given
    rows = {line.split("  ")[0]: line.split() for line in lines[lines.index("") + 2 :]}
    assert list(rows) == ["quantised", "nothing", "all", "layer 0", "layer 1", "output"]
    assert rows["all"][-1].endswith("%") and 0 < float(rows["all"][-2]) < 0.5


def test_from_gguf(run: Run, folder: Path, text: Path, tmp_path: Path) -> None:
    """The same packed bytes as from the folder that the file was made of, with its tokenizer, calibrated or not."""
    convert(folder, tmp_path / "bf16", "hf", torch.bfloat16)  # what the GGUF file holds
    convert(tmp_path / "bf16", tmp_path / "model.gguf", "gguf")
    options = ("--bits", "4", "--calibrate", text, "--text", text, "--tokens", "100")
    want = run("quantize", tmp_path / "bf16", tmp_path / "a", *options)
    got = run("quantize", tmp_path / "model.gguf", tmp_path / "b", *options)
    assert (want.code, got.code) == (0, 0), got.err
    assert want.out.split("\n\n")[1] == got.out.split("\n\n")[1]  # the comparison
    there, back = (SafetensorsFile(tmp_path / name / "packed.safetensors") for name in "ab")
    assert there.headers.keys() == back.headers.keys()
    assert all(torch.equal(there.read(name).float(), back.read(name).float()) for name in there.headers)
    first, second = (load(tmp_path / name).tokenizer for name in "ab")
    assert first is not None and second is not None and first.fingerprint == second.fingerprint
    assert run("generate", "--model", tmp_path / "b", "--prompt", "To be", "--max-tokens", "3").code == 0


def test_from_quantised_gguf(run: Run, folder: Path, tmp_path: Path) -> None:
    """Its blocks are expanded and rounded again, to our formats."""
    convert(folder, tmp_path / "model.gguf", "gguf", type="q8_0")
    assert run("quantize", tmp_path / "model.gguf", tmp_path / "q", "--bits", "8").code == 0
    ids = list(range(3, 40))
    want, got = load(tmp_path / "model.gguf", "fp32").logits(ids), load(tmp_path / "q", "fp32").logits(ids)
    assert 0 < (got - want).norm() <= 0.05 * want.norm()


def test_json(run: Run, folder: Path, text: Path, tmp_path: Path) -> None:
    code, out, _ = run("quantize", folder, tmp_path / "q", "--bits", "8", "--text", text, "--tokens", "100", "--json")
    values = json.loads(out)
    assert code == 0 and values["recipe"]["experts"] == "int8" and values["recipe"]["calibration"] is None
    assert values["size"]["written"] < values["size"]["bf16"]
    whole = values["comparison"]["whole"]
    assert 0 < whole["kl"] < 0.01 and whole["agreement"] > 0.8
    assert whole["perplexity"] == pytest.approx(values["comparison"]["perplexity"], rel=0.05)
    assert [part["what"] for part in values["comparison"]["parts"]] == ["layer 0", "layer 1", "output"]


def test_bars_on_a_terminal_alone(run: Run, folder: Path, text: Path, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    options = ("--bits", "4", "--calibrate", text, "--text", text, "--tokens", "100")
    err = run("quantize", folder, tmp_path / "q", *options).err
    assert "calibrating" in err and "quantising" in err and "comparing" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{folder}", "out"], 2, "Missing option '--bits'"),
        (["{folder}", "out", "--bits", "5"], 2, "bits: unknown choice '5'; known: 4, 8, mixed"),
        (["{quantised}", "out", "--bits", "4"], 2, "quantised weights, good for running alone; give the folder"),
        (["missing", "out", "--bits", "4"], 2, "missing: no such file or folder"),
        (["{folder}", "full", "--bits", "4"], 2, "full: exists already"),
        (["{folder}", "out", "--bits", "4", "--text", "nowhere.txt"], 2, "nowhere.txt"),
        (["{folder}", "out", "--bits", "4", "--calibrate", "nowhere.txt"], 2, "nowhere.txt"),
        (["{folder}", "out", "--bits", "4", "--calibrate", "blank.txt"], 1, "blank.txt: no text in it"),
        (["bare", "out", "--bits", "4", "--calibrate", "blank.txt"], 2, "bare: no tokenizer; --calibrate and"),
        (["{folder}", "file/out", "--bits", "4"], 1, "cannot write file/out: "),
    ],
)
def test_failures(run: Run, folder: Path, quantised: Path, tmp_path: Path, arguments: list[str], code: int,
                  message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").write_text("precious")
    (tmp_path / "file").write_text("a file, where a folder is wanted")
    (tmp_path / "blank.txt").write_text(" \n")
    shutil.copytree(folder, tmp_path / "bare", ignore=lambda _, names: {n for n in names if "token" in n or ".v3" in n})
    got = run("quantize", *(a.format(folder=folder, quantised=quantised) for a in arguments))
    assert (got.code, got.out) == (code, "") and got.err.count("\n") == 1 and message in got.err
    assert (tmp_path / "full/kept").read_text() == "precious" and not (tmp_path / "out").exists()
