"""Training end to end as part of a conversion layer by layer from the disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_calibrated import LOW_RANK, model_folder, recipe
from helpers_calibrated import text as text  # a fixture
from helpers_checkpoint import hashes, names, stored
from helpers_resume import Cut

from llmslim import api
from llmslim.conversion.conversion_dir import ConversionDir
from llmslim.fitting import cost


def test_a_training_that_was_cut_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder()
    undisturbed = hashes(api.convert(model, recipe("trained"), "a").path)

    def cut(done: int, total: int, what: str) -> None:
        if "step 6 of 8" in what:
            raise Cut

    with pytest.raises(Cut):
        api.convert(model, recipe("trained"), "out", progress=cut)
    work = ConversionDir(Path("out")).path
    assert (work / "training").is_dir()
    (work / ".trained.partial-0123abcd").mkdir()  # as a kill while it is written leaves it
    steps_seen: list[tuple[int, str]] = []
    api.convert(
        model,
        recipe("trained"),
        "out",
        resume=True,
        progress=lambda done, _, what: steps_seen.append((done, what)),
    )
    assert hashes(Path("out")) == undisturbed
    assert names(Path()) == ["a", "m", "out", "text.txt"]
    steps = [step for step in steps_seen if "end to end" in step[1]]
    assert steps[0][1].endswith("step 6 of 8")
    assert steps == sorted(steps)
    assert not [what for _, what in steps_seen if "layers" in what]


@pytest.mark.parametrize("moment", ["trained", "published"])
def test_a_kill_after_the_training(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the trained checkpoint written, and renamed to its place but nothing cleared up."""
    model = model_folder()
    undisturbed = hashes(api.convert(model, recipe("trained"), "a").path)
    real = ConversionDir.publish

    def publish(self: ConversionDir, *args: Any) -> None:
        if moment == "published":
            real(self, *args)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(ConversionDir, "publish", publish)
        with pytest.raises(Cut):
            api.convert(model, recipe("trained"), "out")
    api.convert(model, recipe("trained"), "out", resume=True)
    assert hashes(Path("out")) == undisturbed
    assert names(Path()) == ["a", "m", "out", "text.txt"]


def test_too_little_memory_leaves_the_training_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder()
    plain = recipe("trained") | {"refine": {"steps": 0}}
    wanted = stored(api.convert(model, plain, "a").path)
    few = SimpleNamespace(available=10_000)
    monkeypatch.setattr(cost.psutil, "virtual_memory", lambda: few)
    done = api.convert(model, recipe("trained"), "out")
    found = stored(done.path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [note for note in done.report.problems if "end to end" in note and "GiB" in note]


def test_a_head_that_is_replaced_is_trained_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder(tie_word_embeddings=False)
    head = {"match": "lm_head", "structure": "low_rank", "rank": 4, "init": "project"}
    asked = recipe("trained") | {"replace": [LOW_RANK, head]}
    done = api.convert(model, asked, "out")
    assert [note for note in done.report.problems if "in memory" in note]
    assert [note for note in done.report.problems if "nats" in note]
