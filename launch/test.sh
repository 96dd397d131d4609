#!/usr/bin/env bash
# Runs the tests in $TEST_PROCESSES processes (default 2), a file in one: ./launch/test.sh [pytest arguments ...]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$venv_python" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
