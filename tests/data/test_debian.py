from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from mixtral.data.debian import debian_files, html_text, language_of, read_debian, roff_text
from mixtral.data.readers import BadInput
from mixtral.errors import DataError

PAGE = r""".\" a comment
.TH LS 1
.SH "NAME"
ls \- list \fBdirectory\fP contents
.PP
.BR ls " [" \-a ]
\(coFSF \[em] \s-1small\s0 caf\('e
"""


def test_roff() -> None:
    lines = ["", "NAME", "ls - list directory contents", "", "ls [-a]", "©FSF — small caf"]
    assert roff_text(PAGE).splitlines() == lines
    assert roff_text(".so man1/ls.1\n") == ""


def test_html() -> None:
    page = "<html><head><title>t</title></head><body><p>One <b>two</b></p><script>x()</script><li>three</body>"
    assert html_text(page).strip() == "One two\nthree"


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("/usr/share/man/man1/ls.1.gz", "en"),
        ("/usr/share/man/de/man1/ls.1.gz", "de"),
        ("/usr/share/man/pt_BR/man1/ls.1.gz", "pt"),
        ("/usr/share/debian-reference/ch01.fr.html", "fr"),
        ("/usr/share/doc/debian-handbook/html/it-IT/a.html", "it"),
    ],
)
def test_language(name: str, language: str) -> None:
    assert language_of(name) == language


def test_files_of_a_system(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt install"):
        debian_files(tmp_path)
    page = tmp_path / "usr/share/man/de/man1/ls.1.gz"
    page.parent.mkdir(parents=True)
    page.write_bytes(gzip.compress(PAGE.encode()))
    assert debian_files(tmp_path) == [page]
    assert read_debian(page, BadInput()).startswith("NAME\nls - list")
    page.write_bytes(gzip.compress(PAGE.encode())[:-12])
    with pytest.raises(DataError, match=r"ls\.1\.gz: cannot be read"):
        read_debian(page, BadInput())
    bad = BadInput(skip=True)
    assert read_debian(page, bad) == "" and bad.count == 1
