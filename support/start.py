"""The first moment of a script: how it takes Ctrl-C and closed streams while its imports, which take seconds, run."""

import os
import signal


def start_quietly() -> None:
    """Called before all other imports: Ctrl-C among them ends the script without a word.

    And a standard stream that is closed is opened to nowhere: else the next file, a checkpoint perhaps, would take its
    number, and with it whatever a library writes there. Last, what CUDA's libraries and torch read as they load.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest number that is free
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # see machine.sum_in_order
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # that a process failed is told in a line of ours
