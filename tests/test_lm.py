"""LM against transformers, both ways, over the shapes that differ; and LM's own promises and errors.

Weights are drawn at scale 0.2, so that attention and routing are far from uniform and mistakes show.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mixtral
from mixtral import engine
from mixtral.config import ModelConfig
from mixtral.errors import ConfigError, UsageError, WeightsError
from mixtral.kernels.native import library as native
from mixtral.lm import LM, load
from mixtral.model import Mixtral, initialise
from mixtral.tokenizer import Tokenizer, train_bpe
from mixtral.weights import convert, parameter_shapes, save_hf

transformers = pytest.importorskip("transformers")

TOKENS = 64


def make_peer(sparse: bool = True, *, heads: int = 8, kv: int = 2, **changes: Any) -> Any:
    """A tiny random transformers model, fp32."""
    shape = dict(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=8, max_position_embeddings=256, rope_theta=1e4, sliding_window=None,
        tie_word_embeddings=False, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    kind = (transformers.MixtralConfig, transformers.MixtralForCausalLM) if sparse else (
        transformers.MistralConfig, transformers.MistralForCausalLM)  # fmt: skip
    peer = kind[1](kind[0](**{**shape, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peer.parameters():
            spread = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(spread if parameter.dim() > 1 else 1 + spread)
    return peer


def tokens(n: int = TOKENS, seed: int = 0) -> list[int]:
    return torch.randint(3, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def assert_agree(lm: LM, peer: Any) -> None:
    """Logits and router logits within 1e-5, 64 greedy tokens the same."""
    ids = tokens()
    sparse = lm.config.is_sparse
    theirs = peer(torch.tensor([ids]), **({"output_router_logits": True} if sparse else {}))
    assert distance(lm.logits(ids), theirs.logits[0]) < 1e-5
    if sparse:
        routing = lm.routing(ids)
        assert len(routing) == len(theirs.router_logits) == lm.config.n_layers
        for ours, router_logits in zip(routing, theirs.router_logits, strict=True):
            assert distance(ours.logits_TE, router_logits.reshape(ours.logits_TE.shape)) < 1e-5
    prompt = ids[:20]
    peer.generation_config.eos_token_id = None  # min_new_tokens would forbid the end token, and change the text
    greedy = dict(max_new_tokens=64, do_sample=False, pad_token_id=0)
    continued = peer.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 20), **greedy)[0, 20:].tolist()
    assert lm.generate(prompt, max_tokens=64, ignore_eos=True) == continued


CASES = {  # every value of each axis, and the pairs where code paths meet
    "E4 K1": dict(num_local_experts=4, num_experts_per_tok=1),
    "E4 K2, window": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "E4 K3, tied": dict(num_local_experts=4, num_experts_per_tok=3, tie_word_embeddings=True),
    "E5 K1, window, tied, 6/3": dict(
        num_local_experts=5, num_experts_per_tok=1, sliding_window=16, tie_word_embeddings=True, heads=6, kv=3),
    "E5 K2": dict(num_local_experts=5, num_experts_per_tok=2),
    "E5 K3, 6/3": dict(num_local_experts=5, num_experts_per_tok=3, heads=6, kv=3),
    "E8 K1, 6/3": dict(num_local_experts=8, num_experts_per_tok=1, heads=6, kv=3),
    "E8 K2": dict(num_local_experts=8, num_experts_per_tok=2),
    "E8 K2, tied, 3 layers": dict(
        num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=True, num_hidden_layers=3),
    "E8 K3, window": dict(num_local_experts=8, num_experts_per_tok=3, sliding_window=16),
    "dense": dict(sparse=False),
    "dense, window, 6/3": dict(sparse=False, sliding_window=16, heads=6, kv=3),
    "dense, tied": dict(sparse=False, tie_word_embeddings=True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_both_ways(case: str, tmp_path: Path) -> None:
    peer = make_peer(**CASES[case])
    peer.save_pretrained(tmp_path / "theirs")
    lm = load(tmp_path / "theirs", dtype="fp32", device="cpu")
    assert_agree(lm, peer)
    if lm.config.is_sparse:
        peer.save_pretrained(tmp_path / "fused", save_original_format=False)
        fused = load(tmp_path / "fused", dtype="fp32", device="cpu")
        assert torch.equal(fused.logits(tokens()), lm.logits(tokens()))
    lm.save(tmp_path / "ours")
    back = type(peer).from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager").eval()
    assert distance(lm.logits(tokens()), back(torch.tensor([tokens()])).logits[0].detach()) < 1e-5


def test_the_end_token_ends_both(tmp_path: Path) -> None:
    """transformers and we stop at the same token, and both return it."""
    greedy = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, attention_mask=torch.ones(1, 20))
    peer, prompt = make_peer(eos_token_id=None), torch.tensor([tokens(20)])
    free = peer.generate(prompt, **greedy)[0, 20:].tolist()
    end = next(t for i, t in enumerate(free) if i > 3 and t not in free[:i])
    peer = make_peer(eos_token_id=end)
    peer.save_pretrained(tmp_path / "theirs")
    wanted = peer.generate(prompt, **greedy)[0, 20:].tolist()
    assert wanted == free[: free.index(end) + 1]
    assert load(tmp_path / "theirs", dtype="fp32", device="cpu").generate(tokens(20), max_tokens=20) == wanted


# -- the rest of LM, on a model of our own -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, and the dog sat on the cat.\n" * 20], vocab_size=300)


def make_lm(tokenizer: Tokenizer | None, **changes: Any) -> LM:
    config = ModelConfig(
        vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, n_experts=4,
        experts_per_token=2, context=64,
    )  # fmt: skip
    return LM(initialise(Mixtral(config.replace(**changes)), torch.Generator().manual_seed(0)), tokenizer)


@pytest.fixture
def lm(own_tokenizer: Tokenizer) -> LM:
    return make_lm(own_tokenizer)


SAMPLED = dict(max_tokens=20, temperature=1.0, seed=0, ignore_eos=True)


def test_text_gives_text_and_ids_give_ids(lm: LM) -> None:
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode("the cat")
    text, numbers = lm.generate("the cat", **SAMPLED), lm.generate(ids, **SAMPLED)
    assert lm.tokenizer.decode(ids + numbers) == "the cat" + text
    assert "".join(lm.stream("the cat", **SAMPLED)) == text and list(lm.stream(ids, **SAMPLED)) == numbers
    assert all(lm.stream("the cat", **SAMPLED))  # no empty pieces
    assert lm.generate(torch.tensor(ids), **SAMPLED) == numbers
    assert lm.generate(["the cat", "a dog sat"], **SAMPLED)[0] == text
    assert lm.generate([ids, ids[:2]], **SAMPLED)[0] == numbers
    assert lm.generate([], **SAMPLED) == []


def test_begin_of_a_text(lm: LM) -> None:
    """As the tokenizer's files decide, unless one says oneself; never an end, which the answer would follow."""
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode("the cat", bos=False)
    for bos, prompt in ((None, [1, *ids]), (True, [1, *ids]), (False, ids)):
        answer = lm.generate(prompt, max_tokens=8, ignore_eos=True)
        wanted = "".join(map(lm.tokenizer.stream(after=prompt).add, answer))
        assert wanted.startswith(lm.generate("the cat", bos=bos, max_tokens=8, ignore_eos=True).rstrip("\ufffd"))
        assert list(lm.stream("the cat", bos=bos, max_tokens=8, ignore_eos=True))
    framed = copy.copy(lm.tokenizer)
    framed.frame(bos=False, eos=True)
    other = LM(lm.model, framed)
    assert framed.encode("the cat") == [*ids, 2]
    asked = {"max_tokens": 8, "ignore_eos": True}
    assert other.generate("the cat", **asked) == lm.generate("the cat", bos=False, **asked)
    assert other.generate("the cat", bos=True, **asked) == lm.generate("the cat", **asked)
    with pytest.raises(UsageError, match="bos: goes with a text; token ids are taken as they are"):
        lm.generate(ids, bos=False)


def test_stop_takes_one_string_or_several(lm: LM) -> None:
    text = lm.generate("the cat", **SAMPLED)
    stop = text[3:5]
    for form in (stop, [stop, "never seen"], (stop,)):
        assert lm.generate("the cat", **SAMPLED, stop=form) == text[: text.index(stop)]


def test_logits_and_routing(lm: LM) -> None:
    ids = tokens(10)
    logits = lm.logits(ids)
    assert logits.shape == (10, 300) and logits.dtype == torch.float32 and not logits.requires_grad
    logits += 1  # the caller's own, to change
    assert torch.equal(lm.logits(torch.tensor(ids)) + 1, logits)
    routing = lm.routing(ids)
    assert len(routing) == 2 and routing[0].experts_TK.shape == (10, 2)


def test_saving_and_loading_again_gives_the_same(lm: LM, tmp_path: Path) -> None:
    lm.save(tmp_path / "new")
    again = mixtral.load(tmp_path / "new", dtype="fp32", device="cpu", runner="torch")
    assert again.config == lm.config
    assert torch.equal(again.logits(tokens(9)), lm.logits(tokens(9)))
    assert again.generate("the cat", **SAMPLED) == lm.generate("the cat", **SAMPLED)
    packed = mixtral.load(tmp_path / "new", dtype="fp32", device="cpu")
    assert distance(packed.logits(tokens(9)), lm.logits(tokens(9))) < 1e-5
    assert packed.generate("the cat", **SAMPLED) == lm.generate("the cat", **SAMPLED)
    assert lm.tokenizer is not None
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "new").encode("the cat sat")
    assert ids == lm.tokenizer.encode("the cat sat")
    with pytest.raises(UsageError, match="exists already"):
        lm.save(tmp_path / "new")


@pytest.mark.parametrize("runner", ["auto", "torch"])
@pytest.mark.parametrize(
    ("stored", "fast_bf16", "asked", "wanted"),
    [
        (torch.bfloat16, True, None, torch.bfloat16),
        (torch.bfloat16, False, None, torch.float32),
        (torch.bfloat16, False, "auto", torch.float32),
        (torch.float32, True, "auto", torch.float32),  # the file's: nothing is rounded unasked
        (torch.float32, True, "bf16", torch.bfloat16),
        (torch.float16, True, None, torch.float16),
        (torch.bfloat16, False, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_dtype_of_a_loaded_model(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, fast_bf16: bool,
    asked: str | torch.dtype | None, wanted: torch.dtype, runner: str,
) -> None:  # fmt: skip
    """Packed weights have the file's dtype on any processor; torch's fp32 where bf16 is slow."""
    monkeypatch.setattr("mixtral.lm.has_fast_bf16", lambda _device: fast_bf16)
    lm.model.to(stored)
    lm.save(tmp_path / "m")
    again = load(tmp_path / "m", dtype=asked, device="cpu", runner=runner)
    if runner == "auto" and asked in (None, "auto"):
        wanted = stored
    assert again.dtype == wanted and again.runner.name == ("native" if runner == "auto" else "torch")
    if runner == "torch":
        assert {p.dtype for p in again.model.parameters()} == {wanted}
    assert not any(p.requires_grad for p in again.model.parameters()) and not again.model.training
    assert len(again.generate([5, 6], max_tokens=3, ignore_eos=True)) == 3


def test_a_file_of_mixed_dtypes_is_loaded_in_the_one_most_weights_have(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixtral.lm.has_fast_bf16", lambda _device: True)
    lm.model.to(torch.bfloat16)
    lm.model.norm.float()
    lm.save(tmp_path / "m")
    assert load(tmp_path / "m", device="cpu").dtype == torch.bfloat16
    again = load(tmp_path / "m", device="cpu", runner="torch")
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}


def test_a_gguf_file(lm: LM, tmp_path: Path) -> None:
    """The same logits as from the folder, in the dtype asked for, and the tokenizer with it."""
    lm.model.to(torch.bfloat16)
    lm.save(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "model.gguf", "gguf")
    for dtype in (torch.float32, torch.bfloat16):
        there, back = (load(path, dtype) for path in (tmp_path / "hf", tmp_path / "model.gguf"))
        assert back.dtype == dtype and back.tokenizer is not None and lm.tokenizer is not None
        assert back.tokenizer.fingerprint == lm.tokenizer.fingerprint
        assert torch.equal(back.logits(tokens()), there.logits(tokens()))


def test_without_a_tokenizer_token_ids_still_work(tmp_path: Path) -> None:
    make_lm(None).save(tmp_path / "m")
    bare = load(tmp_path / "m", device="cpu")
    assert bare.tokenizer is None
    assert len(bare.generate([5, 6], max_tokens=3, ignore_eos=True)) == 3
    for call in (bare.generate, bare.stream):
        with pytest.raises(UsageError, match="came without a tokenizer; give token ids instead of text"):
            call("the cat")


def test_bad_requests(lm: LM) -> None:
    for call, argument, message in [
        (lm.generate, "the cat " * 100, "do not fit the model's context of 64"),
        (lm.generate, [[]], "prompt 0: empty"),
        (lm.generate, 7, "prompt: a text, token ids, or a list of those is wanted, not int"),
        (lm.generate, ["the", 5], "token ids: a list of integers is wanted, not int"),
        (lm.stream, ["the cat"], "stream takes one prompt"),
        (lm.logits, "the cat", "token ids: a list of integers is wanted, not str; lm.tokenizer.encode"),
        (lm.logits, [], "token_ids: empty"),
        (lm.logits, [3] * 65, "token_ids: 65 tokens do not fit the model's context of 64"),
        (lm.routing, [300], "token_ids: token id 300 is out of range"),
    ]:  # fmt: skip
        with pytest.raises(UsageError) as error:
            call(argument)
        assert message in str(error.value)
    with pytest.raises(UsageError, match="unknown option 'temprature'; did you mean 'temperature'"):
        lm.generate("the cat", temprature=1.0)


def test_a_dense_model_routes_nothing() -> None:
    dense = make_lm(None, n_experts=1, experts_per_token=1)
    with pytest.raises(UsageError, match="this model is dense"):
        dense.routing([3, 4])


def test_loading_what_is_not_there(tmp_path: Path, lm: LM) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        load(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"train": {}, "environment": {}}')
    with pytest.raises(ConfigError, match="run is a training run; it has no finished model yet"):
        load(tmp_path / "run")
    lm.save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no weights that can be read"):
        load(tmp_path / "m")
    with pytest.raises(UsageError, match="dtype: unknown name 'fp7'"):
        load(tmp_path / "m", dtype="fp7")


def test_the_package_itself_offers_load_and_lm() -> None:
    assert mixtral.load is load and mixtral.LM is LM
    with pytest.raises(AttributeError, match="module 'mixtral' has no attribute 'lode'"):
        _ = mixtral.lode


# -- runners -----------------------------------------------------------------------------------------------------------

needs_native = pytest.mark.skipif(bool(native.available()), reason=f"no native step: {native.available()}")


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder with a bf16 model."""
    lm = make_lm(None)
    lm.model.to(torch.bfloat16)
    lm.save(tmp_path / "bf16")
    return tmp_path / "bf16"


@needs_native
def test_the_runner_follows_the_model(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native step for packed weights; the model itself once a part of it was replaced or hooked."""
    assert make_lm(None).runner.name == "torch" and "does not know" in make_lm(None).why_runner()
    lm = load(stored, device="cpu")
    runner = lm.runner
    assert runner.name == "native" and lm.runner is runner
    assert lm.generate(tokens(5), max_tokens=4, ignore_eos=True) == list(
        lm.stream(tokens(5), max_tokens=4, ignore_eos=True)
    )
    handle = lm.model.layers[0].register_forward_hook(lambda *_: None)
    assert lm.runner.name == "torch" and "hooks" in lm.why_runner()
    handle.remove()
    assert lm.runner.name == "native"
    lm.model.output = LM(make_lm(None).model).model.output
    assert lm.runner.name == "torch"
    assert load(stored, device="cpu", runner="torch").runner.name == "torch"
    with pytest.raises(UsageError, match="native step: it does not know Linear"):
        _ = LM(make_lm(None).model, runner="native").runner
    with pytest.raises(UsageError, match="runner: unknown choice 'natve'; did you mean 'native'"):
        load(stored, runner="natve")
    monkeypatch.setattr(native, "available", lambda: "not built")
    assert load(stored, device="cpu").runner.name == "torch"
    with pytest.raises(UsageError, match="native step: not built"):
        load(stored, device="cpu", runner="native")


@needs_native
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_is_saved_bit_for_bit(tmp_path: Path, dtype: str, tied: bool) -> None:
    lm = make_lm(None, tie_embeddings=tied)
    lm.model.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype])
    lm.save(tmp_path / "plain")
    packed = load(tmp_path / "plain", device="cpu")
    packed.generate(tokens(5), max_tokens=1)
    packed.save(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()


@needs_native
def test_complete_gives_log_probabilities_reasons_and_routing(stored: Path) -> None:
    lm = load(stored, device="cpu")
    ask: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    done = lm.complete([tokens(5), tokens(3)], n=2, k=1, keep_routing=True, **ask)
    assert [len(of_prompt) for of_prompt in done] == [2, 2]
    assert lm.generate([tokens(5), tokens(3)], n=2, k=1, **ask) == [[g.tokens for g in p] for p in done]
    one = done[0][0]
    assert one.finish_reason == "length" and len(one.logprobs) == 6 and max(one.logprobs) < 0
    assert one.routing[0].experts_TK.shape == (10, 1)
    routing = lm.routing([*tokens(5), *one.tokens[:-1]], k=1)
    assert torch.equal(one.routing[1].experts_TK, routing[1].experts_TK)
    assert lm.generate(tokens(5), n=2, k=1, **ask) == [g.tokens for g in done[0]]


@needs_native
@pytest.mark.parametrize("n_threads", [2, 8])
def test_threads_on_one_lm_get_the_bits_they_get_alone(stored: Path, n_threads: int) -> None:
    """Freshly loaded; long and short prompts; all have their first token before one goes on to its second."""
    ask: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
    prompts = [tokens(n, seed=n) for n in (1, 43, 7, 30, 2, 19, 40, 11)][:n_threads]
    alone = [load(stored, device="cpu").complete([p], **ask)[0][0] for p in prompts]
    lm, found = load(stored, device="cpu"), {}
    start, first_token = threading.Barrier(n_threads), threading.Barrier(n_threads)

    def work(i: int) -> None:
        start.wait()
        pieces = engine.stream(lm.runner, [prompts[i]], engine.SamplingParams(**ask))
        next(pieces)
        first_token.wait(timeout=60)  # a lock held for the whole answer would break it
        for _ in pieces:
            pass
        found[i] = pieces.results()[0]

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(work, range(n_threads)))
    assert [found[i] for i in range(n_threads)] == alone
    assert torch.get_num_threads() == THREADS


THREADS = torch.get_num_threads()


PEAK = """
import re, sys, torch
from mixtral.kernels.native import library as native
from mixtral.lm import load

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

torch.ones(256, 256) @ torch.ones(256, 256)  # what torch sets up once
native.available()
before = peak()
lm = load(sys.argv[1], sys.argv[2], "cpu")
lm.generate([3, 4, 5], max_tokens=2, ignore_eos=True)
lm.logits([3, 4, 5])
lm.routing([3, 4, 5])
lm.save(sys.argv[1] + "-again")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@needs_native
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_peak_memory_of_all_that_a_model_does(tmp_path: Path, dtype: str) -> None:
    """One copy of the weights, one tensor and what it becomes: for generating, looking inside and saving."""
    config = ModelConfig(
        vocab_size=1024, dim=256, n_layers=5, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=1536, n_experts=8,
        experts_per_token=2,
    )  # fmt: skip
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    save_hf({n: torch.full(s, 0.01).to(kind) for n, s in parameter_shapes(config).items()}, config, tmp_path / "m")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, str(tmp_path / "m"), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    weights = config.weight_bytes(8 * kind.itemsize) / 2**20
    assert weights > 90
    assert float(done.stdout) < weights + 60, "the weights, a tensor of 12 or 24 MiB and what it becomes"
