"""Let torch's threads end before the interpreter does; Python imports this module if it is on PYTHONPATH.

After a collective, a thread of gloo may still hold a tensor. If it releases the tensor while the interpreter ends, the
process aborts with "terminate called without an active exception" (pytorch/pytorch#190489): 6 of 12 runs of a script
that ends right after one did.
"""

import atexit
import sys
import time


def _wait_for_threads() -> None:
    if "torch.distributed" in sys.modules:
        time.sleep(0.2)


atexit.register(_wait_for_threads)
