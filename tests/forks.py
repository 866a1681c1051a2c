"""Scripts in processes of their own that start at once: forks of a process that has imported what takes seconds."""

import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """The process that is forked; it ends with this one."""

    def __init__(self):
        command, environment = [sys.executable, "-m", "tests.forks"], os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, bufsize=1, **pipes)

    def ask(self, **request) -> int | None:
        """A new process's number; or the exit code of one, None while it runs."""
        self._process.stdin.write(json.dumps(request) + "\n")
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


class Fork:
    """`python SCRIPT FLAG...` in the repository, with what it prints in two files and with limits of `resource`."""

    def __init__(
        self, server: Server, argv: list[str], output: Path, errors: Path, limits: dict[int, int] | None = None
    ):
        self._server, self._code = server, None
        bounds = list((limits or {}).items())
        self.pid = server.ask(argv=argv, output=str(output), errors=str(errors), limits=bounds)

    def poll(self) -> int | None:
        """The exit code, minus a signal's number, None while it runs."""
        if self._code is None:
            self._code = self._server.ask(ended=self.pid)
        return self._code

    def wait(self, seconds: float) -> int:
        """The exit code of a process that ends within this time."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < end, f"it still runs after {seconds} s"
            time.sleep(0.02)
        return self.poll()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait(60)


def serve() -> dict | None:
    """Answer until the other side closes; in a fork returns what it is to do."""
    for line in sys.stdin:
        request = json.loads(line)
        if "argv" in request:
            answer = os.fork()
            if answer == 0:
                return request
        else:
            ended, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        print(json.dumps(answer), flush=True)
    return None


def become(argv: list[str], output: str, errors: str, limits: list[tuple[int, int]]) -> None:
    """Be the script, up to the end of the interpreter."""
    for number, path in enumerate((os.devnull, output, errors)):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    for kind, bound in limits:
        resource.setrlimit(kind, (bound, bound))
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    for module in ("torch._dynamo", "train_teacher", "train_cifar_student"):  # the first optimizer imports dynamo
        importlib.import_module(module)

    if work := serve():
        become(**work)
