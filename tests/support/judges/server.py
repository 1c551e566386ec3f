"""Run judges, each in a process forked from this one, which has imported the library that they ask.

Importing a library takes ten seconds, and booting a Bridge of TransformerLens patches transformers for the whole
process: so it is imported once here, and used in children. Reads a line of JSON a judge, `[program, arguments,
library, log, folders for sys.path]`, and writes the exit status of each.
"""

import importlib
import json
import os
import runpy
import sys
import traceback

import numpy  # noqa: F401 - used by all
import torch

torch.set_num_threads(1)


def judge(program: str, arguments: list[str], log: str, path: list[str]) -> int:
    """Run the program with what it prints in `log`; its status."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.path[:0] = path
    sys.argv = [program, *arguments]
    try:
        runpy.run_path(program, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


for line in sys.stdin:
    program, arguments, library, log, path = json.loads(line)
    if library:
        importlib.import_module(library)
    child = os.fork()
    if child == 0:
        os._exit(judge(program, arguments, log, path))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(1, f"{status}\n".encode())
