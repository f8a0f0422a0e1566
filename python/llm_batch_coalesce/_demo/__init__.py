"""``python -m llm_batch_coalesce demo``: a sidebar that explains a word to everyone who hovers over it.

Fifty readers hover over finance terms; each hover asks a language model, over real HTTP, what the term means. The same
hovers are replayed by threads and by asyncio tasks, each once without and once with the coalescer.

- ``cli`` and ``options``: arguments, exit codes. Nothing in them needs the ``demo`` extra, the rest does.
- ``trace`` and ``glossary``: who hovers over what, and when.
- ``provider``: the stand-in for a model provider; ``stand_in`` runs it in a process of its own.
- ``upstream``: the HTTP clients, sync and async, and what they say when a server misbehaves.
- ``replay``: the threads and the tasks. ``windows``: the most calls that a run may make.
- ``story`` runs it all, ``progress`` and ``report`` show it on the ``output``.

With ``--stream``, fifty readers watch one answer being written, once each as a stream of its own and once as one.

- ``audience``: who comes late, is slow, or leaves early. ``reading``: the tasks, and the board of what they have read.
- ``streaming``: the HTTP client of streamed answers.
- ``stream_story`` runs it all, ``stream_view`` shows it.
"""
