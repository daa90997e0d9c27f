"""The code of the tutorial runs as it stands on the page, and what it asserts is true."""

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs" / "tutorial").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_of_the_tutorial_runs_from_top_to_bottom(page):
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    assert "assert" in code
    exec(compile(code, page.name, "exec"), {"__name__": page.stem})
