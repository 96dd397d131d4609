"""Set before anything imports triton: without a GPU its kernels run in the interpreter, which wants single-threaded BLAS."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
