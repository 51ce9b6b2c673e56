"""Every op as torch.library has it: checked by opcheck, traced whole through a block, run on tensors without data."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mixtral import kernels
from mixtral.kernels import packing
from mixtral.kernels.ops import OPS
from mixtral.model import Mixtral, Ragged
from mixtral.model.rope import rotary_angles
from mixtral.presets import PRESETS, preset
from tests.engine.models import make_model, random_tokens
from tests.kernels.step_models import pack_parts


def _stack(n: int) -> tuple[Tensor, Tensor]:
    """The packed weights of one SwiGLU network [2, 20, 40], [40, 20]."""
    w13, w2 = torch.randn(n, 20, 40), torch.randn(40, 20)
    return packing.pack(w13, "fp32"), packing.pack(w2, "fp32")


def _inputs() -> dict[str, tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    order, row = torch.tensor([1, 2, 5, 0, 3, 4]), torch.tensor([[3, 0], [1, 4], [5, 2]])
    return {
        "linear": (r(5, 8), r(6, 8)),
        "packed_linear": (r(3, 40), packing.pack(r(20, 40), "fp32"), "fp32", 20),
        "packed_swiglu": (r(3, 40), *_stack(2), "fp32", 20),
        "packed_experts": (r(6, 40), torch.tensor([2, 0, 3]), *(torch.stack([w] * 3) for w in _stack(2)), "fp32", 20),
        "swiglu": (r(5, 8), r(2, 6, 8), r(8, 6)),
        "rms_norm": (r(5, 8), r(8), 1e-5),
        "rotary": (r(5, 2, 8), r(5, 4), r(5, 4)),
        "attention": (r(5, 4, 8), r(5, 2, 8), r(5, 2, 8), ends, 2),
        "write_kv": (r(2, 2, 8, 8), r(3, 2, 8), r(3, 2, 8), torch.tensor([1, 5, 6])),
        "paged_attention": (r(5, 4, 8), r(2, 2, 8, 8), torch.tensor([0, 1, 1, 2, 3]), ends,
                            torch.tensor([[1, -1], [0, 3]]), torch.tensor([2, 4]), 2, None),
        "experts": (r(9, 8), torch.tensor([5, 0, 3]), r(3, 2, 6, 8), r(3, 8, 6)),
        "experts_decode": (r(1, 8), torch.rand(1, 2), torch.tensor([[2, 0]]), r(3, 2, 6, 8), r(3, 8, 6)),
        "gather_rows": (r(3, 8), order, row),
        "combine": (r(6, 8), torch.rand(3, 2), order, row),
        "cross_entropy": (r(4, 8), r(11, 8), torch.tensor([3, -100, 10, 0]), torch.rand(4)),
        "token_nll": (r(4, 8), r(11, 8), torch.tensor([3, -100, 10, 0])),
        "log_sum_exp": (r(4, 8),),
    }  # fmt: skip


INPUTS = _inputs()


def test_every_op_of_the_table_is_registered() -> None:
    assert sorted(OPS) == kernels.ops() == sorted(INPUTS)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", ["torch", "reference", "native"])
def test_opcheck(name: str, backend: str) -> None:
    """Schema, fake kernel and registered gradient, of each backend the op has."""
    if backend not in kernels.backends(name):
        return
    differentiable = OPS[name].differentiable
    if backend == "reference" and name.startswith("packed"):
        differentiable = ()  # it rounds with whole numbers, through which no gradient passes
    args = tuple(a.clone().requires_grad_(i in differentiable) if isinstance(a, Tensor) else a
                 for i, a in enumerate(INPUTS[name]))  # fmt: skip
    with kernels.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.mixtral, name).default, args)


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.differentiable])
def test_the_registered_gradient_is_the_ops(name: str) -> None:
    args = INPUTS[name]
    found = []
    for op in (getattr(kernels, name), getattr(torch.ops.mixtral, name)):
        leaves = [a.clone().requires_grad_(i in OPS[name].differentiable) if isinstance(a, Tensor) else a
                  for i, a in enumerate(args)]  # fmt: skip
        out = op(*leaves)
        cotangent = torch.linspace(-1, 1, out.numel()).view(out.shape)
        found.append([out, *torch.autograd.grad(out, [leaves[i] for i in OPS[name].differentiable], cotangent)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_importing_the_package_does_not_import_the_compiler() -> None:
    code = "import sys, mixtral.lm; print('torch._inductor' in sys.modules, 'torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# -- the compiler ------------------------------------------------------------------------------------------------------


def block_loss(block: Any, model: Mixtral, x_TD: Tensor, batch: Ragged) -> Tensor:
    angles = rotary_angles(batch.positions_T, model.config.head_dim, model.config.rope_theta)
    out, routing = block(x_TD, angles, batch, 0, None, None)
    return (out * torch.linspace(-1, 1, out.shape[-1])).sum() + (0 if routing is None else routing.scores_TE.sum())


@pytest.mark.parametrize(
    "changes", [{}, {"n_experts": 1, "experts_per_token": 1}, {"sliding_window": 8}, {"shared_experts": 1}], ids=str
)
@pytest.mark.parametrize("training", [False, True])
def test_a_block_compiles_whole_and_equals_eager(changes: dict[str, Any], training: bool) -> None:
    """Outputs and all gradients; several lengths, so that nothing is baked in."""
    torch._dynamo.reset()
    model = make_model(**changes).train(training).requires_grad_()
    compiled = torch.compile(model.layers[0], fullgraph=True, backend="eager")
    for lengths in ([12], [5, 9], [3, 3, 3]):
        batch = Ragged.of([random_tokens(n, seed=n) for n in lengths])
        x_TD = torch.randn(sum(lengths), model.config.dim, generator=torch.Generator().manual_seed(0))
        found = []
        for block in (model.layers[0], compiled):
            x = x_TD.clone().requires_grad_()
            loss = block_loss(block, model, x, batch)
            found.append([loss.detach(), *torch.autograd.grad(loss, [x, *model.layers[0].parameters()],
                                                              allow_unused=True)])  # fmt: skip
        for got, want in zip(found[1], found[0], strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


# -- tensors without data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_on_fake_tensors(name: str) -> None:
    config = preset(name)
    with FakeTensorMode():
        model = Mixtral(config)
        tokens = torch.zeros(6, dtype=torch.int64)
        batch = Ragged(tokens, torch.arange(6), torch.tensor([0, 6], dtype=torch.int32))
        out = model(batch)
        assert out.logits is not None and out.logits.shape == (6, config.vocab_size)
        assert len(out.routing) == (config.n_layers if config.is_sparse else 0)
        loss = model(batch, targets=tokens, loss_weights="mean").loss
        loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
        assert model(batch, targets=tokens).nll_T.shape == (6,)


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_on_the_meta_device(packed: bool) -> None:
    model = make_model().to("meta") if not packed else pack_parts(make_model(), "int8").to("meta")
    batch = Ragged.of([[1, 2, 3]], device="meta")
    with torch.no_grad():
        out = model(batch)
    assert out.logits is not None and out.logits.is_meta and out.logits.shape == (3, 97)


# -- gradients through packed weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", packing.GROUP_BYTES)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_gradient_through_a_packed_model(name: str, backend: str) -> None:
    """As of the same model with expanded weights, up to what rounding of inputs does to its activations."""
    model = pack_parts(make_model(n_experts=1, experts_per_token=1), name)
    plain = copy.deepcopy(make_model(n_experts=1, experts_per_token=1))
    batch, found = Ragged.of([random_tokens(9)]), []
    for each in (model, plain):
        x_TD = each.embedding(batch.tokens_T).detach().requires_grad_()
        angles = rotary_angles(batch.positions_T, 8, 1e4)
        with kernels.use_backend(backend):
            out, _ = each.layers[0](x_TD, angles, batch, 0, None, None)
            found.append(torch.autograd.grad(out.square().sum(), x_TD)[0])
    largest = found[1].abs().max()
    bound = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 0.02, "int8": 0.05, "int4": 0.4}[name]
    assert (found[0] - found[1]).abs().max() <= bound * largest
