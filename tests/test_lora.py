"""LoRA on slim models by peft: which maps it reaches, and that merging and loading lose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import logits, tiny_model, tokens
from torch import nn

import llmslim
from llmslim.errors import TargetError

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RULES = {
    "*.0.mlp.*": {"structure": "low_rank", "rank": 6},
    "*.1.mlp.*": {"structure": "pivoted_low_rank", "rank": 6},
    "*.2.mlp.*": {"structure": "grouped_pointwise", "groups": 4},
    "*.3.mlp.*": {"structure": "grouped_low_rank", "groups": 4, "rank": 3},
}


def slim_model() -> Any:
    model = tiny_model("llama")
    rules = [{"match": match, **rule} for match, rule in RULES.items()]
    llmslim.slim(model, {"name": "mixed", "init": "project", "replace": rules})
    return model.eval()


def moved(model: Any) -> Any:
    """Give the LoRA matrices that begin at zero other values, so that they do something."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def adapted(model: Any) -> set[str]:
    """The blocks and dense maps of which LoRA changes the function."""
    names = {f"model.layers.{i}.{part}.{leaf}" for i in range(4) for part, leaf in _LEAVES}
    inner = [n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")]
    return {name for name in names if any(f"{each}.".startswith(f"{name}.") for each in inner)}


_LEAVES = [("self_attn" if leaf in SEVEN[:4] else "mlp", leaf) for leaf in SEVEN]
EVERY = {f"model.layers.{i}.{part}.{leaf}" for i in range(4) for part, leaf in _LEAVES}


@pytest.mark.parametrize("target", ["all-linear", SEVEN, r".*\.(self_attn|mlp)\.\w+_proj"])
def test_every_way_to_name_maps_reaches_all_of_them(target: Any, tmp_path: Path) -> None:
    model = slim_model()
    before = logits(model, tokens())
    config = llmslim.lora_config(model, target, r=3, task_type="CAUSAL_LM")
    tuned = moved(get_peft_model(model, config))
    assert adapted(tuned) == EVERY
    wanted = logits(tuned, tokens())
    assert (wanted - before).abs().max() > 1e-3

    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(slim_model(), tmp_path)
    assert torch.equal(logits(again, tokens()), wanted)

    merged = again.merge_and_unload()
    assert type(merged) is type(slim_model())
    assert merged.state_dict().keys() == slim_model().state_dict().keys()
    torch.testing.assert_close(logits(merged, tokens()), wanted, rtol=1e-4, atol=1e-4)


def test_a_step_moves_what_is_added_to_every_map() -> None:
    model = slim_model()
    tuned = moved(get_peft_model(model, llmslim.lora_config(model, SEVEN, r=2)))
    tuned(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


def test_some_names_reach_those_alone() -> None:
    model = slim_model()
    tuned = get_peft_model(model, llmslim.lora_config(model, ["q_proj", "up_proj"], r=2))
    assert adapted(tuned) == {name for name in EVERY if name.endswith(("q_proj", "up_proj"))}


def test_without_targets_peft_takes_every_linear_layer() -> None:
    model = slim_model()
    tuned = get_peft_model(model, LoraConfig(r=2))
    grouped = {name for name in EVERY if ".2.mlp." in name}  # no linear layer inside
    assert adapted(tuned) == EVERY - grouped


def test_a_name_that_nothing_has_is_refused() -> None:
    model = slim_model()
    with pytest.raises(TargetError, match=r"'qproj'.*q_proj"):
        llmslim.lora_config(model, ["q_proj", "qproj"])
    with pytest.raises(TargetError, match="nothing"):
        llmslim.lora_config(model, "nothing")
