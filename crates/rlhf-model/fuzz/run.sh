#!/bin/sh
# run.sh NAME [SECONDS [OPTION…]]: fuzzes config, gguf, index or safetensors; OPTION is one of
# libFuzzer's.
set -eu
cd "$(dirname "$0")"
name=$1
seconds=${2:-600}
if [ $# -gt 1 ]; then shift 2; else shift; fi
case $name in
gguf) dict=gguf.dict ;;
*) dict=json.dict ;;
esac
# A file is written for each input: in memory where that is possible.
if [ -d /dev/shm ]; then export TMPDIR=/dev/shm; fi
# The targets are linked with libtorch, whose own threads would only wait.
LD_LIBRARY_PATH="${LIBTORCH:-$(cd ../../.. && pwd)/.libtorch}/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export LD_LIBRARY_PATH OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1
mkdir -p "corpus/$name" "artifacts/$name"
host=$(rustc -vV | sed -n 's/^host: //p')
exec "target/$host/release/$name" "corpus/$name" "seeds/$name" -dict=$dict \
    -artifact_prefix="artifacts/$name/" -timeout=10 -rss_limit_mb=1024 \
    -max_total_time="$seconds" -print_final_stats=1 "$@"
