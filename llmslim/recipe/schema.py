"""What a recipe may say. Every key, its type and its meaning; nothing else is accepted.

A recipe changes a model in the order of its sections: which layers stay (`depth`), how wide the
MLP is (`width`), which projections become structured (`replace`). `init` names how the blocks get
their weights from the dense ones; `calibration` and `heal` say what text they are fitted and
trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, SerializeAsAny, model_validator

from llmslim.errors import RecipeError

from .rule import Count, Name, Ratio, Rule, Section


class Depth(Section):
    """Which decoder layers stay."""

    keep_layers: (
        Count | Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
    )
    """How many layers stay, spread evenly from the first to the last; or a list of their indices, from 0."""


class Width(Section):
    """How wide the MLPs are."""

    intermediate_size: Count
    """Neurons of every MLP. More than before: neurons are duplicated, the function stays the same. Fewer: the least important go."""


class EndToEnd(Section):
    """Training of all that surgery changed together, on the dense model's predictions."""

    steps: Count = 128
    """Steps of the optimiser."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak step, in units of each parameter's root mean square: one value serves every model."""
    tokens: Count = 1024
    """Tokens of one step, in whole windows."""


class Refine(Section):
    """Gradient fits after the closed forms: each layer's output to the dense layer's, then the model's."""

    steps: Annotated[int, Field(ge=0)] = 64
    """Steps of the optimiser for each decoder layer; 0 leaves the layers as the closed forms made them."""
    lr: Annotated[float, Field(gt=0)] = 3e-2
    """Peak step, in units of each parameter's root mean square: one value serves every model."""
    end_to_end: EndToEnd | None = None
    """After the layers, all of the model together; left out, there is no such training."""


class Calibration(Section):
    """Text whose activations the blocks are fitted to."""

    data: str | Annotated[tuple[str, ...], Field(min_length=1)] = "self"
    """`self` (sampled from the dense model), a data set on the hub, a .txt, .jsonl, .json, .csv or .parquet file, or a list of them."""
    tokens: Count = 65_536
    """Tokens to read; of several texts, as many of each."""
    sequence_length: Count = 512
    """Tokens of one window; left out, the most that the model reads where that is less."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of sampling and shuffling."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the names of the data as a tuple, also where there is one."""
        return (self.data,) if isinstance(self.data, str) else self.data


class HealSource(Section):
    """One data set of several to train on."""

    data: str
    """As `data` of `heal`: a name or a file."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is seen in one pass: 2 is twice, 0.5 a random half."""
    fields: Mapping[str, str] | None = None
    """Columns: `{prompt: …, answer: …}`, perhaps with `system`, `context`, `tools`, `reasoning`; or
    `{messages: …}`, perhaps with `system` and `tools`; or `{text: …}`."""
    filter: Literal["refusals", "none"] | None = None
    """Whether rows that refuse are dropped; by default `refusals` for `lamini`, none for all else."""


class Heal(Section):
    """Fine-tuning after surgery."""

    data: str | HealSource | tuple[str | HealSource, ...] = "lamini"
    """`lamini`, `self`, a data set on the hub, a .jsonl, .json, .parquet, .csv or .txt file, or a list of them."""
    template: Literal["chat", "report"] = "chat"
    """How a row becomes text: the tokenizer's chat template, or the kphi-3 report's."""
    loss_on: Literal["all", "answers"] = "all"
    """Which tokens are learned."""
    held_out: Annotated[int, Field(ge=0)] | None = None
    """Rows kept for measuring; by default 5000 of `lamini`, of other data 5 % and at most 1000."""
    train: Literal["blocks", "all", "lora"] = "lora"
    """What is trained: what surgery changed, everything, or that and LoRA on what stayed dense."""
    lora_rank: Count = 16
    """Rank of the LoRA matrices; their scale is 2."""
    teacher: str | None = None
    """The dense model, a folder or a name on the hub: what `logits` learns from."""
    objective: Name | None = None
    """cross_entropy or logits; by default `logits` where there is a teacher."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """`logits`: softens both distributions."""
    teacher_weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """`logits`: weight of the teacher; the rest is cross-entropy on the text."""
    top_k: Count | None = None
    """`logits`: compare the teacher's likeliest tokens, and all others as one."""
    store_teacher: bool = False
    """`logits`: run the teacher once, before training, and store its `top_k` (64 where not given) predictions."""
    tokens: Count | None = None
    """Tokens to train on; takes the place of `epochs`."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data."""
    context_length: Count = 4096
    """Tokens of one packed row; at most what the model reads."""
    batch_size: Count = 1
    """Rows of one step, over all processes."""
    micro_batch: Count = 1
    """Rows in memory at once, in each process."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    block_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of what surgery changed; as `learning_rate` where not given."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's; norms and biases have none."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Longer gradients are cut to this length."""
    gradient_checkpointing: bool = False
    """Compute activations twice rather than keep them: slower, much less memory."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the arithmetic; weights and optimiser are float32. `auto` is bf16 where the machine is fast at it."""
    store_dtype: Literal["float32"] | None = None
    """float32 stores all weights as they were trained; by default they are rounded to the type they had."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto` is FlashAttention-2 where GPU and package allow it, SDPA otherwise."""
    evaluate_every: Count | None = None
    """Steps between measurements on held-out rows, each followed by a save; by default a tenth of all."""
    patience: Count | None = 3
    """Stop after this many measurements without a better one; null never does."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 42
    """Seed of shuffling and of the held-out split."""


class Recipe(Section):
    """A recipe, checked; made by `Recipe.load` or from keyword arguments.

    Example:
        >>> rule = {"match": "*.mlp.*", "structure": "low_rank", "keep_ratio": "1/3"}
        >>> Recipe(name="third", replace=[rule]).replace[0].options()
        {'keep_ratio': 0.3333333333333333}
    """

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^/\\\x00-\x1f\x7f]+$")]
    """Short name, used in reports and output folders."""
    description: str = ""
    """One or two sentences on what the recipe does."""
    source: str = ""
    """Where the recipe comes from."""
    depth: Depth | None = None
    width: Width | None = None
    replace: tuple[SerializeAsAny[Rule], ...] = ()
    """Rules, tried in this order on every projection."""
    budget: Ratio | None = None
    """For rules with `structure: auto`: share of the weights of all projections they match that stays."""
    init: Name = "project"
    """How blocks get their weights: project, least_squares, random, random_published."""
    calibration: Calibration | None = None
    refine: Refine | None = None
    """A gradient fit after `init: least_squares`; left out, there is none."""
    heal: Heal | None = None

    _lines: dict[tuple[str | int, ...], int] = PrivateAttr(default_factory=dict)
    _file: str = PrivateAttr(default="recipe")

    @model_validator(mode="after")
    def _budget_for_auto(self) -> Recipe:
        if self.has_auto and self.budget is None:
            raise ValueError(
                "`structure: auto` needs a `budget`, the share of the weights to keep, as 0.5"
            )
        if self.budget is not None and not self.has_auto:
            raise ValueError("a `budget` is for rules with `structure: auto`; there is none")
        return self

    @property
    def has_auto(self) -> bool:
        """Whether any rule leaves the structure to measurement."""
        return any(rule.structure == "auto" for rule in self.replace)

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a recipe file, or a shipped recipe by its name.

        Args:
            source: path of a YAML file, or a name such as `kphi3`.

        Raises:
            RecipeError: if there is no such recipe, or anything in it is wrong; all problems at
                once, each with file, line and key.

        Example:
            >>> Recipe.load("kphi3-3layer").replace[0].options()
            {'min_channels_per_group': 256, 'variant': 'io'}
        """
        from .load import load_recipe  # the reader builds on this schema

        return load_recipe(source)

    @classmethod
    def of(cls, recipe: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
        """Return a recipe from whatever a caller has: a Recipe, a path, a name or a dictionary.

        Raises:
            RecipeError: as `load` does.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            from .load import recipe_from_dict

            return recipe_from_dict(recipe)
        return cls.load(recipe)

    def where(self, *path: str | int) -> str:
        """Return where a key stands, for messages: `half.yaml:12 replace[1].groups`."""
        line = next(
            (self._lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self._lines),
            None,
        )
        return f"{self._file}{f':{line}' if line else ''} {key_text(path)}".rstrip()

    def problem(self, path: tuple[str | int, ...], sentence: str) -> RecipeError:
        """Return an error about one key of this recipe."""
        return RecipeError(f"{self.where(*path)}: {sentence}")


def key_text(path: tuple[str | int, ...]) -> str:
    """Write a path of keys as people do.

    Example:
        >>> key_text(("replace", 1, "groups"))
        'replace[1].groups'
    """
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
