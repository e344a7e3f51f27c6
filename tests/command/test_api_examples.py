"""The examples in the docstrings of the public functions, run as they stand."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest

import gradpipe

_FUNCTIONS = [name for name in gradpipe.__all__ if inspect.isfunction(getattr(gradpipe, name))]
_FIRST = "collect"  # its example makes the store that others read


def _run(name: str) -> doctest.TestResults:
    function = getattr(gradpipe, name)
    parsed = doctest.DocTestParser().get_doctest(inspect.getdoc(function) or "", {}, name, None, 0)
    assert parsed.examples, f"{name} has no example"
    runner = doctest.DocTestRunner()
    runner.run(parsed)
    return runner.summarize(verbose=False)


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_every_public_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    """`Args`, `Returns`, `Raises` and an example, each argument by name."""
    function = getattr(gradpipe, name)
    text = inspect.getdoc(function) or ""
    for title in ("Args:", "Returns:", "Raises:", "Example:"):
        assert f"\n{title}\n" in text, f"{name}: {title}"
    for argument in inspect.signature(function).parameters:
        assert f"\n    {argument}: " in text, f"{name}: {argument}"


def test_the_examples_run_and_give_what_they_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one folder, the collection first."""
    monkeypatch.chdir(tmp_path)
    for name in (_FIRST, *(name for name in _FUNCTIONS if name != _FIRST)):
        assert _run(name).failed == 0, name
