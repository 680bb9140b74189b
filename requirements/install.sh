#!/bin/sh
# Install the lock file and this checkout into a virtual environment: sh requirements/install.sh VENV PYTHON KIND
#
# VENV may hold spaces and may be shared by checkouts. Two stamps in it say what it holds: .packages-* the lock file,
# .checkout-* the checkout that was installed last. What is there already is not installed again.
set -eu
venv=$1 python=$2 kind=$3
lock=requirements/$kind.txt
packages=$venv/.packages-$(cksum <"$lock" | cut -d' ' -f1)
checkout=$venv/.checkout-$( (pwd; cat setup.cfg) | cksum | cut -d' ' -f1)

if [ ! -x "$venv/bin/python" ]; then
    if [ -z "$python" ]; then
        echo "no Python 3.11, 3.12 or 3.13 found: make PYTHON=<path of one>" >&2
        exit 2
    fi
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || {
        echo "$python is not Python 3.11, 3.12 or 3.13: make PYTHON=<path of one>" >&2
        exit 2
    }
    "$python" -m venv "$venv"
fi
if [ ! -e "$packages" ]; then
    # the two builds of fbgemm install the same files: the other one has to go first
    case $kind in cuda) other=fbgemm-gpu-cpu ;; *) other=fbgemm-gpu ;; esac
    "$venv/bin/python" -m pip uninstall --quiet --yes "$other" 2>/dev/null
    "$venv/bin/python" -m pip install --quiet --no-deps --no-compile -r "$lock"
    # pip would compile on one core; some packages hold files that no Python compiles, which pip passes over too
    "$venv/bin/python" -m compileall -qq -j 0 -x '/site-packages/.*/tests/' "$venv/lib" || :
    rm -f "$venv"/.packages-* "$venv"/.checkout-*
    touch "$packages"
fi
if [ ! -e "$checkout" ]; then
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
    rm -f "$venv"/.checkout-*
    touch "$checkout"
fi
