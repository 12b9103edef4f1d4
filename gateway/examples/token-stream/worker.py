"""Answers questions token by token. Needs PyPI `redis`. Usage: REDIS_URL=redis://… python worker.py

It listens to two rooms with a plain SUBSCRIBE: `ask`, where clients publish {"room": …, "question": …}, and `stop`, where
they publish {"room": …}. It publishes each answer into its own room, one message for each token, and the event `done` at the
end. Nobody has to be in that room: a reader that leaves does not stop an answer. Only a message in `stop` does.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError, TimeoutError

TOKENS = int(os.environ.get("TOKENS", "400"))
PAUSE = float(os.environ.get("PAUSE", "0.02"))


async def generate(question: str) -> AsyncIterator[str]:
    """Stands for your model."""
    yield f"{question}: "
    for number in range(1, TOKENS):
        await asyncio.sleep(PAUSE)
        yield f"{number}, "


async def publish(client: redis.Redis, room: str, number: int, text: str, *options: str) -> None:
    """Publishes one message. The id makes it safe to repeat the call after a lost connection."""
    keys = [f"{{room:{room}}}:log", f"{{room:{room}}}:id:b:{number}"]
    await client.fcall("tidegate_publish", len(keys), *keys, text, "kind", "text", *options)


async def answer(client: redis.Redis, room: str, question: str, stopped: asyncio.Event) -> None:
    number, end = 0, "complete"
    async for token in generate(question):
        if stopped.is_set():
            end = "stopped"
            break
        await publish(client, room, number, token)
        number += 1
    await publish(client, room, number, end, "event", "done")


def payload(message: bytes) -> bytes:
    """What a client has published. A node adds who it was, see broker-bridge/src/redis/envelope.rs."""
    if message[:4] != b"\xf5Tg\x01":
        return message
    fields = int.from_bytes(message[4:6], "big")
    return message[10 + fields :]


async def main() -> None:
    retry = Retry(ExponentialBackoff(cap=1), 8)
    client = redis.Redis.from_url(os.environ["REDIS_URL"], retry=retry, retry_on_error=[ConnectionError, TimeoutError])
    running: dict[str, tuple[asyncio.Task, asyncio.Event]] = {}
    async with client.pubsub() as rooms:
        await rooms.subscribe("room:ask", "room:stop")
        async for message in rooms.listen():
            if message["type"] == "subscribe" and message["channel"] == b"room:stop":
                print("ready", flush=True)
            if message["type"] != "message":
                continue
            try:
                asked = json.loads(payload(message["data"]))
                room, question = str(asked["room"]), str(asked.get("question", ""))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            # A worker that writes wherever clients ask it to would let them write there.
            if not room.startswith("answer:"):
                continue
            if message["channel"] == b"room:ask" and room not in running:
                stopped = asyncio.Event()
                task = asyncio.create_task(answer(client, room, question, stopped))
                task.add_done_callback(lambda _, room=room: running.pop(room))
                running[room] = task, stopped
            elif message["channel"] == b"room:stop" and room in running:
                running[room][1].set()


asyncio.run(main())
