"""`heal` from a folder to a folder, from Python and from the command line."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers_checkpoint import hashes, same_bytes, stored, tiny_tokenizer
from helpers_healing import Rows, Text
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import llmslim
from llmslim import healing
from llmslim.cli.main import cli
from llmslim.conversion import healed as write_healed
from llmslim.data import healing_text
from llmslim.errors import CheckpointError, DataError, HealingError, RecipeError
from llmslim.healing.inputs import SlimFolder, heal_spec, without_paths
from llmslim.healing.measure import PROMPTS
from llmslim.recipe import Heal, HealSource, Recipe
from llmslim.report.healed import picture, section

RECIPE = {
    "name": "third",
    "depth": {"keep_layers": [0, 1, 3]},
    "replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 8}],
    "heal": {
        "data": "rows.jsonl",
        "template": "report",
        "held_out": 2,
        "context_length": 48,
        "batch_size": 2,
        "micro_batch": 2,
        "learning_rate": 1e-2,
        "epochs": 2,
    },
}
SETTINGS = {"held_out": 2, "context_length": 48, "batch_size": 2, "template": "report"}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep what is tokenised out of the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with `dense`, `slim` in bfloat16, and `rows.jsonl` to heal with."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model().to(torch.bfloat16)
    llmslim.save(model, folder / "dense", tokenizer=tiny_tokenizer())
    llmslim.convert(folder / "dense", RECIPE, folder / "slim")
    rows = [{"instruction": f"{n} {n}", "response": f"{n + 1}" * 3} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def healed(folders):
    report = llmslim.heal(
        folders / "slim",
        folders / "healed",
        data=folders / "rows.jsonl",
        teacher=folders / "dense",
        settings={"teacher_weight": 0.1},
    )
    return folders / "healed", report


def test_the_result_is_a_checkpoint_like_any_other(healed):
    path, report = healed
    assert report.path == path
    assert llmslim.verify(path).ok
    model = AutoModelForCausalLM.from_pretrained(path)
    assert type(model).__name__ == "SlimLlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    assert not (path.parent / "healed.healing").exists()
    assert [p.name for p in path.parent.glob(".*")] == []


def test_the_recipes_section_is_followed_and_what_was_asked_for_counts_more(healed):
    _, report = healed
    assert report.settings["learning_rate"] == 1e-2
    assert report.settings["teacher_weight"] == 0.1
    assert report.objective == "logits"
    assert report.loss_after < report.loss_before
    assert report.loss_teacher is not None


def test_report_recipe_history_and_picture_are_in_the_folder(healed):
    path, report = healed
    data = json.loads((path / "llmslim_report.json").read_text())
    before = json.loads((path.parent / "slim" / "llmslim_report.json").read_text())
    done = data.pop("healing")
    assert data == before
    assert done["loss_after"] == report.loss_after
    assert [answer["prompt"] for answer in done["answers"]] == list(PROMPTS)
    recipe = Recipe.load(path / "recipe.yaml")
    own = Recipe.load(path.parent / "slim" / "recipe.yaml")
    assert recipe.replace == own.replace
    assert recipe.heal.teacher == "dense"  # not where it lies on this machine
    lines = (path / "healing_history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dict(line) for line in report.history]
    png = (path / "healing_losses.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (960, 540)
    for file in path.glob("*.*"):
        if file.suffix in (".json", ".md", ".yaml", ".jsonl"):
            assert str(path.parent) not in file.read_text() or file.name == "llmslim_manifest.json"


def test_the_card_says_what_was_done_with_which_text(healed):
    path, report = healed
    card = (path / "README.md").read_text()
    assert "## Healing" in card
    assert f"| held-out loss after | {report.loss_after:.4f} |" in card
    assert "| licence |" in card
    assert "![Losses, step by step](healing_losses.png)" in card
    assert PROMPTS[0] in card
    assert "has not been healed" not in card


def test_the_report_command_tells_of_the_healing(folders, healed):
    path, report = healed
    said = CliRunner().invoke(cli, ["report", str(path)]).output
    assert f"held-out loss after {report.loss_after:.4f}" in " ".join(said.split())
    assert f"user: {PROMPTS[0]}" in said
    assert "## Healing" in CliRunner().invoke(cli, ["report", str(path), "-f", "md"]).output
    unhealed = CliRunner().invoke(cli, ["report", str(folders / "slim")])
    assert unhealed.exit_code == 0
    assert "held-out" not in unhealed.output


def test_the_padding_is_that_of_the_rows(folders, healed):
    _, report = healed
    spec = Heal(**{**RECIPE["heal"], "data": str(folders / "rows.jsonl")})
    rows = healing_text(spec, tiny_tokenizer(), context_length=48).train
    assert report.padding == pytest.approx(rows.padding)
    assert 0 < report.padding < 1


@pytest.mark.parametrize(("objective", "axes"), [("cross_entropy", 1), ("logits", 2)])
def test_the_picture_shows_where_it_began_and_the_dense_model(monkeypatch, objective, axes):
    figure = pytest.importorskip("matplotlib.figure").Figure
    made = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: made.append(self))
    history = [{"step": 1, "loss": 0.1}, {"step": 1, "held_out_loss": 3.0}]
    picture(history, before=4.0, teacher=2.0, objective=objective)
    lines = [
        {line.get_label(): list(line.get_ydata()) for line in one.get_lines()}
        for one in made[0].axes
    ]
    assert len(lines) == axes  # losses of another kind have an axis of their own
    assert lines[0]["held-out, dense model"] == [2.0, 2.0]
    assert lines[0]["held-out, in nats"] == [4.0, 3.0]
    assert lines[-1]["training"] == [0.1]


def test_a_card_cannot_be_broken_by_what_a_model_says():
    facts = dict.fromkeys(
        ("objective", "train", "source", "licence", "loss_before", "loss_after", "loss_teacher"),
    )
    numbers = dict.fromkeys(
        ("trained_parameters", "steps", "tokens", "tokens_per_second", "padding"), 1
    )
    answer = {"prompt": "?", "before": "a | b\n# c <script> ![x](y)", "after": ""}
    text = section({**facts, **numbers, "gap_closed": None, "notes": [], "answers": [answer]})
    assert "- before: a \\| b # c \\<script\\> !\\[x\\](y)\n- after: (nothing)" in text


def test_untrained_tensors_keep_their_bytes(folders):
    llmslim.heal(
        folders / "slim",
        folders / "blocks",
        data=folders / "rows.jsonl",
        train="blocks",
        tokens=100,
    )
    before, after = stored(folders / "slim"), stored(folders / "blocks")
    assert before.keys() == after.keys()
    changed = {name for name in before if not same_bytes(before[name], after[name])}
    assert changed
    assert all(".mlp." in name for name in changed)


def test_narrowed_mlps_are_known_from_the_report(folders, tmp_path):
    recipe = {"depth": {"keep_layers": [0, 3]}, "width": {"intermediate_size": 40}}
    llmslim.convert(folders / "dense", recipe, tmp_path / "narrow")
    model = llmslim.load(tmp_path / "narrow")
    names = SlimFolder.read(tmp_path / "narrow").narrowed(model)
    assert sorted(names) == sorted(
        f"model.layers.{n}.mlp.{one}_proj" for n in (0, 1) for one in ("gate", "up", "down")
    )
    assert SlimFolder.read(tmp_path / "narrow").kept_layers() == (0, 3)
    report = llmslim.heal(
        tmp_path / "narrow",
        tmp_path / "out",
        data=folders / "rows.jsonl",
        train="blocks",
        tokens=100,
        settings=SETTINGS,
    )
    assert report.trained_parameters == 2 * 3 * 48 * 40


def test_a_result_that_cannot_be_written_is_not_lost(folders, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise CheckpointError("out: no space left for it. Free some space.")

    command = ["heal", folders / "slim", "-o", tmp_path / "out", "--data", folders / "rows.jsonl"]
    command = [*map(str, command), "--tokens", "200"]
    with monkeypatch.context() as patch:
        patch.setattr(write_healed, "write_checkpoint", full)
        failed = CliRunner().invoke(cli, command)
    assert failed.exit_code == 75  # to be gone on with
    assert "no space left for it. Free some space. The trained weights are kept in" in failed.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.healing"]
    begun = (tmp_path / "out.healing" / "history.jsonl").read_text()
    assert CliRunner().invoke(cli, [*command, "--resume"]).exit_code == 0
    assert (tmp_path / "out" / "healing_history.jsonl").read_text() == begun
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_dense_model_can_be_healed_too(folders, tmp_path):
    llmslim.heal(
        folders / "dense",
        tmp_path / "out",
        data=folders / "rows.jsonl",
        tokens=100,
        settings=SETTINGS,
    )
    assert llmslim.verify(tmp_path / "out").ok
    assert json.loads((tmp_path / "out" / "llmslim_report.json").read_text())["healing"]


def test_a_model_in_memory_is_healed_in_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    before = model.lm_head.weight.clone()
    settings = {"train": "all", "warmup": 0}
    report = llmslim.heal(model, data=Text(Rows(4, 1), Rows(2, 2)), settings=settings)
    assert report.path is None
    assert not torch.equal(model.lm_head.weight, before)
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_reported_before_anything_is_trained(folders, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    rows = folders / "rows.jsonl"
    other = tiny_tokenizer()
    other.add_tokens(["zzz"])
    llmslim.save(tiny_model(), tmp_path / "other", tokenizer=other)
    llmslim.save(tiny_model(), tmp_path / "mute")
    cases = [
        (
            (folders / "slim", tmp_path / "there"),
            {"data": rows},
            CheckpointError,
            "there: .*--overwrite",
        ),
        ((tmp_path / "no", tmp_path / "o"), {"data": rows}, CheckpointError, "/no': "),
        (
            (folders / "slim", tmp_path / "o"),
            {"data": tmp_path / "empty.jsonl"},
            DataError,
            r"^empty\.jsonl: ",
        ),
        (
            (folders / "slim", tmp_path / "o"),
            {"data": rows, "teacher": tmp_path / "other"},
            HealingError,
            r"^heal\.teacher: .*other: 1 .*'zzz'",
        ),
        ((tmp_path / "mute", tmp_path / "o"), {"data": rows}, HealingError, "mute: "),
        (
            (folders / "slim", tmp_path / "o"),
            {"data": rows, "train": "some"},
            RecipeError,
            r"heal\.train: 'some'; .*'blocks', 'all' or 'lora'",
        ),
        (
            (folders / "slim", tmp_path / "o"),
            {"data": rows, "settings": {"tempreature": 2}},
            RecipeError,
            r"heal\.tempreature: .* temperature\?",
        ),
        (
            (folders / "dense", tmp_path / "o"),
            {"data": rows, "train": "blocks"},
            HealingError,
            r"^heal\.train: blocks, .*`all` .*`lora`",
        ),
    ]
    for given, options, error, said in cases:
        with pytest.raises(error, match=said):
            llmslim.heal(*given, **options)
        assert not (tmp_path / "o").exists()
        assert not (tmp_path / "o.healing").exists()


def test_a_section_is_taken_from_what_is_given_then_from_the_checkpoint():
    own = Recipe.of({"heal": {"tokens": 5, "seed": 1}})
    assert heal_spec(None, None, {}) == Heal()
    assert heal_spec(None, own, {}).tokens == 5
    assert heal_spec({"heal": {"seed": 2}}, own, {}).tokens is None
    assert heal_spec(Heal(seed=3), own, {"seed": 4}).seed == 4
    epochs = heal_spec(None, own, {"epochs": 2.0})
    assert (epochs.epochs, epochs.tokens) == (2, None)


def test_paths_of_this_machine_are_not_published(tmp_path):
    (tmp_path / "secret" / "dense").mkdir(parents=True)
    given = str(tmp_path / "secret" / "dense")
    spec = Heal(teacher=given, data=("owner/name", HealSource(data=given, weight=2)))
    shown = without_paths(spec)
    assert shown.teacher == "dense"
    assert shown.data == ("owner/name", HealSource(data="dense", weight=2))
    assert without_paths(Heal(teacher="owner/name")).teacher == "owner/name"


def test_the_command_does_the_same(folders, healed, tmp_path):
    arguments = ["heal", folders / "slim", "-o", tmp_path / "out"]
    arguments += ["--data", folders / "rows.jsonl", "--teacher", folders / "dense"]
    arguments += ["--set", "teacher_weight=0.1"]
    result = CliRunner().invoke(cli, list(map(str, arguments)), obj=None)
    assert result.exit_code == 0, result.stderr
    assert "held-out loss after" in result.stdout
    assert f"wrote {tmp_path / 'out'}" in result.stdout
    weights = "model.safetensors"
    assert hashes(tmp_path / "out")[weights] == hashes(healed[0])[weights]


def test_convert_heals_what_it_made(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)  # the recipe names its text by a relative path
    (tmp_path / "third.yaml").write_text(yaml.safe_dump(RECIPE))
    arguments = ["convert", folders / "dense", "--recipe", tmp_path / "third.yaml", "--heal"]
    arguments += ["--out", tmp_path / "slim"]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "held-out loss after" in result.stdout
    assert llmslim.verify(tmp_path / "slim").ok
    assert llmslim.verify(tmp_path / "slim-healed").ok
    before, after = (llmslim.load(tmp_path / name).state_dict() for name in ("slim", "slim-healed"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # As after a kill while it heals: what is converted is not converted again.
    shutil.move(tmp_path / "slim-healed", tmp_path / "first")
    converted = (tmp_path / "slim" / "config.json").stat().st_mtime_ns
    result = CliRunner().invoke(cli, list(map(str, [*arguments, "--resume"])))
    assert result.exit_code == 0, result.output
    assert "is already converted" in result.stderr
    assert (tmp_path / "slim" / "config.json").stat().st_mtime_ns == converted
    again = llmslim.load(tmp_path / "slim-healed").state_dict()
    assert all(torch.equal(again[name], after[name]) for name in after)
    reported = json.loads((tmp_path / "slim-healed" / "llmslim_report.json").read_text())["healing"]
    assert reported["objective"] == "logits"  # from the dense model, which it has at hand
    # What is in the way of the second step is reported before the first is done.
    again = ["--out", tmp_path / "other"]
    (tmp_path / "other-healed").mkdir()
    result = CliRunner().invoke(cli, list(map(str, [*arguments[:-2], *again])))
    assert result.exit_code == 1
    assert "other-healed" in result.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "5", "--epochs", "1"], "two units for the same length"),
        (["--set", "warmup"], "KEY=VALUE is needed"),
        (["--set", "warmup={"], "not YAML"),
        (["--tokens", "few"], "--tokens"),
    ],
)
def test_wrong_usage_is_2(folders, options, said):
    result = CliRunner().invoke(cli, ["heal", str(folders / "slim"), *options])
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_folder_that_is_there_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "load_inputs", None)  # it is not even called
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError):
        llmslim.heal(tmp_path / "slim", tmp_path / "there")


def test_what_is_0_is_asked_for_too(monkeypatch):
    seen = []

    def noted(_model, options, _progress):
        seen.append(options.changes())
        raise HealingError("enough")

    monkeypatch.setattr(healing, "load_inputs", noted)
    with pytest.raises(HealingError):
        llmslim.heal(tiny_model(num_hidden_layers=1), seed=0, settings={"warmup": 0})
    assert seen == [{"warmup": 0, "seed": 0}]
