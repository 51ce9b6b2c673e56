from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral import engine
from mixtral.lm import load
from tests.commands.conftest import Outcome, Run


@pytest.fixture
def chat(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Type lines into `mixtral chat`, greedily."""

    def typed(text: str, *options: str | Path) -> Outcome:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return run("chat", "--model", folder, "--temperature", "0", "--max-tokens", "6", *options)

    yield typed


def test_the_text_runs_on(chat: Run, folder: Path) -> None:
    lm = load(folder)
    first = lm.generate("To be", max_tokens=6)
    second = lm.generate(f"To be{first}\nor not", max_tokens=6)
    assert chat("To be\nor not\n") == (0, f"{first}\n{second}\n", chat("").err)


def test_on_a_terminal_control_characters_are_escaped(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = engine.Piece(0, 65, -1.0, "a\x1b[2J\n", "length")
    monkeypatch.setattr(engine.Engine, "stream", lambda *_, **__: iter([piece]))
    assert chat("To be\n").out == "a\x1b[2J\n\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert chat("To be\n").out == r"a\x1b[2J" + "\n\n"


def test_reset_starts_anew_and_quit_leaves(chat: Run, folder: Path) -> None:
    first = load(folder).generate("To be", max_tokens=6)
    code, out, err = chat("To be\n/reset\nTo be\n/quit\nTo be\n")
    assert code == 0 and out == f"{first}\n" * 2 and "[a new text]" in err


def test_routing(chat: Run, dense_folder: Path) -> None:
    _, out, err = chat("/routing\nTo be\n/routing\n")
    assert "[no text yet]" in err and "Routing of" in out
    assert "this model is dense" in chat("/routing\n", "--model", dense_folder).err


def test_unknown_commands_are_told_and_not_given_to_the_model(chat: Run) -> None:
    code, out, err = chat("/rest\n\n")
    assert code == 0 and out == "" and "[unknown command /rest; known: /reset, /routing, /quit]" in err


def test_the_folder_says_how_unless_one_says_oneself(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a bound larger than the context, half the context is left to the text."""
    shutil.copytree(folder, tmp_path / "model")
    seen: list[tuple[int, engine.SamplingParams]] = []
    given = lambda _, prompts, params, **__: seen.append((len(prompts[0]), params)) or iter(())  # noqa: E731
    monkeypatch.setattr(engine.Engine, "stream", given)

    def asked(said: str, *options: str) -> tuple[int, engine.SamplingParams]:
        (tmp_path / "model/generation_config.json").write_text(said)
        monkeypatch.setattr("sys.stdin", io.StringIO("to be " * 100 + "\n"))
        assert run("chat", "--model", tmp_path / "model", *options).code == 0
        return seen.pop()

    params = engine.SamplingParams
    assert asked("{}") == (64 - 128 // 4, params(32, temperature=0.8, top_p=0.95))
    assert asked('{"max_new_tokens": 9}') == (64 - 9, params(9, temperature=0.8, top_p=0.95))
    assert asked('{"max_new_tokens": 9}', "--max-tokens", "5")[1] == params(5, temperature=0.8, top_p=0.95)
    assert asked('{"do_sample": true, "max_new_tokens": 999}') == (32, params(32, temperature=1.0, top_k=50))
    assert asked('{"max_length": 40, "repetition_penalty": 1.5}', "--temperature", "0") == (
        20, params(20, max_length=40, repetition_penalty=1.5, top_p=0.95))  # fmt: skip


def test_a_long_text_loses_its_beginning(chat: Run, folder: Path) -> None:
    code, out, _ = chat("to be " * 100 + "\n")
    lm = load(folder)
    ids = lm.tokenizer.encode("to be " * 100)
    rest = [ids[0], *ids[-(64 - 6 - 1) :]]
    assert code == 0 and out.strip() == lm.tokenizer.decode(lm.generate(rest, max_tokens=6)).strip()


def test_a_text_without_a_begin(chat: Run, folder: Path) -> None:
    code, out, _ = chat("to be " * 100 + "\n", "--no-bos")
    lm = load(folder)
    ids = lm.tokenizer.encode("to be " * 100, bos=False)
    answer = lm.generate(ids[-(64 - 6) :], max_tokens=6)
    assert code == 0 and out.strip() == lm.tokenizer.decode(answer).strip()
    assert chat("to be\n", "--bos").out == chat("to be\n").out != chat("to be\n", "--no-bos").out


def test_ctrl_c_stops_the_answer_alone(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.Engine.stream

    def interrupted(*args: object, **options: object) -> Iterator[object]:
        pieces = real(*args, **options)  # type: ignore[arg-type]
        yield next(pieces)
        monkeypatch.setattr(engine.Engine, "stream", real)
        raise KeyboardInterrupt

    whole = chat("To be\n").out
    monkeypatch.setattr(engine.Engine, "stream", interrupted)
    code, out, _ = chat("To be\n/reset\nTo be\n")
    first, second = out.splitlines()
    assert code == 0 and f"{second}\n" == whole and whole.startswith(first) and len(first) < len(second)


def test_ctrl_c_at_the_prompt_goes_on(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([KeyboardInterrupt(), "/quit"])

    def typed(_: str) -> str:
        answer = next(answers)
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setattr("builtins.input", typed)
    assert chat("").code == 0 and next(answers, None) is None


def test_no_room_for_a_text_is_misuse(chat: Run) -> None:
    code, out, err = chat("To be\n", "--max-tokens", "63")
    assert (code, out) == (2, "") and "--max-tokens 63: leaves no room" in err and err.count("\n") == 1
