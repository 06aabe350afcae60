#!/usr/bin/env bash
# What only a GPU can show, in nine minutes at most, what matters most first:
#     bash lab/gpu.sh out/gpu               # leaves NAME.txt of every part there, and parts.txt
#     LIST=1 bash lab/gpu.sh                # only prints the parts, their seconds and commands
#     SMALL=1 bash lab/gpu.sh out/gpu_try   # a few steps of each: tries the script out, on a CPU too
# A part that fails or outlasts its seconds is said, and the next one begins. Needs requirements-dev.txt.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-out/gpu}
mkdir -p "$OUT"
few=() hundred=(--max_steps=100 --eval_interval=100) peak=() pictures=512 photographs="4000 1250 bpe"
if [ -n "${SMALL:-}" ]; then
    few=(--max_steps=4 --eval_interval=4) hundred=(--max_steps=4 --eval_interval=4)
    peak=(--repeats=1 --peak_size=512 --batch_size=2) pictures=2 photographs="2 2 bpe"
fi

part() {  # NAME SECONDS COMMAND
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    if [ -n "${LIST:-}" ]; then echo "$name $limit $*"; return; fi
    timeout "$limit" "$@" > "$OUT/$name.txt" 2>&1 || status=$?
    echo "$name: status $status after $((SECONDS - start)) s$([ $status = 124 ] && echo ', its limit')" | tee -a "$OUT/parts.txt"
}

part machine 20 bash -c 'nvidia-smi; python -c "import torch; print(torch.__version__, torch.version.cuda)"; git log --oneline -1'
part main 100 python train.py config/trm.py --fresh=true "--out_dir=$OUT/trm" "${few[@]}"             # aim: 40 s, 4 ms a training step
part step 40 python -m lab.bench --scale=main ${SMALL:+--repeats=1}                                # and where its time goes
part compiled 60 python -m lab.bench --scale=main --compile=true ${SMALL:+--repeats=1}               # or torch.compile, its first step too
part tests 100 python -m pytest -q tests/test_gpu.py -k "not compil"                                   # resumed, deterministic, float16
part encoder 50 python -m lab.bench --encoder=random "--pictures=$pictures" ${SMALL:+--repeats=1}     # aim: 1,000 photographs a second
part wide 40 python -m lab.bench --n_embd=1024 --n_head=16 "${peak[@]}"                               # aim: half of the peak
part processes 40 torchrun --standalone --nproc_per_node=1 train.py config/trm.py --fresh=true "${hundred[@]}" "--out_dir=$OUT/processes"
part photographs 90 bash lab/pixmo_timing.sh $photographs                                            # the recipe of the photographs
if [ -z "${LIST:-}" ]; then tr '\r' '\n' < "$OUT/main.txt" | tail -n 20; fi
