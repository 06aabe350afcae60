#!/usr/bin/env bash
# The experiments of results/README.md, run by run. What is finished is skipped, what was stopped goes on: start it again whenever you like.
#
#     bash config/experiments.sh                  # everything, three seeds
#     bash config/experiments.sh depth plain      # some groups
#     SEEDS="1 2 3 4 5" JOBS=2 bash config/experiments.sh depth
#     LIST=1 bash config/experiments.sh           # only say what there is to do
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

# depth: how many steps of recursion; every run has the same two blocks
for n in 1 2 4 6 8; do add depth n$n --inner_steps=$n; done
# plain: the same blocks without recursion, as many, twice and four times as many; and recursion without a latent state z
for l in 2 4 8; do add plain plain$l --kind=plain --n_layer=$l; done
for n in 2 4; do add plain loop$n --recursion=loop --inner_steps=$n; done
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
# vision: none, and Matryoshka prefixes of the encoder's tokens
add vision blind4 --inner_steps=4 --use_vision=false
for d in 16 32 64; do add vision dim$d --inner_steps=4 --vision_dim=$d; done
# rate: the learning rate of each kind of decoder, judged on val
for r in 1e-3 4e-3; do for k in "n1 --inner_steps=1" "n4 --inner_steps=4" "plain4 --kind=plain --n_layer=4"; do set -- $k; add rate $1_lr$r "${@:2}" --learning_rate=$r; done; done
# heldout: trained on short chains, tested on longer ones too
for k in "n1 --inner_steps=1" "n4 --inner_steps=4" "plain4 --kind=plain --n_layer=4"; do set -- $k; add heldout heldout_$1 "${@:2}" --dataset=data/chains_heldout; done

draw() { [ -e "$1" ] || python data.py shapes --out="$1" "${@:2}"; }
chains="--chains=next --types=color,shape,hops --min_objects=4 --max_objects=4 --n_train=8000 --n_val=300 --n_test=600 --describe=0"

one() {  # NAME SEED
    local out=out/exp/$1_$2 log=out/exp/$1_$2.console
    mkdir -p out/exp results/runs
    if python train.py config/chains.py ${FLAGS[$1]} --seed=$2 --out_dir=$out > $log 2>&1; then
        cp $out/metrics.json results/runs/$1_$2.json
    else
        echo "$1, seed $2: failed, see $log"; tail -n 1 $log
    fi
}

TODO=()
for seed in ${SEEDS:-1 2 3}; do for name in "${NAMES[@]}"; do
    if [ "$WANTED" = "  " ] || [[ $WANTED == *" ${GROUP[$name]} "* ]]; then
        [ -e results/runs/${name}_$seed.json ] || TODO+=("$name $seed")
    fi
done; done
echo "${#TODO[@]} runs to do"
if [ -n "${LIST:-}" ]; then printf '%s\n' "${TODO[@]}"; exit; fi
draw data/chains $chains --max_hops=4
draw data/chains_heldout $chains --max_hops=4 --train_hops=2
start=$SECONDS; k=0
for job in "${TODO[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n || true; k=$((k + 1)); eta=$(((SECONDS - start) * (${#TODO[@]} - k) / k)); echo "$k of ${#TODO[@]} done | eta $((eta / 60)) min"; done
    echo "starting $job"; one $job &
done
wait
