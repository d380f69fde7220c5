"""Every entry of transformers' causal-LM mapping: its ledger at default size, a round trip tiny.

All round trips run with `-m slow`; without, one architecture in eight and those that are unlike the
others.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from every_architecture import (
    FILLED_IN,
    MLP_AND_ATTENTION,
    NOT_FITTED,
    config_classes,
    coverage,
    default_config,
    fit_to_text,
    is_causal,
    logits,
    packed,
    round_trip,
    tiny_config,
    tiny_model,
    walk,
    widen,
)
from torch import nn

from llmslim import fitting, planning
from llmslim.anatomy.sites import find_layers
from llmslim.errors import SizeError, TargetError
from llmslim.fitting import layerwise
from llmslim.healing.packing_check import sees_neighbours
from llmslim.planning.planner import model_on_meta
from llmslim.recipe import Recipe
from llmslim.report.report import Report

pytestmark = pytest.mark.filterwarnings("ignore")  # what other people's models warn of
ROOT = Path(__file__).parents[1]
CLASSES = config_classes()

NO_DEFAULT = {
    "cohere_compass_text": "KeyError",  # its layer types are not those that it looks for
    "dbrx": "AttributeError",  # reads a field that its attention config does not have
    "dots1": "TypeError",  # the number of experts is None
    "gemma3n": "ImportError",  # its image part is in timm, which is not installed
    "gemma4_assistant": "StrictDataclassClassValidationError",  # refuses its own default
    "gemma4_unified_assistant": "ValueError",  # the same
    "hunyuan_v1_dense": "TypeError",  # the size of a head is None
    "hunyuan_v1_moe": "TypeError",  # the same
    "lfm2_moe": "TypeError",  # the layer types are None
    "ministral": "TypeError",  # the size of a head is None
    "musicgen": "AttributeError",  # its decoder wants the decoder's config, not this one
    "musicgen_melody": "AttributeError",  # the same
    "nemotron": "TypeError",  # the number of key heads is None
    "qwen4_exp": "TypeError",  # sizes of its indexer are None
    "qwen4_exp_text": "TypeError",  # the same
    "reformer": "AssertionError",  # no decoder unless its config says so
}
"""What transformers itself cannot build from the default config, and how that ends."""

BELOW_90 = {
    "bamba",  # the output projections of Mamba: a fused kernel reads their weights in training
    "dbrx",  # all experts in one matrix, which its loop cuts up
    "falcon_mamba",
    "mamba",
    "mamba2",
    "reformer",  # hashed attention multiplies with its weights itself
    "rwkv",  # scales its output projections by itself
    "xlnet",  # attention weights are 3-D parameters inside einsum
    "zamba2",
}
"""Where an MLP+attention recipe reaches less than nine tenths."""

NOT_TINY = {
    "blt",  # its cache asks for a field that its config does not have
    "gemma3n",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "musicgen",
    "musicgen_melody",
}
"""What no tiny model is built of: sizes that fit each other are not found generically."""

TINY = [name for name in CLASSES if name not in NOT_TINY]
UNLIKE = {
    "emu3", "falcon", "falcon_h1", "gemma3", "gpt_oss", "gpt2", "jetmoe", "llama4", "mixtral",
    "rwkv", "zamba",
}  # fmt: skip


BUILT = sorted(CLASSES.keys() - (NO_DEFAULT.keys() - FILLED_IN.keys()))


@pytest.mark.parametrize("name", TINY)
def test_ledger_adds_up_to_every_parameter(name: str) -> None:
    ledger_of(model_on_meta(tiny_config(CLASSES[name])))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in BELOW_90 | {"llama", "phi3", "gpt2"} else pytest.mark.slow
        )
        for name in BUILT
    ],
)
def test_ledger_at_the_default_size(name: str) -> None:
    report = ledger_of(model_on_meta(default_config(name, CLASSES[name])))
    assert (coverage(report).share < 0.9) == (name in BELOW_90)


def ledger_of(model: nn.Module) -> Report:
    """Return a model's report, in which every parameter must be, once."""
    report = planning.plan(model, MLP_AND_ATTENTION).report()

    sizes = {id(p): p.numel() for p in model.parameters()}
    assert sum(row.params_before for row in report.rows) == sum(sizes.values())
    assert len({row.name for row in report.rows}) == len(report.rows)
    # Each row's parameters are the module's own, or the parameter of that name.
    modules = dict(model.named_modules())
    for row in report.rows:
        holder, _, leaf = row.name.rpartition(".")
        own = row.name in modules or row.name == "(model)"
        assert own or leaf in modules[holder]._parameters, row.name
    silent = [row.name for row in report.rows if row.action != "replaced" and not row.reason]
    assert not silent
    return report


def test_what_cannot_be_built_is_known() -> None:
    ended = {}
    for name in sorted(CLASSES):
        if name in NO_DEFAULT:
            try:
                model_on_meta(CLASSES[name]())
            except Exception as error:
                ended[name] = type(error).__name__
    assert ended == NO_DEFAULT
    assert FILLED_IN.keys() < NO_DEFAULT.keys()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if index % 8 == 0 or name in UNLIKE else pytest.mark.slow)
        for index, name in enumerate(sorted(TINY))
    ],
)
def test_slim_save_load_generate(name: str) -> None:
    round_trip(tiny_model(CLASSES[name]))


ODD_LAYERS = {
    "bamba",  # attention weights beside the hidden states, to nobody
    "deepseek_v4",  # several residual streams
    "longcat_flash",  # two attentions in a layer, which is what the config counts
    "openai-gpt",  # a list
    "prophetnet",  # projections that see a third of the stream
    "rwkv",  # a state that is None without a cache
    "xlnet",  # tokens first
    "xmod",  # types that autocast leaves unlike
}


NOT_CAUSAL = {
    "bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "electra",
    "ernie", "megatron-bert", "prophetnet", "rembert", "roberta", "roberta-prelayernorm",
    "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
}  # fmt: skip
"""What reads ahead, unless a config says that it is a decoder: no model to be trained on text."""
MIXERS = {
    "falcon",  # makes its mask without the position ids that it takes
    "jamba",  # a state goes from token to token
    "mpt",  # takes no position ids
    "qwen3_next",  # linear attention
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in MIXERS | {"llama"} else pytest.mark.slow)
        for name in sorted(TINY)
        if name != "reformer"  # works out no gradients in evaluation mode
    ],
)
def test_packed_samples_are_as_each_alone(name: str) -> None:
    model = tiny_model(CLASSES[name])
    for module in model.modules():
        # Which tokens of score 0 sparse attention takes depends on the length of the row.
        if hasattr(module, "index_topk"):
            module.index_topk = 64
    assert is_causal(model) == (name not in NOT_CAUSAL)
    if name not in NOT_CAUSAL:
        assert packed(model) < 1e-4
    if name in MIXERS:
        assert sees_neighbours(model)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if odd else pytest.mark.slow)
        for name in sorted(TINY)
        for odd in [name in ODD_LAYERS or name in NOT_FITTED]
    ],
)
def test_fit_to_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on machines that are fast at it: not every architecture's code expects two types.
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: torch.bfloat16)
    model = tiny_model(CLASSES[name])
    if name in NOT_FITTED:
        for way in (walk, fit_to_text):
            with pytest.raises(TargetError, match=f"{type(model).__name__}: {NOT_FITTED[name]}"):
                way(model)
    else:
        walk(model)
        fit_to_text(model)


LIKE_AN_MLP = {
    "bert": 2,  # attention whose sizes are all equal; its MLPs are spread over modules
    "bitnet": 0,  # a norm among the neurons
    "deepseek_v32": 4,  # what chooses tokens has the sizes of one
    "falcon_mamba": 0,
    "gemma4_text": 6,  # inputs for each layer
    "mamba": 0,
    "recurrent_gemma": 3,  # a recurrence, and an MLP whose name sounds like one
    "seed_oss": 2,  # the same
    "xmod": 2,  # adapters
    "zamba": 1,  # in several layers; a recurrence in all
    "zamba2": 0,  # adapters of its own in each layer that shares it
}
"""Architectures where something else has an MLP's sizes, and how many MLPs they have."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in LIKE_AN_MLP else pytest.mark.slow)
        for name in sorted(set(TINY) - {"hrm_text"})
    ],
)
def test_the_neurons_of_an_mlp_can_be_repeated(name: str) -> None:
    found = widen(tiny_model(CLASSES[name]))
    assert len(found) == LIKE_AN_MLP.get(name, len(found))


@pytest.mark.parametrize("name", ["mamba", "zamba2"])
def test_a_width_is_for_mlps(name: str) -> None:
    model = tiny_model(CLASSES[name])
    section = Recipe.of({"name": "w", "width": {"intermediate_size": 32}})
    with pytest.raises(TargetError, match=type(model).__name__):
        planning.plan(model, section)
    inside = "*.mixer.*" if name == "mamba" else "*.feed_forward.*"
    rule = {"match": inside, "structure": "width", "keep_ratio": 0.5}
    with pytest.raises(SizeError, match="width"):
        planning.plan(model, Recipe.of({"name": "w", "replace": [rule]}))


@pytest.mark.parametrize("name", ["deepseek_v4", "mamba", "zamba2"])
def test_a_budget_is_shared_out_where_layers_are_unusual(name: str) -> None:
    model = tiny_model(CLASSES[name])
    windows = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(2))
    text = fitting.TokenWindows(windows[:4], windows[4:])
    rule = {"match": f"{find_layers(model).path}.*", "structure": "auto"}
    recipe = Recipe.of({"name": "a", "budget": 0.6, "replace": [rule]})
    chosen = fitting.allocate(model, recipe, text)
    structures = {each.structure for each in chosen.replace}
    assert ("width" in structures) == (name == "deepseek_v4")
    assert "pivoted_low_rank" in structures


def test_a_config_that_counts_attentions_and_not_layers() -> None:
    model = tiny_model(CLASSES["longcat_flash"])
    assert model.config.num_hidden_layers == 2 * len(model.model.layers)
    recipe = Recipe.of({"name": "d", "depth": {"keep_layers": [1]}})
    fitting.rewrite(model, planning.plan(model, recipe))
    assert (model.config.num_layers, model.config.num_hidden_layers) == (1, 2)
    indices = [attention.layer_idx for attention in model.model.layers[0].self_attn]
    assert indices == [0, 1]


@pytest.mark.slow
def test_what_has_no_tiny_model_is_known() -> None:
    failed = set()
    for name in sorted(NOT_TINY):
        try:
            logits(tiny_model(CLASSES[name]))
        except Exception:
            failed.add(name)
    assert failed == NOT_TINY


def test_the_document_is_up_to_date() -> None:
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert f"transformers {version('transformers')}" in text
    causal = text.partition("\n## ")[0]  # what reads more than text: test_multimodal.py
    rows = [line.split(" | ") for line in causal.splitlines() if line.startswith("| `")]
    shown = {row[0].strip("| `"): row for row in rows}
    assert set(shown) == set(CLASSES)
    for name in ("llama", "mixtral", "mamba", "gpt2"):
        share = coverage(planning.plan(CLASSES[name](), MLP_AND_ATTENTION).report()).share
        assert shown[name][3] == f"{share:.1%}".replace("%", " %")
        assert shown[name][5].startswith("yes")
    assert {name for name, row in shown.items() if not row[5].startswith("yes")} == NOT_TINY
    fits = {name: row[6].rstrip(" |") for name, row in shown.items() if name not in NOT_TINY}
    assert {name: reported for name, reported in fits.items() if reported != "yes"} == {
        name: f"no: {why}" for name, why in NOT_FITTED.items()
    }
