"""A client that polls: PyPI `httpx`. Usage: python long_poll_client.py URL…

It polls the URLs in turn, over connections that it keeps. Each request continues at the cursor of the last answer. Uses the
line protocol of lines.mjs: events on standard output. It exits at the end of its input.
"""

import asyncio
import base64
import itertools
import json
import sys

import httpx


def report(**happening: object) -> None:
    print(json.dumps(happening), flush=True)


def report_message(event: str, ident: str, text: str) -> None:
    report(on="message", event=event, id=ident, kind="text", data=base64.b64encode(text.encode()).decode())


async def listen() -> None:
    headers = {"Accept": "application/json"}
    async with httpx.AsyncClient(timeout=None, headers=headers) as client:
        cursor = None
        for url in itertools.cycle(sys.argv[1:]):
            since = f"&since={cursor}&wait=20" if cursor else ""
            response = await client.get(url + since)
            if response.status_code != 200:
                report(on="refused", status=response.status_code)
                return
            answer = response.json()
            if cursor is None:
                report(on="open")
            if answer["gap"]:
                report_message("tidegate.gap", "", answer["gap"])
            for message in answer["messages"]:
                report_message("message", message.get("id", ""), message["data"])
            cursor = answer["cursor"]


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
