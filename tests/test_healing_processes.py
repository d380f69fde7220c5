"""Healing in several processes: what two of them do is what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from helpers_checkpoint import stored, tiny_tokenizer
from helpers_healing import Rows, healed, losses, slimmed
from tiny import tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmslim
from llmslim.data import healing_text
from llmslim.errors import HealingError
from llmslim.healing import trainer
from llmslim.healing.distributed import check_sharding, gather_into, shard_copy
from llmslim.healing.rows import PaddedRows, SeededSampler
from llmslim.recipe import Heal

RECIPE = {
    "name": "third",
    "replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 8}],
    "heal": {
        "train": "all",
        "template": "report",
        "held_out": 3,
        "context_length": 48,
        "batch_size": 2,
        "learning_rate": 1e-2,
    },
}
SHARDED = ["--use_fsdp", "--fsdp_version", "2"]
WHOLE = ["--multi_gpu"]  # which is what accelerate calls any two processes

# The command, which also writes how much of the weights its process holds while it trains.
PROGRAM = """
import os, pathlib, runpy
from torch.distributed.tensor import DTensor
from llmslim.healing import distributed, run

gather_into = run.gather_into
def spy(model, copied):
    weights = list(distributed.named_full_parameters(copied).values())
    assert all(isinstance(weight, DTensor) for weight in weights)
    held = sum(weight.to_local().numel() for weight in weights)
    share = held / sum(weight.numel() for weight in weights)
    pathlib.Path(__file__).with_suffix(".share" + os.environ["RANK"]).write_text(str(share))
    gather_into(model, copied)
run.gather_into = spy
{more}
runpy.run_module("llmslim", run_name="__main__")
"""


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with `dense` and `slim` in float32, `slim16`, and an odd number of rows."""
    folder = tmp_path_factory.mktemp("models")
    llmslim.save(tiny_model(), folder / "dense", tokenizer=tiny_tokenizer())
    llmslim.convert(folder / "dense", RECIPE, folder / "slim")
    llmslim.convert(folder / "dense", RECIPE, folder / "slim16", dtype="bfloat16")
    rows = [{"instruction": f"{n} {n}", "response": f"{n + 1}" * 3} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def alone(folders, out, model="slim", **settings):
    teacher = folders / "dense"
    llmslim.heal(
        folders / model, out, data=folders / "rows.jsonl", teacher=teacher, settings=settings
    )


def together(folders, out, how, *options, more="", works=True, model="slim", **settings):
    """Heal with two processes, in float32; return what they print."""
    settings = {"precision": "fp32", **settings}
    program = out.with_suffix(".py")
    program.write_text(PROGRAM.format(more=more))
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", program, "heal", folders / model, "-o", out, *options]
    command += ["--data", folders / "rows.jsonl", "--teacher", folders / "dense"]
    command += [f"--set={key}={value}" for key, value in settings.items()]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode == 0) is works, done.stderr
    return done.stdout


def history(folder):
    lines = (folder / "healing_history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same(one, two, note):
    """Compare two healings step by step; the second has a note on its processes."""
    mine, theirs = history(one), history(two)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"loss", "held_out_loss", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), (key, a, b)
    report = json.loads((two / "llmslim_report.json").read_text())["healing"]
    assert [text for text in report["notes"] if "processes" in text] == [note]
    assert llmslim.verify(two).ok
    before, after = stored(one), stored(two)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.allclose(before[name], after[name], atol=1e-4), name
    return report


SPREAD = "Trained by 2 processes, which shard the model (FSDP)."


def test_a_model_spread_over_two_processes_ends_as_in_one(folders, tmp_path):
    alone(folders, tmp_path / "one", micro_batch=1)
    said = together(folders, tmp_path / "two", SHARDED, micro_batch=1)
    shares = [float(path.read_text()) for path in tmp_path.glob("two.share*")]
    assert len(shares) == 2
    assert all(0.4 < share < 0.6 for share in shares)
    assert said.count("\nwrote ") == 1
    report = assert_same(tmp_path / "one", tmp_path / "two", SPREAD)
    # What was written has the loss that healing ended with, and is loaded as anybody would.
    assert loss_of(tmp_path / "two", folders) == pytest.approx(report["loss_after"], abs=1e-4)


def loss_of(path, folders):
    """Return the held-out loss of a checkpoint, worked out in plain torch."""
    model = AutoModelForCausalLM.from_pretrained(path).float()
    tokenizer = AutoTokenizer.from_pretrained(path)
    spec = Heal(**RECIPE["heal"], data=str(folders / "rows.jsonl"))
    rows = healing_text(spec, tokenizer, context_length=48).held_out
    total, count = 0.0, 0
    for index in range(len(rows)):
        row = rows[index]
        labels = row["labels"][1:]
        with torch.no_grad():
            given = {key: row[key][None] for key in ("input_ids", "position_ids")}
            logits = model(**given, use_cache=False).logits[0, :-1]
        total += float(cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": "true"},
        {"store_teacher": "true", "train": "blocks", "batch_size": 4},
    ],
    ids=["live", "stored"],
)
@pytest.mark.parametrize("how", [SHARDED, WHOLE], ids=["spread", "whole"])
def test_two_processes_learn_what_one_does(folders, tmp_path, how, settings):
    settings = {"micro_batch": 1, **settings}
    read = {key: value == "true" or value for key, value in settings.items()}
    alone(folders, tmp_path / "one", **read)
    together(folders, tmp_path / "two", how, **settings)
    whole = "Trained by 2 processes, with a whole model in each."
    assert_same(tmp_path / "one", tmp_path / "two", SPREAD if how is SHARDED else whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "train"),
    [(SHARDED, "all"), (SHARDED, "blocks"), (WHOLE, "all"), (WHOLE, "lora")],
    ids=["spread all", "spread blocks", "whole all", "whole lora"],
)
def test_two_processes_tell_the_loss_of_what_they_store(folders, tmp_path, how, train):
    """In bfloat16, with passes that end in the middle of a step."""
    settings = {"train": train, "micro_batch": 1, "batch_size": 4, "epochs": 2}
    settings |= {"precision": "fp32"}
    alone(folders, tmp_path / "one", model="slim16", **settings)
    together(folders, tmp_path / "two", how, model="slim16", **settings)
    mine, theirs = history(tmp_path / "one"), history(tmp_path / "two")
    for a, b in zip(mine, theirs, strict=True):
        for key in a.keys() & {"loss", "grad_norm", "learning_rate", "tokens"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3), (key, a, b)
    report = json.loads((tmp_path / "two" / "llmslim_report.json").read_text())["healing"]
    assert {tensor.dtype for tensor in stored(tmp_path / "two").values()} == {torch.bfloat16}
    assert report["loss_after"] == pytest.approx(loss_of(tmp_path / "two", folders), abs=1e-4)
    assert report["loss_unrounded"] is not None


@pytest.mark.slow
def test_a_spread_model_goes_on_after_sigkill(folders, tmp_path):
    kill = """
import os, signal
from llmslim.healing import trainer
end = trainer.HistoryCallback.on_step_end
def killed(self, args, state, control, **options):
    end(self, args, state, control, **options)
    if state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.HistoryCallback.on_step_end = killed
"""
    alone(folders, tmp_path / "one", micro_batch=1, evaluate_every=3)
    options = {"micro_batch": 1, "evaluate_every": 3}
    together(folders, tmp_path / "two", SHARDED, more=kill, works=False, **options)
    assert not (tmp_path / "two").exists()
    together(folders, tmp_path / "two", SHARDED, "--resume", **options)
    assert_same(tmp_path / "one", tmp_path / "two", SPREAD)


def accelerator(**options):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **options})
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None))


@pytest.mark.parametrize(
    ("launched", "spec", "said"),
    [
        (
            SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=object())),
            Heal(),
            r"DeepSpeed; .* `--use_fsdp --fsdp_version 2`",
        ),
        (accelerator(fsdp_version=1), Heal(), "version 1; .*`--fsdp_version 2`"),
        (accelerator(cpu_offload=True), Heal(), "fsdp_offload_params"),
        (
            accelerator(activation_checkpointing=True),
            Heal(),
            "fsdp_activation_checkpointing.* gradient_checkpointing: true ",
        ),
        (accelerator(), Heal(train="lora"), r"heal\.train: lora"),
    ],
    ids=["deepspeed", "version 1", "offload", "checkpointing", "lora"],
)
def test_other_ways_to_spread_a_model_are_refused(launched, spec, said):
    with pytest.raises(HealingError, match=said):
        check_sharding(launched, spec)


def test_what_is_not_spread_is_not_refused():
    check_sharding(SimpleNamespace(state=SimpleNamespace()), Heal(train="lora"))
    check_sharding(accelerator(), Heal(train="all"))


def test_a_model_whose_weights_a_copy_took_gets_them_back():
    model = tiny_model("gpt2")  # its head is its embedding
    ids = torch.arange(1, 9)[None]
    before = model(ids).logits
    copied = shard_copy(model)
    assert {weight.numel() for weight in model.parameters()} == {0}
    assert torch.equal(copied(ids).logits, before)
    with torch.no_grad():
        copied.transformer.ln_f.weight.mul_(2)
    after = copied(ids).logits
    gather_into(model, copied)
    assert torch.equal(model(ids).logits, after)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_rows_fill_up_with_some_that_teach_nothing():
    rows = PaddedRows(Rows(5, 1), 4)
    assert len(rows) == 8
    order = SeededSampler(rows, seed=3)
    assert sorted(order) == list(range(8))
    first = list(order)
    assert first == [*SeededSampler(PaddedRows(Rows(5, 1)), seed=3), 5, 6, 7]
    order.set_epoch(1)
    assert list(order) != first
    assert all((rows[index]["labels"] == -100).all() for index in (5, 6, 7))
    assert (rows[4]["labels"] != -100).any()


def test_rows_that_teach_nothing_teach_nothing(tmp_path, monkeypatch):
    """As in the last step of two processes that share an odd number of rows."""
    teacher = tiny_model(seed=3)
    sizes = {"epochs": 2, "batch_size": 6, "micro_batch": 3}
    plain = healed(slimmed(), tmp_path / "a", teacher=teacher, **sizes)
    monkeypatch.setattr(trainer, "PaddedRows", lambda rows, _: PaddedRows(rows, 6))
    filled = healed(slimmed(), tmp_path / "b", teacher=teacher, **sizes)
    assert losses(plain) == pytest.approx(losses(filled), rel=1e-5)
