"""Cached logits equal uncached ones at every position, however the text is cut; slots and buffers are what they say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.engine.kv_cache import FullCache, RollingCache, make_cache
from mixtral.errors import ConfigError
from mixtral.model import Mixtral, Ragged
from tests.engine.models import CONFIG, WINDOW, make_model, random_tokens

WINDOWED = CONFIG.replace(sliding_window=WINDOW)
FULL_MODEL, WINDOWED_MODEL = make_model(), make_model(sliding_window=WINDOW)
KINDS = [(FULL_MODEL, FullCache), (WINDOWED_MODEL, FullCache), (WINDOWED_MODEL, RollingCache)]


def cached_logits(
    model: Mixtral, cache: FullCache, texts: list[list[int]], chunks: Iterator[list[int]]
) -> list[Tensor]:
    """Logits of each text, read in steps: a step takes so many tokens of each, none of those at their end."""
    read, logits = [0] * len(texts), [[] for _ in texts]  # type: ignore[var-annotated]
    while read != [len(t) for t in texts]:
        parts = [t[r : r + n] for t, r, n in zip(texts, read, next(chunks), strict=True)]
        assert cache.lengths == read
        out = model(Ragged.of(parts, read), cache).logits
        for i, part in enumerate(out.split([len(p) for p in parts])):
            logits[i].append(part)
            read[i] += len(part)
    return [torch.cat(parts) for parts in logits]


def assert_equal(ours: Tensor, model: Mixtral, text: list[int]) -> None:
    wanted = model(Ragged.of([text])).logits
    assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


@settings(max_examples=25)
@given(st.data())
def test_any_chunks_of_a_ragged_batch_equal_uncached(data: st.DataObject) -> None:
    model, kind = data.draw(st.sampled_from(KINDS))
    lengths = data.draw(st.lists(st.integers(1, 5 * WINDOW), min_size=1, max_size=3))
    texts = [random_tokens(n, seed=i) for i, n in enumerate(lengths)]
    cache = kind(model.config, len(texts), torch.float32, capacity=data.draw(st.integers(0, 40)))
    sizes = st.lists(st.integers(0, 3 * WINDOW), min_size=len(texts), max_size=len(texts)).filter(any)

    def chunks() -> Iterator[list[int]]:
        while True:
            yield data.draw(sizes)

    for text, logits in zip(texts, cached_logits(model, cache, texts, chunks()), strict=True):
        assert_equal(logits, model, text)


@pytest.mark.parametrize(("model", "kind"), KINDS)
@pytest.mark.parametrize("size", [1, WINDOW - 1, WINDOW, WINDOW + 1, 64])
def test_one_chunk_size_past_the_window(model: Mixtral, kind: type[FullCache], size: int) -> None:
    text = random_tokens(64)
    chunks = iter([[size]] * 64)
    [logits] = cached_logits(model, kind(model.config, 1, torch.float32), [text], chunks)
    assert_equal(logits, model, text)


def test_the_window_matters_here() -> None:
    """Else the tests above would pass with any window."""
    text = random_tokens(64)
    full, windowed = (m(Ragged.of([text])).logits for m in (FULL_MODEL, WINDOWED_MODEL))
    assert (full - windowed)[WINDOW:].abs().max() > 0.1
    assert torch.equal(full[0], windowed[0])


def marked(positions: range) -> Tensor:
    """Keys whose values are their positions: [n, G, C]."""
    shape = (len(positions), CONFIG.n_kv_heads, CONFIG.head_dim)
    return torch.tensor([float(p) for p in positions])[:, None, None].expand(shape)


def packed(positions: range) -> Ragged:
    return Ragged.of([[0] * len(positions)], [positions.start])


@pytest.mark.parametrize("size", [1, 3, WINDOW, 2 * WINDOW + 3])
def test_rolling_gives_exactly_the_older_window_and_the_chunk(size: int) -> None:
    """Position p lies in slot p mod W; keys, values and positions belong together; nothing in the window is missing."""
    cache = RollingCache(WINDOWED, 1, torch.float32)
    for begin in range(0, 40, size):
        new = range(begin, begin + size)
        for layer in range(WINDOWED.n_layers):
            [kv] = cache.extend(layer, marked(new), -marked(new), packed(new))
            at = kv.positions_S.tolist()
            assert kv.keys_SGC[:, 0, 0].tolist() == at and (-kv.values_SGC[:, 0, 0]).tolist() == at
            assert set(range(max(0, begin - WINDOW + 1), new.stop)) <= set(at) and len(set(at)) == len(at)
            assert len(at) <= WINDOW + (size if size > 1 else 0)
    buffer = cache._sequences[0].kv_2LSGC[0, 0, :, 0, 0]
    assert len(buffer) == WINDOW
    assert all(int(p) % WINDOW == slot for slot, p in enumerate(buffer.tolist()))


def test_buffers_grow_by_doubling_and_the_rolling_one_stops_at_its_window() -> None:
    wide = CONFIG.replace(sliding_window=100)
    sizes: dict[str, list[int]] = {"full": [], "rolling": []}
    caches = {"full": FullCache(CONFIG, 1, torch.float32), "rolling": RollingCache(wide, 1, torch.float32)}
    for name, cache in caches.items():
        for begin in range(0, 300, 10):
            cache.extend(0, marked(range(begin, begin + 10)), marked(range(begin, begin + 10)),
                         packed(range(begin, begin + 10)))  # fmt: skip
            sizes[name].append(cache._sequences[0].kv_2LSGC.shape[2])
    assert sorted(set(sizes["full"])) == [64, 140, 300]  # asked for 10, 70, 150
    assert sorted(set(sizes["rolling"])) == [64, 100]


def test_capacity_is_reserved_at_once() -> None:
    cache = FullCache(CONFIG, 1, torch.float32, capacity=48)
    buffer = cache._sequences[0].kv_2LSGC
    cache.extend(0, marked(range(48)), marked(range(48)), packed(range(48)))
    assert cache._sequences[0].kv_2LSGC is buffer and buffer.shape[2] == 48


@pytest.mark.parametrize(("config", "slots"), [(CONFIG, [64, 130]), (WINDOWED, [WINDOW, WINDOW])])
def test_growing_makes_room_that_keeps_what_is_there(config: ModelConfig, slots: list[int]) -> None:
    cache = make_cache(config, 2, torch.float32)
    first, _ = cache.grow([WINDOW, 0])
    first[:] = torch.randn(first.shape)
    again, other = cache.grow([0, 65])
    assert again is first and cache.lengths == [WINDOW, 65]
    assert [buffer.shape[2] for buffer in (first, other)] == slots
    more, _ = cache.grow([100, 0])
    assert cache.lengths == [WINDOW + 100, 65] and torch.equal(more[:, :, :WINDOW], first[:, :, :WINDOW])


def test_keep_drops_and_reorders_sequences() -> None:
    texts = [random_tokens(n, seed=n) for n in (5, 9, 7)]
    cache = FullCache(CONFIG, 3, torch.float32)
    FULL_MODEL(Ragged.of([t[:-1] for t in texts]), cache)
    cache.keep([2, 0])
    assert cache.lengths == [6, 4]
    logits = FULL_MODEL(Ragged.of([texts[2][-1:], texts[0][-1:]], cache.lengths), cache).logits
    for ours, text in zip(logits, (texts[2], texts[0]), strict=True):
        wanted = FULL_MODEL(Ragged.of([text])).logits[-1]
        assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_make_cache_follows_the_config() -> None:
    assert type(make_cache(CONFIG, 2, torch.float32)) is FullCache
    rolling = make_cache(WINDOWED, 2, torch.bfloat16)
    assert type(rolling) is RollingCache and rolling.lengths == [0, 0]
    assert rolling._sequences[0].kv_2LSGC.dtype == torch.bfloat16


def test_rolling_without_a_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="no sliding_window; use FullCache"):
        RollingCache(CONFIG, 1, torch.float32)
