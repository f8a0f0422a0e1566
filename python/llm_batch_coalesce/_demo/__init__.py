"""``python -m llm_batch_coalesce demo``: a sidebar that explains a word to everyone who hovers over it.

Fifty readers hover over finance terms; each hover asks a language model, over real HTTP, what the term means. The same
hovers are replayed by threads and by asyncio tasks, each once without and once with the coalescer.

- ``cli`` and ``options``: arguments, exit codes. Nothing in them needs the ``demo`` extra, the rest does.
- ``trace`` and ``glossary``: who hovers over what, and when.
- ``provider``: the stand-in for a model provider; ``stand_in`` runs it in a process of its own, a ``child``.
- ``upstream``: the HTTP clients, sync and async, and what they say when a server misbehaves.
- ``replay``: the threads and the tasks. ``windows``: the most calls that a run may make.
- ``story`` runs it all, ``progress`` and ``report`` show it on the ``output``.

With ``--stream``, fifty readers watch one answer being written, once each as a stream of its own and once as one.

- ``audience``: who comes late, is slow, or leaves early. ``reading``: the tasks, and the board of what they have read.
- ``streaming``: the HTTP client of streamed answers.
- ``stream_story`` runs it all, ``stream_view`` shows it.

With ``--distributed``, the readers are those of several processes, each for itself and then all as one fleet.

- ``worker``: such a process, with threads or tasks. ``crew``: all of them, as the demo sees them.
- ``server_host``: the Valkey or Redis server, if the demo starts one. ``fleet_server``: the one that is shared on.
- ``fleet_story`` runs it all.
"""
