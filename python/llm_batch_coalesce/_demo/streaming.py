"""Asking an OpenAI-compatible server for an answer token by token, as server-sent events."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.upstream import (
    ADVICE_OTHER,
    ADVICE_SERVER_ERROR,
    AsyncExplainer,
    raise_refusal,
    reason_given,
    said_clearly,
    tokens_told,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_DATA: Final = "data:"
_DONE: Final = "[DONE]"


class StreamingExplainer(AsyncExplainer):
    """Explains terms to the tasks of one event loop while the answer is being written."""

    async def stream(self, term: str) -> AsyncGenerator[str, None]:
        """Iterate over the pieces of the answer to what ``term`` means. Closing it hangs up.

        Raises:
            DemoError: The server cannot be reached, refuses, or answers with no whole stream of a chat completion.
        """
        target = self._target
        question = target.question(term) | {"stream": True, "stream_options": {"include_usage": True}}
        tokens = None
        ended = False
        with said_clearly(target):
            async with self._client.stream("POST", target.url, json=question) as response:
                if not response.is_success:
                    await response.aread()
                raise_refusal(response, target)
                try:
                    async for line in response.aiter_lines():
                        if not line.startswith(_DATA):
                            continue
                        data = line.removeprefix(_DATA).strip()
                        if data == _DONE:
                            ended = True
                            break
                        chunk = self._parse(data)
                        tokens = tokens_told(chunk) if tokens is None else tokens
                        piece, stops = _piece(chunk)
                        ended = ended or stops
                        if piece:
                            yield piece
                finally:
                    # A reader that leaves early is not told.
                    self._tally.used(tokens)
        if not ended:
            message = f"{target.url} answered with something that is no whole stream of an answer; {ADVICE_OTHER}"
            raise DemoError(message)

    def _parse(self, data: str) -> dict[str, Any]:
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            message = f"{self._target.url} sent an event that is no part of an answer; {ADVICE_OTHER}"
            raise DemoError(message)
        if chunk.get("error") is not None:
            reason = reason_given(chunk) or "it does not say why"
            message = f"{self._target.url} broke the answer off ({reason}); {ADVICE_SERVER_ERROR}"
            raise DemoError(message)
        return chunk


def _piece(chunk: dict[str, Any]) -> tuple[str, bool]:
    """Return the text in a chunk, which may have none, and whether it says that the answer ends."""
    try:
        choice = chunk["choices"][0]
        text = choice["delta"].get("content")
        return text if isinstance(text, str) else "", choice.get("finish_reason") is not None
    except (AttributeError, LookupError, TypeError):
        return "", False
