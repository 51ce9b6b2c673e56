"""Texts of installed Debian packages: manual pages, handbooks and help, in many languages, some of them parallel."""

from __future__ import annotations

import gzip
import re
from html.parser import HTMLParser
from pathlib import Path

from mixtral.data.readers import BadInput
from mixtral.errors import DataError

# Where the packages put their texts, below the root of the file system.
PATTERNS = (
    "usr/share/man/**/man[1-9]/*.gz",  # manpages, manpages-de, -fr, -es, -it, and every program's own
    "usr/share/debian-reference/*.html",  # debian-reference-*
    "usr/share/doc/debian-handbook/html/*/*.html",
    "usr/share/doc/installation-guide-*/**/*.html",
    "usr/share/libreoffice/help/*/text/**/*.html",  # libreoffice-help-*
)

_LANGUAGE = re.compile(r"/([a-z]{2})(?:[-_@]\w+)?(?=/)|\.([a-z]{2})(?:-[a-z]+)?\.html$")
_INVISIBLE = frozenset({"script", "style", "head"})
_BLOCKS = frozenset({
    "p", "br", "div", "li", "tr", "td", "th", "dt", "dd", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "title",
    "table", "ul", "ol", "dl",
})
# \X, \(XX and \[XX]; a sequence that is not here gives itself when of one character, and nothing otherwise.
_ROFF_CHARACTERS = {
    "e": "\\", "~": " ", "0": " ", "&": "", "|": "", "^": "", "%": "", "/": "", ",": "", "c": "",
    "co": "©", "em": "—", "en": "\u2013", "aq": "'", "dq": '"', "lq": "“", "rq": "”", "bu": "•", "ti": "~", "ha": "^",
}  # fmt: skip
_ROFF_ESCAPE = re.compile(
    r"\\(?:f(?:\[[^]]*\]|\(..|.)|s[-+]?\d+|m\[[^]]*\]|\*(?:\(..|\[[^]]*\]|.)"  # fonts, sizes, colours, strings: nothing
    r"|\((?P<pair>..)|\[(?P<name>[^]]*)\]|(?P<single>.))"
)
_ROFF_HEADINGS = frozenset({"SH", "SS", "Sh", "Ss"})
_ROFF_BREAKS = frozenset({"PP", "P", "LP", "Pp", "sp"})
_ROFF_JOINED = frozenset({"BR", "RB", "BI", "IB", "IR", "RI"})  # two fonts in turn, no space between the arguments
_ROFF_TEXT = frozenset({"B", "I", "SM", "SB", "IP"})
_ROFF_ARGUMENT = re.compile(r'"([^"]*)"|((?:\\.|[^\s"])+)')


def debian_files(root: Path = Path("/")) -> list[Path]:
    """Every text file of an installed package, sorted; DataError when there are none."""
    found = sorted(path for pattern in PATTERNS for path in root.glob(pattern) if path.is_file())
    if not found:
        raise DataError(
            "debian: no texts of Debian packages are installed; install some, "
            "e.g. apt install manpages debian-reference-en debian-handbook"
        )
    return found


def language_of(name: str) -> str:
    """The language code in a file's name or in the name of a folder above it; English has none."""
    found = [folder or suffix for folder, suffix in _LANGUAGE.findall(name)]
    return found[-1] if found else "en"


def read_debian(path: Path, bad: BadInput) -> str:
    """The plain text of one manual page or HTML page; "" when it holds none."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        source = data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        bad(str(path), f"cannot be read: {error}")
        return ""
    text = html_text(source) if path.suffix == ".html" else roff_text(source)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Visible(HTMLParser):
    """Collects what a browser would show."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 (the parser's signature)
        self.hidden += tag in _INVISIBLE
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in _INVISIBLE and self.hidden > 0
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def html_text(source: str) -> str:
    """The visible text of an HTML page, a line for each block."""
    parser = _Visible()
    parser.feed(source)
    lines = (line.strip() for line in "".join(parser.parts).splitlines())
    return re.sub(r"\n{2,}", "\n", "\n".join(lines))


def roff_text(source: str) -> str:
    """The text of a manual page without its macros; "" for a page that only names another one."""
    if source.startswith(".so "):
        return ""
    lines: list[str] = []
    for line in source.splitlines():
        if not line.startswith((".", "'")):
            lines.append(_plain(line))
            continue
        request, _, rest = line[1:].strip().partition(" ")
        if request in _ROFF_HEADINGS:
            lines += ["", _arguments(rest, " ")]
        elif request in _ROFF_BREAKS:
            lines.append("")
        elif request in _ROFF_JOINED:
            lines.append(_arguments(rest, ""))
        elif request in _ROFF_TEXT and rest:
            lines.append(_arguments(rest, " "))
    return "\n".join(lines)


def _arguments(line: str, separator: str) -> str:
    return separator.join(_plain(quoted or bare) for quoted, bare in _ROFF_ARGUMENT.findall(line))


def _plain(line: str) -> str:
    def character(match: re.Match[str]) -> str:
        if name := match["pair"] or match["name"]:
            return _ROFF_CHARACTERS.get(name, "")
        single = match["single"] or ""
        return _ROFF_CHARACTERS.get(single, single)

    return _ROFF_ESCAPE.sub(character, line.split('\\"')[0])
