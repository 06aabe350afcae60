#!/usr/bin/env bash
# The experiments of results/README.md, run by run. What is finished is skipped, what was stopped goes on: start it again whenever you like.
#
#     bash config/experiments.sh                  # everything, three seeds
#     bash config/experiments.sh depth width T2   # some groups, some runs
#     SEEDS="1 2 3 4 5" JOBS=2 bash config/experiments.sh depth
#     LIST=1 bash config/experiments.sh           # only print the commands that there are to run
#
# JOBS runs go side by side, each on one core (two on two cores do more than one on both). Every run leaves out/exp/NAME_SEED; its metrics.json is copied to
# results/runs/NAME_SEED.json, and a run that is there counts as finished.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${THREADS:-1}
WANTED=" $* "

declare -A FLAGS GROUP
NAMES=()
add() { NAMES+=("$2"); GROUP[$2]=$1; FLAGS[$2]="${*:3}"; }   # add GROUP NAME FLAGS

# flops: every decoder with the training FLOPs of n=2 in 1800 steps of 128 rows; two blocks but for plain4 and plain8
for k in "n1 2127 --inner_steps=1" "n2 1800 --inner_steps=2" "n4 1376 --inner_steps=4" "loop2 2128 --recursion=loop --inner_steps=2" "loop4 1801 --recursion=loop --inner_steps=4" \
         "plain2 2341 --kind=plain --n_layer=2" "plain4 903 --kind=plain --n_layer=4" "plain8 405 --kind=plain --n_layer=8"; do
    set -- $k; add flops flops_$1 --max_steps=$2 --eval_interval=150 "${@:3}"
done
# steps: the same decoders with 1800 steps each, whatever they cost
for k in "n1 --inner_steps=1" "n4 --inner_steps=4" "loop2 --recursion=loop --inner_steps=2" "loop4 --recursion=loop --inner_steps=4" "plain2 --kind=plain --n_layer=2" \
         "plain4 --kind=plain --n_layer=4" "plain8 --kind=plain --n_layer=8"; do
    set -- $k; add steps steps_$1 --max_steps=1800 --eval_interval=150 "${@:2}"
done
# depth: how many steps of recursion; from here on all have 1800 steps of training
for n in 6 8; do add depth steps_n$n --inner_steps=$n; done
# cycles: T, with every cycle supervised and with the last one only
for t in 2 3; do add cycles T$t --inner_steps=2 --outer_steps=$t; add cycles T${t}_deep --inner_steps=2 --outer_steps=$t --deep_supervision=true; done
# form: the other recursion, norm placements, the context mask, no averaging of weights
add form add4 --recursion=add --inner_steps=4
add form post4 --norm=post --inner_steps=4
add form unbounded4 --norm=unbounded --inner_steps=4
add form causal4 --prefix_lm=false --inner_steps=4
add form raw4 --ema=0 --inner_steps=4
# width: of the recursive and of the plain decoder
for c in 64 192; do add width n4_c$c --inner_steps=4 --n_embd=$c; add width plain4_c$c --kind=plain --n_layer=4 --n_embd=$c; done
# vision: none, an encoder of random weights (after one step of alignment), and Matryoshka prefixes of the encoder's tokens
add vision blind4 --inner_steps=4 --use_vision=false
add vision random4 --inner_steps=4 --encoder=out/encoder_random/encoder.pt
for d in 16 32 64; do add vision dim$d --inner_steps=4 --vision_dim=$d; done
# rate: the learning rate of each kind of decoder, judged on val
for r in 1e-3 4e-3; do for k in "n1 --inner_steps=1" "n4 --inner_steps=4" "plain4 --kind=plain --n_layer=4"; do set -- $k; add rate $1_lr$r "${@:2}" --learning_rate=$r; done; done
# swaps: state tracking, every decoder with the training FLOPs of n=4 in 3000 steps; trained on up to three swaps, tested on up to six
for k in "n1 4559 --inner_steps=1" "n2 3886 --inner_steps=2" "n4 3000 --inner_steps=4" "n8 2061 --inner_steps=8" "loop4 3889 --recursion=loop --inner_steps=4" \
         "plain2 4993 --kind=plain --n_layer=2" "plain4 1917 --kind=plain --n_layer=4"; do
    set -- $k; add swaps swaps_$1 config/swaps.py --max_steps=$2 --eval_interval=150 "${@:3}"
done
# published: Sort-of-CLEVR
for c in sortofclevr sortofclevr_encoder; do add published $c config/$c.py; done

# gpu: the seed's experiments at its own scale, bash config/experiments_gpu.sh; left out unless asked for
for n in 1 2 4 6 8; do add gpu pixmo_n$n config/trm_pixmo.py --inner_steps=$n; done
for t in 2 3; do add gpu pixmo_T$t config/trm_pixmo.py --outer_steps=$t --deep_supervision=true; done
for l in 2 4 8; do add gpu pixmo_plain$l config/plain_pixmo.py --n_layer=$l; done
for c in 256 1024; do add gpu pixmo_n4_c$c config/trm_pixmo.py --n_embd=$c; add gpu pixmo_plain4_c$c config/plain_pixmo.py --n_embd=$c; done
for d in 512 1024 2048; do add gpu pixmo_dim$d config/trm_pixmo.py --vision_dim=$d; done
for f in recursion=add recursion=loop norm=post ema=0.998 use_vision=false; do add gpu pixmo_${f/=/_} config/trm_pixmo.py --$f; done

run_of() { echo python train.py ${FLAGS[$1]} --seed=$2 --out_dir=out/exp/$1_$2; }  # of NAME SEED

one() {  # NAME SEED
    local out=out/exp/$1_$2 log=out/exp/$1_$2.console
    mkdir -p out/exp results/runs
    if $(run_of $1 $2) > $log 2>&1; then
        cp $out/metrics.json results/runs/$1_$2.json
    else
        echo "$1, seed $2: failed, see $log"; tail -n 1 $log
    fi
}

TODO=()
for seed in ${SEEDS:-1 2 3}; do for name in "${NAMES[@]}"; do
    if [ "$WANTED" = "  " ] && [ ${GROUP[$name]} != gpu ] || [[ $WANTED == *" ${GROUP[$name]} "* || $WANTED == *" $name "* ]]; then
        [ -e results/runs/${name}_$seed.json ] || TODO+=("$name $seed")
    fi
done; done
echo "${#TODO[@]} runs to do"
if [ -n "${LIST:-}" ]; then for job in "${TODO[@]}"; do run_of $job; done; exit; fi
need() { printf '%s\n' "${TODO[@]}" | grep -q "^$1"; }
if need random4 && [ ! -e out/encoder_random/encoder.pt ]; then python train.py config/align.py --max_steps=1 --out_dir=out/encoder_random; fi
if need swaps && [ ! -e data/swaps ]; then python data.py shapes --out=data/swaps --types=swaps --min_objects=4 --max_objects=4 --max_swaps=6 --train_swaps=3 --describe=0; fi
if need sortofclevr && [ ! -e data/sortofclevr ]; then python data.py sortofclevr --n_test=1000; fi
start=$SECONDS; k=0
for job in "${TODO[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n || true; k=$((k + 1)); eta=$(((SECONDS - start) * (${#TODO[@]} - k) / k)); echo "$k of ${#TODO[@]} done | eta $((eta / 60)) min"; done
    echo "starting $job"; one $job &
done
wait
