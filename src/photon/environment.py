"""Which variables of this process's environment the programs that it starts are given.

An operator's shell holds more than a program needs: credentials of the store, tokens of hubs and of
clouds. A list of what is passed on forgets some that somebody needs (PHOTON_PASS_ENV adds those); a
list of what is not would forget a secret.
"""

from __future__ import annotations

import os
import re

#: Names of more variables that every program gets, separated by spaces or commas.
PASS = "PHOTON_PASS_ENV"

#: For any program.
_BASICS = re.compile(
    "PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_.*|TZ|TZDIR|TERM|NO_COLOR|TMPDIR|TEMP|TMP|"
    "LD_LIBRARY_PATH|LD_PRELOAD|XDG_.*"
)
#: For Python, torch and what trains with it; proxies and authorities, as it may dial out.
_COMPUTES = re.compile(
    "PHOTON_.*|PYTHON.*|VIRTUAL_ENV|CONDA_PREFIX|MALLOC_.*|GLIBC_TUNABLES|"
    "(OMP|GOMP|KMP|MKL|OPENBLAS|ATEN)_.*|(TORCH|PYTORCH|TRITON).*|CC|CXX|"
    "(CUDA|CUDNN|CUBLAS|NVIDIA|NCCL|NVTE|NVSHMEM|HIP|HSA|ROCR|ROCM|RCCL|AMD)_.*|"
    "(GLOO|UCX|FI|IBV|TP|SLURM)_.*|"
    "RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE)_(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|"
    "HF_(HOME|ENDPOINT|HUB_.*|DATASETS_.*)|TRANSFORMERS_.*|TOKENIZERS_.*|"
    "SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|(HTTP|HTTPS|ALL|NO)_PROXY|(http|https|all|no)_proxy"
)
#: Of stores that are not Photon's own, as obstore reads them.
_STORE = re.compile("(AWS|GOOGLE|AZURE|CLOUDSDK)_.*")


def given(*, computes: bool = True, store: bool = False) -> dict[str, str]:
    """What a program is started with.

    Args:
        computes: it is Photon's own, or runs torch; else only what any program needs.
        store: it uses a store with the operator's credentials.
    """
    named = re.split("[ ,]+", os.environ.get(PASS, "").strip()) if computes else []
    kinds = [_BASICS, *([_COMPUTES] if computes else []), *([_STORE] if store else [])]
    return {
        name: value
        for name, value in os.environ.items()
        if name in named or any(kind.fullmatch(name) for kind in kinds)
    }
