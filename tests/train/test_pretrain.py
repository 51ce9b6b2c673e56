"""From a folder of text to a model that transformers loads, and everything that stops a run before it begins."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import mixtral
from mixtral.errors import ConfigError, DataError, MixtralError, UsageError
from mixtral.train import pretrain as module
from mixtral.train.checkpoint import checkpoints
from mixtral.train.config import TrainConfig
from mixtral.train.metrics import MatrixRate, read_lines
from mixtral.train.pretrain import Trained, begin, pretrain, recorded_config
from tests.train.tiny_run import Killed, Watching, kill_after, texts, train_config


@pytest.fixture(autouse=True)
def _threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "set_threads", lambda *_: None)
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)  # it would last for the whole test process
    monkeypatch.setattr(MatrixRate, "measure", lambda *_: MatrixRate(1e12, "float32"))


def config_of(source: Path | str, **changes: Any) -> TrainConfig:
    return train_config(data=(str(source),), **{"steps": 6, "val_every": 3, "save_every": 3, **changes})


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("runs") / "new" / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "set_threads", lambda *_: None)
        patch.setattr(module, "keep_freed_memory", lambda: None)
        patch.setattr(MatrixRate, "measure", lambda *_: MatrixRate(1e12, "float32"))
        begin(config_of(corpus), out)
        return pretrain(out, Watching())


def test_the_files_of_a_run(trained: Trained, corpus: Path) -> None:
    out = trained.run.folder
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "tokenizer", "data", "metrics.jsonl", "timings.jsonl", "checkpoints", "final"}
    record = json.loads((out / "config.json").read_text())
    assert recorded_config(out) == config_of(corpus) and record["environment"]["torch"] == torch.__version__
    assert json.loads((trained.folder / "training.json").read_text()) == record
    assert trained.folder == out / "final"
    assert trained.start_loss == read_lines(out / "metrics.jsonl")[0]["val_cross_entropy"]
    assert trained.validation.cross_entropy < trained.start_loss


def test_our_load_gives_the_trained_weights(trained: Trained) -> None:
    lm = mixtral.load(trained.folder)
    found = dict(lm.model.named_parameters())
    for name, p in trained.run.optimizer.params.items():
        assert torch.equal(found[name], p.detach()), name
    assert lm.tokenizer is not None and lm.tokenizer.decode(lm.tokenizer.encode("router expert")) == "router expert"


def test_transformers_agrees(trained: Trained) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained.folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.folder)
    lm = mixtral.load(trained.folder, dtype="fp32")
    assert lm.tokenizer is not None
    for text in texts()[:3]:
        ids = lm.tokenizer.encode(text)[:64]
        assert tokenizer(text)["input_ids"][:64] == ids
        with torch.no_grad():
            wanted = theirs(torch.tensor([ids])).logits[0]
        assert (lm.logits(ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_bf16_run_saves_its_fp32_masters(corpus: Path, tmp_path: Path) -> None:
    begin(config_of(corpus, dtype="bf16", steps=1), tmp_path / "run")
    result = pretrain(tmp_path / "run", Watching())
    lm = mixtral.load(result.folder, dtype="fp32")
    masters = result.run.optimizer.masters
    assert masters and all(torch.equal(p, masters[name]) for name, p in lm.model.named_parameters())


# -- going on ----------------------------------------------------------------------------------------------------------


def weights_of(out: Path) -> bytes:
    return (out / "final/model.safetensors").read_bytes()


def test_a_killed_run_goes_on(trained: Trained, corpus: Path, tmp_path: Path) -> None:
    """Also from an earlier checkpoint, and when the sources have changed since."""
    source = tmp_path / "texts"
    shutil.copytree(corpus, source)
    out, whole = tmp_path / "run", trained.run.folder
    begin(config_of(source), out)
    with pytest.raises(Killed):
        pretrain(out, kill_after(5))
    shutil.rmtree(source)
    pretrain(out, Watching())
    assert weights_of(out) == weights_of(whole)
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    pretrain(checkpoints(out)[0], Watching())
    assert weights_of(out) == weights_of(whole)
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_run_killed_before_its_first_checkpoint_starts_again(trained: Trained, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    begin(config_of(corpus), out)
    (out / "checkpoints").mkdir()
    (out / "metrics.jsonl").write_text('{"step": 0, "val_cross_entropy": 1.0}\n{"step": 1, "cr')
    pretrain(out, Watching())
    assert (out / "metrics.jsonl").read_bytes() == (trained.run.folder / "metrics.jsonl").read_bytes()


def test_a_run_killed_while_it_claimed_its_folder_can_be_begun_again(corpus: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / f".config.json.{process.pid}-0.tmp").write_text('{"train"')
    begin(config_of(corpus), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(UsageError, match="is not empty; choose another --out, or go on with: mixtral train --resume"):
        begin(config_of(corpus), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(UsageError, match="is not empty"):
        begin(config_of(corpus), tmp_path / "precious")
    assert (tmp_path / "precious").read_text() == "kept"


def test_an_empty_folder_is_taken(corpus: Path, tmp_path: Path) -> None:
    begin(config_of(corpus), tmp_path)
    assert recorded_config(tmp_path) == config_of(corpus)


@pytest.mark.parametrize(("text", "reason"), [
    (None, "is not a training run: it has no config.json"),
    ("{", "is not a training configuration"),
    ("{}", "is not a training configuration"),
    ("[]", "is not a training configuration"),
    ('{"train": {"model": {"vocab_size": 0}}}', "missing dim"),
])
def test_no_run_to_go_on_with(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError) as caught:
        pretrain(tmp_path, Watching())
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_recorded_field_is_refused(trained: Trained, tmp_path: Path) -> None:
    record = json.loads((trained.run.folder / "config.json").read_text())
    record["train"]["learnrate"] = 1
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="learnrate"):
        recorded_config(tmp_path)


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("empty.txt", "", "empty"),
    ("blank.txt", " \n\n", "no text to train on"),
    ("broken.jsonl", '{"text": "good"}\n{"text": "cut', "broken.jsonl, line 2: not JSON"),
])
def test_no_text_to_train_on(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    begin(config_of(tmp_path / name), tmp_path / "run")
    with pytest.raises(DataError) as caught:
        pretrain(tmp_path / "run", Watching())
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run/final").exists()


def test_a_missing_source_is_misuse(tmp_path: Path) -> None:
    begin(config_of(tmp_path / "nowhere.txt"), tmp_path / "run")
    with pytest.raises(UsageError, match=r"nowhere\.txt"):
        pretrain(tmp_path / "run", Watching())


def test_a_given_tokenizer_must_have_the_model_s_size(trained: Trained, corpus: Path, tmp_path: Path) -> None:
    tokenizer = str(trained.run.folder / "tokenizer")
    begin(config_of(corpus, tokenizer=tokenizer, model={"vocab_size": 400}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"320 tokens, the model 400; add --set model.vocab_size=320"):
        pretrain(tmp_path / "run", Watching())
    begin(config_of(corpus, tokenizer=tokenizer, steps=1), tmp_path / "good")
    assert pretrain(tmp_path / "good", Watching()).run.progress.step == 1


def test_a_folder_that_cannot_be_made(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MixtralError, match=r"^cannot write [^\n]*: Not a directory$"):
        begin(config_of(corpus), tmp_path / "file/run")


def test_compile_runs_the_loop_on_the_compiled_kernels(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    monkeypatch.setattr(module, "use_backend", lambda name: used.append(name) or contextlib.nullcontext())
    for name, compiled in (("a", False), ("b", True)):
        begin(config_of(corpus, steps=1, compile=compiled), tmp_path / name)
        pretrain(tmp_path / name, Watching())
    assert used == ["compiled"]
