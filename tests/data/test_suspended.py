"""A process that is suspended, as a laptop's lid or a cluster does it, has not waited for a read meanwhile."""

import signal
import subprocess
import sys
import time

SCRIPT = """
import time
from ldmseg_fast.data.reader import PatientReader

def read():
    print("reading", flush=True)
    for _ in range(20):  # what is suspended too
        time.sleep(0.1)
    return "read"

print(PatientReader(5.0, lambda: "a file").call(read), flush=True)
"""


def test_a_suspended_process_goes_on_waiting() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "read\n"
    assert process.returncode == 0
