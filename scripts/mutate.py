"""Make the changes of tests/mutations/ to copies of the repository, and run their tests.

Workers are forked from a process that has imported torch and transformers already, so most changes
take a second or two. First all named tests run on an unchanged copy: a test that fails there, or is
not there, says nothing about a change, and is an error of the list.
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from mutations import MUTATIONS, Mutation, stale  # noqa: E402

_PRELOADED = (
    "torch",
    "transformers",
    "transformers.trainer",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.phi3.modeling_phi3",
    "accelerate",
    "datasets",
    "pytest",
    "scipy.optimize",
)
_SECONDS = 900
"""After which a run counts as hanging."""


@dataclass(frozen=True)
class Run:
    """How a run of tests ended."""

    passed: bool
    failed: tuple[str, ...]
    """Ids of tests that failed, or what else went wrong."""
    seconds: float


class _Failures:
    """A pytest plugin that notes what fails."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.ids.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.ids.append(f"{report.nodeid} (not collected)")


def _child(folder: str, arguments: Sequence[str], answer: Connection) -> None:
    """Run pytest in a copy of the repository; in a process of its own."""
    import pytest

    os.chdir(folder)
    os.environ["PYTHONPATH"] = folder  # for commands that tests start
    sys.dont_write_bytecode = False  # into the copy: compiling takes longer than most tests
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Without the working tree, which an editable install may have put here.
    sys.path[:] = [
        folder,
        *(
            p
            for p in sys.path
            if not Path(p).resolve().is_relative_to(ROOT / "tests") and Path(p).resolve() != ROOT
        ),
    ]
    null = os.open(os.environ.get("MUT_DEBUG", os.devnull), os.O_WRONLY | os.O_CREAT)  # DEBUG
    #null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    failures = _Failures()
    # Some of what was imported early has assertions that pytest would have rewritten.
    quietly = ("-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
    code = int(pytest.main([*quietly, *arguments], plugins=[failures]))
    answer.send((code, failures.ids))


class Copy:
    """A copy of the repository that changes are made to.

    Args:
        folder: where it is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def test(self, *arguments: str) -> Run:
        """Run pytest here, with some arguments."""
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        answers, answer = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(str(self.folder), arguments, answer))
        start = time.perf_counter()
        process.start()
        answer.close()
        try:
            if not answers.poll(_SECONDS):
                return Run(False, ("the time limit",), _SECONDS)
            code, ids = answers.recv()
        except EOFError:
            code, ids = -1, ["the process, which died"]
        finally:
            process.kill()
            process.join()
        failed = ids or [f"pytest, with exit code {code}"]
        return Run(code == 0, tuple(failed) if code else (), time.perf_counter() - start)

    def changed(self, mutation: Mutation, *arguments: str) -> Run:
        """Run pytest while a change is made."""
        path = self.folder / mutation.path
        source = path.read_text(encoding="utf-8")
        kept = path.stat()
        compiled = path.parent / "__pycache__"
        try:
            path.write_text(mutation.apply(source), encoding="utf-8")
            # Compiled files are told apart by seconds and size, which a change may leave alone.
            _remove(compiled.glob(f"{path.stem}.*"))
            return self.test(*arguments)
        finally:
            path.write_text(source, encoding="utf-8")
            os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
            _remove(compiled.glob(f"{path.stem}.*"))


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make every change, print what noticed it, and return 1 if nothing did."""
    parser = argparse.ArgumentParser(prog="scripts/mutate", description=__doc__)
    parser.add_argument("--only", metavar="GLOB", default="*", help="changes of matching paths")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument(
        "--all-tests",
        action="store_true",
        help="run the whole suite on what the named tests do not notice",
    )
    options = parser.parse_args(arguments)
    mutations = tuple(m for m in MUTATIONS if fnmatch.fnmatch(m.path, options.only))
    faults = stale(mutations, ROOT)
    for fault in faults:
        print(f"STALE  {fault}")
    if faults or not mutations:
        print("" if faults else f"{options.only}: no change is of such a file.")
        return 1
    multiprocessing.set_forkserver_preload(list(_PRELOADED))
    with tempfile.TemporaryDirectory(prefix="llmslim-mutate-") as scratch:
        return _run(mutations, Path(scratch), options)


def _run(mutations: Sequence[Mutation], scratch: Path, options: argparse.Namespace) -> int:
    first = Copy(scratch / "0")
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    # A file would be run for its own sake and once more for each id in it.
    files = {test for test in tests if "::" not in test}
    tests = [test for test in tests if test in files or test.partition("::")[0] not in files]
    plain = first.test(*tests) if not os.environ.get("MUT_FAST") else Run(True, (), 0.0)  # DEBUG
    print(f"{len(mutations)} changes; their tests take {plain.seconds:.0f} s without any.")
    if not plain.passed:
        print(*(f"FAILS WITHOUT A CHANGE  {name}" for name in plain.failed), sep="\n")
        return 1
    copies = [first, *(Copy(scratch / str(n)) for n in range(1, options.jobs))]
    own = threading.local()

    def take_copy() -> None:
        own.copy = copies.pop()

    def run(mutation: Mutation) -> bool:
        result = own.copy.changed(mutation, "-x", *mutation.tests)
        if result.passed and options.all_tests:
            result = own.copy.changed(mutation, "-x")
        what = f"{mutation.path}: {mutation.old.strip()!r} -> {mutation.new.strip()!r}"
        if result.passed:
            print(f"NOT NOTICED  {what}: {mutation.why}", flush=True)
        else:
            print(f"noticed by {result.failed[0]} in {result.seconds:.1f} s  {what}", flush=True)
        return not result.passed

    with ThreadPoolExecutor(options.jobs, initializer=take_copy) as pool:
        noticed = list(pool.map(run, mutations))
    print(f"{sum(noticed)} of {len(noticed)} changes were noticed.")
    return 0 if all(noticed) else 1


if __name__ == "__main__":
    sys.exit(main())
