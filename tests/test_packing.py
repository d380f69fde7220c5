"""Packed rows: what is in them, how full they are, and that samples do not see each other."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch.nn.functional import cross_entropy

from llmslim.data import Rows, collate, collate_apart, collate_flat, packing
from llmslim.data.packing import IGNORED, Pieces, cut, pack, pack_evenly
from llmslim.data.tokens import Tokens


def tokens_of(documents: list[list[int]]) -> Tokens:
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    ids = np.array([i for ids in documents for i in ids], dtype=np.int32)
    return Tokens(ids, lengths, lengths.cumsum() - lengths)


def rows_of(documents: list[list[int]], length: int, *, pad: int = 0, seed: int = 0) -> Rows:
    tokens = tokens_of(documents)
    numbers = np.arange(len(documents))
    return Rows([tokens], cut([tokens], numbers * 0, numbers, length), length, pad, seed)


def samples_in(row: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Take a row apart where positions restart: ids and labels of each sample, padding too."""
    begins = (row["position_ids"] == 0).nonzero().flatten().tolist()
    ends = [*begins[1:], len(row["input_ids"])]
    for begin, end in zip(begins, ends, strict=True):
        assert row["position_ids"][begin:end].tolist() == list(range(end - begin))
    return [
        (row["input_ids"][a:b].tolist(), row["labels"][a:b].tolist())
        for a, b in zip(begins, ends, strict=True)
    ]


def some_documents(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(1, 96, draw.integers(2, longest + 1)).tolist() for _ in range(count)]


# ------------------------------------------------------------------------------- packing


def test_a_row_by_hand():
    row = rows_of([[5, 6, 7, 8], [9, ~3, 4]], 9)[0]
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9, 3, 4, 0, 0]
    assert row["labels"].tolist() == [-100, 6, 7, 8, -100, -100, 4, -100, -100]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert {tensor.dtype for tensor in row.values()} == {torch.int64}


def test_every_sample_is_in_exactly_one_row_and_whole():
    documents = some_documents(300, 40)
    rows = rows_of(documents, 64, pad=99)
    found = []
    for row in rows:
        for ids, labels in samples_in(row):
            if ids[0] != 99:
                assert labels == [IGNORED, *ids[1:]]
                found.append(ids)
            else:
                assert set(ids) == {99}
                assert set(labels) == {IGNORED}
    assert sorted(found) == sorted(documents)
    assert rows.tokens == sum(map(len, documents))
    positions = len(rows) * 64
    assert rows.padding == pytest.approx(1 - rows.tokens / positions)


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_no_row_overflows_and_rows_are_few(capacity):
    draw = np.random.default_rng(capacity)
    lengths = draw.integers(1, capacity + 1, 500)
    row_of = pack(lengths, capacity)
    sums = np.bincount(row_of, weights=lengths)
    assert sums.max() <= capacity
    assert (sums > 0).all()
    # Best fit decreasing takes at most 11/9 of the fewest rows possible, and a few more.
    least = np.ceil(lengths.sum() / capacity)
    assert len(sums) <= 11 / 9 * max(least, (lengths > capacity // 2).sum()) + 4


def test_short_samples_leave_hardly_any_padding():
    draw = np.random.default_rng(0)
    lengths = np.minimum(np.exp(draw.normal(4.3, 0.7, 20_000)).astype(np.int64) + 2, 512)
    rows = pack(lengths, 512).max() + 1
    assert 1 - lengths.sum() / (rows * 512) < 0.01


def test_rows_stay_open_between_buffers(monkeypatch):
    monkeypatch.setattr(packing, "_BUFFER", 4)
    assert pack(np.array([6, 6, 6, 6, 4, 4, 4, 4]), 10).max() == 3


def test_the_order_comes_from_the_seed():
    documents = some_documents(100, 20)
    one, again, other = (rows_of(documents, 32, seed=seed) for seed in (1, 1, 2))

    def ids(rows: Rows) -> list[list[int]]:
        return [row["input_ids"].tolist() for row in rows]

    assert ids(one) == ids(again) != ids(other)
    assert sorted(ids(one)) == sorted(ids(other))


def test_a_document_longer_than_a_row_is_cut():
    rows = rows_of([list(range(1, 22)), [50, 51]], 8)
    found = sorted(ids for row in rows for ids, _ in samples_in(row) if ids[0])
    assert found == [list(range(1, 9)), list(range(9, 17)), list(range(17, 22)), [50, 51]]


def test_pieces_without_anything_to_learn_are_left_out():
    # An answer only at the end; and one token too many, which predicts nothing.
    pieces = cut([tokens_of([[~1] * 8 + [~2, 3, 4], [5] * 9])], np.array([0, 0]), np.arange(2), 4)
    assert list(zip(pieces.start.tolist(), pieces.length.tolist(), strict=True)) == [
        (8, 3),
        (11, 4),
        (15, 4),
    ]


def test_rows_from_several_sources():
    sources = [tokens_of([[1, 2], [3, 4, 5]]), tokens_of([[6, 7]])]
    pieces = cut(sources, np.array([1, 0]), np.array([0, 1]), 5)
    (row,) = Rows(sources, pieces, 5, 0, 0)
    assert sorted(ids for ids, _ in samples_in(row)) == [[3, 4, 5], [6, 7]]


def test_rows_are_a_sequence():
    rows = rows_of(some_documents(20, 8), 16)
    assert torch.equal(rows[-1]["input_ids"], rows[len(rows) - 1]["input_ids"])
    with pytest.raises(IndexError):
        rows[len(rows)]
    none = np.zeros(0, dtype=np.int64)
    empty = Rows([], Pieces(none, none, none), 16, 0, 0)
    assert (len(empty), empty.tokens, empty.padding) == (0, 0, 0)


# --------------------------------------------------------------------------- no contamination


def unpacked(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "mistral"])
@torch.no_grad()
def test_packed_logits_and_loss_are_those_of_the_samples_alone(architecture, attention, flat):
    model = tiny_model(architecture)
    model.set_attn_implementation(attention)
    documents = some_documents(12, 20)
    rows = rows_of(documents, 32)
    assert len(rows) > 3
    batch = (collate_flat if flat else collate)([rows[0], rows[1]])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].shape == ((1, batch["labels"].numel()) if flat else (2, 32))
    output = model(**batch, use_cache=False)
    total, count, seen = 0.0, 0, 0
    for row in range(len(batch["input_ids"])):
        at = 0
        for ids, labels in samples_in({name: tensor[row] for name, tensor in batch.items()}):
            if ids[0]:
                seen += 1
                alone = unpacked(model, ids)
                torch.testing.assert_close(
                    output.logits[row, at : at + len(ids)], alone, atol=1e-5, rtol=0
                )
                assert labels[1:] == ids[1:]
                total += float(cross_entropy(alone[:-1], torch.tensor(ids[1:]), reduction="sum"))
                count += len(ids) - 1
            at += len(ids)
    assert seen > 4
    assert float(output.loss) == pytest.approx(total / count, abs=1e-5)


@torch.no_grad()
def test_with_a_cache_samples_would_see_each_other():
    """What the documentation warns of; if this fails, the warning can go."""
    model = tiny_model()
    batch = collate([rows_of(some_documents(12, 20), 32)[0]])
    apart = model(**batch, use_cache=False).logits
    assert not torch.allclose(model(**batch, use_cache=True).logits, apart, atol=1e-3)


def test_flat_batches_have_no_padding():
    documents = some_documents(9, 20)
    rows = rows_of(documents, 32, pad=0)
    flat = collate_flat([rows[index] for index in range(len(rows))])
    assert flat["input_ids"].shape == (1, sum(map(len, documents)))
    assert (flat["input_ids"] != 0).all()
    ids = [one for one, _ in samples_in({name: tensor[0] for name, tensor in flat.items()})]
    assert sorted(ids) == sorted(documents)


# ------------------------------------------------------------- models that would mix samples


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_even_rows_are_no_larger_than_a_row_when_taken_apart(capacity):
    draw = np.random.default_rng(capacity)
    lengths = draw.integers(1, capacity + 1, 500)
    row_of = pack_evenly(lengths, capacity)
    rows = [lengths[row_of == row] for row in range(row_of.max() + 1)]
    assert sum(map(len, rows)) == len(lengths)
    assert all(0 < len(row) * row.max() <= capacity for row in rows)
    # Whatever opened a row would not have fitted into the one before it.
    assert all((len(a) + 1) * a.max() > capacity for a, _ in itertools.pairwise(rows))


def test_rows_taken_apart_by_hand():
    rows = rows_of([[5, 6, 7, 8], [9, ~3, 4]], 9)
    apart = collate_apart([rows[0]])
    assert {name: tensor.tolist() for name, tensor in apart.items()} == {
        "input_ids": [[5, 6, 7, 8], [9, 3, 4, 0]],
        "labels": [[-100, 6, 7, 8], [-100, -100, 4, -100]],
        "position_ids": [[0, 1, 2, 3], [0, 1, 2, 3]],
    }


def test_rows_taken_apart_predict_the_same_tokens_in_the_same_order():
    rows = rows_of(some_documents(40, 20), 32)
    batch = [rows[index] for index in range(5)]
    one, other = collate(batch)["labels"], collate_apart(batch)["labels"]
    assert one[:, 1:][one[:, 1:] != -100].tolist() == other[:, 1:][other[:, 1:] != -100].tolist()


def test_a_row_that_teaches_nothing_can_be_taken_apart():
    row = rows_of([[5, 6, 7], [8, 9]], 9)[0]
    silent = {**row, "labels": torch.full_like(row["labels"], IGNORED)}
    assert collate_apart([silent])["labels"].shape == (1, 3)
