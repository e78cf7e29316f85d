"""Parse the arguments of the commands of this package."""

from __future__ import annotations

import argparse


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """Build a parser whose help shows the module's docstring as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{command}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
