"""TrainState: another loss by another function alone, and a sharded model (FSDP2, one rank) that trains, saves and
loads as an unsharded one does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mixtral.data.loader import TrainBatch
from mixtral.model import Mixtral, Ragged
from mixtral.moe import MoE
from mixtral.train.checkpoint import CheckpointWriter, load_checkpoint
from mixtral.train.config import PretrainConfig
from mixtral.train.objective import Replay, Terms, next_token
from mixtral.train.state import TrainState
from mixtral.train.step import train_step
from tests.train.tiny_run import fresh_model, fresh_state, train_config


def batch_of(seed: int, config: PretrainConfig) -> TrainBatch:
    ids = torch.randint(config.model.vocab_size, (2, 24), generator=torch.Generator().manual_seed(seed))
    return TrainBatch(Ragged.of(ids.tolist()), ids.roll(-1, 1).flatten(), None)


# -- loss functions ----------------------------------------------------------------------------------------------------


def weighted(model: Mixtral, batch: TrainBatch, replay: Replay = None) -> Terms:
    """As tuning on answers weighs tokens: only the second half of each sequence counts."""
    counts_T = torch.tensor(([0.0] * 12 + [1.0] * 12) * 2)
    output = model(batch.batch, targets=batch.targets_T, replay=replay)
    return Terms((output.nll_T * counts_T).sum() / counts_T.sum(), output.routing)


def preference(model: Mixtral, batch: TrainBatch, replay: Replay = None) -> Terms:
    """The first sequence is to be more probable than the second."""
    output = model(batch.batch, targets=batch.targets_T, replay=replay)
    chosen, rejected = output.nll_T.view(2, -1).sum(1)
    return Terms(-torch.nn.functional.logsigmoid((rejected - chosen) / 10), output.routing)


@pytest.mark.parametrize("loss_fn", [weighted, preference])
def test_another_loss_is_another_function(loss_fn: object) -> None:
    """Its value and its gradients are what is minimised; balancing and statistics go on as ever."""
    config = train_config(balance=("micro_batch?weight=0.01",), clip=0.0)
    batch = batch_of(0, config)
    model, state = fresh_state(config)
    want = loss_fn(model, batch).loss  # type: ignore[operator]
    results = [train_step(state, [batch], loss_fn, config, step, stats=step == 0) for step in range(6)]  # type: ignore[arg-type]
    assert results[0].cross_entropy == pytest.approx(float(want.detach()), rel=1e-6)
    assert results[-1].cross_entropy < results[0].cross_entropy
    assert results[0].aux["micro_batch"] > 0 and results[0].layers and len(results[0].layers) == 2


# -- FSDP2 on one rank -------------------------------------------------------------------------------------------------


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Mixtral, dtype: torch.dtype) -> Mixtral:
    """fp32 weights, products in `dtype`, gradients reduced in fp32; routers in groups of their own, all in fp32."""
    mesh = dist.init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in list(model.modules()):
        if isinstance(module, MoE):
            fully_shard(module.router, mesh=mesh, mp_policy=exact)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sharded_model_trains_saves_and_loads_as_a_whole_one(dtype: str, tmp_path: Path) -> None:
    config = train_config(dtype=dtype, balance=("micro_batch?weight=0.01", "z_loss?weight=0.1"))
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def states() -> tuple[TrainState, TrainState]:
        shards = TrainState.of(sharded(fresh_model(config.model), kind), config, torch.float32)
        return TrainState.of(fresh_model(config.model), config, kind), shards

    plain, shards = states()
    assert all(isinstance(p, DTensor) for p in shards.optimizer.params.values())
    micro_batches = [batch_of(1, config), batch_of(2, config)]

    def steps(first: int, last: int, *which: TrainState) -> None:
        for step in range(first, last):
            found = [train_step(state, micro_batches, next_token, config, step, stats=True) for state in which]
            rel = 1e-6 if dtype == "fp32" else 1e-2
            for result in found[1:]:
                assert result.cross_entropy == pytest.approx(found[0].cross_entropy, rel=rel)
                assert result.layers and len(result.layers) == 2

    steps(0, 3, plain, shards)
    bound = 1e-6 if dtype == "fp32" else 2e-2
    for name, ours in whole(shards.weights).items():
        want = plain.weights[name].detach()
        assert (ours - want).abs().max() <= bound * want.abs().max(), name
    writer = CheckpointWriter(tmp_path / "run", keep=2)
    writer.save(shards, {"step": 3, "best_step": None})
    writer.wait()
    assert writer.failure() is None
    _, again = states()
    path = tmp_path / "run/checkpoints/step_000003"
    assert load_checkpoint(path, again)["step"] == 3
    unsharded = TrainState.of(fresh_model(config.model), config, torch.float32)
    load_checkpoint(path, unsharded)  # a checkpoint is the same whoever wrote it
    for part, want in shards.state_dict().items():
        for other in (again, unsharded):
            found = whole(other.state_dict()[part])
            assert found.keys() == want.keys()
            assert all(torch.equal(found[n], t) for n, t in whole(want).items()), part
    steps(3, 5, shards, again)
    assert all(torch.equal(a, b) for a, b in zip(whole(shards.weights).values(), whole(again.weights).values(),
                                                 strict=True))  # fmt: skip
