"""Published kphi-3 checkpoints load as slim models of the same function, or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from reference_kphi3 import Reference
from safetensors.torch import save_file
from tiny import logits, tokens
from transformers import AutoModelForCausalLM, Phi3ForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmslim.errors import CheckpointError
from llmslim.modeling.grouped_pointwise import GroupedPointwise
from llmslim.storage import load_model, open_source
from llmslim.storage.kphi3 import kphi3_config, load_kphi3
from llmslim.storage.kphi3_layout import is_kphi3_config

torch.set_num_threads(1)  # on a busy machine tiny products wait for the second thread, not for work
IDS = tokens(2, 12, vocab=64)

VARIETIES = {
    "io": {},
    "residual": {"kind": "residual"},
    "io, narrow embeddings": {"embed_size": 32},
    "residual, narrow embeddings": {"kind": "residual", "embed_size": 32},
    "residual, wide embeddings": {"kind": "residual", "embed_size": 96},
    "io layers, residual wide embeddings": {"embed_kind": "residual", "embed_size": 96},
    "io layers, residual narrow embeddings": {"embed_kind": "residual", "embed_size": 32},
    "grouped queries": {"num_key_value_heads": 2},
    "residual, grouped queries": {"kind": "residual", "num_key_value_heads": 1},
    # 80 and 48 share no divisor from 2 to 3 but 2: down_proj keeps two groups, of 40 channels.
    "uneven groups": {"intermediate_size": 80, "min_channels_per_group": 16},
    # I // min = 1 for hidden 48: only down_proj, I = 192, has groups.
    "most projections dense": {"intermediate_size": 192, "min_channels_per_group": 48},
    "residual, most projections dense": {
        "kind": "residual",
        "intermediate_size": 192,
        "min_channels_per_group": 48,
    },
    "all projections dense": {"min_channels_per_group": 256},
    "no blocks": {"min_channels_per_group": -1},
    "no blocks, narrow embeddings": {"min_channels_per_group": -1, "embed_size": 32},
    "residual, down square": {"kind": "residual", "intermediate_size": 48},
    "residual, down widens": {"kind": "residual", "intermediate_size": 32},
    "tied": {"tie_word_embeddings": True},
    "tied, narrow embeddings": {"tie_word_embeddings": True, "embed_size": 32},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("variety", VARIETIES)
def test_same_logits_as_the_published_network(tmp_path, variety, dtype):
    reference = Reference(**VARIETIES[variety], dtype=dtype)
    model = load_kphi3(reference.save(tmp_path))
    assert isinstance(model, Phi3ForCausalLM)
    assert not model.training
    assert model.dtype == dtype
    ours, theirs = logits(model, IDS), reference.logits(IDS)
    # RMSNorm and softmax are float32 in both, so float64 is not exact to its last bits.
    tolerance = (3e-5 if dtype == torch.float32 else 5e-6) * theirs.std().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_every_tensor_of_the_reference_moves_its_logits():
    reference = Reference("residual", embed_size=32)
    before = reference.logits(IDS)
    for name in list(reference.tensors):
        kept = reference.tensors[name]
        reference.tensors[name] = kept.flip(0)
        assert (reference.logits(IDS) - before).abs().max() > 1e-2, name
        reference.tensors[name] = kept


@pytest.mark.parametrize("length", [6, 12], ids=["short", "long"])
@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_scaled_rotary_embeddings(tmp_path, kind, length):
    scaling = {
        "type": kind,
        "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
        "long_factor": [2.0, 2.5, 3.0, 4.0, 6.0, 9.0],
    }
    reference = Reference(rope_scaling=scaling, original_max_position_embeddings=8)
    model = load_kphi3(reference.save(tmp_path))
    torch.testing.assert_close(
        logits(model, IDS[:, :length]), reference.logits(IDS[:, :length]), rtol=3e-5, atol=3e-5
    )


@pytest.mark.parametrize(
    "variety",
    [
        "io",
        "residual",
        "io layers, residual wide embeddings",
        "most projections dense",
        "no blocks",
        "tied",
        "tied, narrow embeddings",
    ],
)
def test_saved_and_loaded_again_is_bitwise_the_same(tmp_path, variety):
    model = load_kphi3(Reference(**VARIETIES[variety]).save(tmp_path / "published"))
    model.save_pretrained(tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert type(again) is type(model)
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    ids = IDS[:1, :4]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["model_type"] == "llmslim"
    assert not any("kphi3" in place for place in config["auto_map"].values())


def test_cached_decoding_agrees_with_the_reference(tmp_path):
    reference = Reference(embed_size=32)
    model = load_kphi3(reference.save(tmp_path))
    made = model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = IDS
    for _ in range(6):
        ids = torch.cat((ids, reference.logits(ids)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(made, ids)


@pytest.mark.usefixtures("no_remote_code")
def test_the_code_beside_a_slim_checkpoint_is_whole(tmp_path, monkeypatch):
    # As where llmslim is not installed: a registered class would go before the files' own.
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "llmslim")
    for variety in ("io", "io layers, residual wide embeddings", "no blocks, narrow embeddings"):
        folder = tmp_path / variety.replace(" ", "_").replace(",", "")
        model = load_kphi3(Reference(**VARIETIES[variety]).save(tmp_path / "published"))
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        # Not this package's classes, but those of the files beside the weights, all of them.
        assert type(again).__module__.startswith("transformers_modules.")
        assert not any(type(m).__module__.startswith("llmslim") for m in again.modules())
        assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_training_reaches_every_parameter(tmp_path):
    model = load_kphi3(Reference("residual", embed_size=32).save(tmp_path))
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert model.get_input_embeddings().weight.shape == (64, 32)
    assert model.get_output_embeddings().weight.shape == (64, 32)


def test_tied_tables_stay_one(tmp_path):
    fields = {"tie_word_embeddings": True, "embed_size": 32}
    model = load_kphi3(Reference(**fields).save(tmp_path / "published"))
    model.save_pretrained(tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    for each in (model, again):
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight


def test_shards(tmp_path):
    reference = Reference(embed_size=32)
    whole = load_kphi3(reference.save(tmp_path / "whole"))
    sharded = load_kphi3(reference.save(tmp_path / "sharded", shards=3))
    assert torch.equal(logits(sharded, IDS), logits(whole, IDS))


def test_dtype_is_the_files_own_or_the_one_asked_for(tmp_path):
    folder = Reference(dtype=torch.bfloat16).save(tmp_path / "bfloat16")
    assert {p.dtype for p in load_kphi3(folder).parameters()} == {torch.bfloat16}
    asked = load_kphi3(folder, dtype="float32")
    assert {p.dtype for p in asked.parameters()} == {torch.float32}
    assert asked.config.dtype == torch.float32
    mixed = Reference(dtype=torch.bfloat16)
    mixed.tensors["model.norm.weight"] = mixed.tensors["model.norm.weight"].float()
    assert load_kphi3(mixed.save(tmp_path / "mixed")).dtype == torch.float32
    with pytest.raises(CheckpointError, match="int8"):
        load_model(open_source(folder), dtype="int8")


def test_generation_config_travels(tmp_path):
    folder = Reference().save(tmp_path)
    given = {"_from_model_config": True, "eos_token_id": [7, 9], "pad_token_id": 3}
    (folder / "generation_config.json").write_text(json.dumps(given))
    model = load_kphi3(folder)
    assert model.generation_config.eos_token_id == [7, 9]
    model.save_pretrained(tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert again.generation_config.eos_token_id == [7, 9]
    assert again.generation_config.pad_token_id == 3
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_kphi3(folder)


def _write_empty(path, shapes):
    """Write a float16 file whose data is a hole: zeros that take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize(("layers", "expected"), [(2, 35_011_584), (3, 52_515_840)])
def test_the_reports_models_have_its_parameter_counts(tmp_path, layers, expected):
    config = {"hidden_size": 3072, "embed_size": 3072, "intermediate_size": 9216}
    config |= {"num_attention_heads": 32, "num_hidden_layers": layers, "model_type": "kphi3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": [32064, 3072], "lm_head.weight": [32064, 3072]}
    shapes["model.norm.weight"] = [3072]
    for n in range(layers):
        for leaf, shape in {
            "self_attn.qkv_proj": [12, 256, 768],
            "self_attn.o_proj": [12, 256, 256],
            "mlp.gate_up_proj": [12, 256, 1536],
            "mlp.down_proj": [32, 288, 96],
        }.items():
            for part in ("first", "second"):
                shapes[f"model.layers.{n}.{leaf}.{part}_pointwise_conv.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{n}.{norm}.weight"] = [3072]
    _write_empty(tmp_path / "model.safetensors", shapes)
    model = load_kphi3(tmp_path)
    embeddings = 2 * 32064 * 3072
    assert sum(p.numel() for p in model.parameters()) - embeddings == expected
    # A config alone is enough for that.
    (tmp_path / "model.safetensors").unlink()
    with torch.device("meta"):
        slim = AutoModelForCausalLM.from_config(kphi3_config(tmp_path))
    assert sum(p.numel() for p in slim.parameters()) - embeddings == expected


@pytest.mark.parametrize("kind", ["io", "residual"])
def test_the_config_alone(tmp_path, kind):
    folder = Reference(kind, embed_size=32).save(tmp_path)
    assert kphi3_config(folder).to_dict() == {
        **load_kphi3(folder).config.to_dict(),
        "dtype": kphi3_config(folder).to_dict()["dtype"],
    }
    (folder / "model.safetensors").unlink()
    sites = kphi3_config(folder).llmslim["sites"]
    assert sites["model.layers.0.self_attn.o_proj"]["variant"] == "io"


def test_blocks_are_laid_out_as_documented(tmp_path):
    reference = Reference()
    model = load_kphi3(reference.save(tmp_path))
    block = model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(block, GroupedPointwise)
    name = "model.layers.1.mlp.down_proj.{}_pointwise_conv.weight"
    i = block.in_features // block.groups
    assert torch.equal(block.weight[:, :i], reference.tensors[name.format("first")])
    assert torch.equal(block.weight[:, i:], reference.tensors[name.format("second")])


# What is refused.

QKV = "model.layers.0.self_attn.qkv_proj.second_pointwise_conv.weight"


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.mlp.down_proj.first_pointwise_conv.weight",
        "model.layers.1.mlp.down_proj.second_pointwise_conv.weight",
        QKV,  # not to be taken for a residual block, which has none here
    ],
)
def test_a_missing_tensor(tmp_path, name):
    reference = Reference()
    del reference.tensors[name]
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: .* {name}\.$"):
        load_kphi3(reference.save(tmp_path))


def test_a_missing_second_tensor_of_a_residual_block(tmp_path):
    reference = Reference("residual")
    name = "model.layers.1.mlp.down_proj.second_pointwise_conv.weight"
    del reference.tensors[name]
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: .* {name}\.$"):
        load_kphi3(reference.save(tmp_path))


def test_an_unexpected_tensor(tmp_path):
    reference = Reference()
    reference.tensors["model.layers.0.self_attn.qkv_proj.bias"] = torch.zeros(144)
    with pytest.raises(CheckpointError, match=r" model\.layers\.0\.self_attn\.qkv_proj\.bias\.$"):
        load_kphi3(reference.save(tmp_path))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.norm.weight", (47,), "(48,)"),
        ("model.embed_tokens.weight", (65, 48), "(64, 48)"),
        (QKV, (6, 8, 25), "(6, 8, 24)"),
        (QKV, (6, 24, 24), "(6, 8, 24)"),
        ("model.layers.0.mlp.gate_up_proj.first_pointwise_conv.weight", (3, 8, 32), "(6, 8, 32)"),
    ],
)
def test_a_tensor_of_another_shape(tmp_path, name, shape, expected):
    reference = Reference()
    reference.tensors[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError) as caught:
        load_kphi3(reference.save(tmp_path))
    assert caught.value.problems == (
        f"{tmp_path}: weights of another shape {name} {shape} instead of {expected}.",
    )


def test_all_wrong_tensors_are_reported_together(tmp_path):
    reference = Reference()
    del reference.tensors["model.norm.weight"]
    reference.tensors["stray"] = torch.zeros(1)
    reference.tensors["lm_head.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError) as caught:
        load_kphi3(reference.save(tmp_path))
    assert len(caught.value.problems) == 3


def test_long_lists_are_cut(tmp_path):
    Reference(num_hidden_layers=4).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r" model\.layers\.2\..* 10 more\.$"):
        load_kphi3(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10}))
    with pytest.raises(CheckpointError, match=r" model\.layers\.4\..* 50 more\.$"):
        load_kphi3(tmp_path)


def test_weights_that_are_not_plain_floats(tmp_path):
    reference = Reference()
    reference.tensors["model.norm.weight"] = torch.zeros(48, dtype=torch.int8)
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight \(I8\); .* F16, BF16, F32, F64\."
    ):
        load_kphi3(reference.save(tmp_path))


def test_pickles_are_not_read(tmp_path):
    reference = Reference()
    reference.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(reference.tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*safetensors"):
        load_kphi3(tmp_path)


def test_a_truncated_file(tmp_path):
    file = Reference().save(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_kphi3(tmp_path)


def test_no_weights_at_all(tmp_path):
    (Reference().save(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load_kphi3(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "phi3"}, "its model_type must be kphi3"),
        ({"hidden_size": 0}, "hidden_size 0; allowed a whole number above 0"),
        ({"hidden_size": "48"}, "hidden_size '48'"),
        ({"num_hidden_layers": True}, "num_hidden_layers True"),
        ({"min_channels_per_group": 0}, "min_channels_per_group 0; allowed whole numbers but 0"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 48"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"pad_token_id": 64}, "not a config that Phi-3 can have"),
        ({"hidden_act": "no such"}, "not a config that Phi-3 can have"),
        ({"rms_norm_eps": "small"}, "not a config that Phi-3 can have"),
        ({"rope_scaling": {"type": "dynamic"}}, "not a config that Phi-3 can have"),
        ({"rope_scaling": ["longrope"]}, "not a config that Phi-3 can have"),
    ],
)
def test_a_config_that_makes_no_model(tmp_path, fields, message):
    Reference().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(CheckpointError) as caught:
        load_kphi3(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_absent_fields_take_the_published_defaults(tmp_path):
    config = {"model_type": "kphi3", "head_dim": 3, "partial_rotary_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    slim = kphi3_config(tmp_path)
    assert (slim.vocab_size, slim.hidden_size, slim.intermediate_size) == (32064, 1024, 4096)
    assert (slim.num_hidden_layers, slim.num_attention_heads, slim.num_key_value_heads) == (4, 4, 4)
    assert (slim.bos_token_id, slim.eos_token_id, slim.pad_token_id) == (1, 32000, 32000)
    assert slim.rope_parameters["rope_theta"] == 10000.0
    assert slim.rope_parameters["partial_rotary_factor"] == 1.0  # the published code knows none
    assert not hasattr(slim, "head_dim")
    assert slim.sliding_window is None
    assert slim.rms_norm_eps == 1e-5
    blocks = slim.llmslim["sites"]
    assert {name: spec["groups"] for name, spec in blocks.items() if ".0." in name} == {
        "model.layers.0.self_attn.qkv_proj": 4,
        "model.layers.0.self_attn.o_proj": 4,
        "model.layers.0.mlp.gate_up_proj": 4,
        "model.layers.0.mlp.down_proj": 16,
    }


def test_which_configs_are_kphi3():
    assert is_kphi3_config({"model_type": "kphi3"})
    assert not is_kphi3_config({"model_type": "phi3"})
    assert not is_kphi3_config({})


def test_resizing_the_vocabulary_is_refused_before_anything_changes(tmp_path):
    model = load_kphi3(Reference(embed_size=32).save(tmp_path))
    before = logits(model, IDS)
    with pytest.raises(TypeError, match="Embedding"):
        model.resize_token_embeddings(70)
    assert torch.equal(logits(model, IDS), before)


def test_remote_code_beside_the_weights_is_never_run(tmp_path):
    folder = Reference(auto_map={"AutoModelForCausalLM": "modeling_kphi3.KPhi3ForCausalLM"}).save(
        tmp_path
    )
    (folder / "modeling_kphi3.py").write_text("raise SystemExit('remote code was run')")
    (folder / "configuration_kphi3.py").write_text("raise SystemExit('remote code was run')")
    assert logits(load_kphi3(folder), IDS).shape == (2, 12, 64)


def test_an_index_that_leads_outside_is_refused(tmp_path):
    folder = Reference().save(tmp_path / "model", shards=2)
    index = folder / "model.safetensors.index.json"
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"index\.json: .*'\.\./x\.safetensors'"):
        load_kphi3(folder)
