"""For the Python inside pytriton 0.7's server, older than its own library.

`multiprocessing` of Python 3.11.7 asks locks for what those compiled into that
server do not have; the lock written in Python has it.
"""

import threading

if not hasattr(threading.RLock(), "_recursion_count"):
    threading.RLock = threading._PyRLock
