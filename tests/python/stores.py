"""Stores of the kinds that `store=` takes, which note what they are asked and told."""


class TtlStore:
    """Its `get` takes no default, and its `set` a TTL."""

    def __init__(self, **values):
        self.values, self.asked, self.told = values, [], []

    def get(self, key):
        self.asked.append(key)
        return self.values.get(key)

    def set(self, key, value, ttl_seconds):
        self.told.append((key, value, ttl_seconds))
        self.values[key] = value


class DefaultStore(TtlStore):
    """Its `get` takes a default."""

    def get(self, key, default=None):
        self.asked.append(key)
        return self.values.get(key, default)


class KeywordStore(TtlStore):
    """The same, by keyword only."""

    def get(self, key, *, default=None):
        self.asked.append(key)
        return self.values.get(key, default)


class MappingStore(DefaultStore):
    """A mapping, which is told no TTL."""

    set = None

    def __setitem__(self, key, value):
        self.told.append((key, value))
        self.values[key] = value


class AsyncStore(TtlStore):
    """One to be awaited."""

    async def get(self, key):
        return super().get(key)

    async def set(self, key, value, ttl_seconds):
        super().set(key, value, ttl_seconds)


class AwaitableStore(TtlStore):
    """One that does not say that it is to be awaited."""

    def get(self, key):
        return self._later(super().get(key))

    def set(self, key, value, ttl_seconds):
        return self._later(super().set(key, value, ttl_seconds))

    async def _later(self, value):
        return value


class BrokenStore(TtlStore):
    """One that fails."""

    def __init__(self, errors, **values):
        super().__init__(**values)
        self.errors = errors

    def get(self, key):
        if "get" in self.errors:
            raise self.errors["get"]
        return super().get(key)

    def set(self, key, value, ttl_seconds):
        if "set" in self.errors:
            raise self.errors["set"]
        super().set(key, value, ttl_seconds)


class AsyncBrokenStore(BrokenStore):
    """The same, to be awaited."""

    async def get(self, key):
        return super().get(key)

    async def set(self, key, value, ttl_seconds):
        super().set(key, value, ttl_seconds)
