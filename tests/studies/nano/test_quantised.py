"""What 8 and 4 bits cost: the study on an untrained model, its windows and its reading of llama-perplexity."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import llama_programs
import pytest
import quantised
import torch
from llama_programs import Statistics, perplexity, read_statistics, run_program, windows
from quantised import CALIBRATION_TOKENS, GGUF, LIMITS, OURS, sequences, show, study, texts_of

import mixtral
from mixtral.data.shards import prepare
from mixtral.data.sources import Source
from mixtral.data.store import NO_TARGET, TokenData
from mixtral.errors import MixtralError
from mixtral.lm import LM
from mixtral.model import Mixtral, initialise
from mixtral.presets import tiny
from mixtral.recipes import recipe
from mixtral.tokenizer import load_tokenizer
from mixtral.train.run_folder import begin
from mixtral.weights import convert

pytest.importorskip("gguf")

PRINTED = """
====== Perplexity statistics ======
Mean PPL(Q)                   :  43.012791 ±   2.353395
Mean PPL(base)                :  42.778394 ±   2.348938
Mean PPL(Q)/PPL(base)         :   1.005479 ±   0.004214
Mean    KLD:   0.015059 ±   0.000709
Maximum KLD:   0.714876
Same top p: 91.547 ± 0.581 %
"""


def make_run(corpus: Path, out: Path, **changes: Any) -> Path:
    """The folder of a run of no steps: windows of 32 tokens, 300 tokens to validate on."""
    shape = tiny().replace(vocab_size=320, dim=32, n_heads=2, head_dim=16, n_layers=2, ffn_dim=32, **changes)
    data = tuple(str(corpus / "train" / f"{name}.jsonl") for name in ("code", "prose"))
    begin(recipe("tiny").replace(model=shape, data=data, rows=2, context=32, val_tokens=300), out)
    tokenizer = load_tokenizer(corpus.parent / "tokenizer")
    prepare([Source(source) for source in data], tokenizer, out / "data", val_share=0.2)
    LM(initialise(Mixtral(shape), torch.Generator().manual_seed(0)), tokenizer).save(out / "final")
    return out


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(corpus, tmp_path_factory.mktemp("quantised") / "run")


def test_texts_are_the_runs_validation_and_its_first_training_batches(run: Path) -> None:
    tokenizer = mixtral.load(run / "final").tokenizer
    assert tokenizer is not None
    held_out, calibration = texts_of(run, tokenizer, None)
    assert sum(len(part.targets_T) for part in held_out) == 300
    assert CALIBRATION_TOKENS * 0.9 < sum(map(len, calibration)) <= CALIBRATION_TOKENS
    assert max(map(len, calibration)) <= 32
    data = TokenData(run / "data", tokenizer)
    held_texts = "\n".join(tokenizer.decode(data.val.tokens(m).tolist()) for m in range(len(data.val.length_M)))
    read = [tokenizer.decode(ids) for part in held_out for ids in sequences(part)]
    assert all(text in held_texts for text in read)
    assert not any(tokenizer.decode(ids) in held_texts for ids in calibration if len(ids) == 32)
    assert sum(len(part.targets_T) for part in texts_of(run, tokenizer, 70)[0]) == 70


def test_without_llama_cpp(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = study(run, run / "final", None, 200)
    names = ["bf16", *OURS, *(f"{type.upper()}, weights" for type in GGUF)]
    rows = {row["name"]: row for row in result["models"]}
    assert list(rows) == names and rows["bf16"]["kl"] == 0 and rows["bf16"]["bits_per_weight"] == 16
    assert 0 < rows["int8"]["kl"] < rows["mixed, calibrated"]["kl"] < rows["int4"]["kl"]
    assert 0 < rows["Q8_0, weights"]["kl"] < rows["Q4_0, weights"]["kl"]
    for row in result["models"]:
        assert row["change"] == pytest.approx(100 * (row["loss"] / rows["bf16"]["loss"] - 1))
    assert result["llama_windows"] == [] and "no --llama-cpp" in result["left_out"]
    assert result["held"] == {name: abs(rows[name]["change"]) <= limit for name, limit in LIMITS.items()}
    result["held"]["int8"] = False
    show(result)
    out = capsys.readouterr().out
    assert all(name in out for name in names) and "left out: no --llama-cpp" in out
    assert "int8: the loss changes by at most 0.2 %: NO" in out


def test_with_llama_cpp(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its programs are played by our own writer, and by what one printed once."""
    texts: set[str] = set()

    def program(path: Path, *options: Any) -> str:
        if path.name == "llama-quantize":
            source, target, type, _ = options
            convert(source, target, "gguf", type=type.lower())
        elif "-f" in options:
            texts.add(options[options.index("-f") + 1].read_text())
        return PRINTED

    monkeypatch.setattr(llama_programs, "run_program", program)
    result = study(run, run / "final", Path("bin"), 200)
    assert result["left_out"] == "" and len(texts) == 1
    names = [row["name"] for row in result["llama_windows"]]
    assert names == ["bf16", *OURS, "bf16, llama.cpp", "Q8_0, llama.cpp", "Q4_0, llama.cpp"]
    show(result)
    assert "in llama-perplexity's windows" in capsys.readouterr().out
    short = study(run, run / "final", Path("bin"), 40)
    assert short["llama_windows"] == [] and "llama-perplexity wants two windows of 32 tokens" in short["left_out"]


def test_what_llama_cpp_does_not_know_is_left_out(corpus: Path, tmp_path: Path) -> None:
    run = make_run(corpus, tmp_path / "run", router="sigmoid")
    result = study(run, run / "final", Path("bin"), 60)
    assert [row["name"] for row in result["models"]] == ["bf16", *OURS]
    assert "it knows no router but Mixtral's own" in result["left_out"]


def test_a_model_without_a_tokenizer(run: Path, tmp_path: Path) -> None:
    LM(mixtral.load(run / "final").model).save(tmp_path / "bare")
    with pytest.raises(MixtralError, match="bare: no tokenizer; a model with the run's tokenizer is wanted"):
        study(run, tmp_path / "bare", None, None)


def test_windows_as_llama_perplexity_cuts_them() -> None:
    found = windows(list(range(100, 120)), 8, bos_id=1)
    assert [batch.tokens_T.tolist() for batch, _ in found] == [[1, *range(101, 108)], [1, *range(109, 116)]]
    for (_, targets_T), last in zip(found, (107, 115), strict=True):
        assert targets_T.tolist() == [NO_TARGET] * 4 + [last - 2, last - 1, last] + [NO_TARGET]
    with pytest.raises(MixtralError, match="wants two windows of 8 tokens; the text has 15"):
        windows(list(range(15)), 8, bos_id=1)


def test_reading_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_statistics(PRINTED)
    assert found == Statistics(pytest.approx(3.75603, rel=1e-5), pytest.approx(3.7615, rel=1e-5), 0.015059, 0.91547)
    with pytest.raises(MixtralError, match=r"no number for 'Mean    KLD', and ends in: Same top p: 91"):
        read_statistics(PRINTED.replace("0.015059", "nan"))
    with pytest.raises(MixtralError, match="ends in: nothing"):
        read_statistics("")
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(llama_programs, "run_program", lambda *command: calls.append(command) or PRINTED)
    assert perplexity(Path("bin"), Path("a.gguf"), [Path("b.gguf")], "text", 64, tmp_path) == [found]
    base, other = ([str(part) for part in call] for call in calls)
    assert base[0] == other[0] == "bin/llama-perplexity" and "a.gguf" in base and "b.gguf" in other
    assert "--kl-divergence" in other and "--kl-divergence" not in base
    assert (tmp_path / "text.txt").read_text() == "text"


def test_an_output_that_is_cut_off_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = ["", *[PRINTED[:200]] * 3, PRINTED]  # of the base; then of the file
    monkeypatch.setattr(llama_programs, "run_program", lambda *_: outputs.pop(0))
    assert perplexity(Path("bin"), Path("a"), [Path("b")], "text", 64, tmp_path) == [read_statistics(PRINTED)]
    outputs = [""] * 5
    with pytest.raises(MixtralError, match="ends in: nothing"):
        perplexity(Path("bin"), Path("a"), [Path("b")], "text", 64, tmp_path)
    assert not outputs


def test_programs_that_fail() -> None:
    assert run_program(sys.executable, "-c", "print(7)") == "7\n"
    with pytest.raises(MixtralError, match="failed: no such model"):
        run_program(sys.executable, "-c", "raise SystemExit('first\\nno such model')")
    with pytest.raises(MixtralError, match="nowhere/llama-quantize: cannot be run: No such file"):
        run_program(Path("nowhere/llama-quantize"))


def test_the_command(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "set_threads", lambda *_: None)
    options = ["--tokens", "60", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["quantised.py", str(run), *options])
    quantised.main()
    assert '"llama_windows": []' in (tmp_path / "out.json").read_text()
    monkeypatch.setattr(sys, "argv", ["quantised.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="no such file or folder"):
        quantised.main()
