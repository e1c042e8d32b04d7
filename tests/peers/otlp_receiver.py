#!/usr/bin/env python3
"""An OTLP receiver that shares no code with the bridge: what it decodes is what any receiver would.

Takes gRPC and HTTP (protobuf and JSON, plain and gzip) for metrics and traces, and writes one JSON line a request on stdout.
The first line says where it listens, so that port 0 works:

    {"ready": true, "grpc": 41001, "http": 41002}
    {"time": 1.7e9, "via": "grpc", "signal": "metrics", "headers": {...}, "bytes": 512, "tls": false, "body": {...}}
    {"time": 1.7e9, "via": "http", "signal": "metrics", "headers": {...}, "failed": 503}

With --fail, --retry-after says when to come again (HTTP: Retry-After; gRPC: RetryInfo, with RESOURCE_EXHAUSTED), and --answer replaces the error of HTTP:
`html` is the page of a login with status 200, `redirect` one that leads to --location with --http-status. --reject lets every
request arrive, and says that so many of its points or spans were not taken.

`bytes` is the size of the message decompressed; `body` is the request in
protobuf's JSON form (64-bit integers are strings). `headers` have lower-case names. With a certificate both speak TLS; with
--client-ca both ask the client for a certificate too. SIGINT and SIGTERM end it with status 0.
"""

import argparse
import gzip
import json
import pathlib
import signal
import ssl
import sys
import threading
import time
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from google.protobuf.json_format import MessageToDict, MessageToJson, Parse
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grpc", default="127.0.0.1:0", help="address to listen on (default %(default)s)")
    parser.add_argument("--http", default="127.0.0.1:0", help="address to listen on (default %(default)s)")
    parser.add_argument("--fail", type=int, default=0, metavar="N", help="answer the first N requests with an error")
    parser.add_argument("--status", default="UNAVAILABLE", help="gRPC status of --fail; HTTP answers 503 (default %(default)s)")
    parser.add_argument("--http-status", type=int, default=503, help="HTTP status of --fail (default %(default)s)")
    parser.add_argument("--answer", choices=["error", "html", "redirect"], default="error", help="HTTP answer of --fail (default %(default)s)")
    parser.add_argument("--location", default="/login", help="where --answer redirect leads (default %(default)s)")
    parser.add_argument("--retry-after", type=int, default=1, metavar="SECONDS", help="wish of --fail (default %(default)s; 0: none)")
    parser.add_argument("--reject", type=int, default=0, metavar="N", help="take requests in part: N points or spans of each are rejected")
    parser.add_argument("--max-recv-bytes", type=int, default=4 << 20, help="gRPC message limit (default: gRPC's own, 4 MiB)")
    parser.add_argument("--cert", type=pathlib.Path, help="PEM certificate chain: speak TLS")
    parser.add_argument("--key", type=pathlib.Path, help="its PEM key")
    parser.add_argument("--client-ca", type=pathlib.Path, help="PEM of the authority that a client's certificate must be from")
    args = parser.parse_args()
    if bool(args.cert) != bool(args.key) or (args.client_ca and not args.cert):
        parser.error("--cert and --key go together, and --client-ca needs them")
    return args


class Journal:
    """Writes the lines, and decides which requests fail. Both are shared by gRPC's and HTTP's threads."""

    def __init__(self, fail, tls):
        self._lock = threading.Lock()
        self._to_fail = fail
        self._tls = tls

    def write(self, via, signal_name, headers, **rest):
        line = {"time": time.time(), "via": via, "signal": signal_name, "tls": self._tls,
                "headers": {name.lower(): value for name, value in headers}, **rest}
        self.say(line)

    def say(self, line):
        with self._lock:
            print(json.dumps(line), flush=True)

    def must_fail(self):
        with self._lock:
            self._to_fail -= 1
            return self._to_fail >= 0


def partial(args, response):
    """The answer to a request that was taken, in part with --reject."""
    answer = response()
    if args.reject:
        field = "rejected_spans" if "Trace" in response.__name__ else "rejected_data_points"
        setattr(answer.partial_success, field, args.reject)
        answer.partial_success.error_message = "asked to reject"
    return answer


def varint_field(number, value):
    """A field of protobuf, of small values only."""
    return bytes([number << 3, value])


def bytes_field(number, value):
    return bytes([number << 3 | 2, len(value)]) + value


def retry_info(args):
    """google.rpc.Status with a RetryInfo, as it stands in grpc-status-details-bin; written by hand, so that no package is needed."""
    info = bytes_field(1, varint_field(1, args.retry_after))
    anything = bytes_field(1, b"type.googleapis.com/google.rpc.RetryInfo") + bytes_field(2, info)
    code = grpc.StatusCode[args.status].value[0]
    return varint_field(1, code) + bytes_field(3, anything)


def grpc_server(args, journal):
    def servicer(base, response, signal_name):
        class Servicer(base):
            def Export(self, request, context):
                headers = [(key, value) for key, value in context.invocation_metadata() if isinstance(value, str)]
                if journal.must_fail():
                    journal.write("grpc", signal_name, headers, failed=args.status)
                    if args.retry_after and args.status == "RESOURCE_EXHAUSTED":
                        context.set_trailing_metadata([("grpc-status-details-bin", retry_info(args))])
                    context.abort(grpc.StatusCode[args.status], "asked to fail")
                journal.write("grpc", signal_name, headers, bytes=request.ByteSize(), body=MessageToDict(request))
                return partial(args, response)
        return Servicer()

    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", args.max_recv_bytes),
                                                                 ("grpc.so_reuseport", 0)])
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(
        servicer(metrics_service_pb2_grpc.MetricsServiceServicer, metrics_service_pb2.ExportMetricsServiceResponse, "metrics"), server)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(
        servicer(trace_service_pb2_grpc.TraceServiceServicer, trace_service_pb2.ExportTraceServiceResponse, "traces"), server)
    if args.cert:
        authority = args.client_ca.read_bytes() if args.client_ca else None
        credentials = grpc.ssl_server_credentials([(args.key.read_bytes(), args.cert.read_bytes())], authority, bool(authority))
        port = server.add_secure_port(args.grpc, credentials)
    else:
        port = server.add_insecure_port(args.grpc)
    server.start()
    return server, port


HTTP_SIGNALS = {
    "/v1/metrics": ("metrics", metrics_service_pb2.ExportMetricsServiceRequest, metrics_service_pb2.ExportMetricsServiceResponse),
    "/v1/traces": ("traces", trace_service_pb2.ExportTraceServiceRequest, trace_service_pb2.ExportTraceServiceResponse),
}


def http_server(args, journal):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            raw = self.rfile.read(int(self.headers.get("content-length", 0)))
            path = self.path.partition("?")[0]
            if path not in HTTP_SIGNALS:
                return self.reply(404)
            signal_name, request, response = HTTP_SIGNALS[path]
            headers = self.headers.items()
            if journal.must_fail():
                journal.write("http", signal_name, headers, failed=args.http_status)
                return self.fail()
            content_type = self.headers.get("content-type", "").split(";")[0]
            try:
                if self.headers.get("content-encoding") == "gzip":
                    raw = gzip.decompress(raw)
                message = Parse(raw, request()) if content_type == "application/json" else request.FromString(raw)
            except Exception as error:  # whatever is wrong with it, it is the client's
                journal.write("http", signal_name, headers, failed=400, error=str(error))
                return self.reply(400, str(error).encode())
            journal.write("http", signal_name, headers, bytes=len(raw), body=MessageToDict(message))
            answer = partial(args, response)
            body = MessageToJson(answer).encode() if content_type == "application/json" else answer.SerializeToString()
            return self.reply(200, body, {"content-type": content_type})

        def fail(self):
            if args.answer == "html":
                return self.reply(200, b"<html>Please log in</html>", {"content-type": "text/html"})
            if args.answer == "redirect":
                return self.reply(args.http_status, headers={"location": args.location})
            return self.reply(args.http_status, headers={"retry-after": str(args.retry_after)} if args.retry_after else {})

        def do_GET(self):
            # What a client makes of a POST that is redirected; no request of OTLP.
            journal.write("http", "none", self.headers.items(), failed=405)
            self.reply(405)

        def reply(self, status, body=b"", headers=None):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request, client_address):
            # Here, in the connection's own thread: a client that does not finish its handshake holds up nobody else.
            if not context:
                return super().finish_request(request, client_address)
            try:
                with context.wrap_socket(request, server_side=True) as encrypted:
                    super().finish_request(encrypted, client_address)
            except OSError as error:
                print(f"TLS: {error}", file=sys.stderr, flush=True)

    context = None
    if args.cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(args.cert, args.key)
        if args.client_ca:
            context.load_verify_locations(args.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    host, port = args.http.rsplit(":", 1)
    server = Server((host, int(port)), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main():
    args = options()
    # Before any thread starts, so that every thread inherits it and sigwait alone takes the signals.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    journal = Journal(args.fail, tls=bool(args.cert))
    by_grpc, grpc_port = grpc_server(args, journal)
    by_http = http_server(args, journal)
    # On a port that is known beforehand the first request may well come before this.
    journal.say({"ready": True, "grpc": grpc_port, "http": by_http.server_port})
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    by_grpc.stop(0)
    by_http.shutdown()


main()
