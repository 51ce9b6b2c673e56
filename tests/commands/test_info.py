from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mixtral import hardware
from mixtral.commands import info
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
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 2**30)
    lines = run("info", "mixtral-8x7b").out.splitlines()
    assert any("cpu, 1.00 GiB free  cuda, 28.00 GiB free" in line for line in lines)
    int4 = next(line for line in lines if line.startswith("int4"))
    assert int4.split()[-6:] == "does not fit fits, less cache".split()
    assert max(map(len, lines)) <= 80
