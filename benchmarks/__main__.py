"""`python -m benchmarks`: all benchmarks, on one thread."""

import os
import sys

# Before numpy and torch start their thread pools. One thread is what counts compare best on.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

from benchmarks import curvature  # noqa: E402

if __name__ == "__main__":
    sys.exit(curvature.main())
