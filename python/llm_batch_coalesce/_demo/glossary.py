"""The finance terms that readers hover over, with the definitions that the stand-in answers."""

from __future__ import annotations

import json
from importlib import resources


def load_glossary() -> dict[str, str]:
    """Return the definition of every term, in alphabetical order of the terms."""
    text = resources.files("llm_batch_coalesce._demo").joinpath("glossary.json").read_text(encoding="utf-8")
    glossary: dict[str, str] = json.loads(text)
    return glossary
