"""The one error that the demo shows to its user."""


class DemoError(Exception):
    """The demo cannot go on; the message is one line that says what happened and what to do."""
