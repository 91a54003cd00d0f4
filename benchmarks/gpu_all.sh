#!/bin/bash
# Everything that needs one CUDA GPU, in one call of at most ten minutes: tests/gpu and the GPU benchmarks.
#
#     benchmarks/gpu_all.sh [OUT]        # default: benchmarks/results
#
# Needs torch, transformers, pydantic, numpy, pyarrow, xxhash, peft and pytest; no DeepSpeed, webdataset, ray or mteb. Each
# part has its own time limit, so that a slow one does not cost the results of the next (what it has written by then stays);
# the exit code is that of the tests. FlexAttention's are apart, because compiling its kernels takes longer than all others.
set -u
cd "$(dirname "$0")/.." || exit
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
mkdir -p "$out"

part() {                              # part NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1
    local code=$?
    tail -n 25 "$out/$name.log"
    echo "== $name: exit code $code"
    return $code
}

export PYTHONUNBUFFERED=1
part tests_gpu 70 "$python" -m pytest -v tests/gpu -k "not flex" -p no:cacheprovider
tests=$?
part tests_gpu_flex 100 "$python" -m pytest -v tests/gpu -k flex -p no:cacheprovider || tests=$?
part mfu 170 "$python" -m benchmarks.mfu --out "$out"
part bottleneck 70 "$python" -m benchmarks.bottleneck --shape 135m --rounds 3 --out "$out"
part bottleneck_large 50 "$python" -m benchmarks.bottleneck --shape 1.5b --rounds 2 --tokens 2048 \
    --lengths 1024 4096 --out "$out"
part infonce 40 "$python" -m benchmarks.infonce --sizes 1024 4096 16384 --out "$out"
part loss_head 25 "$python" -m benchmarks.loss_head --out "$out"
part bottleneck_flex 50 "$python" -m benchmarks.bottleneck --shape 135m --attention flex --rounds 2 \
    --lengths 4096 --out "$out"
exit $tests
