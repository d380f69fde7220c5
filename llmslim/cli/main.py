"""The command `llmslim`: finds commands, and turns errors into messages and exit statuses.

    0   done
    1   an error: one message on stderr; or a check (`verify`, `--fail-under`) that failed
    2   wrong usage
    75  stopped by a full disk: finished work is kept, and the same command with --resume continues
    130 interrupted

A command is a file in `commands`. `llmslim --help` imports all of them, so a command imports torch
only when it runs.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any

import click

from llmslim._version import __version__
from llmslim.errors import SlimError, UnfinishedError, printable

from .settings import Settings, shared_options


def name_variables(params: list[click.Parameter], command: str = "") -> list[click.Parameter]:
    """Let each option be set by a variable, in place: LLMSLIM, the command, the option's long name.

    click's own variables have the names of Python's arguments, such as json_target, and --version
    has one too: LLMSLIM_VERSION, which images of containers like to set, would end every command.
    """
    for param in params:
        if isinstance(param, click.Option):
            words = ("LLMSLIM", command, max(param.opts, key=len).strip("-"))
            param.envvar = "_".join(filter(None, words)).replace("-", "_").upper()
    return params


class CommandFolder(click.Group):
    """A group whose commands are the files of `commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's signature)
        """Return the names of all commands, sorted."""
        files = (Path(__file__).parent / "commands").glob("[a-z]*.py")
        return sorted(file.stem.replace("_", "-") for file in files)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None where there is no such file."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f".commands.{cmd_name.replace('-', '_')}", __package__)
        command: click.Command = module.command
        command.name = cmd_name
        if not any(param.name == "debug" for param in command.params):
            # Allow -v, -q and --debug after the command too.
            command.params += shared_options()
            name_variables(command.params, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command by its name; suggest the nearest one where there is none.

        Raises:
            click.UsageError: if there is none.
        """
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not close:
                raise
            raise click.UsageError(f"{error.message} Did you mean '{close[0]}'?", ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; end with a message and a status where it fails."""
        settings = ctx.ensure_object(Settings)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            kept = "; ".join(getattr(interrupt, "__notes__", ()))
            written = f"{settings.written} is complete" if settings.written else ""
            click.echo(f"\nInterrupted; {kept or written or 'nothing was written'}.", err=True)
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # for click
        except SlimError as error:
            if settings.debug:
                raise
            problems = (printable(problem, lines=True) for problem in error.problems)
            click.echo("Error: " + "\n       ".join(problems), err=True)
            ctx.exit(75 if isinstance(error, UnfinishedError) else 1)
        except Exception as error:
            if settings.debug:
                raise
            text = printable(str(error).strip().partition("\n")[0])
            click.echo(
                f"Error: {type(error).__name__}{f': {text}' if text else ''}\n"
                "llmslim did not expect this error; run again with --debug for the traceback.",
                err=True,
            )
            ctx.exit(1)


@click.group(
    cls=CommandFolder,
    params=name_variables(shared_options()),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="llmslim")
def cli() -> None:
    """Make a language model smaller by replacing its projections with structured blocks.

    Start with `llmslim demo` (a small model, no download), or see what a recipe would do to your
    model: `llmslim plan MODEL --recipe mlp-half`.

    MODEL is a hub id, a folder, or a .gguf file; SLIM is a folder that `llmslim convert` wrote.
    Options may also be set by environment variables: LLMSLIM_EVAL_DEVICE=cpu is --device of eval.
    """


def main() -> None:
    """Run the command line; the entry point of the package."""
    cli(prog_name="llmslim")
