#!/bin/sh
# Install what `make wheel` left in dist/ into an environment of its own, away from the checkout, and use it:
# sh requirements/release_check.sh PYTHON KIND
set -eu
python=$1 kind=$2
checkout=$(pwd)
version=$(sed -n 's/^version = //p' setup.cfg)
grep -q "^## $version\$" CHANGELOG.md || {
    echo "CHANGELOG.md has no section '## $version', the version of setup.cfg" >&2
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-deps -r "requirements/$kind.txt"
for built in "dist/mim_torchrec-$version-py3-none-any.whl" "dist/mim_torchrec-$version.tar.gz"; do
    "$folder/env/bin/python" -m pip install --quiet --no-deps --no-build-isolation --force-reinstall "$checkout/$built"
    cd "$folder"
    test "$(env/bin/mim --version)" = "$version"
    env/bin/mim doctor
    env/bin/python -c 'import mim_torchrec as mim; print(*(getattr(mim, name) for name in mim.__all__), sep="\n")'
    cd "$checkout"
    echo "$built: installs and works"
done
