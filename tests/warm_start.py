"""Starts programs in processes whose libraries are imported already: importing them takes most of a short run.

Reads requests from stdin, a line of JSON each, and writes the exit status of each to the file descriptor of its
argument. Each program is a forked process with its own arguments, folder, environment, standard streams and exit.
"""

import gc
import importlib
import json
import os
import runpy
import sys

# Of this project nothing is imported here, so that a program imports it as a user's does.
LIBRARIES = ["lightning.pytorch.cli", "torchmetrics", "torchvision.transforms.v2", "matplotlib.figure", "scipy.stats"]
LIBRARIES += ["matplotlib.backends.backend_agg", "pydantic", "tensorboard", "torch.utils.tensorboard", "rich.console"]


def become(request):
    """Turn this process into the one that was asked for."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY),
        (2, request["stderr"], os.O_WRONLY),
    ):
        os.dup2(os.open(path, flags), descriptor)
    sys.argv, sys.orig_argv = request["command"], [sys.executable, *request["command"]]
    sys.path[0] = os.path.dirname(sys.argv[0])
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))


def serve(replies):
    """Fork a process for each request; return the request in that process, None at the end in this one."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")  # not `sys.stdin`, which is the program's
    for line in requests:
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            requests.close()
            os.close(replies)
            return request
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(replies, f"{status}\n".encode())
    return None


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()
    request = serve(int(sys.argv[1]))
    if request is not None:
        become(request)
        runpy.run_path(sys.argv[0], run_name="__main__")
