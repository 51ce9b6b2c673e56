"""What a folder or a GGUF file recommends: key by key, and who counts before whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from transformers import GenerationConfig

from mixtral.config import generation, table
from mixtral.engine import SamplingParams, recommended, with_recommended, within_vocabulary
from mixtral.errors import ConfigError, MixtralError, UsageError

DRAW = '"do_sample": true'


@pytest.fixture(autouse=True)
def _warnings_afresh() -> None:
    table.warn_once.cache_clear()


def says(folder: Path, values: Any) -> Path:
    text = values if isinstance(values, str) else json.dumps(values)
    (folder / "generation_config.json").write_text(text)
    return folder


def test_every_key_of_transformers_is_in_one_table() -> None:
    tables = [generation.HONOURED, generation.SAMPLING, generation.SWITCHES,
              generation.NEUTRAL, generation.HARMLESS]  # fmt: skip
    keys = [key for table in tables for key in table]
    assert len(keys) == len(set(keys))
    assert {key for key in vars(GenerationConfig()) if key != "_original_object_hash"} <= set(keys)


def test_defaults_of_sampling_are_transformers() -> None:
    theirs = GenerationConfig._get_default_generation_params()
    for key, value in generation.SAMPLING.items():
        assert theirs.get(key) == value or (key not in theirs and not value), key
    for key, values in generation.NEUTRAL.items():
        assert theirs.get(key) is None or theirs[key] in values, key


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (None, {}),
        ({}, {}),
        ({"temperature": 0.6}, {}),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "top_k": 0}, {"temperature": 1.0}),
        ({"do_sample": True, "top_k": None, "temperature": None}, {"temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "min_p": None, "eos_token_id": 2},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 5},
        ),
        (
            {"do_sample": True, "top_h": 0.4, "typical_p": 0.9, "epsilon_cutoff": 3e-4, "eta_cutoff": 1e-3},
            {"temperature": 1.0, "top_k": 50, "top_h": 0.4, "typical_p": 0.9, "epsilon_cutoff": 3e-4,
             "eta_cutoff": 1e-3},
        ),
        (
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[1, 2]], "suppress_tokens": [4],
             "begin_suppress_tokens": [5], "stop_strings": ["a", "b"], "max_new_tokens": 9, "min_new_tokens": 2},
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": ((1, 2),), "suppress_tokens": (4,),
             "begin_suppress_tokens": (5,), "stop": ("a", "b"), "max_tokens": 9, "min_tokens": 2},
        ),
        ({"stop_strings": "a"}, {"stop": ("a",)}),
        ({"max_length": 99, "min_length": 3}, {"max_length": 99, "max_tokens": 99, "min_length": 3}),
        (
            {"max_length": 99, "max_new_tokens": 7, "min_length": 3, "min_new_tokens": 1},
            {"max_tokens": 7, "min_tokens": 1},
        ),
    ],
)  # fmt: skip
def test_recommended(tmp_path: Path, values: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    found = recommended(tmp_path if values is None else says(tmp_path, values))
    assert found == wanted
    SamplingParams.from_dict(found)


def test_old_folders_say_it_in_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"do_sample": true, "top_k": 3, "hidden_size": 8}')
    assert recommended(tmp_path) == {"temperature": 1.0, "top_k": 3}
    assert recommended(says(tmp_path, {})) == {}  # the file of its own counts alone


WRONG: dict[str, tuple[Any, ...]] = {  # what no key of this kind may be, beside texts, lists of lists and objects
    "do_sample": (1, "true"),
    "temperature": (True, -1), "top_h": (0, 2), "top_k": (0.5, -1), "top_p": (1.5, -0.1), "min_p": (2,),
    "typical_p": (0,), "epsilon_cutoff": (1,), "eta_cutoff": (-1,),
    "max_new_tokens": (0, 2.5), "max_length": (-3,), "min_new_tokens": (-1,), "min_length": (1.5, True),
    "stop_strings": (5, [5], [""], ""), "repetition_penalty": (0, -1), "no_repeat_ngram_size": (-1, 0.5),
    "bad_words_ids": (7, [7], [[]], [["a"]], [[-1]]), "suppress_tokens": (7, [-1], [1.5]),
    "begin_suppress_tokens": (7, ["a"]),
}  # fmt: skip


def test_every_key_that_is_read_has_wrong_values_here() -> None:
    read = generation.HONOURED.keys() | generation.SAMPLING.keys() | {"do_sample"}
    assert read == WRONG.keys()


@pytest.mark.parametrize("key", WRONG)
def test_wrong_values_are_named_by_file_and_key(tmp_path: Path, key: str) -> None:
    text = () if key == "stop_strings" else ("x" * 5000,)
    for wrong in (*WRONG[key], *text, {"a": 1}, [[[1]]]):
        with pytest.raises(ConfigError) as error:
            recommended(says(tmp_path, {"do_sample": True, key: wrong}))
        line = str(error.value)
        assert f"generation_config.json: {'' if key == 'do_sample' else 'sampling: '}{key} must be " in line, wrong
        assert "\n" not in line and len(line) < 600


@pytest.mark.parametrize("text", ["{", "[]", "7", '"a"', f'{{{DRAW}, "top_p": NaN}}', f'{{{DRAW}, "top_k": 1e999}}',
                                  '{"a":' * 9999, "\xff", f'{{{DRAW}, {DRAW}}}'])  # fmt: skip
def test_a_damaged_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"generation_config\.json: ") as error:
        recommended(tmp_path)
    assert "\n" not in str(error.value)


def test_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(ConfigError, match=r"generation_config\.json: "):
        recommended(tmp_path)


# -- what is not applied is named --------------------------------------------------------------------------------------


def test_what_changes_the_result_is_named_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {"num_beams": 4, "guidance_scale": 1.5, "top_p": 0.5, "foo": [1] * 1000, "use_cache": True,
              "cache_implementation": "quantized"}  # fmt: skip
    assert recommended(says(tmp_path, values)) == {}
    [record] = caplog.records
    assert record.message.endswith(
        "generation_config.json: not applied: num_beams 4, guidance_scale 1.5, cache_implementation 'quantized'; "
        "no effect without do_sample: top_p; unknown: foo"
    )


@pytest.mark.parametrize("key", generation.NEUTRAL)
def test_each_key_that_is_not_applied(tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    recommended(says(tmp_path, {key: 3}))
    assert f"not applied: {key} 3" in caplog.text
    caplog.clear()
    for neutral in (*generation.NEUTRAL[key], None):
        recommended(says(tmp_path, {key: neutral}))
    assert not caplog.records


def test_what_is_harmless_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recommended(says(tmp_path, dict.fromkeys(generation.HARMLESS, 3)))
    recommended(says(tmp_path, {"temperature": 1.0, "top_k": 50, "top_p": 1}))  # as without them
    recommended(says(tmp_path, {"do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 0.5}))
    assert not caplog.records


# -- who counts first --------------------------------------------------------------------------------------------------


def test_recommended_ids_beyond_the_vocabulary_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = {"suppress_tokens": (3, 9, 10), "bad_words_ids": ((9,), (1, 10)), "begin_suppress_tokens": (9,), "top_k": 9}
    kept = {"suppress_tokens": (3, 9), "bad_words_ids": ((9,),), "begin_suppress_tokens": (9,), "top_k": 9}
    assert within_vocabulary(model, 10) == kept and within_vocabulary(kept, 10) == kept
    end = "that the model recommends: ids beyond its vocabulary of 10 are left out"
    assert sorted(caplog.messages) == [f"bad_words_ids {end}", f"suppress_tokens {end}"]


def test_what_is_asked_for_counts_before_what_is_recommended() -> None:
    model = {"max_length": 99, "max_tokens": 99, "min_length": 4, "temperature": 0.7, "top_k": 50}
    assert with_recommended({}, model) == model
    assert with_recommended({"top_k": None, "temperature": 0.0}, model) == {**model, "top_k": None, "temperature": 0.0}
    asked = {"max_tokens": 7, "min_tokens": 1, "stop": "x"}
    assert with_recommended(asked, model) == {**asked, "stop": ("x",), "temperature": 0.7, "top_k": 50}


@pytest.mark.parametrize(
    ("model", "asked", "wanted"),
    [
        ({"max_length": 30}, {"max_length": 100}, {"max_length": 100, "max_tokens": 100}),
        ({"max_length": 300}, {"max_length": 10}, {"max_length": 10, "max_tokens": 10}),
        ({"max_length": 30}, {"max_length": 100, "max_tokens": 7}, {"max_length": 100, "max_tokens": 7}),
        ({"max_length": 30}, {"max_length": None}, {"max_length": None}),
        ({"max_new_tokens": 10}, {"max_length": 100}, {"max_length": 100, "max_tokens": 10}),  # as transformers has it
    ],
)
def test_how_long(tmp_path: Path, model: dict[str, Any], asked: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert with_recommended(asked, recommended(says(tmp_path, model))) == wanted


def test_a_wrong_length_is_named_as_asked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sampling: max_length must be a positive integer or None, not -3"):
        SamplingParams.from_dict(with_recommended({"max_length": -3}, recommended(says(tmp_path, {"max_length": 9}))))


# -- GGUF --------------------------------------------------------------------------------------------------------------


def gguf(path: Path, **values: float | str) -> Path:
    writer = GGUFWriter(path, "llama")
    for key, value in values.items():
        add = {int: writer.add_int32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key if "." in key else f"general.sampling.{key}", value)  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert recommended(gguf(tmp_path / "none.gguf")) == {}
    found = recommended(gguf(tmp_path / "some.gguf", temp=0.5, top_k=0, top_p=0.75, min_p=0.25))
    assert found == {"temperature": 0.5, "top_p": 0.75, "min_p": 0.25} and not caplog.records
    assert recommended(gguf(tmp_path / "k.gguf", temp=0.5, top_k=7)) == {"temperature": 0.5, "top_k": 7}
    assert recommended(gguf(tmp_path / "others.gguf", top_k=7, mirostat=2)) == {}
    assert "not applied: general.sampling.mirostat 2; no effect without general.sampling.temp: general" in caplog.text
    with pytest.raises(MixtralError, match=r"wrong.gguf: sampling: general.sampling.top_p must be above 0 and at most"):
        recommended(gguf(tmp_path / "wrong.gguf", temp=0.5, top_p=2.0))
    with pytest.raises(MixtralError, match=r"wrong2.gguf: sampling: general.sampling.temp must be a number of at lea"):
        recommended(gguf(tmp_path / "wrong2.gguf", temp="hot"))


def test_gguf_that_holds_the_file(tmp_path: Path) -> None:
    kept = {"mixtral.file.generation_config.json": '{"do_sample": true, "repetition_penalty": 1.5, "top_p": null}'}
    found = recommended(gguf(tmp_path / "kept.gguf", temp=0.1, **kept))
    assert found == {"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.5}
    with pytest.raises(ConfigError, match=r"kept2.gguf: mixtral.file.generation_config.json: not JSON"):
        recommended(gguf(tmp_path / "kept2.gguf", **dict.fromkeys(kept, "{")))


@pytest.mark.parametrize("values", [
    {"temperature": "hot"}, {"top_k": -3}, {"top_p": 7}, {"bos_token_id": "x"}, {"pad_token_id": [None]},
])
def test_types_are_checked_where_nothing_is_sampled(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"generation_config\.json: .*{next(iter(values))} must be"):
        recommended(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 0, "temperature": 0.0, "pad_token_id": -1}))
    assert recommended(tmp_path) == {}
