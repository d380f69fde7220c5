"""Write a healed model: weights, ledger, recipe, model card, history and picture, in one folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmslim import planning
from llmslim.data import hub_name
from llmslim.healing.inputs import HealInputs, without_paths
from llmslim.healing.report import HealReport, history_text
from llmslim.modeling.base_class import auto_class_name
from llmslim.recipe import Recipe, recipe_yaml
from llmslim.report.card import model_card
from llmslim.report.healed import picture
from llmslim.storage import HISTORY, origin_of, write_checkpoint

_PICTURE = "healing_losses.png"


def write_healed(inputs: HealInputs, report: HealReport, target: Path, *, overwrite: bool) -> None:
    """Write a healed model with its ledger, its recipe and what was done to it.

    Args:
        inputs: whose model is healed by now.
        report: what was done.
        target: folder to write.
        overwrite: replace it where it exists, once the new one is whole.

    Raises:
        CheckpointError: if it cannot be written; `target` is then as it was.
    """
    model, folder, spec = inputs.model, inputs.folder, without_paths(inputs.spec)
    name = inputs.source.name if inputs.source else ""
    recipe = folder.recipe or Recipe(name="heal", description="Trained as it was.")
    as_it_is = Recipe(name=recipe.name)
    ledger = (
        folder.report.report
        if folder.report
        else planning.plan(model, as_it_is, model_name=name).report()
    )
    recipe_text = recipe_yaml(recipe.model_copy(update={"heal": spec}))
    done = replace(report, settings=spec.model_dump(mode="json", exclude_none=True)).to_dict()
    losses = {"before": report.loss_before, "teacher": report.loss_teacher}
    drawn = picture(report.history, **losses, objective=report.objective)
    files = {HISTORY: history_text(report.history).encode()}
    if drawn is not None:
        files[_PICTURE] = drawn
    write_checkpoint(
        model,
        target,
        source=inputs.source,
        tokenizer=inputs.tokenizer,
        report={**(folder.report.data if folder.report else ledger.to_dict()), "healing": done},
        recipe_text=recipe_text,
        model_card=model_card(
            ledger,
            recipe_text=recipe_text,
            origin=origin_of(inputs.source),
            datasets=list(filter(None, map(hub_name, inputs.data_names))),
            slim=model.config.model_type == "llmslim",
            auto_class=auto_class_name(model.config),
            healing=done,
            losses=None if drawn is None else _PICTURE,
        ),
        files=files,
        overwrite=overwrite,
    )
