"""A run in a browser: what its latents fire on, what they do, and the whole dictionary at a glance.

    topkapi view runs/demo            serves the page and its numbers on this machine
    topkapi export runs/demo OUT      the same page as files, for any static host

1. `serve`: the command topkapi view. `app`: the application. `guard`: who may ask
2. `study_api`, `model_api`: what may be asked. `asking`: reads and checks requests. `answers`, `binary`: writes answers
3. `opened`: a run, its study, and what is loaded in the background. `labels`: names that people give to latents
4. `latents`, `modes`, `examples`, `texts`: one latent. `overview`, `runs`: all of them. `columns`, `index`: the table
5. `worker`: the one thread that runs the language model. `experiments`, `patterns`: what it is asked for
6. `export`: topkapi export. `static/`: the page

docs/viewer.md describes the API. Every number comes from `topkapi.study`, `topkapi.statistics` or `topkapi.explore`.
"""
