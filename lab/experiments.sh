#!/usr/bin/env bash
# The experiments of results/, run by run. What is finished is skipped, what was stopped goes on: start it again whenever you like.
#
#     bash lab/experiments.sh                  # everything but the groups gpu, wide, five, photographs, sounds and pretrained, three seeds; of the learning rates left aside one
#     bash lab/experiments.sh steps width T2   # some groups, some runs
#     SEEDS="1 2 3 4 5" JOBS=2 bash lab/experiments.sh swaps
#     LIST=1 bash lab/experiments.sh           # only print the commands that there are to run
#     RESULTS=out/again bash lab/experiments.sh trm    # run again what results/runs has, to compare
#
# JOBS runs go side by side, each on one core (two on two cores do more than one on both). Every run leaves out/exp/NAME_SEED; its metrics.json is copied to
# NAME_SEED.json in RESULTS, which is results/runs unless it says otherwise, and a run that is there counts as finished.
# results/runs was made up to commit 6d0df7b. Since then pictures are varied and fewer (those of before: --variety=0 --n_train=24000 --describe=0.1 --asked=1
# --types=color,shape,exist,count,compare,relation,hops), the shipped encoder is another one, queries and keys are normed, the written tokens come in at every pass, and
# config/trm.py has two passes: make those runs again at that commit, or take these as new ones. Group elastic is of today.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${THREADS:-1}
WANTED=" $* "
RESULTS=${RESULTS:-results/runs}

declare -A FLAGS GROUP
NAMES=()
add() {  # GROUP NAME FLAGS; only in group elastic passes are drawn
    local fixed=; [[ $1 == elastic || " ${*:3} " != *" config/"@(trm|swaps)".py "* ]] || fixed=" --min_inner_steps=None"
    [[ $1 == elastic || " ${*:3} " != *" config/swaps.py "* || " ${*:3} " == *" --recursion="* ]] || fixed+=" --recursion=concat"
    NAMES+=("$2"); GROUP[$2]=$1; FLAGS[$2]="${*:3}$fixed"
}

suffix() { [ $1 = 2e-3 ] || echo _lr$1; }  # of a run's name, by its learning rate

# flops: every decoder with the training FLOPs of n=2 in 1800 steps of 128 rows; two blocks but for plain4 and plain8; norm=pre, the default of that time. The
# learning rate, 2e-3, was tuned for n=2 and n=4; shaperate has what else there was to choose from, on val
for k in "n1 2127 --inner_steps=1" "n2 1800 --inner_steps=2" "n4 1376 --inner_steps=4" "loop2 2128 --recursion=loop --inner_steps=2" "loop4 1801 --recursion=loop --inner_steps=4" \
         "plain2 2341 --kind=plain --n_layer=2" "plain4 903 --kind=plain --n_layer=4" "plain8 405 --kind=plain --n_layer=8"; do
    set -- $k
    for r in "flops 2e-3" "shaperate 1e-3" "shaperate 4e-3" "shaperate 8e-3"; do
        read -r group rate <<< "$r"
        if [ $rate = 8e-3 ] && [[ $1 != plain[48] ]]; then continue; fi
        if [ $rate = 4e-3 ] && [[ $1 = plain[48] ]]; then group=flops; fi  # which these two prefer
        add $group flops_$1$(suffix $rate) --norm=pre --max_steps=$2 --eval_interval=150 "${@:3}" --learning_rate=$rate
    done
done
# base: the main job's TRM, n=4 and norm=post; each of the following runs, up to the encoders, changes one thing of it and has 1800 steps too
add base trm config/trm.py
# steps: depth, and the other decoders with as many steps, whatever they cost
for n in 1 2 6 8; do add steps n$n config/trm.py --inner_steps=$n; done
for n in 2 4; do add steps loop$n config/trm.py --recursion=loop --inner_steps=$n; done
for l in 2 4 8; do add steps plain$l config/trm.py --kind=plain --n_layer=$l; done
# cycles: T, with every cycle supervised and with the last one only; two steps each
for t in 2 3; do add cycles T$t config/trm.py --inner_steps=2 --outer_steps=$t; add cycles T${t}_deep config/trm.py --inner_steps=2 --outer_steps=$t --deep_supervision=true; done
# form: the other recursion, norm placements, the context mask, no averaging of weights; results/runs also has unbounded, --norm=unbounded, a setting that is gone:
# commit 87752ac made it
for k in "add --recursion=add" "pre --norm=pre" "causal --prefix_lm=false" "raw --ema=0"; do set -- $k; add form $1 config/trm.py "${@:2}"; done
# width: of the recursive and of the plain decoder
for c in 64 192; do add width c$c config/trm.py --n_embd=$c; add width plain4_c$c config/trm.py --kind=plain --n_layer=4 --n_embd=$c; done
# vision: none, and Matryoshka prefixes of the encoder's tokens
add vision blind config/trm.py --use_vision=false
for d in 16 32 64; do add vision dim$d config/trm.py --vision_dim=$d; done
# encoder: random weights (one step of alignment), and aligned for 2000 steps with one of the losses or with both
for e in random contrast cloze both; do add encoder encoder_$e config/trm.py --encoder=out/encoder_$e/encoder.pt; done
# swaps: state tracking, every decoder with the training FLOPs of n=4 in 3000 steps; trained on up to three swaps, tested on up to six. The learning rate is that
# of the shapes, 2e-3; group tuned has 1e-3, which suits most of them better, and rate what else there was to choose from, on val. results/runs also has own4, loop4 with
# blocks of its own in every step (2485 steps, --shared=false, a setting that is gone): commit 87752ac made it
for k in "n1 4559 --inner_steps=1" "n2 3886 --inner_steps=2" "n4 3000 --inner_steps=4" "n8 2061 --inner_steps=8" "loop2 4561 --recursion=loop --inner_steps=2" "loop4 3889 --recursion=loop --inner_steps=4" \
         "loop8 3003 --recursion=loop --inner_steps=8" "plain2 4993 --kind=plain --n_layer=2" "plain4 1917 --kind=plain --n_layer=4" "plain8 859 --kind=plain --n_layer=8"; do
    set -- $k
    for r in "swaps 2e-3" "tuned 1e-3" "rate 4e-3" "rate 5e-4"; do
        read -r group rate <<< "$r"
        add $group swaps_$1$(suffix $rate) config/swaps.py --max_steps=$2 --eval_interval=150 "${@:3}" --learning_rate=$rate
    done
done
# clock: plain decoders with the seconds of n=4, where equal FLOPs buy less of them: four blocks with 14 % more training steps (87 and 122 ms a step, side by side
# on one machine), eight with 21 % (results/seconds.md has the milliseconds)
for rate in 2e-3 1e-3; do add clock swaps_plain4_clock$(suffix $rate) config/swaps.py --kind=plain --n_layer=4 --max_steps=2180 --eval_interval=150 --learning_rate=$rate; done
add clock swaps_plain8_clock config/swaps.py --kind=plain --n_layer=8 --max_steps=1040 --eval_interval=150 --learning_rate=2e-3
# and with 23 % more, a generous reading of those seconds
add clock swaps_plain4_2360 config/swaps.py --kind=plain --n_layer=4 --max_steps=2360 --eval_interval=150 --learning_rate=2e-3
# swapsteps: plain decoders with 3000 steps of training there, whatever they cost: what n=4 has
for l in 4 8; do add swapsteps swaps_plain${l}_3000 config/swaps.py --kind=plain --n_layer=$l --eval_interval=150 --learning_rate=2e-3; done
# swapsdeep: two cycles of two steps there, the depth of n=4: with both supervised y has to be an answer half way
for rate in 2e-3 1e-3; do
    add swapsdeep swaps_T2_deep$(suffix $rate) config/swaps.py --inner_steps=2 --outer_steps=2 --deep_supervision=true --eval_interval=150 --learning_rate=$rate
    add swapsdeep swaps_T2$(suffix $rate) config/swaps.py --inner_steps=2 --outer_steps=2 --eval_interval=150 --learning_rate=$rate
done
# deeper: up to four swaps in training and seven in the test; every decoder with the training FLOPs of n=4 in 5000 steps there, at the rate that it prefers with three
# five: likewise up to five and eight, with the FLOPs of n=4 in 3000 steps: too few to get far there, so left out unless asked for
for k in "deeper swaps4 n4 5000 1e-3 --inner_steps=4" "deeper swaps4 n8 3485 1e-3 --inner_steps=8" "deeper swaps4 loop4 6393 1e-3 --recursion=loop --inner_steps=4" \
         "deeper swaps4 loop8 5005 1e-3 --recursion=loop --inner_steps=8" "deeper swaps4 plain4 3087 2e-3 --kind=plain --n_layer=4" \
         "five swaps5 n4 3000 1e-3 --inner_steps=4" "five swaps5 n8 2120 1e-3 --inner_steps=8"; do
    set -- $k; add $1 $2_$3 config/swaps.py --dataset=data/$2 --max_steps=$4 --eval_interval=150 --learning_rate=$5 "${@:6}"
done
# wide: the swaps at four times the width, sixteen times the core parameters, again with the training FLOPs of n=4 in 3000 steps; for a GPU, where that takes a minute or two
for k in "n1 4581 --inner_steps=1" "n4 3000 --inner_steps=4" "plain2 5022 --kind=plain --n_layer=2" "plain4 1906 --kind=plain --n_layer=4"; do
    set -- $k
    for rate in 1e-3 5e-4; do
        add wide swaps_$1_c512$(suffix $rate) config/swaps.py --n_embd=512 --n_head=8 --max_steps=$2 --eval_interval=300 "${@:3}" --learning_rate=$rate
    done
done
# published: Sort-of-CLEVR; with the frozen encoder also other decoders, with the training FLOPs of n=2
for c in sortofclevr sortofclevr_encoder; do add published $c config/$c.py; done
add published sortofclevr_n4 config/sortofclevr.py --inner_steps=4 --max_steps=4537
add published sortofclevr_loop4 config/sortofclevr.py --recursion=loop --inner_steps=4 --max_steps=6005
add published sortofclevr_plain2 config/sortofclevr.py --kind=plain --n_layer=2 --max_steps=7915

# elastic: passes drawn for every training step, beside always as many, at equal training FLOPs; and y alone
for k in "elastic elastic --recursion=concat --max_steps=2800 --eval_interval=700" "elastic_loop elastic" "main trm" \
         "sortofclevr_two sortofclevr --norm=post --qk_norm=true --n_kv_head=1 --max_steps=3000 --eval_interval=750" \
         "sortofclevr_elastic sortofclevr --norm=post --qk_norm=true --n_kv_head=1 --min_inner_steps=1 --inner_steps=8 --recall=true --max_steps=3232 --eval_interval=808" \
         "sortofclevr_elastic_loop sortofclevr --norm=post --qk_norm=true --n_kv_head=1 --recursion=loop --min_inner_steps=1 --inner_steps=8 --recall=true --max_steps=3828 --eval_interval=957" \
         "swaps_elastic swaps --recursion=concat --max_steps=2630 --eval_interval=526" "swaps_elastic_loop swaps" \
         "swaps_drawn swaps --recursion=concat --draw_after=0 --max_steps=2350 --eval_interval=470" \
         "swaps_four swaps --recursion=concat --inner_steps=4 --min_inner_steps=None --draw_after=0 --recall=false --max_steps=3000 --eval_interval=500"; do
    set -- $k; add elastic $1 config/$2.py "${@:3}"
done

# photographs: needs data/mosaics and data/daquar (docs/photographs.md); left out unless asked for
along="--init_from=out/exp/mosaics_1 --max_steps=100 --eval_interval=100 --batch_size=64 --learning_rate=5e-4"
for k in "mosaics" "mosaics_blind --use_vision=false" "mosaics_plain4 --kind=plain --n_layer=4 --max_steps=1076 --eval_interval=269" \
         "mosaics_frozen $along" "mosaics_along $along --train_encoder=true --encoder_lr=0.4" \
         "mosaics_elastic --min_inner_steps=1 --inner_steps=8 --recall=true --max_steps=2060 --eval_interval=515" \
         "daquar --dataset=data/daquar --max_question_tokens=48 --max_steps=400 --eval_interval=100" \
         "daquar_blind --dataset=data/daquar --max_question_tokens=48 --max_steps=400 --eval_interval=100 --use_vision=false"; do
    set -- $k; add photographs $1 config/mosaics.py "${@:2}"
done

# sounds: pictures and sounds in one context, and the two controls; left out unless asked for
for k in "sounds" "sounds_blind --use_vision=false" "sounds_deaf --use_sound=false"; do
    set -- $k; add sounds $1 config/sounds.py "${@:2}"
done

# pretrained: SmolLM2 and a TRM on mosaics, an hour of a core each, the blind one less; needs data/mosaics_few, which is data/mosaics with --n_val=60 --n_test=200, and the weights by
# their name on the hub or, with DECODER=FOLDER, in a folder; left out unless asked for
few="--decoder=${DECODER:-HuggingFaceTB/SmolLM2-135M-Instruct} --dataset=data/mosaics_few --batch_size=16"
for k in "smollm2 smollm2 --max_steps=706 --eval_interval=353" "smollm2_projection smollm2 --train_decoder=projection --max_steps=1059 --eval_interval=353" \
         "smollm2_trm smollm2_trm --max_steps=666 --eval_interval=333" "smollm2_blind smollm2 --use_vision=false --max_steps=470 --eval_interval=235"; do
    set -- $k; add pretrained $1 config/$2.py $few "${@:3}"
done
add pretrained mosaics_hour config/mosaics.py --dataset=data/mosaics_few --max_steps=19000 --eval_interval=1900

# gpu: Edge-Glass' experiments at its own scale, bash lab/experiments_gpu.sh; left out, as wide and five are, unless asked for
for n in 1 2 4 6 8; do add gpu pixmo_n$n config/trm_pixmo.py --inner_steps=$n; done
for t in 2 3; do add gpu pixmo_T$t config/trm_pixmo.py --outer_steps=$t --deep_supervision=true; done
for l in 2 4 8; do add gpu pixmo_plain$l config/plain_pixmo.py --n_layer=$l; done
for c in 256 1024; do add gpu pixmo_n4_c$c config/trm_pixmo.py --n_embd=$c; add gpu pixmo_plain4_c$c config/plain_pixmo.py --n_embd=$c; done
for d in 512 1024 2048; do add gpu pixmo_dim$d config/trm_pixmo.py --vision_dim=$d; done
for f in recursion=add recursion=loop norm=post ema=0.998 use_vision=false; do add gpu pixmo_${f/=/_} config/trm_pixmo.py --$f; done

run_of() { echo python train.py ${FLAGS[$1]} --seed=$2 --out_dir=out/exp/$1_$2; }  # NAME SEED

one() {  # NAME SEED
    local out=out/exp/$1_$2
    mkdir -p out/exp $RESULTS
    if $(run_of $1 $2) > $out.console 2>&1; then  # runs what run_of says
        cp $out/metrics.json $RESULTS/.$1_$2.json && mv $RESULTS/.$1_$2.json $RESULTS/$1_$2.json  # it appears whole
    else
        echo "$1, seed $2: failed, see $out.console"; tail -n 1 $out.console
    fi
}

TODO=()
for seed in ${SEEDS:-1 2 3}; do for name in "${NAMES[@]}"; do
    if [ "$WANTED" = "  " ] && [[ ${GROUP[$name]} != @(gpu|wide|five|photographs|sounds|pretrained) && ( $seed = 1 || ${GROUP[$name]} != *rate ) ]] || [[ $WANTED == *" ${GROUP[$name]} "* || $WANTED == *" $name "* ]]; then
        [ -e $RESULTS/${name}_$seed.json ] || TODO+=("$name $seed")
    fi
done; done
for word in $WANTED; do
    [[ " ${NAMES[*]} ${GROUP[*]} " == *" $word "* ]] || { echo "$word: no such group or run; groups are $(printf '%s\n' "${GROUP[@]}" | sort -u | xargs)" >&2; exit 1; }
done
echo "${#TODO[@]} runs to do"
if [ -n "${LIST:-}" ]; then for job in "${TODO[@]}"; do run_of $job; done; exit; fi
need() { [[ " ${TODO[*]}" == *" $1"* ]]; }  # the beginning of a run's name
for e in "random --max_steps=1" "contrast --max_steps=2000 --objective=contrast" "cloze --max_steps=2000 --objective=cloze" "both --max_steps=2000"; do
    set -- $e; if need encoder_$1 && [ ! -e out/encoder_$1/encoder.pt ]; then python -m align config/align.py "${@:2}" --out_dir=out/encoder_$1; fi
done
for d in "swaps 6 3" "swaps4 7 4" "swaps5 8 5"; do
    set -- $d; if need $1_ && [ ! -e data/$1 ]; then python data.py shapes --out=data/$1 --types=swaps --n_train=24000 --min_objects=4 --max_objects=4 --max_swaps=$2 --train_swaps=$3 --describe=0 --asked=1; fi
done
if need sortofclevr && [ ! -e data/sortofclevr ]; then python data.py sortofclevr --n_test=1000; fi
if need sounds && [ ! -e data/sounds ]; then python data.py sounds --out=data/sounds; fi
start=$SECONDS; k=0
for job in "${TODO[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n || true; k=$((k + 1)); eta=$(((SECONDS - start) * (${#TODO[@]} - k) / k)); echo "$k of ${#TODO[@]} done | eta $((eta / 60)) min"; done
    echo "starting $job"; one $job &
done
wait
