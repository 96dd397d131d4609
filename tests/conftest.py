"""Set before anything imports triton: without a GPU its kernels run in the interpreter, which wants single-threaded BLAS."""

import os

import hypothesis

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine is no failure.
hypothesis.settings.register_profile("ring_attn", deadline=None)
hypothesis.settings.load_profile("ring_attn")
