#!/bin/sh
# Fetches A2D2 into Datasets/. It can be stopped at any time; the same command resumes:
#   sh get_data.sh                  the frames with boxes, their bus signals, the calibration
#   sh get_data.sh semantic bus     other parts; sh get_data.sh --help lists them and the options
# Needs Python 3.9 or newer and no packages; the program is a2d2/download/.
root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
for python in "$root/.venv/bin/python" python3 python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
        # -I, and the repository at the end of the path: no module of it can hide one of the standard library.
        exec "$python" -I -c 'import runpy, sys
sys.path.append(sys.argv.pop(1))
runpy.run_module("a2d2.download", run_name="__main__", alter_sys=True)' "$root" "$@"
    fi
done
echo "get_data.sh: no Python 3.9 or newer was found: install python3 and run this again" >&2
exit 1
