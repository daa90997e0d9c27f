"""The command ``mechdiffusers``."""

import subprocess
import sys

import pytest

from mechdiffusers.cli import main


def test_help_names_the_commands_and_imports_nothing_heavy():
    script = """
import sys
from mechdiffusers.cli import main
try:
    main(["--help"])
finally:
    assert not {"torch", "numpy", "diffusers", "datasets"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "design" in done.stdout


def test_no_command_shows_the_help_and_is_an_error(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main([])
    assert "design" in capsys.readouterr().err


def test_an_unknown_command_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(["desing"])
    assert "choose from" in (error := capsys.readouterr().err)
    assert "design" in error


def test_a_command_shows_its_own_help(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["design", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: mechdiffusers design ")
    assert "--num_rounds" in shown
