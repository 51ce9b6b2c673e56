"""What the benchmarks of decoding and prefill count, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decode import needed, slowdowns
from lib.contest import Entry, Series, names_of, ratio, row, take_turns
from lib.engines import Run, Task, parse_batched_bench, parse_llama_bench, prompts
from lib.model_files import ModelFiles, default, gguf_step_bytes, our_step_bytes, plain_step_bytes
from lib.quality import distance
from lib.transformers_engine import Setting, best, choices
from prefill import flops

from mixtral.presets import tiny

# The default model, a layer: wqkv 1024 x 1536, wo 1024 x 1024, two experts of 3 x 1024 x 3584; the output once.
LAYER = 1024 * 1536 + 1024 * 1024 + 2 * 3 * 1024 * 3584
MATRICES = 12 * LAYER + 32000 * 1024
FP32 = 4 * (12 * (8 * 1024 + 2 * 1024) + 1024)  # gates and norms


class Fake:
    """Rates in the order in which they are asked for; the first is the warm-up's."""

    def __init__(self, title: str, rates: list[float]) -> None:
        self.title, self.settings, self.rates = title, "none", iter(rates)

    def __call__(self, task: Task) -> Run:
        del task
        return Run(next(self.rates), 7)

    def close(self) -> None: ...


def entry(title: str, rates: list[float], ours: bool = False) -> Entry:
    return Entry(Fake(title, rates), "int8", "q8", lambda task: 10.0 + task.context, ours)


# -- bytes and FLOPs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "bits"), [("bf16", 16), ("int8", 8.5), ("int4", 4.5)])
def test_our_step_reads_the_active_matrices_in_their_format(format: str, bits: float) -> None:
    assert MATRICES == 328_466_432
    assert our_step_bytes(default(), format) == MATRICES * bits / 8 + FP32 + 2 * 1024


def test_plain_weights_are_all_active_ones_but_the_embedding_s_other_rows() -> None:
    assert plain_step_bytes(default(), 2) == 2 * (MATRICES + FP32 / 4 + 1024)


def test_a_gguf_step_is_counted_from_its_header(tmp_path: Path) -> None:
    """Q4_0 keeps embedding and output at 8.5 bits; a quarter of the experts is read."""
    pytest.importorskip("gguf")
    config = tiny()
    files = ModelFiles(tmp_path, "tiny", config)
    attention, experts, output = 3 * 128 * (128 + 2 * 64 + 128), 3 * 2 * 3 * 128 * 192, 1024 * 128
    fp32 = 4 * (3 * (8 * 128 + 2 * 128) + 128)
    want = (attention + experts) * 4.5 / 8 + output * 8.5 / 8 + fp32 + 128 * 8.5 / 8
    assert gguf_step_bytes(files.gguf("int4"), config) == want
    with pytest.raises(SystemExit, match="holds another model"):
        ModelFiles(tmp_path, "tiny", config.replace(n_layers=2))


def test_the_cache_is_counted_at_its_mean_length() -> None:
    cache = 12 * 2 * 4 * 64 * 2  # bytes a token
    assert needed(default(), 5.0, 16, Task(128, 64)) == 5 + cache * (128 + 32)


def test_a_prompt_s_output_is_one_row() -> None:
    config = default()
    attention = 12 * 2 * 16 * 64 * (512 + 1) / 2
    layers = 12 * (LAYER + 8 * 1024)
    assert flops(config, 0, 16, Task(512, 0)) == pytest.approx(2 * (layers + attention) + 2 * 32000 * 1024 / 512)


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_rounds_go_in_turn_and_medians_are_of_the_rounds() -> None:
    """Three rounds of ours 2, 4, 8 and theirs 1, 1, 4; the ceilings of each round with them."""
    tops = iter([0.0, 0.0, 100.0, 200.0, 100.0, 200.0, 400.0, 200.0])
    entries = [entry("mixtral", [99.0, 2.0, 4.0, 8.0], ours=True), entry("other", [99.0, 1.0, 1.0, 4.0])]
    ours, theirs = take_turns(entries, [Task(0, 4)], 3, lambda: next(tops))
    assert ours.rates == [2.0, 4.0, 8.0] and ours.ceilings == [100.0, 100.0, 400.0]
    assert theirs.rates == [1.0, 1.0, 4.0] and theirs.ceilings == [200.0, 200.0, 200.0]
    assert ours.of_ceiling == 0.2  # of 0.2, 0.4, 0.2
    kept = row(theirs, [ours, theirs])
    assert kept["ratio"] == 2.0  # of 2, 4, 2
    assert (kept["tokens_per_second"], kept["lowest"], kept["highest"]) == (1.0, 1.0, 4.0)
    assert row(ours, [ours, theirs])["ratio"] is None


def test_several_requests_are_for_those_who_serve_them() -> None:
    alone, many = entry("other", [1.0, 1.0, 1.0, 1.0]), replace(entry("mixtral", [1.0] * 4), many=True)
    series = take_turns([alone, many], [Task(0, 4), Task(0, 4, batch=8)], 1, lambda: 1.0)
    assert [(s.entry, s.task.batch) for s in series] == [(alone, 1), (many, 1), (many, 8)]


def test_a_ratio_is_the_median_of_ratios_and_not_of_rates() -> None:
    assert ratio([1.0, 10.0, 100.0], [1.0, 1.0, 200.0]) == 1.0


def test_the_slowdown_stands_beside_what_bytes_explain() -> None:
    one = entry("mixtral", [])
    long, short = Series(one, Task(1128, 4), rates=[1.0, 4.0, 2.0]), Series(one, Task(128, 4), rates=[2.0, 4.0, 6.0])
    several = Series(one, Task(1128, 4, batch=8), rates=[9.0, 9.0, 9.0])
    (found,) = slowdowns([short, long, several], 1128)
    assert found["slowdown"] == 2.0  # of 2, 1, 3
    assert found["explained"] == 1138 / 138 and found["cache_bytes"] == 1128


# -- what others print -------------------------------------------------------------------------------------------------


def test_llama_bench_s_one_test_is_read() -> None:
    assert parse_llama_bench(json.dumps([{"n_gen": 64, "avg_ts": 31.5, "samples_ts": [31.5]}])) == 31.5
    with pytest.raises(ValueError):
        parse_llama_bench("[]")


def test_llama_batched_bench_s_line_is_read_among_others() -> None:
    line = {"pp": 128, "tg": 64, "pl": 8, "speed_pp": 100.0, "speed_tg": 70.0, "speed": 80.0}
    assert parse_batched_bench(f"main: n_kv_max = 2048\n{json.dumps(line)}\n\nllama_perf: done\n") == 70.0


# -- small things ------------------------------------------------------------------------------------------------------


def test_prompts_are_the_same_each_time_and_have_no_control_tokens() -> None:
    first = prompts(Task(50, 1, batch=3), 100)
    assert [len(ids) for ids in first] == [50, 50, 50] and first == prompts(Task(50, 9, batch=3), 100)
    assert min(map(min, first)) >= 3 and max(map(max, first)) < 100


def test_the_distance_of_two_distributions_by_hand() -> None:
    plain = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    other = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]])
    want = 0.5 * torch.log(torch.tensor(2.0)) - 0.25 * torch.log(torch.tensor(2.0))
    found = distance(other.log(), plain.log())
    assert found["kl"] == pytest.approx(want.item() / 2) and found["agreement"] == 0.5


def test_a_setting_of_transformers_is_taken_by_its_title() -> None:
    title = "bf16, sdpa, grouped_mm"
    assert best(Path("none"), 1, Task(8, 0), title) == (Setting("bf16", "sdpa", "grouped_mm"), {})
    assert not any(s.compiled or s.experts == "batched_mm" for s in choices(Task(8, 0)))
    with pytest.raises(SystemExit, match="none is called 'int8'"):
        best(Path("none"), 1, Task(8, 8), "int8")


def test_names_between_commas() -> None:
    assert names_of(["a", "b"])("b,a") == ["b", "a"]
    with pytest.raises(Exception, match="unknown c; known: a, b"):
        names_of(["a", "b"])("a,c")
