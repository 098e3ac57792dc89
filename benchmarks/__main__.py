"""`python -m benchmarks`: all benchmarks, or those named, on one thread."""

import os
import sys

# Before numpy and torch start their thread pools. One thread is what counts compare best on.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
# torch's profiler announces on stderr, below every other level, that it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from benchmarks import attacks, common, curvature, family, layers, sam, stack, tracker  # noqa: E402

BENCHMARKS = {
    b.name: b
    for b in (
        curvature.BENCHMARK,
        layers.BENCHMARK,
        tracker.BENCHMARK,
        sam.BENCHMARK,
        family.BENCHMARK,
        stack.BENCHMARK,
        attacks.BENCHMARK,
    )
}

if __name__ == "__main__":
    common.keep_memory()
    sys.exit(common.main(BENCHMARKS))
