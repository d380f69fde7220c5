"""Make a model from its config alone: every weight is drawn at random.

The model that the plan describes is built and drawn by transformers, as `from_config` does after
`torch.manual_seed`: so the embeddings, norms, head and whatever else stays dense are what a
training from scratch would begin with. Its blocks are then drawn by the method of `init`, each from
a seed of its own: the same weights that they would have in the place of trained ones.

Only the layers that stay are ever built, unless the base class can describe them only as a part of
the original. In memory, and from the start each time.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from llmslim import editing, planning
from llmslim.editing.plans import Plan
from llmslim.errors import CheckpointError, RecipeError
from llmslim.init import method_named
from llmslim.modeling.base_class import auto_class_name, auto_class_of
from llmslim.storage import (
    INDEX,
    WEIGHTS,
    check_dtype,
    config_in,
    generation_config,
    load_tokenizer,
    model_without_weights,
    quiet,
    write_checkpoint,
)

from .request import Conversion, Request


def check_drawn(given: str, init: str | None) -> None:
    """Refuse a model without weights, unless the caller's method needs none.

    That has to be the caller's own choice: where weights were forgotten or their download stopped,
    a recipe with random blocks must not make a model of noise.

    Args:
        given: the model, for messages.
        init: the caller's method, if any.

    Raises:
        CheckpointError: if blocks are to be made of weights that are not there.
        RecipeError: if there is no such method.
    """
    try:
        method = None if init is None else method_named(init)
    except RecipeError as error:
        raise RecipeError(f"--init: {error}") from error
    if method is None or method.fits:
        raise CheckpointError(
            f"{given}: holds no weights; a model folder holds {WEIGHTS} or {INDEX}. Download them, "
            "or draw all weights at random: --init random (init='random' in Python)."
        )


def convert_drawn(request: Request) -> Conversion:
    """Draw a model from its config, write it and read it back.

    Args:
        request: whose source has no weights.

    Raises:
        SlimError: if the recipe does not fit the model, or the result cannot be written.
    """
    source, options = request.source, request.options
    trusted = options.trust_remote_code
    check_dtype(options.dtype)
    config = copy.deepcopy(source.config)
    if hasattr(config, "quantization_config"):  # how weights were stored that are not here
        del config.quantization_config
    dtype = options.dtype or getattr(config, "dtype", None) or torch.float32
    empty = model_without_weights(config, dtype, source.given, trusted)
    plan = planning.plan(empty, request.recipe, model_name=source.name, init=options.init)
    request.progress(0, 2, "drawing weights")
    model = _drawn(request, plan, empty)
    note = (
        f"{source.given}: holds no weights; all weights are random, drawn from seed "
        f"{options.seed}. The model knows nothing until it is trained."
    )
    report = plan.report()
    report = request.record(replace(report, problems=(*report.problems, note)))
    tokenizer = load_tokenizer(source, trust_remote_code=trusted)
    request.progress(1, 2, "writing and reading back")
    write_checkpoint(
        model,
        request.target,
        **request.companions(model, tokenizer, report, plan.recipe),
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    request.progress(2, 2, "done")
    return Conversion(request.target, report, auto_class_name(source.config))


def _drawn(request: Request, plan: Plan, empty: PreTrainedModel) -> PreTrainedModel:
    """Return the model that a plan makes of an empty one, in evaluation mode on the CPU.

    Args:
        request: has the seed and the method.
        plan: what to make.
        empty: on the meta device, in the type that is wanted; it gets the config of the result.
    """
    source, options = request.source, request.options
    trusted, dtype = options.trust_remote_code, empty.dtype
    editing.finalise(empty, plan)
    config = config_in(empty.config, dtype)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(options.seed)
        auto = auto_class_of(config, trust_remote_code=trusted)
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=trusted).eval()
    assert options.init is not None
    editing.draw_blocks(model, plan, method_named(options.init), options.seed)
    if model.can_generate() and source.path is not None and not source.is_kphi3:
        with quiet():
            model.generation_config = generation_config(source.path)
    return model
