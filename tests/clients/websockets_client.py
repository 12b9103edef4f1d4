"""A plain WebSocket client: PyPI `websockets`. Usage: python websockets_client.py URL [deflate]

With `deflate` it requires permessage-deflate, with the library's defaults (a window of 12 bits).

Uses the line protocol of lines.mjs: commands on standard input, events on standard output.
"""

import asyncio
import base64
import json
import sys

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus


def report(**happening: object) -> None:
    print(json.dumps(happening), flush=True)


async def listen(socket) -> None:
    try:
        while True:
            message = await socket.recv()
            kind, data = ("text", message.encode()) if isinstance(message, str) else ("binary", message)
            report(on="message", event="message", kind=kind, data=base64.b64encode(data).decode())
    except ConnectionClosed:
        report(on="close", code=socket.close_code, reason=socket.close_reason)


async def obey(socket) -> None:
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader(limit=16 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async for line in commands:
        command = json.loads(line)
        data = base64.b64decode(command["data"])
        await socket.send(data if command["kind"] == "binary" else data.decode())
    await socket.close()


async def main() -> None:
    try:
        compression = sys.argv[2] if len(sys.argv) > 2 else None
        async with connect(sys.argv[1], compression=compression, max_size=None) as socket:
            if compression and not socket.protocol.extensions:
                raise RuntimeError("no compression was agreed on")
            report(on="open")
            obeying = asyncio.create_task(obey(socket))
            await listen(socket)
            obeying.cancel()
    except InvalidStatus as refusal:
        report(on="refused", status=refusal.response.status_code)


asyncio.run(main())
