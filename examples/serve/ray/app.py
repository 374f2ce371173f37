"""`mtad serve` as a deployment of Ray Serve: each replica has a server process of its own, and hands requests on to it.

    serve run app:app mtad=/usr/local/bin/mtad options="--model /srv/models/target.gguf --draft /srv/models/draft.gguf"

Ray chooses the replica, starts more of them when there is more to do, and replaces those whose server is not healthy.
A server that ends is started again by its replica; requests that it had not begun to answer are then asked again.
"""

import asyncio
import json
import re
import shlex
import subprocess
import threading

import aiohttp
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

# Headers that concern one connection, and not what is sent over it.
OF_CONNECTIONS = {"connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
TRIES = 5
# A stream has begun when it has said something: text, a call, why it ended, or what is wrong. (What comes before says
# who speaks, or that the server is still there.)
BEGUN = re.compile(rb'"(content|text|arguments|name)": ?"[^"]|"finish_reason": ?"|"error": ?\{|\[DONE\]')


class Ended(Exception):
    """The server ended before it answered."""


@serve.deployment(
    name="mtad",
    # What a replica is given at a time: as many as its server answers or lets wait (--parallel, --queue).
    max_ongoing_requests=32,
    autoscaling_config={
        "min_replicas": 2,
        "max_replicas": 4,
        # As many as a server answers at the same time; beyond that a further replica helps.
        "target_ongoing_requests": 4,
        "upscale_delay_s": 10,
        "downscale_delay_s": 120,
    },
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=20,
)
class Mtad:
    def __init__(self, program, options):
        self.command = [program, "serve", "--host", "127.0.0.1", "--port", "0", *options]
        self.session = None
        self.starting = asyncio.Lock()
        self.start()

    def start(self):
        """Starts the server, on a port that is free, and waits until it listens."""
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        said = []
        for line in self.process.stderr:
            if found := re.match(r"listening on (http://\S+)", line):
                self.url = found[1]
                # What else it says goes to the replica's log.
                threading.Thread(target=self.log, args=(self.process.stderr,), daemon=True).start()
                return
            said.append(line)
        raise RuntimeError(f"{shlex.join(self.command)} did not start: {''.join(said)}")

    @staticmethod
    def log(lines):
        for line in lines:
            print(line, end="", flush=True)

    async def up(self):
        """Where the server is; one that has ended is started again."""
        async with self.starting:
            if self.process.poll() is not None:
                await asyncio.to_thread(self.start)
            if self.session is None:
                # No limit on the time of an answer: that is the client's to set.
                timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
                self.session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
            return self.url

    async def check_health(self):
        """What Ray asks every now and then; a replica that fails is replaced."""
        url = await self.up()
        async with self.session.get(f"{url}/health", timeout=aiohttp.ClientTimeout(total=5)) as answer:
            answer.raise_for_status()

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        for _ in range(TRIES):
            try:
                return await self.hand_on(request, body)
            except (Ended, aiohttp.ClientConnectorError):
                # (A process that was killed has ended only when the system says so.)
                await asyncio.sleep(0.1)
        error = {"message": "the server ended while it was asked", "type": "unavailable_error", "param": None, "code": "ended"}
        return JSONResponse({"error": error}, 503, {"Retry-After": "1"})

    async def hand_on(self, request, body):
        """Asks the server. Nothing was told to the client if this fails with `Ended`."""
        url = await self.up()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in OF_CONNECTIONS}
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        try:
            answer = await self.session.request(request.method, url + path, data=body, headers=headers)
            is_stream = answer.content_type == "text/event-stream"
            first = await (self.beginning(answer) if is_stream else answer.read())
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientPayloadError) as fault:
            raise Ended from fault
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in OF_CONNECTIONS}
        kept["x-mtad-process"] = str(self.process.pid)
        if not is_stream:
            return Response(first, answer.status, kept)
        return StreamingResponse(self.stream(answer, first), answer.status, kept)

    @staticmethod
    async def beginning(answer):
        """A stream as far as its first word."""
        first = b""
        while not BEGUN.search(first):
            part = await answer.content.readany()
            if not part:
                answer.close()
                raise Ended
            first += part
        return first

    @staticmethod
    async def stream(answer, first):
        # A client that goes away has this cancelled, which closes the connection, and the server stops writing.
        try:
            yield first
            async for part in answer.content.iter_any():
                yield part
        except aiohttp.ClientError:
            error = {"message": "the server ended amid this answer", "type": "unavailable_error", "param": None, "code": "ended"}
            yield f"data: {json.dumps({'error': error})}\n\n".encode()
        finally:
            answer.close()

    def __del__(self):
        process = getattr(self, "process", None)
        if process is not None and process.poll() is None:
            process.terminate()


def app(args: dict):
    """The application; `mtad` and `options` may be given to `serve run`."""
    return Mtad.bind(args.get("mtad", "mtad"), shlex.split(args.get("options", "")))
