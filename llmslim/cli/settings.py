"""Global options of a run, and the import of the libraries behind it."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click


@dataclass
class Settings:
    """Global options, and what the run has written so far."""

    verbose: bool = False
    quiet: bool = False
    debug: bool = False
    written: Path | None = None
    """A complete output on disk, for the message of an interrupt."""


def settings() -> Settings:
    """Return the settings of the command that is running; the defaults where none is."""
    context = click.get_current_context(silent=True)
    return context.ensure_object(Settings) if context else Settings()


def shared_options() -> list[click.Parameter]:
    """Return new -v, -q and --debug options, for the group or for a command."""

    def note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.ensure_object(Settings), str(param.name), True)

    flags = {
        ("-v", "--verbose"): "Show more: warnings of the libraries, tokens per second.",
        ("-q", "--quiet"): "Show less: no progress, no report of what was written, no advice.",
        ("--debug",): "Show the traceback of an error.",
    }
    return [
        click.Option(names, is_flag=True, expose_value=False, callback=note, help=text)
        for names, text in flags.items()
    ]


def backend() -> ModuleType:
    """Import `llmslim.api`, and with it torch; without -v, keep the libraries quiet."""
    if not settings().verbose:
        warnings.simplefilter("ignore")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        from transformers import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    from llmslim import api

    return api
