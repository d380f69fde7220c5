"""Checkpoints as pages see them: the small files beside the weights, made up for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmslim.report.report import Report, Row

PROMPTS = ("What is the capital of France?", "Write a <b>bold</b> sentence & stop.")


def projection(
    name: str, out_features: int, in_features: int, action: str, **changes: object
) -> Row:
    """Return a row of a dense map in bfloat16; `kept_params` is what is left of it."""
    params = out_features * in_features
    left = changes.pop("kept_params", params)
    return Row(
        name,
        "projection",
        action,
        in_features=in_features,
        out_features=out_features,
        params_before=params,
        params_after=left,
        bytes_before=2 * params,
        bytes_after=2 * left,
        flops_per_token_before=2 * params,
        flops_per_token_after=2 * left,
        **changes,
    )


def dense_map(name: str, out_features: int, in_features: int, kept: float = 1, **more: Any) -> Row:
    """Return the row of a dense map in bfloat16, or of the block that has a share `kept` of it."""
    kept_params = round(out_features * in_features * kept)
    action = more.pop("action", "kept" if kept == 1 else "replaced")
    if action == "replaced":
        more = {"structure": "low_rank", "options": {"rank": 96}, **more}
    return projection(name, out_features, in_features, action, kept_params=kept_params, **more)


def layered(layers: int = 30, hidden: int = 576, experts: int = 0) -> Report:
    """Return a report whose MLPs keep less and fit worse from layer to layer; one is dropped."""
    words = 49152 * hidden
    sizes = {"params_before": words, "params_after": words}
    sizes |= {"bytes_before": 2 * words, "bytes_after": 2 * words}
    rows = [Row("model.embed_tokens", "embedding", "kept", "an embedding", **sizes)]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        dropped = {"action": "dropped", "reason": f"decoder layer {layer} is dropped"}
        gone = dropped if layer == layers - 3 else {}
        for name, out in (("q", hidden), ("k", hidden // 3), ("v", hidden // 3), ("o", hidden)):
            why = {"reason": "no rule matches", "action": "unmatched"}
            share = 0 if gone else 1
            rows.append(
                dense_map(f"{at}.self_attn.{name}_proj", out, hidden, share, **(gone or why))
            )
        share = 0 if gone else round(0.95 - 0.9 * layer / layers, 3)
        for part in [f"experts.{n}." for n in range(experts)] or [""]:
            for number, name in enumerate(("gate", "up", "down")):
                shape = (hidden, 1536) if name == "down" else (1536, hidden)
                error = {} if gone else {"init_error": 0.1 + (layer + number) / (2 * layers)}
                row = dense_map(f"{at}.mlp.{part}{name}_proj", *shape, share, **error, **gone)
                rows.append(row)
        norm = {"params_before": hidden, "params_after": 0 if gone else hidden}
        act = "dropped" if gone else "kept"
        rows.append(Row(f"{at}.input_layernorm", "other", act, "no dense map", **norm))
    rows.append(Row("lm_head", "head", "tied", "shares its parameters with model.embed_tokens"))
    notes = ("Layer 27 was chosen to go by the distance that it moves its inputs.",)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    given = {"given": f"{name}@0a1b2c", "options": {"seed": 7}}
    return Report(name, "mlp-half", tuple(rows), notes, **given)


def healing(before: float = 4.6, after: float = 3.1, dense: float | None = 2.6) -> dict[str, Any]:
    """Return what `HealReport.to_dict` gives."""
    return {
        "objective": "logits",
        "train": "blocks",
        "steps": 600,
        "tokens": 1_000_000,
        "padding": 0.02,
        "tokens_per_second": 512.5,
        "trained_parameters": 12_345_678,
        "loss_before": before,
        "loss_after": after,
        "loss_unrounded": None,
        "loss_teacher": dense,
        "gap_closed": None if dense is None else (before - after) / (before - dense),
        "source": "self",
        "licence": "unknown",
        "settings": {},
        "notes": ["The weights are those of step 550, the best measured."],
        "answers": [
            {
                "prompt": prompt,
                "before": "the the of of",
                "after": "Paris.\nIt is on the Seine.",
            }
            for prompt in PROMPTS
        ],
    }


def checkpoint(
    folder: Path, report: Report, *, healed: bool = True, perplexity: float | None = 21.5
) -> Path:
    """Write what a slim checkpoint has beside its weights."""
    folder.mkdir(parents=True)
    data = report.to_dict()
    if healed:
        data["healing"] = healing()
        lines = [
            {"step": step, "loss": 3.1 + 1.8 / (1 + step / 60) + 0.15 * ((step * 37) % 11 - 5) / 5}
            for step in range(1, 601)
        ]
        lines += [
            {"step": s, "held_out_loss": 3.1 + 1.5 / (1 + s / 50)} for s in range(60, 601, 60)
        ]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / "healing_history.jsonl").write_text(text)
    (folder / "llmslim_report.json").write_text(json.dumps(data))
    (folder / "recipe.yaml").write_text("replace:\n  - role: mlp\n    structure: auto\n")
    files = {"model.safetensors": {"bytes": 163_000_000, "sha256": "0f" * 32}}
    manifest = {"format": 1, "llmslim": "0.9", "files": files}
    manifest["source"] = {"model": report.model, "files": files}
    (folder / "llmslim_manifest.json").write_text(json.dumps(manifest))
    if perplexity is not None:
        write_scores(folder, perplexity)
        write_speeds(folder)
    return folder


def write_speeds(folder: Path) -> None:
    """Write what `llmslim bench --against` keeps: slower for one row, faster for many."""
    from llmslim.report.speeds import Benchmark, Speed, keep_benchmark

    theirs = [Speed(rows, 0.1 * rows, 1280.0, 22.0 * rows, 2 * 10**8) for rows in (1, 8, 32)]
    ours = [Speed(n, 0.08 * n, 1600.0, 15.0 * n**1.2, 10**8) for n in (1, 8, 32)]
    sizes = {"prompt": 128, "new_tokens": 32, "rounds": 3, "memory_of": "the weights"}
    found = Benchmark(
        folder.name,
        "x86_64 CPU, 2 threads",
        "bfloat16",
        speeds=tuple(ours),
        against="SmolLM2-135M-Instruct",
        dense=tuple(theirs),
        ideal=1.6,
        **sizes,
    )
    keep_benchmark(folder, found)


def write_scores(folder: Path, perplexity: float, dense: float = 15.2, text: str = "w.txt") -> None:
    """Write what `llmslim eval --against` keeps."""
    from math import log

    from llmslim.report.scores import Estimate, Evaluation, TaskScore, TextScores, keep_evaluation

    loss, theirs = log(perplexity), log(dense)
    scores = TextScores(
        text,
        32,
        512,
        Estimate(loss, loss - 0.04, loss + 0.04),
        Estimate(theirs, theirs - 0.03, theirs + 0.03),
        Estimate(0.41, 0.38, 0.44),
        Estimate(0.671, 0.66, 0.682),
    )
    task = TaskScore("arc_easy", "acc", 0.512, 0.011, 500)
    keep_evaluation(folder, Evaluation(folder.name, "dense", (scores,), (task,), {"torch": "2.13"}))
