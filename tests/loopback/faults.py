"""A proxy in front of NDIF's API and object store that does harm by a schedule: one entry of it for each HTTP request, in the order they come.

Knows HTTP/1.1 and websocket framing, nothing of NDIF. Runs in a thread of its own, on 127.0.0.1.
"""

import asyncio
import itertools
import threading

FAULTS = ("drop", "drop_reply", "delay", "truncate", "500", "garbage")
ERROR = b'{"detail":"Internal server error."}'
GARBAGE = b"<html>not what was asked for</html>"


def page(status, kind, body):
    return b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, kind, len(body), body)


def header(head, name):
    found = [line.split(b":", 1)[1].strip() for line in head.split(b"\r\n")[1:] if line.lower().startswith(name + b":")]
    return found[0] if found else b""


class Faults:
    """`plan(faults)` sets the schedule; `injected` lists what was done, as (fault, method, path).

    drop: closed before the request reaches the server. drop_reply: the server gets it, its reply is cut (a websocket: right after the handshake).
    delay: `pause` seconds before it is passed on. truncate: half of the reply's body under the full Content-Length (a websocket: half of its second
    frame). 500 and garbage are answered here, the server sees nothing. None in a schedule lets a request pass. `seen` lists every request.
    """

    def __init__(self, pause=0.2):
        self.pause = pause
        self.injected = []
        self.seen = []
        self.listening = []
        self.loop = None
        self.plan(())

    def plan(self, faults, only=None):
        """`faults` is an iterable of names and None; `only(method, path)` says which requests take one (default: every one)."""
        self.schedule, self.only = iter(faults), only or (lambda method, path: True)

    def start(self, upstreams):
        """Listen in front of each named port; `host` and `store` become the addresses a client uses."""
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True, name="faults")
        self.thread.start()
        ports = {name: asyncio.run_coroutine_threadsafe(self.listen(port), self.loop).result() for name, port in upstreams.items()}
        self.host, self.store = f"http://127.0.0.1:{ports['api']}", f"http://127.0.0.1:{ports['store']}"

    def stop(self):
        if self.loop is not None:
            asyncio.run_coroutine_threadsafe(self.close(), self.loop).result()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()
            self.loop = None

    async def listen(self, upstream):
        server = await asyncio.start_server(lambda reader, writer: self.serve(reader, writer, upstream), "127.0.0.1", 0)
        self.listening.append(server)
        return server.sockets[0].getsockname()[1]

    async def close(self):
        for server in self.listening:
            server.close()
        self.listening.clear()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def serve(self, reader, writer, upstream):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(header(head, b"content-length") or 0))
            method, path = (part.decode() for part in head.split(b" ", 2)[:2])
            self.seen.append((method, path))
            fault = next(self.schedule, None) if self.only(method, path) else None
            if fault is not None:
                if fault not in FAULTS:
                    raise ValueError(f"{fault!r} is no fault; there are {', '.join(FAULTS)}")
                self.injected.append((fault, method, path))
            if fault == "delay":
                await asyncio.sleep(self.pause)
            if fault == "500":
                writer.write(page(b"500 Internal Server Error", b"application/json", ERROR))
            elif fault == "garbage":
                writer.write(page(b"200 OK", b"text/html", GARBAGE))
            elif fault != "drop":
                relay = self.websocket if header(head, b"upgrade").lower() == b"websocket" else self.http
                await relay(head, body, fault, reader, writer, upstream)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # either side has gone
        finally:
            writer.close()

    async def http(self, head, body, fault, reader, writer, upstream):
        lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")]
        from_server, to_server = await asyncio.open_connection("127.0.0.1", upstream)
        try:
            to_server.write(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
            await to_server.drain()
            reply = await from_server.read()
        finally:
            to_server.close()
        if fault == "drop_reply":
            return
        if fault == "truncate":
            start = reply.index(b"\r\n\r\n") + 4
            reply = reply[: start + (len(reply) - start) // 2]
        writer.write(reply)

    async def websocket(self, head, body, fault, reader, writer, upstream):
        from_server, to_server = await asyncio.open_connection("127.0.0.1", upstream)

        async def pass_up():
            while data := await reader.read(65536):
                to_server.write(data)
                await to_server.drain()

        async def pass_down():
            for frame in itertools.count(1):
                data = await self.frame(from_server)
                cut = fault == "truncate" and frame == 2
                writer.write(data[: len(data) // 2] if cut else data)
                await writer.drain()
                if cut:
                    return

        try:
            to_server.write(head + body)
            opened = await from_server.readuntil(b"\r\n\r\n")
            if fault == "drop_reply":
                return
            writer.write(opened)
            ways = [asyncio.ensure_future(pass_up()), asyncio.ensure_future(pass_down())]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            to_server.close()

    @staticmethod
    async def frame(reader):
        """One frame as a server sends it: unmasked."""
        start = await reader.readexactly(2)
        length = start[1] & 127
        more = {126: 2, 127: 8}.get(length, 0)
        long = await reader.readexactly(more)
        return start + long + await reader.readexactly(int.from_bytes(long, "big") if more else length)
