"""What is left behind by a step that was not finite: the layer by name, and the whole batch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixtral.data.loader import Loader
from mixtral.train.diagnose import first_bad_layer
from mixtral.train.step import NonFiniteLoss
from tests.train.tiny_run import MakeRun, Watching, fresh_model, train_config


def test_the_first_bad_layer_is_named(loader: Loader) -> None:
    config = train_config()
    parts = [loader.batch(0)]
    model = fresh_model(config.model)
    assert first_bad_layer(model, parts).startswith("the loss or the backward pass")
    with torch.no_grad():
        model.layers[1].attention.wo.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]
    assert first_bad_layer(model, parts) == "layer 1's attention"
    with torch.no_grad():
        model.layers[0].ffn.experts.w2.fill_(float("inf"))  # type: ignore[union-attr, operator]
    assert first_bad_layer(model, parts) == "layer 0's feed-forward"
    assert not any(module._forward_hooks for module in model.modules())


def test_a_run_stops_with_the_layer_and_keeps_the_batch(run_in: MakeRun, tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", train_config())
    run.display = Watching(lambda _: run.model.embedding.weight.data.fill_(float("nan")))
    with pytest.raises(NonFiniteLoss, match="first seen in the embedding; batch: ") as caught:
        run.train()
    kept = load_file(re.findall(r"batch: (\S+)", str(caught.value))[0])
    wanted = run.loader.batch(1, 0, run.config.accumulation)
    assert torch.equal(kept["0.tokens"], wanted.batch.tokens_T)
    assert torch.equal(kept["0.targets"], wanted.targets_T)
