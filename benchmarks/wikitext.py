"""Turn WikiText's tokenised form back into text as people write it.

`wiki.*.tokens` files have every word and mark apart, ` @-@ ` for a hyphen within a word, and
`<unk>` for rare words; `wiki.*.raw` files have none of it. Fitting to the first and measuring on
the second would compare two languages, so whoever calibrates on a .tokens file passes it through
here first:

    python benchmarks/wikitext.py wiki.valid.tokens.gz > valid.txt

`<unk>` stands for a word that is lost. A sentence with a hole in it is not text either, so such
sentences are left out, which costs nearly three quarters of WikiText-2 (some 71 thousand tokens of
its validation part stay); `--keep-unk` keeps them as they are.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import click

_RULES = (
    (r" @([-,.])@ ", r"\1"),
    (r" ([.,;:!?%)\]}])", r"\1"),
    (r"([(\[{$£]) ", r"\1"),
    (r" n't\b", "n't"),
    (r" '(s|S|re|ve|ll|d|m)\b", r"'\1"),
)


def detokenise(text: str, *, keep_unk: bool = False) -> str:
    """Return raw-like text.

    Args:
        text: WikiText's tokenised form.
        keep_unk: keep sentences that hold `<unk>`.

    Example:
        >>> detokenise('The 2 @-@ 1 win ( " easy " , he said ) drew 1 @,@ 000 fans .')
        'The 2-1 win ("easy", he said) drew 1,000 fans.'
    """
    lines = text.split("\n")
    if not keep_unk:
        whole = ("".join(s for s in _sentences(line) if "<unk>" not in s) for line in lines)
        # A line of nothing but lost sentences goes; one that was empty before stays.
        lines = [
            new for new, old in zip(whole, lines, strict=True) if new.strip() or not old.strip()
        ]
    return "\n".join(map(_line, lines))


def _sentences(line: str) -> list[str]:
    """Cut a tokenised line after each sentence, a closing quotation mark included."""
    return re.findall(r'.+?(?: [.!?](?: ")?(?= |$)|$)', line)


def _line(line: str) -> str:
    line = _quotes(line)
    for pattern, replacement in _RULES:
        line = re.sub(pattern, replacement, line)
    return line


def _quotes(line: str) -> str:
    """Join every other quotation mark to the word after it, and the rest to the one before."""
    parts = re.split(r'(?<!\S)"(?!\S)', line)
    for index in range(1, len(parts)):
        opens = index % 2 == 1
        parts[index] = parts[index].removeprefix(" ") if opens else parts[index]
        parts[index - 1] = parts[index - 1] if opens else parts[index - 1].removesuffix(" ")
    return '"'.join(parts)


@click.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--keep-unk", is_flag=True, help="Keep sentences that hold <unk>.")
def main(path: Path, keep_unk: bool) -> None:
    """Print PATH (.tokens or .tokens.gz) as raw-like text."""
    packed = path.read_bytes()
    text = (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode("utf-8")
    click.echo(detokenise(text, keep_unk=keep_unk), nl=False)


if __name__ == "__main__":
    main()
