"""`python kill_at.py FUNCTION call|return N run_clm.py arguments...`: SIGKILL as FUNCTION begins or ends the Nth time.

FUNCTION is a file and a name in it: clm/launch.py:pick_checkpoint. The program itself is untouched.
"""

import os
import runpy
import signal
import sys

(file, name), moment, left = sys.argv[1].split(":"), sys.argv[2], int(sys.argv[3])


def watch(frame, event, argument):
    """What the interpreter calls at every call and return of a function."""
    global left
    if event == moment and frame.f_code.co_name == name and frame.f_code.co_filename.endswith(file):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


sys.argv = sys.argv[4:]
sys.setprofile(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
