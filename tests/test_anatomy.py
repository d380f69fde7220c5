"""What tells two models from each other: their modules, and what they do when they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from six_layers import Subject
from torch import Tensor, nn

from llmslim.anatomy import bf16_is_fast, first_difference, layer_operations
from llmslim.anatomy.sites import find_layers, find_sites
from llmslim.modeling.modeling_llmslim import replace_sites


def test_types_and_shapes_of_what_is_stored_count() -> None:
    plain = nn.Linear(2, 2)
    assert first_difference(plain, nn.Linear(2, 2)) == ""
    assert first_difference(plain, nn.Linear(2, 2).half())
    assert first_difference(plain, nn.Linear(2, 3))
    assert first_difference(plain, nn.Linear(2, 2, bias=False))


def test_a_module_that_is_in_one_only_is_a_difference_either_way() -> None:
    one, two = nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity(), nn.Identity())
    assert first_difference(one, two).startswith("1:")
    assert first_difference(two, one).startswith("1:")


class Part(nn.Module):
    """A module with one plain attribute."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def test_attributes_are_compared_by_value_and_nan_is_itself() -> None:
    assert first_difference(Part(float("nan")), Part(float("nan"))) == ""
    assert first_difference(Part(float("nan")), Part(1.0))
    assert first_difference(Part([1, 2]), Part([1, 2])) == ""
    assert first_difference(Part([1, 2]), Part([1, 3]))


def test_configs_are_compared_in_what_a_forward_pass_reads() -> None:
    def part(**changes: Any) -> Part:
        return Part(tf.LlamaConfig(num_hidden_layers=1, **changes))

    assert first_difference(part(), part(name_or_path="elsewhere")) == ""
    assert first_difference(part(), part(rms_norm_eps=0.5))


class Layer(nn.Module):
    """Adds a multiple of its input to it."""

    def __init__(self, alpha: int) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, x, alpha=self.alpha)


class Model(nn.Module):
    """A stack of such layers, doubling between them."""

    def __init__(self, *alphas: int, width: int = 8) -> None:
        super().__init__()
        self.layers, self.width = nn.ModuleList(map(Layer, alphas)), width

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = torch.ones(*input_ids.shape, self.width)
        for layer in self.layers:
            x = layer(x) * 2
        return x


def test_operations_are_reported_apart_by_options_and_by_shapes() -> None:
    found = layer_operations(Model(1, 3, 1), "layers")
    assert found.inside[0] == found.inside[2] != found.inside[1]
    assert found.between[0] == found.between[1] != found.inside[0]
    assert layer_operations(Model(1, width=9), "layers").inside[0] != found.inside[0]
    assert layer_operations(Model(1, 3), "layers").inside == found.inside[:2]


class MaskedLayer(Layer):
    """Looks at some places of its input only."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, x.sum((0, 2)) > 0]
        return x + chosen.sum() * self.alpha + x[x > 0].sum()


def test_places_chosen_by_a_mask_need_no_values() -> None:
    model = Model()
    model.layers = nn.ModuleList(map(MaskedLayer, (1, 3, 1)))
    found = layer_operations(model, "layers")
    assert found.inside[0] == found.inside[2] != found.inside[1]


def test_a_model_is_left_in_its_mode() -> None:
    model = Model(1)
    for training in (True, False):
        model.train(training)
        layer_operations(model, "layers")
        assert model.training is training
        assert model.layers[0].training is training


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx512", [False, True])
def test_bfloat16_is_fast_where_the_hardware_multiplies_it(
    amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    on_gpu = not (amx or avx512)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: on_gpu)
    assert bf16_is_fast(torch.device("cpu")) is (amx or avx512)
    assert bf16_is_fast(torch.device("cuda")) is on_gpu


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        ("phi4_multimodal", "causal", "model.layers"),
        ("xlm", "causal", "transformer.attentions"),
        ("florence2", "image", "model.language_model.decoder.layers"),
        ("idefics", "image", "model.layers"),
        ("udop", "image", "decoder.block"),
    ],
)
def test_blocks_leave_the_decoder_layers_where_they_are(name: str, kind: str, path: str) -> None:
    """Each model has another list as long, and that one keeps its dense maps."""
    subject = Subject(name, kind)
    with torch.device("meta"):
        model = subject.auto.from_config(subject.config())
    assert find_layers(model).path == path
    blocks = {
        site.name: {
            "structure": "low_rank",
            "rank": 1,
            "in_features": site.in_features,
            "out_features": site.out_features,
            "bias": site.bias,
        }
        for site in find_sites(model).values()
        if site.name.startswith(f"{path}.")
    }
    replace_sites(model, blocks)
    assert not blocks.keys() & find_sites(model).keys()
    assert find_layers(model).path == path
