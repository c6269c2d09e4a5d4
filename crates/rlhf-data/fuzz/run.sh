#!/bin/sh
# run.sh NAME [SECONDS [OPTION…]]: fuzzes import-FORMAT, read-ENDING, records, template or
# tokenizer_config; OPTION is one of libFuzzer's.
set -eu
cd "$(dirname "$0")"
name=$1
seconds=${2:-600}
if [ $# -gt 1 ]; then shift 2; else shift; fi
target=${name%%-*}
case $target in
import) export FORMAT="${name#import-}" ;;
read) export ENDING="${name#read-}" ;;
esac
case $target in
template) dict=template.dict ;;
*) dict=json.dict ;;
esac
# A file is written for each input: in memory where that is possible.
if [ -d /dev/shm ]; then export TMPDIR=/dev/shm; fi
mkdir -p "corpus/$name" "artifacts/$name"
host=$(rustc -vV | sed -n 's/^host: //p')
exec "target/$host/release/$target" "corpus/$name" "seeds/$name" -dict=$dict \
    -artifact_prefix="artifacts/$name/" -timeout=10 -rss_limit_mb=1024 \
    -max_total_time="$seconds" -print_final_stats=1 "$@"
