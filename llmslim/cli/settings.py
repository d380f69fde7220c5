"""What holds for a whole run, and the libraries behind it."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click


@dataclass
class Settings:
    """Global options, and what the run has done so far."""

    verbose: bool = False
    debug: bool = False
    written: Path | None = None
    """The output that stands complete on disk, for whoever interrupts after it."""

    def what_was_written(self) -> str:
        """Return the truth for the message of an interrupted run."""
        return f"{self.written} is complete" if self.written else "nothing was written"


def settings() -> Settings:
    """Return the settings of the command that is running."""
    return click.get_current_context().ensure_object(Settings)


def shared_options() -> list[click.Parameter]:
    """Return fresh -v and --debug options, for the group and for each command."""

    def note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.ensure_object(Settings), str(param.name), True)

    return [
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            expose_value=False,
            callback=note,
            help="Say more: warnings of the libraries, tokens per second.",
        ),
        click.Option(
            ["--debug"],
            is_flag=True,
            expose_value=False,
            callback=note,
            help="Show the traceback of an error.",
        ),
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
