"""Layers that are dense, or have their own number of experts: through all that a model goes through."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mixtral.analysis import routing_table
from mixtral.config import ModelConfig
from mixtral.data.loader import TrainBatch
from mixtral.engine import SamplingParams, TorchRunner, generate
from mixtral.engine.native_runner import NativeRunner
from mixtral.errors import ConfigError, UsageError
from mixtral.kernels.native import library as native
from mixtral.lm import LM, load
from mixtral.model import Mixtral, Ragged, named_state
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from mixtral.train.objective import next_token
from mixtral.train.state import TrainState
from mixtral.train.step import train_step
from mixtral.weights import convert, parameter_shapes
from tests.engine.models import CONFIG, make_model, random_tokens
from tests.kernels.step_models import pack_parts
from tests.moe import naive
from tests.train.tiny_run import train_config

SHAPES: dict[str, dict[str, Any]] = {
    "every other layer (GLaM)": {"n_layers": 4, "experts_by_layer": (1, 4, 1, 4)},
    "a dense first layer, wider (DeepSeek)": {"n_layers": 3, "experts_by_layer": (1, 4, 4), "dense_ffn_dim": 80},
    "pruned layer by layer": {"n_layers": 4, "n_experts": 8, "experts_by_layer": (3, 8, 2, 5)},
    "all at once": {"n_layers": 4, "n_experts": 6, "experts_by_layer": (1, 6, 2, 1), "dense_ffn_dim": 21},
}
BATCH = Ragged.of([random_tokens(n, seed=n) for n in (9, 1, 17)])
TARGETS = torch.tensor(random_tokens(27, seed=3))
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPTS = [random_tokens(n, seed=n) for n in (5, 12)]


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_model_without_dispatch(shape: str) -> None:
    """Logits, loss and all gradients; the routing has one entry a sparse layer, and can be replayed."""
    model = make_model(**SHAPES[shape]).requires_grad_()
    sparse = model.config.sparse_layers
    found = []
    for made in (model, naive.without_dispatch(copy.deepcopy(model))):
        loss = made(BATCH, targets=TARGETS, loss_weights="mean").loss
        grads = torch.autograd.grad(loss, list(made.parameters()), materialize_grads=True)
        found.append([loss.detach(), *grads, made(BATCH).logits.detach()])
    for got, want in zip(*found, strict=True):
        assert_close(got, want)
    out = model(BATCH)
    assert [r.logits_TE.shape[1] for r in out.routing] == [model.config.layer(i).n_experts for i in sparse]
    again = model(BATCH, replay=[r.experts_TK for r in out.routing])
    assert torch.equal(again.logits, out.logits)
    with pytest.raises(UsageError, match=f"replay: 1 given for {len(sparse)} sparse layers"):
        model(BATCH, replay=[out.routing[0].experts_TK])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["torch", "native"])
def test_generates_as_the_model_says(shape: str, kind: str) -> None:
    if kind == "native" and native.available():
        pytest.skip(native.available())
    model = make_model(**SHAPES[shape])
    packed = pack_parts(copy.deepcopy(model), "fp32")
    runner = TorchRunner(model) if kind == "torch" else NativeRunner(packed)
    for made, prompt in zip(generate(runner, PROMPTS, GREEDY, keep_routing=True), PROMPTS, strict=True):
        whole = model(Ragged.of([[*prompt, *made.tokens[:-1]]]))
        assert whole.logits[len(prompt) - 1 :].argmax(-1).tolist() == made.tokens
        for ours, theirs in zip(made.routing, whole.routing, strict=True):
            assert torch.equal(ours.experts_TK, theirs.experts_TK)
            assert_close(ours.logits_TE, theirs.logits_TE)


@pytest.mark.parametrize("shape", SHAPES)
def test_is_saved_loaded_quantised_and_counted(shape: str, tmp_path: Path) -> None:
    model = make_model(**SHAPES[shape])
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == config.n_params()
    assert {n: tuple(p.shape) for n, p in named_state(model).items()} == parameter_shapes(config)
    idle = sum(p[0].numel() * (len(p) - 2) for n, p in model.named_parameters() if ".experts." in n)
    assert config.n_active_params() == config.n_params() - idle
    LM(model).save(tmp_path / "model")
    again = load(tmp_path / "model", device="cpu", runner="torch")
    assert again.config == config
    assert all(torch.equal(a, b) for a, b in zip(named_state(model).values(), named_state(again.model).values(),
                                                 strict=True))  # fmt: skip
    quantise_folder(tmp_path / "model", tmp_path / "q", QuantScheme.of("8"))
    quantised = load(tmp_path / "q", device="cpu")
    want, got = (lm.logits(PROMPTS[1]) for lm in (again, quantised))
    assert quantised.config == config and (got - want).norm() < 0.2 * want.norm()


@pytest.mark.parametrize("balance", ["micro_batch?weight=0.01", "loss_free?rate=0.01&layers=1", "z_loss?weight=0.1"])
def test_trains_with_balancing_and_statistics(balance: str) -> None:
    changes = {"n_layers": 3, "n_experts": 6, "experts_by_layer": (1, 6, 3), "dense_ffn_dim": 64}
    router = "topk?bias=true" if balance.startswith("loss_free") else "topk"
    config = train_config({**changes, "router": router}, balance=(balance,))
    model = Mixtral(config.model)
    for p in model.parameters():
        p.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(p.numel()))
    ids = torch.randint(config.model.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    batch = TrainBatch(Ragged.of(ids.tolist()), ids.roll(-1, 1).flatten(), None)
    train_state = TrainState.of(model, config, torch.float32)
    results = [train_step(train_state, [batch, batch], next_token, config, step, stats=True) for step in range(4)]
    assert results[-1].cross_entropy < results[0].cross_entropy
    assert results[-1].layers and [len(layer.load) for layer in results[-1].layers] == [6, 3]


def test_balancing_a_dense_layer_is_refused() -> None:
    config = train_config({"n_layers": 2, "experts_by_layer": (1, 4)}, balance=("z_loss?layers=0",))
    with pytest.raises(ConfigError, match=r"balance z_loss: layers=0 are dense"):
        TrainState.of(Mixtral(config.model), config, torch.float32)


def test_tables_of_layers_that_differ() -> None:
    """Each ratio is of its own layer's fair share, each row has its layer's number."""
    out = Console(width=100, record=True, file=io.StringIO())
    out.print(routing_table([[0.5, 0.25, 0.25], [0.75, 0.25]], "loads", ascii_only=True, numbers=[1, 3]))
    rows = [line.split() for line in out.export_text().splitlines() if line.strip()[:1] in ("1", "3")]
    assert [(row[0], row[-2:]) for row in rows] == [("1", ["1.50", "0.75"]), ("3", ["1.50", "0.50"])]


@pytest.mark.parametrize("to", ["mistral", "gguf"])
def test_what_other_formats_cannot_hold_is_refused_by_name(to: str, tmp_path: Path) -> None:
    LM(make_model(**SHAPES["pruned layer by layer"])).save(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"layers of different numbers of experts \(experts_by_layer\)"):
        convert(tmp_path / "model", tmp_path / "out.gguf", to)  # type: ignore[arg-type]
    assert not (tmp_path / "out.gguf").exists()


def test_transformers_refuses_it_instead_of_computing_something_else(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    LM(make_model(**SHAPES["every other layer (GLaM)"])).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"mixtral_research|does not recognize"):
        transformers.AutoConfig.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"experts_by_layer": (4,)}, "experts_by_layer must have n_layers 2 numbers"),
        ({"experts_by_layer": (2, 3)}, r"the largest of them n_experts 4; not \[2, 3\]"),
        ({"experts_by_layer": (4, 0)}, "must be a list of positive integers"),
        ({"experts_by_layer": "4,4"}, "must be a list of positive integers"),
        ({"experts_by_layer": (4, 2), "experts_per_token": 3}, "more than the smallest sparse layer's experts, 2"),
        ({"dense_ffn_dim": 9}, "experts_by_layer says which"),
        ({"experts_by_layer": (4, 2), "dense_ffn_dim": 9}, r"experts_by_layer has none \(1\)"),
        ({"experts_by_layer": (4, 1), "dense_ffn_dim": 0}, "dense_ffn_dim must be a positive integer or null"),
        ({"experts_by_layer": (4, 3), "router": "grouped?groups=2&taken=1"}, "3 experts do not divide into 2 groups"),
    ],
)
def test_what_contradicts_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CONFIG.replace(**changes)


def test_a_uniform_model_is_as_before() -> None:
    assert ModelConfig.from_dict({k: v for k, v in CONFIG.to_dict().items() if "by_layer" not in k}) == CONFIG
    assert CONFIG.is_uniform and CONFIG.is_plain and CONFIG.sparse_layers == (0, 1)
    assert CONFIG.layer(1) == (4, 48) and CONFIG.fewest_experts == 4
