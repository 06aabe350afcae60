#!/usr/bin/env bash
# How long Edge-Glass' experiment takes on this machine: an encoder with random weights of the true shapes (CLIP ViT-L/14 at 336 pixels, 64 latents,
# 4096 dimensions), N noise photographs of 640 x 480, encoded once, then config/trm_pixmo.py. A timing: nothing is learnt.
#     bash lab/pixmo_timing.sh 14000 4375 gpt2     # pictures; steps: ten times through them, 32 at a time; tokenizer
set -euo pipefail
cd "$(dirname "$0")/.."
N=${1:-14000} STEPS=${2:-4375} TOKENIZER=${3:-gpt2} WORK=out/pixmo_timing
mkdir -p "$WORK"
python - "$N" "$WORK" <<'DRAW'
import io, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from encoder import EDGE_GLASS_CONFIG, Encoder, save_encoder
from plumbing.tables import write_dataset

def row(i):
    rng, file = np.random.default_rng(i), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (15, 20, 3), np.uint8)).resize((640, 480), Image.BICUBIC).save(file, 'JPEG')
    words = ' '.join(rng.choice(['red', 'blue', 'a', 'the', 'house', 'sky', 'on', 'tree', 'small', 'of'], 40))
    return dict(image=file.getvalue(), question='what is in this image?', answer=words, sample_id=str(i))

n, work = int(sys.argv[1]), Path(sys.argv[2])
if not (work / 'data').exists():
    with ThreadPoolExecutor() as pool:
        splits = dict(train=range(n), val=range(n, n + 8), test=range(n + 8, n + 16))
        write_dataset(work / 'data', ((split, made) for split, ids in splits.items() for made in pool.map(row, ids)))
torch.manual_seed(0)
save_encoder(Encoder(EDGE_GLASS_CONFIG), work / 'encoder.pt')
DRAW
start=$SECONDS
python train.py config/trm_pixmo.py --fresh=true --dataset="$WORK/data" --encoder="$WORK/encoder.pt" --tokenizer="$TOKENIZER" \
    --cache_dir="$WORK/cache" --out_dir="$WORK/run" --max_steps="$STEPS" --eval_interval="$STEPS"
echo "$N pictures encoded and $STEPS steps: $((SECONDS - start)) s"
