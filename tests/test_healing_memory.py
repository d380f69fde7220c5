"""The memory of a healing, worked out: against what autograd keeps when it is done."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from helpers_checkpoint import tiny_tokenizer
from helpers_healing import slimmed
from tiny import tiny_model
from torch import nn

import llmslim
from llmslim.cli.main import cli
from llmslim.healing import plan
from llmslim.healing.memory import healing_memory
from llmslim.recipe import Heal

ROWS, LENGTH, HIDDEN, LAYERS, VOCABULARY = 3, 16, 48, 4, 96


def memory(model, teacher=None, accumulate=1, bf16=False, device="cpu", **options):
    return healing_memory(
        model,
        Heal(micro_batch=ROWS, **options),
        length=LENGTH,
        accumulate=accumulate,
        bf16=bf16,
        device=torch.device(device),
        teacher=teacher,
    )


def kept_by_autograd(model, bf16=False):
    """Return the bytes that a real forward pass keeps for its backward pass."""
    kept, weights = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    positions = (torch.arange(LENGTH) % (LENGTH // 2)).repeat(ROWS, 1)  # two samples in a row
    options = {} if "bloom" in model.config.model_type else {"position_ids": positions}
    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
    ):
        model.train()(input_ids=torch.ones(ROWS, LENGTH, dtype=torch.long), **options)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "bloom"])
def test_activations_are_those_that_autograd_keeps(architecture):
    model = slimmed(architecture)
    model.config.use_cache = False
    assert memory(model).kept == kept_by_autograd(model)


def test_autocasts_copies_are_counted_apart():
    model = slimmed()
    model.config.use_cache = False
    found = memory(model, bf16=True)
    assert found.kept + found.copies == kept_by_autograd(model, bf16=True)
    matrices = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert found.copies >= 2 * sum(module.weight.numel() for module in matrices)


def test_weights_gradients_and_moments_are_counted():
    model = slimmed(dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".mlp." in name)
    every = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for n, weight in model.named_parameters() if ".mlp." in n)
    found = memory(model)
    assert found.weights == 4 * every
    assert (found.gradients, found.moments, found.held) == (4 * trained, 8 * trained, 0)
    assert memory(model, accumulate=2).held == 4 * trained
    assert found.logits == 2 * ROWS * LENGTH * VOCABULARY * 4
    assert found.peak > found.weights + found.moments + found.kept
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_checkpointing_keeps_what_layers_read():
    model = slimmed()
    plain, less = memory(model), memory(model, gradient_checkpointing=True)
    stream = ROWS * LENGTH * HIDDEN * 4
    assert plain.kept - less.kept == pytest.approx(LAYERS * (less.again - stream), rel=0.05)
    assert 0 < less.again < plain.kept / 3
    assert less.peak < plain.peak


def test_the_largest_layer_is_the_one_that_is_computed_again():
    """Layers of two widths: as if all were of the larger one."""
    plain, wide, mixed = (tiny_model(num_hidden_layers=2) for _ in range(3))
    wider = tiny_model(num_hidden_layers=2, intermediate_size=192)
    wide.model.layers = wider.model.layers
    mixed.model.layers[0] = wider.model.layers[0]
    again = [memory(m, gradient_checkpointing=True).again for m in (plain, mixed, wide)]
    assert again[0] < again[1] == again[2]


def test_a_teacher_counts_unless_it_is_asked_once():
    model, teacher = slimmed(), tiny_model().to(torch.bfloat16)
    numbers = sum(weight.numel() for weight in teacher.parameters())
    assert memory(model, teacher, bf16=True).teacher == 2 * numbers
    assert memory(model, teacher).teacher == 4 * numbers
    assert memory(model, teacher, store_teacher=True).teacher == 0
    assert memory(model, teacher).logits == memory(model).logits * 3 / 2


def test_a_model_on_no_device_has_the_same_memory():
    assert memory(slimmed().to("meta")) == memory(slimmed())


def test_the_shipped_recipe_for_phi3_fits_24_gb():
    config = llmslim.Recipe.load("kphi3").heal
    from transformers import AutoModelForCausalLM, Phi3Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            Phi3Config(hidden_size=3072, intermediate_size=8192, vocab_size=32064, pad_token_id=0)
        )
    llmslim.slim(model, "kphi3", init="random")
    assert sum(weight.numel() for weight in model.parameters()) == 851_512_320
    gpu = torch.device("cuda")
    found = healing_memory(model, config, length=4096, accumulate=1, bf16=True, device=gpu)
    assert found.peak < 21.5 * 2**30  # an L4 has 22.5; one is CUDA's and what lies between


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = {"replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 8}]}
    llmslim.save(tiny_model(), tmp_path / "dense", tokenizer=tiny_tokenizer())
    llmslim.convert(tmp_path / "dense", {"name": "x", **recipe}, tmp_path / "slim")
    rows = [{"instruction": f"{n}", "response": f"{n + 1}"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def dry_run(folder, *options):
    command = ["heal", folder / "slim", "-o", folder / "out", "--data", folder / "rows.jsonl"]
    command += ["--context-length", "48", "--set", "held_out=2", "--dry-run", *options]
    return CliRunner().invoke(cli, list(map(str, command)))


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(folder):
    before = sorted(folder.iterdir())
    result = dry_run(folder, "--tokens", "400", "--train", "blocks")
    assert result.exit_code == 0, result.output
    model = llmslim.load(folder / "slim")
    blocks = sum(weight.numel() for n, weight in model.named_parameters() if ".mlp." in n)
    every = sum(weight.numel() for weight in model.parameters())
    assert f"blocks, {blocks:,} of {every:,} parameters" in result.stdout
    assert "memory: peak, without the process itself" in result.stdout
    assert "nothing was trained or written" in result.stdout
    steps = int(next(x for x in result.stdout.splitlines() if x.startswith("steps")).split()[1])
    assert sorted(set(folder.iterdir()) - {folder / "cache"}) == before
    report = llmslim.heal(
        folder / "slim",
        folder / "out",
        data=folder / "rows.jsonl",
        tokens=400,
        settings={"context_length": 48, "held_out": 2, "template": "chat"},
    )
    assert report.steps <= steps == max(line["step"] for line in report.history)


def test_a_dry_run_finds_what_a_healing_would_stop_at(folder):
    result = dry_run(folder, "--objective", "logits")
    assert result.exit_code == 1
    assert "without a teacher" in result.stderr
    (folder / "out.healing").mkdir()
    (folder / "out.healing" / "run.json").write_text("{}")
    assert "unfinished healing is here" in dry_run(folder).stderr
    (folder / "out").mkdir()
    assert "exists already" in dry_run(folder).stderr


def test_a_model_whose_memory_is_not_known_says_so(folder, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(plan, "healing_memory", fails)
    result = dry_run(folder)
    assert result.exit_code == 0
    assert "The memory that it takes could not be computed (RuntimeError: data-dep" in result.stdout
