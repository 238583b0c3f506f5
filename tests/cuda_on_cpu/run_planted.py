"""python run_planted.py LIBRARY KERNEL BUG: runs a kernel of planted.cu in many orders, until something is reported.

A program of its own, because a sanitizer's report ends the process.
"""

import ctypes
import sys

library, kernel, bug = ctypes.CDLL(sys.argv[1]), sys.argv[2].encode(), ctypes.c_int64(int(sys.argv[3]))
library.planted.restype = ctypes.c_char_p
for seed in range(20):
    library.set_seed(ctypes.c_uint64(seed))
    report = library.planted(kernel, bug)
    if report is not None:
        sys.exit(report.decode())
