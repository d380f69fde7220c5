"""What is known again when work goes on: digests, versions, and who works in a folder."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model

from llmslim import __version__, api
from llmslim.errors import CheckpointError
from llmslim.healing.rows import text_digest
from llmslim.storage import model_digest, rundir, versions
from llmslim.storage.rundir import locked


def test_any_weight_and_any_field_of_the_config_makes_another_model() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    found = {model_digest(model)}

    def other(change: Any) -> str:
        copied = copy.deepcopy(model)
        with torch.no_grad():
            change(copied)
        return model_digest(copied)

    found.add(other(lambda m: m.model.norm.weight[3].add_(1e-6)))
    found.add(other(lambda m: m.lm_head.weight.copy_(m.lm_head.weight.flip(0))))
    found.add(other(lambda m: m.bfloat16()))
    found.add(other(lambda m: setattr(m.config, "rms_norm_eps", 1e-4)))
    assert len(found) == 5
    # Where a model is from, and who wrote it, makes no other model of it.
    assert other(lambda m: setattr(m.config, "_name_or_path", "elsewhere")) in found
    assert other(lambda m: setattr(m.config, "transformers_version", "4.0")) in found


def test_any_token_trained_on_or_held_out_makes_another_text() -> None:
    def digest(train: int, held_out: int) -> str:
        rows = ([{"input_ids": torch.tensor([1, last])}] for last in (train, held_out))
        return text_digest(SimpleNamespace(**dict(zip(("train", "held_out"), rows, strict=True))))

    assert len({digest(2, 3), digest(2, 4), digest(5, 3)}) == 3
    assert digest(2, 3) == digest(2, 3)


def test_versions_are_llmslims_and_those_of_what_it_computes_with() -> None:
    assert versions(torch) == {
        "version of llmslim": __version__,
        "version of torch": torch.__version__,
    }


def test_a_conversion_by_another_version_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "dense"
    api.save(tiny_model("llama", num_hidden_layers=1), model)
    rule = {"match": "*.mlp.*", "structure": "low_rank", "rank": 4}

    def convert(**options: Any) -> Any:
        return api.convert(model, {"replace": [rule]}, tmp_path / "slim", **options)

    def interrupt(done: int, _total: int, _what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(progress=interrupt)
    monkeypatch.setattr(rundir, "__version__", "0.0")
    with pytest.raises(CheckpointError, match=rf"llmslim .*{re.escape(__version__)} .* 0\.0\."):
        convert(resume=True)
    monkeypatch.undo()
    assert convert(resume=True).path == tmp_path / "slim"


def test_one_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path, "converting", CheckpointError):
        with pytest.raises(CheckpointError), locked(tmp_path, "healing", CheckpointError):
            pass
        with pytest.raises(CheckpointError), locked(tmp_path, "healing", CheckpointError):
            pass  # being refused has not unlocked it
    with locked(tmp_path, "converting", CheckpointError):
        pass
