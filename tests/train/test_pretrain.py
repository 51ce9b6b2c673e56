"""From a folder of text to a model that transformers loads, and everything that stops a run before it begins."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mixtral
from mixtral.errors import ConfigError, DataError, Interrupted, MixtralError, UsageError, WeightsError
from mixtral.model import transformer
from mixtral.train import pretrain as module
from mixtral.train.config import PretrainConfig
from mixtral.train.finished import finished
from mixtral.train.lines import read_lines
from mixtral.train.metrics import PeakMatmul
from mixtral.train.pretrain import Trained, pretrain, save_final
from mixtral.train.record import checkpoints, record_threads, recorded_config
from mixtral.train.run_folder import begin
from tests.train.tiny_run import Killed, Watching, kill_after, texts, train_config


@pytest.fixture(autouse=True)
def _threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "set_threads", lambda *_: None)
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)  # it would last for the whole test process
    monkeypatch.setattr(PeakMatmul, "measure", lambda *_: PeakMatmul(1e12, "float32"))


def config_of(source: Path | str, **changes: Any) -> PretrainConfig:
    return train_config(data=(str(source),), **{"steps": 6, "val_every": 3, "save_every": 3, **changes})


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("runs") / "new" / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "set_threads", lambda *_: None)
        patch.setattr(module, "keep_freed_memory", lambda: None)
        patch.setattr(PeakMatmul, "measure", lambda *_: PeakMatmul(1e12, "float32"))
        begin(config_of(corpus), out)
        return pretrain(out, Watching())


def test_final_weights_that_are_not_finite(trained: Trained, tmp_path: Path) -> None:
    weights = {name: p.detach().clone() for name, p in trained.run.state.weights.items()}
    weights["layers.0.attention.wo.weight"][1, 2] = float("nan")
    run: Any = SimpleNamespace(folder=tmp_path, state=SimpleNamespace(weights=weights), model=trained.run.model)
    with pytest.raises(WeightsError, match=r"final: not written; .* model\.layers\.0\.self_attn\.o_proj\.weight: 1 of"):
        save_final(run, None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


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
    lm = mixtral.load(trained.folder, runner="torch")
    found = dict(lm.model.named_parameters())
    for name, p in trained.run.state.optimizer.params.items():
        assert torch.equal(found[name], p.detach()), name
    assert lm.tokenizer is not None and lm.tokenizer.decode(lm.tokenizer.encode("router expert")) == "router expert"


def test_transformers_agrees(trained: Trained) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained.folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.folder)
    lm = mixtral.load(trained.folder, dtype="fp32", runner="torch")
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
    lm = mixtral.load(result.folder, dtype="fp32", runner="torch")
    masters = result.run.state.optimizer.masters
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


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with their bytes, folders with None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_killed_while_it_prepared_can_be_begun_again(corpus: Path, tmp_path: Path, begun: bool) -> None:
    """Between the folder and its record, or later, half a tokenizer and half a shard written."""
    left = [".config.json.mixtral-0123abcd.tmp"]
    if begun:
        begin(config_of(corpus, steps=9), tmp_path)
        left += [".tokenizer.mixtral-0123abcd.tmp", "data/.train-00000-0123456789ab.npy.mixtral-89abcdef.tmp"]
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    begin(config_of(corpus), tmp_path)
    assert recorded_config(tmp_path) == config_of(corpus)
    pretrain(tmp_path, Watching())
    assert (tmp_path / "final").is_dir() and not [path for path in tmp_path.rglob(".*") if "config" in path.name]


def test_a_failed_run_of_the_version_before_is_begun_anew(trained: Trained, corpus: Path, tmp_path: Path) -> None:
    """Its fields may be others; its record, written first, is the mark of a run in both."""
    shutil.copytree(trained.run.folder / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(trained.run.folder / "data", tmp_path / "data")
    record = {"train": {"old_field": 1}, "environment": {"mixtral": "0.0.1"}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    begin(config_of(corpus), tmp_path)
    assert weights_of(pretrain(tmp_path, Watching()).run.folder) == weights_of(trained.run.folder)


# -- nothing of others is touched --------------------------------------------------------------------------------------


HF = json.dumps({"architectures": ["MixtralForCausalLM"], "hidden_size": 8})
USERS = {
    "a model and its data": {"config.json": HF, "tokenizer/tokenizer.json": "{}", "data/corpus.txt": "years of work"},
    "data alone": {"data/corpus.txt": "years of work"},
    "a tokenizer alone": {"tokenizer/tokenizer.json": "{}"},
    "a record of something else": {"config.json": '{"train": {}, "environment": {}}', "tokenizer/mine.txt": "x"},
    "no object": {"config.json": "[1]"},
    "no JSON": {"config.json": "\xff"},
    "a temporary file": {"notes.tmp": "x"},
    "a hidden file": {".env": "x"},
}


@pytest.mark.parametrize("files", USERS.values(), ids=USERS.keys())
def test_a_folder_of_somebody_else_is_refused(corpus: Path, tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="latin-1")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="is not empty; choose another --out") as caught:
        begin(config_of(corpus), tmp_path)
    assert contents(tmp_path) == before and "\n" not in str(caught.value)


def test_a_file_put_beside_the_tokenizer_of_a_failed_run_is_kept(corpus: Path, tmp_path: Path) -> None:
    begin(config_of(corpus), tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/notes.txt").write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"notes\.txt: no run has written this; move it, or choose another --out"):
        begin(config_of(corpus), tmp_path)
    assert contents(tmp_path) == before


STRANGERS = ("precious.model", "precious.model.v3", "tekken.json.bak", "mine.model.v3/weights", "deep/tokenizer.json")


@pytest.mark.parametrize("name", STRANGERS)
def test_what_looks_like_a_tokenizer_is_kept_unless_the_run_has_written_it(trained: Trained, corpus: Path,
                                                                           tmp_path: Path, name: str) -> None:
    begin(config_of(corpus), tmp_path)
    shutil.copytree(trained.run.folder / "tokenizer", tmp_path / "tokenizer")
    begin(config_of(corpus), tmp_path)
    assert not (tmp_path / "tokenizer").exists()  # all of it was the run's

    shutil.copytree(trained.run.folder / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "tokenizer" / name).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"tokenizer.*: no run has written this; move it, or choose another --out"):
        begin(config_of(corpus), tmp_path)
    assert contents(tmp_path) == before


def test_a_link_to_a_tokenizer_is_kept(trained: Trained, corpus: Path, tmp_path: Path) -> None:
    begin(config_of(corpus), tmp_path)
    (tmp_path / "tokenizer").symlink_to(trained.run.folder / "tokenizer")
    with pytest.raises(UsageError, match="tokenizer: no run has written this"):
        begin(config_of(corpus), tmp_path)
    assert (tmp_path / "tokenizer/tokenizer.json").is_file()


def test_what_was_put_into_a_finished_model_stays(trained: Trained, tmp_path: Path) -> None:
    """`pretrain` writes the model of a finished run once more; `mixtral train --resume` does not call it then."""
    out = tmp_path / "run"
    shutil.copytree(trained.run.folder, out)
    (out / "final/README.md").write_text("a card")
    (out / "final/gguf").mkdir()
    (out / "final/gguf/model.gguf").write_text("hours of work")
    before = contents(out / "final")
    pretrain(out, Watching())
    assert contents(out / "final") == before and weights_of(out) == weights_of(trained.run.folder)


def test_two_processes_do_not_train_in_one_folder(trained: Trained, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained.run.folder, out)
    before = contents(out)
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); print(flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None and other.stdout.readline()
        for attempt in (lambda: pretrain(out, Watching()), lambda: begin(config_of(corpus), out)):
            with pytest.raises(UsageError, match=r"run: another process works in it; wait for its end"):
                attempt()
        assert contents(out) == before
        other.communicate()
    pretrain(out, Watching())


def test_a_folder_is_held_from_begin_to_the_end_of_the_run(corpus: Path, tmp_path: Path) -> None:
    def free() -> bool:
        descriptor = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    begin(config_of(corpus, steps=1), tmp_path)
    assert not free()
    during = []
    pretrain(tmp_path, Watching(lambda _: during.append(free())))
    assert during == [False] and free()


def test_a_run_that_the_memory_cannot_hold_is_refused_before_anything(corpus: Path, tmp_path: Path) -> None:
    for changes in ({"model": {"dim": 1_000_000}}, {"rows": 10**15}, {"model": {"vocab_size": 10**7, "dim": 10**5}}):
        with pytest.raises(MixtralError, match=r"[\d,]+ GiB of memory are needed at the least, and [\d,.]+ GiB are"):
            begin(config_of(corpus, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(UsageError, match=r"is not empty; choose another --out, as it is no training run$"):
        begin(config_of(corpus), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(UsageError, match="precious is a file; choose another --out, a folder"):
        begin(config_of(corpus), tmp_path / "precious")
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_run_s_folder_and_what_lies_in_it_are_refused_as_what_they_are(trained: Trained, corpus: Path) -> None:
    out = trained.run.folder
    with pytest.raises(UsageError, match=r"choose another --out, or go on with: mixtral train --resume \S+/run$"):
        begin(config_of(corpus), out)
    for inside, what in (("final", "is a model, not a"), ("checkpoints", "is not a"), ("nothere", "no such folder")):
        with pytest.raises(UsageError, match=rf"{inside}\b.*{what}.*; it lies in the run \S+/run$"):
            recorded_config(out / inside)
    with pytest.raises(UsageError, match=r"final is not empty; .* it is no training run; it lies in the run \S+/run$"):
        begin(config_of(corpus), out / "final")


def test_a_checkpoint_that_is_not_there(trained: Trained, corpus: Path, tmp_path: Path) -> None:
    there = ", ".join(path.name for path in checkpoints(trained.run.folder))
    for act in (recorded_config, lambda out: pretrain(out, Watching())):
        with pytest.raises(UsageError, match=rf"checkpoints/step_0: no such checkpoint; there are {there}$"):
            act(trained.run.folder / "checkpoints/step_0")
    begin(config_of(corpus), tmp_path)
    with pytest.raises(UsageError, match="step_0: no such checkpoint; there is none yet"):
        recorded_config(tmp_path / "checkpoints/step_0")


@pytest.mark.parametrize("work", ["train_bpe", "prepare"])
def test_ctrl_c_while_it_prepares(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    begin(config_of(corpus), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, work, stop)
        told = r"^stopped; begin anew with the same --out, or go on with: mixtral train --resume"
        with pytest.raises(Interrupted, match=told) as caught:
            pretrain(tmp_path, Watching())
    assert caught.value.exit_code == 130
    begin(config_of(corpus, steps=1), tmp_path)
    assert pretrain(tmp_path, Watching()).run.progress.step == 1
    monkeypatch.setattr(module, "save_final", stop)
    with pytest.raises(Interrupted, match=r"^stopped; go on with: mixtral train --resume"):
        pretrain(tmp_path, Watching())


def test_ctrl_c_while_threads_are_measured(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("mixtral.train.run_folder.choose_threads", stop)
    with pytest.raises(Interrupted, match="stopped before the run had begun; begin anew with the same --out"):
        begin(config_of(corpus), tmp_path)
    begin(config_of(corpus), tmp_path, threads=1)
    assert recorded_config(tmp_path) == config_of(corpus)


# -- finished already --------------------------------------------------------------------------------------------------


def test_what_a_finished_run_shows_is_what_it_showed_at_its_end(trained: Trained) -> None:
    out = trained.run.folder
    for asked in (out, checkpoints(out)[-1]):
        assert finished(asked) == (trained.folder, trained.config, trained.start_loss, trained.validation)
    assert finished(checkpoints(out)[0]) is None  # steps follow


def test_a_run_with_work_left_is_not_finished(trained: Trained, tmp_path: Path) -> None:
    spoils = {
        "no model": lambda out: shutil.rmtree(out / "final"),
        "half a model": lambda out: (out / "final/config.json").unlink(),
        "no last checkpoint": lambda out: shutil.rmtree(checkpoints(out)[-1]),
        "a model of another record": lambda out: record_threads(out, 7),
        "a model of an earlier end": lambda out: os.utime(out / "final/training.json", (1, 1)),
    }
    for name, spoil in spoils.items():
        out = tmp_path / name
        shutil.copytree(trained.run.folder, out)
        assert finished(out) is not None
        spoil(out)
        assert finished(out) is None, name


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
    with pytest.raises(UsageError, match=r"nowhere\.txt"):
        begin(config_of(tmp_path / "nowhere.txt"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_given_tokenizer_must_have_the_model_s_size(trained: Trained, corpus: Path, tmp_path: Path) -> None:
    tokenizer = str(trained.run.folder / "tokenizer")
    with pytest.raises(ConfigError, match=r"320 tokens, the model 400; add --set model.vocab_size=320"):
        begin(config_of(corpus, tokenizer=tokenizer, model={"vocab_size": 400}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    begin(config_of(corpus, tokenizer=tokenizer, steps=1), tmp_path / "good")
    assert pretrain(tmp_path / "good", Watching()).run.progress.step == 1


def test_a_folder_that_cannot_be_made(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MixtralError, match=r"^cannot write [^\n]*: Not a directory$"):
        begin(config_of(corpus), tmp_path / "file/run")


def test_compile_compiles_each_block_whole(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced by the compiler and run as it traced it; the metrics are the same, statistics of experts included."""
    compiled = []

    def compile_(block: torch.nn.Module, **options: object) -> None:
        compiled.append(options)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager", **options)

    monkeypatch.setattr(transformer.Block, "compile", compile_)
    for name, on in (("a", False), ("b", True)):
        begin(config_of(corpus, steps=2, compile=on), tmp_path / name)
        pretrain(tmp_path / name, Watching())
    assert compiled and compiled[0] == {"fullgraph": True}
    plain, traced = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("a", "b"))
    for ours, theirs in zip(traced, plain, strict=True):
        assert ours.keys() == theirs.keys()
        if "cross_entropy" in ours:
            assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-4)
