"""What the docs name exists."""

from __future__ import annotations

import re

from repository import ROOT

TABLE = ROOT / "docs" / "compatibility.md"


def test_the_tests_of_the_table_of_compatibility_exist():
    file, named = None, 0
    for where in re.findall(r"`([\w/.]+?\.py|\.\.\.)((?:::\w+)?)`", TABLE.read_text()):
        path, test = where
        file = ROOT / "tests" / path if path != "..." else file
        assert file is not None
        assert file.is_file(), path
        if test:
            assert f"\ndef {test.removeprefix('::')}(" in file.read_text(), where
        named += 1
    assert named > 40
