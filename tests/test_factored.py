"""Embeddings and heads of another width than the model's."""

from __future__ import annotations

import json

import pytest
import torch

from llmslim.modeling.factored import FactoredEmbedding, FactoredHead
from llmslim.modeling.structured import build

WIDEN = {"structure": "grouped_pointwise", "in_features": 8, "out_features": 12, "bias": False}
WIDEN |= {"groups": 2, "variant": "io"}
NARROW = {"structure": "low_rank", "in_features": 12, "out_features": 8, "bias": True, "rank": 3}


def test_factored_embedding_is_a_lookup_and_its_block():
    embedding = FactoredEmbedding(10, 8, projection=WIDEN, padding_idx=0)
    ids = torch.tensor([[1, 2, 9], [0, 3, 1]])
    expected = embedding.projection(embedding.weight[ids])
    assert torch.equal(embedding(ids), expected)
    assert torch.equal(embedding.weight[0], torch.zeros(8))
    embedding(ids).sum().backward()
    assert embedding.weight.grad[0].abs().max() == 0  # the padding token is not trained
    assert embedding.weight.grad[1].abs().max() > 0


def test_factored_head_is_its_block_and_a_product():
    head = FactoredHead(10, projection=NARROW)
    assert (head.in_features, head.out_features) == (12, 10)
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(head(x), head.projection(x) @ head.weight.T)


def test_factored_specs_make_empty_twins():
    for module in (
        FactoredEmbedding(10, 8, projection=WIDEN, padding_idx=3),
        FactoredEmbedding(10, 8, projection=WIDEN),
        FactoredHead(10, projection=NARROW),
    ):
        twin = build(json.loads(json.dumps(module.spec())), device="meta", dtype=torch.float16)
        assert twin.spec() == module.spec()
        assert {p.dtype for p in twin.parameters()} == {torch.float16}
        shapes = {name: p.shape for name, p in module.named_parameters()}
        assert {name: p.shape for name, p in twin.named_parameters()} == shapes
    assert "10, 8, padding_idx=3" in repr(FactoredEmbedding(10, 8, projection=WIDEN, padding_idx=3))
    assert "in_features=12, out_features=10" in repr(FactoredHead(10, projection=NARROW))


def test_a_projection_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"8 .* 6"):
        FactoredEmbedding(10, 6, projection=WIDEN)
