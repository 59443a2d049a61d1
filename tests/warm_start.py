"""Starts programs in processes whose libraries are imported already: importing them takes most of a short run.

Reads requests from stdin, a line of JSON each. Each program is a forked process with its own arguments, folder,
environment, standard streams and exit. It writes its process id to the FIFO of its request, and a parent of its own
writes its exit status there.
"""

import gc
import importlib
import json
import os
import runpy
import sys

# Of this project nothing is imported here, so that a program imports it as a user's does.
LIBRARIES = ["lightning.pytorch.cli", "torchmetrics", "torchvision.transforms.v2", "matplotlib.figure", "scipy.stats"]
LIBRARIES += ["matplotlib.backends.backend_agg", "tensorboard", "filelock"]
LIBRARIES += ["torch.utils.tensorboard", "torch.utils.serialization.config", "tensorboard.plugins.hparams.api_pb2"]
LIBRARIES += ["rich.console", "rich.progress", "jinja2", "jaxtyping", "concurrent.futures.process"]
LIBRARIES += ["pydantic.main", "pydantic.types", "pydantic.functional_validators", "pydantic.type_adapter"]


def become(request):
    """Turn this process into the one that was asked for."""
    if request["start_new_session"]:
        os.setsid()
    with open(request["process"], "w", encoding="utf-8") as reports:
        print(os.getpid(), file=reports)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_APPEND),
        (2, request["stderr"], os.O_WRONLY | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags), descriptor)
    sys.stdout.reconfigure(write_through="PYTHONUNBUFFERED" in os.environ)
    sys.orig_argv = [sys.executable, *request["command"]]
    if request["command"][0] == "-m":
        sys.argv, sys.path[0] = request["command"][1:], os.getcwd()
    else:
        sys.argv, sys.path[0] = request["command"], os.path.dirname(request["command"][0])
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))


def serve():
    """Fork a process for each request; return the request in that process, None at the end in this one."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")  # not `sys.stdin`, which is the program's
    parents = 0
    for line in requests:
        request = json.loads(line)
        if os.fork():
            parents += 1
            while parents and os.waitpid(-1, os.WNOHANG)[0]:
                parents -= 1
            continue
        requests.close()
        with open(request["process"], "w", encoding="utf-8") as reports:
            if (pid := os.fork()) == 0:
                return request
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=reports)
            reports.flush()
        os._exit(0)
    return None


if __name__ == "__main__":
    os.fsync = lambda file: None  # as in conftest.py
    for library in LIBRARIES:
        importlib.import_module(library)
    # Drawing takes a fifth of a short run. Here drawings are blank: tests look at those that their own process makes.
    sys.modules["matplotlib.backends.backend_agg"].FigureCanvasAgg.draw = lambda canvas: canvas.get_renderer()
    gc.collect()
    gc.freeze()
    request = serve()
    if request is not None:
        become(request)
        if request["command"][0] == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
