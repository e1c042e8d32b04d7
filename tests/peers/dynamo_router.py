"""A real Dynamo KV router (0.1; 0.4 to 0.7) that routes a few 640-token requests to NAMESPACE.backend.generate.

Usage: dynamo_router.py NAMESPACE [REQUESTS]. Each request makes one kv-hit-rate event. A worker must be running.
Prints one line a request, as soon as its event is out.
"""

import argparse
import asyncio
import inspect

import dynamo.llm as llm
import dynamo.runtime as runtime

BLOCK_SIZE = 16
TOKENS = list(range(640))

parser = argparse.ArgumentParser(prog="dynamo router RELEASE", description=__doc__.splitlines()[0])
parser.add_argument("namespace")
parser.add_argument("requests", nargs="?", type=int, default=5)
args = parser.parse_args()


async def settled(value):
    """Calls that are plain in one release are coroutines in another."""
    return await value if inspect.isawaitable(value) else value


def connect():
    loop = asyncio.get_running_loop()
    try:
        return runtime.DistributedRuntime(loop, False)
    except TypeError:  # later releases want the discovery named
        return runtime.DistributedRuntime(loop, "etcd", False)


async def schedule(component):
    """0.1: the router only says where a request would go."""
    router = llm.KvRouter(component, BLOCK_SIZE)
    await asyncio.sleep(2)  # the router's own first look at the workers, which it announces nowhere
    for _ in range(args.requests):
        print("routed to", await settled(router.schedule(TOKENS, 0)), flush=True)


async def push(endpoint):
    """0.4 and later: the router sends the request too. The worker's answer is no LLM output; the event is out all the same."""
    router = llm.KvPushRouter(endpoint, BLOCK_SIZE, llm.KvRouterConfig())
    await asyncio.sleep(2)

    async def request():
        async for _ in await settled(router.generate(TOKENS, "model")):
            pass

    for _ in range(args.requests):
        try:
            await asyncio.wait_for(request(), 2)
            print("answered", flush=True)
        except Exception as error:
            print("answered:", str(error)[:80], flush=True)


async def main():
    component = connect().namespace(args.namespace).component("backend")
    if hasattr(llm, "KvPushRouter"):
        await push(component.endpoint("generate"))
    else:
        await schedule(component)


asyncio.run(main())
