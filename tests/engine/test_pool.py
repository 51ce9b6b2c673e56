"""Cached logits equal uncached ones at every position, however the text is cut and shared; blocks are what they say."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixtral.engine.native_runner import NativeRunner
from mixtral.engine.pool import KVPool
from mixtral.engine.runner import Runner, TorchRunner
from mixtral.errors import MixtralError, UsageError
from mixtral.kernels.native import library as native
from mixtral.model import Mixtral, Ragged
from tests.engine.models import CONFIG, WINDOW, make_model, random_tokens
from tests.kernels.step_models import pack_parts

WINDOWED = CONFIG.replace(sliding_window=WINDOW)
FULL_MODEL, WINDOWED_MODEL = make_model(), make_model(sliding_window=WINDOW)
MODELS = [FULL_MODEL, WINDOWED_MODEL]
NATIVE = [] if native.available() else [pack_parts(make_model(), "fp32"),
                                        pack_parts(make_model(sliding_window=WINDOW), "fp32")]  # fmt: skip


def runner_of(model: Mixtral, **options: int) -> Runner:
    pool = KVPool(model.config, torch.float32, **options)  # type: ignore[arg-type]
    return NativeRunner(model, pool) if model in NATIVE else TorchRunner(model, pool)


def cached_logits(runner: Runner, texts: list[list[int]], chunks: Iterator[list[int]]) -> list[Tensor]:
    """Logits of each text, processed in steps: a step takes so many tokens of each, none of those at their end."""
    done, logits = [0] * len(texts), [[] for _ in texts]  # type: ignore[var-annotated]
    ids = [runner.pool.add() for _ in texts]
    while done != [len(t) for t in texts]:
        parts = [t[r : r + n] for t, r, n in zip(texts, done, next(chunks), strict=True)]
        assert [runner.pool.length(id) for id in ids] == done
        out = runner.run(runner.pool.batch(list(zip(ids, parts, strict=True)))).logits
        assert out is not None
        for i, part in enumerate(out.split([len(p) for p in parts])):
            logits[i].append(part)
            done[i] += len(part)
    return [torch.cat(parts) for parts in logits]


def assert_equal(ours: Tensor, model: Mixtral, text: list[int]) -> None:
    wanted = model(Ragged.of([text])).logits
    assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


@settings(max_examples=30)
@given(st.data())
def test_any_chunks_of_a_ragged_batch_equal_uncached(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from([*MODELS, *NATIVE]))
    lengths = data.draw(st.lists(st.integers(1, 5 * WINDOW), min_size=1, max_size=3))
    texts = [random_tokens(n, seed=i) for i, n in enumerate(lengths)]
    block_size, n_blocks = data.draw(st.sampled_from([1, 3, 8, 32])), data.draw(st.integers(0, 9))
    runner = runner_of(model, block_size=block_size, n_blocks=n_blocks)
    sizes = st.lists(st.integers(0, 3 * WINDOW), min_size=len(texts), max_size=len(texts)).filter(any)
    if model in NATIVE:  # a span of the native step has a row at least
        sizes = st.lists(st.integers(1, 3 * WINDOW), min_size=len(texts), max_size=len(texts))

    def chunks() -> Iterator[list[int]]:
        while True:
            yield data.draw(sizes)

    if model in NATIVE:
        texts = [texts[0]] * len(texts)  # which end together
    for text, logits in zip(texts, cached_logits(runner, texts, _equal(chunks(), model in NATIVE)), strict=True):
        assert_equal(logits, model, text)


def _equal(chunks: Iterator[list[int]], equal: bool) -> Iterator[list[int]]:
    return ([sizes[0]] * len(sizes) if equal else sizes for sizes in chunks)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, WINDOW - 1, WINDOW, WINDOW + 1, 64])
def test_one_chunk_size_past_the_window(model: Mixtral, size: int) -> None:
    text = random_tokens(64)
    [logits] = cached_logits(runner_of(model, block_size=4), [text], iter([[size]] * 64))
    assert_equal(logits, model, text)


def test_the_window_matters_here() -> None:
    """Else the tests above would pass with any window."""
    text = random_tokens(64)
    full, windowed = (m(Ragged.of([text])).logits for m in (FULL_MODEL, WINDOWED_MODEL))
    assert (full - windowed)[WINDOW:].abs().max() > 0.1
    assert torch.equal(full[0], windowed[0])


# -- sharing and truncating --------------------------------------------------------------------------------------------


def extend(runner: Runner, id: int, text: list[int]) -> Tensor:
    out = runner.run(runner.pool.batch([(id, text)])).logits
    assert out is not None
    return out


@pytest.mark.parametrize("model", [*MODELS, *NATIVE])
@pytest.mark.parametrize("shared", [1, 4, 7, 8, 11])
def test_sequences_that_share_a_beginning(model: Mixtral, shared: int) -> None:
    """Each goes on as if it were alone, whichever goes on first, and when the other has gone."""
    texts = [random_tokens(30, seed=i) for i in range(3)]
    texts = [texts[0][:shared] + text[shared:] for text in texts]
    runner = runner_of(model, block_size=4)
    first = runner.pool.add()
    extend(runner, first, texts[0][:11])
    others = [runner.pool.share(first, shared) for _ in range(2)]
    used = runner.pool.n_blocks - runner.pool.n_free
    assert used <= 3  # all in the blocks of the first
    assert_equal(extend(runner, others[0], texts[1][shared:20]), model_after(model, shared, 20), texts[1])
    runner.pool.free(others[0])
    assert_equal(extend(runner, first, texts[0][11:]), model_after(model, 11, 30), texts[0])
    runner.pool.free(first)
    assert_equal(extend(runner, others[1], texts[2][shared:]), model_after(model, shared, 30), texts[2])
    runner.pool.free(others[1])
    assert runner.pool.n_free == runner.pool.n_blocks and runner.pool.ids == []


def model_after(model: Mixtral, begin: int, end: int) -> Mixtral:
    """The model, of whose logits the rows begin .. end - 1 are compared."""

    def rows(batch: Ragged) -> object:
        out = model(batch)
        return out._replace(logits=out.logits[begin:end])

    return rows  # type: ignore[return-value]


@pytest.mark.parametrize("model", [*MODELS, *NATIVE])
def test_truncating_and_going_on_otherwise(model: Mixtral) -> None:
    text, other = random_tokens(20), random_tokens(20, seed=1)
    runner = runner_of(model, block_size=4)
    id = runner.pool.add()
    extend(runner, id, text[:15])
    runner.pool.truncate(id, 13)
    assert runner.pool.length(id) == 13
    mixed = text[:13] + other[13:]
    assert_equal(extend(runner, id, mixed[13:]), model_after(model, 13, 20), mixed)
    runner.pool.truncate(id, 0)
    assert runner.pool.n_free == runner.pool.n_blocks
    assert_equal(extend(runner, id, other), model, other)


def test_what_is_out_of_the_window_is_freed_and_cannot_be_had_back() -> None:
    pool = KVPool(WINDOWED, torch.float32, block_size=2)
    id = pool.add()
    for _ in range(30):
        batch = pool.batch([(id, [1])])
    assert pool.n_blocks - pool.n_free <= WINDOW // 2 + 1
    assert batch.block_tables is not None and (batch.block_tables[0, :10] == -1).all()
    with pytest.raises(UsageError, match=f"positions before 20 of sequence {id} are out of its window, and freed"):
        pool.truncate(id, 20)
    with pytest.raises(UsageError, match="out of its window"):
        pool.share(id, 10)
    pool.truncate(id, 29)
    assert pool.length(pool.share(id)) == 29


# -- blocks ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_no_two_sequences_write_into_one_slot(data: st.DataObject) -> None:
    """Whatever is added, extended, shared, truncated and freed, against a list of positions a sequence."""
    config = data.draw(st.sampled_from([CONFIG, WINDOWED]))
    pool = KVPool(config, torch.float32, block_size=data.draw(st.sampled_from([1, 2, 5])))
    owner: dict[int, list[int]] = {}  # what each position of a sequence holds
    stamp = 0
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["add", "extend", "extend", "share", "truncate", "free"]))
        if action == "add" or not owner:
            owner[pool.add()] = []
            continue
        id = data.draw(st.sampled_from(sorted(owner)))
        if action == "extend":
            n = data.draw(st.integers(0, 7))
            batch = pool.batch([(id, [0] * n)])
            assert batch.slots_T is not None
            for slot in batch.slots_T.tolist():
                stamp += 1
                pool.pool_L2GSC[:, :, :, slot] = stamp
                owner[id].append(stamp)
        elif action == "free":
            pool.free(id)
            del owner[id]
        else:
            length = data.draw(st.integers(0, len(owner[id])))
            try:
                new = pool.share(id, length) if action == "share" else pool.truncate(id, length)
            except UsageError:
                assert config.sliding_window is not None
                continue
            owner[id if new is None else new] = owner[id][:length]
        for id, stamps in owner.items():
            seen = 999 if config.sliding_window is None else config.sliding_window - 1
            assert _held(pool, id, seen) == stamps[max(0, len(stamps) - seen) :]
    for id in owner:
        pool.free(id)
    assert pool.n_free == pool.n_blocks


def _held(pool: KVPool, id: int, n: int = 999) -> list[int]:
    """What the last `n` positions of a sequence hold."""
    sequence, size = pool._sequences[id], pool.block_size
    oldest = max(0, sequence.length - n)
    slots = [sequence.blocks[p // size] * size + p % size for p in range(oldest, sequence.length)]
    return [int(pool.pool_L2GSC[0, 0, 0, slot, 0]) if slot >= 0 else -1 for slot in slots]


def test_a_pool_grows_by_doubling_and_keeps_what_it_holds() -> None:
    pool = KVPool(CONFIG, torch.bfloat16, block_size=4)
    assert (pool.nbytes, pool.dtype) == (0, torch.bfloat16)
    id, sizes = pool.add(), []
    for i in range(100):
        slot = pool.batch([(id, [0])]).slots_T
        pool.pool_L2GSC[:, :, :, slot] = i
        sizes.append(pool.n_blocks)
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 32]
    assert _held(pool, id) == list(range(100))


def test_a_sequence_alone_lies_in_one_piece() -> None:
    pool, tables = KVPool(CONFIG, torch.float32, block_size=2, n_blocks=64), []
    ids = [pool.add(20) for _ in range(3)]
    for _ in range(10):
        tables = [pool.batch([(id, [0])]).block_tables for id in ids]
    for table in tables:
        assert table is not None and table[0].diff().eq(1).all()


def test_a_pool_that_does_not_grow_is_as_before_when_it_is_full() -> None:
    pool = KVPool(CONFIG, torch.float32, block_size=4, n_blocks=3, grows=False)
    first, second = pool.add(), pool.add()
    pool.batch([(first, [0] * 6)])
    with pytest.raises(MixtralError, match="2 blocks of 4 positions are needed and 1 of 3 are free"):
        pool.batch([(first, [0] * 3), (second, [0])])
    assert (pool.length(first), pool.length(second), pool.n_free) == (6, 0, 1)
    pool.batch([(second, [0] * 4)])
    copy = pool.share(first)
    with pytest.raises(MixtralError, match="1 blocks of 4 positions are needed and 0 of 3"):
        pool.batch([(copy, [0])])  # into a block that the first uses too


def test_what_is_not_there_is_refused() -> None:
    pool = KVPool(CONFIG, torch.float32)
    id = pool.add()
    for call in (lambda: pool.length(7), lambda: pool.free(7), lambda: pool.batch([(7, [0])]), lambda: pool.share(7)):
        with pytest.raises(UsageError, match="no sequence 7"):
            call()
    for length in (-1, 1):
        with pytest.raises(UsageError, match=f"has 0 positions, not {length}"):
            pool.truncate(id, length)
    with pytest.raises(UsageError, match="a block needs at least one slot"):
        KVPool(CONFIG, torch.float32, block_size=0)


def test_an_idle_pool_gives_back_what_is_large() -> None:
    pool = KVPool(CONFIG, torch.float32)
    id = pool.add()
    pool.batch([(id, [0] * 300_000)])
    assert pool.nbytes > 64 << 20
    pool.free(id)
    assert pool.nbytes == pool.n_blocks == 0
    pool.batch([(pool.add(), [0])])


def test_threads_that_share_a_pool() -> None:
    pool, wrong = KVPool(CONFIG, torch.float32, block_size=2), []

    def work(mark: int) -> None:
        for _ in range(40):
            id = pool.add()
            for _ in range(9):
                slots = pool.batch([(id, [0])]).slots_T
                with pool.lock:
                    pool.pool_L2GSC[:, :, :, slots] = mark
            with pool.lock:
                wrong.extend(m for m in _held(pool, id) if m != mark)
            pool.free(id)

    threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pool.n_free == pool.n_blocks


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_tables_kept_between_batches_are_what_the_sequences_have(window: int | None, block_size: int) -> None:
    """Random steps of a pool; oracle: the tables written down anew from the sequences' blocks."""
    draw, refused, checked = random.Random(block_size), 0, 0
    pool = KVPool(CONFIG.replace(sliding_window=window), torch.float32, block_size=block_size)
    for _ in range(600):
        ids, step = pool.ids, draw.random()
        try:
            if step < 0.1 or not ids:
                pool.add()
            elif step < 0.2:
                pool.share(draw.choice(ids))
            elif step < 0.3:
                id = draw.choice(ids)
                pool.truncate(id, draw.randrange(pool.length(id) + 1))
            elif step < 0.45:
                pool.free(draw.choice(ids))
            else:
                some = ids if draw.random() < 0.6 else draw.sample(ids, draw.randrange(1, len(ids) + 1))
                tables = pool.batch([(id, [1] * draw.randrange(4)) for id in some]).block_tables
                blocks = [pool._sequences[id].blocks for id in some]
                most = max(map(len, blocks))
                assert tables is not None and tables.tolist() == [b + [-1] * (most - len(b)) for b in blocks]
                checked += 1
        except UsageError:  # positions that are out of the window
            refused += 1
    assert checked > 200 and (refused > 0) == (window is not None)
