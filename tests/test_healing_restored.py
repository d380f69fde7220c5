"""What healing changes for a while it puts back, whatever happens."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from helpers_healing import healed, independent_loss, slimmed, text
from tiny import tiny_config, tiny_model

import llmslim
from llmslim.data.packing import collate
from llmslim.healing import measure
from llmslim.healing.measure import held_out_loss
from llmslim.healing.restoring import as_it_was, evaluating
from llmslim.healing.trainable import keep_activations, make_trainable
from llmslim.recipe import Heal


def teacher_in(dtype):
    """Return a teacher of which no two things are alike."""
    teacher = tiny_model(seed=3).to(dtype)
    teacher.train()
    teacher.model.layers[1].eval()
    teacher.model.embed_tokens.weight.requires_grad_(requires_grad=False)
    teacher.lm_head.weight.grad = torch.ones_like(teacher.lm_head.weight)
    teacher.config.use_cache = False
    return teacher


def about(model):
    """Return all that can be seen of a model."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {
            name: (id(one), one.dtype, one.device, one.requires_grad, one.grad is None)
            for name, one in tensors.items()
        },
        "modes": {name: module.training for name, module in model.named_modules()},
        "config": copy.deepcopy(vars(model.config)),
        "own": sorted(vars(model)),
        "hooks": {name for name, one in model.named_modules() if one._forward_hooks},
        "checkpointing": {
            name: vars(module).get("gradient_checkpointing")
            for name, module in model.named_modules()
        },
    }


class Interrupted(BaseException):
    """As Ctrl-C."""


def stop(error):
    def progress(done, total, what):
        if done == 2 and error is not None:
            raise error

    return progress


@pytest.mark.parametrize("options", [{}, {"store_teacher": True}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "error"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, RuntimeError),
        (torch.bfloat16, Interrupted),
        (torch.float32, None),
    ],
)
def test_a_teacher_comes_back_as_it_was(error, options, dtype):
    teacher = teacher_in(dtype)
    before = about(teacher)
    weights = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    settings = {"precision": "fp32", "batch_size": 4, "attn_implementation": "eager", **options}

    def heal():
        llmslim.heal(
            slimmed(), data=text(), teacher=teacher, settings=settings, progress=stop(error)
        )

    if error is None:
        heal()
    else:
        with pytest.raises(error):
            heal()
    assert about(teacher) == before
    assert all(torch.equal(one, weights[name]) for name, one in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("train", "checkpointing", "error"),
    [
        ("all", False, None),
        ("lora", True, None),
        ("lora", False, RuntimeError),
        ("all", True, Interrupted),
    ],
)
def test_a_model_keeps_all_but_its_weights(error, train, checkpointing):
    model = slimmed(dtype=torch.bfloat16)
    model.train()
    model.model.layers[2].eval()
    model.model.norm.weight.requires_grad_(requires_grad=False)
    if not checkpointing:
        keep_activations(model, keep=False)  # which the user may well have done
    before = about(model)
    settings = {"train": train, "gradient_checkpointing": checkpointing, "batch_size": 4}
    settings |= {"attn_implementation": "eager"}

    def heal():
        llmslim.heal(model, data=text(), settings=settings, progress=stop(error))

    if error is None:
        heal()
    else:
        with pytest.raises(error):
            heal()
    assert about(model) == before


def image_text_model():
    """Return a model whose text options are in a config inside its own, as image-text models'."""
    text_config = tf.Gemma3TextConfig(
        **{k: v for k, v in tiny_config("gemma").to_dict().items() if "size" in k or "num" in k},
        head_dim=12,
        sliding_window=8,
    )
    vision = tf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = tf.Gemma3Config(text_config=text_config, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("train", ["all", "lora"])
def test_options_may_be_in_the_text_config_alone(train):
    model = image_text_model()
    assert not hasattr(model.config, "use_cache")
    before = copy.deepcopy(model.config.to_dict())
    report = llmslim.heal(
        model, data=text(), settings={"train": train, "learning_rate": 1e-2, "batch_size": 4}
    )
    assert not hasattr(model.config, "use_cache")
    assert model.config.to_dict() == before
    assert report.loss_after < report.loss_before
    assert report.loss_after == pytest.approx(independent_loss(model, text().held_out), rel=1e-4)


def test_a_while_in_evaluation_mode_is_that_of_each_module(monkeypatch):
    model = tiny_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    seen = []

    def fails():
        with evaluating(model):
            seen.extend(module.training for module in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not any(seen)
    assert [module.training for module in model.modules()] == modes
    monkeypatch.setattr(measure, "_answer", lambda *_: "")
    measure.answers(model, object())
    assert [module.training for module in model.modules()] == modes


def test_what_is_no_model_is_passed_over():
    with as_it_was("a folder"), as_it_was(None, weights=True):
        pass


def test_float64_is_trained_and_stored_as_it_is(tmp_path):
    model = slimmed(dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = healed(model, tmp_path / "w", train="blocks")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    same = {n for n, t in model.state_dict().items() if torch.equal(t, before[n])}
    assert same == {n for n in before if ".mlp." not in n}
    assert report.loss_after == pytest.approx(independent_loss(model, text().held_out), rel=1e-6)


def test_the_held_out_loss_is_measured_without_dropout():
    model, rows = tiny_model(num_hidden_layers=1, attention_dropout=0.5), text(0, 4).held_out
    one = SimpleNamespace(num_processes=1, process_index=0, device="cpu", reduce=lambda x, _: x)
    for training in (True, False):
        model.train(training)
        found = held_out_loss(model, rows, collate, micro_batch=3, accelerator=one)
        assert model.training is training
        assert found == pytest.approx(independent_loss(model.eval(), rows), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_lora_is_scaled_by_two_whatever_its_rank(rank):
    model, dense = (tiny_model(num_hidden_layers=1) for _ in range(2))
    trained = make_trainable(model, Heal(train="lora", lora_rank=rank))
    beside = model.model.layers[0].mlp.up_proj
    down, up = (part["default"].weight for part in (beside.lora_A, beside.lora_B))
    with torch.no_grad():
        up.copy_(torch.randn_like(up))
        added = 2 * up @ down
    trained.finalise()
    weight = dense.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight, weight + added)
