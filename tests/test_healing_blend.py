"""Blocks learn beside the dense projections they took the place of, and then stand alone."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_healing import healed, losses, slimmed, text
from tiny import logits, tiny_model, tokens

from llmslim import slim
from llmslim.errors import HealingError
from llmslim.healing.blend import Blend, blended, share_at
from llmslim.healing.trained import changed_modules
from llmslim.healing.watch import should_stop
from llmslim.recipe import Heal


def blend(model, teacher, *, end=8, which=None, narrowed=(), **options):
    return Blend(model, teacher, which, changed_modules(model, narrowed), end=end, **options)


def traces(model):
    """Return where hooks are left; those on embeddings are gradient checkpointing's."""
    hooked = [name for name, module in model.named_modules() if module._forward_hooks]
    return [name for name in hooked if "embed" not in name]


def test_the_share_falls_by_half_a_cosine():
    shares = [share_at(step, 10) for step in range(12)]
    assert shares[0] == 1
    assert shares[5] == pytest.approx(0.5)
    assert shares[2] == pytest.approx(math.cos(math.pi / 10) ** 2)
    assert shares[10:] == [0, 0]
    assert shares == sorted(shares, reverse=True)


def test_in_the_first_step_the_model_is_its_teacher():
    teacher, model = tiny_model(), slimmed()
    blend(model, teacher).at(0)
    model.train()
    torch.testing.assert_close(logits(model, tokens()), logits(teacher, tokens()), rtol=0, atol=0)


def test_between_a_projection_is_the_weighted_mean_of_both():
    teacher, model = tiny_model(), slimmed()
    ours, theirs = (m.model.layers[1].mlp.up_proj for m in (model, teacher))
    x = torch.randn(2, 3, 48)
    expected = 0.5 * (theirs(x) + ours(x))
    blend(model, teacher).at(4)
    model.train()
    torch.testing.assert_close(ours(x), expected)


def test_afterwards_and_in_evaluation_it_is_the_plain_model_bit_for_bit():
    teacher, model = tiny_model(), slimmed()
    plain = logits(model, tokens())
    names = list(model.state_dict())
    mixed = blend(model, teacher)
    mixed.at(3)
    model.train()
    assert not torch.equal(logits(model, tokens()), plain)
    assert torch.equal(logits(model.eval(), tokens()), plain)
    model.train()
    mixed.at(8)
    assert torch.equal(logits(model, tokens()), plain)
    assert list(model.state_dict()) == names
    assert traces(model) == []
    assert mixed.dense == {}


def test_gradients_reach_blocks_and_what_is_before_them_and_not_the_teacher():
    teacher, model = tiny_model().requires_grad_(requires_grad=False), slimmed()
    blend(model, teacher).at(4)
    model.train()
    model(tokens(), use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("recipe", "units"),
    [
        ({"width": {"intermediate_size": 40}}, {"mlp"}),
        (
            {
                "replace": [
                    {"match": "*.mlp.*", "structure": "low_rank", "rank": 8, "neurons": 0.5},
                    {"match": "*.q_proj", "structure": "low_rank", "rank": 8},
                ]
            },
            {"mlp", "self_attn.q_proj"},
        ),
    ],
    ids=["narrower", "narrower with blocks"],
)
def test_an_mlp_of_other_sizes_is_blended_as_a_whole(recipe, units):
    teacher, model = tiny_model(), tiny_model()
    slim(model, recipe)
    narrowed = [f"model.layers.{i}.mlp.{n}_proj" for i in range(4) for n in ("gate", "up", "down")]
    found = blended(model, teacher, None, changed_modules(model, narrowed))
    assert set(found) == {f"model.layers.{i}.{unit}" for i in range(4) for unit in units}
    blend(model, teacher, narrowed=narrowed).at(0)
    model.train()
    torch.testing.assert_close(logits(model, tokens()), logits(teacher, tokens()))


def test_layers_that_are_left_are_blended_with_those_they_were():
    recipe = {"replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 8}]}
    model, dense, teacher = tiny_model(), tiny_model(), tiny_model()
    slim(dense, {"depth": {"keep_layers": [0, 3]}})
    slim(model, {**recipe, "depth": {"keep_layers": [0, 3]}})
    blend(model, teacher, which=(0, 3)).at(0)
    model.train()
    torch.testing.assert_close(logits(model, tokens()), logits(dense, tokens()))


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_other_architectures_are_blended_too(architecture):
    options = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    teacher, model = (tiny_model(architecture, **options) for _ in range(2))
    slim(model, {"replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 8}]})
    blend(model, teacher).at(0)
    model.train()
    torch.testing.assert_close(logits(model, tokens()), logits(teacher, tokens()))


def test_a_healing_ends_with_the_plain_model(tmp_path):
    model, teacher = slimmed(), tiny_model()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    report = healed(model, tmp_path / "w", teacher=teacher, blend_share=0.5, epochs=2)
    shares = [line["blend"] for line in report.history if "blend" in line]
    assert shares == pytest.approx([share_at(step, 4) for step in range(4)])
    # The first step is the teacher's own; the plain model's loss is another.
    assert losses(report)[0] == pytest.approx(0, abs=1e-6)
    assert losses(report)[4] > 1e-3
    assert traces(model) == []
    assert list(model.state_dict()) == list(slimmed().state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    plain = healed(slimmed(), tmp_path / "p", teacher=tiny_model(), epochs=2)
    assert report.loss_before == plain.loss_before
    assert not any("blend" in line for line in plain.history)


@pytest.mark.parametrize("options", [{}, {"store_teacher": True}, {"gradient_checkpointing": True}])
def test_going_on_inside_the_blending_gives_the_same_losses(tmp_path, options):
    settings = {"blend_share": 0.7, "epochs": 2, "evaluate_every": 2, **options}

    class Killed(BaseException):
        pass

    def kill(done, total, what):
        if done == 5 and what.startswith("loss"):
            raise Killed

    whole = healed(slimmed(), tmp_path / "a", teacher=tiny_model(), **settings)
    interrupted = slimmed()
    with pytest.raises(Killed):
        healed(interrupted, tmp_path / "b", teacher=tiny_model(), progress=kill, **settings)
    assert traces(interrupted) == []
    report = healed(slimmed(), tmp_path / "b", teacher=tiny_model(), resume=True, **settings)
    assert losses(report) == losses(whole)
    assert len([line for line in report.history if "blend" in line]) == 6
    assert report.loss_after == whole.loss_after


def test_patience_begins_when_blocks_stand_alone():
    history = [{"step": step, "held_out_loss": float(step)} for step in range(1, 11)]
    phases = [(None, 10)]
    assert should_stop(history, Heal(patience=3), phases)
    assert should_stop(history, Heal(patience=3, blend_share=0.6), phases)
    assert not should_stop(history, Heal(patience=3, blend_share=0.7), phases)


def test_what_cannot_be_blended_is_told(tmp_path):
    opt = tiny_model("opt")
    slim(opt, {"width": {"intermediate_size": 40}})
    narrowed = [f"model.decoder.layers.{i}.fc{n}" for i in range(4) for n in (1, 2)]
    short = tiny_model(num_hidden_layers=6)
    cases = [
        (slimmed(), {}, r"heal\.blend_share: given, but no teacher"),
        (tiny_model(), {"teacher": tiny_model()}, "no structured blocks and no narrowed MLPs"),
        (slimmed(), {"teacher": short}, r"heal\.blend_share, .* 4 layers and the teacher 6"),
        (
            opt,
            {"teacher": tiny_model("opt"), "narrowed": narrowed},
            r"layers\.0\.fc1: the teacher has no module of its sizes",
        ),
    ]
    for model, options, said in cases:
        with pytest.raises(HealingError, match=said):
            healed(model, tmp_path / "w", text(), blend_share=0.5, **options)
        assert traces(model) == []
        assert not (tmp_path / "w").exists()
