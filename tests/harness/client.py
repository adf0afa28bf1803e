"""A small client of ComfyUI's HTTP interface, with nothing but the standard library."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request

POLL_SECONDS = 0.1

# The address is this machine's own: a proxy set for the outside world must not get these requests.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class PromptRejected(Exception):
    """The server did not accept a prompt; the message lists what it found wrong, node by node."""


class ExecutionFailed(Exception):
    """A node raised, or the run was interrupted. `details` is the server's own message."""

    def __init__(self, message: str, details: dict):
        super().__init__(message)
        self.details = details


def _describe_rejection(answer: dict, prompt: dict) -> str:
    error = answer.get("error") or {}
    lines = [f"the server rejected the prompt: {error.get('message', '')} {error.get('details', '')}".strip()]
    for node_id, found in (answer.get("node_errors") or {}).items():
        kind = prompt.get(node_id, {}).get("class_type", "unknown node")
        lines += [f"  node {node_id} ({kind}): {e.get('message', '')}: {e.get('details', '')}" for e in found["errors"]]
    return "\n".join(lines)


def _raise_for_failure(entry: dict) -> None:
    """Raises ExecutionFailed when the history entry is one of a run that did not succeed."""
    status = entry.get("status") or {}
    if status.get("status_str") == "success":
        return
    for kind, details in status.get("messages", []):
        where = f"node {details.get('node_id')} ({details.get('node_type')})"
        if kind == "execution_interrupted":
            raise ExecutionFailed(f"the run was interrupted in {where}", details)
        if kind == "execution_error":
            text = f"{where} raised {details.get('exception_type')}: {details.get('exception_message', '').strip()}"
            raise ExecutionFailed(f"{text}\n{''.join(details.get('traceback', []))}".rstrip(), details)
    raise ExecutionFailed(f"the run did not succeed: {status}", status)


class ComfyClient:
    """Talks to the ComfyUI at `address` (http://host:port)."""

    def __init__(self, address: str):
        self.address = address

    def request(self, path: str, body: bytes | dict | None = None, content_type: str = "application/json") -> bytes:
        """The server's answer to a GET (no body) or POST; an HTTP error is raised as urllib's HTTPError."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {} if data is None else {"Content-Type": content_type}
        with _OPENER.open(urllib.request.Request(self.address + path, data, headers), timeout=60) as response:
            return response.read()

    def get_json(self, path: str):
        return json.loads(self.request(path))

    def object_info(self) -> dict:
        """Every node the server offers, by its id."""
        return self.get_json("/object_info")

    def queue(self, prompt: dict, extra_data: dict | None = None) -> str:
        """Queues an API-format prompt and returns its id; raises PromptRejected when any part of it is refused.

        The server runs the valid outputs of a prompt whose other outputs are not: here that is a rejection too. Releases before
        0.30 leave cached outputs out of the history of a client without an id.
        """
        body = {"prompt": prompt, "client_id": "artifact-guard"}
        if extra_data is not None:
            body["extra_data"] = extra_data
        try:
            answer = json.loads(self.request("/prompt", body))
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code != 400:
                raise PromptRejected(f"the server answered {error.code} to the prompt: {text}") from error
            raise PromptRejected(_describe_rejection(json.loads(text), prompt)) from None
        if answer.get("node_errors"):
            raise PromptRejected(_describe_rejection(answer, prompt))
        return answer["prompt_id"]

    def _is_queued(self, prompt_id: str) -> bool:
        queue = self.get_json("/queue")
        return any(item[1] == prompt_id for item in queue["queue_running"] + queue["queue_pending"])

    def wait(self, prompt_id: str, timeout: float = 600) -> dict:
        """The history entry of a prompt once it has ended, well or not."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            # The queue first: a prompt that ends between the two requests is then still found in the history.
            queued = self._is_queued(prompt_id)
            if entry := self.get_json(f"/history/{prompt_id}").get(prompt_id):
                return entry
            if not queued:
                raise ExecutionFailed(f"prompt {prompt_id} is neither queued nor in the history", {})
            time.sleep(POLL_SECONDS)
        raise TimeoutError(f"prompt {prompt_id} did not end within {timeout:g} s")

    def run(self, prompt: dict, timeout: float = 600) -> dict:
        """Queues, waits, and returns the history entry; raises ExecutionFailed when the run did not succeed."""
        entry = self.wait(self.queue(prompt), timeout)
        _raise_for_failure(entry)
        return entry

    def interrupt(self) -> None:
        """Stops the prompt that is running."""
        self.request("/interrupt", {})

    def view(self, image_ref: dict) -> bytes:
        """The file behind an output's {"filename", "subfolder", "type"}."""
        return self.request("/view?" + urllib.parse.urlencode(image_ref))
