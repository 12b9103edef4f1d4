"""The Centrifuge SDK for Python, as published: PyPI `centrifuge-python`.

Usage: python centrifuge_client.py URL ROOM TOKEN [NEXT_TOKEN]. Reports the same events as centrifuge.mjs.
"""

import asyncio
import base64
import json
import sys

from centrifuge import CentrifugeError, Client, ClientEventHandler, SubscriptionEventHandler


def report(**happening: object) -> None:
    print(json.dumps(happening), flush=True)


def tell(event: str, value: object) -> None:
    data = json.dumps(value, separators=(",", ":")).encode()
    report(on="message", event=event, kind="text", data=base64.b64encode(data).decode())


class ClientEvents(ClientEventHandler):
    async def on_disconnected(self, ctx) -> None:
        report(on="close", code=ctx.code, reason=ctx.reason)


class SubscriptionEvents(SubscriptionEventHandler):
    async def on_subscribed(self, ctx) -> None:
        report(on="open")
        if ctx.was_recovering:
            tell("recovered", ctx.recovered)

    async def on_subscribing(self, ctx) -> None:
        if ctx.code != 0:
            report(on="interrupted")

    async def on_publication(self, ctx) -> None:
        tell((ctx.pub.tags or {}).get("event", "message"), ctx.pub.data)

    async def on_unsubscribed(self, ctx) -> None:
        if ctx.code != 0:
            report(on="close", code=ctx.code, reason=ctx.reason)


async def main() -> None:
    url, room, token, *next_token = sys.argv[1:]

    async def get_token() -> str:
        tell("refresh", 1)
        return next_token[0] if next_token else token

    client = Client(
        url,
        events=ClientEvents(),
        token=token,
        get_token=get_token,
        min_reconnect_delay=0.02,
        max_reconnect_delay=0.5,
    )
    subscription = client.new_subscription(
        room, SubscriptionEvents(), min_resubscribe_delay=0.02, max_resubscribe_delay=0.5
    )
    await client.connect()
    await subscription.subscribe()

    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader(limit=16 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async for line in commands:
        value = json.loads(base64.b64decode(json.loads(line)["data"]))
        try:
            await subscription.publish(value)
        except CentrifugeError as error:
            tell("error", getattr(error, "code", str(error)))
    await client.disconnect()


asyncio.run(main())
