"""A program: what listens on a port of loopback, at another address, and slower.

python slow_link.py ADDRESS PORT PORT_BEHIND LATENCY_S
"""

import asyncio
import contextlib
import sys
import time


async def slow_link(host: str, port: int, behind: int, latency_s: float) -> None:
    """Serves what listens on a port of loopback at another address, each answer `latency_s` late,
    however many are on their way.
    """

    async def forward(reader, writer, delay: float) -> None:
        sent: asyncio.Queue = asyncio.Queue()

        async def deliver() -> None:
            while item := await sent.get():
                due, data = item
                await asyncio.sleep(due - time.monotonic())
                writer.write(data)
                await writer.drain()
            writer.close()

        delivering = asyncio.create_task(deliver())
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 18):
                sent.put_nowait((time.monotonic() + delay, data))
        sent.put_nowait(None)
        with contextlib.suppress(ConnectionError):
            await delivering

    async def serve(reader, writer) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", behind)
        await asyncio.gather(
            forward(reader, there_writer, 0.0), forward(there_reader, writer, latency_s)
        )

    async with await asyncio.start_server(serve, host, port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(slow_link(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
