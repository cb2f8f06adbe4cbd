"""NDIF's own API app with its key database replaced by a dictionary; runs in the server's environment only.

The policy (401 no key, 400 not a key, 403 unknown key, trusted or sandboxed) stays NDIF's; only the rows that Postgres would return are given here.
"""

import json
import os

from ndif.common.providers.postgres import PostgresProvider

KEYS = json.loads(os.environ["LOOPBACK_KEYS"])  # key -> its tags ("trusted", "priority")


async def fetch(query, key):
    tags = KEYS.get(str(key))
    return [] if tags is None else [{"user_id": "loopback", "email": "test@loopback", "user_tag": tag} for tag in tags or [None]]


PostgresProvider.enabled = staticmethod(lambda: True)
PostgresProvider.fetch = staticmethod(fetch)

from ndif.services.api.app import app  # noqa: E402, F401
