"""A healing goes on only with the model, text, teacher and settings that it was begun with."""

from __future__ import annotations

import os

import pytest
import torch
from helpers_checkpoint import tiny_tokenizer
from helpers_healing import Rows, Text, healed, losses, slimmed, text
from tiny import tiny_model

import llmslim
from llmslim.errors import HealingError
from llmslim.healing import HealingDir, HealInputs, heal_model
from llmslim.healing.distributed import processes
from llmslim.recipe import Heal
from llmslim.storage import rundir

OPTIONS = {"epochs": 2, "evaluate_every": 2, "objective": "logits", "train": "lora"}


class Killed(BaseException):
    """As Ctrl-C, at a step."""


def kill_at(step):
    def progress(done, total, what):
        if done == step and what.startswith("loss"):
            raise Killed

    return progress


def heal(folder, *, model=None, teacher=None, rows=None, **options):
    options = {**OPTIONS, **options}
    model = slimmed() if model is None else model
    teacher = tiny_model(seed=3) if teacher is None else teacher
    return healed(model, folder, rows or text(), teacher=teacher, **options)


def nudged(model, name=None):
    """Change one number of one weight, by as little as can be."""
    weight = model.get_parameter(name or "model.layers.3.self_attn.o_proj.weight")
    with torch.no_grad():
        weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(torch.inf))
    return model


def other_position(model):
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e3}
    return model


def other_text(where):
    rows = text()
    labels_or_ids = getattr(rows, where).ids
    labels_or_ids[-1, -1] = labels_or_ids[-1, -1] % 95 + 1
    return rows


CHANGES = {
    "a weight": ({"model": lambda: nudged(slimmed())}, "here; the model has changed."),
    "the config": ({"model": lambda: other_position(slimmed())}, "here; the model has changed."),
    "the teacher": (
        {"teacher": lambda: nudged(tiny_model(seed=3))},
        "here; the teacher has changed.",
    ),
    "the text": ({"rows": lambda: other_text("train")}, "here; the text has changed."),
    "held-out text": ({"rows": lambda: other_text("held_out")}, "here; the text has changed."),
    "a setting": ({"learning_rate": lambda: 2e-2}, "learning_rate was 0.01 and is 0.02."),
    "two things": (
        {"model": lambda: nudged(slimmed()), "seed": lambda: 1},
        "here; the model has changed; seed was 42 and is 1.",
    ),
}


@pytest.fixture(scope="module", params=[False, True], ids=["live", "stored"])
def begun(tmp_path_factory, request):
    """Return the folder of a healing that was cut short, and what it needs to go on."""
    folder = tmp_path_factory.mktemp("begun") / "w"
    options = {"store_teacher": request.param}
    with pytest.raises(Killed):
        heal(folder, progress=kill_at(3), **options)
    return folder, options


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_named_and_nothing_is_lost(begun, change):
    folder, options = begun
    made, said = CHANGES[change]
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(HealingError) as caught:
        heal(folder, resume=True, **{**options, **{key: make() for key, make in made.items()}})
    assert said in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("library", ["llmslim", "torch"])
def test_another_version_is_named(begun, monkeypatch, library):
    folder, options = begun
    module = {"llmslim": rundir, "torch": torch}[library]
    now = "__version__"
    was = str(getattr(module, now))
    monkeypatch.setattr(module, now, "99.0")
    with pytest.raises(
        HealingError, match=rf"^{folder}: .*{library} .*{was} .*99.0".replace("+", r"\+")
    ):
        heal(folder, resume=True, **options)


def test_with_the_same_it_goes_on(begun, tmp_path):
    folder, options = begun
    whole = heal(tmp_path / "w", **options)
    report = heal(folder, resume=True, **options)
    assert losses(report) == losses(whole)
    assert report.loss_after == whole.loss_after


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for seed in (1, 2):
        llmslim.save(tiny_model(seed=seed), path / str(seed), tokenizer=tiny_tokenizer())
    return path


def test_it_is_not_the_name_of_a_folder_that_counts(folders, tmp_path):
    def go(**options):
        return llmslim.heal(
            tmp_path / "m",
            tmp_path / "h",
            data=Text(Rows(8, 1), Rows(2, 2)),
            settings={"evaluate_every": 2, "learning_rate": 1e-3},
            **options,
        )

    (tmp_path / "m").symlink_to(folders / "1")
    with pytest.raises(Killed):
        go(progress=kill_at(3))
    (tmp_path / "m").unlink()
    (tmp_path / "m").symlink_to(folders / "2")
    with pytest.raises(HealingError, match=r"h\.healing: .* model .*--overwrite"):
        go(resume=True)
    (tmp_path / "m").unlink()
    os.rename(folders / "1", folders / "moved")  # noqa: PTH104
    (tmp_path / "m").symlink_to(folders / "moved")
    assert go(resume=True).steps
    assert not (tmp_path / "h.healing").exists()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_one_process_at_a_time(begun, options):
    folder, settings = begun
    spec = Heal(**{**OPTIONS, **settings})
    inputs = HealInputs(slimmed(), spec, text(), teacher=tiny_model(seed=3))
    before = sorted(folder.rglob("*"))
    with rundir.locked(folder, "healing", HealingError):
        with (
            pytest.raises(HealingError, match=rf"^{folder}: .* process "),
            HealingDir(folder, **options) as run,
        ):
            heal_model(inputs, run)
        assert sorted(folder.rglob("*")) == before


def test_the_folder_is_held_until_the_result_is_written(folders, tmp_path, monkeypatch):
    from llmslim.conversion import healed as module

    seen = []

    def write(*_args, **_options):
        with (
            pytest.raises(HealingError, match=r"h\.healing: .* process "),
            rundir.locked(tmp_path / "h.healing", "healing", HealingError),
        ):
            pass
        seen.append(True)

    monkeypatch.setattr(module, "write_healed", write)
    model = next(path for path in folders.iterdir() if path.name != "2")
    llmslim.heal(model, tmp_path / "h", data=Text(Rows(4, 1), Rows(2, 2)))
    assert seen == [True]
    assert not (tmp_path / "h.healing").exists()


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint-best", "model.safetensors"])
def test_a_folder_with_anything_else_in_it_is_never_emptied(tmp_path, name):
    with pytest.raises(Killed):
        heal(tmp_path / "w", progress=kill_at(1))
    (tmp_path / "w" / name).write_text("mine")
    run = HealingDir(tmp_path / "w", overwrite=True)
    with (
        pytest.raises(HealingError, match=rf"^{tmp_path / 'w'}: "),
        run.opened({}, processes()),
    ):
        pass
    assert (tmp_path / "w" / name).read_text() == "mine"
