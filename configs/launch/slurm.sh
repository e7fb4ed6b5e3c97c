#!/usr/bin/env bash
# sbatch configs/launch/slurm.sh CONFIG [key=value ...]: one task a GPU, started by srun itself. Submit it again to continue.
#
# A lost process or task is started again within the allocation, in seconds. A lost node, and the time limit, put the job back into the
# queue, from where it goes on. `scancel JOB` ends it: the ranks hear of it first, and save.
#SBATCH --job-name=fasttrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time limit, to this script alone. Not TERM: that is what scancel sends, after which nothing is to be requeued.
#SBATCH --signal=B:USR1@120
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${hosts%%$'\n'*}" MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

out_of_time=
trap 'out_of_time=yes; kill -TERM "$supervisor"' USR1
trap 'kill -TERM "$supervisor"' TERM

# --stop: srun answers a SIGTERM of its own by killing its tasks; scancel with a signal hands it to them.
# --wait: ranks whose peer is lost write their stacks, save what they can and end by themselves; what does not is killed a minute later.
fasttrain supervise --stop "scancel --signal=TERM $SLURM_JOB_ID" -- \
  srun --kill-on-bad-exit=0 --wait=60 fasttrain train "$@" &
supervisor=$!
status=0
wait "$supervisor" || status=$?
while kill -0 "$supervisor" 2>/dev/null; do # a signal ended the wait, not the run
  status=0
  wait "$supervisor" || status=$?
done

# 143: saved and stopped. 138: what was lost did not come back in this allocation; another may do better, ten times at most.
if [[ $status == 143 && $out_of_time ]] || [[ $status == 138 && ${SLURM_RESTART_COUNT:-0} -lt 10 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
