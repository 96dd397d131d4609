#!/usr/bin/env bash
# Trains on this machine: ./launch/train.sh [CONFIG.toml] [--section.key value ...]      (default: configs/demo.toml)
# One process a GPU, at most $NPROC (default: 4, and 2 of 3, as sequence lengths are mostly powers of two); 2 processes over gloo
# where there is no GPU. A single GPU gets one process that hosts a simulated ring of 2.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

gpus=$("$venv_python" -c 'import torch; print(torch.cuda.device_count())')
nproc=$(( gpus == 0 ? 2 : gpus )); most=${NPROC:-$(( gpus == 3 ? 2 : 4 ))}; nproc=$(( nproc < most ? nproc : most ))
case "${1:---}" in -*) set -- configs/demo.toml "$@" ;; esac
config=$1; shift
[ "$nproc" -gt 1 ] || set -- --ring.simulated 2 "$@"
echo "$gpus GPU(s): $nproc process(es)"
exec "$venv_python" -m torch.distributed.run --standalone --nproc-per-node "$nproc" -m ring_attn train "$config" "$@"
