"""Google Cloud Storage on this machine: gcp-storage-emulator, and the conditions that it leaves out."""

import contextlib
import os
import socket
from collections.abc import Iterator
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def _generation(storage, bucket: str, name: str) -> str:
    try:
        return str(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return "0"  # as the protocol has it for "there is none"


def _with_conditions(handler):
    """The handler behind the protocol's ifGenerationMatch; readers are told the generation."""

    def conditional(request, response, storage, *args, **kwargs):
        bucket = request.params.get("bucket_name")
        name = request.params.get("object_id") or request.query.get("name", [None])[0]
        if bucket and name:
            expected = request.query.get("ifGenerationMatch", [None])[0]
            if expected is not None and expected != _generation(storage, bucket, name):
                _ = request.data  # else the connection has a body that nobody read
                response.status = HTTPStatus.PRECONDITION_FAILED
                return None
            if request.method == "GET":
                response["X-Goog-Generation"] = _generation(storage, bucket, name)
        return handler(request, response, storage, *args, **kwargs)

    return conditional


def _unknown(request, response, storage, *args, **kwargs):
    _ = request.data
    response.status = HTTPStatus.BAD_REQUEST


@contextlib.contextmanager
def emulator(bucket: str) -> Iterator[str]:
    """Serves an empty bucket in memory; the environment variables of the clients point to it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    plain = server.HANDLERS, objects.insert
    # Unknown calls are answered with 501, which clients try again for half a minute.
    move = (r"^/storage/v1/b/.*/o/.*/moveTo/o/.*$", {"POST": _unknown})
    server.HANDLERS = (move,) + tuple(
        (pattern, {method: _with_conditions(handler) for method, handler in methods.items()})
        for pattern, methods in server.HANDLERS
    )
    objects.insert = _with_conditions(objects.insert)
    url = f"http://localhost:{port}"
    variables = {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of the bucket
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    running = server.create_server("localhost", port, in_memory=True, default_bucket=bucket)
    running.start()
    try:
        yield url
    finally:
        running.stop()
        server.HANDLERS, objects.insert = plain
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
