"""`topkapi bench`: a training step and its parts, timed on this machine against what the machine can do at best.

1. `cases`: what is timed; `workload` makes a case's inputs and steps
2. `running`: each case in turn, then other projects' steps (`peers`, `peer_steps`)
3. `ceilings`, `timing`, `profile`: how fast the machine can be, how long things take, and where
4. `report`, `pictures`: tables and plots; `calibrate` turns them into a description of the GPU for `topkapi plan`
"""
