#!/usr/bin/env python3
"""An event broker as Dynamo's broker mode expects one: libzmq's proxy between publishers (XSUB) and listeners (XPUB).

Prints its addresses in one line, in Dynamo's spelling: xsub=tcp://127.0.0.1:PORT,xpub=tcp://127.0.0.1:PORT
"""

import zmq

context = zmq.Context()


def bound(kind):
    socket = context.socket(kind)
    socket.bind("tcp://127.0.0.1:*")
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


(publishers, xsub), (listeners, xpub) = bound(zmq.XSUB), bound(zmq.XPUB)
print(f"xsub={xsub},xpub={xpub}", flush=True)
zmq.proxy(publishers, listeners)
