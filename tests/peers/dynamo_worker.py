"""A real Dynamo worker, of whatever `ai-dynamo-runtime` release this interpreter has, that reports fixed load.

Needs NATS_SERVER and ETCD_ENDPOINTS up to 0.7. From 0.8 on the planes are chosen by DYN_DISCOVERY_BACKEND (etcd, kubernetes,
file), DYN_REQUEST_PLANE and DYN_EVENT_PLANE; where none of them is nats, leave NATS_SERVER unset: a worker that has it insists on it.
Prints one line, `ready worker_id=<decimal>`, once its numbers are out.
"""

import argparse
import asyncio
import inspect
import json
import os
import pathlib
import tempfile

import dynamo.llm as llm
import dynamo.runtime as runtime


def options():
    parser = argparse.ArgumentParser(prog="dynamo worker RELEASE", description=__doc__.splitlines()[0])
    parser.add_argument("--namespace", default="dynamo")
    parser.add_argument("--component", default="backend")
    parser.add_argument("--endpoint", default="generate")
    load = parser.add_argument_group("load")
    load.add_argument("--active-slots", type=int, default=58)
    load.add_argument("--total-slots", type=int, default=100)
    load.add_argument("--kv-active", type=int, default=77)
    load.add_argument("--kv-total", type=int, default=100)
    load.add_argument("--waiting", type=int, default=3)
    load.add_argument("--cache-usage", type=float, default=0.77)
    load.add_argument("--hit-rate", type=float, default=0.25)
    load.add_argument("--dp-rank", type=int, default=None)
    load.add_argument("--flip", action="store_true",
                      help="move kv-active by one, up and down, twice a second: from 0.6 on a worker speaks only on change")
    load.add_argument("--fpm", action="store_true", help="1.6: publish forward-pass-metrics too")
    load.add_argument("--fpm-id", metavar="ID", help="1.6: under that worker id; the engine of a snapshot has an empty one")
    load.add_argument("--publish-only", action="store_true",
                      help="1.6: publish forward-pass-metrics and register no endpoint, as the nodes of an engine beside its first")
    card = parser.add_argument_group("model card (0.4 and later)")
    card.add_argument("--model", help="publish a card under this name, with kv-total and total-slots as the engine's limits")
    card.add_argument("--block-size", type=int, default=16, help="tokens in a KV block")
    card.add_argument("--ranks", type=int, default=1, help="data-parallel size")
    return parser.parse_args()


args = options()


async def settled(value):
    """Calls that are plain in one release are coroutines in another."""
    return await value if inspect.isawaitable(value) else value


async def answer(request, context=None):
    yield "x"


def first_that_fits(call, *candidates):
    """Signatures changed from release to release: take the first arguments that are accepted."""
    refused = None
    for candidate in candidates:
        try:
            return call(*candidate)
        except TypeError as error:
            refused = error
    raise refused


def connect():
    loop = asyncio.get_running_loop()
    discovery, requests = os.environ.get("DYN_DISCOVERY_BACKEND", "etcd"), os.environ.get("DYN_REQUEST_PLANE", "nats")
    if discovery == "kv_store":  # 0.7 - 0.9: the components read another variable, and hand its value over
        discovery = os.environ.get("DYN_STORE_KV", "etcd")
    without_nats = "nats" not in (requests, os.environ.get("DYN_EVENT_PLANE", "nats"))
    newest = (loop, discovery, requests, False) if without_nats else (loop, discovery, requests)
    return first_that_fits(runtime.DistributedRuntime, (loop, False), (loop, discovery, False), newest)


async def place(drt):
    """The endpoint, and the component that holds it in the releases that know components."""
    if not hasattr(drt, "namespace"):
        return drt.endpoint(f"{args.namespace}.{args.component}.{args.endpoint}"), None
    component = drt.namespace(args.namespace).component(args.component)
    if hasattr(component, "create_service"):
        await settled(component.create_service())
    return component.endpoint(args.endpoint), component


def publish(publisher):
    if hasattr(llm, "ForwardPassMetrics"):
        worker = llm.WorkerStats(args.active_slots, args.total_slots, args.waiting, args.dp_rank)
        kv = llm.KvStats(args.kv_active, args.kv_total, args.cache_usage, args.hit_rate)
        publisher.publish(llm.ForwardPassMetrics(worker, kv, None))
    elif hasattr(llm, "KvMetricsPublisher"):
        publisher.publish(args.active_slots, args.total_slots, args.kv_active, args.kv_total,
                          args.waiting, args.cache_usage, args.hit_rate)
    else:  # dp_rank, active_decode_blocks[, kv_used_blocks]
        first_that_fits(publisher.publish, (args.dp_rank, args.kv_active, args.kv_active), (args.dp_rank, args.kv_active))


def pass_publisher(endpoint):
    return llm.FpmDirectPublisher(endpoint, str(endpoint.connection_id()) if args.fpm_id is None else args.fpm_id, 1)


def publish_pass(publisher):
    publisher.publish(dp_rank=0, scheduled_num_prefill_requests=2, scheduled_sum_prefill_tokens=512,
                      scheduled_sum_prefill_kv_tokens=1024, scheduled_num_decode_requests=5,
                      scheduled_sum_decode_kv_tokens=20480, queued_num_prefill_requests=3,
                      queued_sum_prefill_tokens=900, queued_num_decode_requests=1,
                      queued_sum_decode_kv_tokens=4096, wall_time_secs=0.0123)


def tiny_model():
    """A folder that passes for a Hugging Face model: a tokenizer of three words and no weights."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tiny-model-"))
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                 "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
                 "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2}, "unk_token": "<unk>"}}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 3, "bos_token_id": 1, "eos_token_id": 2,
              "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "num_key_value_heads": 1, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
    files = {"tokenizer.json": tokenizer, "config.json": config, "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
             "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 4096,
                                       "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return str(folder)


async def publish_card(endpoint):
    card = dict(model_name=args.model, kv_cache_block_size=args.block_size)
    if hasattr(llm, "ModelRuntimeConfig"):
        limits = llm.ModelRuntimeConfig()
        limits.total_kv_blocks, limits.max_num_seqs, limits.max_num_batched_tokens = args.kv_total, args.total_slots, 8192
        if hasattr(limits, "data_parallel_size"):
            limits.data_parallel_size = args.ranks
        card["runtime_config"] = limits
    if hasattr(llm, "WorkerType"):
        card["worker_type"] = llm.WorkerType.Aggregated
    register = getattr(llm, "register_model", None) or llm.register_llm
    kind = [llm.ModelType.Chat if hasattr(llm.ModelType, "Chat") else llm.ModelType.Backend]
    takes = [llm.ModelInput.Tokens] if hasattr(llm, "ModelInput") else []
    await settled(register(*takes, *kind, endpoint, tiny_model(), **card))


async def worker_id(endpoint):
    return await settled(getattr(endpoint, "lease_id" if hasattr(endpoint, "lease_id") else "connection_id")())


async def main():
    endpoint, component = await place(connect())
    if args.publish_only:
        passes = pass_publisher(endpoint)
        print(f"ready worker_id={await worker_id(endpoint)}", flush=True)
        while True:
            publish_pass(passes)
            await asyncio.sleep(0.5)
    publisher = llm.KvMetricsPublisher() if hasattr(llm, "KvMetricsPublisher") else llm.WorkerMetricsPublisher()
    served = [asyncio.ensure_future(settled(endpoint.serve_endpoint(answer))),
              asyncio.ensure_future(settled(publisher.create_endpoint(component if component is not None else endpoint)))]
    await asyncio.sleep(1)  # both register in the background and announce nothing when they have
    if args.model:
        await publish_card(endpoint)
    publish(publisher)
    passes = pass_publisher(endpoint) if args.fpm else None
    print(f"ready worker_id={await worker_id(endpoint)}", flush=True)

    up = True
    while True:
        await asyncio.sleep(0.5)
        for task in served:
            if task.done() and task.exception():
                raise task.exception()
        if args.flip:
            args.kv_active += 1 if up else -1
            up = not up
            publish(publisher)
        if passes:
            publish_pass(passes)


asyncio.run(main())
