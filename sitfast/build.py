"""Compile the C++ and CUDA operators for the installed PyTorch: python -m sitfast.build

Installing sitfast does it where PyTorch is there already. Run it after a first installation, after PyTorch gained CUDA, and
after csrc/ changed. SITFAST_BUILD_CUDA=1 makes it an error if the CUDA operators cannot be built, 0 leaves them out;
SITFAST_CUDA_ARCHS="90a" builds them for fewer GPUs.
"""

from __future__ import annotations

import sys

from sitfast import builder


def main() -> None:
    try:
        about = builder.build()
    except builder.BuildError as error:
        sys.exit(f"error: {error}")
    cuda = f"CUDA operators for sm_{', sm_'.join(about['cuda'])}" if about["cuda"] else "no CUDA operators"
    print(f"built the CPU operators and {cuda} for torch {about['torch']} in {about['seconds']} s: {builder.PACKAGE}")


if __name__ == "__main__":
    main()
