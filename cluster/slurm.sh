#!/bin/bash
# One run on a Slurm cluster, over as many time limits as it takes: saves before the limit, goes back into the queue, and
# continues from its newest checkpoint.
#
#   sbatch --nodes 2 --gpus-per-node 8 cluster/slurm.sh recipes/llama_437m.yaml [section.key=value ...]
#
# From the repository, which all nodes must see at the same path, as they must RUNS_DIR and the data. The environment:
#   RUN                  the run's name; default: the recipe's
#   PYTHON               default: .venv/bin/python
#   PROCESSES_PER_NODE   default: the node's GPUs; on CPUs say how many
#   HEAD_ADDRESS, PORT   of the rendezvous; default: the first node's name, a port made of the job's number
#   MAX_RESTARTS         how often torchrun starts all processes again when one fails; default 3
#   MAX_REQUEUES         default 100
# The run ends when runs/<RUN>/final exists. STOP in its folder stops it for good: it is not queued again.
#SBATCH --job-name=clm
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -u
recipe=${1:?usage: sbatch cluster/slurm.sh RECIPE [section.key=value ...]}
shift
run=${RUN:-$(basename "$recipe" .yaml)}
folder=${RUNS_DIR:-runs}/$run
export HEAD=${HEAD_ADDRESS:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export RENDEZVOUS_PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives its processes to save
restarts=${SLURM_RESTART_COUNT:-0}
echo "job $SLURM_JOB_ID, start $((restarts + 1)), on $SLURM_JOB_NODELIST: $folder"

# Slurm signals this shell before the time limit. The run reads the file at its next step, saves and stops.
asked=
trap 'asked=1; echo "time is nearly up: the run is asked to save"; mkdir -p "$folder"; touch "$folder/STOP"' USR1

srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
    --rdzv_backend c10d --rdzv_endpoint "$HEAD:$RENDEZVOUS_PORT" --rdzv_id "$SLURM_JOB_ID-$restarts" \
    --max_restarts "${MAX_RESTARTS:-3}" \
    run_clm.py "$recipe" "training.run_name=$run" run.uneven_batch=true "$@" &
child=$!
wait "$child"; code=$?  # returns when the signal comes, too
while [ "$asked" ] && kill -0 "$child" 2>/dev/null; do
    wait "$child"; code=$?
done
if [ "$asked" ] && [ ! -d "$folder/final" ]; then
    if [ "$restarts" -ge "${MAX_REQUEUES:-100}" ]; then
        echo "not finished after $restarts requeues: not queued again"
        exit 1
    fi
    echo "saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
