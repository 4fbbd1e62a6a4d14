#!/usr/bin/env bash
# What a session with a GPU should run, in under ten minutes and with nothing to install: the tests that need one, then
# the compile and the step benchmarks. Each part has a bound on its time and leaves what it has measured until then.
#
#   benchmarks/gpu.sh                          everything, into replfx-benchmarks/gpu (or $OUT)
#   benchmarks/gpu.sh --device cpu --quick     does it run at all?
#   PYTHON=.venv/bin/python MODELS=vit_b,gpt2 benchmarks/gpu.sh
set -u
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
out="${OUT:-replfx-benchmarks/gpu}"
models="${MODELS:-resnet110,vit_b,gpt2,resnet50,convnext_t}"
status=0

part() { # NAME SECONDS COMMAND…
    echo "== $1"
    timeout "$2" "${@:3}" || { status=1 && echo "== $1: failed, or cut after $2 s"; }
}

slower=1
case " $* " in *" cpu "*) slower=10 ;; esac
part tests $((100 * slower)) "$python" -m pytest -q -m gpu -p no:cacheprovider tests
part compile $((400 * slower)) "$python" -m benchmarks compile --models "$models" --out "$out" "$@"
part step $((80 * slower)) "$python" -m benchmarks step --models vit_s --repeats 5 --out "$out" "$@"
exit "$status"
