"""Fit single projections of SmolLM2-135M with every structure, and measure what each loses.

    python benchmarks/bench_sites.py --calibration wiki.valid.tokens.gz [--tokens 65536]
        [--model FOLDER_OR_GGUF] [--layer 15] [--held-out 32] [--threads 1]

The dense model reads the text; the inputs that each projection sees become one Gram matrix to fit
to and another, of windows that the fit has not seen, to judge by. Printed is the relative squared
output error E‖(W - B) x‖² / E‖W x‖² on the latter, and how long the fit took. Each site stands
alone here: nothing before it is slim. `bench_perplexity.py` measures whole models.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import click
import torch
from _common import find, machine, markdown, set_up, shared_options, windows
from torch import Tensor

from llmslim.anatomy.layer_calls import fast_type
from llmslim.init import GramAccumulator, Target, initialise, method_named, relative_error
from llmslim.modeling.structured import StructuredLinear, build
from llmslim.storage.load import load_model

SITES = (
    (15, "up_proj", "1/2"),
    (15, "up_proj", "1/3"),
    (15, "up_proj", "1/6"),
    (15, "down_proj", "1/2"),
    (15, "down_proj", "1/6"),
    (27, "up_proj", "1/3"),
    (2, "down_proj", "1/3"),
)
LEARNED = {"channel_order": "learned"}
FITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "io, masked copy": ("grouped_pointwise", {}, "project"),
    "io": ("grouped_pointwise", {}, "least_squares"),
    "io, learned order": ("grouped_pointwise", LEARNED, "least_squares"),
    "low_rank": ("low_rank", {}, "least_squares"),
    "pivoted_low_rank": ("pivoted_low_rank", {}, "least_squares"),
    "block_shuffle": ("block_shuffle", {}, "least_squares"),
    "grouped_low_rank": ("grouped_low_rank", {}, "least_squares"),
    "grouped_low_rank, learned order": ("grouped_low_rank", LEARNED, "least_squares"),
}
BATCH = 4  # windows


class Grams(NamedTuple):
    """Second moments of what one projection reads, (I, I) each."""

    fit_II: Tensor
    held_out_II: Tensor


def gather(model: Any, names: set[str], fit_NL: Tensor, held_out_NL: Tensor) -> dict[str, Grams]:
    """Return the Gram matrices of the inputs of the named projections, from one pass each."""
    found = []
    fast = fast_type(model.device, model.dtype)
    for ids_NL in (fit_NL, held_out_NL):
        sums = {name: GramAccumulator(model.get_submodule(name).in_features) for name in names}

        def see(gram: GramAccumulator, _module: Any, args: tuple[Tensor, ...]) -> None:
            gram.update(args[0])

        with ExitStack() as hooks, torch.autocast("cpu", fast, fast is not None):
            for name, gram in sums.items():
                hook = model.get_submodule(name).register_forward_pre_hook(partial(see, gram))
                hooks.callback(hook.remove)
            for batch_NL in ids_NL.split(BATCH):
                model.base_model(batch_NL, use_cache=False)
        found.append(sums)
    return {name: Grams(found[0][name].gram_II, found[1][name].gram_II) for name in names}


def measure(
    weight_OI: Tensor, grams: Grams, ratio: str, fit: tuple[str, dict[str, Any], str]
) -> tuple[float, float]:
    """Fit one structure to one projection; return its held-out error and the seconds it took."""
    structure, options, method = fit
    out_features, in_features = weight_OI.shape
    sizes = {"in_features": in_features, "out_features": out_features}
    parts = [int(part) for part in ratio.split("/")]
    share = {"keep_ratio": parts[0] / parts[1]}
    block = build({"structure": structure, **sizes, **share, **options})
    assert isinstance(block, StructuredLinear)
    start = time.perf_counter()
    initialise(block, Target(weight_OI, gram_II=grams.fit_II), method_named(method))
    seconds = time.perf_counter() - start
    return relative_error(block.to_dense(), weight_OI, grams.held_out_II), seconds


@click.command()
@shared_options
@click.option("--held-out", default=32, show_default=True, help="Windows to judge by.")
@click.option("--layer", type=int, multiple=True, help="Only sites of this layer; repeatable.")
@torch.no_grad()
def main(
    model: str | None,
    calibration: tuple[str, ...],
    tokens: int,
    length: int,
    threads: int | None,
    held_out: int,
    layer: tuple[int, ...],
) -> None:
    """Print held-out errors and seconds of every structure at every site."""
    set_up(threads)
    sites = [site for site in SITES if not layer or site[0] in layer]
    source = find(model)
    fit_NL, held_out_NL = windows(calibration, tokens, length, held_out, source)
    dense = load_model(source, dtype="float32")
    name_of = {site: f"model.layers.{site[0]}.mlp.{site[1]}" for site in sites}
    start = time.perf_counter()
    grams = gather(dense, set(name_of.values()), fit_NL, held_out_NL)
    click.echo(
        f"{machine()}; {fit_NL.numel()} tokens to fit to, {held_out_NL.numel()} to judge by, "
        f"read in {time.perf_counter() - start:.0f} s\n"
    )
    errors, times = [], []
    for site in sites:
        weight_OI = dense.get_submodule(name_of[site]).weight
        results = []
        for label, fit in FITS.items():
            results.append(measure(weight_OI, grams[name_of[site]], site[2], fit))
            error, seconds = results[-1]
            click.echo(f"{name_of[site]} {site[2]} {label}: {error:.3f}, {seconds:.1f} s", err=True)
        first = [f"layer {site[0]} {site[1]}", site[2]]
        errors.append([*first, *(f"{error:.3f}" for error, _ in results)])
        times.append([*first, *(f"{seconds:.1f}" for _, seconds in results)])
    header = ["site", "kept", *FITS]
    click.echo(f"Relative squared output error\n\n{markdown(header, errors)}\n")
    click.echo(f"Seconds to fit\n\n{markdown(header, times)}")


if __name__ == "__main__":
    main()
