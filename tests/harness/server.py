"""A real ComfyUI server as a context manager, with the pack installed in it and folders of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
from pathlib import Path

from .client import ComfyClient
from .environment import Environment
from .pack import ROOT

HOST = "127.0.0.1"
FOLDERS = ("custom_nodes", "models", "input", "output", "user")
PACK_NAME = "artifact-guard"
LOG_TAIL = 40
START_SECONDS = 600
# A server that is asked to end gets this long before it is killed.
STOP_SECONDS = 10


class ServerFailed(Exception):
    """The server did not start or died; the message ends with its log's last lines."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def install_pack(custom_nodes: Path) -> None:
    """Puts this repository into a custom_nodes folder: as a link, or as a copy where links are not permitted."""
    target = custom_nodes / PACK_NAME
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    try:
        target.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".git", "__pycache__"))


class ComfyServer(ComfyClient):
    """Starts ComfyUI on this machine only, and is its client.

    `base_directory` (default: a temporary folder, removed at the end) gets ComfyUI's folders; `cpu` forces or forbids
    the CPU (default: CPU when the environment's torch has no CUDA); `arguments` are added to main.py's.
    """

    def __init__(
        self,
        environment: Environment | None = None,
        base_directory: Path | None = None,
        port: int | None = None,
        cpu: bool | None = None,
        arguments: tuple[str, ...] = (),
    ):
        self.environment = environment or Environment.current()
        self.port = free_port() if port is None else port
        super().__init__(f"http://{HOST}:{self.port}")
        self.cpu = not self.environment.has_cuda if cpu is None else cpu
        self.arguments = arguments
        self._temporary = base_directory is None
        # Absolute, because the server is started in another folder than ours.
        self.base_directory = Path(base_directory or tempfile.mkdtemp(prefix=f"{PACK_NAME}-")).absolute()
        self.log_path = self.base_directory / "server.log"
        self._last_log = ""
        self._process = None

    def __enter__(self) -> "ComfyServer":
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *exception) -> None:
        self.stop()

    def _command(self) -> list[str]:
        user = self.base_directory / "user"
        command = [self.environment.python, "main.py", "--listen", HOST, "--port", self.port]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--base-directory", self.base_directory]
        # By default all servers started from one ComfyUI folder share one database, and the second one is locked out.
        command += ["--database-url", f"sqlite:///{user / 'comfyui.db'}"]
        command += ["--cpu"] if self.cpu else []
        return [str(word) for word in (*command, *self.arguments)]

    def start(self) -> "ComfyServer":
        if _is_taken(self.port):
            raise ServerFailed(f"port {self.port} is in use: something already answers at {self.address}")
        for folder in FOLDERS:
            (self.base_directory / folder).mkdir(parents=True, exist_ok=True)
        install_pack(self.base_directory / "custom_nodes")
        # A group of its own, so that stop() reaches whatever the server starts, and Ctrl-C is ours to handle.
        own_group = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
            if sys.platform == "win32"
            else {"start_new_session": True}
        )
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.environment.comfyui,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **own_group,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                self.request("/queue")
                return self
            except OSError:
                time.sleep(0.2)
        raise ServerFailed(f"the server did not answer within {START_SECONDS} s.\n{self._log_tail()}")

    def _check_alive(self) -> None:
        if self._process is not None and (code := self._process.poll()) is not None:
            raise ServerFailed(f"the server ended with exit code {code}.\n{self._log_tail()}")

    def request(self, *arguments, **keywords) -> bytes:
        """The client's request, except that a dead server is named as the reason."""
        try:
            return super().request(*arguments, **keywords)
        except urllib.error.HTTPError:
            raise
        except OSError:
            self._check_alive()
            raise

    def join(self) -> int:
        """Waits until the server ends by itself; its exit code."""
        return self._process.wait()

    def stop(self) -> None:
        """Ends the server and everything it started; safe to call again."""
        if self._process is not None:
            self._end_process()
            self._process = None
        if self.log_path.exists():
            self._last_log = self.log()
        if self._temporary:
            shutil.rmtree(self.base_directory, ignore_errors=True)

    def _end_process(self) -> None:
        process = self._process
        if sys.platform == "win32":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
            process.wait(STOP_SECONDS)
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(STOP_SECONDS)
            except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                continue

    def log(self) -> str:
        """All the server has printed, also after stop()."""
        if self.log_path.exists():
            return self.log_path.read_text(encoding="utf-8", errors="replace")
        return self._last_log

    def _log_tail(self) -> str:
        return "\n".join(["the end of its log:", *self.log().splitlines()[-LOG_TAIL:]])
