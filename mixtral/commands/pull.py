"""`mixtral pull`: a model from a hub into its cache."""

from __future__ import annotations

from typing import Annotated

import typer

from mixtral.commands.common import bytes_text


def pull(
    name: Annotated[str, typer.Argument(metavar="OWNER/MODEL", help="A model of the hub; @REVISION may follow.")],
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="A branch, tag or commit; default: the main branch.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Of an account that may read it; default HF_TOKEN.")
    ] = None,
) -> None:
    """Fetch a model from Hugging Face's hub, or go on with a fetch that was cut off.

    Only what is needed: configuration, tokenizer, and the weights in one format. They lie in the hub's own cache
    (HF_HOME), where other programs find them too; from then on every command takes OWNER/MODEL for a folder.

    Examples:
    mixtral pull mistralai/Mixtral-8x7B-Instruct-v0.1
    mixtral pull mistralai/Mistral-7B-v0.3@main
    HF_TOKEN=... mixtral pull mistralai/Mixtral-8x22B-v0.1
    """
    from mixtral import hub

    folder = hub.pull(f"{name}@{revision}" if revision else name, token)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file}  {bytes_text(file.stat().st_size)}")
