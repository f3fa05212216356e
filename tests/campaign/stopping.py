"""A process that stops itself where it stands."""

import signal
import threading


def stop_here() -> None:
    """Returns when it was woken. A signal to the process would be any thread's, and this one would
    run on for a while: into the transaction that it is about to begin, and whoever is suspended in
    one has the table locked."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
