from __future__ import annotations

import pytest
import torch

from mixtral import kernels
from mixtral.errors import UsageError
from mixtral.kernels import Call, reference, table
from mixtral.kernels.native import library as native
from mixtral.kernels.torch import experts as stacked

CPU = torch.device("cpu")
FP32 = Call(CPU, torch.float32)


def test_every_op_has_a_reference_and_prefers_another() -> None:
    for op in kernels.ops():
        assert kernels.backends(op)[-1] == "reference", op
        choice = kernels.choose(op, FP32)
        wanted = "native" if op in ("packed_linear", "log_sum_exp") and not native.available() else "torch"
        assert choice.implementation.backend == wanted, op
        assert choice.reason.startswith(choice.implementation.why)


def test_every_op_is_called_through_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each public wrapper hands its own name to the table, so that forcing a backend reaches every op."""
    called = []
    monkeypatch.setattr(table, "call", lambda op, *_: called.append(op))
    for op in kernels.ops():
        wrapper = getattr(kernels, op)
        wrapper(*[torch.zeros(1)] * wrapper.__code__.co_argcount)
    assert called == kernels.ops()


def test_forced_reference_is_used_by_every_op_and_only_inside_the_block() -> None:
    with kernels.use_backend("reference"):
        for op in kernels.ops():
            assert kernels.choose(op, FP32).implementation.function is getattr(reference, op)
    assert kernels.choose("experts", FP32).implementation.function is stacked.experts_loop


def test_a_forced_backend_is_dropped_when_the_block_fails() -> None:
    with pytest.raises(ZeroDivisionError), kernels.use_backend("reference"):
        _ = 1 / 0
    assert kernels.choose("linear", FP32).implementation.backend == "torch"


def test_a_forced_backend_leaves_ops_alone_that_do_not_have_it() -> None:
    with kernels.use_backend("grouped"):
        assert kernels.choose("linear", FP32).implementation.backend == "torch"


def test_a_forced_backend_that_cannot_serve_says_why() -> None:
    with kernels.use_backend("grouped"), pytest.raises(UsageError, match=r"'experts' on cpu.*not grouped: measured"):
        kernels.choose("experts", FP32)


def test_the_reason_tells_what_was_passed_over() -> None:
    assert "not grouped: measured no faster" in kernels.choose("experts", FP32).reason


@pytest.mark.parametrize(
    "dtype, backend", [(torch.bfloat16, "grouped"), (torch.float32, "torch")], ids=["bf16", "fp32"]
)
def test_grouped_is_chosen_for_bf16_on_cuda(dtype: torch.dtype, backend: str) -> None:
    choice = kernels.choose("experts", Call(torch.device("cuda"), dtype))  # a device type; none need be there
    assert choice.implementation.backend == backend


def test_an_unknown_backend_is_refused_with_the_nearest_known() -> None:
    with pytest.raises(UsageError, match="unknown kernel backend 'refrence'; did you mean 'reference'"), \
            kernels.use_backend("refrence"):  # fmt: skip
        pass


def test_a_new_backend_serves_where_it_says_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_OPS", {})
    seen: list[Call] = []

    def supports(call: Call) -> str:
        seen.append(call)
        return "" if call.dtype == torch.float32 and call.shapes[:1] != ((7,),) else "fp32 alone, and not seven"

    table.register("half", "fast", lambda x: x * 0.5, "fast", supports)
    table.register("half", "reference", lambda x: x / 2, "plain")
    assert table.choose("half", FP32).implementation.backend == "fast"
    assert table.choose("half", Call(CPU, torch.float64)).reason == "plain; not fast: fp32 alone, and not seven"
    assert table.call("half", torch.ones(1), torch.tensor(3.0)) == 1.5
    assert table.call("half", torch.ones(7), torch.ones(7)).sum() == 3.5
    table.call("half", torch.ones(3), torch.ones(3, requires_grad=True))
    assert seen[-2:] == [Call(CPU, torch.float32, ((7,),), False), Call(CPU, torch.float32, ((3,),), True)]
    with torch.no_grad():
        table.call("half", torch.ones(3), torch.ones(3, requires_grad=True))
    assert not seen[-1].needs_grad


def test_the_public_names_are_the_ops_and_the_table() -> None:
    assert set(kernels.__all__) == {*kernels.ops(), "Call", "backends", "choose", "ops", "use_backend"}
