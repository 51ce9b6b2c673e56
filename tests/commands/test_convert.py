from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixtral.config.formats import read_config
from mixtral.lm import load
from mixtral.weights.safetensors_file import SafetensorsFile
from tests.commands.conftest import Run


def test_there_and_back(run: Run, folder: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "native", tmp_path / "hf"
    code, out, _ = run("convert", folder, there, "--to", "mistral")
    assert code == 0 and f"{there}/consolidated.safetensors  " in out and f"{there}/params.json  " in out
    assert run("convert", there, back, "--to", "hf").code == 0
    assert read_config(back).n_experts == 4
    original = load(folder).model.state_dict()
    for name, tensor in load(back).model.state_dict().items():
        assert torch.equal(tensor, original[name]), name


def test_gguf_there_and_back(run: Run, folder: Path, tmp_path: Path) -> None:
    file, back = tmp_path / "model.gguf", tmp_path / "hf"
    assert run("convert", folder, file, "--to", "gguf").out.startswith(f"{file}  ")
    assert run("convert", file, back, "--to", "hf").code == 0
    bf16, found = load(folder, "bf16"), load(back, "bf16")
    assert found.tokenizer is not None and found.tokenizer.fingerprint == bf16.tokenizer.fingerprint
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, bf16.model.state_dict()[name]), name
    assert run("convert", folder, tmp_path / "q8.gguf", "--to", "gguf", "--type", "q8_0").code == 0
    assert (tmp_path / "q8.gguf").stat().st_size < 0.75 * file.stat().st_size


def test_dtype_and_fused(run: Run, folder: Path, tmp_path: Path) -> None:
    assert run("convert", folder, tmp_path / "out", "--to", "hf", "--dtype", "bf16", "--fused").code == 0
    headers = SafetensorsFile(tmp_path / "out/model.safetensors").headers
    assert {header.dtype for header in headers.values()} == {torch.bfloat16}
    assert "model.layers.0.mlp.experts.gate_up_proj" in headers


def test_a_bar_on_a_terminal_alone(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("convert", folder, tmp_path / "quiet", "--to", "hf").err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    err = run("convert", folder, tmp_path / "told", "--to", "hf").err
    assert "writing" in err and "iB" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{folder}", "out", "--to", "hf", "--dtype", "bf61"], 2, "unknown name 'bf61'; did you mean 'bf16'?"),
        (["{folder}", "out", "--to", "mistral", "--fused"], 2, "format 'mistral' has no fused experts"),
        (["{folder}", "out", "--to", "awq"], 2, "unknown format 'awq'; known: gguf, hf, mistral"),
        (["{folder}", "out", "--to", "gguf"], 2, "out: GGUF is one file; a name that ends in .gguf is wanted"),
        (["{folder}", "o.gguf", "--to", "gguf", "--type", "q8"], 2, "unknown GGUF type 'q8'; did you mean 'q8_0'?"),
        (["{folder}", "out", "--to", "hf", "--type", "q8_0"], 2, "format 'hf' takes a dtype and no type"),
        (["file.gguf", "out", "--to", "hf"], 1, "file.gguf: not a GGUF file; one begins with the letters GGUF"),
        (["{quantised}", "out", "--to", "hf"], 2, "quantised weights, good for running alone; give the folder"),
        (["{run}", "out", "--to", "hf"], 2, "is a training run; it has no finished model yet"),
        (["{folder}/model.safetensors", "out", "--to", "hf"], 2, "model.safetensors: a file of weights; give its"),
        (["missing", "out", "--to", "hf"], 2, "missing: no such file or folder"),
        (["{folder}", "full", "--to", "hf"], 2, "full: exists already"),
        (["{folder}", "file/out", "--to", "hf"], 1, "cannot write file/out: "),
        (["{folder}", "out"], 2, "Missing option '--to'"),
    ],
)
def test_failures(run: Run, folder: Path, quantised: Path, a_run: Path, tmp_path: Path, arguments: list[str],
                  code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").write_text("precious")
    (tmp_path / "file").write_text("a file, where a folder is wanted")
    (tmp_path / "file.gguf").write_text("no GGUF file, whatever its name says")
    got = run("convert", *(a.format(folder=folder, quantised=quantised, run=a_run) for a in arguments))
    assert (got.code, got.out) == (code, "") and got.err.count("\n") == 1 and message in got.err
    assert (tmp_path / "full/kept").read_text() == "precious" and not (tmp_path / "out").exists()
