"""Each key of each format with values of the wrong type, the wrong size and absurd numbers: one line that names it.

The keys are those of the tables that the readers go by, so that a new key is covered by itself.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mixtral.cli import main
from mixtral.config.formats import _HF, _MISTRAL, read_config, to_hf, to_mistral
from mixtral.config.gguf import _GGUF, from_gguf, to_gguf
from mixtral.config.model import FLOATS, LIMITS, ModelConfig
from mixtral.config.specs import check_value
from mixtral.config.table import FileFormat
from mixtral.data.store import Index
from mixtral.engine import SamplingParams
from mixtral.errors import ConfigError, DataError, MixtralError, UsageError, WeightsError
from mixtral.gguf.header import GgufHeader
from mixtral.lm import LM
from mixtral.model import Mixtral
from mixtral.model.transformer import initialise
from mixtral.presets import preset
from mixtral.quant.scheme import QuantScheme
from mixtral.train import checkpoint
from mixtral.train.checkpoint import load_checkpoint
from mixtral.train.config import PretrainConfig
from mixtral.train.lines import _KINDS, _LAYER, read_lines
from mixtral.train.loop import Progress
from mixtral.train.record import recorded_config
from mixtral.weights.safetensors_file import SafetensorsFile
from tests.fuzz.mutate import dumped

NOT_NUMBERS = ("a", "x" * 5000, [], ["a"] * 1000, {}, {"a": 1}, True, "@deep@")
NO_FINITE = (float("nan"), float("inf"), "@wide@")  # the last: a whole number of 400 digits
WRONG: dict[Any, tuple[Any, ...]] = {
    int: (*NOT_NUMBERS, *NO_FINITE, 1.5, 1e30, 10**30, 2**63, -1),
    float: (*NOT_NUMBERS, *NO_FINITE, -1.0, -(10**30)),
    bool: ("a", "x" * 5000, [], {}, 7, 1e30, 10**30, "@deep@"),
    str: (7, True, [], {}, 1e30, 10**30, "x" * 5000, "@deep@"),
    tuple: (7, True, {}, 1e30, "x" * 5000, [[]], [{}], "@deep@"),
    dict: (7, True, [], 1e30, "x" * 5000, "@deep@"),
}
RESEARCH = preset("tiny").replace(router="sigmoid?bias=true", shared_experts=1)


def refusal(key: str, load: Callable[[], object], error: type[MixtralError] = ConfigError) -> str:
    with pytest.raises(error) as caught:
        load()
    message = str(caught.value)
    assert len(message) < 600 and message.isprintable()
    assert key.rpartition(".")[2] in message or "nested more than" in message, f"{key}: {message}"
    return message


def kinds(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass, None and literals aside."""
    found = {}
    for name, kind in typing.get_type_hints(cls).items():
        origin = typing.get_origin(kind)
        options = [kind, origin, *typing.get_args(kind), str]  # str: a literal's
        found[name] = next((option for option in options if option in WRONG), None)
    return found


def put(values: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy with one key, such as `moe.num_experts`, changed."""
    first, dot, rest = dotted.partition(".")
    inner = values.get(first)
    return {**values, first: put(inner if isinstance(inner, dict) else {}, rest, value) if dot else value}


FORMATS: dict[str, tuple[FileFormat, dict[str, Any]]] = {
    "config.json": (_HF, to_hf(RESEARCH, "bfloat16")),
    "params.json": (_MISTRAL, to_mistral(preset("tiny"))),
}


def field_keys() -> Iterator[tuple[str, str, Any]]:
    of = kinds(ModelConfig)
    for name, (table, _) in FORMATS.items():
        yield from ((name, key, of[field]) for field, key in table.fields.items())
        yield from ((name, key, float) for key in table.theta)


@pytest.mark.parametrize(("name", "key", "kind"), list(field_keys()))
def test_fields_of_configuration_files(tmp_path: Path, name: str, key: str, kind: type) -> None:
    file = tmp_path / name
    for value in WRONG[kind]:
        if key == "eos_token_id" and value in ([], ["a"] * 1000):
            continue  # a list is right there
        file.write_bytes(dumped(put(FORMATS[name][1], key, value)))
        assert refusal(key, lambda: read_config(file)).startswith(f"{file}: ")


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, (t, _) in FORMATS.items() for key in t.neutral])
def test_keys_that_ask_for_nothing(tmp_path: Path, name: str, key: str) -> None:
    file = tmp_path / name
    for value in ("a", "x" * 5000, 7, 1e30, 10**30, [1], *NO_FINITE, "@deep@"):
        file.write_bytes(dumped(put(FORMATS[name][1], key, value)))
        assert refusal(key, lambda: read_config(file)).startswith(f"{file}: ")


@pytest.mark.parametrize("name", FORMATS)
def test_keys_that_do_not_matter_may_hold_anything(tmp_path: Path, name: str) -> None:
    table, values = FORMATS[name]
    for key in (table.harmless | table.training_only) - {"model_type", "moe"}:
        for value in ("x" * 5000, 10**30, [1], {}, None):
            (tmp_path / name).write_bytes(dumped({**values, key: value}))
            read_config(tmp_path / name)


@pytest.mark.parametrize("field", [field for field in _GGUF.fields if field != "tie_embeddings"])
def test_fields_of_gguf(field: str) -> None:
    key, metadata = _GGUF.fields[field], {"general.architecture": "llama", **to_gguf(preset("tiny"))}
    for value in WRONG[kinds(ModelConfig)[field]]:
        if value not in ("@deep@", "@wide@", {}):
            refusal(key, partial(from_gguf, [GgufHeader({**metadata, key: value}, {})]))
    for other in ("general.architecture", "llama.rope.freq_base", "llama.attention.value_length", *_GGUF.neutral):
        for value in ("a", "x" * 5000, [1], 1e30, float("nan")):
            if (other, value) != ("llama.rope.freq_base", 1e30):
                refusal(other, partial(from_gguf, [GgufHeader({**metadata, other: value}, {})]))
    from_gguf([GgufHeader({**metadata, "tokenizer.ggml.tokens": 7}, {})])  # the vocabulary's size stands beside it


@pytest.mark.parametrize("field", kinds(ModelConfig))
def test_fields_in_python(field: str) -> None:
    for value in WRONG[kinds(ModelConfig)[field]]:
        if field == "eos_id" and value in ([], ["a"] * 1000):
            continue
        refusal(field, partial(RESEARCH.replace, **{field: value}))
    if field in LIMITS:
        refusal(field, lambda: RESEARCH.replace(**{field: 10**5000}))
        refusal(field, lambda: RESEARCH.replace(**{field: 2 * LIMITS[field]}))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(PretrainConfig)])
def test_fields_of_a_run(tmp_path: Path, field: str) -> None:
    record = PretrainConfig(model=preset("tiny")).to_dict()
    kind = dict if field == "model" else kinds(PretrainConfig)[field]
    for value in WRONG[kind]:
        (tmp_path / "config.json").write_bytes(dumped({"train": {**record, field: value}}))
        message = refusal(field, lambda: recorded_config(tmp_path))
        assert message.startswith(f"{tmp_path / 'config.json'}")
        if value not in ("@deep@", "@wide@") and field != "model":
            refusal(field, partial(PretrainConfig, **{"model": preset("tiny"), field: value}))


@pytest.mark.parametrize("train", [7, None, [], "x" * 5000, {}, {"model": {}}, {"model": {"dim": []}, "x" * 5000: 1}])
def test_a_run_that_is_none(tmp_path: Path, train: object, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes(dumped({"train": train}))
    refusal("", lambda: recorded_config(tmp_path))
    assert main(["runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("key", QuantScheme.of("4").to_dict())
def test_recipes(key: str) -> None:
    for value in (7, True, [], ["int8"], {}, 1e30, 10**30, "x" * 5000):
        if (key, value) != ("calibration", {}):
            refusal(key, partial(QuantScheme.from_dict, {**QuantScheme.of("4").to_dict(), key: value}))


@pytest.mark.parametrize("key", [*_KINDS, *_LAYER])
def test_metrics(tmp_path: Path, key: str) -> None:
    layer = {"max_over_mean": 1.0, "gini": 0.1, "dead": 0}
    good = {"step": 1, "tokens": 1, "val_bits_per_byte": 1.0, "val_loads": [[1.0]], "layers": [layer]}
    for value in ("a", True, {}, {"a": 1}, "x" * 5000, 10**30):
        line = {**good, "layers": [{**layer, key: value}]} if key in _LAYER else {**good, key: value}
        (tmp_path / "a.jsonl").write_bytes(dumped(line) + b"\n")
        if not (value == 10**30 and {**_KINDS, **_LAYER}[key] is float):
            message = refusal(key, lambda: read_lines(tmp_path / "a.jsonl"), MixtralError)
            assert message.startswith(f"{tmp_path / 'a.jsonl'}, line 1: ")


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_headers_of_safetensors(tmp_path: Path, key: str) -> None:
    entry: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    wrong = [7, True, {}, [[]], [True], [-1], [1.5], [10**30], ["a"], [2, *[1] * 1000], "@deep@", *NO_FINITE, None]
    for value in wrong + (["x" * 5000] if key != "dtype" else []):
        header = dumped({"weight": {**entry, key: value}})
        (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        refusal("weight", lambda: SafetensorsFile(tmp_path / "a"), WeightsError)


def test_a_configuration_of_700_bytes_takes_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arithmetic at the limits, a refusal beyond them; nothing is built."""
    for field, key in _HF.fields.items():
        if field in LIMITS and field not in ("norm_eps", "init_std"):
            at = {**to_hf(RESEARCH, "bfloat16"), key: 3_000_000_000}
            if field != "rope_theta":
                (tmp_path / "config.json").write_bytes(dumped(at))
                assert main(["info", str(tmp_path)]) == 2
                assert key in capsys.readouterr().err
    largest = {k: v for k, v in LIMITS.items() if k not in ("rope_theta", "norm_eps", "init_std", "shared_experts")}
    config = preset("tiny").replace(**largest)
    (tmp_path / "config.json").write_bytes(dumped(to_hf(config, "bfloat16")))
    assert main(["info", str(tmp_path)]) == 0 and main(["info", str(tmp_path), "--json"]) == 0


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("number", [10**20, 10**29, 1e39, 10**299, 1e299])
def test_large_numbers_are_floats_or_refused(field: str, number: float) -> None:
    """A whole number beyond 64 bits is no number for torch, one beyond 1e38 none for fp32 and GGUF."""
    plain = preset("tiny")
    if number > LIMITS[field]:
        refusal(field, lambda: plain.replace(**{field: number}))
        return
    config = plain.replace(**{field: number})
    assert type(getattr(config, field)) is float
    if field != "init_std":
        LM(initialise(Mixtral(config))).generate([1, 5, 7], max_tokens=2)


SAMPLING_FLOATS = [name for name, kind in kinds(SamplingParams).items() if kind is float]


@pytest.mark.parametrize("field", SAMPLING_FLOATS)
@pytest.mark.parametrize("number", [1, 10**25, 10**40, 10**400])
def test_large_numbers_for_sampling(field: str, number: int) -> None:
    accepted = number == 1 or field == "temperature" or (field == "repetition_penalty" and number < 1e30)
    if field in ("epsilon_cutoff", "eta_cutoff") or number == 10**400 or not accepted:
        refusal(field, lambda: SamplingParams(**{field: number}), UsageError)
        return
    params = SamplingParams(**{"temperature": 1.0, field: number})
    assert type(getattr(params, field)) is float
    lm = LM(initialise(Mixtral(preset("tiny"))))
    assert len(lm.generate([1, 5, 7], max_tokens=2, ignore_eos=True, **{"temperature": 1, field: number})) == 2


@pytest.mark.parametrize("key", sorted(_HF.checked | _MISTRAL.checked))
def test_an_object_where_none_is_wanted(tmp_path: Path, key: str) -> None:
    for name, (table, values) in FORMATS.items():
        if key in table.checked:
            (tmp_path / name).write_bytes(dumped(values | {key: {"a": 1}}))
            refusal(key, partial(read_config, tmp_path / name))


def test_checked_values() -> None:
    assert check_value("x", [1, 2.5], tuple[float, ...]) == (1.0, 2.5)
    assert check_value("x", {"a": [1]}, dict[str, list[int]]) == {"a": [1]}
    assert check_value("x", None, int | None) is None
    with pytest.raises(ConfigError, match=r"x\.a\[0\] must be a whole number, not 'b'"):
        check_value("x", {"a": ["b"]}, dict[str, list[int]])
    with pytest.raises(ConfigError, match="x must be a list of 2, not"):
        check_value("x", [1], tuple[int, str])


@pytest.mark.parametrize("key", ["step", "best_step", "sizes"])
def test_states_of_checkpoints(tmp_path: Path, key: str) -> None:
    good = {"step": 1, "best_step": None, "sizes": {}}
    for value in ("a", True, 1.5, [], {"a": "b"}, 10**30, "x" * 5000, "@deep@"):
        (tmp_path / "state.json").write_bytes(dumped({**good, key: value}))
        message = refusal(key, partial(load_checkpoint, tmp_path, None), MixtralError)
        assert message.startswith(f"checkpoint {tmp_path} cannot be read (")
    with pytest.raises(ConfigError, match="progress: best_loss must be a number, not 'a'"):
        Progress.from_dict({"step": 1, "best_step": None, "best_loss": "a", "start_loss": None})


def test_tensors_of_a_checkpoint_that_its_file_has_not(tmp_path: Path) -> None:
    """torch's reader would allocate what the header claims."""
    header = dumped({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}})
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(WeightsError, match="the byte range of w does not fit its shape"):
        checkpoint._stored(tmp_path)


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(Index)])
def test_indices_of_prepared_data(tmp_path: Path, key: str) -> None:
    inputs = {"tokenizer": "a", "sources": [{"name": "b"}]}
    shard = {"name": "s", "tokens": 1, "documents": 1, "text_bytes": 1, "files": {"s.npy": [1, "a"]}}
    good = {"inputs": inputs, "weights": [None], "domains": ["d"], "shards": {"train": [shard], "val": []}, "format": 1}

    def refused(values: dict[str, Any], name: str) -> None:
        (tmp_path / "index.json").write_bytes(dumped(values))
        assert refusal(name, partial(Index.read, tmp_path), DataError).startswith(f"{tmp_path / 'index.json'}: ")

    (tmp_path / "index.json").write_bytes(dumped(good))
    assert Index.read(tmp_path).shards["train"][0].files == {"s.npy": (1, "a")}
    for value in ("a", True, 1.5, {"a": "b"}, [[]], 10**30, "x" * 5000, "@deep@"):
        refused({**good, key: value}, key)
    for field in shard:
        for value in (True, 1.5, {"a": "b"}, [[]], 10**30, "x" * 5000, "@deep@"):
            refused({**good, "shards": {"train": [{**shard, field: value}], "val": []}}, field)
    for odd in ({"weights": [-1.0]}, {"weights": []}, {"shards": {"train": []}}, {"inputs": {"sources": []}}):
        refused({**good, **odd}, next(iter(odd)))
