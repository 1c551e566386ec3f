#!/bin/sh
# Build the wheel, install it with its declared dependencies alone into a fresh environment, and use it from a folder
# that is not the checkout (try_install.py).
#
#   sh scripts/try_install.sh [locked|lowest] [ARGUMENT...]
#
# locked: the versions of constraints.txt. lowest: the lowest that pyproject.toml declares, but for torch, whose older
# versions the registry has as GPU builds of gigabytes only.
set -eu
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
checkout=$(cd "$(dirname "$0")/.." && pwd)
versions=${1:-locked}
[ $# = 0 ] || shift
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
${PYTHON:-python3} -m venv "$scratch/environment"
python="$scratch/environment/bin/python"
if [ "$versions" = lowest ]; then
    "$python" "$checkout/scripts/lowest_versions.py" >"$scratch/constraints.txt"
else
    cp "$checkout/constraints.txt" "$scratch/constraints.txt"
fi
pip="$python -m pip --quiet --disable-pip-version-check"
$pip wheel --no-deps --wheel-dir "$scratch" "$checkout"
$pip install --no-compile --constraint "$scratch/constraints.txt" "$scratch"/headscope-*.whl
mkdir "$scratch/elsewhere"
cd "$scratch/elsewhere"
"$python" "$checkout/scripts/try_install.py" "$@"
