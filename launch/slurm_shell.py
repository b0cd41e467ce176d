"""The part of a batch script that is the same for every run: how a life begins and what comes after it.

It needs bash, coreutils and Slurm's own commands. The variables that it reads are set before it, by ``slurm_script``.
"""

from __future__ import annotations

FUNCTIONS = r"""
say() {
  printf '%s | job %s, life %d | %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$((RESTARTS + 1))" "$*"
}

# exit_state.json is written by a run that ends by itself; after a kill there is none.
read_exit_state() {
  outcome=none resume=false step=0 reason='it was killed, or left no word'
  local text=''
  [[ -r $RUN/exit_state.json ]] && text=$(<"$RUN/exit_state.json")
  [[ $text =~ \"outcome\":\ \"([a-z]+)\" ]] && outcome=${BASH_REMATCH[1]}
  [[ $text =~ \"resume\":\ (true|false) ]] && resume=${BASH_REMATCH[1]}
  [[ $text =~ \"step\":\ ([0-9]+) ]] && step=${BASH_REMATCH[1]}
  [[ $text =~ \"reason\":\ \"([^$'\n']*)\" ]] && reason=${BASH_REMATCH[1]}
}

# A checkpoint is whole when it is named step-NUMBER and nothing more.
newest_checkpoint() {
  local path name newest=none highest=-1
  for path in "$CHECKPOINTS"/step-*; do
    name=${path##*/}
    if [[ $name =~ ^step-([0-9]{8,})$ ]] && ((10#${BASH_REMATCH[1]} > highest)); then
      newest=$name highest=$((10#${BASH_REMATCH[1]}))
    fi
  done
  echo "$newest"
}

# Lives in a row without a new checkpoint are counted before each begins, so that those count that end with a node.
count_life() {
  local job='' count=0 from=''
  [[ -r $LIVES ]] && read -r job count from <"$LIVES"
  newest=$(newest_checkpoint)
  if [[ ! $count =~ ^[0-9]{1,6}$ || $from != "$newest" || $job != "$COUNTED_BY" ]]; then count=0; fi
  lives=$((count + 1))
  ((lives <= MAX_FAILURES)) || give_up "$count"
  printf '%s %d %s\n' "$COUNTED_BY" "$lives" "$newest" >"$LIVES" && return
  say "giving up: $LIVES cannot be written"
  exit 1
}

give_up() {
  say "giving up: $1 lives in a row made no new checkpoint (the newest is $newest); see $RUN/logs and $RUN/slurm," \
    "then submit again"
  exit 1
}

# The word tells the run that it is to be started again; an empty file is a person's wish and stays one.
ask_to_stop() {
  [[ -e $RUN/stop ]] && return
  echo requeue >"$RUN/stop.$SLURM_JOB_ID" && mv -n "$RUN/stop.$SLURM_JOB_ID" "$RUN/stop"
}

warned() {
  warning=yes
  say 'the time limit comes near: the run is told to save and stop'
  ask_to_stop
}

# A node that Slurm has given up may live on, with its cable pulled say: what wakes up there must leave the next life,
# which runs elsewhere by then, alone.
is_this_life() {
  [[ $1 == *" Restarts=$RESTARTS "* ]]
}

# SIGTERM: somebody cancels or requeues the job, the limit was reached before the run could save, or a preemption
# gives a time of grace. Slurm has sent it to the ranks as well.
terminated() {
  local job
  job=$(scontrol -o show job "$SLURM_JOB_ID")
  if ! is_this_life "$job"; then
    cancelled=yes
    return
  fi
  warning=yes
  ask_to_stop
  [[ $job == *' JobState=RUNNING '* ]] && return
  if [[ $job == *' Reason=TimeLimit '* ]]; then
    say 'the time limit came before the run had saved: give it more time with --warn-seconds'
    [[ $CHAIN == yes ]] || { scontrol requeue "$SLURM_JOB_ID" && requeued=yes; }
  else
    cancelled=yes
  fi
}

start_again() {
  if [[ $CHAIN == yes ]]; then
    say 'the next job of the chain goes on'
    exit "$1"
  fi
  trap - USR1 TERM
  if [[ $requeued != yes ]]; then
    if ! is_this_life "$(scontrol -o show job "$SLURM_JOB_ID")"; then
      say 'Slurm does not know this life any more: it may have started the job again elsewhere'
      exit 1
    fi
    if ! scontrol requeue "$SLURM_JOB_ID"; then
      say 'Slurm does not requeue this job: submit it again, or use --chain'
      exit 1
    fi
  fi
  say 'requeued'
  sleep 3600  # until Slurm ends this shell
  exit 1
}
"""

BEGINNING = r"""
outcome='' resume='' step='' reason='' newest='' lives=0 warning='' cancelled='' requeued=''
mkdir -p "$RUN/slurm" "$CHECKPOINTS" || exit 1
read_exit_state
if [[ $outcome == finished ]] && ((step >= STEPS)); then
  say "nothing to do: the run has finished its $step steps"
  exit 0
fi
if [[ $CHAIN == yes && $outcome == stopped && $resume == false ]]; then
  say "nothing to do: $reason; remove $RUN/exit_state.json to go on"
  exit 0
fi
count_life
rm -f "$RUN/exit_state.json"  # of an earlier life: it must not be taken for the end of this one
say "nodes $SLURM_JOB_NODELIST; begins from checkpoint $newest; what the ranks print is in $RUN/slurm"
trap warned USR1
trap terminated TERM
"""

ENDING = r"""
step_pid=$!

# wait returns early when a signal comes. After a warning the file is written again if it is gone while the ranks live:
# those that were just starting have removed it.
while kill -0 "$step_pid" 2>/dev/null; do
  if [[ $warning == yes ]]; then
    sleep 1
    kill -0 "$step_pid" 2>/dev/null && ask_to_stop
  else
    wait "$step_pid"
  fi
done
wait "$step_pid"
code=$?
if [[ $warning == yes && -e $RUN/stop && $(<"$RUN/stop") == requeue ]]; then rm -f "$RUN/stop"; fi

read_exit_state
say "srun ended with code $code; the run says: $outcome at step $step ($reason)"

if [[ $cancelled == yes ]]; then
  say 'the job was cancelled or requeued by somebody else: nothing more is done here'
  exit 0
fi
case $outcome in
  finished)
    exit 0 ;;
  refused)
    exit 2 ;;
  stopped)
    rm -f "$LIVES"
    [[ $resume == true ]] || exit 0
    start_again 0 ;;
esac
# It failed, or was killed. A run that is refused before it may write leaves its exit code alone.
if [[ $outcome == none && $code == 2 ]]; then exit 2; fi
if [[ $(newest_checkpoint) == "$newest" ]] && ((lives >= MAX_FAILURES)); then give_up "$lives"; fi
start_again 1
"""
