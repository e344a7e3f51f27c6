#!/usr/bin/env bash
# A real Slurm on this machine alone, and gradpipe in it: an array that collects, is preempted and
# requeued, a merge, an array that prunes; torchrun under srun, preempted and requeued too; then the
# same without Slurm, to the same bytes.
#
#     apt-get install slurm-wlm munge
#     scripts/slurm_smoke.sh [PYTHON]        as root; ends with 0 if all of it holds
#
# Nothing of the machine's own Slurm is touched: munged, slurmctld and slurmd run from a folder of
# their own, at ports of their own, and end with this script.
set -euo pipefail

python=$(realpath -s "${1:-.venv/bin/python}")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
host=$(hostname -s)
shards=4
export SLURM_CONF=$work/slurm.conf PYTHONPATH=$root OMP_NUM_THREADS=1
daemons=()
trap 'kill "${daemons[@]}" 2>/dev/null || true; sleep 2; kill -9 "${daemons[@]}" 2>/dev/null || true
  wait; rm -rf "$work"' EXIT # slurmd does not end while a job of a failed run is there

note() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
fail() { note "FAILED: $*"; tail -n 20 "$work"/*.log "$work"/out-* 2>/dev/null || true; exit 1; }
until_true() { # SECONDS COMMAND...: wait for it
  local last=$((SECONDS + $1)); shift
  until "$@"; do [ $SECONDS -lt $last ] || fail "waited in vain for: $*"; sleep 0.1; done
}

mkdir "$work/state" "$work/spool"
dd if=/dev/urandom of="$work/munge.key" bs=1024 count=1 status=none
chmod 600 "$work/munge.key"
chmod 755 "$work"
cat > "$SLURM_CONF" <<EOF
ClusterName=smoke
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
AuthInfo=socket=$work/munge.socket
SlurmctldPort=26817
SlurmdPort=26818
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=spare Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL PriorityTier=10
EOF
munged --foreground --force --socket="$work/munge.socket" --key-file="$work/munge.key" \
  --pid-file="$work/munge.pid" --seed-file="$work/munge.seed" 2> "$work/munge.log" &
daemons+=($!)
until_true 20 test -S "$work/munge.socket"
slurmctld -D > "$work/ctld.log" 2>&1 & daemons+=($!)
slurmd -D -N "$host" > "$work/d.log" 2>&1 & daemons+=($!)
until_true 60 bash -c "sinfo -h -o %T 2>/dev/null | grep -q idle"
note "Slurm $(sinfo --version | cut -d' ' -f2) is up on $host"

options=(--dataset stdlib --num-samples 64 --seq-len 128 --schedule streamed)
cat > "$work/collect.sh" <<EOF
#!/bin/bash
srun $python -m gradpipe collect-grads embedded $work/store ${options[*]} \\
    --shard "\$SLURM_ARRAY_TASK_ID/$shards"
code=\$?
echo "task \$SLURM_ARRAY_TASK_ID ended with \$code, restart \${SLURM_RESTART_COUNT:-0}"
if [ \$code -eq 75 ]; then
    scontrol requeue "\${SLURM_ARRAY_JOB_ID}_\$SLURM_ARRAY_TASK_ID"
fi
exit \$code
EOF
cd "$work"
job=$(sbatch --parsable --array=0-$((shards - 1)) --cpus-per-task=1 --requeue --open-mode=append \
  --output="$work/out-%a" collect.sh)
note "array $job of $shards shards is submitted"
until_true 300 bash -c "ls $work/store/partial/*-of-$shards/block-*.json > /dev/null 2>&1"
note "the first block is committed: a more urgent job takes the node"
urgent=$(sbatch --parsable --partition=urgent --exclusive --output="$work/out-urgent" \
  --wrap "sleep 2")
until_true 300 bash -c "! squeue -h -j $urgent 2>/dev/null | grep -q ."
preempted=$(grep -lc "ended with 75" "$work"/out-[0-9]* | wc -l) || true
[ "$preempted" -ge 1 ] || fail "no task ended with 75"
note "$preempted tasks were preempted, ended with 75 and are requeued"
until_true 900 bash -c "! squeue -h -j $job 2>/dev/null | grep -q ."
for task in $(seq 0 $((shards - 1))); do
  grep -q "task $task ended with 0" "$work/out-$task" || fail "task $task did not finish"
done
note "all tasks ended with 0"
"$python" -m gradpipe store merge "$work/store" > /dev/null
note "merged"

cat > "$work/prune.sh" <<EOF
#!/bin/bash
srun $python -m gradpipe prune embedded $work/store $work/pruned --sparsity 0.5
EOF
sbatch --wait --array=0-1 --cpus-per-task=1 --output="$work/out-prune-%a" prune.sh > /dev/null \
  || fail "the pruning failed"
[ -f "$work/pruned/pruning.json" ] || fail "nothing is published"
note "pruned by an array of 2"

cat > "$work/ranks.sh" <<EOF
#!/bin/bash
srun $python -m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 2 \\
    -m gradpipe collect-grads embedded $work/ranks ${options[*]}
echo "torchrun ended with \$?, restart \${SLURM_RESTART_COUNT:-0}"
if [ ! -f $work/ranks/commit.json ] && [ "\${SLURM_RESTART_COUNT:-0}" -lt 5 ]; then
    scontrol requeue "\$SLURM_JOB_ID"
fi
EOF
job=$(sbatch --parsable --ntasks=1 --cpus-per-task=2 --requeue --open-mode=append \
  --output="$work/out-ranks" ranks.sh)
note "two ranks under torchrun are submitted"
until_true 300 bash -c "ls $work/ranks/partial/0-of-1/block-*.json > /dev/null 2>&1"
urgent=$(sbatch --parsable --partition=urgent --exclusive --output="$work/out-urgent" \
  --wrap "sleep 2")
until_true 300 grep -q "torchrun ended with 1, restart 0" "$work/out-ranks"
saved=$(grep -o "pipe: rank [01]: stopped" "$work/out-ranks" | sort -u | wc -l)
[ "$saved" -eq 2 ] || fail "$saved of 2 ranks said that they stopped"
note "preempted after a block: both ranks stopped in order, torchrun ended with 1, it is requeued"
until_true 300 bash -c "! squeue -h -j $urgent 2>/dev/null | grep -q ."
scontrol update "JobId=$job" StartTime=now # Slurm would hold it back for two minutes
until_true 600 bash -c "! squeue -h -j $job 2>/dev/null | grep -q ."
grep -q "torchrun ended with 0" "$work/out-ranks" || fail "torchrun did not finish"
note "torchrun went on and ended with 0"

for shard in 0 1; do echo "collect-grads embedded ranks-alone ${options[*]} --shard $shard/2"; done \
  > "$work/commands"
echo "store merge ranks-alone" >> "$work/commands"
for shard in $(seq 0 $((shards - 1))); do echo "collect-grads embedded alone ${options[*]} \
--shard $shard/$shards"; done >> "$work/commands"
echo "store merge alone" >> "$work/commands"
echo "prune embedded alone pruned-alone --sparsity 0.5" >> "$work/commands"
"$python" - <<'EOF' > "$work/alone.log" 2>&1 || fail "the runs without Slurm"
import contextlib, pathlib, shlex, sys
from gradpipe import cli
for line in pathlib.Path("commands").read_text().splitlines():
    sys.argv = ["pipe", *shlex.split(line)]
    with contextlib.suppress(SystemExit):
        cli.main()
EOF
diff -r "$work/store" "$work/alone" || fail "another store than without Slurm"
diff -r "$work/ranks" "$work/ranks-alone" || fail "another store of ranks than of shards"
diff -r "$work/pruned" "$work/pruned-alone" || fail "another checkpoint than without Slurm"
note "the same runs without Slurm left the same bytes"
