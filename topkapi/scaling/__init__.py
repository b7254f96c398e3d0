"""What training at a given size needs: memory, time, communication, and the best mesh of replicas and shards.

1. `shapes`: what is trained, how it is laid out over GPUs, and the sizes that one of them sees
2. `volumes`: bytes of every collective of a step
3. `memory`: bytes that a GPU holds
4. `hardware`: how fast a GPU and its links are; `calibration` fits that to what `topkapi bench` measures
5. `step_time`: milliseconds of each part of a step
6. `planner`: the fastest layout of those that fit; `report` and `picture` show it

A model, not a measurement: docs/scaling.md says which of its numbers were measured. Called by `topkapi plan`.
"""
