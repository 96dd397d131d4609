#!/usr/bin/env bash
# Runs the tests: ./launch/test.sh [pytest arguments ...]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$venv_python" -m pytest "$@"
