"""What the package shows: its names, signatures, types and docs."""

import ast
import doctest
import importlib.metadata
import inspect
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llm_batch_coalesce
from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, _async, _core, _requests, _shapes, _sync

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    )
]


def test_all_names_exactly_the_public_names():
    public = {
        name
        for name, value in vars(llm_batch_coalesce).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(llm_batch_coalesce.__all__) == public | {"__version__"}


def documented():
    """The docs of compiled names as editors show them."""
    core = ast.parse(Path(_core.__file__).with_name("_core.pyi").read_text())
    for node in core.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            yield from (
                (f"{node.name}.{member.name}", member) for member in node.body if isinstance(member, ast.FunctionDef)
            )


def test_help_shows_what_editors_show():
    texts = {name: ast.get_docstring(node) for name, node in documented() if ast.get_docstring(node)}
    of_tasks = ("Signal", "StreamReader", "StreamSource", "Ticket", "Token")  # for the package alone
    shown = {name: text for name, text in texts.items() if name.split(".")[0] not in of_tasks}
    assert len(shown) > 15
    for name, text in shown.items():
        assert operator.attrgetter(name)(_core).__doc__ == text, name


def test_the_version_is_that_of_the_distribution():
    assert llm_batch_coalesce.__version__ == importlib.metadata.version("llm-batch-coalesce") == _core.__version__


def test_the_package_requires_no_other():
    required = importlib.metadata.requires("llm-batch-coalesce") or []
    assert [requirement for requirement in required if "extra ==" not in requirement] == []


@pytest.mark.parametrize("kind", [BatchCoalescer, AsyncBatchCoalescer])
def test_signatures_read_as_documented(kind):
    assert str(inspect.signature(kind)).startswith("(ttl_seconds")
    for method in kind.get_or_call, kind.outcome:
        assert list(inspect.signature(method).parameters) == ["self", "key", "fn", "timeout", "ttl_seconds"]
    assert "retained" in kind.get_or_call.__doc__


def test_both_kinds_have_the_same_methods():
    def methods(kind):
        return {name for name in dir(kind) if not name.startswith("_")} - {"as_async", "as_sync"}

    assert methods(BatchCoalescer) == methods(AsyncBatchCoalescer)


def test_an_async_call_is_a_coroutine_so_that_it_can_be_a_task():
    assert inspect.iscoroutinefunction(AsyncBatchCoalescer.get_or_call)


@pytest.mark.parametrize("module", [_sync, _async, _requests, _shapes])
def test_the_examples_in_the_docs_hold(module):
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("block", BLOCKS)
def test_every_python_block_of_the_docs_runs(block, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(block)
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_docs_have_examples():
    assert len(BLOCKS) >= 9


@pytest.mark.skipif("free-threading" not in sys.version, reason="only a free-threaded build has the GIL to turn on")
def test_the_gil_is_off_after_import():
    program = "import sys, llm_batch_coalesce; print(sys._is_gil_enabled())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=50, check=False
    )
    assert (ended.stdout, ended.stderr) == ("False\n", "")
