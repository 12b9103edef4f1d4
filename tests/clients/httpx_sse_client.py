"""A server-sent events client: PyPI `httpx-sse`. Usage: python httpx_sse_client.py URL

Uses the line protocol of lines.mjs: events on standard output. It exits at the end of its input.
"""

import asyncio
import base64
import json
import sys

import httpx
from httpx_sse import aconnect_sse


def report(**happening: object) -> None:
    print(json.dumps(happening), flush=True)


async def listen() -> None:
    async with (
        httpx.AsyncClient(timeout=None) as client,
        aconnect_sse(client, "GET", sys.argv[1]) as source,
    ):
        if source.response.status_code != 200:
            report(on="refused", status=source.response.status_code)
            return
        report(on="open")
        async for event in source.aiter_sse():
            data = base64.b64encode(event.data.encode()).decode()
            report(on="message", event=event.event, id=event.id, kind="text", data=data)
        report(on="close")


async def main() -> None:
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    listening = asyncio.create_task(listen())
    leaving = asyncio.create_task(commands.read())
    await asyncio.wait({listening, leaving}, return_when=asyncio.FIRST_COMPLETED)
    listening.cancel()
    leaving.cancel()


asyncio.run(main())
