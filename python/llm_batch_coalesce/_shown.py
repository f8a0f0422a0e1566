"""How values read in messages."""


def shown(value: object) -> str:
    """Show enough of a value to recognise it: keys may hold whole prompts, and a `__repr__` may be broken."""
    limit = 80
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - it must not hide the error that this is for
        text = f"an object of type {type(value).__qualname__}"
    return text if len(text) <= limit else f"{text[:limit]}..."
