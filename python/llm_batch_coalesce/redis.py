"""Coalescing across processes and machines, on a Redis or Valkey server: one call in the whole fleet.

    from redis import Redis

    from llm_batch_coalesce.redis import DistributedBatchCoalescer

    coalescer = DistributedBatchCoalescer(Redis.from_url("rediss://..."), ttl_seconds=5.0)
    coalescer.get_or_call(key=f"define:{term}", fn=lambda: call_llm(f"Define '{term}' in one sentence."))

Callers of one process coalesce on its own map; for each flight one of them talks to the server. Needs the extra
`redis`.

An ACL user needs, for a namespace NAME and a database 0:

    ~NAME:* &NAME:0:* +evalsha +eval +get +set +del +rename +pttl +pexpire +hget +hmget +hset +hdel +hkeys +publish
    +subscribe +ping, +info to tell of an old server or a replica, +select for another database, and for clusters
    +cluster|slots +command
"""

from llm_batch_coalesce._errors import BackendError, RemoteCallError, SerializationError
from llm_batch_coalesce._fleet_options import FleetStats
from llm_batch_coalesce._fleet_wire import JsonSerializer, Serializer
from llm_batch_coalesce._redis_async import AsyncDistributedBatchCoalescer
from llm_batch_coalesce._redis_sync import DistributedBatchCoalescer

__all__ = [
    "AsyncDistributedBatchCoalescer",
    "BackendError",
    "DistributedBatchCoalescer",
    "FleetStats",
    "JsonSerializer",
    "RemoteCallError",
    "SerializationError",
    "Serializer",
]
