"""The command that serves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from openlance.cli.options import option
from openlance.errors import InputError
from openlance.serve.settings import ServeConfig


def serve(
    *,
    config: ServeConfig,
    key_file: Annotated[
        Path | None, option("A file with hashes of API keys, one a line, beside those of --api-keys.")
    ] = None,
    new_key: Annotated[bool, option("Only make an API key: print it, once, and its hash.")] = False,
) -> None:
    """Serve a model over HTTP, in the shapes of OpenAI's API, with a web page.

    The addresses go to stdout, the log to stderr, as JSON. Ctrl-C and SIGTERM let accepted jobs finish.

    For example:
      openlance serve
      openlance serve --model weights --variant Lance_3B_Video --devices cuda:0 cuda:1
      openlance serve --adapters shapes runs/shapes/adapter
      openlance serve --new-key
      openlance serve --host 0.0.0.0 --key-file keys.txt
    """
    if new_key:
        _print_key()
        return
    try:
        from openlance.serve.run import run
        from openlance.serve.security import read_key_file
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs {error.name}: pip install 'openlance[serve]'") from error
    if key_file is not None:
        config = replace(config, api_keys=(*config.api_keys, *read_key_file(key_file)))
    run(config)


def _print_key() -> None:
    from openlance.serve.security import new_key

    key, hashed = new_key()
    print(f"key   {key}\nhash  {hashed}")
