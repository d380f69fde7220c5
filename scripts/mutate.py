"""Make the changes of tests/mutations/ to copies of the repository, and run their tests.

Runs are forked from a process that has imported torch and transformers already, and a copy keeps
its compiled files, so most changes take two seconds. First all named tests run on an unchanged
copy: one that fails there, or is not there, says nothing about a change.
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
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))

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
_WITHOUT_THE_LIST = ("--ignore=tests/mutations", "--ignore=tests/test_mutations.py")
"""A list that is true of the code as it is notices every change to it, for no user's sake."""
_SECONDS = 1800
"""After which a run counts as hanging: far more than the whole suite takes."""


@dataclass(frozen=True)
class Run:
    """How a run of tests ended."""

    failed: tuple[str, ...]
    """Ids of tests that failed, or what else went wrong; empty where all passed."""
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
            self.ids.append(f"{report.nodeid} (cannot be imported)")


def _run_tests(folder: Path, arguments: Sequence[str], answer: Connection) -> None:
    """Run pytest in a copy of the repository; in a process of its own."""
    import pytest

    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)  # for commands that tests start
    here = {ROOT, TESTS, ROOT / "scripts"}
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path).resolve() not in here)]
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    failures = _Failures()
    # Some of what was imported early has assertions that pytest would have rewritten.
    quietly = ("-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
    code = int(pytest.main([*quietly, *arguments], plugins=[failures]))
    answer.send([] if code == 0 else failures.ids or [f"pytest, with exit code {code}"])


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
        for name in listed.split("\0"):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def test(self, *arguments: str) -> Run:
        """Run pytest here, with some arguments."""
        server = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if server else "spawn")
        answers, answer = context.Pipe(duplex=False)
        process = context.Process(target=_run_tests, args=(self.folder, arguments, answer))
        start = time.perf_counter()
        process.start()
        answer.close()
        try:
            failed = answers.recv() if answers.poll(_SECONDS) else ["the time limit"]
        except EOFError:
            failed = ["the end of the process"]
        process.join(10)
        process.kill()
        return Run(tuple(failed), time.perf_counter() - start)

    @contextmanager
    def changed(self, mutation: Mutation) -> Any:
        """Make a change for as long as the context lasts."""
        path = self.folder / mutation.path
        source, about = path.read_text(encoding="utf-8"), path.stat()
        try:
            path.write_text(mutation.apply(source), encoding="utf-8")
            _forget_compiled(path)
            yield
        finally:
            path.write_text(source, encoding="utf-8")
            os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
            _forget_compiled(path)


def _forget_compiled(path: Path) -> None:
    """Remove compiled files: Python compares only the time in seconds and the size of a source."""
    for file in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        file.unlink()


def main() -> int:
    """Make every change, print what noticed it, and return 1 where nothing did."""
    parser = argparse.ArgumentParser(prog="scripts/mutate", description=__doc__)
    parser.add_argument("--only", metavar="GLOB", default="*", help="changes of files it matches")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="how many at a time")
    parser.add_argument(
        "--all-tests",
        action="store_true",
        help="run the whole suite on what the named tests do not notice",
    )
    options = parser.parse_args()
    mutations = tuple(m for m in MUTATIONS if fnmatch.fnmatch(m.path, options.only))
    if not mutations:
        parser.error(f"--only {options.only}: no change is of such a file.")
    if faults := stale(mutations, ROOT):
        print(*faults, sep="\n")
        return 1
    multiprocessing.set_forkserver_preload(list(_PRELOADED))
    with tempfile.TemporaryDirectory(prefix="llmslim-mutate-") as scratch:
        return _make(mutations, Path(scratch), options)


def _make(mutations: Sequence[Mutation], scratch: Path, options: argparse.Namespace) -> int:
    copies = [Copy(scratch / str(number)) for number in range(max(1, options.jobs))]
    print(f"{len(mutations)} changes; their tests without any:", flush=True)
    plain = copies[0].test(*_named_tests(mutations))
    print(f"{plain.seconds:.0f} s", flush=True)
    for name in plain.failed:
        print(f"FAILS WITHOUT A CHANGE  {name}")
    if plain.failed:
        return 1
    own = threading.local()

    def take_copy() -> None:
        own.copy = copies.pop()

    def noticed(mutation: Mutation) -> bool:
        with own.copy.changed(mutation):
            run = own.copy.test("-x", *mutation.tests)
            if not run.failed and options.all_tests:
                run = own.copy.test("-x", *_WITHOUT_THE_LIST)
        how = f"noticed by {run.failed[0]} in" if run.failed else "NOT NOTICED in"
        what = f"{mutation.path}: {mutation.old!r} -> {mutation.new!r} ({mutation.why})"
        print(f"{how} {run.seconds:.1f} s  {what}", flush=True)
        return bool(run.failed)

    with ThreadPoolExecutor(len(copies), initializer=take_copy) as pool:
        found = list(pool.map(noticed, mutations))
    print(f"{sum(found)} of {len(found)} changes were noticed.")
    return 0 if all(found) else 1


def _named_tests(mutations: Iterable[Mutation]) -> list[str]:
    """Return all tests that changes name, none of them also as a part of another."""
    tests = {test for mutation in mutations for test in mutation.tests}
    return sorted(
        test
        for test in tests
        if not {test.partition(end)[0] for end in ("::", "[")} & (tests - {test})
    )


if __name__ == "__main__":
    sys.exit(main())
