"""What is used of other libraries beside their documented interfaces is there and does its work."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from tiny import MIXTRAL, tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
    modeling_gguf_pytorch_utils,
)

from llmslim import compat
from llmslim.healing.trainable import keep_activations

# -- Tensors without contents, and operations.


def test_fake_tensors_have_sizes_only():
    with compat.FakeTensorMode(allow_non_fake_inputs=True):
        product = torch.ones(1 << 20, 1 << 20) @ torch.ones(1 << 20, 2)
    assert product.shape == (1 << 20, 2)
    assert product.device.type == "cpu"


def test_operations_are_seen():
    class Seen(compat.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found.append(func)
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        torch.ones(2).to(torch.bfloat16)
        torch.ones(()).item()
    assert {compat.CAST, compat.READ_NUMBER} <= set(seen.found)
    with Seen() as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2, requires_grad=True))
    assert compat.CAST in seen.found
    with Seen() as seen:
        groups = torch.tensor([16, 32], dtype=torch.int32)
        rows, stack = torch.ones(32, 16).bfloat16(), torch.ones(2, 16, 16).bfloat16()
        torch._grouped_mm(rows, stack, offs=groups)
    assert compat.GROUPED_PRODUCT in seen.found


def test_a_class_of_tensors_without_memory_sees_operations():
    class Parts(torch.Tensor):
        __torch_function__ = compat.PLAIN_FUNCTIONS

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return func(*compat.tree_map(lambda x: x.part if isinstance(x, cls) else x, args))

    made = compat.tensor_of_parts(Parts, torch.Size((2, 3)), torch.float32, torch.device("cpu"))
    made.part = torch.ones(2, 3)
    assert made.shape == (2, 3)
    assert type(torch.cat([made, made])) is torch.Tensor
    assert torch.equal(torch.cat([made, made]), torch.ones(4, 3))


def test_operations_that_write_are_known():
    aten = torch.ops.aten
    writing = (aten.add_.Tensor, aten.copy_.default, aten._foreach_mul_.Scalar)
    assert all(map(compat.changes_arguments, writing))
    assert not any(
        map(compat.changes_arguments, (aten.add.Tensor, aten.view.default, aten.mm.default))
    )


def test_what_operations_return_is_known():
    aten = torch.ops.aten
    assert compat.returns_a_new_tensor(aten.mul.Tensor)
    assert not compat.returns_a_new_tensor(aten.mul_.Tensor)  # changes its argument
    assert not compat.returns_a_new_tensor(aten.view.default)  # a view of it
    assert not compat.returns_a_new_tensor(aten.split.Tensor)  # several


@pytest.mark.parametrize("asked", [compat.cpu_has_amx, compat.cpu_has_avx512_bf16])
def test_processors_are_asked(asked):
    assert asked() in (True, False)


# -- Modules and configs.


def test_buffers_that_are_not_stored():
    module = nn.Module()
    module.register_buffer("stored", torch.ones(1))
    module.register_buffer("table", torch.ones(1), persistent=False)
    assert compat.unstored_buffers(module) == {"table"}


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_how_attention_is_computed(how):
    model = tiny_model("llama")
    model.set_attn_implementation(how)
    assert compat.attention_of(model.config) == how
    assert compat.supports_flash_attention(model)
    assert not compat.supports_flash_attention(nn.Linear(1, 1))


def test_models_attend_by_a_registered_function_with_plain_masks():
    masks = []

    def attend(module, query, key, value, attention_mask, **options):
        masks.append(attention_mask)
        plain = compat.plain_attention(module)
        return plain(module, query, key, value, attention_mask, **options)

    model = tiny_model("llama")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = model(ids).logits
        compat.register_attention("of_this_test", attend)
        model.set_attn_implementation("of_this_test")
        torch.testing.assert_close(model(ids).logits, expected)
    above = torch.ones(6, 6).triu(1).bool()
    assert len(masks) == model.config.num_hidden_layers
    for mask in masks:
        assert torch.equal(mask[0, 0] != 0, above)
    assert compat.plain_attention(nn.Linear(1, 1)) is None


def test_marks_and_tables_are_attributes_of_modules(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hasattr(model, compat.TIED_WEIGHTS)
    assert compat.INITIALIZED in vars(next(model.parameters()))
    assert model.config.to_dict().keys() & set(compat.CONFIG_ORIGIN)
    keep_activations(model, keep=False)
    layer = vars(model.model.layers[0])
    assert set(compat.CHECKPOINTING) <= layer.keys()
    model.model.layers[0].register_forward_pre_hook(print)
    model.model.layers[0].register_forward_hook(print, with_kwargs=True)
    assert all(layer[table] for table in compat.HOOKS)


def test_what_a_class_says_of_missing_and_left_over_tensors():
    class Model(LlamaForCausalLM):
        _keys_to_ignore_on_save = ("a",)
        _keys_to_ignore_on_load_missing = ("b",)
        _keys_to_ignore_on_load_unexpected = ("c",)

    model = tiny_model("llama")
    assert compat.not_saved(model) == set()
    assert compat.may_be_missing(model) == []
    assert compat.may_be_left_over(model) == []
    model = Model(model.config)
    assert compat.not_saved(model) == {"a"}
    assert compat.may_be_missing(model) == ["b"]
    assert compat.may_be_left_over(model) == ["c"]


# -- Loading and saving.


@pytest.mark.parametrize("experts", [False, True])
def test_tensors_are_converted_there_and_back(experts, tmp_path):
    """Mixtral's files hold each expert's matrices alone, its parameters all of them stacked."""
    model = MixtralForCausalLM(MixtralConfig(**MIXTRAL)) if experts else tiny_model("llama")
    mapping = compat.conversions(model)
    compat.set_conversions(model, mapping)
    stored = compat.as_stored(model, dict(model.state_dict()))
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert stored.keys() >= {*file.keys()}
    known = model.state_dict()
    names = {compat.name_in_model(key, mapping, model.base_model_prefix, known) for key in stored}
    assert names == known.keys()
    with torch.device("meta"):
        empty = compat.build_from_config(type(model), copy.deepcopy(model.config))
    config = compat.loading_config(empty, torch.device("cpu"))
    dry = compat.load_tensors(
        empty, {k: t.to("meta") for k, t in stored.items()}, compat.on_meta(config)
    )
    info = compat.load_tensors(empty, stored, config)
    for one in (dry, info):
        assert not one.missing_keys
        assert not one.mismatched_keys
        assert not one.conversion_errors
        assert not one.error_msgs
    assert all(torch.equal(tensor, known[name]) for name, tensor in empty.state_dict().items())
    assert any(one.was_used() for one in config.weight_mapping or ()) is experts


def test_what_is_missing_is_named():
    with torch.device("meta"):
        empty = compat.build_from_config(LlamaForCausalLM, tiny_model("llama").config)
    config = compat.loading_config(empty, torch.device("cpu"))
    info = compat.load_tensors(empty, {"model.norm.weight": torch.ones(3)}, config)
    assert "model.embed_tokens.weight" in info.missing_keys
    assert any("model.norm.weight" in str(key) for key in info.mismatched_keys)


def test_of_tied_weights_one_is_written():
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    tied = type(model)(model.config)
    kept = compat.without_ties(tied, tied.state_dict())
    assert tied.state_dict().keys() - kept.keys() == {"lm_head.weight"}


def test_nothing_is_drawn():
    config = tiny_model("llama").config
    state = torch.get_rng_state()
    with compat.nothing_drawn():
        compat.build_from_config(LlamaForCausalLM, config)
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_settings_of_a_config(tmp_path):
    config = tiny_model("llama").config
    config.eos_token_id = 7
    config.save_pretrained(tmp_path)
    assert compat.generation_settings(tmp_path).eos_token_id == 7


def test_the_bar_over_gguf_is_hidden_and_comes_back():
    module = modeling_gguf_pytorch_utils
    bar = module.tqdm
    with compat.no_gguf_bar(), compat.no_gguf_bar():
        assert module.tqdm(range(2)).disable
    assert module.tqdm is bar


# -- Chat templates and the Trainer.


def test_the_frequencies_of_a_scaled_rotation():
    rope = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, rope_parameters=rope)
    frequencies, factor = compat.scaled_rotation(config)
    plain = torch.tensor([1.0, 100**-0.25, 100**-0.5, 100**-0.75])
    torch.testing.assert_close(frequencies, plain / 4)
    assert factor == 1.0


def test_answers_are_found_in_rendered_text():
    template = (
        "{% for turn in messages %}[{% generation %}{{ turn.content }}{% endgeneration %}]"
        "{% endfor %}{{ end }}"
    )
    turns = [{"role": "assistant", "content": "yes"}]
    assert compat.render_with_answers(turns, template, {"end": "!"}) == ("[yes]!", [(1, 4)])


def a_trainer(folder: Path) -> Trainer:
    rows = [{"input_ids": [n, n + 1], "labels": [n, n + 1]} for n in range(4)]
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=1, report_to="none", use_cpu=True
    )
    return Trainer(tiny_model("llama"), arguments, train_dataset=rows)


def test_one_gpu_is_used(tmp_path):
    arguments = TrainingArguments(str(tmp_path))
    arguments._n_gpu = 4
    compat.use_one_gpu(arguments)
    assert arguments.n_gpu == 1


def test_rows_come_in_the_order_of_a_sampler(tmp_path):
    trainer, seen = a_trainer(tmp_path), []
    compat.set_train_sampler(trainer, lambda rows: list(reversed(range(len(rows)))))
    seen = [int(batch["input_ids"][0, 0]) for batch in trainer.get_train_dataloader()]
    assert seen == [3, 2, 1, 0]


def test_a_checkpoint_is_read_back_by_a_function(tmp_path):
    trainer, seen = a_trainer(tmp_path), []
    trainer.train()
    compat.set_checkpoint_loader(trainer, seen.append)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen == [tmp_path / "checkpoint-2"]


def test_a_gradient_is_checked_before_the_step(tmp_path):
    trainer, norms = a_trainer(tmp_path), []
    before = trainer.model.lm_head.weight.detach().clone()

    def check(norm):
        norms.append(float(norm))
        raise KeyError

    compat.after_clipping(trainer, check)
    with pytest.raises(KeyError):
        trainer.train()
    assert norms[0] > 0
    assert torch.equal(trainer.model.lm_head.weight, before)


# -- Export.


def test_only_a_cache_that_keeps_all_tokens_is_dynamic():
    ids = torch.ones(1, 12, dtype=torch.long)
    for name, all_kept in (("llama", True), ("mistral", False)):  # Mistral's has a window
        cache = tiny_model(name)(input_ids=ids, use_cache=True).past_key_values
        assert {type(layer) is compat.DynamicLayer for layer in cache.layers} == {all_kept}


@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of torch's own code
def test_any_module_is_traced_where_the_packages_are_there():
    if importlib.util.find_spec("onnx") is None:
        with pytest.raises(ImportError):
            compat.onnx_exporter()
        return
    rows = torch.export.Dim("rows")
    export = compat.onnx_exporter()
    found = export(nn.Linear(3, 2), {"input": torch.ones(4, 3)}, {"input": {0: rows}})
    assert [value.name for value in found.graph.inputs] == ["input"]
