#!/usr/bin/env bash
# Edge-Glass' experiments at full size, on PixMo's photographs: first python -m align config/align_pixmo.py, and the data as config/trm_pixmo.py says. On a GPU; not
# measured yet. As lab/experiments.sh: resumable, SEEDS, LIST.
JOBS=1 THREADS=${THREADS:-8} exec bash "$(dirname "$0")/experiments.sh" gpu
