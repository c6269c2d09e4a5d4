#!/bin/sh
# Cargo's runner: lets the program find libtorch when the loader's own paths do not.
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}${LIBTORCH:-$root/.libtorch}/lib"
export LD_LIBRARY_PATH
exec "$@"
