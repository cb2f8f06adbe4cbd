"""A rank beyond the first of a tensor-parallel replica, on the CPU: NDIF's own shard, which may be reached over TCP (`--socket=HOST:PORT`)."""

import socket
import sys
import types

import cpu_only  # noqa: F401
import ndif.services.ray.tp.shard as shard


class Wire(socket.socket):
    """A socket in the file system, or over TCP where its path is HOST:PORT."""

    def __init__(self, _family, kind):
        self.wide = not any(word.startswith("--socket=/") for word in sys.argv)
        super().__init__(socket.AF_INET if self.wide else socket.AF_UNIX, kind)

    def connect(self, path):
        host, _, port = path.rpartition(":")
        super().connect((host, int(port)) if self.wide else path)


if __name__ == "__main__":
    shard.socket = types.SimpleNamespace(AF_UNIX=socket.AF_UNIX, SOCK_STREAM=socket.SOCK_STREAM, socket=Wire)
    sys.exit(shard.main())
