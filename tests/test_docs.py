"""What pages say: links, commands, code, recipes, keys and options are as they stand there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import yaml
from click.testing import CliRunner
from helpers_cli import _restore_logging as _restore_logging
from helpers_cli import dense as dense
from pydantic import BaseModel

import llmslim
from llmslim.cli.main import cli
from llmslim.init.target import method_names
from llmslim.plugins import OBJECTIVES
from llmslim.recipe import Recipe, shipped_recipes
from llmslim.recipe.schema import (
    Calibration,
    Depth,
    EndToEnd,
    Heal,
    HealSource,
    Refine,
    Rule,
    Width,
)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS = cli.list_commands(click.Context(cli))


class Block(NamedTuple):
    """A block of code in a page."""

    page: str
    language: str
    text: str


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, and the indented ones, whose language is empty."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    fences = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    for _, language, inner in fences.findall(text):
        yield Block(name, language, textwrap.dedent(inner))
    for inner in re.findall(r"(?<=\n\n)(?: {4}.*\n)+", fences.sub("", text)):
        yield Block(name, "", textwrap.dedent(inner))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def lines_of_shell() -> Iterator[tuple[str, list[str]]]:
    """Yield the words of each command in a block of shell, and in the comments of recipes."""
    shown = [(b.page, b.text) for b in BLOCKS if b.language in {"", "bash", "sh"}]
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        lines = re.findall(r"^#   (llmslim .*)", file.read_text(encoding="utf-8"), re.MULTILINE)
        shown += [(file.name, line) for line in lines]
    for page, text in shown:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
            words.whitespace_split = True
            found: list[str] = []
            for word in words:
                if set(word) <= set("|&;<>"):
                    break  # what follows is another program's, or a file
                found.append(word)
            while found and re.fullmatch(r"[A-Z_]+=.*", found[0]):
                del found[0]
            if found:
                yield page, found


SHELL = list(lines_of_shell())


def arguments(program: str) -> list[Any]:
    """Return the page and the arguments of every call of a program, `accelerate launch -m` too."""
    calls = []
    for page, words in SHELL:
        if words[:2] == ["accelerate", "launch"] and "-m" in words:
            words = words[words.index("-m") + 1 :]
        if words[0] == program and words[1:]:
            calls.append(pytest.param(words[1:], id=f"{page}: {' '.join(words)}"[:120]))
    return calls


# ------------------------------------------------------------------------------- the site


def anchors(page: Path) -> set[str]:
    """Return what a link into a page may name: its headings, and names that it documents."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def test_links_between_pages_lead_somewhere():
    links = [
        (page, *link.partition("#")[::2])
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        if "://" not in link
    ]
    assert len(links) > 50
    missing = [
        f"{page.name}: {name}#{anchor}"
        for page, name, anchor in links
        if not (target := page.parent / name if name else page).exists()
        or (anchor and anchor not in anchors(target))
    ]
    assert missing == []


def test_the_navigation_has_every_page_once():
    def leaves(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [leaf for part in parts for leaf in leaves(part)]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert sorted(leaves(site["nav"])) == sorted(pages)


def test_the_pictures_are_what_their_script_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    pictures = importlib.import_module("pictures")
    monkeypatch.setattr(pictures, "OUT", tmp_path)
    pictures.main()
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    kept = {p.name: p.read_text(encoding="utf-8") for p in (DOCS / "pictures").glob("*.svg")}
    assert len(drawn) == 4
    assert drawn == kept


# -------------------------------------------------------------------- files, names and keys


def test_the_files_that_pages_name_are_there():
    known = [ROOT, ROOT / "llmslim", ROOT / "llmslim" / "modeling"]
    for page in ("architecture.md", "decisions.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", text)) - {"llmslim_entry.py"}
        assert len(named) > 10
        assert [path for path in named if not any((root / path).exists() for root in known)] == []
    packages = {path.parent.name for path in (ROOT / "llmslim").glob("*/__init__.py")}
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert {f"`{name}`" for name in packages} <= set(re.findall(r"`[^`]+`", text))


def test_the_readme_names_every_recipe():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in shipped_recipes() if f"`{name}`" not in text] == []


def keys_under(heading: str) -> dict[str, dict[str, str]]:
    """Return the rows of the tables of keys under a heading of docs/recipes.md, by their key."""
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    section = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    tables = re.findall(r"^(\| key .*\n)\|[-|: ]+\n((?:\|.*\n)+)", section, re.MULTILINE)
    rows = {}
    for head, body in tables:
        titles = [cell.strip() for cell in head.strip().strip("|").split("|")]
        for line in body.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == len(titles), line
            rows[cells[0].strip("`")] = dict(zip(titles, cells, strict=True))
    return rows


@pytest.mark.parametrize(
    ("heading", "sections"),
    [
        ("Top level", [Recipe]),
        ("`depth`", [Depth]),
        ("`width`", [Width]),
        ("`replace`", [Rule]),
        ("`calibration`", [Calibration]),
        ("`refine`", [Refine]),
        ("`end_to_end`", [EndToEnd]),
        ("`heal`", [Heal, HealSource]),
    ],
)
def test_the_tables_of_keys_are_the_schemas(heading: str, sections: list[type[BaseModel]]):
    rows = keys_under(heading)
    fields = {key: field for section in sections for key, field in section.model_fields.items()}
    assert set(rows) - {"…"} == set(fields)
    for key, row in rows.items():
        default = fields[key].default if key in fields else None
        if isinstance(default, bool):
            assert row["default"] == str(default).lower(), key
        elif isinstance(default, int | float):
            assert float(row["default"]) == default, key
        elif isinstance(default, str) and default and key != "data":  # of a source: "as above"
            assert row["default"] == f"`{default}`", key


def test_the_page_of_python_has_every_exported_name_once():
    names = re.findall(r"^::: llmslim\.(\w+)$", (DOCS / "python.md").read_text(), re.MULTILINE)
    assert sorted(names) == llmslim.__all__


def described(name: str) -> str:
    """Return a command's part of docs/command-line.md."""
    context = click.Context(cli, info_name="llmslim", **cli.context_settings)
    command = cli.get_command(context, name)
    assert command is not None
    context = click.Context(command, info_name=name, parent=context)
    lines = [
        f"### {name}",
        "",
        f"`{' '.join([context.command_path, *command.collect_usage_pieces(context)])}`",
        "",
        inspect.cleandoc(command.help or ""),
        "",
    ]
    shared = {"verbose", "quiet", "debug"}
    for param in command.params:
        record = param.get_help_record(context) if isinstance(param, click.Option) else None
        if record is not None and param.name not in shared:
            text = re.sub(r"\s+\[(.*)\]$", r" (\1)", record[1])
            lines.append(f"- `{record[0]}`: {text}")
    return "\n".join(lines) + "\n"


def test_the_page_of_commands_is_their_help(update_golden):
    page = DOCS / "command-line.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- commands -->\n")
    written, end, after = rest.partition("<!-- end -->\n")
    assert end
    text = "\n".join(described(name) for name in COMMANDS) + "\n"
    if update_golden:
        page.write_text(f"{before}<!-- commands -->\n{text}{end}{after}", encoding="utf-8")
    else:
        assert written == text, "run this test with --update-golden"


def test_troubleshooting_has_every_error_and_what_it_quotes_is_a_message():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    titles = set(re.findall(r"^### (\w+)$", text, re.MULTILINE))
    assert titles == {name for name in llmslim.__all__ if name.endswith("Error")} - {"SlimError"}
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(quoted) > 30
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "llmslim").rglob("*.py")]
    literals = {
        node.value
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert [words for words in quoted if not any(words in literal for literal in literals)] == []


# ------------------------------------------------------------------------- commands and code


@pytest.fixture
def dry(monkeypatch) -> dict[str, Any]:
    """Let commands take their arguments and do nothing; return where the arguments go."""
    given: dict[str, Any] = {}
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        monkeypatch.setattr(command, "callback", lambda **options: given.update(options))
    return given


@pytest.mark.parametrize("words", arguments("llmslim"))
def test_commands_are_accepted(words, dry):
    ran = CliRunner().invoke(cli, words, prog_name="llmslim")
    assert ran.exit_code == 0, ran.output
    recipe = str(dry.get("recipe") or "NAME")
    assert recipe in shipped_recipes() or recipe.endswith(".yaml") or recipe == "NAME"
    assert set(dry.get("settings") or ()) <= set(Heal.model_fields)
    assert dry.get("init") in {None, *method_names()}
    assert dry.get("objective") in {None, *OBJECTIVES.names()}


@pytest.mark.slow
def test_the_quick_start_from_its_first_line_to_its_last(dense, tmp_path, monkeypatch):
    """Run its commands as they stand there, on a tiny model and with little text."""
    page = (DOCS / "index.md").read_text(encoding="utf-8")
    page = page.split("## Your own model")[1].split("The same in Python")[0]
    commands = [shlex.split(line, comments=True) for line in re.findall("^llmslim .*", page, re.M)]
    assert len(commands) == 6
    less = {
        "convert": ["--calibration-tokens", "512"],
        "heal": ["--tokens", "64", "--context-length", "16", "--set", "held_out=2"],
        "eval": ["--windows", "2", "--length", "16"],
        "generate": ["--max-new-tokens", "2"],
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("my_text.txt").write_text("w1 w2 w3 w4 " * 40)
    for _, name, *words in commands:
        given = [str(dense) if word == "MODEL" else word for word in words]
        ran = CliRunner().invoke(cli, [name, *given, *less.get(name, [])], prog_name="llmslim")
        assert ran.exit_code == 0, ran.output
    assert "<svg" in Path("report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", arguments("python"))
def test_benchmarks_are_accepted(words, monkeypatch):
    script, *rest = words
    assert (ROOT / script).is_file()
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module(Path(script).stem)
    module.main.make_context(script, rest)


def test_commands_that_download_say_so():
    """Those that name a model or a data set of the hub, in the section that they are in."""
    found, silent = 0, []
    for page in PAGES:
        sections = re.split(r"^#+ .*$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for section in sections:
            lines = re.findall(r"^ *((?:accelerate|hf|llmslim) .*)", section, re.MULTILINE)
            for line in lines:
                if re.search(r" [A-Z]?[a-z]\w+/[A-Z][\w.-]+|--data lamini", line):
                    found += 1
                    silent += [] if re.search(r"\bhub\b", section) else [f"{page.name}: {line}"]
    assert found >= 6
    assert silent == []


def test_scripts_that_pages_call_are_there():
    calls = [words for _, words in SHELL if words[0].startswith("scripts/")]
    assert len(calls) >= 4
    of_pytest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    for script, *rest in calls:
        text = (ROOT / script).read_text(encoding="utf-8")
        text += of_pytest if script == "scripts/test" else ""
        assert [word for word in rest if word.startswith("--") and word not in text] == []


def test_variables_name_options():
    named = {
        word.partition("=")[0]
        for _, words in SHELL
        for word in words[1:]
        if words[0] == "export" and word.startswith("LLMSLIM_")
    }
    assert named
    commands = [cli, *(cli.get_command(click.Context(cli), name) for name in COMMANDS)]
    known = {param.envvar for command in commands for param in command.params}
    assert named <= known


def test_commands_in_sentences_have_their_options():
    found = [
        (page.name, " ".join(span.split()))
        for page in PAGES
        for span in re.findall(r"`(llmslim\s[^`]+)`", page.read_text(encoding="utf-8"))
    ]
    assert len(found) > 50
    wrong = []
    for page, span in found:
        words = span.split()[1:]
        name = next((word for word in words if not word.startswith("-")), "COMMAND")
        if name in {"COMMAND", "..."}:
            continue
        command = cli.get_command(click.Context(cli), name)
        known = (
            {"--help", *(o for p in command.params for o in (*p.opts, *p.secondary_opts))}
            if command
            else set()
        )
        if not command or {word.partition("=")[0] for word in words if word[0] == "-"} - {
            *known,
            "-",
        }:
            wrong.append(f"{page}: {span}")
    assert wrong == []


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=f"{b.page}: {b.text[:50]!r}") for b in BLOCKS if b.language == "python"],
)
def test_python_uses_what_llmslim_exports(block):
    tree = ast.parse(block.text)
    names: dict[str, Any] = {"llmslim": llmslim}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "llmslim":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert node.module != "llmslim" or alias.name in llmslim.__all__
                names[alias.name] = getattr(module, alias.name)

    def resolve(node: ast.AST) -> Any:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := resolve(node.value)) is not None:
            if owner is llmslim and node.attr not in llmslim.__all__:
                return importlib.import_module(f"llmslim.{node.attr}")
            return getattr(owner, node.attr)
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node)
        if isinstance(node, ast.Call) and callable(called := resolve(node.func)):
            keywords = {word.arg: None for word in node.keywords if word.arg}
            inspect.signature(called).bind(*node.args, **keywords)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{block.page}: {block.text[:50]!r}")
        for block in BLOCKS
        if block.language == "yaml" and "kronecker" not in block.text  # test_plugins.py has those
    ],
)
def test_recipes_in_pages_are_valid(block):
    recipe = Recipe.of({"name": "shown", **yaml.safe_load(block.text)})
    assert recipe.replace or recipe.heal
