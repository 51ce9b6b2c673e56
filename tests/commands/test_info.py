from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixtral import system
from mixtral.commands import info
from mixtral.presets import preset
from tests.commands.conftest import Run, config


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [
        ("mixtral-8x7b", 46702792704, 12879925248),
        ("mixtral-8x22b", 140620634112, 39152031744),
        ("mistral-7b", 7241732096, 7241732096),
    ],
)
def test_published_figures(run: Run, name: str, parameters: int, active: int) -> None:
    told = json.loads(run("info", name, "--json").out)
    assert (told["parameters"], told["active_parameters"]) == (parameters, active)


def test_all_k_or_one(run: Run) -> None:
    told = json.loads(run("info", "mixtral-8x7b", "--json").out)
    assert [line["k"] for line in told["by_k"]] == list(range(1, 9))
    assert told["by_k"][1]["active_parameters"] == told["active_parameters"]
    assert told["by_k"][7]["active_share"] == 1
    one = json.loads(run("info", "mixtral-8x7b", "--json", "--k", "1").out)
    assert one["by_k"] == told["by_k"][:1]
    assert one["active_parameters"] == told["by_k"][0]["active_parameters"]


def test_memory_and_cache(run: Run) -> None:
    told = json.loads(run("info", "mixtral-8x7b", "--context", "1000", "--json").out)
    assert told["weight_bytes"]["bf16"] == 2 * told["parameters"]
    assert told["weight_bytes"]["int4"] == round(told["parameters"] * 4.5 / 8)
    assert told["kv_bytes_per_token"] == 128 * 1024
    assert told["kv_bytes"] == {"1000": 1000 * 128 * 1024, "32768": 4 * 2**30}
    assert told["context"] == 1000
    assert told["machine"]["cpu"] > 0
    assert told["runner"]["name"] in ("native", "torch") and "native step" in told["runner"]["why"]


def test_for_people(run: Run) -> None:
    out = run("info", "mixtral-8x7b").out
    for wanted in ("46,702,792,704", "12,879,925,248", "27.6%", "86.99 GiB", "128 KiB a token", "no sliding window"):
        assert wanted in out
    assert max(map(len, out.splitlines())) <= 80


def test_dense_with_a_window(run: Run) -> None:
    out = run("info", "mistral-7b").out
    assert "window 4,096" in out and "dense" in out and "All experts" not in out
    assert "512.00 MiB at 32,768" in out  # the window's 4096 tokens alone


@pytest.mark.parametrize(("free", "word"), [(0, "does not fit"), (12, "fits, less cache"), (18, "fits")])
def test_what_fits(run: Run, monkeypatch: pytest.MonkeyPatch, free: int, word: str) -> None:
    monkeypatch.setattr(info, "machine_memory", lambda: {"cpu": free * 2**20})
    monkeypatch.setattr(info, "find_config", lambda _: config(n_layers=64, context=4096))
    told = run("info", "x").out.splitlines()
    assert next(line for line in told if line.startswith("int8")).rstrip().endswith("  " + word)


def test_many_experts_list_powers_of_two(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "find_config", lambda _: config(n_experts=60, experts_per_token=6))
    told = json.loads(run("info", "x", "--json").out)
    assert [line["k"] for line in told["by_k"]] == [1, 2, 4, 6, 8, 16, 32, 60]


def test_of_a_folder(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.loads(run("info", folder, "--json").out)
    assert told["parameters"] == config().n_params() and told["config"]["n_experts"] == 4
    monkeypatch.chdir(folder.parent)
    assert json.loads(run("info", "model", "--json").out)["parameters"] == told["parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mixtral-8x7"], "unknown preset 'mixtral-8x7'; did you mean 'mixtral-8x7b'?"),
        (["no/such/folder"], "no/such/folder: no such file or folder"),
        (["."], "config.json"),
        (["{run}"], "is a training run; it has no finished model yet"),
        (["README.md"], "README.md: no model; a model folder, config.json, params.json or a .gguf file is wanted"),
        (["tiny", "--context", "513"], "--context 513: tiny is made for at most 512 tokens"),
        (["tiny", "--context", "0"], "--context"),
        (["tiny", "--k", "9"], "--k must lie in 1..8 (the model's experts), not 9"),
    ],
)
def test_misuse(run: Run, a_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
                message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# A model")
    code, out, err = run("info", *(a.format(run=a_run) for a in arguments))
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("mixtral: ") and message in err


def test_a_gpu_is_asked_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (28 * 2**30, 80 * 2**30))
    monkeypatch.setattr(system, "available_memory_bytes", lambda: 2**30)
    monkeypatch.setattr(system, "may_have_gpu", lambda: True)
    lines = run("info", "mixtral-8x7b").out.splitlines()
    assert any("cpu, 1.00 GiB free  cuda, 28.00 GiB free" in line for line in lines)
    int4 = next(line for line in lines if line.startswith("int4"))
    assert int4.split()[-6:] == "does not fit fits, less cache".split()
    assert max(map(len, lines)) <= 80


def test_models_side_by_side(run: Run) -> None:
    code, out, err = run("info", "mixtral-8x7b", "--against", "llama-2-70b", "--against", "mixtral-8x22b", "--json")
    first, second, third = json.loads(out)
    assert code == 0 and err == "" and [m["name"] for m in (first, second, third)][1] == "llama-2-70b"
    config = preset("mixtral-8x7b")
    assert (first["parameters"], first["active_parameters"]) == (config.n_params(), config.n_active_params())
    assert (first["experts"], second["experts"], first["context"]) == ("2 of 8", "", 4096)
    assert first["flops_forward"] == config.flops_per_token(4096)
    assert first["kv_bytes"]["32768"] == config.kv_bytes(32768) and list(second["kv_bytes"]) == ["4096"]
    lines = run("info", "mixtral-8x7b", "--against", "llama-2-70b").out.splitlines()
    assert lines[0].split() == ["mixtral-8x7b", "llama-2-70b"]
    assert next(line for line in lines if line.startswith("active per token")).split()[3:] == "12.88 B 68.98 B".split()
    assert next(line for line in lines if line.startswith("cache at 32,768")).split()[3:] == "4.00 GiB -".split()


def test_a_shape_alone(run: Run) -> None:
    out = run("info", "deepseek-v3").out
    assert "671.03 B" in out and "8 of 256" in out and "deepseek-v3: latent attention" in out


@pytest.mark.parametrize(("arguments", "message"), [
    (["mixtral-8x7b", "--against", "mixtral-8x8b"], "unknown model 'mixtral-8x8b'; did you mean 'mixtral-8x7b'"),
    (["mixtral-8x7b", "--against", "llama-2-70b", "--k", "1"], "--k: counts one model of a preset or folder"),
    (["mixtral-8x7b", "--against", "llama-2-70b", "--context", "5000"], "llama-2-70b is made for at most 4096 tokens"),
])  # fmt: skip
def test_misuse_of_against(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run("info", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("arguments", [
    ["info", "mixtral-8x7b"], ["info", "mixtral-nano"], ["info", "mixtral-8x7b", "--against", "grok-1"],
    ["train", "tiny", "--show"], ["--version"], ["--help"], ["runs", "RUN"],
])  # fmt: skip
def test_no_torch_is_waited_for(arguments: list[str], a_run: Path) -> None:
    """Loading it takes seconds, and nothing here computes."""
    arguments = [str(a_run) if name == "RUN" else name for name in arguments]
    code = f"""
import sys
from mixtral import system
from mixtral.cli import main
system.may_have_gpu = lambda: False
assert main({arguments!r}) == 0
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("columns", ["40", "80", "200"])
@pytest.mark.parametrize("arguments", [
    ["info", "mixtral-8x7b"], ["info", "mixtral-8x22b", "--against", "llama-2-70b", "--against", "switch-base-128"],
    ["doctor"],
])  # fmt: skip
def test_a_narrow_terminal_loses_nothing(
    arguments: list[str], columns: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit beside other columns stands below them: the same words and numbers at every width."""
    monkeypatch.setattr(system, "available_memory_bytes", lambda: 2**30)
    monkeypatch.setattr("mixtral.hardware.measure_bandwidth", lambda _: 45.2e9)
    monkeypatch.setattr("mixtral.hardware.measure_matmul", lambda *_: 1.05e12)
    monkeypatch.setenv("COLUMNS", "1000")
    whole = set(run(*arguments).out.split())
    monkeypatch.setenv("COLUMNS", columns)
    out = run(*arguments).out
    assert "…" not in out and not whole - set(out.split())
    assert max(map(len, out.splitlines())) <= int(columns) or columns == "40"  # a name and a value on one line
