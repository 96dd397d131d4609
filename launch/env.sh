# Sourced by the other scripts: a virtual environment with ring_attn in it, and the variables every run wants.
# $PYTHON names the interpreter to start from (default: the first of python3, python that is 3.11 or newer).
# $VENV names the environment (default: .venv). Leaves its interpreter in $venv_python. Runs from the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
# NVLink multicast is off unless asked for: where the fabric manager does not offer it, NCCL and symmetric memory hang or fail.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} NVSHMEM_DISABLE_NVLS=${NVSHMEM_DISABLE_NVLS:-1}
export TORCH_SYMM_MEM_DISABLE_MULTICAST=${TORCH_SYMM_MEM_DISABLE_MULTICAST:-1}
export PIP_DISABLE_PIP_VERSION_CHECK=1

recent='import sys; sys.exit(sys.version_info < (3, 11))'
for python in ${PYTHON:-python3 python}; do
  "$python" -c "$recent" 2>/dev/null && break || python=""
done
[ -n "$python" ] || { echo "ring_attn needs Python 3.11 or newer; name one with PYTHON=/path/to/python3.11" >&2; exit 1; }

venv=${VENV:-.venv}
venv_python=$venv/bin/python
if [ ! -x "$venv_python" ]; then
  # A PyTorch that the interpreter can see is used, the environment of the interpreter included when it is itself a virtual one.
  share=""; "$python" -c 'import torch' 2>/dev/null && share=--system-site-packages
  "$python" -m venv $share "$venv" || {
    "$python" -m venv --clear --without-pip $share "$venv"
    "$python" -m pip --python "$venv_python" install pip
  }
  if [ -n "$share" ] && ! "$venv_python" -c 'import torch' 2>/dev/null; then
    parent=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')
    echo "$parent" > "$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
  fi
fi
"$venv_python" -c 'import torch' 2>/dev/null || "$venv_python" -m pip install torch==2.13.0

# The second install may add packages, never another PyTorch or Triton than the one at hand.
if [ pyproject.toml -nt "$venv/installed" ]; then
  "$venv_python" - > "$venv/constraints.txt" <<'P'
from importlib.metadata import PackageNotFoundError, version
print(f"torch=={version('torch')}")
try:
    print(f"triton=={version('triton')}")
except PackageNotFoundError:
    print("triton==3.6.0")
P
  "$venv_python" -m pip install --quiet -e '.[test]' -c "$venv/constraints.txt"
  touch "$venv/installed"
fi
